"""
Readers that go away, streams that were closed, Ctrl-C, and memory that should not grow: what happens to a
process of its own.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, run, slow

import train

ROOT = Path(__file__).parents[1]
RUN = [*TINY, "--dataset=toy", "--seq_len=8", "--block_sizes=1:0.5,4:0.5", "--out_dir=out/run"]


def shell(command, code=0):
    """What a line of bash prints; `python` is this one, and its scripts are the project's."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = command.replace("python ", f"{shlex.quote(sys.executable)} ").replace(" ROOT/", f" {ROOT}/")
    p = subprocess.run(["bash", "-c", line], capture_output=True, encoding="utf-8", env=env)
    assert p.returncode == code, f"exit {p.returncode}\n{p.stdout}{p.stderr}"
    return p.stdout + p.stderr


def steps_of(log):
    return [json.loads(line)["step"] for line in Path(log).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("script", slow(["train.py", "sample.py"], ["train.py"]))
def test_a_reader_who_has_seen_enough_is_left_in_peace(project, script):
    out = shell(f"set -o pipefail; python ROOT/{script} --help | head -n 1", code=128 + signal.SIGPIPE)
    assert len(out.splitlines()) == 1, out


@pytest.mark.parametrize("ending", slow(["2>&1 | head -n 1", "<&- >&- 2>&-"], ["<&- >&- 2>&-"]))
def test_a_run_goes_on_when_nobody_reads(project, ending):
    flags = " ".join(map(shlex.quote, [*RUN, "--max_steps=12", "--eval_every=4"]))
    out = shell(f"set -o pipefail; python ROOT/train.py {flags} {ending}")
    assert "Traceback" not in out and "Error" not in out
    assert steps_of("out/run/log.jsonl")[-1] == 12 and Path("out/run/ckpt.pt").exists()
    out = shell(f"python ROOT/sample.py --ckpt out/run --device cpu {ending.replace('head', 'tail')}")
    assert "Traceback" not in out


def test_ctrl_c_ends_a_command_without_a_traceback(project):
    run(train.main, *RUN, "--max_steps=1")
    argv = [sys.executable, ROOT / "sample.py", "--ckpt=out/run", "--n_samples=4000", "--device=cpu"]
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # a job behind nohup ignores it
    p = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", preexec_fn=heard
    )
    assert "cpu" in p.stdout.readline() and "sample 1" in p.stdout.readline()
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 128 + signal.SIGINT and not err.strip(), err


@pytest.mark.slow  # 600 steps, twice
@pytest.mark.parametrize("processes", [1, 2])
def test_memory_stays_where_it_was(project, processes):
    """
    Rows of five block sizes change the sizes of tensors at every step. Small things that stay from step to
    step, such as a graph of the average of the weights, then take the heap to pieces: 1.4 times as much by then.
    """
    start = "-m torch.distributed.run --standalone --nproc_per_node=2" if processes == 2 else ""
    sizes = "--block_sizes=1:0.2,2:0.2,4:0.2,8:0.2,16:0.2 --seq_len=64 --d_model=64 --batch_size=16"
    flags = f"{' '.join(TINY)} --dataset=toy --out_dir=out/run --max_steps=600 --log_every=10"
    shell(f"python {start} ROOT/train.py {flags} {sizes} --eval_every=600")
    peak = {r["step"]: r["peak_mb"] for r in map(json.loads, open("out/run/log.jsonl")) if "peak_mb" in r}
    assert peak[600] < 1.2 * peak[30], peak
