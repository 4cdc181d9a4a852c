"""Why believe the command lines? Every script as a user runs it, in a fresh copy of the project, for a few steps."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copy_project

import distill
import eval as evaluation
import sample
import train as training
from generate import SAMPLERS
from lab import bench, paper, plots
from model import Transformer
from run.cli import load_config
from sample import SampleConfig, load_with_sampler, options
from train import TrainConfig

ROOT = Path(__file__).parents[1]
SMALL = ["--max_steps=20", "--n_layers=2", "--d_model=32", "--batch_size=8", "--n_eval=8", "--device=cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("nanoblock")
    copy_project(home)
    call(home, "data/sudoku/prepare.py", "--n_train=500", "--n_val=50")
    call(home, "data/digits/prepare.py", "--n_train=500", "--n_val=50")
    for name, process in (("sudoku", "masked"), ("digits", "uniform")):
        out = call(home, "train.py", f"config/{name}.toml", "--out_dir", f"out/{name}", f"--process={process}", *SMALL)
        assert "losses and draws: PyTorch (Triton is for CUDA)" in out.splitlines()[0], "the first line says what runs, and why"
        assert "parameters" in out and "val step 20 | block 1: " in out and "sample:" in out
    call(home, "train.py", "config/sudoku.toml", "--out_dir=out/half", "--block_sizes=16:1", *SMALL, "--max_steps=2")
    return home


def call(home, *argv, code=0):
    p = subprocess.run([sys.executable, *argv], cwd=home, capture_output=True, text=True)
    assert p.returncode == code, f"{argv}: exit {p.returncode}\n{p.stdout}{p.stderr}"
    assert "Traceback" not in p.stderr
    return p.stdout + p.stderr if code == 0 else p.stderr


def test_settings_of_another_version_are_refused(home):
    state = torch.load(home / "out/sudoku/ckpt.pt", weights_only=True)
    (home / "out/other").mkdir()
    torch.save({**state, "config": {**state["config"], "n_heaps": 3}}, home / "out/other/ckpt.pt")
    assert "n_heaps" in call(home, "sample.py", "--ckpt=out/other", code=2)


def test_every_preset_is_a_valid_config():
    presets = sorted((ROOT / "config").rglob("*.toml"))
    assert len(presets) >= 13
    for path in presets:
        load_config(TrainConfig, [str(path)])


def test_sample(home):
    ask = (
        "sample.py",
        "--ckpt",
        "out/sudoku",
        "--prompt",
        "..3.1.........4.",
        "--sampler",
        "ancestral",
        "--block_size",
        "16",
        "--steps",
        "8",
    )
    out = call(home, *ask, "--n_samples", "4", "--temperature", "1.0", "--seed", "1")
    assert "losses and draws: PyTorch (Triton is for CUDA)" in out.splitlines()[0]
    found = re.findall(r"--- sample \d\n(.*)\n", out)
    assert len(found) == 4 and all(re.fullmatch(r"\.\.3\.1\.........4\.[.1234]{16}", s) for s in found) and len(set(found)) > 1
    assert re.search(r"64 tokens, .* tokens/s, 8 NFE \(.*\), block size 16, seed 1", out)
    again = call(home, *ask, "--n_samples", "4", "--seed", "1")
    assert re.findall(r"--- sample \d\n(.*)\n", again) == found
    assert "\x1b" not in call(home, *ask, "--animate"), "plain text where output is not a terminal"
    assert "16 NFE" in call(home, "sample.py", "--ckpt", "out/sudoku", "--sampler", "ar")
    several = call(home, "sample.py", "--ckpt=out/sudoku", "--prompt_file=data/sudoku/puzzles.txt", "--temperature=0", "--steps=2")
    assert [s[:16] for s in re.findall(r"--- sample \d\n(.*)\n", several)] == (ROOT / "data/sudoku/puzzles.txt").read_text().split()


def samples(out):
    return re.findall(r"--- sample \d+\n(.*)\n", out)


def test_samplers_and_their_own_options(home):
    ask = ("sample.py", "--ckpt=out/sudoku", "--n_samples=4")
    out = call(home, *ask, "--sampler", "arpc", "--steps=8", "--guide_every", "2", "--corruption=divergence")
    assert re.search(r"1[0-2] NFE \([\d.]+ a row", out), "8 passes and 4 checks, less those in which nothing had changed"
    assert samples(call(home, *ask, "--sampler=speculation", "--temperature=0")) == samples(
        call(home, *ask, "--sampler=ar", "--temperature=0")
    )
    assert samples(call(home, *ask, "--sampler=speculation")) == samples(call(home, *ask, "--sampler=ar")), (
        "token for token, not only on average"
    )
    assert samples(call(home, *ask, "--steps=4", "--greedy_tail")) != samples(call(home, *ask, "--steps=4"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_explains_itself(capsys, name):
    with pytest.raises(SystemExit) as e:
        load_with_sampler(SampleConfig, ["--sampler", name, "--help"])
    out = capsys.readouterr().out
    for option in options(SAMPLERS[name]):
        assert f"\n{option}: " in out and f"    --{option}" in out
    assert inspect.getdoc(SAMPLERS[name]) in out and not e.value.code


def test_scripts_print_their_settings(home):
    assert inspect.getdoc(SAMPLERS["arpc"]) in call(home, "sample.py", "--sampler", "arpc", "--help")
    assert "SampleConfig" in call(home, "sample.py", "--help") and "DistillConfig" in call(home, "distill.py", "--help")


def test_sweeping_samplers(home):
    flags = ("--n_eval=4", "--samplers=ar,confidence,speculation", "--out=out/c.jsonl", "--batch_size=2", "--steps=1,2")
    call(home, "eval.py", "--sweep", "--ckpt=out/sudoku", *flags)
    rows = [json.loads(line) for line in (home / "out/c.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + 1 + 2 + 5 and all(0 <= r["low"] <= r["accuracy"] <= r["high"] <= 1 for r in rows)
    table = (home / "out/c.md").read_text()
    assert "### out/sudoku: sudoku, masked, with clues, batches of 2" in table and table.count("| speculation") == 5
    out = call(home, "eval.py", "--sweep", "--report=out/side", "--out=out/c.jsonl", "--panels=samplers")
    side = (home / "out/side.md").read_text()
    assert "9 lines" in out and (home / "out/side.png").stat().st_size > 10_000
    (home / "out/page.md").write_text("# Written by hand\n")
    assert "--report out/page_tables" in call(home, "eval.py", "--sweep", "--report=out/page", "--out=out/c.jsonl", code=2)
    assert "### confidence: sudoku, masked, with clues" in side and side.count("| out/sudoku") == 8
    assert "SweepConfig" in call(home, "eval.py", "--sweep", "--help") and "EvalConfig" in call(home, "eval.py", "--help")


def test_sampling_a_stream(home):
    (home / "prompts.txt").write_text("\n3+\n3+8=11;4+4=\n")
    out = call(
        home,
        "sample.py",
        "--ckpt=out/digits",
        "--prompt_file=prompts.txt",
        "--max_new_tokens=21",
        "--steps=4",
        "--ar_tokens=5",
        "--top_p=0.9",
    )
    found = re.findall(r"--- sample \d\n(.*)\n", out)
    assert [len(s) for s in found] == [21, 23, 32] and found[1].startswith("3+") and found[2].startswith("3+8=11;4+4=")
    assert "63 tokens" in out


@pytest.mark.parametrize(
    "argv, says",
    [
        (["sample.py", "--ckpt=out/none"], "--ckpt out/"),
        (["sample.py", "--ckpt=out/sudoku", "--prompt=12x4............"], "'x'"),
        (["sample.py", "--ckpt=out/sudoku", "--prompt=12"], "16 tokens"),
        (["sample.py", "--ckpt=out/sudoku", "--block_size=8"], "1, 16"),
        (["sample.py", "--ckpt=out/digits", "--prompt=" + "3+8=11;" * 40], "--prompt"),
        (["sample.py", "--ckpt=out/digits", "--max_new_tokens=1000"], "--max_new_tokens"),
        (["sample.py", "--ckpt=out/digits", "--temperature=-1"], "temperature"),
        (["sample.py", "--ckpt=out/digits", "--temperature=nan"], "temperature"),
        (["sample.py", "--ckpt=out/digits", "--top_p=0"], "top_p"),
        (["sample.py", "--ckpt=out/digits", "--n_samples=0"], "n_samples"),
        (["sample.py", "--ckpt=out/digits", "--sampler=best"], "'best'"),
        (["sample.py", "--ckpt=out/digits", "--sampler=arcp"], "--sampler arpc"),
        (["sample.py", "--ckpt=out/digits", "--sampler"], "no sampler named ''"),
        (["sample.py", "--ckpt=out/digits", "--sampler=arpc", "--eta=0.1"], "psi"),
        (["sample.py", "--ckpt=out/digits", "--sampler=arpc", "--guide_evry=2"], "--guide_every"),
        (["sample.py", "--ckpt=out/digits", "--sampler=arpc", "--guide_every=0"], "guide_every must be at least 1"),
        (["sample.py", "--ckpt=out/digits", "--sampler=arpc", "--metric=kl"], "nll, gap, entropy"),
        (["sample.py", "--ckpt=out/digits", "--sampler=first_hitting"], "uniform noise"),
        (["sample.py", "--ckpt=out/sudoku", "--sampler=gibbs"], "masked noise"),
        (["sample.py", "--ckpt=out/sudoku", "--sampler=speculation", "--steps=4"], "--steps"),
        (["sample.py", "--ckpt=out/sudoku", "--sampler=arpc", "--block_size=1"], "block size 1"),
        (["sample.py", "--ckpt=out/half", "--sampler=arpc"], "without 1 it has no AR mode"),
        (["eval.py", "--ckpt=out/sudoku", "--samples", "--sampler=max_coupling"], "masked noise"),
        (["eval.py", "--ckpt=out/sudoku", "--samples", "--eta=2"], "psi"),
        (["eval.py", "--ckpt=out/sudoku", "--dtype=bfloat16"], "--samples"),
        (["eval.py", "--sweep", "--ckpt=out/sudoku", "--samplers=ar,best"], "'best'"),
        (["eval.py", "--sweep", "--report=x", "--out=none.jsonl"], "none.jsonl"),
        (["sample.py", "--ckpt=out/digits", "--sampler=ar", "--steps=3"], "--steps"),
        (["sample.py", "--ckpt=out/digits", "--prompt_file=none.txt"], "none.txt"),
        (["sample.py", "--ckpt=out/digits", "--tempreature=1"], "--temperature"),
        (["train.py", "config/sudoku.toml", "--batchsize=3"], "--batch_size"),
        (["train.py", "config/sudku.toml"], "config/sudoku.toml"),
        (["-m", "lab.bench", "--sizes=3M"], "--sizes=1M,demo"),
        (["-m", "lab.paper", "--seeds=0"], "--seeds 3"),
        (["-m", "lab.plots", "--steps=0"], "--steps 4"),
        (["distill.py", "--ckpt=out/none"], "--ckpt out/"),
        (["distill.py", "--ckpt=out/sudoku", "--rounds=6"], "--teacher_steps=64"),
        (["eval.py", "--sweep", "--panels=rows"], "--panels samplers"),
        (["-m", "lab.bench", "--growth=100"], "--growth 8192"),
        (["sample.py"], "out/run"),
        (["sample.py", "--init_from=hf:nobody"], "names no repository"),
        (["sample.py", "--init_from=out/none"], "--ckpt out/"),
        (["eval.py", "--gsm8k", "--ckpt=out/sudoku"], "data/gsm8k/test.jsonl"),
        (["train.py", "--init_from=out/none"], "--init_from out/"),
        (["train.py", "--init_from=out/sudoku", "--n_layers=9"], "n_layers 2, not 9"),
        (["train.py", "--init_from=out/sudoku", "--dataset=digits", "--seq_len=32"], "not in the tokens"),
        (["train.py", "config/digits.toml", "--next_token", "--block_sizes=1:1"], "nothing stands before"),
    ],
)
def test_slips_get_two_lines(home, slip, monkeypatch, argv, says):
    """In this process: what the fixture checks is the exit code and the two lines."""
    monkeypatch.chdir(home)
    scripts = {f"{module.__name__}.py": module.main for module in (distill, evaluation, sample, training)}
    commands = {module.__name__: module.main for module in (bench, paper, plots)}
    if argv[0] == "-m":
        assert says in slip(commands[argv[1]], argv=argv[2:])
    else:
        assert says in slip(scripts[argv[0]], argv=argv[1:])


def test_nanogpts_own_files_train(home):
    """train.bin, val.bin and two lines; GPT-2's byte pairs may be out of reach, and a run does not need them."""
    (home / "data/mine").mkdir()
    for split in ("train", "val"):
        (np.arange(600) * 83 % 50257).astype(np.uint16).tofile(home / f"data/mine/{split}.bin")
    (home / "data/mine/meta.json").write_text('{"vocab_size": 50257,\n "tokenizer": "gpt2"}')
    out = call(home, "train.py", "--dataset=mine", "--seq_len=16", "--out_dir=out/mine", *SMALL, "--max_steps=2", "--batch_size=2")
    assert "val step 2" in out and "sample:" in out


def test_eval(home):
    out = call(home, "eval.py", "--ckpt=out/sudoku", "--n_eval=8", "--n_mc=2")
    assert re.search(r"block 1  \(0.25\) +\d\.\d+ ", out) and re.search(r"block 16  \(0.75\) +<= \d", out) and "mixture, log-sum-exp" in out
    assert "no prompts" in call(home, "eval.py", "--ckpt=out/digits", "--samples", "--clues=false", code=2)
    out = call(home, "eval.py", "--ckpt=out/sudoku", "--samples", "--n_eval=8")
    assert re.search(r"ar +1 +16 +16.0 ", out) and re.search(r"ancestral +16 +8 +8 ", out) and re.search(r"arpc +16 +8 +15 ", out)
    assert "with clues" in out and "without clues" in call(home, "eval.py", "--ckpt=out/sudoku", "--samples", "--n_eval=4", "--clues=false")
    assert re.search(r"real text +100.0 \(", out) and "perplexity under its own AR mode" in out


@pytest.mark.parametrize(
    "main, argv",
    [(sample.main, ["--max_new_tokens=16"]), (evaluation.main, ["--samples", "--n_eval=4", "--sampler=ancestral", "--judge=none"])],
)
def test_texts_are_made_in_the_dtype_that_was_asked_for(home, monkeypatch, slip, main, argv):
    """bfloat16 reaches every pass of the sampler, and nothing else."""
    monkeypatch.chdir(home)
    forward, seen = Transformer.forward, []

    def watched(self, *args, **how):
        logits = forward(self, *args, **how)
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_tensor(logits) and logits.dtype))
        return logits

    monkeypatch.setattr(Transformer, "forward", watched)
    argv, found = ["--ckpt=out/digits", "--steps=4", "--device=cpu", *argv], []
    for flags in ([], ["--dtype=float32"], ["--dtype=bfloat16"]):
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["", *argv, *flags])
        main()
        found.append(set(seen[1:]))  # the first is restore's, which looks whether logits are finite
    assert found == [{(False, torch.float32)}] * 2 + [{(True, torch.float32)}] and not torch.is_autocast_enabled("cpu")
    assert "dtype cannot be half" in slip(main, argv=[*argv, "--dtype=half"])


def test_bench(tmp_path, monkeypatch):
    """In this process, where nothing is imported again for a peak: these peaks mean nothing."""
    monkeypatch.setattr(bench, "fresh", lambda f, *args: f(*args))
    flags = ["--sizes=custom", "--repeats=1", "--n_layers=1", "--d_model=32", "--seq_len=32", "--batch_size=2", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags, f"--json={tmp_path / 'b.json'}"])
    bench.main()
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [(r["job"], r["process"]) for r in rows] == [(a, b) for a in ("train", "ancestral", "arpc") for b in ("masked", "uniform")]
    assert all(r["ratio"] > 0 and r["ours_ms"] > 0 for r in rows) and all(("ours_mb" in r) == (r["job"] == "train") for r in rows)
