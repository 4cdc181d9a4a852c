"""
Why believe dataset.py and data/*/prepare.py? Generated rows pass their own checker, damaged ones do not.
"""

import base64
import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copy_project, slow

from data.dataset import Dataset, Tokenizer

ROOT = Path(__file__).parents[1]
DATASETS = sorted(p.parent.name for p in (ROOT / "data").glob("*/prepare.py"))


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare(name, *flags): run data/NAME/prepare.py in a copy of the project, as a user does."""
    copy_project(tmp_path, ("data", "hub", "run"))
    monkeypatch.chdir(tmp_path)

    def run(name, *flags, code=0):
        p = subprocess.run(
            [sys.executable, f"data/{name}/prepare.py", *flags], capture_output=True, text=True
        )
        assert p.returncode == code, p.stderr
        return p.stdout + p.stderr

    return run


def module(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m


def texts_and_answers(data, split, index):
    """x0 and which of its tokens are neither prompt nor padding, (B, T)."""
    x0, given, real = data.windows(split, index)
    return x0, real & ~given


@pytest.mark.parametrize("side, max_clues", slow([(4, 6), (9, 40)], [(4, 6)]))
def test_sudoku(prepare, side, max_clues):
    out = prepare("sudoku", f"--side={side}", "--n_train=300", "--n_val=50")
    assert f"{350 * 2 * side**2:,} tokens" in out
    data, check = Dataset("sudoku"), module("sudoku").check
    assert data.seq_len == 2 * side**2 and data.meta["vocab_size"] == side + 1
    x0, answer = texts_and_answers(data, "train", torch.arange(300))
    texts = [data.tokenizer.decode(row) for row in x0.tolist()]
    assert all(check(t) == (1, 1) for t in texts)
    assert (answer.sum(1) == side**2).all() and not answer[:, : side**2].any()
    n_clues = {side**2 - t[: side**2].count(".") for t in texts}
    assert min(n_clues) >= 0 and max(n_clues) <= max_clues and len(n_clues) > max_clues / 2
    t = next(t for t in texts if t[0] != ".")
    assert check(t[: side**2] + "." + t[side**2 + 1 :]) == (0, 1), "a blank is no answer"
    swapped = t[side**2 :].translate(str.maketrans("12", "21"))
    assert check("." * side**2 + swapped) == (1, 1), "another valid grid"
    t = next(t for t in texts if "1" in t[: side**2])
    assert check(t[: side**2] + t[side**2 :].translate(str.maketrans("12", "21"))) == (0, 1), (
        "a valid grid that ignores a clue"
    )
    assert check("." * side**2 + "1" * side**2) == (0, 1), "no valid grid"


@pytest.mark.parametrize("name", slow(DATASETS, ["gsm8k"]))
def test_prepare_from_another_folder(prepare, tmp_path, monkeypatch, name):
    """A fresh copy of the project, called by its path from elsewhere: the files go beside the script."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.txt").write_text("To be, or not to be.\n" * 50, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "elsewhere")
    flags = {
        "sudoku": ["--n_train=20", "--n_val=5"],
        "digits": ["--n_train=20", "--n_val=5"],
        "countdown": ["--n_train=20", "--n_val=5"],
        "shakespeare_char": ["--input=a.txt"],
    }
    p = subprocess.run(
        [sys.executable, f"../data/{name}/prepare.py", *flags.get(name, ["--help"])],
        capture_output=True,
        text=True,
    )
    assert p.returncode == 0 and not p.stderr, p.stderr
    assert [f.name for f in Path().iterdir()] == ["a.txt"]
    made = sorted(f.name for f in (tmp_path / "data" / name).iterdir() if f.suffix in (".bin", ".json"))
    assert made == (["meta.json", "train.bin", "val.bin"] if name in flags else [])
    assert name in flags or "--bpe" in p.stdout


def test_the_288_grids():
    assert len(module("sudoku").all_4x4()) == 288


def test_digits(prepare):
    prepare("digits", "--n_train=100", "--n_val=20")
    data, check = Dataset("digits", 35), module("digits").check
    x0, answer = texts_and_answers(data, "val", torch.arange(data.n_windows("val")))
    assert answer.all() and x0.shape == (20 * 7 - 34, 35)
    for row in x0.tolist():
        right, asked = check(data.tokenizer.decode(row))
        assert right == asked >= 3
    assert (
        check("=11;4+4=08;1+1=03;9+") == (1, 2) and check("=11;44=08;;") == (0, 2) and check("123") == (0, 0)
    )


QUESTION = "To be, or not to be: that is the question.\n"


def test_shakespeare_chars(prepare):
    Path("a.txt").write_text(QUESTION * 20, encoding="utf-8")
    assert "860 tokens" in prepare("shakespeare_char", "--input", "a.txt")
    data = Dataset("shakespeare_char", 43)
    assert data.tokenizer.decode(data.windows("train", [0])[0][0].tolist()) == QUESTION


@pytest.mark.slow
def test_shakespeare_bytes(prepare, slip):
    Path("a.txt").write_text(QUESTION * 20, encoding="utf-8")
    # merges that never happen
    pairs = [bytes([i]) for i in range(256)] + [bytes([0, i % 256, i // 256]) for i in range(50_000)]
    ranks = [base64.b64encode(p) + f" {i}\n".encode() for i, p in enumerate(pairs)]
    Path("bytes.tiktoken").write_bytes(b"".join(ranks))
    assert "774 + 86 tokens" in prepare("shakespeare", "--input=a.txt", "--bpe=bytes.tiktoken")
    assert "774 + 86 tokens" in prepare(
        "shakespeare", "--input=a.txt", "--bpe=data/shakespeare/gpt2.tiktoken"
    ), "the file it kept"
    Path("short.tiktoken").write_bytes(b"".join(ranks[:-1]))
    assert "no GPT-2 byte pairs" in prepare("shakespeare", "--input=a.txt", "--bpe=short.tiktoken", code=2)
    data = Dataset("shakespeare", 43)
    assert data.tokenizer.decode(data.windows("train", [43])[0][0].tolist()) == QUESTION
    for flags, says in (
        (["--input", "none.txt"], "none.txt"),
        (["--inptu", "a.txt"], "--input"),
        (["--input", "bytes.tiktoken", "--bpe", "no"], "no"),
    ):
        assert says in slip(runpy.run_path, "data/shakespeare/prepare.py", None, "__main__", argv=flags)


def test_nanogpts_own_files_and_two_lines_of_meta(project):
    Path("data/mine").mkdir()
    np.arange(1000, dtype=np.uint16).tofile("data/mine/train.bin")
    np.arange(100, dtype=np.uint16).tofile("data/mine/val.bin")
    Path("data/mine/meta.json").write_text('{"vocab_size": 1000,\n "tokenizer": "none"}')
    data = Dataset("mine", 8)
    x0, answer = texts_and_answers(data, "val", data.spread("val", 3))
    assert x0.tolist() == [list(range(i, i + 8)) for i in (0, 46, 92)] and answer.all()
    assert data.tokenizer.decode([3, 14]) == "3 14" and data.tokenizer.encode("3 14") == [3, 14]


def test_large_vocabularies_are_uint32(project):
    Path("data/big").mkdir()
    for split in ("train", "val"):
        np.array([1, 70_000, 5], dtype=np.uint32).tofile(f"data/big/{split}.bin")
    Path("data/big/meta.json").write_text(json.dumps({"vocab_size": 70_001, "tokenizer": "none"}))
    assert Dataset("big", 3).windows("val", [0])[0].tolist() == [[1, 70_000, 5]]


def test_uint32_where_uint16_is_meant_is_refused(project, slip):
    """Read as uint16, every second id would be 0, and nothing would tell."""
    np.fromfile("data/toy/train.bin", np.uint16).astype(np.uint32).tofile("data/toy/train.bin")
    err = slip(Dataset, "toy", 8)
    assert "train.bin holds uint32" in err
    np.fromfile("data/toy/train.bin", "u4").astype("u2").tofile("data/toy/train.bin")
    Dataset("toy", 8)
    (np.arange(64) % 2).astype(np.uint16).tofile("data/toy/train.bin")  # 0 1 0 1 ... is a text like any other
    Dataset("toy", 8)


def test_the_separator_ends_the_prompt(project, slip):
    data = Dataset("pairs")
    x0, answer = texts_and_answers(data, "val", [0, 1])
    for row, keep in zip(x0.tolist(), answer.tolist(), strict=True):
        at = row.index(0)
        assert 2 <= at < 6 and keep == [False] * (at + 1) + [True] * (11 - at)
    bad = np.fromfile("data/pairs/val.bin", dtype=np.uint16)
    for end, says in (([0], "ends with its prompt"), ([1], "is without the separator")):
        bad[36:48] = [1] * 11 + end
        bad.tofile("data/pairs/val.bin")
        assert f"val.bin: row 3 {says}" in slip(Dataset, "pairs"), "before training, not on its third day"


def test_damaged_data_is_refused(project, slip):
    def write(**files):
        for name, content in files.items():
            path = Path("data/toy") / name.replace("_", ".")
            path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        return slip(Dataset, "toy", 8)

    good = Path("data/toy/meta.json").read_bytes()
    assert "prepare.py" not in slip(Dataset, "nothing", 8)
    for bad in (
        b"{",
        b"[]",
        b'{"vocab_size": 3}',
        b'{"vocab_size": "3", "tokenizer": "none"}',
        b'{"vocab_size": 3, "tokenizer": "word2vec"}',
        b"\xff",
    ):
        assert "meta.json" in write(meta_json=bad)
    assert "surprise" in write(meta_json=b'{"vocab_size": 3, "tokenizer": "none", "surprise": 1}')
    assert "chars" in write(meta_json=b'{"vocab_size": 3, "tokenizer": "char", "chars": "ab"}')
    assert "id 2" in write(meta_json=b'{"vocab_size": 2, "tokenizer": "none"}')
    assert "train.bin" in write(meta_json=good, train_bin=b"\0" * 33)
    assert "train.bin" in write(train_bin=b"\0" * 6)
    assert "train.bin not found" in write(train_bin=None)
    assert "--seq_len=12" in slip(Dataset, "pairs", 8)
    assert "--seq_len" in slip(Dataset, "toy", 0)
    assert "'z'" in slip(Tokenizer({"tokenizer": "char", "chars": "abc"}, ".").encode, "az")
    assert "list of ids" in slip(Tokenizer({"tokenizer": "none"}, ".").encode, "1 x")
