"""
Exercise 1: who may read whom?

The network reads clean tokens and noisy tokens together. With block size b (see the top of model.py):

    clean at i  reads  clean at j   if  j <= i
    noisy at i  reads  clean at j   if  j // b <  i // b     everything before its own block
                       noisy at j   if  j // b == i // b     its own block, in both directions

A clean token never reads a noisy one. The network has done the divisions for you: a token reads the clean
tokens before its `edge`, and the noisy tokens of its `group`. With b = 2 and four positions:

    token    clean 0 1 2 3     noisy 0 1 2 3
    edge           1 2 3 4           0 0 2 2
    group         -1 -1 -1 -1        p p q q      p and q are two numbers >= 0

Write attention_mask. Then:

    python -m course 1            is it right?
    python -m course 1 --run      the picture for three block sizes, and a network that trains with your rule

Think first: what would a noisy token learn if it could read its own clean copy?
"""

import torch


def attention_mask(edge, group, n_clean_keys):
    """
    Who may read whom: bool (B, S, n_clean_keys + N), True where the token of the row may read the column.

    edge, group (B, S) int64: of the S tokens that read, clean ones first. Columns: the clean tokens
    0 .. n_clean_keys - 1 (with a cache there are more of them than in `edge`), then the N noisy tokens.
    The N noisy tokens are those with group >= 0; they are the same ones in every row of the batch.
    """
    ...
