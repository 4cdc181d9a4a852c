"""
Does guidance give texts of the wanted class, and are they still right? Blank puzzles are filled with the
label asked for, at gammas from 0 to 6, by each sampler of methods/guidance.py.

    python train.py config/zoo/sudoku.toml --method guidance --out_dir out/guided
    python train.py config/zoo/sudoku.toml --method guidance --process uniform --out_dir out/guided_uniform
    python -m lab.guidance --ckpts out/guided,out/guided_uniform --report docs/guidance

satisfied: percent of texts that have the label. right: percent of right grids. Both with a 95 % interval over
texts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python lab/guidance.py works too
from data.dataset import checker
from diffusion import SCHEDULES
from fast.block import generate
from lab import plots
from lab.quality import accuracy, generated, prompts_of, wilson
from methods import guidance
from run import checkpoint
from run.cli import die, load_config, writable
from run.machine import guard, pick_device
from run.restore import dataset_for, method_of, rebuild

WAYS = {
    "classifier_free": (guidance.classifier_free, {}),
    "classifier_based": (guidance.classifier_based, {}),
    "classifier_based, first order": (guidance.classifier_based, {"first_order": True}),
}
HEAD = "# Guidance in numbers"


@dataclass
class GuidanceConfig:
    ckpts: str = "out/guided"  # runs of --method guidance, on 4x4 sudoku
    gammas: str = "0,1,2,3,4,6"
    steps: int = 8
    n_eval: int = 128  # texts a line
    report: str = ""  # this path with .md and .png
    seed: int = 1
    device: str = "auto"
    plain: bool = False  # run the lesson as it stands, not fast/


@dataclass
class Line:
    """A measurement: shares with their 95 % intervals (low, high), and token-forwards a token."""

    noise: str
    way: str
    gamma: float
    satisfied: float
    satisfied_spread: tuple
    right: float
    right_spread: tuple
    forwards: float


def measured(cfg, ckpt, gammas):
    """A Line for each sampler and gamma."""
    state = checkpoint.load(ckpt)
    _, settings = method_of(state)
    if not isinstance(settings, guidance.Settings):
        die(f"{ckpt} knows no label", "python train.py config/zoo/sudoku.toml --method guidance")
    run, meta, _, model, process = rebuild(ckpt, pick_device(cfg.device)[0], state, cfg.plain)
    data = dataset_for(ckpt, run, meta, model)
    module, prompts = checker(data.folder), prompts_of(data, cfg.n_eval, clues=False)
    trained, lines = sorted(run.block_sizes), []
    asked = [(way, gamma) for way in WAYS for gamma in gammas]
    for way, gamma in tqdm(asked, desc=ckpt, leave=False, disable=None):
        sampler, own = WAYS[way]
        how = {"block_size": trained[-1], "sampler": sampler, "steps": cfg.steps, "trained": trained}
        how |= {"schedule": SCHEDULES[run.schedule], "write": generate, "gamma": gamma, **own}
        rows, cost = generated(model, process, data, prompts, cfg.seed, **how)
        yes = guidance.label_of(torch.tensor(rows), settings.label).double().mean().item()
        right = accuracy(module, [data.tokenizer.decode(row) for row in rows])
        spread = right["low"], right["high"]
        shares = yes, wilson(yes, len(rows)), right["accuracy"], spread
        lines.append(Line(run.process, way, gamma, *shares, cost["token_forwards"]))
    return lines


def table(lines):
    share = lambda p, spread: f"{100 * p:.0f} ({100 * spread[0]:.0f} to {100 * spread[1]:.0f})"
    out = [
        "| noise | sampler | gamma | satisfied | right | token-forwards |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for x in lines:
        satisfied, right = share(x.satisfied, x.satisfied_spread), share(x.right, x.right_spread)
        out.append(f"| {x.noise} | {x.way} | {x.gamma:g} | {satisfied} | {right} | {x.forwards:.1f} |")
    return out


def picture(lines, path):
    """Right against satisfied: a line a noise and sampler, gamma beside its points."""
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(9, 4.5))
    colours = dict(zip(WAYS, (plots.ACCENT, plots.INK, plots.GREY), strict=True))
    for noise, way in dict.fromkeys((x.noise, x.way) for x in lines):
        some = [x for x in lines if (x.noise, x.way) == (noise, way)]
        at = [100 * x.satisfied for x in some], [100 * x.right for x in some]
        style = "-" if noise == "masked" else "--"
        axis.plot(*at, style, marker="o", markersize=3, color=colours[way], label=f"{noise}, {way}")
        for x in some:
            axis.annotate(f"{x.gamma:g}", (100 * x.satisfied, 100 * x.right), fontsize=6)
    axis.set_xlabel("percent with the label")
    axis.set_ylabel("percent right")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    plots.save(figure, path)


@guard("a smaller --n_eval")
def main():
    cfg = load_config(GuidanceConfig, sys.argv[1:])
    try:
        gammas = [float(word) for word in cfg.gammas.split(",")]
    except ValueError:
        gammas = []
    if not gammas or not all(0 <= gamma < 1e6 for gamma in gammas) or cfg.steps < 1 or cfg.n_eval < 2:
        problem = "gammas are numbers from 0, steps at least 1 and n_eval at least 2"
        die(problem, "--gammas 0,1,2,3,4,6 --steps 8 --n_eval 128")
    page = Path(f"{cfg.report}.md")
    if cfg.report:
        if page.exists() and not page.read_text(encoding="utf-8").startswith(HEAD + "\n"):
            die(f"{page} is not a page of ours, and would be written over", "--report docs/my_guidance")
        writable(f"{cfg.report}.md", "report"), plots.pyplot()
    lines = [line for ckpt in cfg.ckpts.split(",") for line in measured(cfg, ckpt, gammas)]
    print("\n".join(table(lines)))
    if cfg.report:
        text = [
            HEAD,
            "",
            *__doc__.strip().splitlines(),
            "",
            f"{cfg.steps} steps a block, {cfg.n_eval} texts a line.",
        ]
        text += ["", f"![right against satisfied]({Path(cfg.report).name}.png)", "", *table(lines), ""]
        page.write_text("\n".join(text), encoding="utf-8")
        picture(lines, f"{cfg.report}.png")


if __name__ == "__main__":
    main()
