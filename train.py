"""
How does it learn? One loop, top to bottom, settings first.

    python train.py config/sudoku.toml                                      one process, whatever device is there
    torchrun --standalone --nproc_per_node=4 train.py config/sudoku.toml    one process a GPU

The dial is block_sizes, a distribution over block sizes: 1:1 is AR, 256:1 with seq_len 256 is plain diffusion, 16:1 is block
diffusion, 1:0.25,16:0.75 is a mixture that does all of it. Every row of a batch has its own block size.
"""

import copy
import functools
import gc
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import duo
import kernels
from dataset import Dataset
from diffusion import SCHEDULES, stratified_draw, token_loss
from draws import Noise
from eval import bounds, show_bounds
from generate import NOTHING, generate
from settings import die, load_config, parse_dict


@dataclass
class TrainConfig:
    dataset: str = "shakespeare_char"  # a folder under data/ with train.bin, val.bin, meta.json
    out_dir: str = "out/run"  # ckpt.pt and log.jsonl go here; an earlier run there is renamed, not lost
    resume: bool = False  # go on from out_dir/ckpt.pt
    # what is learned
    process: str = "masked"  # masked or uniform noise; duo: uniform with a Gaussian curriculum, see duo.py
    block_sizes: dict = field(default_factory=lambda: {1: 0.25, 16: 0.75})  # size:weight,...: the share of rows trained with each
    objective: str = "ce"  # ce, elbo or ce_noisy; or by block size, 4:elbo,16:ce. Size 1 is exact whatever this says
    schedule: str = "loglinear"  # of the noise: loglinear or cosine
    time_conditioning: str = "auto"  # the noisy stream sees the noise level: true, false, auto (uniform, duo: true)
    predicts: str = "auto"  # uniform: denoiser (what ce teaches; elbo can) or loo (elbo; ce_noisy is used so too); auto: by objective
    random_ar: bool = False  # uniform: block size 1 reads random tokens, as published, not one constant id
    curriculum: int = -1  # duo: steps on soft tokens, uniform noise afterwards; -1: half of max_steps
    tau: float = 1e-3  # duo: temperature of the soft tokens at the first step (1e-3 is published; what it does: docs/duo.md), ...
    tau_end: float = 1e-3  # ... and at the end of the curriculum, evenly in its logarithm
    soft_k: int = 4  # duo: Gaussians simulated for a token, at least 2; 0, or more than there are ids: one for each id
    # the network
    seq_len: int = 0  # T, the context; 0: the dataset's row length
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 128
    # optimisation
    max_steps: int = 1500  # optimizer steps
    batch_size: int = 64  # rows of one forward of one process
    accumulation: int = 1  # forwards per optimizer step: a step sees batch_size * accumulation * processes rows
    lr: float = 2e-3  # peak
    warmup: int = 50  # steps of linear warmup
    lr_schedule: str = "wsd"  # afterwards: constant, cosine to 0, or wsd (constant, then linear to 0 over the second half)
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.05  # on matrices
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    ema: float = 0.999  # of the weights; what is evaluated and sampled
    # looking at it
    eval_every: int = 500  # steps between validations, each with a checkpoint; also at the end
    n_eval: int = 256  # windows of the validation split
    n_samples: int = 2  # printed at each validation
    log_every: int = 10  # steps between lines of log.jsonl
    # the machine
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # of the forward: float32 or bfloat16 (autocast; weights, logits and losses stay float32)
    compile: bool = False  # torch.compile: slow first step, faster others
    seed: int = 0  # the same seed on the same device gives the same run

    def __post_init__(self):
        """Settle what settings imply for each other, before anything is downloaded or allocated."""
        for name, allowed in (
            ("process", ("masked", "uniform", "duo")),
            ("schedule", tuple(SCHEDULES)),
            ("time_conditioning", ("auto", "true", "false")),
            ("lr_schedule", ("constant", "cosine", "wsd")),
            ("dtype", ("auto", "float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                die(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}", f"--{name}={allowed[0]}")
        for name in ("n_layers", "n_heads", "d_model", "batch_size", "accumulation", "max_steps", "eval_every", "n_eval", "log_every"):
            if getattr(self, name) < 1:
                die(f"{name} is {getattr(self, name)}, it must be at least 1", f"--{name}={type(self).__dataclass_fields__[name].default}")
        for name, low, high in (
            ("lr", 0, math.inf),
            ("warmup", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("grad_clip", 0, math.inf),
            ("beta1", 0, 1),
            ("beta2", 0, 1),
            ("ema", 0, 1),
            ("soft_k", 0, math.inf),
            ("n_samples", 0, math.inf),
            ("seed", 0, 2**62),
        ):
            if not low <= getattr(self, name) < high:
                die(
                    f"{name} is {getattr(self, name)}, it must be in [{low}, {high})",
                    f"--{name}={type(self).__dataclass_fields__[name].default}",
                )
        for name in ("curriculum", "tau", "tau_end", "soft_k"):
            if self.process != "duo" and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                die(f"{name} is about Duo's curriculum, and this is {self.process} noise", "--process=duo")
        if not 0 < self.tau < math.inf or not 0 < self.tau_end < math.inf or self.soft_k == 1 or self.curriculum < -1:
            die("tau and tau_end must be above 0, soft_k 0 or at least 2, curriculum a number of steps", "--tau=1e-3 --soft_k=4")
        if self.process == "duo" and self.curriculum == -1:
            self.curriculum = self.max_steps // 2
        if self.d_model % (2 * self.n_heads):
            die(f"d_model {self.d_model} does not give each of {self.n_heads} heads an even width", f"--d_model={2 * self.n_heads * 16}")
        weights = list(self.block_sizes.values())
        if not weights or not all(isinstance(w, (int, float)) and w > 0 for w in weights) or min(self.block_sizes) < 1:
            die(f"block_sizes {self.block_sizes}: sizes and weights must be positive", "--block_sizes=1:0.25,16:0.75")
        if abs(sum(weights) - 1) > 1e-6:
            die(f"the weights of block_sizes {self.block_sizes} sum to {sum(weights):g}, not 1", "--block_sizes=1:0.25,16:0.75")
        names = self.objectives()
        asked = set(names.values()) if ":" in self.objective else {self.objective}
        if not asked <= {"ce", "elbo", "ce_noisy"} or set(names) != set(self.block_sizes) - {1}:
            die(f"objective {self.objective!r}: ce, elbo or ce_noisy, for all or for each of {sorted(self.block_sizes)}", "--objective=ce")
        if self.process != "masked" and "ce" in names.values() and len(set(names.values())) > 1:
            die("uniform noise: ce teaches p(x0 | x_t), elbo the leave-one-out posterior; a network predicts one", "--objective=ce")
        if self.process == "duo" and not names:
            die("block size 1 reads pure noise: Duo has nothing to soften", "--block_sizes=1:0.25,16:0.75")
        if self.random_ar and self.process == "masked":
            die("random_ar is for uniform noise: a masked model reads the mask", "--random_ar=false")
        taught = "denoiser" if self.process == "masked" or set(names.values()) <= {"ce"} else "loo"  # masked: they are one
        if set(names.values()) == {"elbo"} and self.predicts == "denoiser":  # the bound converts, so either can be its output
            taught = "denoiser"
        if self.predicts not in ("auto", taught):
            die(f"predicts {self.predicts!r}: a network trained with {self.objective} predicts {taught}", f"--predicts={taught}")
        self.predicts = taught
        if self.time_conditioning == "auto":
            self.time_conditioning = "false" if self.process == "masked" else "true"

    def objectives(self):
        """{block size: objective} for the sizes above 1."""
        if ":" in self.objective:
            try:
                return {s: str(name) for s, name in parse_dict(self.objective).items() if s > 1}
            except ValueError:
                die(f"objective {self.objective!r} is not size:name,...", "--objective=4:elbo,16:ce")
        return {s: self.objective for s in self.block_sizes if s > 1}

    def fit(self, data):
        """Settle the context length with the dataset's."""
        self.seq_len = data.seq_len
        for b in self.block_sizes:
            if self.seq_len % b:
                near = max(k for k in range(1, b) if self.seq_len % k == 0)
                die(f"block size {b} does not divide seq_len {self.seq_len}", f"--block_sizes={near}:1, or another --seq_len")


def trained_with(state):
    """The TrainConfig of a loaded checkpoint."""
    try:
        if missing := sorted(set(TrainConfig.__dataclass_fields__) - set(state["config"])):
            raise TypeError(f"no {', '.join(missing)}")  # a default would be a guess
        return TrainConfig(**state["config"])
    except TypeError as e:
        die(f"this checkpoint's settings are of another version: {e}", "train again, or check out the version that wrote it")


def restore(ckpt, device):
    """rebuild(ckpt, device) by the name of a device, which it prints first."""
    state = checkpoint.load(ckpt)
    device, why = pick_device(device)
    print(f"{device} ({why}), {runs_on(device)}")
    return rebuild(ckpt, device, state)


def rebuild(ckpt, device, state=None):
    """(settings, dataset facts, step, model with EMA weights on the device, process) of a run's out_dir, ready to sample."""
    state = state or checkpoint.load(ckpt)
    run = trained_with(state)
    try:
        model, process = checkpoint.build(run, state["meta"]["vocab_size"])
        model.load_state_dict(state["ema"])
    except (KeyError, RuntimeError) as e:
        die(f"{ckpt}/ckpt.pt: its weights are not those of its settings: {str(e).splitlines()[0]}", f"train again: --out_dir={ckpt}")
    return run, state["meta"], state["step"], model.to(device).eval(), process


def pick_device(name):
    """(device, why)"""
    if name not in ("auto", "cpu", "cuda", "mps") and not name.startswith("cuda:"):
        die(f"device {name!r} is none of auto, cpu, cuda, mps", "--device=auto")
    if name.startswith("cuda") and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        die(f"no {name} device on this machine", "--device=cpu")
    if torch.cuda.is_available() and name in ("auto", "cuda"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "one a process"
    if name.startswith("cuda:") and (not name[5:].isdigit() or int(name[5:]) >= torch.cuda.device_count() or "LOCAL_RANK" in os.environ):
        die(f"{name}: there are {torch.cuda.device_count()} GPUs, and under torchrun each process takes its own", "--device=cuda")
    if name != "auto":
        return torch.device(name), "as asked"
    return (torch.device("mps"), "found one") if torch.backends.mps.is_available() else (torch.device("cpu"), "no GPU found")


def runs_on(device):
    """What the losses and draws of kernels.py and draws.py run on, and why, for the first line of a run."""
    return "losses and draws: {} ({})".format(*kernels.path(device))


def pick_dtype(name, device, n_params):
    """(dtype of the forward, why)"""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        return (
            (torch.bfloat16, "the GPU has it")
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else (torch.float32, "no bfloat16 on this GPU")
        )
    if device.type == "cpu" and n_params > 5e6 and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "the CPU has it, and the model is large enough to gain"
    return torch.float32, "small model or no fast bfloat16"


def peak_mb(device):
    """The most memory so far, in 2^20 bytes: of tensors on a CUDA device, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":  # not getrusage, which begins with what the parent process once held
        return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def learning_rate(cfg, step):
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.lr_schedule == "constant":
        return cfg.lr
    if cfg.lr_schedule == "wsd":
        return cfg.lr * min(1.0, 2 * (1 - step / cfg.max_steps))
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, cfg.max_steps - cfg.warmup)))


def step_batches(cfg, data, step, rank, world):
    """
    This process's part of optimizer step `step`: a list of `accumulation` micro-batches (x0, answer, block sizes, times, slots).
    The step has n = batch_size * accumulation * world slots. What a slot holds depends on (seed, step, slot) alone, so the
    same n rows are trained on however they are split over processes and accumulation, and a resumed run sees what it would have.
    """
    n = cfg.batch_size * cfg.accumulation * world
    sizes, t = stratified_draw(cfg.block_sizes, n, cfg.seed, step)
    total = data.n_windows("train")
    window = (Noise(cfg.seed, torch.tensor([-2]), torch.arange(n), step).uniform(1)[0, :, 0] * total).long().clamp(max=total - 1)
    slots = torch.arange(n).view(cfg.accumulation, world, cfg.batch_size)[:, rank]
    return [(*data.windows("train", window[s]), sizes[s], t[s], s) for s in slots]


def curriculum(cfg, step, model, process):
    """The loss of one optimizer step: token_loss, on soft tokens in the first part of a Duo run."""
    if cfg.process != "duo" or step >= cfg.curriculum:
        return token_loss
    tau = duo.tau_at(step, cfg.curriculum, cfg.tau, cfg.tau_end)
    return functools.partial(token_loss, relaxation=duo.Relaxation(process, tau, cfg.soft_k))


def train(cfg, loss_at=curriculum, weights=None, facts=None):
    """
    For distill.py, which has its own: loss_at(cfg, step, model, process) -> what is called as token_loss is, for a step; weights
    to begin with; facts to keep in the checkpoint.
    """
    # ----- the machine
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device, why_device = pick_device(cfg.device)
    data = Dataset(cfg.dataset, cfg.seq_len)
    cfg.fit(data)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    say = print if rank == 0 else lambda *a: None

    # ----- model, EMA, optimizer
    torch.manual_seed(cfg.seed)
    model, process = checkpoint.build(cfg, data.meta["vocab_size"])
    if weights is not None:
        model.load_state_dict(weights)
    model.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    n_params = sum(p.numel() for p in model.parameters())
    dtype, why_dtype = pick_dtype(cfg.dtype, device, n_params)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
    first = 0
    if cfg.resume:
        state = checkpoint.load(cfg.out_dir)
        compare(state, cfg, data, say)
        model.load_state_dict(state["model"]), ema.load_state_dict(state["ema"]), optimizer.load_state_dict(state["optimizer"])
        for group, fresh in zip(optimizer.param_groups, groups, strict=True):  # the file brought its own settings along
            group.update(weight_decay=fresh["weight_decay"], betas=(cfg.beta1, cfg.beta2))
        first = state["step"]
        if rank == 0:
            forget_after(Path(cfg.out_dir) / "log.jsonl", first)
    elif rank == 0:
        keep_earlier_run(Path(cfg.out_dir))
    tokens_per_step = cfg.batch_size * cfg.accumulation * world * cfg.seq_len
    say(f"{device} ({why_device}), {world} process(es), {str(dtype)[6:]} ({why_dtype}), attention: dense SDPA, {runs_on(device)}")
    say(f"{n_params:,} parameters, {tokens_per_step:,} tokens a step, {cfg.process}, block sizes {cfg.block_sizes}")
    if cfg.process == "duo" and loss_at is curriculum:
        say(f"soft tokens for {cfg.curriculum} of {cfg.max_steps} steps: the loss printed then is not a bound")
    say(json.dumps(asdict(cfg)))
    forward = torch.compile(model) if cfg.compile else model
    forward = DistributedDataParallel(forward) if world > 1 else forward
    whole = math.lcm(*cfg.block_sizes)
    block_size = next(iter(cfg.block_sizes)) if len(cfg.block_sizes) == 1 else None  # one for all rows: an int
    amp = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()

    # ----- the loop
    if first >= cfg.max_steps:
        say(f"nothing to do: the checkpoint is at step {first}, max_steps is {cfg.max_steps}")
    clock, since = time.time(), 0  # for the time a step took, over the steps since the last look
    bar = tqdm(range(first, cfg.max_steps), initial=first, total=cfg.max_steps, disable=rank > 0, mininterval=0.5)
    for step in bar:
        batches, loss_of = step_batches(cfg, data, step, rank, world), loss_at(cfg, step, model, process)
        n_answers = torch.tensor(sum(int(answer.sum()) for _, answer, *_ in batches), device=device)
        if world > 1:
            dist.all_reduce(n_answers)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        loss = torch.zeros((), device=device)
        for k, (x0, answer, sizes, t, slots) in enumerate(batches):
            prompt = int(answer.any(0).int().argmax()) // whole * whole  # blocks before it need no noisy copy
            x0, answer, slots = (x.to(device, non_blocking=True) for x in (x0, answer, slots))
            noise = Noise(cfg.seed, slots, torch.arange(prompt, cfg.seq_len, device=device), step)
            with forward.no_sync() if world > 1 and k + 1 < len(batches) else nullcontext():
                with amp:
                    total, _ = loss_of(
                        forward, process, x0, block_size or sizes, t, cfg.objectives(), answer, SCHEDULES[cfg.schedule], prompt, noise
                    )
                part = total / n_answers
                (part * world).backward()  # DDP averages over processes; we want their sum
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(cfg.ema, (step + 1) / (step + 10))  # short memory at first
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

        done, since = step + 1, since + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            if world > 1:
                dist.all_reduce(loss)
            value = loss.item()  # waits for the device: only then look at the clock
            ms, since, clock = 1000 * (time.time() - clock) / since, 0, time.time()
            record = {
                "step": done,
                "loss": value,
                "lr": learning_rate(cfg, step),
                "norm": norm.item(),
                "ms": ms,
                "peak_mb": peak_mb(device),
            }
            rate = f"{ms:.0f} ms {1000 * tokens_per_step / ms:,.0f} tok/s"
            bar.set_postfix_str(f"loss {record['loss']:.3f} norm {record['norm']:.2f} {rate}")
            if rank == 0:
                log(cfg.out_dir, record)
        if rank == 0 and (done % cfg.eval_every == 0 or done == cfg.max_steps):
            checkpoint.save(cfg.out_dir, {
                "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                "config": asdict(cfg), "meta": data.meta, "step": done, **(facts or {}),
            })  # fmt: skip
            result = bounds(ema, process, data, cfg.block_sizes, cfg.n_eval)
            log(
                cfg.out_dir,
                {"step": done, "val": {b: mean for b, (mean, _) in result.items()}, "error": {b: e for b, (_, e) in result.items()}},
            )
            tqdm.write(f"val step {done} | {show_bounds(result, process)} | saved {cfg.out_dir}/ckpt.pt", file=sys.stdout)
            for text in sample_lines(ema, process, data, cfg):
                tqdm.write(f"  sample: {text!r}", file=sys.stdout)
            clock, since = time.time(), 0
    if world > 1:
        forward = None  # DDP goes before the process group: as the last to hold it, it would join threads that wait for Python's lock
        gc.collect()
        dist.destroy_process_group()


def sample_lines(model, process, data, cfg):
    """A few generations with the largest block size: prompts of the validation split, or from nothing."""
    if cfg.n_samples == 0:
        return []
    x0, answer = data.windows("val", data.spread("val", cfg.n_samples))
    prompts = [row[: int(keep.int().argmax())] for row, keep in zip(x0, answer, strict=True)]
    b = max(cfg.block_sizes)
    for state in generate(
        model,
        process,
        prompts,
        block_size=b,
        steps=min(b, 32) if b > 1 else None,
        eos_id=data.meta.get("eos_id"),
        schedule=SCHEDULES[cfg.schedule],
    ):
        pass
    try:
        decode = data.tokenizer.decode
    except SystemExit:  # no GPT-2 byte pairs, and it has said so: no reason to end a run
        decode = lambda ids: f"(ids) {ids}"
    return [decode([i for i in row if i != NOTHING]) for row in state.x.tolist()]


SHAPES = ("dataset", "process", "predicts", "random_ar", "time_conditioning", "seq_len", "n_layers", "n_heads", "d_model")


def compare(state, cfg, data, say):
    """Resuming: list what changed since the checkpoint; refuse what its weights cannot follow."""
    old = asdict(trained_with(state))
    data.same_as(state["meta"])
    for name, value in asdict(cfg).items():
        if name in SHAPES and old[name] != value:
            fix = f"--objective={old['objective']}" if name == "predicts" else f"--{name}={old[name]}"
            die(f"{cfg.out_dir}/ckpt.pt was trained with {name} {old[name]}, not {value}", f"{fix}, or another --out_dir")
        if name not in ("resume", "out_dir") and old[name] != value:
            say(f"changed since the checkpoint: {name} {old[name]} -> {value}")


def log(out_dir, record):
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(out_dir) / "log.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")


def forget_after(path, step):
    """Drop the lines of steps that will be taken again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
        path.write_text("".join(lines))


def keep_earlier_run(out_dir):
    """ckpt.pt and log.jsonl of a run that was here before become ckpt.1.pt and so on: nothing is overwritten."""
    n = 1
    while (out_dir / f"ckpt.{n}.pt").exists() or (out_dir / f"log.{n}.jsonl").exists():
        n += 1
    for old, new in (("ckpt.pt", f"ckpt.{n}.pt"), ("log.jsonl", f"log.{n}.jsonl")):
        if (out_dir / old).exists():
            (out_dir / old).rename(out_dir / new)
            print(f"kept the earlier {out_dir / old} as {new}")


if __name__ == "__main__":
    train(load_config(TrainConfig, sys.argv[1:]))
