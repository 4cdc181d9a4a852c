"""
What is the maths? Noise schedules, the two noise processes and their losses. (samplers.py goes the way back.)

Conventions: t = 0 is clean and t = 1 is noise, so alpha(0) = 1 and alpha(1) = 0. Both processes corrupt every token alone:

    q(x_t | x_0) = alpha_t onehot(x_0) + (1 - alpha_t) pi        pi = the mask token, or uniform over the vocabulary

Everything is in nats per token. Letters: B rows, L positions, V vocabulary (the mask token included for masked noise),
x0 clean ids, xt noisy ids, a_t short for alpha_t. An alpha is a number, or a tensor (B,), (B, 1) or (B, L).
"""

import math

import torch
import torch.nn.functional as F

from fast.draws import Noise, sample, settle, sharpen
from kernels import cross_entropy, float64, send, through_head, uniform_nll
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


def sigma_for(model, alpha):
    """sigma(alpha), or None where the network is not to see it: it has no such input, or one that was 0 throughout (published weights)."""
    return None if getattr(getattr(model, "module", model), "timeless", False) else sigma(alpha)  # DDP keeps it in .module


# ----- noise processes


def _column(alpha, like):
    """An alpha as float64 that broadcasts against (B, L); small numbers like 1 - alpha must not be rounded first."""
    if not torch.is_tensor(alpha):  # a Python float as it is, not by way of float32; a fill, for which no host waits
        return torch.full((), alpha, dtype=float64(like.device), device=like.device)
    alpha = send(alpha, like.device, float64(like.device))
    return alpha[:, None] if alpha.dim() == 1 else alpha


def _flat(logits, *others):
    """Rows of logits (B, L, V) -> (B L, V), and what broadcasts to (B, L) -> (B L,)."""
    return logits.flatten(0, 1), *(x.expand(logits.shape[:2]).flatten() for x in others)


def _reverse_step(process, logits, xt, alpha_t, alpha_s, temperature, top_p, noise, where):
    """posterior_sample of both processes: draws.sample does it, whatever the noise."""
    a_t, a_s, key = _column(alpha_t, xt).expand(xt.shape), _column(alpha_s, xt), (noise or Noise.like(xt)).keys()
    mixture = torch.stack([x.expand(xt.shape) for x in process.mixture(xt, a_t, a_s)], -1)
    x, key, mixture, a_t = (y.flatten(0, 1) for y in (xt, key, mixture, a_t))  # a row a token
    token = settled = None
    if callable(logits):
        settled = settle(key, x, mixture, process.vocab_size)
        token, asked = settled[0], settled[1].view_as(xt)
        asked = (asked if where is None else asked & where).cpu()  # once: the host decides what is run
        logits, index = logits(asked), send(asked.flatten().nonzero()[:, 0], x.device)
        x, key, mixture, a_t, *settled = (y[index] for y in (x, key, mixture, a_t, *settled))
    plain = 0 < temperature < math.inf and top_p == 1
    how = {"temperature": temperature} if plain else {"transform": lambda z: sharpen(z, temperature, top_p)}
    drawn = sample(logits.flatten(0, -2), key, xt=x, mixture=mixture, **how, **process.edit(x, a_t), settled=settled).token
    token = (drawn if token is None else token.index_copy(0, index, drawn)).view_as(xt)
    return token if where is None else torch.where(where, token, xt)


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

    def ce(self, logits, x0, xt, overwrite=False):
        """-log p(x_0 | x_t) (B, L): cross-entropy at masks, 0 where the token is visible. overwrite: logits may be, see cross_entropy."""
        rows, x0_, masked = _flat(logits, x0, xt == self.mask_id)
        return cross_entropy(rows, x0_, masked, self.mask_id, overwrite)[0].view_as(x0)

    def nll(self, logits, x0, xt, alpha, dalpha, overwrite=False):
        """
        Integrand of the bound E_t[...] >= -log p(x_0), one t a row, (B, L) nats (MDLM, arXiv 2406.07524):
            -alpha'_t / (1 - alpha_t) * 1[x_t = mask] * -log p(x_0 | x_t)
        """
        a, da = _column(alpha, logits), _column(dalpha, logits)
        rows, x0_, weight = _flat(logits, x0, torch.where(xt == self.mask_id, -da / (1 - a), 0.0))  # alpha = 1 masks nothing
        return cross_entropy(rows, x0_, weight, self.mask_id, overwrite)[0].view_as(x0)

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

    def posterior_sample(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0, noise=None, where=None):
        """
        One draw of the above, (B, L) int64. Logits matter only at the masks that lift in this step, and which ones do is settled without
        them: so logits are (B, L, V), or a function that is told (B, L) bool, on the CPU, and returns theirs, (M, V). where (B, L) bool:
        x_t elsewhere.
        """
        return _reverse_step(self, logits, xt, alpha_t, alpha_s, temperature, top_p, noise, where)

    def mixture(self, xt, a_t, a_s):
        """
        (seen, rest, fresh, stay) of draws.sample, the above in numbers: stay a mask with probability (1 - alpha_s) / (1 - alpha_t), never
        leave a token.
        """
        masked = xt == self.mask_id
        return torch.zeros_like(a_t), torch.where(masked, 1 - a_t, 1.0), torch.zeros_like(a_t), torch.where(masked, 1 - a_s, 1.0)

    def edit(self, xt, a_t):
        """loo_logits for draws.sample."""
        return {"forbidden": self.mask_id}


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
        return precise(logits) if self.predicts == "loo" else self._add_evidence(logits, xt, -self.evidence(_column(alpha, logits)))

    def denoiser_logits(self, logits, xt, alpha):
        """The network's output as denoiser logits: l -> D adds what the above subtracts. (..., V)"""
        return precise(logits) if self.predicts == "denoiser" else self._add_evidence(logits, xt, self.evidence(_column(alpha, logits)))

    def evidence(self, alpha):
        """What seeing x_t itself says for it: log(1 + V alpha / (1 - alpha))."""
        return torch.log1p(self.vocab_size * alpha / (1 - alpha))

    def _add_evidence(self, logits, xt, bonus):
        return precise(logits).scatter_add(-1, xt[..., None], bonus.to(precise(logits)).expand(xt.shape)[..., None])

    def ce(self, logits, x0, xt, overwrite=False):
        """-log D(x_0) (B, L): plain cross-entropy at every position, noisy or not. overwrite: logits may be, see cross_entropy."""
        rows, x0_ = _flat(logits, x0)
        return cross_entropy(rows, x0_, overwrite=overwrite)[0].view_as(x0)

    def last_step(self, logits, x0, xt, alpha, overwrite=False):
        """-log D(x_0) (B, L), whatever the network predicts: what the step from t to 0 costs."""
        return self.ce(self.denoiser_logits(logits, xt, alpha), x0, xt, overwrite)

    def nll(self, logits, x0, xt, alpha, dalpha, overwrite=False):
        """
        Integrand of the bound E_t[...] >= -log p(x_0), one t a row, (B, L) nats (Duo, arXiv 2506.10892, as a Bregman form), z = x_t:
            -alpha'_t / (V alpha_t) * sum_v [ r_v log(r_v / rh_v) - r_v + rh_v ] >= 0
            r_v = xb_v(onehot(x_0)) / xb_z(onehot(x_0)),   rh_v = xb_v(l) / xb_z(l),   xb_v(p) = V alpha_t p_v + 1 - alpha_t
        kernels.uniform_nll takes the sum apart. alpha in [0, 1): at alpha = 0 the integrand is 0.
        """
        a, da = _column(alpha, logits), _column(dalpha, logits)
        shift = self.evidence(a) if self.predicts == "denoiser" else torch.zeros_like(a)
        return uniform_nll(*_flat(logits, x0, xt, a, da), shift=_flat(logits, shift)[1], overwrite=overwrite).view_as(x0)

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

    def posterior_sample(self, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0, noise=None, where=None):
        """
        One draw of the above, (B, L) int64, as the three-way choice it is: a fresh uniform token, x_t again, or a token from l.
        logits, where: as in Masked; many a token is x_t again whatever l says.
        """
        return _reverse_step(self, logits, xt, alpha_t, alpha_s, temperature, top_p, noise, where)

    def mixture(self, xt, a_t, a_s):
        """(seen, rest, fresh, stay) of draws.sample, the above in numbers: alpha_t / alpha_s - alpha_t = alpha_t (1 / alpha_s - 1)."""
        return self.vocab_size * a_t, 1 - a_t, (1 - a_t / a_s) * (1 - a_s), a_t * (1 / a_s - 1)

    def edit(self, xt, a_t):
        """loo_logits for draws.sample."""
        return {"shift": self.evidence(a_t)} if self.predicts == "denoiser" else {}


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


def token_loss(
    model, process, x0, block_size, t, objective, answer=None, schedule=loglinear, start=0, noise=None, device=None, relaxation=None
):
    """
    The loss in nats, one forward: (total, each), the sum over tokens, to be differentiated, and its terms (B, L - start), detached. Logits
    are made for tokens that cost something, some at a time (kernels.through_head).
    x0 (B, L) clean ids; block_size (B,) int64, or an int; t (B,) float64 in (0, 1), or (B, L - start), one a token.
    objective: a name for all block sizes, or {size: name}; block size 1 is pure noise with cross-entropy whatever it says,
    which is the exact autoregressive NLL. The names, with D or l the network's output:
        elbo      the process's bound: process.nll
        ce        -log D(x_0), unweighted ("low variance", arXiv 2602.15014)
        ce_noisy  the same, only where x_t != x_0
        last      uniform noise: -log D(x_0), converted if the output is l; for eval.py, what a bound that ends at t > 0 leaves out
    answer (B, L) bool: tokens to predict; the others are prompts, never noised, and their loss is 0. None: all.
    start: the first position with a noisy copy, a multiple of every block size, no answer before it.
    noise: a Noise for (B, L - start).
    device: where the network is, if x0, answer and noise are on the CPU. Then they are corrupted there, the host knows which tokens cost
    something, and no step waits for a GPU to tell. None: where x0 is.
    relaxation: a duo.Relaxation, for soft noisy tokens and its own relation of alpha and t.
    """
    device = device or x0.device
    there = lambda y: send(y, device, float64(device) if y.dtype == torch.float64 else None)
    if relaxation is not None:  # soft tokens are made where they are read
        x0, answer, noise = there(x0), answer if answer is None else there(answer), noise and noise.to(device)
    x = x0[:, start:]
    noise = noise or Noise.like(x)
    sizes = torch.full((x.size(0),), block_size) if isinstance(block_size, int) else block_size
    names = {s: objective if isinstance(objective, str) else objective[s] for s in set(sizes.tolist()) - {1}}
    ar = send((sizes == 1)[:, None], x.device)
    open = torch.ones_like(x, dtype=torch.bool) if answer is None else answer[:, start:]
    pure = process.prior(x.shape, noise, x.device)
    if relaxation is None:
        alpha, dalpha = schedule(t)
        xt = process.corrupt(x, alpha, noise)
    else:
        soft, xt, alpha, dalpha = relaxation.corrupt(x, t, noise)
    xt = torch.where(ar, pure, xt)
    xt = torch.where(open, xt, x)  # what the loss calls noisy
    read = there(torch.where(ar & open, process.ar_input(x.shape, noise, x.device), xt))  # what the network is fed
    if relaxation is not None:
        read = relaxation.harden(soft, read, ar | ~open)
    level = sigma_for(model, torch.where(sizes.view(-1, *[1] * (t.dim() - 1)) == 1, 0.0, alpha))  # block size 1 is pure noise: alpha 0

    # which token costs what
    rows = lambda name: torch.isin(sizes, torch.tensor([s for s in names if names[s] == name]))[:, None]  # (B, 1)
    taught = lambda name: send(rows(name), x.device)
    assert set(names.values()) <= {"elbo", "ce", "ce_noisy", "last"}, f"objective {objective!r}: elbo, ce, ce_noisy or last"
    pays = open & ~(taught("ce_noisy") & (xt == x))
    if process.mask_id is not None:
        pays = pays & (xt == process.mask_id)  # a visible token is known
    flat = [there(y.expand_as(x).flatten()) for y in (x, xt, _column(alpha, x), _column(dalpha, x))]
    place = pays.flatten().cumsum(0) - 1  # of a token among those that pay

    def part(price, tokens):
        """Some of the tokens, their places among those that pay, and their losses as through_head wants them."""
        index = tokens.flatten().nonzero()[:, 0]
        index, among = there(index), there(place[index])
        return index, among, lambda logits, rows: price(logits[None], *(y[index[rows]][None] for y in flat), overwrite=True)[0]

    ce = lambda logits, x0, xt, *_, overwrite: process.ce(logits, x0, xt, overwrite)
    last = lambda logits, x0, xt, alpha, _, overwrite: process.last_step(logits, x0, xt, alpha, overwrite)
    parts = [part(ce, pays & ~taught("elbo") & ~taught("last"))]
    parts += [part(price, pays & taught(name)) for name, price in (("elbo", process.nll), ("last", last)) if name in names.values()]

    def readout(hidden, weight, bias):
        total, each, hidden = 0.0, hidden.new_zeros(x.numel()), hidden.flatten(0, -2)  # of all tokens, or of those that pay
        for index, among, loss in parts:
            at = index if len(hidden) == x.numel() else among  # a compiled forward makes all, whatever it is asked
            more, each[index] = through_head(hidden.index_select(0, at), weight, bias, loss)
            total = total + more
        return total, each.view_as(x)

    ask = pays if t.dim() == 1 and sum(len(index) for index, *_ in parts) < x.numel() else None
    return model(there(x0), read, block_size, start, level, readout=readout, ask=ask)
