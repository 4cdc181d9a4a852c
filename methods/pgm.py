"""
PGM: two random groups of tokens predict each other, so training needs no mask and sampling reads no mask.

Every token is in group 0 or 1: in group 1 with probability 1 - alpha_t, as it would be masked. Tokens read
their own group (encoder). Then each position is predicted from the other group (decoder), both ways at once:

    L = 1/2 E_t [ w(alpha_t)     * sum over group 1  of  -log p(x_0,i | group 0)
                + w(1 - alpha_t) * sum over group 0  of  -log p(x_0,i | group 1) ]

    w(alpha) = -alpha'_t / (1 - alpha)

Each term is the bound of masked diffusion: the masks are group 1 at alpha_t, and group 0 at 1 - alpha_t. The
network is its own. A position is asked for by a vector that knows where it is, and nothing else:

    encoder    self-attention within a group
    swap       position i attends to the encoder's outputs of the other group; the vector itself is not added
    decoder    the same attention, layer after layer; positions do not read each other

Sampling reads the tokens that are written, and asks for those that the step writes: no other position costs
anything. Partition Generative Modeling, arXiv 2505.18883. A start token and prompts are read by both groups.

    python train.py config/sudoku.toml --method pgm --block_sizes 32:1 --out_dir out/pgm
    python sample.py --ckpt out/pgm --sampler pgm --steps 8
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import methods
from diffusion import column, loglinear, nats
from generate import Block, sampler
from model import Transformer, rotate
from rng import Noise, draw, float64
from run.cli import die
from samplers.pieces import made_by, need

BOTH, NOBODY = -1, -2  # groups of what both groups read, and of what fills up a shorter row


@dataclass
class Settings:
    decoder_layers: int = 0  # of the n_layers, those of the decoder; 0: half of them


DEFAULTS = {"objective": "elbo"}


def check(cfg, settings):
    if cfg.n_layers < 2 or not 0 <= settings.decoder_layers < cfg.n_layers:
        problem = f"{cfg.n_layers} layers, {settings.decoder_layers} of them in the decoder"
        die(f"{problem}: encoder and decoder each need one", "--n_layers=4 --decoder_layers=2")
    if cfg.process != "masked" or cfg.next_token or cfg.time_conditioning == "true":
        what = "PGM is a form of masked noise, and sees no noise level"
        die(what, "--process=masked --next_token=false --time_conditioning=false")


# ----- the network


class CrossAttention(nn.Module):
    """Positions x (B, Q, D) read the outputs (B, K, D) of the encoder."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.d_model
        self.n_heads, self.norm1 = cfg.n_heads, nn.LayerNorm(D, bias=False)
        self.q, self.kv = nn.Linear(D, D, bias=False), nn.Linear(D, 2 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)

    def forward(self, x, outputs, rope_x, rope, mask):
        heads = lambda y: y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        q, (k, v) = heads(self.q(self.norm1(x))), (heads(y) for y in self.kv(outputs).chunk(2, dim=-1))
        y = F.scaled_dot_product_attention(rotate(q, *rope_x), rotate(k, *rope), v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossLayer(nn.Module):
    """A layer of the decoder: it has no self-attention."""

    def __init__(self, cfg):
        super().__init__()
        D, wide = cfg.d_model, cfg.mlp_ratio * cfg.d_model
        self.attention, self.norm2 = CrossAttention(cfg), nn.LayerNorm(D, bias=False)
        self.mlp = nn.Sequential(nn.Linear(D, wide), nn.GELU("tanh"), nn.Linear(wide, D))
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, *where):
        x = x + self.dropout(self.attention(x, *where))
        return x + self.dropout(self.mlp(self.norm2(x)))


class PGMBlock(Block):
    """A block that tells the network which of its tokens are prompt."""

    def forward(self, noisy, block_size, alpha, guess=None, **extra):
        return super().forward(noisy, block_size, alpha, guess, given=~self.open, **extra)


def network(model_cfg, settings):
    return PGM(model_cfg, settings.decoder_layers or model_cfg.n_layers // 2)


class PGM(Transformer):
    own_rule = "masks are predicted from the known tokens, known tokens from the masks; a group reads itself"

    def __init__(self, cfg, n_decoder):
        super().__init__(replace(cfg, n_layers=cfg.n_layers - n_decoder))
        self.start = nn.Parameter(0.3 * torch.randn(cfg.d_model))
        self.query = nn.Parameter(0.3 * torch.randn(cfg.d_model))
        self.between = nn.LayerNorm(cfg.d_model, bias=False)
        self.swap = CrossAttention(cfg)
        self.decoder = nn.ModuleList(CrossLayer(cfg) for _ in range(n_decoder))
        self.block_class = PGMBlock

    def new_cache(self, batch_size, max_len):
        """None: written tokens read those written later, so nothing can be kept."""

    def forward(
        self,
        clean,
        noisy,
        block_size,
        start=0,
        sigma=None,
        cache=None,
        given=None,
        group=None,
        at=None,
        ask=None,
    ):
        """
        Logits (B, N, V), arguments as in model.py. given (B, N) bool: prompts.
        group (B, N): 0 or 1, in training. None, as any network is called: masks are 1, the rest 0.
        ask (B, Q) int64: logits (B, Q, V) at these positions, by group 1; `noisy` stands at positions `at`.
        Raises ValueError for several blocks at once, block size 1 among them: there is no AR mode.
        """
        C, N = 0 if clean is None else clean.size(1), noisy.size(1)
        if N > 1 and (torch.as_tensor(block_size) < N).any():
            raise ValueError("PGM has one block: no AR mode, and no blocks side by side")
        if ask is not None:
            return self.read(noisy, at, group, ask, torch.ones_like(ask))
        group = (noisy == self.cfg.vocab_size - 1).long() if group is None else group
        group = group if given is None else torch.where(given.to(group.device), BOTH, group)
        ids = noisy if clean is None else torch.cat((clean, noisy), dim=1)
        at = torch.cat((torch.arange(C), int(start) + torch.arange(N))).to(ids.device).expand(len(ids), -1)
        return self.read(ids, at, F.pad(group, (C, 0), value=BOTH), at[:, C:], group)

    def read(self, ids, at, group, ask, by):
        """
        Logits (B, Q, V) at positions ask (B, Q), for the group `by` (B, Q), from ids (B, K) at positions `at`
        of groups `group` (B, K). Nothing passes between the groups 0 and 1 before the swap, nor from a
        position's own group after it.
        """
        if at.numel() and max(at.max(), ask.max()) >= self.cfg.seq_len:
            raise ValueError(f"position {int(max(at.max(), ask.max()))} is beyond seq_len {self.cfg.seq_len}")
        x = torch.cat((self.start.expand(len(ids), 1, -1), self.embed(ids)), dim=1)
        group, rope = F.pad(group, (1, 0), value=BOTH), self.rope(F.pad(at, (1, 0), value=-1))
        both, filler = (group == BOTH)[:, None], (group == NOBODY)[:, None]
        own = (group[..., None] == group[:, None]) | both  # (B, 1 + K, 1 + K)
        for layer in self.layers:
            x = layer(x, rope, own[:, None])
        other = (by[..., None] != group[:, None]) & ~filler | both  # (B, Q, 1 + K)
        where = self.between(x), self.rope(ask), rope, other[:, None]
        y = self.swap(self.query + sinusoid(ask, self.query), *where)
        for layer in self.decoder:
            y = layer(y, *where)
        return self.to_logits(y)

    def rope(self, position):
        """As in model.py, for positions (B, S)."""
        return tuple(y.unflatten(0, position.shape)[:, None] for y in super().rope(position.flatten()))


def sinusoid(position, like):
    """(B, Q, D) of positions (B, Q): sine and cosine of position * 10000^(-2i/D)."""
    half = like.numel() // 2
    exponent = -torch.arange(half, device=position.device, dtype=float64(position.device)) / half
    angle = position[..., None] * 10000.0**exponent
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(like)


# ----- the loss


def pgm_loss(
    model, process, x0, block_size, t, objective, given, charged, schedule=loglinear, start=0, noise=None,
    device=None, *, halves=2,
):  # fmt: skip
    """
    Takes the place of token_loss, arguments there; the block size is T. With w(alpha) = -alpha' / (1 - alpha)
        L = 1/2 ( w(alpha_t) sum over group 1 of -log p(x_0,i | group 0)
                + w(1 - alpha_t) sum over group 0 of -log p(x_0,i | group 1) )
    halves: 2: both groups pay, half each. 1: group 1 alone, in full, the bound of eval.py.
    """
    assert start == 0, f"start {start}: the one block is the row"
    x0, given, charged = (y.to(device or x0.device) for y in (x0, given, charged))
    objective = objective if isinstance(objective, str) else objective[x0.size(1)]
    alpha, dalpha = (column(y, x0).expand_as(x0) for y in schedule(t))
    xt = process.corrupt(x0, alpha, (noise or Noise.like(x0)).to(x0.device))
    group = (xt == process.mask_id).long()
    logits = model(None, x0, x0.size(1), given=given, group=group)
    alpha = torch.where(group == 1, alpha, 1 - alpha)  # at which this group would be the masks
    pays = charged & ((group == 1) | (halves == 2))
    cost = nats(process, objective, logits, x0, torch.full_like(x0, process.mask_id), alpha, dalpha)
    per_token = torch.where(pays, cost, 0.0).to(logits) / halves
    return per_token.sum(), per_token.detach()


def bound(*args, **how):
    return pgm_loss(*args, **how, halves=1)


class Learner(methods.Learner):
    def __init__(self, cfg, settings, model, process, token_loss):
        super().__init__(cfg, settings, model, process, token_loss)
        if set(cfg.block_sizes) != {cfg.seq_len}:
            problem = f"PGM's one block is the row, here of {cfg.seq_len} tokens, and there is no AR mode"
            die(problem, f"--block_sizes={cfg.seq_len}:1")

    def loss(self, step):
        return pgm_loss


# ----- sampling


def first_of(which, order):
    """(at, real), (R, n) each: the positions `which` (R, T) bool in rising order; n is the most a row has."""
    n = which.sum(1)
    at = torch.where(which, order, torch.inf).argsort(1)[:, : int(n.max())]
    return at, torch.arange(at.size(1), device=n.device) < n[:, None]


def plan(block, even):
    """The step at which each token is written, (R, T) int64; and the order at random, (R, T)."""
    u, level = block.noise(0).uniform(2).unbind(-1)
    if not even:
        ends = torch.tensor(block.alpha[1:], device=u.device, dtype=u.dtype)
        return torch.searchsorted(ends, level.contiguous()), u  # the first whose alpha is not below the level
    n, T = block.open.sum(1)[:, None], block.steps
    number = torch.where(block.open, u, 2.0).argsort(1).argsort(1)  # 0 is the first to be written
    ends = -(-n * torch.arange(1, T + 1, device=u.device) // n.clamp(1, T))  # (R, T) written after each step
    return (number[..., None] >= ends[:, None]).sum(-1), u


@sampler("absorbing")
def pgm(block, *, even=True):
    """
    PGM (arXiv 2505.18883): written tokens are read, and the positions that a step writes are asked for; the
    others cost nothing. Positions come in random order.

    even: as many tokens at every step. false: each token's step is drawn, as in ancestral sampling
    """
    model, process, T = block.model, block.process, block.x.size(1)
    made_by(isinstance(model, PGM), "pgm")
    need(T == model.cfg.seq_len, "block_size", T, f"the whole row, {model.cfg.seq_len}")
    (step, u), device = plan(block, even), model.embed.weight.device
    for k in step[block.open].unique().tolist():
        at, real = first_of(block.x != process.mask_id, u)
        ask, mine = first_of(block.open & (step == k), u)
        group = torch.where(block.open.gather(1, at), 0, BOTH).masked_fill(~real, NOBODY)
        extra = {"group": group.to(device), "at": at.to(device), "ask": ask.to(device)}
        logits = model(None, block.x.gather(1, at).to(device), T, **extra).to(block.x.device)
        block.live = mine.any(1)  # who needs this pass
        block.count(len(at) + at.numel() + ask.numel())  # with the start token
        noise = block.noise(k + 1)
        noise.key = noise.key.gather(1, ask)  # the numbers of these positions
        y = draw(block.sharpen(process.loo_logits(logits.double())).softmax(-1), noise)
        y = torch.where(mine, y, block.x.gather(1, ask))
        block.write(block.x.scatter(1, ask, y))
        yield


ROWS = [
    {
        "system": "PGM",
        "paper": "2505.18883",
        "claim": "fewer nats than masked noise with complementary masks",
        "train": "--method pgm --block_sizes {row}:1",
        "control": "--method masks --masks complementary --block_sizes {row}:1 --objective elbo",
        "sampler": "pgm",
        "by": "nats row",
        "block": "row",
    }
]
