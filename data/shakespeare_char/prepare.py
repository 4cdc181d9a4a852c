"""
Tiny Shakespeare, character by character: 65 characters, 90 % for training, as in nanoGPT.

    python data/shakespeare_char/prepare.py [--input FILE]     downloads 1.1 MB without --input; any UTF-8
                                                               text will do
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import text_file, write_dataset
from run.cli import die, load_config

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass
class CharConfig:
    input: str = ""  # a local text file; empty: download


def main():
    cfg, start, folder = load_config(CharConfig, sys.argv[1:]), time.time(), Path(__file__).parent
    text = text_file(cfg.input, URL, folder)
    if len(text) < 10:
        die(f"{cfg.input} holds {len(text)} characters", "--input FILE, a longer text")
    chars = sorted(set(text))
    ids = {c: i for i, c in enumerate(chars)}
    tokens, n = [ids[c] for c in text], int(0.9 * len(text))
    write_dataset(
        folder,
        tokens[:n],
        tokens[n:],
        {"vocab_size": len(chars), "tokenizer": "char", "chars": "".join(chars)},
    )
    print(
        f"shakespeare_char: {len(text) / 1e6:.1f} MB, "
        f"{len(tokens):,} tokens of {len(chars)} characters, {time.time() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
