"""
Does a run survive? Small runs killed with SIGKILL at random moments, on a full disk, in a folder they cannot
write to, and split over processes in three ways; then 350 malformed inputs. `make faults`, 10 minutes on 2
CPU cores; exit code 1 if anything was lost.

    python -m tests.faults [--kills 30] [--seed 0]

A third of the kills come while a checkpoint is being written, and hit every process; the others a worker or
torchrun itself, in turn.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.dataset import write_dataset
from run import checkpoint
from run.cli import load_config

ROOT = Path(checkpoint.__file__).parents[1]
STEPS, KILLS_A_RUN = 150, 3
FLAGS = [
    "--dataset=toy",
    "--seq_len=32",
    "--block_sizes=1:0.25,16:0.75",
    "--n_layers=2",
    "--n_heads=2",
    "--d_model=96",
    "--warmup=5",
]
FLAGS += [
    f"--max_steps={STEPS}",
    "--eval_every=3",
    "--n_eval=4",
    "--n_samples=0",
    "--log_every=1",
    "--device=cpu",
    "--timeout=60",
]
FLAGS += ["--lr_schedule=constant"]  # others depend on max_steps


@dataclass
class FaultConfig:
    kills: int = 30  # of each kind of run: one process, two processes
    seed: int = 0  # of the moments


def command(out_dir, world, *flags, float64=False):
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    )
    train = [str(ROOT / "tests" / "in_float64.py")] * float64 + [str(ROOT / "train.py")]
    return [
        sys.executable,
        *torchrun,
        *train,
        *FLAGS,
        f"--batch_size={8 // world}",
        f"--out_dir={out_dir}",
        *flags,
    ]


def start(out_dir, world, *flags):
    log = open(f"{out_dir}.txt", "ab")
    return subprocess.Popen(command(out_dir, world, *flags), stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def processes(out_dir):
    """pids of everything that runs with this --out_dir."""
    found = {}
    if Path("/proc/self/cmdline").exists():  # Linux, where a small container may have no ps
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended by now
                found[int(path.parent.name)] = path.read_bytes().decode(errors="replace").split("\0")
    else:
        lines = subprocess.run(
            ["ps", "-axo", "pid=,command="], capture_output=True, text=True
        ).stdout.splitlines()
        found = {int(pid): words for pid, *words in map(str.split, lines)}
    return [pid for pid, words in found.items() if f"--out_dir={out_dir}" in words]


def wait_for_all(out_dir, seconds=60):
    end = time.time() + seconds
    while left := processes(out_dir):
        if time.time() > end:
            return left
        time.sleep(0.05)
    return []


def parts(out_dir):
    """
    What must be bit for bit the same: weights, EMA, optimizer; the log but for times and memory; which one is
    the best.
    """
    state = torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)
    tensors = {(part, k): v for part in ("model", "ema") for k, v in state[part].items()}
    tensors |= {("optimizer", i, k): v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
    lines = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in r.items() if k not in ("ms", "peak_mb")} for r in lines]
    best = torch.load(Path(out_dir) / "best.pt", weights_only=True)["step"]
    return tensors, (lines, state["step"], state["skipped"], best)


def same(a, b):
    (x, more_x), (y, more_y) = parts(a), parts(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) and more_x == more_y


def newest(out_dir):
    """
    The step of the newest checkpoint, -1 without one. Every file must be whole: SIGKILL damages nothing.
    """
    files = [f for f in Path(out_dir).glob("*.pt")]
    for file in files:
        checkpoint.read(file)
    return checkpoint.load(out_dir)["step"] if files else -1


def killed_run(name, world, seconds, kills, seed):
    """
    One run, killed up to `kills` times and resumed as often, to its end; seconds: how long one takes that is
    let alone.
    Returns (kills, those while a checkpoint was being written, what went wrong).
    """
    draw, wrong, hits, writing, before = random.Random(seed), [], 0, 0, -1
    while True:
        run = start(name, world, *["--resume"] * (before >= 0 or checkpoint.begun(name)))
        moment, in_writing = time.time() + draw.random() * seconds, (seed + hits) % 3 == 0
        while hits < kills and run.poll() is None and time.time() < moment:
            time.sleep(0.005)
        workers = [p for p in processes(name) if p != run.pid]
        victims = [draw.choice(workers)] if workers and (seed + hits) % 3 == 1 else [run.pid]
        if in_writing:
            victims = [*workers, run.pid]  # as when the power fails
            while hits < kills and run.poll() is None and not list(Path(name).glob("*.pt.tmp")):
                pass
        if hits == kills or run.poll() is not None:
            if run.wait(120) != 0:
                wrong.append(f"{name}: exit code {run.returncode}, see {name}.txt")
            break
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, 9)
        run.wait(120)
        if left := wait_for_all(name):
            wrong.append(f"{name}: {len(left)} processes are left after SIGKILL")
        hits += 1
        writing += bool(list(Path(name).glob("*.pt.tmp")))
        if (now := newest(name)) < before:
            wrong.append(f"{name}: a checkpoint was lost, the newest is of step {now}, it was of {before}")
        before = now
    if left := wait_for_all(name):
        wrong.append(f"{name}: {len(left)} processes are left at the end")
    if not wrong and not same(f"whole{world}", name):
        wrong.append(f"{name} is not bit for bit whole{world}")
    return hits, writing, wrong


def kills(world, n, seed):
    """
    n kills, three a run: a run that came to its end before the third was killed less often, and another one
    makes up for it.
    """
    began = time.time()
    assert start(f"whole{world}", world).wait(120) == 0, Path(f"whole{world}.txt").read_text()
    seconds = time.time() - began
    bar, runs, inside, wrong = tqdm(total=n, desc=f"kills of {world} process(es)", disable=None), 0, 0, []
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world)) as pool:
        while bar.n < n:
            many = [min(KILLS_A_RUN, n - bar.n - i) for i in range(0, n - bar.n, KILLS_A_RUN)]
            jobs = [
                pool.submit(killed_run, f"killed{world}_{runs + i}", world, seconds, k, seed + runs + i)
                for i, k in enumerate(many)
            ]
            runs += len(jobs)
            for job in jobs:
                hits, writing, problems = job.result()
                bar.n, inside, wrong = bar.n + hits, inside + writing, wrong + problems
                bar.refresh()
    bar.close()
    fine = f"{runs} runs of {STEPS} steps bit for bit as if never killed, no checkpoint lost, no process left"
    print(
        f"{n} kills of {world} process(es), {inside} inside the writing of a checkpoint: {'WRONG' if wrong else fine}",
        flush=True,
    )
    return wrong


def curves():
    """8 rows a step as 1 process x 4 accumulated, 2 x 2 and 4 x 1: one loss curve, in float64."""
    losses, wrong = {}, []
    for world in (1, 2, 4):
        name = f"split{world}"
        steps = ["--batch_size=2", f"--accumulation={4 // world}", "--max_steps=40", "--eval_every=20"]
        argv = command(name, world, *steps, float64=True)
        subprocess.run(argv, check=True, capture_output=True)
        losses[world] = np.array(
            [
                r["loss"]
                for r in map(json.loads, Path(name, "log.jsonl").read_text().splitlines())
                if "loss" in r
            ]
        )
    gap = max(np.abs(losses[1] - losses[world]).max() for world in (2, 4))
    if gap > 1e-9 or len(losses[1]) != 40:
        wrong.append(f"the loss curves of 1, 2 and 4 processes are up to {gap} apart")
    # sums of three are rounded by their order: it must not depend on where a run began
    for flags in ((), ("--fsdp",)):
        names = [f"three{len(flags)}", f"three{len(flags)}_stopped"]
        for name, *more in ((names[0],), (names[1], "--max_steps=20"), (names[1], "--resume")):
            argv = command(name, 3, "--batch_size=2", "--max_steps=40", "--eval_every=20", *flags, *more)
            subprocess.run(argv, check=True, capture_output=True)
        if not same(*names):
            wrong.append(f"3 processes {flags}, stopped and resumed, are not bit for bit one run")
    print(
        f"1 process x 4 accumulated, 2 x 2, 4 x 1: 40 losses at most {gap:.1e} apart, from {losses[1][0]:.3f} to {losses[1][-1]:.3f}"
    )
    return wrong


def full_disk():
    """
    A run on a disk of its own with room for a checkpoint and a half; then with more room; then read-only.
    """
    mount, wrong = Path("disk"), []
    mount.mkdir()
    size = Path("whole1/ckpt.pt").stat().st_size
    options = lambda n: f"size={n // 1024}k"
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options(6 * size), "tmpfs", mount], capture_output=True
    ).returncode:
        print(
            "full disk, read-only folder: not tried, it takes the right to mount (tests/test_checkpoint.py limits the size of files)"
        )
        return wrong
    try:
        go = lambda *flags: subprocess.run(command("disk/run", 1, *flags), capture_output=True, text=True)
        ballast = Path("disk/ballast")
        first = go("--max_steps=30")
        room = os.statvfs(mount)
        ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - size // 2))  # half a checkpoint fits
        full = go("--max_steps=60", "--resume")
        if (
            first.returncode
            or full.returncode != 2
            or "No space left on device" not in full.stderr
            or "Traceback" in full.stderr
        ):
            wrong.append(
                f"a full disk: exit codes {first.returncode} and {full.returncode}, {full.stderr[-300:]}"
            )
        if newest("disk/run") < 30:
            wrong.append("a full disk has cost a checkpoint")
        held = newest("disk/run")
        ballast.unlink()
        if (more := go("--resume")).returncode or not same("disk/run", "whole1"):
            wrong.append(f"after a full disk: exit code {more.returncode}, or another result")
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        read_only = go("--resume", "--max_steps=200")
        if read_only.returncode != 2 or len(read_only.stderr.splitlines()) != 2:
            wrong.append(f"a read-only folder: exit code {read_only.returncode}, {read_only.stderr[-300:]}")
        message = read_only.stderr.splitlines()[0]
    finally:
        subprocess.run(["umount", "-l", mount])
    fine = f"step {held} kept, exit code 2; with room again bit for bit as if it had never been full. Read-only: {message}"
    print(f"full disk: {'WRONG' if wrong else fine}")
    return wrong


def malformed():
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/test_malformed.py"),
    ]
    tried = subprocess.run(
        argv, cwd=ROOT, env={**os.environ, "EXAMPLES": "70"}, capture_output=True, text=True
    )
    print(
        "350 malformed inputs: "
        + ("exit code 0 or 2, two lines, nothing touched" if tried.returncode == 0 else tried.stdout[-2000:])
    )
    return ["malformed inputs"] * (tried.returncode != 0)


def main():
    cfg, began = load_config(FaultConfig, sys.argv[1:]), time.time()
    os.environ["OMP_NUM_THREADS"] = "1"
    home = tempfile.mkdtemp()
    os.chdir(home)
    Path("data/toy").mkdir(parents=True)
    stream = (np.arange(20000) + (np.random.default_rng(0).random(20000) < 0.1)) % 7
    write_dataset("data/toy", stream[:18000], stream[18000:], {"vocab_size": 7, "tokenizer": "none"})
    wrong = (
        kills(1, cfg.kills, cfg.seed) + kills(2, cfg.kills, cfg.seed) + curves() + full_disk() + malformed()
    )
    print(
        f"{(time.time() - began) / 60:.1f} minutes; " + ("all is well" if not wrong else f"look into {home}")
    )
    if wrong:
        raise SystemExit("\n".join(wrong))
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
