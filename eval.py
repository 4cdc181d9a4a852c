"""
How good is it? The likelihood on the validation split: exact for block size 1, an upper bound for others.

    python eval.py --ckpt out/sudoku       nats, bits per byte, perplexity: a line a block size and mixture

The quality of its texts, and what speed costs in quality, are commands of their own: python -m lab.quality,
lab.sweep, lab.gsm8k.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import hub.published  # noqa: F401  --init_from hf:...
import methods
from data.dataset import charged_tokens, first_charged
from diffusion import token_loss
from options import EvalConfig
from rng import Noise, stratified_draw
from run import checkpoint, machine
from run.cli import die, load_config, writable
from run.restore import dataset_for, noise_name, restore

# ----- likelihood


@dataclass
class Likelihood:
    nats: dict  # block size: (halves, W) float64, by each half of the draws; one half if nothing is drawn
    tokens: torch.Tensor  # (W,) float64: tokens of the text in a window, prompts and padding not counted
    index: torch.Tensor  # (W,) which windows; and which tokens of them, (W, T) bool:
    counted: torch.Tensor


def one_draw(loss, model, process, x0, given, charged, b, u, noise):
    """
    (B, L - start) nats. Their mean over u in (0, 1) and noise is the first term of the upper bound
        -log p(x_0) <= E_{t ~ U(s, 1)} (1 - s) nll(x_t, t)  +  E last_step(x_s),     s = process.t_min
    The second is a function of its own. Block size 1 costs the NLL itself. The integral is the same for every
    noise schedule, and at small t a draw costs 1 / t with probability t: infinite variance. So time runs
    slowly there, t = (√s + (1 - √s) u)². Masked noise on a network that does not see t needs no t at all: the
    bound is a mean over m = 1..n masks among the n charged tokens of a block (LLaDA, arXiv 2502.09992),
        E_m n / m sum over m masks at random places of -log p(x_0 | x_t)
    loss: token_loss, or a method's bound. u (B,) float64; noise for positions start, start + 1, ..., where
        start is first_charged.
    """
    start = first_charged(charged, b)
    how = {"given": given, "charged": charged, "start": start, "noise": noise}
    if b == 1:
        return loss(model, process, x0, 1, u, "elbo", **how)[1]
    if process.count_form and model.timeless:
        open = charged[:, start:].unflatten(1, (-1, b))  # (B, N, b)
        n = open.sum(-1, keepdim=True).clamp(min=1)
        m = (u[:, None, None] * n.cpu()).ceil()  # times stay on the CPU: some devices have no float64
        rank = noise.uniform(1)[..., 0].view(open.shape).masked_fill(~open, 2.0).argsort(-1).argsort(-1)
        how["noise"] = Ranks(((rank + 0.5) / n).flatten(1))  # below m / n: m of them
        return loss(model, process, x0, b, (m / n.cpu()).expand(open.shape).flatten(1), "elbo", **how)[1]
    root = math.sqrt(process.t_min)
    at = lambda u: root + (1 - root) * u
    slow = lambda u: (1 - at(u) ** 2, -2 * (1 - root) * at(u))
    return loss(model, process, x0, b, u, "elbo", schedule=slow, **how)[1]


class Ranks:
    """A Noise whose numbers (B, L) are made already, for Masked.corrupt."""

    def __init__(self, u):
        self.u = self.key = u

    def uniform(self, n):
        return self.u[..., None]

    def to(self, device):
        return self


def last_step(loss, model, process, x0, given, charged, b, noise):
    """The rest of a bound that ends at t > 0, (B, L - start): -log p(x_0 | x_t) at t = process.t_min."""
    end = lambda u: (torch.full_like(u, 1 - process.t_min), torch.zeros_like(u))
    u, start = torch.zeros(len(x0), dtype=torch.float64), first_charged(charged, b)
    return loss(model, process, x0, b, u, "last", given, charged, schedule=end, start=start, noise=noise)[1]


def times(n, k, seed, b, half):
    """(n, k) float64: k times a window, one in each k-th of (0, 1); of all n k, one in each of n k slices."""
    u = Noise(seed, torch.tensor([-3 - half]), torch.arange(n), b).uniform(2)[0]
    start = (u[:, 0].argsort().argsort() + u[:, 1]) / n
    return ((torch.arange(k) + start[:, None]) / k).clamp(1e-9, 1 - 1e-9)


@torch.no_grad()
def likelihood(model, process, data, block_sizes, n_eval=512, n_mc=8, seed=0, progress=False, share=(0, 1),
               clean_padding=False, method=None, skip=0):  # fmt: skip
    """
    A Likelihood of the validation split, whatever loss the model was trained with. Block size 1: the exact
    NLL (a bound with random_ar). Larger: an upper bound by n_mc draws a window, in two independent halves;
    n_mc 1: one draw and one half.
    share (rank, world): as one of several processes that all call this, do a share of the work; the result is
    the same for all.
    clean_padding: show padding clean and never charge it, as published: no bound then. method: a module with
        a `bound` of its own. skip: the first tokens of a window are read and not counted.
    """
    device, index = next(model.parameters()).device, data.spread("val", n_eval)
    loss = getattr(method, "bound", None) or getattr(model, "token_loss", token_loss)
    x0, given, real = data.windows("val", index)
    given = given | (torch.arange(data.seq_len) < skip)
    if not data.row_len:  # n_eval 0: of the last window, what the one before has not had
        seen = (index[:-1] + data.seq_len - index[1:]).clamp(min=0)
        given = given | (torch.arange(data.seq_len) < torch.cat((seen.new_zeros(1), seen))[:, None])
    # fewer of a large network
    batch_size = max(1, min(64, -(-len(index) // share[1]), (1 << 26) // (data.seq_len * process.vocab_size)))
    batches = torch.arange(len(index)).split(batch_size)
    exact = {b for b in block_sizes if b == 1 and process.exact_ar}
    halves, draws = (1, 1) if n_mc == 1 else (2, n_mc // 2)
    total = sum(1 if b in exact else halves * draws for b in block_sizes) * len(batches)
    bar = tqdm(total=total, desc="likelihood", leave=False, disable=None if progress else True)
    nats = {}
    for b in block_sizes:
        nats[b] = torch.zeros(1 if b in exact else halves, len(index), dtype=torch.float64)
        for h, half in enumerate(nats[b]):
            k = 1 if b in exact else draws
            u = times(len(index), k, seed, b, h)
            # all as many: under FSDP they meet in a layer
            for turn in range(share[0], -(-len(batches) // share[1]) * share[1], share[1]):
                rows, mine = batches[turn % len(batches)], turn < len(batches)
                shown, charged = charged_tokens(given[rows], real[rows], b, clean_padding)
                x, shown, charged = x0[rows].to(device), shown.to(device), charged.to(device)
                positions = torch.arange(first_charged(charged, b), data.seq_len, device=device)
                first = (b * 2 + h) * (draws + 1)
                noise = [Noise(seed, rows.to(device), positions, first + i) for i in range(k + 1)]
                for i in range(k):
                    drawn = one_draw(loss, model, process, x, shown, charged, b, u[rows, i], noise[i])
                    half[rows] += drawn.cpu().double().sum(1) / k if mine else 0.0
                    bar.update()
                if b > 1 and process.t_min > 0:
                    rest = last_step(loss, model, process, x, shown, charged, b, noise[k])
                    half[rows] += rest.cpu().double().sum(1) if mine else 0.0
        if share[1] > 1:
            dist.all_reduce(nats[b])
    bar.close()
    counted = real & ~given
    return Likelihood(nats, counted.sum(1).double(), index, counted)


def estimate(halves, tokens):
    """
    (nats per token, its Monte Carlo standard error, its standard error over windows) of nats (halves, W) and
    tokens (W,). The first error is about other draws on these windows: half the difference of two independent
    halves has the variance of their mean, and spreading times over windows (see times) makes it rather too
    large. The second is about other windows, taken as independent, and contains the first. nan where one
    half, or one window, cannot tell; 0 where nothing is drawn is the caller's to know. Windows without a
    single token cost nothing, 0 nats.
    """
    each, total, n = halves.mean(0), tokens.sum().clamp(min=1), len(tokens)
    mean = each.sum() / total
    apart = (halves[0] - halves[1]).square().sum().sqrt().item() if len(halves) > 1 else math.nan
    monte_carlo = apart / 2 / total.item()
    error = (each - mean * tokens).std().item() * math.sqrt(n) / total.item() if n > 1 else math.nan
    return mean.item(), monte_carlo, error


def mixture_bounds(nats, weights, seed=0):
    """
    What a network that draws a block size k with probability w_k for each window is worth, from nats l_k =
    -log p_k or bounds on it: {name: (halves, W) nats}, all but the plug-in upper bounds on -log sum_k w_k p_k
    (names of the release of arXiv 2606.02241):
        mc1          l_k of one size drawn for each window
        Jensen       sum_k w_k l_k
        log-sum-exp  min over shares r of  sum_k r_k (l_k + log(r_k / w_k)),  the -log sum_k w_k exp(-l_k)
    l_k is known by draws, and the log-sum-exp of noisy numbers is too low on average: the minimum likes what
    was lucky. With the shares of one half of the draws and the l_k of the other it is an upper bound again,
    in expectation; "plug-in" is the plain formula.
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


def bounds(model, process, data, cfg, share=(0, 1), method=None):
    """
    {block size: (nats per token, standard error over windows)} by one draw a window: what training shows.
    cfg: a TrainConfig.
    """
    how = {"share": share, "clean_padding": cfg.clean_padding, "method": method}
    found = likelihood(model, process, data, cfg.block_sizes, cfg.n_eval, n_mc=1, **how)
    return {b: estimate(halves, found.tokens)[::2] for b, halves in found.nats.items()}


def show_bounds(result, process):
    """One line; `<=` stands before what is a bound and not the exact NLL."""
    exact = {1} if process.exact_ar else set()
    return " | ".join(
        f"block {b}: {'' if b in exact else '<= '}{mean:.4f} +- {error:.4f} nats/token"
        for b, (mean, error) in result.items()
    )


def likelihood_table(found, process, weights, n_bytes, seed):
    """
    A dict a line: every block size, and the mixture where `weights` has several. n_bytes: bytes of text in
    the tokens counted, or None.
        nats, monte_carlo, error   as estimate gives them; monte_carlo None: unknown, 0: nothing was drawn
        bound   an upper bound; False: exact. None: neither
        bits_per_byte, perplexity  of nats
    """
    lines = []
    entries = {f"block {b}": (halves, b != 1 or not process.exact_ar) for b, halves in found.nats.items()}
    if len(weights) > 1:
        mixture = mixture_bounds({b: found.nats[b] for b in weights}, weights, seed)
        entries |= {
            f"mixture, {name}": (halves, None if "plug-in" in name else True)
            for name, halves in mixture.items()
        }
    for name, (halves, bound) in entries.items():
        nats, monte_carlo, error = estimate(halves, found.tokens)
        # more varies than their halves show
        unknown = math.isnan(monte_carlo) or name.endswith(("mc1", "log-sum-exp", "plug-in"))
        monte_carlo = 0.0 if bound is False else None if unknown else monte_carlo
        per_byte = nats * found.tokens.sum().item() / math.log(2) / n_bytes if n_bytes else None
        error = None if math.isnan(error) else error
        line = {"name": name, "bound": bound, "nats": nats, "monte_carlo": monte_carlo, "error": error}
        lines.append(line | {"bits_per_byte": per_byte, "perplexity": math.exp(min(nats, 700.0))})
    return lines


def show_likelihood(lines, weights):
    number = lambda x, digits: "-" if x is None else f"{x:.{digits}f}"
    print(
        f"{'':>29} {'nats/token':>13} {'Monte Carlo':>12} {'windows':>9} {'bits/byte':>10} {'perplexity':>11}"
    )
    for r in lines:
        b = r["name"].removeprefix("block ")
        share = f"  ({weights[int(b)]:g})" if b.isdigit() and int(b) in weights and len(weights) > 1 else ""
        mark = {True: "<= ", False: "", None: "~ "}[r["bound"]]
        print(
            f"{r['name'] + share:>29} {mark + number(r['nats'], 4):>13} {number(r['monte_carlo'], 4):>12}"
            f" {number(r['error'], 4):>9} {number(r['bits_per_byte'], 4):>10} {r['perplexity']:>11.4g}"
        )
    print(
        "<= is an upper bound, ~ the plain formula, which noise makes too low, no sign exact. "
        "Standard errors: Monte Carlo over other\n"
        "draws on these windows, windows over other windows too; - is unknown."
        + " In brackets, the share in training."
        * (len(weights) > 1)
    )


# ----- the command

MOVED = {"samples": "lab.quality", "sweep": "lab.sweep", "gsm8k": "lab.gsm8k"}


@machine.guard("a smaller --n_eval, or --device=cpu")
def main():
    for word in sys.argv[1:]:
        flag = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and flag in MOVED:
            die(f"--{flag} is a command of its own now", f"python -m {MOVED[flag]} --ckpt ...")
    cfg = load_config(EvalConfig, sys.argv[1:])
    halves = cfg.n_mc == 1 or (cfg.n_mc >= 2 and cfg.n_mc % 2 == 0)
    for name, fine, least in (
        ("n_eval", cfg.n_eval == 0 or cfg.n_eval >= 2, "2 or more, 0 for all"),
        ("n_mc", halves, "1, or an even number: half of the draws check the other half"),
        ("block_size", cfg.block_size >= 0, "1, 16, ... or 0 for all"),
        ("seed", 0 <= cfg.seed < 2**62, "0 or more, below 2^62"),
    ):
        if not fine:
            die(f"{name} cannot be {getattr(cfg, name)}", f"--{name} {least}")
    if cfg.json:
        writable(cfg.json, "json", b'{\n "ckpt"')
    cfg.ckpt, flag = cfg.init_from or cfg.ckpt, "--init_from" if cfg.init_from else "--ckpt"
    changes = cfg.weights, cfg.rope_factor, cfg.seq_len
    run, meta, step, model, process = restore(cfg.ckpt, cfg.device, cfg.plain, flag, *changes)
    if not 0 <= cfg.skip < run.seq_len:
        die(f"skip cannot be {cfg.skip}: a window has {run.seq_len} tokens", f"--skip {run.seq_len // 2}")
    data, trained = dataset_for(cfg.ckpt, run, meta, model, cfg.dataset), sorted(run.block_sizes)
    if cfg.block_size and cfg.block_size not in trained:
        die(
            f"{cfg.ckpt} was trained on block sizes {', '.join(map(str, trained))}, not {cfg.block_size}",
            f"--block_size {trained[-1]}",
        )
    weights_of = "published weights" if checkpoint.is_foreign(cfg.ckpt) else f"EMA weights of step {step}"
    print(f"{data.folder.name}, {noise_name(run)}, {weights_of}")
    if run.clean_padding:
        print("padding is shown clean, as these weights were trained: ", end="")
        print("its figures for blocks above 1 are no bounds")
    weights = {b: run.block_sizes[b] for b in trained if cfg.block_size in (0, b)}
    how = {"progress": True, "clean_padding": run.clean_padding, "method": methods.load(run.method)}
    how["skip"] = cfg.skip
    found = likelihood(model, process, data, list(weights), cfg.n_eval, cfg.n_mc, cfg.seed, **how)
    try:
        n_bytes = data.tokenizer.n_bytes(meta["vocab_size"])
    except SystemExit:  # no GPT-2 byte pairs, and it has said so: the rest needs none
        n_bytes = None
    if n_bytes is not None:
        n_bytes = n_bytes[data.windows("val", found.index)[0]][found.counted].sum().item()
    size = f"{found.tokens.sum():,.0f} tokens" + (f", {n_bytes:,.0f} bytes" if n_bytes else "")
    draws = f"{cfg.n_mc} draws a window, seed {cfg.seed}"
    print(f"{len(found.index)} windows of the validation split: {size}; {draws}")
    lines = likelihood_table(found, process, weights, n_bytes, cfg.seed)
    show_likelihood(lines, weights)
    if cfg.json:
        facts = {"ckpt": cfg.ckpt, "dataset": data.folder.name, "process": noise_name(run), "step": step}
        facts |= {"n_eval": cfg.n_eval, "seed": cfg.seed, "n_mc": cfg.n_mc, "lines": lines}
        Path(cfg.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
