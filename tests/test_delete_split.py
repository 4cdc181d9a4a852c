"""
Why believe methods/delete_split.py? Moves are recomputed token by token, for every combination in blocks of
four. Doing what training has for targets undoes the mistakes. The mistakes have the law that they should have,
and the loss is recomputed token by token. The sampler is its rule written out in plain loops, token for
token. Without edits it is `threshold`.
"""

import itertools
import math
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, resumed
from exact import GENERATE, P_VALUE, V3, agree, chi_squared, last, net

import diffusion as d
import train as training
from generate import NOTHING
from methods import delete_split as method
from methods.delete_split import END, ROOM, delete_split, moved
from model import ModelConfig
from rng import Noise
from run import checkpoint
from samplers import SAMPLERS

KEEP, DELETE, SPLIT = 0, 1, 2
MASK = V3
RAGGED = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0), (1, 0)]


def by_hand(ops, open):
    """The sources of one block, lists: run by run of what is open."""
    b, found, i = len(ops), [], 0
    while i < b:
        if not open[i]:
            found.append(i)
            i += 1
            continue
        end = next((j for j in range(i, b) if not open[j]), b)
        run = []
        for j in range(i, end):
            run += [[j], [], [ROOM, j]][ops[j]]
        found += (run + [END] * (end - i))[: end - i]
        i = end
    return found


def test_moves_are_those_of_a_list():
    """All operations and all given tokens of a block of four: 1,296 blocks."""
    both = list(itertools.product(itertools.product(range(3), repeat=4), itertools.product((0, 1), repeat=4)))
    ops, open = (torch.tensor(y) for y in zip(*both, strict=True))
    source = moved(ops == DELETE, ops == SPLIT, open.bool())
    assert source.tolist() == [by_hand(o, where) for o, where in both]


def test_delete_undoes_split():
    """But for the last token of what may move: it fell off."""
    for b, i in itertools.product((2, 3, 5), range(5)):
        if i >= b:
            continue
        open, at = torch.ones(1, b).bool(), torch.arange(b)[None]
        x = at + 10
        apart = method.carried(x, moved(open & False, at == i, open), 0)
        back = method.carried(apart, moved((at == i) & (apart == 0), open & False, open), 0)
        assert back.tolist() == [[*range(10, 9 + b), 0]], (b, i)


def made(R=4000, b=6, alpha=1.0, moves=0.3, wrong=0.0, seed=0, given=0.15):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(V3, (R, b), generator=g)
    open = torch.rand(R, b, generator=g) >= given
    u = torch.rand(R, b, 4, generator=g, dtype=torch.float64)
    process = d.Masked(V3 + 1, MASK)
    level = torch.full((R, b), alpha, dtype=torch.float64)
    xt, target = method.mistakes(x, open, level, moves, wrong, process, u)
    return x, open, xt, target, u


def test_the_targets_undo_the_mistakes():
    x, open, xt, target, u = made()
    V = V3 + 1
    assert (target[~open] == -1).all() and (xt[~open] == x[~open]).all()
    source = moved(target == V, target == V + 1, open)
    mended = method.carried(xt, source, MASK)
    twice = open[:, 1:] & open[:, :-1] & (u[:, 1:, 1] <= 0.15) & (u[:, :-1, 1] <= 0.15)
    simple = ~twice.any(1)  # of two tokens dropped in a row one SPLIT makes room for one
    there = mended != MASK
    assert torch.equal(mended[simple][there[simple]], x[simple][there[simple]])
    assert there[simple].double().mean() > 0.75 and not simple.all(), "most of the text is there again"
    assert (target == V).any() and (target == V + 1).any()
    # where nothing is to be moved, the token itself is the target
    plain = (target >= 0) & (target < V)
    assert torch.equal(target[plain], xt[plain])
    # without mistakes there are none
    x, open, xt, target, _ = made(moves=0.0)
    assert torch.equal(xt, x) and torch.equal(target, torch.where(open, x, -1))


def test_mistakes_have_their_law():
    """In the first place of blocks, where nothing that moved can hide what happened there."""
    alpha, moves, wrong, n = 0.7, 0.4, 0.3, 200_000
    x, open, xt, target, _ = made(n, 2, alpha, moves, wrong, seed=3, given=0.0)
    V = V3 + 1
    shown = xt[:, 0] != MASK
    # DELETE with moves / 2; SPLIT where the first was dropped and the second not; else a token. Where both are
    # dropped a mask is left
    kinds = torch.stack([target[:, 0] == V, target[:, 0] == V + 1, target[:, 0] < V], 1)[shown].sum(0)
    put, gone = moves / 2, moves / 2
    visible = alpha * (1 - gone * gone)
    p = torch.tensor([visible, 1 - visible], dtype=torch.float64)
    assert chi_squared(torch.tensor([shown.sum(), (~shown).sum()]), p) > P_VALUE
    p = torch.tensor([put, gone * (1 - gone), 1 - put - gone], dtype=torch.float64) / (1 - gone * gone)
    assert (target[shown, 0] >= 0).all(), "a visible token has a target"
    assert chi_squared(kinds, p) > P_VALUE
    assert torch.equal(xt[shown & (target[:, 0] == V + 1), 0], x[shown & (target[:, 0] == V + 1), 1])
    # what is put in is a random token; what is replaced too, itself among them
    put_in = xt[shown & (target[:, 0] == V), 0].bincount(minlength=V3)
    assert chi_squared(put_in, torch.full((V3,), 1 / V3).double()) > P_VALUE
    own = shown & (target[:, 0] < V)
    step = ((xt - target)[own, 0] % V3).bincount(minlength=V3)
    law = torch.full((V3,), wrong / V3).double()
    law[0] += 1 - wrong
    assert chi_squared(step, law) > P_VALUE


class Asked:
    """A network that answers by a table, and remembers what it was asked."""

    module = SimpleNamespace(timeless=True)

    def __init__(self, L):
        g = torch.Generator().manual_seed(1)
        self.table = torch.randn(V3 + 1, L, V3 + 3, generator=g, dtype=torch.float64)

    def __call__(self, clean, noisy, block_size, start=0, sigma=None, returns=None):
        assert returns == "both"
        self.read = noisy
        both = self.table[noisy, torch.arange(noisy.size(1))]
        return both[..., :-2], both[..., -2:]


def test_the_loss_token_by_token():
    process, B, L, start, b = d.Masked(V3 + 1, MASK), 600, 6, 3, 3
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(V3, (B, L + start), generator=g)
    given = torch.rand(B, L + start, generator=g) < 0.2
    charged = ~given & (torch.rand(B, L + start, generator=g) < 0.8)
    sizes, t = torch.tensor([1, 3, 2] * (B // 3)), torch.full((B,), 0.4).double()
    ask, noise = Asked(L), Noise(3, torch.arange(B), torch.arange(start, L + start))
    total, each = method.moves_loss(
        ask, process, x0, sizes, t, "ce", given, charged, d.loglinear, start, noise, b=b, moves=0.4, wrong=0.2
    )
    x, given, charged = x0[:, start:], given[:, start:], charged[:, start:]
    u = Noise(3, torch.arange(B), torch.arange(start, L + start)).uniform(4)
    fold = lambda y: y.unflatten(1, (-1, b)).flatten(0, 1)
    rate = torch.full((B * L // b, b), 0.6, dtype=torch.float64)
    xt, target = method.mistakes(fold(x), fold(charged), rate, 0.4, 0.2, process, fold(u))
    xt, target = xt.view_as(x), target.view_as(x)
    want, kinds = torch.zeros(B, L, dtype=torch.float64), set()
    for r in range(B):
        for i in range(L):
            z = int(ask.read[r, i])
            if given[r, i]:
                assert z == x[r, i]
            if sizes[r] == b:
                if not given[r, i]:
                    assert z == xt[r, i]
                goal = int(target[r, i])
            else:
                assert z in (x[r, i], MASK) and (sizes[r] == 2 or given[r, i] or z == MASK)
                goal = int(x[r, i]) if charged[r, i] and z == MASK else -1
            if goal < 0:
                continue
            row = ask.table[z, i].tolist()
            options = {v: row[v] for v in range(V3)}
            if z != MASK:
                options |= {V3 + 1: row[V3 + 1], V3 + 2: row[V3 + 2]}
            want[r, i] = math.log(sum(math.exp(y) for y in options.values())) - options[goal]
            kinds.add((z == MASK, min(goal, V3)))
    agree(each, want)
    agree(total, want.sum())
    assert len(kinds) == 3 + 1 + 3, "masks and visible tokens, with every token and edits for a target"


# ----- the sampler


def editor(seed=0, bias=0.5):
    """A random network with a will to edit, in float64."""
    torch.manual_seed(seed)
    model = method.Editor(ModelConfig(V3 + 1, 8, n_layers=2, n_heads=2, d_model=16, mlp_ratio=2))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5)
    torch.nn.init.constant_(model.edits.bias, bias)
    return model.double().eval(), d.Masked(V3 + 1, MASK)


def run(model, process, prompts, **how):
    return last(GENERATE["lesson"](model, process, prompts, sampler=delete_split, temperature=0.0, **how))


def plain(model, process, prompt, n, b, fill, edit, post, log):
    """The rule of the docstring for one row, in plain loops: its text, and the passes it takes."""
    text, passes, W = list(prompt), 0, len(prompt) + n
    for begin in range(0, -(-W // b) * b, b):
        if begin + b <= len(prompt):
            continue
        given = text[begin:] if begin < len(prompt) else []
        x = given + [MASK] * (b - len(given))
        open = [False] * len(given) + [True] * (b - len(given))
        first, states, left_over = [*open], [], post
        while True:
            if not any(first):
                left_over -= 1
            final = left_over < 0
            clean = torch.tensor([text[:begin]]) if begin else None
            logits, edits = model(clean, torch.tensor([x]), b, begin, returns="both")
            passes += 1
            p = []
            for i in range(b):
                row = logits[0, i].tolist()[:V3] + (edits[0, i].tolist() if x[i] != MASK else [])
                total = sum(math.exp(v) for v in row)
                p.append([math.exp(v) / total for v in row])
            left = [i for i in range(b) if x[i] == MASK and open[i]]
            best = [max(range(len(q)), key=q.__getitem__) for q in p]
            sure = sorted(left, key=lambda i: -p[i][best[i]])
            least = 1 + sum(not first[i] for i in left)
            take = {i for k, i in enumerate(sure) if k < least or p[i][best[i]] >= fill or final}
            change = {
                i for i in range(b)
                if open[i] and i not in left and best[i] != x[i] and p[i][best[i]] > edit and not final
            }  # fmt: skip
            ops = [KEEP] * b
            y = list(x)
            for i in take:
                y[i] = best[i]
            for i in change:
                if best[i] < V3:
                    y[i] = best[i]
                else:
                    ops[i] = DELETE if best[i] == V3 else SPLIT
            source = by_hand(ops, open)
            go = lambda values, new, source=source: [values[s] if s >= 0 else new for s in source]
            states.append(x)
            new = [i for i in change if best[i] < V3]
            if go(y, MASK) in states and new:
                weak = min(new, key=lambda i: (p[i][best[i]], i))
                y[weak] = sorted(range(V3), key=lambda v: -p[weak][v])[1]
                log.add("circle")
            log.update({("edit", min(best[i], V3 + 1)) for i in change})
            first = go([f and i not in take for i, f in enumerate(first)], False)
            x = go(y, MASK)
            full = MASK not in x
            if full and (final or (not change and (edit > 1 or post == 0 or not take))):
                break
        text = text[:begin] + x
    return text[:W], passes


@pytest.mark.parametrize("fill, edit, post", [(0.6, 0.5, 3), (0.0, 0.4, 16), (0.9, 0.0, 5), (1.0, 0.6, 0)])
def test_the_sampler_is_its_rule(fill, edit, post):
    log, passes, prompts = set(), [], RAGGED[1:]  # without a given token all masks of a block are alike: ties
    with torch.no_grad():
        for seed, bias in itertools.product(range(5), (0.5, 2.0, 4.0)):
            model, process = editor(seed, bias)
            ours = run(
                model, process, prompts, block_size=4, max_new_tokens=3, fill=fill, edit=edit, post=post
            )
            for row, prompt in enumerate(prompts):
                text, spent = plain(model, process, prompt, 3, 4, fill, edit, post, log)
                assert ours.x[row, : len(text)].tolist() == text, (seed, prompt)
                assert (ours.x[row, len(text) :] == NOTHING).all()
                assert ours.nfe_rows[row] == spent, (seed, prompt)
                passes.append(spent)
    if post > 0:
        assert {("edit", V3), ("edit", V3 + 1)} <= log and any(("edit", v) in log for v in range(V3))
    if post == 16:
        assert "circle" in log
    assert max(passes) <= 2 * (4 + post + 1)  # a block of the prompt's end and one more


def test_without_edits_it_is_threshold():
    model, process = editor(3)
    for fill in (0.0, 0.5, 0.7, 1.0):
        how = {"block_size": 4, "max_new_tokens": 3, "seed": 5}
        for temperature in (0.0, 1.0):
            ours, want = (
                last(GENERATE["lesson"](model, process, RAGGED * 4, temperature=temperature, **how, **s))
                for s in (
                    {"sampler": delete_split, "fill": fill, "edit": 2.0},
                    {"sampler": SAMPLERS["threshold"], "threshold": fill},
                )
            )
            assert torch.equal(ours.x, want.x) and torch.equal(ours.nfe_rows, want.nfe_rows)


def test_moves_can_be_left_out():
    """Then the probabilities are those of the vocabulary, and nothing moves."""
    model, process = editor(2, bias=2.0)
    how = {"block_size": 4, "max_new_tokens": 4, "edit": 0.3, "fill": 0.6}
    with torch.no_grad():
        out = run(model, process, [(), (1, 2)], moves=False, **how)
        assert not torch.equal(out.x, run(model, process, [(), (1, 2)], **how).x)
        torch.nn.init.constant_(model.edits.bias, -1e6)
        assert torch.equal(out.x, run(model, process, [(), (1, 2)], **how).x)


def test_a_row_is_written_the_same_in_any_company():
    model, process = editor(4)
    how = {"block_size": 4, "max_new_tokens": 3, "edit": 0.4, "fill": 0.6, "post": 5}
    together = run(model, process, RAGGED, **how)
    again = run(model, process, RAGGED, use_cache=False, **how)
    assert torch.equal(together.x, again.x)
    for i, prompt in enumerate(RAGGED):
        alone = run(model, process, [prompt] * (i + 1), **how).x[i]
        assert torch.equal(alone, together.x[i, : len(alone)])


def test_options_out_of_range_are_refused():
    model, process = editor()
    for bad in ({"fill": -0.1}, {"fill": 1.1}, {"edit": -1.0}, {"edit": math.nan}, {"post": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            run(model, process, [()], block_size=4, **bad)
    with pytest.raises(ValueError, match="delete_split"):
        run(net(process), process, [()], block_size=4)


@pytest.mark.slow
def test_training_is_resumed_and_refused(project, slip):
    def go(*argv):
        with patch.object(sys, "argv", ["train.py", *argv]):
            training.main()

    base = [*TINY, "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--lr=0.05", "--max_steps=4"]
    go(*base, "--out_dir=net", "--warmup=1")
    flags = ["--method=delete_split", "--ckpt=net", "--device=cpu", "--lr=0.01", "--n_eval=4"]
    whole, parts = resumed(training.main, *flags)
    assert set(whole) == set(parts), "a resumed run leaves the same things"
    before = checkpoint.load("net")["model"]
    assert any(not torch.equal(x, whole["model"][name]) for name, x in before.items())
    checkpoint.save("odd", {**parts, "method": "x"})
    argv = [*flags, "--out_dir=odd", "--max_steps=6", "--resume"]
    assert "method is of another version" in slip(training.main, argv=argv)
    go(*base, "--out_dir=uniform", "--process=uniform")
    for bad, says in (
        (["--ckpt=uniform"], "masked noise"),
        (["--ckpt=net", "--moved=1"], "moved is 1"),
        (["--ckpt=net", "--wrong=-0.1"], "wrong is -0.1"),
    ):
        assert says in slip(training.main, argv=[*flags[:1], *bad, "--device=cpu"]), bad
