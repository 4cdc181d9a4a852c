"""
How does it write? Text from a checkpoint, block by block.

    python sample.py --ckpt out/sudoku --prompt "..3.1.........4." --block_size 16 --steps 8 --n_samples 4
    python sample.py --ckpt out/sudoku --animate                       watch noise become text
    python sample.py --ckpt out/sudoku --sampler arpc --guide_every 2  a sampler with an option of its own
    python sample.py --sampler arpc --help                             what it does, its options, its paper
    python sample.py --init_from hf:jdeschena/blockgen/baselines/owt/mdlm --max_new_tokens 64 --steps 32       published weights

Block size 1 is autoregressive. What training decided (tokenizer, noise, sizes) comes from the checkpoint.
"""

import difflib
import inspect
import itertools
import shutil
import sys
import time
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import torch

from data.tokens import Tokenizer
from diffusion import SCHEDULES
from generate import MASKED_ONLY, NOTHING, OWN_PACE, READS_AR, SAMPLERS, UNIFORM_ONLY, generate
from run import machine
from run.cli import command, die, load_config, read_toml
from run.restore import restore


@dataclass
class SampleConfig:
    ckpt: str = "out/run"  # a training run's out_dir
    init_from: str = ""  # or published weights: hf:OWNER/REPO/SUBFOLDER, or a folder (published.py)
    prompt: str = ""  # the text to go on from; for rows like sudoku's nothing means blanks
    prompt_file: str = ""  # or one prompt a line, of any lengths, each with n_samples
    sampler: str = "ancestral"  # or ar, arpc, psi, confidence, speculation, ...; --sampler NAME --help explains one and lists all
    block_size: int = 0  # tokens denoised together; 0: the largest that was trained. 1 is autoregressive
    steps: int = 0  # steps per block; 0: one a token
    ar_tokens: int = 0  # so many tokens first by block size 1 (AR-then-block)
    max_new_tokens: int = 0  # 0: up to the end of the context
    n_samples: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # nucleus
    seed: int = 1
    animate: bool = False  # redraw the block at work in place; plain text where output is not a terminal
    fps: float = 8.0  # frames a second of --animate, at most
    device: str = "auto"
    dtype: str = "float32"  # bfloat16: the layers' products in it, faster where the hardware has it; logits and draws stay float32
    graphs: bool = False  # record passes as CUDA graphs and play them: for few rows on a GPU (recorded.py); not tried on one yet


# ----- samplers and their own options


def options(sampler):
    """{name: default} of a sampler's own options: its keyword arguments."""
    return {p.name: p.default for p in inspect.signature(sampler).parameters.values() if p.kind is p.KEYWORD_ONLY}


def explain(sampler, own):
    """What --sampler NAME --help prints."""
    limits = {
        "masked noise only": sampler in MASKED_ONLY,
        "uniform noise only": sampler in UNIFORM_ONLY,
        "block size 1 must have been trained too": sampler in READS_AR,
        "takes no --steps": sampler in OWN_PACE,
    }
    print(f"--sampler {sampler.__name__}" + "".join(f"; {what}" for what, so in limits.items() if so) + f"\n\n{inspect.getdoc(sampler)}\n")
    print("Its own options and their defaults:" if own else "It has no options of its own.")
    for option, default in own.items():
        print(f"    --{option}" + ("" if default == "" else f"    {default}"))
    print(f"\nAll samplers: {', '.join(SAMPLERS)}.\nWhat they share: python {command()} --help")


def load_with_sampler(cls, argv):
    """(settings, sampler, its options) from command-line words: `cls` and the options of the sampler that --sampler names."""
    named, from_file = [], []
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        if word.partition("=")[0] == "--sampler":
            named.append(word.partition("=")[2] or ("" if following.startswith("--") else following))
        elif word.endswith(".toml") and not word.startswith("--"):
            from_file += [str(read_toml(word).get("sampler", cls.sampler))]
    name = (named or from_file or [cls.sampler])[-1]  # flags win
    if name not in SAMPLERS and (named or from_file):
        near = difflib.get_close_matches(name, SAMPLERS, 1)
        die(f"no sampler named {name!r}", f"--sampler {near[0] if near else '|'.join(SAMPLERS)}")
    sampler = SAMPLERS.get(name)  # None: eval.py's default, several
    own = options(sampler) if sampler else {}
    if {"-h", "--help"} & set(argv):
        if named:
            explain(sampler, own)
            raise SystemExit
        load_config(cls, ["--help"])
    for word in argv:
        flag = word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""
        others = [s for s, f in SAMPLERS.items() if flag in options(f)]
        if others and flag not in cls.__dataclass_fields__ and flag not in own:
            one = others[0]
            die(f"--{flag} is an option of {', '.join(others)}" + (f", not of {name}" if name else ": which?"), f"--sampler {one}")
    both = make_dataclass(cls.__name__, [(o, type(default), default) for o, default in own.items()], bases=(cls,))
    both.__module__ = cls.__module__
    cfg = load_config(both, argv, help=f"--sampler {name} --help" if sampler else "--help")
    return cfg, sampler, {o: getattr(cfg, o) for o in own}


# ----- what a person sees

DIM, COLOUR, PLAIN = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"


def cells(row, before, tokenizer, mask_id):
    """One string a token: dim dots for masks and nothing, colour where this step changed something."""
    out = []
    for i, token in enumerate(row):
        if token == NOTHING:
            out.append(" ")
        elif token == mask_id:
            out.append(f"{DIM}░{PLAIN}")
        else:
            text = tokenizer.decode([token])
            out.append(f"{COLOUR}{text}{PLAIN}" if before is not None and before[i] != token else text)
    return out


def pages_across(width):
    """So many pages of `width` spaced characters fit side by side."""
    return max(1, (shutil.get_terminal_size().columns + 3) // (2 * width + 3))


def frame(state, before, tokenizer, mask_id, meta):
    """Lines of one animation frame. Rows with a `width` stand side by side, prompt above, as little pages; others run on."""
    rows = state.x.tolist()
    pages = [cells(row, None if before is None else before[i], tokenizer, mask_id) for i, row in enumerate(rows)]
    if "width" in meta:
        w = meta["width"]
        pages = pages[: pages_across(w)]  # more would wrap, and a wrapped line cannot be redrawn
        lines = ["    ".join(" ".join(page[i : i + w]) for page in pages) for i in range(0, len(pages[0]), w)]
        above = meta.get("prompt_len", 0) // w
        return lines[:above] + [""] * (above > 0) + lines[above:]
    columns, lines = shutil.get_terminal_size().columns - 1, []
    for page in pages:  # wrap by hand: escape codes have no width
        line, used = "", 0
        for cell in page:
            visible = cell.replace(DIM, "").replace(COLOUR, "").replace(PLAIN, "")
            for c in visible if "\n" in visible else [visible]:
                if c == "\n" or used + len(c) > columns:
                    lines.append(line)
                    line, used = "", 0
                if c != "\n":
                    line, used = line + (cell if c == visible else c), used + len(c)
        lines += [line, ""]
    return lines[-(shutil.get_terminal_size().lines - 2) :]  # what is taller than the screen cannot be redrawn


def animate(states, tokenizer, mask_id, meta, fps):
    before, height = None, 0
    for state in states:
        start = time.time()
        lines = frame(state, before, tokenizer, mask_id, meta)
        up = f"\x1b[{height}A" if height else ""
        sys.stdout.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
        sys.stdout.write("\x1b[J")
        sys.stdout.flush()
        before, height = state.x.tolist(), len(lines)
        yield state
        time.sleep(max(0.0, 1 / fps - (time.time() - start)))
    if "width" in meta:  # frame left out what did not fit beside
        for row in state.x.tolist()[pages_across(meta["width"]) :]:
            print(tokenizer.decode([t for t in row if t != NOTHING]))


def stream(states, tokenizer, prompt):
    """The first sample appears block by block as it is made; the others, made in the same passes, follow whole."""
    shown = 0
    print(f"--- sample 1\n{prompt}", end="", flush=True)
    for state in states:
        row = [i for i in state.x[0].tolist() if i != NOTHING]
        if state.finished or state.done[0]:
            text = tokenizer.decode(row[: state.span[1]])
            if not state.done[0]:
                text = text.rstrip("\ufffd")  # half a character: its other bytes come with the next block
            sys.stdout.write(text[max(shown, len(prompt)) :])
            sys.stdout.flush()
            shown = max(shown, len(text))
        yield state
    for i, row in enumerate(state.x[1:].tolist()):
        print(f"\n--- sample {i + 2}\n{tokenizer.decode([t for t in row if t != NOTHING])}", end="")
    print()


# ----- the command


def tokenizer_of(meta, run, asked):
    """The Tokenizer; without its files ids are shown, unless there is a prompt to be read."""
    try:
        return Tokenizer(meta, Path("data") / run.dataset)
    except SystemExit:  # it has said what is missing
        if asked:
            raise
        print("WARNING: tokens are shown as numbers", file=sys.stderr, flush=True)
        return Tokenizer({**meta, "tokenizer": "none", "prompt_end": ""}, "")


@machine.guard("a smaller --n_samples")
def main():
    cfg, sampler, own = load_with_sampler(SampleConfig, sys.argv[1:])
    cfg.ckpt = cfg.init_from or cfg.ckpt
    run, meta, _, model, process = restore(cfg.ckpt, cfg.device)
    tokenizer = tokenizer_of(meta, run, asked=cfg.prompt or cfg.prompt_file)

    trained = sorted(run.block_sizes)
    if cfg.sampler == "ar" and cfg.block_size not in (0, 1):
        die(f"--sampler ar is block size 1, not {cfg.block_size}", "--sampler ancestral, or leave --block_size out")
    b = 1 if cfg.sampler == "ar" else cfg.block_size or trained[-1]
    for size in (b, 1) if cfg.ar_tokens else (b,):
        if size not in trained:
            die(
                f"{cfg.ckpt} was trained on block sizes {', '.join(map(str, trained))}, not {size}",
                f"--block_size {trained[-1]}, or train with {size} in block_sizes",
            )
    for name, fine, fix in (
        ("n_samples", 1 <= cfg.n_samples <= 10**6, "1"),
        ("steps", cfg.steps >= 0, "8"),
        ("max_new_tokens", cfg.max_new_tokens >= 0, "16"),
        ("ar_tokens", cfg.ar_tokens >= 0, "0"),
        ("temperature", 0 <= cfg.temperature < float("inf"), "1.0 (0 is greedy)"),
        ("top_p", 0 < cfg.top_p <= 1, "0.9"),
        ("fps", cfg.fps > 0, "8"),
        ("seed", cfg.seed >= 0, "1"),
        ("dtype", cfg.dtype in ("float32", "bfloat16"), "float32"),
    ):
        if not fine:
            die(f"{name} cannot be {getattr(cfg, name)}", f"--{name} {fix}")
    if b == 1 and (cfg.steps or cfg.ar_tokens):
        die("block size 1 takes one pass a token and is AR throughout: --steps and --ar_tokens mean nothing", "leave them out")
    if b == 1 and cfg.sampler == "ancestral":
        if own != options(sampler):
            die("block size 1 is the sampler ar: it has no options of its own", "leave them out, or another --block_size")
        sampler, own = SAMPLERS["ar"], {}
    if cfg.steps and sampler in OWN_PACE:
        die(f"{cfg.sampler} takes as many passes as it needs: --steps means nothing", "leave it out")

    prompts = [(cfg.prompt, tokenizer.prompt(cfg.prompt))]
    if cfg.prompt_file:
        if cfg.prompt or not Path(cfg.prompt_file).is_file():
            die(
                f"{cfg.prompt_file} not found" if not cfg.prompt else "--prompt and --prompt_file together",
                "--prompt_file FILE, one prompt a line",
            )
        lines = Path(cfg.prompt_file).read_text(errors="replace").splitlines()
        if not lines:
            die(f"{cfg.prompt_file} is empty", "one prompt a line; a blank line is an empty prompt")
        prompts = [(line, tokenizer.prompt(line)) for line in lines]
    elif "prompt_len" in meta and not cfg.prompt:
        prompts = [("", [0] * meta["prompt_len"])]  # id 0 is the blank
    for text, ids in prompts:
        if "prompt_len" in meta and len(ids) != meta["prompt_len"]:
            die(
                f"a prompt of {run.dataset} has {meta['prompt_len']} tokens, {text!r} has {len(ids)}",
                f"--prompt '{tokenizer.decode([0] * meta['prompt_len'])}'",
            )
        if any(i >= meta["vocab_size"] for i in ids):
            die(f"{text!r}: an id is not below vocab_size {meta['vocab_size']}", "--prompt with smaller ids")
        if len(ids) + max(1, cfg.max_new_tokens) > run.seq_len:
            die(
                f"a prompt of {len(ids)} tokens and {cfg.max_new_tokens or 'some'} more: the context has {run.seq_len}",
                "a shorter --prompt or fewer --max_new_tokens",
            )
    if cfg.ar_tokens and all(cfg.ar_tokens >= (cfg.max_new_tokens or run.seq_len - len(ids)) for _, ids in prompts):
        die(f"--ar_tokens {cfg.ar_tokens} leaves nothing for the blocks", "--sampler ar, or fewer of them")
    prompts = [ids for _, ids in prompts for _ in range(cfg.n_samples)]

    spent = [0.0]
    states = generate(
        model, process, prompts, block_size=b, sampler=sampler, steps=cfg.steps or None, max_new_tokens=cfg.max_new_tokens or None,
        ar_tokens=cfg.ar_tokens, temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed, eos_id=meta.get("eos_id"),
        schedule=SCHEDULES[run.schedule], trained=trained, graphs=cfg.graphs, **own,
    )  # fmt: skip
    states = timed(states, spent)
    try:
        with machine.mixed(model.head.weight.device, getattr(torch, cfg.dtype)):
            states = itertools.chain(list(itertools.islice(states, 3)), states)  # before anything is shown, the sampler sees its options
            if cfg.animate and sys.stdout.isatty():
                states = animate(states, tokenizer, process.mask_id, meta, cfg.fps)
            else:
                states = stream(states, tokenizer, tokenizer.decode(prompts[0]))
            for last in states:
                pass
    except ValueError as e:
        cannot = "AR mode" in str(e) or "not defined" in str(e)
        die(str(e), "--sampler ancestral, which every checkpoint serves" if cannot else f"python sample.py --sampler {cfg.sampler} --help")
    n = int((last.x != NOTHING).sum()) - sum(map(len, prompts))
    passes = f"{last.nfe} NFE ({last.nfe_rows.float().mean():.1f} a row, {last.token_forwards:,} token-forwards)"
    print(f"{n} tokens, {n / spent[0]:,.0f} tokens/s, {passes}, block size {b}, seed {cfg.seed}")


def timed(states, spent):
    """Add the seconds spent making states, not showing them, to spent[0]."""
    while True:
        start = time.time()
        state = next(states, None)
        spent[0] += time.time() - start
        if state is None:
            return
        yield state


if __name__ == "__main__":
    main()
