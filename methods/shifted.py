"""
Shifted: a network that says at position i what stands at position i + 1, in the noisy stream too.

    logits of noisy i  =  head(h of noisy i - 1)      inside a block
                          head(h of clean i - 1)      for the first token of a block

A language model is trained to say the next token. An adaptation that keeps this habit needs less training
(Dream, arXiv 2508.15487). Fast-dLLM v2 (2509.26328) does so with blocks; its weights are read into this
network. The clean token before a block reads nothing of the block, so nothing leaks. The very first position
has none before it, and is read where it stands.

    python train.py config/shakespeare_char.toml --method shifted --block_sizes 16:1 --clean_causal false

The layers, and the flags, are those of methods/llama.py.
"""

from dataclasses import replace

import torch

from methods import llama
from methods.llama import DEFAULTS, Learner, Llama, Settings, check
from model import KVCache

__all__ = ["DEFAULTS", "Learner", "Settings", "begin", "check", "network"]


def begin(settings, state):
    """Weights of an ordinary language model may begin here: they read position i at i - 1 too."""
    llama.begin(settings, state, kinds=("llama", "shifted"))


def network(model_cfg, settings):
    return Shifted(replace(model_cfg, rope_base=settings.rope_base), settings)


class ShiftedCache(KVCache):
    """It also keeps what the last layer says of each clean token, (B, clean tokens, D)."""

    states = None

    def remember(self, h, n_past):
        """All clean states, of which h (B, C, D) are new, behind n_past older ones."""
        self.states = h if self.states is None else torch.cat((self.states[:, :n_past], h), dim=1)
        return self.states

    def keep(self, rows):
        super().keep(rows)
        self.states = None if self.states is None else self.states[rows]


class Shifted(Llama):
    def new_cache(self, batch_size, max_len):
        return ShiftedCache(len(self.layers))

    def forward(self, clean, noisy, block_size, start=0, sigma=None, cache=None, **extra):
        """As Transformer.forward. The noisy tokens of a block come together, its first one first."""
        if self.cfg.next_token:
            return super().forward(clean, noisy, block_size, start, sigma, cache, **extra)
        n_clean, n_past = 0 if clean is None else clean.size(1), 0 if cache is None else cache.length
        h, _ = self.hidden(clean, noisy, block_size, start, None, cache, **extra)
        before, h = h[:, :n_clean], h[:, n_clean:]
        before = before if cache is None else cache.remember(before, n_past)
        return self.to_logits(self.one_before(before, h, block_size, start))

    def one_before(self, clean, noisy, block_size, start):
        """
        h of noisy i - 1, or of clean i - 1 for the first token of a block, (B, N, D). clean (B, .., D), noisy
        (B, N, D).
        """
        B, N, D = noisy.shape
        at, start = torch.arange(N, device=noisy.device), torch.as_tensor(start, device=noisy.device)
        position = start if start.dim() else start + at
        b = torch.as_tensor(block_size, device=noisy.device)
        is_first = position % (b if b.dim() == 2 else b.view(-1, 1)) == 0  # (B or 1, N)
        if not is_first[:, :1].all():
            raise ValueError("a shifted network reads blocks from their first token on")
        source = clean.size(1) + torch.where(is_first, at, at - 1)
        source = torch.where(is_first & (position > 0), position - 1, source)
        return torch.cat((clean, noisy), dim=1).gather(1, source[..., None].expand(B, N, D))
