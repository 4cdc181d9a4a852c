"""
Why believe that a noise process is one class in one file? What NoiseProcess derives from `mixing` is what
Masked and Uniform write by hand, to rounding; GIDD, which is derived, against truths small enough to
enumerate; and a process made up here, which writes `mixing` and nothing else, is trained, sampled and
evaluated.
"""

import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, slow
from exact import (
    P_VALUE,
    V3,
    Bayes,
    agree,
    chi_squared,
    code,
    entropy,
    kernel,
    last,
    letters,
    net,
    noise,
    prior,
    speed,
    states,
)

import diffusion as d
import fast
import generate as lesson
from eval import estimate, likelihood
from fast.block import FastBlock
from methods.gidd import GIDD, self_correction
from model import ModelConfig, Transformer
from options import TrainConfig
from rng import Noise
from run import checkpoint
from run.flags import load_with_method
from run.restore import begin_from, rebuild
from train import train

V = V3 + 1  # with the mask
OWN = {  # processes that write by hand what NoiseProcess derives
    "masked": d.Masked(V, V3),
    "uniform loo": d.Uniform(V),
    "uniform denoiser": d.Uniform(V, "denoiser"),
    "fast masked": fast.processes.FastMasked(V, V3),
    "fast uniform": fast.processes.FastUniform(V, "denoiser"),
}
ALPHAS = (1e-6, 1e-3, 0.2, 0.5, 0.9, 0.999)


class Drift(d.NoiseProcess):
    """
    A process that is nobody's: tokens drift to a law of their own, slowly at first. It writes `mixing` alone.
    """

    def mixing(self, alpha):
        w = torch.arange(1, self.vocab_size + 1).to(alpha)
        pi, a, da = w / w.sum(), alpha * (2 - alpha), 2 - 2 * alpha
        return a, (1 - a)[..., None] * pi, da, -da[..., None] * pi


PROCESSES = {
    **{name: process for name, process in OWN.items() if "fast" not in name},
    "uniform, ar token": d.Uniform(V, "denoiser", ar_token=V),
    "gidd 0": GIDD(V, V3, 0.0),
    "gidd 0.1": GIDD(V, V3, 0.1),
    "gidd 0.5": GIDD(V, V3, 0.5),
    "drift": Drift(V3),
}


def some_pairs(process, alpha, n=400):
    """x0 (n, 4) of letters that can be predicted, and draws x_t of them."""
    torch.manual_seed(0)
    x0 = torch.randint(process.vocab_size - (process.mask_id is not None), (n, 4))
    return x0, process.corrupt(x0, alpha, noise(n, 4))


def near_nats(ours, want, alpha):
    """
    Two integrands, equal to 1e-12 of the largest; at a small alpha they are differences of ones over alpha,
    and so is their rounding.
    """
    gap = (ours - want).abs().max().item()
    assert gap <= 1e-12 * want.abs().max().item() + 1e-15 / alpha, f"{gap:.1e} apart at alpha {alpha}"


# ----- (a) what is derived, and what is written by hand


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", OWN)
def test_what_is_derived_from_mixing_is_what_the_processes_write_by_hand(kind, alpha):
    process, derived = OWN[kind], d.NoiseProcess
    x0, xt = some_pairs(process, alpha)
    logits = 2 * torch.randn(*x0.shape, V, dtype=torch.float64)
    at = torch.full((len(x0),), alpha, dtype=torch.float64)
    close = lambda ours, want: agree(ours, want, 1e-12)
    slope = -torch.rand(len(x0), dtype=torch.float64)
    near_nats(process.nll(logits, x0, xt, at, slope), derived.nll(process, logits, x0, xt, at, slope), alpha)
    own, ours = process.denoiser_logits(logits, xt, at), derived.denoiser_logits(process, logits, xt, at)
    close(own.softmax(-1), ours.softmax(-1))
    minus_log_D = derived.ce(process, logits, x0, xt, at)
    close(process.last_step(logits, x0, xt, at), minus_log_D)
    if kind != "uniform loo":  # its ce is of what it predicts, l
        close(process.ce(logits, x0, xt, at), minus_log_D)
    for a_s in (alpha + 0.5 * (1 - alpha), 1.0):
        for how in ({}, {"temperature": 0.5}, {"temperature": 0.0}, {"top_p": 0.8}):
            want = derived.posterior_probs(process, logits, xt, at, a_s, **how)
            close(process.posterior_probs(logits, xt, at, a_s, **how), want)
            assert (want.sum(-1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [name for name in OWN if "fast" not in name])
def test_corruption_and_pure_noise_that_are_derived_have_the_law_they_should(kind):
    """Chi-squared, 4 tests a process, each red once in 1e4 times if all is right."""
    process, n = OWN[kind], 40_000
    x0 = torch.ones(n, 1, dtype=torch.long)
    for alpha in (0.0, 0.3, 0.8):
        xt = d.NoiseProcess.corrupt(process, x0, alpha, noise(n))
        p = d.NoiseProcess.log_q(process, torch.arange(V)[None], torch.ones(1, V, dtype=torch.long), alpha)[
            0
        ].exp()
        own = (
            torch.full((V,), (1 - alpha) / V, dtype=torch.float64)
            if process.mask_id is None
            else torch.zeros(V).double()
        )
        own[1] += alpha
        if process.mask_id is not None:
            own[process.mask_id] += 1 - alpha
        agree(p, own)
        counts = xt[:, 0].bincount(minlength=V)
        assert counts[p.argmax()] == n if p.max() == 1 else chi_squared(counts, p) > P_VALUE
    pure = d.NoiseProcess.prior(process, (n, 1), noise(n, seed=1))[:, 0]
    assert (
        (pure == V3).all()
        if process.mask_id is not None
        else chi_squared(pure.bincount(minlength=V), torch.full((V,), 1 / V)) > P_VALUE
    )


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_three_questions_tell_the_truth(kind):
    """
    What is known is certainly clean and stays, what cannot change does not, and what does not pay costs
    nothing.
    """
    process = PROCESSES[kind]
    x0, xt = some_pairs(process, 0.4)
    logits, at = torch.randn(*x0.shape, process.vocab_size).double(), torch.full((len(x0),), 0.4).double()
    known, pays, can_change = process.known(xt), process.pays(x0, xt), process.can_change(xt)
    assert (xt == x0)[known].all() and known.any() == process.absorbing
    assert (process.nll(logits, x0, xt, at, -torch.ones(len(x0)))[~pays] == 0).all()
    assert (process.last_step(logits, x0, xt, at)[~pays] == 0).all() and pays.any()
    stays = pick(process.posterior_probs(logits, xt, at, 0.7), xt)
    assert (stays[~can_change] == 1).all()
    assert kind == "gidd 0" or (stays[can_change] < 1).all(), (
        "without uniform noise GIDD's visible tokens stay, and it need not know"
    )


def pick(x, ids):
    return x.gather(-1, ids[..., None])[..., 0]


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", PROCESSES)
def test_the_derivatives_of_mixing_are_those_of_differences(kind, alpha):
    process, h = PROCESSES[kind], 1e-5 * alpha
    at = torch.tensor([alpha], dtype=torch.float64)
    a, m, da, dm = process.mixing(at)
    assert abs(a.item() + m.sum().item() - 1) < 1e-12 and (m >= 0).all() and 0 <= a.item() <= 1
    (a2, m2, *_), (a1, m1, *_) = process.mixing(at + h), process.mixing(at - h)
    assert abs((a2 - a1).item() / (2 * h) - da.item()) < 1e-4 * (1 + abs(da.item()))
    assert ((m2 - m1) / (2 * h) - dm).abs().max() < 1e-4 * (1 + dm.abs().max())
    start, end = (process.mixing(torch.tensor(x, dtype=torch.float64)) for x in (0.0, 1.0))
    assert start[0] == 0 and abs(end[0] - 1) < 1e-5, "alpha = 0 is pure noise and alpha = 1 is clean"


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_reverse_step_is_bayes_rule_by_enumeration(kind):
    """
    Every z = x_t and every x_s, against a chain x_0 -> x_s -> x_t whose second matrix is solved for, Q_t =
    Q_s Q_ts.
    """
    process = PROCESSES[kind]
    W, alpha_t, alpha_s = process.vocab_size, 0.3, 0.6

    def matrix(alpha):  # (v, z): q(z | x_0 = v)
        a, m, *_ = process.mixing(torch.tensor(alpha, dtype=torch.float64))
        return a * torch.eye(W, dtype=torch.float64) + m

    logits, xt = 2 * torch.randn(1, W, W, dtype=torch.float64), torch.arange(W)[None]
    between = torch.linalg.solve(matrix(alpha_s), matrix(alpha_t))  # (x_s, x_t)
    assert between.min() > -1e-12 and (between.sum(-1) - 1).abs().max() < 1e-12, "it is a Markov chain"
    p0 = process.loo_logits(logits, xt, torch.tensor([alpha_t], dtype=torch.float64)).softmax(-1)[0]  # (z, v)
    joint = (p0 @ matrix(alpha_s)) * between.T  # (z, x_s)
    ours = process.posterior_probs(logits, xt, alpha_t, alpha_s)
    agree(ours, (joint / joint.sum(-1, keepdim=True))[None], 1e-12)
    n = 40_000
    xs = process.posterior_sample(
        logits.expand(n, W, W), xt.expand(n, W), alpha_t, alpha_s, noise=noise(n, W)
    )
    for z in range(W):
        p, counts = ours[0, z].where(ours[0, z] > 1e-12, 0.0), xs[:, z].bincount(minlength=W)
        assert counts[p.argmax()] == n if (p > 0).sum() == 1 else chi_squared(counts, p) > P_VALUE


# ----- (b) GIDD


def test_without_uniform_noise_gidd_is_masked_noise():
    gidd, masked = GIDD(V, V3, 0.0), d.Masked(V, V3)
    for alpha in ALPHAS:
        at = torch.full((400,), alpha, dtype=torch.float64)
        x0, xt = some_pairs(masked, alpha)
        logits, slope = torch.randn(*x0.shape, V, dtype=torch.float64), -torch.ones(400, dtype=torch.float64)
        agree(list(gidd.mixing(at)[:2]), list(masked.mixing(at)[:2]), 1e-12)
        near_nats(gidd.nll(logits, x0, xt, at, slope), masked.nll(logits, x0, xt, at, slope), alpha)
        agree(gidd.ce(logits, x0, xt, at), masked.ce(logits, x0, xt, at), 1e-12)
        D = [p.denoiser_logits(logits, xt, at).softmax(-1) for p in (gidd, masked)]
        agree(*D, 1e-12)
        agree(*[p.posterior_probs(logits, xt, at, (1 + alpha) / 2) for p in (gidd, masked)], 1e-12)
    assert torch.equal(gidd.prior((3, 4), noise(3, 4)), masked.prior((3, 4), noise(3, 4)))


@pytest.mark.parametrize("p_uniform", [0.1, 0.2, 0.5])
def test_at_half_the_time_gidds_noise_has_the_share_of_uniform_noise_it_says(p_uniform):
    a, m, *_ = GIDD(V, V3, p_uniform).mixing(torch.tensor(0.5, dtype=torch.float64))
    assert abs(1 - m[V3] / m.sum() - p_uniform / (p_uniform + (1 - p_uniform) / 2)) < 1e-12


def exact_bound(process, x, p, end, nodes=100):
    """
    The bound of a perfect network, averaged over the law, in nats: E integral of nll over t in (end, 1) + E
    last_step(end), by Gauss-Legendre over t and a sum over every x_t. x (K, L), p (K,).
    """
    model, xt = Bayes(process, x, p), states(process.vocab_size, x.size(1))
    node, weight = np.polynomial.legendre.leggauss(nodes)
    total = 0.0
    for u, w in [*zip((node + 1) / 2, weight / 2, strict=True), (0.0, None)]:
        t = end + (1 - end) * u**2 * (3 - 2 * u)  # nodes at both ends
        alpha = torch.full((len(xt),), 1 - t, dtype=torch.float64)
        logits = model(xt[:, :0], xt, x.size(1), 0, -alpha.log()).detach()
        for row, weight_of_row in zip(x, p, strict=True):
            x0 = row.expand_as(xt)
            q = weight_of_row * process.log_q(xt, x0, alpha).sum(-1).exp()
            met = q > 0
            args = logits[met], x0[met], xt[met], alpha[met]
            if w is None:
                total += (q[met] * process.last_step(*args).sum(-1)).sum().item()
            else:
                slope = -torch.ones(int(met.sum()), dtype=torch.float64)
                total += (
                    w
                    * (1 - end)
                    * 6
                    * u
                    * (1 - u)
                    * (q[met] * process.nll(*args, slope).sum(-1)).sum().item()
                )
    return total


def toy_law(L=2, seed=0):
    torch.manual_seed(seed)
    return states(V3, L), (2 * torch.randn(V3**L, dtype=torch.float64)).softmax(0)


@pytest.mark.parametrize("kind", slow(PROCESSES, ["masked", "uniform denoiser", "gidd 0.1"]))
def test_with_the_perfect_network_the_bound_integrates_to_the_entropy(kind):
    """
    And is never below it. A step from t = end to 0 draws the tokens apart, which costs a little: the less the
    smaller `end`; masked noise needs none for one token. The chance that two tokens are noise at `end` is
    what is left of it.
    """
    x, p = toy_law()
    for end in (1e-2, 1e-3, 1e-4):
        gap = exact_bound(PROCESSES[kind], x, p, end) - entropy(p)
        both_noisy = (1 - PROCESSES[kind].mixing(torch.tensor(1 - end, dtype=torch.float64))[0].item()) ** 2
        assert -1e-7 < gap < 6 * both_noisy + 1e-7, (
            f"end {end}: {gap:.1e} above the entropy, {both_noisy:.1e}"
        )


@pytest.mark.parametrize("path", slow(["lesson", "fast"], ["lesson"]))
@pytest.mark.parametrize("kind", slow(["gidd 0.1", "gidd 0.5", "drift"], ["gidd 0.1"]))
def test_ancestral_sampling_draws_the_enumerated_distribution(kind, path):
    """
    Chi-squared against products of kernels, blocks of 2 in 3 steps; red once in 1e4 times if all is right.
    """
    process, n, b, steps = PROCESSES[kind], 20_000, 2, 3
    model = net_of(process)
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    p = first_noise(process, b)
    for a_t, a_s in zip((1 - grid).tolist()[:-1], (1 - grid).tolist()[1:], strict=True):
        p = p @ kernel(model, process, torch.zeros(0, dtype=torch.long), b, 0, a_t, a_s)
    if process.mask_id is not None:
        p = letters(p, process, b)
    block = None
    if path == "fast":
        model, process, notes = fast.accelerate(model, process)
        assert not notes and model.block_class is FastBlock and process is PROCESSES[kind]
        block = FastBlock
    prompts = torch.zeros(n, 0, dtype=torch.long)
    made = last(
        lesson.generate(
            model, process, prompts, block_size=b, steps=steps, max_new_tokens=b, block_class=block
        )
    ).x
    assert chi_squared(code(made, V3).bincount(minlength=V3**b), p) > P_VALUE


def net_of(process, **how):
    return net(process, time_conditioning=True, **how).double()


def first_noise(process, b):
    """The law of pure noise over states(V, b)."""
    if process.mask_id is not None:
        return prior(process, b)
    m = process.mixing(torch.zeros((), dtype=torch.float64))[1]
    return m[states(process.vocab_size, b)].prod(-1)


# ----- what a checkpoint keeps


@pytest.mark.parametrize("kind", PROCESSES)
def test_a_process_is_its_class_and_arguments(kind):
    process = PROCESSES[kind]
    again = type(process)(**json.loads(json.dumps(process.arguments())))
    assert type(again) is type(process) and vars(again) == vars(process)
    quick = fast.processes.accelerate(process)
    back = fast.processes.plain(quick)
    assert (
        type(back) is type(process)
        and vars(back) == vars(process)
        and quick.arguments() == process.arguments()
    )
    if kind == "drift":
        return  # not of diffusion.py nor of methods/
    for one in (process, quick):
        kept = json.loads(json.dumps(checkpoint.process_facts(one)))
        loaded = checkpoint.process_of(kept)
        assert type(loaded) is type(process) and vars(loaded) == vars(process)


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "subprocess.Popen", "builtins.exec", "run.checkpoint.load", "test_process.Drift",
        "methods.Learner", "methods.gidd.os.system", "methods.gidd.Settings", "methods.gidd.process",
        "methods.duo.Relaxation", "methods..gidd.GIDD", "methods.gidd.die", "Noise", "draw", "math",
        "no_such", "methods.no_such.GIDD", "", "diffusion.Masked", "fast.processes.FastMasked",
    ],
)  # fmt: skip
def test_no_other_code_is_called_by_a_checkpoint(name):
    with pytest.raises((ValueError, ImportError)):
        checkpoint.process_of({"class": name, "arguments": {"vocab_size": 4, "mask_id": 3}})


def test_gidd_is_trained_kept_and_sampled(project):
    flags = [
        *TINY,
        "--method=gidd",
        "--p_uniform=0.3",
        "--dataset=toy",
        "--seq_len=8",
        "--block_sizes=1:0.25,4:0.75",
        "--max_steps=4",
    ]
    train(*load_with_method(TrainConfig, [*flags, "--out_dir=out"], set()))
    state = checkpoint.load("out")
    assert state["process"] == {
        "class": "methods.gidd.GIDD",
        "arguments": {"vocab_size": 4, "mask_id": 3, "p_uniform": 0.3},
    }
    run, _, step, model, process = rebuild("out", torch.device("cpu"))
    assert (
        step == 4
        and type(process) is GIDD
        and process.p_uniform == 0.3
        and run.method == "gidd"
        and run.objective == "elbo"
    )
    text = last(lesson.generate(model, process, torch.zeros(3, 0, dtype=torch.long), block_size=4)).x
    assert text.shape == (3, 8) and 0 <= text.min() and text.max() < 3
    for more in (["--max_steps=2"], ["--resume"]):
        train(
            *load_with_method(
                TrainConfig, [*flags, "--lr_schedule=constant", "--out_dir=parts", *more], set()
            )
        )
    train(*load_with_method(TrainConfig, [*flags, "--lr_schedule=constant", "--out_dir=whole"], set()))
    whole, parts = (checkpoint.load(name)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole), "resumed, bit for bit"


def test_weights_go_on_with_the_noise_they_know(project):
    """--init_from a run of GIDD, without its method: what a network was taught to read is what it reads."""
    common = [*TINY, "--dataset=toy", "--seq_len=8", "--block_sizes=1:0.25,4:0.75", "--max_steps=1"]
    own = ["--method=gidd", "--p_uniform=0.3", "--out_dir=out"]
    train(*load_with_method(TrainConfig, [*common, *own], set()))
    asked = set()
    flags = [*TINY, "--init_from=out", "--out_dir=on", "--max_steps=1"]
    cfg, settings, method = load_with_method(TrainConfig, flags, asked)
    weights, facts = begin_from(cfg, settings, method, asked)
    train(cfg, settings, method, weights, facts)
    assert checkpoint.load("on")["process"] == checkpoint.load("out")["process"]


@pytest.mark.parametrize("path", ["lesson", "fast"])
def test_self_correction_mends_texts_whose_tokens_were_drawn_apart(path):
    """
    Two texts, a half each, in one step: half of the texts are neither. Corrected, nearly all are one of them,
    and as often.
    """
    x, p, process = torch.tensor([[0] * 3, [1] * 3]), torch.tensor([0.5, 0.5]), GIDD(V, V3, 0.2)
    model, prompts = Bayes(process, x, p), torch.zeros(400, 0, dtype=torch.long)
    block = FastBlock if path == "fast" else None
    how = {"block_size": 3, "steps": 1, "use_cache": False, "block_class": block}
    plain = last(lesson.generate(model, process, prompts, **how)).x.sum(1)
    mended = last(lesson.generate(model, process, prompts, sampler=self_correction, **how)).x.sum(1)
    share = lambda sums: ((sums == 0) | (sums == 3)).double().mean().item()
    assert 0.1 < share(plain) < 0.4 and share(mended) > 0.98
    assert (
        chi_squared((mended == 3).long().bincount(minlength=2), torch.tensor([0.5, 0.5]).double()) > P_VALUE
    )


# ----- (c) a process that writes `mixing` and nothing else


class Windows:
    """A dataset of these rows, without prompts or padding."""

    def __init__(self, x0):
        self.x0, self.row_len, self.seq_len = x0, x0.size(1), x0.size(1)

    def spread(self, split, n):
        return torch.arange(len(self.x0))

    def windows(self, split, index):
        none = torch.zeros_like(self.x0[index], dtype=torch.bool)
        return self.x0[index], none, ~none


def copies(x, p, n):
    """
    About n rows x, each as often as p says, and the law that they then have: a data set that is its own law.
    """
    times = (p * n).round().long()
    return x.repeat_interleave(times, dim=0), x[times > 0], times[times > 0] / times.sum()


@pytest.mark.parametrize("kind", slow(["drift", "gidd 0.1"], ["gidd 0.1"]))
def test_a_process_made_of_mixing_alone_learns(kind):
    """
    A few steps of either objective, in the lesson and on the fast network: the same losses, and the bound
    comes down.
    """
    process = PROCESSES[kind]
    x = states(V3, 4)
    rows, _, law = copies(
        x, torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)[x].prod(-1), 400
    )  # easy: three letters, unequal shares
    for objective in ("elbo", "ce"):
        found = []
        for path in ("lesson", "fast"):
            torch.manual_seed(0)
            model = Transformer(ModelConfig(process.vocab_size, 4, 2, 2, 16, time_conditioning=True)).double()
            if path == "fast":
                model, same, _ = fast.accelerate(model, process)
                assert same is process
            loss_of = getattr(model, "token_loss", d.token_loss)
            optimizer, losses = torch.optim.Adam(model.parameters(), lr=2e-2), []
            before = likelihood(model, process, Windows(rows), [1, 4], n_mc=2)
            for step in range(30):
                x0 = rows[torch.randint(len(rows), (64,), generator=torch.Generator().manual_seed(step))]
                sizes, t = torch.tensor([1, 2, 4, 4] * 16), (torch.arange(64) + 0.5).double() / 64
                total, each = loss_of(model, process, x0, sizes, t, objective, noise=noise(64, 4, seed=step))
                assert total.isfinite() and each.shape == (64, 4)
                (total / 256).backward()
                optimizer.step(), optimizer.zero_grad()
                losses.append(total.detach())
            found.append(torch.stack(losses))
            after = likelihood(model, process, Windows(rows), [1, 4], n_mc=2)
            for b in (1, 4):
                mean, error, _ = estimate(after.nats[b], after.tokens)
                assert after.nats[b].mean() < before.nats[b].mean() - 0.5, f"{objective}, block {b}, {path}"
                assert mean > entropy(law) / 4 - 4 * (error if len(after.nats[b]) > 1 else 0.0)
        agree(*found, 1e-6)  # of 30 steps, each of which makes the rounding of those before a little larger


@pytest.mark.parametrize("form", slow(["lesson", "fast"], ["fast"]))
@pytest.mark.parametrize("kind", slow(["drift", "gidd 0.1", "gidd 0.5"], ["gidd 0.1"]))
def test_a_process_made_of_mixing_alone_is_evaluated(kind, form):
    """
    With the perfect network eval.likelihood finds the entropy, at every block size; of another it finds what
    is above.
    """
    process = PROCESSES[kind]
    rows, x, p = copies(*toy_law(4, seed=2), 400)
    found = likelihood(Bayes(process, x, p), process, Windows(rows), [1, 2, 4], n_mc=32)
    for b in (1, 2, 4):
        mean, error, _ = estimate(found.nats[b], found.tokens)
        error = 0.0 if len(found.nats[b]) == 1 else error
        assert len(found.nats[b]) == (1 if b == 1 and process.exact_ar else 2)
        assert -4 * error - 1e-6 < mean - entropy(p) / 4 < 4 * error + 3e-3, (
            f"block {b}: {mean:.4f} +- {error:.4f}, {entropy(p) / 4:.4f}"
        )
    model = net_of(process)
    if form == "fast":
        model, _ = speed(model, process)
    one = likelihood(model, process, Windows(rows[::9]), [1, 4], n_mc=2)
    assert all(estimate(one.nats[b], one.tokens)[0] > entropy(p) / 4 for b in (1, 4))


def test_a_token_of_noise_that_is_drawn_makes_block_size_1_a_bound():
    """What reads one and the same token is exact; what reads a random one must not say so."""
    for process in PROCESSES.values():
        seen = process.ar_input((2000, 1), Noise(0, torch.arange(2000), torch.arange(1)))
        assert process.exact_ar == (len(seen.unique()) == 1), type(process).__name__


@pytest.mark.parametrize("kind", PROCESSES)
def test_gradients_are_finite_with_prompts_and_at_the_ends_of_time(kind):
    """
    Tokens shown clean are impossible at alpha = 0, where block size 1 stands: their price is not paid, nor
    are its slopes.
    """
    process = PROCESSES[kind]
    model, x0 = net_of(process), torch.randint(V3, (6, 4))
    given = torch.arange(4).expand(6, 4) < 2
    for t in (1e-9, 0.5, 1 - 1e-9):
        for objective in ("elbo", "ce", "ce_noisy", "last"):
            when = torch.full((6,), t, dtype=torch.float64)
            total, each = d.token_loss(
                model, process, x0, torch.tensor([1, 2, 4] * 2), when, objective, given, noise=noise(6, 4)
            )
            slopes = torch.autograd.grad(total, list(model.parameters()))
            assert all(g.isfinite().all() for g in slopes) and (each[given] == 0).all(), (t, objective)


def test_the_perfect_network_is_what_its_docstring_says():
    """l and D by plain sums over the law, two blocks, each behind its clean context."""
    x, p = (
        states(V3, 4),
        (2 * torch.randn(V3**4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).softmax(0),
    )
    for process in (d.Uniform(V3), d.Uniform(V3, "denoiser")):
        model, alpha = Bayes(process, x, p), torch.tensor([0.3, 0.8], dtype=torch.float64)
        clean, noisy = torch.randint(V3, (2, 2, 4))
        ours = model(clean, noisy, torch.tensor([2, 4]), 0, -alpha.log()).log_softmax(-1)
        for row, b in enumerate((2, 4)):
            for i in range(4):
                first, want = i // b * b, torch.zeros(V3, dtype=torch.float64)
                for k in range(len(x)):
                    if not torch.equal(x[k, :first], clean[row, :first]):
                        continue
                    weight = p[k].item()
                    for j in range(first, first + b):
                        if j != i or process.predicts == "denoiser":
                            weight *= (
                                alpha[row].item() * (noisy[row, j] == x[k, j]).item()
                                + (1 - alpha[row].item()) / V3
                            )
                    want[x[k, i]] += weight
                agree(ours[row, i].exp().detach(), want / want.sum())
    masked = d.Masked(V, V3)
    levels = [Bayes(masked, x, p, timeless=True)(None, torch.tensor([[0, V3, V3, 1]]), 4)]
    levels += [
        Bayes(masked, x, p)(None, torch.tensor([[0, V3, V3, 1]]), 4, 0, torch.tensor([s])) for s in (0.1, 3.0)
    ]
    for one in levels[1:]:
        agree(one[:, 1:3].softmax(-1), levels[0][:, 1:3].softmax(-1))
    assert math.isclose(copy.copy(levels[0])[0, 1].softmax(-1).sum().item(), 1)
