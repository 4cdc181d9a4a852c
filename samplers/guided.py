"""
What does the AR mode think of it? Samplers in which block size 1 of the same network judges, or replaces, what diffusion wrote.
See samplers.py for letters.
"""

import math

import torch

from kernels import cross_entropy
from samplers.reverse import entropy, margin, need, pick, top
from samplers.unmasking import unmask


def kl(p, q):
    """KL(p || q) of log-probabilities (..., V)."""
    return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1)


SCORES = {  # how bad a token y is, (R, b), with log p (R, b, V) of the diffusion mode and the logits of p_AR; the first is the default
    "ar": {
        "nll": lambda y, p, ar: cross_entropy(ar.flatten(0, 1), y.flatten())[0].view_as(y),
        "gap": lambda y, p, ar: ar.amax(-1) - pick(ar, y),
        "entropy": lambda y, p, ar: entropy(ar.log_softmax(-1)),
    },
    "divergence": {
        "kl": lambda y, p, ar: kl(ar.log_softmax(-1), p),
        "reverse_kl": lambda y, p, ar: kl(p, ar.log_softmax(-1)),
        "tv": lambda y, p, ar: (ar.softmax(-1) - p.exp()).abs().sum(-1) / 2,
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

    p is D, before temperature and top_p, when the token was drawn. A masked network says nothing about a token it can see (SUBS puts all
    mass on it, and no visible token would ever be doubted), so there p is kept from the last step at which the token was a mask.
    """
    need(corruption in SCORES, "corruption", corruption, f"one of {', '.join(SCORES)}")
    names = ", ".join(SCORES[corruption])
    need(not metric or metric in SCORES[corruption], "metric", metric, f"{names or 'left out'} with corruption {corruption}")
    need(guide_every >= 1, "guide_every", guide_every, "at least 1")
    need(warmup >= 0, "warmup", warmup, "at least 0")
    need(0 < verify_temperature < math.inf, "verify_temperature", verify_temperature, "above 0 and finite")
    asks = corruption in ("ar", "divergence")
    need(asks or verify_temperature == 1, "verify_temperature", verify_temperature, f"left out: corruption {corruption} asks no verifier")
    if asks:
        block.need_ar_mode()
    process, p, ar = block.process, None, None
    for k in range(block.steps):
        (a_t, a_s), noise = block.alpha[k : k + 2], block.noise(k)
        logits = None
        if corruption in ("divergence", "diffusion"):  # these look at p of every token
            logits = block.predict(a_t)
            now = process.denoiser_logits(logits, block.x, a_t).log_softmax(-1)  # (R, b, V)
            masked = block.x == process.mask_id if process.mask_id is not None else torch.ones_like(block.open)
            p = now if p is None else torch.where(masked[..., None], now, p)
        if k < warmup or (k - warmup) % guide_every or k + 1 == block.steps:
            block.write(block.reverse(a_t, a_t, a_s, noise, logits=logits))
            yield
            continue
        y = torch.where(block.open, block.reverse(a_t, a_t, 1.0, noise, logits=logits), block.x)
        if asks:
            ar = process.loo_logits(block.verify(y), block.x, 0.0)
            ar = ar if verify_temperature == 1 else ar / verify_temperature
        if corruption == "random":
            score = noise.uniform(1)[..., 0]
        else:
            score = SCORES[corruption][metric or next(iter(SCORES[corruption]))](y, p, ar)
        n = ((1 - a_s) * block.open.sum(1).double() + 0.5 + 1e-9).floor()  # 1e-9: 1 - a_s is a hair below the fraction it stands for
        block.write(torch.where(top(score, n, block.open), block.prior(noise), y))
        yield


def edlm(block, *, candidates=4, start=1.0, stop=0.0):
    """
    Energy-based choice (EDLM, arXiv 2410.21357): draw candidates y ~ prod_i D_i for the whole block, keep one of them with weight

        w(y) = p_AR(y) q(x_t | y) / prod_i D_i(y_i),

    and take the reverse step towards it. With many candidates y comes from the AR mode's own posterior given x_t. For masked noise
    q(x_t | y) is the same for all candidates; p_AR(y) counts visible tokens too, since their probability depends on the others
    (EDLM's code leaves them out). Temperature and top_p sharpen both, D and p_AR. One pass a candidate, and one to propose.

    candidates: how many, at least 2
    start: only at times from here, ancestral before
    stop: down to here, ancestral after
    """
    need(candidates >= 2, "candidates", candidates, "at least 2")
    need(0 < start <= 1, "start", start, "a time above 0, at most 1")
    need(0 <= stop < start, "stop", stop, "a time from 0, below start")
    block.need_ar_mode()
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
            ar = pick(block.sharpen(process.loo_logits(block.verify(y), x_t, 0.0)).log_softmax(-1).double(), y)
            noisy = 0.0 if process.mask_id is not None else ((y == x_t).double() * a_t + (1 - a_t) / V).log()  # log q(x_t | y)
            ys, weights = ys + [y], weights + [torch.where(block.open, ar + noisy - pick(q, y).log(), 0.0).sum(1)]
        u = noise.uniform(1)[:, 0, 0]  # one choice a row
        cdf = torch.stack(weights, 1).clamp(min=-1e30).softmax(1).cumsum(1)  # -1e30: if top_p rules out all of them, any
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
        return ~left | (y == log_ar.argmax(-1)) | top(pick(log_ar, y), 1, left), y

    yield from unmask(block, choose)


def residual(p, q):
    """What a rejected draw of q leaves of p, not normalised: max(p - q, 0), or p where rounding leaves nothing. (..., V)"""
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def speculation(block, *, draft="merged", rule="coupled"):
    """
    Lossless self-speculation: the diffusion mode drafts the block in one pass, the AR mode checks all of it in one, and the longest
    valid prefix stays, with the AR mode's own token behind it. The text is distributed exactly as AR's, in fewer passes. With
    exponential clocks E (R, b, V), drawn once for every position of the text, AR sampling is x_i = argmin_v E_iv / p_AR(v | x_<i), and

        coupled     y_i = argmin_v E_iv / q_i(v),  valid while  y_i = argmin_v E_iv / p_AR(v | y_<i)
        rejection   y_i ~ q_i,  valid with probability min(1, p_AR(y_i) / q_i(y_i)),  else x_i ~ max(p_AR - q_i, 0)

    draft: merged: the next draft is made in the same pass as the check, from the tokens accepted before it: one pass a round |
        diffusion: in a pass of its own, which sees one round more | first: one draft, then the AR mode's last guesses again
        (Jacobi decoding, arXiv 2305.10427) | random: Jacobi from random tokens, the baseline that any draft must beat
    rule: coupled: not only the distribution but every token is the one that --sampler ar writes with this seed; any draft will do |
        rejection: the standard test (arXiv 2211.17192), for drafts by diffusion

    A proposal may not have seen other proposals that are checked with it, or the test is not exact: drafts are independent draws.
    """
    drafts, rules = ("merged", "diffusion", "first", "random"), ("coupled", "rejection")
    need(draft in drafts, "draft", draft, f"one of {', '.join(drafts)}")
    need(rule in rules, "rule", rule, f"one of {', '.join(rules)}")
    need(rule == "coupled" or draft in ("merged", "diffusion"), "draft", draft, "merged or diffusion: rule rejection needs probabilities")
    block.need_ar_mode()
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
        y = torch.where(known, block.x, block.draw(anything, block.noise(2)))
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
            valid = noise.uniform(1)[..., 0] * pick(q, y) <= pick(p, y)
            own = block.draw(residual(p, q).log(), noise)
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
