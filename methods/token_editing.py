"""
Token editing: a sampler that writes what it is sure of, and corrects what it has written.

Each pass fills noise where the prediction is sure, and replaces a written token where another is surer still.
No training is needed for a network of uniform noise: it has learned that a visible token may be wrong. A
masked network has not; train it on wrong tokens first. LLaDA 2.1, arXiv 2602.08676.

    python sample.py --ckpt out/sudoku_uniform --sampler token_editing --temperature 0 --fill 0.7 --edit 0.9
"""

import math

import torch

from diffusion import pick
from generate import sampler
from samplers.pieces import need, top


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
