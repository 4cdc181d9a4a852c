"""
Exercise 7: ARPC, or let the AR mode check what diffusion wrote

Tokens that are drawn together do not know of each other, so a parallel guess has mistakes. A network trained
on a mixture can find them itself: at block size 1 it gives p_AR(y_i | y_<i). Step k of T, with noise levels
a_t = alpha[k] before it and a_s = alpha[k + 1] after it (BlockGen, arXiv 2606.02241):

    y ~ D(x_0 | x_t)                        a guess at the whole block
    score_i = -log p_AR(y_i | y_<i)         by one pass over the whole guess
    the (1 - a_s) n_open worst tokens become pure noise again, the others stay y

n_open is the number of open positions of the row; halves are rounded up. The last step has a_s = 1: its
guess is the result, and needs no check. T steps take 2T - 1 passes.

Write arpc. Then:

    python -m course 7            is it right?
    python -m course 7 --run      puzzles solved by your sampler and by plain steps (it needs out/sudoku)

Think first: why must the judge be p_AR, when D has seen the whole block?
"""

import torch

from samplers.pieces import top


def arpc(block):
    """
    A generator function: fill one block, and yield after each of block.steps steps. All tensors (R, b).

    block.alpha     the steps + 1 noise levels, from 0 (pure noise) to 1 (clean)
    block.open      bool, the positions to fill; the others are given, and are no noise
    block.x         the block now; block.write(x) changes its open positions
    block.noise(k)  random numbers of step k, to be handed on
    block.reverse(alpha, a_t, a_s, noise)   one pass at noise level alpha, and a draw of the reverse step from
                    a_t to a_s. With a_s = 1.0 it is a draw of y ~ D
    block.verify(y) logits (R, b, V) of p_AR for a whole guess y: one pass
    block.process   .loo_logits(logits, block.x, 0.0) rules the mask out
    block.prior(noise)   pure noise
    top(score, n, among)  bool: the n (R,) highest scores among some positions; ties go left
    """
    ...
    yield
