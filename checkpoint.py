"""
What stays of a run? One file, out_dir/ckpt.pt: weights, EMA weights, optimizer state, settings, dataset facts and the step.
There is no random state to keep: every draw is a function of (seed, step, row), see diffusion.Noise.

Written to a temporary name and renamed, so a kill at any moment leaves the last good file; read with weights_only, so a file
from a stranger runs no code.
"""

import hashlib
import os
import zipfile
from pathlib import Path

import torch

from diffusion import Masked, Uniform
from model import ModelConfig, Transformer
from settings import die


def save(out_dir, state):
    """state: a dict of tensors, numbers, strings, lists and dicts."""
    path = Path(out_dir) / "ckpt.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.tmp", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def load(out_dir):
    """The dict that was saved, on the CPU; two lines if there is none or it is damaged."""
    path = Path(out_dir) / "ckpt.pt"
    if not path.exists():
        have = sorted(str(p.parent) for p in Path(out_dir).parent.glob("*/ckpt.pt"))
        die(f"no checkpoint {path}", f"--ckpt {have[0]}" if have else "python train.py config/sudoku.toml")
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum does not match")  # torch would load a flipped bit without a word
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "ema", "config", "meta", "step"} - set(state)
    except Exception as e:  # a damaged file, or one that wants to run code, fails in many ways
        die(
            f"{path} is damaged or not a checkpoint of ours: {type(e).__name__} {str(e)[:80].splitlines()[:1]}",
            f"train again: python train.py --out_dir={out_dir}",
        )
    if missing:
        die(f"{path} lacks {sorted(missing)}: not a checkpoint of ours", f"train again: python train.py --out_dir={out_dir}")
    return state


def fingerprint(model):
    """Twelve letters that stand for a model's weights, bit by bit."""
    return hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()[:12]


def build(cfg, vocab_size):
    """
    (model, process) for the settings cfg (a TrainConfig) and the dataset's vocabulary. Masked noise adds one id, the mask.
    Uniform noise adds none to the V it predicts: idle symbols would be drawn as noise.
    """
    masked = cfg.process == "masked"
    ar_token = None if masked or cfg.random_ar else vocab_size
    model = Transformer(
        ModelConfig(
            vocab_size=vocab_size + masked,
            seq_len=cfg.seq_len,
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            d_model=cfg.d_model,
            time_conditioning=cfg.time_conditioning == "true",
            n_extra_tokens=int(ar_token is not None),
        )
    )
    process = Masked(vocab_size + 1, vocab_size) if masked else Uniform(vocab_size, cfg.predicts, ar_token)
    return model, process
