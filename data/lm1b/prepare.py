"""
The One Billion Word benchmark in BERT's word pieces: 30 million sentences of the news, shuffled. A row is a
sentence, [CLS] tokens [SEP], cut to 128 with [SEP] kept, filled up with [PAD]; with --packed, [SEP] follows
each sentence, and a row is [CLS] + 126 tokens of that stream + [SEP]. Validation is the benchmark's test
split. The benchmark's spaces around punctuation are undone, by the rules of MDLM's public code
(lm1b_detokenizer).

    python data/lm1b/prepare.py [--input FILES --val_input FILES] [--bpe vocab.txt]

Without them, downloads. Killed and started again, it goes on where it stopped. A local .txt has a sentence a
line.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import Rows, Stream, build
from data.shards import inputs
from hub.download import listing
from run.cli import die, load_config

CLS, SEP, PAD = 101, 102, 0
SPACES = [  # (what the benchmark did, what was there before), in this order
    (r"(https?) : / / ", r"\1://"),
    (r" '(\w+)", r"'\1"),  # it 's
    (r" (\w+) \.( |$)", r" \1.\2"),
    *[(rf" ([{mark}])( |$)", r"\1\2") for mark in "?!"],
    *[(f" {mark} ", f"{mark} ") for mark in ",:;"],
    (r" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"([$£]) ", r"\1"),
]


@dataclass
class Lm1bConfig:
    # local files of the training split with a column "text": paths or globs, commas between. Empty: download
    input: str = ""
    val_input: str = ""  # and those of the test split
    bpe: str = ""  # a local vocab.txt of bert-base-uncased; kept beside the data. Empty: download
    seq_len: int = 128  # tokens of a row
    packed: bool = False  # rows are windows of one stream, not sentences
    workers: int = 0  # processes that tokenize; 0: one a core
    chunk: int = 5000  # sentences between two commits to the disk


def detokenize(text):
    for pattern, as_before in SPACES:
        text = re.sub(pattern, as_before, text)
    return text


def sentence(tokenizer, text):
    return [CLS], [*tokenizer.encode(detokenize(text)), SEP]


def part_of_stream(tokenizer, text):
    return tokenizer.encode(detokenize(text))


def main():
    cfg = load_config(Lm1bConfig, sys.argv[1:])
    if bool(cfg.input) != bool(cfg.val_input):
        die("local files are needed for both splits, or for none", "--input FILES --val_input FILES")
    hub = lambda split: listing(
        "billion-word-benchmark/lm1b", f"plain_text/{split}", revision="refs/convert/parquet"
    )
    shards = [("train", name) for name in (inputs(cfg.input) if cfg.input else hub("train"))]
    shards += [("val", name) for name in (inputs(cfg.val_input, "--val_input") if cfg.input else hub("test"))]
    meta = {"vocab_size": 30522, "tokenizer": "bert", "bos_id": CLS, "row_len": cfg.seq_len}
    encode, form = (part_of_stream, Stream(CLS, SEP)) if cfg.packed else (sentence, Rows(PAD, cut=True))
    meta |= {} if cfg.packed else {"eos_id": SEP, "pad_id": PAD}
    build(cfg, Path(__file__).parent, meta, shards, ["text"], encode, form, layout="lines")


if __name__ == "__main__":
    main()
