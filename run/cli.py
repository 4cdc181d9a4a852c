"""
How are settings read? A dataclass is the list of settings, the command line and the TOML presets at once.

    python train.py [config/file.toml] [--name value | --name=value ...]     flags win over the file; --help prints the dataclass

A name nobody declared never passes, from either door. A user's slip ends in two lines, what is wrong and what to type,
and exit code 2.
"""

import difflib
import inspect
import os
import re
import sys
from dataclasses import MISSING, fields

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


def die(problem, fix):
    """End the program as a user's slip: two lines on stderr, exit code 2."""
    problem, fix = (" ".join(s.splitlines()) for s in (problem, fix))  # what a message quotes may have lines of its own
    print(f"error: {problem}\n  try: {fix}", file=sys.stderr)
    raise SystemExit(2)


def said(e):
    """An exception in part of a line: its kind, and the beginning of what it says."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"


def writable(path, flag):
    """Make the folder of a file that will be written later; exit now rather than then if it cannot be."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        new = not os.path.exists(path)
        with open(path, "a"):
            pass
        if new:
            os.remove(path)
    except OSError as e:
        die(f"cannot write {path}: {e.strerror}", f"--{flag} FILE, in a folder of yours")


def command():
    """What this program is started with, behind `python`: train.py, or -m lab.bench."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"-m {spec.name}" if spec is not None and spec.parent else os.path.basename(sys.argv[0])


def load_config(cls, argv, help="--help", given_names=None):
    """
    An instance of the dataclass `cls` from command-line words; exits with two lines, `help` in them, on anything it does not know.
    given_names: a set, which gets the names that somebody chose.
    """
    declared, from_file, from_flags, words = {f.name: f for f in fields(cls)}, {}, {}, list(argv)
    script = command()
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print((inspect.getdoc(sys.modules[cls.__module__]) or "").strip(), "\n\n" + inspect.getsource(cls))
            raise SystemExit
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name, where = name.replace("-", "_"), word.partition("=")[0]
            if not equals:
                has_value = bool(words) and not words[0].startswith("--")
                is_switch = name in declared and declared[name].type is bool
                if is_switch and not (has_value and words[0].lower() in ("true", "false")):
                    value = True
                else:
                    value = words.pop(0) if has_value else None
            pairs, given = {name: value}, from_flags
        elif word.endswith(".toml"):
            where, pairs, given = word, read_toml(word), from_file
        else:
            die(f"'{word}' is neither a --flag nor a .toml file", f"python {script} {help}")
        for name, value in pairs.items():
            if name not in declared:
                near = difflib.get_close_matches(name, declared, 1)
                die(f"{where}: no setting named '{name}'", f"--{near[0]}" if near else f"python {script} {help}")
            try:
                given[name] = convert(value, declared[name].type)
            except (ValueError, TypeError, KeyError, AttributeError):
                default = declared[name].default
                default = declared[name].default_factory() if default is MISSING else default
                example = ",".join(f"{k}:{v:g}" for k, v in default.items()) if isinstance(default, dict) else default
                die(
                    f"{where}: '{name}' wants {declared[name].type.__name__}, got {value!r}",
                    f"python {script} {help}, or --{name}={example}",
                )
    if given_names is not None:
        given_names |= {*from_file, *from_flags}
    return cls(**{**from_file, **from_flags})


def read_toml(path):
    if not os.path.exists(path):
        near = difflib.get_close_matches(
            path, [os.path.join("config", f) for f in os.listdir("config")] if os.path.isdir("config") else [], 1, 0.3
        )
        die(f"config file {path} not found", near[0] if near else "ls config/")
    try:
        with open(path, "rb") as f:
            return tomllib.load(f)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as e:
        die(f"{path} is not a TOML file: {e}", "name = value, one a line, strings in quotes")


def convert(value, kind):
    """A flag's string or a TOML value as `kind`; raises rather than guess."""
    if kind is bool:
        return {"true": True, "false": False}[str(value).lower()]  # bool("False") is True: look it up instead
    if kind is dict:
        return parse_dict(value)
    if value is None or isinstance(value, (dict, list)) or (isinstance(value, bool) and kind is not str):
        raise ValueError  # a bare flag, or a table where we want one value
    if kind is int and isinstance(value, float):
        raise ValueError  # 3.5 where we count
    if isinstance(value, bool):
        return str(value).lower()  # true in a TOML file, where "true" is one of several words
    return kind(value)  # "3e-4" -> 3e-4, 1 -> 1.0, "100_000" -> 100000


def parse_dict(value):
    """'1:0.25,16:0.75', '{1: 0.25, 16: 0.75}' or a TOML table -> {1: 0.25, 16: 0.75}: block size -> weight or name."""
    if not isinstance(value, dict):
        pairs = [pair.split(":") for pair in re.sub(r"[{}\s\"']", "", value).split(",") if pair]
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError  # a size named twice
        value = dict(pairs)
    number = lambda v: float(v) if re.fullmatch(r"[-+.\deE]+", str(v)) else str(v)
    return {int(k): number(v) for k, v in value.items()}
