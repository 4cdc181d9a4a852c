"""
How does it learn? One loop, top to bottom, settings first.

    python train.py config/sudoku.toml                                      one process, whatever device is there
    torchrun --standalone --nproc_per_node=4 train.py config/sudoku.toml    one process a GPU
    python train.py config/sudoku.toml --resume                             go on, bit for bit as if it had never stopped

The dial is block_sizes, a distribution over block sizes: 1:1 is AR, 256:1 with seq_len 256 is plain diffusion, 16:1 is block
diffusion, 1:0.25,16:0.75 is a mixture that does all of it. Every row of a batch has its own block size.
"""

import copy
import functools
import gc
import json
import math
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.dataset import Dataset
from diffusion import SCHEDULES, stratified_draw, token_loss
from eval import bounds, show_bounds
from fast import attention
from fast.draws import Noise
from generate import NOTHING, generate
from methods import duo
from run import checkpoint, machine
from run.cli import die, load_config, parse_dict, said
from run.machine import pick_device, pick_dtype, runs_on
from run.restore import begin_from, compare, take_up


@dataclass
class TrainConfig:
    dataset: str = "shakespeare_char"  # a folder under data/ with train.bin, val.bin, meta.json
    out_dir: str = "out/run"  # checkpoints and log.jsonl go here; an earlier run there moves to out_dir/earlier.1
    init_from: str = ""  # weights to begin with: a run's out_dir, or published ones, hf:OWNER/REPO/SUBFOLDER or a folder (published.py)
    resume: bool = False  # go on from the newest checkpoint of out_dir; from the first step if the run there was killed before it had one
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
    dropout: float = 0.0  # of what a layer adds, in training
    clean_causal: bool = True  # false (one block size above 1): clean blocks read themselves both ways; the cache serves no other size
    next_token: bool = False  # block_sizes 1:1 as an ordinary AR transformer, one stream instead of two
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
    eval_every: int = 500  # steps between checkpoints, each followed by a validation; also at the end
    keep: int = 2  # newest checkpoints kept, besides the best
    n_eval: int = 256  # windows of the validation split
    n_samples: int = 2  # printed at each validation
    log_every: int = 10  # steps between lines of log.jsonl
    # the machine
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # of the forward: float32 or bfloat16 (autocast; weights, logits and losses stay float32)
    compile: bool = False  # torch.compile: slow first step, faster others
    seed: int = 0  # the same seed on the same device gives the same run
    backend: str = "auto"  # of torch.distributed: nccl on GPUs, gloo elsewhere
    fsdp: bool = False  # under torchrun, for models that outgrow one GPU: each process holds a share of the weights, not all
    timeout: float = 600  # seconds a process waits for another before it ends; writing a checkpoint must take less
    # when something is wrong
    overfit: bool = False  # the first step's batch at every step: a network that can learn at all learns it by heart
    bad_steps: int = 10  # a step that is not finite is skipped; so many in a row, when the log looks, end the run

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
        if self.out_dir.startswith(("hf:", "http:", "https:")):
            die(f"out_dir {self.out_dir!r} is no folder", "--out_dir=out/NAME")
        counts = "n_layers n_heads d_model batch_size accumulation max_steps eval_every n_eval log_every keep bad_steps"
        for name in counts.split():
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
            ("dropout", 0, 1),
            ("soft_k", 0, math.inf),
            ("n_samples", 0, math.inf),
            ("seed", 0, 2**62),
            ("timeout", 1, 2**31),
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
        if not weights or not all(isinstance(w, (int, float)) and w > 0 for w in weights) or not all(k > 0 for k in self.block_sizes):
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
        if self.next_token and (set(self.block_sizes) != {1} or self.process != "masked" or self.time_conditioning == "true"):
            die("next_token is an AR transformer: no noise, no larger blocks", "--next_token --block_sizes=1:1 --process=masked")
        if not self.clean_causal and (len(self.block_sizes) > 1 or 1 in self.block_sizes):
            die("clean_causal=false ties the clean stream to one block size above 1", "--block_sizes=16:1, or --clean_causal=true")
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
        if self.next_token and not data.given:
            die(
                f"next_token: nothing stands before the first token of {self.dataset}'s windows",
                "a dataset with a bos_id, or --next_token=false",
            )
        for b in self.block_sizes:
            if self.seq_len % b:
                near = max(k for k in range(1, min(b, self.seq_len + 1)) if self.seq_len % k == 0)
                die(f"block size {b} does not divide seq_len {self.seq_len}", f"--block_sizes={near}:1, or another --seq_len")


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
    What surrounds the loop: the data is looked at first, then come the other processes and the folder, and the ways in which it may end.
    The last three are for distill.py: loss_at(cfg, step, model, process) -> what is called as token_loss is, for a step; weights
    to begin with; facts to keep in the checkpoint.
    """
    fewer = "a smaller --seq_len, --d_model or --n_layers, or --fsdp on several GPUs"
    if cfg.batch_size > 1:
        fewer = f"--batch_size={cfg.batch_size // 2} --accumulation={2 * cfg.accumulation}, the same steps in smaller parts"
    world = 1
    try:
        with machine.guard(fewer):
            device, why_device = pick_device(cfg.device)
            data = Dataset(cfg.dataset, cfg.seq_len)
            cfg.fit(data)
            rank, world = machine.join(device, cfg.backend, cfg.timeout)
            if cfg.fsdp and world == 1:
                die("fsdp shares a network out among processes: this is the only one", "torchrun --standalone --nproc_per_node=2 train.py")
            if cfg.resume and not Path(cfg.out_dir).exists():
                checkpoint.load(cfg.out_dir, "--out_dir")  # says so, before a folder is made for a name that was mistyped
            with machine.Signals() as signals, checkpoint.writing(cfg.out_dir, not cfg.resume) if rank == 0 else nullcontext():
                learn(cfg, data, device, why_device, rank, world, signals, loss_at, weights, facts or {})
    except BaseException as e:
        if world == 1:
            raise
        if isinstance(e, dist.DistError) or isinstance(e, RuntimeError) and "gloo" in str(e):
            print(f"error: rank {rank} lost another process: {said(e)}\n  try: --resume", file=sys.stderr)
        elif not isinstance(e, SystemExit):
            traceback.print_exc()
        machine.leave(2)
    if world > 1:
        gc.collect()  # DDP goes before the process group: as the last to hold it, it would join threads that wait for Python's lock
        dist.destroy_process_group()


def learn(cfg, data, device, why_device, rank, world, signals, loss_at, weights, facts):
    """The run itself: model, loop, checkpoints, validations. signals: a machine.Signals."""
    say = print if rank == 0 else lambda *a: None
    warn = lambda text: tqdm.write(f"WARNING: {text}", file=sys.stderr)

    # ----- model, EMA, optimizer
    resume = cfg.resume and not checkpoint.begun(cfg.out_dir)
    if resume != cfg.resume:
        say(f"{cfg.out_dir} has no checkpoint yet: from the first step")
    state = checkpoint.load(cfg.out_dir, "--out_dir") if resume else None
    if state and "network" in state:
        facts = {**facts, "network": state["network"]}
    if "network" in facts:  # rotary positions have no weights: a context may have any length
        facts["network"] = {**facts["network"], "dropout": cfg.dropout, "seq_len": cfg.seq_len}
    torch.manual_seed(cfg.seed)
    model, process = checkpoint.build(cfg, data.meta["vocab_size"], facts.get("network"))
    if weights is not None:
        take_up(cfg.init_from or cfg.out_dir, {"weights": weights}, weights=model)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    n_params = sum(p.numel() for p in model.parameters())
    given = [cfg.batch_size, cfg.accumulation]  # as asked; compare may split the same rows in another way
    if state:
        compare(state, cfg, data, world, say)
        take_up(cfg.out_dir, state, model=model, ema=ema)
    if cfg.fsdp:
        machine.shard(device, model, ema)
    else:
        model.to(device), ema.to(device)
    dtype, why_dtype = pick_dtype(cfg.dtype, device, n_params)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
    first, skipped = 0, torch.zeros(2, device=device)  # steps skipped: in all, and in a row
    if state:
        take_up(cfg.out_dir, state, optimizer=optimizer)
        first, skipped = state["step"], torch.tensor(state["skipped"], device=device, dtype=torch.float32)
        if machine.total(first, op="MAX") != machine.total(first, op="MIN"):
            die(f"rank {rank} found a checkpoint of step {first}, others of another", "--out_dir on a disk that all machines share")
        if rank == 0:
            checkpoint.forget_after(cfg.out_dir, first)
    owed = state is not None and state["owed"]  # a checkpoint and its validation
    state = None  # its tensors would be held twice
    rows = cfg.batch_size * cfg.accumulation * world
    way, why = attention.path(device, dtype, cfg.d_model // cfg.n_heads, 2 * cfg.seq_len)
    if cfg.next_token or cfg.compile and device.type == "cpu":
        way, why = "dense SDPA", "one stream" if cfg.next_token else "compiled"
    by = f"{world} process" if world == 1 else f"{world} processes by {'FSDP' if cfg.fsdp else 'DDP'}"
    say(f"{device} ({why_device}), {by}, {str(dtype)[6:]} ({why_dtype}), attention: {way} ({why}), {runs_on(device)}")
    say(f"{n_params:,} parameters, {rows * cfg.seq_len:,} tokens a step, {cfg.process}, block sizes {cfg.block_sizes}")
    if cfg.process == "duo" and loss_at is curriculum:
        say(f"soft tokens for {cfg.curriculum} of {cfg.max_steps} steps: the loss printed then is not a bound")
    say(json.dumps(asdict(cfg)))
    forward = torch.compile(model) if cfg.compile else model
    if world > 1 and not cfg.fsdp:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    unit = math.lcm(*cfg.block_sizes)
    block_size = next(iter(cfg.block_sizes)) if len(cfg.block_sizes) == 1 else None  # one for all rows: an int

    def backward(batches, step, loss_of, n_answers):
        """Gradients of one optimizer step, and this process's part of its loss, in nats per token."""
        loss = torch.zeros((), device=device)
        for k, (x0, answer, sizes, t, slots) in enumerate(batches):
            prompt = int(answer.any(0).int().argmax()) // unit * unit  # blocks before it need no noisy copy
            noise = Noise(cfg.seed, slots, torch.arange(prompt, cfg.seq_len), step)  # all of it on the CPU, while a GPU is still busy
            with machine.without_sync(forward) if k + 1 < len(batches) else nullcontext():
                with machine.mixed(device, dtype):
                    schedule = SCHEDULES[cfg.schedule]
                    summed, _ = loss_of(
                        forward, process, x0, block_size or sizes, t, cfg.objectives(), answer, schedule, prompt, noise, device
                    )
                part = summed / n_answers
                # DDP and FSDP average over processes, we want their sum; a loss that is not finite makes a gradient that is not
                (part * torch.where(part.isfinite(), float(world), math.nan)).backward()
            loss += part.detach()
        return loss

    def save(done, owed):
        """Rank 0 writes a checkpoint, the others wait; was it written? owed: its validation is to come."""
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        state = machine.whole(state, rank == 0) if cfg.fsdp else state  # every process gives its share
        state |= {"config": asdict(cfg), "meta": data.meta, "step": done, **facts}
        state |= {"rows": rows, "given": given, "skipped": skipped.int().tolist(), "owed": owed}
        written = True
        if rank == 0:
            try:
                checkpoint.log(cfg.out_dir)  # what still waits for room
                checkpoint.save(cfg.out_dir, state)
            except OSError as e:
                written = False
                warn(f"no checkpoint of step {done}: {e.strerror}. Those before it are as they were")
        return machine.total(written)[0] == world

    def validate(done):
        """The EMA weights on the validation split; the best so far get a name. All processes take part."""
        signals.at_once = world == 1  # everything is on the disk: no need to wait for this to end
        result = bounds(ema, process, data, cfg.block_sizes, cfg.n_eval, share=(rank, world))
        finite = all(math.isfinite(mean) for mean, _ in result.values())
        texts = sample_lines(ema, process, data, cfg) if finite else []
        signals.at_once = False
        if rank == 0:
            val, error = ({str(b): pair[i] for b, pair in result.items()} for i in range(2))
            mixture = lambda val: sum(w * val.get(str(b), math.inf) for b, w in cfg.block_sizes.items())
            file = Path(cfg.out_dir) / f"ckpt.{done}.pt"
            earlier = [mixture(r["val"]) for r in checkpoint.logged(cfg.out_dir) if "val" in r]
            try:
                if file.exists() and mixture(val) <= min([x for x in earlier if math.isfinite(x)], default=math.inf):
                    checkpoint.also(file, "best.pt")
                if finite:
                    checkpoint.prune(cfg.out_dir, done, cfg.keep)
            except OSError as e:
                warn(f"best.pt is not of step {done}: {e.strerror}")
            # last: after a kill before this line, --resume validates again
            checkpoint.log(cfg.out_dir, {"step": done, "val": val, "error": error})
            tqdm.write(f"val step {done} | {show_bounds(result, process)}{f' | saved {file}' * file.exists()}", file=sys.stdout)
            for text in texts:
                tqdm.write(f"  sample: {text!r}", file=sys.stdout)

    # ----- the loop
    done, saved = first, first  # steps taken, and how many of them are on the disk
    stop = False  # only machine.total may say so: processes that do not stop together wait for each other
    if first >= cfg.max_steps:
        say(f"nothing to do: the checkpoint is at step {first}, max_steps is {cfg.max_steps}")
    bar = tqdm(range(first, cfg.max_steps), initial=first, total=cfg.max_steps, disable=rank > 0, mininterval=0.5)
    try:
        if owed and skipped[1] == 0:
            owed = False
            if machine.total(rank == 0 and not checkpoint.validated(cfg.out_dir, first))[0]:
                validate(first)  # a kill or a signal came between the checkpoint and this
        if isinstance(forward, DistributedDataParallel):
            # DDP orders the gradients anew after a first backward, and sums of three or more are rounded by that order: so before any
            # step, by whatever loss and batch, always the same, and its gradients are dropped
            backward(step_batches(cfg, data, 0, rank, world)[-1:], 0, token_loss, 1)
            optimizer.zero_grad()
        clock, since = time.time(), 0  # for the time a step took, over the steps since the last look
        for step in bar:
            seen = 0 if cfg.overfit else step
            batches, loss_of = step_batches(cfg, data, seen, rank, world), loss_at(cfg, step, model, process)
            n_answers, stop = machine.total(sum(int(answer.sum()) for _, answer, *_ in batches), signals.name is not None)
            if stop:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(cfg, step)
            if cfg.dropout:  # so that a resumed run drops what it would have; other numbers of processes drop other things
                torch.manual_seed(cfg.seed + 1_000_003 * (step * world + rank + 1))
            loss = backward(batches, seen, loss_of, n_answers)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            norm = norm.full_tensor() if cfg.fsdp else norm
            bad = (~norm.isfinite()).float()
            optimizer.found_inf = None if device.type == "mps" else bad  # 1: the fused step changes nothing, and the host need not ask
            if device.type != "mps" or not bad:
                optimizer.step()
            optimizer.zero_grad()
            decay = min(cfg.ema, (step + 1) / (step + 10))  # short memory at first; a skipped step moves it on, towards weights that stayed
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            skipped = torch.stack((skipped[0] + bad, (skipped[1] + 1) * bad))

            if step == 0 and rank == 0:  # not before a step has been taken: a run that cannot must not touch what is there
                checkpoint.keep_earlier_run(cfg.out_dir)
            done, since = step + 1, since + 1
            look, owed = done % cfg.log_every == 0 or done == cfg.max_steps, owed or done % cfg.eval_every == 0 or done == cfg.max_steps
            if look or owed:
                n_skipped, in_a_row = skipped.int().tolist()  # waits for the device
                if in_a_row >= cfg.bad_steps:
                    bar.close()
                    if rank > 0:
                        raise SystemExit(2)  # rank 0 says why
                    good = checkpoint.fall_back_to_good(cfg.out_dir) if saved else None
                    last = f"the last good checkpoint is {good}" if good else "there is no good checkpoint"
                    fix = f"{'--resume ' * bool(good)}--lr={cfg.lr / 4:.2g}"
                    die(f"{in_a_row} steps in a row, up to step {done}, had no finite gradient, and were skipped; {last}", fix)
            if look:
                if world > 1:
                    dist.all_reduce(loss)
                ms, since, clock = 1000 * (time.time() - clock) / since, 0, time.time()
                record = {
                    "step": done,
                    "loss": loss.item(),
                    "lr": learning_rate(cfg, step),
                    "norm": norm.item(),
                    "skipped": n_skipped,
                    "ms": ms,
                    "peak_mb": machine.total(machine.peak_mb(device), op="MAX")[0],
                }
                rate = f"{ms:.0f} ms {1000 * rows * cfg.seq_len / ms:,.0f} tok/s" + (f" skipped {n_skipped}" if n_skipped else "")
                bar.set_postfix_str(f"loss {record['loss']:.3f} norm {record['norm']:.2f} {rate}")
                if rank == 0:
                    checkpoint.log(cfg.out_dir, record)
            if owed and in_a_row and rank == 0:
                warn(f"step {done} was skipped, its gradient was not finite" + ": the checkpoint waits" * (done < cfg.max_steps))
            if owed and (in_a_row == 0 or done == cfg.max_steps):  # the weights may be ruined: a step they can take comes first
                saved = done if save(done, owed) else saved
                if stop := machine.total(signals.name is not None)[0] > 0:
                    break
                validate(done)
                clock, since, owed = time.time(), 0, False
        if stop and saved < done:
            saved = done if save(done, owed) else saved
    except KeyboardInterrupt:  # during a validation: `--resume` begins with it
        stop = True
    bar.close()
    if saved < done:
        where = f"the last good one is of step {saved}" if saved else "and there is none before it"
        die(f"no checkpoint of step {done}, {where}", f"free space for {cfg.out_dir}, then{' --resume' * (saved > 0) or ' again'}")
    if stop:
        say(f"{signals.name or 'a signal to another process'}: stopped after step {done}" + ", saved; --resume goes on" * (saved > 0))


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


@machine.guard("a smaller --batch_size")
def main():
    asked = set()
    cfg = load_config(TrainConfig, sys.argv[1:], given_names=asked)
    weights, facts = begin_from(cfg, asked) if cfg.init_from else (None, None)
    train(cfg, weights=weights, facts=facts)


if __name__ == "__main__":
    main()
