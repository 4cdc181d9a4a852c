"""
What does it look like? The pictures of docs/: who attends to whom, noise becoming text, and quality against
speed.

    python -m lab.plots                                            docs/attention.png, which needs no
                                                                   checkpoint
    python -m lab.plots --film out/sudoku,out/sudoku_uniform       docs/film.png as well: a text of each, step
                                                                   by step

Needs matplotlib, which is imported when something is drawn.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python lab/plots.py works too
from run.cli import die, load_config, writable
from run.machine import guard

INK, GREY, ACCENT = "#1b1b1b", "#c9c9c9", "#1f6fb4"


@dataclass
class PlotsConfig:
    film: str = ""  # checkpoints, as in out/sudoku,out/sudoku_uniform
    steps: int = 4  # a block, in the film
    max_new_tokens: int = 48  # of the text in the film
    seed: int = 1
    out: str = "docs"  # a folder
    device: str = "auto"


def pyplot():
    """matplotlib.pyplot without a window; exits if there is none."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        die("a plot needs matplotlib", "pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure, path, dpi=80):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # the same bytes from the same numbers
    figure.savefig(path, dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    pyplot().close(figure)


def attention(path, n=8, block_sizes=(1, 4, 8)):
    """attention.attention_mask itself, of n clean and n noisy tokens: rows ask, columns are read."""
    from fast.attention import attention_mask

    plt = pyplot()
    names = {1: "block size 1: autoregressive", n: f"block size {n} = seq_len: plain diffusion"}
    figure, axes = plt.subplots(1, len(block_sizes), figsize=(4.2 * len(block_sizes), 4.2))
    for axis, b in zip(axes, block_sizes, strict=True):
        mask = attention_mask(b, 0, n, n, 0)[0]
        for i in range(2 * n):
            for j in range(2 * n):
                colour = (GREY if i < n else ACCENT if j < n else INK) if mask[i, j] else "white"
                axis.add_patch(
                    plt.Rectangle((j + 0.06, i + 0.06), 0.88, 0.88, facecolor=colour, edgecolor="#eeeeee")
                )
        axis.axhline(n, color=INK, linewidth=1), axis.axvline(n, color=INK, linewidth=1)
        axis.set(
            xlim=(0, 2 * n),
            ylim=(2 * n, 0),
            aspect="equal",
            title=names.get(b, f"block size {b}: block diffusion"),
        )
        (
            axis.set_xticks([n / 2, 1.5 * n], ["clean tokens", "noisy tokens"]),
            axis.set_yticks([n / 2, 1.5 * n], ["clean", "noisy"], rotation=90, va="center"),
        )
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    legend = (
        "grey: clean text reads itself; blue: a noisy block reads all clean text before it; black: and itself"
    )
    figure.text(0.5, 0.02, f"rows attend to columns.   {legend}", ha="center")
    save(figure, path)


def film(strips, path):
    """
    Noise becoming text. strips: (title, frames); a frame is (label, tokens), a token None (not there yet), or
    (text, is it noise, has this step changed it).
    """
    plt = pyplot()
    width = max(len(tokens) for _, frames in strips for _, tokens in frames)
    heights = [len(frames) + 1.6 for _, frames in strips]
    figure, axes = plt.subplots(
        len(strips), 1, figsize=(0.19 * width + 1.6, 0.2 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis, (title, frames) in zip(axes[:, 0], strips, strict=True):
        for i, (label, tokens) in enumerate(frames):
            axis.text(-1, i + 0.5, label, ha="right", va="center", fontsize=7, color="#777777")
            for j, token in enumerate(tokens):
                if token is None:
                    continue
                text, noise, new = token
                axis.add_patch(
                    plt.Rectangle(
                        (j, i),
                        1,
                        1,
                        facecolor="#f1f1f1" if noise else "#d5e8f7" if new else "white",
                        linewidth=0,
                    )
                )
                shown = {"\n": "↵", " ": "·"}.get(text, text)
                axis.text(
                    j + 0.5,
                    i + 0.55,
                    shown,
                    ha="center",
                    va="center",
                    family="monospace",
                    fontsize=8,
                    color="#b0b0b0" if noise else INK,
                )
        axis.set(xlim=(-0.2, width), ylim=(len(frames), 0), title=title)
        axis.axis("off")
    figure.tight_layout()
    save(figure, path)


def strip(ckpt, steps, max_new_tokens, seed, device):
    """
    (title, frames) for film: one text of a checkpoint, by its largest block size, from nothing (or from
    blanks).
    """
    from data.tokens import Tokenizer
    from diffusion import SCHEDULES
    from generate import NOTHING, generate
    from run.restore import restore

    run, meta, _, model, process = restore(ckpt, device)
    tokenizer, b = Tokenizer(meta, Path("data") / run.dataset), max(run.block_sizes)
    prompt = [0] * meta.get("prompt_len", 0)
    n = min(max_new_tokens, run.seq_len - len(prompt))
    how = {
        "steps": min(steps, b) if b > 1 else None,
        "max_new_tokens": n,
        "seed": seed,
        "schedule": SCHEDULES[run.schedule],
    }
    if b == 1:
        die(f"{ckpt} was trained on block size 1 alone: there is no noise to watch", "--film out/sudoku")
    states = [
        s for s in generate(model, process, [prompt], block_size=b, **how) if s.span[1] > s.span[0] >= 0
    ]
    final, frames, before = states[-1].x[0].tolist(), [], None
    for s in states:
        row, tokens = s.x[0].tolist(), []
        for i in range(len(prompt), len(row)):
            if row[i] == NOTHING:
                tokens.append(None)
                continue
            at_work = s.span[0] <= i < s.span[1] and s.step < how["steps"]
            noise = at_work and (s.step == 0 or row[i] != final[i])  # what will not stay
            tokens.append(
                (
                    "▒" if row[i] == process.mask_id else tokenizer.decode([row[i]]),
                    noise,
                    before is not None and before[i] != row[i] and not noise,
                )
            )
        frames.append((f"block {s.span[0] // b + 1}, step {s.step}", tokens))
        before = row
    return f"{run.process} noise, blocks of {b} in {how['steps']} steps", frames


def curves(panels, path, dpi=60):
    """
    panels: rows of dicts for a grid of axes: title, xlabel, ylabel, optionally xscale, yscale, ticks
        (positions, names), level (a dotted line at y), and series: (label, points, style) with points
        (x, y, low, high) joined in the order of x.
    """
    plt = pyplot()
    shape = len(panels), max(map(len, panels))
    figure, axes = plt.subplots(*shape, figsize=(6.5 * shape[1], 4.6 * shape[0]), squeeze=False)
    for axis, panel in zip(axes.flat, (p for line in panels for p in line), strict=True):
        for label, points, style in panel["series"]:
            if points:
                x, y, low, high = zip(*sorted(points), strict=True)
                spread = [
                    [b - a for a, b in zip(low, y, strict=True)],
                    [b - a for a, b in zip(y, high, strict=True)],
                ]
                axis.errorbar(x, y, yerr=spread, label=label, markersize=5, elinewidth=0.6, **style)
        if panel.get("level") is not None:
            axis.axhline(panel["level"], color="#888888", linestyle=":")
        axis.set(**{k: panel[k] for k in ("title", "xlabel", "ylabel", "xscale", "yscale") if k in panel})
        if "ticks" in panel:
            axis.set_xticks(*panel["ticks"]), axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles = {
        text: h for axis in axes.flat for h, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    figure.tight_layout()
    save(figure, path, dpi)


def frontier(rows, path, setting, label):
    """
    Quality against speed: rows as sweep.py makes them, a line of panels a setting(row), a curve a label(row);
    accuracy with its 95 % interval, or perplexity under a judge, against passes a token and tokens a second;
    with perplexity, token entropy as well, which a sampler that repeats itself loses (dotted: real text).
    """
    colours, panels = pyplot().cm.tab20, []
    real = lambda mine, y: next((r[y] for r in mine if r["sampler"] == "real text" and y in r), None)
    names = [name for name in dict.fromkeys(map(label, rows)) if name != "real text"]
    for where in dict.fromkeys(map(setting, rows)):
        mine = [r for r in rows if setting(r) == where]
        y, low, high, factor = (
            ("accuracy", "low", "high", 100)
            if "accuracy" in mine[0]
            else ("gen_ppl", "ppl_low", "ppl_high", 1)
        )
        what = "% correct (95 % interval)" if factor == 100 else "perplexity under the judge (95 % interval)"
        panels.append([])
        for x, xlabel in (
            ("nfe_token", "passes per token"),
            ("tokens_per_s", "tokens per second, on the machine at hand"),
        ):
            series = []
            for i, name in enumerate(names):
                headline = name in ("ar", "ancestral", "arpc")
                style = (
                    {"color": "black"}
                    if headline
                    else {"color": colours((2 * i + i // 10) % 20), "linestyle": "-" if i < 20 else "--"}
                )
                style |= {
                    "marker": "osD^v<>pP*Xh"[i % 12],
                    "linewidth": 2 if headline else 1,
                    "zorder": 3 if headline else 2,
                }
                points = [
                    (r[x], *(factor * r[k] for k in (y, low, high)))
                    for r in mine
                    if label(r) == name and x in r and y in r
                ]
                series.append((name, points, style))
            panels[-1].append(
                {
                    "title": where,
                    "xlabel": xlabel,
                    "ylabel": what,
                    "xscale": "log",
                    "yscale": "linear" if factor == 100 else "log",
                    "series": series,
                    "level": real(mine, y) if factor == 1 else None,
                }
            )
        if any("gen_ppl" in r for r in rows):
            varied = [
                (
                    name,
                    [
                        (r["nfe_token"], *[r["entropy"]] * 3)
                        for r in mine
                        if label(r) == name and r.get("entropy") is not None
                    ],
                    style,
                )
                for name, _, style in panels[-1][0]["series"]
            ]
            panels[-1].append(
                {
                    "title": where,
                    "xlabel": "passes per token",
                    "ylabel": "token entropy, nats",
                    "xscale": "log",
                    "series": varied,
                    "level": real(mine, "entropy"),
                }
            )
    curves(panels, path)


@guard("a smaller --max_new_tokens, or --device=cpu")
def main():
    cfg = load_config(PlotsConfig, sys.argv[1:])
    if cfg.steps < 1 or cfg.max_new_tokens < 1 or not 0 <= cfg.seed < 2**62:
        die(
            "steps and max_new_tokens must be at least 1, seed at least 0",
            "--steps 4 --max_new_tokens 48 --seed 1",
        )
    writable(f"{cfg.out}/attention.png", "out")
    attention(f"{cfg.out}/attention.png")
    strips = [
        strip(ckpt, cfg.steps, cfg.max_new_tokens, cfg.seed, cfg.device)
        for ckpt in cfg.film.split(",")
        if ckpt
    ]
    if strips:
        film(strips, f"{cfg.out}/film.png")
    print(f"{cfg.out}/attention.png" + f", {cfg.out}/film.png" * bool(strips))


if __name__ == "__main__":
    main()
