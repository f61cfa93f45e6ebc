"""How fast extras/decontaminate.py is, and what it finds of what was planted.

    python bench/decontaminate.py BENCHMARK.jsonl [BENCHMARK.jsonl ...]

The training set is arithmetic's with its numbers changed again and again. Into it go copies of 500
benchmark questions with 40 % of their longer words replaced by words from other questions.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time

from common import ROOT  # first

from cli import DataFlags, run_main
from data import load_problems

rng = random.Random(0)
WORDS = []  # of all benchmarks
WORD = r"(?<![\\\w])[A-Za-z]{4,}(?!\w)"


def questions(flags: DataFlags) -> list:
    problems = load_problems(flags, need_answer=False)
    return [problem.question for problem in problems]


def reworded(text: str) -> str:
    return re.sub(WORD, lambda m: rng.choice(WORDS) if rng.random() < 0.4 else m[0], text)


def renumbered(text: str) -> str:
    return re.sub(r"\d+", lambda m: str(rng.randrange(10 ** len(m[0]))), text)


def main() -> None:
    bench = []
    for path in sys.argv[1:]:
        bench += questions(DataFlags(dataset=path))
    WORDS.extend(sorted(set(re.findall(WORD, " ".join(bench)))))
    planted = {reworded(text) for text in rng.sample(bench, min(500, len(bench)))}
    own = questions(DataFlags(split="train"))
    rows = planted.union(own)
    while len(rows) < 100_000:
        rows.add(renumbered(rng.choice(own)))
    with tempfile.TemporaryDirectory() as folder:
        train, clean = f"{folder}/train.jsonl", f"{folder}/clean.jsonl"
        with open(train, "w") as file:
            for row in sorted(rows):
                print(json.dumps({"problem": row, "answer": "1"}), file=file)
        command = [sys.executable, str(ROOT / "extras/decontaminate.py"), "--dataset", train]
        command += ["--against", ",".join(sys.argv[1:]), "--out", clean]
        began = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - began
        rows_removed = map(json.loads, open(f"{folder}/clean.removed.jsonl"))
        removed = {row["question"] for row in rows_removed}
    found = len(planted & removed)
    print(f"{len(rows)} problems against {len(bench)}: {seconds:.0f} s")
    print(f"removed: {found} of {len(planted)} reworded copies, {len(removed) - found} others")


if __name__ == "__main__":
    run_main(main)
