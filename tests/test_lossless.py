"""
samplers/lossless.py: every draft writes the text of AR, and drafts are what the network says. On the tiny networks of
tests/test_adapt.py.
"""

import itertools
import math

import pytest
import torch
from test_adapt import PROMPTS, T, V, pair, texts, written

from diffusion import Masked
from methods import adapt
from samplers.diffuspec import NGrams, candidates
from samplers.lossless import DRAFTS, Lossless, look_up


@pytest.mark.parametrize(
    "temperature, top_p", [(0.0, 1.0), (1.0, 1.0), pytest.param(0.8, 0.7, marks=pytest.mark.slow)]
)
def test_every_draft_writes_the_text_of_ar(temperature, top_p):
    """In float64, ragged prompts in one batch, and each row by itself."""
    base, model = pair()
    how = {"temperature": temperature, "top_p": top_p, "max_new_tokens": 16, "seed": 3}
    ar = written(base, PROMPTS, "ar", **how)
    passes = {}
    for draft in DRAFTS if temperature == 0 else ("chain", "head+lookup", "none"):
        state = written(model, PROMPTS, "lossless", draft=draft, **how)
        assert texts(state) == texts(ar), draft
        passes[draft] = int(state.nfe_rows.sum())
    assert passes["chain"] < passes["none"] and passes["head+lookup"] < passes["none"]
    assert texts(written(model, PROMPTS, "lossless", use_cache=False, **how)) == texts(ar)
    assert texts(written(model, PROMPTS, "speculation", **how)) == texts(ar), (
        "the block sampler is lossless too"
    )
    one = written(model, PROMPTS[:1], "lossless", draft="masks+lookup", **how)
    assert texts(one) == texts(ar)[:1]
    for draft in ("masks", "chain", "path", "head+lookup"):
        assert texts(written(model, PROMPTS, "lossless", draft=draft, adaptive=True, **how)) == texts(ar), (
            draft
        )


def test_a_path_is_the_best_of_all_and_follows_the_text():
    """
    Two drafted places, every pair of likely ids: the path has the largest sum. In a text of 1 2 3 4 over and over, masks
    that know nothing draft what comes next.
    """
    _, model = pair(draft_vocab=V - 1)
    text = torch.full((2, T), -1)
    text[0, :30], text[1, :9] = torch.tensor([1, 2, 3, 4] * 7 + [1, 2]), torch.arange(9)
    state = Lossless(model, Masked(V, V - 1), text, torch.arange(2), 0, 0.0, 1.0, "path", 2)
    torch.manual_seed(0)
    alike = torch.zeros(2, 2, V - 1).double()
    alike[..., 1:5] = 2.0
    for logits in alike, torch.randn(2, 2, V - 1).double():
        found = state.path(logits).tolist()
        for row, n in enumerate((30, 9)):
            grams, logq = NGrams(None, text[row : row + 1, :n], V), logits[row].double().log_softmax(-1)
            ids, logp = candidates(logq[None], torch.zeros(1, 2).long(), torch.zeros(1, 2) > 0, 0.8, 15)
            likely = [
                [v for v, lp in zip(*y, strict=True) if lp > -math.inf]
                for y in zip(ids[0].tolist(), logp[0].tolist(), strict=True)
            ]
            scores = {}
            for y in itertools.product(*likely):
                a = torch.cat((text[row, n - 2 : n], torch.tensor(y)))
                p3 = grams.log_p(*a[:3]) + grams.log_p(*a[1:])
                scores[y] = (logq[0, y[0]] + logq[1, y[1]] + p3).item() / 2
            assert abs(scores[tuple(found[row])] - max(scores.values())) < 1e-12
        assert logits is not alike or found[0] == [3, 4]
    model.draft_ids.copy_(model.draft_ids.flip(0))
    assert state.path(logits.flip(-1)).tolist() == found, "logits are of the draft ids"


def test_a_row_has_as_many_drafts_checked_as_stayed_lately():
    _, model = pair()
    text = torch.full((3, T), -1)
    text[:, :5] = 1
    state = Lossless(model, Masked(V, V - 1), text, torch.arange(3), 0, 0.0, 1.0, "head", 4, adaptive=True)
    found = []
    for good in (
        0,
        0,
        0,
        1,
        1,
        1,
    ):  # of the first row none stays, then all; of the second one; the third waits
        n = state.length * torch.tensor([1, 1, 0])
        state.adapt_length(n, torch.stack((good * n[0], n[1].clamp(max=1), n[2])))
        found.append(state.length.tolist())
    assert found == [[3, 3, 4], [2, 3, 4], [1, 2, 4], [2, 2, 4], [2, 2, 4], [3, 2, 4]], found
    state = Lossless(model, Masked(V, V - 1), text, torch.arange(3), 0, 0.0, 1.0, "head", 3, adaptive=True)
    for _ in range(9):
        state.adapt_length(state.length, torch.zeros(3, dtype=torch.long))
    assert state.length.tolist() == [1, 1, 1], "none would never be more again"
    checked = []
    for adaptive in (False, True):
        state = Lossless(
            model, Masked(V, V - 1), text, torch.arange(3), 0, 1.0, 1.0, "head", 4, adaptive=adaptive
        )
        with torch.no_grad():
            for _ in range(6):
                state.round(torch.ones(3, dtype=torch.bool))
        checked.append(sum(state.offered.tolist()))
    assert checked[1] < checked[0], "drafts beyond the length are not checked"


@pytest.mark.parametrize("eos_id", [1, 4, 7])
def test_rows_that_end_leave_the_others_as_they_are(eos_id):
    base, model = pair()
    how = {"temperature": 1.0, "max_new_tokens": 24, "eos_id": eos_id, "seed": eos_id}
    ar = written(base, PROMPTS, "ar", **how)
    assert texts(written(model, PROMPTS, "lossless", draft="path", adaptive=True, **how)) == texts(ar)
    assert len({len(row) - len(p) for row, p in zip(texts(ar), PROMPTS, strict=True)}) > 1
    assert texts(written(model, PROMPTS, "lossless", draft="masks", **how)) == texts(ar)


def test_the_text_ends_where_the_context_does():
    base, model = pair()
    how = {"temperature": 0.0}
    for prompts in (
        [list(range(10)) * 9],
        [list(range(10)) * 9, [1, 2]],
    ):  # one row ends where others have drafts
        ar = texts(written(base, prompts, "ar", **how))
        assert texts(written(model, prompts, "lossless", **how)) == ar and len(ar[0]) == T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_equal_in_few_digits(dtype, temperature):
    """
    Passes of as many rows, over keys that are a multiple of 32: no bit of a clean row depends on the rest of the
    pass. So the texts are equal however coarse the numbers are. bfloat16 has ties.
    """
    model, text = pair()[1].to(dtype), torch.full((4, T), -1)
    for row, prompt in zip(text, PROMPTS, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    found = []
    for draft, width in (("none", 16), ("masks", 4), ("head+lookup", 16)):
        how = {"ahead": 3, "width": width}
        state = Lossless(model, Masked(V, V - 1), text, torch.arange(4), 7, temperature, 1.0, draft, **how)
        with torch.no_grad():
            while (state.n < 40).any():
                state.round(state.n < 40)
        found.append(state.tokens[:, :40])
    assert all(torch.equal(tokens, found[0]) for tokens in found)


@pytest.mark.parametrize("n_rows", [1, 2, 4])
def test_no_pass_is_so_small_that_a_cpu_rounds_it_otherwise(n_rows, monkeypatch):
    """Four tokens at least in a product, and four queries a row in attention: an AVX2 CPU rounds fewer otherwise."""
    _, model = pair()
    text, queries, tokens = torch.full((n_rows, T), -1), [], []
    for row, prompt in zip(text, PROMPTS, strict=False):
        row[: len(prompt)] = torch.tensor(prompt)
    state = Lossless(model, Masked(V, V - 1), text, torch.arange(n_rows), 7, 0.0, 1.0, "none", 3)
    attend, through = torch.nn.functional.scaled_dot_product_attention, model.through
    watched = lambda q, *more, **how: queries.append(q.size(2)) or attend(q, *more, **how)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model.through = lambda x, *more: tokens.append(x[..., 0].numel()) or through(x, *more)
    with torch.no_grad():
        state.round(torch.ones(n_rows, dtype=torch.bool))
    assert len(tokens) == 1 and tokens[0] >= 4 and min(queries) >= 4 * 2, "two heads share one of keys"


@pytest.mark.parametrize("draft", ["masks", "head+lookup"])
def test_no_product_has_so_many_clean_rows_that_a_cpu_rounds_it_otherwise(draft, monkeypatch):
    """A CPU with AMX rounds more than 32 rows in bfloat16 otherwise. Here it is far off, and the text is AR's."""
    exact = adapt.packed_linear

    def off(*weights):
        product = exact(*weights)
        return lambda x: product(x) * (1 if x[..., 0].numel() <= 32 else 1.5)

    text, found = torch.full((12, T), -1), []
    for row, prompt in zip(text, PROMPTS * 3, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    for packed_linear, drafts in ((exact, "none"), (off, "none"), (off, draft)):
        monkeypatch.setattr(adapt, "packed_linear", packed_linear)
        state = Lossless(pair()[1], Masked(V, V - 1), text, torch.arange(12), 7, 1.0, 1.0, drafts, 3)
        with torch.no_grad():
            while (state.n < 40).any():
                state.round(state.n < 40)
        found.append(state.tokens[:, :40])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_knows_the_text_is_always_right(temperature):
    """
    A base that reads only its last token, and a head that does the same: each pass writes 1 + ahead tokens. A base
    that reads nothing, and masks that look like a token: likewise. A place too early or too late, and none is right.
    """
    _, model = pair(draft_vocab=V)
    for layer in model.layers:
        for weight in (layer.out.weight, layer.down.weight, *(a.B for a in layer.adapters.values())):
            torch.nn.init.zeros_(weight)
    model.told = lambda name, s, *more, packed: more[-1]
    how = {"temperature": temperature, "max_new_tokens": 24, "ahead": 3, "seed": 2}
    for draft in ("head", "chain"):
        state = written(model, [[1, 2, 3, 4, 5, 6, 7]], "lossless", draft=draft, **how)
        assert state.nfe == 1 + 24 // 4 or temperature == 0 and state.nfe <= 7, draft
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight[:1].expand(V, -1))
        model.masks.copy_(model.embed.weight[:1].expand(3, -1))
    state = written(model, [[1, 2, 3, 4, 5, 6, 7]], "lossless", draft="masks", **how)
    assert state.nfe == 1 + 24 // 4


@torch.no_grad()
@pytest.mark.parametrize("draft", ["masks", "chain", "head"])
def test_drafts_are_what_was_learned(draft):
    """Of rows at places of their own, in a merged pass: what the plain passes and the last token of AR's own draft."""
    _, model = pair()
    text = torch.full((4, T), -1)
    for row, prompt in zip(text, PROMPTS, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    ar, state = (
        Lossless(model, Masked(V, V - 1), text, torch.arange(4), 7, 0.0, 1.0, name, 3)
        for name in ("none", draft)
    )
    for _ in range(4):
        ar.round(torch.ones(4, dtype=torch.bool))
    state.n_drafts[:] = 3
    for r, n in enumerate(state.n.tolist()):  # of its first drafts r are right
        state.drafts[r] = (ar.tokens[r, n : n + 3] + (torch.arange(3) >= r)) % (V - 1)
    begun = state.n
    state.round(torch.ones(4, dtype=torch.bool))
    assert (state.n - begun).tolist() == [1, 2, 3, 4]
    for tokens, n, drafts in zip(state.tokens, state.n.tolist(), state.drafts, strict=True):
        e, cache, found = n - 2, model.new_cache(1, 0), []
        hidden = model.read(tokens[None, : e + 1], cache)[0, -1]
        masks = model.behind(torch.tensor([[e]]), 3, cache, e + 1)[0, 0]
        token = tokens[e + 1]
        for j in range(3):
            x = model.embed(token)
            if draft != "masks":
                hidden = (
                    model.told("chain", masks[j], hidden, x)
                    if draft == "chain"
                    else model.told("drafter", hidden, x)
                )
            token = model.draft_ids[model.draft_logits(masks[j] if draft == "masks" else hidden).argmax()]
            found.append(int(token))
        assert found == drafts.tolist()


@torch.no_grad()
def test_jacobi_drafts_what_the_base_said_behind_a_wrong_draft():
    base, model = pair()
    text = torch.full((1, T), -1)
    text[0, :12] = torch.tensor(PROMPTS[0])
    for right in range(4):
        ar, state = (
            Lossless(model, Masked(V, V - 1), text, torch.arange(1), 7, 0.0, 1.0, draft, 3)
            for draft in ("none", "jacobi")
        )
        for _ in range(4):
            ar.round(torch.ones(1, dtype=torch.bool))
        y = (ar.tokens[0, 12:15] + 3 * (torch.arange(3) >= right)) % (V - 1)
        state.drafts, state.n_drafts = y[None].clone(), torch.tensor([3])
        state.round(torch.ones(1, dtype=torch.bool))
        said = []
        for j in range(right + 1, 4):  # behind y_1 ... y_j, of which the last are wrong
            prefix = torch.cat((text[0, :12], y[:j]))[None]
            said.append(int(base(prefix, prefix[:, :1], 1, 12 + j)[0, 0, : V - 1].argmax()))
        assert state.drafts[0, : len(said)].tolist() == said


@torch.no_grad()
def test_what_is_offered_and_what_stays_is_counted_by_place():
    """Of the rows' drafts 0, 1 and 2 are right, of the third only one is checked, and the last row waits."""
    _, model = pair()
    text = torch.full((4, T), -1)
    for row, prompt in zip(text, PROMPTS, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    make = lambda draft: Lossless(model, Masked(V, V - 1), text, torch.arange(4), 7, 0.0, 1.0, draft, 3)
    ar, state = make("none"), make("path")
    for _ in range(4):
        ar.round(torch.ones(4, dtype=torch.bool))
    state.n_drafts[:] = torch.tensor([3, 3, 1, 3])
    for r, n in enumerate(state.n.tolist()):
        state.drafts[r] = (ar.tokens[r, n : n + 3] + (torch.arange(3) >= r)) % (V - 1)
    begun, found = state.n, []
    state.path = lambda logits: found.append(logits) or torch.full((4, 3), 5)
    state.round(torch.tensor([True, True, True, False]))
    assert (state.n - begun).tolist() == [1, 2, 2, 0]
    assert state.offered.tolist() == [3, 1, 0] and state.accepted.tolist() == [2, 0, 0]
    assert len(found) == 1 and (state.drafts == 5).all(), "a path's drafts are its own"
    for _ in range(T):
        state.round(torch.ones(4, dtype=torch.bool))
    assert (state.n == T).all(), "and a row that is full stays so"


def test_tokens_are_counted_as_they_go_through_the_network():
    """The prompt without its last token; then 4 tokens a pass at least, and k masks behind each."""
    _, model = pair()
    how = {"draft": "none", "temperature": 0.0, "max_new_tokens": 24, "ahead": 8}
    state = written(model, [[1, 2, 3, 4, 5, 6, 7]], "lossless", **how)
    assert state.token_forwards == 6 + 4 * state.nfe, "what was not drafted is not checked"
    for draft, each in (("none", 4), ("head", 4), ("masks", 4 * (1 + 3))):
        how = {"draft": draft, "temperature": 0.0, "max_new_tokens": 24, "ahead": 3}
        state = written(model, [[1, 2, 3, 4, 5, 6, 7]], "lossless", **how)
        assert state.token_forwards == 6 + each * state.nfe, draft


def test_looking_up():
    assert look_up([1, 2, 3, 9, 1, 2, 3], 2, 2) == [9, 1]
    assert look_up([1, 2, 9, 9, 1, 2, 8, 5, 1, 2], 2, 2) == [8, 5], "the latest"
    assert (
        look_up([1, 2, 3], 2, 2) == []
        and look_up([3, 1, 3], 2, 2) == []
        and look_up([3, 1, 3], 2, 1) == [1, 3]
    )
    assert look_up([4, 4, 4], 3, 2) == [4, 4, 4] and look_up([1, 2, 1, 2], 3, 2) == [1, 2, 1], (
        "into its own copy"
    )
    assert look_up([1, 2, 9, 2, 5, 1, 2], 1, 1) == [9] and look_up([1, 2, 9, 2, 5, 3, 2], 1, 1) == [5], (
        "longest first"
    )
    _, model = pair()
    text = torch.full((3, T), -1)
    text[0, :7] = torch.tensor([1, 2, 3, 9, 1, 2, 3])
    text[1, :7] = torch.tensor([1, 2, 3, 9, 5, 2, 3])  # two tokens are there twice, and three are not
    text[2, :7] = torch.arange(7)
    for draft, n in (("lookup", [2, 0, 0]), ("head+lookup", [2, 2, 2])):
        how = {"ahead": 2, "draft": draft, "ngram": 3}
        state = Lossless(model, Masked(V, V - 1), text, torch.arange(3), 0, 0.0, 1.0, **how)
        state.make_drafts(torch.zeros(3, 1, 24).double(), None, text[:, :1], torch.zeros(3, dtype=torch.long))
        assert state.n_drafts.tolist() == n and state.drafts[0].tolist() == [9, 1]


def test_lossless_is_told_all_its_options(monkeypatch):
    _, model = pair()
    told = []
    monkeypatch.setattr(
        adapt, "Lossless", lambda *args, **how: told.append((args, how)) or Lossless(*args, **how)
    )
    how = {
        "draft": "lookup",
        "ahead": 2,
        "ngram": 3,
        "adaptive": True,
        "seed": 5,
        "top_p": 0.5,
        "temperature": 0.7,
    }
    written(model, PROMPTS, "lossless", max_new_tokens=2, **how)
    args, how = told[0]
    assert args[4:] == (5, 0.7, 0.5, "lookup", 2) and how == {"ngram": 3, "adaptive": True, "dtype": None}
    with torch.autocast("cpu", torch.bfloat16):
        written(model, PROMPTS, "lossless", max_new_tokens=2)
    assert told[1][1]["dtype"] == torch.bfloat16 and model.packed_as == torch.bfloat16


@pytest.mark.parametrize("draft", ["masks", "chain"])
def test_many_masks_have_room(draft):
    """17 tokens and 16 masks behind each of them."""
    base, model = pair(masks=16)
    how = {"temperature": 0.0, "max_new_tokens": 40}
    ar = texts(written(base, PROMPTS, "ar", **how))
    assert texts(written(model, PROMPTS, "lossless", draft=draft, ahead=16, **how)) == ar


def test_what_lossless_refuses():
    base, model = pair()
    with pytest.raises(ValueError, match="no adapters"):
        written(base, PROMPTS, "lossless")
    with pytest.raises(ValueError, match="at most 3"):
        written(model, PROMPTS, "lossless", ahead=4)
    with pytest.raises(ValueError, match="draft must be one of"):
        written(model, PROMPTS, "lossless", draft="oracle")
    with pytest.raises(ValueError, match="holes"):
        written(model, [[1, 2, -2, 3]], "lossless")
    with pytest.raises(ValueError, match="needs a prompt"):
        written(model, [[]], "lossless", max_new_tokens=8)
