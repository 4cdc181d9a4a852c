"""
Why believe settings.py? Both doors, flags and TOML, refuse what nobody declared and what has the wrong type.
"""

import io
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from options import SampleConfig
from run.checkpoint import build
from run.cli import die, load_config, parse_dict, said, show_settings, shown
from train import TrainConfig

ROOT = Path(__file__).parents[1]


@dataclass
class Cfg:
    n: int = 1
    lr: float = 0.1  # a comment that --help shows
    name: str = "x"
    fast: bool = False
    sizes: dict = field(default_factory=lambda: {1: 1.0})


def load(*argv):
    return load_config(Cfg, argv)


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError


def test_help_whose_reader_has_gone_ends_without_a_word(monkeypatch):
    """`--help | head -1`, for commands that no guard stands around too."""
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(SystemExit) as e:
        load("--help")
    assert e.value.code == 141, "as other tools do"


def test_flags_and_toml(tmp_path):
    toml = tmp_path / "a.toml"
    toml.write_text('n = 5\nlr = 1\nname = "y"\nfast = true\nsizes = {1 = 0.5, 16 = 0.5}\n')
    assert load() == Cfg()
    assert load(str(toml)) == Cfg(5, 1.0, "y", True, {1: 0.5, 16: 0.5})
    assert load("--n", "3", str(toml), "--lr=3e-4", "--fast=false") == Cfg(
        3, 3e-4, "y", False, {1: 0.5, 16: 0.5}
    )
    assert load(str(toml), "--n", "7").n == load("--n", "7", str(toml)).n == 7, (
        "a flag wins over the file, before or after it"
    )
    (tmp_path / "b.toml").write_text("name = true")
    assert load(str(tmp_path / "b.toml")).name == "true", "one of several words"
    assert load("--fast", "--n=1_000") == Cfg(1000, fast=True)
    assert (
        load("--name", "-").name == "-"
        and load("--name=a b=c").name == "a b=c"
        and load("--name=").name == ""
    )
    for text in ("1:0.25,16:0.75", "{1: 0.25, 16: 0.75}", "{1:.25,16:75e-2}"):
        assert load("--sizes", text).sizes == {1: 0.25, 16: 0.75}


def test_the_value_of_a_flag_is_a_value():
    """Whatever it looks like. But where a setting's flag follows, somebody forgot the value."""
    for value in ("--help", "-h", "notes.toml", "--", "--unheard-of", "-1", "true"):
        assert load("--name", value, "--n=2") == load("--n", "2", "--name", value) == Cfg(2, name=value)
        assert load(f"--name={value}").name == value
    assert load("--fast", "--n=2") == load("--fast", "true", "--n=2") == Cfg(2, fast=True)


@given(st.dictionaries(st.integers(1, 10**6), st.floats(0.001, 1), min_size=1))
def test_a_dict_survives_the_command_line(d):
    assert parse_dict(str(d)) == d


@pytest.mark.parametrize(
    "argv, says, fix",
    [
        (["--nmae=x"], "nmae", "--name"),
        (["--zzz"], "zzz", "--help"),
        (["--n=3.5"], "wants int", "--n=1"),
        (["--n=x"], "wants int", "--n=1"),
        (["--n"], "wants int", "--n=1"),
        (["--name"], "wants str", "--name=x"),
        (["--name", "--lr", "3"], "'name' wants str, got None", "--name=x"),
        (["--name", "--lr=3"], "'name' wants str, got None", "--name=x"),
        (["--n", "--help"], "'n' wants int, got '--help'", "--help"),
        (["--fast", "x.toml"], "not found", "config"),
        (["--lr=fast"], "wants float", "--lr=0.1"),
        (["--fast=yes"], "wants bool", "--fast=False"),
        (["--sizes=1:0.5,1:0.5"], "wants dict", "--sizes=1:1"),
        (["--sizes=16"], "wants dict", "--sizes=16:1"),
        (["--config", "a.toml"], "no flag", " a.toml"),
        (["word"], "'word'", "--help"),
        (["missing.toml"], "not found", "config"),
    ],
)
def test_flags_nobody_declared_or_of_the_wrong_type(slip, argv, says, fix):
    err = slip(load, *argv)
    assert says in err.split("\n")[0] and fix in err.split("\n")[1]


@pytest.mark.parametrize(
    "text",
    [
        "nmae = 'x'",
        "n = 3.5",
        "n = true",
        "n = [1]",
        "n = 'x'",
        "fast = 1",
        "sizes = {a = 1}",
        "n = = 1",
        "[n]\nx = 1",
        "\xff",
    ],
)
def test_toml_nobody_declared_or_of_the_wrong_type(slip, tmp_path, text):
    (tmp_path / "bad.toml").write_bytes(text.encode("latin-1"))
    assert "bad.toml" in slip(load, str(tmp_path / "bad.toml"))


def test_help_prints_the_commented_dataclass(capsys):
    with pytest.raises(SystemExit) as e:
        load("--help")
    assert (
        e.value.code is None
        and "    --lr 0.1                  a comment that --help shows\n" in capsys.readouterr().out
    )


def test_help_fits_a_terminal_and_names_every_setting(capsys):
    """A comment stands behind a field, or on the lines above it; defaults are what a flag would take."""
    with pytest.raises(SystemExit):
        load_config(TrainConfig, ["--help"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert [f.name for f in fields(TrainConfig)] == re.findall(r"^    --(\w+)", out, re.M)
    assert "    --resume false" in out and "\nthe network:\n" in out
    assert re.search(
        r"--block_sizes 1:0.25,16:0.75\n +size:weight,...: the share of rows trained with\n", out
    )
    assert re.search(r"--init_from +weights to begin with: a run's out_dir", out)


def test_a_home_folder_is_meant_by_its_sign(monkeypatch):
    """The shell leaves it in --out_dir=~/x; a text may begin with it."""
    monkeypatch.setenv("HOME", "/home/ada")
    cfg = load_config(SampleConfig, ["--ckpt=~/x", "--prompt=~/x"])
    assert (cfg.ckpt, cfg.prompt) == ("/home/ada/x", "~/x")


def test_the_published_presets_cost_what_their_comments_say():
    """
    12 layers, 768 wide: 6 FLOP a token and weight, forward and backward; two streams unless one would not be
    read.
    """
    vocabulary = {"openwebtext": 50257, "lm1b": 30522, "tinygsm": 49152}
    rows = {"openwebtext": 1024, "lm1b": 128, "tinygsm": 512}
    presets = sorted((ROOT / "config/blockgen").glob("*.toml"))
    assert len(presets) == 19
    for path in presets:
        cfg, text = load_config(TrainConfig, [str(path)]), path.read_text()
        T, D = rows[cfg.dataset], cfg.d_model
        S = T if cfg.next_token or T in cfg.block_sizes else 2 * T
        V = vocabulary[cfg.dataset] + (cfg.process == "masked")
        row = S * 6 * 12 * cfg.n_layers * D * D + T * 6 * V * D + 12 * cfg.n_layers * D * S * S
        cfg.seq_len = T
        with torch.device("meta"):
            weights = sum(p.numel() for p in build(cfg, vocabulary[cfg.dataset])[0].parameters())
        assert abs(float(re.search(r"(\d+)M parameters", text)[1]) - weights / 1e6) < 0.6, path.name
        hours = 512 * cfg.max_steps * row / 4e14 / 3600
        said, tflop = (
            float(re.search(r"= (\d+) GPU-hours", text)[1]),
            float(re.search(r"([\d.]+) TFLOP", text)[1]),
        )
        assert abs(said - hours) < 0.5 + 0.002 * hours and abs(tflop / (row / 1e12) - 1) < 0.01, path.name
        assert (
            path.name in text
            and 512 % cfg.batch_size == 0
            and cfg.lr == 3e-4
            and cfg.ema == 0.9999
            and cfg.dropout == 0.1
        )
        assert cfg.random_ar == (cfg.process == "uniform" and 1 in cfg.block_sizes)


HOSTILE = "\x1b]0;title\x07\x1b[2J\u202egnp\u2066\u200f\x9b3m\x00\x7f\b"


def test_controls_of_others_are_spelt_out(slip):
    """What would set the title, clear the screen or turn a line around is seen, and does nothing."""
    want = r"\x1b]0;title\x07\x1b[2J\u202egnp\u2066\u200f\x9b3m\x00\x7f\x08"
    assert shown(HOSTILE) == want and shown(want) == want and shown("\r") == r"\r"
    kept = "tab\tnewline\nMῆνιν 日本 \U0001f4a5 \u00a0"
    assert shown(kept) == kept
    assert slip(die, f"no key named {HOSTILE}", HOSTILE) == f"error: no key named {want}\n  try: {want}\n"
    assert want in said(ValueError(HOSTILE))


def test_help_prints_what_settings_inherit(capsys):
    """Each flag once, its own default first, its comment behind it."""

    @dataclass
    class Base:
        width: int = 4  # of a thing
        # in metres
        height: float = 1.0

    @dataclass
    class Own(Base):
        width: int = 5  # of another thing
        depth: int = 6

    show_settings(Own)
    out = capsys.readouterr().out
    own, base = out.split(f"\nas {__name__.replace('.', '/')}.py has it:\n")
    assert [line.split() for line in own.splitlines()] == [
        ["--width", "5", "of", "another", "thing"], ["--depth", "6"]]  # fmt: skip
    assert base.split() == ["--height", "1.0", "in", "metres"]
