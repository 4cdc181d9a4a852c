"""
Countdown, generated: no download. Reach a number from four others with + - * / and parentheses, each used
once:

    3 5 6 8 make 24 8*(6-5)*3

A row has a prompt of 16 characters and an answer of 16, filled up with blanks. Any right answer counts, not
just the one in the data. Numbers are 1 to 9, targets 10 to 99. Puzzles of the validation split, four
numbers in any order and a target, are not in the training split.

    python data/countdown/prepare.py
"""

import itertools
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import write_dataset
from run.cli import die, load_config

CHARS = " 0123456789+-*/()make"
HALF = 16  # characters of a prompt, and of an answer
# where the three operators stand between four numbers, and parentheses around them
SHAPES = ("a.b.c.d", "(a.b).c.d", "a.(b.c).d", "a.b.(c.d)", "(a.b).(c.d)", "(a.b.c).d", "a.(b.c.d)",
          "((a.b).c).d", "(a.(b.c)).d", "a.((b.c).d)", "a.(b.(c.d))")  # fmt: skip


@dataclass
class CountdownConfig:
    n_train: int = 50_000  # rows
    n_val: int = 1_000
    seed: int = 0


def value(text):
    """
    What an expression of + - * /, parentheses and whole numbers is worth, a Fraction, in the usual order of
    operations; None if it is no such expression, or divides by 0.
    """
    tokens = re.findall(r"\d+|.", text)

    def atom():
        token = tokens.pop(0)
        if token == "(":
            inside = total()
            if tokens.pop(0) != ")":
                raise ValueError
            return inside
        return Fraction(int(token))

    def product():
        left = atom()
        while tokens and tokens[0] in "*/":
            sign, right = tokens.pop(0), atom()
            left = left * right if sign == "*" else left / right
        return left

    def total():
        left = product()
        while tokens and tokens[0] in "+-":
            sign, right = tokens.pop(0), product()
            left = left + right if sign == "+" else left - right
        return left

    try:
        found = total()
        return None if tokens else found
    except (ValueError, IndexError, ZeroDivisionError):
        return None


def check(text):
    """(correct, asked) of one row: (1, 1) if the answer uses the four numbers once each and is right."""
    asked = re.fullmatch(r"(\d) (\d) (\d) (\d) make (\d\d) ", text[:HALF])
    answer = text[HALF:].rstrip(" ")
    if asked is None or not re.fullmatch(r"[-+*/()\d]+", answer):
        return 0, 1
    numbers = sorted(re.findall(r"\d+", answer))
    return int(numbers == sorted(asked.groups()[:4]) and value(answer) == int(asked[5])), 1


def terms(text):
    """
    The reward as a sum, for reinforcement learning: [(value, the positions it reads)]. 1 for an expression,
    1 for each of the four numbers that it uses, -1 for each other one, 4 for the right answer. All read the
    whole answer.
    """
    answer, given = text[HALF:].rstrip(" "), Counter(re.findall(r"\d+", text[:8]))
    used = Counter(re.findall(r"\d+", answer))
    numbers = (used & given).total() - (used - given).total()
    values = float(value(answer) is not None), float(numbers), 4.0 * check(text)[0]
    return [(v, range(HALF, 2 * HALF)) for v in values]


def rows_of(n, rng, wanted):
    """n rows of ids whose puzzles `wanted` takes, (n, 32) int64."""
    ids, rows = {c: i for i, c in enumerate(CHARS)}, []
    while len(rows) < n:
        numbers, shape = rng.integers(1, 10, size=4), SHAPES[rng.integers(len(SHAPES))]
        answer = shape
        for letter, number in zip("abcd", numbers, strict=True):
            answer = answer.replace(letter, str(number))
        for sign in rng.integers(4, size=3):
            answer = answer.replace(".", "+-*/"[sign], 1)
        made = value(answer)
        if made is None or made.denominator > 1 or not 10 <= made < 100:
            continue
        if not wanted(tuple(sorted(numbers.tolist())), int(made)):
            continue
        shown = " ".join(map(str, rng.permutation(numbers)))
        text = f"{shown} make {int(made)} {answer:<{HALF}}"
        rows.append([ids[c] for c in text])
    return np.array(rows)


def held_out():
    """One in ten of the puzzles (sorted numbers, target), always the same: what the validation split has."""
    puzzles = list(
        itertools.product(itertools.combinations_with_replacement(range(1, 10), 4), range(10, 100))
    )
    chosen = np.random.default_rng(1).random(len(puzzles)) < 0.1
    return {puzzle for puzzle, held in zip(puzzles, chosen, strict=True) if held}


def main():
    cfg, start = load_config(CountdownConfig, sys.argv[1:]), time.time()
    if not 1 <= min(cfg.n_train, cfg.n_val) <= max(cfg.n_train, cfg.n_val) <= 10**7 or cfg.seed < 0:
        die("n_train and n_val must be 1 to 10 million, seed at least 0", "python data/countdown/prepare.py")
    rng, held = np.random.default_rng(cfg.seed), held_out()
    train = rows_of(cfg.n_train, rng, lambda *puzzle: puzzle not in held)
    val = rows_of(cfg.n_val, rng, lambda *puzzle: puzzle in held)
    meta = {"vocab_size": len(CHARS), "tokenizer": "char", "chars": CHARS, "row_len": 2 * HALF}
    meta |= {"prompt_len": HALF, "width": 2 * HALF}
    write_dataset(Path(__file__).parent, train.ravel(), val.ravel(), meta)
    size = (train.size + val.size) * 2 / 1e6
    print(f"countdown: {size:.1f} MB, {len(train) + len(val):,} rows, {time.time() - start:.1f} s")


if __name__ == "__main__":
    main()
