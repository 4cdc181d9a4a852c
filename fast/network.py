"""
The network of model.py made fast: the same weights, the same call, the same logits but for rounding.

    FastTransformer    a subclass of model.Transformer; fast/check.py compares the two and says which one runs
    FastCache          keys and values in buffers that never grow, and whatever a pass would compute again

What it does that the lesson does not: the clean stream skips the last layer's queries and MLP, logits are
made only for tokens that somebody reads, one product makes queries and keys, adaLN is computed once a noise
level, and on a CPU without gradients products go by oneDNN. Letters as in model.py.
"""

import math

import torch
import torch.nn.functional as F

from fast.attention import added, attend, attention_mask, dtype_of, training_mask
from fast.edits import guard
from fast.graphs import Recorded
from kernels import send
from model import KVCache, Layer, Transformer

# ----- pieces of a layer


def precise(x):
    """At least float32, whatever the weights' dtype."""
    return x if x.dtype.itemsize >= 4 else x.float()


def rotate(x, cos, sin):
    """
    Rotary positions (arXiv 2104.09864), half-split: dimension j pairs with j + D/2. x (B, H, S, D); cos (S,
    D) twice the same half, sin (S, D) with a minus in front of its first half: (a cos - b sin, b cos + a sin)
    of halves a, b.
    """
    wide = precise(x)
    return torch.addcmul(wide * cos, wide.roll(x.size(-1) // 2, dims=-1), sin).to(dtype_of(x))


def normed(x, norm, n_clean, m):
    """norm(x), stretched and moved by m, two vectors (B, 1 or 2, D), or None."""
    return norm(x) if m is None else per_stream(modulate, n_clean, [norm(x)], m)


def per_stream(f, n_clean, xs, ms):
    """
    f(*xs, *ms) of tokens xs (B, C + N, D) and vectors ms (B, ..., D): one for all, a token, a stream (2) or a
    noisy token (1 + N).
    """
    S = xs[0].size(1)
    if ms[0].size(1) in (1, S):
        return f(*xs, *ms)
    if ms[0].size(1) == 2 and S == 2 * n_clean:  # streams of one length: nothing need be written out
        return f(*(x.unflatten(1, (2, -1)) for x in xs), *(m[:, :, None] for m in ms)).flatten(1, 2)
    return f(*xs, *(written_out(m, n_clean, S) for m in ms))


def written_out(m, n_clean, S):
    """Vectors (B, 2 or 1 + N, D), of a stream or a noisy token, as one for each of S tokens."""
    return torch.cat((m[:, :1].expand(-1, n_clean, -1), m[:, 1:].expand(-1, S - n_clean, -1)), dim=1)


def each(m, ask):
    """
    The noisy stream's vectors (B or 1, 1, D) as those of the tokens asked for, (M or 1, 1, D).
    """
    return m if len(m) == 1 else m[ask[0]]


def modulation(layer, cond, n):
    """
    adaLN (arXiv 2212.09748): n vectors (B, 1 or 2, D) of a noise level's cond. The first two of every three
    move and stretch what a norm returns, h (1 + scale) + shift, and 1 + scale is what is returned; a third is
    the gate of what is added to the stream.
    """
    return [m + 1 if i % 3 == 1 else m for i, m in enumerate(layer(cond).chunk(n, dim=-1))]


def modulate(h, stretch, shift):
    """h (1 + scale) + shift, with stretch = 1 + scale"""
    return torch.addcmul(shift, h, stretch)


# numbers of a row up to which a cached level's vectors are written out, one a token: there an operation
# costs, not its size
FEW = 1 << 14


class FastLayer(Layer):
    def adaln_of(self, cond, n_clean, S, skip, few):
        """
        What adaLN makes of cond (B or 1, 1 or 2, cond_dim): what the first norm does and its gate, and the
        same of the second, whose tokens are those behind `skip`. few: written out, a vector a token, of which
        there are S.
        """

        def vector(i, m):
            if m.size(1) == 1:
                return m
            # the gate is behind `skip` already
            return m[:, 1:] if skip and i > 1 else written_out(m, n_clean, S) if few else m

        shift1, stretch1, gate1, shift2, stretch2, gate2 = (
            vector(i, m) for i, m in enumerate(modulation(self.modulation, cond, 6))
        )
        return (stretch1, shift1), gate1, (stretch2, shift2), gate2

    def forward(self, x, n_clean, skip, rope, mask, cond, cache, index, ask=None, level=None):
        """
        x (B, C + N, D) -> (B, C + N - skip, D): keys and values from every token, an output for all but the
        first `skip`, 0 or C. With ask, rows (M,) and places (M,), for these tokens behind `skip` only:
        (M, 1, D). rope: cos and sin (S, D/H). mask: see attend. cond (B, 1 or 2, cond_dim), one vector a
        stream (or 1 + N, see level_vectors); level: of cache.levels, where it is kept.
        """
        B, S, D = x.shape
        norm1 = gate1 = norm2 = gate2 = None
        if cond is not None:
            few = level is not None and S * D <= FEW
            norm1, gate1, norm2, gate2 = memoize(
                level, index, lambda: self.adaln_of(cond, n_clean, S, skip, few)
            )
        width, drop = D // self.n_heads, self.dropout if self.training else lambda y: y
        # (B, S, D) -> (B, H, S, D/H)
        heads = lambda y: y.view(*y.shape[:2], y.size(2) // width, width).transpose(1, 2)
        cos, sin = rope

        h = normed(x, self.norm1, n_clean, norm1)
        if skip:
            q = rotate(heads(linear(h[:, skip:], self.qkv, cache, rows=slice(0, D))), cos[skip:], sin[skip:])
            k, v = heads(linear(h, self.qkv, cache, rows=slice(D, None))).chunk(2, dim=1)
            k = rotate(k, cos, sin)
        else:
            q, k, v = heads(linear(h, self.qkv, cache)).chunk(3, dim=1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(index, k, v)
        k, v = k.to(q.dtype), v.to(q.dtype)  # v is as it was multiplied, and both as the cache keeps them
        rows = None if cache is None else cache.rows
        # attention of all rows is cheaper than a copy of many rows' keys and values
        if rows is not None and 4 * len(rows) > len(k):
            everyone = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, rows, q)
            y = attend(everyone, k, v, mask, skip)[rows]
        else:
            y = attend(q, *((k, v) if rows is None else (k[rows], v[rows])), mask, skip)
        x, y, n_clean = x[:, skip:] if skip else x, y.transpose(1, 2).flatten(2), n_clean - skip
        if ask is not None:  # from here on a token is on its own
            x, y = x[ask][:, None], y[ask][:, None]
            if cond is not None:
                gate1, norm2, gate2 = each(gate1, ask), [each(z, ask) for z in norm2], each(gate2, ask)
        # x + gate y
        plus = lambda x, y, gate: (
            x + y if gate is None else per_stream(torch.addcmul, n_clean, [x, y], [gate])
        )
        x = plus(x, drop(linear(y, self.out, cache)), gate1)
        h = normed(x, self.norm2, n_clean, norm2)
        return plus(x, drop(linear(linear(h, self.mlp[0], cache, gelu=True), self.mlp[2], cache)), gate2)


class FastTransformer(Transformer):
    """model.Transformer, fast. `accelerate` in fast/check.py turns a model.Transformer into one."""

    graphs = False  # on CUDA: record the passes of a text and play them, see fast/graphs.py

    def new_cache(self, batch_size, max_len):
        guard("model.py", self)
        weight = self.embed.weight
        return FastCache(self.cfg, batch_size, max_len, weight.device, dtype_of(weight), weight.dtype)

    def forward(self, clean, noisy, block_size, start=0, sigma=None, cache=None, readout=None, ask=None):
        """
        clean (B, C) int64 ids, or None   real tokens at positions cache.length, cache.length + 1, ... (0, 1,
                                          ... without)
        noisy (B, N) int64 ids, or None   at positions start, start + 1, ...; or soft tokens, mixtures of
                                          embeddings: weights (B, N, V) of the first V ids, or a pair of ids
                                          (B, N, k) and their weights (B, N, k)
        block_size  int, or (B,) int64: one a row
        start       in training 0, or a block behind prompts; when generating or verifying the length of the
                    context
        sigma (B,) or (1,)  noise level -log(alpha_t); zeros if None; unused without time conditioning
        cache       a KVCache: adds the clean tokens before, and commits `clean` to it
        Several readings of one block in one pass: block_size (1 or B, N), start (N,) the positions and sigma
        (B, N), one a noisy token; tokens with another block size do not see each other.
        Returns logits (B, N, V) float32 for the noisy positions, nothing forbidden, not normalised. Or, so
        that no one has to hold all logits, readout(hidden (B, N, D) float32, weight (V, D), bias (V,)):
        logits are hidden @ weight.T + bias.
        ask (B, N)  bool, best on the CPU: the tokens whose logits are wanted, (M, V) in their order, or
                    hidden (M, D) for the readout (all under torch.compile); not with one sigma a token. The
                    others cost the last layer keys and values only
        """
        if cache is None:
            guard("model.py", self)
        n_past = cache.length if cache is not None else 0
        if not getattr(block_size, "ndim", 0):
            block_size = int(block_size)  # a 0-d array or tensor
        N = 0 if noisy is None else noisy[0].size(1) if isinstance(noisy, tuple) else noisy.size(1)
        one_start = not getattr(start, "ndim", 0)
        # lengths and positions are read as the pass runs: nothing here may look at them
        recorded = torch.is_tensor(n_past)
        end = None if recorded else int(start) + N if one_start else int(start.max()) + 1
        if torch.compiler.is_compiling() and readout is not None:
            ask = None  # as many tokens as another step asks for would be compiled anew
        if self.cfg.next_token:
            return self.next_token(clean, N, block_size, start, cache, readout, ask)
        if cache is None and isinstance(block_size, int) and N and end <= block_size:
            clean = None  # every noisy token is in the first block: no one would read the clean stream
        streams = [s for s in (clean, noisy) if s is not None]
        x = torch.cat([self.embed_tokens(s) for s in streams], dim=1)  # (B, S, D)
        B, S, _ = x.shape
        C = S - N
        if not recorded and max(n_past + C, end) > self.cfg.seq_len:
            raise ValueError(
                f"positions up to {max(n_past + C, end)}, but the model has seq_len {self.cfg.seq_len}"
            )
        rope, mask = self.rope_and_mask(x, cache, C, N, block_size, start, end)
        level = None
        if (
            self.time is not None
            and cache is not None
            and not recorded
            and (sigma is None or sigma.numel() == 1 and sigma.is_cpu)
        ):
            if len(cache.levels) > 64:  # they take memory, and a sampler without a grid never meets one again
                cache.levels.clear()
            # one for all rows, known to the host
            level = cache.levels.setdefault((0.0 if sigma is None else float(sigma), C, N), {})
        cond = memoize(level, "cond", lambda: self.level_vectors(sigma, C)) if self.time is not None else None

        per_token = sigma is not None and sigma.dim() == 2
        assert ask is None or not per_token, "ask is for one noise level a row"
        ask = None if ask is None else tuple(send(i, x.device) for i in ask.nonzero(as_tuple=True))
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1  # nobody reads its clean outputs, only keys and values
            x = layer(
                x,
                C,
                C * last,
                rope,
                mask,
                cond,
                cache,
                i,
                ask if last else None,
                level,
            )
        if cache is not None:
            cache.commit(C)
        m = []
        if cond is not None:
            wide = lambda c: precise(self.modulation(c))
            m = memoize(level, "head", lambda: modulation(wide, cond[:, -N if per_token else -1 :], 2))
        if ask is not None:
            x, m = x[:, 0], [each(z, ask)[:, 0] for z in m]
        return self.head_of(x, readout, cache, *m)

    def rope_and_mask(self, x, cache, C, N, block_size, start, end):
        """
        What a pass knows of its tokens before it has seen any: rotary angles, and who may read whom. end: the
        position behind the last noisy token, or None in a recording.
        """
        n_past, one_start = 0 if cache is None else cache.length, not getattr(start, "ndim", 0)
        noisy_at = torch.arange(int(start), end, device=x.device) if one_start else send(start, x.device)
        at = torch.cat((n_past + torch.arange(C, device=x.device), noisy_at))
        rope, recorded = self.rope_table(at), torch.is_tensor(n_past)
        if C == 0 and one_start and isinstance(block_size, int):
            first = (end - 1) // block_size * block_size
            if n_past <= first <= int(start):
                return rope, None  # one block, and all it reads lies before it
        if cache is None and one_start and C == end:
            causal = self.cfg.clean_causal
            return rope, training_mask(x, self.cfg.n_heads, block_size, C, N, int(start), causal)
        width = cache.k.size(3) - N if recorded else None
        if recorded:
            cache.places = torch.cat((at[:C], width + torch.arange(N, device=x.device)))
        mask = attention_mask(block_size, n_past, C, N, noisy_at, self.cfg.clean_causal, x.device, width)
        return rope, added(x, mask)

    def next_token(self, clean, N, block_size, start, cache, readout, ask):
        """
        forward of a network without a noisy stream: clean (B, C) or None -> logits (B, N, V) of positions
        start..start+N-1, each read off the clean token before it, of this call or of the cache. Raises
        ValueError for other block sizes than 1, and for start 0.
        """
        if N and (not isinstance(block_size, int) or block_size != 1 or getattr(start, "ndim", 0)):
            raise ValueError(
                "a next-token network is autoregressive: "
                f"one stretch of positions at block size 1, not {block_size}"
            )
        if N and start == 0:
            raise ValueError(
                "a next-token network says nothing of the first token: "
                "a text must begin with a given one (bos_id)"
            )
        n_past = cache.length if cache is not None else 0
        C = 0 if clean is None else clean.size(1)
        if max(n_past + C, start + N) > self.cfg.seq_len:
            raise ValueError(
                f"positions up to {max(n_past + C, start + N)}, but the model has seq_len {self.cfg.seq_len}"
            )
        rows = slice(None) if cache is None or cache.rows is None else cache.rows
        out = cache.out[rows, :n_past] if cache is not None else None
        if C:
            x = self.embed_tokens(clean)
            rope = self.rope_table(torch.arange(n_past, n_past + C, device=x.device))
            mask = added(x, attention_mask(1, n_past, C, 0, 0, device=x.device))
            for i, layer in enumerate(self.layers):
                x = layer(x, C, 0, rope, mask, None, cache, i)
            if cache is not None:
                cache.out[rows, n_past : n_past + C] = x
                cache.commit(C)
                out = cache.out[rows, : n_past + C]
            else:
                out = x
        out = out[:, start - 1 : start - 1 + N] if N else out[:, :0]
        return self.head_of(out if ask is None else out[ask], readout, cache)

    def head_of(self, x, readout, cache, shift=None, stretch=None):
        """
        The head: a norm and the logits, added up and kept in float32 or better (of bfloat16 the uniform bound
        would see 3 digits).
        """
        with torch.autocast(x.device.type, enabled=False):
            x = F.layer_norm(precise(x), x.shape[-1:], precise(self.norm.weight))
            x = x if shift is None else modulate(x, stretch, shift)
            return (
                self.logits(x, cache)
                if readout is None
                else readout(x, precise(self.head.weight), precise(self.head.bias))
            )

    def logits(self, hidden, cache=None):
        """hidden (..., D), as a readout gets them, -> (..., V) float32 or better."""
        with torch.autocast(hidden.device.type, enabled=False):
            if self.head.weight.dtype == hidden.dtype:
                return linear(hidden, self.head, cache)
            return F.linear(hidden, precise(self.head.weight), precise(self.head.bias))

    def embed_tokens(self, tokens):
        """
        The vectors of ids (B, N), or of soft tokens: weights @ embeddings, in float32 (within machine.mixed
        on a GPU, of TF32).
        """
        with torch.autocast(self.embed.weight.device.type, enabled=False):
            if isinstance(tokens, tuple):
                ids, weights = tokens
                return (weights[..., None, :] @ self.embed(ids))[..., 0, :]
            if tokens.is_floating_point():
                return tokens @ self.embed.weight[: tokens.size(-1)]
            return self.embed(tokens)

    def rope_table(self, positions):
        """
        cos and sin of position * base^(-2i/d), (S, D/H) each, as `rotate` wants them, in float32 or better.
        """
        half = self.cfg.d_model // self.cfg.n_heads // 2
        dtype = torch.promote_types(self.embed.weight.dtype, torch.float32)
        angle = positions[:, None] * self.cfg.rope_base ** (
            -torch.arange(half, device=positions.device, dtype=dtype) / half
        )
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def level_vectors(self, sigma, C):
        """
        (B or 1, 1 or 2, cond_dim): one vector a stream; one for the clean stream and N more with a sigma (B,
        N). The clean stream sees sigma = 0 always, so that its cache holds for any t.
        """
        everywhere = sigma is None or self.cfg.condition_clean  # one level for both streams
        sigma = (
            self.embed.weight.new_zeros(1)
            if sigma is None
            else send(sigma, self.embed.weight.device, self.embed.weight.dtype)
        )
        streams = sigma.view(len(sigma), -1)
        if C and not everywhere:
            streams = torch.cat((torch.zeros_like(streams[:, :1]), streams), dim=1)
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=sigma.device) / 128)
        angle = precise(streams)[..., None] * frequency  # (B, 1 or 2, 128)
        return F.silu(self.time(torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.embed.weight)))


# ----- the cache


class FastCache(KVCache):
    """
    Keys and values of clean tokens at positions 0..length-1, in buffers (n_layers, B, H, max_len, D/H) that
    never grow; of a next-token network also the last layer's output, (B, max_len, D).
    A forward commits the clean tokens it was given and nothing else; noisy keys pass through the free space
    behind `length` and are forgotten. Setting `length` back forgets committed tokens (a verifier does: its
    block is a guess). With rows (R',), indices, the next forwards are of these rows of the B only; what they
    commit is of use to them alone. `length` may be a tensor (fast/graphs.py): then no shape depends on it.
    Attention reads the whole buffers, and noisy keys lie at their end.
    """

    def __init__(self, cfg, batch_size, max_len=None, device=None, dtype=torch.float32, out_dtype=None):
        shape = (
            cfg.n_layers,
            batch_size,
            cfg.n_heads,
            max_len or 2 * cfg.seq_len,
            cfg.d_model // cfg.n_heads,
        )
        self.k, self.v = (
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
        )
        # what the last layer made of each clean token: for a next-token network, the prediction of the one
        # behind it
        self.out = torch.zeros(
            batch_size,
            shape[3] if cfg.next_token else 0,
            cfg.d_model,
            device=device,
            dtype=out_dtype or dtype,
        )
        self.length, self.rows, self.places = 0, None, None
        self.kept = {}  # weights and angles as a pass wants them
        # what adaLN makes of a noise level, of all layers: a block after the other goes through the same ones
        self.levels = {}
        self.recorder = None

    def passes(self, model):
        """The passes of one text, recorded as CUDA graphs."""
        self.recorder = self.recorder or Recorded(model)
        return self.recorder

    def commit(self, n):
        self.length, self.places = self.length + n, None

    def extend(self, layer, k, v):
        """
        Put (B or R', H, S, D/H) behind the committed tokens and return views of everything up to them, of all
        B rows.
        """
        if self.places is not None:
            return [
                all_[layer].index_copy_(2, self.places, new.to(all_.dtype))
                for all_, new in ((self.k, k), (self.v, v))
            ]
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


def memoize(kept, what, make):
    """make(), or what it gave before: kept is a dict, or None."""
    if kept is None:
        return make()
    if what not in kept:
        kept[what] = make()
    return kept[what]


# ----- products


ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # a private operation, which not every build has


def by_onednn(x):
    """
    Whether products of x are oneDNN's: without gradients on a CPU, in float32, or in autocast's bfloat16
    where the CPU multiplies it.
    """
    plain = ONEDNN and x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not plain or not torch.is_autocast_enabled("cpu"):
        return plain and x.dtype == torch.float32
    return (
        x.dtype != torch.float64
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and torch.cpu._is_avx512_bf16_supported()
    )


def linear(x, layer, cache=None, gelu=False, rows=None):
    """
    layer(x), or with some rows of its weight (of a layer without bias), and GELU of that. Without gradients
    on a CPU by oneDNN: at the few tokens of a sampling pass it is 10 to 30 % faster than what F.linear calls,
    and it applies the GELU as it writes. The cache, which is of these very weights, keeps them in the order
    in which oneDNN reads them, rounded if need be: another 10 %, and half the time of a large
    head (docs/log.md).
    """
    if by_onednn(x):
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        key = layer, rows and rows.start, dtype
        weight = cache.kept.get(key, 0) if cache is not None else 0
        # how often it was wanted; packed the fourth time: a text of few passes is sooner without
        if isinstance(weight, int):
            count, weight = weight, (layer.weight if rows is None else layer.weight[rows]).to(dtype)
            if cache is not None:
                cache.kept[key] = (
                    count + 1
                    if count < 3
                    else torch.ops.mkldnn._reorder_linear_weight(weight, max(8, x[..., 0].numel()))
                )
        return torch.ops.mkldnn._linear_pointwise(
            x.to(dtype), weight, layer.bias, *(("gelu", [], "tanh") if gelu else ("none", [], ""))
        )
    y = F.linear(x, layer.weight if rows is None else layer.weight[rows], layer.bias)
    return F.gelu(y, approximate="tanh") if gelu else y
