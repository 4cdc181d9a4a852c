"""
How does noise become text? Every sampler of the family, one function each, beside its equation.

A sampler fills one block (generate.Block: x, open, live, alpha, predict, verify, posterior, write, ...) and is a generator: it
yields after every step. Its keyword arguments are its command-line options. The loop around it (prompts, cache, counting) is
generate.generate. A new sampler is a function here and its name in SAMPLERS, at the end.

Letters: R rows, b positions of the block, V vocabulary; a_t = alpha_t before a step, a_s after it (a_s > a_t), s the time of
a_s. Three distributions a position (Uniform in diffusion.py says more):

    D    p(x0_i | x_t), the denoiser: has seen its own noisy token
    l    p(x0_i | x_t without token i), leave-one-out; at a mask the same as D
    p_AR p(x0_i | clean tokens before i): the same network at block size 1 (`verify`), exact, one pass for all positions
"""

import math

import torch

# ----- pieces


def top(score, n, among):
    """(R, b) bool: in every row the n highest scores among the positions `among`; n an int or (R,). Ties go left."""
    score = torch.where(among, score.double().clamp(min=-1e300), -math.inf)  # an impossible token still beats a place that is not asked
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < torch.as_tensor(n, device=score.device).view(-1, 1)) & among


def at(x, ids):
    """x (..., V) at ids (...)."""
    return x.gather(-1, ids[..., None])[..., 0]


def entropy(logp):
    """Of log-probabilities (..., V), in nats."""
    return torch.special.entr(logp.exp()).sum(-1)


def margin(logits):
    """The highest minus the second highest."""
    best = logits.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


# ----- following the reverse process


def ancestral(block, *, greedy_tail=False):
    """
    x_s ~ q(x_s | x_t, p), the process's own reverse step (MDLM, arXiv 2406.07524; UDLM, 2412.10193; by block BD3-LM, 2503.09573).
    A masked network that does not see the time is not asked again while nothing has changed (MDLM's prediction cache).

    greedy_tail: end with the argmax, see `tail`
    """
    for k in range(block.steps):
        temperature = 0.0 if greedy_tail and is_last_fill(block, k) else None
        block.write(block.posterior(block.predict(block.alpha[k]), block.alpha[k], block.alpha[k + 1], block.noise(k), temperature))
        yield
    if greedy_tail:
        yield from tail(block)


def is_last_fill(block, k):
    return block.process.mask_id is not None and k + 1 == block.steps


def tail(block):
    """
    Greedy tail (Psi-samplers, arXiv 2602.21185): x <- argmax D once more, at t = 1e-5 and the price of one pass and some diversity.
    Masked noise: a written token stays, so there is nothing to do; its last fill is the argmax instead.
    """
    if block.process.mask_id is None:
        alpha = 1 - 1e-5
        block.write(block.process.denoiser_logits(block.predict(alpha), block.x, alpha).argmax(-1))
        yield


def ar(block):
    """Block size 1: x_i ~ p_AR(x_i | x_<i), one pass a token."""
    block.write(block.ar_draw(block.predict(0.0, block.ar_input())))
    yield


def kl(p, q):
    """KL(p || q) of log-probabilities (..., V)."""
    return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1)


SCORES = {  # how bad a token y is, (R, b), with log p (R, b, V) of the diffusion mode and log p_AR; the first is the default
    "ar": {
        "nll": lambda y, p, ar: -at(ar, y),
        "gap": lambda y, p, ar: ar.amax(-1) - at(ar, y),
        "entropy": lambda y, p, ar: entropy(ar),
    },
    "divergence": {
        "kl": lambda y, p, ar: kl(ar, p),
        "reverse_kl": lambda y, p, ar: kl(p, ar),
        "tv": lambda y, p, ar: (ar.exp() - p.exp()).abs().sum(-1) / 2,
    },
    "diffusion": {
        "entropy": lambda y, p, ar: entropy(p),
        "confidence": lambda y, p, ar: -p.amax(-1),
        "margin": lambda y, p, ar: -margin(p.exp()),
    },
    "random": {},
}


def arpc(block, *, guide_every=1, warmup=0, corruption="ar", metric="", verify_temperature=1.0):
    """
    AR-informed predictor-corrector (BlockGen, arXiv 2606.02241). A guided step predicts the whole block and lets the AR mode of the
    same network say which of its tokens are worst:

        y ~ q(x_0 | x_t, p),   score_i = e.g. -log p_AR(y_i | y_<i),   x_s = y with pure noise at the (1 - a_s) n_open worst

    rounded half up, prompt positions neither corrupted nor counted. Other steps, and always the last, are ancestral. A guided step
    costs two passes, one with corruption random or diffusion.

    guide_every: every so many steps is guided
    warmup: so many ancestral steps first
    corruption: what is worst: random | divergence of p_AR and p | diffusion: doubt of p | ar: doubt of p_AR
    metric: ar: nll, gap (to the likeliest token), entropy | divergence: kl(p_AR, p), reverse_kl, tv | diffusion: entropy,
        confidence, margin; empty: the first
    verify_temperature: of p_AR in the score; the sampling temperature stays out of it

    p is the distribution that the token was drawn from: D. A masked network says nothing about a token it can see (SUBS puts all
    mass on it, and no visible token would ever be doubted), so there p is kept from the last step at which the token was a mask.
    """
    if corruption not in SCORES:
        raise ValueError(f"corruption {corruption!r} is none of {', '.join(SCORES)}")
    if metric and metric not in SCORES[corruption]:
        raise ValueError(f"corruption {corruption} has no metric {metric!r}, but {', '.join(SCORES[corruption]) or 'none at all'}")
    if guide_every < 1 or warmup < 0 or not 0 < verify_temperature < math.inf:
        raise ValueError(f"guide_every {guide_every} must be >= 1, warmup {warmup} >= 0, verify_temperature {verify_temperature} > 0")
    process, p, p_ar = block.process, None, None
    for k in range(block.steps):
        (a_t, a_s), noise = block.alpha[k : k + 2], block.noise(k)
        logits = block.predict(a_t)
        if corruption in ("divergence", "diffusion"):
            now = process.denoiser_logits(logits, block.x, a_t).log_softmax(-1)  # (R, b, V)
            masked = block.x == process.mask_id if process.mask_id is not None else torch.ones_like(block.open)
            p = now if p is None else torch.where(masked[..., None], now, p)
        if k < warmup or (k - warmup) % guide_every or k + 1 == block.steps:
            block.write(block.posterior(logits, a_t, a_s, noise))
            yield
            continue
        y = torch.where(block.open, block.posterior(logits, a_t, 1.0, noise), block.x)
        if corruption in ("divergence", "ar"):
            p_ar = (process.loo_logits(block.verify(y), block.x, 0.0) / verify_temperature).log_softmax(-1)
        if corruption == "random":
            score = noise.uniform(1)[..., 0]
        else:
            score = SCORES[corruption][metric or next(iter(SCORES[corruption]))](y, p, p_ar)
        n = ((1 - a_s) * block.open.sum(1) + 0.5).floor()
        block.write(torch.where(top(score, n, block.open), block.prior(noise), y))
        yield


def psi(block, *, kappa="constant", eta=0.5, greedy_tail=False):
    """
    Psi-samplers (arXiv 2602.21185): with probability kappa the reverse step, else a clean guess that is noised again,

        x_s ~ kappa q(x_s | x_t, p) + (1 - kappa) [ a_s q(x_0 | x_t, p) + (1 - a_s) pi ]

    token by token. Marginals are kept for any kappa in [0, 1]: 1 is ancestral, 0 forgets everything but the guess.

    kappa: posterior (1) | pc (0) | constant (eta) | cap | rescale | remask: kappa = 1 - sigma / (1 - a_s), with
        sigma = min(eta, (1 - a_s) / a_t) | eta min(1, (1 - a_s) / a_t) | eta. One word, or a profile over the time t from 1 to 0:
        "0.55:posterior,0.05:cap,0:posterior" is posterior down to t = 0.55, cap down to 0.05, posterior to the end;
        "0.55:posterior,0.05@0.9:remask,0:posterior" holds alpha at 0.9 meanwhile (ReMDM's loop)
    eta: see kappa
    greedy_tail: end with the argmax

    Masked noise with cap, rescale or the loop is ReMDM, as long as sigma <= 1 - a_s: where ReMDM goes further kappa is cut at 0.
    """
    until, hold, modes = profile(kappa)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is a probability")
    alpha = held(block, until[0], until[1], hold) if hold else block.alpha
    for k in range(block.steps):
        (a_t, a_s), noise, s = alpha[k : k + 2], block.noise(k), 1 - (k + 1) / block.steps
        mode = next(m for u, m in zip(until, modes, strict=True) if s >= u - 1e-9)
        limit = min(1.0, ((1 - a_s) / a_t).item())  # a_t = 0 gives inf
        sigma = {"cap": min(eta, limit), "rescale": eta * limit, "remask": eta}.get(mode)
        share = {"posterior": 1.0, "pc": 0.0, "constant": eta}.get(mode)
        if share is None:
            share = max(0.0, 1 - sigma / max((1 - a_s).item(), 1e-12))
        logits = block.predict(a_t)
        reverse = noise.uniform(1)[..., 0] <= (share if k + 1 < block.steps else 1.0)
        x_s = block.posterior(logits, a_t, a_s, noise, 0.0 if greedy_tail and is_last_fill(block, k) else None)
        again = block.process.corrupt(block.posterior(logits, a_t, 1.0, noise), a_s, noise)
        block.write(torch.where(reverse, x_s, again))
        yield
    if greedy_tail:
        yield from tail(block)


def profile(text):
    """'0.55:posterior,0.05@0.9:remask,0:posterior' -> ([0.55, 0.05, 0], 0.9, [posterior, remask, posterior]); one word is '0:word'."""
    known, until, hold, modes = ("posterior", "pc", "constant", "cap", "rescale", "remask"), [], 0.0, []
    try:
        for part in (text if ":" in text else f"0:{text}").split(","):
            t, mode = part.split(":")
            t, _, level = t.partition("@")
            until, hold, modes = until + [float(t)], float(level or hold), modes + [mode]
            assert mode in known and 0 <= hold < 1 and (not level or len(until) == 2)
        assert until == sorted(until, reverse=True) and until[-1] == 0 and until[0] < 1 and (not hold or len(until) == 3)
    except (ValueError, AssertionError):
        raise ValueError(f"kappa {text!r} is none of {', '.join(known)}, nor TIME:MODE,...,0:MODE with falling times") from None
    return until, hold, modes


def held(block, t_on, t_off, level):
    """A grid of alpha that climbs to `level` at time t_on, stays until t_off and climbs on to 1. (steps + 1,)"""
    t = torch.linspace(1, 0, block.steps + 1, dtype=torch.float64)
    rise = (level * (1 - t) / (1 - t_on)).clamp(max=level)
    return torch.where(t < t_off, level + (1 - level) * (1 - t / max(t_off, 1e-12)), rise)


# ----- ReMDM: masked noise that takes tokens back


def remask(block, logits, a_t, a_s, sigma, noise):
    """
    ReMDM's reverse step (arXiv 2503.00307), sigma <= min(1, (1 - a_s) / a_t), a number or (R, b):

        x_t = token:  mask with probability sigma
        x_t = mask:   x_s ~ p with probability (a_s - (1 - sigma) a_t) / (1 - a_t)
    """
    masked = block.x == block.process.mask_id
    lift = noise.uniform(1)[..., 0] <= torch.where(masked, (a_s - (1 - sigma) * a_t) / (1 - a_t), 1 - sigma)
    x_s = block.posterior(logits, 0.0, lift.double(), noise)  # from alpha 0 to 1 where it lifts: a draw of p; elsewhere nothing
    block.write(torch.where(masked | lift, x_s, block.process.mask_id))


def remdm_cap(block, *, eta=0.02):
    """
    ReMDM, capped (arXiv 2503.00307): a visible token becomes a mask again with probability sigma = min(eta, (1 - a_s) / a_t).

    eta: the cap; the paper's 0.008 is for 1024 steps
    """
    yield from remdm(block, lambda limit: min(eta, limit), eta)


def remdm_rescale(block, *, eta=0.1):
    """
    ReMDM, rescaled (arXiv 2503.00307): sigma = eta min(1, (1 - a_s) / a_t).

    eta: between 0 (ancestral) and 1; the paper's 0.015 is for 1024 steps
    """
    yield from remdm(block, lambda limit: eta * limit, eta)


def remdm(block, sigma_of, eta):
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is a probability")
    for k in range(block.steps):
        a_t, a_s = block.alpha[k : k + 2]
        remask(block, block.predict(a_t), a_t, a_s, sigma_of(min(1.0, ((1 - a_s) / a_t).item())), block.noise(k))
        yield


def remdm_conf(block):
    """
    ReMDM by confidence (arXiv 2503.00307): sigma_i = min(1, (1 - a_s) / a_t) softmax_i(-c_i) over the visible tokens,
    c_i = p(x_i) when the token was placed. Tokens the network was unsure of are taken back first.
    """
    confidence = torch.zeros(block.x.shape, dtype=torch.float64, device=block.x.device)
    for k in range(block.steps):
        a_t, a_s = block.alpha[k : k + 2]
        logits, masked = block.predict(a_t), block.x == block.process.mask_id
        visible = block.open & ~masked
        weight = (-confidence).masked_fill(~visible, -math.inf).softmax(1).nan_to_num(0)  # a row without tokens: 0 / 0
        remask(block, logits, a_t, a_s, min(1.0, ((1 - a_s) / a_t).item()) * weight, block.noise(k))
        p = at(block.process.loo_logits(logits).softmax(-1), block.x)
        confidence = torch.where(masked, p.double(), confidence)
        yield


def remdm_loop(block, *, eta=0.05, t_on=0.55, t_off=0.05, alpha_on=0.9):
    """
    ReMDM's loop (arXiv 2503.00307): fill up to alpha_on, go on for a while as far as you stand, taking back and filling, then finish.

    eta: the sigma of the loop, at most (1 - alpha_on) / alpha_on; the paper's 0.02 is for 1024 steps
    t_on: the time at which the loop begins
    t_off: the time at which it ends
    alpha_on: the share of visible tokens in the loop
    """
    if not (0 <= t_off < t_on < 1 and 0 < alpha_on < 1 and 0 <= eta <= (1 - alpha_on) / alpha_on):
        raise ValueError(f"need 0 <= t_off < t_on < 1, 0 < alpha_on < 1 and 0 <= eta <= (1 - alpha_on) / alpha_on = {1 / alpha_on - 1:.3g}")
    alpha = held(block, t_on, t_off, alpha_on)
    for k in range(block.steps):
        a_t, a_s = alpha[k : k + 2]
        s = 1 - (k + 1) / block.steps
        sigma = eta if t_off - 1e-9 <= s < t_on - 1e-9 else 0.0
        remask(block, block.predict(a_t), a_t, a_s, sigma, block.noise(k))
        yield


def first_hitting(block):
    """
    First-hitting (arXiv 2409.02908): ancestral sampling in the limit of many steps, without the passes in which nothing happens.
    With n masks left the share of masks falls to m u^(1/n), u uniform, and then one mask, each as likely, becomes a token:
    exactly one pass a token.
    """
    share = torch.ones(len(block.x), dtype=torch.float64, device=block.x.device)  # 1 - alpha
    for k in range(block.x.size(1)):
        noise, left = block.noise(k), block.open & (block.x == block.process.mask_id)
        n = left.sum(1).clamp(min=1)
        u, order = noise.uniform(2).unbind(-1)
        share = share * u[:, 0] ** (1 / n)
        logits = block.predict(1 - share)
        block.write(block.posterior(logits, 0.0, top(order, 1, left).double(), noise))  # alpha goes to 1 at one position
        block.live = block.live & (n > 1)
        yield
        if not block.live.any():
            return


# ----- committing tokens, the surest first


def unmask(block, choose):
    """
    The loop these samplers share. Some positions are committed, the rest is pure noise: masks, or fresh uniform tokens at every step,
    whose leave-one-out l is the right prediction because they are known to be noise. A step proposes y ~ l for the rest;
    choose(k, left, y, logp) returns which positions are committed after it, and the tokens; left (R, b) marks the rest,
    logp (R, b, V) is log l, and confidence means l(y). The noise level is the share committed. The last step keeps everything.
    """
    committed = ~block.open
    for k in range(block.steps):
        left, noise = ~committed, block.noise(k)
        done = (committed & block.open).sum(1) / block.open.sum(1).clamp(min=1)
        alpha = torch.where(left.any(1), done, 0.0).double()  # 1 in rows that are finished: not asked
        logp = block.process.loo_logits(block.predict(alpha), block.x, alpha).log_softmax(-1)
        y = torch.where(left, block.draw(block.sharpen(logp), noise), block.x)
        keep, y = choose(k, left, y, logp)
        committed = keep | ~block.open
        if k + 1 == block.steps:
            committed = torch.ones_like(committed)
        block.write(torch.where(committed, y, block.prior(noise)))
        block.live = block.live & ~committed.all(1)
        yield
        if not block.live.any():
            return


def quota(block, k):
    """(R,) how many tokens to have after step k, in even portions; a row with fewer open positions than steps takes fewer steps."""
    n = block.open.sum(1)
    return -(-n * (k + 1) // n.clamp(1, block.steps))


def confidence(block):
    """
    Low-confidence remasking (MaskGIT, arXiv 2202.04200; LLaDA, 2502.09992): every step commits the same number of tokens, those
    with the highest l(y).
    """
    yield from unmask(block, lambda k, left, y, logp: (~left | top(at(logp, y), quota(block, k) - (block.open & ~left).sum(1), left), y))


def threshold(block, *, threshold=0.9):
    """
    Fast-dLLM (arXiv 2505.22618): commit every token with l(y) >= threshold, and at least the surest. As many passes as that
    takes; --steps is a limit, whose last step commits the rest.

    threshold: 0 commits all at once, 1 about one at a time
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold} is a probability")

    def choose(k, left, y, logp):
        c = at(logp, y)
        return ~left | (c >= math.log(max(threshold, 1e-300))) | top(c, 1, left), y

    yield from unmask(block, choose)


def factor(block, *, factor=1.0):
    """
    Fast-dLLM with a factor (arXiv 2505.22618): commit the n surest tokens, the largest n with (n + 1) (1 - c_(n)) < factor,
    c_(1) >= c_(2) >= ... the confidences l(y); at least one. --steps is a limit.

    factor: more commits more at once
    """
    if not 0 <= factor < math.inf:
        raise ValueError(f"factor {factor} must be at least 0")

    def choose(k, left, y, logp):
        c = at(logp, y).double().masked_fill(~left, -math.inf)
        ordered = c.sort(dim=1, descending=True).values.exp()
        n = torch.arange(1, c.size(1) + 1, device=c.device)
        fits = ((n + 1) * (1 - ordered) < factor) & (n <= left.sum(1, keepdim=True))
        return ~left | top(c, (fits * n).amax(1).clamp(min=1), left), y

    yield from unmask(block, choose)


def entropy_bound(block, *, bound=0.5):
    """
    Entropy-bounded unmasking (arXiv 2505.24857): with entropies of l in rising order commit the largest k with

        H_(1) + ... + H_(k) - max_i<=k H_(i) <= bound,

    which bounds what the k tokens, drawn independently, may know of each other. --steps is a limit.

    bound: in nats; 0 is one token at a time
    """
    if not 0 <= bound < math.inf:
        raise ValueError(f"bound {bound} must be at least 0 nats")

    def choose(k, left, y, logp):
        h = entropy(logp).double()
        ordered = h.masked_fill(~left, math.inf).sort(dim=1).values
        n = (ordered.cumsum(1) - ordered <= bound).sum(1)  # inf - inf is nan, and no number is below a bound
        return ~left | top(-h, n.clamp(min=1), left), y

    yield from unmask(block, choose)


def rcr(block):
    """
    Running-confidence remasking (MDPO, arXiv 2508.13148): like `confidence`, but every step fills the whole block, and its least
    sure tokens become noise again, whenever they were written; the confidence is the one a token was last written with.
    """
    stored = torch.zeros(block.x.shape, dtype=torch.float64, device=block.x.device)

    def choose(k, left, y, logp):
        nonlocal stored
        stored = torch.where(left, at(logp, y).double(), stored)
        return top(stored, quota(block, k), block.open), y

    yield from unmask(block, choose)


def saber(block, *, at_least=2):
    """
    Saber (arXiv 2510.18165): commit what is surer than the tokens so far were on average, at least two, then take back the written
    tokens whose probability fell most since the step before. --steps is a limit.

        commit l(y) > mean of the confidences at which the block's tokens were committed (1 when there are none)
        take back min(max(at_least / 2, commits / 8), commits - 1) tokens, the largest fall of l(x_i) first, if it fell

    at_least: tokens to commit in a step, at least

    For masked noise l at a visible token is the raw output there, which training never looked at: a weak witness.
    """
    if at_least < 1:
        raise ValueError(f"at_least {at_least} must be at least 1")
    stored = torch.zeros(block.x.shape, dtype=torch.float64, device=block.x.device)
    before = None

    def choose(k, left, y, logp):
        nonlocal stored, before
        c, p = at(logp, y).double().exp(), logp.double().exp()
        old = block.open & ~left
        mean = torch.where(old.any(1), (stored * old).sum(1) / old.sum(1).clamp(min=1), 1.0)
        take = left & ((c > mean[:, None]) | top(c, at_least, left))
        commits = take.sum(1)
        stored = torch.where(take, c, stored)
        fall = at(before, y) - at(p, y) if before is not None else torch.zeros_like(c)
        back = torch.minimum((-(-commits // 8)).clamp(min=at_least // 2), commits - 1).clamp(min=0)
        before = p
        return (~left | take) & ~(top(fall, back, old) & (fall > 0)), y

    yield from unmask(block, choose)


def early_exit(block, statistic, limit):
    """`confidence`, but a row whose statistic(left, gap), (R,), reaches limit(share of steps done) commits the argmax at once."""

    def choose(k, left, y, logp):
        gap = margin(logp).double()
        out = (statistic(left, gap) >= limit(k / max(block.steps - 1, 1)))[:, None]
        y = torch.where(out & left, logp.argmax(-1), y)
        return out | ~left | top(at(logp, y), quota(block, k) - (block.open & ~left).sum(1), left), y

    yield from unmask(block, choose)


def prophet(block, *, high=7.5, middle=5.0, low=2.5):
    """
    Prophet (arXiv 2508.19982): `confidence`, until the mean over the block of the gap between the two best logits reaches a limit that
    falls in three stairs; then the argmax everywhere. A committed token counts with the gap it was committed at.

    high: the limit in the first third of the steps
    middle: in the second
    low: in the last
    """
    stored = torch.zeros(block.x.shape, dtype=torch.float64, device=block.x.device)

    def statistic(left, gap):
        nonlocal stored
        stored = torch.where(left, gap, stored)
        return (stored * block.open).sum(1) / block.open.sum(1).clamp(min=1)

    yield from early_exit(block, statistic, lambda r: high if r < 1 / 3 else middle if r < 2 / 3 else low)


def sched(block, *, high=7.5, low=0.0, shape="linear", decay=4.0):
    """
    SchED (arXiv 2512.02892): like prophet with the mean over the positions that are still open, and a limit that falls smoothly with
    the step progress r: high + (low - high) r | low + (high - low) (1 + cos pi r) / 2 | low + (high - low) exp(-decay r).

    high: the limit at r = 0
    low: the limit at the end
    shape: linear | cosine | exp
    decay: of exp alone
    """
    if shape not in ("linear", "cosine", "exp"):
        raise ValueError(f"shape {shape!r} is none of linear, cosine, exp")
    if shape != "exp" and decay != 4.0:
        raise ValueError(f"decay belongs to shape exp, not to {shape}")
    fall = {"linear": lambda r: 1 - r, "cosine": lambda r: (1 + math.cos(math.pi * r)) / 2, "exp": lambda r: math.exp(-decay * r)}[shape]
    mean = lambda left, gap: (gap * left).sum(1) / left.sum(1).clamp(min=1)
    yield from early_exit(block, mean, lambda r: low + (high - low) * fall(r))


# ----- uniform noise: leave-one-out tools (arXiv 2605.22765)


def gibbs(block, *, rounds=1, resample=4, badness="margin", spread=1.0):
    """
    Gibbs corrector (arXiv 2605.22765): after a reverse step to s, `rounds` times draw some tokens anew from what the others say,

        p(x_i | x without i) = a_s l_i(x_i) + (1 - a_s) / V

    which leaves the noisy marginal as it is. Positions by Gumbel-top-k on their badness, pure noise being no worse than a wrong
    token. --steps counts the corrector's passes too: the first floor((steps - 1) / (1 + rounds)) reverse steps have correctors.

    rounds: correctors after a step; the paper's code has 2
    resample: positions a corrector; the paper's code has 12 of some hundred
    badness: random | max: -log of the best probability | current: -log of the token's own | margin: best other over own
    spread: temperature of the choice; more is closer to random
    """
    names = ("random", "max", "current", "margin")
    if badness not in names or rounds < 1 or resample < 1 or not 0 < spread < math.inf:
        raise ValueError(f"badness {badness!r}: {', '.join(names)}; rounds {rounds}, resample {resample} >= 1, spread {spread} > 0")
    process, V = block.process, block.process.vocab_size
    corrected = (block.steps - 1) // (1 + rounds)
    alpha = block.alpha if not corrected else block.grid(block.steps - corrected * rounds)
    used = 0
    for k in range(len(alpha) - 1):
        a_s = alpha[k + 1]
        block.write(block.posterior(block.predict(alpha[k]), alpha[k], a_s, block.noise(used)))
        used += 1
        yield
        for _ in range(rounds if k < corrected else 0):
            noise = block.noise(used)
            logl = block.sharpen(process.loo_logits(block.predict(a_s), block.x, a_s)).log_softmax(-1).double()
            logp = (a_s * logl.exp() + (1 - a_s) / V).log()
            own = at(logp, block.x)
            other = logp.scatter(-1, block.x[..., None], -math.inf).amax(-1)
            bad = {"random": 0 * own, "max": -logp.amax(-1), "current": -own, "margin": other - own}[badness]
            gumbel = -(-noise.uniform(1)[..., 0].log()).clamp(min=1e-300).log()
            where = top(bad / spread + gumbel, resample, block.open)
            block.write(torch.where(where, process.corrupt(block.draw(logl, noise), a_s, noise), block.x))
            used += 1
            yield


def max_coupling(block):
    """
    Another reverse kernel with the same marginals (arXiv 2605.22765): keep x_t with probability (1 - a_s) / (1 - a_t), else draw
    from D. For masked noise that is the ancestral step itself.
    """
    for k in range(block.steps):
        (a_t, a_s), noise = block.alpha[k : k + 2], block.noise(k)
        logits = block.predict(a_t)
        keep = noise.uniform(1)[..., 0] <= (1 - a_s) / (1 - a_t)
        block.write(torch.where(keep, block.x, block.posterior(logits, a_t, 1.0, noise)))  # alpha_s = 1: a draw of D
        yield


# ----- the AR mode as a guide


def edlm(block, *, candidates=4, start=1.0, stop=0.0):
    """
    Energy-based choice (EDLM, arXiv 2410.21357): draw candidates y ~ prod_i D_i for the whole block, keep one of them with weight

        w(y) = p_AR(y) q(x_t | y) / prod_i D_i(y_i),

    and take the reverse step towards it. With many candidates y comes from the AR mode's own posterior given x_t. For masked noise
    q(x_t | y) is the same for all candidates; p_AR(y) counts visible tokens too, since their probability depends on the others
    (EDLM's code leaves them out). One pass a candidate, and one to propose.

    candidates: how many
    start: only at times from here, ancestral before
    stop: down to here, ancestral after
    """
    if candidates < 1 or not 0 <= stop < start <= 1:
        raise ValueError(f"candidates {candidates} must be at least 1, and 0 <= stop {stop} < start {start} <= 1")
    process = block.process
    for k in range(block.steps):
        (a_t, a_s), noise, t = block.alpha[k : k + 2], block.noise(k), 1 - k / block.steps
        logits = block.predict(a_t)
        if not stop < t <= start:
            block.write(block.posterior(logits, a_t, a_s, noise))
            yield
            continue
        x_t, V, ys, weights = block.x, process.vocab_size, [], []
        q = process.posterior_probs(logits, x_t, a_t, 1.0, block.temperature, block.top_p)  # D, as it is drawn from
        for _ in range(candidates):
            y = torch.where(block.open, block.posterior(logits, a_t, 1.0, noise), x_t)
            ar = at(process.loo_logits(block.verify(y), x_t, 0.0).log_softmax(-1).double(), y)
            seen = 0.0 if process.mask_id is not None else ((y == x_t) * a_t + (1 - a_t) / V).log()
            ys, weights = ys + [y], weights + [((ar + seen - at(q, y).log()) * block.open).sum(1)]
        u = noise.uniform(1)[:, 0, 0]  # one choice a row
        cdf = torch.stack(weights, 1).softmax(1).cumsum(1)
        choice = (u[:, None] > cdf).sum(1).clamp(max=candidates - 1)
        y = torch.stack(ys, 1)[torch.arange(len(u), device=u.device), choice]
        certain = torch.full_like(logits, -math.inf).scatter(-1, y[..., None], 0.0)
        block.write(block.posterior(certain, a_t, a_s, noise))
        yield


def agreement(block):
    """
    Guided unmasking (after FlashDLM, arXiv 2505.21467): commit the proposals that the AR mode would have chosen too, y_i = argmax p_AR,
    each given the proposals before it; at least the one it finds likeliest. Two passes a step; --steps is a limit. The paper's
    own test of agreement is not public: this one is ours.
    """

    def choose(k, left, y, logp):
        log_ar = block.process.loo_logits(block.verify(y), block.x, 0.0).log_softmax(-1)
        return ~left | (y == log_ar.argmax(-1)) | top(at(log_ar, y), 1, left), y

    yield from unmask(block, choose)


def speculation(block, *, draft="merged", rule="coupled"):
    """
    Lossless self-speculation: the diffusion mode drafts the block in one pass, the AR mode checks all of it in one, and the longest
    valid prefix stays, with the AR mode's own token behind it. The text is distributed exactly as AR's, in fewer passes.

    draft: merged: the next draft is made in the same pass as the check, from the tokens accepted before it: one pass a round |
        diffusion: in a pass of its own, which sees one round more | first: one draft, then the AR mode's last guesses again
        (Jacobi decoding) | random: Jacobi from random tokens, the baseline that any draft must beat
    rule: coupled: AR sampling is a function of its logits and of fixed random numbers (`ar_draw`). The draft is the same
        function of the diffusion logits; a token is valid if AR draws it too. Not only the distribution but every token is the
        one that --sampler ar --seed would have written |
        rejection: the standard test (arXiv 2211.17192), for drafts by diffusion: keep y_i with probability min(1, p_AR / q), else draw
        from max(p_AR - q, 0)

    A proposal may not have seen other proposals that are checked with it, or the test is not exact: drafts are independent draws.
    """
    drafts, rules = ("merged", "diffusion", "first", "random"), ("coupled", "rejection")
    if draft not in drafts or rule not in rules:
        raise ValueError(f"draft {draft!r} must be one of {', '.join(drafts)}, rule {rule!r} one of {', '.join(rules)}")
    if rule == "rejection" and draft in ("first", "random"):
        raise ValueError(f"rule rejection needs proposals with probabilities: --draft merged or diffusion, not {draft}")
    process, here = block.process, torch.arange(block.x.size(1), device=block.x.device)
    known, y, step = ~block.open, None, 0

    def level():
        """The share of the open positions that is known, (R,): the draft's noise level; 0 in rows that are finished and not asked."""
        return torch.where(known.all(1), 0.0, (known & block.open).sum(1) / block.open.sum(1).clamp(min=1)).double()

    def propose(logits, x, alpha):
        """What the network said of x as logits of the proposals, (R, b, V), and a draw of them."""
        q = process.loo_logits(logits, x, alpha)
        y = block.ar_draw(q) if rule == "coupled" else block.draw(block.sharpen(q), block.noise(2 * step))
        return q, torch.where(known, block.x, y)

    if draft == "random":
        anything = process.loo_logits(torch.zeros(*known.shape, process.vocab_size, device=here.device), block.x, 0.0)
        y = torch.where(known, block.x, block.draw(anything, block.noise(1)))
    while block.live.any():
        if y is None or draft == "diffusion":
            q, y = propose(block.predict(level()), block.x, level())
        x, alpha, noise = block.x, level(), block.noise(2 * step + 1)
        if draft == "merged":
            p, ahead = block.verify_and_predict(y, alpha)
        else:
            p = block.verify(y)
        p = process.loo_logits(p, block.x, 0.0)
        if rule == "coupled":
            own = block.ar_draw(p)
            valid = own == y
        else:
            p, q = (block.sharpen(z).double().softmax(-1) for z in (p, q))
            valid = noise.uniform(1)[..., 0] * at(q, y) <= at(p, y)
            rest = (p - q).clamp(min=0)
            own = block.draw(torch.where(rest.sum(-1, keepdim=True) > 0, rest, p).log(), noise)
        prefix = (valid | known).int().cumprod(1).bool()
        first = here == prefix.sum(1, keepdim=True)  # the first that is not valid, if any, gets the AR mode's own token
        known = prefix | first
        block.write(torch.where(known, torch.where(first, own, y), block.prior(noise)))
        block.live, step = block.live & ~known.all(1), step + 1
        yield
        if draft == "merged":
            q, y = propose(ahead, x, alpha)
        elif draft != "diffusion":
            y = torch.where(known, block.x, own)


# ----- all of them

SAMPLERS = {
    f.__name__: f
    for f in (ancestral, ar, arpc, psi, remdm_cap, remdm_rescale, remdm_conf, remdm_loop, first_hitting, confidence, threshold, factor,
              entropy_bound, rcr, saber, prophet, sched, gibbs, max_coupling, edlm, agreement, speculation)
}  # fmt: skip
MASKED_ONLY = {remdm_cap, remdm_rescale, remdm_conf, remdm_loop, first_hitting}
UNIFORM_ONLY = {gibbs, max_coupling}
OWN_PACE = {ar, first_hitting, speculation}  # as many passes as they need: no --steps
