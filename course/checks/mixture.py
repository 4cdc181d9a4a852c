"""Exercise 5: stratified draws, by their counts in one step and over many steps."""

import math

import torch

import rng
from course import project
from course.harness import CHANCE, Wrong, p_value, tensor, whole

TITLE, MINUTES = "block sizes and times of a batch, stratified", 40
FUNCTION = "stratified_draw"
SOURCE = [rng.stratified_draw]
HINTS = [
    "Lay the weights side by side on (0, 1), and a comb of n teeth over it: (k + u) / n with one random u for\n"
    "all teeth. A tooth's row gets the size it falls on. For the times of k rows: (0 .. k - 1 + u) / k, with a\n"
    "u for each.",
    "edges = torch.tensor(weights).cumsum(0); which = torch.searchsorted(edges, comb), at most the last size.\n"
    "For each size: rows = (which == s).nonzero(); t[rows] = (torch.arange(k) + u[rows, 1]) / k.\n"
    "At the end the same shuffle of both: order = u[:, 2].argsort().",
]
MIXES = [({1: 0.25, 16: 0.75}, 16), ({4: 0.15, 1: 0.5, 8: 0.35}, 8), ({2: 0.3, 8: 0.7}, 4), ({16: 1.0}, 5)]
STEPS = 160  # of each mix


def asked(answer, sizes, n, seed, step):
    """The student's (sizes, times), int64 and float64 (n,)."""
    y = answer(dict(sizes), n, seed, step)
    if y is None:
        raise Wrong(f"{answer.name} returns nothing", "is there a `return`?")
    if not (isinstance(y, (tuple, list)) and len(y) == 2):
        raise Wrong(f"{answer.name} returns a {type(y).__name__}, (sizes, times) was expected")
    b = whole(tensor(y[0], (n,), "sizes (n,)", answer.name), answer.name)
    t = tensor(y[1], (n,), "times (n,)", answer.name).double()
    if not set(b.tolist()) <= set(sizes):
        unknown = sorted(set(b.tolist()) - set(sizes))[0]
        raise Wrong(f"{answer.name} returns block size {unknown}, the mix has {sorted(sizes)}")
    if ((t < 0) | (t > 1)).any():
        off = t[(t < 0) | (t > 1)][0]
        late = "the first slice is 0: (k + u) / n with k from 0 to n - 1, and u in (0, 1)"
        raise Wrong(f"a time is {off:.4f}, they lie in (0, 1)", late)
    return b, t


def draws(answer, sizes, n):
    """Many steps: sizes and times, (STEPS, n) each."""
    both = [asked(answer, sizes, n, 0, step) for step in range(STEPS)]
    return torch.stack([b for b, _ in both]), torch.stack([t for _, t in both])


def own(sizes, times, size):
    """The times of the rows with one size, lists, in order."""
    return sorted(t for b, t in zip(sizes, times, strict=True) if b == size)


def sliced(ordered):
    """Does each of k equal slices of (0, 1) hold one of k ordered times? Up to rounding to float32."""
    k = len(ordered)
    return all(j / k - 1e-6 <= t <= (j + 1) / k + 1e-6 for j, t in enumerate(ordered))


def uniform(u, bins=10):
    """How likely numbers (K,) so odd are if they are uniform on (0, 1)."""
    counts = torch.bincount((u * bins).long().clamp(0, bins - 1).flatten(), minlength=bins)
    return p_value(counts, torch.ones(bins))


def check(answer):
    yield "a block size of the mix and a time in (0, 1) for each row"
    for sizes, n in MIXES:
        asked(answer, sizes, n, 0, 0)
    yield "the same seed and step give the same draw, others do not"
    sizes, n = MIXES[0]
    first, again = asked(answer, sizes, n, 3, 5), asked(answer, sizes, n, 3, 5)
    if not all(map(torch.equal, first, again)):
        why = "random numbers of torch's own differ from call to call: take those of Noise(seed, ..., step)"
        raise Wrong("two calls with seed 3 and step 5 give two draws", why)
    for seed, step in ((3, 6), (4, 5)):
        if torch.equal(first[1], asked(answer, sizes, n, seed, step)[1]):
            name = "step" if step != 5 else "seed"
            raise Wrong(
                f"another {name} gives the same times", f"the random numbers must depend on the {name}"
            )
    drawn = [(sizes, n, *draws(answer, sizes, n)) for sizes, n in MIXES]
    yield "a size of weight w has n w rows, rounded up or down"
    for sizes, n, b, _ in drawn:
        for size, w in sizes.items():
            count, want = (b == size).sum(1).double(), n * w
            off = (count - want).abs()
            if (off > 1 - 1e-9).any() and off.max() > 1e-9:
                many = int(count[off.argmax()])
                raise Wrong(
                    f"{many} of {n} rows have size {size}, of weight {w}: {want:g} rows, rounded", uneven(off)
                )
    yield "on average over the steps it has exactly n w rows"
    for sizes, n, b, _ in drawn:
        for size, w in sizes.items():
            count, part = (b == size).sum(1), n * w - math.floor(n * w + 1e-9)
            up = (count > math.floor(n * w + 1e-9)).sum()
            if 1e-6 < part < 1 - 1e-6:
                counts = torch.stack((up, STEPS - up))
                if p_value(counts, torch.tensor([part, 1 - part])) < CHANCE:
                    mean = count.double().mean().item()
                    raise Wrong(
                        f"size {size} of weight {w} has {mean:.3f} of {n} rows on average, it must be {n * w:g}",
                        "it is rounded alike at every step" if (count == count[0]).all() else "",
                    )
    yield "the times of a size lie one in each of as many equal slices"
    for sizes, n, b, t in drawn:
        for size in sizes:
            for row, times in zip(b.tolist(), t.tolist(), strict=True):
                ordered = own(row, times, size)
                if not sliced(ordered):
                    shown = ", ".join(f"{x:.3f}" for x in ordered)
                    raise Wrong(f"the {len(ordered)} times of size {size} are {shown}", untidy(t, sizes))
    yield "a time is anywhere in its slice, with equal probability"
    for sizes, n, b, t in drawn:
        for which, name in (
            (0, "first"),
            (-1, "last"),
        ):  # one of a step: the others may share its random number
            inside = []
            for size in sizes:
                for row, times in zip(b.tolist(), t.tolist(), strict=True):
                    ordered = own(row, times, size)
                    if ordered:
                        inside.append(ordered[which] * len(ordered) - (len(ordered) - 1) * (which == -1))
            inside = torch.tensor(inside).clamp(0, 1)
            if uniform(inside) < CHANCE:
                found = (
                    f"places in the {name} slice have mean {inside.mean():.3f} and spread {inside.std():.3f}"
                )
                raise Wrong(found, "the same place at every step: draw it" if inside.std() < 0.05 else "")
    yield "a row's place in the batch says nothing of its size and time"
    for sizes, n, b, t in drawn:
        for row in {0, n // 2, n - 1}:
            weights = torch.tensor(list(sizes.values()))
            counts = torch.stack([(b[:, row] == size).sum() for size in sizes])
            if len(sizes) > 1 and p_value(counts, weights) < CHANCE:
                shares = ", ".join(f"{c / STEPS:.2f}" for c in counts.tolist())
                why = f"sizes {', '.join(map(str, sizes))} should have {', '.join(map(str, sizes.values()))}: shuffle"
                raise Wrong(f"row {row} has sizes in shares {shares}", why)
            if uniform(t[:, row]) < CHANCE:
                why = "shuffle the rows; times and sizes in the same order"
                raise Wrong(f"row {row} has times of mean {t[:, row].mean():.3f} over the steps", why)
    yield "time and block size say nothing of each other"
    for sizes, n, b, t in drawn:
        for size in sizes:
            some = (b == size).any(1)
            times = t[some, (b == size).int().argmax(1)[some]]  # of the first row with this size
            if uniform(times) < CHANCE:
                raise Wrong(f"size {size} has times of mean {times.mean():.3f}, not 0.5")


def uneven(off):
    """Why counts are off by a row or more."""
    if off.max() <= 1 + 1e-9:
        return (
            "each tooth of the comb has a random offset of its own: one for all of them, or one size is short"
        )
    return "sizes are drawn one by one, and their numbers vary: lay a comb of n teeth over the weights"


def untidy(t, sizes):
    """Why times are not one in each slice."""
    if all(sliced(sorted(times)) for times in t.tolist()):
        if len(sizes) > 1:
            return "they are stratified over all rows together: each size needs slices of its own"
        return ""
    return (
        "they are drawn independently, or not shuffled as the sizes are: (0 .. k - 1 + u) / k for each size"
    )


def independent(sizes, n, seed, step):
    """What stratifying is compared with."""
    g = torch.Generator().manual_seed(seed + step)
    which = torch.multinomial(torch.tensor(list(sizes.values())), n, True, generator=g)
    return torch.tensor(list(sizes))[which], torch.rand(n, generator=g).double()


def run(function, ckpt):
    import train as training

    sizes, n = {1: 0.25, 16: 0.75}, 64
    print(f"\n{n} rows a step, block sizes 1:0.25,16:0.75, spread over 300 steps")
    for name, f in (("independent", independent), ("yours", function)):
        drawn = [tuple(map(torch.as_tensor, f(sizes, n, 0, step))) for step in range(300)]
        rows = torch.stack([(b == 16).double().sum() for b, _ in drawn])
        mean = torch.stack([t[b == 16].double().mean() for b, t in drawn])
        print(f"   {name:<12} rows of size 16: {rows.mean():.1f} +- {rows.std():.2f}     "
              f"their mean time: {mean.mean():.3f} +- {mean.std():.4f}")  # fmt: skip

    def mine(sizes, n, seed, step):
        b, t = map(torch.as_tensor, function(sizes, n, seed, step))
        return b.long(), t.double().clamp(1e-9, 1 - 1e-9)

    with project.replaced(training, "stratified_draw", mine):
        project.train("config/sudoku.toml")
    print("\nWhat to look at: the two spreads above. The loss of a step varies less for the same reason.")
