"""
How do others load our networks? A checkpoint becomes a folder in a layout that is known.

    python -m hub.export --ckpt out/run --to FOLDER

    network                                 layout                               who loads it
    next-token Llama, Qwen2, Qwen3,         LlamaForCausalLM, Qwen2..., Qwen3...,
    Ministral 3                             Ministral3...                        transformers as it is
    block-causal, with norms of q and k     SDARForCausalLM                      SGLang, and SDAR's own code
    block-causal, without them              a2d-llama, a2d-qwen2                 dLLM
    shifted and block-causal, with biases   Fast_dLLM_QwenForCausalLM            Fast-dLLM's code
    trimode                                 NemotronLabsDiffusionModel           NVIDIA's own code
    the network of model.py                 modeling_nanoblock.py                transformers, by that code
    adapters of --method adapt              LoRA                                 PEFT, beside the base

sample.py, eval.py and train.py read each of them back: --init_from FOLDER. docs/hub.md says more.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python hub/export.py works too
import hub.published  # noqa: F401  --init_from hf:...
from data.bpe import LETTER_OF
from hub import lora
from hub.llama import ENCODER, HUGGING_FACE, TRIMODE, renamed
from methods.adapt import Adapted
from methods.llama import Llama
from methods.shifted import Shifted
from methods.trimode import Trimode
from model import Transformer
from run import checkpoint
from run.cli import die, load_config
from run.machine import guard
from run.restore import rebuild, trained_with

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
THEIR_NAMES = {ours: theirs for theirs, ours in HUGGING_FACE.items()}


@dataclass
class ExportConfig:
    ckpt: str = "out/run"  # a training run's out_dir
    init_from: str = ""  # or published weights (hub/published.py)
    to: str = ""  # a folder that is not there yet
    dtype: str = "float32"  # of the weights: float32 or bfloat16
    license: str = "mit"  # for the card
    base_model: str = ""  # for the card: the model that training began from, OWNER/REPO


# ----- the layouts: (config.json, {name: tensor})


def their_name(name):
    """A tensor of methods/llama.py as transformers calls it."""
    first, _, rest = name.partition(".")
    if first != "layers":
        return THEIR_NAMES[f"{first}."] + rest
    i, part, last = rest.split(".")
    return f"model.layers.{i}.{THEIR_NAMES[f'{part}.']}{last}"


def causal(model, process):
    """A next-token network as transformers' own class. A mask behind the vocabulary is left out."""
    s = model.settings
    kind = "qwen3" if s.qk_norm else "qwen2" if s.qkv_bias else "ministral3" if s.rope_beta else "llama"
    extra = process.mask_id == model.cfg.vocab_size - 1
    config, weights = llama_config(model, kind, model.cfg.vocab_size - extra)
    config["architectures"] = [f"{kind.capitalize()}ForCausalLM"]
    return config, weights


def trimode(model, process, sizes):
    """A trimode network as NVIDIA released its own."""
    if len(sizes) != 2 or sizes[0] != 1:
        sizes = ", ".join(map(str, sizes))
        die(f"Nemotron-Labs-Diffusion has block size 1 and one larger, not {sizes}", "another --ckpt")
    if model.settings.qk_norm or model.settings.qkv_bias:
        die("a trimode network is Ministral 3's: no norms of q and k, no biases", "train without --qkv_bias")
    config, weights = llama_config(model, "ministral3", model.cfg.vocab_size)
    config |= {"model_type": TRIMODE, "architectures": ["NemotronLabsDiffusionModel"]}
    config |= {"mask_token_id": process.mask_id, "block_size": max(sizes), "dlm_paradigm": "block_diff"}
    words = {THEIR_NAMES[ours]: theirs for theirs, ours in ENCODER.items()}
    return config, {renamed(name, words): value for name, value in weights.items()}


def blocks(model, process, block_size):
    """A block-causal network in the layout of a release."""
    s = model.settings
    if isinstance(model, Shifted):
        if not s.qkv_bias:
            die(
                "a shifted network with a block-causal clean stream is Fast-dLLM's: it has biases",
                "--qkv_bias",
            )
        config, weights = llama_config(model, "qwen2", model.cfg.vocab_size)
        config |= {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"]}
        config["bd_size"] = block_size
    else:
        kind = "qwen3" if s.qk_norm else "qwen2" if s.qkv_bias else "llama"
        config, weights = llama_config(model, kind, model.cfg.vocab_size)
        name = {"qwen3": "SDARForCausalLM", "qwen2": "A2DQwen2LMHeadModel", "llama": "A2DLlamaLMHeadModel"}
        config |= {"model_type": "sdar" if kind == "qwen3" else f"a2d-{kind}", "architectures": [name[kind]]}
        config["block_size"] = block_size
    return config | {"mask_token_id": process.mask_id}, weights


def llama_config(model, kind, vocab_size):
    """config.json and the weights of methods/llama.py, with vocab_size rows."""
    cfg, s, layer = model.cfg, model.settings, model.layers[0]
    if s.qk_norm and s.qkv_bias:
        die("norms of q and k and biases together are no known model's", "train without --qkv_bias")
    config = {
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": layer.gate.out_features,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": layer.n_kv,
        "head_dim": layer.dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": s.norm_eps,
        "rope_theta": cfg.rope_base,
        "max_position_embeddings": cfg.seq_len,
        "tie_word_embeddings": s.tied,
    }
    rope = {"rope_type": "linear", "factor": s.rope_factor} if s.rope_factor != 1 else {}
    if s.rope_yarn:
        rope = {
            "rope_type": "yarn",
            "factor": s.rope_factor,
            "original_max_position_embeddings": s.rope_original,
            "beta_slow": s.rope_low,
            "beta_fast": s.rope_high,
            "attention_factor": s.rope_scale,
        }
    elif rope and s.rope_original:
        rope = {
            "rope_type": "llama3",
            "factor": s.rope_factor,
            "original_max_position_embeddings": s.rope_original,
            "low_freq_factor": s.rope_low,
            "high_freq_factor": s.rope_high,
        }
    if kind == "ministral3":
        rope = {"rope_type": "default", "original_max_position_embeddings": cfg.seq_len, **rope}
        rope |= {"rope_theta": cfg.rope_base, "llama_4_scaling_beta": s.rope_beta}
        rope |= {"original_max_position_embeddings": s.rope_original} if s.rope_original else {}
        config["rope_parameters"] = rope
    elif s.rope_beta:
        die(f"queries that grow (--rope_beta) are no {kind}'s", "train without --rope_beta")
    elif rope:
        config["rope_scaling"] = rope
    weights = model.merged()
    if s.tied:
        del weights["head.weight"]
    for name in {"embed.weight", "head.weight"} & set(weights):
        weights[name] = weights[name][:vocab_size]
    return config, {their_name(name): value for name, value in weights.items()}


def own(model, process, state):
    """Our own network: all that a checkpoint says of it, and model.py beside it."""
    config = {
        "model_type": "nanoblock",
        "architectures": ["NanoblockModel"],
        "auto_map": {
            "AutoConfig": "modeling_nanoblock.NanoblockConfig",
            "AutoModel": "modeling_nanoblock.NanoblockModel",
        },
        "network": asdict(model.cfg),
        "mask_token_id": process.mask_id,
        "block_sizes": {str(b): w for b, w in trained_with(state).block_sizes.items()},
        "nanoblock": {
            "config": {**state["config"], "block_sizes": list(state["config"]["block_sizes"].items())},
            "process": checkpoint.process_facts(process),
            "meta": state["meta"],
            "step": state["step"],
        },
    }
    return config, {f"network.{name}": value for name, value in model.state_dict().items()}


# ----- what lies beside the weights


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder, meta):
    """The tokenizer's files, and a line about it."""
    kind = meta["tokenizer"]
    if kind == "char" and all(ord(c) < 128 and len(c) == 1 for c in meta["chars"]):
        write_json(folder / "tokenizer.json", characters(meta["chars"]))
    elif kind in ("json", "smollm") and str(meta.get("file", "")).endswith(".json"):
        shutil.copyfile(meta["file"], folder / "tokenizer.json")
    else:
        other = {"gpt2": "openai-community/gpt2", "bert": "google-bert/bert-base-uncased"}
        other["smollm"] = "HuggingFaceTB/SmolLM-135M"
        return f"Its tokenizer is that of {other[kind]}." if kind in other else "It has no tokenizer: ids."
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return "Its tokenizer is in tokenizer.json."


def characters(chars):
    """A tokenizer.json of one id a character: bytes that nothing joins."""
    letters = {LETTER_OF[ord(c)]: i for i, c in enumerate(chars)}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": letters, "merges": []}
    parts = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": bytes_}
    return parts | {"post_processor": None, "decoder": bytes_, "model": model}


def results(out_dir):
    """Lines of a table: the last validation of a run."""
    records = [r for r in checkpoint.logged(out_dir) if "val" in r] if Path(out_dir).is_dir() else []
    if not records:
        return ["Nothing was measured."]
    lines = ["| block size | nats per token |", "| --- | --- |"]
    lines += [f"| {b} | {nats:.4f} |" for b, nats in records[-1]["val"].items()]
    return [
        *lines,
        "",
        f"Validation after {records[-1]['step']} steps. Above block size 1 these are upper bounds.",
    ]


def layout_of(config):
    """The name of a layout, from its config.json or adapter_config.json."""
    return "LoRA" if "peft_type" in config else config["architectures"][0]


def card(cfg, config, state, tokenizer):
    """README.md: what it is, in YAML and in words."""
    run, layout = trained_with(state), layout_of(config)
    library = "peft" if layout == "LoRA" else "transformers"
    head = [f"license: {cfg.license}", "pipeline_tag: text-generation", f"library_name: {library}"]
    head += [f"base_model: {cfg.base_model}"] if cfg.base_model else []
    head += ["tags:", "- nanoblock", *(["- diffusion"] if set(run.block_sizes) != {1} else [])]
    sizes = ", ".join(f"{b} ({w:g})" for b, w in sorted(run.block_sizes.items()))
    lines = [f"A network of nanoblock in the layout `{layout}`. {tokenizer}", "", f"- block sizes: {sizes}"]
    lines += [f"- noise: {run.process}, mask {config.get('mask_token_id')}"] if not run.next_token else []
    lines += [f"- {run.n_layers} layers of width {run.d_model}, a context of {run.seq_len} tokens", ""]
    lines += ["    python sample.py --init_from FOLDER", "", "## Results", "", *results(cfg.ckpt)]
    return "\n".join(["---", *head, "---", "", f"# {Path(cfg.to).name}", "", *lines]) + "\n"


def export(cfg, state):
    """Write the folder. Returns config.json."""
    from safetensors.torch import save_file

    run, meta, _, model, process = rebuild(cfg.init_from or cfg.ckpt, torch.device("cpu"), state, plain=True)
    folder = Path(cfg.to)
    if isinstance(model, Adapted):
        folder.mkdir(parents=True)
        config = lora.write(folder, model, state, cfg.base_model, DTYPES[cfg.dtype])
        (folder / "README.md").write_text(
            card(cfg, config, state, write_tokenizer(folder, meta)), encoding="utf-8"
        )
        return config
    if type(model) is Transformer:
        config, weights = own(model, process, state)
    elif type(model) not in (Llama, Shifted, Trimode):
        die(f"a network of the method {run.method} has no layout that others know", "another --ckpt")
    elif process.mask_id is None and not model.cfg.next_token:
        die(
            "others know block diffusion by masks alone, and this noise has none", "a run of --process masked"
        )
    elif type(model) is Trimode:
        config, weights = trimode(model, process, sorted(run.block_sizes))
    elif model.cfg.next_token:
        config, weights = causal(model, process)
    elif model.cfg.clean_causal:
        problem = "a Llama with two streams and a token-causal clean stream has no layout that others know"
        die(problem, "a run with --clean_causal false, or with --next_token")
    else:
        config, weights = blocks(model, process, max(run.block_sizes))
    ends = meta.get("eos_ids") or ([meta["eos_id"]] if "eos_id" in meta else [])
    config |= {"torch_dtype": cfg.dtype} | ({"eos_token_id": ends if ends[1:] else ends[0]} if ends else {})
    folder.mkdir(parents=True)
    # a copy each: slices and tied tensors may not share memory in a file
    save_file({k: v.to(DTYPES[cfg.dtype], copy=True).contiguous() for k, v in weights.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {k: config[k] for k in ("eos_token_id",) if k in config})
    if type(model) is Transformer:
        wrapper = (ROOT / "hub/modeling_nanoblock.py").read_text(encoding="utf-8")
        wrapper = wrapper.replace("from model import", "from .nanoblock_model import")
        (folder / "modeling_nanoblock.py").write_text(wrapper, encoding="utf-8")
        shutil.copyfile(ROOT / "model.py", folder / "nanoblock_model.py")
    said_of_it = write_tokenizer(folder, meta)
    (folder / "README.md").write_text(card(cfg, config, state, said_of_it), encoding="utf-8")
    return config


@guard("another --to, on a disk with room")
def main():
    cfg = load_config(ExportConfig, sys.argv[1:])
    if not cfg.to or Path(cfg.to).exists():
        die(f"--to {cfg.to!r} is " + ("there already" if cfg.to else "no folder"), "--to FOLDER, a new one")
    if cfg.dtype not in DTYPES:
        die(f"dtype {cfg.dtype!r} is none of {', '.join(DTYPES)}", "--dtype float32")
    source, flag = cfg.init_from or cfg.ckpt, "--init_from" if cfg.init_from else "--ckpt"
    config = export(cfg, checkpoint.load(source, flag))
    size = sum(file.stat().st_size for file in Path(cfg.to).glob("*.safetensors"))
    print(f"{cfg.to}: {layout_of(config)}, {size:,} bytes of weights")


if __name__ == "__main__":
    main()
