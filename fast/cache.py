"""
What does a text keep while it is made? Keys and values of its finished tokens, and whatever a pass would make again: weights in the order
in which they are read, what adaLN makes of a noise level, angles and masks. All of it is of one network and one call of generate.

Letters as in model.py.
"""

import torch
import torch.nn.functional as F


class KVCache:
    """
    Keys and values of clean tokens at positions 0..length-1, in buffers (n_layers, B, H, max_len, D/H) that never grow; of a next-token
    network also the last layer's output, (B, max_len, D).
    A forward commits the clean tokens it was given and nothing else; noisy keys pass through the free space behind
    `length` and are forgotten. Setting `length` back forgets committed tokens (a verifier does: its block is a guess).
    With rows (R',), indices, the next forwards are of these rows of the B only; what they commit is of use to them alone.
    `length` may be a tensor (recorded.py): then no shape depends on it. Attention reads the whole buffers, and noisy keys lie at their end.
    """

    def __init__(self, cfg, batch_size, max_len=None, device=None, dtype=torch.float32, out_dtype=None):
        shape = (cfg.n_layers, batch_size, cfg.n_heads, max_len or 2 * cfg.seq_len, cfg.d_model // cfg.n_heads)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        # what the last layer made of each clean token: for a next-token network, the prediction of the one behind it
        self.out = torch.zeros(batch_size, shape[3] if cfg.next_token else 0, cfg.d_model, device=device, dtype=out_dtype or dtype)
        self.length, self.rows, self.places = 0, None, None
        self.kept = {}  # weights and angles as a pass wants them
        self.levels = {}  # what adaLN makes of a noise level, of all layers: a block after the other goes through the same ones
        self.past, self.passes = None, {}  # angles and masks of passes over one context: each is asked many times

    def extend(self, layer, k, v):
        """Put (B or R', H, S, D/H) behind the committed tokens and return views of everything up to them, of all B rows."""
        if self.places is not None:
            return [all_[layer].index_copy_(2, self.places, new.to(all_.dtype)) for all_, new in ((self.k, k), (self.v, v))]
        end = self.length + k.size(2)
        assert end <= self.k.size(3), f"the cache holds {self.k.size(3)} tokens, asked for {end}"
        both = self.k[layer].narrow(2, 0, end), self.v[layer].narrow(2, 0, end)
        for all_, new in zip(both, (k, v), strict=True):
            place = all_.narrow(2, self.length, k.size(2))
            place.copy_(new) if self.rows is None else place.index_copy_(0, self.rows, new.to(place.dtype))
        return both

    def keep(self, rows):
        """Drop the batch rows not in `rows` (bool or indices): a finished row costs nothing more."""
        self.k, self.v, self.out = self.k[:, rows], self.v[:, rows], self.out[rows]


def known(kept, what, make):
    """make(), or what it gave before: kept is a dict, or None."""
    if kept is None:
        return make()
    if what not in kept:
        kept[what] = make()
    return kept[what]


# ----- products


ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # a private operation, which not every build has


def by_onednn(x):
    """Whether products of x are oneDNN's: without gradients on a CPU, in float32, or in autocast's bfloat16 where the CPU multiplies it."""
    plain = ONEDNN and x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not plain or not torch.is_autocast_enabled("cpu"):
        return plain and x.dtype == torch.float32
    return x.dtype != torch.float64 and torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


def linear(x, layer, cache=None, gelu=False, rows=None):
    """
    layer(x), or with some rows of its weight (of a layer without bias), and GELU of that. Without gradients on a CPU by oneDNN: at the few
    tokens of a sampling pass it is 10 to 30 % faster than what F.linear calls, and it applies the GELU as it writes. The cache, which is of
    these very weights, keeps them in the order in which oneDNN reads them, rounded if need be: another 10 %, and half the time of a large
    head (docs/log.md).
    """
    if by_onednn(x):
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        key = layer, rows and rows.start, dtype
        weight = cache.kept.get(key, 0) if cache is not None else 0
        if isinstance(weight, int):  # how often it was wanted; packed the fourth time: a text of few passes is sooner without
            count, weight = weight, (layer.weight if rows is None else layer.weight[rows]).to(dtype)
            if cache is not None:
                cache.kept[key] = count + 1 if count < 3 else torch.ops.mkldnn._reorder_linear_weight(weight, max(8, x[..., 0].numel()))
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, layer.bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))
    y = F.linear(x, layer.weight if rows is None else layer.weight[rows], layer.bias)
    return F.gelu(y, approximate="tanh") if gelu else y
