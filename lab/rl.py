"""
What does reinforcement learning change? Training runs of methods/rl.py and their controls from one
checkpoint, several seeds each, and how well each result samples afterwards.

    python -m lab.rl --ckpt out/sudoku                                 train and measure: lines in --out
    python -m lab.rl --ckpt out/sudoku --runs trace --max_steps 600    longer
    python -m lab.rl --report docs/rl_tables                           table and plot of all lines in --out

Runs: the objectives of methods/rl.py, with words of train.py behind them (as in "bandit reward=row"), and
`supervised`, training as before. The controls ce and supervised take twice as many updates as --max_steps
says: they have no rollouts, and an update takes them half as long or less. Lines that are there are not
made again, and a run that was stopped goes on.
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python lab/rl.py works too
from diffusion import SCHEDULES
from lab import plots
from lab.paper import verdict
from lab.quality import accuracy, checker, generated, prompts_of
from lab.sweep import numbers, read
from methods import rl
from run import checkpoint
from run.cli import die, load_config, writable
from run.machine import guard
from run.restore import dataset_for, restore
from samplers import SAMPLERS

CONTROLS = ("ce", "supervised")
# as training by reward has it: the settings of methods/rl.py that are train.py's own
SUPERVISED = "lr warmup lr_schedule beta2 weight_decay ema n_samples"
COLOURS = {"bandit": plots.ACCENT, "trace": plots.INK, "mdpo": "#c05a1c", "gdpo": "#5b8c3a", "ce": plots.GREY}
HEAD = """# In numbers: reinforcement learning

Made by `python -m lab.rl --report`. Percent correct, a mean over seeds with its 95 % interval (Student's t
over the seeds; a single seed: over its texts). *ancestral*: 4 steps a block, temperature 1. *greedy*: the
most confident token at each of b steps, temperature 0. *different*: different correct answers / how many as
many uniform draws of possible ones would give, of all seeds together. *updates*: optimizer steps. *CPU*:
seconds of processor time of a training, its validations with it, the mean over seeds."""


@dataclass
class RlConfig:
    ckpt: str = "out/sudoku"  # what all runs begin with
    runs: str = "bandit,trace,mdpo,gdpo,ce,supervised"  # see above
    seeds: str = "0,1,2"
    max_steps: int = 300  # updates; controls: twice as many
    steps: int = 4  # of ancestral sampling, in rollouts and in the measurement
    n_eval: int = 512  # texts a measurement, of the validation split
    max_new_tokens: int = 0  # per text; 0: up to the end of the context
    out: str = "out/rl.jsonl"  # where the lines go
    report: str = ""  # this path with .md and .png, from the lines in --out; nothing is trained
    device: str = "auto"


def folder_of(cfg, run, seed):
    name = "".join(c if c.isalnum() else "_" for c in run)
    return f"{cfg.ckpt}_rl/{name}_{cfg.max_steps}_{seed}"


def words_of(cfg, run, seed):
    """The words of train.py for one run."""
    kind, *more = run.split()
    words = [f"--{word}" for word in more]
    if kind == "supervised":
        defaults = rl.DEFAULTS(rl.Settings())
        words += [f"--{name}={defaults[name]}" for name in SUPERVISED.split()]
        words += [f"--init_from={cfg.ckpt}", "--batch_size=64"]
    else:
        words += ["--method=rl", f"--ckpt={cfg.ckpt}", f"--objective={kind}", f"--steps={cfg.steps}"]
        words += [f"--max_new_tokens={cfg.max_new_tokens}"]
    updates = cfg.max_steps * (2 if kind in CONTROLS else 1)
    words += [f"--max_steps={updates}", "--eval_every=100", f"--seed={seed}", f"--device={cfg.device}"]
    out_dir = folder_of(cfg, run, seed)
    return [*words, f"--out_dir={out_dir}"] + ["--resume"] * Path(out_dir).exists()


def cpu_seconds():
    """Of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(cfg, ckpt):
    """{"ancestral": ..., "greedy": ...}: accuracy() of a checkpoint's texts."""
    trained, meta, step, model, process = restore(ckpt, cfg.device)
    data, b = dataset_for(ckpt, trained, meta, model), max(trained.block_sizes)
    if b == 1:
        die(f"{ckpt} was trained on block size 1 alone: it has no denoising steps", "another --ckpt")
    prompts, module, found = prompts_of(data, cfg.n_eval), checker(data.folder), {}
    how = {"block_size": b, "schedule": SCHEDULES[trained.schedule], "trained": sorted(trained.block_sizes)}
    how["max_new_tokens"] = cfg.max_new_tokens or None
    for name, sampler, steps, temperature in (
        ("ancestral", "ancestral", cfg.steps, 1.0), ("greedy", "confidence", b, 0.0),
    ):  # fmt: skip
        again = {"sampler": SAMPLERS[sampler], "steps": steps, "temperature": temperature, **how}
        rows, cost = generated(model, process, data, prompts, 1, **again)
        found[name] = accuracy(module, [data.tokenizer.decode(row) for row in rows])
        found[name]["passes"] = cost["nfe_row"]
    return {"step": step, **found}


def train_and_measure(cfg, seeds):
    """The lines that are missing."""
    lines = read(cfg.out, mend=True)
    for run, seed in [("start", 0), *((run.strip(), seed) for seed in seeds for run in cfg.runs.split(","))]:
        key = {"ckpt": cfg.ckpt, "run": run, "seed": seed, "max_steps": cfg.max_steps * (run != "start")}
        key |= {"n": cfg.n_eval, "max_new_tokens": cfg.max_new_tokens}
        if any(all(line.get(k) == v for k, v in key.items()) for line in lines):
            continue
        ckpt, before, curve = cfg.ckpt, cpu_seconds(), []
        if run != "start":
            ckpt = folder_of(cfg, run, seed)
            done = subprocess.run([sys.executable, "train.py", *words_of(cfg, run, seed)])
            if done.returncode:
                die(f"the run {run} of seed {seed} ended with {done.returncode}", "python -m lab.rl again")
            shown = ("step", "reward", "entropy", "kl", "distinct")
            curve = [{k: r[k] for k in shown if k in r} for r in checkpoint.logged(ckpt) if "reward" in r]
        line = {**key, "cpu_s": cpu_seconds() - before, "torch": torch.__version__}
        lines.append(line | measure(cfg, ckpt) | {"curve": curve})
        with open(cfg.out, "a", encoding="utf-8") as f:
            f.write(json.dumps(lines[-1]) + "\n")
        print(f"{run}, seed {seed}: {cell([lines[-1]], 'ancestral')}, greedy {cell([lines[-1]], 'greedy')}")


# ----- the report


def interval(rows, name):
    """(mean, low, high) of the accuracy over seeds."""
    values = [r[name]["accuracy"] for r in rows]
    if len(values) == 1:
        return values[0], rows[0][name]["low"], rows[0][name]["high"]
    _, mean, low, high = verdict(values)
    return mean, max(0.0, low), min(1.0, high)


def cell(rows, name):
    """**31** (29-33) · 28 / 31"""
    if not all("accuracy" in r[name] for r in rows):
        return ""
    mean, low, high = (100 * x for x in interval(rows, name))
    text = f"**{mean:.0f}** ({low:.0f}-{high:.0f})"
    if rows[0][name]["expected"]:
        text += f" · {sum(r[name]['distinct'] for r in rows)} / {sum(r[name]['expected'] for r in rows):.0f}"
    return text


def last(rows, name):
    """The mean of a logged number at the last update, or nothing."""
    found = [r["curve"][-1][name] for r in rows if r["curve"] and name in r["curve"][-1]]
    return f"{sum(found) / len(found):.2f}" if found else ""


def runs_of(lines, ckpt):
    """{(run, max_steps): its lines} of a checkpoint."""
    found = {}
    for line in lines:
        if line["ckpt"] == ckpt:
            found.setdefault((line["run"], line["max_steps"]), []).append(line)
    return found


def report(cfg):
    lines, out = read(cfg.out), [HEAD]
    if not lines:
        die(f"{cfg.out} holds no lines yet", "python -m lab.rl --ckpt out/sudoku")
    if any(not {"ckpt", "run", "max_steps", "cpu_s", "curve"} <= set(line) for line in lines):
        die(f"{cfg.out} holds lines that are no run's of lab.rl", "--out of its own file")
    ckpts = list(dict.fromkeys(line["ckpt"] for line in lines))
    for ckpt in ckpts:
        heads = "| run | seeds | updates | CPU | ancestral · different | greedy · different | entropy | KL |"
        out += [f"\n### {ckpt}\n", heads, "| --- " * 8 + "|"]
        for (run, _), rows in runs_of(lines, ckpt).items():
            updates = "" if run == "start" else rows[0]["step"]
            seconds = "" if run == "start" else round(sum(row["cpu_s"] for row in rows) / len(rows))
            cells = [cell(rows, "ancestral"), cell(rows, "greedy"), last(rows, "entropy"), last(rows, "kl")]
            out.append(f"| {run} | {len(rows)} | {updates} | {seconds} | {' | '.join(cells)} |")
    Path(f"{cfg.report}.md").write_text("\n".join(out) + "\n", encoding="utf-8")
    curves({ckpt: runs_of(lines, ckpt) for ckpt in ckpts}, f"{cfg.report}.png")
    print(f"{cfg.report}.md, {cfg.report}.png: {len(lines)} lines")


def curves(panels, path, window=5):
    """The reward of rollouts against updates, a panel a checkpoint: means of `window` lines of the log."""
    plt = plots.pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.4), squeeze=False)
    for axis, (ckpt, runs) in zip(axes[0], panels.items(), strict=True):
        for (run, _), rows in runs.items():
            for i, row in enumerate(r for r in rows if len(r["curve"]) >= window):
                steps, rewards = ([r[k] for r in row["curve"]] for k in ("step", "reward"))
                smooth = [sum(rewards[j : j + window]) / window for j in range(len(rewards) - window + 1)]
                how = {"color": COLOURS.get(run.split()[0], "#777777"), "linewidth": 1}
                how["linestyle"] = "-" if run in COLOURS else ":"
                axis.plot(steps[window - 1 :], smooth, label=run if i == 0 else None, **how)
        axis.set(title=ckpt, xlabel="updates", ylabel="share of rollouts that are correct", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    plots.save(figure, path)


@guard("a smaller --n_eval, or --device=cpu")
def main():
    cfg = load_config(RlConfig, sys.argv[1:])
    if Path(cfg.out).suffix != ".jsonl":
        die(f"--out {cfg.out}: measurements go to a .jsonl file", "--out out/rl.jsonl")
    if cfg.report:
        return report(cfg)
    for run in cfg.runs.split(","):
        if run.split()[:1] and run.split()[0] not in (*rl.OBJECTIVES, "supervised"):
            die(f"no run named {run!r}", f"--runs {RlConfig.runs}")
    for name, least in (("max_steps", 1), ("steps", 1), ("n_eval", 2), ("max_new_tokens", 0)):
        if getattr(cfg, name) < least:
            die(f"{name} cannot be {getattr(cfg, name)}", f"--{name} {least} or more")
    writable(cfg.out, "out")
    train_and_measure(cfg, numbers("seeds", cfg.seeds, int, 0, RlConfig.seeds))


if __name__ == "__main__":
    main()
