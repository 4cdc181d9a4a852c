"""
The adapters of --method adapt as a folder that PEFT reads, and back.

    adapter_config.json, adapter_model.safetensors     LoRA: what noisy tokens go through, W + B A
    drafts.safetensors, nanoblock.json                 what PEFT has no place for: masks, heads

The base is not in the folder: it is named. Merged into the base by PEFT, the adapters are the network of the
noisy tokens alone. The text is the base's, so its own tokens must not go through them.
"""

import json
from pathlib import Path

import torch

from hub.llama import HUGGING_FACE, read_json
from methods.adapt import LEARNED
from run import checkpoint
from run.cli import die, said

# a product of ours is one or several of theirs, side by side: (ours, theirs) of each
PARTS = {"qkv": ("q", "k", "v"), "out": ("out",), "wide": ("gate", "up"), "down": ("down",)}
THEIRS = {ours[:-1]: theirs[:-1] for theirs, ours in HUGGING_FACE.items()}  # "q" -> "self_attn.q_proj"
FILES = "adapter_model.safetensors", "drafts.safetensors"


def prefix(i, part):
    return f"base_model.model.model.layers.{i}.{THEIRS[part]}"


def layout(model, state, base_model):
    """(adapter_config.json, the tensors of FILES, nanoblock.json)"""
    lora, settings = {}, model.settings
    for i, layer in enumerate(model.layers):
        for name, adapter in layer.adapters.items():
            widths = [module.out_features for module in layer.products(name)]
            for part, B in zip(PARTS[name], adapter.B.split(widths), strict=True):
                lora[f"{prefix(i, part)}.lora_A.weight"] = adapter.A
                lora[f"{prefix(i, part)}.lora_B.weight"] = B
    whole = model.state_dict()
    drafts = {k: v for k, v in whole.items() if k.startswith(LEARNED)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or state["config"]["init_from"],
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.rank,  # so that its factor alpha / r is 1
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(
            THEIRS[part].split(".")[-1] for name in settings.beside.split(",") for part in PARTS[name]
        ),
    }
    run = {**state["config"], "block_sizes": list(state["config"]["block_sizes"].items())}
    facts = {name: state[name] for name in ("process", "method", "meta", "step", "network")}
    return config, (lora, drafts), facts | {"config": run}


def is_lora(path):
    """Is this a folder of `layout`?"""
    path = Path(path)
    return (path / "adapter_config.json").is_file() and (path / "nanoblock.json").is_file()


def read_lora(path, flag="--init_from"):
    """A dict as checkpoint.load gives it, with the base's weights. Two lines for a folder that is damaged."""
    from safetensors.torch import load_file

    path = Path(path)
    try:
        facts = read_json(path / "nanoblock.json")
        lora, learned = (load_file(path / name) for name in FILES)
        learned = {k: v.float() if v.is_floating_point() else v for k, v in learned.items()}
        run = facts["config"] | {"block_sizes": {int(b): w for b, w in facts["config"]["block_sizes"]}}
        for i in range(facts["network"]["n_layers"]):
            for name in facts["method"]["settings"].get("beside", ",".join(PARTS)).split(","):
                parts = PARTS[name]
                ours = f"layers.{i}.adapters.{name}"
                learned[f"{ours}.A"] = lora.pop(f"{prefix(i, parts[0])}.lora_A.weight").float()
                others = [lora.pop(f"{prefix(i, part)}.lora_A.weight").float() for part in parts[1:]]
                if not all(torch.equal(A, learned[f"{ours}.A"]) for A in others):
                    raise ValueError(f"A differs between {' and '.join(parts)} of layer {i}")
                learned[f"{ours}.B"] = torch.cat(
                    [lora.pop(f"{prefix(i, part)}.lora_B.weight").float() for part in parts]
                )
        if lora:
            raise ValueError(f"it holds {min(lora)}, which our adapters have not")
        checkpoint.check_sizes({**facts, "config": run, "model": learned, "ema": learned})
    except MemoryError:
        raise
    except Exception as e:  # a damaged file fails in many ways
        die(f"{path} is damaged, or no folder of hub/export.py: {said(e)}", f"{flag} FOLDER, another copy")
    base = checkpoint.load(run["init_from"], flag)
    weights = base["ema"] | learned
    return {
        **{name: facts[name] for name in ("process", "method", "meta", "step", "network")},
        "config": run,
        "model": weights,
        "ema": weights,
        "version": checkpoint.VERSION,
    }


def write(folder, model, state, base_model, dtype):
    """Fill the folder. Returns adapter_config.json."""
    from safetensors.torch import save_file

    config, tensors, facts = layout(model, state, base_model)
    for name, some in zip(FILES, tensors, strict=True):
        kind = lambda v: dtype if v.is_floating_point() else v.dtype
        # a copy each: tensors may not share memory in a file
        some = {k: v.detach().to(kind(v), copy=True).contiguous() for k, v in some.items()}
        save_file(some, folder / name, metadata={"format": "pt"})
    for name, value in (("adapter_config.json", config), ("nanoblock.json", facts)):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return config


checkpoint.READERS.insert(0, (is_lora, read_lora))
