"""
Clipped schedules: mask rates are drawn from the part of (0, 1) in which the loss varies least.

    loss of a token = 1[x_t = mask] 1/p * -log p(x_0 | x_t),    p ~ U(low, high), one for each block
    with low = 0 and high = 1 its mean is the bound

Which part? Every eval_every steps the loss of that step's rows is measured for many ranges, and the one is
taken in which it varies least from block to block. Every block size has its own. With block size b and
predictions that do not depend on p the variance is in proportion to

    1/b ( log(high / low) / (high - low) - 1 )      (a test compares; `variance` measures it of real losses)

The published code forgets the weight 1/p where low is above 0.5, and so compares unlike numbers; here it
stays. It also draws masks anew where their share falls outside of the range, which changes what a mask rate
is; here it does not. eval.py reports the bound over all rates. BD3-LM, arXiv 2503.09573.

    python train.py config/digits.toml --method clipped --block_sizes 4:1 --out_dir out/clipped
"""

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist

import methods
from run.cli import die

LEAST = 1e-3  # the smallest mask rate; below, the variance of 1/p knows no end
WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
STARTS = [k / 20 for k in range(11)]
RANGES = [(max(a, LEAST), round(a + w, 2)) for w in WIDTHS for a in STARTS if a + w < 1.001] + [(LEAST, 1.0)]


@dataclass
class Settings:
    low: float = 1e-3  # the range of mask rates that training begins with
    high: float = 1.0
    search: bool = True  # look for a better range at every eval_every steps
    search_draws: int = 4  # draws of masks for each range: more see smaller differences


DEFAULTS = {"objective": "elbo"}
FIXED = ("low", "high")


def check(cfg, settings):
    low, high = settings.low, settings.high
    if not 0 < low <= high <= 1:
        die(f"mask rates from {low} to {high}: it must be 0 < low <= high <= 1", "--low=0.3 --high=0.8")
    if settings.search_draws < 1:
        die(f"search_draws is {settings.search_draws}, it must be at least 1", "--search_draws=4")
    if cfg.process != "masked":
        die(f"clipping is of mask rates, and this is {cfg.process} noise", "--process=masked")
    if cfg.schedule != "loglinear":
        die(f"mask rates are drawn evenly: a {cfg.schedule} schedule has no say", "--schedule=loglinear")
    if not cfg.objectives():
        die("block size 1 has no mask rates: there is nothing to clip", "--block_sizes=1:0.25,16:0.75")
    if set(cfg.objectives().values()) != {"elbo"}:
        die(f"objective {cfg.objective} has no weights 1/p, whose variance is clipped", "--objective=elbo")


# ----- the loss


def rates(t, sizes, positions, seq_len, ranges):
    """
    The mask rate p of every token, (B, L) float64: one for each block, low + (high - low) u. The u of a row's
    blocks are evenly spaced, from the row's own t on; those of all rows are even too.
    t (B,) in (0, 1). sizes (B,). ranges: {block size: (low, high)}; block size 1 has none, and is not asked.
    """
    limits = torch.tensor([ranges.get(b, (1.0, 1.0)) for b in sizes.tolist()], dtype=torch.float64)
    low, high, b = limits[:, :1], limits[:, 1:], sizes[:, None]
    u = (t[:, None] + (positions // b) / (seq_len // b).double()) % 1
    return low + (high - low) * u


def at_rate(p):
    """alpha = 1 - p, and a slope that makes the weight -alpha' / (1 - alpha) of the bound 1 / p."""
    return 1 - p, -torch.ones_like(p)


# ----- the search


def variance(per_token, charged, sizes, positions, b):
    """The variance of the mean loss of a block, over all blocks of size b; 0 where there are not two."""
    rows = sizes == b
    block = (positions // b).expand(int(rows.sum()), -1)
    empty = torch.zeros(len(block), int(positions[-1]) // b + 1, dtype=torch.float64)
    n = empty.scatter_add(1, block, charged[rows].double())
    mean = (empty.scatter_add(1, block, per_token[rows].double()) / n)[n > 0]
    return mean.var().item() if len(mean) > 1 else 0.0


class Learner(methods.Learner):
    """ranges: {block size: (low, high)}, what the checkpoint keeps."""

    def __init__(self, cfg, settings, model, process, token_loss):
        super().__init__(cfg, settings, model, process, token_loss)
        self.ranges = {b: (settings.low, settings.high) for b in cfg.block_sizes if b > 1}

    def loss(self, step):
        self.due = self.settings.search and step > 0 and step % self.cfg.eval_every == 0
        return self.clipped

    def clipped(self, forward, process, x0, block_size, t, objective, **how):
        """token_loss at clipped mask rates; where a search is due, it comes first."""
        how["schedule"] = at_rate
        sizes = torch.as_tensor(block_size).expand(len(x0)).cpu()
        positions = torch.arange(how["start"], x0.size(1))

        def ask(t, ranges, **how):
            p = rates(t, sizes, positions, x0.size(1), ranges)
            return self.token_loss(forward, process, x0, block_size, p, objective, **how)

        if self.due:
            self.due = False
            self.search(ask, t, how, sizes, positions)
        return ask(t, self.ranges, **how)

    @torch.no_grad()
    def search(self, ask, t, how, sizes, positions):
        """Takes for each block size the range of least variance, over draws and processes."""
        found = torch.zeros(len(RANGES), len(self.ranges), dtype=torch.float64)
        charged = how["charged"][:, positions[0] :].cpu()
        for k in range(self.settings.search_draws):
            for i, candidate in enumerate(RANGES):
                noise = copy.copy(how["noise"])
                noise.taken += 8 * (k + 1)  # the same numbers for all ranges, and others than the step's
                later = (t + k / self.settings.search_draws) % 1
                _, each = ask(later, dict.fromkeys(self.ranges, candidate), **how | {"noise": noise})
                for j, b in enumerate(self.ranges):
                    found[i, j] += variance(each.cpu(), charged, sizes, positions, b)
        if dist.is_initialized():
            found = found.to(how["device"])
            dist.all_reduce(found)
        for b, each in zip(self.ranges, found.T.cpu(), strict=True):
            if each.max() > 0:  # a step may have no row of this size
                self.ranges[b] = RANGES[each.argmin()]

    def state_dict(self):
        return {"ranges": {b: list(limits) for b, limits in self.ranges.items()}}

    def load_state_dict(self, state):
        self.ranges |= {b: tuple(limits) for b, limits in state["ranges"].items() if b in self.ranges}

    def record(self):
        low = {f"low_{b}": limits[0] for b, limits in self.ranges.items()}
        return low | {f"high_{b}": limits[1] for b, limits in self.ranges.items()}

    def note(self):
        return "mask rates are clipped: the loss printed is not a bound, the validation is"


ROWS = [
    {
        "system": "Clipped schedules",
        "paper": "2503.09573",
        "claim": "fewer nats than mask rates from 0 to 1",
        "train": "--method clipped --eval_every 300",
        "control": "--method clipped --search false",
        "by": "nats 16",
    }
]
