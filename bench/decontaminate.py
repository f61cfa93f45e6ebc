"""How fast extras/decontaminate.py is, and what it finds of what was planted.

    python bench/decontaminate.py BENCHMARK.jsonl [BENCHMARK.jsonl ...]

The training set is arithmetic's with its numbers changed again and again. Into it go copies of 500
benchmark questions: with other markup, quoted inside a longer text, or with 40 % of their longer
words replaced by words from other questions.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli import DataFlags, run_main  # noqa: E402
from data import load_problems  # noqa: E402

rng = random.Random(0)
WORDS: list[str] = []  # of all benchmarks
WORD = r"(?<![\\\w])[A-Za-z]{4,}(?!\w)"


def questions(**flags) -> list[str]:
    return [p.question for p in load_problems(DataFlags(**flags), need_answer=False)]


def markup(text: str) -> str:
    text = text.replace("\\frac", "\\dfrac").replace("(", "\\left(").replace(")", "\\right) ")
    text = re.sub(r"\$([^$]+)\$", r"\\( \1 \\)", text)
    return re.sub(r"([=+<>-])", r" \1 ", text).replace(", ", " , ")


def quoted(text: str) -> str:
    return f"This one is from an old exam. {text} Show all of your work."


def reworded(text: str) -> str:
    return re.sub(WORD, lambda m: rng.choice(WORDS) if rng.random() < 0.4 else m[0], text)


def main() -> None:
    bench = [text for path in sys.argv[1:] for text in questions(dataset=path)]
    WORDS.extend(sorted({word for text in bench for word in re.findall(WORD, text)}))
    planted = {}  # copy -> how it was changed
    for i, text in enumerate(rng.sample(bench, min(500, len(bench)))):
        change = (markup, quoted, reworded)[i % 3]
        planted[change(text)] = change.__name__
    own = questions(split="train")
    rows = {*own, *planted}
    while len(rows) < 100_000:
        rows.add(re.sub(r"\d+", lambda m: str(rng.randrange(10 ** len(m[0]))), rng.choice(own)))
    with tempfile.TemporaryDirectory() as folder:
        train, clean = f"{folder}/train.jsonl", f"{folder}/clean.jsonl"
        lines = [json.dumps({"problem": row, "answer": "1"}) + "\n" for row in sorted(rows)]
        Path(train).write_text("".join(lines))
        command = [sys.executable, str(ROOT / "extras" / "decontaminate.py"), "--dataset", train]
        command += ["--against", ",".join(sys.argv[1:]), "--out", clean]
        began = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - began
        lines = Path(f"{folder}/clean.removed.jsonl").read_text().splitlines()
    found = {row["question"] for row in map(json.loads, lines)}
    print(f"{len(rows)} problems against {len(bench)}: {seconds:.0f} s")
    hits = Counter(planted[text] for text in found & set(planted))
    for name, size in Counter(planted.values()).items():
        print(f"{name:12s} {hits[name] / size:6.1%} of {size} found")
    print(f"others removed: {len(found - set(planted))} of {len(rows) - len(planted)}")


if __name__ == "__main__":
    run_main(main)
