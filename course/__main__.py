"""
Eight exercises on block diffusion: write one function each, and let the numbers say whether it is right.

    python -m course              the list
    python -m course 3            check the answer in course/ex3_bound.py
    python -m course 3 --hint     a hint; --hint 2 is the second, and the last
    python -m course 3 --run      run the project with your function in place of ours
    python -m course 3 --show     the lesson's own lines

Begin with docs/course.md. `git checkout course/` brings the empty files back.
"""

import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python course/__main__.py works too
from course import harness
from run import machine
from run.cli import die, load_config

NAMES = ("attention", "corruption", "bound", "reverse", "mixture", "cache", "arpc", "noise")
SECONDS = 20  # of work, for all of a check


@dataclass
class CourseConfig:
    hint: int = 0  # 1 or 2: one hint at a time
    run: bool = False  # run the project with your function in place of ours
    show: bool = False  # the lesson's own lines
    file: str = ""  # another file with the answer
    ckpt: str = ""  # for --run: the run to sample from


def exercise_file(number):
    return Path(__file__).parent / f"ex{number}_{NAMES[number - 1]}.py"


def exercise_of(number):
    """The module of checks/ that knows exercise `number`."""
    return importlib.import_module(f"course.checks.{NAMES[number - 1]}")


def list_them():
    print(__doc__)
    for number in range(1, len(NAMES) + 1):
        exercise = exercise_of(number)
        file = harness.short(exercise_file(number))
        print(f"{number}  {exercise.TITLE:<50} {file:<27} {exercise.MINUTES} min")


def show(exercise):
    """The lesson's lines, from the files as they are."""
    for thing in exercise.SOURCE:
        lines, start = inspect.getsourcelines(thing)
        print(f"{harness.short(inspect.getsourcefile(thing))}, lines {start} to {start + len(lines) - 1}\n")
        for n, line in enumerate(lines, start):
            print(f"{n:>5}  {line}", end="")
        print()


def indented(text):
    return text.replace("\n", "\n       ")


def check(number, file):
    """Judge an answer, and say what holds and what does not. True if it is right."""
    exercise = exercise_of(number)
    print(f"exercise {number}: {exercise.TITLE} ({harness.short(file)})")
    try:
        with harness.Watchdog(file, SECONDS):
            function = harness.load(file, exercise.FUNCTION)
            passed, failed, wrong, notes = harness.judge(exercise, function)
    except harness.Wrong as e:
        passed, failed, wrong, notes = [], None, e, []
    for name in passed:
        print(f"ok     {name}")
    if wrong is None:
        for note in notes:
            print(f"note   {note}")
        print(f"right. See it at work: python -m course {number} --run")
        return True
    if failed:
        print(f"wrong  {failed}")
    print(f"       {indented(wrong.problem)}")
    if wrong.why:
        print(f"why    {indented(wrong.why)}")
    print(f"next   python -m course {number} --hint")
    return False


@machine.guard("smaller tensors in your function")
def main():
    words = sys.argv[1:]
    if not words:
        list_them()
        return
    number = words[0]
    if number in ("-h", "--help"):
        load_config(CourseConfig, ["--help"])
    if number not in map(str, range(1, len(NAMES) + 1)):
        die(f"there is no exercise {number!r}, only 1 to {len(NAMES)}", "python -m course 1")
    number = int(number)
    for k, word in enumerate(words):
        alone = k + 1 == len(words) or words[k + 1].startswith("--")
        words[k] = "--hint=1" if word == "--hint" and alone else word
    cfg = load_config(CourseConfig, words[1:])
    exercise = exercise_of(number)
    if cfg.hint:
        if cfg.hint not in (1, 2):
            die(f"there is no hint {cfg.hint}, only 1 and 2", f"python -m course {number} --hint")
        print(exercise.HINTS[cfg.hint - 1])
        more = "--hint 2" if cfg.hint == 1 else "--show"
        print(f"next   python -m course {number} {more}")
        return
    if cfg.show:
        show(exercise)
        return
    file = Path(cfg.file).resolve() if cfg.file else exercise_file(number)
    if not file.is_file():
        die(f"{cfg.file or file} not found", f"python -m course {number}, or git checkout course/")
    if not check(number, file):
        raise SystemExit(1)
    if cfg.run:
        try:
            exercise.run(harness.load(file, exercise.FUNCTION), cfg.ckpt)
        except OSError:  # a reader who has gone, a full disk
            raise
        except Exception as e:
            die(harness.told(e, file), f"python -m course {number}")


if __name__ == "__main__":
    main()
