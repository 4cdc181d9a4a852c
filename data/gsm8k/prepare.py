"""
GSM8K, the benchmark: 7,473 + 1,319 grade-school problems with answers in words. Keeps test.jsonl here for
python -m lab.gsm8k, and makes rows as TinyGSM's of questions and answers, in SmolLM's byte pairs, the test
problems as validation.

    python data/gsm8k/prepare.py [--input train.jsonl --val_input test.jsonl] [--bpe tokenizer.json]
    without them, downloads 5 MB
    python data/gsm8k/prepare.py --eval_only
    test.jsonl alone
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import build, questions_and_answers
from data.shards import Bad, inputs, read, texts_of
from hub.download import fetch
from run.cli import die, load_config

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
COLUMNS = ["question", "answer"]


@dataclass
class Gsm8kConfig:
    input: str = ""  # a local train.jsonl, lines {"question": ..., "answer": ...}; empty: download
    val_input: str = ""  # a local test.jsonl
    eval_only: bool = False  # keep test.jsonl and no more: that needs no tokenizer
    bpe: str = ""  # a local tokenizer.json of SmolLM-135M; kept beside the data. Empty: download
    seq_len: int = 512  # tokens of a row
    sep: str = r"\n"  # between question and answer, as in data/tinygsm: two characters, backslash and n
    workers: int = 1  # processes that tokenize; 0: one a core
    chunk: int = 2000  # rows between two commits to the disk


def keep(name, path):
    """A copy of the problems, if every line is one."""
    try:
        n = sum(len(texts_of(name, where, line, COLUMNS)) > 0 for where, line, _ in read(name, COLUMNS))
    except Bad as e:
        die(*e.args)
    try:
        shutil.copyfile(fetch(name) if "://" in name else name, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        die(f"cannot write {path}: {e.strerror}", "make room, then the same command")
    print(f"gsm8k: {n:,} problems in {os.path.relpath(path)}")


def main():
    cfg, folder = load_config(Gsm8kConfig, sys.argv[1:]), Path(__file__).parent
    if cfg.eval_only and cfg.input and not cfg.val_input:
        fix = f"--eval_only --val_input {cfg.input}"
        die("--eval_only keeps the test problems alone, and --input names the others", fix)
    if not cfg.eval_only and bool(cfg.input) != bool(cfg.val_input):
        die(
            "local files are needed for both splits, or for none",
            "--input train.jsonl --val_input test.jsonl",
        )
    test = inputs(cfg.val_input, "--val_input") if cfg.val_input else [f"{URL}/test.jsonl"]
    if len(test) > 1 or not test[0].endswith(".jsonl"):
        die(f"{cfg.val_input} is not one .jsonl file", "--val_input test.jsonl")
    keep(test[0], folder / "test.jsonl")
    if cfg.eval_only:
        return
    shards = [("train", name) for name in (inputs(cfg.input) if cfg.input else [f"{URL}/train.jsonl"])] + [
        ("val", test[0])
    ]
    meta, encode, form = questions_and_answers(cfg.seq_len, cfg.sep)
    build(cfg, folder, meta, shards, COLUMNS, encode, form)


if __name__ == "__main__":
    main()
