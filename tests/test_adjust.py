"""
Why believe methods/adjust.py? With a zero layer K tokens are drawn from the product of one prediction; with a
full pass at every token it is `first_hitting`, and with the network itself in the layer's place it is too,
token by token, whatever K. The loss is recomputed block by block.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run
from exact import GENERATE, P_VALUE, V3, agree, blocks, chi_squared, draws, last, net, on, product, states

import diffusion as d
import sample
import train as training
from generate import SAMPLERS
from methods import adjust as method
from methods.adjust import Adjusted, Adjuster, adjust, trajectory
from rng import Noise
from run import checkpoint

PATHS = pytest.mark.parametrize("path", GENERATE)
RAGGED = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0), (1, 0)]
MASKED = d.Masked(V3 + 1, V3)


def with_adjuster(seed=0, zero=False, sees=True, soft=0.3):
    plain = net(MASKED, seed=seed).double()
    plain.head.weight.data *= soft
    torch.manual_seed(seed)
    model = Adjusted(plain.cfg, Adjuster(plain.cfg), sees).double().eval()
    model.load_state_dict(plain.state_dict())
    if not zero:
        for p in model.part.parameters():
            torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.5)
    return model


def oracle(model):
    """The network itself in the place of the layer: what it says of the block as it stands, without context."""
    model.adjusted = lambda h, x, new: model(x[:, :0], x, x.size(1))
    return model


@PATHS
def test_a_full_pass_at_every_token_is_first_hitting(path):
    model, process = on(path, with_adjuster(), MASKED)
    run = lambda sampler, **own: last(
        GENERATE[path](
            model, process, RAGGED * 6, block_size=4, max_new_tokens=3, seed=3, sampler=sampler, **own
        )
    )
    ours, want = run(adjust, every=1), run(SAMPLERS["first_hitting"])
    assert torch.equal(ours.x, want.x) and torch.equal(ours.nfe_rows, want.nfe_rows)
    few = run(adjust, every=3)
    assert few.nfe_rows.max() < ours.nfe_rows.max() and not torch.equal(few.x, ours.x)
    cached, uncached = run(adjust, every=3), run(adjust, every=3, use_cache=False)
    assert torch.equal(cached.x, uncached.x)
    alone = last(
        GENERATE[path](
            model, process, RAGGED[:2], block_size=4, max_new_tokens=3, seed=3, sampler=adjust, every=3
        )
    )
    assert torch.equal(alone.x[:, :4], few.x[:2, :4])


@PATHS
def test_an_oracle_layer_draws_one_at_a_time_whatever_the_distance(path):
    """One block of three without context, temperatures 0 and 1, token by token what first_hitting draws."""
    model, process = on(path, oracle(with_adjuster()), MASKED)
    for temperature in (0.0, 1.0):
        run = lambda sampler, **own: last(
            GENERATE[path](
                model, process, [()] * 60, block_size=3, max_new_tokens=3, temperature=temperature,  # noqa: B023
                sampler=sampler, **own,
            )
        )  # fmt: skip
        want = run(SAMPLERS["first_hitting"]).x
        assert all(torch.equal(run(adjust, every=k).x, want) for k in (2, 3, 7))
    model, process = on(path, with_adjuster(), MASKED)
    assert not torch.equal(run(adjust, every=3).x, want), "a random layer is no oracle"


def one_at_a_time(model, b):
    """The exact distribution of a block written one token at a time in random order, (V3^b,), by recursion."""
    with torch.no_grad():
        x = states(V3 + 1, b)
        p = MASKED.loo_logits(model(x[:, :0], x, b)).softmax(-1)
    at = {tuple(row): p[i] for i, row in enumerate(x.tolist())}
    front = {(V3,) * b: 1.0}
    for n in range(b, 0, -1):
        after = {}
        for row, q in front.items():
            for i in [i for i in range(b) if row[i] == V3]:
                for v in range(V3):
                    y = (*row[:i], v, *row[i + 1 :])
                    after[y] = after.get(y, 0.0) + q / n * float(at[row][i, v])
        front = after
    return torch.tensor([front[tuple(row)] for row in states(V3, b).tolist()], dtype=torch.float64)


def test_a_zero_layer_is_the_product_and_an_oracle_the_chain():
    """Three positions, all drawn behind one pass: chi-squared against enumeration, and told apart."""
    zero = with_adjuster(seed=0, zero=True, soft=1.0)
    x = torch.full((1, 3), V3)
    with torch.no_grad():
        p = MASKED.loo_logits(zero(x[:, :0], x, 3)).softmax(-1)[..., :V3]
    independent, chain = product(p, states(V3, 3))[0], one_at_a_time(zero, 3)
    agree(independent.sum(), torch.ones((), dtype=torch.float64))
    agree(chain.sum(), torch.ones((), dtype=torch.float64))
    kw = {"every": 3, "use_cache": True}
    draws(blocks(zero, MASKED, 3, 8000, adjust, **kw), independent, chain)
    draws(blocks(oracle(zero), MASKED, 3, 8000, adjust, **kw), chain, independent)


def test_the_layer_is_told_what_was_placed_and_stays_inside_its_block():
    model = with_adjuster()
    x, new = torch.tensor([[0, 1, 2, V3]]), torch.tensor([[True, False, True, False]])
    h = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        one = model.adjusted(h, x, new)
        changed = model.adjusted(h, torch.tensor([[1, 1, 2, V3]]), new)
        assert not torch.equal(one, changed) and (one != changed).any(-1).all(), "every position hears of it"
        agree(model.adjusted(h, torch.tensor([[0, 2, 2, V3]]), new), one)
        assert not torch.equal(model.adjusted(h, x, ~new), one)
        both = model.adjusted(h.repeat(2, 1, 1), torch.cat((x, x.flip(1))), torch.cat((new, new)))
        agree(both[:1], one)
        blind = with_adjuster(sees=False)
        agree(blind.adjusted(h, x, new), blind.adjusted(h, x, ~new))
        still = with_adjuster(zero=True)
        agree(still.adjusted(h, x, new), still.to_logits(h))


def test_a_trajectory_places_one_to_three_tokens_of_the_text():
    B, L, b, K = 4000, 8, 4, 4
    g = torch.Generator().manual_seed(0)
    x, open = torch.randint(V3, (B, L), generator=g), torch.rand(B, L, generator=g) < 0.9
    xt, later = trajectory(x, open, V3, b, K, Noise(1, torch.arange(B), torch.arange(L)))
    before, after = (xt == V3), (later == V3)
    assert not (before & ~open).any() and (after <= before).all()
    assert torch.equal(xt[~before], x[~before]) and torch.equal(later[~after], x[~after])
    lifted = (before & ~after).view(B, 2, b).sum(-1).flatten()
    masks = before.view(B, 2, b).sum(-1).flatten()
    assert lifted.max() == K - 1 and (lifted <= masks).all() and (lifted[masks > 0] >= 1).all()
    many = masks == 4
    third = torch.full((3,), 1 / 3).double()
    assert chi_squared(lifted[many].bincount(minlength=4)[1:], third) > P_VALUE
    whole = open.view(B, 2, b).all(-1).flatten()
    assert chi_squared(masks[whole].bincount(minlength=5), torch.full((5,), 0.2).double()) > P_VALUE
    where = (before & ~after).view(2 * B, b)[many & (lifted == 1)].sum(0)
    assert chi_squared(where, torch.full((4,), 0.25).double()) > P_VALUE


def test_the_loss_is_the_kl_at_what_is_still_masked():
    B, start, b = 12, 4, 4
    model = with_adjuster()
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(V3, (B, 8), generator=g)
    charged = (torch.rand(B, 8, generator=g) < 0.8) & (torch.arange(8) >= start)
    cfg = SimpleNamespace(block_sizes={1: 0.2, 4: 0.8}, schedule="loglinear", init_from="")
    s = method.Settings(size=b, ahead=3)
    learner = method.Learner(cfg, s, model, MASKED, None)
    for begin in (start, 0):  # one block behind its context, and two blocks
        make = lambda: Noise(5, torch.arange(B), torch.arange(begin, 8))  # noqa: B023
        args = (x0, torch.ones(B).long(), None, "ce", ~charged, charged, d.loglinear, begin, make())
        total, mean = learner.adjust_loss(model, MASKED, *args)
        xt, later = trajectory(x0[:, begin:], charged[:, begin:], V3, b, 3, make())
        found = []
        with torch.no_grad():
            for row in range(B):
                for at in range(begin, 8, b):
                    here = slice(at - begin, at - begin + b)
                    one = lambda y: y[row : row + 1, here]  # noqa: B023
                    context = x0[row : row + 1, :at]
                    _, h = model(context, one(xt), b, at, returns="both")
                    p = MASKED.loo_logits(model(context, one(later), b, at))[0, :, :V3].softmax(-1)
                    q = MASKED.loo_logits(model.adjusted(h, one(later), one(later) != one(xt)))
                    q = q[0, :, :V3].softmax(-1)
                    kl = (p * (p / q).log()).sum(-1)
                    found += [kl[i] for i in range(b) if one(later)[0, i] == V3]
        agree(mean, torch.stack(found).mean())
        agree(total.detach(), mean * charged.sum())
    total.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved and all(name.startswith("part.") for name in moved)


def same(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.slow
def test_a_layer_is_trained_resumed_and_used(project, capsys, slip):
    base = [*TINY, "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--lr=0.05", "--max_steps=6"]
    run(training.main, *base, "--out_dir=net", "--warmup=1")
    flags = ["--method=adjust", "--ckpt=net", "--device=cpu", "--lr_schedule=constant", "--n_eval=4"]
    run(training.main, *flags, "--max_steps=4", "--out_dir=whole")
    run(training.main, *flags, "--max_steps=2")
    run(training.main, *flags, "--max_steps=4", "--resume")
    whole, parts, plain = (checkpoint.load(name) for name in ("whole", "net_adjust", "net"))
    assert same(whole["model"], parts["model"]) and same(whole["ema"], parts["ema"])
    assert same(plain["ema"], whole["ema"]) and whole["ema"]["part.out.weight"].abs().max() > 0
    capsys.readouterr()
    use = ["--device=cpu", "--sampler=adjust", "--n_samples=3", "--prompt=ab."]
    texts = []
    for more in ([], ["--plain"]):
        run(sample.main, "--ckpt=whole", *use, "--temperature=0", *more)
        texts.append(capsys.readouterr().out.splitlines()[1:-1])
    assert texts[0] == texts[1]
    assert "--method adjust" in slip(sample.main, argv=["--ckpt=net", *use])
    assert "every" in slip(sample.main, argv=["--ckpt=whole", *use, "--every=0"])
    run(training.main, *base, "--out_dir=uniform", "--process=uniform")
    for bad, says in (
        (["--ckpt=uniform"], "without a clock"),
        (["--ckpt=net", "--ahead=5"], "ahead is 5"),
    ):
        assert says in slip(training.main, argv=["--method=adjust", "--device=cpu", *bad]), bad
