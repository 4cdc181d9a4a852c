"""
How good is it? The likelihood on the validation split, and accuracy where answers can be checked.

    python eval.py --ckpt out/sudoku                           bounds in nats per token, one a block size
    python eval.py --ckpt out/sudoku --samples                 accuracy: AR, then ancestral and ARPC with 1, 2, 4, ... steps
    python eval.py --ckpt out/sudoku --samples --sampler psi --kappa pc --steps 8       any sampler, with its own options
"""

import importlib.util
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dataset import Dataset
from diffusion import SCHEDULES, stratified_draw, token_loss
from draws import Noise
from generate import NOTHING, OWN_PACE, SAMPLERS, generate
from settings import die


@dataclass
class EvalConfig:
    ckpt: str = "out/sudoku"  # a training run's out_dir
    samples: bool = False  # accuracy of generations instead of likelihood
    sampler: str = ""  # of the samples; empty: ar, ancestral and arpc. --sampler NAME --help explains one
    steps: int = 0  # per block; 0: 1, 2, 4, ... up to the block size
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
    batch_size = max(1, min(64, (1 << 26) // (data.seq_len * process.vocab_size)))  # fewer of a large network
    for b in block_sizes:
        t = stratified_draw({b: 1.0}, len(index), seed, 0)[1]
        total, count = [], []
        for rows in torch.arange(len(index)).split(batch_size):
            x0, answer = (x.to(device) for x in data.windows("val", index[rows]))
            noise = Noise(seed, rows.to(device), torch.arange(x0.size(1), device=device))
            _, loss = token_loss(model, process, x0, b, t[rows], "elbo", answer, SCHEDULES[schedule], noise=noise)
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


def prepare_module(folder):
    """folder/prepare.py, with check(text) -> (correct, asked) and choices(text) -> [(answer, what else it could have been)]."""
    path = Path(folder) / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{path.parent.name}", path) if path.exists() else None
    if spec is None:
        die(f"{path} not found: who knows what is correct?", "python eval.py without --samples")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "check"):
        die(f"samples of {path.parent.name} cannot be checked: no check(text) in {path}", "python eval.py without --samples")
    return module


def wilson(p, n, z=1.96):
    """The 95 % interval of a share p seen in n independent trials (Wilson 1927): holds at 0 and 1 too."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def accuracy(model, process, data, prompts, seed, batch_size=256, **how):
    """
    Generations behind `prompts` (how: arguments of generate), as a dict:
        accuracy   correct answers / answers asked, with its 95 % interval low..high over samples: a sample's answers stand and
                   fall together, so n is the number of samples that would have the spread we see
        distinct, expected   different correct answers, and how many there would be in as many uniform draws of possible ones
        nfe        passes per batch; nfe_row the mean a row needed; nfe_token that over the tokens of a row
        token_forwards  per token; tokens_per_s
    """
    module = prepare_module(data.folder)
    counts, found, miss = [], set(), {}
    tokens = nfe = nfe_rows = forwards = 0
    start = time.time()
    texts = []
    for i in range(0, len(prompts), batch_size):
        batch = prompts[i : i + batch_size]
        for state in generate(model, process, batch, seed=seed + i, eos_id=data.meta.get("eos_id"), **how):
            pass
        tokens += int((state.x != NOTHING).sum()) - sum(map(len, batch))
        nfe, nfe_rows, forwards = max(nfe, state.nfe), nfe_rows + int(state.nfe_rows.sum()), forwards + state.token_forwards
        texts += [data.tokenizer.decode([token for token in row if token != NOTHING]) for row in state.x.tolist()]
    seconds = time.time() - start
    for text in texts:
        counts.append(module.check(text))
        for answer, possible in module.choices(text) if hasattr(module, "choices") else ():
            found.add(answer)
            for other in possible:  # log of the probability that no uniform draw has hit it
                miss[other] = miss.get(other, 0.0) + (math.log1p(-1 / len(possible)) if len(possible) > 1 else -math.inf)
    correct, asked = (sum(c[k] for c in counts) for k in (0, 1))
    p = correct / max(asked, 1)
    error = math.sqrt(sum((c - p * a) ** 2 for c, a in counts)) / max(asked, 1)
    n = p * (1 - p) / error**2 if error else len(prompts)
    low, high = wilson(p, n)
    return {
        "accuracy": p, "low": low, "high": high, "distinct": len(found), "expected": sum(-math.expm1(m) for m in miss.values()),
        "nfe": nfe, "nfe_row": nfe_rows / len(prompts), "nfe_token": nfe_rows / max(tokens, 1),
        "token_forwards": forwards / max(tokens, 1), "tokens_per_s": tokens / seconds,
    }  # fmt: skip


def prompts_of(data, n, clues=True):
    """n prompts of the validation split; without clues the same rows, blank."""
    x0, answer = data.windows("val", data.spread("val", n))
    prompts = [row[~keep] for row, keep in zip(x0, answer, strict=True)]
    if not clues and not any(len(p) for p in prompts):
        die("this dataset has no prompts to leave blank", "leave --clues out")
    return prompts if clues else [torch.zeros_like(p) for p in prompts]  # id 0 is the blank


def main():
    from sample import load_with_sampler  # here: it imports train.py, which imports this file
    from train import restore

    cfg, sampler, own = load_with_sampler(EvalConfig, sys.argv[1:])
    for name, fine, least in (
        ("n_eval", cfg.n_eval >= 2, "2"),
        ("steps", cfg.steps >= 0, "0"),
        ("temperature", 0 <= cfg.temperature < math.inf, "0"),
        ("seed", cfg.seed >= 0, "0"),
    ):
        if not fine:
            die(f"{name} cannot be {getattr(cfg, name)}", f"--{name} {least} or more")
    usual = EvalConfig()
    for name in () if cfg.samples else ("sampler", "steps", "clues", "temperature"):
        if getattr(cfg, name) != getattr(usual, name):
            die(f"--{name} is about samples, and this asks for the likelihood", f"--samples --{name} {getattr(cfg, name)}")
    run, meta, step, model, process = restore(cfg.ckpt, cfg.device)
    data = Dataset(run.dataset, run.seq_len)
    data.same_as(meta)
    if not cfg.samples:
        print(show_bounds(bounds(model, process, data, run.block_sizes, cfg.n_eval, run.schedule, cfg.seed), process))
        return
    prompts, trained = prompts_of(data, cfg.n_eval, cfg.clues), sorted(run.block_sizes)
    wanted = [cfg.sampler] if sampler else ["ar", "ancestral", "arpc"] if trained[0] == 1 else ["ancestral"]
    rows = []
    for name in wanted:
        for b in [1] if name == "ar" else [b for b in trained if b > 1]:
            steps = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= b and (n > 1 or name != "arpc")]  # ARPC guides no last step
            if SAMPLERS[name] in OWN_PACE:
                if sampler and cfg.steps:
                    die(f"{name} takes as many passes as it needs: --steps means nothing", "leave it out")
                steps = [None]
            rows += [(name, b, n) for n in ([cfg.steps] if cfg.steps and SAMPLERS[name] not in OWN_PACE else steps)]
    if not rows:
        die(f"{cfg.ckpt} was trained on block size 1 alone: {cfg.sampler} has no block to fill", "--sampler ar")
    print(f"{run.dataset}, {run.process}, EMA weights of step {step}")
    has_prompts = any(len(p) for p in prompts)
    print(
        f"{len(prompts)} samples, temperature {cfg.temperature:g}, seed {cfg.seed}"
        + f", with{'' if cfg.clues else 'out'} clues" * has_prompts
    )
    print(f"{'sampler':>13} {'block':>6} {'steps':>6} {'NFE':>5} {'a row':>6} {'correct, 95 %':>20} {'distinct':>10} {'tokens/s':>9}")
    bar = tqdm(rows, desc="sampling", leave=False, file=sys.stderr, disable=None)
    for name, b, steps in bar:
        try:
            r = accuracy(
                model, process, data, prompts, cfg.seed, block_size=b, sampler=SAMPLERS[name], steps=steps, temperature=cfg.temperature,
                schedule=SCHEDULES[run.schedule], trained=trained, **own,
            )  # fmt: skip
        except ValueError as e:
            bar.close()
            die(str(e), f"python eval.py --sampler {name} --help")
        share = f"{100 * r['accuracy']:.1f} ({100 * r['low']:.1f}-{100 * r['high']:.1f})"
        distinct = f"{r['distinct']}/{r['expected']:.0f}" if r["expected"] else ""
        tqdm.write(
            f"{name:>13} {b:>6} {steps or '':>6} {r['nfe']:>5} {r['nfe_row']:>6.1f} {share:>20} {distinct:>10} {r['tokens_per_s']:>9,.0f}",
            file=sys.stdout,
        )
    print("distinct: different correct answers / as many uniform draws would give")


if __name__ == "__main__":
    main()
