"""How fast extras/decontaminate.py is, and what it finds of what was planted.

    python bench/decontaminate.py BENCHMARK.jsonl [BENCHMARK.jsonl ...] [--train TRAIN.jsonl] [--size 100000]

The training set: TRAIN's problems and arithmetic's, with their numbers changed again and again until there are --size.
Into it go copies of 500 benchmark questions, each changed in one of these ways:

  markup       spaces, $...$ for \\(...\\), dfrac, left and right, case: the same question
  quoted       inside a longer text
  words N %    every number kept, N % of the words (four letters or more) replaced by words from other questions: a
               harsher change than a rewording, which keeps the nouns

Prints seconds, the share of the planted copies found, by change and by test, and how many others were removed.
"""

import argparse
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

from data import arithmetic, load, run_main  # noqa: E402


def other_numbers(rng, text: str) -> str:
    return re.sub(
        r"\d+", lambda m: str(rng.randint(10 ** (len(m[0]) - 1), 10 ** len(m[0]) - 1)), text
    )


def markup(rng, text: str) -> str:
    text = (
        text.replace(r"\frac", rng.choice([r"\dfrac", r"\tfrac"]))
        .replace("(", rng.choice(["(", r"\left("]))
        .replace(")", rng.choice([")", r"\right) "]))
    )
    text = re.sub(r"\$([^$]+)\$", r"\\( \1 \\)", text)
    text = re.sub(r"([=+<>-])", r" \1 ", text) if rng.random() < 0.5 else text
    return text.upper() if rng.random() < 0.1 and "\\" not in text else text.replace(", ", " , ")


def reworded(rng, text: str, share: float, vocabulary: list[str]) -> str:
    return re.sub(
        r"(?<![\\\w])[A-Za-z]{4,}(?!\w)",
        lambda m: rng.choice(vocabulary) if rng.random() < share else m[0],
        text,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("benchmarks", nargs="+", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--size", type=int, default=100_000)
    args = parser.parse_args()
    rng = random.Random(0)
    bench = [p.question for path in args.benchmarks for p in load(str(path), need_answer=False)]
    own = [p.question for p in arithmetic("train", 5000)] + (
        [p.question for p in load(str(args.train), need_answer=False)] if args.train else []
    )
    vocabulary = sorted({w for q in bench for w in re.findall(r"(?<![\\\w])[A-Za-z]{4,}(?!\w)", q)})
    changes = {
        "markup": lambda q: markup(rng, q),
        "quoted": lambda q: (
            f"This one is from an old exam. {q} Show all of your work, and say which theorems you use."
        ),
    }
    changes |= {
        f"words {n} %": lambda q, n=n: reworded(rng, q, n / 100, vocabulary) for n in (20, 40, 60)
    }
    planted = {}
    for i, question in enumerate(rng.sample(bench, min(500, len(bench)))):
        name = list(changes)[i % len(changes)]
        if (copy := changes[name](question)) != question:
            planted[copy] = name
    rows = {*own, *planted}
    while len(rows) < args.size:
        rows.add(other_numbers(rng, rng.choice(own)))
    rows = sorted(rows)
    rng.shuffle(rows)
    with tempfile.TemporaryDirectory() as folder:
        train, clean = Path(folder) / "train.jsonl", Path(folder) / "clean.jsonl"
        train.write_text("".join(json.dumps({"problem": q, "answer": "1"}) + "\n" for q in rows))
        began = time.monotonic()
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "extras" / "decontaminate.py"),
                "--dataset",
                str(train),
                "--against",
                ",".join(map(str, args.benchmarks)),
                "--out",
                str(clean),
            ],
            check=True,
        )
        seconds = time.monotonic() - began
        removed = [
            json.loads(line)
            for line in clean.with_suffix(".removed.jsonl").read_text().splitlines()
        ]
    found = {r["question"]: r["test"] for r in removed}
    print(f"{len(rows)} problems against {len(bench)}: {seconds:.0f} s")
    for name in changes:
        copies = [q for q, n in planted.items() if n == name]
        tests = Counter(found[q] for q in copies if q in found)
        print(
            f"{name:12s} {100 * sum(tests.values()) / max(1, len(copies)):5.1f} % of {len(copies)} found  {dict(tests)}"
        )
    others = [r for r in removed if r["question"] not in planted]
    print(
        f"others removed: {len(others)} of {len(rows) - len(planted)} ({dict(Counter(r['test'] for r in others))})"
    )
    for r in rng.sample(others, min(8, len(others))):
        print(f"  {r['test']} {r['value']}: {r['question'][:90]!r} ~ {r['match'][:90]!r}")


if __name__ == "__main__":
    run_main(main)
