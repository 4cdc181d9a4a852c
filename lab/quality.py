"""
How good are its texts? Accuracy where answers can be checked, and where they cannot: what a judge thinks of
them (generative perplexity), beside how varied they are. A sampler that repeats itself pleases every judge,
so every table shows both.

    generated    texts from a sampler, and what they cost
    accuracy     correct answers, by the check(text) of the dataset's prepare.py
    judge        nats per token under an autoregressive model: the checkpoint's own, another of ours, or GPT-2
    variety      token entropy and distinct n-grams
    quality      all of it, in one dict

There is no MAUVE here: it compares clusters of a large model's embeddings and wants thousands of long texts;
on texts and models of this size it would measure its own noise. What stands in for it is a line of real text,
read by the same judge and counted the same way.

    python -m lab.quality --ckpt out/sudoku                  accuracy or generative perplexity: AR, ancestral
                                                             and ARPC, 1, 2, 4, ... steps
    python -m lab.quality --ckpt out/sudoku --sampler psi --kappa pc --steps 8

The second is for any sampler, with its own options.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python lab/quality.py works too
import hub.published  # noqa: F401  --init_from hf:...
from data.dataset import checker
from data.tokens import Tokenizer, gpt2
from diffusion import SCHEDULES, token_loss
from fast.block import generate
from generate import NOTHING
from rng import Noise
from run import checkpoint
from run.cli import die, writable
from run.flags import load_with_sampler, served
from run.machine import guard, mixed
from run.restore import dataset_for, noise_name, rebuild, restore
from samplers import SAMPLERS
from samplers.constraint import writer


@dataclass
class QualityConfig:
    ckpt: str = "out/run"  # a training run's out_dir
    init_from: str = ""  # or published weights: hf:OWNER/REPO/SUBFOLDER, or a folder (hub/published.py)
    dataset: str = ""  # another than it was trained on, in the same tokens
    block_size: int = 0  # one of those it was trained with; 0: all
    n_eval: int = 512  # texts a line; 0: one for each window of the validation split
    sampler: str = ""  # empty: ar, ancestral and arpc. --sampler NAME --help explains one
    steps: int = 0  # per block; 0: 1, 2, 4, ... up to the block size, at most 64
    # of the texts: self (its AR mode), a run's out_dir, gpt2, gpt2-large, none; auto: self if it has that
    # mode
    judge: str = "auto"
    clues: bool = True  # prompts from the validation split; false: nothing but blanks (sudoku)
    max_new_tokens: int = 0  # per text; 0: up to the end of the context
    temperature: float = 1.0
    regex: str = ""  # only texts that match it, prompt included; see docs/constraints.md
    constraint: str = ""  # or FILE.py:name, a language of your own
    exact: int = 1  # weighted copies of each text under a constraint
    # the control of a constraint: forbid what leads out of the language, however unlikely the rest becomes
    myopic: bool = False
    seed: int = 1
    json: str = ""  # the same numbers, in this file
    device: str = "auto"
    plain: bool = False  # run the lesson as it stands, not fast/: slower, the same distribution
    dtype: str = "float32"  # bfloat16: faster where the hardware has it; judges stay float32


GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
NGRAMS = (2, 4)


def prompts_of(data, n, clues=True):
    """n prompts of the validation split; without clues the same rows, blank."""
    x0, given, _ = data.windows("val", data.spread("val", n))
    prompts = [row[: int((~keep).int().argmax())] for row, keep in zip(x0, given, strict=True)]
    if not given.any():
        prompts = [x0.new_zeros(0)] * n  # nothing to go on from: as many as asked
    if not clues and not any(len(p) for p in prompts):
        die("this dataset has no prompts to leave blank", "leave --clues out")
    return prompts if clues else [torch.zeros_like(p) for p in prompts]  # id 0 is the blank


def real_rows(data, prompts, max_new_tokens=None):
    """
    What the validation split has behind prompts_of(...), as generation would have written it: prompts
    included, as lists of ids, up to the first eos. Fewer than the prompts where the split has fewer windows.
    """
    x0, given, real = data.windows("val", data.spread("val", len(prompts)))
    rows, eos = [], data.meta.get("eos_id")
    for prompt, row, keep in zip(prompts, x0, real & ~given, strict=False):
        text = row[keep].tolist()[: max_new_tokens or None]
        rows.append(prompt.tolist() + (text[: text.index(eos) + 1] if eos in text else text))
    return rows


def generated(
    model, process, data, prompts, seed, batch_size=256, dtype=torch.float32, write=generate, **how
):  # fmt: skip
    """
    Texts behind `prompts` (write: generate or one like it; how: its arguments; dtype: of machine.mixed),
    prompts included, as lists of ids, and their cost:
        nfe   passes per batch; nfe_row the mean a row needed; nfe_token that over the tokens of a row
        token_forwards  per token; tokens_per_s
    """
    rows, tokens, nfe, nfe_rows, forwards, start = [], 0, 0, 0, 0, time.time()
    for i in range(0, len(prompts), batch_size):
        batch = prompts[i : i + batch_size]
        with mixed(model.head.weight.device, dtype):
            for state in write(model, process, batch, seed=seed + i, eos_id=data.meta.get("eos_id"), **how):
                pass
        tokens += int((state.x != NOTHING).sum()) - sum(map(len, batch))
        nfe, nfe_rows, forwards = (
            max(nfe, state.nfe),
            nfe_rows + int(state.nfe_rows.sum()),
            forwards + state.token_forwards,
        )
        rows += [[token for token in row if token != NOTHING] for row in state.x.tolist()]
    return rows, {
        "nfe": nfe, "nfe_row": nfe_rows / len(prompts), "nfe_token": nfe_rows / max(tokens, 1),
        "token_forwards": forwards / max(tokens, 1), "tokens_per_s": tokens / (time.time() - start),
    }  # fmt: skip


# ----- where answers can be checked


def wilson(p, n, z=1.96):
    """The 95 % interval of a share p seen in n independent trials (Wilson 1927): holds at 0 and 1 too."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # p itself, whatever rounding says
    return min(p, (middle - half) / (1 + z * z / n)), max(p, (middle + half) / (1 + z * z / n))


def accuracy(module, texts):
    """
    accuracy   correct answers / answers asked, with its 95 % interval low..high over texts: a text's answers
               stand and fall together, so n is the number of texts that would have the spread we see
    distinct, expected   different correct answers, and how many there would be in as many uniform draws of
                         possible ones
    Nothing at all where the texts hold no answer.
    """
    counts, found, miss = [], set(), {}
    for text in texts:
        counts.append(module.check(text))
        for answer, possible in module.choices(text) if hasattr(module, "choices") else ():
            found.add(answer)
            for other in possible:  # log of the probability that no uniform draw has hit it
                miss[other] = miss.get(other, 0.0) + (
                    math.log1p(-1 / len(possible)) if len(possible) > 1 else -math.inf
                )
    correct, asked = (sum(c[k] for c in counts) for k in (0, 1))
    if not asked:
        return {}
    p = correct / asked
    error = math.sqrt(sum((c - p * a) ** 2 for c, a in counts)) / asked
    n = p * (1 - p) / error**2 if error else len(texts)
    low, high = wilson(p, n)
    expected = sum(-math.expm1(m) for m in miss.values())
    return {"accuracy": p, "low": low, "high": high, "distinct": len(found), "expected": expected}


# ----- where they cannot


def variety(rows, starts):
    """
    Of the generated tokens, those from `starts` on: the entropy of a text's own tokens in nats, a mean over
    texts, and distinct_n, the share of n-grams over all texts that are different; None without any. Both
    depend on the number and the length of the texts: compare like with like.
    """
    answers = [row[start:] for row, start in zip(rows, starts, strict=True)]
    entropies = []
    for answer in answers:
        if answer:
            p = torch.tensor(answer).unique(return_counts=True)[1] / len(answer)
            entropies.append(-(p * p.log()).sum().item())
    result = {"entropy": sum(entropies) / len(entropies) if entropies else None}
    for n in NGRAMS:
        grams = [tuple(a[i : i + n]) for a in answers for i in range(len(a) - n + 1)]
        result[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else None
    return result


def judge(name, own, tokenizer, device):
    """
    (label, score), or None where there is none. score(rows, starts) -> nats (B,) and tokens (B,): what the
    generated tokens of each row cost the judge. Texts longer than its context are read in pieces of it, real
    ones too.

    name   self: block size 1 of `own` = (model, process, block sizes); auto: the same, or nobody if it was
           not trained; a run's out_dir; or gpt2, gpt2-medium, gpt2-large, gpt2-xl by way of transformers.
           Other tokens than the samples': the text is read again
    """
    if name in ("auto", "self"):
        model, process, sizes = own
        if 1 not in sizes or not model.cfg.clean_causal:
            if name == "self":
                die(
                    "this checkpoint has no AR mode to judge with: block size 1 was not trained",
                    "--judge DIR, of a run that has it",
                )
            return None
        return "its own AR mode" + _bound(process), lambda rows, starts: _by_ours(
            model, process, rows, starts
        )
    if name in GPT2:
        label, (reader, encode) = name, _gpt2(name, device)
        encode = None if tokenizer.kind == "gpt2" else encode
        other = tokenizer.kind == "none"
    else:
        run, meta, _, model, process = rebuild(name, device, checkpoint.load(name, "--judge"))
        if 1 not in run.block_sizes:
            die(
                f"{name} has no AR mode to judge with: "
                f"it was trained on block sizes {', '.join(map(str, run.block_sizes))}",
                "--judge gpt2",
            )
        # a run trained again is another judge
        label = f"{name} ({checkpoint.fingerprint(model)}){_bound(process)}"
        bos, theirs = meta.get("bos_id"), Tokenizer(meta, Path("data") / run.dataset)

        def reader(rows, starts):
            behind = [bos is None or row[:1] == [bos] for row in rows]  # it knows texts that begin with it
            rows = [row if so else [bos, *row] for row, so in zip(rows, behind, strict=True)]
            return _by_ours(
                model, process, rows, [start + (not so) for start, so in zip(starts, behind, strict=True)]
            )

        encode = None if (theirs.kind, theirs.chars) == (tokenizer.kind, tokenizer.chars) else theirs.encode
        other = "none" in (theirs.kind, tokenizer.kind) and encode is not None
    if other:
        die(f"{name} reads text, or other ids, and one of the two datasets has no tokenizer", "--judge self")

    def score(rows, starts):
        if encode is not None:  # the prompt's tokens are those of the prompt alone
            starts = [
                len(encode(tokenizer.decode(row[:start]))) for row, start in zip(rows, starts, strict=True)
            ]
            rows = [encode(tokenizer.decode(row)) for row in rows]
        return reader(rows, starts)

    return label, score


def _bound(process):
    return ", upper bounds: it reads random tokens" if not process.exact_ar else ""


@torch.no_grad()
def _by_ours(model, process, rows, starts):
    """Block size 1 reads the rows: nats and tokens (B,) float64, from `starts` on."""
    nats, tokens = torch.zeros(2, len(rows), dtype=torch.float64)
    device, context = next(model.parameters()).device, model.cfg.seq_len
    known = process.vocab_size - (process.mask_id == process.vocab_size - 1)
    most = max(max(row, default=0) for row in rows)
    if most >= known or any(process.mask_id in row for row in rows):
        die(f"a text has the id {most}, the judge knows ids below {known}", "--judge self")
    pieces = [
        (i, row[k : k + context], max(0, starts[i] - k))
        for i, row in enumerate(rows)
        for k in range(0, len(row), context)
    ]
    pieces = [(i, piece, start) for i, piece, start in pieces if start < len(piece)]
    size, first = max(1, min(64, (1 << 26) // (context * process.vocab_size))), int(model.cfg.next_token)
    for i in tqdm(range(0, len(pieces), size), desc="judging", leave=False, delay=2, disable=None):
        some = pieces[i : i + size]
        x0 = torch.nn.utils.rnn.pad_sequence([torch.tensor(piece) for _, piece, _ in some], True).to(device)
        at = torch.arange(x0.size(1))
        asked = torch.stack([(at >= max(start, first)) & (at < len(piece)) for _, piece, start in some]).to(
            device
        )
        owner = torch.tensor([i for i, *_ in some])
        # read where block size 1 sees random tokens
        noise = Noise(0, owner.to(device), at[first:].to(device))
        t = torch.full((len(some),), 0.5, dtype=torch.float64)
        loss = getattr(model, "token_loss", token_loss)
        _, each = loss(model, process, x0, 1, t, "ce", ~asked, start=first, noise=noise)
        (
            nats.index_add_(0, owner, each.cpu().double().sum(1)),
            tokens.index_add_(0, owner, asked.sum(1).cpu().double()),
        )
    return nats, tokens


def _gpt2(name, device):
    """
    (reader, encode) of a GPT-2 of the hub; the end-of-text token stands before every piece, so the first
    token costs something too.
    """
    try:
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(name).eval().to(device)
    except ModuleNotFoundError:
        die(f"the judge {name} needs transformers", "pip install transformers, or --judge self")
    except Exception as e:  # no network, a gated hub, a broken cache: many names
        die(f"could not load {name}: {type(e).__name__}: {str(e).splitlines()[:1]}", "--judge self")
    context, end = model.config.n_positions - 1, model.config.vocab_size - 1

    @torch.no_grad()
    def reader(rows, starts):
        nats, tokens = torch.zeros(2, len(rows), dtype=torch.float64)
        for i, (row, start) in enumerate(
            zip(tqdm(rows, desc=name, leave=False, disable=None), starts, strict=True)
        ):
            for k in range(0, len(row), context):
                ids = torch.tensor([end, *row[k : k + context]], device=device)
                log_p = model(ids[None, :-1]).logits[0].float().log_softmax(-1)
                each = -log_p.gather(-1, ids[1:, None])[max(0, start - k) :, 0]
                nats[i] += each.cpu().double().sum()
                tokens[i] += len(each)
        return nats, tokens

    return reader, gpt2(Path("data/shakespeare/gpt2.tiktoken")).encode_ordinary


def judged(score, rows, starts):
    """
    gen_ppl, exp of nats per token over all texts, with its 95 % interval ppl_low..ppl_high over texts, and
    gen_tokens; or nothing.
    """
    nats, tokens = score(rows, starts)
    if len(rows) < 2 or tokens.sum() == 0:
        return {}
    n, mean = tokens.sum(), nats.sum() / tokens.sum()
    error = (nats - mean * tokens).square().sum().sqrt() / n
    low, mid, high = (math.exp(min(x, 700.0)) for x in (mean - 1.96 * error, mean, mean + 1.96 * error))
    return {"gen_ppl": mid, "ppl_low": low, "ppl_high": high, "gen_tokens": int(n)}


def quality(rows, starts, tokenizer, module=None, score=None):
    """
    accuracy (with a checker), judged (with a judge) and variety of rows of ids whose answers begin at
    `starts`, in one dict.
    """
    result = variety(rows, starts)
    if module is not None:
        result |= accuracy(module, [tokenizer.decode(row) for row in rows])
    return result | (judged(score, rows, starts) if score is not None else {})


# ----- the command


def lines_asked(cfg, sampler, trained):
    """[(sampler name, block size, steps or None)] that are asked for."""
    names = [cfg.sampler] if sampler else ["ar", "ancestral", "arpc"] if trained[0] == 1 else ["ancestral"]
    lines = []
    for name in names:
        sizes = [b for b in trained if (b == 1) == (name == "ar") and cfg.block_size in (0, b)]
        for b in sizes:
            if "own pace" in SAMPLERS[name].needs:
                if sampler and cfg.steps:
                    die(f"{name} takes as many passes as it needs: --steps means nothing", "leave it out")
                lines += [(name, b, None)]
            elif cfg.steps:
                lines += [(name, b, cfg.steps)]
            else:
                least = 2 if name == "arpc" else 1  # ARPC guides no last step
                lines += [(name, b, n) for n in (1, 2, 4, 8, 16, 32, 64) if least <= n <= b]
    if not lines:
        sizes = ", ".join(map(str, [cfg.block_size] if cfg.block_size else trained))
        die(
            f"{cfg.sampler or 'a sampler'} has no block to fill: block size {sizes}",
            "--sampler ar" if trained[0] == 1 else "--block_size 0",
        )
    return lines


TEXT_HEADS = f"{'correct, 95 %':>18} {'distinct':>8} {'perplexity, 95 %':>22} {'entropy':>8} "
TEXT_HEADS += " ".join(f"{f'dist-{n}':>7}" for n in NGRAMS)


def text_columns(r):
    """
    correct with its interval, distinct / expected; perplexity with its interval; entropy and distinct
    n-grams.
    """
    share = (
        f"{100 * r['accuracy']:.1f} ({100 * r['low']:.1f}-{100 * r['high']:.1f})" if "accuracy" in r else ""
    )
    answers = f"{r['distinct']}/{r['expected']:.0f}" if r.get("expected") else ""
    ppl = f"{r['gen_ppl']:.4g} ({r['ppl_low']:.4g}-{r['ppl_high']:.4g})" if "gen_ppl" in r else ""
    number = lambda x, width: f"{'-' if x is None else f'{x:.3f}':>{width}}"
    grams = " ".join(number(r[f"distinct_{n}"], 7) for n in NGRAMS)
    return f"{share:>18} {answers:>8} {ppl:>22} {number(r['entropy'], 8)} {grams}"


def table(cfg, sampler, own, run, data, model, process, trained):
    """The table, as a list of dicts; the first line is real text."""
    prompts = prompts_of(data, cfg.n_eval or len(data.spread("val", 0)), cfg.clues)
    module, tokenizer, device = checker(data.folder), data.tokenizer, next(model.parameters()).device
    asked, size = lines_asked(cfg, sampler, trained), max(1, 256 // cfg.exact)
    weighing = {"exact": cfg.exact, "myopic": cfg.myopic}
    write = writer(generate, cfg.regex, cfg.constraint, tokenizer, data.meta["vocab_size"], **weighing)
    who, score = (
        None if cfg.judge == "none" else judge(cfg.judge, (model, process, trained), tokenizer, device)
    ) or (None, None)
    has_prompts = any(len(p) for p in prompts)
    print(
        f"{len(prompts)} samples, temperature {cfg.temperature:g}, seed {cfg.seed}"
        + f", with{'' if cfg.clues else 'out'} clues" * has_prompts
        + (f"; perplexity under {who}" if who else "; no judge (--judge)")
    )
    print(f"{'sampler':>13} {'block':>6} {'steps':>6} {'NFE':>5} {'a row':>6} {TEXT_HEADS} {'tokens/s':>9}")
    bar = tqdm(total=1 + len(asked), desc="real text", leave=False, disable=None)
    rows = real_rows(data, prompts, cfg.max_new_tokens)
    starts = [len(p) for p in prompts]
    real = quality(rows, starts[: len(rows)], tokenizer, module, score)
    count = f" ({len(rows)} texts)" if len(rows) < len(prompts) else ""
    tqdm.write(f"{'real text' + count:<40} {text_columns(real)}", file=sys.stdout)
    result = [{"sampler": "real text", "n": len(rows), "judge": who, **real}]
    for name, b, steps in asked:
        bar.update()
        bar.set_description(name)
        how = {
            "block_size": b,
            "sampler": SAMPLERS[name],
            "steps": steps,
            "temperature": cfg.temperature,
            "trained": trained,
        }
        how |= {"schedule": SCHEDULES[run.schedule], "max_new_tokens": cfg.max_new_tokens or None, **own}
        try:
            again = prompts, cfg.seed, size, getattr(torch, cfg.dtype), write
            rows, cost = generated(model, process, data, *again, **how)
        except ValueError as e:
            bar.close()
            die(str(e), getattr(e, "fix", f"python -m lab.quality --sampler {name} --help"))
        r = {"sampler": name, "block_size": b, "steps": steps, "n": len(rows), "judge": who, **cost}
        r |= quality(rows, starts, tokenizer, module, score)
        tqdm.write(
            f"{name:>13} {b:>6} {steps or '':>6} {r['nfe']:>5} {r['nfe_row']:>6.1f} "
            f"{text_columns(r)} {r['tokens_per_s']:>9,.0f}",
            file=sys.stdout,
        )
        result.append(r)
    bar.close()
    grams = " and ".join(map(str, NGRAMS))
    print(
        "distinct: different correct answers / as many uniform draws would give. " * (module is not None),
        end="",
    )
    print(f"entropy of a text's tokens in nats; dist-n: different n-grams / all, n {grams}.")
    return result


@guard("a smaller --n_eval, or --device=cpu")
def main():
    cfg, sampler, own = load_with_sampler(QualityConfig, sys.argv[1:])
    for name, fine, least in (
        ("n_eval", cfg.n_eval == 0 or cfg.n_eval >= 2, "2 or more, 0 for all"),
        ("block_size", cfg.block_size >= 0, "1, 16, ... or 0 for all"),
        ("steps", cfg.steps >= 0, "0 or more"),
        ("max_new_tokens", cfg.max_new_tokens >= 0, "0 or more"),
        ("temperature", 0 <= cfg.temperature < math.inf, "0 or more"),
        ("seed", 0 <= cfg.seed < 2**62, "0 or more, below 2^62"),
        ("dtype", cfg.dtype in ("float32", "bfloat16"), "float32"),
        ("exact", 1 <= cfg.exact <= 10**6, "1 or more"),
        ("constraint", not (cfg.regex and cfg.constraint), "or --regex, one of them"),
    ):
        if not fine:
            die(f"{name} cannot be {getattr(cfg, name)}", f"--{name} {least}")
    if cfg.json:
        writable(cfg.json, "json", b'{\n "ckpt"')
    cfg.ckpt, flag = cfg.init_from or cfg.ckpt, "--init_from" if cfg.init_from else "--ckpt"
    run, meta, step, model, process = restore(cfg.ckpt, cfg.device, cfg.plain, flag)
    data, trained = dataset_for(cfg.ckpt, run, meta, model, cfg.dataset), sorted(run.block_sizes)
    trained = served(sampler, trained, cfg.block_size)
    if cfg.block_size and cfg.block_size not in trained:
        die(
            f"{cfg.ckpt} was trained on block sizes {', '.join(map(str, trained))}, not {cfg.block_size}",
            f"--block_size {trained[-1]}",
        )
    weights_of = "published weights" if checkpoint.is_foreign(cfg.ckpt) else f"EMA weights of step {step}"
    print(f"{data.folder.name}, {noise_name(run)}, {weights_of}")
    lines = table(cfg, sampler, own, run, data, model, process, trained)
    if cfg.json:
        facts = {"ckpt": cfg.ckpt, "dataset": data.folder.name, "process": noise_name(run), "step": step}
        facts |= {
            "n_eval": cfg.n_eval,
            "seed": cfg.seed,
            "temperature": cfg.temperature,
            "dtype": cfg.dtype,
            "clues": cfg.clues,
        }
        facts |= {"regex": cfg.regex, "constraint": cfg.constraint, "exact": cfg.exact, "myopic": cfg.myopic}
        facts |= {"max_new_tokens": cfg.max_new_tokens, "options": own, "lines": lines}
        Path(cfg.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
