"""
What is the network? One transformer that reads a clean stream and a noisy stream.

Every token has a kind (clean or noisy) and a position. With block size b:

    clean at i  attends to  clean at j   iff  j <= i          (or j//b <= i//b, if not cfg.clean_causal)
    noisy at i  attends to  clean at j   iff  j//b <  i//b    (everything before its own block)
                            noisy at j   iff  j//b == i//b    (its own block, in both directions)

That rule is the whole model. Training, generating, verifying, AR and full diffusion are the same forward:

    use               clean tokens in                           noisy tokens in              b
    train             positions 0..T-1                          positions 0..T-1             any, one per row
    generate a block  the block before (earlier: in the cache)  one block                    the block size
    verify            the proposed block                        pure noise, same positions   1
    autoregressive    the last token                            one pure-noise token         1
    full diffusion    none                                      positions 0..T-1             T

The layers are BlockGen's (arXiv 2606.02241), a pre-LN DiT (arXiv 2212.09748): LayerNorm with a gain only,
rotary positions, GELU-tanh MLP, untied head with bias, and adaLN time conditioning if asked for.

Letters: B rows, C clean tokens, N noisy tokens, S = C + N, D width, H heads, V vocabulary. `block_size` is
the denoised block, `seq_len` the context, `Layer` a transformer layer. fast/network.py is the same, fast.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelConfig:
    vocab_size: int  # V: logits per position, the mask token included for masked noise
    seq_len: int  # T: positions 0..T-1 exist
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 128
    mlp_ratio: int = 4
    n_extra_tokens: int = 0  # input ids V, V+1, ... that are read but never predicted
    clean_causal: bool = True  # False: block-causal clean stream, for one block size only
    time_conditioning: bool = False  # adaLN: the noisy stream sees sigma = -log(alpha_t)
    condition_clean: bool = False  # published BlockGen weights: both streams see sigma
    zero_sigma: bool = False  # adaLN is there, but sigma was always 0 in training (published MDLM weights)
    cond_dim: int = 128
    rope_base: float = 10000.0
    next_token: bool = False  # no noisy stream: an ordinary AR transformer
    dropout: float = 0.0  # of what attention and the MLP add, in training


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864): j pairs with j + D/2H. x (B, H, S, D/H); cos, sin (S, D/2H)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def adaln(modulation, cond, n):
    """adaLN (arXiv 2212.09748): n of shift, scale, gate, shift, ... (B, S, D), from cond (B, S, cond_dim)."""
    return (0, 0, 1, 0, 0, 1)[:n] if cond is None else modulation(cond).chunk(n, dim=-1)  # None: no change


def attention_mask(edge, group, n_clean_keys):
    """
    The rule, (B or 1, S, keys) bool: may a query (row) read a key (column)? Keys: all clean tokens, then the
    noisy ones. A token reads the clean tokens before its `edge` and the noisy tokens of its `group`, both
    (B or 1, S); clean tokens have group -1. With block_size 2 and four positions:

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
    clean = torch.arange(n_clean_keys, device=edge.device) < edge[..., None]
    noisy = group[..., None] == group[:, None, (group[0] >= 0)]
    return torch.cat((clean, noisy), dim=-1)


class KVCache:
    """
    Keys and values (B, H, keys, D/H) of each layer. A pass reads all it has just seen, and commits the clean
    tokens: `length` of them are kept. Set `length` back to forget some: a verifier's block is a guess.
    """

    def __init__(self, n_layers):
        self.k, self.v, self.length = [None] * n_layers, [None] * n_layers, 0

    def extend(self, i, k, v):
        """Keys and values of layer i: the committed ones, then the new ones of this pass."""
        if self.k[i] is not None:
            k = torch.cat((self.k[i][:, :, : self.length], k), dim=2)
            v = torch.cat((self.v[i][:, :, : self.length], v), dim=2)
        self.k[i], self.v[i] = k, v
        return k, v

    def commit(self, n):
        """The first n new tokens of this pass are finished text: the next pass finds them here."""
        self.length += n

    def keep(self, rows):
        """Drop the batch rows not in `rows`, (R,) indices."""
        self.k, self.v = ([x if x is None else x[rows] for x in both] for both in (self.k, self.v))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D, wide = cfg.d_model, cfg.mlp_ratio * cfg.d_model
        self.n_heads = cfg.n_heads
        self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.mlp = nn.Sequential(nn.Linear(D, wide), nn.GELU("tanh"), nn.Linear(wide, D))
        self.modulation = nn.Linear(cfg.cond_dim, 6 * D) if cfg.time_conditioning else None
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, rope, mask, cond=None, cache=None, i=0):
        """x (B, S, D). rope: cos, sin. mask (B or 1, 1, S, keys) bool. cond (B or 1, S, cond_dim) or None."""
        shift1, scale1, gate1, shift2, scale2, gate2 = adaln(self.modulation, cond, 6)
        heads = lambda y: y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, S, D) -> (B, H, S, D/H)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (heads(y) for y in self.qkv(h).chunk(3, dim=-1))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.extend(i, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + gate1 * self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.dropout(self.mlp(h))


class Transformer(nn.Module):
    """logits = model(clean, noisy, block_size): see forward. At initialisation all ids are equally likely."""

    def __init__(self, cfg):
        super().__init__()
        assert cfg.d_model % (2 * cfg.n_heads) == 0, f"{cfg.n_heads} heads of {cfg.d_model}: odd width"
        assert not (cfg.next_token and cfg.time_conditioning), "a next-token network sees no noise"
        self.cfg, D, E, timed = cfg, cfg.d_model, cfg.cond_dim, cfg.time_conditioning
        self.embed = nn.Embedding(cfg.vocab_size + cfg.n_extra_tokens, D)
        self.time = nn.Sequential(nn.Linear(256, E), nn.SiLU(), nn.Linear(E, E)) if timed else None
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layers))
        self.norm = nn.LayerNorm(D, bias=False)
        self.modulation = nn.Linear(E, 2 * D) if timed else None
        self.head = nn.Linear(D, cfg.vocab_size)
        nn.init.normal_(self.embed.weight, std=0.3)  # not the reference's +-D**-0.5: see docs/log.md
        for zero in [self.head, self.modulation] + [layer.modulation for layer in self.layers]:
            if zero is not None:  # uniform logits; with adaLN every gate is shut too
                nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)

    @property
    def timeless(self):
        """Is a prediction the same at every noise level? It has no such input, or one that was always 0."""
        return self.time is None or self.cfg.zero_sigma

    def new_cache(self, batch_size, max_len):
        """An empty cache, which grows. The arguments are for fast/, which allocates it whole."""
        return KVCache(len(self.layers))

    def forward(self, clean, noisy, block_size, start=0, sigma=None, cache=None, **extra):
        """
        clean (B, C) int64, or None   real tokens at positions cache.length, ... (0, 1, ... without a cache)
        noisy (B, N) int64, or None   at positions start, start + 1, ...; or soft tokens, see embed_tokens
        block_size  int; or (B,), one a row; or (1 or B, N), one a noisy token. Sizes do not see each other
        start       the position of the first noisy token, an int; or (N,), the position of each
        sigma (B,) or (1,), or (B, N)  noise level -log(alpha_t); zeros if None; unused without conditioning
        cache       a KVCache: the clean tokens before. `clean` is committed to it
        extra       for methods: goes to embed_noisy and condition
        Returns logits (B, N, V), float32 or better, not normalised; ValueError for positions beyond seq_len.
        """
        if self.cfg.next_token:
            return self.forward_next_token(clean, noisy, block_size, start, cache)
        C = 0 if clean is None else clean.size(1)
        h, cond = self.hidden(clean, noisy, block_size, start, sigma, cache, **extra)
        return self.to_logits(h[:, C:], None if cond is None else cond[:, C:])

    def hidden(self, clean, noisy, block_size, start=0, sigma=None, cache=None, **extra):
        """The stream before the final norm, (B, C + N, D), and its cond or None. Arguments as in forward."""
        C, n_past = 0 if clean is None else clean.size(1), 0 if cache is None else cache.length
        streams = [] if clean is None else [self.embed_tokens(clean)]
        x = torch.cat(streams if noisy is None else [*streams, self.embed_noisy(noisy, **extra)], dim=1)
        N = x.size(1) - C
        position, edge, group = self.layout(block_size, start, n_past, C, N, x.device)
        if position.numel() and position.max() >= self.cfg.seq_len:
            raise ValueError(f"position {int(position.max())} is beyond seq_len {self.cfg.seq_len}")
        rope, cond = self.rope(position), self.condition(sigma, C, N, **extra)
        mask = attention_mask(edge, group, n_past + C)[:, None]
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cond, cache, i)
        if cache is not None:
            cache.commit(C)
        return x, cond

    def layout(self, block_size, start, n_past, C, N, device):
        """position (S,), edge and group (B or 1, S), clean tokens first: what attention_mask needs."""
        clean = n_past + torch.arange(C, device=device)
        start = torch.as_tensor(start, device=device)
        noisy = start if start.dim() else start + torch.arange(N, device=device)
        b = torch.as_tensor(block_size, device=device)
        b = b if b.dim() == 2 else b.view(-1, 1)  # (B or 1, N or 1)
        clean_edge = (clean + 1).expand(len(b), C) if self.cfg.clean_causal else (clean // b + 1) * b
        edge = (noisy // b * b).expand(len(b), N)
        group = edge * 2**20 + b  # one number for each pair of block and block size
        groups = torch.cat((torch.full_like(clean_edge, -1), group), dim=1)
        return torch.cat((clean, noisy)), torch.cat((clean_edge, edge), dim=1), groups

    def embed_tokens(self, tokens):
        """
        (B, N, D) of ids (B, N). Or of soft tokens, mixtures of embeddings: weights (B, N, V) of the first V
        ids, or a pair of ids (B, N, k) and their weights (B, N, k).
        """
        if isinstance(tokens, tuple):
            ids, weights = tokens
            return (weights[..., None] * self.embed(ids)).sum(-2)
        if tokens.is_floating_point():
            with torch.autocast(tokens.device.type, enabled=False):  # ids are not rounded either
                return tokens @ self.embed.weight[: tokens.size(-1)]
        return self.embed(tokens)

    def embed_noisy(self, tokens, **extra):
        """embed_tokens of the noisy stream: a method may add to it."""
        return self.embed_tokens(tokens)

    def condition(self, sigma, C, N, **extra):
        """(B or 1, C + N, cond_dim) of sigma, or None. Clean tokens see 0, so a cache holds for any sigma."""
        if self.time is None:
            return None
        sigma = torch.zeros(1) if sigma is None else sigma
        sigma = sigma.to(self.embed.weight).view(len(sigma), -1)  # (B or 1, 1 or N)
        clean = sigma[:, :1] if self.cfg.condition_clean else torch.zeros_like(sigma[:, :1])
        level = torch.cat((clean.expand(-1, C), sigma.expand(-1, N)), dim=1)
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=level.device) / 128)
        angle = level[..., None] * frequency  # (B or 1, S, 128)
        return F.silu(self.time(torch.cat((angle.cos(), angle.sin()), dim=-1).to(level))).to(level)

    def rope(self, position):
        """cos and sin of position * base^(-2i/d), (S, D/2H) each, in float32 or better."""
        half = self.cfg.d_model // self.cfg.n_heads // 2
        dtype = torch.promote_types(self.embed.weight.dtype, torch.float32)
        exponent = -torch.arange(half, device=position.device, dtype=dtype) / half
        angle = position[:, None] * self.cfg.rope_base**exponent
        return angle.cos(), angle.sin()

    def to_logits(self, h, cond=None):
        """The final norm and the head, (..., D) -> (..., V), float32 or better whatever the weights are."""
        wide = torch.promote_types(h.dtype, torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            shift, scale = adaln(self.modulation, cond, 2)
            h = self.norm(h) * (1 + scale) + shift
            return F.linear(h.to(wide), self.head.weight.to(wide), self.head.bias.to(wide))

    def forward_next_token(self, clean, noisy, block_size, start, cache):
        """
        forward of an ordinary AR transformer (the papers' baseline): a clean stream only. Position i is read
        off the clean token at i - 1. Raises ValueError for other block sizes, and for position 0.
        """
        n_past, N = 0 if cache is None else cache.length, 0 if noisy is None else noisy.size(1)
        size, at = torch.as_tensor(block_size), torch.as_tensor(start)
        if N and (size.dim() or at.dim() or size != 1 or at <= max(0, n_past)):
            raise ValueError("a next-token network has block size 1, and reads the token before (bos_id) too")
        if start + N > self.cfg.seq_len:
            raise ValueError(f"positions up to {start + N}, but the model has seq_len {self.cfg.seq_len}")
        h, _ = self.hidden(clean, None, 1, cache=cache)
        first = start - 1 - n_past  # where in `clean` the token before `start` is
        return self.to_logits(h[:, first : first + N] if N else h[:, :0])


if __name__ == "__main__":
    print(__doc__)
