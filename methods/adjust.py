"""
ADJUST: after a full pass, one small layer corrects the predictions as tokens are placed one by one.

    python train.py --method adjust --ckpt out/sudoku
    python sample.py --ckpt out/sudoku_adjust --sampler adjust --every 4

Tokens that are drawn together do not know of each other. One at a time they do, at a full pass each. Here a
full pass on x_t leaves its last hidden vectors h, and g, one more layer over the block, tells them what was
placed since:

    p_g(. | h, x') = head( h + g(h + E[x'_i] 1[i was placed after x_t]) )      E: the network's own embeddings
    loss = mean over the masks of x' of KL( p(. | x') || p_g(. | h(x_t), x') )

x' has 1 to K - 1 tokens more than x_t, both from the data, at random places. The output of g is zero at
first: then p_g is p(. | x_t), and K tokens are drawn as if at once. The network stays as it is. Masked noise
only. After ADJUST (arXiv 2509.22738), of which we know the abstract and the idea, not the code: the
structure, the loss and K = 4 are ours.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from generate import sampler
from methods import _shared
from model import Layer
from run.cli import die
from samplers.pieces import made_by, need, top


@dataclass
class Settings:
    ckpt: str = "out/run"  # the network, a training run's out_dir
    size: int = 0  # the block size that it learns on; 0: the largest
    ahead: int = 4  # K: tokens of a full pass
    sees: bool = True  # false: g is not told what was placed, the control


FIXED = (*_shared.FIXED, "ahead", "sees")
INHERITS = (*_shared.INHERITS, "grad_clip")


def DEFAULTS(s):
    return _shared.defaults(s.ckpt, "adjust", max_steps=400, lr=1e-3, ema=0.99)


def check(cfg, s):
    _shared.check(cfg, s, "adjust")
    if not 2 <= s.ahead <= s.size:
        die(f"ahead is {s.ahead}, it must be from 2 to the block size {s.size}", "--ahead=4")
    if cfg.process != "masked" or cfg.time_conditioning == "true":
        kind = f"{cfg.process} noise" + " and sees the noise level" * (cfg.time_conditioning == "true")
        die(
            f"adjust is for masked noise, on a network without a clock: {s.ckpt} has {kind}", "another --ckpt"
        )


def network(model_cfg, s):
    return Adjusted(model_cfg, Adjuster(model_cfg), s.sees)


class Adjuster(nn.Module):
    """g: (R, b, D) of h and of what was placed, both (R, b, D), to what is added to h."""

    def __init__(self, cfg):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(cfg.d_model, bias=False), Layer(cfg)
        self.out = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, h, placed, rope):
        return self.out(self.layer(self.norm(h) + placed, rope, None))


class Adjusted(_shared.WithPart):
    def __init__(self, cfg, part, sees=True):
        super().__init__(cfg, part)
        self.sees = sees

    def forward(self, clean, noisy=None, block_size=1, *args, part=None, returns="logits", **how):
        """
        returns: "logits", or "both", (logits, h) with h (B, N, D) of the noisy positions. part: the arguments
        of `adjusted`, whose logits it then returns.
        """
        if part is not None:
            return self.adjusted(*part)
        h, cond = self.hidden(clean, noisy, block_size, *args, **how)
        h = h[:, 0 if clean is None else clean.size(1) :]
        return (self.to_logits(h), h) if returns == "both" else self.to_logits(h)

    def adjusted(self, h, x, new):
        """
        head( h + g(h + E[x] 1[new]) ): logits (R, b, V) of a block. h (R, b, D) of the pass on x_t; x (R, b),
        what stands there now; new (R, b) bool, where it was placed since.
        """
        placed = self.embed(x) * (new & self.sees)[..., None]
        rope = self.rope(torch.arange(x.size(1), device=x.device))  # distances alone matter
        return self.to_logits(h + self.part(h, placed, rope))


def trajectory(x, open, mask_id, b, K, noise):
    """
    x_t and x' (B, L) of text x: of the open positions of a block each is a mask with a probability that is
    uniform, and of these masks 1 to K - 1, at random, become text again. L is a multiple of b.
    """
    u = noise.uniform(4).unflatten(1, (-1, b)).flatten(0, 1)  # (B N, b, 4)
    open = open.unflatten(1, (-1, b)).flatten(0, 1)
    masked = open & (u[..., 0] <= u[:, :1, 1])
    n = 1 + (u[:, 0, 2] * (K - 1)).long().clamp(max=K - 2)  # 1 to K - 1
    lifted = top(u[..., 3], n, masked)
    hide = lambda where: torch.where(where.view_as(x), mask_id, x)
    return hide(masked), hide(masked & ~lifted)


class Learner(_shared.PartLearner):
    def __init__(self, *args):
        super().__init__(*args)
        self.token_loss = self.adjust_loss

    def adjust_loss(
        self, forward, process, x0, size, t, objective, given, charged, schedule, start, noise, device=None
    ):
        """
        Takes the place of token_loss, arguments there. The mean over the masks of x' of
        KL( p(. | x') || p_g(. | h(x_t), x') ), as often as tokens are charged: the loop
        divides. All rows are read in blocks of `size`.
        """
        b, K = self.size, self.settings.ahead
        x0, given, charged, noise = (y.to(device or x0.device) for y in (x0, given, charged, noise))
        x, charged = x0[:, start:], charged[:, start:]
        xt, later = trajectory(x, charged, process.mask_id, b, K, noise)
        with torch.no_grad():
            _, h = self.model(x0, xt, b, start, returns="both")
            target = self.log_p(self.model(x0, later, b, start))
        blocks = (y.unflatten(1, (-1, b)).flatten(0, 1) for y in (h, later, later != xt))
        log_q = self.log_p(forward(None, part=tuple(blocks))).view_as(target)
        kl = (target.exp() * (target - log_q)).sum(-1)
        masked = charged & (later == process.mask_id)
        mean = torch.where(masked, kl, 0.0).sum() / masked.sum().clamp(min=1)
        return mean * charged.sum(), mean.detach()

    def log_p(self, logits):
        return self.process.loo_logits(logits).clamp(min=-1e9).log_softmax(-1)


# ----- the sampler


@sampler("absorbing", "own pace")
def adjust(block, *, every=4):
    """
    Adjusted one by one (after ADJUST, arXiv 2509.22738): one token a step, at a random place. Every so many
    steps the network is asked; in between its one extra layer, which is told what was placed since. For
    checkpoints of --method adjust. Passes count the network's alone.

    every: tokens of a full pass; 1 is first_hitting
    """
    need(every >= 1, "every", every, "at least 1")
    model = block.model
    made_by(isinstance(model, Adjusted), "adjust")
    for k in range(block.x.size(1)):
        noise, left = block.noise(k), block.open & (block.x == block.process.mask_id)
        n = left.sum(1)
        _, order = noise.uniform(2).unbind(-1)
        if k % every == 0:
            logits, asked = block.predict(0.0, returns="both"), block.x
        else:
            x, new = (y.to(model.embed.weight.device) for y in (block.x, block.x != asked))
            logits = model.adjusted(block.state["carry"], x, new).to(block.x.device)
        block.write(block.posterior(logits, 0.0, top(order, 1, left).double(), noise))
        block.live = block.live & (n > 1)
        yield
        if not block.live.any():
            return


# ----- for lab/zoo.py

ROWS = [
    {
        "system": "ADJUST",
        "paper": "2509.22738",
        "claim": "more right in 4 passes than 4 ancestral steps",
        "train": "--method adjust --ckpt {control} --max_steps 400 --eval_every 400 --lr 1e-3",
        "control": "",
        "sampler": "adjust",
        "control_sampler": "ancestral",
        "by": "right pace",
        "control_by": "right 4",
    }
]
