"""
Why believe the page of a sample? Recording changes no draw and no pass. The record holds what the states of the
loop hold, and what the network says of them. The page shows the record: in a browser, where one is installed,
step by step, for any text.
"""

import base64
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, run, slow
from exact import GENERATE, KINDS, V3, net, on

import diffusion as d
import sample
import train as training
from data.tokens import Tokenizer
from generate import NOTHING
from model import attention_mask
from options import SampleConfig
from run import record, screen
from samplers import SAMPLERS, constraint
from samplers.language import DFA

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
EVEN = DFA([[1, 0, -1], [2, 1, 0], [0, -1, 1]], 0, [1, 0, 1])  # over V3 letters
PROMPTS = [(), (0,), (1, 2, 0, 0, 1), (2, 2)]
ABC = SimpleNamespace(decode=lambda ids: "".join("abc"[i] if i < 3 else "?" for i in ids))
ABOUT = {"kind": "run", "format": 1, "sampler": "x", "options": {}, "block_size": 4, "steps": 3, "seed": 1}
ABOUT |= {"temperature": 1, "process": "masked", "clean_causal": True, "next_token": False, "constraint": ""}
ABOUT |= {"own_rule": "", "width": 0, "prompt_len": 0}


def made(kind, path, name, prompts=PROMPTS, recorded=True, b=4, model=None, language=None, **how):
    """(lines, states) of one text for each prompt; lines are None where nothing is recorded."""
    process = KINDS[kind][0]()
    model, process = on(path, model or net(process, **KINDS[kind][1]).double(), process)
    keeper = record.Record(model) if recorded else None
    how |= {"block_size": 1 if name == "ar" else b, "sampler": SAMPLERS[name], "seed": 3}
    if "own pace" not in SAMPLERS[name].needs:
        how |= {"steps": how.get("steps", 3)}
    write = GENERATE[path]
    if language:
        write = lambda *args, **more: constraint.generate(GENERATE[path], language, *args, **more)
    states = list(write(model, process, prompts, block_class=keeper and keeper.block_class, **how))
    if not recorded:
        return None, states
    return keeper.whole(ABOUT, process, ABC, [list(p) for p in prompts], states[-1]), states


def serves(name, kind):
    needs = SAMPLERS[name].needs
    return ("redraws" if kind == "masked" else "absorbing") not in needs


# ----- recording changes nothing

UNIFORM = "uniform denoiser, ar token"
OWN = sorted(name for name, f in SAMPLERS.items() if not f.__module__.startswith("methods."))
CASES = [(n, k, p) for n in OWN for k in ("masked", UNIFORM) for p in GENERATE if serves(n, k)]
FIRST = [(n, "masked", p) for n in ("ar", "ancestral", "arpc", "speculation") for p in GENERATE]
FIRST += [(n, UNIFORM, "fast") for n in ("arpc", "confidence", "ancestral")]
FIRST += [("freedave", "masked", "fast")]


@pytest.mark.parametrize("name, kind, path", slow(CASES, FIRST))
def test_a_recorded_text_is_the_text(name, kind, path):
    """Bit for bit, in the same passes, for every sampler, with --plain and without."""
    lines, states = made(kind, path, name)
    for ours, plain in itertools.zip_longest(states, made(kind, path, name, recorded=False)[1]):
        assert torch.equal(ours.x, plain.x) and torch.equal(ours.done, plain.done)
        assert torch.equal(ours.nfe_rows, plain.nfe_rows)
        assert (ours.nfe, ours.token_forwards, ours.step) == (plain.nfe, plain.token_forwards, plain.step)
    follow(lines, states)


def follow(lines, states):
    """The record, played, is the states that the loop has yielded: tokens, steps, passes, costs."""
    states, played = states[1:], list(record.frames(lines))
    assert len(played) == len(states) > 0
    for (line, cells), state in zip(played, states, strict=True):
        assert (line["nfe"], line["token_forwards"]) == (state.nfe, state.token_forwards)
        assert line["span"] == list(state.span) and line["step"] == state.step
        for row, x in enumerate(state.x.tolist()):
            shown = [id for id, _ in cells[row]] + [NOTHING] * (len(x) - len(cells[row]))
            assert all(a == z for a, z in zip(shown, x, strict=False) if z != NOTHING)
            for (id, what), z in zip(cells[row], x, strict=False):
                assert id != 3 or what in "nb", "a mask is noise, or was taken back"
                assert what != " " or z in (NOTHING, id)
    assert sum(len(line["passes"]) for line in lines[1:-1]) == lines[-1]["nfe"] == states[-1].nfe


@pytest.mark.parametrize("path", GENERATE)
def test_a_recorded_text_of_a_language_is_the_text(path):
    for name in ("ancestral", "confidence", "ar"):
        how = {"language": EVEN, "prompts": [(), (0,), (1, 0)], "max_new_tokens": 5}
        ours, plain = (made("masked", path, name, recorded=yes, **how)[1] for yes in (True, False))
        assert len(ours) == len(plain) and all(
            torch.equal(a.x, z.x) for a, z in zip(ours, plain, strict=True)
        )


@pytest.mark.parametrize("path", GENERATE)
def test_the_passes_hold_the_tokens_that_were_counted(path):
    for name in ("ancestral", "arpc", "speculation", "ar"):
        lines, _ = made("masked", path, name, prompts=[(1, 2)])
        passes = [each for line in lines[1:-1] for each in line["passes"]]
        tokens = [each["clean"] + sum(n for _, n, _ in each["noisy"]) for each in passes]
        assert sum(tokens) == lines[-1]["token_forwards"]


# ----- what the network said


def near(whole, x, unit):
    """A whole number of units is x, rounded."""
    return abs(whole / unit - x) <= 0.5 / unit + 1e-9


@pytest.mark.parametrize("path", GENERATE)
@pytest.mark.parametrize("kind", ["masked", "uniform denoiser, timed"])
def test_the_numbers_are_those_of_the_network(kind, path):
    """Both steps of the second block: asked of the network by hand, in float64."""
    lines, states = made(kind, path, "ancestral", prompts=[(1, 0, 2, 1), (0, 0, 1, 1)], steps=2)
    process = KINDS[kind][0]()
    model, n = net(process, **KINDS[kind][1]).double(), [0, 0]
    for k, alpha in enumerate((0.0, 0.5)):
        x = next(s for s in states if s.span == (4, 8) and s.step == k).x
        step = next(line for line in lines if line.get("span") == [4, 8] and line.get("step") == k + 1)
        with torch.no_grad():
            level = d.sigma(torch.tensor([alpha], dtype=torch.float64))
            p = process.loo_logits(model(x[:, :4], x[:, 4:], 4, 4, level), x[:, 4:], alpha).softmax(-1)
        for row in step["rows"]:
            now = dict(zip(row["at"], row["to"], strict=True))
            for position, share, entropy, best in row.get("prediction", ()):
                mine = p[row["row"], position - 4]
                assert near(entropy, float(torch.special.entr(mine).sum()), 100)
                assert best[::2] == [v for v in mine.argsort(descending=True).tolist() if v in best[::2]]
                assert all(near(q, float(mine[v]), 1000) for v, q in zip(best[::2], best[1::2], strict=True))
                if share is not None:
                    token = now.get(position, int(x[row["row"], position]))
                    assert near(share, float(mine[token]), 1000)
                    n[k] += 1
    assert min(n) > 0


@pytest.mark.parametrize("path", GENERATE)
def test_arpc_sends_back_what_the_ar_mode_doubts(path):
    """The recorded doubt is -log p_AR of the text that was read, and no kept token is doubted more."""
    prompts = [(1, 0, 2, 1), (0, 0, 1, 1), (2, 1, 1, 0)]
    lines, _ = made("masked", path, "arpc", prompts=prompts, steps=4)
    process = KINDS["masked"][0]()
    model, seen = net(process).double(), 0
    for line in lines[1:-1]:
        for row in line["rows"]:
            words = sorted(row.get("ar", ()))
            if not words:
                continue
            y = torch.tensor([[word[1] for word in words]])
            context = torch.tensor([prompts[row["row"]]])
            with torch.no_grad():
                logits = model(torch.cat((context, y), 1), torch.full_like(y, 3), 1, 4)
            nll = -d.pick(process.loo_logits(logits).log_softmax(-1), y)[0]
            assert len(words) == 4 and all(near(w[2], float(x), 100) for w, x in zip(words, nll, strict=True))
            back = dict(zip(row["at"], row["what"], strict=True))
            sent = [w[2] for w in words if not w[3]]
            assert all((back.get(w[0]) == "b") == (not w[3]) for w in words)
            assert not sent or min(sent) >= max([w[2] for w in words if w[3]], default=0) - 1
            seen += len(sent)
    assert seen > 5


@pytest.mark.parametrize("path", GENERATE)
def test_speculation_keeps_the_beginning_of_a_draft(path):
    lines, _ = made("masked", path, "speculation", prompts=[(), (1,), (2, 0)])
    kept, open = [], {}
    for line in lines[1:-1]:
        for row in line["rows"]:
            if "open" in row:
                open[row["row"]] = {line["span"][0] + i for i, mark in enumerate(row["open"]) if mark == "#"}
            left = [w for w in sorted(row.get("ar", ())) if w[0] in open[row["row"]]]
            kept.append("".join(str(w[3]) for w in left))
            open[row["row"]] -= {
                i for i, w in zip(row.get("at", ()), row.get("what", ""), strict=True) if w == "w"
            }
    assert all(re.fullmatch("1*0*", flags) for flags in kept) and any("10" in flags for flags in kept)


def test_what_a_language_forbids_is_counted():
    """All texts of four letters, by hand."""
    good = [y for y in itertools.product(range(V3), repeat=4) if accepts(EVEN, y)]
    lines, states = made("masked", "lesson", "ancestral", prompts=[()], language=EVEN, max_new_tokens=4)
    model = net(KINDS["masked"][0]()).double()
    with torch.no_grad():
        logits = model(None, torch.full((1, 4), 3), 4)
    p = logits[0, :, :V3].softmax(-1)
    step = next(line for line in lines[1:] if line.get("step") == 1)
    forbidden = {i: (share, n) for i, share, n in step["rows"][0]["forbidden"]}
    for i in range(4):
        never = [v for v in range(V3) if not any(y[i] == v for y in good)]
        assert forbidden.get(i, (0, 0))[1] == len(never)
        assert near(forbidden.get(i, (0, 0))[0], float(p[i, never].sum()), 1000)
    assert forbidden


def accepts(dfa, y):
    q = dfa.start
    for v in y:
        q = int(dfa.next[q, v]) if q >= 0 else q
    return q >= 0 and bool(dfa.accept[q])


def test_a_method_adds_a_lane_by_its_state():
    def sure(block):
        block.state["age"] = torch.arange(block.x.size(1)).expand(block.x.shape) / 8
        block.write(block.reverse(0.0, 0.0, 1.0, block.noise(0)))
        yield

    sure.needs = ()
    SAMPLERS["sure"] = sure
    try:
        lines, _ = made("masked", "fast", "sure", prompts=[()])
    finally:
        del SAMPLERS["sure"]
    assert [row["lanes"] for row in lines[2]["rows"]] == [{"age": [0, 0.125, 0.25, 0.375]}]


def test_only_so_many_texts_are_recorded():
    lines, states = made("masked", "fast", "ancestral", prompts=[(i % 3,) for i in range(20)])
    assert (lines[0]["texts"], lines[0]["recorded"], len(lines[-1]["x"])) == (20, 16, 16)
    assert max(row["row"] for line in lines[1:-1] for row in line["rows"]) == 15
    assert lines[-1]["x"] == states[-1].x[:16].tolist()


# ----- the page

HOSTILE = [
    "</script><img src=x onerror=problems.push(1)><!--",
    "\u202e\u05e9\u05dc\u05d5\u05dd",
    "👩\u200d👧\ud800\x00",
]


def hostile(lines):
    """The same record, in a vocabulary that would rather be something else."""
    text = lambda ids: "".join(HOSTILE[i] for i in ids if 0 <= i < 3)
    end = lines[-1] | {"written": [text(x) for x in lines[-1]["x"]]}
    return [lines[0] | {"tokens": dict(enumerate(HOSTILE))}, *lines[1:-1], end]


class Nesting(HTMLParser):
    """Elements open and close in turn."""

    VOID = ("meta", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.data = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][1].get("id") == "record":
            self.data += data


@pytest.mark.parametrize("change", [list, hostile])
def test_the_page_holds_the_record(change):
    lines = json.loads(json.dumps(change(made("masked", "fast", "arpc")[0])))
    page = Nesting(record.page(lines))
    assert [json.loads(line) for line in page.data.strip().splitlines()] == lines
    assert not page.open and page.seen.count("script") == 2 and "img" not in page.seen
    assert not re.search(r"(?:src|href)\s*=|https?:|@import|url\(", record.PAGE.read_text(encoding="utf-8"))


WATCH = """
const out = { steps: [], masks: [], title: $("facts").textContent, where: [], texts: [] };
const key = (name, target) => (target || document.body).dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
for (let k = 0; k <= last; k++) {
  $("slider").value = k;
  $("slider").dispatchEvent(new Event("input"));
  out.steps.push(cells.map((row) => row.map((c) => [c.id, c.what])));
  out.where.push($("where").textContent);
  out.texts.push(figures.map((f) => f.spans.map((s) => s.textContent)));
}
for (const step of steps) for (const pass of step.passes) {
  const all = tokensOf(pass), rows = all.slice(pass.past);
  const reads = (q, k) => k[0] === "clean" ? k[1] < q[2] : q[0] === "noisy" && q[3] === k[3];
  out.masks.push([pass, rows.map((q) => all.map((k) => reads(q, k)))]);
}
key("Home"); out.home = now; key("ArrowRight"); key("ArrowRight"); key("ArrowLeft"); out.one = now; key("End"); out.end = now;
key("Home"); key("ArrowRight"); key("ArrowRight");
key("ArrowDown", figures[1].text); key("ArrowDown", figures[1].text);
out.about = $("about").textContent;
figures[0].spans[0].click();
out.clicked = $("about").textContent;
for (const option of $("lane").options) { $("lane").value = option.value; $("lane").dispatchEvent(new Event("change")); }
out.lanes = [...$("lane").options].map((option) => option.value);
out.written = [...document.querySelectorAll("#finished pre")].map((p) => p.textContent);
out.unnamed = [...document.querySelectorAll("button, input, select, canvas, [role]")].filter((e) => e.id !== "said" && !/[a-z]{3}/.test(e.getAttribute("aria-label") || e.textContent)).length;
out.wide = document.scrollingElement.scrollWidth - innerWidth;
return out;
"""


FRAME = """<iframe src="watched.html" style="border: 0; width: %dpx; height: 800px"></iframe><script>
addEventListener("message", (e) => {
  const result = document.createElement("pre");
  result.id = "result"; result.textContent = e.data; document.body.append(result);
});
</script>"""
LISTEN = """<script>
const problems = [], tell = (what) => problems.push(String(what));
addEventListener("error", (e) => tell(e.message)); console.error = console.warn = tell;
addEventListener("securitypolicyviolation", (e) => tell(e.blockedURI));
</script>"""
WORK = """<script>
addEventListener("load", () => setTimeout(() => {
  let found = null;
  try { found = (() => { %s })(); } catch (e) { tell(e.stack); }
  const ascii = (c) => "\\\\u" + c.charCodeAt(0).toString(16).padStart(4, "0");
  parent.postMessage(btoa(JSON.stringify([found, problems]).replace(/[^\\0-\\x7f]/g, ascii)), "*");
}));
</script>"""


def in_browser(folder, page, script, width=1000, more=()):
    """
    What a script returns that runs in the page, in a window of so many pixels. Whatever the page complains of
    is an error.
    """
    watched = page.replace("<title>", f"{LISTEN}<title>").replace("</body>", f"{WORK % script}</body>")
    (folder / "watched.html").write_text(watched, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME % width, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/user", *more]
    command = [BROWSER, *flags, "--virtual-time-budget=20000", "--dump-dom", f"file://{folder}/frame.html"]
    dom = subprocess.run(command, capture_output=True, timeout=300).stdout.decode()
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)
    assert found, dom[-2000:]
    found, problems = json.loads(base64.b64decode(found[1]))
    assert not problems, problems
    return found


@browser
def test_the_page_shows_the_record(tmp_path):
    """The slider and the keys move the text, as it was; counts are the run's; text is text; the rule is the model's."""
    lines = hostile(made("masked", "fast", "arpc", prompts=[(), (1, 2, 0, 0, 1), (2, 2)])[0])
    seen = in_browser(tmp_path, record.page(lines), WATCH)
    played = [cells for _, cells in record.frames(lines)]
    for cells, shown in zip(played, seen["steps"][:-1], strict=True):
        for row, tokens in cells.items():
            tokens = [[id, what] for id, what in tokens]
            assert shown[row][: len(tokens)] == tokens and set(map(tuple, shown[row][len(tokens) :])) <= {
                (-1, " ")
            }
    assert [[id for id, _ in row] for row in seen["steps"][-1]] == [
        x + [-1] * (len(row) - len(x)) for x, row in zip(lines[-1]["x"], seen["steps"][-1], strict=True)
    ]
    steps = lines[1:-1]
    for line, where in zip(steps, seen["where"][:-1], strict=True):
        assert (
            f"step {line['step']} · {line['nfe']} pass" in where
            and f"{line['token_forwards']:,} token-forward" in where
        )
    assert f"{lines[-1]['nfe']} passes" in seen["title"] and "finished" in seen["where"][-1]
    assert (seen["home"], seen["one"], seen["end"]) == (0, 1, len(steps))
    assert seen["about"].startswith("token 2 of text 2: ") and seen["clicked"].startswith(
        "token 1 of text 1: "
    )
    assert "probability" in seen["clicked"] and "The AR mode read" in seen["clicked"]
    assert seen["lanes"] == ["what", "p", "h", "ar"] and seen["unnamed"] == 0 and seen["wide"] <= 0
    shown = {text for step in seen["texts"] for row in step for text in row}
    as_text = [HOSTILE[0], "\\u202e\u05e9\u05dc\u05d5\u05dd", "👩\u200d👧\\ud800\\u0000"]
    assert set(as_text) <= shown and shown <= {*as_text, "·", " "}
    for pass_, mask in seen["masks"]:
        assert mask == rule(pass_), pass_


def rule(pass_):
    """The rows and columns of model.attention_mask for a pass of the record."""
    past, clean = pass_["past"], pass_["clean"]
    edge = [i + 1 for i in range(past, past + clean)]
    group = [-1] * clean
    for first, n, b in pass_["noisy"]:
        edge += [i // b * b for i in range(first, first + n)]
        group += [i // b * b * 2**20 + b for i in range(first, first + n)]
    return attention_mask(torch.tensor([edge]), torch.tensor([group]), past + clean)[0].tolist()


@browser
@pytest.mark.slow  # four browsers
def test_the_page_fits_any_screen_and_any_text(tmp_path):
    fits = "return [document.scrollingElement.scrollWidth - innerWidth, figures[0].spans.length, now, last];"
    lines = made("uniform denoiser, ar token", "fast", "ancestral")[0]
    for width, more in ((360, ()), (800, ("--force-dark-mode",)), (1400, ())):
        for change in (lines, hostile(lines), [lines[0] | {"width": 4}, *lines[1:]]):
            assert in_browser(tmp_path, record.page(change), fits, width, more)[0] <= 0, width
    n, tokens = 10_000, ["the ", "\n", "שלום ", "🙂"]
    x = [i % 4 for i in range(n)]
    step = {"kind": "step", "span": [0, n], "step": 0, "nfe": 0, "token_forwards": 0, "passes": []}
    steps = [step | {"rows": [{"row": 0, "open": "#" * n, "x": [4] * n}]}]
    for k in range(8):
        at = list(range(k, n, 8))
        row = {"row": 0, "at": at, "to": [x[i] for i in at], "what": "w" * len(at)}
        steps.append(
            step
            | {
                "step": k + 1,
                "nfe": k + 1,
                "passes": [{"past": 0, "clean": 0, "noisy": [[0, n, n]]}],
                "rows": [row],
            }
        )
    steps[-1]["last"] = True
    head = ABOUT | {"texts": 1, "recorded": 1, "mask": 4, "prompts": [[]], "tokens": dict(enumerate(tokens))}
    end = {"kind": "end", "x": [x], "written": ["".join(tokens[i] for i in x)], "right": None, "show": None}
    lines = [head, *steps, end | {"nfe": 8, "token_forwards": 8 * n}]
    script = """
    key = (name) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
    key("End"); key("ArrowLeft"); key("ArrowLeft");
    const some = figures[0].spans.map((s) => s.textContent).slice(4, 9); key("End");
    return [some, document.querySelector("#finished pre").textContent === end.written[0],
      figures[0].spans.map((s) => s.textContent).join("").length, document.scrollingElement.scrollWidth - innerWidth];
    """
    some, whole, length, wide = in_browser(tmp_path, record.page(lines), "let key;" + script, 360)
    assert some == ["the ", "↵", "שלום ", "·", "the "] and whole and wide <= 0
    assert length == sum(map(len, lines[-1]["written"])) + n // 4, "an emoji has two units"


SIZES = [
    ("confidence", "masked", "lesson", 16, 16), ("arpc", "masked", "fast", 16, 16),
    ("confidence", "uniform", "lesson", 256, 256), ("ancestral", "masked", "lesson", 256, 256),
]  # fmt: skip


@pytest.mark.slow  # hundreds of passes of 1,024 tokens each
@pytest.mark.parametrize("name, kind, path, b, steps", SIZES)
def test_a_page_of_four_texts_is_below_a_megabyte(name, kind, path, b, steps):
    V = 65
    process = d.Masked(V + 1, V) if kind == "masked" else d.Uniform(V)
    model = net(process, seq_len=256)
    model.head.weight.data *= 0.2  # unsure, so that all alternatives are there
    model, process = on(path, model, process)
    keeper = record.Record(model)
    how = {"block_size": b, "steps": steps, "sampler": SAMPLERS[name], "block_class": keeper.block_class}
    for last in GENERATE[path](model, process, [[]] * 4, **how):
        pass
    letters = SimpleNamespace(decode=lambda ids: "".join(chr(48 + i) for i in ids))
    page = record.page(keeper.whole(ABOUT, process, letters, [[]] * 4, last))
    assert len(page.encode()) < 1_000_000, len(page)


# ----- the command

PREPARE = """
def check(text):
    return text.count("a"), len(text) // 3
def show(text):
    return "/".join(text)
"""


@pytest.fixture
def toy(project):
    (project / "data/toy/prepare.py").write_text(PREPARE, encoding="utf-8")
    flags = [
        "--dataset=toy",
        "--seq_len=16",
        "--block_sizes=1:0.5,8:0.5",
        "--max_steps=1",
        "--out_dir=out/toy",
    ]
    run(training.main, *flags, *TINY)
    return project


def test_sample_writes_a_page_a_trace_and_a_film(toy, capsys):
    from PIL import Image

    ask = ["--ckpt=out/toy", "--n_samples=2", "--sampler=arpc", "--steps=4", "--prompt=ab", "--device=cpu"]
    files = ["--html=out/new/page.html", "--trace=out/trace.jsonl", "--gif=out/film.gif"]
    capsys.readouterr()
    run(sample.main, *ask)
    plain = capsys.readouterr().out
    run(sample.main, *ask, *files)
    out = capsys.readouterr().out
    texts = lambda out: re.findall(r"--- sample \d\n(.*)\n", out)
    assert texts(out) == texts(plain) and len(texts(out)) == 2
    assert "/".join(texts(out)[0]) in out, "what the dataset's show makes of it"
    assert "recorded: out/new/page.html, out/trace.jsonl, out/film.gif\n" in out
    lines = record.read("out/trace.jsonl")
    page = Nesting(Path("out/new/page.html").read_text(encoding="utf-8"))
    assert [json.loads(line) for line in page.data.strip().splitlines()] == lines
    end = lines[-1]
    assert end["written"] == texts(out) and end["show"] == ["/".join(t) for t in texts(out)]
    assert end["right"] == [t.count("a") == 5 for t in texts(out)]
    assert f", {end['nfe']} NFE (" in out and f" {end['token_forwards']:,} token-forwards)" in out
    with Image.open("out/film.gif") as shown:
        assert 1 < shown.n_frames <= len(lines) - 2
    run(sample.main, *ask, "--gif=out/film.png")
    with Image.open("out/film.png") as strip:
        assert strip.height % (len(lines) - 2) == 0


@pytest.mark.slow  # matplotlib draws three pictures
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "sample.py").touch()  # by which it knows the project's folder
    monkeypatch.setattr("sys.path", [*sys.path])
    files = SimpleNamespace(trace="out/trace.jsonl", html="", gif="", fps=8)
    record.write(files, made("masked", "fast", "arpc")[0])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    space = {"__name__": "notebook"}
    for cell in json.loads((ROOT / "docs/watch.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec("".join(cell["source"]), space)
    assert len(space["steps"]) > 3 and space["doubt"][1] and space["doubt"][0]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--html=a.html", "--gaps=2"], "--gaps"),
        (["--trace=a", "--exact=4", "--regex=a*"], "--exact"),
        (["--gif=a.mp4"], "a film is a .gif"),
    ],
)
def test_what_cannot_be_shown_is_said(slip, flags, says):
    assert says in slip(lambda: SampleConfig(**dict(flag[2:].split("=") for flag in flags) | {
        name: int(value) for name, value in (flag[2:].split("=") for flag in flags) if value.isdecimal()
    }))  # fmt: skip


def test_a_file_that_is_no_record_is_said(slip, tmp_path):
    (tmp_path / "a").write_text('{"kind": "run"}\n', encoding="utf-8")
    assert "is no record" in slip(record.read, str(tmp_path / "a"))
    assert "is no record" in slip(record.read, str(tmp_path / "nothing"))


# ----- the terminal


class Terminal:
    """A screen with what has scrolled off above it: the codes that an animation sends, and no others."""

    def __init__(self, height):
        self.height, self.lines, self.at = height, [""], 0

    def feed(self, text):
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours
        for up, code, words in re.findall(r"\x1b\[(\d*)([AKJ])|([^\x1b]+)", text):
            if code == "A":  # no further than the top of the screen
                self.at = max(len(self.lines) - self.height, self.at - int(up), 0)
            elif code:
                self.lines[self.at :] = [""] + ([] if code == "J" else self.lines[self.at + 1 :])
            for part in re.findall(r"\n|[^\n]+", words):
                if part != "\n":
                    self.lines[self.at] += part
                    continue
                self.at += 1
                self.lines += [""] * (self.at == len(self.lines))


@pytest.mark.parametrize("marks", [{}, {"width": 5, "prompt_len": 5}])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_animation_ends_in_full_on_any_screen(monkeypatch, marks, rows):
    """Whatever scrolled off the screen is there once, as it is at the end, and no line wraps."""
    monkeypatch.setattr(screen, "time", SimpleNamespace(time=lambda: 0.0, sleep=lambda s: None))
    monkeypatch.setattr(screen.shutil, "get_terminal_size", lambda: os.terminal_size((16, 9)))
    chars = ["a", "漢", "b", "c"] if marks else ["a", "漢", "\t", "\n"]
    tokenizer = Tokenizer({"vocab_size": 4, "tokenizer": "char", "chars": chars}, ".")
    text, states = torch.arange(301).remainder(4).repeat(rows, 1), []
    for k in (0, 75, 150, 225, 301):
        states.append(SimpleNamespace(x=torch.where(torch.arange(301) < k, text, NOTHING)))
    seen, out = Terminal(9), io.StringIO()
    out.write("before it\n")
    with contextlib.redirect_stdout(out):
        for state in screen.animate(iter(states), tokenizer, None, marks, 1):
            seen.feed(out.getvalue())
            out.seek(0), out.truncate()
            assert "a" in "".join(seen.lines[-9:]) or state is states[0], "one sees where it is written"
    seen.feed(out.getvalue())
    lines = screen.frame(states[-1], None, tokenizer, None, marks, whole=True)
    plain = [line.rstrip() for line in seen.lines]
    assert plain == ["before it", *(re.sub("\x1b.*?m", "", line).rstrip() for line in lines), ""]
    assert max(map(screen.columns_of, plain[1:])) < 16 and len(lines) > 9
    assert "".join(lines).count("漢") == 75 * rows


def test_a_grid_of_wide_letters_stays_a_grid():
    chars = ["a", "漢", "e\u0301", "\u200d"]
    tokenizer = Tokenizer({"vocab_size": 4, "tokenizer": "char", "chars": chars}, ".")
    state = SimpleNamespace(x=torch.tensor([[0, 1, 2, 1, 1, 0, 2, 2]]))
    lines = screen.frame(state, None, tokenizer, None, {"width": 4}, whole=True)
    assert len(lines) == 2 and {screen.columns_of(line) for line in lines} == {4 * 2 + 3}
    assert screen.columns_of("e\ufe0f\u200d") == 1


def test_pages_stand_side_by_side(monkeypatch, capsys):
    monkeypatch.setattr(screen.shutil, "get_terminal_size", lambda: os.terminal_size((12, 9)))
    screen.pages(["漢\nb", "c\nd", "e\x1b"])
    assert capsys.readouterr().out == "漢    c\nb     d\n\ne\\x1b\n\n"
