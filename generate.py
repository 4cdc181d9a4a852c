"""
How does noise become text? The one loop of generation, and two samplers, ancestral and ar. ARPC and the
others are in samplers/.

The loop (`generate`) does blocks, prompts, the KV cache, early ends and counting. A sampler fills one block.
It is a generator function beside its equation: it reads and writes a `Block`, and yields after every step.
Its keyword arguments are its command-line options; options out of range raise ValueError.

Letters as in diffusion.py, R the rows still in the batch, b the block size; a_t = alpha_t before a step, a_s
after it. fast/block.py asks the network for less, and gets the same distribution.
"""

from dataclasses import dataclass

import torch

from diffusion import loglinear, sigma_for
from options import check_request
from rng import Noise, draw, sharpen

NOTHING, HOLE = -1, -2  # in State.x: not written, or behind the end of a row; in a prompt: to be written
SAMPLERS = {}  # name -> function


def sampler(*needs):
    """Enter a function into SAMPLERS. needs: words of run.flags.LIMITS, as "absorbing" or "own pace"."""

    def enter(f):
        f.needs = needs
        SAMPLERS[f.__name__] = f
        return f

    return enter


@dataclass
class State:
    """What generate yields after every step."""

    x: torch.Tensor  # (B, W) int64: prompts, finished blocks, the block at work; NOTHING elsewhere
    span: tuple  # (first, end) of the block at work
    step: int  # steps done on it: 0 when it is pure noise
    finished: bool  # the block is written
    done: torch.Tensor  # (B,) bool: the row has ended
    nfe: int  # forward passes so far
    nfe_rows: torch.Tensor  # (B,) int64: those that this row needed
    token_forwards: int  # tokens pushed through the network so far


class Block:
    """
    The block at work, as a sampler sees it.

    x (R, b) int64       its tokens, given ones among them. `write` changes it
    open (R, b) bool     positions to generate; given tokens may stand on both sides of them
    live (R,) bool       rows that need more passes; a sampler takes rows out
    alpha                steps + 1 noise levels from 0 (pure noise) to 1 (clean), on a linear grid of times
    state                a method's own tensors (R, b, ...), carried from step to step
    process, steps, temperature, top_p
    """

    def __init__(self, model, process, text, cache, counts, rows, span, open, how):
        self.model, self.process, self.text, self.cache, self.counts = model, process, text, cache, counts
        self.temperature, self.top_p, self.schedule = how["temperature"], how["top_p"], how["schedule"]
        self.seed, self.trained, self.steps = how["seed"], how["trained"], how["steps"] or len(span)
        self.rows, self.positions, self.open = (y.to(text.device) for y in (rows, span, open))
        self.alpha, self.state = self.grid(self.steps), {}
        self.given = text[self.rows[:, None], self.positions]  # prompt, and whatever stands in rows that wait
        self.live = self.open.any(1)
        self.x = torch.where(self.open, self.prior(self.noise(-1)), process.encode(self.given.clamp(min=0)))

    def noise(self, k):
        """Random numbers of step k >= 0. -1 made the pure noise, -2 what block size 1 reads."""
        return Noise(self.seed, self.rows, self.positions, k)

    def grid(self, steps):
        """alpha at steps + 1 equally spaced times from 1 to 0; the last is 1 exactly, not rounded."""
        return self.schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64))[0].tolist()[:-1] + [1.0]

    def prior(self, noise):
        """Pure noise, (R, b)."""
        return self.process.prior(self.open.shape, noise)

    def write(self, x):
        """x at the open positions of live rows."""
        self.x = torch.where(self.open & self.live[:, None], x, self.x)

    def show(self):
        """Put the block into the text."""
        tokens = torch.where(self.open, self.process.tokens(self.x), self.given)
        self.text[self.rows[:, None], self.positions] = tokens

    def forward(self, noisy, block_size, alpha, guess=None, **extra):
        """
        Logits (R, N, V) of one pass: the context that the cache lacks, `guess` (R, n), clean text behind it
        that is not kept, and `noisy` (R, N) at noise level alpha, a number or (R,).
        """
        begin, device = int(self.positions[0]), self.model.embed.weight.device
        if self.cache is not None and self.model.cfg.next_token:
            self.cache.length = min(self.cache.length, begin - 1)  # it reads off the token before
        cached = 0 if self.cache is None else self.cache.length
        clean = self.text[self.rows, cached:begin].clamp(min=0)  # NOTHING: in rows that wait
        clean = clean if guess is None else torch.cat((clean, guess), dim=1)
        level = sigma_for(self.model, torch.as_tensor(alpha, dtype=torch.float64).view(-1))
        fed = self.process.network_input(noisy)
        out = self.model(clean.to(device), fed, block_size, begin, level, self.cache, **extra)
        logits = self.carried(out)
        if self.cache is not None:
            self.cache.length = begin
        self.count(clean.numel() + (0 if self.model.cfg.next_token else noisy.numel()))
        return logits.to(self.x.device)

    def carried(self, out):
        """The logits of what a network returns; a method's may return (logits, carry), see state["carry"]."""
        if isinstance(out, tuple):
            out, self.state["carry"] = out
        return out

    def count(self, n_tokens):
        """A pass of n_tokens was made."""
        self.counts["nfe"] += 1
        self.counts["token_forwards"] += n_tokens
        self.counts["nfe_rows"][self.rows[self.live].cpu()] += 1

    def predict(self, alpha, x=None, **extra):
        """The network's output (R, b, V) for the block at noise level alpha."""
        return self.forward(self.x if x is None else x, len(self.positions), alpha, **extra)

    def verify(self, y):
        """Logits (R, b, V) of block size 1, each given the y (R, b) before it: the AR mode, in one pass."""
        self.need_ar_mode()
        return self.forward(self.ar_input(), 1, 0.0, guess=y)

    def verify_and_predict(self, y, alpha):
        """verify(y), and predict(alpha) of the block as it stands."""
        return self.verify(y), self.predict(alpha)

    def posterior(self, logits, alpha_t, alpha_s, noise, temperature=None, where=None):
        """A draw of the process's reverse step from x, (R, b); x itself outside of `where`."""
        temperature = self.temperature if temperature is None else temperature
        y = self.process.posterior_sample(logits, self.x, alpha_t, alpha_s, temperature, self.top_p, noise)
        return y if where is None else torch.where(where, y, self.x)

    def reverse(self, alpha, alpha_t, alpha_s, noise, temperature=None, where=None, logits=None):
        """posterior(predict(alpha), ...). logits: of predict, where the sampler has them anyway."""
        logits = self.predict(alpha) if logits is None else logits
        return self.posterior(logits, alpha_t, alpha_s, noise, temperature, where)

    def sharpen(self, logits):
        """Temperature and top_p, (..., V)."""
        return sharpen(logits, self.temperature, self.top_p)

    def draw(self, logits, noise):
        """A token from softmax(logits), (R, b); x where nothing is open."""
        return torch.where(self.open, draw(logits.double().softmax(-1), noise), self.x)

    def ar_input(self):
        """What block size 1 reads in place of the tokens it predicts, (R, b): the same at every pass."""
        return self.process.ar_input(self.open.shape, self.noise(-2))

    def ar_draw(self, logits):
        """The tokens that AR sampling draws from these logits: with the same logits always the same ones."""
        noise, pure = self.noise(0), self.prior(self.noise(-1))
        return self.process.posterior_sample(logits, pure, 0.0, 1.0, self.temperature, self.top_p, noise)

    def need_ar_mode(self):
        """Raise ValueError if block size 1 of this network cannot be asked."""
        if not self.model.cfg.clean_causal:
            raise ValueError("the clean stream of this model is block-causal: it has no AR mode")
        if self.trained is not None and 1 not in self.trained:
            sizes = ", ".join(map(str, self.trained))
            raise ValueError(f"this network was trained on block sizes {sizes}: without 1 it has no AR mode")


# ----- samplers


@sampler()
def ancestral(block, *, greedy_tail=False):
    """
    x_s ~ q(x_s | x_t, p), the process's own reverse step (MDLM, arXiv 2406.07524; BD3-LM, 2503.09573).
    It ends when no token can change any more.

    greedy_tail: end with the argmax, see `tail`
    """
    for k in range(block.steps):
        a_t, a_s = block.alpha[k : k + 2]
        fills = block.process.absorbing and k + 1 == block.steps  # the last masks
        temperature = 0.0 if greedy_tail and fills else None
        block.write(block.reverse(a_t, a_t, a_s, block.noise(k), temperature))
        block.live = block.live & (block.open & block.process.can_change(block.x)).any(1)
        yield
        if not block.live.any():
            return
    if greedy_tail:
        yield from tail(block)


def tail(block):
    """
    Greedy tail (arXiv 2602.21185): after the last step the argmax of the network's output, at t = 1e-5. It
    costs a pass and some diversity. Masked noise changes no written token: its last fill is the argmax.
    """
    if not block.process.absorbing:
        block.write(block.predict(1 - 1e-5).argmax(-1))
        yield


@sampler("own pace")
def ar(block):
    """Block size 1: x_i ~ p_AR(x_i | x_<i), one pass a token."""
    block.write(block.ar_draw(block.predict(0.0, block.ar_input())))
    yield


# ----- the loop


@torch.no_grad()
def generate(
    model, process, prompt, *, block_size, sampler=ancestral, steps=None, max_new_tokens=None, ar_tokens=0,
    temperature=1.0, top_p=1.0, seed=0, eos_id=None, schedule=loglinear, trained=None, use_cache=True,
    block_class=None, **options,
):  # fmt: skip
    """
    Block-by-block sampling (BD3-LM, arXiv 2503.09573; BlockGen, arXiv 2606.02241): an iterator of States.

    prompt          (B, P) int64, or a list of B id sequences; may be empty, end inside a block, have HOLEs
    block_size      tokens denoised together; 1 is autoregressive: one pass a token
    sampler         a function of SAMPLERS; **options are its own
    steps           per block; default block_size; not for block size 1
    max_new_tokens  behind a prompt; default up to seq_len, none behind holes. A block's surplus is cut off
    ar_tokens       so many tokens first by block size 1, then blocks (AR-then-block)
    temperature, top_p   sharpen the predicted p(x_0), for uniform noise its leave-one-out form; 0 is greedy
    eos_id          id, or list of ids: a row ends at the first behind all given tokens, and leaves the batch
    seed            same seed, row number and prompt: same text, whatever else is in the batch
    trained         the block sizes the network was trained with, to refuse others; None: anything goes
    use_cache       False recomputes everything at every pass: slow, equal, for tests
    block_class     Block, or another like it; None: what the model brings (fast/), else Block

    Given tokens are read with their block, and not before: see methods/infilling.py. A time-conditioned
    uniform model that was trained without prompts takes them for noise at first: ar_tokens go around it.
    Raises ValueError for what options.check_request refuses, and for a sampler's options out of range.
    """
    device, block_class = model.embed.weight.device, block_class or getattr(model, "block_class", Block)
    home = torch.device("cpu") if device.type == "mps" else device  # sampling wants float64
    prompt = [torch.as_tensor(p, dtype=torch.long, device="cpu") for p in prompt]
    if not prompt or any(p.dim() != 1 for p in prompt):
        raise ValueError("a prompt is a sequence of ids, and they come in a list of at least one")
    length = torch.tensor([len(p) for p in prompt])
    given = torch.nn.utils.rnn.pad_sequence(prompt, batch_first=True, padding_value=NOTHING)  # (B, P)
    rest = torch.where((given == HOLE).any(1), 0, (model.cfg.seq_len - length).clamp(min=0))
    end = length + (rest if max_new_tokens is None else max_new_tokens)  # (B,)
    longest = int(end.max())
    numbers = (steps, max_new_tokens, ar_tokens)
    check_request(model, process, prompt, block_size, sampler, options, longest, *numbers, trained)
    sharpen(torch.zeros(1), temperature, top_p)  # complains now, not at the first pass
    B, W = len(prompt), -(-longest // block_size) * block_size
    how = {"steps": steps, "schedule": schedule, "temperature": temperature, "top_p": top_p, "seed": seed}
    how["trained"] = trained

    x = torch.full((B, W), NOTHING)
    x[:, : given.size(1)] = given.clamp(min=NOTHING)
    filled, x = x >= 0, x.to(home)  # (B, W)
    rows, written = torch.arange(B), filled.int().cumprod(1).sum(1)  # rows in the batch; written up to (B,)
    given_end, done = W - (~filled).flip(1).int().cumprod(1).sum(1), written >= end  # (B,)
    counts = {"nfe": 0, "nfe_rows": torch.zeros(B, dtype=torch.long), "token_forwards": 0}
    cache = model.new_cache(B, W + 2 * block_size) if use_cache else None

    def state(span, step, finished=False):
        span = int(span[0]), int(span[-1]) + 1
        spent = counts["nfe"], counts["nfe_rows"].clone(), counts["token_forwards"]
        return State(x.clone(), span, step, finished, done.clone(), *spent)

    def drop_done_rows():
        nonlocal rows
        stay = ~done[rows]
        if cache is not None and not stay.all():
            cache.keep(stay.nonzero()[:, 0].to(device))
        rows = rows[stay]

    yield state((0, -1), 0, True)
    drop_done_rows()
    ar_end = torch.minimum(written + ar_tokens, end)
    phases = (1, ar_end, ar, {}), (block_size, end, ar if block_size == 1 else sampler, options)
    for b, stop, inside, settings in phases:
        if len(rows) == 0:
            break
        begin = int(written[rows].min()) // b * b
        if cache is not None:
            cache.length = min(cache.length, begin)  # rows that waited were not real yet
        while len(rows) and begin < int(stop[rows].max()):
            span = torch.arange(begin, begin + b)
            begin += b
            open = ~filled[rows, begin - b : begin] & (written[rows] < stop[rows])[:, None]  # (R, b)
            if not open.any():
                continue  # prompt in every row: the next pass reads it
            block = block_class(model, process, x, cache, counts, rows, span, open, how)
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
            filled[rows, begin - b : begin] |= open
            written[rows] = filled[rows].int().cumprod(1).sum(1)
            cut = end[rows]  # (R,) where each row ends
            if eos_id is not None:
                hit = open & (span < cut[:, None]) & (span >= given_end[rows, None])
                hit = hit & torch.isin(process.tokens(block.x).cpu(), torch.tensor(eos_id))
                cut = torch.where(hit.any(1), span[hit.int().argmax(1)] + 1, cut)
            over = written[rows] >= cut
            done[rows[over]] = True
            for row, last in zip(rows[over].tolist(), cut[over].tolist(), strict=True):
                x[row, last:] = NOTHING
            yield state(span, step, True)
            drop_done_rows()


if __name__ == "__main__":
    print(__doc__)
