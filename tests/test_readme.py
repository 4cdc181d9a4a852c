"""Why believe README.md? The lines it names are the lines it means, and the files it lists are the files there are."""

import re
from pathlib import Path

from generate import SAMPLERS
from sample import options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_equation_lines():
    rows = re.findall(r"\| \[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)", README)
    assert len(rows) >= 12
    for name, file, line in rows:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name.split('.')[-1]}\b", text), f"README: {file} line {line} is {text!r}, not {name}"


def test_the_file_map_is_complete():
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", README, re.M))
    folders = ("data", "fast", "hub", "lab", "methods", "run", "samplers")
    files = [*ROOT.glob("*.py"), *(p for folder in folders for p in (ROOT / folder).glob("*.py"))]
    assert listed == {str(p.relative_to(ROOT)) for p in files if p.name != "__init__.py"} | {"data/NAME/prepare.py"}


def test_commands_use_settings_that_exist():
    declared = {
        m
        for p in ROOT.rglob("*.py")
        if ".venv" not in p.parts
        for m in re.findall(r"^    (\w+): (?:int|float|str|bool|dict)\b", p.read_text(), re.M)
    }
    declared |= {option for f in SAMPLERS.values() for option in options(f)}
    for flag in re.findall(r" --(\w+)", " ".join(line for line in README.splitlines() if "python" in line and "--" in line)):
        assert flag in declared | {"standalone", "nproc_per_node", "help"}, f"README uses --{flag}"
