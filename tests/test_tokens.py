"""
Text to ids and back. golden/tokens.json holds hard strings with the ids that the `tokenizers` library 0.23.3
gives them, under two tiny tokenizers that it trained: smollm_tiny.json, made and laid out as SmolLM-135M's,
some bytes missing as there, and bert_tiny.txt.
"""

import base64
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokens
from data.tokens import Tokenizer, read_prompts

GOLDEN = Path(__file__).parent / "golden"
ROWS = json.loads((GOLDEN / "tokens.json").read_text())
HARD = st.lists(
    st.sampled_from(
        [
            *"aTé12 \n\t'’.½日한Σ\u0301\u00a0\u3000\u0085\x00\ufffd",
            "  ",
            "'s",
            "'ll",
            " the",
            "👍🏽",
            "م",
            "१",
            "[MASK]",
        ]
    )
)
TEXTS = st.text() | HARD.map("".join) | st.text(st.characters())  # the last: lone surrogates, too
SLOW = settings(max_examples=150, deadline=None)


def layout():
    return json.loads((GOLDEN / "smollm_tiny.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """
    A file of each kind: the tiny SmolLM with a token for every byte, here, and a GPT-2 of bytes and a few
    pairs.
    """
    folder, about = tmp_path_factory.mktemp("files"), layout()
    for letter in tokens.LETTERS:
        about["model"]["vocab"].setdefault(letter, len(about["model"]["vocab"]))
    (folder / "smollm.json").write_text(json.dumps(about))
    shutil.copy(GOLDEN / "bert_tiny.txt", folder / "bert.txt")
    pairs = [bytes([b]) for b in range(256)] + [
        b"th",
        b" a",
        b"the",
        b" the",
        b"  ",
        b"\n\n",
        "é".encode(),
        "日".encode(),
    ]
    pairs += [b"\xff" + i.to_bytes(3, "big") for i in range(50256 - len(pairs))]
    (folder / "gpt2.tiktoken").write_text(
        "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(pairs))
    )
    return folder


@pytest.fixture(scope="module")
def all_kinds(folder):
    return {kind: Tokenizer({"tokenizer": kind}, folder) for kind in ("gpt2", "smollm", "bert")}


def test_ids_are_the_librarys():
    ours = tokens.smollm(GOLDEN / "smollm_tiny.json"), tokens.WordPieces(GOLDEN / "bert_tiny.txt")
    assert ours[0].missing and len(ROWS) >= 100
    for text, *theirs in ROWS:
        for tokenizer, ids in zip(ours, theirs, strict=True):
            assert tokenizer.encode(text) == ids, f"{type(tokenizer).__name__} of {text!a}"


@SLOW
@given(text=TEXTS)
def test_text_comes_back(all_kinds, text):
    """
    From GPT-2's and SmolLM's ids all of it, a lone surrogate as U+FFFD; from BERT's what has the same ids.
    """
    written = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for kind in ("gpt2", "smollm"):
        ids = all_kinds[kind].encode(text)
        assert all_kinds[kind].decode(ids) == written, kind
        assert all_kinds[kind].n_bytes(60000)[ids].sum() == len(written.encode()), kind
    bert = all_kinds["bert"]
    ids = bert.encode(text)
    if bert.pieces.vocab["[UNK]"] not in ids:
        assert bert.encode(bert.decode(ids)) == ids


def test_bytes_without_a_token_are_dropped_before_the_merges():
    """
    What is left of a word closes ranks: a merge goes over the gap, and a digit all of whose bytes are missing
    leaves nothing.
    """
    whole, about = tokens.smollm(GOLDEN / "smollm_tiny.json"), layout()
    (gap,) = {"\u0710".encode()[0]} & set(whole.missing)
    assert whole.encode("\u0710") == whole.bpe._encode_single_piece("\u0710".encode()[1:])
    text = "\u0710\u0711".encode().translate(None, bytes([gap]))
    assert (
        b"".join(whole.data[i] for i in whole.encode("\u0710\u0711")) == text
        and about["model"]["unk_token"] is None
    )


def test_each_digit_is_a_token_and_ends_a_run_of_spaces(all_kinds, tmp_path):
    encode = all_kinds["smollm"].encode
    two = encode("  ")
    assert len(two) == 1, "or the rest would show nothing"
    assert encode("  7") == two + encode("7") and encode("  ½") == two + encode("½")
    assert encode("  a") == encode(" ") + encode(" a"), "the last space belongs to the letter"
    about = layout()
    add(about["model"]["vocab"], about["model"]["merges"], ["Ġ 7", "1 2"])  # merges that no text may reach
    (tmp_path / "smollm.json").write_text(json.dumps(about))
    encode = tokens.smollm(tmp_path / "smollm.json").encode
    assert encode("a 712") == [i for c in "a 712" for i in encode(c)]


@pytest.mark.parametrize(
    "key, value, problem",
    [
        ("type", "WordPiece", "not WordPiece"),
        ("dropout", 0.1, "not dropout"),
        ("unk_token", "<|endoftext|>", "not unk_token"),
        ("continuing_subword_prefix", "##", "not continuing_subword_prefix"),
        ("end_of_word_suffix", "</w>", "not end_of_word_suffix"),
        ("byte_fallback", True, "not byte_fallback"),
        ("ignore_merges", True, "not ignore_merges"),
    ],
)
def test_another_model_is_refused(tmp_path, slip, key, value, problem):
    about = layout()
    about["model"][key] = value
    assert problem in refused(tmp_path, slip, about)


def refused(tmp_path, slip, about):
    (tmp_path / "smollm.json").write_text(about if isinstance(about, str) else json.dumps(about))
    return slip(Tokenizer, {"tokenizer": "smollm"}, tmp_path)


def test_another_layout_is_refused(tmp_path, slip):
    def no(problem, change):
        about = layout()
        change(about, about["model"], about["model"]["vocab"], about["model"]["merges"])
        assert problem in refused(tmp_path, slip, about)

    steps = lambda about: about["pre_tokenizer"]["pretokenizers"]
    no("not normalizer", lambda about, *_: about.update(normalizer={"type": "NFC"}))
    no("pretokenizers", lambda about, *_: about.update(pre_tokenizer=steps(about)[1]))
    no("unpack", lambda about, *_: steps(about).pop())
    no("Digits, one by one", lambda about, *_: steps(about)[0].update(individual_digits=False))
    no("Digits, one by one", lambda about, *_: steps(about).reverse())
    no("ByteLevel", lambda about, *_: steps(about)[1].update(add_prefix_space=True))
    no("ByteLevel", lambda about, *_: steps(about)[1].update(use_regex=False))
    no("ids do not rise", lambda about, model, vocab, merges: merges.insert(0, merges.pop(5)))
    no("two merges make one token", lambda about, model, vocab, merges: merges.append(merges[-1]))
    no("a merge makes no token", lambda about, model, vocab, merges: merges.append("~ ~"))
    no("neither a byte", lambda about, model, vocab, merges: vocab.update({"~~~": 600}))
    no("two tokens have one id", lambda about, model, vocab, merges: vocab.update({"!": vocab["~"]}))
    no("KeyError", lambda about, model, vocab, merges: vocab.update({"日": 600}))
    # "~~~~~" is ~~ ~~ ~ to the merges before it, so they never make ~~~ and ~~ neighbours; tiktoken would
    # find the whole word
    pairs = ["~ ~", "~ ~~", "~~ ~~~"]
    no("take a token apart", lambda about, model, vocab, merges: add(vocab, merges, pairs))
    assert "JSONDecodeError" in refused(tmp_path, slip, '{"model"')


def add(vocab, merges, pairs):
    for pair in pairs:
        vocab[pair.replace(" ", "")] = max(vocab.values()) + 1
        merges.append(pair)


def test_merges_may_be_written_as_lists(tmp_path):
    about = layout()
    about["model"]["merges"] = [merge.split(" ") for merge in about["model"]["merges"]]
    (tmp_path / "smollm.json").write_text(json.dumps(about))
    ours = Tokenizer({"tokenizer": "smollm"}, tmp_path)
    assert all(ours.encode(text) == ids for text, ids, _ in ROWS)


def test_special_tokens_are_no_text(all_kinds):
    for kind, special in (("gpt2", [50256]), ("smollm", range(17)), ("bert", range(6))):
        tokenizer = all_kinds[kind]
        a, b = tokenizer.encode("the"), tokenizer.encode(" a")
        assert tokenizer.decode([*special, *a, *special, *b, 70000, -1]) == "the a", kind
        sizes = tokenizer.n_bytes(60000)
        assert sizes is None if kind == "bert" else sizes[list(special)].sum() == 0
        for name in ("<|endoftext|>", "[MASK]", "[unused0]"):
            assert not set(special) & set(tokenizer.encode(f"the {name}")) - (
                {2} if kind == "bert" else set()
            ), f"{name} is letters"


def test_a_prompt_is_encoded_in_pieces(all_kinds, folder):
    meta = {"tokenizer": "smollm", "bos_id": 1, "prompt_end": " the"}
    encode = all_kinds["smollm"].encode
    assert Tokenizer(meta, folder).prompt("of the") == [1] + encode("of the") + encode(" the")
    assert (
        Tokenizer({**meta, "prompt_end": "e"}, folder).prompt("th")
        == [1] + encode("th") + encode("e")
        != [1] + encode("the")
    )
    assert all_kinds["gpt2"].prompt("the") == all_kinds["gpt2"].encode("the")
    assert Tokenizer({"tokenizer": "none", "prompt_end": "0", "bos_id": 3}, ".").prompt("7 8") == [3, 7, 8, 0]


def test_a_prompt_that_cannot_be(slip):
    sudoku = Tokenizer(
        {"tokenizer": "char", "chars": ".1234", "vocab_size": 5, "prompt_len": 4}, "data/sudoku"
    )
    assert sudoku.prompt("") == [0] * 4 and sudoku.prompt(".12.") == [0, 1, 2, 0]
    assert "a prompt of sudoku has 4 tokens, '.1' has 2" in slip(sudoku.prompt, ".1")
    numbers = Tokenizer({"tokenizer": "none", "vocab_size": 9}, ".")
    assert numbers.prompt("") == [] and numbers.prompt("8  0") == [8, 0]
    assert "not below vocab_size 9" in slip(numbers.prompt, "8 9")
    for text in ("²", "3 ²", "-1", "1.0", "x", "①", "1_0"):  # isdigit says yes to some that int cannot read
        assert "list of ids" in slip(numbers.prompt, text), text


def test_a_prompt_is_a_line_of_a_file(tmp_path, slip):
    path = tmp_path / "prompts.txt"
    for data, prompts in (
        (b"a\nb", ["a", "b"]), (b"a\r\nb\r\n", ["a", "b"]), (b"\n\na\n", ["", "", "a"]), (b"\n", [""]),
        ("\ufeffa\n".encode(), ["a"]), ("a\u2028b\x0cc\x85d\x1ce\n".encode(), ["a\u2028b\x0cc\x85d\x1ce"]),
        (b"a\rb\n", ["a\rb"]), ("日本\n".encode(), ["日本"]),
    ):  # fmt: skip
        path.write_bytes(data)
        assert read_prompts(path) == prompts, data
    for data, says in (
        (b"", "is empty"),
        ("\ufeff".encode(), "is empty"),
        (b"a\n\xff\n", "line 2 is not UTF-8"),
    ):
        path.write_bytes(data)
        assert says in slip(read_prompts, path)
    assert "not found" in slip(read_prompts, tmp_path / "none") and "cannot read" in slip(
        read_prompts, tmp_path
    )


def test_wordpieces(tmp_path):
    (tmp_path / "bert.txt").write_text("[PAD]\n[UNK]\nun\n##aff\n##able\n##a\naffable\n,\n漢\n" + "a\n##aa\n")
    bert = Tokenizer({"tokenizer": "bert"}, tmp_path)
    assert (
        bert.encode("ÜNaffable,affable") == [2, 3, 4, 7, 6]
        and bert.decode([2, 3, 4, 7, 6]) == "unaffable , affable"
    )
    assert bert.encode("un漢漢\x00un") == [2, 8, 8, 2] and bert.decode([5, 2]) == "a un"
    assert bert.encode("a" * 99) == [9] + [10] * 49 and bert.encode("a" * 101) == [1] == bert.encode("unx")
    assert bert.decode([0, 1, 2, 1, 99]) == "un"


def test_missing_and_broken_files(tmp_path, slip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("NANOBLOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert "resolve/main/tokenizer.json" in slip(Tokenizer, {"tokenizer": "smollm"}, "data/x")
    assert "resolve/main/vocab.txt" in slip(Tokenizer, {"tokenizer": "bert"}, "data/x")
    (tmp_path / "data/y").mkdir(parents=True)
    (tmp_path / "data/y/bert.txt").write_text("a\nb\n")
    assert "no [UNK]" in slip(Tokenizer, {"tokenizer": "bert"}, "data/x"), "any folder under data/ will do"
    (tmp_path / "data/y/bert.txt").write_text("a\n[UNK]\na\n")
    assert "twice" in slip(Tokenizer, {"tokenizer": "bert"}, "data/x")
    (tmp_path / "data/y/gpt2.tiktoken").write_text("what is this\n")
    assert "no GPT-2 byte pairs" in slip(Tokenizer, {"tokenizer": "gpt2"}, "data/x")
