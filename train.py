"""
How does it learn? One loop, top to bottom. Every setting is in options.py.

    python train.py config/sudoku.toml                        one process, whatever device is there
    torchrun --standalone --nproc_per_node=4 train.py config/sudoku.toml         one process a GPU
    python train.py config/sudoku.toml --resume               go on, bit for bit as if it had never stopped
    python train.py config/sudoku.toml --method loopholing    a system of the literature: a file in methods/

The dial is block_sizes, a distribution over block sizes: 1:1 is AR, 256:1 with seq_len 256 is plain
diffusion, 16:1 is block diffusion, 1:0.25,16:0.75 is a mixture that does all of it. Every row of a batch has
its own block size.
"""

import gc
import math
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import diffusion
import fast
from data.dataset import Dataset, charged_tokens, first_charged
from diffusion import SCHEDULES
from eval import bounds, show_bounds
from methods import Learner
from options import TrainConfig
from rng import Noise, stratified_draw
from run import checkpoint, machine, selftext
from run.cli import die, said
from run.flags import load_with_method
from run.machine import pick_device
from run.restore import begin_from
from run.training import Run, holding, warn


def learning_rate(cfg, step):
    """
    The peak lr after a linear warmup; then constant, or down to 0 by a cosine, or linearly over the second
    half (wsd).
    """
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.lr_schedule == "constant":
        return cfg.lr
    if cfg.lr_schedule == "wsd":
        return cfg.lr * min(1.0, 2 * (1 - step / cfg.max_steps))
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, cfg.max_steps - cfg.warmup)))


def step_batches(cfg, data, step, rank, world):
    """
    This process's part of optimizer step `step`: a list of `accumulation` micro-batches (x0, given, real,
    block sizes, times, slots), of shapes (B, T) int64, (B, T) bool, (B, T) bool, and (B,) each.
    The step has n = batch_size * accumulation * world slots. What a slot holds depends on (seed, step, slot)
    alone, so the same n rows are trained on however they are split over processes and accumulation, and a
    resumed run sees what it would have.
    """
    n = cfg.batch_size * cfg.accumulation * world
    sizes, t = stratified_draw(cfg.block_sizes, n, cfg.seed, step)
    total = data.n_windows("train")
    u = Noise(cfg.seed, torch.tensor([-2]), torch.arange(n), step).uniform(1)[0, :, 0]
    window = (u * total).long().clamp(max=total - 1)
    slots = torch.arange(n).view(cfg.accumulation, world, cfg.batch_size)[:, rank]
    return [(*data.windows("train", window[s]), sizes[s], t[s], s) for s in slots]


def backward(run, batches, step, loss_of, n_tokens):
    """Gradients of one optimizer step, and this process's part of its loss, in nats per token."""
    cfg, loss = run.cfg, torch.zeros((), device=run.device)
    unit = math.lcm(*cfg.block_sizes)
    only_size = next(iter(cfg.block_sizes)) if len(cfg.block_sizes) == 1 else None  # one for all rows: an int
    for k, (x0, given, real, sizes, t, slots) in enumerate(batches):
        given, charged = charged_tokens(given, real, sizes, cfg.clean_padding)
        start = first_charged(charged, unit)  # blocks before it need no noisy copy
        # all of it on the CPU, while a GPU is still busy
        noise = Noise(cfg.seed, slots, torch.arange(start, cfg.seq_len), step)
        how = {"given": given, "charged": charged, "start": start, "noise": noise}
        how |= {"schedule": SCHEDULES[cfg.schedule], "device": run.device}
        with machine.without_sync(run.forward) if k + 1 < len(batches) else nullcontext():
            with machine.mixed(run.device, run.dtype):
                size, objectives = only_size or sizes, cfg.objectives()
                summed, _ = loss_of(run.forward, run.process, x0, size, t, objectives, **how)
            part = summed / n_tokens
            # DDP and FSDP average over processes, we want their sum. A loss that is not finite makes a
            # gradient that is not.
            (part * torch.where(part.isfinite(), float(run.world), math.nan)).backward()
        loss += part.detach()
    return loss


def take_step(run, step, loss_of, batches, n_tokens):
    """
    One optimizer step, and the EMA after it: (loss, norm of the gradient, 1. if it was not finite and nothing
    was changed).
    """
    cfg, optimizer = run.cfg, run.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    if cfg.dropout:  # a resumed run drops what it would have; other numbers of processes drop other things
        torch.manual_seed(cfg.seed + 1_000_003 * (step * run.world + run.rank + 1))
    loss = backward(run, batches, 0 if cfg.overfit else step, loss_of, n_tokens)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip or math.inf)
    norm = norm.full_tensor() if cfg.fsdp else norm
    bad = (~norm.isfinite()).float()
    # 1: the fused step changes nothing, and the host need not ask
    optimizer.found_inf = None if run.device.type == "mps" else bad
    if run.device.type != "mps" or not bad:
        optimizer.step()
    optimizer.zero_grad()
    # short memory at first; a skipped step moves it on, towards weights that stayed
    decay = min(cfg.ema, (step + 1) / (step + 10))
    with torch.no_grad():  # a graph would grow from step to step
        for average, weight in zip(run.ema.parameters(), run.model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)
    return loss, norm, bad


def settle_the_order_of_sums(run):
    """
    DDP orders the gradients anew after a first backward, and sums of three or more are rounded by that order.
    So there is one before any step, by whatever loss and batch, always the same. Its gradients are dropped.
    """
    if isinstance(run.forward, DistributedDataParallel):
        batches = step_batches(run.cfg, run.data, 0, run.rank, run.world)
        backward(run, batches[-1:], 0, run.learner.token_loss, 1)
        run.optimizer.zero_grad()


def learn(run):
    """The loop: steps, a look at them every log_every, a checkpoint and a validation every eval_every."""
    cfg, learner = run.cfg, run.learner
    done, stop = run.first, False  # steps taken
    if run.first >= cfg.max_steps:
        run.say(f"nothing to do: the checkpoint is at step {run.first}, max_steps is {cfg.max_steps}")
    how = {"initial": run.first, "total": cfg.max_steps, "disable": run.rank > 0, "mininterval": 0.5}
    bar = tqdm(range(run.first, cfg.max_steps), **how)
    try:
        run.validate_if_owed()
        settle_the_order_of_sums(run)
        clock, since = time.time(), 0  # for the time a step took, over the steps since the last look
        for step in bar:
            batches_of = lambda k: step_batches(cfg, run.data, k, run.rank, run.world)
            batches, loss_of = learner.batches(0 if cfg.overfit else step, batches_of), learner.loss(step)
            n = sum(int((real & ~given).sum()) for _, given, real, *_ in batches)
            n, stop = machine.total(n, run.signals.name is not None)
            if stop:
                break
            # a step with nothing to learn costs nothing
            loss, norm, bad = take_step(run, step, loss_of, batches, max(n, 1))
            run.skipped = torch.stack((run.skipped[0] + bad, (run.skipped[1] + 1) * bad))

            # not before a step has been taken: a run that cannot must not touch what is there
            if step == 0 and run.rank == 0:
                checkpoint.keep_earlier_run(cfg.out_dir)
            done, since = step + 1, since + 1
            last = done == cfg.max_steps
            look = last or done % cfg.log_every == 0
            run.owed = run.owed or last or done % cfg.eval_every == 0
            if not look and not run.owed:
                continue
            n_skipped, in_a_row = run.skipped.int().tolist()  # waits for the device
            run.give_up_if_ruined(done, in_a_row, bar)
            if look:
                ms, since, clock = 1000 * (time.time() - clock) / since, 0, time.time()
                run.look(done, loss, learning_rate(cfg, step), norm, n_skipped, ms, bar)
            if run.owed and in_a_row and run.rank == 0:
                waits = "" if last else ": the checkpoint waits"
                warn(f"step {done} was skipped, its gradient was not finite{waits}")
            # the weights may be ruined: a step they can take comes first
            if run.owed and (in_a_row == 0 or last):
                run.save(done)
                if stop := run.stop_asked():
                    break
                run.validate(done)
                clock, since, run.owed = time.time(), 0, False
        if stop and run.saved < done:
            run.save(done)
    except KeyboardInterrupt:  # during a validation: `--resume` begins with it
        stop = True
    bar.close()
    run.close(done, stop)


def train(cfg, settings=None, method=None, weights=None, facts=None):
    """
    Learn what cfg says: read the data, meet the other processes, hold the folder, run the loop. Then come the
    ways in which it may end. settings, method: a method's Settings and its module. weights: to begin with.
    facts: what a checkpoint keeps of them.
    """
    fewer = "a smaller --seq_len, --d_model or --n_layers, or --fsdp on several GPUs"
    if cfg.batch_size > 1:
        half, twice = cfg.batch_size // 2, 2 * cfg.accumulation
        fewer = f"--batch_size={half} --accumulation={twice}, the same steps in smaller parts"
    token_loss = diffusion.token_loss if cfg.plain else fast.token_loss
    make_learner = lambda *args: getattr(method, "Learner", Learner)(*args, token_loss)
    world = 1
    try:
        with machine.guard(fewer):
            device, why_device = pick_device(cfg.device)
            data = Dataset(cfg.dataset, cfg.seq_len)
            cfg.fit(data)
            rank, world = machine.join(device, cfg.backend, cfg.timeout)
            if cfg.fsdp and world == 1:
                die(
                    "fsdp shares a network out among processes: this is the only one",
                    "torchrun --standalone --nproc_per_node=2 train.py",
                )
            if cfg.resume and not Path(cfg.out_dir).exists():
                # says so, before a folder is made for a name that was mistyped
                checkpoint.load(cfg.out_dir, "--out_dir")
            with machine.Signals() as signals, holding(cfg, rank):
                evaluate = lambda model, process, data, cfg, share: bounds(
                    model, process, data, cfg, share=share, method=method
                )
                place = device, why_device, rank, world
                given = signals, weights, facts or {}, make_learner, evaluate, show_bounds
                learn(Run(cfg, settings, method, data, *place, *given))
    except BaseException as e:
        if world == 1:
            raise
        if isinstance(e, dist.DistError) or isinstance(e, RuntimeError) and "gloo" in str(e):
            print(f"error: rank {rank} lost another process: {said(e)}\n  try: --resume", file=sys.stderr)
        elif not isinstance(e, SystemExit):
            traceback.print_exc()
        machine.leave(2)
    if world > 1:
        # DDP goes before the process group: as the last to hold it, it would join threads that wait for
        # Python's lock
        gc.collect()
        dist.destroy_process_group()


@machine.guard("a smaller --batch_size")
def main():
    asked = set()
    cfg, settings, method = load_with_method(TrainConfig, sys.argv[1:], asked)
    if getattr(settings, "self_data", ""):
        cfg.dataset = cfg.dataset if "dataset" in asked else "self"
        asked.add("dataset")
        selftext.write(cfg, settings)
    weights, facts = begin_from(cfg, settings, method, asked) if cfg.init_from else (None, None)
    train(cfg, settings, method, weights, facts)


if __name__ == "__main__":
    main()
