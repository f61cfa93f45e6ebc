"""What a dataset holds, as one picture: the difficulty histogram and the topic hierarchy.

    python extras/dataset_stats.py --dataset deepmath-103k --out stats.png
    python extras/dataset_stats.py --dataset rows.jsonl --out stats.png --difficulty-key level --topic-key subject

Topics are read as DeepMath-103K writes them, `A -> B -> C`; a column without arrows is a hierarchy of one level. In the
rings the innermost is the most general level, angles are shares of the problems, and slices too thin for a name have none.
"""

import math
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Parser, UserError, add_data_flags, load_from_flags, run_main, topic_levels  # noqa: E402


def difficulties(problems, key: str) -> Counter:
    """Count of each difficulty; numbers in words (`Level 5`) are read as numbers, -1 and what has none is left out."""
    found = (re.search(r"-?\d+(?:\.\d+)?", str(p.meta.get(key, ""))) for p in problems)
    return Counter(float(m[0]) for m in found if m and float(m[0]) >= 0)


def rings(paths: list[tuple[str, ...]], depth: int) -> list[list[tuple[str, int, float, str]]]:
    """For each of the first `depth` levels its slices (name, count, start as a share, top-level name), in drawing order.

    A slice starts where its parent starts, larger ones first; a path that ends early leaves its place empty below.
    """
    levels: list[list] = [[] for _ in range(depth)]
    counts = [Counter(p[: d + 1] for p in paths if len(p) > d) for d in range(depth)]

    def place(prefix: tuple[str, ...], start: float) -> None:
        d = len(prefix)
        if d < depth:
            for path, count in sorted(
                (item for item in counts[d].items() if item[0][:d] == prefix),
                key=lambda item: (-item[1], item[0]),
            ):
                levels[d].append((path[-1], count, start, path[0]))
                place(path, start)
                start += count / len(paths)

    place((), 0.0)
    return levels


def draw(histogram: Counter, levels, total: int, title: str, out: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    step = min((b - a for a, b in zip(sorted(histogram), sorted(histogram)[1:])), default=1.0)
    left.bar(list(histogram), list(histogram.values()), width=0.9 * step, color="#0072B2")
    (
        left.set_xlabel("difficulty"),
        left.set_ylabel("problems"),
        left.grid(axis="y", alpha=0.3),
        left.set_title(title),
    )
    if not histogram:
        left.text(0.5, 0.5, "no difficulty column", ha="center", transform=left.transAxes)

    palette = matplotlib.colormaps["Set3"].colors  # light: names are written on them
    levels = [ring for ring in levels if ring] or levels[:1]
    shown = next(
        (ring for ring in levels if len(ring) > 1), levels[0]
    )  # a single root has nothing to tell apart
    depth_of_colour = levels.index(shown)
    colour = {name: palette[i % len(palette)] for i, (name, *_) in enumerate(shown)}
    right.set_aspect("equal"), right.axis("off")
    if not levels[0]:
        right.text(0.5, 0.5, "no topic column", ha="center", transform=right.transAxes)
    for d, ring in enumerate(levels):
        for name, count, start, _ in ring:
            parent = next(
                (n for n, c, s, _ in shown if s - 1e-9 <= start < s + c / total - 1e-9), name
            )
            face = colour.get(parent, "#dddddd") if d >= depth_of_colour else "#dddddd"
            wedge = matplotlib.patches.Wedge(
                (0, 0),
                d + 1.6,
                90 - 360 * (start + count / total),
                90 - 360 * start,
                width=0.98,
                facecolor=face,
                edgecolor="white",
            )
            right.add_patch(wedge)
            if count / total > 0.018:
                angle = math.pi / 2 - 2 * math.pi * (start + count / total / 2)
                turn = math.degrees(angle)
                whole = count == total
                right.text(
                    (d + 1.1) * math.cos(angle) * (not whole),
                    (d + 1.1) * math.sin(angle) * (not whole),
                    textwrap.fill(textwrap.shorten(name, 30, placeholder=" …"), 15),
                    ha="center",
                    va="center",
                    fontsize=7,
                    rotation=0 if whole else turn if math.cos(angle) >= 0 else turn + 180,
                    rotation_mode="anchor",
                )
    limit = len(levels) + 0.7
    right.set_xlim(-limit, limit), right.set_ylim(-limit, limit)
    figure.savefig(out, dpi=110)


def main() -> int:
    parser = Parser(description="Draw a dataset's difficulties and topics.")
    add_data_flags(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("stats.png"),
        metavar="FILE.png",
        help="(default: stats.png)",
    )
    parser.add_argument(
        "--difficulty-key", default="difficulty", metavar="COLUMN", help="(default: difficulty)"
    )
    parser.add_argument("--topic-key", default="topic", metavar="COLUMN", help="(default: topic)")
    parser.add_argument(
        "--depth",
        type=int,
        default=3,
        metavar="N",
        help="levels of the hierarchy to draw (default: 3)",
    )
    args = parser.parse_args()
    if args.depth < 1:
        raise UserError(f"--depth must be at least 1, not {args.depth}")
    problems = load_from_flags(args, need_answer=False)
    paths = [path for p in problems if (path := topic_levels(p.meta.get(args.topic_key)))]
    histogram = difficulties(problems, args.difficulty_key)
    if not paths and not histogram:
        columns = ", ".join(map(str, problems[0].meta)) or "none"
        raise UserError(
            f"{args.dataset}: no column {args.difficulty_key} or {args.topic_key}; the columns are: {columns}; name them with --difficulty-key and --topic-key"
        )
    draw(
        histogram,
        rings(paths, args.depth),
        max(1, len(paths)),
        f"{args.dataset}: {len(problems)} problems",
        args.out,
    )
    for value, count in sorted(histogram.items()):
        print(f"{count:7d}  difficulty {value:g}")
    for path, count in Counter(p[: min(2, len(p))] for p in paths).most_common(20):
        print(f"{count:7d}  {' -> '.join(path)}")
    print(
        f"{len(problems)} problems, {sum(histogram.values())} with a difficulty, {len(paths)} with a topic; drawn: {args.out}"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
