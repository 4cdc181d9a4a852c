"""
Why believe train.py, eval.py and checkpoint.py? The same step however it is split, the same run however often
it stops.
"""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import IN_FLOAT64, TINY
from exact import agree

import eval as evaluation
import train as training
from data.dataset import Dataset
from diffusion import Masked, Uniform, loglinear
from run import checkpoint
from run.cli import load_config
from run.restore import rebuild
from run.training import Run
from train import TrainConfig, learning_rate, step_batches

ROOT = Path(__file__).parents[1]


FLAGS = [*TINY, "--seq_len=8", "--dataset=toy", "--block_sizes=1:0.25,4:0.75", "--max_steps=6", "--warmup=2"]


def run(*flags):
    """train.py as a user calls it, in this process."""
    with patch.object(sys, "argv", ["train.py", *FLAGS, *flags]):
        training.main()


def log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def weights(out_dir):
    state = checkpoint.load(out_dir)
    return {f"{part}.{k}": v for part in ("model", "ema") for k, v in state[part].items()}


def same(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[k], b[k]) for k in a | b)


def test_the_average_of_the_weights_keeps_no_graph(project, monkeypatch):
    """Every step would add to it, and a long run would fill the memory."""
    seen, look = [], Run.look
    graph = lambda run: [p.grad_fn or p.requires_grad for p in run.ema.parameters()]
    monkeypatch.setattr(Run, "look", lambda run, *args: seen.append(any(graph(run))) or look(run, *args))
    run()
    assert seen == [False] * 6


def test_the_first_loss_is_log_V_and_it_falls(project, float64):
    run("--out_dir=a", "--max_steps=150", "--lr=0.01", "--warmup=5", "--batch_size=16")
    losses = [r["loss"] for r in log("a") if "loss" in r]
    # ce counts the visible tokens as free: AR rows cost log 3 in full, the others about half of it
    assert (
        abs(losses[0] - math.log(3) * (0.25 + 0.75 / 2)) < 0.1 and sum(losses[-10:]) / 10 < 0.75 * losses[0]
    )
    run("--out_dir=b", "--max_steps=1", "--block_sizes=1:1")
    assert abs(log("b")[0]["loss"] - math.log(3)) < 1e-9
    val = log("b")[-1]["val"]
    assert list(val) == ["1"] and 0.5 < val["1"] < 1.2


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--process=uniform"],
        ["--process=uniform", "--objective=elbo", "--time_conditioning=false"],
        ["--dropout=0.2"],
        ["--plain"],
        ["--plain", "--process=uniform", "--dropout=0.2"],
        ["--method=duo", "--objective=elbo", "--curriculum=4", "--tau=0.1"],
        ["--method=gidd", "--p_uniform=0.3"],
        ["--method=loopholing", "--self_cond_rate=0.5"],
    ],
)
def test_stop_and_resume_is_bit_for_bit_one_run(project, flags):
    run("--out_dir=whole", "--lr_schedule=cosine", *flags)
    run("--out_dir=parts", "--max_steps=3", "--lr_schedule=constant", *flags)
    run("--out_dir=whole_constant", "--lr_schedule=constant", *flags)
    run("--out_dir=parts", "--resume", "--lr_schedule=constant", *flags)
    assert same("parts", "whole_constant") and not same("parts", "whole")
    losses = [(r["step"], r["loss"]) for r in log("parts") if "loss" in r]
    assert losses == [(r["step"], r["loss"]) for r in log("whole_constant") if "loss" in r]


def test_accumulation_and_two_processes_take_the_same_steps(project, float64):
    """
    One process of 8 rows, one of 2 x 4, and torchrun with 2 processes of 4: equal losses and weights, in
    float64.
    """
    run("--out_dir=one", "--batch_size=8")
    run("--out_dir=two", "--batch_size=4", "--accumulation=2")
    flags = [*FLAGS, "--batch_size=4", "--out_dir=ranks"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        IN_FLOAT64,
        str(ROOT / "train.py"),
    ]
    p = subprocess.run([*torchrun, *flags], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    for other in ("two", "ranks"):
        for a, b in zip(log("one"), log(other), strict=True):
            assert a["step"] == b["step"] and ("loss" not in a or abs(a["loss"] - b["loss"]) < 1e-9), (
                f"{other}: {a} {b}"
            )
            assert all(abs(a["val"][size] - b["val"][size]) < 1e-9 for size in a.get("val", {})), (
                "each window once"
            )
        a, b = weights("one"), weights(other)
        agree([b[k] for k in a], list(a.values()))


def test_the_ranks_share_one_stratified_step(project):
    cfg = load_config(
        TrainConfig,
        ["--dataset=toy", "--seq_len=8", "--batch_size=5", "--accumulation=2", "--block_sizes=1:0.1,4:0.9"],
    )
    data = Dataset("toy", 8)
    for step in range(20):
        parts = [b for rank in range(2) for b in step_batches(cfg, data, step, rank, 2)]
        sizes = torch.cat([b[3] for b in parts])
        assert (sizes == 1).sum() == 2, "10 % of 20 rows, over ranks and accumulation, at every step"
        assert sorted(torch.cat([b[5] for b in parts]).tolist()) == list(range(20))


def test_prompts_carry_no_loss_and_uneven_answers_are_weighted_by_token(project, float64):
    run("--out_dir=a", "--dataset=pairs", "--seq_len=0", "--block_sizes=1:1", "--max_steps=1")
    assert abs(log("a")[0]["loss"] - math.log(4)) < 1e-9
    _, given, real = Dataset("pairs").windows("train", range(50))
    answer = real & ~given
    assert len(set(answer.sum(1).tolist())) > 2, "answers of several lengths"
    for flags in (
        ["--process=uniform", "--block_sizes=12:1"],
        ["--objective=elbo", "--block_sizes=1:0.5,4:0.5"],
    ):
        run("--out_dir=whole", "--dataset=pairs", "--seq_len=0", "--batch_size=8", *flags)
        run("--out_dir=split", "--dataset=pairs", "--seq_len=0", "--batch_size=2", "--accumulation=4", *flags)
        for a, b in zip(log("whole"), log("split"), strict=True):
            assert "loss" not in a or abs(a["loss"] - b["loss"]) < 1e-9, (
                "a mean over the tokens of the step, not a mean of means"
            )


@pytest.mark.slow
def test_a_compiled_step_equals_an_eager_one(project, float64, monkeypatch):
    """
    Tracing and autograd as with --compile; generating C++ for them would take a minute, so that part is left
    out.
    """
    run("--out_dir=eager", "--max_steps=2")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    run("--out_dir=compiled", "--max_steps=2", "--compile")
    a, b = (weights(d) for d in ("eager", "compiled"))
    agree([b[k] for k in a], list(a.values()))


@pytest.mark.parametrize("flags", [[], ["--process=uniform"], ["--process=uniform", "--plain"]])
def test_bfloat16_stays_close(project, flags):
    run("--out_dir=a", "--max_steps=4", *flags)
    run("--out_dir=b", "--max_steps=4", "--dtype=bfloat16", *flags)
    for a, b in zip(log("a"), log("b"), strict=True):
        assert "loss" not in a or abs(a["loss"] - b["loss"]) < 0.03
    assert all(v.dtype == torch.float32 for v in weights("b").values())


def test_learning_rates():
    cfg = load_config(TrainConfig, ["--lr=1", "--warmup=10", "--max_steps=110", "--lr_schedule=cosine"])
    assert [learning_rate(cfg, s) for s in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5])
    assert learning_rate(cfg, 109) < 1e-3
    cfg.lr_schedule = "constant"
    assert learning_rate(cfg, 109) == 1
    cfg.lr_schedule = "wsd"
    assert [learning_rate(cfg, s) for s in (50, 55, 82.5)] == pytest.approx([1, 1, 0.5])


def test_validation_reports_each_block_size_honestly(project):
    """
    A network that knows nothing: log V, and without error: however many masks are drawn, they cost log V in
    all.
    """
    data = Dataset("toy", 8)
    cfg = load_config(
        TrainConfig, [*TINY, "--dataset=toy", "--seq_len=8", "--block_sizes=1:0.5,4:0.25,8:0.25"]
    )
    cfg.fit(data)
    model, process = checkpoint.build(cfg, 3)
    model.double()
    cfg.n_eval = 390
    found = evaluation.likelihood(model, process, data, cfg.block_sizes, 390, n_mc=8)
    several = {b: evaluation.estimate(halves, found.tokens)[::2] for b, halves in found.nats.items()}
    # eight draws a window, and one, as in training
    for result in (several, evaluation.bounds(model, process, data, cfg)):
        assert list(result) == [1, 4, 8] and abs(result[1][0] - math.log(3)) < 1e-9
        for b in (4, 8):
            mean, error = result[b]
            assert abs(mean - math.log(3)) < 1e-9 and error < 1e-9
    assert isinstance(process, Masked) and loglinear(torch.tensor([0.25]))[0] == 0.75
    assert "block 1: 1.0986 +- 0.0000 nats/token | block 4: <= " in evaluation.show_bounds(result, process)
    assert "block 1: <= 1." in evaluation.show_bounds(result, Uniform(3)), (
        "random placeholders: a bound by Jensen"
    )


def test_an_earlier_run_is_kept(project):
    for seed in range(3):
        run("--out_dir=a", "--max_steps=1", f"--seed={seed}")
    run_of = ["best.pt", "ckpt.1.pt", "ckpt.pt", "log.jsonl"]
    assert sorted(p.name for p in Path("a").iterdir()) == sorted([*run_of, "earlier.1", "earlier.2", "lock"])
    for seed, folder in enumerate(("a/earlier.1", "a/earlier.2", "a")):
        assert (
            all((Path(folder) / name).exists() for name in run_of)
            and checkpoint.load(folder)["config"]["seed"] == seed
        )


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--dataset=none"], "none/meta.json not found"),
        (["--block_sizes=1:0.5,4:0.4"], "sum to 0.9"),
        (["--block_sizes=3:1"], "block size 3 does not divide seq_len 8"),
        (["--block_sizes=0:1"], "positive"),
        (["--block_sizes=4:-1,1:2"], "positive"),
        (["--block_sizes=4:ce"], "positive"),
        (["--objective=nll"], "nll"),
        (["--objective=2:elbo"], "2:elbo"),
        (["--objective=4:"], "4:"),
        (["--process=gauss"], "gauss"),
        (["--method=duo", "--soft_k=1"], "soft_k"),
        (["--method=duo", "--tau=nan"], "tau"),
        (["--method=duo", "--tau_end=-1"], "tau_end"),
        (["--method=duo", "--curriculum=-2"], "curriculum"),
        (["--method=duo", "--block_sizes=1:1"], "nothing to soften"),
        (["--process=uniform", "--tau=0.1"], "--method duo"),
        (["--process=duo"], "--method duo"),
        (["--method=duo", "--process=masked"], "uniform noise"),
        (["--method=dou"], "--method duo"),
        (["--method=gidd", "--tau=0.1"], "--method duo"),
        (["--method=gidd", "--p_uniform=1"], "p_uniform"),
        (["--method=loopholing", "--self_cond_rate=2"], "self_cond_rate"),
        (
            ["--process=uniform", "--block_sizes=2:0.5,4:0.5", "--objective=2:ce,4:elbo"],
            "a network predicts one",
        ),
        (["--random_ar"], "random_ar"),
        (["--d_model=30", "--n_heads=4"], "d_model 30"),
        (["--batch_size=0"], "batch_size is 0"),
        (["--device=tpu"], "tpu"),
        (["--seq_len=500"], "val.bin"),
        (["--seq_len=-1"], "how long"),
        (["--lr=-1"], "lr is -1"),
        (["--grad_clip=-1"], "grad_clip"),
        (["--ema=2"], "ema is 2"),
        (["--max_steps=0"], "max_steps"),
        (["--block_sizes=1:1", "--objective=typo"], "typo"),
        (["--predicts=loo", "--process=uniform"], "predicts"),
        (["--resume", "--out_dir=nowhere"], "no checkpoint"),
        (["--max_stesp=1"], "max_stesp"),
    ],
)
def test_slips(project, slip, flags, says):
    assert says in slip(run, *flags)


def test_resuming_another_network_is_refused(project, slip):
    run("--out_dir=a", "--max_steps=1")
    assert "n_layers 2, not 3" in slip(run, "--out_dir=a", "--resume", "--n_layers=3")
    # masked: the same network, another weighting
    run("--out_dir=a", "--max_steps=2", "--resume", "--objective=elbo")
    run("--out_dir=u", "--max_steps=1", "--process=uniform")
    err = slip(run, "--out_dir=u", "--resume", "--process=uniform", "--objective=elbo")
    assert "denoiser, not loo" in err and "--objective=ce" in err
    state = checkpoint.load("a")
    checkpoint.save("a", {**state, "config": {**state["config"], "n_heaps": 1}})
    assert "n_heaps" in slip(run, "--out_dir=a", "--resume")
    # a default would be a guess
    for key, says in (("n_layers", "no n_layers"), ("block_sizes", "no block_sizes")):
        checkpoint.save("a", {**state, "config": {k: v for k, v in state["config"].items() if k != key}})
        assert says in slip(run, "--out_dir=a", "--resume") and says in slip(rebuild, "a", "cpu")
    checkpoint.save(
        "a", {**state, "config": {k: v for k, v in state["config"].items() if k not in ("keep", "timeout")}}
    )
    rebuild("a", "cpu")  # what a network is does not hang on it
    moments = {
        **state["optimizer"]["state"],
        0: {**state["optimizer"]["state"][0], "exp_avg": torch.zeros(3, 3)},
    }
    checkpoint.save("a", {**state, "optimizer": {**state["optimizer"], "state": moments}})
    assert "parameter 0 has other moments" in slip(run, "--out_dir=a", "--resume", "--max_steps=3")
    checkpoint.save("a", {**state, "meta": {**state["meta"], "chars": "abd"}})
    assert "chars is not what" in slip(run, "--out_dir=a", "--resume")


def test_resuming_logs_no_step_twice(project):
    """Killed after step 5, with a checkpoint of step 3: steps 4 and 5 are taken again, and logged once."""
    run("--out_dir=a", "--max_steps=3", "--lr_schedule=constant")
    with open("a/log.jsonl", "a") as f:
        f.write('{"step": 4, "loss": 9.0}\n{"step": 5, "loss": 9.0}\n')
    run("--out_dir=a", "--resume", "--lr_schedule=constant")
    assert [r["step"] for r in log("a") if "loss" in r] == [1, 2, 3, 4, 5, 6] and all(
        r.get("loss", 0) < 9 for r in log("a")
    )


def test_a_damaged_or_hostile_checkpoint_is_refused(project, slip):
    run("--out_dir=a", "--max_steps=1")
    good = Path("a/ckpt.pt").read_bytes()
    for bad in (b"", good[: len(good) // 2], b"hello", good[:100] + b"\0" * 100 + good[200:]):
        Path("a/ckpt.pt").write_bytes(bad)
        assert "damaged" in slip(checkpoint.load, "a")
    for at in range(len(good) // 7, len(good), len(good) // 7):  # one bit, anywhere
        Path("a/ckpt.pt").write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        try:
            state = checkpoint.load("a")
        except SystemExit:
            continue
        Path("a/ckpt.pt").write_bytes(good)  # in the padding between records: harmless
        assert all(torch.equal(state["model"][k], v) for k, v in checkpoint.load("a")["model"].items())

    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("boom",)

    torch.save({"model": Bomb()}, "a/ckpt.pt")
    assert "damaged" in slip(checkpoint.load, "a") and not Path("boom").exists()
    torch.save({"model": {}}, "a/ckpt.pt")
    assert "lacks" in slip(checkpoint.load, "a")
    [Path("a", name).unlink() for name in ("ckpt.pt", "ckpt.1.pt", "best.pt")]
    assert "no checkpoint" in slip(checkpoint.load, "a")


def test_a_kill_while_saving_leaves_the_last_checkpoint(project, monkeypatch):
    run("--out_dir=a", "--max_steps=1")
    before = Path("a/ckpt.pt").read_bytes()

    def half(state, f):
        f.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save("a", {"step": 2})
    assert (
        Path("a/ckpt.pt").read_bytes() == before
        and checkpoint.load("a")["step"] == 1
        and not Path("a/ckpt.2.pt").exists()
    )


PEAKS = """
import torch
from run.machine import peak_mb

before = peak_mb(torch.device("cpu"))
held = torch.ones(int(before * 2**18))  # as many MB as the process ever took, besides what it takes now
print(before, peak_mb(torch.device("cpu")), held.numel())
"""


def test_peak_memory_counts_what_is_held_now():
    """In a process of its own: this one may have taken gigabytes."""
    out = subprocess.run(
        [sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    before, peak, _ = map(float, out.split())
    assert before + 50 < peak < 3 * before, out
