"""
hub/export.py: what it writes has others' names and shapes, gives the same logits there, and comes back as it was.
"""

import dataclasses
import json
import sys

import pytest
import torch
from conftest import run
from test_hub_in import MASK, write
from test_llama import folder, golden

from diffusion import Masked
from generate import SAMPLERS, generate
from hub import evaluate, export
from model import ModelConfig, Transformer
from options import TrainConfig
from run import checkpoint
from run.restore import rebuild

CPU = torch.device("cpu")


def exported(source, to, *flags):
    """The folder `to`, made of a folder or an out_dir."""
    run(
        export.main,
        f"--{'init_from' if (source / 'config.json').exists() else 'ckpt'}={source}",
        f"--to={to}",
        *flags,
    )
    return to


def own_run(home, **changes):
    """A checkpoint of the network of model.py, as train.py leaves it."""
    torch.manual_seed(0)
    cfg = TrainConfig(n_layers=2, n_heads=2, d_model=16, seq_len=16, block_sizes={1: 0.5, 4: 0.5}, **changes)
    process = Masked(11, 10)
    model = Transformer(checkpoint.network_config(cfg, process, 10))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    weights = model.state_dict()
    meta = {"tokenizer": "char", "chars": "abcdefghi\n", "vocab_size": 10, "eos_id": 9}
    state = {"model": weights, "ema": weights, "config": dataclasses.asdict(cfg), "meta": meta, "step": 7}
    checkpoint.save(home, state | {"version": checkpoint.VERSION})
    log = {"step": 7, "val": {"1": 1.25, "4": 1.5}}
    (home / "log.jsonl").write_text(json.dumps(log) + "\n", encoding="utf-8")
    return home


def text(path, sampler, **how):
    """A text at temperature 0, from a network in float64."""
    setting, meta, _, model, process = rebuild(str(path), CPU)
    how = {"block_size": max(setting.block_sizes), "sampler": SAMPLERS[sampler], "temperature": 0.0} | how
    for state in generate(model.double(), process, [[1, 2, 3]], max_new_tokens=9, **how):
        pass
    return state.x.tolist(), meta


@pytest.mark.parametrize("name", ["llama_gqa_tied", "llama_untied", "qwen2", "qwen3"])
def test_a_language_model_comes_out_as_it_came_in(tmp_path, name):
    """Every tensor and setting that transformers wrote; so its class loads it, and its logits are the same."""
    from safetensors.torch import load_file

    file = folder(tmp_path / "in", name)
    out = exported(tmp_path / "in", tmp_path / "out")
    before, after = (load_file(home / "model.safetensors") for home in (tmp_path / "in", out))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    config, theirs = json.loads((out / "config.json").read_text()), golden(name)[0]
    assert {k: config[k] for k in theirs} == theirs
    assert config["architectures"] == [f"{theirs['model_type'].capitalize()}ForCausalLM"]
    ids = torch.tensor(file["ids"]).long()
    model = rebuild(str(out), CPU)[3].double()
    with torch.no_grad():
        found = model.to_logits(model.hidden(ids, None, 1)[0])[..., :-1]
    assert (found - torch.tensor(file["logits"])).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama_gqa_tied", "qwen2", "qwen3"])
def test_transformers_loads_a_language_model(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    file = folder(tmp_path / "in", name)
    network = transformers.AutoModelForCausalLM.from_pretrained(exported(tmp_path / "in", tmp_path / "out"))
    assert type(network).__name__ == f"{golden(name)[0]['model_type'].capitalize()}ForCausalLM"
    with torch.no_grad():
        found = network.double()(torch.tensor(file["ids"]).long()).logits
    assert (found - torch.tensor(file["logits"])).abs().max() < 1e-5


@pytest.mark.parametrize(
    "kind, sampler", [("sdar", "sdar"), ("a2d-llama", "a2d"), ("Fast_dLLM_Qwen", "fast_dllm")]
)
def test_a_block_diffusion_model_comes_out_as_it_came_in(tmp_path, kind, sampler):
    from safetensors.torch import load_file

    home = write(tmp_path / "in", kind, eos_token_id=[48, 49])
    out = exported(home, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (home, out))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    config = json.loads((out / "config.json").read_text())
    assert (
        config["model_type"] == kind
        and config["mask_token_id"] == MASK
        and config["eos_token_id"] == [48, 49]
    )
    assert config["bd_size" if kind == "Fast_dLLM_Qwen" else "block_size"] == 4
    options = {"sub_block": 4} if sampler == "fast_dllm" else {}
    assert text(out, sampler, **options) == text(home, sampler, **options)


def test_our_own_network_comes_back_as_it_was(tmp_path):
    home = own_run(tmp_path / "run")
    out = exported(home, tmp_path / "out", "--base_model=owner/repo")
    (before, meta), (after, again) = text(home, "ancestral", seed=3), text(out, "ancestral", seed=3)
    assert before == after and meta == again
    readme = (out / "README.md").read_text(encoding="utf-8")
    head = readme.split("---\n")[1].splitlines()
    assert (
        "license: mit" in head
        and "base_model: owner/repo" in head
        and "pipeline_tag: text-generation" in head
    )
    assert "| 4 | 1.5000 |" in readme and "after 7 steps" in readme
    assert not [
        file.name for file in out.iterdir() if file.suffix not in (".json", ".safetensors", ".md", ".py")
    ]


def test_transformers_computes_what_our_network_does(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    home = own_run(tmp_path / "run")
    out = exported(home, tmp_path / "out")
    network = transformers.AutoModel.from_pretrained(out, trust_remote_code=True).double()
    model = rebuild(str(home), CPU, plain=True)[3].double()
    ids = torch.randint(0, 10, (2, 16), generator=torch.Generator().manual_seed(0))
    clean, noisy = ids[:, :8], torch.where(ids[:, 8:] < 5, 10, ids[:, 8:])
    with torch.no_grad():
        for block_size, start in ((4, None), (1, None), (8, 8)):
            wanted = model(clean, noisy, block_size, 8)
            found = network(noisy, clean_ids=clean, block_size=block_size, start=start).logits
            assert (found - wanted).abs().max() < 1e-12
        assert (network(noisy).logits - model(None, noisy, 8)).abs().max() < 1e-12
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("abba\n")["input_ids"] == [0, 1, 1, 0, 9] and tokenizer.decode([0, 1, 1]) == "abb"


def test_what_cannot_be_exported_ends_in_two_lines(tmp_path, slip):
    home = own_run(tmp_path / "run")
    assert "is no folder" in slip(export.main, argv=[f"--ckpt={home}"])
    assert "there already" in slip(export.main, argv=[f"--ckpt={home}", f"--to={tmp_path}"])
    assert "float16" in slip(
        export.main, argv=[f"--ckpt={home}", f"--to={tmp_path / 'x'}", "--dtype=float16"]
    )
    out = exported(home, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    for change in (
        {"network": None},
        {"network": {**config["network"], "n_layers": 10**9}},
        {"nanoblock": {}},
    ):
        (out / "config.json").write_text(json.dumps({**config, **change}))
        assert "damaged" in slip(checkpoint.load, out)
    (out / "config.json").write_text(json.dumps(config))
    (out / "model.safetensors").write_bytes(b"no")
    assert "damaged" in slip(checkpoint.load, out)


def test_the_code_of_a_folder_is_not_run(tmp_path):
    out = exported(own_run(tmp_path / "run"), tmp_path / "out")
    for name in ("modeling_nanoblock.py", "nanoblock_model.py"):
        (out / name).write_text("raise SystemExit('it ran')", encoding="utf-8")
    rebuild(str(out), CPU)


# ----- for benchmarks


def scored_network():
    torch.manual_seed(1)
    model = Transformer(ModelConfig(6, 8, n_layers=1, n_heads=2, d_model=8)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.6)
    return model, Masked(6, 5)


def test_scores_at_block_size_1_are_exact():
    """Of all answers of two tokens: exp of their scores sums to 1, with a question and without."""
    model, process = scored_network()
    for question in ([], [3, 1, 4]):
        answers = [(question, [i, j]) for i in range(5) for j in range(5)]
        found = evaluate.scores(model, process, answers, 1)
        assert abs(found.exp().sum().item() - 1) < 1e-12
        assert found.std() > 0.1


def test_a_draw_of_a_bound_is_the_networks_word_over_t():
    """
    Of an answer of one token at the start of a block of four: its mask is drawn with probability t and weighs 1/t.
    What stands behind it is masked, always.
    """
    model, process = scored_network()
    with torch.no_grad():
        logits = process.loo_logits(model(torch.tensor([[3, 1, 4, 0]]), torch.full((1, 4), 5), 4, start=4))
    nats = -logits.log_softmax(-1)[0, 0, 2].item()
    weights = []
    for seed in range(40):
        t = torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
        found = evaluate.scores(model, process, [([3, 1, 4, 0], [2])], 4, n_mc=1, seed=seed).item()
        assert found == 0 or abs(-found * t - nats) < 1e-6, "t in float32"
        weights.append(-found / nats)
    assert 8 < sum(w > 0 for w in weights) < 32


def test_a_question_that_is_too_long_loses_its_beginning():
    assert evaluate.fitted([1, 2, 3], [4, 5], 4) == ([2, 3, 4, 5], 2)
    assert evaluate.fitted([1], [4, 5], 2) == ([4, 5], 0)
    with pytest.raises(ValueError, match="an answer of 2 tokens"):
        evaluate.fitted([], [4, 5], 1)


def test_the_harness_asks_and_is_answered(tmp_path):
    """The adapter on a stand-in for its class LM: the spaces between, the stops, and where they cut."""
    _, meta, _, model, process = rebuild(str(own_run(tmp_path / "run")), CPU)
    from data.tokens import Tokenizer

    tokenizer, request = Tokenizer(meta, tmp_path), lambda *args: type("Request", (), {"args": args})()
    how = {"block_size": 1, "sampler": SAMPLERS["ar"], "temperature": 0.0, "max_new_tokens": 6}
    network = evaluate.adapter(object, model, process, tokenizer, 1, 4, 0, how)
    (score, _), (other, _) = network.loglikelihood([request("ab", "cd"), request("ab", "ce")])
    assert score != other and score < 0
    rolled = network.loglikelihood_rolling([request("abcd")])[0]
    wanted = evaluate.scores(model, process, [(tokenizer.prompt("")[:1], tokenizer.encode("abcd"))], 1).item()
    assert rolled == wanted
    (whole,) = network.generate_until([request("abc", {"until": []})])
    (cut,) = network.generate_until([request("abc", {"until": [whole[2]]})])
    assert cut == whole[: whole.index(whole[2])]


def test_the_harness_itself(tmp_path, monkeypatch, capsys):
    """A task of ours in its own words: how many answers are right is what the scores say."""
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    monkeypatch.chdir(tmp_path)
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    asked = [(q, ["ab", "ca", "ihg"], i % 3) for i, q in enumerate(["abc", "ddc", "fa", "ghia", "b", "cc"])]
    lines = [json.dumps({"q": q, "choices": choices, "gold": gold}) for q, choices, gold in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/letters.yaml").write_text(
        f"""
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "asked.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    own_run(tmp_path / "run")
    run(
        evaluate.main, "--ckpt=run", "--device=cpu", "--tasks=letters", "--include=tasks", "--json=found.json"
    )
    assert "log-likelihoods are exact, block size 1" in capsys.readouterr().out
    _, meta, _, model, process = rebuild("run", CPU)
    from data.tokens import Tokenizer

    encode, right = Tokenizer(meta, tmp_path).encode, 0
    for q, choices, gold in asked:
        pairs = [(list(encode(q)), list(encode(answer))) for answer in choices]
        right += int(evaluate.scores(model, process, pairs, 1).argmax()) == gold
    found = json.loads((tmp_path / "found.json").read_text())["letters"]["acc,none"]
    assert abs(found - right / len(asked)) < 1e-12


def test_without_the_harness_two_lines_say_what_to_install(slip, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm_eval" in slip(evaluate.main, argv=["--tasks=arc_easy"])
