"""
How are settings read? A dataclass is the list of settings, the command line and the TOML presets at once.

    python train.py [config/file.toml] [--name value | --name=value ...]

Flags win over the file; --help prints the settings with their defaults and comments. Unknown settings are an
error, in flags and in TOML files. A user's slip ends in two lines, what is wrong and which command fixes it,
and exit code 2.
"""

import difflib
import inspect
import os
import re
import sys
import textwrap
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


# ESC and other controls but tab and newline, and what turns the direction of writing around
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def shown(text):
    """Text from elsewhere, for a terminal: what would clear it or turn its lines is spelt out, as \\x1b."""
    return CONTROLS.sub(lambda control: control[0].encode("unicode_escape").decode("ascii"), text)


def die(problem, fix):
    """End the program as a user's slip: two lines on stderr, exit code 2."""
    problem, fix = (shown(" ".join(s.splitlines())) for s in (problem, fix))  # they may quote several lines
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.leave = True  # a progress bar ends its line
        bar.close()
    print(f"error: {problem}\n  try: {fix}", file=sys.stderr)
    raise SystemExit(2)


def said(e):
    """An exception in part of a line: its kind, and the beginning of what it says."""
    return shown(f"{type(e).__name__}: {' '.join(str(e).split())[:160]}")


def writable(path, flag, begins=b""):
    """
    Make the folder of a file that will be written later; exit now rather than then if it cannot be. A file
    that is there must begin as those of this flag do: no other is written over. begins: bytes, or a tuple.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        new = not os.path.exists(path)
        if os.path.isfile(path):
            with open(path, "rb") as f:
                first = f.read(64)
            if first and not first.startswith(begins):
                die(f"{path} is there and is no --{flag} file: it would be lost", f"--{flag} ANOTHER_FILE")
        with open(path, "a", encoding="utf-8"):
            pass
        if new:
            os.remove(path)
    except OSError as e:
        die(f"cannot write {path}: {e.strerror}", f"--{flag} FILE, in a folder of yours")


def show_anything():
    """
    Every command begins here: text that the terminal cannot encode is shown as ?, and a stream that was
    closed beforehand takes what it gets; neither ends a run.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # else the next file to be opened gets its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def unheard(stream):
    """The reader of a stream has gone: what is written from now on goes nowhere."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # ValueError: it has no number
        os.dup2(nowhere.fileno(), stream.fileno())


class Unbroken:
    """A stream that outlives its reader, for a run that should go on: `train.py | head -3`."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, do, *args):
        try:
            return do(*args)
        except BrokenPipeError:
            unheard(self.stream)
        except OSError:  # a full disk may have room for the next line
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def of_root(path):
    """A file's path from this project's folder, or its name if it lies elsewhere."""
    near = os.path.relpath(os.path.abspath(path), os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return os.path.basename(path) if near.startswith("..") else near


def command():
    """What this program is started with, behind `python`: train.py, or -m lab.bench."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (
        f"-m {spec.name.removesuffix('.__main__')}"
        if spec is not None and spec.parent
        else of_root(sys.argv[0])
    )


def load_config(cls, argv, help="--help"):
    """
    An instance of the dataclass `cls` from command-line words; exits with two lines, `help` in them, on
    anything it does not know.
    """
    return cls(**given_settings(cls, argv, help))


def parsed(argv, kinds):
    """
    [(word, name, value)] of command-line words: a flag with its value, or a word that is no flag, with name
    None. kinds: {name: type}. A bool needs no value. The value of another flag is the next word, whatever it
    looks like, unless that is a setting's flag: then somebody forgot the value, and it is None.
    """
    found, words = [], list(argv)
    is_setting = lambda word: word.startswith("--") and name_of(word) in kinds
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--help":
            found.append((word, None, None))
            continue
        flag, equals, value = word.partition("=")
        name = name_of(flag)
        if not equals and kinds.get(name) is bool:
            value = words.pop(0) if words and words[0].lower() in ("true", "false") else "true"
        elif not equals:
            value = words.pop(0) if words and not is_setting(words[0]) else None
        found.append((flag, name, value))
    return found


def name_of(flag):
    """--batch-size=8 -> batch_size"""
    return flag.removeprefix("--").partition("=")[0].replace("-", "_")


def wants_help(argv, kinds):
    return any(name is None and word in ("-h", "--help") for word, name, _ in parsed(argv, kinds))


def kinds_of(cls):
    """{name: type} of the settings that a dataclass declares."""
    return {f.name: f.type for f in fields(cls)}


PATHS = set("bpe ckpt gif html init_from input judge json out out_dir prompt_file trace val_input".split())


def given_settings(cls, argv, help="--help"):
    """{name: value} of the settings of `cls` chosen in command-line words or TOML files. Flags win."""
    declared, from_file, from_flags = {f.name: f for f in fields(cls)}, {}, {}
    ask_help = f"python {command()} {help}"
    show_anything()
    for word, name, value in parsed(argv, kinds_of(cls)):
        if name is not None:
            pairs, given = {name: value}, from_flags
        elif word in ("-h", "--help"):
            doc = sys.modules["__main__"].__doc__ or sys.modules[cls.__module__].__doc__ or ""
            try:
                print(f"{narrow(inspect.cleandoc(doc))}\n")
                show_settings(cls)
                sys.stdout.flush()
            except BrokenPipeError:  # `| head`: ended as by SIGPIPE
                unheard(sys.stdout)
                raise SystemExit(141) from None
            raise SystemExit
        elif word.endswith(".toml"):
            pairs, given = read_toml(word), from_file
        else:
            meant = next((flag for flag in ("ckpt", "input") if flag in declared), None)
            fix = f"python {command()} --{meant} {word}" if meant and re.search("[/.]", word) else ask_help
            die(f"'{word}' is neither a --flag nor a .toml file", fix)
        for name, value in pairs.items():
            if name == "config" and name not in declared:
                die(
                    f"{word}: a file of settings has no flag",
                    f"python {command()} {value or 'config/NAME.toml'}",
                )
            if name not in declared:
                near = difflib.get_close_matches(name, declared, 1)
                die(f"{word}: no setting named '{name}'", f"--{near[0]}" if near else ask_help)
            if name in PATHS and isinstance(value, str):
                value = os.path.expanduser(value)  # of --out_dir=~/x the shell leaves the ~
            try:
                given[name] = convert(value, declared[name].type)
            except (ValueError, TypeError, KeyError, AttributeError):
                fix = f"{ask_help}, or --{name}={example_of(declared[name])}"
                if declared[name].type is dict and str(value).isdecimal():
                    fix = f"--{name}={value}:1"  # one size, for all rows
                die(f"{word}: '{name}' wants {declared[name].type.__name__}, got {value!r}", fix)
    return {**from_file, **from_flags}


def example_of(setting):
    """The default of a dataclass field, as a flag's value."""
    default = setting.default_factory() if setting.default is MISSING else setting.default
    return ",".join(f"{k}:{v:g}" for k, v in default.items()) if isinstance(default, dict) else default


def show_settings(cls):
    """
    Print the flags of a dataclass with their defaults and comments, in 80 columns, and those it inherits. By
    its source: a comment stands behind its field or on the lines above; "# ----- words" begins a part.
    """
    declared, above, lines = {f.name: f for f in fields(cls)}, [], inspect.getsource(cls).splitlines()
    for base in filter(is_dataclass, cls.__mro__[1:]):
        lines += [f"# ----- as {base.__module__.replace('.', '/')}.py has it"]
        lines += inspect.getsource(base).splitlines()
    for line in map(str.strip, lines):
        code, _, comment = line.partition("# ")
        if line.startswith("# -----"):
            print(f"\n{line.removeprefix('# -----').strip()}:")
        elif line.startswith("# "):
            above.append(comment)
        elif setting := declared.pop(code.partition(":")[0], None):
            default = str(example_of(setting))
            flag = f"    --{setting.name} {default.lower() if setting.type is bool else default}".rstrip()
            text = textwrap.wrap(" ".join([*above, comment]).strip(), 50, break_on_hyphens=False)
            first = f"{flag:<28}  {text.pop(0)}" if len(flag) <= 28 and text else flag
            print("\n".join([first] + [f"{'':<30}{rest}" for rest in text]))
            above = []


def narrow(text):
    """A docstring in 80 columns: lines of prose run on, what is indented keeps its beginning."""
    text = re.sub(r"\n {20,}(?=\S)", " ", text)  # what stands to the right of a command goes on
    option = r"[a-z]\w*: "  # and what it does: lines of its own
    text = re.sub(rf"(?m)^{option}.*(\n(?!{option}) *\S.*)+", lambda m: " ".join(m[0].split()), text)
    text = re.sub(rf"(?<=\S)\n(?=\S)(?!{option})", " ", text)
    lines = []
    for line in text.splitlines():
        inside = " " * (len(line) - len(line.lstrip()) + 4 * bool(re.match(f" |{option}", line)))
        if len(line) > 80:
            line = re.sub(r"(?<=\S) {2,}(?=\S)", "\n" + inside, line)  # the command, and what it does
        how = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": inside}
        for part in line.split("\n"):
            lines += textwrap.wrap(part, 80, **how) or [""]
    return "\n".join(lines)


def read_toml(path):
    if not os.path.exists(path):
        presets = [os.path.join("config", f) for f in os.listdir("config")] if os.path.isdir("config") else []
        near = difflib.get_close_matches(path, presets, 1, 0.3)
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
    """'1:0.25,16:0.75', '{1: 0.25, 16: 0.75}' or a TOML table -> {1: 0.25, 16: 0.75}, weights or names."""
    if not isinstance(value, dict):
        pairs = [pair.split(":") for pair in re.sub(r"[{}\s\"']", "", value).split(",") if pair]
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError  # a size named twice
        value = dict(pairs)
    number = lambda v: float(v) if re.fullmatch(r"[-+.\deE]+", str(v)) else str(v)
    return {int(k): number(v) for k, v in value.items()}
