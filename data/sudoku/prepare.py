"""
Sudoku, generated: no download. A row is a puzzle (`.` where blank) and then its solution, for side 4 it has
16 + 16 characters:

    ..3.1.........4.  becomes e.g.  4231132431422413  after it

with 0 to 6 clues at random places. An answer is verifiable: a valid grid that agrees with the clues. The 4x4
kind has only 288 grids, so it shows whether the tokens of a block fit *each other*, not generalisation;
--side 9 has plenty.

    python data/sudoku/prepare.py [--side 9]
"""

import functools
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import write_dataset
from run.cli import die, load_config


@dataclass
class SudokuConfig:
    side: int = 4  # 4 or 9
    max_clues: int = -1  # a puzzle has 0 to so many clues; -1: 6 for side 4, 40 for side 9
    n_train: int = 50_000  # rows
    n_val: int = 1_000
    seed: int = 0


def is_valid(grids):
    """(n, side, side) -> (n,) bool: every row, column and box holds 1..side once."""
    side = grids.shape[-1]
    r = int(side**0.5)
    boxes = grids.reshape(-1, r, r, r, r).transpose(0, 1, 3, 2, 4).reshape(-1, side, side)
    want = np.arange(1, side + 1)
    return np.all(
        [(np.sort(g, -1) == want).all((1, 2)) for g in (grids, grids.transpose(0, 2, 1), boxes)], axis=0
    )


def all_4x4():
    """The 288 grids of side 4."""
    rows = list(itertools.permutations(range(1, 5)))
    grids = np.array(list(itertools.product(rows, repeat=4)))
    return grids[is_valid(grids)]


def some_9x9(n, rng):
    """
    n grids of side 9: one pattern with its digits, rows, columns, bands and stacks permuted, some transposed.
    """
    pattern = np.array([[(3 * (i % 3) + i // 3 + j) % 9 for j in range(9)] for i in range(9)])
    lines = lambda: np.concatenate([3 * band + rng.permutation(3) for band in rng.permutation(3)])
    grids = np.stack([(1 + rng.permutation(9))[pattern[lines()][:, lines()]] for _ in range(n)])
    return np.where(rng.random(n)[:, None, None] < 0.5, grids, grids.transpose(0, 2, 1))


def check(text):
    """
    (correct, asked) of one row of text: (1, 1) if the second half is a valid grid that agrees with the clues
    in the first.
    """
    n = len(text) // 2
    side = int(n**0.5)
    puzzle, answer = text[:n], text[n:]
    if (
        side * side != n
        or not answer.isdecimal()
        or any(p not in (".", a) for p, a in zip(puzzle, answer, strict=True))
    ):
        return 0, 1
    return int(is_valid(np.array([int(c) for c in answer]).reshape(1, side, side))[0]), 1


def show(text):
    """The grid of one row of text, with the clues in brackets and its boxes apart."""
    n = len(text) // 2
    side = int(n**0.5)
    if side * side != n or not n:
        return text
    r, lines = int(side**0.5), []
    cells = [f"[{a}]" if p == a else f" {a} " for p, a in zip(text[:n], text[n:], strict=False)]
    for i in range(side):
        row = cells[side * i : side * (i + 1)]
        lines.append("|".join("".join(row[j : j + r]) for j in range(0, side, r)))
        if (i + 1) % r == 0 and i + 1 < side:
            lines.append("+".join("-" * 3 * r for _ in range(r)))
    return "\n".join(lines)


def terms(text):
    """
    The reward of an answer as a sum, for reinforcement learning: [(value, the positions it reads)]. 1 for
    each row, column and box that holds every digit once, 3 for each clue that is obeyed, 4 for a correct
    grid.
    """
    n = len(text) // 2
    side = int(n**0.5)
    puzzle, answer, digits = text[:n], text[n:], set("123456789"[:side])
    found = [(float({answer[i] for i in group} == digits), [n + i for i in group]) for group in groups(side)]
    right = all(value for value, _ in found) and all(
        p in (".", a) for p, a in zip(puzzle, answer, strict=True)
    )
    clues = [(3.0 * (answer[i] == puzzle[i]), [n + i]) for i in range(n) if puzzle[i] != "."]
    return [*found, *clues, (4.0 * right, range(n, 2 * n))]


@functools.cache
def groups(side):
    """The cells of each row, column and box."""
    cells, r = np.arange(side * side).reshape(side, side), int(side**0.5)
    boxes = cells.reshape(r, r, r, r).transpose(0, 2, 1, 3).reshape(side, side)
    return [group.tolist() for group in (*cells, *cells.T, *boxes)]


def choices(text):
    """[(grid, all grids that agree with the clues)] if the answer is correct, else []; side 4."""
    n = len(text) // 2
    if n != 16 or not check(text)[0]:
        return []
    fits = np.all([(g == p) | (p == ".") for g, p in zip(every_4x4().T, text[:n], strict=True)], axis=0)
    return [(text[n:], ["".join(g) for g in every_4x4()[fits]])]


@functools.cache
def every_4x4():
    return all_4x4().reshape(288, 16).astype(str)


def main():
    cfg, start = load_config(SudokuConfig, sys.argv[1:]), time.time()
    if cfg.side not in (4, 9):
        die(f"side {cfg.side}: a sudoku here has side 4 or 9", "python data/sudoku/prepare.py --side=4")
    if (
        not 1 <= min(cfg.n_train, cfg.n_val) <= max(cfg.n_train, cfg.n_val) <= 10**8
        or cfg.seed < 0
        or cfg.max_clues > cfg.side**2
    ):
        die(
            "n_train and n_val must be 1 to 100 million, seed at least 0, max_clues at most side x side",
            "python data/sudoku/prepare.py",
        )
    max_clues = cfg.max_clues if cfg.max_clues >= 0 else {4: 6, 9: 40}[cfg.side]
    rng, n, cells = np.random.default_rng(cfg.seed), cfg.n_train + cfg.n_val, cfg.side**2
    grids = all_4x4()[rng.integers(288, size=n)] if cfg.side == 4 else some_9x9(n, rng)
    grids = grids.reshape(n, cells)
    clue = rng.random((n, cells)).argsort(1) < rng.integers(max_clues + 1, size=(n, 1))
    rows = np.concatenate((np.where(clue, grids, 0), grids), axis=1)
    meta = {
        "vocab_size": cfg.side + 1,
        "tokenizer": "char",
        "chars": ".123456789"[: cfg.side + 1],
        "row_len": 2 * cells,
        "prompt_len": cells,
        "width": cfg.side,
    }
    write_dataset(Path(__file__).parent, rows[: cfg.n_train].ravel(), rows[cfg.n_train :].ravel(), meta)
    print(
        f"sudoku {cfg.side}x{cfg.side}: {rows.size * 2 / 1e6:.1f} MB, "
        f"{rows.size:,} tokens in {n:,} rows, {time.time() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
