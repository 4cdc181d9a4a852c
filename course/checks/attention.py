"""Exercise 1: the rule of attention. Every pair of tokens is compared with the rule in positions."""

from types import SimpleNamespace

import torch

import model
from course import project
from course.harness import Wrong, likeness, tensor

TITLE, MINUTES = "who may read whom", 20
FUNCTION = "attention_mask"
SOURCE = [model.attention_mask, model.Transformer.layout]
HINTS = [
    "Two comparisons, each of all rows with all columns: x[..., None] is a column of rows.\n"
    "The clean columns have positions 0 .. n_clean_keys - 1: which of them lie before the edge of a row?",
    "clean: torch.arange(n_clean_keys) < edge[..., None]\n"
    "noisy: the groups of the rows beside the groups of the noisy columns, which are group[:, group[0] >= 0].\n"
    "Where they are equal the token may read. Then torch.cat both along the columns.",
]


def layout(b, start, n_past, C, N):
    """edge, group (B, S) as the network makes them."""
    net = SimpleNamespace(cfg=SimpleNamespace(clean_causal=True))
    return model.Transformer.layout(net, b, start, n_past, C, N, "cpu")[1:]


def rule(kind, i, other, j, b):
    """May the token of this kind at i read the other at j?"""
    if kind == "clean":
        return other == "clean" and j <= i
    return j // b < i // b if other == "clean" else j // b == i // b


def tokens(start, n_past, C, N):
    """(kind, position) of each row and of each column."""
    rows = [("clean", n_past + i) for i in range(C)] + [("noisy", start + i) for i in range(N)]
    columns = [("clean", i) for i in range(n_past + C)] + [("noisy", start + i) for i in range(N)]
    return rows, columns


def by_rule(rule, b, start, n_past, C, N):
    """The mask of a rule in positions, pair by pair: bool (S, keys)."""
    rows, columns = tokens(start, n_past, C, N)
    return torch.tensor([[bool(rule(*row, *column, b)) for column in columns] for row in rows])


def asked(answer, b, start, n_past, C, N):
    """The student's mask of one case, bool (B, S, keys)."""
    edge, group = layout(b, start, n_past, C, N)
    shape = (len(edge), C + N, n_past + C + N)
    y = tensor(answer(edge, group, n_past + C), shape, "(B, S, n_clean_keys + N)", answer.name)
    if not ((y == 0) | (y == 1)).all():
        raise Wrong(f"{answer.name} returns other numbers than True and False: {y[(y != 0) & (y != 1)][0]}")
    return y.bool()


def compare_pairs(answer, where, b, start, n_past, C, N):
    """Wrong at the first pair in `where` (kind, kind) that is not as the rule says."""
    y = asked(answer, b, start, n_past, C, N)
    rows, columns = tokens(start, n_past, C, N)
    for row_of_batch, size in enumerate(torch.as_tensor(b).view(-1).tolist()):
        want = by_rule(rule, size, start, n_past, C, N)
        for i, j in (y[row_of_batch] != want).nonzero().tolist():
            (kind, p), (other, q) = rows[i], columns[j]
            if where in ("all", (kind, other)):
                does, should = ("reads", "must not") if y[row_of_batch, i, j] else ("does not read", "must")
                raise Wrong(f"block size {size}: {kind} {p} {does} {other} {q}, and {should}")


SIMPLE = (2, 0, 0, 4, 4)  # the example in the file: b, start, n_past, C, N


def check(answer):
    yield "one row for each token that reads, one column for each that is read"
    asked(answer, *SIMPLE)
    yield "clean text reads itself and what stands before it"
    compare_pairs(answer, ("clean", "clean"), *SIMPLE)
    yield "clean text reads no noise"
    compare_pairs(answer, ("clean", "noisy"), *SIMPLE)
    yield "a noisy block reads the clean blocks before it, never its own clean copy"
    compare_pairs(answer, ("noisy", "clean"), *SIMPLE)
    yield "a noisy block reads itself in both directions, and no other noise"
    compare_pairs(answer, ("noisy", "noisy"), *SIMPLE)
    yield "block sizes 1 (AR), 4, and the whole length (full diffusion)"
    for b in (1, 4, 8):
        compare_pairs(answer, "all", b, 0, 0, 8, 8)
    yield "with a cache: more clean columns than clean rows"
    for case in ((2, 6, 4, 2, 2), (1, 4, 3, 1, 1), (4, 4, 0, 4, 4), (4, 8, 8, 0, 4), (2, 0, 0, 0, 4)):
        compare_pairs(answer, "all", *case)
    compare_pairs(answer, "all", 2, 0, 0, 4, 0)  # clean text alone
    yield "several block sizes in one batch"
    compare_pairs(answer, "all", torch.tensor([1, 2, 4]), 0, 0, 8, 8)


def edge(kind, i, b):
    return i + 1 if kind == "clean" else i // b * b


def with_clean(reads):
    """A rule that differs in who reads clean text. reads(kind, i, j, b)"""
    return lambda kind, i, other, j, b: (
        reads(kind, i, j, b) if other == "clean" else rule(kind, i, other, j, b)
    )


def with_noise(reads):
    """A rule that differs in which noise a noisy token reads. reads(i, j, b)"""
    return lambda kind, i, other, j, b: (
        reads(i, j, b) if kind == other == "noisy" else rule(kind, i, other, j, b)
    )


SLIPS = {
    "this leaks: `edge` is the first position that must not be read. < is right, <= is not": with_clean(
        lambda kind, i, j, b: j <= edge(kind, i, b)
    ),
    "this leaks: a noisy token reads its own clean copy, which is the answer. Its block begins at `edge`": (
        with_clean(lambda kind, i, j, b: j <= i if kind == "clean" else j // b <= i // b)
    ),
    "this leaks: noisy tokens read clean text up to themselves. It must end before their block": with_clean(
        lambda kind, i, j, b: j <= i
    ),
    "this leaks: noisy tokens read the clean text of their own block": with_clean(
        lambda kind, i, j, b: j < i if kind == "noisy" else j <= i
    ),
    "this leaks: noisy tokens read all clean text": with_clean(
        lambda kind, i, j, b: kind == "noisy" or j <= i
    ),
    "the comparison of the clean columns is turned around": with_clean(
        lambda kind, i, j, b: j >= edge(kind, i, b)
    ),
    "one clean token too few: all before `edge` may be read": with_clean(
        lambda kind, i, j, b: j < edge(kind, i, b) - 1
    ),
    "clean text reads its block in both directions: here it is causal, token by token": with_clean(
        lambda kind, i, j, b: j // b <= i // b if kind == "clean" else j // b < i // b
    ),
    "nobody reads clean text": with_clean(lambda kind, i, j, b: False),
    "noisy tokens read the noisy blocks before theirs too: clean copies of those are there": with_noise(
        lambda i, j, b: j // b <= i // b
    ),
    "groups are compared with != : tokens of equal groups may read each other": lambda kind, i, other, j, b: (
        rule(kind, i, other, j, b) if other == "clean" else kind == "clean" or j // b != i // b
    ),
    "groups are compared by size: only tokens of equal groups may read each other": (
        lambda kind, i, other, j, b: (
            rule(kind, i, other, j, b) if other == "clean" else kind == "clean" or j // b >= i // b
        )
    ),
    "noisy tokens read noise of other blocks and not of their own": with_noise(
        lambda i, j, b: j // b != i // b
    ),
    "a noisy token reads all noise: compare the groups": with_noise(lambda i, j, b: True),
    "a noisy token reads no noise but itself: its whole block is meant": with_noise(lambda i, j, b: j == i),
    "inside a noisy block the rule is causal: it must go in both directions": with_noise(
        lambda i, j, b: j // b == i // b and j <= i
    ),
    "nobody reads noise": with_noise(lambda i, j, b: False),
    "clean tokens read noise: of group -1 nothing noisy can be": lambda kind, i, other, j, b: (
        kind == "clean" and other == "noisy" or rule(kind, i, other, j, b)
    ),
    "True and False are exchanged: True means may read": lambda *pair: not rule(*pair),
    "rows and columns are exchanged: a row is the token that reads": lambda kind, i, other, j, b: rule(
        other, j, kind, i, b
    ),
    "the noisy columns come first: the clean ones must": lambda kind, i, other, j, b: rule(
        kind, i, "noisy" if other == "clean" else "clean", j, b
    ),
}


def why(answer):
    try:
        mine = asked(answer, *SIMPLE)[0]
    except Wrong as e:
        return WRONG_SHAPE if "shape" in e.problem else ""
    return likeness(mine, SLIPS, lambda slip: by_rule(slip, *SIMPLE))


WRONG_SHAPE = (
    "the columns are n_clean_keys clean tokens and then the noisy ones alone, those with group >= 0;\n"
    "the rows are all S tokens, and the batch comes first"
)


def picture(attention_mask, b, n=8):
    edge, group = layout(b, 0, 0, n, n)
    mask = torch.as_tensor(attention_mask(edge, group, n))[0].bool()
    line = lambda row: " ".join("#" if x else "." for x in row.tolist())
    return [f"{line(row[:n])}   {line(row[n:])}" for row in mask]


def run(function, ckpt):
    """The picture, then training with the student's rule."""
    n = 8
    for b in (1, 4, 8):
        print(f"\nblock size {b}: rows read columns; {n} clean tokens, then {n} noisy ones")
        lines = picture(function, b, n)
        print("\n".join([*lines[:n], "", *lines[n:]]))
    mine = lambda edge, group, n_clean_keys: torch.as_tensor(function(edge, group, n_clean_keys)).bool()
    with project.replaced(model, "attention_mask", mine):
        project.train("config/sudoku.toml")
    print(
        "\nThe bound of block 16 is what to look at. A noisy block that read its own clean copy would come near"
    )
    print("0 nats, and yet fill nothing in later: then there is no copy. That is a leak.")
