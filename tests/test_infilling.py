"""
Why believe text with holes? Small alphabets are enumerated: a block with given tokens anywhere is filled by the
conditional of the network's own orders, and weighted fillings come from the law that their number promises.
"""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import slow
from exact import (
    GENERATE,
    KINDS,
    V3,
    Bayes,
    agree,
    ar_probs,
    chi_squared,
    code,
    dense,
    draws,
    kernel,
    last,
    net,
    on,
    quick,
    setup,
    states,
)  # fmt: skip

import diffusion as d
import sample
from data.tokens import Tokenizer
from generate import HOLE, NOTHING, SAMPLERS
from methods.infilling import BLIND, fill, unseen, weigh
from options import TrainConfig
from run import screen

PATHS = pytest.mark.parametrize("path", GENERATE)
H = HOLE
HOLED = [(H, 1, H), (1, H, 0, 2, H, 2, 1, H), (H,), (0, 2, 1, 0, H, H, 2), (2, H, H, H, H, H, 1), (1, 0, 2)]


def texts(path, model, process, prompts, **how):
    return last(GENERATE[path](model, process, prompts, **how)).x


def orders(model, process, x):
    """
    The law of one token at a time in random order, by recursion: {block: probability}, from a tuple x with masks.
    """
    masks = [i for i, v in enumerate(x) if v == process.mask_id]
    if not masks:
        return {x: 1.0}
    found, xt = {}, torch.tensor([x])
    with torch.no_grad():
        p = process.loo_logits(model(xt[:, :0], xt, len(x)).double()).softmax(-1)[0]
    for i, v in itertools.product(masks, range(V3)):
        for y, q in orders(model, process, (*x[:i], v, *x[i + 1 :])).items():
            found[y] = found.get(y, 0.0) + q * p[i, v].item() / len(masks)
    return found


@pytest.mark.parametrize("prompt", slow([((H, 2, H),), ((H, H, 1),), ((0, H, 1),)], [((H, 2, H),)]))
def test_a_masked_block_is_filled_by_the_conditional_of_its_orders(prompt):
    """And that is another law than that of the prompt alone."""
    model, process = setup("masked", seed=3, soft=1.0)
    p = dense(orders(model, process, tuple(V3 if v == H else v for v in prompt)), 3)
    x = texts("fast", model, process, [prompt] * 3000, block_size=3, sampler=SAMPLERS["first_hitting"],
              use_cache=False)  # fmt: skip
    blind, given = torch.zeros(27, dtype=torch.float64), torch.tensor(prompt)
    for y, q in orders(model, process, (V3, V3, V3)).items():  # as if the given tokens came afterwards
        blind[code(torch.where(given == H, torch.tensor(y), given)[None], V3)] += q
    draws(code(x, V3).bincount(minlength=27), p, blind)


@pytest.mark.parametrize(
    "path, kind",
    slow(
        [(path, kind) for path in GENERATE for kind in ("masked", "uniform denoiser, timed")],
        [("lesson", "masked")],
    ),
)
def test_ancestral_steps_keep_given_tokens_on_both_sides(path, kind):
    model, process = setup(kind, seed=2, path=path)
    V, x = process.vocab_size, states(process.vocab_size, 3)
    p = (x[:, 1] == 2).double()  # the prompt is (hole, 2, hole)
    for i in (0, 2):
        p = p * ((x[:, i] == process.mask_id) if process.mask_id is not None else 1 / V)
    for a_t, a_s in ((0.0, 0.5), (0.5, 1.0)):
        step = kernel(model, process, torch.zeros(0, dtype=torch.long), 3, 0, a_t, a_s)
        step = step * (x[:, None, 1] == x[None, :, 1])
        p = p @ (step / step.sum(1, keepdim=True).clamp(min=1e-300))
    ours = texts(path, model, process, [(H, 2, H)] * 3000, block_size=3, steps=2, use_cache=False)
    assert chi_squared(code(ours, V).bincount(minlength=len(x)), p) > 1e-4


EVERY = [(path, kind, names) for path in GENERATE for kind in ("masked", "uniform denoiser, ar token")
         for names in ("ancestral", "")]  # fmt: skip


@pytest.mark.parametrize("path, kind, names", slow(EVERY, [("fast", "masked", "ancestral")]))
def test_every_sampler_keeps_what_is_given_and_needs_no_batch_mates(path, kind, names):
    """Ragged prompts with holes, in batches of 1 and 33, at temperatures 0 and 1, with a cache and without."""
    make, kw = KINDS[kind]
    model, process = on(path, net(make(), seq_len=12, **kw).double(), make())
    for name, f in SAMPLERS.items():
        unfit = "absorbing" if process.mask_id is None else "redraws"
        of_a_method = f.__module__.startswith("methods") and name != "renoise"  # some want their own network
        if unfit in f.needs or of_a_method or names not in ("", name):
            continue
        b = 1 if name == "ar" else 4
        how = {
            "block_size": b,
            "sampler": f,
            "seed": 3,
            "steps": None if "own pace" in f.needs or b == 1 else 2,
        }
        together = texts(path, model, process, HOLED, **how)
        for row, prompt in enumerate(HOLED):
            row, n = together[row].tolist(), len(prompt)
            n = n if H in prompt else 12
            assert all(v == w for v, w in zip(prompt, row, strict=False) if v != H), f"{name}: given tokens"
            assert all(0 <= v < V3 for v in row[:n]) and set(row[n:]) <= {NOTHING}, f"{name}: {row}"
        alone = texts(path, model, process, [HOLED[1]] * 2, **how)
        assert torch.equal(alone[1, :8], together[1, :8]), name
        if name in ("ancestral", "arpc", "speculation", "ar", "edlm", "confidence", "renoise"):
            assert torch.equal(texts(path, model, process, HOLED, use_cache=False, **how), together), name
            many = texts(path, model, process, HOLED * 5 + HOLED[:3], temperature=0.0, top_p=0.9, **how)
            assert torch.equal(many[1, :8], many[7, :8]) or name in ("ancestral", "arpc", "edlm", "renoise")


@pytest.mark.parametrize("path, kind", slow(list(itertools.product(GENERATE, KINDS)), [("fast", "masked")]))
def test_holes_at_the_end_are_new_tokens(path, kind):
    """A prompt with holes behind it asks for what max_new_tokens asks: the same text, token for token."""
    make, kw = KINDS[kind]
    model, process = on(path, net(make(), **kw).double(), make())
    how = {"block_size": 4, "steps": 3, "seed": 5}
    want = texts(path, model, process, [(1,), ()], max_new_tokens=5, **how)
    ours = texts(path, model, process, [(1, *[H] * 5), [H] * 5], **how)
    assert torch.equal(ours, want)
    more = texts(path, model, process, [(1, H), [H]], max_new_tokens=4, ar_tokens=2, **how)
    assert (more[0, :6] >= 0).all() and (more[1, :5] >= 0).all(), "rows that wait are written later"
    assert torch.equal(more, texts(path, model, process, [(1,), ()], max_new_tokens=5, ar_tokens=2, **how))


@PATHS
def test_blocks_without_holes_cost_nothing_and_a_row_ends_with_its_last(path):
    model, process = on(path, net(d.Masked(V3 + 1, V3), seq_len=16).double(), d.Masked(V3 + 1, V3))
    given = (0, 1, 2, 0)
    prompts = [(*given, 1, H, 0, 2, *given, *given), (*given, *given, *given, H, 2, 2, 1)]
    seen = list(GENERATE[path](model, process, prompts, block_size=4, steps=1))
    assert [s.span for s in seen if s.finished] == [(0, 0), (4, 8), (12, 16)], "the others are context"
    assert seen[-1].nfe == 2 and seen[-1].nfe_rows.tolist() == [1, 1]
    ended = next(s for s in seen if s.finished and s.span == (4, 8))
    assert ended.done.tolist() == [True, False] and ended.x[0].tolist()[8:] == [*given, *given]
    assert seen[-1].done.all() and (seen[-1].x >= 0).all()


@PATHS
def test_an_end_inside_a_text_is_no_end(path):
    model, process = on(path, net(d.Masked(V3 + 1, V3), seed=4).double(), d.Masked(V3 + 1, V3))
    prompts = [(H, H, 0, H, 1)] * 40
    how = {"block_size": 2, "steps": 2, "max_new_tokens": 3, "seed": 2}
    free, ended = (texts(path, model, process, prompts, **how, **k) for k in ({}, {"eos_id": 2}))
    assert torch.equal(free[:, :5], ended[:, :5]) and (free[:, :4] == 2).any()
    for a, b in zip(free[:, 5:].tolist(), ended[:, 5:].tolist(), strict=True):
        n = a.index(2) + 1 if 2 in a else len(a)
        assert b == a[:n] + [NOTHING] * (len(a) - n)


def test_bad_requests_are_refused():
    model, process = net(d.Masked(V3 + 1, V3)), d.Masked(V3 + 1, V3)
    run = lambda prompts, **how: texts("lesson", model, process, prompts, **{"block_size": 4, **how})
    for bad in ([(0, -3)], [(H, V3)], [(0, NOTHING, H)], [[H] * 9]):
        with pytest.raises(ValueError):
            run(bad)
    weighted = lambda **how: last(fill(model, process, [(H, 1)], **{"block_size": 4, "gaps": 4, **how}))
    for bad in ({"gaps": 0}, {"temperature": 0.0}, {"ar_tokens": 1}, {"trained": [4]}, {"top_p": 0}):
        with pytest.raises(ValueError):
            weighted(**bad)
    model.cfg.clean_causal = False
    with pytest.raises(ValueError, match="no AR mode"):
        weighted()


# ----- block size 1 under speculation, and EDLM


DRAFTS = list(
    itertools.product(["masked", "uniform denoiser, ar token"], ["merged", "diffusion", "first", "random"])
)


@pytest.mark.parametrize("kind, draft", slow(DRAFTS, [("masked", "merged")]))
def test_speculation_writes_what_ar_writes_around_given_tokens(kind, draft):
    model, process = setup(kind, seed=6, path="lesson")
    prompts = [(H, H, 0, H, H, 1, H, 2), (H, 2, H, H, H, 0, 1, H)] * 15
    want = texts("lesson", model, process, prompts, block_size=1, seed=9, use_cache=False)
    how = {"block_size": 8, "sampler": SAMPLERS["speculation"], "draft": draft, "seed": 9, "use_cache": False}
    ours = texts("lesson", model, process, prompts, **how)
    assert torch.equal(ours, want)


def test_edlm_weighs_what_is_given_behind_a_hole():
    """Two candidates in one step, every pair enumerated. Without the given token's p_AR it is another law."""
    model, process = setup("masked", seed=5)
    y = states(V3, 3)
    y = y[y[:, 1] == 1]
    with torch.no_grad():
        x = torch.tensor([[V3, 1, V3]])
        p = process.loo_logits(model(x[:, :0], x, 3).double()).softmax(-1)[0]
    q = p[0, y[:, 0]] * p[2, y[:, 2]]
    ar = ar_probs(model, process, y).gather(-1, y[..., None])[..., 0]
    laws = []
    for joint in (ar.prod(1), ar[:, [0, 2]].prod(1)):
        w = joint / q
        share = w[:, None] / (w[:, None] + w[None])
        law = (q[:, None] * q[None] * share).sum(1) * 2
        laws.append(torch.zeros(27, dtype=torch.float64).index_copy(0, code(y, V3), law))
    how = {"sampler": SAMPLERS["edlm"], "candidates": 2, "steps": 1, "use_cache": False}
    ours = texts("fast", model, process, [(H, 1, H)] * 6000, block_size=3, **how)
    draws(code(ours, V3).bincount(minlength=27), *laws)


# ----- weights


def test_what_was_not_read_when_a_hole_was_filled():
    t = lambda text: torch.tensor([H if c == "_" else 0 for c in text])
    cases = [("ab_c", 1, "...x"), ("ab_c", 4, "...."), ("a_bc" "defg" "h", 4, "....xxxxx"), ("abc_" "de", 2, "....xx"),
             ("a_bc" "d_ef" "gh", 4, "....x...xx"), ("_a_b", 1, ".x.x"), ("abcd", 2, "...."), ("", 4, "")]  # fmt: skip
    for text, b, want in cases:
        assert "".join("x" if v else "." for v in unseen(t(text), b)) == want, (text, b)


@pytest.mark.parametrize("kind", ["masked", "uniform denoiser, ar token", "next token"])
@PATHS
def test_weights_are_p_ar_token_by_token(path, kind):
    next_token = kind == "next token"
    make, kw = KINDS["masked" if next_token else kind]
    model, process = on(path, net(make(), next_token=next_token, **kw).double(), make())
    x = torch.randint(V3, (7, 6), generator=torch.Generator().manual_seed(1))
    counted = torch.rand(7, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    counted[:, 0], counted[3] = False, False
    want = torch.zeros(7, dtype=torch.float64)
    for i in range(1, 6):
        probe = process.ar_input((7, 1))
        with torch.no_grad():
            z = model(x[:, :i], probe, 1, i, d.sigma(torch.zeros(1).double())).double()
        p = process.posterior_probs(z, process.prior((7, 1)), 0.0, 1.0)[:, 0]
        want += torch.where(counted[:, i], p.gather(-1, x[:, i : i + 1])[:, 0].log(), 0.0)
    found, n_tokens = weigh(model, process, torch.where(x * 0 + torch.arange(6) < 6, x, NOTHING), counted)
    agree(found, want)
    assert n_tokens > 0 and weigh(model, process, x, torch.zeros(7, 6) > 0) == (pytest.approx([0] * 7), 0)


def law_of(w, q, K):
    """The law of the filling that is chosen from K draws of q (m,) with weights w (m,), enumerated."""
    law = torch.zeros_like(q)
    for several in itertools.product(range(len(q)), repeat=K):
        several = list(several)
        law.index_add_(0, torch.tensor(several), q[several].prod() * w[several] / w[several].sum())
    return law


def perfect(process, L, seed=0):
    """A network that knows a law over rows of L letters by heart, and the law: rows (K, L), p (K,)."""
    rows, generator = states(V3, L), torch.Generator().manual_seed(seed)
    p = (1.5 * torch.randn(len(rows), generator=generator, dtype=torch.float64)).softmax(0)
    model = Bayes(process, rows, p, timeless=process.mask_id is not None)
    model.cfg.seq_len, model.time = 2 * L, None  # room for the last block
    return quick(model), rows, p


WEIGHED = [("masked", 1, (1, H, H, 0, 2)), ("masked", 2, (H, H, 0, 2)), ("masked", 4, (1, H, H, 0, 2)),
           ("masked", 4, (H, H, 1, 0)), ("uniform denoiser, ar token", 1, (1, H, H, 0, 2))]  # fmt: skip


@pytest.mark.parametrize("kind, b, prompt", slow(WEIGHED, WEIGHED[:1]))
def test_weighted_fillings_are_draws_of_the_conditional(kind, b, prompt):
    """
    Under a network that knows the law of the text. One filling: its holes given what was read. Two: the law that is
    enumerated over all pairs. Many: the conditional given all the text, before the holes and behind.
    """
    make, _ = KINDS[kind]
    process, given = make(), torch.tensor(prompt)
    model, rows, law = perfect(process, len(prompt), seed=1)
    holes = (given == H).nonzero()[:, 0]
    behind = torch.tensor([i > holes[-1] and (b == 1 or i >= b) for i in range(len(prompt))])
    conditional = lambda known: torch.zeros(9, dtype=torch.float64).index_add(
        0, code(rows[:, holes], V3), law * ((rows == known) | (known == H)).all(1))  # fmt: skip
    joint, q = conditional(given), conditional(torch.where(behind, H, given))
    exact, w, q = joint / joint.sum(), joint / q, q / q.sum()
    two, matters = law_of(w, q, 2), bool(behind.any())
    agree(law_of(w, q, 1), q)
    assert (two - exact).abs().sum() < (q - exact).abs().sum() or not matters
    pace = {} if b == 1 else {"sampler": SAMPLERS["first_hitting"]}
    for n, K, want, other in ((1500, 2, two, q), (400, 24, exact, q)):
        state = last(
            fill(model, process, [prompt] * n, gaps=K, block_size=b, use_cache=False, seed=K, **pace)
        )
        assert torch.equal(state.x[:, : len(prompt)][:, given != H], given[given != H].expand(n, -1))
        draws(code(state.x[:, holes], V3).bincount(minlength=9), want, *[other] * matters)
        assert state.nfe == state.nfe_rows.max() and state.done.all()
        assert (state.effective <= K + 1e-9).all() and (state.effective >= 1 - 1e-9).all()


def test_speculation_is_weighed_as_ar_is():
    """It reads no given token behind a hole either, so the same filling is chosen."""
    model, process = setup("masked", seed=6, path="lesson", soft=1.0)
    run = lambda **how: last(fill(model, process, [(1, H, H, 0, 2, 1)] * 40, gaps=4, use_cache=False, **how))
    one, two = run(block_size=1), run(block_size=4, sampler=SAMPLERS["speculation"])
    assert torch.equal(one.x[:, :6], two.x[:, :6])
    agree(one.effective, two.effective)


@pytest.mark.parametrize("path", slow(GENERATE, []))
def test_weighted_rows_need_no_batch_mates(path):
    model, process = on(path, net(d.Masked(V3 + 1, V3), seq_len=12).double(), d.Masked(V3 + 1, V3))
    run = lambda prompts, **how: last(fill(model, process, prompts, gaps=3, generate=GENERATE[path], **how)).x
    for how in ({"block_size": 1}, {"block_size": 4}, {"block_size": 4, "sampler": SAMPLERS["speculation"]}):
        together = run(HOLED, **how)
        assert torch.equal(run([HOLED[1]] * 2, **how)[1, :8], together[1, :8])
        assert torch.equal(run(HOLED, use_cache=False, **how), together)
    one = last(fill(model, process, HOLED, gaps=1, block_size=4)).x
    assert torch.equal(one, texts("lesson", model, process, HOLED, block_size=4))
    assert {"ar", "speculation"} == set(BLIND)


def test_given_tokens_are_shown_as_noisy_as_the_rest():
    """renoise on uniform noise, two steps: the noised given token summed out. ancestral is another law."""
    process = d.Uniform(V3)
    model, *_ = perfect(process, 2, seed=3)
    x, ours, other = states(V3, 2), *torch.full((2, V3), 1 / V3, dtype=torch.float64)  # the first token's law
    for a_t, a_s in ((0.0, 0.5), (0.5, 1.0)):
        z = model(x[:, :0], x, 2, 0, d.sigma(torch.tensor([a_t]).double()).expand(9))
        q = process.posterior_probs(z.detach(), x, a_t, a_s)[:, 0].view(
            V3, V3, V3
        )  # first, shown second, new first
        shown = a_t * torch.tensor([0.0, 1.0, 0.0]).double() + (1 - a_t) / V3  # the second is 1
        ours, other = ours @ torch.einsum("s,fsn->fn", shown, q), other @ q[:, 1]
    how = {"block_size": 2, "steps": 2, "use_cache": False, "seed": 1}
    found = texts("lesson", model, process, [(H, 1)] * 2000, sampler=SAMPLERS["renoise"], **how)
    assert (found[:, 1] == 1).all()
    draws(found[:, 0].bincount(minlength=V3), ours, other)


# ----- from the command line


def test_a_mark_becomes_a_hole():
    plain = Tokenizer({"tokenizer": "char", "chars": "abc_"}, "data/toy")
    assert plain.prompt("ab_c") == [0, 1, 3, 2], "no mark, no hole"
    assert plain.prompt("ab_c", "_", H) == [0, 1, H, 2]
    assert plain.prompt("__a__", "_", H) == [H, H, 0, H, H] and plain.prompt("__a", "__", H) == [H, 0]
    assert plain.prompt("abc", "_", H) == [0, 1, 2]
    begun = Tokenizer({"tokenizer": "char", "chars": "abc", "bos_id": 3, "prompt_end": "c"}, "data/toy")
    assert begun.prompt("a_b", "_", H) == [3, 0, H, 1] and begun.prompt("ab", "_", H) == [3, 0, 1, 2]
    numbers = Tokenizer({"tokenizer": "none"}, "data/toy")
    assert numbers.prompt("17 _ 4", "_", H) == [17, H, 4]


def test_holes_are_in_the_answer_of_rows_with_prompts(slip):
    rows = Tokenizer({"tokenizer": "char", "chars": ".12", "prompt_len": 2, "row_len": 4}, "data/sudoku")
    assert rows.prompt(".1_2", "_", H) == [0, 1, H, 2]
    assert "'_' at token 2" in slip(rows.prompt, ".__2", "_", H)
    assert "has 4 tokens, this one has 5" in slip(rows.prompt, ".1_22", "_", H)


@pytest.fixture
def asked(monkeypatch, capsys):
    """asked(*flags): what sample.py prints, with a random network on letters abc."""
    process = d.Masked(V3 + 1, V3)
    model, process = on("fast", net(process, seq_len=8), process)
    run = TrainConfig(dataset="toy", seq_len=8, block_sizes={1: 0.5, 4: 0.5})
    meta = {"vocab_size": V3, "tokenizer": "char", "chars": "abc"}
    monkeypatch.setattr(sample, "restore", lambda *args: (run, meta, 0, model, process))

    def ask(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
        sample.main()
        return capsys.readouterr().out

    return ask


def test_sample_fills_holes(asked, slip, tmp_path):
    out = asked("--prompt", "a_c_bcab", "--hole", "_", "--n_samples", "2")
    first, second = out.split("--- sample ")[1:]
    for text in (first, second):
        text = text.split("\n")[1]
        assert len(text) == 8 and (text[0], text[2], text[4:]) == ("a", "c", "bcab"), text
    assert "\n4 tokens," in out
    out = asked("--prompt", "a_cab", "--hole", "_", "--gaps", "3", "--block_size", "1")
    assert "of 3 fillings, " in out and "\n1 tokens," in out and out.splitlines()[1][2:] == "cab"
    assert "ar reads nothing behind a hole" in asked("--prompt", "_b", "--hole", "_", "--block_size", "1")
    (tmp_path / "p.txt").write_text("a_c\n\n_b\n", encoding="utf-8")
    out = asked("--prompt_file", str(tmp_path / "p.txt"), "--hole", "_", "--max_new_tokens", "1")
    rows = [part.split("\n")[1] for part in out.split("--- sample ")[1:]]
    assert [len(row) for row in rows] == [4, 1, 3] and rows[2][1] == "b"
    for flags, says in (
        (["--prompt", "abcabcab_", "--hole", "_"], "the context has 8"),
        (["--prompt", "_a", "--hole", "_", "--gaps", "4", "--temperature", "0"], "same filling"),
        (["--prompt", "_a", "--hole", "_", "--gaps", "4", "--ar_tokens", "1"], "gaps"),
        (["--gaps", "0"], "gaps cannot be 0"),
        (["--prompt", "_a"], "character '_'"),
    ):
        assert says in slip(sample.main, argv=flags), flags


def test_a_stream_shows_what_is_given_behind_the_last_hole(capsys):
    text = SimpleNamespace(decode=lambda ids: "".join("abc"[i] for i in ids))
    rows = [[[0, 1, -1, 2, 0]], [[0, 1, 2, 2, 0]]]
    states = [SimpleNamespace(x=torch.tensor(x), span=span, finished=True, done=torch.tensor([end]))
              for x, span, end in ((rows[0], (0, 0), False), (rows[1], (2, 4), True))]  # fmt: skip
    for _ in screen.stream(iter(states), text, "ab"):
        pass
    assert capsys.readouterr().out == "--- sample 1\nabcca\n"
