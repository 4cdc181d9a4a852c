"""
Why believe CONTRIBUTING.md? Every recipe is typed into a fresh copy of the project: the file, then the
commands, with tiny sizes.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, copy_project

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPE = r"^## [^\n]*`([\w/]+\.py)`\n.*?^```python\n(.*?)^```.*?^```sh\n(.*?)^```"
RECIPES = {
    path: (code, commands.splitlines()) for path, code, commands in re.findall(RECIPE, PAGE, re.M | re.S)
}
# by program, and by a flag that a command has: what is appended, and the last word of a flag counts
SMALL = {
    "train.py": [*TINY, "--max_steps=4"],
    "eval.py": ["--n_eval=4", "--n_mc=2"],
    "-m lab.quality": ["--n_eval=4"],
    "--ce_steps": ["--ce_steps=2"],
}


def test_every_recipe_is_found():
    kinds = [path.split("/")[0] for path in RECIPES]
    assert kinds == ["methods", "samplers", "methods", "data"] and len(
        re.findall(r"^```python", PAGE, re.M)
    ) == len(RECIPES), kinds


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES)
def test_the_recipe_works_as_typed(path, tmp_path):
    copy_project(tmp_path)
    code, commands = RECIPES[path]
    assert not (tmp_path / path).exists(), f"{path} is taken"
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(code, encoding="utf-8")
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "python", f"{command!r} is no command of ours"
        if "--help" not in words:
            words += [extra for key, more in SMALL.items() if key in command for extra in more]
        run = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, f"{command}\n{run.stdout[-1000:]}{run.stderr[-2000:]}"
        assert "--help" not in words or Path(path).stem in run.stdout.lower(), run.stdout
