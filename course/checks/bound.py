"""Exercise 3: the bound of masked noise. On three letters everything can be enumerated."""

import itertools
import math
import warnings

import numpy as np
import torch

import diffusion
from course import project
from course.harness import Wrong, close, compare, first, likeness, tensor
from diffusion import Masked, cosine, loglinear
from run.cli import die

TITLE, MINUTES = "the bound of masked noise", 30
SHAPES = "alpha and dalpha may be (B,): column(alpha, logits) makes them (B, 1)"
FUNCTION = "nll"
SOURCE = [diffusion.Masked.nll, diffusion.Masked.ce, diffusion.NoiseProcess.loo_logits]
HINTS = [
    "Three factors: the weight of the noise level, 1 or 0 for masked or visible, and a cross-entropy.\n"
    "The cross-entropy is over the text's tokens: take the mask out of the softmax first.",
    "logp = process.loo_logits(logits).log_softmax(-1); pick(logp, x0) is log p(x_0 | x_t).\n"
    "weight = -column(dalpha, logits) / (1 - column(alpha, logits)).\n"
    "torch.where(xt == process.mask_id, weight * -pick(logp, x0), 0.0).",
]
V, L = 3, 3  # letters and positions
PROCESS = Masked(V + 1, V)
STATES = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))  # all x_t
LOGITS = 1.5 * torch.randn(len(STATES), L, V + 1, generator=torch.Generator().manual_seed(1)).double()
LOGITS[..., V] += 3  # of the mask: to be ignored
TEXT = torch.tensor([[0, 2, 1], [1, 1, 0]])


def asked(answer, logits, x0, xt, alpha, dalpha):
    y = tensor(answer(PROCESS, logits, x0, xt, alpha, dalpha), x0.shape, "(B, L)", answer.name)
    if not y.dtype.is_floating_point:
        raise Wrong(f"{answer.name} returns {y.dtype}, nats are floating-point numbers")
    if y.isinf().any():
        raise Wrong(
            f"{answer.name} is infinite at a {'masked' if xt[first(y.isinf())] == V else 'visible'} token"
        )
    return y.double()


def states_of(x0):
    """All x_t that x0 (L,) can become, their numbers in STATES, and how many masks each has."""
    can = ((STATES == x0) | (STATES == V)).all(1)
    return STATES[can], can.nonzero()[:, 0], (STATES[can] == V).sum(1)


def bound(nll, x0, schedule):
    """E over t and x_t of the sum of nll, by Gauss-Legendre in t and by enumeration of x_t."""
    xt, which, n = states_of(x0)
    node, weight = np.polynomial.legendre.leggauss(30)
    total = 0.0
    for u, w in zip((node + 1) / 2, weight / 2, strict=True):
        alpha, dalpha = schedule(torch.tensor([u]).double())
        q = alpha ** (L - n) * (1 - alpha) ** n
        each = nll(
            PROCESS, LOGITS[which], x0.expand(len(xt), -1), xt, alpha.expand(len(xt)), dalpha.expand(len(xt))
        )
        total += w * (q * each.double().sum(1)).sum().item()
    return total


def by_order(x0):
    """-log p(x0) of filling one mask after another, for every order of the positions."""
    logp = LOGITS[..., :V].log_softmax(-1)
    found = []
    for order in itertools.permutations(range(L)):
        xt, nats = torch.full((L,), V), 0.0
        for i in order:
            which = (STATES == xt).all(1).nonzero()[0, 0]
            nats -= logp[which, i, x0[i]].item()
            xt[i] = x0[i]
        found.append(nats)
    return torch.tensor(found).double()


def check(answer):
    level = (torch.tensor([0.25, 0.5, 0.8]).double(), torch.tensor([-1.0, -0.7, -1.3]).double())
    x0 = torch.tensor([[0, 2, 1], [1, 1, 0], [2, 0, 0]])
    xt = torch.tensor([[3, 2, 3], [1, 1, 0], [3, 3, 3]])
    which = (STATES[None] == xt[:, None]).all(-1).int().argmax(1)
    logits = LOGITS[which]
    yield "a finite number for each token"
    found = asked(answer, logits, x0, xt, *level)
    yield "a visible token costs nothing"
    if found[xt != V].abs().max() > 0:
        at = first((xt != V) & (found != 0))
        raise Wrong(f"a visible token costs {found[at]:.4g} nats")
    yield f"a network that knows nothing costs log {V} = {math.log(V):.4f} nats a token, at every t"
    for schedule in (loglinear, cosine):
        for t in (0.1, 0.5, 0.9, 0.999):
            alpha, dalpha = schedule(torch.tensor([t]).double())
            same = torch.zeros(1, 2, V + 1, dtype=torch.float64)
            y = asked(answer, same, TEXT[:1, :2], torch.tensor([[V, V]]), alpha, dalpha)
            mean, want = (1 - alpha) * y[0, 0], -dalpha * math.log(V)
            name = "" if schedule is loglinear else f", alpha' = {dalpha.item():.3f}"
            compare(mean, want, lambda at: f"the mean cost at t = {t}{name}")
    yield "the bound is not below the exact -log p(x_0)"
    for x in TEXT:
        mine = bound(lambda *args: asked(answer, *args[1:]), x, loglinear)
        exact = -torch.logsumexp(-by_order(x), 0).item() + math.log(math.factorial(L))
        if mine < exact - 1e-5:
            raise Wrong(f"x_0 = {x.tolist()}: your bound is {mine:.4f} nats, below -log p(x_0) = {exact:.4f}")
    yield "the bound is the mean over all orders of filling the masks, for every schedule of noise"
    for schedule in (loglinear, cosine):
        for x in TEXT:
            mine = bound(lambda *args: asked(answer, *args[1:]), x, schedule)
            want = by_order(x).mean().item()
            if not math.isclose(mine, want, rel_tol=1e-5):
                name = schedule.__name__
                raise Wrong(
                    f"x_0 = {x.tolist()}, schedule {name}: your bound is {mine:.4f} nats, it must be {want:.4f}"
                )
    yield "alpha is a number, or one a row, or one a token"
    want = PROCESS.nll(logits, x0, xt, *level)
    what = lambda at: f"row {at[0]}, position {at[1]}"
    compare(found, want, what)
    compare(asked(answer, logits, x0, xt, level[0][:, None], level[1][:, None]), want, what)
    compare(asked(answer, logits, x0, xt, *(y[:, None].expand(3, L) for y in level)), want, what)
    compare(asked(answer, logits, x0, xt, *(y.expand(3, L) for y in level)), PROCESS.nll(
        logits, x0, xt, *(y.expand(3, L) for y in level)), what)  # fmt: skip
    compare(asked(answer, logits, x0, xt, 0.4, -1.0), PROCESS.nll(logits, x0, xt, 0.4, -1.0), what)
    if not has_gradient(answer, logits, x0, xt, level):
        answer.note(
            "no gradient goes through it (.item(), float() or torch.tensor(...)?): --run cannot train"
        )


def has_gradient(function, logits, x0, xt, level):
    """A bound without one has right numbers, but cannot train a network."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers taken out of a tensor
            y = function(PROCESS, logits.clone().requires_grad_(), x0, xt, *level)
    except Exception:  # .numpy(), for one
        return False
    return torch.is_tensor(y) and y.requires_grad


# ----- what a wrong answer may be

logp = lambda process, logits: process.loo_logits(logits).log_softmax(-1)
masked = lambda x0, xt: (xt == V).double()


def slip(weight=None, cost=None, pays=masked):
    """nll with another weight (alpha, dalpha), cost (logits, x0), or tokens that pay (x0, xt)."""
    weight = weight or (lambda a, da: -da / (1 - a))
    cost = cost or (lambda logits, x0: -diffusion.pick(logp(PROCESS, logits), x0))

    def nll(process, logits, x0, xt, alpha, dalpha):
        a, da = diffusion.column(alpha, logits), diffusion.column(dalpha, logits)
        paid, each = pays(x0, xt), cost(logits, x0)
        return torch.where(paid != 0, weight(a, da) * paid * each, 0.0)

    return nll


SLIPS = {
    "the weight is missing: -alpha' / (1 - alpha), which is 1 / t where alpha = 1 - t": slip(lambda a, da: 1 + 0 * a),
    "the slope alpha' is missing: the weight is -alpha' / (1 - alpha)": slip(lambda a, da: 1 / (1 - a)),
    "the sign is turned around: the slope alpha' is negative, -alpha' is not": slip(lambda a, da: da / (1 - a)),
    "alpha and 1 - alpha are exchanged: the share of masks is 1 - alpha": slip(lambda a, da: -da / a),
    "multiplied by 1 - alpha, where it must be divided": slip(lambda a, da: -da * (1 - a)),
    "1 - alpha is missing under the weight: -alpha' / (1 - alpha)": slip(lambda a, da: -da),
    "the weight has alpha / (1 - alpha): that is the evidence of uniform noise": slip(lambda a, da: -da * a / (1 - a)),
    "the weight is squared: 1 / t, not 1 / t^2": slip(lambda a, da: -da / (1 - a) ** 2),
    "the weight has a square root": slip(lambda a, da: -da / (1 - a).sqrt()),
    "the weight is one step late: 1 / (1 + t)": slip(lambda a, da: -da / (2 - a)),
    "log p itself, not -log p": slip(cost=lambda z, x0: diffusion.pick(logp(PROCESS, z), x0)),
    "p or 1 - p, where -log p belongs": slip(cost=lambda z, x0: 1 - diffusion.pick(logp(PROCESS, z).exp(), x0)),
    "p, where -log p belongs": slip(cost=lambda z, x0: diffusion.pick(logp(PROCESS, z).exp(), x0)),
    "bits, not nats: log is the natural one": slip(
        cost=lambda z, x0: -diffusion.pick(logp(PROCESS, z), x0) / math.log(2)
    ),
    "the mask is in the softmax: it is never the answer, process.loo_logits(logits) rules it out": slip(
        cost=lambda z, x0: -diffusion.pick(z.log_softmax(-1), x0)
    ),
    "logits are no log-probabilities: log_softmax is missing": slip(cost=lambda z, x0: -diffusion.pick(z, x0)),
    "the softmax goes along the positions: it belongs along the vocabulary, dim -1": slip(
        cost=lambda z, x0: -diffusion.pick(z[..., :V].log_softmax(1), x0)
    ),
    "visible tokens pay too: only masks do": slip(pays=lambda x0, xt: torch.ones_like(x0).double()),
    "visible tokens pay and masks do not": slip(pays=lambda x0, xt: (xt != V).double()),
    "divided by the number of tokens: each token has its own number, nobody takes a mean yet": slip(
        pays=lambda x0, xt: masked(x0, xt) / x0.size(1)
    ),
    "divided by the number of masks: 1 / t has already done that": slip(
        pays=lambda x0, xt: masked(x0, xt) / masked(x0, xt).sum(1, keepdim=True).clamp(min=1)
    ),
}  # fmt: skip


def why(answer):
    x0, xt = torch.tensor([[0, 2, 1], [1, 1, 0]]), torch.tensor([[3, 2, 3], [1, 3, 3]])
    which = (STATES[None] == xt[:, None]).all(-1).int().argmax(1)
    args = (
        PROCESS,
        LOGITS[which],
        x0,
        xt,
        torch.tensor([0.3, 0.8]).double(),
        torch.tensor([-0.9, -1.2]).double(),
    )
    mine = torch.as_tensor(answer(*args))
    said = likeness(mine, SLIPS, lambda f: f(*args))
    for factor in (2.0, 0.5):
        if not said and close(mine, factor * PROCESS.nll(*args[1:])):
            said = f"every cost is {factor:g} times what it must be"
    return said


def run(function, ckpt):
    xt, level = (
        torch.full_like(TEXT, V),
        (torch.tensor([0.5, 0.5]).double(), torch.tensor([-1.0, -1.0]).double()),
    )
    if not has_gradient(function, torch.zeros(2, L, V + 1), TEXT, xt, level):
        die("no gradient goes through your nll: nothing would be learned", "tensors throughout, no .item()")
    mine = lambda self, logits, x0, xt, alpha, dalpha: function(self, logits, x0, xt, alpha, dalpha)
    with project.replaced(diffusion.Masked, "nll", mine):
        project.train("config/sudoku.toml", "--objective=elbo")
    print(
        "\nWhat to look at: the first losses are log 5 = 1.609, five ids that are equally likely. The bound of"
    )
    print("block 16 is yours, and the number before it, of block 1, is exact.")
