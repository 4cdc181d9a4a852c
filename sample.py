"""
How does it write? Text from a checkpoint, block by block.

    python sample.py --ckpt out/sudoku --prompt "..3.1.........4." --block_size 16 --steps 8 --n_samples 4
    python sample.py --ckpt out/sudoku --animate                       watch noise become text
    python sample.py --ckpt out/digits --prompt "_+8=11;" --hole _     fill in what is missing
    python sample.py --ckpt out/sudoku --sampler arpc --guide_every 2  a sampler with an option of its own
    python sample.py --sampler arpc --help                             what it does, its options, its paper
    python sample.py --init_from hf:jdeschena/blockgen/baselines/owt/mdlm --max_new_tokens 64 --steps 32

The last takes published weights. Block size 1 is autoregressive. Tokenizer, noise and sizes come from the
checkpoint. At the end, NFE counts passes through the network, and token-forwards the tokens in them.
"""

import functools
import itertools
import sys
import time
from pathlib import Path

import torch

import hub.published  # noqa: F401  --init_from hf:...
from data.dataset import prepared
from data.tokens import read_prompts, tokenizer_or_numbers
from diffusion import SCHEDULES
from fast.block import generate
from generate import HOLE, NOTHING
from methods import infilling
from options import SampleConfig
from run import machine, record, screen
from run.cli import die
from run.flags import load_with_sampler, options, served
from run.restore import restore
from samplers import SAMPLERS
from samplers.constraint import writer


def settled(cfg, sampler, own, trained):
    """(block size, sampler, its options) of what was asked, on a network trained with these block sizes."""
    if cfg.sampler == "ar" and cfg.block_size not in (0, 1):
        fix = "--sampler ancestral, or leave --block_size out"
        die(f"--sampler ar is block size 1, not {cfg.block_size}", fix)
    trained = served(sampler, trained, cfg.block_size)
    b = 1 if cfg.sampler == "ar" else cfg.block_size or trained[-1]
    for size in (b, 1) if cfg.ar_tokens else (b,):
        if size not in trained:
            problem = f"{cfg.ckpt} was trained on block sizes {', '.join(map(str, trained))}, not {size}"
            other = f"--block_size {trained[-1]}" if size == b else "leave --ar_tokens out"
            die(problem, f"{other}, or train with {size} in block_sizes")
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
    prompts = [tokenizer.prompt(text, cfg.hole, HOLE) for text in texts]
    prompts = [tokenizer.chat(cfg.chat)] if cfg.chat else prompts
    longest = max(map(len, prompts))
    if max(len(ids) + max(HOLE not in ids, cfg.max_new_tokens) for ids in prompts) > run.seq_len:
        asked = f"a prompt of {longest} tokens and {cfg.max_new_tokens or 'some'} more"
        die(f"{asked}: the context has {run.seq_len}", "a shorter --prompt or fewer --max_new_tokens")
    room = [cfg.max_new_tokens or run.seq_len - len(ids) + ids.count(HOLE) for ids in prompts]
    if cfg.ar_tokens >= max(room):
        die(f"--ar_tokens {cfg.ar_tokens} leaves nothing for the blocks", "--sampler ar, or fewer of them")
    return [ids for ids in prompts for _ in range(cfg.n_samples)]


@machine.guard("a smaller --n_samples")
def main():
    cfg, sampler, own = load_with_sampler(SampleConfig, sys.argv[1:])
    cfg.ckpt, flag = cfg.init_from or cfg.ckpt, "--init_from" if cfg.init_from else "--ckpt"
    changes = cfg.weights, cfg.rope_factor, cfg.seq_len
    run, meta, _, model, process = restore(cfg.ckpt, cfg.device, cfg.plain, flag, *changes)
    reads = cfg.prompt or cfg.chat or cfg.prompt_file or cfg.regex or cfg.constraint
    tokenizer = tokenizer_or_numbers(meta, Path("data") / run.dataset, reads=reads)
    trained = sorted(run.block_sizes)
    b, sampler, own = settled(cfg, sampler, own, trained)
    prompts = prompts_of(cfg, run, tokenizer)
    if cfg.graphs:
        model.graphs = True
    spent = [0.0]
    write = writer(generate, cfg.regex, cfg.constraint, tokenizer, meta["vocab_size"], exact=cfg.exact)
    ends = meta.get("eos_id") if cfg.regex or cfg.constraint else meta.get("eos_ids", meta.get("eos_id"))
    holes = any(HOLE in ids for ids in prompts)
    if cfg.gaps > 1:
        write = functools.partial(infilling.fill, gaps=cfg.gaps, generate=write)
    elif holes and sampler.__name__ in infilling.BLIND:
        print(f"{sampler.__name__} reads nothing behind a hole: --gaps 16 would weigh fillings by it")
    recorded = record.wanted(cfg, model)
    states = write(
        model, process, prompts, block_size=b, sampler=sampler, steps=cfg.steps or None,
        max_new_tokens=cfg.max_new_tokens or None, ar_tokens=cfg.ar_tokens, temperature=cfg.temperature,
        top_p=cfg.top_p, seed=cfg.seed, eos_id=ends, schedule=SCHEDULES[run.schedule],
        trained=trained, block_class=recorded and recorded.block_class, **own,
    )  # fmt: skip
    states = timed(states, spent)
    try:
        with machine.mixed(model.head.weight.device, getattr(torch, cfg.dtype)):
            first = list(itertools.islice(states, 3))  # a sampler checks its options in its first step
            states = itertools.chain(first, states)
            animated = cfg.animate and sys.stdout.isatty() and not screen.DUMB
            if animated:
                states = screen.animate(states, tokenizer, process.mask_id, meta, cfg.fps)
            else:
                before = itertools.takewhile(lambda i: i != HOLE, prompts[0])
                states = screen.stream(states, tokenizer, screen.text_of(before, tokenizer))
            for last in states:
                pass
    except ValueError as e:
        cannot = "AR mode" in str(e) or "not defined" in str(e)
        fix = f"python sample.py --sampler {cfg.sampler} --help"
        fix = "--sampler ancestral, which every checkpoint serves" if cannot else fix
        die(str(e), getattr(e, "fix", fix))
    texts = [tokenizer.decode([i for i in row if i != NOTHING]) for row in last.x.tolist()]
    module, right = prepared(Path("data") / run.dataset), None
    check, show = (getattr(module, name, None) for name in ("check", "show"))
    if show and not animated:
        screen.pages(map(show, texts))
    if check:
        right = [correct == asked for correct, asked in map(check, texts)]
        print(*("right" if r else "wrong" for r in right), f"({sum(right)} of {len(right)})")
    if recorded:
        about = record.about(cfg, own, b, run, meta, model)
        record.write(cfg, recorded.whole(about, process, tokenizer, prompts, last, right, show))
    n = int((last.x != NOTHING).sum()) - sum(len(ids) - ids.count(HOLE) for ids in prompts)
    if cfg.gaps > 1:
        print(f"of {cfg.gaps} fillings, {last.effective.mean():.1f} in effect")
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
