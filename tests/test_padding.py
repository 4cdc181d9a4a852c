"""
Why believe that padding tells nobody how long a text is? Rows of random length, of which everything is known:
with the perfect network the bound is the entropy of the texts, in eval.py, in training, at every block size
and noise. With padding shown clean it is below, and so it is with padding that is noised and not charged.
Networks that are trained on such rows stay above it.
"""

import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, slow
from exact import P_VALUE, Bayes, agree, chi_squared, entropy, last, net, noise, speed

import diffusion as d
import eval as evaluation
import fast
import generate as lesson
import train as training
from data.dataset import Dataset, charged_tokens, first_charged
from eval import bounds, estimate, likelihood
from fast.block import generate
from methods import distill, duo
from methods.gidd import GIDD
from options import TrainConfig
from run import checkpoint
from run.flags import load_with_method
from run.restore import rebuild
from samplers import SAMPLERS

BOS, EOS, PAD, V, L = 2, 3, 4, 5, 8
META = {"vocab_size": V, "tokenizer": "none", "row_len": L, "bos_id": BOS, "eos_id": EOS, "pad_id": PAD}


class Drift(d.NoiseProcess):
    """Tokens drift to a law of their own: padding is common in it."""

    def mixing(self, alpha):
        pi = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.4]).to(alpha)
        return alpha, (1 - alpha)[..., None] * pi, torch.ones_like(alpha), -pi


NOISES = {  # the process, and whether its network is told the noise level
    "masked": (d.Masked(V + 1, V), False),
    "masked, timed": (d.Masked(V + 1, V), True),
    "uniform loo": (d.Uniform(V, "loo", V), True),
    "uniform denoiser": (d.Uniform(V, "denoiser", V), True),
    "uniform, random AR": (d.Uniform(V), True),
    "gidd": (GIDD(V + 1, V, 0.2), True),
    "made of mixing alone": (Drift(V), True),
}


@functools.cache
def law():
    """
    Eighteen texts of 0 to 6 letters, x (K, L), with p (K,), and rows (W, L) in which each is as often as p
    says.
    """
    g, texts = torch.Generator().manual_seed(0), []
    for n in (0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6):
        row = None
        while row is None or row in texts:
            row = [BOS, *torch.randint(2, (n,), generator=g).tolist(), EOS]
            row += [PAD] * (L - len(row))
        texts.append(row)
    x, times = torch.tensor(texts), torch.randint(1, 20, (len(texts),), generator=g)
    return x, times / times.sum(), x.repeat_interleave(times, dim=0)


def per_token():
    """The entropy of the texts over their mean length, EOS included, BOS and padding not."""
    x, p, _ = law()
    return entropy(p) / (p * ((x != PAD).sum(1) - 1)).sum().item()


class Texts:
    """The rows as a dataset."""

    row_len = seq_len = L

    def spread(self, split, n):
        return torch.arange(len(law()[2]))

    def windows(self, split, index):
        x0 = law()[2][index]
        return x0, (torch.arange(L) == 0).expand_as(x0), x0 != PAD


def perfect(kind):
    process, timed = NOISES[kind]
    return Bayes(process, *law()[:2], timeless=not timed), process


def score(kind, b, n_mc=32, **how):
    """Nats per token of the perfect network by eval.likelihood, and their Monte Carlo error."""
    model, process = perfect(kind)
    found = likelihood(model, process, Texts(), [b], n_mc=n_mc, **how)
    mean, error, _ = estimate(found.nats[b], found.tokens)
    return mean, error if len(found.nats[b]) > 1 else 0.0


# ----- what is charged


def test_padding_is_charged_in_the_block_in_which_the_text_ends():
    text = torch.tensor([
        [BOS, EOS, PAD, PAD, PAD, PAD, PAD, PAD],
        [BOS, 0, 1, EOS, PAD, PAD, PAD, PAD],
        [BOS, 0, 1, 0, EOS, PAD, PAD, PAD],
        [BOS, 0, 1, 0, 1, 0, 1, EOS],
        [BOS, PAD, PAD, PAD, PAD, PAD, PAD, PAD],
    ])  # fmt: skip
    real, given = text != PAD, (torch.arange(L) == 0).expand_as(text)
    want = {  # the last token that is charged, in each row; the first is 1
        1: [1, 3, 4, 7, 0], 2: [1, 3, 5, 7, 0], 4: [3, 3, 7, 7, 0], 8: [7, 7, 7, 7, 0],
    }  # fmt: skip
    for b, ends in want.items():
        shown, charged = charged_tokens(given, real, b)
        at = torch.arange(L)
        assert torch.equal(shown, given) and torch.equal(
            charged, (at >= 1) & (at <= torch.tensor(ends)[:, None])
        )
        assert torch.equal(charged_tokens(given, real, b, clean_padding=True)[0], given | ~real)
        assert torch.equal(charged_tokens(given, real, b, clean_padding=True)[1], real & ~given)
    sizes = torch.tensor([1, 2, 4, 8, 8])
    _, charged = charged_tokens(given, real, sizes)
    assert charged.sum(1).tolist() == [want[b][i] for i, b in enumerate(sizes.tolist())]
    prompt = torch.arange(L) < torch.tensor([2, 4, 3, 5, 1])[:, None]  # of the first two rows all is prompt
    assert charged_tokens(prompt, real, 4)[1].sum(1).tolist() == [0, 0, 5, 3, 0]
    assert (
        first_charged(charged_tokens(prompt[3:4], real[3:4], 4)[1], 4) == 4
        and first_charged(torch.zeros(2, L).bool(), 4) == 0
    )


# ----- eval.py


@pytest.mark.parametrize("b", slow([1, 4, L], [1, L]))
@pytest.mark.parametrize("kind", NOISES)
def test_the_bound_of_the_perfect_network_is_the_entropy_of_the_texts(kind, b):
    """
    Neither below it nor above, within 4 Monte Carlo errors (both sides together: red once in 16,000 times if
    all is right).
    """
    mean, error = score(kind, b)
    low, high = (
        4 * error + 1e-6,
        4 * error + (2e-3 if kind == "gidd" else 2e-4),
    )  # gidd: a last step from t = 1e-3 costs something
    print(f"{kind}, block {b}: {mean:.4f} +- {error:.4f}, entropy {per_token():.4f}")
    assert error < 0.03 and -low < mean - per_token() < high


@pytest.mark.parametrize("kind", slow(NOISES, ["masked", "uniform loo", "gidd"]))
def test_padding_shown_clean_or_not_charged_is_no_bound(kind, monkeypatch):
    """
    What the tests here are for: both are far below the entropy, except at block size 1, which sees no
    padding.
    """
    for b in (4, L):
        mean, error = score(kind, b, clean_padding=True)
        assert mean < per_token() - 4 * error - 0.02, (
            f"block {b}: {mean:.4f} +- {error:.4f}, entropy {per_token():.4f}"
        )
    assert abs(score(kind, 1, clean_padding=True)[0] - per_token()) < 1e-3
    noised = lambda given, real, b, clean: (given, charged_tokens(given, real, b)[1] & real)
    monkeypatch.setattr(evaluation, "charged_tokens", noised)
    mean, error = score(kind, L)
    assert mean < per_token() - 4 * error - 0.02


def test_a_visible_padding_token_is_free_information():
    """
    (EOS, PAD) or (A, EOS), a half each, H = ln 2: noised, but not charged, in random order it costs 0.75 ln
    2.
    """
    x, p = torch.tensor([[1, 2], [0, 1]]), torch.tensor([0.5, 0.5])
    model, process, none = Bayes(d.Masked(4, 3), x, p), d.Masked(4, 3), torch.zeros(2, 2, dtype=torch.bool)
    n = 20_000
    rows, u = (
        x.repeat(n, 1),
        torch.rand(2 * n, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    for charged, want in ((charged_tokens(none, x != 2, 2)[1], 1.0), (x != 2, 0.75)):
        each = evaluation.one_draw(
            d.token_loss, model, process, rows, none.repeat(n, 1), charged.repeat(n, 1), 2, u, noise(2 * n, 2)
        )
        error = each.sum(1).std().item() / math.sqrt(2 * n)
        assert abs(each.sum(1).mean().item() - want * math.log(2)) < 4 * error


def test_a_prompt_before_a_text_of_random_length(kind="masked"):
    """Prompts that end inside a block: the bound is the entropy of what follows, given the prompt."""
    x, p, rows = law()
    x, times = rows[rows[:, 2] < 2].unique(
        dim=0, return_counts=True
    )  # at least two letters; the first two are the prompt
    p = times / times.sum()
    given = (torch.arange(L) < 3).expand_as(x)
    prompts, owner = x[:, :3].unique(dim=0, return_inverse=True)
    H = entropy(p) - entropy(torch.stack([p[owner == i].sum() for i in range(len(prompts))]))
    model, process = Bayes(NOISES[kind][0], x, p, timeless=True), NOISES[kind][0]
    rows = x.repeat_interleave(times, dim=0)
    data = SimpleNamespace(row_len=L, seq_len=L, spread=lambda *a: torch.arange(len(rows)))
    data.windows = lambda split, i: (rows[i], given[:1].expand_as(rows[i]), rows[i] != PAD)
    found = likelihood(model, process, data, [1, 4, L], n_mc=32)
    for b in (1, 4, L):
        mean, error, _ = estimate(found.nats[b], found.tokens)
        want = H / (found.tokens.mean().item())
        assert abs(mean - want) < 4 * (error if b > 1 else 0.0) + 1e-6


@pytest.mark.parametrize("kind", ["masked", "uniform denoiser"])
def test_texts_that_no_eos_ends(tmp_path, monkeypatch, kind):
    """The first padding token says where such a text ends: it is charged, at the start of a block too."""
    monkeypatch.chdir(tmp_path)
    x, p, rows = law()
    x, rows = (torch.where(y == EOS, PAD, y) for y in (x, rows))
    write("endless", rows, rows[:8], {k: v for k, v in META.items() if k != "eos_id"})
    data = Dataset("endless")
    data.tokens["val"] = data.tokens["train"]
    x0, given, real = data.windows("val", data.spread("val", 0))
    assert torch.equal(real.sum(1), (x0 != PAD).sum(1) + 1)
    process, timed = NOISES[kind]
    found = likelihood(
        Bayes(process, x, p, timeless=not timed), process, data, [1, 2, 4, L], n_eval=0, n_mc=32
    )
    for b in (1, 2, 4, L):
        mean, error, _ = estimate(found.nats[b], found.tokens)
        assert abs(mean - per_token()) < 4 * (error if b > 1 else 0.0) + 2e-4, b


def test_a_text_without_its_eos_and_a_row_without_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [[BOS, 0, 1, 0, PAD, PAD, PAD, PAD], [BOS] + [PAD] * 7, [BOS, 0, EOS] + [PAD] * 5, [BOS] + [1] * 7]
    write("odd", rows, rows, META)
    x0, given, real = Dataset("odd").windows("train", range(4))
    assert (real & ~given).sum(1).tolist() == [4, 0, 2, 7]


# ----- training


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """The rows as data/texts, and a working folder."""
    monkeypatch.chdir(tmp_path)
    write("texts", law()[2], law()[2][::3], META)
    return Dataset("texts")


def write(name, train, val, meta):
    folder = f"data/{name}"
    __import__("os").makedirs(folder)
    for split, rows in (("train", train), ("val", val)):
        np.asarray(rows, dtype=np.uint16).tofile(f"{folder}/{split}.bin")
    with open(f"{folder}/meta.json", "w") as f:
        json.dump(meta, f)


def trained_loss(kind, b, data, steps=40, batch_size=256, loss_of=None, **how):
    """
    What train.backward says of the perfect network, one loss a step in nats, with the tokens that it divided
    by: (steps,) each.
    """
    model, process = perfect(kind)
    cfg = TrainConfig(
        dataset="texts",
        block_sizes={b: 1.0},
        objective="elbo",
        seq_len=L,
        batch_size=batch_size,
        accumulation=2,
        **how,
    )
    run = SimpleNamespace(
        cfg=cfg, device=torch.device("cpu"), forward=model, process=process, world=1, dtype=torch.float32
    )
    losses, tokens = torch.zeros(2, steps, dtype=torch.float64)
    for step in range(steps):
        batches = training.step_batches(cfg, data, step, 0, 1)
        n = sum(int((real & ~given).sum()) for _, given, real, *_ in batches)
        losses[step] = training.backward(run, batches, step, loss_of or d.token_loss, n)
        tokens[step] = n
        assert n == sum(int((x0[:, 1:] != PAD).sum()) for x0, *_ in batches), (
            "real tokens: no BOS, no padding"
        )
    return losses, tokens


def bent(schedule):
    """A schedule whose time is u^4, but for its last 1e-10."""

    def at(u):
        alpha, slope = schedule((u**4).clamp(min=1e-10))
        return alpha, 4 * u**3 * slope

    return at


PRINTED = [
    *((kind, b, "loglinear") for kind in NOISES for b in (4, L)),
    *((kind, L, "cosine") for kind in NOISES if "random" not in kind),
    *((kind, 1, "loglinear") for kind in ("masked", "uniform loo", "uniform, random AR")),
]


@pytest.mark.parametrize("kind, b, schedule", slow(PRINTED, PRINTED[:14:4] + PRINTED[-1:]))
def test_the_loss_that_training_prints_is_the_entropy_of_the_texts(kind, b, schedule, on_disk, monkeypatch):
    """
    The objective elbo, in nats over real tokens: within 4 standard errors over steps, which contain those
    over rows. Time runs as u^4 here, or a few steps would not meet the rare and dear tokens at small t; the
    integral does not change.
    """
    monkeypatch.setitem(training.SCHEDULES, schedule, bent(d.SCHEDULES[schedule]))
    losses, tokens = trained_loss(kind, b, on_disk, steps=30, schedule=schedule)
    nats = losses * tokens
    mean = nats.sum() / tokens.sum()
    error = (nats - mean * tokens).std().item() / tokens.mean().item() / math.sqrt(len(losses))
    print(f"{kind}, block {b}, {schedule}: {mean:.4f} +- {error:.4f}, entropy {per_token():.4f}")
    assert error < 0.05 and abs(mean.item() - per_token()) < 4 * error + 1e-3
    if b > 1:
        clean, tokens = trained_loss(kind, b, on_disk, steps=10, schedule=schedule, clean_padding=True)
        spread = clean.std().item() / math.sqrt(10)
        assert (clean * tokens).sum() / tokens.sum() < per_token() - 3 * spread - 0.02


def soft(process):
    return duo.Relaxation(process, tau=0.2, k=2, dtype=torch.float64)


def losses_of():
    """
    {name: (kind of noise, a loss)} for every objective and method that has one, called as token_loss is.
    """
    found = {}
    for kind in NOISES:
        for objective in ("elbo", "ce", "ce_noisy", "last"):
            found[f"{kind}, {objective}"] = kind, lambda *a, o=objective, **how: d.token_loss(*a, o, **how)
    for objective in ("elbo", "ce"):
        duo_loss = lambda *a, o=objective, **how: d.token_loss(*a, o, corrupt=soft(a[1]), **how)
        found[f"duo, {objective}"] = "uniform loo", duo_loss
    return found


@pytest.mark.parametrize("name", losses_of())
def test_padding_behind_a_text_is_learned_as_a_token_like_any_other(name):
    """
    In every objective and method: what is charged costs what it would if padding were a letter, and what is
    not costs nothing and changes nothing. So nothing can be read off the padding but what its own noisy token
    says.
    """
    kind, loss_of = losses_of()[name]
    process, timed = NOISES[kind]
    same_on_padded_rows(process, loss_of, net(process, seq_len=L, time_conditioning=timed).double())


@pytest.mark.parametrize("kind", ["masked", "uniform loo", "uniform denoiser"])
@pytest.mark.parametrize("form", ["lesson", "fast"])
def test_a_students_padding_is_a_token_like_any_other_too(kind, form):
    process, timed = NOISES[kind]
    student, teacher = (net(process, seed, seq_len=L, time_conditioning=timed).double() for seed in (0, 1))
    if form == "fast":
        (student, quick), (teacher, _) = speed(student, process), speed(teacher, process)
        process = quick
    asked = []

    def heard(clean, noisy, *a, **how):
        asked.append(noisy)
        return teacher(clean, noisy, *a, **how)

    def loss_of(model, process, x0, sizes, t, given, charged=None, noise=None):
        charged = ~given if charged is None else charged
        how = {"teacher": heard, "dt": 0.2}
        return distill.distill_loss(
            model, process, x0, sizes, t, None, given, charged, d.loglinear, 0, noise, **how
        )

    x0 = same_on_padded_rows(process, loss_of, student)
    padding = x0 == PAD
    assert all((noisy[padding] != PAD).double().mean() > 0.3 for noisy in asked), (
        "the teacher sees no more of it than the student"
    )
    assert padding.sum() > 100


def same_on_padded_rows(process, loss_of, model):
    x0 = law()[2][torch.randperm(len(law()[2]), generator=torch.Generator().manual_seed(1))[:96]]
    sizes, t = torch.tensor([1, 4, L] * 32), (torch.arange(96) + 0.5).double() / 96
    t = t[torch.randperm(96, generator=torch.Generator().manual_seed(2))]
    given, charged = charged_tokens((torch.arange(L) == 0).expand_as(x0), x0 != PAD, sizes)
    total, each = loss_of(model, process, x0, sizes, t, given=given, charged=charged, noise=noise(96, L))
    _, letters = loss_of(model, process, x0, sizes, t, given=given, noise=noise(96, L))
    agree(each[charged], letters[charged])
    assert (each[~charged] == 0).all() and abs(total.item() - each.sum().item()) < 1e-9 * (
        1 + total.abs().item()
    )
    priced = charged & (x0 == PAD)
    assert (each[priced] != 0).any() and (letters[~charged & ~given] != 0).any()
    other = torch.where(charged | given, x0, 0)  # another text in the blocks behind the end
    agree(
        loss_of(model, process, other, sizes, t, given=given, charged=charged, noise=noise(96, L))[1][
            charged
        ],
        each[charged],
    )
    return x0


# ----- texts


@pytest.mark.parametrize("kind, b, sampler, how", [
    *((kind, 1, "ar", {}) for kind in NOISES if kind != "masked, timed"),
    ("masked", 4, "first_hitting", {}), ("masked", L, "first_hitting", {}),
    ("masked, timed", L, "first_hitting", {}),
    ("masked", L, "ancestral", {"steps": 64}), ("uniform loo", 4, "ancestral", {"steps": 64}),
    ("uniform denoiser", L, "ancestral", {"steps": 64}), ("gidd", L, "ancestral", {"steps": 64}),
])  # fmt: skip
def test_texts_have_the_lengths_of_the_data(kind, b, sampler, how):
    """
    Of the perfect network, by chi-squared over whole texts and over lengths: each red once in 1e4 times if
    all is right.
    """
    model, process = perfect(kind)
    x, p, _ = law()
    n = 2000 if sampler != "ancestral" else 1000
    prompts = torch.full((n, 1), BOS)
    made = last(
        lesson.generate(
            model,
            process,
            prompts,
            block_size=b,
            sampler=SAMPLERS[sampler],
            eos_id=EOS,
            use_cache=False,
            **how,
        )
    ).x
    made = torch.where(made == lesson.NOTHING, PAD, made)
    found = (made[:, None] == x).all(-1)
    counts, lengths = found.sum(0), ((made != PAD).sum(1) - 2).bincount(minlength=L - 1)
    want = torch.zeros(L - 1, dtype=torch.float64).index_add(0, (x != PAD).sum(1) - 2, p.double())
    assert (found.sum(1) == 1).double().mean() > 0.95, (
        "nearly all are texts of the law: steps draw tokens apart, a few times"
    )
    print(f"{kind}, block {b}, {sampler}: {(found.sum(1) != 1).sum()} of {n} are none, {lengths.tolist()}")
    assert chi_squared(lengths, want) > P_VALUE
    if sampler != "ancestral":
        assert found.sum() == n and chi_squared(counts, p.double()) > P_VALUE


# ----- networks that are trained


ROW, LETTERS = 16, 14  # the dataset of the report: lengths even in 1..14, letters fair coins
TRUE = (math.log(LETTERS) + (1 + LETTERS) / 2 * math.log(2)) / (
    (1 + LETTERS) / 2 + 1
)  # nats per token of an endless supply of such texts


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trained networks: half of the rows AR, half of them one block."""
    home = tmp_path_factory.mktemp("lengths")
    rng, x = np.random.default_rng(0), np.full((4000, ROW), PAD, np.uint16)
    for row in x:
        n = rng.integers(1, LETTERS + 1)
        row[0], row[1 : 1 + n], row[1 + n] = BOS, rng.integers(0, 2, n), EOS
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        write("lengths", x[:3500], x[3500:], {**META, "row_len": ROW})
        small = [
            "--d_model=32",
            "--n_layers=2",
            "--n_heads=2",
            "--warmup=20",
            "--n_samples=0",
            "--device=cpu",
            "--log_every=50",
        ]
        common = [
            "--dataset=lengths",
            "--block_sizes=1:0.5,16:0.5",
            *small,
            "--lr=4e-3",
            "--ema=0.98",
            "--eval_every=1000",
        ]
        go = lambda *flags: training.train(
            *load_with_method(TrainConfig, [*common, "--max_steps=200", *flags], set())
        )
        go("--out_dir=masked")
        go("--out_dir=uniform", "--process=uniform")
        go("--out_dir=leaky", "--clean_padding")
        for name in ("masked", "uniform"):
            student(name)
    return home


def student(name):
    """`name`_distilled: two rounds of it."""
    flags = [
        "--method=distill",
        f"--ckpt={name}",
        "--teacher_steps=16",
        "--rounds=2",
        "--round_steps=30",
        "--n_eval=64",
        "--device=cpu",
    ]
    asked = set()
    cfg, settings, method = load_with_method(TrainConfig, [*flags, "--ema=0.9"], asked)
    training.train(cfg, settings, method, *training.begin_from(cfg, settings, method, asked))


@pytest.mark.slow  # networks are trained
@pytest.mark.parametrize("name", ["masked", "uniform", "masked_distilled", "uniform_distilled"])
def test_a_trained_network_is_not_below_the_entropy_and_its_texts_have_lengths(runs, name, monkeypatch):
    """
    The bound on 500 windows that it has not seen lies above the entropy less 3 standard errors (red once in
    700 times for a perfect network). Lengths: the distance in total variation from even is below 0.3, 0.09 of
    which is chance.
    """
    monkeypatch.chdir(runs)
    run, _, _, model, process = rebuild(name, torch.device("cpu"))
    assert not run.clean_padding
    found = likelihood(model, process, Dataset("lengths"), [1, ROW], n_eval=0, n_mc=4)
    for b in (1, ROW):
        mean, _, error = estimate(found.nats[b], found.tokens)
        print(f"{name}, block {b}: {mean:.4f} +- {error:.4f}, entropy {TRUE:.4f}")
        assert TRUE - 3 * error < mean < (1.0 if b == 1 else 2.0)
    quick = bounds(model, process, Dataset("lengths"), run)  # a validation: one draw of fewer windows
    assert all(mean > TRUE - 3 * error for mean, error in quick.values())
    assert apart(model, process) < 0.3


@pytest.mark.slow  # networks are trained
def test_a_network_that_sees_padding_is_below_the_entropy_and_writes_long_texts(runs, monkeypatch):
    """--clean_padding, as published: what the test above would not let pass."""
    monkeypatch.chdir(runs)
    run, _, _, model, process = rebuild("leaky", torch.device("cpu"))
    assert run.clean_padding
    found = likelihood(model, process, Dataset("lengths"), [1, ROW], n_eval=0, n_mc=4, clean_padding=True)
    mean, _, error = estimate(found.nats[ROW], found.tokens)
    assert mean < TRUE - 0.2 and estimate(found.nats[1], found.tokens)[0] > TRUE - 0.02
    assert bounds(model, process, Dataset("lengths"), run)[ROW][0] < TRUE - 0.2, (
        "a validation says so too: it is of this training"
    )
    assert apart(model, process) > 0.5


def apart(model, process):
    """How far the lengths of 256 texts, each one block, are from even ones, in total variation."""
    made = last(generate(model, process, torch.full((256, 1), BOS), block_size=ROW, steps=16, eos_id=EOS)).x
    counts = ((made != lesson.NOTHING).sum(1) - 2).bincount(minlength=ROW)
    even = torch.zeros(len(counts)).index_fill(0, torch.arange(1, LETTERS + 1), 1 / LETTERS)
    return 0.5 * (counts / 256 - even).abs().sum().item()


# ----- rows without a text


@pytest.mark.parametrize(
    "flags",
    [[], ["--process=uniform"], ["--method=gidd"], ["--process=uniform", "--method=duo"], ["--plain"]],
)
def test_a_step_with_nothing_to_learn_is_a_step_of_zero_loss(tmp_path, monkeypatch, flags):
    """BOS and padding alone, in two rows of three, one row a step."""
    monkeypatch.chdir(tmp_path)
    rows = law()[2][:60].clone()
    rows[torch.arange(60) % 3 > 0, 1:] = PAD
    write("texts", rows, rows[:12], META)
    common = [
        *TINY,
        "--dataset=texts",
        "--block_sizes=1:0.4,8:0.6",
        "--batch_size=1",
        "--max_steps=40",
        "--out_dir=out",
        "--bad_steps=2",
    ]
    training.train(*load_with_method(TrainConfig, [*common, *flags], set()))
    lines = [line for line in checkpoint.logged("out") if "loss" in line]
    assert len(lines) == 40 and all(line["skipped"] == 0 and math.isfinite(line["loss"]) for line in lines)
    nothing = [line["loss"] == 0 and line["norm"] == 0 for line in lines]
    data, cfg = Dataset("texts"), load_with_method(TrainConfig, [*common, *flags], set())[0]
    empty = [not training.step_batches(cfg, data, step, 0, 1)[0][2][:, 1:].any() for step in range(40)]
    assert all(zero for zero, none in zip(nothing, empty, strict=True) if none) and 20 < sum(empty) < 35
    assert any(not zero for zero in nothing)
    val = [line for line in checkpoint.logged("out") if "val" in line][-1]
    assert all(math.isfinite(x) for x in val["val"].values())


@pytest.mark.parametrize("kind", NOISES)
def test_rows_without_a_text_cost_nothing_and_are_finite(kind):
    process, timed = NOISES[kind]
    rows = torch.full((4, L), PAD).index_fill(1, torch.tensor(0), BOS)
    data = SimpleNamespace(row_len=L, seq_len=L, spread=lambda *a: torch.arange(4))
    data.windows = lambda split, i: (rows[i], (torch.arange(L) == 0).expand_as(rows[i]), rows[i] != PAD)
    lesson_net = net(process, seq_len=L, time_conditioning=timed)
    for model, p in (
        (lesson_net, process),
        fast.accelerate(net(process, seq_len=L, time_conditioning=timed), process)[:2],
    ):
        found = likelihood(model, p, data, [1, 4, L], n_mc=2)
        assert all((nats == 0).all() for nats in found.nats.values()) and found.tokens.sum() == 0
        assert all(estimate(nats, found.tokens)[0] == 0 for nats in found.nats.values())
