"""
Sequential: a language model whose noisy stream says the next few tokens at once (SDLM, arXiv 2509.24007).

A block of b tokens from position p on is fed the last clean token and b - 1 of its own, each one place before
the one it predicts:

    fed         x_p-1   y_p   ...  y_p+b-2        reads the clean tokens before p - 1, and all of the block
    predicts    x_p     x_p+1 ...  x_p+b-1        y: masks, or what is known

The clean x_p-1 itself is hidden: its copy in the block stands for it, and knows the block. Block size 1 is
the language model it was. The sampler `sdlm` keeps as many of the first tokens as it is sure of; the next
block begins right behind them. The layers and flags are those of methods/llama.py.

    python train.py config/shakespeare_char.toml --method sequential --block_sizes 1:0.25,4:0.75
    python sample.py --init_from hf:OpenGVLab/SDLM-3B-D4 --sampler sdlm --threshold 0.9
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from diffusion import pick
from generate import sampler
from methods import llama
from methods.llama import DEFAULTS, Learner, Llama, Settings
from model import KVCache, attention_mask
from rng import sharpen
from run.cli import die
from samplers.pieces import Ahead, need, write_ahead

__all__ = ["DEFAULTS", "Learner", "Settings", "begin", "check", "network"]


def check(cfg, settings):
    llama.check(cfg, settings)
    if not cfg.clean_causal:
        die("a sequential network's clean stream is token-causal", "leave --clean_causal out")


def begin(settings, state):
    """Weights of an ordinary language model may begin here: at block size 1 they are what they were."""
    llama.begin(settings, state, kinds=("llama", "sequential"))


def network(model_cfg, settings):
    return Sequential(replace(model_cfg, rope_base=settings.rope_base), settings)


class Cache(KVCache):
    """It also keeps the ids of the clean tokens, and what sdlm has written ahead of its block."""

    ids = ahead = None

    def keep(self, rows):
        super().keep(rows)
        self.ids = None if self.ids is None else self.ids[rows]
        if self.ahead is not None:
            self.ahead.keep(rows)


class Sequential(Llama):
    def new_cache(self, batch_size, max_len):
        return Cache(len(self.layers))

    def forward(self, clean, noisy, block_size, start=0, sigma=None, cache=None, window=False, **extra):
        """As Transformer.forward. window: one block, which begins at `start`, wherever that is."""
        if self.cfg.next_token:
            return super().forward(clean, noisy, block_size, start, sigma, cache, **extra)
        cache = self.new_cache(0, 0) if cache is None else cache
        clean = noisy[:, :0] if clean is None else clean
        C, n_past = clean.size(1), cache.length
        cache.ids = clean if cache.ids is None else torch.cat((cache.ids[:, :n_past], clean), dim=1)
        at, edge, group = self.layout(block_size, start, n_past, C, noisy.size(1), noisy.device)
        at, noisy_edge = at[C:], edge[:, C:]
        if window:
            noisy_edge, group = torch.full_like(noisy_edge, start), group.clone()
            group[:, C:] = start
        if at.numel() and at.max() >= self.cfg.seq_len:
            raise ValueError(f"position {int(at.max())} is beyond seq_len {self.cfg.seq_len}")
        fed = self.fed(noisy, at, noisy_edge, cache.ids)
        edge = torch.cat((edge[:, :C], (noisy_edge - 1).clamp(min=0)), dim=1)
        before = torch.arange(n_past, n_past + C, device=at.device)
        rope = self.rope(torch.cat((before, (at - 1).clamp(min=0))))
        mask, x = attention_mask(edge, group, n_past + C)[:, None], self.embed(torch.cat((clean, fed), dim=1))
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, mask, None, cache, i)
        cache.commit(C)
        return self.to_logits(x[:, C:])

    def fed(self, noisy, at, edge, text):
        """
        x_p-1, y_p, ..., y_p+b-2 of blocks that begin at p: what stands one place before each noisy token,
        (B, N) ids, at a block's edge the last of the clean text (B, n). Before position 0 stands the last id.
        """
        first = at == edge  # (B or 1, N): the first token of its block
        if not first[:, :1].all() or int(at[first.any(0)].max()) > text.size(1):
            raise ValueError("a sequential network reads whole blocks, and the clean token before each")
        last = F.pad(text, (1, 0), value=self.cfg.vocab_size - 1)[:, at.clamp(max=text.size(1))]
        return torch.where(first, last, noisy.roll(1, dims=1))


class Sure(Ahead):
    def __init__(self, block, threshold):
        super().__init__(block)
        self.threshold = threshold

    def further(self, r):
        """The next tokens of row r, as many as it is sure of, and one at least."""
        cache, n, W = self.caches[r], int(self.n[r]), self.tokens.size(1)
        b = min(self.b, self.model.cfg.seq_len - n)
        pure = torch.full((1, b), self.process.mask_id, device=self.tokens.device)
        text = self.tokens[r : r + 1, cache.length : n]
        logits = self.model(text, pure, b, start=n, cache=cache, window=True)
        logl = self.process.loo_logits(logits, pure, 0.0)
        if self.temperature == 0:
            y, sure = logl.argmax(-1), logl.log_softmax(-1)
        else:
            noise = self.noise(r, n, b)
            y = self.process.posterior_sample(logl, pure, 0.0, 1.0, self.temperature, self.top_p, noise)
            sure = sharpen(logl.double(), self.temperature, self.top_p).log_softmax(-1)
        m = int((pick(sure, y)[0].exp() > self.threshold).int().cumprod(0).sum().clamp(min=1, max=W - n))
        self.tokens[r, n : n + m] = y[0, :m]
        self.n[r] = n + m
        return text.size(1) + b


@sampler("absorbing", "own pace")
def sdlm(block, *, threshold=0.9):
    """
    SDLM (arXiv 2509.24007), for networks of --method sequential: predict as many tokens as a block has, right
    behind the text; keep the first ones whose probability is above the threshold, and one at least. The next
    block begins behind them. Temperature 0 is the published loop.

    threshold: 1 keeps one token a pass, 0 all
    """
    need(0 <= threshold <= 1, "threshold", threshold, "between 0 and 1")
    if not isinstance(block.model, Sequential):
        raise ValueError("sdlm is not defined for this network: it is for networks of --method sequential")
    if block.cache is None:
        raise ValueError(
            "sdlm writes ahead of its block, and keeps that in the cache: use_cache must be True"
        )
    block.cache.ahead = block.cache.ahead or Sure(block, threshold)
    yield from write_ahead(block, block.cache.ahead)
