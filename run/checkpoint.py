"""
What stays of a run? In its out_dir:

    ckpt.STEP.pt   a checkpoint: weights, EMA weights, optimizer state, settings, dataset facts and the step;
                   the newest few
    ckpt.pt        the newest of them, and best.pt that of the lowest validation loss: second names of a file
                   (hard links)
    ckpt.STEP.pt.ruined   saved after the last good one, when a run gave up; yours to delete
    log.jsonl      a line {"step": ...} a look; null for what is not finite
    earlier.N/     what a run that was here before left
    lock           held while a run writes here; not empty: one has begun here

There is no random state to keep: every draw is a function of (seed, step, row), see rng.Noise.

A file is written under a temporary name, brought to the disk and renamed, so a kill at any moment leaves the
last good one. It carries checksums, and is read with weights_only, so a file from a stranger runs no code.
"""

import errno
import hashlib
import importlib
import json
import math
import os
import pickletools
import re
import shutil
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from diffusion import Masked, NoiseProcess, Uniform
from fast.processes import plain
from model import ModelConfig, Transformer
from rng import Noise
from run import rounding
from run.cli import die, said
from run.machine import has_memory
from run.migrate import migrate

# ----- checkpoints


def save(out_dir, state):
    """
    state: a dict of tensors, numbers, strings, lists and dicts, "step" among them. Raises OSError, and then
        ckpt.pt is as it was.
    """
    folder, name = Path(out_dir), f"ckpt.{state['step']}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{name}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch's own writer has but RuntimeErrors
        temporary.unlink(missing_ok=True)
        raise e if isinstance(e, OSError) else OSError(errno.EIO, said(e)) from e
    to_disk(folder / "log.jsonl")  # a checkpoint vouches for the lines up to its step
    os.replace(temporary, folder / name)
    also(folder / name, "ckpt.pt")


def prune(out_dir, step, keep):
    """Delete all but the `keep` newest checkpoints up to `step`, which has proved good."""
    for old in [f for f in numbered(out_dir) if step_of(f) <= step][keep:]:
        old.unlink()


def fall_back_to_good(out_dir):
    """
    The newest numbered checkpoint whose validation was finite, or None. Newer ones are set aside as
    ckpt.STEP.pt.ruined.
    """
    finite = {
        r["step"] for r in logged(out_dir) if "val" in r and all(math.isfinite(v) for v in r["val"].values())
    }
    good = next((f for f in numbered(out_dir) if step_of(f) in finite), None)
    if good:
        for ruined in [f for f in numbered(out_dir) if step_of(f) > step_of(good)]:
            ruined.rename(f"{ruined}.ruined")
        also(good, "ckpt.pt")
    return good


def to_disk(path):
    """What was written to a file or folder survives a power failure from here on."""
    if path.exists():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def also(path, name):
    """Give the file `path` a second name in its folder, in the place of what had that name."""
    temporary = path.with_name(f"{name}.tmp")
    temporary.unlink(missing_ok=True)
    if os.path.exists(path.with_name(name)) and path.samefile(path.with_name(name)):
        return
    try:
        os.link(path, temporary)
    except OSError:  # a disk without hard links
        shutil.copyfile(path, temporary)
        to_disk(temporary)
    os.replace(temporary, path.with_name(name))
    to_disk(path.parent)  # names are a folder's content


def numbered(folder):
    """The files ckpt.STEP.pt of a folder, newest first."""
    found = [f for f in Path(folder).glob("ckpt.*.pt") if f.name[5:-3].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(file):
    return int(file.name[5:-3])


READERS = []  # (recognises, reads) of other formats, which take a path: hub/published.py adds its own


def is_foreign(path):
    """Is this not a run of ours, but weights in another format?"""
    return any(recognises(path) for recognises, _ in READERS)


def load(path, flag="--ckpt"):
    """
    The dict that was saved, on the CPU. path: an out_dir, whose newest checkpoint is meant, or one file,
    out_dir/best.pt. If the newest checkpoint is damaged the one before it takes its place, and stderr says
    so. Two lines if there is none; flag: what gave the path.
    """
    for recognises, read_other in READERS:
        if recognises(path):
            return read_other(path, flag)
    path = Path(path)
    files = (
        [path]
        if os.path.isfile(path)
        else [f for f in (path / "ckpt.pt", *numbered(path), path / "best.pt") if os.path.isfile(f)]
    )
    if not files:
        have = [p.parent for folder in (path.parent, Path("out")) for p in sorted(folder.glob("*/ckpt.pt"))]
        other = "python train.py config/sudoku.toml, or --init_from hf:OWNER/REPO/SUBFOLDER"
        other = "--init_from hf:OWNER/REPO/SUBFOLDER, or a run's out_dir" if flag == "--init_from" else other
        die(f"no checkpoint {path / 'ckpt.pt'}", f"{flag} {have[0]}" if have else other)
    problems, seen = [], set()
    for file in files:
        if (inode := file.stat().st_ino) in seen:
            continue  # the same file by its other name
        seen.add(inode)
        try:
            state = read(file)
        except MemoryError:
            raise
        except Exception as e:  # a damaged file, or one that wants to run code, fails in many ways
            problems.append(f"{file} is damaged or not a checkpoint of ours: {said(e)}")
            continue
        if problems:
            print("\n".join(f"WARNING: {p}" for p in problems), file=sys.stderr)
            print(
                f"WARNING: using the one before it, {file}, of step {state['step']}",
                file=sys.stderr,
                flush=True,
            )
        return state
    older = f"; {len(problems) - 1} older likewise" if problems[1:] else ""
    die(
        problems[0] + older,
        f"train again: python train.py --out_dir={path if path.is_dir() else path.parent}",
    )


def read(file):
    """The dict in one file; raises something if it is not what `save` wrote."""
    check_archive(file)
    if bad := zipfile.ZipFile(file).testzip():
        # torch would load a flipped bit without a word
        raise ValueError(f"the checksum of {bad} does not match")
    state = torch.load(file, map_location="cpu", weights_only=True)
    check_tensors(state, file)
    # the rest is for going on
    parts = {"model": dict, "ema": dict, "config": dict, "meta": dict, "step": int}
    if not isinstance(state, dict) or (lacking := sorted(set(parts) - set(state))):
        raise ValueError(f"it lacks {', '.join(lacking) if isinstance(state, dict) else 'everything'}")
    if odd := sorted(
        k
        for k, kind in parts.items()
        if not isinstance(state[k], kind) or kind is int and not 0 <= state[k] < 1 << 62
    ):
        raise ValueError(f"its {odd[0]} is a {type(state[odd[0]]).__name__}: {str(state[odd[0]])[:40]}")
    state = migrate({**state, "ema": rounding.unpacked(state["ema"])})
    check_sizes(state)
    return state


# What a file makes us allocate must be about as large as the file. So each of these comes before what would
# be allocated.


def check_archive(file):
    """
    Raise ValueError if unpacking a file of torch.save takes more than the file itself. torch stores the parts
    as they are; others may compress them, or let two parts lie on one place.
    """
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if packed := [part.filename for part in parts if part.file_size != part.compress_size]:
            raise ValueError(f"{packed[0]} is compressed, which torch.save does not do")
        if (total := sum(part.file_size for part in parts)) > (have := os.path.getsize(file)):
            raise ValueError(f"it says that {total:,} bytes are in {have:,}")
        for part in parts:
            if part.filename.lower().endswith("data.pkl"):
                for code, name, _ in pickletools.genops(archive.read(part)):
                    if code.name == "GLOBAL" and name.endswith("bytearray"):  # of any length, by one number
                        raise ValueError("it makes a bytearray, which no checkpoint needs")


def check_tensors(state, file):
    """
    Raise ValueError if the tensors that a file holds are far larger than the file: few numbers, read again
    and again (a stride of 0, or many views of one tensor), become many as soon as they are copied.
    """
    size, left, seen = 0, [state], set()
    while left:
        value = left.pop()
        if torch.is_tensor(value):
            size += value.numel() * value.element_size()
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value
    if size > 4 * (have := os.path.getsize(file)):  # some share a tensor in earnest
        raise ValueError(f"its tensors are of {size:,} bytes, the file of {have:,}")


def check_sizes(state):
    """
    Raise ValueError if the settings are of a network far larger than the weights: building it would take long
    before anything could be compared. A network may do with fewer tensors than layers, but not by thousands.
    """
    tensors = [v for part in ("model", "ema") for v in state[part].values() if torch.is_tensor(v)]
    numbers = sum(v.numel() for v in tensors)
    network = state["network"] if isinstance(state.get("network"), dict) else {}
    if odd := [name for name, value in network.items() if torch.is_tensor(value)]:
        raise ValueError(f"{odd[0]} of its network is a tensor")
    for kind, values, name, most in (
        ("settings", state["config"], "n_layers", 1000 + len(tensors)),
        ("network", network, "n_layers", 1000 + len(tensors)),
        ("dataset", state["meta"], "vocab_size", (1 << 20) + numbers),
        ("network", network, "vocab_size", (1 << 20) + numbers),
        ("settings", state["config"], "seq_len", 1 << 24),
    ):
        if type(values.get(name)) is int and values[name] > most:
            raise ValueError(f"its {kind} say {name} {values[name]:,}, its weights are {numbers:,} numbers")


# ----- the folder of a run


@contextmanager
def writing(out_dir, begin):
    """
    Hold the folder, which is made if need be: two runs that write to one would ruin both. Two lines if
    another does, or none can.
    begin: a run begins here, and the lock says so, for `begun`.
    """
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        lock = open(Path(out_dir) / "lock", "a", encoding="utf-8")
    except (OSError, ValueError) as e:  # ValueError: a name with a zero byte
        die(f"cannot write to {out_dir!r}: {getattr(e, 'strerror', e)}", "--out_dir of a folder of yours")
    try:
        import fcntl

        for patience in range(20, -1, -1):  # a process that was just killed may hold it a moment longer
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience == 0:
                    die(
                        f"another run is writing to {out_dir}",
                        "--out_dir of another folder, or wait for its end",
                    )
                time.sleep(0.1)
    except (ImportError, OSError):  # a system, or a disk, without such locks
        pass
    with lock:
        for half in Path(out_dir).glob("*.pt.tmp"):
            half.unlink()  # of a kill while saving
        if begin and lock.tell() == 0:
            lock.write("a run began here\n")
            lock.flush()
        yield


def begun(out_dir):
    """Has a run begun here that left no checkpoint? It was killed before its first."""
    lock = Path(out_dir) / "lock"
    return os.path.exists(lock) and lock.stat().st_size > 0 and not list(Path(out_dir).glob("*.pt"))


def line_of(record):
    """A record as a line of log.jsonl. JSON has no NaN and no infinity: null."""
    return json.dumps(json.loads(json.dumps(record), parse_constant=lambda _: None)) + "\n"


UNWRITTEN = {}  # path of a log.jsonl: lines that a full disk has not taken yet


def log(out_dir, *records):
    """
    Append lines to log.jsonl. A full disk loses nothing: what it does not take waits for the next call, which
    may bring no record.
    """
    path = Path(out_dir) / "log.jsonl"
    lines = UNWRITTEN.setdefault(path, [])
    lines += map(line_of, records)
    data = "".join(lines).encode()
    with open(path, "ab", buffering=0) as f:
        before = f.tell()
        try:
            if f.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            lines.clear()
        except OSError as e:
            f.truncate(before)
            print(f"WARNING: {path} waits: {e.strerror}", file=sys.stderr, flush=True)


def logged(out_dir, until=None):
    """
    The records of log.jsonl, [] without one; until: those up to that step. A line that a kill cut short does
    not count. A validation that was not finite, null there, is NaN here.
    """
    records = []
    path = Path(out_dir) / "log.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    records = [
        r
        for r in records
        if isinstance(r, dict) and isinstance(r.get("step"), int) and isinstance(r.get("val", {}), dict)
    ]
    for r in records:
        if "val" in r:
            r["val"] = {b: math.nan if nats is None else nats for b, nats in r["val"].items()}
    return [r for r in records if until is None or r["step"] <= until]


def validated(out_dir, step):
    return any("val" in r for r in logged(out_dir) if r["step"] == step)


def forget_after(out_dir, step):
    """Drop the lines of steps that will be taken again."""
    path = Path(out_dir) / "log.jsonl"
    temporary = path.with_name("log.jsonl.tmp")
    temporary.write_text("".join(map(line_of, logged(out_dir, step))), encoding="utf-8")
    to_disk(temporary)
    os.replace(temporary, path)


def keep_earlier_run(out_dir):
    """
    What a run left that was here before moves to earlier.1 and so on, where --ckpt finds it: nothing is
    overwritten.
    """
    folder = Path(out_dir)
    left = [folder / name for name in ("ckpt.pt", "best.pt", "log.jsonl") if (folder / name).exists()]
    left += [*numbered(folder), *folder.glob("ckpt.*.pt.ruined")]
    if not left:
        return
    n = next(n for n in range(1, 1 << 62) if not (folder / f"earlier.{n}").exists())
    (folder / f"earlier.{n}").mkdir()
    for file in left:
        file.rename(folder / f"earlier.{n}" / file.name)
    print(f"kept the earlier run of {folder} as {folder}/earlier.{n}")


# ----- from settings to a network


def fingerprint(model):
    """Twelve letters that stand for a model's weights, bit by bit."""
    return hashlib.sha256(
        b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    ).hexdigest()[:12]


VERSION = 2  # of the format; run/migrate.py reads those before


def process_facts(process):
    """What a checkpoint keeps of a noise process: its class and arguments."""
    process = plain(process)
    module, name = type(process).__module__, type(process).__qualname__
    return {"class": name if module == "diffusion" else f"{module}.{name}", "arguments": process.arguments()}


def process_of(facts):
    """
    The process that process_facts describes. Only classes of diffusion.py and methods/ come back: a file
    names no other code.
    """
    module, _, name = facts["class"].rpartition(".")
    if module and not re.fullmatch(r"methods\.[a-z_0-9]+", module):
        raise ValueError(f"no noise process {facts['class']!r}")
    kind = getattr(importlib.import_module(module or "diffusion"), name, None)
    if not (isinstance(kind, type) and issubclass(kind, NoiseProcess)):
        raise ValueError(f"no noise process {facts['class']!r}")
    return kind(**facts["arguments"])


def check_process(process, vocab_size, n_ids):
    """
    Raise ValueError, or what the process raises, unless a process that a file describes can be: for a dataset
    of vocab_size ids, and a network that reads n_ids.
    """
    V = process.vocab_size
    if type(V) is not int or not 1 <= V <= vocab_size + 64:  # room for masks
        raise ValueError(f"noise of {V!r} ids, for {vocab_size}")
    noise, x0 = Noise(0, torch.arange(1), torch.arange(1)), torch.zeros(1, 1, dtype=torch.long)
    made = process.prior((1, 1), noise), process.ar_input((1, 1), noise), process.corrupt(x0, 0.0, noise)
    if odd := [ids.item() for ids in made if ids.dtype != torch.long or not 0 <= ids.item() < n_ids]:
        raise ValueError(f"its noise makes id {odd[0]}, of {n_ids} ids")


def network_config(cfg, process, vocab_size):
    """The ModelConfig for the settings cfg (a TrainConfig) and a noise process."""
    return ModelConfig(
        vocab_size=process.vocab_size,
        seq_len=cfg.seq_len,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_model=cfg.d_model,
        time_conditioning=cfg.time_conditioning == "true",
        n_extra_tokens=process.n_extra_tokens,
        clean_causal=cfg.clean_causal,
        next_token=cfg.next_token,
        dropout=cfg.dropout,
    )


def build(cfg, vocab_size, network=None, method=None, settings=None, process=None):
    """
    (model, process) of the lesson for the settings cfg (a TrainConfig) and the dataset's vocabulary. Masked
    noise adds one id, the mask. Uniform noise adds none to the V it predicts: idle symbols would be drawn as
    noise.
    network: a dict, of weights that began elsewhere: what they are (ModelConfig). The model is then on the
        device meta, without weights, and `load_state_dict(..., assign=True)` gives it some.
    method, settings: a method's module and its Settings.
    process: what a checkpoint says of its process (process_facts), in place of what the settings make.
    """
    make = getattr(method, "network", lambda model_cfg, settings: Transformer(model_cfg))
    try:
        if process is not None:
            noise = process_of(process)
        elif hasattr(method, "process"):
            noise = method.process(cfg, settings, vocab_size)
        elif cfg.process == "masked":
            noise = Masked(vocab_size + 1, vocab_size)
        else:
            noise = Uniform(vocab_size, cfg.predicts, None if cfg.random_ar else vocab_size)
        if network is not None:
            with torch.device("meta"):
                model = make(ModelConfig(**network), settings)
            if noise.vocab_size != model.cfg.vocab_size:
                raise ValueError(f"{model.cfg.vocab_size} ids, and noise of {noise.vocab_size}")
            check_process(noise, noise.vocab_size, model.cfg.vocab_size + model.cfg.n_extra_tokens)
            return model, noise
        if process is not None:
            check_process(noise, vocab_size, noise.vocab_size + noise.n_extra_tokens)
    except (
        AssertionError,
        AttributeError,
        ArithmeticError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        if network is None and process is None:
            raise  # a fault of the code, not of a file
        die(f"the checkpoint says of its network what cannot be: {said(e)}", "another checkpoint")
    need = 4 * (12 * cfg.n_layers * cfg.d_model**2 + 2 * vocab_size * cfg.d_model)
    if need > (have := has_memory(torch.device("cpu"))):
        die(
            f"the weights alone take {need / 2**30:,.0f} GB, and there are {have / 2**30:,.0f}",
            "--d_model=128 --n_layers=4",
        )
    return make(network_config(cfg, noise, vocab_size), settings), noise
