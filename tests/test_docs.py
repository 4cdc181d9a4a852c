"""
Why believe the pages? Their line numbers, files, links, commands and messages are those of the code.

    python -m tests.test_docs        puts the right line numbers into the pages
"""

import ast
import functools
import importlib
import importlib.util
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("course", "data", "fast", "hub", "lab", "methods", "run", "samplers")
CODE = [*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py")))]
PAGES = {
    str(p.relative_to(ROOT)): p
    for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
NOW = [name for name in PAGES if name != "docs/log.md"]  # the log says what was so when it was written
EQUATION = r"\[`([\w.]+)`\]\(((?:\.\./)?[\w/]+\.py)#L(\d+)\)"


def text_of(name):
    return PAGES[name].read_text(encoding="utf-8")


# ----- equations


@functools.cache
def definitions(file):
    """{"function", "Class" or "Class.method": line} of a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno
            methods = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{m.name}": m.lineno for m in methods if isinstance(m, ast.FunctionDef)}
    return found


def place_of(name, file):
    """
    (file, line) of a definition: in this file, or where it has moved to; None if it is nowhere, or in
    several.
    """
    files = (
        [file]
        if (ROOT / file).exists() and name in definitions(file)
        else [str(p.relative_to(ROOT)) for p in CODE]
    )
    places = [(f, definitions(f)[name]) for f in files if name in definitions(f)]
    return places[0] if len(places) == 1 else None


@pytest.mark.parametrize("page", NOW)
def test_an_equation_is_where_the_page_says(page):
    rows = re.findall(EQUATION, text_of(page))
    assert len(rows) >= 60 or page != "docs/equations.md"
    for name, file, line in rows:
        file = file.removeprefix("../")
        place = place_of(name, file)
        assert place is not None, f"{page}: there is no {name} in {file}"
        right = "{}#L{}".format(*place)
        assert right == f"{file}#L{line}", (
            f"{page}: {name} is at {right}, not at {file}#L{line}. All at once: python -m tests.test_docs"
        )


def refresh(page):
    """Write the right places into a page; print those that changed."""

    def mended(match):
        name, file, line = match.groups()
        up = "../" * file.startswith("../")
        file = file.removeprefix("../")
        place = place_of(name, file)
        if place is None:
            print(f"{page}: there is no {name} any more")
            return match[0]
        if place != (file, int(line)):
            print(f"{page}: {name} {file}#L{line} -> {place[0]}#L{place[1]}")
        return f"[`{name}`]({up}{place[0]}#L{place[1]})"

    old = text_of(page)
    new = re.sub(EQUATION, mended, old)
    if new != old:
        PAGES[page].write_text(new, encoding="utf-8")


# ----- files and links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if page == "docs/log.md" or target.startswith(("http", "#")):
            continue
        assert (PAGES[page].parent / target.partition("#")[0]).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", NOW)
def test_files_that_are_named_exist(page):
    made_by_a_recipe = set(re.findall(r"^## .*`([\w/]+\.py)`", text_of("CONTRIBUTING.md"), re.M))
    for name in re.findall(r"`([\w./]+\.(?:py|toml))`", text_of(page)):
        if not re.search(r"\b(NAME|mine)\b", name) and name not in made_by_a_recipe and name != "prepare.py":
            assert (ROOT / name).exists(), f"{page} names {name}"


def test_the_index_names_every_page():
    index = re.findall(r"\]\(([\w./]+\.md)\)", text_of("docs/README.md"))
    assert len(index) == len(set(index)), "a page is named twice"
    pages = {name for name in PAGES if name.startswith("docs/")} - {"docs/README.md"}
    assert {f"docs/{name}" for name in index if "/" not in name} == pages


def test_the_list_of_files_is_complete():
    """
    methods/ and samplers/ may grow without it, and so may data/: each recipe of CONTRIBUTING.md is one file.
    """
    listed = set(re.findall(r"`([\w/]+\.py)`", text_of("docs/files.md")))
    grows = {"methods", "samplers"}
    files = {str(p.relative_to(ROOT)) for p in CODE if p.name not in ("__init__.py", "prepare.py")}
    assert {f for f in files if f.partition("/")[0] not in grows} <= listed
    assert listed <= files | {"data/NAME/prepare.py"}


def test_the_list_of_methods_names_every_section():
    """Sections, not files: a new file needs no edit here."""
    text = text_of("docs/methods.md")
    listed = re.findall(r"^\| \[`(\w+)`\]\(#\1\) \|", text, re.M)
    assert sorted(listed) == sorted(re.findall(r"^## (\w+)$", text, re.M)) and len(listed) > 20
    assert all((ROOT / f"methods/{name}.py").exists() for name in listed)


# ----- commands


def commands_in(text):
    """
    (program, the words behind it) of every command in a page: train.py, -m lab.bench, data/sudoku/prepare.py.
    """
    text = re.sub(r"\\\n\s*", " ", text)
    return re.findall(r"(?:python3?|torchrun[^\n`]*?) +(-m [\w.]+|[\w/]+\.py)([^\n`#|)]*)", text)


@functools.cache
def flags_of(program):
    """The flags that a program takes, its samplers' and methods' among them."""
    import methods
    from run.flags import options
    from samplers import SAMPLERS

    by_method = [methods.load(name) for name in methods.names()]
    if program.endswith("prepare.py"):
        spec = importlib.util.spec_from_file_location("prepare", ROOT / program)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(
            {"distill.py": "train", "-m course": "course.__main__"}.get(
                program, program.removeprefix("-m ").removesuffix(".py")
            )
        )
    configs = [
        x
        for x in vars(module).values()
        if isinstance(x, type) and is_dataclass(x) and x.__name__.endswith("Config")
    ]
    found = {f.name for cls in configs for f in fields(cls)} | {"help"}
    if program in ("sample.py", "-m lab.quality", "-m lab.gsm8k"):
        found |= {name for f in SAMPLERS.values() for name in options(f)}
    if program in ("train.py", "distill.py"):
        found |= {f.name for m in by_method if hasattr(m, "Settings") for f in fields(m.Settings)}
    return found


OTHERS = ("-m pytest", "-m venv", "-m tests.", "tests/")  # commands that are not ours, or take no settings
METHODS_OF_RECIPES = {"ce_steps"}  # settings of what CONTRIBUTING.md adds


@pytest.mark.parametrize("page", NOW)
def test_commands_use_programs_and_flags_that_exist(page):
    made = set(re.findall(r"^## .*`([\w/]+\.py)`", text_of("CONTRIBUTING.md"), re.M))
    for program, words in commands_in(text_of(page)):
        if program.startswith(OTHERS) or program in made or "NAME" in program:
            continue
        file = program.removeprefix("-m ").replace(".", "/") + ".py" if program.startswith("-m ") else program
        file = "course/__main__.py" if program == "-m course" else file
        assert (ROOT / file).exists(), f"{page}: python {program}"
        known = flags_of(program) | (METHODS_OF_RECIPES | {"alpha"} if page == "CONTRIBUTING.md" else set())
        for flag in re.findall(r"(?<=\s)--([\w-]+)", words):
            assert flag.replace("-", "_") in known, f"{page}: {program} takes no --{flag}"
        for preset in re.findall(r"config/[\w/]+\.toml", words):
            assert "NAME" in preset or (ROOT / preset).exists(), f"{page}: there is no {preset}"


@pytest.mark.parametrize("page", NOW)
def test_flags_in_the_text_are_those_of_some_program(page):
    programs = [
        "train.py",
        "sample.py",
        "eval.py",
        *(f"-m lab.{m}" for m in ("quality", "sweep", "gsm8k", "bench", "paper", "plots")),
    ]
    programs += ["-m course", "-m hub.export", "-m hub.evaluate"]
    programs += sorted(f"data/{p.parent.name}/prepare.py" for p in (ROOT / "data").glob("*/prepare.py"))
    known = set().union(*map(flags_of, programs)) | METHODS_OF_RECIPES
    # torchrun's
    known |= {"standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max_restarts"}
    for flag in re.findall(r"`--([\w-]+)", text_of(page)):
        assert flag.replace("-", "_") in known, f"{page} speaks of --{flag}"


@pytest.mark.parametrize("page", NOW)
def test_make_has_the_targets(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"(?:`|^    )make ([\w-]+)", text_of(page), re.M):
        assert target in targets, f"{page}: make {target}"


# ----- messages


@functools.cache
def messages():
    """Every string of the code, with `...` where a value is put in."""
    found = set()
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def is_said(message):
    """Is there a string in the code that holds these words in this order?"""
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.S)
    return any(pattern.search(text) for text in messages())


def test_every_error_message_is_in_the_code():
    rows = re.findall(r"^\| `([^`]+)` \|", text_of("docs/errors.md"), re.M)
    assert len(rows) >= 60
    for message in rows:
        assert is_said(message.replace("\\|", "|")), f"docs/errors.md: nothing says {message!r}"


def test_what_fast_prints_is_in_the_code():
    table = text_of("docs/running.md").partition("| what is printed |")[2].partition("\n\n")[0]
    rows = [words for line in table.splitlines() for words in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    assert len(rows) >= 7
    for words in rows:
        assert is_said(words), f"docs/running.md: nothing prints {words!r}"


if __name__ == "__main__":
    for name in NOW:
        refresh(name)
