"""
Is a position judged better by several predictions? A sampler that averages the last ones. A negative result
here: docs/samplers.md. See generate.py for letters.
"""

import math

import torch

from generate import sampler
from samplers.pieces import entropy, need, top
from samplers.unmasking import quota, unmask


@sampler()
def ccd(block, *, history=2, bound=0.0):
    """
    Coherent contextual decoding (CCD, arXiv 2512.02044): like `confidence`, but a position is judged by the
    mean of its last predictions, lowest entropy first, and its token is drawn from that mean:

        pbar_i = mean of l_i over the last `history` steps,   order by H(pbar_i) >= mean of H(l_i)

    On the small networks here the mean gains nothing over the last prediction alone: an old prediction has
    seen fewer tokens. The paper keeps the means of some positions; its published code averages nothing.

    history: steps in the mean, 1 is the last alone
    bound: commit all with H(pbar) <= bound nats too, and at least one (CCD-DS); --steps is then a limit
    """
    need(history >= 1, "history", history, "at least 1")
    need(0 <= bound < math.inf, "bound", bound, "at least 0 nats and finite")
    past = []

    def choose(k, left, y, logp):
        past.append(logp.double().exp())
        del past[:-history]
        logp = torch.stack(past).mean(0).log()
        y = torch.where(left, block.draw(block.sharpen(logp), block.noise(k)), y)
        h = entropy(logp)
        n = (quota(block, k) - (block.open & ~left).sum(1)).clamp(min=1)
        return ~left | top(-h, n, left) | (h <= bound), y

    yield from unmask(block, choose)
