"""
What does speed cost? Samplers x steps x temperatures on a checkpoint: accuracy or generative perplexity
against passes and tokens per second, and how varied the texts are.

    python -m lab.sweep --ckpt out/sudoku                            every sampler at 1, 2, 4, 8, 16 steps
    python -m lab.sweep --ckpt out/sudoku --clues false              the same without prompts
    python -m lab.sweep --ckpt out/mix --samplers ancestral,arpc --steps 4,16 --temperatures 0.7,1
    python -m lab.sweep --report docs/tables --out out/all.jsonl     tables and a plot of all lines there;
                                                                     nothing is sampled
    python -m lab.sweep --report docs/tables --panels samplers       checkpoints side by side

One JSON line each in --out, by default out/sudoku/sweep.jsonl, and beside it a table (.md) and a plot (.png)
of this sweep. Lines that are there already are not made again, so a sweep that was stopped goes on where it
was.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion import SCHEDULES
from hub.published import is_published, place
from lab import plots
from lab.quality import NGRAMS, checker, generated, judge, prompts_of, quality, real_rows
from run import checkpoint
from run.cli import die, load_config, writable
from run.restore import dataset_for, noise_name, restore
from samplers import SAMPLERS

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
HEAD = """# In numbers

Made by `python -m lab.sweep`. A cell is **percent correct** (95 % interval) · passes a token of a row ·
tokens a second, or **perplexity** under the judge (95 % interval) · token entropy · passes · tokens a
second; the columns are steps a block. *variety*: of the right-most cell, different correct answers / how
many as many uniform draws of possible ones would give, or the share of different 4-grams."""


@dataclass
class SweepConfig:
    ckpt: str = "out/sudoku"  # a training run's out_dir
    init_from: str = ""  # or published weights: hf:OWNER/REPO/SUBFOLDER, or a folder (published.py)
    # where the lines go; the table and the plot lie beside it. Empty: sweep.jsonl in the checkpoint's folder
    out: str = ""
    samplers: str = ""  # these alone, as in ar,speculation; empty: all that the checkpoint serves
    steps: str = "1,2,4,8,16"  # a block
    temperatures: str = "1"  # as in 0.7,1; 0 is greedy
    n_eval: int = 512  # texts a line
    batch_size: int = 256  # texts at a time; 1 is what a person who waits for an answer sees
    clues: bool = True  # false: blank prompts (sudoku)
    max_new_tokens: int = 0  # per text; 0: up to the end of the context
    # self (its AR mode), a run's out_dir, gpt2, gpt2-large, none; auto: self where no answer can be checked
    judge: str = "auto"
    seed: int = 1
    report: str = ""  # this path with .md and .png, from the lines in --out; nothing is sampled
    # of the report: a table for each checkpoint with its samplers, or (samplers) the other way round
    panels: str = "checkpoints"
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
    """
    82 (78-85) · 1.94 · 1,603, or 12.3 (11.9-12.7) · 2.31 · 1.94 · 1,603, or both: see HEAD. Real text has no
    passes.
    """
    parts = []
    if "accuracy" in r:
        parts += [f"**{100 * r['accuracy']:.0f}** ({100 * r['low']:.0f}-{100 * r['high']:.0f})"]
    if "gen_ppl" in r:
        parts += [f"**{r['gen_ppl']:.4g}** ({r['ppl_low']:.4g}-{r['ppl_high']:.4g})"]
    if r.get("entropy") is not None and ("gen_ppl" in r or "accuracy" not in r):
        parts += [f"{r['entropy']:.2f}"]
    return " · ".join(
        parts + ([f"{r['nfe_token']:.2f}", f"{r['tokens_per_s']:,.0f}"] if "nfe_token" in r else [])
    )


def variety(r):
    grams = r.get(f"distinct_{NGRAMS[-1]}")
    return (
        f"{r['distinct']} / {r['expected']:.0f}"
        if r.get("expected")
        else ""
        if grams is None
        else f"{grams:.3f}"
    )


def page_of(path):
    """Exit if path.md is someone's own page, or cannot be written."""
    page = Path(f"{path}.md")
    writable(page, "report")
    if page.exists() and not page.read_text().startswith(HEAD.splitlines()[0]):
        die(f"{page} is not a table of ours, and would be written over", f"--report {path}_tables")
    return page


def report(rows, path, setting, label):
    """path.md: a table a setting, a line a label, see `cell`; path.png: plots.frontier."""
    page, out = page_of(path), [HEAD]
    columns = sorted({r["steps"] for r in rows if r["steps"] is not None})
    for name in dict.fromkeys(map(setting, rows)):
        mine = [r for r in rows if setting(r) == name]
        heads = [f"{n} step{'s' * (n > 1)}" for n in columns] + ["own pace"]
        out += [f"\n### {name}\n", f"| | {' | '.join(heads)} | variety |", "| --- " * (len(heads) + 2) + "|"]
        for sampler in dict.fromkeys(map(label, mine)):
            line = {}
            for r in (r for r in mine if label(r) == sampler):
                if r["steps"] in line:
                    die(f"two different runs of {sampler} on {name}: which one?", "one --out for each")
                line[r["steps"]] = r
            cells = [cell(line[n]) if n in line else "" for n in [*columns, None]]
            out.append(
                f"| {sampler} | {' | '.join(cells)} | {variety(line[max(line, key=lambda k: k or 0)])} |"
            )
    page.write_text("\n".join(out) + "\n")
    plots.frontier(rows, f"{path}.png", setting, label)
    print(f"{page}, {path}.png: {len(rows)} lines")


def read(path, mend=False):
    """The lines that are there. mend: cut off what a killed run left of its last one, and say so."""
    if not Path(path).exists():
        return []
    text, lines = Path(path).read_text(), []
    for i, line in enumerate(text.splitlines()):
        try:
            lines.append(json.loads(line))
        except ValueError:
            if mend and not text.endswith("\n") and i + 1 == len(text.splitlines()):
                os.truncate(path, len(text.encode()) - len(line.encode()))
                print(f"{path}: a killed run left half a line, which is made again")
                return lines
            die(
                f"{path}, line {i + 1} is no JSON: was a run killed while it wrote?",
                f"sed -i {i + 1}d {path}",
            )
    if mend and text and not text.endswith("\n"):
        with open(path, "a") as f:
            f.write("\n")
    return lines


def numbers(name, text, kind, least):
    """'1,2,4' -> [1, 2, 4]"""
    try:
        values = [kind(part) for part in text.split(",")]
        if min(values) < least or not all(map(math.isfinite, values)) or len(set(values)) < len(values):
            raise ValueError
    except ValueError:
        die(
            f"{name} {text!r} is not a list of different numbers from {least:g} on",
            f"--{name} {getattr(SweepConfig, name)}",
        )
    return values


def main():
    cfg = load_config(SweepConfig, sys.argv[1:])
    cfg.ckpt = cfg.init_from or cfg.ckpt
    cfg.out = cfg.out or (
        f"{place(cfg.ckpt)}.sweep.jsonl" if is_published(cfg.ckpt) else f"{cfg.ckpt}/sweep.jsonl"
    )
    if Path(cfg.out).suffix != ".jsonl":
        die(
            f"--out {cfg.out}: measurements go to a .jsonl file, and the table and the plot beside it",
            "--out out/sweep.jsonl",
        )
    lines = read(cfg.out, mend=not cfg.report)
    if cfg.panels not in ("checkpoints", "samplers"):
        die(f"panels {cfg.panels!r}: checkpoints or samplers", "--panels samplers")
    if cfg.report:
        if not lines:
            die(f"{cfg.out} holds no lines yet", "python -m lab.sweep --ckpt out/sudoku")
        if not all(
            {
                "ckpt",
                "dataset",
                "process",
                "clues",
                "temperature",
                "batch_size",
                "sampler",
                "options",
                "steps",
            }
            <= set(r)
            for r in lines
        ):
            die(
                f"{cfg.out} holds lines that are no sweep's",
                "python -m lab.sweep --ckpt out/sudoku --out out/sweep.jsonl",
            )
        if cfg.panels == "samplers":
            return report(
                lines, cfg.report, lambda r: f"{label(r)}: {setting(r, with_ckpt=False)}", lambda r: r["ckpt"]
            )
        return report(lines, cfg.report, setting, label)
    chosen = [name for name in cfg.samplers.split(",") if name]
    if unknown := sorted(set(chosen) - set(SAMPLERS)):
        die(f"no sampler named {unknown[0]!r}", f"--samplers {','.join(SAMPLERS)}")
    for name, least in (("n_eval", 2), ("batch_size", 1), ("max_new_tokens", 0), ("seed", 0)):
        if getattr(cfg, name) < least:
            die(f"{name} cannot be {getattr(cfg, name)}", f"--{name} {least} or more")
    steps, temperatures = (
        numbers("steps", cfg.steps, int, 1),
        numbers("temperatures", cfg.temperatures, float, 0),
    )
    run, meta, step, model, process = restore(cfg.ckpt, cfg.device)
    stem = cfg.out.removesuffix(".jsonl")
    writable(cfg.out, "out"), page_of(stem), plots.pyplot()  # now, not after hours
    data = dataset_for(cfg.ckpt, run, meta, model)
    trained = sorted(run.block_sizes)
    prompts = prompts_of(data, cfg.n_eval, cfg.clues)
    rows, starts = real_rows(data, prompts, cfg.max_new_tokens), [len(p) for p in prompts]
    module, tokenizer = checker(data.folder), data.tokenizer
    who, score = None, None
    if cfg.judge not in ("none", "auto") or (cfg.judge == "auto" and module is None):
        who, score = judge(
            cfg.judge, (model, process, trained), tokenizer, next(model.parameters()).device
        ) or (None, None)
    weights, device = checkpoint.fingerprint(model), next(model.parameters()).device
    what = {
        "ckpt": cfg.ckpt,
        "weights": weights,
        "train_steps": step,
        "dataset": run.dataset,
        "process": noise_name(run),
        "clues": cfg.clues if any(starts) else None,
        "n": len(prompts),
        "batch_size": cfg.batch_size,
        "max_new_tokens": cfg.max_new_tokens,
        "seed": cfg.seed,
        "judge": who,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    wants = lambda need: {f for f in SAMPLERS.values() if need in f.needs}
    cannot = wants("redraws" if process.absorbing else "absorbing")
    cannot |= {SAMPLERS["ar"]} | wants("AR mode") if trained[0] != 1 else set()
    cannot |= set(SAMPLERS.values()) - {SAMPLERS["ar"]} if trained == [1] else set()
    if refused := [name for name in chosen if SAMPLERS[name] in cannot]:
        die(
            f"{cfg.ckpt}, {run.process}, block sizes {', '.join(map(str, trained))}: "
            f"it cannot serve {refused[0]}",
            "--samplers ancestral",
        )
    missing = []
    for temperature in temperatures:
        for name, options in [("real text", {}), *LINES]:
            if name == "real text" or (name in (chosen or SAMPLERS) and SAMPLERS[name] not in cannot):
                for n in [None] if name == "real text" or "own pace" in SAMPLERS[name].needs else steps:
                    row = {
                        **what,
                        "temperature": temperature,
                        "sampler": name,
                        "options": options,
                        "steps": n,
                    }
                    if not any(all(line.get(k) == v for k, v in row.items()) for line in lines):
                        missing.append(row)
    bar = tqdm(missing, desc=run.dataset, disable=None)
    for row in bar:
        if row["sampler"] == "real text":
            result = quality(rows, starts[: len(rows)], tokenizer, module, score)
        else:
            how = {
                "block_size": 1 if row["sampler"] == "ar" else trained[-1],
                "steps": row["steps"],
                "temperature": row["temperature"],
            }
            how |= {
                "max_new_tokens": cfg.max_new_tokens or None,
                "schedule": SCHEDULES[run.schedule],
                "trained": trained,
            }
            try:
                texts, cost = generated(
                    model,
                    process,
                    data,
                    prompts,
                    cfg.seed,
                    cfg.batch_size,
                    sampler=SAMPLERS[row["sampler"]],
                    **how,
                    **row["options"],
                )
            except ValueError as e:
                bar.close()
                die(str(e), "python -m lab.sweep --help")
            result = cost | quality(texts, starts, tokenizer, module, score)
        with open(cfg.out, "a") as f:
            f.write(json.dumps(row | result) + "\n")
    report([r for r in read(cfg.out) if all(r.get(k) == v for k, v in what.items())], stem, setting, label)


if __name__ == "__main__":
    main()
