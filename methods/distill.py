"""
Distillation: a student learns in one pass what its teacher knows after a step more, takes the teacher's
place, and the step doubles.

    python train.py --method distill --ckpt out/sudoku --out_dir out/sudoku_sdtt
    python train.py --method distill --ckpt out/sudoku_uniform --out_dir out/sudoku_dcd
    python -m lab.quality --ckpt out/sudoku_sdtt

Masked noise: SDTT (arXiv 2410.21035). Uniform noise: DCD (arXiv 2506.10892). A student is a checkpoint like
any other. Rows with block size 1 go on with cross-entropy, so that the AR mode, and with it ARPC, stays what
it was. Letters as in diffusion.py.
"""

import copy
import functools
from dataclasses import dataclass

import torch

import methods
from diffusion import Masked, Uniform, sigma_for
from run.cli import die


@dataclass
class Settings:
    ckpt: str = "out/run"  # the teacher, a training run's out_dir, or published weights
    # a block, in the first round: the teacher is dt = 1 / teacher_steps ahead of the student
    teacher_steps: int = 32
    rounds: int = 5  # dt doubles in each; at most up to 1/2
    round_steps: int = 200  # optimizer steps of a round


FIXED = ("ckpt", "teacher_steps", "round_steps")
INHERITS = ("batch_size", "weight_decay", "beta1", "beta2", "grad_clip", "log_every", "keep")


def DEFAULTS(s):
    folder = methods.folder_of(s.ckpt)
    if ":" in folder:
        folder = "out/" + folder.split("/")[-1]
    steps = max(s.round_steps, 1)  # what is below 1 is refused by check, which says so better
    return {
        "init_from": s.ckpt,
        "out_dir": f"{folder}_distilled",
        "max_steps": max(s.rounds, 1) * steps,
        "eval_every": steps,
        "lr": 3e-4,
        "warmup": 20,
        "lr_schedule": "constant",
        "ema": 0.99,
        "n_samples": 0,
    }


def check(cfg, s):
    if cfg.init_from != s.ckpt:
        die("distillation begins from its teacher, which --ckpt names", f"--ckpt {cfg.init_from}")
    for name in ("teacher_steps", "rounds", "round_steps"):
        if getattr(s, name) < 1:
            die(f"{name} is {getattr(s, name)}, it must be at least 1", f"--{name}={getattr(Settings, name)}")
    # dt = 1: an SDTT teacher would teach itself, and DCD's would be shown x_0
    if 2**s.rounds > s.teacher_steps:
        fix = f"--rounds={s.rounds} --teacher_steps={2**s.rounds}"
        die(f"{s.rounds} rounds from dt = 1/{s.teacher_steps} end beyond dt = 1/2", fix)
    if not any(b > 1 for b in cfg.block_sizes):
        die(
            f"{s.ckpt} was trained on block size 1 alone: there are no steps to save",
            "train with --block_sizes=1:0.25,16:0.75",
        )
    if cfg.process != "masked" and cfg.time_conditioning != "true":
        die(
            f"{s.ckpt} does not see the noise level, and DCD compares two",
            "train with --time_conditioning=true",
        )
    if cfg.fsdp:
        die("the teacher is a copy of the whole network: no FSDP", "--fsdp=false")


# ----- what the student is taught


def log_p(process, logits, xt, alpha):
    """log p(x_0 | x_t) by a network's logits: at masks, or D for uniform noise. (B, L, V), finite."""
    if not process.absorbing:
        return process.denoiser_logits(logits, xt, alpha).log_softmax(-1)
    # the mask's share of a KL: 0 * -1e9, not 0 * -inf
    return process.loo_logits(logits).clamp(min=-1e9).log_softmax(-1)


def sdtt(teacher, process, x0, xt, alpha_t, alpha_s, noise):
    """
    Self-distillation through time, masked noise: two steps of the teacher in one. It takes its reverse step
    from t to s, and predicts again. A mask that this step lifted is taught the first prediction; the others
    the second, which has seen what the first wrote: that is how tokens drawn together come to fit.
    teacher(xt, alpha) -> logits; log p (B, L, V).
    """
    first = teacher(xt, alpha_t)
    xs = process.posterior_sample(first, xt, alpha_t, alpha_s, noise=noise)
    second = teacher(xs, alpha_s)
    return torch.where(
        (~process.known(xs))[..., None],
        log_p(process, second, xs, alpha_s),
        log_p(process, first, xt, alpha_t),
    )


def dcd(teacher, process, x0, xt, alpha_t, alpha_s, noise):
    """
    Discrete consistency distillation, uniform noise: what the teacher says at an earlier point of the same
    trajectory. Duo's trajectory is argmax(a_t onehot(x_0) + s_t n) with one Gaussian n for all t. Seen
    through the argmax, a token is x_0 until a_t / s_t falls below (largest other entry of n) - (x_0's own),
    and from then on the other token, a uniformly drawn one. So it is `corrupt` with the same random numbers
    at both times, and needs no Gaussian (tests/test_distill.py compares the two). The published steps are
    even in gamma in [-4, -1], these in the t of the noise schedule, as the sampler's are.
    """
    xs = process.corrupt(x0, alpha_s, noise)
    return log_p(process, teacher(xs, alpha_s), xs, alpha_s)


def distill_loss(
    forward,
    process,
    x0,
    block_size,
    t,
    objective,
    given,
    charged,
    schedule,
    start,
    noise,
    device=None,
    *,
    teacher,
    dt,
):
    """
    Takes the place of token_loss, arguments there: KL(student || teacher), the reverse KL, which prefers one
    way of completing the text to the average of all; in nats. Block size 1 goes on with cross-entropy.
    teacher: a Transformer. dt: how far ahead of the student it is; the SDTT student learns 2 dt in one step.
    """
    x0, given, charged, noise = (y.to(device or x0.device) for y in (x0, given, charged, noise))
    x, given, charged = x0[:, start:], given[:, start:], charged[:, start:]
    is_ar = torch.as_tensor(block_size).expand(len(x)) == 1
    ar = is_ar.to(x.device)[:, None]
    t = t if process.absorbing else (t + dt).clamp(max=1.0)
    alpha_t, alpha_s = schedule(t)[0], schedule((t - dt).clamp(min=1e-5))[0]
    level = sigma_for(forward, torch.where(is_ar, 0.0, alpha_t))
    again = copy.copy(noise)  # so that both draws of a trajectory begin with the same random numbers
    xt = torch.where(given, x, process.corrupt(x, alpha_t, again))

    def ask(xt, alpha):
        with torch.no_grad():
            return teacher(x0, torch.where(given, x, xt), block_size, start, sigma_for(teacher, alpha))

    teach, numbers = (sdtt, again) if process.absorbing else (dcd, noise)
    target = teach(ask, process, x, xt, alpha_t, alpha_s, numbers)
    read = torch.where(ar & ~given, process.ar_input(x.shape, again), xt)
    logits = forward(x0, read, block_size, start, level)
    log_q = log_p(process, logits, xt, alpha_t)
    kl = (log_q.exp() * (log_q - target)).sum(-1)
    pays = charged & torch.where(ar, process.pays(x, read), process.pays(x, xt))
    per_token = torch.where(pays, torch.where(ar, process.ce(logits, x, read, 0.0), kl), 0.0)
    return per_token.sum(), per_token.detach()


class Learner(methods.Learner):
    """A teacher takes the student's weights at the first step of each round."""

    teacher = None

    def __init__(self, cfg, settings, model, process, token_loss):
        super().__init__(cfg, settings, model, process, token_loss)
        own = type(process).__module__.startswith("methods.")  # a method's noise may ask more of the output
        if own or not isinstance(process, (Masked, Uniform)):
            die(
                f"distillation knows masked and uniform noise, not {type(process).__name__}",
                "--ckpt of another run",
            )

    def loss(self, step):
        s = self.settings
        if step % s.round_steps == 0 or self.teacher is None:
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        return functools.partial(
            distill_loss, teacher=self.teacher, dt=2 ** (step // s.round_steps) / s.teacher_steps
        )

    def modules(self):
        return {"teacher": self.teacher} if self.teacher is not None else {}

    def state_dict(self):
        return {"teacher": self.teacher.state_dict()} if self.teacher is not None else {}

    def load_state_dict(self, state):
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.teacher.load_state_dict(state["teacher"])


STUDENT = (
    "--method distill --ckpt {control} --max_steps 1000 --eval_every 1000 --lr 3e-4 --lr_schedule constant"
)
ROWS = [
    {
        "system": "SDTT",
        "paper": "2410.21035",
        "claim": "the student has more right in 4 steps than its teacher",
        "train": STUDENT,
        "control": "",
        "by": "right 4",
    },
    {
        "system": "DCD",
        "paper": "2506.10892",
        "claim": "the student has more right in 4 steps than its teacher",
        "train": STUDENT,
        "control": "--process uniform",
        "by": "right 4",
    },
]
