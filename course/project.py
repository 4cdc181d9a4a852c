"""The project with a student's function in it: train.py and sample.py in this process."""

import contextlib
import sys
from pathlib import Path

import torch

from run.cli import die

TRAIN = ["--max_steps=150", "--eval_every=150", "--warmup=20", "--out_dir=out/course"]


@contextlib.contextmanager
def replaced(owner, name, mine):
    """For as long as it lasts, owner.name is the student's."""
    ours = getattr(owner, name)
    setattr(owner, name, mine)
    try:
        yield
    finally:
        setattr(owner, name, ours)


def call(main, *words):
    """main() of train.py or another, as if these words had been typed. --plain: no fast form steps in."""
    words = [*words, "--plain"]
    name = Path(sys.modules[main.__module__].__file__).name
    print(f"\npython {name} {' '.join(words)}     (with your function)")
    argv, sys.argv = sys.argv, [name, *words]
    try:
        main()
    finally:
        sys.argv = argv


def train(*words):
    """train.py for a few steps."""
    import train as training

    need_sudoku()
    call(training.main, *words, *TRAIN)


def need_sudoku():
    if not Path("data/sudoku/train.bin").exists():
        die(
            "the runs of the course train on sudokus, and data/sudoku is empty",
            "python data/sudoku/prepare.py",
        )


def network(ckpt, default, noise):
    """(settings, model, process) of a run, as the lesson stands. noise: what it must have."""
    from run.restore import rebuild

    folder = ckpt or default
    if not ckpt and not list(Path(folder).glob("*.pt")):
        fix = f"python train.py config/{Path(default).name}.toml"
        die(f"this run needs a trained network, and there is none in {folder}", fix)
    run, _, _, model, process = rebuild(folder, torch.device("cpu"), plain=True)
    if run.process != noise or run.method or run.dataset != "sudoku":
        die(f"{folder} is no network for sudokus with {noise} noise", "leave --ckpt out")
    return run, model, process


def puzzles(n):
    """n puzzles of the validation split, and the check of an answer."""
    from data.dataset import Dataset

    need_sudoku()
    data = Dataset("sudoku", 32)
    x0, given, _ = data.windows("val", data.spread("val", n))
    texts = lambda rows: [data.tokenizer.decode(row.tolist()) for row in rows]
    right = lambda rows: sum(data.checker.check(text)[0] for text in texts(rows))
    return [row[keep] for row, keep in zip(x0, given, strict=True)], right, texts


def show(texts, n=3):
    """n grids side by side: the text behind the puzzle."""
    for i in range(16, 32, 4):
        print("   " + "    ".join(" ".join(text[i : i + 4]) for text in texts[:n]))
