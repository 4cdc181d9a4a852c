"""
Exercise 8: a noise of your own

A noise process says how a token becomes noise:  q(x_t | x_0) = a onehot(x_0) + m, for alpha from 1 (clean)
to 0 (pure noise). Masked noise has a = alpha and m = (1 - alpha) onehot(mask), uniform noise a = alpha and
m = (1 - alpha) / V. Loss, bound, reverse step and samplers follow (NoiseProcess in
diffusion.py).

Invent one, and write `mixing`. Some ideas: frequent tokens are likelier noise; only some
tokens are noise; masks and random tokens together (methods/gidd.py, arXiv 2503.04482). The rules:

    a is 1 at alpha = 1, 0 at alpha = 0, and never falls as alpha grows
    m >= 0, and a + m_1 + ... + m_V = 1
    m does not depend on x_0
    noise only ever comes in: what has become noise by time s is noise by time t > s

Then:

    python -m course 8            is it a noise process?
    python -m course 8 --run      a network that trains on it, its bound, and sudokus made with it

To keep it: copy this file to methods/mine.py, and `python train.py config/sudoku.toml --method mine`.
"""

import torch

from diffusion import NoiseProcess

DEFAULTS = {"time_conditioning": "true"}  # the network sees the noise level


def process(cfg, settings, vocab_size):
    """What train.py calls. For a noise with a mask: MyNoise(vocab_size + 1), and mask_id in the class."""
    return MyNoise(vocab_size)


class MyNoise(NoiseProcess):
    def mixing(self, alpha):
        """
        a (...), m (..., V), and their derivatives da (...), dm (..., V) in alpha, for a float tensor alpha of
        any shape (...). V is self.vocab_size. Where dm is the same for all alpha, (V,) will do.
        """
        ...
