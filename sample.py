"""
How does it write? Text from a checkpoint, block by block.

    python sample.py --ckpt out/sudoku --prompt "..3.1.........4." --block_size 16 --steps 8 --n_samples 4
    python sample.py --ckpt out/sudoku --animate                       watch noise become text
    python sample.py --ckpt out/sudoku --sampler arpc --guide_every 2  a sampler with an option of its own
    python sample.py --sampler arpc --help                             what it does, its options, its paper
    python sample.py --init_from hf:jdeschena/blockgen/baselines/owt/mdlm --max_new_tokens 64 --steps 32

The last takes published weights. Block size 1 is autoregressive. What training decided (tokenizer, noise,
sizes) comes from the checkpoint.
"""

import itertools
import shutil
import sys
import time
from pathlib import Path

import torch

import hub.published  # noqa: F401  --init_from hf:...
from data.tokens import read_prompts, tokenizer_or_numbers
from diffusion import SCHEDULES
from fast.block import generate
from generate import NOTHING
from options import SampleConfig
from run import machine
from run.cli import die, shown
from run.flags import load_with_sampler, options
from run.restore import restore
from samplers import SAMPLERS

# ----- what a person sees

DIM, COLOUR, PLAIN = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"


def text_of(ids, tokenizer):
    """The text of a row, with its controls spelt out: a vocabulary may come from anywhere."""
    return shown(tokenizer.decode([i for i in ids if i != NOTHING]))


def cells(row, before, tokenizer, mask_id):
    """One string a token: dim dots for masks and nothing, colour where this step changed something."""
    out = []
    for i, token in enumerate(row):
        if token == NOTHING:
            out.append(" ")
        elif token == mask_id:
            out.append(f"{DIM}░{PLAIN}")
        else:
            text = text_of([token], tokenizer)
            out.append(f"{COLOUR}{text}{PLAIN}" if before is not None and before[i] != token else text)
    return out


def pages_across(width):
    """So many pages of `width` spaced characters fit side by side."""
    return max(1, (shutil.get_terminal_size().columns + 3) // (2 * width + 3))


def frame(state, before, tokenizer, mask_id, meta):
    """
    Lines of one animation frame. Rows with a `width` stand side by side, prompt above, as little pages;
    others run on.
    """
    rows = state.x.tolist()
    befores = before or [None] * len(rows)
    pages = [cells(row, old, tokenizer, mask_id) for row, old in zip(rows, befores, strict=True)]
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
    fits = shutil.get_terminal_size().lines - 2  # what is taller than the screen cannot be redrawn
    return lines[-fits:]


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
            print(text_of(row, tokenizer))


def stream(states, tokenizer, prompt):
    """The first sample appears block by block; the others, made in the same passes, follow whole."""
    written = 0
    print(f"--- sample 1\n{prompt}", end="", flush=True)
    for state in states:
        row = [i for i in state.x[0].tolist() if i != NOTHING]
        if state.finished or state.done[0]:
            text = text_of(row[: state.span[1]], tokenizer)
            if not state.done[0]:
                text = text.rstrip("\ufffd")  # half a character: its other bytes come with the next block
            sys.stdout.write(text[max(written, len(prompt)) :])
            sys.stdout.flush()
            written = max(written, len(text))
        yield state
    for i, row in enumerate(state.x[1:].tolist()):
        print(f"\n--- sample {i + 2}\n{text_of(row, tokenizer)}", end="")
    print()


# ----- the command


def settled(cfg, sampler, own, trained):
    """(block size, sampler, its options) of what was asked, on a network trained with these block sizes."""
    if cfg.sampler == "ar" and cfg.block_size not in (0, 1):
        fix = "--sampler ancestral, or leave --block_size out"
        die(f"--sampler ar is block size 1, not {cfg.block_size}", fix)
    b = 1 if cfg.sampler == "ar" else cfg.block_size or trained[-1]
    for size in (b, 1) if cfg.ar_tokens else (b,):
        if size not in trained:
            problem = f"{cfg.ckpt} was trained on block sizes {', '.join(map(str, trained))}, not {size}"
            die(problem, f"--block_size {trained[-1]}, or train with {size} in block_sizes")
    if b == 1 and (cfg.steps or cfg.ar_tokens):
        problem = "block size 1 takes one pass a token and is AR throughout"
        die(f"{problem}: --steps and --ar_tokens mean nothing", "leave them out")
    if b == 1 and cfg.sampler == "ancestral":
        if own != options(sampler):
            problem = "block size 1 is the sampler ar: it has no options of its own"
            die(problem, "leave them out, or another --block_size")
        return 1, SAMPLERS["ar"], {}
    if cfg.steps and "own pace" in sampler.needs:
        die(f"{cfg.sampler} takes as many passes as it needs: --steps means nothing", "leave it out")
    return b, sampler, own


def prompts_of(cfg, run, tokenizer):
    """The ids of each prompt, n_samples times; two lines for those that leave no room."""
    texts = read_prompts(cfg.prompt_file) if cfg.prompt_file else [cfg.prompt]
    prompts = [tokenizer.prompt(text) for text in texts]
    longest = max(map(len, prompts))
    if longest + max(1, cfg.max_new_tokens) > run.seq_len:
        asked = f"a prompt of {longest} tokens and {cfg.max_new_tokens or 'some'} more"
        die(f"{asked}: the context has {run.seq_len}", "a shorter --prompt or fewer --max_new_tokens")
    room = [cfg.max_new_tokens or run.seq_len - len(ids) for ids in prompts]
    if cfg.ar_tokens >= max(room):
        die(f"--ar_tokens {cfg.ar_tokens} leaves nothing for the blocks", "--sampler ar, or fewer of them")
    return [ids for ids in prompts for _ in range(cfg.n_samples)]


@machine.guard("a smaller --n_samples")
def main():
    cfg, sampler, own = load_with_sampler(SampleConfig, sys.argv[1:])
    cfg.ckpt = cfg.init_from or cfg.ckpt
    run, meta, _, model, process = restore(cfg.ckpt, cfg.device, cfg.plain)
    tokenizer = tokenizer_or_numbers(meta, Path("data") / run.dataset, reads=cfg.prompt or cfg.prompt_file)
    trained = sorted(run.block_sizes)
    b, sampler, own = settled(cfg, sampler, own, trained)
    prompts = prompts_of(cfg, run, tokenizer)
    if cfg.graphs:
        model.graphs = True
    spent = [0.0]
    states = generate(
        model, process, prompts, block_size=b, sampler=sampler, steps=cfg.steps or None,
        max_new_tokens=cfg.max_new_tokens or None, ar_tokens=cfg.ar_tokens, temperature=cfg.temperature,
        top_p=cfg.top_p, seed=cfg.seed, eos_id=meta.get("eos_id"), schedule=SCHEDULES[run.schedule],
        trained=trained, **own,
    )  # fmt: skip
    states = timed(states, spent)
    try:
        with machine.mixed(model.head.weight.device, getattr(torch, cfg.dtype)):
            first = list(itertools.islice(states, 3))  # the sampler checks its options before a text is shown
            states = itertools.chain(first, states)
            if cfg.animate and sys.stdout.isatty():
                states = animate(states, tokenizer, process.mask_id, meta, cfg.fps)
            else:
                states = stream(states, tokenizer, text_of(prompts[0], tokenizer))
            for last in states:
                pass
    except ValueError as e:
        cannot = "AR mode" in str(e) or "not defined" in str(e)
        fix = f"python sample.py --sampler {cfg.sampler} --help"
        die(str(e), "--sampler ancestral, which every checkpoint serves" if cannot else fix)
    n = int((last.x != NOTHING).sum()) - sum(map(len, prompts))
    a_row = f"{last.nfe_rows.float().mean():.1f} a row"
    passes = f"{last.nfe} NFE ({a_row}, {last.token_forwards:,} token-forwards)"
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
