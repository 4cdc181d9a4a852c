"""
Why believe samplers/freedave.py? It writes the very tokens of the sampler whose rule it follows, at every
temperature, for every noise, with and without cache; every state it shows is one of that sampler's. The rule
that is published, to compare visible tokens alone, does not. Passes are counted where all guesses are right.
"""

import math

import pytest
import torch
from conftest import slow
from exact import GENERATE, KINDS, Couplings, last, net, on

from generate import NOTHING
from rng import Noise
from samplers import SAMPLERS, freedave

PATHS = pytest.mark.parametrize("path", GENERATE)
RAGGED = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0), (1, 0)]
RULES = [("confidence", {}), ("threshold", {"threshold": 0.6})]
HOW = [
    {"temperature": 0.0},
    {"temperature": 0.0, "steps": 3},
    {"eos_id": 1, "drafts": 2},
    {"temperature": 0.7, "top_p": 0.8, "ar_tokens": 1, "steps": 2},
    {"use_cache": False, "drafts": 7},
]


def texts(path, model, process, prompts, sampler, **how):
    how = {"block_size": 4, "max_new_tokens": 3, "seed": 5, **how}
    return list(GENERATE[path](model, process, prompts, sampler=SAMPLERS[sampler], **how))


def small(path, kind, seed):
    """A random network whose tokens depend on each other, and its process."""
    make, kw = KINDS[kind]
    model = net(make(), seed=seed, **kw).double()
    model.head.weight.data *= 0.4
    return on(path, model, make())


QUICK = [("fast", "masked"), ("fast", "uniform denoiser, timed"), ("lesson", "masked")]


@pytest.mark.parametrize("path, kind", slow([(p, k) for p in GENERATE for k in KINDS], QUICK))
def test_it_writes_the_very_tokens_of_its_rule(path, kind):
    model, process = small(path, kind, 3)
    prompts = RAGGED * 2 if path == "lesson" else RAGGED * 6 + RAGGED[:3]
    fewer = 0
    for rule, own in RULES:
        for how in HOW:
            drafts = {"drafts": how.get("drafts", 3)}
            how = {k: v for k, v in how.items() if k != "drafts"}
            want = texts(path, model, process, prompts, rule, **how, **own)
            ours = texts(path, model, process, prompts, "freedave", rule=rule, **how, **own, **drafts)
            assert torch.equal(ours[-1].x, want[-1].x) and torch.equal(ours[-1].done, want[-1].done), how
            assert ours[-1].nfe <= want[-1].nfe
            fewer += int((want[-1].nfe_rows - ours[-1].nfe_rows).sum())
            if len(prompts) == 33 and "eos_id" not in how:
                check_states(ours, want, prompts)
    assert fewer > 0, "some guess was right"


def check_states(ours, want, prompts):
    """What is shown of a row is something that the sampler of the rule shows of it, too."""
    for i, prompt in enumerate(prompts):
        shown = lambda state: tuple(state.x[i, : len(prompt) + 3].tolist())  # noqa: B023
        assert set(map(shown, ours)) <= set(map(shown, want))


def test_drafts_1_is_the_sampler_itself():
    model, process = small("fast", "masked", 3)
    for rule, own in RULES:
        want = last(texts("fast", model, process, RAGGED * 4, rule, **own))
        ours = last(texts("fast", model, process, RAGGED * 4, "freedave", rule=rule, drafts=1, **own))
        assert torch.equal(ours.x, want.x) and torch.equal(ours.nfe_rows, want.nfe_rows)
        assert (ours.nfe, ours.token_forwards) == (want.nfe, want.token_forwards)


def by_visible_tokens(block, choose, guesses, logits):
    """
    The published walk, of one row: go on from the last guess whose visible tokens agree with the next state,
    whatever else that state has written.
    """
    best = 0
    while True:
        after = freedave.step(block, choose, guesses[best], logits[:, best])
        _, x, committed = after
        fits = lambda guess: bool((~guess[2] | committed & (guess[1] == x)).all())  # noqa: B023
        better = [j for j in range(best + 1, len(guesses)) if fits(guesses[j])]
        if not better:
            return after, logits[:, best]
        best = better[-1]


def test_comparing_visible_tokens_alone_is_not_lossless(monkeypatch):
    """With one token a step it is, as the paper says: then the visible tokens are all there is."""
    differ, process = dict.fromkeys(["confidence", "threshold"], 0), KINDS["masked"][0]()
    for seed in range(16):
        model = Couplings(process, 8, seed)
        for rule, own in (("confidence", {}), ("threshold", {"threshold": 0.9})):
            if rule == "confidence" and seed > 3:
                continue
            how = {"temperature": 0.0, "block_size": 8, "max_new_tokens": 8, "use_cache": False, **own}
            want = last(texts("lesson", model, process, [()], rule, **how)).x
            how |= {"rule": rule, "drafts": 4}
            assert torch.equal(last(texts("lesson", model, process, [()], "freedave", **how)).x, want)
            with monkeypatch.context() as m:
                m.setattr(freedave, "walk", by_visible_tokens)
                theirs = last(texts("lesson", model, process, [()], "freedave", **how)).x
            differ[rule] += not torch.equal(theirs, want)
    assert differ["confidence"] == 0 and differ["threshold"] >= 2, differ


@pytest.mark.parametrize("drafts", [1, 2, 3, 7, 20])
@PATHS
def test_passes_where_every_guess_is_right(path, drafts):
    """The network says the same of everything: 1 pass, then one for each `drafts` states of the 7 left."""
    model, process = small(path, "masked", 0)
    torch.nn.init.zeros_(model.head.weight)
    how = {"drafts": drafts, "block_size": 8, "max_new_tokens": 8}
    state = last(texts(path, model, process, [(), ()], "freedave", **how))
    assert state.nfe_rows.tolist() == [1 + math.ceil(7 / drafts)] * 2
    if path == "fast":  # finished guesses are not asked: 1 state, then 7
        assert state.token_forwards == 2 * 8 * 8
    else:
        assert state.token_forwards == 2 * 8 * (1 + drafts * math.ceil(7 / drafts))
    assert (state.x != NOTHING).all()


def test_noise_of_rows_at_different_steps_is_that_of_each_step():
    rows, positions = torch.tensor([4, 0, 9]), torch.arange(5, 9)
    mixed = Noise(7, rows, positions, torch.tensor([[2], [0], [5]])).uniform(3)
    for i, k in enumerate((2, 0, 5)):
        assert torch.equal(mixed[i], Noise(7, rows, positions, k).uniform(3)[i])


def test_options_out_of_range_are_refused():
    model, process = small("fast", "masked", 0)
    for bad in (
        {"rule": "surest"},
        {"threshold": 1.1, "rule": "threshold"},
        {"threshold": -0.1, "rule": "threshold"},
        {"threshold": 0.5},
        {"drafts": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            texts("fast", model, process, [()], "freedave", **bad)
