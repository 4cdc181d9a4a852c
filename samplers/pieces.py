"""
What several samplers use: the surest n, entropies, a check of options, writing ahead of a block. Letters as
in generate.py.
"""

import math

import torch

from rng import Noise


def top(score, n, among):
    """(R, b) bool: the n highest scores of each row among `among`; n an int or (R,). Ties go left."""
    score = torch.where(among, score.double().clamp(min=-1e300), -math.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < (n.view(-1, 1) if torch.is_tensor(n) else n)) & among


def need(fine, name, value, what):
    """Raise ValueError unless an option is fine."""
    if not fine:
        raise ValueError(f"{name} must be {what}, not {value}")


def made_by(fine, method):
    """Raise ValueError unless a network is one of a method."""
    if not fine:
        e = ValueError(f"the network must be one of --method {method}")
        e.fix = f"python train.py --method {method} --help"
        raise e


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


def so_far(block):
    """The text (R, W) with -1 where this block is to write, for a sampler that writes ahead of its block."""
    text = block.text[block.rows]
    text[:, block.positions] = torch.where(block.open, -1, text[:, block.positions])
    return text


def known(text, name):
    """How many tokens of text (R, W) stand before the first -1, (R,). Raises ValueError for holes."""
    n = (text >= 0).int().cumprod(1).sum(1)
    if ((text >= 0).sum(1) > n).any():
        raise ValueError(f"{name} writes from left to right, and a prompt has holes")
    return n


def write_ahead(block, state):
    """
    Fill the block from a state that may be ahead of it: tokens (R, W), of which the first `n` (R,) are known.
    state.round(live (R,) bool) is one more pass, and returns how many tokens it put through the network.
    """
    end = torch.where(block.open, block.positions + 1, 0).amax(1)  # (R,) behind what this block is to write
    while True:
        there = block.positions < state.n[:, None]
        block.write(torch.where(there, state.tokens[:, block.positions], block.x))
        block.live = block.live & (state.n < end)
        if not block.live.any():
            break
        yield
        block.count(state.round(block.live))
    yield


class Ahead:
    """
    Rows of text that a sampler writes ahead of its block. tokens (R, W), `n` (R,) of them known; b: the block
    size. Each row has a cache of its own: the rows stand at different places. A subclass has further(r): one
    more pass of row r. It returns how many tokens went through the network.
    """

    def __init__(self, block):
        self.model, self.process, self.b = block.model, block.process, block.x.size(1)
        self.temperature, self.top_p = block.temperature, block.top_p
        self.seed, self.rows = block.seed, block.rows
        self.tokens = so_far(block)
        self.n = known(self.tokens, "this sampler")
        self.caches = [block.model.new_cache(1, 0) for _ in self.tokens]

    def keep(self, rows):
        """Drop the rows not in `rows`."""
        self.n, self.tokens, self.rows = self.n[rows], self.tokens[rows], self.rows[rows]
        self.caches = [self.caches[i] for i in rows.tolist()]

    def noise(self, r, start, n, step=0):
        """Random numbers for n positions of row r, from `start` on."""
        positions = torch.arange(start, start + n, device=self.rows.device)
        return Noise(self.seed, self.rows[r : r + 1], positions, step)

    def round(self, live):
        """A pass for each row of live (R,). Returns how many tokens went through the network."""
        return sum(self.further(r) for r in live.nonzero()[:, 0].tolist())
