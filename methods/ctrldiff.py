"""
Dynamic blocks, learned: a policy says which parts of a text are taken as one block, and which split.

The network stays as it is. The policy reads how uncertain it is of the part, the entropies H_i of its open
positions before the first step, and takes the part with probability

    pi = sigmoid(w . (mean H, max H, H_1, log2 size) + c)

REINFORCE raises  E[ log p_AR(block) - price * passes ]  per block of the largest size, with the mean of the
other rows as baseline. p_AR is block size 1 of the same network. After CtrlDiff (arXiv 2505.14455). Its code
is not public: what the policy reads, and the reward, are ours.

    python train.py --method ctrldiff --ckpt out/sizes --out_dir out/ctrldiff
    python sample.py --ckpt out/ctrldiff --sampler dynamic_blocks --choose policy --steps 2
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import methods
from diffusion import token_loss
from generate import generate
from model import Transformer
from run.cli import die
from samplers.dynamic_blocks import coin, in_sizes, sizes_of, surprise


@dataclass
class Settings:
    ckpt: str = "out/run"  # the network that the policy is for: a run's out_dir, of several block sizes
    price: float = 1.0  # nats that a pass must save
    rollout_steps: int = 2  # --steps of dynamic_blocks while it learns


FIXED = ("ckpt", "rollout_steps")


def DEFAULTS(s):
    return {
        "init_from": s.ckpt,
        "out_dir": f"{s.ckpt.rstrip('/')}_ctrldiff",
        "max_steps": 60,
        "eval_every": 60,
        "batch_size": 32,
        "lr": 0.1,
        "warmup": 1,
        "lr_schedule": "wsd",
        "weight_decay": 0.0,
        "ema": 0.9,
        "n_eval": 64,
        "n_samples": 0,
    }


def check(cfg, s):
    if not 0 <= s.price < math.inf:
        die(f"price is {s.price}, it must be finite and at least 0 nats", f"--price={Settings.price}")
    if s.rollout_steps < 1:
        die(f"rollout_steps is {s.rollout_steps}, it must be at least 1", "--rollout_steps=2")
    if 1 not in cfg.block_sizes or len(cfg.block_sizes) < 2:
        sizes = ", ".join(map(str, cfg.block_sizes))
        die(f"{s.ckpt} was trained on block sizes {sizes}", "train with --block_sizes=1:0.34,4:0.33,16:0.33")
    if cfg.fsdp:
        die("the policy writes texts as it learns: no FSDP", "--fsdp=false")


def network(model_cfg, settings):
    return Dynamic(model_cfg)


class Dynamic(Transformer):
    """A Transformer with a policy."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.policy = nn.Linear(4, 1)
        nn.init.zeros_(self.policy.weight), nn.init.zeros_(self.policy.bias)

    def log_odds(self, entropies, open):
        """
        w . (mean H, max H, H_1, log2 size) + c, of taking parts as one block, (R,). entropies H (R, s), in
        nats, 0 where nothing is open (R, s).
        """
        n = open.sum(1).clamp(min=1)
        first = entropies.gather(1, open.int().argmax(1, keepdim=True))[:, 0]
        size = torch.full_like(first, entropies.size(1)).log2()
        seen = torch.stack((entropies.sum(1) / n, entropies.amax(1), first, size), dim=1)
        return self.policy(seen.to(self.policy.weight))[:, 0]

    def takes(self, entropies, open):
        """The probability of it, (R,) float64."""
        return self.log_odds(entropies, open).double().sigmoid()

    def load_state_dict(self, state, *args, **how):
        """A network without a policy gets the one that is here."""
        mine = {name: p for name, p in self.state_dict().items() if name.startswith("policy.")}
        return super().load_state_dict({**mine, **state}, *args, **how)


def rollout(model, process, prompts, choose, **how):
    """
    Texts, and how they came about: the last State of generate, looks [(block, rows, entropies, open, takes,
    asked)] with choose(part, entropies) -> takes (R,) bool, and blocks [(positions, passes (B,))].
    """
    looks, blocks = [], []

    def sampler(block):
        before, n = block.counts["nfe_rows"].clone(), len(blocks)

        def decide(part, logits):
            seen = surprise(part, logits)
            takes = choose(part, seen)
            looks.append((n, part.rows.cpu(), seen, part.open, takes, part.live))
            return takes

        yield from in_sizes(block, sizes_of(block), decide)
        blocks.append((block.positions.cpu(), block.counts["nfe_rows"] - before))

    sampler.needs = ()
    for state in generate(model, process, prompts, sampler=sampler, **how):
        pass
    return state, looks, blocks


def advantages(reward):
    """Reward (B, n) minus the mean of the other rows'."""
    return (reward - reward.mean(0)) * len(reward) / max(len(reward) - 1, 1)


def policy_loss(model, looks, advantage):
    """-sum of advantage * log pi(what was chosen). Its mean gradient is minus that of the expected reward."""
    total = torch.zeros((), device=model.policy.weight.device)
    for n, rows, seen, open, takes, asked in looks:
        z = model.log_odds(seen.clone(), open.clone())
        log_pi = torch.where(takes.to(z.device), F.logsigmoid(z), F.logsigmoid(-z))
        weight = torch.where(asked.cpu(), advantage[rows, n], 0.0)
        total = total - (weight.to(log_pi) * log_pi).sum()
    return total


class Learner(methods.Learner):
    def __init__(self, cfg, settings, model, process, token_loss):
        super().__init__(cfg, settings, model, process, token_loss)
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith("policy."))
        self.last = {}

    def loss(self, step):
        return self.reinforce

    def reinforce(self, forward, process, x0, block_size, t, objective, given, noise, schedule, **_):
        """
        What is called as token_loss is: it writes texts behind the prompts of x0, and learns from the reward
        log p_AR(block) - price * passes.
        """
        model, sizes = self.model, sorted(self.cfg.block_sizes)
        prompts = [row[: int((~shown).int().argmax())] for row, shown in zip(x0, given, strict=True)]
        seed = int(noise.key[0, 0]) & (1 << 60) - 1
        how = {"block_size": sizes[-1], "steps": self.settings.rollout_steps, "seed": seed}
        how |= {"trained": sizes, "schedule": schedule}
        choose = lambda part, seen: coin(part) <= model.takes(seen, part.open).to(part.x.device)
        model.eval()
        state, looks, blocks = rollout(model, process, prompts, choose, **how)
        text, shown = state.x[:, : x0.size(1)].cpu(), given.cpu()
        with torch.no_grad():
            half = torch.full((len(text),), 0.5, dtype=torch.float64)
            device = model.embed.weight.device
            _, nats = token_loss(model, process, text, 1, half, "ce", given=shown, device=device)
        reward = torch.stack([-nats[:, at].cpu().sum(1) - self.settings.price * n for at, n in blocks], dim=1)
        self.last = {"reward": reward.mean().item(), "passes": float(state.nfe_rows.float().mean())}
        return policy_loss(model, looks, advantages(reward)), nats

    def record(self):
        return self.last


ROWS = [
    {
        "system": "CtrlDiff",
        "paper": "2505.14455",
        "claim": "a learned choice of block sizes is better than a coin",
        "train": "--method ctrldiff --ckpt {control} --max_steps 40 --eval_every 40",
        "control": "--block_sizes 1:0.34,4:0.33,16:0.33",
        "sampler": "dynamic_blocks choose=policy",
        "control_sampler": "dynamic_blocks choose=random",
        "by": "right 2",
        "tasks": ["digits"],
    }
]
