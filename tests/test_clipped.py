"""
Why believe methods/clipped.py? Its rates are even in their range, one a block. A mask costs 1/p at every rate, so
two halves of the range add up to the bound. The search finds what plain loops over all ranges find.
"""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, resumed, run
from exact import V3, agree, net, noise, quadrature, states

import diffusion as d
import sample
import train as training
from eval import Ranks
from eval import main as evaluate
from methods import clipped
from methods.clipped import LEAST, RANGES, Learner, Settings, at_rate, rates
from model import ModelConfig, Transformer
from rng import Noise

MASK = V3
PROCESS = d.Masked(V3 + 1, MASK)


def learner(block_sizes, token_loss=d.token_loss, **settings):
    cfg = SimpleNamespace(block_sizes=block_sizes, eval_every=5)
    return Learner(cfg, Settings(**settings), None, PROCESS, token_loss)


# ----- rates and prices


def test_rates_are_even_and_one_for_each_block():
    sizes, positions, limits = torch.tensor([1, 2, 4, 4]), torch.arange(4, 8), {2: (0.3, 0.8), 4: (0.5, 1.0)}
    t = torch.tensor([0.7, 0.6, 0.1, 0.9], dtype=torch.float64)
    found = rates(t, sizes, positions, 8, limits)
    for row, (b, u) in enumerate(zip(sizes.tolist(), t.tolist(), strict=True)):
        low, high = limits.get(b, (1.0, 1.0))
        want = [low + (high - low) * ((u + i // b / (8 // b)) % 1) for i in range(4, 8)]
        agree(found[row], torch.tensor(want, dtype=torch.float64), 1e-15)
    n = 50  # rows with one time in each of as many slices, as in training: so has every block
    t = (torch.arange(n) + torch.rand(n, dtype=torch.float64)) / n
    p = rates(t, torch.full((n,), 2), torch.arange(8), 8, {2: (0.3, 0.8)})
    assert torch.equal(p[:, ::2], p[:, 1::2])
    for block in p[:, ::2].T:
        slices = ((block - 0.3) / 0.5 * n).floor().long().sort().values
        assert torch.equal(slices, torch.arange(n)) or (slices - torch.arange(n)).abs().max() <= 1
    assert len(p[0].unique()) == 4, "and the blocks of a row are apart"


@pytest.mark.parametrize("p", [0.2, 0.5, 0.7, 1.0])
def test_a_mask_costs_1_over_p_at_every_rate(p):
    """Above one half too, where the published code has weight 1. And p is the share of masks."""
    one = learner({2: 1.0}, low=p, high=p, search=False)
    model, x0 = net(PROCESS).double(), torch.randint(V3, (30, 8))
    seen, given = [], torch.arange(8).expand(30, 8) < 1
    ask = lambda clean, noisy, *more: seen.append((noisy, model(clean, noisy, *more))) or seen[-1][1]
    ask.timeless = True
    how = {"given": given, "charged": ~given, "start": 0, "noise": noise(30, 8)}
    u = copy.copy(how["noise"]).uniform(1)[..., 0]
    t = torch.rand(30, dtype=torch.float64)
    total, each = one.loss(1)(ask, PROCESS, x0, 2, t, {2: "elbo"}, schedule=d.cosine, **how)
    noisy, logits = seen[0]
    masked = (u <= p) & ~given
    assert torch.equal(noisy, torch.where(masked, MASK, x0)) and masked.any()
    price = PROCESS.ce(logits, x0, noisy) / p
    agree(
        [each, total],
        [torch.where(masked, price, 0.0).detach(), torch.where(masked, price, 0.0).sum()],
        1e-12,
    )


def moments(model, x0, low, high, power=1, nodes=24):
    """
    E[loss] or E[loss^2] of the mean loss of a block of two, for rows x0 (n, 2) of one block: Gauss-Legendre
    over u, more nodes at small rates, and a sum over masks. All of it is one batch.
    """
    one, n = learner({2: 1.0}, low=low, high=high, search=False), len(x0)
    s, w = (torch.from_numpy(y) for y in np.polynomial.legendre.leggauss(nodes))
    s, w = (s + 1) / 2, w / 2
    u, masks = (s**3).repeat_interleave(4), states(2, 2).bool().repeat(nodes, 1)  # (4 nodes,), (4 nodes, 2)
    p = (low + (high - low) * u)[:, None]
    q = torch.where(masks, p, 1 - p).prod(1) * (w * 3 * s**2).repeat_interleave(4)
    numbers = Ranks(torch.where(masks, p / 2, (1 + p) / 2).repeat(n, 1))
    x, times = x0.repeat_interleave(len(u), 0), u.repeat(n)
    given = torch.zeros_like(x, dtype=torch.bool)
    how = {"given": given, "charged": ~given, "start": 0, "noise": numbers}
    with torch.no_grad():
        _, each = one.loss(1)(model, PROCESS, x, 2, times, {2: "elbo"}, **how)
    return (q * (each.mean(1) ** power).view(n, -1)).sum(1)


def test_two_halves_of_the_range_add_up_to_the_bound():
    model, x0 = net(PROCESS, seq_len=2).double(), states(V3, 2)
    halves = [0.5 * moments(model, x0, *limits) for limits in ((1e-9, 0.5), (0.5, 1.0))]
    agree(2 * sum(halves), quadrature(model, PROCESS, x0, 2), 1e-6)


def knows_nothing(T=2):
    return Transformer(ModelConfig(V3 + 1, T, 1, 1, 8)).double().eval()


@pytest.mark.parametrize(
    "low, high, factor", [(0.3, 0.8, 0.962), (0.5, 1.0, 0.386), (0.001, 1.0, 5.9), (1.0, 1.0, 0.0)]
)
def test_the_variance_of_a_range_is_that_of_its_formula(low, high, factor):
    """With predictions that do not depend on p: 1/b (log(high/low) / (high - low) - 1), times the price squared."""
    formula = math.log(high / low) / (high - low) - 1 if low < high else 1 / low - 1
    assert abs(formula - factor) < 0.02
    x0, price = torch.zeros(1, 2, dtype=torch.long), math.log(V3)
    first, second = (moments(knows_nothing(), x0, low, high, power, 100).item() for power in (1, 2))
    assert abs(first - price) < 1e-6
    assert abs((second - first**2) / price**2 - formula / 2) < 1e-6


# ----- the search


def test_the_ranges_are_those_of_the_grid():
    assert len(RANGES) == len(set(RANGES)) == 36 and (LEAST, 1.0) in RANGES and (0.5, 1.0) in RANGES
    for low, high in RANGES[:-1]:
        start = 0.0 if low == LEAST else low
        assert round(high - start, 9) in (0.5, 0.6, 0.7, 0.8, 0.9) and high <= 1 and (start * 20) % 1 < 1e-9


def test_the_variance_is_that_of_the_means_of_blocks():
    """By hand: rows of other sizes, tokens without a price, and blocks without any do not count."""
    sizes, positions = torch.tensor([2, 4, 2]), torch.arange(4, 8)
    each = torch.tensor([[1.0, 2.0, 7.0, 9.0], [50.0, 0.0, 0.0, 0.0], [4.0, 100.0, 0.0, 0.0]])
    charged = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    ours = clipped.variance(each * charged, charged, sizes, positions, 2)
    means = [1.5, 8.0, 4.0]
    assert abs(ours - np.var(means, ddof=1)) < 1e-12
    assert clipped.variance(each, charged, sizes, positions, 4) == 0.0, "one block has none"
    assert clipped.variance(each, charged, sizes, positions, 8) == 0.0


def case():
    """A step of rows of three block sizes, behind a start: what train.py hands on."""
    generator = torch.Generator().manual_seed(0)
    sizes, x0 = torch.tensor([1, 2, 4, 2, 4, 4]), torch.randint(V3, (6, 12), generator=generator)
    t = torch.rand(6, generator=generator, dtype=torch.float64)
    given = torch.arange(12).expand(6, 12) < torch.tensor([4, 4, 5, 6, 9, 12])[:, None]
    numbers = Noise(0, torch.arange(6), torch.arange(4, 12))
    how = {"given": given, "charged": ~given, "start": 4, "noise": numbers}
    how |= {"schedule": d.loglinear, "device": torch.device("cpu")}
    return x0, sizes, t, how


def made_up(asked):
    """A loss that is some function of the rate and of random numbers, and notes what it was asked."""

    def token_loss(forward, process, x0, block_size, p, objective, schedule, start, noise, charged, **more):
        u = noise.uniform(1)[..., 0]
        asked.append((p, u, schedule))
        each = (u + 0.3) * torch.where(block_size[:, None] == 2, 1 / p, 0.2 + (p - 0.3) ** 2)
        each = torch.where(charged[:, start:], each, 0.0)
        return each.sum(), each

    return token_loss


def test_the_search_finds_what_plain_loops_find():
    asked, draws = [], 3
    one = learner({1: 0.2, 2: 0.4, 4: 0.4}, made_up(asked), search_draws=draws)
    x0, sizes, t, how = case()
    run = lambda step: one.loss(step)(None, PROCESS, x0, sizes, t, {2: "elbo", 4: "elbo"}, **how)
    for step in (0, 1, 4):
        run(step)
        how = case()[-1]
    assert len(asked) == 3 and one.ranges == {2: (LEAST, 1.0), 4: (LEAST, 1.0)}, "none is due"
    asked.clear()
    run(5)
    assert len(asked) == draws * len(RANGES) + 1
    assert all(schedule is at_rate for *_, schedule in asked)
    of = lambda k, i: asked[k * len(RANGES) + i]
    for k in range(draws):
        assert all(torch.equal(of(k, i)[1], of(k, 0)[1]) for i in range(len(RANGES))), "the same numbers"
    numbers = [of(k, 0)[1] for k in range(draws)] + [asked[-1][1]]
    assert all(not torch.equal(a, b) for i, a in enumerate(numbers) for b in numbers[:i]), (
        "others in each draw"
    )
    loss_of, charged, best = made_up([]), how["charged"], {}
    for b in (2, 4):
        found = []
        for i in range(len(RANGES)):
            total = 0.0
            for k in range(draws):
                p, u, _ = of(k, i)
                fixed = SimpleNamespace(uniform=lambda n, u=u: u[..., None])
                each = loss_of(None, None, x0, sizes, p, None, at_rate, 4, fixed, charged)[1]
                means = []
                for row in range(6):
                    for first in range(4, 12, b) if sizes[row] == b else ():
                        inside = [j for j in range(first, first + b) if charged[row, j]]
                        if inside:
                            means.append(sum(each[row, j - 4].item() for j in inside) / len(inside))
                total += np.var(means, ddof=1)
            found.append(total)
        best[b] = RANGES[int(np.argmin(found))]
    assert one.ranges == best and best[2] != best[4], "every size has its own"
    agree(asked[-1][0], rates(t, sizes, torch.arange(4, 12), 12, best), 1e-15)
    for k in range(draws):  # and the times of a draw are spread between those of the others
        want = rates((t + k / draws) % 1, sizes, torch.arange(4, 12), 12, dict.fromkeys((2, 4), RANGES[0]))
        agree(of(k, 0)[0], want, 1e-15)


def test_a_step_searches_once_and_never_where_it_is_switched_off():
    x0, sizes, t, _ = case()
    for search in (True, False):
        learns = []  # whether each call may have a gradient

        def token_loss(*args, learns=learns, **how):
            learns.append(torch.is_grad_enabled())
            return made_up([])(*args, **how)

        loss = learner({2: 0.5, 4: 0.5}, token_loss, search=search).loss(5)
        for _ in range(2):  # a step of two batches
            loss(None, PROCESS, x0, sizes, t, {2: "elbo", 4: "elbo"}, **case()[-1])
        assert learns == [False] * search * 4 * len(RANGES) + [True] * 2


def test_rows_of_one_size_and_several_processes(monkeypatch):
    """A size without rows keeps its range; what the other processes found is added."""
    one = learner({2: 0.5, 8: 0.5}, made_up([]))
    x0, sizes, t, how = case()
    one.loss(5)(None, PROCESS, x0, sizes, t, {2: "elbo"}, **how)
    assert one.ranges[8] == (LEAST, 1.0) and one.ranges[2] != (LEAST, 1.0)
    before = one.ranges[2]
    monkeypatch.setattr(clipped.dist, "is_initialized", lambda: True)

    def others(found):
        found[:, 1] += 1.0
        found[7, 1] -= 0.5
        found[RANGES.index(before), 0] += 1e9

    monkeypatch.setattr(clipped.dist, "all_reduce", others)
    one.loss(5)(None, PROCESS, x0, sizes, t, {2: "elbo"}, **case()[-1])
    assert one.ranges[8] == RANGES[7] and one.ranges[2] != before


def test_a_network_that_knows_nothing_is_trained_above_one_half():
    """Then the formula says which range is best: of all 36 that from 0.5 to 1."""
    one, n = learner({4: 1.0}, search_draws=2), 128
    x0, none = torch.randint(V3, (n, 16)), torch.zeros(n, 16, dtype=torch.bool)
    t = (torch.arange(n) + 0.5).double() / n
    how = {"given": none, "charged": ~none, "start": 0, "noise": noise(n, 16), "device": torch.device("cpu")}
    one.loss(5)(knows_nothing(16), PROCESS, x0, 4, t, {4: "elbo"}, **how)
    assert one.ranges == {4: (0.5, 1.0)}
    again = learner({4: 0.5, 8: 0.5})
    again.load_state_dict(copy.deepcopy(one.state_dict()) | {})
    assert again.ranges == {4: (0.5, 1.0), 8: (LEAST, 1.0)}, "a size that is new begins anew"
    learner({8: 1.0}).load_state_dict(one.state_dict())


# ----- the commands


def test_a_checkpoint_is_resumed_bit_for_bit_sampled_and_evaluated(project, capsys, slip):
    flags = [*TINY, "--method=clipped", "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--n_samples=0"]
    flags += ["--lr_schedule=constant", "--n_eval=2", "--search_draws=1", "--low=0.2", "--eval_every=2"]
    whole, parts = resumed(training.main, *flags)
    ranges = whole["method"]["state"]["ranges"]
    assert ranges == parts["method"]["state"]["ranges"] and tuple(ranges[4]) in RANGES
    lines = [json.loads(line) for line in open("whole/log.jsonl", encoding="utf-8")]
    kept = [(r["low_4"], r["high_4"]) for r in lines if "low_4" in r]
    assert kept == [(0.2, 1.0)] * 2 + [tuple(ranges[4])] * 2
    run(sample.main, "--ckpt=parts", "--device=cpu", "--steps=2", "--n_samples=3")
    run(evaluate, "--ckpt=parts", "--device=cpu", "--n_eval=4", "--n_mc=2")
    out = capsys.readouterr().out
    assert "NFE" in out and "masked (clipped), EMA weights of step 4" in out
    more = ["--max_steps=6", "--out_dir=parts", "--resume", "--low=0.3"]
    assert "trained with low 0.2" in slip(training.main, argv=[*flags, *more])


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--process=uniform"], "mask rates"),
        (["--objective=ce"], "no weights"),
        (["--schedule=cosine"], "no say"),
        (["--block_sizes=1:1"], "nothing to clip"),
        (["--low=0"], "mask rates from 0"),
        (["--low=0.9", "--high=0.8"], "mask rates from 0.9"),
        (["--high=1.5"], "to 1.5"),
        (["--search_draws=0"], "search_draws"),
    ],
)
def test_what_it_cannot_serve_is_refused(slip, project, flags, says):
    assert says in slip(training.main, argv=[*TINY, "--dataset=pairs", "--method=clipped", *flags])
