"""
Exercise 7: ARPC. The sampler runs on small random networks in float64; what it asks of its block is written
down, and every step is compared with the recipe. At last its texts are counted beside the lesson's.
"""

import torch

import generate as lesson
from course import project
from course.harness import CHANCE, Wrong, close, one_source
from diffusion import Masked, Uniform, pick
from generate import Block, generate
from model import ModelConfig, Transformer
from samplers import SAMPLERS, guided

TITLE, MINUTES = "ARPC: the AR mode checks what diffusion wrote", 45
FUNCTION = "arpc"
MAY_CHANGE = True
SHAPES = "all tensors of a block are (R, b): rows and positions"
SOURCE = [guided.arpc, guided.ARJudge]
HINTS = [
    "y = block.reverse(a_t, a_t, 1.0, block.noise(k)) is the guess. Given positions keep what they are.\n"
    "The score of all tokens comes from one block.verify(y): -log_softmax, read off at y.\n"
    "How many tokens become noise depends on a_s alone: on the level after the step.",
    "ar = block.process.loo_logits(block.verify(y), block.x, 0.0).log_softmax(-1)\n"
    "score = -ar.gather(-1, y[..., None])[..., 0];  n = ((1 - a_s) * block.open.sum(1) + 0.5).floor()\n"
    "y = torch.where(top(score, n, block.open), block.prior(noise), y); then block.write(y), and yield.",
]
V, B = 3, 4  # letters, block size
MASKED, UNIFORM = Masked(V + 1, V), Uniform(V, "denoiser", ar_token=V)


def network(process, peak=1.0, **cfg):
    """A small network with random weights; peak 0: all tokens are equally likely."""
    torch.manual_seed(4)
    extra = process.n_extra_tokens
    cfg = ModelConfig(process.vocab_size, 8, n_layers=1, n_heads=2, d_model=16, n_extra_tokens=extra, **cfg)
    net = Transformer(cfg).double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.5)
    torch.nn.init.normal_(net.head.weight, 0.0, 0.6 * peak)
    torch.nn.init.normal_(net.head.bias, 0.0, 0.6 * peak)
    return net


class Watched(Block):
    """A Block that writes down its passes: guesses that were verified, noise levels, and x before each step."""

    log = []

    def forward(self, noisy, block_size, alpha, guess=None, **extra):
        logits = super().forward(noisy, block_size, alpha, guess, **extra)
        kind = "verify" if guess is not None else "predict"
        self.log.append(
            {"kind": kind, "y": guess, "alpha": alpha, "x": self.x, "logits": logits, "b": block_size}
        )
        return logits


def sampled(steps_of, net, process, prompts, steps, block_size=B, **how):
    """
    The last State, and [(x of the block, passes of the step)] after each step of its one block; pure noise
    comes first. steps_of: a sampler.
    """
    found, Watched.log = [], []

    def arpc(block):
        found.append((block.x.clone(), []))
        seen = len(Watched.log)
        for _ in steps_of(block):
            found.append((block.x.clone(), Watched.log[seen:]))
            seen = len(Watched.log)
            yield

    arpc.needs = ("AR mode",)
    how |= {"sampler": arpc, "steps": steps, "block_class": Watched}
    for state in generate(net, process, prompts, block_size=block_size, **how):
        pass
    return found, state


def asked(answer, net, process, prompts, steps, **how):
    found, state = sampled(answer.steps, net, process, prompts, steps, **how)
    if len(found) != steps + 1:
        raise Wrong(
            f"{answer.name} yields {len(found) - 1} times in {steps} steps", "one `yield` after each step"
        )
    return found, state


def quota(alpha, n):
    """Tokens that are noise at noise level alpha."""
    return int((1 - alpha) * n + 0.5 + 1e-9)


PROMPTS = [[0, 1, 2, 1], [2, 1, 0, 0, 1], [1, 1, 1, 0], [0, 2, 2, 2, 2, 2]] * 3  # some end inside the block
FIRST = [len(p) - 4 for p in PROMPTS]  # given tokens of the second block


def check(answer):
    net = network(MASKED)
    yield "one yield a step, and the first one after a step"
    found, state = asked(answer, net, MASKED, PROMPTS, 4)
    yield "given tokens stay"
    for x, _ in found:
        for row, (prompt, n) in enumerate(zip(PROMPTS, FIRST, strict=True)):
            if x[row, :n].tolist() != prompt[4:]:
                raise Wrong(
                    f"the prompt {prompt} became {prompt[:4] + x[row, :n].tolist()}", "block.open says which"
                )
    timed = network(UNIFORM, time_conditioning=True, cond_dim=8)
    uniform, _ = asked(answer, timed, UNIFORM, PROMPTS, 4)
    for p in (p for _, passes in uniform for p in passes if p["kind"] == "verify"):
        for row, n in enumerate(FIRST):
            if p["y"][row, :n].tolist() != PROMPTS[row][4:]:
                why = "where nothing is open the guess is block.x"
                raise Wrong("with uniform noise the guess that p_AR reads has other given tokens", why)
    yield "p_AR reads a whole guess, with no mask in it, in every step but the last"
    for k, (_, passes) in enumerate(found[1:-1]):
        verified = [p for p in passes if p["kind"] == "verify"]
        if not verified:
            raise Wrong(f"step {k} does not ask p_AR", "block.verify(y)")
        if (verified[-1]["y"] == V).any():
            raise Wrong(
                f"the guess that p_AR reads in step {k} has masks", "a_s = 1.0 in block.reverse guesses all"
            )
    yield "after a step (1 - a_s) n_open tokens are noise, halves rounded up; after the last one none"
    for steps in (4, 2, 3):
        masks(asked(answer, net, MASKED, PROMPTS, steps)[0], steps)
    yield "as many also where all tokens are equally bad"
    masks(asked(answer, network(MASKED, peak=0.0), MASKED, PROMPTS, 4)[0], 4, TIES)
    yield "the worst tokens by -log p_AR(y_i | y_<i) are noise again, the others are the guess"
    many = PROMPTS * 6
    for temperature in (1.0, 0.5):
        worst(answer, net, many, temperature)
    yield "what is no mask before a step is in its guess"
    steps, _ = asked(answer, net, MASKED, many, 4)
    for (before, _), (_, passes) in zip(steps[1:-1], steps[2:], strict=True):
        for p in passes:
            if p["kind"] == "verify" and ((p["y"] != before) & (before != V)).any():
                raise Wrong(
                    "a visible token was drawn again: masked noise has carried it over", "block.reverse does"
                )
    yield "temperature 0 guesses the likeliest tokens"
    steps, _ = asked(answer, net, MASKED, many, 4, temperature=0.0)
    guess = [p["y"] for p in steps[1][1] if p["kind"] == "verify"][-1]
    logits = [p["logits"] for p in steps[1][1] if p["kind"] == "predict"][0]
    free = steps[0][0] == V
    if (guess != logits[..., :V].argmax(-1))[free].any():
        raise Wrong("at temperature 0 another token was guessed", "block.reverse knows temperature and top_p")
    yield "the network is told the noise level before the step, a_t"
    for k, (_, passes) in enumerate(uniform[1:]):
        for p in passes:
            level = torch.as_tensor(p["alpha"]).double().view(-1)
            if p["kind"] == "predict" and not close(level, torch.full_like(level, k / 4)):
                late = "alpha[k] is the level before step k, alpha[k + 1] the one after it"
                raise Wrong(
                    f"step {k} of 4 tells the network alpha = {level[0]:.2f}, it must be {k / 4:.2f}", late
                )
    for name, process, net in (("masked", MASKED, network(MASKED)), ("uniform", UNIFORM, timed)):
        yield f"texts have the right probabilities, {name} noise"
        ours, mine = (texts(sampler, net, process, seed) for sampler, seed in (
            (SAMPLERS["arpc"], 1), (answer.steps, 2)))  # fmt: skip
        if one_source(ours, mine) < CHANCE:
            i = int((ours - mine).abs().argmax())
            pair = f"{i // V} {i % V}"
            raise Wrong(
                f"of {mine.sum()} texts of two letters {mine[i]} are {pair}, and {ours[i]} of the lesson's"
            )
    if state.nfe > 7:
        answer.note(f"4 steps took {state.nfe} passes, 2T - 1 = 7 are enough: the last guess needs no check")


TIES = "exactly n tokens are taken, also where scores are equal: `top` takes those on the left"


def masks(found, steps, why=""):
    """Wrong unless after each step as many tokens are masks as the recipe says."""
    for k, (x, _) in enumerate(found):
        for row in range(len(PROMPTS)):
            n = B - FIRST[row]
            have, want = int((x[row] == V).sum()), quota(k / steps, n)
            if have != want:
                at = f"after step {k} of {steps}" if k else "before the first step"
                level = f"a_s = {k / steps:.2f}"
                raise Wrong(f"{at} ({level}) {have} of {n} open tokens are masks, it must be {want}",
                            why or miscounted(found, steps))  # fmt: skip


def miscounted(found, steps):
    """Why the numbers of masks are not as they must be."""
    counts = lambda f: [[f(k, B - first) for first in FIRST] for k in range(1, steps + 1)]
    mine = [[int((row == V).sum()) for row in x] for x, _ in found[1:]]
    slips = {
        "that is the noise level before the step: alpha[k + 1] comes after it": lambda k, n: quota(
            (k - 1) / steps, n
        ),
        "that is the level of the step after: alpha[k + 1] belongs to step k": lambda k, n: quota(
            min(k + 1, steps) / steps, n
        ),
        "alpha and 1 - alpha are exchanged: 1 - a_s is the share of noise": lambda k, n: quota(
            1 - k / steps, n
        ),
        "halves are rounded up: (x + 0.5).floor()": lambda k, n: round((1 - k / steps) * n),
        "rounded down: the nearest number is meant": lambda k, n: int((1 - k / steps) * n + 1e-9),
        "rounded up: the nearest number is meant": lambda k, n: -int(-(1 - k / steps) * n - 1 + 1e-9),
        "given positions are counted: n_open is block.open.sum(1)": lambda k, n: min(quota(k / steps, B), n),
        "no token became noise again: block.prior(noise) where the worst are": lambda k, n: 0,
        "all of it is still noise: block.write(y) is missing, or everything was worst": lambda k, n: n,
    }
    for sentence, f in slips.items():
        if mine[:-1] == counts(f)[:-1]:  # the last step has no choice
            return sentence
    return ""


def worst(answer, net, prompts, temperature):
    """Wrong unless in each step the worst tokens of the guess became masks, and the others are the guess."""
    found, _ = asked(answer, net, MASKED, prompts, 4, temperature=temperature)
    steps = []
    for k, (x, passes) in enumerate(found[1:-1]):
        y = [p["y"] for p in passes if p["kind"] == "verify"][-1]
        free = torch.tensor([[i >= len(p) - 4 for i in range(B)] for p in prompts])
        if ((x != y) & (x != V) & free).any():
            raise Wrong(f"step {k}: a token that is no noise is not the guess that p_AR has read")
        steps.append((x == V, y, free, passes))
    context = torch.tensor([p[:4] for p in prompts])
    if not all(by(steps, scores(net, context)["p_AR"])):
        text = "a token stayed that p_AR finds worse than one that became noise"
        raise Wrong(text, judged_by(steps, scores(net, context)))


def by(steps, score):
    """For each step: does this score explain which tokens became noise?"""
    for noise, y, free, passes in steps:
        s = score(y, passes).double()
        most, least = (
            s.masked_fill(noise | ~free, -torch.inf).amax(1),
            s.masked_fill(~noise, torch.inf).amin(1),
        )
        yield bool((most <= least + 1e-9).all())


def scores(net, context):
    """{name: score (R, b)} by which the worst could have been chosen."""

    def logp(y):
        pure = torch.full_like(y, V)
        with torch.no_grad():
            return net(torch.cat((context, y), dim=1), pure, 1, start=4).log_softmax(-1)

    text = lambda y: logp(y)[..., :V].log_softmax(-1)
    diffusion = lambda passes: [p["logits"] for p in passes if p["kind"] == "predict"][-1][
        ..., :V
    ].log_softmax(-1)
    return {
        "p_AR": lambda y, passes: -pick(text(y), y),
        "the best": lambda y, passes: pick(text(y), y),
        "diffusion": lambda y, passes: -pick(diffusion(passes), y),
        "diffusion, the best": lambda y, passes: pick(diffusion(passes), y),
        "with the mask": lambda y, passes: -pick(logp(y), y),
        "entropy": lambda y, passes: torch.special.entr(text(y).exp()).sum(-1),
        "gap": lambda y, passes: text(y).amax(-1) - pick(text(y), y),
        "left": lambda y, passes: -torch.arange(B).expand(y.shape),
        "right": lambda y, passes: torch.arange(B).expand(y.shape),
        "shift": lambda y, passes: -pick(text(y), y.roll(-1, 1)),
        "shift back": lambda y, passes: -pick(text(y), y.roll(1, 1)),
    }


JUDGES = {
    "the best": "the surest tokens became noise: the score is -log p_AR, and the largest are the worst",
    "diffusion": "the diffusion mode judged its own guess: block.verify(y) asks the AR mode",
    "diffusion, the best": "the diffusion mode judged its own guess, and its surest tokens became noise",
    "with the mask": "the mask is in p_AR's softmax: block.process.loo_logits(...) rules it out",
    "entropy": "the entropy of p_AR was the score: what counts is the token that was guessed",
    "gap": "the distance to the likeliest token was the score: -log p_AR(y_i) was meant",
    "left": "the leftmost tokens became noise, whatever p_AR says",
    "right": "the rightmost tokens became noise, whatever p_AR says",
    "shift": "the score of a token was read off at the token after it: logits at i are for y_i",
    "shift back": "the score of a token was read off at the token before it: logits at i are for y_i",
}


def judged_by(steps, candidates):
    """What explains the choice instead."""
    for name, sentence in JUDGES.items():
        if all(by(steps, candidates[name])):
            return sentence
    return "chosen by chance, or by another score: -log p_AR(y_i | y_<i) from block.verify(y)"


def texts(sampler, net, process, seed, n=1500):
    """How often each text of two letters is made in three steps, (V * V,)."""
    _, state = sampled(sampler, net, process, [[]] * n, 3, 2, max_new_tokens=2, seed=seed)
    return torch.bincount(state.x[:, 0] * V + state.x[:, 1], minlength=V * V)


def run(function, ckpt):
    settings, net, process = project.network(ckpt, "out/sudoku", "masked")
    prompts, right, grids = project.puzzles(128)

    def mine(block):
        yield from function(block)

    mine.needs = ("AR mode",)
    for steps in (4, 8):
        for name, sampler in (("ancestral", lesson.ancestral), ("your ARPC", mine)):
            for state in generate(net, process, prompts, block_size=16, sampler=sampler, steps=steps):
                pass
            solved = right(state.x)
            print(f"{steps} steps of {name:<10} {solved:>4} of {len(prompts)} solved in {state.nfe} passes")
    project.show(grids(state.x))
    print(
        "\nWhat to look at: ancestral steps cannot take a token back. Compare as many passes, not as many steps:"
    )
    print("ARPC in 4 steps takes 7. Half the puzzles have few clues, and there a second opinion helps most.")
