"""
How is a corpus read? A document at a time, from .txt, .jsonl, .jsonl.gz or .parquet files, here or on the
hub, from any document on. What cannot be read ends in two lines that name the file and the line.
"""

import glob
import gzip
import json
import os
import zlib
from itertools import islice

from tqdm import tqdm

from hub.download import fetch
from run.cli import die, said

KINDS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
PIECE = 1 << 16  # characters of a long text that are tokenized at once
CHUNK = 1 << 22  # characters: a chunk is complete with so many, however few its documents


class Bad(Exception):
    """
    (problem, fix) on the way from a worker, which finds a line that is no document, to the two lines that say
    so.
    """


def inputs(words, flag="--input"):
    """The local files that a comma-separated list of paths and globs names."""
    found = [
        f
        for w in words.split(",")
        for f in ([w] if os.path.exists(w) else sorted(glob.glob(w, recursive=True)) or [w])
    ]
    for name in found:
        if not os.path.isfile(name):
            die(f"{name} not found", f"{flag} FILE or {flag} 'FOLDER/*.parquet'")
        if not name.endswith(KINDS):
            die(f"{name} is none of {', '.join(KINDS)}", f"{flag} FILE of one of these kinds")
    return found


def chunks(shards, columns, layout, split_of, state, size):
    """Yields (position behind it, name, [(split, where, what, is_end)]), from state's position on."""
    first, n, documents = state["shard"], state["units"], state["documents"]
    for i, (split, name) in enumerate(shards[first:], first):
        chunk, length = [], 0
        for where, what, is_end in read(name, columns, n, layout):
            chunk.append((split or split_of(documents), where, what, is_end))
            n, documents = n + 1, documents + is_end
            length += len(what) if isinstance(what, bytes) else sum(map(len, what))
            if len(chunk) == size or length >= CHUNK:
                yield {"shard": i, "units": n, "documents": documents}, name, chunk
                chunk, length = [], 0
        n = 0
        yield {"shard": i + 1, "units": n, "documents": documents}, name, chunk


def read(name, columns, skip=0, layout="documents"):
    """
    Yields (where, what, is_end) from the file or url `name`, behind the first `skip`. where: line or row,
    from 1. what: a tuple of texts, one a column, or bytes of JSON that hold them. is_end: a document ends
    with it; long texts come in pieces.

    layout "documents"   a .txt has lines <|endoftext|> between its documents, or is one document
           "lines"       each line of a .txt is a document
           "one"         as "documents", and the rows of a .parquet file are lines of one document, "" an
                         empty one
    """
    path = fetch(name) if "://" in name else name
    try:
        if name.endswith(".parquet") and layout == "one":
            lines = (
                (n, text if text.strip() else " \n") for n, (text,), _ in parquet(path, name, columns, 0)
            )
            yield from islice(pieces(lines), skip, None)
        elif name.endswith(".parquet"):
            yield from parquet(path, name, columns, skip)
        elif name.endswith(".txt"):
            if columns != ["text"]:
                die(
                    f"{name} is plain text, without columns {', '.join(columns)}",
                    "--input of a .jsonl or .parquet file",
                )
            with open(path, "rb") as f:
                lines = ((n, utf8(line, name, n)) for n, line in enumerate(f, 1))
                apart = ((n, (line.strip(),), True) for n, line in lines if line.strip())
                yield from islice(apart if layout == "lines" else pieces(lines), skip, None)
        else:
            with (gzip.open if name.endswith(".gz") else open)(path, "rb") as f:
                yield from islice(
                    ((n, line, True) for n, line in enumerate(f, 1) if line.strip()), skip, None
                )
    except (OSError, ValueError, EOFError, zlib.error) as e:  # the ValueErrors are pyarrow's
        die(f"cannot read {name}: {said(e)}", "a whole and readable copy of the file")


def utf8(line, name, n):
    try:
        return line.decode()
    except UnicodeDecodeError as e:
        die(
            f"{name}, line {n} is not UTF-8: {e.reason} at byte {e.start + 1}",
            f"iconv -f LATIN1 -t UTF-8 {name} > FILE",
        )


def pieces(lines):
    """
    Cuts documents into pieces whose ids, joined, are those of the whole. Both GPT-2's pattern and BERT's
    begin a new match where white space follows something else, and none looks back or, but from within white
    space, ahead: so a piece ends there, before a line break. A cut after the line break would not do: in
    "a.\\n\\nb" the pattern takes "\\n" twice, at the end of a piece "\\n\\n" at once.
    """
    held, size, n = [], 0, 0
    for n, line in lines:
        if line.strip() == "<|endoftext|>":
            yield n, ("".join(held).removesuffix("\n"),), True
            held, size = [], 0
            continue
        held.append(line)
        size += len(line)
        if size >= PIECE:
            text = "".join(held)
            body = text.rstrip(" \t\r\n\v\f")
            # isspace: white space beyond ASCII; and a document keeps some end
            if body and body != text and not body[-1].isspace():
                yield n, (body,), False
                held = [text[len(body) :]]
                size = len(held[0])
    if text := "".join(held):
        yield n, (text,), True


def opened(path, name):
    try:
        import pyarrow.parquet
    except ImportError:
        die("parquet files are read with pyarrow, which is not installed", "pip install pyarrow")
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as e:  # all of pyarrow's own are one of these
        die(f"cannot read {name}: {said(e)}", "a whole copy of the parquet file")


def parquet(path, name, columns, skip):
    """The rows behind the first `skip`; groups of rows that are skipped are not read."""
    file, n = opened(path, name), 0
    if lacking := [c for c in columns if c not in file.schema_arrow.names]:
        die(f"{name} has no column {lacking[0]!r}, only {', '.join(file.schema_arrow.names)}", "another file")
    for group in range(file.num_row_groups):
        if n + file.metadata.row_group(group).num_rows <= skip:
            n += file.metadata.row_group(group).num_rows
            continue
        for batch in file.iter_batches(1000, row_groups=[group], columns=columns):
            for texts in zip(*(batch.column(c).to_pylist() for c in columns), strict=True):
                n += 1
                if bad := [c for c, t in zip(columns, texts, strict=True) if not isinstance(t, str)]:
                    die(f"{name}, row {n}: column {bad[0]!r} holds no text", "another file")
                if n > skip:
                    yield n, texts, True


def count(names, columns):
    """How many documents the local files hold."""
    n = 0
    for name in tqdm(names, desc="counting documents", delay=1, leave=False, disable=None):
        parquet = name.endswith(".parquet")
        n += (
            opened(name, name).metadata.num_rows
            if parquet
            else sum(is_end for *_, is_end in read(name, columns))
        )
    return n


def texts_of(name, where, line, columns):
    fix = f"sed -n {where}p {name}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        raise Bad(f"{name}, line {where} is not JSON in UTF-8: {said(e)}", fix) from e
    for column in columns:
        if not isinstance(record, dict) or not isinstance(record.get(column), str):
            raise Bad(f"{name}, line {where} has no text named {column!r}", fix)
    return [record[c] for c in columns]
