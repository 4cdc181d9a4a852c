"""
How are others' weights read? The public BlockGen, MDLM, Duo, AR and BD3-LM layouts become checkpoints of
ours, to sample, judge or go on from.

    python sample.py --init_from hf:jdeschena/blockgen/blockgen/multi_block_size/16/owt/0.05_0.95/absorb
    --max_new_tokens 64
    python sample.py --init_from hf:kuleshov-group/bd3lm-owt-block_size16 --max_new_tokens 64
    python sample.py --init_from DIR     a local copy: config.json and model.safetensors, or a Lightning .ckpt
                                         beside a config.json
"""

import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hub import exported, llama, lora  # noqa: F401  their readers come first
from hub.download import fetch, url
from model import ModelConfig, Transformer
from options import TrainConfig
from run import checkpoint
from run.cli import die, said

LAYOUTS = (
    "hf:OWNER/REPO/SUBFOLDER or a folder with config.json and model.safetensors, "
    "its path ending as in the BlockGen collection:\n"
    "baselines/DATA/{ar,mdlm,duo}, blockgen/single_block_size/B/DATA/{absorb,uniform}, "
    "blockgen/multi_block_size/B/DATA/WEIGHTS/{absorb,uniform};\n"
    'or with "process" (one of these last names) and "block_sizes" ({"1": 0.05, "16": 0.95}) in config.json'
)
NOISE = {"ar": "masked", "mdlm": "masked", "duo": "uniform", "absorb": "masked", "uniform": "uniform"}
# by the tokens a vocabulary has, the mask or the padding besides: what a dataset's meta.json would say
TOKENIZERS = {
    50257: ("openwebtext", {"vocab_size": 50257, "tokenizer": "gpt2", "bos_id": 50256}),
    49152: (
        "tinygsm",
        {"vocab_size": 49152, "tokenizer": "smollm", "bos_id": 0, "eos_id": 0, "prompt_end": "\\n"},
    ),
    30522: ("lm1b", {"vocab_size": 30522, "tokenizer": "bert", "bos_id": 101, "eos_id": 102, "pad_id": 0}),
}
LARGEST = 16 << 20  # bytes of a config.json
BERT_MASK = 103  # the one of these tokenizers that has a mask of its own


def is_published(path):
    """Are these published weights, and not a run of ours?"""
    path = str(path)
    if path.startswith(("hf:", "http://", "https://")) or path.endswith((".safetensors", ".ckpt")):
        return True
    return any(
        os.path.isfile(f"{path}/{name}") for name in ("config.json", "model.safetensors")
    ) and not os.path.exists(f"{path}/ckpt.pt")


def place(spec):
    """A name in out/ for what is made of published weights: the last parts of their path."""
    return "out/" + "_".join(
        [part for part in re.split("[/:@]+", str(spec).removeprefix("hf:")) if part][-6:]
    )


def published(spec, flag="--init_from"):
    """
    A dict as checkpoint.load gives it, of published weights: the EMA ones. spec: see LAYOUTS; or
    https://HOST/FOLDER, a .safetensors or a Lightning .ckpt file beside its config.json. Which noise, block
    sizes, mask and tokenizer: as config.json and the path say. "network" in the dict says what the network is
    (model.ModelConfig), in place of the settings of a training run. Exits with two lines if something is
    lacking.
    """
    spec = str(spec)
    if spec.startswith(("hf:", "http://", "https://")):
        base = address_of(spec, flag)[1]
        folder = llama.downloaded(base, fetch(f"{base}/config.json", f"{flag} DIR"), flag)
        if folder is not None:
            return llama.llama(folder, flag, spec)
    where, config_file, weights_file = files_of(spec, flag)
    config = of_the_hub(read_config(config_file), config_file)
    weights = {k: v for k, v in read_weights(weights_file).items() if not k.startswith("sampling_eps_")}
    network, state = network_of(config, weights, where)
    process, sizes = how_trained(config, where, network)
    V, masked = network.vocab_size, NOISE[process] == "masked"
    # by the tokens there are, or one more: the mask behind them, or for uniform noise the padding that the
    # public code adds
    name, meta = (
        TOKENIZERS.get(V)
        or TOKENIZERS.get(V - 1)
        or (Path(where).name, {"tokenizer": "none", "vocab_size": V})
    )
    mask_id = None
    if masked:
        mask_id = whole(
            config, "mask_index", BERT_MASK if meta["tokenizer"] == "bert" else V - 1, 0, V - 1, where
        )
        if mask_id == V - 1:
            meta = {**meta, "vocab_size": min(meta["vocab_size"], V - 1)}
        if mask_id in [meta.get("bos_id"), meta.get("eos_id")]:
            die(
                f"{where}: {V} ids are those of {meta['tokenizer']}, without room for a mask",
                "mask_index in config.json",
            )
    # BlockDiTs are known by their shape, and this is a DiT as Duo's is: but the public code feeds it sigma =
    # 0
    if process == "mdlm":
        network = replace(network, zero_sigma=True)
    settings = TrainConfig(
        dataset=name,
        process=NOISE[process],
        block_sizes=sizes,
        objective="elbo" if process in ("mdlm", "duo", "uniform") and set(sizes) != {1} else "ce",
        time_conditioning=str(network.time_conditioning and not network.zero_sigma).lower(),
        random_ar=not masked,
        clean_causal=network.clean_causal,
        clean_padding="pad_id" in meta,
        next_token=network.next_token,
        seq_len=network.seq_len,
        n_layers=network.n_layers,
        n_heads=network.n_heads,
        d_model=network.d_model,
    )
    noise = {"class": "Masked", "arguments": {"vocab_size": V, "mask_id": mask_id}}
    if not masked:
        noise = {
            "class": "Uniform",
            "arguments": {"vocab_size": V, "predicts": settings.predicts, "ar_token": None},
        }
    facts = {"network": asdict(network), "process": noise, "version": checkpoint.VERSION}
    return {"model": state, "ema": state, "config": asdict(settings), "meta": meta, "step": 0, **facts}


def address_of(spec, flag):
    """(what the path says, the address of the folder) of hf:OWNER/REPO/SUBFOLDER, or of an address."""
    if not spec.startswith("hf:"):
        return spec, spec.rstrip("/")
    owner, _, rest = spec[3:].strip("/").partition("/")
    repo, _, where = rest.partition("/")
    if not owner or not repo:
        die(f"{spec!r} names no repository", f"{flag} hf:jdeschena/blockgen/baselines/owt/mdlm")
    return where or repo, url(f"{owner}/{repo}", where).rstrip("/")


def files_of(spec, flag):
    """(what the path says, config.json, weights), downloaded if they are not local."""
    if spec.startswith(("hf:", "http://", "https://")):
        where, base = address_of(spec, flag)
        return where, *(
            fetch(f"{base}/{file}", f"{flag} DIR") for file in ("config.json", "model.safetensors")
        )
    path = Path(spec)
    folder = path if path.is_dir() else path.parent
    found = (
        [path]
        if path.is_file()
        else [f for f in (folder / "model.safetensors", *sorted(folder.glob("*.ckpt"))) if f.is_file()]
    )
    if not found or not (folder / "config.json").is_file():
        die(
            f"{spec}: no {'config.json' if found else 'model.safetensors or .ckpt'} there",
            f"{flag} {LAYOUTS}",
        )
    return str(folder.absolute()), folder / "config.json", found[0]


def read_config(file):
    """The model's settings in a config.json; a whole Hydra tree is looked through for them."""
    try:
        if (size := os.path.getsize(file)) > LARGEST:
            raise ValueError(f"{size:,} bytes of settings")
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        algo = {
            theirs: config["algo"][k]
            for k, theirs in (("name", "process"), ("block_weights",) * 2)
            if k in config.get("algo", {})
        }
        return {k.removeprefix("cfg."): v for k, v in config.get("model", config).items()} | algo
    except (ValueError, OSError, AttributeError, TypeError, RecursionError) as e:
        die(f"{file}: {said(e)}", "the config.json of the model: hidden_size, n_heads, n_blocks, length, ...")


def of_the_hub(config, file):
    """
    The settings in BlockGen's words, if MDLM's or BD3-LM's own code wrote them (kuleshov-group/mdlm-owt,
    bd3lm-owt-block_size16). BD3-LM with cross_attn is a BlockDiT with a block-causal clean stream.
    """
    kind = config.get("model_type")
    if kind not in ("mdlm", "bd3lm"):
        return config
    if config.get("time_conditioning") or config.get("causal"):
        die(f"{file}: {kind} with time_conditioning or causal attention is not read", "another checkpoint")
    words = {"hidden_dim": "hidden_size", "model_length": "length"}
    ours = {"cond_dim": 129} | {words.get(k, k): v for k, v in config.items()}
    if kind == "mdlm" or not config.get("cross_attn", True):
        return ours | {"type": "dit", "process": "mdlm"}
    size = whole(config, "block_size", 1, 1, 1 << 24, file)
    return ours | {"type": "block-dit", "x0_causal": False, "process": "absorb", "block_sizes": {size: 1.0}}


class Inert:
    """
    What stands for anything of a Lightning checkpoint that is not a number, a tensor, a list or a dict:
    nothing of it is run.
    """

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __setstate__(self, _):
        pass


def read_weights(file):
    """
    name -> tensor: of a .safetensors file, or of a Lightning checkpoint the averaged (EMA) weights if there
    are any.
    """
    try:
        if str(file).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(file)
        checkpoint.check_archive(file)
        strangers = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals([(Inert, name) for name in strangers]):
            state = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint.check_tensors(state, file)
        # besides the network it may hold a teacher, of Duo's distillation
        weights = state.get("state_dict", state)
        weights = {k: v for k, v in weights.items() if not k.startswith("teacher") and torch.is_tensor(v)}
        shadows = (state.get("ema") or {}).get("shadow_params")
        # torch_ema's list, in the order of parameters(), which is that of the state dict without its buffers
        if shadows is not None:
            names = [k for k in weights if not k.endswith("rotary_emb.inv_freq")]
            if [tuple(weights[k].shape) for k in names] != [tuple(v.shape) for v in shadows]:
                raise ValueError(
                    f"{len(shadows)} averaged tensors do not fit the {len(names)} of the state dict"
                )
            weights |= dict(zip(names, shadows, strict=True))
        return weights
    except MemoryError:
        raise
    except Exception as e:  # a damaged file fails in many ways
        # torch's own words before it are about its version
        reason = str(e).rpartition("WeightsUnpickler error:")[2]
        die(
            f"{file} is damaged, or no file of weights: {said(ValueError(reason) if reason else e)}",
            "model.safetensors, or another copy",
        )


def whole(config, key, default, low, high, where):
    """A whole number of config.json, low to high; two lines for anything else."""
    value = config.get(key, default)
    if type(value) is float and value.is_integer() and abs(value) < 1e9:
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        die(
            f"{where}: {key} in config.json is {str(value)[:40]!r}, "
            f"not a whole number from {low} to {high:,}",
            "the config.json of these weights",
        )
    return value


def from_reference(weights, cfg):
    """
    A Transformer from the state dict of the public BlockGen / Duo code and its settings, see `translated`.
    Raises RuntimeError, naming them, for weights that are missing or left over.
    """
    ours, state = translated(weights, cfg)
    with torch.device("meta"):  # no time for initial weights that nobody will see
        model = Transformer(ours)
    model.load_state_dict(state, assign=True)
    return model


def translated(weights, cfg):
    """
    (ModelConfig, state dict) in our words.
    weights: name -> array or tensor; prefixes `w.`, `backbone.`, `_orig_mod.` are dropped,
        `rotary_emb.inv_freq` is implied.
    cfg: hidden_size, n_heads, n_blocks, length, and cond_dim, mlp_ratio, x0_causal, rope_base where they
        differ from the published ones (with or without `cfg.` in front). With type block-dit, or without a
        type and with x0_causal, it is a BlockDiT, which conditions both streams on sigma; else a DiT of one
        stream: full diffusion, or without adaLN the causal next-token one. The vocabulary and adaLN are as
        the weights say.
    Raises KeyError for a setting or a weight without which nothing can be said.
    """
    cfg = {k.removeprefix("cfg."): v for k, v in cfg.items()}
    names = {}
    for name, value in weights.items():
        for prefix in ("w.", "backbone."):
            name = name.removeprefix(prefix)
        names[name.replace("_orig_mod.", "")] = torch.as_tensor(value)
    names.pop("rotary_emb.inv_freq", None)
    timed = "sigma_map.mlp.0.weight" in names
    block_dit = is_block_dit(cfg)
    ours = ModelConfig(
        vocab_size=names["vocab_embed.embedding"].size(0),
        seq_len=int(cfg["length"]),
        n_layers=int(cfg["n_blocks"]),
        n_heads=int(cfg["n_heads"]),
        d_model=int(cfg["hidden_size"]),
        mlp_ratio=int(cfg.get("mlp_ratio", 4)),
        clean_causal=bool(cfg.get("x0_causal", False)) if block_dit else True,
        time_conditioning=timed,
        condition_clean=timed and block_dit,
        zero_sigma=timed and block_dit,
        cond_dim=int(cfg.get("cond_dim", 128)),
        rope_base=float(cfg.get("rope_base", 10000)),
        next_token=not timed and not block_dit,
    )
    theirs_to_ours = {
        "vocab_embed.embedding": "embed.weight",
        "output_layer.norm_final": "norm",
        "output_layer.linear": "head",
        "output_layer.adaLN_modulation": "modulation",
        "sigma_map.mlp": "time",
        "blocks": "layers",
        "attn_qkv": "qkv",
        "attn_out": "out",
        "adaLN_modulation": "modulation",
    }
    state = {}
    for name, value in names.items():
        for old, new in theirs_to_ours.items():
            name = name.replace(old, new)
        state[name] = value
    return ours, state


def is_block_dit(cfg):
    """Two streams? type says so; without it, x0_causal, which only a BlockDiT has."""
    return cfg["type"] == "block-dit" if "type" in cfg else "x0_causal" in cfg


def network_of(config, weights, where):
    """
    (ModelConfig, state dict) of the public layouts; two lines that say what was expected, and what was found,
    for anything else.
    """
    expected = (
        "hidden_size, n_heads, n_blocks, length in config.json; "
        "vocab_embed, blocks.i, output_layer (and sigma_map) in the weights"
    )
    numbers = {
        "hidden_size": (1, 0),
        "n_heads": (1, 0),
        "n_blocks": (1, 0),
        "length": (2, 0),
        "cond_dim": (1, 128),
        "mlp_ratio": (1, 4),
    }
    try:
        if lacking := [key for key in ("hidden_size", "n_heads", "n_blocks", "length") if key not in config]:
            raise ValueError(f"no {', '.join(lacking)} in config.json")
        config = {
            **config,
            **{key: whole(config, key, usual, low, 1 << 24, where) for key, (low, usual) in numbers.items()},
        }
        if config.get("type", "dit") not in ("dit", "ddit", "block-dit"):
            raise ValueError(f"type {config['type']!r}, not dit or block-dit")
        if config.get("x0_causal", 0) not in (0, 1):
            raise ValueError(f"x0_causal is {config['x0_causal']!r}, not true or false")
        if (n := len({k.split("blocks.")[1].split(".")[0] for k in weights if "blocks." in k})) != config[
            "n_blocks"
        ]:
            raise ValueError(f"n_blocks is {config['n_blocks']}, and there are weights of {n}")
        network, state = translated(weights, config)
        with torch.device("meta"):
            wanted = {k: tuple(v.shape) for k, v in Transformer(network).state_dict().items()}
        found = {k: tuple(v.shape) for k, v in state.items()}
        if lacking := sorted(set(wanted) - set(found)):
            raise ValueError(
                f"{len(lacking)} tensors are missing, {lacking[0]} {wanted[lacking[0]]} among them"
            )
        if left := sorted(set(found) - set(wanted)):
            raise ValueError(f"{len(left)} tensors are left over, {left[0]} {found[left[0]]} among them")
        if odd := [k for k in wanted if wanted[k] != found[k]]:
            raise ValueError(f"{odd[0]} is {found[odd[0]]}, expected {wanted[odd[0]]}")
        if odd := [k for k, v in state.items() if not v.is_floating_point() or not v.isfinite().all()]:
            raise ValueError(f"{odd[0]} holds {str(state[odd[0]].dtype)[6:]} or what is not finite")
        half = network.d_model // network.n_heads // 2
        for k, v in weights.items():  # implied, but its length is what shows a wrong number of heads
            if k.endswith("rotary_emb.inv_freq") and v.shape != (half,):
                raise ValueError(f"{k} {tuple(v.shape)} is not that of {network.n_heads} heads of {2 * half}")
        # a copy: tensors in a mapped file begin anywhere, and a CPU multiplies ten times slower from there
        # (docs/log.md)
        return network, {k: v.to(torch.float32, copy=True) for k, v in state.items()}
    except (
        LookupError,
        ValueError,
        TypeError,
        AssertionError,
        ArithmeticError,
        RuntimeError,
        NotImplementedError,
    ) as e:
        few = ", ".join(sorted(weights)[:3])
        die(
            f"{where}: an unknown layout: {said(e)}; found {', '.join(sorted(config))} "
            f"and {len(weights)} tensors: {few}, ...",
            expected,
        )


def how_trained(config, where, network):
    """(one of NOISE, {block size: weight}) as config.json says, or else the path."""
    parts = [p for p in re.split(r"[/\\]", where) if p]
    name = (
        str(config.get("process", parts[-1] if parts else "")).removeprefix("blockgen-").removesuffix("_base")
    )
    if name not in NOISE:
        die(
            f"{where}: nothing says which noise it was trained with: {name!r} is none of {', '.join(NOISE)}",
            LAYOUTS,
        )
    block_dit = is_block_dit(config)
    if (
        (name == "ar") != network.next_token
        or (name in ("absorb", "uniform")) != block_dit
        and "process" not in config
    ):
        shape = (
            "a BlockDiT"
            if block_dit
            else "a causal transformer"
            if network.next_token
            else "a DiT with adaLN"
        )
        die(
            f"{where} says {name}, and config.json and the weights say {shape}",
            "the config.json of these weights, with type and x0_causal",
        )
    sizes = config.get("block_sizes")
    path = re.search(r"(single|multi)_block_size/(\d+)/[^/]+/(?:([^/]+)/)?[^/]+$", "/".join(parts))
    try:
        if sizes is None and "block_weights" in config:
            sizes = {
                2**i: float(w) for i, w in enumerate(str(config["block_weights"]).split()) if float(w) > 0
            }
        elif sizes is None and network.next_token:
            sizes = {1: 1.0}
        elif sizes is None and (name in ("mdlm", "duo") or config.get("type") in ("dit", "ddit")):
            sizes = {network.seq_len: 1.0}
        elif sizes is None and path and path[1] == "single":
            sizes = {int(path[2]): 1.0}
        elif sizes is None and path and path[3] == "uniform":
            powers = [2**i for i in range(int(path[2]).bit_length())]
            sizes = {b: 1 / len(powers) for b in powers}
        elif sizes is None and path:
            first, last = path[3].split("_")
            sizes = {1: float(first), int(path[2]): float(last)}
        sizes = {int(b): float(w) for b, w in sizes.items()}
    except (ValueError, AttributeError, TypeError, OverflowError):  # sizes None: nobody said anything
        die(f"{where}: nothing says which block sizes it was trained with", LAYOUTS)
    if odd := [b for b in sizes if b < 1 or network.seq_len % b] or (
        [path[2]] if path and max(sizes) != int(path[2]) else []
    ):
        die(f"{where}: block size {odd[0]} does not go into {network.seq_len} tokens as it should", LAYOUTS)
    return name, sizes


checkpoint.READERS.append((is_published, published))
