"""Answers graded per second: grade.py's Grader beside math-verify called one by one.

    python bench/grade.py [FILE.jsonl | runs/X ...] [--limit 10000]

A FILE has rows with a gold answer (`gold` or `answer`) and a model's `text`; a run of evaluate.py
has both in its traces. Every pair counts, equal ones too, as a vote over 16 traces brings them; the
second figure is for the different pairs only. math-verify is used as its README says (parse gold,
parse answer, verify; time-outs on) in one process. Answers without a box are left out on both
sides. Without files: what is in runs/.
"""

import json
import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, machine, print_head, print_row  # first

import tyro

from cli import UserError, parse, run_main
from evaluate import read_traces
from grade import Grader, extract_answer


@dataclass(kw_only=True)
class Flags:
    """Answers graded per second, beside math-verify alone."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files of `gold` and `text`, or folders of runs."""
    limit: int = 10_000
    """Answers in all."""
    workers: int = 2
    """Of the grader."""


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


def ours(pairs: list, workers: int) -> tuple[float, list[bool]]:
    """(seconds, verdicts)"""
    with Grader(workers=workers) as grader:
        grader("x + 1", "1 + x")  # this one waits for the imports: a second, once a run
        for future in [grader.submit(f"y + {i}", f"{i} + y") for i in range(2 * workers)]:
            future.result()
        started = time.perf_counter()
        futures = [grader.submit(*pair) for pair in pairs]
        verdicts = [future.result().equal for future in futures]
        return time.perf_counter() - started, verdicts


def math_verify_alone(pairs: list) -> tuple[float, list[bool], int]:
    """(seconds, verdicts, pairs that took more than 2 s)"""
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


def main() -> None:
    flags = parse(Flags)
    files = flags.files or sorted(path.parent for path in (ROOT / "runs").glob("**/traces.jsonl"))
    if not files:
        raise UserError("no run in runs/: name a file of `gold` and `text`, or a run's folder")
    sources = {path.name: pairs_of(path) for path in files}
    everything = [pair for pairs in sources.values() for pair in pairs]
    if len(everything) > flags.limit:
        everything = random.Random(0).sample(everything, flags.limit)
    different = list(dict.fromkeys(everything))
    print(machine())
    titles = "ours, answers/s", "math-verify, answers/s", "ours is faster"
    print_head("answers", *titles, "verdicts that differ", "over 2 s in math-verify")
    for name, pairs in (("all", everything), ("the different ones", different)):
        seconds, verdicts = ours(pairs, flags.workers)
        slow, theirs, late = math_verify_alone(pairs)
        rates = f"{len(pairs) / seconds:.0f}", f"{len(pairs) / slow:.0f}", f"{slow / seconds:.1f} x"
        unlike = sum(a != b for a, b in zip(verdicts, theirs))
        print_row(f"{name}: {len(pairs)}", *rates, unlike, late)
    counts = [f"{name} ({len(pairs)})" for name, pairs in sources.items()]
    print(f"\nfrom: {', '.join(counts)}")


if __name__ == "__main__":
    run_main(main)
