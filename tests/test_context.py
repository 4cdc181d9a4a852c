"""
Why believe a longer context? Factor 1 changes nothing, positions count by their differences alone, the fast form is
the lesson, and tokens that are skipped are read and not counted.
"""

import math

import pytest
import torch
from exact import GENERATE, V3, agree, last, net, on

import diffusion as d
import eval as evaluation
from data.dataset import Dataset
from options import TrainConfig
from run.restore import stretch


def stretched(factor, seq_len=0, path="lesson", **kw):
    process = d.Masked(V3 + 1, V3)
    model = net(process, **kw).double()
    stretch(model, TrainConfig(dataset="toy", seq_len=8, block_sizes={1: 0.5, 4: 0.5}), factor, seq_len)
    return on(path, model, process)


def passes(model):
    x = torch.randint(V3, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [model(x, x, 4), model(x, x, 1), model(x[:, :4], x[:, 4:], 4, 4)]


def test_factor_one_is_the_network_as_it_was():
    agree(passes(stretched(1.0)[0]), passes(net(d.Masked(V3 + 1, V3)).double()), 0)
    other = passes(stretched(4.0)[0])
    assert (other[0] - passes(stretched(1.0)[0])[0]).abs().max() > 1e-3


def test_the_angles_are_those_of_the_larger_base():
    """The fastest does not change, the slowest turns slower by factor^((d - 2) / d), d the width of a head."""
    at, width = torch.tensor([1]), 8
    (cos, sin), (cos4, sin4) = stretched(1.0)[0].rope(at), stretched(4.0)[0].rope(at)
    angle, angle4 = torch.atan2(sin, cos)[0], torch.atan2(sin4, cos4)[0]
    assert angle4[0] == angle[0]
    agree(angle4[-1], angle[-1] / 4 ** ((width - 2) / width))


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("path", GENERATE)
def test_shifting_all_positions_leaves_the_logits(path, factor):
    """A block without context at 0 and at 8; and with context, by moving what the angles are told."""
    model, _ = stretched(factor, 16, path)
    x = torch.randint(V3, (3, 4), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        agree(model(None, x, 4, 8), model(None, x, 4, 0))
    table = "rope_table" if path == "fast" else "rope"
    want, f = passes(model), getattr(model, table)
    with torch.no_grad():
        vars(model)[table] = lambda position: f(position + 5)
        if path == "lesson":  # fast/ refuses a network that was edited afterwards
            agree(passes(model), want)


def test_a_longer_context_is_written(slip):
    for path in GENERATE:
        model, process = stretched(2.0, 16, path)
        x = last(GENERATE[path](model, process, [(1,)], block_size=4)).x
        assert x.shape == (1, 16) and (x >= 0).all()
        assert torch.equal(last(GENERATE[path](model, process, [(1,)], block_size=4, use_cache=False)).x, x)
    for bad in ((0.0, 0), (math.inf, 0), (2.0, 4), (2.0, 18)):
        slip(lambda bad=bad: stretched(*bad))


def test_skipped_tokens_are_read_and_not_counted(project):
    """By hand: the NLL of the last tokens of each window, given all before them."""
    model, process = net(d.Masked(V3 + 1, V3), seq_len=8).double(), d.Masked(V3 + 1, V3)
    data = Dataset("toy", 8)
    found = evaluation.likelihood(model, process, data, [1, 4], n_eval=6, n_mc=2, skip=5)
    x = data.windows("val", found.index)[0]
    with torch.no_grad():
        log_p = process.loo_logits(model(x, torch.full_like(x, V3), 1)).log_softmax(-1)
    nats = -log_p.gather(-1, x[..., None])[..., 0][:, 5:].sum(1)
    agree(found.nats[1][0], nats, 1e-6)
    assert (found.tokens == 3).all() and not found.counted[:, :5].any() and found.counted[:, 5:].all()
    assert (evaluation.likelihood(model, process, data, [4], n_eval=6, n_mc=2).tokens == 8).all()
