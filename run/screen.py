"""
What does a person see? Text that forms, redrawn in place or block by block, on whatever terminal there is.
"""

import itertools
import os
import shutil
import sys
import time
import unicodedata

from generate import NOTHING
from run.cli import shown

DUMB = os.environ.get("TERM") == "dumb"  # a terminal that knows no escape codes
DIM, COLOUR, PLAIN = ("",) * 3 if DUMB or os.environ.get("NO_COLOR") else ("\x1b[2m", "\x1b[1;32m", "\x1b[0m")


def text_of(ids, tokenizer):
    """The text of a row, with its controls spelt out: a vocabulary may come from anywhere."""
    return shown(tokenizer.decode([i for i in ids if i != NOTHING]))


def cells(row, before, tokenizer, mask_id):
    """One string a token: dim dots for masks and nothing, colour where this step changed something."""
    out = []
    for i, token in enumerate(row):
        if token == NOTHING:
            out.append(" ")
        elif token == mask_id:
            out.append(f"{DIM}░{PLAIN}")
        else:
            text = text_of([token], tokenizer).replace("\t", "    ")  # a tab ends at a column of its own
            out.append(f"{COLOUR}{text}{PLAIN}" if before is not None and before[i] != token else text)
    return out


def pages_across(meta, wide=1):
    """
    So many rows fit side by side as pages of a `width`, in cells of `wide` columns; 0: not even one, or rows
    have no width.
    """
    columns = shutil.get_terminal_size().columns + 3
    return columns // (meta["width"] * (wide + 1) + 3) if "width" in meta else 0


def columns_of(text):
    """The columns of a terminal that a text takes: two a wide character, none a mark or joiner on another."""
    alone = (c for c in text if c == "\xad" or unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in alone)


def bare(cell):
    """A cell without its colours."""
    return cell.replace(DIM, "").replace(COLOUR, "").replace(PLAIN, "")


def wrapped(page, columns):
    """The lines of a page of cells, wrapped by hand: escape codes have no width."""
    lines, line, used = [], "", 0
    for cell in page:
        visible = bare(cell)
        for c in visible if "\n" in visible else [visible]:
            if c == "\n" or used + columns_of(c) >= columns:
                lines.append(line)
                line, used = "", 0
            if c != "\n":
                line, used = line + (cell if c == visible else c), used + columns_of(c)
    return [*lines, line]


def frame(state, before, tokenizer, mask_id, meta, whole=False):
    """
    Lines of one animation frame. Rows with a `width` stand side by side, prompt above, as little pages;
    others run on. What is taller than the screen cannot be redrawn: then the last lines of each row are
    shown, where the work is, unless the whole is wanted.
    """
    rows, (columns, height) = state.x.tolist(), shutil.get_terminal_size()
    fits, lines = max(1, height - 2), []
    pages = [cells(*row, tokenizer, mask_id) for row in zip(rows, before or [None] * len(rows), strict=True)]
    wide = max((columns_of(bare(cell)) for page in pages for cell in page), default=1)
    if n := pages_across(meta, wide):  # more would wrap, and a wrapped line cannot be redrawn
        w, above = meta["width"], meta.get("prompt_len", 0) // meta["width"]
        cell = lambda c: " " * (wide - columns_of(bare(c))) + c.replace("\n", "↵")
        for some in range(0, len(pages) if whole else 1, n):
            beside = [[*map(cell, page)] for page in pages[some : some + n]]
            band = ["    ".join(" ".join(p[i : i + w]) for p in beside) for i in range(0, len(rows[0]), w)]
            lines += [""] * (some > 0) + band[:above] + [""] * (above > 0) + band[above:]
        while len(lines) > fits and not whole and not lines[-1].strip():
            lines.pop()  # nothing is written there yet
        return lines if whole else lines[-fits:]
    texts = []
    for row, page in zip(rows, pages, strict=True):
        end = len(row)
        while end and row[end - 1] == NOTHING:
            end -= 1
        texts.append(wrapped(page[:end], columns))
    if not whole and sum(len(text) + 1 for text in texts) > fits:
        texts = [text[-max(1, fits // len(texts) - 1) :] for text in texts]
    lines = [line for text in texts for line in [*text, ""]]
    return lines if whole else lines[-fits:]


def animate(states, tokenizer, mask_id, meta, fps):
    before, height = None, 0
    for state in states:
        start = time.time()
        lines = frame(state, before, tokenizer, mask_id, meta)
        up = f"\x1b[{height}A" if height else ""
        sys.stdout.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
        sys.stdout.write("\x1b[J")
        sys.stdout.flush()
        last, before, height = before, state.x.tolist(), len(lines)
        yield state
        time.sleep(max(0.0, 1 / fps - (time.time() - start)))
    whole = frame(state, last, tokenizer, mask_id, meta, whole=True)
    if len(whole) > height:  # once in full, so that one can scroll back
        sys.stdout.write(f"\x1b[{height}A\x1b[J" + "".join(f"{line}\n" for line in whole))


def stream(states, tokenizer, prompt):
    """The first sample appears block by block; the others, made in the same passes, follow whole."""
    written = 0
    print(f"--- sample 1\n{prompt}", end="", flush=True)
    for state in states:
        row = [i for i in state.x[0].tolist() if i != NOTHING]
        if state.finished or state.done[0]:
            text = text_of(row if state.done[0] else row[: state.span[1]], tokenizer)
            if not state.done[0]:
                text = text.rstrip("\ufffd")  # half a character: its other bytes come with the next block
            sys.stdout.write(text[max(written, len(prompt)) :])
            sys.stdout.flush()
            written = max(written, len(text))
        yield state
    for i, row in enumerate(state.x[1:].tolist()):
        print(f"\n--- sample {i + 2}\n{text_of(row, tokenizer)}", end="")
    print()


def pages(texts):
    """Texts of several lines each, side by side: what a dataset's show makes of its rows."""
    columns, beside = shutil.get_terminal_size().columns, []
    for page in [shown(text).split("\n") for text in texts]:
        if beside and sum(max(map(columns_of, each)) + 4 for each in [*beside, page]) > columns:
            print_beside(beside)
            beside = []
        beside.append(page)
    if beside:
        print_beside(beside)


def print_beside(several):
    """Pages, lists of lines, in one band, and a blank line."""
    wide = [max(map(columns_of, page)) for page in several]
    for line in itertools.zip_longest(*several, fillvalue=""):
        cells = (part + " " * (w - columns_of(part)) for part, w in zip(line, wide, strict=True))
        print("    ".join(cells).rstrip())
    print()
