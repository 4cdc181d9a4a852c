"""
How is the rule of model.py computed? As a mask, and attention under it in three ways that give the same:

    dense       all pairs are scored, and what the mask forbids is thrown away: generation, where little is
                forbidden
    in pieces   a training pass on a CPU, as the steps of its own generation side by side
    in blocks   a training pass on CUDA, by FlexAttention (arXiv 2412.05496), which leaves out tiles of which
                nothing is read

A training pass has T clean and T noisy tokens: 4 T^2 pairs, of which the rule allows T^2 + T (b + 1) / 2.
Letters as in model.py.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import send


def attention_mask(block_size, n_past, n_clean, n_noisy, start, clean_causal=True, device=None, width=None):
    """
    The rule of model.py as a (B or 1, S, n_past + S) bool tensor, True where a query (row) may read a key
    (column).
    Keys: clean 0..n_past+C-1, then noisy start..start+N-1; queries the same without the n_past cached ones.
    With a width, n_past may be a tensor: keys are clean 0..width-1, of which those beyond n_past+C-1 are not
    read, then the noisy ones. With block_size 2 and four positions, input [clean | noisy]:

                   clean 0 1 2 3   noisy 0 1 2 3
        clean 0          # . . .         . . . .      clean text reads itself, causally
        clean 1          # # . .         . . . .
        clean 2          # # # .         . . . .
        clean 3          # # # #         . . . .
        noisy 0          . . . .         # # . .      a noisy block reads itself in both directions
        noisy 1          . . . .         # # . .
        noisy 2          # # . .         . . # #      and the clean blocks before it,
        noisy 3          # # . .         . . # #      never its own clean copy: that would leak the answer
    """
    b = placed(block_size, device)
    b = b[..., None] if b.dim() == 2 else b.view(-1, 1, 1)  # (1 or B, 1 or N, 1)
    clean = torch.arange(width or n_past + n_clean, device=device)
    noisy = (
        send(start, device or start.device)
        if torch.is_tensor(start)
        else torch.arange(start, start + n_noisy, device=device)
    )
    ask = n_past + torch.arange(n_clean, device=device)[:, None]  # (C, 1)
    own = noisy[:, None] // b  # (1 or B, N, 1)
    mask = torch.zeros(b.size(0), n_clean + n_noisy, len(clean) + n_noisy, dtype=torch.bool, device=device)
    mask[:, :n_clean, : len(clean)] = clean <= ask if clean_causal else clean // b <= ask // b
    mask[:, n_clean:, : len(clean)] = clean // b < own
    mask[:, n_clean:, len(clean) :] = (own == own.mT) & (b == b.mT)
    if width:
        mask[:, :, :width] &= clean < n_past + n_clean
    return mask


def placed(block_size, device):
    """A block size, or several, as a tensor on the device; the host does not wait for it."""
    return (
        send(block_size, device or block_size.device)
        if torch.is_tensor(block_size)
        else torch.full((), block_size, device=device)
    )


def added(x, mask):
    """
    (B, S, K) booleans as what is added to the scores, (B, 1, S, K): SDPA would convert them again in every
    layer.
    """
    mask = mask[:, None]
    return torch.zeros(mask.shape, device=mask.device, dtype=dtype_of(x)).masked_fill_(~mask, -math.inf)


def dtype_of(x):
    """
    What attention computes in, given a weight, or what a product with it gave: its dtype, or autocast's; but
    on a CPU float32, for bfloat16's backward takes up to 2.5 times as long there (docs/log.md).
    """
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x.dtype
    return torch.float32 if x.is_cpu else torch.get_autocast_dtype(x.device.type)


def training_mask(x, n_heads, block_size, C, N, start, clean_causal):
    """
    For `attend`: a pass of clean 0..C-1 and noisy start..C-1, x (B, C + N, D), by the way that
    `choose_backend` names.
    """
    way = choose_backend(x.device, dtype_of(x), x.size(2) // n_heads, C + N)[0]
    if way == "FlexAttention":
        return flex_mask(block_size, len(x), C, N, start, clean_causal, x.device)
    if (
        way == "SDPA in pieces"
        and not torch.compiler.is_compiling()
        and C > (step := chunk_length(block_size, C))
    ):
        return query_chunks(x, block_size, C, start, clean_causal, step)
    return added(x, attention_mask(block_size, 0, C, N, start, clean_causal, x.device))


LONG = 1024  # tokens of both streams from which on FlexAttention is worth its compilation
TRIED = {}  # what became of FlexAttention, by device, dtype and width


def choose_backend(device, dtype, width, tokens):
    """
    ("FlexAttention", "SDPA in pieces" or "dense SDPA", why): what a training pass of so many tokens of both
    streams runs on. The first call for CUDA compiles FlexAttention for heads of that width, and tries it on a
    few numbers, forwards and backwards, against dense attention.
    """
    if device.type != "cuda":
        return (
            ("SDPA in pieces", "a CPU")
            if device.type == "cpu"
            else ("dense SDPA", "FlexAttention is for CUDA")
        )
    if tokens < LONG:
        return "dense SDPA", f"FlexAttention is for {LONG} tokens and more, of both streams"
    key = str(device), dtype, width
    if key not in TRIED:
        try:
            off = try_out(device, dtype, width)
            TRIED[key] = (
                ("dense SDPA", "FlexAttention gave something else in its first call")
                if off
                else ("FlexAttention", "compiled")
            )
        except Exception as e:  # whatever a compiler or a driver may raise
            TRIED[key] = (
                "dense SDPA",
                f"FlexAttention's first call failed: {type(e).__name__}: "
                f"{(str(e).strip() or '?').splitlines()[0]}",
            )
    return TRIED[key]


# ----- in pieces

# positions that attend at once: an eighth of a row within these bounds, a 32nd part of long ones, for joining
# costs too
CHUNK_BOUNDS = 32, 64


def chunk_length(block_size, C):
    """Positions of a piece: whole blocks of every row's size."""
    unit = block_size if isinstance(block_size, int) else math.lcm(*block_size.unique().tolist())
    least, most = CHUNK_BOUNDS
    return -(-max(least, min(most, C // 8), C // 32) // unit) * unit


def query_chunks(x, block_size, C, start, clean_causal, step):
    """
    [(clean tokens, noisy tokens, mask)] of pieces of `step` positions. A piece reads itself and the clean
    tokens before it, as a step of generation does: of T clean and T noisy tokens T^2 + 3 T step pairs are
    scored.
    """
    found = []
    for lo in range(0, C, step):
        hi = min(lo + step, C)
        first = min(max(lo, start), hi)
        mask = attention_mask(block_size, lo, hi - lo, hi - first, first, clean_causal, x.device)
        found.append((hi - lo, hi - first, added(x, mask)))
    return found


# ----- in blocks


class Blocks(NamedTuple):
    all: object  # a BlockMask for the queries of all tokens
    noisy: object  # of the noisy ones


def flex():
    """flex_attention and create_block_mask, imported when they are wanted: they load the compiler."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return (flex_attention, create_block_mask) if torch.compiler.is_compiling() else compiled()


@functools.cache
def compiled():
    """Each kind of pass is a variant: training, validation, prompts, ..."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # beyond it all pairs are scored, without a word
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention), torch.compile(create_block_mask)


def flex_mask(block_size, B, C, N, start, clean_causal, device):
    """
    The rule as a function of two places in [clean | noisy], for FlexAttention. Block sizes are data, one a
    row, and so is `start`: another mixture compiles nothing anew.
    """
    size = placed(block_size, device).expand(B).contiguous()
    edge, shift = (torch.full((B,), n, device=device) for n in (C, start - C))

    def rule(row, head, ask, key):
        first = edge[row]  # where the noisy stream begins
        # positions
        q, k = (
            torch.where(ask < first, ask, ask + shift[row]),
            torch.where(key < first, key, key + shift[row]),
        )
        own, at = q // size[row], k // size[row]
        clean = k <= q if clean_causal else at <= own
        return torch.where(ask < first, (key < first) & clean, torch.where(key < first, at < own, at == own))

    make = flex()[1]
    noisy = make(lambda row, head, ask, key: rule(row, head, ask + edge[row], key), B, None, N, C + N, device)
    return Blocks(make(rule, B, None, C + N, C + N, device), noisy)


@torch.enable_grad()
def try_out(device, dtype, width):
    """
    Whether FlexAttention and dense attention differ on a few numbers: what comes out, and its gradients.
    """
    B, C, size = 2, 256, torch.tensor([1, 16], device=device)
    *inputs, slope = (
        torch.randn(4, B, 2, 2 * C, width, generator=torch.Generator().manual_seed(0)).to(device).unbind()
    )
    found = []
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        inputs, slope = [x.clone() for x in inputs], slope.clone()  # no inference tensors
        dense = added(slope, attention_mask(size, 0, C, C, 0, device=device))
        for mask, kind in ((flex_mask(size, B, C, C, 0, True, device), dtype), (dense, torch.float32)):
            for skip in (0, C):
                q, k, v = (x.to(kind).requires_grad_() for x in inputs)
                y = attend(q[:, :, skip:], k, v, mask, skip)
                found.append([y, *torch.autograd.grad(y, (q, k, v), slope[:, :, skip:].to(kind))])
    near = lambda a, b: torch.allclose(a.float(), b, rtol=0.05, atol=0.05 if dtype != torch.float32 else 1e-2)
    return not all(
        near(a, b)
        for ours, other in zip(found[:2], found[2:], strict=True)
        for a, b in zip(ours, other, strict=True)
    )


def attend(q, k, v, mask, skip):
    """
    Attention of queries (B, H, S - skip, D/H) over keys and values (B, H, keys, D/H). mask: None, or what is
    added to the scores of all S
    queries (B or 1, 1, S, keys), or what `query_chunks` or `flex_mask` made.
    """
    if q.is_cpu and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):  # SDPA and @ would round to bfloat16
            return attend(q, k, v, mask, skip)
    if isinstance(mask, Blocks):
        return flex()[0](q, k, v, block_mask=mask.noisy if skip else mask.all)
    if not isinstance(mask, list):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, :, skip:])
    P, cs, ns = len(mask), [c for c, *_ in mask], [n for _, n, _ in mask]
    # P pieces of the clean stream, then P of the noisy one
    k, v = (x.split_with_sizes(cs + ns, dim=2) for x in (k, v))
    q = q.split_with_sizes([0] * P * (skip > 0) + cs * (skip == 0) + ns, dim=2)
    ys = []
    for p, (_, _, plus) in enumerate(mask):
        queries = torch.cat((q[p], q[P + p]), dim=2)
        # the clean tokens so far, and its own noisy ones
        read = (torch.cat((*x[: p + 1], x[P + p]), dim=2) for x in (k, v))
        few = plus[:, :, -queries.size(2) :] if queries.size(2) else None
        y = F.scaled_dot_product_attention(queries, *read, attn_mask=few)
        ys.append(y.split_with_sizes((q[p].size(2), q[P + p].size(2)), dim=2))
    return torch.cat([clean for clean, _ in ys] + [noisy for _, noisy in ys], dim=2)
