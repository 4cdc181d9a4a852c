"""samplers/idlm.py: drafts by masks in the clean stream of a language model."""

import re

import pytest
import torch
from conftest import TINY, run
from exact import GENERATE, KINDS, last, net, on

import diffusion as d
import sample
import train
from generate import SAMPLERS
from lab import gsm8k, quality
from methods.llama import Llama, Settings
from model import ModelConfig

V, MASK = 21, 20
PROMPTS = [(1, 2, 3), (4,), (5, 6, 7, 8, 9, 10)]


def language_model(seed):
    """A random network of the next token in float64, whose answers are now sure and now not."""
    torch.manual_seed(seed)
    cfg = ModelConfig(V, 32, n_layers=2, n_heads=4, d_model=24, next_token=True)
    model = Llama(cfg, Settings(n_kv_heads=2)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model, d.Masked(V, MASK)


def public_loop(model, x, end, stride):
    """[pending, drafts, stride - 1 masks], all computed again at each pass: (text, passes)."""
    x, drafts, passes = list(x), [], 0
    while len(x) < end:
        fed = torch.tensor([(x + drafts + [MASK] * (stride - 1))[:end]])
        with torch.no_grad():
            logits = model.to_logits(model.hidden(fed, None, 1)[0])[0, len(x) - 1 :]
        logits[:, MASK] = -torch.inf
        said, passes, m = logits.argmax(-1).tolist(), passes + 1, 0
        while m < len(drafts) and drafts[m] == said[m]:
            m += 1
        x, drafts = x + said[: m + 1], said[m + 1 :] if m == len(drafts) else []
    return x[:end], passes


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_it_is_the_public_loop(stride):
    """Tokens and passes at temperature 0, rows of several lengths, one block for all of the text."""
    saved = 0
    for seed in range(4):
        model, process = language_model(seed)
        how = {"block_size": 32, "temperature": 0.0, "stride": stride}
        state = last(GENERATE["lesson"](model, process, PROMPTS, sampler=SAMPLERS["idlm"], **how))
        for row, prompt in enumerate(PROMPTS):
            text, passes = public_loop(model, prompt, 32, stride)
            assert state.x[row].tolist() == text and state.nfe_rows[row] == passes
            saved += 32 - len(prompt) - passes
    assert (saved > 0) == (stride > 1)


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_p": 0.8, "eos_id": 1}])
@pytest.mark.parametrize("b", [4, 16])
def test_it_writes_what_ar_writes(how, b):
    for seed in range(2):
        model, process = language_model(seed)
        how = {"max_new_tokens": 20, **how, "seed": seed}
        found = [
            last(
                GENERATE["lesson"](
                    model, process, PROMPTS * 3, sampler=SAMPLERS[name], block_size=size, **how
                )
            )
            for name, size in (("ar", 1), ("idlm", b))
        ]
        ar, ours = found
        assert torch.equal(ours.x[:, : ar.x.size(1)], ar.x) and torch.equal(ours.done, ar.done)


def test_right_drafts_save_passes_and_holes_are_kept():
    process = KINDS["masked"][0]()
    model, process = on("lesson", net(process).double(), process)
    torch.nn.init.zeros_(model.head.weight)  # the same answer to everything
    model.head.bias.data[:] = torch.arange(model.head.bias.numel())
    run = lambda prompts, **how: last(
        GENERATE["lesson"](
            model, process, prompts, sampler=SAMPLERS["idlm"], block_size=8, temperature=0.0, **how
        )
    )
    assert run([()], max_new_tokens=8).nfe == 3, "1, 1 + 3, and the rest"
    state = run([(0, -2, 1, -2, -2, 0, 0, 1)])
    best = int(model.head.bias[: process.mask_id].argmax())
    assert state.x[0].tolist() == [0, best, 1, best, best, 0, 0, 1]


def test_it_serves_a_network_that_knows_block_size_1_alone(project, capsys, slip):
    flags = [*TINY, "--dataset=toy", "--method=llama", "--seq_len=32", "--block_sizes=1:1"]
    run(train.main, *flags, "--max_steps=2", "--out_dir=out/run")
    texts = []
    for sampler in (["ar"], ["idlm"], ["idlm", "--block_size=8", "--stride=2"]):
        capsys.readouterr()
        run(sample.main, "--ckpt=out/run", "--prompt=abc", "--device=cpu", "--sampler", *sampler)
        texts.append(capsys.readouterr().out.split("sample 1")[1].splitlines()[1])
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 20
    assert "not 8" in slip(
        sample.main, argv=["--ckpt=out/run", "--prompt=a", "--block_size=8", "--sampler=a2d"]
    )
    model, process = language_model(0)
    with pytest.raises(ValueError, match="bos_id"):
        last(GENERATE["lesson"](model, process, [()], block_size=8, sampler=SAMPLERS["idlm"]))
    assert "stride" in slip(
        sample.main, argv=["--ckpt=out/run", "--prompt=a", "--sampler=idlm", "--stride=0"]
    )
    table = ["--ckpt=out/run", "--device=cpu", "--sampler=idlm", "--n_eval=2", "--max_new_tokens=8"]
    for size in (8, 16):  # 16 where nothing is said
        run(quality.main, *table, *([f"--block_size={size}"] if size == 8 else []))
        assert re.search(rf"^ +idlm +{size} ", capsys.readouterr().out, re.MULTILINE)
    cfg = gsm8k.Gsm8kConfig(sampler="idlm", block_size=8)
    assert gsm8k.settled_sampler(cfg, SAMPLERS["idlm"], None, model, [1]) == ("idlm", 8, None)
    cfg = gsm8k.Gsm8kConfig(sampler="idlm")
    assert gsm8k.settled_sampler(cfg, SAMPLERS["idlm"], None, model, [1]) == ("idlm", 16, None)
