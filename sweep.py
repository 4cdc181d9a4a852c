"""
Which sampler? All of them on one checkpoint: accuracy against passes, tokens per second, distinct answers.

    python compare.py --ckpt out/sudoku                       every sampler at 1, 2, 4, 8, 16 steps; one JSON line each in --out
    python compare.py --ckpt out/sudoku --clues false         the same without prompts
    python compare.py --report docs/samplers_tables           tables and a plot of everything in --out (needs matplotlib)
    python compare.py --report docs/distill_tables --panels samplers       the same, checkpoints side by side

Lines that are there already are not made again, so a run that was stopped goes on.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dataset import Dataset
from diffusion import SCHEDULES
from eval import accuracy, prompts_of
from generate import MASKED_ONLY, OWN_PACE, SAMPLERS, UNIFORM_ONLY
from settings import die, load_config
from train import restore

LINES = [  # a sampler and the options that differ from its defaults
    ("ar", {}),
    ("ancestral", {}),
    ("ancestral", {"greedy_tail": True}),
    ("arpc", {}),
    ("arpc", {"metric": "gap"}),
    ("arpc", {"corruption": "divergence"}),
    ("arpc", {"corruption": "diffusion", "metric": "confidence"}),
    ("arpc", {"corruption": "random"}),
    ("arpc", {"guide_every": 2}),
    ("psi", {}),
    ("psi", {"kappa": "pc"}),
    ("psi", {"kappa": "0.55:posterior,0.05@0.9:remask,0:posterior", "eta": 0.05}),
    ("remdm_cap", {}),
    ("remdm_rescale", {}),
    ("remdm_conf", {}),
    ("remdm_loop", {}),
    ("first_hitting", {}),
    ("confidence", {}),
    ("threshold", {}),
    ("factor", {}),
    ("entropy_bound", {}),
    ("rcr", {}),
    ("saber", {}),
    ("prophet", {}),
    ("sched", {}),
    ("gibbs", {}),
    ("max_coupling", {}),
    ("edlm", {}),
    ("agreement", {}),
    ("speculation", {}),
    ("speculation", {"draft": "diffusion"}),
    ("speculation", {"draft": "diffusion", "rule": "rejection"}),
    ("speculation", {"draft": "first"}),
    ("speculation", {"draft": "random"}),
]
STEPS = (1, 2, 4, 8, 16)
HEAD = """# In numbers

Made by `python compare.py --report`. A cell is **percent correct** (95 % interval) · passes a token of a row · tokens a second; the columns
are steps a block. *distinct / expected*: different correct answers in the right-most cell, and how many as many uniform draws of possible
ones would give."""


@dataclass
class CompareConfig:
    ckpt: str = "out/sudoku"  # a training run's out_dir, with block size 1 in its mixture
    out: str = "out/samplers.jsonl"  # where the lines go
    samplers: str = ""  # these alone, as in ar,speculation
    n_eval: int = 512  # samples a line
    batch_size: int = 256  # samples at a time; 1 is what a person who waits for an answer sees
    clues: bool = True  # false: blank prompts (sudoku)
    max_new_tokens: int = 0  # per sample; 0: up to the end of the context
    temperature: float = 1.0
    seed: int = 1
    report: str = ""  # this path with .md and .png, from the lines in --out; nothing is sampled
    panels: str = "checkpoints"  # of the report: a table for each checkpoint with its samplers, or (samplers) the other way round
    device: str = "auto"


def label(row):
    """arpc metric=gap"""
    return " ".join([row["sampler"], *(f"{k}={v}" for k, v in row["options"].items())])


def setting(row, with_ckpt=True):
    """out/sudoku: sudoku, masked, with clues"""
    clues = {True: ", with clues", False: ", without clues"}.get(row["clues"], "")
    heat = f", temperature {row['temperature']:g}" if row["temperature"] != 1 else ""
    return (
        (f"{row['ckpt']}: " if with_ckpt else "")
        + f"{row['dataset']}, {row['process']}{clues}{heat}"
        + (f", batches of {row['batch_size']}" if row["batch_size"] != 256 else "")
    )


def cell(r):
    """82 (78-85) · 1.94 · 1,603: percent correct with its 95 % interval, passes a token, tokens a second"""
    low, high = 100 * r["low"], 100 * r["high"]
    return f"**{100 * r['accuracy']:.0f}** ({low:.0f}-{high:.0f}) · {r['nfe_token']:.2f} · {r['tokens_per_s']:,.0f}"


def report(rows, path, setting, label):
    """path.md: a table a setting, a line a label, see `cell`; path.png: accuracy against passes per token."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        die("the plot needs matplotlib", "pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = list(dict.fromkeys(map(setting, rows)))
    names = list(dict.fromkeys(map(label, rows)))
    across = min(2, len(settings))
    figure, axes = plt.subplots(-(-len(settings) // across), across, figsize=(8 * across, 5.5 * -(-len(settings) // across)), squeeze=False)
    out = [HEAD]
    for axis, name in zip(axes.flat, settings, strict=False):
        mine = [r for r in rows if setting(r) == name]
        heads = ["1 step", *(f"{n} steps" for n in STEPS[1:]), "own pace"]
        out += [f"\n### {name}\n", f"| | {' | '.join(heads)} | distinct / expected |", "| --- " * (len(heads) + 2) + "|"]
        for i, sampler in enumerate(names):
            line = {}
            for r in (r for r in mine if label(r) == sampler):
                if r["steps"] in line:
                    die(f"two different runs of {sampler} on {name}: which one?", "one --out for each")
                line[r["steps"]] = r
            if not line:
                continue
            most = line[max(line, key=lambda k: k or 0)]
            cells = [cell(line[n]) if n in line else "" for n in STEPS] + [cell(line[None]) if None in line else ""]
            out.append(f"| {sampler} | {' | '.join(cells)} | {most['distinct']} / {most['expected']:.0f} |")
            points = sorted((r["nfe_token"], 100 * r["accuracy"], 100 * r["low"], 100 * r["high"]) for r in line.values())
            x, y, low, high = zip(*points, strict=True)
            spread = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            headline = sampler in ("ar", "ancestral", "arpc")
            style = (
                {"color": "black"} if headline else {"color": plt.cm.tab20((2 * i + i // 10) % 20), "linestyle": "-" if i < 20 else "--"}
            )
            style |= {"marker": "osD^v<>pP*Xh"[i % 12], "linewidth": 2.2 if headline else 1, "zorder": 3 if headline else 2}
            axis.errorbar(x, y, yerr=spread, label=sampler, markersize=5, elinewidth=0.5, **style)
        axis.set(title=name, xscale="log", xlabel="passes per token", ylabel="% correct (95 % interval)")
        axis.set_xticks([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4], ["1/16", "1/8", "1/4", "1/2", "1", "2", "4"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles = {text: h for axis in axes.flat for h, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    figure.tight_layout()
    figure.savefig(f"{path}.png", dpi=60, bbox_inches="tight")
    Path(f"{path}.md").write_text("\n".join(out) + "\n")
    print(f"{path}.md, {path}.png: {len(rows)} lines")


def read(path):
    """The lines that are there."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    for i, line in enumerate(lines):
        try:
            lines[i] = json.loads(line)
        except ValueError:
            die(f"{path}, line {i + 1} is no JSON: was a run killed while it wrote?", f"sed -i {i + 1}d {path}")
    return lines


def main():
    cfg = load_config(CompareConfig, sys.argv[1:])
    lines = read(cfg.out)
    if cfg.panels not in ("checkpoints", "samplers"):
        die(f"panels {cfg.panels!r}: checkpoints or samplers", "--panels samplers")
    if cfg.report:
        if not lines:
            die(f"{cfg.out} holds no lines yet", "python compare.py --ckpt out/sudoku")
        page = Path(f"{cfg.report}.md")
        if page.exists() and not page.read_text().startswith(HEAD.splitlines()[0]):
            die(f"{page} is not a report of ours, and would be written over", f"--report {cfg.report}_tables")
        page.parent.mkdir(parents=True, exist_ok=True)
        if cfg.panels == "samplers":
            return report(lines, cfg.report, lambda r: f"{label(r)}: {setting(r, with_ckpt=False)}", lambda r: r["ckpt"])
        return report(lines, cfg.report, setting, label)
    chosen = [name for name in cfg.samplers.split(",") if name]
    if unknown := sorted(set(chosen) - set(SAMPLERS)):
        die(f"no sampler named {unknown[0]!r}", f"--samplers {','.join(SAMPLERS)}")
    for name, least in (("n_eval", 2), ("batch_size", 1), ("max_new_tokens", 0), ("temperature", 0), ("seed", 0)):
        if not least <= getattr(cfg, name) < float("inf"):
            die(f"{name} cannot be {getattr(cfg, name)}", f"--{name} {least} or more")
    run, meta, step, model, process = restore(cfg.ckpt, cfg.device)
    data = Dataset(run.dataset, run.seq_len)
    data.same_as(meta)
    trained = sorted(run.block_sizes)
    if trained[0] != 1 or len(trained) < 2:
        die(f"{cfg.ckpt} was trained on block sizes {', '.join(map(str, trained))}: this needs 1 and another", "--ckpt out/sudoku")
    prompts = prompts_of(data, cfg.n_eval, cfg.clues)
    weights = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()[:12]
    what = {
        "ckpt": cfg.ckpt, "weights": weights, "train_steps": step, "dataset": run.dataset, "process": run.process,
        "clues": cfg.clues if any(len(p) for p in prompts) else None, "n": len(prompts), "batch_size": cfg.batch_size,
        "max_new_tokens": cfg.max_new_tokens, "temperature": cfg.temperature, "seed": cfg.seed,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    missing = []
    for name, options in LINES:
        if name in (chosen or SAMPLERS) and SAMPLERS[name] not in (MASKED_ONLY if process.mask_id is None else UNIFORM_ONLY):
            for steps in [None] if SAMPLERS[name] in OWN_PACE else STEPS:
                row = {**what, "sampler": name, "options": options, "steps": steps}
                if not any(all(line.get(k) == v for k, v in row.items()) for line in lines):
                    missing.append(row)
    bar = tqdm(missing, desc=run.dataset, disable=None)
    for row in bar:
        how = {"block_size": 1 if row["sampler"] == "ar" else trained[-1], "steps": row["steps"], "temperature": cfg.temperature}
        how |= {"max_new_tokens": cfg.max_new_tokens or None, "schedule": SCHEDULES[run.schedule], "trained": trained, **row["options"]}
        try:
            result = accuracy(model, process, data, prompts, cfg.seed, cfg.batch_size, sampler=SAMPLERS[row["sampler"]], **how)
        except ValueError as e:
            bar.close()
            die(str(e), "python compare.py --help")
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        with open(cfg.out, "a") as f:
            f.write(json.dumps(row | result) + "\n")


if __name__ == "__main__":
    main()
