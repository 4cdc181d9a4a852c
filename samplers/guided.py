"""
What does the AR mode think of it? Samplers in which block size 1 of the same network judges, or replaces,
what diffusion wrote. See generate.py for letters.
"""

import math

import torch

from diffusion import pick
from generate import sampler
from kernels import cross_entropy
from samplers.pieces import entropy, kl, margin, need, top
from samplers.unmasking import unmask


@sampler("AR mode")
def arpc(block, *, guide_every=1, warmup=0, corruption="ar", metric="", verify_temperature=1.0):
    """
    AR-informed predictor-corrector (BlockGen, arXiv 2606.02241). A guided step predicts the whole block and
    lets the AR mode of the same network say which of its tokens are worst:

        y ~ q(x_0 | x_t, p),   score_i = -log p_AR(y_i | y_<i),   x_s = y with pure noise at the (1 - a_s)
                               n_open worst

    rounded half up, prompt positions neither corrupted nor counted. Other steps, and always the last, are
    ancestral. A guided step costs two passes, one with corruption random or diffusion.

    guide_every: every so many steps is guided
    warmup: so many ancestral steps first
    corruption: what is worst: ar: doubt of p_AR | divergence of p_AR and p | diffusion: doubt of p | random
    metric: ar: nll, gap (to the likeliest token), entropy | divergence: kl(p_AR, p), reverse_kl, tv |
    diffusion: entropy,
        confidence, margin; empty: the first
    verify_temperature: of p_AR in the score; the sampling temperature stays out of it
    """
    need(guide_every >= 1, "guide_every", guide_every, "at least 1")
    need(warmup >= 0, "warmup", warmup, "at least 0")
    need(corruption in JUDGES, "corruption", corruption, f"one of {', '.join(JUDGES)}")
    judge = JUDGES[corruption](block, metric, verify_temperature)
    for k in range(block.steps):
        (a_t, a_s), noise = block.alpha[k : k + 2], block.noise(k)
        guided = k >= warmup and (k - warmup) % guide_every == 0 and k + 1 < block.steps
        y = block.reverse(a_t, a_t, 1.0 if guided else a_s, noise, logits=judge.prediction(a_t))
        if guided:
            y = torch.where(block.open, y, block.x)
            # 1e-9: 1 - a_s is a hair below its fraction
            n = ((1 - a_s) * block.open.sum(1).double() + 0.5 + 1e-9).floor()
            worst = top(judge.score(y, noise), n, block.open)
            y = torch.where(worst, block.prior(noise), y)
        block.write(y)
        yield


class ARJudge:
    """How bad is a token? -log p_AR(y_i | y_<i), by block size 1 of the same network."""

    metrics = {  # the first is the default
        "nll": lambda y, ar: cross_entropy(ar.flatten(0, 1), y.flatten())[0].view_as(y),
        "gap": lambda y, ar: ar.amax(-1) - pick(ar, y),
        "entropy": lambda y, ar: entropy(ar.log_softmax(-1)),
    }

    def __init__(self, block, metric, temperature):
        need(
            not metric or metric in self.metrics,
            "metric",
            metric,
            f"{', '.join(self.metrics)} with corruption ar",
        )
        need(1e-30 <= temperature <= 1e30, "verify_temperature", temperature, "in [1e-30, 1e30]")
        block.need_ar_mode()
        self.block, self.temperature, self.metric = block, temperature, self.metrics[metric or "nll"]

    def prediction(self, alpha):
        """The logits (R, b, V) of the diffusion mode, for judges that look at them at every step."""

    def score(self, y, noise):
        """How bad each token of y is, (R, b)."""
        ar = self.block.process.loo_logits(self.block.verify(y), self.block.x, 0.0)
        return self.metric(y, ar if self.temperature == 1 else ar / self.temperature)


class DiffusionJudge:
    """
    Doubt of p, the diffusion mode's D, before temperature and top_p, when the token was drawn. A masked
    network says nothing about a token it can see (SUBS puts all mass on it), so p is kept from the last step
    at which the token was a mask.
    """

    metrics = {
        "entropy": lambda y, p: entropy(p),
        "confidence": lambda y, p: -p.amax(-1),
        "margin": lambda y, p: -margin(p.exp()),
    }

    def __init__(self, block, metric, temperature):
        need(
            not metric or metric in self.metrics,
            "metric",
            metric,
            f"{', '.join(self.metrics)} with corruption {self.name}",
        )
        self.check(block, temperature)
        self.block, self.temperature, self.p = block, temperature, None
        self.metric = self.metrics[metric or next(iter(self.metrics))]

    name = "diffusion"

    def check(self, block, temperature):
        need(
            temperature == 1,
            "verify_temperature",
            temperature,
            f"left out: corruption {self.name} asks no verifier",
        )

    def prediction(self, alpha):
        logits, block = self.block.predict(alpha), self.block
        now = block.process.denoiser_logits(logits, block.x, alpha).log_softmax(-1)  # (R, b, V)
        self.p = now if self.p is None else torch.where(block.process.known(block.x)[..., None], self.p, now)
        return logits

    def score(self, y, noise):
        return self.metric(y, self.p)


class DivergenceJudge(DiffusionJudge):
    """How far p_AR and p are apart."""

    name = "divergence"
    metrics = {
        "kl": lambda p, ar: kl(ar.log_softmax(-1), p),
        "reverse_kl": lambda p, ar: kl(p, ar.log_softmax(-1)),
        "tv": lambda p, ar: (ar.softmax(-1) - p.exp()).abs().sum(-1) / 2,
    }

    def check(self, block, temperature):
        need(1e-30 <= temperature <= 1e30, "verify_temperature", temperature, "in [1e-30, 1e30]")
        block.need_ar_mode()

    def score(self, y, noise):
        ar = self.block.process.loo_logits(self.block.verify(y), self.block.x, 0.0)
        return self.metric(self.p, ar if self.temperature == 1 else ar / self.temperature)


class RandomJudge:
    """Any token is as bad as any other: the control."""

    def __init__(self, block, metric, temperature):
        need(not metric, "metric", metric, "left out with corruption random")
        need(
            temperature == 1,
            "verify_temperature",
            temperature,
            "left out: corruption random asks no verifier",
        )

    def prediction(self, alpha):
        return None

    def score(self, y, noise):
        return noise.uniform(1)[..., 0]


# corruption -> who judges
JUDGES = {"ar": ARJudge, "divergence": DivergenceJudge, "diffusion": DiffusionJudge, "random": RandomJudge}


@sampler("AR mode")
def edlm(block, *, candidates=4, start=1.0, stop=0.0):
    """
    Energy-based choice (EDLM, arXiv 2410.21357): draw candidates y ~ prod_i D_i for the whole block, keep one
    of them with weight

        w(y) = p_AR(y) q(x_t | y) / prod_i D_i(y_i),

    and take the reverse step towards it. With many candidates y comes from the AR mode's own posterior given
    x_t. For masked noise q(x_t | y) is the same for all candidates; p_AR(y) counts visible tokens too, since
    their probability depends on the others (EDLM's code leaves them out). Temperature and top_p sharpen both,
    D and p_AR, but for given tokens behind open ones. One pass a candidate, and one to propose.

    candidates: how many, at least 2
    start: only at times from here, ancestral before
    stop: down to here, ancestral after
    """
    need(candidates >= 2, "candidates", candidates, "at least 2")
    need(0 < start <= 1, "start", start, "a time above 0, at most 1")
    need(0 <= stop < start, "stop", stop, "a time from 0, below start")
    block.need_ar_mode()
    process, later = block.process, block.open.int().cumsum(1) > 0  # a given token counts behind an open one
    for k in range(block.steps):
        (a_t, a_s), noise, t = block.alpha[k : k + 2], block.noise(k), 1 - k / block.steps
        logits = block.predict(a_t)
        if not stop < t <= start:
            block.write(block.posterior(logits, a_t, a_s, noise))
            yield
            continue
        x_t, ys, weights = block.x, [], []
        # D, as it is drawn from
        q = process.posterior_probs(logits, x_t, a_t, 1.0, block.temperature, block.top_p)
        for _ in range(candidates):
            y = torch.where(block.open, block.posterior(logits, a_t, 1.0, noise), x_t)
            ar = process.loo_logits(block.verify(y), x_t, 0.0)
            given = torch.where(later, pick(ar.log_softmax(-1).double(), y), 0.0)
            drawn = pick(block.sharpen(ar).log_softmax(-1).double(), y)
            weight = drawn + process.log_q(x_t, y, a_t) - pick(q, y).log()
            ys.append(y)
            weights.append(torch.where(block.open, weight, given).sum(1))
        u = noise.uniform(1)[:, 0, 0]  # one choice a row
        # -1e30: if top_p rules out all of them, any
        cdf = torch.stack(weights, 1).clamp(min=-1e30).softmax(1).cumsum(1)
        choice = (u[:, None] > cdf).sum(1).clamp(max=candidates - 1)
        y = torch.stack(ys, 1)[torch.arange(len(u), device=u.device), choice]
        certain = torch.full_like(logits, -math.inf).scatter(-1, y[..., None], 0.0)
        block.write(block.posterior(certain, a_t, a_s, noise))
        yield


@sampler("AR mode")
def agreement(block):
    """
    Guided unmasking (after FlashDLM, arXiv 2505.21467): commit the proposals that the AR mode would have
    chosen too, y_i = argmax p_AR, each given the proposals before it; at least the one it finds likeliest.
    Two passes a step; --steps is a limit. The paper's own test of agreement is not public: this one is ours.
    """

    def choose(k, left, y, logp):
        log_ar = block.process.loo_logits(block.verify(y), block.x, 0.0).log_softmax(-1)
        return ~left | (y == log_ar.argmax(-1)) | top(pick(log_ar, y), 1, left), y

    yield from unmask(block, choose)


def residual(p, q):
    """
    What a rejected draw of q leaves of p, not normalised: max(p - q, 0), or p where rounding leaves nothing.
    (..., V)
    """
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


@sampler("AR mode", "own pace")
def speculation(block, *, draft="merged", rule="coupled"):
    """
    Lossless self-speculation: the diffusion mode drafts the block in one pass, the AR mode checks all of it
    in one, and the longest valid prefix stays, with the AR mode's own token behind it. The text is
    distributed exactly as AR's, in fewer passes. With exponential clocks E (R, b, V), drawn once for every
    position of the text, AR sampling is x_i = argmin_v E_iv / p_AR(v | x_<i), and

        coupled     y_i = argmin_v E_iv / q_i(v),  valid while  y_i = argmin_v E_iv / p_AR(v | y_<i)
        rejection   y_i ~ q_i,  valid with probability min(1, p_AR(y_i) / q_i(y_i)),  else x_i ~ max(p_AR -
                    q_i, 0)

    draft: merged: the next draft is made in the same pass as the check, from the tokens accepted before it:
    one pass a round |
        diffusion: in a pass of its own, which sees one round more | first: one draft, then the AR mode's last
            guesses again
        (Jacobi decoding, arXiv 2305.10427) | random: Jacobi from random tokens, the baseline that any draft
        must beat
    rule: coupled: not only the distribution but every token is the one that --sampler ar writes with this
    seed; any draft will do |
        rejection: the standard test (arXiv 2211.17192), for drafts by diffusion

    A proposal may not have seen other proposals that are checked with it, or the test is not exact: drafts
    are independent draws.
    """
    drafts, rules = ("merged", "diffusion", "first", "random"), ("coupled", "rejection")
    need(draft in drafts, "draft", draft, f"one of {', '.join(drafts)}")
    need(rule in rules, "rule", rule, f"one of {', '.join(rules)}")
    need(
        rule == "coupled" or draft in ("merged", "diffusion"),
        "draft",
        draft,
        "merged or diffusion: rule rejection needs probabilities",
    )
    block.need_ar_mode()
    process, here = block.process, torch.arange(block.x.size(1), device=block.x.device)
    known, y, step = ~block.open, None, 0

    def level():
        """
        The share of the open positions that is known, (R,): the draft's noise level; 0 in rows that are
        finished and not asked.
        """
        return torch.where(
            known.all(1), 0.0, (known & block.open).sum(1) / block.open.sum(1).clamp(min=1)
        ).double()

    def propose(logits, x, alpha):
        """What the network said of x as logits of the proposals, (R, b, V), and a draw of them."""
        q = process.loo_logits(logits, x, alpha)
        y = block.ar_draw(q) if rule == "coupled" else block.draw(block.sharpen(q), block.noise(2 * step))
        return q, torch.where(known, block.x, y)

    if draft == "random":
        anything = process.loo_logits(
            torch.zeros(*known.shape, process.vocab_size, device=here.device), block.x, 0.0
        )
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
        # the first that is not valid, if any, gets the AR mode's own token
        first = here == prefix.sum(1, keepdim=True)
        known = prefix | first | ~block.open  # given tokens may stand behind open ones
        block.write(torch.where(known, torch.where(first, own, y), block.prior(noise)))
        block.live, step = block.live & ~known.all(1), step + 1
        yield
        if draft == "merged":
            q, y = propose(ahead, x, alpha)
        elif draft != "diffusion":
            y = torch.where(known, block.x, own)
