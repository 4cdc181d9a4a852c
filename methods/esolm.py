"""
Eso-LM: diffusion writes a part of the row, then the rest follows from left to right. One cache serves both.

Every row has an order: known tokens first, then the masks. Attention goes one way in that order. So nothing
that is computed for a known token changes later, and its keys and values stay in a cache, in both phases:

    diffusion     alpha_t = alpha0 (1 - t): a token is a mask with probability 1 - alpha_t; masks in any order
    sequential    what is left a mask at t = 0, where alpha is alpha0: from left to right, one token a pass

    -log p(x_0) <= E_t [ -alpha'_t / (1 - alpha_t) * sum over masks i of x_t  of  -log p(x_0,i | x_t) ]
                 + E   [ sum over masks i at t = 0  of  -log p(x_0,i | known tokens, x_0 at masks left of i) ]

alpha0 = 1 is masked diffusion, alpha0 = 0 is an autoregressive model. The sequential phase also sees what
diffusion wrote to its right. Esoteric Language Models, arXiv 2506.01928, variant B. One block: the row.

    python train.py config/sudoku.toml --method esolm --block_sizes 32:1 --out_dir out/esolm
    python sample.py --ckpt out/esolm --sampler esolm --steps 8
"""

from dataclasses import dataclass

import torch

import diffusion
import methods
from diffusion import Masked, column, loglinear, nats
from generate import sampler
from model import Transformer, attention_mask
from rng import Noise, draw
from run.cli import die
from samplers.pieces import made_by, need


@dataclass
class Settings:
    alpha0: float = 0.5  # the share of a row that diffusion writes; 1: all, 0: none, left to right alone
    sequential_share: float = 0.5  # of the rows of a batch: those that learn the sequential phase


DEFAULTS = {"objective": "elbo"}


def check(cfg, settings):
    if not 0 <= settings.alpha0 <= 1:
        die(f"alpha0 is {settings.alpha0}, it must be in [0, 1]", "--alpha0=0.5")
    if not 0 < settings.sequential_share < 1:
        problem = f"sequential_share is {settings.sequential_share}, it must be between 0 and 1"
        die(problem, "--sequential_share=0.5, or --alpha0=1 for diffusion alone")
    if cfg.process != "masked" or cfg.next_token or not cfg.clean_causal or cfg.time_conditioning == "true":
        what = "Eso-LM puts masks last: masked noise, two causal streams, no time conditioning"
        die(what, "--process=masked --next_token=false --clean_causal=true --time_conditioning=false")


# ----- the noise


def process(cfg, settings, vocab_size):
    return EsoMasked(vocab_size + 1, vocab_size, settings.alpha0)


class EsoMasked(Masked):
    """Masked noise that knows where diffusion ends and the sequential phase begins."""

    count_form = False  # the bound has two parts, and is no mean over numbers of masks

    def __init__(self, vocab_size, mask_id, alpha0):
        super().__init__(vocab_size, mask_id)
        self.alpha0 = alpha0


# ----- the order


def order_of(masked, given, u, left_to_right):
    """
    rank (B, T) int64: which place in the order each token has. Prompts first, then other known tokens, then
    masks, each at random by u (B, T); masks of the rows left_to_right (B, 1) bool as they stand.
    """
    T = u.size(1)
    within = torch.where(masked & left_to_right, torch.arange(T, device=u.device) / T, u)
    return (within + masked.double() - given.double()).argsort(1).argsort(1)


def order_mask(rank, block_size):
    """
    Who reads whom in training, (B, 2T, 2T) bool, keys clean then noisy: the rule of model.py with places in
    the order, rank (B, T), in place of positions, and one way inside a block. block_size (B,): 1 in rows of
    the sequential phase, T in rows of diffusion, which read no clean token.
    """
    b = block_size[:, None]
    edge = torch.cat((rank + 1, rank // b * b), dim=1)  # clean tokens before it are read
    reads_clean = rank[:, None] < edge[..., None]
    block = torch.cat((torch.full_like(rank, -1), rank // b), dim=1)
    one_way = rank[:, None] <= torch.cat((rank, rank), dim=1)[..., None]
    return torch.cat((reads_clean, (block[..., None] == (rank // b)[:, None]) & one_way), dim=-1)


def behind(real, n):
    """
    The mask (B, n, keys) of a pass whose n tokens come after those in the cache: each reads what came before,
    and itself. real (B, keys) bool: false where a key fills up a shorter row.
    """
    place = torch.arange(real.size(1), device=real.device)
    own = place[-n:, None]
    return (place <= own) & real[:, None] | (place == own)


# ----- the network


def network(model_cfg, settings):
    return EsoLM(model_cfg)


class EsoLM(Transformer):
    """
    Three ways to call it. With rank (B, T): the two streams of training, see order_mask. With at (B, C + N)
    and real: clean tokens and masks at these positions, behind the cache, see `behind`. With neither: as any
    network is called, so that other samplers can; known tokens of a block come first, then its masks, both
    as they stand.
    """

    own_rule = "known tokens first, then the masks; each reads what stands before it in that order"

    def hidden(
        self, clean, noisy, block_size, start=0, sigma=None, cache=None, rank=None, at=None, real=None
    ):
        C, past = 0 if clean is None else clean.size(1), 0 if cache is None else cache.length
        x = self.embed(torch.cat([y for y in (clean, noisy) if y is not None], dim=1))
        if rank is not None:
            position = torch.arange(rank.size(1), device=x.device).repeat(2)  # each stays where it stands
            mask = order_mask(rank, block_size)
        elif at is not None:
            position, mask = at, behind(real, at.size(1))
        else:
            position, edge, group = self.layout(block_size, start, past, C, x.size(1) - C, x.device)
            mask = attention_mask(edge, group, past + C).repeat(len(x) // len(edge), 1, 1)
            if noisy is not None:
                place = position[C:] + self.cfg.seq_len * (noisy == self.cfg.vocab_size - 1)  # masks last
                mask[:, C:, past + C :] &= place[:, None] <= place[..., None]
        if position.numel() and position.max() >= self.cfg.seq_len:
            raise ValueError(f"position {int(position.max())} is beyond seq_len {self.cfg.seq_len}")
        rope = self.rope(position)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, mask[:, None], None, cache, i)
        if cache is not None:
            cache.commit(C)
        return x, None

    def rope(self, position):
        """As in model.py; position may be (B, S) too, where each row has an order of its own."""
        shape = (1, *position.shape)[-2:]
        return tuple(y.unflatten(0, shape)[:, None] for y in super().rope(position.flatten()))


# ----- the loss


def eso_nats(model, process, x0, sizes, t, sequential, objective, given, charged, schedule, noise):
    """
    (B, T) nats. Rows `sequential` (B,) bool pay -log p(x_0,i | known tokens, x_0 at masks left of i) for what
    is left a mask at alpha0, the others -alpha'_t / (1 - alpha_t) * -log p(x_0,i | x_t) at masks of time t.
    Block size 1 is a sequential row in which diffusion has written nothing.
    """
    alpha0 = process.alpha0 * (sizes != 1).double()
    alpha, dalpha = schedule(t)
    alpha, dalpha = alpha0 * torch.where(sequential, 1.0, alpha), alpha0 * dalpha
    xt = torch.where(given, x0, process.corrupt(x0, alpha, noise))
    in_turn = sequential.to(x0.device)[:, None]
    rank = order_of(xt == process.mask_id, given, noise.uniform(1)[..., 0], in_turn)
    logits = model(x0, xt, torch.where(in_turn[:, 0], 1, x0.size(1)), rank=rank)
    alpha, dalpha = (column(y, x0).expand_as(x0) for y in (alpha, dalpha))
    cost = nats(process, objective, logits, x0, xt, alpha, dalpha)
    cost = torch.where(in_turn, process.ce(logits, x0, xt), cost)
    return torch.where(charged, cost, 0.0).to(logits)


def eso_loss(
    model, process, x0, block_size, t, objective, given, charged, schedule=loglinear, start=0, noise=None,
    device=None, *, share=None,
):  # fmt: skip
    """
    Takes the place of token_loss, arguments there; block sizes are 1 and T.
    share: of the rows, those in the sequential phase; each row is weighted by 1 / (the share of its phase).
        Times are spread evenly over the rows, so t says which: below `share` a row is sequential, above it
        is one of diffusion, at a time stretched to (0, 1).
        None: every row pays for both phases, the bound of eval.py.
    """
    if isinstance(block_size, int) and block_size == 1:
        how = {"given": given, "charged": charged, "schedule": schedule, "start": start, "noise": noise}
        return diffusion.token_loss(model, process, x0, 1, t, objective, device=device, **how)
    assert start == 0, f"start {start}: the one block is the row"
    x0, given, charged, noise = (y.to(device or x0.device) for y in (x0, given, charged, noise))
    sizes = torch.as_tensor(block_size).expand(len(x0)).cpu()
    objective = objective if isinstance(objective, str) else objective[x0.size(1)]
    last = objective, given, charged, schedule, noise
    if share is None:
        in_turn = process.alpha0 < 1 or bool((sizes == 1).any())
        phases = [False] * (process.alpha0 > 0) + [True] * in_turn
        parts = [eso_nats(model, process, x0, sizes, t, torch.full_like(sizes, p) > 0, *last) for p in phases]
        per_token = torch.stack(parts).sum(0)
    else:
        share = {0.0: 1.0, 1.0: 0.0}.get(process.alpha0, share)  # one phase alone
        sequential = (t < share) | (sizes == 1)
        time = torch.where(sequential, 0.5, (t - share) / max(1 - share, 1e-9))
        weight = 1 / torch.where(sequential, share, 1 - share).masked_fill(sizes == 1, 1.0)
        per_token = eso_nats(model, process, x0, sizes, time, sequential, *last)
        per_token = per_token * weight.to(per_token)[:, None]
    return per_token.sum(), per_token.detach()


bound = eso_loss


class Learner(methods.Learner):
    def __init__(self, cfg, settings, model, process, token_loss):
        super().__init__(cfg, settings, model, process, token_loss)
        T = cfg.seq_len
        if not {T} <= set(cfg.block_sizes) <= {1, T}:
            problem = f"Eso-LM's one block is the row, here of {T} tokens; only block size 1 goes with it"
            die(problem, f"--block_sizes={T}:1")

    def loss(self, step):
        return lambda *args, **how: eso_loss(*args, **how, share=self.settings.sequential_share)


# ----- sampling


def first_of(which, order):
    """(at, real), (R, n) each: the positions `which` (R, T) bool in rising order; n is the most a row has."""
    n = which.sum(1)
    at = torch.where(which, order, torch.inf).argsort(1)[:, : int(n.max())]
    return at, torch.arange(at.size(1), device=n.device) < n[:, None]


def plan(block, alpha0, shared):
    """
    When is each token written? (R, T) int64: the step, -1 for a prompt; and u (R, T), the order at random. A
    token is written by diffusion at step k with probability (a_s - a_t) / (1 - a_t), a = alpha0 alpha; those
    that diffusion leaves come after its steps, from left to right.
    """
    u = block.noise(0).uniform(1)[..., 0]
    number = torch.where(block.open, u, 2.0).argsort(1).argsort(1)  # the first, the second, ... to be written
    same = Noise(block.seed, torch.tensor([-1], device=u.device), block.positions, 0)
    level = (same if shared else block.noise(1)).uniform(1)[..., 0].expand_as(u).gather(1, number)
    ends = torch.tensor([alpha0 * a for a in block.alpha[1:]], device=u.device, dtype=u.dtype)
    step = torch.searchsorted(ends, level)  # the first whose alpha is not below the level
    rest = block.open & (step == block.steps)
    step = torch.where(rest, block.steps + rest.cumsum(1) - 1, step)
    return torch.where(block.open, step, -1), u


@sampler("absorbing")
def esolm(block, *, alpha0=-1.0, shared=True):
    """
    Eso-LM (arXiv 2506.01928): --steps steps of diffusion write a share alpha0 of the row, then the rest
    follows from left to right, one token a pass. A pass reads the tokens of the one before, which enter the
    cache, and the masks that it writes. Steps that write nothing cost nothing.

    alpha0: -1 is that of training; 1 is diffusion alone, 0 left to right alone
    shared: at a step all rows write the same number of tokens, as published: no row is filled up, but texts
        of one batch are not independent. false: every row draws its own numbers
    """
    model, process, T = block.model, block.process, block.x.size(1)
    made_by(isinstance(model, EsoLM), "esolm")
    need(T == model.cfg.seq_len, "block_size", T, f"the whole row, {model.cfg.seq_len}")
    need(alpha0 == -1 or 0 <= alpha0 <= 1, "alpha0", alpha0, "in [0, 1], or -1")
    step, u = plan(block, process.alpha0 if alpha0 == -1 else alpha0, shared)
    at, real = first_of(step == -1, u)  # known tokens, in the order in which they came
    device, cache = model.embed.weight.device, block.cache
    if cache is not None:
        cache.length = 0
    for k in step[block.open].unique().tolist():
        masks, mine = first_of(step == k, u)
        new = at[:, 0 if cache is None else cache.length :]
        clean, noisy = block.x.gather(1, new), torch.full_like(masks, process.mask_id)
        extra = {"at": torch.cat((new, masks), dim=1), "real": torch.cat((real, mine), dim=1)}
        extra = {name: y.to(device) for name, y in extra.items()}
        logits = model(clean.to(device), noisy.to(device), T, cache=cache, **extra).to(block.x.device)
        block.live = mine.any(1)  # who needs this pass
        block.count(clean.numel() + noisy.numel())
        noise = block.noise(k + 2)
        noise.key = noise.key.gather(1, masks)  # the numbers of these positions
        y = draw(block.sharpen(process.loo_logits(logits.double())).softmax(-1), noise)
        y = torch.where(mine, y, block.x.gather(1, masks))
        block.write(block.x.scatter(1, masks, y))
        at, real = torch.cat((at, masks), dim=1), torch.cat((real, mine), dim=1)
        yield


ROWS = [
    {
        "system": "Eso-LM",
        "paper": "2506.01928",
        "claim": "fewer nats than masked diffusion of the whole row",
        "train": "--method esolm --block_sizes {row}:1",
        "control": "--block_sizes {row}:1 --objective elbo",
        "sampler": "esolm",
        "by": "nats row",
        "block": "row",
    }
]
