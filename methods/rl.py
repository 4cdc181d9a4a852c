"""
Reinforcement learning: the network learns from a reward, check(text) of its dataset, and from no answers.

    python train.py --method rl --ckpt out/sudoku --objective bandit
    python -m lab.quality --ckpt out/sudoku_bandit

A sampler is a policy. Step k reads a state x_k (a block, partly noise) and proposes a token at every
position,

    y_k,i ~ D(. | x_k)  independently for all i,     x_k+1 = move(x_k, y_k),     the text is the last x

D is the denoiser of diffusion.py. `move` keeps some proposals and makes the others noise again: at random
(ancestral), or the surest first (confidence). The objectives differ in what they multiply with grad log D:

    objective  states                   tokens scored            factor of grad log D
    trace      all x_k                  those kept, see --score  z-score of R(text) in its group
    mdpo       all x_k                  all of y_k               z-score, step by step, of
                                                                 r_k - r_k-1 + mean of later r,  r_k = R(y_k)
    gdpo       the text, masked anew    the text itself          R(text) - group mean
    bandit     one x_k a text           fresh y from D           reward terms that read token i - their mean
    ce         as bandit                the data's answer        1: no reward, the control

and in the weights, see each function. Rows of block size 1 go on with cross-entropy, so that the AR mode
stays; --block_sizes 16:1 leaves them out. Letters: P prompts, G texts or proposals of each (a group), M = P
G texts, K steps, T the width of the text, N = T - start positions with a noisy copy, V the vocabulary.
"""

import copy
import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist

import methods
from data.dataset import Dataset, checker
from diffusion import loglinear, pick, sigma_for
from generate import NOTHING, Block, generate
from rng import Noise, draw
from run.cli import die
from samplers import SAMPLERS
from samplers.pieces import entropy, kl, top

# Samplers whose only draws that depend on the network are proposals: log D of these is the whole score.
SCORED = ("ancestral", "confidence", "threshold", "factor", "entropy_bound", "rcr", "prophet", "sched")
OTHER_BLOCKS = ("dynamic_blocks", "freedave")  # they ask about blocks of their own, which nobody records


@dataclass
class Settings:
    ckpt: str = "out/run"  # what to begin with: a training run's out_dir, or published weights
    objective: str = "bandit"  # bandit, trace, mdpo or gdpo; or ce, the control
    sampler: str = "ancestral"  # of the rollouts, with its default options
    steps: int = 4  # of the sampler, a block
    temperature: float = 1.0  # of the rollouts, and of the D that learns; above 0
    max_new_tokens: int = 0  # of a rollout; 0: up to the end of the context
    # rollouts of a prompt; bandit: proposals of a state. 0: 32 for bandit, else 8
    group: int = 0
    # row: check(text), for the whole text. position (bandit): terms(text) of the dataset, each for the tokens
    # it reads. auto: position where there is such a function
    reward: str = "auto"
    # trace: log D of the kept tokens (kept) or of all proposals (all). kept is exact where the order does not
    # depend on the network (ancestral, masked noise), and auto takes it there
    score: str = "auto"
    clip: float = 0.2  # a ratio to the policy that sampled counts from 1 - clip to 1 + clip
    beta: float = 0.0  # weight of KL(policy || the network at the start), in nats a token
    lag: int = 0  # rollouts by the weights before this many steps: 0, on-policy, or 1, one step off
    nodes: int = 3  # gdpo: numbers of masks that a text is scored at


FIXED = ("ckpt", "objective", "lag")
INHERITS = ("grad_clip", "log_every", "keep")


def DEFAULTS(s):
    folder = methods.folder_of(s.ckpt)
    folder = "out/" + folder.split("/")[-1] if ":" in folder else folder
    return {
        "init_from": s.ckpt,
        "out_dir": f"{folder}_{s.objective}",
        "max_steps": 300,
        "eval_every": 100,
        "batch_size": 64 if s.objective in ("bandit", "ce") else 16,
        "lr": 3e-4,
        "warmup": 10,
        "lr_schedule": "constant",
        "beta2": 0.95,
        "weight_decay": 0.0,
        "ema": 0.95,
        "n_samples": 0,
    }


def check(cfg, s):
    if cfg.init_from != s.ckpt:
        die("reinforcement learning begins from --ckpt", f"--ckpt {cfg.init_from}")
    s.group = s.group or (32 if s.objective == "bandit" else 8)
    for name, fine, fix in (
        ("objective", s.objective in OBJECTIVES, "bandit"),
        ("reward", s.reward in ("auto", "row", "position"), "auto"),
        ("score", s.score in ("auto", "kept", "all"), "auto"),
        ("sampler", s.sampler in SAMPLERS and s.sampler != "ar", "ancestral"),
        ("steps", s.steps >= 1, "4"),
        ("temperature", 0 < s.temperature < float("inf"), "1.0"),
        ("max_new_tokens", s.max_new_tokens >= 0, "0"),
        ("group", s.group >= 2, "8"),
        ("clip", s.clip > 0, "0.2"),
        ("beta", s.beta >= 0, "0.01"),
        ("lag", s.lag in (0, 1), "0"),
        ("nodes", s.nodes >= 1, "3"),
    ):
        if not fine:
            die(f"{name} cannot be {getattr(s, name)}", f"--{name} {fix}")
    if s.sampler in OTHER_BLOCKS:
        die(f"{s.sampler} asks about other blocks than the one it writes", "--sampler ancestral")
    if s.objective in ("trace", "mdpo") and s.sampler not in SCORED:
        die(
            f"{s.sampler} draws more than proposals, and {s.objective} would score these alone",
            f"--sampler {'|'.join(SCORED)}, or --objective bandit",
        )
    if s.objective in ("trace", "mdpo") and cfg.process != "masked" and s.sampler != "ancestral":
        die(f"{s.sampler} on uniform noise proposes from l, not from D", "--sampler ancestral")
    if s.reward == "position" and s.objective != "bandit":
        die("a token's part in a later reward is not known: position is for bandit", "--reward row")
    if s.score == "kept" and (s.objective != "trace" or cfg.process != "masked"):
        die("score kept is for --objective trace and masked noise", "--score auto")
    if not any(b > 1 for b in cfg.block_sizes):
        die(f"{s.ckpt} was trained on block size 1 alone: it has no denoising steps", "another --ckpt")
    if cfg.fsdp or cfg.dropout:
        fix = "--fsdp=false --dropout=0"
        die("rollouts and their likelihoods want one whole network, without dropout", fix)


# ----- rollouts


class Recorder(Block):
    """
    A Block that writes down each state the network is asked about, and the proposals. It draws them first,
    and then the step that they lead to; the steps have the sampler's own law. tape: {first position of a
    block: [step, ...]}, a step {name: tensor}. ids (M,): random numbers of a row.
    """

    def __init__(self, tape, ids, *args):
        self.tape, self.ids = tape, ids
        super().__init__(*args)

    def noise(self, k):
        return Noise(self.seed, self.ids[self.rows], self.positions, k)

    def predict(self, alpha, x=None, **extra):
        x = self.x if x is None else x
        level = torch.as_tensor(alpha, dtype=torch.float64, device=x.device).expand(len(x))
        free = self.open & self.live[:, None] & self.process.can_change(x)
        step = {"rows": self.rows, "x": x, "y": x, "after": x, "free": free}
        self.step = {**step, "alpha": level[:, None].expand_as(x)}
        self.tape.setdefault(int(self.positions[0]), []).append(self.step)
        return super().predict(alpha, x, **extra)

    def draw(self, logits, noise):
        self.step["y"] = super().draw(logits, noise)
        return self.step["y"]

    def posterior(self, logits, alpha_t, alpha_s, noise, temperature=None, where=None):
        """y ~ D, then x_s ~ q(x_s | x_t, x_0 = y): together the reverse step. D is its first half."""
        temperature = self.temperature if temperature is None else temperature
        law = self.process.posterior_probs
        y = draw(law(logits, self.x, alpha_t, 1.0, temperature, self.top_p), noise)
        certain = torch.full_like(logits, -torch.inf).scatter(-1, y[..., None], 0.0)
        x_s = draw(law(certain, self.x, alpha_t, alpha_s), noise)
        self.step["y"] = torch.where(self.open, y, self.x)
        return x_s if where is None else torch.where(where, x_s, self.x)

    def write(self, x):
        super().write(x)
        if self.tape.get(int(self.positions[0])):
            self.step["after"] = self.x


@dataclass
class Rollout:
    """
    Texts and how they came about. Where a block took fewer than K steps, or ended, `free` is False.
    """

    text: torch.Tensor  # (M, T) int64, prompts included; NOTHING behind the end of a row
    first: torch.Tensor  # (M,) the first position that was generated
    x: torch.Tensor  # (K, M, N) int64 states
    y: torch.Tensor  # (K, M, N) int64 proposals
    alpha: torch.Tensor  # (K, M, N) float64, the noise level the network was told
    free: torch.Tensor  # (K, M, N) bool: to be generated, and not settled yet
    kept: torch.Tensor  # (K, M, N) bool: masked before the step and not after it
    written: torch.Tensor  # (M, N) bool: generated, and part of the text
    b: int  # the block size
    start: int  # the position of the first noisy token
    group: int  # texts of a prompt, which lie side by side
    ids: torch.Tensor  # (M,) int64, for more random numbers
    R: torch.Tensor = None  # (M,) float64, what each text earned
    answer: torch.Tensor = None  # (M, N) int64, what the data has there

    @property
    def clean(self):
        return self.text.clamp(min=0)

    def noise(self, k, g=0):
        """Random numbers for the noisy positions; the sampler has those of k >= -2."""
        positions = torch.arange(self.start, self.text.size(1), device=self.ids.device)
        return Noise(0, self.ids + g, positions, k)

    def last(self):
        """(M, N) int64: the last step at which a position's block was asked about."""
        asked = self.blocks(self.free).any(-1)  # (K, M, N / b)
        at = torch.arange(1, len(asked) + 1, device=asked.device)[:, None, None]
        return ((asked * at).amax(0) - 1).clamp(min=0).repeat_interleave(self.b, 1)

    def blocks(self, z):
        """(..., N) -> (..., N / b, b)"""
        return z.unflatten(-1, (-1, self.b))


def rollout(model, process, prompts, ids, group, b, start, s, **how):
    """
    A Rollout of `group` texts for each of `prompts`, a list of ids (n,). ids (P,) int64: what a prompt's
    random numbers depend on. how: eos_id, schedule and trained, for generate.
    """
    tape, steps = {}, None if "own pace" in SAMPLERS[s.sampler].needs else s.steps
    ids = (ids[:, None] + torch.arange(group, device=ids.device)).flatten()
    how |= {"block_size": b, "sampler": SAMPLERS[s.sampler], "steps": steps, "temperature": s.temperature}
    how |= {"max_new_tokens": s.max_new_tokens or None, "block_class": functools.partial(Recorder, tape, ids)}
    try:
        for state in generate(model, process, [p for p in prompts for _ in range(group)], **how):
            pass
    except ValueError as e:
        long = "positions; the model has" in str(e)
        die(f"{s.sampler}: {e}", "a smaller --max_new_tokens" if long else "--sampler ancestral")
    if not tape:
        die(f"{s.sampler} never asks about a block with noise in it", "--sampler ancestral")
    text = state.x
    first = torch.tensor([len(p) for p in prompts], device=text.device).repeat_interleave(group)
    K, (M, T) = max(map(len, tape.values())), text.shape
    blank = lambda dtype: torch.zeros(K, M, T - start, dtype=dtype, device=text.device)
    found = {"x": blank(torch.long), "y": blank(torch.long), "after": blank(torch.long)}
    found |= {"free": blank(torch.bool), "alpha": blank(torch.float64)}
    for begin, several in tape.items():
        columns = torch.arange(begin - start, begin - start + b, device=text.device)
        for k, step in enumerate(several):
            for name, z in found.items():
                z[k, step["rows"][:, None], columns] = step[name].to(z.dtype)
    after = found.pop("after")
    kept = found["free"] & ~process.can_change(after)
    at = torch.arange(start, T, device=text.device)
    written = (at >= first[:, None]) & (text[:, start:] != NOTHING)
    about = {"kept": kept, "written": written, "b": b, "start": start, "group": group, "ids": ids}
    return Rollout(text, first, **found, **about)


# ----- rewards


class Reward:
    """What texts earn: check(text) and terms(text) of data/NAME/prepare.py."""

    def __init__(self, dataset, seq_len):
        self.data = Dataset(dataset, seq_len)
        self.module, self.eos = checker(self.data.folder), self.data.meta.get("eos_id")
        if self.module is None:
            fix = "--ckpt of a run on sudoku, digits or countdown"
            die(f"{self.data.folder}/prepare.py has no check(text): there is no reward", fix)
        keep = functools.lru_cache(1 << 16)  # the same texts come up again and again
        self.check, self.terms = keep(self.module.check), None
        if hasattr(self.module, "terms") and self.data.meta["tokenizer"] == "char":
            self.terms = keep(self.module.terms)

    def row(self, ids):
        """The share of correct answers in a text, a list of ids."""
        correct, asked = self.check(self.data.tokenizer.decode(ids))
        return correct / asked if asked else 0.0

    def positions(self, ids):
        """(n,) floats: the sum of the terms that read each token."""
        credit = [0.0] * len(ids)
        for value, where in self.terms(self.data.tokenizer.decode(ids)):
            for i in where:
                credit[i] += value
        return credit

    def texts(self, text):
        """R(text), (M,) float64."""
        rows = [[i for i in row if i != NOTHING] for row in text.tolist()]
        return torch.tensor(list(map(self.row, rows)), dtype=torch.float64, device=text.device)

    def proposals(self, roll, y, free, by_position=False):
        """
        What y (M, N) would earn, block by block: the text up to a block, and then the proposal. (M, N)
        float64, the same number for all tokens of a block, or by_position. 0 in blocks that were not asked
        about.
        """
        found = torch.zeros(y.shape, dtype=torch.float64)
        texts, ys, firsts = roll.text.tolist(), y.tolist(), roll.first.tolist()
        for m, block in roll.blocks(free).any(-1).nonzero().tolist():
            begin, columns = block * roll.b + roll.start, slice(block * roll.b, (block + 1) * roll.b)
            ids = texts[m][:begin] + ys[m][columns]
            end = len(ids)
            if self.eos in ids[firsts[m] :]:
                ids = ids[: ids.index(self.eos, firsts[m]) + 1]
            if not by_position:
                found[m, columns] = self.row(ids)
                continue
            credit = self.positions(ids) + [0.0] * (end - len(ids))
            found[m, columns] = torch.tensor(credit[begin:], dtype=torch.float64)
        return found.to(y.device)


# ----- what the objectives share


class Policy:
    """
    Three networks: the one that learns, the one that made the rollouts (None: the same one, on-policy) and
    the one at the start. sums: for the log, {name: (sum, count)}.
    """

    def __init__(self, forward, behaviour, reference, process, s, sums):
        self.nets, self.process, self.s = (forward, behaviour, reference), process, s
        self.sums = sums

    def log_d(self, logits, x, alpha):
        """log D(. | x), (n, N, V) float64, at the rollouts' temperature: the reverse step to alpha 1."""
        p = self.process.posterior_probs(logits, x, alpha, 1.0, self.s.temperature)
        return p.clamp(min=1e-300).log()

    def ask(self, clean, x, alpha, free, b, start, of=None):
        """
        (now, old, penalty). now, old: of(logits) of the learner and of the network that sampled; by default
        log D. penalty (n, N): beta KL(learner || start), summed over all V tokens: exact, where the papers
        estimate it from the token that was drawn.
        """
        of = of or (lambda logits: self.log_d(logits, x, alpha))
        fed = self.process.network_input(x)
        logits = lambda net: net(clean, fed, b, start, sigma_for(net, alpha))
        learner, behaviour, reference = self.nets
        mine = logits(learner)
        now, log_d = of(mine), self.log_d(mine, x, alpha)
        with torch.no_grad():
            old = now.detach() if behaviour is None else of(logits(behaviour))
            log_start = self.log_d(logits(reference), x, alpha)
        apart = kl(log_d, log_start) * free
        self.note("kl", apart.detach().sum(), free.sum())
        self.note("entropy", (entropy(log_d.detach()) * free).sum(), free.sum())
        return now, old, self.s.beta * apart

    def note(self, name, total, n):
        """Add to what the log shows as total / n."""
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before[0] + float(total), before[1] + float(n)


def surrogate(now, old, advantage, clip):
    """
    PPO's loss (arXiv 1707.06347), -min(r A, clip(r, 1 - clip, 1 + clip) A) with r = p / p_old: a ratio that
    is past the edge on the side A pulls to gets no more gradient. now, old: log p.
    """
    ratio = (now - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def z_score(R, group):
    """(R - mean) / (std + 1e-4) within each group, along the first dimension of R (M, ...)."""
    R = R.unflatten(0, (-1, group))
    return ((R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4)).flatten(0, 1)


def every_step(roll):
    """
    What Policy.ask takes, for all steps: (clean, x, alpha, free, b, start), K M rows. A row holds step k of
    all its blocks, each behind finished text: one pass, as in training.
    """
    x, alpha, free = (z.flatten(0, 1) for z in (roll.x, roll.alpha, roll.free))
    return roll.clean.repeat(len(roll.x), 1), x, alpha, free, roll.b, roll.start


def some_step(roll):
    """The same of one step a block, drawn at random from those it took: M rows."""
    u = roll.noise(-3).uniform(1)[..., 0]
    u = roll.blocks(u)[..., 0].repeat_interleave(roll.b, 1)
    k = (u * (roll.last() + 1)).ceil().long() - 1
    x, alpha, free = (z.gather(0, k[None])[0] for z in (roll.x, roll.alpha, roll.free))
    return roll.clean, x, alpha, free, roll.b, roll.start


# ----- the objectives: (roll, reward, policy, s) -> a loss, the sum over tokens, the mean over a group


def trace(roll, reward, policy, s):
    """
    TraceRL (arXiv 2509.06949): the likelihood of the steps that the sampler took.

        - 1/G sum_g sum_k sum_{i in S_k} min(r A_g, clip(r) A_g)       A_g = z-score of R(text_g)

    S_k: all proposals of step k, or those that were kept (the paper). At r = 1 and A = R this is REINFORCE,
    and its gradient is exactly that of the expected reward: with all proposals for every sampler in SCORED,
    with the kept ones where the order does not depend on the network. Elsewhere the kept ones are biased:
    that a token was kept says that the others were less sure. The z-score divides by a deviation that is
    itself random: also biased.
    """
    A = z_score(roll.R, roll.group).repeat(len(roll.x))[:, None]
    now, old, penalty = policy.ask(*every_step(roll))
    only_kept = s.score == "kept"
    if s.score == "auto":
        only_kept = s.sampler == "ancestral" and policy.process.absorbing
    scored, y = (roll.kept if only_kept else roll.free).flatten(0, 1), roll.y.flatten(0, 1)
    return ((surrogate(pick(now, y), pick(old, y), A, s.clip) + penalty) * scored).sum() / roll.group


def mdpo_advantage(r, group):
    """
    z-score within each group, step by step, of (r_k - r_k-1) + mean_{j > k} r_j, with r_-1 = 0, and the
    last r itself as the mean behind it. r (K, M, ...) float64: the rewards of the K proposals.
    """
    before = torch.cat((torch.zeros_like(r[:1]), r[:-1]))
    later = [r[k + 1 :].mean(0) if k + 1 < len(r) else r[-1] for k in range(len(r))]
    return torch.stack([z_score(a, group) for a in r - before + torch.stack(later)])


def mdpo(roll, reward, policy, s):
    """
    MDPO (arXiv 2508.13148): every step proposes a whole block, so every step has a reward, r_k = R(y_k).

        - 1/G sum_g sum_k b/n_k sum_{i free in x_k} min(r A_gk, clip(r) A_gk)      A: mdpo_advantage

    n_k counts the free tokens: each step weighs the same. All proposals are scored, so the score of step k
    times any reward r_j, j >= k, is exact. Their sum is the gradient of no one number: how much a later
    reward counts depends on k. The paper trains on some of its 128 steps, those of the largest |A|; here
    all are trained on.
    """
    r = torch.stack([reward.proposals(roll, y, free) for y, free in zip(roll.y, roll.free, strict=True)])
    steps = torch.arange(len(r), device=r.device)[:, None, None]
    r = r.gather(0, torch.minimum(steps, roll.last()))  # a block that ended early goes on with its last
    A = mdpo_advantage(r, roll.group).flatten(0, 1)
    states = every_step(roll)
    now, old, penalty = policy.ask(*states)
    y, free = roll.y.flatten(0, 1), states[3]
    n = roll.blocks(free).sum(-1).clamp(min=1).repeat_interleave(roll.b, 1)
    each = surrogate(pick(now, y), pick(old, y), A, s.clip) + penalty
    return (each * free * roll.b / n).sum() / roll.group


def masks_of_some(open, fraction, noise):
    """
    (masked, weight), (M, N) bool and float64: of the m open positions of a block ceil(m fraction) are
    masked, at random, and weigh m / ceil(m fraction). Over a uniform fraction, weight * sum over masks has
    the mean over n = 1..m of m/n * sum over n masks. open (M, N / b, b) bool, fraction (M, N / b) above 0.
    """
    m = open.sum(-1)
    n = (m * fraction).ceil().long()
    u = noise.uniform(1)[..., 0].view(open.shape)
    masked = top(u.flatten(0, 1), n.flatten(), open.flatten(0, 1)).view(open.shape)
    weight = m / n.clamp(min=1)
    return masked.flatten(1), weight.double().repeat_interleave(open.size(-1), 1)


def gdpo(roll, reward, policy, s):
    """
    GDPO (arXiv 2510.08554): a bound on log p(text) in place of the likelihood of the steps.

        - 1/G sum_g min(r_g A_g, clip(r_g) A_g)      r_g = exp(B_g - B_g,old),  A_g = R(text_g) - group mean
        B = mean over n = 1..b of b/n sum_{i masked} log p(text_i | text with n masks)

    One n from each of --nodes equal parts of 1..b, and the same masks for both networks. b/n is the weight
    of n masks; with 1/t and round(t b) masks, as in public code, B is off by some percent. B is exact in
    the mean: it is the mean over orders of log p(text filled in that order), so at most log p(text) of a
    random order (Jensen), and grad B is near grad log p, not equal to it. Other noise: the process's bound,
    one t from each part.
    """
    A = roll.R.view(-1, roll.group)
    A = (A - A.mean(1, keepdim=True)).flatten()
    process = policy.process
    text = process.encode(roll.clean[:, roll.start :])
    now, old, penalty = 0.0, 0.0, 0.0
    for node in range(s.nodes):
        noise = roll.noise(-3 - node)
        u = roll.blocks(noise.uniform(1)[..., 0])[..., 0]
        fraction = (node + u) / s.nodes
        if process.count_form:
            masked, weight = masks_of_some(roll.blocks(roll.written), fraction, noise)
            x = torch.where(masked, process.mask_id, text)
            alpha = (1 - fraction).repeat_interleave(roll.b, 1)
            log_p = lambda z, x=x, a=alpha, w=weight: w * pick(policy.log_d(z, x, a), text)
        else:
            t = fraction.clamp(min=process.t_min).repeat_interleave(roll.b, 1)
            alpha, slope = loglinear(t)
            x = torch.where(roll.written, process.corrupt(text, alpha, noise), text)
            masked = roll.written & process.pays(text, x)
            log_p = lambda z, x=x, a=alpha, slope=slope: -process.nll(z, text, x, a, slope).double()
        answers = policy.ask(roll.clean, x, alpha, masked, roll.b, roll.start, log_p)
        new, before, apart = ((z * masked).sum(1) / s.nodes for z in answers)
        now, old, penalty = now + new, old + before, penalty + apart
    return (surrogate(now, old, A, s.clip) + penalty).sum() / roll.group


def bandit(roll, reward, policy, s):
    """
    One step alone, from a state that the policy meets: G fresh proposals y_g ~ D(. | x), all from one pass.

        - 1/G sum_g sum_{i free} min(r A_gi, clip(r) A_gi)      A_gi = c_gi - mean of c_hi over h != g
        c_gi = sum of the terms of the reward R(y_g) that read token i

    At r = 1 the gradient is exactly that of E[R(y)], for any sampler that makes the states. Tokens are
    drawn independently given x, so a term that does not read token i has no covariance with its score, and
    may be left out; a baseline from the other draws costs nothing either. What it does not see: that a kept
    token changes the states that follow. MDPO's rewards of proposals, one step deep; nothing published that
    we know of.
    """
    states = some_step(roll)
    x, free = states[1], states[3]
    now, old, penalty = policy.ask(*states)
    by_position = reward.terms is not None and s.reward != "row"
    several = [draw(old.exp(), roll.noise(-4, g)) for g in range(s.group)]
    policy.note("distinct", distinct(torch.stack(several, 1) * free[:, None]), len(x))
    c = torch.stack([reward.proposals(roll, torch.where(free, y, x), free, by_position) for y in several])
    A = (c - c.mean(0)) * s.group / (s.group - 1)
    loss = penalty
    for y, a in zip(several, A, strict=True):
        loss = loss + surrogate(pick(now, y), pick(old, y), a, s.clip) / s.group
    return (loss * free).sum()


def ce(roll, reward, policy, s):
    """The control: cross-entropy to the data's answer, on the states that bandit is trained on. No reward."""
    states = some_step(roll)
    now, _, penalty = policy.ask(*states)
    return ((penalty - pick(now, policy.process.encode(roll.answer))) * states[3]).sum()


OBJECTIVES = {f.__name__: f for f in (bandit, trace, mdpo, gdpo, ce)}


def distinct(y):
    """y (P, G, N): the share of different ones among the G, summed over P."""
    return sum(len(set(map(tuple, group))) / len(group) for group in y.tolist())


# ----- the method


def rl_loss(
    forward, process, x0, block_size, t, objective, given, charged, schedule, start, noise, device=None, *,
    learner, step,
):  # fmt: skip
    """
    Takes the place of token_loss, arguments there: rollouts behind the prompts of x0, and the loss of an
    objective; rows of block size 1 have token_loss. Random numbers are those of (seed, step, row): rollouts
    are the same however rows are split.
    """
    s, device, behaviour = learner.settings, device or x0.device, learner.behaviour(step)
    if device.type == "mps":
        die("rollouts are scored in float64, which Apple's GPUs lack", "--device=cpu")
    sizes = torch.as_tensor(block_size).expand(len(x0)).cpu()
    total = torch.zeros((), dtype=torch.float64, device=device)
    policy = Policy(forward, behaviour, learner.reference, process, s, learner.sums)
    for b in sorted(set(sizes.tolist())):
        rows = (sizes == b).nonzero()[:, 0].to(x0.device)
        if b == 1:
            some = copy.copy(noise)
            some.key = noise.key[rows]
            how = {"schedule": schedule, "start": start, "noise": some, "device": device}
            of_rows = x0[rows], 1, t[rows.to(t.device)], objective, given[rows], charged[rows]
            total = total + learner.token_loss(forward, process, *of_rows, **how)[0]
            continue
        group = 1 if s.objective in ("bandit", "ce") else s.group
        ends = (~given[rows]).int().argmax(1)
        prompts = [x[:n] for x, n in zip(x0[rows], ends.tolist(), strict=True)]
        how = {"eos_id": learner.reward.eos, "schedule": schedule, "trained": sorted(learner.cfg.block_sizes)}
        ids = noise.key[rows, -1].to(device)
        begin = min(map(len, prompts)) // b * b  # before it there is nothing but prompts
        roll = rollout(behaviour or learner.model, process, prompts, ids, group, b, begin, s, **how)
        roll.R = learner.reward.texts(roll.text)
        roll.answer = x0[rows].repeat_interleave(group, 0)[:, begin : roll.text.size(1)].to(device)
        policy.note("reward", roll.R.sum(), len(roll.R))
        if group > 1:
            policy.note("distinct", distinct(roll.text.view(len(rows), group, -1)), len(rows))
        total = total + OBJECTIVES[s.objective](roll, learner.reward, policy, s)
    return total, None


class Learner(methods.Learner):
    """Besides the network: the one at the start, and with --lag 1 the one before the last step."""

    def __init__(self, cfg, settings, model, process, token_loss):
        super().__init__(cfg, settings, model, process, token_loss)
        self.reward, self.sums = Reward(cfg.dataset, cfg.seq_len), {}
        if settings.reward == "position" and self.reward.terms is None:
            die(f"data/{cfg.dataset}/prepare.py has no terms(text), by character", "--reward row")
        if settings.objective == "ce" and not self.reward.data.given:
            die(f"{cfg.dataset} has no prompts: what would the answer be?", "--objective bandit")
        self.reference, self.before = self.frozen(), self.frozen() if settings.lag else None
        self.step, self.samples = None, None

    def frozen(self):
        """A copy of the network as it is now."""
        return copy.deepcopy(self.model).eval().requires_grad_(False)

    def loss(self, step):
        return functools.partial(rl_loss, learner=self, step=step)

    def behaviour(self, step):
        """
        The network that makes the rollouts of this step, None: the one that learns. Asked by the step
        itself: a run that stops before it must save what was before.
        """
        if step != self.step:
            self.step, self.sums, self.samples = step, {}, self.before
            if self.settings.lag:
                self.before = self.frozen()
        return self.samples

    def modules(self):
        return {"reference": self.reference} | ({"before": self.before} if self.before is not None else {})

    def state_dict(self):
        return {name: module.state_dict() for name, module in self.modules().items()}

    def load_state_dict(self, state):
        for name, module in self.modules().items():
            module.load_state_dict(state[name])

    def record(self):
        """
        Means over the latest step: reward, check(text) of the rollouts; distinct, the share of different
        texts among those of a prompt (bandit: among the proposals of a state); entropy of D and KL(D || D
        at the start) in nats a free token.
        """
        names = ("reward", "distinct", "entropy", "kl")
        sums = torch.tensor([self.sums.get(name, (0.0, 0.0)) for name in names], dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return {name: a / n for name, (a, n) in zip(names, sums.tolist(), strict=True) if n}

    def note(self):
        s = self.settings
        what = "proposals of a state" if s.objective == "bandit" else "rollouts of a prompt"
        return f"{s.objective}, {s.sampler} in {s.steps} steps, {s.group} {what}: no loss here is a bound"
