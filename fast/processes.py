"""
The noise processes of diffusion.py made fast: the same numbers, without probabilities over the whole
vocabulary.

Losses by kernels.py, the reverse step by draws.py. Only the exact types Masked and Uniform have such a form;
a subclass of theirs, or any other process, keeps its own members.
"""

import math

import torch

import diffusion
from diffusion import Masked, Uniform
from fast.draws import sample, settle
from kernels import cross_entropy, send, uniform_nll, wide
from rng import Noise, float64, sharpen


def accelerate(process):
    """The fast form of a process, or the process itself where there is none."""
    form = {Masked: FastMasked, Uniform: FastUniform}.get(type(process))
    return form(**process.arguments()) if form else process


def plain(process):
    """The process of diffusion.py that a fast one stands for."""
    form = {FastMasked: Masked, FastUniform: Uniform}.get(type(process))
    return form(**process.arguments()) if form else process


def column(alpha, like):
    """diffusion.column, but the host does not wait for a device. What comes from here column leaves alone."""
    alpha = torch.as_tensor(alpha, dtype=None if torch.is_tensor(alpha) else torch.float64)
    return diffusion.column(send(alpha, like.device, float64(like.device)), like)


def flat(logits, *others):
    """Rows of logits (B, L, V) -> (B L, V), and what broadcasts to (B, L) -> (B L,)."""
    return logits.flatten(0, 1), *(x.expand(logits.shape[:2]).flatten() for x in others)


def reverse_step(process, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0, noise=None, where=None):
    """
    posterior_sample, (B, L) int64. logits: (B, L, V), or a function that is told (B, L) bool, on the CPU, of
    which tokens they matter, and returns theirs, (M, V): the random numbers settle many a token without them.
    where (B, L) bool: x_t elsewhere.
    """
    a_t, a_s, key = (
        column(alpha_t, xt).expand(xt.shape),
        column(alpha_s, xt),
        (noise or Noise.like(xt)).keys(),
    )
    mixture = torch.stack([x.expand(xt.shape) for x in process.mixture(xt, a_t, a_s)], -1)
    x, key, mixture, a_t = (y.flatten(0, 1) for y in (xt, key, mixture, a_t))  # a row a token
    token = settled = None
    if callable(logits):
        settled = settle(key, x, mixture, process.vocab_size)
        token, asked = settled[0], settled[1].view_as(xt)
        asked = (asked if where is None else asked & where).cpu()  # once: the host decides what is run
        logits, index = logits(asked), send(asked.flatten().nonzero()[:, 0], x.device)
        x, key, mixture, a_t, *settled = (y[index] for y in (x, key, mixture, a_t, *settled))
    ordinary = 1e-30 <= temperature <= 1e30 and top_p == 1  # float32 divides by these
    how = (
        {"temperature": temperature} if ordinary else {"transform": lambda z: sharpen(z, temperature, top_p)}
    )
    drawn = sample(
        logits.flatten(0, -2), key, xt=x, mixture=mixture, **how, **process.logit_edit(a_t), settled=settled
    ).token
    token = (drawn if token is None else token.index_copy(0, index, drawn)).view_as(xt)
    return token if where is None else torch.where(where, token, xt)


class FastMasked(Masked):
    posterior_sample = reverse_step

    def loo_logits(self, logits, xt=None, alpha=None):
        logits = torch.empty_like(logits, dtype=wide(logits)).copy_(logits)
        logits[..., self.mask_id] = -math.inf  # no id that would have to be sent to a device
        return logits

    def log_q(self, xt, x0, alpha):
        a = column(alpha, xt)
        return (a * (xt == x0) + (1 - a) * (xt == self.mask_id)).log()

    def posterior_probs(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
        a_t, a_s = column(alpha_t, xt), column(alpha_s, xt)
        return super().posterior_probs(logits, xt, a_t, a_s, temperature, top_p)

    def ce(self, logits, x0, xt, alpha=None, overwrite=False):
        rows, x0_, masked = flat(logits, x0, xt == self.mask_id)
        return cross_entropy(rows, x0_, masked, self.mask_id, overwrite)[0].view_as(x0)

    last_step = ce  # D is l at masks, and certain elsewhere

    def nll(self, logits, x0, xt, alpha, dalpha, overwrite=False):
        weight = -column(dalpha, logits) / (1 - column(alpha, logits))
        # alpha = 1 masks nothing
        rows, x0_, weight = flat(logits, x0, torch.where(xt == self.mask_id, weight, 0.0))
        return cross_entropy(rows, x0_, weight, self.mask_id, overwrite)[0].view_as(x0)

    def mixture(self, xt, a_t, a_s):
        """
        (seen, rest, fresh, stay) of draws.sample: posterior_probs in numbers. A mask stays with probability
        (1 - alpha_s) / (1 - alpha_t), a token always.
        """
        masked = xt == self.mask_id
        return (
            torch.zeros_like(a_t),
            torch.where(masked, 1 - a_t, 1.0),
            torch.zeros_like(a_t),
            torch.where(masked, 1 - a_s, 1.0),
        )

    def logit_edit(self, a_t):
        """loo_logits for draws.sample."""
        return {"forbidden": self.mask_id}


class FastUniform(Uniform):
    posterior_sample = reverse_step

    def shifted(self, logits, xt, alpha, sign):
        return super().shifted(logits, xt, column(alpha, logits), sign)

    def log_q(self, xt, x0, alpha):
        a = column(alpha, xt)
        return (a * (xt == x0) + (1 - a) / self.vocab_size).log()

    def posterior_probs(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
        a_t, a_s = column(alpha_t, xt), column(alpha_s, xt)
        return super().posterior_probs(logits, xt, a_t, a_s, temperature, top_p)

    def ce(self, logits, x0, xt, alpha=None, overwrite=False):
        rows, x0_ = flat(logits, x0)
        return cross_entropy(rows, x0_, overwrite=overwrite)[0].view_as(x0)

    def last_step(self, logits, x0, xt, alpha, overwrite=False):
        return self.ce(self.denoiser_logits(logits, xt, alpha), x0, xt, overwrite=overwrite)

    def nll(self, logits, x0, xt, alpha, dalpha, overwrite=False):
        a, da = column(alpha, logits), column(dalpha, logits)
        shift = self.evidence(a) if self.predicts == "denoiser" else torch.zeros_like(a)
        return uniform_nll(
            *flat(logits, x0, xt, a, da), shift=flat(logits, shift)[1], overwrite=overwrite
        ).view_as(x0)

    def mixture(self, xt, a_t, a_s):
        """
        (seen, rest, fresh, stay) of draws.sample: posterior_probs in numbers; alpha_t / alpha_s - alpha_t =
        alpha_t (1 / alpha_s - 1).
        """
        return self.vocab_size * a_t, 1 - a_t, (1 - a_t / a_s) * (1 - a_s), a_t * (1 / a_s - 1)

    def logit_edit(self, a_t):
        """loo_logits for draws.sample."""
        return {"shift": self.evidence(a_t)} if self.predicts == "denoiser" else {}
