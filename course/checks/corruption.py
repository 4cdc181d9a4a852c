"""Exercise 2: corruption. Draws are counted and compared with q(x_t | x_0) by chi-squared."""

import torch
import torch.nn.functional as F

import diffusion
from course import project
from course.harness import CHANCE, Wrong, close, first, p_value, tensor, whole
from rng import Noise

TITLE, MINUTES = "corruption, and how often a token stays", 20
FUNCTION = "corrupt"
SHAPES = "alpha may be (B,): column(alpha, x0) makes it (B, 1)"
SOURCE = [diffusion.Masked.corrupt, diffusion.Uniform.corrupt, diffusion.column]
HINTS = [
    "One random number decides whether the token stays: it does with probability alpha.\n"
    "For uniform noise another random number says which token comes in its place.",
    "u = noise.uniform(2): stays = u[..., 0] <= column(alpha, x0).\n"
    "A uniform token is (u[..., 1] * V).long(), at most V - 1; a masked one is process.mask_id.\n"
    "torch.where(stays, x0, other).",
]
V = 4  # letters of the text
MASKED, UNIFORM = diffusion.Masked(V + 1, V), diffusion.Uniform(V)
ROWS, LENGTH = 60, 100


def asked(answer, process, x0, alpha, seed=0):
    """The student's x_t, int64 like x0."""
    noise = Noise(seed, torch.arange(x0.size(0)), torch.arange(x0.size(1)))
    y = whole(tensor(answer(process, x0, alpha, noise), x0.shape, "(B, L)", answer.name), answer.name)
    if ((y < 0) | (y >= process.vocab_size)).any():
        at = first((y < 0) | (y >= process.vocab_size))
        raise Wrong(f"{answer.name} returns id {y[at]}, ids are 0 to {process.vocab_size - 1}")
    return y


def text(rows=ROWS, length=LENGTH):
    return torch.arange(rows * length).view(rows, length).mul(7).remainder(11).remainder(V)


def law(process, alpha):
    """q(x_t | x_0): a row for each x_0, from the words of the exercise."""
    pi = torch.full((V,), 1 / V) if process is UNIFORM else F.one_hot(torch.tensor(V), V + 1)
    return alpha * torch.eye(V, process.vocab_size).double() + (1 - alpha) * pi.double()


def counted(x0, xt, process):
    """How often each x_t came from each x_0, (V, vocab_size)."""
    return torch.bincount((x0 * process.vocab_size + xt).flatten(), minlength=V * process.vocab_size).view(
        V, -1
    )


def fit(counts, q):
    """How likely counts (V, K) as odd as these are under the law q (V, K): of the oddest row."""
    return min(p_value(c, p) for c, p in zip(counts, q, strict=True))


def fits(counts, q):
    return fit(counts, q) > CHANCE


def expect(x0, xt, process, alpha, how=""):
    """Wrong unless x_t has its law."""
    counts = counted(x0, xt, process)
    if not fits(counts, law(process, alpha)):
        stays, must = counts.diag().sum() / counts.sum(), law(process, alpha)[0, 0]
        found = f"of {counts.sum()} tokens {stays:.3f} stayed at alpha = {alpha}{how}, it must be about {must:.3f}"
        if abs(stays - must) < 0.02:
            share = (counts.sum(0) / counts.sum()).tolist()
            found = f"{counts.sum()} tokens became 0, 1, 2, ... in shares of "
            found += f"{', '.join(f'{s:.3f}' for s in share)} at alpha = {alpha}: not as q says"
        raise Wrong(found)


def check(answer):
    x0 = text()
    names = ((MASKED, "masked"), (UNIFORM, "uniform"))
    yield "at alpha = 1 nothing changes"
    for process, name in names:
        if not torch.equal(asked(answer, process, x0, 1.0), x0):
            raise Wrong(f"{name} noise: tokens changed at alpha = 1")
    yield "masked noise at alpha = 0 is masks alone"
    if (asked(answer, MASKED, x0, 0.0) != V).any():
        raise Wrong("tokens that are no masks are left at alpha = 0")
    for process, name in names:
        yield f"{name} noise: x_t has the probabilities q(x_t | x_0)"
        for alpha in (0.7, 0.3, 0.0):
            expect(x0, asked(answer, process, x0, alpha), process, alpha)
    yield "each row has its alpha: alpha (B,) and (B, 1)"
    square = text(80, 80)  # B = L: a wrong direction is no error of shapes
    levels = torch.where(torch.arange(80) < 40, 0.2, 0.8).double()
    for process, _ in names:
        for alpha in (levels, levels[:, None]):
            xt = asked(answer, process, square, alpha)
            for half, level in ((slice(0, 40), 0.2), (slice(40, 80), 0.8)):
                expect(square[half], xt[half], process, level, " in those rows")
    yield "each token has its alpha: alpha (B, L)"
    for process, _ in names:
        xt = asked(answer, process, square, levels.expand(80, 80))
        for half, level in ((slice(0, 40), 0.2), (slice(40, 80), 0.8)):
            expect(square[:, half], xt[:, half], process, level, " at those positions")
    yield "tokens become noise independently of each other"
    for process, name in names:
        changed = (asked(answer, process, x0, 0.5) != x0).long()
        q = 0.5 * (1 - 1 / V) if process is UNIFORM else 0.5
        pair = torch.tensor([(1 - q) ** 2, (1 - q) * q, q * (1 - q), q * q])
        for a, b, where in (
            (changed[:, ::2], changed[:, 1::2], "neighbours"),
            (changed[::2], changed[1::2], "tokens of two rows"),
        ):
            counts = torch.bincount((2 * a + b).flatten(), minlength=4)
            if p_value(counts, pair) < CHANCE:
                both = counts[3] / counts.sum()
                raise Wrong(
                    f"{name} noise: both of two {where} changed in {both:.3f}, not {q * q:.3f} of the cases"
                )
    if not torch.equal(asked(answer, UNIFORM, x0, 0.5), asked(answer, UNIFORM, x0, 0.5)):
        answer.note("it does not use `noise`: right, but a resumed run would see other random numbers")
    elif torch.equal(asked(answer, UNIFORM, x0, 0.5), asked(answer, UNIFORM, x0, 0.5, seed=1)):
        raise Wrong("other `noise` gives the same tokens")


def one_number(stays, replaced):
    """The law where the number u that makes a token stay also says which token comes else."""
    u = (torch.arange(100_000) + 0.5) / 100_000

    def q(alpha):
        new = F.one_hot((u * V).long(), V)[replaced(u, alpha)].double().sum(0) / len(u)
        return torch.eye(V).double() * stays(u, alpha).double().mean() + new

    return q


EYE = torch.eye(V).double()
SLIPS = {
    UNIFORM: {
        "alpha and 1 - alpha are exchanged: alpha is the share that stays": lambda a: law(UNIFORM, 1 - a),
        "the new token is never x_0 itself: a uniform draw from all V may be": lambda a: (
            a * EYE + (1 - a) * (1 - EYE) / (V - 1)
        ),
        "the last token is never drawn: ids are 0 to V - 1": lambda a: (
            a * EYE + (1 - a) * (torch.arange(V) < V - 1) / (V - 1)
        ),
        "the first token is never drawn: ids are 0 to V - 1": lambda a: (
            a * EYE + (1 - a) * (torch.arange(V) > 0) / (V - 1)
        ),
        "one random number does two jobs, staying and choosing: take another for the token": one_number(
            lambda u, a: u <= a, lambda u, a: u > a
        ),
        "one random number does two jobs: take another one for the token": one_number(
            lambda u, a: u > 1 - a, lambda u, a: u <= 1 - a
        ),
        "every token is noise, whatever alpha is": lambda a: law(UNIFORM, 0.0),
        "nothing becomes noise": lambda a: law(UNIFORM, 1.0),
        "alpha is counted twice": lambda a: law(UNIFORM, a * a),
    },
    MASKED: {
        "alpha and 1 - alpha are exchanged: alpha is the share that stays": lambda a: law(MASKED, 1 - a),
        "with masked noise a token becomes the mask, not a random one": lambda a: (
            F.pad(law(UNIFORM, a), (0, 1))
        ),
        "the mask is one of the tokens that uniform noise draws": lambda a: (
            a * torch.eye(V, V + 1).double() + (1 - a) / (V + 1)
        ),
        "every token is noise, whatever alpha is": lambda a: law(MASKED, 0.0),
        "nothing becomes noise": lambda a: law(MASKED, 1.0),
        "alpha is counted twice": lambda a: law(MASKED, a * a),
    },
}  # fmt: skip


def why(answer):
    x0 = text()
    for process, slips in SLIPS.items():
        for seed in (1, 2):  # one call that draws a single new token is no law
            xt = asked(answer, process, x0, 0.6, seed)
            new = xt[xt != x0]
            if process is UNIFORM and len(new) and (new == new[0]).all():
                return "all tokens that change become the same one: draw one for each"
        counts = counted(x0, xt, process)
        if not fits(counts, law(process, 0.6)):
            likely, sentence = max((fit(counts, q(0.6)), sentence) for sentence, q in slips.items())
            return sentence if likely > CHANCE else ""
    square, levels = text(80, 80), torch.where(torch.arange(80) < 40, 0.2, 0.8).double()
    xt = asked(answer, MASKED, square, levels)
    if fits(counted(square[:, :40], xt[:, :40], MASKED), law(MASKED, 0.2)):
        return "alpha (B,) goes along the positions, and must go along the rows: column(alpha, x0)"
    noisy = (asked(answer, MASKED, x0, 0.5) == V).double()
    if close(noisy, noisy[:, :1].expand_as(noisy)):
        return "all tokens of a row share one random number: each needs its own"
    if close(noisy, noisy[:1].expand_as(noisy)):
        return "all rows share their random numbers: each token needs its own"
    return ""


def run(function, ckpt):
    """The text on its way into noise, then training on it."""
    line = torch.tensor([[" eiloprsty?".index(c) for c in "pretty please try to rest" if c in " eiloprsty?"]])
    noise = lambda: Noise(0, torch.arange(1), torch.arange(line.size(1)))
    for name, process in (("masked", diffusion.Masked(12, 11)), ("uniform", diffusion.Uniform(11))):
        print(f"\n{name} noise")
        for alpha in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
            xt = torch.as_tensor(function(process, line, alpha, noise())).long()
            print(f"   alpha {alpha}   " + "".join(" eiloprsty?░"[i] for i in xt[0].tolist()))
    mine = lambda self, x0, alpha, noise=None: torch.as_tensor(
        function(self, x0, alpha, noise or Noise.like(x0))
    ).to(x0)
    with project.replaced(diffusion.Masked, "corrupt", mine):
        project.train("config/sudoku.toml")
    print(
        "\nWhat to look at: the bound of block 16. Noise that does not match its alpha makes it worse, or no bound."
    )
