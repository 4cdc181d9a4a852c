"""
What does speed cost? Samplers x steps x temperatures on a checkpoint: accuracy or generative perplexity
against passes and tokens per second, and how varied the texts are.

    python -m lab.sweep --ckpt out/sudoku                            every sampler at 1, 2, 4, 8, 16 steps
    python -m lab.sweep --ckpt out/sudoku --clues false              the same without prompts
    python -m lab.sweep --ckpt out/mix --samplers ancestral,arpc --steps 4,16 --temperatures 0.7,1
    python -m lab.sweep --report docs/tables --out out/all.jsonl     tables and a plot of all lines there;
                                                                     nothing is sampled
    python -m lab.sweep --report docs/tables --panels samplers       checkpoints side by side

Options of a sampler follow its name: --samplers "ar,arpc metric=gap".

One JSON line each in --out, by default sweep.jsonl in the checkpoint's folder, and a table at the end. Lines
that are there already are not made again, so a sweep that was stopped goes on where it was.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python lab/sweep.py works too
import methods
from diffusion import SCHEDULES
from fast.block import generate
from hub.published import is_published, place
from lab import plots
from lab.quality import (
    NGRAMS,
    TEXT_HEADS,
    checker,
    generated,
    judge,
    prompts_of,
    quality,
    real_rows,
    text_columns,
)
from run import checkpoint
from run.cli import convert, die, load_config, writable
from run.flags import options
from run.machine import guard
from run.restore import dataset_for, noise_name, restore
from samplers import SAMPLERS
from samplers.constraint import REFUSED, WEIGHTED, writer

LINES = (  # where no --samplers are named: a sampler, and what differs from its default options
    "ar",
    "ancestral",
    "ancestral greedy_tail=true",
    "arpc",
    "arpc metric=gap",
    "arpc corruption=divergence",
    "arpc corruption=diffusion metric=confidence",
    "arpc corruption=random",
    "arpc guide_every=2",
    "psi",
    "psi kappa=pc",
    "psi kappa=0.55:posterior,0.05@0.9:remask,0:posterior eta=0.05",
    *"remdm_cap remdm_rescale remdm_conf remdm_loop first_hitting confidence threshold factor".split(),
    *"entropy_bound rcr saber prophet sched gibbs max_coupling edlm agreement speculation".split(),
    "speculation draft=diffusion",
    "speculation draft=diffusion rule=rejection",
    "speculation draft=first",
    "speculation draft=random",
)
HEAD = """# In numbers

Made by `python -m lab.sweep --report`. A cell is **percent correct** (95 % interval) · passes a token of a
row · tokens a second, or **perplexity** under the judge (95 % interval) · token entropy · passes · tokens a
second; the columns are steps a block. *variety*: of the right-most cell, different correct answers / how
many as many uniform draws of possible ones would give, or the share of different 4-grams."""


@dataclass
class SweepConfig:
    ckpt: str = "out/run"  # a training run's out_dir
    init_from: str = ""  # or published weights: hf:OWNER/REPO/SUBFOLDER, or a folder (published.py)
    out: str = ""  # where the lines go; empty: sweep.jsonl in the checkpoint's folder
    # these alone, as in ar,arpc metric=gap; empty: all that the checkpoint serves, some with several options
    samplers: str = ""
    steps: str = "1,2,4,8,16"  # a block
    temperatures: str = "1"  # as in 0.7,1; 0 is greedy
    n_eval: int = 512  # texts a line
    batch_size: int = 256  # texts at a time; 1 is what a person who waits for an answer sees
    clues: bool = True  # false: blank prompts (sudoku)
    max_new_tokens: int = 0  # per text; 0: up to the end of the context
    regex: str = ""  # only texts that match it, prompt included; see docs/constraints.md
    constraint: str = ""  # or FILE.py:name, a language of your own
    exact: int = 1  # weighted copies of each text under a constraint
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
    parts = [row["dataset"], row["process"]]
    parts += [{True: "with clues", False: "without clues"}[row["clues"]]] if row["clues"] is not None else []
    parts += [f"temperature {row['temperature']:g}"] if row["temperature"] != 1 else []
    parts += [f"batches of {row['batch_size']}"] if row["batch_size"] != 256 else []
    parts += [f"of {row['constraint']}, {row['exact']} copies"] if row.get("constraint") else []
    return f"{row['ckpt']}: " * with_ckpt + ", ".join(parts)


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
    if "nfe_token" in r:
        parts += [f"{r['nfe_token']:.2f}", f"{r['tokens_per_s']:,.0f}"]
    return " · ".join(parts)


def variety(r):
    if r.get("expected"):
        return f"{r['distinct']} / {r['expected']:.0f}"
    grams = r.get(f"distinct_{NGRAMS[-1]}")
    return "" if grams is None else f"{grams:.3f}"


def page_of(path):
    """Exit if path.md is someone's own page, or cannot be written."""
    page = Path(f"{path}.md")
    writable(page, "report")
    if page.exists() and not page.read_text(encoding="utf-8").startswith(HEAD.splitlines()[0]):
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
    page.write_text("\n".join(out) + "\n", encoding="utf-8")
    plots.frontier(rows, f"{path}.png", setting, label)
    print(f"{page}, {path}.png: {len(rows)} lines")


def read(path, mend=False):
    """The lines that are there. mend: cut off what a killed run left of its last one, and say so."""
    if not Path(path).exists():
        return []
    try:
        text, lines = Path(path).read_text(encoding="utf-8"), []
    except UnicodeDecodeError:
        die(f"{path} is no file of lines of JSON", "another path")
    for i, line in enumerate(text.splitlines()):
        try:
            lines.append(json.loads(line))
            if type(lines[-1]) is not dict:
                die(f"{path}, line {i + 1} is no measurement", f"sed -i {i + 1}d {path}")
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
        with open(path, "a", encoding="utf-8") as f:
            f.write("\n")
    return lines


def numbers(name, text, kind, least, example):
    """'1,2,4' -> [1, 2, 4]. example: a list that is fine."""
    try:
        values = [kind(part) for part in text.split(",")]
        if min(values) < least or not all(map(math.isfinite, values)) or len(set(values)) < len(values):
            raise ValueError
    except ValueError:
        die(
            f"{name} {text!r} is not a list of different numbers from {least:g} on",
            f"--{name} {example}",
        )
    return values


def asked_for(names):
    """[(sampler name, {option: value})] of names, each as in LINES; two lines for what is none."""
    if any(name.split()[0] not in SAMPLERS for name in names):
        for method in methods.names():  # a sampler may live in a method's file
            methods.load(method)
    found = []
    for name, *given in map(str.split, names):
        if name not in SAMPLERS:
            die(f"no sampler named {name!r}", f"--samplers {','.join(SAMPLERS)}")
        own, chosen = options(SAMPLERS[name]), {}
        for option, _, value in (pair.partition("=") for pair in given):
            try:
                chosen[option] = convert(value, type(own[option]))
            except (KeyError, TypeError, ValueError):
                die(f"{name} {option}={value}: no such option", f"python sample.py --sampler {name} --help")
        found.append((name, chosen))
    return found


def served(cfg, run, process, trained):
    """[(sampler name, options)] that are asked for, or all that the checkpoint serves."""
    named = asked_for([name for name in cfg.samplers.split(",") if name.strip()])
    wants = lambda need: {name for name, f in SAMPLERS.items() if need in f.needs}
    cannot = wants("redraws" if process.absorbing else "absorbing")
    cannot |= wants("absorbing") if process.mask_id is None else set()
    cannot |= {"ar"} | wants("AR mode") if trained[0] != 1 else set()
    cannot |= set(SAMPLERS) - {"ar"} if trained == [1] else set()
    if cfg.regex or cfg.constraint:
        cannot |= set(REFUSED) if cfg.exact == 1 else set(SAMPLERS) - set(WEIGHTED.split())
    if refused := [name for name, _ in named if name in cannot]:
        sizes = ", ".join(map(str, trained)) + (", under a constraint" if cfg.regex or cfg.constraint else "")
        problem = f"{cfg.ckpt}, {run.process}, block sizes {sizes}: it cannot serve {refused[0]}"
        die(problem, f"--samplers {'ar' if trained == [1] else 'ancestral'}")
    own = [name for name, f in SAMPLERS.items() if f.__module__ == f"methods.{run.method}"]
    every = asked_for([*LINES, *own])
    if cfg.regex or cfg.constraint:  # the last step of a greedy tail knows no language
        every = [(name, how) for name, how in every if not how.get("greedy_tail")]
    return named or [(name, how) for name, how in every if name not in cannot]


def show(rows):
    """The table, for a terminal."""
    width = max(map(len, map(label, rows)))
    print(f"{'sampler':<{width}} {'temp.':>5} {'steps':>5} {'passes':>6} {TEXT_HEADS} {'tokens/s':>9}")
    for r in rows:
        passes = f"{r['nfe_token']:.2f}" if "nfe_token" in r else ""
        speed = f"{r['tokens_per_s']:,.0f}" if "tokens_per_s" in r else ""
        start = f"{label(r):<{width}} {r['temperature']:>5g} {r['steps'] or '':>5} {passes:>6}"
        print(f"{start} {text_columns(r)} {speed:>9}")
    print("passes: through the network, for each token of a text.")


def draw(cfg):
    """The tables and the plot of --report."""
    lines = read(cfg.out)
    if not lines:
        die(f"{cfg.out} holds no lines yet", "python -m lab.sweep --ckpt out/sudoku")
    keys = {"ckpt", "clues", "temperature", "batch_size", "sampler", "options", "steps"}
    if not all(keys <= set(r) for r in lines):
        fix = "python -m lab.sweep --ckpt out/sudoku --out out/sweep.jsonl"
        die(f"{cfg.out} holds lines that are no sweep's", fix)
    if cfg.panels == "samplers":
        by_sampler = lambda r: f"{label(r)}: {setting(r, with_ckpt=False)}"
        return report(lines, cfg.report, by_sampler, lambda r: r["ckpt"])
    report(lines, cfg.report, setting, label)


@guard("a smaller --n_eval or --batch_size, or --device=cpu")
def main():
    cfg = load_config(SweepConfig, sys.argv[1:])
    cfg.ckpt, flag = cfg.init_from or cfg.ckpt, "--init_from" if cfg.init_from else "--ckpt"
    beside = f"{place(cfg.ckpt)}.sweep.jsonl" if is_published(cfg.ckpt) else f"{cfg.ckpt}/sweep.jsonl"
    cfg.out = cfg.out or beside
    if Path(cfg.out).suffix != ".jsonl":
        die(f"--out {cfg.out}: measurements go to a .jsonl file", "--out out/sweep.jsonl")
    if cfg.panels not in ("checkpoints", "samplers"):
        die(f"panels {cfg.panels!r}: checkpoints or samplers", "--panels samplers")
    if cfg.report:
        return draw(cfg)
    if cfg.regex and cfg.constraint:
        die("--regex and --constraint together", "one of them")
    for name, least in (("n_eval", 2), ("batch_size", 1), ("max_new_tokens", 0), ("seed", 0), ("exact", 1)):
        if not least <= getattr(cfg, name) < 2**62:
            die(f"{name} cannot be {getattr(cfg, name)}", f"--{name} {least} or more")
    steps = numbers("steps", cfg.steps, int, 1, SweepConfig.steps)
    temperatures = numbers("temperatures", cfg.temperatures, float, 0, SweepConfig.temperatures)
    lines = read(cfg.out, mend=True)
    run, meta, step, model, process = restore(cfg.ckpt, cfg.device, False, flag)
    trained, device = sorted(run.block_sizes), next(model.parameters()).device
    wanted = served(cfg, run, process, trained)
    writable(cfg.out, "out")  # now, not after hours
    data = dataset_for(cfg.ckpt, run, meta, model)
    prompts = prompts_of(data, cfg.n_eval, cfg.clues)
    real, starts = real_rows(data, prompts, cfg.max_new_tokens), [len(p) for p in prompts]
    module, tokenizer = checker(data.folder), data.tokenizer
    who, score = None, None
    if cfg.judge not in ("none", "auto") or (cfg.judge == "auto" and module is None):
        who, score = judge(cfg.judge, (model, process, trained), tokenizer, device) or (None, None)
    what = {
        "ckpt": cfg.ckpt, "weights": checkpoint.fingerprint(model), "train_steps": step,
        "dataset": run.dataset, "process": noise_name(run), "clues": cfg.clues if any(starts) else None,
        "n": len(prompts), "batch_size": cfg.batch_size, "max_new_tokens": cfg.max_new_tokens,
        "seed": cfg.seed, "judge": who,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    language = cfg.regex or cfg.constraint or None
    what |= {"constraint": language, "exact": cfg.exact if language else None}
    write = writer(generate, cfg.regex, cfg.constraint, tokenizer, meta["vocab_size"], exact=cfg.exact)
    rows = []
    for temperature in temperatures:
        for name, own in [("real text", {}), *wanted]:
            paced = name != "real text" and "own pace" not in SAMPLERS[name].needs
            line = {**what, "temperature": temperature, "sampler": name, "options": own}
            rows += [{**line, "steps": n} for n in (steps if paced else [None])]
    same = lambda line, row: all(line.get(k) == v for k, v in row.items())
    missing = [row for row in rows if not any(same(line, row) for line in lines)]

    def made(row, prompts):
        how = {
            "block_size": 1 if row["sampler"] == "ar" else trained[-1], "steps": row["steps"],
            "temperature": row["temperature"], "max_new_tokens": cfg.max_new_tokens or None,
            "schedule": SCHEDULES[run.schedule], "trained": trained, "sampler": SAMPLERS[row["sampler"]],
        }  # fmt: skip
        again = prompts, cfg.seed, cfg.batch_size
        try:
            return generated(model, process, data, *again, write=write, **how, **row["options"])
        except ValueError as e:
            die(str(e), getattr(e, "fix", f"python sample.py --sampler {row['sampler']} --help"))

    for row in {label(row): row for row in missing if row["sampler"] != "real text"}.values():
        made(row, prompts[:1])  # one text of each sampler: it complains now, not after the others
    bar = tqdm(missing, desc=run.dataset)
    for row in bar:
        bar.set_postfix_str(label(row) + (f", steps {row['steps']}" if row["steps"] else ""))
        if row["sampler"] == "real text":
            result = quality(real, starts[: len(real)], tokenizer, module, score)
        else:
            texts, cost = made(row, prompts)
            result = cost | quality(texts, starts, tokenizer, module, score)
        with open(cfg.out, "a", encoding="utf-8") as f:
            f.write(json.dumps(row | result) + "\n")
        lines.append(row | result)
    show([next(line for line in lines if same(line, row)) for row in rows])
    print(f"{cfg.out}; tables and a plot of it: python -m lab.sweep --report out/sweep --out {cfg.out}")


if __name__ == "__main__":
    main()
