"""
A film of texts being made, from a record: a .gif, or a .png with the steps below each other.

    python sample.py --ckpt out/sudoku --steps 8 --gif out/film.gif
"""

from pathlib import Path

from run.cli import die, shown

FRAMES = 240  # a longer record is shown every so many steps
TEXTS = 4
COLUMNS = 64  # of a text without a width
STRIP = 16_000  # pixels, the height of a film strip
PAPER, INK, FAINT = "#ffffff", "#1b1b1b", "#8a8a8a"
FILL = {"n": "#ededed", "w": "#bfe3c6", "c": "#f6dc9b", "b": "#f3c1bb", "g": "#d9e6f5"}  # as in run/page.html


def write(lines, frames, path, fps):
    """Draw the first texts of a record into path. frames: of run/record.py."""
    try:
        import matplotlib
        from PIL import Image, ImageDraw, ImageFont
    except ModuleNotFoundError:
        die("a film needs Pillow and a font, which matplotlib brings", "pip install matplotlib")
    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
    font, small = (ImageFont.truetype(str(fonts / "DejaVuSansMono.ttf"), size) for size in (14, 11))
    about, every = lines[0], list(frames)
    strip = path.endswith(".png")
    across = about["width"] or min(COLUMNS, max(map(len, lines[-1]["x"])))
    n = min(TEXTS, about["recorded"]) if about["width"] else 1
    rows = -(-max(map(len, lines[-1]["x"])) // across)
    above = about["prompt_len"] if about["width"] else 0  # a prompt stands above its answer
    w, h = 20 if about["width"] else 11, 20
    wide, tall = n * (across * w + 24) + 24, rows * h + 46
    most = max(1, STRIP // tall) if strip else FRAMES
    step = -(-len(every) // most)
    kept = every[::-1][::step][::-1]  # the last is always there
    names = {int(id): text for id, text in about["tokens"].items()}

    def draw(line, cells):
        image = Image.new("RGB", (max(wide, 360), tall), PAPER)
        pen = ImageDraw.Draw(image)
        first, last = line["span"]
        label = f"tokens {first + 1} to {last}, step {line['step']}, {line['nfe']} passes"
        pen.text((24, 6), label, fill=FAINT, font=small)
        for row in range(n):
            for i, (id, what) in enumerate(cells[row]):
                x, y = (
                    24 + row * (across * w + 24) + i % across * w,
                    26 + i // across * h + 8 * (0 < above <= i),
                )
                if what in FILL:
                    pen.rectangle((x, y, x + w - 2, y + h - 2), fill=FILL[what])
                text = "·" if id == about["mask"] else shown(names.get(id, ""))
                text = {"\n": "↵", " ": " "}.get(text, text)[:1]
                pen.text((x + w // 2 - 5, y + 1), text, fill=FAINT if what in "nb" else INK, font=font)
        return image

    images = [draw(*frame) for frame in kept]
    if strip:
        whole = Image.new("RGB", (images[0].width, tall * len(images)), PAPER)
        for i, image in enumerate(images):
            whole.paste(image, (0, i * tall))
        whole.save(path)
        return
    pause = [round(1000 / fps)] * (len(images) - 1) + [2000]
    small_images = [image.quantize(32) for image in images]
    small_images[0].save(path, save_all=True, append_images=small_images[1:], duration=pause, loop=0)
