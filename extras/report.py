"""One web page, in one file that needs no network, from the folders that the scripts write.

    python extras/report.py runs/baseline runs/agent --out report    # of evaluate.py
    python extras/report.py runs/grpo --out report                   # of grpo.py

Evaluations: report.png has accuracy against length and majority@k against k; report.html the tables
of evaluate.py, those by k, level or topic, the plots, and every problem with its votes and traces.
500 problems x 16 traces are a lot of text: each problem's traces are unpacked when it is opened.

A training run: training.html has its curves and, for one group of every step, the traces with their
rewards and advantages, token by token: what the gradient touches, how strongly, and what not.

What models wrote enters the pages as text, never as HTML.
"""

import base64
import contextlib
import json
import math
import random
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import UserError, check_range, parse, run_main  # noqa: E402
from evaluate import CUT, Run, Scored, interval, load_run  # noqa: E402
from evaluate import majority, pass_at, report, table  # noqa: E402
from grade import Grader  # noqa: E402

HERE = Path(__file__).resolve().parent
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"]
GROUPS = ("level", "subject", "difficulty", "topic", "family")


@dataclass(kw_only=True)
class Flags:
    """One self-contained web page from folders of evaluate.py, or from one of grpo.py."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of evaluations, of which the first is what the others are compared with; or one of a
    training run.
    """
    out: Path = Path("report")
    """Where report.png and report.html go, or training.html."""
    max_chars: int = 40_000
    """Longer traces lose their middle on the page of evaluations."""


# ---- Numbers that evaluate.py's report leaves out
def of_set(run: Run, name: str) -> list[Scored]:
    return [scored for scored in run.problems if scored.dataset == name]


def powers(problems: list[Scored]) -> list[int]:
    """The k to show: 1, 2, 4, ... and n."""
    n = max((len(scored.rows) for scored in problems), default=0)
    return sorted({2**i for i in range(n.bit_length())} | {n}) if n else []


def majority_at(scored: Scored, k: int) -> float:
    """majority@k of a problem: the mean over all subsets of its n traces, or over 200 of them."""
    n = len(scored.rows)
    k = min(k, n)
    cluster = {i: c for c, (_, places) in enumerate(scored.clusters) for i in places}
    right = [scored.rows[places[0]]["right"] for _, places in scored.clusters]
    subsets, rng, values = combinations(range(n), k), random.Random(scored.id), []
    if math.comb(n, k) > 200:
        subsets = [rng.sample(range(n), k) for _ in range(200)]
    for subset in subsets:
        votes = Counter(cluster[i] for i in subset if i in cluster)  # others have no answer
        values.append(majority([(count, right[c]) for c, count in votes.items()]))
    return fmean(values)


def at_k(problems: list[Scored], k: int) -> str:
    if not problems or k > max(len(scored.rows) for scored in problems):
        return ""
    votes = fmean(majority_at(scored, k) for scored in problems)
    counts = [(len(s.rows), sum(row["right"] for row in s.rows)) for s in problems]
    return f"{100 * votes:.1f} / {100 * fmean(pass_at(min(k, n), n, c) for n, c in counts):.1f}"


def by_k(runs: list[Run], name: str) -> str:
    sets = [of_set(run, name) for run in runs]
    ks = powers([scored for problems in sets for scored in problems])
    body = [[k, *(at_k(problems, k) for problems in sets)] for k in ks]
    heads = [f"{run.config['name']}: majority@k / pass@k" for run in runs]
    return "\n" + table(["k", *heads], body)


def by_group(runs: list[Run], name: str, key: str) -> str:
    """majority@n and tokens by level, subject, ...; nothing where the set has no such column."""
    groups: dict = {}
    for i, run in enumerate(runs):
        for scored in of_set(run, name):
            value = scored.rows[0]["meta"].get(key)
            if key == "topic" and value:
                value = str(value).split(" -> ")[:2][-1]
            value = value if isinstance(value, int | float | None) else str(value)
            if value is not None:
                groups.setdefault(value, [[] for _ in runs])[i].append(scored)
    if not 1 < len(groups) <= 40:
        return ""
    kinds = sorted(groups, key=lambda value: (str(type(value)), value))
    body = [[value, *map(accuracy_and_length, groups[value])] for value in kinds]
    names = [f"{run.config['name']}: majority@n / tokens (problems)" for run in runs]
    return "\n" + table([key, *names], body)


def accuracy_and_length(problems: list[Scored]) -> str:
    if not problems:
        return ""
    shares = [scored.measures["majority@n, %"] for scored in problems]
    tokens = [scored.measures["model tokens"] for scored in problems]
    return f"{fmean(shares):.1f} / {fmean(tokens):.0f} ({len(problems)})"


# ---- Plots
def plot(runs: list[Run], names: list[str]):
    """A figure, a row a set: accuracy against length with 95 % bars; majority@k against k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    style |= {"grid.alpha": 0.25, "axes.axisbelow": True}
    with plt.rc_context(style):
        size = {"figsize": (11, 0.5 + 3.7 * len(names)), "layout": "constrained"}
        figure, axes = plt.subplots(len(names), 2, squeeze=False, **size)
        for (left, right), name in zip(axes, names, strict=True):
            for run, colour in zip(runs, COLOURS * len(runs), strict=False):
                if problems := of_set(run, name):
                    draw_run(left, right, run.config["name"], problems, colour)
            left.set(title=f"{name}: accuracy and length", xlabel="model tokens per trace")
            left.set(ylabel="majority@n, %")
            right.set(title=f"{name}: votes", xlabel="k", ylabel="majority@k, %")
            left.set_xlim(left=0)
            left.margins(x=0.15, y=0.15)
            low, high = left.get_ylim()
            left.set_ylim(max(-2, low), min(102, high + 1))  # a point at 0 or 100 stays whole
            left.legend(frameon=False, fontsize=9)
    return figure


def draw_run(left, right, label: str, problems: list[Scored], colour: str) -> None:
    tokens = [scored.measures["model tokens"] for scored in problems]
    shares = [scored.measures["majority@n, %"] for scored in problems]
    bars = []
    for values in (tokens, shares):
        middle, (low, high) = fmean(values), interval(values)
        bars.append([[max(0, middle - low)], [max(0, high - middle)]])  # not -1e-17
    style = {"fmt": "o", "ms": 8, "lw": 1.4, "capsize": 3, "color": colour, "label": label}
    left.errorbar(fmean(tokens), fmean(shares), xerr=bars[0], yerr=bars[1], **style)
    ks = powers(problems)
    curve = [100 * fmean(majority_at(scored, k) for scored in problems) for k in ks]
    right.set_xticks(ks)
    right.plot(ks, curve, "o-", ms=4, color=colour, label=label)


# ---- Data for the page
def trace_data(row: dict, most: int) -> dict:
    """One trace for the page; texts beyond `most` characters lose their middle."""
    parts, left, at = [], most, 0
    for kind, length in row["spans"]:
        text = row["text"][at : at + length]
        at += length
        if len(text) > left:
            cut = f"\n[... {len(text) - left:,} characters left out ...]\n"
            text = text[: left // 2] + cut + text[len(text) - left // 2 :]
        left = max(400, left - len(text))
        if kind == "code":
            text = text.removeprefix("<tool_call>").removesuffix("</tool_call>").strip("\n")
        elif kind == "output":
            text = text.strip("\n").removeprefix("```output\n").removesuffix("\n```")
        parts.append([kind, text])
    same = {key: row[key] for key in ("sample", "answer", "finish", "tokens", "seconds")}
    same |= {"right": row["right"], "grading": row["grading"], "parts": parts}
    return same | {"calls": [call["status"] for call in row["calls"]]}


def letters(scored: Scored) -> str:
    """A letter for each trace: right, wrong, no answer; capital if cut; ! behind a failed call."""
    found = []
    for row in scored.rows:
        letter = "n" if row["answer"] is None else "rw"[not row["right"]]
        letter = letter.upper() if row["finish"] in CUT else letter
        failed = any(call["status"] != "ok" for call in row["calls"])
        found.append(letter + "!" * failed)
    return " ".join(found)


def run_data(i: int, scored: Scored) -> dict:
    votes = [[a, len(at), scored.rows[at[0]]["right"]] for a, at in scored.clusters]
    return {
        "run": i,
        "flags": letters(scored),
        "credit": scored.measures["majority@n, %"] / 100,
        "tokens": round(scored.measures["model tokens"]),
        "calls": round(scored.measures["calls"], 1),
        "votes": votes,
    }


def page_data(runs: list[Run], most: int) -> tuple[list[dict], list[str]]:
    """(what the list of problems shows, each one's traces as base64 of deflated JSON)."""
    problems: dict[tuple, list] = {}
    for i, run in enumerate(runs):
        for scored in run.problems:
            problems.setdefault((scored.dataset, scored.id), []).append((i, scored))
    rows, packed = [], []
    for (dataset, problem), found in problems.items():
        first = found[0][1].rows[0]
        row = {"dataset": dataset, "id": problem}
        row |= {key: first[key] for key in ("question", "gold", "meta")}
        row["runs"] = [run_data(i, scored) for i, scored in found]
        rows.append(row)
        traces = []
        for i, scored in found:
            traces.append([i, [trace_data(row, most) for row in scored.rows]])
        text = json.dumps(traces, ensure_ascii=False).encode()
        packed.append(base64.b64encode(zlib.compress(text, 6)).decode())
    return rows, packed


def render(name: str, **values) -> str:
    """A template with its values; it escapes what it is given, its script sets texts as text."""
    from jinja2 import Environment

    return Environment(autoescape=True).from_string((HERE / name).read_text()).render(**values)


def evaluation_page(runs: list[Run], more: str, picture: bytes, most: int) -> str:
    problems, packed = page_data(runs, most)
    names = [run.config["name"] for run in runs]
    return render(
        "report.html",
        title="Evaluation: " + ", ".join(names),
        names=names,
        colours=COLOURS,
        report=report(runs),
        more=more,
        picture=base64.b64encode(picture).decode(),
        problems=problems,
        packed=packed,
    )


# ---- A training run
def read_log(path: Path) -> list[dict]:
    """A log of grpo.py by step; of one that was done again, or cut by a kill, the whole row."""
    rows = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line, parse_float=lambda digits: float(f"{float(digits):.5g}"))
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def training_page(folder: Path) -> str:
    """All that a run has logged; of a long one the groups of 100 of its steps."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        run = {"flags": config["flags"], "started": config["started"]}
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{folder} is not a run of grpo.py: no config.json of one") from None
    for name in ("metrics", "eval", "groups"):
        run[name] = read_log(folder / f"{name}.jsonl")
    if not run["metrics"]:
        raise UserError(f"{folder} has no finished step yet: wait for the first one")
    every = math.ceil(len(run["groups"]) / 100) or 1
    run["groups"] = run["groups"][::-every][::-1]  # with the last one
    return render("train.html", title=f"Training: {folder.resolve().name}", run=run)


def main() -> None:
    flags = parse(Flags)
    check_range(flags, 1000, math.inf, "max_chars")
    if not flags.runs:
        raise UserError("give the folder of one run or more")
    trained = [folder for folder in flags.runs if (folder / "metrics.jsonl").exists()]
    if trained and len(flags.runs) > 1:
        raise UserError(f"{trained[0]} is a training run: give it alone")
    flags.out.mkdir(parents=True, exist_ok=True)
    if trained:
        page = flags.out / "training.html"
        page.write_text(training_page(trained[0]), encoding="utf-8")
        return print(page)
    with Grader() as grader:
        runs = [load_run(folder, grader) for folder in flags.runs]
    names = list(dict.fromkeys(scored.dataset for run in runs for scored in run.problems))
    more = ""
    for name in names:
        more += f"\n## {name}\n" + by_k(runs, name)
        more += "".join(by_group(runs, name, key) for key in GROUPS)
    picture, page = flags.out / "report.png", flags.out / "report.html"
    plot(runs, names).savefig(picture, dpi=150)
    text = evaluation_page(runs, more, picture.read_bytes(), flags.max_chars)
    page.write_text(text, encoding="utf-8")
    print(f"{picture}\n{page}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
