"""
Exercise 5: which block size, and which time, for each row of a batch?

A mixture such as {1: 0.25, 16: 0.75} says what share of the rows is trained with each block size. Independent
draws would do on average. Stratified draws do better: less varies from step to step, and the mean is the same
(MDLM, arXiv 2406.07524, draws times so; BlockGen, 2606.02241, mixes sizes).

For each step of n rows:

    sizes   a size of weight w gets n w rows, rounded up or down; on average over the steps exactly n w
    times   cut (0, 1) into k equal slices, k the number of rows with this size: one time in each slice, at a
            random place in it; each size has slices of its own
    order   shuffled: a row's place in the batch says nothing of its size or time

Write stratified_draw. Then:

    python -m course 5            is it right?
    python -m course 5 --run      what stratifying saves, and a network that trains with your draws

Think first: how can n w = 1.2 rows be 1.2 on average, and never 0 or 3?
"""

import torch

from rng import Noise


def stratified_draw(block_sizes, n, seed, step):
    """
    Block sizes (n,) int64 and times (n,) float64 in (0, 1), for the n rows of one step.

    block_sizes   {size: weight}, the weights sum to 1
    seed, step    the same seed and step give the same draw, other steps other draws. Here is a table of
                  random numbers in (0, 1] that does so; a torch.Generator with a seed will do too
    """
    u = Noise(seed, torch.tensor([-1]), torch.arange(n), step).uniform(3)[0]  # (n, 3)
    ...
