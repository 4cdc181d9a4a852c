"""Why believe bench.py? The textbook form computes what ours does: a ratio of two different jobs would say nothing."""

import pytest
import torch
from exact import P_VALUE, V3, chi_squared, code, last, net

import diffusion as d
from fast.cache import KVCache
from generate import SAMPLERS, generate
from lab import bench, textbook
from model import ModelConfig, Transformer


def pair(kind):
    process = d.Masked(12, 11) if kind == "masked" else d.Uniform(11, "denoiser")
    torch.manual_seed(0)
    model = Transformer(ModelConfig(process.vocab_size, 16, n_layers=3, n_heads=2, d_model=16, time_conditioning=kind == "uniform"))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return process, model.eval(), torch.randint(11, (4, 16))


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_losses_and_gradients_are_equal(kind):
    process, model, x0 = pair(kind)
    alpha, dalpha = (y[:, None] for y in d.loglinear(torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)))
    xt = process.corrupt(x0, alpha)
    results = []
    for logits, loss in (
        (model(x0, xt, 4, sigma=d.sigma(alpha[:, 0])), lambda *a: process.nll(*a)),
        (textbook.forward(model, x0, xt, 4, 0, d.sigma(alpha[:, 0])), lambda *a: textbook.nll(process, *a)),
    ):
        model.zero_grad()
        each = loss(logits, x0, xt, alpha, dalpha)
        each.mean().backward()
        results.append((logits.detach(), each.detach(), *(p.grad for p in model.parameters())))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4), (a - b).abs().max()


@pytest.mark.parametrize("kind", ["masked", "uniform"])
@torch.no_grad()
def test_the_growing_cache_is_a_cache(kind):
    process, model, x0 = pair(kind)
    model.double()
    ours, growing, level = KVCache(model.cfg, 4, dtype=torch.float64), textbook.GrowingCache(3), torch.ones(4)
    for i in (0, 4, 8):
        prev, block = x0[:, max(0, i - 4) : i], x0[:, i : i + 4].flip(1)
        for clean in (prev, prev[:, :0]):  # commit, then another step on the same block
            a = model(clean, block, 4, i, level, ours)
            b = textbook.forward(model, clean, block, 4, i, level, growing)
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10) and ours.length == growing.length == i


@pytest.mark.parametrize("sampler", ["ancestral", "arpc"])
@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_both_samplers_draw_the_same_distribution(kind, sampler):
    """Two blocks of two tokens, three steps each; ARPC's first block by AR."""
    V = V3
    process = d.Masked(V + 1, V) if kind == "masked" else d.Uniform(V, "denoiser", ar_token=V)
    model, N = net(process, time_conditioning=True), 20_000
    model.head.weight.data *= 0.3  # so that nothing is nearly certain
    model.head.bias.data *= 0.3
    theirs = textbook.generate(model, process, N, 4, 2, 3, guided=sampler == "arpc")
    how = {"sampler": SAMPLERS[sampler], "ar_tokens": 2 if sampler == "arpc" else 0}
    ours = last(generate(model, process, [()] * N, block_size=2, steps=3, max_new_tokens=4, **how)).x
    a, b = (code(x, V).bincount(minlength=V**4).double() for x in (theirs, ours))
    both = (a + b) / 2
    assert chi_squared(both + (a - b) / 2**0.5, both / N) > P_VALUE, "Pearson's sum of two samples, (a - b)^2 / (a + b)"
    assert chi_squared(a, a.roll(1) / N) < P_VALUE


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="a CPU without products of bfloat16")
@pytest.mark.parametrize("what", ["train", "ancestral"])
def test_bfloat16_is_what_is_timed_as_such(monkeypatch, what):
    forward, seen = Transformer.forward, set()
    watched = lambda *args, **how: (seen.add(torch.is_autocast_enabled("cpu")), forward(*args, **how))[1]
    monkeypatch.setattr(Transformer, "forward", watched)
    size = bench.Size(1, 8, 9, (2, 8), ([2], 8), block_size=4, n_heads=1)
    pair = bench.job_pair(size, bench.process_of("masked", 9), torch.device("cpu"), what, 2)
    for who, want in (("ours", {False}), ("bfloat16", {True})):
        seen.clear()
        pair[who]()
        assert seen == want


@pytest.mark.parametrize("k", [None, 0, 2])
def test_soft_tokens_are_timed(k):
    cfg = bench.BenchConfig(repeats=2, d_model=8, seq_len=8, batch_size=2, device="cpu")
    ms, mb = bench.soft_tokens(cfg, 50, k, 1)
    assert len(ms) == 2 and min(ms) > 0 and mb >= 0


@pytest.mark.parametrize("what", bench.MOVED)
def test_the_kernels_do_what_their_rivals_do(what):
    """Equal gradients; of the draws, equal shapes: how they are distributed is tests/test_kernels.py's business."""
    ours, eager = (bench.kernel_job(what, who, 5, 50, 8, torch.float32, torch.device("cpu"))() for who in ("ours", "eager"))
    if what.startswith("sample"):
        assert (ours.token if what == "sample" else ours).numel() == eager.numel() == 5
        return
    for a, b in zip(ours, eager, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6) and a.abs().max() > 0


def test_growth(tmp_path, capsys):
    """A length a row, the textbook's time beside ours, and a group of blocks a row; no time is negative, and the picture is drawn."""
    cfg = bench.BenchConfig(repeats=1, n_layers=1, d_model=8, growth=256, device="cpu")
    rows = bench.growth_table(cfg, torch.device("cpu"))
    train, text = ([r for r in rows if r["job"] == f"growth {what}"] for what in ("train", "sample"))
    assert [r["T"] for r in train] == [128, 256] and all(r["ours_us"] > 0 and r["textbook_us"] > 0 for r in train)
    assert [r["behind"] for r in text] == list(range(0, 256, 16)) and all(r["ms"] > 0 for r in text)
    bench.growth_plot(rows, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000 and "T   256" in capsys.readouterr().out
