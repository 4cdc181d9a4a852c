"""
Why believe the course? Right answers pass however they are written, and every wrong one is told what is wrong
with it: no two slips of one exercise get the same sentence.
"""

import ast
import inspect
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, copy_project, run, slow

import model
import rng
import train as training
from course import __main__ as command
from course import harness, project
from diffusion import NoiseProcess, Uniform, column, pick
from generate import SAMPLERS
from methods.gidd import GIDD
from rng import Noise, sharpen
from samplers.pieces import top

NUMBERS = range(1, 9)


def judged(number, f):
    """(what holds, '' or what is wrong and why, notes) of an answer."""
    passed, _, wrong, notes = harness.judge(command.exercise_of(number), f)
    return passed, "" if wrong is None else f"{wrong.problem}\n{wrong.why}", notes


# ----- answers: RIGHT[number] and WRONG[number], the latter with words of the diagnosis

RIGHT = {number: [] for number in NUMBERS}
WRONG = {number: {} for number in NUMBERS}


def right(number):
    return lambda f: RIGHT[number].append(f) or f


def wrong(number, words):
    def enter(f):
        assert words not in WRONG[number]
        WRONG[number][words] = f
        return f

    return enter


# ----- 1


right(1)(model.attention_mask)


@right(1)
def attention_loops(edge, group, n):
    noisy = [i for i in range(group.size(1)) if group[0, i] >= 0]
    rows = [
        [
            [int(j < e) for j in range(n)] + [int(group[b, c] == g) for c in noisy]
            for e, g in zip(edge[b], group[b], strict=True)
        ]
        for b in range(len(edge))
    ]
    return torch.tensor(rows).view(len(edge), edge.size(1), n + len(noisy))


def attention(clean=lambda j, e: j < e, noisy=lambda g, h: g == h, last=lambda y, n: y):
    def mask(edge, group, n):
        columns = group[:, None, group[0] >= 0]
        left = clean(torch.arange(n), edge[..., None])
        return last(torch.cat((left, noisy(group[..., None], columns)), dim=-1), n)

    return mask


wrong(1, "< is right, <= is not")(attention(lambda j, e: j <= e))
wrong(1, "turned around")(attention(lambda j, e: j >= e))
wrong(1, "True and False are exchanged")(attention(last=lambda y, n: ~y))
wrong(1, "compared with !=")(attention(noisy=lambda g, h: g != h))
wrong(1, "too few")(attention(lambda j, e: j < e - 1))
wrong(1, "rows and columns are exchanged")(attention(last=lambda y, n: y.mT))
wrong(1, "the noisy columns come first")(attention(last=lambda y, n: torch.cat((y[..., n:], y[..., :n]), -1)))
wrong(1, "those with group >= 0")(
    lambda edge, group, n: torch.cat(
        (torch.arange(n) < edge[..., None], group[..., None] == group[:, None]), -1
    )
)


@wrong(1, "it must go in both directions")
def causal_in_the_block(edge, group, n):
    y = model.attention_mask(edge, group, n)
    y[:, n:, n:] &= torch.ones(y.size(1) - n, y.size(2) - n).tril().bool()
    return y


@wrong(1, "reads its own clean copy")
def own_clean_copy(edge, group, n):
    y = model.attention_mask(edge, group, n)
    y[:, n:, :n] |= group[:, n:, None] == group[:, None, n:][..., :n]
    return y


# ----- 2


@right(2)
def corrupt_ours(process, x0, alpha, noise):
    return process.corrupt(x0, alpha, noise)


@right(2)
def corrupt_by_law(process, x0, alpha, noise):
    return NoiseProcess.corrupt(process, x0, alpha, noise).int()


@right(2)
def corrupt_loops(process, x0, alpha, noise):
    alpha, u, xt = column(alpha, x0).expand(x0.shape).tolist(), noise.uniform(2).tolist(), x0.tolist()
    for row in range(len(xt)):
        for i in range(len(xt[row])):
            if u[row][i][0] > alpha[row][i]:
                masked = process.mask_id is not None
                xt[row][i] = (
                    process.mask_id if masked else int(u[row][i][1] * process.vocab_size) % process.vocab_size
                )
    return xt


def corrupt(stays=lambda u, a: u[..., 0] <= a, new=lambda u, x0, V: (u[..., 1] * V).long(), fit=column):
    def corrupt(process, x0, alpha, noise):
        u = noise.uniform(2)
        other = process.mask_id if process.mask_id is not None else new(u, x0, process.vocab_size)
        return torch.where(stays(u, fit(alpha, x0)), x0, other)

    return corrupt


wrong(2, "alpha and 1 - alpha are exchanged")(corrupt(lambda u, a: u[..., 0] <= 1 - a))
wrong(2, "never x_0 itself")(corrupt(new=lambda u, x0, V: (x0 + 1 + (u[..., 1] * (V - 1)).long()) % V))
wrong(2, "the last token is never drawn")(corrupt(new=lambda u, x0, V: (u[..., 1] * (V - 1)).long()))
wrong(2, "one random number does two jobs")(corrupt(new=lambda u, x0, V: (u[..., 0] * V).long()))
wrong(2, "become the same one")(corrupt(new=lambda u, x0, V: torch.randint(V, ())))
wrong(2, "share one random number")(corrupt(lambda u, a: u[:, :1, 0] <= a))
wrong(2, "along the rows")(corrupt(fit=lambda alpha, x0: alpha))
wrong(2, "returns id")(corrupt(new=lambda u, x0, V: (u[..., 1] * V).long() + 1))


@wrong(2, "a token becomes the mask, not")
def never_a_mask(process, x0, alpha, noise):
    return Uniform(4).corrupt(x0, alpha, noise)


@wrong(2, "changes its argument x0")
def corrupt_in_place(process, x0, alpha, noise):
    x0[noise.uniform(1)[..., 0] > column(alpha, x0).expand(x0.shape)] = 0
    return x0


# ----- 3


@right(3)
def nll_ours(process, logits, x0, xt, alpha, dalpha):
    return process.nll(logits, x0, xt, alpha, dalpha)


@right(3)
def nll_float32(process, logits, x0, xt, alpha, dalpha):
    ce = F.cross_entropy(process.loo_logits(logits.float()).transpose(1, 2), x0, reduction="none")
    return (xt == process.mask_id) * ce * (column(dalpha, logits) / (column(alpha, logits) - 1)).float()


@right(3)
def nll_loops(process, logits, x0, xt, alpha, dalpha):
    a, da = (column(y, x0).expand(x0.shape).tolist() for y in (alpha, dalpha))
    nats = torch.zeros(x0.shape)
    for b in range(x0.size(0)):
        for i in range(x0.size(1)):
            if xt[b, i] == process.mask_id:
                z = [
                    math.exp(logits[b, i, v].item())
                    for v in range(process.vocab_size)
                    if v != process.mask_id
                ]
                p = math.exp(logits[b, i, x0[b, i]].item()) / sum(z)
                nats[b, i] = -da[b][i] / (1 - a[b][i]) * -math.log(p)
    return nats


def nll(weight=lambda a, da: -da / (1 - a), cost=lambda logp, x0: -pick(logp, x0), mask=True, visible=0.0):
    def nll(process, logits, x0, xt, alpha, dalpha):
        logp = (process.loo_logits(logits) if mask else logits).log_softmax(-1)
        each = weight(column(alpha, logits), column(dalpha, logits)) * cost(logp, x0)
        return torch.where(xt == process.mask_id, each, visible * each)

    return nll


wrong(3, "the weight is missing")(nll(lambda a, da: torch.ones_like(a)))
wrong(3, "the slope alpha' is missing")(nll(lambda a, da: 1 / (1 - a)))
wrong(3, "alpha and 1 - alpha are exchanged")(nll(lambda a, da: -da / a))
wrong(3, "the sign is turned around")(nll(lambda a, da: da / (1 - a)))
wrong(3, "where it must be divided")(nll(lambda a, da: -da * (1 - a)))
wrong(3, "visible tokens pay too")(nll(visible=1.0))
wrong(3, "the mask is in the softmax")(nll(mask=False))
wrong(3, "bits, not nats")(nll(cost=lambda logp, x0: -pick(logp, x0) / math.log(2)))
wrong(3, "each token has its own number")(
    nll(lambda a, da: -da / (1 - a) / 3 if a.size(0) != 2 else -da / (1 - a) / 3)
)
wrong(3, "2 times what it must be")(nll(lambda a, da: -2 * da / (1 - a)))
wrong(3, "below")(nll(cost=lambda logp, x0: -pick(logp, x0.roll(1, 1))))
wrong(3, "expected (B, L) = (3, 3)")(lambda *args: nll_ours(*args).mean())


# ----- 4


@right(4)
def posterior_ours(process, *args, **how):
    return process.posterior_probs(*args, **how)


@right(4)
def posterior_of_any_noise(process, *args, **how):
    return NoiseProcess.posterior_probs(process, *args, **how)


@right(4)
def posterior_by_d(process, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
    """sum_v D(v) q(x_s | x_t, x_0 = v), in loops over v."""
    V = process.vocab_size
    a_t, a_s = column(alpha_t, xt)[..., None], column(alpha_s, xt)[..., None]
    p = sharpen(process.loo_logits(logits.double(), xt, a_t[..., 0]), temperature, top_p).softmax(-1)
    z, a, total = F.one_hot(xt, V), a_t / a_s, 0
    D = p * (a_t * z + (1 - a_t) / V)
    D = D / D.sum(-1, keepdim=True)
    for v in range(V):
        q = (a_s * F.one_hot(torch.tensor(v), V) + (1 - a_s) / V) * (a * z + (1 - a) / V)
        total = total + D[..., v : v + 1] * q / q.sum(-1, keepdim=True)
    return total.float()


def posterior(of="loo", first=None, second=None, normed=True, sharp=True):
    first = first or (lambda p, t, s, V: s * p + (1 - s) / V)
    second = second or (lambda z, t, s, V: t / s * z + (1 - t / s) / V)

    def posterior_probs(process, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
        t, s = column(alpha_t, xt)[..., None], column(alpha_s, xt)[..., None]
        V, logits = process.vocab_size, logits.double()
        p = (
            {"loo": process.loo_logits, "D": process.denoiser_logits}[of](logits, xt, t[..., 0])
            if of
            else logits
        )
        p = (sharpen(p, temperature, top_p) if sharp else p).softmax(-1)
        q = first(p, t, s, V) * second(F.one_hot(xt, V), t, s, V)
        return q / q.sum(-1, keepdim=True) if normed else q

    return posterior_probs


wrong(4, "D stands in l's place")(posterior("D"))
wrong(4, "whatever process.predicts says")(posterior(None))
wrong(4, "divided by the sum")(posterior(normed=False))
wrong(4, "temperature and top_p are forgotten")(posterior(sharp=False))
wrong(4, "x_s is not clean yet: the first factor")(posterior(first=lambda p, t, s, V: p))
wrong(4, "the first factor is at time t")(posterior(first=lambda p, t, s, V: t * p + (1 - t) / V))
wrong(4, "the second factor is alpha_t")(posterior(second=lambda z, t, s, V: t * z + (1 - t) / V))
wrong(4, "a is turned around")(posterior(second=lambda z, t, s, V: s / t * z + (1 - s / t) / V))
wrong(4, "alpha_t and alpha_s are exchanged")(
    posterior(
        first=lambda p, t, s, V: t * p + (1 - t) / V, second=lambda z, t, s, V: s / t * z + (1 - s / t) / V
    )
)
wrong(4, "1 / V is missing in the second")(posterior(second=lambda z, t, s, V: t / s * z + 1 - t / s))
wrong(4, "these are logarithms")(lambda process, *args, **how: process.posterior_probs(*args, **how).log())


# ----- 5


right(5)(rng.stratified_draw)


@right(5)
def draw_with_a_generator(block_sizes, n, seed, step):
    """float32, and one random place for all slices of a size."""
    g = torch.Generator().manual_seed(10_007 * seed + step)
    edges = torch.tensor(list(block_sizes.values())).cumsum(0)
    comb = (torch.arange(n) + torch.rand((), generator=g)) / n
    sizes = torch.tensor(list(block_sizes))[torch.searchsorted(edges, comb).clamp(max=len(edges) - 1)]
    t = torch.zeros(n)
    for size in block_sizes:
        k = int((sizes == size).sum())
        t[sizes == size] = (torch.arange(k) + torch.rand((), generator=g)) / max(k, 1)
    order = torch.randperm(n, generator=g)
    return sizes[order].int(), t[order]


@right(5)
def draw_in_lists(block_sizes, n, seed, step):
    import random

    r, rows = random.Random(1_000_003 * seed + step), []
    offset, end = r.random(), 0.0
    for size, w in block_sizes.items():
        inside = [k for k in range(n) if end <= (k + offset) / n < end + w]
        end += w
        rows += [(size, (j + r.random()) / len(inside)) for j in range(len(inside))]
    r.shuffle(rows)
    return [size for size, _ in rows], [t for _, t in rows]


def changed(change):
    """stratified_draw, and then change(sizes, times, seed, step, block_sizes)."""

    def stratified_draw(block_sizes, n, seed, step):
        b, t = rng.stratified_draw(block_sizes, n, seed, step)
        return change(b, t.clone(), seed, step, block_sizes)

    return stratified_draw


def numbers(seed, n, step):
    return Noise(seed + 77, torch.tensor([-1]), torch.arange(n), step).uniform(1)[0, :, 0]


def later(b, t, sizes):
    for size in sizes:
        t[b == size] += 1 / max(1, int((b == size).sum()))
    return b, t


def in_the_middle(b, t, sizes):
    for size in sizes:
        k = max(1, int((b == size).sum()))
        t[b == size] = ((t[b == size] * k).floor() + 0.5) / k
    return b, t


wrong(5, "sizes are drawn one by one")(
    lambda sizes, n, seed, step: (
        torch.tensor(list(sizes))[
            torch.searchsorted(
                torch.tensor(list(sizes.values())).cumsum(0), numbers(seed, n, step).float()
            ).clamp(max=len(sizes) - 1)
        ],
        numbers(seed + 1, n, step),
    )
)
wrong(5, "drawn independently")(changed(lambda b, t, seed, step, sizes: (b, numbers(seed, len(b), step))))
wrong(5, "over all rows together")(
    changed(lambda b, t, seed, step, sizes: (b, rng.stratified_draw({1: 1.0}, len(b), seed + 1, step)[1]))
)
wrong(5, "the first slice is 0")(changed(lambda b, t, seed, step, sizes: later(b, t, sizes)))
wrong(5, "the same place at every step")(changed(lambda b, t, seed, step, sizes: in_the_middle(b, t, sizes)))
wrong(5, "should have")(
    changed(lambda b, t, seed, step, sizes: (b[b.argsort(stable=True)], t[b.argsort(stable=True)]))
)
wrong(5, "must depend on the step")(lambda sizes, n, seed, step: rng.stratified_draw(sizes, n, seed, 0))
wrong(5, "differ from call to call")(
    lambda sizes, n, seed, step: rng.stratified_draw(sizes, n, int(torch.randint(1 << 30, ())), step)
)


@wrong(5, "rounded alike")
def rounded_alike(block_sizes, n, seed, step):
    counts = [round(n * w) for w in block_sizes.values()]
    counts[-1] = n - sum(counts[:-1])
    u, t = numbers(seed, n, step), []
    for k in counts:
        t += [(j + u[len(t)]) / k for j in range(k)]
    sizes = torch.repeat_interleave(torch.tensor(list(block_sizes)), torch.tensor(counts))
    order = numbers(seed + 1, n, step).argsort()
    return sizes[order], torch.tensor(t)[order]


@wrong(5, "offset of its own")
def an_offset_for_each_tooth(block_sizes, n, seed, step):
    comb = (torch.arange(n) + numbers(seed, n, step)) / n
    edges = torch.tensor(list(block_sizes.values()), dtype=torch.float64).cumsum(0)
    sizes = torch.tensor(list(block_sizes))[torch.searchsorted(edges, comb).clamp(max=len(edges) - 1)]
    return sizes, numbers(seed + 1, n, step)


# ----- 6


EXTEND = model.KVCache.extend  # the check puts another in its place
right(6)(EXTEND)


@right(6)
def extend_by_lists(self, i, k, v):
    joined = []
    for old, new in ((self.k[i], k), (self.v[i], v)):
        kept = [] if self.length == 0 else [old[:, :, t] for t in range(self.length)]
        joined.append(torch.stack(kept + [new[:, :, t] for t in range(new.size(2))], dim=2))
    self.k[i], self.v[i] = joined[0].clone(), joined[1].clone()
    return joined


def extend(
    cut=lambda x, n: x[:, :, :n],
    join=lambda old, new: torch.cat((old, new), dim=2),
    keep=lambda new, both: both,
):
    def extend(self, i, k, v):
        both = k, v
        if self.k[i] is not None:
            both = join(cut(self.k[i], self.length), k), join(cut(self.v[i], self.length), v)
        self.k[i], self.v[i] = keep(k, both[0]), keep(v, both[1])
        return both

    return extend


wrong(6, "Cut at self.length")(extend(lambda x, n: x))
wrong(6, "stand before the kept ones")(extend(join=lambda old, new: torch.cat((new, old), dim=2)))
wrong(6, "only the new keys are kept")(extend(keep=lambda new, both: new))
wrong(6, "nothing of earlier passes is read")(lambda self, i, k, v: (k, v))
wrong(6, "keys and values are exchanged")(lambda self, i, k, v: EXTEND(self, i, k, v)[::-1])
wrong(6, "share one entry")(lambda self, i, k, v: EXTEND(self, 0, k, v))
wrong(6, "must be along the positions")(extend(join=lambda old, new: torch.cat((old, new), dim=0)))
wrong(6, "must be the first")(extend(lambda x, n: x[:, :, x.size(2) - n :]))


@wrong(6, "self.length was")
def commits_too_early(self, i, k, v):
    both = EXTEND(self, i, k, v)
    self.length += k.size(2)
    return both


@wrong(6, "the lesson cannot go on")
def keeps_a_list(self, i, k, v):
    both = EXTEND(self, i, k, v)
    self.k[i], self.v[i] = Kept(both[0]), Kept(both[1])
    return both


class Kept:
    """What can be cut as a tensor can, and no rows can be chosen of."""

    def __init__(self, x):
        self.x = x

    def __getitem__(self, cut):
        if torch.is_tensor(cut):
            raise TypeError("no rows")
        return self.x[cut]


# ----- 7


@right(7)
def arpc_ours(block):
    yield from SAMPLERS["arpc"](block)


def arpc(
    guess=lambda block, k, a_t, a_s: block.reverse(a_t, a_t, 1.0, block.noise(k)),
    score=lambda block, logp, y: -pick(logp, y),
    level=lambda a_t, a_s: a_s,
    number=lambda x: (x + 0.5).floor(),
    choose=top,
    among=lambda block: block.open,
    checks_the_last=False,
    rule_out=lambda block, logits: block.process.loo_logits(logits, block.x, 0.0),
):
    def arpc(block):
        for k in range(block.steps):
            a_t, a_s = block.alpha[k], block.alpha[k + 1]
            y = torch.where(block.open, guess(block, k, a_t, a_s), block.x)
            if checks_the_last or k + 1 < block.steps:
                logp = rule_out(block, block.verify(y)).log_softmax(-1)
                n = number((1 - level(a_t, a_s)) * among(block).sum(1).double())
                y = torch.where(choose(score(block, logp, y), n, block.open), block.prior(block.noise(k)), y)
            block.write(y)
            yield

    return arpc


right(7)(arpc(checks_the_last=True))
right(7)(
    arpc(
        lambda block, k, a_t, a_s: block.draw(
            block.sharpen(block.process.denoiser_logits(block.predict(a_t), block.x, a_t)),
            block.noise(k + 100),
        )
    )
)
wrong(7, "the noise level before the step: alpha[k + 1]")(arpc(level=lambda a_t, a_s: a_t))
wrong(7, "alpha and 1 - alpha are exchanged")(arpc(level=lambda a_t, a_s: 1 - a_s))
wrong(7, "rounded down")(arpc(number=torch.floor))
wrong(7, "halves are rounded up")(arpc(number=torch.round))
wrong(7, "the surest tokens became noise")(arpc(score=lambda block, logp, y: pick(logp, y)))
wrong(7, "the entropy of p_AR")(arpc(score=lambda block, logp, y: torch.special.entr(logp.exp()).sum(-1)))
wrong(7, "the mask is in p_AR's softmax")(arpc(rule_out=lambda block, logits: logits))
wrong(7, "read off at the token after it")(arpc(score=lambda block, logp, y: -pick(logp, y.roll(-1, 1))))
wrong(7, "chosen by chance")(arpc(score=lambda block, logp, y: torch.rand(y.shape)))
wrong(7, "given positions are counted")(arpc(among=lambda block: torch.ones_like(block.open)))
wrong(7, "also where scores are equal")(
    arpc(choose=lambda s, n, among: (s >= s.masked_fill(~among, -1e9).sort(1, descending=True).values.gather(
        1, (n.long()[:, None] - 1).clamp(min=0))) & among & (n > 0)[:, None])
)  # fmt: skip
wrong(7, "at temperature 0 another token")(
    arpc(lambda block, k, a_t, a_s: block.reverse(a_t, a_t, 1.0, block.noise(k), temperature=1.0))
)
wrong(7, "alpha[k] is the level before step k")(
    arpc(lambda block, k, a_t, a_s: block.reverse(a_s, a_t, 1.0, block.noise(k)))
)
wrong(7, "guesses all")(arpc(lambda block, k, a_t, a_s: block.reverse(a_t, a_t, a_s, block.noise(k))))


@wrong(7, "yields once after every step")
def no_generator(block):
    block.write(block.x)


@wrong(7, "one `yield` after each step")
def one_yield(block):
    for _ in SAMPLERS["arpc"](block):
        pass
    yield


# ----- 8


def noise(mixing, **members):
    return type("MyNoise", (NoiseProcess,), {"mixing": mixing, **members})


def zipf(self, alpha):
    pi = 1 / torch.arange(1, self.vocab_size + 1).double()
    pi = pi / pi.sum()
    return alpha, (1 - alpha)[..., None] * pi, torch.ones_like(alpha), -pi


def squared(self, alpha):
    """Another clock: a = alpha^2."""
    pi = torch.ones(self.vocab_size).double() / self.vocab_size
    a = alpha**2
    return a, (1 - a)[..., None] * pi, 2 * alpha, -2 * alpha[..., None] * pi


def in_float32(self, alpha):
    return tuple(y.float() for y in zipf(self, alpha))


RIGHT[8] += [noise(zipf), noise(squared), noise(in_float32)]


@right(8)
class MyGIDD(GIDD):
    def __init__(self, vocab_size):
        super().__init__(vocab_size + 1, vocab_size, 0.3)


def bent(change):
    """zipf with something else: change(alpha, a, m, da, dm)"""
    return noise(lambda self, alpha: change(alpha, *zipf(self, alpha)))


wrong(8, "alpha and 1 - alpha are exchanged")(
    bent(lambda alpha, a, m, da, dm: (1 - a, m / (1 - a)[..., None] * a[..., None], -da, -dm))
)
wrong(8, "m is alpha pi")(bent(lambda alpha, a, m, da, dm: (a, a[..., None] * -dm, da, -dm)))
wrong(8, "must sum to 1 - a")(bent(lambda alpha, a, m, da, dm: (a, (-dm).expand(m.shape), da, 0 * dm)))
wrong(8, "pi = pi / pi.sum()")(bent(lambda alpha, a, m, da, dm: (a, 2 * m, da, 2 * dm)))
wrong(8, "dm is the slope in t")(bent(lambda alpha, a, m, da, dm: (a, m, da, -dm)))
wrong(8, "da is the slope in t")(bent(lambda alpha, a, m, da, dm: (a, m, -da, dm)))
wrong(8, "dm is zero")(bent(lambda alpha, a, m, da, dm: (a, m, da, torch.zeros_like(dm))))
wrong(8, "not four things")(bent(lambda alpha, a, m, da, dm: (a, m)))
wrong(8, "expected m (..., V)")(bent(lambda alpha, a, m, da, dm: (a, m.sum(-1), da, dm)))


@wrong(8, "must not go out again")
class Wandering(NoiseProcess):
    """The token that is noise changes with time: noise would have to go out."""

    def mixing(self, alpha):
        w, rest = alpha[..., None], torch.zeros(*alpha.shape, self.vocab_size - 2).double()
        m = torch.cat(((1 - w) * w**4, (1 - w) * (1 - w**4), rest), -1)
        dm = torch.cat((4 * w**3 - 5 * w**4, -1 - 4 * w**3 + 5 * w**4, rest), -1)
        return alpha, m, torch.ones_like(alpha), dm


# ----- the tests


ANSWERS = [(number, k) for number in NUMBERS for k in range(len(RIGHT[number]))]
HEAVY = {(2, 2), (3, 2), (5, 0), (5, 1), (7, 0), (7, 1)}


@pytest.mark.parametrize("number, k", slow(ANSWERS, set(ANSWERS) - HEAVY))
def test_a_right_answer_passes_however_it_is_written(number, k):
    passed, problem, _ = judged(number, RIGHT[number][k])
    assert not problem, problem
    assert len(passed) >= 6 and len(set(passed)) == len(passed)


MISTAKES = [(number, words) for number in NUMBERS for words in WRONG[number]]
QUICK_DRAWS = {"drawn independently", "must depend on the step", "rounded alike", "the first slice is 0"}


@pytest.mark.parametrize(
    "number, words", slow(MISTAKES, {m for m in MISTAKES if m[0] != 5 or m[1] in QUICK_DRAWS})
)
def test_a_wrong_answer_is_told_what_is_wrong(number, words):
    _, problem, _ = judged(number, WRONG[number][words])
    assert words in problem, problem or "nobody noticed"
    others = [other for other in WRONG[number] if other != words and other in problem]
    assert not others, f"the message is that of {others}: {problem}"


def test_every_exercise_has_three_wrong_answers_and_a_right_one():
    assert all(RIGHT[number] and len(WRONG[number]) >= 3 for number in NUMBERS)


# ----- the files and the command


def ask(capsys, monkeypatch, *words):
    """What `python -m course ...` prints, and its exit code."""
    monkeypatch.setattr(sys, "argv", ["course", *words])
    code = 0
    try:
        command.main()
    except SystemExit as e:
        code = e.code or 0
    out, err = capsys.readouterr()
    return out + err, code


@pytest.mark.parametrize("number", NUMBERS)
def test_an_empty_file_gets_a_friendly_line(number, capsys, monkeypatch):
    """The exercise asks for what the check calls, with the arguments of the lesson."""
    file, exercise = command.exercise_file(number), command.exercise_of(number)
    source = file.read_text(encoding="utf-8")
    if "    ...\n" not in source:
        pytest.skip("solved")
    out, code = ask(capsys, monkeypatch, str(number))
    assert code == 1 and "is still empty" in out and "Traceback" not in out, out
    written = source.replace("    ...\n", "    pass\n")
    node = next(n for n in ast.parse(written).body if getattr(n, "name", "") == exercise.FUNCTION)
    if isinstance(node, ast.FunctionDef):
        ours = inspect.signature(RIGHT[number][0]).parameters
        theirs = [a.arg for a in node.args.args]
        assert number in (2, 3, 4) or theirs == list(ours)


SLIPS = {
    "a SyntaxError": ("def nll(a, b)\n    return 1\n", "line 1: def nll(a, b)", "SyntaxError"),
    "no such function": ("def loss():\n    pass\n", "has no function named nll", ""),
    "an error at the top": ("import torch\ntorch.nothing\n", "line 2: torch.nothing", "AttributeError"),
    "an error inside": (
        "def nll(*args):\n    x = [1]\n    return x[4]\n",
        "line 3: return x[4]",
        "IndexError: list index",
    ),
    "no return": ("def nll(*args):\n    pass\n", "nll returns nothing", "`return`"),
    "other arguments": ("def nll(x):\n    return x\n", "TypeError", "positional argument"),
    "an exit": ("def nll(*args):\n    raise SystemExit(3)\n", "line 2", "SystemExit"),
    "a word": ("def nll(*args):\n    return 'two'\n", "returns a str", "tensor (B, L)"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_broken_file_is_told_its_line_and_no_more(slip, tmp_path, capsys, monkeypatch):
    source, *words = SLIPS[slip]
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    out, code = ask(capsys, monkeypatch, "3", "--file", str(tmp_path / "mine.py"))
    assert code == 1 and "Traceback" not in out and all(word in out for word in words), out
    assert "harness.py" not in out and "checks/" not in out


def test_a_loop_that_never_ends_is_ended_and_its_line_is_named(tmp_path, capsys, monkeypatch):
    """os._exit would end the tests too: here it lets the loop go."""
    (tmp_path / "mine.py").write_text(
        "import os\n\ndef nll(*args):\n    while not os.gone:\n        pass\n", encoding="utf-8"
    )
    monkeypatch.setattr(os, "gone", [], raising=False)
    monkeypatch.setattr(harness.os, "_exit", os.gone.append)
    monkeypatch.setattr(command, "SECONDS", 0.3)
    out, _ = ask(capsys, monkeypatch, "3", "--file", str(tmp_path / "mine.py"))
    assert os.gone == [1] and "stopped after 0.3 seconds" in out
    assert "mine.py, line 4: while not os.gone:" in out or "line 5: pass" in out, out


def test_a_right_file_is_told_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from diffusion import Masked\n\n\ndef nll(*args):\n    return Masked.nll(*args)\n", encoding="utf-8"
    )
    out, code = ask(capsys, monkeypatch, "3", "--file", str(tmp_path / "mine.py"))
    assert code == 0 and "right." in out and out.count("ok ") == 6, out


@pytest.mark.parametrize("number", NUMBERS)
def test_hints_come_one_by_one_and_the_lesson_is_shown_from_its_files(number, capsys, monkeypatch):
    one, two = (ask(capsys, monkeypatch, str(number), "--hint", *more)[0] for more in ((), ("2",)))
    assert one != two and "--hint 2" in one and "--show" in two
    shown, code = ask(capsys, monkeypatch, str(number), "--show")
    assert code == 0
    for thing in command.exercise_of(number).SOURCE:
        lines, first = inspect.getsourcelines(thing)
        assert all(f"{first + k:>5}  {line}" in shown for k, line in enumerate(lines))
        assert inspect.getsourcefile(thing).endswith(tuple(re.findall(r"^(\S+\.py), lines", shown, re.M)))


def test_slips_of_the_command_end_in_two_lines(slip, monkeypatch):
    assert "there is no exercise '9'" in slip(command.main, argv=["9"])
    assert "there is no hint 3" in slip(command.main, argv=["3", "--hint", "3"])
    assert "no setting named 'runn'" in slip(command.main, argv=["3", "--runn"])


def test_a_run_without_its_network_or_data_ends_in_two_lines(slip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (4, 6, 7):
        assert "there is none in out/sudoku" in slip(command.exercise_of(number).run, RIGHT[number][0], "")
    assert "python data/sudoku/prepare.py" in slip(command.exercise_of(1).run, RIGHT[1][0], "")


@pytest.mark.slow
def test_a_run_is_made_with_the_function_of_the_student(tmp_path, monkeypatch, capsys):
    """Tiny networks: each run calls the function, and ends with what to look at."""
    copy_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "data/sudoku/prepare.py", "--n_train=500", "--n_val=150"], check=True)
    tiny = [*TINY, "--max_steps=2"]
    for name in ("sudoku", "sudoku_uniform"):
        run(training.main, f"config/{name}.toml", f"--out_dir=out/{name}", *tiny)
    monkeypatch.setattr(project, "TRAIN", [*tiny, "--out_dir=out/course"])
    calls = []

    def counted(f):
        return lambda *args, **how: calls.append(1) or f(*args, **how)

    own = {2: corrupt(), 3: nll(), 4: posterior()}  # the first right ones call what is replaced
    for number in range(1, 8):
        calls.clear()
        command.exercise_of(number).run(counted(own.get(number, RIGHT[number][0])), "")
        assert calls and "to look at" in capsys.readouterr().out
    source = command.exercise_file(8).read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(source.replace("        ...\n", ZIPF), encoding="utf-8")
    command.exercise_of(8).run(harness.load(tmp_path / "mine.py", "MyNoise"), "")
    out = capsys.readouterr().out
    assert "sudoku, course, EMA weights of step 2" in out and "--- sample 1" in out and "to look at" in out, (
        out
    )


ZIPF = """
        pi = 1 / torch.arange(1, self.vocab_size + 1, dtype=alpha.dtype, device=alpha.device)
        pi = pi / pi.sum()
        return alpha, (1 - alpha)[..., None] * pi, torch.ones_like(alpha), -pi
"""


def test_a_file_that_is_not_there_gets_two_lines(slip, tmp_path):
    assert "mine.py not found" in slip(command.main, argv=["3", "--file", str(tmp_path / "mine.py")])
