"""
Do the field's systems do what they say, side by side? Trains each one and its control with the same network,
data, rows and number of steps (the page names the exceptions), measures both, and writes docs/zoo.md.

    python -m lab.zoo                                    everything, as far as the minutes go; again: go on
    python -m lab.zoo --methods loopholing,gidd --seeds 1 --page out/zoo    a first look, on a page of its own
    python -m lab.zoo --minutes 0                        only write the page, from what was measured
    python -m lab.zoo --rows lab/recipes --page docs/recipes    other rows: adapting a language model

A row of the table is an entry of ROWS in a file of methods/:

    ROWS = [{
        "system": "Loopholing",              what the table calls it
        "paper": "2510.19304",               its arXiv id
        "claim": "more right in 4 steps",    what it says that can be seen here
        "train": "--method loopholing",      flags of train.py, behind config/zoo/TASK.toml
        "control": "",                       the control's; in "train", {control} is its folder, and {row}
                                             the length of a row in both
        "base": "",                          of a third run, whose folder is {base} in both
        "sampler": "loopholing",             with options as in "psi kappa=pc"; default ancestral
        "control_sampler": "ancestral",      default ancestral
        "by": "right 4",                     what decides: percent right in so many steps ("right pace": at
                                             its own pace), or "nats 16", the bound
        "control_by": "right 4",             the same of the control; default "by"
        "block": "row",                      the block size of texts and nats: 16, the default, or the whole
                                             row; then "by" may be "nats row"
        "tasks": ["sudoku", "digits"],       default both
    }]

Or it is a .toml file of --rows, with the same keys. Rows that share a control share its training. A method
whose code changed is trained again, and nothing else: a measurement that is in docs/zoo.jsonl is not made a
second time. After a change of model.py, diffusion.py, generate.py or train.py, delete that file. The page is
written over, with the rows and seeds that are asked for.
"""

import ast
import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python lab/zoo.py works too
import methods
from lab import plots
from lab.paper import T_975, measured, over_seeds, train_row, verdict
from lab.sweep import asked_for, read
from run import checkpoint
from run.cli import die, load_config, said, tomllib, writable
from run.machine import guard
from samplers import SAMPLERS

HEADS = {
    "# The zoo": """Do the field's systems do what they say? Each one is trained beside its control, on the
lesson as it stands (`--plain`). Network, data, rows and steps are the control's, with three exceptions. Rows
with `--ckpt {control}` train on from the control, for more steps. PGM has a network of its own. The control
of complementary masks sees twice the rows. Made by `python -m lab.zoo`.""",
    "# Recipes": """How does a network that writes from left to right learn to write in blocks? The published
recipes contradict each other. Each row changes one thing, with equal rows and steps, and both sides go on
from the same network. (LoRA, and a control that begins with nothing, have their own learning rate.) All is
on the lesson as it stands (`--plain`). Most rows are decided by nats: after so few steps hardly a grid is
right, which a first seed showed. Made by `make recipes`.""",
}
ROOT = Path(__file__).resolve().parents[1]
TASKS = ("sudoku", "digits")
STEPS = (1, 2, 4, 8, 16)
BLOCK = 16  # the larger block size of config/zoo
ROW = {"sudoku": 32, "digits": 64}  # tokens of a row there


@dataclass
class ZooConfig:
    methods: str = ""  # as in gidd,loopholing; empty: every file of methods/ that has rows
    rows: str = ""  # a folder of .toml files, a row each, instead; methods are then names of its files
    tasks: str = "sudoku,digits"
    seeds: int = 3  # trainings of a system, and of its control
    minutes: float = 240.0  # no training begins that would end later, by the longest so far
    out: str = "out/zoo"  # checkpoints go to out/TASK/FLAGS/SEED, measurements to out/results.jsonl
    page: str = "docs/zoo"  # this path with .md, .png, and the measurements behind them in .jsonl
    n_eval: int = 256  # windows and texts a measurement
    n_mc: int = 8  # draws of noise a window
    device: str = "auto"


# ----- what is trained


def entries(cfg):
    """[(method's name or file's, its row with every key there)] of methods/, or of the files in cfg.rows."""
    names = cfg.methods.split(",") if cfg.methods else None
    if cfg.rows:
        files = {file.stem: file for file in sorted(Path(cfg.rows).glob("*.toml"))}
        if lacking := set(names or ()) - set(files):
            die(f"{cfg.rows} has no {min(lacking)}.toml", f"--methods {','.join(files)}")
        some = [(name, [read_toml(files[name])]) for name in names or files]
    else:
        some = [
            (name, getattr(methods.load(name, "--methods"), "ROWS", [])) for name in names or methods.names()
        ]
    found = []
    for name, rows in some:
        for row in rows:
            defaults = {"sampler": "ancestral", "control_sampler": "ancestral", "tasks": list(TASKS)}
            defaults |= {"block": BLOCK, "base": "", "control": "", "paper": ""}
            found.append((name, {**defaults, "control_by": row["by"], **row}))
    return found


def read_toml(file):
    try:
        row = tomllib.loads(file.read_text(encoding="utf-8"))
        if lacking := {"system", "claim", "train", "by"} - set(row):
            raise ValueError(f"no {min(lacking)}")
        return row
    except ValueError as e:
        die(f"{file} is no row: {said(e)}", "see python -m lab.zoo --help")


def code_of(flags):
    """A short hash of the method's code that flags name; comments, docstrings and ROWS do not count."""
    name = re.search(r"--method[ =](\w+)", flags)
    if name is None:
        return ""
    tree = ast.parse(Path(methods.load(name[1]).__file__).read_text(encoding="utf-8"))
    is_rows = lambda node: isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROWS"
    tree.body = [node for node in tree.body if not is_rows(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return "-" + hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]


def folder(cfg, task, flags, seed, row):
    """Where a network lies. Another recipe, control, or code of its method, is another place."""
    whole = flags.replace("{control}", row["control"] or "masked").replace("{base}", row["base"])
    words = re.sub(r"[^A-Za-z0-9.]+", "_", whole.replace("{row}", str(ROW[task]))).strip("_") or "masked"
    if len(words) > 160:
        words = words[:150] + hashlib.sha256(words.encode()).hexdigest()[:8]
    recipe = hashlib.sha256(Path(f"config/zoo/{task}.toml").read_bytes()).hexdigest()[:4]
    return f"{cfg.out}/{task}-{recipe}/{words}{code_of(flags)}/{seed}"


def steps_of(sampler):
    """The numbers of steps to measure at; None: at its own pace."""
    if "own pace" in SAMPLERS[sampler].needs:
        return [None]
    return [n for n in STEPS if n > 1 or sampler != "arpc"]  # of one step ARPC guides none


def block_of(row, task):
    """The block size of a row's texts and bounds."""
    return ROW[task] if row["block"] == "row" else row["block"]


def trained(cfg, task, flags, seed, row, may_begin):
    """
    (the folder of a network, processor seconds), trained now if need be and if may_begin(); else (None, 0).
    What it begins with comes first.
    """
    out_dir, words = Path(folder(cfg, task, flags, seed, row)), flags.replace("{row}", str(ROW[task]))
    for name in ("control", "base"):
        if f"{{{name}}}" in words:
            beside = trained(cfg, task, row[name], seed, row, may_begin)[0]
            if beside is None:
                return None, 0.0
            words = words.replace(f"{{{name}}}", str(beside))
    began, argv = of_children(), [*words.split(), f"--seed={seed}", f"--out_dir={out_dir}"]
    state = checkpoint.load(out_dir) if (out_dir / "ckpt.pt").exists() else None
    if state is None or state["step"] < state["config"]["max_steps"]:
        if not may_begin():
            return None, 0.0
        toml = f"config/zoo/{task}.toml"
        train_row([*argv, f"--device={cfg.device}"], toml, out_dir, resume=state is not None)
    return out_dir, of_children() - began


def of_children():
    """Processor seconds of the programs that were run so far."""
    now = os.times()
    return now.children_user + now.children_system


def label_of(cfg, task, flags, seed, row):
    """What a line of results is called: a folder below cfg.out."""
    return str(Path(folder(cfg, task, flags, seed, row)).relative_to(cfg.out))


def without_code(label):
    """The same whatever the code of its method."""
    return re.sub(r"-[0-9a-f]{8}(/\d+)$", r"\1", label)


def compared(cfg, task, row, seed, lines, may_begin):
    """
    {"system": results, "control": results} of a row, task and seed; None: there was no time. Without time
    results of older code will do.
    """
    found = {}
    for side, flags, sampler in (
        ("control", row["control"], row["control_sampler"]),
        ("system", row["train"], row["sampler"]),
    ):
        name, own = asked_for([sampler])[0]
        plan = [[name, own, block_of(row, task), n] for n in steps_of(name)]
        label = label_of(cfg, task, flags, seed, row)
        what = {"seed": seed, "n_eval": cfg.n_eval, "n_mc": cfg.n_mc, "asked": plan}
        some = [one for one in lines if all(one.get(k) == v for k, v in what.items())]
        found[side] = next((one for one in some if one["row"] == label), None)
        if found[side] is None:
            out_dir, seconds = trained(cfg, task, flags, seed, row, may_begin)
            if out_dir is not None:
                found[side] = measured(label, seed, out_dir, cfg, lines, seconds, plan)
        if found[side] is None:
            older = (one for one in some[::-1] if without_code(one["row"]) == without_code(label))
            found[side] = next(older, None)
        if found[side] is None:
            return None
    return found


# ----- the page


def number(results, sampler, by):
    """What decides, for one side: percent right, or nats."""
    what, at = by.split()
    if what == "nats":
        largest = max(results["nats"], key=int)
        return results["nats"][largest if at == "row" else at][0]
    key = sampler.split()[0] + ("" if at == "pace" else f" {at}")
    return 100 * results["correct"][key]["accuracy"]


def gain(found, row):
    """How much better the system is than its control: points, or nats saved."""
    ours = number(found["system"], row["sampler"], row["by"])
    theirs = number(found["control"], row["control_sampler"], row["control_by"])
    return theirs - ours if row["by"].startswith("nats") else ours - theirs


def at_steps(several, side, sampler):
    """'percent right · token-forwards a token · distinct answers' for each number of steps, over seeds."""
    name, cells = sampler.split()[0], []
    for n in (*STEPS, None):
        key = f"{name} {n}" if n else name
        some = [found[side]["correct"][key] for found in several if key in found[side]["correct"]]
        if not some:
            cells.append("")
            continue
        right = over_seeds([100 * one["accuracy"] for one in some], 0)
        forwards = statistics.mean(one["token_forwards"] for one in some)
        distinct = statistics.mean(one["distinct"] for one in some)
        cells.append(f"{right} · {forwards:.1f} · {distinct:.0f}")
    return " | ".join(cells)


def head_of(cfg):
    return list(HEADS)[bool(cfg.rows)]


def is_older(cfg, task, row, found):
    """Is one of the two sides measured with other code than there is?"""
    sides = ("system", row["train"]), ("control", row["control"])
    return any(found[s]["row"] != label_of(cfg, task, flags, found[s]["seed"], row) for s, flags in sides)


def write(cfg, table, lines, missing=()):
    """
    The page and the plot. table: [(method, row, task, [found for each seed])]. lines: all measurements; a
    network that two rows share was trained for one of them. missing: names of what was not measured.
    """
    seconds = {}
    for line in lines:
        seconds[line["row"]] = max(seconds.get(line["row"], 0.0), line["train_seconds"])
    head = head_of(cfg)
    out = [
        head,
        f"""
{HEADS[head]}
The tasks are 4x4 sudoku with clues, and sums of two digits. {cfg.n_eval} windows and texts a measurement,
{cfg.n_mc} draws of noise a window. A run begins with the task's file in `config/zoo/`; a row's flags come
behind it.

A claim is one number a seed that should be above 0: percent right minus the control's, or nats of the
control's bound minus the system's. **Confirmed**: the 95 % interval of its mean by Student's t lies above 0.
**Not confirmed**: it lies below. Else undecided. Options that a row does not name are the defaults of its
file. Those it names were chosen by hand, some after earlier measurements on the same tasks. *Older code*:
measured before the method's file was last changed; the command measures it again. *Lines*: of the method's
file. The last two columns say what was trained, how texts were written, and what decides: percent right in so
many steps a block (pace: at the sampler's own), or nats at that block size (row: the whole row).

| system | paper | its claim | task | better by (95 %) | seeds | verdict | lines | flags, sampler | control |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |""",
    ]
    marks = []
    for name, row, task, several in table:
        word, mean, low, high = verdict([gain(found, row) for found in several])
        nats = row["by"].startswith("nats")
        digits, unit = (3, "nats") if nats else (1, "points")
        interval = f" ({low:+.{digits}f} to {high:+.{digits}f})" if math.isfinite(low) else ""
        file = Path(cfg.rows, f"{name}.toml") if cfg.rows else Path(f"methods/{name}.py")
        length = len(Path(ROOT, file).read_text(encoding="utf-8").splitlines())
        paper = f"[{row['paper']}](https://arxiv.org/abs/{row['paper']})" if row["paper"] else ""
        ours = f"`{row['train'] or 'none'}`, `{row['sampler']}`, {row['by']}"
        theirs = f"`{row['control'] or 'none'}`, `{row['control_sampler']}`, {row['control_by']}"
        seeds = f"{len(several)}" + ", older code" * any(is_older(cfg, task, row, one) for one in several)
        out.append(
            f"| [{row['system']}](../{file}) | {paper} | {row['claim']} | {task} | "
            f"{mean:+.{digits}f}{interval} {unit} | {seeds} | {word} | {length} | {ours} | {theirs} |"
        )
        marks.append((f"{row['system']}, {task}", nats, mean, low, high))
    if missing:
        out.append(f"\nNot measured yet: {'; '.join(missing)}.")
    head = " | ".join(f"{n} step" + "s" * (n > 1) for n in STEPS)
    out.append(f"""
![how much better than the control, with 95 % intervals]({Path(cfg.page).name}.png)

## What was measured

Nats per token of the largest blocks ({BLOCK}, or a whole row) and of block size 1. Then, for each number of
steps a block: percent right, token-forwards a token, and different right answers. Means over seeds, in
brackets the smallest and the largest.

| row | task | sampler | processor seconds of training | nats | nats 1 | {head} | own pace |
| --- | --- | --- | --- | --- | --- |{" --- |" * (len(STEPS) + 1)}""")
    for name, row, task, several in table:
        for side, sampler in (("system", row["sampler"]), ("control", row["control_sampler"])):
            bound = [over_seeds([f[side]["nats"][b][0] for f in several if b in f[side]["nats"]], 3)
                     for b in (str(block_of(row, task)), "1")]  # fmt: skip
            took = statistics.mean(seconds[found[side]["row"]] for found in several)
            label = row["system"] + (", control" if side == "control" else "")
            cells = " | ".join(bound) + " | " + at_steps(several, side, sampler)
            out.append(f"| {label} | {task} | `{sampler}` | {took:.0f} | {cells} |")
    text = "\n".join(out) + "\n"
    Path(f"{cfg.page}.md").write_text(text, encoding="utf-8")
    picture(marks, f"{cfg.page}.png")
    return text


def picture(marks, path):
    """A line a row: the mean and its interval; points to the left panel, nats to the right."""
    plt = plots.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.28 * max(1, len(marks))))
    for axis, nats in zip(axes, (False, True), strict=True):
        some = [mark for mark in marks if mark[1] == nats][::-1]
        for y, (_, _, mean, low, high) in enumerate(some):
            spread = [[max(mean - low, 0)], [max(high - mean, 0)]] if abs(low) < 1e9 else None
            axis.errorbar(mean, y, xerr=spread, marker="o", color=plots.ACCENT, capsize=2)
        axis.set_yticks(range(len(some)), [mark[0] for mark in some])
        axis.axvline(0, color=plots.GREY)
        axis.set_xlabel("nats saved" if nats else "points of percent right")
    figure.suptitle("better than the control by")
    figure.tight_layout()
    plots.save(figure, path)


@guard("a smaller --n_eval")
def main():
    cfg, start = load_config(ZooConfig, sys.argv[1:]), time.time()
    if not 1 <= cfg.seeds <= max(T_975) or cfg.minutes < 0 or cfg.n_eval < 2 or cfg.n_mc < 2 or cfg.n_mc % 2:
        problem = f"seeds must be 1 to {max(T_975)}, minutes at least 0, n_eval at least 2, n_mc even"
        die(problem, "--seeds 3 --minutes 240 --n_eval 256 --n_mc 8")
    tasks = cfg.tasks.split(",")
    if unknown := set(tasks) - set(TASKS):
        die(f"no task {', '.join(sorted(unknown))}, only {', '.join(TASKS)}", "--tasks sudoku")
    rows = entries(cfg)
    if not rows:
        die(f"{cfg.rows or cfg.methods or 'methods/'} has no rows to train", "see python -m lab.zoo --help")
    page = Path(f"{cfg.page}.md")
    if page.exists() and not page.read_text(encoding="utf-8").startswith(head_of(cfg) + "\n"):
        die(f"{page} is not a page of ours, and would be written over", "--page docs/my_zoo")
    # complain now, not after an hour
    writable(f"{cfg.page}.md", "page"), writable(f"{cfg.out}/results.jsonl", "out"), plots.pyplot()
    kept = read(f"{cfg.page}.jsonl")
    lines = kept + read(f"{cfg.out}/results.jsonl", mend=True)
    longest, found, used = 0.0, {}, {json.dumps(line): None for line in kept}
    jobs = [
        (seed, i, task)
        for seed in range(cfg.seeds)
        for i, (_, row) in enumerate(rows)
        for task in tasks
        if task in row["tasks"]
    ]
    may_begin = lambda: time.time() - start + longest < 60 * cfg.minutes
    for seed, i, task in tqdm(jobs, desc="systems", disable=None):
        began = time.time()
        pair = compared(cfg, task, rows[i][1], seed, lines, may_begin)
        if pair is None:
            tqdm.write(f"no time left for {rows[i][1]['system']}, {task}, seed {seed}", file=sys.stdout)
            continue
        lines += [line for line in pair.values() if line not in lines]  # the next row may share its control
        found.setdefault((i, task), []).append(pair)
        used |= {json.dumps(line): None for line in pair.values()}
        longest = max(longest, time.time() - began)
    table = [(*rows[i], task, several) for (i, task), several in sorted(found.items())]
    if not table:
        die("nothing was measured", "--minutes 240")
    Path(f"{cfg.page}.jsonl").write_text("\n".join(used) + "\n", encoding="utf-8")
    missing = [
        f"{row['system']} on {task}"
        for i, (_, row) in enumerate(rows)
        for task in tasks
        if task in row["tasks"] and (i, task) not in found
    ]
    print(write(cfg, table, lines, missing))
    print(f"{cfg.page}.md, {cfg.page}.png: {(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
