"""
What is the data? A folder data/NAME with nanoGPT's train.bin and val.bin (flat uint16 ids, uint32 where the
vocabulary needs it) and a meta.json. The least that meta.json may say is {"vocab_size": 50257, "tokenizer":
"gpt2"}. All its keys:

    vocab_size   number of ids
    tokenizer    "char" (with "chars": every character in id order), "gpt2", "smollm", "json" (the
                 tokenizer.json "file"), "bert", or "none" (ids are shown as numbers)
    bos_id       every row, and every prompt, begins with it: no loss on it
    eos_id       generation of a row ends here; eos_ids: a list, if several ids end it
    pad_id       behind the end of a row. It costs nothing behind the block in which the text ends, see
                 charged_tokens
    row_len      the file is rows of this length, not one stream; windows are then whole rows
    prompt_len   of a row, so many first tokens are the prompt: no loss on them
    separator    or: the prompt ends with the first such id
    prompt_lens  or: 1, and SPLIT.prompts.bin (uint16) says for each row how many
    prompt_end   text between a prompt and its answer
    width        break a sample into lines of so many characters when showing it
"""

import importlib.util
import json
import os
import shutil
import urllib.request
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.tokens import Tokenizer
from run.cli import die

KINDS = ("char", "gpt2", "smollm", "json", "bert", "none")
IDS = ("bos_id", "eos_id", "pad_id", "separator")
NUMBERS = {"vocab_size", "row_len", "prompt_len", "prompt_lens", "width", *IDS}
KEYS = {"tokenizer", "chars", "prompt_end", "file", "eos_ids", *NUMBERS}  # file: where the tokenizer lies


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
        self.prompts = {
            split: self.open_prompts(split, fix) for split in ("train", "val") if self.meta.get("prompt_lens")
        }
        self.given = row_len > 0 and any(
            self.meta.get(k) is not None for k in ("bos_id", "prompt_len", "prompt_lens", "separator")
        )

    @cached_property
    def tokenizer(self):
        return Tokenizer(self.meta, self.folder)  # only when text is asked for: training needs none

    @cached_property
    def checker(self):
        return checker(self.folder)

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
        low, high = tokens[: 1 << 16 : 2], tokens[1 : 1 << 16 : 2]
        doubled = not high.any() and len(np.unique(low)) > 2  # the upper half of each id is 0
        if dtype == np.uint16 and doubled:
            cast = f"np.fromfile('{path}', 'u4').astype('u2').tofile('{path}')"
            fix = fix if "prepare.py" in fix else f'python -c "import numpy as np; {cast}"'
            die(f"{path} holds uint32; ids below {self.meta['vocab_size']} are uint16 here", fix)
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
                    die(
                        f"{path}: row {row} is without the separator {self.meta['separator']}",
                        f"check {self.folder}/meta.json",
                    )
                if (prompt := found.argmax(1)).max() == self.row_len - 1:
                    row += int(prompt.argmax())
                    die(
                        f"{path}: row {row} ends with its prompt, nothing is left to learn",
                        f"check {self.folder}/meta.json",
                    )
        return tokens

    def open_prompts(self, split, fix):
        """How many tokens of each row are its prompt, (rows,) uint16."""
        path = self.folder / f"{split}.prompts.bin"
        try:
            lens = np.fromfile(path, np.uint16)
        except OSError as e:
            die(f"cannot read {path}: {e.strerror}", fix)
        if len(lens) != len(self.tokens[split]) // self.row_len or lens.max() >= self.row_len:
            die(
                f"{path}: {len(lens)} prompts of up to {lens.max(initial=0)} tokens, "
                f"for rows of {self.row_len}",
                fix,
            )
        return lens

    def same_as(self, meta, only_tokens=False):
        """
        Exit unless a checkpoint's meta is this folder's: other characters under the same ids would be
        nonsense. only_tokens: it was trained on other data, or elsewhere, and has to know these tokens, no
        more.
        """
        if only_tokens and self.meta["vocab_size"] <= meta["vocab_size"]:
            meta = {**self.meta, "chars": None, **{k: meta[k] for k in ("tokenizer", "chars") if k in meta}}
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
        """
        index: integers (B,) below n_windows -> x0 (B, T) int64, given (B, T) bool: prompts, which carry no
        loss, and real (B, T) bool: tokens of the text, not padding. A text that does not end with eos_id ends
        with its first padding token, which belongs to it then: it says how long the text is.
        """
        starts = [int(i) * (self.row_len or 1) for i in index]
        x0 = torch.from_numpy(
            np.stack([self.tokens[split][i : i + self.seq_len] for i in starts]).astype(np.int64)
        )
        at, meta = torch.arange(self.seq_len), self.meta
        given = at.expand_as(x0) < meta.get("prompt_len", 0)
        if "separator" in meta:
            given = at <= (x0 == meta["separator"]).int().argmax(1, keepdim=True)
        if meta.get("prompt_lens"):
            given = at < torch.from_numpy(self.prompts[split][np.asarray(index)].astype(np.int64))[:, None]
        if "bos_id" in meta and self.row_len:
            given = given | (at == 0)
        real = x0 != meta["pad_id"] if "pad_id" in meta else torch.ones_like(given)
        ends = real[:, :-1] & ~real[:, 1:] & (x0[:, :-1] != meta.get("eos_id", -1))
        if "eos_id" in meta:  # a row without any text, where texts have an end, is no text
            ends = ends & ~given[:, :-1]
        real[:, 1:] |= ends
        return x0, given, real

    def spread(self, split, n):
        """
        n windows at equal distances over the split, none with tokens of another, all that fit if they are
        fewer: the same for every evaluation. n = 0: all of the split; the last window of a stream then begins
        inside the one before where it has to.
        """
        tokens, step = len(self.tokens[split]), 1 if self.row_len else self.seq_len
        last = self.n_windows(split) - 1
        if n == 0:
            return torch.arange(0, last + step, step).clamp(max=last)
        return torch.linspace(0, last, min(n, tokens // self.seq_len), dtype=torch.float64).long()


def charged_tokens(given, real, block_size, clean_padding=False):
    """
    (given, charged), (B, T) bool: what is shown clean, and what carries loss. given, real: of
    Dataset.windows. block_size: int or (B,).

    Behind the end of a text stands padding. In the block in which the text ends it is noised and charged like
    any token: shown clean it would give the length away, and a network that reads the length off it is not a
    bound (docs/log.md). Blocks behind that one are never made, so they cost nothing, nor does a row that is
    prompt and padding alone. clean_padding: as published weights were trained, shown clean and never charged:
    no bound.
    """
    if clean_padding:
        return given | ~real, real & ~given
    at = torch.arange(1, real.size(1) + 1, device=real.device)
    length = ((real & ~given) * at).amax(1, keepdim=True)  # (B, 1); 0: no text
    b = torch.as_tensor(block_size, device=real.device).view(-1, 1)
    return given, ~given & (at <= -(-length // b) * b)


def first_charged(charged, unit):
    """
    The first position, a multiple of `unit`, from which on a noisy copy is needed: all before is prompt in
    every row.
    """
    return int(charged.any(0).int().argmax()) // unit * unit


def checker(folder):
    """
    folder/prepare.py as a module if it knows what is correct, else None. Such a file has check(text) ->
    (correct, asked) and may have choices(text) -> [(answer, what else it could have been)].
    """
    module = prepared(folder)
    return module if hasattr(module, "check") else None


def prepared(folder):
    """folder/prepare.py as a module, or None. It may have show(text): a text as a person wants to see it."""
    path = Path(folder) / "prepare.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"prepare_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        numbers = {k: meta[k] for k in NUMBERS if k in meta}
        if bad := sorted(k for k, v in numbers.items() if type(v) is not int or not 0 <= v < 1 << 31):
            raise ValueError(f"{bad[0]} is {numbers[bad[0]]!r}, not a number of tokens")
        if vocab_size < 1 or tokenizer not in KINDS:
            raise ValueError(
                f"vocab_size {vocab_size} must be at least 1, "
                f"tokenizer {tokenizer!r} one of {', '.join(KINDS)}"
            )
        if not isinstance(meta.get("prompt_end", ""), str):
            raise ValueError(f"prompt_end is {meta['prompt_end']!r}, not a text")
        if outside := [k for k in IDS if meta.get(k, 0) >= vocab_size]:
            raise ValueError(f"{outside[0]} {meta[outside[0]]} is not below vocab_size {vocab_size}")
        ends = meta.get("eos_ids", [])
        if type(ends) is not list or any(type(i) is not int or not 0 <= i < vocab_size for i in ends):
            raise ValueError(f"eos_ids is {ends!r}, not a list of ids")
        if tokenizer == "char" and (
            not isinstance(meta["chars"], (str, list)) or len(set(meta["chars"])) != vocab_size
        ):
            raise ValueError(f"{len(set(meta['chars']))} different chars, vocab_size {vocab_size}")
        if tokenizer == "char" and not all(isinstance(c, str) for c in meta["chars"]):
            raise ValueError("chars must be characters")
        if meta.get("prompt_len", 0) >= (meta.get("row_len") or 1 << 62):
            raise ValueError(f"prompt_len {meta['prompt_len']} leaves nothing of row_len {meta['row_len']}")
        if ("separator" in meta or meta.get("prompt_lens")) and not meta.get("row_len"):
            raise ValueError("a row has a prompt: row_len must say how long a row is")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        die(f"{path}: {type(e).__name__}: {e}", '{"vocab_size": 50257, "tokenizer": "gpt2"}')
    return meta


# ----- for the prepare.py scripts


def write_dataset(folder, train, val, meta):
    """train.bin, val.bin and meta.json; ids as any integer sequences."""
    dtype = np.uint16 if meta["vocab_size"] <= 1 << 16 else np.uint32
    for split, ids in (("train", train), ("val", val)):
        np.asarray(ids, dtype=dtype).tofile(Path(folder) / f"{split}.bin")
    (Path(folder) / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


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
                die(
                    f"could not download {url}: {e}",
                    f"python {os.path.relpath(folder)}/prepare.py --input FILE",
                )
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # a byte order mark is no character of the text
    except (OSError, UnicodeDecodeError) as e:
        die(f"cannot read {path}: {e}", "--input FILE, a text file in UTF-8")
