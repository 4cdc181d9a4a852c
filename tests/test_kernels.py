"""
Why believe kernels.py, fast/draws.py and fast/loss.py? Every kernel, run by Triton's interpreter, and its
PyTorch form against float64 and autograd; both draw the same tokens from the same keys; and all compile for
real cards without one. What a GPU makes of them is not tested here.
"""

import copy
import math
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import slow
from exact import EPS32, P_VALUE, agree, chi_squared, net, noise, rounded, speed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion as d
import fast
import kernels
import rng
from fast import draws
from fast.draws import sample
from fast.loss import linear_cross_entropy, through_head
from fast.processes import FastMasked, FastUniform
from kernels import cross_entropy, uniform_nll

tl = kernels.tl


@kernels.jit
def counts(x, n):
    for i in range(0, tl.load(n)):
        tl.store(x + i, i)


def why_not():
    """
    What keeps Triton's interpreter from running here: that of 3.6 turns arrays of one number into ints, which
    NumPy 2.4 refuses.
    """
    if not kernels.triton:
        return "no Triton"
    try:
        counts[(1,)](torch.zeros(2), torch.tensor([2]))
    except Exception as e:
        if "only 0-dimensional arrays can be converted to Python scalars" not in str(e):
            raise
        return f"the interpreter of Triton {kernels.triton.__version__} does not know NumPy {np.__version__}: pip install 'numpy<2.4'"


WHY_NOT = why_not()
interpreted = pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
FORMS = ["PyTorch"] + ["Triton"] * (not WHY_NOT)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Both forms in turn, on this machine's CPU."""
    take(monkeypatch, request.param)
    return request.param


def take(monkeypatch, name):
    for module in (kernels, draws):
        monkeypatch.setattr(module, "fused", lambda x: name == "Triton" and x.dtype != torch.float64)


def forms(monkeypatch):
    """The same inside one test."""
    for name in FORMS:
        take(monkeypatch, name)
        yield name


SHAPES = st.tuples(
    st.integers(1, 5),
    st.one_of(st.integers(2, 300), st.sampled_from([2047, 2048, 2049, 8191, 8192, 8193, 16500])),
)
SCALES = st.sampled_from([1e-4, 1.0, 30.0, 1e4])  # of the logits
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def close(a, b, rtol, atol=0.0):
    """
    a in float32, or stored in bfloat16, against b in float64, which is what decides: never two of the former
    against each other.
    """
    a, b = a.double(), b.double()
    assert torch.isfinite(a).all(), a
    beyond = (a - b).abs() - rtol * b.abs() - atol
    assert beyond.max() <= 0, (
        f"off by {beyond.max().item():.3g} more than {rtol:.1g} relative and {atol} allow"
    )


def grid(dtype):
    """
    Relative precision of a gradient, stored once by the loss and once when scaled. Triton's interpreter cuts
    bfloat16 off where a GPU
    rounds: twice the error.
    """
    return 8 * EPS32 if dtype == torch.float32 else 2 * 2.0**-7


# ----- cross-entropy


@settings(max_examples=6, deadline=None, derandomize=True)
@given(SHAPES, SCALES, DTYPES, st.booleans(), st.booleans(), st.integers(0, 2**32))
@example((3, 8193), 30.0, torch.float32, True, True, 0)
@example((4, 13), 1e4, torch.bfloat16, True, False, 1)
def test_cross_entropy_and_its_gradient(shape, scale, dtype, forbid, overwrite, seed):
    N, V = shape
    rng = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(N, V, generator=rng)).to(dtype)
    y = torch.randint(V, (N,), generator=rng)
    forbidden = int(torch.randint(V, (), generator=rng)) if forbid and V > 2 else None
    y = torch.where(y == forbidden, (y + 1) % V, y) if forbidden is not None else y
    w, g = torch.rand(N, generator=rng) + 0.1, torch.rand(N, generator=rng)
    w[0] = 0.0
    y_ignored = y.clone()
    y_ignored[0] = -100  # what other libraries write there
    exact = z.double().requires_grad_()
    masked = exact if forbidden is None else exact.index_fill(1, torch.tensor(forbidden), -math.inf)
    want = w.double() * F.cross_entropy(masked, y, reduction="none")
    (slope,) = torch.autograd.grad((want * g).sum(), exact)
    with pytest.MonkeyPatch.context() as patch:
        for _ in forms(patch):
            mine = z.clone()
            leaf = mine.requires_grad_()
            loss, lse = cross_entropy(leaf, y_ignored, w, forbidden, overwrite)
            close(loss, want, 16 * EPS32, 8 * EPS32 * max(1, scale))
            close(lse, masked.logsumexp(-1), 16 * EPS32, 8 * EPS32)
            (ours,) = torch.autograd.grad((loss * g).sum(), leaf)
            close(ours, slope, grid(dtype), 2 * EPS32 * max(1, scale))
            assert ours.dtype == dtype and (ours[0] == 0).all() and loss[0] == 0, "weight 0 costs nothing"
            assert overwrite or torch.equal(mine, z), "the logits are untouched"
            assert not overwrite or ours.data_ptr() == mine.data_ptr(), "no second (N, V)"
            with torch.no_grad():
                again, _ = cross_entropy(z, y_ignored, w, forbidden)
            assert torch.equal(again, loss)


def test_what_an_ignored_row_holds_does_not_matter(form):
    z = torch.randn(3, 50)
    z[1], z[2, 7] = math.nan, math.inf
    w, y = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([3, -1, 10**9])
    for overwrite in (False, True):
        leaf = z.clone().requires_grad_()
        loss = cross_entropy(leaf, y, w, overwrite=overwrite)[0]
        loss.sum().backward()
        assert (loss[1:] == 0).all() and (leaf.grad[1:] == 0).all() and leaf.grad[0].abs().sum() > 0
        leaf = z.clone().requires_grad_()
        loss = uniform_nll(leaf, y, y, 0.5, -1.0, w, overwrite=overwrite)
        loss.sum().backward()
        assert (loss[1:] == 0).all() and (leaf.grad[1:] == 0).all() and leaf.grad[0].abs().sum() > 0


def test_a_forbidden_target_costs_infinity(form):
    assert cross_entropy(torch.zeros(1, 5), torch.tensor([2]), forbidden=2)[0] == math.inf


def test_ids_and_logits_may_lie_anywhere_in_memory(form):
    """Views with gaps between their entries, and one entry for all: a kernel sees addresses, not tensors."""
    ids, z = torch.randint(11, (4, 6)), torch.randn(4, 11)
    column, same = ids[:, 2:3].flatten(), torch.tensor([4]).expand(4)
    gaps = torch.randn(4, 22)[:, ::2].copy_(z)
    wide = torch.randn(4, 16)[:, :11].copy_(z)
    key = torch.arange(8)[::2]
    for y in (column, same):
        for logits in (z, gaps, wide, z.T.contiguous().T):
            assert torch.equal(cross_entropy(logits, y)[0], cross_entropy(z, y.clone().contiguous())[0])
            assert torch.equal(
                uniform_nll(logits, y, column, 0.5, -1.0),
                uniform_nll(z, y.clone(), column.clone(), 0.5, -1.0),
            )
            assert torch.equal(sample(logits, key, xt=y).token, sample(z, key.clone(), xt=y.clone()).token)
        leaf, g = torch.randn(4, 16)[:, :11].copy_(z).requires_grad_(), torch.rand(4)
        (cross_entropy(leaf, y, overwrite=True)[0] * g).sum().backward()
        other = z.clone().requires_grad_()
        (cross_entropy(other, y)[0] * g).sum().backward()
        assert torch.equal(leaf.grad, other.grad), "rows with room behind them"


def test_what_others_saved_of_overwritten_logits_is_not_used(form):
    x = torch.randn(3, 9, requires_grad=True)
    # exp saved its result for its own gradient
    loss = cross_entropy(x.exp(), torch.arange(3), overwrite=True)[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


# ----- the bound of uniform noise


def dense_bound(z, x0, xt, a, da):
    """Its definition, term by term, (N, V) after (N, V)."""
    V, a = z.size(1), a[:, None]
    p = z.softmax(-1)
    xb, xb_hat = V * a * F.one_hot(x0, V) + 1 - a, V * a * p + 1 - a
    r, r_hat = xb / xb.gather(1, xt[:, None]), xb_hat / xb_hat.gather(1, xt[:, None])
    return -da / (V * a[:, 0]) * (r * (r / r_hat).log() - r + r_hat).sum(-1)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    SHAPES,
    st.sampled_from([1e-4, 1.0, 5.0]),
    DTYPES,
    st.sampled_from([1e-5, 1e-3, 0.3, 0.9, 0.999, 1 - 1e-5]),
    st.integers(0, 2**32),
)
@example((5, 8193), 5.0, torch.float32, 1 - 1e-5, 0)
@example((5, 300), 5.0, torch.float32, 1e-5, 0)
def test_uniform_nll_and_its_gradient(shape, scale, dtype, alpha, seed):
    N, V = shape
    rng = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(N, V, generator=rng)).to(dtype)
    x0, xt = torch.randint(V, (2, N), generator=rng)
    xt = torch.where(torch.arange(N) % 2 == 0, x0, xt)  # both cases
    a = (alpha * (1 - 0.1 * torch.rand(N, generator=rng))).double()
    da, w, g = (
        -(1 + torch.rand(N, generator=rng)).double(),
        torch.rand(N, generator=rng) + 0.1,
        torch.rand(N, generator=rng),
    )
    shift = torch.log1p(V * a / (1 - a)) * (torch.arange(N) % 3 > 0)
    exact = z.double().requires_grad_()
    want = w * dense_bound(exact.scatter_add(1, xt[:, None], -shift[:, None]), x0, xt, a, da)
    (slope,) = torch.autograd.grad((want * g).sum(), exact)
    # rows differ by many powers of ten: each is compared with its own largest number, and with the largest of
    # the terms that cancel in it. A bound near 0 is what 1 - p(x_0) has left of 1, so there a rounding error
    # is of the size of the bound's factor, w |alpha'|. Of 4320 rows none was off by more than 28 (loss) and
    # 25 eps (gradient)
    weight = w * da.abs()
    with torch.no_grad():
        p = exact.scatter_add(1, xt[:, None], -shift[:, None]).softmax(-1)
        p_z, p_0 = (p.gather(1, y[:, None])[:, 0] for y in (xt, x0))
        scale, A_z, A_0 = kernels._slopes(V, a, 1 - a, xt == x0, p_z, p_0)
        odds = V * (a / (1 - a))[:, None] * p
        most = scale * torch.minimum((p / (1 + odds)).amax(1), (p * odds / (1 + odds)).amax(1))
        size = slope.abs().amax(1) + g * weight * torch.stack((most, A_z.abs(), A_0)).amax(0)
    with pytest.MonkeyPatch.context() as patch:
        for _ in forms(patch):
            for overwrite in (False, True):
                mine = z.clone()
                leaf = mine.requires_grad_()
                loss = uniform_nll(leaf, x0, xt, a, da, w, shift, overwrite)
                close(loss, want, 50 * EPS32, 50 * EPS32 * weight)
                (ours,) = torch.autograd.grad((loss * g).sum(), leaf)
                close(ours, slope, grid(dtype), 50 * EPS32 * size[:, None])
                assert overwrite or torch.equal(mine, z), "the logits are untouched"
                with torch.no_grad():
                    assert torch.equal(uniform_nll(z, x0, xt, a, da, w, shift), loss)


def test_pure_noise_has_no_bound(form):
    z = torch.randn(4, 30).requires_grad_()
    loss = uniform_nll(z, torch.arange(4), torch.tensor([0, 1, 5, 6]), 0.0, -1.0)
    loss.sum().backward()
    assert (loss == 0).all() and z.grad.abs().max() < 1e-7


# ----- draws


def dense_draw(z, xt, mixture, temperature, shift, forbidden=None):
    """softmax(z / T), and what `sample` draws from, in float64."""
    z, V = z.double().clone(), z.size(1)
    if forbidden is not None:
        z[:, forbidden] = -math.inf
    p = (z.scatter_add(1, xt[:, None], -shift[:, None].double()) / temperature).softmax(-1)
    seen, rest, fresh, stay = mixture.T[..., None]
    p_x = p.gather(1, xt[:, None])
    q = (fresh / V + (seen * p_x + stay) * F.one_hot(xt, V) + (rest - fresh - stay) * p) / (seen * p_x + rest)
    return p, q


def case(V, rows, seed, alpha_t=0.3, alpha_s=0.6):
    rng = torch.Generator().manual_seed(seed)
    z, xt = 2 * torch.randn(1, V, generator=rng), torch.randint(V, (1,), generator=rng)
    z[0, V // 2] = -math.inf
    process = FastUniform(V)
    a_t, a_s = torch.tensor([alpha_t, alpha_s], dtype=torch.float64)
    mixture = torch.stack(process.mixture(xt, a_t, a_s), -1)[None]
    key = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=rng)
    return z, xt, mixture, key


@pytest.mark.parametrize("V", [3, 7, 8, 9, 65, 1000, 2047, 2500])
@pytest.mark.parametrize("what", ["softmax", "posterior"])
def test_draws_are_exact(V, what):
    M = 100_000 if V < 500 else 20_000
    z, xt, mixture, key = case(V, M, V)
    plain = torch.tensor([[0.0, 1, 0, 0]]).double()
    mixture = plain if what == "softmax" else mixture
    shift = torch.tensor([0.7])
    token = torch.cat([
        sample(z.expand(len(k), V), k, 0.8, xt.expand(len(k)), mixture.expand(len(k), 4), shift.expand(len(k))).token
        for k in key.split(5000)
    ])  # fmt: skip
    count = token.bincount(minlength=V)
    assert chi_squared(count, dense_draw(z, xt, mixture, 0.8, shift)[1][0]) > P_VALUE
    assert chi_squared(count, dense_draw(z, xt, mixture, 0.8 * 1.3, shift)[1][0]) < P_VALUE, (
        "the test sees a temperature"
    )


NOISES = st.sampled_from(["plain", "masked", "uniform"])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    SHAPES,
    st.sampled_from([1e-4, 1.0, 30.0]),
    DTYPES,
    st.sampled_from([0.01, 0.7, 1.0, 3.0]),
    NOISES,
    st.integers(0, 2**32),
)
@example((5, 8193), 1.0, torch.float32, 0.7, "uniform", 0)
@example((4, 14), 1.0, torch.float32, 1.0, "masked", 0)
def test_both_forms_draw_the_same_tokens_and_know_the_same_of_them(
    shape, scale, dtype, temperature, noise, seed
):
    N, V = shape
    rng = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(N, V, generator=rng)).to(dtype)
    xt = torch.randint(V, (N,), generator=rng)
    key = torch.randint(-(2**63), 2**63 - 1, (N,), generator=rng)
    a_t, a_s = torch.rand(N, generator=rng).double() / 2, 0.5 + torch.rand(N, generator=rng).double() / 2
    mixture, shift, forbidden = torch.tensor([0.0, 1, 0, 0]).double().expand(N, 4), None, None
    if noise == "masked":
        forbidden, xt = V - 1, torch.where(torch.arange(N) % 2 == 0, V - 1, xt)
        mixture = torch.stack(FastMasked(V, forbidden).mixture(xt, a_t, a_s), -1)
    if noise == "uniform":
        shift, mixture = torch.rand(N, generator=rng), torch.stack(FastUniform(V).mixture(xt, a_t, a_s), -1)
    p, q = dense_draw(z, xt, mixture, temperature, torch.zeros(N) if shift is None else shift, forbidden)
    of = lambda p, ids: p.gather(1, ids[:, None])[:, 0]
    # of a probability: logits / T are as good as their last bit
    rough = 80 * EPS32 * max(1, scale / temperature)
    # in float64, as it is and with every logit moved that much: rows whose draw hangs on a rounding error are
    # no one's to decide
    moved = [z.double() + by * temperature * torch.randn(N, V, generator=rng) for by in (0.0, *[rough] * 4)]
    exact = torch.stack([sample(y, key, temperature, xt, mixture, shift, forbidden).token for y in moved])
    clear = (exact == exact[0]).all(0)
    tokens = [exact[0]]
    with pytest.MonkeyPatch.context() as patch:
        for _ in forms(patch):
            run = lambda i, stats: sample(
                z[i],
                key[i],
                temperature,
                xt[i],
                mixture[i],
                shift if shift is None else shift[i],
                forbidden,
                stats,
            )
            draw = run(slice(None), True)
            tokens += [
                draw.token,
                run(slice(None), False).token,
                torch.cat([run(slice(i, i + 1), False).token for i in range(N)]),
            ]
            close(draw.p_xt, of(p, xt), rough, 1e-30)
            close(draw.top, p.amax(-1), rough)
            close(draw.entropy, torch.special.entr(p).sum(-1), rough, rough)
            close(draw.logp.exp(), of(p, draw.token), rough, 1e-30)
            assert (of(q, draw.token) > 0).all()
    same = [torch.equal(tokens[0][clear], t[clear]) for t in tokens]
    assert all(same), "the same tokens in both forms, alone or together, with and without stats"


@pytest.mark.parametrize("noise", ["masked", "uniform"])
def test_what_is_settled_is_settled_whatever_the_network_says(noise):
    """
    A draw that is not asked for is the same at p(x_t) = 0 and at p(x_t) = 1; nearly every draw that is asked
    for is not.
    """
    N, V = 20_000, 50
    rng = torch.Generator().manual_seed(0)
    process = FastMasked(V, V - 1) if noise == "masked" else FastUniform(V)
    xt, key = torch.randint(V, (N,), generator=rng), torch.randint(-(2**63), 2**63 - 1, (N,), generator=rng)
    xt = torch.where(torch.arange(N) % 3 > 0, V - 1, xt) if noise == "masked" else xt
    a_t, a_s = torch.rand(2, N, generator=rng).double().sort(0).values
    a_t[::7], a_s[::11] = 0.0, 1.0
    mixture = torch.stack([x.expand(N) for x in process.mixture(xt, a_t, a_s)], -1)
    token, asked, *_ = draws.settle(key, xt, mixture, V)
    certain = lambda ids: (
        sample(torch.zeros(N, V).scatter(1, ids[:, None], 1e4), key, xt=xt, mixture=mixture).token
    )
    same, other = certain(xt), certain((xt + 1) % V)
    assert torch.equal(same[~asked], token[~asked]) and torch.equal(other[~asked], token[~asked])
    differ = (same != other)[asked].float().mean()
    assert differ > (0.99 if noise == "masked" else 0.9) and 0.2 < asked.float().mean() < 0.8
    # the function is asked for these, and no others
    logits, seen = torch.randn(N, V, generator=rng), []
    run = lambda z, **kw: process.posterior_sample(
        z, xt[None], a_t[None], a_s[None], noise=SimpleNamespace(keys=lambda: key[None]), **kw
    )[0]
    ask = lambda where: seen.append(where) or logits[where[0]]
    assert torch.equal(run(ask), run(logits[None])) and torch.equal(seen[0][0], asked)
    half = torch.arange(N)[None] % 2 == 0
    assert (
        torch.equal(run(ask, where=half), torch.where(half[0], run(logits[None]), xt))
        and not (seen[1] & ~half).any()
    )


def unmix(z):
    """The inverse of rng.mix on unsigned ints."""
    undo = lambda z, s: reduce(lambda y, _: z ^ (y >> s), range(64 // s), z)
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9)):
        z = undo(z, shift) * pow(factor, -1, 2**64) % 2**64
    return undo(z, 30)


def keys_with_a_small_clock(n, count, below, seed=0):
    """Keys whose uniform number at `count` has only `below` of its 63 bits: it is at most 2^(below - 63)."""
    bits = torch.randint(1 << below, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    raw = [(unmix(b) - count * rng.GOLDEN) % 2**64 for b in bits]
    return torch.tensor([k - 2**64 if k >= 2**63 else k for k in raw])


def far_tail(n):
    """
    P-value of the far tail. Token 40 of lane 5 has p = 2^-38. Its clock rings first where E_5 < p E_0: with
    E_5 uniform in (0, 2^-36), which random keys would show once in 10^11 draws and these always do, that is
    E[min(1, E_0 / 4)] = (1 - e^-4) / 4.
    """
    z = torch.full((1, 64), -math.inf)
    z[0, 0], z[0, 40] = 0.0, -38 * math.log(2)
    token = sample(z.expand(n, 64), keys_with_a_small_clock(n, 3 + 5, 27)).token
    share = (1 - math.exp(-4)) / 4
    assert ((token == 0) | (token == 40)).all()
    return chi_squared(
        torch.tensor([(token == 40).sum(), (token == 0).sum()]), torch.tensor([share, 1 - share]).double()
    )


def test_no_clock_stands_still(form):
    """
    Token 40 has p = 2^-38, and the heavy token's clock rings as late as once in 2^25 draws, with these keys. An
    infinite time, u rounded to 1, would hand the draw to the next to impossible.
    """
    bits = (2**63 - 1 - torch.randint(2**38, (30,), generator=torch.Generator().manual_seed(0))).tolist()
    keys = [(unmix(b) - 3 * rng.GOLDEN) % 2**64 for b in bits]
    z = torch.full((1, 64), -math.inf)
    z[0, 0], z[0, 40] = 0.0, -38 * math.log(2)
    key = torch.tensor([k - 2**64 if k >= 2**63 else k for k in keys])
    assert (sample(z.expand(30, 64), key).token == 0).all()
    only = torch.full((30, 64), -math.inf)
    only[:, 3] = 0.0
    assert (sample(only[:20], key[:20]).token == 3).all(), "the only token there is"


def test_the_edited_logit_counts_inside_its_lane_too(form):
    """A forbidden id among few, and a shift that makes or breaks a token."""
    n = 60
    z, key, xt = torch.zeros(n, 5), torch.arange(n), torch.full((n,), 4)
    assert (sample(z, key, forbidden=4).token != 4).all()
    for shift in (5.0, -5.0):
        share = math.exp(-shift) / (4 + math.exp(-shift))
        hit = (sample(z, key, xt=xt, shift=torch.full((n,), shift)).token == 4).sum()
        assert chi_squared(torch.tensor([hit, n - hit]), torch.tensor([share, 1 - share]).double()) > P_VALUE


def test_odd_inputs_of_a_draw(form):
    z, key = torch.randn(4, 7), torch.arange(4)
    assert sample(z.requires_grad_(), key).token.shape == (4,), "logits that want a gradient are only read"
    xt = torch.tensor([1, 2, 3, 4])
    still = sample(z, key, xt=xt, mixture=torch.zeros(4, 4).double()).token
    assert torch.equal(still, xt), "no noise left: nothing moves"
    bad = torch.where(torch.arange(4)[:, None] == 2, math.nan, z.detach())
    assert (sample(bad, key).token == -1).tolist() == [False, False, True, False], (
        "a row with NaN is no token"
    )
    assert sample(z[:0], key[:0], stats=True).token.shape == (0,)


@pytest.mark.slow
def test_the_far_tail_is_drawn_and_32_random_bits_do_not_draw_it(form, monkeypatch):
    n = 20_000 if form == "PyTorch" else 150
    assert far_tail(n) > P_VALUE
    if form == "PyTorch":
        naive = lambda key, count: (
            ((rng.mix(key + count * rng.GOLDEN) >> 31 & (1 << 32) - 1).double() + 0.5) * 2.0**-32
        )
        monkeypatch.setattr(draws, "uniforms", naive)
    else:

        @kernels.jit
        def naive(key, count, dtype: tl.constexpr):
            z = key.to(tl.uint64) + (key * 0 + count).to(tl.uint64) * 0x9E3779B97F4A7C15
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB
            z = z ^ (z >> 31)
            return (((z & 0x7FFFFFFFFFFFFFFF) >> 31).to(dtype) + 0.5) * 2.3283064365386963e-10

        monkeypatch.setattr(draws, "_uniform", naive)
    assert far_tail(n) < P_VALUE


def test_mix_is_a_bijection():
    for z in (0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0):
        signed = z - 2**64 if z >= 2**63 else z
        assert unmix(rng.mix(signed) % 2**64) == z and rng.mix(torch.tensor(signed)).item() == rng.mix(signed)


def test_a_temperature_that_overflows_nothing_and_one_that_is_none(form):
    z, key = torch.tensor([[1.0, 3.0, 2.0]]).repeat(50, 1), torch.arange(50)
    draw = sample(z, key, 1e-46, stats=True)
    assert (
        (draw.token == 1).all()
        and (draw.top == 1).all()
        and (draw.entropy == 0).all()
        and (draw.logp == 0).all()
    )
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            sample(z, key, bad)


# ----- a head that never holds its logits


class Largest(TorchDispatchMode):
    """The largest tensor made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(x):
                self.size = max(self.size, x.numel())
        return out


@pytest.mark.parametrize("dtype", slow([torch.float32, torch.bfloat16], [torch.float32]))
@pytest.mark.parametrize("loss", ["cross_entropy", "uniform_nll"])
def test_the_head_is_the_same_in_pieces(form, loss, dtype):
    torch.manual_seed(0)
    N, C, V, held = 23, 6, 301, 5 * 301
    hidden, weight, bias = (
        x.to(dtype).requires_grad_() for x in (torch.randn(N, C), torch.randn(V, C), torch.randn(V))
    )
    x0, xt = torch.randint(V, (2, N))
    xt[::2] = x0[::2]
    a, w = 0.1 + 0.8 * torch.rand(N).double(), torch.rand(N)
    w[3] = 0
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    z = F.linear(*exact)
    want = w * (
        F.cross_entropy(z, x0, reduction="none")
        if loss == "cross_entropy"
        else dense_bound(z, x0, xt, a, -torch.ones(N))
    )
    (2.5 * want.sum()).backward()
    run = {
        "cross_entropy": lambda z, rows: cross_entropy(z, x0[rows], w[rows], overwrite=True)[0],
        "uniform_nll": lambda z, rows: uniform_nll(
            z, x0[rows], xt[rows], a[rows], -1.0, w[rows], overwrite=True
        ),
    }[loss]
    with Largest() as seen:
        total, each = through_head(hidden, weight, bias, run, held)
        (2.5 * total).backward()
    assert seen.size < N * V, "never all logits at once"
    close(total, want.sum(), 80 * EPS32)
    close(each, want, 80 * EPS32, 8 * EPS32)
    for x, y in zip((hidden, weight, bias), exact, strict=True):
        assert x.grad.dtype == dtype
        close(x.grad, y.grad, 0.0 if dtype == torch.float32 else 2.0**-8, 80 * EPS32 * y.grad.abs().max())
    with torch.no_grad():
        close(through_head(hidden, weight, bias, run)[1], want, 80 * EPS32, 8 * EPS32)
    if loss == "cross_entropy":
        close(linear_cross_entropy(hidden, weight, bias, x0, w)[1], want, 80 * EPS32, 8 * EPS32)


def test_no_rows_cost_nothing_and_still_have_gradients():
    weight, bias = torch.randn(7, 3, requires_grad=True), torch.randn(7, requires_grad=True)
    total, each = linear_cross_entropy(torch.randn(0, 3), weight, bias, torch.zeros(0, dtype=torch.long))
    total.backward()
    assert total == 0 and len(each) == 0 and (weight.grad == 0).all() and (bias.grad == 0).all()


@pytest.mark.parametrize("objective", ["ce", "elbo"])
@pytest.mark.parametrize("kind", ["masked", "loo", "denoiser"])
def test_a_training_step_is_the_same_in_both_forms_and_in_pieces(monkeypatch, kind, objective):
    """
    The loss, its terms and every gradient, of a network in float64: the lesson's. In pieces: the same. With
    its head and loss in float32, which is where the forms differ: to 200 eps of the largest number (72 such
    networks on three instruction sets needed 68 at most). The layers are left out of that: what they make of
    a rounding error is no business of the kernels, and differs from one processor to the next.
    """
    V, B, L = 400, 6, 8
    process = d.Masked(V, V - 1) if kind == "masked" else d.Uniform(V, kind)
    lesson = net(process, time_conditioning=kind != "masked").double()
    model, quick = speed(copy.deepcopy(lesson), process)
    x0, given = torch.randint(V - 1, (B, L)), torch.zeros(B, L, dtype=torch.bool)
    given[0, :3] = True
    sizes, t = torch.tensor([1, 2, 4] * 2), torch.linspace(0.1, 0.9, B).double()

    def step(held, dtype):
        def head(hidden, weight, bias, loss):
            return [
                y.double()
                for y in through_head(hidden.to(dtype), weight.to(dtype), bias.to(dtype), loss, held)
            ]

        monkeypatch.setattr(fast.loss, "through_head", head)
        model.zero_grad()
        with Largest() as seen:
            total, each = fast.token_loss(model, quick, x0, sizes, t, objective, given, noise=noise(B, L))
            total.backward()
        assert held is None or seen.size < B * L * V, "never all logits at once"
        return [total.detach(), each, *(p.grad for p in model.parameters())]

    total, each = d.token_loss(lesson, process, x0, sizes, t, objective, given, noise=noise(B, L))
    total.backward()
    want = [total.detach(), each, *(p.grad for p in lesson.parameters())]
    agree(want[0], want[1].sum())
    assert all(g.abs().max() > 0 for g in want[2:])
    agree(step(None, torch.float64), want)
    agree(step(5 * V, torch.float64), want)
    for _ in forms(monkeypatch):
        for held in (5 * V, None):
            for a, b in zip(step(held, torch.float32), want, strict=True):
                rounded(a, b, 200)


# ----- which path


@interpreted
def test_offsets_have_64_bits():
    """
    Rows 2^30 logits apart: the third begins where 32 bits end. The memory between them is never touched.
    """
    N, V, stride = 3, 20, 2**30
    far = torch.empty((N - 1) * stride + V, dtype=torch.bfloat16).as_strided((N, V), (stride, 1))
    near = torch.randn(N, V).bfloat16()
    one, ids, wide, mixture = (
        torch.ones(N),
        torch.tensor([1, 2, 3]),
        torch.full((N,), 0.5).double(),
        torch.rand(N, 4).double(),
    )
    for run in (
        lambda z: kernels.cross_entropy_triton(z, z, ids, one, -1)[0],
        lambda z: kernels.uniform_nll_triton(z, z, ids, 2 * ids, wide, -wide, one, one),
        lambda z: draws.sample_triton(z, ids, ids, mixture, ids, one, 1.0, True)[2],
        lambda z: kernels._scale(z, 3 * one),
    ):
        far.copy_(near)
        close_by = near.clone()
        a, b = run(far), run(close_by)
        assert (a is None or torch.equal(a, b)) and torch.equal(far, close_by)


def test_without_cuda_or_triton_or_when_a_kernel_fails_pytorch_runs(monkeypatch):
    cuda = torch.device("cuda")
    fresh = kernels.path.__wrapped__
    assert fresh(torch.device("cpu")) == ("PyTorch", "Triton is for CUDA")
    monkeypatch.setattr(kernels, "_try_out", lambda device: "")
    if kernels.triton:
        assert fresh(cuda) == ("Triton", kernels.triton.__version__)
        monkeypatch.setattr(kernels, "_try_out", lambda device: "sample")
        assert fresh(cuda)[0] == "PyTorch" and "sample" in fresh(cuda)[1]

        def explode(device):
            raise RuntimeError("no such instruction\nand more")

        monkeypatch.setattr(kernels, "_try_out", explode)
        name, why = fresh(cuda)
        assert name == "PyTorch" and "RuntimeError: no such instruction" in why and "\n" not in why
    monkeypatch.setattr(kernels, "triton", None)
    assert fresh(cuda)[0] == "PyTorch" and "pip install triton" in fresh(cuda)[1]


@interpreted
@pytest.mark.parametrize("broken", slow(["", "cross_entropy", "uniform_nll", "sample"], ["", "sample"]))
def test_the_first_launch_sees_a_wrong_kernel(monkeypatch, broken):
    if broken:
        module = draws if broken == "sample" else kernels
        right = getattr(module, f"{broken}_triton")

        def wrong(*args):
            out = right(*args)
            (out if torch.is_tensor(out) else out[0])[0] += 1
            return out

        monkeypatch.setattr(module, f"{broken}_triton", wrong)
    assert kernels._try_out(torch.device("cpu")) == ("" if broken == "sample" else broken)
    assert draws._try_out(torch.device("cpu")) == ("sample" if broken == "sample" else "")


@pytest.mark.parametrize("broken", ["", "sample", "fails"])
def test_a_wrong_draw_is_not_taken(monkeypatch, broken):
    """On a GPU fast/draws.py tries its kernel by itself, the first time that it is asked for."""

    def try_out(device):
        if broken == "fails":
            raise RuntimeError("no such instruction")
        return broken

    monkeypatch.setattr(draws, "_try_out", try_out)
    assert draws.works.__wrapped__(torch.device("cuda")) == (broken == "")
    monkeypatch.setattr(kernels, "fused", lambda x: True)
    monkeypatch.setattr(draws, "works", draws.works.__wrapped__)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    assert draws.fused(x) == (broken == "")


def test_the_module_runs_without_triton(tmp_path):
    """As on a machine that has no wheel of it."""
    (tmp_path / "triton.py").write_text("raise ImportError('none here')")
    code = "import torch, kernels; print(kernels.triton, kernels.cross_entropy(torch.zeros(3, 9), torch.arange(3))[0])"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    assert subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.startswith("None tensor([2.1972")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_run_on_this_gpu():
    """In a process of its own, where Triton compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(Path(__file__).parents[1])
    }
    code = "import torch, kernels; print(kernels.path(torch.device('cuda', 0)))"
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith("('Triton'"), out


@pytest.mark.skipif(not kernels.triton, reason="no Triton")
@pytest.mark.parametrize("capability", slow(["80", "90"], []))
def test_every_kernel_compiles_for_a_real_card(capability):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = str(Path(__file__).parent / "compile_kernels.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, capability], env=env, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0 and done.stdout.count(f"sm_{capability}") == 14, done.stdout + done.stderr
