r"""
WikiText in GPT-2's byte pairs, for zero-shot evaluation. The text of a split is one document without an EOS
inside, cut into rows [BOS] + 1022 tokens + [EOS], both 50256, as Duo's public scripts have it for zero-shot
numbers (insert_valid_eos=False), but that they lose what remains of every 1000 lines. The corpus's own
tokenization, " @-@ ", " , " and the like, is undone first by their rules (wt_detokenizer); --detokenize=false
leaves it.

    python data/wikitext/prepare.py [--version 2] [--split test]
    python data/wikitext/prepare.py --input wiki.train.raw.txt --val_input FILE.txt

The first downloads, version 103 without the flag. The second wants both files; if only val.bin matters, name
one file twice.
"""

import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import Stream, build
from data.shards import inputs
from hub.download import listing
from run.cli import die, load_config

END = r"( |(?=\n|\Z))"  # a space, or the end of a line
SPACES = [  # (what the corpus did, what was there before), in this order, a line at a time
    (r"s '", "s'"),
    (rf" @([-,.])@{END}", r"\1"),
    *[(rf" ([{mark}]){END}", r"\1\2") for mark in ":;.!?,"],
    (r"\([^\S\n]*([^)\n]*?)[^\S\n]*\)", r"(\1)"),
    (r"\[[^\S\n]*([^]\n]*?)[^\S\n]*\]", r"[\1]"),
    (r"{[^\S\n]*([^}\n]*?)[^\S\n]*}", r"{\1}"),
    (r'"[^\S\n]*([^"\n]*?)[^\S\n]*"', r'"\1"'),
    (r"'[^\S\n]*([^'\n]*?)[^\S\n]*'", r"'\1'"),
    *[(" ".join("=" * n), "=" * n) for n in (4, 3, 2)],  # headings
    (rf" °{END}", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (rf" N{END}", r" 1\1"),
    (r" 's", "'s"),
]


@dataclass
class WikiTextConfig:
    version: int = 103  # or 2, the small one: which to download
    split: str = "validation"  # or test: which becomes val.bin
    input: str = ""  # a local .txt of the training split, together with --val_input. Empty: download
    val_input: str = ""  # a local .txt of the split that becomes val.bin
    detokenize: bool = True  # undo the corpus's tokenization
    # a local file of GPT-2 ranks, "base64 rank" a line; kept beside the data. Empty: tiktoken downloads them
    bpe: str = ""
    seq_len: int = 1024  # tokens of a row, BOS and EOS included
    workers: int = 0  # processes that tokenize; 0: one a core
    chunk: int = 100  # pieces of 64k characters between two commits to the disk


def undone(line):
    for pattern, as_before in SPACES:
        line = re.sub(pattern, as_before, line)
    return line


def encode(tokenizer, text, detokenize):
    if detokenize:
        text = "".join(map(undone, re.findall(r"[^\n]*\n|[^\n]+", text)))
    return tokenizer.encode(text)


def main():
    cfg = load_config(WikiTextConfig, sys.argv[1:])
    if cfg.version not in (2, 103) or cfg.split not in ("validation", "test"):
        die("version is 2 or 103, split validation or test", "--version=2 --split=test")
    if bool(cfg.input) != bool(cfg.val_input):
        fix = f"--input {cfg.input or cfg.val_input} --val_input {cfg.val_input or cfg.input}, or two files"
        die("local files are needed for both splits, or for none", fix)
    if cfg.input:
        shards = [("train", name) for name in inputs(cfg.input)] + [
            ("val", name) for name in inputs(cfg.val_input, "--val_input")
        ]
    else:
        urls = listing("Salesforce/wikitext", f"wikitext-{cfg.version}-raw-v1")
        kinds = (("train", "train-"), ("val", f"{cfg.split}-"))
        shards = [
            (split, url) for split, begin in kinds for url in urls if url.rsplit("/", 1)[1].startswith(begin)
        ]
    meta = {"vocab_size": 50257, "tokenizer": "gpt2", "bos_id": 50256, "row_len": cfg.seq_len}
    form = Stream(bos=50256, eos=50256, after_document=False)
    build(
        cfg,
        Path(__file__).parent,
        meta,
        shards,
        ["text"],
        partial(encode, detokenize=cfg.detokenize),
        form,
        layout="one",
    )


if __name__ == "__main__":
    main()
