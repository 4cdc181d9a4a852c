"""
Block-diffusion models of others: what hub/llama.py reads, against transformers, and samplers/released.py
against the published loops, written out plainly.

    python -m tests.test_hub_in        writes tests/golden/llama/blocks.npz anew, with transformers
"""

import dataclasses
import http.server
import importlib.util
import json
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, resumed, run
from test_llama import folder, golden

import sample
import train
from diffusion import Masked
from generate import SAMPLERS, generate
from hub import llama
from hub.published import published
from methods import sequential
from methods.llama import Llama, Settings
from methods.shifted import Shifted
from model import ModelConfig
from run.restore import rebuild

GOLDEN = ROOT / "tests/golden/llama/blocks.npz"
CPU = torch.device("cpu")
LAYERS = {"sdar": "qwen3", "a2d-qwen3": "qwen3", "Fast_dLLM_Qwen": "qwen2", "a2d-llama": "llama_untied"}
MASK, BLOCK, T = 47, 4, 12  # of the golden networks, which have 50 ids or more
V = 64  # of the networks that write: their mask is id 61


def write(home, kind, **changes):
    """A folder of a released model: golden weights under another name. Their mask is id 47."""
    folder(home, LAYERS.get(kind, kind))
    config = json.loads((home / "config.json").read_text())
    config |= {"model_type": kind, "mask_token_id": MASK, "block_size": BLOCK, "bd_size": BLOCK}
    config |= {"max_position_embeddings": 30, **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (home / "config.json").write_text(json.dumps(config))
    return home


def block_mask(n):
    """Who reads whom in one stream, (n, n) bool: all blocks before, and the own block both ways."""
    block = torch.arange(n) // BLOCK
    return block[None] <= block[:, None]


# ----- logits


def transformers_network(config, weights=None):
    """A network of transformers in float64, block-causal by the mask it is given."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    layers = llama.RELEASED.get(config["model_type"], (config["model_type"],))[0]
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[layers]
    plain = {
        k: v for k, v in config.items() if k not in ("model_type", "block_size", "bd_size", "mask_token_id")
    }
    made = getattr(transformers, f"{kind}Config")(**plain, attn_implementation="eager")
    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}ForCausalLM")(made).double().eval()
    if weights is not None:
        network.load_state_dict({k: torch.tensor(v).double() for k, v in weights.items()}, strict=False)
    return network


def their_logits(network, ids):
    """Logits and last hidden vectors of a block-causal stream, (B, n, V) and (B, n, D)."""
    mask = torch.zeros(1, 1, ids.size(1), ids.size(1), dtype=torch.float64)
    mask = mask.masked_fill(~block_mask(ids.size(1)), -torch.inf)
    with torch.no_grad():
        out = network(
            ids, attention_mask=mask, position_ids=torch.arange(ids.size(1))[None], output_hidden_states=True
        )
    return out.logits, out.hidden_states[-1]


def our_logits(model, ids):
    """{way: logits (B, n, V)} of the last block of ids, made in several ways."""
    first = ids.size(1) - BLOCK
    clean, noisy = ids[:, :first], ids[:, first:]
    ways = {"uncached": model(clean, noisy, BLOCK, first)}
    for pieces in ([first], [BLOCK] * (first // BLOCK)):
        cache = model.new_cache(len(ids), ids.size(1))
        for at, piece in zip(np.cumsum([0, *pieces]), clean.split(pieces, dim=1), strict=False):
            model(piece, noisy, BLOCK, int(at) + piece.size(1), cache=cache)
        ways[f"cached by {pieces}"] = model(clean[:, :0], noisy, BLOCK, first, cache=cache)
    return ways


def compare(model, ids, logits, vectors=None):
    """Ours against theirs: the clean stream whole, and the last block in every way."""
    model = model.double()
    with torch.no_grad():
        h, _ = model.hidden(ids, None, BLOCK)
        assert (model.to_logits(h) - logits).abs().max() < 1e-5
        if vectors is not None:
            assert (model.norm(h) - vectors).abs().max() < 1e-5
        shift = isinstance(model, Shifted)
        wanted = logits[:, -BLOCK - shift : ids.size(1) - shift]
        for way, found in our_logits(model, ids).items():
            assert (found - wanted).abs().max() < 1e-5, way


@pytest.mark.parametrize("kind", LAYERS)
def test_logits_are_those_of_transformers(tmp_path, kind):
    """Of vectors that were written with transformers: prefill, block at work, with a cache and without."""
    file = np.load(GOLDEN)
    _, _, _, model, process = rebuild(str(write(tmp_path / "hub", kind)), CPU)
    assert type(model) is (Shifted if kind == "Fast_dLLM_Qwen" else Llama)
    assert not model.cfg.clean_causal and process.mask_id == MASK
    compare(model, torch.tensor(file["ids"]).long(), torch.tensor(file[LAYERS[kind]]))


SHAPES = {
    "sdar": {"head_dim": 12, "tie_word_embeddings": True},
    "a2d-qwen3": {"head_dim": 6, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    "Fast_dLLM_Qwen": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "a2d-llama": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "rope_theta": 10000.0,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_logits_of_fresh_networks_are_those_of_transformers(tmp_path, kind):
    """Other shapes: heads of another width, tied heads, one head of keys, stretched positions. Hidden vectors too."""
    config = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "model_type": kind, "mask_token_id": 38, "block_size": BLOCK, "bd_size": BLOCK, "eos_token_id": 39,
    } | SHAPES[kind]  # fmt: skip
    network = transformers_network(config)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    network.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, **config}))
    _, _, _, model, _ = rebuild(str(tmp_path), CPU)
    ids = torch.randint(0, 38, (2, T), generator=torch.Generator().manual_seed(1))
    ids[:, -3:] = 38
    compare(model, ids, *their_logits(network.float().double(), ids))


def test_a_token_causal_release_is_an_ordinary_language_model(tmp_path):
    """SDLM and I-DLM at block size 1: logits of their causal mode are transformers' (the vectors of test_llama)."""
    causal = {"causal_attn": True}
    for kind, layers, changes in (("qwen2", "qwen2", causal), ("sdar", "qwen3", {"block_size": 2})):
        home = write(tmp_path / layers, kind, **changes)
        run, meta, _, model, process = rebuild(str(home), CPU)
        *_, file = golden(layers)
        ids, model = torch.tensor(file["ids"]).long(), model.double()
        assert run.block_sizes == {1: 1.0} and model.cfg.next_token and process.mask_id == MASK
        with torch.no_grad():
            found = model.to_logits(model.hidden(ids, None, 1)[0])
        assert (
            found.shape == file["logits"].shape and (found - torch.tensor(file["logits"])).abs().max() < 1e-5
        )


# ----- the published loops, one row, everything computed again at each pass


def network_of(shifted, seed=0):
    torch.manual_seed(seed)
    cfg = ModelConfig(V, 64, n_layers=2, n_heads=4, d_model=24, clean_causal=False)
    return varied((Shifted if shifted else Llama)(cfg, Settings(n_kv_heads=2)))


def varied(model):
    """A small network in float64 with random weights. Its answers are varied: some sure, some not."""
    model = model.double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.head.weight.data *= 1.5
    for layer in model.layers:  # what stands beside a token matters
        layer.v.weight.data *= 3
    return model


@torch.no_grad()
def one_stream(model, x, b):
    """log p (n, V) of a block-causal stream, masks and text alike: the forward of the published code."""
    logits = model.to_logits(model.hidden(torch.tensor([x]), None, b)[0])[0]
    logits[:, 61] = -torch.inf  # the one thing we add: the mask is never an answer
    return logits.log_softmax(-1)


def whole_blocks(x, n_new, b):
    return x + [61] * (-(-(len(x) + n_new) // b) * b - len(x))


def plain_sdar(model, prompt, n_new, b, steps, rule, threshold):
    x = whole_blocks(prompt, n_new, b)
    counts = [b // steps + (k < b % steps) for k in range(steps)]
    for first in range(len(prompt) // b * b, len(x), b):
        for k in range(steps + 1):
            masks = [i for i in range(first, first + b) if x[i] == 61]
            if not masks:
                break
            p, y = one_stream(model, x[: first + b], b).exp().max(-1)
            surest = sorted(masks, key=lambda i: -p[i])  # noqa: B023
            if rule == "sequential":
                chosen = masks[: counts[k]]
            else:
                chosen = surest[: counts[k]]
                above = [i for i in masks if p[i] > threshold]
                if rule == "dynamic" and len(above) >= counts[k]:
                    chosen = above
            for i in chosen:
                x[i] = int(y[i])
    return x[: len(prompt) + n_new]


def plain_a2d(model, prompt, n_new, b, steps):
    x = whole_blocks(prompt, n_new, b)
    for first in range(len(prompt) // b * b, len(x), b):
        n, counts = x[first : first + b].count(61), []
        for s in range(steps, 0, -1):
            counts.append(min(n, round(n / s)))
            n -= counts[-1]
        for count in filter(None, counts):
            p, y = one_stream(model, x[: first + b], b).exp().max(-1)
            masks = [i for i in range(first, first + b) if x[i] == 61]
            for i in sorted(masks, key=lambda i: -p[i])[:count]:  # noqa: B023
                x[i] = int(y[i])
    return x[: len(prompt) + n_new]


def plain_fast_dllm(model, prompt, n_new, b, small, threshold):
    """Logits stand one to the right; a block's first token comes of the pass that ends the block before."""
    x, end = list(prompt), len(prompt) + n_new
    while len(x) < end:
        if len(x) % b == 0 and x:
            x.append(int(one_stream(model, x, b)[-1].argmax()))
        x += [61] * (-len(x) % b or (b if not x else 0))
        first = len(x) - b
        for at in range(first, len(x), small):
            while 61 in x[at : at + small]:
                logp = one_stream(model, x, b)[first:]
                logp = torch.cat((logp[:1], logp[:-1]))
                p, y = logp.exp().max(-1)
                masks = [i for i in range(at, at + small) if x[i] == 61]
                surest = max(masks, key=lambda i: p[i - first])  # noqa: B023
                for i in masks:
                    if p[i - first] > threshold or i == surest:
                        x[i] = int(y[i - first])
    return x[:end]


@torch.no_grad()
def window(model, x, b):
    """log p (b, V) of the next b tokens behind x: one stream, of x, its last token again, and masks."""
    n, C = len(x) + b, len(x)
    position = torch.tensor([*range(C), *range(C - 1, C - 1 + b)])
    sees = torch.arange(n) <= torch.arange(n)[:, None]
    sees[C:, C:], sees[C:, C - 1] = True, False
    h = model.embed(torch.tensor([[*x, x[-1], *[61] * (b - 1)]]))
    for layer in model.layers:
        h = layer(h, model.rope(position), sees[None, None])
    logits = model.to_logits(h)[0, C:]
    logits[:, 61] = -torch.inf
    return logits.log_softmax(-1)


def plain_sdlm(model, prompt, n_new, b, threshold):
    x, passes = list(prompt), 0
    while len(x) < len(prompt) + n_new:
        p, y = window(model, x, b).exp().max(-1)
        m = next((j for j in range(b) if p[j] <= threshold), b)
        x, passes = x + y[: max(m, 1)].tolist(), passes + 1
    return x[: len(prompt) + n_new], passes


def sequential_network():
    model = network_of(False)
    cfg = dataclasses.replace(model.cfg, clean_causal=True)
    twin = sequential.network(cfg, model.settings).double().eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 1.0])
def test_sdlm_is_the_published_loop(threshold):
    """Ragged prompts; as many passes as the slowest row of a batch; block size 1 is the language model."""
    model, prompts, seen = sequential_network(), [[3], [5, 9, 2, 2, 7], [1, 4, 4, 8]], set()
    assert model.cfg.rope_base == Settings().rope_base
    for b in (2, 4):
        plain = [plain_sdlm(model, p, 12, b, threshold) for p in prompts]
        how = {"block_size": b, "sampler": SAMPLERS["sdlm"], "temperature": 0.0, "threshold": threshold}
        for state in generate(model, Masked(V, 61), prompts, max_new_tokens=12, **how):
            pass
        assert [[i for i in row if i >= 0] for row in state.x.tolist()] == [x for x, _ in plain]
        more = [ours - passes for ours, (_, passes) in zip(state.nfe_rows.tolist(), plain, strict=True)]
        assert set(more) <= set(range(b)), "the last block is filled, and its surplus cut off"
        seen |= {passes for _, passes in plain}
    assert threshold in (0.0, 1.0) or len(seen) > 2
    how = {"block_size": 4, "sampler": SAMPLERS["sdlm"], "temperature": 0.0, "threshold": 1.0}
    for state in generate(model, Masked(V, 61), [[5, 9, 2, 2]], max_new_tokens=8, **how):
        pass
    assert state.nfe == 8 and state.token_forwards == 4 + 7 * 1 + 8 * 4, "each token of text once, and masks"
    with torch.no_grad():
        x = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
        ar = model(x, torch.full((2, 8), 61), 1, 1)
        assert (ar - model.to_logits(model.hidden(x, None, 1)[0])[:, :8]).abs().max() < 1e-10
        for p in (1, 4, 9):
            found = model(x[:, :p], torch.full((2, 4), 61), 4, p, window=True)[0]
            found[:, 61] = -torch.inf
            assert (found.log_softmax(-1) - window(model, x[0, :p].tolist(), 4))[:, :61].abs().max() < 1e-10


@pytest.mark.parametrize("how", [{"temperature": 1e-3}, {"top_p": 1e-6}])
def test_sdlm_is_sure_of_the_surest_token_where_it_is_alone(how):
    """Sharpened to one token it writes the greedy text, and is as sure of it as it can be."""
    model, prompts = sequential_network(), [[3], [5, 9, 2, 2, 7]]

    def write(**how):
        how |= {"block_size": 4, "sampler": SAMPLERS["sdlm"]}
        for state in generate(model, Masked(V, 61), prompts, max_new_tokens=12, **how):
            pass
        return state

    greedy, sharp = write(temperature=0.0, threshold=0.0), write(threshold=0.9, **how)
    assert torch.equal(sharp.x, greedy.x) and sharp.nfe == greedy.nfe < write(threshold=0.9).nfe


def test_a_sequential_block_knows_nothing_of_its_answer():
    """A later clean token changes nothing in a block; the last one before it, and its own others, do."""
    model = sequential_network()
    clean, noisy = torch.randint(0, 61, (2, 2, 16), generator=torch.Generator().manual_seed(1))
    noisy[:, ::2] = 61
    with torch.no_grad():
        logits = model(clean, noisy, 4)
        for at in range(16):
            other, mixed = clean.clone(), noisy.clone()
            other[:, at], mixed[:, at] = (other[:, at] + 1) % 61, 7
            changed = (model(other, noisy, 4) - logits).abs().amax((0, 2)) > 1e-9
            assert changed.tolist() == [i // 4 * 4 > at for i in range(16)]
            own = (model(clean, mixed, 4) - logits).abs().amax((0, 2)) > 1e-9
            assert own.tolist() == [i // 4 == at // 4 and at % 4 < 3 for i in range(16)]
        sizes = torch.tensor([1, 4])
        both = model(clean, noisy, sizes)
        assert (both[1] - logits[1]).abs().max() < 1e-12
        assert (both[0] - model(clean, noisy, 1)[0]).abs().max() < 1e-12


def test_a_sequential_network_is_trained_and_read(project, tmp_path, capsys, slip):
    """By its method's name; and SDLM's folder, a Qwen2 with a mask and blocks, comes as one."""
    flags = [*TINY, "--dataset=toy", "--method=sequential", "--seq_len=16", "--block_sizes=1:0.25,4:0.75"]
    resumed(train.main, *flags, "--qkv_bias", "--dtype=float32")
    texts = []
    for more in (["--sampler=sdlm", "--threshold=1"], ["--sampler=ar"], ["--sampler=sdlm", "--threshold=0"]):
        capsys.readouterr()
        run(sample.main, "--ckpt=parts", "--device=cpu", "--prompt=abc", "--temperature=0", *more)
        texts.append(capsys.readouterr().out)
    assert "13 tokens" in texts[0] and "16 NFE" not in texts[2]
    assert "clean stream is token-causal" in slip(
        train.main, argv=[*flags[:-1], "--block_sizes=4:1", "--clean_causal=false"]
    )
    assert "sdlm is not defined" in slip(
        sample.main,
        argv=[f"--init_from={write(tmp_path / 'other', 'sdar')}", "--sampler=sdlm", "--prompt=1 2"],
    )
    home = write(tmp_path / "sdlm", "qwen2", mask_token_id=None, text_mask_token_id=MASK, block_size=4)
    setting, _, _, model, process = rebuild(str(home), CPU)
    assert type(model) is sequential.Sequential and setting.block_sizes == {1: 0.5, 4: 0.5}
    assert process.mask_id == MASK and model.cfg.clean_causal and setting.seq_len == 28
    file, model = golden("qwen2")[2], model.double()
    ids = torch.tensor(file["ids"]).long()
    with torch.no_grad():
        n = ids.size(1)
        found = model(ids, torch.full((len(ids), n - 1), MASK), 1, 1)
    assert (found - torch.tensor(file["logits"])[:, :-1]).abs().max() < 1e-5, "its AR mode is transformers'"


def ours(model, prompts, n_new, b, name, steps=None, **options):
    how = {"block_size": b, "sampler": SAMPLERS[name], "steps": steps, "temperature": 0.0, "trained": [b]}
    for use_cache in (True, False):
        for state in generate(
            model, Masked(V, 61), prompts, max_new_tokens=n_new, use_cache=use_cache, **how, **options
        ):
            pass
        rows = [[i for i in row if i >= 0] for row in state.x.tolist()]
        yield rows, state.nfe_rows.tolist()


# shorter than a block, ragged, whole blocks; a batch whose rows begin their blocks at different places
PROMPTS = [
    torch.randint(0, 61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 13, 16)
]


@pytest.mark.parametrize("rule", ["dynamic", "static", "sequential"])
def test_sdar_is_the_published_loop(rule):
    model = network_of(False)
    for b, steps in ((4, 4), (8, 3)):
        wanted = [plain_sdar(model, p, 10, b, steps, rule, 0.05) for p in PROMPTS]
        for found, _ in ours(model, PROMPTS, 10, b, "sdar", steps, rule=rule, threshold=0.05):
            assert found == wanted


def test_a2d_is_the_published_loop():
    model = network_of(False)
    for steps in (8, 5, 3):
        wanted = [plain_a2d(model, p, 10, 8, steps) for p in PROMPTS]
        for found, _ in ours(model, PROMPTS, 10, 8, "a2d", steps):
            assert found == wanted


def test_a2d_commits_halves_to_even():
    """Of 8 masks in 3 steps: 8 / 3 is 3, 5 / 2 is 2, and the last 3. Text alone need not show it."""
    how = {"block_size": 8, "sampler": SAMPLERS["a2d"], "steps": 3, "temperature": 0.0, "max_new_tokens": 8}
    states = generate(network_of(False), Masked(V, 61), [[]], **how)
    left = [(state.x == 61).sum().item() for state in states if not state.finished]
    assert left == [8, 5, 3], left


@pytest.mark.parametrize("sub_block", [2, 8])
def test_fast_dllm_is_the_published_loop(sub_block):
    model = network_of(True)
    wanted = [plain_fast_dllm(model, p, 17, 8, sub_block, 0.4) for p in PROMPTS]
    assert len({i for row in wanted for i in row}) > 20, "varied text"
    for found, _ in ours(model, PROMPTS, 17, 8, "fast_dllm", sub_block=sub_block, threshold=0.4):
        assert found == wanted


def test_a_shifted_network_learns_its_next_token_and_nothing_leaks():
    """The loss of a noisy token reads nothing of its own block's clean text, nor of later text."""
    model = network_of(True)
    x = torch.randint(0, 61, (1, 16), generator=torch.Generator().manual_seed(0))
    noisy = torch.full_like(x, 61)
    with torch.no_grad():
        before = model(x, noisy, 4)
        for at in (0, 5, 11):
            changed = x.clone()
            changed[:, at] = (changed[:, at] + 1) % 61
            moved = (model(changed, noisy, 4) - before).abs().amax(-1)[0] > 1e-9
            first = at // 4 * 4 + 4
            assert not moved[:first].any() and moved[first : first + 4].all()


# ----- files


def test_what_is_read_of_a_folder(tmp_path):
    home = write(tmp_path / "SDAR-tiny-b16", "sdar", eos_token_id=3)
    config = json.loads((home / "config.json").read_text())
    (home / "generation_config.json").write_text(json.dumps({"eos_token_id": [48, 49]}))
    state = llama.llama(home)
    assert state["config"]["block_sizes"] == {16: 1.0}, "the suffix of the name"
    assert state["network"]["seq_len"] == 16, "a context of whole blocks, of 30"
    assert state["meta"] == {"tokenizer": "none", "eos_id": 48, "eos_ids": [48, 49], "vocab_size": 67}
    del config["mask_token_id"]
    (home / "config.json").write_text(json.dumps(config))
    (home / "added_tokens.json").write_text(json.dumps({"<think>": 59, "<|MASK|>": 60}))
    assert llama.llama(home)["process"]["arguments"] == {"vocab_size": 67, "mask_id": 60}


def test_a_text_ends_at_any_of_several_ids():
    model, b = network_of(False), 4
    how = {"block_size": b, "sampler": SAMPLERS["sdar"], "temperature": 0.0, "max_new_tokens": 14}
    whole = next(ours(model, PROMPTS[:1], 14, b, "sdar"))[0][0]
    new = whole[3:]
    at = next(i for i in range(2, len(new)) if new[i] not in new[:i])
    later = next(i for i in new[at + 1 :] if i not in new[: at + 1])
    for state in generate(model, Masked(V, 61), PROMPTS[:1], eos_id=[later, new[at]], **how):
        pass
    assert [i for i in state.x[0].tolist() if i >= 0] == whole[: 3 + at + 1]


def test_bfloat16_stays_and_text_is_written(tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file

    home = write(tmp_path / "hub", "sdar")
    path = home / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path)
    model = rebuild(str(home), CPU)[3]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long), 4).dtype
        == torch.float32
    )
    flags = [f"--init_from={home}", "--device=cpu", "--sampler=sdar", "--max_new_tokens=9", "--prompt=1 2 3"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
    sample.main()
    assert "9 tokens" in capsys.readouterr().out


def test_there_is_no_ar_mode(tmp_path, slip):
    """Of a block-causal clean stream, whose cache would be another: samplers that need it refuse."""
    home = write(tmp_path / "hub", "sdar")
    for flags in (
        ["--sampler=ar"],
        ["--block_size=1"],
        ["--ar_tokens=4"],
        ["--sampler=arpc"],
        ["--sampler=speculation"],
    ):
        argv = [f"--init_from={home}", "--device=cpu", "--max_new_tokens=8", *flags]
        assert "trained on block sizes 4, not 1" in (e := slip(sample.main, argv=argv)) or "AR mode" in e


def test_folders_that_are_wrong_end_in_two_lines(tmp_path, slip):
    config = json.loads((write(tmp_path / "hub", "sdar") / "config.json").read_text())
    path = tmp_path / "hub/config.json"
    for change, words in (
        ({"mask_token_id": 67}, "none of its 67 ids"),
        ({"mask_token_id": "47"}, "no mask: '47'"),
        ({"block_size": 0}, "not a block size"),
        ({"block_size": 10**9}, "not a block size"),
        ({"eos_token_id": [1, 99]}, "eos_token_id 99"),
        ({"num_hidden_layers": 10**9}, "1,000,000,000 layers"),
        ({"hidden_size": 10**12, "head_dim": 8}, "not (67, 1000000000000)"),
        ({"intermediate_size": 10**30}, "the shape it says"),
        ({"max_position_embeddings": 2}, "no block of 4"),
        ({"num_key_value_heads": 3}, "4 heads of 16, 3 of keys"),
        ({"head_dim": 15}, "4 heads of 15"),
        ({"hidden_size": float("inf")}, "cannot be read as a qwen3"),
        ({"rope_parameters": [1]}, "cannot be read as a qwen3"),
        ({"model_type": "a2d-qwen3", "vocab_size": "x"}, "cannot be read as a qwen3"),
    ):
        path.write_text(json.dumps({**config, **change}))
        assert words in slip(llama.llama, tmp_path / "hub"), change
    path.write_text(json.dumps(config))
    (tmp_path / "hub/generation_config.json").write_text("[")
    assert "generation_config.json" in slip(llama.llama, tmp_path / "hub")
    (tmp_path / "hub/generation_config.json").unlink()
    (tmp_path / "hub/tokenizer.json").write_text('{"added_tokens": [{}]}')
    assert "KeyError" in slip(llama.llama, tmp_path / "hub")
    (tmp_path / "hub/tokenizer.json").unlink()
    weights = (tmp_path / "hub/model.safetensors").read_bytes()
    for damaged in (weights[:-100], b"\xff" * 8 + weights[8:], b"", b"PK\x03\x04 and a pickle"):
        (tmp_path / "hub/model.safetensors").write_bytes(damaged)
        assert "no weights that can be read" in slip(llama.llama, tmp_path / "hub")
    a2d = write(tmp_path / "Qwen3-0.6B-diffusion-mdlm-v0.1", "a2d-qwen3")
    assert "full diffusion" in slip(llama.llama, a2d)


def test_a_missing_shard_is_named(tmp_path, slip):
    folder(tmp_path / "hub", "qwen3", shards=True)
    (tmp_path / "hub/model-1.safetensors").unlink()
    assert "model-1.safetensors not found, of 2" in slip(llama.llama, tmp_path / "hub")
    index = tmp_path / "hub/model.safetensors.index.json"
    for text in (
        '{"weight_map": {"a": "../../etc/passwd"}}',
        '{"weight_map": {}}',
        "{}",
        "[[[",
        '{"weight_map": 3}',
    ):
        index.write_text(text)
        assert "index.json" in slip(llama.llama, tmp_path / "hub")


# ----- a hub, on this machine


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that is served as OWNER/REPO of a hub."""
    root = tmp_path / "served"
    home = root / "owner/repo/resolve/main"
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NANOBLOCK_CACHE", str(tmp_path / "cache"))
    yield home
    server.shutdown()
    server.server_close()


def test_a_repository_is_downloaded_in_shards(hub, slip):
    folder(hub, "qwen3", shards=True)
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, "model_type": "sdar", "mask_token_id": MASK}))
    (hub / "generation_config.json").write_text(json.dumps({"eos_token_id": 48}))
    state = published("hf:owner/repo")
    assert state["meta"]["eos_id"] == 48 and state["config"]["block_sizes"] == {4: 1.0}
    near = llama.llama(hub)["model"]
    assert all(torch.equal(near[k], v) for k, v in state["model"].items())
    (hub / "model-0.safetensors").unlink()
    assert "model-0.safetensors" in slip(published, "hf:owner/repo")


def write_golden():
    ids = torch.randint(0, MASK, (2, T), generator=torch.Generator().manual_seed(0))
    ids[:, [-4, -2, -1]] = MASK
    found = {"ids": ids.numpy()}
    for layers in sorted(set(LAYERS.values())):
        config, weights, _ = golden(layers)
        logits, _ = their_logits(transformers_network(config, weights), ids)
        found[layers] = logits.float().numpy()
    np.savez_compressed(GOLDEN, **found)


if __name__ == "__main__" and importlib.util.find_spec("transformers"):
    write_golden()
