"""
What is the maths? Noise schedules, random numbers, the two noise processes and their losses. (samplers.py goes the way back.)

Conventions: t = 0 is clean and t = 1 is noise, so alpha(0) = 1 and alpha(1) = 0. Both processes corrupt every token alone:

    q(x_t | x_0) = alpha_t onehot(x_0) + (1 - alpha_t) pi        pi = the mask token, or uniform over the vocabulary

Everything is in nats per token. Letters: B rows, L positions, V vocabulary (the mask token included for masked noise),
x0 clean ids, xt noisy ids, a_t short for alpha_t. An alpha is a number, or a tensor (B,), (B, 1) or (B, L).
"""

import math

import torch
import torch.nn.functional as F

from model import precise

# ----- schedules


def loglinear(t, eps=0.0):
    """
    alpha_t = 1 - (1 - eps) t and its derivative, for a tensor t in [0, 1] (MDLM, arXiv 2406.07524; "log-linear" speaks of sigma).
    eps = 0 makes x_1 pure noise, so that the loss is a bound with no prior term; released models used 1e-3.
    """
    return eps + (1 - eps) * (1 - t), torch.full_like(t, -(1 - eps))


def cosine(t, eps=0.0):
    """alpha_t = eps + (1 - eps) (1 - cos(pi/2 (1 - t))) and its derivative: lingers at high noise."""
    angle = math.pi / 2 * (1 - t)
    return eps + (1 - eps) * (1 - angle.cos()), -(1 - eps) * math.pi / 2 * angle.sin()


SCHEDULES = {"loglinear": loglinear, "cosine": cosine}


def sigma(alpha):
    """The noise level a time-conditioned network reads, -log(alpha_t), at most 6.9 (alpha = 1e-3) so that t = 1 is finite."""
    return -alpha.clamp(min=1e-3).log()


# ----- random numbers

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, bits like random: the increment of splitmix64, as a signed int


def _mix(z):
    """
    The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit ints under which counters look random.
    z: an int64 tensor (its products wrap, its shifts keep the sign, which is cut off) or a Python int, for the same result.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
        z = (z + (1 << 63)) % (1 << 64) - (1 << 63) if isinstance(z, int) else z
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _float(device):
    """float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


class Noise:
    """
    Uniform numbers in (0, 1] with 63 random bits that depend on (seed, row, position, step, how many were taken before) and on
    nothing else: not on the batch mates, the number of processes, the device or any global state.
    rows (B,), positions (L,): integer tensors. noise.uniform(n) is (B, L, n) float64 (float32 on MPS); with `where` (B, L) bool,
    (M, n). Rows and steps -1 and -2 exist too: streams for what belongs to no row, or comes before the first step.
    """

    def __init__(self, seed, rows, positions, step=0):
        key = seed
        for part in (step, rows[:, None], positions[None]):
            key = _mix(key + (part + 1) * GOLDEN)
        self.key, self.taken = key, 0  # (B, L)

    @classmethod
    def like(cls, x):
        """Noise for x (B, L), seeded from torch's global generator: what the methods below use when given none."""
        seed = torch.randint(1 << 62, ()).item()
        return cls(seed, torch.arange(x.size(0), device=x.device), torch.arange(x.size(1), device=x.device))

    def uniform(self, n, where=None):
        key = self.key if where is None else self.key[where]
        count = torch.arange(self.taken + 1, self.taken + 1 + n, device=key.device)
        self.taken += n  # the same for everyone, whoever takes part
        bits = _mix(key[..., None] + count * GOLDEN) & (1 << 63) - 1
        return (bits.to(_float(bits.device)) + 0.5) * 2.0**-63


def _race(weight, u):
    """The first of exponential clocks with rates `weight` to ring, argmin E / weight: index i with probability weight_i / sum."""
    return (weight.to(u) / -torch.log1p(-u)).argmax(-1)  # log1p: small E decide the tail, and are exact


def draw(logits, uniform):
    """
    One exact draw a row from softmax(logits), logits (M, V) -> (M,) int64. The vocabulary is cut into about sqrt(V) groups; a
    group wins by its mass, then a member of it: 2 sqrt(V) random numbers of 63 bits instead of V. With 32-bit numbers the
    tail would starve, which is a lower temperature in disguise. uniform(n) returns (M, n) numbers in (0, 1].
    """
    M, V = logits.shape
    size = math.isqrt(V - 1) + 1
    weight = (logits - logits.amax(-1, keepdim=True)).exp()
    groups = F.pad(weight, (0, -V % size)).view(M, -(-V // size), size)
    u, v = uniform(groups.size(1) + size).split((groups.size(1), size), dim=-1)
    g = _race(groups.sum(-1), u)
    return g * size + _race(groups[torch.arange(M, device=logits.device), g], v)


def sharpen(logits, temperature=1.0, top_p=1.0):
    """
    Temperature, then nucleus (arXiv 1904.09751): the fewest most likely tokens whose probability reaches top_p.
    Temperature 0 is greedy: all mass on the argmax. logits (..., V) -> (..., V). Raises ValueError out of range.
    """
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must be finite and >= 0, top_p {top_p} in (0, 1]")
    if temperature == 0:
        return torch.full_like(logits, -math.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    if temperature != 1:
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest at 0: a tiny temperature overflows nothing
    if top_p < 1:
        value, index = logits.sort(-1, descending=True)
        p = value.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # what stands before it is enough already
        logits = logits.masked_fill(outside.scatter(-1, index, outside), -math.inf)
    return logits


# ----- noise processes


def _column(alpha, like):
    """An alpha as float64 that broadcasts against (B, L); small numbers like 1 - alpha must not be rounded first."""
    alpha = torch.as_tensor(alpha, dtype=_float(like.device), device=like.device)  # a Python float as it is, not by way of float32
    return alpha[:, None] if alpha.dim() == 1 else alpha


def _cross_entropy(logits, x0):
    return F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view_as(x0)  # (B, L)


class Masked:
    """Absorbing noise: a token is replaced by mask_id with probability 1 - alpha_t (MDLM, arXiv 2406.07524)."""

    def __init__(self, vocab_size, mask_id):
        self.vocab_size, self.mask_id = vocab_size, mask_id
        self.ar_token = mask_id  # what block size 1 reads in place of the token it predicts

    def prior(self, shape, noise=None, device=None):
        """Pure noise: all masks, (B, L) int64."""
        return torch.full(shape, self.mask_id, dtype=torch.long, device=device)

    ar_input = prior

    def corrupt(self, x0, alpha, noise=None):
        """A draw of q(x_t | x_0), (B, L) int64."""
        u = (noise or Noise.like(x0)).uniform(1)[..., 0]
        return torch.where(u <= 1 - _column(alpha, x0), self.mask_id, x0)

    def loo_logits(self, logits, xt=None, alpha=None):
        """The mask is never the answer: its logit goes to -inf (SUBS, first half). At a mask D and l (see Uniform) are one. (..., V)"""
        logits = precise(logits).clone()
        logits[..., self.mask_id] = -math.inf
        return logits

    def denoiser_logits(self, logits, xt, alpha=None):
        """Logits of D = p(x_0 | x_t): as above at masks; a visible token is carried over, with certainty (SUBS, second half). (..., V)"""
        logits = self.loo_logits(logits)
        carried = torch.full_like(logits, -math.inf).scatter(-1, xt[..., None], 0.0)
        return torch.where((xt == self.mask_id)[..., None], logits, carried)

    def ce(self, logits, x0, xt):
        """-log p(x_0 | x_t) (B, L): cross-entropy at masks, 0 where the token is visible."""
        return torch.where(xt == self.mask_id, _cross_entropy(self.loo_logits(logits), x0), 0.0)

    def nll(self, logits, x0, xt, alpha, dalpha):
        """
        Integrand of the bound E_t[...] >= -log p(x_0), one t a row, (B, L) nats (MDLM, arXiv 2406.07524):
            -alpha'_t / (1 - alpha_t) * 1[x_t = mask] * -log p(x_0 | x_t)
        """
        alpha, dalpha = _column(alpha, logits), _column(dalpha, logits)
        ce = self.ce(logits, x0, xt)
        return torch.where(ce == 0, 0.0, (-dalpha / (1 - alpha)).to(ce.dtype) * ce)  # alpha = 1 masks nothing

    def posterior_probs(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
        """
        q(x_s | x_t, p), s < t, dense float64 (B, L, V), for reading and for tests:
            x_t = mask:  (alpha_s - alpha_t) / (1 - alpha_t) p  +  (1 - alpha_s) / (1 - alpha_t) onehot(mask)
            otherwise:   onehot(x_t)
        """
        a_t, a_s = (_column(a, logits)[..., None] for a in (alpha_t, alpha_s))
        stay = F.one_hot(xt, self.vocab_size).double()
        p = sharpen(self.loo_logits(logits.double()), temperature, top_p).softmax(-1)
        move = (a_s - a_t) / (1 - a_t)
        return torch.where((xt == self.mask_id)[..., None], move * p + (1 - move) * stay, stay)

    def posterior_sample(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0, noise=None):
        """One draw of the above, (B, L) int64. Logits are read only at the masks that lift in this step."""
        noise = noise or Noise.like(xt)
        a_t, a_s = _column(alpha_t, logits), _column(alpha_s, logits)
        lift = (xt == self.mask_id) & (noise.uniform(1)[..., 0] <= (a_s - a_t) / (1 - a_t))
        xs = xt.clone()
        xs[lift] = draw(sharpen(self.loo_logits(logits[lift]), temperature, top_p), lambda n: noise.uniform(n, lift))
        return xs


class Uniform:
    """
    Uniform noise: a token is replaced by a uniformly drawn one with probability 1 - alpha_t (UDLM, arXiv 2412.10193; Duo, 2506.10892).

    predicts: what the network was trained to output.
        "loo"       l = p(x0_i | x_t without its own token i), the minimiser of the uniform bound: published weights
        "denoiser"  D = p(x0_i | x_t), the minimiser of cross-entropy
    Seeing x_t itself is evidence for it, and that is all that tells them apart (arXiv 2605.22765):
        D(v) ∝ l(v) (1 + 1[v = x_t] V alpha_t / (1 - alpha_t))
    The bound and the reverse step below want l, so D is converted first: one logit moves.

    ar_token: block size 1 reads this id in place of the token it predicts. None: a random token, as published; its NLL is then
    the mean over that token of -log p, a bound on the NLL of text generated so (Jensen), not the exact one.
    """

    mask_id = None

    def __init__(self, vocab_size, predicts="loo", ar_token=None):
        assert predicts in ("loo", "denoiser"), f"predicts {predicts!r}: loo or denoiser"
        self.vocab_size, self.predicts, self.ar_token = vocab_size, predicts, ar_token

    def prior(self, shape, noise=None, device=None):
        """Pure noise: uniform ids, (B, L) int64. With a Noise, which has a shape and a device, the other two are not read."""
        if noise is None:
            return torch.randint(self.vocab_size, shape, device=device)
        return self._ids(noise.uniform(1)[..., 0])

    def ar_input(self, shape, noise=None, device=None):
        if self.ar_token is None:
            return self.prior(shape, noise, device)
        return torch.full(shape, self.ar_token, dtype=torch.long, device=device)

    def _ids(self, u):
        return (u * self.vocab_size).long().clamp(max=self.vocab_size - 1)

    def corrupt(self, x0, alpha, noise=None):
        """A draw of q(x_t | x_0), (B, L) int64."""
        u = (noise or Noise.like(x0)).uniform(2)
        return torch.where(u[..., 0] <= 1 - _column(alpha, x0), self._ids(u[..., 1]), x0)

    def loo_logits(self, logits, xt, alpha):
        """The network's output as leave-one-out logits: D -> l subtracts log(1 + V alpha / (1 - alpha)) at x_t. (..., V)"""
        return precise(logits) if self.predicts == "loo" else self._own_evidence(logits, xt, alpha, -1)

    def denoiser_logits(self, logits, xt, alpha):
        """The network's output as denoiser logits: l -> D adds what the above subtracts. (..., V)"""
        return precise(logits) if self.predicts == "denoiser" else self._own_evidence(logits, xt, alpha, 1)

    def _own_evidence(self, logits, xt, alpha, sign):
        logits, alpha = precise(logits), _column(alpha, logits)
        bonus = torch.log1p(self.vocab_size * alpha / (1 - alpha)).to(logits.dtype).expand(xt.shape)
        return logits.scatter(-1, xt[..., None], logits.gather(-1, xt[..., None]) + sign * bonus[..., None])

    def ce(self, logits, x0, xt):
        """-log D(x_0) (B, L): plain cross-entropy at every position, noisy or not."""
        return _cross_entropy(precise(logits), x0)

    def nll(self, logits, x0, xt, alpha, dalpha):
        """
        Integrand of the bound E_t[...] >= -log p(x_0), one t a row, (B, L) nats (Duo, arXiv 2506.10892, as a Bregman form), z = x_t:
            -alpha'_t / (V alpha_t) * sum_v [ r_v log(r_v / rh_v) - r_v + rh_v ] >= 0
            r_v = xb_v(onehot(x_0)) / xb_z(onehot(x_0)),   rh_v = xb_v(l) / xb_z(l),   xb_v(p) = V alpha_t p_v + 1 - alpha_t
        With b = 1 - alpha and c = b / (V alpha + b), r takes two values:
            z  = x_0:  r_z = 1,       r_v = c elsewhere
            z != x_0:  r_x0 = 1 / c,  r_v = 1 elsewhere        (1 / c - 1 = V alpha / b)
        so the sum over v needs only S = sum_v log xb_v, its entries at z and x_0, and l_z. Written with xb = b (1 + q),
        q = V alpha l / b, every b cancels before it is rounded; the linear terms are subtracted by hand for the same reason.
        alpha in [0, 1): at alpha = 0 the integrand is 0.
        """
        V, a, da = self.vocab_size, _column(alpha, logits), _column(dalpha, logits)
        b = 1 - a
        logp = self.loo_logits(logits, xt, a).log_softmax(-1)  # (B, L, V)
        cast = lambda x: x.to(logp.dtype)  # numbers a row: formed in float64, used in the logits' precision
        log1q = F.softplus(logp + cast((V * a / b).log())[..., None])  # log(1 + q_v)
        at = lambda x, ids: x.gather(-1, ids[..., None])[..., 0]
        S, S_z, S_0, p_z = log1q.sum(-1), at(log1q, xt), at(log1q, x0), at(logp, xt).exp()
        same, log_c = x0 == xt, -torch.log1p(V * a / b)
        c = log_c.exp()
        r_log_r = torch.where(same, cast((V - 1) * c * log_c), cast(-log_c / c))
        r_log_rh = torch.where(same, cast(c) * (S - V * S_z), S - V * S_z + cast(V * a / b) * (S_0 - S_z))
        linear = (same.to(p_z) - p_z) * V / (cast(V * a * same + b) * (cast(b) + cast(V * a) * p_z))  # (sum rh - r) / (V alpha)
        return torch.where(a == 0, 0.0, cast(-da / (V * a)) * (r_log_r - r_log_rh) + cast(-da) * linear)

    def posterior_probs(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
        """
        q(x_s | x_t, l), s < t, dense float64 (B, L, V), for reading and for tests. z = x_t, a_ts = alpha_t / alpha_s:
            [ (V alpha_t l_z + a_ts - alpha_t) onehot(z) + (alpha_s - alpha_t) l + (1 - a_ts) (1 - alpha_s) / V ]
            / (V alpha_t l_z + 1 - alpha_t)
        """
        a_t, a_s = (_column(a, logits)[..., None] for a in (alpha_t, alpha_s))
        p = sharpen(self.loo_logits(logits.double(), xt, a_t[..., 0]), temperature, top_p).softmax(-1)
        z = F.one_hot(xt, self.vocab_size).double()
        seen = self.vocab_size * a_t * (p * z).sum(-1, keepdim=True)
        a_ts = a_t / a_s
        return ((seen + a_ts - a_t) * z + (a_s - a_t) * p + (1 - a_ts) * (1 - a_s) / self.vocab_size) / (seen + 1 - a_t)

    def posterior_sample(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0, noise=None):
        """
        One draw of the above, (B, L) int64, as the three-way choice it is: a fresh uniform token, x_t again, or a token from l.
        Of the vocabulary it needs the normaliser and l_z, and a draw where the third case came up.
        """
        noise = noise or Noise.like(xt)
        V, a_t, a_s = self.vocab_size, _column(alpha_t, logits), _column(alpha_s, logits)
        logp = sharpen(self.loo_logits(logits, xt, a_t), temperature, top_p).log_softmax(-1)
        p_z = logp.gather(-1, xt[..., None])[..., 0].to(a_t).exp()
        seen = V * a_t * p_z
        u, fresh = noise.uniform(2).unbind(-1)
        c1 = (1 - a_t / a_s) * (1 - a_s) / (seen + 1 - a_t)
        c2 = (seen + a_t * (1 / a_s - 1)) / (seen + 1 - a_t)
        xs = torch.where(u <= c1, self._ids(fresh), xt)
        move = u > c1 + c2
        xs[move] = draw(logp[move], lambda n: noise.uniform(n, move))
        return xs


# ----- training


def stratified_draw(block_sizes, n, seed, step):
    """
    A block size and a time for each of the n rows of one optimizer step, over all ranks and accumulation steps together
    (every rank makes the same call and takes its rows): sizes (n,) int64, t (n,) float64 in (0, 1).
    block_sizes: size -> weight. Each size gets its share of the rows to within one row, and the rows of a size get one
    time in each of as many equal slices of (0, 1): lower variance than independent draws, same mean.
    """
    u = Noise(seed, torch.tensor([-1]), torch.arange(n), step).uniform(3)[0]  # (n, 3)
    sizes = torch.tensor(list(block_sizes))
    edges = torch.tensor(list(block_sizes.values()), dtype=torch.float64).cumsum(0)
    slot = (torch.arange(n) + u[0, 0]) / n  # a comb of n teeth with one random offset
    which = torch.searchsorted(edges, slot).clamp(max=len(sizes) - 1)  # rounding may leave the last edge below 1
    t = torch.empty(n, dtype=torch.float64)
    for k in range(len(sizes)):
        rows = (which == k).nonzero()[:, 0]
        t[rows] = (torch.arange(len(rows)) + u[rows, 1]) / len(rows)
    order = u[:, 2].argsort()  # who gets which: no link between a row of the batch and its noise level
    return sizes[which][order], t[order].clamp(1e-9, 1 - 1e-9)


def token_loss(model, process, x0, block_size, t, objective, answer=None, schedule=loglinear, start=0, noise=None, relaxation=None):
    """
    Loss of every noisy token in nats, (B, L - start), one forward.
    x0 (B, L) clean ids; block_size (B,) int64, or an int; t (B,) float64 in (0, 1).
    objective: a name for all block sizes, or {size: name}; block size 1 is pure noise with cross-entropy whatever it says,
    which is the exact autoregressive NLL. The names, with D or l the network's output:
        elbo      the process's bound: process.nll
        ce        -log D(x_0), unweighted ("low variance", arXiv 2602.15014)
        ce_noisy  the same, only where x_t != x_0
    answer (B, L) bool: tokens to predict; the others are prompts, never noised, and their loss is 0. None: all.
    start: the first position with a noisy copy, a multiple of every block size, no answer before it.
    noise: a Noise for (B, L - start).
    relaxation: a duo.Relaxation, for soft noisy tokens and its own relation of alpha and t.
    """
    x = x0[:, start:]
    noise = noise or Noise.like(x)
    sizes = torch.full((x.size(0),), block_size) if isinstance(block_size, int) else block_size
    names = {s: objective if isinstance(objective, str) else objective[s] for s in set(sizes.tolist()) - {1}}
    ar = (sizes == 1)[:, None].to(x.device)
    open = torch.ones_like(x, dtype=torch.bool) if answer is None else answer[:, start:]
    pure = process.prior(x.shape, noise, x.device)
    if relaxation is None:
        alpha, dalpha = schedule(t)
        xt = process.corrupt(x, alpha, noise)
    else:
        soft, xt, alpha, dalpha = relaxation.corrupt(x, t, noise)
    xt = torch.where(ar, pure, xt)
    xt = torch.where(open, xt, x)  # what the loss calls noisy
    read = torch.where(ar & open, process.ar_input(x.shape, noise, x.device), xt)  # what the network is fed
    if relaxation is not None:
        read = relaxation.harden(soft, read, ar | ~open)
    level = sigma(torch.where(sizes == 1, 0.0, alpha))  # block size 1 is pure noise: alpha 0
    logits = model(x0, read, block_size, start, level)  # (B, L - start, V)

    ce = loss = process.ce(logits, x, xt)
    for name in set(names.values()) - {"ce"}:
        assert name in ("elbo", "ce_noisy"), f"objective {name!r}: elbo, ce or ce_noisy"
        other = process.nll(logits, x, xt, alpha, dalpha) if name == "elbo" else torch.where(xt == x, 0.0, ce)
        rows = torch.isin(sizes, torch.tensor([s for s in names if names[s] == name])).to(x.device)
        loss = torch.where(rows[:, None], other, loss)
    return torch.where(open, loss, 0.0)
