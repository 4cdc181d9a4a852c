"""
Why believe methods/token_editing.py? Without edits it is the sampler `threshold` with a capped noise level.
With edits it follows its rule, written out in plain loops. It never touches what was given, and takes at most
b + post passes.
"""

import itertools
import math

import pytest
import torch
from exact import (
    GENERATE,
    KINDS,
    V3,
    blocks,
    by_hand,
    dense,
    draws,
    last,
    net,
    network,
    on,
    setup,
    tree,
)

from generate import NOTHING
from methods.token_editing import token_editing
from samplers import SAMPLERS

PATHS = pytest.mark.parametrize("path", GENERATE)
RAGGED = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0), (1, 0)]


class Capped:
    """A noise process that is told at most `hold`."""

    def __init__(self, process, hold):
        self.process, self.hold = process, hold

    def __getattr__(self, name):
        return getattr(self.process, name)

    def loo_logits(self, logits, xt, alpha):
        return self.process.loo_logits(logits, xt, alpha.clamp(max=self.hold))


def capped_threshold(block, *, threshold, hold):
    """The sampler `threshold` where network and process are told at most `hold`."""
    predict, block.process = block.predict, Capped(block.process, hold)
    block.predict = lambda alpha: predict(alpha.clamp(max=hold))
    yield from SAMPLERS["threshold"](block, threshold=threshold)


@pytest.mark.parametrize("fill, hold", [(0.0, 0.9), (0.5, 1.0), (0.6, 0.4), (0.9, 0.4), (1.0, 0.1)])
@pytest.mark.parametrize("kind", KINDS)
@PATHS
def test_without_edits_it_is_threshold_with_capped_levels(path, kind, fill, hold):
    make, kw = KINDS[kind]
    model = net(make(), seed=3, **kw).double()
    model.head.weight.data *= 0.3
    model, process = on(path, model, make())
    run = lambda sampler, **how: last(
        GENERATE[path](
            model, process, RAGGED * 8, block_size=4, max_new_tokens=3, seed=5, sampler=sampler, **how
        )
    )
    ours = run(token_editing, fill=fill, edit=1.5, hold=hold)
    want = run(capped_threshold, threshold=fill, hold=hold)
    assert torch.equal(ours.x, want.x) and ours.nfe == want.nfe and ours.token_forwards == want.token_forwards
    assert torch.equal(ours.nfe_rows, want.nfe_rows)
    if "timed" in kind and fill == 0.9:
        assert not torch.equal(ours.x, run(token_editing, fill=fill, edit=1.5, hold=1.0).x), "the cap is felt"


@pytest.mark.parametrize("kind", KINDS)
@PATHS
def test_edits_touch_no_given_token_and_end(path, kind):
    """The most eager editor: at most b passes write the block, and `post` passes follow."""
    make, kw = KINDS[kind]
    model, process = on(path, net(make(), seed=2, **kw).double(), make())
    how = {"block_size": 4, "sampler": token_editing, "edit": 0.0, "fill": 0.6}
    for post in (0, 1, 5):
        seen = list(GENERATE[path](model, process, RAGGED * 6, max_new_tokens=3, seed=1, post=post, **how))
        state, steps = seen[-1], {}
        for s in seen:
            steps[s.span] = max(steps.get(s.span, 0), s.step)
            for row, prompt in zip(s.x.tolist(), RAGGED * 6, strict=True):
                assert row[: len(prompt)] == list(prompt), "the prompt stays"
        assert max(steps.values()) <= 4 + post, steps
        for row, prompt in zip(state.x.tolist(), RAGGED * 6, strict=True):
            n = len(prompt)
            assert all(0 <= v < V3 for v in row[n : n + 3]) and all(v == NOTHING for v in row[n + 3 :])
        assert state.nfe_rows.max() <= sum(steps.values())
    cached, uncached = (
        last(GENERATE[path](model, process, RAGGED, use_cache=c, **how)).x for c in (True, False)
    )
    assert torch.equal(cached, uncached)
    for i, prompt in enumerate(RAGGED):  # same row number, other mates
        alone = last(GENERATE[path](model, process, [prompt] * (i + 1), **how)).x
        assert torch.equal(alone[i], cached[i, : alone.size(1)])


def by_the_rule(model, process, b, fill, edit, post, hold):
    """The exact distribution of a block behind one prompt token: the rule of the docstring in plain loops."""
    noise = [process.mask_id] if process.mask_id is not None else list(range(V3))
    tables = []
    for n in range(b):
        alpha = torch.tensor(min(n / (b - 1), hold), dtype=torch.float64)
        x, logits = network(model, process, b, alpha)
        tables.append(by_hand(process.loo_logits(logits, x, alpha).log_softmax(-1).exp().tolist(), x))
    edits = []

    def step(k, x, memory):
        written, used = memory
        if used is None:  # it has ended
            return [(1.0, x, memory)]
        p, left = tables[len(written)][x], [i for i in range(1, b) if i not in written]
        used += not left
        if used > post:
            return [(1.0, x, (written, None))]
        changed = list(x)
        for i in written:
            best = max(range(V3), key=lambda v: p[i][v])
            if best != x[i] and p[i][best] > edit:
                changed[i] = best
        edits.append(changed != list(x))
        if not left:
            return [(1.0, tuple(changed), (written, None if changed == list(x) else used))]
        out = []
        for guess in itertools.product(range(V3), repeat=len(left)):
            sure = {i: p[i][v] for i, v in zip(left, guess, strict=True)}
            take = {i for i in left if sure[i] >= fill} | {max(left, key=lambda i: (sure[i], -i))}
            fresh = [i for i in left if i not in take]
            for filling in itertools.product(noise, repeat=len(fresh)):
                y = list(changed)
                for i, v in zip(left, guess, strict=True):
                    y[i] = v if i in take else filling[fresh.index(i)]
                out.append(
                    (math.prod(sure.values()) / len(noise) ** len(fresh), tuple(y), (written | take, used))
                )
        return out

    found = {}
    for first in itertools.product(noise, repeat=b - 1):
        for x, q in tree(step, (1, *first), b + post + 1, (frozenset(), 0)).items():
            found[x] = found.get(x, 0.0) + q / len(noise) ** (b - 1)
    return dense(found, b), any(edits)


@pytest.mark.parametrize("kind, seed", [("masked", 2), ("uniform loo", 3), ("uniform denoiser, timed", 5)])
@PATHS
def test_edits_follow_their_rule(path, kind, seed):
    """
    The test also tells it from a sampler without edits, and from one without passes after the last token.
    """
    model, process = setup(kind, seed, 0.3, path)
    how = {"fill": 0.6, "edit": 0.4, "hold": 0.6}
    p, edits = by_the_rule(model, process, 3, post=2, **how)
    others = [
        by_the_rule(model, process, 3, **how | other)[0] for other in ({"post": 0}, {"post": 2, "edit": 2.0})
    ]
    assert edits
    draws(blocks(model, process, 3, 30_000, token_editing, prompt=(1,), post=2, **how), p, *others)


def test_options_out_of_range_are_refused():
    model, process = on("fast", net(KINDS["masked"][0]()), KINDS["masked"][0]())
    for bad in (
        {"fill": -0.1},
        {"fill": 1.1},
        {"edit": -1.0},
        {"edit": math.nan},
        {"post": -1},
        {"hold": 0.0},
        {"hold": 1.1},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            last(GENERATE["fast"](model, process, [()], block_size=4, sampler=token_editing, **bad))
    with pytest.raises(ValueError, match="steps mean nothing"):
        last(GENERATE["fast"](model, process, [()], block_size=4, sampler=token_editing, steps=3))
