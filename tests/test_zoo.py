"""lab/zoo.py: rows of methods' files, trained beside their controls. Toy networks of two steps."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY

import methods
import train
from lab import paper, zoo
from run.cli import tomllib


def test_every_row_is_complete():
    rows = zoo.entries(zoo.ZooConfig())
    recipes = zoo.entries(zoo.ZooConfig(rows=str(ROOT / "lab/recipes")))
    assert len(rows) >= 7 and len(recipes) == 13
    rows += recipes
    for name, row in rows:
        what, at = row["by"].split()
        assert what in ("nats", "right") and row["control_by"].split()[0] == what, name
        assert set(row) == {"system", "paper", "claim", "train", "control", "sampler", "control_sampler",
                            "by", "control_by", "block", "tasks", "base"}  # fmt: skip
        for side, by in (("sampler", "by"), ("control_sampler", "control_by")):
            sampler = zoo.asked_for([row[side]])[0][0]
            at = row[by].split()[1]
            possible = [str(n or "pace") for n in zoo.steps_of(sampler)]
            assert what == "nats" or at in possible, f"{row['system']}: {sampler} has {possible}, not {at}"


@pytest.fixture
def code(tmp_path, monkeypatch):
    """The file of every method there is, in a folder with an empty recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config/zoo").mkdir(parents=True)
    (tmp_path / "config/zoo/sudoku.toml").write_text("")
    monkeypatch.setattr(methods, "load", lambda name: SimpleNamespace(__file__=str(tmp_path / "mine.py")))
    return tmp_path / "mine.py"


def test_another_control_or_other_code_is_another_place(code, tmp_path):
    cfg = zoo.ZooConfig()
    code.write_text('"""Words."""\nx = 1\nROWS = []\n')
    at = lambda flags, control="", base="": zoo.folder(
        cfg, "sudoku", flags, 0, {"control": control, "base": base}
    )
    first = at("--method mine --ckpt {control}")
    assert first != at("--method mine --ckpt {control}", "--process uniform") and first.startswith("out/zoo/")
    assert at("") != at("--process uniform")
    assert at("--init_from {base}", base="--next_token") != at("--init_from {base}", base="")
    long = [at(f"--method mine --init_from {{base}} --seed {i}", base="--lr 1 " * 40) for i in range(2)]
    assert long[0] != long[1] and max(map(len, long[0].split("/"))) < 200
    code.write_text('"""Other words."""\nx = 1  # a comment\nROWS = [1]\n')
    assert at("--method mine --ckpt {control}") == first
    code.write_text("x = 1\nROWS = []\n")
    assert at("--method mine --ckpt {control}") == first
    code.write_text('"""Words."""\nx = 2\nROWS = []\n')
    assert at("--method mine --ckpt {control}") != first
    functions = [
        f"def f():{docs}\n    return {n}\n" for n, docs in ((1, ""), (1, '\n    """Docs."""'), (2, ""))
    ]
    places = []
    for function in functions:
        code.write_text(function)
        places.append(at("--method mine --ckpt {control}"))
    assert places[0] == places[1] != places[2]
    code.write_text('"""Words."""\nx = 1\nROWS = []\n')
    (tmp_path / "config/zoo/sudoku.toml").write_text("lr = 1\n")
    assert at("--method mine --ckpt {control}") != first


def test_a_row_may_be_written_whole():
    """Its block size and its flags are the length of a task's row, which are those of the presets."""
    cfg, none = zoo.ZooConfig(), {"control": "", "base": ""}
    for task, n in zoo.ROW.items():
        assert zoo.block_of({"block": "row"}, task) == n and zoo.block_of({"block": 16}, task) == 16
        assert f"block_sizes_{n}_1/" in zoo.folder(cfg, task, "--block_sizes {row}:1", 0, none)
    assert zoo.number({"nats": {"1": [2.0], "16": [3.0], "32": [4.0]}}, "pgm", "nats row") == 4.0
    assert zoo.number({"nats": {"1": [2.0], "16": [3.0]}}, "ancestral", "nats 1") == 2.0
    recipe = lambda name: tomllib.loads((ROOT / name).read_text(encoding="utf-8"))
    assert recipe("config/zoo/digits.toml")["seq_len"] == zoo.ROW["digits"]
    assert "seq_len" not in recipe("config/zoo/sudoku.toml") and zoo.ROW["sudoku"] == 2 * 4 * 4


def test_results_of_older_code_are_shown_as_such(code, monkeypatch):
    """Where there is no time to measure anew. Another recipe, seed or plan is no older code."""
    cfg = zoo.ZooConfig()
    row = {"system": "Mine", "train": "--method mine", "control": "", "sampler": "ar", "control_sampler": "ar",
           "by": "nats 16", "control_by": "nats 16", "base": "", "block": 16}  # fmt: skip
    monkeypatch.setattr(zoo, "trained", lambda *_: (None, 0.0))
    find = lambda lines, seed=0: zoo.compared(cfg, "sudoku", row, seed, lines, lambda: False)
    lines = []
    for text in ("x = 1\n", "x = 2\n"):
        code.write_text(text)
        for flags in ("", "--method mine"):
            lines.append({"row": zoo.label_of(cfg, "sudoku", flags, 0, row), "seed": 0, "text": text,
                          "n_eval": cfg.n_eval, "n_mc": cfg.n_mc, "asked": [["ar", {}, 16, None]]})  # fmt: skip
    now = find(lines)
    assert now["system"]["text"] == "x = 2\n" and not zoo.is_older(cfg, "sudoku", row, now)
    code.write_text("x = 3\n")
    now = find(lines)
    assert now["system"]["text"] == "x = 2\n", "the newest"
    assert zoo.is_older(cfg, "sudoku", row, now)
    assert find(lines, seed=1) is None and find([]) is None
    assert find([line | {"n_mc": 2} for line in lines]) is None
    assert find([line | {"row": line["row"].replace("mine", "other")} for line in lines]) is None


@pytest.mark.slow  # a dozen small trainings
def test_a_zoo_is_made_once_and_goes_on(project, monkeypatch, slip):
    (project / "config/zoo").mkdir(parents=True)
    (project / "data/toy/prepare.py").write_text(
        "def check(text):\n    return text.count('abc'), len(text) // 3\n"
    )
    flags = [f.removeprefix("--").split("=") for f in TINY if "device" not in f]
    lines = [f"{k} = {v}" for k, v in flags]
    lines += [
        'dataset = "toy"',
        "seq_len = 16",
        'block_sizes = "1:0.5,16:0.5"',
        "max_steps = 2",
        "plain = true",
    ]
    (project / "config/zoo/sudoku.toml").write_text("\n".join(lines))
    (project / "config/zoo/digits.toml").write_text("\n".join(lines))
    runs = []

    def in_process(command, stdout):
        runs.append(" ".join(command[3:-3]))
        monkeypatch.setattr(sys, "argv", command[1:])
        train.main()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(paper, "subprocess", SimpleNamespace(run=in_process))
    argv = ["zoo.py", "--seeds=2", "--n_eval=4", "--n_mc=2", "--device=cpu", "--page=pages/zoo",
            "--methods=loopholing,token_editing", "--tasks=sudoku"]  # fmt: skip

    def go(*more):
        runs.clear()
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        zoo.main()
        return (project / "pages/zoo.md").read_text()

    page = go()
    assert sorted(set(runs)) == sorted({"", "--method loopholing", "--process uniform"}) and len(runs) == 6
    assert page.count("2510.19304](") == 2 and page.count(" | 2 | undecided") + page.count("confirmed**") >= 3
    assert (project / "pages/zoo.png").exists()
    go(), go("--minutes=0")
    assert not runs
    shutil.move(project / "out", project / "gone")
    go()
    assert not runs, "what docs/zoo.jsonl holds is not made again, though no network is left"
    shutil.rmtree(project / "out")
    shutil.move(project / "gone", project / "out")
    results = [json.loads(line) for line in (project / "out/zoo/results.jsonl").read_text().splitlines()]
    assert len(results) == 12 - 2  # a control measured alike is measured once
    (project / "pages/zoo.md").write_text("# By hand\n")
    assert "not a page of ours" in slip(zoo.main, argv=argv[1:])
