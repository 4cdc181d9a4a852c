"""
A script of the project with float64 in place of float32, so that two ways to the same weights are the same to
1e-12 and not to 1e-5:

    python tests/in_float64.py train.py --dataset=toy ...
"""

import os
import runpy
import sys

import torch

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
