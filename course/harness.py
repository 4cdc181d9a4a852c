"""
How is an answer judged? A check asks the student's function and names the first thing that is not so.

    load      the function of a file; Wrong if there is none, or it is still empty
    Answer    the function, to be called: an error in it becomes a Wrong that names the line of the file
    judge     all identities of one exercise, in their order
    tensor, compare, p_value    what the checks use: shapes, numbers, counts

A check is a generator function in checks/. It yields the name of an identity before it tests it.
"""

import ast
import importlib.util
import inspect
import linecache
import math
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from run.cli import shown

ROOT = Path(__file__).parents[1]
CHANCE = 1e-7  # a right answer fails a test of counts so rarely


class Wrong(Exception):
    """An identity does not hold. problem: what was found, with numbers. why: what may be behind it, or ''."""

    def __init__(self, problem, why=""):
        super().__init__(problem)
        self.problem, self.why = problem, why


# ----- the student's file


def short(path):
    """A path as a person types it here."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def place(file, line):
    """A line of a file, for a message."""
    text = linecache.getline(str(file), line).strip()
    return f"{short(file)}, line {line}: {text}"


def told(error, file):
    """An exception in a student's file: the last line of that file it passed, and what it says."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return shown(f"{place(file, lines[-1])}\n{what}" if lines else f"{short(file)}\n{what}")


def load(file, name):
    """The function (or class) `name` of a file. Raises Wrong for a file that cannot be read or is empty."""
    file = Path(file).resolve()
    if not file.exists():
        raise Wrong(f"{short(file)} is not there", f"`git checkout {short(file)}` brings the empty one back")
    linecache.checkcache(str(file))
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as e:
        raise Wrong(f"{place(file, e.lineno or 1)}\nSyntaxError: {e.msg}") from None
    except (UnicodeDecodeError, ValueError, OSError) as e:
        raise Wrong(f"{short(file)} cannot be read: {e}") from None
    node = next((n for n in tree.body if getattr(n, "name", None) == name), None)
    if node is not None and any(is_dots(n) for n in ast.walk(node)):
        raise Wrong(f"{name} in {short(file)} is still empty: put your lines in place of the ...")
    spec = importlib.util.spec_from_file_location(f"answer_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise Wrong(told(e, file)) from None
    if not callable(getattr(module, name, None)):
        why = f"`git checkout {short(file)}` brings the empty file back"
        raise Wrong(f"{short(file)} has no function named {name}", why)
    return getattr(module, name)


def is_dots(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


class Answer:
    """
    A student's function. An exception in it becomes a Wrong. Tensors that it is given must stay as they are,
    unless `may_change`.
    """

    def __init__(self, function, may_change=False):
        self.function, self.may_change = function, may_change
        code = getattr(inspect.unwrap(function), "__code__", None)
        self.file = code.co_filename if code else inspect.getsourcefile(function)
        self.name, self.notes = getattr(function, "__name__", "your function"), []

    def __call__(self, *args, **how):
        before = [x.clone() if torch.is_tensor(x) and not self.may_change else None for x in args]
        result = self.asked(self.function, *args, **how)
        for k, (x, old) in enumerate(zip(args, before, strict=True)):
            if old is not None and not torch.equal(x, old):
                name = self.argument(k)
                raise Wrong(f"{self.name} changes its argument {name}", f"work on a copy: {name}.clone()")
        return result

    def asked(self, function, *args, **how):
        """function(*args), where a student's error ends in a Wrong."""
        try:
            return function(*args, **how)
        except Wrong:
            raise
        except (Exception, SystemExit) as e:
            raise Wrong(told(e, self.file)) from None

    def steps(self, *args):
        """The same for a generator function: an iterator."""
        made = self(*args)
        if not inspect.isgenerator(made):
            raise Wrong(f"{self.name} does not yield", "a sampler yields once after every step: `yield`")
        end = object()
        while (step := self.asked(next, made, end)) is not end:
            yield step

    def argument(self, k):
        """The name of argument number k."""
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [p.name for p in inspect.signature(self.function).parameters.values() if p.kind in kinds]
        return names[k] if k < len(names) else f"args[{k}]"

    def note(self, text):
        """A remark on a right answer."""
        if text not in self.notes:
            self.notes.append(text)


# ----- numbers


def tensor(y, shape, letters, name):
    """What a student returned, as a tensor of this shape. letters: the shape in words, (B, L)."""
    if y is None:
        raise Wrong(f"{name} returns nothing", "is there a `return`?")
    try:
        y = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{name} returns a {type(y).__name__}, a tensor {letters} was expected") from None
    if tuple(y.shape) != tuple(shape):
        raise Wrong(f"{name} returns the shape {tuple(y.shape)}, expected {letters} = {tuple(shape)}")
    if y.dtype.is_floating_point and y.isnan().any():
        raise Wrong(f"{name} returns nan, not a number, at {first(y.isnan())}")
    return y


def whole(y, name):
    """A tensor of whole numbers of any type, as int64."""
    if y.dtype.is_complex or (y.dtype.is_floating_point and (y != y.round()).any()):
        raise Wrong(f"{name} returns {y.dtype}, token ids were expected: whole numbers, torch.long")
    return y.long()


def first(where):
    """The first place of a bool tensor that is True."""
    return tuple(where.nonzero()[0].tolist())


def close(y, want, near=1e-5):
    """Are they equal, up to the rounding of float32?"""
    y, want = y.detach().double(), want.detach().double()
    return y.shape == want.shape and bool(torch.isclose(y, want, rtol=near, atol=near).all())


def compare(y, want, what, near=1e-5):
    """Wrong unless y equals want. what: a function of the first place where not, that describes it."""
    if close(y, want, near):
        return
    off = ~torch.isclose(y.detach().double(), want.double(), rtol=near, atol=near)
    at = first(off)
    raise Wrong(f"{what(at)}: yours is {y[at].item():.6g}, it must be {want[at].item():.6g}")


def p_value(counts, p):
    """How likely counts (K,) as odd as these are where the law is p (K,): chi-squared, by Wilson-Hilferty."""
    counts, p = counts.double(), p.double()
    if counts[p == 0].sum() > 0:
        return 0.0
    expected = p / p.sum() * counts.sum()
    rare = expected < 5  # pooled
    o = torch.cat((counts[~rare], counts[rare].sum()[None]))
    e = torch.cat((expected[~rare], expected[rare].sum()[None]))
    o, e = o[e > 0], e[e > 0]
    return tail(((o - e) ** 2 / e).sum().item(), len(o) - 1)


def one_source(a, b):
    """How likely counts a, b (K,) of as many draws are so different where both have the same law."""
    rare = a + b < 10
    pool = lambda x: torch.cat((x[~rare], x[rare].sum()[None])).double()
    a, b = pool(a), pool(b)
    some = a + b > 0
    return tail(((a - b)[some] ** 2 / (a + b)[some]).sum().item(), int(some.sum()) - 1)


def tail(chi2, k):
    """The chance that a chi-squared number with k degrees of freedom is above chi2."""
    if k < 1:
        return 1.0
    z = ((chi2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return 0.5 * math.erfc(z / math.sqrt(2))


# ----- the judge


def judge(exercise, function):
    """
    (identities that hold, the one that does not or None, the Wrong or None, notes) of a student's function.
    exercise: a module of checks/.
    """
    passed, name, answer = [], None, Answer(function, getattr(exercise, "MAY_CHANGE", False))
    torch.manual_seed(0)
    try:
        for following in exercise.check(answer):
            passed += [name] if name else []
            name = following
        passed.append(name)
    except Wrong as wrong:
        if not wrong.why and "must match" in wrong.problem:  # PyTorch, of shapes
            wrong.why = getattr(exercise, "SHAPES", "")
        if not wrong.why and hasattr(exercise, "why"):
            try:
                wrong.why = exercise.why(answer)
            except Exception:  # an answer so odd that no diagnosis can be made of it
                pass
        return passed, name, wrong, answer.notes
    except Exception as e:  # in the lesson, which could not use what the student's function returned or kept
        text = shown(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
        wrong = Wrong(
            f"the lesson cannot go on with what {answer.name} has made\n{text}", "a tensor of what shape?"
        )
        return passed, name, wrong, answer.notes
    return passed, None, None, answer.notes


def likeness(mine, slips, probe):
    """The sentence of the slip whose numbers are the student's, or ''. slips: {sentence: function}"""
    for sentence, slip in slips.items():
        if close(mine, probe(slip)):
            return sentence
    return ""


class Watchdog(threading.Thread):
    """Ends the program when a function does not: after so many seconds of work, or without any."""

    def __init__(self, file, seconds):
        super().__init__(daemon=True)
        self.file, self.seconds, self.done = str(Path(file).resolve()), seconds, threading.Event()
        self.main = threading.get_ident()

    def __enter__(self):
        self.start()

    def __exit__(self, *how):
        self.done.set()

    def run(self):
        begun = moved = time.process_time()
        clock = time.monotonic()
        while not self.done.wait(0.2):
            work = time.process_time()
            if work - moved > 0.05:  # it works, if slowly: other programs may be busy
                moved, clock = work, time.monotonic()
            if work - begun > self.seconds or time.monotonic() - clock > self.seconds:
                break
        else:
            return
        frame = sys._current_frames().get(self.main)
        while frame is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        where = place(self.file, frame.f_lineno) if frame else short(self.file)
        print(f"stopped after {self.seconds} seconds: your function had not ended")
        print(f"       {shown(where)}")
        print("why    a loop that never ends? Or far more loops than it takes", flush=True)
        os._exit(1)
