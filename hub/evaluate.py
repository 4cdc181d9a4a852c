"""
How good is a network by everybody's benchmarks? An adapter for lm-evaluation-harness.

    pip install lm_eval
    python -m hub.evaluate --ckpt out/run --tasks arc_easy --limit 100

Two questions are asked of a network:

    scores    log p(answer | question), to choose among answers. Exact at block size 1, where that was
              trained; else a lower bound, the mean of --n_mc draws
    writes    text behind a question, up to one of some strings
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python hub/evaluate.py works too
import hub.published  # noqa: F401  --init_from hf:...
from data.tokens import Tokenizer
from diffusion import SCHEDULES, token_loss
from fast.block import generate
from rng import Noise
from run.cli import die, load_config, writable
from run.machine import guard
from run.restore import restore
from samplers import SAMPLERS


@dataclass
class EvaluateConfig:
    ckpt: str = "out/run"  # a training run's out_dir
    init_from: str = ""  # or published weights (hub/published.py)
    tasks: str = ""  # of lm-evaluation-harness, with commas between
    include: str = ""  # a folder of task files of your own, .yaml
    limit: int = 0  # questions of each task; 0: all
    few_shot: int = 0  # solved examples before each question
    block_size: int = 0  # one of those it was trained with; 0: 1 if that was trained, else the largest
    n_mc: int = 32  # draws of noise for a bound
    sampler: str = "ancestral"  # of the texts; at block size 1 it is ar
    temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 1
    json: str = ""  # the results, in this file
    device: str = "auto"


def fitted(question, answer, seq_len):
    """(row, tokens of the question in it): the question loses tokens at its left if both are too long."""
    room = seq_len - len(answer)
    if room < 0:
        raise ValueError(f"an answer of {len(answer)} tokens, and a context of {seq_len}")
    question = question[-room:] if room else []
    return question + answer, len(question)


@torch.no_grad()
def scores(model, process, pairs, block_size, n_mc=32, seed=1, schedule=SCHEDULES["loglinear"]):
    """
    log p(answer | question) of (question, answer) ids, (len(pairs),) float64; a lower bound for block sizes
    above 1. Masks fill the answer's last block. They stay masks at every noise level: the network is not told
    where the answer ends.
    """
    if process.mask_id is None and block_size > 1:
        raise ValueError("a bound of an answer stands on masks behind it, and this noise has none")
    device, found = model.embed.weight.device, []
    for i, (question, answer) in enumerate(pairs):
        row, n = fitted(list(question), list(answer), model.cfg.seq_len)
        fill = process.mask_id if process.mask_id is not None else 0
        x0 = torch.tensor([row + [fill] * (-len(row) % block_size)])
        at = torch.arange(x0.size(1))[None]
        charged = (at >= n) & (at < len(row))
        draws = n_mc if block_size > 1 or not process.exact_ar else 1
        total = torch.zeros((), dtype=torch.float64)
        for k in range(draws):
            t = ((torch.rand(1, generator=torch.Generator().manual_seed(seed + i)) + k) / draws).double()
            noise = Noise(seed + k, torch.tensor([i], device=device), torch.arange(x0.size(1), device=device))
            how = {
                "given": at < n,
                "charged": charged,
                "schedule": schedule,
                "noise": noise,
                "device": device,
            }
            t = t.clamp(min=max(process.t_min, 1e-5)).to(device)
            total += token_loss(model, process, x0, block_size, t, "elbo", **how)[0].double().cpu() / draws
        found.append(-total)
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def writes(model, process, tokenizer, questions, stops, how):
    """The text behind each question, up to the first of its stops. how: for generate."""
    found = []
    for question, ends in zip(questions, stops, strict=True):
        room = model.cfg.seq_len - how["max_new_tokens"]
        prompt = tokenizer.prompt(question)[-max(room, 1) :]
        for state in generate(model, process, [prompt], **how):
            pass
        text = tokenizer.decode([i for i in state.x[0].tolist()[len(prompt) :] if i >= 0])
        cuts = [text.index(end) for end in ends if end and end in text]
        found.append(text[: min(cuts, default=len(text))])
    return found


def adapter(base, model, process, tokenizer, block_size, n_mc, seed, how):
    """An object of lm-evaluation-harness' class LM, which is `base`."""

    def ids(question, answer):
        """A space between them belongs to the answer, as the harness has it."""
        bare = question.rstrip(" ")
        answer = question[len(bare) :] + answer
        return tokenizer.prompt(bare), tokenizer.encode(answer)

    class Network(base):
        def loglikelihood(self, requests):
            pairs = [ids(*request.args) for request in requests]
            found = scores(model, process, pairs, block_size, n_mc, seed).tolist()
            return [(score, False) for score in found]  # whether it is the likeliest text is not looked at

        def loglikelihood_rolling(self, requests):
            pairs = [(tokenizer.prompt("")[:1], tokenizer.encode(request.args[0])) for request in requests]
            return scores(model, process, pairs, block_size, n_mc, seed).tolist()

        def generate_until(self, requests):
            stops = [request.args[1].get("until", []) for request in requests]
            stops = [[stop] if isinstance(stop, str) else stop for stop in stops]
            return writes(model, process, tokenizer, [request.args[0] for request in requests], stops, how)

    return Network()


@guard("a smaller --limit, or --device=cpu")
def main():
    cfg = load_config(EvaluateConfig, sys.argv[1:])
    try:
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError:
        die("python -m hub.evaluate runs the tasks of lm-evaluation-harness", "pip install lm_eval")
    if not cfg.tasks:
        die("no --tasks", "--tasks arc_easy,hellaswag")
    if cfg.include and not Path(cfg.include).is_dir():
        die(f"{cfg.include} is no folder", "--include FOLDER, with .yaml files of tasks")
    if cfg.json:
        writable(cfg.json, "json", b"{\n ")
    source, flag = cfg.init_from or cfg.ckpt, "--init_from" if cfg.init_from else "--ckpt"
    run, meta, _, model, process = restore(source, cfg.device, False, flag)
    tokenizer = Tokenizer(meta, Path("data") / run.dataset)
    trained = sorted(run.block_sizes)
    block_size = cfg.block_size or (1 if 1 in trained else trained[-1])
    if block_size not in trained:
        die(
            f"{source} was trained on block sizes {', '.join(map(str, trained))}",
            f"--block_size {trained[-1]}",
        )
    how = {"block_size": block_size, "sampler": SAMPLERS["ar" if block_size == 1 else cfg.sampler]}
    how |= {"temperature": cfg.temperature, "max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed}
    how |= {
        "eos_id": meta.get("eos_ids", meta.get("eos_id")),
        "schedule": SCHEDULES[run.schedule],
        "trained": trained,
    }
    network = adapter(LM, model, process, tokenizer, block_size, cfg.n_mc, cfg.seed, how)
    found = lm_eval.simple_evaluate(
        network,
        tasks=cfg.tasks.split(","),
        num_fewshot=cfg.few_shot,
        limit=cfg.limit or None,
        task_manager=TaskManager(include_path=cfg.include or None),
    )["results"]
    exact = block_size == 1 and process.exact_ar
    kind = "exact" if exact else f"lower bounds by {cfg.n_mc} draws"
    print(f"log-likelihoods are {kind}, block size {block_size}")
    for task, values in found.items():
        print(task, *(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float)))
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
