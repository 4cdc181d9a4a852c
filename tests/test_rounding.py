"""
Why believe rounded weights? No weight moves by more than half a step, rounding twice is rounding once, a packed
file holds the same network, and texts stay independent of the batch.
"""

import sys

import pytest
import torch
from exact import GENERATE, V3, last, net, on

import diffusion as d
from run import checkpoint, pack, rounding
from run.restore import rebuild

BITS = pytest.mark.parametrize("bits", [8, 4])


def matrices():
    """Odd shapes, groups that are cut off, equal weights, zeros, and numbers far apart."""
    random = torch.Generator().manual_seed(0)
    for rows, columns in ((3, 1), (5, 7), (4, 128), (3, 300), (6, 512)):
        yield torch.randn(rows, columns, generator=random)
    yield torch.zeros(2, 5)
    yield torch.full((2, 130), 0.3)
    yield torch.randn(4, 200, generator=random) ** 5 * 1e-3 + 7
    yield torch.randn(3, 40, generator=random, dtype=torch.float64)


@BITS
def test_no_weight_moves_by_more_than_half_a_step(bits):
    for w in matrices():
        ours, size = rounding.unpack(rounding.pack(w, bits)), w.size(1) if bits == 8 else 128
        assert ours.dtype == w.dtype and ours.shape == w.shape
        for some, new in zip(w.split(size, dim=1), ours.split(size, dim=1), strict=True):
            step = (some.double().amax(1) - some.double().amin(1)) / (2**bits - 1)
            off = (new.double() - some.double()).abs().amax(1)
            eps = torch.finfo(w.dtype).eps * some.double().abs().amax(1)
            assert (off <= step / 2 + eps).all()
            if some.size(1) > 100:
                assert (off >= step / 4).any() or (step == 0).all(), "some weight is far from all steps"
            assert all(len(row.unique()) <= 2**bits for row in new)
            assert torch.equal(new.amin(1), some.amin(1)) and torch.equal(new.amax(1), some.amax(1)), (
                "the ends stay"
            )


@BITS
def test_rounding_twice_is_rounding_once(bits):
    for w in matrices():
        once = rounding.unpack(rounding.pack(w, bits))
        again = rounding.pack(once, bits)
        assert torch.equal(rounding.unpack(again), once)
    assert torch.equal(again["q"], rounding.pack(w, bits)["q"])


@BITS
def test_packed_weights_take_their_bits(bits):
    w = torch.randn(64, 512)
    packed = rounding.pack(w, bits)
    assert packed["q"].numel() == 64 * 512 * bits // 8
    assert pack.n_bytes({"w": packed}) == 64 * (512 * bits // 8 + 8 * (1 if bits == 8 else 4))


def test_only_the_matrices_of_the_layers_are_rounded():
    model = net(d.Uniform(V3, "denoiser", ar_token=V3), time_conditioning=True)
    new = rounding.rounded(model.state_dict(), 4)
    changed = {name for name, w in model.state_dict().items() if not torch.equal(w, new[name])}
    want = {f"layers.{i}.{part}.weight" for i in range(2) for part in ("qkv", "out", "mlp.0", "mlp.2")}
    assert changed == want


@pytest.mark.parametrize("bad", ["bits", "q", "low", "shape", "dtype"])
def test_a_packed_matrix_of_odd_shape_is_refused(bad):
    packed = rounding.pack(torch.randn(4, 6), 4)
    packed |= {"bits": {"bits": 3}, "q": {"q": packed["q"][1:]}, "low": {"low": packed["low"][1:]},
               "shape": {"shape": [4, 1 << 40]}, "dtype": {"q": packed["q"].int()}}[bad]  # fmt: skip
    with pytest.raises(ValueError):
        rounding.unpack(packed)


@pytest.fixture
def run_of(project):
    """run_of(): the folder of a run of a random network on the letters of toy."""
    from options import TrainConfig

    cfg = TrainConfig(
        dataset="toy", seq_len=8, block_sizes={1: 0.5, 4: 0.5}, n_layers=2, n_heads=2, d_model=16
    )
    model, process = checkpoint.build(cfg, V3)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.5)
    meta = {"vocab_size": V3, "tokenizer": "char", "chars": "abc"}
    state = {
        "model": model.state_dict(),
        "ema": model.state_dict(),
        "config": vars(cfg),
        "meta": meta,
        "step": 7,
    }
    checkpoint.save(
        "run", state | {"version": checkpoint.VERSION, "process": checkpoint.process_facts(process)}
    )
    return "run"


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_packed_file_is_the_network_that_is_rounded_when_loaded(run_of, monkeypatch, capsys, slip, weights):
    monkeypatch.setattr(sys, "argv", ["", "--ckpt=run", f"--weights={weights}", "--out_dir=small"])
    pack.main()
    assert "times smaller" in capsys.readouterr().out
    packed, loaded = rebuild("small", "cpu"), rebuild("run", "cpu", weights=weights)
    for (name, a), b in zip(packed[3].state_dict().items(), loaded[3].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    full = rebuild("run", "cpu")[3].state_dict()
    assert not torch.equal(full["layers.0.out.weight"], packed[3].state_dict()["layers.0.out.weight"])
    assert "is not a new folder" in slip(pack.main, argv=["--ckpt=run", "--out_dir=small"])
    assert "none of int8, int4" in slip(pack.main, argv=["--ckpt=run", "--out_dir=x", "--weights=int3"])
    assert "none of int8, int4" in slip(lambda: rebuild("run", "cpu", weights="int3"))


@pytest.mark.parametrize("path", GENERATE)
def test_texts_of_rounded_weights_are_independent_of_the_batch(path):
    model, process = net(d.Masked(V3 + 1, V3)).double(), d.Masked(V3 + 1, V3)
    model.load_state_dict(rounding.rounded(model.state_dict(), 4))
    model, process = on(path, model, process)
    run = lambda prompts, **how: last(GENERATE[path](model, process, prompts, block_size=4, seed=3, **how)).x
    together = run([(), (1,), (2, 0)])
    assert torch.equal(run([(1,)] * 2)[1], together[1])
    assert torch.equal(run([(), (1,), (2, 0)], use_cache=False), together)
