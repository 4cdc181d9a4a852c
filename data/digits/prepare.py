"""
Sums of two digits as an endless stream, 3+8=11;4+4=08; and so on, generated: no download. For generating many
blocks without a prompt; every complete sum can be checked.

    python data/digits/prepare.py
"""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import write_dataset
from run.cli import die, load_config

CHARS = "0123456789+=;"


@dataclass
class DigitsConfig:
    n_train: int = 200_000  # sums, 7 characters each
    n_val: int = 10_000
    seed: int = 0


def check(text):
    """
    (correct, asked): of the pieces between semicolons how many are a true sum; a piece the text cuts off does
    not count.
    """
    pieces = text.split(";")[1:-1]  # the first may begin, and the last end, in the middle
    right = [re.fullmatch(r"(\d)\+(\d)=(\d\d)", p) for p in pieces]
    return sum(int(m[1]) + int(m[2]) == int(m[3]) for m in right if m), len(pieces)


def terms(text):
    """
    The number of true sums, for reinforcement learning: [(1, the positions it reads)] of each true sum
    between two semicolons.
    """
    found = re.finditer(r";(?=(\d)\+(\d)=(\d\d);)", text)
    return [(1.0, range(m.start(), m.start() + 8)) for m in found if int(m[1]) + int(m[2]) == int(m[3])]


def choices(text):
    """[(sum, all hundred sums)] of the correct pieces."""
    found = [p for p in text.split(";")[1:-1] if check(f";{p};")[0]]
    return [(p, [f"{a}+{b}={a + b:02}" for a in range(10) for b in range(10)]) for p in found]


def main():
    cfg, start = load_config(DigitsConfig, sys.argv[1:]), time.time()
    if not 1 <= min(cfg.n_train, cfg.n_val) <= max(cfg.n_train, cfg.n_val) <= 10**8 or cfg.seed < 0:
        die("n_train and n_val must be 1 to 100 million, seed at least 0", "python data/digits/prepare.py")
    rng = np.random.default_rng(cfg.seed)
    a, b = rng.integers(10, size=(2, cfg.n_train + cfg.n_val))
    plus, equals, end = (np.full_like(a, CHARS.index(c)) for c in "+=;")
    # digits are their own ids
    stream = np.stack((a, plus, b, equals, (a + b) // 10, (a + b) % 10, end), axis=1)
    meta = {"vocab_size": len(CHARS), "tokenizer": "char", "chars": CHARS}
    write_dataset(Path(__file__).parent, stream[: cfg.n_train].ravel(), stream[cfg.n_train :].ravel(), meta)
    print(f"digits: {stream.size * 2 / 1e6:.1f} MB, {stream.size:,} tokens, {time.time() - start:.1f} s")


if __name__ == "__main__":
    main()
