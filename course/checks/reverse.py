"""Exercise 4: the reverse step of uniform noise, against Bayes' rule by enumeration."""

import torch
import torch.nn.functional as F

import diffusion
from course import project
from course.harness import Wrong, close, compare, first, likeness, tensor
from diffusion import Uniform, column
from rng import sharpen

TITLE, MINUTES = "one step back with uniform noise", 30
FUNCTION = "posterior_probs"
SHAPES = "a_t and a_s fit (B, L, V) as they are in the file; alpha_t and alpha_s may be (B,)"
SOURCE = [diffusion.Uniform.posterior_probs, diffusion.NoiseProcess.posterior_probs]
HINTS = [
    "Write the two factors as tensors (B, L, V): one from l, one from z. Multiply them, and divide by the sum\n"
    "over v. Nothing else of the network's is needed.",
    "a = a_t / a_s;  q = (a_s * l + (1 - a_s) / V) * (a * z + (1 - a) / V);  q / q.sum(-1, keepdim=True).\n"
    "The lesson writes the same in one fraction.",
]
V = 4
LOO, D = Uniform(V, "loo"), Uniform(V, "denoiser")
LETTER = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()  # the law of a text of one letter
LEVELS = ((0.3, 0.8), (0.05, 0.9), (0.5, 0.51))  # alpha_t, alpha_s


def asked(answer, process, logits, xt, alpha_t, alpha_s, **how):
    shape = (*xt.shape, V)
    y = tensor(answer(process, logits, xt, alpha_t, alpha_s, **how), shape, "(B, L, V)", answer.name)
    if y.dtype.is_complex:
        raise Wrong(f"{answer.name} returns {y.dtype}, probabilities were expected")
    return y.double()


def one_letter(answer, a_t, a_s):
    """The student's q(x_s | x_t), a row for each x_t, for text of one letter: l is its law LETTER."""
    xt = torch.arange(V)[:, None]
    return asked(answer, LOO, LETTER.log().expand(V, 1, V), xt, a_t, a_s)[:, 0]


def law(alpha):
    """q(x_t), of text of one letter."""
    return alpha * LETTER + (1 - alpha) / V


def bayes(a_t, a_s):
    """q(x_s | x_t) of text of one letter, from the joint law of both; a row for each x_t."""
    a = a_t / a_s
    step = a * torch.eye(V).double() + (1 - a) / V  # q(x_t | x_s), a row for each x_s
    joint = law(a_s)[:, None] * step
    return (joint / joint.sum(0)).T


def batch():
    """logits (B, L, V) and x_t (B, L) with B = 3, L = 2."""
    logits = 1.5 * torch.randn(3, 2, V, generator=torch.Generator().manual_seed(2)).double()
    return logits, torch.tensor([[0, 1], [2, 3], [1, 1]])


def check(answer):
    logits, xt = batch()
    yield "for each token V numbers that are not negative"
    y = asked(answer, LOO, logits, xt, 0.3, 0.6)
    if (y < -1e-9).any():
        raise Wrong(f"probability {y.min():.4g} at (row, position, token) {first(y < -1e-9)}")
    yield "they sum to 1"
    for a_t, a_s in LEVELS:
        total = asked(answer, LOO, logits, xt, a_t, a_s).sum(-1)
        compare(total, torch.ones_like(total), lambda at: f"the sum, alpha_t = {a_t}, alpha_s = {a_s}")
    yield "stepping back undoes the noise: x_t ~ q(x_t), then your step, gives x_s ~ q(x_s)"
    for a_t, a_s in LEVELS:
        back = law(a_t) @ one_letter(answer, a_t, a_s)
        compare(back, law(a_s), lambda at: f"q(x_s = {at[0]}), alpha_t = {a_t}, alpha_s = {a_s}")
    yield "Bayes: q(x_s | x_t) is q(x_s) q(x_t | x_s) / q(x_t)"
    for a_t, a_s in LEVELS:
        name = lambda at: f"q(x_s = {at[1]} | x_t = {at[0]}), alpha_t = {a_t}, alpha_s = {a_s}"
        compare(one_letter(answer, a_t, a_s), bayes(a_t, a_s), name)
    yield "from pure noise (alpha_t = 0) x_t says nothing, and at alpha_s = 1 the result is clean"
    for a_t, a_s in ((0.0, 0.5), (0.0, 1.0), (0.4, 1.0)):
        name = lambda at: f"q(x_s = {at[1]} | x_t = {at[0]}), alpha_t = {a_t}, alpha_s = {a_s}"
        compare(one_letter(answer, a_t, a_s), bayes(a_t, a_s), name)
    yield "a network that predicts D takes the same step: its logits become those of l first"
    as_d = LOO.denoiser_logits(logits, xt, 0.3)
    name = lambda at: f"process.predicts = 'denoiser', row {at[0]}, position {at[1]}, x_s = {at[2]}"
    compare(asked(answer, D, as_d, xt, 0.3, 0.6), asked(answer, LOO, logits, xt, 0.3, 0.6), name)
    yield "each row and each token has its alpha; temperature and top_p sharpen l"
    t, s = torch.tensor([0.1, 0.3, 0.5]).double(), torch.tensor([0.2, 0.9, 0.7]).double()
    name = lambda at: f"row {at[0]}, position {at[1]}, x_s = {at[2]}"
    for a_t, a_s in ((t, s), (t[:, None], s[:, None]), (torch.stack((t, t / 2), 1), torch.stack((s, s), 1))):
        compare(asked(answer, LOO, logits, xt, a_t, a_s), LOO.posterior_probs(logits, xt, a_t, a_s), name)
    for how in ({"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8}):
        want = LOO.posterior_probs(logits, xt, 0.3, 0.6, **how)
        compare(asked(answer, LOO, logits, xt, 0.3, 0.6, **how), want, name)


# ----- what a wrong answer may be


def slip(prediction="l", prior=None, step=None, normed=True):
    """
    The step with another prediction in l's place, another prior (p, a_t, a_s), another second factor
    (z, a, a_t, a_s), or without the division.
    """
    prior = prior or (lambda p, a_t, a_s: a_s * p + (1 - a_s) / V)
    step = step or (lambda z, a, a_t, a_s: a * z + (1 - a) / V)

    def posterior_probs(process, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
        a_t, a_s = column(alpha_t, xt)[..., None], column(alpha_s, xt)[..., None]
        predicted = process.loo_logits if prediction == "l" else process.denoiser_logits
        logits = predicted(logits, xt, a_t[..., 0])
        p = sharpen(logits, temperature, top_p).softmax(-1)
        z = F.one_hot(xt, V).double()
        q = prior(p, a_t, a_s) * step(z, a_t / a_s, a_t, a_s)
        return q / q.sum(-1, keepdim=True) if normed else q

    return posterior_probs


def mixture_of_l(process, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
    """sum_v l(v) q(x_s | x_t, x_0 = v): right with D, wrong with l."""
    one = 1e3 * torch.eye(V).double()
    given = [LOO.posterior_probs(one[v].expand(logits.shape), xt, alpha_t, alpha_s) for v in range(V)]
    return sum(p[..., None] * q for p, q in zip(logits.softmax(-1).unbind(-1), given, strict=True))


def like_masks(process, logits, xt, alpha_t, alpha_s, temperature=1.0, top_p=1.0):
    move = (column(alpha_s, xt) - column(alpha_t, xt))[..., None] / (1 - column(alpha_t, xt)[..., None])
    return move * logits.softmax(-1) + (1 - move) * F.one_hot(xt, V)


SLIPS = {
    "D stands in l's place: D has seen z, and the second factor counts z again. l has not": slip("D"),
    "l(v) is weighted with q(x_s | x_t, x_0 = v): that is for D, which has seen z": mixture_of_l,
    "alpha_t and alpha_s are exchanged: s is the earlier time, with the larger alpha": slip(
        prior=lambda p, a_t, a_s: a_t * p + (1 - a_t) / V, step=lambda z, a, a_t, a_s: z / a + (1 - 1 / a) / V
    ),
    "the first factor is at time t, and must be at time s: alpha_s": slip(
        prior=lambda p, a_t, a_s: a_t * p + (1 - a_t) / V
    ),
    "the second factor is alpha_t, from clean to t, and must be a = alpha_t / alpha_s, from s to t": slip(
        step=lambda z, a, a_t, a_s: a_t * z + (1 - a_t) / V
    ),
    "the second factor is alpha_s, from clean to s, and must be a = alpha_t / alpha_s, from s to t": slip(
        step=lambda z, a, a_t, a_s: a_s * z + (1 - a_s) / V
    ),
    "a is turned around: a = alpha_t / alpha_s, below 1": slip(
        step=lambda z, a, a_t, a_s: z / a + (1 - 1 / a) / V
    ),
    "a and 1 - a are exchanged: a is the probability of no noise between s and t": slip(
        step=lambda z, a, a_t, a_s: (1 - a) * z + a / V
    ),
    "alpha_s and 1 - alpha_s are exchanged": slip(prior=lambda p, a_t, a_s: (1 - a_s) * p + a_s / V),
    "x_s is not clean yet: the first factor is alpha_s l + (1 - alpha_s) / V, not l": slip(
        prior=lambda p, a_t, a_s: p
    ),
    "1 / V is missing in the first factor": slip(prior=lambda p, a_t, a_s: a_s * p + 1 - a_s),
    "1 / V is missing in the second factor": slip(step=lambda z, a, a_t, a_s: a * z + 1 - a),
    "1 / V is missing in both factors": slip(
        prior=lambda p, a_t, a_s: a_s * p + 1 - a_s, step=lambda z, a, a_t, a_s: a * z + 1 - a
    ),
    "the second factor is missing: z says something of x_s": slip(step=lambda z, a, a_t, a_s: torch.ones_like(z)),
    "the noise in the second factor is missing: x_s need not be z": slip(step=lambda z, a, a_t, a_s: a * z),
    "nothing is divided by the sum: Bayes' rule has q(x_t) under it": slip(normed=False),
    "this is masked noise's step: a uniform token may be noise and still look like a word": like_masks,
    "D itself: x_s is not clean yet": lambda process, logits, xt, a_t, a_s, *how: (
        process.denoiser_logits(logits, xt, a_t).softmax(-1)
    ),
}  # fmt: skip


def why(answer):
    logits, xt = batch()
    mine, want = (asked(f, LOO, logits, xt, 0.3, 0.8) for f in (answer, ours))
    if not close(mine, want):
        if close(mine.exp().sum(-1), torch.ones(3, 2)):
            return "these are logarithms: probabilities were expected"
        return likeness(mine, SLIPS, lambda f: f(LOO, logits, xt, 0.3, 0.8))
    if not close(asked(answer, D, logits, xt, 0.3, 0.8), asked(ours, D, logits, xt, 0.3, 0.8)):
        return "the network's output is taken for l, whatever process.predicts says: process.loo_logits"
    if close(asked(answer, LOO, logits, xt, 0.3, 0.8, temperature=0.5), want):
        return "temperature and top_p are forgotten: sharpen(l, temperature, top_p)"
    return ""


def ours(process, *args, **how):
    return process.posterior_probs(*args, **how)


ours.name = FUNCTION


def run(function, ckpt):
    settings, model, process = project.network(ckpt, "out/sudoku_uniform", "uniform")
    prompts, right, texts = project.puzzles(64)
    from generate import generate

    mine = lambda self, *args, **how: torch.as_tensor(function(self, *args, **how)).double()
    with project.replaced(Uniform, "posterior_probs", mine):
        for steps in (2, 8):
            for state in generate(model, process, prompts, block_size=16, steps=steps):
                pass
            print(
                f"\n{steps} steps of yours: {right(state.x)} of {len(prompts)} puzzles solved. Three of the grids:"
            )
            project.show(texts(state.x))
    print(
        "\nWhat to look at: more steps solve more. Tokens of one step do not know of each other; the next step"
    )
    print("of uniform noise may still change them.")
