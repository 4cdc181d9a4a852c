"""
Questions about numbers in everyday words, one a line: made from patterns, or GSM8K's. A language model
answers them, and --method adapt learns from its answers. test.jsonl has the true ones too, for lab.gsm8k.

    python -m lab.questions                writes out/questions/train.txt, test.txt and test.jsonl
    python -m lab.questions --input train.jsonl --test_input test.jsonl --out_dir out/gsm8k
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python lab/questions.py works too
from data.shards import Bad, read, texts_of
from run.cli import die, load_config
from run.machine import guard

NAMES = "Anna Ben Clara David Ella Finn Grace Hugo Iris Jack Lena Max Nora Omar Paula Rosa Sam".split()
THINGS = "apples books cards coins eggs flowers marbles pencils shells stamps stickers tickets".split()
PLACES = "market school library park garden farm bakery museum".split()
PATTERNS = (
    "{a} has {x} {thing}. {b} gives {a} {y} more. How many {thing} does {a} have now?",
    "{a} buys {x} boxes with {y} {thing} in each. How many {thing} does {a} have in all?",
    "{a} had {z} {thing} and gave {x} of them to {b}. How many {thing} are left?",
    "At the {place}, {a} sells {x} {thing} for ${y} each. How much money does {a} make?",
    "{a} walks {x} miles to the {place} every day. How far does {a} walk to get there in {y} days?",
    "{a} and {b} share {z} {thing} equally. How many does each of them get?",
    "{a} reads {x} pages a day. How many pages does {a} read in {y} weeks?",
    "{a} is {x} years old. {b} is {y} years older. How old is {b}?",
    "A ticket to the {place} costs ${x}. {a} buys {y} tickets and pays with ${w}. What is the change?",
    "{a} saves ${x} a week. How many weeks does it take {a} to save ${w}?",
    "There are {x} shelves at the {place}, and {y} {thing} on each. {a} takes {v}. How many {thing} remain?",
    "{a} bakes {x} cakes in the morning and twice as many in the afternoon. How many cakes does {a} bake?",
)


@dataclass
class QuestionsConfig:
    input: str = ""  # lines {"question": ...}, as in GSM8K's train.jsonl; empty: questions from patterns
    test_input: str = ""  # the same, its test.jsonl
    out_dir: str = "out/questions"
    n_train: int = 120  # questions to learn from
    n_test: int = 50  # and others, to measure on
    seed: int = 0


def answers(x, y, z, v, w):
    """What answers each of PATTERNS."""
    return x + y, x * y, z - x, x * y, x * y, z // 2, 7 * x * y, x + y, w - x * y, w // x, x * y - v, 3 * x


def question(rng):
    """(question, the number that answers it)."""
    a, b = rng.sample(NAMES, 2)
    x, y, v = rng.randint(2, 12), rng.randint(2, 9), rng.randint(1, 4)
    numbers = {"x": x, "y": y, "v": v, "z": 2 * x + 2 * y, "w": x * (y + 2)}
    i, thing, place = rng.choice(range(len(PATTERNS))), rng.choice(THINGS), rng.choice(PLACES)
    return PATTERNS[i].format(a=a, b=b, thing=thing, place=place, **numbers), answers(**numbers)[i]


def drawn(name, n, rng):
    """n questions of a .jsonl file, each on one line."""
    try:
        lines = [texts_of(name, where, line, ["question"])[0] for where, line, _ in read(name, ["question"])]
    except Bad as e:
        die(*e.args)
    except OSError as e:
        die(f"{name}: {e.strerror}", "python -m lab.questions --input train.jsonl --test_input test.jsonl")
    if len(lines) < n:
        die(f"{name} has {len(lines)} questions, not {n}", f"--n_train {len(lines)} --n_test {len(lines)}")
    return [" ".join(text.split()) for text in rng.sample(lines, n)]


@guard("another --out_dir")
def main():
    cfg = load_config(QuestionsConfig, sys.argv[1:])
    n = cfg.n_train + cfg.n_test
    if bool(cfg.input) != bool(cfg.test_input):
        die("questions are needed for both files, or for none", "--input train.jsonl --test_input test.jsonl")
    if not 1 <= min(cfg.n_train, cfg.n_test) <= n <= 10**5:
        die(
            "n_train and n_test must be at least 1, and 100,000 together at most", "--n_train 120 --n_test 50"
        )
    rng, made = random.Random(cfg.seed), {}
    if cfg.input:
        train, test = drawn(cfg.input, cfg.n_train, rng), drawn(cfg.test_input, cfg.n_test, rng)
    else:
        while len(made) < n:
            text, answer = question(rng)
            made[text] = answer  # none twice
        train, test = list(made)[: cfg.n_train], list(made)[cfg.n_train :]
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").unlink(missing_ok=True)  # of other questions
    if made:
        lines = [json.dumps({"question": text, "answer": f"#### {made[text]}"}) for text in test]
        (folder / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, part in (("train", train), ("test", test)):
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
        print(f"{folder / name}.txt: {len(part)} questions, such as: {part[0]}")
    if made:
        print(f"{folder / 'test.jsonl'}: the same as test.txt, with their answers")


if __name__ == "__main__":
    main()
