"""
What surrounds the loop of train.py? A run: its network, optimizer, checkpoints and validations, and the ways
in which it may end.

Everything here is about faults, files and machines; what is learned, and how, is in train.py.
"""

import copy
import json
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fast
from diffusion import SCHEDULES
from fast import attention
from generate import NOTHING, generate
from run import checkpoint, machine
from run.cli import die
from run.machine import pick_dtype, runs_on
from run.restore import compare, load_state


class Run:
    """
    A training run: model, ema, process, optimizer, learner, and

    forward       the model, wrapped for several processes
    first         the step it begins at
    saved         how many steps are on the disk
    skipped (2,)  steps skipped, in all and in a row
    """

    def __init__(
        self,
        cfg,
        settings,
        method,
        data,
        device,
        why_device,
        rank,
        world,
        signals,
        weights,
        facts,
        make_learner,
        bounds,
        show_bounds,
    ):
        self.cfg, self.settings, self.data, self.device = cfg, settings, data, device
        self.rank, self.world, self.signals, self.facts = rank, world, signals, facts
        self.bounds, self.show_bounds = bounds, show_bounds
        self.say = print if rank == 0 else lambda *a: None
        resume = cfg.resume and not checkpoint.begun(cfg.out_dir)
        if resume != cfg.resume:
            self.say(f"{cfg.out_dir} has no checkpoint yet: from the first step")
        state = checkpoint.load(cfg.out_dir, "--out_dir") if resume else None
        if state and "network" in state:
            facts["network"] = state["network"]
        if "network" in facts:  # rotary positions have no weights: a context may have any length
            facts["network"] = {**facts["network"], "dropout": cfg.dropout, "seq_len": cfg.seq_len}

        torch.manual_seed(cfg.seed)
        noise, whose = facts.pop("noise", None), facts.pop("whose", None)
        noise = state.get("process") if state else noise
        noise = None if hasattr(method, "process") else noise  # which is as its settings are now
        self.model, self.process = checkpoint.build(
            cfg, data.meta["vocab_size"], facts.get("network"), method, settings, noise
        )
        if weights is not None:
            load_state(cfg.init_from or cfg.out_dir, {"weights": weights}, whose, weights=self.model)
        # as asked; compare may split the same rows in another way
        self.given = [cfg.batch_size, cfg.accumulation]
        if state:
            compare(state, cfg, settings, method, data, world, self.say)
            load_state(cfg.out_dir, state, model=self.model)
        if not cfg.plain:
            agree = lambda ok: bool(machine.total(int(ok), op="MIN")[0])
            self.model, self.process, notes = fast.accelerate(self.model, self.process, agree)
            for note in notes:
                self.say(note)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.n_params = sum(p.numel() for p in self.model.parameters())
        if state:
            load_state(cfg.out_dir, state, ema=self.ema)
        self.learner = make_learner(cfg, settings, self.model, self.process)
        self.learner.data = data
        if state:
            if kept := state.get("method", {}).get("state"):
                load_state(cfg.out_dir, {"method": kept}, method=self.learner)
        if cfg.fsdp:
            machine.shard(device, self.model, self.ema)
        for module in (self.model, self.ema) * (not cfg.fsdp) + tuple(self.learner.modules().values()):
            module.to(device)
        self.dtype, why_dtype = pick_dtype(cfg.dtype, device, self.n_params)
        self.make_optimizer()
        self.first, self.skipped = 0, torch.zeros(2, device=device)
        if state:
            self.resume_at(state)
        self.owed = state is not None and state["owed"]  # a checkpoint and its validation
        self.saved = self.first
        self.rows = cfg.batch_size * cfg.accumulation * world
        self.announce(why_device, why_dtype)
        self.forward = torch.compile(self.model) if cfg.compile else self.model
        if world > 1 and not cfg.fsdp:
            self.forward = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)

    def make_optimizer(self):
        """AdamW, weight decay on matrices. Only what requires a gradient."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for module in self.learner.modules().values():
            trained += [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.cfg.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        betas = (self.cfg.beta1, self.cfg.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=self.cfg.lr, betas=betas, fused=True)

    def resume_at(self, state):
        load_state(self.cfg.out_dir, state, optimizer=self.optimizer)
        self.first = state["step"]
        self.skipped = torch.tensor(state["skipped"], device=self.device, dtype=torch.float32)
        if machine.total(self.first, op="MAX") != machine.total(self.first, op="MIN"):
            fix = "--out_dir on a disk that all machines share"
            die(f"rank {self.rank} found a checkpoint of step {self.first}, others of another", fix)
        if self.rank == 0:
            checkpoint.forget_after(self.cfg.out_dir, self.first)

    def announce(self, why_device, why_dtype):
        """What runs on what, and why: the first lines of a run."""
        cfg, world = self.cfg, self.world
        backend, why = attention.choose_backend(
            self.device, self.dtype, cfg.d_model // cfg.n_heads, 2 * cfg.seq_len
        )
        if not isinstance(self.model, fast.FastTransformer):
            backend, why = "dense SDPA", "as in model.py"
        elif cfg.next_token or cfg.compile and self.device.type == "cpu":
            backend, why = "dense SDPA", "one stream" if cfg.next_token else "compiled"
        by = f"{world} process" if world == 1 else f"{world} processes by {'FSDP' if cfg.fsdp else 'DDP'}"
        dtype = f"{str(self.dtype)[6:]} ({why_dtype})"
        self.say(
            f"{self.device} ({why_device}), {by}, {dtype}, "
            f"attention: {backend} ({why}), {runs_on(self.device)}"
        )
        what = f"{cfg.process}{f', method {cfg.method}' * bool(cfg.method)}, block sizes {cfg.block_sizes}"
        learn = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        some = f", of which {learn:,} learn" if learn < self.n_params else ""
        self.say(f"{self.n_params:,} parameters{some}, {self.rows * cfg.seq_len:,} tokens a step, {what}")
        if note := self.learner.note():
            self.say(note)
        self.say(json.dumps(asdict(cfg)))

    # ----- checkpoints and validations

    def save(self, done):
        """Rank 0 writes a checkpoint of step `done`, the others wait; was it written?"""
        cfg = self.cfg
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        # every process gives its share
        state = machine.gather_full_state(state, self.rank == 0) if cfg.fsdp else state
        state |= {"version": checkpoint.VERSION, "process": checkpoint.process_facts(self.process)}
        if cfg.method:
            values = asdict(self.settings) if self.settings is not None else {}
            state["method"] = {"name": cfg.method, "settings": values, "state": self.learner.state_dict()}
        state |= {"config": asdict(cfg), "meta": self.data.meta, "step": done, **self.facts}
        state |= {
            "rows": self.rows,
            "given": self.given,
            "skipped": self.skipped.int().tolist(),
            "owed": self.owed,
        }
        written = True
        if self.rank == 0:
            try:
                checkpoint.log(cfg.out_dir)  # what still waits for room
                checkpoint.save(cfg.out_dir, state)
            except OSError as e:
                written = False
                warn(f"no checkpoint of step {done}: {e.strerror}. Those before it are as they were")
        if machine.total(written)[0] == self.world:
            self.saved = done

    def validate(self, done):
        """The EMA weights on the validation split; the best so far get a name. All processes take part."""
        cfg = self.cfg
        self.signals.at_once = self.world == 1  # everything is on the disk: no need to wait for this to end
        result = self.bounds(self.ema, self.process, self.data, cfg, share=(self.rank, self.world))
        finite = all(math.isfinite(mean) for mean, _ in result.values())
        texts = sample_lines(self.ema, self.process, self.data, cfg) if finite else []
        self.signals.at_once = False
        if self.rank != 0:
            return
        val, error = ({str(b): pair[i] for b, pair in result.items()} for i in range(2))
        mixture = lambda val: sum(w * val.get(str(b), math.inf) for b, w in cfg.block_sizes.items())
        file = Path(cfg.out_dir) / f"ckpt.{done}.pt"
        earlier = [mixture(r["val"]) for r in checkpoint.logged(cfg.out_dir) if "val" in r]
        try:
            if file.exists() and mixture(val) <= min(
                [x for x in earlier if math.isfinite(x)], default=math.inf
            ):
                checkpoint.also(file, "best.pt")
            if finite:
                checkpoint.prune(cfg.out_dir, done, cfg.keep)
        except OSError as e:
            warn(f"best.pt is not of step {done}: {e.strerror}")
        # last: after a kill before this line, --resume validates again
        checkpoint.log(cfg.out_dir, {"step": done, "val": val, "error": error})
        tqdm.write(
            f"val step {done} | {self.show_bounds(result, self.process)}{f' | saved {file}' * file.exists()}",
            file=sys.stdout,
        )
        for text in texts:
            tqdm.write(f"  sample: {text!r}", file=sys.stdout)

    def validate_if_owed(self):
        """A kill or a signal came between a checkpoint and its validation: it comes first."""
        if self.owed and self.skipped[1] == 0:
            self.owed = False
            if machine.total(self.rank == 0 and not checkpoint.validated(self.cfg.out_dir, self.first))[0]:
                self.validate(self.first)

    def stop_asked(self):
        """Did a signal reach any process? Processes that do not stop together wait for each other."""
        return machine.total(self.signals.name is not None)[0] > 0

    # ----- during the loop

    def give_up_if_ruined(self, done, in_a_row, bar):
        """
        Too many steps in a row without a finite gradient end the run; the newest good checkpoint becomes
        ckpt.pt.
        """
        if in_a_row < self.cfg.bad_steps:
            return
        bar.close()
        if self.rank > 0:
            raise SystemExit(2)  # rank 0 says why
        good = checkpoint.fall_back_to_good(self.cfg.out_dir) if self.saved else None
        last = f"the last good checkpoint is {good}" if good else "there is no good checkpoint"
        fix = f"{'--resume ' * bool(good)}--lr={self.cfg.lr / 4:.2g}"
        die(
            f"{in_a_row} steps in a row, up to step {done}, had no finite gradient, and were skipped; {last}",
            fix,
        )

    def look(self, done, loss, lr, norm, n_skipped, ms, bar):
        """A line of log.jsonl, and the numbers of the progress bar."""
        if self.world > 1:
            dist.all_reduce(loss)
        record = {
            "step": done,
            "loss": loss.item(),
            "lr": lr,
            "norm": norm.item(),
            "skipped": n_skipped,
            "ms": ms,
        }
        record["peak_mb"] = machine.total(machine.peak_mb(self.device), op="MAX")[0]
        record |= self.learner.record()
        rate = f"{ms:.0f} ms {1000 * self.rows * self.cfg.seq_len / ms:,.0f} tok/s" + (
            f" skipped {n_skipped}" if n_skipped else ""
        )
        bar.set_postfix_str(f"loss {record['loss']:.3f} norm {record['norm']:.2f} {rate}")
        if self.rank == 0:
            checkpoint.log(self.cfg.out_dir, record)

    def close(self, done, stop):
        """The last words of a run."""
        if self.saved < done:
            where = (
                f"the last good one is of step {self.saved}" if self.saved else "and there is none before it"
            )
            fix = f"free space for {self.cfg.out_dir}, then{' --resume' * (self.saved > 0) or ' again'}"
            die(f"no checkpoint of step {done}, {where}", fix)
        if done and self.skipped[0] == done and not stop:
            if self.rank > 0:
                raise SystemExit(2)  # rank 0 says why
            die(
                f"none of {done} steps had a finite gradient: nothing was learned",
                f"--lr={self.cfg.lr / 4:.2g}",
            )
        if stop:
            name = self.signals.name or "a signal to another process"
            self.say(f"{name}: stopped after step {done}" + ", saved; --resume goes on" * (self.saved > 0))
        else:
            self.say(f"done: python sample.py --ckpt {self.cfg.out_dir}")


def warn(text):
    tqdm.write(f"WARNING: {text}", file=sys.stderr)


def sample_lines(model, process, data, cfg):
    """A few generations with the largest block size: prompts of the validation split, or from nothing."""
    if cfg.n_samples == 0:
        return []
    x0, given, _ = data.windows("val", data.spread("val", cfg.n_samples))
    prompts = [row[: int((~keep).int().argmax())] for row, keep in zip(x0, given, strict=True)]
    b = max(cfg.block_sizes)
    how = {
        "steps": min(b, 32) if b > 1 else None,
        "eos_id": data.meta.get("eos_id"),
        "schedule": SCHEDULES[cfg.schedule],
    }
    for state in generate(model, process, prompts, block_size=b, **how):
        pass
    try:
        decode = data.tokenizer.decode
    except SystemExit:  # no GPT-2 byte pairs, and it has said so: no reason to end a run
        decode = lambda ids: f"(ids) {ids}"
    return [decode([i for i in row if i != NOTHING]) for row in state.x.tolist()]


def holding(cfg, rank):
    """The folder of a run, held by rank 0 alone."""
    return checkpoint.writing(cfg.out_dir, not cfg.resume) if rank == 0 else nullcontext()
