"""
Exercise 6: text without reading it again

Text is made block by block. The clean tokens before a block never change, and never read what comes later.
So their keys and values can be kept: the KV cache. A pass brings keys of its new clean tokens, and of the
noisy block behind them:

    cache      k k k k          4 committed tokens: self.length = 4
    this pass  c c n n          2 new clean tokens, then 2 noisy ones
    it reads   k k k k c c n n

After the pass the network commits the clean ones: self.length becomes 6. The noisy ones were a guess: they
may still be in the list, but the next pass must not read them. A length that is set back forgets more.

Write extend. Then:

    python -m course 6            is it right?
    python -m course 6 --run      sudokus with your cache and without (it needs out/sudoku)

Think first: why is this exact only if clean tokens read clean tokens alone?
"""

import torch


def extend(self, i, k, v):
    """
    Keys and values that layer i reads: those committed, then those of this pass. Keep what you will need.

    self     self.k and self.v: lists with an entry for each layer, None at first
             self.length: how many tokens are committed, in all layers alike. Do not change it here: the
             layers that follow in this pass need it too
    k, v     (B, H, n, D/H) keys and values of this pass's n tokens
    Returns (keys, values), each (B, H, self.length + n, D/H).
    """
    ...
