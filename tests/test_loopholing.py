"""
Why believe methods/loopholing.py? At first it is the plain network bit for bit. No gradient reaches the first
of its two passes. A text begins without a latent, and each step hands its own to the next. The AR mode does
not read it.
"""

import pytest
import torch
from conftest import TINY, run
from exact import KINDS, V3, agree, last, net

import diffusion as d
import sample
import train as training
from eval import main as evaluate
from fast.block import FastBlock, generate
from generate import Block
from methods import loopholing
from methods.loopholing import Loopholing, TwoPasses, two_passes
from rng import Noise
from run import checkpoint
from run.restore import rebuild
from samplers import SAMPLERS


def loop(process, seed=0, random=True, **kw):
    """A Loopholing network with the weights of exact.net; random: gain and bias of its own norm too."""
    plain = net(process, seed=seed, **kw).double()
    plain.head.weight.data *= 0.2  # nearly certain tokens would not feel a latent
    model = Loopholing(plain.cfg).double().eval()
    own = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(own.missing_keys) == {"carry_norm.weight", "carry_norm.bias"} and not own.unexpected_keys
    if random:
        torch.nn.init.normal_(model.carry_norm.weight, 0.5, 1.0)
        torch.nn.init.normal_(model.carry_norm.bias, 0.0, 0.5)
    return plain, model


def inputs():
    """x0 and xt (4, 8), block sizes (4,), noise levels (4,)."""
    x0, xt = torch.randint(V3, (2, 4, 8), generator=torch.Generator().manual_seed(1))
    return x0, xt, torch.tensor([1, 2, 4, 8]), torch.tensor([6.9, 0.3, 1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_it_is_the_plain_network_bit_for_bit(kind):
    make, kw = KINDS[kind]
    plain, model = loop(make(), random=False, **kw)
    x0, xt, sizes, sigma = inputs()
    h = torch.randn(4, 8, plain.cfg.d_model, dtype=torch.float64)
    want = plain(x0, xt, sizes, 0, sigma)
    assert torch.equal(model(x0, xt, sizes, 0, sigma, carry=h), want)
    assert torch.equal(model(x0, xt, sizes, 0, sigma), want)
    assert torch.equal(TwoPasses(model)(x0, xt, sizes, 0, sigma), want)
    with torch.no_grad():
        model.carry_norm.weight += 0.1
    assert torch.equal(model(x0, xt, sizes, 0, sigma), want)
    assert not torch.equal(model(x0, xt, sizes, 0, sigma, carry=h), want)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_first_pass(kind):
    """
    The gradient is that of a network with h as a constant. With h as a function of the weights it is another.
    """
    make, kw = KINDS[kind]
    process, (_, model) = make(), loop(make(), **kw)
    x0, _, sizes, _ = inputs()
    t = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)

    def slopes(loss):
        total, _ = loss(process, x0, sizes, t, "ce", noise=Noise(3, torch.arange(4), torch.arange(8)))
        return torch.autograd.grad(total, list(model.parameters()))

    def given(with_gradient):
        def ask(clean, noisy, block_size, start=0, sigma=None):
            _, h = model(clean, noisy, block_size, start, sigma, returns="both")
            h = torch.where((block_size == 1)[:, None, None], 0.0, h)
            return model(clean, noisy, block_size, start, sigma, carry=h if with_gradient else h.detach())

        ask.timeless = model.timeless
        return slopes(lambda *args, **how: d.token_loss(ask, *args, **how))

    ours = slopes(lambda *args, **how: two_passes(model, *args, **how))
    agree(ours, given(False))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(ours, given(True), strict=True))
    assert all(g.isfinite().all() for g in ours) and ours[-1].abs().max() > 0


@pytest.mark.parametrize("block", [FastBlock, Block])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_begins_without_a_latent_and_hands_it_on(kind, block):
    """
    Of every step: what the network was given, and that its logits are those of a network asked without a
    cache.
    """
    make, kw = KINDS[kind]
    process, (_, model), seen = make(), loop(make(), **kw), []
    forward = model.forward

    def spy(clean, noisy, block_size, start=0, sigma=None, cache=None, carry=None, returns="logits"):
        out = forward(clean, noisy, block_size, start, sigma, cache, carry=carry, returns=returns)
        seen.append((start, clean, noisy, sigma, carry, out))
        return out

    model.forward = spy
    how = {"block_size": 4, "steps": 3, "seed": 2, "block_class": block}
    prompts, text = [(), (1,)] * 10, torch.full((20, 0), 0)
    state = last(generate(model, process, prompts, sampler=loopholing.loopholing, **how))
    assert state.nfe == len(seen) == 2 * 3
    for k, (start, clean, noisy, sigma, carry, (logits, h)) in enumerate(seen):
        if k % 3 == 0:
            text = torch.cat((text, clean), dim=1)  # the cache has the rest
            assert carry is None and text.size(1) == start
        else:
            assert torch.equal(carry, seen[k - 1][-1][1]), "the h of the step before"
        with torch.inference_mode():
            carry = torch.zeros_like(h) if carry is None else carry
            want = forward(text, noisy, 4, start, sigma, carry=carry, returns="both")
        agree([logits, h], want)
    model.forward = forward
    how["sampler"] = loopholing.loopholing
    again = lambda **more: last(generate(model, process, prompts, **how, **more)).x
    assert torch.equal(again(), state.x) and torch.equal(again(use_cache=False), state.x)
    assert not torch.equal(again(carry=False), state.x)
    free = last(generate(model, process, prompts, **how | {"sampler": SAMPLERS["ancestral"]})).x
    assert torch.equal(again(carry=False), free), "without the latent it is ancestral sampling"


@pytest.mark.parametrize("kind", KINDS)
def test_the_ar_mode_does_not_depend_on_the_latent(kind):
    make, kw = KINDS[kind]
    process, (_, model) = make(), loop(make(), **kw)
    x0, xt, sizes, sigma = inputs()
    ours, once = TwoPasses(model)(x0, xt, sizes, 0, sigma), model(x0, xt, sizes, 0, sigma)
    assert torch.equal(ours[sizes == 1], once[sizes == 1])
    assert not torch.equal(ours[sizes > 1], once[sizes > 1])
    # in the cache: a verification behind blocks written with a latent is that of a network without any past
    told = []

    def sampler(block):
        yield from loopholing.loopholing(block)
        at, y = int(block.positions[0]), block.x.clone()
        clean = torch.cat((block.text[:, :at], y), dim=1)
        level = d.sigma_for(model, torch.zeros(1, dtype=torch.float64))
        told.append(at)
        agree(block.verify(y), model(clean, block.ar_input(), 1, at, level))

    for block in (FastBlock, Block):
        last(generate(model, process, [()] * 3, block_size=4, steps=3, sampler=sampler, block_class=block))
    assert told == [0, 4] * 2
    # and so the loss of block size 1, which is what eval.py calls exact
    how = {"noise": Noise(3, torch.arange(4), torch.arange(8))}
    t = torch.full((4,), 0.5, dtype=torch.float64)
    one = two_passes(model, process, x0, 1, t, "elbo", **how)[1]
    how = {"noise": Noise(3, torch.arange(4), torch.arange(8))}
    assert torch.equal(one, d.token_loss(model, process, x0, 1, t, "elbo", **how)[1])


def test_a_checkpoint_is_trained_resumed_loaded_sampled_and_evaluated(project, capsys):
    """That a resumed run is the same run bit for bit: test_train.py, of all methods."""
    flags = [
        *TINY,
        "--dataset=pairs",
        "--block_sizes=1:0.25,4:0.75",
        "--eval_every=15",
        "--lr=0.1",
        "--warmup=1",
    ]
    flags += ["--method=loopholing", "--out_dir=b", "--lr_schedule=constant"]
    run(training.main, *flags, "--max_steps=15")
    run(training.main, *flags, "--max_steps=30", "--resume")
    state = checkpoint.load("b")
    assert state["step"] == 30
    assert state["method"] == {"name": "loopholing", "settings": {"self_cond_rate": 0.9}, "state": {}}
    assert state["model"]["carry_norm.weight"].abs().max() > 0, "the latent is learned"
    _, _, _, model, process = rebuild("b", torch.device("cpu"))
    assert type(model) is Loopholing
    capsys.readouterr()
    texts = {}
    for sampler in ("loopholing", "loopholing --carry=false", "ancestral", "arpc", "speculation", "ar"):
        name, *more = sampler.split()
        run(sample.main, "--ckpt=b", "--device=cpu", f"--sampler={name}", *more, "--n_samples=20")
        texts[sampler] = [line for line in capsys.readouterr().out.splitlines() if line[:3] != "---"][1:]
        assert "NFE" in texts[sampler].pop(), sampler
    assert texts["loopholing --carry=false"] == texts["ancestral"]
    assert texts["speculation"] == texts["ar"]
    run(evaluate, "--ckpt=b", "--device=cpu", "--n_eval=8", "--n_mc=2")
    assert "nats" in capsys.readouterr().out


def test_what_it_cannot_serve_is_refused(slip, project):
    err = slip(training.main, argv=[*TINY, "--dataset=pairs", "--method=loopholing", "--self_cond_rate=1.5"])
    assert "self_cond_rate" in err
    err = slip(
        training.main,
        argv=[*TINY, "--dataset=pairs", "--method=loopholing", "--next_token", "--block_sizes=1:1"],
    )
    assert "next-token" in err
    process = d.Masked(V3 + 1, V3)
    with pytest.raises(ValueError, match="--method loopholing"):
        last(generate(net(process), process, [()], block_size=4, sampler=loopholing.loopholing))
