"""What a dataset holds, as one picture: the histogram of difficulties and the hierarchy of topics.

    python extras/dataset_stats.py --dataset deepmath-103k --out stats.png
    python extras/dataset_stats.py --dataset rows.jsonl --difficulty-key level --topic-key subject

Topics are read as DeepMath-103K writes them, `A -> B -> C`. Of the rings, the innermost is the most
general level; angles are shares of the problems; slices too thin for a name have none.
"""

import math
import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import DataFlags, UserError, check_range, parse, run_main  # noqa: E402
from data import load_problems, topic_levels  # noqa: E402


@dataclass(kw_only=True)
class Flags(DataFlags):
    out: str = "stats.png"
    """The picture."""
    difficulty_key: str = "difficulty"
    """Column of the difficulty; of a text like `Level 5`, the number counts."""
    topic_key: str = "topic"
    """Column of the topic."""
    depth: int = 3
    """Levels of the hierarchy to draw."""


def rings(paths: list[list[str]], depth: int) -> list[list[tuple[tuple[str, ...], int, float]]]:
    """For each of the first `depth` levels its slices: (path, count, start as a share of a turn).

    A slice starts where its parent starts, larger ones first; a path that ends early leaves its
    place empty in the outer rings.
    """
    levels = []
    free = {(): 0.0}  # path -> where its next child starts
    for d in range(1, depth + 1):
        counts = Counter(tuple(path[:d]) for path in paths if len(path) >= d)
        slices = []
        for path, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            start = free[path[:-1]]
            free[path] = start
            free[path[:-1]] = start + count / len(paths)
            slices.append((path, count, start))
        levels.append(slices)
    return levels


def draw(histogram: Counter, levels: list, total: int, title: str, out: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    values, reach = sorted(histogram), len(levels) + 0.7
    step = min((b - a for a, b in zip(values, values[1:])), default=1.0)
    left.bar(values, [histogram[value] for value in values], width=0.9 * step)
    left.set(xlabel="difficulty", ylabel="problems", title=title)
    right.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    right.axis("off")
    palette, colours = matplotlib.colormaps["Set3"].colors, {}  # light: names are written on them
    for d, slices in enumerate(levels):
        for path, count, start in slices:
            low, high = 90 - 360 * (start + count / total), 90 - 360 * start
            colour = colours.setdefault(path[:2], palette[len(colours) % len(palette)])
            wedge = matplotlib.patches.Wedge((0, 0), d + 1.5, low, high, width=1, fc=colour, ec="w")
            right.add_patch(wedge)
            if high - low > 6:
                angle = math.radians((low + high) / 2)
                x, y = (d + 1) * math.cos(angle), (d + 1) * math.sin(angle)
                turn = math.degrees(angle) + (180 if x < 0 else 0)
                name = textwrap.fill(textwrap.shorten(path[-1], 30, placeholder=" ..."), 15)
                right.text(x, y, name, fontsize=7, ha="center", va="center", rotation=turn)
    figure.savefig(out, dpi=110)


def main() -> None:
    flags = parse(Flags, description="Draw a dataset's difficulties and topics.")
    check_range(flags, 1, math.inf, "depth")
    problems = load_problems(flags, need_answer=False)
    found = [re.search(r"-?\d+(?:\.\d+)?", str(p.meta.get(flags.difficulty_key))) for p in problems]
    histogram = Counter(float(match[0]) for match in found if match and float(match[0]) >= 0)
    paths = [topic_levels(p.meta.get(flags.topic_key)) for p in problems]
    paths = [path for path in paths if any(path)]
    if not paths and not histogram:
        names = f"{flags.difficulty_key} or {flags.topic_key} among {', '.join(problems[0].meta)}"
        raise UserError(f"no column {names}: give --difficulty-key and --topic-key")
    levels = [slices for slices in rings(paths, flags.depth) if slices]
    title = f"{flags.dataset}: {len(problems)} problems"
    draw(histogram, levels, len(paths), title, flags.out)
    for value, count in sorted(histogram.items()):
        print(f"{count:7d}  difficulty {value:g}")
    for path, count in Counter(" -> ".join(path[:2]) for path in paths).most_common(20):
        print(f"{count:7d}  {path}")
    known = f"{histogram.total()} with a difficulty, {len(paths)} with a topic"
    print(f"{title}, {known}; drawn: {flags.out}")


if __name__ == "__main__":
    run_main(main)
