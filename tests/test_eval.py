"""
Why believe eval.py, and quality, sweep and paper of lab/? Bounds against every noisy state there is, standard
errors against what repeated runs do, bits per byte against two tokenizers, and reports that go on after a
kill.
"""

import base64
import copy
import itertools
import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, slow
from exact import EPS32, KINDS, V3, agree, enumerated, enumerated_ar, net, quadrature, speed, states

import diffusion as d
import eval as evaluation
import fast
from data.dataset import Dataset, write_dataset
from data.tokens import Tokenizer
from eval import estimate, likelihood, mixture_bounds
from lab import paper, plots, quality, sweep
from options import TrainConfig
from rng import Noise, stratified_draw
from run import checkpoint
from run.cli import load_config
from train import train


class Rows:
    """A dataset of these rows (W, L); given (W, L) bool: the prompt. No padding."""

    def __init__(self, x0, given=None):
        self.x0, self.given = x0, torch.zeros_like(x0, dtype=torch.bool) if given is None else given
        self.row_len = self.seq_len = x0.size(1)

    def spread(self, split, n):
        return torch.arange(len(self.x0))

    def windows(self, split, index):
        return self.x0[index], self.given[index], torch.ones_like(self.given[index])


def some(n, L=4, seed=0):
    return states(V3, L)[torch.randperm(V3**L, generator=torch.Generator().manual_seed(seed))[:n]]


# ----- likelihood

BOUND = {
    "masked": {},
    "masked, timed": {"time_conditioning": True},
    "uniform loo": {},
    "uniform denoiser, timed": {"time_conditioning": True},
}


def setup(kind, **kw):
    process = KINDS[kind.replace(", timed", "") if kind.startswith("masked") else kind][0]()
    return process, net(process, **BOUND[kind], **kw).double()


@pytest.mark.parametrize("kind, b", slow(itertools.product(BOUND, (2, 4)), [("masked", 4)]))
def test_bounds_are_the_enumerated_ones_and_their_errors_hold(kind, b):
    """
    Against quadrature over t and every x_t: the mean of many runs is the bound, and in at least 90 % of them
    the bound lies within 1.96 Monte Carlo errors, which do not earn that by being far too large.
    """
    process, model = setup(kind)
    x0 = some(12)
    truth = quadrature(model, process, x0, b, process.t_min).sum().item() / x0.numel()
    model, process = speed(model, process)
    x0 = x0.repeat(5, 1)  # with a dozen windows the errors themselves would be guesses
    runs = [
        estimate(found.nats[b], found.tokens)
        for found in (likelihood(model, process, Rows(x0), [b], n_mc=8, seed=s) for s in range(100))
    ]
    means, errors, _ = (torch.tensor(x, dtype=torch.float64) for x in zip(*runs, strict=True))
    covered = ((means - truth).abs() < 1.96 * errors).double().mean().item()
    ratio = (errors.square().mean().sqrt() / means.std()).item()
    print(
        f"{kind}, block {b}: {truth:.4f}, mean {means.mean():.4f} +- {means.std() / 10:.4f},"
        f" covered {covered:.2f}, error ratio {ratio:.2f}"
    )
    assert abs(means.mean() - truth) < 4 * means.std() / 10
    assert covered >= 0.9 and 0.8 < ratio < 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "uniform denoiser, timed"])
def test_the_error_over_windows_holds_for_other_windows(kind):
    """
    120 runs on 40 random windows each: the bound's mean over all windows lies within 1.96 errors in at least
    90 % of them.
    """
    process, model = setup(kind)
    every = states(V3, 4)
    model, process = speed(model, process)
    truth = quadrature(model, process, every, 4, process.t_min).mean().item() / 4
    runs = []
    for s in range(120):
        x0 = every[torch.randint(len(every), (40,), generator=torch.Generator().manual_seed(s))]
        found = likelihood(model, process, Rows(x0), [4], n_mc=2, seed=s)
        runs.append(estimate(found.nats[4], found.tokens))
    covered = np.mean([abs(mean - truth) < 1.96 * error for mean, _, error in runs])
    assert covered >= 0.9, covered
    assert all(error > 0.5 * mc for _, mc, error in runs)


@pytest.mark.parametrize("kind", KINDS)
def test_block_size_1_is_exact(kind):
    """
    -log p of the enumerated chain, with no Monte Carlo error; with random placeholders a bound above it.
    """
    process, model = KINDS[kind][0](), net(KINDS[kind][0](), **KINDS[kind][1]).double()
    x0 = some(10)
    found = likelihood(model, process, Rows(x0), [1], n_mc=64)
    chain = enumerated_ar(model, process, 4)
    exact = torch.tensor([-math.log(chain[tuple(row)]) for row in x0.tolist()], dtype=torch.float64)
    if process.exact_ar:
        assert process.mask_id is not None or process.ar_token is not None
        assert len(found.nats[1]) == 1
        agree(found.nats[1][0], exact)
    else:  # the mean over placeholders of -log p(x_i | x_<i, placeholder)
        mean, noisiest = 0.0, d.sigma(torch.zeros(10).double())
        with torch.no_grad():
            for i in range(4):
                log_p = torch.stack(
                    [
                        model(x0[:, :i], torch.full((10, 1), v), 1, i, noisiest)[:, 0].log_softmax(-1)
                        for v in range(V3)
                    ]
                )
                mean -= log_p.gather(-1, x0[:, i].expand(V3, -1)[..., None])[..., 0].mean(0)
        estimated, error, _ = estimate(found.nats[1], found.tokens)
        assert len(found.nats[1]) == 2 and 0 < error and abs(estimated - mean.mean() / 4) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "uniform denoiser, timed"])
def test_prompts_cost_nothing_and_are_read(kind):
    """
    Prompts of different lengths, ending inside blocks: the bound of the answers alone, against Monte Carlo of
    token_loss itself.
    """
    process, model = setup(kind)
    x0 = some(16)
    given = torch.arange(4) < torch.tensor([0, 1, 2, 3] * 4)[:, None]
    found = likelihood(model, process, Rows(x0, given), [2], n_mc=256)
    assert torch.equal(found.tokens, (~given).sum(1).double())
    n = 2000
    rows, shown = x0.repeat(n, 1), given.repeat(n, 1)
    t = stratified_draw({2: 1.0}, len(rows), 3, 0)[1]
    floor = process.t_min
    assert (floor > 0) == (process.mask_id is None)
    cut = lambda t: (1 - (floor + (1 - floor) * t), -torch.full_like(t, 1 - floor))
    with torch.no_grad():
        noise = lambda k: Noise(k, torch.arange(len(rows)), torch.arange(4))
        each = d.token_loss(model, process, rows, 2, t, "elbo", shown, schedule=cut, noise=noise(5))[1]
        if floor:
            each += d.token_loss(model, process, rows, 2, t * 0, "last", shown, schedule=cut, noise=noise(6))[
                1
            ]
    sums = each.double().sum(1).view(n, 16)
    error = (sums.var(0).sum() / n).sqrt() + (found.nats[2][0] - found.nats[2][1]).square().sum().sqrt() / 2
    assert abs(found.nats[2].mean(0).sum() - sums.mean(0).sum()) < 4 * error


@pytest.mark.parametrize("form", ["lesson", "fast"])
def test_a_last_step_costs_what_it_should(form):
    """-log p(x_0 | x_t) by Bayes from the leave-one-out l, whichever of l and D the network says."""
    made = fast.processes.accelerate if form == "fast" else lambda process: process
    V, alpha = 5, torch.tensor([0.7], dtype=torch.float64)
    z = torch.randn(1, 6, V, dtype=torch.float64)
    x0, xt = torch.randint(V, (2, 1, 6))
    q = alpha * torch.nn.functional.one_hot(xt, V) + (1 - alpha) / V  # q(x_t | x_0 = v)
    want = (
        -(z.softmax(-1) * q / (z.softmax(-1) * q).sum(-1, keepdim=True))
        .log()
        .gather(-1, x0[..., None])[..., 0]
    )
    loo, denoiser = made(d.Uniform(V)), made(d.Uniform(V, "denoiser"))
    agree(loo.last_step(z, x0, xt, alpha), want)
    agree(denoiser.last_step(loo.denoiser_logits(z, xt, alpha), x0, xt, alpha), want)


def test_times_fill_the_unit_interval():
    u = evaluation.times(50, 4, 0, 16, 0)
    assert sorted((u * 200).long().flatten().tolist()) == list(range(200)), (
        "one time in each of 50 x 4 slices"
    )
    assert all(sorted((row * 4).long().tolist()) == [0, 1, 2, 3] for row in u), (
        "and a window's in each quarter"
    )
    assert not torch.equal(u, evaluation.times(50, 4, 0, 16, 1)) and torch.equal(
        u, evaluation.times(50, 4, 0, 16, 0)
    )
    starts = torch.stack([evaluation.times(8, 1, s, 16, 0)[:, 0] for s in range(400)])
    assert (starts.mean(0) - 0.5).abs().max() < 0.08, "no window is always early"


@pytest.mark.slow
def test_the_bounds_of_a_mixture_of_enumerated_chains():
    """
    log-sum-exp of bounds lies above -log sum_k w_k p_k(x) of the very chains, Jensen above that; a row at a
    time.
    """
    process = d.Masked(V3 + 1, V3)
    model, x0, weights = net(process), some(10), {1: 0.3, 2: 0.2, 4: 0.5}
    chains = {
        1: enumerated_ar(model, process, 4),
        2: enumerated(model, process, 2, 48, 4),
        4: enumerated(model, process, 4, 48, 4),
    }
    truth = torch.tensor(
        [-math.log(sum(w * chains[b][tuple(row)] for b, w in weights.items())) for row in x0.tolist()]
    )
    found = likelihood(model, process, Rows(x0), list(weights), n_mc=512)
    got = mixture_bounds(found.nats, weights)
    lse, jensen = got["log-sum-exp"].mean(0), got["Jensen"].mean(0)
    assert (lse > truth - 0.02).all() and (jensen > lse).all(), (lse - truth, jensen - lse)
    nats = {1: -torch.tensor([chains[1][tuple(row)] for row in x0.tolist()]).log()} | {
        b: quadrature(model, process, x0, b) for b in (2, 4)
    }
    want = -torch.log(sum(w * (-nats[b]).exp() for b, w in weights.items()))
    assert abs((lse - want).mean()) < 0.05, "on average what quadrature says"


def test_the_bounds_of_a_mixture_without_noise_are_their_formulas():
    g = torch.Generator().manual_seed(0)
    nats = {b: (torch.rand(1, 1000, generator=g) * 4).double() for b in (1, 4, 16)}
    weights = {1: 0.2, 4: 0.3, 16: 0.5}
    got = mixture_bounds({b: x if b == 1 else x.expand(2, -1) for b, x in nats.items()}, weights)
    want = -torch.log(sum(w * (-nats[b][0]).exp() for b, w in weights.items()))
    assert (got["log-sum-exp"] - want).abs().max() < 1e-12 and (
        got["log-sum-exp, plug-in"] - want
    ).abs().max() < 1e-12
    assert (got["Jensen"][0] - sum(w * nats[b][0] for b, w in weights.items())).abs().max() < 1e-12
    assert abs(got["mc1"].mean() - got["Jensen"].mean()) < 0.15 and got["mc1"].std() > got["Jensen"].std()
    chosen = torch.stack([(got["mc1"][0] == nats[b][0]) for b in weights]).double().mean(1)
    assert (chosen - torch.tensor([0.2, 0.3, 0.5])).abs().max() < 0.002, (
        "each size has its share of the windows"
    )


def test_noise_makes_the_plain_log_sum_exp_too_low_and_ours_a_bound():
    """
    What it says on the tin: means over noisy l_k, plug-in below the truth, the cross-fitted one above it.
    """
    g = torch.Generator().manual_seed(1)
    weights, truth = {1: 0.5, 16: 0.5}, -math.log(0.5 * math.exp(-5) + 0.5 * math.exp(-6))
    nats = {
        1: torch.full((1, 20000), 5.0, dtype=torch.float64),
        16: 6 + 3 * torch.randn(2, 20000, generator=g, dtype=torch.float64),
    }
    got = {name: x.mean().item() for name, x in mixture_bounds(nats, weights).items()}
    assert got["log-sum-exp, plug-in"] < truth - 0.2 and got["log-sum-exp"] > truth
    assert got["log-sum-exp"] < got["Jensen"] + 0.5


def test_the_same_seed_gives_the_same_numbers_whatever_the_batches(monkeypatch):
    process, model = setup("uniform denoiser, timed")
    model.double()
    run = lambda seed: likelihood(model, process, Rows(some(70)), [1, 2, 4], n_mc=4, seed=seed).nats
    first, other = run(0), run(1)
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, n, *a: split(self, 7 if n == 64 else n, *a))
    for b in (1, 2, 4):
        agree(first[b], run(0)[b])  # 7 rows at a time or 64
    assert (first[4] - other[4]).abs().max() > 0.1


@pytest.mark.parametrize("kind", [*BOUND, "uniform denoiser, ar token"])
def test_the_fast_path_gives_the_lessons_likelihood(kind):
    process = KINDS[kind.replace(", timed", "") if kind.startswith("masked") else kind][0]()
    model = net(process, **BOUND.get(kind, {"time_conditioning": True})).double()
    twin = speed(copy.deepcopy(model), process)
    given = torch.arange(4) < torch.tensor([0, 1, 2, 3] * 5)[:, None]
    one, two = (
        likelihood(*pair, Rows(some(20), given), [1, 2, 4], n_mc=4, seed=3)
        for pair in ((model, process), twin)
    )
    agree([two.nats[b] for b in (1, 2, 4)], [one.nats[b] for b in (1, 2, 4)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["masked", "uniform denoiser, timed"])
def test_a_gpu_says_the_same(kind):
    """
    The random numbers are those of the CPU, so what differs in float64 are frequencies of the time, which are
    float32 (model.py).
    """
    process, model = setup(kind)
    model.double()
    here = likelihood(model, process, Rows(some(40)), [1, 4], n_mc=4)
    there = likelihood(model.cuda(), process, Rows(some(40)), [1, 4], n_mc=4)
    for b in (1, 4):
        assert abs(estimate(here.nats[b], here.tokens)[0] - estimate(there.nats[b], there.tokens)[0]) < 1e-5


@pytest.mark.parametrize("kind", ["masked, timed", "uniform denoiser, timed"])
def test_a_time_for_each_token_may_be_the_same_for_all(kind):
    """
    One t a row, and that t once a token, are one thing; as many rows as tokens, so no mistaken shape fits by
    chance and is right.
    """
    process, model = setup(kind)
    model.double()
    x0, t = some(4), torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    sizes, names = torch.tensor([1, 2, 4, 2]), {2: "elbo", 4: "elbo"}
    with torch.no_grad():
        loss = lambda t: d.token_loss(
            model, process, x0, sizes, t, names, noise=Noise(1, torch.arange(4), torch.arange(4))
        )[1]
        agree(loss(t[:, None].expand(4, 4)), loss(t))


# ----- windows, bytes and tokenizers


def test_windows_do_not_overlap_and_zero_means_all(project):
    rng = np.random.default_rng(0)
    (project / "data/odd").mkdir()
    stream = rng.integers(0, 3, 203)
    write_dataset("data/odd", stream, stream, {"vocab_size": 3, "tokenizer": "char", "chars": "abc"})
    data = Dataset("odd", 8)
    for n in (2, 7, 25, 100):
        index = data.spread("val", n)
        assert len(index) == min(n, 25) and (index.diff() >= 8).all() and index[-1] == 195
    process = d.Masked(4, 3)
    found = likelihood(net(process), process, data, [1], n_eval=0)
    assert found.tokens.sum() == 203 and found.tokens[-1] == 3, (
        "25 windows and the three tokens that are left, each once"
    )
    assert len(Dataset("pairs").spread("val", 0)) == 50 and len(Dataset("pairs").spread("val", 20)) == 20


def bpe_file(path):
    """
    A made-up gpt2.tiktoken: bytes, pairs of the letters a to d, the same behind a space, and filler up to
    50256.
    """
    tokens = [bytes([i]) for i in range(256)]
    pairs = ["".join(p).encode() for p in itertools.product("abcd", repeat=2)]
    tokens += pairs + [b" " + p for p in pairs]
    filler = (bytes([128 + i // 16384 % 128, 128 + i // 128 % 128, 128 + i % 128]) for i in itertools.count())
    tokens += itertools.islice(filler, 50256 - len(tokens))
    path.write_text("\n".join(f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(tokens)) + "\n")


def bits_per_byte(capsys, monkeypatch, name, bias, seq_len):
    """Of a network that says `bias` whatever it reads, by the command line."""
    cfg = load_config(
        TrainConfig,
        [
            f"--dataset={name}",
            f"--seq_len={seq_len}",
            "--block_sizes=1:1",
            "--d_model=8",
            "--n_layers=1",
            "--n_heads=1",
        ],
    )
    data = Dataset(name, seq_len)
    model, _ = checkpoint.build(cfg, data.meta["vocab_size"])
    with torch.no_grad():
        model.head.bias[: len(bias)] = torch.as_tensor(bias)
    state = {
        "model": model.state_dict(),
        "ema": model.state_dict(),
        "config": cfg.__dict__,
        "meta": data.meta,
        "step": 1,
    }
    checkpoint.save(f"out/{name}", state)
    monkeypatch.setattr(
        sys, "argv", ["eval.py", f"--ckpt=out/{name}", "--n_eval=0", f"--json=out/{name}.json"]
    )
    evaluation.main()
    return json.loads(open(f"out/{name}.json").read())["lines"][0]


def test_bits_per_byte_do_not_depend_on_the_tokenizer(project, float64, capsys, monkeypatch):
    """
    One text, by characters and by byte pairs, under one distribution, independent characters: a pair costs
    what its characters cost. Nats per token differ, bits per byte are the same, and what arithmetic says.
    """
    rng = np.random.default_rng(0)
    p = {"a": 0.3, "b": 0.2, "c": 0.1, "d": 0.05, " ": 0.35}
    text = " ".join("".join(rng.choice(list("abcd"), 2)) for _ in range(101))
    (project / "data/chars").mkdir(), (project / "data/words").mkdir()
    ids = {c: i for i, c in enumerate(p)}
    write_dataset(
        "data/chars",
        *[[ids[c] for c in text]] * 2,
        {"vocab_size": 5, "tokenizer": "char", "chars": "".join(p)},
    )
    bpe_file(project / "data/words/gpt2.tiktoken")
    meta = {"vocab_size": 50257, "tokenizer": "gpt2"}
    bpe = Tokenizer(meta, project / "data/words")
    tokens = bpe.encode(text)
    assert len(tokens) == 101 and bpe.decode(tokens) == text
    write_dataset("data/words", tokens, tokens, meta)
    cost = np.full(50257, -50.0)
    for i in range(256 + 32):
        piece = bpe.decode([i])
        if piece and set(piece) <= set(p):
            cost[i] = sum(math.log(p[c]) for c in piece)
    assert np.exp(cost[256:288]).sum() < 1
    cost[:256] = -50.0
    cost[50256] = math.log(1 - np.exp(cost[:50256]).sum())  # never seen: what is left
    chars = bits_per_byte(capsys, monkeypatch, "chars", np.log(list(p.values())), 16)
    words = bits_per_byte(capsys, monkeypatch, "words", cost, 8)
    want = -sum(math.log2(p[c]) for c in text) / len(text)
    assert chars["bits_per_byte"] == pytest.approx(want, rel=1e-9) and words[
        "bits_per_byte"
    ] == pytest.approx(want, rel=1e-9)
    assert words["nats"] > 2.5 * chars["nats"] and words["perplexity"] == pytest.approx(
        math.exp(words["nats"])
    )
    assert not words["bound"] and words["monte_carlo"] == 0


def test_bytes_of_every_kind_of_token(tmp_path):
    assert Tokenizer({"tokenizer": "char", "chars": "aé€"}, tmp_path).n_bytes(5).tolist() == [1, 2, 3, 0, 0]
    assert Tokenizer({"tokenizer": "none"}, tmp_path).n_bytes(5) is None
    bpe_file(tmp_path / "gpt2.tiktoken")
    sizes = Tokenizer({"tokenizer": "gpt2"}, tmp_path).n_bytes(50300)
    assert sizes[:256].tolist() == [1] * 256 and sizes[256] == 2 and sizes[272] == 3
    assert sizes[50256:].sum() == 0, "the end of a text is no text, and ids beyond it are none either"


# ----- quality


def test_variety_by_hand():
    got = quality.variety([[9, 0, 1, 0, 1], [9, 2, 2, 2, 2]], [1, 1])
    assert got["entropy"] == pytest.approx(math.log(2) / 2)
    assert got["distinct_2"] == pytest.approx(3 / 6) and got["distinct_4"] == 1.0
    assert quality.variety([[1, 2]], [2]) == {"entropy": None, "distinct_2": None, "distinct_4": None}


def test_an_interval_holds_its_share():
    for n in range(1, 400):
        for p in (0.0, 0.5, 1.0):
            low, high = quality.wilson(p, n)
            assert low <= p <= high, (p, n)
    low, high = quality.wilson(0.3, 50)
    assert (low, high) == pytest.approx((0.1910, 0.4375), abs=1e-4)


def test_texts_without_answers_have_no_accuracy():
    assert quality.accuracy(SimpleNamespace(check=lambda text: (0, 0)), ["1", "2"]) == {}
    assert (
        quality.judged(lambda rows, starts: torch.zeros(2, 2, dtype=torch.float64), [[1], [2]], [1, 1]) == {}
    )


def test_real_text_ends_where_generated_text_would(project):
    """
    At the first eos behind the prompt, which may hold one itself; and behind the prompts that the samples
    had.
    """
    rows = np.array([[2, 0, 1, 2, 0, 1], [1, 0, 2, 2, 1, 1]])
    (project / "data/ends").mkdir()
    meta = {"vocab_size": 3, "tokenizer": "char", "chars": "abc", "row_len": 6, "prompt_len": 2, "eos_id": 0}
    write_dataset("data/ends", rows.ravel(), rows.ravel(), meta)
    data = Dataset("ends")
    prompts = quality.prompts_of(data, 2)
    assert [p.tolist() for p in prompts] == [[2, 0], [1, 0]]
    assert quality.real_rows(data, prompts) == [[2, 0, 1, 2, 0], [1, 0, 2, 2, 1, 1]]
    assert quality.real_rows(data, quality.prompts_of(data, 2, clues=False), 3) == [
        [0, 0, 1, 2, 0],
        [0, 0, 2, 2, 1],
    ]


@pytest.fixture(scope="session")
def toys(once):
    """Two runs on the stream `toy`: one with an AR mode and one without."""
    return once("toys", make_toys)


def make_toys(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        (home / "data/toy").mkdir(parents=True)
        rng = np.random.default_rng(0)
        stream = (np.arange(2000) + (rng.random(2000) < 0.1)) % 3
        write_dataset(
            "data/toy", stream[:1600], stream[1600:], {"vocab_size": 3, "tokenizer": "char", "chars": "abc"}
        )
        for name, sizes, T in (("mix", "1:0.5,8:0.5", 16), ("half", "8:1", 16), ("short", "1:1", 8)):
            train(
                load_config(
                    TrainConfig,
                    [
                        *TINY,
                        "--dataset=toy",
                        f"--seq_len={T}",
                        f"--out_dir=out/{name}",
                        f"--block_sizes={sizes}",
                        "--max_steps=60",
                    ],
                )
            )


def said_by(module, monkeypatch, capsys, *argv):
    """What the command of a module prints."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *argv])
    capsys.readouterr()
    module.main()
    return capsys.readouterr().out


def test_the_judge_is_the_exact_likelihood(toys, float64, monkeypatch):
    """
    Real windows under the checkpoint's own AR mode: the exact NLL of block size 1; in pieces where the
    judge's context is shorter.
    """
    monkeypatch.chdir(toys)
    from run.restore import rebuild

    run, meta, _, model, process = rebuild("out/mix", torch.device("cpu"))
    data = Dataset("toy", 16)
    rows = quality.real_rows(data, quality.prompts_of(data, 10))
    _, score = quality.judge("self", (model, process, [1, 8]), data.tokenizer, torch.device("cpu"))
    nats, tokens = score(rows, [0] * 10)
    found = likelihood(model, process, data, [1], 10)
    assert torch.equal(tokens, found.tokens)
    agree(nats, found.nats[1][0])
    later, fewer = score([*rows[:5], rows[5][:7]], [3] * 6)
    assert fewer.tolist() == [13.0] * 5 + [4.0] and (later[:5] < nats[:5]).all()
    got = quality.judged(score, rows, [0] * 10)
    assert (
        got["gen_ppl"] == pytest.approx(math.exp(nats.sum() / 160))
        and got["ppl_low"] < got["gen_ppl"] < got["ppl_high"]
    )
    _, short = quality.judge("out/short", (model, process, [1, 8]), data.tokenizer, torch.device("cpu"))
    halves, _ = short([row[:8] for row in rows] + [row[8:] for row in rows], [0] * 20)
    whole, tokens = short(rows, [0] * 10)
    agree(whole, halves.view(2, 10).sum(0))
    assert (tokens == 16).all()
    part, tokens = short(rows, [11] * 10)
    assert (tokens == 5).all() and (part < whole).all()


def test_another_tokenizer_reads_the_text_again(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(toys)
    (toys / "data/cab").mkdir(exist_ok=True)
    stream = np.array([2 - i % 3 for i in range(900)])
    write_dataset("data/cab", stream, stream, {"vocab_size": 3, "tokenizer": "char", "chars": "cab"})
    train(
        load_config(
            TrainConfig,
            [
                *TINY,
                "--dataset=cab",
                "--seq_len=16",
                "--out_dir=out/cab",
                "--block_sizes=1:1",
                "--max_steps=2",
            ],
        )
    )
    from run.restore import rebuild

    theirs = rebuild("out/cab", torch.device("cpu"))
    ours, cab = Tokenizer({"tokenizer": "char", "chars": "abc"}, "."), Tokenizer(theirs[1], ".")
    label, score = quality.judge("out/cab", (None, None, []), ours, torch.device("cpu"))
    text = "abccba"
    direct = quality._by_ours(theirs[3], theirs[4], [cab.encode(text)], [2])
    assert label.startswith("out/cab (") and torch.equal(score([ours.encode(text)], [2])[0], direct[0])
    wrong = quality._by_ours(theirs[3], theirs[4], [ours.encode(text)], [2])
    assert not torch.equal(direct[0], wrong[0])


def test_a_judge_that_cannot_read_the_text_says_so(toys, tmp_path, monkeypatch, slip):
    monkeypatch.chdir(toys)
    cpu = torch.device("cpu")
    numbers, letters = (
        Tokenizer({"tokenizer": "none"}, "."),
        Tokenizer({"tokenizer": "char", "chars": "abc"}, "."),
    )
    assert "no tokenizer" in slip(quality.judge, "out/mix", (None, None, []), numbers, cpu)
    _, score = quality.judge("out/mix", (None, None, []), letters, cpu)
    assert "the judge knows ids below 3" in slip(score, [[0, 1, 3]], [0])


def test_gpt2_by_way_of_transformers(toys, tmp_path, monkeypatch, slip):
    """
    A made-up transformers: the end-of-text token stands before a piece, long texts are cut, prompts are read
    and not counted.
    """
    monkeypatch.chdir(toys)
    (toys / "data/shakespeare").mkdir(exist_ok=True)
    bpe_file(toys / "data/shakespeare/gpt2.tiktoken")
    seen = []

    class Model:
        config = SimpleNamespace(n_positions=9, vocab_size=50257)
        eval = lambda self: self
        to = lambda self, device: self

        def __call__(self, ids):
            seen.append(ids[0].tolist())
            z = torch.zeros(1, ids.size(1), 50257)
            # odds of 2^16 against each other id: sums of float32 are exact, in any order
            z[..., ord("a")] = 16 * math.log(2)
            return SimpleNamespace(logits=z)

    fake = SimpleNamespace(GPT2LMHeadModel=SimpleNamespace(from_pretrained=lambda name: Model()))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    letters = Tokenizer({"tokenizer": "char", "chars": "xa-"}, ".")
    label, score = quality.judge("gpt2", (None, None, []), letters, torch.device("cpu"))
    row = letters.encode("x-a-x-a-x-a")  # eleven tokens of one byte each, by these merges
    nats, tokens = score([row], [3])
    a, other = math.log(1 + 50256 / 2**16), math.log(2**16 + 50256)
    assert label == "gpt2" and tokens.item() == 8
    want = sum(a if c == "a" else other for c in "x-a-x-a-x-a"[3:])
    assert nats.item() == pytest.approx(want, rel=5 * EPS32), "a judge is float32"
    assert [len(ids) for ids in seen] == [8, 3] and seen[0][0] == 50256 and seen[1][0] == 50256
    _, same = quality.judge(
        "gpt2", (None, None, []), Tokenizer({"tokenizer": "gpt2"}, "data/shakespeare"), torch.device("cpu")
    )
    seen.clear()
    same([[256, 50256, 97]], [0])
    assert seen == [[50256, 256, 50256]], "GPT-2's own ids are not read again as text"
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in slip(
        quality.judge, "gpt2", (None, None, []), letters, torch.device("cpu")
    )


def test_samples_without_a_checker_are_judged(toys, monkeypatch, capsys):
    monkeypatch.chdir(toys)
    out = said_by(quality, monkeypatch, capsys, "--ckpt=out/mix", "--n_eval=12", "--json=out/q.json")
    lines = {
        (r["sampler"], r.get("steps")): r for r in json.loads((toys / "out/q.json").read_text())["lines"]
    }
    assert "perplexity under its own AR mode" in out and "real text" in out
    assert (
        lines["ar", None]["gen_ppl"] > 1
        and lines["real text", None]["n"] == 12
        and "accuracy" not in lines["ar", None]
    )
    for r in lines.values():
        assert 0 <= r["entropy"] <= math.log(3) and 0 < r["distinct_2"] <= 1
    again = said_by(quality, monkeypatch, capsys, "--ckpt=out/mix", "--n_eval=12", "--json=out/q2.json")
    speed = lambda text: [line.rsplit(None, 1)[0] for line in text.splitlines()]
    assert speed(again) == speed(out)
    cold = said_by(
        quality,
        monkeypatch,
        capsys,
        "--ckpt=out/mix",
        "--n_eval=12",
        "--temperature=0",
        "--sampler=ar",
        "--json=out/q.json",
    )
    cold = json.loads((toys / "out/q.json").read_text())["lines"][1]
    assert cold["distinct_4"] < lines["ar", None]["distinct_4"], (
        "a greedy sampler repeats itself, and it shows"
    )
    out = said_by(quality, monkeypatch, capsys, "--ckpt=out/half", "--n_eval=4", "--steps=2", "--judge=none")
    assert "no judge" in out and "ancestral" in out and " ar " not in out


def test_the_likelihood_command(toys, monkeypatch, capsys):
    monkeypatch.chdir(toys)
    flags = ("--ckpt=out/mix", "--n_eval=20", "--n_mc=4")
    out = said_by(evaluation, monkeypatch, capsys, *flags, "--json=out/l.json")
    lines = {r["name"]: r for r in json.loads((toys / "out/l.json").read_text())["lines"]}
    assert list(lines) == [
        "block 1",
        "block 8",
        "mixture, mc1",
        "mixture, Jensen",
        "mixture, log-sum-exp",
        "mixture, log-sum-exp, plug-in",
    ]
    one, eight = lines["block 1"], lines["block 8"]
    assert not one["bound"] and one["monte_carlo"] == 0 and eight["bound"] and eight["monte_carlo"] > 0
    assert eight["error"] > 0 and eight["bits_per_byte"] == pytest.approx(eight["nats"] / math.log(2))
    assert (
        f"<= {eight['nats']:.4f}" in out
        and f"<= {one['nats']:.4f}" not in out
        and f" {one['nats']:.4f} " in out
    )
    assert said_by(evaluation, monkeypatch, capsys, *flags) == out
    whole = said_by(evaluation, monkeypatch, capsys, "--ckpt=out/mix", "--n_eval=0", "--n_mc=2")
    assert "25 windows of the validation split: 400 tokens, 400 bytes" in whole
    one_draw = said_by(
        evaluation, monkeypatch, capsys, "--ckpt=out/mix", "--n_eval=20", "--n_mc=1", "--block_size=8"
    )
    assert "block 1" not in one_draw and "mixture" not in one_draw and " - " in one_draw


def test_slips(toys, monkeypatch, slip):
    monkeypatch.chdir(toys)
    (toys / "out/foreign.jsonl").write_text('{"row": "masked_ar"}\n')
    for main, argv, says in (
        (evaluation.main, ["--ckpt=out/mix", "--block_size=4"], "1, 8, not 4"),
        (evaluation.main, ["--ckpt=out/mix", "--n_mc=3"], "even"),
        (evaluation.main, ["--ckpt=out/mix", "--n_mc=0"], "n_mc"),
        (evaluation.main, ["--ckpt=out/mix", "--n_eval=1"], "n_eval"),
        (evaluation.main, ["--ckpt=out/mix", "--n_eval=-4"], "n_eval"),
        (evaluation.main, ["--ckpt=out/mix", "--judge=self"], "judge"),
        (evaluation.main, ["--ckpt=out/mix", "--json=out"], "cannot write out"),
        (evaluation.main, ["--ckpt=out/mix", "--samples"], "python -m lab.quality"),
        (evaluation.main, ["--ckpt=out/mix", "--sweep"], "python -m lab.sweep"),
        (evaluation.main, ["--gsm8k", "--ckpt=out/mix"], "python -m lab.gsm8k"),
        (sweep.main, ["--ckpt=out/mix", "--out=out/x.md"], ".jsonl"),
        (sweep.main, ["--ckpt=out/typo"], "out/typo"),
        (sweep.main, ["--report=x", "--out=out/foreign.jsonl"], "no sweep's"),
        (sweep.main, ["--report=data/toy/val.bin/x", "--out=out/foreign.jsonl"], "no sweep's"),
        (sweep.main, ["--ckpt=out/mix", "--sampler=ar"], "--sampler"),
        (sweep.main, ["--ckpt=out/mix", "--sampler=arpc"], "--samplers"),
        (sweep.main, ["--ckpt=out/mix", "--steps=1,x"], "'1,x'"),
        (sweep.main, ["--ckpt=out/mix", "--steps=0"], "'0'"),
        (sweep.main, ["--ckpt=out/mix", "--temperatures=-1"], "'-1'"),
        (sweep.main, ["--ckpt=out/mix", "--temperatures=nan"], "'nan'"),
        (sweep.main, ["--ckpt=out/half", "--samplers=arpc"], "cannot serve arpc"),
        (sweep.main, ["--ckpt=out/mix", "--samplers=gibbs"], "cannot serve gibbs"),
        (quality.main, ["--ckpt=out/mix", "--n_mc=4"], "n_mc"),
        (quality.main, ["--ckpt=out/half", "--judge=self"], "--judge DIR"),
        (quality.main, ["--ckpt=out/mix", "--judge=out/half"], "no AR mode"),
        (quality.main, ["--ckpt=out/mix", "--judge=out/none"], "out/none"),
        (quality.main, ["--ckpt=out/mix", "--n_eval=1"], "n_eval"),
        (quality.main, ["--ckpt=out/mix", "--sampler=ar", "--block_size=8"], "block size 8"),
        (quality.main, ["--ckpt=out/half", "--sampler=ar"], "block size 8"),
    ):
        assert says in slip(main, argv=argv), argv
    (toys / "out/bare").mkdir()
    state = torch.load("out/mix/ckpt.pt", weights_only=True)
    for broken, says in (
        ({k: v for k, v in state.items() if k != "ema"}, "ema"),
        ({**state, "config": {k: v for k, v in state["config"].items() if k != "process"}}, "no process"),
        ({**state, "config": {**state["config"], "n_layers": 3}}, "weights"),
        ({**state, "meta": {"tokenizer": "char"}}, "vocab_size"),
    ):
        torch.save(broken, "out/bare/ckpt.pt")
        assert says in slip(evaluation.main, argv=["--ckpt=out/bare"])
    torch.save(state, "out/bare/ckpt.pt")
    tokens = (toys / "data/toy/val.bin").read_bytes()
    assert not (toys / "out/typo").exists()
    (toys / "data/toy/val.bin").write_bytes(b"")
    assert "0 bytes" in slip(evaluation.main, argv=["--ckpt=out/bare"])
    (toys / "data/toy/val.bin").write_bytes(tokens[:32])  # one window: no error can be told, and none is
    monkeypatch.setattr(sys, "argv", ["eval.py", "--ckpt=out/bare", "--n_mc=2"])
    evaluation.main()
    (toys / "data/toy/val.bin").write_bytes(tokens)


# ----- the sweep


def test_a_killed_sweep_goes_on(toys, monkeypatch, capsys, slip):
    """
    Half of a last line, as a kill while writing leaves it: it is named, made again, and the others are not.
    """
    monkeypatch.chdir(toys)
    flags = (
        "--ckpt=out/mix",
        "--samplers=ar,ancestral,ancestral greedy_tail=true",
        "--steps=1,4",
        "--temperatures=0.5,1",
        "--n_eval=6",
    )
    out = said_by(sweep, monkeypatch, capsys, *flags)
    path = toys / "out/mix/sweep.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 * (1 + 1 + 2 * 2) and out.count("ancestral") == 8 and "real text" in out
    assert (
        {r["temperature"] for r in rows} == {0.5, 1.0}
        and rows[0]["sampler"] == "real text"
        and rows[1]["gen_ppl"] > 1
    )
    draw = ["--report=out/mix/sweep", "--out=out/mix/sweep.jsonl"]
    assert "sweep.png: 12 lines" in said_by(sweep, monkeypatch, capsys, *draw)
    table = (toys / "out/mix/sweep.md").read_text()
    assert table.count("### ") == 2 and "temperature 0.5" in table and "| 1 step | 4 steps |" in table
    assert (toys / "out/mix/sweep.png").stat().st_size > 10_000
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:40])
    made = []
    monkeypatch.setattr(
        sweep, "generated", lambda *a, **k: made.append(len(a[3])) or quality.generated(*a, **k)
    )
    out = said_by(sweep, monkeypatch, capsys, *flags)
    again = [json.loads(line) for line in path.read_text().splitlines()]
    same = lambda rows: [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in rows]
    assert same(again) == same(rows) and "half a line" in out and again[:7] == rows[:7]
    assert made.count(6) == 5 and made.count(1) == len(made) - 5 <= 3, "a text of each sampler first"
    made.clear()
    asked = ["--ckpt=out/mix", "--samplers=ancestral,sdlm", "--steps=1", "--n_eval=6", "--out=out/late.jsonl"]
    assert "sdlm" in slip(sweep.main, argv=asked) and 6 not in made, (
        "it complains before anything is measured"
    )
    path.write_text(lines[0] + "not json\n" + lines[1])
    assert "line 2" in slip(sweep.main, argv=list(flags))
    path.write_text("".join(lines))
    (toys / "out/mix/sweep.md").write_text("# Mine\n")
    assert "not a table of ours" in slip(sweep.main, argv=draw)
    (toys / "out/mix/sweep.md").unlink()


# ----- pictures and the paper


@pytest.mark.slow
def test_pictures(toys, monkeypatch, capsys):
    monkeypatch.chdir(toys)
    monkeypatch.setattr(sys, "argv", ["plots.py", "--out=pictures", "--film=out/mix,out/half", "--steps=2"])
    plots.main()
    assert all((toys / f"pictures/{name}.png").stat().st_size > 5_000 for name in ("attention", "film"))
    first = (toys / "pictures/attention.png").read_bytes()
    plots.main()
    assert (toys / "pictures/attention.png").read_bytes() == first
    title, frames = plots.strip("out/mix", 2, 16, 1, "cpu")
    assert title == "masked noise, blocks of 8 in 2 steps" and [label for label, _ in frames][:4] == [
        "block 1, step 0", "block 1, step 1", "block 1, step 2", "block 2, step 0",
    ]  # fmt: skip
    assert all(token[1] for token in frames[0][1][:8]) and not any(token[1] for token in frames[2][1][:8])


def test_a_verdict_needs_seeds_and_a_side():
    assert (
        paper.verdict([1.9, 2.0, 2.1])[0] == "**confirmed**"
        and paper.verdict([-1.9, -2.0, -2.1])[0] == "**not confirmed**: the opposite"
    )
    said, mean, low, high = paper.verdict([1.0, 2.0, 3.0])
    assert (
        said == "undecided" and mean == 2 and high - mean == pytest.approx(4.303 / math.sqrt(3)) and low < 0
    )
    assert paper.verdict([4.7, 4.7])[0] == "undecided", "equal by chance is no spread"
    assert paper.verdict([5.0])[0] == "undecided" and paper.verdict([])[0] == "undecided"


@pytest.mark.slow
def test_one_row_of_the_paper_is_made_again_and_no_other(toys, monkeypatch, capsys, slip):
    """Two rows and two seeds; then a changed TOML trains that row anew, and a killed training goes on."""
    monkeypatch.chdir(toys)
    (toys / "rows").mkdir()
    (toys / "data/toy/prepare.py").write_text(
        "def check(text):\n    return text.count('abc'), len(text) // 3\n"
    )
    for name, sizes in (("masked_ar", "1:1"), ("masked_mixture", "1:0.5,8:0.5")):
        flags = [f.removeprefix("--").split("=") for f in TINY if "device" not in f]
        lines = [f"{k} = {v}" for k, v in flags] + [
            'dataset = "toy"',
            "seq_len = 16",
            f'block_sizes = "{sizes}"',
            "max_steps = 2",
        ]
        (toys / f"rows/{name}.toml").write_text("\n".join(lines))
    runs = []

    def in_process(command, stdout):
        runs.append((command[2], "--resume" in command))
        train(load_config(TrainConfig, command[2:]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(paper, "subprocess", SimpleNamespace(run=in_process))  # matplotlib has its own
    argv = [
        "paper.py",
        "--rows=rows",
        "--seeds=2",
        "--out=out/paper",
        "--page=pages/paper",
        "--n_eval=4",
        "--n_mc=2",
        "--device=cpu",
    ]

    def go():
        runs.clear()
        monkeypatch.setattr(sys, "argv", argv)
        paper.main()
        return (toys / "pages/paper.md").read_text()

    page = go()
    assert len(runs) == 4 and "2 seeds a row" in " ".join(page.split()) and "| `masked_mixture` |" in page
    assert "masked: the mixture costs its AR mode nats | undecided | " in page
    assert (
        "| uniform: the same |" not in page and " more claims of `CLAIMS` need rows that are not here" in page
    )
    assert all((toys / f"pages/paper_{name}.png").exists() for name in ("likelihood", "frontier", "mixture"))
    go()
    assert not runs
    toml = toys / "rows/masked_ar.toml"
    toml.write_text(toml.read_text().replace("max_steps = 2", "max_steps = 3"))
    go()
    assert runs == [("rows/masked_ar.toml", False)] * 2
    lines = [json.loads(line) for line in (toys / "out/paper/results.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and [r["steps"] for r in lines if r["row"] == "masked_ar"] == [2, 2, 3, 3], (
        "new weights are measured anew"
    )
    shutil.rmtree("out/paper")
    page = go()
    assert not runs, "what was measured is in the page's own file"
    last = {"row": "masked_ar", "seed": 1, "steps": 3}
    kept = [line for line in lines if any(line[k] != v for k, v in last.items())]
    (toys / "pages/paper.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    argv.append("--only=masked_mixture")
    assert "| `masked_ar` |" in go() and not runs, "the other row is shown as it is"
    argv.pop()
    go()
    assert runs == [("rows/masked_ar.toml", False)]
    state = torch.load("out/paper/masked_ar/1/ckpt.pt", weights_only=True)
    torch.save({**state, "step": 1}, "out/paper/masked_ar/1/ckpt.pt")
    (toys / "pages/paper.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (toys / "out/paper/results.jsonl").unlink()
    go()
    assert runs == [("rows/masked_ar.toml", True)], "a killed training goes on"
    there = (toys / "pages/paper.jsonl").read_text().splitlines()
    monkeypatch.setattr(sys, "argv", [*argv, "--seeds=1", "--only=masked_ar"])
    paper.main()
    assert (toys / "pages/paper.jsonl").read_text().splitlines() == there, "a first look drops nothing"
    assert "is no row of rows" in slip(paper.main, argv=[*argv[1:], "--only=masked_mix"])
    (toys / "pages/paper.md").write_text("# By hand\n")
    assert "not a page of ours" in slip(paper.main, argv=argv[1:])
    assert "no TOML" in slip(paper.main, argv=["--rows=nowhere"])
    (toys / "pages/paper.md").unlink()
    runs.clear()
    toml.write_text(toml.read_text().replace("max_steps = 3", "max_steps = 4"))
    argv += ["--minutes=1e-9"]
    assert "| `masked_mixture` |" in go() and "`masked_ar`" not in go() and not runs, (
        "out of time: what is there is shown"
    )
    (toys / "data/toy/prepare.py").unlink()
    assert "nothing checks" in slip(paper.main, argv=argv[1:])
