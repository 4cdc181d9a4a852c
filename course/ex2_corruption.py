"""
Exercise 2: how does a token become noise?

Every token alone, with alpha from 1 (clean) to 0 (pure noise):

    masked    x_t = x_0 with probability alpha, else the mask
    uniform   x_t = x_0 with probability alpha, else a token drawn uniformly from all V

Both are q(x_t | x_0) = alpha onehot(x_0) + (1 - alpha) pi. A uniformly drawn token can be x_0 again.

Write corrupt, for both kinds of noise. Then:

    python -m course 2            is it right?
    python -m course 2 --run      a text on its way into noise, and a network that trains on your noise

Think first: with uniform noise and V = 4, how often is x_t = x_0 at alpha = 0.5?
"""

import torch

from diffusion import column


def corrupt(process, x0, alpha, noise):
    """
    A draw of q(x_t | x_0): int64 (B, L).

    process   has vocab_size (V), and mask_id: the id of the mask, or None for uniform noise
    x0        (B, L) int64, clean
    alpha     a number, or a tensor (B,), one a row, or (B, 1), or (B, L)
    noise     noise.uniform(n) gives (B, L, n) random numbers in (0, 1]; another call gives new ones

    Useful: column(alpha, x0) makes any of these alphas fit x0.
    """
    ...
