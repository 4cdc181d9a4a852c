"""
Why believe methods/pgm.py? What a token is changes no prediction of its own group, bit for bit. With a perfect
network the loss of training and the bound of evaluation are the entropy. A network that is fed only what is
written says what it says in training. The sampler has the distribution that enumeration gives.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import TINY, resumed, run
from exact import GENERATE, agree, code, draws, entropy, enumerated, last, net, states

import diffusion as d
import eval as evaluation
import sample
import train as training
from methods import pgm
from methods.pgm import BOTH, NOBODY, PGM, PGMBlock
from model import ModelConfig
from rng import Noise
from run.restore import rebuild
from samplers import SAMPLERS

V, L = 2, 3  # letters and length of the enumerable row; the mask is id 2


def network(seed=0, seq_len=L, letters=V, n_layers=3, scale=0.5):
    """A random PGM in float64 with one encoder layer or more, and masked noise."""
    process = d.Masked(letters + 1, letters)
    torch.manual_seed(seed)
    model = (
        PGM(ModelConfig(letters + 1, seq_len, n_layers=n_layers, n_heads=2, d_model=16), 1).double().eval()
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 and len(p) > 3 else 0.0, 0.5)
    model.head.weight.data *= scale
    return model, process


def partition(B=16, T=6, letters=3):
    g = torch.Generator().manual_seed(2)
    x0, group = torch.randint(letters, (B, T), generator=g), torch.randint(2, (B, T), generator=g)
    given = torch.zeros(B, T).bool()
    given[:, 0] = True
    return x0, group, given


# ----- the network


def test_positions_are_read_by_their_distance():
    """Rotary: keys, and positions that are asked for, moved by 3 together, change nothing. One alone does."""
    model, _ = network(seq_len=12, letters=3)
    x, outputs = torch.randn(2, 2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.arange(5).expand(2, 5)
    mask = torch.ones(2, 1, 5, 5) > 0
    read = lambda asks, keys: model.swap(x, outputs, model.rope(at + asks), model.rope(at + keys), mask)
    agree(read(3, 3), read(0, 0))
    for one in (read(3, 0), read(0, 3)):
        assert (one - read(0, 0)).abs().max() > 1e-3


def test_dropout_is_of_what_a_layer_of_the_decoder_adds():
    cfg = ModelConfig(4, 6, n_layers=2, n_heads=2, d_model=16, dropout=1.0)
    layer, model = pgm.CrossLayer(cfg).double().train(), network(seq_len=6, letters=3)[0]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    where = x, model.rope(torch.arange(5).expand(2, 5)), model.rope(torch.arange(5).expand(2, 5)), None
    assert torch.equal(layer(x, *where), x) and not torch.equal(layer.eval()(x, *where), x)


def test_half_of_the_layers_are_the_decoders():
    for n, asked, want in ((4, 0, 2), (5, 0, 2), (4, 1, 1), (4, 3, 3)):
        cfg = ModelConfig(4, 6, n_layers=n, n_heads=2, d_model=16)
        model = pgm.network(cfg, pgm.Settings(decoder_layers=asked))
        assert (len(model.layers), len(model.decoder)) == (n - want, want)


def test_nothing_crosses_within_a_group():
    """Bit for bit: another token changes the predictions of the other group alone. A prompt changes all."""
    model, _ = network(seq_len=6, letters=3)
    x0, group, given = partition()
    before = model(None, x0, 6, given=given, group=group)
    for j in range(6):
        y = x0.clone()
        y[:, j] = (y[:, j] + 1) % 3
        changed = (model(None, y, 6, given=given, group=group) != before).any(-1)
        of_the_other = ~given & (group != group[:, j, None])
        if j == 0:
            assert changed[~given].all(), "the prompt is read by both groups"
        else:
            assert torch.equal(changed & ~given, of_the_other), j
    # and the prompt reads neither group: else it would carry one to the other
    alone = model(None, x0[:, :1], 1, given=given[:, :1], group=group[:, :1])
    assert alone.isfinite().all()


def test_a_position_is_asked_for_by_its_place():
    model, _ = network(seq_len=6, letters=3)
    x0, group, given = partition()
    logits = model(None, x0, 6, given=given, group=group * 0 + 1)  # all are asked for, from the prompt alone
    assert (logits[0, 2:] - logits[0, 1]).abs().amax(-1).min() > 1e-3, "places differ"
    same = x0[:, 0] == x0[0, 0]
    agree(logits[same, 1:], logits[:1, 1:].expand(int(same.sum()), -1, -1))  # not by what stands there
    # the start token alone cannot say where a position is: with one thing to read, attention has no choice
    logits = model(None, x0, 6, group=group * 0 + 1)
    agree(logits, logits[:, :1].expand(-1, 6, -1))


def waves(position, n):
    """position * 10000^(-j/n), j < n: (S, n)."""
    return position[:, None] * 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)


def by_hand(model, ids, group, given):
    """Logits (T, V) of one row (T,): each group reads a sequence of its own, without what it may not see."""
    rope = lambda at: (waves(at, 4).cos(), waves(at, 4).sin())
    logits = torch.zeros(len(ids), 4, dtype=torch.float64)
    for g in (0, 1):
        keep = [j for j in range(len(ids)) if given[j] or group[j] != g]
        prompt, at = [True] + [bool(given[j]) for j in keep], torch.tensor([-1, *keep])
        x = torch.cat((model.start[None], model.embed(ids[keep])))[None]
        reads = torch.tensor([[b or not a for b in prompt] for a in prompt])  # a prompt reads no other token
        for layer in model.layers:
            x = layer(x, rope(at), reads[None, None])
        ask = torch.tensor([i for i in range(len(ids)) if group[i] == g and not given[i]])
        every = torch.ones(1, 1, len(ask), len(at)).bool()
        y = model.query + torch.cat((waves(ask, 8).sin(), waves(ask, 8).cos()), dim=-1)[None]
        where = model.between(x), rope(ask), rope(at), every
        y = model.swap(y, *where)
        for layer in model.decoder:
            y = layer(y, *where)
        logits[ask] = model.to_logits(y)[0]
    return logits


def test_both_groups_at_once_are_two_passes_over_half_of_the_row():
    model, _ = network(seq_len=6, letters=3)
    x0, group, given = partition()
    logits = model(None, x0, 6, given=given, group=group)
    for row in range(4):
        agree(logits[row, 1:], by_hand(model, x0[row], group[row], given[row])[1:])


def test_what_is_fed_is_all_that_is_read():
    """
    The predictions of training; of a row with masks, as any network is called; and of the tokens of group 0
    alone, in any order, with filled up rows: one and the same.
    """
    model, process = network(seq_len=6, letters=3)
    x0, group, given = partition()
    want = model(None, x0, 6, given=given, group=group)
    masks = ~given & (group == 1)
    agree(model(None, torch.where(masks, 3, x0), 6, given=given)[masks], want[masks])
    u = torch.rand(16, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    at, real = pgm.first_of(~masks, u)
    ask, mine = pgm.first_of(masks, u)
    assert not real.all() and not mine.all(), "some rows are shorter"
    kinds = torch.where(given.gather(1, at), BOTH, 0).masked_fill(~real, NOBODY)
    ids = torch.where(real, x0.gather(1, at), 3)
    packed = model(None, ids, 6, at=at, group=kinds, ask=ask)
    agree(packed[mine], want.gather(1, ask[..., None].expand(-1, -1, 4))[mine])


def test_an_empty_group_is_no_fault():
    """The start token stands in for it: all masks, all written, or nothing fed at all."""
    model, _ = network(seq_len=6, letters=3)
    x0, group, given = partition()
    for g in (group * 0, group * 0 + 1):
        assert model(None, x0, 6, group=g).isfinite().all()
    nothing = x0[:, :0]
    ask = torch.arange(6).expand(16, 6)
    agree(
        model(None, nothing, 6, at=nothing, group=nothing, ask=ask), model(None, x0, 6, group=group * 0 + 1)
    )
    assert model(None, x0, 6, given=given | True, group=group).isfinite().all()


def test_clean_text_before_a_block_is_a_prompt():
    model, _ = network(seq_len=6, letters=3)
    x0, _, _ = partition()
    xt, given = x0.clone(), torch.zeros(16, 6).bool()
    xt[:, 3:], given[:, :2] = 3, True
    agree(model(x0[:, :2], xt[:, 2:], 4, 2), model(None, xt, 6, given=given)[:, 2:])
    assert model.new_cache(3, 8) is None
    for sizes in (1, 2, torch.tensor([4] * 15 + [1])):
        with pytest.raises(ValueError, match="no AR mode"):
            model(x0[:, :2], xt[:, 2:], sizes, 2)
    with pytest.raises(ValueError, match="beyond seq_len"):
        model(x0[:, :3], xt[:, 2:], 4, 3)


# ----- the loss


class Perfect:
    """The perfect network of a law p over rows x: a position sees the prompt and the other group."""

    timeless = True

    def __init__(self, p):
        self.x, self.log_p = states(V, L), p.log()

    def __call__(self, clean, ids, b, given, group):
        assert clean is None and b == L
        sees = (group[..., None] != group[:, None]) | given[:, None]
        differs = (ids[:, None] != self.x[None]).double()
        log_w = self.log_p[:, None] - 1e9 * torch.einsum("bij,bkj->bki", sees.double(), differs)
        is_v = torch.nn.functional.one_hot(self.x, V + 1).bool()
        return torch.where(is_v, log_w[..., None], -math.inf).logsumexp(1).clamp(min=-1e8)


class Told:
    """A Noise that gives the numbers it is told, (B, L)."""

    def __init__(self, numbers):
        self.numbers = self.key = numbers

    def uniform(self, n):
        return self.numbers[..., None]

    def to(self, device):
        return self


def law(seed=0):
    p = torch.rand(V**L, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3 + 0.01
    return p / p.sum()


def expected(loss, p, schedule, given=(), nodes=24):
    """E of a loss over all rows, all partitions and all t (Gauss-Legendre), in nats."""
    x, masks, total = states(V, L), states(2, L).bool(), 0.0
    k, m = (i.flatten() for i in torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
    shown = torch.zeros(64, L).bool()
    shown[:, list(given)] = True
    for node, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        t = torch.full((64,), (node + 1) / 2, dtype=torch.float64)
        alpha = schedule(t)[0][:, None]
        near = torch.where(masks[m], -1e-7, 1e-7)  # so near to the limit that another alpha is noticed
        how = {"given": shown, "charged": ~shown, "noise": Told(1 - alpha + near), "schedule": schedule}
        _, per_token = loss(Perfect(p), d.Masked(V + 1, V), x[k], L, t, "elbo", **how)
        chance = torch.where(masks[m], 1 - alpha, alpha).prod(-1)
        total += weight / 2 * (p[k] * chance * per_token.sum(1)).sum().item()
    return total


@pytest.mark.parametrize("schedule", d.SCHEDULES)
@pytest.mark.parametrize("loss", [pgm.pgm_loss, pgm.bound])
def test_with_a_perfect_network_the_loss_is_the_entropy(loss, schedule):
    """Of training, where both groups pay half, and of evaluation. The cosine's group 0 has weights of its own."""
    p = law()
    assert abs(expected(loss, p, d.SCHEDULES[schedule]) - entropy(p)) < 1e-9
    first = p.view(V, -1).sum(1)  # of the first token, a prompt: it costs nothing
    rest = expected(loss, p, d.SCHEDULES[schedule], given=[0])
    assert abs(rest - (entropy(p) - entropy(first))) < 1e-9


def test_who_pays():
    """In training every token but the prompt, at half; in evaluation group 1 in full. ce has no weights."""
    model, process = network(seq_len=6, letters=3)
    x0, _, given = partition()
    t = torch.rand(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    how = lambda: {"given": given, "charged": ~given, "noise": Noise(0, torch.arange(16), torch.arange(6))}
    xt = process.corrupt(x0, 1 - t, how()["noise"])
    group = (xt == 3).long()
    nats = -model(None, x0, 6, given=given, group=group)[..., :3].log_softmax(-1)
    nats = nats.gather(-1, x0[..., None])[..., 0].detach()
    both = pgm.pgm_loss(model, process, x0, torch.full((16,), 6), t, {6: "ce"}, **how())
    agree(both[1], torch.where(given, 0.0, nats) / 2)
    agree(both[0].detach(), both[1].sum())
    one = pgm.bound(model, process, x0, 6, t, "elbo", **how())[1]
    agree(one, torch.where(given | (group == 0), 0.0, nats / t[:, None]))


def test_training_pays_for_both_groups():
    model, process = network(seq_len=6, letters=3)
    cfg = type("Cfg", (), {"seq_len": 6, "block_sizes": {6: 1.0}})
    x0, given = torch.zeros(16, 6).long(), torch.zeros(16, 6) > 0
    how = {"given": given, "charged": ~given, "noise": Noise(0, torch.arange(16), torch.arange(6))}
    learner = pgm.Learner(cfg, pgm.Settings(), model, process, None)
    each = learner.loss(0)(model, process, x0, 6, torch.full((16,), 0.5).double(), "elbo", **how)[1]
    assert (each > 0).all()


# ----- the sampler


def by_enumeration(model, groups_of, prompt=()):
    """
    The law over states(V, L) of writing the open positions in groups, each group from what stands before it.
    groups_of: [(probability, groups)], lists of positions.
    """
    y, rows = states(V, L), states(3, L)
    with torch.no_grad():
        given = (torch.arange(L) < len(prompt)).expand(len(rows), L)
        table = model(None, rows, L, given=given)[..., :V].softmax(-1)
    found = torch.zeros(len(y), dtype=torch.float64)
    for q, groups in groups_of:
        x = torch.where(torch.arange(L) < len(prompt), y, V)
        each = q * (y[:, : len(prompt)] == torch.tensor(prompt).long()).all(1).double()
        for group in groups:
            p = table[code(x, 3)].gather(-1, y[..., None])[..., 0]
            x = x.clone()
            for i in group:
                each = each * p[:, i]
                x[:, i] = y[:, i]
        found += each
    return found


def even_groups(n_prompt, steps):
    """[(probability, groups)]: ceil(n (k + 1) / T) written after step k, positions in random order."""
    n = L - n_prompt
    T = min(n, steps)
    ends = [0] + [-(-n * (k + 1) // T) for k in range(T)]
    orders = list(itertools.permutations(range(n_prompt, L)))
    return [(1 / len(orders), [o[a:b] for a, b in itertools.pairwise(ends)]) for o in orders]


@pytest.mark.parametrize("path, steps, prompt", [("fast", 2, ()), ("lesson", 3, ()), ("fast", 1, (1,))])
def test_texts_have_the_distribution_that_enumeration_gives(path, steps, prompt):
    model, process = network(seed=2, scale=1.5)
    p = by_enumeration(model, even_groups(len(prompt), steps), prompt)
    other = by_enumeration(model, even_groups(len(prompt), 3 if steps == 1 else 1), prompt)
    prompts = [prompt] * 2000
    state = last(GENERATE[path](model, process, prompts, block_size=L, sampler=pgm.pgm, steps=steps, seed=3))
    draws(code(state.x, V).bincount(minlength=V**L), p, other)


def test_uneven_steps_are_ancestral_sampling():
    """The same law as the plain sampler of any network, by exact.enumerated; and it is another than even steps."""
    model, process = network(seed=2, scale=1.5)
    lesson = lambda clean, x, b, start, sigma: model(None, x, b)
    found = enumerated(lesson, process, L, 2, L)
    p = torch.tensor([found.get(tuple(y), 0.0) for y in states(V, L).tolist()], dtype=torch.float64)
    how = {"block_size": L, "steps": 2, "seed": 1}
    packed = last(GENERATE["fast"](model, process, [()] * 2000, sampler=pgm.pgm, even=False, **how))
    draws(code(packed.x, V).bincount(minlength=V**L), p, by_enumeration(model, even_groups(0, 2)))
    plain = last(GENERATE["fast"](model, process, [()] * 2000, sampler=SAMPLERS["ancestral"], **how))
    draws(code(plain.x, V).bincount(minlength=V**L), p)


def test_other_samplers_tell_the_network_what_is_prompt():
    model, process = network(seq_len=8, letters=3)
    seen, forward = [], model.forward

    def spy(clean, noisy, b, start=0, sigma=None, cache=None, given=None):
        seen.append(given)
        return forward(clean, noisy, b, start, sigma, cache, given=given)

    model.forward = spy
    for path in GENERATE:
        last(GENERATE[path](model, process, [(1,), (0, 2, 1)], block_size=8, steps=2))
        assert seen.pop().tolist() == [[i < 1 for i in range(8)], [i < 3 for i in range(8)]]
    assert model.block_class is PGMBlock


@pytest.mark.parametrize("even", [True, False])
def test_a_text_does_not_depend_on_company(even):
    model, process = network(seed=1, seq_len=8, letters=3)
    prompts = ([(), (1,), (0, 2, 1), (2,) * 7, (1, 0)] * 7)[:33]
    run = lambda prompts, path="fast", **how: last(
        GENERATE[path](model, process, prompts, block_size=8, sampler=pgm.pgm, seed=5, even=even, **how)
    )
    state = run(prompts, steps=4)
    assert torch.equal(run(prompts, "lesson", steps=4).x, state.x)
    assert torch.equal(run(prompts, steps=4, use_cache=False).x, state.x)
    for i, prompt in enumerate(prompts[:5]):
        assert state.x[i, : len(prompt)].tolist() == list(prompt)
        assert torch.equal(run(prompts[: i + 1], steps=4).x[i], state.x[i])
    assert (state.x >= 0).all() and (state.x < 3).all()
    assert torch.equal(run([()], steps=4, max_new_tokens=5).x[0, :5], run([()], steps=4).x[0, :5])
    assert (run([(1,)], steps=4, max_new_tokens=5).x[0, 6:] < 0).all()


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_p": 1e-6}])
def test_the_surest_token_has_no_chance_in_it(how):
    model, process = network(seed=1, seq_len=8, letters=3)
    rows = {"block_size": 8, "sampler": pgm.pgm, "steps": 1}
    write = lambda **more: last(GENERATE["fast"](model, process, [()] * 20, **rows, **more)).x
    x = write(**how)
    assert (x == x[0]).all() and (write() != x).any()


def test_a_row_counts_the_passes_in_which_it_is_written():
    model, process = network(seed=1, seq_len=8, letters=3)
    prompts = [(), (1,), (0, 2, 1), (2,) * 6, (2,) * 7]
    how = {"block_size": 8, "sampler": pgm.pgm, "steps": 4}
    state = last(GENERATE["fast"](model, process, prompts, **how))
    assert state.nfe == 4 and state.nfe_rows.tolist() == [4, 4, 4, 2, 1]
    # at random: what is prompt is not asked for
    asked, forward = [], model.forward

    def spy(clean, noisy, *args, ask=None, **more):
        asked.append(ask)
        return forward(clean, noisy, *args, ask=ask, **more)

    model.forward = spy
    last(GENERATE["fast"](model, process, [(2,) * 6], even=False, **how))
    assert sorted(torch.cat(asked, dim=1)[0].tolist()) == [6, 7]


def test_passes_and_tokens_are_counted():
    """A pass reads the start token and what is written, and asks for what it writes."""
    model, process = network(seed=1, seq_len=8, letters=3)
    run = lambda prompt, steps: last(
        GENERATE["fast"](model, process, [prompt] * 5, block_size=8, sampler=pgm.pgm, steps=steps)
    )
    for prompt, steps in (((), 4), ((1, 2), 3), ((), 8), ((1,) * 6, 8), ((), 1)):
        n, p = 8 - len(prompt), len(prompt)
        T = min(n, steps)
        ends = [-(-n * k // T) for k in range(T + 1)]
        state = run(prompt, steps)
        assert state.nfe == T and (state.nfe_rows == T).all()
        assert state.token_forwards == 5 * sum(1 + p + b for a, b in itertools.pairwise(ends))


# ----- checkpoints and refusals


FLAGS = [*TINY, "--dataset=pairs", "--method=pgm", "--lr=0.1", "--warmup=1", "--lr_schedule=constant"]


def test_a_checkpoint_is_trained_resumed_sampled_and_evaluated(project, capsys):
    flags = [
        *FLAGS,
        "--block_sizes=12:1",
        "--n_layers=3",
        "--decoder_layers=2",
        "--eval_every=2",
        "--n_samples=0",
        "--n_eval=4",
    ]
    one, _ = resumed(training.main, *flags)
    assert one["config"]["objective"] == "elbo"
    _, _, _, model, _ = rebuild("parts", torch.device("cpu"))
    assert type(model) is PGM and len(model.layers) == 1 and len(model.decoder) == 2
    capsys.readouterr()
    for sampler in ("pgm", "pgm --even=false --plain", "ancestral"):
        name, *own = sampler.split()
        run(sample.main, "--ckpt=parts", "--device=cpu", f"--sampler={name}", *own, "--n_samples=3")
        assert "NFE" in capsys.readouterr().out, sampler
    run(evaluation.main, "--ckpt=parts", "--device=cpu", "--n_eval=8", "--n_mc=2")
    assert "nats" in capsys.readouterr().out


def test_what_it_cannot_serve_is_refused(slip, project):
    ask = lambda *more: slip(training.main, argv=[*FLAGS, "--max_steps=1", "--out_dir=c", *more])
    assert "the row, here of 12 tokens" in ask("--block_sizes=4:1")
    assert "no AR mode" in ask("--block_sizes=1:0.5,12:0.5")
    assert "each need one" in ask("--block_sizes=12:1", "--decoder_layers=2")
    assert "each need one" in ask("--block_sizes=12:1", "--n_layers=1")
    for wrong in ("--process=uniform", "--time_conditioning=true"):
        assert "masked noise" in ask("--block_sizes=12:1", wrong)
    assert "masked noise" in ask("--block_sizes=1:1", "--next_token")
    model, process = network(seq_len=8, letters=3)
    how = {"sampler": pgm.pgm}
    with pytest.raises(ValueError, match="whole row, 8"):
        last(GENERATE["fast"](model, process, [()], block_size=4, **how))
    with pytest.raises(ValueError, match="--method pgm"):
        last(GENERATE["fast"](net(process, seq_len=8), process, [()], block_size=8, **how))
    with pytest.raises(ValueError, match="not defined"):
        last(GENERATE["fast"](model, d.Uniform(3), [()], block_size=8, **how))
    with pytest.raises(ValueError, match="no AR mode"):
        last(GENERATE["fast"](model, process, [()], block_size=8, trained=[8], sampler=SAMPLERS["arpc"]))
