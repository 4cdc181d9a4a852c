"""
Speed, checked against the lesson.

    accelerate    (network, process) -> the same, fast where the fast form gives the lesson's numbers:
                  check.py
    token_loss    diffusion.token_loss, fast for fast networks and processes
"""

from fast.check import accelerate
from fast.loss import token_loss
from fast.network import FastTransformer

__all__ = ["FastTransformer", "accelerate", "token_loss"]
