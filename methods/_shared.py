"""
Shared by methods that begin from a checkpoint and watch how it writes. Not a method: the underscore keeps it
off the list.

    defaults     the settings of train.py that such a method wants
    check        refuses what none of them can use
    blocks_of    the blocks of a batch of rows, each behind its own clean context
    Writes       a Learner that makes such blocks for samplers to fill
    WithPart     a Transformer whose weights are frozen, and `part`, a module that learns
    PartLearner  the Learner of a WithPart

Letters as in generate.py: R rows, b the block size.
"""

import torch

import methods
from diffusion import SCHEDULES
from generate import Block
from model import Transformer
from run.cli import die

FIXED = ("ckpt", "size")
INHERITS = ("batch_size", "log_every", "keep")


def defaults(ckpt, suffix, max_steps, **more):
    """DEFAULTS of a method that begins from --ckpt and writes to that folder's name with a suffix."""
    out_dir = f"{methods.folder_of(ckpt)}_{suffix}"
    usual = {"init_from": ckpt, "out_dir": out_dir, "max_steps": max_steps, "eval_every": max(max_steps, 1)}
    usual |= {"weight_decay": 0.0, "warmup": 10, "n_samples": 0, "n_eval": 64}
    return usual | more


def check(cfg, settings, name):
    """
    Exit with two lines where there is no block to decide in. Settles `size`, the block size that the part is
    made for: the largest of the network, where nobody says another.
    """
    if cfg.init_from != settings.ckpt:
        die(f"{name} begins from the network that --ckpt names", f"--ckpt {cfg.init_from}")
    if not any(b > 1 for b in cfg.block_sizes):
        fix = "train with --block_sizes=1:0.25,16:0.75"
        die(f"{settings.ckpt} was trained on block size 1 alone: there is no order to choose", fix)
    settings.size = settings.size or max(cfg.block_sizes)  # the checkpoint keeps it
    if settings.size not in cfg.block_sizes or settings.size == 1:
        sizes = ", ".join(str(b) for b in sorted(cfg.block_sizes) if b > 1)
        die(f"size is {settings.size}, and {settings.ckpt} has blocks of {sizes}", "leave --size out")
    if cfg.fsdp:
        die(f"{name} trains a small part of a network that every process holds: no FSDP", "--fsdp=false")


def blocks_of(x0, given, real, size):
    """
    [(begin, open)] of the blocks of a batch in which something is to be written: open (B, b) bool. If a block
    holds text, all of it is open but the given tokens. Padding counts as open, as in
    data.dataset.charged_tokens.
    """
    found = []
    for begin in range(0, x0.size(1) - size + 1, size):
        here = slice(begin, begin + size)
        text = (real[:, here] & ~given[:, here]).any(1, keepdim=True)
        open = text & ~given[:, here]
        if open.any():
            found.append((begin, open))
    return found


class Writes(methods.Learner):
    """A Learner that lets samplers write, with the network as it is now."""

    def block(self, begin, x0, open, temperature=0.0, seed=0, steps=None):
        """
        A Block for a sampler to fill, and its counts: positions begin, ... of rows x0 (R, T), which stand
        before it as its context. open (R, b) bool: what is to be written.
        """
        R, device = len(x0), self.model.embed.weight.device
        counts = {"nfe": 0, "nfe_rows": torch.zeros(R, dtype=torch.long), "token_forwards": 0}
        how = {"steps": steps, "schedule": SCHEDULES[self.cfg.schedule], "temperature": temperature}
        how |= {"top_p": 1.0, "seed": seed, "trained": sorted(self.cfg.block_sizes)}
        span, kind = torch.arange(begin, begin + self.size), getattr(self.model, "block_class", Block)
        cache = self.model.new_cache(R, begin + 2 * self.size)
        args = x0.to(device).clone(), cache, counts, torch.arange(R), span, open.to(device), how
        return kind(self.model, self.process, *args), counts

    @property
    def size(self):
        """b"""
        return self.settings.size


def fill(block, sampler, *args, **how):
    """Let a sampler fill a block: what then stands there, (R, b)."""
    for _ in sampler(block, *args, **how):
        pass
    return block.x


class WithPart(Transformer):
    """A Transformer whose weights stay as they are, and a module `part` beside it, which learns."""

    def __init__(self, cfg, part):
        super().__init__(cfg)
        self.requires_grad_(False)
        self.part = part

    def load_state_dict(self, state, **how):
        """The weights may be those of a network without the part: it then stays as it is."""
        own = {name: w for name, w in self.state_dict().items() if name.startswith("part.")}
        return super().load_state_dict(own | dict(state), **how)

    def forward(self, *args, part=None, **how):
        """
        forward of a Transformer; or, with part (a tuple), what the part says of these arguments. It goes
        through here in training, so that several processes average its gradient.
        """
        return super().forward(*args, **how) if part is None else self.part(*part)


class PartLearner(Writes):
    """The Learner of a WithPart. Exits with two lines if its weights are rounded to another format."""

    def __init__(self, cfg, settings, model, process, token_loss):
        super().__init__(cfg, settings, model, process, token_loss)
        if any(p.is_meta for p in model.parameters()):
            die(f"{cfg.init_from} has weights in another format than a run", "--ckpt of a run of train.py")
        model.eval()  # dropout would make another network of it
