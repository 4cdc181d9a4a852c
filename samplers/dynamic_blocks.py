"""
How many tokens at once? A block that splits into smaller ones where the network is not sure. See generate.py
for letters.

It needs a network of several block sizes, each dividing the next: 1, 4 and 16, say. A part of a block at a
multiple of its own size is what the loop of generate.py calls a block: it reads the clean text before it. So
the cache serves all sizes, and rows may choose differently.
"""

import torch

from generate import ar, sampler
from samplers.pieces import another, entropy, need


@sampler()
def dynamic_blocks(block, *, choose="entropy", bound=0.5):
    """
    Blocks of several sizes in one text (after CtrlDiff, arXiv 2505.14455). Each part of the text is looked at
    as one block of pure noise; if it is not taken, it splits into blocks of the next smaller size:

        entropy   taken if the mean entropy of l over its open positions <= bound
        random    taken with probability bound: the control
        policy    taken with a probability that was learned, see methods/ctrldiff.py
        a size    parts of that size are taken, and larger ones are not looked at: a fixed block size

    A part of s tokens that is taken makes min(--steps, s) ancestral steps; the look is the pass of the first.
    A look at a part that splits is a pass for nothing. Parts of the smallest size are taken unseen.

    choose: entropy | random | policy | one of the sizes
    bound: in nats for entropy, a probability for random
    """
    sizes = sizes_of(block)
    names = ["entropy", "random", "policy", *map(str, sizes)]
    need(choose in names, "choose", choose, f"one of {', '.join(names)}")
    need(
        bound >= 0 and (choose != "random" or bound <= 1), "bound", bound, "at least 0; for random at most 1"
    )
    need(choose in ("entropy", "random") or bound == 0.5, "bound", bound, f"left out with choose {choose}")
    policy = getattr(block.model, "takes", None)
    need(choose != "policy" or policy, "choose", choose, "entropy or random: this network has no policy")

    def decide(part, logits):
        if choose == "entropy":
            return surprise(part, logits).sum(1) <= bound * part.open.sum(1)
        share = bound if choose == "random" else policy(surprise(part, logits), part.open)
        return coin(part) <= share

    yield from in_sizes(block, [int(choose)] if choose.isdigit() else sizes, decide)


def coin(part):
    """A uniform number of each row, (R,): not the one of parts of another size that begin here."""
    return part.noise(-2 - part.x.size(1)).uniform(1)[:, 0, 0]


def sizes_of(block):
    """The sizes a block may split into, the largest first: those trained that divide it and each other."""
    b = block.x.size(1)
    sizes = [b]
    for s in sorted(block.trained or [s for s in range(1, b) if b % s == 0], reverse=True):
        if s < sizes[-1] and sizes[-1] % s == 0:
            sizes.append(s)
    if sizes == [b] or sizes[-1] > 1 and not block.model.cfg.clean_causal:
        raise ValueError(f"this network has one block size, {b}: there is nothing to choose")
    return sizes


def surprise(part, logits):
    """The entropy of l in nats, (R, s) float64, 0 where nothing is open."""
    logl = part.process.loo_logits(logits, part.x, torch.zeros(len(part.x), dtype=torch.float64))
    return torch.where(part.open, entropy(logl.log_softmax(-1)).double(), 0.0)


def in_sizes(block, sizes, decide):
    """
    Write the block in parts of these sizes, the largest first. decide(part, logits) -> (R,) bool: which rows
    take a part as one block; logits (R, s, V) are what the network says of it as pure noise.
    """
    for at in range(0, block.x.size(1), sizes[0]):
        yield from fill(block, at, sizes, block.live, decide)


def fill(block, at, sizes, rows, decide):
    """The part that begins at `at`, in `rows` (R,) bool: as one block of the first size, or split."""
    size, smaller = sizes[0], sizes[1:]
    here = slice(at, at + size)
    open, steps = block.open[:, here] & rows[:, None], min(block.steps, size)
    part = another(block, block.rows, block.positions[here], open, block.cache, steps)
    if not part.live.any():
        return  # nothing but prompt
    logits, split = None, torch.zeros_like(rows)
    if smaller:
        logits = part.predict(part.alpha[0])
        take = decide(part, logits)
        part.live, split = part.live & take, part.live & ~take
        part.open = part.open & take[:, None]
    if part.live.any():
        for _ in ar(part) if size == 1 else ancestral_from(part, logits):
            x = block.x.clone()
            x[:, here] = torch.where(part.open, part.x, x[:, here])
            block.x = x
            yield
    if split.any():
        for i in range(0, size, smaller[0]):
            yield from fill(block, at + i, smaller, split, decide)


def ancestral_from(block, logits):
    """`ancestral`; logits: what the network said of the pure noise, or None."""
    for k in range(block.steps):
        a_t, a_s = block.alpha[k : k + 2]
        block.write(block.reverse(a_t, a_t, a_s, block.noise(k), logits=logits))
        logits = None
        block.live = block.live & (block.open & block.process.can_change(block.x)).any(1)
        yield
        if not block.live.any():
            return
