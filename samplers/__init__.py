"""
SAMPLERS: every sampler by its name. The files of this folder are imported here; a function in them that
generate.sampler decorates enters itself.
"""

import importlib
from pathlib import Path

from generate import SAMPLERS

for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    importlib.import_module(f"samplers.{file.stem}")

__all__ = ["SAMPLERS"]
