"""
How does a corpus become .bin files? Its documents (shards.py) are turned into ids by all cores, a chunk at a
time, and made into rows: windows of one long stream (Stream), or one document each (Rows).
data/NAME/prepare.py says which documents and what rows. Nothing is held but a few chunks and the ids that
wait for a window to fill, so a corpus may be larger than memory; a single line may not.

Killed at any moment and started again, it goes on where it stopped, and the files are the same byte for byte,
with any number of workers. A chunk's rows are appended to the SPLIT.bin.part files and brought to the disk;
then progress.json is replaced by one that tells where the reading is, how long the .part files are, and which
ids wait. What is longer than it says is cut off at the next start. With other settings, inputs or code all
begins anew. At the end the old meta.json is deleted, each .part file renamed, and the new meta.json written:
new rows never stand beside old ones under a meta.json.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import shards, tokens
from data.shards import Bad, chunks, texts_of
from data.tokens import FILES, Tokenizer
from hub.download import locked
from run.cli import die

TOOLS = []  # of a worker process
id_type = lambda meta: np.dtype(np.uint16 if meta["vocab_size"] <= 1 << 16 else np.uint32)


@dataclass
class Stream:
    """
    Documents one after the other, cut into windows of row_len - 2 ids; a row is bos, a window, eos. A last
    part window is lost.
    """

    bos: int
    eos: int
    after_document: bool = True  # eos follows each document as well


@dataclass
class Rows:
    """A document a row, filled up with pad."""

    pad: int
    cut: bool  # too long: it loses its end, but for the last id; False: it is dropped
    prompts: bool = False  # how long each row's prompt is goes to SPLIT.prompts.bin, uint16


def question_answer(tokenizer, question, answer, sep):
    """
    (prompt, answer) as ids. The three texts are tokenized apart, so that a prompt has the same ids with and
    without its answer.
    """
    return [0, *tokenizer.encode(question), *tokenizer.encode(sep)], [*tokenizer.encode(answer), 0]


def questions_and_answers(seq_len, sep):
    """
    (meta, encode, form) of rows [BOS] question sep answer [EOS] in SmolLM's tokens, filled up with EOS; both
    are id 0.
    """
    meta = {
        "vocab_size": 49152,
        "tokenizer": "smollm",
        "eos_id": 0,
        "bos_id": 0,
        "row_len": seq_len,
        "prompt_lens": 1,
        "prompt_end": sep,
    }
    return meta, partial(question_answer, sep=sep), Rows(pad=0, cut=False, prompts=True)


def build(
    cfg, folder, meta, inputs, columns, encode, form, split_of=None, n_documents=None, layout="documents"
):
    """
    Make train.bin, val.bin and meta.json of a folder, or go on making them. inputs: [(split, path or url)] in
    order; with split None split_of(index) says "train" or "val" for each document. encode(tokenizer, *texts
    of the columns) gives ids, or for Rows (ids of the prompt, ids of the rest). n_documents: how many there
    must be in the end, if known. layout: see shards.read. cfg: bpe, workers, chunk. Prints one line in the
    end; exits with two for what cannot be read or written.
    """
    if min(cfg.workers, cfg.chunk - 1, meta["row_len"] - 8) < 0:
        die("seq_len must be at least 8, chunk 1, workers 0 (all cores)", "--help")
    began, ends = (
        time.time(),
        [".bin", ".prompts.bin"] if isinstance(form, Rows) and form.prompts else [".bin"],
    )
    files = [f"{split}{end}" for split in ("train", "val") for end in ends]
    try:
        with locked(folder / "progress.lock"):
            if cfg.bpe:
                keep_tokenizer(cfg.bpe, meta, folder)
            state = resume(folder, files, fingerprint(cfg, folder, meta, inputs))
            if not state["finished"]:
                ahead = chunks(inputs, columns, layout, split_of, state, cfg.chunk)
                tools = Tokenizer(meta, folder), meta, columns, encode, form
                with tqdm(
                    total=n_documents,
                    initial=state["documents"],
                    desc=folder.name,
                    unit=" documents",
                    disable=None,
                ) as bar:
                    for position, (made, counts) in worked(
                        ahead, cfg.workers or os.cpu_count(), tools, folder
                    ):
                        append(folder, state, made, form, meta)
                        state |= position | {"counts": Counter(state["counts"]) + counts}
                        write(folder / "progress.json", state)
                        bar.update(state["documents"] - bar.n)
                if n_documents not in (None, state["documents"]):
                    die(
                        f"{state['documents']:,} documents in all, {n_documents:,} expected",
                        "the inputs in full, and once more",
                    )
                if empty := [file for file in files if not state["sizes"][file]]:
                    die(
                        f"{empty[0]} would be without a row of {meta['row_len']} ids",
                        "more --input, or a smaller --seq_len",
                    )
                write(folder / "progress.json", state | {"finished": True})
            finish(folder, files, meta)
    except Bad as e:
        die(*e.args)
    except BrokenExecutor:
        die(
            "a worker was killed: was memory short?",
            "the same command, which goes on from here, with fewer --workers",
        )
    except KeyboardInterrupt:
        die("stopped", "the same command, which goes on from here")
    except OSError as e:
        die(
            f"cannot write to {e.filename or folder}: {e.strerror or e}",
            "make room, then the same command, which goes on from here",
        )
    n_train, n_val = (
        state["sizes"][f"{split}.bin"] // id_type(meta).itemsize // meta["row_len"]
        for split in ("train", "val")
    )
    lost = "".join(f", {n:,} too long and {what}" for what, n in state["counts"].items())
    print(
        f"{folder.name}: {n_train:,} + {n_val:,} rows from {state['documents']:,} documents"
        f"{lost}, {time.time() - began:.1f} s"
    )


# ----- from documents to ids


def worked(ahead, n_workers, tools, folder):
    """Yields (position, work(...)) of (position, name, chunk), in order."""
    if n_workers == 1:
        yield from ((position, work(name, chunk, *tools)) for position, name, chunk in ahead)
        return
    # a fork costs nothing; elsewhere it is not safe
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    pool, waiting = (
        ProcessPoolExecutor(n_workers, context, begin_worker, (os.getpid(), folder, *tools[1:])),
        deque(),
    )
    try:
        pool.submit(int).result()  # the workers fork now, before reading begins threads
        while True:
            more = islice(ahead, 2 * n_workers + 1 - len(waiting))  # so many chunks are in memory, no more
            waiting.extend((position, pool.submit(work, name, chunk)) for position, name, chunk in more)
            if not waiting:
                return
            position, future = waiting.popleft()
            yield position, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def begin_worker(parent, folder, meta, *others):
    def watch():  # the parent may be killed without a word
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=watch, daemon=True).start()
    TOOLS[:] = Tokenizer(meta, folder), meta, *others


def work(name, chunk, *tools):
    """chunk: [(split, where, what, is_end)] -> ({file: array of ids, or of lengths of prompts}, counts)."""
    tokenizer, meta, columns, encode, form = tools or TOOLS
    row_len, made, counts = meta["row_len"], {}, Counter()
    for split, where, what, is_end in chunk:
        ids = encode(tokenizer, *(texts_of(name, where, what, columns) if isinstance(what, bytes) else what))
        if isinstance(form, Stream):
            ids = [*ids, form.eos] if is_end and form.after_document else ids
        else:
            n_prompt, ids = len(ids[0]), ids[0] + ids[1]
            if len(ids) > row_len:
                counts["cut" if form.cut else "dropped"] += 1
                if not form.cut:
                    continue
                ids = ids[: row_len - 1] + ids[-1:]
            ids = ids + [form.pad] * (row_len - len(ids))
            if form.prompts:
                made.setdefault(f"{split}.prompts.bin", []).append(n_prompt)
        if ids and max(ids) >= meta["vocab_size"]:
            raise Bad(
                f"the {meta['tokenizer']} tokenizer gives id {max(ids)}, vocab_size is {meta['vocab_size']}",
                "--bpe of another file",
            )
        made.setdefault(f"{split}.bin", []).extend(ids)
    return {
        file: np.array(ids, np.uint16 if "prompts" in file else id_type(meta)) for file, ids in made.items()
    }, counts


# ----- from ids to files


def fingerprint(cfg, folder, meta, inputs):
    """
    Of all that decides what the rows will be: settings, names and sizes of the inputs, the tokenizer's file,
    the code.
    """
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("workers", "chunk", "bpe")}
    sizes = [(split, name, None if "://" in name else os.path.getsize(name)) for split, name in inputs]
    code = [
        module.__file__
        for module in (sys.modules[__name__], shards, tokens, sys.modules[type(cfg).__module__])
    ]
    files = [tokens.file(FILES[meta["tokenizer"]], folder), *code]
    hashes = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files if os.path.exists(f)]
    return hashlib.sha256(json.dumps([settings, meta, sizes, hashes]).encode()).hexdigest()


def resume(folder, files, key):
    """
    Where the run that was broken off stood, its .part files cut to what progress.json vouches for; or the
    beginning.
    """
    state = {"key": key, "shard": 0, "units": 0, "documents": 0, "finished": False, "counts": {}}
    state |= {"sizes": dict.fromkeys(files, 0), "held": {"train": [], "val": []}}
    if (folder / "progress.json").exists():
        old = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        # the renaming may have begun
        places = lambda file: [folder / f"{file}.part", *([folder / file] if old["finished"] else [])]
        size_of = lambda file: next((path.stat().st_size for path in places(file) if path.exists()), 0)
        if old["key"] != key:
            print(
                f"{folder.name}: other settings, inputs or code "
                "than those of the run that was broken off: beginning anew"
            )
        elif any(size_of(file) < old["sizes"][file] for file in files):
            print(
                f"{folder.name}: the files of the run that was broken off "
                "are not what it left: beginning anew"
            )
        else:
            print(f"{folder.name}: going on behind document {old['documents']:,}")
            state = old
    if state["documents"] == 0:
        write(folder / "progress.json", state)  # before the files that an older one vouches for change
    for file in files if not state["finished"] else ():
        with open(folder / f"{file}.part", "ab") as f:
            f.truncate(state["sizes"][file])
    return state


def append(folder, state, made, form, meta):
    """
    A chunk's rows to the .part files, on the disk when this returns; ids that fill no window yet to
    state["held"].
    """
    for file, ids in made.items():
        if isinstance(form, Stream):
            width, split = meta["row_len"] - 2, file.removesuffix(".bin")
            ids = np.concatenate((np.array(state["held"][split], ids.dtype), ids))
            inside = ids[: len(ids) // width * width].reshape(-1, width)
            state["held"][split] = ids[inside.size :].tolist()
            ids = np.pad(inside, ((0, 0), (1, 1)), constant_values=((0, 0), (form.bos, form.eos)))
        with open(folder / f"{file}.part", "ab", buffering=0) as f:
            left = memoryview(ids.tobytes())
            while left:  # a disk that is almost full takes a part, and says so at the next attempt
                left = left[f.write(left) :]
            os.fsync(f.fileno())
        state["sizes"][file] += ids.nbytes


def write(path, record):
    """A JSON file, in the old one's place at once and for good."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(json.dumps(record, indent=1 if path.name == "meta.json" else None) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)
    sync(path.parent)


def sync(folder):
    """The names of its files are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def finish(folder, files, meta):
    """
    The new files in the old ones' place. Wherever this breaks off, it can be done again; no meta.json vouches
    for a mixture.
    """
    (folder / "meta.json").unlink(missing_ok=True)
    sync(folder)
    for file in ("train.bin", "val.bin", "train.prompts.bin", "val.prompts.bin"):
        if file not in files:
            (folder / file).unlink(missing_ok=True)
            (folder / f"{file}.part").unlink(missing_ok=True)
        elif (folder / f"{file}.part").exists():  # else it was renamed before
            os.replace(folder / f"{file}.part", folder / file)
    sync(folder)
    write(folder / "meta.json", meta)
    (folder / "progress.json").unlink()


def keep_tokenizer(given, meta, folder):
    """The file of --bpe to the folder, under the name that Tokenizer looks for, once it has proved good."""
    kept = folder / FILES[meta["tokenizer"]]
    if not os.path.isfile(given):
        die(f"{given} not found", f"--bpe FILE, a {kept.name}")
    if not kept.exists() or kept.read_bytes() != Path(given).read_bytes():
        with tempfile.TemporaryDirectory(dir=folder) as trial:
            shutil.copyfile(given, Path(trial) / kept.name)
            Tokenizer(meta, trial).encode("a")  # complains, or else a good file is replaced
            (folder / "meta.json").unlink(missing_ok=True)  # the rows beside it are of other words
            os.replace(Path(trial) / kept.name, kept)
