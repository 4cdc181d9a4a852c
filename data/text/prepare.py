"""
A text file in the tokens of a .gguf file, to measure a language model's perplexity on. Rows of seq_len
tokens; the first of each is given, and is the last of the row before it.

    python data/text/prepare.py --input FILE.txt --bpe MODEL.gguf
    python eval.py --init_from gguf:MODEL.gguf --dataset text --n_eval 4
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import write_dataset
from data.tokens import Tokenizer
from hub import gguf
from run.cli import die, load_config


@dataclass
class TextConfig:
    input: str = ""  # a text file in UTF-8
    bpe: str = ""  # a .gguf file with SmolLM's tokens
    seq_len: int = 1024  # tokens of a row


def main():
    cfg, folder = load_config(TextConfig, sys.argv[1:]), Path(__file__).parent
    for path in (cfg.input, cfg.bpe):
        if not Path(path).is_file():
            die(f"{path or 'a file'} not found", "--input FILE.txt --bpe MODEL.gguf")
    file = str(Path(cfg.bpe).absolute())
    n_ids = len(gguf.read(file)[0].get("tokenizer.ggml.tokens", ()))
    meta = {"vocab_size": n_ids, "tokenizer": "smollm", "file": file, "row_len": cfg.seq_len, "prompt_len": 1}
    ids = Tokenizer(meta, folder).encode(Path(cfg.input).read_text(encoding="utf-8"))
    starts = range(0, len(ids) - cfg.seq_len + 1, cfg.seq_len - 1) if cfg.seq_len > 1 else ()
    if not starts:
        die(f"{cfg.input} has {len(ids)} tokens, a row of {cfg.seq_len} does not fit", "--seq_len 64")
    rows = [i for start in starts for i in ids[start : start + cfg.seq_len]]
    write_dataset(folder, rows, rows, meta)  # it is for measuring: both splits are the whole
    print(f"text: {len(starts)} rows of {cfg.seq_len} tokens")


if __name__ == "__main__":
    main()
