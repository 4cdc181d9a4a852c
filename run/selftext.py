"""
A language model's own texts as a dataset: it answers questions, and a method learns from the answers.

    write    answers to a file of questions, as data/NAME

The answers are greedy and end where the model ends them. The next run with the same model and questions finds
them.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import methods
from data.dataset import write_dataset
from data.tokens import Tokenizer, read_prompts
from fast.block import generate
from generate import NOTHING, SAMPLERS
from run import checkpoint
from run.cli import die
from run.machine import pick_device
from run.restore import load_state, method_of

UNIT = 32  # a row has a multiple of so many tokens, so that blocks fit


def write(cfg, settings):
    """Make the folder data/NAME of cfg.dataset, or find it made. settings: of methods/adapt.py."""
    folder, file = Path("data") / cfg.dataset, Path(settings.self_data)
    questions = read_prompts(file)
    facts = {"of": cfg.init_from, "tokens": settings.self_tokens, "batch": settings.self_batch}
    facts["questions"] = hashlib.sha256("\n".join(questions).encode()).hexdigest()
    progress = folder / "progress.json"
    if progress.is_file() and json.loads(progress.read_text(encoding="utf-8")) == facts:
        print(f"{folder}: the answers to {file} are there")
        return
    if (folder / "meta.json").exists() and not progress.is_file():
        die(f"{folder} is another dataset", "--dataset NAME, of a folder that is to be made")
    state = checkpoint.load(cfg.init_from, "--init_from")
    tokenizer = Tokenizer(state["meta"], folder)
    prompts = [tokenizer.chat(question) for question in questions]
    rows = answers(state, prompts, cfg, settings)
    longest = max(map(len, rows))
    width = -(-longest // UNIT) * UNIT
    x = np.zeros((len(rows), width), np.int64)  # id 0 is padding
    for i, row in enumerate(rows):
        x[i, : len(row)] = row
    lens = np.array([len(p) for p in prompts], np.uint16)
    n_val = max(1, len(rows) // 10)
    folder.mkdir(parents=True, exist_ok=True)
    meta = {**state["meta"], "row_len": width, "pad_id": 0, "prompt_lens": 1}
    meta.pop("bos_id", None)
    write_dataset(folder, x[n_val:].ravel(), x[:n_val].ravel(), meta)
    lens[n_val:].tofile(folder / "train.prompts.bin")
    lens[:n_val].tofile(folder / "val.prompts.bin")
    progress.write_text(json.dumps(facts), encoding="utf-8")
    n = sum(map(len, rows)) - int(lens.sum())
    print(f"{folder}: {len(rows)} answers of {n / len(rows):.0f} tokens on average")


def answers(state, prompts, cfg, settings):
    """Each prompt and its answer, in their order: lists of ids."""
    base, base_settings = method_of(state)
    adapt = methods.load("adapt")
    adapt.begin(settings, state)
    _, process = checkpoint.build(
        cfg, state["meta"]["vocab_size"], state["network"], base, base_settings, state["process"]
    )
    with torch.device("meta"):
        model = adapt.network(checkpoint.ModelConfig(**state["network"]), settings)
    load_state(cfg.init_from, {"weights": state["ema"]}, weights=model)
    model.eval().to(pick_device(cfg.device)[0])
    how = {"block_size": 8, "sampler": SAMPLERS["lossless"], "draft": "none", "temperature": 0.0}
    how |= {"max_new_tokens": settings.self_tokens, "eos_id": state["meta"].get("eos_id")}
    order, rows = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    with tqdm(total=len(prompts), desc="the base model answers", unit="text") as bar:
        for first in range(0, len(order), settings.self_batch):
            some = order[first : first + settings.self_batch]
            for last in generate(model, process, [prompts[i] for i in some], **how):
                pass
            for i, row in zip(some, last.x.tolist(), strict=True):
                rows[i] = [token for token in row if token != NOTHING]
            bar.update(len(some))
    return [rows[i] for i in range(len(prompts))]
