"""
Why believe fast/graphs.py? No GPU here: a Tape does on a CPU what a CUDA graph does, the same operations at
the same addresses again, so that whatever a recording would freeze is frozen, and a question to the host is
an error. What CUDA itself makes of it is not tested.
"""

import copy
import functools
import weakref

import pytest
import torch
from conftest import slow
from exact import KINDS, V3, last, net, speed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fast.network
from fast.block import generate
from fast.graphs import Recorded, record
from fast.network import FastCache
from samplers import SAMPLERS


class Tape(TorchDispatchMode):
    """
    Notes operations with the very tensors they read, and plays them again: what they return goes where it
    was. What was not made while it ran is for others to keep alive.
    """

    def __init__(self):
        super().__init__()
        self.notes, self.made = [], {}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        with self:  # under inference mode operations come whole, and would hide what they ask
            if (out := f.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                return out
        if f in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{f} asks the host\nwhile it is being recorded")
        out, kwargs = f(*args, **(kwargs or {})), kwargs or {}
        note = lambda x: weakref.ref(x) if torch.is_tensor(x) and id(x) not in self.made else x
        self.notes.append((f, *tree_map(note, (args, kwargs)), out))
        self.made |= {
            id(x): x
            for x in tree_leaves(out)
            if torch.is_tensor(x) and not any(x is y for y in tree_leaves(args))
        }
        return out

    def play(self):
        def alive(x):
            if isinstance(x, weakref.ref):
                assert x() is not None, "freed, and still read"
                return x()
            return x

        for f, args, kwargs, out in self.notes:
            args, kwargs = tree_map(alive, (args, kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(f(*args, **kwargs)), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():  # no view, and nothing in place
                    old.copy_(new)


def on_tape(run):
    run()  # as record does: what is set up at a first call
    with Tape() as tape:
        out = run()
    return tape.play, out


@pytest.fixture
def taped(monkeypatch):
    """Every Recorded that a cache makes, on tape; and how often each of their tapes was played."""
    made, plays = [], []

    def counting(run):
        play, out = on_tape(run)
        plays.append(0)
        i = len(plays) - 1

        def again():
            plays[i] += 1
            play()

        return again, out

    monkeypatch.setattr(
        fast.network, "Recorded", lambda model: made.append(Recorded(model, counting)) or made[-1]
    )
    return made, plays


def recorded(model, on=True):
    """The same network, whose passes are recorded or not."""
    model.graphs = on
    return model


SERVED = [
    (k, name)
    for k in ("masked", "uniform denoiser, timed")
    for name in ("ancestral", "arpc", "speculation", "edlm", "first_hitting")
    if k == "masked" or "absorbing" not in SAMPLERS[name].needs
]


@pytest.mark.parametrize(
    "kind, sampler", slow(SERVED, [pair for pair in SERVED if pair[1] in ("ancestral", "arpc")])
)
def test_recorded_passes_write_the_same_text(taped, kind, sampler):
    """
    Prompts of several lengths, rows that end at different blocks, AR first: the text is that of passes that
    are not recorded.
    """
    make, kw = KINDS[kind]
    model, process = speed(net(make(), seq_len=32, **kw).double(), make())
    model.head.weight.data *= 0.1
    prompts = [(), (1,), (2, 0, 1, 1, 2), (0, 2)]
    how = {"block_size": 4, "sampler": SAMPLERS[sampler], "max_new_tokens": 24, "seed": 3}
    how |= {"ar_tokens": 5, "eos_id": None, "top_p": 0.9}
    for more in ({}, {"eos_id": 1, "ar_tokens": 0, "top_p": 1.0}):
        run = lambda on, how=how | more: last(generate(recorded(model, on), process, prompts, **how))
        plain, played = run(False), run(True)
        assert torch.equal(plain.x, played.x) and plain.nfe == played.nfe
    made, plays = taped
    assert all(m.works for m in made) and max(plays) > 4, (
        "played again and again, behind contexts of many lengths"
    )


@pytest.mark.parametrize("timed", [False, True])
@torch.no_grad()
def test_a_recorded_pass_is_a_forward(timed):
    """
    The lesson's logits and the length of the cache, pass after pass: one noise level or one a row, a third of
    the tokens, two readings of a block.
    """
    lesson = net(KINDS["masked"][0](), seq_len=32, time_conditioning=timed).double()
    model, _ = speed(copy.deepcopy(lesson), KINDS["masked"][0]())
    passes, x, cache = Recorded(model, on_tape), torch.randint(V3, (3, 32)), model.new_cache(3, 40)
    both = torch.tensor([[1] * 4 + [4] * 4])
    for start in range(4, 32, 4):
        noisy, ask, at = torch.randint(V3, (3, 4)), torch.rand(3, 4) < 0.3, torch.arange(start, start + 4)
        ask[0, 0] = True
        two, levels = noisy.repeat(1, 2), torch.rand(3, 8).double()
        for sigma, how in ((torch.rand(1).double(), {}), (torch.rand(3).double(), {"ask": ask})):
            clean = x[:, cache.length : start]
            got = passes(clean, noisy, 4, start, sigma, cache, **how)
            for one, near in ((model, 1e-12), (lesson, 1e-9)):
                want = one(x[:, :start], noisy, 4, start, sigma)
                assert (got - (want[ask] if how else want)).abs().max() < near and cache.length == start
        got = passes(x[:, start : start + 4], two, both, at.repeat(2), levels, cache)
        for one, near in ((model, 1e-12), (lesson, 1e-9)):
            want = one(x[:, : start + 4], two, both, at.repeat(2), levels)
            assert (got - want).abs().max() < near and cache.length == start + 4
        cache.length = start  # it was a guess
    assert passes.works and len(passes.kinds) == 3


def wrong(run):
    play, out = on_tape(run)
    return lambda: (play(), out.add_(1)), out


def late(run):
    """The first playing is right, and later ones give the same again."""
    play, out = on_tape(run)
    played = []
    return lambda: played or (play(), played.append(1)), out


def spoils(run):
    """It writes where it should not."""
    play, out = on_tape(run)
    cache = next(c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, FastCache))
    return lambda: (play(), cache.k.zero_(), out.zero_()), out


def asks(run):
    return on_tape(lambda: run() + run().sum().item())


CANNOT = {record: "", asks: "asks the host", wrong: "something else", late: "something else", spoils: "something else",
          lambda run: (lambda: None, run()): "something else"}  # fmt: skip


@pytest.mark.parametrize("how", slow(CANNOT, [record, wrong]), ids=lambda f: f.__name__)
@pytest.mark.parametrize("sampler, b", [("ancestral", 4), ("ar", 1)], ids=["blocks", "ar"])
def test_what_cannot_be_recorded_is_run(capsys, monkeypatch, how, sampler, b):
    """
    Without a GPU, or where a pass asks the host, or where playing gives something else: one warning, and the
    same text.
    """
    model, process = speed(net(KINDS["masked"][0](), seq_len=32).double(), KINDS["masked"][0]())
    asked = {"block_size": b, "sampler": SAMPLERS[sampler], "seed": 3}
    run = lambda on: last(generate(recorded(model, on), process, [()] * 3, **asked)).x
    want = run(False)
    monkeypatch.setattr(fast.network, "Recorded", functools.partial(Recorded, record=how))
    assert torch.equal(run(True), want)
    err = capsys.readouterr().err
    assert err.startswith("WARNING: no CUDA graphs: ") and CANNOT[how] in err and err.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind, sampler", SERVED)
def test_graphs_write_the_same_text(capsys, kind, sampler):
    make, kw = KINDS[kind]
    model, process = speed(net(make(), seq_len=64, **kw).double(), make())
    model.cuda()
    how = {"block_size": 4, "sampler": SAMPLERS[sampler], "ar_tokens": 8, "seed": 3}
    run = lambda on: last(generate(recorded(model, on), process, [(), (1,), (2, 0, 1)], **how)).x
    texts = run(False), run(True)
    assert torch.equal(*texts) and not capsys.readouterr().err
