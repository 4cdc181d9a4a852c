"""
Trimode: one network that writes from left to right, that writes in blocks, and that checks its blocks from
left to right (Nemotron-Labs-Diffusion: A Tri-Mode Language Model, technical report, NVIDIA 2026).

    logits of token i  =  head(h of clean i - 1)      at block size 1: the language model that it is
                          head(h of noisy i)          in a larger block: at the mask itself

One head serves both. The clean stream is token-causal. At block size 1 the very first token has none before
it: it is read at its own mask. The layers and flags are those of methods/llama.py. The paper's loss, masks
and next tokens together, is a mixture of block sizes:

    python train.py config/shakespeare_char.toml --method trimode --block_sizes 1:0.5,16:0.5
    python sample.py --init_from hf:nvidia/Nemotron-Labs-Diffusion-3B --sampler nemotron
    python sample.py --ckpt out/run --sampler linear_speculation --temperature 0

A block need not begin at a multiple of its size. With the text in a cache, model(None, block, None, start=n)
reads one that begins at position n.
"""

import math
from dataclasses import replace

import torch

from diffusion import pick
from generate import sampler
from methods import llama
from methods.llama import DEFAULTS, Learner, Llama, Settings
from methods.shifted import ShiftedCache
from run.cli import die
from samplers.pieces import Ahead, made_by, need, top, write_ahead

__all__ = ["DEFAULTS", "Learner", "Settings", "begin", "check", "network"]


def check(cfg, settings):
    llama.check(cfg, settings)
    if not cfg.clean_causal:
        die("a trimode network's clean stream is token-causal", "leave --clean_causal out")
    if cfg.next_token:
        die("a trimode network has two streams", "leave --next_token out: block size 1 reads the next token")


def begin(settings, state):
    """Weights of an ordinary language model may begin here: at block size 1 they are what they were."""
    llama.begin(settings, state, kinds=("llama", "trimode"))


def network(model_cfg, settings):
    return Trimode(replace(model_cfg, rope_base=settings.rope_base), settings)


class Cache(ShiftedCache):
    """It also keeps what was written ahead of the block."""

    ahead = None  # an Ahead

    def keep(self, rows):
        super().keep(rows)
        if self.ahead is not None:
            self.ahead.keep(rows)


class Trimode(Llama):
    def new_cache(self, batch_size, max_len):
        return Cache(len(self.layers))

    def forward(self, clean, noisy, block_size, start=0, sigma=None, cache=None, **extra):
        """As Transformer.forward. block_size None: the noisy tokens are one block, wherever it begins."""
        C, n_past = 0 if clean is None else clean.size(1), 0 if cache is None else cache.length
        both, _ = self.hidden(clean, noisy, block_size, start, None, cache, **extra)
        before, h = both[:, :C] if cache is None else cache.remember(both[:, :C], n_past), both[:, C:]
        if block_size is None:
            return self.to_logits(h)
        start, at = torch.as_tensor(start, device=h.device), torch.arange(h.size(1), device=h.device)
        position = start if start.dim() else start + at
        b = torch.as_tensor(block_size, device=h.device)
        by_next = (b if b.dim() == 2 else b.view(-1, 1)).eq(1) & (position > 0)  # (B or 1, N)
        if by_next.any() and int(position[by_next.any(0)].max()) > before.size(1):
            raise ValueError("block size 1 of a trimode network reads the clean token before each")
        source = torch.where(by_next, position - 1, before.size(1) + at)
        return self.to_logits(torch.cat((before, h), dim=1).gather(1, source[..., None].expand(*h.shape)))

    def layout(self, block_size, start, n_past, C, N, device):
        """As Transformer.layout. block_size None: the noisy tokens are one block, which begins at start."""
        if block_size is not None:
            return super().layout(block_size, start, n_past, C, N, device)
        position, edge, group = super().layout(1, start, n_past, C, N, device)
        edge[:, C:], group[:, C:] = start, start
        return position, edge, group


# ----- the published loops


class InBlocks(Ahead):
    """What both samplers need. `work`: the block of each row, (1, b) ids with masks in it, or None."""

    def __init__(self, block, threshold):
        super().__init__(block)
        self.threshold, self.work, self.steps = threshold, [None] * len(self.tokens), [0] * len(self.tokens)

    def keep(self, rows):
        super().keep(rows)
        self.work, self.steps = ([kept[i] for i in rows.tolist()] for kept in (self.work, self.steps))

    def begin_block(self, r, first, size):
        """A block of row r: the token `first`, then masks."""
        self.work[r], self.steps[r] = torch.full((1, size), self.process.mask_id, device=first.device), 0
        self.work[r][:, 0] = first

    def masks(self, r):
        return self.work[r] == self.process.mask_id

    def draw(self, r, logits, start, step=0):
        """Tokens (1, N) for positions from `start` on. Step 0 has the random numbers of `ar`."""
        noise = self.noise(r, start, logits.size(1), step)
        pure = torch.full(logits.shape[:2], self.process.mask_id, device=logits.device)
        return self.process.posterior_sample(logits, pure, 0.0, 1.0, self.temperature, self.top_p, noise)

    def next_tokens(self, r, text, start):
        """
        A causal pass over text (1, C), which stands behind the cache: what `ar` writes at each position from
        `start` to the one behind the text, given what stands before it; and how many tokens the pass had.
        """
        C, cache = text.size(1), self.caches[r]
        pure = torch.full((1, cache.length + C + 1 - start), self.process.mask_id, device=text.device)
        logits = self.model(text, pure, 1, start=start, cache=cache)
        return self.draw(r, self.process.loo_logits(logits, pure, 0.0), start), C + pure.size(1)

    def denoise(self, r, start, step):
        """
        One pass of the block of row r. It writes the surest token, and all whose probability reaches the
        threshold. Returns the tokens of the pass.
        """
        work, masks = self.work[r], self.masks(r)
        logits = self.model(None, work, None, start=start, cache=self.caches[r])
        logits = self.process.loo_logits(logits, work, 0.0)
        y = self.draw(r, logits, start, step)
        sure = pick(logits.log_softmax(-1), y)  # before the temperature
        keep = (masks & (sure.exp() >= self.threshold)) | top(sure, 1, masks)
        self.work[r] = torch.where(keep, y, work)
        return work.size(1)

    def write(self, r, y):
        """y (1, m) behind the text of row r, as far as it goes."""
        n, W = int(self.n[r]), self.tokens.size(1)
        m = min(y.size(1), W - n)
        self.tokens[r, n : n + m] = y[0, :m]
        self.n[r] = n + m


class Denoising(InBlocks):
    def further(self, r):
        """A causal pass over the text, which says a block's first token; then passes over the block."""
        n = int(self.n[r])
        if self.work[r] is None:
            first, spent = self.next_tokens(r, self.tokens[r : r + 1, self.caches[r].length : n], n)
            self.begin_block(r, first[:, 0], min(self.b, self.model.cfg.seq_len - n))
        else:
            self.steps[r] += 1
            spent = self.denoise(r, n, self.steps[r])
        if not self.masks(r).any():
            self.write(r, self.work[r])
            self.work[r] = None
        return spent


@sampler("AR mode", "absorbing", "own pace")
def nemotron(block, *, threshold=0.9):
    """
    `generate` of Nemotron-Labs-Diffusion (NVIDIA 2026), for networks of --method trimode. A block begins
    right behind the text. Its first token is what AR sampling writes there; the rest are masks. Each pass
    writes the surest token, and all whose probability reaches the threshold. Then the text is read again,
    causally. Temperature 0 is the published loop. Confidence is that before the temperature.

    threshold: above 1 one token a pass; 0 the whole block in one
    """
    need(0 <= threshold < math.inf, "threshold", threshold, "at least 0")
    yield from ahead_of(block, Denoising, threshold)


class Speculating(InBlocks):
    def further(self, r):
        """The text, once; then in turn: draft a block behind the last token, and check it causally."""
        cache, n = self.caches[r], int(self.n[r])
        if cache.length == 0:
            y, spent = self.next_tokens(r, self.tokens[r : r + 1, cache.length : n], n)
            self.write(r, y)
            return spent
        if self.work[r] is None:
            self.begin_block(r, self.tokens[r, n - 1], min(self.b, self.model.cfg.seq_len - n))
        if self.masks(r).any():
            return self.denoise(r, n - 1, 0)
        drafts, self.work[r] = self.work[r], None
        own, spent = self.next_tokens(r, drafts, n)
        m = int((own[:, :-1] == drafts[:, 1:]).int().cumprod(1).sum())  # drafts that stay
        cache.length = n + m  # the last token is not in it
        self.write(r, own[:, : m + 1])
        return spent


@sampler("AR mode", "absorbing", "own pace", "any block")
def linear_speculation(block, *, threshold=0.0):
    """
    `linear_spec_generate` of Nemotron-Labs-Diffusion (NVIDIA 2026), for networks of --method trimode: the
    text of --sampler ar, token for token. The last token and masks are a block, read in both directions: it
    says drafts. A causal pass checks them. Those that AR sampling would write stay, and one token of its own
    behind them. Text and drafts are drawn with the same random numbers.

    threshold: 0 drafts in one pass; else as in `nemotron`
    """
    need(0 <= threshold < math.inf, "threshold", threshold, "at least 0")
    yield from ahead_of(block, Speculating, threshold)


def ahead_of(block, kind, threshold):
    block.need_ar_mode()
    made_by(isinstance(block.model, Trimode), "trimode")
    if block.cache is None:
        raise ValueError("it writes ahead of its block, and keeps that in the cache: use_cache must be True")
    block.cache.ahead = block.cache.ahead or kind(block, threshold)
    yield from write_ahead(block, block.cache.ahead)
