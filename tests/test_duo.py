"""
Why believe methods/duo.py? A closed form at V = 2, another quadrature, and brute-force Gaussians on small
vocabularies.
"""

import copy
import math

import pytest
import torch
from conftest import TINY
from exact import P_VALUE, V3, agree, chi_squared, net, noise, speed

import diffusion as d
import fast
from methods import duo
from options import TrainConfig
from run import checkpoint
from run.flags import load_with_method
from train import train

# ----- the transformation operator


@pytest.mark.parametrize(
    "V, gamma, alpha",
    [
        (50257, -3.55, 0.946),
        (50257, -3.0, 0.596),
        (50257, -2.5, 0.238),
        (50257, -1.85, 0.049),
        (30522, -3.5, 0.942),
        (30522, -1.75, 0.049),
    ],
)
def test_published_values(V, gamma, alpha):
    assert abs(duo.transform(torch.tensor(gamma), V)[0] - alpha) < 6e-4


def test_two_tokens_have_a_closed_form():
    """
    V = 2: x_0 wins if a difference of two normal numbers falls below mu, so P = Phi(mu / sqrt 2) and T =
    erf(mu / 2).
    """
    gamma = torch.linspace(-6, 12, 50, dtype=torch.float64)
    mu = (-gamma / 2).exp()
    alpha, slope = duo.transform(gamma, 2)
    assert (alpha - torch.erf(mu / 2)).abs().max() < 1e-13
    assert (slope - (-mu / 2) * (-mu * mu / 4).exp() / math.sqrt(math.pi)).abs().max() < 1e-13


@pytest.mark.parametrize("V", [3, 65, 50257, 250_000])
def test_the_quadrature_has_converged(V):
    """Against a fine step on another interval, and the slope against differences."""
    gamma = torch.linspace(-6, 4, 21, dtype=torch.float64)
    mu = (-gamma / 2).exp()[:, None]
    z = torch.linspace(-12, 32, 20001, dtype=torch.float64)
    P = torch.trapezoid((-((z - mu) ** 2) / 2 + (V - 1) * torch.special.log_ndtr(z)).exp(), z) / math.sqrt(
        2 * math.pi
    )
    alpha, slope = duo.transform(gamma, V)
    assert (alpha - (V * P - 1) / (V - 1)).abs().max() < 1e-11
    h = 1e-4
    differences = (duo.transform(gamma + h, V)[0] - duo.transform(gamma - h, V)[0]) / (2 * h)
    assert (slope - differences).abs().max() < 1e-7
    assert (slope < 1e-14).all() and 0 <= alpha[-1] < alpha[0] <= 1
    for a in (0.05, 0.95):
        assert abs(duo.transform(torch.tensor(duo.gamma_of(a, V), dtype=torch.float64), V)[0] - a) < 1e-9


# ----- soft tokens


def brute(x0, gamma, V, seed):
    """w_t (n, V) by torch's own normal numbers."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(len(x0), V, generator=g, dtype=torch.float64) * math.sqrt(1 / (1 + math.exp(-gamma)))
    w[torch.arange(len(x0)), x0] += math.sqrt(1 / (1 + math.exp(gamma)))
    return w


def uniform_diffusion(V, gamma, x0):
    alpha = duo.transform(torch.tensor(gamma), V)[0].item()
    p = torch.full((V,), (1 - alpha) / V, dtype=torch.float64)
    p[x0] += alpha
    return p


@pytest.mark.parametrize("V, gamma", [(4, -1.0), (4, 1.5), (40, -2.0), (40, -3.5)])
def test_argmax_is_uniform_diffusion(V, gamma):
    n = 40_000
    x0 = torch.full((n, 1), 2)
    p = uniform_diffusion(V, gamma, 2)
    assert chi_squared(brute(x0[:, 0], gamma, V, 0).argmax(-1).bincount(minlength=V), p) > P_VALUE
    for k in (0, 2, 3):
        if k:
            ids, weights, xt = duo.soften_top(x0, torch.full((n,), gamma), V, 1e-3, k, noise(n))
            assert (ids.gather(-1, weights.argmax(-1, keepdim=True))[..., 0] == xt).all()
        else:
            weights, xt = duo.soften(x0, torch.full((n,), gamma), V, 1e-3, noise(n))
            assert (weights.argmax(-1) == xt).all() and (weights.sum(-1) - 1).abs().max() < 1e-12
        assert chi_squared(xt[:, 0].bincount(minlength=V), p) > P_VALUE


def test_the_published_choice_of_xt_is_not_the_argmax():
    """
    It takes x_0 as soon as it is larger than the last of the k kept: right for k = 1, far off for k = 3.
    """
    V, gamma, n = 12, 0.0, 40_000
    w = brute(torch.zeros(n, dtype=torch.long), gamma, V, 1)
    others = w[:, 1:].sort(-1, descending=True)
    p = uniform_diffusion(V, gamma, 0)
    for k, agrees in ((1, True), (3, False)):
        published = torch.where(w[:, 0] > others.values[:, k - 1], 0, others.indices[:, 0] + 1)
        assert (chi_squared(published.bincount(minlength=V), p) > P_VALUE) == agrees
        if not agrees:
            assert (published == 0).double().mean() > p[0] + 0.1


def two_samples(a, b, n_bins=12):
    """
    Chi-squared of two samples of a number: b's counts in the bins that hold equal shares of a, as if those
    were exact.
    """
    edges = a.quantile(torch.linspace(0, 1, n_bins + 1, dtype=a.dtype)[1:-1])
    return chi_squared(
        torch.bucketize(b.contiguous(), edges).bincount(minlength=n_bins),
        torch.full((n_bins,), 1 / n_bins, dtype=torch.float64),
    )


@pytest.mark.parametrize("V, k, gamma", [(6, 6, 0.0), (6, 3, 0.5), (40, 4, -2.0), (2, 2, 0.0)])
def test_the_largest_of_many_are_the_largest_of_many(V, k, gamma):
    """
    Kept entries against brute force: order and identity of the ids, gaps between the entries, the value of
    x_0's against them.
    """
    n, tau, m = 10_000, 0.3, 150_000
    x0 = torch.full((n, 1), 1)
    ids, weights, _ = (y[:, 0] for y in duo.soften_top(x0, torch.full((n,), gamma), V, tau, k, noise(n)))
    assert (ids[:, 0] == 1).all() and (ids.sort(-1).values.diff() > 0).all() and ids.max() < V
    pairs = (
        chi_squared((ids[:, 1] * V + ids[:, -1]).bincount(minlength=V * V), ordered_pairs(V, k))
        if k > 2
        else 1.0
    )
    assert pairs > P_VALUE
    w = brute(torch.ones(m, dtype=torch.long), gamma, V, 2)
    top = torch.cat((w[:, :1], w[:, 2:]), 1).sort(-1, descending=True).values[:, : k - 1]
    kept = torch.cat((w[:, 1:2], top), 1) / tau
    gaps, exact = (weights / weights[:, 1:2]).log(), kept - kept[:, 1:2]
    for j in [0] + list(range(2, k)):
        assert two_samples(exact[:, j], gaps[:, j]) > P_VALUE, f"entry {j} against the largest of the others"
    if k == V:  # nothing left out: the weights themselves
        assert (weights.sum(-1) - 1).abs().max() < 1e-12
        for j in range(k):
            assert two_samples(kept.softmax(-1)[:, j], weights[:, j]) > P_VALUE


def ordered_pairs(V, k):
    """p(second id, last id) for k - 1 different ones, neither of them 1, in random order."""
    p = torch.ones(V, V, dtype=torch.float64)
    p[1], p[:, 1] = 0, 0
    return ((1 - torch.eye(V)) * p if k > 2 else p * torch.eye(V)).flatten() / ((V - 1) * (V - 2))


@pytest.mark.parametrize("V, k, tau", [(12, 3, 1.0), (12, 2, 0.03), (50257, 2, 1e-3), (50257, 4, 1e-2)])
def test_the_weight_left_out_has_the_right_mean(V, k, tau):
    """
    (1 - sum of the kept weights) / (weight of the last kept), given its value c, against quadrature over what
    lies below c.
    """
    gamma, n, checked = 0.3, 100, 0
    s = math.sqrt(1 / (1 + math.exp(-gamma)))
    nz = noise(n)
    u = copy.copy(nz).uniform(2 * k - 1)  # the same random numbers, read the same way
    g = -torch.special.ndtri(-(u[..., 1:k].log() / (V - 1 - torch.arange(k - 1))).cumsum(-1).expm1())
    _, weights, _ = duo.soften_top(
        torch.zeros(n, 1, dtype=torch.long), torch.full((n,), gamma), V, tau, k, nz
    )
    for row in range(n):
        c, left_out = g[row, 0, -1], 1 - weights[row].sum()
        if left_out < 1e-7:
            continue  # rounding
        x = torch.linspace(c - min(12, 50 * tau), c, 20_001, dtype=torch.float64)
        f = (s * (x - c) / tau - x * x / 2).exp()
        mean = (
            torch.trapezoid(f, x) / math.sqrt(2 * math.pi) / (0.5 * torch.erfc(-c / math.sqrt(2)))
        )  # in units of exp(s c / tau)
        assert abs(left_out / weights[row, 0, -1] / ((V - k) * mean) - 1) < 1e-5, (row, tau)
        checked += 1
    assert checked > 20


def test_the_ends_of_the_unit_interval_are_finite():
    for dtype in (torch.float32, torch.float64):
        assert duo._normal(torch.tensor([0.0, 1.0], dtype=dtype)).isfinite().all()


def test_the_cost_does_not_depend_on_the_vocabulary():
    """A million million tokens, and nothing overflows or takes their room."""
    V, x0 = 10**12, torch.arange(64)[:, None] * 10**10
    ids, weights, xt = duo.soften_top(x0, torch.full((64,), -3.9), V, 1e-3, 8, noise(64))
    assert (
        ids.min() >= 0
        and ids.max() < V
        and weights.isfinite().all()
        and ((xt == x0) | (xt == ids[..., 1])).all()
    )


@pytest.mark.parametrize("gamma", [-12.0, 12.0])
@pytest.mark.parametrize("tau", [1e-9, 1e-3, 10.0])
def test_extremes_are_finite(gamma, tau):
    for V in (2, 65, 250_000):
        for k in {2, min(V, 8)}:
            _, weights, _ = duo.soften_top(
                torch.zeros(50, 4, dtype=torch.long), torch.full((50,), gamma), V, tau, k, noise(50, 4)
            )
            assert weights.isfinite().all() and (weights >= 0).all() and weights.sum(-1).max() < 1 + 1e-9


# ----- the network's input


@pytest.mark.parametrize("form", ["lesson", "fast"])
def test_soft_tokens_are_mixtures_of_embeddings_and_gradients_flow(form):
    process = d.Uniform(V3, ar_token=V3)
    model = net(process, time_conditioning=True).double()
    if form == "fast":
        model, process = speed(model, process)
    x0, level = torch.randint(V3, (3, 8)), torch.rand(3)
    hard = model(x0, x0.flip(1), 4, sigma=level)
    dense = torch.nn.functional.one_hot(x0.flip(1), V3).double()
    pair = (x0.flip(1)[..., None], torch.ones(3, 8, 1, dtype=torch.float64))
    for soft in (dense, pair):
        agree(model(x0, soft, 4, sigma=level), hard)
    weights = torch.rand(3, 8, V3).double().softmax(-1)
    all_ids = torch.arange(V3).expand(3, 8, V3)
    grads = []
    for soft in (weights, (all_ids, weights)):
        logits = model(x0[:, :0], soft, 8, sigma=level)
        grads.append((logits.detach(), torch.autograd.grad(logits.square().sum(), model.embed.weight)[0]))
    (za, ga), (zb, gb) = grads
    agree([za, ga], [zb, gb])
    assert ga[:V3].abs().min() > 0 and (za - hard).abs().max() > 0.1
    model, weights = model.float(), weights.float()
    with torch.autocast("cpu", torch.bfloat16):  # embeddings are not rounded on the way in, soft or hard
        assert (
            model.embed_tokens((all_ids, weights)).dtype == model.embed_tokens(weights).dtype == torch.float32
        )


@pytest.mark.parametrize("k", [0, 2, 3])
@pytest.mark.parametrize("ar_token", [None, V3])
@pytest.mark.parametrize("form", ["lesson", "fast"])
def test_the_loss_reads_soft_tokens_and_is_taken_at_the_hard_ones(form, k, ar_token):
    """
    Rows of block size 1 and prompts are as without a curriculum; the rest is process.nll at T(gamma), times d
    gamma / dt.
    """
    lesson = d.Uniform(V3, ar_token=ar_token)
    model, process, token_loss = net(lesson, time_conditioning=True).double(), lesson, d.token_loss
    if form == "fast":
        model, process, token_loss = *speed(model, process), fast.token_loss
    relaxation = duo.Relaxation(process, tau=0.2, k=k, dtype=torch.float64)
    torch.manual_seed(0)
    x0, given = torch.randint(V3, (4, 8)), torch.zeros(4, 8, dtype=torch.bool)
    given[2, :3] = True
    charged = ~given
    charged[1, 6:] = False
    sizes, t = torch.tensor([1, 4, 8, 1]), torch.tensor([0.3, 0.1, 0.6, 0.9], dtype=torch.float64)
    seen = {}

    class Heard:
        """The network, which remembers what it was asked."""

        module = model

        def __call__(self, clean, noisy, block_size, start, sigma, **how):
            seen.update(noisy=noisy, sigma=sigma, logits=model(clean, noisy, block_size, start, sigma))
            return model(clean, noisy, block_size, start, sigma, **how)

    def loss_of(network, **how):
        return token_loss(network, process, x0, sizes, t, "elbo", given, charged, noise=noise(4, 8), **how)[1]

    loss = loss_of(Heard(), corrupt=relaxation)
    agree(loss[[0, 3]], lesson.ce(seen["logits"], x0, x0)[[0, 3]].detach())
    if ar_token is not None:  # one constant id, and no random numbers
        plain = loss_of(model)
        agree(loss[[0, 3]], plain[[0, 3]])
        assert (loss[1] - plain[1]).abs().max() > 0.1
    nz = noise(4, 8)
    process.prior(x0.shape, nz)
    soft, xt, alpha, dalpha = relaxation.corrupt(x0, t, nz)
    gamma = lambda t: relaxation.gamma_0 + (relaxation.gamma_1 - relaxation.gamma_0) * t
    slope = (duo.transform(gamma(t + 1e-5), V3)[0] - duo.transform(gamma(t - 1e-5), V3)[0]) / 2e-5
    # a difference quotient, no more exact than that
    assert torch.allclose(dalpha, slope, rtol=1e-7, atol=1e-9)
    agree(alpha, duo.transform(gamma(t), V3)[0])
    xt = torch.where(given, x0, xt)
    expected = torch.where(charged, lesson.nll(seen["logits"], x0, xt, alpha, dalpha), 0.0).detach()
    agree(loss[1:3], expected[1:3])
    assert (loss[2, :3] == 0).all() and (loss[1, 6:] == 0).all() and (expected[1, :6] > 0).any()
    agree(seen["sigma"][1:3], -alpha[1:3].log())
    assert seen["sigma"][0] == d.sigma(torch.zeros(()).double())
    ids, weights = seen["noisy"], None
    if relaxation.k:
        ids, weights = seen["noisy"]
    else:
        ids, weights = torch.arange(seen["noisy"].size(-1)).expand(4, 8, -1), seen["noisy"]
    read = lambda row, i: ids[row, i][weights[row, i] == 1].tolist()
    assert all(read(2, i) == [x0[2, i].item()] for i in range(3))
    if ar_token is not None:
        assert all(read(0, i) == [V3] for i in range(8))
    soft_row = (weights[1] > 0) & (weights[1] < 1)
    assert soft_row.any(-1).all(), (
        "tokens that carry no loss, and are no prompt, are as soft as their neighbours"
    )


def test_a_small_temperature_gives_hard_tokens():
    process = d.Uniform(V3)
    for k in (0, 2):
        soft, xt, *_ = duo.Relaxation(process, 1e-9, k).corrupt(
            torch.randint(V3, (50, 8)), torch.rand(50).double(), noise(50, 8)
        )
        ids, weights = soft if isinstance(soft, tuple) else (torch.arange(V3), soft)
        assert ((weights * ids).sum(-1) == xt).all()


# ----- training


def test_the_temperature_moves_evenly_in_its_logarithm():
    assert [round(duo.tau_at(i, 4, 1e-1, 1e-3), 9) for i in (0, 2, 4)] == [0.1, 0.01, 0.001]
    cfg, process = TrainConfig(process="uniform", max_steps=10), d.Uniform(V3)
    settings = duo.Settings(curriculum=4, tau=1e-1, tau_end=1e-3, soft_k=2)
    learner = duo.Learner(cfg, settings, None, process, d.token_loss)
    loss = [learner.loss(step) for step in range(10)]
    assert [f is d.token_loss for f in loss] == [False] * 4 + [True] * 6
    assert [f.keywords["corrupt"].tau for f in loss[:4]] == [duo.tau_at(i, 4, 1e-1, 1e-3) for i in range(4)]
    assert {f.keywords["corrupt"].k for f in loss[:4]} == {2} and all(
        f.func is d.token_loss for f in loss[:4]
    )
    half = duo.Settings()
    duo.check(cfg, half)
    assert half.curriculum == 5
    assert load_with_method(TrainConfig, ["--method=duo", "--max_steps=7"], set())[1].curriculum == 3


def run(*flags):
    base = [
        *TINY,
        "--seq_len=8",
        "--dataset=toy",
        "--block_sizes=1:0.25,4:0.75",
        "--max_steps=6",
        "--warmup=2",
        "--ema=0.5",
    ]
    train(*load_with_method(TrainConfig, [*base, *flags], set()))


def weights(out_dir, part="model"):
    return checkpoint.load(out_dir)[part]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_duo_trains_resumes_and_is_uniform_without_its_curriculum(project):
    run("--process=uniform", "--out_dir=uniform", "--lr_schedule=constant")
    run("--method=duo", "--out_dir=none", "--curriculum=0", "--lr_schedule=constant")
    assert same(weights("uniform"), weights("none"))
    for k in (0, 2):
        flags = ["--method=duo", f"--soft_k={k}", "--lr_schedule=constant", "--tau=0.1", "--curriculum=4"]
        run("--out_dir=whole", *flags)
        run(f"--out_dir=parts{k}", *flags, "--max_steps=2")
        run(f"--out_dir=parts{k}", *flags, "--resume")
        assert same(weights(f"parts{k}"), weights("whole")) and not same(weights("whole"), weights("uniform"))


def test_slips(project, slip):
    """What the curriculum cannot be, and what it cannot end in, in two lines."""
    for flags, says in (
        (["--tau=0"], "tau"),
        (["--soft_k=1"], "soft_k"),
        (["--curriculum=-2"], "curriculum"),
        (["--process=masked"], "masked noise"),
        (["--block_sizes=1:1"], "nothing to soften"),
    ):
        assert says in slip(run, "--method=duo", *flags), flags


def test_a_vocabulary_of_one_has_nothing_to_soften(slip):
    cfg, settings = TrainConfig(process="uniform"), duo.Settings(curriculum=1)
    learner = duo.Learner(cfg, settings, None, d.Uniform(1), None)
    assert "--process uniform" in slip(learner.loss, 0)
