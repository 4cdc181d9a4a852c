"""
Why believe methods/masks.py? Complementary masks part the tokens, integrate to the entropy on an exact network
and vary less, as enumerated. Position masks have the law of sampling without replacement, and are no bound.
Growth changes block sizes and nothing else.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import TINY, resumed, run, slow
from exact import P_VALUE, V3, Bayes, agree, chi_squared, entropy, net, states

import diffusion as d
import eval as evaluation
import fast
import sample
import train as training
from methods import masks
from rng import Noise

MASK = V3
PROCESS = d.Masked(V3 + 1, MASK)


def learner(token_loss=d.token_loss, **settings):
    cfg = type("Cfg", (), {"max_steps": 100})
    return masks.Learner(cfg, masks.Settings(**settings), None, PROCESS, token_loss)


def noise_of(n, L, seed=3):
    return Noise(seed, torch.arange(n), torch.arange(L))


def shown(n, L, *given):
    """given and charged, of which `given` are shown."""
    shown = torch.zeros(n, L) > 0
    shown[:, list(given)] = True
    return {"given": shown, "charged": ~shown, "start": 0, "schedule": d.loglinear}


class Spy:
    """A network that keeps what it is given."""

    timeless = True

    def __init__(self):
        self.seen = []

    def __call__(self, clean, noisy, block_size, start, sigma):
        self.seen.append((noisy, block_size, sigma))
        return torch.zeros(*noisy.shape, V3 + 1, dtype=torch.float64)


def toy(L):
    """A random law over states(V3, L), and the exact network."""
    x = states(V3, L)
    p = torch.rand(len(x), generator=torch.Generator().manual_seed(4), dtype=torch.float64) ** 2
    p = p / p.sum()
    return x, p, Bayes(PROCESS, x, p, timeless=True)


# ----- complementary masks


def test_two_views_hide_every_token_once():
    n, L = 200, 8
    x0, spy = torch.randint(V3, (n, L)), Spy()
    sizes = torch.tensor([1, 2, 4, 8]).repeat(n // 4)
    t = torch.rand(n).double()
    learner().loss(0)(spy, PROCESS, x0, sizes, t, "elbo", noise=noise_of(n, L), **shown(n, L, 0, 5))
    (one, *_), (two, *_) = spy.seen
    given = torch.zeros(L) > 0
    given[[0, 5]] = True
    for view in (one, two):
        assert torch.equal(view[:, given], x0[:, given]), "a prompt is shown in both"
        assert (view[sizes == 1][:, ~given] == MASK).all(), "block size 1 reads masks alone"
    a, b = ((view[sizes > 1][:, ~given] == MASK) for view in (one, two))
    assert torch.equal(a, ~b)
    usual = PROCESS.corrupt(x0, 1 - t, noise_of(n, L))
    assert torch.equal(one[sizes > 1][:, ~given], usual[sizes > 1][:, ~given]), "the first is the usual one"
    share, want = a.double().mean(1), t[sizes > 1]
    assert ((share - want).mean().abs() < 0.05) and ((share - want).square().mean() < 0.05)


@pytest.mark.parametrize("L, b", slow([(3, 3), (4, 2)], [(3, 3)]))
@pytest.mark.parametrize("schedule", d.SCHEDULES)
def test_two_views_integrate_to_the_entropy(L, b, schedule):
    """Every mask of every text, by Gauss-Legendre over alpha: the integrand is a polynomial in it."""
    x, p, exact = toy(L)
    hides = torch.tensor(list(itertools.product((0, 1), repeat=L)))  # what the first view hides
    x0, hide = x.repeat_interleave(len(hides), 0), hides.repeat(len(x), 1).double()
    p, total, views = p.repeat_interleave(len(hides)), 0.0, torch.zeros(2, dtype=torch.float64)
    node, weight = np.polynomial.legendre.leggauss(4)
    for a, w in zip((node + 1) / 2, weight / 2, strict=True):
        t = 1 - a if schedule == "loglinear" else 1 - 2 / math.pi * math.acos(1 - a)
        t = torch.full((len(x0),), t, dtype=torch.float64)
        slope = d.SCHEDULES[schedule](t)[1]
        u = torch.where(hide == 1, (1 - a) / 2, 1 - a / 2)
        how = {**shown(len(x0), L), "noise": evaluation.Ranks(u), "schedule": d.SCHEDULES[schedule]}
        loss, each = learner().loss(0)(exact, PROCESS, x0, b, t, "elbo", **how)
        chance = p * (hide * (1 - a) + (1 - hide) * a).prod(1) * w / -slope  # d alpha = alpha' dt
        agree(loss, each.sum())
        total += (chance * each.sum(1)).sum()
        other = functools.partial(masks.complement, PROCESS, d.SCHEDULES[schedule])
        for i, corrupt in enumerate((None, other)):
            each = d.token_loss(exact, PROCESS, x0, b, t, "elbo", corrupt=corrupt, **how)[1]
            views[i] += (chance * each.sum(1)).sum()
    law = x, toy(L)[1]
    agree(total, torch.tensor(entropy(law[1]), dtype=torch.float64))
    agree(views, torch.full((2,), entropy(law[1]), dtype=torch.float64))


def test_complementary_masks_vary_less_as_enumerated():
    """Cross-entropy of one text at masks, mean of two views: 0.15 with complementary masks, 1.41 with others."""
    L = 4
    x, p, exact = toy(L)
    text = x[int(p.argmax())]

    def ce(hide):
        """-log p of the tokens that are hidden, given the others, one by one: by counting."""
        cost = 0.0
        for i in hide:
            fits = torch.stack([x[:, j] == text[j] for j in range(L) if j not in hide] + [x[:, 0] >= 0]).all(
                0
            )
            cost -= (p[fits & (x[:, i] == text[i])].sum() / p[fits].sum()).log().item()
        return cost

    hides = [h for k in range(L + 1) for h in itertools.combinations(range(L), k)]
    # t uniform: a set of k masks has probability k! (L - k)! / (L + 1)!
    chance = [math.factorial(len(h)) * math.factorial(L - len(h)) / math.factorial(L + 1) for h in hides]
    rest = lambda h: tuple(i for i in range(L) if i not in h)
    moments = lambda f: [sum(c * f(h) ** k for c, h in zip(chance, hides, strict=True)) for k in (1, 2)]
    variance = lambda m: m[1] - m[0] ** 2
    both, one = moments(lambda h: (ce(h) + ce(rest(h))) / 2), moments(ce)
    assert abs(both[0] - one[0]) < 1e-12, "the mean stays"
    assert abs(variance(both) - 0.148) < 0.001 and abs(variance(one) / 2 - 1.410) < 0.001
    # and so the loss: of n rows with this text
    n = 4000
    t = ((torch.arange(n) + 0.5) / n).double()
    x0, how = text.expand(n, L), shown(n, L)
    each = learner().loss(0)(exact, PROCESS, x0, L, t, "ce", noise=noise_of(n, L), **how)[1].sum(1)
    assert abs(each.mean() - both[0]) < 4 * math.sqrt(variance(both) / n)
    assert abs(each.var() / variance(both) - 1) < 0.2


# ----- position masks


def rates(t, b, late, n=4000, given=(), L=None):
    """Which tokens are hidden, (n, L) bool. t: a time, or several, of the rows in turn."""
    L, spy = L or b, Spy()
    x0, t = torch.randint(V3, (n, L)), torch.tensor(t, dtype=torch.float64).view(-1)
    t = t.repeat(n // len(t))
    loss = learner(masks="position", late=late).loss(0)
    loss(spy, PROCESS, x0, b, t, "ce", noise=noise_of(n, L), **shown(n, L, *given))
    ((noisy, *_),) = spy.seen
    assert torch.equal(noisy[noisy != MASK], x0[noisy != MASK])
    return noisy == MASK


def test_late_positions_are_hidden_more_often():
    """b 16, lambda .1: at t = .5 the rates rise from .11 to .95, at .9 from .79 to .94."""
    for t, first, last, n_hidden in ((0.5, 0.11, 0.95, 8), (0.9, 0.79, 0.94, 14)):
        hide = rates(t, 16, 0.1)
        assert (hide.sum(1) == n_hidden).all()
        share = hide.double().mean(0)
        assert abs(share[0] - first) < 0.025 and abs(share[-1] - last) < 0.02, share
    for hide in (rates(0.5, 16, 1e6), rates(0.999, 16, 0.1)):  # without a preference, and at the end
        assert (hide.double().mean(0) - hide.double().mean()).abs().max() < 0.04
    mixed = rates((0.5, 0.9), 16, 0.1)  # a row goes by its own time
    for hide, first, last in ((mixed[::2], 0.11, 0.95), (mixed[1::2], 0.79, 0.94)):
        share = hide.double().mean(0)
        assert abs(share[0] - first) < 0.035 and abs(share[-1] - last) < 0.03, share
    share = rates(0.5, 16, 0.1, L=32).double().mean(0)  # and by the length of its blocks, not by its own
    for at in (0, 16):
        assert abs(share[at] - 0.11) < 0.025 and abs(share[at + 15] - 0.95) < 0.02, share
    two = rates(0.5, 8, 0.1, L=16)  # every block begins anew
    assert (two.double().mean(0)[:8] - two.double().mean(0)[8:]).abs().max() < 0.05
    assert not torch.equal(two[:, :8], two[:, 8:])


@pytest.mark.parametrize(
    "t, b, given, k", [(0.4, 3, (), 1), (0.6, 3, (), 2), (0.5, 4, (1,), 2), (0.1, 4, (), 0)]
)
def test_the_hidden_ones_are_drawn_one_after_the_other_without_replacement(t, b, given, k):
    n, late = 4000, 1.0
    hide = rates(t, b, late, n, given)
    assert (hide.sum(1) == k).all()
    weight = [0.0 if i in given else 2.0 ** ((1 - t) * (i + 1) / (late * b)) for i in range(b)]
    want = {}
    for order in itertools.permutations([i for i in range(b) if i not in given], k):
        left, p = sum(weight), 1.0
        for i in order:
            p, left = p * weight[i] / left, left - weight[i]
        want[frozenset(order)] = want.get(frozenset(order), 0.0) + p
    found = [frozenset(row.nonzero()[:, 0].tolist()) for row in hide]
    counts = torch.tensor([found.count(s) for s in want])
    assert counts.sum() == n
    if k:
        assert chi_squared(counts, torch.tensor(list(want.values())).double()) > P_VALUE


@pytest.mark.parametrize("schedule", d.SCHEDULES)
def test_rows_of_several_block_sizes(schedule):
    n, spy = 400, Spy()
    sizes = torch.tensor([1, 2, 4, 8]).repeat(n // 4)
    t = torch.rand(n).double()
    how, hidden_share = shown(n, 8, 0) | {"schedule": d.SCHEDULES[schedule]}, 1 - d.SCHEDULES[schedule](t)[0]
    x0 = torch.randint(V3, (n, 8))
    learner(masks="position").loss(0)(spy, PROCESS, x0, sizes, t, "ce", noise=noise_of(n, 8), **how)
    hide = spy.seen[0][0] == MASK
    assert not hide[:, 0].any() and hide[sizes == 1, 1:].all()
    for b in (2, 4, 8):
        rows = hide[sizes == b].unflatten(1, (-1, b)).sum(-1)  # (rows, blocks)
        open = torch.full((8 // b,), float(b)).double()
        open[0] -= 1
        assert torch.equal(rows.double(), (hidden_share[sizes == b, None] * open).round())


def test_position_masks_know_where_the_noisy_stream_begins():
    """All rows begin with a prompt of more than a block, so the noisy stream begins at 4."""
    n, spy = 400, Spy()
    t, how = torch.rand(n).double(), shown(n, 8, *range(5)) | {"start": 4}
    noise = Noise(3, torch.arange(n), torch.arange(4, 8))
    learner(masks="position").loss(0)(spy, PROCESS, torch.randint(V3, (n, 8)), 4, t, "ce", noise=noise, **how)
    hide = spy.seen[0][0] == MASK
    assert not hide[:, 0].any() and torch.equal(hide.sum(1).double(), (3 * t).round())


@pytest.mark.parametrize("schedule", d.SCHEDULES)
def test_position_masks_are_no_bound(schedule):
    """
    Even without a preference: of three independent fair letters it counts 2.67 ln 3, for k = round(3 t) is
    rounded. sum_k k ln(end_k / begin_k) = ln 3 + 2 ln(5/3) + 3 ln(6/5)
    """
    n = 3000
    x = states(V3, 3)
    exact = Bayes(PROCESS, x, torch.full((27,), 1 / 27), timeless=True)
    t = ((torch.arange(n) + 0.5) / n).double()
    x0, loss = x[torch.arange(n) % 27], learner(masks="position", late=1e6).loss(0)
    how = shown(n, 3) | {"schedule": d.SCHEDULES[schedule]}
    total = loss(exact, PROCESS, x0, 3, t, "elbo", noise=noise_of(n, 3), **how)[0] / n
    want = (math.log(3) + 2 * math.log(5 / 3) + 3 * math.log(6 / 5)) * math.log(3)
    assert abs(total - want) < 0.01 < 3 * math.log(3) - want


# ----- growth, and what stays


def test_blocks_grow_and_the_objective_goes_with_them():
    grow = learner(masks="plain", growth="2,4,8", stage_steps=10)
    sizes, x0, t = torch.tensor([1, 4, 8, 8]), torch.randint(V3, (4, 8)), torch.full((4,), 0.7).double()
    for step, want in [
        (0, [1, 2, 2, 2]),
        (9, [1, 2, 2, 2]),
        (10, [1, 4, 4, 4]),
        (25, [1, 4, 8, 8]),
        (99, [1, 4, 8, 8]),
    ]:
        spy = Spy()
        objective = {4: "elbo", 8: "ce"}
        how = {"noise": noise_of(4, 8), **shown(4, 8)}
        _, each = grow.loss(step)(spy, PROCESS, x0, sizes, t, objective, **how)
        assert spy.seen[0][1].tolist() == want and len(spy.seen) == 1
        names = {2: "ce", 4: "ce", 8: "ce"} if step < 20 else objective
        assert torch.equal(each, d.token_loss(Spy(), PROCESS, x0, torch.tensor(want), t, names, **how)[1])
        spy = Spy()
        grow.loss(step)(spy, PROCESS, x0, 8, t, {8: "ce"}, **how)  # all rows of one size
        assert spy.seen[0][1].tolist() == [want[-1]] * 4


def test_position_masks_grow_too():
    grow, n = learner(masks="position", growth="2,4,8", stage_steps=10), 100
    t, x0 = torch.rand(n).double(), torch.randint(V3, (n, 8))
    for step, b in ((0, 2), (10, 4), (20, 8)):
        spy = Spy()
        grow.loss(step)(spy, PROCESS, x0, 8, t, {8: "ce"}, noise=noise_of(n, 8), **shown(n, 8))
        ((noisy, sizes, _),) = spy.seen
        hidden = (noisy == MASK).unflatten(1, (-1, b)).sum(-1)
        assert sizes.tolist() == [b] * n
        assert torch.equal(hidden.double(), (b * t).round()[:, None].expand(hidden.shape))


@pytest.mark.parametrize("path", ["fast", "lesson"])
def test_without_a_recipe_it_is_the_usual_loss_and_block_size_1_always_is(path):
    model, process = net(PROCESS).double(), PROCESS
    usual = d.token_loss
    if path == "fast":
        model, process, _ = fast.accelerate(model, process)
        usual = fast.token_loss
    x0 = torch.randint(V3, (4, 8), generator=torch.Generator().manual_seed(1))
    sizes, t = torch.tensor([1, 2, 4, 8]), torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    how = shown(4, 8, 0)
    args = model, process, x0, sizes, t, "ce"
    total, each = usual(*args, noise=noise_of(4, 8), **how)
    for kind in ("plain", "complementary", "position"):
        own = learner(usual, masks=kind).loss(0)(*args, noise=noise_of(4, 8), **how)
        agree(own[1][0].double(), each[0].double())
        agree(own[0].detach().double(), own[1].sum().double())
        if kind == "plain":
            assert torch.equal(own[0], total) and torch.equal(own[1], each)
        if kind == "complementary":
            other = functools.partial(masks.complement, process, d.loglinear)
            second = usual(*args, noise=noise_of(4, 8), corrupt=other, **how)[0]
            agree(own[0].detach().double(), ((total + second) / 2).detach().double())


def test_a_timed_network_is_told_the_level_of_each_view():
    spy, x0 = Spy(), torch.randint(V3, (2, 4))
    spy.timeless = False
    t = torch.tensor([0.25, 0.9], dtype=torch.float64)
    loss = learner().loss(0)
    loss(spy, PROCESS, x0, 4, t, "elbo", noise=noise_of(2, 4), **shown(2, 4))
    agree(spy.seen[0][2], d.sigma(1 - t))
    agree(spy.seen[1][2], d.sigma(t))


# ----- the commands


FLAGS = [*TINY, "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--method=masks", "--n_layers=1"]
FLAGS += ["--lr_schedule=constant", "--eval_every=2", "--n_samples=0", "--n_eval=2"]


@pytest.mark.parametrize(
    "own", [[], pytest.param(["--masks=position", "--growth=2,4", "--stage_steps=3"], marks=pytest.mark.slow)]
)
def test_a_checkpoint_is_resumed_bit_for_bit_sampled_and_evaluated(project, capsys, own):
    one, two = resumed(training.main, *FLAGS, *own)
    capsys.readouterr()
    run(sample.main, "--ckpt=parts", "--device=cpu", "--sampler=threshold")
    assert "NFE" in capsys.readouterr().out
    run(evaluation.main, "--ckpt=parts", "--device=cpu", "--n_eval=8", "--n_mc=2")
    assert "masked (masks)" in capsys.readouterr().out


def test_what_it_cannot_serve_is_refused(slip, project):
    for flags, word in (
        (["--masks=half"], "complementary"),
        (["--late=0"], "late"),
        (["--late=nan"], "late"),
        (["--process=uniform"], "masks"),
        (["--next_token", "--block_sizes=1:1"], "masks"),
        (["--block_sizes=1:1"], "block size 1"),
        (["--growth=4,2"], "growth"),
        (["--growth=1,2"], "growth"),
        (["--growth=2,x"], "growth"),
        (["--growth=3"], "growth"),
        (["--growth=2,4", "--block_sizes=4:1", "--clean_causal=false"], "growth"),
        (["--growth=2,4", "--stage_steps=0"], "stage_steps"),
    ):
        assert word in slip(training.main, argv=[*FLAGS, *flags])
    assert masks.stages("") == [] and masks.stages("2, 4") == [2, 4] and masks.stages("2,2") is None
    run(training.main, *FLAGS, "--growth=2,4", "--block_sizes=4:0.5,6:0.5", "--max_steps=1")  # both are of 2
    assert masks.Settings() == masks.Settings("complementary", 0.1, "", 300), "lambda as published"
