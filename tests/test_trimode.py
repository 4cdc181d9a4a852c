"""
Nemotron-Labs-Diffusion: methods/trimode.py against transformers' Ministral 3, and its two samplers against the
published loops, written out plainly.

    python -m tests.test_trimode        writes tests/golden/llama/nemotron.npz anew, with transformers
"""

import importlib.util
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, resumed, run
from safetensors.torch import load_file, save_file
from test_hub_in import varied

import eval as evaluate
import sample
import train
from diffusion import Masked, loglinear, token_loss
from generate import SAMPLERS, generate
from hub import export, llama
from methods import trimode
from methods.llama import Llama, Settings
from model import ModelConfig
from rng import Noise
from run.restore import rebuild

GOLDEN = ROOT / "tests/golden/llama/nemotron.npz"
CPU = torch.device("cpu")
MASK, V, AT = 61, 64, 13  # AT: where the golden block begins
ROPE = {
    "rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 6, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
}  # fmt: skip
CONFIG = {
    "model_type": "nemotron_labs_diffusion", "architectures": ["NemotronLabsDiffusionModel"], "vocab_size": V,
    "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 30, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "rope_parameters": ROPE, "mask_token_id": MASK, "block_size": 8,
    "dlm_paradigm": "bidirectional", "eos_token_id": 2,
}  # fmt: skip


def rule(n, first):
    """Who reads whom in one stream of n, (n, n) bool: token-causal text, and behind it a block, both ways."""
    sees = torch.arange(n)[None] <= torch.arange(n)[:, None]
    sees[first:, first:] = True
    return sees


# ----- transformers


def theirs(config, seed=0):
    """Ministral 3 of transformers, in float64."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    own = ("model_type", "architectures", "mask_token_id", "block_size", "dlm_paradigm")
    made = transformers.Ministral3Config(
        **{k: v for k, v in config.items() if k not in own}, pad_token_id=None, attn_implementation="eager"
    )
    torch.manual_seed(seed)
    network = transformers.Ministral3ForCausalLM(made).double().eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return network.float().double()  # what a file keeps


@torch.no_grad()
def their_logits(network, ids, sees):
    mask = torch.zeros(1, 1, *sees.shape, dtype=torch.float64).masked_fill(~sees, -torch.inf)
    at = torch.arange(ids.size(1))[None]
    out = network(ids, attention_mask=mask, position_ids=at, output_hidden_states=True)
    return out.logits, out.hidden_states[-1]


def write(home, config, weights):
    """A folder as the release has it: the names of its tensors."""
    home.mkdir(parents=True)
    (home / "config.json").write_text(json.dumps(config))
    named = lambda k: k.replace("model.", "encoder.", 1).replace("lm_head.", "diffusion_head.")
    save_file({named(k): v.float().contiguous() for k, v in weights.items()}, home / "model.safetensors")
    return home


def golden(home):
    """(folder of the golden network, the file)."""
    file = np.load(GOLDEN)
    weights = {k[2:]: torch.tensor(file[k]) for k in file.files if k[:2] == "w."}
    return write(home, json.loads(str(file["config"])), weights), file


def write_golden():
    network = theirs(CONFIG)
    ids = torch.randint(0, MASK, (2, AT + 8), generator=torch.Generator().manual_seed(0))
    ids[:, [-6, -5, -3, -1]] = MASK
    causal, _ = their_logits(network, ids, rule(ids.size(1), ids.size(1)))
    block, _ = their_logits(network, ids, rule(ids.size(1), AT))
    found = {
        "config": json.dumps(CONFIG),
        "ids": ids.numpy(),
        "causal": causal.numpy(),
        "block": block.numpy(),
    }
    weights = {f"w.{k}": v.float().numpy() for k, v in network.state_dict().items()}
    np.savez_compressed(GOLDEN, **found, **weights)


def compare(model, ids, causal, block, vectors=None):
    """Text by text, in pieces and whole, and the block at AT with a cache and without."""
    model, n = model.double(), ids.size(1)
    with torch.no_grad():
        h, _ = model.hidden(ids, None, 1)
        assert (model.to_logits(h) - causal).abs().max() < 1e-5
        if vectors is not None:
            assert (model.norm(h) - vectors).abs().max() < 1e-5
        pure = torch.full((2, n - 1), MASK)
        assert (model(ids, pure, 1, 1) - causal[:, :-1]).abs().max() < 1e-5, "block size 1"
        text, noisy = ids[:, :AT], ids[:, AT:]
        assert (model(text, noisy, None, AT) - block[:, AT:]).abs().max() < 1e-5
        for pieces in ([AT], [5, 1, 7]):
            cache, at = model.new_cache(2, n), 0
            for piece in text.split(pieces, dim=1):
                at += piece.size(1)
                said = model(piece, pure[:, : piece.size(1)], 1, at - piece.size(1) + 1, cache=cache)
                assert (said - causal[:, at - piece.size(1) : at]).abs().max() < 1e-5
            for _ in range(2):
                assert (model(None, noisy, None, AT, cache=cache) - block[:, AT:]).abs().max() < 1e-5


def test_logits_are_those_of_transformers(tmp_path):
    """Of vectors that were written with transformers: queries that grow, YaRN, an untied head."""
    home, file = golden(tmp_path / "hub")
    setting, meta, _, model, process = rebuild(str(home), CPU)
    assert type(model) is trimode.Trimode and process.mask_id == MASK and meta["eos_id"] == 2
    assert setting.block_sizes == {1: 0.5, 8: 0.5} and setting.seq_len == 24 and model.cfg.clean_causal
    ids, causal, block = (torch.tensor(file[k]) for k in ("ids", "causal", "block"))
    assert (causal[:, AT:] - block[:, AT:]).abs().max() > 0.1
    compare(model, ids.long(), causal, block)


SHAPES = (
    {"head_dim": 6, "num_key_value_heads": 1, "tie_word_embeddings": True},
    {"num_key_value_heads": 4, "rope_parameters": {**ROPE, "factor": 16.0, "llama_4_scaling_beta": 1.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "llama_4_scaling_beta": 0.5,
                         "original_max_position_embeddings": 4}},
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_fresh_networks_are_those_of_transformers(tmp_path, shape):
    """Hidden vectors too. Read as Ministral 3 itself, it is an ordinary language model."""
    config = CONFIG | shape
    network = theirs(config, seed=1)
    weights = {
        k: v
        for k, v in network.state_dict().items()
        if "lm_head" not in k or not config["tie_word_embeddings"]
    }
    ids = torch.randint(0, MASK, (2, AT + 8), generator=torch.Generator().manual_seed(1))
    ids[:, -3:] = MASK
    n = ids.size(1)
    causal, vectors = their_logits(network, ids, rule(n, n))
    model = rebuild(str(write(tmp_path / "hub", config, weights)), CPU)[3]
    compare(model, ids, causal, their_logits(network, ids, rule(n, AT))[0], vectors)
    plain = {k: v for k, v in config.items() if k not in ("mask_token_id", "block_size")} | {
        "model_type": "ministral3"
    }
    model = rebuild(str(write(tmp_path / "plain", plain, weights)), CPU)[3].double()
    assert type(model) is Llama and model.cfg.next_token
    with torch.no_grad():
        assert (model.to_logits(model.hidden(ids, None, 1)[0])[..., :V] - causal).abs().max() < 1e-5


# ----- the network


def small(seed=0, **settings):
    torch.manual_seed(seed)
    cfg = ModelConfig(V, 64, n_layers=2, n_heads=4, d_model=24)
    return varied(trimode.network(cfg, Settings(n_kv_heads=2, **settings)))


def test_a_block_reads_clean_text_before_it_and_itself():
    """A larger block: itself and the blocks before. Block size 1: all clean tokens before, and no noisy one."""
    model = small()
    clean, noisy = torch.randint(0, MASK, (2, 2, 16), generator=torch.Generator().manual_seed(1))
    noisy[:, ::2] = MASK
    sizes = torch.tensor([1, 4])
    with torch.no_grad():
        logits, alone = model(clean, noisy, sizes), model(clean, noisy, 4)
        assert (logits[1] - alone[1]).abs().max() < 1e-12 and (logits[0] - alone[0]).abs().max() > 0.1
        assert (logits[0, 1:] - model.to_logits(model.hidden(clean, None, 1)[0])[0, :-1]).abs().max() < 1e-10
        assert (logits[0, :1] - alone[0, :1]).abs().max() > 1e-6, "position 0 reads its own token alone"
        for at in range(16):
            other, mixed = clean.clone(), noisy.clone()
            other[:, at], mixed[:, at] = (other[:, at] + 1) % MASK, 7
            moved = (model(other, noisy, sizes) - logits).abs().amax(2) > 1e-9
            assert moved[0].tolist() == [i > at for i in range(16)]
            assert moved[1].tolist() == [i // 4 * 4 > at for i in range(16)]
            own = (model(clean, mixed, sizes) - logits).abs().amax(2) > 1e-9
            assert own[0].tolist() == [i == at == 0 for i in range(16)]
            assert own[1].tolist() == [i // 4 == at // 4 for i in range(16)]
            seen = (
                model(other, noisy[:, :3], None, 6) - model(clean, noisy[:, :3], None, 6)
            ).abs().max() > 1e-9
            assert seen == (at < 6), "a block that begins at 6"
        at = torch.tensor([1, 5, 6])
        some = model(clean, noisy[:, at], 1, at)
        assert (some - model(clean, noisy, 1)[:, at]).abs().max() < 1e-12
        with pytest.raises(ValueError, match="the clean token before"):
            model(clean[:, :3], noisy, 1)


def test_its_loss_at_block_size_1_is_the_next_token_loss():
    """And its gradient reaches the clean stream."""
    model, process = small().train(), Masked(V, MASK)
    x = torch.randint(0, MASK, (2, 16), generator=torch.Generator().manual_seed(2))
    sizes, t = torch.ones(2, dtype=torch.long), torch.tensor([0.4, 0.6], dtype=torch.float64)
    how = {"schedule": loglinear, "noise": Noise(0, torch.arange(2), torch.arange(16))}
    total, per_token = token_loss(model, process, x, sizes, t, "elbo", **how)
    first = model(None, torch.full((2, 1), MASK), None, 0)
    logits = torch.cat((first, model.to_logits(model.hidden(x, None, 1)[0])[:, :-1]), dim=1)
    logits = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)
    nll = -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]
    assert (per_token - nll).abs().max() < 1e-10
    nll.sum().backward()
    wanted = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    total.backward()
    scale = total.item() / nll.sum().item()  # a sum or a mean
    assert all((p.grad - scale * wanted[k]).abs().max() < 1e-9 for k, p in model.named_parameters())
    assert wanted["layers.0.q.weight"].abs().max() > 1e-3


# ----- the published loops, one row, everything computed again at each pass


@torch.no_grad()
def stream(model, x, first):
    """log p (n, V) of one stream: token-causal before `first`, both ways from there on."""
    n = len(x)
    h, rope = model.embed(torch.tensor([x])), model.rope(torch.arange(n))
    for layer in model.layers:
        h = layer(h, rope, rule(n, first)[None, None])
    logits = model.to_logits(h)[0]
    logits[:, MASK] = -torch.inf  # the one thing we add: the mask is never an answer
    return logits.log_softmax(-1)


def plain_generate(model, prompt, n_new, b, threshold):
    """`generate`: (text, passes over blocks). threshold None: one token a pass."""
    x, passes = list(prompt), 0
    for _ in range(-(-n_new // b)):
        first = len(x)
        x = x + [int(stream(model, x, first)[-1].argmax())] + [MASK] * (b - 1)
        while MASK in x:
            p, y = stream(model, x, first).exp().max(-1)
            masks = [i for i in range(first, first + b) if x[i] == MASK]
            surest = max(masks, key=lambda i: p[i])  # noqa: B023
            for i in masks:
                if i == surest or threshold is not None and p[i] >= threshold:
                    x[i] = int(y[i])
            passes += 1
    return x[: len(prompt) + n_new], passes


def plain_linear(model, prompt, n_new, b, threshold):
    """`linear_spec_generate`: (text, passes behind the prompt's)."""
    x, passes = list(prompt), 0
    x.append(int(stream(model, x, len(x))[-1].argmax()))
    while len(x) < len(prompt) + n_new:
        first = len(x) - 1
        block = [x[-1]] + [MASK] * (b - 1)
        while MASK in block:
            p, y = stream(model, x[:-1] + block, first)[first:].exp().max(-1)
            masks = [i for i in range(b) if block[i] == MASK]
            best = max(masks, key=lambda i: p[i])  # noqa: B023
            for i in masks:
                if threshold == 0 or p[i] >= threshold or i == best:
                    block[i] = int(y[i])
            passes += 1
        own = stream(model, x[:-1] + block, len(x) + b)[first:].argmax(-1).tolist()
        passes += 1
        m = next((j for j in range(b - 1) if own[j] != block[j + 1]), b - 1)
        x += own[: m + 1]
    return x[: len(prompt) + n_new], passes


PROMPTS = [
    torch.randint(0, MASK, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 13, 16, 6)
]


def ours(model, name, b, n_new, prompts=PROMPTS, **how):
    how = {"block_size": b, "sampler": SAMPLERS[name], "temperature": 0.0, "trained": [1, b], **how}
    for state in generate(model, Masked(V, MASK), prompts, max_new_tokens=n_new, **how):
        pass
    return [[i for i in row if i >= 0] for row in state.x.tolist()], state.nfe_rows.tolist()


def filled(prompt, n_new, b):
    """How many tokens are written behind a prompt: the last block is filled, and its surplus cut off."""
    return -(-(len(prompt) + n_new) // b) * b - len(prompt)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("threshold", [None, 0.15, 0.1, 0.0])
def test_nemotron_is_the_published_loop(threshold, beta):
    """Ragged prompts, in one batch; blocks that begin behind them, wherever that is. As many passes."""
    model, seen = small(rope_beta=beta, rope_original=10 if beta else 0), set()
    for b in (2, 8):
        texts, passes = ours(model, "nemotron", b, 16, threshold=2.0 if threshold is None else threshold)
        for prompt, text, mine in zip(PROMPTS, texts, passes, strict=True):
            n = filled(prompt, 16, b)
            wanted, of_blocks = plain_generate(model, prompt, n, b, threshold)
            assert text == wanted[: len(prompt) + 16]
            assert mine == of_blocks + -(-n // b), "and a causal pass a block"
            seen.add(of_blocks / n)
    assert threshold in (None, 0.0) or len(seen) > 3
    assert len({i for text in texts for i in text}) > 20, "varied text"


@pytest.mark.parametrize("threshold", [0.0, 0.15])
def test_linear_speculation_is_the_published_loop_and_ar(threshold):
    """Temperature 0: the published text and passes. Any temperature: the text of ar, token for token."""
    model = small(seed=3)
    for b in (2, 5, 8):
        texts, passes = ours(model, "linear_speculation", b, 15, threshold=threshold)
        for prompt, text, mine in zip(PROMPTS, texts, passes, strict=True):
            wanted, spent = plain_linear(model, prompt, filled(prompt, 15, b), b, threshold)
            assert text == wanted[: len(prompt) + 15] and mine == 1 + spent
        for temperature in (0.0, 0.7):
            how = {"temperature": temperature, "seed": 5, "top_p": 0.9}
            wanted, _ = ours(model, "ar", 1, 15, **how)
            assert ours(model, "linear_speculation", b, 15, threshold=threshold, **how)[0] == wanted
    assert len({i for row in wanted for i in row}) > 15


def test_good_drafts_stay():
    """A network whose noisy stream says what its clean stream says: every draft is right."""
    model = small()
    for layer in model.layers:  # nothing but the last token counts, and that is in the block
        layer.out.weight.data.zero_(), layer.down.weight.data.zero_()
    model.embed.weight.data[:] = model.embed.weight.data[7]  # all ids look the same
    for b, passes in ((4, 1 + 2 * 3), (8, 1 + 2 * 2)):
        texts, spent = ours(model, "linear_speculation", b, 13, prompts=[[3, 5, 2]])
        assert len(set(texts[0][3:])) == 1 and spent[0] == passes


def test_a_text_does_not_depend_on_its_batch_and_ends_at_eos():
    model = small()
    for name in ("nemotron", "linear_speculation"):
        how = {"temperature": 0.8, "seed": 4}
        texts, _ = ours(model, name, 4, 16, **how)
        assert texts == ours(model, name, 4, 16, **how)[0]
        alone = ours(model, name, 4, 16, prompts=PROMPTS[:1], **how)[0]
        assert alone == texts[:1]
        eos = texts[1][-8]
        ended, _ = ours(model, name, 4, 16, eos_id=eos, **how)
        for short, long, prompt in zip(ended, texts, PROMPTS, strict=True):
            new = long[len(prompt) :]
            assert short == prompt + (new[: new.index(eos) + 1] if eos in new else new)
        with pytest.raises(ValueError, match="use_cache"):
            ours(model, name, 4, 8, use_cache=False)


def test_nemotron_draws_from_its_own_law():
    """Three tokens of three, at temperature 1: chi-squared against the law, by going through all draws."""
    torch.manual_seed(0)
    cfg, n = ModelConfig(4, 8, n_layers=1, n_heads=1, d_model=4), 700
    model = trimode.network(cfg, Settings()).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)

    def says(x, first):
        logits = (
            model(torch.tensor([x[:first]]), torch.tensor([x[first:]]), None, first)[0] if x[first:] else None
        )
        if logits is None:
            logits = model(torch.tensor([x]), torch.tensor([[3]]), 1, first)[0]
        return logits[:, :3].softmax(-1).tolist()

    law = dict.fromkeys(itertools.product(range(3), repeat=3), 0.0)
    with torch.no_grad():
        for a, p_a in enumerate(says([1], 1)[0]):
            _, p_b, p_c = says([1, a, 3, 3], 1)
            for b, c in itertools.product(range(3), repeat=2):
                p = p_a * p_b[b] * p_c[c]
                if max(p_b[b], p_c[c]) >= 0.4 <= min(p_b[b], p_c[c]):
                    law[a, b, c] += p
                elif p_b[b] >= p_c[c]:
                    for z, p_z in enumerate(says([1, a, b, 3], 1)[2]):
                        law[a, b, z] += p * p_z
                else:
                    for z, p_z in enumerate(says([1, a, 3, c], 1)[1]):
                        law[a, z, c] += p * p_z
    assert abs(sum(law.values()) - 1) < 1e-9 and min(law.values()) * n > 3
    how = {"block_size": 3, "sampler": SAMPLERS["nemotron"], "threshold": 0.4, "max_new_tokens": 3}
    for state in generate(model, Masked(4, 3), [[1]] * n, seed=2, **how):
        pass
    found = Counter(tuple(row[1:4]) for row in state.x.tolist())
    chi2 = sum((found[x] - n * p) ** 2 / (n * p) for x, p in law.items())
    assert chi2 < 72.6  # 26 degrees of freedom: exceeded once in 360,000 times


# ----- commands and files


def test_it_is_trained_resumed_sampled_and_measured(project, tmp_path, capsys, slip):
    flags = [*TINY, "--dataset=toy", "--method=trimode", "--seq_len=16", "--block_sizes=1:0.5,4:0.5"]
    resumed(train.main, *flags, "--dtype=float32")
    how = ["--ckpt=parts", "--device=cpu"]
    texts = []
    for more in (
        ["--sampler=ar"],
        ["--sampler=linear_speculation"],
        ["--sampler=nemotron", "--threshold=2"],
        ["--sampler=arpc", "--block_size=4", "--steps=2"],
    ):
        capsys.readouterr()
        run(sample.main, *how, "--prompt=abc", *more)
        texts.append(capsys.readouterr().out)
    assert all("13 tokens" in text for text in texts)
    capsys.readouterr()
    run(evaluate.main, *how, "--n_eval=4", "--n_mc=2")
    assert "masked (trimode)" in capsys.readouterr().out
    for refused, fix in (
        (["--clean_causal=false", "--block_sizes=4:1"], "leave --clean_causal out"),
        (["--next_token", "--block_sizes=1:1"], "leave --next_token out"),
        (["--block_sizes=4:1", "--rope_beta=0.5"], "--rope_original="),
    ):
        assert fix in slip(train.main, argv=[*flags[:-1], *refused])
    for other, words in (
        ("4:1", "not 4"),
        ("1:0.5,2:0.25,4:0.25", "not 1, 2, 4"),
        ("4:0.5,8:0.5", "not 4, 8"),
        ("uniform", "masks alone"),
    ):
        change = ["--process=uniform"] if other == "uniform" else [f"--block_sizes={other}"]
        run(train.main, *flags, *change, "--dtype=float32", "--max_steps=1", "--out_dir=odd")
        assert words in slip(export.main, argv=["--ckpt=odd", f"--to={tmp_path / 'odd_out'}"])
        shutil.rmtree("odd")
    other = write(
        tmp_path / "other",
        {k: v for k, v in CONFIG.items() if k != "mask_token_id"} | {"model_type": "ministral3"},
        theirs_or_ours(),
    )
    assert "--method trimode" in slip(
        sample.main,
        argv=[
            f"--init_from={other}",
            "--sampler=linear_speculation",
            "--block_size=4",
            "--prompt=1 2",
            "--max_new_tokens=6",
        ],
    )
    run(export.main, "--ckpt=parts", f"--to={tmp_path / 'out'}")
    more = ["--device=cpu", "--sampler=linear_speculation", "--temperature=0", "--max_new_tokens=12"]
    texts = []
    for source in ("--ckpt=parts", f"--init_from={tmp_path / 'out'}"):
        capsys.readouterr()
        run(sample.main, source, "--prompt=abc", "--block_size=4", *more)
        texts.append(capsys.readouterr().out.splitlines()[-2])
    assert texts[0] == texts[1]


def loaded(home):
    return rebuild(str(home), CPU)[3].double()


def exported(home, to):
    run(export.main, f"--init_from={home}", f"--to={to}")
    return json.loads((to / "config.json").read_text())


def test_what_is_exported_is_what_was_read(project, tmp_path):
    """Nemotron's layout and Ministral 3's own, and transformers reads the latter."""
    file = np.load(GOLDEN)
    ids = torch.tensor(file["ids"]).long()
    for name, shape in (("yarn", {}), *((str(i), s) for i, s in enumerate(SHAPES))):
        if "head_dim" in shape:
            continue  # other weights
        config = CONFIG | {k: v for k, v in shape.items() if k == "rope_parameters"}
        home = write(tmp_path / name, config, theirs_or_ours())
        to = tmp_path / f"{name}_out"
        assert exported(home, to)["architectures"] == ["NemotronLabsDiffusionModel"]
        with torch.no_grad():
            a, b = loaded(home), loaded(to)
            assert torch.equal(a(ids[:, :AT], ids[:, AT:], None, AT), b(ids[:, :AT], ids[:, AT:], None, AT))
            plain = {k: v for k, v in config.items() if k not in ("mask_token_id", "block_size")}
            home = write(tmp_path / f"{name}_plain", plain | {"model_type": "ministral3"}, theirs_or_ours())
            assert exported(home, tmp_path / f"{name}_ar")["architectures"] == ["Ministral3ForCausalLM"]
            a, b = (
                m.to_logits(m.hidden(ids, None, 1)[0])
                for m in (loaded(home), loaded(tmp_path / f"{name}_ar"))
            )
            assert torch.equal(a, b)
            if importlib.util.find_spec("transformers"):
                import transformers

                network = transformers.Ministral3ForCausalLM.from_pretrained(tmp_path / f"{name}_ar").double()
                assert (network(ids).logits - a[..., :V]).abs().max() < 1e-5


def theirs_or_ours():
    file = np.load(GOLDEN)
    return {k[2:]: torch.tensor(file[k]) for k in file.files if k[:2] == "w."}


def test_folders_that_are_wrong_end_in_two_lines(tmp_path, slip):
    home, _ = golden(tmp_path / "hub")
    config = json.loads((home / "config.json").read_text())
    for change, words in (
        ({"sliding_window": 16}, "sliding windows"),
        ({"mask_token_id": -1}, "none of its 64 ids"),
        ({"block_size": 0}, "not a block size"),
        ({"rope_parameters": {**ROPE, "llama_4_scaling_beta": -1.0}}, "rope_beta"),
        ({"rope_parameters": {**ROPE, "llama_4_scaling_beta": "x"}}, "cannot be read as a ministral3"),
        (
            {"rope_parameters": {**SHAPES[2]["rope_parameters"], "original_max_position_embeddings": 0}},
            "rope_original",
        ),
        ({"rope_parameters": {**ROPE, "rope_type": "longrope"}}, "longrope"),
        ({"intermediate_size": 40}, "do not fit"),
        ({"tie_word_embeddings": True}, "a head of its own"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "rotary positions of a part"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"max_position_embeddings": -3}, "-3 positions"),
    ):
        (home / "config.json").write_text(json.dumps({**config, **change}))
        assert words in slip(llama.llama, home), change
    (home / "config.json").write_text(json.dumps(config))
    weights = load_file(home / "model.safetensors")
    save_file({k: v.to(torch.int8) for k, v in weights.items()}, home / "model.safetensors")
    assert "holds int8" in slip(llama.llama, home)


if __name__ == "__main__" and importlib.util.find_spec("transformers"):
    write_golden()
