"""What the published code would say about a run of ours, beside what evaluate.py says.

    python extras/published_metrics.py runs/agent runs/baseline

IntelLabs/DeepMath (its module of metrics) parses the whole text with math-verify, outputs of tools
included, so that an answer needs no box; it votes by the parsed answer's spelling, where «nothing
found» is a candidate like any other and the first of a tie wins; its lengths count all tokens
(Qwen3's for every model; here the model's own, as the trace has them). Only the sampling is ours.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import UserError, parse, run_main  # noqa: E402
from evaluate import Scored, load_run, table  # noqa: E402
from grade import Grader  # noqa: E402


@dataclass
class Flags:
    """Majority, pass and length of runs as the published code computes them, beside ours."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that evaluate.py has written."""


def both(scored: Scored) -> dict[str, tuple[float, float]]:
    """(ours, published) for the traces of one problem."""
    from math_verify import parse as read
    from math_verify import verify

    gold = read(f"${scored.rows[0]['gold']}$")
    answers = [read(row["text"]) for row in scored.rows]
    right = [verify(gold, answer) for answer in answers]
    elected = Counter(map(str, answers)).most_common(1)[0][0]  # the first of a tie
    # Of answers with one spelling the last one is compared.
    winner = [answer for answer in answers if str(answer) == elected][-1]
    measures = scored.measures
    any_right = any(row["right"] for row in scored.rows)
    return {
        "majority@n, %": (measures["majority@n, %"], 100 * verify(gold, winner)),
        "avg@n, %": (measures["avg@n, %"], 100 * fmean(right)),
        "pass@n, %": (100 * any_right, 100 * any(right)),
        "length, tokens": (measures["model tokens"], measures["all tokens"]),
    }


def main() -> None:
    flags = parse(Flags)
    if not flags.runs:
        raise UserError("give the folder of one run or more")
    with Grader() as grader:
        runs = [load_run(folder, grader) for folder in flags.runs]
    body = []
    for run in runs:
        for dataset in dict.fromkeys(problem.dataset for problem in run.problems):
            pairs = [both(problem) for problem in run.problems if problem.dataset == dataset]
            for measure in pairs[0]:
                ours, published = zip(*(pair[measure] for pair in pairs))
                cells = [f"{fmean(ours):.1f}", f"{fmean(published):.1f}"]
                body.append([f"{run.config['name']}, {dataset}: {measure}", *cells])
    print(table(["", "ours", "published"], body))


if __name__ == "__main__":
    run_main(main)
