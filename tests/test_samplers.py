"""
Why believe samplers/? On an alphabet of 3 letters every sampler draws the distribution that its equation
gives when it is written out densely, in plain loops. All of them keep the promises of the loop: cached =
uncached, prompts stay, counts are right.

Two forms are tested: "fast", which runs by default, and "lesson", which --plain runs. Both draw from the same
distribution. Tests of the passes that are saved are of the fast form.
"""

import functools
import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import slow
from exact import (
    GENERATE,
    KINDS,
    P_VALUE,
    V3,
    agree,
    ar_probs,
    blocks,
    by_hand,
    chi_squared,
    code,
    dense,
    draws,
    enumerated_ar,
    last,
    letters,
    net,
    network,
    on,
    one_source,
    prior,
    product,
    rounded,
    setup,
    small,
    states,
    tree,
)

import diffusion as d
import rng
from fast.block import generate
from generate import NOTHING
from samplers import SAMPLERS, guided, unmasking
from samplers import reverse as samplers

N = 60_000  # draws
ALL = {name: f for name, f in SAMPLERS.items() if not f.__module__.startswith("methods.")}
s = SimpleNamespace(**ALL)
PATHS = pytest.mark.parametrize("path", GENERATE)
FAST_FIRST = pytest.mark.parametrize("path", slow(GENERATE, ["fast"]))  # the lesson: in make test-all
FLAGGED = [("uniform loo", 0, 1.5), ("uniform denoiser, timed", 18, 1.0)]
COUPLED = [("uniform loo", 0, 1.5), ("uniform denoiser, timed", 18, 1.5)]
GRID = {n: d.loglinear(torch.linspace(1, 0, n + 1, dtype=torch.float64))[0].tolist() for n in range(1, 9)}


def chain(model, process, b, alphas, step):
    """The blocks (V3^b,) that kernels step(k, x, logits, a_t, a_s) -> (m, m) end in, from pure noise."""
    p = prior(process, b)
    for k, (a_t, a_s) in enumerate(itertools.pairwise(alphas)):
        p = p @ step(k, *network(model, process, b, a_t), a_t, a_s)
    return letters(p, process, b)


# ----- following the reverse process


def reverse(process):
    return lambda k, x, logits, a_t, a_s: product(process.posterior_probs(logits, x, a_t, a_s), x)


def psi_kernel(process, kappa):
    """kappa(k, a_t, a_s) -> number; the equation, token by token, dense."""

    def step(k, x, logits, a_t, a_s):
        noise = torch.zeros(process.vocab_size).double()
        noise[slice(None) if process.mask_id is None else process.mask_id] = 1.0
        again = a_s * process.posterior_probs(logits, x, a_t, 1.0) + (1 - a_s) * noise / noise.sum()
        share = kappa(k, a_t, a_s)
        return product(share * process.posterior_probs(logits, x, a_t, a_s) + (1 - share) * again, x)

    return step


SHARP = {
    "masked": (18, 1.5),
    "uniform loo": (0, 1.5),
    "uniform denoiser, timed": (16, 1.0),
}  # seeds whose tokens depend on each other


@pytest.mark.slow  # of psi, test_psi_profiles stays
@pytest.mark.parametrize("path, kind", [*(("fast", kind) for kind in SHARP), ("lesson", "masked")])
def test_psi_draws_its_kernel_and_kappa_1_is_ancestral(path, kind):
    model, process = setup(kind, *SHARP[kind], path)
    plain = chain(model, process, 3, GRID[3], reverse(process))
    agree(plain, chain(model, process, 3, GRID[3], psi_kernel(process, lambda *a: 1.0)))
    kernels = {}
    for eta in (0.0, 0.3, 0.7):
        kernels[eta] = chain(
            model,
            process,
            3,
            GRID[3],
            psi_kernel(process, lambda k, a_t, a_s, eta=eta: eta if k < 2 else 1.0),
        )
    draws(blocks(model, process, 3, N, s.ancestral, steps=3), plain, *kernels.values())
    draws(blocks(model, process, 3, N, s.psi, steps=3, kappa="posterior"), plain, *kernels.values())
    for eta, p in kernels.items():
        others = [plain] + [q for other, q in kernels.items() if other != eta]
        draws(
            blocks(model, process, 3, N, s.psi, steps=3, **({"eta": eta} if eta else {"kappa": "pc"})),
            p,
            *others,
        )


@pytest.mark.parametrize("kind, seed", slow([("masked", 18), ("uniform loo", 0)], [("masked", 18)]))
def test_psi_profiles(kind, seed):
    model, process = setup(kind, seed, soft=2.5)

    def kappa(k, a_t, a_s, words):  # four steps end at times 0.75, 0.5, 0.25, 0
        limit = min(1.0, (1 - a_s) / a_t) if a_t else 1.0
        sigma = {"cap": min(0.45, limit), "rescale": 0.45 * limit}.get(words[k])
        return (
            {"constant": 0.45, "posterior": 1.0}[words[k]]
            if sigma is None
            else max(0.0, 1 - sigma / (1 - a_s))
        )

    exact = lambda *words: chain(
        model, process, 2, GRID[4], psi_kernel(process, lambda k, a_t, a_s: kappa(k, a_t, a_s, words))
    )
    p, swapped = (exact("constant", *two, "posterior") for two in (("cap", "rescale"), ("rescale", "cap")))
    run = lambda **kw: blocks(model, process, 2, N, s.psi, steps=4, **kw)
    draws(run(kappa="0.7:constant,0.3:cap,0:rescale", eta=0.45), p, swapped, exact(*["posterior"] * 4))
    # the loop: alpha climbs to 0.6 at time 0.5, is held until 0.25 and climbs on
    held = [0.0, 0.3, 0.6, 0.6, 1.0]
    loop = lambda eta: chain(
        model,
        process,
        2,
        held,
        psi_kernel(process, lambda k, a_t, a_s: 1 - eta / (1 - a_s) if k == 2 else 1.0),
    )
    draws(run(kappa="0.5:posterior,0.25@0.6:remask,0:posterior", eta=0.4), loop(0.4), loop(0.0))
    for bad in (
        "fast",
        "0.5:cap",
        "0.2:cap,0.5:pc,0:pc",
        "0.5@0.9:cap,0:pc",
        "1:pc,0:pc",
        "x:pc,0:pc",
        "",
        "0.5:pc,0.2@1:cap,0:pc",
        "0:pc:pc",
    ):
        with pytest.raises(ValueError, match="kappa"):
            blocks(model, process, 2, 1, s.psi, steps=4, kappa=bad)


def remdm_kernel(process, sigma):
    """ReMDM's step from its paper. sigma(k, x, a_t, a_s) -> number or (m, b)."""

    def step(k, x, logits, a_t, a_s):
        masked, mask = (
            (x == process.mask_id)[..., None],
            torch.eye(process.vocab_size)[process.mask_id].double(),
        )
        r = torch.as_tensor(sigma(k, x, a_t, a_s), dtype=torch.float64)
        r = r[..., None] if r.dim() else r
        p = process.denoiser_logits(logits, x).softmax(-1)
        lift = (a_s - (1 - r) * a_t) / (1 - a_t)
        return product(torch.where(masked, lift * p + (1 - lift) * mask, (1 - r) * p + r * mask), x)

    return step


@pytest.mark.slow
def test_remdm_draws_its_kernel_and_is_psi_at_the_mapped_kappa():
    model, process = setup("masked", *SHARP["masked"])
    limit = lambda a_t, a_s: min(1.0, (1 - a_s) / a_t) if a_t else 1.0
    rules = {
        s.remdm_cap: ("cap", lambda k, x, a_t, a_s: min(0.25, limit(a_t, a_s))),
        s.remdm_rescale: ("rescale", lambda k, x, a_t, a_s: 0.25 * limit(a_t, a_s)),
    }
    plain = chain(model, process, 3, GRID[4], reverse(process))
    for sampler, (word, sigma) in rules.items():
        p = chain(model, process, 3, GRID[4], remdm_kernel(process, sigma))
        mapped = lambda k, a_t, a_s, sigma=sigma: 1 - sigma(k, None, a_t, a_s) / (1 - a_s) if a_s < 1 else 1.0
        agree(p, chain(model, process, 3, GRID[4], psi_kernel(process, mapped)))  # kernel by kernel
        draws(blocks(model, process, 3, N, sampler, steps=4, eta=0.25), p, plain)
        draws(blocks(model, process, 3, N, s.psi, steps=4, kappa=word, eta=0.25), p, plain)
    # any sigma up to the limit is a kernel of Psi, with a negative kappa where sigma > 1 - a_s
    x, logits = network(model, process, 2, 0.0)
    for a_t, a_s, sigma in ((0.2, 0.5, 0.1), (0.5, 0.7, 0.3), (0.5, 0.8, 0.4), (0.6, 0.6, 0.2)):
        kernel = remdm_kernel(process, lambda *a, sigma=sigma: sigma)(0, x, logits, a_t, a_s)
        agree(kernel, psi_kernel(process, lambda *a, q=1 - sigma / (1 - a_s): q)(0, x, logits, a_t, a_s))
    # the loop, and the same as a profile of Psi; the step that reaches t_on and the one that leaves t_off
    held = [0.0, 0.375, 0.6, 0.6, 1.0]
    p, other = (
        chain(model, process, 3, held, remdm_kernel(process, lambda k, x, a_t, a_s, r=r: r * (k in (1, 2))))
        for r in (0.35, 0.0)
    )
    draws(
        blocks(model, process, 3, N, s.remdm_loop, steps=4, eta=0.35, t_on=0.6, t_off=0.25, alpha_on=0.6),
        p,
        other,
    )
    draws(
        blocks(
            model, process, 3, N, s.psi, steps=4, eta=0.35, kappa="0.6:posterior,0.25@0.6:remask,0:posterior"
        ),
        p,
        other,
    )
    for how in (
        {"sampler": s.remdm_loop, "t_off": 0.0},
        {"sampler": s.psi, "kappa": "0.55:remask,0@0.9:remask,0:posterior", "eta": 0.05},
    ):
        state = last(
            generate(
                model,
                process,
                torch.zeros(500, 0),
                block_size=3,
                steps=6,
                use_cache=False,
                max_new_tokens=3,
                **how,
            )
        )
        assert (state.x[:, :3] < V3).all(), "a loop up to the end leaves no masks"


def table(model, process, b, alpha=0.0):
    """{block: log p (b, V)} of the network, the mask forbidden."""
    x, logits = network(model, process, b, alpha)
    return dict(
        zip(map(tuple, x.tolist()), process.loo_logits(logits, x, alpha).log_softmax(-1), strict=True)
    )


@pytest.mark.slow
def test_remdm_conf_remembers_the_confidence_of_every_token():
    model, process = setup("masked", 17, soft=1.5)
    b, M, logp = 3, process.mask_id, table(model, process, 3)

    def step(k, x, memory, remembers=True):
        a_t, a_s = GRID[4][k : k + 2]
        limit = min(1.0, (1 - a_s) / a_t) if a_t else 1.0
        weight = {i: math.exp(-memory[i] if remembers else 0.0) for i in range(b) if x[i] != M}
        p, each = logp[x].exp(), []
        for i in range(b):
            sigma = limit * weight[i] / sum(weight.values()) if i in weight else 0.0
            lift = (a_s - a_t) / (1 - a_t)
            if x[i] == M:
                each.append(
                    [(lift * p[i, v].item(), v, p[i, v].item()) for v in range(V3)] + [(1 - lift, M, 0.0)]
                )
            else:
                each.append([(1 - sigma, x[i], memory[i]), (sigma, M, 0.0)])
        return [
            (math.prod(e[0] for e in es), tuple(e[1] for e in es), tuple(e[2] for e in es))
            for es in itertools.product(*each)
        ]

    p, forgetful = (
        dense(tree(lambda *a, r=r: step(*a, remembers=r), (M,) * b, 4, (0.0,) * b), b) for r in (True, False)
    )
    draws(
        blocks(model, process, b, 4 * N, s.remdm_conf, steps=4),
        p,
        forgetful,
        chain(model, process, b, GRID[4], reverse(process)),
    )


def test_remdm_conf_takes_back_by_the_confidence_of_the_day(monkeypatch):
    """Not by what the network says of a visible token now; every sigma, from the outside."""
    (model, process), seen, original = small(d.Masked(V3 + 1, V3), seed=3), [], samplers.remask

    def spy(block, logits, a_t, a_s, sigma, noise):
        seen.append((block.x, logits, sigma))
        original(block, logits, a_t, a_s, sigma, noise)
        seen[-1] += (block.x,)

    monkeypatch.setattr(samplers, "remask", spy)
    model.double()
    last(generate(model, process, [(0,)] * 200, block_size=8, steps=8, sampler=s.remdm_conf))
    confidence = torch.zeros(200, 8, dtype=torch.float64)
    for k, (x, logits, sigma, after) in enumerate(seen):
        visible = (x != V3) & (torch.arange(8) > 0)  # not the prompt
        limit = min(1.0, (1 - (k + 1) / 8) / (k / 8)) if k else 1.0
        want = (
            limit
            * (-confidence).exp()
            * visible
            / ((-confidence).exp() * visible).sum(1, keepdim=True).clamp(min=1e-9)
        )
        rounded(sigma, want, 8, size=1)  # what a draw knows of its token is float32
        placed = (x == V3) & (after != V3)
        p = process.loo_logits(logits).softmax(-1).gather(-1, after.clamp(max=V3 - 1)[..., None])[..., 0]
        confidence = torch.where(placed, p, confidence)


@pytest.mark.slow
def test_first_hitting_is_one_random_position_after_another():
    """
    What ancestral sampling tends to with many steps: a network that does not see the time, so only the order
    counts.
    """
    model, process = setup("masked", *SHARP["masked"])
    b, M, logp = 3, process.mask_id, table(model, process, 3)

    def step(k, x, _):
        left = [i for i in range(b) if x[i] == M]
        return [
            (logp[x][i, v].exp().item() / len(left), (*x[:i], v, *x[i + 1 :]), None)
            for i in left
            for v in range(V3)
        ]

    p = dense(tree(step, (M,) * b, b), b)
    draws(
        blocks(model, process, b, N, s.first_hitting), p, chain(model, process, b, GRID[2], reverse(process))
    )
    many = d.loglinear(torch.linspace(1, 0, 2001, dtype=torch.float64))[0].tolist()
    limit = chain(model, process, b, many, reverse(process))
    assert (limit - p).abs().max() < 2e-3, "ancestral with 2000 steps"
    # a network that sees the time is asked at the time of the hit: the share of masks has mean 3/4, then 3/4
    # 2/3, ...
    (model, process), asked = small(d.Masked(V3 + 1, V3), time_conditioning=True), []
    forward = model.forward
    model.forward = lambda clean, noisy, b, start, sigma, cache, ask: (
        asked.append((-sigma).exp()) or forward(clean, noisy, b, start, sigma, cache, ask=ask)
    )
    last(generate(model, process, [()] * 4000, block_size=3, sampler=s.first_hitting, max_new_tokens=3))
    for got, share in zip(asked, (3 / 4, 3 / 4 * 2 / 3, 3 / 4 * 2 / 3 / 2), strict=True):
        assert abs(1 - got.double().mean() - share) < 4 * 0.3 / math.sqrt(4000)


@pytest.mark.parametrize("kind, seed, soft", slow(COUPLED, COUPLED[:1]))
def test_max_coupling_draws_its_kernel(kind, seed, soft):
    model, process = setup(kind, seed, soft)

    def step(k, x, logits, a_t, a_s):
        keep = (1 - a_s) / (1 - a_t)
        return product(
            keep * torch.eye(V3).double()[x]
            + (1 - keep) * process.denoiser_logits(logits, x, a_t).softmax(-1),
            x,
        )

    p = chain(model, process, 3, GRID[3], step)
    draws(
        blocks(model, process, 3, N, s.max_coupling, steps=3),
        p,
        chain(model, process, 3, GRID[3], reverse(process)),
    )


@pytest.mark.parametrize("badness", slow(["random", "max", "current", "margin"], ["margin"]))
def test_gibbs_resamples_from_the_noisy_conditional(badness):
    model, process = setup("uniform denoiser, timed")
    b = 2

    def corrector(a_s):
        x, logits = network(model, process, b, a_s)
        p = a_s * process.loo_logits(logits, x, a_s).softmax(-1) + (1 - a_s) / V3  # (m, b, V)
        own = p.gather(-1, x[..., None])[..., 0]
        other = torch.stack(
            [p[..., [w for w in range(V3) if w != v]].amax(-1) for v in range(V3)], -1
        ).gather(-1, x[..., None])[..., 0]
        bad = {
            "random": 0 * own,
            "max": -p.amax(-1).log(),
            "current": -own.log(),
            "margin": -(own / other).log(),
        }[badness]
        which = (bad / 0.5).softmax(-1)  # Gumbel-top-1
        out = torch.zeros(len(x), len(x), dtype=torch.float64)
        for i in range(b):
            same = (x[:, None] == x[None]).index_fill(-1, torch.tensor(i), True).all(-1)
            out += which[:, i, None] * same * p[:, i][:, x[:, i]]
        agree(out.sum(1), torch.ones(len(x)).double())
        return out

    step = lambda k, x, logits, a_t, a_s: (
        reverse(process)(k, x, logits, a_t, a_s) @ (corrector(a_s) if k == 0 else torch.eye(len(x)).double())
    )
    p = chain(model, process, b, GRID[2], step)  # three passes: predictor, corrector, predictor
    draws(
        blocks(model, process, b, N, s.gibbs, steps=3, badness=badness, spread=0.5, resample=1),
        p,
        chain(model, process, b, GRID[3], reverse(process)),
    )
    state = last(
        generate(model, process, [()], block_size=8, steps=8, sampler=s.gibbs, rounds=2, use_cache=False)
    )
    assert state.nfe == 8, "correctors are paid out of --steps"


def order(score, among):
    return sorted(among, key=lambda i: -score[i])


# ----- ARPC


ARPC_NETS = [("masked", 4, 207, 0.6), ("uniform loo", 3, 109, 1.0), ("uniform denoiser, timed", 3, 1, 0.4)]


def bad(corruption, metric, a, f, v):
    """The scores once more: a and f lists of probabilities of the AR and the diffusion mode, v the token."""
    H = lambda w: -sum(p * math.log(p) for p in w if p > 0)
    KL = lambda w, z: sum(p * math.log(p / q) for p, q in zip(w, z, strict=True) if p > 0)
    return {
        ("ar", "nll"): lambda: -math.log(a[v]),
        ("ar", "gap"): lambda: math.log(max(a) / a[v]),
        ("ar", "entropy"): lambda: H(a),
        ("divergence", "kl"): lambda: KL(a, f),
        ("divergence", "reverse_kl"): lambda: KL(f, a),
        ("divergence", "tv"): lambda: sum(abs(p - q) for p, q in zip(a, f, strict=True)) / 2,
        ("diffusion", "entropy"): lambda: H(f),
        ("diffusion", "confidence"): lambda: -max(f),
        ("diffusion", "margin"): lambda: sorted(f)[-2] - sorted(f)[-1],
        ("random", ""): lambda: 0.0,
    }[corruption, metric]()


METRICS = [("ar", m) for m in ("nll", "gap", "entropy")] + [
    ("divergence", m) for m in ("kl", "reverse_kl", "tv")
]
METRICS += [("diffusion", m) for m in ("entropy", "confidence", "margin")] + [("random", "")]


@functools.cache
def arpc_by_hand(kind, b, seed, soft, corruption, metric, guided=(0, 1)):
    """
    Three steps, the first two guided, behind one token of the prompt in the same block (masks alone would be
    in one and the same place); the AR mode asked token by token, scores from their definitions.
    """
    model, process = setup(kind, seed, soft)
    steps, M, open = 3, process.mask_id, tuple(range(1, b))
    real = torch.tensor([y for y in states(V3, b).tolist() if y[0] == 1])
    lists = lambda p, x: {y: q.tolist() for y, q in by_hand(p, x).items()}
    p_ar = lists((ar_probs(model, process, real).clamp(min=1e-300).log() / 0.7).softmax(-1)[..., :V3], real)
    posts, Ds = [], []
    for a_t, a_s in itertools.pairwise(GRID[steps]):
        x, logits = network(model, process, b, a_t)
        Ds.append(lists(process.denoiser_logits(logits, x, a_t).softmax(-1)[..., :V3], x))
        posts.append(lists(process.posterior_probs(logits, x, a_t, a_s), x))
    ys = list(map(tuple, real.tolist()))
    weight = lambda p, y: math.prod(p[i][y[i]] for i in open)

    def step(k, x, memory):
        now = Ds[k][x]
        p = (
            now
            if memory is None
            else [memory[i] if M is not None and x[i] != M else now[i] for i in range(b)]
        )
        p = tuple(map(tuple, p))
        if k not in guided:
            last = k == steps - 1
            ends = ys if last else list(posts[k])
            return [(weight(posts[k][x], y), y, None if last else p) for y in ends if y[0] == 1]
        n = math.floor((1 - GRID[steps][k + 1]) * len(open) + 0.5 + 1e-9)
        fills = list(itertools.product([M] if M is not None else range(V3), repeat=n))
        out = []
        for y in ys:
            if (w := weight(now, y)) < 1e-9:
                continue
            badness = {i: bad(corruption, metric, p_ar[y][i], p[i], y[i]) for i in open}
            sets = (
                list(itertools.combinations(open, n))
                if corruption == "random"
                else [tuple(sorted(order(badness, open)[:n]))]
            )
            for worst in sets:
                for fill in fills:
                    new = tuple(fill[worst.index(i)] if i in worst else y[i] for i in range(b))
                    out.append((w / len(sets) / len(fills), new, p))
        return out

    starts = [(1, *first) for first in itertools.product([M] if M is not None else range(V3), repeat=b - 1)]
    total = {}
    for x in starts:
        for y, q in tree(step, x, steps).items():
            total[y] = total.get(y, 0.0) + q / len(starts)
    return dense(total, b)


FEW = [("fast", *ARPC_NETS[0], "divergence", "kl")]
ALL_ARPC = [
    *FEW,
    *(("fast", *ARPC_NETS[i % 2], *m) for i, m in enumerate(METRICS)),
]  # a network for each score
ALL_ARPC += [("fast", *net, "ar", "nll") for net in ARPC_NETS] + [("lesson", *ARPC_NETS[0], "ar", "nll")]
ALL_ARPC = list(dict.fromkeys(ALL_ARPC))


@pytest.mark.parametrize("path, kind, b, seed, soft, corruption, metric", slow(ALL_ARPC, FEW))
def test_arpc_noises_again_what_is_worst(path, kind, b, seed, soft, corruption, metric):
    """
    And the test tells every score from every other (but on the third network, where some of them agree).
    """
    model, process = setup(kind, seed, soft, path)
    p = arpc_by_hand(kind, b, seed, soft, corruption, metric)
    others = (
        [arpc_by_hand(kind, b, seed, soft, *m) for m in METRICS if m != (corruption, metric)]
        if "timed" not in kind
        else []
    )
    how = {"corruption": corruption, "metric": metric} | (
        {"verify_temperature": 0.7} if corruption in ("ar", "divergence") else {}
    )
    draws(blocks(model, process, b, N, s.arpc, prompt=(1,), steps=3, **how), p, *others)


@pytest.mark.parametrize(
    "how, guided",
    slow([({"warmup": 1}, (1,)), ({"guide_every": 2}, (0,)), ({"warmup": 2}, ())], [({"warmup": 1}, (1,))]),
)
def test_arpc_guides_the_steps_it_says(how, guided):
    kind, b, seed, soft = ARPC_NETS[0]
    model, process = setup(kind, seed, soft)
    exact = {g: arpc_by_hand(kind, b, seed, soft, "ar", "nll", g) for g in ((), (0,), (1,), (0, 1))}
    counts = blocks(model, process, b, N, s.arpc, prompt=(1,), steps=3, verify_temperature=0.7, **how)
    draws(counts, exact.pop(guided), *exact.values())


@PATHS
def test_arpc_counts_open_positions_and_passes(path):
    model, process = small(d.Masked(V3 + 1, V3), 2, path, time_conditioning=True)  # asked at every step

    def run(prompts=((),), steps=8, **kw):
        how = {"block_size": 8, "max_new_tokens": 8 - len(prompts[0]), "steps": steps, "sampler": s.arpc}
        return list(GENERATE[path](model, process, prompts, **how, **kw))

    for prompt, steps in itertools.product(
        ((), (1,), (1, 2, 0)), (5, 6, 10)
    ):  # 5 free of 10 steps, 1/2 free of 6: halves
        free = 8 - len(prompt)
        for state in run([prompt] * 5, steps=steps)[1:-1]:
            assert state.x[:, : len(prompt)].tolist() == [list(prompt)] * 5
            want = (
                (2 * (steps - state.step) * free + steps) // (2 * steps) if state.step else free
            )  # integers: a half goes up
            assert (state.x == V3).sum(1).tolist() == [want] * 5, (
                "the budget is over open positions, rounded half up"
            )
    for steps, kw, nfe in (
        (8, {}, 15),
        (8, {"guide_every": 3}, 8 + 3),
        (8, {"warmup": 2}, 8 + 5),
        (8, {"warmup": 2, "guide_every": 4}, 8 + 2),
        (1, {}, 1),
        (8, {"corruption": "random"}, 8),
        (8, {"corruption": "diffusion"}, 8),
        (8, {"corruption": "divergence"}, 15),
    ):
        passes, most = (
            run(steps=steps, **kw)[-1].nfe,
            f"T + floor((T - 2 - warmup) / guide_every) + 1 passes: {kw}",
        )
        free = sum(
            not (k >= kw.get("warmup", 0) and (k - kw.get("warmup", 0)) % kw.get("guide_every", 1) == 0)
            for k in range(steps - 1)
        )
        free = free if path == "fast" else 0
        assert nfe - free <= passes <= nfe, most + ", but for ancestral steps that lift no mask"
    for bad in (
        {"corruption": "best"},
        {"metric": "kl"},
        {"corruption": "random", "metric": "nll"},
        {"guide_every": 0},
        {"warmup": -1},
        {"verify_temperature": 0.0},
    ):
        with pytest.raises(ValueError):
            run(**bad)


def test_the_verifier_has_a_temperature_of_its_own():
    """The sampling temperature sharpens the guess, never the score: the same guess is judged the same."""
    (model, process), asked = small(d.Masked(V3 + 1, V3), seed=2), []
    model.double()
    original = guided.ARJudge.metrics["nll"]
    guided.ARJudge.metrics["nll"] = lambda y, ar: asked.append(ar) or original(y, ar)
    try:
        for T in (1.0, 0.0):
            last(generate(model, process, [(0,)], block_size=8, steps=2, sampler=s.arpc, temperature=T))
        last(generate(model, process, [(0,)], block_size=8, steps=2, sampler=s.arpc, verify_temperature=0.5))
    finally:
        guided.ARJudge.metrics["nll"] = original
    first = [a[0, 1, :V3] for a in asked]  # the first open token: p_AR depends on the prompt alone
    agree([first[1], first[2]], [first[0], first[0] / 0.5])


# ----- committing tokens: the rules once more, in plain loops


def rule_confidence(k, n, left, y, logp, memory, b, ar):
    c = {i: logp[i, y[i]].item() for i in left}
    m = b - 1  # open
    have = m - len(left)
    return set(order(c, left)[: max(0, math.ceil(m * (k + 1) / min(n, m)) - have)]), y, memory


def rule_threshold(k, n, left, y, logp, memory, b, ar):
    c = {i: logp[i, y[i]].exp().item() for i in left}
    return {i for i in left if c[i] >= 0.6} | set(order(c, left)[:1]), y, memory


def rule_factor(k, n, left, y, logp, memory, b, ar):
    c = {i: logp[i, y[i]].exp().item() for i in left}
    ranked, take = order(c, left), 1
    for m in range(1, len(ranked) + 1):
        if (m + 1) * (1 - c[ranked[m - 1]]) < 1.5:
            take = m
    return set(ranked[:take]), y, memory


def rule_entropy_bound(k, n, left, y, logp, memory, b, ar):
    h = {i: -sum(v * math.log(v) for v in logp[i].exp().tolist() if v > 0) for i in left}
    ranked = sorted(left, key=lambda i: h[i])
    take = max(
        m
        for m in range(1, len(ranked) + 1)
        if sum(h[i] for i in ranked[:m]) - max(h[i] for i in ranked[:m]) <= 0.6
    )
    return set(ranked[:take]), y, memory


def rule_rcr(k, n, left, y, logp, memory, b, ar):
    old = dict(memory or ())
    c = {i: logp[i, y[i]].item() if i in left else old[i] for i in range(1, b)}
    keep = set(order(c, range(1, b))[: math.ceil((b - 1) * (k + 1) / min(n, b - 1))])
    return keep, y, tuple(sorted(c.items()))


def rule_saber(k, n, left, y, logp, memory, b, ar):
    stored, before = (dict(memory[0]), memory[1]) if memory else ({}, None)
    old, p = [i for i in range(1, b) if i not in left], logp.exp().tolist()
    c = {i: p[i][y[i]] for i in left}
    mean = sum(stored[i] for i in old) / len(old) if old else 1.0
    take = {i for i in left if c[i] > mean} | set(order(c, left)[:2])
    fall = {i: before[i][y[i]] - p[i][y[i]] for i in old}
    back = set(
        order(fall, [i for i in old if fall[i] > 0])[
            : max(0, min(max(1, math.ceil(len(take) / 8)), len(take) - 1))
        ]
    )
    stored = {i: c[i] if i in take else stored[i] for i in take | set(old)}
    return (set(old) | take) - back, y, (tuple(stored.items()), tuple(map(tuple, p)))


def rule_saber_that_keeps(k, n, left, y, logp, memory, b, ar):
    keep, y, memory = rule_saber(k, n, left, y, logp, memory, b, ar)
    return keep | set(range(1, b)) - set(left), y, memory


def gaps(logp):
    return [(row.sort().values[-1] - row.sort().values[-2]).item() for row in logp]


def rule_prophet(k, n, left, y, logp, memory, b, ar):
    old, now = dict(memory or ()), gaps(logp)
    g = {i: now[i] if i in left else old[i] for i in range(1, b)}
    limit = [1.5, 1.1, 0.8][0 if k / (n - 1) < 1 / 3 else 1 if k / (n - 1) < 2 / 3 else 2]
    if sum(g.values()) / (b - 1) >= limit:
        return set(range(b)), tuple(logp[i].argmax().item() if i in left else y[i] for i in range(b)), None
    return rule_confidence(k, n, left, y, logp, None, b, ar)[:2] + (tuple(g.items()),)


def rule_sched(k, n, left, y, logp, memory, b, ar):
    if sum(gaps(logp)[i] for i in left) / len(left) >= 1.5 - 1.2 * k / (n - 1):
        return set(range(b)), tuple(logp[i].argmax().item() if i in left else y[i] for i in range(b)), memory
    return rule_confidence(k, n, left, y, logp, None, b, ar)[:2] + (memory,)


def test_the_limit_of_sched_falls_as_its_shape_says(monkeypatch):
    limits = []
    monkeypatch.setattr(unmasking, "early_exit", lambda block, statistic, limit: limits.append(limit) or [])
    for shape, at in (
        ("linear", (8, 5, 2)),
        ("cosine", (8, 5, 2)),
        ("exp", (8, 2 + 6 * math.exp(-1.5), 2 + 6 * math.exp(-3))),
    ):
        assert (
            list(
                unmasking.sched(
                    None, high=8.0, low=2.0, shape=shape, **({"decay": 3.0} if shape == "exp" else {})
                )
            )
            == []
        )
        assert [limits[-1](r) for r in (0, 0.5, 1)] == pytest.approx(at)
    list(unmasking.sched(None, high=8.0, low=2.0, shape="cosine"))
    assert limits[-1](0.25) == pytest.approx(5 + 3 * math.cos(math.pi / 4))


def rule_agreement(k, n, left, y, logp, memory, b, ar):
    p = ar[y]
    agree = {i for i in left if p[i].argmax().item() == y[i]}
    return agree | set(order({i: p[i, y[i]].item() for i in left}, left)[:1]), y, memory


RULES = [
    (s.confidence, {}, rule_confidence, 2),
    (s.confidence, {}, rule_confidence, 5),
    (s.threshold, {"threshold": 0.6}, rule_threshold, 3),
    (s.threshold, {"threshold": 0.6}, rule_threshold, 2),
    (s.factor, {"factor": 1.5}, rule_factor, 3),
    (s.entropy_bound, {"bound": 0.6}, rule_entropy_bound, 3),
    (s.rcr, {}, rule_rcr, 3),
    (s.saber, {}, rule_saber, 3),
    (s.prophet, {"high": 1.5, "middle": 1.1, "low": 0.8}, rule_prophet, 3),
    (s.sched, {"high": 1.5, "low": 0.3}, rule_sched, 3),
    (s.agreement, {}, rule_agreement, 3),
]


UNIFORM_RULES = [
    r
    for r in RULES
    if r[3] == 3 and r[0] in (s.confidence, s.threshold, s.entropy_bound, s.rcr, s.saber, s.sched)
]


@functools.cache
def by_the_rule(kind, seed, soft, rule, steps, b):
    """
    The exact distribution of a committing sampler's blocks behind one prompt token (masks alone would be in
    one and the same place).
    """
    model, process = setup(kind, seed, soft)
    noise = [process.mask_id] if process.mask_id is not None else list(range(V3))
    tables = [
        table(model, process, b, n / (b - 1)) for n in range(b - 1)
    ]  # the noise level is the share that is committed
    real = states(V3, b)
    ar = by_hand(ar_probs(model, process, real), real)
    exits = []

    def step(k, x, memory):
        committed, inner = memory
        left = [i for i in range(1, b) if i not in committed]
        if not left:
            return [(1.0, x, memory)]
        logp, out = tables[b - 1 - len(left)][x], []
        p = logp.exp().tolist()
        for guess in itertools.product(range(V3), repeat=len(left)):
            y = list(x)
            for i, v in zip(left, guess, strict=True):
                y[i] = v
            keep, new, m = rule(k, steps, left, tuple(y), logp, inner, b, ar)
            keep = (
                keep if rule in (rule_rcr, rule_saber) else keep | committed
            )  # the others take nothing back
            keep = frozenset(range(1, b)) if k + 1 == steps else frozenset(keep)
            exits.append(new != tuple(y))
            fresh = [i for i in range(1, b) if i not in keep]
            for fill in itertools.product(noise, repeat=len(fresh)):
                z = list(new)
                for i, v in zip(fresh, fill, strict=True):
                    z[i] = v
                w = math.prod(p[i][y[i]] for i in left) / len(noise) ** len(fresh)
                out.append((w, tuple(z), (keep, m)))
        return out

    found = {}
    for first in itertools.product(noise, repeat=b - 1):
        for x, q in tree(step, (1, *first), steps, (frozenset(), None)).items():
            found[x] = found.get(x, 0.0) + q / len(noise) ** (b - 1)
    return dense(found, b), any(exits)


QUICK_RULES = [("fast", *rule) for rule in RULES[1:6:2]]
ALL_RULES = [("fast", *rule) for rule in RULES] + [("lesson", *rule) for rule in RULES[1::3]]


@pytest.mark.parametrize(
    "path, sampler, options, rule, steps",
    slow(ALL_RULES, QUICK_RULES),
    ids=lambda v: getattr(v, "__name__", None),
)
def test_committing_samplers_follow_their_rule(path, sampler, options, rule, steps):
    """And the test tells every rule from every other."""
    net_of = ("masked", 18, 2.0)
    model, process = setup(*net_of, path)
    b = 5 if sampler is s.saber else 4  # taking back needs a second step with two to commit
    p, exits = by_the_rule(*net_of, rule, steps, b)
    others = (
        [by_the_rule(*net_of, r, 3, b)[0] for r in {r for *_, r, _ in RULES} - {rule}] if steps == 3 else []
    )
    others += [by_the_rule(*net_of, rule_saber_that_keeps, 3, b)[0]] if sampler is s.saber else []
    draws(blocks(model, process, b, N, sampler, prompt=(1,), steps=steps, **options), p, *others)
    assert exits == (sampler in (s.prophet, s.sched)), "early exits happen here, and only there"


@pytest.mark.parametrize("kind, seed, soft", slow(FLAGGED, FLAGGED[:1]))
@pytest.mark.parametrize(
    "sampler, options, rule, steps",
    slow(UNIFORM_RULES, UNIFORM_RULES[1::2]),
    ids=lambda v: getattr(v, "__name__", None),
)
def test_on_uniform_noise_they_keep_flags_and_refill_with_fresh_noise(
    kind, seed, soft, sampler, options, rule, steps
):
    model, process = setup(kind, seed, soft)
    p, _ = by_the_rule(kind, seed, soft, rule, steps, 3)
    draws(blocks(model, process, 3, N, sampler, prompt=(1,), steps=steps, **options), p)


# ----- the AR mode as a guide


EDLM = [("fast", kind) for kind in ("masked", "uniform denoiser, ar token", "uniform loo")]


@pytest.mark.slow
@pytest.mark.parametrize("path, kind", [*EDLM, ("lesson", "masked")])
def test_edlm_chooses_by_p_ar_over_p(path, kind):
    """
    Two candidates, two steps on two tokens: every pair of candidates enumerated; the AR mode asked token by
    token.
    """
    model, process = setup(kind, path=path)
    b, V = 2, process.vocab_size
    real = states(V3, b)
    joint = ar_probs(model, process, real).gather(-1, real[..., None])[..., 0].prod(-1)  # p_AR(y)

    def step(k, x, logits, a_t, a_s):
        D = process.denoiser_logits(logits, x, a_t).softmax(-1)
        q = torch.stack([D[:, i][:, real[:, i]] for i in range(b)]).prod(0)  # (m, letters)
        q_xt = torch.ones(len(x), len(real)).double()
        if process.mask_id is None:
            q_xt = ((x[:, None] == real[None]) * a_t + (1 - a_t) / V).prod(-1)
        w = torch.where(q > 0, joint * q_xt / q.clamp(min=1e-300), 0.0)
        pair = q[:, :, None] * q[:, None, :]
        win = torch.where(pair > 0, w[:, :, None] / (w[:, :, None] + w[:, None, :]).clamp(min=1e-300), 0.0)
        chosen = (pair * win).sum(2) + (pair * (1 - win)).sum(
            1
        )  # y as the first of the pair, and as the second
        out = torch.zeros(len(x), len(x)).double()
        for j, y in enumerate(real):
            sure = (
                torch.full((len(x), b, V), -math.inf)
                .double()
                .scatter(-1, y.expand(len(x), b)[..., None], 0.0)
            )
            out += chosen[:, j, None] * product(process.posterior_probs(sure, x, a_t, a_s), x)
        return out

    p = chain(model, process, b, GRID[2], step)
    plain = chain(model, process, b, GRID[2], reverse(process))
    draws(blocks(model, process, b, N, s.edlm, steps=2, candidates=2), p, plain)
    window = lambda k, *a: step(k, *a) if k == 1 else reverse(process)(k, *a)
    draws(
        blocks(model, process, b, N, s.edlm, steps=2, candidates=2, start=0.5),
        chain(model, process, b, GRID[2], window),
    )
    # temperature and top_p sharpen both modes; a prompt token that is outside the nucleus must not spoil the
    # weights
    real = states(V3, 3)
    p = ar_probs(model, process, real)
    prompt = int(p[0, 0, :V3].argmin())
    real, p = (
        real[real[:, 0] == prompt],
        rng.sharpen(p[real[:, 0] == prompt].clamp(min=1e-300).log(), 0.7, 0.8).softmax(-1),
    )
    target = p[:, 1:].gather(-1, real[:, 1:, None])[..., 0].prod(-1)
    counts = blocks(
        model,
        process,
        3,
        20_000,
        s.edlm,
        prompt=(prompt,),
        steps=1,
        candidates=60,
        temperature=0.7,
        top_p=0.8,
    )
    gap = (counts[code(real, V3)] / counts.sum() - target).abs().sum() / 2
    assert abs(target.sum() - 1) < 1e-9 and gap < 0.03, (
        f"many candidates draw from the sharpened AR mode, total variation {gap:.3f}"
    )
    if (
        process.mask_id is not None
    ):  # with many candidates the block is a draw of the AR mode, whatever the diffusion mode thinks
        draws(blocks(model, process, b, 5_000, s.edlm, steps=1, candidates=200), joint, plain)


def ar_blocks(model, process, b, temperature=1.0, top_p=1.0):
    """The distribution of a block by AR sampling, enumerated."""
    real = states(V3, b)
    p = ar_probs(model, process, real).clamp(min=1e-300).log()
    p = rng.sharpen(p, temperature, top_p).softmax(-1)
    return p.gather(-1, real[..., None])[..., 0].prod(-1)


RULES_OF_DRAFTS = [
    ("diffusion", "rejection"),
    ("merged", "rejection"),
    ("merged", "coupled"),
    ("diffusion", "coupled"),
    ("random", "coupled"),
]
DRAFTED = [("fast", k, *how) for how in RULES_OF_DRAFTS for k in ("masked", "uniform denoiser, ar token")]
DRAFTED += [("lesson", "masked", "diffusion", "rejection"), ("lesson", "masked", "merged", "coupled")]
QUICK_DRAFTS = [("fast", *draft[1:]) for draft in DRAFTED[-2:]]


@pytest.mark.parametrize("path, kind, draft, rule", slow(DRAFTED, QUICK_DRAFTS))
def test_speculation_draws_the_ar_distribution_of_whole_blocks(path, kind, draft, rule, monkeypatch):
    model, process = setup(kind, {"masked": 0, "uniform denoiser, ar token": 45}[kind], 0.5, path)
    p = ar_blocks(model, process, 3)
    one_step = chain(model, process, 3, GRID[1], reverse(process))
    assert (p - one_step).abs().sum() / 2 > 0.3, "the draft is bad enough to be rejected"
    assert p.min() * N > 20, f"the rarest block is expected {p.min() * N:.0f} times"
    draws(blocks(model, process, 3, N, s.speculation, draft=draft, rule=rule), p, one_step)
    if rule == "rejection":
        sharp = ar_blocks(model, process, 3, 0.7, 0.9)
        draws(
            blocks(model, process, 3, N, s.speculation, draft=draft, rule=rule, temperature=0.7, top_p=0.9),
            sharp,
            p,
        )
        monkeypatch.setattr(guided, "residual", lambda p, q: p)
        wrong = blocks(model, process, 3, N, s.speculation, draft=draft, rule=rule)
        assert chi_squared(wrong, p) < 1e-12, (
            "a rejection redrawn from p_AR and not from max(p_AR - q, 0) is seen"
        )


SHARPER = [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8}]


@pytest.mark.parametrize("draft", ["merged", "diffusion", "first", "random"])
@pytest.mark.parametrize("kind", slow(KINDS, ["masked", "uniform denoiser, ar token"]))
@pytest.mark.parametrize("how", slow(SHARPER, SHARPER[1:]))
@FAST_FIRST
def test_coupled_speculation_writes_the_very_tokens_of_ar(path, kind, draft, how):
    make, kw = KINDS[kind]
    process, generate = make(), GENERATE[path]
    model, process = on(path, net(process, seed=5, **kw).double(), process)
    prompts = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0), (1, 0)] * 6
    ar = last(generate(model, process, prompts, block_size=1, max_new_tokens=3, seed=7, **how))
    drafted = last(
        generate(
            model,
            process,
            prompts,
            block_size=4,
            sampler=s.speculation,
            draft=draft,
            max_new_tokens=3,
            seed=7,
            **how,
        )
    )
    assert torch.equal(ar.x, drafted.x[:, : ar.x.size(1)])
    stop = {"eos_id": 1, **how}
    ar = last(generate(model, process, prompts, block_size=1, max_new_tokens=3, seed=7, **stop))
    drafted = last(
        generate(
            model,
            process,
            prompts,
            block_size=4,
            sampler=s.speculation,
            draft=draft,
            max_new_tokens=3,
            seed=7,
            **stop,
        )
    )
    assert torch.equal(ar.x, drafted.x[:, : ar.x.size(1)]) and torch.equal(ar.done, drafted.done)


def test_speculation_needs_few_passes_where_the_modes_agree():
    model, process = small(d.Masked(V3 + 1, V3))
    torch.nn.init.zeros_(model.head.weight)  # the same answer to everything: every draft is right
    count = lambda **kw: last(
        generate(model, process, [()] * 3, block_size=8, sampler=s.speculation, **kw)
    ).nfe_rows.tolist()
    assert count() == [2] * 3 == count(draft="diffusion") == count(draft="first"), "one draft, one check"
    assert count(draft="random")[0] in (1, 2), "the first check makes the guesses, the second confirms them"
    for bad in ({"draft": "best"}, {"rule": "best"}, {"draft": "random", "rule": "rejection"}, {"steps": 3}):
        with pytest.raises(ValueError):
            count(**bad)


# ----- the loop's promises, for every sampler

RAGGED = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0), (1, 0)]


def served(kind):
    cannot = "redraws" if KINDS[kind][0]().absorbing else "absorbing"
    return [f for f in ALL.values() if f is not s.ar and cannot not in f.needs]


SERVED = [(k, f) for k in KINDS for f in served(k)]


def test_every_sampler_is_served_by_some_noise():
    assert len(ALL) == 30 and {f for _, f in SERVED} | {s.ar} == set(ALL.values())


FIRST = list({f: (k, f) for k, f in reversed(SERVED)}.values())  # of each sampler, the first noise it serves
SIBLINGS = (s.remdm_cap, s.remdm_rescale, s.sdar, s.a2d)  # of remdm_loop and fast_dllm: in make test-all
FIRST = [(k, f) for k, f in FIRST if f not in SIBLINGS]


@pytest.mark.parametrize("kind, sampler", slow(SERVED, FIRST), ids=lambda v: getattr(v, "__name__", v))
@FAST_FIRST
def test_every_sampler_keeps_the_promises_of_the_loop(path, kind, sampler):
    make, kw = KINDS[kind]
    process, generate = make(), GENERATE[path]
    model = net(process, **kw).double()
    model.head.weight.data *= 0.03
    model.head.bias.data *= 0.03
    model, process = on(path, model, process)
    steps = {} if "own pace" in sampler.needs else {"steps": 3}
    passes = []
    forward = model.forward
    size = lambda clean, noisy, *a: (0 if clean is None else clean.numel()) + noisy.numel()
    count = lambda *a, **kw: passes.append(size(*a)) or forward(*a, **kw)
    usual = {"block_size": 4, "sampler": sampler, "max_new_tokens": 3, "seed": 5, **steps}
    run = lambda prompts, **k: last(generate(model, process, prompts, **usual | k))
    model.forward = count
    together = run(RAGGED)
    assert together.nfe == len(passes) and together.token_forwards == sum(passes), (
        "every pass and every token is counted"
    )
    model.forward = forward
    assert together.done.all() and (together.nfe_rows <= together.nfe).all() and (together.nfe_rows > 0).all()
    assert torch.equal(run(RAGGED, use_cache=False).x, together.x), "cached = uncached"
    assert not torch.equal(run(RAGGED, seed=6).x, together.x)
    for i, prompt in enumerate(RAGGED):
        n = len(prompt)
        assert together.x[i, :n].tolist() == list(prompt), "the prompt stays"
        assert ((together.x[i, n : n + 3] >= 0) & (together.x[i, n : n + 3] < V3)).all() and (
            together.x[i, n + 3 :] == NOTHING
        ).all()
        alone = run([prompt] * (i + 1))  # same row number, other mates
        assert (
            torch.equal(alone.x[i, : n + 3], together.x[i, : n + 3])
            and alone.nfe_rows[i] == together.nfe_rows[i]
        )
    longest = run([(), (1, 2)], max_new_tokens=6, steps=None)  # more than one block; default steps
    assert (longest.x[:, :6] >= 0).all() and (longest.x < V3).all()
    cold = run(RAGGED * 3, temperature=0.0)
    assert (cold.x[cold.x != NOTHING] < V3).all()
    for how in (
        {"ar_tokens": 1},
        {"ar_tokens": 2, "eos_id": 1},
        {"eos_id": 1},
        {"top_p": 0.8, "temperature": 0.7},
    ):
        both = [run(RAGGED * 2, use_cache=cached, **how) for cached in (True, False)]
        assert torch.equal(both[0].x, both[1].x) and torch.equal(both[0].done, both[1].done), how


@pytest.mark.parametrize("kind", slow(["masked", "uniform denoiser, timed"], ["masked"]))
@FAST_FIRST
def test_settings_that_float32_cannot_hold_are_greedy_or_uniform(path, kind):
    make, kw = KINDS[kind]
    model, process = on(path, net(make(), **kw), make())
    for sampler in (*served(kind), s.ar):
        how = {"block_size": 1 if sampler is s.ar else 4, "sampler": sampler, "max_new_tokens": 4}
        how |= {} if "own pace" in sampler.needs else {"steps": None if sampler is s.ar else 2}
        run = lambda **k: last(GENERATE[path](model, process, [(), (1,)] * 4, **how, **k)).x  # noqa: B023
        greedy = run(temperature=0.0)
        for tiny in ({"top_p": 1e-50}, {"temperature": 1e-50}, {"temperature": 1e39, "top_p": 1e-320}):
            x = run(**tiny)
            assert ((x >= 0) == (greedy >= 0)).all() and (x < V3).all(), "nothing is missing"
            if sampler in (s.ar, s.ancestral):  # at 1e39 too, for top_p leaves one token
                assert torch.equal(x, greedy), tiny


@pytest.mark.parametrize(
    "process", [d.Masked(2, 1), d.Uniform(1), d.Uniform(1, "loo")], ids=["masked", "denoiser", "loo"]
)
@FAST_FIRST
def test_a_vocabulary_of_one(path, process):
    model, process = on(path, net(process), process)
    for sampler in ALL.values():
        if ("redraws" if process.absorbing else "absorbing") in sampler.needs:
            continue
        how = {"block_size": 1 if sampler is s.ar else 4, "sampler": sampler, "max_new_tokens": 4}
        assert (last(GENERATE[path](model, process, [(), (0,)], **how)).x[0, :4] == 0).all(), sampler.__name__


LESS_SURE = {  # options under which the networks below do not always do the same
    "threshold": {"threshold": 0.5},
    "factor": {"factor": 1.5},
    "entropy_bound": {"bound": 0.8},
    "prophet": {"high": 1.5, "middle": 1.1, "low": 0.8},
    "sched": {"high": 1.5},
    "remdm_cap": {"eta": 0.3},
    "remdm_rescale": {"eta": 0.5},
    "remdm_loop": {"alpha_on": 0.6, "eta": 0.3},
    "gibbs": {"resample": 1},
    "dynamic_blocks": {"choose": "random"},
    "sdar": {"threshold": 0.4},
    "fast_dllm": {"threshold": 0.4},
}


SOFT = [("masked", 18, 1.0), ("uniform loo", 0, 1.0), ("uniform denoiser, timed", 18, 0.5)]

COMPARED = list({f: (f.__name__, *n) for n in SOFT[::-2] for f in (*served(n[0]), s.ar)}.values())[::4]


@pytest.mark.parametrize(
    "name, kind, seed, soft", slow([(f.__name__, *n) for n in SOFT for f in (*served(n[0]), s.ar)], COMPARED)
)
def test_the_lesson_and_the_fast_form_draw_from_one_distribution(name, kind, seed, soft):
    """
    All samplers. If the two are equal the test fails for one seed in 10,000 (P_VALUE). It sees a total
    variation of 6 %.
    """
    found = []
    for i, path in enumerate(GENERATE):
        model, process = setup(kind, seed, soft, path)
        how = {"block_size": 3, "max_new_tokens": 2} | LESS_SURE.get(name, {})
        how = {"block_size": 1, "max_new_tokens": 3} if name == "ar" else how
        how |= {} if "own pace" in ALL[name].needs else {"steps": 4}
        prompts = torch.tensor([()] if name == "ar" else [(1,)], dtype=torch.long).expand(6000, -1)
        x = last(GENERATE[path](model, process, prompts, sampler=ALL[name], seed=i, use_cache=False, **how)).x
        found.append(code(x, V3).bincount(minlength=V3**3))
    assert (found[0] > 100).sum() > 2, "there is something to compare"
    assert one_source(*found) > P_VALUE, found


def test_rows_that_are_finished_are_not_forwarded():
    (model, process), sizes = small(d.Masked(V3 + 1, V3), seed=3), []
    forward = model.forward
    model.forward = lambda clean, noisy, *a, **kw: sizes.append(len(noisy)) or forward(clean, noisy, *a, **kw)
    state = last(generate(model, process, [()] * 64, block_size=8, sampler=s.threshold, threshold=0.7))
    assert sizes[0] == 64 > sizes[2] > 0 and sorted(sizes, reverse=True) == sizes
    assert sum(sizes) == state.nfe_rows.sum() and state.nfe == len(sizes) == state.nfe_rows.max()
    assert len(set(state.nfe_rows.tolist())) > 1, "rows differ in how many passes they need"


def test_a_prediction_is_used_again_while_nothing_has_changed():
    """
    A prediction of a network that does not see the time lasts until the text changes; any network is asked
    only where a mask lifts.
    """
    for timed in (False, True):
        model, process = small(d.Masked(V3 + 1, V3), time_conditioning=timed)
        seen = list(generate(model, process, [()] * 16, block_size=4, steps=32, max_new_tokens=4))
        changes = torch.stack([(a.x != b.x).any(1) for a, b in itertools.pairwise(seen[1:])])  # (steps, rows)
        assert seen[-1].nfe_rows.tolist() == changes.sum(0).tolist(), (
            "a pass where a mask lifts, and no other"
        )
    process = d.Masked(V3 + 1, V3)
    plain, timed = net(process).double(), net(process, time_conditioning=True).double()
    timed.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for modulation in [timed.modulation] + [
            layer.modulation for layer in timed.layers
        ]:  # it could see the time
            modulation.weight.zero_()
            gates = torch.arange(len(modulation.bias)) // plain.cfg.d_model % 3 == 2
            modulation.bias.copy_(gates.double())
    usual, asked = (
        last(generate(*on("fast", m, process), [()] * 16, block_size=4, steps=32)) for m in (plain, timed)
    )
    assert torch.equal(usual.x, asked.x)
    psi = {"block_size": 4, "steps": 32, "sampler": s.psi, "kappa": "posterior"}
    usual, asked = (last(generate(*on("fast", m, process), [()] * 16, **psi)) for m in (plain, timed))
    assert torch.equal(usual.x, asked.x) and usual.nfe < asked.nfe == 64


@pytest.mark.parametrize("predicts", ["loo", "denoiser"])
@PATHS
def test_greedy_tail(path, predicts):
    model, process = small(d.Masked(V3 + 1, V3), path=path)
    model.double()
    run = lambda m, p, **k: last(GENERATE[path](m, p, [()] * 8, block_size=8, **k))
    assert torch.equal(
        run(model, process, steps=1, greedy_tail=True).x, run(model, process, steps=1, temperature=0.0).x
    ), "the last fill"
    assert not torch.equal(run(model, process, steps=4, greedy_tail=True).x, run(model, process, steps=4).x)
    model, uniform = small(d.Uniform(V3, predicts), path=path, time_conditioning=True)
    model.double()
    for sampler in (s.ancestral, s.psi):
        state, before = (
            run(model, uniform, steps=2, sampler=sampler, **kw) for kw in ({"greedy_tail": True}, {})
        )
        with torch.no_grad():
            logits = model(None, before.x, 8, sigma=torch.full((8,), -math.log1p(-1e-5)))
        assert state.nfe == before.nfe + 1 and torch.equal(state.x, logits.argmax(-1)), (
            "one pass more, argmax of what the network says"
        )


def test_samplers_that_a_checkpoint_cannot_serve_are_refused():
    masked, uniform = d.Masked(V3 + 1, V3), d.Uniform(V3)

    def run(process, sampler, **k):
        model, process = small(process, **k.pop("net", {}))
        last(generate(model, process, [()], **{"block_size": 4, "sampler": sampler, **k}))

    for f in ALL.values():
        if "redraws" in f.needs:
            with pytest.raises(ValueError, match="masked noise"):
                run(masked, f)
        if "absorbing" in f.needs:
            with pytest.raises(ValueError, match="uniform noise"):
                run(uniform, f)
    for f in (s.arpc, s.edlm, s.agreement, s.speculation):
        with pytest.raises(ValueError, match="without 1 it has no AR mode"):
            run(masked, f, trained=[4, 8])
        with pytest.raises(ValueError, match="block-causal"):
            run(masked, f, net={"clean_causal": False})
    run(masked, s.arpc, trained=[4], corruption="diffusion")  # needs no AR mode
    with pytest.raises(ValueError, match="steps mean nothing"):
        run(masked, s.first_hitting, steps=3)
    with pytest.raises(ValueError, match="no options"):
        run(masked, s.ancestral, block_size=1, greedy_tail=True)
    with pytest.raises(ValueError, match="steps mean nothing"):
        run(masked, s.ancestral, block_size=1, steps=3)
    with pytest.raises(ValueError, match="belong together"):
        run(masked, s.arpc, block_size=1)
    with pytest.raises(ValueError, match="not 4"):
        run(masked, s.ancestral, trained=[1, 8])
    for f, bad in (
        (s.psi, {"eta": 2.0}),
        (s.remdm_cap, {"eta": -1.0}),
        (s.remdm_loop, {"eta": 0.5}),
        (s.threshold, {"threshold": 2.0}),
        (s.factor, {"factor": -1.0}),
        (s.entropy_bound, {"bound": -1.0}),
        (s.saber, {"at_least": 0}),
        (s.sched, {"shape": "round"}),
        (s.sched, {"decay": 2.0}),
        (s.edlm, {"candidates": 1}),
        (s.edlm, {"start": 0.0}),
        (s.prophet, {"high": math.nan}),
        (s.arpc, {"corruption": "random", "verify_temperature": 0.5}),
        (s.psi, {"kappa": "pc", "eta": 0.1}),
        (s.remdm_loop, {"alpha_on": 0.0}),
    ):
        with pytest.raises(ValueError):
            run(masked, f, **bad)
    for bad in ({"badness": "worst"}, {"rounds": 0}, {"resample": 0}, {"spread": 0.0}):
        with pytest.raises(ValueError):
            run(uniform, s.gibbs, **bad)


def test_every_option_is_explained():
    for name, f in ALL.items():
        for p in inspect.signature(f).parameters.values():
            if p.kind is p.KEYWORD_ONLY:
                assert f"\n{p.name}: " in inspect.getdoc(f), f"{name}: {p.name}"
        assert (
            "arXiv" in inspect.getdoc(f)
            or f is s.ar
            or f is s.speculation
            or "2605.22765" in inspect.getdoc(f)
        ), name


def test_block_size_1_by_hand():
    """The helper's own check: one token after another has the enumerated AR distribution."""
    model, process = setup("masked")
    chain_rule = enumerated_ar(model, process, 3)
    p = ar_blocks(model, process, 3)
    # setup rounds logits to 1e-9
    assert all(abs(p[code(torch.tensor([seq]), V3)[0]] - q) < 1e-8 for seq, q in chain_rule.items())
