"""
Why believe checkpoint.py? A run's files after kills, damage, full disks and second runs: nothing is lost,
nothing twice.
"""

import json
import math
import os
import resource
import sys
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_train import log, run, same

import eval as evaluation
import train
from model import ModelConfig
from options import TrainConfig
from run import checkpoint
from run.restore import begin_from, rebuild, trained_with


@pytest.fixture
def room():
    """room(n): no file may grow beyond n bytes, as on a disk that is full; room(): no such limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda n=None: resource.setrlimit(resource.RLIMIT_FSIZE, before if n is None else (n, before[1]))
    yield limit
    limit()


def steps_and_results(out_dir):
    """What log.jsonl says, but for times and memory."""
    return [{k: v for k, v in r.items() if k not in ("ms", "peak_mb")} for r in log(out_dir)]


def test_the_last_ones_and_the_best_are_kept(project):
    run("--out_dir=b", "--eval_every=1", "--keep=3")
    numbered = ["ckpt.4.pt", "ckpt.5.pt", "ckpt.6.pt"]
    assert sorted(p.name for p in Path("b").iterdir()) == sorted(
        ["ckpt.pt", "best.pt", *numbered, "log.jsonl", "lock"]
    )
    assert Path("b/ckpt.pt").samefile("b/ckpt.6.pt") and checkpoint.load("b")["step"] == 6
    assert checkpoint.load("b/ckpt.5.pt")["step"] == 5
    run("--out_dir=a", "--eval_every=1", "--keep=1", "--lr=0.3", "--warmup=1", "--ema=0.1")
    val = {r["step"]: 0.25 * r["val"]["1"] + 0.75 * r["val"]["4"] for r in log("a") if "val" in r}
    best = min(val, key=val.get)
    assert best < 6, "the learning rate is far too high: the best is not the last"
    assert checkpoint.load("a/best.pt")["step"] == best and not Path(f"a/ckpt.{best}.pt").exists()


def test_the_best_is_weighed_as_the_block_sizes_are(project, monkeypatch):
    """
    Weights 0.25 and 0.75: step 6 has the lowest mixture, though step 4 has the lowest sum. What is not finite
    does not count.
    """
    found = iter(
        [{1: (math.nan, 0.0), 4: (0.1, 0.0)}, {1: (0.1, 0.0), 4: (1.0, 0.0)}, {1: (0.6, 0.0), 4: (0.8, 0.0)}]
    )
    monkeypatch.setattr("train.bounds", lambda *_, **__: next(found))
    run("--out_dir=a", "--eval_every=2", "--max_steps=6")
    assert checkpoint.load("a/best.pt")["step"] == 6
    monkeypatch.setattr("train.bounds", lambda *_, **__: {1: (0.59, 0.0), 4: (0.81, 0.0)})
    run("--out_dir=a", "--eval_every=2", "--max_steps=8", "--resume")
    assert checkpoint.load("a/best.pt")["step"] == 6


def test_other_files_in_the_folder_are_no_checkpoints(project):
    run("--out_dir=a", "--max_steps=1")
    for name in ("ckpt.².pt", "ckpt.x.pt", "ckpt.-2.pt", "ckpt.1.5.pt", "ckpt..pt"):
        Path("a", name).write_bytes(b"")
    assert [f.name for f in checkpoint.numbered("a")] == ["ckpt.1.pt"] and checkpoint.load("a")["step"] == 1


def test_a_disk_without_hard_links(project, monkeypatch):
    def refuse(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    run("--out_dir=a", "--eval_every=2")
    assert (
        checkpoint.load("a")["step"] == 6
        and Path("a/best.pt").exists()
        and not Path("a/ckpt.pt").samefile("a/ckpt.6.pt")
    )


@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_the_one_before_takes_the_place_of_a_damaged_one(project, capsys, harm):
    run("--out_dir=whole", "--lr_schedule=constant")
    run("--out_dir=a", "--max_steps=4", "--eval_every=2", "--lr_schedule=constant")
    data = Path("a/ckpt.pt").read_bytes()
    Path("a/ckpt.4.pt").write_bytes(
        {"cut": data[:-1000], "flip": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "gone": b""}[harm]
    )
    capsys.readouterr()
    state = checkpoint.load("a")
    err = capsys.readouterr().err
    assert (
        state["step"] == 2
        and err.count("WARNING") == 2
        and "a/ckpt.pt is damaged" in err
        and "a/ckpt.2.pt, of step 2" in err
    )
    run("--out_dir=a", "--resume", "--lr_schedule=constant")
    assert same("a", "whole") and checkpoint.load("a/ckpt.pt")["step"] == 6
    assert [r["step"] for r in log("a") if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_loses_nothing_and_says_so(project, capsys, slip, room):
    run("--out_dir=a", "--max_steps=2", "--lr_schedule=constant")
    size = Path("a/ckpt.2.pt").stat().st_size
    before = Path("a/ckpt.2.pt").read_bytes()
    room(size - 1000)
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run("--out_dir=a", "--resume", "--eval_every=2", "--lr_schedule=constant")
    err = capsys.readouterr().err
    assert e.value.code == 2 and "no checkpoint of step 4: File too large" in err, "and it went on"
    assert (
        "error: no checkpoint of step 6, the last good one is of step 2\n  try: free space for a, then --resume\n"
        in err
    )
    assert Path("a/ckpt.pt").read_bytes() == before and not list(Path("a").glob("*.tmp"))
    room()
    run("--out_dir=a", "--resume", "--eval_every=2", "--lr_schedule=constant")
    run("--out_dir=whole", "--eval_every=2", "--lr_schedule=constant")
    assert same("a", "whole")


def test_log_lines_wait_for_room_on_the_disk(project, capsys, room):
    Path("a").mkdir()
    checkpoint.log("a", {"step": 1})
    room(Path("a/log.jsonl").stat().st_size + 5)
    checkpoint.log("a", {"step": 2, "loss": 0.5})
    checkpoint.log("a", {"step": 3, "loss": 0.25})
    assert capsys.readouterr().err.count("WARNING: a/log.jsonl waits") == 2 and checkpoint.logged("a") == [
        {"step": 1}
    ]
    room()
    checkpoint.log("a", {"step": 4})
    assert [r["step"] for r in log("a")] == [1, 2, 3, 4]


def test_what_is_not_finite_is_null_in_the_log(project):
    """JSON has no NaN; readers see one where a validation was not finite."""
    Path("a").mkdir()
    checkpoint.log("a", {"step": 1, "loss": math.nan}, {"step": 2, "val": {"1": math.inf, "4": 0.1}})
    text = Path("a/log.jsonl").read_text()
    assert text == '{"step": 1, "loss": null}\n{"step": 2, "val": {"1": null, "4": 0.1}}\n'
    assert math.isnan(checkpoint.logged("a")[1]["val"]["1"]) and checkpoint.fall_back_to_good("a") is None
    checkpoint.forget_after("a", 2)
    assert Path("a/log.jsonl").read_text() == text


def test_a_folder_one_cannot_write_to(project, slip):
    Path("file").write_text("")
    for folder in ("file", "file/below", "/proc/nanoblock"):
        assert "cannot" in slip(run, f"--out_dir={folder}") or "Not a directory" in slip(
            run, f"--out_dir={folder}"
        )


def test_two_runs_do_not_write_to_one_folder(project, slip):
    with checkpoint.writing("a", True):
        assert "another run is writing to a" in slip(run, "--out_dir=a")
    run("--out_dir=a", "--max_steps=1")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(project, slip, monkeypatch):
    assert "no checkpoint" in slip(run, "--out_dir=a", "--resume") and not Path("a").exists(), (
        "a mistyped name makes no folder"
    )
    monkeypatch.setattr(checkpoint, "save", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        run("--out_dir=a", "--max_steps=3")
    monkeypatch.undo()
    monkeypatch.chdir(project)
    run("--out_dir=a", "--resume")
    run("--out_dir=whole")
    assert same("a", "whole") and steps_and_results("a") == steps_and_results("whole")
    for file in Path("a").glob("*.pt"):
        file.unlink()
    Path("a/lock").write_text("")
    assert "no checkpoint" in slip(run, "--out_dir=a", "--resume"), "no run has begun in this folder"


def test_half_a_line_of_the_log_does_not_count(project):
    run("--out_dir=whole", "--eval_every=2", "--lr_schedule=constant")
    run("--out_dir=a", "--eval_every=2", "--lr_schedule=constant", "--max_steps=4")
    lines = Path("a/log.jsonl").read_text().splitlines(keepends=True)
    # killed while it wrote the validation of step 4
    Path("a/log.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    run("--out_dir=a", "--eval_every=2", "--lr_schedule=constant", "--resume")
    assert steps_and_results("a") == steps_and_results("whole"), "step 4 is validated before step 5 is taken"
    assert all(json.loads(line) for line in Path("a/log.jsonl").read_text().splitlines())


def test_the_checkpoint_comes_before_the_validation(project, monkeypatch):
    def killed(*_, **__):
        raise RuntimeError("killed")

    run("--out_dir=whole", "--eval_every=3")
    with monkeypatch.context() as m:
        m.setattr("train.bounds", killed)
        with pytest.raises(RuntimeError):
            run("--out_dir=a", "--eval_every=3")
    assert checkpoint.load("a")["step"] == 3 and not any("val" in r for r in log("a"))
    run("--out_dir=a", "--eval_every=3", "--resume")
    assert same("a", "whole") and steps_and_results("a") == steps_and_results("whole")
    assert checkpoint.load("a/best.pt")["step"] == checkpoint.load("whole/best.pt")["step"]


def test_one_file_can_be_read_like_a_folder(project, capsys, monkeypatch):
    run("--out_dir=a", "--eval_every=3")

    def ask(ckpt):
        monkeypatch.setattr(
            sys, "argv", ["eval.py", f"--ckpt={ckpt}", "--device=cpu", "--n_eval=4", "--n_mc=1"]
        )
        capsys.readouterr()
        evaluation.main()
        return capsys.readouterr().out

    assert "step 6" in ask("a") and ask("a") == ask("a/ckpt.6.pt") and "step 3" in ask("a/ckpt.3.pt")


def test_padding_of_an_older_checkpoint_is_shown_clean(project):
    """
    As it was when these weights were trained: tests/test_before.py has checkpoints that were really made
    then.
    """
    run("--out_dir=a", "--max_steps=1")
    state = checkpoint.load("a")
    new = ("version", "process", "method")
    older = {k: v for k, v in state.items() if k not in new}
    older["config"] = {
        k: v for k, v in state["config"].items() if k not in ("clean_padding", "method", "plain")
    }
    checkpoint.save("a", older)
    assert not rebuild("a", "cpu")[0].clean_padding and checkpoint.load("a")["version"] == 2
    checkpoint.save("a", {**older, "meta": {**older["meta"], "pad_id": 2}})
    assert rebuild("a", "cpu")[0].clean_padding


def test_a_small_file_does_not_become_large(project, slip, monkeypatch):
    """Each is refused before the memory is asked for: by what the file says of itself."""
    run("--out_dir=a", "--max_steps=1")
    state = checkpoint.load("a")
    put = lambda **new: checkpoint.save("b", {**state, **new})
    refused = lambda: slip(checkpoint.load, "b")
    put()
    with zipfile.ZipFile("b/ckpt.1.pt", "a") as archive:
        archive.filelist *= 4  # other names for the same bytes
        archive.comment = b"so that the list is written"
    assert "bytes are in" in refused()
    put()
    squeeze("b/ckpt.1.pt")
    assert "is compressed" in refused()
    put(ema={"embed.weight": torch.zeros(1).expand(10**6, 10**3)})
    assert "its tensors are of 4,000," in refused()
    put(ema=dict.fromkeys([f"embed.{i}" for i in range(100)], torch.zeros(10**5)))
    assert "its tensors are of 40," in refused()
    put(more=bytearray(5))
    assert "bytearray" in refused()

    for name, part in (("n_layers", "config"), ("seq_len", "config"), ("vocab_size", "meta")):
        put(**{part: {**state[part], name: 10**9}})
        assert f"{name} 1,000,000,000" in refused()
    facts = asdict(ModelConfig(4, 8, n_layers=1, n_heads=1, d_model=4))
    for name in ("n_layers", "vocab_size"):
        put(network={**facts, name: 10**9})
        assert f"{name} 1,000,000,000" in refused()
    put(network={**facts, "n_layers": torch.tensor(10**9)})
    assert "is a tensor" in refused()

    put(config={**state["config"], "d_model": 1024})
    monkeypatch.setattr(checkpoint, "build", None)  # which would take the memory
    assert "its weights do not fit its settings" in slip(rebuild, "b", "cpu")
    begin = TrainConfig(init_from="b", dataset="toy", device="cpu", out_dir="c")
    assert "its weights do not fit its settings" in slip(begin_from, begin)


def squeeze(file):
    """Compress a file of torch.save."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("saved, here", [("pgm", ""), ("", "pgm"), ("pgm", "loopholing")])
def test_a_network_of_another_method_is_named(project, slip, saved, here):
    flags = lambda name: [f"--method={name}"] if name else []
    tiny = ["--seq_len=8", "--block_sizes=8:1", "--max_steps=1"]
    run("--out_dir=a", "--n_layers=2", *tiny, *flags(saved), *(["--decoder_layers=1"] if saved else []))
    err = slip(train.main, argv=[*TINY, *tiny, "--out_dir=b", "--init_from=a", *flags(here)])
    name = lambda method: f"--method={method}" if method else "no method"
    assert f"a holds the network of {name(saved)}, not of {name(here)}\n" in err
    assert f"try: {name(saved) if saved else 'leave --method out'}, with --init_from=a" in err


def test_noise_that_cannot_be_is_refused(project, slip):
    run("--out_dir=a", "--max_steps=1", "--process=uniform")
    state = checkpoint.load("a")
    good = state["process"]["arguments"]
    assert (state["version"], state["process"]["class"]) == (2, "Uniform")
    assert good == {"vocab_size": 3, "predicts": "denoiser", "ar_token": 3}
    odd = [
        ("vocab_size", 4),
        ("vocab_size", None),
        ("vocab_size", 10**9),
        ("vocab_size", 3.0),
        ("predicts", "x"),
    ]
    odd += [("ar_token", None), ("ar_token", "x"), ("ar_token", -1), ("ar_token", 10**30), ("more", 1)]
    for arguments in (*({**good, key: value} for key, value in odd), {}, None):
        checkpoint.save("a", {**state, "process": {"class": "Uniform", "arguments": arguments}})
        err = slip(rebuild, "a", "cpu")
        assert "what cannot be" in err or "does not fit its settings" in err, arguments
    for name in ("Masked", "methods.gidd.GIDD", "os.path", "methods.nothing.At_all", "", 3, None):
        checkpoint.save("a", {**state, "process": {"class": name, "arguments": good}})
        assert "what cannot be" in slip(rebuild, "a", "cpu"), name

    cfg, facts = trained_with(state), asdict(ModelConfig(4, 8, n_layers=1, n_heads=1, d_model=4))
    build = lambda kind, **arguments: checkpoint.build(
        cfg, 4, facts, process={"class": kind, "arguments": arguments}
    )
    assert build("Masked", vocab_size=4, mask_id=3)[1].mask_id == 3
    for mask_id in (None, -1, 4, 10**30, 2.5, True, "x", [1]):
        assert "what cannot be" in slip(partial(build, "Masked", vocab_size=4, mask_id=mask_id)), mask_id
    for ar_token in (-1, 4, 10**30, 1.5, "x"):
        assert "what cannot be" in slip(partial(build, "Uniform", vocab_size=4, ar_token=ar_token)), ar_token
    for kind in ("NoiseProcess", "Transformer", "math", "methods.duo.Relaxation", "os.system"):
        assert "what cannot be" in slip(partial(build, kind, vocab_size=4)), kind
