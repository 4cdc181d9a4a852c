"""
Why believe samplers/dynamic_blocks.py? A size that is always taken gives the text of that fixed block size,
token for token, and so do a bound that takes everything and one that takes nothing. In between, a row's text
is what its own choices give, whatever its mates choose.
"""

import pytest
import torch
from conftest import slow
from exact import GENERATE, KINDS, last, net, on

from generate import NOTHING
from samplers import SAMPLERS, dynamic_blocks

RAGGED = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0), (1, 0)]
TRAINED = [1, 2, 4]


def small(path, kind, seed=3):
    make, kw = KINDS[kind]
    model = net(make(), seed=seed, seq_len=12, **kw).double()
    model.head.weight.data *= 0.3
    return on(path, model, make())


def text(path, model, process, prompts, b=4, sampler="dynamic_blocks", **how):
    how = {"max_new_tokens": 6, "seed": 7, "trained": TRAINED, **how}
    run = GENERATE[path](model, process, prompts, block_size=b, sampler=SAMPLERS[sampler], **how)
    return last(run)


QUICK = [("fast", "masked")]


@pytest.mark.parametrize("path, kind", slow([(p, k) for p in GENERATE for k in KINDS], QUICK))
def test_a_constant_choice_is_the_fixed_block_size(path, kind):
    model, process = small(path, kind)
    for how in ({}, {"temperature": 0.0}, {"steps": 2, "top_p": 0.8}, {"eos_id": 1}, {"use_cache": False}):
        prompts = RAGGED * 2
        for size in TRAINED:
            steps = {"steps": min(how["steps"], size)} if "steps" in how and size > 1 else {"steps": None}
            name = "ar" if size == 1 else "ancestral"
            fixed = text(path, model, process, prompts, size, name, **how | steps)
            ours = text(path, model, process, prompts, choose=str(size), **how)
            W = min(fixed.x.size(1), ours.x.size(1))
            assert torch.equal(ours.x[:, :W], fixed.x[:, :W]) and (ours.x[:, W:] == NOTHING).all()
            assert (ours.nfe_rows >= fixed.nfe_rows).all(), "a row ends behind a block of 4"
            if size in (1, 4) and not how:
                whole = [
                    {"max_new_tokens": 8, "b": size, "sampler": name},
                    {"max_new_tokens": 8, "choose": str(size)},
                ]
                passes = [text(path, model, process, [()] * 3, **w).nfe_rows for w in whole]
                assert torch.equal(*passes)
            if size == 2:
                continue
            extreme = {"bound": 1e9 if size == 4 else 0.0}
            looked = text(path, model, process, prompts, choose="entropy", **extreme, **how)
            assert torch.equal(looked.x, ours.x)
            if size == 4 and path == "lesson":
                assert torch.equal(looked.nfe_rows, ours.nfe_rows), "the look is the first step's pass"
            coin = text(path, model, process, prompts, choose="random", bound=float(size == 4), **how)
            assert torch.equal(coin.x, ours.x)


def follow(path, model, process, prompts, decide, **how):
    """The text of sizes that decide(part, logits) takes."""

    def sampler(block):
        yield from dynamic_blocks.in_sizes(block, [4, 2, 1], decide)

    sampler.needs = ()
    return last(GENERATE[path](model, process, prompts, block_size=4, sampler=sampler, seed=7, **how))


def by_hand(model, process, row, choices, n):
    """
    The text of row number `row` whose parts are taken as choices[begin, size] says, a block at a time, and its
    passes: those of each block, and one for each look at a part that splits.
    """
    written, passes = (), 0

    def fill(begin, size):
        nonlocal written, passes
        if size == 1 or choices[begin, size]:
            how = {"block_size": size, "max_new_tokens": size, "seed": 7}
            how["sampler"] = SAMPLERS["ar" if size == 1 else "ancestral"]
            state = last(GENERATE["lesson"](model, process, [written] * (row + 1), **how))
            written, passes = tuple(state.x[row, : begin + size].tolist()), passes + int(state.nfe_rows[row])
            return
        passes += 1
        for i in range(0, size, size // 2):
            fill(begin + i, size // 2)

    for begin in range(0, n, 4):
        fill(begin, 4)
    return written, passes


@pytest.mark.parametrize("path, kind", slow([(p, k) for p in GENERATE for k in KINDS], [("fast", "masked")]))
def test_rows_that_choose_differently_share_a_batch(path, kind):
    model, process = small(path, kind)
    take = torch.rand(5, 8, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    decide = lambda part, logits: take[part.rows, int(part.positions[0]), part.x.size(1)]
    for cached in (True, False):
        state = follow(path, model, process, [()] * 5, decide, max_new_tokens=8, use_cache=cached)
        for row in range(5):
            choices = {(begin, s): bool(take[row, begin, s]) for begin in range(8) for s in (2, 4)}
            written, passes = by_hand(model, process, row, choices, 8)
            assert tuple(state.x[row, :8].tolist()) == written
            # the fast code leaves out steps that change nothing, and knows some of them after the look alone
            assert state.nfe_rows[row] == passes or path == "fast" and state.nfe_rows[row] <= passes + 2
    assert {bool(v) for v in take[:, 0, 4]} == {True, False}


def test_the_rule_takes_what_is_certain():
    """The mean entropy of the open positions, by hand, at the first part of ragged prompts."""
    model, process = small("lesson", "masked")
    seen = []

    def decide(part, logits):
        p = process.loo_logits(logits).softmax(-1)
        mean = [
            sum(
                -(p[r, i] * p[r, i].clamp(min=1e-300).log()).sum().item()
                for i in range(p.size(1))
                if part.open[r, i]
            )
            / max(1, int(part.open[r].sum()))
            for r in range(len(p))
        ]
        seen.append((torch.tensor(mean), dynamic_blocks.surprise(part, logits), part.open.clone()))
        return torch.ones(len(p), dtype=torch.bool)

    follow("lesson", model, process, RAGGED, decide, max_new_tokens=3)
    for mean, total, open in seen:
        assert torch.allclose(total.sum(1) / open.sum(1).clamp(min=1), mean.double(), atol=1e-9)
    bound = seen[0][0][:2].mean().item()  # between the rows 0 and 1
    want = [text("lesson", model, process, RAGGED[:2], choose=c, max_new_tokens=3) for c in ("4", "1", "2")]
    both = text("lesson", model, process, RAGGED[:2], choose="entropy", bound=bound, max_new_tokens=3)
    sure = int(seen[0][0][:2].argmin())
    assert torch.equal(both.x[sure, :4], want[0].x[sure, :4]), "the surer row takes the block"
    assert both.nfe_rows[1 - sure] != want[0].nfe_rows[1 - sure], "the other one splits"


def test_what_cannot_be_is_refused():
    model, process = small("fast", "masked")
    for bad in ({"choose": "best"}, {"choose": "3"}, {"choose": "policy"}, {"bound": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            text("fast", model, process, [()], **bad)
    for bad in ({"choose": "random", "bound": 1.5}, {"choose": "4", "bound": 0.1}):
        with pytest.raises(ValueError, match="bound"):
            text("fast", model, process, [()], **bad)
    with pytest.raises(ValueError, match="one of entropy, random, policy, 4, 1,"):
        text("fast", model, process, [()], trained=[1, 3, 4], choose="3")
    with pytest.raises(ValueError, match="one block size"):
        text("fast", model, process, [()], trained=[4])
