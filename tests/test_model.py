"""Why believe model.py? Logits of the public reference implementation, a brute-force mask, and cached = uncached."""

from pathlib import Path

import numpy as np
import pytest
import torch

import diffusion as d
import model as m
from fast import attention
from fast.cache import KVCache
from generate import generate
from hub.published import from_reference
from run.machine import mixed

GOLDEN = Path(__file__).parent / "golden"
BLOCKDIT = ["blockdit_adaln_x0causal", "blockdit_adaln_x0block", "blockdit_noadaln_x0causal"]


def load(name):
    z = np.load(GOLDEN / f"{name}.npz")
    arrays = {k: torch.from_numpy(z[k]) for k in z.files if z[k].ndim}
    net = from_reference({k: v for k, v in arrays.items() if k.startswith("w.")}, {k: z[k] for k in z.files if k.startswith("cfg.")})
    return net.eval(), arrays, {k: int(z[k]) for k in z.files if z[k].ndim == 0 and k != "cfg.dropout"}


def close(logits, golden):
    gap = (logits - golden).abs().max().item()
    assert gap < 1e-4, f"logits differ by {gap:.2e}"


@pytest.mark.parametrize("name", BLOCKDIT)
@torch.no_grad()
def test_golden_training_at_every_block_size(name):
    net, a, _ = load(name)
    for b in a["train.block_sizes"].tolist():
        close(net(a["x0"], a["xt"], b, sigma=a["sigma"]), a[f"train.logits.bs{b}"])
        if f"train.logits.bs{b}.sigma0" in a:
            close(net(a["x0"], a["xt"], b), a[f"train.logits.bs{b}.sigma0"])
    sizes = torch.tensor(a["train.block_sizes"].tolist()[:2])  # one block size a row
    both = torch.stack([a[f"train.logits.bs{b}"][i] for i, b in enumerate(sizes.tolist())])
    close(net(a["x0"], a["xt"], sizes, sigma=a["sigma"]), both)


@pytest.mark.parametrize("name", BLOCKDIT)
@torch.no_grad()
def test_golden_generate_and_verify_cached_and_not(name):
    net, a, s = load(name)
    sigma, b, ctx = a["sigma"], s["gen.block_size"], s["gen.context_len"]
    close(net(a["gen.x0"], a["gen.xt"], b, start=ctx, sigma=sigma), a["gen.logits"])
    close(net(None, a["gen_first.xt"], b, sigma=sigma), a["gen_first.logits"])
    v = s["arv.context_len"]
    close(net(a["arv.x0"], a["arv.xt"], 1, start=v, sigma=sigma), a["arv.logits"])
    close(net(a["arv.x0"], a["arv_rand.xt"], 1, start=v, sigma=sigma), a["arv_rand.logits"])
    close(net(a["arv_noctx.x0"], a["arv_noctx.xt"], 1, sigma=sigma), a["arv_noctx.logits"])

    cache = KVCache(net.cfg, 2)
    for i in range(0, ctx, b):  # each call commits the block before it and reads the next one
        prev = a["gen.x0"][:, i - b : i] if i else None
        net(prev, a["x0"][:, i : i + b], b, start=i, sigma=sigma, cache=cache)
    close(net(a["gen.x0"][:, ctx - b :], a["gen.xt"], b, start=ctx, sigma=sigma, cache=cache), a["gen.logits"])
    assert cache.length == ctx
    close(net(None, a["gen.xt"], b, start=ctx, sigma=sigma, cache=cache), a["gen.logits"])  # again, nothing left to commit
    close(net(a["arv.x0"][:, v:], a["arv.xt"], 1, start=v, sigma=sigma, cache=cache), a["arv_cached.logits"])
    cache.length = v  # the verified tokens were a guess
    close(net(None, a["gen.xt"], b, start=ctx, sigma=sigma, cache=cache), a["gen.logits"])


@torch.no_grad()
def test_golden_full_diffusion():
    net, a, s = load("dit_duo")
    L = s["cfg.length"]
    close(net(None, a["xt"], L, sigma=a["sigma"]), a["logits"])
    close(net(None, a["xt"], L), a["logits.sigma0"])
    close(net(None, a["xt"][:, : L // 2], L, sigma=a["sigma"]), a["logits.half_length"])
    close(net(a["x0"], a["xt"], L, sigma=a["sigma"]), a["logits"])  # a clean stream nobody reads is skipped
    close(net(a["x0"], a["xt"], torch.tensor([L, L]), sigma=a["sigma"]), a["logits"])  # or computed, and not read


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("b, past, C, N, start", [(4, 0, 12, 12, 0), (3, 6, 3, 3, 9), (1, 5, 4, 4, 5), (8, 8, 0, 8, 8), (5, 0, 12, 12, 0)])
def test_mask_equals_the_rule_word_by_word(b, past, C, N, start, causal):
    got = m.attention_mask(b, past, C, N, start, causal)[0]
    keys = [("clean", j) for j in range(past + C)] + [("noisy", start + j) for j in range(N)]
    for row, (kind, i) in enumerate(keys[past:]):
        for column, (other, j) in enumerate(keys):
            if kind == "clean":
                want = other == "clean" and (j <= i if causal else j // b <= i // b)
            else:
                want = j < b * (i // b) if other == "clean" else j // b == i // b
            assert got[row, column] == want, f"{kind} {i} -> {other} {j}"


def small(**kw):
    torch.manual_seed(0)
    net = m.Transformer(m.ModelConfig(vocab_size=11, seq_len=24, n_layers=3, n_heads=2, d_model=32, cond_dim=16, **kw)).eval()
    for p in net.parameters():  # nothing hidden behind a zero
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return net


@torch.no_grad()
def test_a_fresh_model_costs_log_V():
    net = m.Transformer(m.ModelConfig(vocab_size=11, seq_len=8, time_conditioning=True))
    assert net(None, torch.randint(11, (2, 8)), 8, sigma=torch.ones(2)).abs().max() == 0


@torch.no_grad()
def test_information_flows_where_the_rule_says():
    """A clean token moves no noisy position of its own or an earlier block, and does move every later block."""
    net, b = small(), 4
    clean, noisy = torch.randint(11, (1, 24)), torch.randint(11, (1, 24))
    base = net(clean, noisy, b)
    for j in (0, 6, 13):
        other = clean.clone()
        other[0, j] = (other[0, j] + 1) % 11
        moved = (net(other, noisy, b) - base).abs().amax(-1)[0] > 1e-6
        assert moved.tolist() == [i // b > j // b for i in range(24)]


@torch.no_grad()
def test_the_clean_stream_does_not_see_time():
    """Else a cache filled at one noise level would be wrong at the next. Two sigmas, one cache."""
    net = small(time_conditioning=True)
    clean, noisy = torch.randint(11, (2, 8)), torch.randint(11, (2, 4))
    a, b = KVCache(net.cfg, 2), KVCache(net.cfg, 2)
    la = net(clean, noisy, 4, start=8, sigma=torch.tensor([0.1, 0.2]), cache=a)
    lb = net(clean, noisy, 4, start=8, sigma=torch.tensor([3.0, 4.0]), cache=b)
    assert torch.equal(a.k[..., :8, :], b.k[..., :8, :]) and torch.equal(a.v[..., :8, :], b.v[..., :8, :])
    assert (la - lb).abs().max() > 1e-3  # and the noisy stream does see it
    close(net(None, noisy, 4, start=8, sigma=torch.tensor([3.0, 4.0]), cache=a), lb)
    whole = net(torch.cat((clean, clean[:, :4]), 1), torch.cat((clean, noisy), 1), 4, sigma=torch.tensor([3.0, 4.0]))
    close(whole[:, 8:], lb)


@torch.no_grad()
def test_clean_tokens_alone_are_committed():
    """A prefill: no noisy token, no logits, and the same cache as with one."""
    net, ids = small(), torch.randint(11, (2, 12))
    a, b = KVCache(net.cfg, 2), KVCache(net.cfg, 2)
    assert net(ids[:, :8], None, 4, cache=a).shape == (2, 0, 11) and net(ids[:, :8], None, 4).shape == (2, 0, 11)
    close(net(None, ids[:, 8:], 4, start=8, cache=a), net(ids[:, :8], ids[:, 8:], 4, start=8, cache=b))
    assert a.length == b.length == 8


@torch.no_grad()
def test_a_shorter_sequence_is_a_prefix():
    """Positions count from 0 in both streams whatever the length of the batch (the reference shifts the noisy ones)."""
    net = small()
    clean, noisy = torch.randint(11, (2, 24)), torch.randint(11, (2, 24))
    close(net(clean[:, :8], noisy[:, :8], 4), net(clean, noisy, 4)[:, :8])


@torch.no_grad()
def test_a_noisy_stream_may_cover_the_answer_only():
    """Prompts need no noisy copy: the same logits as with one."""
    net = small()
    clean, noisy = torch.randint(11, (3, 24)), torch.randint(11, (3, 24))
    sizes = torch.tensor([1, 4, 8])
    close(net(clean, noisy[:, 8:], sizes, start=8), net(clean, noisy, sizes)[:, 8:])


@pytest.mark.parametrize("name", BLOCKDIT[:2])
def test_reference_weights_generate_with_a_cache_as_without(name):
    """Their clean stream is conditioned too, on sigma = 0 always: a cache made at one noise level must hold at the next."""
    net, _, s = load(name)
    process, runs = d.Masked(s["cfg.vocab_size"], s["cfg.mask_index"]), []
    for cached in (True, False):
        for state in generate(net.double(), process, [(), (1, 2, 3)], block_size=8, steps=3, use_cache=cached):
            pass
        runs.append(state.x)
    assert torch.equal(*runs)


@torch.no_grad()
def test_logits_are_float32_whatever_the_weights():
    net = small(time_conditioning=True)
    ids = torch.randint(11, (2, 8))
    exact = net(ids, ids, 4, sigma=torch.ones(2))
    rounded = net.bfloat16()(ids, ids, 4, sigma=torch.ones(2))
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert net.double()(ids, ids, 4).dtype == torch.float64


def test_positions_beyond_the_context_are_refused():
    with pytest.raises(ValueError, match="seq_len 24"):
        small()(None, torch.zeros(1, 25, dtype=torch.long), 25)


def test_leftover_or_missing_weights_are_named():
    z = np.load(GOLDEN / "dit_duo.npz")
    w, cfg = {k: z[k] for k in z.files if k.startswith("w.")}, {k: z[k] for k in z.files if k.startswith("cfg.")}
    with pytest.raises(RuntimeError, match="surprise"):
        from_reference({**w, "w.surprise": z["sigma"]}, cfg)
    del w["w.output_layer.linear.bias"]
    with pytest.raises(RuntimeError, match="head.bias"):
        from_reference(w, cfg)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_several_readings_of_a_block_share_a_pass(timed, cached):
    """[context, guess | probes at block size 1, the noisy block]: each with its own block size and noise level, none sees the other."""
    torch.manual_seed(0)
    cfg = m.ModelConfig(7, 16, n_layers=2, n_heads=2, d_model=16, cond_dim=8, time_conditioning=timed)
    net = m.Transformer(cfg).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    context, guess, probe, block = (torch.randint(7, (3, 4)) for _ in range(4))
    alpha = torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64)
    at, b = torch.arange(4, 8), 4

    def run(noisy, block_size, start, level, clean):
        if not cached:
            return net(torch.cat((context, clean), 1), noisy, block_size, start, level)
        cache = KVCache(cfg, 3, 32, dtype=torch.float64)
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
def test_the_head_keeps_its_digits_under_bfloat16():
    """A stretch of 1.001 is 1 in bfloat16; logits are float32, and what scales them."""
    net, x = small(time_conditioning=True), torch.randint(11, (2, 8))
    for p in (net.modulation.weight, net.modulation.bias, net.head.bias):
        torch.nn.init.zeros_(p)
    found = []
    for stretch in (0.0, 2.0**-10):  # both have their bfloat16
        net.modulation.bias[32:] = stretch
        with torch.autocast("cpu", torch.bfloat16):
            found.append(net(None, x, 8, sigma=torch.ones(2)))
    before, after = found
    assert after.dtype == torch.float32 and torch.allclose(after, before * (1 + 2.0**-10), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "timed", "one level", "next_token"])
@pytest.mark.parametrize("rows", [None, [0, 3], [2]])
@torch.no_grad()
def test_only_the_tokens_asked_for(kind, rows):
    """forward(..., ask) is forward(...)[ask], cached or not; so it is of some of the cache's rows, whatever the others hold."""
    net = small(time_conditioning=kind in ("timed", "one level"), next_token=kind == "next_token").double()
    context, clean, noisy = (torch.randint(11, (4, n)) for n in (8, 4, 4))
    b, start = (1, 9) if kind == "next_token" else (4, 12)  # a next-token network says position i of clean token i - 1
    level = torch.tensor([0.3]).double() if kind == "one level" else torch.tensor([0.1, 0.3, 1.0, 3.0]).double()
    ask = torch.rand(4, 4) < 0.4
    ask[0] = torch.tensor([True, False, False, True])
    want = net(torch.cat((context, clean), 1), noisy, b, start, level)
    assert (net(torch.cat((context, clean), 1), noisy, b, start, level, ask=ask) - want[ask]).abs().max() < 1e-12
    cache = KVCache(net.cfg, 4, dtype=torch.float64)
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


@pytest.mark.parametrize("timed, dtype", [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_passes_without_gradients_are_those_with(timed, dtype):
    """Block after block of 16: by oneDNN, from weights kept in its order, with one noise level for all, asked for some."""
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("a CPU without products of bfloat16")
    with mixed(torch.device("cpu"), dtype):
        compare_without_gradients(timed, dtype, 1e-4 if dtype == torch.float32 else 0.03)


def compare_without_gradients(timed, dtype, near):
    net = m.Transformer(m.ModelConfig(11, 64, n_layers=2, n_heads=2, d_model=64, cond_dim=16, time_conditioning=timed))
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.1)
    x, noisy, ask, level = torch.randint(11, (6, 48)), torch.randint(11, (6, 16)), torch.rand(6, 16) < 0.5, torch.tensor([0.3])
    cache = KVCache(net.cfg, 6)
    for start in (16, 32, 48):
        want = net(x[:, :start], noisy, 16, start, level.expand(6))
        verdict = net(x[:, :start], noisy, 1, start - 16, level.expand(6))
        with torch.no_grad():
            got = net(x[:, start - 16 : start], noisy, 1, start - 16, level, cache)
            assert (got - verdict).abs().max() < near * verdict.abs().max()
            for how in ({}, {"ask": ask}):
                got = net(None, noisy, 16, start, level, cache, **how)
                assert (got - (want[ask] if how else want)).abs().max() < near * want.abs().max()
    assert len(cache.passes) == 1, "angles and masks of one block, not of all"
    packed = {name[0]: kept for name, kept in cache.kept.items() if isinstance(name, tuple) and torch.is_tensor(kept)}
    assert all(kept.dtype == (torch.float32 if layer is net.head else dtype) for layer, kept in packed.items())
    linears = {net.head} | {p for p in net.layers.modules() if isinstance(p, torch.nn.Linear)}
    assert set(packed) | {net.layers[0].qkv} == linears - {layer.modulation for layer in net.layers}
    kept = [cache.kept] if not timed else cache.levels.values()
    tables = [level["letters"] for level in kept]  # an alphabet of 11: what the first layer makes of it was looked up
    assert {len(table) for table in tables} == ({11} if not timed else {11, 22})
    big = KVCache(net.cfg, 6)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "LETTERS", 10)
        for _ in range(3):
            big.length = 0
            assert (net(x[:, :16], noisy, 1, 0, level, big) - net(x[:, :16], noisy, 1, 0, level)).abs().max() < near
    assert not any("letters" in level for level in [big.kept, *big.levels.values()])


@pytest.mark.parametrize("ask", [None, [0, 1], [0, 0]])
def test_one_noise_level_under_autocast(ask):
    """One row, or one token asked for: what adaLN makes of its level is bfloat16 then, what it moves and stretches is not."""
    net = small(time_conditioning=True).float()
    clean, noisy = torch.randint(11, (2, 1, 8))
    asked = None if ask is None else torch.tensor([ask[:1] * 7 + ask[1:]]).bool()
    found = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            found.append(net(clean, noisy, 4, sigma=torch.tensor([0.5]), ask=asked))
    exact, rounded = found
    assert rounded.dtype == torch.float32 and (rounded - exact).norm() <= 0.05 * exact.norm()
    assert torch.autograd.grad(rounded.sum(), net.layers[0].norm1.weight)[0].isfinite().all()


@pytest.mark.parametrize("grad", [True, False])
def test_float64_stays_float64_under_autocast(grad):
    """As autocast itself has it; with a cache, weights may be kept in its order."""
    net, found = small(time_conditioning=True).double(), []
    clean, noisy = torch.randint(11, (2, 2, 8))
    with torch.set_grad_enabled(grad):
        for on in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                assert attention.dtype_of(net.head.weight) == torch.float64
                found.append(net(clean, noisy, 4, sigma=torch.ones(2), cache=None if grad else KVCache(net.cfg, 2, dtype=torch.float64)))
    assert found[1].dtype == torch.float64 and (found[0] - found[1]).abs().max() < 1e-12


@torch.no_grad()
def test_what_is_kept_of_passes_over_one_context_is_of_their_start_too():
    """Angles and masks: blocks at several places behind one context, and behind another one."""
    net = small().double()
    cache = KVCache(net.cfg, 2, 24, dtype=torch.float64)
    clean, noisy = torch.randint(11, (2, 12)), torch.randint(11, (2, 2))
    for n in (8, 12, 8):
        cache.length = 0
        net(clean[:, :n], None, 2, cache=cache)
        for start in (n, n + 2, n):
            assert (net(None, noisy, 2, start, cache=cache) - net(clean[:, :n], noisy, 2, start)).abs().max() < 1e-12


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("piece", [4, 8, 10, 24])
@pytest.mark.parametrize(
    "sizes, start, causal", [(4, 0, True), (8, 0, False), (1, 5, True), ([1, 4, 8], 8, True), ([2, 4, 4], 0, True), (6, 12, True)]
)
def test_attention_in_pieces_is_the_dense_one(monkeypatch, sizes, start, causal, piece, timed):
    """Logits and gradients of a training pass, to rounding, whatever the pieces; with prompts, and a short last piece."""
    net = small(clean_causal=causal, time_conditioning=timed).double()
    clean, noisy = torch.randint(11, (3, 24)), torch.randint(11, (3, 24 - start))
    b, sigma = (sizes if isinstance(sizes, int) else torch.tensor(sizes)), torch.tensor([0.1, 1.0, 3.0]).double()
    found, seen, one = [], [], attention.softmax_attention
    monkeypatch.setattr(attention, "softmax_attention", lambda q, *a: seen.append(q.size(2)) or one(q, *a))
    for size in (1000, piece):
        monkeypatch.setattr(attention, "PIECES", (size, size))
        seen.clear()
        logits = net(clean, noisy, b, start=start, sigma=sigma)
        net.zero_grad()
        logits.square().sum().backward()
        found.append((logits.detach(), [p.grad.clone() for p in net.parameters()], max(seen)))
    (dense, dense_grads, _), (pieces, grads, longest) = found
    assert longest < 48 - start or piece == 24, "it was done in pieces"
    assert (dense - pieces).abs().max() < 1e-12
    assert all((g - h).abs().max() <= 1e-10 * max(1.0, g.abs().max()) for g, h in zip(dense_grads, grads, strict=True))


@pytest.mark.parametrize("name", BLOCKDIT)
@torch.no_grad()
def test_golden_training_in_pieces(monkeypatch, name):
    monkeypatch.setattr(attention, "PIECES", (8, 8))
    test_golden_training_at_every_block_size(name)
