import os
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

# of every test and its subprocesses: tiny tensors lose time to a second thread
os.environ["OMP_NUM_THREADS"] = os.environ.get("NANOBLOCK_THREADS", "1")
# read when triton is imported: its kernels then run in Python, on CPU tensors
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
from filelock import FileLock  # torch has it with it

from data.dataset import write_dataset
from run import checkpoint

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

IN_FLOAT64 = str(Path(__file__).parent / "in_float64.py")
TINY = [
    "--n_layers=2",
    "--n_heads=2",
    "--d_model=16",
    "--batch_size=4",
    "--n_eval=8",
    "--n_samples=1",
    "--eval_every=100",
    "--log_every=1",
    "--device=cpu",
]


ROOT = Path(__file__).parents[1]
UNMADE = shutil.ignore_patterns("*.bin", "meta.json", "*.tiktoken", "input.txt", "__pycache__")


def copy_project(home, folders=("config", "data", "fast", "hub", "lab", "methods", "run", "samplers")):
    """The code of the project in an empty folder, as a fresh clone has it: no data made, nothing trained."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, home)
    for folder in folders:
        shutil.copytree(ROOT / folder, home / folder, ignore=UNMADE)


def run(main, *argv):
    """A command in this process: main, of train.py or another, with these words behind it."""
    with patch.object(sys, "argv", ["script.py", *argv]):
        main()


def resumed(main, *flags):
    """
    Four steps into the folder whole, two and then two more into parts, by main of train.py: both checkpoints.
    Their weights are equal to the bit.
    """
    run(main, *flags, "--max_steps=4", "--out_dir=whole")
    run(main, *flags, "--max_steps=2", "--out_dir=parts")
    run(main, *flags, "--max_steps=4", "--out_dir=parts", "--resume")
    whole, parts = (checkpoint.load(name) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    for part in ("model", "ema"):
        assert whole[part].keys() == parts[part].keys()
        assert all(torch.equal(whole[part][k], parts[part][k]) for k in whole[part])
    return whole, parts


def slow(values, quick):
    """Values for parametrize, tuples or not: those not in `quick` are for make test-all only."""
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=() if v in quick else pytest.mark.slow)
        for v in values
    ]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """
    An empty project folder with a dataset `toy` (a stream of abcabc... with slips) and one of rows, `pairs`.
    """
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "data/toy").mkdir(parents=True)
    (tmp_path / "data/pairs").mkdir()
    stream = (np.arange(2000) + (rng.random(2000) < 0.1)) % 3
    write_dataset(
        "data/toy", stream[:1600], stream[1600:], {"vocab_size": 3, "tokenizer": "char", "chars": "abc"}
    )
    rows = rng.integers(1, 4, size=(300, 12))
    rows[:, 6:] = rows[:, 5::-1]  # abcdefggfedcba with a separator, id 0, after two to five letters
    rows[np.arange(300), rng.integers(2, 6, size=300)] = 0
    meta = {"vocab_size": 4, "tokenizer": "char", "chars": ".abc", "row_len": 12, "separator": 0}
    write_dataset("data/pairs", rows[:250].ravel(), rows[250:].ravel(), meta)
    return tmp_path


@pytest.fixture
def float64():
    """
    A process in which float64 takes float32's place: networks, training, checkpoints and evaluations as ever,
    and two ways to one number agree to 1e-12, whatever the processor. For scripts in processes of their own:
    in_float64.py.
    """
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """
    once(name, make): a folder that make(folder) has filled. Of the processes of pytest -n one makes it, and
    each has a copy of its own.
    """

    def folder(name, make):
        mine = tmp_path_factory.mktemp(name)
        if "PYTEST_XDIST_WORKER" not in os.environ:
            make(mine)
            return mine
        first = tmp_path_factory.getbasetemp().parent / f"{name}_of_all"
        with FileLock(f"{first}.lock"):
            if not (first / "made").exists():
                shutil.rmtree(first, ignore_errors=True)  # another process failed on the way
                first.mkdir()
                make(first)
                (first / "made").touch()
        return Path(shutil.copytree(first, mine, dirs_exist_ok=True))

    return folder


@pytest.fixture
def slip(capsys, monkeypatch):
    """
    slip(function, *args, argv=...): the two lines a user sees; fails on anything but exit code 2 and two
    lines.
    """

    def run(function, *args, argv=()):
        monkeypatch.setattr(sys, "argv", ["script.py", *argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            function(*args)
        err = capsys.readouterr().err
        assert e.value.code == 2, f"exit code {e.value.code}"
        bar = re.compile(r"[\d?]it/s[],]")  # progress bars; a random folder may end in "it", before "/s..."
        lines = [line for line in err.rstrip("\n").split("\n") if not bar.search(line)]
        assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("  try: "), err
        return err

    return run
