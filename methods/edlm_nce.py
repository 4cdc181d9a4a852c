"""
EDLM with a learned energy: a second network learns which whole blocks fit together, and a sampler asks it.

A masked network draws the tokens of a step independently of each other. The energy E sees x_t and a whole
candidate for the block, and tells true text from such draws (noise-contrastive estimation):

    L = -log sigmoid(-E(x_t, x_0)) - log sigmoid(E(x_t, x^-))        x^- ~ prod_i p(x_i | x_t)

Its optimum is E*(x_t, x) = log prod_i p(x_i | x_t) - log p(x | x_t), so true text has low energy, and

    p(x | x_t) ∝ prod_i p(x_i | x_t) exp(-E*(x_t, x))

The sampler draws some candidates, keeps one with weight exp(-E), and takes the reverse step towards it. (The
published code weighs by exp(+E), which moves away from the data.) The masked network is frozen: its bound,
which is what eval.py prints, stays what it was. Energy-Based Diffusion Language Models, arXiv 2410.21357.

    python train.py --method edlm_nce --ckpt out/sudoku --out_dir out/sudoku_edlm
    python sample.py --ckpt out/sudoku_edlm --sampler edlm_nce --steps 8 --candidates 4
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import methods
from diffusion import loglinear, sigma_for
from generate import sampler
from model import Transformer
from rng import draw
from run.cli import die
from samplers.pieces import made_by, need


@dataclass
class Settings:
    ckpt: str = "out/run"  # the masked network, a training run's out_dir


FIXED = ("ckpt",)
INHERITS = ("batch_size", "weight_decay", "beta1", "beta2", "grad_clip", "log_every", "keep")


def DEFAULTS(s):
    folder = methods.folder_of(s.ckpt)
    return {"init_from": s.ckpt, "out_dir": f"{folder}_edlm", "lr": 1e-3, "ema": 0.99}


def check(cfg, s):
    if cfg.init_from != s.ckpt:
        die("the energy begins from a masked network, which --ckpt names", f"--ckpt {cfg.init_from}")
    if ":" in s.ckpt:
        die("the energy begins from a run of this project, not from published weights", "--ckpt out/NAME")
    if cfg.process != "masked" or cfg.next_token or not any(b > 1 for b in cfg.block_sizes):
        die(f"{s.ckpt} does not fill masks in blocks: there are no candidates", "--ckpt of a masked network")
    if cfg.fsdp:
        die("FSDP does not keep a part of a network frozen", "--fsdp=false")
    if cfg.dropout:
        die(
            "with dropout the frozen network would draw other candidates than it does in sampling",
            "--dropout=0",
        )


# ----- the networks


class Energy(Transformer):
    """
    E of a block: the network of model.py, but its noisy stream reads pairs [x_t; candidate], and a head gives
    one number for the mean over a block. Clean text before the block is read as ever.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        D = cfg.d_model
        self.join = nn.Linear(2 * D, D)
        self.score = nn.Sequential(nn.Linear(D, D), nn.GELU("tanh"), nn.Linear(D, 1))
        del self.head
        self.modulation = None
        (
            nn.init.zeros_(self.score[2].weight),
            nn.init.zeros_(self.score[2].bias),
        )  # at first both are as likely

    def embed_noisy(self, tokens, candidate):
        return self.join(torch.cat((self.embed_tokens(tokens), self.embed_tokens(candidate)), dim=-1))

    def condition(self, sigma, C, N, candidate):
        return super().condition(sigma, C, N)

    def forward(self, clean, noisy, block_size, start=0, sigma=None, cache=None, candidate=None):
        """(B, N) nats: at each position of a block its energy. block_size: int; or (B,), one a row."""
        C, N = 0 if clean is None else clean.size(1), noisy.size(1)
        h, _ = self.hidden(clean, noisy, block_size, start, sigma, cache, candidate=candidate)
        h = self.norm(h[:, C:])
        b = torch.as_tensor(block_size, device=h.device).view(-1, 1)
        block = (start + torch.arange(N, device=h.device)) // b  # (B or 1, N)
        same = (block[..., None] == block[:, None]).to(h)
        return self.score((same / same.sum(-1, keepdim=True)) @ h)[..., 0]


def network(model_cfg, settings):
    return EDLM(model_cfg)


class EDLM(Transformer):
    """The masked network, frozen, and an energy. Without a candidate it is the network it began from."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.requires_grad_(False)
        self.energy = Energy(cfg)

    def forward(self, clean, noisy, block_size, start=0, sigma=None, cache=None, candidate=None):
        if candidate is None:
            return super().forward(clean, noisy, block_size, start, sigma, cache)
        return self.energy(clean, noisy, block_size, start, sigma, cache, candidate)

    def load_state_dict(self, state, **how):
        """Weights without an energy are those of the masked network: the energy begins as its copy."""
        if not any(name.startswith("energy.") for name in state):
            own = self.energy.state_dict()
            state = {**state, **{f"energy.{name}": state.get(name, value) for name, value in own.items()}}
        return super().load_state_dict(state, **how)


# ----- the loss


def nce(true, drawn):
    """-log sigmoid(-E) of true text, -log sigmoid(E) of drawn text: two energies of one shape, to nats."""
    return F.softplus(true) + F.softplus(-drawn)


def nce_loss(
    model, process, x0, block_size, t, objective, given, charged, schedule=loglinear, start=0, noise=None,
    device=None,
):  # fmt: skip
    """
    Takes the place of token_loss, arguments there; given, charged and noise are never None. Each token pays
    the nats of its block, so the mean over tokens is that over blocks: 2 log 2 = 1.386 at first, times the
    share of rows with blocks above 1. Rows of block size 1 have nothing to learn and pay 0.
    """
    x0, given, charged, noise = (y.to(device or x0.device) for y in (x0, given, charged, noise))
    x, given, charged = x0[:, start:], given[:, start:], charged[:, start:]
    alpha = schedule(t)[0]
    xt = torch.where(given, x, process.corrupt(x, alpha, noise))
    level = sigma_for(model, alpha)
    with torch.no_grad():
        logits = model(x0, xt, block_size, start, level)
        drawn = draw(process.denoiser_logits(logits.double(), xt, alpha).softmax(-1), noise)
    E_true, E_drawn = (model(x0, xt, block_size, start, level, candidate=y) for y in (x, drawn))
    blocks = torch.as_tensor(block_size, device=x.device).expand(len(x))[:, None] > 1
    per_token = torch.where(charged & blocks, nce(E_true, E_drawn), 0.0)
    return per_token.sum(), per_token.detach()


class Learner(methods.Learner):
    def __init__(self, cfg, settings, model, process, token_loss):
        super().__init__(cfg, settings, model, process, nce_loss)
        if not process.count_form:
            problem = f"{settings.ckpt} has other noise than plain masks: {type(process).__name__}"
            die(problem, "--ckpt of a masked network")

    def loss(self, step):
        return self.token_loss

    def note(self):
        return (
            "the masked network is frozen: its bound stays. The loss is the energy's, at most 1.386 at first"
        )


# ----- sampling


@sampler("absorbing")
def edlm_nce(block, *, candidates=2, start=0.6, stop=0.4):
    """
    EDLM with a learned energy (arXiv 2410.21357): at times from `start` to `stop` draw candidates for the
    whole block, keep one with weight exp(-E), and take the reverse step towards it. Other steps are
    ancestral. One pass to propose, and one a candidate.

    candidates: how many, at least 2
    start: only at times from here, ancestral before
    stop: down to here, ancestral after
    """
    made_by(hasattr(block.model, "energy"), "edlm_nce")
    need(candidates >= 2, "candidates", candidates, "at least 2")
    need(0 < start <= 1, "start", start, "a time above 0, at most 1")
    need(0 <= stop <= start, "stop", stop, "a time from 0, at most start")
    asked = functools.partial(energy, block, block.model.new_cache(len(block.x), block.model.cfg.seq_len))
    for k in range(block.steps):
        (a_t, a_s), noise, t = block.alpha[k : k + 2], block.noise(k), 1 - k / block.steps
        if not stop - 1e-9 <= t <= start + 1e-9:
            block.write(block.reverse(a_t, a_t, a_s, noise))
        else:
            logits = block.predict(a_t)
            ys = [block.posterior(logits, a_t, 1.0, noise) for _ in range(candidates)]
            weights = (-torch.stack([asked(y, a_t) for y in ys], dim=1)).softmax(1)  # (R, candidates)
            u = noise.uniform(1)[:, 0, 0]  # one choice a row
            choice = (u[:, None] > weights.cumsum(1)).sum(1).clamp(max=candidates - 1)
            y = torch.stack(ys, dim=1)[torch.arange(len(u), device=u.device), choice]
            certain = torch.full_like(logits, -math.inf).scatter(-1, y[..., None], 0.0)
            block.write(block.posterior(certain, a_t, a_s, noise))
        block.live = block.live & (block.open & block.process.can_change(block.x)).any(1)
        yield
        if not block.live.any():
            return


def energy(block, cache, y, alpha):
    """E(x_t, y) of the block, (R,) float64. cache: of the text before it, which is read once."""
    begin, b, device = int(block.positions[0]), len(block.positions), block.model.embed.weight.device
    clean = block.text[block.rows, cache.length : begin].clamp(min=0)
    level = sigma_for(block.model, torch.as_tensor(alpha, dtype=torch.float64).view(-1))
    fed = (tokens.to(device) for tokens in (clean, block.x))
    E = block.model(*fed, b, begin, level, cache, candidate=y.to(device))
    block.count(clean.numel() + y.numel())
    return E[:, 0].to(y.device).double()


ROWS = [
    {
        "system": "EDLM with a learned energy",
        "paper": "2410.21357",
        "claim": "more right in 4 steps than without the energy",
        "train": "--method edlm_nce --ckpt {control} --max_steps 1000 --eval_every 1000 --lr 1e-3",
        "control": "",
        "sampler": "edlm_nce candidates=4 start=1.0 stop=0.0",
        "by": "right 4",
    }
]
