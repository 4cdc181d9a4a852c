"""
Would it run on a GPU, and how often does the host wait for it there? On a device in name only, see
pretended.py. Kernels for CUDA and compiled attention are not reached: the device gets the PyTorch forms.
"""

import copy

import pytest
import torch
from conftest import slow
from exact import GENERATE, net, noise, on, speed
from pretended import AVAILABLE, Pretended, near
from test_recorded import on_tape

import diffusion as d
import fast
import fast.network
import train
from fast.graphs import Recorded
from methods import distill, duo
from options import TrainConfig
from run import checkpoint
from samplers import SAMPLERS

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="an older torch")

V = 7
KINDS = {
    "masked": (d.Masked(V, V - 1), {}),
    "masked, timed": (d.Masked(V, V - 1), {"time_conditioning": True}),
    "uniform": (d.Uniform(V, "denoiser", ar_token=V), {"time_conditioning": True}),
    "uniform loo": (d.Uniform(V), {}),
}


def forms(waits):
    """Waits without those of the PyTorch forms of the kernels, which CUDA does not run."""
    return {why: n for why, n in waits.items() if not why[1].startswith(("kernels.py", "draws.py"))}


def test_the_device_refuses_what_a_gpu_would_and_notes_what_the_host_waits_for():
    with Pretended() as gpu:
        x = torch.arange(6.0).view(2, 3).to(gpu.device, non_blocking=True)
        y = (x + 1)[:, 1:].mul_(2)
        assert y.device == gpu.device and not y.is_cpu and not gpu.waits
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(2, 3)
        with pytest.raises(RuntimeError, match="two devices"):
            torch.ones(3)[x[0].long()]
        asks = (
            lambda: x.sum().item(),
            lambda: x[x > 2],
            lambda: x.nonzero(),
            lambda: x.cpu(),
            lambda: bool((x > 2).any()),
        )
        asks += (
            lambda: torch.ones(2).to(gpu.device),
            lambda: torch.tensor([1.0], device=gpu.device),
            lambda: x[torch.tensor([1])],
        )
        for n, ask in enumerate(asks):
            ask()
            assert gpu.waits.total() == n + 1, gpu.waits
        assert near(y).tolist() == [[4, 6], [10, 12]]


STEPS = [
    ("masked", "ce", {}),
    ("masked, timed", "elbo", {"given": True}),
    ("masked", "last", {}),
    ("uniform", "ce", {"given": True}),
    ("uniform", "elbo", {}),
    ("uniform loo", "ce_noisy", {}),
    ("uniform loo", {4: "elbo", 8: "ce_noisy"}, {}),
    ("uniform", "ce", {"relaxation": 3}),
    ("uniform", "ce", {"relaxation": 0}),
]


@pytest.mark.parametrize("path", ["lesson", "fast"])
@pytest.mark.parametrize("kind, objective, how", STEPS)
def test_a_training_step_is_the_same_there_and_no_one_waits(kind, objective, how, path):
    """Of the lesson: that it runs there. It may wait."""
    process, settings = KINDS[kind]
    model, x0 = (
        net(process, seq_len=8, **settings),
        torch.randint(V - 1, (5, 8), generator=torch.Generator().manual_seed(0)),
    )
    sizes, t = torch.tensor([1, 4, 8, 4, 8]), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    given = torch.arange(8).expand(5, 8) < 3 if "given" in how else None
    relaxation = duo.Relaxation(process, 0.1, how["relaxation"]) if "relaxation" in how else None
    model = model.double() if relaxation is None else model  # soft tokens are float32
    token_loss = fast.token_loss if path == "fast" else d.token_loss
    model, process = on(path, model, process)

    def step(model, device):
        numbers = noise(5, 8)
        more = {"noise": numbers, "device": device, "corrupt": relaxation}
        total, each = token_loss(model, process, x0, sizes, t, objective, given, **more)
        total.backward()
        return [total.detach(), each, *(p.grad for p in model.parameters())]

    want = step(copy.deepcopy(model), None)
    with Pretended() as gpu:
        model.to(gpu.device)
        gpu.waits.clear()
        got = step(model, gpu.device)
        waits = forms(gpu.waits)
    for a, b in zip(want, got, strict=True):
        off = 0.0 if a is None and b is None else ((a - near(b)).norm() / a.norm().clamp(min=1e-30)).item()
        assert off < (1e-9 if relaxation is None else 1e-4)
    assert path == "lesson" or relaxation is not None or not waits, waits


# A path is looked for token by token, in a table; states that are guessed, and parts, are blocks of their own. How
# far drafts go is one more question.
ASKS = {
    "diffuspec": 4,
    "dynamic_blocks": 10,
    "freedave": 5,
    "idlm": 3,
}  # a pass; other samplers at most twice


@pytest.mark.slow
@pytest.mark.parametrize("path", ["lesson", "fast"])
@pytest.mark.parametrize("kind", ["masked, timed", "uniform", "uniform loo"])
def test_every_sampler_writes_the_same_there_and_waits_seldom(kind, path):
    """Of the lesson: that it runs there. It may wait."""
    process, settings = KINDS[kind]
    # in float32 a tie of two scores may fall either way
    model = net(process, seq_len=16, **settings).double()
    model, process = on(path, model, process)
    generate = GENERATE[path]
    for name, sampler in SAMPLERS.items():
        unfit = "redraws" if process.absorbing else "absorbing"
        if unfit in sampler.needs or sampler.__module__.startswith("methods"):
            continue
        how = {"block_size": 1 if name == "ar" else 4, "sampler": sampler, "max_new_tokens": 7}
        how |= {"eos_id": 0, "seed": 3}
        how |= {} if "own pace" in sampler.needs else {"steps": 2}
        prompts = [(1, 2), (4,), (3, 4, 5, 1, 2)]
        *_, want = generate(model, process, prompts, **how)
        with Pretended() as gpu:
            there = copy.deepcopy(model).to(gpu.device)
            gpu.waits.clear()
            *states, got = generate(there, process, prompts, **how)
            waits = forms(gpu.waits)
        assert torch.equal(want.x, near(got.x)), name
        assert (want.nfe, want.nfe_rows.tolist()) == (got.nfe, got.nfe_rows.tolist()), name
        blocks = sum(s.finished for s in states)
        # of a pass: which rows or tokens it is about, and whether any are left; of a block: where rows end
        few = sum(waits.values()) <= ASKS.get(name, 2) * got.nfe + 3 * blocks + 3
        assert path == "lesson" or few, f"{name}: {got.nfe} passes, {blocks} blocks, {waits}"


RUNS = {
    "masked": {"block_sizes": {1: 0.25, 4: 0.75}, "accumulation": 2},
    "prompts": {"dataset": "pairs", "seq_len": 0, "block_sizes": {1: 0.5, 6: 0.5}, "process": "uniform"},
    "duo": {"block_sizes": {1: 0.25, 4: 0.75}, "process": "uniform", "method": "duo", "objective": "elbo"},
    "lesson": {"block_sizes": {1: 0.25, 4: 0.75}, "process": "uniform", "plain": True},
    "next token": {"dataset": "pairs", "seq_len": 0, "block_sizes": {1: 1.0}, "next_token": True},
    "full": {"block_sizes": {8: 1.0}, "clean_causal": False, "objective": "elbo"},
}


@pytest.fixture
def run(project, monkeypatch):
    """run(out, device, **settings): the log of a training run on the device, times aside."""

    def run(out, device, **more):
        settings = {
            "dataset": "toy",
            "seq_len": 8,
            "max_steps": 4,
            "lr_schedule": "constant",
            "dtype": "float32",
            "device": "cpu",
        }
        settings |= {
            "n_layers": 1,
            "n_heads": 2,
            "d_model": 16,
            "batch_size": 4,
            "n_eval": 8,
            "n_samples": 1,
            "eval_every": 2,
            "log_every": 1,
        }
        monkeypatch.setattr(train, "pick_device", lambda name: (device, "pretended"))
        cfg = TrainConfig(**{**settings, "out_dir": out, **more})
        train.train(cfg, *((duo.Settings(curriculum=2), duo) if cfg.method else ()))
        return [
            {k: v for k, v in line.items() if k not in ("ms", "peak_mb")} for line in checkpoint.logged(out)
        ]

    return run


@pytest.mark.parametrize("name", slow(RUNS, ["masked", "duo"]))
def test_a_run_there_is_the_run_here(run, name):
    """Training, validation, samples, checkpoints and --resume: the log is the same to rounding."""
    want = run("out/here", torch.device("cpu"), **RUNS[name])
    with Pretended() as gpu:
        run("out/there", gpu.device, **RUNS[name], max_steps=2)
        got = run("out/there", gpu.device, **RUNS[name], resume=True)
    assert [line.keys() for line in got] == [line.keys() for line in want]
    for a, b in zip(want, got, strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-3) for k in a), (a, b)


def test_the_loop_waits_when_it_logs_and_not_before(run):
    """Steps between two lines of the log ask the device nothing: a run of three more has no more waits."""
    waits, seldom = [], {"eval_every": 9, "log_every": 9, "n_samples": 0, "block_sizes": {1: 0.25, 4: 0.75}}
    for steps in (2, 5):
        with Pretended() as gpu:
            run(f"out/{steps}", gpu.device, max_steps=steps, process="uniform", accumulation=2, **seldom)
        waits.append(forms(gpu.waits))
    assert waits[0] and waits[0] == waits[1]


@pytest.mark.parametrize("kind", ["masked, timed", "uniform"])
def test_distillation_there(kind):
    """The losses of SDTT and DCD."""
    process, settings = KINDS[kind]
    model, process = speed(net(process, seq_len=8, **settings).double(), process)
    x0 = torch.randint(V - 1, (4, 8), generator=torch.Generator().manual_seed(0))
    all_of_it = torch.ones(4, 8, dtype=torch.bool)
    sizes, t = torch.tensor([1, 4, 8, 4]), torch.linspace(0.2, 0.8, 4, dtype=torch.float64)

    def loss(device=None):
        how = (~all_of_it, all_of_it, d.loglinear, 0, noise(4, 8), device)
        return distill.distill_loss(model, process, x0, sizes, t, None, *how, teacher=model, dt=0.1)[0]

    want = loss()
    with Pretended() as gpu:
        model.to(gpu.device)
        assert torch.allclose(want, near(loss(gpu.device)), rtol=1e-9)


def test_recorded_passes_there():
    """The same texts from a tape of the device's operations."""
    process, settings = KINDS["masked, timed"]
    model, process = speed(net(process, seq_len=16, **settings).double(), process)
    generate, how = GENERATE["fast"], {"block_size": 4, "sampler": SAMPLERS["arpc"], "seed": 1}
    *_, want = generate(model, process, [(1, 2), (3,)], **how)
    with Pretended() as gpu, pytest.MonkeyPatch.context() as patch:
        tapes = []
        patch.setattr(
            fast.network, "Recorded", lambda model: tapes.append(Recorded(model, on_tape)) or tapes[0]
        )
        there = copy.deepcopy(model).to(gpu.device)
        there.graphs = True
        *_, got = generate(there, process, [(1, 2), (3,)], **how)
    assert torch.equal(want.x, near(got.x)) and tapes[0].works and tapes[0].kinds
    inputs = [x for kind, *_ in tapes[0].kinds.values() for x in kind]
    assert inputs and all(x.device == gpu.device for x in inputs), "a recording reads nothing of the host's"


def test_prompts_may_lie_there():
    process, settings = KINDS["masked"]
    model, process = speed(net(process, seq_len=16, **settings).double(), process)
    generate, how = GENERATE["fast"], {"block_size": 4, "seed": 1}
    prompts = torch.tensor([[1, 2], [0, 1]])
    *_, want = generate(model, process, prompts, **how)
    with Pretended() as gpu:
        *_, got = generate(copy.deepcopy(model).to(gpu.device), process, prompts.to(gpu.device), **how)
    assert torch.equal(want.x, near(got.x))
