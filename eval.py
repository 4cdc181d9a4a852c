"""
How good is it? For now: the likelihood on the validation split, and accuracy where answers can be checked.

    python eval.py --ckpt out/sudoku                           bounds in nats per token, one a block size
    python eval.py --ckpt out/sudoku --samples                 accuracy: block size 1, then ancestral with 1, 2, 4, ... steps
"""

import importlib.util
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from dataset import Dataset
from diffusion import NOTHING, SCHEDULES, Noise, generate, stratified_draw, token_loss
from settings import die, load_config


@dataclass
class EvalConfig:
    ckpt: str = "out/sudoku"  # a training run's out_dir
    samples: bool = False  # accuracy of generations instead of likelihood
    n_eval: int = 512  # windows of the validation split; samples per row of the accuracy table
    clues: bool = True  # prompts from the validation split; false: nothing but blanks (sudoku)
    temperature: float = 1.0
    seed: int = 1
    device: str = "auto"


@torch.no_grad()
def bounds(model, process, data, block_sizes, n_eval, schedule, seed=0):
    """
    {block size: (nats per token, standard error over windows)} on the validation split, stratified times, whatever loss
    the model was trained with. Block size 1: the exact NLL (a bound with random_ar). Larger: one draw a window of an upper bound on it.
    """
    device, result = next(model.parameters()).device, {}
    index = data.spread("val", n_eval)
    batch_size = max(1, min(64, (1 << 26) // (data.seq_len * process.vocab_size)))  # logits of at most 256 MB
    for b in block_sizes:
        t = stratified_draw({b: 1.0}, len(index), seed, 0)[1]
        total, count = [], []
        for rows in torch.arange(len(index)).split(batch_size):
            x0, answer = (x.to(device) for x in data.windows("val", index[rows]))
            noise = Noise(seed, rows.to(device), torch.arange(x0.size(1), device=device))
            loss = token_loss(model, process, x0, b, t[rows], "elbo", answer, SCHEDULES[schedule], noise=noise)
            total.append(loss.cpu().double().sum(1)), count.append(answer.sum(1).cpu())
        total, count = torch.cat(total), torch.cat(count)
        mean = (total.sum() / count.sum()).item()
        error = ((total - mean * count).std() / count.double().mean() / math.sqrt(len(index))).item()
        result[b] = (mean, error)
    return result


def show_bounds(result, process):
    """One line; `<=` stands before what is a bound and not the exact NLL."""
    exact = {1} if process.ar_token is not None else set()
    return " | ".join(
        f"block {b}: {'' if b in exact else '<= '}{mean:.4f} +- {error:.4f} nats/token" for b, (mean, error) in result.items()
    )


def checker(dataset):
    """The function check(text) -> (correct, asked) of data/NAME/prepare.py."""
    path = Path("data") / dataset / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{dataset}", path) if path.exists() else None
    if spec is None:
        die(f"{path} not found: who knows what is correct?", "python eval.py without --samples")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "check"):
        die(f"samples of {dataset} cannot be checked: no check(text) in {path}", "python eval.py without --samples")
    return module.check


def accuracy(model, process, data, check, prompts, seed, batch_size=256, **how):
    """(fraction correct, standard error, NFE, seconds) of generations behind `prompts`; how: arguments of generate.
    The error is binomial over all that was asked: too small where one sample answers several times (digits)."""
    correct = asked = nfe = 0
    start = time.time()
    for i in range(0, len(prompts), batch_size):
        for state in generate(model, process, prompts[i : i + batch_size], seed=seed + i, eos_id=data.meta.get("eos_id"), **how):
            pass
        nfe = state.nfe
        for row in state.x.tolist():
            a, b = check(data.tokenizer.decode([token for token in row if token != NOTHING]))
            correct, asked = correct + a, asked + b
    p = correct / max(asked, 1)
    return p, math.sqrt(p * (1 - p) / max(asked, 1)), nfe, time.time() - start


def main():
    from train import pick_device, trained_with  # here: train.py imports this file

    cfg = load_config(EvalConfig, sys.argv[1:])
    if cfg.n_eval < 2 or not 0 <= cfg.temperature < math.inf or cfg.seed < 0:
        die(
            f"n_eval {cfg.n_eval} must be at least 2, temperature {cfg.temperature} and seed {cfg.seed} at least 0",
            "python eval.py --n_eval=512",
        )
    state = checkpoint.load(cfg.ckpt)
    run = trained_with(state)
    data = Dataset(run.dataset, run.seq_len)
    data.same_as(state["meta"])
    model, process = checkpoint.build(run, state["meta"]["vocab_size"])
    model.load_state_dict(state["ema"])
    model = model.to(pick_device(cfg.device)[0]).eval()
    if not cfg.samples:
        print(show_bounds(bounds(model, process, data, run.block_sizes, cfg.n_eval, run.schedule, cfg.seed), process))
        return
    check, (x0, answer) = checker(run.dataset), data.windows("val", data.spread("val", cfg.n_eval))
    prompts = [row[~keep] for row, keep in zip(x0, answer, strict=True)]
    has_prompts = any(len(p) for p in prompts)
    if not cfg.clues:
        if not has_prompts:
            die(f"{run.dataset} has no prompts to leave blank", "leave --clues out")
        prompts = [torch.zeros_like(p) for p in prompts]  # id 0 is the blank
    rows = [(b, 1) for b in sorted(run.block_sizes) if b == 1]
    rows += [(b, n) for b in sorted(run.block_sizes) if b > 1 for n in (1, 2, 4, 8, 16, 32, 64) if n <= b]
    print(f"{run.dataset}, {run.process}, EMA weights of step {state['step']}")
    print(
        f"{len(prompts)} samples, temperature {cfg.temperature:g}, seed {cfg.seed}"
        + f", with{'' if cfg.clues else 'out'} clues" * has_prompts
    )
    print(f"{'sampler':>10} {'block':>6} {'steps':>6} {'NFE':>5} {'correct':>16} {'seconds':>8}")
    for b, steps in tqdm(rows, desc="sampling", leave=False, file=sys.stderr):
        schedule = SCHEDULES[run.schedule]
        p, error, nfe, seconds = accuracy(
            model, process, data, check, prompts, cfg.seed, block_size=b, steps=steps, temperature=cfg.temperature, schedule=schedule
        )
        name = "AR" if b == 1 else "ancestral"
        tqdm.write(f"{name:>10} {b:>6} {steps:>6} {nfe:>5} {100 * p:>8.1f} +- {100 * error:.1f} % {seconds:>8.1f}", file=sys.stdout)


if __name__ == "__main__":
    main()
