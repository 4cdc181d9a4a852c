"""
Self-conditioning with an AR loss: a step reads what the step before predicted, and the clean stream learns to
predict the next token. DiffusionGemma's recipe in small.

    x = E(x_t) + W_2 gelu(W_1 LN(p E))     p (B, N, V): the prediction of the step before, a mean embedding
    loss = cross-entropy of every token of the noisy stream + ar_weight * that of the next clean token

Sampling throws away all but one draw of a prediction; p keeps the rest. There are no biases, so no signal is
the zero vector, and W_2 starts at 0: training begins as the plain network. In training p comes from a first
pass on the same x_t, without a gradient, in half of the rows. Block size 1 reads no signal. The network sees
no noise level. The AR loss is about the clean stream alone: it costs no further pass and depends on no noise.

After DiffusionGemma's code (google-deepmind/gemma, gemma/diffusion); self-conditioning: arXiv 2208.04202. Two
differences: no RMS norm behind the sum, and the last step keeps all its draws.

    python train.py config/sudoku_uniform.toml --method selfcond --out_dir out/selfcond
    python sample.py --ckpt out/selfcond --sampler self_conditioned --steps 8
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn

import diffusion
import methods
from diffusion import pick
from generate import sampler
from model import Transformer
from rng import uniforms
from run.cli import die
from samplers.pieces import entropy, made_by, need, top


@dataclass
class Settings:
    self_cond_rate: float = 0.5  # the share of rows that read a signal; 0: no self-conditioning
    ar_weight: float = 1.0  # of the AR loss; 0: none


DEFAULTS = {"process": "uniform", "time_conditioning": "false"}


def check(cfg, settings):
    if not 0 <= settings.self_cond_rate <= 1:
        die(f"self_cond_rate is {settings.self_cond_rate}, it must be in [0, 1]", "--self_cond_rate=0.5")
    if not 0 <= settings.ar_weight < math.inf:
        die(f"ar_weight is {settings.ar_weight}, it must be at least 0 and finite", "--ar_weight=1")
    if cfg.process != "uniform" or set(cfg.objectives().values()) != {"ce"}:
        problem = "selfcond is for uniform noise, a block size above 1 and the objective ce"
        die(problem, "--process=uniform --objective=ce --block_sizes=1:0.25,16:0.75")
    if not cfg.clean_causal:
        die("a block-causal clean stream sees the next token: no AR loss", "--clean_causal=true")


# ----- the network


def network(model_cfg, settings):
    return SelfConditioned(model_cfg)


class SelfConditioned(Transformer):
    def __init__(self, cfg):
        super().__init__(cfg)
        D, wide = cfg.d_model, cfg.mlp_ratio * cfg.d_model
        first, last = nn.Linear(D, wide, bias=False), nn.Linear(wide, D, bias=False)
        self.signal = nn.Sequential(nn.LayerNorm(D, bias=False), first, nn.GELU("tanh"), last)
        nn.init.zeros_(last.weight)

    def embed_noisy(self, tokens, signal=None):
        """E(x_t) + W_2 gelu(W_1 LN(p E)). signal p (B, N, V): zeros in rows without, or None."""
        x = self.embed_tokens(tokens)
        mean = torch.zeros_like(x) if signal is None else self.embed_tokens(signal.to(self.embed.weight))
        return x + self.signal(mean)

    def condition(self, sigma, C, N, signal=None):
        return super().condition(sigma, C, N)

    def forward(
        self, clean, noisy, block_size, start=0, sigma=None, cache=None, signal=None, returns="logits"
    ):
        """
        returns: "logits" (B, N, V) of the noisy stream; "both", and (B, C, V) of the clean stream: at
        position i of token i + 1.
        """
        C = 0 if clean is None else clean.size(1)
        h, cond = self.hidden(clean, noisy, block_size, start, sigma, cache, signal=signal)
        split = lambda part: self.to_logits(h[:, part], None if cond is None else cond[:, part])
        noisy_logits = split(slice(C, None))
        return (noisy_logits, split(slice(0, C))) if returns == "both" else noisy_logits


# ----- training


class TwoPasses:
    """
    A network that asks itself first: what token_loss calls in its place. shown (B,) bool: rows that read the
    signal; None: all but those of block size 1. It keeps what the clean stream said.
    """

    def __init__(self, forward, shown=None):
        self.forward, self.module, self.shown = forward, getattr(forward, "module", forward), shown

    def __call__(self, clean, noisy, block_size, start=0, sigma=None):
        shown = (torch.as_tensor(block_size, device=noisy.device) > 1).expand(len(noisy))
        if self.shown is not None:
            shown = shown & self.shown.to(noisy.device)
        signal = None
        if shown.any():
            with torch.no_grad():
                p = self.forward(clean, noisy, block_size, start, sigma).softmax(-1)
            signal = p * shown[:, None, None]
        how = {"signal": signal, "returns": "both"}
        logits, self.next_logits = self.forward(clean, noisy, block_size, start, sigma, **how)
        return logits


def next_token_nats(next_logits, x0, charged):
    """-log p(x_i | x_<i) of the clean stream, (B, L - 1) from position 1 on, 0 where not charged."""
    cost = -pick(next_logits[:, :-1].log_softmax(-1), x0[:, 1:])
    return torch.where(charged[:, 1:], cost, 0.0)


class Learner(methods.Learner):
    def loss(self, step):
        return self.both_losses

    def both_losses(self, forward, process, x0, block_size, t, objective, charged, noise, **how):
        # a coin a row, by its last position: the same however a batch is split. It uses up no random number
        coin = uniforms(copy.copy(noise).keys()[:, -1], 1)
        model = TwoPasses(forward, coin <= self.settings.self_cond_rate)
        how |= {"charged": charged, "noise": noise}
        total, per_token = diffusion.token_loss(model, process, x0, block_size, t, objective, **how)
        if self.settings.ar_weight:
            there = per_token.device
            ar = next_token_nats(model.next_logits, x0.to(there), charged.to(there))
            total = total + self.settings.ar_weight * ar.sum()
        return total, per_token


def bound(model, *args, **how):
    """token_loss of the network as it is sampled: with a first pass. No AR loss in it."""
    return diffusion.token_loss(TwoPasses(model), *args, **how)


# ----- sampling


@sampler("redraws")
def self_conditioned(block, *, bound=0.1, hot=0.8, cold=0.4, sure=0.005, carry=True):
    """
    DiffusionGemma's sampler, for networks of --method selfcond. A step predicts the whole block from the
    prediction before, at a temperature that falls from `hot` towards `cold`. (In training the prediction that
    is read has temperature 1.) It draws every token, keeps those of the lowest entropies while

        H_(1) + ... + H_(k) - H_(k) <= bound,

    and makes the rest fresh noise. Any token may change in any step. A row ends when the argmax is what it
    has read and the mean entropy is at most `sure`. The last step keeps all.

    bound: in nats
    hot: the first temperature; --temperature comes on top
    cold: the one it falls towards
    sure: in nats; 0 never ends a row early, but for certain tokens
    carry: false leaves the prediction out, the control
    """
    made_by(isinstance(block.model, SelfConditioned), "selfcond")
    need(0 <= bound < math.inf, "bound", bound, "at least 0 nats and finite")
    need(1e-6 <= cold <= hot <= 1e6, "cold", cold, "in [1e-6, 1e6], and hot at least that")
    need(0 <= sure < math.inf, "sure", sure, "at least 0 nats and finite")
    for k in range(block.steps):
        noise, heat = block.noise(k), cold + (hot - cold) * (1 - k / block.steps)
        logits = block.predict(block.alpha[k], signal=block.state.get("signal") if carry else None)
        logp = block.sharpen(logits / heat).log_softmax(-1)
        y, h = block.draw(logp, noise), entropy(logp).double()
        ordered = h.masked_fill(~block.open, math.inf).sort(dim=1).values
        n = (ordered.cumsum(1) - ordered <= bound).sum(1)  # inf - inf is nan, and no number is below a bound
        mean = (h * block.open).sum(1) / block.open.sum(1).clamp(min=1)
        done = ((logp.argmax(-1) == block.x) | ~block.open).all(1) & (mean <= sure)
        done = done if k + 1 < block.steps else torch.ones_like(done)
        keep = top(-h, n, block.open) | done[:, None]
        block.state["signal"] = logp.exp()
        block.write(torch.where(keep, y, block.prior(noise)))
        block.live = block.live & ~done
        yield
        if not block.live.any():
            return


ROWS = [
    {
        "system": "Self-conditioning",
        "paper": "2208.04202",
        "claim": "more right in 8 steps than a network that never reads its prediction",
        "train": "--method selfcond",
        "control": "--method selfcond --self_cond_rate 0",
        "sampler": "self_conditioned",
        "control_sampler": "self_conditioned carry=false",
        "by": "right 8",
    }
]
