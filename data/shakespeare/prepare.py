"""
Tiny Shakespeare in GPT-2's byte pairs: 50257 ids, 90 % for training, as in nanoGPT.

    python data/shakespeare/prepare.py [--input FILE] [--bpe gpt2.tiktoken]

Without them, downloads 1.1 MB and 1.6 MB.
"""

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import text_file, write_dataset
from data.tokens import gpt2
from run.cli import die, load_config

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass
class BpeConfig:
    input: str = ""  # a local text file; empty: download
    # a local file of GPT-2 ranks, "base64 rank" a line; kept beside the data. Empty: tiktoken downloads them
    bpe: str = ""


def main():
    cfg, start, folder = load_config(BpeConfig, sys.argv[1:]), time.time(), Path(__file__).parent
    kept = folder / "gpt2.tiktoken"
    if cfg.bpe and Path(cfg.bpe).resolve() != kept.resolve():
        if not Path(cfg.bpe).is_file():
            die(f"{cfg.bpe} not found", "--bpe FILE, a .tiktoken file of GPT-2's byte pairs")
        gpt2(cfg.bpe)  # complains before a good file is replaced
        shutil.copyfile(cfg.bpe, kept)
    text, bpe = text_file(cfg.input, URL, folder), gpt2(kept)
    n = int(0.9 * len(text))
    train, val = bpe.encode_ordinary(text[:n]), bpe.encode_ordinary(text[n:])
    write_dataset(folder, train, val, {"vocab_size": 50257, "tokenizer": "gpt2", "eos_id": 50256})
    print(
        f"shakespeare: {len(text) / 1e6:.1f} MB, "
        f"{len(train):,} + {len(val):,} tokens, {time.time() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
