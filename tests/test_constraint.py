"""
Why believe samplers/constraint.py and samplers/language.py? An automaton accepts what Python's re matches. The
dynamic programme gives the enumerated product, its marginals and its largest text. Over several steps the
constrained sampler is not the unconstrained one given the language; its weights make it so. No text leaves the
language, whatever the sampler, the prompts, the lengths and the ends.
"""

import functools
import itertools
import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, run, slow
from exact import (
    GENERATE,
    KINDS,
    P_VALUE,
    V3,
    chi_squared,
    code,
    draws,
    enumerated,
    enumerated_ar,
    last,
    net,
    on,
    setup,
    states,
)
from test_loopholing import loop

import diffusion as d
import sample
import train as training
from generate import HOLE, NOTHING
from lab import quality, sweep
from samplers import SAMPLERS, constraint, language
from samplers.constraint import WEIGHTED, Rule
from samplers.language import DFA, Asked, Language, Refused, compiled, load, regex, texts_of

PATHS = pytest.mark.parametrize("path", GENERATE)
CHARS = SimpleNamespace(kind="char", chars="abc01;")
EVEN = DFA([[1, 0, -1], [2, 1, 0], [0, -1, 1]], 0, [1, 0, 1])  # over V3 letters
ANY = DFA([[0] * V3], 0, [1])
RAGGED = [(), (0,), (1, 0), (0, 0, 0, 1, 0), (1, 0)]


def of_chars(pattern):
    return compiled(regex(pattern), texts_of(CHARS, 6))


def random_dfa(Q, V, generator):
    """Every third transition is forbidden; some state accepts."""
    next = torch.randint(Q, (Q, V), generator=generator)
    next[torch.rand(Q, V, generator=generator) < 0.33] = -1
    accept = torch.rand(Q, generator=generator) < 0.6
    accept[0] = True
    return DFA(next, int(torch.randint(Q, (), generator=generator)), accept)


# ----- languages


@pytest.mark.parametrize(
    "pattern",
    [
        r"(\d;)*", r"a{2,3}b?|c+", r"[^ab]*", r"(?:ab|a)*c", r".*b.", r"[a-c]{2}[\d;]+|", r"(a*)*b", r"a{2}b{1,}",
        r"[\w]\D\W?", r"(a|b)*abb", r"((a|b)(c|)){2}", r"[]a]|[a-]b", r"a{0}b", r"\;|b",
    ],
)  # fmt: skip
def test_an_automaton_accepts_what_re_matches(pattern):
    dfa = of_chars(pattern)
    for n in range(5):
        for ids in itertools.product(range(6), repeat=n):
            text = "".join(CHARS.chars[i] for i in ids)
            assert dfa.accepts(ids) == bool(re.fullmatch(pattern, text, re.ASCII)), text


def test_it_has_as_few_states_as_can_be():
    assert len(of_chars("(a|b)*abb").accept) == 4  # Hopcroft, Motwani, Ullman: the textbook's example
    assert len(of_chars("(ab|ba)(ab|ba)|abab").accept) == 7 and len(of_chars("(a|b|c)*|.*").accept) == 1


def test_tokens_of_several_characters_and_numbers_are_read():
    pieces = SimpleNamespace(data={0: b"a", 1: b"b", 2: b"ab", 3: b"ba;", 4: b"\xe2\x82", 5: "é".encode()})
    tokenizer = SimpleNamespace(kind="gpt2", pieces=pieces)
    dfa = compiled(regex("(ab)*(;é)?"), texts_of(tokenizer, 7))
    assert dfa.silent == {6}  # a special token
    for n in range(5):
        for ids in itertools.product(range(7), repeat=n):
            data = b"".join(pieces.data.get(i, b"") for i in ids)
            want = 4 not in ids and re.fullmatch("(ab)*(;é)?", data.decode()) is not None
            assert dfa.accepts(ids) == want, data
    numbers = compiled(regex("(17 4|[0-2 9])* 3{2}", numbers=True), [(v,) for v in range(20)])
    assert (
        numbers.accepts([17, 4, 9, 1, 3, 3]) and not numbers.accepts([17, 3, 3]) and not numbers.accepts([3])
    )
    bert = SimpleNamespace(kind="bert", pieces=SimpleNamespace(text={0: "play", 1: "##ing", 2: "now"}))
    dfa = compiled(regex("( [a-z]+){2}"), texts_of(bert, 4))
    assert dfa.accepts([0, 1, 3, 2]) and not dfa.accepts([0, 1]) and dfa.accepts([0, 2, 1])


@pytest.mark.parametrize(
    "pattern", ["(a", "a)", "*a", "[a", "a{3", "a{3,2}", "^a", "[b-a]", "(?=a)", r"\q", "[^"]
)
def test_a_broken_expression_is_refused(pattern):
    with pytest.raises(Refused, match="character"):
        of_chars(pattern)


def test_an_empty_and_an_endless_language_are_refused(monkeypatch):
    monkeypatch.setattr(language, "MOST", 200)
    with pytest.raises(Refused, match="empty"):
        of_chars("x")
    with pytest.raises(Refused, match="states"):
        compiled(Language(0, lambda state, c: state + 1, lambda state: True), texts_of(CHARS, 6))


# ----- the dynamic programme


def brute(logp, dfa):
    """(y (m, b), log-probabilities (m,) of a product logp (b, V), -inf outside of the language)."""
    b, V = logp.shape
    y = states(V, b)
    good = torch.tensor([dfa.accepts(ids) for ids in y.tolist()])
    return y, torch.where(good, sum(logp[i, y[:, i]] for i in range(b)), -math.inf)


def chain_of(dfa, b, rows):
    """The Chain of a block of b tokens without context, for equal rows."""
    process = SimpleNamespace(vocab_size=dfa.next.size(1), mask_id=None)
    rule = Rule([dfa] * rows, [[]] * rows, torch.tensor([b] * rows), process)
    return rule.chain(torch.full((rows, b), NOTHING), torch.arange(rows), torch.arange(b))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("b, V, Q, size", [(5, 4, 3, 1.0), (3, 5, 6, 1.0), (4, 3, 2, 300.0)])
def test_a_step_is_the_product_given_the_language(b, V, Q, size, seed):
    """Total variation to the enumeration, marginals, and the likeliest text. size 300: exp would underflow."""
    generator, want = torch.Generator().manual_seed(seed), torch.zeros(0)
    while (want > -math.inf).sum() < 4:
        dfa = random_dfa(Q, V, generator)
        logp = (size * torch.randn(b, V, dtype=torch.float64, generator=generator)).log_softmax(-1)
        y, want = brute(logp, dfa)
    chain, rows = chain_of(dfa, b, len(y)), logp.expand(len(y), b, V)
    betas, state = chain.betas(chain.by_class(rows)), chain.start
    law = torch.zeros(len(y), dtype=torch.float64)
    for i in range(b):  # the law of draw: what it draws token i from, given the y before it
        weight, following = chain.weights(rows, betas, i, state)
        law = law + weight.log_softmax(-1).gather(1, y[:, i, None])[:, 0].nan_to_num(-math.inf)
        state = following.gather(1, chain.classes[y[:, i]][:, None])[:, 0]
    gap = (law.exp() - want.softmax(0)).abs().sum() / 2
    assert gap < 1e-12 * size, f"total variation {gap:.1e}"
    assert abs(chain.log_z(rows)[0] - want.logsumexp(0)) < 1e-12 * size
    is_v = torch.nn.functional.one_hot(y, V).bool()
    marginals = torch.where(is_v, want[:, None, None], -math.inf).logsumexp(0) - want.logsumexp(0)
    assert (chain.marginals(rows)[0].exp() - marginals.exp()).abs().max() < 1e-12 * size
    best, log_best = chain_of(dfa, b, 1).draw(logp[None], None, greedy=True)
    assert best[0].tolist() == y[want.argmax()].tolist() and abs(log_best - want.max()) < 1e-12 * size


def test_dead_tokens_alone_are_another_law():
    """The control: forbidding what leads nowhere does not know how likely the rest is."""
    logp = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    y, want = brute(logp, EVEN)
    chain, p, key = chain_of(EVEN, 4, 4000), want.softmax(0), torch.arange(16000).view(4000, 4)
    found = []
    for chain.myopic in (False, True):
        x, _ = chain.draw(logp.expand(4000, 4, 3), key)
        found.append(code(x, V3).bincount(minlength=V3**4))
    draws(found[0], p)
    gap = (found[1] / 4000 - p).abs().sum() / 2
    assert found[1][p == 0].sum() == 0 and gap > 0.08, f"total variation {gap:.2f}"


# ----- through the loop

SERVED = "ancestral psi confidence threshold factor entropy_bound rcr saber arpc edlm agreement gibbs".split()
SERVED += "max_coupling first_hitting remdm_cap remdm_rescale remdm_conf remdm_loop".split()
QUICK = [("masked", name) for name in ("psi", "confidence", "arpc", "remdm_conf")]
QUICK += [("uniform denoiser, ar token", name) for name in ("psi", "threshold")]
random_network = functools.cache(setup)


def written(path, constraint_, model, process, prompts, b, sampler="ancestral", **how):
    """The last State. Without a cache rows are what the network is asked."""
    how = {"use_cache": False, "block_size": b, "sampler": SAMPLERS[sampler], **how}
    return last(constraint.generate(GENERATE[path], constraint_, model, process, prompts, **how))


def texts(state):
    return [[token for token in row if token != NOTHING] for row in state.x.tolist()]


def counted(state, L):
    """Counts over states(V3, L) of texts of length L."""
    return code(state.x[:, :L], V3).bincount(minlength=V3**L)


def conditioned(law, dfa, L):
    """A law {text: p} given the language, over states(V3, L)."""
    p = torch.tensor([law.get(tuple(x), 0.0) * dfa.accepts(x) for x in states(V3, L).tolist()]).double()
    return p / p.sum()


@pytest.mark.parametrize("kind", slow(KINDS, ["masked", "uniform denoiser, timed"]))
@PATHS
def test_one_step_is_drawn_in_proportion(path, kind):
    """Chi-squared; for masked noise with a token of the prompt inside the block."""
    model, process = setup(kind, path=path)
    prompt = (1,) if process.absorbing else ()
    want = conditioned(enumerated(model, process, 3, 1, 3, prompt), EVEN, 3)
    state = written(path, EVEN, model, process, [prompt] * 1500, 3, steps=1, max_new_tokens=3 - len(prompt))
    draws(counted(state, 3), want)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "masked" in kind])
@PATHS
def test_holes_are_filled_in_proportion(path, kind):
    """
    Given tokens behind a hole, in its block and in the next one: a step of the first block is the product given
    that the whole text can still be of the language. Chi-squared, against every filling.
    """
    model, process = setup(kind, path=path)
    prompt = (HOLE, 1, HOLE, 2, 0, HOLE)  # blocks of 3
    with torch.no_grad():
        z = torch.tensor([[process.mask_id, 1, process.mask_id]])
        p = process.loo_logits(model(z[:, :0], z, 3, 0, None).double()).softmax(-1)[0]
    first, want = states(V3, 3), []
    for x in first.tolist():
        ends = any(EVEN.accepts([*x, 2, 0, v]) for v in range(V3))
        blind = any(EVEN.accepts([*x, *y]) for y in states(V3, 3).tolist())
        want.append([(x[1] == 1) * known * p[0, x[0]] * p[2, x[2]] for known in (ends, blind)])
    want, blind = (torch.tensor(want) / torch.tensor(want).sum(0)).T
    assert (want - blind).abs().sum() > 0.4, "one that does not know the given tokens of the next block"
    state = written(path, EVEN, model, process, [prompt] * 1500, 3, steps=1)
    found = texts(state)
    assert all(EVEN.accepts(x) and x[1] == 1 and x[3:5] == [2, 0] and len(x) == 6 for x in found)
    draws(counted(state, 3), want)


HOLED = [
    (HOLE, 1, HOLE),
    (0, HOLE, HOLE, HOLE, 1, 0, HOLE),
    (HOLE, HOLE, 1, HOLE, HOLE, 2),
    (1, 1),
    (0, HOLE, HOLE, 1),
]


@pytest.mark.parametrize("kind, name", slow(list(itertools.product(KINDS, SERVED)), QUICK[:2] + QUICK[-1:]))
def test_no_filling_leaves_the_language(kind, name):
    """Ragged prompts with holes in every place, and without; what is given stays; greedy too."""
    needs = SAMPLERS[name].needs
    for path in GENERATE:
        model, process = random_network(kind, path=path)
        if "absorbing" in needs and not process.absorbing or "redraws" in needs and process.absorbing:
            return
        how = {"sampler": name} | ({} if "own pace" in needs else {"steps": 2})
        for more in ({"temperature": 0.0}, {"max_new_tokens": 1}):
            state = written(path, EVEN, model, process, HOLED, 4, **how, **{"max_new_tokens": 0} | more)
            for text, prompt in zip(texts(state), HOLED, strict=True):
                assert EVEN.accepts(text), (path, more, prompt, text)
                assert all(a in (HOLE, b) for a, b in zip(prompt, text, strict=False))


def two_steps(model, process, dfa, b):
    """
    Masked noise, two steps, by plain enumeration of what the first one keeps: laws over states(V3, b) of the
    constrained sampler, of the same weighted by Z / Z', and of the unconstrained one.
    """
    x, masks = states(V3, b), torch.full((b,), process.mask_id)
    good = torch.tensor([dfa.accepts(y) for y in x.tolist()])
    plain, weighted, free = torch.zeros(3, len(x), dtype=torch.float64)

    def product(z):
        """p of every y that agrees with what z has written, of the positions that it has not."""
        p = process.loo_logits(model(z[None, :0], z[None], b, 0, None).double()).softmax(-1)[0]
        written = torch.nn.functional.one_hot(z, p.size(-1)).double()
        p = torch.where((z == process.mask_id)[:, None], p, written)
        return torch.stack([p[i, x[:, i]] for i in range(b)]).prod(0)

    p = product(masks)
    for z in states(V3 + 1, b):
        fits = ((z == process.mask_id) | (z == x)).all(-1)
        first, then = torch.where(fits, p, 0.0), product(z)  # each position stays with probability 1/2
        free += first.sum() / 2**b * then
        if (fits & good).any():
            Z, Z1, Z2 = p[good].sum(), first[good].sum() / first.sum(), then[good].sum()
            law = first[good].sum() / Z / 2**b * torch.where(good, then, 0.0) / Z2
            plain += law
            weighted += law * Z / Z1 * Z2
    return good, plain, weighted, free


def test_over_steps_only_the_weights_make_it_the_conditioned_sampler():
    model, process = setup("masked", seed=0, soft=1.0, path="lesson")
    with torch.no_grad():
        good, plain, weighted, free = two_steps(model, process, EVEN, 3)
    want = torch.where(good, free, 0.0)
    assert abs(plain.sum() - 1) < 1e-12 and abs(free.sum() - 1) < 1e-9
    assert (weighted - want).abs().max() < 1e-12
    want = want / want.sum()
    gap = (plain - want).abs().sum() / 2
    assert gap > 0.05, f"{gap:.3f}: too close to be told apart"
    how = {"steps": 2, "max_new_tokens": 3}
    draws(counted(written("lesson", EVEN, model, process, [()] * 1000, 3, **how), 3), plain, want)
    state = written("lesson", EVEN, model, process, [()] * 500, 3, exact=16, **how)
    draws(counted(state, 3), want, plain)


@pytest.mark.parametrize("path", slow(GENERATE, ["lesson"]))
def test_weights_cross_blocks_with_their_copies(path):
    """Two blocks of two steps, copies drawn anew between them."""
    model, process = setup("uniform loo", seed=2, soft=1.0, path=path)
    want = conditioned(enumerated(model, process, 2, 2, 4), EVEN, 4)
    how = {"steps": 2, "max_new_tokens": 4}
    draws(counted(written(path, EVEN, model, process, [()] * 300, 2, exact=16, **how), 4), want)


@pytest.mark.parametrize("path", slow(GENERATE, ["fast"]))
def test_weights_repair_block_size_1(path):
    model, process = setup("masked", seed=2, soft=1.0, path=path)
    want = conditioned(enumerated_ar(model, process, 3), EVEN, 3)
    how = {"sampler": "ar", "max_new_tokens": 3}
    free = counted(written(path, EVEN, model, process, [()] * 500, 1, **how), 3)
    assert chi_squared(free, want) < P_VALUE, "block size 1 alone looks one token ahead"
    draws(counted(written(path, EVEN, model, process, [()] * 300, 1, exact=24, **how), 3), want)


def test_copies_are_drawn_anew_by_their_weights():
    """Systematically, with text, state and cache; the sum of the weights stays; ended copies are left alone."""
    process, n = SimpleNamespace(vocab_size=V3, mask_id=None), 8
    rule = Rule([EVEN] * 16, [[]] * 16, torch.tensor([4] * 16), process, copies=n)
    rows = torch.tensor([*range(6), *range(8, 16)])  # two copies of the first text have ended
    w = torch.tensor([8.0, 4, 2, 1, 0.5, 0.5, 9, 9, 1, 1, 1, 1, 1, 1, 2, 2])
    rule.logw, rule.state, rule.at = w.double().log(), torch.arange(16) % 3, 2
    text, moved = torch.arange(16)[:, None].repeat(1, 4), []
    rule.resample(text, SimpleNamespace(keep=moved.append), rows)
    assert (
        text[6:, 0].tolist() == list(range(6, 16))
        and moved[0].tolist() == text[rows, 0].where(rows < 6, rows - 2).tolist()
    )
    assert rule.state.tolist() == (text[:, 0] % 3).tolist()
    assert (rule.logw[:6].exp() - 16 / 6).abs().max() < 1e-12 and rule.logw[6:].equal(w[6:].double().log())
    counts, share = text[:6, 0].bincount(minlength=6), w[:6] / 16 * 6
    assert ((counts - share).abs() < 1).all(), counts


@pytest.mark.slow
def test_weights_hold_where_copies_end_at_different_places():
    """Three blocks, an end at any place: what an unconstrained sampler writes, without what is no text."""
    model, process = setup("masked", seed=0, soft=1.0)
    dfa, how = (
        DFA([[1, 0, -1], [1, 2, -1], [0, 2, -1]], 0, [1, 0, 1]),
        {"steps": 2, "eos_id": 2, "max_new_tokens": 6},
    )
    good = lambda text: dfa.accepts(text) or text[-1] == 2 and dfa.accepts(text[:-1])
    free = Counter(
        tuple(text) for text in texts(written("fast", ANY, model, process, [()] * 20000, 2, **how))
    )
    free = Counter({text: n for text, n in free.items() if good(text)})
    ours = Counter(map(tuple, texts(written("fast", dfa, model, process, [()] * 1000, 2, exact=32, **how))))
    alone = Counter(map(tuple, texts(written("fast", dfa, model, process, [()] * 1000, 2, **how))))
    every = sorted({*free, *ours, *alone})
    free, ours, alone = (torch.tensor([found[text] for text in every]) for found in (free, ours, alone))
    assert two_samples(ours, free) > P_VALUE > two_samples(alone, free)


@pytest.mark.parametrize("name", slow(WEIGHTED.split(), []))
@pytest.mark.parametrize("kind", ["masked", "uniform denoiser, timed"])
def test_every_weighted_sampler_is_its_unconstrained_one_given_the_language(kind, name):
    """One unconstrained sample, of which what lies outside of the language is thrown away, and one weighted."""
    model, process = setup(kind, seed=4, soft=1.0)
    path = "fast"
    if name == "loopholing":
        path, model = "lesson", loop(process, seed=4, **KINDS[kind][1])[1]
    needs = SAMPLERS[name].needs
    if needs and ("absorbing" in needs) != process.absorbing:
        pytest.skip("another noise")
    how = {"sampler": name, "max_new_tokens": 3, "seed": 7} | (
        {"steps": 3} if "own pace" not in needs else {}
    )
    b = 1 if name == "ar" else 3
    free = written(path, ANY, model, process, [()] * 10000, b, **how)
    keep = torch.tensor([EVEN.accepts(x) for x in states(V3, 3).tolist()])
    free = torch.where(keep, counted(free, 3), 0)
    ours = counted(written(path, EVEN, model, process, [()] * 600, b, exact=24, **how), 3)
    assert two_samples(ours, free) > P_VALUE


def two_samples(a, b):
    """Survival probability of the chi-squared statistic of two samples of different sizes."""
    share = (a.sum() / b.sum()).item()
    a, b = a.double(), b.double()
    both = a + b
    keep = both * min(1, share) > 10
    a, b = (torch.cat((x[keep], x[~keep].sum()[None])) for x in (a, b))
    keep = a + b > 0
    a, b, k = a[keep], b[keep], int(keep.sum()) - 1
    z = (((a / share**0.5 - b * share**0.5) ** 2 / (a + b)).sum() / k) ** (1 / 3)
    return 0.5 * math.erfc((z - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k)) / math.sqrt(2))


# ----- no text leaves the language


@pytest.mark.parametrize("kind, name", slow(list(itertools.product(KINDS, SERVED)), QUICK))
def test_no_text_leaves_the_language(kind, name):
    """Ragged prompts, also inside blocks, a last block partly filled; greedy, sharpened, with early ends."""
    needs = SAMPLERS[name].needs
    for path in GENERATE:
        model, process = random_network(kind, path=path)
        if "absorbing" in needs and not process.absorbing or "redraws" in needs and process.absorbing:
            return
        how = {"sampler": name} | ({} if "own pace" in needs else {"steps": 2})
        for more in ({"temperature": 0.0}, {"top_p": 0.4}, {"ar_tokens": 1, "temperature": 0.3}):
            state = written(path, EVEN, model, process, RAGGED, 4, max_new_tokens=3, **how, **more)
            assert all(map(EVEN.accepts, texts(state))), (path, more)
        state = written(path, EVEN, model, process, RAGGED, 4, eos_id=2, max_new_tokens=3, **how)
        for text, prompt in zip(texts(state), RAGGED, strict=True):
            new = text[len(prompt) :]
            assert 2 not in new[:-1], "an end inside of a text"
            assert EVEN.accepts(text) or new[-1:] == [2] and EVEN.accepts(text[:-1]), text
            assert len(new) == 3 or new[-1] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_in_ten_thousand_leaves_a_random_language(kind):
    model, process = setup(kind)
    generator, n = torch.Generator().manual_seed(0), 0
    while n < 10_000:
        dfa = random_dfa(int(torch.randint(1, 6, (), generator=generator)), V3, generator)
        b = int(torch.randint(2, 5, (), generator=generator))
        prompts = [
            torch.randint(V3, (int(k),), generator=generator).tolist() for k in torch.randint(4, (200,))
        ]
        try:
            room = 8 // b * b - len(prompts[0])
            how = {"steps": 2, "max_new_tokens": min(4, room)}
            state = written("fast", dfa, model, process, prompts[:1] * 500, b, **how)
        except Refused:
            continue
        assert all(map(dfa.accepts, texts(state)))
        n += len(state.x)


def test_psi_does_not_mix_two_texts():
    """Its two kinds of steps take one text: of texts of equal letters a mixture is none."""
    model, process = random_network("masked", path="lesson")
    same = DFA([[1, 2, 3], [1, -1, -1], [-1, 2, -1], [-1, -1, 3]], 0, [1] * 4)
    made = texts(written("lesson", same, model, process, [()] * 100, 4, "psi", steps=3, max_new_tokens=4))
    assert {len(set(text)) for text in made} == {1} and len({text[0] for text in made}) > 1


def test_an_end_may_belong_to_the_language_or_stand_behind_it():
    """0* 2 0* as a language of whole texts, with 2 as its end: every text is zeros and the end."""
    model, process = setup("masked", path="lesson")
    dfa = DFA([[0, -1, 1], [1, -1, -1]], 0, [0, 1])
    state = written("lesson", dfa, model, process, [()] * 50, 4, steps=2, eos_id=2, max_new_tokens=6)
    assert all(set(text[:-1]) <= {0} and text[-1] == 2 for text in texts(state))
    assert len({len(text) for text in texts(state)}) > 2


@pytest.mark.parametrize("name, steps", [("ancestral", 1), ("confidence", 3)])
@pytest.mark.parametrize("kind", ["masked", "uniform loo"])
def test_without_a_limit_nothing_changes(kind, name, steps):
    """The language of all texts, greedy: token by token what is written without it."""
    model, process = setup(kind)
    how = {"block_size": 4, "steps": steps, "temperature": 0.0, "use_cache": False, "sampler": SAMPLERS[name]}
    want = last(GENERATE["fast"](model, process, RAGGED, **how)).x
    assert last(constraint.generate(GENERATE["fast"], ANY, model, process, RAGGED, **how)).x.equal(want)


@pytest.mark.parametrize("name, exact", [("ancestral", 1), ("confidence", 1), ("ancestral", 3)])
def test_a_text_does_not_depend_on_its_batch_mates(name, exact):
    make, kw = KINDS["masked"]
    process = make()
    for use_cache, path in ((True, "fast"), (False, "lesson")):
        model, process = on(path, net(process, seq_len=12, **kw).double(), process)
        how = {"steps": 2, "sampler": name, "exact": exact, "max_new_tokens": 6, "use_cache": use_cache}
        prompts = [(1, 0), (0,), ()] * 11
        many = texts(written(path, EVEN, model, process, prompts, 4, **how))
        few = texts(written(path, EVEN, model, process, prompts[:2], 4, **how))
        assert many[:2] == few and all(map(EVEN.accepts, many))


def test_marginals_are_the_confidence_of_samplers_that_commit_the_surest():
    """`confidence` commits the token with the highest marginal given the language, not the highest l."""
    model, process = setup("masked", path="lesson")
    state = last(
        itertools.islice(
            constraint.generate(
                GENERATE["lesson"], EVEN, model, process, [()], block_size=3, steps=3, temperature=0.0,
                sampler=SAMPLERS["confidence"], max_new_tokens=3, use_cache=False,
            ),
            3,
        )
    )  # fmt: skip
    x = torch.full((1, 3), process.mask_id)
    with torch.no_grad():
        logl = process.loo_logits(model(x[:, :0], x, 3, 0, None).double())[0, :, :V3].log_softmax(-1)
    y, want = brute(logl, EVEN)
    best = y[want.argmax()]
    is_v = torch.nn.functional.one_hot(y, V3).bool()
    marginals = torch.where(is_v, want[:, None, None], -math.inf).logsumexp(0)
    i = int(marginals.gather(1, best[:, None])[:, 0].argmax())
    x[0, i] = best[i]
    assert state.step == 1 and state.x[0].tolist() == x[0].tolist()


# ----- what cannot be


def test_what_cannot_be_is_refused():
    model, process = setup("masked", path="lesson")
    go = lambda prompts=((),), dfa=EVEN, **how: written("lesson", dfa, model, process, prompts, 4, **how)
    odd = DFA([[1, -1, -1], [0, -1, -1]], 0, [0, 1])  # an odd number of zeros
    for words, how in (
        ("prompt of row 1 leaves the language", {"prompts": [(0,), (2,)]}),
        (
            "no text of the language has 2 tokens behind the prompt of row 0",
            {"dfa": odd, "max_new_tokens": 2},
        ),
        ("speculation cannot be constrained", {"sampler": "speculation"}),
        ("no weights are known for confidence", {"sampler": "confidence", "exact": 2}),
        ("temperature 0 draws nothing", {"temperature": 0.0, "exact": 2}),
        ("over 5 tokens", {"dfa": DFA([[0] * 5], 0, [1])}),
    ):
        with pytest.raises(ValueError, match=words):
            go(**how)
    with pytest.raises(Refused) as e:
        go(dfa=odd, max_new_tokens=4)
    assert e.value.fix == "--max_new_tokens 3"


def test_a_sampler_that_writes_past_the_constraint_is_caught():
    def zeros(block):
        block.write(torch.full_like(block.x, 2))
        yield

    model, process = setup("masked", path="lesson")
    how = {"block_size": 4, "sampler": zeros, "max_new_tokens": 4, "use_cache": False}
    with pytest.raises(Refused, match="zeros has written a text outside of the language"):
        last(constraint.generate(GENERATE["lesson"], EVEN, model, process, [()], **how))


def test_a_file_names_a_language(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "twos = '2*'\ndef zeros(prompt):\n    return '0{%d}' % (4 - len(prompt))\n", encoding="utf-8"
    )
    digits = SimpleNamespace(kind="char", chars="012", decode=lambda ids: "".join(map(str, ids)))
    model, process = setup("masked", path="lesson")
    for name, prompts, want in (
        ("twos", [(2,)], [[2, 2, 2, 2]]),
        ("zeros", [(1,), (1, 2)], [[1, 0, 0, 0], [1, 2, 0, 0]]),
    ):
        asked = Asked(load(f"{file}:{name}"), digits, V3)
        how = {"steps": 2} | ({"max_new_tokens": 3} if name == "twos" else {})
        if name == "zeros":
            model.cfg.seq_len = 4
        assert texts(written("lesson", asked, model, process, prompts, 4, **how)) == want
    for words, what in (
        ("has no nines", f"{file}:nines"),
        ("not FILE.py:name", "nothing.py:x"),
        ("not FILE", "x"),
    ):
        with pytest.raises(Refused, match=words):
            load(what)
    file.write_text("1 / 0", encoding="utf-8")
    with pytest.raises(Refused, match="ZeroDivisionError"):
        load(f"{file}:x")
    with pytest.raises(Refused, match="failed on the prompt"):
        Asked(lambda prompt: prompt[5], digits, V3).dfas([[0]])
    with pytest.raises(Refused, match="not int"):
        Asked(3, digits, V3)


def test_rows_of_a_sudoku():
    rows = load(str(ROOT / "data/sudoku/rows.py") + ":rows")
    digits = SimpleNamespace(kind="char", chars=".1234", decode=lambda ids: "".join(".1234"[i] for i in ids))
    dfa = Asked(rows, digits, 5).dfas([digits_of("..3.1.........4.")])[0]
    assert dfa.accepts(digits_of("1234123412341243")) and not dfa.accepts(digits_of("1234123412341234"))
    assert not dfa.accepts(digits_of("1243123412341243")) and not dfa.accepts(digits_of("1134123412341243"))


def digits_of(text):
    return [".1234".index(c) for c in text]


def test_special_tokens_are_skipped_in_a_prompt_and_never_written():
    model, process = setup("masked", path="lesson")
    dfa = DFA(EVEN.next, 0, EVEN.accept, silent=[2])
    prompts = [(2, 0), (0, 2, 2), (2,)] * 20
    made = texts(written("lesson", dfa, model, process, prompts, 4, steps=2, max_new_tokens=4))
    assert all(map(dfa.accepts, made))
    assert not any(2 in text[len(prompt) :] for text, prompt in zip(made, prompts, strict=True))


def test_the_example_of_the_page():
    page = (ROOT / "docs/constraints.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(SUMS.*?)```", page, re.S)[1], names)
    digits = SimpleNamespace(kind="char", chars="0123456789+=;", decode=lambda ids: "")
    dfa = Asked(names["right"], digits, 13).dfas([[]])[0]
    read = lambda text: dfa.accepts([digits.chars.index(c) for c in text])
    assert read("3+8=11;4+4=08;") and read("") and not read("3+8=12;") and not read("3+8=1")


def test_every_text_is_json():
    """The page's expression, with a random network that would write noise, in blocks and by eos."""
    page = (ROOT / "docs/constraints.md").read_text(encoding="utf-8")
    pattern, chars = re.search(r"--regex '(\\\{.*?)'", page)[1], '{}[]":, abc019\n'
    tokenizer = SimpleNamespace(kind="char", chars=chars, decode=lambda ids: "".join(chars[i] for i in ids))
    process = d.Masked(len(chars) + 1, len(chars))
    model, asked = net(process, seq_len=32).double(), Asked(pattern, tokenizer, len(chars))
    made = texts(written("lesson", asked, model, process, [()] * 40, 8, steps=3, eos_id=len(chars) - 1))
    found = [json.loads(tokenizer.decode(text)) for text in made]
    assert all(set(one) == {"a", "b"} for one in found) and len({len(text) for text in made}) > 1


@pytest.mark.slow
def test_the_commands_take_constraints(project, slip, capsys):
    run(
        training.main, *TINY, "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--max_steps=1", "--out_dir=b"
    )
    (project / "mine.py").write_text("answer = lambda prompt: 'b*[ac]{2}'\n", encoding="utf-8")
    ask = ["--ckpt=b", "--device=cpu", "--prompt=ab.", "--n_samples=3"]
    for more, want in (
        (["--regex=ab\\.[ab]*"], r"ab\.[ab]{9}"),
        (["--regex=ab\\.[ab]*", "--sampler=ar", "--exact=4"], r"ab\.[ab]{9}"),
        (["--constraint=mine.py:answer", "--sampler=arpc", "--plain"], r"ab\.b{7}[ac]{2}"),
        (["--constraint=mine.py:answer", "--sampler=confidence", "--temperature=0"], r"ab\.b{7}[ac]{2}"),
    ):
        capsys.readouterr()
        run(sample.main, *ask, *more)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ab.")]
        assert len(lines) == 3 and all(re.fullmatch(want, line) for line in lines), lines
    for more in ([], ["--gaps=3"]):
        capsys.readouterr()
        run(sample.main, "--ckpt=b", "--device=cpu", "--prompt=a_b.a_", "--hole=_", "--regex=[ab.]*a", *more)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("a")]
        assert re.fullmatch(r"a[ab.]b\.aa", line), line
    for more, says in (
        (["--regex=(a"], "is missing"),
        (["--regex=b.*"], "the prompt of row 0 leaves the language"),
        (["--regex=ab\\.a{4}"], "no text of the language has 9 tokens"),
        (["--regex=.*", "--constraint=mine.py:answer"], "together"),
        (["--exact=4"], "there is none"),
        (["--constraint=mine.py:nothing"], "has no nothing"),
        (["--regex=.*", "--sampler=prophet"], "cannot be constrained"),
        (["--regex=b.*", "--prompt=a_b.a", "--hole=_"], "fits the prompt of row 0 and its holes"),
        (["--constraint=mine.py:answer", "--prompt=a_b.a", "--hole=_"], "a prompt has holes"),
    ):
        assert says in slip(sample.main, argv=[*ask, *more])
    capsys.readouterr()
    lab = ["--ckpt=b", "--device=cpu", "--judge=none", "--n_eval=4", "--regex=[abc]+\\.[ab]*"]
    run(quality.main, *lab, "--sampler=ancestral", "--steps=2", "--exact=2")
    run(sweep.main, *lab, "--steps=2", "--samplers=ancestral,arpc")
    assert "arpc" in capsys.readouterr().out
