"""
Compiles every Triton kernel for real cards, ahead of time, on a machine that has none: python
tests/compile_kernels.py 80 90 Prints a line a kernel: registers a thread, bytes spilled, shared memory a
block. Triton fixes its mode, compiler or interpreter, when it is
imported: this needs its own process.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

import kernels
from fast import draws

LIMIT = {80: 166_912, 90: 232_448}  # bytes of shared memory that a block may take


class Card:
    """As much of a driver as compiling needs."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.target.arch, 10)


def resources(ptx, capability):
    """(registers a thread, bytes spilled) by the assembler that comes with Triton."""
    tool = get_ptxas(capability).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        arch = re.search(r"\.target (\w+)", ptx)[1]
        done = subprocess.run(
            [tool, "-v", f"-arch={arch}", source, "-o", Path(folder) / "out"], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stderr
    return int(re.search(r"Used (\d+) registers", text)[1]), sum(
        int(n) for n in re.findall(r"(\d+) bytes spill", text)
    )


def main(capability):
    triton.runtime.driver.set_active(Card(capability))
    compiled = []
    kernels.launch = draws.launch = lambda kernel, n, x, *args, **constants: compiled.append(
        kernel.warmup(*args, grid=(n,), **constants)
    )
    N, V = 4, 50304
    ids, one, wide = torch.zeros(N, dtype=torch.long), torch.ones(N), torch.ones(N, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        z = torch.zeros(N, V, dtype=dtype)
        for name, job in {
            "cross_entropy, loss": lambda z=z: kernels.cross_entropy_triton(z, None, ids, one, -1),
            "cross_entropy, loss and gradient": lambda z=z: kernels.cross_entropy_triton(
                z, z, ids, one, 50257
            ),
            "uniform_nll, loss": lambda z=z: kernels.uniform_nll_triton(
                z, None, ids, ids, wide, wide, one, one
            ),
            "uniform_nll, loss and gradient": lambda z=z: kernels.uniform_nll_triton(
                z, z, ids, ids, wide, wide, one, one
            ),
            "sample": lambda z=z: draws.sample_triton(
                z, ids, ids, torch.zeros(N, 4).double(), ids, one, 1.0, False
            ),
            "sample with stats": lambda z=z: draws.sample_triton(
                z, ids, ids, torch.zeros(N, 4).double(), ids, one, 1.0, True
            ),
            "scale": lambda z=z: kernels._scale(z, one),
        }.items():
            job()
            c = compiled[-1]
            registers, spilled = resources(c.asm["ptx"], capability)
            vector = max(
                [int(k) for k in re.findall(r"ld\.global\.(?:[\w:]+\.)*v(\d)", c.asm["ptx"])], default=1
            )
            print(
                f"sm_{capability} {str(dtype)[6:]:>8} {name:>32}: {c.metadata.num_warps:2d} warps, {registers:3d} registers, "
                f"{spilled} bytes spilled, {c.metadata.shared:,} bytes shared, loads of {vector} words"
            )
            assert c.metadata.shared <= LIMIT[capability] and spilled <= 16 and vector == 4, (
                "see the line above"
            )


if __name__ == "__main__":
    for capability in sys.argv[1:]:
        main(int(capability))
