"""
Your own chats, for fine-tuning: a JSON object a line, as OpenAI or ShareGPT have them (data/template.py).

    python data/chat/prepare.py --input chats.jsonl --bpe MODEL/tokenizer.json --seq_len 1024
    python train.py --dataset chat --init_from MODEL ...          docs/finetune.md

A turn of the assistant is a row: all before it is its prompt, which carries no loss, and it ends with
<|im_end|>. Behind it stands padding. A chat of three answers makes three rows. Rows that are too long lose
their oldest messages but the system message; an answer that does not fit alone is left out, and counted.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.bpe import JsonBPE
from data.dataset import write_dataset
from data.template import END, chatml, messages_of
from run.cli import die, load_config


@dataclass
class ChatConfig:
    input: str = ""  # a file of lines {"messages": [{"role": "user", "content": "..."}, ...]}
    bpe: str = ""  # the tokenizer.json of the model that is fine-tuned
    seq_len: int = 1024  # tokens of a row: a multiple of the block size
    vocab_size: int = 0  # ids of the model, if they are more than its tokenizer's: vocab_size in config.json
    val: float = 0.05  # the share of chats that are held out for validation
    pad_id: int = -1  # -1: the id of <|endoftext|>


def read(path):
    """[messages] of a file."""
    chats = []
    try:
        with open(path, encoding="utf-8") as file:
            for i, line in enumerate(file, 1):
                if line.strip():
                    try:
                        chats.append(messages_of(json.loads(line)))
                    except (ValueError, RecursionError) as e:
                        die(f"{path}, line {i}: {e}", '{"messages": [{"role": "user", "content": "..."}]}')
    except (OSError, UnicodeDecodeError) as e:
        die(f"cannot read {path}: {getattr(e, 'strerror', None) or e}", "--input FILE.jsonl, in UTF-8")
    if len(chats) < 2:
        die(f"{path} has {len(chats)} chats: one is held out", "--input FILE.jsonl, of two lines or more")
    return chats


def rows_of(messages, bpe, seq_len):
    """[(ids, tokens of the prompt)], one for each answer; None where an answer does not fit."""
    rows = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answer = bpe.encode(message["content"]) + [bpe.added[END]]
        before = messages[:i]
        first = before[:1] if before and before[0]["role"] == "system" else []
        rest = before[len(first) :]
        prompt = bpe.encode(chatml(first + rest, asks=True), special=True)
        while len(prompt) + len(answer) > seq_len and rest:
            rest = rest[1:]
            prompt = bpe.encode(chatml(first + rest, asks=True), special=True)
        rows.append((prompt + answer, len(prompt)) if len(prompt) + len(answer) <= seq_len else None)
    return rows


def main():
    cfg, folder = load_config(ChatConfig, sys.argv[1:]), Path(__file__).parent
    if not cfg.input or not cfg.bpe:
        die("no --input, or no --bpe", "--input chats.jsonl --bpe MODEL/tokenizer.json")
    if not 0 < cfg.val < 1 or not 8 <= cfg.seq_len < 1 << 16:
        die(f"val {cfg.val} or seq_len {cfg.seq_len} cannot be", "--val 0.05 --seq_len 1024")
    chats, bpe = read(cfg.input), JsonBPE(cfg.bpe)
    if lacking := [name for name in (END, "<|im_start|>") if name not in bpe.added]:
        die(f"{cfg.bpe} has no token {lacking[0]}", "the tokenizer.json of a model that reads ChatML")
    pad_id = bpe.added.get("<|endoftext|>", -1) if cfg.pad_id < 0 else cfg.pad_id
    vocab_size = cfg.vocab_size or max([*bpe.vocab.values(), *bpe.added.values()]) + 1
    if not 0 <= pad_id < vocab_size or pad_id == bpe.added[END]:
        die(f"the padding {pad_id} is no id, or the one that ends a turn", "--pad_id ID")
    n_val = max(1, round(cfg.val * len(chats)))
    order = np.random.default_rng(0).permutation(len(chats))
    splits, left_out = {}, 0
    for split, chosen in (("train", order[n_val:]), ("val", order[:n_val])):
        try:
            rows = [row for i in chosen for row in rows_of(chats[i], bpe, cfg.seq_len)]
        except ValueError as e:
            die(f"{cfg.input}: {e}", "the chats without it")
        left_out += rows.count(None)
        rows = [row for row in rows if row is not None]
        if not rows:
            die(
                f"no answer of the {split} split fits into {cfg.seq_len} tokens",
                f"--seq_len {4 * cfg.seq_len}",
            )
        splits[split] = np.array([ids + [pad_id] * (cfg.seq_len - len(ids)) for ids, _ in rows]).ravel()
        np.array([n for _, n in rows], np.uint16).tofile(folder / f"{split}.prompts.bin")
    meta = {"vocab_size": vocab_size, "tokenizer": "json", "file": str(Path(cfg.bpe).absolute())}
    meta |= {"eos_id": bpe.added[END], "pad_id": pad_id, "row_len": cfg.seq_len, "prompt_lens": 1}
    write_dataset(folder, splits["train"], splits["val"], meta)
    n = [len(ids) // cfg.seq_len for ids in splits.values()]
    print(f"chat: {n[0]:,} answers to learn from, {n[1]:,} held out, {left_out:,} too long, in {folder}")


if __name__ == "__main__":
    main()
