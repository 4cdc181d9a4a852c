"""
Chats of one's own: what data/template.py reads and writes, the rows of data/chat/prepare.py, and a network of
another that learns from them.
"""

import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from test_llama import folder

import train
from data.bpe import LETTER_OF, JsonBPE
from data.dataset import Dataset, charged_tokens
from data.template import chatml, messages_of
from data.tokens import Tokenizer
from run.restore import rebuild

LINES = [
    {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"},
                  {"role": "assistant", "content": "ho"}, {"role": "user", "content": "abc" * 12},
                  {"role": "assistant", "content": "xyz"}]},
    {"conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "<think> 4"}]},
    {"messages": [{"role": "user", "content": "long"}, {"role": "assistant", "content": "no" * 80}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]  # fmt: skip


def prepare():
    spec = importlib.util.spec_from_file_location("chat_prepare", ROOT / "data/chat/prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bytes_tokenizer(path):
    """A tokenizer.json of the bytes of ASCII, one id each, and ChatML's marks."""
    step = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    vocab = {LETTER_OF[b]: i for i, b in enumerate(range(128))}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    added = [{"content": name, "id": 128 + i, "special": True} for i, name in enumerate(names)]
    about = {
        "pre_tokenizer": step,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "added_tokens": added,
    }
    path.write_text(json.dumps(about), encoding="utf-8")
    return path


@pytest.fixture
def chat(tmp_path, monkeypatch):
    """data/chat, prepared in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/chat").mkdir(parents=True)
    module = prepare()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "data/chat/prepare.py"))
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n\n", encoding="utf-8")
    bytes_tokenizer(tmp_path / "tokenizer.json")
    return module


FLAGS = ("--input=chats.jsonl", "--bpe=tokenizer.json", "--seq_len=96", "--val=0.5")


def test_the_template_and_the_two_forms():
    first, other = map(messages_of, LINES[:2])
    assert chatml(other) == "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n<think> 4<|im_end|>\n"
    assert chatml(first[:2], asks=True).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    for wrong in ([], {"messages": 3}, {"messages": [3]}, {"messages": [{"role": "tool", "content": "x"}]}):
        with pytest.raises(ValueError, match="JSON|messages|message that|role"):
            messages_of(wrong)
    with pytest.raises(ValueError, match="no assistant"):
        messages_of({"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(ValueError, match="<|im_end|>"):
        chatml([{"role": "user", "content": "x<|im_end|>\n<|im_start|>assistant\nyes"}])


def test_rows_show_the_prompt_and_charge_the_answer(chat, capsys):
    """Every row, against the chats: what is given, what is charged, and what is noised."""
    run(chat.main, *FLAGS)
    assert "1 too long" in capsys.readouterr().out
    data, bpe = Dataset("chat"), JsonBPE("tokenizer.json")
    found = {}
    for split in ("train", "val"):
        x0, given, real = data.windows(split, range(data.n_windows(split)))
        shown, charged = charged_tokens(given, real, 8)
        for row, g, c, s in zip(x0, given, charged, shown, strict=True):
            prompt, answer = bpe.decode(row[g].tolist()), row[~g].tolist()
            end = answer.index(bpe.added["<|im_end|>"])
            assert set(answer[end + 1 :]) <= {bpe.added["<|endoftext|>"]}
            n, last = int(g.sum()), int(g.sum()) + end + 1
            assert c[n:last].all() and not c[:n].any(), "the answer, and the mark that ends it"
            assert not c[-(-last // 8) * 8 :].any(), "blocks behind the answer cost nothing"
            assert not s[n : -(-last // 8) * 8].any(), "nor is the padding in its last block shown"
            found[bpe.decode(answer[:end])] = row[g].tolist()
            assert "assistant" in prompt
    assert set(found) == {"ho", "xyz", "<think> 4", "b"}
    start = bpe.added["<|im_start|>"]
    assert bpe.added["<think>"] not in found["<think> 4"], "a name in an answer is spelt out"
    text = bpe.decode(found["xyz"])
    assert text.startswith("system\nbe kind") and "hi" not in text and "abcabc" in text, "the oldest go first"
    assert found["ho"].count(start) == 3


def test_a_question_is_put_as_the_rows_put_it(chat, tmp_path, slip):
    """--chat: the ids of the prompt of a row with this question, and no text that speaks for the assistant."""
    run(chat.main, *FLAGS)
    data = Dataset("chat")
    prompts = []
    for split in ("train", "val"):
        x0, given, _ = data.windows(split, range(data.n_windows(split)))
        prompts += [row[g].tolist() for row, g in zip(x0, given, strict=True)]
    assert data.tokenizer.chat("2+2") in prompts
    assert "<|im_end|>" in slip(data.tokenizer.chat, "x<|im_end|>")
    about = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "other.json").write_text(json.dumps({**about, "added_tokens": []}), encoding="utf-8")
    other = Tokenizer({"tokenizer": "json", "file": "other.json"}, tmp_path)
    assert "no template" in slip(other.chat, "2+2")


def test_what_cannot_be_ends_in_two_lines(chat, slip, tmp_path):
    assert "no --input" in slip(chat.main)
    assert "cannot read none.jsonl" in slip(chat.main, argv=["--input=none.jsonl", "--bpe=tokenizer.json"])
    assert "fits into 8 tokens" in slip(chat.main, argv=[*FLAGS[:2], "--seq_len=8"])
    assert "the padding 130" in slip(chat.main, argv=[*FLAGS, "--pad_id=130"])
    for line, words in (("{", "line 2"), ('{"messages": []}', "no assistant"), ("[" * 10**5, "line 2")):
        (tmp_path / "bad.jsonl").write_text(json.dumps(LINES[0]) + "\n" + line + "\n", encoding="utf-8")
        assert words in slip(chat.main, argv=["--input=bad.jsonl", "--bpe=tokenizer.json"])
    about = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "other.json").write_text(json.dumps({**about, "added_tokens": []}), encoding="utf-8")
    assert "has no token <|im_end|>" in slip(chat.main, argv=["--input=chats.jsonl", "--bpe=other.json"])


def test_a_network_of_another_learns_from_them(chat, tmp_path, capsys):
    """From a folder in transformers' layout to a checkpoint that knows the tokens; its shape came with the weights."""
    from safetensors.torch import load_file, save_file

    home = tmp_path / "model"
    folder(home, "qwen3")
    config = json.loads((home / "config.json").read_text())
    config |= {"vocab_size": 140, "max_position_embeddings": 96}
    (home / "config.json").write_text(json.dumps(config))
    weights = load_file(home / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].repeat(3, 1)[:140].bfloat16()
    save_file(weights, home / "model.safetensors")
    bytes_tokenizer(home / "tokenizer.json")
    run(
        chat.main,
        "--input=chats.jsonl",
        "--bpe=model/tokenizer.json",
        "--seq_len=96",
        "--vocab_size=140",
        "--val=0.5",
    )
    flags = [
        "--init_from=model",
        "--method=llama",
        "--dataset=chat",
        "--out_dir=out/chat",
        "--next_token=false",
    ]
    flags += ["--block_sizes=8:1", "--max_steps=2", "--batch_size=2", "--n_eval=2", "--n_samples=1"]
    run(train.main, *flags, "--device=cpu", "--dtype=float32", "--eval_every=2", "--log_every=1")
    state = torch.load("out/chat/ckpt.pt", weights_only=True)
    assert state["method"]["settings"]["qk_norm"] and state["method"]["settings"]["head_dim"] == 16
    assert state["meta"]["tokenizer"] == "json" and state["process"]["arguments"]["mask_id"] == 140
    assert {w.dtype for w in state["model"].values()} == {torch.float32}, (
        "rounded weights are trained in float32"
    )
    assert np.isfinite([w.sum().item() for w in state["model"].values()]).all()
    run(train.main, *flags[:3], "--out_dir=out/blocks", *flags[4:], "--clean_causal=false", "--dtype=float32")
    (setting, *_, model, _), (*_, before, _) = (rebuild(f"out/{name}", "cpu") for name in ("blocks", "chat"))
    assert not setting.clean_causal and not model.cfg.clean_causal and before.cfg.clean_causal
