"""What a dataset holds, as one picture: the histogram of difficulties and the hierarchy of topics.

    python extras/dataset_stats.py --dataset deepmath-103k --out stats.png
    python extras/dataset_stats.py --dataset rows.jsonl --difficulty-key level --topic-key subject

Topics are read as DeepMath-103K writes them, `A -> B -> C`. Of the rings, the innermost is the most
general level; angles are shares of the problems; slices too thin for a name have none.
"""

import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import DataFlags, UserError, parse, run_main  # noqa: E402
from data import load_problems  # noqa: E402


@dataclass(kw_only=True)
class Flags(DataFlags):
    out: str = "stats.png"
    """The picture."""
    difficulty_key: str = "difficulty"
    """Column of the difficulty; of a text like `Level 5`, the number counts."""
    topic_key: str = "topic"
    """Column of the topic."""


def draw(histogram: Counter, paths: list[tuple[str, ...]], title: str, out: str) -> None:
    """paths: the topic of each problem, (general, special, ...)."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    values = sorted(histogram)
    step = min((b - a for a, b in zip(values, values[1:])), default=1.0)
    left.bar(values, [histogram[value] for value in values], width=0.9 * step)
    left.set(xlabel="difficulty", ylabel="problems", title=title)

    # Larger slices first, and a slice inside its parent.
    counts = Counter(path[:d] for path in paths for d in range(1, len(path) + 1))
    paths = sorted(paths, key=lambda p: [(-counts[p[: d + 1]], p[d]) for d in range(len(p))])
    depth = min(3, max(map(len, paths), default=0))
    palette, colours = matplotlib.colormaps["Set3"].colors, {}  # light: names are written on them
    for d in range(1, depth + 1):
        names, sizes, fills = [], [], []
        for path, same in groupby(path[:d] for path in paths):
            sizes.append(len(list(same)))
            there = len(path) == d  # a path that ends early leaves its place empty
            wide = there and sizes[-1] > len(paths) / 60
            short = textwrap.shorten(path[-1], 30, placeholder=" ...")
            names.append(textwrap.fill(short, 15) if wide else "")
            colour = colours.setdefault(path[:2], palette[len(colours) % len(palette)])
            fills.append(colour if there else "none")
        ring = {"radius": d + 0.5, "labeldistance": d / (d + 0.5), "rotatelabels": True}
        look = {"wedgeprops": {"width": 1, "ec": "w"}, "startangle": 90, "counterclock": False}
        centred = {"fontsize": 7, "ha": "center", "va": "center"}
        right.pie(sizes, labels=names, colors=fills, textprops=centred, **ring, **look)
    right.set(xlim=(-depth - 0.7, depth + 0.7), ylim=(-depth - 0.7, depth + 0.7))
    figure.savefig(out, dpi=110)


def main() -> None:
    flags = parse(Flags, description="Draw a dataset's difficulties and topics.")
    problems = load_problems(flags, need_answer=False)
    found = [re.search(r"-?\d+(?:\.\d+)?", str(p.meta.get(flags.difficulty_key))) for p in problems]
    histogram = Counter(float(match[0]) for match in found if match and float(match[0]) >= 0)
    paths = [tuple(str(p.meta.get(flags.topic_key) or "").split(" -> ")) for p in problems]
    paths = [path for path in paths if any(path)]
    if not paths and not histogram:
        names = f"{flags.difficulty_key} or {flags.topic_key} among {', '.join(problems[0].meta)}"
        raise UserError(f"no column {names}: give --difficulty-key and --topic-key")
    title = f"{flags.dataset}: {len(problems)} problems"
    draw(histogram, paths, title, flags.out)
    for path, count in Counter(" -> ".join(path[:2]) for path in paths).most_common(20):
        print(f"{count:7d}  {path}")
    print(f"{title}, {histogram.total()} with a difficulty, {len(paths)} with a topic: {flags.out}")


if __name__ == "__main__":
    run_main(main)
