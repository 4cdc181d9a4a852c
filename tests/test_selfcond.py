"""
Why believe methods/selfcond.py? Without a signal it is the plain network bit for bit. No gradient reaches the
first of its two passes. The AR loss is that of an ordinary next-token model, whatever the noisy stream holds.
The sampler follows its rule, written out in plain loops.
"""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, resumed, run
from exact import V3, agree, last, net

import diffusion as d
import eval as evaluation
import generate as lesson
import sample
import train as training
from fast.block import FastBlock, generate
from generate import Block
from methods import selfcond
from methods.selfcond import SelfConditioned, TwoPasses, next_token_nats, self_conditioned
from model import Transformer
from rng import Noise
from run.restore import rebuild
from samplers import SAMPLERS

PROCESS = d.Uniform(V3, "denoiser", ar_token=V3)
TIMED = pytest.mark.parametrize("timed", [False, True])


def conditioned(timed=False, seed=0):
    """A plain network with random weights, and a SelfConditioned one with the same and a random signal."""
    plain = net(PROCESS, seed=seed, time_conditioning=timed).double()
    plain.head.weight.data *= 0.4
    model = SelfConditioned(plain.cfg).double().eval()
    torch.manual_seed(seed + 1)
    for p in model.signal.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.5)
    model.load_state_dict(plain.state_dict(), strict=False)
    return plain, model


def inputs(n=4):
    """x0 and xt (n, 8), block sizes (n,), noise levels (n,)."""
    x0, xt = torch.randint(V3, (2, n, 8), generator=torch.Generator().manual_seed(1))
    level = torch.tensor([6.9, 0.3, 1.0, 2.0], dtype=torch.float64).repeat(n // 4)
    return x0, xt, torch.tensor([1, 2, 4, 8]).repeat(n // 4), level


def a_learner(**settings):
    cfg = type("Cfg", (), {"seed": 0})
    return selfcond.Learner(cfg, selfcond.Settings(**settings), None, PROCESS, d.token_loss)


def a_step(n=4, start=0):
    charged = torch.ones(n, 8) > 0
    charged[0, :3] = charged[1, -2:] = False
    charged[:, :start] = False
    how = {"given": torch.zeros(n, 8) > 0, "charged": charged, "start": start}
    return how, lambda: Noise(3, torch.arange(n), torch.arange(start, 8))


# ----- the network


@TIMED
def test_without_a_signal_it_is_the_plain_network_bit_for_bit(timed):
    plain, model = conditioned(timed)
    x0, xt, sizes, sigma = inputs()
    want = plain(x0, xt, sizes, 0, sigma)
    p = torch.rand(4, 8, V3, dtype=torch.float64)
    assert torch.equal(model(x0, xt, sizes, 0, sigma), want)
    assert torch.equal(model(x0, xt, sizes, 0, sigma, signal=0 * p), want)
    said = model(x0, xt, sizes, 0, sigma, signal=p)
    assert (said - want).abs().max() > 0.01
    fresh = SelfConditioned(plain.cfg).double().eval()
    fresh.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(fresh(x0, xt, sizes, 0, sigma, signal=p), want), "at first a signal changes nothing"
    torch.manual_seed(0)
    one = SelfConditioned(plain.cfg).state_dict()
    torch.manual_seed(0)
    assert all(torch.equal(one[k], v) for k, v in Transformer(plain.cfg).state_dict().items()), (
        "the same start"
    )


def test_the_signal_is_a_mean_embedding_through_two_layers():
    _, model = conditioned()
    p = torch.rand(2, 5, V3, dtype=torch.float64).softmax(-1)
    xt = torch.randint(V3, (2, 5))
    mean = sum(p[..., v, None] * model.embed.weight[v] for v in range(V3))
    h = (mean - mean.mean(-1, keepdim=True)) / (mean.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    norm, first, _, second = model.signal
    inner = F.gelu((h * norm.weight) @ first.weight.T, approximate="tanh")
    agree(model.embed_noisy(xt, p), model.embed.weight[xt] + inner @ second.weight.T)


def test_a_signal_reaches_the_noisy_tokens_of_its_row_and_no_clean_ones():
    _, model = conditioned()
    x0, xt, _, _ = inputs()
    p = torch.rand(4, 8, V3, dtype=torch.float64)
    p[2] = 0
    noisy, clean = model(x0, xt, 4, signal=p, returns="both")
    plainly, clean_too = model(x0, xt, 4, returns="both")
    assert torch.equal(clean, clean_too)
    changed = (noisy - plainly).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [True, True, False, True]


# ----- training


@TIMED
def test_no_gradient_reaches_the_first_pass(timed):
    _, model = conditioned(timed)
    x0, _, sizes, _ = inputs()
    t = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    how, noise = a_step()

    def slopes(loss):
        total, _ = loss(PROCESS, x0, sizes, t, "ce", noise=noise(), **how)
        return torch.autograd.grad(total, list(model.parameters()))

    def given(with_gradient):
        def ask(clean, noisy, block_size, start=0, sigma=None):
            p = model(clean, noisy, block_size, start, sigma).softmax(-1)
            p = torch.where((block_size == 1)[:, None, None], 0.0, p)
            return model(clean, noisy, block_size, start, sigma, signal=p if with_gradient else p.detach())

        ask.timeless = model.timeless
        return slopes(lambda *args, **more: d.token_loss(ask, *args, **more))

    learner = a_learner(self_cond_rate=1.0, ar_weight=0.0)
    ours = slopes(lambda *args, **more: learner.loss(0)(model, *args, **more))
    agree(ours, given(False))
    agree(slopes(lambda *args, **more: selfcond.bound(model, *args, **more)), given(False))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(ours, given(True), strict=True))


@TIMED
def test_both_passes_know_where_the_noisy_stream_begins(timed):
    _, model = conditioned(timed)
    sizes, t = torch.tensor([1, 2, 4, 4]), torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    charged = (torch.arange(8) >= 4).expand(4, 8)

    def nats(start):
        how = {"given": torch.zeros(4, 8) > 0, "charged": charged, "start": start}
        noise = Noise(3, torch.arange(4), torch.arange(start, 8))
        return selfcond.bound(model, PROCESS, inputs()[0], sizes, t, "ce", noise=noise, **how)[1]

    agree(nats(4), nats(0)[:, 4:])


def test_block_size_1_reads_no_signal():
    plain, model = conditioned()
    x0, xt, sizes, sigma = inputs()
    for shown in (None, torch.ones(4) > 0):
        ours = TwoPasses(model, shown)(x0, xt, sizes, 0, sigma)
        want = plain(x0, xt, sizes, 0, sigma)
        assert torch.equal(ours[0], want[0])
        assert ((ours - want).abs().amax((1, 2)) > 1e-3).tolist() == [False, True, True, True]
    t, (how, noise) = torch.full((4,), 0.5, dtype=torch.float64), a_step()
    one = selfcond.bound(model, PROCESS, x0, 1, t, "elbo", noise=noise(), **how)[1]
    assert torch.equal(one, d.token_loss(plain, PROCESS, x0, 1, t, "elbo", noise=noise(), **how)[1])


def test_the_signal_is_shown_in_as_many_rows_as_asked_however_a_batch_is_split():
    n, shares = 2000, {}
    x0, *_ = inputs(n)
    for rate in (0.0, 0.2, 1.0):
        for start in (0, 4):
            seen, (how, noise) = [], a_step(n, start)

            def spy(clean, noisy, *args, signal=None, returns="logits", seen=seen):
                seen.append((noisy, signal))
                logits = torch.zeros(*noisy.shape, V3, dtype=torch.float64)
                return (logits, logits) if returns == "both" else logits

            spy.timeless = True
            loss = a_learner(self_cond_rate=rate, ar_weight=0.0).loss(0)
            loss(spy, PROCESS, x0, 4, torch.full((n,), 0.5).double(), "ce", noise=noise(), **how)
            assert len(seen) == (2 if rate else 1), "no first pass for nobody"
            d.token_loss(spy, PROCESS, x0, 4, torch.full((n,), 0.5).double(), "ce", noise=noise(), **how)
            noisy, signal = seen[-2]
            assert torch.equal(noisy, seen[-1][0]), "the usual random numbers"
            shown = torch.zeros(n) > 0 if signal is None else signal.sum((1, 2)) > 0
            if signal is not None:
                agree(signal[shown], torch.full_like(signal[shown], 1 / V3))
            shares[rate, start] = shown
        assert torch.equal(shares[rate, 0], shares[rate, 4])
        share = shares[rate, 0].double().mean().item()
        assert abs(share - rate) <= 4 * math.sqrt(rate * (1 - rate) / n), share


def test_the_ar_loss_is_that_of_the_next_token_and_of_the_clean_stream_alone():
    _, model = conditioned(timed=True)
    x0, xt, sizes, sigma = inputs()
    how, noise = a_step()
    clean = model(x0, xt, sizes, 0, sigma, returns="both")[1]
    other = torch.randint(V3, xt.shape)
    assert torch.equal(clean, model(x0, other, 8, 0, 0.1 * sigma, returns="both")[1]), "it saw the noise"
    # one token after another, by a network that has nothing but the tokens before
    for row in range(4):
        for i in range(1, 8):
            h, cond = model.hidden(x0[row : row + 1, :i], None, 1)
            agree(clean[row, i - 1], model.to_logits(h, cond)[0, -1])
    log_p, charged = clean.log_softmax(-1), how["charged"]
    each = next_token_nats(clean, x0, charged)
    want = [[-log_p[r, i - 1, x0[r, i]] * charged[r, i] for i in range(1, 8)] for r in range(4)]
    agree(each, torch.stack([torch.stack(row) for row in want]))
    # and the loss of a step: the usual one, and so much more
    t = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    args = PROCESS, x0, sizes, t, "ce"
    alone = a_learner(self_cond_rate=0.5, ar_weight=0.0).loss(0)(model, *args, noise=noise(), **how)
    both = a_learner(self_cond_rate=0.5, ar_weight=0.7).loss(0)(model, *args, noise=noise(), **how)
    agree(both[0], alone[0] + 0.7 * each.sum())
    assert torch.equal(both[1], alone[1])
    usual = a_learner(self_cond_rate=0.0, ar_weight=0.0).loss(0)(model, *args, noise=noise(), **how)
    agree(usual[0], d.token_loss(model, *args, noise=noise(), **how)[0])
    slopes = torch.autograd.grad(both[0] - alone[0], [model.embed.weight, model.layers[0].qkv.weight])
    assert all(g.abs().max() > 1e-6 for g in slopes), "it teaches the layers"


# ----- sampling


def by_hand(seen, rule):
    """The sampler's rule for one row after another: (x, signal, ended) of a step's logits and random numbers."""

    def sampler(block):
        signal, ended = None, [False] * len(block.x)
        for k in range(block.steps):
            noise = block.noise(k)
            heat = rule["cold"] + (rule["hot"] - rule["cold"]) * (1 - k / block.steps)
            logits = block.forward(block.x, len(block.positions), block.alpha[k], signal=signal)
            signal = (logits / heat).softmax(-1)
            y, fresh = block.draw(signal.log(), noise), block.prior(noise)
            x = block.x.clone()
            for r in range(len(x)):
                places = [i for i in range(x.size(1)) if block.open[r, i]]
                h = {i: -sum(p * math.log(p) for p in signal[r, i].tolist()) for i in places}
                still = all(signal[r, i].argmax() == block.x[r, i] for i in places)
                end = k + 1 == block.steps or (still and sum(h.values()) / max(1, len(h)) <= rule["sure"])
                spent = 0.0
                for i in sorted(places, key=lambda i: round(h[i], 7)):
                    x[r, i] = y[r, i] if end or spent <= rule["bound"] else fresh[r, i]
                    spent += h[i]
                if ended[r]:
                    x[r] = block.x[r]
                ended[r] = ended[r] or end
            seen.append(sum(ended))
            block.x = x
            yield
            if all(ended):
                return

    return sampler


@pytest.mark.parametrize("block", [FastBlock, Block])
@TIMED
def test_the_sampler_follows_its_rule(block, timed):
    _, model = conditioned(timed, seed=int(timed))
    forward = model.forward  # equal tokens say the same at every position: a tie, not for rounding to decide
    model.forward = lambda *args, **how: (forward(*args, **how) * 1e9).round() / 1e9
    prompts, seen = [(), (1,), (0, 2, 1, 1, 2)] * 7, []
    rule = {"bound": 1.2, "hot": 1.5, "cold": 0.5, "sure": 0.7}
    run = {"block_size": 4, "steps": 6, "seed": 2, "block_class": block, "max_new_tokens": 3}
    write = lambda sampler, **how: last(generate(model, PROCESS, prompts, sampler=sampler, **run | how))
    ours, want = write(self_conditioned, **rule), write(by_hand(seen, rule))
    assert torch.equal(ours.x, want.x)
    assert len(set(seen)) > 3, "rows end at different steps"
    assert torch.equal(ours.x, write(self_conditioned, **rule, use_cache=False).x)
    assert not torch.equal(ours.x, write(self_conditioned, **rule, carry=False).x)
    alone = last(generate(model, PROCESS, prompts[:2], sampler=self_conditioned, **run, **rule))
    assert torch.equal(alone.x, ours.x[:2, : alone.x.size(1)]), "a text does not depend on its batch mates"


@pytest.mark.parametrize("block", [FastBlock, Block])
def test_every_step_is_given_the_prediction_before(block):
    _, model = conditioned()
    forward, seen = model.forward, []

    def spy(*args, signal=None, **how):
        logits = forward(*args, signal=signal, **how)
        seen.append((signal, logits))
        return logits

    model.forward = spy
    how = {"block_size": 4, "steps": 4, "seed": 1, "block_class": block, "sampler": self_conditioned}
    state = last(generate(model, PROCESS, [()] * 5, **how, sure=0.0, hot=0.9, cold=0.5))
    assert state.nfe == len(seen) == 2 * 4
    for k, (signal, _) in enumerate(seen):
        if k % 4 == 0:
            assert signal is None, "a block begins without one"
        else:
            heat = 0.5 + 0.4 * (1 - (k % 4 - 1) / 4)  # tempered, as it was drawn from
            agree(signal, (seen[k - 1][1] / heat).softmax(-1))
    seen.clear()
    last(generate(model, PROCESS, [()] * 5, **how, carry=False))
    assert all(signal is None for signal, _ in seen)


def test_a_network_that_is_certain_takes_two_passes_and_one_that_is_not_takes_all():
    _, model = conditioned()
    text = torch.tensor([2, 0, 1, 1])
    certain = 50.0 * F.one_hot(text, V3).double()
    fair = torch.zeros(4, V3, dtype=torch.float64)
    for said, passes in ((certain, 2), (fair, 6)):
        model.forward = lambda clean, noisy, *args, said=said, **how: said.expand(len(noisy), 4, V3)
        how = {"block_size": 4, "steps": 6, "max_new_tokens": 4, "sampler": self_conditioned, "seed": 3}
        state = last(generate(model, PROCESS, [()] * 9, **how))
        assert (state.nfe_rows <= passes).all() and state.nfe == passes
        if passes == 2:
            assert (state.x == text).all()
    # a prompt counts for nothing: what is said of it may be as uncertain as it likes
    half = torch.cat((fair[:1], certain[1:]))
    model.forward = lambda clean, noisy, *args, **how: half.expand(len(noisy), 4, V3)
    assert last(generate(model, PROCESS, [(2,)], **how | {"max_new_tokens": 3})).nfe <= 2
    # the last step keeps all
    nearly = certain / 10
    model.forward = lambda clean, noisy, *args, **how: nearly.expand(len(noisy), 4, V3)
    once = last(generate(model, PROCESS, [()] * 50, **how | {"steps": 1}, bound=0.0))
    assert (once.x == text).double().mean() > 0.95
    # what was wrong at first is right at the end: any token may change in any step
    rows = []
    model.forward = lambda clean, noisy, *args, **how: rows.append(noisy) or certain.expand(len(noisy), 4, V3)
    last(generate(model, PROCESS, [()] * 9, **how))
    assert not (rows[0] == text).all() and (rows[1] == text).all()


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_p": 1e-6}])
def test_the_surest_token_has_no_chance_in_it(how):
    _, model = conditioned()
    said = torch.linspace(0, 1, V3, dtype=torch.float64)
    model.forward = lambda clean, noisy, *args, **how: said.expand(len(noisy), 4, V3)
    rows = {"block_size": 4, "max_new_tokens": 4, "steps": 1, "sampler": self_conditioned}
    write = lambda **more: last(generate(model, PROCESS, [()] * 20, **rows, **more)).x[:, :4]
    assert (write(**how) == V3 - 1).all() and (write() != V3 - 1).any()


def test_what_is_published_is_the_default():
    """DiffusionGemma's bound, temperatures and limit."""
    own = {name: p.default for name, p in inspect.signature(self_conditioned).parameters.items()}
    assert own == {"block": inspect.Parameter.empty} | {
        "bound": 0.1, "hot": 0.8, "cold": 0.4, "sure": 0.005, "carry": True,
    }  # fmt: skip


@pytest.mark.parametrize("run", [generate, lesson.generate])
def test_any_request_is_served(run):
    """Cold, narrow, ragged, cut short, ended early; one row and 33."""
    _, model = conditioned(timed=True)
    prompts = [(), (1,), (0, 1, 2, 2, 1)] * 11
    for n, how in [(1, {"temperature": 0.0}), (33, {"top_p": 0.5, "eos_id": 2}), (2, {"max_new_tokens": 3})]:
        for own in ({}, {"bound": 0.0, "hot": 1.0, "cold": 1.0}, {"sure": 10.0}):
            how = {"block_size": 4, "steps": 2, "sampler": self_conditioned} | own | how
            text = last(run(model, PROCESS, prompts[:n], **how)).x
            assert text.max() < V3 and (text[:, 0] >= 0).all()
    for name in ("ancestral", "arpc", "entropy_bound", "psi"):
        last(run(model, PROCESS, [()], block_size=4, steps=2, sampler=SAMPLERS[name]))


# ----- the commands


FLAGS = [*TINY, "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--method=selfcond", "--n_layers=1"]
FLAGS += [
    "--lr_schedule=constant",
    "--eval_every=2",
    "--n_samples=0",
    "--n_eval=2",
    "--lr=0.01",
    "--warmup=1",
]


def test_a_checkpoint_is_resumed_bit_for_bit_sampled_and_evaluated(project, capsys):
    one, two = resumed(training.main, *FLAGS)
    assert one["method"]["settings"] == {"self_cond_rate": 0.5, "ar_weight": 1.0}
    assert one["config"]["time_conditioning"] == "false" and one["config"]["process"] == "uniform"
    assert one["model"]["signal.3.weight"].abs().max() > 0, "the signal is learned"
    assert type(rebuild("parts", torch.device("cpu"))[3]) is SelfConditioned
    capsys.readouterr()
    for sampler in ("self_conditioned", "self_conditioned --carry=false --bound=1", "ancestral"):
        name, *more = sampler.split()
        run(sample.main, "--ckpt=parts", "--device=cpu", f"--sampler={name}", *more, "--steps=2")
        assert "NFE" in capsys.readouterr().out
    run(evaluation.main, "--ckpt=parts", "--device=cpu", "--n_eval=8", "--n_mc=2")
    assert "uniform (selfcond)" in capsys.readouterr().out


def test_what_it_cannot_serve_is_refused(slip, project):
    for flags, word in (
        (["--self_cond_rate=1.5"], "self_cond_rate"),
        (["--self_cond_rate=-0.1"], "self_cond_rate"),
        (["--ar_weight=-1"], "ar_weight"),
        (["--ar_weight=inf"], "ar_weight"),
        (["--process=masked"], "uniform noise"),
        (["--objective=elbo"], "objective ce"),
        (["--block_sizes=1:1"], "block size above 1"),
        (["--block_sizes=4:1", "--clean_causal=false"], "block-causal"),
    ):
        assert word in slip(training.main, argv=[*FLAGS, *flags])
    plain, model = conditioned()
    ask = lambda net, process=PROCESS, **how: last(
        generate(net, process, [()], block_size=4, sampler=self_conditioned, **how)
    )
    with pytest.raises(ValueError, match="--method selfcond"):
        ask(plain)
    masked = d.Masked(V3 + 1, V3)
    with pytest.raises(ValueError, match="not defined for masked noise"):
        ask(net(masked), masked)
    for wrong in (
        {"bound": -1.0},
        {"bound": math.inf},
        {"cold": 0.9},
        {"cold": 0.0},
        {"sure": -1.0},
        {"sure": math.inf},
        {"hot": math.inf},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ask(model, **wrong)
