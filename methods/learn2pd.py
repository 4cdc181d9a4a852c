"""
Learn2PD: a small filter learns which proposals of a step are final already.

    python train.py --method learn2pd --ckpt out/sudoku
    python sample.py --ckpt out/sudoku_learn2pd --sampler learn2pd --temperature 0 --tau 0.7

Decoding one token at a time, always the surest, ends in a text F. In parallel one would like to commit a
proposal as soon as it is what F has there. The filter predicts that from the confidences of the whole block:

    f(c) in R^b       c_i = l(y_i) where nothing is committed, 1 elsewhere      l: leave-one-out prediction
    loss = mean over uncommitted i of BCE(f(c)_i, 1[y_i = F_i])

in the states of a replay, which commits y_i = F_i in every step. The network stays as it is, and the filter
is stored with it. It belongs to one block size. Learning to Parallel, arXiv 2509.25188. Theirs: targets,
replay, filter and end of text. Ours: the loss leaves visible positions out (they are an easy 1), and there is
a control, a filter that sees the position's own confidence alone (--sees own).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion import pick
from generate import SAMPLERS, sampler
from methods import _shared
from run.cli import die
from samplers.pieces import made_by, need, top
from samplers.unmasking import unmask


@dataclass
class Settings:
    ckpt: str = "out/run"  # the network, a training run's out_dir
    size: int = 0  # the block size that the filter is for; 0: the largest
    texts: int = 256  # texts F that it learns from, at least
    width: int = 0  # of its hidden layer; 0: the block size
    sees: str = "block"  # block: the confidences of all positions | own: its own alone, the control


FIXED = (*_shared.FIXED, "texts", "width", "sees")
INHERITS = _shared.INHERITS


def DEFAULTS(s):
    return _shared.defaults(s.ckpt, "learn2pd", max_steps=600, lr=1e-2, ema=0.99)


def check(cfg, s):
    for name, fine, fix in (
        ("texts", s.texts >= 1, "256"),
        ("width", s.width >= 0, "0"),
        ("sees", s.sees in ("block", "own"), "block"),
    ):
        if not fine:
            die(f"{name} cannot be {getattr(s, name)}", f"--{name}={fix}")
    _shared.check(cfg, s, "learn2pd")


def network(model_cfg, s):
    return _shared.WithPart(model_cfg, Filter(s.size, s.width or s.size, s.sees))


class Filter(nn.Module):
    """Logits (R, b) that a proposal is final, from confidences c (R, b), 1 where a token is committed."""

    def __init__(self, size, width, sees):
        super().__init__()
        self.size, n = size, size if sees == "block" else 1
        self.layers = nn.Sequential(nn.Linear(n, width), nn.ReLU(), nn.Linear(width, n))

    def forward(self, c):
        n = self.layers[0].in_features
        return self.layers(c.unflatten(1, (-1, n))).flatten(1)


def confidences(logp, y, left):
    """c (R, b): l(y) where nothing is committed, 1 elsewhere."""
    return torch.where(left, pick(logp, y).exp(), 1.0)


# ----- what it learns from


def replay(block, final, seen):
    """
    A sampler: commit the proposals that are what `final` (R, b) has there, until all of it stands. Where none
    is, the network would say the same again: copy the rest. Appends (c, left, y = F) of every step to `seen`,
    (rows with something left, b) each.
    """

    def choose(k, left, y, logp):
        right = left & (y == final)
        rows = left.any(1)
        seen.append([x[rows] for x in (confidences(logp, y, left), left, right)])
        stuck = ~right.any(1, keepdim=True)
        return ~left | right | stuck, torch.where(left & stuck, final, y)

    yield from unmask(block, choose)


class Learner(_shared.PartLearner):
    seen = None  # c, left and y = F of all states, (states, b) each
    bce = float("nan")

    def __init__(self, *args):
        super().__init__(*args)
        self.token_loss = self.filter_loss

    def batches(self, step, default):
        """The first step makes the texts; a resumed run makes the same again: the network has not moved."""
        if self.seen is None:
            self.collect(default)
        return default(step)

    @torch.no_grad()
    def collect(self, default):
        seen, n, k = [], 0, 0
        while n < self.settings.texts and k < self.settings.texts:
            for x0, given, real, *_ in default(k):
                blocks = _shared.blocks_of(x0, given, real, self.size)
                if not blocks:
                    continue
                begin, open = blocks[k % len(blocks)]
                block, _ = self.block(begin, x0, open, seed=k)
                final = _shared.fill(block, SAMPLERS["confidence"])
                again, _ = self.block(begin, x0, open, seed=k)
                _shared.fill(again, replay, final, seen)
                n += int(open.any(1).sum())
            k += 1
        if not seen:
            die("the dataset has no text in blocks of the filter's size", "--size of another block size")
        self.seen = [torch.cat(x) for x in zip(*seen, strict=True)]

    def filter_loss(self, forward, process, x0, *args, charged, **how):
        """
        Takes the place of token_loss. The mean over uncommitted i of BCE(f(c)_i, 1[y_i = F_i]), as often as
        tokens are charged: the loop divides.
        """
        c, left, right = self.seen
        logits = forward(part=(c.to(self.model.embed.weight),))
        bce = F.binary_cross_entropy_with_logits(logits[left], right[left].to(logits))
        return bce * charged.sum().to(bce), bce.detach()

    def note(self):
        return f"a filter for blocks of {self.size}; the network stays as it is"


# ----- the sampler


@sampler()
def learn2pd(block, *, tau=0.9, end=-1, guess=False):
    """
    Learn2PD (arXiv 2509.25188): commit every proposal that the filter takes for final, with probability above
    tau, and the surest. For checkpoints of --method learn2pd. --steps is a limit.

    tau: 0 commits all at once, 1 one at a time
    end: the id of the end of a text (EoTP): once it is committed, what stands behind it in the block is not
        waited for. The text is cut there. -1: no such token
    guess: an end that is proposed counts too, the surest of them, where none is committed
    """
    need(0 <= tau <= 1, "tau", tau, "between 0 and 1")
    need(-1 <= end < block.process.vocab_size, "end", end, "an id, or -1")
    need(end >= 0 or not guess, "guess", guess, "left out where there is no --end")
    part = getattr(block.model, "part", None)
    made_by(isinstance(part, Filter), "learn2pd")
    n = block.x.size(1)
    need(part.size == n, "block_size", n, f"{part.size}, which the filter was trained for")
    logit = math.inf if tau == 1 else math.log(tau) - math.log1p(-tau) if tau > 0 else -math.inf

    def choose(k, left, y, logp):
        c, sure = confidences(logp, y, left), pick(logp, y)
        f = part(c.to(block.model.embed.weight)).to(sure)
        take = left & ((f > logit) | top(sure, 1, left) | (tau == 0))
        if end >= 0:
            take = take | behind(block, left, take, y, sure, end, guess)
        return ~left | take, y

    yield from unmask(block, choose)


def behind(block, left, take, y, sure, end, guess):
    """
    EoTP, (R, b) bool: what is left behind the first end of text that is committed, now or before; with guess,
    where there is none, the surest end that is proposed, and what is left behind it.
    """
    ends = block.open & (y == end)  # y is x where nothing is left
    fixed = ends & (take | ~left)
    if guess:
        fixed = fixed | (top(sure, 1, ends & left) & ~fixed.any(1, keepdim=True))
    return left & (fixed.cumsum(1) > 0)


# ----- for lab/zoo.py

ROWS = [
    {
        "system": "Learn2PD",
        "paper": "2509.25188",
        "claim": "more right in 4 steps than a threshold",
        "train": "--method learn2pd --ckpt {control} --max_steps 600 --eval_every 600 --lr 1e-2",
        "control": "",
        "sampler": "learn2pd tau=0.8",
        "control_sampler": "threshold threshold=0.6",
        "by": "right 4",
    }
]
