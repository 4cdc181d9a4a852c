"""
What can be set? Every setting of train.py, sample.py and eval.py, one comment each, and what cannot be asked
together.

A dataclass is the command line and the TOML files at once: run/cli.py reads them.
"""

import math
from dataclasses import dataclass, field

import torch

from diffusion import SCHEDULES
from run.cli import die, parse_dict


@dataclass
class TrainConfig:
    dataset: str = "shakespeare_char"  # a folder under data/ with train.bin, val.bin, meta.json
    # checkpoints and log.jsonl go here; an earlier run there moves to out_dir/earlier.1
    out_dir: str = "out/run"
    # weights to begin with: a run's out_dir, or published ones (hub/published.py), hf:OWNER/REPO/SUBFOLDER
    init_from: str = ""
    # go on from the newest checkpoint of out_dir, or from the first step if the run there has none yet
    resume: bool = False

    # ----- what is learned
    process: str = "masked"  # the noise: masked or uniform; or what --method brings
    # a system of the literature, a file in methods/: duo, distill, gidd, ...; see --method NAME --help
    method: str = ""
    # size:weight,...: the share of rows trained with each
    block_sizes: dict = field(default_factory=lambda: {1: 0.25, 16: 0.75})
    # ce, elbo or ce_noisy; or by block size, 4:elbo,16:ce. Size 1 is exact whatever this says
    objective: str = "ce"
    schedule: str = "loglinear"  # of the noise: loglinear or cosine
    # the noisy stream sees the noise level: true, false, auto (uniform: true)
    time_conditioning: str = "auto"
    # uniform: denoiser (what ce teaches; elbo can) or loo (elbo; ce_noisy is used so too); auto: by objective
    predicts: str = "auto"
    random_ar: bool = False  # uniform: block size 1 reads random tokens, as published, not one constant id

    # ----- the network
    seq_len: int = 0  # T, the context; 0: the dataset's row length
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 128
    dropout: float = 0.0  # of what a layer adds, in training
    # false (one block size above 1): clean blocks read themselves both ways; the cache serves no other size
    clean_causal: bool = True
    # show padding clean and never charge it, as published weights were trained: then no bound (docs/log.md)
    clean_padding: bool = False
    next_token: bool = False  # block_sizes 1:1 as an ordinary AR transformer, one stream instead of two

    # ----- optimisation
    max_steps: int = 1500  # optimizer steps
    batch_size: int = 64  # rows of one forward of one process
    # forwards per optimizer step: a step sees batch_size * accumulation * processes rows
    accumulation: int = 1
    lr: float = 2e-3  # peak
    warmup: int = 50  # steps of linear warmup
    # afterwards: constant, cosine to 0, or wsd (constant, then linear to 0 over the second half)
    lr_schedule: str = "wsd"
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.05  # on matrices
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    ema: float = 0.999  # of the weights; what is evaluated and sampled

    # ----- looking at it
    eval_every: int = 500  # steps between checkpoints, each followed by a validation; also at the end
    keep: int = 2  # newest checkpoints kept, besides the best
    n_eval: int = 256  # windows of the validation split
    n_samples: int = 2  # printed at each validation
    log_every: int = 10  # steps between lines of log.jsonl

    # ----- the machine
    device: str = "auto"  # cuda, mps or cpu
    # of the forward: float32 or bfloat16 (autocast; weights, logits and losses stay float32)
    dtype: str = "auto"
    plain: bool = False  # run the lesson as it stands, not fast/: slower, the same numbers
    compile: bool = False  # torch.compile: slow first step, faster others
    seed: int = 0  # the same seed on the same device gives the same run
    backend: str = "auto"  # of torch.distributed: nccl on GPUs, gloo elsewhere
    # under torchrun, for models that outgrow one GPU: each process holds a share of the weights, not all
    fsdp: bool = False
    # seconds a process waits for another before it ends; writing a checkpoint must take less
    timeout: float = 600

    # ----- when something is wrong
    # the first step's batch at every step: a network that can learn at all learns it by heart
    overfit: bool = False
    # a step that is not finite is skipped; so many in a row, when the log looks, end the run
    bad_steps: int = 10

    def __post_init__(self):
        """Settle what settings imply for each other, before anything is downloaded or allocated."""
        if self.process == "duo":
            die("Duo is a method: uniform noise, and how training begins", "--method duo, without --process")
        for name, allowed in (
            ("process", ("masked", "uniform")),
            ("schedule", tuple(SCHEDULES)),
            ("time_conditioning", ("auto", "true", "false")),
            ("lr_schedule", ("constant", "cosine", "wsd")),
            ("dtype", ("auto", "float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                die(
                    f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}",
                    f"--{name}={allowed[0]}",
                )
        if self.out_dir.startswith(("hf:", "http:", "https:")):
            die(f"out_dir {self.out_dir!r} is no folder", "--out_dir=out/NAME")
        counts = "n_layers n_heads d_model batch_size accumulation max_steps eval_every n_eval log_every"
        for name in f"{counts} keep bad_steps".split():
            if getattr(self, name) < 1:
                die(
                    f"{name} is {getattr(self, name)}, it must be at least 1",
                    f"--{name}={type(self).__dataclass_fields__[name].default}",
                )
        for name, low, high in (
            ("lr", 0, math.inf),
            ("warmup", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("grad_clip", 0, math.inf),
            ("beta1", 0, 1),
            ("beta2", 0, 1),
            ("ema", 0, 1),
            ("dropout", 0, 1),
            ("n_samples", 0, math.inf),
            ("seed", 0, 2**62),
            ("timeout", 1, 2**31),
        ):
            if not low <= getattr(self, name) < high:
                die(
                    f"{name} is {getattr(self, name)}, it must be in [{low}, {high})",
                    f"--{name}={type(self).__dataclass_fields__[name].default}",
                )
        if self.d_model % (2 * self.n_heads):
            die(
                f"d_model {self.d_model} does not give each of {self.n_heads} heads an even width",
                f"--d_model={2 * self.n_heads * 16}",
            )
        weights = list(self.block_sizes.values())
        if (
            not weights
            or not all(isinstance(w, (int, float)) and w > 0 for w in weights)
            or not all(k > 0 for k in self.block_sizes)
        ):
            die(
                f"block_sizes {self.block_sizes}: sizes and weights must be positive",
                "--block_sizes=1:0.25,16:0.75",
            )
        if abs(sum(weights) - 1) > 1e-6:
            die(
                f"the weights of block_sizes {self.block_sizes} sum to {sum(weights):g}, not 1",
                "--block_sizes=1:0.25,16:0.75",
            )
        names = self.objectives()
        asked = set(names.values()) if ":" in self.objective else {self.objective}
        if not asked <= {"ce", "elbo", "ce_noisy"} or set(names) != set(self.block_sizes) - {1}:
            die(
                f"objective {self.objective!r}: ce, elbo or ce_noisy, "
                f"for all or for each of {sorted(self.block_sizes)}",
                "--objective=ce",
            )
        if self.process != "masked" and "ce" in names.values() and len(set(names.values())) > 1:
            die(
                "uniform noise: ce teaches p(x0 | x_t), elbo the leave-one-out posterior; "
                "a network predicts one",
                "--objective=ce",
            )
        if self.next_token and (
            set(self.block_sizes) != {1} or self.process != "masked" or self.time_conditioning == "true"
        ):
            die(
                "next_token is an AR transformer: no noise, no larger blocks",
                "--next_token --block_sizes=1:1 --process=masked",
            )
        if not self.clean_causal and (len(self.block_sizes) > 1 or 1 in self.block_sizes):
            die(
                "clean_causal=false ties the clean stream to one block size above 1",
                "--block_sizes=16:1, or --clean_causal=true",
            )
        if self.random_ar and self.process == "masked":
            die("random_ar is for uniform noise: a masked model reads the mask", "--random_ar=false")
        # masked: they are one
        taught = "denoiser" if self.process == "masked" or set(names.values()) <= {"ce"} else "loo"
        # the bound converts, so either can be its output
        if set(names.values()) == {"elbo"} and self.predicts == "denoiser":
            taught = "denoiser"
        if self.predicts not in ("auto", taught):
            die(
                f"predicts {self.predicts!r}: a network trained with {self.objective} predicts {taught}",
                f"--predicts={taught}",
            )
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
                die(
                    f"block size {b} does not divide seq_len {self.seq_len}",
                    f"--block_sizes={near}:1, or another --seq_len",
                )


@dataclass
class SampleConfig:
    ckpt: str = "out/run"  # a training run's out_dir
    init_from: str = ""  # or published weights: hf:OWNER/REPO/SUBFOLDER, or a folder (hub/published.py)
    prompt: str = ""  # the text to go on from; for rows like sudoku's nothing means blanks
    chat: str = ""  # or a question, for an instructed model: its template, ChatML, is put around it
    prompt_file: str = ""  # or one prompt a line, of any lengths, each with n_samples
    hole: str = ""  # what stands for a token to fill in, in a prompt: with --hole _, "3+_=07;" has one hole
    # draw so many fillings and choose one by how well the text behind it follows (methods/infilling.py)
    gaps: int = 1
    # or ar, arpc, psi, confidence, speculation, ...; --sampler NAME --help explains one and lists all
    sampler: str = "ancestral"
    block_size: int = 0  # tokens denoised together; 0: the largest that was trained. 1 is autoregressive
    steps: int = 0  # steps per block; 0: one a token
    ar_tokens: int = 0  # so many tokens first by block size 1 (AR-then-block)
    max_new_tokens: int = 0  # 0: up to the end of the context
    n_samples: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # nucleus
    regex: str = ""  # only texts that match it, prompt included; see docs/constraints.md
    constraint: str = ""  # or FILE.py:name, a language of your own
    exact: int = 1  # weighted copies of each text under a constraint: more is closer to exact over all steps
    seed: int = 1
    animate: bool = False  # redraw the block at work in place; plain text where output is not a terminal
    fps: float = 8.0  # frames a second of --animate, at most, and of --gif
    # a page to watch how the texts were made, step by step: one file, for any browser (docs/watch.md)
    html: str = ""
    trace: str = ""  # the same record as JSON lines, for a notebook
    gif: str = ""  # or as a film: FILE.gif, or FILE.png with the steps below each other
    device: str = "auto"
    plain: bool = False  # run the lesson as it stands, not fast/: slower, the same distribution
    weights: str = ""  # int8 or int4: the layers' matrices rounded (run/rounding.py); empty: as they are
    seq_len: int = 0  # a longer context than the trained one; 0: the trained one
    rope_factor: float = 1.0  # with it: multiplies the base of the rotary positions
    # bfloat16: the layers' products in it, faster where the hardware has it; logits and draws stay float32
    dtype: str = "float32"
    # record passes as CUDA graphs and play them: for few rows on a GPU (fast/graphs.py); not tried on one yet
    graphs: bool = False

    def __post_init__(self):
        """What is wrong whatever the checkpoint is: said before it is read."""
        for name, fine, fix in (
            ("n_samples", 1 <= self.n_samples <= 10**6, "1"),
            ("gaps", 1 <= self.gaps <= 10**6, "16"),
            ("steps", 0 <= self.steps < 2**31, "8"),
            ("max_new_tokens", 0 <= self.max_new_tokens < 2**31, "16"),
            ("ar_tokens", 0 <= self.ar_tokens < 2**31, "0"),
            ("temperature", 0 <= self.temperature < math.inf, "1.0 (0 is greedy)"),
            ("top_p", 0 < self.top_p <= 1, "0.9"),
            ("fps", self.fps > 0, "8"),
            ("exact", 1 <= self.exact <= 10**6, "16"),
            ("seed", 0 <= self.seed < 2**62, "1"),
            ("dtype", self.dtype in ("float32", "bfloat16"), "float32"),
        ):
            if not fine:
                die(f"{name} cannot be {getattr(self, name)}", f"--{name} {fix}")
        if self.chat and (self.prompt or self.prompt_file or self.hole):
            die("--chat is a prompt by itself", "leave --prompt, --prompt_file and --hole out")
        if self.prompt and self.prompt_file:
            die("--prompt and --prompt_file together", "--prompt_file FILE, one prompt a line")
        if self.regex and self.constraint:
            die("--regex and --constraint together", "one of them")
        if self.exact > 1 and not (self.regex or self.constraint):
            die("--exact weighs copies of a text under a constraint, and there is none", "--regex '...'")
        if (self.html or self.trace or self.gif) and max(self.exact, self.gaps) > 1:
            problem = (
                "--html, --trace and --gif show how a text is made, --exact and --gaps choose one of several"
            )
            die(problem, "leave --exact and --gaps out")
        if self.gif and not self.gif.endswith((".gif", ".png")):
            die(
                f"--gif {self.gif}: a film is a .gif, or a .png with the steps below each other",
                "--gif film.gif",
            )
        if self.graphs and self.plain:
            die("--graphs records the passes of fast/, and --plain runs none", "leave one of them out")


@dataclass
class EvalConfig:
    ckpt: str = "out/run"  # a training run's out_dir
    init_from: str = ""  # or published weights: hf:OWNER/REPO/SUBFOLDER, or a folder (hub/published.py)
    dataset: str = ""  # another than it was trained on, in the same tokens
    block_size: int = 0  # one of those it was trained with; 0: all
    n_eval: int = 512  # windows of the validation split; 0: all of it
    # draws of noise a window for a bound: even, half of them check the other half; or 1, without a Monte
    # Carlo error
    n_mc: int = 8
    seed: int = 1
    json: str = ""  # the same numbers, in this file
    device: str = "auto"
    plain: bool = False  # run the lesson as it stands, not fast/: slower, the same numbers
    weights: str = ""  # int8 or int4: the layers' matrices rounded (run/rounding.py); empty: as they are
    seq_len: int = 0  # windows longer than the trained context; 0: the trained one
    rope_factor: float = 1.0  # with it: multiplies the base of the rotary positions
    skip: int = 0  # the first tokens of a window are read and not counted


def check_request(
    model, process, prompt, block_size, sampler, options, end, steps, max_new_tokens, ar_tokens, trained
):
    """Raise ValueError for what generate cannot do, before the first pass."""
    name, blocked = (
        sampler.__name__,
        "the clean stream of this model is block-causal: its cache cannot serve block size 1 as well",
    )
    least = {"block_size": (block_size, 1), "steps": (steps, 1)}
    for what, (value, low) in (
        least | {"ar_tokens": (ar_tokens, 0), "max_new_tokens": (max_new_tokens, 0)}
    ).items():
        if value is not None and value < low:
            raise ValueError(f"{what} must be at least {low}, not {value}")
    # -2: a hole, generate.HOLE
    ids = torch.cat(prompt)
    if ((ids < 0) & (ids != -2) | (ids >= process.vocab_size) | (ids == process.mask_id)).any():
        raise ValueError(f"a prompt is a sequence of ids below {process.vocab_size}, and no mask")
    width = -(-end // block_size) * block_size
    if width > model.cfg.seq_len:
        raise ValueError(
            f"{end} tokens in blocks of {block_size} take {width} positions; "
            f"the model has {model.cfg.seq_len}"
        )
    if ar_tokens and block_size > 1 and not model.cfg.clean_causal:
        raise ValueError(blocked)
    needs = getattr(sampler, "needs", ())
    known = None if trained is None else {*trained, block_size} if "any block" in needs else trained
    for b in {block_size, 1} if ar_tokens else {block_size}:
        if known is not None and b not in known:
            raise ValueError(
                f"this network was trained on block sizes {', '.join(map(str, trained))}, not {b}"
            )
    if (block_size == 1) != (name == "ar") and not (block_size == 1 and name == "ancestral"):
        raise ValueError(f"block size 1 and the sampler ar belong together: got {block_size} and {name}")
    if block_size == 1 and options:
        raise ValueError(f"block size 1 is the sampler ar: it has no options, got {', '.join(options)}")
    maskless = process.mask_id is None
    remasks = process.absorbing and not maskless
    if "absorbing" in needs and not remasks or "redraws" in needs and process.absorbing:
        noise = "noise without a mask" if maskless else "masked noise"
        noise = noise if process.absorbing else "noise that may change a visible token, as uniform noise"
        raise ValueError(f"{name} is not defined for {noise}")
    if steps is not None and ("own pace" in needs or block_size == 1):
        raise ValueError(
            f"{'ar' if block_size == 1 else name} takes as many passes as it needs: steps mean nothing"
        )


if __name__ == "__main__":
    print(__doc__)
