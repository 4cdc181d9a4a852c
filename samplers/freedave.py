"""
Steps ahead for nothing but width: a sampler guesses its own next states, and one pass looks at all of them.
See generate.py for letters.

With the random numbers fixed, a step of `confidence` or `threshold` is a function of the block and of what
the network says of it. So a state that was guessed right needs no pass of its own.
"""

import copy
import math

import torch

from diffusion import pick
from generate import sampler
from rng import Noise
from samplers.pieces import another, need, top
from samplers.unmasking import quota


@sampler()
def freedave(block, *, rule="confidence", threshold=0.9, drafts=4):
    """
    Free draft and verification (FreeDave, arXiv 2510.00294): the very text of `confidence` or `threshold`, in
    fewer passes over more tokens. With the network's word p on a state in hand, the states ahead are guessed
    by taking further steps with the same p. One pass reads all guesses. Then the true steps are taken, as
    long as they lead to a state that was guessed:

        s_1 = step(s_0, p_0),  guesses s_j = step(s_j-1, p_0);   next = step(s_1, p_1) = s_j?  go on from s_j

    The text is the same at any temperature: every step has random numbers of its own, guessed or not, and so
    have the fresh tokens of uniform noise. (In float32 a tie of rounding could differ in principle.) The
    published code goes on from s_j where its visible tokens agree with those of `next`, which may have more:
    with a threshold that is not lossless.

    rule: confidence | threshold, whose text it is; --steps means what it means there
    threshold: of the rule threshold
    drafts: states that a pass reads, at most; 1 looks at no guess. A pass costs so many times the tokens
    """
    need(rule in ("confidence", "threshold"), "rule", rule, "confidence or threshold")
    need(0 <= threshold <= 1, "threshold", threshold, "between 0 and 1")
    need(rule == "threshold" or threshold == 0.9, "threshold", threshold, "left out with rule confidence")
    need(drafts >= 1, "drafts", drafts, "at least 1")
    choose = by_confidence if rule == "confidence" else by_threshold(threshold)
    start = torch.zeros(len(block.x), dtype=torch.long, device=block.x.device), block.x, ~block.open
    logits, wide = block.predict(level(block, start)), None
    now = step(block, choose, start, logits)
    while True:
        block.write(now[1])
        block.live = block.live & ~now[2].all(1)
        yield
        if not block.live.any():
            return
        guesses = [now]
        for _ in range(drafts - 1):
            guesses.append(step(block, choose, guesses[-1], logits))
        wide = several(block, drafts) if wide is None else wide
        now, logits = walk(block, choose, guesses, ask(block, wide, guesses))


def step(block, choose, state, logits):
    """
    One step of samplers.unmasking.unmask from a state (k, x, committed): steps done (R,), tokens (R, b), and
    which of them are committed (R, b).
    """
    k, x, committed = state
    left, noise = ~committed, Noise(block.seed, block.rows, block.positions, k[:, None])
    logp = block.process.loo_logits(logits, x, level(block, state)).log_softmax(-1)
    y = torch.where(left, block.draw(block.sharpen(logp), noise), x)
    committed = committed | choose(block, k, left, pick(logp, y)) | (k + 1 >= block.steps)[:, None]
    fresh = torch.where(block.open, block.prior(noise), x)
    return k + 1, torch.where(committed, y, fresh), committed


def by_confidence(block, k, left, c):
    """Which of the positions that are left `confidence` commits in step k (R,); c (R, b) is log l(y)."""
    return top(c, quota(block, k) - (block.open & ~left).sum(1), left)


def by_threshold(threshold):
    """The same of the sampler `threshold`."""
    least = math.log(max(threshold, 1e-300))
    return lambda block, k, left, c: left & ((c >= least) | top(c, 1, left))


def level(block, state):
    """The share committed, (R,), 0 in finished rows: the noise level that the network is told."""
    committed = state[2]
    share = (committed & block.open).sum(1) / block.open.sum(1).clamp(min=1)
    return torch.where(committed.all(1), 0.0, share).double()


def several(block, n):
    """The block n times: each of its rows, and of the cache's, n times in a row."""
    again = torch.arange(len(block.x), device=block.x.device).repeat_interleave(n)
    cache = copy.copy(block.cache)
    if cache is not None:
        cache.keep(again.to(block.model.embed.weight.device))
        cache.recorder = None  # a recorded pass (fast/graphs.py) is of one cache
    return another(block, block.rows[again], block.positions, block.open[again], cache)


def ask(block, wide, guesses):
    """The logits of each guess, (R, n, b, V), in one pass. Finished ones are not asked."""
    flat = lambda parts: torch.stack(parts, dim=1).flatten(0, 1)  # n times (R, ...) -> (R n, ...)
    wide.x = flat([x for _, x, _ in guesses])
    wide.live = flat([block.live & ~committed.all(1) for _, _, committed in guesses])
    logits = wide.predict(flat([level(block, guess) for guess in guesses]))
    return logits.unflatten(0, (len(block.x), len(guesses)))


def walk(block, choose, guesses, logits):
    """
    True steps from the first guess, which is true, as long as they lead to a guess: the state behind the
    last, whose logits no one has, and the logits (R, b, V) of the state before it.
    """
    state, mine, each = guesses[0], logits[:, 0], torch.arange(len(block.x), device=block.x.device)
    while True:
        after = step(block, choose, state, mine)
        right = torch.stack([agrees(guess, after) for guess in guesses], dim=1)  # (R, n)
        on = right.any(1) & block.live & ~after[2].all(1)
        if not on.any():
            return after, mine
        go = lambda new, old: torch.where(on.view(-1, *[1] * (new.dim() - 1)), new, old)  # noqa: B023
        mine = go(logits[each, right.int().argmax(1)], mine)
        state = tuple(map(go, after, state))


def agrees(guess, after):
    """Is a guess the state, (R,)? Then what the network said of the one holds for the other."""
    return ((guess[1] == after[1]) & (guess[2] == after[2])).all(1)
