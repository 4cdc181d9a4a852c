"""
Is it still the same code? Checkpoints of commit 9f09ba6, before the lesson and fast/ were parted: they load,
write the same texts in as many passes, have the same losses, and training goes on from them as it went on
then. tests/before/README.md says what was recorded.

One thing is meant to differ. Padding in the block in which a text ends was shown clean then, and is noised
and charged now. Datasets with padding are compared with clean_padding, which is what was done then.
"""

import json
import lzma
import math
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import slow

import fast
import methods
from data.dataset import Dataset, charged_tokens, first_charged
from diffusion import SCHEDULES
from eval import likelihood
from fast.block import generate
from methods.distill import distill_loss
from methods.duo import Relaxation
from options import TrainConfig
from rng import Noise, stratified_draw
from run import checkpoint
from run.restore import rebuild
from samplers import SAMPLERS
from train import train

FROZEN = Path(__file__).parent / "before" / "frozen.tar.xz"
NAMES = "masked uniform uniform_loo duo masked_eos next_token block_causal sdtt".split()
NAMES += "net_absorb net_uniform net_mdlm net_duo net_clean".split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """The folder of what was recorded."""
    folder = tmp_path_factory.mktemp("before")
    with lzma.open(FROZEN) as file, tarfile.open(fileobj=file) as archive:
        archive.extractall(folder, filter="data")
    return folder


def recorded(frozen, what):
    return json.loads((frozen / f"{what}.json").read_text())


def network(frozen, name):
    """
    (settings of the run, facts of its dataset, model in float64, process) on the fast path, as sample.py
    loads them.
    """
    run, meta, _, model, process = rebuild(frozen / f"{name}.pt", CPU)
    assert isinstance(model, fast.FastTransformer)
    return run, meta, model.double(), process


def test_every_recording_is_looked_at(frozen):
    texts, numbers, resume = (recorded(frozen, what) for what in ("texts", "numbers", "resume"))
    assert {file.stem for file in frozen.glob("*.pt")} == set(NAMES)
    assert set(texts) == set(numbers) == set(resume) == set(NAMES)
    asked = {sampler for runs in texts.values() for sampler in runs} - {"prompts"}
    assert len(asked) == 22
    assert sum(len(runs[s]) for runs in texts.values() for s in asked & set(runs)) == 1728


@pytest.mark.parametrize("name", slow(NAMES, ["net_mdlm"]))
def test_the_same_texts_in_the_same_passes(frozen, name):
    run, meta, model, process = network(frozen, name)
    runs, differ = recorded(frozen, "texts")[name], []
    prompts = runs.pop("prompts")
    usual = {"eos_id": meta.get("eos_id"), "schedule": SCHEDULES[run.schedule]}
    usual["trained"] = sorted(run.block_sizes)
    for sampler, by_options in runs.items():
        for options, want in by_options.items():
            how = {**usual, **json.loads(options), "sampler": SAMPLERS[sampler]}
            rows = prompts[how.pop("prompts", "own")]
            try:
                for state in generate(model, process, rows, **how):
                    pass
            except ValueError:
                found = {"refused": want.get("refused")}  # the words may be others
            else:
                found = {"texts": state.x.tolist(), "nfe": state.nfe, "nfe_rows": state.nfe_rows.tolist()}
                found["token_forwards"] = state.token_forwards
            if found != want:
                differ.append((sampler, options, found, want))
    assert not differ, f"{len(differ)} differ, now and then: {differ[:3]}"


def alike(found, want, near, where=""):
    """Nested dicts and lists of numbers, all but equal."""
    if isinstance(want, dict):
        assert set(found) == set(want), (where, set(found) ^ set(want))
        for k in want:
            alike(found[k], want[k], 1e-4 if "float32" in k else near, f"{where} {k}")
    elif isinstance(want, list):
        for i, (a, b) in enumerate(zip(found, want, strict=True)):
            alike(a, b, near, f"{where} [{i}]")
    else:
        assert math.isclose(found, want, rel_tol=near, abs_tol=near), f"{where}: {found}, and it was {want}"


@pytest.mark.parametrize("name", NAMES)
def test_the_same_likelihoods_losses_and_gradients(frozen, name, monkeypatch):
    """In float64, of which nine digits were kept; Duo's soft tokens are float32."""
    monkeypatch.chdir(frozen)
    run, meta, model, process = network(frozen, name)
    want, data = recorded(frozen, "numbers")[name], Dataset(run.dataset, run.seq_len)
    sizes, how = (
        sorted(run.block_sizes),
        {"n_eval": 8, "n_mc": 2, "seed": 0, "clean_padding": "pad_id" in meta},
    )
    nats = likelihood(model, process, data, sizes, **how).nats
    found = {str(b): halves.tolist() for b, halves in nats.items()}
    alike(found, want["likelihood"], 1e-8, "likelihood")

    x0, given, real = data.windows("val", data.spread("val", 6))
    given, charged = charged_tokens(given, real, 1, clean_padding=True)
    b, t = stratified_draw(run.block_sizes, 6, 3, 5)
    b, start = b if len(sizes) > 1 else sizes[0], first_charged(charged, max(sizes))

    def loss(of, objective, **more):
        noise = Noise(7, torch.arange(6), torch.arange(start, run.seq_len), 5)
        how = SCHEDULES[run.schedule], start, noise
        total, terms = of(model, process, x0, b, t, objective, given, charged, *how, **more)
        slopes = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        norm = sum(g.double().square().sum() for g in slopes if g is not None).sqrt()
        return {"total": total.item(), "grad_norm": norm.item(), "each": terms.tolist()}

    teacher = network(frozen, name)[2]
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1.1)
    soft = []
    for objective, recording in want["loss"].items():
        if objective.startswith("duo"):
            soft.append((objective, recording))
        elif objective == "distill":
            alike(loss(distill_loss, None, teacher=teacher, dt=0.125), recording, 1e-8, objective)
        else:
            learned = (run.objectives() or "ce") if objective == "own" else objective
            alike(loss(fast.token_loss, learned), recording, 1e-8, objective)
    model.float()
    for objective, recording in soft:
        relaxation = Relaxation(process, 0.1, int(objective.split()[2].rstrip(",")))
        alike(loss(fast.token_loss, "elbo", corrupt=relaxation), recording, 1e-4, objective)


@pytest.mark.parametrize("name", slow(NAMES, ["masked", "duo"]))
def test_a_run_goes_on_as_it_went_on(frozen, name, tmp_path, monkeypatch):
    """
    In this process, from the checkpoint's own settings: Duo in its curriculum, a distillation in its second
    round. Equal bit for bit on the machine of the recording. Weights moved by 1e-6 change a loss by less than
    2e-5, so other processors stay far within 1e-3.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(frozen / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").write_bytes((frozen / f"{name}.pt").read_bytes())
    state = checkpoint.load("out")
    changed = {"out_dir": "out", "resume": True, "clean_padding": "pad_id" in state["meta"]}
    cfg = TrainConfig(**{**state["config"], **changed})
    method = methods.load(cfg.method)
    train(cfg, method and methods.settings_of(method, state["method"]["settings"]), method)
    log = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    want = recorded(frozen, "resume")[name]
    steps = {str(r["step"]): [r["loss"], r["norm"]] for r in log if "loss" in r}
    assert list(steps) == list(want["steps"]) and state["step"] + 1 == int(next(iter(steps)))
    for step, pair in want["steps"].items():
        assert steps[step] == pytest.approx(pair, rel=1e-3), f"step {step}"
    for val, then in zip([r["val"] for r in log if "val" in r], want["val"].values(), strict=True):
        assert val == pytest.approx(then, rel=1e-3)
    assert checkpoint.load("out")["version"] == checkpoint.VERSION, "what it writes is of today"
