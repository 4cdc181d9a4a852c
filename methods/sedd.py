"""
SEDD: masked diffusion whose network says weights w that need not sum to 1. The loss adds a penalty on their
sum U. It comes from learning ratios of probabilities:

    s_v ~ p_t(x_i = v) / p_t(x_i = mask), the others as they are       at a mask, for every token v
    s_v = r w_v,    r = a / (1 - a),    log w is the network's output, less the log of the number of tokens

The right ratios sum to r, so the right w sum to 1. The loss is the score entropy,

    -a' / a 1[x_t = mask] ( sum_v s_v - r log s_x0 + r (log r - 1) )
        = -a' / (1 - a) 1[x_t = mask] ( -log (w_x0 / U)  +  U - 1 - log U )         U = sum_v w_v

of which the first term is MDLM's, with p = w / U. So SEDD is MDLM plus a penalty on totals U other than 1.
Its sampler is MDLM's step, in which U times as many masks become tokens.

Score entropy discrete diffusion, arXiv 2310.16834, for masked noise. Letters as in diffusion.py.

    python train.py config/sudoku.toml --method sedd --out_dir out/sedd
    python sample.py --ckpt out/sedd --steps 8
"""

import math

import torch

from diffusion import Masked, column, pick
from run.cli import die

DEFAULTS = {"objective": "elbo"}


def check(cfg, settings):
    if cfg.process != "masked":
        die(f"SEDD is here for masked noise, not for {cfg.process} noise", "--process=masked")
    if set(cfg.objectives().values()) - {"elbo"}:
        die(
            f"objective {cfg.objective}: it would leave the total of the ratios to chance", "--objective=elbo"
        )
    if cfg.next_token:
        die("a next-token network reads no noise", "--next_token=false")


def process(cfg, settings, vocab_size):
    return SEDD(vocab_size + 1, vocab_size)


class SEDD(Masked):
    """Masked noise, and a network that says log w. As a prediction it says p = w / U, the softmax of that."""

    def log_w(self, logits):
        """
        log w_v = log(s_v / r), float64 (..., V), -inf at the mask. A network that says 0 everywhere, as at
        initialisation, has total 1: the output is offset by the log of the number of tokens, as published.
        """
        return self.loo_logits(logits).double() - math.log(self.vocab_size - 1)

    def nll(self, logits, x0, xt, alpha, dalpha):
        """-a' / (1 - a) 1[x_t = mask] ( U - 1 - log w_x0 ), (B, L) nats: the score entropy with s = r w."""
        log_w = self.log_w(logits)
        rate = -column(dalpha, x0) / (1 - column(alpha, x0))
        return torch.where(self.known(xt), 0.0, rate * (log_w.exp().sum(-1) - 1 - pick(log_w, x0)))

    def posterior_probs(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
        """
        SEDD's analytic step, dense float64 (B, L, V), with p = w / U, which temperature and top_p sharpen:
            x_t = mask:  share p + (1 - share) onehot(mask),   share = min(1, U (a_s - a_t) / (1 - a_t))
            otherwise:   onehot(x_t)
        The last step (a_s = 1) leaves no mask, whatever U is. With U = 1 it is MDLM's step.
        """
        a_t, a_s = column(alpha_t, xt), column(alpha_s, xt)
        U = self.log_w(logits).exp().sum(-1)
        share = torch.where(a_s < 1, U * (a_s - a_t) / (1 - a_t), 1.0).clamp(max=1)
        return super().posterior_probs(logits, xt, 0.0, share, temperature, top_p)


ROWS = [
    {
        "system": "SEDD",
        "paper": "2310.16834",
        "claim": "fewer nats than training by the bound (MDLM says: not so)",
        "train": "--method sedd",
        "control": "--objective elbo",
        "by": "nats 16",
    }
]
