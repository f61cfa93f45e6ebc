"""Answers graded per second: grade.py's Grader beside math-verify called one by one.

    python bench/grade.py [FILE.jsonl | runs/X ...]

A FILE has rows with a gold answer (`gold` or `answer`) and a model's `text`; a run of evaluate.py
has both in its traces. Every pair counts, equal ones too, as a vote over 16 traces brings them; the
second figure is for the different pairs only. math-verify is used as its README says (parse gold,
parse answer, verify; time-outs on) in one process. Answers without a box are left out on both
sides. Without files: what is in runs/.
"""

import json
import logging
import sys
import time
from pathlib import Path

from common import ROOT, machine, print_head, print_row  # first

from cli import UserError, run_main
from evaluate import read_traces
from grade import Grader, extract_answer


def pairs_of(path: Path) -> list[tuple[str, str]]:
    """(gold, answer) pairs of a file or a run, in order; what has no answer is left out."""
    if path.is_dir():
        traces = read_traces(path).values()
        rows = [(trace["gold"], trace["answer"]) for trace in traces]
    else:
        rows = []
        for row in map(json.loads, path.open()):
            gold = row.get("gold", row.get("answer"))
            rows.append((str(gold), extract_answer(row["text"])))
    return [row for row in rows if all(row)]


def ours(pairs: list) -> tuple[float, list[bool]]:
    """(seconds, verdicts)"""
    with Grader(workers=2) as grader:
        for future in [grader.submit(f"y + {i}", f"{i} + y") for i in range(8)]:
            future.result()  # the first ones wait for imports: a second, once a run
        started = time.perf_counter()
        futures = [grader.submit(*pair) for pair in pairs]
        verdicts = [future.result().equal for future in futures]
        return time.perf_counter() - started, verdicts


def math_verify_alone(pairs: list) -> tuple[float, list[bool]]:
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    parse("$x$")
    verdicts = []
    started = time.perf_counter()
    for gold, answer in pairs:
        try:
            gold, answer = parse(f"${gold}$"), parse(f"${answer}$")
            verdicts.append(bool(verify(gold, answer)))
        except Exception:  # noqa: BLE001  whatever it raises, it gave no verdict
            verdicts.append(False)
    return time.perf_counter() - started, verdicts


def main() -> None:
    runs = [path.parent for path in ROOT.glob("runs/**/traces.jsonl")]
    files = [Path(name) for name in sys.argv[1:]] or sorted(runs)
    if not files:
        raise UserError("no run in runs/: name a file of `gold` and `text`, or a run's folder")
    everything = [pair for path in files for pair in pairs_of(path)]
    different = list(dict.fromkeys(everything))
    print(machine() + "\nfrom", *[path.name for path in files], "\n")
    titles = "ours, answers/s", "math-verify, answers/s", "ours is faster, times"
    print_head("answers", *titles, "verdicts that differ")
    for name, pairs in (("all", everything), ("the different ones", different)):
        seconds, verdicts = ours(pairs)
        slow, others = math_verify_alone(pairs)
        unlike = sum(mine != other for mine, other in zip(verdicts, others))
        count = len(pairs)
        print_row(f"{name}: {count}", count / seconds, count / slow, slow / seconds, unlike)


if __name__ == "__main__":
    run_main(main)
