"""
How does it get by with fewer passes? A student learns in one pass what its teacher knows after a step more, takes the teacher's
place, and the step doubles.

    python distill.py --ckpt out/sudoku --out_dir out/sudoku_sdtt              masked noise: SDTT (arXiv 2410.21035)
    python distill.py --ckpt out/sudoku_uniform --out_dir out/sudoku_dcd       uniform noise or duo: DCD (arXiv 2506.10892)
    python eval.py --ckpt out/sudoku_sdtt --samples                            a student is a checkpoint like any other

The loop is train.py's (torchrun too); this file is its loss. Rows with block size 1 go on with cross-entropy, so that the AR mode,
and with it ARPC, stays what it was. Letters as in diffusion.py.
"""

import copy
import functools
import sys
from dataclasses import dataclass, replace

import torch

from diffusion import sigma_for
from hub.published import is_published, place
from kernels import send
from run import checkpoint, machine
from run.cli import die, load_config
from run.restore import same_tokens, take_up, trained_with
from train import train


@dataclass
class DistillConfig:
    ckpt: str = "out/sudoku"  # the teacher, a training run's out_dir, or published weights
    dataset: str = ""  # empty: the one it was trained on
    out_dir: str = ""  # the student; empty: the teacher's with _sdtt or _dcd
    resume: bool = False  # go on from the newest checkpoint of out_dir; there is one after each round
    teacher_steps: int = 32  # a block, in the first round: the teacher is dt = 1 / teacher_steps ahead of the student
    rounds: int = 5  # dt doubles in each; at most up to 1/2
    round_steps: int = 200  # optimizer steps of a round
    batch_size: int = 0  # rows of one forward of one process; 0: as the teacher was trained
    accumulation: int = 1
    lr: float = 3e-4
    warmup: int = 20
    ema: float = 0.99
    n_eval: int = 256  # windows of the validation split, for the bounds after each round
    n_samples: int = 0  # printed after each round
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0


# ----- what the student is taught


def log_p(process, logits, xt, alpha):
    """log p(x_0 | x_t) by a network's logits: at masks, or D for uniform noise. (B, L, V), finite."""
    if process.mask_id is None:
        return process.denoiser_logits(logits, xt, alpha).log_softmax(-1)
    return process.loo_logits(logits).clamp(min=-1e9).log_softmax(-1)  # the mask's share of a KL: 0 * -1e9, not 0 * -inf


def sdtt(teacher, process, x0, xt, alpha_t, alpha_s, noise):
    """
    Self-distillation through time, masked noise: two steps of the teacher in one. It takes its reverse step from t to s, and
    predicts again. A mask that this step lifted is taught the first prediction; the others the second, which has seen what
    the first wrote: that is how tokens drawn together come to fit. teacher(xt, alpha) -> logits; log p (B, L, V).
    """
    first = teacher(xt, alpha_t)
    xs = process.posterior_sample(first, xt, alpha_t, alpha_s, noise=noise)
    second = teacher(xs, alpha_s)
    return torch.where((xs == process.mask_id)[..., None], log_p(process, second, xs, alpha_s), log_p(process, first, xt, alpha_t))


def dcd(teacher, process, x0, xt, alpha_t, alpha_s, noise):
    """
    Discrete consistency distillation, uniform noise: what the teacher says at an earlier point of the same trajectory. Duo's
    trajectory is argmax(a_t onehot(x_0) + s_t n) with one Gaussian n for all t. Seen through the argmax, a token is x_0 until
    a_t / s_t falls below (largest other entry of n) - (x_0's own), and from then on the other token, a uniformly drawn one.
    So it is `corrupt` with the same random numbers at both times, and needs no Gaussian (tests/test_distill.py compares the two).
    The published steps are even in gamma in [-4, -1], these in the t of the noise schedule, as the sampler's are.
    """
    xs = process.corrupt(x0, alpha_s, noise)
    return log_p(process, teacher(xs, alpha_s), xs, alpha_s)


def distill_loss(forward, process, x0, block_size, t, objective, answer, schedule, start, noise, device=None, *, teacher, dt):
    """
    Takes the place of token_loss, arguments there: KL(student || teacher), the reverse KL, which prefers one way of completing
    the text to the average of all; in nats. Block size 1 goes on with cross-entropy.
    teacher: a Transformer. dt: how far ahead of the student it is; the SDTT student learns 2 dt in one step.
    """
    device = device or x0.device
    x0, answer, noise = send(x0, device), send(answer, device), noise.to(device)
    x, open, ar = x0[:, start:], answer[:, start:], torch.as_tensor(block_size).view(-1, 1) == 1
    t = t if process.mask_id is not None else (t + dt).clamp(max=1.0)
    alpha_t, alpha_s = schedule(t)[0], schedule((t - dt).clamp(min=1e-5))[0]
    level, ar = sigma_for(forward, torch.where(ar[:, 0], 0.0, alpha_t)), send(ar, x.device)
    here = copy.copy(noise)  # so that both draws of a trajectory begin with the same random numbers
    xt = torch.where(open, process.corrupt(x, alpha_t, here), x)

    def ask(xt, alpha):
        with torch.no_grad():
            return teacher(x0, torch.where(open, xt, x), block_size, start, sigma_for(teacher, alpha))

    target = (dcd if process.mask_id is None else sdtt)(ask, process, x, xt, alpha_t, alpha_s, noise if process.mask_id is None else here)
    read = torch.where(ar & open, process.ar_input(x.shape, here, x.device), xt)
    logits = forward(x0, read, block_size, start, level)
    log_q = log_p(process, logits, xt, alpha_t)
    kl = (log_q.exp() * (log_q - target)).sum(-1)
    noisy = open if process.mask_id is None else open & (xt == process.mask_id)
    each = torch.where(ar & open, process.ce(logits, x, read), torch.where(noisy & ~ar, kl, 0.0))
    return each.sum(), each.detach()


# ----- rounds


@machine.guard("a smaller --batch_size")
def main():
    cfg = load_config(DistillConfig, sys.argv[1:])
    for name in ("teacher_steps", "rounds", "round_steps"):
        if getattr(cfg, name) < 1:
            die(f"{name} is {getattr(cfg, name)}, it must be at least 1", f"--{name}={getattr(DistillConfig, name)}")
    if 2**cfg.rounds > cfg.teacher_steps:  # dt = 1: an SDTT teacher would teach itself, and DCD's would be shown x_0
        die(
            f"{cfg.rounds} rounds from dt = 1/{cfg.teacher_steps} end beyond dt = 1/2",
            f"--rounds={cfg.rounds} --teacher_steps={2**cfg.rounds}",
        )
    state = checkpoint.load(cfg.ckpt)
    run = trained_with(state)
    if not any(b > 1 for b in run.block_sizes):
        die(f"{cfg.ckpt} was trained on block size 1 alone: there are no steps to save", "train with --block_sizes=1:0.25,16:0.75")
    if run.process != "masked" and run.time_conditioning != "true":
        die(f"{cfg.ckpt} does not see the noise level, and DCD compares two", "train with --time_conditioning=true")
    if same_tokens(cfg.dataset or run.dataset, state, cfg.ckpt).get("row_len") and cfg.dataset:
        run.seq_len = 0  # the rows say how long they are
    beside = place(cfg.ckpt) if is_published(cfg.ckpt) else cfg.ckpt
    out_dir = cfg.out_dir or beside.rstrip("/").removesuffix("/best.pt") + ("_sdtt" if run.process == "masked" else "_dcd")
    facts = {"network": state["network"]} if "network" in state else {}
    facts |= {"distilled": {name: getattr(cfg, name) for name in ("ckpt", "teacher_steps", "round_steps")}}
    if cfg.resume and not checkpoint.begun(out_dir):
        before = checkpoint.load(out_dir)
        for name, value in before.get("distilled", {}).items():
            if value != facts["distilled"].get(name):
                die(f"{out_dir} was distilled with {name} {value}, not {getattr(cfg, name, '')}", f"--{name}={value}, or another --out_dir")
        if "teacher" not in before or "distilled" not in before:
            die(f"{out_dir} is not a run of distill.py", "train.py --resume, or another --out_dir")
        facts["teacher"] = before["teacher"]
    student = replace(
        run,
        dataset=cfg.dataset or run.dataset,
        out_dir=out_dir,
        max_steps=cfg.rounds * cfg.round_steps,
        batch_size=cfg.batch_size or run.batch_size,
        lr_schedule="constant",
        eval_every=cfg.round_steps,
        fsdp=False,
        overfit=False,
        **{k: getattr(cfg, k) for k in ("resume", "accumulation", "lr", "warmup", "ema", "n_eval", "n_samples", "device", "dtype", "seed")},
    )
    teacher = None

    def loss_at(_, step, model, process):
        nonlocal teacher
        if step % cfg.round_steps == 0 or teacher is None:
            teacher = copy.deepcopy(model).eval().requires_grad_(False)
            if step % cfg.round_steps:  # resumed within a round
                take_up(out_dir, facts, teacher=teacher)
            facts["teacher"] = teacher.state_dict()  # for a stop within a round
        return functools.partial(distill_loss, teacher=teacher, dt=2 ** (step // cfg.round_steps) / cfg.teacher_steps)

    train(student, loss_at, state["ema"], facts)


if __name__ == "__main__":
    main()
