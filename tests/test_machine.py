"""
Why believe machine.py, and what train.py does with it? Signals, bad numbers, too little memory, several
processes.
"""

import copy
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import IN_FLOAT64, TINY
from exact import agree
from faults import processes
from test_checkpoint import steps_and_results
from test_train import log, run, same, weights

from data.dataset import Dataset
from methods import Learner
from run import checkpoint, machine
from run.cli import load_config
from run.restore import compare, rebuild
from train import TrainConfig, learning_rate, train

FLAGS = [
    *TINY,
    "--seq_len=8",
    "--dataset=toy",
    "--block_sizes=1:0.25,4:0.75",
    "--max_steps=6",
    "--warmup=2",
    "--lr_schedule=constant",
]


def run_with(loss_at, *flags):
    """A run whose loss at a step is loss_at(learner, step): what a method's file may say."""
    method = SimpleNamespace(Learner=type("Own", (Learner,), {"loss": loss_at}))
    train(load_config(TrainConfig, [*FLAGS, *flags]), method=method)


usual = Learner.loss


def at(number, act):
    """A loss_at that does `act(loss)` with the losses of step `number`, 0 the first."""

    def loss_at(learner, step):
        def loss(*args, **kw):
            total, each = learner.token_loss(*args, **kw)
            return (
                (act(total), each)
                if step in ({number} if isinstance(number, int) else number)
                else (total, each)
            )

        return loss

    return loss_at


# ----- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_signal_saves_and_ends_well_and_the_run_goes_on_as_if_nothing_was(project, capsys, name, step):
    run_with(usual, "--out_dir=whole", "--eval_every=4")
    before = signal.getsignal(signal.SIGTERM)
    run_with(
        at(step, lambda loss: (os.kill(os.getpid(), getattr(signal, name)), loss)[1]),
        "--out_dir=a",
        "--eval_every=4",
    )
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.load("a")["step"] == step + 1, "the step is finished, and no other is begun"
    if step < 5:
        assert f"{name}: stopped after step {step + 1}, saved; --resume goes on" in capsys.readouterr().out
    run_with(usual, "--out_dir=a", "--eval_every=4", "--resume")
    assert same("a", "whole") and steps_and_results("a") == steps_and_results("whole")


def test_a_signal_before_the_first_step_touches_nothing(project, monkeypatch):
    run_with(usual, "--out_dir=a")
    before = {p: p.read_bytes() for p in Path("a").iterdir()}
    monkeypatch.setattr(machine.Signals, "name", "SIGTERM")
    run_with(usual, "--out_dir=a")
    assert {p: p.read_bytes() for p in Path("a").iterdir()} == before


def test_a_signal_during_a_validation_does_not_wait_for_its_end(project, monkeypatch, capsys):
    run_with(usual, "--out_dir=whole", "--eval_every=3")
    with monkeypatch.context() as m:
        m.setattr(
            "train.bounds", lambda *_, **__: (os.kill(os.getpid(), signal.SIGTERM), pytest.fail("it went on"))
        )
        run_with(usual, "--out_dir=a", "--eval_every=3")
    assert "SIGTERM: stopped after step 3, saved" in capsys.readouterr().out
    run_with(usual, "--out_dir=a", "--eval_every=3", "--resume")
    assert same("a", "whole") and steps_and_results("a") == steps_and_results("whole")


def test_a_second_signal_does_not_hit_the_clearing_up():
    with machine.Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.name == "SIGTERM"
        signals.at_once = True
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signals.name == "SIGINT"


def test_a_lost_terminal_is_heard_unless_that_is_to_be_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        # the second as under nohup
        for handler, heard in ((signal.SIG_DFL, "SIGHUP"), (signal.SIG_IGN, None)):
            signal.signal(signal.SIGHUP, handler)
            with machine.Signals() as signals:
                os.kill(os.getpid(), signal.SIGHUP)
            assert signals.name == heard and signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


# ----- numbers that are not finite


@pytest.mark.parametrize(
    "bad", [lambda loss: loss * math.nan, lambda loss: loss * math.inf, lambda loss: loss + math.inf]
)
def test_a_step_that_is_not_finite_is_skipped_and_counted(project, bad):
    """The last of the three has a gradient that is finite."""
    run_with(at({2, 4}, bad), "--out_dir=a", "--eval_every=1", "--keep=9", "--ema=0")
    assert [r["skipped"] for r in log("a") if "loss" in r] == [0, 0, 1, 1, 2, 2]
    assert (
        [r["step"] for r in log("a") if "val" in r]
        == [1, 2, 4, 6]
        == [checkpoint.step_of(f) for f in checkpoint.numbered("a")[::-1]]
    )
    state = checkpoint.load("a")
    assert state["skipped"] == [2, 0] and all(s["step"] == 4 for s in state["optimizer"]["state"].values()), (
        "Adam counts what it has taken"
    )
    assert all(v.isfinite().all() for v in weights("a").values())
    run_with(at({2, 4}, bad), "--out_dir=b", "--max_steps=3", "--eval_every=2", "--ema=0")
    run_with(at({2, 4}, bad), "--out_dir=b", "--resume", "--eval_every=1", "--ema=0")
    assert same("a", "b")


def test_a_skipped_step_changes_no_weight(project):
    """
    At step 3 of one run the gradient is not finite; another run stops before it: the weights are the same.
    """
    weights_at = {}

    def spy(learner, step):
        weights_at[step] = {k: v.clone() for k, v in learner.model.state_dict().items()}
        return at({3}, lambda loss: loss * math.nan)(learner, step)

    run_with(spy, "--out_dir=a")
    assert all(torch.equal(weights_at[4][k], v) for k, v in weights_at[3].items())
    assert not all(torch.equal(weights_at[5][k], v) for k, v in weights_at[4].items())


def test_too_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(project, slip):
    nan = lambda loss: loss * math.nan
    err = slip(run_with, at({2, 3, 4, 5}, nan), "--out_dir=a", "--bad_steps=3", "--eval_every=1")
    assert (
        "3 steps in a row, up to step 5" in err
        and "the last good checkpoint is a/ckpt.2.pt" in err
        and "--resume --lr=" in err
    )
    assert checkpoint.load("a")["step"] == 2
    assert "there is no good checkpoint" in slip(
        run_with, at(set(range(6)), nan), "--out_dir=b", "--bad_steps=3"
    )
    run_with(at({1, 2, 4}, nan), "--out_dir=c", "--bad_steps=3")  # never three in a row


def test_a_run_that_learned_nothing_says_so(project, slip):
    nan = lambda loss: loss * math.nan
    err = slip(run_with, at(set(range(6)), nan), "--out_dir=a", "--bad_steps=100")
    assert "none of 6 steps" in err and "--lr=" in err
    run_with(at({0, 1, 2, 3, 4}, nan), "--out_dir=b", "--bad_steps=100")  # one step was taken


@pytest.mark.parametrize("eval_every", [1, 100])
def test_a_learning_rate_beyond_reason_ends_in_two_lines(project, slip, eval_every):
    err = slip(
        run, "--out_dir=a", "--lr=1e30", "--max_steps=40", f"--eval_every={eval_every}", "--bad_steps=4"
    )
    assert "no finite gradient" in err and "no good checkpoint" in err


def test_a_checkpoint_of_ruined_weights_is_no_good_one(project, slip, monkeypatch, capsys):
    """
    Step 4 takes a step beyond reason, and is saved before anyone can know: --resume begins with the one
    before.
    """
    run_with(usual, "--out_dir=whole", "--eval_every=1", "--keep=1")
    with monkeypatch.context() as m:
        rate = lambda cfg, step: 1e30 if step == 3 else learning_rate(cfg, step)
        m.setattr("train.learning_rate", rate)
        err = slip(run_with, usual, "--out_dir=a", "--eval_every=1", "--keep=1", "--bad_steps=2")
    assert (
        "the last good checkpoint is a/ckpt.3.pt" in err
        and Path("a/ckpt.4.pt.ruined").exists()
        and checkpoint.load("a")["step"] == 3
    )
    os.makedirs("b")
    shutil.copy("a/ckpt.4.pt.ruined", "b/ckpt.pt")
    assert "the network has diverged" in slip(rebuild, "b", "cpu")
    run_with(usual, "--out_dir=a", "--eval_every=1", "--keep=1", "--resume")
    assert same("a", "whole") and steps_and_results("a") == steps_and_results("whole")


# ----- memory


def test_out_of_memory_names_the_flag(project, slip, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    err = slip(run_with, lambda *_: full, "--out_dir=a")
    assert "out of memory: OutOfMemoryError: CUDA" in err and "--batch_size=2 --accumulation=2" in err
    assert "--seq_len" in slip(run_with, lambda *_: full, "--out_dir=a", "--batch_size=1")
    assert "take 894 GB" in slip(run, "--out_dir=a", "--d_model=100000", "--n_heads=2"), (
        "before anything is allocated"
    )
    if sys.platform == "linux":
        monkeypatch.setattr(machine, "has_memory", lambda _: 1 << 30)
        err = slip(run, "--out_dir=a", "--batch_size=30000", "--d_model=256", "--n_layers=1")
        assert "out of memory" in err and "--batch_size=15000 --accumulation=2" in err, (
            "where Linux would kill without a word"
        )
    assert not list(Path("a").glob("*.pt"))


# ----- the data comes first


def test_the_dataset_is_looked_at_before_a_model_is_built(project, slip, monkeypatch):
    monkeypatch.setattr(checkpoint, "build", lambda *_: pytest.fail("a model was built"))
    good = Path("data/toy/train.bin").read_bytes()
    for bad in (good[:-1], good[:10], good[:100] + b"\xff\xff" + good[102:], b""):
        Path("data/toy/train.bin").write_bytes(bad)
        assert "data/toy/train.bin" in slip(run, "--out_dir=a")
    Path("data/toy/train.bin").unlink()
    Path("data/toy/train.bin").mkdir()
    assert "data/toy/train.bin" in slip(run, "--out_dir=a")


def test_one_batch_is_learnt_by_heart(project):
    """Four rows of eight tokens: what cannot be learnt is which row it is, log(4) / 8 nats a token."""
    flags = (
        "--max_steps=150",
        "--lr=0.01",
        "--warmup=5",
        "--block_sizes=1:1",
        "--log_every=150",
        "--d_model=32",
    )
    run("--out_dir=a", "--overfit", *flags)
    run("--out_dir=b", *flags)
    a, b = (next(r["loss"] for r in log(d) if "loss" in r) for d in "ab")
    assert abs(a - math.log(4) / 8) < 0.005 and b > 0.3


# ----- several processes


def torchrun(n, *flags, code=0, script=()):
    """script: what is to run train.py, if not Python alone."""
    script = [*script, str(Path(__file__).parents[1] / "train.py")]
    p = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *script, *FLAGS, *flags],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert p.returncode == code, p.stderr
    return p.stdout + p.stderr


@pytest.mark.slow  # two processes, several times
def test_fsdp_takes_the_same_steps_and_its_checkpoints_load_anywhere(project, float64):
    """
    Two processes with a share of the weights each; then one process goes on where they stopped, and the other
    way round. In float64.
    """
    run_with(usual, "--out_dir=one", "--batch_size=8", "--eval_every=3")
    two = ["--out_dir=two", "--fsdp", "--accumulation=2", "--batch_size=2", "--eval_every=3", "--max_steps=4"]
    out = torchrun(2, *two, script=[IN_FLOAT64])
    assert "2 processes by FSDP" in out
    state = checkpoint.load("two")
    assert all(type(v) is torch.Tensor for v in state["model"].values()) and state["optimizer"]["state"][0][
        "exp_avg"
    ].shape == (4, 16)
    run_with(usual, "--out_dir=two", "--resume", "--batch_size=2", "--accumulation=2", "--eval_every=3")
    state = checkpoint.load("two")
    assert state["config"]["accumulation"] == 4 and state["given"] == [2, 2] and state["rows"] == 8, (
        "the rows of a step stay as they were"
    )
    a, b = weights("one"), weights("two")
    # --resume rounds Adam's moments to float32: its two steps are off by that
    agree([b[k] for k in a], list(a.values()), 1e-7)
    a, b = (
        {(r["step"], kind): r[kind] for r in log(d) for kind in ("loss", "val") if kind in r}
        for d in ("one", "two")
    )
    assert len(a) == 8 and set(b) - set(a) == {(4, "val")}
    assert all(abs(a[step, "loss"] - b[step, "loss"]) < 1e-9 for step in range(1, 7))
    assert all(
        abs(a[step, "val"][size] - b[step, "val"][size]) < 1e-9 for step in (3, 6) for size in ("1", "4")
    )


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_bit_for_bit(project):
    """SIGTERM to one of two: both finish the step, one saves, all end with 0."""
    more = [
        "--batch_size=2",
        "--max_steps=100000",
        "--eval_every=100000",
        "--timeout=60",
        "--out_dir=stopped",
    ]
    script = str(Path(__file__).parents[1] / "train.py")
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        script,
        *FLAGS,
        *more,
    ]
    with open("said.txt", "w") as said:
        p = subprocess.Popen(argv, stdout=said, stderr=said)
        try:
            end = time.time() + 60
            while time.time() < end and not (Path("stopped/log.jsonl").exists() and len(log("stopped")) >= 5):
                time.sleep(0.05)
            os.kill(next(pid for pid in processes("stopped") if pid != p.pid), signal.SIGTERM)
            assert p.wait(60) == 0, Path("said.txt").read_text()
        finally:
            p.kill()
    step = checkpoint.load("stopped")["step"]
    assert f"stopped after step {step}, saved" in Path("said.txt").read_text() and step >= 5
    steps = ["--batch_size=2", f"--max_steps={step + 10}", f"--eval_every={step + 5}"]
    torchrun(2, "--out_dir=stopped", "--resume", *steps)
    torchrun(2, "--out_dir=whole", *steps)
    assert same("stopped", "whole") and steps_and_results("stopped") == steps_and_results("whole")


def test_gradients_are_exchanged_once_a_step(project):
    """
    However many forwards a step accumulates: each bucket goes round once, and the sum is that of one process
    without DDP.
    """
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    try:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).double()
        alone, x, rounds = copy.deepcopy(model), torch.randn(4, 5, 3).double(), []

        def hook(_, bucket):
            rounds.append(bucket.index())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        forward = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        forward.register_comm_hook(None, hook)
        for k in range(4):
            with machine.without_sync(forward) if k < 3 else torch.enable_grad():
                forward(x[k]).square().sum().backward()
            alone(x[k]).square().sum().backward()
        assert rounds == [0]
        agree(model.weight.grad, alone.weight.grad)
        assert machine.total(3, 1.5) == [3, 1.5] and machine.total(2, op="MAX") == [2]
    finally:
        forward = None
        dist.destroy_process_group()


def test_another_number_of_processes_keeps_the_rows_of_a_step(project, slip):
    run("--out_dir=a", "--batch_size=4", "--accumulation=3")
    state, data = checkpoint.load("a"), Dataset("toy", 8)
    flags = [
        *TINY,
        "--seq_len=8",
        "--dataset=toy",
        "--block_sizes=1:0.25,4:0.75",
        "--warmup=2",
        "--max_steps=6",
        "--accumulation=3",
    ]

    def settle(world, *more):
        cfg, said = load_config(TrainConfig, [*flags, *more]), []
        cfg.fit(data)
        compare(state, cfg, None, None, data, world, said.append)
        return cfg.batch_size, cfg.accumulation, " | ".join(said)

    assert settle(1)[:2] == (4, 3)
    for world, rows in ((2, (3, 2)), (3, (4, 1)), (4, (3, 1)), (6, (2, 1)), (12, (1, 1))):
        batch_size, accumulation, said = settle(world)
        assert (
            (batch_size, accumulation) == rows
            and "keep the 12 rows of a step" in said
            and "rows of a step 12" not in said
        )
    # as it stands in the checkpoint after that: the same words mean the same
    state["config"] |= {"batch_size": 3, "accumulation": 2}
    assert settle(2)[:2] == (3, 2) and settle(1)[:2] == (4, 3) and settle(4)[:2] == (3, 1)
    assert "rows of a step 12 -> 16" in settle(1, "--batch_size=16", "--accumulation=1")[2]
    assert "--nproc_per_node=4" in slip(settle, 5)


def test_fsdp_wants_several_processes(project, slip):
    assert "torchrun" in slip(run, "--out_dir=a", "--fsdp")


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("device, inside", [("cpu", "highest"), ("cuda", "high")])
def test_a_mixed_forward_reads_tf32_on_a_gpu_and_leaves_the_setting_as_it_was(device, inside):
    with pytest.raises(ZeroDivisionError):
        with machine.mixed(torch.device(device), torch.bfloat16):
            assert torch.get_float32_matmul_precision() == inside
            assert device == "cuda" or torch.is_autocast_enabled("cpu")
            raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
    with machine.mixed(torch.device(device), torch.float32):
        assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled(device)
