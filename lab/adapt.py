"""
How much faster does a language model write its own text with drafts? For python -m lab.bench --adapt RUN.

Every draft of samplers/lossless.py answers the same questions, question by question in turn, in one process.
The clock is processor time (one thread), so other programs count less. AR is the same code with no drafts.
Each text is compared with AR's.
"""

import textwrap
import time
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

import hub.published  # noqa: F401  package:..., gguf:...
import methods
from data.tokens import Tokenizer, read_prompts
from run import checkpoint
from run.cli import die, shown
from run.restore import load_state, rebuild
from samplers.lossless import Lossless

UNTRAINED = ("none", "jacobi", "lookup")
TRAINED = (*UNTRAINED, "masks", "head", "masks+lookup", "head+lookup")


@dataclass
class Row:
    """What one draft has cost. offered, accepted: by place."""

    draft: str
    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    equal: int = 0
    offered: list = field(default_factory=list)
    accepted: list = field(default_factory=list)


def network(source):
    """(model, process, facts of its tokens, is it trained?) of a run of adapt, or of a base model."""
    state = checkpoint.load(source, "--adapt")
    if (state.get("method") or {}).get("name") == "adapt":
        _, meta, _, model, process = rebuild(source, torch.device("cpu"), state)
        return model, process, meta, True
    adapt = methods.load("adapt")
    settings = adapt.Settings()
    adapt.begin(settings, state)
    with torch.device("meta"):
        model = adapt.network(checkpoint.ModelConfig(**state["network"]), settings)
    load_state(source, {"weights": state["ema"]}, weights=model)
    return model.eval(), checkpoint.process_of(state["process"]), state["meta"], False


@torch.inference_mode()
def answer(model, process, prompts, draft, ahead, n_new, temperature, eos_id):
    """(ids of each answer, passes, processor seconds, the Lossless) of prompts written together."""
    longest = max(map(len, prompts))
    text = torch.full((len(prompts), longest + n_new), -1)
    for row, prompt in zip(text, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    first = torch.tensor([len(p) for p in prompts])
    rows, passes = torch.arange(len(prompts)), 0
    state = Lossless(model, process, text, rows, 0, temperature, 1.0, draft, ahead)
    live, start = torch.ones(len(prompts), dtype=torch.bool), time.process_time()
    while live.any():
        state.round(live)
        passes += 1
        at = torch.arange(text.size(1))
        ended = (state.tokens == eos_id) & (at >= first[:, None]) & (at < state.n[:, None])
        live = live & ~ended.any(1) & (state.n < first + n_new)
    seconds, answers = time.process_time() - start, []
    for row, begin, end in zip(state.tokens.tolist(), first.tolist(), state.n.tolist(), strict=True):
        ids = row[begin : min(end, begin + n_new)]
        answers.append(ids[: ids.index(eos_id) + 1] if eos_id in ids else ids)
    return answers, passes, seconds, state


def measure(model, process, prompts, drafts, ahead, n_new, temperature, eos_id, batch=1):
    """A Row for each draft; the first is AR's."""
    table = [Row(draft, offered=[0] * ahead, accepted=[0] * ahead) for draft in drafts]
    for first in tqdm(range(0, len(prompts), batch), desc="questions", leave=False, disable=None):
        some, wanted = prompts[first : first + batch], None
        for row in table:
            found, passes, seconds, state = answer(
                model, process, some, row.draft, ahead, n_new, temperature, eos_id
            )
            wanted = wanted or found
            row.tokens += sum(map(len, found))
            row.passes += passes
            row.seconds += seconds
            row.equal += sum(a == b for a, b in zip(found, wanted, strict=True))
            row.offered = [a + b for a, b in zip(row.offered, state.offered.tolist(), strict=True)]
            row.accepted = [a + b for a, b in zip(row.accepted, state.accepted.tolist(), strict=True)]
    return table


def lines(table, n):
    """The rows of a Markdown table. n: how many questions."""
    out = ["| draft | tokens a pass | accepted, by place | ms a pass | ms a token | times AR | texts equal |"]
    out.append("| --- | --- | --- | --- | --- | --- | --- |")
    base = table[0].seconds / table[0].tokens
    for row in table:
        places = zip(row.accepted, row.offered, strict=True)
        rate = " ".join(f"{100 * a / b:.0f}%" if b else "-" for a, b in places) if any(row.offered) else "-"
        each = row.seconds / row.tokens
        name = "none (AR)" if row.draft == "none" else row.draft
        out.append(
            f"| {name} | {row.tokens / row.passes:.2f} | {rate} | {1000 * row.seconds / row.passes:.0f} "
            f"| {1000 * each:.0f} | {base / each:.2f} | {row.equal} of {n} |"
        )
    return out


def side_by_side(model, process, tokenizer, question, prompt, draft, *how):
    """One question, AR's answer and the one with drafts."""
    answers = {}
    print(f"\n{shown(question)}")
    for name in ("none", draft):
        start = time.time()
        (ids,), passes, _, _ = answer(model, process, [prompt], name, *how)
        answers[name], seconds = ids, time.time() - start
        who = "AR" if name == "none" else name
        print(f"  {who:<14}{seconds:5.1f} s, {len(ids)} tokens in {passes} passes")
        print(textwrap.indent(textwrap.fill(shown(tokenizer.decode(ids)), 96), "    "))
    print("  the same text" if answers["none"] == answers[draft] else "  NOT the same text")


def bench(cfg):
    """Print the table. cfg: a lab.bench.BenchConfig."""
    torch.set_num_threads(1)
    model, process, meta, trained = network(cfg.adapt)
    tokenizer = Tokenizer(meta, ".")
    questions = read_prompts(cfg.questions)[: cfg.n_questions]
    if cfg.n_questions < 1 or cfg.new_tokens < 1 or cfg.ahead < 1:
        die(
            "n_questions, new_tokens and ahead must be at least 1",
            "--n_questions 8 --new_tokens 64 --ahead 3",
        )
    if trained and cfg.ahead > len(model.masks):
        die(
            f"ahead is {cfg.ahead}, and {cfg.adapt} has {len(model.masks)} masks",
            f"--ahead {len(model.masks)}",
        )
    prompts = [tokenizer.chat(question) for question in questions]
    drafts = TRAINED if trained else UNTRAINED
    how = cfg.ahead, cfg.new_tokens, cfg.temperature, meta.get("eos_id"), cfg.batch
    if cfg.show:
        draft = "head+lookup" if trained else "lookup"
        for question, prompt in zip(questions[: cfg.show], prompts, strict=False):
            side_by_side(model, process, tokenizer, question, prompt, draft, *how[:-1])
        return
    table = measure(model, process, prompts, drafts, *how)
    what = f"{len(questions)} questions, up to {cfg.new_tokens} tokens, temperature {cfg.temperature:g}"
    print(f"{what}, batch {cfg.batch}, {cfg.ahead} drafted tokens, float32, one thread, processor time")
    print("\n".join(lines(table, len(questions))))
