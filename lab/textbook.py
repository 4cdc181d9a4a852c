"""
What would one write first? The two-stream network, its losses and its samplers as the papers spell them out, without one saving.

The weights are those of a model.Transformer, and what comes out is the same (tests/test_bench.py), so that bench.py can say what the
savings are worth: [x0 | xt] goes through every layer whole, with a dense boolean mask and the head on all 2T tokens; the
loss takes a log-softmax of everything (uniform: r and r_hat over the whole vocabulary); the sampler builds dense float64
posteriors and a float64 Gumbel for every entry, runs every row at every step, and grows its cache by concatenation.
"""

import torch

import diffusion as d
from fast.attention import attention_mask


def forward(model, clean, noisy, block_size, start=0, sigma=None, cache=None):
    """model.forward without its savings: every token through every layer and the head, a dense mask, adaLN written out a token."""
    n_past = cache.length if cache is not None else 0
    C, N, device = clean.size(1), noisy.size(1), noisy.device
    position = torch.cat((torch.arange(n_past, n_past + C), torch.arange(start, start + N))).to(device)
    cond = None if model.time is None else model._condition(sigma, C)
    each = lambda m: torch.cat((m[:, :1].expand(-1, C, -1), m[:, -1:].expand(-1, N, -1)), dim=1)  # one vector a stream to one a token
    mask = attention_mask(block_size, n_past, C, N, start, device=device)[:, None]
    x, rope = model.embed(torch.cat((clean, noisy), 1)), model._rope(position)
    for i, layer in enumerate(model.layers):
        m = None if cond is None else [each(y) for y in layer.modulation(cond).chunk(6, dim=-1)]
        x = layer_forward(layer, x, rope, mask, m, cache, i)
    if cache is not None:
        cache.commit(C)
    x = model.norm(x)
    if cond is not None:
        shift, scale = model.modulation(cond[:, -1:]).chunk(2, -1)
        x = x * (1 + scale) + shift
    return model.head(x)[:, C:]


def layer_forward(layer, x, rope, mask, m, cache, i):
    """model.Layer as the papers write it."""
    shift1, scale1, gate1, shift2, scale2, gate2 = m or [None] * 6
    heads = lambda y: y.unflatten(-1, (layer.n_heads, -1)).transpose(1, 2)
    h = layer.norm1(x) * (1 + scale1) + shift1 if m else layer.norm1(x)
    q, k, v = map(heads, layer.qkv(h).chunk(3, dim=-1))
    cos, sin, turned = rope[0].chunk(2, dim=-1)[1], rope[1].chunk(2, dim=-1)[1], []
    for a, b in (y.chunk(2, dim=-1) for y in (q, k)):
        turned.append(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))
    k, v = (turned[1], v) if cache is None else cache.extend(i, turned[1], v)
    y = torch.nn.functional.scaled_dot_product_attention(turned[0], k, v, attn_mask=mask)
    y = layer.out(y.transpose(1, 2).flatten(2))
    x = x + gate1 * y if m else x + y
    h = layer.norm2(x) * (1 + scale2) + shift2 if m else layer.norm2(x)
    return x + gate2 * layer.mlp(h) if m else x + layer.mlp(h)


class GrowingCache:
    """Keys and values by concatenation, the interface of cache.KVCache."""

    def __init__(self, n_layers):
        self.length, self.k, self.v, self.new = 0, [None] * n_layers, [None] * n_layers, [None] * n_layers

    def extend(self, i, k, v):
        self.new[i] = (k, v) if self.k[i] is None else (torch.cat((self.k[i], k), 2), torch.cat((self.v[i], v), 2))
        return self.new[i]

    def commit(self, n):
        self.cut(self.length + n)

    def cut(self, length):
        self.length = length
        self.k, self.v = [k[:, :, :length] for k, _ in self.new], [v[:, :, :length] for _, v in self.new]


def nll(process, logits, x0, xt, alpha, dalpha):
    """The sums of Masked.nll and Uniform.nll written out, one (B, L, V) float32 tensor after another. alpha, dalpha (B, 1)."""
    if isinstance(process, d.Masked):
        logp = logits.index_fill(-1, torch.tensor(process.mask_id, device=logits.device), -1e6).log_softmax(-1)
        seen = torch.full_like(logp, -1e6).scatter(-1, xt[..., None], 0.0)
        logp = torch.where((xt == process.mask_id)[..., None], logp, seen)
        return -dalpha / (1 - alpha) * -logp.gather(-1, x0[..., None])[..., 0]
    V, a = process.vocab_size, alpha[..., None].to(logits.dtype)  # a float64 alpha would make every tensor below float64
    p = process.loo_logits(logits, xt, alpha).softmax(-1)
    xb, xb_hat = V * a * torch.nn.functional.one_hot(x0, V) + 1 - a, V * a * p + 1 - a
    z = xt[..., None]
    r, r_hat = xb / xb.gather(-1, z), xb_hat / xb_hat.gather(-1, z)
    return -dalpha / (V * alpha) * (r * (r / r_hat).log() - r + r_hat).sum(-1)


@torch.no_grad()
def generate(model, process, B, T, b, steps, guided=False):
    """B texts of T tokens by the ancestral sampler; guided: by ARPC, the first block by AR (BlockGen, arXiv 2606.02241)."""
    device = model.embed.weight.device
    x = process.prior((B, T), device=device)
    cache, grid = GrowingCache(len(model.layers)), torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()

    def ask(clean, noisy, size, start, alpha):
        """Logits; the text up to `start` is committed, `clean` behind it is not."""
        past, level = cache.length, d.sigma(torch.full((B,), alpha, device=device, dtype=torch.float64))
        logits = forward(model, torch.cat((x[:, past:start], clean), 1), noisy, size, start, level, cache)
        cache.cut(start)
        return logits

    def draw(logits, xt, a_t, a_s):
        probs = process.posterior_probs(logits, xt, a_t, a_s)
        return (probs.log() - torch.empty_like(probs).exponential_().log()).argmax(-1)

    for i in range(b if guided else 0):
        one = process.ar_input((B, 1), device=device)
        x[:, i : i + 1] = draw(ask(one[:, :0], one, 1, i, 0.0), x[:, i : i + 1], 0.0, 1.0)
    for i in range(b if guided else 0, T, b):
        for k in range(steps):
            a_t, a_s, block = grid[k], grid[k + 1], x[:, i : i + b]
            logits = ask(block[:, :0], block, b, i, a_t)
            if not guided or k + 1 == steps:
                x[:, i : i + b] = draw(logits, block, a_t, a_s)
                continue
            y, noise, probe = draw(logits, block, a_t, 1.0), process.prior((B, b), device=device), process.ar_input((B, b), device=device)
            logp = process.loo_logits(ask(y, probe, 1, i, 0.0), block, 0.0).log_softmax(-1)
            worst = (-logp.gather(-1, y[..., None])[..., 0]).argsort(dim=1, descending=True)[:, : int((1 - a_s) * b + 0.5)]
            x[:, i : i + b] = y.scatter(1, worst, noise.gather(1, worst))
    return x
