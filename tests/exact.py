"""
What a random network does on an alphabet small enough to enumerate: every state, every transition, the whole distribution.
"""

import itertools
import math

import numpy as np
import torch

import diffusion as d
from generate import generate
from model import ModelConfig, Transformer

V3 = 3  # letters of the enumerable alphabet
P_VALUE = 1e-4


def chi_squared(counts, p):
    """Survival probability of Pearson's statistic, cells with an expected count below 5 pooled (Wilson-Hilferty)."""
    expected = p * counts.sum()
    small = expected < 5
    o = torch.cat((counts[~small], counts[small].sum()[None])).double()
    e = torch.cat((expected[~small], expected[small].sum()[None])).double()
    o, e = o[e > 0], e[e > 0]
    if counts[p == 0].sum() > 0:
        return 0.0
    k = len(o) - 1
    assert k > 0, "one cell only: nothing to test"
    z = (((o - e) ** 2 / e).sum() / k) ** (1 / 3)
    z = (z - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return 0.5 * math.erfc(z / math.sqrt(2))


def states(V, L):
    return torch.tensor(list(itertools.product(range(V), repeat=L)))


def noise(rows, L=1, seed=0):
    return d.Noise(seed, torch.arange(rows), torch.arange(L))


def net(process, seed=0, seq_len=8, **kw):
    """A small Transformer with random weights and peaked outputs."""
    torch.manual_seed(seed)
    extra = 1 if getattr(process, "ar_token", None) is not None else 0
    model = Transformer(
        ModelConfig(process.vocab_size, seq_len, n_layers=2, n_heads=2, d_model=16, cond_dim=8, n_extra_tokens=extra, **kw)
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.5)
    return model


def say(logits, readout=None):
    """What a made-up network returns: its logits, or what a loss reads out of them as hidden states."""
    V = logits.size(-1)
    return logits if readout is None else readout(logits, torch.eye(V).to(logits), torch.zeros(V).to(logits))


def kernel(model, process, context, b, n_fixed, a_t, a_s, **kw):
    """Exact one-step kernel (m, m) on the V^b states of the block behind `context`, whose first n_fixed tokens are prompt."""
    x = states(process.vocab_size, b)
    with torch.no_grad():
        logits = model(context.expand(len(x), -1), x, b, start=context.size(0), sigma=d.sigma(torch.tensor(a_t)).expand(len(x)))
    p = process.posterior_probs(logits, x, a_t, a_s, **kw)  # (m, b, V)
    free = torch.stack([p[:, i, x[:, i]] for i in range(n_fixed, b)]).prod(0)
    return free * (x[:, None, :n_fixed] == x[None, :, :n_fixed]).all(-1)


def enumerated(model, process, b, steps, L, prompt=(), **kw):
    """The exact distribution of blockwise ancestral sampling, by matrix products: {sequence: probability}."""
    done = {(): 1.0}
    grid = d.loglinear(torch.linspace(1, 0, steps + 1, dtype=torch.float64))[0].tolist()
    x = states(process.vocab_size, b)
    for n in range(0, L, b):
        longer, fixed = {}, torch.tensor(prompt[n : n + b], dtype=torch.long)
        k = len(fixed)
        prior = (
            (x[:, k:] == process.mask_id).all(-1).double()
            if isinstance(process, d.Masked)
            else torch.full((len(x),), process.vocab_size ** -float(b - k))
        )
        for context, weight in done.items():
            p = prior.double() * (x[:, :k] == fixed).all(-1)
            for a_t, a_s in zip(grid[:-1], grid[1:], strict=True) if k < b else ():
                p = p @ kernel(model, process, torch.tensor(context, dtype=torch.long), b, k, a_t, a_s, **kw)
            longer.update({context + tuple(state): weight * q for state, q in zip(x.tolist(), p.tolist(), strict=True) if q > 0})
        done = longer
    return done


def forward_probs(process, x0, xt, alpha):
    """q(xt_i | x0_i) for all pairs of rows: (n, L) x (m, L) -> (n, m, L)."""
    same, masked = x0[:, None] == xt[None], isinstance(process, d.Masked)
    return alpha * same + (1 - alpha) * ((xt[None] == process.mask_id).double() if masked else 1 / process.vocab_size)


def quadrature(model, process, x0, b, end=0.0):
    """
    The bound of every row of x0 (n, L), (n,) float64, by Gauss-Legendre over t in (end, 1) and a sum over every x_t of every block;
    end > 0: and what the last step from there costs.
    """
    node, weight = np.polynomial.legendre.leggauss(40)
    s, w = (node + 1) / 2, weight / 2
    root = math.sqrt(end)
    times = [((root + (1 - root) * u) ** 2, 2 * (1 - root) * (root + (1 - root) * u) * v) for u, v in zip(s, w, strict=True)]
    bound, xt = torch.zeros(len(x0), dtype=torch.float64), states(process.vocab_size, b)
    for t, w in [*times, (end, None)] if end else times:
        alpha = torch.tensor([1 - t], dtype=torch.float64)
        for j, seq in enumerate(x0):
            for i in range(0, x0.size(1), b):
                q = forward_probs(process, seq[None, i : i + b], xt, alpha.item()).prod(-1)[0]
                m = q > 0
                with torch.no_grad():
                    z = model(seq[None, :i].expand(int(m.sum()), -1), xt[m], b, start=i, sigma=d.sigma(alpha).expand(int(m.sum()))).double()
                x = seq[None, i : i + b].expand(int(m.sum()), -1)
                if w is None:
                    each = -process.denoiser_logits(z, xt[m], alpha).log_softmax(-1).gather(-1, x[..., None])[..., 0].sum(-1)
                else:
                    each = w * process.nll(z, x, xt[m], alpha, -torch.ones(1)).sum(-1)
                bound[j] += (q[m] * each).sum()
    return bound


def last(iterator):
    for state in iterator:
        pass
    return state


KINDS = {
    "masked": (lambda: d.Masked(V3 + 1, V3), {}),
    "uniform loo": (lambda: d.Uniform(V3), {}),
    "uniform denoiser, timed": (lambda: d.Uniform(V3, "denoiser"), {"time_conditioning": True}),
    "uniform denoiser, ar token": (lambda: d.Uniform(V3, "denoiser", ar_token=V3), {"time_conditioning": True}),
}


def enumerated_ar(model, process, L):
    done = {(): 1.0}
    for n in range(L):
        probe = process.ar_input((1, 1))
        longer = {}
        for context, w in done.items():
            ctx = torch.tensor([context], dtype=torch.long)
            with torch.no_grad():
                z = model(ctx, probe, 1, start=n, sigma=d.sigma(torch.zeros(1)))
            for v, q in enumerate(process.posterior_probs(z, process.prior((1, 1)), 0.0, 1.0)[0, 0].tolist()):
                longer[(*context, v)] = longer.get((*context, v), 0) + w * q
        done = longer
    return {k: v for k, v in done.items() if v > 0}


# ----- samplers, through the loop itself


def quick(model):
    """The same network, which reads equal rows once: 1e5 draws on an enumerable alphabet are a few hundred different inputs."""
    forward, timed = model.forward, model.time is not None

    def unique(clean, noisy, block_size, start=0, sigma=None, cache=None, ask=None):
        assert cache is None, "use_cache=False: rows are what the network is asked"
        parts = [clean.double(), noisy.double()] + ([sigma.view(len(sigma), -1).double().expand(len(noisy), -1)] if timed else [])
        rows, back = torch.cat(parts, dim=1).unique(dim=0, return_inverse=True)
        c, n = clean.size(1), noisy.size(1)
        level = None if not timed else rows[:, c + n :].reshape(-1) if sigma.dim() == 1 else rows[:, c + n :]
        logits = forward(rows[:, :c].long(), rows[:, c : c + n].long(), block_size, start, level)[back]
        return logits if ask is None else logits[ask]

    model.forward = unique
    return model


def blocks(model, process, b, n, sampler, seed=0, prompt=(), **kw):
    """Counts (V^b,) of the blocks that n runs of a sampler end in; letters only, no mask. Rows are states(V, b) in order."""
    prompts = torch.tensor([prompt] * n, dtype=torch.long)
    kw = {"max_new_tokens": b - len(prompt), "seed": seed, "use_cache": False, **kw}
    run = generate(model, process, prompts, block_size=b, sampler=sampler, **kw)
    return code(last(run).x, V3).bincount(minlength=V3**b)


def code(x, V):
    """The row of states(V, L) that x (n, L) is."""
    return (x * V ** torch.arange(x.size(1) - 1, -1, -1)).sum(-1)


def letters(p, process, b):
    """A distribution over states(V, b) as one over states(V3, b): the mask must have no mass left."""
    x = states(process.vocab_size, b)
    real = (x < V3).all(-1)
    assert p[~real].sum() < 1e-9, f"{p[~real].sum():.2e} of the mass still has masks"
    return p[real]


def network(model, process, b, alpha):
    """Every state x (m, b) of a block without context, and the logits (m, b, V) of the network there."""
    x = states(process.vocab_size, b)
    with torch.no_grad():
        return x, model(x[:, :0], x, b, 0, d.sigma(torch.as_tensor(alpha, dtype=torch.float64)).expand(len(x))).double()


def product(p, x):
    """Independent tokens: p (m, b, V) -> (m, m), the probability of every state of x."""
    return torch.stack([p[:, i, x[:, i]] for i in range(x.size(1))]).prod(0)


def prior(process, b):
    x = states(process.vocab_size, b)
    return (x == process.mask_id).all(-1).double() if process.mask_id is not None else torch.full((len(x),), float(len(x)) ** -1).double()


def ar_probs(model, process, y):
    """p_AR(y_i | y_<i) over the vocabulary, (m, b, V), one token after another: for y (m, b)."""
    out = []
    for i in range(y.size(1)):
        ask = process.ar_input((len(y), 1))
        with torch.no_grad():
            logits = model(y[:, :i], ask, 1, i, d.sigma(torch.zeros(len(y)))).double()
        out.append(process.posterior_probs(logits, process.prior((len(y), 1)), 0.0, 1.0)[:, 0])
    return torch.stack(out, dim=1)
