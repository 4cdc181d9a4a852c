"""
How fast is it, and than what? Ours against the textbook form with the same weights, interleaved in one run.

    python bench.py --train --sample [--json FILE]
    python bench.py --duo                             Duo's soft tokens at vocabularies of 128, 50,000 and 250,000
    python bench.py --growth 8192 --plot docs/speed.png    how the cost of training and of generating grows with the length
    python bench.py --kernels                         kernels.py and draws.py against eager PyTorch, torch.compile and Liger

The textbook form sends [x0 | xt] through every layer whole, with a dense boolean mask per layer and the head on all 2T
tokens; its loss takes a log-softmax of everything (uniform: r and r_hat over the whole vocabulary); its sampler builds dense
float64 posteriors and a float64 Gumbel for every entry, and grows its cache by concatenation. Its AdamW is torch's default, ours fused.
"""

import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

import diffusion as d
import duo
import kernels
import plots
from draws import sample
from generate import generate
from machine import peak_mb, pick_device, runs_on
from model import ModelConfig, Transformer, attention_mask
from settings import die, load_config, writable


@dataclass
class BenchConfig:
    train: bool = False  # one optimizer step
    sample: bool = False  # one batch of text
    duo: bool = False  # from clean ids to the vectors of noisy tokens: hard, soft by k Gaussians, soft by V of them
    growth: int = 0  # up to so many tokens: a training step's time a token, and generation's time a block
    plot: str = ""  # of --growth: a picture
    kernels: bool = False  # losses and draws at GPT-2's vocabulary: time, bandwidth, memory
    rows: int = 0  # of logits, for --kernels; 0: 32768 on a GPU, 256 on a CPU
    json: str = ""  # also write the table here
    repeats: int = 7  # medians over so many, ours and theirs in turn
    n_layers: int = 4
    d_model: int = 128
    vocab_size: int = 65
    seq_len: int = 128
    block_size: int = 16
    batch_size: int = 8
    device: str = "auto"


# ----- the textbook form


def textbook_forward(model, clean, noisy, block_size, start=0, sigma=None, cache=None):
    """model.forward without its savings: every token through every layer and the head, a dense mask, adaLN written out a token."""
    n_past = cache.length if cache is not None else 0
    C, N, device = clean.size(1), noisy.size(1), noisy.device
    position = torch.cat((torch.arange(n_past, n_past + C), torch.arange(start, start + N))).to(device)
    cond = None if model.time is None else model._condition(sigma, C)
    each = lambda m: torch.cat((m[:, :1].expand(-1, C, -1), m[:, -1:].expand(-1, N, -1)), dim=1)  # one vector a stream to one a token
    mask = attention_mask(block_size, n_past, C, N, start, device=device)[:, None]
    x = model.embed(torch.cat((clean, noisy), 1))
    for i, layer in enumerate(model.layers):
        m = None if cond is None else [each(y) for y in layer.modulation(cond).chunk(6, dim=-1)]
        x = textbook_layer(layer, x, model._rope(position), mask, m, cache, i)
    if cache is not None:
        cache.commit(C)
    x = model.norm(x)
    if cond is not None:
        shift, scale = model.modulation(cond[:, -1:]).chunk(2, -1)
        x = x * (1 + scale) + shift
    return model.head(x)[:, C:]


def textbook_layer(layer, x, rope, mask, m, cache, i):
    """model.Layer as the papers write it."""
    shift1, scale1, gate1, shift2, scale2, gate2 = m or [None] * 6
    heads = lambda y: y.unflatten(-1, (layer.n_heads, -1)).transpose(1, 2)
    h = layer.norm1(x) * (1 + scale1) + shift1 if m else layer.norm1(x)
    q, k, v = map(heads, layer.qkv(h).chunk(3, dim=-1))
    turned = []
    for a, b in (y.chunk(2, dim=-1) for y in (q, k)):
        turned.append(torch.cat((a * rope[0] - b * rope[1], b * rope[0] + a * rope[1]), dim=-1))
    k, v = (turned[1], v) if cache is None else cache.extend(i, turned[1], v)
    y = torch.nn.functional.scaled_dot_product_attention(turned[0], k, v, attn_mask=mask)
    y = layer.out(y.transpose(1, 2).flatten(2))
    x = x + gate1 * y if m else x + y
    h = layer.norm2(x) * (1 + scale2) + shift2 if m else layer.norm2(x)
    return x + gate2 * layer.mlp(h) if m else x + layer.mlp(h)


class GrowingCache:
    """Keys and values by concatenation, the interface of model.KVCache."""

    def __init__(self, n_layers):
        self.length, self.k, self.v, self.new = 0, [None] * n_layers, [None] * n_layers, [None] * n_layers

    def extend(self, i, k, v):
        self.new[i] = (k, v) if self.k[i] is None else (torch.cat((self.k[i], k), 2), torch.cat((self.v[i], v), 2))
        return self.new[i]

    def commit(self, n):
        self.length += n
        self.k, self.v = [k[:, :, : self.length] for k, _ in self.new], [v[:, :, : self.length] for _, v in self.new]


def textbook_loss(process, logits, x0, xt, alpha, dalpha):
    """The sums of Masked.nll and Uniform.nll written out, one (B, L, V) float32 tensor after another. alpha, dalpha (B, 1)."""
    if isinstance(process, d.Masked):
        logp = logits.index_fill(-1, torch.tensor(process.mask_id, device=logits.device), -1e6).log_softmax(-1)
        seen = torch.full_like(logp, -1e6).scatter(-1, xt[..., None], 0.0)
        logp = torch.where((xt == process.mask_id)[..., None], logp, seen)
        return -dalpha / (1 - alpha) * -logp.gather(-1, x0[..., None])[..., 0]
    V, a = process.vocab_size, alpha[..., None].to(logits.dtype)  # a float64 alpha would make every tensor below float64
    p = process.loo_logits(logits, xt, alpha).softmax(-1)
    xb, xb_hat = V * a * torch.nn.functional.one_hot(x0, V) + 1 - a, V * a * p + 1 - a
    z = xt[..., None]
    r, r_hat = xb / xb.gather(-1, z), xb_hat / xb_hat.gather(-1, z)
    return -dalpha / (V * alpha) * (r * (r / r_hat).log() - r + r_hat).sum(-1)


@torch.no_grad()
def textbook_generate(model, process, B, T, b, steps):
    x = process.prior((B, T), device=model.embed.weight.device)
    cache, grid = GrowingCache(len(model.layers)), torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    for i in range(0, T, b):
        for step in range(steps):
            clean = x[:, cache.length : i]
            logits = textbook_forward(model, clean, x[:, i : i + b], b, i, d.sigma(grid[step]).expand(B), cache)
            probs = process.posterior_probs(logits, x[:, i : i + b], grid[step], grid[step + 1])
            x[:, i : i + b] = (probs.log() - torch.empty_like(probs).exponential_().log()).argmax(-1)
    return x


# ----- the jobs


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


def job_pair(cfg, process, device, what):
    torch.manual_seed(0)
    B, T, b = cfg.batch_size, cfg.seq_len, cfg.block_size
    shape = ModelConfig(process.vocab_size, T, cfg.n_layers, 4, cfg.d_model, time_conditioning=isinstance(process, d.Uniform))
    model = Transformer(shape).to(device)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    if what == "sample":
        model.eval()

        def ours():
            for _ in generate(model, process, [()] * B, block_size=b, max_new_tokens=T):
                pass

        return {"ours": ours, "textbook": lambda: textbook_generate(model, process, B, T, b, b)}

    x0 = torch.randint(cfg.vocab_size, (B, T), device=device)
    t = d.stratified_draw({b: 1.0}, B, 0, 0)[1]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.0, fused=True), torch.optim.AdamW(model.parameters(), lr=0.0)]

    def finish(loss, optimizer):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def ours():
        finish(d.token_loss(model, process, x0, b, t, "elbo")[0] / x0.numel(), optimizers[0])

    def textbook():
        alpha, dalpha = (y[:, None].to(device) for y in d.loglinear(t))
        xt = process.corrupt(x0, alpha)
        logits = textbook_forward(model, x0, xt, b, 0, d.sigma(alpha[:, 0]))
        finish(textbook_loss(process, logits, x0, xt, alpha, dalpha).mean(), optimizers[1])

    return {"ours": ours, "textbook": textbook}


def soft_tokens(cfg, V, k, threads):
    """(milliseconds of each run, peak MB above what the process and the embeddings take) of one batch. k None: hard tokens."""
    torch.set_num_threads(threads)
    device = pick_device(cfg.device)[0]
    process = d.Uniform(V)
    embed = torch.randn(V, cfg.d_model, device=device)
    x0, t = torch.randint(V, (cfg.batch_size, cfg.seq_len), device=device), torch.rand(cfg.batch_size, dtype=torch.float64)
    relaxation = None if k is None else duo.Relaxation(process, 1e-3, k)

    def job():
        if k is None:
            return embed[process.corrupt(x0, 1 - t)]
        soft = relaxation.corrupt(x0, t)[0]
        return soft @ embed if k == 0 else (soft[1][..., None, :] @ embed[soft[0]])[..., 0, :]

    before = peak_mb(device)
    return medians({"": job}, cfg.repeats, device)[""], peak_mb(device) - before


def duo_table(cfg):
    print(f"one batch of {cfg.batch_size} x {cfg.seq_len} tokens to vectors of {cfg.d_model}; median [min, max] ms, and peak memory")
    rows = []
    for V in (128, 50_000, 250_000):
        for k in (None, 2, 4, 8, 0):
            name = "hard" if k is None else f"{k} Gaussians a token" if k else f"{V} Gaussians a token"
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a fresh process: peaks do not go down again
                try:
                    ms, mb = pool.submit(soft_tokens, cfg, V, k, torch.get_num_threads()).result()
                except (BrokenProcessPool, RuntimeError) as e:  # killed, or told that there is no more
                    print(f"V {V:>7,}  {name:>24}  out of memory ({type(e).__name__})")
                    continue
            print(f"V {V:>7,}  {name:>24}  {statistics.median(ms):8.1f} [{min(ms):.1f}, {max(ms):.1f}] ms  {mb:8,.0f} MB")
            rows.append({"job": "duo", "V": V, "k": k, "ms": statistics.median(ms), "peak_mb": mb})
    return rows


# ----- growth

SCORED = 2048  # textbook attention holds (2 T)^2 scores a head and a row: beyond this length it is not tried


def growth_table(cfg, device):
    """Rows of two kinds: microseconds a token of a training step at lengths 128, 256, ...; milliseconds a block behind so many tokens."""
    rows, T = [], 128
    print("training, 8192 tokens a step; median [min, max] microseconds a token, and our share of a step beyond that of T = 128")
    while T <= cfg.growth:
        at = replace(cfg, seq_len=T, batch_size=max(1, 8192 // T))
        jobs = job_pair(at, d.Masked(cfg.vocab_size + 1, cfg.vocab_size), device, "train")
        times = medians(jobs if T <= SCORED else {"ours": jobs["ours"]}, cfg.repeats, device)
        per = {k: [1000 * ms / at.batch_size / T for ms in v] for k, v in times.items()}
        rows.append({"job": "growth train", "T": T, **{f"{k}_us": statistics.median(v) for k, v in per.items()}})
        beyond = 1 - rows[0]["ours_us"] / rows[-1]["ours_us"]
        print(f"T {T:>5}  " + "  ".join(f"{k} {statistics.median(v):7.1f} [{min(v):.1f}, {max(v):.1f}]" for k, v in per.items()), end="")
        print(f"  {100 * beyond:.0f} %")
        T *= 2
    torch.manual_seed(0)
    model = Transformer(ModelConfig(cfg.vocab_size + 1, cfg.growth, cfg.n_layers, 4, cfg.d_model)).to(device).eval()
    torch.nn.init.normal_(model.head.weight, std=0.02)
    clock, ms = time.perf_counter(), []
    steps = min(4, cfg.block_size)
    states = generate(model, d.Masked(cfg.vocab_size + 1, cfg.vocab_size), [()], block_size=cfg.block_size, steps=steps)
    for state in tqdm(states, total=cfg.growth // cfg.block_size * (steps + 2), leave=False):
        if state.finished and state.span[1]:
            ms.append(1000 * (time.perf_counter() - clock))
            clock = time.perf_counter()
    print(f"generating one text in blocks of {cfg.block_size}, {steps} steps each; median [min, max] milliseconds a block")
    group = max(1, len(ms) // 16)
    for i in range(0, len(ms) - group + 1, group):
        part = ms[i : i + group]
        rows.append({"job": "growth sample", "behind": i * cfg.block_size, "ms": statistics.median(part)})
        print(f"behind {i * cfg.block_size:>5} tokens  {statistics.median(part):6.1f} [{min(part):.1f}, {max(part):.1f}]")
    return rows


def growth_plot(rows, path):
    plt = plots.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    train = [r for r in rows if r["job"] == "growth train"]
    for who in ("ours", "textbook"):
        has = [r for r in train if f"{who}_us" in r]
        left.plot([r["T"] for r in has], [r[f"{who}_us"] for r in has], marker="o", label=who)
    left.set(xscale="log", yscale="log", xlabel="tokens of a row", ylabel="microseconds a token", title="a training step")
    left.legend()
    text = [r for r in rows if r["job"] == "growth sample"]
    right.plot([r["behind"] for r in text], [r["ms"] for r in text], marker="o")
    right.set(xlabel="tokens behind the block", ylabel="milliseconds a block", title="generation", ylim=(0, None))
    plots.save(figure, path)


# ----- kernels

V_GPT2, D_GPT2 = 50_258, 768  # with a mask; the width of the published networks
MOVED = {  # logits read and written, in multiples of N V; what their docstrings count
    "cross_entropy": 3, "uniform_nll": 4, "linear cross_entropy": 6, "linear uniform_nll": 7, "sample": 1, "sample uniform q": 1,
}  # fmt: skip
RIVALS = ("eager", "torch.compile", "Liger")


def kernel_job(what, who, N, V, C, dtype, device):
    """A callable that runs one job once. Losses with their gradients; eager is the textbook form."""
    torch.manual_seed(0)
    x0, xt = torch.randint(V, (2, N), device=device)
    w, a = torch.rand(N, device=device), 0.05 + 0.9 * torch.rand(N, device=device, dtype=torch.float64)
    process, linear = d.Uniform(V), what.startswith("linear")
    one = lambda x: x[None]
    if linear:
        inputs = [torch.randn(*shape, device=device).mul_(0.1).to(dtype).requires_grad_() for shape in ((N, C), (V, C), (V,))]
    else:
        inputs = [torch.randn(N, V, device=device).to(dtype).requires_grad_(not what.startswith("sample"))]
    z = inputs[0]

    def gumbel(p):
        return (p.log() - torch.empty_like(p).exponential_().log()).argmax(-1)

    ours = {
        "cross_entropy": lambda z, rows: kernels.cross_entropy(z, x0[rows], w[rows], overwrite=True)[0],
        "uniform_nll": lambda z, rows: kernels.uniform_nll(z, x0[rows], xt[rows], a[rows], -1.0, w[rows], overwrite=True),
    }
    eager = {
        "cross_entropy": lambda z: w * torch.nn.functional.cross_entropy(z.float(), x0, reduction="none"),
        "uniform_nll": lambda z: w * textbook_loss(process, *map(one, (z.float(), x0, xt, a)), -1.0)[0],
        "sample": lambda z: gumbel(z.double().softmax(-1)),
        "sample uniform q": lambda z: gumbel(process.posterior_probs(one(z), one(xt), one(a / 2), one(a))),
    }
    name = what.removeprefix("linear ")
    if who == "ours" and what.startswith("sample"):
        noise = d.Noise(0, torch.arange(1, device=device), torch.arange(N, device=device))
        if what == "sample":
            return lambda: sample(z, noise.keys()[0])
        return lambda: process.posterior_sample(one(z), one(xt), one(a / 2), one(a), noise=noise)
    if who == "ours":
        everything = slice(0, N)
        loss = lambda: kernels.through_head(*inputs, ours[name])[0] if linear else ours[name](z, everything).sum()
    elif who == "Liger":
        from liger_kernel.transformers import functional as liger  # pip install liger-kernel

        loss = {
            "cross_entropy": lambda: liger.liger_cross_entropy(z, x0, reduction="sum"),
            "linear cross_entropy": lambda: liger.liger_fused_linear_cross_entropy(z, inputs[1], x0, inputs[2], reduction="sum"),
        }[what]
    else:
        f = eager[name]
        g = (lambda *x: f(torch.nn.functional.linear(*x)).sum()) if linear else (lambda z: f(z).sum() if z.requires_grad else f(z))
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
    print(f"{N} x {V_GPT2} logits, hidden states of {D_GPT2}; {runs_on(device)}; a copy moves {copy:,.0f} GB/s")
    rows = []
    for dtype in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
        for what, moved in MOVED.items():
            moved = moved * N * V_GPT2 * (4 if dtype == "float32" or what.startswith("linear") else 2) / 1e9
            for who in ("ours", *RIVALS):
                if who == "Liger" and (device.type != "cuda" or not what.endswith("cross_entropy")):
                    continue
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a fresh process: peaks do not go down again
                    try:
                        ms, mb = pool.submit(kernel_time, cfg, what, who, N, dtype, torch.get_num_threads()).result()
                    except Exception as e:  # no Liger, no compiler, no memory: the others still count
                        print(f"{dtype} {what:>21} {who:>13}  {type(e).__name__}: {str(e).strip().splitlines()[:1]}")
                        continue
                t = statistics.median(ms)
                speed = (
                    f"{moved:6.2f} GB {1000 * moved / t:6,.0f} GB/s {100 * 1000 * moved / t / copy:3.0f} %" if who == "ours" else " " * 26
                )
                print(f"{dtype} {what:>21} {who:>13} {t:9.2f} [{min(ms):.2f}, {max(ms):.2f}] ms  {speed}  {mb:7,.0f} MB")
                rows.append(
                    {"job": what, "by": who, "dtype": dtype, "rows": N, "ms": t, "peak_mb": mb, "moved_gb": moved, "copy_gb_s": copy}
                )
    return rows


def main():
    cfg = load_config(BenchConfig, sys.argv[1:])
    if not (cfg.train or cfg.sample or cfg.duo or cfg.kernels or cfg.growth):
        die("nothing to measure", "python bench.py --train --sample")
    if min(vars(cfg)[k] for k in ("repeats", "n_layers", "d_model", "vocab_size", "seq_len", "block_size", "batch_size")) < 1:
        die("every size must be at least 1", "python bench.py --train --block_size=16 --seq_len=128")
    if cfg.growth and (cfg.growth < 128 or cfg.growth % cfg.block_size or 128 % cfg.block_size):
        die(f"growth up to {cfg.growth} tokens in blocks of {cfg.block_size}", "python bench.py --growth 8192")
    if cfg.plot:
        writable(cfg.plot, "plot"), plots.pyplot()
    if cfg.rows < 0:
        die(f"rows is {cfg.rows}", "python bench.py --kernels --rows=256")
    if cfg.seq_len % cfg.block_size or cfg.d_model % 8:
        die(
            f"block size {cfg.block_size} must divide seq_len {cfg.seq_len}, and 8 must divide d_model {cfg.d_model}",
            "python bench.py --train",
        )
    if cfg.json and not os.path.isdir(os.path.dirname(cfg.json) or "."):
        die(f"no folder for {cfg.json}", "--json bench.json")
    device = pick_device(cfg.device)[0]
    a = torch.randn(2048, 2048, device=device)
    matmul = statistics.median(medians({"matmul": lambda: a @ a}, 5, device)["matmul"])
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32; 2048^3 matmul {matmul:.1f} ms")
    table = []
    if cfg.train or cfg.sample:
        print(f"{cfg.n_layers} layers, d {cfg.d_model}, V {cfg.vocab_size}, batch {cfg.batch_size} x {cfg.seq_len}, block {cfg.block_size}")
        print(f"median [min, max] of {cfg.repeats}")
    for what in [w for w in ("train", "sample") if getattr(cfg, w)]:
        for name, process in (
            ("masked", d.Masked(cfg.vocab_size + 1, cfg.vocab_size)),
            ("uniform", d.Uniform(cfg.vocab_size, "denoiser")),
        ):
            times = medians(job_pair(cfg, process, device, what), cfg.repeats, device)
            row = {"job": what, "process": name, "matmul_ms": matmul, **{f"{k}_ms": statistics.median(v) for k, v in times.items()}}
            row["ratio"] = row["textbook_ms"] / row["ours_ms"]
            row["tokens_per_s"] = 1000 * cfg.batch_size * cfg.seq_len / row["ours_ms"]
            spread = "  ".join(f"{k} {statistics.median(v):7.1f} [{min(v):.1f}, {max(v):.1f}] ms" for k, v in times.items())
            print(f"{what:>6} {name:>8}  {spread}  textbook / ours {row['ratio']:.2f}  {row['tokens_per_s']:,.0f} tokens/s")
            table.append(row)
    table += duo_table(cfg) if cfg.duo else []
    table += kernel_table(cfg, device) if cfg.kernels else []
    if cfg.growth:
        table += growth_table(cfg, device)
        if cfg.plot:
            growth_plot(table, cfg.plot)
    if cfg.json:
        with open(cfg.json, "w") as f:
            json.dump({"settings": vars(cfg), "torch": torch.__version__, "device": str(device), "rows": table}, f, indent=1)


if __name__ == "__main__":
    main()
