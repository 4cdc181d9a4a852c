"""
Why believe fast/attention.py? The rule is drawn by brute force in tests/test_model.py; here the ways to
compute it are compared with the lesson and with dense attention. FlexAttention runs as plain PyTorch on a
CPU: what a GPU makes of it is not tested here.
"""

import pytest
import torch
from conftest import slow
from exact import agree, noise, speed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

import diffusion as d
import fast
import model as m
from fast import attention

SIZES = [(4, 0, True), (8, 0, False), (1, 5, True), ([1, 4, 8], 8, True), ([2, 4, 4], 0, True), (6, 12, True)]


def small(causal=True, timed=True):
    """The lesson's network in float64."""
    torch.manual_seed(0)
    net = m.Transformer(
        m.ModelConfig(
            11,
            24,
            n_layers=3,
            n_heads=2,
            d_model=32,
            cond_dim=16,
            clean_causal=causal,
            time_conditioning=timed,
        )
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return net.double()


def quick(*args):
    """The same network in its fast form."""
    return speed(small(*args), d.Masked(11, 10))[0]


@pytest.fixture
def in_blocks(monkeypatch):
    """
    FlexAttention without a compiler, which would look for a GPU. It has no backward on a CPU, so the fast
    network is checked before.
    """
    [quick(*how) for how in ((True, True), (False, True))]
    monkeypatch.setattr(attention, "choose_backend", lambda *a: ("FlexAttention", "as asked"))
    monkeypatch.setattr(attention, "compiled", lambda: (flex_attention, create_block_mask))


@pytest.mark.parametrize("b", [1, 4, torch.tensor([[1, 1, 4, 4]])])
def test_the_mask_of_a_whole_buffer(b):
    """The length is a tensor, and what lies behind the context is not read."""
    at, want = torch.tensor([12, 13, 12, 13]), torch.zeros(1, 8, 24, dtype=torch.bool)
    narrow = attention.attention_mask(b, 8, 4, 4, at)
    want[:, :, :12], want[:, :, 20:] = narrow[:, :, :12], narrow[:, :, 12:]
    assert torch.equal(attention.attention_mask(b, torch.tensor(8), 4, 4, at, width=20), want)
    at = at + 4  # a gap between context and noisy tokens: nobody reads it
    assert not attention.attention_mask(b, torch.tensor(8), 4, 4, at, width=20)[:, :, 12:20].any()


@pytest.mark.parametrize("sizes, start, causal", SIZES)
@torch.no_grad()
def test_attention_in_blocks_is_the_dense_one(monkeypatch, in_blocks, sizes, start, causal):
    """The rule is attention_mask, for all queries and for the noisy ones; logits are the lesson's."""
    b, net = (sizes if isinstance(sizes, int) else torch.tensor(sizes)), quick(causal)
    made = attention.flex_mask(b, 3, 24, 24 - start, start, causal, torch.device("cpu"))
    mask = attention.attention_mask(b, 0, 24, 24 - start, start, causal).expand(3, -1, -1)
    for blocks, want in ((made.all, mask), (made.noisy, mask[:, 24:])):
        assert torch.equal(create_mask(blocks.mask_mod, 3, 1, *want.shape[1:], device="cpu")[:, 0], want)
    clean, noisy, sigma = (
        torch.randint(11, (3, 24)),
        torch.randint(11, (3, 24 - start)),
        torch.tensor([0.1, 1.0, 3.0]).double(),
    )
    seen = []
    # that of a compiled network: not asked
    monkeypatch.setattr(torch.nn.attention.flex_attention, "flex_attention", lambda *a, **k: seen.append(1))
    logits = net(clean, noisy, b, start=start, sigma=sigma)
    monkeypatch.undo()
    monkeypatch.setattr(attention, "CHUNK_BOUNDS", (1000, 1000))
    for other in (small(causal), net):  # the lesson, and dense attention
        assert (logits - other(clean, noisy, b, start=start, sigma=sigma)).abs().max() < 1e-11 and not seen


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_another_mixture_of_block_sizes_compiles_nothing_anew(monkeypatch, in_blocks, whole):
    """Attention compiled alone, as it is by default, or within the network (--compile)."""
    torch._dynamo.reset()
    net, counts = quick(), [CompileCounterWithBackend("eager") for _ in range(3)]
    parts = tuple(
        torch.compile(f, backend=c) for f, c in zip((flex_attention, create_block_mask), counts, strict=False)
    )
    monkeypatch.setattr(attention, "compiled", lambda: parts)
    run = torch.compile(net, backend=counts[2]) if whole else net
    clean, noisy, sigma = (
        torch.randint(11, (3, 24)),
        torch.randint(11, (3, 24)),
        torch.tensor([0.1, 1.0, 3.0]).double(),
    )
    found, frames = [], []
    for sizes in ([1, 4, 8], [8, 2, 2], [24, 1, 1]):
        found.append(run(clean, noisy, torch.tensor(sizes), sigma=sigma))
        frames.append(sum(c.frame_count for c in counts))
    assert frames[0] == frames[-1] > 0, frames
    monkeypatch.undo()
    for sizes, logits in zip(([1, 4, 8], [8, 2, 2], [24, 1, 1]), found, strict=True):
        assert (logits - small()(clean, noisy, torch.tensor(sizes), sigma=sigma)).abs().max() < 1e-11


@pytest.mark.parametrize("whole", slow([False, True], [False]))
def test_a_training_step_in_blocks_is_the_lesson(monkeypatch, in_blocks, whole):
    """
    Loss and gradients are the lesson's, eager and under --compile. Here FlexAttention's backward exists in
    Python, and would rather not be asked.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *a, **k: None)
    net, process = speed(small(), d.Masked(11, 10))
    x0 = torch.randint(10, (3, 24))
    count = CompileCounterWithBackend("aot_eager")
    run, t = torch.compile(net, backend=count) if whole else net, torch.tensor([0.3, 0.5, 0.9]).double()

    def step(token_loss, run, net, process, sizes):
        net.zero_grad()
        loss, _ = token_loss(run, process, x0, torch.tensor(sizes), t, "elbo", noise=noise(3, 24))
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in net.parameters())]

    found, frames = [], []
    for sizes in ([1, 4, 8], [8, 2, 2], [24, 1, 1]):
        found.append(step(fast.token_loss, run, net, process, sizes))
        frames.append(count.frame_count)
    assert frames[0] == frames[-1] and bool(frames[0]) == whole, (
        "another mixture, or number of masks, compiles nothing anew"
    )
    monkeypatch.undo()
    lesson = small()
    for sizes, got in zip(([1, 4, 8], [8, 2, 2], [24, 1, 1]), found, strict=True):
        agree(got, step(d.token_loss, lesson, lesson, d.Masked(11, 10), sizes))


@pytest.mark.parametrize("step", [None, 16])
def test_on_a_cpu_attention_stays_float32(step):
    """Under autocast too, dense or in pieces, whatever queries, keys and values were multiplied in."""
    B, T, sizes = 3, 48, torch.tensor([1, 4, 8])
    q, k, v = torch.randn(3, B, 2, 2 * T, 16, requires_grad=True).unbind()
    found = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            assert attention.dtype_of(q) == torch.float32
            assert attention.dtype_of(q.bfloat16()) == (torch.float32 if on else torch.bfloat16)
            if step:
                mask = attention.query_chunks(q, sizes, T, 0, True, step)
            else:
                mask = attention.added(q, attention.attention_mask(sizes, 0, T, T, 0))
            y = attention.attend(q, k, v, mask, 0)
            found.append([y, *torch.autograd.grad(y.sum(), (q, k, v))])
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_runs_where_and_why(monkeypatch):
    cuda, key = torch.device("cuda", 0), (torch.bfloat16, 64)
    assert (
        attention.choose_backend(torch.device("cpu"), *key, 4096)[0] == "SDPA in pieces"
        and attention.choose_backend(torch.device("mps"), *key, 4096)[0] == "dense SDPA"
    )
    assert attention.choose_backend(cuda, *key, 256)[0] == "dense SDPA" and not attention.TRIED, (
        "a short pass compiles nothing"
    )

    def fails(*a):
        raise RuntimeError("no compiler\nand more")

    for tried, way, why in (
        (fails, "dense SDPA", "failed: RuntimeError: no compiler"),
        (lambda *a: True, "dense SDPA", "gave something else in its first call"),
        (lambda *a: False, "FlexAttention", "compiled"),
    ):
        monkeypatch.setattr(attention, "TRIED", {})
        monkeypatch.setattr(attention, "try_out", tried)
        found = attention.choose_backend(cuda, *key, 4096)
        assert (
            found[0] == way and found[1].endswith(why) and attention.choose_backend(cuda, *key, 2048) is found
        )


def test_the_first_call_sees_a_wrong_kernel(monkeypatch, in_blocks):
    """
    On a CPU FlexAttention has no backward: dense attention by the rule's own mask stands in, once right and
    once not.
    """

    def stand_in(q, k, v, block_mask):
        mask = create_mask(block_mask.mask_mod, q.size(0), 1, q.size(2), k.size(2), device="cpu")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask) * wrong

    monkeypatch.setattr(attention, "compiled", lambda: (stand_in, create_block_mask))
    for wrong in (1.0, 0.8):
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad():  # as a validation might be the first
                assert attention.try_out(torch.device("cpu"), dtype, 16) == (wrong != 1)
