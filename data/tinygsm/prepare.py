"""
TinyGSM in SmolLM's byte pairs: 12 million grade-school problems, each solved by a Python function. A row is

    [BOS] question separator code [EOS]

filled up with EOS (like BOS, id 0) to 512 tokens, and all behind the prompt carries loss, so that a model
learns to end. Longer rows are dropped, and counted. One row in a hundred is for validation: those whose
number has a hash that 100 divides, so nothing is shuffled.

    python data/tinygsm/prepare.py [--input 'FOLDER/*.parquet'] [--bpe tokenizer.json]

Without them, downloads. Killed and started again, it goes on where it stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import build, questions_and_answers
from data.shards import inputs
from hub.download import listing
from run.cli import load_config


@dataclass
class TinyGsmConfig:
    # local .jsonl, .jsonl.gz or .parquet files with columns "question" and "code", commas between. Empty:
    # download
    input: str = ""
    bpe: str = ""  # a local tokenizer.json of SmolLM-135M; kept beside the data. Empty: download
    seq_len: int = 512  # tokens of a row
    # two characters, backslash and n: the published models' config quotes it so that it is no line break
    sep: str = r"\n"
    workers: int = 0  # processes that tokenize; 0: one a core
    chunk: int = 2000  # rows between two commits to the disk


def splitmix64(i):
    """A hash of 64 bits: the first number of Vigna's generator with seed i."""
    z = (i + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def split_of(i):
    return "train" if splitmix64(i) % 100 else "val"


def main():
    cfg = load_config(TinyGsmConfig, sys.argv[1:])
    shards = [
        (None, name) for name in (inputs(cfg.input) if cfg.input else listing("TinyGSM/TinyGSM", "data"))
    ]
    meta, encode, form = questions_and_answers(cfg.seq_len, cfg.sep)
    build(cfg, Path(__file__).parent, meta, shards, ["question", "code"], encode, form, split_of)


if __name__ == "__main__":
    main()
