"""
dParallel: the network learns to be sure of its own texts early, so that more tokens are committed at once.

    python train.py --method dparallel --ckpt out/sudoku
    python train.py --method dparallel --ckpt out/sudoku --certainty 0 --out_dir out/sudoku_ce   # control
    python sample.py --ckpt out/sudoku_dparallel --sampler certain --temperature 0 --bound 0.1

Before the first step the network writes a text y for the prompts of `texts` rows, one token at a time, always
the surest. A step masks half of a block, and its other half in a second copy:

    loss = sum over the two copies of  mean over masks of -log p(y_i)
                                     + certainty * mean over masks where argmax p is y_i of H(p^(1/T))

H is the entropy in nats, T = 0.5: where the network is right, it is pushed to be sure. Rows of block size 1
go on with cross-entropy on the data, so the AR mode stays. Masked noise only. dParallel, arXiv 2509.26488.
Theirs: own texts, complementary masks, both terms and their weights. Ours: all weights are trained, where
they train LoRA; and the sampler's bound is 0.1 nats, where they have 0.5 for a vocabulary of 126,000.
"""

import math
from dataclasses import dataclass

import torch

from diffusion import pick
from generate import SAMPLERS, sampler
from methods import _shared
from run.cli import die
from samplers.pieces import entropy, need, top
from samplers.unmasking import unmask


@dataclass
class Settings:
    ckpt: str = "out/run"  # the network, a training run's out_dir
    size: int = 0  # the block size that learns; 0: the largest. Others but 1 rest
    texts: int = 512  # rows that get a text of the network's own, at least
    certainty: float = 2.0  # weight of the entropy; 0 is the control
    entropy_temperature: float = 0.5  # T, of p in the entropy


FIXED = (*_shared.FIXED, "texts", "certainty", "entropy_temperature")
INHERITS = (*_shared.INHERITS, "weight_decay", "beta1", "beta2", "grad_clip")


def DEFAULTS(s):
    more = {"lr": 1e-4, "warmup": 20, "lr_schedule": "constant", "ema": 0.99}
    return _shared.defaults(s.ckpt, "dparallel", max_steps=300, **more)


def check(cfg, s):
    for name, fine, fix in (
        ("texts", s.texts >= 1, "512"),
        ("certainty", 0 <= s.certainty < math.inf, "2"),
        ("entropy_temperature", 0 < s.entropy_temperature < math.inf, "0.5"),
    ):
        if not fine:
            die(f"{name} cannot be {getattr(s, name)}", f"--{name}={fix}")
    if cfg.process != "masked":
        die(f"dparallel is for masked noise, and {s.ckpt} has {cfg.process} noise", "--ckpt of another run")
    _shared.check(cfg, s, "dparallel")


# ----- the loss


def certainty_loss(logp, y, masked, certainty, T):
    """
    Of one copy: the mean over its masks of -log p(y_i), and certainty times the mean of H(p^(1/T)) over those
    where argmax p is y_i. In nats; logp (B, L, V), y and masked (B, L).
    """
    right = masked & (logp.argmax(-1) == y)
    q = (logp / T).log_softmax(-1)
    H = -(q.exp() * q).sum(-1)  # logp is finite, and so is this gradient
    mean = lambda x, among: torch.where(among, x, 0.0).sum() / among.sum().clamp(min=1)
    return mean(-pick(logp, y), masked) + certainty * mean(H, right)


class Learner(_shared.Writes):
    texts = (
        None  # x0 (n, T) with a block of the network's own text in each row, and given: all but that block
    )

    def __init__(self, cfg, settings, model, process, token_loss):
        super().__init__(cfg, settings, model, process, token_loss)
        self.token_loss = self.own_loss

    def batches(self, step, default):
        """Rows of block sizes above 1 become rows with a block of the network's own text."""
        if self.texts is None:
            self.collect(default)
        x, fixed = self.texts
        batches = []
        for i, (x0, given, real, sizes, *rest) in enumerate(default(step)):
            which = (torch.arange(len(x0)) + len(x0) * (step * self.cfg.accumulation + i)) % len(x)
            own = (sizes > 1)[:, None]
            x0, given = torch.where(own, x[which], x0), torch.where(own, fixed[which], given)
            batches.append((x0, given, real | own, sizes, *rest))
        return batches

    @torch.no_grad()
    def collect(self, default):
        """The texts, by the network as it is before the first step."""
        training = self.model.training
        self.model.eval()
        found, n, k = [], 0, 0
        while n < self.settings.texts and k < self.settings.texts:
            for x0, given, real, *_ in default(k):
                if not (blocks := _shared.blocks_of(x0, given, real, self.size)):
                    continue
                begin, open = blocks[k % len(blocks)]
                here, rows = slice(begin, begin + self.size), open.any(1)
                x0 = x0.clone()
                x0[:, here] = _shared.fill(self.block(begin, x0, open)[0], SAMPLERS["confidence"]).to(x0)
                fixed = torch.ones_like(given)
                fixed[:, here] = ~open
                found.append((x0[rows], fixed[rows]))
                n += int(rows.sum())
            k += 1
        self.model.train(training)
        if not found:
            die("the dataset has no text in blocks of this size", "--size of another block size")
        self.texts = [torch.cat(x) for x in zip(*found, strict=True)]

    def own_loss(
        self, forward, process, x0, size, t, objective, given, charged, schedule, start, noise, device=None
    ):
        """
        Takes the place of token_loss, arguments there. Rows with block sizes above 1 are read twice, with
        complementary masks, and count as often as they have charged tokens; the others pay for AR.
        """
        s = self.settings
        x0, given, charged, noise = (y.to(device or x0.device) for y in (x0, given, charged, noise))
        x, given, charged = x0[:, start:], given[:, start:], charged[:, start:]
        sizes = torch.as_tensor(size, device=x.device).expand(len(x))
        own = sizes > 1
        first = charged & (noise.uniform(1)[..., 0] <= 0.5)
        one = torch.where(first, process.mask_id, x)
        one = torch.where(own[:, None] | given, one, process.ar_input(x.shape, noise))
        two = torch.where(charged & ~first, process.mask_id, x)
        both = lambda a, b: torch.cat((a, b[own]))
        read = both(one, two), both(sizes, sizes), start
        logp = process.loo_logits(forward(both(x0, x0), *read)).clamp(min=-1e9).log_softmax(-1)
        n, y = len(x), x[own]
        parts = (logp[:n][own], first[own]), (logp[n:], (charged & ~first)[own])
        each = [certainty_loss(p, y, masked, s.certainty, s.entropy_temperature) for p, masked in parts]
        ar = torch.where(charged & ~own[:, None], -pick(logp[:n], x), 0.0).sum()
        total = sum(each) * (charged & own[:, None]).sum() + ar
        return total, total.detach()

    def state_dict(self):
        return {} if self.texts is None else {"x0": self.texts[0], "given": self.texts[1]}

    def load_state_dict(self, state):
        self.texts = [state["x0"], state["given"]]


# ----- the sampler


@sampler()
def certain(block, *, bound=0.1):
    """
    dParallel's decoding (arXiv 2509.26488): commit every token whose prediction has at most so much entropy,
    and at least the surest. --steps is a limit.

    bound: nats
    """
    need(0 <= bound < math.inf, "bound", bound, "at least 0 nats and finite")

    def choose(k, left, y, logp):
        H = entropy(logp)
        return ~left | (H <= bound) | top(-H, 1, left), y

    yield from unmask(block, choose)


# ----- for lab/zoo.py

ROWS = [
    {
        "system": "dParallel",
        "paper": "2509.26488",
        "claim": "more right in 4 steps than the network as it was",
        "train": "--method dparallel --ckpt {control} --max_steps 300 --eval_every 300 --lr 1e-4",
        "control": "",
        "sampler": "threshold",
        "control_sampler": "threshold",
        "by": "right 4",
    }
]
