"""
The loss of diffusion.py made fast: the same numbers, with logits for the tokens that cost something only,
some at a time.

    token_loss      diffusion.token_loss, same arguments
    through_head    any loss of logits from hidden states, without ever holding all logits
"""

import functools
import sys

import torch

import diffusion
from diffusion import loglinear, noisy_stream, sigma_for
from fast.edits import guard
from fast.network import FastTransformer
from fast.processes import FastMasked, FastUniform
from kernels import cross_entropy, full, send, wide
from rng import Noise, float64


def token_loss(
    model,
    process,
    x0,
    block_size,
    t,
    objective,
    given=None,
    charged=None,
    schedule=loglinear,
    start=0,
    noise=None,
    corrupt=None,
    device=None,
):
    """
    diffusion.token_loss. A network or a process without a fast form takes that one.
    device: where the network is, if x0, given, charged and noise are on the CPU. Then they are corrupted
        there, the host knows which tokens cost something, and no step waits for a GPU to tell. None: where
        x0 is.
    """
    network = getattr(model, "module", model)  # DDP, torch.compile
    network = getattr(network, "_orig_mod", network)
    if not isinstance(network, FastTransformer) or type(process) not in (FastMasked, FastUniform):
        return diffusion.token_loss(
            model,
            process,
            x0,
            block_size,
            t,
            objective,
            given,
            charged,
            schedule,
            start,
            noise,
            corrupt,
            device,
        )
    guard("diffusion.py")
    device = device or x0.device
    there = lambda y: send(y, device, float64(device) if y.dtype == torch.float64 else None)
    if corrupt is not None:  # soft tokens are made where they are read
        x0, given, charged = (y if y is None else there(y) for y in (x0, given, charged))
        noise = noise and noise.to(device)
    x = x0[:, start:]
    given = torch.zeros_like(x, dtype=torch.bool) if given is None else given[:, start:]
    charged = ~given if charged is None else charged[:, start:]
    sizes = torch.full((x.size(0),), block_size) if isinstance(block_size, int) else block_size
    sizes = sizes.cpu()
    names = {s: objective if isinstance(objective, str) else objective[s] for s in set(sizes.tolist()) - {1}}
    assert set(names.values()) <= {"elbo", "ce", "ce_noisy", "last"}, (
        f"objective {objective!r}: elbo, ce, ce_noisy or last"
    )
    ar = send((sizes == 1)[:, None], x.device)
    xt, fed, alpha, dalpha = noisy_stream(process, x, ar, given, t, schedule, noise or Noise.like(x), corrupt)
    fed = tuple(there(y) for y in fed) if isinstance(fed, tuple) else there(fed)
    level = sigma_for(model, alpha[:, 0] if t.dim() == 1 else alpha)

    # which token costs what
    # (B, 1)
    taught = lambda name: send(
        torch.isin(sizes, torch.tensor([s for s in names if names[s] == name]))[:, None], x.device
    )
    pays = charged & process.pays(x, xt) & ~(taught("ce_noisy") & (xt == x))
    flat = [there(y.expand_as(x).flatten()) for y in (x, xt, alpha, dalpha)]
    place = pays.flatten().cumsum(0) - 1  # of a token among those that pay

    def part(price, tokens):
        """
        Some of the tokens, their places among those that pay, and their losses as through_head wants them.
        """
        index = tokens.flatten().nonzero()[:, 0]
        index, among = there(index), there(place[index])
        return (
            index,
            among,
            lambda logits, rows: price(logits[None], *(y[index[rows]][None] for y in flat))[0],
        )

    prices = {
        "elbo": lambda logits, x0, xt, alpha, dalpha: process.nll(
            logits, x0, xt, alpha, dalpha, overwrite=True
        ),
        "last": lambda logits, x0, xt, alpha, dalpha: process.last_step(
            logits, x0, xt, alpha, overwrite=True
        ),
        "ce": lambda logits, x0, xt, alpha, dalpha: process.ce(logits, x0, xt, alpha, overwrite=True),
    }
    parts = [part(prices["ce"], pays & ~taught("elbo") & ~taught("last"))]
    parts += [part(prices[name], pays & taught(name)) for name in ("elbo", "last") if name in names.values()]

    # a compiled network ends here; where nothing is compiled, nobody loads the compiler
    priced = uncompiled() if "torch._dynamo" in sys.modules else through_head

    def readout(hidden, weight, bias):
        # of all tokens, or of those that pay
        total, each, hidden = 0.0, hidden.new_zeros(x.numel()), hidden.flatten(0, -2)
        for index, among, loss in parts:
            # a compiled forward makes all, whatever it is asked
            at = index if len(hidden) == x.numel() else among
            more, each[index] = priced(hidden.index_select(0, at), weight, bias, loss)
            total = total + more
        return total, each.view_as(x)

    ask = pays if t.dim() == 1 and sum(len(index) for index, *_ in parts) < x.numel() else None
    return model(there(x0), fed, block_size, start, level, readout=readout, ask=ask)


# ----- logits never held


def through_head(hidden, weight, bias, loss, held=None):
    """
    (total, each): the sum of loss(logits, rows) over rows, a scalar that carries gradients, and its terms
    (N,), which carry none. The logits hidden @ weight.T + bias exist for some rows at a time: forward makes
    them, their loss and its gradient, and the gradients of hidden, weight and bias from it, added up in
    float32. So backward has nothing left to do but scale them.

    hidden (N, C), weight (V, C), bias (V,), of any float dtype; the logits are float32
    loss   (logits (n, V), rows: a slice of 0..N) -> (n,), in float32; it may write over the logits
    held   logits held at a time; None: 64 MB of them on a CPU, 512 MB on a GPU

    Bytes: what the loss needs, twice the logits for the matmuls, and weight's gradient read and written for
        every piece.
    """
    hidden, weight, bias = (x.to(wide(x)) for x in (hidden, weight, bias))
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
    held = held or (1 << 24 if hidden.device.type == "cpu" else 1 << 27)
    return _Head.apply(hidden, weight, bias, loss, max(1, held // len(weight)), wanted)


@functools.cache
def uncompiled():
    """through_head, which the compiler leaves alone."""
    return torch.compiler.disable(through_head)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, loss, n, wanted):
        N, V = len(hidden), len(weight)
        hidden, weight, bias, each = hidden.detach(), weight.detach(), bias.detach(), hidden.new_zeros(N)
        make = torch.empty_like if N else torch.zeros_like
        d_hidden, d_weight, d_bias = (
            (make(hidden), make(weight), torch.zeros_like(bias)) if wanted else [None] * 3
        )
        # rows begin at multiples of 64 bytes: wide loads
        held = hidden.new_empty(min(n, N), -(-V // 16) * 16)
        for i in range(0, N, n):
            rows = slice(i, min(i + n, N))
            h = hidden[rows]
            logits = torch.addmm(bias, h, weight.T, out=held[: len(h), :V])
            if not wanted:
                each[rows] = loss(logits, rows)
                continue
            with torch.enable_grad():
                part = loss(logits.requires_grad_(), rows)
                (g,) = torch.autograd.grad(part.sum(), logits)
            each[rows] = part.detach()
            torch.mm(g, weight, out=d_hidden[rows])
            d_weight.addmm_(g.T, h, beta=0 if i == 0 else 1)
            d_bias += g.sum(0)
        ctx.grads = d_hidden, d_weight, d_bias
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "these gradients were handed out before"
        return *(d.mul_(g) for d in grads), None, None, None


def linear_cross_entropy(hidden, weight, bias, target, row_weight=None, forbidden=None):
    """
    (total, each) of cross_entropy(hidden @ weight.T + bias, target, row_weight, forbidden), through_head: no
    (N, V) anywhere.
    hidden (N, C), weight (V, C), bias (V,); target (N,) int64, row_weight (N,) or None.
    """
    w = full(row_weight, len(hidden), hidden.device, torch.float32)
    return through_head(
        hidden,
        weight,
        bias,
        lambda z, rows: cross_entropy(z, target[rows], w[rows], forbidden, overwrite=True)[0],
    )
