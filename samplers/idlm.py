"""
A language model that reads masks as tokens to come: I-DLM (arXiv 2604.11035). See generate.py for letters,
and `speculation` in samplers/guided.py for drafts by a noisy stream.
"""

import torch

from generate import sampler
from samplers.diffuspec import verify
from samplers.pieces import another, need


@sampler("AR mode", "absorbing", "own pace", "any block")
def idlm(block, *, stride=4):
    """
    The text of --sampler ar, token for token (I-DLM, arXiv 2604.11035). One causal pass of the clean stream
    checks the drafts y and makes the next ones, which masks m behind them are asked for:

        reads    x_n-1   y_1 ... y_K     m  ...  m          K < stride, and stride - 1 masks
        says     x_n     x_n+1 ...       drafts for n + K + 1, n + K + 2, ...

    Drafts that AR sampling would write stay, and one token of its own behind them. If one was wrong, so is
    what the masks stood behind, and the next pass has no drafts. Text and drafts are drawn with the same
    random numbers. (The public loop accepts an argmax by min(1, p / q): that is AR's text at temperature 0
    alone.) For networks that learnt to read masks so; for others the text is the same, and slower.

    stride: drafts and the token before them, in one pass; 1 is AR
    """
    need(stride >= 1, "stride", stride, "at least 1")
    block.need_ar_mode()
    mask, b, says = block.process.mask_id, block.x.size(1), reader(block)
    here, known, y = torch.arange(b, device=block.x.device), ~block.open, block.x
    drafted = torch.zeros_like(known)
    while block.live.any():
        end = (known | drafted).int().cumprod(1).sum(1)  # behind the drafts: the first that is unknown
        last = min(b, int(torch.where(block.live, end, 0).max()) + stride)
        fed = torch.where(known | drafted, y, mask)
        own = block.ar_draw(block.process.loo_logits(says(fed, last), block.x, 0.0))
        n = (known | drafted & (own == y)).int().cumprod(1).sum(1)[:, None]  # up to here all are right
        y, fine = torch.where(known, y, own), n == end[:, None]
        known = known | (here <= n)
        drafted = fine & (here > n) & (here < n + stride) & (here < last) & ~known
        block.write(torch.where(known, y, mask))
        block.live = block.live & ~known.all(1)
        yield


def reader(block):
    """(fed, last) -> block.verify(fed) up to `last`, zeros behind. A next-token network has no position 0."""
    if not block.model.cfg.next_token or block.positions[0]:
        return lambda fed, last: verify(block, fed, last)
    if block.open[:, 0].any():
        raise ValueError("nothing stands before the first token (bos_id): idlm needs a prompt")
    behind = another(block, block.rows, block.positions[1:], block.open[:, 1:], block.cache)

    def says(fed, last):
        behind.live = block.live
        return torch.nn.functional.pad(verify(behind, fed[:, 1:], last - 1), (0, 0, 1, 0))

    return says
