"""
Why believe corpus.py, shards.py and the prepare.py that call them? Killed anywhere they make the same files,
and the files are right.
"""

import base64
import contextlib
import errno
import functools
import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import copy_project

from data import corpus, shards
from data.dataset import Dataset
from data.tokens import LETTERS, Tokenizer

ROOT = Path(__file__).parents[1]
NAMES = ("openwebtext", "lm1b", "tinygsm", "gsm8k", "wikitext")
WORDS = 'the cat sat on a mat . It \'s 12 dogs , and " ran " away\n\n to  caf\u00e9\t( here ) ! = @-@'.split(
    " "
)
PAIRS = [b"th", b"the", b" c", b" ca", b"at", b"\n\n", b"  ", "\u00a0".encode(), "\u00a0\n".encode()]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """
    A project with five datasets unmade, tiny tokenizers, and inputs: docs.jsonl, docs.txt, qa.jsonl,
    news.txt.
    """
    copy_project(tmp_path, ("data", "hub", "run"))
    monkeypatch.chdir(tmp_path)
    # a disk takes its time; not in processes of their own
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    ranks = [bytes([b]) for b in range(256)] + PAIRS
    no_text = [b"\xff%05d" % i for i in range(50256 - len(ranks))]  # GPT-2's number of tokens is asked for
    Path("tiny.tiktoken").write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks + no_text))
    )
    letter = {b: c for c, b in LETTERS.items()}
    spelt = lambda token: "".join(letter[b] for b in token)
    vocab = {"<|endoftext|>": 0} | {spelt(t): i for i, t in enumerate(ranks, 1)}
    merges = [" ".join(map(spelt, ((t[:-1], t[-1:])))) for t in PAIRS]
    steps = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ]
    file = {
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    }
    Path("tiny.json").write_text(json.dumps(file | {"added_tokens": [{"content": "<|endoftext|>", "id": 0}]}))
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = [
        "[PAD]",
        *(f"[unused{i}]" for i in range(99)),
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{c}" for c in letters),
        "cat",
    ]
    Path("tiny.txt").write_text("\n".join(words) + "\n")

    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(0, 30))) for _ in range(40)]
    Path("docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    Path("docs.txt").write_text("\n<|endoftext|>\n".join(texts))
    Path("news.txt").write_text(
        "".join(f"{t.strip()}\n" for t in map(lambda t: re.sub(r"\s+", " ", t), texts) if t.strip())
    )
    pairs = [{"question": q, "answer": a, "code": a} for q, a in zip(texts, reversed(texts), strict=True)]
    Path("qa.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return texts


FLAGS = {
    "openwebtext": ["--input=docs.jsonl", "--bpe=tiny.tiktoken", "--seq_len=16", "--val_docs=9"],
    "lm1b": ["--input=news.txt", "--val_input=news.txt", "--bpe=tiny.txt", "--seq_len=32"],
    "tinygsm": ["--input=qa.jsonl,qa.jsonl", "--bpe=tiny.json", "--seq_len=128"],
    "gsm8k": ["--input=qa.jsonl", "--val_input=qa.jsonl", "--bpe=tiny.json", "--seq_len=128"],
    "wikitext": ["--input=news.txt", "--val_input=news.txt", "--bpe=tiny.tiktoken", "--seq_len=16"],
}


@functools.cache
def loaded(kind, text):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / corpus.FILES[kind]).write_bytes(text)
        return Tokenizer({"tokenizer": kind}, folder)


def quick(meta, folder):
    """
    The same tokenizer, read once: fifty thousand pairs take a moment, and the tests come back to them a
    hundred times.
    """
    return loaded(meta["tokenizer"], (Path(folder) / corpus.FILES[meta["tokenizer"]]).read_bytes())


def prepare(monkeypatch, name, *flags):
    """Run data/NAME/prepare.py in this process; the flags after FLAGS' own win."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", Path("data") / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(corpus, "Tokenizer", quick)
    monkeypatch.setattr(sys, "argv", ["prepare.py", *FLAGS[name], "--workers=1", *flags])
    module.main()
    return module


def made(name):
    """What a dataset's folder holds, but for the script, the tokenizer and the lock."""
    left = {f.name: f.read_bytes() for f in (Path("data") / name).iterdir() if f.is_file()}
    return {
        k: v
        for k, v in left.items()
        if k not in ("prepare.py", "progress.lock", "gpt2.tiktoken", "smollm.json", "bert.txt")
    }


def rows(name, split):
    meta = json.loads((Path("data") / name / "meta.json").read_text())
    return np.fromfile(Path("data") / name / f"{split}.bin", np.uint16).reshape(-1, meta["row_len"]).tolist()


def tokenizer(name):
    folder = Path("data") / name
    return Tokenizer(json.loads((folder / "meta.json").read_text()), folder)


def windows(stream, width, begin, end):
    return [[begin, *stream[i : i + width], end] for i in range(0, len(stream) - width + 1, width)]


# ----- what the rows are


def test_openwebtext_is_one_stream_of_documents(project, monkeypatch, capsys):
    prepare(monkeypatch, "openwebtext", "--chunk=7")
    encode = tokenizer("openwebtext").encode
    for split, texts in (("train", project[:-9]), ("val", project[-9:])):
        want = windows([i for t in texts for i in [*encode(t), 50256]], 14, 50256, 50256)
        assert rows("openwebtext", split) == want and len(want) > 10
    first, out = made("openwebtext"), capsys.readouterr().out
    assert "from 40 documents" in out, out
    assert set(first) == {"train.bin", "val.bin", "meta.json"}
    Dataset("openwebtext")
    for flags in (
        ["--input=docs.txt"],
        ["--workers=2", "--chunk=3"],
        ["--input=docs.txt", "--workers=3", "--chunk=1"],
    ):
        prepare(monkeypatch, "openwebtext", *flags)
        assert made("openwebtext") == first, flags


def test_files_of_all_kinds_hold_the_same_documents(project, monkeypatch):
    prepare(monkeypatch, "openwebtext")
    first, lines = made("openwebtext"), Path("docs.jsonl").read_text().splitlines(keepends=True)
    Path("a.jsonl").write_text("".join(lines[:10]) + "\n")  # an empty line is no document
    with gzip.open("b.jsonl.gz", "wt") as f:
        f.writelines(lines[10:])
    prepare(monkeypatch, "openwebtext", "--input=*.jsonl.gz")
    assert made("openwebtext") != first
    prepare(monkeypatch, "openwebtext", "--input=a.jsonl,*.jsonl.gz")
    assert made("openwebtext") == first


def test_parquet(project, monkeypatch, slip):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    prepare(monkeypatch, "openwebtext")
    first = made("openwebtext")
    pq.write_table(pa.table({"id": range(40), "text": project}), "docs.parquet", row_group_size=11)
    prepare(monkeypatch, "openwebtext", "--input=docs.parquet", "--chunk=4", "--workers=2")
    assert made("openwebtext") == first
    whole = [texts for _, texts, _ in shards.read("docs.parquet", ["text"])]
    for skip in range(42):
        assert [texts for _, texts, _ in shards.read("docs.parquet", ["text"], skip)] == whole[skip:]
    pq.write_table(pa.table({"body": project}), "other.parquet")
    assert "other.parquet has no column 'text', only body" in slip(
        prepare, monkeypatch, "openwebtext", "--input=other.parquet"
    )
    pq.write_table(pa.table({"text": [*project[:4], None]}), "null.parquet")
    assert "null.parquet, row 5" in slip(
        prepare, monkeypatch, "openwebtext", "--input=null.parquet", "--val_docs=2"
    )
    Path("torn.parquet").write_bytes(Path("docs.parquet").read_bytes()[:-9])
    assert "torn.parquet" in slip(prepare, monkeypatch, "openwebtext", "--input=torn.parquet")
    lines = Path("news.txt").read_text().splitlines(keepends=True)
    Path("empty_lines.txt").write_text("".join(line + " \n" for line in lines))
    pq.write_table(pa.table({"text": [t for line in lines for t in (line, "")]}), "lines.parquet")
    texts = [
        [t for _, (t,), _ in shards.read(f, ["text"], 0, "one")] for f in ("empty_lines.txt", "lines.parquet")
    ]
    assert texts[0] == texts[1]


def test_lm1b_is_a_sentence_a_row(project, monkeypatch, capsys):
    module = prepare(monkeypatch, "lm1b", "--chunk=6")
    encode, lines = tokenizer("lm1b").encode, Path("news.txt").read_text().splitlines()
    want, n_cut = [], 0
    for line in lines:
        row = [101, *encode(module.detokenize(line)), 102]
        n_cut += len(row) > 32
        want.append((row if len(row) <= 32 else row[:31] + [102]) + [0] * (32 - len(row)))
    assert rows("lm1b", "train") == want == rows("lm1b", "val") and 0 < n_cut < len(lines)
    assert f", {2 * n_cut} too long and cut" in capsys.readouterr().out
    prepare(monkeypatch, "lm1b", "--packed", "--chunk=6")
    stream = [i for line in lines for i in [*encode(module.detokenize(line)), 102]]
    assert rows("lm1b", "train") == windows(stream, 30, 101, 102)


def test_lm1b_undoes_the_benchmarks_tokenization(project, monkeypatch):
    detokenize = prepare(monkeypatch, "lm1b").detokenize
    for text, was in (
        ("It 's a dog .", "It's a dog."),
        ('He said : " Go ! " , and left .', 'He said: "Go!", and left.'),
        ("See http : / / a.b ( or [ this ] ) ?", "See http://a.b (or [this])?"),
        ("It cost $ 5 ; \u00a3 6 and / or more !", "It cost $5; \u00a36 and/or more!"),
    ):
        assert detokenize(text) == was


def test_tinygsm_rows_hold_question_and_code(project, monkeypatch, capsys):
    module = prepare(monkeypatch, "tinygsm", "--chunk=9")
    # the first number that Vigna's splitmix64.c prints from seed 0
    assert module.splitmix64(0) == 0xE220A8397B1DCDAF
    encode, want, lens, dropped = (
        tokenizer("tinygsm").encode,
        {"train": [], "val": []},
        {"train": [], "val": []},
        0,
    )
    for i, line in enumerate(2 * Path("qa.jsonl").read_text().splitlines()):
        prompt = [0, *encode(json.loads(line)["question"]), *encode("\\n")]
        row = [*prompt, *encode(json.loads(line)["code"]), 0]
        dropped += len(row) > 128
        if len(row) <= 128:
            split = "val" if module.splitmix64(i) % 100 == 0 else "train"
            want[split].append(row + [0] * (128 - len(row)))
            lens[split].append(len(prompt))
    assert 0 < dropped < 80 and want["val"], f"{dropped} dropped, {len(want['val'])} for validation"
    for split in want:
        assert rows("tinygsm", split) == want[split]
        assert np.fromfile(f"data/tinygsm/{split}.prompts.bin", np.uint16).tolist() == lens[split]
    assert f", {dropped} too long and dropped" in capsys.readouterr().out
    data = Dataset("tinygsm")
    assert data.meta["prompt_end"] == "\\n" and data.tokenizer.prompt("the cat") == [
        0,
        *encode("the cat"),
        *encode("\\n"),
    ]
    x0, given, real = data.windows("train", [0, 1])
    answer = real & ~given
    assert answer.sum(1).tolist() == [128 - n for n in lens["train"][:2]]  # the padding is learned


def test_gsm8k_keeps_its_test_problems(project, monkeypatch, slip):
    prepare(monkeypatch, "gsm8k", "--eval_only")
    assert made("gsm8k") == {"test.jsonl": Path("qa.jsonl").read_bytes()}
    prepare(monkeypatch, "gsm8k")
    assert rows("gsm8k", "train") == rows("gsm8k", "val")
    Path("bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    assert "bad.jsonl, line 2 has no text named 'answer'" in slip(
        prepare, monkeypatch, "gsm8k", "--val_input=bad.jsonl", "--eval_only"
    )
    assert made("gsm8k")["test.jsonl"] == Path("qa.jsonl").read_bytes()


def test_wikitext_is_one_document(project, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 40)
    lines = Path("news.txt").read_text().splitlines()
    text = "".join(f" {line} \n \n" for line in lines)
    Path("wiki.txt").write_text(text)
    for flag in ("true", "false"):
        module = prepare(
            monkeypatch,
            "wikitext",
            "--input=wiki.txt",
            "--val_input=wiki.txt",
            "--chunk=3",
            f"--detokenize={flag}",
        )
        want = module.encode(tokenizer("wikitext"), text, flag == "true")
        assert rows("wikitext", "val") == windows(want, 14, 50256, 50256)
    text = " \n = = The dogs ' ball = = \n \n It 's 1 @,@ 000 @-@ \" odd \" , ( or [ so ] ) . Why ? \n 5 \u00b0 C ! \n"
    was = "\n == The dogs' ball ==\n\n It's 1,000-\"odd\", (or [so]). Why?\n 5\u00b0C!\n"
    assert module.encode(type("Same", (), {"encode": str}), text, True) == was


def test_pieces_have_the_tokens_of_the_whole(project, monkeypatch):
    """
    The pattern looks ahead from white space; wherever a document is cut, no token may notice. 3,000 random
    texts, all cuts.
    """
    monkeypatch.setattr(shards, "PIECE", 5)
    Path("t").mkdir()
    shutil.copy("tiny.tiktoken", "t/gpt2.tiktoken")
    shutil.copy("tiny.json", "t/smollm.json")
    rng, n = random.Random(1), 0
    for kind in ("gpt2", "smollm"):
        encode = Tokenizer({"tokenizer": kind}, "t").encode
        for _ in range(1500):
            text = "".join(
                rng.choices(
                    [
                        "\n",
                        "\n\n",
                        " ",
                        "  ",
                        "\t",
                        "a",
                        "at",
                        "1",
                        ".",
                        "'s",
                        "\u00a0",
                        "\x1c",
                        "\x85",
                        "\r\n",
                    ],
                    k=30,
                )
            )
            cut = list(shards.pieces(enumerate(re.findall(r"[^\n]*\n|[^\n]+", text))))
            parts = [t for _, (t,), _ in cut]
            assert "".join(parts) == text and sum((encode(p) for p in parts), []) == encode(text), (
                text,
                parts,
            )
            assert [is_end for *_, is_end in cut] == [False] * (len(cut) - 1) + [True], (text, parts)
            n += len(parts) - 1
    assert n > 5000, f"only {n} cuts"


# ----- kills


class Killed(BaseException):
    pass


def kill_at(monkeypatch, k):
    """
    From the k-th step to the disk on, nothing happens any more. Returns a list of the steps that came before.
    """
    steps = []
    for module, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):

        def step(*args, real=getattr(module, name), name=name, **kwargs):  # noqa: B008, the function as it is now
            steps.append(name)
            if len(steps) > k:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, step)
    return steps


@pytest.mark.parametrize("name, other", [("openwebtext", ["--seq_len=20"]), ("tinygsm", ["--sep=x"])])
def test_a_kill_between_any_two_steps(project, monkeypatch, capsys, name, other):
    """
    Before every write that reaches the disk, every rename and deletion: what is left is old or new or no
    dataset, and it goes on.
    """
    prepare(monkeypatch, name, "--chunk=15")
    new, folder = made(name), Path("data") / name
    prepare(monkeypatch, name, *other)
    old = made(name)
    assert old != new
    for k in range(1000):
        for file in set(made(name)):
            (folder / file).unlink()
        for file, data in old.items():
            (folder / file).write_bytes(data)
        with monkeypatch.context() as patch:
            steps = kill_at(patch, k)
            try:
                prepare(patch, name, "--chunk=15")
                break
            except Killed:
                pass
        left = made(name)
        if "meta.json" in left:
            now = {f: d for f, d in left.items() if f in old}
            assert now in (old, new), f"a mixture after {k} steps, before {steps[-1]}"
        if "progress.json" in left and not json.loads(left["progress.json"])["finished"]:
            for file in folder.glob("*.part"):  # what a kill in the middle of a write may leave
                file.write_bytes(file.read_bytes() + b"abc")
            (folder / "progress.json.tmp").write_text("{")
        capsys.readouterr()
        prepare(monkeypatch, name, "--chunk=4")
        assert ("going on behind" in capsys.readouterr().out) == ("progress.json" in left), (
            f"after {k} steps, before {steps[-1]}"
        )
        assert {f: d for f, d in made(name).items() if not f.endswith(".tmp")} == new, (
            f"after {k} steps, before {steps[-1]}"
        )
    assert k > 25 and made(name) == new, f"{k} steps"


def test_a_kill_then_other_settings(project, monkeypatch, capsys):
    """
    A run is broken off, another one with other settings too: nothing of the one is in what the other makes
    when it is taken up again.
    """
    want = {}
    for flags in ("--seq_len=16", "--seq_len=20"):
        prepare(monkeypatch, "openwebtext", flags)
        want[flags] = made("openwebtext")

    def broken_off(k, *flags):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at(patch, k)
            prepare(patch, "openwebtext", *flags)

    for k in range(25):
        for last in want:
            broken_off(12, "--seq_len=16", "--chunk=5")
            capsys.readouterr()
            broken_off(k, "--seq_len=20", "--chunk=30")  # more at once than the first run wrote
            assert "beginning anew" in capsys.readouterr().out
            prepare(monkeypatch, "openwebtext", last)
            assert made("openwebtext") == want[last], f"{last}, after {k} steps"


def test_sigkill(project, monkeypatch):
    """A process with two workers, killed with SIGKILL, then with one, and no worker outlives it."""
    with open("docs.jsonl", "a") as f:
        f.writelines(Path("docs.jsonl").read_text().splitlines(keepends=True) * 44)
    prepare(monkeypatch, "openwebtext")
    want, rng, kills = made("openwebtext"), random.Random(2), 0
    for file in want:
        (Path("data/openwebtext") / file).unlink()
    command = [sys.executable, "data/openwebtext/prepare.py", *FLAGS["openwebtext"], "--chunk=3"]
    for workers in (2, 1):
        p = subprocess.Popen(
            [*command, f"--workers={workers}"], stdout=subprocess.DEVNULL, start_new_session=True
        )
        progress, start = Path("data/openwebtext/progress.json"), time.time()
        before = progress.read_bytes() if progress.exists() else None
        while (
            p.poll() is None
            and time.time() < start + 30
            and (not progress.exists() or progress.read_bytes() == before)
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        p.send_signal(signal.SIGKILL)
        kills += p.wait() == -signal.SIGKILL
        for _ in range(50):
            try:
                os.killpg(p.pid, 0)
                time.sleep(0.1)
            except ProcessLookupError:
                break
        else:
            os.killpg(p.pid, signal.SIGKILL)
            raise AssertionError("a worker outlived its parent")
    out = subprocess.run([*command, "--workers=2", "--chunk=1000"], capture_output=True, text=True)
    assert kills == 2 and "going on behind document" in out.stdout and made("openwebtext") == want, out.stderr


# ----- slips


def test_slips(project, monkeypatch, slip):
    said = lambda name, *flags: slip(prepare, monkeypatch, name, *flags)
    assert "nothing.txt not found" in said("openwebtext", "--input=nothing.txt")
    assert "tiny.json is none of" in said("openwebtext", "--input=tiny.json")
    assert "40 documents, 40 of them" in said("openwebtext", "--val_docs=40")
    Path("one.txt").write_text("a b c\n")
    assert "1 document: one is needed for training and one" in said("openwebtext", "--input=one.txt")
    assert "--eval_only --val_input qa.jsonl" in said("gsm8k", "--eval_only", "--val_input=")
    assert "a .tiktoken file of GPT-2 will not do" in said("tinygsm", "--bpe=tiny.tiktoken")
    assert "val.bin would be without a row" in said("openwebtext", "--val_docs=1", "--seq_len=600")
    assert "none.tiktoken not found" in said("openwebtext", "--bpe=none.tiktoken")
    Path("long.txt").write_text(
        Path("tiny.txt").read_text() + "".join(f"x{i}\n" for i in range(31000)) + "mat\n"
    )
    assert "vocab_size is 30522" in said("lm1b", "--bpe=long.txt")
    assert "plain text, without columns question" in said("tinygsm", "--input=docs.txt")
    assert "--input news.txt --val_input news.txt" in said("wikitext", "--val_input=")
    assert "workers 0" in said("openwebtext", "--workers=-1")
    lines = Path("docs.jsonl").read_text().splitlines()
    for workers in ("--workers=1", "--workers=2"):
        for bad, why in (
            ("{", "is not JSON"),
            ("[1]", "has no text named 'text'"),
            ('{"text": 3}', "has no text named 'text'"),
        ):
            Path("bad.jsonl").write_text("\n".join([*lines[:17], bad, *lines[18:]]))
            assert f"bad.jsonl, line 18 {why}" in said(
                "openwebtext", "--input=bad.jsonl", "--chunk=5", workers
            )
        Path("bad.jsonl").write_bytes(b'{"text": "caf\xe9"}\n' * 40)
        assert "bad.jsonl, line 1 is not JSON in UTF-8" in said("openwebtext", "--input=bad.jsonl", workers)
    Path("bad.txt").write_bytes(b"a\ncaf\xe9\n")
    assert "bad.txt, line 2 is not UTF-8" in said("openwebtext", "--input=bad.txt")
    Path("torn.jsonl.gz").write_bytes(gzip.compress(Path("docs.jsonl").read_bytes())[:-20])
    assert "cannot read torn.jsonl.gz" in said("openwebtext", "--input=torn.jsonl.gz")
    Path("x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    assert "pip install pyarrow" in said("openwebtext", "--input=x.parquet")


def test_a_full_disk(project, monkeypatch, slip):
    prepare(monkeypatch, "openwebtext")
    want, full = made("openwebtext"), []

    def fsync(descriptor, real=os.fsync):
        full.append(descriptor)
        if len(full) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert "No space left on device" in slip(prepare, patch, "openwebtext", "--chunk=4")
    assert {k: v for k, v in made("openwebtext").items() if k in want} == want, "the old files were touched"
    prepare(monkeypatch, "openwebtext")
    assert made("openwebtext") == want
