"""
Why believe methods/ctrldiff.py? By enumeration of every choice on a small network, the mean gradient of its loss
is that of the expected reward. A policy of great odds is the fixed block size. It trains, resumes, and samples.
"""

import itertools
import json
import math
import sys

import pytest
import torch
from conftest import TINY
from exact import KINDS, V3, last

import train
from generate import generate
from methods import ctrldiff
from model import ModelConfig
from samplers import SAMPLERS


def small():
    torch.manual_seed(0)
    process = KINDS["masked"][0]()
    cfg = ModelConfig(process.vocab_size, 8, n_layers=1, n_heads=2, d_model=16, n_extra_tokens=1)
    model = ctrldiff.Dynamic(cfg).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.5)
    return model, process


def test_the_gradient_is_that_of_the_expected_reward():
    """Two rows, one block of 4 in sizes 4, 2, 1: every way to choose, with its probability and its reward."""
    model, process = small()
    how = {"block_size": 4, "max_new_tokens": 4, "steps": 2, "seed": 3, "trained": [1, 2, 4]}
    prompts = [torch.tensor([1]), torch.tensor([], dtype=torch.long)]
    how["max_new_tokens"] = 3
    expected, surrogate = 0.0, 0.0
    for ways in itertools.product(itertools.product((True, False), repeat=3), repeat=2):
        table = torch.tensor(ways)  # (row, which look)
        if any(row[0] and not all(row[1:]) for row in ways):  # a block that is taken is not looked at again
            continue
        which = lambda part: 0 if part.x.size(1) == 4 else 1 + int(part.positions[0]) // 2
        choose = lambda part, seen: table[part.rows, which(part)]  # noqa: B023
        state, looks, blocks = ctrldiff.rollout(model, process, prompts, choose, **how)
        # a reward that knows the text and the passes
        reward = (state.x[:, :4] * torch.arange(1, 5)).sum(1).double() - 0.7 * blocks[0][1]
        log_pi = torch.zeros(2, dtype=torch.float64)
        for _, rows, seen, open, takes, asked in looks:
            p = model.takes(seen, open)
            log_pi = log_pi + torch.where(asked, torch.where(takes, p, 1 - p).log(), 0.0)[rows.argsort()]
        expected = expected + (log_pi.exp().prod() * reward.sum())
        # the baseline is the other row's reward: it does not depend on this row's choices
        loss = ctrldiff.policy_loss(model, looks, ctrldiff.advantages(reward[:, None]))
        surrogate = surrogate + log_pi.exp().prod().detach() * loss
    parameters = list(model.policy.parameters())
    want = torch.autograd.grad(expected, parameters)
    ours = torch.autograd.grad(-surrogate, parameters)
    for a, b in zip(ours, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12) and b.abs().max() > 1e-3


def test_what_the_policy_reads_and_what_a_look_is_charged():
    """By hand: mean, largest and first entropy of the open positions, log2 of the size; one block's reward."""
    model, _ = small()
    w, c = [0.3, -0.7, 1.1, 0.2], 0.05
    model.policy.weight.data[0], model.policy.bias.data[0] = torch.tensor(w), c
    seen = torch.tensor([[0.0, 0.5, 0.2, 0.3], [0.1, 0.4, 0.0, 0.0]], dtype=torch.float64)
    open = torch.tensor([[False, True, True, True], [True, True, False, False]])
    read = [[1.0 / 3, 0.5, 0.5, 2.0], [0.25, 0.4, 0.1, 2.0]]
    z = [sum(a * b for a, b in zip(w, row, strict=True)) + c for row in read]
    assert torch.allclose(model.log_odds(seen, open), torch.tensor(z, dtype=torch.float64))
    takes, asked, rows = torch.tensor([True, False]), torch.tensor([True, True]), torch.tensor([1, 0])
    advantage = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    loss = ctrldiff.policy_loss(model, [(1, rows, seen, open, takes, asked)], advantage)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert loss.item() == pytest.approx(-(5 * math.log(sigmoid(z[0])) + 2 * math.log(sigmoid(-z[1]))))


def test_great_odds_are_a_fixed_size():
    model, process = small()
    run = lambda b, sampler, **how: last(
        generate(model, process, [()] * 6, block_size=b, sampler=SAMPLERS[sampler], trained=[1, 2, 4], **how)
    )
    torch.nn.init.zeros_(model.policy.weight)
    for odds, want in ((100.0, run(4, "ancestral")), (-100.0, run(1, "ar"))):
        torch.nn.init.constant_(model.policy.bias, odds)
        assert torch.equal(run(4, "dynamic_blocks", choose="policy").x, want.x)
    torch.nn.init.zeros_(model.policy.bias)
    model.policy.weight.data[0] = torch.tensor([0.0, 0.0, 0.0, -400.0])
    model.policy.bias.data[:] = 600.0  # log2 4 = 2 -> -200, log2 2 = 1 -> +200
    assert torch.equal(run(4, "dynamic_blocks", choose="policy").x, run(2, "ancestral").x)
    assert V3 == 3


@pytest.mark.slow
def test_it_trains_resumes_and_samples(project, monkeypatch, slip):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *words])
        train.main()

    run(
        "--dataset=toy",
        "--seq_len=8",
        "--block_sizes=1:0.5,2:0.25,4:0.25",
        "--max_steps=4",
        "--out_dir=out/base",
    )
    own = ["--method=ctrldiff", "--ckpt=out/base", "--batch_size=4"]
    run(*own, "--max_steps=4", "--out_dir=out/whole")
    run(*own, "--max_steps=4", "--eval_every=2", "--out_dir=out/whole2")
    run(*own, "--max_steps=2", "--eval_every=2", "--out_dir=out/half")
    run(*own, "--max_steps=4", "--eval_every=2", "--out_dir=out/half", "--resume")
    load = lambda name: torch.load(f"out/{name}/ckpt.pt", weights_only=True)
    base, whole, half = load("base"), load("whole2"), load("half")
    for name, w in whole["model"].items():
        assert torch.equal(w, half["model"][name]), name
        assert name.startswith("policy.") or torch.equal(w, base["ema"][name]), "the network stays"
    assert whole["model"]["policy.weight"].abs().sum() > 0
    lines = [json.loads(line) for line in open("out/whole/log.jsonl", encoding="utf-8")]
    assert any("reward" in line for line in lines)
    said = slip(lambda: run(*own, "--price=-1", "--out_dir=out/no"))
    assert "price" in said
