"""
A smaller file of a trained network: its averaged weights alone, the matrices of the layers in 8 or 4 bits
(run/rounding.py). It is to sample from and to evaluate; it has no optimizer to go on with.

    python -m run.pack --ckpt out/sudoku --weights int4 --out_dir out/sudoku_int4
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python run/pack.py works too
from run import checkpoint, rounding
from run.cli import die, load_config
from run.machine import guard


@dataclass
class PackConfig:
    ckpt: str = "out/run"  # a training run's out_dir
    weights: str = "int8"  # int8 or int4
    out_dir: str = ""  # a new folder for the smaller file


def n_bytes(weights):
    """Bytes of tensors, packed or not."""
    parts = [t for w in weights.values() for t in (w.values() if isinstance(w, dict) else [w])]
    return sum(t.numel() * t.element_size() for t in parts if torch.is_tensor(t))


@guard("--out_dir of a folder of yours")
def main():
    cfg = load_config(PackConfig, sys.argv[1:])
    if cfg.weights not in rounding.BITS:
        die(f"weights {cfg.weights!r} are none of {', '.join(rounding.BITS)}", "--weights int8")
    if not cfg.out_dir or (Path(cfg.out_dir) / "ckpt.pt").exists() or Path(cfg.out_dir).is_file():
        die(f"out_dir {cfg.out_dir!r} is not a new folder", f"--out_dir {cfg.ckpt}_{cfg.weights}")
    if checkpoint.is_foreign(cfg.ckpt):
        die(
            f"{cfg.ckpt} holds published weights", "--ckpt of a training run; eval.py --weights rounds others"
        )
    state = checkpoint.load(cfg.ckpt)
    ema = rounding.packed(state["ema"], rounding.BITS[cfg.weights])
    kept = {k: v for k, v in state.items() if k not in ("model", "optimizer", "ema")}
    checkpoint.save(cfg.out_dir, {**kept, "model": {}, "ema": ema})
    names = [name for name, w in state["ema"].items() if rounding.is_matrix(name, w)]
    matrices = lambda weights: {name: weights[name] for name in names}
    for what, before, after in (
        ("the layers' matrices", n_bytes(matrices(state["ema"])), n_bytes(matrices(ema))),
        ("all weights", n_bytes(state["ema"]), n_bytes(ema)),
    ):
        print(f"{what}: {before:,} bytes, now {after:,}, {before / after:.2f} times smaller")
    print(f"{cfg.out_dir}/ckpt.pt: {(Path(cfg.out_dir) / 'ckpt.pt').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
