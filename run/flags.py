"""
Flags that depend on other flags: --sampler NAME and --method NAME bring options of their own.
"""

import difflib
import inspect
from dataclasses import fields, make_dataclass

import methods
from run import cli
from run.cli import command, die, given_settings, kinds_of, load_config, parsed, wants_help
from samplers import SAMPLERS


def named(argv, flag, kinds, default):
    """
    What --flag names in command-line words or their TOML files, and whether either did. Flags win.
    kinds: {setting: type}
    """
    found, from_file = [], []
    for word, name, value in parsed(argv, kinds):
        if name == flag:
            found.append(value or "")
        elif name is None and word.endswith(".toml"):
            table = cli.read_toml(word)
            from_file += [str(table[flag])] if flag in table else []
    return (found or from_file or [default])[-1], bool(found), bool(from_file)


def wider(cls, extra):
    """The dataclass `cls` with more fields: [(name, type, default)]."""
    both = make_dataclass(cls.__name__, extra, bases=(cls,))
    both.__module__ = cls.__module__
    return both


# ----- samplers


def options(sampler):
    """{name: default} of a sampler's own options: its keyword arguments."""
    parameters = inspect.signature(sampler).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


LIMITS = {
    "absorbing": "masked noise only",
    "redraws": "uniform noise only",
    "AR mode": "block size 1 must have been trained too",
    "own pace": "takes no --steps",
    "any block": "serves block sizes that were not trained too",
}


def explain(sampler, own):
    """What --sampler NAME --help prints."""
    limits = [LIMITS[need] for need in sampler.needs]
    print(cli.narrow(f"--sampler {sampler.__name__}" + "".join(f"; {what}" for what in limits)))
    print(f"\n{cli.narrow(inspect.getdoc(sampler))}\n")
    print("Its own options and their defaults:" if own else "It has no options of its own.")
    for option, default in own.items():
        print(f"    --{option}" + ("" if default == "" else f"    {default}"))
    print("\n" + cli.narrow(f"All samplers: {', '.join(SAMPLERS)}."))
    print(f"What they share: python {command()} --help")


def served(sampler, trained, block_size):
    """
    The block sizes that may be asked for: those that were trained. For a sampler that serves any block also
    block_size; where that is 0, and 1 alone was trained, 16.
    """
    if sampler is None or "any block" not in sampler.needs:
        return trained
    return sorted({*trained, block_size or (trained[-1] if trained[-1] > 1 else 16)})


def load_with_sampler(cls, argv):
    """
    (settings, sampler, its options) from command-line words: `cls` and the options of the sampler that
    --sampler names.
    """
    theirs = {o: type(default) for f in SAMPLERS.values() for o, default in options(f).items()}
    kinds = {**theirs, **kinds_of(cls)}
    name, by_flag, by_file = named(argv, "sampler", kinds, cls.sampler)
    if name not in SAMPLERS or wants_help(argv, kinds):
        for method in methods.names():  # a sampler may live in a method's file
            methods.load(method)
    if name not in SAMPLERS and (by_flag or by_file):
        near = difflib.get_close_matches(name, SAMPLERS, 1)
        die(f"no sampler named {name!r}", f"--sampler {near[0] if near else '|'.join(SAMPLERS)}")
    sampler = SAMPLERS.get(name)  # None: a command whose default is several
    own = options(sampler) if sampler else {}
    both = wider(cls, [(o, type(default), default) for o, default in own.items()])
    if wants_help(argv, kinds):
        if by_flag:
            cli.show_anything()
            explain(sampler, own)
            raise SystemExit
        load_config(cls, ["--help"])
    for _, flag, _ in parsed(argv, {**kinds, **kinds_of(both)}):
        others = [s for s, f in SAMPLERS.items() if flag in options(f)]
        if others and flag not in kinds_of(both):
            which = f", not of {name}" if name else ": which?"
            die(f"--{flag} is an option of {', '.join(others)}{which}", f"--sampler {others[0]}")
    cfg = load_config(both, argv, help=f"--sampler {name} --help" if sampler else "--help")
    return cfg, sampler, {o: getattr(cfg, o) for o in own}


# ----- methods


def load_with_method(cls, argv, asked):
    """
    (settings, the method's Settings or None, its module or None) from command-line words: `cls` and the
    flags of the method that --method names. asked: a set, which gets the names that somebody chose.
    """
    name, by_flag, _ = named(argv, "method", kinds_of(cls), cls.method)
    method = methods.load(name)
    own = getattr(method, "Settings", None)
    mine = kinds_of(own) if own else {}
    if wants_help(argv, {**kinds_of(cls), **mine}):
        if by_flag and method:
            cli.show_anything()
            print(f"{cli.narrow(inspect.getdoc(method))}\n")
            cli.show_settings(own) if own else print("It has no settings of its own.")
            print("\nWhat every method shares: python train.py --help")
            raise SystemExit
        load_config(cls, ["--help"])
    both = wider(cls, [(f.name, f.type, f) for f in fields(own)]) if own else cls
    for _, flag, _ in parsed(argv, kinds_of(both)):
        if flag is not None and flag not in kinds_of(both) and (others := methods_with(flag)):
            which = f", not of {name}" if name else ""
            die(f"--{flag} is a setting of method {', '.join(others)}{which}", f"--method {others[0]}")
    given = given_settings(both, argv, f"--method {name} --help" if method else "--help")
    settings = own(**{k: v for k, v in given.items() if k in mine}) if own else None
    defaults = getattr(method, "DEFAULTS", {})
    defaults = defaults(settings) if callable(defaults) else defaults
    given = {k: v for k, v in given.items() if k not in mine}
    asked |= set(given)
    cfg = cls(**{**defaults, **given})
    if hasattr(method, "check") and not cfg.init_from:
        method.check(cfg, settings)
    return cfg, settings, method


def methods_with(setting):
    """The methods that have a setting of this name."""
    found = []
    for name in methods.names():
        own = getattr(methods.load(name), "Settings", None)
        if own is not None and setting in kinds_of(own):
            found.append(name)
    return found
