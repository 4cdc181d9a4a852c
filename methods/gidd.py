"""
GIDD: a hybrid of masked and uniform noise. A network that has seen wrong tokens, not just masks, can tell
which of its own are wrong.

    q(x_t | x_0) = a onehot(x_0) + m      a = (1 - t) / C,   m = (t mask + c uniform) / C,   C = 1 + c
    c = B sqrt(t (1 - t)),   B = 2 p_u / (1 - p_u)      p_u: the share of uniform noise at t = 1/2

The clock is alpha = 1 - t. Loss, reverse step and conversion are those of any noise process
(diffusion.NoiseProcess). Generalized Interpolating Discrete Diffusion, arXiv 2503.04482.

    python train.py config/sudoku.toml --method gidd --p_uniform 0.2 --out_dir out/gidd
    python sample.py --ckpt out/gidd --sampler self_correction
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffusion import NoiseProcess, pick
from generate import ancestral, sampler
from run.cli import die
from samplers.pieces import need, top


@dataclass
class Settings:
    p_uniform: float = 0.1  # the share of uniform noise at t = 1/2; 0 is masked noise


DEFAULTS = {"objective": "elbo", "time_conditioning": "true"}


def check(cfg, settings):
    if not 0 <= settings.p_uniform < 1:
        die(f"p_uniform is {settings.p_uniform}, it must be in [0, 1)", "--p_uniform=0.1")


def process(cfg, settings, vocab_size):
    return GIDD(vocab_size + 1, vocab_size, settings.p_uniform)


class GIDD(NoiseProcess):
    t_min = 1e-3  # visible tokens cost something down to t = 0, where c has no finite slope
    exact_ar = True  # block size 1 reads the mask

    def __init__(self, vocab_size, mask_id, p_uniform=0.1):
        self.vocab_size, self.mask_id, self.p_uniform = vocab_size, mask_id, p_uniform

    def mixing(self, alpha):
        t, B = 1 - alpha, 2 * self.p_uniform / (1 - self.p_uniform)
        root = (t * alpha).sqrt().clamp(min=1e-12)
        c, dc = B * root, B * (1 - 2 * alpha) / (2 * root)  # d/d alpha
        C = 1 + c
        mask = F.one_hot(torch.tensor(self.mask_id), self.vocab_size).to(alpha)
        tokens = (1 - mask) / (self.vocab_size - 1)
        m = (t[..., None] * mask + c[..., None] * tokens) / C[..., None]
        dm = (dc[..., None] * tokens - mask - dc[..., None] * m) / C[..., None]
        return alpha / C, m, (1 - alpha * dc / C) / C, dm

    def prior(self, shape, noise=None, device=None):
        return torch.full(shape, self.mask_id, device=noise.key.device if noise is not None else device)


@sampler("redraws")
def self_correction(block, *, rounds=16, correction_temperature=0.1, level=0.99):
    """
    GIDD's self-correction (arXiv 2503.04482): ancestral steps, then rounds in which of all tokens that a
    sharpened prediction would change the surest one is changed, until nothing changes.

    rounds: at most so many
    correction_temperature: of the prediction
    level: alpha at which the network reads the text
    """
    need(rounds >= 0, "rounds", rounds, "at least 0")
    need(correction_temperature > 0, "correction_temperature", correction_temperature, "above 0")
    need(0 < level < 1, "level", level, "between 0 and 1")
    yield from ancestral(block)
    block.live = block.open.any(1)
    for k in range(rounds):
        noise, a = block.noise(block.steps + k), torch.full((len(block.x),), level, dtype=torch.float64)
        logits = block.process.loo_logits(block.predict(a), block.x, a)
        p = (logits / correction_temperature).softmax(-1)
        y = block.draw(p.log(), noise)
        change = block.open & (y != block.x)
        block.write(torch.where(top(pick(p, y), 1, change), y, block.x))
        block.live = block.live & change.any(1)
        yield
        if not block.live.any():
            return


ROWS = [
    {
        "system": "GIDD",
        "paper": "2503.04482",
        "claim": "having seen wrong tokens, it corrects its own",
        "train": "--method gidd --p_uniform 0.2",
        "control": "--method gidd --p_uniform 0",
        "sampler": "self_correction",
        "control_sampler": "self_correction",
        "by": "right 8",
    }
]
