"""
Why believe methods/esolm.py? With a perfect network both parts of its loss add up to the entropy, at every
alpha0. The logits of training are those of a causal pass over the reordered row, with a cache or without. The
sampler has the distribution that enumeration gives. With alpha0 = 0 it is the AR mode.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import TINY, resumed, run
from exact import GENERATE, agree, code, draws, entropy, enumerated_ar, last, net, states

import diffusion as d
import eval as evaluation
import sample
import train as training
from methods import esolm
from methods.esolm import EsoLM, EsoMasked, order_mask, order_of
from rng import Noise
from run.restore import rebuild

V, L = 2, 3  # letters and length of the enumerable row; the mask is id 2
ALPHA0 = [0.0, 0.25, 0.7, 1.0]


def network(alpha0=0.5, seed=0, seq_len=L, letters=V):
    """A random EsoLM in float64, and its process."""
    process = EsoMasked(letters + 1, letters, alpha0)
    plain = net(process, seed=seed, seq_len=seq_len).double()
    plain.head.weight.data *= 0.6
    model = EsoLM(plain.cfg).double().eval()
    model.load_state_dict(plain.state_dict())
    return model, process


def stream(model, ids, position):
    """Logits (B, S, V) of ids (B, S) at `position` (S,), each reading what comes before it and itself."""
    S = ids.size(1)
    x, rope = model.embed(ids), d_rope(model, position)
    for layer in model.layers:
        x = layer(x, rope, torch.ones(S, S).tril().bool()[None, None])
    return model.to_logits(x)


def d_rope(model, position):
    half = model.cfg.d_model // model.cfg.n_heads // 2
    angle = position[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return angle.cos(), angle.sin()


# ----- the order, and who reads whom


def test_the_order_is_prompts_then_known_then_masks():
    u = torch.tensor([[0.9, 0.5, 0.8, 0.3, 0.7, 0.2]]).double()
    masked = torch.tensor([[0, 1, 0, 1, 0, 1]]).bool()
    given = torch.tensor([[1, 0, 0, 0, 0, 0]]).bool()
    rank = lambda in_turn: order_of(masked, given, u, torch.tensor([[in_turn]])).tolist()
    assert rank(False) == [[0, 5, 2, 4, 1, 3]], "masks at random: 5 (0.2), 3 (0.3), 1 (0.5)"
    assert rank(True) == [[0, 3, 2, 4, 1, 5]], "masks as they stand"


def test_the_mask_of_training_is_its_rule():
    T = 4
    rank = torch.stack([torch.randperm(T, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    sizes = torch.tensor([1, 4, 1, 4, 1, 4])
    found = order_mask(rank, sizes)
    for row, (r, b) in enumerate(zip(rank.tolist(), sizes.tolist(), strict=True)):
        for i, j in itertools.product(range(T), repeat=2):
            assert found[row, i, j] == (r[j] <= r[i]), "clean reads clean, one way"
            assert not found[row, i, T + j], "clean reads no noise"
            assert found[row, T + i, j] == (b == 1 and r[j] < r[i]), (
                "a sequential mask reads what came before"
            )
            assert found[row, T + i, T + j] == (i == j if b == 1 else r[j] <= r[i])


def training_inputs(T=6, letters=3):
    """x0, xt (4, T), sizes and rank: two rows of diffusion, two sequential ones."""
    g = torch.Generator().manual_seed(3)
    x0 = torch.randint(letters, (4, T), generator=g)
    masked = torch.rand(4, T, generator=g) < 0.6
    u = torch.rand(4, T, generator=g, dtype=torch.float64)
    sizes = torch.tensor([T, T, 1, 1])
    rank = order_of(masked, torch.zeros_like(masked), u, (sizes == 1)[:, None])
    return x0, torch.where(masked, letters, x0), sizes, rank


def test_training_is_a_causal_pass_over_the_reordered_row():
    """Known tokens, then masks; in a sequential row what the masks before became, then the mask itself."""
    model, process = network(seq_len=6, letters=3)
    x0, xt, sizes, rank = training_inputs()
    logits = model(x0, xt, sizes, rank=rank)
    for row in range(4):
        order = rank[row].argsort()
        n = int((xt[row] != 3).sum())  # known
        if sizes[row] > 1:
            agree(logits[row, order], stream(model, xt[row, order][None], order)[0])
        for r in range(n, 6) if sizes[row] == 1 else ():
            ids = torch.cat((x0[row, order[:r]], torch.tensor([3])))[None]
            agree(logits[row, order[r]], stream(model, ids, order[: r + 1])[0, -1])


def test_passes_behind_a_cache_are_that_pass_too():
    """Rows of different lengths together: the padding of one is not read by another."""
    model, process = network(seq_len=6, letters=3)
    x0, xt, sizes, rank = training_inputs()
    logits = model(x0, xt, sizes, rank=rank)
    order, known = rank.argsort(1), (xt != 3).sum(1)
    assert len(known.unique()) > 1
    for split in range(3):  # so many known tokens in a pass before
        cache, real, at, masks = model.new_cache(4, 12), torch.zeros(4, 0).bool(), [], []
        for first, end in ((0 * known, known.clamp(max=split)), (known.clamp(max=split), known)):
            n = int((end - first).max())
            places = (first[:, None] + torch.arange(n)).clamp(max=5)
            at.append(order.gather(1, places))
            masks.append(torch.arange(n) < (end - first)[:, None])
        last_at = order.gather(1, (known[:, None] + torch.arange(2)).clamp(max=5))
        none = torch.zeros(4, 0).long()
        real = torch.cat((real, masks[0]), dim=1)
        model(x0.gather(1, at[0]), none, 6, cache=cache, at=at[0], real=real)
        assert cache.length == at[0].size(1)
        real = torch.cat((real, masks[1], torch.ones(4, 2).bool()), dim=1)
        where = torch.cat((at[1], last_at), dim=1)
        found = model(x0.gather(1, at[1]), torch.full((4, 2), 3), 6, cache=cache, at=where, real=real)
        assert cache.length == at[0].size(1) + at[1].size(1), "masks are not kept"
        for row in range(4):
            want = logits[row, last_at[row]]
            n = 2 if sizes[row] > 1 else 1  # the second mask of a sequential row reads the first token
            agree(found[row, :n], want[:n])


def test_as_any_network_is_called_known_tokens_come_first():
    model, process = network(seq_len=8, letters=3)
    x0 = torch.randint(3, (3, 8), generator=torch.Generator().manual_seed(1))
    xt = torch.where(torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) < 0.5, 3, x0)
    masked, none = xt == 3, torch.zeros(3, 8).bool()
    as_they_stand = torch.arange(8).double().expand(3, 8) / 8
    rank = order_of(masked, none, as_they_stand, torch.zeros(3, 1).bool())
    agree(model(None, xt, 8), model(x0, xt, torch.full((3,), 8), rank=rank))
    # behind other text, with a cache or without; and block size 1 is that of the lesson
    cache = model.new_cache(3, 16)
    want = model(x0[:, :4], xt[:, 4:], 4, 4)
    model(x0[:, :2], xt[:, 2:4], 2, 2, cache=cache)
    agree(model(x0[:, 2:4], xt[:, 4:], 4, 4, cache=cache), want)
    assert want[:, 0].ne(model(x0[:, :4] * 0, xt[:, 4:], 4, 4)[:, 0]).any(), "it reads the text"
    lesson = net(process, seq_len=8).double()
    lesson.load_state_dict(model.state_dict())
    pure = torch.full_like(x0, 3)
    agree(model(x0, pure, 1), lesson(x0, pure, 1))
    with pytest.raises(ValueError, match="beyond seq_len"):
        model(x0, xt[:, :1], 1, 8)


# ----- the loss


class Perfect:
    """The perfect network of a law p over rows x: it sees what Eso-LM's rule shows it, rank and all."""

    timeless = True

    def __init__(self, p, blind=False):
        self.x, self.log_p, self.blind = states(V, L), p.log(), blind

    def __call__(self, x0, xt, b, rank):
        sees = (xt != V)[:, None] & (rank[:, None] < rank[..., None])  # (B, i, j): visible, and before it
        sees = torch.where((b == 1)[:, None, None], rank[:, None] < rank[..., None], sees)
        if self.blind:  # to what stands right of a mask, in the sequential phase
            sees = sees & ((b > 1)[:, None, None] | torch.ones(L, L).tril(-1).bool())
        differs = (x0[:, None] != self.x[None]).double()  # (B, K, j)
        log_w = self.log_p[:, None] - 1e9 * torch.einsum("bij,bkj->bki", sees.double(), differs)
        is_v = torch.nn.functional.one_hot(self.x, V + 1).bool()
        return torch.where(is_v, log_w[..., None], -math.inf).logsumexp(1).clamp(min=-1e8)


class Told:
    """A Noise that gives the numbers it is told, (B, L) each, one after another."""

    def __init__(self, *numbers):
        self.numbers, self.key = list(numbers), numbers[0]

    def uniform(self, n):
        return self.numbers.pop(0)[..., None]

    def to(self, device):
        return self


def chance(patterns, alpha):
    """Of mask patterns (M, L) bool."""
    return (patterns.double() * (1 - alpha) + (~patterns).double() * alpha).prod(-1)


def numbers(patterns, alpha):
    """What makes Masked.corrupt mask exactly these: so near to its limit that another alpha is noticed."""
    return 1 - alpha + torch.where(patterns, -1e-7, 1e-7).double()


def expected_bound(p, alpha0, given=(), blind=False):
    """E of methods.esolm.bound over all rows, all masks of both phases, all t (Gauss-Legendre), in nats."""
    process, total = EsoMasked(V + 1, V, alpha0), 0.0
    x, masks = states(V, L), states(2, L).bool()
    k, m, n = (i.flatten() for i in torch.meshgrid(*map(torch.arange, (8, 8, 8)), indexing="ij"))
    g = torch.Generator().manual_seed(0)
    for node, weight in zip(*np.polynomial.legendre.leggauss(4), strict=True):
        t, u = (node + 1) / 2, torch.rand(2, 512, L, generator=g).double()
        alpha = alpha0 * (1 - t)
        shown = torch.zeros(512, L).bool()
        shown[:, list(given)] = True
        told = [numbers(masks[m], alpha), u[0]] * (alpha0 > 0) + [numbers(masks[n], alpha0), u[1]] * (
            alpha0 < 1
        )
        how = {"given": shown, "charged": ~shown, "noise": Told(*told)}
        time = torch.full((512,), t, dtype=torch.float64)
        _, per_token = esolm.bound(Perfect(p, blind), process, x[k], L, time, "elbo", **how)
        q = p[k] * chance(masks[m], alpha) * chance(masks[n], alpha0)
        total += weight / 2 * (q * per_token.sum(1)).sum().item()
    return total


def law(seed=0):
    p = torch.rand(V**L, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3 + 0.01
    return p / p.sum()


@pytest.mark.parametrize("alpha0", ALPHA0)
def test_with_a_perfect_network_the_bound_is_the_entropy(alpha0):
    p = law()
    assert abs(expected_bound(p, alpha0) - entropy(p)) < 1e-9
    first = p.view(V, -1).sum(1)  # of the first token, given: it costs nothing
    assert abs(expected_bound(p, alpha0, given=[0]) - (entropy(p) - entropy(first))) < 1e-9
    blind = expected_bound(p, alpha0, blind=True) - entropy(p)
    if 0 < alpha0 < 1:
        assert blind > 0.01, "without what stands to its right the sequential phase costs more"
    else:
        assert abs(blind) < 1e-9, "nothing stands there"


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("alpha0", ALPHA0)
def test_the_loss_of_training_has_the_mean_of_the_bound(alpha0, share):
    """The rows t < share are sequential, the others diffusion: over all t it is the entropy again."""
    p, process, total = law(1), EsoMasked(V + 1, V, alpha0), 0.0
    x, masks = states(V, L), states(2, L).bool()
    k, m = (i.flatten() for i in torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
    u, none = (
        torch.rand(64, L, generator=torch.Generator().manual_seed(0)).double(),
        torch.zeros(64, L).bool(),
    )
    begin = {0.0: 1.0, 1.0: 0.0}.get(
        alpha0, share
    )  # one phase has all rows where the other has nothing to do
    pieces = [(begin / 3, begin, alpha0)] if begin else []
    for node, weight in zip(*np.polynomial.legendre.leggauss(4), strict=True):
        t = (node + 1) / 2
        pieces += [(begin + (1 - begin) * t, (1 - begin) * weight / 2, alpha0 * (1 - t))] if begin < 1 else []
    for t, weight, alpha in pieces:
        how = {"given": none, "charged": ~none, "noise": Told(numbers(masks[m], alpha), u)}
        time = torch.full((64,), t, dtype=torch.float64)
        sizes = torch.full((64,), L)
        summed, per_token = esolm.eso_loss(
            Perfect(p), process, x[k], sizes, time, {L: "elbo"}, **how, share=share
        )
        assert abs(summed - per_token.sum()) < 1e-6
        total += weight * (p[k] * chance(masks[m], alpha) * per_token.sum(1)).sum().item()
    assert abs(total - entropy(p)) < 1e-9


X0 = torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(1))
T4 = torch.tensor([0.2, 0.4, 0.6, 0.9], dtype=torch.float64)


def asked(model, process, t=T4, objective="elbo", block_size=6, given=None, charged=None, **how):
    """Nats per token (4, 6) of the rows X0."""
    given = torch.zeros(4, 6) > 0 if given is None else given
    how |= {"given": given, "charged": ~given if charged is None else charged}
    noise = Noise(0, torch.arange(4), torch.arange(6))
    return esolm.bound(model, process, X0, block_size, t, objective, noise=noise, **how)[1]


def test_the_loss_follows_schedule_objective_and_what_is_charged():
    """With alpha0 = 1, where it is the loss of masked diffusion; and who is not charged pays nothing."""
    model, process = network(1.0, seq_len=6, letters=3)
    alpha, slope = d.cosine(T4)
    want = asked(model, process, 1 - alpha)
    agree(asked(model, process, schedule=d.cosine), -slope[:, None] * want)
    agree(asked(model, process, objective="ce"), T4[:, None] * asked(model, process))
    model, process = network(0.5, seq_len=6, letters=3)
    charged = (torch.arange(6) < 4).expand(4, 6)
    part, whole = asked(model, process, charged=charged), asked(model, process)
    assert (whole[:, 4:] > 0).any() and torch.equal(part, whole * charged)


def test_prompts_come_first_in_training_too():
    model, process = network(0.5, seq_len=6, letters=3)
    given, seen = torch.zeros(4, 6) > 0, []
    given[:, 3:5] = True
    asked(lambda *args, rank: seen.append(rank) or model(*args, rank=rank), process, given=given)
    assert len(seen) == 2 and all((rank[given] < 2).all() for rank in seen), "in both phases"


def test_a_step_of_training_pays_for_one_phase_a_row():
    model, process = network(0.5, seq_len=6, letters=3)
    cfg = type("Cfg", (), {"seq_len": 6, "block_sizes": {6: 1.0}})
    learner = esolm.Learner(cfg, esolm.Settings(sequential_share=0.3), model, process, None)
    given = torch.zeros(4, 6) > 0

    def paid(loss, **how):
        how |= {"given": given, "charged": ~given, "noise": Noise(0, torch.arange(4), torch.arange(6))}
        return loss(model, process, X0, 6, T4, "elbo", **how)[1]

    ours = paid(learner.loss(0))
    assert torch.equal(ours, paid(esolm.eso_loss, share=0.3))
    assert not torch.equal(ours, paid(esolm.eso_loss)), "that is both phases"


@pytest.mark.parametrize("alpha0", ALPHA0)
def test_rows_of_block_size_1_pay_the_same_among_others(alpha0):
    model, process = network(alpha0, seq_len=6, letters=3)
    mixed = asked(model, process, block_size=torch.tensor([1, 6, 1, 6]))
    agree(mixed[::2], asked(model, process, block_size=torch.ones(4, dtype=torch.long))[::2])
    assert (mixed[::2].sum(1) > 0).all()


def test_rows_of_block_size_1_are_the_ar_mode():
    model, process = network(seq_len=6, letters=3)
    x0, sizes = (
        torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(1)),
        torch.tensor([1, 6, 1, 6]),
    )
    t, none = torch.tensor([0.1, 0.2, 0.6, 0.9]).double(), torch.zeros(4, 6).bool()
    none[:, 0] = True
    how = {"given": none, "charged": ~none, "noise": Noise(0, torch.arange(4), torch.arange(6))}
    ours = esolm.eso_loss(model, process, x0, sizes, t, {6: "elbo"}, **how, share=0.5)[1]
    want = d.token_loss(model, process, x0, 1, t, "ce", given=none)[1]
    agree(ours[sizes == 1], want[sizes == 1])
    how = {
        "given": none,
        "charged": ~none,
        "start": 1,
        "noise": Noise(0, torch.arange(4), torch.arange(1, 6)),
    }
    agree(esolm.bound(model, process, x0, 1, t, "elbo", **how)[1], want[:, 1:])


# ----- the sampler


def by_enumeration(model, alpha0, alpha, prompt=()):
    """
    The law of the sampler over states(V, L), from its description: a random order, a step for each token, and
    causal passes over the reordered row that read the masks of one step.
    """
    y, found = states(V, L), torch.zeros(V**L, dtype=torch.float64)
    n = len(prompt)
    P = [alpha0 * (b - a) for a, b in itertools.pairwise(alpha)] + [1 - alpha0]
    front = [list(o) for o in itertools.permutations(range(n))]
    orders = list(itertools.permutations(range(n, L)))
    memo = {}

    def costs(known, group):
        """p(y at group[-1]) for every y: known tokens, and the masks of its step before it."""
        at = torch.tensor([*known, *group])
        if tuple(at.tolist()) + (len(known),) not in memo:
            ids = torch.where(torch.arange(len(at)) < len(known), y[:, at], V)
            logits = stream(model, ids, at)[:, -1, :V]
            memo[tuple(at.tolist()) + (len(known),)] = logits.softmax(-1).gather(1, y[:, at[-1:]])[:, 0]
        return memo[tuple(at.tolist()) + (len(known),)]

    for head, order in itertools.product(front, orders):
        for step in itertools.product(range(len(P)), repeat=L - n):
            q = math.prod(P[k] for k in step) / len(front) / len(orders)
            if q == 0:
                continue
            known, each = list(head), torch.ones(len(y), dtype=torch.float64)
            groups = [[i for i, s in zip(order, step, strict=True) if s == k] for k in range(len(P) - 1)]
            groups += [[i] for i in sorted(i for i, s in zip(order, step, strict=True) if s == len(P) - 1)]
            for group in groups:
                for i in range(len(group)):
                    each = each * costs(known, group[: i + 1])
                known += group
            found += q * each
    return found * (y[:, :n] == torch.tensor(prompt).long()).all(1)


@pytest.mark.parametrize(
    "path, alpha0, prompt", [("fast", 0.6, ()), ("lesson", 0.6, (1,)), ("fast", 1.0, ())]
)
def test_texts_have_the_distribution_that_enumeration_gives(path, alpha0, prompt):
    model, process = network(0.5, seed=2)
    alpha = [0.0, 0.5, 1.0]
    with torch.no_grad():
        law = lambda a: by_enumeration(model, a, alpha, prompt)
        p, others = law(alpha0), [law(a) for a in (0.0, 1.0) if a != alpha0]
    how = {"sampler": esolm.esolm, "steps": 2, "seed": 3, "alpha0": alpha0, "shared": False}
    n = 2500
    state = last(GENERATE[path](model, process, [prompt] * n, block_size=L, **how))
    draws(code(state.x, V).bincount(minlength=V**L), p, *others)


def test_without_diffusion_it_is_the_ar_mode():
    model, process = network(0.5, seed=2)
    with torch.no_grad():
        p = by_enumeration(model, 0.0, [0.0, 0.5, 1.0])
    want = enumerated_ar(model, process, L)
    agree(
        p, torch.tensor([want.get(tuple(y), 0.0) for y in states(V, L).tolist()], dtype=torch.float64), 1e-6
    )
    how = {"sampler": esolm.esolm, "seed": 2, "alpha0": 0.0}
    texts = last(GENERATE["fast"](model, process, [()] * 2500, block_size=L, **how))
    assert texts.nfe == L and texts.token_forwards == 2500 * (2 * L - 1)
    draws(code(texts.x, V).bincount(minlength=V**L), p)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("path", GENERATE)
def test_a_text_does_not_depend_on_cache_or_company(path, shared):
    model, process = network(0.5, seed=1, seq_len=8, letters=3)
    prompts = ([(), (1,), (0, 2, 1), (2,) * 7, (1, 0)] * 7)[:33]
    run = lambda prompts, **how: last(
        GENERATE[path](
            model, process, prompts, block_size=8, sampler=esolm.esolm, seed=5, shared=shared, **how
        )
    )
    state = run(prompts, steps=4)
    assert torch.equal(run(prompts, steps=4, use_cache=False).x, state.x)
    assert run(prompts, steps=4, use_cache=False).token_forwards > state.token_forwards
    for i, prompt in enumerate(prompts[:5]):
        assert state.x[i, : len(prompt)].tolist() == list(prompt)
        assert torch.equal(run(prompts[: i + 1], steps=4).x[i], state.x[i])
    assert (state.x >= 0).all() and (state.x < 3).all()
    assert torch.equal(run([()], steps=4, max_new_tokens=5).x[0, :5], run([()], steps=4).x[0, :5])
    assert (run([(1,)], steps=4, max_new_tokens=5).x[0, 6:] < 0).all()
    after_ar = run(prompts, steps=4, ar_tokens=2)
    assert (after_ar.x >= 0).all()


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_p": 1e-6}])
def test_the_surest_token_has_no_chance_in_it(how):
    model, process = network(0.5, seed=1, seq_len=8, letters=3)
    rows = {"block_size": 8, "sampler": esolm.esolm, "alpha0": 0.0}
    x = last(GENERATE["fast"](model, process, [()] * 20, **rows, **how)).x
    assert (x == x[0]).all() and (last(GENERATE["fast"](model, process, [()] * 20, **rows)).x != x).any()


def test_masks_and_known_tokens_stand_in_an_order_at_random():
    model, process = network(0.5, seed=1, seq_len=8, letters=3)
    forward, seen = model.forward, []

    def spy(clean, noisy, *args, at, real, **how):
        seen.append(at[:, clean.size(1) :])
        assert real.all()
        return forward(clean, noisy, *args, at=at, real=real, **how)

    model.forward = spy
    rows = {"block_size": 8, "sampler": esolm.esolm, "alpha0": 1.0, "steps": 2, "seed": 5}
    last(GENERATE["fast"](model, process, [()] * 20, **rows))
    u = Noise(5, torch.arange(20), torch.arange(8), 0).uniform(1)[..., 0]
    assert len(seen) == 2 and all((u.gather(1, at).diff(dim=1) > 0).all() for at in seen)


def test_shared_rows_write_as_many_tokens_behind_prompts_too():
    model, process = network(0.5, seed=1, seq_len=8, letters=3)
    rows = {"block_size": 8, "sampler": esolm.esolm, "steps": 4, "seed": 5}
    for state in GENERATE["fast"](model, process, [(0, 1, 2)] * 20, **rows):
        written = ((state.x >= 0) & (state.x < 3)).sum(1)
        assert (written == written[0]).all()


def test_a_row_counts_the_passes_in_which_it_is_written_whoever_is_beside_it():
    model, process = network(0.5, seed=1, seq_len=8, letters=3)
    rows = {"block_size": 8, "sampler": esolm.esolm, "steps": 4, "seed": 5, "shared": False}
    seen = list(GENERATE["fast"](model, process, [()] * 20, **rows))
    wrote = sum((a.x != b.x).any(1).long() for a, b in itertools.pairwise(seen[1:]))
    assert torch.equal(seen[-1].nfe_rows, wrote) and len(set(wrote.tolist())) > 1
    assert last(GENERATE["fast"](model, process, [()], **rows)).nfe_rows == wrote[:1]


def test_passes_and_tokens_are_counted():
    """Rows of one length are not filled up: each token is read as a mask, and once more but for the last."""
    model, process = network(0.5, seed=1, seq_len=8, letters=3)
    run = lambda **how: last(
        GENERATE["fast"](model, process, [()] * 50, block_size=8, sampler=esolm.esolm, seed=5, **how)
    )
    for alpha0, steps in ((0.5, 4), (1.0, 3), (0.9, 64)):
        seen = list(
            GENERATE["fast"](
                model, process, [()] * 50, block_size=8, sampler=esolm.esolm, steps=steps, alpha0=alpha0
            )
        )
        written = [int((s.x[0] < 3).sum()) for s in seen if s.step]
        last_group = 8 - max([n for n in written if n < 8], default=0)
        assert seen[-1].token_forwards == 50 * (16 - last_group)
        assert (seen[-1].nfe_rows == seen[-1].nfe).all() and seen[-1].nfe <= min(8, steps + 8)
        assert all(((s.x < 3).sum(1) == (s.x[0] < 3).sum()).all() for s in seen), "as many in every row"
        assert any(((s.x < 3) != (s.x[0] < 3)).any() for s in seen), "but not at the same places"
    own = run(steps=4, shared=False)
    assert own.nfe_rows.min() < own.nfe_rows.max(), "every row draws its own numbers"
    assert run(steps=4, alpha0=0.5).nfe == run(steps=4).nfe == run(steps=4, alpha0=-1.0).nfe


def test_diffusion_writes_a_share_alpha0_of_the_row():
    """At the end of the diffusion steps; and at their middle, half of that. Counted, 5 standard errors."""
    model, process = network(0.7, seed=1, seq_len=8, letters=3)
    how = {"steps": 2, "sampler": esolm.esolm, "shared": False}
    seen = []
    for s in GENERATE["fast"](model, process, [()] * 400, block_size=8, **how):
        seen.append((s.x < 3).double().mean().item())
    for found, want in zip(seen[2:4], (0.35, 0.7), strict=True):
        assert abs(found - want) < 5 * math.sqrt(want * (1 - want) / 3200), (found, want)


# ----- checkpoints and refusals


FLAGS = [*TINY, "--dataset=pairs", "--method=esolm", "--lr=0.1", "--warmup=1", "--lr_schedule=constant"]


@pytest.mark.parametrize("sizes", ["12:1", pytest.param("1:0.25,12:0.75", marks=pytest.mark.slow)])
def test_a_checkpoint_is_trained_resumed_sampled_and_evaluated(project, capsys, sizes):
    flags = [
        *FLAGS,
        f"--block_sizes={sizes}",
        "--alpha0=0.3",
        "--eval_every=2",
        "--n_samples=0",
        "--n_eval=4",
    ]
    one, _ = resumed(training.main, *flags)
    assert one["config"]["objective"] == "elbo" and 0 < esolm.Settings().alpha0 < 1, (
        "as nobody says otherwise"
    )
    _, _, _, model, process = rebuild("parts", torch.device("cpu"))
    assert type(model) is EsoLM and type(process) is EsoMasked and process.alpha0 == 0.3
    capsys.readouterr()
    more = ("arpc", "ar", "confidence", "esolm --alpha0=1") * sizes.startswith("1:")
    for sampler in ("esolm", "esolm --shared=false", "ancestral", *more):
        for plain in ("", "--plain")[: 1 + (sampler == "esolm")]:
            name, *own = sampler.split()
            run(
                sample.main,
                "--ckpt=parts",
                "--device=cpu",
                f"--sampler={name}",
                *own,
                *plain.split(),
                "--n_samples=3",
            )
            assert "NFE" in capsys.readouterr().out, sampler
    run(evaluation.main, "--ckpt=parts", "--device=cpu", "--n_eval=8", "--n_mc=2")
    assert "nats" in capsys.readouterr().out


def test_what_it_cannot_serve_is_refused(slip, project):
    ask = lambda *more: slip(training.main, argv=[*FLAGS, "--max_steps=1", "--out_dir=c", *more])
    assert "the row, here of 12 tokens" in ask("--block_sizes=4:1")
    assert "the row, here of 12 tokens" in ask("--block_sizes=1:0.5,4:0.5")
    for wrong in ("alpha0=1.5", "alpha0=-0.5", "sequential_share=0", "sequential_share=1"):
        assert wrong.partition("=")[0] in ask("--block_sizes=12:1", f"--{wrong}")
    for wrong in ("--process=uniform", "--time_conditioning=true", "--clean_causal=false"):
        assert "masks last" in ask("--block_sizes=12:1", wrong)
    assert "masks last" in ask("--block_sizes=1:1", "--next_token")
    model, process = network(seq_len=8, letters=3)
    how = {"sampler": esolm.esolm}
    for bad in ({"alpha0": -0.5}, {"alpha0": 1.5}):
        with pytest.raises(ValueError, match="alpha0"):
            last(GENERATE["fast"](model, process, [()], block_size=8, **how, **bad))
    with pytest.raises(ValueError, match="whole row, 8"):
        last(GENERATE["fast"](model, process, [()], block_size=4, **how))
    lesson = net(process, seq_len=8)
    with pytest.raises(ValueError, match="--method esolm"):
        last(GENERATE["fast"](lesson, process, [()], block_size=8, **how))
    with pytest.raises(ValueError, match="not defined"):
        last(GENERATE["fast"](lesson, d.Uniform(3), [()], block_size=8, **how))
