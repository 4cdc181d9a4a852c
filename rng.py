"""
Where do random numbers come from?

    Noise      uniform numbers that depend on (seed, step, row, position) and on nothing else
    draw       a token from a row of probabilities, exact in the tail too
    sharpen    temperature and nucleus
    stratified_draw   a block size and a time for each row of a training step

There is no global random state. So a text does not depend on its batch mates, and a resumed run sees what it
would have seen.
"""

import copy
import math

import torch

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the increment of splitmix64, as a signed int


def mix(z):
    """
    The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit ints. Counters look random
    under it.
    z: an int64 tensor or a Python int, for the same result.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        # >> keeps the sign, which is cut off; * wraps
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
        if isinstance(z, int):
            z = (z + (1 << 63)) % (1 << 64) - (1 << 63)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def float64(device):
    """float64, or float32 on Apple's GPUs, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def uniforms(key, count):
    """Numbers in (0, 1] with 63 random bits from int64 keys and counts, which broadcast. float64."""
    bits = mix(key + count * GOLDEN) & (1 << 63) - 1
    return (bits.to(float64(key.device)) + 0.5) * 2.0**-63


def exponential(u):
    """
    Exponential numbers -log(1 - u). log1p keeps the small ones exact; they decide the tail. None is infinite.
    """
    return -torch.log1p(-u.clamp(max=1 - torch.finfo(u.dtype).eps / 2))


class Noise:
    """
    Uniform numbers in (0, 1] that depend on (seed, step, row, position, how many were taken before).
    rows (B,), positions (L,): integer tensors. step: an int, or (K, 1, 1) for `unbind`.
    Rows and steps -1, -2, ... exist too: streams for what belongs to no row, or comes before the first step.
    """

    def __init__(self, seed, rows, positions, step=0):
        key = seed
        for part in (step, rows[:, None], positions[None]):
            key = mix(key + (part + 1) * GOLDEN)
        self.key, self.taken = key, 0  # (B, L)

    @classmethod
    def like(cls, x):
        """
        Noise for x (B, L), seeded from torch's global generator: what functions use when they are given none.
        """
        seed = torch.randint(1 << 62, ()).item()
        return cls(seed, torch.arange(x.size(0), device=x.device), torch.arange(x.size(1), device=x.device))

    def uniform(self, n):
        """The next n numbers of each position, (B, L, n) float64."""
        count = torch.arange(self.taken + 1, self.taken + 1 + n, device=self.key.device)
        self.taken += n
        return uniforms(self.key[..., None], count)

    def keys(self):
        """(B, L) int64: a key for draws that make their own numbers, far away from those of `uniform`."""
        self.taken += 1
        return self.key + mix(self.taken)

    def unbind(self):
        """A list of K Noises, one a step."""
        several = []
        for key in self.key.unbind():
            several.append(copy.copy(self))
            several[-1].key = key
        return several

    def to(self, device):
        """The same numbers on another device."""
        self.key = self.key.to(device)
        return self


def draw(p, noise):
    """
    A token from each row of probabilities p (B, L, V) float64, (B, L) int64. Exponential clocks with rates p:
    the first to ring, argmin_v E_v / p_v, is v with probability p_v. p need not sum to 1.
    """
    E = exponential(noise.uniform(p.size(-1)))
    return (E / p).argmin(-1)


def sharpen(logits, temperature=1.0, top_p=1.0):
    """
    Temperature, then nucleus (arXiv 1904.09751): the fewest most likely tokens whose probability reaches
    top_p, and always the first. Temperature 0 is greedy: all mass on the argmax. logits (..., V) -> (..., V).
    Raises ValueError out of range.
    """
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must be finite and >= 0, top_p {top_p} in (0, 1]")
    if temperature == 0:
        return torch.full_like(logits, -math.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    if temperature != 1:
        # the largest at 0: a tiny temperature overflows nothing, and float32 holds 1e-30 to 1e30
        logits = (logits - logits.amax(-1, keepdim=True)) / min(max(temperature, 1e-30), 1e30)
    if top_p < 1:
        value, index = logits.sort(-1, descending=True)
        p = value.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # what stands before it is enough already
        outside[..., 0] = False
        logits = logits.masked_fill(outside.scatter(-1, index, outside), -math.inf)
    return logits


def stratified_draw(block_sizes, n, seed, step):
    """
    A block size and a time for each of the n rows of one optimizer step, over all ranks and accumulation
    steps together (every rank makes the same call and takes its rows): sizes (n,) int64, t (n,) float64 in
    (0, 1).
    block_sizes: size -> weight. Each size gets its share of the rows to within one row, and the rows of a
        size get one time in each of as many equal slices of (0, 1): lower variance than independent draws,
        same mean.
    """
    u = Noise(seed, torch.tensor([-1]), torch.arange(n), step).uniform(3)[0]  # (n, 3)
    sizes = torch.tensor(list(block_sizes))
    edges = torch.tensor(list(block_sizes.values()), dtype=torch.float64).cumsum(0)
    slot = (torch.arange(n) + u[0, 0]) / n  # a comb of n teeth with one random offset
    # rounding may leave the last edge below 1
    which = torch.searchsorted(edges, slot).clamp(max=len(sizes) - 1)
    t = torch.empty(n, dtype=torch.float64)
    for k in range(len(sizes)):
        rows = (which == k).nonzero()[:, 0]
        t[rows] = (torch.arange(len(rows)) + u[rows, 1]) / len(rows)
    order = u[:, 2].argsort()  # who gets which: no link between a row of the batch and its noise level
    return sizes[which][order], t[order].clamp(1e-9, 1 - 1e-9)


if __name__ == "__main__":
    print(__doc__)
