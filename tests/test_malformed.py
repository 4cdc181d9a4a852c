"""
Why believe that nothing a user can hand over ends in a traceback? Command lines, TOMLs, datasets and
checkpoints, damaged at random.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval as evaluation
import sample
import train as training
from data.dataset import write_dataset
from lab import quality
from options import EvalConfig, SampleConfig, TrainConfig

N = int(os.environ.get("EXAMPLES", 12))  # make faults: 70 for each of five kinds
many = settings(
    max_examples=N, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
SMALL = [
    *TINY,
    "--n_samples=0",
    "--max_steps=1",
    "--dataset=toy",
    "--seq_len=8",
    "--block_sizes=1:0.25,4:0.75",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """
    A folder with data/toy, and with out/run, a run with two checkpoints that must survive everything, and
    out/duo, one of a method.
    """
    home, before = tmp_path_factory.mktemp("malformed"), os.getcwd()
    os.chdir(home)
    Path("data/toy").mkdir(parents=True)
    stream = np.arange(400) % 3
    write_dataset(
        "data/toy", stream[:300], stream[300:], {"vocab_size": 3, "tokenizer": "char", "chars": "abc"}
    )
    assert outcome(["train.py", *SMALL, "--max_steps=2", "--eval_every=1", "--out_dir=out/run"]) == 0
    assert outcome(["train.py", *SMALL, "--method=duo", "--max_steps=2", "--out_dir=out/duo"]) == 0
    yield home
    os.chdir(before)


def outcome(argv, *keep):
    """
    Exit code of a command, in this process. Fails on a traceback, on any code but 0 and 2, on 2 without its
    two lines, and if a command that refused has touched the files under `keep`.
    """
    start = {"train.py": training, "sample.py": sample, "eval.py": evaluation, "lab.quality": quality}
    everything = lambda: {
        p: p.read_bytes() for k in keep for p in Path(k).rglob("*") if p.is_file() and p.name != "lock"
    }
    files, err, code = everything(), io.StringIO(), 0
    old, sys.argv = sys.argv, argv
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            start[argv[0]].main()
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = old
    assert code in (0, 2), f"exit code {code}"
    if code == 2:
        lines = [
            line
            for line in err.getvalue().rstrip("\n").split("\n")
            if "it/s]" not in line and "?it/s" not in line
        ]
        assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("  try: "), (
            err.getvalue()
        )
        assert everything() == files, "a refused command has changed files"
    return code


NUMBERS = ["-1", "0", "1", "2", "3", "7", "16", "-7", "9" * 30, "-" + "9" * 30]
ODD = {
    int: NUMBERS + ["2.5", "1e3"],
    float: NUMBERS + ["nan", "inf", "-inf", "1e400", "1e-320", "0.5", "2.5", "1e30"],
    bool: ["true", "false", "maybe"],
}
ODD[dict] = [
    "1:1",
    "4:1",
    "8:1",
    "3:1",
    "1:0.5,4:0.5",
    "1:0.5,1:0.5",
    "4:nan",
    "4:inf,1:1",
    "1:",
    ":",
    "-4:1",
    "0:1",
    "9999999999999:1",
    "4:elbo",
]
ODD[str] = [
    "",
    "\U0001f4a5",
    "\0",
    "..",
    "/dev/null",
    "/dev/null/x",
    "none",
    "auto",
    "true",
    "a" * 5000,
    "--",
    "4:elbo",
    "elbo",
    "ce_noisy",
]
ODD[str] += [
    "uniform",
    "duo",
    "gidd",
    "distill",
    "ar",
    "arpc",
    "gibbs",
    "out/run",
    "out",
    "bfloat16",
    "constant",
    "cosine",
    "gloo",
    "cuda",
    "mps",
    "cpu",
    "self",
    "ab",
]
CLASSES = {
    "train.py": TrainConfig,
    "sample.py": SampleConfig,
    "eval.py": EvalConfig,
    "lab.quality": quality.QualityConfig,
}
FIXED = {"train.py": [*SMALL, "--out_dir=out/run"], "sample.py": ["--ckpt=out/run", "--device=cpu", "--steps=1"],
         "eval.py": ["--ckpt=out/run", "--device=cpu", "--n_eval=4", "--n_mc=1"],
         "lab.quality": ["--ckpt=out/run", "--device=cpu", "--n_eval=4", "--steps=1"]}  # fmt: skip
SLOW = {"compile", "max_steps"}  # compiling takes a minute, a billion steps longer


@many
@given(st.data())
def test_command_lines(home, data):
    script = data.draw(st.sampled_from(["train.py", "train.py", "sample.py", "eval.py", "lab.quality"]))
    fields, words = [f for f in dataclasses.fields(CLASSES[script]) if f.name not in SLOW], []
    for f in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2, unique_by=id)):
        words.append(f"--{f.name}={data.draw(st.sampled_from(ODD[f.type]))}")
    if data.draw(st.sampled_from(range(10))) == 9:
        words.append(
            data.draw(
                st.sampled_from(["--", "-x", "x.toml", "--lr", "--steps", "\0", "--=3", "config/none.toml"])
            )
        )
    outcome([script, *FIXED[script], *words], "out/run", "data")
    # a command that was right after all has moved the run: back, for the next
    for old in sorted(Path("out/run").glob("earlier.*")):
        for file in old.iterdir():
            os.replace(file, f"out/run/{file.name}")
        old.rmdir()


def damage(data, draw):
    """Bytes with something wrong: cut, flipped, inserted, or of another kind."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    kind = draw(st.sampled_from(["cut", "flip", "insert", "zero", "junk", "empty"]))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :] if data else data
    if kind == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=5)) + data[at:]
    if kind == "zero":
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    return draw(st.binary(max_size=40)) if kind == "junk" else b""


@contextlib.contextmanager
def instead(path, data):
    """A file with other content, for a while."""
    good = Path(path).read_bytes()
    Path(path).unlink()
    Path(path).write_bytes(data)
    yield
    Path(path).unlink()
    Path(path).write_bytes(good)


@many
@given(st.data())
def test_toml_files(home, data):
    good = b'dataset = "toy"\nblock_sizes = {1 = 0.25, 4 = 0.75}\nprocess = "uniform"\nlr = 1e-3\nseq_len = 8\nema = 0.9\nfsdp = false\n'
    Path("odd.toml").write_bytes(damage(good, data.draw))
    outcome(["train.py", "odd.toml", *SMALL, "--out_dir=out/toml"], "out/run", "data")


@many
@given(st.data())
def test_meta_json(home, data):
    meta = json.loads(Path("data/toy/meta.json").read_text())
    if data.draw(st.booleans()):
        key = data.draw(
            st.sampled_from([*meta, "row_len", "prompt_len", "separator", "eos_id", "width", "odd"])
        )
        meta[key] = data.draw(
            st.sampled_from(
                [
                    None,
                    -1,
                    0,
                    1,
                    3,
                    8,
                    10**9,
                    10**30,
                    1.5,
                    True,
                    "x",
                    "",
                    [],
                    ["a", 1, "c"],
                    {},
                    "abc",
                    "gpt2",
                ]
            )
        )
        new = json.dumps(meta).encode()
    else:
        new = damage(json.dumps(meta).encode(), data.draw)
    with instead("data/toy/meta.json", new):
        outcome(["train.py", *SMALL, "--out_dir=out/meta"], "out/run", "data")
        outcome(["train.py", *SMALL, "--out_dir=out/run", "--resume", "--max_steps=2"], "out/run", "data")


@many
@given(st.data())
def test_bin_files(home, data):
    path = data.draw(st.sampled_from(["data/toy/train.bin", "data/toy/val.bin"]))
    with instead(path, damage(Path(path).read_bytes(), data.draw)):
        outcome(["train.py", *SMALL, "--out_dir=out/bin"], "out/run", "data")


class Bomb:
    """What a stranger would pickle."""

    def __reduce__(self):
        return os.mkdir, ("boom",)


@many
@given(st.data())
def test_checkpoints(home, data):
    name = data.draw(st.sampled_from(["run", "run", "duo"]))
    good, method = Path(f"out/{name}/ckpt.2.pt").read_bytes(), ["--method=duo"] * (name == "duo")
    if data.draw(st.booleans()):
        state = torch.load(f"out/{name}/ckpt.2.pt", weights_only=True)
        parts = [
            (),
            ("config",),
            ("meta",),
            ("ema",),
            ("model",),
            ("optimizer",),
            ("optimizer", "state"),
            ("process",),
        ]
        parts += [("process", "arguments")] + [("method",), ("method", "settings")] * (name == "duo")
        part = data.draw(st.sampled_from(parts))
        inside = state
        for name in part:
            inside = inside[name]
        key = data.draw(st.sampled_from(sorted(inside, key=str)))
        odd = [
            None,
            -1,
            0,
            7,
            2.5,
            "x",
            [],
            {},
            torch.zeros(1),
            torch.zeros(3, 3),
            {0: {}},
            {1: 1.0},
            {"x": 1},
            10**30,
            float("nan"),
        ]
        new = data.draw(st.sampled_from(["gone", *range(len(odd)), "bomb"]))
        if new == "gone":
            del inside[key]
        else:
            inside[key] = Bomb() if new == "bomb" else odd[new]
        buffer = io.BytesIO()
        torch.save(state, buffer)
        bad = buffer.getvalue()
    else:
        bad = damage(good, data.draw)
    Path("out/odd").mkdir(exist_ok=True)
    for file in Path("out/odd").glob("*.pt"):
        file.unlink()
    Path("out/odd/ckpt.pt").write_bytes(bad)
    Path("out/odd/log.jsonl").write_bytes(damage(Path("out/run/log.jsonl").read_bytes(), data.draw))
    outcome(["sample.py", "--ckpt=out/odd", "--device=cpu", "--steps=1"], "out/odd")
    outcome(["eval.py", "--ckpt=out/odd", "--device=cpu", "--n_eval=4", "--n_mc=1"], "out/odd")
    outcome(
        ["train.py", *SMALL, *method, "--out_dir=out/odd", "--resume", "--max_steps=3"], "data", "out/run"
    )
    assert not Path("boom").exists(), "a pickle was executed"
