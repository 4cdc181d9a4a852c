"""
Why believe model.py? Logits of the public reference implementation, a brute-force mask, and cached =
uncached: of the lesson and of its fast form. What only the fast form has is compared with the lesson in
float64.
"""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import EPS32, agree, rounded, speed

import diffusion as d
import model as m
from fast import attention
from generate import generate
from hub.published import from_reference
from run.machine import mixed

GOLDEN = Path(__file__).parent / "golden"
BLOCKDIT = ["blockdit_adaln_x0causal", "blockdit_adaln_x0block", "blockdit_noadaln_x0causal"]


@pytest.fixture(params=["lesson", "fast"])
def form(request):
    """Both forms of a network in turn: form(net) is the one."""
    return (lambda net: net) if request.param == "lesson" else fast_form


def fast_form(net):
    return speed(net, d.Masked(net.cfg.vocab_size, 0))[0]


def load(name):
    z = np.load(GOLDEN / f"{name}.npz")
    arrays = {k: torch.from_numpy(z[k]) for k in z.files if z[k].ndim}
    net = from_reference(
        {k: v for k, v in arrays.items() if k.startswith("w.")},
        {k: z[k] for k in z.files if k.startswith("cfg.")},
    )
    return (
        net.eval().double(),
        arrays,
        {k: int(z[k]) for k in z.files if z[k].ndim == 0 and k != "cfg.dropout"},
    )


def close(logits, golden):
    """Ours are in float64. The reference's are in float32, and off by up to 5 eps of the largest."""
    rounded(golden, logits, 10)


@pytest.mark.parametrize("name", BLOCKDIT)
@torch.no_grad()
def test_golden_training_at_every_block_size(form, name):
    net, a, _ = load(name)
    net = form(net)
    for b in a["train.block_sizes"].tolist():
        close(net(a["x0"], a["xt"], b, sigma=a["sigma"]), a[f"train.logits.bs{b}"])
        if f"train.logits.bs{b}.sigma0" in a:
            close(net(a["x0"], a["xt"], b), a[f"train.logits.bs{b}.sigma0"])
    sizes = torch.tensor(a["train.block_sizes"].tolist()[:2])  # one block size a row
    both = torch.stack([a[f"train.logits.bs{b}"][i] for i, b in enumerate(sizes.tolist())])
    exact = net(a["x0"], a["xt"], sizes, sigma=a["sigma"])
    close(exact, both)
    rounded(net.float()(a["x0"], a["xt"], sizes, sigma=a["sigma"]), exact, 50)


@pytest.mark.parametrize("name", BLOCKDIT)
@torch.no_grad()
def test_golden_generate_and_verify_cached_and_not(form, name):
    net, a, s = load(name)
    net = form(net)
    sigma, b, ctx = a["sigma"], s["gen.block_size"], s["gen.context_len"]
    close(net(a["gen.x0"], a["gen.xt"], b, start=ctx, sigma=sigma), a["gen.logits"])
    close(net(None, a["gen_first.xt"], b, sigma=sigma), a["gen_first.logits"])
    v = s["arv.context_len"]
    close(net(a["arv.x0"], a["arv.xt"], 1, start=v, sigma=sigma), a["arv.logits"])
    close(net(a["arv.x0"], a["arv_rand.xt"], 1, start=v, sigma=sigma), a["arv_rand.logits"])
    close(net(a["arv_noctx.x0"], a["arv_noctx.xt"], 1, sigma=sigma), a["arv_noctx.logits"])

    cache = net.new_cache(2, 2 * net.cfg.seq_len)
    for i in range(0, ctx, b):  # each call commits the block before it and reads the next one
        prev = a["gen.x0"][:, i - b : i] if i else None
        net(prev, a["x0"][:, i : i + b], b, start=i, sigma=sigma, cache=cache)
    close(
        net(a["gen.x0"][:, ctx - b :], a["gen.xt"], b, start=ctx, sigma=sigma, cache=cache), a["gen.logits"]
    )
    assert cache.length == ctx
    # again, nothing left to commit
    close(net(None, a["gen.xt"], b, start=ctx, sigma=sigma, cache=cache), a["gen.logits"])
    close(net(a["arv.x0"][:, v:], a["arv.xt"], 1, start=v, sigma=sigma, cache=cache), a["arv_cached.logits"])
    cache.length = v  # the verified tokens were a guess
    close(net(None, a["gen.xt"], b, start=ctx, sigma=sigma, cache=cache), a["gen.logits"])


@torch.no_grad()
def test_golden_full_diffusion(form):
    net, a, s = load("dit_duo")
    net = form(net)
    L = s["cfg.length"]
    close(net(None, a["xt"], L, sigma=a["sigma"]), a["logits"])
    close(net(None, a["xt"], L), a["logits.sigma0"])
    close(net(None, a["xt"][:, : L // 2], L, sigma=a["sigma"]), a["logits.half_length"])
    close(net(a["x0"], a["xt"], L, sigma=a["sigma"]), a["logits"])  # a clean stream nobody reads is skipped
    # or computed, and not read
    close(net(a["x0"], a["xt"], torch.tensor([L, L]), sigma=a["sigma"]), a["logits"])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "b, past, C, N, start",
    [(4, 0, 12, 12, 0), (3, 6, 3, 3, 9), (1, 5, 4, 4, 5), (8, 8, 0, 8, 8), (5, 0, 12, 12, 0)],
)
@pytest.mark.parametrize("how", ["lesson", "fast"])
def test_mask_equals_the_rule_word_by_word(how, b, past, C, N, start, causal):
    if how == "lesson":
        position, edge, group = small(clean_causal=causal).layout(b, start, past, C, N, torch.device("cpu"))
        got = m.attention_mask(edge, group, past + C)[0]
        assert position.tolist() == [*range(past, past + C), *range(start, start + N)]
    else:
        got = attention.attention_mask(b, past, C, N, start, causal)[0]
    keys = [("clean", j) for j in range(past + C)] + [("noisy", start + j) for j in range(N)]
    for row, (kind, i) in enumerate(keys[past:]):
        for column, (other, j) in enumerate(keys):
            if kind == "clean":
                want = other == "clean" and (j <= i if causal else j // b <= i // b)
            else:
                want = j < b * (i // b) if other == "clean" else j // b == i // b
            assert got[row, column] == want, f"{kind} {i} -> {other} {j}"


def small(**kw):
    """The lesson's network in float64, nothing in it hidden behind a zero."""
    torch.manual_seed(0)
    net = m.Transformer(
        m.ModelConfig(vocab_size=11, seq_len=24, n_layers=3, n_heads=2, d_model=32, cond_dim=16, **kw)
    ).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return net.double()


@torch.no_grad()
def test_a_fresh_model_costs_log_V(form):
    net = form(m.Transformer(m.ModelConfig(vocab_size=11, seq_len=8, time_conditioning=True)))
    assert net(None, torch.randint(11, (2, 8)), 8, sigma=torch.ones(2)).abs().max() == 0


@torch.no_grad()
def test_information_flows_where_the_rule_says(form):
    """
    A clean token moves no noisy position of its own or an earlier block, and does move every later block.
    """
    net, b = form(small()), 4
    clean, noisy = torch.randint(11, (1, 24)), torch.randint(11, (1, 24))
    base = net(clean, noisy, b)
    for j in (0, 6, 13):
        other = clean.clone()
        other[0, j] = (other[0, j] + 1) % 11
        moved = (net(other, noisy, b) - base).abs().amax(-1)[0] > 1e-9
        assert moved.tolist() == [i // b > j // b for i in range(24)]


def keys_and_values(cache, length):
    """What a cache of either form holds of the first tokens: of every layer, (B, H, length, D/H)."""
    return [x[:, :, :length] for both in (cache.k, cache.v) for x in both]


@torch.no_grad()
def test_the_clean_stream_does_not_see_time(form):
    """Else a cache filled at one noise level would be wrong at the next. Two sigmas, one cache."""
    net = form(small(time_conditioning=True))
    clean, noisy = torch.randint(11, (2, 8)), torch.randint(11, (2, 4))
    a, b = net.new_cache(2, 24), net.new_cache(2, 24)
    la = net(clean, noisy, 4, start=8, sigma=torch.tensor([0.1, 0.2]), cache=a)
    lb = net(clean, noisy, 4, start=8, sigma=torch.tensor([3.0, 4.0]), cache=b)
    assert all(torch.equal(x, y) for x, y in zip(keys_and_values(a, 8), keys_and_values(b, 8), strict=True))
    assert (la - lb).abs().max() > 1e-3  # and the noisy stream does see it
    agree(net(None, noisy, 4, start=8, sigma=torch.tensor([3.0, 4.0]), cache=a), lb)
    whole = net(
        torch.cat((clean, clean[:, :4]), 1), torch.cat((clean, noisy), 1), 4, sigma=torch.tensor([3.0, 4.0])
    )
    agree(whole[:, 8:], lb)


@torch.no_grad()
def test_clean_tokens_alone_are_committed(form):
    """A prefill: no noisy token, no logits, and the same cache as with one."""
    net, ids = form(small()), torch.randint(11, (2, 12))
    a, b = net.new_cache(2, 24), net.new_cache(2, 24)
    assert net(ids[:, :8], None, 4, cache=a).shape == (2, 0, 11) and net(ids[:, :8], None, 4).shape == (
        2,
        0,
        11,
    )
    agree(net(None, ids[:, 8:], 4, start=8, cache=a), net(ids[:, :8], ids[:, 8:], 4, start=8, cache=b))
    assert a.length == b.length == 8


@torch.no_grad()
def test_a_cache_forgets_tokens_and_rows(form):
    """`length` set back: a guess was wrong. keep: rows that are done leave."""
    net, ids, other = form(small()), torch.randint(11, (3, 12)), torch.randint(11, (3, 4))
    cache = net.new_cache(3, 24)
    net(ids[:, :4], None, 4, cache=cache), net(other, None, 4, cache=cache)
    cache.length = 4
    cache.keep(torch.tensor([0, 2]))
    ids = ids[[0, 2]]
    agree(net(ids[:, 4:8], ids[:, 8:], 4, start=8, cache=cache), net(ids[:, :8], ids[:, 8:], 4, start=8))


@torch.no_grad()
def test_a_shorter_sequence_is_a_prefix(form):
    """
    Positions count from 0 in both streams whatever the length of the batch (the reference shifts the noisy
    ones).
    """
    net = form(small())
    clean, noisy = torch.randint(11, (2, 24)), torch.randint(11, (2, 24))
    agree(net(clean[:, :8], noisy[:, :8], 4), net(clean, noisy, 4)[:, :8])


@torch.no_grad()
def test_a_noisy_stream_may_cover_the_answer_only(form):
    """Prompts need no noisy copy: the same logits as with one."""
    net = form(small())
    clean, noisy = torch.randint(11, (3, 24)), torch.randint(11, (3, 24))
    sizes = torch.tensor([1, 4, 8])
    agree(net(clean, noisy[:, 8:], sizes, start=8), net(clean, noisy, sizes)[:, 8:])


PASSES = {
    "plain": {},
    "timed": {"time_conditioning": True},
    "block-causal": {"clean_causal": False},
    "published": {"time_conditioning": True, "condition_clean": True},
    "one level": {"time_conditioning": True, "zero_sigma": True},
    "next token": {"next_token": True},
}


@pytest.mark.parametrize("name", PASSES)
def test_the_fast_form_is_the_lesson(name):
    """Logits and every gradient, in float64: mixed block sizes, prompts, no clean stream, soft tokens."""
    net = small(**PASSES[name])
    quick, causal = fast_form(small(**PASSES[name])), name != "block-causal"
    clean, noisy = torch.randint(11, (2, 3, 24))
    sizes = torch.tensor([1, 4, 24]) if causal else 8
    few = torch.tensor([1, 2, 8]) if causal else 8
    level = torch.tensor([0.1, 0.7, 3.0])
    soft = torch.randint(11, (3, 24, 2)), torch.rand(3, 24, 2, dtype=torch.float64)
    dense = torch.rand(3, 24, 11, dtype=torch.float64)
    calls = [(clean, noisy, sizes, 0, level), (clean, noisy[:, 8:], few, 8, level)]
    calls += [
        (None, noisy[:, :8], 8, 0, level),
        (clean, soft, sizes, 0, level),
        (clean, dense, sizes, 0, level),
    ]
    calls += [(clean, noisy, sizes, 0, level[:1]), (clean, noisy, sizes)]
    if name == "next token":
        calls = [(clean, noisy[:, 1:], 1, 1), (clean[:, :9], noisy[:, :3], 1, 7)]
    for args in calls:
        both = []
        for one in (quick, net):
            one.zero_grad()
            logits = one(*args)
            logits.log_softmax(-1).square().sum().backward()
            slopes = [p.grad for p in one.parameters() if p.grad is not None]
            both.append([logits.detach(), *(g for g in slopes if g.any())])
        agree(*both)


@pytest.mark.parametrize("name", BLOCKDIT[:2])
@pytest.mark.parametrize("how", ["lesson", "fast"])
def test_reference_weights_generate_with_a_cache_as_without(how, name):
    """
    Their clean stream is conditioned too, on sigma = 0 always: a cache made at one noise level must hold at
    the next.
    """
    net, _, s = load(name)
    net, process, runs = net.double(), d.Masked(s["cfg.vocab_size"], s["cfg.mask_index"]), []
    if how == "fast":
        net, process = speed(net, process)
    for cached in (True, False):
        for state in generate(net, process, [(), (1, 2, 3)], block_size=8, steps=3, use_cache=cached):
            pass
        runs.append(state.x)
    assert torch.equal(*runs)


@torch.no_grad()
def test_logits_are_float32_whatever_the_weights(form):
    net = form(small(time_conditioning=True))
    ids = torch.randint(11, (2, 8))
    exact = net(ids, ids, 4, sigma=torch.ones(2))
    assert exact.dtype == torch.float64
    logits = net.bfloat16()(ids, ids, 4, sigma=torch.ones(2))
    assert logits.dtype == torch.float32 and (logits - exact).abs().max() < 0.1 * exact.abs().max()
    assert net.double()(ids, ids, 4).dtype == torch.float64


def test_positions_beyond_the_context_are_refused(form):
    with pytest.raises(ValueError, match="seq_len 24"):
        form(small())(None, torch.zeros(1, 25, dtype=torch.long), 25)


def test_leftover_or_missing_weights_are_named():
    z = np.load(GOLDEN / "dit_duo.npz")
    w, cfg = (
        {k: z[k] for k in z.files if k.startswith("w.")},
        {k: z[k] for k in z.files if k.startswith("cfg.")},
    )
    with pytest.raises(RuntimeError, match="surprise"):
        from_reference({**w, "w.surprise": z["sigma"]}, cfg)
    del w["w.output_layer.linear.bias"]
    with pytest.raises(RuntimeError, match="head.bias"):
        from_reference(w, cfg)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_several_readings_of_a_block_share_a_pass(form, timed, cached):
    """
    [context, guess | probes at block size 1, the noisy block]: each with its own block size and noise level,
    none sees the other.
    """
    torch.manual_seed(0)
    cfg = m.ModelConfig(7, 16, n_layers=2, n_heads=2, d_model=16, cond_dim=8, time_conditioning=timed)
    net = m.Transformer(cfg).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    net = form(net)
    context, guess, probe, block = (torch.randint(7, (3, 4)) for _ in range(4))
    alpha = torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64)
    at, b = torch.arange(4, 8), 4

    def run(noisy, block_size, start, level, clean):
        if not cached:
            return net(torch.cat((context, clean), 1), noisy, block_size, start, level)
        cache = net.new_cache(3, 32)
        net(context, None, 1, cache=cache)
        return net(clean, noisy, block_size, start, level, cache)

    none = torch.zeros(3, dtype=torch.float64)
    apart = run(probe, 1, 4, d.sigma(none), guess), run(block, b, 4, d.sigma(alpha), guess)
    level = d.sigma(torch.cat((none[:, None].expand(3, 4), alpha[:, None].expand(3, 4)), 1))
    sizes = torch.tensor([[1] * 4 + [b] * 4])
    both = run(torch.cat((probe, block), 1), sizes, torch.cat((at, at)), level, guess)
    assert (both[:, :4] - apart[0]).abs().max() < 1e-12 and (both[:, 4:] - apart[1]).abs().max() < 1e-12
    other = run(torch.cat((probe, (block + 1) % 7), 1), sizes, torch.cat((at, at)), level, guess)
    assert (other[:, :4] - apart[0]).abs().max() < 1e-12, "the probes do not see the block"
    assert (other[:, 4:] - apart[1]).abs().max() > 1e-3


@torch.no_grad()
def test_the_head_keeps_its_digits_under_bfloat16(form):
    """A stretch of 1.001 is 1 in bfloat16; logits are float32, and what scales them."""
    net, x = form(small(time_conditioning=True).float()), torch.randint(11, (2, 8))
    for p in (net.modulation.weight, net.modulation.bias, net.head.bias):
        torch.nn.init.zeros_(p)
    found = []
    for stretch in (0.0, 2.0**-10):  # both have their bfloat16
        net.modulation.bias[32:] = stretch
        with torch.autocast("cpu", torch.bfloat16):
            found.append(net(None, x, 8, sigma=torch.ones(2)))
    before, after = found
    assert after.dtype == before.dtype == torch.float32
    rounded(after, before.double() * (1 + 2.0**-10), 20)


@pytest.mark.parametrize("kind", ["plain", "timed", "one level", "next_token"])
@pytest.mark.parametrize("rows", [None, [0, 3], [2]])
@torch.no_grad()
def test_only_the_tokens_asked_for(kind, rows):
    """
    forward(..., ask) is the lesson's forward(...)[ask], cached or not; so it is of some rows of the cache,
    whatever the others hold.
    """
    settings = {"time_conditioning": kind in ("timed", "one level"), "next_token": kind == "next_token"}
    lesson, net = small(**settings), fast_form(small(**settings))
    context, clean, noisy = (torch.randint(11, (4, n)) for n in (8, 4, 4))
    # a next-token network says position i of clean token i - 1
    b, start = (1, 9) if kind == "next_token" else (4, 12)
    level = (
        torch.tensor([0.3]).double() if kind == "one level" else torch.tensor([0.1, 0.3, 1.0, 3.0]).double()
    )
    ask = torch.rand(4, 4) < 0.4
    ask[0] = torch.tensor([True, False, False, True])
    want = lesson(torch.cat((context, clean), 1), noisy, b, start, level)
    assert (
        net(torch.cat((context, clean), 1), noisy, b, start, level, ask=ask) - want[ask]
    ).abs().max() < 1e-12
    cache = net.new_cache(4, 24)
    net(context, None, b, cache=cache)
    if rows is not None:
        cache.k[:, :, :, 8:] = cache.v[:, :, :, 8:] = torch.nan  # as free space may be
        cache.k[:, [1]] = torch.nan
        cache.rows = rows = torch.tensor(rows)
    else:
        rows = torch.arange(4)
    part = lambda x: x if len(x) == 1 else x[rows]
    for how in ({}, {"ask": ask[rows]}):
        cache.length = 8
        got = net(clean[rows], noisy[rows], b, start, part(level), cache, **how)
        assert (got - (want[rows][ask[rows]] if how else want[rows])).abs().max() < 1e-12


@pytest.mark.parametrize(
    "timed, dtype", [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
)
def test_passes_without_gradients_are_the_lesson(timed, dtype):
    """
    Block after block of 16: by oneDNN, from weights kept in its order, with one noise level for all, asked
    for some.
    """
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("a CPU without products of bfloat16")
    compare_without_gradients(timed, dtype, 50 if dtype == torch.float32 else 0.03 / EPS32)


def compare_without_gradients(timed, dtype, eps):
    """Each with the same network in float64: `eps` of the largest number."""
    net = m.Transformer(
        m.ModelConfig(11, 64, n_layers=2, n_heads=2, d_model=64, cond_dim=16, time_conditioning=timed)
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.1)
    lesson, net = copy.deepcopy(net).double(), fast_form(net)
    x, noisy, ask, level = (
        torch.randint(11, (6, 48)),
        torch.randint(11, (6, 16)),
        torch.rand(6, 16) < 0.5,
        torch.tensor([0.3]),
    )
    with mixed(torch.device("cpu"), dtype), torch.no_grad():
        cache = net.new_cache(6, 128)
    for start in (16, 32, 48):
        passes = ((noisy, 16, start), (noisy, 1, start - 16))
        with torch.no_grad():
            want, verdict = (lesson(x[:, :start], *p, level.expand(6)) for p in passes)
        with mixed(torch.device("cpu"), dtype):
            for p, y in zip(passes, (want, verdict), strict=True):
                rounded(net(x[:, :start], *p, level.expand(6)).detach(), y, eps)
        with mixed(torch.device("cpu"), dtype), torch.no_grad():
            rounded(net(x[:, start - 16 : start], noisy, 1, start - 16, level, cache), verdict, eps)
            for how in ({}, {"ask": ask}):
                rounded(net(None, noisy, 16, start, level, cache, **how), want[ask] if how else want, eps)
    packed = {
        name[0]: kept
        for name, kept in cache.kept.items()
        if isinstance(name, tuple) and torch.is_tensor(kept)
    }
    assert all(
        kept.dtype == (torch.float32 if layer is net.head else dtype) for layer, kept in packed.items()
    )
    linears = {net.head} | {p for p in net.layers.modules() if isinstance(p, torch.nn.Linear)}
    assert set(packed) == linears - {layer.modulation for layer in net.layers}


@pytest.mark.parametrize("ask", [None, [0, 1], [0, 0]])
def test_one_noise_level_under_autocast(ask):
    """
    One row, or one token asked for: what adaLN makes of its level is bfloat16 then, what it moves and
    stretches is not.
    """
    lesson, net = small(time_conditioning=True), fast_form(small(time_conditioning=True).float())
    clean, noisy = torch.randint(11, (2, 1, 8))
    asked = None if ask is None else torch.tensor([ask[:1] * 7 + ask[1:]]).bool()
    exact = lesson(clean, noisy, 4, sigma=torch.tensor([0.5]))
    exact = exact if asked is None else exact[asked]
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(clean, noisy, 4, sigma=torch.tensor([0.5]), ask=asked)
    assert logits.dtype == torch.float32 and (logits - exact).norm() <= 0.05 * exact.norm()
    assert torch.autograd.grad(logits.sum(), net.layers[0].norm1.weight)[0].isfinite().all()


@pytest.mark.parametrize("grad", [True, False])
def test_float64_stays_float64_under_autocast(form, grad):
    """As autocast itself has it; with a cache, weights may be kept in its order."""
    net, found = form(small(time_conditioning=True)), []
    clean, noisy = torch.randint(11, (2, 2, 8))
    with torch.set_grad_enabled(grad):
        for on in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                assert attention.dtype_of(net.head.weight) == torch.float64
                cache = None if grad else net.new_cache(2, 24)
                found.append(net(clean, noisy, 4, sigma=torch.ones(2), cache=cache))
    assert found[1].dtype == torch.float64 and (found[0] - found[1]).abs().max() < 1e-12


@torch.no_grad()
def test_what_is_kept_of_passes_over_one_context_is_of_their_start_too(form):
    """Angles and masks: blocks at several places behind one context, and behind another one."""
    lesson, net = small(), form(small())
    cache = net.new_cache(2, 24)
    clean, noisy = torch.randint(11, (2, 12)), torch.randint(11, (2, 2))
    for n in (8, 12, 8):
        cache.length = 0
        net(clean[:, :n], None, 2, cache=cache)
        for start in (n, n + 2, n):
            gap = net(None, noisy, 2, start, cache=cache) - lesson(clean[:, :n], noisy, 2, start)
            assert gap.abs().max() < 1e-12


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("piece", [4, 8, 10, 24])
@pytest.mark.parametrize(
    "sizes, start, causal",
    [(4, 0, True), (8, 0, False), (1, 5, True), ([1, 4, 8], 8, True), ([2, 4, 4], 0, True), (6, 12, True)],
)
def test_attention_in_pieces_is_the_lesson(monkeypatch, sizes, start, causal, piece, timed):
    """
    Logits and gradients of a training pass, to rounding, whatever the pieces; with prompts, and a short last
    piece.
    """
    lesson, net = (small(clean_causal=causal, time_conditioning=timed) for _ in range(2))
    net = fast_form(net)
    clean, noisy = torch.randint(11, (3, 24)), torch.randint(11, (3, 24 - start))
    b, sigma = (
        (sizes if isinstance(sizes, int) else torch.tensor(sizes)),
        torch.tensor([0.1, 1.0, 3.0]).double(),
    )
    found, seen, sdpa = [], [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, "CHUNK_BOUNDS", (piece, piece))
    for run in (lesson, net):
        with monkeypatch.context() as patch:
            if run is net:
                record = lambda q, *a, **how: seen.append(q.size(2)) or sdpa(q, *a, **how)
                patch.setattr(attention, "F", SimpleNamespace(scaled_dot_product_attention=record))
            logits = run(clean, noisy, b, start=start, sigma=sigma)
        logits.square().sum().backward()
        found.append((logits.detach(), [p.grad for p in run.parameters()]))
    (dense, dense_grads), (pieces, grads) = found
    assert seen and (max(seen) < 48 - start or piece == 24), "it was done in pieces"
    assert (dense - pieces).abs().max() < 1e-12
    assert all(
        (g - h).abs().max() <= 1e-10 * max(1.0, g.abs().max())
        for g, h in zip(dense_grads, grads, strict=True)
    )


@pytest.mark.parametrize("name", BLOCKDIT)
@torch.no_grad()
def test_golden_training_in_pieces(monkeypatch, name):
    monkeypatch.setattr(attention, "CHUNK_BOUNDS", (8, 8))
    test_golden_training_at_every_block_size.__wrapped__(fast_form, name)


def test_a_plain_next_token_network_keeps_no_outputs():
    net = small(next_token=True)
    cache = net.new_cache(1, 24)
    net(torch.tensor([[1, 2, 3]]), None, 1, cache=cache)
    with pytest.raises(ValueError, match="reads the token before"):
        net(None, torch.tensor([[0]]), 1, 3, cache=cache)
    assert net(torch.tensor([[4]]), torch.tensor([[0]]), 1, 4, cache=cache).shape == (1, 1, 11)
