"""
How many bits does a weight need? The matrices of the layers rounded to 8 or 4 bits, after training.

A group of neighbours in a row, all of it for 8 bits and 128 weights for 4, is rounded to 2^bits - 1 equal
steps between its smallest and its largest weight:

    q = round((w - low) / step),   w' = low + q step,   step = (high - low) / (2^bits - 1)

so no weight moves by more than half a step, and rounding twice is rounding once. Embeddings, norms, biases,
adaLN and the head keep all their bits. The network computes in full precision with the rounded weights. So
texts stay independent of the batch, and the cache exact; nothing gets faster.

    python eval.py --ckpt out/sudoku --weights int4                                # rounded when it is loaded
    python -m run.pack --ckpt out/sudoku --weights int4 --out_dir out/sudoku_int4  # a smaller file
"""

import re

import torch
import torch.nn.functional as F

BITS = {"int8": 8, "int4": 4}
MATRIX = re.compile(r"layers\.\d+\.(?!modulation)[\w.]+\.weight")


def is_matrix(name, w):
    """Is this a matrix of a layer, (rows, columns)? Norms are vectors, and adaLN keeps its bits."""
    return bool(MATRIX.fullmatch(name)) and w.dim() == 2 and w.is_floating_point()


def group_size(bits, n_columns):
    return n_columns if bits == 8 else min(128, n_columns)


def pack(w, bits):
    """A matrix w as q uint8, two to a byte if bits is 4, low and high (rows, groups), shape and bits."""
    size = group_size(bits, w.size(1))
    missing = -w.size(1) % size
    groups = torch.cat((w, w[:, -1:].expand(-1, missing)), dim=1).unflatten(
        1, (-1, size)
    )  # the last one full
    low, high = groups.amin(-1), groups.amax(-1)
    span = (high.double() - low.double())[..., None]
    q = ((groups.double() - low.double()[..., None]) / span * (2**bits - 1)).nan_to_num(0).round()
    q = q.flatten(1)[:, : w.size(1)].flatten().to(torch.uint8)
    if bits == 4:
        q = F.pad(q, (0, len(q) % 2)).view(-1, 2)
        q = q[:, 0] + 16 * q[:, 1]
    return {"q": q, "low": low, "high": high, "shape": list(w.shape), "bits": bits}


def unpack(packed):
    """The rounded matrix. Raises ValueError for what `pack` does not make."""
    q, low, high, bits = (packed[name] for name in ("q", "low", "high", "bits"))
    rows, columns = packed["shape"]
    if (
        bits not in BITS.values()
        or q.dtype != torch.uint8
        or low.shape != high.shape
        or min(rows, columns) < 1
    ):
        raise ValueError(f"a packed matrix of {bits} bits, {q.dtype}, {low.shape} and {high.shape}")
    size = group_size(bits, columns)
    q = torch.stack((q % 16, q // 16), dim=1).flatten()[: rows * columns] if bits == 4 else q
    if q.numel() != rows * columns or low.shape != (rows, -(-columns // size)):
        raise ValueError(f"{q.numel()} packed weights for a matrix of {rows} x {columns}")
    q = F.pad(q.view(rows, columns).double(), (0, -columns % size)).unflatten(1, (-1, size))
    share = q / (2**bits - 1)
    # the ends exactly: rounding again finds the same low and high
    w = low.double()[..., None] * (1 - share) + high.double()[..., None] * share
    return w.flatten(1)[:, :columns].to(low.dtype).contiguous()


def rounded(weights, bits):
    """{name: tensor} of a network, its layers' matrices rounded."""
    return unpacked(packed(weights, bits))


def packed(weights, bits):
    """{name: tensor, or what `pack` gives}."""
    return {name: pack(w, bits) if is_matrix(name, w) else w for name, w in weights.items()}


def unpacked(weights):
    """What `packed` gave as tensors."""
    return {name: unpack(w) if isinstance(w, dict) else w for name, w in weights.items()}
