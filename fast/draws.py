"""
How is a token drawn without probabilities? Exactly, tail included, from logits alone: what rng.draw does of
dense probabilities.

    sample     a draw from softmax(z / T), or from q(x_s | x_t, softmax(z / T)), and what samplers want to
               know of it
    settle     what the random numbers decide before anyone has seen the logits

Letters as in kernels.py, which says when Triton runs: N rows, V vocabulary, z logits, p = softmax(z / T).
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import kernels
from kernels import CHUNK, as_rows, blocks, full, jit, launch, log1p, tile, tl, wide
from rng import exponential, float64, uniforms

# lane l of a row holds the ids with v // 8 % LANES == l. Another number gives other draws, as good
LANES = 256


@functools.cache
def works(device):
    """Does Triton's draw give what PyTorch's does on a few numbers? The first call tries it."""
    try:
        return not _try_out(device)
    except Exception:  # whatever a compiler or a driver may raise
        return False


def _try_out(device):
    """The name of a draw in which the kernel and its PyTorch form differ; '' if there is none."""
    N, V = 4, 5000
    rng = torch.Generator().manual_seed(0)
    logits, xt = (
        3 * torch.randn(N, V, generator=rng).to(device),
        torch.randint(V, (N,), generator=rng).to(device),
    )
    alpha, key = (
        torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64, device=device),
        torch.arange(N, device=device),
    )
    mixture, less = (
        torch.stack((V * alpha, 1 - alpha, 0 * alpha, 0 * alpha), -1),
        -torch.ones(N, device=device),
    )
    found = []
    for form in (sample_pytorch, sample_triton):
        draws = []
        for z in (logits, logits.bfloat16()):
            draws += [
                *form(z, key, xt, mixture, xt, less, 0.7, True),
                form(z, key, xt, mixture, xt, less, 0.7, False)[0],
            ]
        found.append({"sample": draws})
    return kernels.first_difference(*found)


def fused(x):
    """Whether a draw of x takes the Triton kernel."""
    return kernels.fused(x) and (not x.is_cuda or works(x.device))


def clocks(key, count):
    """When exponential clocks of rate 1 ring."""
    return exponential(uniforms(key, count))


@dataclass
class Draw:
    """What `sample` returns of N rows; p = softmax(z / T). Only `token` without stats."""

    token: torch.Tensor  # (N,) int64
    logp: torch.Tensor | None  # (N,) float32: log p of the token
    top: torch.Tensor | None  # the largest p
    entropy: torch.Tensor | None  # of p, in nats
    p_xt: torch.Tensor | None  # p at x_t


def settle(key, xt, mixture, V):
    """
    What the random numbers of `sample` settle before anyone has seen p: (token (N,), asked (N,) bool), then
    the numbers, u (N,) and a uniform id (N,). Where not asked, that is the draw, for any p(x_t) in [0, 1]:
    the uniform id if u (seen + rest) < fresh, x_t if fresh <= u rest <= fresh + stay.
    """
    seen, rest, fresh, stay = mixture.unbind(-1)
    u, other = uniforms(key[:, None], torch.arange(1, 3, device=key.device)).unbind(-1)
    renewed, drawn = u * rest < fresh, (other * V).long().clamp(max=V - 1)
    return (
        torch.where(renewed, drawn, xt),
        renewed & (u * (seen + rest) >= fresh) | (u * rest > fresh + stay),
        u,
        drawn,
    )


def sample(
    logits,
    key,
    temperature=1.0,
    xt=None,
    mixture=None,
    shift=None,
    forbidden=None,
    stats=False,
    transform=None,
    settled=None,
):
    """
    An exact draw a row, without (N, V) probabilities: from p = softmax(z / T), or, with x_t and a mixture
    (seen, rest, fresh, stay),

        fresh / D    a uniform id               D = seen p(x_t) + rest
        (seen p(x_t) + stay) / D    x_t
        the rest     a draw of p

    which is what q(x_s | x_t, p) is for both kinds of noise (`mixture` in diffusion.py). Returns a Draw.

    logits (N, V) any float dtype. key (N,) int64: a row's draw depends on its key and logits, not on its
    batch mates or on how it is
    run: Noise.keys. mixture (N, 4) float64. temperature > 0; shift, forbidden: as in uniform_nll,
        cross_entropy.
    transform   a function of logits (n, V) that takes the temperature's place, greedy or nucleus; always in
                PyTorch
    settled     what `settle` said of these rows, where it was asked before

    Of a row one reading keeps, for each of 256 lanes, its mass. Exponential clocks with these masses as rates
    choose a lane, clocks with the weights inside choose its member: 256 + V / 256 random numbers of 63 bits
    instead of V. With 32-bit numbers the tail would starve, which is a lower temperature in disguise.

    A row that is read and holds NaN gets token -1.

    Bytes a row: V e (1 + 1 / 256); nothing where `settle` has the answer, and stats are not wanted.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, not {temperature}")
    N, device, logits = len(logits), logits.device, as_rows(logits.detach())
    xt, key, temperature = (
        (torch.zeros_like(key) if xt is None else xt).contiguous(),
        key.contiguous(),
        max(temperature, 1e-30),
    )
    # all from p
    mixture = (
        torch.eye(4, device=device, dtype=float64(device))[1].expand(N, 4) if mixture is None else mixture
    )
    edit = xt if forbidden is None else torch.full_like(xt, forbidden)
    add = (
        -full(shift, N, device, torch.float32, 0.0)
        if forbidden is None
        else torch.full((N,), -math.inf, device=device)
    )
    assert shift is None or forbidden is None, "masked noise has a forbidden id, uniform noise a shift"
    args = logits, key, xt, mixture.contiguous(), edit, add, temperature, stats
    return Draw(
        *(
            sample_triton(*args)
            if fused(logits) and transform is None
            else sample_pytorch(*args, transform, settled)
        )
    )


def sample_pytorch(logits, key, xt, mixture, edit, add, temperature, stats, transform=None, settled=None):
    """In PyTorch: only rows whose token, or stats, need it are read."""
    (N, V), device = logits.shape, logits.device
    token, asked, u, drawn = settled or settle(key, xt, mixture, V)
    rows = torch.arange(N, device=device) if stats or settled else asked.nonzero()[:, 0]
    if len(rows) == 0:
        return token, *(torch.empty(4, 0, device=device) if stats else [None] * 4)
    if len(rows) < N:
        u, drawn, key, xt, edit, add, mixture = (x[rows] for x in (u, drawn, key, xt, edit, add, mixture))
    seen, rest, fresh, stay = mixture.unbind(-1)
    every = rows if len(rows) == N else torch.arange(len(rows), device=device)
    source = rows if transform is None else every
    if transform is not None:  # a new (n, V) of logits, as they are drawn from
        logits = transform(
            logits.index_select(0, rows)
            .to(wide(logits))
            .scatter_add_(1, edit[:, None], add[:, None].to(wide(logits)))
        )
        add, temperature = torch.zeros_like(add), 1.0

    # one reading: the maximum m, the mass of every lane relative to it, and sum w log w
    n = max(1, CHUNK // V)
    # see kernels.pieces
    work = torch.empty(1 + stats, min(n, len(rows)), V, dtype=logits.dtype, device=device)
    m, mass, w_xt, h = [], [], [], []
    for part in every.split(n):
        z = torch.index_select(logits, 0, source[part], out=work[0, : len(part)]).to(wide(logits))
        z.scatter_add_(1, edit[part, None], add[part, None].to(z))
        m.append(z.amax(-1, keepdim=True))
        z.sub_(m[-1])
        z = z if temperature == 1 else z.div_(temperature)
        w = (
            torch.exp(z, out=work[1, : len(part)])
            if stats and z.dtype == work.dtype
            else z.exp()
            if stats
            else z.exp_()
        )
        mass.append(_lanes(w))
        w_xt.append(w.gather(1, xt[part, None]))
        h += [z.clamp_(min=-1e30).mul_(w).sum(-1)] if stats else []
    m, mass, w_xt = torch.cat(m), torch.cat(mass), torch.cat(w_xt)[:, 0]
    total = mass.sum(-1)

    def z_at(index, ids):
        """log p, but for log(total), of ids (len(index), k)"""
        z = logits[source[index, None], ids].to(m) + torch.where(
            ids == edit[index, None], add[index, None], 0.0
        )
        return (z - m[index]) / temperature

    p_xt = w_xt / total
    at = u * (seen * p_xt + rest)
    y = torch.where(at < fresh, drawn, xt)
    go = (at > fresh + seen * p_xt + stay).nonzero()[:, 0]
    L, tiles = mass.size(1), -(-V // (8 * LANES))
    lane, member = torch.arange(L, device=device), torch.arange(min(8 * tiles, V), device=device)
    key = key[go, None]
    lane_clock, clock = clocks(key, 3 + torch.cat((lane, LANES + member))).split_with_sizes(
        (L, len(member)), dim=-1
    )
    lane = (mass[go] / lane_clock).argmax(-1, keepdim=True)
    ids = member // 8 * (8 * LANES) + member % 8 + 8 * lane  # (n, 8 tiles)
    real = ids.clamp(max=V - 1)
    # if it is all there still
    weight = w.index_select(0, go).gather(1, real) if len(w) == len(rows) else z_at(go, real).exp()
    y[go] = ids.gather(1, (torch.where(ids < V, weight, 0.0) / clock).argmax(-1, keepdim=True))[:, 0]
    y = torch.where(total.isnan(), -1, y)
    token[rows] = y
    if not stats:
        return token, *[None] * 4
    logp = z_at(every, y[:, None].clamp(min=0))[:, 0] - total.log()
    return token, *(x.float() for x in (logp, 1 / total, total.log() - torch.cat(h) / total, p_xt))


def _lanes(w):
    """Sums (n, 256, or as many lanes as V fills) of weights w (n, V)."""
    n, V = w.shape
    main = V // (8 * LANES) * 8 * LANES
    last = F.pad(w[:, main:], (0, (main - V) % 8)).view(n, -(-(V - main) // 8), 8).sum(-1)
    if main == 0:
        return last
    mass = w[:, :main].view(n, -1, 8 * LANES).sum(1).view(n, LANES, 8).sum(-1)
    mass[:, : last.size(1)] += last
    return mass


def sample_triton(logits, key, xt, mixture, edit, add, temperature, stats):
    N, V = logits.shape
    token, out = torch.empty_like(xt), torch.empty(4, N, device=logits.device)
    launch(
        _sample_kernel,
        N,
        logits,
        logits,
        key,
        xt,
        mixture,
        edit,
        add,
        token,
        *out,
        logits.stride(0),
        V,
        1 / temperature,
        # fmt: skip
        STATS=stats,
        TILES=1 << (-(-V // (8 * LANES)) - 1).bit_length(),
        **blocks(V, 8 * LANES),
    )
    return token, *(out if stats else [None] * 4)


@jit
def _sample_kernel(
    logits,
    key,
    xt,
    mixture,
    edit,
    add,
    token,
    logp,
    top,
    entropy,
    p_xt,
    stride,
    V,
    by,
    STATS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row, k, x, e, plus = (
        logits + i * stride,
        tl.load(key + i),
        tl.load(xt + i),
        tl.load(edit + i),
        tl.load(add + i),
    )
    seen, rest, fresh = tl.load(mixture + 4 * i), tl.load(mixture + 4 * i + 1), tl.load(mixture + 4 * i + 2)
    stay, u = tl.load(mixture + 4 * i + 3), _uniform(k, 1, tl.float64)
    drawn = tl.minimum((_uniform(k, 2, tl.float64) * V).to(tl.int64), V - 1)
    y = tl.where(u * rest < fresh, drawn, x)
    if STATS or (u * rest < fresh and u * (seen + rest) >= fresh) or u * rest > fresh + stay:  # settle
        # one reading: every lane's maximum m, s = sum exp(z - m) and h = sum exp(z - m) (z - m)
        m = tl.full([BLOCK // 8], -float("inf"), tl.float32)
        s = tl.zeros([BLOCK // 8], tl.float32)
        h = tl.zeros([BLOCK // 8], tl.float32)
        main = V // BLOCK * BLOCK
        for start in range(0, main, BLOCK):
            v, z = tile(row, start, V, e, plus, BLOCK, False)
            m, s, h = _online_entropy(z, m, s, h, by, STATS)
        if main < V:
            v, z = tile(row, main, V, e, plus, BLOCK, True)
            m, s, h = _online_entropy(z, m, s, h, by, STATS)
        best = tl.max(m, 0)
        gap = tl.where(m == -float("inf"), -float("inf"), (m - best) * by)
        mass = s * tl.exp(gap)
        total = tl.sum(mass, 0)
        z_x = tl.load(row + x).to(tl.float32) + tl.where(x == e, plus, 0.0)
        p = (tl.exp((z_x - best) * by) / total).to(tl.float64)
        at = u * (seen * p + rest)
        y = tl.where(at < fresh, drawn, x)
        if at > fresh + seen * p + stay:
            lanes = tl.arange(0, BLOCK // 8)
            lane = tl.argmin(_clock(k, 3 + lanes) / mass, 0)
            far = tl.sum(tl.where(lanes == lane, m, 0.0), 0)  # weights relative to the lane's own maximum
            member = tl.arange(0, 8 * TILES)
            v = member // 8 * BLOCK + member % 8 + 8 * lane
            z = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
            z = tl.where(v == e, z + plus, z)
            first = tl.argmin(_clock(k, 3 + 256 + member) / tl.exp((z - far) * by), 0)  # 256: LANES
            y = tl.sum(tl.where(member == first, v, 0), 0).to(tl.int64)
        y = tl.where(total == total, y, -1)
        if STATS:
            z_y = tl.load(row + tl.maximum(y, 0)).to(tl.float32) + tl.where(y == e, plus, 0.0)
            tl.store(logp + i, (z_y - best) * by - tl.log(total))
            tl.store(top + i, 1 / total)
            tl.store(p_xt + i, p.to(tl.float32))
            tl.store(
                entropy + i,
                tl.log(total) - tl.sum(tl.where(mass > 0, (h + gap * s) * tl.exp(gap), 0.0), 0) / total,
            )
    tl.store(token + i, y)


@jit
def _online_entropy(z, m, s, h, by, STATS: tl.constexpr):
    """_online of z / T, by = 1 / T, with h = sum exp(d) d, d = (z - m) / T, where it is wanted."""
    new = tl.maximum(m, tl.max(z, 1))
    safe = tl.where(new == -float("inf"), 0.0, new)
    d, fall = (z - safe[:, None]) * by, (m - safe) * by
    e, shrink = tl.exp(d), tl.exp(fall)
    if STATS:
        h = tl.where(s > 0, shrink * (h + tl.where(shrink > 0, fall, 0.0) * s), 0.0) + tl.sum(
            tl.where(e > 0, e * d, 0.0), 1
        )
    return new, s * shrink + tl.sum(e, 1), h


@jit
def _uniform(key, count, dtype: tl.constexpr):
    """uniforms; the small ones keep all their bits in float32 too."""
    # GOLDEN; count may be a bare int
    z = key.to(tl.uint64) + (key * 0 + count).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return ((z & 0x7FFFFFFFFFFFFFFF).to(dtype) + 0.5) * 1.0842021724855044e-19  # 2^-63


@jit
def _clock(key, count):
    """clocks"""
    return -log1p(-tl.minimum(_uniform(key, count, tl.float32), 0.99999994))
