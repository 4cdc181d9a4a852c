"""
SAMPLERS: every sampler by its name. A file of this folder is found by itself, and so is a function in it that
    generate.sampler decorates.
"""

import importlib
from pathlib import Path

from generate import SAMPLERS

for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    importlib.import_module(f"samplers.{file.stem}")

__all__ = ["SAMPLERS"]
