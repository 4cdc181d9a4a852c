"""
How is a text made? The one loop of generation: blocks, prompts, the KV cache, early ends and counting passes.

What happens inside a block is a sampler's business: samplers.py, unmasking.py, guided.py, one function each. Letters as in
diffusion.py, and R the rows still in the batch, b the block size.
"""

import copy
import functools
from dataclasses import dataclass

import torch

from diffusion import loglinear, sigma_for
from fast.attention import dtype_of
from fast.cache import KVCache
from fast.draws import Noise, sample, sharpen
from fast.graphs import Recorded
from kernels import send
from samplers.guided import agreement, arpc, edlm, speculation
from samplers.reverse import ancestral, ar, first_hitting, gibbs, max_coupling, psi, remdm_cap, remdm_conf, remdm_loop, remdm_rescale
from samplers.unmasking import confidence, entropy_bound, factor, prophet, rcr, saber, sched, threshold

SAMPLERS = {
    f.__name__: f
    for f in (ancestral, ar, arpc, psi, remdm_cap, remdm_rescale, remdm_conf, remdm_loop, first_hitting, confidence, threshold, factor,
              entropy_bound, rcr, saber, prophet, sched, gibbs, max_coupling, edlm, agreement, speculation)
}  # fmt: skip
MASKED_ONLY = {remdm_cap, remdm_rescale, remdm_conf, remdm_loop, first_hitting}
UNIFORM_ONLY = {gibbs, max_coupling}
READS_AR = {arpc, edlm, agreement, speculation}  # block size 1 of the same network (ARPC not with corruption random or diffusion)
OWN_PACE = {ar, first_hitting, speculation}  # as many passes as they need: steps mean nothing

NOTHING = -1  # in State.x: not written yet, or behind the end of a row


@dataclass
class State:
    """What generate yields after every step."""

    x: torch.Tensor  # (B, W) int64: prompts, finished blocks, the block at work with its noise; NOTHING elsewhere
    span: tuple  # (first, end) of the block at work
    step: int  # steps done on it: 0 when it is pure noise
    finished: bool  # the block is written
    done: torch.Tensor  # (B,) bool: the row has ended
    nfe: int  # forward passes so far
    nfe_rows: torch.Tensor  # (B,) int64: those that this row needed
    token_forwards: int  # tokens pushed through the network so far (its last layer may see fewer)


class Block:
    """
    The block at work, as a sampler sees it. Its tensors lie where sampling is done: on the model's device, or the CPU for Apple's
    GPUs, which have no float64.

    x (R, b) int64       its tokens: the prompt's where a prompt ends inside, noise elsewhere. `write` changes it
    open (R, b) bool     positions to generate
    live (R,) bool       rows that need more passes; a row that the sampler takes out is not run again
    alpha                steps + 1 numbers, noise levels from 0 (pure noise) to 1 (clean): the schedule on a linear grid of times
    process, steps, temperature, top_p
    """

    def __init__(
        self, *, model, passes, process, cache, counts, text, rows, span, open, seed, trained, steps, schedule, temperature, top_p
    ):
        self.model, self.passes, self.process, self.cache, self.counts = model, passes, process, cache, counts
        self.seed, self.trained = seed, trained
        self.temperature, self.top_p, self.schedule, self.text = temperature, top_p, schedule, text
        self.here, self.span = rows, span  # on the CPU
        self.rows, self.positions, self.open, self.where = (self.there(y) for y in (rows, span, open, open.flatten().nonzero()[:, 0]))
        self.given = text[self.rows[:, None], self.positions]  # prompt, and whatever stands in rows that wait
        self.steps = steps or len(span)
        self.alpha, self.noises = self.grid(self.steps), {}
        self.live = self.open.any(1)
        self.x = torch.where(self.open, self.prior(self.noise(-1)), self.given.clamp(min=0))
        self.read = self.logits = None  # what the last predict read, and said
        self.first = None  # what verify said of the first position, (R, 1, V)

    # ----- what a sampler may do

    def there(self, x):
        """x where sampling is done; the host does not wait for it."""
        return send(x, self.text.device)

    def noise(self, k):
        """Random numbers of step k >= 0; -1 made the pure noise, -2 what block size 1 reads."""
        if k not in self.noises:  # some steps at once take as long as one; those gone by are forgotten
            steps = torch.arange(k, k + 1 if k < 0 else k + min(self.steps, 16), device=self.rows.device)[:, None, None]
            before = {i: noise for i, noise in self.noises.items() if i < 0}
            self.noises = before | dict(enumerate(Noise(self.seed, self.rows, self.positions, steps).unbind(), k))
        return copy.copy(self.noises[k])

    def grid(self, steps):
        """alpha at steps + 1 equally spaced times from 1 to 0; the last is 1 exactly, whatever the schedule rounds to."""
        return self.schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64))[0].tolist()[:-1] + [1.0]

    def prior(self, noise):
        """Pure noise, (R, b)."""
        return self.process.prior((len(self.rows), len(self.positions)), noise, self.rows.device)

    def write(self, x):
        """x at the open positions of live rows."""
        self.x = torch.where(self.open & self.live[:, None], x, self.x)

    def predict(self, alpha, x=None):
        """
        The network's output (R, b, V) for the block at noise level alpha, a number or (R,). One pass of the rows that are live, and
        for a network that does not see alpha only of those whose tokens changed since its last prediction: no pass if none did.
        """
        x, need = self.x if x is None else x, self.live
        if self.model.timeless and self.read is not None:
            need = need & (x != self.read).any(1)
        if (run := need.cpu()).any():
            logits = self._forward(run, None, x, len(self.positions), alpha)
            self.logits = logits if self.logits is None else torch.where(need[:, None, None], logits, self.logits)
            self.read = x
        return self.logits

    def verify(self, y):
        """
        Logits (R, b, V) of block size 1 at every position, each given y before it: one pass of two tokens a position, but for y's last
        token, which no one reads, and the first position's prediction, which rests on nothing of y and is asked once.
        """
        self.need_ar_mode()
        known = 0 if self.first is None else 1
        logits = self._forward(self.live, y[:, :-1], self.ar_input()[:, known:], 1, 0.0, int(self.span[known]))
        if known:
            return torch.cat((self.first, logits), dim=1)
        self.first = logits[:, :1].clone()  # the sampler may do with its logits what it likes
        return logits

    def verify_and_predict(self, y, alpha):
        """Both in one pass of three tokens a position: verify(y), and predict(alpha) of the block as it stands. alpha (R,)."""
        self.need_ar_mode()
        if self.model.cfg.condition_clean and not self.model.timeless:
            raise ValueError("the clean stream of this network sees the noise level, and one pass would have two: draft=diffusion")
        b = len(self.positions)
        sizes, at = torch.tensor([[1] * b + [b] * b]), torch.cat((self.span, self.span))
        level = torch.cat((alpha.new_zeros(len(self.rows), b), alpha[:, None].expand(-1, b)), dim=1)
        logits = self._forward(self.live, y, torch.cat((self.ar_input(), self.x), dim=1), sizes, level, at)
        return logits[:, :b], logits[:, b:]

    def posterior(self, logits, alpha_t, alpha_s, noise, temperature=None, where=None):
        """A draw of the process's reverse step from x, (R, b)."""
        temperature = self.temperature if temperature is None else temperature
        return self.process.posterior_sample(logits, self.x, alpha_t, alpha_s, temperature, self.top_p, noise, where)

    def reverse(self, alpha, alpha_t, alpha_s, noise, temperature=None, where=None, logits=None):
        """
        posterior(predict(alpha), ...) the other way about: the random numbers of the step say first which tokens it is about
        (draws.settle), and the network is asked for these alone. Rows without any are not run, nor is a pass without rows.
        logits: of predict, where the sampler has them anyway.
        """
        where = self.open & self.live[:, None] if where is None else where & self.open & self.live[:, None]
        if logits is None and self.model.timeless and self.process.mask_id is None:
            logits = self.predict(alpha)  # tokens may be redrawn for long without a change, and what was said of them holds

        def ask(asked):
            if not asked.any():
                return self.model.head.weight.new_zeros(0, self.process.vocab_size, device=self.x.device)
            return self._forward(asked.any(1), None, self.x, len(self.positions), alpha, ask=asked)

        return self.posterior(ask if logits is None else logits, alpha_t, alpha_s, noise, temperature, where)

    def sharpen(self, logits):
        """Temperature and top_p, (..., V)."""
        return sharpen(logits, self.temperature, self.top_p)

    def draw(self, logits, noise):
        """A token from softmax(logits), (R, b); x where nothing is open."""
        z, key = logits.flatten(0, 1)[self.where], noise.keys().flatten()[self.where]
        return self.x.flatten().index_copy(0, self.where, sample(z, key).token).view_as(self.x)

    def ar_input(self):
        """What block size 1 reads in place of the tokens it predicts, (R, b): the same at every pass, so that AR has one answer."""
        return self.process.ar_input((len(self.rows), len(self.positions)), self.noise(-2), self.x.device)

    def ar_draw(self, logits):
        """The tokens that AR sampling draws from these logits: with the same logits always the same ones."""
        noise = self.noise(0)
        return self.process.posterior_sample(logits, self.prior(self.noise(-1)), 0.0, 1.0, self.temperature, self.top_p, noise)

    # ----- what the loop does

    def show(self):
        """Put the block into the text."""
        self.text[self.rows[:, None], self.positions] = torch.where(self.open, self.x, self.given)

    def need_ar_mode(self):
        """Raise ValueError if block size 1 of this network cannot be asked."""
        if not self.model.cfg.clean_causal:
            raise ValueError("the clean stream of this model is block-causal: it cannot serve block size 1 as well")
        if self.trained is not None and 1 not in self.trained:
            raise ValueError(f"this network was trained on block sizes {', '.join(map(str, self.trained))}: without 1 it has no AR mode")

    def _forward(self, need, gen, noisy, block_size, alpha, start=None, ask=None):
        """
        One pass: what the cache lacks of the context, then `gen` (R, b) as clean text or None, then noisy (R, N). Returns logits
        (R, N, V), zeros in rows that were not run; with ask (R, N) bool, on the CPU, (M, V). The context enters the cache, for all rows,
        which is when all are run; `gen` never does.
        """
        begin, device, R, need = int(self.span[0]), self.model.embed.weight.device, len(self.here), need.cpu()
        start = begin if start is None else start
        have = self.cache.length if self.cache is not None else 0
        fill = self.cache is not None and have < begin  # the cache lacks some of the context
        run = torch.ones_like(need) if fill or self.passes is not self.model else need  # recorded passes are of all rows
        rows, cache = run.nonzero()[:, 0], self.cache
        everyone, index = len(rows) == R, self.there(rows)
        theirs = lambda y: y if everyone else y[index]
        if cache is not None:
            cache.rows = None if everyone else send(rows, device)
        clean = self.text[theirs(self.rows), have:begin].clamp(min=0)  # NOTHING only in rows that wait: rolled back in generate
        if gen is not None:
            clean = torch.cat((clean, theirs(gen)), dim=1)
        noisy = theirs(noisy)
        level = sigma_for(self.model, torch.as_tensor(alpha, dtype=torch.float64))
        if level is not None:
            level = level[rows if level.is_cpu else index] if level.dim() else level[None]  # one for all rows is computed once
        asked = ask if ask is None or everyone else ask[rows]
        logits = self.passes(clean.to(device), noisy.to(device), block_size, start, level, cache, ask=asked).to(self.x.device)
        if cache is not None:
            cache.length, cache.rows = begin, None
        self.counts["nfe"] += 1
        self.counts["token_forwards"] += clean.numel() + (0 if self.model.cfg.next_token else noisy.numel())
        self.counts["nfe_rows"][self.here[need]] += 1
        if everyone or ask is not None:
            return logits
        return logits.new_zeros(R, *logits.shape[1:]).index_copy(0, index, logits)


def without_gradients(f):
    """
    f(model, ...), a generator, under inference mode: operations that can have no gradient cost less of Python's time, 3 to 8 % of a text's.
    FSDP (train.py --fsdp) keeps the tensors it makes in a pass for training, which could not use them then. A sampler that wants gradients
    takes them of a clone: with torch.inference_mode(False): z = logits.clone().requires_grad_().
    """

    @functools.wraps(f)
    def run(model, *args, **how):
        whole = all(type(p) is torch.nn.Parameter for p in model.parameters())  # FSDP's are of another type while they are shared out
        mode = torch.inference_mode if whole else torch.no_grad
        return mode()(f)(model, *args, **how)

    return run


@without_gradients
def generate(model, process, prompt, *, block_size, sampler=ancestral, steps=None, max_new_tokens=None, ar_tokens=0, temperature=1.0,
             top_p=1.0, seed=0, eos_id=None, schedule=loglinear, trained=None, use_cache=True, graphs=False, **options):  # fmt: skip
    """
    Block-by-block sampling (BD3-LM, arXiv 2503.09573; BlockGen, arXiv 2606.02241), an iterator of States, at least one.

    prompt          (B, P) int64, or a list of B id sequences of any lengths; they may be empty and may end inside a block
    block_size      tokens denoised together; 1 is autoregressive: one pass a token
    sampler         a function of samplers.py; **options are its own
    steps           per block, over a linear grid of times from 1 to 0; default block_size; not for block size 1
    max_new_tokens  per row, default up to the model's seq_len. Blocks are always whole: a surplus is cut off at the end,
                    so the tokens kept have exactly the model's distribution
    ar_tokens       so many tokens first by block size 1, then blocks (AR-then-block)
    temperature, top_p   sharpen the predicted p(x_0), for uniform noise its leave-one-out form; 0 is greedy
    eos_id          a row ends at its first generated eos_id; ended rows leave the batch
    seed            same seed, same row number, same prompt: same text, whatever else is in the batch
    trained         the block sizes the network was trained with, to refuse others; None: anything goes
    use_cache       False recomputes everything at every pass: slow, equal, for tests
    graphs          on CUDA, passes are recorded and played (recorded.py); every pass is then of the whole batch

    A prompt that ends inside a block is read as part of that block: well understood by masked models (visible is known); a
    time-conditioned uniform model trained without prompts takes it for noise at first. End it at a block, or use ar_tokens.

    Raises ValueError for lengths the model cannot hold, ids it does not know, bad temperature or top_p, a sampler that the noise
    or the network cannot serve, and AR tokens from a model whose clean stream is block-causal (its cache fits one block size
    only): at the first next(); for a sampler's own options when it gets its first block.
    """
    cfg, device = model.cfg, next(model.parameters()).device
    home = torch.device("cpu") if device.type == "mps" else device  # sampling wants float64
    if not torch.is_tensor(prompt):
        prompt = [torch.as_tensor(p, dtype=torch.long) for p in prompt]
    if any(p.dim() != 1 for p in prompt[: 1 if torch.is_tensor(prompt) else None]):
        raise ValueError("a prompt is a sequence of ids, and they come in a list")
    least = {"block_size": (block_size, 1), "steps": (steps, 1), "the number of prompts": (len(prompt), 1)}
    for what, (value, low) in (least | {"ar_tokens": (ar_tokens, 0), "max_new_tokens": (max_new_tokens, 0)}).items():
        if value is not None and value < low:
            raise ValueError(f"{what} must be at least {low}, not {value}")
    first = torch.tensor([len(p) for p in prompt])  # (B,) first generated position
    padded = prompt.long() if torch.is_tensor(prompt) else torch.nn.utils.rnn.pad_sequence(prompt, True)  # (B, P)
    real = torch.arange(padded.size(1)) < first[:, None]
    if (real & ((padded < 0) | (padded >= process.vocab_size) | (padded == process.mask_id)).cpu()).any():
        raise ValueError(f"a prompt is a sequence of ids below {process.vocab_size}, and no mask")
    end = first + max_new_tokens if max_new_tokens is not None else first.clamp(min=cfg.seq_len)  # (B,)
    B, W = len(prompt), -(-int(end.max()) // block_size) * block_size
    sharpen(torch.zeros(1), temperature, top_p)  # complains now, not at the first pass
    if W > cfg.seq_len:
        raise ValueError(f"{int(end.max())} tokens in blocks of {block_size} take {W} positions; the model has {cfg.seq_len}")
    if ar_tokens and block_size > 1 and not cfg.clean_causal:
        raise ValueError("the clean stream of this model is block-causal: its cache cannot serve block size 1 as well")
    name = sampler.__name__
    for b in {block_size, 1} if ar_tokens else {block_size}:
        if trained is not None and b not in trained:
            raise ValueError(f"this network was trained on block sizes {', '.join(map(str, trained))}, not {b}")
    if (block_size == 1) != (sampler is ar) and not (block_size == 1 and sampler is ancestral):
        raise ValueError(f"block size 1 and the sampler ar belong together: got {block_size} and {name}")
    if block_size == 1 and options:
        raise ValueError(f"block size 1 is the sampler ar: it has no options, got {', '.join(options)}")
    if sampler in (MASKED_ONLY if process.mask_id is None else UNIFORM_ONLY):
        raise ValueError(f"{name} is not defined for {'uniform' if process.mask_id is None else 'masked'} noise")
    if steps is not None and (sampler in OWN_PACE or block_size == 1):
        raise ValueError(f"{'ar' if block_size == 1 else name} takes as many passes as it needs: steps mean nothing")

    x = torch.full((B, W), NOTHING, device=home)
    x[:, : padded.size(1)] = torch.where(real.to(home), padded.to(home), NOTHING)
    rows, known = torch.arange(B), first.clone()  # rows still in the batch, and how far each is written (on the CPU: no syncs)
    done = first >= end
    counts = {"nfe": 0, "nfe_rows": torch.zeros(B, dtype=torch.long), "token_forwards": 0}
    weight = model.embed.weight
    cache = KVCache(cfg, B, W + 2 * block_size, device, dtype_of(weight), weight.dtype) if use_cache else None

    passes = Recorded(model) if graphs and use_cache else model

    def state(span, step, finished=False):
        with torch.inference_mode(False):  # copies that training may use
            texts, ended, nfe_rows = x.clone(), done.clone(), counts["nfe_rows"].clone()
        span = int(span[0]), int(span[-1]) + 1
        return State(texts, span, step, finished, ended, counts["nfe"], nfe_rows, counts["token_forwards"])

    def leave():
        """Drop the rows that are done from the batch."""
        nonlocal rows
        stay = ~done[rows]
        if cache is not None and not stay.all():
            cache.keep(send(stay.nonzero()[:, 0], device))
        rows = rows[stay]

    yield state((0, -1), 0, True)
    leave()
    ar_end = torch.minimum(first + ar_tokens, end)
    phases = (1, ar_end, ar, {}), (block_size, end, ar if block_size == 1 else sampler, options)  # either may be empty
    for b, stop, inside, settings in phases:
        if len(rows) == 0:
            break
        begin = int(known[rows].min()) // b * b
        if cache is not None:
            cache.length = min(cache.length, begin)  # tokens of rows that waited in the first phase are not real yet
        while len(rows) and begin < int(stop[rows].max()):
            span = torch.arange(begin, begin + b)
            begin += b
            open = (span >= known[rows, None]) & (known[rows] < stop[rows])[:, None]  # (R, b): to be written now
            if not open.any():
                continue  # prompt in every row: the next pass reads it
            block = Block(
                model=model, passes=passes, process=process, cache=cache, counts=counts, text=x, rows=rows, span=span, open=open, seed=seed,
                trained=trained, steps=steps, schedule=schedule, temperature=temperature, top_p=top_p,
            )  # fmt: skip
            if b > 1:
                block.show()
                yield state(span, 0)  # noise, to look at
            step, latest = 0, None  # one behind: only the sampler knows which step is its last
            for _ in inside(block, **settings):
                if latest is not None:
                    yield latest
                block.show()
                step += 1
                latest = state(span, step)
            known[rows] = torch.where(open.any(1), span[-1] + 1, known[rows])
            cut = end[rows]  # (R,) where each row ends
            if eos_id is not None:
                hit = open & (span < cut[:, None]) & (block.x == eos_id).cpu()
                cut = torch.where(hit.any(1), span[hit.int().argmax(1)] + 1, cut)
            over = known[rows] >= cut
            done[rows[over]] = True
            ended = block.there(rows[over])
            x[ended] = torch.where(torch.arange(W, device=home) < block.there(cut[over])[:, None], x[ended], NOTHING)
            yield state(span, step, True)
            leave()
