"""
Why believe methods/audm.py? With the perfect network, enumerated, its bound is the entropy. Both reverse steps
are Bayes' rule on the chain of pairs (x_t, u), written out. Texts have the law that products of steps give.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, resumed, run, slow
from exact import GENERATE, V3, agree, draws, last, net, noise, states

import diffusion as d
import sample
import train as training
from eval import main as evaluate
from generate import ancestral
from lab.sweep import SweepConfig, served
from methods.audm import AUDM, reaudm
from model import ModelConfig
from run.restore import rebuild
from samplers import SAMPLERS

V, PROCESS = V3, AUDM(V3)
NONE = torch.zeros(1, 0, dtype=torch.long)


def code(x, u):
    return x + V * (x == u)


def pair_law(x0, alpha):
    """{(x, u): probability} given x_0, by its definition: u is any token, x is x_0 or u."""
    law = {}
    for u in range(V):
        for x, q in ((x0, alpha), (u, 1 - alpha)):
            law[x, u] = law.get((x, u), 0.0) + q / V
    return law


def code_law(x0, alpha):
    """The same by codes, (2 V,)."""
    p = torch.zeros(2 * V, dtype=torch.float64)
    for (x, u), q in pair_law(x0, alpha).items():
        p[code(x, u)] += q
    return p


def toy():
    """A law over two tokens: x (9, 2), p (9,)."""
    generator = torch.Generator().manual_seed(0)
    return states(V, 2), (1.5 * torch.randn(V * V, generator=generator, dtype=torch.float64)).softmax(0)


def perfect(alpha):
    """All pairs of codes c (36, 2); their joint law with the text, (9, 36); log D and log l, (36, 2, V)."""
    x, p = toy()
    c = states(2 * V, 2)
    q = torch.stack([code_law(v, alpha) for v in range(V)])[x[:, None], c[None]]  # (9, 36, 2)
    joint, found = p[:, None] * q.prod(-1), []
    for weight in (
        joint[..., None].expand_as(q),
        p[:, None, None] * q.flip(-1),
    ):  # with its own code, without
        each = torch.stack([(weight * (x == v)[:, None]).sum(0) for v in range(V)], -1)
        found.append((each / each.sum(-1, keepdim=True).clamp(min=1e-300)).log().clamp(min=-700))
    return c, joint, *found


def column(alpha, n):
    return torch.full((n,), alpha, dtype=torch.float64)


# ----- noise


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_noise_has_the_law_of_pairs(alpha):
    for x0 in range(V):
        c, text = torch.arange(2 * V)[None], torch.full((1, 2 * V), x0)
        agree(PROCESS.log_q(c, text, alpha).exp()[0], code_law(x0, alpha), 1e-15)
    n = 20_000
    made = PROCESS.corrupt(torch.ones(n, 1, dtype=torch.long), alpha, noise(n))[:, 0]
    draws(made.bincount(minlength=2 * V), code_law(1, alpha))


def test_what_it_shows_is_uniform_noise_and_what_is_known_is_certain():
    x0, alpha = torch.randint(V, (500, 4)), torch.rand(500, dtype=torch.float64)
    xt = PROCESS.corrupt(x0, alpha, noise(500, 4))
    assert torch.equal(PROCESS.tokens(xt), d.Uniform(V).corrupt(x0, alpha, noise(500, 4)))
    known = PROCESS.known(xt)
    assert torch.equal(xt[known], x0[known]) and 0.2 < known.double().mean() < 0.5
    assert torch.equal(PROCESS.can_change(xt), ~known) and torch.equal(PROCESS.pays(x0, xt), ~known)
    assert torch.equal(PROCESS.encode(x0), x0) and PROCESS.known(x0).all(), "text that is shown is clean"
    pure = PROCESS.prior((9000, 1), noise(9000))[:, 0]
    assert not PROCESS.known(pure).any()
    draws(PROCESS.tokens(pure).bincount(), torch.full((V,), 1 / V, dtype=torch.float64))


# ----- the prediction and the bound


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.95])
def test_D_and_l_are_those_of_the_enumerated_law(alpha):
    c, joint, log_D, log_l = perfect(alpha)
    at, active = column(alpha, len(c)), c >= V
    met = joint.sum(0) > 0
    ours = PROCESS.loo_logits(log_D, c, at).softmax(-1)[active & met[:, None]]
    agree(ours, log_l.exp()[active & met[:, None]], 1e-9)
    agree(PROCESS.denoiser_logits(log_D, c, at).softmax(-1)[met], log_D.exp()[met], 1e-9)
    rubbish = torch.randn(len(c), 2, V, dtype=torch.float64)
    certain = PROCESS.denoiser_logits(rubbish, c, at).softmax(-1)
    assert torch.equal(certain[~active], torch.nn.functional.one_hot(c, 2 * V)[~active][:, :V].double())
    assert torch.equal(certain[active], rubbish.softmax(-1)[active])


def bound(end, change=lambda logits, c: logits):
    """E of the integral of nll over t in (end, 1), and of the last step from there, for the toy law."""
    node, weight = np.polynomial.legendre.leggauss(30)
    total = 0.0
    for s, w in [*zip((node + 1) / 2, weight / 2, strict=True), (0.0, None)]:
        t = end + (1 - end) * s**2
        c, joint, log_D, _ = perfect(1 - t)
        logits, at = change(log_D, c), column(1 - t, len(c))
        for x0, q in zip(toy()[0], joint, strict=True):
            args = logits, x0.expand(len(c), 2), c, at
            if w is None:
                each = PROCESS.last_step(*args)
            else:
                each = w * 2 * s * (1 - end) * PROCESS.nll(*args, -torch.ones(len(c)))
            total += (q * each.sum(-1))[q > 0].sum().item()
    return total


def test_with_the_perfect_network_the_bound_is_the_entropy():
    p = toy()[1]
    H = -(p * p.log()).sum().item()
    for end in (1e-2, 1e-3):
        gap = bound(end) - H
        assert -1e-8 < gap < 2 * end**2, f"end {end}: {gap:.1e}"  # two tokens that are noise at `end`
    blurred = bound(1e-3, lambda logits, c: 0.8 * logits)
    assert blurred > H + 0.01, "another network costs more"
    l_for_D = bound(1e-3, lambda logits, c: PROCESS.loo_logits(logits, c, 0.5))
    assert l_for_D > H + 0.01, "and so does one that leaves the evidence out"


def test_block_size_1_is_the_nll_and_reads_one_id_of_its_own():
    model, seen = net_of(), []
    ask = lambda clean, noisy, *more: seen.append(noisy) or model(clean, noisy, *more)
    ask.timeless = False
    x0, t = torch.randint(V, (5, 4)), torch.rand(5, dtype=torch.float64)
    _, each = d.token_loss(ask, PROCESS, x0, 1, t, "elbo", noise=noise(5, 4))
    assert (seen[0] == 2 * V).all() and 2 * V < V + PROCESS.n_extra_tokens
    with torch.no_grad():
        log_p = model(x0, seen[0], 1, 0, d.sigma(torch.zeros(1).double())).log_softmax(-1)
    agree(each, -log_p.gather(-1, x0[..., None])[..., 0])
    assert PROCESS.exact_ar, "so eval.py calls it exact, and no bound"


def net_of(seed=1):
    """A random network that reads codes."""
    torch.manual_seed(seed)
    plain = net(PROCESS, time_conditioning=True)
    cfg = plain.cfg
    cfg.n_extra_tokens = PROCESS.n_extra_tokens
    model = type(plain)(cfg).double().eval()
    for q in model.parameters():
        torch.nn.init.normal_(q, 1.0 if q.dim() == 1 else 0.0, 0.5)
    model.head.weight.data *= 0.3
    model.head.bias.data *= 0.3
    return model


# ----- the two steps


@pytest.mark.parametrize("a_t, a_s", [(0.0, 0.4), (0.3, 0.8), (0.6, 1.0)])
def test_the_ancestral_step_is_bayes_rule_of_the_chain_with_one_u(a_t, a_s):
    """x_s is x_0 where x_t is; else it is x_0 with the chance that x_0 was lost between s and t. u stays."""
    c, joint, log_D, _ = perfect(a_t)
    want = torch.zeros(len(c), 2, V, dtype=torch.float64)
    for k, x0 in enumerate(toy()[0]):
        for i in range(2):
            lost = (c[:, i] >= V) * torch.tensor(
                (1 - a_s) / (1 - a_t), dtype=torch.float64
            )  # given x_t = u and x_0 != u
            want[:, i, x0[i]] += joint[k] * (1 - lost)
            want[range(len(c)), i, c[:, i] % V] += joint[k] * lost
    met = joint.sum(0) > 0
    want = (want / joint.sum(0).clamp(min=1e-300)[:, None, None])[met]
    agree(PROCESS.posterior_probs(log_D, c, a_t, a_s)[met], want, 1e-9)
    # its codes: a token that was drawn and is not u is known, and so is all at the end
    n, at = 20_000, torch.tensor([V + 1, 2])
    logits = torch.randn(1, 2, V, dtype=torch.float64)
    q = PROCESS.posterior_probs(logits, at[None], a_t, a_s)[0, 0]
    made = PROCESS.posterior_sample(logits.expand(n, 2, V), at.expand(n, 2), a_t, a_s, noise=noise(n, 2))
    want = torch.cat((q, torch.zeros(V, dtype=torch.float64)))
    if a_s < 1:
        want[V + 1], want[1] = q[1], 0.0
    draws(made[:, 0].bincount(minlength=2 * V), want)
    assert (made[:, 1] == 2).all(), "a known token stays"


def test_temperature_and_top_p_sharpen_l():
    logits, xt, a_t = torch.randn(50, 1, V, dtype=torch.float64), torch.full((50, 1), V + 1), 0.6
    loo = PROCESS.loo_logits(logits, xt, a_t).softmax(-1)
    for how, change in (
        ({"temperature": 0.5}, lambda p: p**2 / (p**2).sum(-1, keepdim=True)),
        ({"temperature": 0.0}, lambda p: (p == p.amax(-1, keepdim=True)).double()),
        ({"top_p": 1e-6}, lambda p: (p == p.amax(-1, keepdim=True)).double()),
    ):
        D = change(loo) * torch.tensor([1, 1 / (1 - a_t), 1])
        agree(PROCESS.posterior_probs(logits, xt, a_t, 1.0, **how), D / D.sum(-1, keepdim=True), 1e-12)


@pytest.mark.parametrize("a_t, a_s", [(0.0, 0.4), (0.3, 0.8), (0.6, 1.0)])
def test_the_step_of_reaudm_keeps_the_law_of_pairs(a_t, a_s):
    """
    Of the pair (x_s, u_s) given x_0, to rounding: by the rule for pairs written out, and by ours for codes.
    Ours is that rule, and not a redraw, which would keep the law too.
    """
    between = a_t / a_s

    def step(x0, x):
        """{(x_s, u_s): probability} given x_0 and x_t = x."""
        law = {}
        weights = [
            (a_s * (v == x0) + (1 - a_s) / V) * (between * (v == x) + (1 - between) / V) for v in range(V)
        ]
        for v, w in enumerate(weights):
            same = 1 / (1 + (V - 1) * a_s) if v == x0 else 1.0
            for u in range(V):
                law[v, u] = w / sum(weights) * (same if u == v else (1 - same) / (V - 1))
        return law

    for x0 in range(V):
        after, ours = {}, torch.zeros(2 * V, dtype=torch.float64)
        for (x, u), q in pair_law(x0, a_t).items():
            for pair, w in step(x0, x).items():
                after[pair] = after.get(pair, 0.0) + q * w
            kernel = PROCESS.bridge(torch.tensor([[x0]]), torch.tensor([[code(x, u)]]), a_t, a_s)[0, 0]
            by_hand = torch.zeros(2 * V, dtype=torch.float64)
            for pair, w in step(x0, x).items():
                by_hand[code(*pair)] += w
            agree(kernel, by_hand, 1e-14)
            ours += q * kernel
        want = pair_law(x0, a_s)
        assert all(abs(after[pair] - want.get(pair, 0.0)) < 1e-15 for pair in after)
        agree(ours, code_law(x0, a_s), 1e-14)


# ----- whole texts


class Table(torch.nn.Module):
    """A network that says something else about every pair of codes: nothing that a step loses goes unseen."""

    timeless = True

    def __init__(self):
        super().__init__()
        self.embed, self.cfg = torch.nn.Embedding(1, 1), ModelConfig(V, 2)
        generator = torch.Generator().manual_seed(0)
        self.logits = 1.5 * torch.randn((2 * V, 2 * V, 2, V), generator=generator, dtype=torch.float64)

    def forward(self, clean, noisy, *_):
        return self.logits[noisy[:, 0], noisy[:, 1]]


def kernel_of(sampler, model, a_t, a_s, b):
    """The law of the codes after a step, for every state of a block, (m, m); m = (2 V)^b."""
    c = states(2 * V, b)
    with torch.no_grad():
        logits = model(NONE.expand(len(c), 0), c, b, 0, d.sigma(column(a_t, len(c))))
    if sampler is ancestral:
        q = PROCESS.posterior_probs(logits, c, a_t, a_s)
        noisy = (c % V)[..., None] == torch.arange(V)
        noisy = noisy & (c >= V)[..., None] & (a_s < 1)
        q = torch.cat((q * ~noisy, q * noisy), -1)
    else:
        D = PROCESS.posterior_probs(logits, c, a_t, 1.0)
        each = [PROCESS.bridge(torch.full_like(c, v), c, a_t, a_s) for v in range(V)]
        q = sum(D[..., v, None] * each[v] for v in range(V))
    return torch.stack([q[:, i, c[:, i]] for i in range(b)]).prod(0)


def enumerated(sampler, model, b, steps):
    """The law of a block of text, (V^b,)."""
    c = states(2 * V, b)
    p = ((c >= V) / V).prod(-1).double()
    grid = [k / steps for k in range(steps + 1)]
    for a_t, a_s in itertools.pairwise(grid):
        p = p @ kernel_of(sampler, model, a_t, a_s, b)
    out = torch.zeros(V**b, dtype=torch.float64)
    return out.index_add(0, (c % V) @ V ** torch.arange(b - 1, -1, -1), p)


@pytest.mark.parametrize("path", slow(GENERATE, ["fast"]))
def test_texts_have_the_law_that_products_of_steps_give(path):
    model, n, b, steps = Table(), 5_000, 2, 3
    laws = {sampler: enumerated(sampler, model, b, steps) for sampler in (ancestral, reaudm)}
    for sampler, other in ((ancestral, reaudm), (reaudm, ancestral)):
        how = {"block_size": b, "steps": steps, "max_new_tokens": b, "sampler": sampler, "use_cache": False}
        x = last(GENERATE[path](model, PROCESS, NONE.expand(n, 0), **how)).x
        draws((x @ torch.tensor([V, 1])).bincount(minlength=V**b), laws[sampler], laws[other])


@pytest.mark.parametrize("path", slow(GENERATE, ["fast"]))
def test_samplers_serve_ragged_prompts_or_refuse(path):
    """Prompts stay, text is text, rows do not depend on their mates; a cache changes nothing."""
    model, prompts = net_of(), [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0)]
    refused = set()
    for name, sampler in SAMPLERS.items():
        if not sampler.__module__.startswith(("samplers.", "generate", "methods.audm")):
            continue  # of another method
        b = 1 if name == "ar" else 4
        how = {"block_size": b, "sampler": sampler, "max_new_tokens": 3, "seed": 3}
        try:
            x = last(GENERATE[path](model, PROCESS, prompts, **how)).x
        except ValueError as e:
            refused.add(name)
            assert "not defined" in str(e), f"{name}: {e}"
            continue
        for row, prompt in zip(x.tolist(), prompts, strict=True):
            n = len(prompt)
            assert tuple(row[:n]) == prompt and all(0 <= v < V for v in row[n : n + 3]), (name, row)
        if name in ("ancestral", "reaudm", "arpc"):
            for more in ({"use_cache": False}, {"temperature": 0.0}, {"top_p": 0.7}, {"eos_id": 1}):
                other = last(GENERATE[path](model, PROCESS, prompts, **how | more)).x
                assert "use_cache" not in more or torch.equal(other, x)
            alone = last(GENERATE[path](model, PROCESS, prompts[:2], **how)).x
            assert torch.equal(alone[:, :4], x[:2, :4])
    cfg, run = SweepConfig(), SimpleNamespace(process="masked", method="audm")
    swept = {name for name, _ in served(cfg, run, PROCESS, [1, 4])}
    assert "reaudm" in swept and not swept & refused, "lab.sweep leaves out what would be refused"
    masks = {"remdm_cap", "remdm_rescale", "remdm_conf", "remdm_loop", "first_hitting"}
    masks |= {"sdar", "a2d", "fast_dllm", "idlm"}
    assert refused == masks | {"gibbs", "max_coupling"}


def test_reaudm_repairs_and_asks_for_its_own_noise():
    known, certain = torch.full((4000, 1), 2), torch.full((4000, 1), 2)
    codes = PROCESS.bridge(certain, known, 0.2, 0.4)
    again = codes[..., V:].sum(-1)
    assert (again > 0.1).all(), "a clean token may become noise"
    assert (
        PROCESS.bridge(certain, known, 0.2, 1.0)[..., 2]
        + PROCESS.bridge(certain, known, 0.2, 1.0)[..., V + 2]
        == 1
    ).all()
    masked = d.Masked(V + 1, V)
    with pytest.raises(ValueError, match="--method audm"):
        last(GENERATE["fast"](net(masked), masked, [()], block_size=4, sampler=reaudm))


# ----- the commands


def test_a_checkpoint_is_resumed_bit_for_bit_sampled_and_evaluated(project, capsys, slip):
    flags = [*TINY, "--method=audm", "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--n_samples=0"]
    flags += ["--lr_schedule=constant", "--n_eval=2"]
    whole, parts = resumed(training.main, *flags)
    assert whole["process"] == {"class": "methods.audm.AUDM", "arguments": {"vocab_size": 4}}
    cfg, _, _, model, process = rebuild("parts", torch.device("cpu"))
    assert type(process) is AUDM and model.embed.num_embeddings == 9
    assert cfg.objective == "elbo" and cfg.time_conditioning == "true"
    run(sample.main, "--ckpt=parts", "--device=cpu", "--sampler=reaudm", "--steps=2", "--n_samples=3")
    run(evaluate, "--ckpt=parts", "--device=cpu", "--n_eval=4", "--n_mc=2")
    out = capsys.readouterr().out
    assert "NFE" in out and "audm, EMA weights of step 4" in out
    err = slip(sample.main, argv=["--ckpt=parts", "--device=cpu", "--sampler=remdm_cap"])
    assert "not defined" in err and "--sampler ancestral" in err


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--process=uniform"], "its own noise"),
        (["--objective=ce_noisy"], "ce_noisy"),
        (["--next_token", "--block_sizes=1:1", "--time_conditioning=false"], "next-token"),
    ],
)
def test_what_it_cannot_serve_is_refused(slip, project, flags, says):
    assert says in slip(training.main, argv=[*TINY, "--dataset=pairs", "--method=audm", *flags])
