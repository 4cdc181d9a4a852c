"""
Why believe samplers/diffuspec.py? Its text is AR's own, token for token, whatever the drafts. Without path and
adaptive lengths it is `speculation --draft diffusion`. The path is the best of all by brute force, p_3 is
what plain counting gives, and the draft lengths are the formula's.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import slow
from exact import GENERATE, KINDS, last, net, on

from diffusion import Masked
from generate import generate as lesson
from model import ModelConfig, Transformer
from samplers import SAMPLERS, diffuspec

RAGGED = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0), (1, 0)]
HOW = [{}, {"temperature": 0.0, "eos_id": 1}, {"temperature": 0.7, "top_p": 0.8}]


def small(path, kind, seed=5):
    make, kw = KINDS[kind]
    return on(path, net(make(), seed=seed, **kw).double(), make())


def text(path, model, process, prompts, sampler, **how):
    b = 1 if sampler == "ar" else 4
    how = {"block_size": b, "max_new_tokens": 3, "seed": 7, **how}
    return last(GENERATE[path](model, process, prompts, sampler=SAMPLERS[sampler], **how))


@pytest.mark.parametrize("path, kind", slow([(p, k) for p in GENERATE for k in KINDS], [("fast", "masked")]))
def test_it_writes_the_very_tokens_of_ar(path, kind, tmp_path):
    model, process = small(path, kind)
    np.array([0, 1, 2, 2, 0, 1] * 20, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    drafts = [
        {},
        {"adaptive": False, "corpus": str(tmp_path / "ids.bin")},
        {"search": "none"},
        {"beam": 1, "weight": 0.0, "mass": 1.0, "width": 2},
    ]
    prompts = RAGGED * 2
    for how in HOW:
        ar = text(path, model, process, prompts, "ar", **how)
        for own in drafts:
            ours = text(path, model, process, prompts, "diffuspec", **how, **own)
            assert torch.equal(ours.x[:, : ar.x.size(1)], ar.x) and torch.equal(ours.done, ar.done), own
        alone = text(path, model, process, prompts[:1], "diffuspec", **how)
        mates = text(path, model, process, prompts, "diffuspec", **how)
        assert alone.nfe_rows[0] == mates.nfe_rows[0], "mates change no draft"
        plain = text(path, model, process, prompts, "diffuspec", search="none", adaptive=False, **how)
        theirs = text(path, model, process, prompts, "speculation", draft="diffusion", **how)
        assert torch.equal(plain.nfe_rows, theirs.nfe_rows) and torch.equal(plain.x, theirs.x)


def test_the_path_is_the_best_of_all():
    torch.manual_seed(0)
    R, b, V = 3, 3, 4
    ids = torch.randint(V, (R, 40))
    grams = diffuspec.NGrams(torch.arange(R), ids, V)
    context, known = ids[:, -2:], torch.tensor([[False] * 3, [True, False, False], [False] * 3])
    x = torch.randint(V, (R, b))
    logq = torch.randn(R, b, V, dtype=torch.float64).log_softmax(-1)
    for weight in (0.0, 0.5, 1.0):
        likely = diffuspec.candidates(logq, x, known, 1.0, V)
        y = diffuspec.best_path(*likely, context, grams, V**b, weight)
        for r in range(R):
            best = (-math.inf, None)
            for path in itertools.product(range(V), repeat=b):
                if any(known[r, i] and path[i] != x[r, i] for i in range(b)):
                    continue
                text, score = [*context[r].tolist(), *path], 0.0
                for i, v in enumerate(path):
                    score += weight * counted(ids[r].tolist(), V, text[i : i + 2], v)
                    score += 0.0 if known[r, i] else (1 - weight) * logq[r, i, v].item()
                best = max(best, (score, path))
            assert tuple(y[r].tolist()) == best[1], weight
    narrow = diffuspec.best_path(*likely, context, grams, 1, 0.0)
    assert torch.equal(narrow, torch.where(known, x, logq.argmax(-1)))


def counted(ids, V, context, v):
    """log p_3 by plain counting."""
    p = 1 / V
    for n in range(3):
        behind = context[2 - n :]
        grams = [ids[i : i + n + 1] for i in range(len(ids) - n)]
        seen = [ids[i : i + n] for i in range(len(ids) - n + 1)] if n else ids
        p = (grams.count([*behind, v]) + p) / ((seen.count(behind) if n else len(ids)) + 1)
    return math.log(p)


def test_p_3_is_what_counting_gives():
    ids, V = torch.tensor([[0, 1, 2, 0, 1, 1, 0, 1, 2], [2, 2, 2, 2, 1, 2, 2, 2, 2]]), 3
    shared, each = diffuspec.NGrams(None, ids[:1], V), diffuspec.NGrams(torch.arange(2), ids, V)
    for u, w in itertools.product(range(V + 1), repeat=2):  # V: nothing stands there
        u_, w_, v = torch.tensor([[u]] * 2), torch.tensor([[w]] * 2), torch.arange(V).expand(2, V)
        for r, row in enumerate(ids.tolist()):
            want = torch.tensor([counted(row, V, [u, w], v) for v in range(V)], dtype=torch.float64)
            assert torch.allclose(each.log_p(u_, w_, v)[r], want, atol=1e-12)
            if r == 0:
                assert torch.allclose(shared.log_p(u_, w_, v)[1], want, atol=1e-12), "one text for all rows"
    empty = diffuspec.NGrams(torch.arange(2), ids[:, :0], V)
    assert torch.allclose(empty.log_p(u_, w_, v), torch.full((2, V), -math.log(V), dtype=torch.float64))


def test_candidates_are_the_fewest_that_reach_the_mass():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    ask = lambda mass, width, known=False: diffuspec.candidates(
        p.log()[None, None], torch.tensor([[3]]), torch.tensor([[known]]), mass, width
    )
    n = lambda *a: int((ask(*a)[1] > -math.inf).sum())
    assert [n(0.4, 4), n(0.5, 4), n(0.6, 4), n(0.81, 4), n(1.0, 4), n(1.0, 2)] == [1, 1, 2, 3, 4, 2]
    ids, logq = ask(1.0, 4, True)
    assert ids[0, 0, 0] == 3 and logq[0, 0].tolist() == [0.0, -math.inf, -math.inf, -math.inf]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_path_has_a_choice_at_every_temperature(temperature, monkeypatch):
    make, _ = KINDS["masked"]
    model, process = on("lesson", net(make(), seed=5, seq_len=16).double(), make())
    model.head.weight.data *= 0.03
    model.head.bias.data *= 0.03
    choices, best = [], diffuspec.best_path
    watched = lambda ids, logq, *more: (
        choices.append((logq > -torch.inf).sum(-1).max()) or best(ids, logq, *more)
    )
    monkeypatch.setattr(diffuspec, "best_path", watched)
    how = {"max_new_tokens": 16, "temperature": temperature, "seed": 7, "trained": [1, 16]}
    last(GENERATE["lesson"](model, process, [()], block_size=16, sampler=SAMPLERS["diffuspec"], **how))
    assert max(choices) > 1


RIGHT = [[0], [3], [16], [0, 16], [16, 0, 16], [16, 2, 2, 16]]  # the last number goes on


@pytest.mark.parametrize("right", RIGHT)
def test_drafts_are_as_long_as_the_formula_says(right, monkeypatch):
    """Drafts of which so many tokens are AR's, round after round: the ends that are checked, by hand."""
    make, _ = KINDS["masked"]
    model, process = on("lesson", net(make(), seed=5, seq_len=16).double(), make())
    b, how = 16, {"max_new_tokens": 16, "temperature": 0.0, "seed": 7, "trained": [1, 16]}
    n_right = lambda n: right[min(n, len(right) - 1)]
    ar = last(GENERATE["lesson"](model, process, [()], block_size=1, sampler=SAMPLERS["ar"], **how)).x
    start, ends, verify = [0], [], diffuspec.verify

    def draft(*_):
        y = (ar + 1) % 3
        upto = start[0] + n_right(len(ends))
        y[:, :upto] = ar[:, :upto]
        return y

    def spied(block, y, end):
        ends.append(end)
        return verify(block, y, end)

    monkeypatch.setattr(diffuspec, "best_path", draft)
    monkeypatch.setattr(diffuspec, "verify", spied)

    def follow(block):
        for _ in SAMPLERS["diffuspec"](block):
            start[0] = int((block.x != process.mask_id).sum())
            yield

    follow.needs = ("AR mode", "own pace")
    state = last(GENERATE["lesson"](model, process, [()], block_size=16, sampler=follow, **how))
    assert torch.equal(state.x, ar)
    want, at, k, G, A = [], 0, b // 2, 0.0, 0.0
    while at < b:
        end = min(at + k, b)
        n = min(n_right(len(want)), end - at)
        want.append(end)
        G, A = (G + end - at) / 2, (A + n) / 2
        k = min(max(math.floor(G) + (4 if A >= G else 0), 4), b)
        at += n + (at + n < end)
    assert ends == want


def test_options_out_of_range_are_refused():
    model, process = small("fast", "masked")
    for bad in (
        {"search": "beam"},
        {"beam": 0},
        {"mass": 0.0},
        {"mass": 1.1},
        {"width": 0},
        {"weight": -0.1},
        {"corpus": "nowhere.bin"},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            text("fast", model, process, [()], "diffuspec", **bad)


@pytest.mark.slow
def test_a_vocabulary_of_50_000(capsys):
    """On a random network: the text is AR's, and how many tokens a round accepts is printed (-s)."""
    torch.manual_seed(0)
    process = Masked(50_001, 50_000)
    model = Transformer(ModelConfig(50_001, 16, n_layers=2, n_heads=2, d_model=16)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.5)
    torch.nn.init.zeros_(model.head.bias)  # or one token is the best of all, everywhere
    how = {"max_new_tokens": 8, "seed": 0, "trained": [1, 8]}
    for temperature in (0.0, 1.0):
        how["temperature"] = temperature

        def run(name, b, **own):
            prompts = [()] * 4
            return last(lesson(model, process, prompts, block_size=b, sampler=SAMPLERS[name], **how, **own))

        ar = run("ar", 1)
        for own in ({"search": "none"}, {"weight": 0.0}, {"weight": 0.5}):
            ours = run("diffuspec", 8, adaptive=False, **own)
            assert torch.equal(ours.x, ar.x)
            rounds = ours.nfe_rows.sum().item() / 2
            with capsys.disabled():
                print(f"temperature {temperature:g}, {own}: {4 * 8 / rounds:.2f} tokens a round")
