"""
Which tokens first? Samplers that commit the surest tokens of a block and leave the rest as noise. See
generate.py for letters.
"""

import math

import torch

from diffusion import pick
from generate import sampler
from samplers.pieces import entropy, margin, need, top


def unmask(block, choose):
    """
    The loop these samplers share. Some positions are committed, the rest is pure noise: masks, or fresh
    uniform tokens at every step, predicted by l, which leaves their own token out: it is known to be noise
    (that the others' tokens are, the network is not told, other than by the noise level). A step proposes y ~
    l for the rest; choose(k, left, y, logp) returns which positions are committed after it, and the tokens;
    left (R, b) marks the rest,
    logp (R, b, V) is log l, and confidence means l(y). The noise level is the share committed. The last step
    keeps everything: where --steps is a limit, its default, one a token, is none.
    """
    committed = ~block.open
    for k in range(block.steps):
        left, noise = ~committed, block.noise(k)
        done = (committed & block.open).sum(1) / block.open.sum(1).clamp(min=1)
        alpha = torch.where(left.any(1), done, 0.0).double()  # 1 in rows that are finished: not asked
        logp = block.process.loo_logits(block.predict(alpha), block.x, alpha).log_softmax(-1)
        y, logp = propose(block, logp, left, noise)
        keep, y = choose(k, left, y, logp)
        committed = keep | ~block.open
        if k + 1 == block.steps:
            committed = torch.ones_like(committed)
        block.write(torch.where(committed, y, block.prior(noise)))
        block.live = block.live & ~committed.all(1)
        yield
        if not block.live.any():
            return


def propose(block, logp, left, noise):
    """y ~ l where `left`, and log l. A constrained block (samplers/constraint.py) has its own of both."""
    if hasattr(block, "propose"):
        return block.propose(logp, left, noise)
    return torch.where(left, block.draw(block.sharpen(logp), noise), block.x), logp


def quota(block, k):
    """
    (R,) tokens to have after step k of T, ceil(n (k + 1) / min(n, T)): even portions; n open positions never
    take more than n steps.
    """
    n = block.open.sum(1)
    return -(-n * (k + 1) // n.clamp(1, block.steps))


@sampler()
def confidence(block):
    """
    Low-confidence remasking (after MaskGIT, arXiv 2202.04200; with the even schedule of LLaDA, 2502.09992):
    every step commits the same number of tokens, those with the highest l(y).
    """
    yield from unmask(
        block,
        lambda k, left, y, logp: (
            ~left | top(pick(logp, y), quota(block, k) - (block.open & ~left).sum(1), left),
            y,
        ),
    )


@sampler()
def threshold(block, *, threshold=0.9):
    """
    Fast-dLLM (arXiv 2505.22618): commit every token with l(y) >= threshold, and at least the surest. As many
    passes as that takes; --steps is a limit, whose last step commits the rest.

    threshold: 0 commits all at once, 1 about one at a time
    """
    need(0 <= threshold <= 1, "threshold", threshold, "between 0 and 1")

    def choose(k, left, y, logp):
        c = pick(logp, y)
        return ~left | (c >= math.log(max(threshold, 1e-300))) | top(c, 1, left), y

    yield from unmask(block, choose)


@sampler()
def factor(block, *, factor=1.0):
    """
    Fast-dLLM with a factor (arXiv 2505.22618): commit the n surest tokens, the largest n with (n + 1) (1 -
    c_(n)) < factor, c_(1) >= c_(2) >= ... the confidences l(y); at least one. --steps is a limit.

    factor: more commits more at once
    """
    need(0 <= factor < math.inf, "factor", factor, "at least 0 and finite")

    def choose(k, left, y, logp):
        c = pick(logp, y).double().masked_fill(~left, -math.inf)
        ordered = c.sort(dim=1, descending=True).values.exp()
        n = torch.arange(1, c.size(1) + 1, device=c.device)
        fits = ((n + 1) * (1 - ordered) < factor) & (n <= left.sum(1, keepdim=True))
        return ~left | top(c, (fits * n).amax(1).clamp(min=1), left), y

    yield from unmask(block, choose)


@sampler()
def entropy_bound(block, *, bound=0.5):
    """
    Entropy-bounded unmasking (arXiv 2505.24857): with entropies of l in rising order commit the largest k
    with

        H_(1) + ... + H_(k) - max_i<=k H_(i) <= bound,

    which bounds what the k tokens, drawn independently, may know of each other. --steps is a limit.

    bound: in nats; 0 is one token at a time, but for those that are certain
    """
    need(0 <= bound < math.inf, "bound", bound, "at least 0 nats and finite")

    def choose(k, left, y, logp):
        h = entropy(logp).double()
        ordered = h.masked_fill(~left, math.inf).sort(dim=1).values
        n = (ordered.cumsum(1) - ordered <= bound).sum(1)  # inf - inf is nan, and no number is below a bound
        return ~left | top(-h, n.clamp(min=1), left), y

    yield from unmask(block, choose)


@sampler()
def rcr(block):
    """
    Running-confidence remasking (MDPO, arXiv 2508.13148): like `confidence`, but every step fills the whole
    block, and its least sure tokens become noise again, whenever they were written: `quota` tokens stay,
    those with the highest stored confidence, which is the l(y) that a token was last written with.
    """
    stored = torch.zeros(block.x.shape, dtype=torch.float64, device=block.x.device)

    def choose(k, left, y, logp):
        nonlocal stored
        stored = torch.where(left, pick(logp, y).double(), stored)
        return top(stored, quota(block, k), block.open), y

    yield from unmask(block, choose)


@sampler()
def saber(block, *, at_least=2):
    """
    Saber (arXiv 2510.18165): commit what is surer than the tokens so far were on average, at least two, then
    take back the written tokens whose probability fell most since the step before. --steps is a limit.

        commit l(y) > mean of the confidences at which the block's tokens were committed (1 when there are
        none) take back min(max(floor(at_least / 2), ceil(commits / 8)), commits - 1) tokens, the largest fall
        of l(x_i) first, if it fell

    at_least: tokens to commit in a step, at least

    For masked noise l at a visible token is the raw output there, which training never looked at: a weak
    witness. The paper takes its mean over the whole text so far; this one knows its block.
    """
    need(at_least >= 1, "at_least", at_least, "at least 1")
    stored = torch.zeros(block.x.shape, dtype=torch.float64, device=block.x.device)
    before = None

    def choose(k, left, y, logp):
        nonlocal stored, before
        c, p = pick(logp, y).double().exp(), logp.double().exp()
        old = block.open & ~left
        mean = torch.where(old.any(1), (stored * old).sum(1) / old.sum(1).clamp(min=1), 1.0)
        take = left & ((c > mean[:, None]) | top(c, at_least, left))
        commits = take.sum(1)
        stored = torch.where(take, c, stored)
        fall = pick(before, y) - pick(p, y) if before is not None else torch.zeros_like(c)
        back = torch.minimum((-(-commits // 8)).clamp(min=at_least // 2), commits - 1).clamp(min=0)
        before = p
        return (~left | take) & ~(top(fall, back, old) & (fall > 0)), y

    yield from unmask(block, choose)


def early_exit(block, statistic, limit):
    """
    `confidence`, but a row whose statistic(left, gap), (R,), reaches limit(share of steps done) commits the
    argmax at once.
    """

    def choose(k, left, y, logp):
        gap = margin(logp).double()
        out = (statistic(left, gap) >= limit(k / max(block.steps - 1, 1)))[:, None]
        y = torch.where(out & left, logp.argmax(-1), y)
        return out | ~left | top(pick(logp, y), quota(block, k) - (block.open & ~left).sum(1), left), y

    yield from unmask(block, choose)


@sampler()
def prophet(block, *, high=7.5, middle=5.0, low=2.5):
    """
    Prophet (arXiv 2508.19982): `confidence`, until the mean over the block of the gap between the two best
    logits reaches a limit that falls in three stairs; then the argmax everywhere. A committed token counts
    with the gap it was committed at (the paper asks again; a masked network has no answer there).

    high: the limit in the first third of the steps
    middle: in the second
    low: in the last
    """
    for name, limit in (("high", high), ("middle", middle), ("low", low)):
        need(math.isfinite(limit), name, limit, "a finite gap")
    stored = torch.zeros(block.x.shape, dtype=torch.float64, device=block.x.device)

    def statistic(left, gap):
        nonlocal stored
        stored = torch.where(left, gap, stored)
        return (stored * block.open).sum(1) / block.open.sum(1).clamp(min=1)

    yield from early_exit(block, statistic, lambda r: high if r < 1 / 3 else middle if r < 2 / 3 else low)


@sampler()
def sched(block, *, high=7.5, low=0.0, shape="linear", decay=4.0):
    """
    SchED (arXiv 2512.02892): like prophet with the mean over the positions that are still open, and a limit
    that falls smoothly with the step progress r: high + (low - high) r | low + (high - low) (1 + cos pi r) /
    2 | low + (high - low) exp(-decay r).

    high: the limit at r = 0
    low: the limit at the end
    shape: linear | cosine | exp
    decay: of exp alone
    """
    need(shape in ("linear", "cosine", "exp"), "shape", shape, "linear, cosine or exp")
    need(0 < decay < math.inf, "decay", decay, "above 0 and finite")
    need(shape == "exp" or decay == 4.0, "decay", decay, f"left out: it belongs to shape exp, not to {shape}")
    for name, limit in (("high", high), ("low", low)):
        need(math.isfinite(limit), name, limit, "a finite gap")
    fall = {
        "linear": lambda r: 1 - r,
        "cosine": lambda r: (1 + math.cos(math.pi * r)) / 2,
        "exp": lambda r: math.exp(-decay * r),
    }[shape]
    mean = lambda left, gap: (gap * left).sum(1) / left.sum(1).clamp(min=1)
    yield from early_exit(block, mean, lambda r: low + (high - low) * fall(r))
