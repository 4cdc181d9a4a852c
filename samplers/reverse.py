"""
How does noise become text, other than by `ancestral`? By relatives of the process's own reverse step, which
take tokens back.

See generate.py for what a sampler is, and for letters. Three distributions a position (diffusion.py says
more):

    D    p(x0_i | x_t), the denoiser: has seen its own noisy token
    l    p(x0_i | x_t without token i), leave-one-out; at a mask the same as D
    p_AR p(x0_i | clean tokens before i): the same network at block size 1 (`verify`), exact, one pass for all
    positions
"""

import math

import torch

from diffusion import pick
from generate import sampler, tail
from samplers.pieces import need, top


@sampler()
def psi(block, *, kappa="constant", eta=0.5, greedy_tail=False):
    """
    Psi-samplers (arXiv 2602.21185): with probability kappa the reverse step, else a clean guess that is
    noised again,

        x_s ~ kappa q(x_s | x_t, p) + (1 - kappa) [ a_s q(x_0 | x_t, p) + (1 - a_s) pi ]

    token by token: 1 is ancestral, 0 forgets everything but the guess. With the true p(x_0 | x_t), for
    uniform noise with l, the marginals of a token are the same for any kappa in [0, 1].

    kappa: posterior (1) | pc (0) | constant (eta) | cap | rescale | remask: kappa = 1 - sigma / (1 - a_s),
    with
        sigma = min(eta, (1 - a_s) / a_t) | eta min(1, (1 - a_s) / a_t) | eta. One word, or a profile over the
        time t from 1 to 0: "0.55:posterior,0.05:cap,0:posterior" is posterior down to t = 0.55, cap down to
        0.05, posterior to the end; "0.55:posterior,0.05@0.9:remask,0:posterior" holds alpha at 0.9 meanwhile
        (ReMDM's loop)
    eta: see kappa
    greedy_tail: end with the argmax

    Masked noise with cap, rescale or the loop is ReMDM, as long as sigma <= 1 - a_s: where ReMDM goes further
    kappa is cut at 0.
    """
    until, hold, modes = profile(kappa)
    need(0 <= eta <= 1, "eta", eta, "between 0 and 1")
    need(
        eta == 0.5 or set(modes) - {"posterior", "pc"},
        "eta",
        eta,
        f"left out: kappa {kappa} has no use for it",
    )
    alpha = plateau(block.steps, until[0], until[1], hold) if hold else block.alpha
    for k in range(block.steps):
        (a_t, a_s), noise, s = alpha[k : k + 2], block.noise(k), 1 - (k + 1) / block.steps
        # the part of the profile in which the step ends
        mode = next(m for u, m in zip(until, modes, strict=True) if s >= u - 1e-9)
        logits = block.predict(a_t)
        reverse = noise.uniform(1)[..., 0] <= (kappa_of(mode, eta, a_t, a_s) if k + 1 < block.steps else 1.0)
        fills = block.process.absorbing and k + 1 == block.steps  # the last masks
        x_s = block.posterior(logits, a_t, a_s, noise, 0.0 if greedy_tail and fills else None)
        renoised = block.process.corrupt(block.posterior(logits, a_t, 1.0, noise), a_s, noise)
        block.write(torch.where(reverse, x_s, renoised))
        yield
    if greedy_tail:
        yield from tail(block)


def kappa_of(mode, eta, a_t, a_s):
    """The share of reverse steps in a mode of Psi, a number in [0, 1]."""
    if mode in ("posterior", "pc", "constant"):
        return {"posterior": 1.0, "pc": 0.0, "constant": eta}[mode]
    limit = sigma_max(a_t, a_s)
    sigma = {"cap": min(eta, limit), "rescale": eta * limit, "remask": eta}[mode]
    return max(0.0, 1 - sigma / (1 - a_s)) if a_s < 1 else 1.0


def profile(text):
    """
    '0.55:posterior,0.05@0.9:remask,0:posterior' -> ([0.55, 0.05, 0], 0.9, [posterior, remask, posterior]);
    one word is '0:word'.
    """
    known, until, holds, modes = ("posterior", "pc", "constant", "cap", "rescale", "remask"), [], [], []
    try:
        for part in (text if ":" in text else f"0:{text}").split(","):
            t, mode = part.split(":")
            t, _, hold = t.partition("@")
            until, holds, modes = until + [float(t)], holds + [float(hold or 0)], modes + [mode]
    except ValueError:  # a number that is none, a colon too many
        modes = [""]
    falling = until == sorted(until, reverse=True) and until[-1:] == [0] and until[0] < 1
    # the middle one of three
    held = not any(holds) or (len(holds) == 3 and not holds[0] and 0 < holds[1] < 1 and not holds[2])
    if not (set(modes) <= set(known) and falling and held):
        raise ValueError(
            f"kappa {text!r} is none of {', '.join(known)}, nor TIME:MODE,...,0:MODE with falling times"
        )
    return until, max(holds), modes


def plateau(steps, t_on, t_off, alpha_on):
    """
    steps + 1 noise levels: alpha climbs to alpha_on at time t_on, stays until t_off and climbs on to 1, both
    times linearly in t, whatever schedule the network was trained with.
    """
    times = [1 - k / steps for k in range(steps + 1)]
    return [
        alpha_on * min(1.0, (1 - t) / (1 - t_on))
        if t >= t_off
        else alpha_on + (1 - alpha_on) * (1 - t / t_off)
        for t in times[:-1]
    ] + [1.0]


# ----- ReMDM: masked noise that takes tokens back


def sigma_max(a_t, a_s):
    """The largest share of visible tokens that may be taken back in a step."""
    return min(1.0, (1 - a_s) / a_t) if a_t > 0 else 1.0


def remask(block, logits, a_t, a_s, sigma, noise):
    """
    ReMDM's reverse step (arXiv 2503.00307), sigma <= min(1, (1 - a_s) / a_t), a number or (R, b):

        x_t = token:  mask with probability sigma
        x_t = mask:   x_s ~ p with probability (a_s - (1 - sigma) a_t) / (1 - a_t)

    logits: None has the network asked where a mask lifts
    """
    masked = block.x == block.process.mask_id
    u = noise.uniform(1)[..., 0]
    lift = torch.where(masked, u <= (a_s - (1 - sigma) * a_t) / (1 - a_t), u <= 1 - sigma)
    # alpha from 0 to 1 where it lifts: a draw of p; elsewhere nothing
    x_s = block.reverse(a_t, 0.0, lift.double(), noise, logits=logits)
    block.write(torch.where(masked | lift, x_s, block.process.mask_id))


@sampler("absorbing")
def remdm_cap(block, *, eta=0.02):
    """
    ReMDM, capped (arXiv 2503.00307): a visible token becomes a mask again with probability sigma = min(eta,
    (1 - a_s) / a_t).

    eta: the cap; the paper's 0.008 is for 1024 steps
    """
    yield from remdm(block, lambda limit: min(eta, limit), eta)


@sampler("absorbing")
def remdm_rescale(block, *, eta=0.1):
    """
    ReMDM, rescaled (arXiv 2503.00307): sigma = eta min(1, (1 - a_s) / a_t).

    eta: between 0 (ancestral) and 1; the paper's 0.015 is for 1024 steps
    """
    yield from remdm(block, lambda limit: eta * limit, eta)


def remdm(block, sigma_of, eta):
    """What the two above share: sigma_of(min(1, (1 - a_s) / a_t)) -> sigma."""
    need(0 <= eta <= 1, "eta", eta, "between 0 and 1")
    for k in range(block.steps):
        a_t, a_s = block.alpha[k : k + 2]
        remask(block, None, a_t, a_s, sigma_of(sigma_max(a_t, a_s)), block.noise(k))
        yield


@sampler("absorbing")
def remdm_conf(block):
    """
    ReMDM by confidence (arXiv 2503.00307): sigma_i = min(1, (1 - a_s) / a_t) softmax_i(-c_i) over the visible
    tokens, c_i = p(x_i), before temperature, when the token was placed; masks keep sigma = 0. Tokens the
    network was unsure of are taken back first.
    """
    confidence = torch.zeros(block.x.shape, dtype=torch.float64, device=block.x.device)
    for k in range(block.steps):
        a_t, a_s = block.alpha[k : k + 2]
        logits, masked = block.predict(a_t), block.x == block.process.mask_id
        visible = block.open & ~masked
        # a row without tokens: 0 / 0
        weight = (-confidence).masked_fill(~visible, -math.inf).softmax(1).nan_to_num(0)
        remask(block, logits, a_t, a_s, sigma_max(a_t, a_s) * weight, block.noise(k))
        p = pick(block.process.loo_logits(logits).softmax(-1), block.x)
        confidence = torch.where(masked, p.double(), confidence)
        yield


@sampler("absorbing")
def remdm_loop(block, *, eta=0.05, t_on=0.55, t_off=0.05, alpha_on=0.9):
    """
    ReMDM's loop (arXiv 2503.00307): fill up to alpha_on, go on for a while as far as you stand, taking back
    and filling, then finish.

    eta: the sigma of the loop, at most (1 - alpha_on) / alpha_on; the paper's 0.02 is for 1024 steps
    t_on: the time at which the loop begins
    t_off: the time at which it ends
    alpha_on: the share of visible tokens in the loop
    """
    need(0 < t_on < 1, "t_on", t_on, "between 0 and 1")
    need(0 <= t_off < t_on, "t_off", t_off, "at least 0 and below t_on")
    need(0 < alpha_on < 1, "alpha_on", alpha_on, "between 0 and 1")
    need(
        0 <= eta <= (1 - alpha_on) / alpha_on,
        "eta",
        eta,
        f"between 0 and (1 - alpha_on) / alpha_on = {1 / alpha_on - 1:.3g}",
    )
    alpha = plateau(block.steps, t_on, t_off, alpha_on)
    for k in range(block.steps):
        a_t, a_s = alpha[k : k + 2]
        s = 1 - (k + 1) / block.steps
        sigma = min(eta, sigma_max(a_t, a_s)) if t_off - 1e-9 <= s < t_on - 1e-9 else 0.0
        remask(block, None, a_t, a_s, sigma, block.noise(k))
        yield


@sampler("absorbing", "own pace")
def first_hitting(block):
    """
    First-hitting (arXiv 2409.02908): ancestral sampling in the limit of many steps, without the passes in
    which nothing happens. With n masks left the share of masks falls to m u^(1/n), u uniform, and then one
    mask, each as likely, becomes a token: exactly one pass a token.
    """
    share = torch.ones(len(block.x), dtype=torch.float64, device=block.x.device)  # 1 - alpha
    for k in range(block.x.size(1)):
        noise, left = block.noise(k), block.open & (block.x == block.process.mask_id)
        n = left.sum(1).clamp(min=1)
        u, order = noise.uniform(2).unbind(-1)
        share = share * u[:, 0] ** (1 / n)
        # alpha goes to 1 at one position
        block.write(block.reverse(1 - share, 0.0, top(order, 1, left).double(), noise))
        block.live = block.live & (n > 1)
        yield
        if not block.live.any():
            return


# ----- uniform noise: leave-one-out tools (arXiv 2605.22765)


@sampler("redraws")
def gibbs(block, *, rounds=1, resample=4, badness="margin", spread=1.0):
    """
    Gibbs corrector (arXiv 2605.22765): after a reverse step to s, `rounds` times draw some tokens anew from
    what the others say,

        p(x_i | x without i) = a_s l_i(x_i) + (1 - a_s) / V

    Positions by Gumbel-top-k on their badness. One position, chosen at random, leaves the noisy marginal as
    it is; several at once, or the bad ones first, do not: a heuristic that moves towards likelier tokens.
    --steps counts the corrector's passes too: the first floor((steps - 1) / (1 + rounds)) reverse steps have
    correctors, so fewer than rounds + 2 steps have none.

    rounds: correctors after a step; the paper's code has 2
    resample: positions a corrector; the paper's code has 12 of some hundred
    badness: random | max: -log of the best probability | current: -log of the token's own | margin: best
        other over own
    spread: temperature of the choice; more is closer to random
    """
    names = ("random", "max", "current", "margin")
    need(badness in names, "badness", badness, f"one of {', '.join(names)}")
    need(rounds >= 1, "rounds", rounds, "at least 1")
    need(resample >= 1, "resample", resample, "at least 1")
    need(1e-30 <= spread <= 1e30, "spread", spread, "in [1e-30, 1e30]")
    process = block.process
    corrected = (block.steps - 1) // (1 + rounds)
    alpha = block.alpha if not corrected else block.grid(block.steps - corrected * rounds)
    used = 0
    for k in range(len(alpha) - 1):
        a_s = alpha[k + 1]
        block.write(block.reverse(alpha[k], alpha[k], a_s, block.noise(used)))
        used += 1
        yield
        for _ in range(rounds if k < corrected else 0):
            noise = block.noise(used)
            logl = (
                block.sharpen(process.loo_logits(block.predict(a_s), block.x, a_s)).log_softmax(-1).double()
            )
            logp = process.marginal(logl.exp(), torch.tensor(a_s, dtype=torch.float64)).log()
            own = pick(logp, block.x)
            other = logp.scatter(-1, block.x[..., None], -math.inf).amax(-1)
            bad = {"random": 0 * own, "max": -logp.amax(-1), "current": -own, "margin": other - own}[badness]
            gumbel = -(-noise.uniform(1)[..., 0].log()).clamp(min=1e-300).log()
            where = top(bad / spread + gumbel, resample, block.open)
            block.write(torch.where(where, process.corrupt(block.draw(logl, noise), a_s, noise), block.x))
            used += 1
            yield


@sampler("redraws")
def max_coupling(block):
    """
    Another reverse kernel (arXiv 2605.22765): keep x_t with probability (1 - a_s) / (1 - a_t), else draw from
    D. With the true D a token has the same marginals as in the ancestral step; for masked noise it is the
    ancestral step.
    """
    for k in range(block.steps):
        (a_t, a_s), noise = block.alpha[k : k + 2], block.noise(k)
        keep = noise.uniform(1)[..., 0] <= (1 - a_s) / (1 - a_t)
        block.write(block.reverse(a_t, a_t, 1.0, noise, where=~keep))  # alpha_s = 1: a draw of D
        yield
