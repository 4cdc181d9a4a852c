"""
How do the released block-diffusion models write? The loops their authors published, each as a sampler. See
generate.py for letters. Weights: docs/hub.md.

Here the mask is never an answer. The published loops do not forbid it; a trained network does not say it.
Another number of tokens per step than there are masks left commits those that are left.
"""

import torch

from diffusion import pick
from generate import sampler
from samplers.pieces import need, top


def log_l(block, committed):
    """log l of the block as it stands, (R, b, V). The share committed is the noise level."""
    done = (committed & block.open).sum(1) / block.open.sum(1).clamp(min=1)
    alpha = torch.where(committed.all(1), 0.0, done).double()  # finished rows are not asked
    return block.process.loo_logits(block.predict(alpha), block.x, alpha).log_softmax(-1)


def proposal(block, logp, noise):
    """Tokens y and the log of their probability, (R, b); at temperature 0 that before the temperature."""
    sharp = block.sharpen(logp).log_softmax(-1)
    y = block.draw(sharp, noise)
    return y, pick(logp if block.temperature == 0 else sharp, y)


def commit(block, committed, keep, y):
    """Write y where `keep` says; what is committed now, (R, b) bool. Rows without masks are finished."""
    committed = committed | keep
    block.write(torch.where(keep, y, block.x))
    block.live = block.live & ~committed.all(1)
    return committed


@sampler("absorbing")
def sdar(block, *, rule="dynamic", threshold=0.85):
    """
    SDAR (arXiv 2510.06303). n_k tokens at step k: b // T, and one more in the first b % T steps. Confidence
    is the probability of the drawn token, with temperature and top_p; at temperature 0 that before them.

        static      the n_k surest
        dynamic     all above the threshold; if they are fewer than n_k, the n_k surest
        sequential  the n_k leftmost

    --steps is T; blocks with a part of the prompt in them take fewer.

    rule: dynamic | static | sequential
    threshold: of dynamic
    """
    need(rule in ("dynamic", "static", "sequential"), "rule", rule, "dynamic, static or sequential")
    need(0 <= threshold <= 1, "threshold", threshold, "between 0 and 1")
    b, committed = block.x.size(1), ~block.open
    T = min(block.steps, b)
    for k in range(T):
        n, left = b // T + (k < b % T), ~committed
        y, sure = proposal(block, log_l(block, committed), block.noise(k))
        if rule == "sequential":
            keep = left & (left.cumsum(1) <= n)
        else:
            keep = top(sure, n, left)
        if rule == "dynamic":
            above = left & (sure.exp() > threshold)
            keep = torch.where(above.sum(1, keepdim=True) >= n, above, keep)
        committed = commit(block, committed, keep, y)
        yield
        if not block.live.any():
            return


@sampler("absorbing")
def a2d(block):
    """
    The sampler of dLLM for BD3-LM (arXiv 2503.09573), as with the weights it made of Qwen3: the surest tokens
    first, by the probability before the temperature. Of n masks left at the kth of T steps, n / (T - k + 1)
    are committed, rounded, halves to even. Steps of no token are left out.
    """
    committed, n_left, counts = ~block.open, block.open.sum(1), []
    for k in range(block.steps):
        counts.append((n_left.double() / (block.steps - k)).round().long())
        n_left = n_left - counts[-1]
    counts = torch.stack(counts, dim=1)  # (R, T)
    counts = counts.gather(1, (counts == 0).int().argsort(dim=1, stable=True))  # each row's zeros at its end
    for k in range(block.steps):
        logp = log_l(block, committed)
        y = block.draw(block.sharpen(logp), block.noise(k))
        committed = commit(block, committed, top(pick(logp, y), counts[:, k], ~committed), y)
        yield
        if not block.live.any():
            return


@sampler("absorbing", "own pace")
def fast_dllm(block, *, sub_block=0, threshold=0.9):
    """
    Fast-dLLM v2 (arXiv 2509.26328): parts of a block from left to right. In a part every token above the
    threshold is committed, and at least the surest; then the next part. With a network that reads position i
    at i - 1, the first token of a block is what the clean text before it says, the likeliest one, before
    anything else.

    sub_block: tokens of a part; it divides the block. 0: a quarter of the block, or all of it
    threshold: 1 is one token a pass
    """
    b = block.x.size(1)
    need(sub_block >= 0 and b % (sub_block or 1) == 0, "sub_block", sub_block, f"a divisor of {b}, or 0")
    sub_block = sub_block or (b // 4 if b % 4 == 0 else b)
    need(0 <= threshold <= 1, "threshold", threshold, "between 0 and 1")
    part = torch.arange(b, device=block.x.device) // sub_block  # (b,)
    committed, k = ~block.open, 0
    if hasattr(block.model, "one_before") and int(block.positions[0]) > 0:
        first = torch.zeros_like(committed)
        first[:, 0] = block.open[:, 0]
        if first.any():
            live, block.live = block.live, block.live & first[:, 0]  # others need no such pass
            y = log_l(block, committed).argmax(-1)
            block.live = live
            committed = commit(block, committed, first, y)
            yield
    while block.live.any():
        left = ~committed
        now = torch.where(left, part, b).min(1, keepdim=True).values  # the first part with a mask, (R, 1)
        left = left & (part == now)
        y, sure = proposal(block, log_l(block, committed), block.noise(k))
        keep = left & (sure.exp() > threshold) | top(sure, 1, left)
        committed, k = commit(block, committed, keep, y), k + 1
        yield
