"""
How is a GGUF file read? One file with everything: settings, tokenizer, and weights, rounded or not.

    about, tensors = read("model.gguf")     about: {key: number, text, bool or list}
    tensors["output_norm.weight"]()         float32, made when asked for

Rounded weights come in blocks of 32 along a row, with a float16 scale d each:

    Q8_0   x = d q          q in -128..127
    Q4_0   x = d (q - 8)    q in 0..15, two to a byte: the first 16 in the low halves
    Q4_1   x = d q + m      m, float16

The format is ggml's: a header, key and value pairs, a list of tensors, and their data.
"""

import struct
from functools import partial
from math import prod

import numpy as np
import torch

from run.cli import die, said

SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")))
STRING, ARRAY = 8, 9
# type: (its name, numbers in a block, bytes of a block)
KINDS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}


class Reader:
    """Values one after the other, never beyond the end of the file."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        if n > len(self.data) - self.at:
            raise ValueError(f"{n:,} bytes at {self.at:,}, and the file has {len(self.data):,}")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self):
        return bytes(self.take(self.number("<Q"))).decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, n = self.number("<I"), self.number("<Q")
            if inner == ARRAY or n > len(self.data):
                raise ValueError(f"a list of {n:,} values of type {inner}")
            return [self.value(inner) for _ in range(n)]
        if not SCALARS.get(kind):
            raise ValueError(f"a value of type {kind}")
        return self.number(SCALARS[kind])


def dequantised(raw, kind, shape):
    """float32 of `shape` from a tensor's bytes, (n,) uint8."""
    name, size, width = KINDS[kind]
    if size == 1:
        x = raw.view(np.float32 if name == "F32" else np.float16).astype(np.float32)
        return torch.from_numpy(x).view(shape)
    blocks = raw.reshape(-1, width)
    half = lambda at: blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)
    if name == "Q8_0":
        x = half(0) * blocks[:, 2:].copy().view(np.int8)
    else:
        packed = blocks[:, width - 16 :]
        q = np.concatenate((packed & 15, packed >> 4), axis=1).astype(np.float32)
        x = half(0) * (q - 8) if name == "Q4_0" else half(0) * q + half(2)
    return torch.from_numpy(x).view(shape)


def read(path):
    """({key: value}, {name: a function that returns the tensor}). Two lines for what is no such file."""
    try:
        reader = Reader(np.memmap(path, dtype=np.uint8, mode="r"))
        magic, version = bytes(reader.take(4)), reader.number("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}")
        n_tensors, n_keys = reader.number("<Q"), reader.number("<Q")
        about = {}
        for _ in range(n_keys):
            key, kind = reader.string(), reader.number("<I")
            about[key] = reader.value(kind)
        places = {}
        for _ in range(n_tensors):
            name, n = reader.string(), reader.number("<I")
            shape = [reader.number("<Q") for _ in range(n)][::-1]  # rows last in the file
            places[name] = (shape, reader.number("<I"), reader.number("<Q"))
        step = about.get("general.alignment", 32)
        begin = -(-reader.at // step) * step
        tensors = {}
        for name, (shape, kind, offset) in places.items():
            if kind not in KINDS:
                known = ", ".join(k for k, *_ in KINDS.values())
                raise ValueError(f"{name} is of type {kind}, and only {known} can be read")
            size, width = KINDS[kind][1:]
            if not shape or shape[-1] % size:
                raise ValueError(f"{name} {tuple(shape)} is not made of blocks of {size}")
            reader.at = begin + offset
            tensors[name] = partial(dequantised, reader.take(prod(shape) // size * width), kind, shape)
        return about, tensors
    except MemoryError:
        raise
    except Exception as e:  # a damaged file fails in many ways
        fix = "--init_from gguf:FILE, in Q4_0, Q4_1, Q8_0, F16 or F32"
        die(f"{path}: no GGUF file that can be read: {said(e)}", fix)
