"""
How well are holes filled? Text of the validation split with a hole whose right filling can be checked.

    digits   `_+8=11;` behind real text: one digit is right. With --at 36 the sum is in the hole's block of 16
             tokens, with --at 47 it begins the next block
    sudoku   a puzzle without clues, and its solution with some cells visible

    python -m lab.infilling --ckpt out/digits --at 47
    python -m lab.infilling --ckpt out/sudoku --visible 3

A line a way of filling: block size 1 and the largest, with one filling and with several that are weighed by
the text behind them (methods/infilling.py). Block size 1 with one filling reads nothing behind a hole: the
control.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python lab/infilling.py works too
from data.dataset import checker
from diffusion import SCHEDULES
from fast.block import generate
from generate import HOLE, SAMPLERS
from lab.quality import accuracy
from methods import infilling
from run.cli import die, load_config
from run.machine import guard
from run.restore import dataset_for, restore


@dataclass
class InfillingConfig:
    ckpt: str = "out/run"  # a training run's out_dir, of digits or 4x4 sudoku
    n_eval: int = 512  # texts a line
    at: int = 36  # digits: the position of the hole
    place: int = 0  # digits: which character of the sum is missing, 0 to 6
    visible: int = 3  # sudoku: cells of the solution that are given, at random places
    gaps: int = 64  # of 1, 4, 16 and 64 fillings those up to so many
    seed: int = 1
    device: str = "auto"
    plain: bool = False  # run the lesson as it stands, not fast/


def sums(data, n, at, place):
    """n prompts of digits: text of the validation split that ends with a sum, which lacks a character."""
    begin = at - place
    stream = data.tokens["val"]
    starts = torch.linspace(-(-begin // 7), len(stream) // 7 - 1, n).long() * 7 - begin
    rows = torch.stack([torch.tensor(stream[s : s + begin + 7].astype("int64")) for s in starts.tolist()])
    rows[:, at] = HOLE
    return rows


def grids(data, n, visible, seed):
    """n prompts of sudoku: no clues, and solutions of the validation split with some visible cells."""
    rows = data.windows("val", data.spread("val", n))[0]
    rows[:, :16] = 0
    order = torch.rand(n, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
    rows[:, 16:] = torch.where(order < visible, rows[:, 16:], HOLE)
    return rows


def lines_asked(trained, prompt, most):
    """[(sampler, block size, steps, temperature, gaps)]: weights only where something is left to weigh."""
    b = trained[-1]
    lines = [("ar", 1, None, 1.0, gaps) for gaps in (1, 4, 16, 64)]
    lines += [(name, b, b, 1.0, 1) for name in ("ancestral", "renoise")]
    lines += [("confidence", b, b, 0.0, 1), ("confidence", b, b, 1.0, 1)]
    if infilling.unseen(prompt, b).any():
        lines += [("confidence", b, b, 1.0, gaps) for gaps in (4, 16, 64)]
    fits = lambda b, gaps: b in trained and gaps <= most and (gaps == 1 or 1 in trained)
    return [line for line in lines if fits(line[1], line[4])]


@guard("a smaller --n_eval, or --device=cpu")
def main():
    cfg = load_config(InfillingConfig, sys.argv[1:])
    run, meta, _, model, process = restore(cfg.ckpt, cfg.device, cfg.plain)
    data, trained = dataset_for(cfg.ckpt, run, meta, model), sorted(run.block_sizes)
    if cfg.n_eval < 2 or cfg.gaps < 1:
        die("n_eval must be at least 2, gaps at least 1", "--n_eval 512 --gaps 64")
    if run.dataset == "digits":
        if not 0 <= cfg.place < 7 or not cfg.place < cfg.at <= run.seq_len - 7:
            problem = f"no hole at character {cfg.place} of a sum and position {cfg.at}"
            die(problem, "--place 0 --at 36")
        prompts = sums(data, cfg.n_eval, cfg.at, cfg.place)
        check = lambda text: checker(data.folder).check(f";{text[cfg.at - cfg.place :]}")
    elif run.dataset == "sudoku" and data.seq_len == 32:
        if not 0 <= cfg.visible < 16:
            die(f"visible cannot be {cfg.visible}: of 16 cells at least one is a hole", "--visible 3")
        prompts, check = grids(data, cfg.n_eval, cfg.visible, cfg.seed), checker(data.folder).check
    else:
        die(f"{run.dataset}: what is right is known for digits and 4x4 sudoku", "--ckpt out/digits")
    module = type("Checks", (), {"check": staticmethod(check)})
    print(f"{len(prompts)} texts, {int((prompts[0] == HOLE).sum())} holes each, seed {cfg.seed}")
    heads = f"{'sampler':>12} {'block':>6} {'T':>4} {'gaps':>5} {'in effect':>9}"
    print(f"{heads} {'right, 95 %':>18} {'a row':>6} {'token-forwards':>15}")
    for name, b, steps, temperature, gaps in lines_asked(trained, prompts[0], cfg.gaps):
        rows, cost, effective = [], torch.zeros(2), 0.0
        for some in prompts.split(max(1, 512 // gaps)):
            how = {"block_size": b, "sampler": SAMPLERS[name], "steps": steps, "temperature": temperature}
            how |= {"seed": cfg.seed + len(rows), "trained": trained, "schedule": SCHEDULES[run.schedule]}
            for last in infilling.fill(model, process, some, gaps=gaps, generate=generate, **how):
                pass
            rows += [data.tokenizer.decode([i for i in row if i >= 0]) for row in last.x.tolist()]
            cost += torch.tensor([last.nfe_rows.sum().item(), last.token_forwards])
            effective += last.effective.sum().item()
        r, n = accuracy(module, rows), len(rows)
        share = f"{100 * r['accuracy']:.1f} ({100 * r['low']:.1f}-{100 * r['high']:.1f})"
        passes, tokens = (cost / n).tolist()
        line = f"{name:>12} {b:>6} {temperature:>4g} {gaps:>5} {effective / n:>9.1f}"
        print(f"{line} {share:>18} {passes:>6.1f} {tokens:>15.0f}", flush=True)


if __name__ == "__main__":
    main()
