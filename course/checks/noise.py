"""Exercise 8: a noise process of one's own. What must hold of any: a law, its slope, and a tight bound."""

import sys

import numpy as np
import torch

import diffusion
import methods
from course import project
from course.harness import Wrong, close, compare, first, tensor
from diffusion import Masked, NoiseProcess, Uniform
from methods import gidd

TITLE, MINUTES = "a noise of your own", 60
FUNCTION = "MyNoise"
SOURCE = [diffusion.NoiseProcess.mixing, diffusion.Uniform.mixing, gidd.GIDD.mixing]
HINTS = [
    "Choose probabilities pi (V,) that sum to 1: which tokens are noise, and how often. With a = alpha, what is\n"
    "left for noise is 1 - alpha: m = (1 - alpha) pi. Its slope in alpha is -pi.",
    "pi = 1 / torch.arange(1, self.vocab_size + 1, dtype=alpha.dtype, device=alpha.device); pi = pi / pi.sum()\n"
    "return alpha, (1 - alpha)[..., None] * pi, torch.ones_like(alpha), -pi\n"
    "That is the recipe of CONTRIBUTING.md. Take another pi, or one that changes with alpha.",
]
V = 4
GRID = torch.linspace(0, 1, 21).double()
TEXT = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()  # of one letter; a mask, if there is one, is never text


class Process:
    """The student's process, asked with care."""

    def __init__(self, answer):
        module, kind = sys.modules[answer.function.__module__], answer.function
        make = getattr(module, "process", None)
        self.answer = answer
        self.noise = answer.asked(make, None, None, V) if make else answer.asked(kind, V)
        if not isinstance(self.noise, NoiseProcess):
            raise Wrong(
                "process(...) returns no NoiseProcess", "class MyNoise(NoiseProcess), and return MyNoise(...)"
            )
        self.size = getattr(self.noise, "vocab_size", V)
        if self.size not in (V, V + 1):
            raise Wrong(
                f"{V} letters, and the process has vocab_size {self.size}", "with a mask it is one more"
            )
        ids = [i for i in range(self.size) if i != self.noise.mask_id]
        self.text = torch.zeros(self.size).double()
        self.text[ids[:V]] = TEXT

    def mixing(self, alpha):
        y = self.answer.asked(self.noise.mixing, alpha)
        if y is None:
            raise Wrong("mixing returns nothing", "is there a `return`?")
        if not (isinstance(y, (tuple, list)) and len(y) == 4):
            raise Wrong("mixing returns not four things: a, m, da, dm")
        wide = (*alpha.shape, self.size)
        a = tensor(y[0], alpha.shape, "a (...), the shape of alpha,", "mixing").double()
        m = tensor(y[1], wide, "m (..., V)", "mixing").double()
        da = tensor(y[2], alpha.shape, "da (...), the shape of alpha,", "mixing").double()
        try:
            dm = torch.as_tensor(y[3]).double().expand(wide)
        except (TypeError, RuntimeError):
            raise Wrong(
                f"dm does not fit m {wide}: (..., V), or (V,) if it is the same for all alpha"
            ) from None
        return a, m, da, dm


def levels(process):
    """a (21,) and m (21, V) from pure noise to clean."""
    return process.mixing(GRID)[:2]


def check(answer):
    process = Process(answer)
    yield "a, m, da and dm have the right shapes, for alpha of any shape"
    for alpha in (torch.tensor(0.5).double(), GRID, GRID[1:-1].view(19, 1), GRID[1:7].view(2, 3)):
        process.mixing(alpha)
    a, m = levels(process)
    yield "nothing is negative, and a + m_1 + ... + m_V = 1"
    if (m < -1e-9).any():
        at = first(m < -1e-9)
        raise Wrong(f"m of token {at[1]} is {m[at]:.4g} at alpha = {GRID[at[0]]:.2f}")
    compare(a + m.sum(-1), torch.ones(21), lambda at: f"a + the sum of m, at alpha = {GRID[at[0]]:.2f}")
    yield "a is 1 at alpha = 1 (clean) and 0 at alpha = 0 (pure noise)"
    for at in (-1, 0):
        if (a[at] - GRID[at]).abs() > 1e-6:
            raise Wrong(f"a is {a[at]:.4g} at alpha = {GRID[at]:.0f}")
    yield "a grows with alpha"
    if (a.diff() < -1e-9).any():
        raise Wrong(f"a falls after alpha = {GRID[first(a.diff() < -1e-9)]:.2f}")
    yield "da and dm are the slopes of a and m in alpha"
    h = 1e-3  # not smaller: mixing may compute in float32
    inside = torch.tensor([0.137, 0.311, 0.523, 0.764, 0.912]).double()
    up, down, found = process.mixing(inside + h), process.mixing(inside - h), process.mixing(inside)
    for k, name in ((0, "da"), (1, "dm")):
        slope = (up[k] - down[k]) / (2 * h)
        token = lambda at: f" of token {at[1]}" if len(at) > 1 else ""
        compare(found[2 + k], slope, lambda at: f"{name}{token(at)} at alpha = {inside[at[0]]}", near=1e-3)
    yield "noise only comes in: from any time s to a later t every probability is at least 0"
    for s in range(1, 21):
        for t in range(s):
            new = m[t] - a[t] / a[s] * m[s] if a[s] > 0 else m[t]
            if (new < -1e-6).any():
                v = first(new < -1e-6)[0]
                raise Wrong(
                    f"from alpha = {GRID[s]:.2f} to {GRID[t]:.2f} token {v} would come in with {new[v]:.4g}"
                )
    yield "the posterior sums to 1, and stepping back undoes the noise"
    noise, logits = process.noise, process.text.log().clamp(min=-1e4)
    xt = torch.arange(process.size)[:, None]
    for t, s in ((4, 10), (0, 12), (9, 19)):
        alphas = GRID[t].item(), GRID[s].item()
        q = answer.asked(noise.posterior_probs, logits.expand(process.size, 1, -1), xt, *alphas)[:, 0]
        law = [a[i] * process.text + m[i] for i in (t, s)]
        name = f"alpha_t = {alphas[0]:.2f}, alpha_s = {alphas[1]:.2f}"
        compare(q.sum(-1), torch.ones(process.size), lambda at: f"the sum at x_t = {at[0]}, {name}")
        compare(law[0] @ q, law[1], lambda at: f"q(x_s = {at[0]}) after the step back, {name}")
    yield "the bound is -log p(x_0) itself where the prediction is perfect, and above it elsewhere"
    for x0 in range(process.size):
        if process.text[x0] > 0:
            value, exact = bound(process, process.text, x0), -process.text[x0].log().item()
            if abs(value - exact) > 0.02 * exact:
                raise Wrong(f"of x_0 = {x0} the bound is {value:.4f} nats, -log p(x_0) is {exact:.4f}")
    known = {"uniform": Uniform(V), "masked": Masked(V + 1, V)}
    for name, other in known.items():
        if other.vocab_size == process.size and close(m, other.mixing(GRID)[1], 1e-6):
            answer.note(f"this is {name} noise: right, and somebody had the idea before you")


def bound(process, p, x0):
    """The bound of a text of one letter for a network that predicts p whatever it reads, by quadrature."""
    noise, xt = process.noise, torch.arange(process.size)[:, None]
    logits, x0s = p.log().clamp(min=-1e4).expand(process.size, 1, -1), torch.full((process.size, 1), x0)
    node, weight = np.polynomial.legendre.leggauss(40)
    end, total = max(noise.t_min, 1e-6), 0.0
    root = end**0.5
    for u, w in zip((node + 1) / 2, weight / 2, strict=True):
        at = root + (1 - root) * u
        alpha = torch.tensor([1 - at * at]).double().expand(process.size)
        q = law(process, x0, alpha[0])
        each = noise.nll(logits, x0s, xt, alpha, -torch.ones_like(alpha))[:, 0].double()
        total += w * 2 * (1 - root) * at * (torch.where(q > 0, each, 0.0) * q).sum().item()
    alpha = torch.full((process.size,), 1 - end).double()
    q, last = law(process, x0, alpha[0]), noise.last_step(logits, x0s, xt, alpha)[:, 0].double()
    return total + (torch.where(q > 0, last, 0.0) * q).sum().item()


def law(process, x0, alpha):
    """q(x_t | x_0), (V,)."""
    a, m, *_ = process.mixing(alpha)
    return a * torch.nn.functional.one_hot(torch.tensor(x0), process.size) + m


def why(answer):
    process = Process(answer)
    a, m, da, dm = process.mixing(GRID[1:-1])
    alpha, total = GRID[1:-1], a + m.sum(-1)
    if close(a, 1 - alpha):
        return "alpha and 1 - alpha are exchanged: a = alpha is the share that is still clean"
    if close(m.sum(-1), torch.ones_like(a)):
        return "m sums to 1, and must sum to 1 - a: (1 - alpha)[..., None] * pi"
    if close(m.sum(-1), a):
        return "m is alpha pi, and must be (1 - alpha) pi"
    if not close(total, torch.ones_like(total)):
        share = (m.sum(-1) / (1 - a)).mean().item()
        return f"pi sums to {share:.3g}: pi = pi / pi.sum()" if abs(share - 1) > 1e-3 else ""
    h = 1e-3  # not smaller: mixing may compute in float32
    slope = [
        (up - down) / (2 * h)
        for up, down in zip(process.mixing(alpha + h), process.mixing(alpha - h), strict=True)
    ]
    for name, mine, want in (("da", da, slope[0]), ("dm", dm, slope[1])):
        if close(mine, want, 1e-3):
            continue
        if close(mine, -want, 1e-3):
            return f"{name} is the slope in t: in alpha it has the other sign"
        if mine.abs().max() == 0:
            return f"{name} is zero: it is the slope of {name[1:]} in alpha"
        return f"{name} is not the slope of {name[1:]}: differentiate it by alpha"
    if m[:-1].diff(dim=0).max() > 0:
        return "tokens of noise change their shares: what has come in must not go out again as time goes on"
    return ""


def run(function, ckpt):
    """The file as a method, for train.py and sample.py in this process."""
    import eval as evaluation
    import sample

    name, module, listed = "course", sys.modules[function.__module__], methods.names()
    sys.modules[f"methods.{name}"] = module
    try:
        with (
            project.replaced(methods, "names", lambda: [*listed, name]),
            project.replaced(function, "__module__", f"methods.{name}"),  # where the checkpoint looks for it
        ):
            project.train("config/sudoku.toml", "--method", name)
            project.call(evaluation.main, "--ckpt=out/course", "--n_eval=64")
            puzzles = "--prompt_file=data/sudoku/puzzles.txt"
            project.call(sample.main, "--ckpt=out/course", "--steps=8", puzzles)
    finally:
        del sys.modules[f"methods.{name}"]
    print(
        "\nWhat to look at: <= stands before the bound of your noise. Longer training: copy the file to methods/."
    )
