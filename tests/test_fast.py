"""
Why believe fast/? It is never believed. Edits that a fast form would not see make the lesson run, with a
note. Here are such edits, in the files, in memory and on one network. Of each is tested that there is a
note, and that what was written is what runs: in training, with a cache and in sampling. That the fast forms
are the lesson where nothing was edited is tested beside each of them.
"""

import copy
import functools
import statistics
import subprocess
import sys
import time

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import copy_project, slow
from exact import agree, last, noise
from torch.nn.utils import parametrizations, parametrize

import diffusion
import fast
import generate
import model
import rng
from fast import check, edits
from samplers import SAMPLERS

V = 11
SHOW = "python -c 'from fast import check; print({part: check.fingerprint(part) for part in check.PARTS})'"


def network(timed=True, **how):
    """A lesson network with random weights everywhere."""
    cfg = model.ModelConfig(
        V,
        16,
        **{"n_layers": 2, "n_heads": 2, "d_model": 16, "cond_dim": 8, "time_conditioning": timed, **how},
    )
    torch.manual_seed(0)
    net = model.Transformer(cfg).double().eval()
    for p in net.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return net


def masked():
    return diffusion.Masked(V, V - 1)


def uniform():
    return diffusion.Uniform(V, "denoiser")


def told(net, process):
    """What a network says in training, behind a cache, and as a sampler hears it: a list of logits."""
    x, y = torch.randint(V - 1, (2, 3, 16), generator=torch.Generator().manual_seed(1))
    level = torch.tensor([0.1, 0.7, 2.0]).double()
    with torch.no_grad():
        found = [net(x, y, torch.tensor([1, 4, 16]), 0, level)]
        cache = net.new_cache(3, 24)
        found += [net(x[:, i - 4 : i], y[:, i : i + 4], 4, i, level, cache) for i in (4, 8)]

    def listen(block):
        """Every step writes what is likeliest, so that nothing hangs on random numbers."""
        for k in range(block.steps):
            logits = block.predict(block.alpha[k])
            found.append(logits.clone())
            best = torch.where(torch.arange(V) == V - 1, -torch.inf, logits).argmax(-1)
            block.write(torch.where((torch.arange(4) <= k)[None], best, block.x))
            yield

    how = {"block_size": 4, "sampler": listen, "steps": 3, "max_new_tokens": 8}
    last(generate.generate(net, process, [(1, 2), (3,)], **how))
    return found


def is_lesson(net):
    return type(net) is model.Transformer and all(type(layer) is model.Layer for layer in net.layers)


def lost(net, process):
    """A training step by the loss that train.py would take: the sum, its terms and all gradients."""
    x0, sizes = (
        torch.randint(V - 1, (3, 16), generator=torch.Generator().manual_seed(2)),
        torch.tensor([1, 4, 16]),
    )
    t, given = torch.tensor([0.2, 0.5, 0.8]).double(), torch.arange(16).expand(3, 16) < 2
    found = []
    for objective in ("elbo", "ce", "last"):
        net.zero_grad()
        total, terms = fast.token_loss(net, process, x0, sizes, t, objective, given, noise=noise(3, 16))
        total.backward()
        found += [total.detach(), terms, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
    return found


# ----- what the fast forms were written for


def test_the_lesson_is_what_the_fast_forms_were_written_for():
    """Red after an edit of the lesson. Then see that fast/ is right, as other tests do, and renew it."""
    now = {part: check.fingerprint(part) for part in check.PARTS}
    fix = f"if fast/ is still right, put {now} into fast/check.py. This prints it:\n{SHOW}"
    assert now == check.WRITTEN_FOR, f"the lesson was edited: {fix}"


LESSON_LIKE = '''
def f(x, flag):
    """Says what it does."""
    if flag:
        x = x + 1  # why
        x = 2 * x
    return x
'''
TEXTS = {
    "a comment": (("# why", "# because  it is so"), False),
    "no comment": (("  # why", ""), False),
    "a docstring": (('"""Says what it does."""', '"""\n    Says more.\n    """'), False),
    "no docstring": (('    """Says what it does."""\n', ""), False),
    "spaces": (("x + 1", "x  +  1"), False),
    "a line break": (("x = x + 1", "x = (x +\n                1)"), True),  # new brackets are new characters
    "a number": (("2 * x", "3 * x"), True),
    "a name": (("flag", "flags"), True),
    "a line moved out of a block": (("        x = 2 * x", "    x = 2 * x"), True),
    "a line moved into a block": (("    return x", "        return x"), True),
    "a # in a string": (("x + 1", 'x + len("#")'), True),
}


@pytest.mark.parametrize("name", TEXTS)
def test_comments_and_docstrings_are_no_code(name):
    (old, new), is_code = TEXTS[name]
    code = lambda text: "".join(edits.code_of(text)[0]).strip()
    before, after = code(LESSON_LIKE), code(LESSON_LIKE.replace(old, new))
    assert (before != after) == is_code


@pytest.mark.parametrize("timed", [False, True])
def test_the_check_takes_half_a_second(timed):
    took = []
    for i in range(5):
        check.verdict.cache_clear(), check.loss_verdict.cache_clear(), check.twins.cache_clear()
        net, process = network(timed), masked()
        clock = time.perf_counter()
        net, process, notes = fast.accelerate(net, process)
        took.append(time.perf_counter() - clock)
        assert type(net) is fast.FastTransformer and type(process) is not diffusion.Masked and not notes
    print(f"fast.accelerate takes {statistics.median(took):.3f} s with a fresh verdict")
    assert statistics.median(took) < 1.0, "meant to be below 0.5 s"


def test_nothing_is_left_behind_by_the_check():
    """Its random numbers are its own, modes stay, and undo gives the lesson back with the same weights."""
    net, process = network(), masked()
    weights = {k: p.clone() for k, p in net.named_parameters()}
    check.verdict.cache_clear(), check.loss_verdict.cache_clear(), check.twins.cache_clear()
    torch.manual_seed(5)
    want = torch.rand(3)
    for mode in (True, False):
        torch.manual_seed(5)
        quick, other, _ = fast.accelerate(net.train(mode), process)
        assert torch.equal(torch.rand(3), want)
        assert quick is net and quick.training == mode == quick.layers[0].training
        assert not any(p.grad is not None for p in quick.parameters())
    back, plain = check.undo(quick, other)
    assert is_lesson(back) and type(plain) is diffusion.Masked and vars(plain) == vars(process)
    assert all(torch.equal(p, weights[k]) for k, p in back.named_parameters())
    assert not {"block_class", "token_loss", "watch"} & vars(back).keys()


# ----- edits in memory, and of one network


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Cosine(nn.Linear):
    def forward(self, x):
        return 3 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Config(model.ModelConfig):
    pass


class Weight(nn.Parameter):
    pass


def scaled(f, by=1.5):
    return lambda *args, **how: by * f(*args, **how)


def both_scaled(f):
    return lambda *args, **how: tuple(1.5 * x for x in f(*args, **how))


def of_net(change):
    """An edit of one network, made when there is one."""
    return lambda patch: change


def of_class(owner, name, make):
    """An edit for all: owner.name becomes make(what it was)."""

    def edit(patch):
        patch.setattr(owner, name, make(vars(owner)[name]))

    return edit


def rms_layers(init):
    """Layer.__init__ with RMSNorm in place of LayerNorm."""

    @functools.wraps(init)
    def changed(self, cfg):
        init(self, cfg)
        self.norm1, self.norm2 = nn.RMSNorm(cfg.d_model), nn.RMSNorm(cfg.d_model)

    return changed


def put(name, make):
    def change(net):
        path, _, leaf = name.rpartition(".")
        owner = net.get_submodule(path)
        if leaf.isdigit():
            owner[int(leaf)] = make(owner[int(leaf)])
        else:
            setattr(owner, leaf, make(getattr(owner, leaf)))

    return change


def with_bias(norm):
    norm.bias = nn.Parameter(torch.full_like(norm.weight, 0.3))
    return norm


def with_eps(norm):
    norm.eps = 0.3
    return norm


def longer(mlp):
    return nn.Sequential(*mlp, nn.Linear(16, 16)).double()


def random_rms(norm):
    new = nn.RMSNorm(16).double()
    new.weight.data.copy_(norm.weight)
    return new


def hooked(net):
    net.layers[0].mlp.register_forward_hook(lambda module, args, out: 1.5 * out)


def pre_hooked(net):
    net.norm.register_forward_pre_hook(lambda module, args: (args[0] + torch.arange(16) / 5,))


def hooked_everywhere(patch):
    larger = lambda module, args, out: 1.1 * out if isinstance(module, nn.Linear) else None
    handle = nn.modules.module.register_module_forward_hook(larger)
    patch.callbacks.append(handle.remove)


def shared_layers(net):
    net.layers[1] = net.layers[0]


def another_cache(extend):
    """Keys of earlier blocks are forgotten a little."""

    def changed(self, i, k, v):
        k, v = extend(self, i, k, v)
        return k * 0.9, v

    return changed


def wide_mask(f):
    """A linear penalty on distance, as ALiBi has it, in place of a mask of booleans."""

    def changed(edge, group, n_clean_keys):
        mask = f(edge, group, n_clean_keys)
        distance = torch.arange(mask.size(-1), dtype=torch.float64)
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf) + 0.1 * distance

    return changed


def latent(embed_noisy):
    """A latent is added to the noisy embeddings."""
    z = torch.linspace(-1, 1, 16, dtype=torch.float64)
    return lambda self, tokens, **extra: embed_noisy(self, tokens, **extra) + z


def doubled(net):
    parametrize.register_parametrization(net.layers[0].out, "weight", Doubled())


def another_class(cls):
    return type("Layer", (cls,), {"forward": scaled(cls.forward)})


def own(name, method):
    """An edit of one network: a method put in place of one of its modules'."""

    def change(net):
        module = net.get_submodule(name)
        setattr(module, method, scaled(getattr(module, method)))

    return of_net(change)


T, L = model.Transformer, model.Layer
EDITS = {
    "RMSNorm as the final norm": of_net(put("norm", random_rms)),
    "RMSNorm in the layers": of_class(L, "__init__", rms_layers),
    "RMSNorm in one layer": of_net(put("layers.1.norm2", random_rms)),
    "a latent on the noisy embeddings": of_class(T, "embed_noisy", latent),
    "other embeddings": of_class(T, "embed_tokens", scaled),
    "another layer": of_class(L, "forward", scaled),
    "another condition": of_class(T, "condition", scaled),
    "other angles": of_class(T, "rope", both_scaled),
    "another head": of_class(T, "to_logits", scaled),
    "other logits": of_class(T, "forward", scaled),
    "another hidden": of_class(T, "hidden", both_scaled),
    "adaln": of_class(model, "adaln", both_scaled),
    "rotate": of_class(model, "rotate", scaled),
    "attention_mask": of_class(model, "attention_mask", wide_mask),
    "KVCache.extend": of_class(model.KVCache, "extend", another_cache),
    "a class in place of Layer": of_class(model, "Layer", another_class),
    "a hook": of_net(hooked),
    "a pre-hook": of_net(pre_hooked),
    "a hook for all modules": hooked_everywhere,
    "a parametrization": of_net(doubled),
    "spectral norm": of_net(lambda net: parametrizations.spectral_norm(net.layers[1].mlp[0])),
    "a method of one layer": own("layers.0", "forward"),
    "a method of the network": own("", "to_logits"),
    "a method of one norm": own("norm", "forward"),
    "another GELU": of_net(put("layers.0.mlp.1", lambda gelu: nn.GELU())),
    "SiLU": of_net(put("layers.0.mlp.1", lambda gelu: nn.SiLU())),
    "a longer MLP": of_net(put("layers.0.mlp", longer)),
    "a bias in a LayerNorm": of_net(put("norm", with_bias)),
    "another eps": of_net(put("layers.0.norm1", with_eps)),
    "cosine attention": of_net(lambda net: setattr(net.layers[1].qkv, "__class__", Cosine)),
    "layers that are one": of_net(shared_layers),
    "attention of PyTorch": of_class(F, "scaled_dot_product_attention", scaled),
    "LayerNorm of PyTorch": of_class(nn.LayerNorm, "forward", scaled),
    "GELU of PyTorch": of_class(nn.GELU, "forward", scaled),
    "Linear of PyTorch": of_class(nn.Linear, "forward", scaled),
    "F.linear": of_class(F, "linear", scaled),
    "largest embeddings": of_net(lambda net: setattr(net.embed, "max_norm", 0.5)),
}


MODEL_RUNS = ": running model.py as written (about 1.2 to 2.5 times slower)"
NOISE_RUNS = ": running diffusion.py as written, which is slower"
BLOCK_RUNS = ": running generate.Block as written, which takes more passes"


@pytest.fixture
def patch(monkeypatch):
    """monkeypatch, with `callbacks` that run at the end."""
    monkeypatch.callbacks = []
    yield monkeypatch
    for f in monkeypatch.callbacks:
        f()


@pytest.mark.parametrize("name", slow(EDITS, list(EDITS)[::3]))
def test_an_edited_network_is_what_runs(patch, name):
    """After a first verdict in the same process, too. A note says so, and logits are the edited lesson's."""
    before = told(*fast.accelerate(network(), masked())[:2])  # a verdict, and what the network said
    change = EDITS[name](patch)

    def edited():
        net = network()
        if change:
            change(net)
        return net

    want = told(edited(), masked())
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(want, before, strict=True)), "it does something"
    net, process, notes = fast.accelerate(edited(), masked())
    assert is_lesson(net) or "class" in name and type(net) is model.Transformer
    assert len(notes) == 1 and notes[0].endswith(MODEL_RUNS), notes
    for a, b in zip(told(net, process), want, strict=True):
        assert torch.equal(a, b)
    for mode in (False, True):  # and with the gradients of the lesson
        plain, quick = lost(edited().train(mode), masked()), lost(net.train(mode), process)
        agree([x for x in quick if x.isfinite().all()], [x for x in plain if x.isfinite().all()])


def test_dropout_trains_the_lesson():
    """The random numbers are the lesson's then. Without training there is nothing to drop."""
    net = network(dropout=0.5).train()
    twin = copy.deepcopy(net)
    net, process, notes = fast.accelerate(net, masked())
    assert is_lesson(net) and notes == ["dropout" + MODEL_RUNS]
    found = []
    for one, noises in ((net, process), (twin, masked())):
        torch.manual_seed(3)
        found.append(lost(one, noises))
    agree(*found)
    net, _, notes = fast.accelerate(network(dropout=0.5).eval(), masked())
    assert type(net) is fast.FastTransformer and not notes


def test_weights_of_another_kind_run_the_lesson():
    """A subclass of Parameter may do anything when it is multiplied."""
    net = network()
    net.head.weight = Weight(net.head.weight.data)
    net, _, notes = fast.accelerate(net, masked())
    assert is_lesson(net) and notes[0].startswith("head has weights of another kind: ")


def test_a_config_of_another_kind_runs_the_lesson():
    net = network()
    net.cfg.__class__ = Config
    net, _, notes = fast.accelerate(net, masked())
    assert is_lesson(net) and notes[0].startswith("its config is a Config: ")


def test_a_network_of_ones_own_runs_as_it_is():
    """A subclass is no edit: no note. It gets the fast block, and what it says is what it says."""

    class Latent(model.Transformer):
        embed_noisy = latent(model.Transformer.embed_noisy)

    net = Latent(network().cfg).double().eval()
    net.load_state_dict(network().state_dict())
    want = told(copy.deepcopy(net), masked())
    net, process, notes = fast.accelerate(net, masked())
    assert type(net) is Latent and not notes
    for a, b in zip(told(net, process), want, strict=True):
        assert torch.equal(a, b)


def test_a_network_of_ones_own_is_asked_at_every_step():
    """It may draw something anew in each pass: no prediction is kept, though nothing it read has changed."""
    asked = []

    class Restless(model.Transformer):
        def embed_noisy(self, tokens):
            asked.append(len(tokens))
            return super().embed_noisy(tokens)

    def twice(block):
        for k in range(2):
            block.predict(0.5)
            if k:
                block.verify(block.x), block.verify(block.x)
            yield

    net = Restless(network(timed=False).cfg).double().eval()
    for quick in (False, True):
        asked.clear()
        net, process, _ = fast.accelerate(net, uniform()) if quick else (net, uniform(), [])
        last(generate.generate(net, process, [()], block_size=4, sampler=twice, max_new_tokens=4))
        assert len(asked) == 4


# settings: other numbers, the same code


def test_weights_may_be_tied_or_frozen():
    """That is no edit either: the gradients are the lesson's."""
    net = network()
    net.head.weight = net.embed.weight
    net.layers[0].requires_grad_(False)
    quick, process, notes = fast.accelerate(copy.deepcopy(net), masked())
    assert not notes and quick.head.weight is quick.embed.weight
    agree(*([x for x in lost(*pair) if x.isfinite().all()] for pair in ((quick, process), (net, masked()))))


@pytest.mark.parametrize("name", ["rope_base", "default", "clean_causal", "heads"])
def test_a_setting_is_no_edit(monkeypatch, name):
    """Read as a network runs: the fast form sees a change of its config, before or after it was made fast."""
    if name == "default":
        monkeypatch.setattr(model.ModelConfig, "rope_base", 50.0)
        defaults = [50.0 if x == 10000.0 else x for x in model.ModelConfig.__init__.__defaults__]
        monkeypatch.setattr(model.ModelConfig.__init__, "__defaults__", tuple(defaults))
    net, process = network(clean_causal=name != "clean_causal", n_heads=4 if name == "heads" else 2), masked()
    assert name != "default" or net.cfg.rope_base == 50
    if name == "rope_base":
        net.cfg.rope_base = 50.0
    quick, _, notes = fast.accelerate(copy.deepcopy(net), process)
    assert type(quick) is fast.FastTransformer and not notes
    x, y = torch.randint(V - 1, (2, 3, 16))
    for base in (net.cfg.rope_base, 7.0):
        net.cfg.rope_base = quick.cfg.rope_base = base
        agree(quick(x, y, 4), net(x, y, 4))


# ----- edits of the noise, the loss and the block


def of_process(name, make):
    return lambda patch: lambda process: setattr(process, name, make(getattr(process, name)))


D, M, U = diffusion, diffusion.Masked, diffusion.Uniform
NOISE_EDITS = {
    "Masked.nll": (masked, of_class(M, "nll", scaled)),
    "Masked.ce": (masked, of_class(M, "ce", scaled)),
    "Uniform.nll": (uniform, of_class(U, "nll", scaled)),
    "Uniform.ce": (uniform, of_class(U, "ce", scaled)),
    "Uniform.last_step": (uniform, of_class(D.NoiseProcess, "last_step", scaled)),
    "Masked.corrupt": (
        masked,
        of_class(M, "corrupt", lambda f: lambda self, x0, alpha, noise=None: f(self, x0, alpha**2, noise)),
    ),
    "Uniform.evidence": (uniform, of_class(U, "evidence", scaled)),
    "Masked.pays": (masked, of_class(D.NoiseProcess, "pays", lambda f: lambda self, x0, xt: x0 > 3)),
    "Masked.loo_logits": (masked, of_class(D.NoiseProcess, "loo_logits", scaled)),
    "token_loss": (
        masked,
        of_class(D, "token_loss", lambda f: lambda *a, **k: tuple(3 * x for x in f(*a, **k))),
    ),
    "nats": (masked, of_class(D, "nats", scaled)),
    "noisy_stream": (uniform, of_class(D, "noisy_stream", lambda f: lambda p, x, *a: f(p, x.flip(0), *a))),
    "sigma": (masked, of_class(D, "sigma", scaled)),
    "sigma_for": (masked, of_class(D, "sigma_for", lambda f: lambda model, alpha: 2 * f(model, alpha))),
    "column": (masked, of_class(D, "column", lambda f: lambda alpha, like: 0.9 * f(alpha, like))),
    "nll of one process": (masked, of_process("nll", scaled)),
    "ce of one process": (uniform, of_process("ce", scaled)),
}


@pytest.mark.parametrize("name", NOISE_EDITS)
def test_edited_noise_is_what_runs(patch, name):
    """The loss is the edited lesson's, and a note says so; the network stays fast."""
    make, edit = NOISE_EDITS[name]
    before = lost(*fast.accelerate(network(), make())[:2])
    change = edit(patch)
    process, other = make(), make()
    if change:
        change(process), change(other)
    want = lost(network(), other)
    finite = [(a, b) for a, b in zip(want, before, strict=True) if b.isfinite().all()]
    assert any((a - b).abs().max() > 1e-3 for a, b in finite), "it does something"
    net, process, notes = fast.accelerate(network(), process)
    assert type(process) in (M, U) and notes[0].endswith(NOISE_RUNS), notes
    assert len(notes) == 1 or name.startswith("sigma"), "the block asks for a noise level too"
    assert type(net) is fast.FastTransformer
    agree(lost(net, process), want)


DRAW_EDITS = {
    "Masked.posterior_probs": (
        masked,
        of_class(M, "posterior_probs", lambda f: lambda *a, **k: f(*a, **k) ** 3),
    ),
    "Uniform.posterior_probs": (
        uniform,
        of_class(U, "posterior_probs", lambda f: lambda *a, **k: f(*a, **k) ** 3),
    ),
    "posterior_sample": (
        uniform,
        of_class(D.NoiseProcess, "posterior_sample", lambda f: lambda *a, **k: f(*a, **k) // 2),
    ),
    "sharpen": (masked, of_class(D, "sharpen", lambda f: lambda z, *a: f(3 * z, *a))),
    "draw": (masked, of_class(D, "draw", lambda f: lambda p, noise: f(p**3, noise))),
    "exponential": (uniform, of_class(rng, "exponential", lambda f: lambda u: f(u) ** 0.3)),
    "rng.draw": (uniform, of_class(rng, "draw", lambda f: lambda p, noise: f(p**3, noise))),
    "Noise.uniform": (masked, of_class(rng.Noise, "uniform", lambda f: lambda self, n: f(self, n) ** 2)),
}


@pytest.mark.parametrize("name", DRAW_EDITS)
def test_edited_draws_are_what_runs(patch, name):
    """Block by block the text is the edited lesson's."""
    make, edit = DRAW_EDITS[name]
    how = {"block_size": 4, "steps": 3, "seed": 1}
    write = lambda net, process: last(generate.generate(net, process, [()] * 20, **how)).x
    write(*fast.accelerate(network(), make())[:2])
    unedited = write(network(), make())
    edit(patch)
    want = write(network(), make())
    assert name == "rng.draw" or not torch.equal(want, unedited), "it does something"
    net, process, notes = fast.accelerate(network(), make())
    assert type(process) in (M, U) and notes and notes[0].endswith(NOISE_RUNS), notes
    assert torch.equal(write(net, process), want)


B = generate.Block
BLOCK_EDITS = {
    "predict": of_class(B, "predict", lambda f: lambda self, *a, **k: 3 * f(self, *a, **k)),
    "verify": of_class(B, "verify", lambda f: lambda self, y: 3 * f(self, y)),
    "reverse": of_class(B, "reverse", lambda f: lambda self, *a, **k: f(self, *a, **k) // 2),
    "posterior": of_class(B, "posterior", lambda f: lambda self, *a, **k: f(self, *a, **k) // 2),
    "forward": of_class(B, "forward", lambda f: lambda self, *a, **k: 3 * f(self, *a, **k)),
    "grid": of_class(B, "grid", lambda f: lambda self, steps: [a**2 for a in f(self, steps)]),
    "noise": of_class(B, "noise", lambda f: lambda self, k: f(self, k + 7)),
    "ar_draw": of_class(B, "ar_draw", lambda f: lambda self, logits: f(self, 3 * logits)),
    "sigma_for": of_class(generate, "sigma_for", lambda f: lambda net, alpha: 2 * f(net, alpha)),
}


@pytest.mark.parametrize("name", BLOCK_EDITS)
def test_an_edited_block_is_what_runs(patch, name):
    how = {"block_size": 4, "steps": 3, "seed": 1, "ar_tokens": 4, "sampler": SAMPLERS["arpc"]}
    write = lambda net, process: last(generate.generate(net, process, [(1,)] * 20, **how)).x
    net, process, _ = fast.accelerate(network(), uniform())
    unedited = write(net, process)
    BLOCK_EDITS[name](patch)
    want = write(network(), process)
    assert not torch.equal(want, unedited), "it does something"
    net, process, notes = fast.accelerate(network(), uniform())
    assert len(notes) == 1 and notes[0].endswith(BLOCK_RUNS), notes
    assert type(net) is fast.FastTransformer and not hasattr(net, "block_class")
    assert torch.equal(write(net, process), want)


def test_a_block_of_ones_own_stays():
    class Mine(generate.Block):
        pass

    net = network()
    net.block_class = Mine
    assert fast.accelerate(net, masked())[0].block_class is Mine


# ----- edits after fast.accelerate


def idle(self, x, *args, **how):
    """A layer that does nothing."""
    return x


LATE = {
    "a function": lambda patch, net: patch.setattr(model, "rotate", scaled(model.rotate)),
    "a method": lambda patch, net: patch.setattr(L, "forward", scaled(L.forward)),
    "code in place": lambda patch, net: patch.setattr(L.forward, "__code__", idle.__code__),
    "PyTorch": lambda patch, net: patch.setattr(nn.LayerNorm, "forward", scaled(nn.LayerNorm.forward)),
    "a norm": lambda patch, net: put("norm", random_rms)(net),
    "a GELU": lambda patch, net: put("layers.1.mlp.1", lambda gelu: nn.SiLU())(net),
    "an eps": lambda patch, net: put("layers.1.norm1", with_eps)(net),
    "a bias": lambda patch, net: put("norm", with_bias)(net),
    "a hook": lambda patch, net: hooked(net),
    "a hook for all": lambda patch, net: hooked_everywhere(patch),
    "a parametrization": lambda patch, net: doubled(net),
    "a method of one norm": lambda patch, net: setattr(net.norm, "forward", scaled(net.norm.forward)),
    "a method of the network": lambda patch, net: setattr(net, "to_logits", scaled(net.to_logits)),
    "the loss": lambda patch, net: patch.setattr(M, "nll", scaled(M.nll)),
    "the block": lambda patch, net: patch.setattr(B, "predict", scaled(B.predict)),
}


@pytest.mark.parametrize("name", LATE)
def test_an_edit_after_accelerate_is_an_error(patch, name):
    """Not a silence. Another fast.accelerate makes it run."""
    net, process, notes = fast.accelerate(network(), masked())
    told(net, process), lost(net, process)
    assert not notes
    LATE[name](patch, net)
    with pytest.raises(RuntimeError, match="after fast.accelerate, which would not see it"):
        told(net, process), lost(net, process)
    net, process, notes = fast.accelerate(net, process)
    assert len(notes) == 1, notes
    told(net, process), lost(net, process)


def test_a_copy_is_looked_at_too():
    """The moving average is a copy of the network. What fast/ calls as it finds it may be replaced."""
    net, process, _ = fast.accelerate(network(), masked())
    other = copy.deepcopy(net)
    told(other, process)
    other.time = nn.Sequential(net.time, nn.Identity())
    other.forward, forward = (lambda *a, **k: 2 * forward(*a, **k)), other.forward
    for a, b in zip(told(other, process)[:3], told(net, process)[:3], strict=True):
        assert torch.equal(a, 2 * b)
    hooked(other)
    with pytest.raises(RuntimeError, match="layers.0.mlp has hooks after"):
        told(other, process)


# ----- a fast form that is wrong


@pytest.mark.parametrize("name", ["rotate", "modulate", "attend", "extend", "fails"])
def test_a_wrong_fast_network_steps_aside(monkeypatch, name):
    """Also one that fails, as with a compiler that is not there."""
    check.verdict.cache_clear()
    if name == "extend":
        extend = fast.network.FastCache.extend
        wrong = lambda self, i, k, v: [1.001 * x for x in extend(self, i, k, v)]
        monkeypatch.setattr(fast.network.FastCache, "extend", wrong)
    elif name == "fails":

        def fails(*args):
            raise OSError("no compiler\nand more")

        monkeypatch.setattr(fast.network, "attend", fails)
    else:
        monkeypatch.setattr(fast.network, name, scaled(getattr(fast.network, name), 1.001))
    net, process, notes = fast.accelerate(network(), masked())
    monkeypatch.undo()
    check.verdict.cache_clear(), check.loss_verdict.cache_clear()
    assert is_lesson(net) and type(process) is not M
    why = "failed (OSError: no compiler)" if name == "fails" else "gave other numbers than model.py"
    assert notes == [f"the fast network {why}" + MODEL_RUNS]


@pytest.mark.parametrize("name", ["cross_entropy_pytorch", "uniform_nll_pytorch", "gradient", "through_head"])
def test_a_wrong_fast_loss_steps_aside(monkeypatch, name):
    import kernels
    from fast import loss

    make = uniform if name == "uniform_nll_pytorch" else masked
    check.loss_verdict.cache_clear()
    if name == "gradient":
        right = kernels.cross_entropy_pytorch

        def wrong(z, grad, *args):
            out = right(z, grad, *args)
            if grad is not None:
                grad *= 1.001
            return out

        monkeypatch.setattr(kernels, "cross_entropy_pytorch", wrong)
    elif name == "through_head":
        wrong = lambda *a, f=loss.through_head: [1.001 * x for x in f(*a)]
        monkeypatch.setattr(loss, "through_head", wrong)
        monkeypatch.setattr(loss, "uncompiled", lambda: wrong)
    else:
        right = getattr(kernels, name)
        larger = lambda x: tuple(1.001 * y for y in x) if isinstance(x, tuple) else 1.001 * x
        wrong = lambda *args: larger(right(*args))
        monkeypatch.setattr(kernels, name, wrong)
    net, process, notes = fast.accelerate(network(), make())
    monkeypatch.undo()
    check.loss_verdict.cache_clear()
    assert type(process) in (M, U) and type(net) is fast.FastTransformer
    assert notes == ["the fast loss gave other numbers than diffusion.py" + NOISE_RUNS]


def test_all_processes_take_one_path():
    """Each is asked as often as the others, whatever it found. One that cannot takes the others along."""
    asked = []
    net, process, notes = fast.accelerate(network(), masked(), lambda fine: asked.append(fine) or False)
    assert asked == [True, True, True] and is_lesson(net) and type(process) is M and len(notes) == 3
    assert all(note.startswith("another process found an edit: ") for note in notes)
    asked.clear()
    odd = network()
    hooked(odd)
    fast.accelerate(odd, masked(), lambda fine: asked.append(fine) or fine)
    assert asked == [False, True, True]


# ----- edits in the files

FILE_EDITS = {
    "nothing": ("model.py", "", "", (1, 1, 1)),
    "a comment": ("model.py", "class Layer(nn.Module):", "# a layer\nclass Layer(nn.Module):", (1, 1, 1)),
    "a docstring": (
        "model.py",
        'def rotate(x, cos, sin):\n    """',
        'def rotate(x, cos, sin):\n    """New. ',
        (1, 1, 1),
    ),
    "a default": ("model.py", "n_layers: int = 4", "n_layers: int = 3", (1, 1, 1)),
    "a new function": (
        "diffusion.py",
        "SCHEDULES = ",
        "def linear(t):\n    return t\n\n\nSCHEDULES = ",
        (1, 1, 1),
    ),
    "RMSNorm as the final norm": (
        "model.py",
        "self.norm = nn.LayerNorm(D, bias=False)",
        "self.norm = nn.RMSNorm(D)",
        (0, 1, 1),
    ),
    "RMSNorm in the layers": (
        "model.py",
        "self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)",
        "self.norm1, self.norm2 = nn.RMSNorm(D), nn.RMSNorm(D)",
        (0, 1, 1),
    ),
    "a latent": (
        "model.py",
        "        return self.embed_tokens(tokens)\n",
        "        return self.embed_tokens(tokens) + torch.linspace(-1, 1, 16)\n",
        (0, 1, 1),
    ),
    "an indentation": (
        "model.py",
        "        if cache is not None:\n            cache.commit(C)\n",
        "            if cache is not None:\n                cache.commit(C)\n",
        (0, 1, 1),
    ),
    "the weight of the bound": (
        "diffusion.py",
        "weight * self.ce(logits, x0, xt)",
        "2 * weight * self.ce(logits, x0, xt)",
        (1, 0, 1),
    ),
    "the draw": ("rng.py", "return (E / p).argmin(-1)", "return (E / p**2).argmin(-1)", (1, 0, 0)),
    "the block": (
        "generate.py",
        "def predict(self, alpha, x=None, **extra):",
        "def predict(self, alpha, x=None, **more):\n        extra = more",
        (1, 1, 0),
    ),
    "a sampler": (
        "generate.py",
        "def ancestral(block, *, greedy_tail=False):",
        "def ancestral(block, *, greedy_tail=True):",
        (1, 1, 1),
    ),
}

TRIAL = """
import sys
sys.path.insert(0, {home!r})
{first}
import torch, model, diffusion, generate, fast
torch.manual_seed(0)
shape = {{"n_layers": 2, "n_heads": 2, "d_model": 16, "cond_dim": 8}}
net = model.Transformer(model.ModelConfig(6, 8, time_conditioning=True, **shape))
for p in net.parameters():
    torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
x = torch.arange(16).view(2, 8) % 5
run = lambda: net.eval()(x, x.flip(1), 4, sigma=torch.ones(2))
want = run()
net, process, notes = fast.accelerate(net, diffusion.Masked(6, 5))
quick = isinstance(net, fast.FastTransformer), type(process) is not diffusion.Masked
ran = *quick, hasattr(net, "block_class")
assert len(notes) == 3 - sum(ran), notes
assert all((run() - want).abs().amax(dim=(0, 1)) < 1e-5)
print(*map(int, ran), *notes, sep="|")
"""


def trial(home, first=""):
    """What runs fast in a fresh process whose modules come from a folder: three numbers and the notes."""
    program = TRIAL.format(home=str(home), first=first)
    p = subprocess.run([sys.executable, "-c", program], cwd=home, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return p.stdout.strip().splitlines()[-1].split("|")


@pytest.fixture(scope="module")
def project_copy(tmp_path_factory):
    home = tmp_path_factory.mktemp("project")
    copy_project(home)
    return home


EDITS_HERE = ["the block"]  # a new Python each: seconds


@pytest.mark.parametrize("name", slow(FILE_EDITS, EDITS_HERE))
def test_an_edited_file_is_what_runs(project_copy, capfd, name):
    """As a student edits: the file, then a new Python. Which parts run fast, and a note for each other."""
    file, old, new, want = FILE_EDITS[name]
    path = project_copy / file
    text = path.read_text()
    assert text.count(old) == 1 or not old, f"{file} does not have {old!r} once"
    with capfd.disabled():
        try:
            path.write_text(text.replace(old, new, 1))
            ran = trial(project_copy)
        finally:
            path.write_text(text)
    assert tuple(map(int, ran[:3])) == want, ran
    parts = ("model.py", "diffusion.py", "generate.Block")
    slow = [f"{part} was edited" for part, is_fast in zip(parts, want, strict=True) if not is_fast]
    assert [note.partition(":")[0] for note in ran[3:]] == slow


def test_an_edit_before_fast_is_imported_is_seen(project_copy, capfd):
    """A script that puts its own function into model.py, and then imports the rest."""
    first = "import model, rng; rotate = model.rotate; model.rotate = lambda *a: 2 * rotate(*a)"
    with capfd.disabled():
        *ran, note = trial(project_copy, first)
        assert ran == ["0", "1", "1"] and note == "model.rotate was replaced" + MODEL_RUNS


@pytest.mark.slow
def test_an_edit_of_pytorch_and_a_module_read_again_are_seen(project_copy, capfd):
    with capfd.disabled():
        first = """from torch.nn import LayerNorm
forward = LayerNorm.forward
LayerNorm.forward = lambda *args: 2 * forward(*args)"""
        *ran, note = trial(project_copy, first)
        assert ran == ["0", "1", "1"] and note.startswith("PyTorch's LayerNorm.forward was replaced: ")
        first = """import importlib, fast, model, diffusion
net = fast.accelerate(model.Transformer(model.ModelConfig(6, 8)), diffusion.Masked(6, 5))[0]
assert type(net) is fast.FastTransformer
importlib.reload(model)"""
        *ran, note = trial(project_copy, first)
        assert ran == ["0", "1", "1"] and "was replaced: running model.py as written" in note
