"""
Masks: which tokens of a block are hidden together in training. Three recipes of AR models that became
diffusion models; the noise, the network and the samplers stay what they are.

    complementary  every row twice, with masks M and not M: mean of the two losses      (Fast-dLLM v2)
    position       k = round(t b) masks a block, late ones likelier: the k largest of
                   log w_i + Gumbel,  w_i = exp(beta (1 - t) i),  beta = ln 2 / (lambda b)  (Efficient-DLM)
    growth         small blocks first, then larger ones, beside block size 1              (NBDiff)

Complementary masks teach every token once a step, so the loss varies less; the mean is the same. Position
masks change the mean: what is trained is no bound. eval.py uses ordinary masks for all three.
Fast-dLLM v2, arXiv 2509.26328; Efficient-DLM, 2512.14067; NBDiff, 2512.06776.

    python train.py config/digits.toml --method masks --masks complementary
    python train.py config/digits.toml --method masks --masks position --late 0.1
    python train.py config/digits.toml --method masks --masks plain --growth 2,4,8,16 --init_from out/ar
"""

import copy
import functools
import math
from dataclasses import dataclass

import torch

import methods
from diffusion import column
from run.cli import die


@dataclass
class Settings:
    masks: str = "complementary"  # complementary, position or plain
    late: float = 0.1  # lambda of position masks: small hides the end of a block first
    growth: str = ""  # block sizes, 2,4,8,16: one after the other; empty: none
    stage_steps: int = 300  # how long each of them lasts; the last one until the end


def check(cfg, settings):
    if settings.masks not in ("complementary", "position", "plain"):
        die(f"masks {settings.masks!r}: complementary, position or plain", "--masks complementary")
    if not 1e-6 <= settings.late <= 1e6:
        die(f"late is {settings.late}, it must be in [1e-6, 1e6]", "--late=0.1")
    if cfg.process != "masked" or cfg.next_token:
        die("these are recipes for masks, and this network reads none", "--process=masked --next_token=false")
    if not cfg.objectives():
        die("block size 1 hides every token: there is nothing to choose", "--block_sizes=1:0.25,16:0.75")
    sizes, largest = stages(settings.growth), math.lcm(*cfg.block_sizes)
    if sizes is None:
        die(f"growth {settings.growth!r} is no list of rising block sizes above 1", "--growth 2,4,8,16")
    if sizes and (not cfg.clean_causal or any(largest % b for b in sizes)):
        problem = f"growth {settings.growth}: blocks of {largest} are not made of these"
        die(problem, "--growth 2,4,8,16 --block_sizes=1:0.25,16:0.75 --clean_causal=true")
    if settings.stage_steps < 1:
        die(f"stage_steps is {settings.stage_steps}, it must be at least 1", "--stage_steps=300")


def stages(growth):
    """[2, 4, 8, 16] of "2,4,8,16", [] of nothing, None of something else."""
    words = growth.split(",") if growth else []
    if not all(word.strip().isdecimal() for word in words):
        return None
    sizes = [int(word) for word in words]
    return sizes if sizes == sorted(set(sizes)) and min(sizes, default=2) > 1 else None


class Learner(methods.Learner):
    def loss(self, step):
        sizes = stages(self.settings.growth) or [math.inf]
        now = min(step // self.settings.stage_steps, len(sizes) - 1)
        return functools.partial(self.masked_loss, largest=sizes[now])

    def masked_loss(
        self, forward, process, x0, block_size, t, objective, given, schedule, start, noise, *, largest, **how
    ):
        """token_loss with other masks, in blocks of at most `largest`. Rows of block size 1 are as ever."""
        block_size = torch.as_tensor(block_size).expand(len(x0))
        if largest < math.inf:
            block_size, objective = grown(block_size, objective, largest)
        how |= {"given": given, "schedule": schedule, "start": start}
        views = [None]  # ordinary masks
        if self.settings.masks == "complementary":
            views = [None, functools.partial(complement, process, schedule)]
        if self.settings.masks == "position":
            hide = {"b": block_size, "given": given[:, start:], "late": self.settings.late}
            views = [functools.partial(by_position, process, schedule, **hide)]
        losses = []
        for corrupt in views:
            again = copy.copy(noise)  # both views begin with the same random numbers
            args = forward, process, x0, block_size, t, objective
            losses.append(self.token_loss(*args, noise=again, corrupt=corrupt, **how))
        return sum(total for total, _ in losses) / len(views), sum(each for _, each in losses) / len(views)


def grown(sizes, objective, largest):
    """Block sizes (B,) of at most `largest`, and the objective of each: {size: name}, or one name for all."""
    now = {b: min(b, largest) for b in sizes.unique().tolist()}
    if not isinstance(objective, str):
        objective = {now[b]: objective.get(b) for b in now}  # the larger of two that are now one
    return torch.tensor([now[b] for b in sizes.tolist()]), objective


def complement(process, schedule, x, t, noise):
    """
    Hides the tokens that Masked.corrupt leaves visible with the same random numbers, so each token is hidden
    in one view and visible in the other. It returns 1 - alpha_t in place of alpha_t. What token_loss takes as
    `corrupt`.
    """
    alpha, dalpha = schedule(t)
    hide = noise.uniform(1)[..., 0] > 1 - column(alpha, x)
    return torch.where(hide, process.mask_id, x), lambda ids, plain: ids, 1 - alpha, dalpha


def by_position(process, schedule, x, t, noise, *, b, given, late):
    """
    Of the n tokens of each block that are not given round(t n) are hidden, those with the largest
    log w_i + Gumbel,  log w_i = beta (1 - t) i,  i = 1..b. What token_loss takes as `corrupt`.
    b: block sizes (B,). late: lambda.
    """
    alpha, dalpha = schedule(t)
    b, hidden_share, given = b.to(x.device)[:, None], 1 - column(alpha, x), given.to(x.device)
    at = torch.arange(x.size(1), device=x.device)  # from the first position of a block
    beta = math.log(2) / (late * b)
    gumbel = -(-noise.uniform(1)[..., 0].log()).clamp(min=1e-300).log()
    score = beta * (1 - hidden_share) * (at % b + 1) + gumbel
    score = score.masked_fill(given, -math.inf)
    together = (at // b)[:, :, None] == (at // b)[:, None]  # (B, L, L): in one block
    rank = (together & (score[:, None] > score[:, :, None])).sum(-1)
    open = (together & ~given[:, None]).sum(-1)
    hide = (rank < (hidden_share * open).round()) & ~given
    return torch.where(hide, process.mask_id, x), lambda ids, plain: ids, alpha, dalpha


ROWS = [
    {
        "system": "Complementary masks",
        "paper": "2509.26328",
        "claim": "a lower bound than twice the rows with masks of their own",
        "train": "--method masks --masks complementary",
        "control": "--accumulation 2",  # as many passes
        "by": "nats 16",
    },
    {
        "system": "Position masks",
        "paper": "2512.14067",
        "claim": "more right in 4 steps, the surest first, than with ordinary masks",
        "train": "--method masks --masks position",
        "control": "",
        "sampler": "confidence",
        "control_sampler": "confidence",
        "by": "right 4",
    },
    {
        "system": "Growing blocks",
        "paper": "2512.06776",
        "claim": "more right in 4 steps than with large blocks from the start",
        "train": "--method masks --masks plain --growth 2,4,8,16 --stage_steps 375",
        "control": "",
        "by": "right 4",
    },
]
