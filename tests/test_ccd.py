"""
Why believe samplers/ccd.py? On networks whose tokens depend on each other it follows its rule, written out in
plain loops. In one step it is `confidence`. A mean is never less uncertain than what it is a mean of.
"""

import math

import pytest
import torch
from conftest import slow
from exact import GENERATE, KINDS, Couplings, last, net, on

from samplers import SAMPLERS
from samplers.pieces import entropy


def by_the_rule(model, process, b, steps, history, bound):
    """The text of temperature 0 behind no prompt: means, entropies and commitments, a position at a time."""
    x, past, passes = [process.mask_id] * b, [], 0
    for k in range(steps):
        with torch.no_grad():
            logits = model(torch.zeros(1, 0).long(), torch.tensor([x]), b, 0)
        past = [*past, process.loo_logits(logits)[0].double().softmax(-1).tolist()][-history:]
        passes += 1
        mean = [[sum(p[i][v] for p in past) / len(past) for v in range(len(past[0][0]))] for i in range(b)]
        h = [-sum(q * math.log(q) for q in mean[i] if q > 0) for i in range(b)]
        left = [i for i in range(b) if x[i] == process.mask_id]
        want = math.ceil(b * (k + 1) / min(steps, b))
        sure = sorted(left, key=lambda i: h[i])
        take = set(sure[: max(1, want - (b - len(left)))]) | {i for i in left if h[i] <= bound}
        for i in left if k + 1 == steps else take:
            x[i] = mean[i].index(max(mean[i]))
        if process.mask_id not in x:
            return x, passes
    return x, passes


def test_it_follows_its_rule():
    texts, process = {}, KINDS["masked"][0]()
    for seed in range(6):
        model = Couplings(process, 6, seed)
        for history, bound, steps in ((1, 0.0, 6), (2, 0.0, 6), (3, 0.0, 3), (2, 0.3, 6)):
            how = {"history": history, "bound": bound, "steps": steps, "block_size": 6, "temperature": 0.0}
            how |= {"max_new_tokens": 6, "seed": seed, "use_cache": False}
            state = last(GENERATE["lesson"](model, process, [()] * 2, sampler=SAMPLERS["ccd"], **how))
            want, passes = by_the_rule(model, process, 6, steps, history, bound)
            assert state.x.tolist() == [want] * 2 and state.nfe == passes, how
            texts.setdefault((history, bound, steps), []).append((*want, passes))
    assert len({tuple(t) for t in texts.values()}) == 4, "the options are felt"


@pytest.mark.parametrize("kind", slow(KINDS, ["masked"]))
def test_in_one_step_it_is_confidence(kind):
    make, kw = KINDS[kind]
    model, process = on("fast", net(make(), seed=3, **kw).double(), make())
    how = {"block_size": 4, "max_new_tokens": 3, "steps": 1, "seed": 2, "top_p": 0.9, "temperature": 0.8}
    prompts = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0)] * 5
    run = lambda name: last(GENERATE["fast"](model, process, prompts, sampler=SAMPLERS[name], **how))
    assert torch.equal(run("ccd").x, run("confidence").x)


def test_a_mean_is_less_certain():
    torch.manual_seed(0)
    p = torch.randn(3, 50, 4, dtype=torch.float64).softmax(-1)
    assert (entropy(p.mean(0).log()) >= entropy(p.log()).mean(0) - 1e-12).all()


def test_options_out_of_range_are_refused():
    model, process = on("fast", net(KINDS["masked"][0]()), KINDS["masked"][0]())
    for bad in ({"history": 0}, {"bound": -1.0}, {"bound": math.inf}, {"bound": math.nan}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            last(GENERATE["fast"](model, process, [()], block_size=4, sampler=SAMPLERS["ccd"], **bad))
