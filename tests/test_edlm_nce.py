"""
Why believe methods/edlm_nce.py? The minimum of its loss over all energies is the log ratio of two laws. With
that energy many candidates give the law of the data, and the other sign leads away from it. The sampler has the
distribution that enumeration gives. The masked network is not touched.
"""

import itertools
import math

import pytest
import torch
from conftest import TINY, resumed, run
from exact import GENERATE, P_VALUE, agree, chi_squared, code, draws, last, net, product, states

import diffusion as d
import eval as evaluation
import sample
import train as training
from methods import edlm_nce
from methods.edlm_nce import EDLM, nce, nce_loss
from options import TrainConfig
from rng import Noise
from run import checkpoint
from run.restore import rebuild

V, L = 2, 3  # letters and length of the enumerable block; the mask is id 2


def network(seed=0, seq_len=L, letters=V, scale=1.0, **kw):
    """A random EDLM in float64, its masked network alone, and the process."""
    process = d.Masked(letters + 1, letters)
    plain = net(process, seed=seed, seq_len=seq_len, **kw).double()
    plain.head.weight.data *= 0.3
    model = EDLM(plain.cfg).double().eval()
    model.load_state_dict(plain.state_dict())
    for p in model.energy.join, *model.energy.score:
        for q in p.parameters():
            torch.nn.init.normal_(q, 0.0, 0.5 * scale)
    return model, plain, process


# ----- the loss


def toy(seed=0):
    """A law over three letters at two positions, and the product of its marginals: p and q, (9,)."""
    p = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4 + 1e-3
    p = p / p.sum()
    return p.flatten(), (p.sum(1)[:, None] * p.sum(0)).flatten()


def kept(q, weight, k):
    """The law of one of k independent draws of q (K,), chosen in proportion to weight (K,)."""
    found = torch.zeros_like(q)
    for ys in itertools.product(range(len(q)), repeat=k):
        w = weight[list(ys)]
        found.index_add_(0, torch.tensor(ys), q[list(ys)].prod() * w / w.sum())
    return found


def test_the_minimum_of_the_loss_is_the_log_ratio():
    """Over a table of energies: at E* = log q - log p the slope is 0. No normaliser is needed."""
    p, q = toy()
    E = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    loss = lambda E: (
        (p * nce(E, torch.full_like(E, math.inf))).sum() + (q * nce(torch.full_like(E, -math.inf), E)).sum()
    )
    assert abs(loss(E).item() - 2 * math.log(2)) < 1e-12
    want = (q.log() - p.log()).requires_grad_()
    (slope,) = torch.autograd.grad(loss(want), want)  # each term is convex in its energy
    assert slope.abs().max() < 1e-12
    assert abs((q * (-want).exp()).sum() - 1) < 1e-12, "self-normalised"
    assert loss(want) < min(loss(-want), loss(0 * want), loss(want + 0.1), loss(want - 0.1))


def test_candidates_lead_to_the_law_of_the_data():
    """With E*. More candidates come nearer; exp(+E), as in the published code, leads away."""
    p, q = toy()
    ratio = p / q  # exp(-E*)
    far = lambda r: (p * (p / r).log()).sum().item()
    assert far(kept(q, 1 / ratio, 2)) > far(q) > far(kept(q, ratio, 2)) > far(kept(q, ratio, 3))
    assert far(kept(q, ratio, 3)) < 0.3 * far(q)


class Spy:
    """A network of which every call is kept."""

    timeless = True

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, *args, **how):
        self.calls.append((args, how, self.model(*args, **how)))
        return self.calls[-1][-1]


@pytest.mark.parametrize("start", [0, 4])
def test_the_loss_compares_true_text_with_a_draw_at_the_same_masks(start):
    model, plain, process = network(seq_len=8, letters=3)
    n = 450
    x0 = torch.randint(3, (1, 8), generator=torch.Generator().manual_seed(1)).expand(n, 8)
    given = (torch.arange(8) < 5).expand(n, 8)
    sizes = torch.tensor([1, 4, 2]).repeat(n // 3) if not start else torch.tensor([4]).repeat(n)
    noise = Noise(0, torch.arange(n), torch.arange(start, 8))
    t = torch.full((n,), 0.7, dtype=torch.float64)
    spy = Spy(model)
    how = {"given": given, "charged": ~given, "start": start, "noise": noise}
    total, per_token = nce_loss(spy, process, x0, sizes, t, "ce", **how)
    (base, _, logits), (true, true_is, E), (false, false_is, F) = spy.calls
    x, shown = x0[:, start:], given[:, start:]
    xt, drawn = base[1], false_is["candidate"]
    assert torch.equal(true_is["candidate"], x)
    assert all(torch.equal(a[0], x0) and torch.equal(a[1], xt) and a[3] == start for a in (true, false))
    masks = xt == 3
    assert not (masks & shown).any() and torch.equal(drawn[~masks], x[~masks])
    assert abs(masks[~shown].double().mean() - 0.7) < 5 * math.sqrt(0.21 / (3 * n))
    # the first open position of rows that see the same is drawn from the network's own prediction
    at = 5 - start
    same = (xt == xt[(sizes == 4) & masks[:, at]][0]).all(1) & (sizes == 4)
    p = logits[same][0, at, :3].softmax(-1).detach()
    assert same.sum() > 30 and chi_squared(drawn[same, at].bincount(minlength=3), p) > P_VALUE
    pays = ~shown & (sizes > 1)[:, None]
    softplus = lambda z: (1 + z.exp()).log()
    agree(per_token, torch.where(pays, softplus(E) + softplus(-F), 0.0).detach())
    agree(total.detach(), per_token.sum())
    total.backward()
    assert all(w.grad is None for name, w in model.named_parameters() if not name.startswith("energy."))
    assert all(w.grad is not None and w.grad.isfinite().all() for w in model.energy.parameters())


def test_what_it_draws_has_the_networks_law_and_the_masks_that_of_the_schedule():
    """All masked positions of 4,000 rows together: z of each letter, and the share of masks."""
    model, _, process = network(seq_len=8, letters=3)
    n, t = 4000, torch.full((4000,), 0.4, dtype=torch.float64)
    x0 = torch.tensor([[0, 1, 2, 0]]).expand(n, 4)
    given, noise, spy = torch.zeros(n, 4) > 0, Noise(0, torch.arange(n), torch.arange(4)), Spy(model)
    with torch.no_grad():
        nce_loss(spy, process, x0, 4, t, "ce", given, ~given, schedule=d.cosine, noise=noise)
    (base, _, logits), _, (_, false_is, _) = spy.calls
    masks, p = base[1] == 3, logits[..., :3].softmax(-1)
    hit = torch.nn.functional.one_hot(false_is["candidate"], 3).double()
    z = (hit - p)[masks].sum(0) / (p * (1 - p))[masks].sum(0).sqrt()
    assert z.abs().max() < 4.5, "one of 50,000 tests"
    want = 1 - d.cosine(t)[0][0]
    assert abs(masks.double().mean() - want) < 4.5 * math.sqrt(want * (1 - want) / (4 * n))


def test_a_timed_network_is_told_the_level_of_its_row_three_times():
    model, _, process = network(seq_len=8, letters=3, time_conditioning=True)
    spy, t = Spy(model), torch.tensor([0.2, 0.7], dtype=torch.float64)
    spy.timeless = False
    given, noise = torch.zeros(2, 4) > 0, Noise(0, torch.arange(2), torch.arange(4))
    x0 = torch.zeros(2, 4).long()
    nce_loss(spy, process, x0, 4, t, "ce", given, ~given, schedule=d.cosine, noise=noise)
    assert len(spy.calls) == 3
    for args, _, _ in spy.calls:
        agree(args[4], d.sigma(d.cosine(t)[0]))


# ----- the networks


def test_an_energy_feels_the_noise_level():
    model, _, _ = network(seq_len=8, letters=3, time_conditioning=True)
    for p in model.energy.parameters():
        torch.nn.init.normal_(p, 0.0, 0.5)
    x = torch.zeros(1, 8).long()
    level = lambda s: model(x, x, 8, 0, torch.tensor([s], dtype=torch.float64), candidate=x)
    assert (level(0.1) - level(5.0)).abs().max() > 1e-3


@pytest.mark.parametrize("kw", [{}, {"time_conditioning": True}])
def test_it_begins_as_the_masked_network_and_knows_nothing(kw):
    process = d.Masked(4, 3)
    plain = net(process, seq_len=8, **kw).double()
    model = EDLM(plain.cfg).double().eval()
    model.load_state_dict(plain.state_dict())
    x0, xt = torch.randint(4, (2, 4, 8), generator=torch.Generator().manual_seed(1))
    x0 = x0.clamp(max=2)
    sizes, level = torch.tensor([1, 2, 4, 8]), torch.tensor([0.1, 0.7, 2.0, 5.0])
    assert torch.equal(model(x0, xt, sizes, 0, level), plain(x0, xt, sizes, 0, level))
    assert torch.equal(model(x0, xt, sizes, 0, level, candidate=x0), torch.zeros(4, 8).double())
    for name, w in model.energy.named_parameters():
        if not name.startswith(("join", "score")):
            assert torch.equal(w, plain.state_dict()[name]), name
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    assert trained == {f"energy.{name}" for name, _ in model.energy.named_parameters()}
    # its own weights come back as they were
    torch.nn.init.normal_(model.energy.score[2].weight)
    again = EDLM(plain.cfg).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x0, xt, 4, candidate=x0), model(x0, xt, 4, candidate=x0))
    with pytest.raises(RuntimeError):
        again.load_state_dict({k: v for k, v in model.state_dict().items() if "join" not in k})


def test_an_energy_is_about_its_block_and_the_text_before_it():
    model, _, _ = network(seq_len=8, letters=3)
    x0, y = torch.randint(3, (2, 6, 8), generator=torch.Generator().manual_seed(1))
    xt = torch.where(torch.rand(6, 8, generator=torch.Generator().manual_seed(2)) < 0.5, 3, x0)
    E = model(x0, xt, 4, candidate=y)
    assert torch.equal(E[:, :1].expand(6, 4), E[:, :4]) and torch.equal(E[:, 4:5].expand(6, 4), E[:, 4:])
    blocks = lambda changed: (changed != E).any(0).view(2, 4).any(1).tolist()
    for i in range(8):
        other = lambda z, i=i: torch.where(torch.arange(8) == i, (z + 1) % 3, z)
        assert blocks(model(x0, xt, 4, candidate=other(y))) == [i < 4, i >= 4], "its own candidate"
        assert blocks(model(x0, other(xt), 4, candidate=y)) == [i < 4, i >= 4], "its own noise"
        assert blocks(model(other(x0), xt, 4, candidate=y)) == [False, i < 4], "clean text before it"
    h = model.energy.hidden(x0, xt, 4, candidate=y)[0][:, 8:12]
    agree(E[:, 0], model.energy.score(model.energy.norm(h).mean(1))[:, 0])
    # rows of several sizes, and a block behind a cache
    mixed = model(x0, xt, torch.tensor([4, 8, 2] * 2), candidate=y)
    agree(mixed[::3], E[::3])
    assert torch.equal(mixed[1, :1].expand(8), mixed[1]) and (mixed[2, ::2] - mixed[2, 1::2]).abs().max() == 0
    agree(model(x0[:, :4], xt[:, 4:], 4, 4, candidate=y[:, 4:]), E[:, 4:])
    cache = model.new_cache(6, 8)
    model(x0[:, :4], xt[:, 4:], 4, 4, cache=cache, candidate=y[:, 4:])
    agree(model(x0[:, :0], xt[:, 4:], 4, 4, cache=cache, candidate=y[:, 4:]), E[:, 4:])


# ----- the sampler


def by_enumeration(model, process, alphas, candidates, sign=-1.0):
    """The law over states(V, L) of the sampler with a window of all times, by matrix products."""
    x = states(V + 1, L)
    with torch.no_grad():
        p = process.denoiser_logits(model(x[:, :0], x, L), x, 0.5).softmax(-1)
        q = product(p, x)  # (27, 27): from x_t to candidates
        x_t, y = (z.flatten(0, 1) for z in (x[:, None].expand(-1, 27, -1), x[None].expand(27, -1, -1)))
        E = model(x_t[:, :0], x_t, L, candidate=y)[:, 0].view(27, 27)
    law = (x == V).all(1).double()
    for a_t, a_s in itertools.pairwise(alphas):
        move = (a_s - a_t) / (1 - a_t)
        step = torch.zeros(27, 27, dtype=torch.float64)
        for i in range(27):
            some = q[i].nonzero()[:, 0]
            r = torch.zeros(27, dtype=torch.float64)
            r[some] = kept(q[i, some], (sign * E[i, some]).exp(), candidates)
            stays = (x == x[i]).double() * torch.where(x[i] == V, 1 - move, 1.0)  # (27, L): after the step
            fills = (x[None] == x[:, None]).double() * torch.where(
                x[i] == V, move, 0.0
            )  # (candidate, after, L)
            step[i] = r @ (stays + fills).prod(-1)
        law = law @ step
    return law[(x < V).all(1)]


@pytest.mark.parametrize("path", GENERATE)
def test_texts_have_the_distribution_that_enumeration_gives(path):
    """And not that of exp(+E), nor that without an energy, nor that of the best candidate."""
    model, _, process = network(seed=3, scale=1.5)
    p, *others = (by_enumeration(model, process, [0.0, 0.5, 1.0], 2, s) for s in (-1.0, 1.0, 0.0, -50.0))
    how = {"candidates": 2, "start": 1.0, "stop": 0.0, "steps": 2, "seed": 3}
    n = 2000
    state = last(GENERATE[path](model, process, [()] * n, block_size=L, sampler=edlm_nce.edlm_nce, **how))
    draws(code(state.x, V).bincount(minlength=V**L), p, *others)


@pytest.mark.parametrize("path", GENERATE)
def test_a_text_does_not_depend_on_cache_or_company(path):
    model, _, process = network(seq_len=8, letters=3)
    prompts = ([(), (1,), (0, 2, 1), (2,) * 5, (1, 0)] * 7)[:33]
    run = lambda prompts, **how: last(
        GENERATE[path](
            model, process, prompts, block_size=4, sampler=edlm_nce.edlm_nce, seed=5, steps=4, **how
        )
    )
    state = run(prompts)
    assert torch.equal(run(prompts, use_cache=False).x, state.x)
    for i, prompt in enumerate(prompts[:5]):
        assert state.x[i, : len(prompt)].tolist() == list(prompt)
        assert torch.equal(run(prompts[: i + 1]).x[i], state.x[i])
    assert (state.x >= 0).all() and (state.x < 3).all()
    assert (run([(1,)], max_new_tokens=2).x[0, 3:] < 0).all()


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_p": 1e-6}])
def test_the_surest_token_has_no_chance_in_it(how):
    model, _, process = network(seq_len=8, letters=3)
    rows = {"block_size": 4, "max_new_tokens": 4, "steps": 1, "start": 1.0, "sampler": edlm_nce.edlm_nce}
    write = lambda **more: last(GENERATE["fast"](model, process, [()] * 20, **rows, **more)).x
    x = write(**how)
    assert (x == x[0]).all() and (write() != x).any()


@pytest.mark.parametrize("path", GENERATE)
def test_a_row_does_not_feel_who_leaves_before_it(path):
    """Row 0 is a full prompt, which needs no block, or an empty one, which needs two."""
    model, _, process = network(seq_len=8, letters=3)
    how = {"block_size": 4, "sampler": edlm_nce.edlm_nce, "steps": 4, "start": 1.0, "stop": 0.0, "seed": 5}
    others = lambda first: last(GENERATE[path](model, process, [first] + [()] * 20, **how)).x[1:]
    assert torch.equal(others((0, 1, 2, 0, 1, 2, 0, 1)), others(()))


def test_outside_the_window_it_is_ancestral_sampling_bit_for_bit():
    model, plain, process = network(seq_len=8, letters=3)
    how = {"block_size": 4, "steps": 4, "seed": 5}
    own = {"sampler": edlm_nce.edlm_nce, "start": 0.45, "stop": 0.3}
    text = last(GENERATE["fast"](model, process, [()] * 40, **how, **own)).x
    assert torch.equal(text, last(GENERATE["fast"](plain, process, [()] * 40, **how)).x)


def test_no_random_number_is_used_twice_in_a_step(monkeypatch):
    model, _, process = network(seq_len=8, letters=3)
    handed, real = [], Noise.uniform
    monkeypatch.setattr(Noise, "uniform", lambda self, n: handed.append(real(self, n)) or handed[-1])
    how = {"block_size": 4, "max_new_tokens": 4, "steps": 1, "start": 1.0, "candidates": 3}
    last(GENERATE["lesson"](model, process, [()], sampler=edlm_nce.edlm_nce, **how))
    numbers = torch.cat([u.flatten() for u in handed])
    assert len(numbers) > 4 and len(numbers.unique()) == len(numbers)


def test_a_text_that_is_written_takes_no_more_passes():
    model, _, process = network(seq_len=8, letters=3)
    how = {"block_size": 4, "max_new_tokens": 1, "steps": 50, "sampler": edlm_nce.edlm_nce}
    how |= {"start": 0.015, "stop": 0.0}  # times 1, 0.98, ..., 0.02: none is inside
    states = [last(GENERATE["lesson"](model, process, [(1, 2, 0)], seed=s, **how)) for s in range(8)]
    assert min(state.nfe for state in states) < 25


def test_candidates_are_judged_at_the_level_at_which_they_are_drawn():
    model, _, process = network(seq_len=8, letters=3, time_conditioning=True)
    for window in ({"start": 1.0, "stop": 0.0}, {}):
        seen, forward = [], model.forward

        def spy(clean, noisy, b, start=0, sigma=None, *more, candidate=None, forward=forward, seen=seen):
            seen.append((candidate is not None, sigma.tolist()))
            return forward(clean, noisy, b, start, sigma, *more, candidate=candidate)

        model.forward = spy
        how = {"block_size": 4, "max_new_tokens": 4, "steps": 4, "sampler": edlm_nce.edlm_nce}
        last(GENERATE["lesson"](model, process, [()], **how, **window))
        model.forward = forward
        alpha = [d.loglinear(torch.tensor([1 - k / 4]).double())[0] for k in range(4)]
        judged = [True] * 4 if window else [False, False, True, False]
        want = [
            (c, d.sigma(a).tolist()) for a, j in zip(alpha, judged, strict=True) for c in [0, *[1] * 2 * j]
        ]
        assert [(int(c), s) for c, s in seen] == want[: len(seen)] and len(seen) > 3


def test_an_energy_is_asked_inside_the_window():
    """Times 1, 3/4, 1/2, 1/4: a pass a step, and one a candidate at 1/2; context is read once by each network."""
    model, _, process = network(seq_len=8, letters=3)
    run = lambda **how: last(
        GENERATE["lesson"](
            model, process, [(0, 1, 2, 0)] * 40, block_size=4, sampler=edlm_nce.edlm_nce, steps=4, **how
        )
    )
    state = run()
    assert state.nfe == 4 + 2 and state.token_forwards == 40 * (4 * 4 + 4 + 2 * 4 + 4)
    assert run(candidates=5).nfe == 4 + 5
    assert run(start=1.0, stop=0.25, candidates=3).nfe == 4 * (1 + 3)
    assert run(start=0.45, stop=0.3).nfe == 4, "no step falls inside"
    seen, forward = [], model.forward

    def spy(clean, noisy, b, start=0, *more, candidate=None):
        if candidate is not None:
            seen.append((start, clean[0].tolist()))
        return forward(clean, noisy, b, start, *more, candidate=candidate)

    model.forward = spy
    run()
    assert seen == [(4, [0, 1, 2, 0]), (4, [])], "where the block stands, behind its context"


# ----- checkpoints and refusals


BASE = [
    *TINY,
    "--n_layers=1",
    "--n_samples=0",
    "--n_eval=4",
    "--dataset=pairs",
    "--lr_schedule=constant",
    "--warmup=1",
]


def test_a_checkpoint_is_trained_resumed_sampled_and_evaluated(project, capsys, slip):
    run(training.main, *BASE, "--block_sizes=1:0.25,4:0.75", "--max_steps=2", "--out_dir=base", "--lr=0.1")
    flags = [*BASE, "--method=edlm_nce", "--ckpt=base", "--eval_every=2"]
    (a, _), base = resumed(training.main, *flags), checkpoint.load("base")
    run(training.main, "--method=edlm_nce", "--ckpt=base", "--max_steps=1", "--n_samples=0")
    mine = checkpoint.load("base_edlm")["config"]
    assert all(mine[name] == base["config"][name] for name in edlm_nce.INHERITS) and mine["batch_size"] == 4
    other = ["--method=edlm_nce", "--ckpt=whole", "--out_dir=parts", "--max_steps=5", "--resume"]
    assert "trained with ckpt base, not whole" in slip(training.main, argv=[*BASE, *other])
    assert all(torch.equal(a[part][k], base["ema"][k]) for part in ("model", "ema") for k in base["ema"])
    assert not torch.equal(a["model"]["energy.join.weight"], a["ema"]["energy.join.weight"]), "it learns"
    _, _, _, model, _ = rebuild("parts", torch.device("cpu"))
    assert type(model) is EDLM
    capsys.readouterr()
    for sampler in ("edlm_nce --steps=4", "edlm_nce --candidates=4 --plain"):
        name, *own = sampler.split()
        run(sample.main, "--ckpt=parts", "--device=cpu", f"--sampler={name}", *own, "--n_samples=3")
        assert "NFE" in capsys.readouterr().out, sampler
    nats = []
    for name in ("base", "parts"):
        run(evaluation.main, f"--ckpt={name}", "--device=cpu", "--n_eval=4", "--n_mc=1", "--plain")
        nats.append([line for line in capsys.readouterr().out.splitlines() if "block 4" in line])
    assert nats[0] == nats[1] and nats[0], "the bound of the masked network"


def test_what_it_cannot_serve_is_refused(slip, project):
    start = lambda *more: run(training.main, *BASE, "--max_steps=1", *more)
    ask = lambda *more: slip(
        training.main, argv=[*BASE, "--method=edlm_nce", "--max_steps=1", "--out_dir=c", *more]
    )
    start("--out_dir=uniform", "--process=uniform", "--block_sizes=4:1")
    assert "does not fill masks" in ask("--ckpt=uniform")
    start("--out_dir=ar", "--block_sizes=1:1")
    assert "does not fill masks" in ask("--ckpt=ar")
    start("--out_dir=gidd", "--method=gidd", "--block_sizes=4:1")
    assert "other noise than plain masks" in ask("--ckpt=gidd", "--time_conditioning=true")
    assert "--ckpt names" in ask("--ckpt=ar", "--init_from=uniform")
    published = "hf:a/b/c"
    cfg = TrainConfig(init_from=published)
    assert "published weights" in slip(edlm_nce.check, cfg, edlm_nce.Settings(published))
    for wrong in ({"fsdp": True}, {"dropout": 0.1}):
        cfg = TrainConfig(init_from="out/a", **wrong)
        assert next(iter(wrong)).replace("fsdp", "FSDP") in slip(
            edlm_nce.check, cfg, edlm_nce.Settings("out/a")
        )
    assert edlm_nce.DEFAULTS(edlm_nce.Settings("out/a/ckpt.pt")) == {
        "init_from": "out/a/ckpt.pt", "out_dir": "out/a_edlm", "lr": 1e-3, "ema": 0.99,
    }  # fmt: skip
    assert "no checkpoint" in ask("--ckpt=nowhere")
    model, plain, process = network(seq_len=8, letters=3)
    how = {"sampler": edlm_nce.edlm_nce, "block_size": 4}
    for bad in ({"candidates": 1}, {"start": 0.0}, {"start": 1.5}, {"stop": -0.1}, {"stop": 0.9}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            last(GENERATE["fast"](model, process, [()], **how, **bad))
    with pytest.raises(ValueError, match="--method edlm_nce"):
        last(GENERATE["fast"](plain, process, [()], **how))
    with pytest.raises(ValueError, match="not defined"):
        last(GENERATE["fast"](model, d.Uniform(3), [()], **how))
