"""
A tokenizer.json of any byte-level BPE (data/bpe.py), against the library `tokenizers`.

    python -m tests.test_bpe        writes tests/golden/bpe.json anew, with tokenizers
"""

import importlib.util
import json
import random
import sys
import unicodedata

import pytest
from conftest import ROOT

from data.bpe import JsonBPE, joined
from data.tokens import Tokenizer

GOLDEN = ROOT / "tests/golden/bpe.json"
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
MISTRAL = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
CUTS = {
    "qwen": [{**SPLIT, "pattern": {"Regex": QWEN}}, BYTES],
    "llama3": [{**SPLIT, "pattern": {"Regex": LLAMA3}}, BYTES],
    "mistral": [{**SPLIT, "pattern": {"Regex": MISTRAL}}, BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}],
    "gpt2": [{**BYTES, "use_regex": True}],
}
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "<|im_end"]
WORDS = """
the of and to in is that it was for don't DON'T we'll I'M they're 'Re 's ſ naïve café cafe\u0301 \u1e9b\u0323 \u2126 Ångström
Straße ǅ İstanbul ﬁ 東京 日本語のテスト 한국어 각 नमस्ते क़ שלום مرحبا ไทย ១២ ٣٤ Ⅷ ½ ² ① 10 1234567 3.14 1,000 v2 x1y2
😀 👩‍👩‍👧 🏳️‍🌈 e\u0301\u0323 \u0344 \u200d \u00a0 \u3000 \u2028 \x1c \x85 \x0b \x00 \ufeff \t \r \r\n \n \n\n a\nb
== != -> {} [] () /* */ #include http://a.b/c?d=e&f __init__ snake_case CamelCase "quoted" `code` $x^2$ ... --- 
""".split(" ")


def strings(n, seed):
    """Hard strings: words of many scripts, spaces of all kinds, names of special tokens, any character."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        parts = []
        for _ in range(rng.randint(1, 9)):
            kind = rng.random()
            if kind < 0.6:
                parts.append(rng.choice(WORDS))
            elif kind < 0.8:
                parts.append(rng.choice([" ", "  ", "\n", " \n ", "\t", "   ", ""]))
            elif kind < 0.9:
                parts.append(rng.choice(NAMES))
            else:
                code = rng.randrange(rng.choice([0x250, 0x3000, 0x110000]))
                parts.append("" if 0xD800 <= code < 0xE000 else chr(code))
        found.append("".join(parts))
    return found


def settled(text):
    """
    Are its characters known to every library? Letters and marks that are younger than some of them are cut, and
    put in order, in different ways: `regex` is of this year, the library's normalizer of an older Unicode.
    """
    young = lambda c: unicodedata.ucd_3_2_0.category(c) == "Cn"
    return not any(unicodedata.category(c) == "Cn" or unicodedata.combining(c) and young(c) for c in text)


def trained(kind, texts):
    """A tokenizer of the library, trained on texts, as JSON."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    if kind == "qwen":
        made.normalizer = normalizers.NFC()
    cuts = []
    for cut in CUTS[kind]:
        if cut["type"] == "Split":
            cuts.append(pre_tokenizers.Split(Regex(cut["pattern"]["Regex"]), "isolated"))
        elif cut["type"] == "Digits":
            cuts.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut["use_regex"]))
    made.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    # SmolLM lacks some bytes: those of rare scripts
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = alphabet[:180] if kind == "smollm" else alphabet
    limit = {"limit_alphabet": 180} if kind == "smollm" else {}
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False, **limit)
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([AddedToken(name, normalized=False) for name in NAMES[:3]])
    made.add_tokens([AddedToken(name, normalized=False) for name in NAMES[3:]])
    return made


@pytest.mark.parametrize("kind", CUTS)
def test_ids_and_text_are_those_of_the_library(tmp_path, kind):
    """Ids that tokenizers gave, of a text as a chat has it and as plain text."""
    file = json.loads(GOLDEN.read_text(encoding="utf-8"))[kind]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file["tokenizer"]), encoding="utf-8")
    bpe = JsonBPE(tmp_path / "tokenizer.json")
    texts = strings(len(file["ids"]), seed=1)
    assert sum(map(settled, texts)) > 200
    for text, ids, decoded in zip(texts, file["ids"], file["texts"], strict=True):
        if not settled(text):
            continue
        assert bpe.encode(text, special=True) == ids, repr(text)
        assert bpe.decode(ids) == decoded, repr(text)
        if not any(name in text for name in NAMES):
            assert bpe.encode(text) == ids
    spelt = bpe.encode("<|im_end|>")
    assert (
        len(spelt) > 1 and bpe.decode(spelt) == "<|im_end|>" and bpe.decode([bpe.added["<|im_end|>"]]) == ""
    )


@pytest.mark.slow  # 50,000 strings of each kind
@pytest.mark.parametrize("kind", CUTS)
def test_many_hard_strings(tmp_path, kind):
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    made = trained(kind, strings(4000, seed=2))
    made.save(str(tmp_path / "tokenizer.json"))
    bpe, texts = JsonBPE(tmp_path / "tokenizer.json"), strings(80_000, seed=3)
    texts = list(filter(settled, texts))[:50_000]
    wrong = [text for text in texts if bpe.encode(text, special=True) != made.encode(text).ids]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:5]!r}"


def test_the_lowest_rank_joins_first_and_of_equals_the_leftmost():
    """By the definition: look for the best pair, join it, and begin anew."""
    rng = random.Random(0)
    letters = "abc"
    for _ in range(200):
        tokens, ranks = list(letters), {}
        for _ in range(6):
            pair = rng.choice(tokens), rng.choice(tokens)
            ranks.setdefault(pair, len(ranks))
            tokens.append("".join(pair))
        order = list(ranks)
        rng.shuffle(order)
        ranks = {pair: i for i, pair in enumerate(order)}  # a list in which a part may stand behind its whole
        parts = [rng.choice(letters) for _ in range(12)]
        wanted = list(parts)
        while True:
            found = [
                (ranks[pair], i)
                for i, pair in enumerate(zip(wanted, wanted[1:], strict=False))
                if pair in ranks
            ]
            if not found:
                break
            i = min(found)[1]
            wanted[i : i + 2] = [wanted[i] + wanted[i + 1]]
        assert joined(parts, ranks) == wanted


def test_a_piece_that_is_a_token_may_stay_whole(tmp_path):
    """Llama 3 has tokens that its merges do not reach."""
    step = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, "merges": ["a b"]}
    for ignores, ids in ((True, [4]), (False, [3, 2])):
        about = {"pre_tokenizer": step, "model": {**model, "ignore_merges": ignores}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(about), encoding="utf-8")
        assert JsonBPE(tmp_path / "tokenizer.json").encode("abc") == ids


def test_files_that_are_no_such_tokenizer_end_in_two_lines(tmp_path, slip):
    good = json.loads(GOLDEN.read_text(encoding="utf-8"))["qwen"]["tokenizer"]
    path = tmp_path / "tokenizer.json"
    bos = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]}
    for change, words in (
        ({"normalizer": {"type": "Lowercase"}}, "not NFC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "it cuts by Whitespace"),
        ({"pre_tokenizer": None}, "not byte-level"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "("}}}, "the pattern '('"),
        ({"model": {**good["model"], "type": "Unigram"}}, "Unigram, not BPE"),
        ({"model": {**good["model"], "byte_fallback": True}}, "byte_fallback"),
        ({"model": {**good["model"], "merges": [["a", "no such"]]}}, "makes no token"),
        ({"model": {**good["model"], "vocab": {"a": -1}}}, "the id of 'a'"),
        ({"model": None}, "no tokenizer that can be read"),
        ({"added_tokens": [{"content": "x", "id": 1, "lstrip": True}]}, "takes the spaces"),
        (
            {"post_processor": {**bos, "single": [{"SpecialToken": {"id": "?"}}]}},
            "no tokenizer that can be read",
        ),
    ):
        path.write_text(json.dumps({**good, **change}), encoding="utf-8")
        assert words in slip(JsonBPE, path), change
    path.write_text("[" * 10**5, encoding="utf-8")
    assert "no tokenizer" in slip(JsonBPE, path)
    path.write_text(json.dumps({**good, "post_processor": bos}), encoding="utf-8")
    tokenizer = Tokenizer({"tokenizer": "json", "file": str(path)}, tmp_path)
    assert tokenizer.pieces.bos_id == tokenizer.pieces.added["<|endoftext|>"]
    assert tokenizer.decode(tokenizer.encode("naïve 東京\n")) == "naïve 東京\n"
    n_bytes = tokenizer.n_bytes(800)
    assert n_bytes[tokenizer.encode("東京 x")].sum() == len("東京 x".encode()) and n_bytes[-1] == 0


def write_golden():
    found = {}
    for kind in CUTS:
        made = trained(kind, strings(3000, seed=0))
        each = [made.encode(text).ids for text in strings(300, seed=1)]
        found[kind] = {"tokenizer": json.loads(made.to_str()), "ids": each}
        found[kind]["texts"] = made_texts(made, each)
    GOLDEN.write_text(json.dumps(found) + "\n", encoding="utf-8")


def made_texts(made, each):
    from tokenizers import decoders

    made.decoder = decoders.ByteLevel()
    return [made.decode(ids, skip_special_tokens=True) for ids in each]


if __name__ == "__main__" and importlib.util.find_spec("tokenizers"):
    sys.exit(write_golden())
