"""
Exercise 4: one step back with uniform noise

The noisy token is z = x_t. We want x_s at an earlier time s < t, so alpha_s > alpha_t. By Bayes, for each v:

    q(x_s = v | x_t = z)  is proportional to  q(x_s = v) q(x_t = z | x_s = v)

    q(x_s = v)            = alpha_s l(v) + (1 - alpha_s) / V
    q(x_t = z | x_s = v)  = a 1[v = z] + (1 - a) / V            a = alpha_t / alpha_s

l is the leave-one-out prediction: p(x_0) from all tokens but z itself. What z says of x_0 comes in with the
second factor, once. (UDLM, arXiv 2412.10193; l and D: arXiv 2605.22765.)

Write the last lines of posterior_probs. Then:

    python -m course 4            is it right?
    python -m course 4 --run      sudokus made with your step (it needs out/sudoku_uniform)

Think first: D, the prediction that has seen z, is at hand too. What goes wrong if it stands in l's place?
"""

import torch
import torch.nn.functional as F

from diffusion import column
from rng import sharpen


def posterior_probs(process, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
    """
    q(x_s | x_t): float64 (B, L, V). Each row of V probabilities sums to 1.

    process           Uniform noise; process.vocab_size is V
    logits            (B, L, V), the network's output. process.predicts says whether it means l or D
    xt                (B, L) int64
    alpha_t, alpha_s  numbers, or tensors (B,), (B, 1) or (B, L)
    """
    V = process.vocab_size
    a_t, a_s = column(alpha_t, xt)[..., None], column(alpha_s, xt)[..., None]  # each fits (B, L, V)
    l = process.loo_logits(logits.double(), xt, a_t[..., 0])  # logits of l, whatever the network predicts
    l = sharpen(l, temperature, top_p).softmax(-1)  # (B, L, V)
    z = F.one_hot(xt, V).double()  # (B, L, V): 1[v = z]
    ...
