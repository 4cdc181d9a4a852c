"""
Unmasking policy: reinforcement learns how many tokens to commit, and which.

    python train.py --method unmasking_policy --ckpt out/sudoku
    python sample.py --ckpt out/sudoku_policy --sampler policy --temperature 0

A policy of one transformer layer reads, at each position of the block,

    c = l(y), logit c, whether it is uncommitted, and the share of steps taken   l: leave-one-out prediction

and gives a logit h_i. It chooses each uncommitted position with probability sigmoid(h_i), independently.
Tokens are the likeliest. Of each puzzle there are G runs, and

    reward     R = 1[right] ((n - passes + 1) / n)^alpha          n: tokens to write
    gradient   mean over runs of (R - mean R of the other G - 1) d/d policy S
               S = sum over steps and uncommitted i of log Bernoulli(chosen_i; sigmoid(h_i))

whose expectation is exactly the gradient of the expected reward. Where nothing is chosen the surest token is
committed all the same: that is no choice of the policy, so S leaves it out. The network stays as it is.
Learning Unmasking Policies, arXiv 2512.09106. Theirs: features, reward, Bernoulli choices. Ours: a small
layer; the baseline (GRPO also divides by the spread of the group, and is then not this gradient); one update
for each batch of runs, so that no ratio needs to be clipped; and the surest where nothing is chosen (theirs:
the highest logit).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion import pick
from generate import SAMPLERS, sampler
from methods import _shared
from model import Layer, ModelConfig
from run.cli import die
from samplers.pieces import made_by, need, top
from samplers.unmasking import unmask


@dataclass
class Settings:
    ckpt: str = "out/run"  # the network, a training run's out_dir
    size: int = 0  # the block size that the policy is for; 0: the largest
    group: int = 8  # runs of each puzzle, G
    alpha: float = 1.0  # more wants fewer passes
    # what is right. check: the dataset's check(text) | same: the text of one token at a time | auto: check,
    # if there is one
    reward: str = "auto"
    policy_width: int = 32  # of the policy's layer


FIXED = (*_shared.FIXED, "group", "alpha", "reward", "policy_width")
INHERITS = ("log_every", "keep")


def DEFAULTS(s):
    return _shared.defaults(s.ckpt, "policy", max_steps=200, batch_size=16, lr=3e-3, ema=0.9)


def check(cfg, s):
    for name, fine, fix in (
        ("group", s.group >= 2, "8"),
        ("alpha", 0 <= s.alpha < float("inf"), "1"),
        ("reward", s.reward in ("auto", "check", "same"), "auto"),
        ("policy_width", s.policy_width >= 4 and s.policy_width % 4 == 0, "32"),
    ):
        if not fine:
            die(f"{name} cannot be {getattr(s, name)}", f"--{name}={fix}")
    _shared.check(cfg, s, "unmasking_policy")


def network(model_cfg, s):
    return _shared.WithPart(model_cfg, Policy(s.size, s.policy_width))


class Policy(nn.Module):
    """Logits (R, b) of committing, from c (R, b), left (R, b) bool and the share of steps taken (R, 1)."""

    def __init__(self, size, width):
        super().__init__()
        self.size = size
        self.read, self.where = nn.Linear(4, width), nn.Embedding(size, width)
        self.layer = Layer(ModelConfig(1, size, n_heads=2, d_model=width))
        self.norm, self.say = nn.LayerNorm(width), nn.Linear(width, 1)
        nn.init.normal_(self.where.weight, std=0.3)
        nn.init.zeros_(self.say.weight)
        nn.init.constant_(self.say.bias, -2.0)  # few at first

    def forward(self, c, left, share):
        c = c.clamp(1e-4, 1 - 1e-4)
        x = torch.stack((c, c.logit() / 4, left.to(c), share.expand_as(c)), dim=-1)  # (R, b, 4)
        x = self.read(x) + self.where.weight
        x = self.layer(x, (1.0, 0.0), None)  # positions are in `where`: nothing is rotated
        return self.say(self.norm(x))[..., 0]


def unmask_by(block, part, decide, seen=None):
    """
    Commit what decide(k, h) chooses, (R, b) bool, of what is left; where that is nothing, the surest. Appends
    (c, left, share, chosen) of every step to `seen`.
    """

    def choose(k, left, y, logp):
        sure, like = pick(logp, y), block.model.embed.weight
        c = torch.where(left, sure.exp(), 1.0).to(like)
        share = torch.full_like(c[:, :1], k / c.size(1))
        chosen = left & decide(k, part(c, left.to(like.device), share).to(sure))
        if seen is not None:
            seen.append((c, left, share, chosen))
        surest = top(sure, 1, left) & ~chosen.any(1, keepdim=True)
        return ~left | chosen | surest, y

    yield from unmask(block, choose)


# ----- what it learns from


def log_probability(h, left, chosen):
    """log Bernoulli(chosen; sigmoid(h)), summed over what was left, (R,)."""
    each = torch.where(chosen, F.logsigmoid(h), F.logsigmoid(-h))
    return torch.where(left, each, 0.0).sum(1)


def others_mean(reward, group):
    """The mean reward of a row's group without the row, (R,); the rows of a group follow each other."""
    r = reward.view(-1, group)
    return ((r.sum(1, keepdim=True) - r) / (group - 1)).flatten()


class Learner(_shared.PartLearner):
    def __init__(self, *args):
        super().__init__(*args)
        self.token_loss, self.last = self.policy_loss, {}

    def right(self, block, x0, begin, final):
        """(R,) bool: is what was written right?"""
        if self.settings.reward == "same" or self.settings.reward == "auto" and self.data.checker is None:
            return (block.x == final()).all(1)
        text = x0.clone()
        text[:, begin : begin + self.size] = block.x.to(text)
        counts = [self.data.checker.check(self.data.tokenizer.decode(row)) for row in text.tolist()]
        return torch.tensor([correct == asked for correct, asked in counts]).to(block.x.device)

    @torch.no_grad()
    def runs(self, x0, given, real, u):
        """
        G runs of a block of each row. u (B, G, b, b): what decides, by run, step and position.
        Returns the records of unmask_by, the rewards R = 1[right] ((n - passes + 1) / n)^alpha (B G,), and
        which rows had something to write.
        """
        G = self.settings.group
        blocks = _shared.blocks_of(x0, given, real, self.size)
        begin, open = blocks[int(u.flatten()[0] * len(blocks) * 0.999999)]
        again = lambda x: x.repeat_interleave(G, dim=0)
        block, counts = self.block(begin, again(x0), again(open))
        u, seen = u.flatten(0, 1).to(block.x.device), []
        decide = lambda k, h: u[:, k] < h.double().sigmoid()
        _shared.fill(block, unmask_by, self.model.part, decide, seen)

        def final():
            slow, _ = self.block(begin, x0, open)
            return again(_shared.fill(slow, SAMPLERS["confidence"]))

        n, passes = block.open.sum(1), counts["nfe_rows"].to(block.x.device)
        right = self.right(block, again(x0), begin, final)
        speed = (n - passes + 1).clamp(min=0).double() / n.clamp(min=1)
        asked = n > 0
        share = lambda x: (x.double() * asked).sum().item() / max(int(asked.sum()), 1)
        self.last = {"right": share(right), "passes": share(passes)}
        reward = torch.where(asked & right, speed**self.settings.alpha, 0.0)
        self.last["reward"] = share(reward)
        return seen, reward, asked

    def policy_loss(self, forward, process, x0, size, t, objectives, given, charged, noise, **how):
        """
        Takes the place of token_loss: minus the mean over runs of (R - mean R of the other G - 1) S, with S =
        sum of log Bernoulli(chosen_i; sigmoid(h_i)), as often as tokens are charged: the loop divides.
        """
        B, G, b = len(x0), self.settings.group, self.size
        if not charged.any():  # a batch of prompts
            nothing = torch.zeros(1, b, device=self.model.embed.weight.device)
            loss = 0.0 * forward(part=(nothing, nothing > 0, nothing[:, :1])).sum()
            return loss, loss.detach()
        u = noise.uniform(G * b)[:, :b].view(B, b, G, b).permute(0, 2, 3, 1)  # (B, G, b, b)
        seen, reward, asked = self.runs(x0, given, charged | given, u)
        c, left, share, chosen = (torch.cat(x) for x in zip(*seen, strict=True))
        h = forward(part=(c, left.to(c.device), share)).to(reward.device)
        logp = log_probability(h, left, chosen).view(len(seen), -1).sum(0)  # (B G,)
        better = torch.where(asked, reward - others_mean(reward, G), 0.0)
        loss = -(better * logp).sum() / asked.sum().clamp(min=1)
        return loss * charged.sum().to(loss), loss.detach()

    def record(self):
        return self.last

    def note(self):
        if self.settings.reward == "check" and self.data.checker is None:
            die(f"{self.cfg.dataset} has no check(text) in its prepare.py", "--reward=same")
        return f"a policy for blocks of {self.size}; the network stays as it is"


# ----- the sampler


@sampler()
def policy(block, *, cut=0.5, draws=False):
    """
    Learned unmasking policy (arXiv 2512.09106): commit what the policy chooses, with probability above `cut`;
    where that is nothing, the surest. For checkpoints of --method unmasking_policy. --steps is a limit.

    cut: 0 commits all at once, 1 one at a time
    draws: choose by a draw instead, as in training; cut means nothing then
    """
    need(0 <= cut <= 1, "cut", cut, "between 0 and 1")
    need(not draws or cut == 0.5, "cut", cut, "left out where choices are draws")
    part = getattr(block.model, "part", None)
    made_by(isinstance(part, Policy), "unmasking_policy")
    n = block.x.size(1)
    need(part.size == n, "block_size", n, f"{part.size}, which the policy was trained for")

    def decide(k, h):
        p = h.double().sigmoid()
        if draws:
            return block.noise(-3 - k).uniform(1)[..., 0] < p
        return (p > cut) | (cut == 0)

    yield from unmask_by(block, part, decide)


# ----- for lab/zoo.py

ROWS = [
    {
        "system": "Unmasking policy",
        "paper": "2512.09106",
        "claim": "more right than a threshold of 0.9",
        "train": "--method unmasking_policy --ckpt {control} --max_steps 100 --eval_every 100 --batch_size 8",
        "control": "",
        "sampler": "policy",
        "control_sampler": "threshold",
        "by": "right 16",
    }
]
