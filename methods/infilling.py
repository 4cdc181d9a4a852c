"""
Infilling: text with holes. A network that writes to the right meets text that is there already.

    in a block        Its given tokens are there from the start, on both sides of a hole. A network of masked
                      noise has been trained on just that: any pattern of masks and visible tokens.
    in later blocks   They are not read when the hole is filled. So K fillings are drawn, and one of them is
                      chosen with probability proportional to

                          w = p_AR(given tokens behind the hole | all before them)

                      by one pass of block size 1 (`weigh`). With many it is a draw of the conditional.

Block size 1 reads nothing behind a hole: it needs the weights, and with them it is exact for any noise.
Uniform noise knows no visible tokens: its network takes a given token for noise, see `renoise`.

    python sample.py --ckpt out/digits --prompt "3+4=07;_+8=11;" --hole _
    python sample.py --ckpt out/digits --prompt "3+4=07;_+8=11;" --hole _ --block_size 1 --gaps 16
"""

from dataclasses import dataclass, fields
from types import SimpleNamespace

import torch

import generate as lesson
from diffusion import pick, sigma_for
from generate import HOLE, Block, State, sampler
from rng import Noise

BLIND = ("ar", "speculation")  # samplers that read nothing behind a hole, in its block either


def unseen(prompt, block_size):
    """
    Which given tokens were not read when the holes before them were filled, (P,) bool of a prompt (P,): those
    with holes before them, but none in their own block. Block size 1: all behind the first hole.
    """
    hole, block = prompt == HOLE, torch.arange(len(prompt)) // block_size
    before = hole.cumsum(0)
    same = (block[:, None] == block) & (torch.arange(len(prompt))[:, None] > torch.arange(len(prompt)))
    return ~hole & (before > 0) & ~(same & hole).any(1)


@torch.no_grad()
def weigh(model, process, x, counted, seed=0):
    """
    log p_AR of the tokens of x (R, W) that `counted` (R, W) marks, each given all tokens before it, summed:
    (R,) float64, and how many tokens were put through the network. One pass of block size 1.
    """
    if not counted.any():
        return torch.zeros(len(x), dtype=torch.float64), 0
    device, at = model.embed.weight.device, counted.any(0).nonzero()[:, 0]
    start, end = int(at[0]), int(at[-1]) + 1
    text = x[:, :end].clamp(min=0)
    noise = Noise(seed, torch.arange(len(x)), torch.arange(start, end), -2).to(x.device)
    probe = process.ar_input((len(x), end - start), noise).to(device)
    level = sigma_for(model, torch.zeros(1, dtype=torch.float64))
    logits = model(text.to(device), process.network_input(probe), 1, start, level).to(x.device)
    log_p = process.loo_logits(logits, text[:, start:], 0.0).double().log_softmax(-1)
    found = torch.where(counted[:, start:end].to(x.device), pick(log_p, text[:, start:]), 0.0).sum(1)
    return found.cpu(), text.numel() + probe.numel()


@dataclass
class Weighted(State):
    """The last State of `fill`."""

    effective: torch.Tensor  # (B,) (sum w)^2 / sum w^2, between 1 and gaps: as many fillings would do as well


def fill(
    model, process, prompt, *, gaps, block_size, sampler=lesson.ancestral, generate=lesson.generate, **how
):
    """
    generate, with the best of several fillings: an iterator of one State, the last. Arguments as there.

    gaps    fillings a prompt; the sampler draws each, and `weigh` one pass over all of them together
    In State, nfe_rows are the passes of the filling that needed most, and the one that weighs.

    Many fillings end in the sampler's own law times w. For block size 1, and for speculation, that is the
    conditional of p_AR, wherever the holes are. For others, holes in several blocks are a little less: what
    is given behind a hole of a later block was read by that hole alone, and is not weighed.
    Raises ValueError for what generate refuses, and where weights have no meaning.
    """
    temperature, seed = how.get("temperature", 1.0), how.get("seed", 0)
    if gaps < 1:
        raise ValueError(f"gaps must be at least 1, not {gaps}")
    if gaps > 1 and temperature == 0:
        raise ValueError(f"temperature 0 would draw the same filling {gaps} times: gaps must be 1")
    if how.get("ar_tokens"):
        raise ValueError("ar_tokens and gaps do not go together: block size 1 has gaps of its own")
    Block.need_ar_mode(SimpleNamespace(model=model, trained=how.get("trained")))
    prompt = [torch.as_tensor(p, dtype=torch.long) for p in prompt]
    several = [p for p in prompt for _ in range(gaps)]
    for last in generate(model, process, several, block_size=block_size, sampler=sampler, **how):
        pass
    counted = torch.zeros(last.x.shape, dtype=torch.bool)
    for row, p in enumerate(several if gaps > 1 else ()):
        counted[row, : len(p)] = unseen(p, 1 if sampler.__name__ in BLIND else block_size)
    log_w, n_tokens = weigh(model, process, last.x, counted, seed)
    w = log_w.view(-1, gaps).clamp(min=-1e30).softmax(1)  # all impossible: any
    u = Noise(seed, torch.arange(len(prompt)), torch.arange(1), -3).uniform(1)[:, 0]
    choice = (u > w.cumsum(1)).sum(1).clamp(max=gaps - 1)
    chosen = torch.arange(len(prompt)) * gaps + choice
    state = {f.name: getattr(last, f.name) for f in fields(State)}
    state |= {"x": last.x[chosen.to(last.x.device)], "done": last.done[chosen], "span": (0, last.x.size(1))}
    state["nfe"] = last.nfe + (n_tokens > 0)
    state["nfe_rows"] = last.nfe_rows.view(-1, gaps).amax(1) + (n_tokens > 0)
    state["token_forwards"] = last.token_forwards + n_tokens
    yield Weighted(**state, effective=1 / w.square().sum(1))


@sampler()
def renoise(block):
    """
    Ancestral steps that see the given tokens of the block as noisy as the rest, noised anew at each step
    (after RePaint, arXiv 2201.09865). A network of uniform noise knows one noise level a block, and takes a
    clean token for a noisy one. So each step shows it what it expects, which is less than it could know: an
    approximation. Masked noise needs none of this; there it hides what is given.
    """
    given = block.process.encode(block.given.clamp(min=0))
    for k in range(block.steps):
        (a_t, a_s), noise = block.alpha[k : k + 2], block.noise(k)
        x = torch.where(block.open, block.x, block.process.corrupt(given, a_t, noise))
        block.write(block.posterior(block.predict(a_t, x), a_t, a_s, noise))
        yield
