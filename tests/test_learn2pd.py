"""
Why believe methods/learn2pd.py? A filter that says always is `threshold` at 0, one that says never is
`confidence`, one token a step. Any other follows its rule, written out in plain loops, with the end of text.
The replay ends in the text that it follows. The network is not touched by training.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run, slow
from exact import GENERATE, KINDS, V3, agree, last, net, on

import sample
import train as training
from data.dataset import charged_tokens
from generate import SAMPLERS
from methods import _shared, learn2pd
from methods.learn2pd import Filter
from run import checkpoint
from run.restore import rebuild

PATHS = pytest.mark.parametrize("path", GENERATE)
RAGGED = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0), (1, 0)]


def with_part(process, part, seed=3, soft=0.3, **kw):
    """exact.net with a part beside it, in float64."""
    plain = net(process, seed=seed, **kw).double()
    plain.head.weight.data *= soft
    model = _shared.WithPart(plain.cfg, part).double().eval()
    model.load_state_dict(plain.state_dict())
    return model


def random_filter(size=4, sees="block", seed=0):
    torch.manual_seed(seed)
    part = Filter(size, 5, sees)
    for p in part.parameters():
        torch.nn.init.normal_(p, 0.0, 1.5)
    return part


def constant(size, value):
    part = random_filter(size)
    torch.nn.init.zeros_(part.layers[2].weight)
    torch.nn.init.constant_(part.layers[2].bias, value)
    return part


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", slow(KINDS, ["uniform denoiser, timed"]))
@PATHS
def test_always_is_threshold_0_and_never_is_confidence(path, kind, temperature):
    make, kw = KINDS[kind]
    for value, other, how in ((math.inf, "threshold", {"threshold": 0.0}), (-math.inf, "confidence", {})):
        model, process = on(path, with_part(make(), constant(4, value), **kw), make())
        shared = {"block_size": 4, "max_new_tokens": 3, "seed": 5, "temperature": temperature}
        run = lambda sampler, **own: last(
            GENERATE[path](model, process, RAGGED, sampler=sampler, **shared, **own)  # noqa: B023
        )
        ours, want = run(learn2pd.learn2pd, tau=0.5), run(SAMPLERS[other], **how)
        assert torch.equal(ours.x, want.x) and torch.equal(ours.nfe_rows, want.nfe_rows)
        model.part = random_filter().double()
        assert torch.equal(run(learn2pd.learn2pd, tau=float(value < 0)).x, want.x)


def by_the_rule(model, process, prompt, b, tau, end, guess):
    """A block at temperature 0 and its passes: the rule of the docstring in plain loops. Masked noise."""
    x, passes = [*prompt, *[process.mask_id] * (b - len(prompt))], 0
    while process.mask_id in x:
        passes += 1
        with torch.no_grad():
            logits = model(torch.zeros(1, 0).long(), torch.tensor([x]), b)[0]
            p = process.loo_logits(logits).softmax(-1)
            left = [i for i in range(b) if x[i] == process.mask_id]
            y = [int(p[i].argmax()) if i in left else x[i] for i in range(b)]
            c = [float(p[i, y[i]]) if i in left else 1.0 for i in range(b)]
            f = model.part(torch.tensor([c], dtype=torch.float64))[0].sigmoid().tolist()
        take = {i for i in left if f[i] > tau} | {max(left, key=lambda i: (c[i], -i))}
        ends = [i for i in range(len(prompt), b) if y[i] == end]
        fixed = [i for i in ends if i in take or i not in left]
        if guess and not fixed and ends:
            fixed = [max(ends, key=lambda i: (c[i], -i))]
        if fixed:
            take |= {i for i in left if i >= min(fixed)}
        x = [y[i] if i in take else x[i] for i in range(b)]
    return x, passes


@pytest.mark.parametrize("sees", slow(["block", "own"], ["block"]))
@PATHS
def test_it_follows_its_rule_with_the_end_of_text(path, sees):
    process, texts = KINDS["masked"][0](), set()
    # never all masks: they would tie, and each processor breaks ties its own way
    prompts = [(0,), (1,), (2,), (0, 1), (1, 2), (2, 2)]
    for seed in range(2):
        lesson = with_part(process, random_filter(sees=sees, seed=seed), seed=seed)
        model, quick = on(path, with_part(process, random_filter(sees=sees, seed=seed), seed=seed), process)
        for tau, end, guess in ((0.3, -1, False), (0.7, -1, False), (0.6, 1, False), (0.6, 1, True)):
            how = {"tau": tau, "end": end, "guess": guess, "sampler": learn2pd.learn2pd}
            for n in {len(p) for p in prompts}:
                some = [p for p in prompts if len(p) == n]
                state = last(
                    GENERATE[path](
                        model, quick, some, block_size=4, max_new_tokens=4 - n, temperature=0.0, **how
                    )
                )
                for row, prompt in enumerate(some):
                    x, passes = by_the_rule(lesson, process, prompt, 4, tau, end, guess)
                    assert state.x[row].tolist() == x and state.nfe_rows[row] == passes
                    texts.add((seed, prompt, tau, end, guess, passes))
    kinds = {key[2:5]: tuple(sorted(t[5] for t in texts if t[2:5] == key[2:5])) for key in texts}
    assert len(set(kinds.values())) == 4, "no two of the settings take the same passes"


def test_a_guess_counts_only_where_no_end_is_committed():
    block = SimpleNamespace(open=torch.ones(3, 4, dtype=torch.bool))
    y = torch.tensor([[1, 0, 1, 0]] * 3)
    left = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    take = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    sure = torch.tensor([[-0.1, -1.0, -0.5, -1.0]] * 2 + [[-0.5, -1.0, -0.1, -1.0]])
    found = lambda guess: learn2pd.behind(block, left, take, y, sure, 1, guess).int().tolist()
    assert found(False) == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert found(True) == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1]], "the surest of the proposed ends"


def learner_of(model, process, size=4, **settings):
    cfg = SimpleNamespace(block_sizes={1: 0.2, size: 0.8}, schedule="loglinear", init_from="")
    s = learn2pd.Settings(size=size, **settings)
    return learn2pd.Learner(cfg, s, model, process, None)


@pytest.mark.parametrize("kind", slow(KINDS, ["masked", "uniform loo"]))
@PATHS
def test_the_replay_ends_in_the_text_that_it_follows(path, kind):
    make, kw = KINDS[kind]
    model, process = on(path, with_part(make(), random_filter(), seed=0, soft=1.0, **kw), make())
    learner = learner_of(model, process)
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(V3, (40, 8), generator=g)
    open = torch.rand(40, 4, generator=g) < 0.8
    block, _ = learner.block(4, x0, open)
    final, seen = _shared.fill(block, SAMPLERS["confidence"]).clone(), []
    again, counts = learner.block(4, x0, open)
    _shared.fill(again, learn2pd.replay, final, seen)
    assert torch.equal(again.x, final) and torch.equal(final[~open], x0[:, 4:][~open])
    # what stands is right all the time, and each step says of what is left whether it is
    n = torch.stack([left.sum() for _, left, _ in seen])
    assert (n.diff() < 0).all() and n[0] == open.sum() and counts["nfe"] == len(seen)
    assert sum(int(right.sum()) for *_, right in seen) <= open.sum()
    assert all((c[~left] == 1).all() and (c[left] < 1).all() for c, left, _ in seen)
    wrong = any((left & ~right).any() for _, left, right in seen)
    assert wrong or kind == "uniform denoiser, ar token", "some proposals were not final"
    # another text is followed too, by copying where nothing agrees
    other = torch.where(open, (final + 1) % V3, final)
    strange, _ = learner.block(4, x0, open)
    _shared.fill(strange, learn2pd.replay, other, [])
    assert torch.equal(strange.x, other)


def test_what_a_replay_says_is_what_the_network_said():
    """Masked noise, one row: each record recomputed from the states it must have seen."""
    process = KINDS["masked"][0]()
    model = with_part(process, random_filter(), seed=1)
    learner = learner_of(model, process)
    x0 = torch.randint(V3, (30, 8), generator=torch.Generator().manual_seed(2))
    for row in x0:
        open, seen = torch.ones(1, 4, dtype=torch.bool), []
        final = torch.randint(V3, (1, 4), generator=torch.Generator().manual_seed(int(row.sum())))
        block, _ = learner.block(4, row[None], open)
        _shared.fill(block, learn2pd.replay, final, seen)
        x = [process.mask_id] * 4
        for c, left, right in seen:
            with torch.no_grad():
                p = process.loo_logits(model(row[None, :4], torch.tensor([x]), 4, 4))[0].softmax(-1)
            want = [i for i in range(4) if x[i] == process.mask_id]
            assert left[0].nonzero()[:, 0].tolist() == want
            good = [i for i in want if int(p[i].argmax()) == final[0, i]]
            assert right[0].nonzero()[:, 0].tolist() == good
            agree(c[0, left[0]], p.amax(-1)[left[0]])
            x = [int(final[0, i]) if i in good else x[i] for i in range(4)]


def test_the_loss_is_of_uncommitted_positions_alone():
    process = KINDS["masked"][0]()
    model = with_part(process, random_filter())
    learner = learner_of(model, process)
    g = torch.Generator().manual_seed(0)
    c, left, right = torch.rand(9, 4, generator=g).double(), torch.rand(9, 4, generator=g) < 0.6, None
    right = left & (torch.rand(9, 4, generator=g) < 0.5)
    charged = torch.ones(3, 8, dtype=torch.bool)
    learner.seen = [c, left, right]
    total, mean = learner.filter_loss(model, process, None, charged=charged)
    p = model.part(c).sigmoid()
    by_hand = [-(p[i, j] if right[i, j] else 1 - p[i, j]).log() for i, j in left.nonzero().tolist()]
    agree(mean, torch.stack(by_hand).mean().detach())
    agree(total.detach(), 24 * mean)
    learner.seen = [c, left, right | ~left]
    agree(learner.filter_loss(model, process, None, charged=charged)[1], mean)
    total.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved and all(name.startswith("part.") for name in moved)


def test_blocks_are_those_that_training_charges():
    g = torch.Generator().manual_seed(0)
    length, prompt = torch.randint(1, 13, (50,), generator=g), torch.randint(0, 9, (50,), generator=g)
    at = torch.arange(12)
    real, given = at < length[:, None], at < prompt[:, None]
    x0 = torch.zeros(50, 12, dtype=torch.long)
    charged = charged_tokens(given, real, 4)[1]
    found = {begin: open for begin, open in _shared.blocks_of(x0, given, real, 4)}
    for begin in (0, 4, 8):
        want = charged[:, begin : begin + 4]
        assert torch.equal(found[begin], want)
    nothing = torch.zeros(50, 12, dtype=torch.bool)
    assert _shared.blocks_of(x0, given, nothing, 4) == []


def same(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


def test_a_filter_is_trained_resumed_and_used(project, capsys, slip):
    base = [*TINY, "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--lr=0.05", "--max_steps=2"]
    run(training.main, *base, "--out_dir=net", "--warmup=1")
    flags = [
        "--method=learn2pd",
        "--ckpt=net",
        "--texts=9",
        "--device=cpu",
        "--lr_schedule=constant",
        "--n_eval=4",
    ]
    run(training.main, *flags, "--max_steps=4", "--out_dir=whole")
    run(training.main, *flags, "--max_steps=2")
    run(training.main, *flags, "--max_steps=4", "--resume")
    whole, parts, plain = (checkpoint.load(name) for name in ("whole", "net_learn2pd", "net"))
    assert same(whole["model"], parts["model"]) and same(whole["ema"], parts["ema"])
    assert same(plain["ema"], whole["ema"]), "the network is as it was"
    assert {k for k in whole["ema"] if k not in plain["ema"]} == {
        f"part.layers.{i}.{w}" for i in (0, 2) for w in ("weight", "bias")
    }
    assert whole["method"]["settings"]["size"] == 4 and whole["config"]["block_sizes"] == {1: 0.25, 4: 0.75}
    assert "another --out_dir" in slip(training.main, argv=[*flags, "--resume", "--texts=10"])
    capsys.readouterr()
    texts = {}
    for ckpt in ("net", "whole"):
        run(sample.main, f"--ckpt={ckpt}", "--device=cpu", "--sampler=threshold", "--n_samples=3", "--plain")
        texts[ckpt] = capsys.readouterr().out.splitlines()[1:-1]
    assert texts["net"] == texts["whole"], "other samplers do not notice the filter"
    use = ["--device=cpu", "--sampler=learn2pd", "--n_samples=3", "--prompt=ab."]
    run(sample.main, "--ckpt=whole", *use, "--temperature=0")
    first = capsys.readouterr().out.splitlines()[1:-1]
    run(sample.main, "--ckpt=whole", *use, "--temperature=0", "--plain")
    assert capsys.readouterr().out.splitlines()[1:-1] == first
    assert "--method learn2pd" in slip(sample.main, argv=["--ckpt=net", *use])
    assert "tau" in slip(sample.main, argv=["--ckpt=whole", *use, "--tau=1.5"])
    assert "guess" in slip(sample.main, argv=["--ckpt=whole", *use, "--guess=true"])
    model, process = rebuild("whole", torch.device("cpu"))[3:]
    with pytest.raises(ValueError, match="block_size must be 4"):
        last(GENERATE["fast"](model, process, [()], block_size=2, sampler=learn2pd.learn2pd))


def test_what_it_cannot_begin_with_is_refused(project, slip):
    base = [*TINY, "--dataset=pairs", "--max_steps=1"]
    run(training.main, *base, "--out_dir=ar", "--block_sizes=1:1")
    run(training.main, *base, "--out_dir=net", "--block_sizes=1:0.25,4:0.75")
    for flags, says in (
        (["--ckpt=ar"], "block size 1 alone"),
        (["--ckpt=none"], "no checkpoint none"),
        (["--ckpt=net", "--texts=0"], "texts cannot be 0"),
        (["--ckpt=net", "--sees=all"], "sees cannot be all"),
        (["--ckpt=net", "--size=3"], "size is 3"),
        (["--ckpt=net", "--init_from=ar"], "--ckpt"),
        (["--ckpt=net", "--fsdp=true"], "FSDP"),
    ):
        assert says in slip(training.main, argv=["--method=learn2pd", "--device=cpu", *flags]), flags
