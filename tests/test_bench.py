"""
Why believe bench.py? The two that it compares, the lesson and fast/, do the same job. A ratio of two
different jobs would say nothing.
"""

import inspect
import sys

import pytest
import torch
from exact import GENERATE, P_VALUE, V3, agree, chi_squared, code, last, net, noise, on, speed

import diffusion as d
import fast
import generate
from fast.block import FastBlock
from lab import bench
from model import ModelConfig, Transformer
from samplers import SAMPLERS


def pair(kind):
    process = d.Masked(12, 11) if kind == "masked" else d.Uniform(11, "denoiser")
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            process.vocab_size, 16, n_layers=3, n_heads=2, d_model=16, time_conditioning=kind == "uniform"
        )
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return process, model.eval(), torch.randint(11, (4, 16))


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_losses_and_gradients_are_equal(kind):
    """As a step of training takes them: the same random numbers make the same noise."""
    t, results = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64), []
    for path, token_loss in (("fast", fast.token_loss), ("lesson", d.token_loss)):
        process, model, x0 = pair(kind)
        model, process = on(path, model.double(), process)
        total, each = token_loss(model, process, x0, 4, t, "elbo", noise=noise(4, 16))
        total.backward()
        results.append((total.detach(), each, *(p.grad for p in model.parameters())))
    agree(*results)


@pytest.mark.parametrize("kind", ["masked", "uniform"])
@torch.no_grad()
def test_the_growing_cache_is_a_cache(kind):
    """The lesson's cache grows by concatenation, that of fast/ does not: both hold the same."""
    process, model, x0 = pair(kind)
    lesson, level = pair(kind)[1].double(), torch.ones(4)
    quick, _ = speed(model.double(), process)
    ours, growing = quick.new_cache(4, 16), lesson.new_cache(4, 16)
    for i in (0, 4, 8):
        prev, block = x0[:, max(0, i - 4) : i], x0[:, i : i + 4].flip(1)
        for clean in (prev, prev[:, :0]):  # commit, then another step on the same block
            a = quick(clean, block, 4, i, level, ours)
            b = lesson(clean, block, 4, i, level, growing)
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10) and ours.length == growing.length == i


@pytest.mark.slow  # all samplers are compared in test_samplers.py
@pytest.mark.parametrize("sampler", ["ancestral", "arpc"])
@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_both_samplers_draw_the_same_distribution(kind, sampler):
    """Two blocks of two tokens, three steps each; ARPC's first block by AR."""
    V, N, texts = V3, 20_000, []
    how = {"sampler": SAMPLERS[sampler], "ar_tokens": 2 if sampler == "arpc" else 0}
    how |= {"block_size": 2, "steps": 3, "max_new_tokens": 4}
    for path in ("lesson", "fast"):
        process = d.Masked(V + 1, V) if kind == "masked" else d.Uniform(V, "denoiser", ar_token=V)
        model = net(process, time_conditioning=True)
        model.head.weight.data *= 0.3  # so that nothing is nearly certain
        model.head.bias.data *= 0.3
        model, process = on(path, model, process)
        states = GENERATE[path](model, process, [()] * N, seed=len(texts), **how)
        texts.append(last(states).x)
    a, b = (code(x, V).bincount(minlength=V**4).double() for x in texts)
    both = (a + b) / 2
    assert chi_squared(both + (a - b) / 2**0.5, both / N) > P_VALUE, (
        "Pearson's sum of two samples, (a - b)^2 / (a + b)"
    )
    assert chi_squared(a, a.roll(1) / N) < P_VALUE


CODES = {  # what only one form runs
    "lesson": (Transformer.hidden, d.token_loss, generate.Block.reverse, d.Masked.posterior_probs),
    "fast": (fast.FastTransformer.forward, fast.loss.through_head, FastBlock.reverse, fast.draws.sample),
}


@pytest.mark.parametrize("what", ["train", "ancestral", "arpc"])
def test_what_is_timed_is_what_it_says(what):
    """The network, noise, loss and block of the lesson alone, and of fast/ alone; on the same weights."""
    size = bench.Size(1, 8, 9, (2, 8), ([2], 8), block_size=4, n_heads=1)
    want = {form: {inspect.unwrap(f).__code__ for f in codes} for form, codes in CODES.items()}
    weights = []
    for form, other in (("lesson", "fast"), ("fast", "lesson")):
        run = bench.job(size, bench.process_of("masked", 9), torch.device("cpu"), what, 2, form)
        seen, nets = set(), []

        def watch(frame, event, arg, seen=seen, nets=nets):
            seen.add(frame.f_code)
            if isinstance(net := frame.f_locals.get("self"), Transformer):
                nets.append(net)

        sys.setprofile(watch)
        try:
            run()
        finally:
            sys.setprofile(None)
        assert len(seen & want[form]) == (2 if what == "train" else 3) and not seen & want[other]
        weights.append(torch.cat([p.detach().flatten() for p in nets[0].parameters()]))
    assert torch.equal(*weights)


def test_an_edited_lesson_is_not_timed(monkeypatch, slip):
    """What would be compared with it?"""
    monkeypatch.setattr(d.Masked, "ce", lambda self, *a: 0)
    size = bench.Size(1, 8, 9, (2, 8), ([2], 8), block_size=4, n_heads=1)
    error = slip(bench.job, size, d.Masked(9, 8), torch.device("cpu"), "train", 2, "fast")
    assert "diffusion.Masked.ce was replaced" in error


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="a CPU without products of bfloat16")
@pytest.mark.parametrize("what", ["train", "ancestral"])
def test_bfloat16_is_what_is_timed_as_such(monkeypatch, what):
    forward, seen = fast.FastTransformer.forward, set()
    watched = lambda *args, **how: (seen.add(torch.is_autocast_enabled("cpu")), forward(*args, **how))[1]
    size = bench.Size(1, 8, 9, (2, 8), ([2], 8), block_size=4, n_heads=1)
    where = size, bench.process_of("masked", 9), torch.device("cpu")
    jobs = {form: bench.job(*where, what, 2, form) for form in ("fast", "bfloat16")}
    monkeypatch.setattr(fast.FastTransformer, "forward", watched)
    for who, want in (("fast", {False}), ("bfloat16", {True})):
        seen.clear()
        jobs[who]()
        assert seen == want


@pytest.mark.parametrize("k", [None, 0, 2])
def test_soft_tokens_are_timed(k):
    cfg = bench.BenchConfig(repeats=2, d_model=8, seq_len=8, batch_size=2, device="cpu")
    ms, mb = bench.soft_tokens(cfg, 50, k, 1)
    assert len(ms) == 2 and min(ms) > 0 and mb >= 0


@pytest.mark.parametrize("what", bench.MOVED)
def test_the_kernels_do_what_their_rivals_do(what):
    """
    Equal gradients; of the draws, equal shapes: how they are distributed is tests/test_kernels.py's business.
    """
    ours, eager = (
        bench.kernel_job(what, who, 5, 50, 8, torch.float32, torch.device("cpu"))()
        for who in ("ours", "eager")
    )
    if what.startswith("sample"):
        assert (ours.token if what == "sample" else ours).numel() == eager.numel() == 5
        return
    for a, b in zip(ours, eager, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6) and a.abs().max() > 0


@pytest.mark.slow
def test_growth(tmp_path, capsys):
    """
    A length a row, the lesson's time beside that of fast/, and a group of blocks a row. No time is negative,
    and the picture is drawn.
    """
    cfg = bench.BenchConfig(repeats=1, n_layers=1, d_model=8, growth=256, device="cpu")
    rows = bench.growth_table(cfg, torch.device("cpu"))
    train, text = ([r for r in rows if r["job"] == f"growth {what}"] for what in ("train", "sample"))
    assert [r["T"] for r in train] == [128, 256]
    assert all(r["fast_us"] > 0 and r["lesson_us"] > 0 for r in train)
    assert [r["behind"] for r in text] == list(range(0, 256, 16)) and all(r["ms"] > 0 for r in text)
    bench.growth_plot(rows, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000 and "T   256" in capsys.readouterr().out
