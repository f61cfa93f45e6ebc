"""Answers graded per second: evaluate.py's Grader beside math-verify called one by one.

    python bench/grade.py [FILE.jsonl | runs/X ...] [--limit 10000]

A FILE has rows with a gold answer (`gold` or `answer`) and a model's `text`; a run of evaluate.py has both in its traces.
Every pair counts, equal ones too, as a vote over 16 traces brings them; the second figure is for the different pairs only.
math-verify is used as its README says (parse gold, parse answer, verify; time-outs on) in one process. Answers without a
box are left out on both sides. Without files: tests/grader_cases.jsonl and what is in runs/.
"""

import argparse
import json
import os
import platform
import random
import sys
import time
from datetime import date
from pathlib import Path

ROOT, HERE = Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

from cli import run_main  # noqa: E402
from evaluate import read_traces  # noqa: E402
from grade import Grader, extract_answer  # noqa: E402


def pairs_of(path: Path) -> list[tuple[str, str]]:
    """(gold, answer) pairs of a file or a run, in order; what has no answer is left out."""
    if path.is_dir():
        rows = [(row["gold"], row["answer"]) for row in read_traces(path).values()]
    else:
        rows = []
        for line in path.read_bytes().splitlines():
            row = json.loads(line)
            rows.append((str(row.get("gold", row.get("answer"))), extract_answer(row["text"])))
    return [(gold, answer) for gold, answer in rows if gold and answer]


def ours(pairs, workers: int) -> tuple[float, list[bool]]:
    with Grader(workers=workers) as grader:
        grader(
            "x + 1", "1 + x"
        )  # the first pair that needs a worker waits for its imports: a second, once a run
        for future in [grader.submit(f"y + {i}", f"{i} + y") for i in range(2 * workers)]:
            future.result()
        started = time.perf_counter()
        verdicts = [future.result().equal for future in [grader.submit(*pair) for pair in pairs]]
        return time.perf_counter() - started, verdicts


def math_verify_alone(pairs) -> tuple[float, list[bool], int]:
    import logging

    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    parse("$x$")
    late, verdicts, started = 0, [], time.perf_counter()
    for gold, answer in pairs:
        began = time.perf_counter()
        try:
            verdicts.append(bool(verify(parse(f"${gold}$"), parse(f"${answer}$"))))
        except Exception:  # noqa: BLE001  whatever it raises, it gave no verdict
            verdicts.append(False)
        late += time.perf_counter() - began > 2
    return time.perf_counter() - started, verdicts, late


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Answers graded per second, beside math-verify alone."
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE|RUN")
    parser.add_argument(
        "--limit",
        type=int,
        default=10_000,
        help="answers in all, one file after another (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=2, help="(default: 2)")
    args = parser.parse_args()
    files = args.files or sorted(p.parent for p in (ROOT / "runs").glob("**/traces.jsonl"))
    if not files:
        parser.error("no run in runs/: name a FILE.jsonl of `gold` and `text`, or a run's folder")
    sources = {str(path): pairs_of(path) for path in files}
    everything = [pair for pairs in sources.values() for pair in pairs]
    if len(everything) > args.limit:
        everything = random.Random(0).sample(everything, args.limit)
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    print(f"{date.today()}, {os.cpu_count()} cores ({cpu})\n")
    print(
        "| answers | different pairs | ours, answers/s | math-verify, answers/s | ours is faster | verdicts that differ | over 2 s in math-verify |\n|---|"
        + "--:|" * 6
    )
    for name, pairs in {
        f"all {len(everything)}": everything,
        "the different pairs": list(dict.fromkeys(everything)),
    }.items():
        seconds, verdicts = ours(pairs, args.workers)
        slow, theirs, late = math_verify_alone(pairs)
        print(
            f"| {name} | {len(set(pairs))} | {len(pairs) / seconds:.0f} | {len(pairs) / slow:.0f} | {slow / seconds:.1f} x | "
            f"{sum(a != b for a, b in zip(verdicts, theirs, strict=True))} | {late} |",
            flush=True,
        )
    print(
        "\nfrom: "
        + ", ".join(f"{Path(name).name} ({len(pairs)})" for name, pairs in sources.items())
    )
    return 0


if __name__ == "__main__":
    run_main(main)
