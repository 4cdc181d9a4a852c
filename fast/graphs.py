"""
How does a GPU sample without waiting for Python? A pass of generation is recorded once as a CUDA graph, and
played from then on.

A pass of a few tokens is hundreds of kernels of microseconds each, and launching them takes longer than
running them. A graph is launched as one, but it is what was launched when it was recorded: the same shapes,
the same addresses, no question to the host. So its inputs lie in buffers; the length of the context and all
positions are tensors; attention reads the cache's whole buffers under a mask; and it runs all rows. It puts
out hidden states: the head is asked only for the tokens a step depends on, as without graphs.

Not measured on a GPU. On a CPU the tests play a tape of the same operations: nothing that a graph would
freeze may change.
"""

import contextlib
import math
import sys

import torch

from fast.attention import dtype_of
from kernels import send

# passes of a kind before it is worth a recording, and how many playings are compared with the network itself
EAGER, TRIED = 2, 2


def record(run):
    """(play, what run() returns): play() repeats on the GPU what run did, and puts it in the same place."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # what is set up at a first call must not be recorded
    torch.cuda.current_stream().wait_stream(side)
    # the outer one: a failed recording would leave its stream behind
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        out = run()
    return graph.replay, out


class Recorded:
    """
    model.forward with a cache, for generation: same arguments, same logits but for rounding. A pass is
    recorded when its shapes have come up EAGER times. If that fails, or one of its first TRIED playings
    differs from what the network itself says, a warning says so and nothing is recorded any more; until then
    the network's own answer is what counts. For one cache, and within one autocast: a recording reads the
    weights that autocast has converted.
    """

    def __init__(self, model, record=record):
        self.model, self.record, self.works = model, record, not model.cfg.next_token
        self.rows, self.seen, self.kinds = 0, {}, {}

    def __call__(self, clean, noisy, block_size, start=0, sigma=None, cache=None, ask=None):
        if len(noisy) != self.rows:  # rows have left: what was recorded is of no more use, and holds memory
            self.rows, self.seen, self.kinds = len(noisy), {}, {}
        sizes = tuple(block_size.flatten().tolist()) if torch.is_tensor(block_size) else block_size
        kind = clean.shape, noisy.shape, sizes, None if sigma is None else sigma.shape
        self.seen[kind] = count = self.seen.get(kind, 0) + 1
        eager = lambda: self.model(clean, noisy, block_size, start, sigma, cache, ask=ask)
        if not self.works or count <= EAGER:
            return eager()

        length = cache.length
        at = start if torch.is_tensor(start) else torch.arange(start, start + noisy.size(1))
        given = [clean, noisy, torch.tensor(length), at] + ([] if sigma is None else [sigma])
        if count > EAGER + 1 + TRIED:
            got = self.play(kind, given, ask)
            cache.length = length + clean.size(1)
            return got

        before = cache.k.clone(), cache.v.clone()
        try:
            with torch.cuda.device(noisy.device) if noisy.is_cuda else contextlib.nullcontext():
                if count == EAGER + 1:
                    self.prepare(kind, given, block_size, cache)
                else:
                    got = self.play(kind, given, ask)
            why = ""
        except Exception as e:  # whatever a driver may raise
            why = f"{type(e).__name__}: {(str(e.__context__ or e).strip() or '?').splitlines()[0]}"
        cache.k.copy_(before[0]), cache.v.copy_(before[1])
        cache.length, cache.places = length, None
        want = eager()
        if not why and count > EAGER + 1:
            near = 1e-3 if dtype_of(self.model.embed.weight).itemsize > 2 else 0.02  # float32, or bfloat16
            why = "" if (got - want).norm() <= near * want.norm() else "a playing gave something else"
        if why:
            self.works, self.kinds = False, {}
            print(f"WARNING: no CUDA graphs: {why}", file=sys.stderr, flush=True)
        return want

    def prepare(self, kind, given, block_size, cache):
        """Record a pass; its inputs lie where they stay."""
        inputs = [x.to(self.model.embed.weight.device, copy=True) for x in given]
        size = torch.as_tensor(block_size, device=inputs[0].device)
        size = size if size.dim() else size[None]  # a number would be copied to the GPU by every pass

        def run():
            cache.length = inputs[2]
            level = inputs[4] if len(inputs) > 4 else None
            return self.model(
                *inputs[:2], size, inputs[3], level, cache, readout=lambda hidden, weight, bias: hidden
            )

        play, hidden = self.record(run)
        hidden.fill_(math.nan)  # it is for the playing to say what they are
        self.kinds[kind] = inputs, play, hidden, run  # run holds what only the recording reads

    def play(self, kind, given, ask):
        """
        The logits of the tokens asked for, (M, V), or of all, (R, N, V): hidden states from the recording,
        and the head.
        """
        inputs, play, hidden, _ = self.kinds[kind]
        for x, new in zip(inputs, given, strict=True):
            x.copy_(new, non_blocking=True)
        play()
        where = ... if ask is None else tuple(send(i, hidden.device) for i in ask.nonzero(as_tuple=True))
        return self.model.logits(hidden[where])
