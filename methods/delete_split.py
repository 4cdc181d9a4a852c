"""
DELETE and SPLIT: token editing that can also drop a token, or make room for one.

    python train.py --method delete_split --ckpt out/shakespeare_char
    python sample.py --ckpt out/shakespeare_char_moves --sampler delete_split --temperature 0

A token too many, or one too few, puts all that follow in the wrong place. Replacing them all takes many
passes. So a written token has two more choices than the V of the vocabulary, from a small head of their own:

    DELETE    drop it: what follows moves one place left, and a mask comes in at the end
    SPLIT     put a mask before it: what follows moves one place right, and the last token falls off

What follows ends at the next given token, or with the block. Training makes the mistakes that these mend:

    with probability moved / 2 a token is dropped, with moved / 2 a random one is put before it; of the others
    a share `wrong` is replaced; then each is masked with probability 1 - alpha_t
    loss = sum of -log p(target | that)      target: DELETE at a token put in, SPLIT behind one dropped, else
                                             the token that belongs there

A mask that came in has no target, nor has a token put in and then masked. A masked token behind a dropped one
has itself. Masked noise only. From LLaDA 2.2 (a report without an arXiv id): the two edits, a least number of
tokens a pass, the rule against going in circles. Ours: the training, which it does not give. Replacing alone
is methods/token_editing.py.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn

import methods
from diffusion import pick
from generate import sampler
from methods import _shared
from model import Transformer
from run.cli import die
from samplers.pieces import made_by, need, top

ROOM, END = -1, -2  # in `moved`: the mask of a SPLIT, the mask at the end


@dataclass
class Settings:
    ckpt: str = "out/run"  # the network, a training run's out_dir
    size: int = 0  # the block size that it learns on; 0: the largest
    moved: float = 0.1  # the share of tokens that are dropped, or have one put before them; 0 is the control
    wrong: float = 0.1  # the share of wrong ones among visible tokens


FIXED = (*_shared.FIXED, "moved", "wrong")
INHERITS = (*_shared.INHERITS, "weight_decay", "beta1", "beta2", "grad_clip")


def DEFAULTS(s):
    more = {"lr": 3e-4, "warmup": 20, "lr_schedule": "constant", "ema": 0.99}
    return _shared.defaults(s.ckpt, "moves", max_steps=600, **more)


def check(cfg, s):
    for name in ("moved", "wrong"):
        if not 0 <= getattr(s, name) < 1:
            die(f"{name} is {getattr(s, name)}, it must be in [0, 1)", f"--{name}=0.1")
    if cfg.process != "masked" or cfg.time_conditioning == "true":
        kind = f"{cfg.process} noise" + " and sees the noise level" * (cfg.time_conditioning == "true")
        why = "delete_split is for masked noise, on a network without a clock"
        die(f"{why}: {s.ckpt} has {kind}", "another --ckpt")
    _shared.check(cfg, s, "delete_split")


def network(model_cfg, s):
    return Editor(model_cfg)


class Editor(Transformer):
    """A Transformer that also says whether a token should move."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.edits = nn.Linear(cfg.d_model, 2)  # DELETE, SPLIT
        nn.init.zeros_(self.edits.weight), nn.init.constant_(self.edits.bias, -5.0)

    def load_state_dict(self, state, **how):
        """The weights may be those of a network without the two edits: they then stay as they are."""
        own = {name: w for name, w in self.state_dict().items() if name.startswith("edits.")}
        return super().load_state_dict(own | dict(state), **how)

    def forward(self, clean, noisy, block_size, *args, returns="logits", **how):
        """returns: "logits", or "both", (logits, edits) with edits (B, N, 2): logits of DELETE and SPLIT."""
        h, _ = self.hidden(clean, noisy, block_size, *args, **how)
        h = h[:, 0 if clean is None else clean.size(1) :]
        return (self.to_logits(h), self.edits(self.norm(h))) if returns == "both" else self.to_logits(h)


def moved(delete, split, open):
    """
    Where what stands in a block comes from, (R, b) int64: a position of before, or ROOM, or END. delete and
    split (R, b) bool: what to do with the tokens. Those that are not open stay where they are.
    """
    R, b = open.shape
    at = torch.arange(b, device=open.device).expand(R, b)
    delete, split = delete & open, split & open & ~delete
    shift = (split.int() - delete.int()).cumsum(1)
    before = torch.where(open, -1, at).cummax(1).values  # the last given token up to here
    shift = shift - torch.where(before >= 0, shift.gather(1, before.clamp(min=0)), 0)
    limit = torch.where(open, b, at).flip(1).cummin(1).values.flip(1)  # the next given one
    place = at + shift
    source = torch.full((R, b + 1), END, device=open.device)
    put = lambda there, place, what: source.scatter_(1, torch.where(there, place, b), what)
    put(split & (place <= limit), place - 1, torch.full_like(at, ROOM))
    put(open & ~delete & (place < limit), place, at)
    return torch.where(open, source[:, :b], at)


def carried(x, source, new):
    """x (R, b) after the move; `new` where a mask came in."""
    return torch.where(source >= 0, x.gather(1, source.clamp(min=0)), new)


def mistakes(x, open, alpha, moves, wrong, process, noise):
    """
    Blocks x (R, b) with mistakes: (xt, target), both (R, b). target: an id; V for DELETE, V + 1 for SPLIT; -1
    where nothing is to be learnt. alpha (R, b): the share that is not masked. noise: (R, b, 4) uniform.
    """
    u, V, mask = noise.unbind(-1), process.vocab_size, process.mask_id
    other = (u[0] * (V - 1)).long().clamp(max=V - 2)
    other = other + (other >= mask)  # any id but the mask
    drop = open & (u[1] <= moves / 2)
    behind = nn.functional.pad(drop[:, :-1], (1, 0)) & open & ~drop
    add = open & (u[1] > 1 - moves / 2) & ~behind
    source = moved(drop, add, open)
    there, room = source >= 0, source == ROOM
    target = carried(x, source, -1)
    misplaced = carried(behind, source, False)
    target = torch.where(misplaced, V + 1, torch.where(room, V, target))
    replaced = there & open & ~misplaced & (u[2] <= wrong)
    shown = torch.where(replaced | room, other, carried(x, source, mask))
    hidden = open & (u[3] > alpha) & (shown != mask)
    # behind a mask nobody can see that something is missing: the token itself is the target
    target = torch.where(hidden & misplaced, carried(x, source, -1), target)
    target = torch.where((hidden & room) | ~open, -1, target)
    return torch.where(hidden, mask, shown), target


def moves_loss(
    forward, process, x0, size, t, objective, given, charged, schedule, start, noise, device=None,
    *, b, moves, wrong,
):  # fmt: skip
    """
    Takes the place of token_loss, arguments there: the sum of -log p(target | mistakes), in nats. Rows of
    block size 1 and of other sizes than b read noise without mistakes, as ever.
    """
    x0, given, charged, noise = (y.to(device or x0.device) for y in (x0, given, charged, noise))
    x, given, charged = x0[:, start:], given[:, start:], charged[:, start:]
    size = torch.as_tensor(size, device=x.device).expand(len(x))[:, None]
    alpha = schedule(t)[0].to(x.device).view(-1, 1)
    fold = lambda y: y.unflatten(1, (-1, b)).flatten(0, 1)
    open, rate = charged & (size == b), alpha.expand(x.shape)
    xt, target = mistakes(fold(x), fold(open), fold(rate), moves, wrong, process, fold(noise.uniform(4)))
    xt, target = xt.view_as(x), target.view_as(x)
    usual = torch.where(size == 1, process.ar_input(x.shape, noise), process.corrupt(x, alpha[:, 0], noise))
    xt = torch.where(given, x, torch.where(size == b, xt, usual))
    target = torch.where(size == b, target, torch.where(charged & (xt == process.mask_id), x, -1))
    logits, edits = forward(x0, xt, size[:, 0], start, returns="both")
    logp = choices(process, logits, edits, xt != process.mask_id).log_softmax(-1)
    per_token = torch.where(target >= 0, -pick(logp, target.clamp(min=0)), 0.0)
    return per_token.sum(), per_token.detach()


def choices(process, logits, edits, written):
    """Logits (R, b, V + 2): all that can be done with a token. A mask can only be filled."""
    edits = edits.to(logits).masked_fill(~written[..., None], -math.inf)
    return torch.cat((process.loo_logits(logits), edits), dim=-1)


class Learner(methods.Learner):
    def loss(self, step):
        s = self.settings
        return functools.partial(moves_loss, b=s.size, moves=s.moved, wrong=s.wrong)


# ----- the sampler


@sampler("absorbing", "own pace")
def delete_split(block, *, fill=0.7, edit=0.9, post=16, moves=True):
    """
    Token editing with DELETE and SPLIT (LLaDA 2.2). Each pass, with p of the tokens, DELETE and SPLIT:

        fill     y ~ p at a mask where p(y) >= fill; at least the surest 1 + the masks that edits brought
        edit     a written token by argmax p, where that is another choice and p > edit
        move     what DELETE and SPLIT say, all at once

    It ends when nothing is masked and nothing changes. Where edits lead back to what stood there before, the
    least sure new token becomes the second choice. For checkpoints of --method delete_split.

    fill: 0 writes all at once, 1 about one at a time
    edit: above 1 nothing is edited
    post: passes after the first masks are gone, at most; one more fills what is left, and edits nothing
    moves: false leaves DELETE and SPLIT out, the control
    """
    need(0 <= fill <= 1, "fill", fill, "between 0 and 1")
    need(0 <= edit < math.inf, "edit", edit, "at least 0 and finite")
    need(post >= 0, "post", post, "at least 0")
    made_by(isinstance(block.model, Editor), "delete_split")
    mask, k = block.process.mask_id, 0
    first, seen = block.open & (block.x == mask), []  # masks that were there from the beginning
    passes_left = torch.full((len(block.x),), post, device=block.x.device)
    while block.live.any():
        left = block.open & (block.x == mask)
        passes_left = torch.where(first.any(1), passes_left, passes_left - 1)
        final = (passes_left < 0)[:, None]
        logits = block.predict(0.0, returns="both")
        p = choices(block.process, logits, block.state["carry"].to(logits.device), ~left).log_softmax(-1)
        if not moves:
            p = p[..., :-2].log_softmax(-1)
        V = logits.size(-1)
        y = block.draw(block.sharpen(p[..., :V]), block.noise(k))
        c, best = pick(p, y), p.argmax(-1)
        at_least = 1 + (left & ~first).sum(1)
        take = left & ((c >= math.log(max(fill, 1e-300))) | top(c, at_least, left))
        change = block.open & ~left & (best != block.x) & (pick(p, best).exp() > edit) & ~final
        source = moved(change & (best == V), change & (best == V + 1), block.open)
        x = torch.where(take, y, torch.where(change & (best < V), best, block.x))
        seen.append(block.x)
        again = torch.stack([(carried(x, source, mask) == old).all(1) for old in seen]).any(0)[:, None]
        weak = top(-pick(p, best), 1, change & (best < V)) & again
        x = torch.where(weak, p[..., :V].topk(min(2, V), dim=-1).indices[..., -1], x)
        block.write(carried(x, source, mask))
        first = torch.where(block.live[:, None], carried(first & ~take, source, False), first)
        full = ~(block.open & (block.x == mask)).any(1)
        settled = ~change.any(1) & ((edit > 1) | (post == 0) | ~take.any(1))
        block.live, k = block.live & ~(full & (settled | final[:, 0])), k + 1
        yield


ROWS = [
    {
        "system": "DELETE and SPLIT (LLaDA 2.2)",
        "claim": "more right than edits that move nothing",
        "train": "--method delete_split --ckpt {base} --max_steps 400 --eval_every 400",
        "control": "--method delete_split --moved 0 --ckpt {base} --max_steps 400 --eval_every 400",
        "base": "",
        "sampler": "delete_split",
        "control_sampler": "delete_split moves=false",
        "by": "right pace",
        "tasks": ["digits"],
    }
]
