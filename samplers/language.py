"""
Which texts are allowed? A regular language, as an automaton that reads a text from left to right.

    Language    an automaton in functions, over symbols: characters, or ids where a dataset has no tokenizer
    regex       a Language from a regular expression
    compiled    a DFA from a Language: a table over a tokenizer's tokens, as small as can be
    DFA         that table: next (Q, V) is the state behind token v in state q, -1 where v is not allowed

    python sample.py --ckpt out/digits --regex '(\\d\\+\\d=\\d\\d;)*' --max_new_tokens 28
    python sample.py --ckpt out/sudoku --constraint data/sudoku/rows.py:rows

samplers/constraint.py draws texts of such a language.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from run.cli import said

MOST = 20_000  # states of an automaton, before equal ones are merged


class Refused(ValueError):
    """What cannot be, and a command that helps."""

    def __init__(self, problem, fix):
        super().__init__(problem)
        self.fix = fix


class Language(NamedTuple):
    """start: a state, anything hashable. step(state, symbol) -> state, or None. accept(state) -> bool."""

    start: Any
    step: Callable
    accept: Callable


class DFA:
    """
    next (Q, V) integers, -1: not allowed; start: a state; accept (Q,) bool. silent: tokens without text,
    which a prompt may hold anywhere and which are never written.
    """

    def __init__(self, next, start, accept, silent=()):
        self.next, self.start = torch.as_tensor(next).long(), int(start)
        self.accept, self.silent = torch.as_tensor(accept).bool(), frozenset(silent)
        Q = len(self.accept)
        fine = self.next.dim() == 2 and len(self.next) == Q and 0 <= self.start < Q
        if not fine or not -1 <= int(self.next.min()) <= int(self.next.max()) < Q:
            raise ValueError(f"a DFA of {Q} states: next is (Q, V), its entries and start are states")

    def read(self, ids):
        """The state behind ids, or -1."""
        state = self.start
        for token in ids:
            state = state if state < 0 or token in self.silent else int(self.next[state, token])
        return state

    def accepts(self, ids):
        """Is this a text of the language?"""
        state = self.read(ids)
        return state >= 0 and bool(self.accept[state])


# ----- regular expressions

NAMED = {"d": "0123456789", "s": " \t\n\r\f\v"}
NAMED["w"] = NAMED["d"] + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"
CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}


class Regex:
    """
    A parser by recursive descent. Each function reads one level and returns a tree:

        ("set", symbols, negated)   ("cat", trees)   ("or", trees)   ("times", tree, least, most or None)

    numbers: symbols are ids, written as numbers with blanks between them, not characters.
    """

    def __init__(self, pattern, numbers):
        self.pattern, self.numbers, self.at = pattern, numbers, 0

    def peek(self):
        while self.numbers and self.pattern[self.at : self.at + 1].isspace():
            self.at += 1
        return self.pattern[self.at : self.at + 1]

    def take(self, what=None):
        c = self.peek()
        if not c or (what and c != what):
            raise self.error(f"{what or 'something'} is missing")
        self.at += 1
        return c

    def error(self, why):
        where = f"at character {self.at + 1} of {self.pattern!r}"
        return Refused(f"{why} {where}", "--regex '[A-Za-z]+( [a-z]+)*', see docs/constraints.md")

    def whole(self):
        tree = self.alternatives()
        if self.peek():
            raise self.error("a ) too many")
        return tree

    def alternatives(self):
        trees = [self.sequence()]
        while self.peek() == "|":
            self.take()
            trees.append(self.sequence())
        return ("or", trees)

    def sequence(self):
        trees = []
        while self.peek() not in ("", "|", ")"):
            trees.append(self.repeated())
        return ("cat", trees)

    def repeated(self):
        tree = self.one()
        while self.peek() in ("*", "+", "?", "{") and self.peek():
            tree = ("times", tree, *self.count())
        return tree

    def count(self):
        """(least, most) of *, +, ?, {3}, {2,} or {2,5}."""
        c = self.take()
        if c != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[c]
        match = re.compile(r"(\d+)(,(\d*))?\}").match(self.pattern, self.at)
        if not match:
            raise self.error("a number of times is {3}, {2,} or {2,5}; a brace itself is \\{: it is missing")
        self.at = match.end()
        least = int(match[1])
        most = least if not match[2] else int(match[3]) if match[3] else None
        if most is not None and not least <= most <= 10_000:
            raise self.error(f"{{{least},{most}}} is no number of times")
        return least, most

    def one(self):
        c = self.peek()
        if c == "(":
            self.take()
            if self.pattern.startswith("?", self.at):
                if not self.pattern.startswith("?:", self.at):
                    raise self.error("only ( and (?: begin a group, not (?")
                self.at += 2
            tree = self.alternatives()
            self.take(")")
            return tree
        if c == "[":
            return self.brackets()
        if c == ".":
            self.take()
            return ("set", frozenset() if self.numbers else frozenset("\n"), True)
        if c in ("*", "+", "?", "{", "^", "$"):
            why = "nothing stands before" if c in "*+?{" else "a text is always matched as a whole, without"
            raise self.error(f"{why} {c}")
        symbols, negated = self.symbols()
        return ("set", symbols, negated)

    def brackets(self):
        """[a-z_], [^;]"""
        self.take("[")
        negated, found = self.pattern.startswith("^", self.at), set()
        self.at += negated
        first = True
        while first or self.peek() != "]":
            first = False
            low, inverse = self.symbols()
            if inverse:
                raise self.error("\\D, \\W and \\S stand outside of brackets")
            ahead = self.pattern[self.at : self.at + 2]
            if len(low) == 1 and ahead[:1] == "-" and ahead[1:] not in ("]", ""):
                self.take("-")
                high, inverse = self.symbols()
                (a,), (b, *more) = low, high
                value = int if self.numbers else ord
                if inverse or more or value(a) > value(b) or value(b) - value(a) > 0x110000:
                    raise self.error("a range goes from a smaller to a larger symbol:")
                back = (lambda i: i) if self.numbers else chr
                low = frozenset(map(back, range(value(a), value(b) + 1)))
            found |= low
        self.take("]")
        return ("set", frozenset(found), negated)

    def symbols(self):
        """(symbols, negated) of one character, an escape like \\d, or a number."""
        c = self.take()
        if self.numbers:
            match = re.compile(r"[0-9]+").match(self.pattern, self.at - 1)
            if not match:
                raise self.error(f"a number should stand in the place of {c},")
            self.at = match.end()
            return frozenset((int(match[0]),)), False
        if c != "\\":
            return frozenset(c), False
        c = self.take()
        if c.lower() in NAMED:
            return frozenset(NAMED[c.lower()]), c.isupper()
        if c.isalnum() and c not in CONTROLS:
            raise self.error(f"no escape \\{c}")
        return frozenset(CONTROLS.get(c, c)), False


def regex(pattern, numbers=False):
    """
    The Language of a regular expression that matches whole texts. It knows . [a-z] [^a-z] \\d \\w \\s | ( ) *
    + ? {2,5}, with the meaning they have in Python's re, for ASCII. A state is a set of places in it.
    """
    edges, free = [()], [()]  # of each place: (symbols, negated, next place), and places reached for nothing

    def place(edge=(), jumps=()):
        if len(edges) >= MOST:
            raise Refused(f"the expression has more than {MOST:,} places", "fewer or smaller {counts}")
        edges.append(edge)
        free.append(jumps)
        return len(edges) - 1

    def build(tree, after):
        """Places for a tree, before the place `after`; returns the first. Place 0 is the end."""
        kind, what, *more = tree
        if kind == "set":
            return place((what, *more, after))
        if kind == "or":
            return place(jumps=[build(part, after) for part in what])
        if kind == "cat":
            for part in reversed(what):
                after = build(part, after)
            return after
        least, most = more
        first = after
        if most is None:
            first = place()
            free[first] = [build(what, first), after]
        else:
            for _ in range(most - least):
                first = place(jumps=[build(what, first), after])
        for _ in range(least):
            first = build(what, first)
        return first

    def closure(places):
        found, todo = set(places), list(places)
        while todo:
            for other in free[todo.pop()]:
                if other not in found:
                    found.add(other)
                    todo.append(other)
        return frozenset(p for p in found if p == 0 or edges[p])

    def step(state, symbol):
        there = [edges[p][2] for p in state if p and (symbol in edges[p][0]) != edges[p][1]]
        return closure(there) if there else None

    start = build(Regex(pattern, numbers).whole(), 0)
    return Language(closure([start]), step, lambda state: 0 in state)


# ----- from symbols to tokens


def texts_of(tokenizer, V):
    """
    What each of V tokens adds to a text, as a sequence of symbols; () for special tokens, None for pieces of
    characters, which an automaton over characters cannot read.
    """
    if tokenizer.kind == "char":
        return [tokenizer.chars[v] for v in range(V)]
    if tokenizer.kind == "none":
        return [(v,) for v in range(V)]
    if tokenizer.kind == "bert":  # every word begins with a blank, the first too
        words = [tokenizer.pieces.text.get(v, "") for v in range(V)]
        return [word[2:] if word.startswith("##") else " " * bool(word) + word for word in words]

    def text(data):
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return None

    return [text(tokenizer.pieces.data.get(v, b"")) for v in range(V)]


def compiled(language, texts):
    """The DFA of a Language over tokens with these texts, without states that are equal or lead nowhere."""
    trie = [{}, []]  # [{symbol: trie}, tokens that end here]
    for token, text in enumerate(texts):
        node = trie
        for symbol in text or ():
            node = node[0].setdefault(symbol, [{}, []])
        if text:
            node[1].append(token)
    numbers, rows, known = {language.start: 0}, [], {}

    def follow(node, state, row):
        for token in node[1]:
            row[token] = numbers.setdefault(state, len(numbers))
        for symbol, child in node[0].items():
            if (state, symbol) not in known:
                known[state, symbol] = language.step(state, symbol)
            if known[state, symbol] is not None:
                follow(child, known[state, symbol], row)

    order = [language.start]
    while len(rows) < len(order):
        row = np.full(len(texts), -1, dtype=np.int32)
        follow(trie, order[len(rows)], row)
        rows.append(row)
        order += list(numbers)[len(order) :]
        if len(order) > MOST or len(order) * len(texts) > 1 << 28:
            problem = f"the automaton has more than {min(len(order), MOST):,} states"
            raise Refused(problem, "a smaller language, with fewer and smaller {counts}")
    accept = np.array([bool(language.accept(state)) for state in order])
    silent = [token for token, text in enumerate(texts) if text is not None and len(text) == 0]
    return smallest(np.stack(rows), accept, silent)


def smallest(next, accept, silent):
    """
    The DFA from state 0 with the fewest states (Moore 1956): states are equal until a token tells them apart.
    Those from which no text ends are equal to "not allowed".
    """
    dead = len(next)
    table = np.concatenate((np.where(next < 0, dead, next), np.full((1, next.shape[1]), dead)))
    columns, group, n = np.unique(table, axis=1), np.append(accept, False).astype(np.int64), 0
    while group.max() + 1 != n:
        n = group.max() + 1
        both = np.concatenate((group[:, None], group[columns]), axis=1)
        group = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)
    first = np.array([int((group == g).argmax()) for g in range(n)])  # one state for each group
    if group[0] == group[dead]:
        raise Refused("the language is empty: no text belongs to it", "another --regex or --constraint")
    keep = np.array([g for g in range(n) if g != group[dead]])
    number = np.full(n, -1)
    number[keep] = np.arange(len(keep))
    return DFA(
        number[group[table[first[keep]]]], number[group[0]], np.append(accept, False)[first[keep]], silent
    )


# ----- what the user asks for


def load(what):
    """The object that FILE.py:name names. Raises Refused for what is none."""
    path, _, name = os.path.expanduser(what).rpartition(":")
    fix = "--constraint data/sudoku/rows.py:rows"
    if not path or not Path(path).is_file():
        raise Refused(f"constraint {what!r} is not FILE.py:name of a file that is there", fix)
    spec = importlib.util.spec_from_file_location(f"constraint_{Path(path).stem}", path)
    if spec is None:
        raise Refused(f"{path} is no Python file", fix)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever the file does
        raise Refused(f"{path}: {said(e)}", f"python {path}") from e
    if not hasattr(module, name):
        own = [
            n for n, x in vars(module).items() if not n.startswith("_") and isinstance(x, (str, tuple, DFA))
        ]
        own += [n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
        raise Refused(f"{path} has no {name or 'name'}", f"--constraint {path}:{own[-1] if own else 'NAME'}")
    return getattr(module, name)


class Asked:
    """
    What a user asks for. A regular expression, a Language (or a tuple of its three) or a DFA reads the whole
    text, its prompt too. Or a function of the prompt's text, which returns one of them for what stands behind
    the prompt.
    """

    def __init__(self, what, tokenizer, V):
        self.what, self.tokenizer, self.V = what, tokenizer, V
        self.behind, self.texts, self.known = callable(what), None, {}
        if not self.behind:
            self.of("")  # complains now

    def dfas(self, prompts):
        """A DFA for each prompt, a sequence of ids. Equal prompts share one."""
        return [self.of(self.tokenizer.decode(list(map(int, ids))) if self.behind else "") for ids in prompts]

    def of(self, text):
        if text not in self.known:
            self.known[text] = self.dfa(self.called(text) if self.behind else self.what)
        return self.known[text]

    def called(self, text):
        try:
            return self.what(text)
        except Exception as e:  # whatever the function does
            problem = f"the constraint's function failed on the prompt {text!r}: {said(e)}"
            raise Refused(problem, "see docs/constraints.md") from e

    def dfa(self, what):
        if isinstance(what, str):
            what = regex(what, numbers=self.tokenizer.kind == "none")
        if isinstance(what, tuple) and len(what) == 3:
            self.texts = self.texts or texts_of(self.tokenizer, self.V)
            return compiled(Language(*what), self.texts)
        if not isinstance(what, DFA):
            problem = f"a constraint is a regular expression, a Language or a DFA, not {type(what).__name__}"
            raise Refused(problem, "see docs/constraints.md")
        if what.next.size(1) != self.V:
            raise Refused(f"the DFA is over {what.next.size(1)} tokens, the text has {self.V}", "next (Q, V)")
        return what
