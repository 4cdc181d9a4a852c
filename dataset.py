"""
What is the data? A folder data/NAME with nanoGPT's train.bin and val.bin (flat uint16 ids, uint32 where the vocabulary needs
it) and a meta.json. The least that meta.json may say is {"vocab_size": 50257, "tokenizer": "gpt2"}. All its keys:

    vocab_size   number of ids
    tokenizer    "char" (with "chars": every character in id order), "gpt2", or "none" (ids are shown as numbers)
    eos_id       generation of a row ends here
    row_len      the file is rows of this length, not one stream; windows are then whole rows
    prompt_len   of a row, so many first tokens are the prompt: no loss on them
    separator    or: the prompt ends with the first such id
    width        break a sample into lines of so many characters when showing it
"""

import base64
import json
import os
import shutil
import urllib.request
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from settings import die

KEYS = {"vocab_size", "tokenizer", "chars", "eos_id", "row_len", "prompt_len", "separator", "width"}
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer:
    """Text to ids and back, by meta["tokenizer"]. folder: where a local gpt2.tiktoken may lie. Exits if GPT-2's pairs cannot be had."""

    def __init__(self, meta, folder):
        self.kind, self.chars = meta["tokenizer"], meta.get("chars")
        self.ids = {c: i for i, c in enumerate(self.chars)} if self.kind == "char" else None
        self.bpe = gpt2(Path(folder) / "gpt2.tiktoken") if self.kind == "gpt2" else None

    def encode(self, text):
        if self.kind == "char":
            unknown = sorted(set(text) - set(self.ids))
            if unknown:
                die(f"character {unknown[0]!r} is not in the vocabulary", f"use only {''.join(self.chars)!r}")
            return [self.ids[c] for c in text]
        if self.kind == "gpt2":
            return self.bpe.encode_ordinary(text)
        if not all(w.isdigit() for w in text.split()):
            die("this dataset has no tokenizer: a prompt is a list of ids", "--prompt '17 4 256'")
        return [int(w) for w in text.split()]

    def decode(self, ids):
        if self.kind == "char":
            return "".join(self.chars[i] if i < len(self.chars) else "_" for i in ids)
        if self.kind == "gpt2":
            return self.bpe.decode([i for i in ids if i < self.bpe.n_vocab])
        return " ".join(map(str, ids))

    def n_bytes(self, vocab_size):
        """How many bytes of UTF-8 each id stands for, (vocab_size,) float64: 0 for what is no text. None without a tokenizer."""
        if self.kind == "none":
            return None
        if self.kind == "char":
            sizes = [len(c.encode()) for c in self.chars]
        else:
            special = {self.bpe.encode_single_token(s) for s in self.bpe.special_tokens_set}
            sizes = [0 if i in special else len(self.bpe.decode_single_token_bytes(i)) for i in range(min(vocab_size, self.bpe.n_vocab))]
        return torch.tensor(sizes + [0] * (vocab_size - len(sizes)), dtype=torch.float64)


def gpt2(path):
    """GPT-2's byte pair encoding, from the .tiktoken file `path` if it is there, else through tiktoken's download."""
    import tiktoken

    try:
        if not Path(path).exists():
            return tiktoken.get_encoding("gpt2")
        lines = Path(path).read_bytes().splitlines()  # not tiktoken's loader: it caches local files by name, stale ones too
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        return tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}, explicit_n_vocab=50257
        )
    except Exception as e:  # a refused download and a broken file have many names
        die(
            f"no GPT-2 byte pairs: {type(e).__name__}: {str(e)[:120]}",
            f"get a gpt2.tiktoken file and run prepare.py --bpe FILE, or copy it to {path}",
        )


class Dataset:
    """The train and val splits of data/NAME, cut into windows of seq_len tokens (0: the row length)."""

    def __init__(self, name, seq_len=0, root="data"):
        self.folder = Path(root) / name
        fix = f"python {root}/{name}/prepare.py" if os.path.exists(self.folder / "prepare.py") else "ls data/"
        if not os.path.exists(self.folder / "meta.json"):
            die(f"{self.folder / 'meta.json'} not found", fix)
        self.meta = read_meta(self.folder / "meta.json")
        row_len = self.meta.get("row_len", 0)
        if row_len and seq_len not in (0, row_len):
            die(f"{name} has rows of {row_len} tokens, seq_len is {seq_len}", f"--seq_len={row_len}")
        if not row_len and seq_len < 1:
            die(f"{name} is one stream: how long is a window?", "--seq_len=256")
        self.row_len, self.seq_len = row_len, seq_len or row_len
        self.tokens = {split: self.open(split, fix) for split in ("train", "val")}

    @cached_property
    def tokenizer(self):
        return Tokenizer(self.meta, self.folder)  # only when text is asked for: training needs none

    def open(self, split, fix):
        path = self.folder / f"{split}.bin"
        if not path.exists():
            die(f"{path} not found", fix)
        dtype = np.dtype(np.uint16 if self.meta["vocab_size"] <= 1 << 16 else np.uint32)
        try:
            n, extra = divmod(path.stat().st_size, dtype.itemsize)
            if extra or n < self.seq_len or (self.row_len and n % self.row_len):
                bad = f"{path.stat().st_size} bytes are not {dtype} tokens in windows of {self.seq_len}"
                die(f"{path}: {bad}", f"{fix}, or a smaller --seq_len")
            tokens = np.memmap(path, dtype=dtype, mode="r")
        except (OSError, ValueError) as e:
            die(f"cannot read {path}: {e}", fix)
        step = max(1, (1 << 24) // (self.row_len or 1)) * (self.row_len or 1)  # whole rows
        # all of it, now: an id outside of the vocabulary would end a run on its third day
        for start in tqdm(range(0, n, step), desc=f"reading {path}", delay=2, leave=False, disable=None):
            part = tokens[start : start + step]
            if part.max() >= self.meta["vocab_size"]:
                die(f"{path} holds id {part.max()}, meta.json says vocab_size {self.meta['vocab_size']}", fix)
            if "separator" in self.meta:
                found, row = part.reshape(-1, self.row_len) == self.meta["separator"], start // self.row_len
                if not found.any(1).all():
                    row += int(found.any(1).argmin())
                    die(f"{path}: row {row} is without the separator {self.meta['separator']}", f"check {self.folder}/meta.json")
                if (prompt := found.argmax(1)).max() == self.row_len - 1:
                    row += int(prompt.argmax())
                    die(f"{path}: row {row} ends with its prompt, nothing is left to learn", f"check {self.folder}/meta.json")
        return tokens

    def same_as(self, meta):
        """Exit unless a checkpoint's meta is this folder's: other characters under the same ids would be nonsense."""
        for key in sorted(set(meta) | set(self.meta)):
            if meta.get(key) != self.meta.get(key):
                die(
                    f"{self.folder / 'meta.json'}: {key} is not what the checkpoint was trained with",
                    f"python {self.folder}/prepare.py as then",
                )

    def n_windows(self, split):
        n = len(self.tokens[split])
        return n // self.row_len if self.row_len else n - self.seq_len + 1

    def windows(self, split, index):
        """index: integers (B,) below n_windows -> x0 (B, T) int64 and answer (B, T) bool: the tokens that carry loss."""
        starts = [int(i) * (self.row_len or 1) for i in index]
        x0 = torch.from_numpy(np.stack([self.tokens[split][i : i + self.seq_len] for i in starts]).astype(np.int64))
        answer = torch.arange(self.seq_len).expand_as(x0) >= self.meta.get("prompt_len", 0)
        if "separator" in self.meta:
            found = x0 == self.meta["separator"]
            answer = torch.arange(self.seq_len) > found.int().argmax(1, keepdim=True)
        return x0, answer

    def spread(self, split, n):
        """
        n windows at equal distances over the split, none with tokens of another, all that fit if they are fewer: the same for every
        evaluation. n = 0: all of the split; the last window of a stream then begins inside the one before where it has to.
        """
        tokens, step = len(self.tokens[split]), 1 if self.row_len else self.seq_len
        last = self.n_windows(split) - 1
        if n == 0:
            return torch.arange(0, last + step, step).clamp(max=last)
        return torch.linspace(0, last, min(n, tokens // self.seq_len), dtype=torch.float64).long()


def read_meta(path):
    try:
        return check_meta(json.loads(Path(path).read_text(encoding="utf-8")), path)
    except (ValueError, OSError, RecursionError) as e:
        die(f"{path}: {type(e).__name__}: {e}", '{"vocab_size": 50257, "tokenizer": "gpt2"}')


def check_meta(meta, path):
    """meta itself, if it says what a dataset's meta.json must; else two lines that name path."""
    try:
        if unknown := sorted(set(meta) - KEYS):
            raise ValueError(f"no key named {unknown[0]!r}, only {', '.join(sorted(KEYS))}")
        vocab_size, tokenizer = meta["vocab_size"], meta["tokenizer"]
        numbers = {k: meta[k] for k in KEYS - {"tokenizer", "chars"} if k in meta}
        if bad := sorted(k for k, v in numbers.items() if type(v) is not int or not 0 <= v < 1 << 31):
            raise ValueError(f"{bad[0]} is {numbers[bad[0]]!r}, not a number of tokens")
        if vocab_size < 1 or tokenizer not in ("char", "gpt2", "none"):
            raise ValueError(f"vocab_size {vocab_size} must be at least 1, tokenizer {tokenizer!r} one of char, gpt2, none")
        if outside := [k for k in ("eos_id", "separator") if meta.get(k, 0) >= vocab_size]:
            raise ValueError(f"{outside[0]} {meta[outside[0]]} is not below vocab_size {vocab_size}")
        if tokenizer == "char" and (not isinstance(meta["chars"], (str, list)) or len(set(meta["chars"])) != vocab_size):
            raise ValueError(f"{len(set(meta['chars']))} different chars, vocab_size {vocab_size}")
        if tokenizer == "char" and not all(isinstance(c, str) for c in meta["chars"]):
            raise ValueError("chars must be characters")
        if meta.get("prompt_len", 0) >= (meta.get("row_len") or 1 << 62):
            raise ValueError(f"prompt_len {meta['prompt_len']} leaves nothing of row_len {meta['row_len']}")
        if "separator" in meta and not meta.get("row_len"):
            raise ValueError("a separator ends the prompt of a row: row_len must say how long a row is")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        die(f"{path}: {type(e).__name__}: {e}", '{"vocab_size": 50257, "tokenizer": "gpt2"}')
    return meta


# ----- for the prepare.py scripts


def write_dataset(folder, train, val, meta):
    """train.bin, val.bin and meta.json; ids as any integer sequences."""
    dtype = np.uint16 if meta["vocab_size"] <= 1 << 16 else np.uint32
    for split, ids in (("train", train), ("val", val)):
        np.asarray(ids, dtype=dtype).tofile(Path(folder) / f"{split}.bin")
    (Path(folder) / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def text_file(path, url, folder):
    """The text of a local file, or of a download kept as folder/input.txt."""
    if not path:
        path = Path(folder) / "input.txt"
        if not path.exists():
            try:
                with urllib.request.urlopen(url, timeout=60) as response, open(f"{path}.part", "wb") as f:
                    shutil.copyfileobj(response, f)
                os.replace(f"{path}.part", path)
            except OSError as e:
                die(f"could not download {url}: {e}", f"python {os.path.relpath(folder)}/prepare.py --input FILE")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        die(f"cannot read {path}: {e}", "--input FILE, a text file in UTF-8")
