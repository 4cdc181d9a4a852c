"""
AUDM: uniform noise, but the network is told which tokens may be noise. ReAUDM: its sampler that repairs.

Every position draws one noise token u, once for all times. It shows x_t = x_0 with probability a_t, else u.
That is uniform noise. But a network that is told u knows more: a token other than u is certainly clean, as
with masks.
A token that is u is noise, or x_0 happens to be u. With D, what the network predicts, the bound is

    -a' / (1 - a) 1[x_t = u] ( 1 - D(u) - 1[x_0 != u] (1 + log D(x_0)) )         a = alpha_t

Of u only the question x_t = u matters: where it is no, x_0 = x_t, and u was drawn apart from all else. So the
pair (x_t, u) is one code: x_t where it is clean, V + u where it may be noise, and each code has an embedding.
(The published network reads embeddings of x_t, of u and of the answer.) It is as if there were V masks.

Absorbing reformulation of uniform diffusion, arXiv 2605.22765. Letters as in diffusion.py.

    python train.py config/sudoku.toml --method audm --out_dir out/audm
    python sample.py --ckpt out/audm --sampler reaudm --steps 16
"""

import math

import torch
import torch.nn.functional as F

from diffusion import NoiseProcess, Uniform, column, pick, wide
from generate import sampler
from rng import Noise, draw, sharpen
from run.cli import die

DEFAULTS = {"objective": "elbo", "time_conditioning": "true"}


def check(cfg, settings):
    if cfg.process != "masked":
        die(f"AUDM brings its own noise, and this asks for {cfg.process} noise", "leave --process out")
    if "ce_noisy" in cfg.objectives().values():
        die("ce_noisy never asks whether x_0 = u: D(u) would not be learned", "--objective=elbo, or ce")
    if cfg.next_token:
        die("a next-token network reads no noise", "--next_token=false")


def process(cfg, settings, vocab_size):
    return AUDM(vocab_size)


class AUDM(NoiseProcess):
    """Codes: v < V is clean text, V + v shows v and may be noise. 2 V is what block size 1 reads."""

    absorbing = True  # what is not noise is certainly clean
    exact_ar = True

    def __init__(self, vocab_size):
        self.vocab_size, self.n_extra_tokens = vocab_size, vocab_size + 1

    def prior(self, shape, noise):
        return self.vocab_size + self.ids(noise.uniform(1)[..., 0])

    def ids(self, u):
        return (u * self.vocab_size).long().clamp(max=self.vocab_size - 1)

    def corrupt(self, x0, alpha, noise=None):
        keep, u = (noise or Noise.like(x0)).uniform(2).unbind(-1)
        u = self.ids(u)
        return torch.where((keep <= 1 - column(alpha, x0)) | (u == x0), self.vocab_size + u, x0)

    def ar_input(self, shape, noise):
        return torch.full(shape, 2 * self.vocab_size, device=noise.key.device)

    def known(self, xt):
        return xt < self.vocab_size

    def tokens(self, xt):
        return xt % self.vocab_size

    def log_q(self, xt, x0, alpha):
        """q(code | x_0): a (1 - 1/V) for the clean x_0;  (a 1[u = x_0] + 1 - a) / V for the noise u."""
        a, V = column(alpha, xt), self.vocab_size
        same = self.tokens(xt) == x0
        return torch.where(self.known(xt), a * (1 - 1 / V) * same, (a * same + 1 - a) / V).log()

    def shifted(self, logits, xt, alpha, sign):
        """logits, with sign * log(1 - a) added at u where x_t = u: +1 makes l of D, -1 makes D of l."""
        shift = torch.where(self.known(xt), 0.0, sign * (1 - column(alpha, xt)).log()).to(logits)
        return logits.scatter_add(-1, self.tokens(xt)[..., None], shift[..., None])

    def loo_logits(self, logits, xt, alpha):
        """D -> l. Seeing x_t = u is evidence for x_0 = u: D(v) ∝ l(v) (1 + 1[v = u] a / (1 - a))."""
        return self.shifted(wide(logits), xt, alpha, 1)

    def denoiser_logits(self, logits, xt, alpha=None):
        """Logits of D: the network's own output where x_t = u; elsewhere x_t, with certainty. (..., V)"""
        clean = torch.full_like(wide(logits), -math.inf).scatter(-1, self.tokens(xt)[..., None], 0.0)
        return torch.where(self.known(xt)[..., None], clean, wide(logits))

    def nll(self, logits, x0, xt, alpha, dalpha):
        """-a' / (1 - a) 1[x_t = u] ( 1 - D(u) - 1[x_0 != u] (1 + log D(x_0)) ), (B, L) nats."""
        log_p, u = self.denoiser_logits(logits, xt).double().log_softmax(-1), self.tokens(xt)
        leaves = -torch.expm1(pick(log_p, u))  # 1 - D(u): what the network says of leaving u
        arrives = torch.where(x0 == u, 0.0, 1 + pick(log_p, x0))
        rate = -column(dalpha, x0) / (1 - column(alpha, x0))
        return torch.where(self.known(xt), 0.0, rate * (leaves - arrives))

    def posterior_probs(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
        """
        The token that x_s shows, dense float64 (B, L, V); temperature and top_p sharpen l:
            x_t = u:    (a_s - a_t) / (1 - a_t) D  +  (1 - a_s) / (1 - a_t) onehot(u)
            otherwise:  onehot(x_t)
        """
        a_t, a_s = column(alpha_t, xt), column(alpha_s, xt)
        loo = sharpen(self.loo_logits(logits.double(), xt, a_t), temperature, top_p)
        p = self.shifted(loo, xt, a_t, -1).softmax(-1)
        stay = F.one_hot(self.tokens(xt), self.vocab_size).double()
        move = torch.where(self.known(xt), 0.0, (a_s - a_t) / (1 - a_t))[..., None]
        return move * p + (1 - move) * stay

    def posterior_sample(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0, noise=None):
        """A draw of the above as codes. A draw of u may still be noise, until a_s = 1 makes all clean."""
        q = self.posterior_probs(logits, xt, alpha_t, alpha_s, temperature, top_p)
        x = draw(q, noise or Noise.like(xt))
        noisy = (x + self.vocab_size == xt) & (column(alpha_s, xt) < 1)
        return torch.where(noisy, xt, x)

    def bridge(self, x0, xt, alpha_t, alpha_s):
        """
        ReAUDM's step, given x_0: the law of the next code, float64 (B, L, 2 V).
            x_s ~ q(x_s | x_t, x_0) of uniform noise, by which a clean token may become noise again
            x_s != x_0:  u = x_s
            x_s = x_0:   u = x_s with probability 1 / (1 + (V - 1) a_s)
        """
        V, a_s = self.vocab_size, column(alpha_s, xt)[..., None]
        certain = F.one_hot(x0, V).double()
        q = Uniform(V).posterior_probs(certain.log(), self.tokens(xt), alpha_t, alpha_s)
        noisy = torch.where(certain > 0, 1 / (1 + (V - 1) * a_s), 1.0)
        return torch.cat((q * (1 - noisy), q * noisy), dim=-1)


@sampler()
def reaudm(block):
    """
    ReAUDM (arXiv 2605.22765), for networks of --method audm: draw x_0 ~ D, clean tokens as they are; then x_s
    from the step of uniform noise between x_t and x_0, and u given both. By it a clean token may become noise
    again, so an error can be repaired.
    """
    if not isinstance(block.process, AUDM):
        raise ValueError("reaudm is not defined for this noise: it is for networks of --method audm")
    for k in range(block.steps):
        (a_t, a_s), noise = block.alpha[k : k + 2], block.noise(k)
        x0 = block.reverse(a_t, a_t, 1.0, noise)
        block.write(draw(block.process.bridge(x0, block.x, a_t, a_s), noise))
        yield


ROWS = [
    {
        "system": "AUDM",
        "paper": "2605.22765",
        "claim": "more right in 8 steps than masked noise",
        "train": "--method audm",
        "control": "--objective elbo --time_conditioning true",
        "by": "right 8",
    },
    {
        "system": "ReAUDM",
        "paper": "2605.22765",
        "claim": "its step repairs: more right in 16 steps than AUDM's own",
        "train": "--method audm",
        "control": "--method audm",
        "sampler": "reaudm",
        "by": "right 16",
    },
]
