"""
How does a network come back? From a run's checkpoint or from published weights, to be sampled from,
evaluated, gone on with or begun from.

    restore, rebuild    a model with its process, ready to sample
    dataset_for         the data it is evaluated on
    begin_from          train.py --init_from: weights, and the settings that come with them
    compare, load_state    train.py --resume: what changed since, and everything in its place
"""

import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

import fast
import methods
from data.dataset import Dataset, check_meta, read_meta
from diffusion import Masked
from model import Transformer
from options import TrainConfig
from run import checkpoint, machine, rounding
from run.cli import die, said, shown
from run.machine import pick_device, runs_on

SHAPES = (  # what the weights cannot follow
    "dataset",
    "process",
    "method",
    "predicts",
    "random_ar",
    "time_conditioning",
    "seq_len",
    "n_layers",
    "n_heads",
    "d_model",
    "clean_causal",
    "next_token",
)


def trained_with(state):
    """The TrainConfig of a loaded checkpoint."""
    try:
        config, kinds = state["config"], TrainConfig.__dataclass_fields__
        if missing := sorted(
            {*SHAPES, "block_sizes", "objective", "schedule"}
            - {"clean_causal", "next_token", "method"}
            - set(config)
        ):
            raise TypeError(f"no {', '.join(missing)}")  # a default would be a guess
        if wrong := sorted(
            k for k, v in config.items() if k in kinds and type(v) not in (kinds[k].type, int)
        ):
            raise TypeError(f"{wrong[0]} is {config[wrong[0]]!r}")
        if config["seq_len"] < 1:
            raise ValueError(f"seq_len is {config['seq_len']}")
        return TrainConfig(**config)
    except (TypeError, ValueError, AttributeError) as e:
        die(
            f"this checkpoint's settings are of another version: {e}",
            "train again, or check out the version that wrote it",
        )


def method_of(state):
    """(module, Settings) of the method a checkpoint was trained with, (None, None) without one."""
    kept = state.get("method")
    if not kept:
        return None, None
    try:
        method = methods.load(kept["name"])
        return method, methods.settings_of(method, kept["settings"])
    except (AttributeError, TypeError, ValueError, KeyError) as e:
        die(
            f"this checkpoint's method is of another version: {said(e)}",
            "train again, or check out the version that wrote it",
        )


def noise_name(run):
    """
    What a run's noise is called: its process, with its method if it has one; the method alone where that
    brings the process.
    """
    if hasattr(methods.load(run.method), "process"):
        return run.method
    return f"{run.process} ({run.method})" if run.method else run.process


def check_parameters(source, cfg, vocab_size, weights, method=None, settings=None):
    """
    Two lines if the settings cfg are of a network of far more numbers than the weights that are meant for it:
    before it is built, which may take all memory. Where less is wrong, load_state says what.
    """
    make = getattr(method, "network", lambda model_cfg, settings: Transformer(model_cfg))
    try:
        with torch.device("meta"):  # where it takes no memory
            model = make(checkpoint.network_config(cfg, Masked(vocab_size, 0), vocab_size), settings)
    except Exception:  # odd settings, of which `build` says more; or a network that cannot be made there
        return
    wanted = sum(p.numel() for p in model.parameters())
    have = sum(w.numel() for w in weights.values() if torch.is_tensor(w))
    if wanted > 2 * have + 1000:
        die(
            f"{source}: its weights do not fit its settings: {have:,} numbers, for a network of {wanted:,}",
            "another checkpoint",
        )


def restore(ckpt, device, plain=False, flag="--ckpt", *changes):
    """rebuild(ckpt, device) by the name of a device, which it prints first. flag: what named ckpt."""
    state = checkpoint.load(ckpt, flag)
    device, why = pick_device(device)
    print(f"{device} ({why}), {runs_on(device)}{', as the lesson stands' * plain}")
    return rebuild(ckpt, device, state, plain, *changes)


def rebuild(ckpt, device, state=None, plain=False, weights="", rope_factor=1.0, seq_len=0):
    """
    (settings, dataset facts, step, model with EMA weights on the device, process) of a run's out_dir, ready
    to sample. plain: the lesson as it stands; else what fast/ gives for it, and a line where that is the
    lesson after all. weights: int8 or int4, see run/rounding.py. rope_factor, seq_len: see stretch.
    """
    state = state or checkpoint.load(ckpt)
    run = trained_with(state)
    if weights:
        if weights not in rounding.BITS:
            die(f"weights {weights!r} are none of {', '.join(rounding.BITS)}", "--weights int8")
        state = {**state, "ema": rounding.rounded(state["ema"], rounding.BITS[weights])}
    method, settings = method_of(state)
    vocab_size = check_meta(state["meta"], ckpt)["vocab_size"]
    if "network" not in state:
        check_parameters(ckpt, run, vocab_size, state["ema"], method, settings)
    model, process = checkpoint.build(
        run, vocab_size, state.get("network"), method, settings, state.get("process")
    )
    load_state(ckpt, {"weights": state["ema"]}, weights=model)
    model.eval()
    stretch(model, run, rope_factor, seq_len)
    if not plain:
        model, process, notes = fast.accelerate(model, process)
        for note in notes:
            print(note)
    with torch.no_grad():
        first = torch.zeros(1, 1, dtype=torch.long)
        if not model(first, first, 1, start=int(run.seq_len > 1)).isfinite().all():
            die(
                f"{ckpt}: the network has diverged, its logits are not finite",
                f"--ckpt {Path(ckpt) / 'best.pt'}, or train with a lower --lr",
            )
    return run, state["meta"], state["step"], model.to(device), process


def stretch(model, run, rope_factor, seq_len):
    """
    A longer context than a network was trained with: seq_len tokens, 0 for as many as before. rope_factor
    multiplies the base of its rotary positions (NTK-aware scaling; LongLLaDA, arXiv 2506.14429): the slow
    angles turn slower, so that far tokens look as near ones did in training; the fast ones hardly change.
    """
    if not 0 < rope_factor < math.inf:
        die(f"rope_factor cannot be {rope_factor:g}", "--rope_factor 2")
    if seq_len and (seq_len < run.seq_len or any(seq_len % b for b in run.block_sizes)):
        sizes = ", ".join(map(str, sorted(run.block_sizes)))
        problem = f"seq_len {seq_len} is not above the trained {run.seq_len} and made of blocks of {sizes}"
        die(problem, f"--seq_len {2 * run.seq_len}")
    run.seq_len = seq_len or run.seq_len
    model.cfg = replace(model.cfg, rope_base=model.cfg.rope_base * rope_factor, seq_len=run.seq_len)


def dataset_for(ckpt, run, meta, model, name=""):
    """
    The Dataset a checkpoint is evaluated on: the one of its run, or another in the same tokens. Its rows may
    be shorter than the context, which then ends where they do, in run and model too. Exits with two lines if
    they do not fit.
    """
    published, name = checkpoint.is_foreign(ckpt), name or run.dataset
    if not published and name == run.dataset:
        data = Dataset(name, run.seq_len)
        data.same_as(meta)
        return data
    path = Path("data") / name / "meta.json"
    data = Dataset(name, 0 if path.exists() and read_meta(path).get("row_len") else run.seq_len)
    data.same_as(meta, only_tokens=True)
    if data.seq_len > run.seq_len or any(data.seq_len % b for b in run.block_sizes if b < run.seq_len):
        sizes = ", ".join(map(str, sorted(run.block_sizes)))
        die(
            f"{name} has rows of {data.seq_len} tokens, "
            f"{ckpt} a context of {run.seq_len} and blocks of {sizes}",
            "--dataset of other rows",
        )
    if run.next_token and not data.given:
        die(
            f"{ckpt} says nothing of a text's first token, and {name} gives it none",
            "--dataset NAME, of one with a bos_id",
        )
    if data.seq_len < run.seq_len:
        model.cfg, run.seq_len = replace(model.cfg, seq_len=data.seq_len), data.seq_len
        run.block_sizes = {min(b, data.seq_len): w for b, w in run.block_sizes.items()}
    return data


def same_tokens(dataset, state, source):
    """The facts of a dataset; two lines unless it is in the tokens of a checkpoint."""
    meta, theirs = read_meta(Path("data") / dataset / "meta.json"), check_meta(state["meta"], source)
    fits = (
        meta["vocab_size"] == theirs["vocab_size"]
        or "network" in state
        and meta["vocab_size"] < theirs["vocab_size"]
    )
    if (meta["tokenizer"], meta.get("chars")) != (theirs["tokenizer"], theirs.get("chars")) or not fits:
        ours = f"{meta['tokenizer']}, {meta['vocab_size']} ids"
        other = f"{ours}, not {theirs['tokenizer']}, {theirs['vocab_size']}"
        die(
            f"{dataset} is not in the tokens of {source}: {other}",
            "--dataset=NAME, of one in the same tokens",
        )
    return meta


def begin_from(cfg, settings=None, method=None, asked=()):
    """
    (weights, None when resuming; facts) for train, of the checkpoint or the published weights cfg.init_from,
    or of the run that is resumed.
    asked: the settings that somebody chose. They win where the weights can follow; the others become what
        they were there, in cfg.
    Exits with two lines where they cannot, or where the data is in other tokens.
    """
    resume = cfg.resume and not checkpoint.begun(cfg.out_dir)
    if os.path.realpath(cfg.out_dir) == os.path.realpath(cfg.init_from):
        die(f"{cfg.out_dir} holds what the run is to begin from", "another --out_dir")
    source = cfg.out_dir if resume else cfg.init_from
    by_method = method is not None and "init_from" not in asked  # a method whose --ckpt is where it begins
    begin_by = "--ckpt" if by_method else "--init_from"
    state = checkpoint.load(source, "--out_dir" if resume else begin_by)
    run = trained_with(state)
    inherited = getattr(method, "INHERITS", ())
    may_change = {
        "dataset",
        "seq_len",
        "block_sizes",
        "objective",
        "schedule",
        "clean_padding",
        "predicts",
        "method",
        *inherited,
    }
    if run.next_token:  # it may learn to read noise: the same layers get a noisy stream
        may_change |= {"next_token", "clean_causal"}
    for name in (*SHAPES, "block_sizes", "objective", "schedule", "clean_padding", *inherited):
        mine, theirs = getattr(cfg, name), getattr(run, name)
        if name == "method":
            continue  # the weights may go on under another, or none
        if name not in asked:
            setattr(cfg, name, theirs)
        elif name not in may_change and mine != theirs:
            die(f"{source} has {name} {theirs}, not {mine}", f"leave --{name} out")
    if "next_token" not in asked and set(cfg.block_sizes) != {1}:
        cfg.next_token = False  # blocks are asked for: they have a noisy stream
    cfg.__post_init__()
    if hasattr(method, "begin"):
        method.begin(settings, state)
    if hasattr(method, "check"):
        method.check(cfg, settings)
    if cfg.predicts != run.predicts:
        die(
            f"{source} predicts {run.predicts}, and {cfg.objective} teaches another output",
            f"--objective={run.objective}",
        )
    meta = same_tokens(cfg.dataset, state, source)
    if meta.get("row_len") and "seq_len" not in asked:
        cfg.seq_len = 0  # the rows say how long they are
    if "network" not in state:
        check_parameters(source, cfg, meta["vocab_size"], state["ema"])  # a method may add to them
    if os.environ.get("RANK", "0") == "0":
        print(f"from {source}: " + shown(", ".join(f"{name} {getattr(cfg, name)}" for name in SHAPES)))
    streams = {"next_token": cfg.next_token, "clean_causal": cfg.clean_causal}
    facts = {"network": {**state["network"], **streams}} if "network" in state else {}
    if run.method != cfg.method:
        facts["whose"] = run.method, cfg.method
    if "process" in state and not hasattr(method, "process"):
        # what the weights have learned to read: the settings do not say all of it
        facts["noise"] = state["process"]
    # published weights may be rounded; training goes on in float32
    wide = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in state["ema"].items()}
    return None if resume else wide, facts


def compare(state, cfg, settings, method, data, world, say):
    """
    Resuming: list what changed since the checkpoint; refuse what its weights cannot follow; keep the rows of
        a step.
    """
    old = asdict(trained_with(state))
    data.same_as(check_meta(state["meta"], cfg.out_dir))
    try:
        rows, given, skipped = (
            int(state["rows"]),
            [int(n) for n in state["given"]],
            [int(n) for n in state["skipped"]],
        )
        if rows < 1 or len(given) != 2 or len(skipped) != 2 or type(state["owed"]) is not bool:
            raise ValueError(f"rows {rows}, given {given}, skipped {skipped}, owed {state['owed']}")
    except (KeyError, ValueError, TypeError) as e:
        die(
            f"{cfg.out_dir}: a checkpoint to sample from, not to go on with: {said(e)}",
            "train again, or the version that wrote it",
        )
    if [cfg.batch_size, cfg.accumulation] == given and cfg.batch_size * cfg.accumulation * world != rows:
        if rows % world:
            near = max(n for n in range(1, world) if rows % n == 0)
            die(
                f"the {rows} rows of a step do not divide by {world} processes",
                f"--nproc_per_node={near}, or give --batch_size anew",
            )
        cfg.batch_size = max(b for b in range(1, cfg.batch_size + 1) if rows // world % b == 0)
        cfg.accumulation = rows // world // cfg.batch_size
        say(
            f"{world} process(es) now: --batch_size={cfg.batch_size} --accumulation={cfg.accumulation} "
            f"keep the {rows} rows of a step"
        )
    for name, value in asdict(cfg).items():
        if name in SHAPES and old[name] != value:
            fix = f"--objective={old['objective']}" if name == "predicts" else f"--{name}={old[name]}"
            die(
                f"{cfg.out_dir}/ckpt.pt was trained with {name} {old[name] or 'none'}, not {value or 'none'}",
                f"{fix}, or another --out_dir",
            )
        if name not in ("resume", "out_dir") and old[name] != value:
            say(shown(f"changed since the checkpoint: {name} {old[name]} -> {value}"))
    method_of(state)  # two lines where it is none
    before, now = state.get("method", {}).get("settings", {}), {} if settings is None else asdict(settings)
    for name, value in now.items():
        if name in before and before[name] != value:
            if name in getattr(method, "FIXED", ()):
                die(
                    f"{cfg.out_dir} was trained with {name} {before[name]}, not {value}",
                    f"--{name}={before[name]}, or another --out_dir",
                )
            say(shown(f"changed since the checkpoint: {name} {before[name]} -> {value}"))
    if (now := cfg.batch_size * cfg.accumulation * world) != rows:
        say(f"changed since the checkpoint: rows of a step {rows} -> {now}")


def load_state(ckpt, state, whose=None, **parts):
    """
    Load the parts of a checkpoint of the same names; two lines if they do not fit.
    whose: (the method whose network was saved, the one whose network is here), if they differ; "" is none.
    """
    try:
        for name, part in parts.items():
            saved = state[name]
            if name == "optimizer":
                each = {}
                for i, p in enumerate(p for group in part.param_groups for p in group["params"]):
                    shapes = {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                    # the fused step would not look
                    if {k: v.shape for k, v in saved["state"][i].items()} != shapes:
                        raise ValueError(f"parameter {i} has other moments")
                    each[i] = {k: machine.share(v.float(), p) for k, v in saved["state"][i].items()}
                saved = {"state": each, "param_groups": part.state_dict()["param_groups"]}
            module = isinstance(part, torch.nn.Module)  # not an optimizer, nor a method's Learner
            # see checkpoint.build: it becomes what was saved
            empty = module and next(part.parameters()).is_meta
            part.load_state_dict(saved, **({"assign": True} if empty else {}))
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as e:
        if whose:
            saved, here = (f"--method={m}" if m else "no method" for m in whose)
            fix = saved if whose[0] else "leave --method out"
            die(f"{ckpt} holds the network of {saved}, not of {here}", f"{fix}, with --init_from={ckpt}")
        die(f"{ckpt}: its {name} does not fit its settings: {said(e)}", f"train again: --out_dir={ckpt}")
