"""
The block of generate.py made fast: the same distribution, from fewer passes over fewer tokens.

    predict             is not asked again while nothing it read has changed
    reverse             draws first which tokens need the network, and asks for these alone
    verify_and_predict  both in one pass
    rows                that are finished inside a block are not run

It runs on any network and any noise process. What only a FastTransformer or a fast process can do is left out
for others.
"""

import copy
import functools
from dataclasses import replace

import torch

from diffusion import sigma_for
from fast.draws import sample
from fast.edits import guard
from fast.network import FastTransformer
from fast.processes import FastMasked, FastUniform
from generate import Block
from generate import generate as generate_plainly
from kernels import send
from rng import Noise


def quickly(f):
    """
    Decorates a generator of States: it runs under inference mode, where operations cost less of Python's
    time, 3 to 8 % of a text's. FSDP keeps the tensors it makes in a pass for training, which could not use
    them then. It yields copies that training may use.
    """

    @functools.wraps(f)
    def run(model, *args, **how):
        whole = all(type(p) is torch.nn.Parameter for p in model.parameters())  # FSDP's are of another type
        for state in (torch.inference_mode() if whole else torch.no_grad())(f)(model, *args, **how):
            yield replace(state, x=state.x.clone(), done=state.done.clone(), nfe_rows=state.nfe_rows.clone())

    return run


generate = quickly(generate_plainly)


class FastBlock(Block):
    def __init__(self, *args):
        guard("generate.Block")
        # rows and positions on the CPU: nobody waits to read them
        self.noises, self.here, self.span = {}, args[5], args[6]
        *first, rows, span, open, how = args
        super().__init__(*first, *(send(y, first[2].device) for y in (rows, span, open)), how)
        self.where = self.open.flatten().nonzero()[:, 0]
        self.read = self.logits = None  # what the last predict read, and said
        self.first = None  # what verify said of the first position, (R, 1, V)
        self.fast_network = isinstance(self.model, FastTransformer)
        self.fast_process = isinstance(self.process, (FastMasked, FastUniform))

    def noise(self, k):
        """Random numbers of some steps at once take as long as those of one; those gone by are forgotten."""
        if k not in self.noises:
            steps = torch.arange(k, k + 1 if k < 0 else k + min(self.steps, 16), device=self.rows.device)[
                :, None, None
            ]
            before = {i: noise for i, noise in self.noises.items() if i < 0}
            self.noises = before | dict(
                enumerate(Noise(self.seed, self.rows, self.positions, steps).unbind(), k)
            )
        return copy.copy(self.noises[k])

    def predict(self, alpha, x=None, **extra):
        """
        One pass of the rows that are live; of a FastTransformer that does not see alpha, only of those whose
        tokens changed since its last prediction: no pass if none did. With extra the network is always asked,
        and so is any other network: it may draw something anew in each pass.
        """
        x, wanted = self.x if x is None else x, self.live
        if self.fast_network and self.model.timeless and self.read is not None and not extra:
            wanted = wanted & (x != self.read).any(1)
        if (run := wanted.cpu()).any():
            logits = self.run_rows(run, None, x, len(self.positions), alpha, **extra)
            self.logits = (
                logits if self.logits is None else torch.where(wanted[:, None, None], logits, self.logits)
            )
            self.read = x
        return self.logits

    def verify(self, y):
        """
        Two tokens a position, but for y's last token, which no one reads, and the first position's
        prediction, which rests on nothing of y and is asked once.
        """
        self.need_ar_mode()
        skip = 0 if self.first is None else 1
        logits = self.run_rows(self.live, y[:, :-1], self.ar_input()[:, skip:], 1, 0.0, int(self.span[skip]))
        if skip:
            return torch.cat((self.first, logits), dim=1)
        if self.fast_network:
            self.first = logits[:, :1].clone()  # the sampler may do with its logits what it likes
        return logits

    def verify_and_predict(self, y, alpha):
        """Both in one pass of three tokens a position. alpha (R,)."""
        self.need_ar_mode()
        if self.model.cfg.condition_clean and not self.model.timeless:
            raise ValueError(
                "the clean stream of this network sees the noise level, "
                "and one pass would have two: draft=diffusion"
            )
        b = len(self.positions)
        sizes, at = torch.tensor([[1] * b + [b] * b]), torch.cat((self.span, self.span))
        level = torch.cat((alpha.new_zeros(len(self.rows), b), alpha[:, None].expand(-1, b)), dim=1)
        logits = self.run_rows(self.live, y, torch.cat((self.ar_input(), self.x), dim=1), sizes, level, at)
        return logits[:, :b], logits[:, b:]

    def reverse(self, alpha, alpha_t, alpha_s, noise, temperature=None, where=None, logits=None):
        """
        The random numbers of the step say first which tokens it is about (draws.settle), and the network is
        asked for these alone. Rows without any are not run, nor is a pass without rows. logits: of predict,
        where the sampler has them anyway.
        """
        where = self.open & self.live[:, None] if where is None else where & self.open & self.live[:, None]
        may_repeat = self.model.timeless and not self.process.absorbing
        if logits is None and (may_repeat or not self.fast_process):
            # tokens may be redrawn for long without a change, and what was said of them holds
            logits = self.predict(alpha)
        if logits is None:
            logits = functools.partial(self.ask, alpha)
        return self.posterior(logits, alpha_t, alpha_s, noise, temperature, where)

    def ask(self, alpha, asked):
        """Logits (M, V) of the tokens `asked`, (R, b) bool on the CPU."""
        if not asked.any():
            return self.model.head.weight.new_zeros(0, self.process.vocab_size, device=self.x.device)
        return self.run_rows(asked.any(1), None, self.x, len(self.positions), alpha, ask=asked)

    def posterior(self, logits, alpha_t, alpha_s, noise, temperature=None, where=None):
        if not self.fast_process:
            return super().posterior(logits, alpha_t, alpha_s, noise, temperature, where)
        temperature = self.temperature if temperature is None else temperature
        return self.process.posterior_sample(
            logits, self.x, alpha_t, alpha_s, temperature, self.top_p, noise, where
        )

    def draw(self, logits, noise):
        z, key = logits.flatten(0, 1)[self.where], noise.keys().flatten()[self.where]
        return self.x.flatten().index_copy(0, self.where, sample(z, key).token).view_as(self.x)

    def forward(self, noisy, block_size, alpha, guess=None, **extra):
        return self.run_rows(self.live, guess, noisy, block_size, alpha, **extra)

    def run_rows(self, wanted, guess, noisy, block_size, alpha, start=None, ask=None, **extra):
        """
        One pass of the rows `wanted` (R,) bool: what the cache lacks of the context, then `guess` (R, n) as
        clean text or None, then noisy (R, N). Returns logits (R, N, V), zeros in rows that were not run; with
        ask (R, N) bool, on the CPU, (M, V). The context enters the cache, for all rows, which is when all are
        run; `guess` never does.
        """
        begin, device, R, wanted = (
            int(self.span[0]),
            self.model.embed.weight.device,
            len(self.rows),
            wanted.cpu(),
        )
        start = begin if start is None else start
        # FastCache has outputs
        if self.cache is not None and self.model.cfg.next_token and not self.fast_network:
            self.cache.length = min(self.cache.length, begin - 1)
        cached = 0 if self.cache is None else self.cache.length
        fill = self.cache is not None and cached < begin  # the cache lacks some of the context
        # recorded passes are of all rows
        recorded = self.fast_network and self.model.graphs and self.cache is not None
        run = torch.ones_like(wanted) if fill or recorded or not self.fast_network else wanted
        rows = run.nonzero()[:, 0]
        everyone, index = len(rows) == R, send(rows, self.text.device)
        theirs = lambda y: y if everyone else y[index]
        # NOTHING only in rows that wait: rolled back in generate
        clean = self.text[theirs(self.rows), cached:begin].clamp(min=0)
        if guess is not None:
            clean = torch.cat((clean, theirs(guess)), dim=1)
        noisy = theirs(noisy)
        level = sigma_for(self.model, torch.as_tensor(alpha, dtype=torch.float64))
        if level is not None:
            # one for all rows is computed once
            level = level[rows if level.is_cpu else index] if level.dim() else level[None]
        fed = self.process.network_input(noisy)
        fed = tuple(y.to(device) for y in fed) if isinstance(fed, tuple) else fed.to(device)
        asked = ask if ask is None or everyone else ask[rows]
        extra = {name: theirs(y) if torch.is_tensor(y) else y for name, y in extra.items()}
        if self.fast_network:
            network = self.cache.passes(self.model) if recorded else self.model
            extra |= {"ask": asked}
        else:
            network = self.model
        if self.cache is not None and self.fast_network:
            self.cache.rows = None if everyone else send(rows, device)
        out = network(clean.to(device), fed, block_size, start, level, self.cache, **extra)
        logits = self.carried(out).to(self.x.device)
        if self.cache is not None:
            self.cache.length = begin
            self.cache.rows = None
        self.counts["nfe"] += 1
        self.counts["token_forwards"] += clean.numel() + (0 if self.model.cfg.next_token else noisy.numel())
        self.counts["nfe_rows"][self.here[wanted]] += 1
        if ask is not None:
            return logits if self.fast_network else logits[asked.to(logits.device)]
        return logits if everyone else logits.new_zeros(R, *logits.shape[1:]).index_copy(0, index, logits)
