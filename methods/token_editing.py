"""
Token editing: a sampler that writes what it is sure of, and corrects what it has written.

    python sample.py --ckpt out/sudoku_uniform --sampler token_editing --temperature 0 --fill 0.7 --edit 0.9

Each pass fills noise where the prediction is sure, and replaces a written token where another is surer still.
A network of uniform noise needs no training for it: it has learned that a visible token may be wrong. A
masked network has learned nothing about visible tokens. This trains it on:

    python train.py --method token_editing --ckpt out/sudoku
    python sample.py --ckpt out/sudoku_editing --sampler token_editing --temperature 0 --fill 0.7 --edit 0.9

    x_t: a token becomes a mask with probability 1 - alpha_t; one that stays becomes a random one with
    probability `wrong`
    loss = sum over all tokens that carry loss, visible ones too, of -log p(x_0,i | x_t)

With --wrong 0, the control, it learns to trust what it sees. LLaDA 2.1, arXiv 2602.08676. Theirs: one
cross-entropy for masked and for wrong tokens, and the sampler's rule. Ours: `wrong`, which they do not give,
and the loss at right tokens, so that p weighs how often a token is wrong.
"""

import functools
import math
from dataclasses import dataclass

import torch

import methods
from diffusion import pick, sigma_for
from generate import sampler
from methods import _shared
from run.cli import die
from samplers.pieces import need, top


@dataclass
class Settings:
    ckpt: str = "out/run"  # the network, a training run's out_dir
    size: int = 0  # a block size above 1 that it knows; 0: the largest
    wrong: float = 0.1  # the share of wrong ones among visible tokens; 0 is the control


FIXED = (*_shared.FIXED, "wrong")
INHERITS = (*_shared.INHERITS, "weight_decay", "beta1", "beta2", "grad_clip")


def DEFAULTS(s):
    more = {"lr": 3e-4, "warmup": 20, "lr_schedule": "constant", "ema": 0.99}
    return _shared.defaults(s.ckpt, "editing", max_steps=300, **more)


def check(cfg, s):
    if not 0 <= s.wrong < 1:
        die(f"wrong is {s.wrong}, it must be in [0, 1)", "--wrong=0.1")
    if cfg.process != "masked":
        fix = f"python sample.py --ckpt {s.ckpt} --sampler token_editing"
        die(f"{s.ckpt} has {cfg.process} noise: it has met wrong tokens already", fix)
    _shared.check(cfg, s, "token_editing")


def editing_loss(
    forward, process, x0, size, t, objective, given, charged, schedule, start, noise, device=None, *, wrong
):
    """
    Takes the place of token_loss, arguments there: cross-entropy at all charged tokens, in nats. Rows of
    block size 1 read pure noise, as ever.
    """
    x0, given, charged, noise = (y.to(device or x0.device) for y in (x0, given, charged, noise))
    x, given, charged = x0[:, start:], given[:, start:], charged[:, start:]
    ar = (torch.as_tensor(size, device=x.device).expand(len(x)) == 1)[:, None]
    alpha = schedule(t)[0]
    xt = process.corrupt(x, alpha, noise)
    u = noise.uniform(2)
    other = (u[..., 1] * (process.vocab_size - 1)).long().clamp(max=process.vocab_size - 2)
    other = other + (other >= process.mask_id)  # any id but the mask, its own among them
    xt = torch.where(process.known(xt) & (u[..., 0] <= wrong), other, xt)
    xt = torch.where(given, x, torch.where(ar, process.ar_input(x.shape, noise), xt))
    level = sigma_for(forward, torch.where(ar[:, 0], 0.0, alpha))
    logits = forward(x0, xt, size, start, level)
    ce = -pick(process.loo_logits(logits).log_softmax(-1), x)
    per_token = torch.where(charged, ce, 0.0)
    return per_token.sum(), per_token.detach()


class Learner(methods.Learner):
    def loss(self, step):
        return functools.partial(editing_loss, wrong=self.settings.wrong)


# ----- the sampler


@sampler("own pace")
def token_editing(block, *, fill=0.7, edit=0.9, post=16, hold=0.9):
    """
    Token editing (LLaDA 2.1, arXiv 2602.08676), with l, which leaves a token's own evidence out (at low noise
    D copies what it sees):

        fill     y ~ l where nothing is written and l(y) >= fill, at least the surest
        replace  a written token by argmax l where that is another one and l > edit

    The noise level is the share written, at most `hold`. It ends when all is written and nothing changes.

    fill: 0 writes all at once, 1 about one at a time
    edit: above 1 nothing is edited
    post: passes after all is written, at most
    hold: the largest noise level alpha that the network is told
    """
    need(0 <= fill <= 1, "fill", fill, "between 0 and 1")
    need(0 <= edit < math.inf, "edit", edit, "at least 0 and finite")
    need(post >= 0, "post", post, "at least 0")
    need(0 < hold <= 1, "hold", hold, "above 0, at most 1")
    written, k, passes_left = ~block.open, 0, torch.full((len(block.x),), post, device=block.x.device)
    while block.live.any():
        left, noise = ~written, block.noise(k)
        share = (written & block.open).sum(1) / block.open.sum(1).clamp(min=1)
        alpha = share.double().clamp(max=hold)
        logl = block.process.loo_logits(block.predict(alpha), block.x, alpha).log_softmax(-1)
        y = block.draw(block.sharpen(logl), noise)
        c, best = pick(logl, y), logl.argmax(-1)
        take = left & ((c >= math.log(max(fill, 1e-300))) | top(c, 1, left))
        change = block.open & written & (best != block.x) & (pick(logl, best).exp() > edit)
        passes_left = torch.where(left.any(1), passes_left, passes_left - 1)
        change = change & (passes_left >= 0)[:, None]
        x = torch.where(take, y, torch.where(change, best, block.x))
        all_written = ~left.any(1)
        written = written | take
        block.write(torch.where(written, x, block.prior(noise)))
        done = all_written & (~change.any(1) | (passes_left <= 0))
        done = done | (written.all(1) & ((edit > 1) | (post == 0)))
        block.live, k = block.live & ~done, k + 1
        yield


ROWS = [
    {
        "system": "Token editing",
        "paper": "2602.08676",
        "claim": "more right than keeping what is sure (threshold), on uniform noise",
        "train": "--process uniform",
        "control": "--process uniform",
        "sampler": "token_editing",
        "control_sampler": "threshold",
        "by": "right pace",
        "control_by": "right 16",
    }
]
