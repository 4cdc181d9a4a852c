"""
Why believe recorded.py? No GPU here: a Tape does on a CPU what a CUDA graph does, the same operations at the same addresses again, so
that whatever a recording would freeze is frozen, and a question to the host is an error. What CUDA itself makes of it is not tested.
"""

import functools
import weakref

import pytest
import torch
from exact import KINDS, V3, last, net
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import generate as g
from fast.cache import KVCache
from fast.graphs import Recorded, record
from samplers import reverse as s


class Tape(TorchDispatchMode):
    """
    Notes operations with the very tensors they read, and plays them again: what they return goes where it was. What was not made while it
    ran is for others to keep alive.
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
        self.made |= {id(x): x for x in tree_leaves(out) if torch.is_tensor(x) and not any(x is y for y in tree_leaves(args))}
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
    """Every Recorded that generate makes, on tape; and how often each of their tapes was played."""
    made, plays = [], []

    def counting(run):
        play, out = on_tape(run)
        plays.append(0)
        i = len(plays) - 1

        def again():
            plays[i] += 1
            play()

        return again, out

    monkeypatch.setattr(g, "Recorded", lambda model: made.append(Recorded(model, counting)) or made[-1])
    return made, plays


SERVED = [
    (k, f)
    for k in ("masked", "uniform denoiser, timed")
    for f in (s.ancestral, g.arpc, g.speculation, g.edlm, s.first_hitting)
    if k == "masked" or f is not s.first_hitting
]


@pytest.mark.parametrize("kind, sampler", SERVED, ids=lambda v: getattr(v, "__name__", v))
def test_recorded_passes_write_the_same_text(taped, kind, sampler):
    """Prompts of several lengths, rows that end at different blocks, AR first: the text is that of passes that are not recorded."""
    make, kw = KINDS[kind]
    process = make()
    model = net(process, seq_len=32, **kw).double()
    model.head.weight.data *= 0.1
    prompts = [(), (1,), (2, 0, 1, 1, 2), (0, 2)]
    how = {"block_size": 4, "sampler": sampler, "max_new_tokens": 24, "ar_tokens": 5, "eos_id": None, "seed": 3, "top_p": 0.9}
    for more in ({}, {"eos_id": 1, "ar_tokens": 0, "top_p": 1.0}):
        plain, played = (last(g.generate(model, process, prompts, graphs=graphs, **how | more)) for graphs in (False, True))
        assert torch.equal(plain.x, played.x) and plain.nfe == played.nfe
    made, plays = taped
    assert all(m.works for m in made) and max(plays) > 4, "played again and again, behind contexts of many lengths"


@pytest.mark.parametrize("timed", [False, True])
@torch.no_grad()
def test_a_recorded_pass_is_a_forward(timed):
    """Logits and the length of the cache, pass after pass: one noise level or one a row, a third of the tokens, two readings of a block."""
    model = net(KINDS["masked"][0](), seq_len=32, time_conditioning=timed).double()
    passes, x, cache = Recorded(model, on_tape), torch.randint(V3, (3, 32)), KVCache(model.cfg, 3, 40, dtype=torch.float64)
    both = torch.tensor([[1] * 4 + [4] * 4])
    for start in range(4, 32, 4):
        noisy, ask, at = torch.randint(V3, (3, 4)), torch.rand(3, 4) < 0.3, torch.arange(start, start + 4)
        ask[0, 0] = True
        two, levels = noisy.repeat(1, 2), torch.rand(3, 8).double()
        for sigma, how in ((torch.rand(1).double(), {}), (torch.rand(3).double(), {"ask": ask})):
            clean = x[:, cache.length : start]
            got, want = passes(clean, noisy, 4, start, sigma, cache, **how), model(x[:, :start], noisy, 4, start, sigma)
            assert (got - (want[ask] if how else want)).abs().max() < 1e-12 and cache.length == start
        got = passes(x[:, start : start + 4], two, both, at.repeat(2), levels, cache)
        assert (got - model(x[:, : start + 4], two, both, at.repeat(2), levels)).abs().max() < 1e-12 and cache.length == start + 4
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
    cache = next(c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, KVCache))
    return lambda: (play(), cache.k.zero_(), out.zero_()), out


def asks(run):
    return on_tape(lambda: run() + run().sum().item())


CANNOT = {record: "", asks: "asks the host", wrong: "something else", late: "something else", spoils: "something else",
          lambda run: (lambda: None, run()): "something else"}  # fmt: skip


@pytest.mark.parametrize("how", CANNOT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sampler, b", [(s.ancestral, 4), (s.ar, 1)], ids=["blocks", "ar"])
def test_what_cannot_be_recorded_is_run(capsys, monkeypatch, how, sampler, b):
    """Without a GPU, or where a pass asks the host, or where playing gives something else: one warning, and the same text."""
    process = KINDS["masked"][0]()
    model = net(process, seq_len=32).double()
    run = lambda graphs: last(g.generate(model, process, [()] * 3, block_size=b, sampler=sampler, seed=3, graphs=graphs)).x
    want = run(False)
    monkeypatch.setattr(g, "Recorded", functools.partial(Recorded, record=how))
    assert torch.equal(run(True), want)
    err = capsys.readouterr().err
    assert err.startswith("WARNING: no CUDA graphs: ") and CANNOT[how] in err and err.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind, sampler", SERVED, ids=lambda v: getattr(v, "__name__", v))
def test_graphs_write_the_same_text(capsys, kind, sampler):
    make, kw = KINDS[kind]
    process = make()
    model = net(process, seq_len=64, **kw).double().cuda()
    how = {"block_size": 4, "sampler": sampler, "ar_tokens": 8, "seed": 3}
    texts = [last(g.generate(model, process, [(), (1,), (2, 0, 1)], graphs=graphs, **how)).x for graphs in (False, True)]
    assert torch.equal(*texts) and not capsys.readouterr().err
