"""What several samplers use: the surest n, entropies, and a check of options. Letters as in generate.py."""

import math

import torch


def top(score, n, among):
    """(R, b) bool: the n highest scores of each row among `among`; n an int or (R,). Ties go left."""
    score = torch.where(among, score.double().clamp(min=-1e300), -math.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < (n.view(-1, 1) if torch.is_tensor(n) else n)) & among


def need(fine, name, value, what):
    """Raise ValueError unless an option is fine."""
    if not fine:
        raise ValueError(f"{name} must be {what}, not {value}")


def entropy(logp):
    """Of log-probabilities (..., V), in nats."""
    return torch.special.entr(logp.exp()).sum(-1)


def margin(logits):
    """The highest minus the second highest; 0 where there is but one."""
    best = logits.topk(min(2, logits.size(-1)), dim=-1).values
    return best[..., 0] - best[..., -1]


def kl(p, q):
    """KL(p || q) of log-probabilities (..., V)."""
    return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1)


def another(block, rows, positions, open, cache, steps=None):
    """
    A Block of the same text over other rows (R,) and positions (n,); open (R, n). Row i of the cache must be
    row i of it. Passes are counted where those of `block` are. steps: its own, if not those of `block`.
    """
    names = ("temperature", "top_p", "schedule", "seed", "trained")
    how = {name: getattr(block, name) for name in names} | {"steps": steps or block.steps}
    where = (y.cpu() for y in (rows, positions, open))
    return type(block)(block.model, block.process, block.text, cache, block.counts, *where, how)
