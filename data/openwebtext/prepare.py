"""
OpenWebText in GPT-2's byte pairs: 8 million web pages, 9 billion tokens. EOS (50256) follows each document,
and the stream is cut into rows [BOS] + 1022 tokens + [EOS], both 50256. The last documents are for
validation. The published runs cut every 1000 documents by themselves and drop what remains of them; here the
remainder goes on into the next document's row.

    python data/openwebtext/prepare.py [--input 'FOLDER/*.parquet'] [--bpe gpt2.tiktoken]

Without them, downloads. Killed and started again, it goes on where it stopped. A local .txt has lines
<|endoftext|> between its documents.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import Stream, build
from data.shards import count, inputs
from data.tokens import Tokenizer
from hub.download import listing
from run.cli import die, load_config

N_DOCUMENTS = 8_013_769  # of Skylion007/openwebtext


@dataclass
class OpenWebTextConfig:
    # local .txt, .jsonl, .jsonl.gz or .parquet files with a column "text": paths or globs, commas between.
    # Empty: download
    input: str = ""
    # a local file of GPT-2 ranks, "base64 rank" a line; kept beside the data. Empty: tiktoken downloads them
    bpe: str = ""
    seq_len: int = 1024  # tokens of a row, BOS and EOS included
    val_docs: int = 100_000  # so many of the last documents are for validation
    workers: int = 0  # processes that tokenize; 0: one a core
    chunk: int = 1000  # documents between two commits to the disk


def main():
    cfg = load_config(OpenWebTextConfig, sys.argv[1:])
    names = inputs(cfg.input) if cfg.input else listing("Skylion007/openwebtext", "plain_text")
    n = count(names, ["text"]) if cfg.input else N_DOCUMENTS
    if n < 2:
        fix = "lines <|endoftext|> between the documents of a .txt, or more files in --input"
        die(f"{n} document: one is needed for training and one for validation", fix)
    if not 0 < cfg.val_docs < n:
        die(
            f"{n:,} documents, {cfg.val_docs:,} of them for validation, leave none for one of the two",
            f"--val_docs={max(1, n // 100)}",
        )
    meta = {"vocab_size": 50257, "tokenizer": "gpt2", "bos_id": 50256, "row_len": cfg.seq_len}
    split_of = lambda i: "val" if i >= n - cfg.val_docs else "train"
    shards = [(None, name) for name in names]
    build(
        cfg,
        Path(__file__).parent,
        meta,
        shards,
        ["text"],
        Tokenizer.encode,
        Stream(bos=50256, eos=50256),
        split_of,
        n,
    )


if __name__ == "__main__":
    main()
