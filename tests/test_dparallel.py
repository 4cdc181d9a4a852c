"""
Why believe methods/dparallel.py? The two halves of a block are complements. The loss is recomputed token by
token, and its entropy pushes nothing where the network is wrong. The texts are those that the network wrote
before the first step.
"""

import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import TINY
from exact import GENERATE, KINDS, V3, agree, last, net, on

import diffusion as d
import train as training
from generate import SAMPLERS
from methods import dparallel
from rng import Noise
from run import checkpoint
from run.restore import rebuild

MASKED = d.Masked(V3 + 1, V3)


def test_the_entropy_pushes_nothing_where_the_network_is_wrong():
    g = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(3, 5, V3 + 1, generator=g, dtype=torch.float64)).requires_grad_()
    y = torch.randint(V3, (3, 5), generator=g)
    masked = torch.rand(3, 5, generator=g) < 0.7
    logp = lambda: MASKED.loo_logits(logits).clamp(min=-1e9).log_softmax(-1)
    loss = lambda weight: dparallel.certainty_loss(logp(), y, masked, weight, 0.5)
    p = logits.detach()[..., :V3].softmax(-1)
    right = masked & (p.argmax(-1) == y)
    assert right.any() and (masked & ~right).any()
    sharp = p.square() / p.square().sum(-1, keepdim=True)  # p^(1/T) with T = 1/2
    H = -(sharp * sharp.log()).sum(-1)
    ce = -p.gather(-1, y[..., None])[..., 0].log()
    agree(loss(3.0).detach(), ce[masked].mean() + 3.0 * H[right].mean())
    agree(loss(0.0).detach(), ce[masked].mean())
    (slope,) = torch.autograd.grad(loss(3.0) - loss(0.0), logits)
    assert slope.isfinite().all() and (slope[~right] == 0).all()
    assert (slope[right][:, :V3].abs().amax(-1) > 0).all() and (slope[..., V3] == 0).all()
    moved = torch.where(right[..., None], slope, 0.0)
    sure = (logits.detach() - 0.01 * moved / moved.abs().max())[..., :V3].softmax(-1)
    assert (sure[right].amax(-1) > p[right].amax(-1)).all(), "downhill is surer"


class Asked:
    """A network that answers by a table, and remembers what it was asked."""

    module = SimpleNamespace(timeless=True)

    def __init__(self):
        g = torch.Generator().manual_seed(1)
        self.table = torch.randn(V3 + 1, 6, V3 + 1, generator=g, dtype=torch.float64)

    def __call__(self, clean, noisy, block_size, start=0, sigma=None):
        self.seen = clean, noisy, block_size
        return self.table[noisy, torch.arange(6)]


@pytest.mark.parametrize("certainty", [2.0, 0.0])
def test_the_loss_is_that_of_two_complementary_copies(certainty):
    B, L = 40, 6
    g = torch.Generator().manual_seed(2)
    x0 = torch.randint(V3, (B, L + 2), generator=g)
    given = torch.rand(B, L + 2, generator=g) < 0.2
    charged = ~given & (torch.rand(B, L + 2, generator=g) < 0.8)
    sizes = torch.tensor([1, 2, 2, 1] * 10)
    cfg = SimpleNamespace(accumulation=1)
    s = dparallel.Settings(size=2, certainty=certainty)
    learner, ask = dparallel.Learner(cfg, s, None, MASKED, None), Asked()
    noise = Noise(3, torch.arange(B), torch.arange(2, L + 2))
    total, _ = learner.own_loss(
        ask, MASKED, x0, sizes, torch.rand(B).double(), "ce", given, charged, d.loglinear, 2, noise
    )
    x, given, charged, own = x0[:, 2:], given[:, 2:], charged[:, 2:], sizes > 1
    clean, read, asked_sizes = ask.seen
    assert torch.equal(clean, torch.cat((x0, x0[own]))) and torch.equal(asked_sizes[:B], sizes)
    assert torch.equal(asked_sizes[B:], sizes[own])
    first, second = read[:B][own] == V3, read[B:] == V3
    assert torch.equal(first ^ second, charged[own]) and not (first & second).any()
    assert torch.equal(torch.where(first, x[own], read[:B][own]), x[own]), "what is no mask is the text"
    assert torch.equal(torch.where(second, x[own], read[B:]), x[own])
    assert torch.equal(read[:B][~own], torch.where(given, x, V3)[~own]), "AR reads pure noise"
    half = first.sum() / charged[own].sum()
    assert 0.4 < half < 0.6
    logp = MASKED.loo_logits(ask.table[read, torch.arange(L)]).log_softmax(-1)
    ce = -logp.gather(-1, torch.cat((x, x[own]))[..., None])[..., 0]
    want = ce[:B][charged & ~own[:, None]].sum()
    for p, masked in ((logp[:B][own], first), (logp[B:], second)):
        finite = p.clamp(min=-1e9)
        one = dparallel.certainty_loss(finite, x[own], masked, certainty, 0.5)
        want = want + one * charged[own].sum()
    agree(total, want)
    assert learner.token_loss == learner.own_loss


@pytest.mark.parametrize("path", GENERATE)
def test_the_sampler_commits_what_has_little_entropy(path):
    process = KINDS["masked"][0]()
    lesson = net(process, seed=0).double()
    model, quick = on(path, net(process, seed=0).double(), process)
    prompts = [(0,), (1,), (2,)]  # never all masks: each processor breaks ties its own way
    passes = set()
    for bound in (0.0, 0.2, 0.6, 2.0):
        for prompt in prompts:
            state = last(
                GENERATE[path](
                    model, quick, [prompt], block_size=4, sampler=dparallel.certain, bound=bound,
                    temperature=0.0, max_new_tokens=4 - len(prompt),
                )
            )  # fmt: skip
            x, n = [*prompt, *[V3] * (4 - len(prompt))], 0
            while V3 in x:
                with torch.no_grad():
                    p = lesson(torch.zeros(1, 0).long(), torch.tensor([x]), 4)[0, :, :V3].softmax(-1)
                H = (-(p * p.log()).sum(-1)).tolist()
                left = [i for i in range(4) if x[i] == V3]
                take = {i for i in left if H[i] <= bound} | {min(left, key=lambda i: (H[i], i))}
                x, n = [int(p[i].argmax()) if i in take else x[i] for i in range(4)], n + 1
            assert state.x[0].tolist() == x and state.nfe == n
            passes.add((bound, n))
    assert len({n for _, n in passes}) > 2
    with pytest.raises(ValueError, match="bound"):
        last(GENERATE[path](model, quick, [()], block_size=4, sampler=dparallel.certain, bound=-1.0))


def go(*argv):
    with patch.object(sys, "argv", ["train.py", *argv]):
        training.main()


def same(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.slow
def test_the_texts_are_the_networks_own_and_a_resumed_run_has_them(project, slip):
    base = [*TINY, "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--lr=0.05", "--max_steps=6"]
    go(*base, "--out_dir=net", "--warmup=1")
    flags = ["--method=dparallel", "--ckpt=net", "--texts=5", "--device=cpu", "--lr=0.01", "--n_eval=4"]
    go(*flags, "--max_steps=4", "--out_dir=whole")
    go(*flags, "--max_steps=2")
    go(*flags, "--max_steps=4", "--resume")
    whole, parts, before = (checkpoint.load(name) for name in ("whole", "net_dparallel", "net"))
    assert same(whole["model"], parts["model"]) and same(whole["ema"], parts["ema"])
    assert not same(whole["model"], before["ema"])
    texts = whole["method"]["state"]
    assert same(texts, parts["method"]["state"]) and len(texts["x0"]) >= 5
    _, _, _, model, process = rebuild("net", torch.device("cpu"))
    for row, given in zip(texts["x0"], texts["given"], strict=True):
        first = int((~given).int().argmax())
        begin = first // 4 * 4
        assert given[begin + 4 :].all() and given[:first].all(), "one block"
        end = begin + 4
        how = {"block_size": 4, "sampler": SAMPLERS["confidence"], "temperature": 0.0}
        state = last(GENERATE["fast"](model, process, [row[:first]], max_new_tokens=end - first, **how))
        assert state.x[0].tolist()[:end] == row[:end].tolist()
    go(*base, "--out_dir=uniform", "--process=uniform")
    for bad, says in (
        (["--ckpt=uniform"], "masked noise"),
        (["--ckpt=net", "--certainty=-1"], "certainty cannot be -1"),
        (["--ckpt=net", "--entropy_temperature=0"], "entropy_temperature"),
    ):
        assert says in slip(training.main, argv=["--method=dparallel", "--device=cpu", *bad]), bad
