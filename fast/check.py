"""
Is the fast path the lesson? It is never believed, it is checked: when a network is built, a small twin of it
with random weights is compared with the lesson, and where they differ the lesson runs.

Three parts, each for itself: the network (model.py), the noise process with its loss (diffusion.py), the
block (generate.Block). A part runs fast only if

    its code is what the fast form was written for, in its file and in memory (edits.py)
    the objects are plain: modules as model.py makes them, no hooks, no parametrizations, no own methods
    the twin gives the same numbers
"""

import copy
import functools

import torch
import torch.nn as nn

import diffusion
import fast.edits as edits
import fast.loss as loss
import fast.processes as processes
import generate
import model as lesson
import rng
from fast.block import FastBlock
from fast.edits import PARTS, fingerprint
from fast.network import FastLayer, FastTransformer

__all__ = ["PARTS", "WRITTEN_FOR", "accelerate", "fingerprint"]

# Fingerprints of the lesson that the fast forms were written for. tests/test_fast.py says what they are now.
WRITTEN_FOR = {"model.py": "7362689afb60", "diffusion.py": "c42c020984eb", "generate.Block": "558b6fa62d4d"}


def edited(part):
    """Why the lesson is not what a fast form was written for, in a few words; '' if it is."""
    return edits.edited(part, WRITTEN_FOR[part])


def speed(net):
    """The same network as a FastTransformer, in place: the weights stay where they are."""
    net.__class__ = FastTransformer
    for layer in net.layers:
        layer.__class__ = FastLayer
    return net


def undo(net, process):
    """A network and a process without what `accelerate` made of them, the network in place."""
    if type(net) is FastTransformer:
        net.__class__ = FastTransformer.__base__
        for layer in net.layers:
            if type(layer) is FastLayer:
                layer.__class__ = FastLayer.__base__
    for name, ours in (("block_class", FastBlock), ("token_loss", loss.token_loss)):
        if vars(net).get(name) is ours:
            delattr(net, name)
    vars(net).pop("watch", None)
    return net, processes.plain(process)


# ----- the twin

SMALL = {"vocab_size": 11, "n_extra_tokens": 1, "seq_len": 16, "n_layers": 2, "n_heads": 2, "d_model": 16}
SMALL |= {"cond_dim": 8, "mlp_ratio": 2}
SHAPING = "clean_causal", "time_conditioning", "condition_clean", "zero_sigma", "rope_base", "next_token"


def seeded(f, *args):
    """f(*args) from one seed, with gradients unless it stops them. Nobody's random numbers are used up."""
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), torch.enable_grad():
        torch.manual_seed(1)
        return f(*args)


def near(ours, want, tolerance=1e-9):
    """Are two lists of tensors equal to rounding?"""
    pairs = list(zip(ours, want, strict=False))
    close = lambda a, b: bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())
    return len(ours) == len(want) and all(a.shape == b.shape and close(a, b) for a, b in pairs)


def compared(equal, ours, theirs):
    """'' if equal() is true, else what is wrong: with `ours`, which should be as `theirs`."""
    try:
        return "" if equal() else f"{ours} gave other numbers than {theirs}"
    except Exception as e:  # whatever a compiler or a driver may raise
        return f"{ours} failed ({type(e).__name__}: {(str(e).strip() or '?').splitlines()[0]})"


@functools.lru_cache(1)
def twins(facts):
    """
    A lesson network and a fast one with the same random weights, head and gates too: at initialisation they
    would hide a difference. facts: (name, value) of the settings in SHAPING.
    """

    def make():
        net = lesson.Transformer(lesson.ModelConfig(**SMALL, **dict(facts))).double().eval()
        for p in net.parameters():
            nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
        return net

    net = seeded(make)
    return net, speed(copy.deepcopy(net))


@functools.cache
def verdict(facts):
    """'' if the fast network is the lesson on a twin: in float64, and in float32 by float64's logits."""
    net, twin = twins(facts)
    want, slopes = seeded(passes, net), seeded(training_pass, net)

    def equal():
        small = [x.double() for x in seeded(passes, copy.deepcopy(twin).float())]
        alike = near(seeded(passes, twin), want) and near(small, want, 1e-3)
        return alike and near(seeded(training_pass, twin), slopes)

    return compared(equal, "the fast network", "model.py")


@torch.no_grad()
def passes(net):
    """Logits of the kinds of passes there are, a list of tensors (B, N, V)."""
    cfg, (x, y) = net.cfg, torch.randint(11, (2, 3, 16))
    if cfg.next_token:
        cached = net(x[:, :5], y[:, 5:6], 1, 5, cache=net.new_cache(3, 32))
        return [net(x, y[:, 4:], 1, 4), cached]
    level = torch.tensor([0.1, 0.7, 2.0])
    sizes, few = (torch.tensor([1, 4, 16]), torch.tensor([1, 4, 8])) if cfg.clean_causal else (4, 4)
    weights = torch.rand(3, 16, 2, dtype=torch.float64).to(net.embed.weight)
    soft = torch.randint(11, (3, 16, 2)), weights
    found = [net(x, y, sizes, 0, level), net(x, y, sizes), net(x, soft, sizes, 0, level)]
    found += [net(x, y[:, 8:], few, 8, level), net(None, y[:, :4], 4, 0, level)]
    cache = net.new_cache(3, 32)
    for start in (4, 8):
        found.append(net(x[:, start - 4 : start], y[:, start : start + 4], 4, start, level, cache))
    if cfg.clean_causal and not cfg.condition_clean:  # two readings of a block in one pass
        both, at = torch.tensor([[1] * 4 + [4] * 4]), torch.arange(8, 12).repeat(2)
        levels = torch.cat((torch.zeros(3, 4), level[:, None].expand(3, 4)), dim=1)
        found.append(net(x[:, 8:12], y[:, 8:], both, at, levels, cache))
    return found


def training_pass(net):
    """A function of the logits of all tokens, and its gradients."""
    x, y = torch.randint(11, (2, 3, 16))
    sizes, first = settings(net.cfg)
    logits = net(x, y[:, first:], sizes, first, torch.tensor([0.1, 0.7, 2.0]))
    return with_slopes(logits.log_softmax(-1).square().sum(), net)


def settings(cfg):
    """Block sizes of three rows in training, and the first position that is predicted."""
    if cfg.next_token:
        return 1, 1
    return torch.tensor([1, 4, 16] if cfg.clean_causal else [4, 4, 4]), 0


def with_slopes(total, net):
    """A number and its gradients; parameters that have none are left out."""
    found = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)
    return [total.detach(), *(g for g in found if g is not None)]


# ----- noise and loss


def odd_process(process):
    """What the process has that its constructor did not give it, in a few words; '' if nothing."""
    want, found = vars(type(process)(**process.arguments())), vars(process)
    own = [k for k in found if k not in want or found[k] != want[k]]
    return f"the noise process has its own {own[0]}" if own else ""


def likeness(process, V):
    """The arguments of such a process with V ids, as items."""
    small = {**process.arguments(), "vocab_size": V}
    small |= {"mask_id": V - 1} if "mask_id" in small else {}
    small |= {"ar_token": V} if small.get("ar_token") is not None else {}
    return tuple(small.items())


def prices(process):
    """
    What a process makes of random logits, with the gradients of its losses: a list of tensors. A large
    vocabulary: its small likeness.
    """
    if process.vocab_size > 1 << 12:
        process = type(process)(**dict(likeness(process, 1 << 12)))
    logits = torch.randn(3, 5, process.vocab_size, dtype=torch.float64, requires_grad=True)
    alpha, slope = torch.tensor([0.1, 0.5, 0.9]).double(), -torch.ones(3).double()
    x0 = torch.randint(max(1, process.vocab_size - 1), (3, 5))
    x0 = x0 if process.mask_id is None else x0 + (x0 >= process.mask_id)  # text, and no mask
    xt = process.corrupt(x0, alpha, rng.Noise(0, torch.arange(3), torch.arange(5)))
    found = []
    for price in (process.ce, process.last_step, lambda *args: process.nll(*args, slope)):
        each = price(logits, x0, xt, alpha)
        found += [each.detach(), *torch.autograd.grad(each.sum(), logits)]
    with torch.no_grad():
        found += [f(logits, xt, alpha).softmax(-1) for f in (process.loo_logits, process.denoiser_logits)]
        found += [process.posterior_probs(logits, xt, alpha, alpha**0.5), process.log_q(xt, x0, alpha).exp()]
    return found


@functools.cache
def loss_verdict(facts, kind, arguments):
    """'' if the fast loss of a process is the lesson's on a twin. arguments: of the process, as items."""
    net, twin = twins(facts)
    process = kind(**dict(arguments))
    want = seeded(losses, net, process, diffusion.token_loss)
    equal = lambda: near(seeded(losses, twin, processes.accelerate(process), loss.token_loss), want)
    return compared(equal, "the fast loss", "diffusion.py")


def losses(net, process, token_loss):
    """Of three losses the terms, the sum and its gradients: a list of tensors."""
    x0, given = torch.arange(48).view(3, 16) % 10, torch.arange(48).view(3, 16) % 16 < 2
    t, (sizes, start), found = torch.tensor([0.3, 0.6, 0.9]).double(), settings(net.cfg), []
    for objective in ("elbo", "ce", "last"):
        noise = rng.Noise(3, torch.arange(3), torch.arange(start, 16))
        how = {"given": given, "start": start, "noise": noise}
        total, terms = token_loss(net, process, x0, sizes, t, objective, **how)
        found += [terms, *with_slopes(total, net)]
    return found


# ----- the decision


def accelerate(net, process, agree=bool):
    """
    (network, process, notes): made fast where the fast form is the lesson, else as they are. The network
    brings `block_class` and `token_loss`, which generate and eval.py ask for. notes: a line for each part
    that runs as the lesson though it is not meant to.
    agree: several processes must take one path: bool -> bool, whether all of them may.
    """
    net, process = undo(net, process)
    notes, mode, facts = [], net.training, ()

    def settle(why, slower):
        """Does a part run fast, in all processes? If not, a note says why."""
        together = agree(not why)
        if not together:
            notes.append(f"{why or 'another process found an edit'}: running {slower}")
        return together

    plain = type(net) is lesson.Transformer  # a method's own network runs as it is written: that is no news
    if plain:
        why = edited("model.py") or edits.unusual(net)
        why = why or "dropout" * bool(net.training and net.cfg.dropout)
        why = why or "model.py was loaded twice" * (FastTransformer.__base__ is not lesson.Transformer)
        facts = tuple((name, getattr(net.cfg, name)) for name in SHAPING)
        why = why or verdict(facts)
        plain = settle(why, "model.py as written (about 1.2 to 2.5 times slower)")
        if plain:
            speed(net).train(mode)

    quick = processes.accelerate(process)
    if quick is not process:
        why = edited("diffusion.py") or odd_process(process)
        why = why or "diffusion.py was loaded twice" * (type(quick).__base__ is not type(process))
        if not why:
            want = seeded(prices, process)
            why = compared(lambda: near(seeded(prices, quick), want), "the fast loss", "diffusion.py")
        if not why and plain:
            why = loss_verdict(facts, type(process), likeness(process, 11))
        if settle(why, "diffusion.py as written, which is slower"):
            process = quick
    if not edited("diffusion.py"):
        vars(net).setdefault("token_loss", loss.token_loss)

    why = edited("generate.Block")
    why = why or "generate.py was loaded twice" * (FastBlock.__base__ is not generate.Block)
    if settle(why, "generate.Block as written, which takes more passes"):
        vars(net).setdefault("block_class", FastBlock)
    return net, process, notes
