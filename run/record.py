"""
What happened while a text was made? A record of every step, for a page, a film and a notebook.

    python sample.py --ckpt out/sudoku --html out/page.html --trace out/trace.jsonl --gif out/film.gif

`Recorded` is mixed into whatever Block makes the text. It listens to what the network says and to what the
sampler writes. It asks nothing and draws nothing, so the text and the number of passes stay what they are.
docs/watch.md lists what a line of the record holds.
"""

import json
import math
from pathlib import Path

import torch

from generate import HOLE, NOTHING, Block
from run import film
from run.cli import die, writable
from samplers.pieces import entropy

TEXTS = 16  # so many texts are recorded; the others are made as ever
LOOKS = 16  # so many steps of a block keep all predictions; between them those of tokens that were written
TOP = 5  # alternatives of a token
PAGE = Path(__file__).with_name("page.html")
BEGINS = {"html": b"<!doctype html>", "trace": b'{"kind":"run"', "gif": (b"GIF8", b"\x89PNG")}  # of our files


def thousandths(p):
    """Probabilities as whole numbers, 1000 for 1."""
    return (1000 * p).round().long().tolist()


def hundredths(nats):
    """Nats as whole numbers, 100 for 1; what is infinite or more is 99999."""
    return (100 * nats).nan_to_num(99999, 99999).clamp(max=99999).round().long().tolist()


# ----- the block that listens


class Recorded:
    """Mixed into a Block: it tells `record` what the network said and what each step wrote."""

    record, inside, fresh = None, 0, None  # fresh: the pure noise that the sampler drew last, (R, b)

    def __init__(self, *args):
        super().__init__(*args)
        self.banned = self.fresh = None
        if hasattr(self, "chain"):  # a constraint: samplers/constraint.py
            self.draw_given_language, self.chain.draw = self.chain.draw, self.listen_to_chain

    def show(self):
        super().show()
        self.record.step(self)

    def prior(self, noise):
        self.fresh = super().prior(noise)
        return self.fresh

    def ar_draw(self, logits):
        y = super().ar_draw(logits)
        self.fresh = None  # it was not drawn to be written
        return y

    # ----- what the network is asked, and says

    def inner(self, f, *args, **how):
        """Call f. What it calls in turn is not heard a second time."""
        self.inside += 1
        try:
            return f(*args, **how)
        finally:
            self.inside -= 1

    def predict(self, alpha, x=None, **extra):
        logits = self.inner(super().predict, alpha, x, **extra)
        self.hear("prediction", logits, self.x if x is None else x, alpha)
        return logits

    def ask(self, alpha, asked):
        logits = self.inner(super().ask, alpha, asked)
        whole = logits.new_zeros(*asked.shape, logits.size(-1))
        whole[asked.to(whole.device)] = logits
        self.hear("prediction", whole, self.x, alpha, asked)
        return logits

    def verify(self, y):
        logits = self.inner(super().verify, y)
        self.hear("ar", logits, y, 0.0)
        return logits

    def verify_and_predict(self, y, alpha):
        ar, logits = self.inner(super().verify_and_predict, y, alpha)
        self.hear("ar", ar, y, 0.0)
        self.hear("prediction", logits, self.x, alpha)
        return ar, logits

    def forward(self, noisy, block_size, alpha, guess=None, **extra):
        if not hasattr(super(), "run_rows"):
            self.note_pass(noisy, block_size, guess)
        logits = self.inner(super().forward, noisy, block_size, alpha, guess, **extra)
        if noisy.size(1) <= len(self.positions):
            self.hear(
                "prediction" if guess is None else "ar", logits, noisy if guess is None else guess, alpha
            )
        return logits

    def run_rows(self, wanted, guess, noisy, block_size, alpha, start=None, ask=None, **extra):
        self.note_pass(noisy, block_size, guess, start)
        return self.inner(super().run_rows, wanted, guess, noisy, block_size, alpha, start, ask, **extra)

    def note_pass(self, noisy, block_size, guess, start=None):
        """Who could read whom in this pass: what the page draws."""
        begin, n = int(self.positions[0]), noisy.size(1)
        past = 0 if self.cache is None else min(self.cache.length, begin)
        at = torch.as_tensor(begin if start is None else start)
        at = at.tolist() if at.dim() else list(range(int(at), int(at) + n))
        sizes = torch.as_tensor(block_size).flatten().tolist()
        parts = []  # [first position, tokens, block size] of neighbours
        for i, size in zip(at, sizes * n if len(sizes) == 1 else sizes, strict=True):
            if parts and parts[-1][2] == size and i == sum(parts[-1][:2]):
                parts[-1][1] += 1
            else:
                parts.append([i, 1, size])
        clean = begin - past + (0 if guess is None else guess.size(1))
        self.record.passes.append({"past": past, "clean": clean, "noisy": parts})

    def hear(self, kind, logits, x, alpha, asked=None):
        """
        The network's word on the first positions, whose tokens x (R, n) are: the block, or what the AR mode
        was shown. Probabilities of each token given the others, before temperature and top_p.
        """
        if self.inside:
            return
        number, live, n = self.rows.tolist(), self.live.tolist(), logits.size(1)
        mine = [i for i, r in enumerate(number) if r < TEXTS and live[i] and number.index(r) == i]
        if not mine:
            return
        if torch.is_tensor(alpha) and alpha.dim() and len(alpha) == len(number):
            alpha = alpha[mine]
        x = x if torch.is_tensor(x) and x.dim() == 2 else self.x  # not soft tokens
        ar, open = kind == "ar" or len(self.positions) == 1, self.open[mine, :n]
        seen = (self.x if ar else x)[mine, :n]  # block size 1 reads no token of its own
        open = open if ar else open & ~self.process.known(seen)
        logp = self.process.loo_logits(logits[mine], seen, alpha).log_softmax(-1)
        best = logp.topk(min(TOP, logp.size(-1)), dim=-1)
        said = {
            "kind": kind, "rows": [number[i] for i in mine], "positions": self.positions[:n].tolist(),
            "x": self.process.tokens(x[mine, :n]).tolist(), "logp": logp, "open": open.tolist(),
            "asked": (torch.ones_like(open) if asked is None else asked[mine]).tolist(),
            "entropy": hundredths(entropy(logp)), "ids": best.indices.tolist(),
            "p": thousandths(best.values.exp()),
        }  # fmt: skip
        self.record.heard.append(said)

    def listen_to_chain(self, logp, key, greedy=False):
        """What the language forbids of logp, (R, b, V) bool, and how likely all of it was, (R, b)."""
        forbidden = (self.chain.marginals(logp) == -torch.inf) & (logp > -torch.inf)
        self.banned = forbidden, (logp.log_softmax(-1).exp() * forbidden).sum(-1)
        return self.draw_given_language(logp, key, greedy)


# ----- the record


class Record:
    """What the blocks of one run tell. lines: a dict for each step."""

    def __init__(self, model):
        base = getattr(model, "block_class", Block)
        self.block_class = type(f"Recorded{base.__name__}", (Recorded, base), {"record": self})
        self.lines, self.passes, self.heard, self.block = [], [], [], None

    def step(self, block):
        """A sampler has yielded, or a block begins as pure noise."""
        where, first = block.positions.tolist(), block is not self.block
        if first:
            self.end_block()
            self.block, self.number, self.before = block, -1 if len(where) > 1 else 0, {}
        self.number += 1
        checks = [said for said in self.heard if said["kind"] == "ar"]
        draft = checks[0] if len(checks) == 1 else None  # of several drafts nobody knows which was taken
        rows = [
            self.row(block, i, row, where, first, draft)
            for i, row in enumerate(block.rows.tolist())
            if row < TEXTS
        ]
        line = {"kind": "step", "span": [where[0], where[-1] + 1], "step": self.number}
        line |= {"nfe": block.counts["nfe"], "token_forwards": block.counts["token_forwards"]}
        self.lines.append(line | {"passes": self.passes, "rows": rows})
        self.passes, self.heard, block.banned, block.fresh = [], [], None, None

    def end_block(self):
        """Which step was the last of a block is known when the next block begins."""
        if self.lines:
            self.lines[-1]["last"] = True

    def row(self, block, i, row, where, first, draft):
        """What one step did to one text, row i of the block."""
        now, open, size = block.text[row, block.positions].tolist(), block.open[i].tolist(), len(where)
        line = {"row": row} | ({"open": "".join(".#"[o] for o in open)} if first else {})
        if first and size > 1:
            self.before[row] = now, [True] * size
            return line | {"x": now}
        old, noisy = self.before.get(row, ([NOTHING] * size, [True] * size))
        guess = tokens_of(draft, row, where)
        fresh = None if block.fresh is None else block.process.tokens(block.fresh)[i].tolist()
        what, still, mask = [], [], block.process.mask_id
        for j in range(size):
            if mask is not None:
                noise = now[j] == mask
            elif size == 1:
                noise = False
            elif guess[j] is not None:
                noise = guess[j] != now[j]
            else:  # as far as it can be known: as it was, or as it was drawn
                noise = noisy[j] and old[j] == now[j] if fresh is None else fresh[j] == now[j]
            drafted = guess[j] not in (None, mask, now[j])
            what.append(event(open[j], noisy[j], noise, old[j] != now[j], drafted))
            still.append(noise)
        self.before[row] = now, still
        # noise that can become any token has something new everywhere, at every step
        every = -(-block.steps // (LOOKS if block.process.absorbing else LOOKS // 2))
        ignored = "." if self.number % every == 0 else ".n"
        changed = [j for j in range(size) if what[j] not in ignored]
        line |= {"at": [where[j] for j in changed], "to": [now[j] for j in changed]}
        line["what"] = "".join(what[j] for j in changed)
        line |= self.words(row, where, now, open, what, every)
        return line | lanes(block, i, where)

    def words(self, row, where, now, open, what, every):
        """What the network said of a row in this step: its latest word on each position."""
        found, index = {"prediction": {}, "ar": {}}, {position: j for j, position in enumerate(where)}
        for said in self.heard:
            if row not in said["rows"]:
                continue
            r = said["rows"].index(row)
            for n, position in enumerate(said["positions"]):
                j = index.get(position)
                if j is None or not open[j] or not said["asked"][r][n]:
                    continue
                if what[j] not in "wcb" and not (said["open"][r][n] and self.number % every == 0):
                    continue
                pairs = zip(said["ids"][r][n], said["p"][r][n], strict=True)
                best = [v for id, p in pairs if p for v in (id, p)]
                if said["kind"] == "prediction":
                    own = 0 <= now[j] < said["logp"].size(-1) and what[j] not in "nb"
                    p = thousandths(said["logp"][r, n, now[j]].exp()) if own else None
                    word = [position, p, said["entropy"][r][n], best]
                else:
                    y = said["x"][r][n]
                    word = [position, y, hundredths(-said["logp"][r, n, y]), int(y == now[j]), best[:2]]
                found[said["kind"]][position] = word
        return {kind: list(words.values()) for kind, words in found.items() if words}

    # ----- what becomes of it

    def whole(self, about, process, tokenizer, prompts, last, right=None, show=None):
        """All lines: the run, its steps, and how it ended. last: the last State of generate."""
        self.end_block()
        prompts = [[NOTHING if i == HOLE else i for i in ids] for ids in prompts[:TEXTS]]
        final = last.x[: len(prompts)].tolist()
        texts = [tokenizer.decode([i for i in row if i != NOTHING]) for row in final]
        used = {i for row in [*final, *prompts] for i in row}
        for row in (row for line in self.lines for row in line["rows"]):
            used |= {*row.get("x", ()), *row.get("to", ())}
            used |= {id for word in row.get("prediction", ()) for id in word[3][::2]}
            used |= {id for word in row.get("ar", ()) for id in (word[1], *word[4][::2])}
        named = sorted(i for i in used if i >= 0 and i != process.mask_id)
        head = about | {"texts": len(last.x), "recorded": len(prompts), "mask": process.mask_id}
        head |= {"prompts": prompts, "tokens": {i: tokenizer.decode([i]) for i in named}}
        end = {"kind": "end", "x": final, "written": texts, "right": right and right[: len(prompts)]}
        end |= {"show": [show(text) for text in texts] if show else None}
        end |= {"nfe": last.nfe, "token_forwards": last.token_forwards}
        return [head, *self.lines, end]


def event(open, was_noise, is_noise, moved, drafted):
    """
    What a step did to a token, in a letter: w written, c changed, b taken back, n other noise, "." nothing.
    drafted: the AR mode has read another token here, which does not stand now.
    """
    if not open:
        return "."
    if is_noise:
        return "b" if drafted or not was_noise else "n" if moved else "."
    return "w" if was_noise else "c" if moved else "."


def tokens_of(said, row, where):
    """The token that a pass has read at each position of a row; None where it has read none."""
    if said is None or row not in said["rows"]:
        return [None] * len(where)
    x = said["x"][said["rows"].index(row)]
    read = dict(zip(said["positions"], x, strict=False))
    return [read.get(position) for position in where]


def lanes(block, i, where):
    """What a constraint forbade, and what a method keeps in block.state as (R, b) numbers, of row i."""
    found = {}
    if block.banned is not None:
        forbidden, share = block.banned
        numbers = zip(where, thousandths(share[i]), forbidden[i].sum(-1).tolist(), strict=True)
        found["forbidden"] = [[position, p, n] for position, p, n in numbers if n]
    own = {name: x for name, x in block.state.items() if torch.is_tensor(x) and x.shape == block.x.shape}
    if own:
        number = lambda v: round(v, 3) if math.isfinite(v) else None  # JSON has no infinity
        found["lanes"] = {name: [number(v) for v in x[i].double().tolist()] for name, x in own.items()}
    return found


# ----- files


def wanted(cfg, model):
    """A Record, if a flag asks for one, else None. Exits if a file cannot be written."""
    asked = [(flag, getattr(cfg, flag)) for flag in BEGINS if getattr(cfg, flag)]
    for i, (flag, path) in enumerate(asked):
        writable(path, flag, BEGINS[flag])
        if any(Path(path).resolve() == Path(other).resolve() for _, other in asked[:i]):
            die(f"two records would be written to {path}", f"--{flag} ANOTHER_FILE")
    return Record(model) if cfg.html or cfg.trace or cfg.gif else None


def about(cfg, own, b, run, meta, model):
    """The first line of a record: what was asked, of what. own: the sampler's options."""
    asked = ("steps", "temperature", "top_p", "seed")
    return {
        "kind": "run", "format": 1, "sampler": "ar" if b == 1 else cfg.sampler, "options": own,
        **{name: getattr(cfg, name) for name in asked},
        "block_size": b, "process": run.process, "constraint": cfg.regex or cfg.constraint,
        "clean_causal": model.cfg.clean_causal, "next_token": model.cfg.next_token,
        "own_rule": getattr(model, "own_rule", ""),
        "width": meta.get("width", 0), "prompt_len": meta.get("prompt_len", 0),
    }  # fmt: skip


def write(cfg, lines):
    """The files that were asked for; prints their names."""
    if cfg.trace:
        text = "".join(f"{as_json(line)}\n" for line in lines)
        Path(cfg.trace).write_text(text, encoding="utf-8")
    if cfg.html:
        Path(cfg.html).write_text(page(lines), encoding="utf-8")
    if cfg.gif:
        film.write(lines, frames(lines), cfg.gif, cfg.fps)
    texts, some = lines[0]["texts"], lines[0]["recorded"]
    some = f", {some} of {texts} texts" if texts > some else ""
    print(f"recorded: {', '.join(f for f in (cfg.html, cfg.trace, cfg.gif) if f)}{some}")


def as_json(line):
    return json.dumps(line, separators=(",", ":"), ensure_ascii=True)


def page(lines):
    """The page: run/page.html with the lines in it. No text can end the element they stand in."""
    record = "\n".join(map(as_json, lines)).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("RECORD", record, 1)


def read(path):
    """The lines of a --trace file."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        if lines[0]["kind"] != "run" or lines[-1]["kind"] != "end":
            raise ValueError("its first line or its last is missing")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        die(f"{path} is no record: {e}", f"python sample.py --trace {path}")
    return lines


AFTER = {"n": "n", "b": "n", "g": "g", " ": " "}  # a letter in the next step, if nothing happens; others: k


def frames(lines):
    """
    The texts step by step, for a film or a notebook: (line, {row: [(token id, what)]}) for each step. what
    is a letter of `event`, or g given, k kept as it was, and " " where nothing is written; n is all noise.
    """
    about, end = lines[0], lines[-1]
    cells = {row: [(id, "g" if id >= 0 else " ") for id in ids] for row, ids in enumerate(about["prompts"])}
    for row, x in enumerate(end["x"]):
        cells[row] += [(NOTHING, " ")] * (len(x) - len(cells[row]))
    for line in lines[1:-1]:
        first, last = line["span"]
        for change in line["rows"]:
            row = cells[change["row"]]
            row += [(NOTHING, " ")] * (last - len(row))
            row[first:last] = [(id, AFTER.get(what, "k")) for id, what in row[first:last]]
            if "open" in change:
                tokens = change.get("x", [id for id, _ in row[first:last]])
                for i, id, mark in zip(range(first, last), tokens, change["open"], strict=True):
                    given = row[i][1] if row[i][1] in "gk" else "g" if id >= 0 else " "
                    row[i] = id, given if mark == "." else "n"
            changes = (change.get(name, ()) for name in ("at", "to", "what"))
            for i, id, what in zip(*changes, strict=True):
                row[i] = id, what
            if line.get("last"):
                row[first:last] = [(id, "k" if what == "n" else what) for id, what in row[first:last]]
        yield line, {row: list(tokens) for row, tokens in cells.items()}
        if line.get("last"):  # finished text for the blocks behind it
            for row in cells.values():
                row[first:last] = [(id, what if what in "g " else "k") for id, what in row[first:last]]
