"""
Why believe methods/distill.py? The trajectory against that of Gaussians, the loss recomputed token by token
from networks whose answers are known, and rounds whose teachers are compared.
"""

import copy
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import IN_FLOAT64, TINY, slow
from exact import P_VALUE, V3, agree, chi_squared, net, noise, speed

import diffusion as d
import distill as command
import fast
from methods import distill, duo
from options import TrainConfig
from rng import Noise
from run import checkpoint
from run.cli import load_config
from train import train


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
    train(load_config(TrainConfig, [*base, *flags]))


def weights(out_dir, part="model"):
    return checkpoint.load(out_dir)[part]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.fixture
def old_command(monkeypatch):
    """old_command(*flags): distill.py, which puts --method distill in front of them."""

    def go(*flags):
        monkeypatch.setattr(sys, "argv", ["distill.py", "--method", "distill", *flags])
        command.main()

    return go


def test_slips(project, slip, old_command):
    run("--out_dir=ar", "--block_sizes=1:1")
    run("--out_dir=untimed", "--process=uniform", "--time_conditioning=false")
    run("--out_dir=masked")
    for flags, says in (
        (["--ckpt=ar"], "block size 1 alone"),
        (["--ckpt=untimed"], "does not see the noise level"),
        (["--ckpt=none"], "no checkpoint none"),
        (["--ckpt=masked", "--rounds=6"], "beyond dt = 1/2"),
        (["--ckpt=masked", "--round_steps=0"], "round_steps is 0"),
        (["--ckpt=masked", "--rounds=-1"], "rounds is -1"),
    ):
        assert says in slip(old_command, *flags), flags


def test_the_noise_of_a_method_is_refused(slip):
    """A KL of predictions would not teach what such a network says beside them."""

    class Own(d.Masked):
        pass

    learner = lambda process: distill.Learner(TrainConfig(), distill.Settings(), None, process, None)
    learner(d.Masked(V3 + 1, V3)), learner(fast.processes.FastUniform(V3))
    Own.__module__ = "methods.own"
    assert "not Own" in slip(learner, Own(V3 + 1, V3))


def test_a_student_has_a_folder_beside_its_teachers():
    for teacher in ("out/x", "out/x/", "out/x/ckpt.pt", "out/x/best.pt", "out/x/ckpt.500.pt"):
        assert distill.DEFAULTS(distill.Settings(ckpt=teacher))["out_dir"] == "out/x_distilled", teacher


def test_the_trajectory_of_dcd_is_corrupt_with_the_same_random_numbers():
    """
    (x_t, x_s) of one Gaussian at two times, against `corrupt` at two alphas from the same noise: the whole
    joint law.
    """
    V, n, gammas = 4, 60_000, (0.5, -1.0)
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(n, V, generator=g, dtype=torch.float64)
    pairs, alphas = [], []
    for gamma in gammas:
        w = normal / math.sqrt(1 + math.exp(-gamma))
        w[:, 1] += 1 / math.sqrt(1 + math.exp(gamma))
        pairs.append(w.argmax(-1))
        alphas.append(duo.transform(torch.tensor(gamma), V)[0].item())
    x0, nz = torch.ones(10 * n, 1, dtype=torch.long), noise(10 * n)
    ours = [d.Uniform(V).corrupt(x0, alpha, copy.copy(nz))[:, 0] for alpha in alphas]
    count = lambda pair: (pair[0] * V + pair[1]).bincount(minlength=V * V)
    a_t, a_s = alphas
    p = torch.zeros(V, V, dtype=torch.float64)  # x_0 until the threshold, then one other token for ever
    p[1, 1], others = a_t + (1 - a_t) / V, [0, 2, 3]
    p[others, 1], p[others, others] = (a_s - a_t) / V, (1 - a_s) / V
    assert (
        chi_squared(count(pairs), p.flatten()) > P_VALUE and chi_squared(count(ours), p.flatten()) > P_VALUE
    )
    independent = [
        d.Uniform(V).corrupt(x0, alpha, noise(10 * n, seed=i))[:, 0] for i, alpha in enumerate(alphas)
    ]
    assert chi_squared(count(independent), p.flatten()) < P_VALUE


class Table:
    """
    A network that looks up its logits by the token it reads and the noise level, and remembers what it was
    asked.
    """

    def __init__(self, V, seed):
        self.table = torch.randn(2, V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.asked = []

    def __call__(self, clean, noisy, block_size, start, sigma):
        self.asked.append((noisy, sigma))
        return self.table[0][noisy] + sigma[:, None, None] * self.table[1][noisy]


KINDS = {
    "masked": d.Masked(V3 + 1, V3),
    "uniform": d.Uniform(V3, "denoiser", V3),
    "loo": d.Uniform(V3, "loo", V3),
}
FORMS = {"lesson": lambda process: process, "fast": fast.processes.accelerate}


def loss_of(forward, process, x0, block_size, t, given, charged, start, noise, **how):
    """distill_loss, (B, L - start) nats."""
    return distill.distill_loss(
        forward, process, x0, block_size, t, None, given, charged, d.loglinear, start, noise, **how
    )[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_distillation_loss_is_the_reverse_kl_to_the_earlier_prediction(kind, form):
    """Recomputed token by token, in float64, from what the teacher and the student were asked."""
    process, B, L, dt = FORMS[form](KINDS[kind]), 64, 8, 0.25
    student, teacher = Table(V3 + 1, 0), Table(V3 + 1, 1)
    cut = lambda f: lambda *a: f(*a)[..., : process.vocab_size]
    torch.manual_seed(0)
    x0, given = torch.randint(V3, (B, L)), torch.rand(B, L) < 0.2
    charged = ~given & (torch.rand(B, L) < 0.8)
    sizes = torch.tensor([1, 4]).repeat(B // 2)
    t = torch.rand(B).double()
    nz = noise(B, L)
    loss = loss_of(cut(student), process, x0, sizes, t, given, charged, 0, nz, teacher=cut(teacher), dt=dt)
    if kind != "masked":
        t = (t + dt).clamp(max=1)
    alpha_t, alpha_s = 1 - t, 1 - (t - dt).clamp(min=1e-5)
    (read, level), (first, first_level), *more = student.asked + teacher.asked
    second, second_level = more[0] if more else (first, first_level)
    ar = sizes == 1
    assert (read[ar][~given[ar]] == V3).all() and (read[given] == x0[given]).all()
    agree([level[~ar], level[ar]], [d.sigma(alpha_t)[~ar], d.sigma(torch.zeros(int(ar.sum())).double())])
    agree(second_level, d.sigma(alpha_s))
    assert all((asked[given] == x0[given]).all() for asked in (first, second))
    expected = torch.zeros(B, L, dtype=torch.float64)
    for b in range(B):
        for i in range(L):
            z = cut(student)(None, read[b : b + 1], None, 0, level[b : b + 1])[0, i]
            if not charged[b, i]:
                continue
            if ar[b]:
                expected[b, i] = -z[:V3].log_softmax(-1)[x0[b, i]]
                continue
            if kind == "masked":
                if read[b, i] != V3:
                    continue
                assert first[b, i] == V3
                agree(first_level, d.sigma(alpha_t))
                source, at = (second, second_level) if second[b, i] == V3 else (first, first_level)
            else:
                source, at = second, second_level
                assert source[b, i] == read[b, i] or source[b, i] == x0[b, i]
            y = cut(teacher)(None, source[b : b + 1], None, 0, at[b : b + 1])[0, i]
            if kind == "loo":
                z[read[b, i]] += torch.log1p(V3 * alpha_t[b] / (1 - alpha_t[b]))
                y[source[b, i]] += torch.log1p(V3 * alpha_s[b] / (1 - alpha_s[b]))
            q, p = z[:V3].softmax(-1), y[:V3].softmax(-1)
            expected[b, i] = (q * (q / p).log()).sum()
    agree(loss, expected)
    if kind == "masked":  # all three cases came up
        masks = charged & ~ar[:, None] & (read == V3)
        assert (
            (masks & (second == V3)).any()
            and (masks & (second != V3)).any()
            and (~masks & charged & ~ar[:, None]).any()
        )
        idle = ~charged & ~given & ~ar[:, None]
        assert (read[idle] == V3).any(), (
            "what carries no loss, and is no prompt, is noised like its neighbours"
        )
    else:
        assert (second != read)[~ar].any() and (second != x0)[~ar].any()


def test_the_teachers_step_lifts_as_many_masks_as_it_should():
    """
    (alpha_s - alpha_t) / (1 - alpha_t) of them: the random numbers that made the masks must not choose again.
    """
    process, B, dt, asked = KINDS["masked"], 2000, 0.3, []

    def teacher(clean, noisy, *_):
        asked.append(noisy)
        return torch.zeros(*noisy.shape, V3 + 1)

    x0, t = torch.zeros(B, 4, dtype=torch.long), torch.full((B,), 0.7).double()
    everything = torch.ones(B, 4, dtype=torch.bool)
    loss_of(teacher, process, x0, 4, t, ~everything, everything, 0, noise(B, 4), teacher=teacher, dt=dt)
    xt, xs, _ = asked
    n, lifted = (xt == V3).sum(), ((xt == V3) & (xs != V3)).sum()
    assert chi_squared(torch.tensor([lifted, n - lifted]), torch.tensor([3 / 7, 4 / 7]).double()) > P_VALUE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_blocks_need_no_noisy_copy(kind, form):
    """start skips them: equal losses behind it, with distillation, and with soft tokens."""
    process, how = KINDS[kind], {"time_conditioning": kind != "masked"}
    student, teacher, token_loss = *(net(process, seed, **how).double() for seed in (0, 1)), d.token_loss
    if form == "fast":
        (student, quick), (teacher, _), token_loss = (
            speed(student, process),
            speed(teacher, process),
            fast.token_loss,
        )
        process = quick
    x0, given = torch.randint(V3, (6, 8)), torch.arange(8).expand(6, 8) < 5
    sizes, t = torch.tensor([1, 2, 4] * 2), torch.rand(6).double()
    behind = lambda start: Noise(0, torch.arange(6), torch.arange(start, 8))
    loss = []
    for start in (0, 4):
        found = loss_of(
            student, process, x0, sizes, t, given, ~given, start, behind(start), teacher=teacher, dt=0.2
        )
        loss.append(found[:, 4 - start :])
    agree(*loss)
    assert (loss[0] != 0).any() and (loss[0][:, 0] == 0).all()
    if kind != "masked":
        for k in (0, 2):
            soft, loss = duo.Relaxation(process, 0.2, k, dtype=torch.float64), []
            for start in (0, 4):
                how = {"start": start, "noise": behind(start), "corrupt": soft}
                loss.append(
                    token_loss(student, process, x0, sizes, t, "elbo", given, **how)[1][:, 4 - start :]
                )
            agree(*loss)
            assert (loss[0] != 0).any() and (loss[0][:, 0] == 0).all()


@pytest.mark.parametrize("process", slow(["masked", "uniform"], ["masked"]))
def test_rounds_take_the_student_for_the_teacher_and_resume(project, monkeypatch, slip, old_command, process):
    run("--out_dir=t", f"--process={process}")
    teachers, original = [], distill.distill_loss

    def spy(*args, teacher, dt, **kw):
        if not teachers or teachers[-1][1] != dt:
            teachers.append(({k: v.clone() for k, v in teacher.state_dict().items()}, dt))
        return original(*args, teacher=teacher, dt=dt, **kw)

    monkeypatch.setattr(distill, "distill_loss", spy)
    flags = [
        "--ckpt=t",
        "--round_steps=3",
        "--teacher_steps=8",
        "--n_eval=8",
        "--device=cpu",
        "--lr=0.01",
        "--warmup=1",
    ]
    go = lambda *more: old_command(*flags, *more)
    go("--rounds=1", "--out_dir=parts")
    one = weights("parts")
    teachers.clear()
    go("--rounds=3", "--out_dir=whole")
    assert [dt for _, dt in teachers] == [0.125, 0.25, 0.5]
    assert same(teachers[0][0], weights("t", "ema")) and same(teachers[1][0], one)
    go("--rounds=3", "--out_dir=parts", "--resume")
    assert same(weights("parts"), weights("whole")) and not same(weights("whole"), weights("t"))
    assert "--round_steps=3" in slip(go, "--rounds=3", "--out_dir=parts", "--resume", "--round_steps=2")
    calls = []

    def stopped(*args, **kw):
        calls.append(None)
        if len(calls) == 5:  # in the middle of the second round
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kw)

    monkeypatch.setattr(distill, "distill_loss", stopped)
    go("--rounds=3", "--out_dir=stopped")
    assert checkpoint.load("stopped")["step"] == 5
    go("--rounds=3", "--out_dir=stopped", "--resume")
    assert same(weights("stopped"), weights("whole")), "the teacher of a round that was broken off is kept"
    for file in Path("stopped").glob("*.pt"):
        file.unlink()  # as after a kill before the first checkpoint
    monkeypatch.setattr(distill, "distill_loss", original)
    go("--rounds=3", "--out_dir=stopped", "--resume")
    assert same(weights("stopped"), weights("whole"))
    run("--out_dir=other", f"--process={process}")
    assert "method" in slip(go, "--rounds=3", "--out_dir=other", "--resume"), "not a run of --method distill"
    assert "another --out_dir" in slip(go, "--rounds=3", "--out_dir=t", "--resume")
    go("--rounds=1", "--round_steps=2")
    assert Path("t_distilled/ckpt.pt").exists()


@pytest.mark.slow
def test_two_processes_distill(project, float64):
    """As one does, in float64."""
    run("--out_dir=t")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = str(Path(__file__).parents[1] / "distill.py")
    common = [
        IN_FLOAT64,
        script,
        "--ckpt=t",
        "--rounds=2",
        "--round_steps=2",
        "--teacher_steps=4",
        "--n_eval=8",
        "--device=cpu",
    ]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *common, "--batch_size=2", "--out_dir=two"],
        env=env, check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(
        [sys.executable, *common, "--batch_size=4", "--out_dir=one"], env=env, check=True, capture_output=True
    )
    a, b = weights("one"), weights("two")
    agree(list(b.values()), list(a.values()))
    assert not same(a, weights("t"))
