"""
Better drafts for self-speculation? A path of tokens that fit each other, and drafts as long as they are good
for. See generate.py for letters, and `speculation` in samplers/guided.py.
"""

from pathlib import Path

import numpy as np
import torch

from generate import sampler
from samplers.pieces import need

NGRAM = 3


@sampler("AR mode", "own pace")
def diffuspec(block, *, search="path", adaptive=True, corpus="", beam=3, mass=0.8, width=15, weight=0.5):
    """
    `speculation` with the drafts of DiffuSpec (arXiv 2510.02358). The diffusion mode's tokens are drawn
    independently, so two likely ones may not fit. A draft is the best path through the likely ones, by beam
    search, and the AR mode checks its first k tokens:

        path     argmax_y sum_i (1 - weight) log q_i(y_i) + weight log p_3(y_i | y_i-2, y_i-1)
        k        b/2 at first, then floor(G), and b/4 more where A >= G, in [b/4, b]. G and A are running
                 means, with rate 1/2 and from 0, of the tokens drafted and accepted in this block

    p_3 is made of counts of three tokens in a row. (The paper's k runs over the whole text and begins at its
    largest. Here a block would be over by then.) A token is valid if it is the one that --sampler ar writes
    with this seed. So every token is AR's own, whatever the draft. The standard test, min(1, p/q), would not
    be lossless: a path is no draw of q. A round takes two passes.

    search: path | none: the independent draws of `speculation --draft diffusion`
    adaptive: false checks the whole block
    corpus: a file of 16-bit ids to count in, as data/NAME/train.bin; empty: each row's own text before the
        block
    beam: paths that are kept
    mass: of the tokens that are likely at a position
    width: how many they are, at most
    weight: of p_3; 0 takes the likeliest token everywhere
    """
    need(search in ("path", "none"), "search", search, "path or none")
    need(1 <= beam <= 1000, "beam", beam, "from 1 to 1000")
    need(0 < mass <= 1, "mass", mass, "above 0, at most 1")
    need(width >= 1, "width", width, "at least 1")
    need(0 <= weight <= 1, "weight", weight, "between 0 and 1")
    need(
        not corpus or Path(corpus).is_file(), "corpus", repr(corpus), "a file of ids, as data/NAME/train.bin"
    )
    block.need_ar_mode()
    process, b = block.process, block.x.size(1)
    here, known, quarter = torch.arange(b, device=block.x.device), ~block.open, max(1, b // 4)
    grams = NGrams(*texts(block, corpus), process.vocab_size) if search == "path" and weight else None
    half = max(1, b // 2) if adaptive else b
    length = torch.full((len(block.x),), half, device=block.x.device)  # k
    drafted, accepted = torch.zeros(2, len(block.x), dtype=torch.float64, device=block.x.device)  # G, A
    rounds = 0
    while block.live.any():
        done = (known & block.open).sum(1) / block.open.sum(1).clamp(min=1)
        alpha = torch.where(known.all(1), 0.0, done).double()
        q = process.loo_logits(block.predict(alpha), block.x, alpha)
        if search == "path":
            # at temperature 0 the AR mode's token is one, but a path may still choose
            q = block.sharpen(q) if block.temperature else q
            likely = candidates(q.log_softmax(-1), block.x, known, mass, width)
            y = best_path(*likely, before(block), grams, beam, weight)
        else:
            y = torch.where(known, block.x, block.ar_draw(q))
        start = known.int().cumprod(1).sum(1)  # the first position to check
        end = (start + length).clamp(max=b)
        own = block.ar_draw(process.loo_logits(verify(block, y, int(end[block.live].max())), block.x, 0.0))
        right = ((own == y) & (here < end[:, None])) | known
        n = right.int().cumprod(1).sum(1)
        # the first that is not right, if it was checked, gets the AR mode's own token
        first = (here == n[:, None]) & (here < end[:, None])
        known = known | (here < n[:, None]) | first
        fresh = block.prior(block.noise(2 * rounds + 1))
        block.write(torch.where(known, torch.where(first, own, y), fresh))
        if adaptive:
            drafted = (drafted + (end - start)) / 2
            accepted = (accepted + (n - start)) / 2
            length = drafted.floor().long() + quarter * (accepted >= drafted)
            length = length.clamp(quarter, b)
        block.live, rounds = block.live & ~known.all(1), rounds + 1
        yield


def verify(block, y, end):
    """block.verify(y), up to the position `end`; zeros behind. (R, b, V)"""
    logits = block.forward(block.ar_input()[:, :end], 1, 0.0, guess=y[:, :end])
    return torch.nn.functional.pad(logits, (0, 0, 0, y.size(1) - end))


def candidates(logq, x, known, mass, width):
    """
    The fewest likeliest tokens of each position whose probability reaches `mass`, at most `width`: ids and
    log q, (R, b, W) each, -inf where there are fewer. A known token is the only one of its position.
    """
    logq, ids = logq.double().topk(min(width, logq.size(-1)), dim=-1)
    p = logq.exp()
    logq = logq.masked_fill(p.cumsum(-1) - p >= mass, -torch.inf)
    logq[..., 1:] = logq[..., 1:].masked_fill(known[..., None], -torch.inf)
    logq[..., 0], ids[..., 0] = logq[..., 0].masked_fill(known, 0.0), torch.where(known, x, ids[..., 0])
    return ids, logq


def before(block):
    """The two tokens before the block, (R, 2): V where there are none."""
    at = block.positions[0] + torch.arange(-2, 0, device=block.positions.device)
    tokens = block.text[block.rows[:, None], at.clamp(min=0)]
    return torch.where((at >= 0) & (tokens >= 0), tokens, block.process.vocab_size)


def best_path(ids, logq, context, grams, beam, weight):
    """Beam search, left to right: candidates and log q (R, b, W) -> y (R, b). grams None: no p_3."""
    R, b, W = ids.shape
    path = context[:, None].expand(R, beam, 2)
    score = logq.new_full((R, beam), -torch.inf)
    score[:, 0] = 0.0  # all paths begin as one
    for i in range(b):
        token, logp = (y[:, None, i].expand(R, beam, W) for y in (ids, logq))
        gain = (1 - weight) * logp
        if grams is not None:
            gain = gain + weight * grams.log_p(path[..., -2, None], path[..., -1, None], token)
        gain = gain.masked_fill(logp == -torch.inf, -torch.inf)  # no candidate, whatever the weight is
        score, best = (score[..., None] + gain).flatten(1).topk(beam, dim=1)
        path = path.gather(1, (best // W)[..., None].expand(-1, -1, path.size(2)))
        path = torch.cat((path, token.flatten(1).gather(1, best)[..., None]), dim=2)
    return path[:, 0, 2:]


def texts(block, corpus):
    """(rows, ids (N, L)) to count in: a corpus for all rows, or each row's text before the block."""
    if corpus:
        ids = torch.from_numpy(np.fromfile(corpus, np.uint16).astype(np.int64))[None]
        need(int(ids.max()) < block.process.vocab_size, "corpus", repr(corpus), "of the network's own ids")
        return None, ids.to(block.x.device)
    end = int(block.positions[0])
    return torch.arange(len(block.rows), device=block.x.device), block.text[block.rows, :end].clamp(min=0)


class NGrams:
    """
    p_3 from counts c, each order leaning on the one below with the weight of one token:

        p_n(v | context) = (c(context, v) + p_n-1(v | shorter context)) / (c(context) + 1),  p_0 = 1 / V

    rows (R,): a model for each of R texts; None: one for all. ids (R, L).
    """

    def __init__(self, rows, ids, vocab_size):
        self.vocab_size, self.rows = vocab_size, rows
        self.tables = []
        for n in range(NGRAM + 1):  # n tokens in a row, and the text they are of, as one number
            grams = ids.unfold(1, n, 1) if 0 < n <= ids.size(1) else ids.new_zeros(len(ids), 0, n)
            if n == 0:
                grams = ids.new_zeros(*ids.shape, 0)
            text = torch.arange(len(ids), device=ids.device)[:, None].expand(grams.shape[:2])
            codes = self.code(text, *grams.unbind(-1))
            self.tables.append(codes.flatten().unique(return_counts=True))

    def code(self, text, *tokens):
        code = text
        for token in tokens:
            code = code * (self.vocab_size + 1) + token
        return code

    def count(self, text, *tokens):
        codes, counts = self.tables[len(tokens)]
        if len(codes) == 0:
            return 0.0
        code = self.code(text, *tokens)
        at = torch.searchsorted(codes, code.contiguous()).clamp(max=len(codes) - 1)
        return torch.where(codes[at] == code, counts[at], 0).double()

    def log_p(self, *tokens):
        """log p_3 of the last of three tokens behind the others; each (R, ...), broadcast."""
        tokens = torch.broadcast_tensors(*tokens)
        text = torch.zeros_like(tokens[0])
        if self.rows is not None:
            text = self.rows.view(-1, *[1] * (text.dim() - 1)).expand_as(text)
        p = torch.full(text.shape, 1 / self.vocab_size, dtype=torch.float64, device=text.device)
        for n in range(NGRAM):
            context = tokens[NGRAM - 1 - n : NGRAM - 1]
            p = (self.count(text, *context, tokens[-1]) + p) / (self.count(text, *context) + 1)
        return p.log()
