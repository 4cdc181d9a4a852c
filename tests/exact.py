"""
What a random network does on an alphabet small enough to enumerate: every state, every transition, the whole
distribution.
"""

import itertools
import math

import numpy as np
import torch

import diffusion as d
import fast
import generate as lesson
from fast.block import generate
from methods import duo
from model import ModelConfig, Transformer
from rng import Noise

V3 = 3  # letters of the enumerable alphabet
# a right sampler misses it in one of 10^4 tests, as it does 4 standard errors in one of 16,000; all draws
# have fixed seeds
P_VALUE = 1e-4


def chi_squared(counts, p):
    """
    Survival probability of Pearson's statistic, cells with an expected count below 5 pooled (Wilson-
    Hilferty).
    """
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


def one_source(a, b):
    """Survival probability of the chi-squared statistic of two samples, (K,) counts of as many draws."""
    both = a + b
    rare = both < 10
    pool = lambda x: torch.cat((x[~rare], x[rare].sum()[None])).double()
    a, b = pool(a), pool(b)
    a, b, k = a[a + b > 0], b[a + b > 0], int((a + b > 0).sum()) - 1
    z = (((a - b) ** 2 / (a + b)).sum() / k) ** (1 / 3)
    return 0.5 * math.erfc((z - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k)) / math.sqrt(2))


def agree(ours, want, near=1e-9):
    """
    Two computations of one thing, both in float64, whatever the processor: nowhere further apart than `near`
    times its largest number. ours, want: tensors, or lists of them.
    """
    if not torch.is_tensor(want):
        for a, b in zip(ours, want, strict=True):
            agree(a, b, near)
        return
    assert ours.dtype == want.dtype == torch.float64 and ours.shape == want.shape, (
        f"{ours.dtype} {ours.shape}, {want.dtype} {want.shape}"
    )
    gap, size = ((ours - want).abs().max().item(), want.abs().max().item()) if want.numel() else (0.0, 0.0)
    assert gap <= near * size + 1e-15, f"{gap:.2e} apart, largest number {size:.2e}"


EPS32 = torch.finfo(torch.float32).eps  # 2^-23


def rounded(ours, want, times, size=None):
    """
    What is computed in float32, against float64: nowhere further off than `times` EPS32 of its largest
    number, or of `size`.
    """
    assert want.dtype == torch.float64 and ours.shape == want.shape, (
        f"{want.dtype} {want.shape}, {ours.shape}"
    )
    off = (
        (ours.double() - want).abs().max().item()
        / EPS32
        / (want.abs().max().item() if size is None else size)
    )
    assert off <= times, f"off by {off:.1f} eps of the largest number, allowed {times}"


def soft_in_float64(monkeypatch):
    """
    Soft tokens are made in float64 and rounded to float32 for the network: a network in float64 gets those
    numbers in float64.
    """
    harden = duo.Relaxation.harden
    wide = lambda soft: soft.double() if torch.is_tensor(soft) else (soft[0], soft[1].double())
    monkeypatch.setattr(duo.Relaxation, "harden", lambda *a: wide(harden(*a)))


def states(V, L):
    return torch.tensor(list(itertools.product(range(V), repeat=L)))


def noise(rows, L=1, seed=0):
    return Noise(seed, torch.arange(rows), torch.arange(L))


def net(process, seed=0, seq_len=8, **kw):
    """A small Transformer with random weights and peaked outputs."""
    torch.manual_seed(seed)
    extra = int(
        process.mask_id is not None or getattr(process, "ar_token", None) is not None
    )  # of masked noise nobody reads it
    model = Transformer(
        ModelConfig(
            process.vocab_size,
            seq_len,
            n_layers=2,
            n_heads=2,
            d_model=16,
            cond_dim=8,
            n_extra_tokens=extra,
            **kw,
        )
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.5)
    return model


def speed(model, process):
    """The same network and process in their fast forms; fails if anything steps aside."""
    model, process, notes = fast.accelerate(model, process)
    assert not notes, notes
    return model, process


GENERATE = {"fast": generate, "lesson": lesson.generate}  # what runs by default, and what --plain runs


def on(path, model, process):
    """The network and the process in the form in which GENERATE[path] is tested."""
    return speed(model, process) if path == "fast" else (model, process)


def say(logits, readout=None):
    """What a made-up network returns: its logits, or what a loss reads out of them as hidden states."""
    V = logits.size(-1)
    return logits if readout is None else readout(logits, torch.eye(V).to(logits), torch.zeros(V).to(logits))


def kernel(model, process, context, b, n_fixed, a_t, a_s, **kw):
    """
    Exact one-step kernel (m, m) on the V^b states of the block behind `context`, whose first n_fixed tokens
    are prompt.
    """
    x = states(process.vocab_size, b)
    with torch.no_grad():
        logits = model(
            context.expand(len(x), -1),
            x,
            b,
            start=context.size(0),
            sigma=d.sigma(torch.tensor(a_t, dtype=torch.float64)).expand(len(x)),
        )
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
            longer.update(
                {
                    context + tuple(state): weight * q
                    for state, q in zip(x.tolist(), p.tolist(), strict=True)
                    if q > 0
                }
            )
        done = longer
    return done


def forward_probs(process, x0, xt, alpha):
    """q(xt_i | x0_i) for all pairs of rows: (n, L) x (m, L) -> (n, m, L)."""
    same, masked = x0[:, None] == xt[None], isinstance(process, d.Masked)
    return alpha * same + (1 - alpha) * (
        (xt[None] == process.mask_id).double() if masked else 1 / process.vocab_size
    )


def quadrature(model, process, x0, b, end=0.0):
    """
    The bound of every row of x0 (n, L), (n,) float64, by Gauss-Legendre over t in (end, 1) and a sum over
    every x_t of every block; end > 0: and what the last step from there costs.
    """
    node, weight = np.polynomial.legendre.leggauss(40)
    s, w = (node + 1) / 2, weight / 2
    root = math.sqrt(end)
    times = [
        ((root + (1 - root) * u) ** 2, 2 * (1 - root) * (root + (1 - root) * u) * v)
        for u, v in zip(s, w, strict=True)
    ]
    bound, xt = torch.zeros(len(x0), dtype=torch.float64), states(process.vocab_size, b)
    for t, w in [*times, (end, None)] if end else times:
        alpha = torch.tensor([1 - t], dtype=torch.float64)
        for j, seq in enumerate(x0):
            for i in range(0, x0.size(1), b):
                q = forward_probs(process, seq[None, i : i + b], xt, alpha.item()).prod(-1)[0]
                m = q > 0
                with torch.no_grad():
                    z = model(
                        seq[None, :i].expand(int(m.sum()), -1),
                        xt[m],
                        b,
                        start=i,
                        sigma=d.sigma(alpha).expand(int(m.sum())),
                    ).double()
                x = seq[None, i : i + b].expand(int(m.sum()), -1)
                if w is None:
                    each = (
                        -process.denoiser_logits(z, xt[m], alpha)
                        .log_softmax(-1)
                        .gather(-1, x[..., None])[..., 0]
                        .sum(-1)
                    )
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
    "uniform denoiser, ar token": (
        lambda: d.Uniform(V3, "denoiser", ar_token=V3),
        {"time_conditioning": True},
    ),
}


def enumerated_ar(model, process, L):
    done = {(): 1.0}
    for n in range(L):
        probe = process.ar_input((1, 1))
        longer = {}
        for context, w in done.items():
            ctx = torch.tensor([context], dtype=torch.long)
            with torch.no_grad():
                z = model(ctx, probe, 1, start=n, sigma=d.sigma(torch.zeros(1).double()))
            for v, q in enumerate(process.posterior_probs(z, process.prior((1, 1)), 0.0, 1.0)[0, 0].tolist()):
                longer[(*context, v)] = longer.get((*context, v), 0) + w * q
        done = longer
    return {k: v for k, v in done.items() if v > 0}


# ----- samplers, through the loop itself


def quick(model):
    """
    The same network, which reads equal rows once: 1e5 draws on an enumerable alphabet are a few hundred
    different inputs.
    """
    forward, timed = model.forward, model.time is not None

    def unique(clean, noisy, block_size, start=0, sigma=None, cache=None, ask=None):
        assert cache is None, "use_cache=False: rows are what the network is asked"
        parts = [clean.double(), noisy.double()] + (
            [sigma.view(len(sigma), -1).double().expand(len(noisy), -1)] if timed else []
        )
        rows, back = torch.cat(parts, dim=1).unique(dim=0, return_inverse=True)
        c, n = clean.size(1), noisy.size(1)
        level = None if not timed else rows[:, c + n :].reshape(-1) if sigma.dim() == 1 else rows[:, c + n :]
        logits = forward(rows[:, :c].long(), rows[:, c : c + n].long(), block_size, start, level)[back]
        return logits if ask is None else logits[ask]

    model.forward = unique
    return model


def blocks(model, process, b, n, sampler, seed=0, prompt=(), **kw):
    """
    Counts (V^b,) of the blocks that n runs of a sampler end in; letters only, no mask. Rows are states(V, b)
    in order.
    """
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
        return x, model(
            x[:, :0], x, b, 0, d.sigma(torch.as_tensor(alpha, dtype=torch.float64)).expand(len(x))
        ).double()


def product(p, x):
    """Independent tokens: p (m, b, V) -> (m, m), the probability of every state of x."""
    return torch.stack([p[:, i, x[:, i]] for i in range(x.size(1))]).prod(0)


def prior(process, b):
    x = states(process.vocab_size, b)
    return (
        (x == process.mask_id).all(-1).double()
        if process.mask_id is not None
        else torch.full((len(x),), float(len(x)) ** -1).double()
    )


def ar_probs(model, process, y):
    """p_AR(y_i | y_<i) over the vocabulary, (m, b, V), one token after another: for y (m, b)."""
    out = []
    for i in range(y.size(1)):
        ask = process.ar_input((len(y), 1))
        with torch.no_grad():
            logits = model(y[:, :i], ask, 1, i, d.sigma(torch.zeros(len(y)).double())).double()
        out.append(process.posterior_probs(logits, process.prior((len(y), 1)), 0.0, 1.0)[:, 0])
    return torch.stack(out, dim=1)


class Couplings(torch.nn.Module):
    """
    A network whose tokens depend strongly on each other: every visible token votes on every position. For
    masked noise, one block, and generate without a cache.
    """

    timeless = True

    def __init__(self, process, n, seed):
        super().__init__()
        self.cfg, self.embed = ModelConfig(process.vocab_size, n), torch.nn.Embedding(1, 1)
        noise = torch.Generator().manual_seed(seed)
        V = process.vocab_size
        self.votes = 4 * torch.randn(n, V, n, V, generator=noise, dtype=torch.float64)
        self.votes[:, process.mask_id] = 0.0
        self.own = 2 * torch.randn(n, V, generator=noise, dtype=torch.float64)

    def forward(self, clean, noisy, block_size, start=0, sigma=None, cache=None):
        seen = torch.nn.functional.one_hot(noisy, self.cfg.vocab_size).double()
        return self.own + torch.einsum("rja,jaiv->riv", seen, self.votes)


# ----- the perfect network of a law over rows


class Bayes(torch.nn.Module):
    """
    What perfect training would end in, by enumeration: l of a law over rows x (K, L) with probabilities p
    (K,), or D for a process that predicts "denoiser". At every block size; called as a Transformer is,
    without a cache. It takes every noisy token for noise of the level that it is told, prompts too.

    timeless: it is told no level. Right for masked noise alone: a token that is not the mask is certain.
    """

    def __init__(self, process, x, p, timeless=False):
        super().__init__()
        self.process, self.x, self.log_p, self.timeless = process, x, p.double().log(), timeless
        self.embed = torch.nn.Embedding(1, 1, dtype=torch.float64)  # for its device, and a gradient
        torch.nn.init.zeros_(self.embed.weight)
        self.cfg = ModelConfig(process.vocab_size, x.size(1))
        self.denoiser = getattr(process, "predicts", "") == "denoiser"

    def evidence(self, noisy, alpha):
        """log q(noisy | v) of every token v, (B, N, V); an id that is no noise says nothing."""
        V = self.process.vocab_size
        every = torch.arange(V).expand(*noisy.shape, V)
        seen = noisy.clamp(max=V - 1)[..., None].expand_as(every)
        log_q = self.process.log_q(seen.flatten(1), every.flatten(1), alpha.repeat_interleave(V, dim=1))
        return torch.where((noisy < V)[..., None], log_q.view(every.shape), 0.0).clamp(min=-1e4)

    def forward(self, clean, noisy, block_size, start=0, sigma=None, cache=None):
        assert cache is None, "use_cache=False"
        B, N = noisy.shape
        begin = int(start)
        level = torch.full((1, 1), 0.7) if sigma is None else sigma.double().view(len(sigma), -1)
        alpha = (-level).exp().double().expand(B, N)
        at, b = torch.arange(begin, begin + N), torch.as_tensor(block_size).view(-1, 1)
        first = (at // b * b).expand(B, N)  # of the block that a token is in
        x = self.x[:, begin : begin + N]  # (K, N)
        e = self.evidence(noisy, alpha).gather(-1, x.T.expand(B, N, len(x))).transpose(1, 2)  # (B, K, N)
        both = (first[:, :, None] == first[:, None]).double()  # (B, N, N): in one block
        if not self.denoiser:
            both = both - torch.eye(N, dtype=torch.float64)
        C = 0 if clean is None else clean.size(1)
        fits = torch.zeros(B, len(x), 1) == 0
        if C:
            same = (clean[:, None] == self.x[None, :, :C]).cumprod(-1) == 1
            fits = torch.cat((fits, same), dim=-1)  # (B, K, C + 1): do so many first tokens fit?
        context = torch.where(fits, 0.0, -1e6).double().gather(-1, first[:, None].expand(B, len(x), N))
        log_w = self.log_p[:, None] + context + torch.einsum("bij,bkj->bki", both, e)  # (B, K, N)
        is_v = torch.nn.functional.one_hot(x, self.process.vocab_size).bool()  # (K, N, V)
        every = torch.where(is_v, log_w[..., None], -math.inf).logsumexp(1)
        return every.clamp(min=-1e7) + 0.0 * self.embed.weight.sum()


def entropy(p):
    return -(p.double() * p.double().log()).sum().item()


# ----- samplers against their equations


def setup(kind, seed=1, soft=0.4, path="fast"):
    """
    A random network and its process, with the same weights on both paths. Block size 1 reads a constant, so
    that p_AR is one distribution.
    """
    make, kw = KINDS[kind]
    process = make()
    if process.mask_id is None:
        process = d.Uniform(V3, process.predicts, ar_token=V3)
    model = net(process, seed=seed, **kw)
    model.head.weight.data *= soft  # so that no token is nearly certain
    model.head.bias.data *= soft
    model, process = on(path, model.double(), process)
    model = quick(model)
    forward = (
        model.forward
    )  # a block of equal tokens says the same at every position: a tie, which rounding must not decide
    model.forward = lambda *a, **kw: (forward(*a, **kw) * 1e9).round() / 1e9
    return model, process


def small(process, seed=0, path="fast", **kw):
    """exact.net and its process in one of the two forms."""
    return on(path, net(process, seed=seed, **kw), process)


def draws(counts, p, *others):
    """The draws have distribution p, and the test tells them from all the others."""
    assert abs(p.sum() - 1) < 1e-6
    gap = lambda q: ((p - q).abs().sum() / 2).item()
    assert chi_squared(counts, p) > P_VALUE, (
        f"{chi_squared(counts, p):.1e}, total variation {gap(counts / counts.sum()):.4f}"
    )
    for other in others:
        assert chi_squared(counts, other) < P_VALUE, (
            f"total variation {gap(other):.4f} to another distribution, and not told apart"
        )


def tree(step, x, n, memory=None):
    """
    The exact distribution after n steps of step(k, x, memory) -> [(probability, x, memory)], for rules with a
    memory: {x: p}.
    """
    front = {(x, memory): 1.0}
    for k in range(n):
        after = {}
        for (x, memory), p in front.items():
            for q, y, m in step(k, x, memory):
                if p * q > 1e-9:
                    after[y, m] = after.get((y, m), 0.0) + p * q
        front = after
    out = {}
    for (x, _), p in front.items():
        out[x] = out.get(x, 0.0) + p
    return out


def dense(found, b):
    return torch.tensor([found.get(tuple(x), 0.0) for x in states(V3, b).tolist()], dtype=torch.float64)


def by_hand(found, x):
    return dict(zip(map(tuple, x.tolist()), found, strict=True))
