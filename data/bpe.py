"""
How does a tokenizer.json make ids? Byte-level BPE, as Llama 3, Qwen, SmolLM and GPT-2 have it.

    text     NFC, if the file says so
    pieces   cut by the file's rules one after the other: Split (a pattern), Digits, ByteLevel
    ids      the bytes of a piece, joined pair by pair, in the order of the list of merges

A text is plain text: "<|im_end|>" in it is spelt out. With special=True the names of added tokens become
their ids, which is how a chat is written.
"""

import heapq
import json
import unicodedata
from pathlib import Path

from run.cli import die, said

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
MEMORY = 1 << 16  # pieces whose ids are remembered
LARGEST = 256 << 20  # bytes of a tokenizer.json


def byte_letters():
    """{letter: byte} of GPT-2's alphabet: visible bytes are their own letters, others come after U+0100."""
    visible = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


LETTERS = byte_letters()
LETTER_OF = {b: letter for letter, b in LETTERS.items()}


class JsonBPE:
    """encode and decode as `tokenizers` does, of one file. Two lines for what is no byte-level BPE."""

    def __init__(self, path):
        try:
            if Path(path).stat().st_size > LARGEST:
                raise ValueError("it is too large")
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            self.nfc = normalizer(about.get("normalizer"))
            self.cuts = rules(about.get("pre_tokenizer"))
            self.vocab, self.ranks, self.whole = model(about["model"])
            added = [
                (token["content"], token["id"]) for token in about.get("added_tokens", []) if fits(token)
            ]
            hidden = {token["id"] for token in about.get("added_tokens", []) if token.get("special")}
            self.bos_id = first_token(about.get("post_processor"), dict(added))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            die(f"{path}: no tokenizer that can be read: {said(e)}", "a tokenizer.json with byte-level BPE")
        self.added, self.names, self.memory = dict(added), None, {}
        if added:
            import regex

            longest_first = sorted(self.added, key=len, reverse=True)
            self.names = regex.compile("|".join(map(regex.escape, longest_first)))
        # id -> the bytes it stands for; special tokens stand for none
        self.data = {i: bytes(LETTERS[c] for c in token) for token, i in self.vocab.items() if spelt(token)}
        self.data |= {i: name.encode() for name, i in added}
        self.data |= dict.fromkeys(hidden, b"")

    def encode(self, text, special=False):
        if not special or self.names is None:
            return self.plain(text)
        ids, at = [], 0
        for found in self.names.finditer(text):
            ids += self.plain(text[at : found.start()]) + [self.added[found[0]]]
            at = found.end()
        return ids + self.plain(text[at:])

    def plain(self, text):
        """Ids of a text without added tokens."""
        pieces = [unicodedata.normalize("NFC", text) if self.nfc else text]
        for cut in self.cuts:
            pieces = [part for piece in pieces for part in cut(piece)]
        return [i for piece in pieces for i in self.ids_of(piece)]

    def ids_of(self, piece):
        if piece not in self.memory:
            if len(self.memory) >= MEMORY:
                self.memory.clear()
            letters = [LETTER_OF[b] for b in piece.encode("utf-8")]
            if self.whole and (name := "".join(letters)) in self.vocab:
                self.memory[piece] = [self.vocab[name]]
            else:
                known = [letter for letter in letters if letter in self.vocab]  # others are left out
                self.memory[piece] = [self.vocab[part] for part in joined(known, self.ranks)]
        return self.memory[piece]

    def decode(self, ids):
        return b"".join(self.data.get(i, b"") for i in ids).decode("utf-8", "replace")


def joined(parts, ranks):
    """The parts joined by the merges: the lowest rank first, of equal ones the leftmost."""
    after = [*range(1, len(parts)), None]  # linked both ways, so that a join costs no copy
    before, queue = [None, *range(len(parts) - 1)], []

    def offer(i):
        if i is not None and after[i] is not None:
            rank = ranks.get((parts[i], parts[after[i]]))
            if rank is not None:
                heapq.heappush(queue, (rank, i, parts[i], parts[after[i]]))

    for i in range(len(parts) - 1):
        offer(i)
    while queue:
        _, i, left, right = heapq.heappop(queue)
        j = after[i]
        if j is None or (parts[i], parts[j]) != (left, right):
            continue  # one of the two has been joined with another
        parts[i], parts[j] = left + right, None
        after[i] = after[j]
        if after[j] is not None:
            before[after[j]] = i
        offer(before[i])
        offer(i)
    return [part for part in parts if part is not None]


# ----- the parts of the file


def spelt(token):
    return all(letter in LETTERS for letter in token)


def steps(part, inside):
    """The steps of a Sequence, or the one step there is."""
    if part is None:
        return []
    return part[inside] if part["type"] == "Sequence" else [part]


def normalizer(part):
    """Does it say NFC? It may say nothing else."""
    kinds = [step["type"] for step in steps(part, "normalizers")]
    if set(kinds) - {"NFC"}:
        raise ValueError(f"its normalizer is {', '.join(kinds)}, not NFC")
    return bool(kinds)


def isolated(pattern):
    """A function that cuts a text before and behind each match."""
    import regex  # tiktoken needs it too

    try:
        pattern = regex.compile(pattern)
    except regex.error as e:
        raise ValueError(f"the pattern {pattern[:40]!r}: {e}") from e

    def cut(text):
        parts, at = [], 0
        for found in pattern.finditer(text):
            parts += [text[at : found.start()], found[0]]
            at = found.end()
        return [part for part in (*parts, text[at:]) if part]

    return cut


def rules(part):
    """The functions that cut a text into pieces."""
    import regex

    cuts, is_byte_level = [], False
    for step in steps(part, "pretokenizers"):
        kind = step["type"]
        if kind == "Split":
            pattern = step["pattern"]
            if step["behavior"] != "Isolated" or step.get("invert"):
                raise ValueError(f"a Split that is {step['behavior']}, not Isolated")
            words = pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])
            cuts.append(isolated(words))
        elif kind == "Digits":
            cuts.append(isolated(r"\p{N}" if step.get("individual_digits") else r"\p{N}+"))
        elif kind == "ByteLevel":
            if step.get("add_prefix_space", True):
                raise ValueError("it puts a space before the text")
            is_byte_level = True
            if step.get("use_regex", True):
                cuts.append(isolated(GPT2_PATTERN))
        else:
            raise ValueError(f"it cuts by {kind}, not Split, Digits or ByteLevel")
    if not is_byte_level:
        raise ValueError("it is not byte-level")
    return cuts


def model(part):
    """({token: id}, {pair: rank}, whether a piece that is a token stays whole)"""
    if part.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {part['type']}, not BPE")
    unread = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if unlike := [key for key in unread if part.get(key)]:
        raise ValueError(f"its BPE has {', '.join(unlike)}")
    vocab = part["vocab"]
    if odd := [token for token, i in vocab.items() if type(i) is not int or i < 0]:
        raise ValueError(f"the id of {odd[0]!r} is {vocab[odd[0]]!r}")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in part["merges"]]
    if odd := [pair for pair in pairs if len(pair) != 2 or "".join(pair) not in vocab]:
        raise ValueError(f"the merge {' '.join(odd[0])[:40]!r} makes no token")
    ranks = {}
    for rank, pair in enumerate(pairs):
        ranks[pair] = rank
    return vocab, ranks, bool(part.get("ignore_merges"))


def fits(token):
    """Is an added token one that stands for itself alone?"""
    if any(token.get(key) for key in ("lstrip", "rstrip", "single_word")):
        raise ValueError(f"{token['content']!r} takes the spaces beside it")
    if type(token["id"]) is not int or not token["content"]:
        raise ValueError(f"the id of {token['content']!r} is {token['id']!r}")
    return True


def first_token(part, added):
    """The id that every text begins with, or None."""
    for step in steps(part, "processors"):
        if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return added[step["single"][0]["SpecialToken"]["id"]]
    return None
