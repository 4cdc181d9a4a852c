"""
Why believe methods/guidance.py? With exact networks on a small alphabet both kinds of guidance become the
reverse process given y as steps get short, and agree with each other at every gamma. The samplers draw from
the equations. The loss is the usual one with a label, plus the classifier's.
"""

import itertools
import math

import pytest
import torch
from conftest import TINY, resumed, run, slow
from exact import KINDS, V3, Bayes, agree, draws, forward_probs, last, net, product, states

import diffusion as d
import eval as evaluation
import generate as lesson
import sample
import train as training
from fast.block import FastBlock, generate
from generate import Block
from lab import guidance as lab
from methods import guidance
from methods.guidance import (
    NO_LABEL,
    Guided,
    classifier_based,
    classifier_based_probs,
    classifier_free,
    classifier_free_probs,
    exact_log_c,
    first_order_log_c,
    label_of,
    mix,
)
from model import Transformer
from rng import Noise
from run.restore import rebuild
from samplers import SAMPLERS

RULE = "0:1|2,2:0"
L = 3
BOTH = pytest.mark.parametrize("kind", ["masked", "uniform loo", "uniform denoiser, timed"])
GAMMAS = [0.0, 0.5, 1.0, 2.0, 6.0]


def guided(process, seed=0, layers=1, **kw):
    """A Guided network with random weights, its labels and its classifier too."""
    plain = net(process, seed=seed, **kw).double()
    model = Guided(plain.cfg, layers).double().eval()
    torch.manual_seed(seed + 1)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.5)
    model.load_state_dict(plain.state_dict(), strict=False)
    if layers:
        model.classifier.head.weight.data *= 4
    model.head.weight.data *= 0.3  # nearly certain tokens would not feel a label
    return model


# ----- the equations, with exact networks


class Toy:
    """A random law over rows of L letters, and what exact networks say of its noisy rows at alpha."""

    def __init__(self, kind, alpha):
        self.process, self.alpha = KINDS[kind][0](), alpha
        self.x0 = states(V3, L)
        self.p = (
            torch.rand(len(self.x0), generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
        )
        self.p = self.p / self.p.sum()
        self.y = torch.tensor([int(x[0] in (1, 2) and x[2] == 0) for x in self.x0.tolist()])
        every = states(self.process.vocab_size, L)
        self.xt = every[self.c(every) > 0]
        self.told, self.untold = self.logits(self.y == 1), self.logits(self.y >= 0)

    def c(self, xt):
        """c(y = 1 | x_t), by Bayes' rule."""
        q = forward_probs(self.process, self.x0, xt, self.alpha).prod(-1).double()  # (K, m)
        return (self.p * self.y) @ q / (self.p @ q)

    def ask(self, xt):
        return self.c(xt).log()

    def logits(self, which):
        exact = Bayes(self.process, self.x0[which], self.p[which] / self.p[which].sum())
        sigma = torch.tensor([-math.log(self.alpha)], dtype=torch.float64)
        with torch.no_grad():
            return exact(None, self.xt, L, 0, sigma)

    def step(self, logits, a_s):
        return self.process.posterior_probs(logits, self.xt, self.alpha, a_s)

    def jumps(self, q):
        """The probabilities of leaving x_t, (m, L, V)."""
        return q.scatter(-1, self.xt[..., None], 0.0)

    def off(self, ours, want):
        """The largest relative error of a probability of leaving; 1 where one of them is 0."""
        ours, want = self.jumps(ours), self.jumps(want)
        return ((ours - want).abs() / torch.maximum(ours, want).clamp(min=1e-12)).max().item()


@BOTH
def test_in_short_steps_the_classifier_makes_the_reverse_process_given_y(kind):
    toy = Toy(kind, 0.4)
    log_c = exact_log_c(toy.ask, toy.xt, toy.process.vocab_size)
    off = []
    for dt in (0.1, 0.01, 0.001):
        want = toy.step(toy.told, 0.4 + dt)
        q = toy.step(toy.untold, 0.4 + dt)
        off.append(toy.off(classifier_based_probs(q, log_c, 1.0), want))
        assert toy.off(q, want) > 0.2, "without the classifier it is another process"
    if toy.process.absorbing:
        assert max(off) < 1e-9, "how many masks lift does not depend on y: no error at all"
    else:
        assert all(abs(a / b - 1) < 0.01 for a, b in zip(off, [0.281, 0.0327, 0.00333], strict=True)), off


@BOTH
def test_both_kinds_of_guidance_are_one_in_short_steps_at_every_gamma(kind):
    """By Bayes' rule p(v | y) / p(v) ∝ c(y | x_t with v at i)."""
    toy = Toy(kind, 0.4)
    log_c = exact_log_c(toy.ask, toy.xt, toy.process.vocab_size)
    a_s = 0.4 + 1e-5
    for gamma in (0.5, 2.0, 6.0):
        free = classifier_free_probs(toy.process, toy.told, toy.untold, toy.xt, 0.4, a_s, gamma)
        based = classifier_based_probs(toy.step(toy.untold, a_s), log_c, gamma)
        free, based = toy.jumps(free), toy.jumps(based)
        if toy.process.absorbing:  # where to is one law; how often differs: p is normalised, not the step
            free, based = (q / q.sum(-1, keepdim=True).clamp(min=1e-300) for q in (free, based))
        seen = (toy.xt != toy.process.mask_id) if toy.process.absorbing else torch.zeros_like(toy.xt) > 0
        gap = ((free - based).abs() / free.clamp(min=1e-12))[~seen].max()
        assert gap < 1e-3, f"gamma {gamma}: {gap:.1e}"


@BOTH
def test_gamma_0_and_1_are_the_two_models_and_equal_models_stay(kind):
    toy = Toy(kind, 0.3)
    free = lambda told, untold, gamma: classifier_free_probs(
        toy.process, told, untold, toy.xt, 0.3, 0.5, gamma
    )
    untold, told = (z + 0.3 * torch.randn(z.shape, dtype=z.dtype) for z in (toy.untold, toy.untold))
    agree(free(told, untold, 1.0), toy.step(told, 0.5), 1e-9)
    agree(free(told, untold, 0.0), toy.step(untold, 0.5), 1e-9)
    assert (free(told, untold, 2.0) - toy.step(told, 0.5)).abs().max() > 0.01
    q = toy.step(untold, 0.5)
    for gamma in GAMMAS:
        agree(free(untold, untold, gamma), q, 1e-9)
        agree(classifier_based_probs(q, torch.full_like(q, -0.7), gamma), q, 1e-9)


def test_a_mixture_of_two_predictions_by_hand():
    """For masked noise of the prediction, and the share of masks that are lifted stays; else of the step."""
    told, untold = torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.2, 0.7]]], dtype=torch.float64).log()
    masked, uniform = d.Masked(V3 + 1, V3), d.Uniform(V3)
    wide = [torch.cat((z, z[:, :1] + 1.0), dim=-1)[None] for z in (told, untold)]  # the mask's logit is odd
    xt = torch.tensor([[V3]])
    want = torch.tensor([0.5**2 / 0.1, 0.3**2 / 0.2, 0.2**2 / 0.7], dtype=torch.float64)
    want = 0.25 * want / want.sum()
    found = classifier_free_probs(masked, *wide, xt, 0.2, 0.4, 2.0)[0, 0]
    agree(found, torch.cat((want, torch.tensor([0.75], dtype=torch.float64))))
    steps = [masked.posterior_probs(z, xt, 0.2, 0.4) for z in wide]
    assert mix(*(q.log() for q in steps), 2.0).softmax(-1)[0, 0, 3] < 0.7, "mixed steps lift more masks"
    xt = torch.tensor([[1]])
    one, two = (uniform.posterior_probs(z[None], xt, 0.2, 0.4) for z in (told, untold))
    want = one**3 / two**2
    found = classifier_free_probs(uniform, told[None], untold[None], xt, 0.2, 0.4, 3.0)
    agree(found, want / want.sum())


@BOTH
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_p": 0.3}, {"temperature": 0.5}])
def test_tokens_that_are_ruled_out_make_no_holes(kind, how):
    toy = Toy(kind, 0.3)
    told = 2 * torch.randn(toy.untold.shape, generator=torch.Generator().manual_seed(5)).double()
    for gamma in GAMMAS:
        for a_s in (0.5, 1.0):
            q = classifier_free_probs(toy.process, told, toy.untold, toy.xt, 0.3, a_s, gamma, **how)
            assert (q >= 0).all() and ((q.sum(-1) - 1).abs() < 1e-9).all()
            if toy.process.absorbing and a_s == 1.0:
                assert (q[..., toy.process.mask_id] == 0).all(), "no mask is left"
    for gamma, logits in ((0.0, toy.untold), (1.0, told)):
        q = classifier_free_probs(toy.process, told, toy.untold, toy.xt, 0.3, 0.5, gamma, **how)
        agree(q, toy.process.posterior_probs(logits, toy.xt, 0.3, 0.5, **how))
    if how == {"temperature": 0.0} and toy.process.absorbing:  # the mixture is sharpened, not its parts
        hidden = toy.xt == V3
        log_c, log_u = (toy.process.loo_logits(z).log_softmax(-1) for z in (told, toy.untold))
        q = classifier_free_probs(toy.process, told, toy.untold, toy.xt, 0.3, 1.0, 6.0, **how)
        assert torch.equal(q.argmax(-1)[hidden], mix(log_c, log_u, 6.0).argmax(-1)[hidden])


def test_to_first_order_a_straight_classifier_is_exact():
    weight = torch.randn(4, V3, dtype=torch.float64)
    at = torch.arange(4)
    x = torch.randint(V3, (5, 4))

    def ask(tokens):
        return (tokens * weight).sum((1, 2)) if tokens.is_floating_point() else weight[at, tokens].sum(1)

    exact = exact_log_c(ask, x, V3)
    here = ask(x)[:, None, None]
    agree(first_order_log_c(ask, x, V3), exact - here)
    with torch.inference_mode():
        agree(first_order_log_c(ask, x.clone(), V3), exact - here)
    assert exact[3, 2, 1] == ask(torch.cat((x[3, :2], torch.tensor([1]), x[3, 3:]))[None])


# ----- the samplers


@pytest.mark.parametrize(
    "how, kind",
    slow(
        itertools.product(["free", "based", "first order"], ["masked", "uniform denoiser, timed"]),
        [("free", "uniform denoiser, timed"), ("based", "uniform denoiser, timed")],
    ),
)
def test_the_samplers_draw_from_the_equations(how, kind):
    """Two steps of a block of two, against matrix products over all its states."""
    make, kw = KINDS[kind]
    process, model, b = make(), guided(make(), seed=4, **kw), 2
    x, alpha = states(process.vocab_size, b), [0.0, 0.5, 1.0]
    n = 3000
    log_c = model.classifier(None, x, b, 0, d.sigma(torch.tensor([0.5], dtype=torch.float64))).detach()
    model.classifier.head.bias.data -= log_c.mean((0, 1))  # undecided on average: that is where c matters

    def law(gamma, label=1):
        p = (
            (x == process.mask_id).all(-1).double()
            if process.absorbing
            else torch.full((len(x),), 1 / len(x))
        )
        for a_t, a_s in zip(alpha, alpha[1:], strict=False):
            level = d.sigma(torch.tensor([a_t], dtype=torch.float64))
            say = lambda level=level, **more: model(x[:, :0], x, b, 0, level, **more).detach()
            judge = lambda z, level=level: model.classifier(None, z, b, 0, level)[:, 0, label]
            if how == "free":
                q = classifier_free_probs(process, say(label=label), say(), x, a_t, a_s, gamma)
            else:
                log_c = (first_order_log_c if how == "first order" else exact_log_c)(
                    judge, x, process.vocab_size
                )
                q = process.posterior_probs(say(), x, a_t, a_s) * (gamma * log_c).exp()
                q = q / q.sum(-1, keepdim=True)
            p = p.double() @ product(q, x).detach()
        return p[(x < V3).all(-1)]

    sampler = classifier_free if how == "free" else classifier_based
    more = {} if how != "first order" else {"first_order": True}
    run = dict(block_size=b, steps=2, max_new_tokens=b, seed=7, sampler=sampler, gamma=4.0, **more)
    text = last(generate(model, process, [()] * n, **run)).x
    counts = (text * torch.tensor([V3, 1])).sum(1).bincount(minlength=V3**b)
    draws(counts, law(4.0), law(1.0), law(4.0, label=0))


def by_hand(label):
    def sampler(block):
        for k in range(block.steps):
            a_t, a_s = block.alpha[k : k + 2]
            block.write(block.posterior(block.predict(a_t, label=label), a_t, a_s, block.noise(k)))
            yield

    return sampler


@pytest.mark.parametrize(
    "kind, block",
    slow(
        itertools.product(["masked", "uniform loo", "uniform denoiser, timed"], [FastBlock, Block]),
        [("masked", FastBlock), ("uniform denoiser, timed", Block)],
    ),
)
def test_gamma_1_is_the_conditional_model_bit_for_bit_and_0_the_plain_one(kind, block):
    make, kw = KINDS[kind]
    process, model = make(), guided(make(), **kw)
    prompts = [(), (1,), (0, 2, 1, 1, 2)] * 11
    run = dict(block_size=4, steps=3, max_new_tokens=3, seed=2, block_class=block)
    write = lambda sampler, **how: last(generate(model, process, prompts, sampler=sampler, **run, **how))
    for label in (0, 1):
        one = write(classifier_free, gamma=1.0, label=label)
        assert torch.equal(one.x, write(by_hand(label)).x)
        assert not torch.equal(one.x, write(by_hand(1 - label)).x)
    plain = write(SAMPLERS["ancestral"])
    for sampler in (classifier_free, classifier_based):
        zero = write(sampler, gamma=0.0)
        assert torch.equal(zero.x, plain.x)
    three = write(classifier_free, gamma=3.0)
    assert torch.equal(three.x, write(classifier_free, gamma=3.0, use_cache=False).x), "one cache for both"
    alone = last(generate(model, process, prompts[:2], sampler=classifier_free, gamma=3.0, **run))
    width = alone.x.size(1)
    assert torch.equal(alone.x, three.x[:2, :width]), "a text does not depend on its batch mates"
    if not process.absorbing:
        assert three.nfe == 2 * zero.nfe


@pytest.mark.parametrize("kind, block", [("masked", FastBlock), ("uniform denoiser, timed", Block)])
def test_the_classifier_is_asked_about_the_block_behind_its_text(kind, block):
    make, kw = KINDS[kind]
    process, model, seen = make(), guided(make(), **kw), []

    def sampler(block):
        begin, level = int(block.positions[0]), d.sigma(torch.tensor([0.4], dtype=torch.float64))
        ask = guidance.asker(block, 0.4, 0)
        found, V = exact_log_c(ask, block.x, process.vocab_size), process.vocab_size
        slope = first_order_log_c(ask, block.x, V)
        assert slope.shape == found.shape and (slope.gather(-1, block.x[..., None]) == 0).all()
        for r, i, v in [(0, 0, 1), (1, 3, 2), (2, 2, 0), (2, 1, V - 1)]:
            x = block.x[r : r + 1].clone()
            x[0, i] = v
            with torch.no_grad():
                want = model.classifier(block.text[r : r + 1, :begin], x, 4, begin, level)[0, i, 0]
            agree(found[r, i, v], want)
        seen.append(begin)
        yield from SAMPLERS["ancestral"](block)

    last(generate(model, process, [(), (), (1,)], block_size=4, steps=2, sampler=sampler, block_class=block))
    assert seen == [0, 4]
    costs = last(generate(model, process, [()] * 2, block_size=4, steps=1, sampler=classifier_based))
    # the network: 4, then 8 tokens; the classifier: 4 passes of V versions, of 4 and of 8 tokens
    assert costs.nfe == 2 * (1 + 4)
    assert costs.token_forwards == 2 * (4 + 4 + 4 * process.vocab_size * 4 + 4 + 4 * process.vocab_size * 8)
    how = {"block_size": 4, "steps": 1, "sampler": classifier_based, "first_order": True}
    costs = last(generate(model, process, [()] * 2, **how))
    assert costs.nfe == 2 * (1 + 1) and costs.token_forwards == 2 * (4 + 4 + 8 + 8), "one pass of one version"


@pytest.mark.parametrize("block", [FastBlock, Block])
def test_the_classifier_reads_a_rows_own_text_when_others_wait(block):
    process = d.Masked(V3 + 1, V3)
    model, seen = guided(process), []

    def sampler(block):
        begin = int(block.positions[0])
        with torch.no_grad():
            want = model.classifier(block.text[block.rows, :begin], block.x, 4, begin, None)[:, 0, 0]
        agree(guidance.asker(block, 0.4, 0)(block.x), want)
        seen.append((begin, block.rows.tolist()))
        yield from SAMPLERS["ancestral"](block)

    prompts = [(0, 1, 2, 1, 0, 1, 2, 1), (2, 2, 1, 0), (1, 1, 0, 2)]
    last(generate(model, process, prompts, block_size=4, steps=2, sampler=sampler, block_class=block))
    assert (4, [1, 2]) in seen


@pytest.mark.parametrize("sampler", [classifier_free, classifier_based])
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_p": 1e-6}])
def test_the_surest_token_has_no_chance_in_it(sampler, how):
    process = d.Masked(V3 + 1, V3)
    rows = {"block_size": 4, "max_new_tokens": 4, "steps": 1, "sampler": sampler, "gamma": 2.0}
    write = lambda **more: last(generate(guided(process), process, [()] * 20, **rows, **more)).x
    x = write(**how)
    assert (x == x[0]).all() and (write() != x).any()


@pytest.mark.parametrize("sampler", [classifier_free, classifier_based])
def test_a_row_without_a_mask_takes_no_more_passes(sampler):
    process = d.Masked(V3 + 1, V3)
    rows = {"block_size": 4, "max_new_tokens": 4, "steps": 16, "sampler": sampler, "block_class": Block}
    state = last(generate(guided(process), process, [()] * 20, **rows))
    assert state.nfe_rows.min() < state.nfe_rows.max() == state.nfe


def test_gamma_is_1_where_nothing_is_said():
    process = d.Masked(V3 + 1, V3)
    write = lambda **how: last(generate(guided(process), process, [()] * 20, block_size=4, steps=4, **how)).x
    for sampler in (classifier_free, classifier_based):
        x = write(sampler=sampler)
        assert torch.equal(x, write(sampler=sampler, gamma=1.0))
        assert (x != write(sampler=sampler, gamma=4.0)).any()


@pytest.mark.parametrize("run", [generate, lesson.generate])
def test_any_request_is_served(run):
    """Cold, narrow, ragged, cut short, ended early; one row and 33."""
    for kind in ("masked", "uniform denoiser, ar token"):
        make, kw = KINDS[kind]
        process, model = make(), guided(make(), **kw)
        for n, how in [
            (1, {"temperature": 0.0}),
            (33, {"top_p": 0.5, "eos_id": 2}),
            (2, {"max_new_tokens": 3}),
        ]:
            prompts = [(), (1,), (0, 1, 2, 2, 1)] * 11
            for sampler, own in [(classifier_free, {}), (classifier_based, {"first_order": True})]:
                served = {"block_size": 4, "steps": 2, "sampler": sampler, "gamma": 4.0} | own | how
                text = last(run(model, process, prompts[:n], **served)).x
                assert text.max() < V3 and (text[:, 0] >= 0).all()


# ----- the networks and the loss


def test_at_first_the_label_changes_nothing():
    for kind in ("masked", "uniform denoiser, timed"):
        make, kw = KINDS[kind]
        plain, x = net(make(), **kw).double(), torch.randint(V3, (2, 3, 8))
        model = Guided(plain.cfg, 1).double().eval()
        model.load_state_dict(plain.state_dict(), strict=False)
        sizes, level = torch.tensor([1, 2, 8]), torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
        want = plain(*x, sizes, 0, level)
        for label in (0, 1, NO_LABEL, torch.tensor([0, 2, 1])):
            assert torch.equal(model(*x, sizes, 0, level, label=label), want)
        _, log_c = model(*x, sizes, 0, level, returns="both")
        agree(log_c, torch.full((3, 8, 2), -math.log(2), dtype=torch.float64))
    assert Guided(plain.cfg, 0)(*x, 8, returns="both")[1] is None
    torch.manual_seed(0)
    one = Guided(plain.cfg, 1).state_dict()
    torch.manual_seed(0)
    assert all(torch.equal(one[k], v) for k, v in Transformer(plain.cfg).state_dict().items()), (
        "the same start"
    )


def test_a_label_reaches_its_own_row_and_no_label_is_a_label_of_its_own():
    model, x = guided(d.Masked(V3 + 1, V3)), torch.randint(V3, (2, 3, 8))
    rows = model(*x, 4, label=torch.tensor([0, 1, 2]))
    for label in (0, 1, 2):
        one = model(*x, 4, label=label)
        agree(rows[label], one[label])
        assert (rows[label - 1] - one[label - 1]).abs().max() > 1e-3
    assert torch.equal(model(*x, 4), model(*x, 4, label=NO_LABEL))
    before = model(*x, 4).detach()
    model.label.weight.data[NO_LABEL, 0] += 1.0
    assert (model(*x, 4) - before).abs().max() > 1e-3, "it is learned"
    assert torch.equal(model(*x, 4, label=1)[1], rows[1])
    plain = net(d.Masked(V3 + 1, V3)).double()  # of the same weights
    want = plain.hidden(*x, 4)[0][:, :8]
    for label in (0, 1, NO_LABEL):
        assert torch.equal(model.hidden(*x, 4, label=label)[0][:, :8], want), "clean tokens see no label"


def test_the_classifier_has_as_many_layers_as_are_asked_for():
    cfg = guided(d.Masked(V3 + 1, V3)).cfg
    assert cfg.n_layers == 2
    assert [len(Guided(cfg, n).classifier.layers) for n in (1, 2, 3)] == [1, 2, 3]


def test_the_classifier_reads_its_block_and_the_clean_text_before_it():
    model, sizes = guided(d.Masked(V3 + 1, V3)), torch.tensor([1, 2, 4])
    clean, noisy = torch.randint(V3, (2, 3, 8))
    log_c = model.classifier(clean, noisy, sizes)
    agree(log_c.exp().sum(-1), torch.ones(3, 8, dtype=torch.float64))
    for row, b in enumerate(sizes.tolist()):
        for i in range(8):
            first = i // b * b
            text, block = clean[row : row + 1, :first], noisy[row : row + 1, first : first + b]
            with torch.no_grad():
                h = model.classifier.hidden(text, block, b, first)[0][:, first:].mean(1)
                want = model.classifier.to_logits(h).log_softmax(-1)[0]
            agree(log_c[row, i].detach(), want)


def a_learner(model, process, drop=0.1, seq_len=8, label=RULE):
    settings = guidance.Settings(label=label, drop=drop)
    cfg = type("Cfg", (), {"seq_len": seq_len, "dataset": "toy"})
    return guidance.Learner(cfg, settings, model, process, d.token_loss)


def a_step(start=0, n=4):
    x0 = torch.randint(V3, (n, 8), generator=torch.Generator().manual_seed(2))
    charged = (torch.arange(8) >= start).expand(n, 8).clone()
    charged[0, -2:] = False
    noise = lambda: Noise(3, torch.arange(n), torch.arange(start, 8))
    return x0, {"given": torch.zeros(n, 8) > 0, "charged": charged, "start": start}, noise


@pytest.mark.parametrize("kind", ["masked", "uniform denoiser, timed"])
def test_the_loss_is_the_usual_one_with_labels_and_the_classifiers(kind):
    make, kw = KINDS[kind]
    process, model, seen = make(), guided(make(), **kw), []
    x0, how, noise = a_step()
    sizes, t = torch.tensor([1, 2, 4, 8]), torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    learner = a_learner(model, process, 0.5)

    def spy(*args, label, returns):
        seen.append((args, label))
        return model(*args, label=label, returns=returns)

    spy.module = model
    total, per_token = learner.loss(0)(spy, process, x0, sizes, t, "elbo", noise=noise(), **how)
    (((_, noisy, _, _, sigma), label),) = seen
    y = torch.tensor([int(x[0] in (1, 2) and x[2] == 0) for x in x0.tolist()])
    assert ((label == y) | (label == NO_LABEL)).all() and 0 < (label == NO_LABEL).sum() < 4
    # the usual loss of a network that is told these labels, with the same random numbers
    told = lambda clean, noisy, b, start, sigma: model(clean, noisy, b, start, sigma, label=label)
    told.timeless = model.timeless
    usual, each = d.token_loss(told, process, x0, sizes, t, "elbo", noise=noise(), **how)
    assert torch.equal(per_token, each)
    log_c = model.classifier(x0, noisy, sizes, 0, sigma)
    cost = sum(-log_c[r, i, y[r]] for r in range(4) for i in range(8) if how["charged"][r, i])
    agree(total, usual + cost)
    slopes = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    names = [name for name, _ in model.named_parameters()]
    for loss, theirs in ((usual, False), (cost, True)):
        alone = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for name, g, both in zip(names, alone, slopes, strict=True):
            if name.startswith("classifier.") == theirs:
                agree(both, g)
            else:
                assert g is None, f"{name} belongs to the other loss"


def test_the_classifier_pays_where_the_noisy_stream_begins_later():
    """All rows begin with a prompt of one block, so the noisy stream begins behind it."""
    make, kw = KINDS["uniform denoiser, timed"]
    process, model, seen = make(), guided(make(), **kw), []
    x0, how, noise = a_step(4)
    sizes, t = torch.tensor([1, 2, 4, 4]), torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)

    def spy(*args, **how):
        seen.append(args)
        return model(*args, **how)

    spy.module = model
    total, each = a_learner(model, process).loss(0)(spy, process, x0, sizes, t, "elbo", noise=noise(), **how)
    ((_, noisy, _, _, sigma),) = seen
    y = torch.tensor([int(x[0] in (1, 2) and x[2] == 0) for x in x0.tolist()])
    log_c = model.classifier(x0, noisy, sizes, 4, sigma)
    cost = sum(-log_c[r, i - 4, y[r]] for r in range(4) for i in range(4, 8) if how["charged"][r, i])
    agree(total, each.sum() + cost)


def test_labels_are_left_out_in_as_many_rows_as_asked_however_a_batch_is_split():
    process, model = d.Masked(V3 + 1, V3), guided(d.Masked(V3 + 1, V3), layers=0)
    shares = {}
    for drop in (0.1, 0.5):
        for start in (0, 4):
            seen, learner, (x0, how, noise) = [], a_learner(model, process, drop), a_step(start, 2000)

            def spy(clean, noisy, *args, label, returns, seen=seen):
                seen.append(label)
                return torch.zeros(*noisy.shape, V3 + 1), None

            spy.timeless = True
            learner.loss(0)(
                spy, process, x0, 4, torch.full((2000,), 0.5).double(), "ce", noise=noise(), **how
            )
            shares[drop, start] = seen[0]
        assert torch.equal(shares[drop, 0], shares[drop, 4])
        left_out = (seen[0] == NO_LABEL).double().mean().item()
        assert abs(left_out - drop) < 4 * math.sqrt(drop * (1 - drop) / 2000), left_out


def test_a_rule_says_what_it_says():
    x = states(V3, 4)
    want = [int(row[1] in (0, 2) and row[3] == 1) for row in x.tolist()]
    assert label_of(x, "1:0|2, 3:1").tolist() == want
    assert label_of(x, "2:0").tolist() == (x[:, 2] == 0).int().tolist()
    for wrong in ("", "1", "1:", "a:1", "1:0|", "1:0,1:2", "1:-1"):
        assert guidance.parse(wrong) is None, wrong


# ----- the commands


FLAGS = [*TINY, "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--method=guidance", "--label=6:1|2,8:3"]
FLAGS += [
    "--lr_schedule=constant",
    "--eval_every=2",
    "--n_samples=0",
    "--n_eval=2",
    "--n_layers=1",
    "--classifier_layers=1",
]


def test_a_checkpoint_is_resumed_bit_for_bit_sampled_and_evaluated(project, capsys, slip):
    one, two = resumed(training.main, *FLAGS)
    assert one["method"]["settings"] == {"label": "6:1|2,8:3", "drop": 0.1, "classifier_layers": 1}
    assert one["model"]["label.weight"].abs().max() > 0, "the labels are learned"
    assert one["model"]["classifier.head.weight"].abs().max() > 0
    assert type(rebuild("parts", torch.device("cpu"))[3]) is Guided
    capsys.readouterr()
    for sampler in (
        "classifier_free --gamma=2",
        "classifier_based --gamma=2 --first_order --label=0",
        "arpc",
    ):
        name, *more = sampler.split()
        run(sample.main, "--ckpt=parts", "--device=cpu", f"--sampler={name}", *more, "--steps=2")
        assert "NFE" in capsys.readouterr().out
    run(evaluation.main, "--ckpt=parts", "--device=cpu", "--n_eval=8", "--n_mc=2")
    assert "masked (guidance)" in capsys.readouterr().out
    more = ["--out_dir=parts", "--max_steps=5", "--resume", "--label=6:2"]
    assert "label" in slip(training.main, argv=[*FLAGS, *more])
    more = ["--out_dir=parts", "--max_steps=5", "--resume", "--classifier_layers=2"]
    assert "trained with classifier_layers 1, not 2" in slip(training.main, argv=[*FLAGS, *more])
    for wrong, word in (("--gamma=-1", "gamma"), ("--label=2", "label")):
        argv = ["--ckpt=parts", "--device=cpu", "--sampler=classifier_free", wrong]
        assert word in slip(sample.main, argv=argv)


def test_what_it_cannot_serve_is_refused(slip, project):
    for flags, word in (
        (["--label=6"], "POSITION"),
        (["--label=12:1"], "beyond seq_len"),
        (["--label=6:4"], "id 4"),
        (["--drop=0"], "drop"),
        (["--drop=1"], "drop"),
        (["--classifier_layers=-1"], "classifier_layers"),
        (["--next_token", "--block_sizes=1:1"], "next-token"),
    ):
        assert word in slip(training.main, argv=[*FLAGS, *flags])
    process = d.Masked(V3 + 1, V3)
    for sampler in (classifier_free, classifier_based):
        with pytest.raises(ValueError, match="--method guidance"):
            last(generate(net(process), process, [()], block_size=4, sampler=sampler))
        for gamma in (-1.0, 1e6, math.inf):
            with pytest.raises(ValueError, match="gamma"):
                last(generate(guided(process), process, [()], block_size=4, sampler=sampler, gamma=gamma))
    with pytest.raises(ValueError, match="classifier_layers"):
        last(generate(guided(process, layers=0), process, [()], block_size=4, sampler=classifier_based))


def test_the_lab_measures_labels_and_right_answers(project, capsys, slip):
    """A line for each sampler and gamma, what they cost, the page and the picture."""
    (project / "data/pairs/prepare.py").write_text(
        "def check(text):\n    return text.count('a') > 0, 1\n", encoding="utf-8"
    )
    run(training.main, *FLAGS, "--max_steps=1", "--out_dir=run")
    argv = ["--ckpts=run", "--gammas=0,6", "--n_eval=16", "--steps=2", "--device=cpu"]
    run(lab.main, *argv, "--report=page")
    lines = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| masked")
    ]
    assert [line[1] for line in lines] == [way for way in lab.WAYS for _ in range(2)]
    assert all(0 <= float(line[3].split()[0]) <= 100 for line in lines) and (project / "page.png").exists()
    cost = [float(line[5].rstrip(" |")) for line in lines]
    assert cost[0] == cost[2] == cost[4] < cost[5] < cost[3], (
        "without a label one pass a step, and no classifier"
    )
    page = (project / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# Guidance in numbers\n") and "2 steps a block, 16 texts a line" in page
    (project / "page.md").write_text("# By hand\n", encoding="utf-8")
    assert "not a page of ours" in slip(lab.main, argv=[*argv, "--report=page"])
    assert "gammas are numbers" in slip(lab.main, argv=[*argv, "--gammas=x"])
    assert lab.table([lab.Line("masked", "w", 2.0, 0.5, (0.4, 0.6), 0.25, (0.2, 0.3), 9.0)])[-1] == (
        "| masked | w | 2 | 50 (40 to 60) | 25 (20 to 30) | 9.0 |"
    )
