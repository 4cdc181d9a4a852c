"""
Exercise 3: what does masked noise cost?

A network that fills masks gives an upper bound on -log p(x_0). At time t each masked token costs

    -alpha'_t / (1 - alpha_t)  *  -log p(x_0 | x_t)          alpha'_t is the slope of alpha in t

and a visible token costs nothing. With alpha_t = 1 - t the weight is 1 / t: few masks at small t, so each
counts more. The mean over t and over masks is the bound (MDLM, arXiv 2406.07524).

Write nll. Then:

    python -m course 3            is it right?
    python -m course 3 --run      a network that trains on your bound

Think first: a new network gives all V tokens of the text the same probability. Why is its bound log V, at
any t?
"""

import torch

from diffusion import column, pick


def nll(process, logits, x0, xt, alpha, dalpha):
    """
    What each token costs at this t, in nats (natural logarithm): float (B, L).

    process        process.mask_id is the id of the mask
    logits         (B, L, V), the network's output, not normalised. One column is the mask's; the mask is
                   never the answer: process.loo_logits(logits) puts -inf there
    x0, xt         (B, L) int64, clean and noisy
    alpha, dalpha  alpha_t and its slope alpha'_t < 0: numbers, or tensors (B,), (B, 1) or (B, L)

    Useful: column(alpha, logits) makes alpha fit (B, L). pick(x, ids) is x (B, L, V) at ids (B, L).
    """
    ...
