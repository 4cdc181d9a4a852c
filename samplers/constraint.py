"""
How does a block become text of a given language? The tokens of a step are drawn together, given that the text
ends in the language. samplers/language.py says what a language is.

A prediction is a product, p(y) = prod_i p_i(y_i). For a DFA with transitions d and a block of b tokens, with
beta_b(q) = 1 where the text can still end in the language, in as many tokens as remain behind the block,

    beta_i(q) = sum_v p_i(v) beta_i+1(d(q, v))         Z = beta_0(q_0), the probability of the language
    y_i ~ p_i(v) beta_i+1(d(q_i, v)),  q_i+1 = d(q_i, y_i)      is a draw of p(y) given the language
    p(y_i = v | language) = p_i(v) sum_q f_i(q) beta_i+1(d(q, v)) / Z     f: the same recursion from the left

With max in place of the sums (temperature 0) it is the most likely block of the language (DINGO, arXiv
2505.23061). All of it in logarithms, where nothing underflows.

Each step is exact. Several steps are not the unconstrained sampler given the language, since a step does not
know what later ones make of its tokens. The weight of a text is the product over the steps of Z / Z', Z' with
the predictions of the same pass when the step's new tokens are known. `exact` runs so many weighted copies of
each row and keeps one: exact as they grow in number (sampling-importance-resampling; Rubin 1987).
"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from diffusion import column, pick
from generate import HOLE, NOTHING, Block, ancestral
from rng import Noise, exponential, sharpen, uniforms
from run.cli import die
from samplers.language import Asked, Refused, load

# samplers that write tokens past the constraint
REFUSED = {
    "speculation": "it checks its drafts against the AR mode, which knows no language",
    "prophet": "it ends with the likeliest token of each position by itself",
    "sched": "it ends with the likeliest token of each position by itself",
    "token_editing": "it replaces single tokens",
    "delete_split": "it replaces and moves single tokens",
    "self_correction": "it replaces single tokens",
}
# those whose other choices do not depend on the tokens of a step: Z / Z' is their weight
WEIGHTED = "ar ancestral first_hitting max_coupling remdm_cap remdm_rescale remdm_conf remdm_loop loopholing"


def gather_logsumexp(x, index, n):
    """log of sums of exp(x) (N, K) by index (N, K): (N, n), -inf for empty sums."""
    index = index.expand(x.shape)
    most = x.new_full((len(x), n), -math.inf).scatter_reduce(1, index, x, "amax")
    share = torch.where(x > -math.inf, (x - most.gather(1, index)).exp(), 0.0)
    return most + torch.zeros_like(most).scatter_add(1, index, share).log()


def gather_max(x, index, n):
    """The same with the largest in place of the sum."""
    return x.new_full((len(x), n), -math.inf).scatter_reduce(1, index.expand(x.shape), x, "amax")


# ----- the dynamic programme


class Chain:
    """
    The automaton along one block of R rows. Tokens of one class have the same transitions.

    classes (V,)    of each token, below C
    next (R, Q, C)  the state behind a token of a class
    fixed (R, b)    positions that are no choice: prompt, and what will be cut off
    jump (R, b, Q)  the state behind a fixed position
    start (R,), end (R, Q) bool   the state before the block; those behind it from which the text can end well
    """

    def __init__(self, classes, next, fixed, jump, start, end):
        self.classes, self.next, self.fixed, self.jump, self.start = classes, next, fixed, jump, start
        self.end, self.shape = end, next.shape  # R, Q, C
        self.myopic = False

    def by_class(self, logp, greedy=False):
        """(R, b, C): log of the probability of each class, or of its likeliest token."""
        R, b, V = logp.shape
        gather = gather_max if greedy else gather_logsumexp
        return gather(logp.flatten(0, 1), self.classes[None], self.shape[2]).view(R, b, -1)

    def behind(self, values):
        """values (R, Q) of the state behind each class: (R, Q, C)."""
        R, Q, C = self.shape
        return values.gather(1, self.next.reshape(R, Q * C)).view(R, Q, C)

    def betas(self, logc, greedy=False):
        """log beta_i(q) = log sum_v p_i(v) beta_i+1(d(q, v)), b + 1 tensors (R, Q). greedy: max, no sum."""
        found = [torch.where(self.end, 0.0, -math.inf).to(logc)]
        for i in reversed(range(logc.size(1))):
            ahead = logc[:, i, None] + self.behind(found[0])
            ahead = ahead.amax(-1) if greedy else ahead.logsumexp(-1)
            found.insert(0, torch.where(self.fixed[:, i, None], found[0].gather(1, self.jump[:, i]), ahead))
        return found

    def log_z(self, logp):
        """log Z (R,) of logp (R, b, V)."""
        return self.at_start(self.betas(self.by_class(logp)))

    def at_start(self, betas):
        return betas[0].gather(1, self.start[:, None])[:, 0]

    def draw(self, logp, key, greedy=False):
        """
        (y (R, b), log Z (R,)): y_i ~ p_i(v) beta_i+1(d(q_i, v)), so y is a draw of logp (R, b, V) given
        the language, by exponential clocks as in rng.draw, key (R, b). greedy: the likeliest, and log of its
        probability.
        """
        betas = self.betas(self.by_class(logp, greedy), greedy)
        state, tokens = self.start, []
        for i in range(logp.size(1)):
            weight, following = self.weights(logp, betas, i, state)
            if not greedy:
                count = torch.arange(1, logp.size(2) + 1, device=key.device)
                weight = weight - exponential(uniforms(key[:, i, None], count)).log()
            tokens.append(weight.argmax(-1))
            after = following.gather(1, self.classes[tokens[-1]][:, None])
            known = self.jump[:, i].gather(1, state[:, None])
            state = torch.where(self.fixed[:, i, None], known, after)[:, 0]
        return torch.stack(tokens, 1), self.at_start(betas)

    def weights(self, logp, betas, i, state):
        """
        log of what the probabilities of token i are proportional to (R, V), in a state (R,) before it; and
        the state behind each class (R, C).
        """
        beta = torch.where(betas[i + 1] > -math.inf, 0.0, -math.inf) if self.myopic else betas[i + 1]
        following = self.next[torch.arange(len(state), device=state.device), state]
        ahead = torch.where(self.fixed[:, i, None], 0.0, beta.gather(1, following))
        return logp[:, i] + ahead[:, self.classes], following

    def marginals(self, logp):
        """log of p_i(v) sum_q f_i(q) beta_i+1(d(q, v)) / Z, (R, b, V); logp itself at fixed positions."""
        logc, (R, Q, C) = self.by_class(logp), self.shape
        betas, found = self.betas(logc), []
        f = torch.full_like(betas[0], -math.inf).scatter(1, self.start[:, None], 0.0)  # (R, Q)
        for i in range(logp.size(1)):
            fixed = self.fixed[:, i, None]
            ahead = (f[:, :, None] + self.behind(betas[i + 1])).logsumexp(1)  # (R, C)
            found.append(logp[:, i] + torch.where(fixed, 0.0, ahead)[:, self.classes])
            step = (f[:, :, None] + logc[:, i, None]).reshape(R, Q * C)
            moved = gather_logsumexp(step, self.next.reshape(R, Q * C), Q)
            f = torch.where(fixed, gather_logsumexp(f, self.jump[:, i], Q), moved)
        return torch.stack(found, 1).log_softmax(-1)


# ----- the languages of a batch


class Rule:
    """
    A DFA for each row of a batch, with all that is known of the texts beforehand: prompts and lengths.

    dfas        one for each row
    prompt      a list of id sequences; HOLE where a token is to be written
    end         (B,) where each row ends at the latest
    process     of noise: how many ids there are, and which is the mask
    eos_id      a text may end early with it, where it is in the language with eos_id or without
    behind      the DFAs read what stands behind the prompt, not the whole text
    copies      rows that stand for one text, weighted
    """

    def __init__(self, dfas, prompt, end, process, eos_id=None, behind=False, copies=1, seed=0):
        B, W, each = len(prompt), int(end.max()), list({id(dfa): dfa for dfa in dfas}.values())
        V, mask_id = process.vocab_size, process.mask_id
        self.end, self.copies, self.seed = end, copies, seed
        Q = max(len(dfa.accept) for dfa in each) + 2
        dead, self.ended = Q - 2, Q - 1
        read, accept = torch.full((len(each), Q, V), dead), torch.zeros(len(each), Q, dtype=torch.bool)
        for d, dfa in enumerate(each):
            n, v = dfa.next.shape
            if v > V:
                raise ValueError(f"the DFA is over {v} tokens, the network has {V}")
            read[d, :n, :v] = torch.where(dfa.next < 0, dead, dfa.next)
            read[d, :n, list(dfa.silent)] = dead
            accept[d, :n] = dfa.accept
        if mask_id is not None:
            read[:, :, mask_id] = dead
        accept[:, self.ended] = True
        next = read.clone()
        if eos_id is not None:
            well = accept | accept.gather(1, read[:, :, eos_id])
            next[:, :, eos_id] = torch.where(well, self.ended, dead)
        next[:, self.ended] = self.ended
        columns = torch.cat((read, next)).view(-1, V)
        columns, self.classes = columns.unique(dim=1, return_inverse=True)
        self.read, self.next = columns.view(2, len(each), Q, -1)
        number = {id(dfa): d for d, dfa in enumerate(each)}
        self.which = torch.tensor([number[id(dfa)] for dfa in dfas])  # (B,)
        self.state = self.first = torch.tensor([dfa.start for dfa in dfas])  # (B,), behind the tokens so far
        self.at, self.accept = 0, accept[self.which]
        silent = torch.zeros(len(each), V, dtype=torch.bool)
        for d, dfa in enumerate(each):
            silent[d, list(dfa.silent)] = True
        self.given = torch.full((B, W), NOTHING)
        for row, ids in enumerate(prompt):
            ids = torch.as_tensor(ids)
            self.given[row, : len(ids)] = torch.where(ids == HOLE, NOTHING, ids)
        known = self.given != NOTHING
        self.skipped = known & (behind | silent[self.which[:, None], self.given.clamp(min=0)])
        self.skipped |= torch.arange(W) >= end[:, None]
        self.fixed = known | self.skipped
        self.logw = torch.zeros(B, dtype=torch.float64)
        self.alive = self.alive_at()

    def jump(self, rows, i):
        """(R, Q): the state behind position i where it is fixed."""
        stay = torch.arange(self.read.size(1), device=rows.device).expand(len(rows), -1)
        if i >= self.given.size(1):
            return stay
        token = self.classes[self.given[rows, i].clamp(min=0)]
        return torch.where(self.skipped[rows, i, None], stay, self.read[self.which[rows], :, token])

    def alive_at(self):
        """(W + 1, B, Q) bool: may a text that is in a state before a position still end in the language?"""
        D, Q, _ = self.next.shape
        reach = torch.zeros(D, Q, Q).scatter_(2, self.next, 1.0)[self.which]
        rows, found = torch.arange(len(self.which)), [self.accept]
        for i in reversed(range(self.given.size(1))):
            free = (reach @ found[0].float()[..., None])[..., 0] > 0
            known = found[0].gather(1, self.jump(rows, i))
            found.insert(0, torch.where(self.fixed[:, i, None], known, free))
        return torch.stack(found)

    def check(self):
        """Raise Refused for a prompt that leaves the language, or a length that no text of it has."""
        stuck = ~self.alive[0].gather(1, self.first[:, None])[:, 0]
        if not stuck.any():
            return
        row = int(stuck.nonzero()[0, 0])
        q, d = int(self.first[row]), int(self.which[row])
        n = int((self.given[row] != NOTHING).int().cumprod(0).sum())
        for at in range(n):
            q = int(self.jump(torch.tensor([row]), at)[0, q])
        if (self.given[row, n:] != NOTHING).any():
            problem = f"no text of the language fits the prompt of row {row // self.copies} and its holes"
            raise Refused(problem, "another --prompt or --regex")
        room, now = int(self.end[row]) - n, torch.zeros(self.next.size(1), dtype=torch.bool)
        now[q] = True
        lengths = []  # numbers of tokens behind the prompt that make a text of the language
        for k in range(room + 65):
            lengths += [k] * bool((now & self.accept[row]).any())
            now = torch.zeros_like(now).index_fill_(0, self.next[d, now].unique(), True)
        if not lengths:
            problem = f"the prompt of row {row // self.copies} leaves the language"
            raise Refused(problem, "another --prompt or --regex")
        near = min(lengths, key=lambda k: (k > room, abs(k - room)))
        row = row // self.copies
        problem = f"no text of the language has {room} tokens behind the prompt of row {row}"
        raise Refused(problem, f"--max_new_tokens {near}" if near else "a shorter prompt")

    def to(self, device):
        if self.state.device != device:
            for name, x in vars(self).items():
                if torch.is_tensor(x):
                    setattr(self, name, x.to(device))

    def move(self, state, rows, i, token):
        """The states (R,) behind token (R,) at position i; NOTHING changes nothing."""
        after = self.next[self.which[rows], state, self.classes[token.clamp(min=0)]]
        if i < self.given.size(1):
            known = self.jump(rows, i).gather(1, state[:, None])[:, 0]
            after = torch.where(self.fixed[rows, i], known, after)
        return torch.where((token == NOTHING) | (i >= self.given.size(1)), state, after)

    def chain(self, text, rows, span):
        """The Chain of the block `span` behind text (B, W), whose tokens before it are final."""
        begin, all_rows = int(span[0]), torch.arange(len(text), device=text.device)
        if begin < self.at:  # rows that waited come first now
            self.state, self.at = self.first, 0
        for i in range(self.at, begin):
            self.state = self.move(self.state, all_rows, i, text[:, i])
        self.at = begin
        W, at = self.given.size(1), span.tolist()
        beyond = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        fixed = torch.stack([self.fixed[rows, i] if i < W else beyond for i in at], 1)
        jump = torch.stack([self.jump(rows, i) for i in at], 1)
        end = self.alive[min(at[-1] + 1, W), rows]
        return Chain(self.classes, self.next[self.which[rows]], fixed, jump, self.state[rows], end)

    def ends_well(self, text):
        """(B,) bool: are finished texts (B, W) in the language?"""
        rows, state = torch.arange(len(text), device=text.device), self.first
        for i in range(text.size(1)):
            state = self.move(state, rows, i, text[:, i])
        return self.accept.gather(1, state[:, None])[:, 0]

    # ----- weighted copies

    def resample(self, text, cache, rows):
        """
        Between blocks: where the weights of a text's copies have become unequal (effective number below
        half), they are drawn anew by their weights (systematic resampling), with text and cache. Copies that
        have ended stay as they are.
        """
        groups, group = (rows // self.copies).unique(return_inverse=True)
        at, everyone = (group, rows % self.copies), torch.arange(len(rows), device=rows.device)
        logw = self.logw.new_full((len(groups), self.copies), -math.inf)
        logw[at] = self.logw[rows]
        index, here = torch.zeros_like(logw, dtype=torch.long), torch.zeros_like(logw, dtype=torch.bool)
        index[at], here[at] = everyone, True
        n, w = here.sum(1, keepdim=True), logw.softmax(1)
        uneven = (1 / w.square().sum(1) < n[:, 0] / 2)[group]  # not where all are -inf
        if not uneven.any():
            return
        comb = (here.cumsum(1) - 1 + self.uniform(groups, self.at + 1)[:, None]) / n
        cdf = w.cumsum(1)
        drawn = torch.searchsorted(cdf / cdf[:, -1:], comb).clamp(max=self.copies - 1)
        source = torch.where(uneven, index.gather(1, drawn)[at], everyone)
        mean = logw.logsumexp(1) - n[:, 0].double().log()
        self.logw[rows] = torch.where(uneven, mean[group], self.logw[rows])
        text[rows] = text[rows[source]]
        self.state = self.state.index_copy(0, rows, self.state[rows[source]])
        if cache is not None:
            cache.keep(source)

    def uniform(self, groups, k):
        """A random number in (0, 1] for each text."""
        return Noise(self.seed, groups, groups.new_tensor([-1]), k).uniform(1)[:, 0, 0]

    def chosen(self):
        """One copy of each text, by its weight, (B / copies,)."""
        logw = self.logw.view(-1, self.copies)
        if (logw.amax(1) == -math.inf).any():
            problem = f"none of {self.copies} copies of a row has any weight"
            raise Refused(problem, "--top_p 1, or a larger --exact")
        groups, cdf = torch.arange(len(logw), device=logw.device), logw.softmax(1).cumsum(1)
        number = torch.searchsorted(cdf / cdf[:, -1:], self.uniform(groups, 0)[:, None])[:, 0]
        return groups * self.copies + number


# ----- the block


class Constrained:
    """
    Mixed into a Block, generate's or another: what samplers draw from its predictions is drawn given the
    language of rule.
    """

    rule = None

    def __init__(self, model, process, text, cache, counts, rows, span, open, how):
        home, rule = rows.to(text.device), self.rule
        rule.to(text.device)
        self.chain = rule.chain(text, home, span)
        if rule.copies > 1:
            rule.resample(text, cache, home)
            self.chain.start = rule.state[home]
        super().__init__(model, process, text, cache, counts, rows, span, open, how)
        self.chain.myopic, self.drawn = rule.myopic, ((None, None), [], None)

    def predicted(self, logl, temperature, seen):
        """
        l and seen(l), log-probabilities (R, b, V): logl by temperature and top_p. Rows in which top_p leaves
        no text of the language go without it. Temperature 0: l as it is, for the likeliest text is wanted.
        """
        if temperature == 0:
            return logl.log_softmax(-1), seen(logl.log_softmax(-1))
        sharp = sharpen(logl, temperature, self.top_p).log_softmax(-1)
        logp = seen(sharp)
        if self.top_p < 1:
            every = sharpen(logl, temperature).log_softmax(-1)
            without = self.chain.log_z(logp) == -math.inf
            self.weigh(torch.where(without, -math.inf, 0.0).double())
            sharp = torch.where(without[:, None, None], every, sharp)
            logp = torch.where(without[:, None, None], seen(every), logp)
        return sharp, logp

    def given_noise(self, logl, x, alpha, temperature=1.0):
        """log D (R, b, V) where x is open: D(v) ∝ l(v) q(x | v). Temperature 0: l where q > 0."""
        a, m, *_ = self.process.mixing(column(alpha, x))
        m = pick(m.expand(logl.shape), x)[..., None]
        q = torch.where(F.one_hot(x, logl.size(-1)).bool(), a[..., None] + m, m)
        log_d = logl + ((q > 0).double() if temperature == 0 else q).log()
        noisy = self.open[..., None] & (log_d.amax(-1, keepdim=True) > -math.inf)
        return torch.where(noisy, log_d.log_softmax(-1), certain(x, log_d))

    def together(self, logp, key, greedy):
        """Tokens (R, b) of the product logp given the language, x where nothing is open, and log Z (R,)."""
        y, log_z = self.chain.draw(logp, key, greedy)
        if (self.open.any(1) & self.live & (log_z == -math.inf)).any():
            problem = "the sampler has written tokens from which no text of the language can be reached"
            raise Refused(problem, "--sampler ancestral")
        return torch.where(self.open, y, self.x), log_z

    def weigh(self, change):
        """Add to the log-weights of the rows that are written here, (R,)."""
        if self.rule.copies > 1:
            change = torch.where(self.open.any(1) & self.live, change, 0.0)
            self.rule.logw = self.rule.logw.index_add(0, self.rows, change)

    def reverse(self, alpha, alpha_t, alpha_s, noise, temperature=None, where=None, logits=None):
        logits = self.predict(alpha) if logits is None else logits
        return self.posterior(logits, alpha_t, alpha_s, noise, temperature, where)

    def posterior(self, logits, alpha_t, alpha_s, noise, temperature=None, where=None):
        """
        Clean tokens y ~ D given the language, then each position's own reverse step, given its y. Asked again
        for another alpha_s after the same prediction it takes the same y: a sampler that mixes the two
        results position by position, as psi does, would otherwise mix two texts.
        """
        temperature = self.temperature if temperature is None else temperature
        (prediction, x), levels, y = self.drawn
        again = prediction is logits and x is self.x and isinstance(alpha_s, float)
        again = again and (alpha_s, temperature) not in levels
        if not again:
            logl = self.process.loo_logits(logits.double(), self.x, alpha_t)
            seen = lambda logl: self.given_noise(logl, self.x, alpha_t, temperature)
            logl, logp = self.predicted(logl, temperature, seen)
            y, log_z = self.together(logp, noise.keys(), temperature == 0)
            levels = []
        self.drawn = (logits, self.x), [*levels, (alpha_s, temperature)], y
        x_s = super().posterior(certain(y, logits), alpha_t, alpha_s, noise, 1.0, where)
        if self.rule.copies > 1 and not again:
            after = self.given_noise(logl, x_s, alpha_s)
            after = after if where is None else torch.where(where[..., None], after, logp)
            self.weigh(log_z - self.chain.log_z(after))
        return x_s

    def ar_draw(self, logits):
        if self.open.size(1) > 1:
            raise Refused("this sampler draws many tokens of the AR mode at once", "--sampler ar")
        logl = self.process.loo_logits(logits.double(), self.prior(self.noise(-1)), 0.0)
        _, logp = self.predicted(logl, self.temperature, lambda logl: logl)
        y, log_z = self.together(logp, self.noise(0).keys(), self.temperature == 0)
        self.weigh(log_z)
        return y

    def propose(self, logp, left, noise):
        """samplers/unmasking.py: y ~ l given the language and the tokens that stand; log of its marginals."""
        seen = lambda logl: torch.where(left[..., None], logl, certain(self.x, logl))
        _, sharp = self.predicted(logp.double(), self.temperature, seen)
        y, _ = self.together(sharp, noise.keys(), self.temperature == 0)
        marginals = self.chain.marginals(seen(logp.double().log_softmax(-1)))
        return torch.where(left, y, self.x), torch.where(marginals.isnan(), -math.inf, marginals).to(logp)


def certain(x, like):
    """Logits (R, b, V) of tokens x (R, b)."""
    return torch.full_like(like, -math.inf).scatter(-1, x[..., None], 0.0)


# ----- the loop


def generate(
    write, constraint, model, process, prompt, *, block_size, sampler=ancestral, exact=1, myopic=False,
    max_new_tokens=None, eos_id=None, temperature=1.0, seed=0, block_class=None, **how,
):  # fmt: skip
    """
    generate.generate for texts of a language: an iterator of States.

    write        generate.generate, or that of fast/block.py. What is not named here goes there
    constraint   an Asked of samplers/language.py, a DFA for the whole text, or a list of DFAs, one a row
    exact        weighted copies of each row. More than 1: only the first and the last State
    myopic       the control: forbid what leads out of the language, however unlikely the rest becomes

    Raises Refused, a ValueError, for what cannot be.
    """
    if not hasattr(constraint, "dfas"):
        each = constraint if isinstance(constraint, (list, tuple)) else [constraint] * len(prompt)
        constraint = SimpleNamespace(dfas=lambda prompt: each, behind=False)
    refuse(process, "ar" if block_size == 1 else sampler.__name__, how, exact, temperature)
    base = block_class or getattr(model, "block_class", Block)
    block_class = type(f"Constrained{base.__name__}", (Constrained, base), {})
    rows = [p for p in prompt for _ in range(exact)]
    states = write(
        model, process, rows, block_size=block_size, sampler=sampler, max_new_tokens=max_new_tokens,
        eos_id=eos_id, temperature=temperature, seed=seed, block_class=block_class, **how,
    )  # fmt: skip
    state = next(states)  # it has checked the rest
    holes = torch.tensor([HOLE in p for p in rows])
    if constraint.behind and holes.any():
        problem = "a function says what stands behind a prompt, and a prompt has holes"
        raise Refused(problem, "a regular expression, which reads the whole text")
    first = torch.tensor([len(p) for p in rows])
    end = torch.where(holes, first, first.clamp(min=model.cfg.seq_len))  # by default
    end = end if max_new_tokens is None else first + max_new_tokens
    dfas = [dfa for dfa in constraint.dfas(prompt) for _ in range(exact)]
    rule = Rule(dfas, rows, end, process, eos_id, constraint.behind, exact, seed)
    rule.check()
    rule.myopic, block_class.rule = myopic, rule
    yield of_copies(state, torch.arange(0, len(rows), exact), exact)
    for state in states:
        if exact == 1:
            yield state
    if not rule.ends_well(state.x).all():
        problem = f"{sampler.__name__} has written a text outside of the language"
        raise Refused(f"{problem}: it cannot be constrained", "--sampler ancestral")
    if exact > 1:
        yield of_copies(state, rule.chosen(), exact)


def of_copies(state, rows, exact):
    """A State with one of each row's copies, and what all of them cost."""
    nfe_rows = state.nfe_rows.view(-1, exact).amax(1)
    return replace(state, x=state.x[rows], done=state.done[rows.to(state.done.device)], nfe_rows=nfe_rows)


def refuse(process, name, how, exact, temperature):
    """Raise Refused for what a constraint does not go with."""
    if name in REFUSED:
        raise Refused(f"{name} cannot be constrained: {REFUSED[name]}", "--sampler ancestral")
    if how.get("greedy_tail") and not process.absorbing:
        problem = "greedy_tail ends with the likeliest token of each position by itself"
        raise Refused(f"{problem}: it cannot be constrained", "leave --greedy_tail out")
    if exact < 1:
        raise Refused(f"exact is a number of weighted copies, not {exact}", "--exact 16")
    if exact > 1 and temperature == 0:
        raise Refused("temperature 0 draws nothing that could be weighted", "leave --exact out")
    if exact > 1 and (name not in WEIGHTED.split() or how.get("greedy_tail")):
        problem = f"no weights are known for {name}, whose choices depend on the tokens it draws"
        raise Refused(problem, f"--sampler {WEIGHTED.split()[1]}; others: {', '.join(WEIGHTED.split())}")


def writer(write, regex, constraint, tokenizer, V, **how):
    """For commands: `write`, of the language of --regex or --constraint where one is asked for."""
    if not regex and not constraint:
        return write
    try:
        asked = Asked(regex or load(constraint), tokenizer, V)
    except Refused as e:
        die(str(e), e.fix)
    return partial(generate, write, asked, **how)
