"""
Why believe methods/token_editing.py? Without edits it is the sampler `threshold` with a capped noise level.
With edits it follows its rule, written out in plain loops. It never touches what was given, and takes at most
b + post passes. The training of masked networks: what they read has the law that it should have, and the loss
is recomputed token by token.
"""

import itertools
import math
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, slow
from exact import (
    GENERATE,
    KINDS,
    P_VALUE,
    V3,
    agree,
    blocks,
    by_hand,
    chi_squared,
    dense,
    draws,
    last,
    net,
    network,
    on,
    setup,
    tree,
)

import diffusion as d
import train as training
from generate import NOTHING
from methods import token_editing as method
from methods.token_editing import token_editing
from rng import Noise
from run import checkpoint
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


@pytest.mark.parametrize(
    "kind, seed",
    slow([("masked", 2), ("uniform loo", 3), ("uniform denoiser, timed", 5)], [("uniform loo", 3)]),
)
@pytest.mark.parametrize("path", slow(GENERATE, ["fast"]))
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


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_p": 1e-6}])
def test_the_surest_token_has_no_chance_in_it(how):
    model, process = on("fast", net(KINDS["masked"][0]()), KINDS["masked"][0]())
    rows = {"block_size": 4, "sampler": token_editing, "edit": 2.0}
    write = lambda **more: last(GENERATE["fast"](model, process, [()] * 20, **rows, **more)).x
    x = write(**how)
    assert (x == x[0]).all() and (write() != x).any()


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


# ----- training masked networks for it


class Asked:
    """A network that answers by a table, and remembers what it was asked."""

    module = SimpleNamespace(timeless=True)

    def __init__(self, L):
        g = torch.Generator().manual_seed(1)
        self.table = torch.randn(V3 + 1, L, V3 + 1, generator=g, dtype=torch.float64)

    def __call__(self, clean, noisy, block_size, start=0, sigma=None):
        self.read = noisy
        return self.table[noisy, torch.arange(noisy.size(1))]


@pytest.mark.parametrize("wrong, mask_id", [(0.3, V3), (0.0, V3), (0.3, 1)])
def test_it_reads_masks_and_wrong_tokens_and_pays_for_all(wrong, mask_id):
    process, B, L, start = d.Masked(V3 + 1, mask_id), 6000, 6, 2
    g = torch.Generator().manual_seed(0)
    real = torch.tensor([v for v in range(V3 + 1) if v != mask_id])
    x0 = real[torch.randint(V3, (B, L + start), generator=g)]
    given = torch.rand(B, L + start, generator=g) < 0.2
    charged = ~given & (torch.rand(B, L + start, generator=g) < 0.8)
    sizes, t = torch.tensor([1, 2, 2] * (B // 3)), torch.full((B,), 0.4).double()
    ask, noise = Asked(L), Noise(3, torch.arange(B), torch.arange(start, L + start))
    total, each = method.editing_loss(
        ask, process, x0, sizes, t, "ce", given, charged, d.loglinear, start, noise, wrong=wrong
    )
    x, given, charged, ar = x0[:, start:], given[:, start:], charged[:, start:], sizes == 1
    assert torch.equal(ask.read[ar], torch.where(given, x, mask_id)[ar])
    free = ~given & ~ar[:, None]
    assert torch.equal(ask.read[given], x[given])
    masked = (ask.read == mask_id)[free]
    p = torch.tensor([0.4, 0.6]).double()
    assert chi_squared(torch.tensor([masked.sum(), (~masked).sum()]), p) > P_VALUE
    # of the visible ones, by how far the token is from the right one: none, or a random one, itself among them
    index = torch.full((V3 + 1,), -1)
    index[real] = torch.arange(V3)
    step = (index[ask.read] - index[x])[free][~masked] % V3
    law = torch.full((V3,), wrong / V3).double()
    law[0] += 1 - wrong
    assert (step == 0).all() if wrong == 0 else chi_squared(step.bincount(minlength=V3), law) > P_VALUE
    logits = ask.table[ask.read, torch.arange(L)].index_fill(-1, torch.tensor(mask_id), -math.inf)
    want = -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0] * charged
    agree(each, want)
    agree(total, want.sum())
    assert (want[free & charged & (ask.read == x)] > 0).all(), "right tokens pay too"


@pytest.mark.slow
def test_training_is_resumed_and_refused(project, slip):
    def go(*argv):
        with patch.object(sys, "argv", ["train.py", *argv]):
            training.main()

    base = [*TINY, "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--lr=0.05", "--max_steps=4"]
    go(*base, "--out_dir=net", "--warmup=1")
    flags = ["--method=token_editing", "--ckpt=net", "--device=cpu", "--lr=0.01", "--n_eval=4"]
    go(*flags, "--max_steps=4", "--out_dir=whole")
    go(*flags, "--max_steps=2")
    go(*flags, "--max_steps=4", "--resume")
    weights = [checkpoint.load(name)["model"] for name in ("whole", "net_editing", "net")]
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])
    go(*base, "--out_dir=uniform", "--process=uniform")
    for bad, says in (
        (["--ckpt=uniform"], "wrong tokens already"),
        (["--ckpt=net", "--wrong=1"], "wrong is 1"),
    ):
        assert says in slip(training.main, argv=[*flags[:1], *bad, "--device=cpu"]), bad
