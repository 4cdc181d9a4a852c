"""Exercise 6: the KV cache. What extend returns is compared with a list, and logits with those of no cache."""

import time

import torch

import model
from course import project
from course.harness import Wrong, compare, likeness, tensor
from generate import generate
from model import KVCache, ModelConfig, Transformer

TITLE, MINUTES = "generation with a cache", 20
FUNCTION = "extend"
MAY_CHANGE = True
SOURCE = [model.KVCache, model.Transformer.hidden]
HINTS = [
    "What was kept for this layer may hold more than is committed: the noisy tokens of the last pass. Cut it\n"
    "at self.length, and put the new keys behind it, along the positions.",
    "if self.k[i] is not None: k = torch.cat((self.k[i][:, :, : self.length], k), dim=2), and v alike.\n"
    "Then self.k[i], self.v[i] = k, v, and return both.",
]
PASSES = ((3, 2), (2, 2), (4, 1), (1, 0), (2, 0))  # tokens of a pass, how many of them are committed after it


def keys(first, n, layer, sign):
    """Keys (2, 3, n, 4) that tell tokens, layers, and keys (sign 1) from values (-1) apart."""
    token = torch.arange(first, first + n).double()
    return sign * (token[:, None] + 100 * layer + torch.arange(24).view(2, 3, 1, 4) / 100)


def passes(extend, check=None):
    """What layers 0 and 1 read in all PASSES, a list of tensors. check(returned, n, shape) looks at each."""
    cache, found, first = KVCache(2), [], 0
    for n, committed in PASSES:
        for layer in (0, 1):
            length = cache.length
            new = keys(first, n, layer, 1), keys(first, n, layer, -1)
            y = extend(cache, layer, new[0].clone(), new[1].clone())
            shape = (2, 3, length + n, 4)
            found += list(check(y, shape) if check else y)
            if cache.length != length:
                text = f"self.length was {length}, and is {cache.length} after extend"
                raise Wrong(text, "the network does that after the pass, when all layers have read")
        cache.commit(committed)
        first += n
    return found


def expected():
    """The same, by a list of the committed tokens."""
    found, kept, first = [], [[], []], 0
    for n, committed in PASSES:
        for layer in (0, 1):
            new = list(range(first, first + n))
            for sign in (1, -1):
                found.append(torch.cat([keys(t, 1, layer, sign) for t in kept[layer] + new], dim=2))
            kept[layer] += new[:committed]
        first += n
    return found


def asked(answer):
    def look(y, shape):
        if y is None:
            raise Wrong(f"{answer.name} returns nothing", "`return k, v` at its end")
        if not (isinstance(y, (tuple, list)) and len(y) == 2):
            raise Wrong(f"{answer.name} returns a {type(y).__name__}, (keys, values) was expected")
        return [tensor(x, shape, "(B, H, self.length + n, D/H)", answer.name).double() for x in y]

    return passes(answer, look)


def network():
    """A small network with random weights, float64."""
    torch.manual_seed(3)
    net = Transformer(ModelConfig(5, 8, n_layers=2, n_heads=2, d_model=16)).double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.5)
    return net


@torch.no_grad()
def block_by_block(net, text, b, cache):
    """Logits of all blocks of text (B, T) at block size b, each read behind the clean text before it."""
    noisy, found = torch.full_like(text[:, :b], 4), []
    for first in range(0, text.size(1), b):
        begin = cache.length if cache else 0
        found.append(net(text[:, begin:first], noisy, b, start=first, cache=cache))
    return torch.cat(found, dim=1)


def check(answer):
    yield "keys and values of all committed tokens, and those of this pass"
    found = asked(answer)
    yield "in the order of the text; the noisy tokens of earlier passes are forgotten; keys are no values"
    for mine, want in zip(found, expected(), strict=True):
        name = lambda at: f"token {at[2]} of what a layer reads (row {at[0]}, head {at[1]}, number {at[3]})"
        compare(mine, want, name)
    with project.replaced(KVCache, "extend", lambda self, i, k, v: answer(self, i, k, v)):
        net, text = network(), torch.tensor([[0, 3, 1, 2, 2, 0, 1, 3], [1, 1, 0, 2, 3, 3, 0, 0]])
        for b in (1, 2, 4):
            yield f"logits with the cache are those without, block size {b}"
            mine, want = (block_by_block(net, text, b, cache) for cache in (net.new_cache(2, 8), None))
            compare(mine, want, lambda at: f"the logit of token {at[2]} at row {at[0]}, position {at[1]}")
        yield "a guess can be forgotten: length is set back after a verifier has read it"
        cache, masks = net.new_cache(2, 8), torch.full_like(text[:, :4], 4)
        with torch.no_grad():
            net(text[:, :6], masks[:, :2], 1, start=4, cache=cache)
            cache.length = 4
            other = text.flip(0)[:, 4:6]
            mine = net(other, masks[:, :2], 2, start=6, cache=cache)
            want = net(torch.cat((text[:, :4], other), dim=1), masks[:, :2], 2, start=6)
        compare(mine, want, lambda at: f"the logit of token {at[2]} at row {at[0]}, position {6 + at[1]}")
        yield "rows that have ended are dropped: the others go on"
        cache.keep(torch.tensor([1]))
        with torch.no_grad():
            mine = net(None, masks[:1, :2], 2, start=6, cache=cache)
            want = net(torch.cat((text[:, :4], other), dim=1)[1:], masks[:1, :2], 2, start=6)
        compare(mine, want, lambda at: f"the logit of token {at[2]} at position {6 + at[1]}")


# ----- what a wrong answer may be


def slip(kept, joined=None, stored=None):
    """
    extend with another cut of what was kept (x, length), another way to join (old, new), or another thing
    stored (new, joined).
    """
    joined = joined or (lambda old, new: torch.cat((old, new), dim=2))
    stored = stored or (lambda new, both: both)

    def extend(self, i, k, v):
        both = [k, v] if self.k[i] is None else [
            joined(kept(old, self.length), new) for old, new in ((self.k[i], k), (self.v[i], v))
        ]  # fmt: skip
        self.k[i], self.v[i] = stored(k, both[0]), stored(v, both[1])
        return both

    return extend


cut = lambda x, length: x[:, :, :length]


def exchanged(self, i, k, v):
    k, v = slip(cut)(self, i, k, v)
    return v, k


def one_layer(self, i, k, v):
    return slip(cut)(self, 0, k, v)


SLIPS = {
    "what was not committed is still read: noisy tokens of earlier passes. Cut at self.length": slip(lambda x, n: x),
    "nothing of earlier passes is read: keep them in self.k[i] and self.v[i], and put them before the new ones": slip(lambda x, n: x[:, :, :0]),
    "the new keys stand before the kept ones": slip(cut, lambda old, new: torch.cat((new, old), dim=2)),
    "only the new keys are kept: the next pass misses the earlier ones": slip(cut, stored=lambda new, both: new),
    "one token too few is kept: cut at self.length": slip(lambda x, n: x[:, :, : max(n - 1, 0)]),
    "one token too many is kept: cut at self.length": slip(lambda x, n: x[:, :, : n + 1]),
    "the last tokens are kept, and must be the first: the noisy ones stand at the end": slip(
        lambda x, n: x[:, :, x.size(2) - n :]
    ),
    "keys and values are exchanged": exchanged,
    "all layers share one entry: it is self.k[i]": one_layer,
    "joined along another dimension than the positions, dim 2": slip(cut, lambda old, new: torch.cat((old, new), 1)),
    "joined along the rows of the batch, and must be along the positions, dim 2": slip(
        cut, lambda old, new: torch.cat((old, new), 0)
    ),
}  # fmt: skip


def why(answer):
    """The slip whose first wrong shapes and numbers are the student's."""

    def flat(extend):
        read = []
        try:
            passes(extend, lambda y, shape: read.extend(y) or y)
        except Exception:  # shapes that do not fit each other, for one
            pass
        rows = [torch.cat((torch.tensor(x.shape).double(), x.double().flatten())) for x in read]
        return torch.cat(rows)

    mine = flat(answer.function)
    return likeness(mine, SLIPS, flat)


def run(function, ckpt):
    settings, net, process = project.network(ckpt, "out/sudoku", "masked")
    prompts, right, texts = project.puzzles(32)
    with project.replaced(KVCache, "extend", lambda self, i, k, v: tuple(function(self, i, k, v))):
        made = {}
        for name, use in (("without a cache", False), ("with yours", True)):
            start = time.time()
            for state in generate(net, process, prompts, block_size=1, use_cache=use):
                pass
            made[name] = state.x
            print(f"\n{name:<16} {state.token_forwards:>6,} tokens through the network, {time.time() - start:.1f} s, "
                  f"{right(state.x)} of {len(prompts)} solved")  # fmt: skip
    same = all((a == b).all() for a, b in zip(*made.values(), strict=True))
    print("the same grids" if same else "other grids: rounding, or a wrong cache?")
    project.show(texts(made["with yours"]))
    print(
        "\nWhat to look at: the same texts from far fewer tokens. The longer a text, the larger the factor."
    )
