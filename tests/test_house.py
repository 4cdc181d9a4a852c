"""
Why believe the house? Imports run one way and in no circle, and what a student reads stays short.

Imports inside functions count like those at the top. The order, each importing what stands before it:

    the lesson (rng, model, diffusion, kernels, options, generate), samplers and methods, fast, run, hub, lab

course/ stands beside lab: it imports all but hub and lab, and nothing imports it.

train.py, sample.py, eval.py and distill.py are commands on top: they import anything but lab, and lab and
tests import them. Beside the order, run/cli.py is for everybody and imports the standard library alone; data/
is for run, hub, lab and the commands, and needs hub/download.py, which needs run/cli.py.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LESSON = ("rng", "model", "diffusion", "kernels", "options", "generate")
COMMANDS = ("train", "sample", "eval", "distill")
FOLDERS = ("samplers", "methods", "fast", "run", "hub", "lab", "data", "course")
BELOW = {  # what a file may import, by where it lies
    "lesson": {"lesson"},
    "samplers": {"lesson", "samplers"},
    "methods": {"lesson", "samplers", "methods"},
    "fast": {"lesson", "samplers", "methods", "fast"},
    "run": {"lesson", "samplers", "methods", "fast", "run", "data"},
    "hub": {"lesson", "samplers", "methods", "fast", "run", "hub", "data"},
    "lab": {"lesson", "samplers", "methods", "fast", "run", "hub", "data", "lab", "commands"},
    "course": {"lesson", "samplers", "methods", "run", "data", "course", "commands"},
    "data": {"data"},
    "commands": {"lesson", "samplers", "methods", "fast", "run", "hub", "data"},
}
ALSO = {  # file, or folder -> single files it may import besides
    "data": {"rng", "hub.download", "hub.gguf"},
    "train": {"eval"},
    "distill": {"train"},  # the old command, which calls the new one
    "methods.rl": {"data.dataset"},  # a reward is the check of a dataset
}
# all they may import, as others below them need them
ALONE = {"hub.download": {"run.cli"}, "hub.gguf": {"run.cli"}, "run.cli": set()}
PLAIN = ("rng", "model", "diffusion", "kernels")  # what runs without any machinery


def modules(root=ROOT):
    """{dotted name: file} of the project, tests left out."""
    files = [*root.glob("*.py"), *(f for folder in FOLDERS for f in (root / folder).rglob("*.py"))]
    found = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(source, names):
    """(modules of the project, packages of others) that a source imports, at its top or inside a function."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in names else node.module for name in whole]
        else:
            continue
        inside |= {name for name in found if name in names}
        outside |= {name.partition(".")[0] for name in found if name not in names}
    return inside, outside


def house_of(name):
    """Where a module lies: lesson, commands, or its folder."""
    return "lesson" if name in LESSON else "commands" if name in COMMANDS else name.partition(".")[0]


def allowed(name, other):
    """May the module `name` import the module `other`?"""
    if name in ALONE:
        return other in ALONE[name]
    also = {"run.cli"} | ALSO.get(name, set()) | ALSO.get(house_of(name), set())
    return other in also or house_of(other) in BELOW[house_of(name)]


def circle(arrows):
    """A circle in {name: names}, as a list, or None."""
    state, path = {}, []

    def visit(name):
        state[name] = "open"
        path.append(name)
        for other in sorted(arrows[name]):
            if state.get(other) == "open":
                return path[path.index(other) :] + [other]
            if other not in state and (found := visit(other)):
                return found
        state[name] = "closed"
        path.pop()
        return None

    for name in sorted(arrows):
        if name not in state and (found := visit(name)):
            return found
    return None


def all_arrows():
    """{module: modules it imports}"""
    files = modules()
    return {name: imports(file.read_text(encoding="utf-8"), files)[0] for name, file in files.items()}


def test_the_files_are_where_they_are_expected():
    files = modules()
    assert {*LESSON, *COMMANDS} == {name for name, file in files.items() if file.parent == ROOT}
    some = {"run.cli", "hub.download", "data.dataset", "fast", "lab.sweep", "data.sudoku.prepare"}
    assert len(files) > 40 and some <= set(files)


def test_imports_run_one_way():
    wrong = []
    for name, found in all_arrows().items():
        wrong += [f"{name} imports {other}" for other in sorted(found) if not allowed(name, other)]
    assert not wrong, "; ".join(wrong)


def test_imports_run_in_no_circle():
    arrows = all_arrows()
    for name, found in arrows.items():  # who imports fast.draws imports fast, unless it lies in fast itself
        folders = {other.partition(".")[0] for other in found} - {name.partition(".")[0]}
        found |= folders & set(arrows)
    found = circle(arrows)
    assert found is None, " -> ".join(found or [])


@pytest.mark.parametrize("name", PLAIN)
def test_the_lesson_imports_no_machinery(name):
    inside, outside = imports((ROOT / f"{name}.py").read_text(encoding="utf-8"), modules())
    assert inside <= set(PLAIN), f"{name} imports {sorted(inside)}"
    assert outside - set(sys.stdlib_module_names) <= {"torch", "triton"}, f"{name} imports {sorted(outside)}"


def test_the_reader_of_flags_needs_nothing():
    inside, outside = imports((ROOT / "run/cli.py").read_text(encoding="utf-8"), modules())
    assert not inside and outside - set(sys.stdlib_module_names) <= {"tomli"}  # Python 3.10 has no tomllib


@pytest.mark.parametrize(
    "name, other",
    [
        ("model", "fast.attention"), ("diffusion", "data.dataset"), ("generate", "samplers.reverse"),
        ("rng", "run.machine"), ("samplers.reverse", "methods.duo"), ("methods.duo", "fast"),
        ("methods.duo", "eval"), ("fast.loss", "run.machine"), ("fast.block", "data.dataset"),
        ("run.checkpoint", "hub.published"), ("run.machine", "lab.bench"), ("run.training", "train"),
        ("run.cli", "rng"), ("hub.published", "lab.quality"), ("hub.download", "data.tokens"),
        ("data.corpus", "run.machine"), ("data.dataset", "fast"), ("data.sudoku.prepare", "lab.sandbox"),
        ("lab.paper", "course.harness"), ("course.harness", "lab.quality"), ("eval", "lab.quality"), ("eval", "train"), ("sample", "train"),
    ],
)  # fmt: skip
def test_an_arrow_the_wrong_way_is_seen(name, other):
    assert not allowed(name, other)


def test_a_circle_and_an_import_inside_a_function_are_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    inside = "    if f:\n        from fast import draws, works\n        import run.machine as m\n"
    names = {"fast", "fast.draws", "run.machine"}
    assert imports("import torch\n\ndef f():\n" + inside, names) == (names, {"torch"})


# ----- text files


def without_encoding(source):
    """The lines of a source where a text file is opened in whatever encoding the system has."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "open":
            mode = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            words = [part.value for m in mode for part in ast.walk(m) if isinstance(part, ast.Constant)]
            if not any("b" in str(word) for word in words):
                lines.append(node.lineno)
        elif isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text"):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "folder", [".", "run", "hub", "data", "methods", "samplers", "fast", "lab", "course"]
)
def test_text_files_are_utf8_on_every_system(folder):
    files = sorted(ROOT.glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py"))
    wrong = []
    for file in files:
        lines = without_encoding(file.read_text(encoding="utf-8"))
        wrong += [f"{file.relative_to(ROOT)}, line {line}" for line in lines]
    assert len(files) > 2 and not wrong, "; ".join(wrong)


def test_a_text_file_without_an_encoding_is_seen():
    source = "open(a)\nopen(a, 'w')\nopen(a, mode='rb')\np.read_text()\np.write_text(t, encoding='utf-8')"
    assert without_encoding(source) == [1, 2, 4]


# ----- length

LINES = {"model": 220, "diffusion": 320, "generate": 260, "rng": 130, "kernels": 450}
LINES |= {"train": 260, "sample": 200, "eval": 260}
FUNCTIONS = [("model", "Layer.forward", 20), ("model", "Transformer.forward", 60)]
FUNCTIONS += [("diffusion", "token_loss", 45), ("train", "learn", 60)]


@pytest.mark.parametrize("name", LINES)
def test_a_file_of_the_lesson_is_one_sitting(name):
    n = len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines())
    most = int(1.25 * LINES[name])
    assert n <= most, f"{name}.py has {n} lines, {LINES[name]} are meant, {most} allowed"


@pytest.mark.parametrize("file, name, most", FUNCTIONS)
def test_what_a_lecture_shows_fits_on_a_screen(file, name, most):
    inside = ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8"))
    for part in name.split("."):
        inside = next(node for node in inside.body if getattr(node, "name", None) == part)
    n = inside.end_lineno - inside.lineno + 1
    assert n <= most, f"{name} has {n} lines"


def test_few_files_lie_at_the_root():
    assert len(list(ROOT.glob("*.py"))) <= 10
