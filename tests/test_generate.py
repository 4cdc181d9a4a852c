"""
Why believe generate.py? Ancestral and AR sampling draw their enumerated distributions, through the same loop
with its prompts, cache, early ends and counts. It holds for the fast form, which runs by default, and for the
lesson. They differ in the passes they make, and the tests say where.
"""

import math

import pytest
import torch
from conftest import slow
from exact import (
    GENERATE,
    KINDS,
    P_VALUE,
    V3,
    agree,
    chi_squared,
    enumerated,
    enumerated_ar,
    last,
    net,
    on,
    speed,
)

import diffusion as d
import fast
from fast.block import FastBlock, generate
from generate import NOTHING, Block
from rng import Noise
from run import machine
from samplers.guided import speculation
from samplers.reverse import psi

PATHS = pytest.mark.parametrize("path", GENERATE)
LESSON_FIRST = pytest.mark.parametrize("path", slow(GENERATE, ["lesson"]))  # fast/ too: test_samplers.py
KINDS_HERE = ["masked", "uniform loo", "uniform denoiser, timed"]
CASES = [(2, 3, (), (1.0, 1.0)), (4, 4, (), (1.0, 1.0)), (2, 2, (2,), (1.0, 1.0)), (2, 2, (), (1.5, 0.9))]


@pytest.mark.parametrize("b, steps, prompt, sharp", slow(CASES, CASES[2:3]))
@pytest.mark.parametrize("kind", slow(KINDS_HERE, KINDS_HERE[:1]))
@LESSON_FIRST
def test_the_sampler_draws_the_enumerated_distribution(path, kind, b, steps, prompt, sharp):
    make, kw = KINDS[kind]
    process, L, n = make(), 4, 40_000
    model = net(process, seed=1, **kw)
    p = enumerated(model, process, b, steps, L, prompt, temperature=sharp[0], top_p=sharp[1])
    how = {"temperature": sharp[0], "top_p": sharp[1], "max_new_tokens": L - len(prompt)}
    x = last(GENERATE[path](*on(path, model, process), [prompt] * n, block_size=b, steps=steps, **how)).x
    counts = (x * torch.tensor([V3**k for k in range(L)])).sum(-1).bincount(minlength=V3**L)
    expected = torch.zeros(V3**L, dtype=torch.float64)
    for seq, q in p.items():
        expected[sum(v * V3**k for k, v in enumerate(seq))] = q
    assert abs(expected.sum() - 1) < 1e-6
    assert chi_squared(counts, expected) > P_VALUE
    other = enumerated(model, process, b, steps + 2, L, prompt, temperature=sharp[0], top_p=sharp[1])
    wrong = torch.zeros_like(expected)
    for seq, q in other.items():
        wrong[sum(v * V3**k for k, v in enumerate(seq))] = q
    if (wrong - expected).abs().sum() > 0.04:  # where two more steps matter, the test tells them apart
        assert chi_squared(counts, wrong) < P_VALUE
    elif sharp == (1.0, 1.0):
        assert kind != "masked"  # where steps matter most


@pytest.mark.parametrize("kind", slow(["masked", "uniform denoiser, ar token"], ["masked"]))
@LESSON_FIRST
def test_ar_sampling_and_ar_then_block_draw_their_distributions(path, kind):
    make, kw = KINDS[kind]
    process, n, generate = make(), 40_000, GENERATE[path]
    model, process = on(path, net(process, seed=1, **kw), process)
    chain = enumerated_ar(model, process, 3)
    x = last(generate(model, process, [()] * n, block_size=1, max_new_tokens=3)).x
    expected = torch.zeros(V3**3, dtype=torch.float64)
    for seq, q in chain.items():
        expected[sum(v * V3**k for k, v in enumerate(seq))] = q
    code = lambda x: (x * torch.tensor([1, V3, V3**2])).sum(-1).bincount(minlength=V3**3)
    assert chi_squared(code(x), expected) > P_VALUE
    # two tokens by AR, then a block of two
    state = last(generate(model, process, [()] * n, block_size=2, steps=2, max_new_tokens=4, ar_tokens=2))
    assert state.nfe == 2 + 2
    expected = torch.zeros(V3**4, dtype=torch.float64)
    for context, w in enumerated_ar(model, process, 2).items():
        for seq, q in enumerated(model, process, 2, 2, 4, context).items():
            expected[sum(v * V3**k for k, v in enumerate(seq))] += w * q
    assert (
        chi_squared(
            (state.x * torch.tensor([V3**k for k in range(4)])).sum(-1).bincount(minlength=V3**4), expected
        )
        > P_VALUE
    )
    # AR that stops inside a block: the block keeps its first token
    model.double()
    state = last(
        generate(model, process, [()] * 50, block_size=4, steps=2, max_new_tokens=4, ar_tokens=1, seed=3)
    )
    ar = last(generate(model, process, [()] * 50, block_size=1, max_new_tokens=1, seed=3))
    assert torch.equal(state.x[:, :1], ar.x)


# ----- the loop


RAGGED = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0), (1, 0)]
SIZES = [(1, 0), (2, 0), (4, 0), (2, 1), (4, 2)]


@pytest.mark.parametrize("b, ar_tokens", slow(SIZES, SIZES[::2]))
@pytest.mark.parametrize("kind", KINDS)
@LESSON_FIRST
def test_ragged_prompts_and_batch_mates_change_nothing(path, kind, b, ar_tokens):
    make, kw = KINDS[kind]
    process = make()
    model, process = on(path, net(process, **kw).double(), process)
    how = {
        "block_size": b,
        "steps": 3 if b > 1 else None,
        "seed": 5,
        "max_new_tokens": 3,
        "ar_tokens": ar_tokens,
    }
    run = lambda prompts, **k: last(GENERATE[path](model, process, prompts, **how, **k))
    together = run(RAGGED)
    assert together.done.all()
    for cached in (True, False):
        assert torch.equal(run(RAGGED, use_cache=cached).x, together.x)
    for i, prompt in enumerate(RAGGED):
        n = len(prompt)
        assert together.x[i, :n].tolist() == list(prompt), "the prompt stays"
        assert (together.x[i, n : n + 3] >= 0).all() and (together.x[i, n + 3 :] == NOTHING).all()
        mates = [prompt] * (i + 1)  # same row number, other mates
        assert torch.equal(run(mates).x[i, : n + 3], together.x[i, : n + 3])


@pytest.mark.parametrize("kind", ["masked", "uniform loo"])
@PATHS
def test_a_row_ends_at_its_first_generated_eos_and_leaves(path, kind):
    make, kw = KINDS[kind]
    process, eos, generate = make(), 1, GENERATE[path]
    model, process = on(path, net(process, **kw).double(), process)
    prompts = [(1, 0), (0,), (1, 1, 1), ()] * 10  # an EOS in the prompt ends nothing
    free = last(generate(model, process, prompts, block_size=2, steps=2, max_new_tokens=5, seed=2))
    sizes = []
    forward = model.forward
    model.forward = lambda clean, noisy, *a, **kw: (
        sizes.append(noisy.size(0)) or forward(clean, noisy, *a, **kw)
    )
    state = last(
        generate(model, process, prompts, block_size=2, steps=2, max_new_tokens=5, seed=2, eos_id=eos)
    )
    ended = 0
    for i, p in enumerate(prompts):
        new, unstopped = state.x[i, len(p) : len(p) + 5].tolist(), free.x[i, len(p) : len(p) + 5].tolist()
        stop = unstopped.index(eos) + 1 if eos in unstopped else 5
        ended += stop < 4
        assert new[:stop] == unstopped[:stop], "stopping changes no token before it"
        assert (state.x[i, len(p) + stop :] == NOTHING).all()
    assert ended > 3 and max(sizes[:2]) > sizes[-1], "ended rows cost no more passes"
    assert max(sizes[:2]) <= 20 or path == "lesson", "nor do those whose prompt fills the block"
    assert (
        state.nfe == len(sizes)
        and state.nfe_rows.max() <= state.nfe
        and state.nfe_rows.min() < state.nfe_rows.max()
    )


@PATHS
def test_the_loop_is_an_iterator_of_states_and_counts(path):
    process, generate = d.Masked(V3 + 1, V3), GENERATE[path]
    model, process = on(path, net(process), process)
    seen = list(generate(model, process, [(0,)] * 3, block_size=4, steps=2, max_new_tokens=7))
    spans = [
        ((0, 0), 0, 0),
        ((0, 4), 0, 0),
        ((0, 4), 1, 1),
        ((0, 4), 2, 2),
        ((4, 8), 0, 2),
        ((4, 8), 1, 3),
        ((4, 8), 2, 4),
    ]
    assert [(s.span, s.step, s.nfe) for s in seen] == spans
    assert seen[1].x.tolist() == [[0, V3, V3, V3] + [NOTHING] * 4] * 3 and (seen[-1].x < V3).all()
    steps = (seen[1], seen[2]), (seen[2], seen[3]), (seen[4], seen[5]), (seen[5], seen[6])
    if path == "fast":
        # a pass of a row: 4 noisy tokens, where a mask lifts. The first block's 4 clean tokens are read once,
        # and then
        # the noisy tokens of all rows are run too
        lifts = torch.stack([(a.x != b.x).any(1) for a, b in steps])
        assert torch.equal(seen[-1].nfe_rows, lifts.sum(0)) and lifts.sum() < 12
        assert seen[-1].token_forwards == 3 * 4 + 4 * (lifts.sum() + (~lifts[2]).sum())
    else:  # all rows of the batch at every step, as long as they have masks
        live = torch.stack([(a.x == V3).any(1) for a, _ in steps])
        assert torch.equal(seen[-1].nfe_rows, live.sum(0))
        assert seen[-1].token_forwards == 3 * (4 * 4 + 4)
    moved = seen[2].x != V3
    assert torch.equal(seen[3].x[moved], seen[2].x[moved]), "masked: a written token stays"
    assert not torch.equal(seen[2].x, seen[3].x)
    none = list(generate(model, process, [(0,)], block_size=4, max_new_tokens=0))
    assert len(none) == 1 and none[0].done.all()


@PATHS
def test_passes_of_a_row_are_those_it_needed(path):
    """
    The second row waits while the first writes its two blocks, and is there when the cache takes in the first
    of them.
    """
    model, process = on(path, net(d.Uniform(V3), time_conditioning=True), d.Uniform(V3))
    how = {"block_size": 2, "steps": 3, "max_new_tokens": 4, "sampler": psi}  # asks at every step
    state = last(GENERATE[path](model, process, [(), (1, 1, 1, 1)], **how))
    assert state.nfe == 12 and state.nfe_rows.tolist() == [6, 6]


@PATHS
def test_greedy_needs_no_luck_and_bad_requests_are_refused(path):
    process, generate = d.Masked(V3 + 1, V3), GENERATE[path]
    model, process = on(path, net(process), process)
    run = lambda **k: last(generate(model, process, [(0,), (1, 2)], **{"block_size": 1, **k})).x
    assert torch.equal(run(temperature=0.0, seed=1), run(temperature=0.0, seed=2))
    assert not torch.equal(run(seed=1), run(seed=2))
    for bad in (
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"block_size": 3},
        {"max_new_tokens": 20},
        {"steps": 0, "block_size": 2},
        {"max_new_tokens": -1},
    ):
        with pytest.raises(ValueError):
            run(**bad)
    for bad in (
        [[0, -1]],
        [[V3]],
        [[V3 + 1]],
        [],
        [0, 1],
    ):  # no such id, the mask, none, not a list of prompts
        with pytest.raises(ValueError):
            last(generate(model, process, bad, block_size=1))
    assert last(generate(model, process, torch.tensor([[0, 1]]), block_size=1)).x.shape == (1, 8)
    single, process = on(path, net(process, clean_causal=False).double(), d.Masked(V3 + 1, V3))
    with pytest.raises(ValueError, match="block-causal"):
        last(generate(single, process, [()], block_size=4, ar_tokens=2))
    run = lambda cached: (
        last(generate(single, process, [(0,), (1, 2, 0, 1, 2)], block_size=4, use_cache=cached)).x
    )
    assert torch.equal(run(True), run(False)), "its own block size it serves"


@pytest.mark.parametrize("block", [FastBlock, Block])
@PATHS
def test_a_next_token_network_writes_behind_prompts_of_several_lengths(path, block):
    """
    Rows that wait are not run. What the last layer made of the others' tokens is read off the fast cache.
    Where the cache has keys and values only, the token before the block is read again.
    """
    model, process = on(path, net(d.Masked(V3 + 1, V3), next_token=True).double(), d.Masked(V3 + 1, V3))
    how = {"block_size": 1, "ar_tokens": 1, "max_new_tokens": 3, "block_class": block}
    run = lambda **kw: last(GENERATE[path](model, process, [(1, 2), (1, 2, 0, 1, 2)], **how, **kw)).x
    assert torch.equal(run(), run(use_cache=False)) and (run()[0, :5] < V3).all()


def test_few_rows_of_many_are_run_alone():
    """Attention takes a few rows' keys and values out of the cache, or all rows: one text."""
    model, process = speed(net(d.Masked(V3 + 1, V3), time_conditioning=True).double(), d.Masked(V3 + 1, V3))
    run = lambda **kw: last(generate(model, process, [()] * 24, block_size=4, steps=40, **kw)).x
    assert torch.equal(run(), run(use_cache=False))


def test_a_sampler_meets_the_noise_of_every_step_and_old_steps_are_forgotten():
    """
    However its random numbers are made: those of (seed, row, position, step), the same each time a step is
    asked for.
    """
    kept = []

    def watch(block):
        for k in (-1, 0, 1, -2, 20, 3, 100, -2, *range(100, 140), 0):
            want = Noise(7, block.rows, block.positions, k).uniform(2)
            assert torch.equal(block.noise(k).uniform(2), want) and torch.equal(
                block.noise(k).uniform(2), want
            )
            kept.append(len(block.noises))
        block.live = torch.zeros_like(block.live)
        yield

    model, process = speed(net(d.Masked(V3, V3 - 1), seq_len=8), d.Masked(V3, V3 - 1))
    last(generate(model, process, [(), (1,)], block_size=4, steps=50, sampler=watch, seed=7))
    assert max(kept) <= 18


def test_a_clean_stream_that_sees_the_noise_level_serves_no_merged_draft():
    """
    One pass would have two levels. A draft in a pass of its own is served; in the lesson every draft is one.
    """
    process = d.Masked(V3, V3 - 1)
    model = net(process, seq_len=8, time_conditioning=True, condition_clean=True)
    run = lambda draft: last(generate(model, process, [()], block_size=4, sampler=speculation, draft=draft))
    assert (run("diffusion").x >= 0).all() and (run("merged").x >= 0).all()
    model, process = speed(model, process)
    assert (run("diffusion").x >= 0).all()
    with pytest.raises(ValueError, match="sees the noise level"):
        run("merged")


@pytest.mark.parametrize("sharded", ["no", "yes", "but for the root"])
def test_texts_and_network_can_be_trained_afterwards(sharded):
    """
    Inference mode leaves no trace in what is yielded, nor in the tensors that FSDP keeps from pass to pass.
    """
    model, process = speed(net(d.Masked(V3 + 1, V3)), d.Masked(V3 + 1, V3))
    if sharded != "no":
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    try:
        if sharded != "no":
            machine.shard(torch.device("cpu"), model)
        if sharded == "but for the root":  # as FSDP leaves a network after a forward
            model.unshard()
        state = last(generate(model, process, [()] * 2, block_size=2))
        assert (
            not any(x.is_inference() for x in (state.x, state.done, state.nfe_rows))
            and torch.is_grad_enabled()
        )
        total, _ = fast.token_loss(
            model, process, state.x, 2, torch.tensor([0.5, 0.7], dtype=torch.float64), "ce"
        )
        total.backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        if sharded != "no":
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["masked", "uniform loo", "uniform denoiser, timed"])
@PATHS
def test_a_verification_leaves_out_what_rests_on_nothing_new(path, kind):
    """
    Several texts of one block are verified: each gets what a network says that reads all of it. It costs two
    tokens a position, less two on the fast path.
    """
    make, kw = KINDS[kind]
    process, counted = make(), []
    model, process = on(path, net(process, seq_len=8, **kw).double(), process)
    ys = torch.randint(V3, (3, 5, 4), generator=torch.Generator().manual_seed(0))

    def asks(block):
        context = block.text[:, : int(block.positions[0])]
        for i, y in enumerate(ys):
            before = block.counts["token_forwards"]
            got = block.verify(y)
            counted.append((context.size(1), i, block.counts["token_forwards"] - before))
            sigma = None if model.timeless else d.sigma(torch.zeros(1).double())
            clean = torch.cat((context, y), dim=1)
            agree(got, model(clean, block.ar_input(), 1, context.size(1), sigma))
            with torch.inference_mode(False):  # as guidance by a classifier would
                z = got.clone().requires_grad_()
                assert torch.equal(torch.autograd.grad(z.square().sum(), z)[0], 2 * got)
            got.zero_()
        block.write(ys[0])
        yield

    last(GENERATE[path](model, process, [()] * 5, block_size=4, sampler=asks))
    pair = lambda i: 7 - (i > 0) if path == "fast" else 8
    assert counted == [(at, i, 5 * (pair(i) + at * (i == 0))) for at in (0, 4) for i in range(3)]
