"""
Why believe methods/unmasking_policy.py? A policy that says always is `threshold` at 0, one that says never is
`confidence`. All runs of a block of three are enumerated: their probabilities sum to 1, and the expectation
of the gradient that training takes is the derivative of the expected reward.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run, slow
from exact import GENERATE, KINDS, V3, agree, last, net, on, states

import sample
import train as training
from generate import SAMPLERS
from methods import _shared, learn2pd
from methods import unmasking_policy as method
from methods.unmasking_policy import Policy, policy
from run import checkpoint

PATHS = pytest.mark.parametrize("path", GENERATE)
RAGGED = [(), (1,), (0, 2, 1), (2, 2, 2, 2, 0), (1, 0)]


def with_policy(process, size=4, seed=0, bias=None, **kw):
    """exact.net in float64 beside a policy of random weights; bias: one that says the same everywhere."""
    plain = net(process, seed=seed, **kw).double()
    torch.manual_seed(seed)
    model = _shared.WithPart(plain.cfg, Policy(size, 8)).double().eval()
    model.load_state_dict(plain.state_dict())
    for p in model.part.parameters():
        torch.nn.init.normal_(p, 0.0, 0.7)
    if bias is not None:
        torch.nn.init.zeros_(model.part.say.weight)
        torch.nn.init.constant_(model.part.say.bias, bias)
    return model


def learner_of(model, process, size=3, **settings):
    cfg = SimpleNamespace(block_sizes={1: 0.2, size: 0.8}, schedule="loglinear", init_from="", dataset="toy")
    return method.Learner(cfg, method.Settings(size=size, **settings), model, process, None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", slow(KINDS, ["masked"]))
@PATHS
def test_always_is_threshold_0_and_never_is_confidence(path, kind, temperature):
    make, kw = KINDS[kind]
    for bias, other, how in ((math.inf, "threshold", {"threshold": 0.0}), (-math.inf, "confidence", {})):
        model, process = on(path, with_policy(make(), bias=bias, **kw), make())
        shared = {"block_size": 4, "max_new_tokens": 3, "seed": 5, "temperature": temperature}
        run = lambda sampler, **own: last(
            GENERATE[path](model, process, RAGGED, sampler=sampler, **shared, **own)  # noqa: B023
        )
        want = run(SAMPLERS[other], **how)
        for own in ({}, {"draws": True}):
            ours = run(policy, **own)
            assert torch.equal(ours.x, want.x) and torch.equal(ours.nfe_rows, want.nfe_rows)
        model.part = with_policy(make(), **kw).part
        assert torch.equal(run(policy, cut=float(bias < 0)).x, want.x)


def everything(b):
    """u (1, 2^(b b), b, b): every way in which b steps may choose of b positions; 0 chooses, 1 does not."""
    return (1.0 - states(2, b * b).double()).view(1, -1, b, b)


def enumerated(learner, x0, given):
    """
    The runs of a block, each once: what policy_loss reads of them, rewards (n,), and their probabilities as
    functions of the policy, (n,).
    """
    u = everything(learner.size)
    learner.settings.group = u.size(1)
    seen, reward, asked = learner.runs(x0, given, torch.ones_like(given), u)
    assert asked.all()
    keys = torch.stack([chosen & left for _, left, _, chosen in seen] + [left for _, left, *_ in seen], 1)
    _, back = keys.flatten(1).unique(dim=0, return_inverse=True)
    first = torch.stack([(back == i).nonzero()[0, 0] for i in range(int(back.max()) + 1)])
    seen = [tuple(y[first] for y in record) for record in seen]
    return seen, reward[first], probabilities(learner.model.part, seen)


def probabilities(part, seen):
    """By the definition: a product over steps and over what is left."""
    p = 1.0
    for c, left, share, chosen in seen:
        q = part(c, left, share).sigmoid()
        p = p * torch.where(left, torch.where(chosen, q, 1 - q), 1.0).prod(1)
    return p


@pytest.mark.parametrize("alpha, open", [(1.0, 3), (0.0, 3), (2.0, 2)])
def test_the_gradient_is_that_of_the_expected_reward(alpha, open):
    """Three positions are written, or two behind a given one. Every pair of runs, as a group of two."""
    process = KINDS["masked"][0]()
    model = with_policy(process, size=3, seed=0)
    learner = learner_of(model, process, alpha=alpha, reward="same")
    x0 = torch.tensor([[1, 0, 2, 0, 1, 2]])
    given = torch.arange(6) < 6 - open
    seen, reward, p = enumerated(learner, x0, given[None])
    assert len(p) == {3: 35, 2: 7}[open], "one run for each way to choose"
    agree(p.sum().detach(), torch.ones((), dtype=torch.float64))
    assert len(set(reward.tolist())) > 1, "some runs are better than others"
    part = list(model.part.parameters())
    want = torch.autograd.grad((p * reward).sum(), part)
    # every pair of runs, with its probability, which scales its rewards: the loss is linear in them
    n = len(p)
    one, two = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    both = torch.stack((one, two), 1).flatten()
    weight = (p[one] * p[two]).detach() * n * n
    runs = [tuple(y[both] for y in record) for record in seen]
    scaled = reward[both] * weight.repeat_interleave(2)
    learner.settings.group = 2
    learner.runs = lambda *args: (runs, scaled, torch.ones(2 * n * n, dtype=torch.bool))
    pairs = torch.zeros(n * n, 6, dtype=torch.long)
    charged = ~given.expand(n * n, 6)
    noise = SimpleNamespace(uniform=lambda k: torch.ones(n * n, 3, k, dtype=torch.float64))
    total, mean = learner.policy_loss(model, process, pairs, 3, None, None, ~charged, charged, noise)
    agree(total.detach(), mean * charged.sum())
    ours = torch.autograd.grad(total / charged.sum(), part)
    agree([-g for g in ours], list(want))


def test_reward_passes_and_right_are_as_counted_by_hand():
    """Every run again, from what it chose: how many passes, what stands there, and whether that is right."""
    process = KINDS["masked"][0]()
    model = with_policy(process, size=3, seed=0)
    learner = learner_of(model, process, alpha=1.5, reward="check")
    checks = []

    def check(text):
        checks.append(text)
        return int(text[3:] in ("000", "111") or text[4] == "2"), 1

    decode = lambda ids: "".join(map(str, ids))
    tokenizer = SimpleNamespace(decode=decode)
    learner.data = SimpleNamespace(checker=SimpleNamespace(check=check), tokenizer=tokenizer)
    x0, given = torch.tensor([[1, 0, 2, 0, 1, 2]]), torch.arange(6)[None] < 3
    u = everything(3)
    learner.settings.group = u.size(1)
    seen, reward, _ = learner.runs(x0, given, torch.ones_like(given), u)
    for row in range(0, u.size(1), 7):
        x, passes = [process.mask_id] * 3, 0
        while process.mask_id in x:
            with torch.no_grad():
                p = process.loo_logits(model(x0[:, :3], torch.tensor([x]), 3, 3))[0].softmax(-1)
            left = [i for i in range(3) if x[i] == process.mask_id]
            take = [i for i in left if u[0, row, passes, i] == 0]
            take = take or [max(left, key=lambda i: (p[i].max(), -i))]
            c, was_left, share, _ = (y[row] for y in seen[passes])
            assert was_left.nonzero()[:, 0].tolist() == left and abs(share.item() - passes / 3) < 1e-12
            agree(c[left], p.amax(-1)[left])
            x = [int(p[i].argmax()) if i in take else x[i] for i in range(3)]
            passes += 1
        text = "102" + "".join(map(str, x))
        assert checks[row] == text
        want = check(text)[0] * ((3 - passes + 1) / 3) ** 1.5
        assert abs(reward[row].item() - want) < 1e-12, (row, x, passes)
    right = [check(text)[0] for text in checks[: u.size(1)]]
    assert abs(learner.last["right"] - sum(right) / len(right)) < 1e-9 and 0 < sum(right) < len(right)


def test_a_group_is_one_puzzle_and_the_baseline_is_the_others():
    reward = torch.tensor([1.0, 0.0, 0.5, 4.0, 4.0, 1.0]).double()
    agree(method.others_mean(reward, 3), torch.tensor([0.25, 0.75, 0.5, 2.5, 2.5, 4.0]).double())
    process = KINDS["masked"][0]()
    model = with_policy(process, size=4)
    learner = learner_of(model, process, size=4, group=3, reward="same")
    x0 = torch.randint(V3, (5, 8), generator=torch.Generator().manual_seed(0))
    given = torch.arange(8).expand(5, 8) < torch.tensor([4, 5, 6, 8, 4])[:, None]
    u = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    _, reward, asked = learner.runs(x0, given, torch.ones_like(given), u)
    assert asked.tolist() == [True] * 9 + [False] * 3 + [True] * 3 and (reward[9:12] == 0).all()
    # a run does not depend on the others
    for row in (0, 1, 2, 4):
        alone = learner.runs(x0[row : row + 1], given[row : row + 1], torch.ones(1, 8) > 0, u[row : row + 1])
        agree(alone[1], reward[3 * row : 3 * row + 3])


def same(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.slow
def test_a_policy_is_trained_resumed_and_used(project, capsys, slip):
    base = [*TINY, "--dataset=pairs", "--block_sizes=1:0.25,4:0.75", "--lr=0.05", "--max_steps=4"]
    run(training.main, *base, "--out_dir=net", "--warmup=1")
    flags = ["--method=unmasking_policy", "--ckpt=net", "--batch_size=4", "--group=2", "--device=cpu"]
    flags += ["--policy_width=8", "--n_eval=4"]
    flags += ["--lr_schedule=constant", "--log_every=1"]
    run(training.main, *flags, "--max_steps=4", "--out_dir=whole")
    run(training.main, *flags, "--max_steps=2")
    run(training.main, *flags, "--max_steps=4", "--resume")
    whole, parts, plain = (checkpoint.load(name) for name in ("whole", "net_policy", "net"))
    assert same(whole["model"], parts["model"]) and same(whole["ema"], parts["ema"])
    assert same(plain["ema"], whole["ema"]), "the network is as it was"
    assert all({"right", "passes", "reward"} <= set(r) for r in checkpoint.logged("whole") if "loss" in r)
    (project / "data/pairs/prepare.py").write_text("def check(text):\n    return 1, 1\n", encoding="utf-8")
    run(training.main, *flags, "--max_steps=1", "--out_dir=checked")
    assert [r["right"] for r in checkpoint.logged("checked") if "right" in r] == [1.0]
    capsys.readouterr()
    use = ["--device=cpu", "--sampler=policy", "--n_samples=3", "--prompt=ab."]
    for more in ([], ["--plain"]):
        run(sample.main, "--ckpt=whole", *use, "--temperature=0", *more)
    first = capsys.readouterr().out.splitlines()
    half = len(first) // 2
    assert first[1 : half - 1] == first[half + 1 : -1]
    assert "--method unmasking_policy" in slip(sample.main, argv=["--ckpt=net", *use])
    assert "cut" in slip(sample.main, argv=["--ckpt=whole", *use, "--cut=1.5"])
    (project / "data/pairs/prepare.py").unlink()
    for bad, says in ((["--reward=check"], "no check"), (["--group=1"], "group cannot be 1")):
        assert says in slip(training.main, argv=[*flags, *bad, "--out_dir=other"])
    assert learn2pd.learn2pd.__name__ in SAMPLERS
