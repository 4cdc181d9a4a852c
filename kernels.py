"""
How is it fast? What runs along the vocabulary, as Triton kernels, each beside the plain PyTorch that it must
equal.

    cross_entropy          -w log softmax(z)[y], and its gradient
    uniform_nll            the bound of uniform noise, and its gradient

A row is a token: its V logits are the long axis, and a kernel is as fast as it reads and writes them. No (N,
V) probabilities, no one-hots, no log-softmax. Triton runs on CUDA where its first launch gives what PyTorch
gives (`path` says so, and why not); everywhere else the PyTorch forms are the product: some rows at a time,
so that what they need beside the logits fits in a cache.

Letters: N rows, V vocabulary, z logits, p = softmax(z). "Bytes" count logits of e bytes each.
"""

import contextlib
import functools
import math
import types

import torch

from rng import float64

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this machine
    triton, tl = None, types.SimpleNamespace(constexpr=None)

jit = triton.jit if triton is not None else lambda f: f


@functools.cache
def path(device):
    """
    ("Triton" or "PyTorch", why): what runs on a torch.device. The first call tries every kernel on a few
    numbers.
    """
    if device.type != "cuda":
        return "PyTorch", "Triton is for CUDA"
    if triton is None:
        return "PyTorch", "no Triton here: pip install triton"
    try:
        off = _try_out(device)
    except Exception as e:  # whatever a compiler or a driver may raise
        first = str(e).strip().splitlines()[0] if str(e).strip() else ""
        return "PyTorch", f"Triton's first launch failed: {type(e).__name__}: {first}"
    return (
        ("PyTorch", f"Triton's {off} gave something else in its first launch")
        if off
        else ("Triton", triton.__version__)
    )


def _try_out(device):
    """The first result in which a kernel and its PyTorch form differ on a few numbers; '' if none does."""
    N, V = 4, 5000
    rng = torch.Generator().manual_seed(0)
    z, x0, xt = (
        3 * torch.randn(N, V, generator=rng),
        torch.randint(V, (N,), generator=rng),
        torch.randint(V, (N,), generator=rng),
    )
    alpha = torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    logits, x0, xt, alpha = (x.to(device) for x in (z, x0, xt, alpha))
    one = torch.ones(N, device=device)
    results = []
    for ce, nll, scale in (
        (cross_entropy_pytorch, uniform_nll_pytorch, lambda g, by: g.mul_(by[:, None])),
        (cross_entropy_triton, uniform_nll_triton, _scale),
    ):
        found = {"cross_entropy": [], "uniform_nll": [], "the scaling of gradients": []}
        for z in (logits, logits.bfloat16()):
            g, h = torch.empty_like(z), torch.empty_like(z)
            noisy = x0, xt, alpha, -one.double(), one, one
            found["cross_entropy"] += [*ce(z, g, x0, one, 7), g.clone(), *ce(z, None, x0, one, 7)]
            found["uniform_nll"] += [nll(z, h, *noisy), h, nll(z, None, *noisy)]
            scale(g, 2 * one)
            found["the scaling of gradients"] += [g]
        results.append(found)
    return first_difference(*results)


def first_difference(expected, found):
    """
    The first name under which two dicts of lists of tensors differ by more than rounding; '' if none does.
    """
    for name, ours in found.items():
        for a, b in zip(ours, expected[name], strict=True):
            rtol = 2e-2 if a.dtype == torch.bfloat16 else 1e-3
            if not (
                torch.allclose(a, b, rtol=rtol, atol=1e-5) if a.is_floating_point() else torch.equal(a, b)
            ):
                return name
    return ""


def fused(x):
    """Whether x takes the Triton kernels, which think in float32."""
    return path(x.device)[0] == "Triton" and x.dtype != torch.float64


def wide(x):
    """At least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def send(x, device, dtype=None):
    """
    x on a device. The host goes on at once: to CUDA what is large leaves from pinned memory, which nobody
    moves, and what is small goes with the command. To the CPU, and to and from Apple's GPUs, it waits: there
    a tensor would be read before it is whole.
    """
    device = torch.device(device)
    if x.device == device and dtype in (None, x.dtype):
        return x
    if device.type == "cuda" and x.is_cpu and x.nbytes > 1 << 16:
        x = x.pin_memory()
    return x.to(device=device, dtype=dtype or x.dtype, non_blocking=device.type not in ("cpu", "mps"))


def as_rows(logits):
    """Logits of which every row lies in one piece."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def launch(kernel, n, x, *args, **constants):
    """One program a row."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[(n,)](*args, **constants)


def blocks(V, largest):
    """Ids a program reads at a time, and its warps: 8 logits a thread, at most."""
    block = min(largest, max(16, 1 << (V - 1).bit_length()))
    return {"BLOCK": block, "num_warps": max(1, min(32, block // 256))}


CHUNK = 1 << 20  # logits that the PyTorch forms work on at a time: 4 MB


def pieces(logits, dtype, buffers):
    """
    Some rows at a time: (slice, a copy of their logits, buffers - 1 more tensors of that shape). The buffers
    are always the same ones: fresh ones would be fetched from the operating system each time, which takes
    longer than the work.
    """
    N, V = logits.shape
    n = max(1, CHUNK // V)
    work = [torch.empty(min(n, N), V, dtype=dtype, device=logits.device) for _ in range(buffers)]
    for i in range(0, N, n):
        rows = slice(i, min(i + n, N))
        z, *more = (x[: rows.stop - i] for x in work)
        yield rows, z.copy_(logits[rows]), *more


def full(x, N, device, dtype, none=1.0):
    """A number a row, (N,), from a number, a tensor that broadcasts, or None; the host waits for nothing."""
    if torch.is_tensor(x):
        return send(x, device, dtype).expand(N).contiguous()
    return torch.full((N,), none if x is None else x, device=device, dtype=dtype)


# ----- what the kernels share


@jit
def tile(row, start, V, edit, add, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """
    BLOCK ids from `start` on and their logits in float32, as (BLOCK / 8, 8): a thread holds 8 in a row, so
    that maxima and sums over them need no neighbour. `add` goes to the logit of id `edit`. Only the TAIL of a
    row looks for its end: -inf behind it.
    """
    v = start + 8 * tl.arange(0, BLOCK // 8)[:, None] + tl.arange(0, 8)[None, :]
    if TAIL:
        z = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
    else:
        z = tl.load(row + v).to(tl.float32)
    return v, tl.where(v == edit, z + add, z)


@jit
def _online(z, m, s):
    """
    Lanes' running maxima m and sums s of exp(z - m), one tile further (online softmax, arXiv 1805.02867).
    """
    new = tl.maximum(m, tl.max(z, 1))
    safe = tl.where(new == -float("inf"), 0.0, new)  # a lane that has seen nothing: -inf - -inf is no number
    return new, s * tl.exp(m - safe) + tl.sum(tl.exp(z - safe[:, None]), 1)


@jit
def _normaliser(row, V, edit, add, BLOCK: tl.constexpr):
    """
    One reading of a row: its maximum m and sum of exp(z - m), by way of BLOCK / 8 lanes that meet at the end.
    """
    m = tl.full([BLOCK // 8], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK // 8], tl.float32)
    main = V // BLOCK * BLOCK
    for start in range(0, main, BLOCK):
        v, z = tile(row, start, V, edit, add, BLOCK, False)
        m, s = _online(z, m, s)
    if main < V:
        v, z = tile(row, main, V, edit, add, BLOCK, True)
        m, s = _online(z, m, s)
    top = tl.max(m, 0)
    return top, tl.sum(s * tl.exp(m - top), 0)


@jit
def log1p(x):
    """log(1 + x), small x too: what 1 + x rounds away is put back (Kahan)."""
    w = 1 + x
    d = w - 1
    return tl.where(d == 0, x, tl.log(w) * (x / tl.where(d == 0, 1, d)))


class _Rows(torch.autograd.Function):
    """
    Losses (N,) of rows of logits. The gradient is made together with them; backward only scales its rows.
    """

    @staticmethod
    def forward(ctx, logits, run, wanted, overwrite):
        grad = None if not wanted else logits.detach() if overwrite else torch.empty_like(logits)
        ctx.grad = grad
        out = run(logits.detach(), grad)
        # a kernel writes behind autograd's back: what others saved of these logits is gone
        if wanted and overwrite:
            torch.autograd.graph.increment_version(logits)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_):
        grad, ctx.grad = ctx.grad, None
        assert grad is not None, "this gradient was handed out before"
        if fused(grad):
            _scale(grad, g.float().contiguous())
        elif not grad.is_cpu or not (g == 1).all():  # a question that a GPU would be waited for
            grad.mul_(g[:, None])
        return grad, None, None, None


def _scale(grad, by):
    launch(_scale_kernel, len(grad), grad, grad, by, grad.stride(0), grad.size(1), BLOCK=1024)


@jit
def _scale_kernel(grad, by, stride, V, BLOCK: tl.constexpr):
    """Rows times a number each. A sum's gradient is 1: nothing is read or written then."""
    i = tl.program_id(0).to(tl.int64)
    g = tl.load(by + i)
    if g != 1:
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(grad + i * stride + v, mask=v < V).to(tl.float32)
            tl.store(grad + i * stride + v, z * g, mask=v < V)


# ----- cross-entropy


def cross_entropy(logits, target, weight=None, forbidden=None, overwrite=False):
    """
    loss_i = -w_i log p_i[y_i], and lse_i = logsumexp(z_i): two (N,) float32. Differentiable in logits by way
    of the loss.

    logits (N, V) any float dtype, target (N,) int64, weight (N,) or None (1)
    forbidden   an id, or None: it takes no part, as if its logit were -inf. As a target it costs inf
    overwrite   write the gradient over the logits: they are gone afterwards, and no second (N, V) is needed
    A row of weight 0 costs 0 and has gradient 0, whatever its logits and target are.

    Bytes a row: V e without gradient; 2 V e read and V e written with it, the second reading from the L2
    cache where the rows at work fit there.
    """
    N, logits, target = len(logits), as_rows(logits), target.contiguous()
    weight, no = full(weight, N, logits.device, wide(logits)), -1 if forbidden is None else forbidden
    form = cross_entropy_triton if fused(logits) else cross_entropy_pytorch
    run = lambda z, grad: form(z, grad, target, weight, no)
    loss, lse = _Rows.apply(logits, run, torch.is_grad_enabled() and logits.requires_grad, overwrite)
    return loss, lse.detach()


def cross_entropy_pytorch(logits, grad, target, weight, forbidden):
    """In PyTorch. grad (N, V) receives the gradient, may be the logits themselves, or None."""
    loss, lse = torch.empty_like(weight), torch.empty_like(weight)
    for rows, z in pieces(logits, weight.dtype, 1):
        w = weight[rows]
        y = torch.where(w == 0, 0, target[rows])[:, None]
        if forbidden >= 0:
            z[:, forbidden] = -math.inf
        m = z.amax(-1, keepdim=True)
        z_y = z.gather(1, y) - m
        s = z.sub_(m).exp_().sum(-1, keepdim=True)
        lse[rows] = (m + s.log())[:, 0]
        loss[rows] = torch.where(w == 0, 0.0, w * (s.log() - z_y)[:, 0])
        if grad is not None:
            p = z.mul_((w / s[:, 0])[:, None])  # w p
            p.scatter_add_(1, y, -w[:, None])
            p[w == 0] = 0.0
            grad[rows] = p
    return loss, lse


def cross_entropy_triton(logits, grad, target, weight, forbidden):
    loss, lse = torch.empty_like(weight), torch.empty_like(weight)
    out = logits if grad is None else grad
    strides = logits.stride(0), out.stride(0)
    V, wants = logits.size(1), {"GRAD": grad is not None, **blocks(logits.size(1), 8192)}
    tensors = logits, logits, out, target, weight, loss, lse
    launch(_cross_entropy_kernel, len(logits), *tensors, *strides, V, forbidden, **wants)
    return loss, lse


@jit
def _cross_entropy_kernel(
    logits,
    grad,
    target,
    weight,
    loss,
    lse,
    stride,
    grad_stride,
    V,
    forbidden,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)  # 64 bits: N V may not fit in 32
    row, out, w = logits + i * stride, grad + i * grad_stride, tl.load(weight + i)
    y = tl.where(w == 0, 0, tl.load(target + i))
    z_y = tl.where(y == forbidden, -float("inf"), tl.load(row + y).to(tl.float32))
    top, total = _normaliser(row, V, forbidden, -float("inf"), BLOCK)
    tl.store(lse + i, top + tl.log(total))
    tl.store(loss + i, tl.where(w == 0, 0.0, w * (top - z_y + tl.log(total))))
    if GRAD:
        tl.debug_barrier()  # all have read the target's logit: now the row may be written over
        main = V // BLOCK * BLOCK
        for start in range(0, main, BLOCK):
            v, z = tile(row, start, V, forbidden, -float("inf"), BLOCK, False)
            tl.store(out + v, _cross_entropy_slope(v, z, y, w, top, total))
        if main < V:
            v, z = tile(row, main, V, forbidden, -float("inf"), BLOCK, True)
            tl.store(out + v, _cross_entropy_slope(v, z, y, w, top, total), mask=v < V)


@jit
def _cross_entropy_slope(v, z, y, w, top, total):
    """w (p_v - [v = y])"""
    return tl.where(w == 0, 0.0, tl.exp(z - top) * (w / total) - tl.where(v == y, w, 0.0))


# ----- the bound of uniform noise


def uniform_nll(logits, x0, xt, alpha, dalpha, weight=None, shift=None, overwrite=False):
    """
    Integrand of the bound of uniform noise, (N,) float32 nats, times a weight a row (Duo, arXiv 2506.10892,
    as a Bregman form), z = x_t:

        -alpha'_t / (V alpha_t) * sum_v [ r_v log(r_v / rh_v) - r_v + rh_v ] >= 0
        r_v = xb_v(onehot(x_0)) / xb_z(onehot(x_0)),   rh_v = xb_v(p) / xb_z(p),   xb_v(p) = V alpha_t p_v + 1
                                                       - alpha_t

    With a = alpha, b = 1 - a and c = b / (V a + b), r takes two values:

        z  = x_0:  r_z = 1,       r_v = c elsewhere
        z != x_0:  r_x0 = 1 / c,  r_v = 1 elsewhere        (1 / c - 1 = V a / b)

    so the sum over v needs only S = sum_v log xb_v, its entries at z and x_0, and p_z. Written with xb = b (1
    + q), q = V a p / b, every b cancels before it is rounded; the linear terms are subtracted by hand for the
    same reason (`_bound`). The gradient, with C = c if z = x_0, else 1 (`_slopes`):

        dL/dz_v = p_v (g_v - sum_u p_u g_u),   g_v = a' ( C / xb_v + [v = z] A_z + [v = x_0] A_0 )

    Here 1 / (1 + q_v) - sum_u p_u / (1 + q_u) = sum_u p_u q_u / (1 + q_u) - q_v / (1 + q_v): whichever has
    the smaller sum, R or Q, loses less.

    logits (N, V); x0, xt (N,) int64; alpha in [0, 1), dalpha (N,) float64. At alpha = 0 the integrand is 0.
    shift (N,)  is subtracted from the logit at x_t first, or None: how a denoiser's logits become
                leave-one-out ones
    overwrite, and rows of weight 0: as in cross_entropy

    Bytes a row: 2 V e without gradient, 3 V e read and V e written with it; what is read again comes from L2
    where rows fit there.
    """
    N, device, logits, x0, xt = len(logits), logits.device, as_rows(logits), x0.contiguous(), xt.contiguous()
    alpha, dalpha = (full(x, N, device, float64(device)) for x in (alpha, dalpha))
    weight, shift = (full(x, N, device, wide(logits), none) for x, none in ((weight, 1.0), (shift, 0.0)))
    form = uniform_nll_triton if fused(logits) else uniform_nll_pytorch
    run = lambda z, grad: form(z, grad, x0, xt, alpha, dalpha, weight, shift)
    return _Rows.apply(logits, run, torch.is_grad_enabled() and logits.requires_grad, overwrite)


def _bound(V, a, b, da, same, S, S_z, S_0, p_z):
    """The bound from its sums: S of log(1 + q), its entries at z and x_0, and p_z. All (n,) float64."""
    odds = V * a / b
    log_c = -torch.log1p(odds)
    c = log_c.exp()
    r_log_r = torch.where(same, (V - 1) * c * log_c, -log_c / c)
    r_log_rh = torch.where(same, c * (S - V * S_z), S - V * S_z + odds * (S_0 - S_z))
    linear = (same.to(p_z) - p_z) * V / ((V * a * same + b) * (b + V * a * p_z))  # (sum rh - r) / (V alpha)
    return torch.where(a == 0, 0.0, -da / (V * a) * (r_log_r - r_log_rh) - da * linear)


def _slopes(V, a, b, same, p_z, p_0):
    """
    C / b, p_z A_z and p_0 A_0. With xb = b (1 + q) and a + b = 1 nothing large is left to cancel:
        z  = x_0:  A_z = V a (V (1 - b p_z) + b) / (xb_z^2 (V a + b))        A_0 = 0
        z != x_0:  A_z = -V^2 a p_z / (b xb_z^2)                             A_0 = V a / (b xb_0)
    """
    xb_z, xb_0 = b + V * a * p_z, b + V * a * p_0
    C = torch.where(same, b / (V * a + b), 1.0)
    A_z = p_z * V * a * torch.where(same, (V * (1 - b * p_z) + b) / (V * a + b), -V * p_z / b) / xb_z**2
    return C / b, A_z, torch.where(same, 0.0, p_0 * V * a / (b * xb_0))


def uniform_nll_pytorch(logits, grad, x0, xt, alpha, dalpha, weight, shift):
    """In PyTorch. grad (N, V) receives the gradient, may be the logits themselves, or None."""
    V, loss = logits.size(1), torch.empty_like(weight)
    for rows, p, q, t in pieces(logits, weight.dtype, 3):
        w, a, da = weight[rows], alpha[rows], dalpha[rows]
        b, none = 1 - a, w == 0
        y_z, y_0 = (torch.where(none, 0, y[rows])[:, None] for y in (xt, x0))
        same = (y_z == y_0)[:, 0]
        p.scatter_add_(1, y_z, -shift[rows][:, None])
        p.sub_(p.amax(-1, keepdim=True)).exp_()
        p.div_(p.sum(-1, keepdim=True))
        torch.mul(p, (V * a / b).to(p)[:, None], out=q)
        torch.log1p(q, out=t)
        p_z, p_0, S_z, S_0 = (x.gather(1, y)[:, 0].to(a) for x in (p, t) for y in (y_z, y_0))
        each = _bound(V, a, b, da, same, t.sum(-1).to(a), S_z, S_0, p_z)
        loss[rows] = torch.where(none, 0.0, w * each.to(w))
        if grad is not None:
            scale, A_z, A_0 = ((w * da * x).to(p)[:, None] for x in _slopes(V, a, b, same, p_z, p_0))
            torch.div(p, torch.add(q, 1, out=t), out=t)  # p / (1 + q)
            R, Q = t.sum(-1, keepdim=True), q.mul_(t).sum(-1, keepdim=True)  # q is p q / (1 + q) from here on
            if (Q < R).any():
                torch.where(Q < R, q.neg_(), t, out=t)
            g = t.mul_(scale).sub_(p.mul_(scale * torch.where(Q < R, -Q, R) + A_z + A_0))
            g.scatter_add_(1, y_z, A_z).scatter_add_(1, y_0, A_0)
            g[none] = 0.0
            grad[rows] = g
    return loss


def uniform_nll_triton(logits, grad, x0, xt, alpha, dalpha, weight, shift):
    loss, out = torch.empty_like(weight), logits if grad is None else grad
    strides = logits.stride(0), out.stride(0)
    V, wants = logits.size(1), {"GRAD": grad is not None, **blocks(logits.size(1), 4096)}
    tensors = logits, logits, out, x0, xt, alpha, dalpha, weight, shift, loss
    launch(_uniform_nll_kernel, len(logits), *tensors, *strides, V, **wants)
    return loss


@jit
def _uniform_nll_kernel(
    logits,
    grad,
    x0,
    xt,
    alpha,
    dalpha,
    weight,
    shift,
    loss,
    stride,
    grad_stride,
    V,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row, out = logits + i * stride, grad + i * grad_stride
    w, a, da, add = tl.load(weight + i), tl.load(alpha + i), tl.load(dalpha + i), -tl.load(shift + i)
    b = 1 - a
    odds = (V * a / b).to(tl.float32)
    y_z, y_0 = tl.where(w == 0, 0, tl.load(xt + i)), tl.where(w == 0, 0, tl.load(x0 + i))
    same = y_z == y_0
    z_z = tl.load(row + y_z).to(tl.float32) + add
    z_0 = tl.where(same, z_z, tl.load(row + y_0).to(tl.float32))
    main = V // BLOCK * BLOCK

    # the normaliser
    top, total = _normaliser(row, V, y_z, add, BLOCK)
    p_z, p_0 = tl.exp(z_z - top) / total, tl.exp(z_0 - top) / total
    S_z, S_0 = log1p(p_z * odds).to(tl.float64), log1p(p_0 * odds).to(tl.float64)
    p_z, p_0 = p_z.to(tl.float64), p_0.to(tl.float64)

    # S = sum log(1 + q), R = sum p / (1 + q), Q = sum p q / (1 + q)
    S = tl.zeros([BLOCK // 8], tl.float32)
    R = tl.zeros([BLOCK // 8], tl.float32)
    Q = tl.zeros([BLOCK // 8], tl.float32)
    for start in range(0, main, BLOCK):
        v, z = tile(row, start, V, y_z, add, BLOCK, False)
        S, R, Q = _uniform_sums(z, S, R, Q, odds, top, total)
    if main < V:
        v, z = tile(row, main, V, y_z, add, BLOCK, True)  # behind the end p = 0
        S, R, Q = _uniform_sums(z, S, R, Q, odds, top, total)
    S, R, Q = tl.sum(S, 0).to(tl.float64), tl.sum(R, 0), tl.sum(Q, 0)

    # _bound
    log_c = -log1p(V * a / b)
    c = tl.exp(log_c)
    r_log_r = tl.where(same, (V - 1) * c * log_c, -log_c / c)
    r_log_rh = tl.where(same, c * (S - V * S_z), S - V * S_z + V * a / b * (S_0 - S_z))
    linear = (tl.where(same, 1, 0) - p_z) * V / ((tl.where(same, V * a, 0) + b) * (b + V * a * p_z))
    each = -da / (V * tl.where(a == 0, 1, a)) * (r_log_r - r_log_rh) - da * linear
    tl.store(loss + i, tl.where((a == 0) | (w == 0), 0.0, w * each.to(tl.float32)))

    if GRAD:
        tl.debug_barrier()  # all have read the logits at x_t and x_0: now the row may be written over
        # _slopes
        xb_z, xb_0 = b + V * a * p_z, b + V * a * p_0
        C = tl.where(same, b / (V * a + b), 1)
        A_z = (
            p_z * V * a * tl.where(same, (V * (1 - b * p_z) + b) / (V * a + b), -V * p_z / b) / (xb_z * xb_z)
        )
        A_0 = tl.where(same, 0, p_0 * V * a / (b * xb_0))
        by = w * da
        scale, A_z, A_0 = (by * C / b).to(tl.float32), (by * A_z).to(tl.float32), (by * A_0).to(tl.float32)
        mean = scale * tl.where(Q < R, -Q, R) + A_z + A_0
        small = Q < R
        for start in range(0, main, BLOCK):
            v, z = tile(row, start, V, y_z, add, BLOCK, False)
            tl.store(
                out + v, _uniform_slope(v, z, y_z, y_0, w, odds, small, scale, mean, A_z, A_0, top, total)
            )
        if main < V:
            v, z = tile(row, main, V, y_z, add, BLOCK, True)
            tl.store(
                out + v,
                _uniform_slope(v, z, y_z, y_0, w, odds, small, scale, mean, A_z, A_0, top, total),
                mask=v < V,
            )


@jit
def _uniform_sums(z, S, R, Q, odds, top, total):
    p = tl.exp(z - top) / total
    q = p * odds
    t = p / (1 + q)
    return S + tl.sum(log1p(q), 1), R + tl.sum(t, 1), Q + tl.sum(t * q, 1)


@jit
def _uniform_slope(v, z, y_z, y_0, w, odds, small, scale, mean, A_z, A_0, top, total):
    p = tl.exp(z - top) / total
    q = p * odds
    g = (
        p * (scale * tl.where(small, -q, 1.0) / (1 + q) - mean)
        + tl.where(v == y_z, A_z, 0.0)
        + tl.where(v == y_0, A_0, 0.0)
    )
    return tl.where(w == 0, 0.0, g)


if __name__ == "__main__":
    print(__doc__)
