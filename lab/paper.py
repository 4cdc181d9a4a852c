"""
Are the paper's claims true at laptop scale? Trains one network for each row of config/paper and each seed,
measures them, and writes docs/paper.md.

    make paper                          10 rows, 3 seeds: 30 small networks (24 took 36 minutes on 2 cores)
    python -m lab.paper --seeds 1 --page out/paper      a first look, on a page of its own; every claim stays
                                            undecided, for one seed has no spread
    python -m lab.paper --minutes 20        no training begins that would end later: fewer seeds
    python -m lab.paper --seeds 12 --only masked_mixture,uniform_mixture     more seeds of these rows alone
    python -m lab.paper --rows config/paper_sudoku --out out/paper_sudoku --page docs/paper_sudoku
                                            the question of few steps again, on sudoku

The page is written over, with the seeds that are asked for. What was measured stays in docs/paper.jsonl, and
is not trained again. Change a TOML in config/paper and run it again: that row is, and nothing else. After a
change of model.py, diffusion.py, generate.py or train.py, delete docs/paper.jsonl.
"""

import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python lab/paper.py works too
import methods
from data.dataset import Dataset
from diffusion import SCHEDULES
from eval import estimate, likelihood
from lab import plots
from lab.quality import accuracy, checker, generated, prompts_of
from lab.sweep import read
from options import TrainConfig
from run import checkpoint
from run.cli import die, load_config, writable
from run.machine import guard, pick_device
from run.restore import rebuild
from samplers import SAMPLERS

HEAD = "# BlockGen's claims on a laptop"


@dataclass
class PaperConfig:
    rows: str = "config/paper"  # a folder of train.py's TOML files
    only: str = ""  # rows to train, as in masked_mixture,uniform_mixture; the others are shown as they are
    seeds: int = 3  # trainings a row
    minutes: float = 40.0  # no training begins that would end later, by the longest so far
    out: str = "out/paper"  # checkpoints go to out/ROW/SEED, measurements to out/results.jsonl
    page: str = "docs/paper"  # this path with .md, three .png, and the measurements behind them in .jsonl
    n_eval: int = 256  # windows and texts a measurement
    n_mc: int = 8  # draws of noise a window
    device: str = "auto"


# ----- the claims, a line each: what should be above 0

STEPS = (1, 2, 4, 8, 16)


def nats(r, row, b):
    """Nats per token of a row's network at block size b, from one seed's results r."""
    return r[row]["nats"][str(b)][0]


def correct(r, row, sampler, steps=None):
    """Percent correct of a row's network."""
    return 100 * r[row]["correct"][f"{sampler} {steps}" if steps else sampler]["accuracy"]


def few_steps(r, row, other):
    """Percent correct of one row's network minus another's, in 1, 2 and 4 ancestral steps, the mean."""
    return statistics.mean(
        correct(r, row, "ancestral", n) - correct(r, other, "ancestral", n) for n in (1, 2, 4)
    )


def rises(r, row):
    """The smallest step of the bound from block size 1 over 4 and 16 to 64."""
    values = [nats(r, row, b) for b in (1, 4, 16, 64)]
    return min(b - a for a, b in zip(values, values[1:], strict=False))


# (which question, the claim, unit, number that is positive if it holds); [paper]: of arXiv 2606.02241
CLAIMS = [
    ("a", "masked: AR alone has fewer nats than the bound of blocks of 16 alone", "nats",
     lambda r: nats(r, "masked_block", 16) - nats(r, "masked_ar", 1)),
    ("a", "uniform: AR alone has fewer nats than the bound of blocks of 16 alone", "nats",
     lambda r: nats(r, "uniform_block", 16) - nats(r, "uniform_ar", 1)),
    ("a", "[paper] masked: one network's nats rise with every step of the dial 1, 4, 16, 64 "
     "(the smallest step)", "nats", lambda r: rises(r, "masked_dial")),
    ("a", "[paper] uniform: one network's nats rise with every step of the dial 1, 4, 16, 64 "
     "(the smallest step)", "nats", lambda r: rises(r, "uniform_dial")),
    ("b", "[paper] uniform beats masked in few ancestral steps (mean of 1, 2, 4)", "points",
     lambda r: few_steps(r, "uniform_mixture", "masked_mixture")),
    ("b", "uniform beats masked in few steps, where neither sees the noise level (equal parameters)",
     "points", lambda r: few_steps(r, "uniform_timeless", "masked_mixture")),
    ("b", "uniform beats masked in few steps, where both see the noise level (equal parameters)",
     "points", lambda r: few_steps(r, "uniform_mixture", "masked_timed")),
    ("b", "uniform: seeing the noise level helps in few ancestral steps", "points",
     lambda r: few_steps(r, "uniform_mixture", "uniform_timeless")),
    ("b", "masked: seeing the noise level helps in few ancestral steps", "points",
     lambda r: few_steps(r, "masked_timed", "masked_mixture")),
    ("b", "uniform beats masked in 16 ancestral steps", "points",
     lambda r: correct(r, "uniform_mixture", "ancestral", 16)
     - correct(r, "masked_mixture", "ancestral", 16)),
    ("b", "[paper] masked: ARPC in 8 steps (15 passes a block) beats ancestral in 16 (at most 16)", "points",
     lambda r: correct(r, "masked_mixture", "arpc", 8) - correct(r, "masked_mixture", "ancestral", 16)),
    ("b", "[paper] uniform: ARPC in 8 steps (15 passes a block) beats ancestral in 16 (at most 16)", "points",
     lambda r: correct(r, "uniform_mixture", "arpc", 8) - correct(r, "uniform_mixture", "ancestral", 16)),
    ("b", "[paper] with ARPC and many passes (16 steps) masked beats uniform", "points",
     lambda r: correct(r, "masked_mixture", "arpc", 16) - correct(r, "uniform_mixture", "arpc", 16)),
    ("c", "masked: the mixture costs its AR mode nats", "nats",
     lambda r: nats(r, "masked_mixture", 1) - nats(r, "masked_ar", 1)),
    ("c", "uniform: the mixture costs its AR mode nats", "nats",
     lambda r: nats(r, "uniform_mixture", 1) - nats(r, "uniform_ar", 1)),
    ("c", "masked: the mixture costs its AR mode correct answers", "points",
     lambda r: correct(r, "masked_ar", "ar") - correct(r, "masked_mixture", "ar")),
    ("c", "uniform: the mixture costs its AR mode correct answers", "points",
     lambda r: correct(r, "uniform_ar", "ar") - correct(r, "uniform_mixture", "ar")),
    ("c", "masked: the mixture gives its blocks of 16 a better bound", "nats",
     lambda r: nats(r, "masked_block", 16) - nats(r, "masked_mixture", 16)),
    ("c", "uniform: the mixture gives its blocks of 16 a better bound", "nats",
     lambda r: nats(r, "uniform_block", 16) - nats(r, "uniform_mixture", 16)),
    ("c", "masked: the mixture gives its blocks of 16 more correct answers, 16 ancestral steps", "points",
     lambda r: correct(r, "masked_mixture", "ancestral", 16) - correct(r, "masked_block", "ancestral", 16)),
    ("c", "uniform: the mixture gives its blocks of 16 more correct answers, 16 ancestral steps", "points",
     lambda r: correct(r, "uniform_mixture", "ancestral", 16) - correct(r, "uniform_block", "ancestral", 16)),
]  # fmt: skip

# Student's t by seeds
T_975 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
    11: 2.228,
    12: 2.201,
}


def verdict(values):
    """
    (verdict, mean, low, high) of one number a seed: the 95 % interval of the mean by Student's t decides, if
    it has one side of 0. Numbers that are equal by chance, as few right of many may be, have no spread to
    make one of.
    """
    mean = statistics.mean(values) if values else math.nan
    if len(set(values)) < 2:
        return "undecided", mean, -math.inf, math.inf
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    low, high = mean - half, mean + half
    return (
        "**confirmed**" if low > 0 else "**not confirmed**: the opposite" if high < 0 else "undecided",
        mean,
        low,
        high,
    )


# ----- training and measuring


def finished(cfg, out_dir):
    """The step of the checkpoint in out_dir, if it was trained with these settings; None: train anew."""
    if not (Path(out_dir) / "ckpt.pt").exists():
        return None
    state = checkpoint.load(out_dir)
    settings = lambda c: {k: v for k, v in c.items() if k not in ("resume", "device")}
    return state["step"] if settings(state["config"]) == settings(asdict(cfg)) else None


def recipe_of(cfg):
    """A short hash of what a row is trained with, wherever that happens."""
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("resume", "device", "out_dir", "seed")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def train_row(argv, toml, out_dir, resume):
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    # its progress bar and its complaints are on stderr
    with open(Path(out_dir) / "train.txt", "a", encoding="utf-8") as log:
        code = subprocess.run(
            [sys.executable, "train.py", toml, *argv] + ["--resume"] * resume, stdout=log
        ).returncode
    if code:
        raise SystemExit(code)


def measured(name, seed, out_dir, cfg, lines, seconds, asked=None, recipe=None):
    """
    The results of a checkpoint as a dict: from out/results.jsonl, or measured now and put there. seconds:
    what its training took. asked: [(sampler, its options, block size, steps or None)]; None: those of the
    paper. Without options a sampler's key in "correct" is "NAME STEPS". recipe: see recipe_of.
    """
    device = pick_device(cfg.device)[0]
    run, meta, _, model, process = rebuild(out_dir, device)
    what = {
        "row": name,
        "seed": seed,
        "weights": checkpoint.fingerprint(model),
        "n_eval": cfg.n_eval,
        "n_mc": cfg.n_mc,
    }
    what |= {"asked": [list(line) for line in asked]} if asked is not None else {}
    what |= {"recipe": recipe} if recipe else {}
    for line in lines:
        if all(line.get(k) == v for k, v in what.items()):
            return line
    data, sizes = Dataset(run.dataset, run.seq_len), sorted(run.block_sizes)
    data.same_as(meta)
    module = checker(data.folder)
    how = {"clean_padding": run.clean_padding, "method": methods.load(run.method)}
    found = likelihood(model, process, data, sizes, cfg.n_eval, cfg.n_mc, seed + 1, **how)
    result = {
        "nats": {str(b): estimate(halves, found.tokens) for b, halves in found.nats.items()},
        "correct": {},
    }
    if asked is None:
        asked = [("ar", {}, 1, None)] * (1 in sizes)
        if len(sizes) <= 2 and sizes[-1] > 1:
            asked += [("ancestral", {}, sizes[-1], n) for n in STEPS]
            # of one step ARPC guides none
            asked += [("arpc", {}, sizes[-1], n) for n in STEPS[1:]] * (1 in sizes)
    prompts = prompts_of(data, cfg.n_eval)
    for sampler, own, b, steps in tqdm(asked, desc=f"{name}, seed {seed}", leave=False, disable=None):
        how = {
            "block_size": b,
            "sampler": SAMPLERS[sampler],
            "steps": steps,
            "trained": sizes,
            "schedule": SCHEDULES[run.schedule],
            **own,
        }
        rows, cost = generated(model, process, data, prompts, seed + 1, **how)
        texts = [data.tokenizer.decode(row) for row in rows]
        result["correct"][f"{sampler} {steps}" if steps else sampler] = cost | accuracy(module, texts)
    parameters = sum(p.numel() for p in model.parameters())
    line = what | {
        "train_seconds": seconds,
        "parameters": parameters,
        "block_sizes": {str(b): run.block_sizes[b] for b in sizes},
        "steps": run.max_steps,
        **result,
    }
    with open(f"{cfg.out}/results.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")
    return line


# ----- the page


def over_seeds(values, digits):
    """mean (smallest to largest)"""
    if not values:
        return ""
    spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def values_of(results, number, *about):
    """number(r, *about) of every seed that has it."""
    found = []
    for r in results:
        try:
            found.append(number(r, *about))
        except KeyError:  # a row that was not trained, or has no such block size
            pass
    return found


def against(r, row, alone, b):
    """Nats of a mixture minus those of a network that knows one block size."""
    return nats(r, row, b) - nats(r, alone, b)


# the columns of the third picture: (noise, block size, the row that knows nothing else)
GROUPS = ("masked", 1, "ar"), ("uniform", 1, "ar"), ("masked", 16, "block"), ("uniform", 16, "block")


def costs(results, row, noise, b, alone):
    """What the mixture of a row ("dial" or "mixture") costs in nats, a number for each seed that has both."""
    return values_of(results, against, f"{noise}_{row}", f"{noise}_{alone}", b)


def passes(r, row, key):
    return r[row]["correct"][key]["nfe_token"]


def pictures(results, page):
    """
    page_likelihood.png, page_frontier.png, page_mixture.png: dots are means over seeds, bars their range.
    """
    colour = {"masked": "#1f6fb4", "uniform": "#d2691e"}
    point = lambda x, values: [(x, statistics.mean(values), min(values), max(values))] if values else []
    names = {
        "dial": ("o", "one network, {1, 4, 16, 64}"),
        "mixture": ("s", "one network, {1, 16}"),
        "ar": ("^", "AR alone"),
        "block": ("v", "blocks of 16 alone"),
    }
    panels = []
    for noise in colour:
        series = []
        for row, (marker, label) in names.items():
            points = [
                p for b in (1, 4, 16, 64) for p in point(b, values_of(results, nats, f"{noise}_{row}", b))
            ]
            series.append(
                (label, points, {"marker": marker, "linestyle": "-" if len(points) > 1 else "none"})
            )
        panels.append(
            {
                "title": f"{noise} noise",
                "xlabel": "block size",
                "ylabel": "nats per token (above 1: upper bounds)",
                "xscale": "log",
                "ticks": ([1, 4, 16, 64], ["1: AR", "4", "16", "64: diffusion"]),
                "series": series,
            }
        )
    plots.curves([panels], f"{page}_likelihood.png")

    series = []
    for noise, tint in colour.items():
        row = f"{noise}_mixture"
        for sampler, line in (("ancestral", "--"), ("arpc", "-")):
            points = []
            for n in STEPS:
                if at := values_of(results, passes, row, f"{sampler} {n}"):
                    points += point(statistics.mean(at), values_of(results, correct, row, sampler, n))
            series.append((f"{noise}, {sampler}", points, {"color": tint, "linestyle": line, "marker": "o"}))
        ar = point(1, values_of(results, correct, row, "ar"))
        series.append((f"{noise}, its AR mode", ar, {"color": tint, "linestyle": "none", "marker": "*"}))
    panel = {
        "title": "{1, 16} in one network: quality against speed",
        "xlabel": "passes per token",
        "ylabel": "% correct",
        "xscale": "log",
        "ticks": ([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2], ["1/16", "1/8", "1/4", "1/2", "1", "2"]),
        "series": series,
    }
    plots.curves([[panel]], f"{page}_frontier.png")

    series = []
    for row, (marker, label) in list(names.items())[:2]:
        points = [p for i, group in enumerate(GROUPS) for p in point(i, costs(results, row, *group))]
        series.append((label, points, {"marker": marker, "linestyle": "none"}))
    panel = {
        "title": "what a mixture costs (above 0) or gives",
        "xlabel": "",
        "ylabel": "nats per token, against that block size alone",
        "ticks": (range(4), [f"{noise},\nblock size {b}" for noise, b, _ in GROUPS]),
        "series": series,
        "level": 0,
    }
    if any(points for _, points, _ in series):
        plots.curves([[panel]], f"{page}_mixture.png")


def write(results, cfg):
    """The page, from one dict {row: line} a seed."""
    lines = [line for r in results for line in r.values()]
    rows = list(dict.fromkeys(line["row"] for line in lines))
    name = Path(cfg.page).name
    noisiest = max((e[1] for line in lines for b, e in line["nats"].items() if b != "1"), default=0.0)
    where = f"torch {torch.__version__}, {pick_device(cfg.device)[0].type}, {torch.get_num_threads()} threads"
    usual, words = PaperConfig(), f"python -m lab.paper --seeds {len(results)}"
    for flag in ("only", "rows", "out", "page"):
        value = getattr(cfg, flag)
        words += f" --{flag} {value}" if value != getattr(usual, flag) else ""
    minutes = sum(line["train_seconds"] for line in lines) / 60
    fewest = min(sum(row in r for r in results) for row in rows)
    seeds = f"{fewest} to {len(results)}" if fewest < len(results) else fewest
    out = [
        f"{HEAD}: `{cfg.rows}`",
        f"""
    {words}

made it: one network for each row of `{cfg.rows}` and each seed, {seeds} seeds a row; {where};
{minutes:.0f} minutes of training.
A row is a TOML file: change one and run it again, and only that row is trained.

A claim is one number for each seed that should be above 0; `CLAIMS` in `lab/paper.py` defines it. It is
**confirmed** if the 95 % interval of its mean (Student's t) lies above 0, **not confirmed** if the interval
lies below, and undecided otherwise. If every true number were 0, one of twenty would get a verdict all the
same. [paper] marks what BlockGen (arXiv 2606.02241) says of far larger networks on text. The other claims are
questions one would ask.

Correct means: of the answers that the `check` of the dataset's prepare.py finds in a text, those that are
true (digits: sums like 3+8=11; sudoku: grids). Entries are means over seeds, and in brackets the smallest and
the largest. Each measurement has {cfg.n_eval} windows and texts, and {cfg.n_mc} draws of noise a window.

| | claim | verdict | number (95 % interval) | seeds |
| --- | --- | --- | --- | --- |""",
    ]
    lacking = 0
    for which, text, unit, number in CLAIMS:
        values = values_of(results, number)
        if not values:
            lacking += 1
            continue
        said, mean, low, high = verdict(values)
        digits = 3 if unit == "nats" else 1
        interval = f" ({low:+.{digits}f} to {high:+.{digits}f})" if math.isfinite(low) else ""
        number = f"{mean:+.{digits}f}{interval} {unit}"
        out.append(f"| {which} | {text} | {said} | {number} | {len(values)} |")
    if lacking:
        out.append(f"\n{lacking} more claims of `CLAIMS` need rows that are not here.")
    out.append(f"""
## (a) Likelihood from AR to diffusion

![nats per token against block size]({name}_likelihood.png)

Nats per token. Block size 1 is exact, and the others are upper bounds, so a step from 1 is one from the truth
to a bound. The Monte Carlo error of a bound is at most {noisiest:.3f}.

| row | parameters | block sizes | 1 | 4 | 16 | 64 |
| --- | --- | --- | --- | --- | --- | --- |""")
    for row in rows:
        one = next(line for line in lines if line["row"] == row)
        sizes = ", ".join(f"{b}: {w:g}" for b, w in one["block_sizes"].items())
        cells = " | ".join(over_seeds(values_of(results, nats, row, b), 3) for b in (1, 4, 16, 64))
        out.append(f"| `{row}` | {one['parameters']:,} | {sizes} | {cells} |")
    out.append(f"""
## (b) Accuracy against passes

![percent correct against passes per token]({name}_frontier.png)

Percent of correct answers, and passes a token. T steps of ARPC are 2T - 1 passes a block. With masked
noise a step that lifts no mask needs no pass: the random numbers say so first. With uniform noise a network
that does not see the noise level is not asked twice about the same text.

| row | sampler | {" | ".join(f"{n} step" + "s" * (n > 1) for n in STEPS)} | own pace |
| --- | --- |{" --- |" * (len(STEPS) + 1)}""")
    for row in rows:
        for sampler in ("ar", "ancestral", "arpc"):
            cells = []
            for n in (*STEPS, None):
                percent = over_seeds(values_of(results, correct, row, sampler, n), 0)
                cost = values_of(results, passes, row, f"{sampler} {n}" if n else sampler)
                cells.append(percent + (f" · {statistics.mean(cost):.2f}" if cost else ""))
            if any(cells):
                out.append(f"| `{row}` | {sampler} | {' | '.join(cells)} |")
    if any(costs(results, "mixture", *group) for group in GROUPS):
        out.append(f"""
## (c) What the mixture costs its AR mode and gives its diffusion mode

![nats of a mixture minus nats of one block size]({name}_mixture.png)

The numbers are in the claims and in the first table. Every network has the same steps and rows, so a mixture
has seen each block size less often.""")
    out.append("""
## What is not controlled

- Uniform networks see the noise level. Masked ones do not see it. These are the defaults here; the paper's
  networks never see it. So the two differ in parameters and in time a step. The rows `masked_timed` and
  `uniform_timeless` are the other way round.
- All are trained by cross-entropy. There is one dataset, one size of network, and one learning rate for all
  rows.
- All seeds are measured on the same windows. The intervals are about training and noise, not about other
  data.
- Bounds of uniform noise end at t = 1e-3 and add the last step (`one_draw` in `eval.py`). Another end gives
  another bound, lower by some hundredths on one network ([log.md](log.md)).
""")
    text = "\n".join(out)
    Path(f"{cfg.page}.md").write_text(text, encoding="utf-8")
    return text


@guard("a smaller --n_eval")
def main():
    cfg, start = load_config(PaperConfig, sys.argv[1:]), time.time()
    if (
        not 1 <= cfg.seeds <= max(T_975)
        or not cfg.minutes > 0
        or cfg.n_eval < 2
        or cfg.n_mc < 2
        or cfg.n_mc % 2
    ):
        die(
            f"seeds must be 1 to {max(T_975)}, minutes above 0, n_eval at least 2, n_mc even",
            "--seeds 3 --minutes 38 --n_eval 256 --n_mc 8",
        )
    tomls = sorted(Path(cfg.rows).glob("*.toml"))
    if not tomls:
        die(f"no TOML file in {cfg.rows}", "--rows config/paper")
    asked = cfg.only.split(",") if cfg.only else [toml.stem for toml in tomls]
    if unknown := set(asked) - {toml.stem for toml in tomls}:
        die(f"{', '.join(sorted(unknown))} is no row of {cfg.rows}", f"--only {tomls[0].stem}")
    page = Path(f"{cfg.page}.md")
    if page.exists() and not page.read_text(encoding="utf-8").startswith(HEAD):
        die(f"{page} is not a page of ours, and would be written over", "--page docs/my_paper")
    # complain now, not after half an hour
    writable(f"{cfg.page}.md", "page"), writable(f"{cfg.out}/results.jsonl", "out"), plots.pyplot()
    kept = read(f"{cfg.page}.jsonl")  # of other seeds and rows too: none is ever dropped
    lines = kept + read(f"{cfg.out}/results.jsonl", mend=True)
    results, took = [{} for _ in range(cfg.seeds)], 0.0
    jobs = [(seed, toml) for seed in range(cfg.seeds) for toml in tomls]
    for toml in tomls:  # before anything is trained
        run = load_config(TrainConfig, [str(toml)])
        if checker(Dataset(run.dataset, run.seq_len).folder) is None:
            die(
                f"{toml}: nothing checks the answers of {run.dataset}",
                'dataset = "digits", or a check(text) in its prepare.py',
            )
    for seed, toml in tqdm(jobs, desc="trainings", disable=None):
        name, out_dir = toml.stem, f"{cfg.out}/{toml.stem}/{seed}"
        argv = [f"--seed={seed}", f"--out_dir={out_dir}", f"--device={cfg.device}"]
        run = load_config(TrainConfig, [str(toml), *argv])
        recipe = recipe_of(run)
        what = {"row": name, "seed": seed, "recipe": recipe, "n_eval": cfg.n_eval, "n_mc": cfg.n_mc}
        known = next((line for line in lines if all(line.get(k) == v for k, v in what.items())), None)
        if known is not None:
            results[seed][name] = known
            continue
        run.fit(Dataset(run.dataset, run.seq_len))
        done, began = finished(run, out_dir), time.time()
        if done != run.max_steps and name not in asked:
            continue
        if done != run.max_steps and began - start + took > 60 * cfg.minutes:
            tqdm.write(f"no time left for {name}, seed {seed}", file=sys.stdout)
            continue
        if done != run.max_steps:
            train_row(argv, str(toml), out_dir, resume=done is not None)
        seconds = time.time() - began
        results[seed][name] = measured(name, seed, out_dir, cfg, lines, seconds, recipe=recipe)
        took = max(took, time.time() - began)
    results = [r for r in results if r]
    used = kept + [line for r in results for line in r.values() if line not in kept]
    part = Path(f"{cfg.page}.jsonl.part")
    part.write_text("".join(json.dumps(line) + "\n" for line in used), encoding="utf-8")
    part.replace(f"{cfg.page}.jsonl")
    pictures(results, cfg.page)
    print(write(results, cfg))
    pages = f"{cfg.page}.md, {cfg.page}_likelihood.png and other pictures"
    print(f"{pages}: {(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
