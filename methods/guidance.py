"""
Guidance: a label y steers sampling, by a network that knows the label or by a classifier of noisy text.

    classifier-free   p ∝ p(.|y)^gamma p(.)^(1 - gamma)    the same network, with the label and without it
    classifier-based  q(v) ∝ q_s(v) c(y | x_t with v at i)^gamma              c: a classifier of its own

gamma 0 leaves the label out, 1 is the conditional model, more exaggerates. For masked noise p is the
prediction of x_0: a mixture of reverse steps q_s would lift too many masks. For uniform noise p is q_s.
Simple Guidance Mechanisms for Discrete Diffusion Models, arXiv 2412.10193.

The label is read off the row by a rule (--label). In training it is added to the embeddings of the noisy
stream, and in some rows left out. The clean stream never sees it, so one cache serves both predictions.
eval.py and all other samplers use the network without a label.

    python train.py config/sudoku.toml --method guidance --label "16:1|2,19:3|4" --out_dir out/guidance
    python sample.py --ckpt out/guidance --sampler classifier_free --gamma 2
    python sample.py --ckpt out/guidance --sampler classifier_based --gamma 2 --first_order
"""

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import diffusion
import methods
from diffusion import pick, sigma_for
from generate import ancestral, sampler
from model import Transformer
from rng import draw, uniforms
from run.cli import die
from samplers.pieces import made_by, need

NO_LABEL = 2  # labels are 0 and 1


@dataclass
class Settings:
    # y = 1 in a row that has one of these ids at each of these positions, else 0: POSITION:ID|ID,...
    label: str = "16:1|2,19:3|4"
    drop: float = 0.1  # the share of rows that are trained without their label
    classifier_layers: int = 2  # 0: no classifier, and no classifier-based guidance


FIXED = ("label", "classifier_layers")


def check(cfg, settings):
    if parse(settings.label) is None:
        die(f"label {settings.label!r} is not POSITION:ID|ID,...", '--label "16:1|2,19:3|4"')
    if not 0 < settings.drop < 1:
        die(f"drop is {settings.drop}, it must be between 0 and 1", "--drop=0.1")
    if settings.classifier_layers < 0:
        problem = f"classifier_layers is {settings.classifier_layers}, it must be at least 0"
        die(problem, "--classifier_layers=2")
    if cfg.next_token:
        die("a next-token network has no noisy stream to put a label into", "--next_token=false")


def parse(label):
    """{position: ids} of "16:1|2,19:3|4", or None if it is something else."""
    rule = {}
    for part in label.split(","):
        position, _, ids = part.partition(":")
        numbers = [position, *ids.split("|")]
        if not all(n.strip().isdecimal() for n in numbers) or int(position) in rule:
            return None
        rule[int(position)] = [int(n) for n in numbers[1:]]
    return rule


def label_of(x0, label):
    """y (B,) int64 of rows x0 (B, L): 1 where all that the rule says is so."""
    holds = [torch.isin(x0[:, i], torch.tensor(ids, device=x0.device)) for i, ids in parse(label).items()]
    return torch.stack(holds).all(0).long()


# ----- the networks


def network(model_cfg, settings):
    return Guided(model_cfg, settings.classifier_layers)


class Guided(Transformer):
    """A Transformer whose noisy tokens carry a label. At first the label changes nothing."""

    def __init__(self, cfg, classifier_layers):
        super().__init__(cfg)
        self.label = nn.Embedding(3, cfg.d_model)
        nn.init.zeros_(self.label.weight)
        self.classifier = None
        if classifier_layers:
            self.classifier = Classifier(replace(cfg, n_layers=classifier_layers))

    def embed_noisy(self, tokens, label=NO_LABEL):
        """label: an int, or (B,) int64."""
        x = self.embed_tokens(tokens)
        return x + self.label(torch.as_tensor(label, device=x.device)).view(-1, 1, x.size(-1))

    def condition(self, sigma, C, N, label=NO_LABEL):
        return super().condition(sigma, C, N)

    def forward(
        self, clean, noisy, block_size, start=0, sigma=None, cache=None, label=NO_LABEL, returns="logits"
    ):
        """returns: "logits" (B, N, V), or "both", (logits, log c (B, N, 2) or None)."""
        logits = super().forward(clean, noisy, block_size, start, sigma, cache, label=label)
        if returns == "logits":
            return logits
        judged = self.classifier is not None
        return logits, self.classifier(clean, noisy, block_size, start, sigma) if judged else None


class Classifier(Transformer):
    """log c(y | x_t) of a noisy block behind its clean context, by a Transformer of its own."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.head = nn.Linear(cfg.d_model, 2)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def forward(self, clean, noisy, block_size, start=0, sigma=None):
        """log c(y | x_t), (B, N, 2): at each token that of its block. Arguments as in model.Transformer."""
        C = 0 if clean is None else clean.size(1)
        h, cond = self.hidden(clean, noisy, block_size, start, sigma)
        at = start + torch.arange(h.size(1) - C, device=h.device)
        block = at // torch.as_tensor(block_size, device=h.device).view(-1, 1)  # (B or 1, N)
        together = (block[:, :, None] == block[:, None]).to(h)  # (B or 1, N, N)
        mean = together @ h[:, C:] / together.sum(-1, keepdim=True)
        return self.to_logits(mean, None if cond is None else cond[:, C:]).log_softmax(-1)


# ----- training


class Labelled:
    """A network that is told the labels: what token_loss calls in its place. It keeps what c said."""

    def __init__(self, forward, label):
        self.forward, self.module, self.label = forward, getattr(forward, "module", forward), label

    def __call__(self, clean, noisy, block_size, start=0, sigma=None):
        how = {"label": self.label.to(noisy.device), "returns": "both"}
        logits, self.log_c = self.forward(clean, noisy, block_size, start, sigma, **how)
        return logits


class Learner(methods.Learner):
    def __init__(self, cfg, settings, model, process, token_loss):
        super().__init__(cfg, settings, model, process, self.labelled_loss)
        rule, fix = parse(settings.label), '--label "POSITION:ID|ID,..."'
        if max(rule) >= cfg.seq_len:
            die(f"label: position {max(rule)} is beyond seq_len {cfg.seq_len}", fix)
        most, known = max(map(max, rule.values())), process.vocab_size - (process.mask_id is not None)
        if most >= known:
            die(f"label: id {most} is beyond the {known} ids of {cfg.dataset}", fix)

    def labelled_loss(self, forward, process, x0, block_size, t, objective, start, charged, noise, **how):
        """
        token_loss with labels, plus the classifier's cross-entropy -log c(y | x_t), in nats, at each token
        that is charged. Both read the same x_t.
        """
        y = label_of(x0, self.settings.label)
        # a coin a row, by its last position: the same however a batch is split. It uses up no random number
        coin = uniforms(copy.copy(noise).keys()[:, -1], 1)
        model = Labelled(forward, torch.where(coin <= self.settings.drop, NO_LABEL, y))
        how |= {"start": start, "charged": charged, "noise": noise}
        total, per_token = diffusion.token_loss(model, process, x0, block_size, t, objective, **how)
        if model.log_c is not None:
            y, charged = y.to(per_token.device), charged[:, start:].to(per_token.device)
            cost = -pick(model.log_c, y[:, None].expand(charged.shape))
            total = total + torch.where(charged, cost, 0.0).sum()
        return total, per_token


# ----- sampling


def mix(log_told, log_untold, gamma):
    """gamma log_told + (1 - gamma) log_untold, (..., V), not normalised. The floor avoids -inf + inf."""
    return gamma * log_told.clamp(min=-1e6) + (1 - gamma) * log_untold.clamp(min=-1e6)


def classifier_free_probs(process, told, untold, xt, alpha_t, alpha_s, gamma, temperature=1.0, top_p=1.0):
    """
    The guided reverse step, (B, L, V) float64, of logits with and without the label:
        masked   q(x_s | x_t, p)  with  p ∝ p(.|y)^gamma p(.)^(1 - gamma), which temperature and top_p sharpen
        uniform  q ∝ q(x_s | x_t, l(.|y))^gamma q(x_s | x_t, l)^(1 - gamma), they sharpen both l
    """
    step = lambda logits: process.posterior_probs(logits, xt, alpha_t, alpha_s, temperature, top_p)
    if process.absorbing:
        both = (process.loo_logits(z.double()).log_softmax(-1) for z in (told, untold))
        return step(mix(*both, gamma))
    return mix(step(told).log(), step(untold).log(), gamma).softmax(-1)


def classifier_based_probs(q, log_c, gamma):
    """q(v) c(y | x_t with v at i)^gamma, normalised, (B, L, V). log_c may lack what is the same for all v."""
    return (q.log() + gamma * log_c).softmax(-1)


def exact_log_c(ask, x, V):
    """log c(y | x with v at i), (R, b, V), one pass a position. ask: tokens (n R, b) -> log c (n R,)."""
    found = []
    for i in range(x.size(1)):
        other = x.repeat(V, 1)  # (V R, b)
        other[:, i] = torch.arange(V, device=x.device).repeat_interleave(len(x))
        found.append(ask(other).view(V, len(x)).T)
    return torch.stack(found, dim=1).double()


def first_order_log_c(ask, x, V):
    """
    log c(y | x with v at i) - log c(y | x), (R, b, V), to first order: G_iv - G_iz, where z is what stands at
    i and G the gradient at the one-hot x. ask is called once.
    """
    with torch.inference_mode(False), torch.enable_grad():
        one_hot = F.one_hot(x, V).double().requires_grad_()
        (slope,) = torch.autograd.grad(ask(one_hot).sum(), one_hot)
    return slope - pick(slope, x)[..., None]


def asker(block, alpha, label):
    """ask(tokens) -> log c(label | tokens), (n R,), of n versions of the block: ids (n R, b), or weights."""
    begin, net = int(block.positions[0]), block.model.classifier
    device, size = net.embed.weight.device, len(block.positions)
    level = sigma_for(net, torch.tensor([alpha], dtype=torch.float64))

    def ask(tokens):
        clean = block.text[block.rows, :begin].clamp(min=0).repeat(len(tokens) // len(block.rows), 1)
        if tokens.is_floating_point():
            tokens = tokens.to(net.embed.weight.dtype)
        return net(clean.to(device), tokens.to(device), size, begin, level)[:, 0, label].to(block.x.device)

    return ask


def check_request(block, label, gamma):
    made_by(isinstance(block.model, Guided), "guidance")
    need(label in (0, 1), "label", label, "0 or 1")
    need(0 <= gamma < 1e6, "gamma", gamma, "at least 0 and below 1e6")


def settle(block):
    """Rows in which no token can change any more need no pass. Is a row left?"""
    block.live = block.live & (block.open & block.process.can_change(block.x)).any(1)
    return block.live.any()


@sampler()
def classifier_free(block, *, label=1, gamma=1.0):
    """
    Classifier-free guidance (arXiv 2412.10193), for networks of --method guidance: ancestral steps of

        p ∝ p(.|y)^gamma p(.)^(1 - gamma)      masked: of x_0; uniform: of x_s

    Two passes a step; gamma 0 (no label) and 1 (the conditional model) take one.

    label: y, 1 or 0
    gamma: more than 1 exaggerates the label
    """
    check_request(block, label, gamma)
    for k in range(block.steps):
        (a_t, a_s), noise = block.alpha[k : k + 2], block.noise(k)
        told = block.predict(a_t, label=label) if gamma != 0 else None
        untold = block.predict(a_t) if gamma != 1 else None
        if told is None or untold is None:
            block.write(block.posterior(untold if told is None else told, a_t, a_s, noise))
        else:
            how = told, untold, block.x, a_t, a_s, gamma, block.temperature, block.top_p
            block.write(draw(classifier_free_probs(block.process, *how), noise))
        yield
        if not settle(block):
            return


@sampler()
def classifier_based(block, *, label=1, gamma=1.0, first_order=False):
    """
    Classifier-based guidance (arXiv 2412.10193), for networks of --method guidance: ancestral steps without
    the label, each position weighed by the classifier,

        q(v) ∝ q(x_s = v | x_t) c(y | x_t with v at i)^gamma

    A step asks the classifier about each token at each position: b more passes for a block of b.

    label: y, 1 or 0
    gamma: more than 1 exaggerates the label
    first_order: one pass instead of b, by the gradient of log c
    """
    check_request(block, label, gamma)
    if gamma == 0:
        yield from ancestral(block)
        return
    need(block.model.classifier is not None, "classifier_layers", 0, "at least 1 in training")
    process, V = block.process, block.process.vocab_size
    log_c_of = first_order_log_c if first_order else exact_log_c
    passes, versions = (1, 1) if first_order else (block.x.size(1), V)
    for k in range(block.steps):
        (a_t, a_s), noise = block.alpha[k : k + 2], block.noise(k)
        logits = block.predict(a_t)
        q = process.posterior_probs(logits, block.x, a_t, a_s, block.temperature, block.top_p)
        log_c = log_c_of(asker(block, a_t, label), block.x, V)
        for _ in range(passes):
            block.count(versions * len(block.x) * (int(block.positions[-1]) + 1))
        block.write(draw(classifier_based_probs(q, log_c, gamma), noise))
        yield
        if not settle(block):
            return


ROWS = [
    {
        "system": "Guidance",
        "paper": "2412.10193",
        "claim": "at gamma 4 more grids stay right with uniform noise than with masked noise",
        "train": "--method guidance --process uniform",
        "control": "--method guidance --time_conditioning true",
        "sampler": "classifier_free gamma=4",
        "control_sampler": "classifier_free gamma=4",
        "by": "right 8",
        "tasks": ["sudoku"],
    }
]
