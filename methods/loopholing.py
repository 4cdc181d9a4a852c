"""
Loopholing: a step hands on what the network thought, not just the token it drew.

    x = E(x_t) + LN(h)       h: the last layer's output at the step before, before the final norm; 0 at the
                             first

Sampling throws away all but one draw of each prediction. The latent h keeps the rest. LN starts at gain 0 and
bias 0, so training begins as the plain network. In training h comes from a first pass on the same x_t,
without a gradient, in most of the steps. Loopholing Discrete Diffusion, arXiv 2510.19304. Block size 1 reads
no latent: the AR mode stays what it is.

    python train.py config/sudoku.toml --method loopholing
    python sample.py --ckpt out/sudoku --sampler loopholing
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

import diffusion
import methods
from generate import sampler
from model import Transformer
from rng import Noise
from run.cli import die
from samplers.pieces import made_by


@dataclass
class Settings:
    self_cond_rate: float = 0.9  # the share of steps with two passes


def check(cfg, settings):
    if not 0 <= settings.self_cond_rate <= 1:
        die(f"self_cond_rate is {settings.self_cond_rate}, it must be in [0, 1]", "--self_cond_rate=0.9")
    if cfg.next_token:
        die("a next-token network reads no noise: there is nothing to carry", "--next_token=false")


def network(model_cfg, settings):
    return Loopholing(model_cfg)


class Loopholing(Transformer):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.carry_norm = nn.LayerNorm(cfg.d_model)
        nn.init.zeros_(self.carry_norm.weight)

    def embed_noisy(self, tokens, carry=None):
        """E(x_t) + LN(h), h the carry (B, N, D), or None at the first step."""
        x = self.embed_tokens(tokens)
        return x + self.carry_norm(torch.zeros_like(x) if carry is None else carry)

    def condition(self, sigma, C, N, carry=None):
        return super().condition(sigma, C, N)

    def forward(
        self, clean, noisy, block_size, start=0, sigma=None, cache=None, carry=None, returns="logits"
    ):
        """carry (B, N, D): h of the step before, or None. returns: "logits", or "both", (logits, h)."""
        C = 0 if clean is None else clean.size(1)
        h, cond = self.hidden(clean, noisy, block_size, start, sigma, cache, carry=carry)
        logits = self.to_logits(h[:, C:], None if cond is None else cond[:, C:])
        return (logits, h[:, C:]) if returns == "both" else logits


class TwoPasses:
    """A network that asks itself first: what token_loss calls in its place."""

    def __init__(self, forward):
        self.forward, self.module = forward, getattr(forward, "module", forward)

    def __call__(self, clean, noisy, block_size, start=0, sigma=None):
        with torch.no_grad():
            _, h = self.forward(clean, noisy, block_size, start, sigma, returns="both")
        one = torch.as_tensor(block_size, device=h.device).view(-1, 1, 1) == 1
        return self.forward(clean, noisy, block_size, start, sigma, carry=h.masked_fill(one, 0.0))


class Learner(methods.Learner):
    def loss(self, step):
        coin = Noise(self.cfg.seed, torch.tensor([-4]), torch.tensor([0]), step).uniform(1).item()
        return two_passes if coin <= self.settings.self_cond_rate else self.token_loss


def two_passes(forward, *args, **how):
    return diffusion.token_loss(TwoPasses(forward), *args, **how)


bound = two_passes


@sampler()
def loopholing(block, *, carry=True):
    """
    Ancestral steps that hand on the latent h (arXiv 2510.19304). The network is asked at every step.

    carry: false leaves h out, the control
    """
    made_by(hasattr(block.model, "carry_norm"), "loopholing")
    for k in range(block.steps):
        a_t, a_s = block.alpha[k : k + 2]
        h = block.state.get("carry") if carry else None
        logits = block.predict(a_t, carry=h, returns="both")
        block.write(block.posterior(logits, a_t, a_s, block.noise(k)))
        yield


ROWS = [
    {
        "system": "Loopholing",
        "paper": "2510.19304",
        "claim": "more right in 4 steps than the plain network",
        "train": "--method loopholing",
        "control": "",
        "sampler": "loopholing",
        "by": "right 4",
    },
    {
        "system": "Loopholing's latent",
        "paper": "2510.19304",
        "claim": "more right in 4 steps than the same network without its latent",
        "train": "--method loopholing",
        "control": "--method loopholing",
        "sampler": "loopholing",
        "control_sampler": "loopholing carry=false",
        "by": "right 4",
    },
]
