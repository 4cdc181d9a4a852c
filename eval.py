"""
How good is it? The likelihood on the validation split, the quality of its texts, and what speed costs in quality.

    python eval.py --ckpt out/sudoku                           nats, bits per byte, perplexity: a line a block size, and the mixture
    python eval.py --ckpt out/sudoku --samples                 accuracy or generative perplexity: AR, ancestral and ARPC, 1, 2, 4, ... steps
    python eval.py --ckpt out/sudoku --samples --sampler psi --kappa pc --steps 8       any sampler, with its own options
    python eval.py --ckpt out/sudoku --sweep                   samplers x steps x temperatures: a table and a plot; sweep.py says more
    python eval.py --gsm8k --ckpt out/tinygsm_masked_1_16      grade-school sums by the programs it writes; gsm8k.py says more
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from diffusion import SCHEDULES, stratified_draw, token_loss
from fast.draws import Noise
from generate import OWN_PACE, SAMPLERS
from hub.published import is_published
from lab.quality import NGRAMS, checker, generated, judge, prompts_of, quality, real_rows
from run import machine
from run.cli import die, writable
from run.restore import dataset_for, restore
from sample import load_with_sampler


@dataclass
class EvalConfig:
    ckpt: str = "out/sudoku"  # a training run's out_dir
    init_from: str = ""  # or published weights: hf:OWNER/REPO/SUBFOLDER, or a folder (published.py)
    dataset: str = ""  # another than it was trained on, in the same tokens
    samples: bool = False  # the quality of texts instead of the likelihood
    sweep: bool = False  # speed against quality; it has settings of its own: --sweep --help
    gsm8k: bool = False  # GSM8K by execution; it has settings of its own: --gsm8k --help
    block_size: int = 0  # one of those it was trained with; 0: all
    n_eval: int = 512  # windows of the validation split; 0: all of it. With --samples: texts a line
    n_mc: int = 8  # draws of noise a window for a bound: even, half of them check the other half; or 1, without a Monte Carlo error
    sampler: str = ""  # of the texts; empty: ar, ancestral and arpc. --sampler NAME --help explains one
    steps: int = 0  # per block; 0: 1, 2, 4, ... up to the block size, at most 64
    judge: str = "auto"  # of the texts: self (its AR mode), a run's out_dir, gpt2, gpt2-large, none; auto: self if it has that mode
    clues: bool = True  # prompts from the validation split; false: nothing but blanks (sudoku)
    max_new_tokens: int = 0  # per text; 0: up to the end of the context
    temperature: float = 1.0
    seed: int = 1
    json: str = ""  # the same numbers, in this file
    device: str = "auto"
    dtype: str = "float32"  # bfloat16: of --samples, faster where the hardware has it; likelihoods and judges stay float32


# ----- likelihood

LAST = 1e-3  # uniform noise: the bound follows the reverse process from t = 1 to here, and then takes one last step


@dataclass
class Likelihood:
    nats: dict  # block size: (halves, W) float64, nats of W windows, by each half of the draws; one half where there is nothing to draw
    tokens: torch.Tensor  # (W,) float64: answers in a window
    index: torch.Tensor  # (W,) which windows; and which tokens of them, (W, T) bool:
    answer: torch.Tensor


def one_draw(model, process, x0, answer, b, u, noise):
    """
    (B, L - start) nats whose mean over u in (0, 1) and noise is, block size 1 aside, the upper bound
        -log p(x_0) <= E_{t ~ U(a, 1)} (1 - a) nll(x_t, t)  +  E last_step(x_a),     a = 0 masked, LAST uniform
    without the last step, which a uniform bound needs once a half: down to t = 0 it may have no finite mean (docs/log.md, 2026-11-21).
    The integral is the same for every noise schedule, and at small t a draw costs 1 / t with probability t: infinite variance. So time
    runs slowly there, t = u^2. Masked noise on a network that does not see t needs no t at all: the bound is a mean over m = 1..n masks
    among the n answers of a block (LLaDA, arXiv 2502.09992),
        E_m n / m sum over m masks at random places of -log p(x_0 | x_t)
    u (B,) float64; noise for positions start, start + 1, ..., where start is the block of the first answer (see first_noisy).
    """
    start = first_noisy(answer, b)
    how = {"answer": answer, "start": start, "noise": noise}
    if b == 1:
        return token_loss(model, process, x0, 1, u, "elbo", **how)[1]
    if process.mask_id is not None and model.timeless:
        open = answer[:, start:].unflatten(1, (-1, b))  # (B, N, b)
        n = open.sum(-1, keepdim=True).clamp(min=1)
        m = (u[:, None, None] * n.cpu()).ceil()  # times stay on the CPU: some devices have no float64
        rank = noise.uniform(1)[..., 0].view(open.shape).masked_fill(~open, 2.0).argsort(-1).argsort(-1)
        how["noise"] = SimpleNamespace(uniform=lambda _: ((rank + 0.5) / n).flatten(1)[..., None])  # below m / n: m of them
        return token_loss(model, process, x0, b, (m / n.cpu()).expand(open.shape).flatten(1), "elbo", **how)[1]
    root = math.sqrt(LAST) if process.mask_id is None else 0.0
    at = lambda u: root + (1 - root) * u
    slow = lambda u: (1 - at(u) ** 2, -2 * (1 - root) * at(u))
    return token_loss(model, process, x0, b, u, "elbo", schedule=slow, **how)[1]


def last_step(model, process, x0, answer, b, noise):
    """The rest of a uniform bound, (B, L - start): -log p(x_0 | x_t) at t = LAST."""
    end = lambda u: (torch.full_like(u, 1 - LAST), torch.zeros_like(u))
    u = torch.zeros(len(x0), dtype=torch.float64)
    return token_loss(model, process, x0, b, u, "last", answer, end, first_noisy(answer, b), noise)[1]


def first_noisy(answer, b):
    """Blocks before it are prompt in every row, and need no noisy copy."""
    return int(answer.any(0).int().argmax()) // b * b


def times(n, k, seed, b, half):
    """(n, k) float64: k times a window, one in each of k equal slices of (0, 1); the n k times of all windows are one in each of n k."""
    u = Noise(seed, torch.tensor([-3 - half]), torch.arange(n), b).uniform(2)[0]
    start = (u[:, 0].argsort().argsort() + u[:, 1]) / n
    return ((torch.arange(k) + start[:, None]) / k).clamp(1e-9, 1 - 1e-9)


@torch.no_grad()
def likelihood(model, process, data, block_sizes, n_eval=512, n_mc=8, seed=0, progress=False, share=(0, 1)):
    """
    A Likelihood of the validation split, whatever loss the model was trained with. Block size 1: the exact NLL (a bound with
    random_ar). Larger: an upper bound by n_mc draws a window, in two independent halves; n_mc 1: one draw and one half.
    share (rank, world): as one of several processes that all call this, do a share of the work; the result is the same for all.
    """
    device, index = next(model.parameters()).device, data.spread("val", n_eval)
    x0, answer = data.windows("val", index)
    if not data.row_len:  # n_eval 0: of the last window, what the one before has not had
        seen = (index[:-1] + data.seq_len - index[1:]).clamp(min=0)
        answer = answer & (torch.arange(data.seq_len) >= torch.cat((seen.new_zeros(1), seen))[:, None])
    batch_size = max(1, min(64, -(-len(index) // share[1]), (1 << 26) // (data.seq_len * process.vocab_size)))  # fewer of a large network
    batches = torch.arange(len(index)).split(batch_size)
    exact = {b for b in block_sizes if b == 1 and process.ar_token is not None}
    halves, draws = (1, 1) if n_mc == 1 else (2, n_mc // 2)
    total = sum(1 if b in exact else halves * draws for b in block_sizes) * len(batches)
    bar = tqdm(total=total, desc="likelihood", leave=False, disable=None if progress else True)
    nats = {}
    for b in block_sizes:
        nats[b] = torch.zeros(1 if b in exact else halves, len(index), dtype=torch.float64)
        for h, half in enumerate(nats[b]):
            k = 1 if b in exact else draws
            u = times(len(index), k, seed, b, h)
            for turn in range(share[0], -(-len(batches) // share[1]) * share[1], share[1]):  # all as many: under FSDP they meet in a layer
                rows, mine = batches[turn % len(batches)], turn < len(batches)
                x, keep = x0[rows].to(device), answer[rows].to(device)
                positions = torch.arange(first_noisy(keep, b), data.seq_len, device=device)
                noise = [Noise(seed, rows.to(device), positions, (b * 2 + h) * (draws + 1) + i) for i in range(k + 1)]
                for i in range(k):
                    drawn = one_draw(model, process, x, keep, b, u[rows, i], noise[i]).cpu().double().sum(1) / k
                    half[rows] += drawn if mine else 0.0
                    bar.update()
                if b > 1 and process.mask_id is None:
                    rest = last_step(model, process, x, keep, b, noise[k]).cpu().double().sum(1)
                    half[rows] += rest if mine else 0.0
        if share[1] > 1:
            dist.all_reduce(nats[b])
    bar.close()
    return Likelihood(nats, answer.sum(1).double(), index, answer)


def estimate(halves, tokens):
    """
    (nats per token, its Monte Carlo standard error, its standard error over windows) of nats (halves, W) and tokens (W,).
    The first error is about other draws on these windows: half the difference of two independent halves has the variance of
    their mean, and spreading times over windows (see times) makes it rather too large. The second is about other windows, taken
    as independent, and contains the first. nan where one half, or one window, cannot tell; 0 where nothing is drawn is the
    caller's to know.
    """
    each, total, n = halves.mean(0), tokens.sum(), len(tokens)
    mean = each.sum() / total
    monte_carlo = (halves[0] - halves[1]).square().sum().sqrt().item() / 2 / total.item() if len(halves) > 1 else math.nan
    error = (each - mean * tokens).std().item() * math.sqrt(n) / total.item() if n > 1 else math.nan
    return mean.item(), monte_carlo, error


def mixture_bounds(nats, weights, seed=0):
    """
    What a network that draws a block size k with probability w_k for each window is worth, from nats l_k = -log p_k or bounds on it:
    {name: (halves, W) nats}, all but the plug-in upper bounds on -log sum_k w_k p_k (names of the release of arXiv 2606.02241):
        mc1          l_k of one size drawn for each window
        Jensen       sum_k w_k l_k
        log-sum-exp  min over shares r of  sum_k r_k (l_k + log(r_k / w_k)),  which is  -log sum_k w_k exp(-l_k)
    l_k is known by draws, and the log-sum-exp of noisy numbers is too low on average: the minimum likes what was lucky. With the shares
    of one half of the draws and the l_k of the other it is an upper bound again, in expectation; "plug-in" is the plain formula.
    """
    sizes = list(weights)
    w = torch.tensor([weights[b] for b in sizes], dtype=torch.float64).log()[:, None]
    halves = max(len(nats[b]) for b in sizes)
    bound = torch.stack([nats[b].expand(halves, -1) for b in sizes], dim=1)  # (halves, K, W)
    drawn = stratified_draw(weights, bound.size(-1), seed, 1)[0]
    which = torch.tensor([sizes.index(b) for b in drawn.tolist()])
    result = {"mc1": bound[:, which, torch.arange(len(which))], "Jensen": (w.exp() * bound).sum(1)}
    if halves == 2:
        share = (w - bound.flip(0)).log_softmax(1)  # the other half's opinion
        result["log-sum-exp"] = (share.exp() * (bound + share - w)).sum(1)
    return result | {"log-sum-exp, plug-in": -(w - bound.mean(0)).logsumexp(0)[None]}


def bounds(model, process, data, block_sizes, n_eval, n_mc=1, seed=0, share=(0, 1)):
    """{block size: (nats per token, standard error over windows)}: what training shows."""
    found = likelihood(model, process, data, block_sizes, n_eval, n_mc, seed, share=share)
    return {b: estimate(halves, found.tokens)[::2] for b, halves in found.nats.items()}


def show_bounds(result, process):
    """One line; `<=` stands before what is a bound and not the exact NLL."""
    exact = {1} if process.ar_token is not None else set()
    return " | ".join(
        f"block {b}: {'' if b in exact else '<= '}{mean:.4f} +- {error:.4f} nats/token" for b, (mean, error) in result.items()
    )


def likelihood_table(found, process, weights, n_bytes, seed):
    """
    A dict a line: every block size, and the mixture where `weights` has several. n_bytes: bytes of text in the answers, or None.
        nats, monte_carlo, error   as estimate gives them; monte_carlo None: unknown, 0: nothing was drawn
        bound   an upper bound; False: exact. None: neither
        bits_per_byte, perplexity  of nats
    """
    lines = []
    entries = {f"block {b}": (halves, b != 1 or process.ar_token is None) for b, halves in found.nats.items()}
    if len(weights) > 1:
        mixture = mixture_bounds({b: found.nats[b] for b in weights}, weights, seed)
        entries |= {f"mixture, {name}": (halves, None if "plug-in" in name else True) for name, halves in mixture.items()}
    for name, (halves, bound) in entries.items():
        nats, monte_carlo, error = estimate(halves, found.tokens)
        unknown = math.isnan(monte_carlo) or name.endswith(("mc1", "log-sum-exp", "plug-in"))  # more varies than their halves show
        monte_carlo = 0.0 if bound is False else None if unknown else monte_carlo
        per_byte = nats * found.tokens.sum().item() / math.log(2) / n_bytes if n_bytes else None
        lines.append({
            "name": name, "bound": bound, "nats": nats, "monte_carlo": monte_carlo, "error": None if math.isnan(error) else error,
            "bits_per_byte": per_byte, "perplexity": math.exp(min(nats, 700.0)),
        })  # fmt: skip
    return lines


def show_likelihood(lines, weights):
    number = lambda x, digits: "-" if x is None else f"{x:.{digits}f}"
    print(f"{'':>29} {'nats/token':>13} {'Monte Carlo':>12} {'windows':>9} {'bits/byte':>10} {'perplexity':>11}")
    for r in lines:
        b = r["name"].removeprefix("block ")
        share = f"  ({weights[int(b)]:g})" if b.isdigit() and int(b) in weights and len(weights) > 1 else ""
        mark = {True: "<= ", False: "", None: "~ "}[r["bound"]]
        print(
            f"{r['name'] + share:>29} {mark + number(r['nats'], 4):>13} {number(r['monte_carlo'], 4):>12} {number(r['error'], 4):>9}"
            f" {number(r['bits_per_byte'], 4):>10} {r['perplexity']:>11.4g}"
        )
    print("<= is an upper bound, ~ the plain formula, which noise makes too low, no sign exact. Standard errors: Monte Carlo over other")
    print(
        "draws on these windows, windows over other windows too; - is unknown."
        + " In brackets, the share in training." * (len(weights) > 1)
    )


# ----- quality


def lines_asked(cfg, sampler, trained):
    """[(sampler name, block size, steps or None)] of --samples."""
    names = [cfg.sampler] if sampler else ["ar", "ancestral", "arpc"] if trained[0] == 1 else ["ancestral"]
    lines = []
    for name in names:
        sizes = [b for b in trained if (b == 1) == (name == "ar") and cfg.block_size in (0, b)]
        for b in sizes:
            if SAMPLERS[name] in OWN_PACE:
                if sampler and cfg.steps:
                    die(f"{name} takes as many passes as it needs: --steps means nothing", "leave it out")
                lines += [(name, b, None)]
            elif cfg.steps:
                lines += [(name, b, cfg.steps)]
            else:
                least = 2 if name == "arpc" else 1  # ARPC guides no last step
                lines += [(name, b, n) for n in (1, 2, 4, 8, 16, 32, 64) if least <= n <= b]
    if not lines:
        sizes = ", ".join(map(str, [cfg.block_size] if cfg.block_size else trained))
        die(
            f"{cfg.sampler or 'a sampler'} has no block to fill: block size {sizes}",
            "--sampler ar" if trained[0] == 1 else "--block_size 0",
        )
    return lines


def text_columns(r):
    """correct with its interval, distinct / expected; perplexity with its interval; entropy and distinct n-grams."""
    share = f"{100 * r['accuracy']:.1f} ({100 * r['low']:.1f}-{100 * r['high']:.1f})" if "accuracy" in r else ""
    answers = f"{r['distinct']}/{r['expected']:.0f}" if r.get("expected") else ""
    ppl = f"{r['gen_ppl']:.4g} ({r['ppl_low']:.4g}-{r['ppl_high']:.4g})" if "gen_ppl" in r else ""
    number = lambda x, width: f"{'-' if x is None else f'{x:.3f}':>{width}}"
    grams = " ".join(number(r[f"distinct_{n}"], 7) for n in NGRAMS)
    return f"{share:>18} {answers:>8} {ppl:>22} {number(r['entropy'], 8)} {grams}"


def samples(cfg, sampler, own, run, data, model, process, trained):
    """The table of --samples, as a list of dicts; the first line is real text."""
    prompts = prompts_of(data, cfg.n_eval or len(data.spread("val", 0)), cfg.clues)
    module, tokenizer, device = checker(data.folder), data.tokenizer, next(model.parameters()).device
    asked = lines_asked(cfg, sampler, trained)
    who, score = (None if cfg.judge == "none" else judge(cfg.judge, (model, process, trained), tokenizer, device)) or (None, None)
    has_prompts = any(len(p) for p in prompts)
    print(
        f"{len(prompts)} samples, temperature {cfg.temperature:g}, seed {cfg.seed}"
        + f", with{'' if cfg.clues else 'out'} clues" * has_prompts
        + (f"; perplexity under {who}" if who else "; no judge (--judge)")
    )
    grams = " ".join(f"{f'dist-{n}':>7}" for n in NGRAMS)
    print(
        f"{'sampler':>13} {'block':>6} {'steps':>6} {'NFE':>5} {'a row':>6} {'correct, 95 %':>18} {'distinct':>8}"
        f" {'perplexity, 95 %':>22} {'entropy':>8} {grams} {'tokens/s':>9}"
    )
    rows = real_rows(data, prompts, cfg.max_new_tokens)
    starts = [len(p) for p in prompts]
    real = quality(rows, starts[: len(rows)], tokenizer, module, score)
    count = f" ({len(rows)} texts)" if len(rows) < len(prompts) else ""
    print(f"{'real text' + count:<40} {text_columns(real)}")
    result = [{"sampler": "real text", "n": len(rows), "judge": who, **real}]
    bar = tqdm(asked, desc="sampling", leave=False, file=sys.stderr, disable=None)
    for name, b, steps in bar:
        how = {"block_size": b, "sampler": SAMPLERS[name], "steps": steps, "temperature": cfg.temperature, "trained": trained}
        how |= {"schedule": SCHEDULES[run.schedule], "max_new_tokens": cfg.max_new_tokens or None, **own}
        try:
            rows, cost = generated(model, process, data, prompts, cfg.seed, dtype=getattr(torch, cfg.dtype), **how)
        except ValueError as e:
            bar.close()
            die(str(e), f"python eval.py --sampler {name} --help")
        r = {"sampler": name, "block_size": b, "steps": steps, "n": len(rows), "judge": who, **cost}
        r |= quality(rows, starts, tokenizer, module, score)
        tqdm.write(
            f"{name:>13} {b:>6} {steps or '':>6} {r['nfe']:>5} {r['nfe_row']:>6.1f} {text_columns(r)} {r['tokens_per_s']:>9,.0f}",
            file=sys.stdout,
        )
        result.append(r)
    grams = " and ".join(map(str, NGRAMS))
    print("distinct: different correct answers / as many uniform draws would give. " * (module is not None), end="")
    print(f"entropy of a text's tokens in nats; dist-n: different n-grams / all, n {grams}.")
    return result


# ----- the command


@machine.guard("a smaller --n_eval, or --device=cpu")
def main():
    if asked := {"--sweep", "--sweep=true"} & set(sys.argv[1:]):
        from lab.sweep import main as sweep  # a command of its own; here, because most runs do not want it

        return sweep([word for word in sys.argv[1:] if word not in asked])
    if asked := {"--gsm8k", "--gsm8k=true"} & set(sys.argv[1:]):
        from lab.gsm8k import main as gsm8k

        return gsm8k([word for word in sys.argv[1:] if word not in asked])
    cfg, sampler, own = load_with_sampler(EvalConfig, sys.argv[1:])
    for name, fine, least in (
        ("n_eval", cfg.n_eval == 0 or cfg.n_eval >= 2, "2 or more, 0 for all"),
        ("n_mc", cfg.n_mc == 1 or (cfg.n_mc >= 2 and cfg.n_mc % 2 == 0), "1, or an even number: half of the draws check the other half"),
        ("block_size", cfg.block_size >= 0, "1, 16, ... or 0 for all"),
        ("steps", cfg.steps >= 0, "0 or more"),
        ("max_new_tokens", cfg.max_new_tokens >= 0, "0 or more"),
        ("temperature", 0 <= cfg.temperature < math.inf, "0 or more"),
        ("seed", cfg.seed >= 0, "0 or more"),
        ("dtype", cfg.dtype in ("float32", "bfloat16"), "float32"),
    ):
        if not fine:
            die(f"{name} cannot be {getattr(cfg, name)}", f"--{name} {least}")
    for name in ("sweep", "gsm8k"):
        if getattr(cfg, name):
            die(f"{name} has settings of its own, which a file for eval.py does not hold", f"python eval.py --{name} --ckpt {cfg.ckpt}")
    if cfg.json:
        writable(cfg.json, "json")
    usual, of_texts = EvalConfig(), ("sampler", "steps", "judge", "clues", "max_new_tokens", "temperature", "dtype")
    for name in ("n_mc",) if cfg.samples else of_texts:
        value = getattr(cfg, name)
        if value != getattr(usual, name) and cfg.samples:
            die(f"--{name} is about the likelihood, and this asks for samples", f"--{name} {value} without --samples")
        if value != getattr(usual, name):
            die(f"--{name} is about samples, and this asks for the likelihood", f"--samples --{name} {value}")
    cfg.ckpt = cfg.init_from or cfg.ckpt
    run, meta, step, model, process = restore(cfg.ckpt, cfg.device)
    data, trained = dataset_for(cfg.ckpt, run, meta, model, cfg.dataset), sorted(run.block_sizes)
    if cfg.block_size and cfg.block_size not in trained:
        die(f"{cfg.ckpt} was trained on block sizes {', '.join(map(str, trained))}, not {cfg.block_size}", f"--block_size {trained[-1]}")
    print(f"{data.folder.name}, {run.process}, " + ("published weights" if is_published(cfg.ckpt) else f"EMA weights of step {step}"))
    if cfg.samples:
        lines = samples(cfg, sampler, own, run, data, model, process, trained)
    else:
        weights = {b: run.block_sizes[b] for b in trained if cfg.block_size in (0, b)}
        found = likelihood(model, process, data, list(weights), cfg.n_eval, cfg.n_mc, cfg.seed, progress=True)
        try:
            n_bytes = data.tokenizer.n_bytes(meta["vocab_size"])
        except SystemExit:  # no GPT-2 byte pairs, and it has said so: the rest needs none
            n_bytes = None
        if n_bytes is not None:
            n_bytes = n_bytes[data.windows("val", found.index)[0]][found.answer].sum().item()
        size = f"{found.tokens.sum():,.0f} tokens" + (f", {n_bytes:,.0f} bytes" if n_bytes else "")
        print(f"{len(found.index)} windows of the validation split: {size}; {cfg.n_mc} draws a window, seed {cfg.seed}")
        lines = likelihood_table(found, process, weights, n_bytes, cfg.seed)
        show_likelihood(lines, weights)
    if cfg.json:
        facts = {"ckpt": cfg.ckpt, "dataset": data.folder.name, "process": run.process, "step": step}
        facts |= {"n_eval": cfg.n_eval, "seed": cfg.seed}
        if cfg.samples:
            facts |= {"temperature": cfg.temperature, "dtype": cfg.dtype}
            facts |= {"clues": cfg.clues, "max_new_tokens": cfg.max_new_tokens, "options": own}
        else:
            facts |= {"n_mc": cfg.n_mc}
        Path(cfg.json).write_text(json.dumps(facts | {"lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
