"""
Why believe methods/sedd.py? Its loss is the score entropy as published, and MDLM's bound plus a penalty. With the
enumerated ratios it is the entropy. Its step is the published product of a staggered score and a transition.
"""

import math

import numpy as np
import pytest
import torch
from conftest import TINY, resumed, run, slow
from exact import GENERATE, V3, agree, draws, last, net, noise, on, states

import diffusion as d
import sample
import train as training
from eval import main as evaluate
from methods.sedd import SEDD
from model import ModelConfig
from run.restore import rebuild

V, MASK = V3 + 1, V3
PROCESS, MDLM = SEDD(V, MASK), d.Masked(V, MASK)
NONE = torch.zeros(1, 0, dtype=torch.long)


def some(alpha, n=300):
    """x0, x_t (n, 4), logits (n, 4, V), alpha (n,), a slope (n,)."""
    torch.manual_seed(0)
    x0 = torch.randint(V3, (n, 4))
    xt = PROCESS.corrupt(x0, alpha, noise(n, 4))
    logits = torch.randn(n, 4, V, dtype=torch.float64)
    return x0, xt, logits, torch.full((n,), alpha, dtype=torch.float64), -0.5 - torch.rand(n).double()


def scores(logits, alpha):
    """s_v as published: the raw output, offset by -log(e^sigma - 1) - log(number of words), (..., V3)."""
    sigma = -math.log(alpha)
    return (logits[..., :V3] - math.log(math.expm1(sigma)) - math.log(V3)).exp()


# ----- the loss


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.9, 0.999])
def test_the_loss_is_the_published_score_entropy(alpha):
    """sigma' (sum_v s_v - r log s_x0 + r (log r - 1)), sigma = -log alpha, r = 1 / (e^sigma - 1)."""
    x0, xt, logits, at, slope = some(alpha)
    s, r = scores(logits, alpha), alpha / (1 - alpha)
    entropy = s.sum(-1) - r * s.gather(-1, x0[..., None])[..., 0].log() + r * (math.log(r) - 1)
    want = torch.where(xt == MASK, (-slope / alpha)[:, None] * entropy, 0.0)
    agree(PROCESS.nll(logits, x0, xt, at, slope), want, 1e-11)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_the_loss_is_that_of_mdlm_plus_a_penalty_on_the_total(alpha):
    x0, xt, logits, at, slope = some(alpha)
    U = logits[..., :V3].exp().mean(-1)
    rate = torch.where(xt == MASK, (-slope / (1 - alpha))[:, None], 0.0)
    penalty, bound = rate * (U - 1 - U.log()), MDLM.nll(logits, x0, xt, at, slope)
    agree(PROCESS.nll(logits, x0, xt, at, slope), bound + penalty, 1e-12)
    assert (penalty[xt == MASK] > 0).all()
    calibrated = logits - U.log()[..., None]
    agree(PROCESS.nll(calibrated, x0, xt, at, slope), bound, 1e-12)
    assert PROCESS.nll(logits, x0, xt, at, slope).isfinite().all()


def test_each_token_may_have_a_noise_level_of_its_own():
    """eval.py draws how many masks a block has, so blocks with prompts have other levels."""
    x0, xt, logits, _, _ = some(0.5, n=50)
    at, slope = torch.rand(2, 50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    each = PROCESS.nll(logits, x0, xt, at, -slope)
    for i in range(4):
        agree(each[:, i], PROCESS.nll(logits, x0, xt, at[:, i], -slope[:, i])[:, i])
    assert (each != 0).any(0).all()


def test_the_gradient_vanishes_at_the_right_ratios_alone():
    """The mean over a law of x_0 has its minimum at w = that law: no other w, and no other total, will do."""
    law = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    x0, xt = torch.arange(V3)[:, None], torch.full((V3, 1), MASK)
    at, slope = torch.full((V3,), 0.4, dtype=torch.float64), -torch.ones(V3)

    def slopes(w):
        z = torch.cat(((w * V3).log(), torch.zeros(1).double())).requires_grad_()
        cost = (law * PROCESS.nll(z.expand(V3, 1, V), x0, xt, at, slope)[:, 0]).sum()
        return torch.autograd.grad(cost, z)[0][:V3]

    agree(slopes(law), torch.zeros(V3, dtype=torch.float64))
    assert slopes(law * 1.1).abs().max() > 0.01 and slopes(law.flip(0)).abs().max() > 0.01


def toy():
    generator = torch.Generator().manual_seed(0)
    return states(V3, 2), (1.5 * torch.randn(V3 * V3, generator=generator, dtype=torch.float64)).softmax(0)


def ratios(alpha):
    """
    By enumeration, for all x_t (16, 2) of two tokens: the joint law with the text (9, 16), and the output of
    a network that knows p_t(x_i = v, the other as it is) / p_t(x_t) at every mask, (16, 2, V).
    """
    x, p = toy()
    xt = states(V, 2)
    q = alpha * (x[:, None] == xt[None]).double() + (1 - alpha) * (xt == MASK)[None].double()
    joint = p[:, None] * q.prod(-1)
    at = {tuple(c): w for c, w in zip(xt.tolist(), joint.sum(0).tolist(), strict=True)}
    logits = torch.zeros(16, 2, V, dtype=torch.float64)
    for k, c in enumerate(xt.tolist()):
        for i in range(2):
            for v in range(V3):
                other = [v if j == i else c[j] for j in range(2)]
                s = at[tuple(other)] / at[tuple(c)] if c[i] == MASK and at[tuple(c)] > 0 else 1.0
                logits[k, i, v] = math.log(s * (1 - alpha) / alpha * V3)
    return xt, joint, logits


def test_with_the_enumerated_ratios_the_bound_is_the_entropy():
    p = toy()[1]
    H, found = -(p * p.log()).sum().item(), {"right": 0.0, "total 1.2": 0.0}
    node, weight = np.polynomial.legendre.leggauss(20)
    for t, w in zip((node + 1) / 2, weight / 2, strict=True):
        xt, joint, logits = ratios(1 - t)
        at = torch.full((16,), 1 - t, dtype=torch.float64)
        for name, more in (("right", 0.0), ("total 1.2", math.log(1.2))):
            for x0, q in zip(toy()[0], joint, strict=True):
                each = PROCESS.nll(logits + more, x0.expand(16, 2), xt, at, -torch.ones(16)).sum(-1)
                found[name] += w * (q * each)[q > 0].sum().item()
    assert abs(found["right"] - H) < 1e-9
    assert abs(found["total 1.2"] - H - 2 * (1.2 - 1 - math.log(1.2))) < 1e-9, "the penalty of two tokens"


# ----- the step


def published_step(logits, xt, a_t, a_s):
    """
    Staggered score times transition, as published, for one token (V,). The score of the mask is 1. With e =
    exp(sigma_t - sigma_s) = a_s / a_t the score is multiplied by e, and its mask gets (1 - e) of the sum. A
    token becomes the mask with probability 1 - 1/e. A negative weight is never drawn. In the last step, from
    sigma_t to 0, the mask is cut off.
    """
    if xt != MASK:
        return torch.nn.functional.one_hot(torch.tensor(xt), V).double()
    e = a_s / a_t
    s = torch.cat((scores(logits, a_t), torch.ones(1, dtype=torch.float64)))
    staggered = e * s
    staggered[MASK] += (1 - e) * s.sum()
    transition = torch.full((V,), 1 - 1 / e, dtype=torch.float64)
    transition[MASK] = 1.0
    q = (staggered * transition).clamp(min=0)
    if a_s == 1:
        q[MASK] = 0
    return q / q.sum()


@pytest.mark.parametrize("a_t, a_s", [(1e-3, 0.3), (0.3, 0.5), (0.3, 0.999), (0.7, 1.0)])
def test_the_step_is_the_published_one_and_with_total_1_mdlms(a_t, a_s):
    x0, xt, logits, at, _ = some(a_t, 40)
    ours = PROCESS.posterior_probs(logits, xt, at, a_s)
    want = [
        published_step(z, x.item(), a_t, a_s) for z, x in zip(logits.flatten(0, 1), xt.flatten(), strict=True)
    ]
    agree(ours.flatten(0, 1), torch.stack(want), 1e-11)
    U = logits[..., :V3].exp().mean(-1)
    assert (U > 1.3).any() and (U < 0.7).any(), "both kinds of totals were met"
    calibrated = logits - U.log()[..., None]
    agree(PROCESS.posterior_probs(calibrated, xt, at, a_s), MDLM.posterior_probs(logits, xt, at, a_s), 1e-12)
    for how in ({"temperature": 0.5}, {"temperature": 0.0}, {"top_p": 0.6}):
        ours = PROCESS.posterior_probs(logits, xt, at, a_s, **how)
        plain = MDLM.posterior_probs(logits, xt, 0.0, 1.0, **how)
        mask = PROCESS.posterior_probs(logits, xt, at, a_s)[..., MASK:]
        agree(ours[..., :V3], ((1 - mask) * plain)[..., :V3], 1e-12)


def test_from_pure_noise_and_in_samplers_that_lift_masks():
    """alpha_t = 0 is the limit; samplers that choose places themselves ask for a step from 0 to 0 or 1."""
    _, _, logits, _, _ = some(0.5, 50)
    xt = torch.full((50, 4), MASK)
    near, limit = (PROCESS.posterior_probs(logits, xt, a, 0.4) for a in (1e-9, 0.0))
    agree(near, limit, 1e-8)
    lift = (torch.arange(4) % 2).expand(50, 4).double()
    q = PROCESS.posterior_probs(logits, xt, 0.0, lift)
    assert (q[:, ::2, MASK] == 1).all() and (q[:, 1::2, MASK] == 0).all()
    agree(q[:, 1::2, :V3], logits[:, 1::2, :V3].softmax(-1), 1e-12)


class Table(torch.nn.Module):
    """A network that says something else about every state of a block, with totals that are not 1."""

    timeless = True

    def __init__(self):
        super().__init__()
        self.embed, self.cfg = torch.nn.Embedding(1, 1), ModelConfig(V, 2)
        self.logits = torch.randn((V, V, 2, V), generator=torch.Generator().manual_seed(0)).double() + 0.4

    def forward(self, clean, noisy, *_):
        return self.logits[noisy[:, 0], noisy[:, 1]]


@pytest.mark.parametrize("path", slow(GENERATE, ["fast"]))
def test_texts_have_the_law_that_products_of_steps_give(path):
    model, n, c, laws = Table(), 5_000, states(V, 2), []
    for process in (PROCESS, MDLM):
        p = (c == MASK).all(-1).double()
        for a_t, a_s in ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0)):
            q = process.posterior_probs(model(None, c), c, a_t, a_s)
            p = p @ torch.stack([q[:, i, c[:, i]] for i in range(2)]).prod(0)
        laws.append(p[(c < MASK).all(-1)])
    x = last(GENERATE[path](model, PROCESS, NONE.expand(n, 0), block_size=2, steps=3, use_cache=False)).x
    draws((x @ torch.tensor([V3, 1])).bincount(minlength=V3**2), *laws)


@pytest.mark.parametrize("path", slow(GENERATE, ["fast"]))
def test_ragged_prompts_are_served_by_every_sampler_of_masked_noise(path):
    from samplers import SAMPLERS

    model, process = on(path, net(PROCESS).double(), PROCESS)
    assert process is PROCESS, "no fast form takes its place"
    prompts = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0)]
    for name in ("ancestral", "ar", "arpc", "remdm_cap", "first_hitting", "threshold", "psi", "edlm"):
        how = {"block_size": 1 if name == "ar" else 4, "sampler": SAMPLERS[name], "max_new_tokens": 3}
        x = last(GENERATE[path](model, process, prompts, **how)).x
        for row, prompt in zip(x.tolist(), prompts, strict=True):
            n = len(prompt)
            assert tuple(row[:n]) == prompt and all(0 <= v < V3 for v in row[n : n + 3]), name


# ----- the commands


def test_a_checkpoint_is_resumed_bit_for_bit_sampled_and_evaluated(project, capsys, slip):
    flags = [*TINY, "--method=sedd", "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--n_samples=0"]
    flags += ["--lr_schedule=constant", "--n_eval=2"]
    whole, parts = resumed(training.main, *flags)
    cfg, _, _, _, process = rebuild("parts", torch.device("cpu"))
    assert type(process) is SEDD and cfg.objective == "elbo"
    run(sample.main, "--ckpt=parts", "--device=cpu", "--steps=2", "--n_samples=3")
    run(evaluate, "--ckpt=parts", "--device=cpu", "--n_eval=4", "--n_mc=2")
    out = capsys.readouterr().out
    assert "NFE" in out and "sedd, EMA weights of step 4" in out
    err = slip(sample.main, argv=["--ckpt=parts", "--device=cpu", "--sampler=gibbs"])
    assert "not defined" in err and "--sampler ancestral" in err


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--process=uniform"], "for masked noise"),
        (["--objective=ce"], "the total"),
        (["--block_sizes=4:0.5,6:0.5", "--objective=4:elbo,6:ce"], "the total"),
        (["--next_token", "--block_sizes=1:1"], "next-token"),
    ],
)
def test_what_it_cannot_serve_is_refused(slip, project, flags, says):
    assert says in slip(training.main, argv=[*TINY, "--dataset=pairs", "--method=sedd", *flags])
