"""
Duo: uniform noise is the argmax of a Gaussian, so training may begin on the Gaussian, which tells more.

    python train.py config/sudoku_uniform.toml --method duo

    w_t = a_t onehot(x_0) + s_t n      n ~ N(0, I_V),  a_t^2 = sigmoid(-gamma_t),  s_t^2 = sigmoid(gamma_t)
    argmax w_t  is distributed as q(x_t | x_0) of uniform noise with alpha_t = T(gamma_t)

The curriculum feeds the network soft tokens softmax(w_t / tau), mixtures of embeddings that still carry some
of x_0, and takes the uniform loss at the hard x_t = argmax w_t: the bound, with --objective elbo, as
published; with ce, which needs no x_t, the network learns p(x_0 | soft tokens). Afterwards, and in every
evaluation and sample, it is ordinary uniform noise.

The Diffusion Duality, arXiv 2506.10892; its efficient form from Chapter II, arXiv 2602.21185. Letters as in
diffusion.py.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import methods
from rng import Noise
from run.cli import die

# ----- from Gaussian noise to uniform noise


def transform(gamma, vocab_size):
    """
    alpha = T(gamma), and dT / dgamma, float64 of gamma's shape:
        P = Prob[argmax w = x_0] = ∫ phi(z - mu) Phi(z)^(V - 1) dz,   mu = a / s = exp(-gamma / 2)
        T = (V P - 1) / (V - 1)
    phi and Phi are the normal density and distribution; z is the value of x_0's own entry in units of s. The
    trapezoid rule converges geometrically on such integrands: 321 points give 1e-13 up to V = 1e9, in a
    millisecond, so no table is kept.
    """
    mu = (-gamma.double() / 2).exp()[..., None]
    x = torch.arange(-160, 161, dtype=torch.float64, device=gamma.device) / 16  # z - mu in [-10, 10]
    mass = (-x * x / 2 + (vocab_size - 1) * torch.special.log_ndtr(mu + x)).exp() / (
        16 * math.sqrt(2 * math.pi)
    )
    P, dP = mass.sum(-1), (mass * x).sum(-1)  # d phi(z - mu) / d mu = (z - mu) phi(z - mu)
    scale = vocab_size / (vocab_size - 1)
    return (scale * P - 1 / (vocab_size - 1)).clamp(min=0), scale * dP * (-mu[..., 0] / 2)


@functools.cache
def gamma_of(alpha, vocab_size):
    """The gamma with T(gamma) = alpha, by bisection. T falls from 1 to 0."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if transform(torch.tensor(middle, dtype=torch.float64), vocab_size)[0] > alpha
            else (low, middle)
        )
    return low


def _normal(u):
    """Standard normal numbers from uniform ones. 0 and 1, which rounding can give, would be infinite."""
    return torch.special.ndtri(u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps / 2))


# ----- soft tokens


def soften(x0, gamma, vocab_size, tau, noise):
    """
    Soft tokens in full: softmax(w_t / tau) (B, L, V) and argmax w_t (B, L). x0 (B, L), gamma (B,), noise: a
    Noise for (B, L). V random numbers a token: the definition, for reading, for tests and for small
    vocabularies.
    """
    gamma = gamma[:, None, None].double().to(x0.device)
    w = gamma.sigmoid().sqrt() * _normal(noise.uniform(vocab_size))
    w.scatter_add_(-1, x0[..., None], (-gamma).sigmoid().sqrt().expand(*x0.shape, 1))
    return (w / tau).softmax(-1), w.argmax(-1)


def soften_top(x0, gamma, vocab_size, tau, k, noise):
    """
    The same from k entries of w_t, without the others: that of x_0 and the k - 1 largest among the V - 1 of
    other tokens. Returns ids (B, L, k), different ones, x_0 first; their weights (B, L, k); argmax w_t (B,
    L). 2 <= k <= V.

    Largest of m = V - 1 uniform numbers: u_1 = U^(1/m), the next u_2 = u_1 U^(1/(m - 1)), and so on; Phi^-1
    makes them normal. The rest is V - k normal numbers below the last, c: only their share of the normaliser
    is needed, and taken at its mean,
        log E[exp(s g / tau) | g < c] = s c / tau - c^2 / 2 + log(erfcx((s / tau - c) / sqrt 2) / 2) - log
        Phi(c)
    Their embeddings are left out: the weights then sum to less than 1. At tau = 1e-3 and k = 4 by less than
    1e-5 on average; k = 2 blurs the weights (the mean of the rest is owed to rare large ones), and a large
    tau leaves most out (docs/duo.md). Both x_t and the kept entries are exact: x_0 is always among them, so
    the argmax of V entries is the argmax of k. (The published code puts x_0 in the place of the last kept
    entry when larger than that, and takes it for the argmax then, which it need not be if k > 1.)
    """
    V, gamma = vocab_size, gamma[:, None].double().to(x0.device)
    a, s = (-gamma).sigmoid().sqrt(), gamma.sigmoid().sqrt()  # (B, 1)
    u, pick = noise.uniform(2 * k - 1).split((k, k - 1), dim=-1)
    left = V - 1 - torch.arange(k - 1, device=u.device)  # of how many numbers each is the largest
    log_u = (u[..., 1:].log() / left).cumsum(-1)
    # by way of 1 - u: near 1, where the largest of many are, u has no digits left
    g = -_normal(-log_u.expm1())
    # (B, L, k)
    value = torch.cat((a[..., None] + s[..., None] * _normal(u[..., :1]), s[..., None] * g), dim=-1)

    ids = [x0]
    for j in range(k - 1):  # which tokens: the r-th of those not yet taken
        r = (pick[..., j] * (V - 1 - j)).long().clamp(max=V - 2 - j)
        for taken in torch.stack(ids).sort(0).values:
            r = r + (r >= taken)
        ids.append(r)
    ids = torch.stack(ids, dim=-1)

    log_weight, c = value / tau, g[..., -1]
    tail = (
        s * c / tau
        - c * c / 2
        + (torch.special.erfcx((s / tau - c) / math.sqrt(2)) / 2).log()
        - torch.special.log_ndtr(c)
    )
    tail = tail + (math.log(V - k) if V > k else -math.inf)
    log_total = torch.cat((log_weight, tail[..., None]), dim=-1).logsumexp(-1, keepdim=True)
    return ids, (log_weight - log_total).exp(), ids.gather(-1, value.argmax(-1, keepdim=True))[..., 0]


# ----- the curriculum


def tau_at(step, steps, tau, tau_end):
    """The temperature at a step of the curriculum: from tau to tau_end, evenly in its logarithm."""
    return tau * (tau_end / tau) ** (step / steps)


class Relaxation:
    """
    Corruption during the curriculum: soft noisy tokens. process: the Uniform that goes on afterwards. tau:
    temperature;
    k: entries of w_t that are simulated, 0 for all V (as is k > V); dtype: of the weights of soft tokens.
    alpha runs over (alpha_1, alpha_0) as gamma runs evenly: the published ranges of gamma, [-3.55, -1.85] for
    V = 50257 and [-3.5, -1.75] for V = 30522, are those where alpha goes from 0.95 to 0.05, which says it for
    every V.
    """

    def __init__(self, process, tau=1e-3, k=4, alpha_0=0.95, alpha_1=0.05, dtype=torch.float32):
        assert k == 0 or k >= 2, f"k = {k}: x_0's entry and the largest other make 2"
        self.process, self.tau, self.k, self.dtype = process, tau, k if k < process.vocab_size else 0, dtype
        self.gamma_0, self.gamma_1 = (gamma_of(alpha, process.vocab_size) for alpha in (alpha_0, alpha_1))

    def __call__(self, x0, t, noise=None):
        """
        What token_loss takes as `corrupt`: x_t (B, L), feed, alpha (B,), dalpha / dt (B,) for x0 (B, L) and
        times t (B,).
        """
        soft, xt, alpha, dalpha = self.corrupt(x0, t, noise)
        return xt, lambda ids, plain: self.harden(soft, ids, plain), alpha, dalpha

    def corrupt(self, x0, t, noise=None):
        """
        (soft tokens as model.embed_tokens takes them, x_t (B, L), alpha (B,), dalpha / dt (B,)) for x0 (B, L)
        and times t (B,).
        """
        noise, V, device = noise or Noise.like(x0), self.process.vocab_size, x0.device
        if device.type == "mps":  # Apple's GPUs have neither float64 nor Phi^-1: drawn on the CPU
            x0, noise = x0.cpu(), noise.to("cpu")
        gamma = self.gamma_0 + (self.gamma_1 - self.gamma_0) * t
        alpha, slope = transform(gamma, V)
        if self.k:
            ids, weights, xt = soften_top(x0, gamma, V, self.tau, self.k, noise)
            soft = (ids.to(device), weights.to(self.dtype).to(device))
        else:
            weights, xt = soften(x0, gamma, V, self.tau, noise)
            soft = weights.to(self.dtype).to(device)
        noise.to(device)
        return soft, xt.to(device), alpha, slope * (self.gamma_1 - self.gamma_0)

    def harden(self, soft, ids, where):
        """Soft tokens, but plain ids (B, L) at `where` (B, L) bool: prompts, and what block size 1 reads."""
        where = where[..., None]
        if self.k:
            other, weights = soft
            one = torch.zeros_like(weights).index_fill(-1, torch.tensor(0, device=ids.device), 1.0)
            return torch.where(where, ids[..., None], other), torch.where(where, one, weights)
        # block size 1 may read an id of its own
        n_ids = self.process.vocab_size + (self.process.ar_token is not None)
        soft = F.pad(soft.masked_fill(where, 0.0), (0, n_ids - soft.size(-1)))
        return soft.scatter_add(-1, ids[..., None], where.to(soft))


# ----- the method


@dataclass
class Settings:
    curriculum: int = -1  # steps on soft tokens, uniform noise afterwards; -1: half of max_steps
    # temperature of the soft tokens at the first step (1e-3 is published; what it does: docs/duo.md), ...
    tau: float = 1e-3
    tau_end: float = 1e-3  # ... and at the end of the curriculum, evenly in its logarithm
    # Gaussians simulated for a token, at least 2; 0, or more than there are ids: one for each id
    soft_k: int = 4


DEFAULTS = {"process": "uniform"}


def check(cfg, settings):
    fine = all(1e-30 <= tau <= 1e30 for tau in (settings.tau, settings.tau_end))
    if not fine or settings.soft_k < 0 or settings.soft_k == 1 or settings.curriculum < -1:
        die(
            "tau and tau_end must be in [1e-30, 1e30], soft_k 0 or at least 2, curriculum a number of steps",
            "--tau=1e-3 --soft_k=4",
        )
    if cfg.process != "uniform":
        die(f"Duo's curriculum ends in uniform noise, and this is {cfg.process} noise", "--process=uniform")
    if not cfg.objectives():
        die("block size 1 reads pure noise: Duo has nothing to soften", "--block_sizes=1:0.25,16:0.75")
    if settings.curriculum == -1:
        settings.curriculum = cfg.max_steps // 2


class Learner(methods.Learner):
    def loss(self, step):
        s = self.settings
        if self.process.vocab_size < 2:
            die("Duo softens between two tokens at least, and the vocabulary has one", "--process uniform")
        if step >= s.curriculum:
            return self.token_loss
        tau = tau_at(step, s.curriculum, s.tau, s.tau_end)
        return functools.partial(self.token_loss, corrupt=Relaxation(self.process, tau, s.soft_k))

    def note(self):
        return (
            f"soft tokens for {self.settings.curriculum} of {self.cfg.max_steps} steps: "
            "the loss printed then is not a bound"
        )


ROWS = [
    {
        "system": "Duo's curriculum",
        "paper": "2506.10892",
        "claim": "fewer nats than uniform noise from the first step on",
        "train": "--method duo --objective elbo --tau 0.1 --tau_end 0.1",
        "control": "--process uniform --objective elbo",
        "by": "nats 16",
    }
]
