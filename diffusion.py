"""
What is the maths? Noise schedules, noise processes, and the loss.

t = 0 is clean and t = 1 is noise, so alpha(0) = 1 and alpha(1) = 0. A process corrupts every token alone:

    q(x_t | x_0) = a onehot(x_0) + m      a = alpha_t, m = (1 - alpha_t) pi,  pi = the mask, or uniform

Letters: B rows, L positions, V vocabulary (with the mask, for masked noise), x0 clean ids, xt noisy ids. An
alpha is a number, or a tensor (B,), (B, 1) or (B, L). A network's logits give one of two predictions:

    D    p(x0_i | x_t), the denoiser: has seen its own noisy token
    l    p(x0_i | x_t without its own token i), leave-one-out

fast/processes.py and fast/loss.py compute the same numbers fast.
"""

import inspect
import math

import torch
import torch.nn.functional as F

from rng import Noise, draw, float64, sharpen

# ----- schedules


def loglinear(t, eps=0.0):
    """
    alpha_t = 1 - (1 - eps) t and its derivative, t in [0, 1] (MDLM, arXiv 2406.07524; sigma is log-linear).
    eps = 0 makes x_1 pure noise: the bound needs no prior term. Released models used 1e-3.
    """
    return eps + (1 - eps) * (1 - t), torch.full_like(t, -(1 - eps))


def cosine(t, eps=0.0):
    """alpha_t = eps + (1 - eps) (1 - cos(pi/2 (1 - t))) and its derivative: lingers at high noise."""
    angle = math.pi / 2 * (1 - t)
    return eps + (1 - eps) * (1 - angle.cos()), -(1 - eps) * math.pi / 2 * angle.sin()


SCHEDULES = {"loglinear": loglinear, "cosine": cosine}


def sigma(alpha):
    """The noise level a time-conditioned network reads: -log(alpha_t), at most 6.9, so finite at t = 1."""
    return -alpha.clamp(min=1e-3).log()


def sigma_for(model, alpha):
    """sigma(alpha), or None for a network that does not look at it. DDP keeps the network in .module."""
    return None if getattr(getattr(model, "module", model), "timeless", False) else sigma(alpha)


def column(alpha, like):
    """An alpha as float64 that broadcasts against (B, L): small numbers like 1 - alpha keep their digits."""
    alpha = torch.as_tensor(alpha, dtype=float64(like.device), device=like.device)
    return alpha[:, None] if alpha.dim() == 1 else alpha


def wide(x):
    """At least float32."""
    return x if x.dtype.itemsize >= 4 else x.float()


def pick(x, ids):
    """x (..., V) at ids (...)."""
    return x.gather(-1, ids[..., None])[..., 0]


# ----- noise processes


class NoiseProcess:
    """
    What a noise process is. A new one writes `mixing`. Every other member has a default that follows from it,
    with V numbers a token. Code outside asks three questions (known, pays, can_change) or the capabilities
    below, and never for a class. A process with several ids a token packs them into one int64, a code.
    """

    n_extra_tokens = 0  # input ids V, V + 1, ... that are read but never predicted
    mask_id = None  # the id of the mask, or None
    absorbing = False  # a token that is not the mask is certainly clean: remasking samplers stand on it
    t_min = 1e-3  # the bound's integral ends here (to t = 0 it may be infinite); last_step pays for the rest
    exact_ar = False  # block size 1 gives the NLL itself, not a bound: it always reads the same token
    count_form = False  # the bound is a mean over numbers of masks, at any t: for eval.py

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def arguments(self):
        """{name: value} for a checkpoint. The constructor keeps its arguments under their own names."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def mixing(self, alpha):
        """a (...) and m (..., V) of q(x_t | x_0) = a onehot(x_0) + m at alpha (...), and their d/d alpha."""
        raise NotImplementedError

    def prior(self, shape, noise):
        """Pure noise, (B, L) int64: x_t at alpha = 0."""
        m = self.mixing(torch.zeros((), dtype=torch.float64))[1]
        return draw(m.to(noise.key.device).expand(*shape, -1), noise)

    def corrupt(self, x0, alpha, noise=None):
        """A draw of q(x_t | x_0), (B, L) int64."""
        p = F.one_hot(x0, self.vocab_size).double()
        return draw(self.marginal(p, column(alpha, x0)), noise or Noise.like(x0))

    def marginal(self, p, alpha):
        """a p + m, the law of x_t when x_0 has the law p (..., V). alpha broadcasts against (...)."""
        a, m, *_ = self.mixing(alpha)
        return a[..., None] * p + m

    def log_q(self, xt, x0, alpha):
        """log q(x_t | x_0), (B, L)."""
        a, m, *_ = self.mixing(column(alpha, xt))
        return (a * (xt == x0) + pick(m.expand(*xt.shape, -1), xt)).log()

    def ar_input(self, shape, noise):
        """What block size 1 reads in place of the token it predicts, (B, L)."""
        return self.prior(shape, noise)

    def known(self, xt):
        """Which tokens are settled, and may be carried over. (B, L) bool"""
        return torch.zeros_like(xt, dtype=torch.bool)

    def pays(self, x0, xt):
        """Which tokens a loss is about. (B, L) bool"""
        return ~self.known(xt)

    def can_change(self, xt):
        """Which tokens a reverse step may still alter. (B, L) bool"""
        return ~self.known(xt)

    def tokens(self, xt):
        """Codes -> text ids."""
        return xt

    def encode(self, ids):
        """Known text -> codes."""
        return ids

    def network_input(self, xt):
        """What the network is fed for codes (B, L): ids, or (ids, weights), see model.embed_tokens."""
        return xt

    def loo_logits(self, logits, xt=None, alpha=None):
        """The network's output as logits of l, (..., V). The mask is never the answer."""
        if self.mask_id is None:
            return wide(logits)
        return wide(logits).index_fill(-1, torch.tensor(self.mask_id, device=logits.device), -math.inf)

    def denoiser_logits(self, logits, xt, alpha):
        """The network's output as logits of D, (..., V). Seeing x_t is evidence: D(v) ∝ l(v) q(x_t | v)."""
        a, m, *_ = self.mixing(column(alpha, xt))
        m = pick(m.expand(*xt.shape, -1), xt)[..., None]  # q(x_t | v) for all v but x_t itself
        q = torch.where(F.one_hot(xt, self.vocab_size).bool(), a[..., None] + m, m)
        logits = self.loo_logits(logits, xt, alpha)
        return torch.where(q > 0, logits + q.log().to(logits), -math.inf)

    def ce(self, logits, x0, xt, alpha):
        """-log D(x_0), (B, L) nats: "low variance" training (arXiv 2602.15014)."""
        return NoiseProcess.last_step(self, logits, x0, xt, alpha)

    def last_step(self, logits, x0, xt, alpha):
        """-log D(x_0), (B, L) nats, whatever `ce` is: what the step from t to 0 costs."""
        return -pick(self.denoiser_logits(logits, xt, alpha).log_softmax(-1), x0)

    def nll(self, logits, x0, xt, alpha, dalpha):
        """
        Integrand of the bound E_t[...] >= -log p(x_0), (B, L) nats (form of GIDD, arXiv 2503.04482), z = x_t:
            w_z / q(z|x0) [ KL(q(.|x0) || q(.|l)) + r - log r - 1 ]    r = q(z|x0) / q(z|l),  q(.|p) = a p + m
            w = m' - a'/a m, the rate at which noise flows in          ' is d/dt
        """
        a, m, da, dm = self.mixing(column(alpha, x0))
        p = self.loo_logits(logits, xt, alpha).double().softmax(-1)
        true, guess = a[..., None] * F.one_hot(x0, self.vocab_size) + m, a[..., None] * p + m
        w = pick((dm - (da / a)[..., None] * m).expand_as(guess), xt) * column(dalpha, x0)
        kl = (torch.xlogy(true, true) - torch.xlogy(true, guess.clamp(min=1e-300))).sum(-1)
        r = pick(true, xt) / pick(guess, xt)
        return torch.where(w == 0, 0.0, w / pick(true, xt) * (kl + r - r.log() - 1))

    def posterior_probs(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
        """
        q(x_s | x_t, l), s < t, dense float64 (B, L, V), z = x_t (D3PM, arXiv 2107.03006):
            q(v) ∝ (a_s l + m_s)_v (a_ts 1[v = z] + m_ts)      a_ts = a_t / a_s,  m_ts = m_t,z - a_ts m_s,z
        """
        (a_t, m_t, *_), (a_s, m_s, *_) = (self.mixing(column(a, xt)) for a in (alpha_t, alpha_s))
        p = sharpen(self.loo_logits(logits.double(), xt, alpha_t), temperature, top_p).softmax(-1)
        z, a_ts = F.one_hot(xt, self.vocab_size), a_t / a_s
        m_ts = pick(m_t.expand_as(p), xt) - a_ts * pick(m_s.expand_as(p), xt)
        q = (a_s[..., None] * p + m_s) * (a_ts[..., None] * z + m_ts.clamp(min=0)[..., None])
        total = q.sum(-1, keepdim=True)  # 0 where a sharpened l rules out what stands there for certain
        return torch.where(total > 0, q / total, z.double())

    def posterior_sample(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0, noise=None):
        """One draw of the above, (B, L) int64."""
        q = self.posterior_probs(logits, xt, alpha_t, alpha_s, temperature, top_p)
        return draw(q, noise or Noise.like(xt))


class Masked(NoiseProcess):
    """Absorbing noise: a token becomes mask_id with probability 1 - alpha_t (MDLM, arXiv 2406.07524)."""

    absorbing, exact_ar, count_form, t_min = True, True, True, 0.0

    def __init__(self, vocab_size, mask_id):
        self.vocab_size, self.mask_id = vocab_size, mask_id

    def mixing(self, alpha):
        pi = F.one_hot(torch.tensor(self.mask_id), self.vocab_size).to(alpha)
        return alpha, (1 - alpha)[..., None] * pi, torch.ones_like(alpha), -pi

    def prior(self, shape, noise=None, device=None):
        return torch.full(shape, self.mask_id, device=noise.key.device if noise is not None else device)

    ar_input = prior

    def corrupt(self, x0, alpha, noise=None):
        u = (noise or Noise.like(x0)).uniform(1)[..., 0]
        return torch.where(u <= 1 - column(alpha, x0), self.mask_id, x0)

    def known(self, xt):
        return xt != self.mask_id

    def denoiser_logits(self, logits, xt, alpha=None):
        """Logits of D: l at masks; a visible token is carried over, with certainty (SUBS). (..., V)"""
        logits = self.loo_logits(logits)
        carried = torch.full_like(logits, -math.inf).scatter(-1, xt[..., None], 0.0)
        return torch.where((xt == self.mask_id)[..., None], logits, carried)

    def ce(self, logits, x0, xt, alpha=None):
        """-log p(x_0 | x_t): cross-entropy at masks, 0 where the token is visible."""
        return torch.where(self.known(xt), 0.0, -pick(self.loo_logits(logits).log_softmax(-1), x0))

    def nll(self, logits, x0, xt, alpha, dalpha):
        """-alpha'_t / (1 - alpha_t) * 1[x_t = mask] * -log p(x_0 | x_t)    (MDLM, arXiv 2406.07524)"""
        weight = -column(dalpha, logits) / (1 - column(alpha, logits))
        return torch.where(self.known(xt), 0.0, weight * self.ce(logits, x0, xt))

    def posterior_probs(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
        """
        q(x_s | x_t, p), s < t, dense float64 (B, L, V):
            x_t = mask:  (alpha_s - alpha_t) / (1 - alpha_t) p  +  (1 - alpha_s) / (1 - alpha_t) onehot(mask)
            otherwise:   onehot(x_t)
        """
        a_t, a_s = column(alpha_t, xt), column(alpha_s, xt)
        p = sharpen(self.loo_logits(logits.double()), temperature, top_p).softmax(-1)
        stay = F.one_hot(xt, self.vocab_size).double()
        move = ((a_s - a_t) / (1 - a_t))[..., None]
        return torch.where(self.known(xt)[..., None], stay, move * p + (1 - move) * stay)


class Uniform(NoiseProcess):
    """
    Uniform noise: a token becomes a uniformly drawn one with probability 1 - alpha_t (UDLM, 2412.10193).

    predicts: the network's output. "loo": l, which minimises the bound (published). "denoiser": D, which
    minimises cross-entropy. One logit differs (2605.22765): D(v) ∝ l(v) (1 + 1[v = x_t] V a / (1 - a)).
    ar_token: block size 1 reads this id in place of the token it predicts. None: a random token (published);
    its NLL is then the mean over that token of -log p, a bound on the NLL of text made so (Jensen).
    """

    def __init__(self, vocab_size, predicts="loo", ar_token=None):
        assert predicts in ("loo", "denoiser"), f"predicts {predicts!r}: loo or denoiser"
        self.vocab_size, self.predicts, self.ar_token = vocab_size, predicts, ar_token
        self.exact_ar, self.n_extra_tokens = ar_token is not None, int(ar_token == vocab_size)

    def mixing(self, alpha):
        pi = torch.full((self.vocab_size,), 1 / self.vocab_size, dtype=alpha.dtype, device=alpha.device)
        return alpha, (1 - alpha)[..., None] * pi, torch.ones_like(alpha), -pi

    def prior(self, shape, noise=None, device=None):
        return self.ids(torch.rand(shape, device=device) if noise is None else noise.uniform(1)[..., 0])

    def ar_input(self, shape, noise=None, device=None):
        if self.ar_token is None:
            return self.prior(shape, noise, device)
        return torch.full(shape, self.ar_token, device=noise.key.device if noise is not None else device)

    def ids(self, u):
        return (u * self.vocab_size).long().clamp(max=self.vocab_size - 1)

    def corrupt(self, x0, alpha, noise=None):
        u = (noise or Noise.like(x0)).uniform(2)
        return torch.where(u[..., 0] <= 1 - column(alpha, x0), self.ids(u[..., 1]), x0)

    def evidence(self, alpha):
        """What seeing x_t itself says for it: log(1 + V alpha / (1 - alpha))."""
        return torch.log1p(self.vocab_size * alpha / (1 - alpha))

    def shifted(self, logits, xt, alpha, sign):
        bonus = sign * self.evidence(column(alpha, logits)).to(wide(logits)).expand(xt.shape)
        return wide(logits).scatter_add(-1, xt[..., None], bonus[..., None])

    def loo_logits(self, logits, xt, alpha):
        """The network's output as logits of l: D -> l subtracts the evidence at x_t. (..., V)"""
        return wide(logits) if self.predicts == "loo" else self.shifted(logits, xt, alpha, -1)

    def denoiser_logits(self, logits, xt, alpha):
        """The network's output as logits of D: l -> D adds what the above subtracts. (..., V)"""
        return wide(logits) if self.predicts == "denoiser" else self.shifted(logits, xt, alpha, 1)

    def ce(self, logits, x0, xt, alpha=None):
        """Cross-entropy of the network's own output, D or l, at every position, noisy or not."""
        return -pick(wide(logits).log_softmax(-1), x0)

    def nll(self, logits, x0, xt, alpha, dalpha):
        """
        Integrand of the bound E_t[...] >= -log p(x_0) (Duo, arXiv 2506.10892, as a Bregman form), z = x_t:
            -alpha'_t / (V alpha_t) * sum_v [ r_v log(r_v / rh_v) - r_v + rh_v ] >= 0      (0 at alpha = 0)
            r = xb(onehot(x_0)) / xb_z(onehot(x_0)),  rh = xb(l) / xb_z(l),  xb(p) = V alpha_t p + 1 - alpha_t
        """
        V, a = self.vocab_size, column(alpha, logits).clamp(min=1e-12)[..., None]
        p = self.loo_logits(logits, xt, a[..., 0]).double().softmax(-1)
        xb, xb_hat = V * a * F.one_hot(x0, V) + 1 - a, V * a * p + 1 - a
        r, r_hat = xb / pick(xb, xt)[..., None], xb_hat / pick(xb_hat, xt)[..., None]
        weight = -column(dalpha, logits) / (V * a[..., 0]) * (column(alpha, logits) > 0)
        return weight * (r * (r / r_hat).log() - r + r_hat).sum(-1)

    def posterior_probs(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
        """
        q(x_s | x_t, l), s < t, dense float64 (B, L, V), z = x_t, a_ts = alpha_t / alpha_s:
            [(V alpha_t l_z + a_ts - alpha_t) onehot(z) + (alpha_s - alpha_t) l + (1 - a_ts)(1 - alpha_s) / V]
            / (V alpha_t l_z + 1 - alpha_t)
        """
        V, a_t, a_s = self.vocab_size, column(alpha_t, xt)[..., None], column(alpha_s, xt)[..., None]
        p = sharpen(self.loo_logits(logits.double(), xt, a_t[..., 0]), temperature, top_p).softmax(-1)
        z, a_ts = F.one_hot(xt, V).double(), a_t / a_s
        seen = V * a_t * (p * z).sum(-1, keepdim=True)
        return ((seen + a_ts - a_t) * z + (a_s - a_t) * p + (1 - a_ts) * (1 - a_s) / V) / (seen + 1 - a_t)


# ----- the loss


def noisy_stream(process, x, ar, given, t, schedule, noise, corrupt):
    """
    x_t (B, L) of clean ids x, what the network is fed for it, and alpha, dalpha (B, L) float64.
    ar (B, 1) bool: rows of block size 1: pure noise, and they read ar_input. given (B, L) bool: shown.
    corrupt: a method's own, (x, t, noise) -> (x_t, feed, alpha, dalpha); feed(ids, plain) is what the network
    reads: ids where `plain`, elsewhere what the method makes of them.
    """
    pure = process.prior(x.shape, noise)
    if corrupt is None:
        (alpha, dalpha), feed = schedule(t), lambda ids, plain: process.network_input(ids)
        xt = process.corrupt(x, alpha, noise)
    else:
        xt, feed, alpha, dalpha = corrupt(x, t, noise)
    xt = torch.where(given, process.encode(x), torch.where(ar, pure, xt))
    read = torch.where(ar & ~given, process.ar_input(x.shape, noise), xt)
    alpha, dalpha = torch.where(ar, 0.0, column(alpha, x)), column(dalpha, x)
    return xt, feed(read, ar | given), alpha.expand_as(x), dalpha.expand_as(x)


def nats(process, objective, logits, x0, xt, alpha, dalpha):
    """What each token costs under one objective, (B, L): see token_loss."""
    assert objective in ("elbo", "ce", "ce_noisy", "last"), f"objective {objective!r}: elbo, ce or ce_noisy"
    if objective == "elbo":
        cost = process.nll(logits, x0, xt, alpha, dalpha)
    else:
        cost = (process.last_step if objective == "last" else process.ce)(logits, x0, xt, alpha)
    pays = process.pays(x0, xt)
    return torch.where(pays & (xt != x0) if objective == "ce_noisy" else pays, cost, 0.0)


def token_loss(
    model, process, x0, block_size, t, objective, given=None, charged=None, schedule=loglinear, start=0,
    noise=None, corrupt=None, device=None,
):  # fmt: skip
    """
    The loss in nats: (total, per_token), the sum, to be differentiated, and its terms (B, L - start).

    x0 (B, L) clean ids; block_size (B,) int64, or an int; t (B,) float64 in (0, 1), or (B, L - start).
    objective: elbo, the bound (nll); ce, cross-entropy; ce_noisy, that where x_t != x_0; last (last_step).
        One for all sizes, or {size: name}. Block size 1 is always ce on pure noise: the AR NLL.
    given (B, L) bool: prompts, shown clean. charged (B, L) bool: what carries loss; None: all but the given.
    start: the first position with a noisy copy, a multiple of every block size, nothing charged before it.
    noise: a Noise for (B, L - start). corrupt: see noisy_stream. device: the network's, if x0 is elsewhere.
    """
    there = lambda y: None if y is None else y.to(device or x0.device)
    x0, noise, given, charged = there(x0), there(noise), there(given), there(charged)
    x = x0[:, start:]
    given = torch.zeros_like(x, dtype=torch.bool) if given is None else given[:, start:]
    charged = ~given if charged is None else charged[:, start:]
    sizes = torch.as_tensor(block_size).expand(len(x)).to(x.device)
    ar = (sizes == 1)[:, None]
    xt, fed, alpha, dalpha = noisy_stream(process, x, ar, given, t, schedule, noise or Noise.like(x), corrupt)
    logits = model(x0, fed, block_size, start, sigma_for(model, alpha[:, 0] if t.dim() == 1 else alpha))
    per_token = torch.zeros_like(x, dtype=wide(logits).dtype)
    for size in sizes.unique().tolist():
        rows = sizes == size
        name = "ce" if size == 1 else objective if isinstance(objective, str) else objective.get(size)
        cost = nats(process, name, *(y[rows] for y in (logits, x, xt, alpha, dalpha)))
        per_token[rows] = torch.where(charged[rows], cost, 0.0).to(per_token)
    return per_token.sum(), per_token.detach()


if __name__ == "__main__":
    print(__doc__)
