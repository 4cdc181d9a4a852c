"""
The text of a frozen language model, several tokens a pass: drafts by the adapters of methods/adapt.py, by its
heads, or by looking back in the text. See generate.py for letters.

A pass reads the last token and d drafted ones behind it. The logits behind each say what AR sampling would
write there. The drafts that agree stay, and one token more:

    pass    x_n-1  y_1  y_2  ... y_d     behind each of them k masks: the drafts of the next pass
    AR      x_n    x_n+1 ...             as long as y_i = x_n+i-1

Row r of a batch may be ahead of the others: every row has its own place, and its keys lie at slots of their
own.
"""

import copy

import torch

from rng import Noise
from samplers.diffuspec import NGrams, best_path, candidates
from samplers.pieces import known

OF_MASKS = ("masks", "chain", "path")
BOTH = [f"{draft}+lookup" for draft in (*OF_MASKS, "head")]
DRAFTS = (*OF_MASKS, "head", "lookup", *BOTH, "jacobi", "none")
# Rounding should not depend on what else is in a pass. A CPU adds up 512 keys at a time. So a pass has a
# multiple of KEYS, or all slots of the text with ROOM for masks, and hides the others. It has TOGETHER tokens
# at least: one alone is computed otherwise, and not faster. A CPU with AMX rounds bfloat16 otherwise in a
# product of more than PIECE rows. So no product has more clean ones.
KEYS, ROOM, TOGETHER, PIECE = 512, 64, 4, 32


class Lossless:
    """
    Rows of text that grow. tokens (R, W) ids, `n` (R,) of them written; drafts (R, d), `n_drafts` (R,) of
    them real. offered, accepted (d,): drafts that were checked and that stayed, by their place. adaptive:
    `length` (R,) is how many a row has checked next, else d.
    """

    def __init__(
        self, model, process, text, rows, seed, temperature, top_p, draft, ahead, *, ngram=2, adaptive=False,
        dtype=None, width=0,
    ):  # fmt: skip
        self.model, self.process, self.draft, self.d, self.ngram = model, process, draft, ahead, ngram
        self.temperature, self.top_p, self.width = temperature, top_p, width
        model.pack(dtype)
        R, W = text.shape
        self.n = known(text, "lossless")
        if (self.n < 1).any():
            raise ValueError("nothing stands before the first token (bos_id): lossless needs a prompt")
        self.tokens, self.W = text.clamp(min=0), W
        self.noise = Noise(seed, rows, torch.arange(W, device=rows.device), 0)
        self.drafts, self.n_drafts = text.new_zeros(R, ahead), torch.zeros_like(self.n)
        self.offered, self.accepted = torch.zeros(2, ahead, dtype=torch.long)
        self.adaptive, self.length = adaptive, torch.full_like(self.n, ahead)
        self.lately = self.length.double()  # (R,) running mean of the drafts that stayed in a pass
        self.k = ahead if draft.startswith(OF_MASKS) else 0  # masks behind a token
        self.slots = model.slots(R, W + max(ROOM, max(ahead + 1, TOGETHER) * self.k + 1))
        self.forwards = 0  # tokens put through the network, and not counted yet
        longest = int(self.n.max()) - 1
        if longest:
            at = torch.arange(longest, device=text.device).expand(R, -1)
            self.run(self.tokens[:, :longest], at, at < self.n[:, None] - 1, 0)

    def keep(self, rows):
        """Drop the batch rows not in `rows`."""
        for name in ("n", "tokens", "drafts", "n_drafts", "length", "lately"):
            setattr(self, name, getattr(self, name)[rows])
        self.noise.key = self.noise.key[rows]
        self.slots.keep(rows)

    def run(self, clean, at, real, k):
        """
        Hidden vectors of clean tokens (R, C) at positions `at`, (R, C, D), and of k masks behind each, (R, C,
        k, D). What is not `real` (R, C) leaves no trace.
        """
        C = clean.size(1)
        width = max(self.width, -(-TOGETHER // len(clean)))
        if width > C:
            more = (0, width - C)
            clean, at, real = (torch.nn.functional.pad(y, more) for y in (clean, at, real))
        self.forwards += clean.numel() * (1 + k)
        h, masks = self.model.merged(clean, torch.where(real, at, 0), real, k, self.slots, KEYS)
        return h[:, :C], masks[:, :C]

    def choose(self, logits, at):
        """The tokens AR sampling draws from logits (R, N, V) at positions `at` (R, N)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        noise = copy.copy(self.noise)
        noise.key = noise.key.gather(1, at.clamp(max=self.W - 1))
        pure = torch.full_like(at, self.process.mask_id)
        return self.process.posterior_sample(logits, pure, 0.0, 1.0, self.temperature, self.top_p, noise)

    def choose_draft(self, logits, at):
        """The same of logits over the draft vocabulary, by the same random numbers."""
        ids = self.model.draft_ids
        if self.temperature == 0:
            return ids[logits.argmax(-1)]
        wide = logits.new_full((*logits.shape[:-1], self.process.vocab_size), -torch.inf)
        return self.choose(wide.index_copy(-1, ids, logits), at)

    def round(self, live):
        """
        One pass. live (R,) bool: rows that are to grow. Returns how many tokens went through the network, the
        prompt's with those of the first pass.
        """
        W, i = self.W, torch.arange(self.d + 1, device=self.n.device)
        live = live & (self.n < W)
        n_drafts = self.n_drafts.minimum(self.length).minimum(W - 1 - self.n).clamp(min=0) * live
        C = 1 + int(n_drafts.max())
        i = i[:C]
        last = self.tokens.gather(1, self.n[:, None] - 1)
        y = torch.cat((last, self.drafts), dim=1)[:, :C]
        at = self.n[:, None] - 1 + i
        h, masks = self.run(y, at, (i <= n_drafts[:, None]) & live[:, None], self.k)
        logits = self.process.loo_logits(self.model.base_head(h))
        own = self.choose(logits, at + 1)  # (R, C)
        right = (own[:, :-1] == y[:, 1:]) & (i[1:] <= n_drafts[:, None])
        m = right.int().cumprod(1).sum(1)  # drafts that stay
        place = torch.where((i <= m[:, None]) & live[:, None], at + 1, W)  # W: nowhere
        self.tokens = torch.cat((self.tokens, last), dim=1).scatter(1, place, own)[:, :W]
        for j in range(C - 1):
            checked = live & (m >= j) & (n_drafts > j)
            self.offered[j] += int(checked.sum())
            self.accepted[j] += int((checked & (m > j)).sum())
        self.n = self.n + (m + 1) * live
        if self.adaptive:
            self.adapt_length(n_drafts, m)
        self.make_drafts(h, masks, own, m)
        forwards, self.forwards = self.forwards, 0
        return forwards

    def adapt_length(self, n_drafts, m):
        """
        As many as stayed lately, and a quarter of d more. m (R,) of n_drafts (R,) stayed. (DiffuSpec's rule,
        see samplers/diffuspec.py, also looks at how many were drafted. This falls where a draft ends early
        with EOS, and here none does: its length would stay at half of d.)
        """
        self.lately = torch.where(n_drafts > 0, (self.lately + m) / 2, self.lately)
        self.length = (self.lately.round().long() + max(1, self.d // 4)).clamp(max=self.d)

    def make_drafts(self, h, masks, own, m):
        """Drafts for positions n, n + 1, ..., behind m accepted ones and the AR mode's own token."""
        rows, d = torch.arange(len(m), device=m.device), self.d
        self.n_drafts = torch.full_like(self.n, 0 if self.draft in ("none", "lookup") else d)
        at = self.n[:, None] + torch.arange(d, device=m.device)
        if "head" in self.draft or "chain" in self.draft:
            state, token, drafts = h[rows, m], own[rows, m], []
            for j in range(d):
                x = self.model.embed(token)
                if self.k:
                    state = self.model.told("chain", masks[rows, m, j], state, x, packed=True)
                else:
                    state = self.model.told("drafter", state, x, packed=True)
                token = self.choose_draft(
                    self.model.draft_logits(state, packed=True)[:, None], at[:, j : j + 1]
                )[:, 0]
                drafts.append(token)
            self.drafts = torch.stack(drafts, dim=1)
        elif self.k:
            logits = self.model.draft_logits(masks[rows, m], packed=True)
            self.drafts = self.path(logits) if "path" in self.draft else self.choose_draft(logits, at)
        elif self.draft == "jacobi":  # what the AR mode said behind a wrong draft
            guess = torch.cat((own, own[:, -1:].expand(-1, d)), dim=1)
            self.drafts = guess.gather(1, m[:, None] + 1 + torch.arange(d, device=m.device))
        if "lookup" in self.draft:
            for r, (text, n) in enumerate(zip(self.tokens.tolist(), self.n.tolist(), strict=True)):
                if found := look_up(text[:n], d, self.ngram):
                    self.drafts[r] = torch.tensor(found, device=m.device)
                    self.n_drafts[r] = d

    def path(self, logits):
        """
        Tokens that fit each other (R, d): the best path through the likely ones of each mask, by their
        probability and by what stood together in the row's text so far (DiffuSpec, samplers/diffuspec.py).
        """
        none = self.process.vocab_size
        known = torch.arange(self.W, device=self.n.device) < self.n[:, None]
        text = torch.where(known, self.tokens, none)
        at = self.n[:, None] - torch.tensor([2, 1], device=self.n.device)
        before = torch.where(at >= 0, text.gather(1, at.clamp(min=0)), none)
        rows = torch.arange(len(text), device=text.device)
        nothing = torch.zeros_like(self.drafts)
        ids, logq = candidates(logits.log_softmax(-1), nothing, nothing > 0, 0.8, 15)
        return best_path(self.model.draft_ids[ids], logq, before, NGrams(rows, text, none), 3, 0.5)


def look_up(text, d, ngram):
    """
    The d tokens that came last time behind the last tokens of `text`, up to four of them and at least
    `ngram`, or nothing. What is copied may run into its own copy.
    """
    for g in range(4, ngram - 1, -1):
        end = text[-g:]
        for begin in range(len(text) - g - 1, -1, -1):
            if text[begin : begin + g] == end:
                whole = list(text)
                for j in range(d):
                    whole.append(whole[begin + g + j])
                return whole[len(text) :]
    return []
