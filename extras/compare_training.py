"""Training runs of grpo.py side by side, one line each: share of right answers, share of traces that call, length.

    python extras/compare_training.py runs/A runs/B --out compared.png

A run's line is its folder's name; a step is the mean over its traces, faint, and the mean of five steps, strong.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Parser, UserError, run_main  # noqa: E402

PANELS = {
    "accuracy": "right answers",
    "code_rate": "traces with a snippet that ran",
    "length": "tokens per trace",
}


def columns(run: Path) -> dict[str, list[float]]:
    """step and the panels' columns of a run's finished steps; UserError where there are none."""
    try:
        rows = [
            json.loads(line)
            for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        found = {name: [row[name] for row in rows] for name in ("step", *PANELS)}
    except (OSError, ValueError, KeyError, TypeError):
        found = {"step": []}
    if not found["step"]:
        raise UserError(f"{run}: no metrics.jsonl of grpo.py with a finished step in it")
    return found


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean of up to `width` values around each."""
    around = [values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]


def main() -> int:
    parser = Parser(description="Training runs of grpo.py side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of grpo.py")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("compared.png"),
        metavar="FILE.png",
        help="(default: %(default)s)",
    )
    args = parser.parse_args()
    runs = {run.resolve().name: columns(run) for run in args.runs}
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for i, (run, found) in enumerate(runs.items()):
            axes.plot(found["step"], found[name], color=f"C{i}", alpha=0.3, linewidth=1)
            axes.plot(found["step"], smooth(found[name]), color=f"C{i}", label=run)
        (
            axes.set_title(title, fontsize=10),
            axes.set_xlabel("step"),
            axes.grid(alpha=0.3),
            axes.set_ylim(0, None if name == "length" else 1.02),
        )
    figure.axes[0].legend(fontsize=8)
    figure.savefig(args.out, dpi=110)
    print(args.out)
    return 0


if __name__ == "__main__":
    run_main(main)
