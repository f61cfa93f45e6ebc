r"""Evaluation: run a benchmark, put the answers to the vote, measure, compare.

    python evaluate.py --dataset arithmetic --limit 64 --out runs/agent    # 16 traces a problem
    python evaluate.py --dataset arithmetic --limit 64 --out runs/baseline --no-agent
    python evaluate.py --report runs/baseline runs/agent    # side by side; no model needed
    python evaluate.py --dataset math500,amc23 --out runs/two    # several sets, one engine
    python evaluate.py --ablation --out runs/ablation    # the paper's four rows
    torchrun --nproc-per-node 8 -- evaluate.py --dataset math500    # every GPU takes its share

A run is a folder: config.json says what was asked for, and each trace becomes a line of
traces.jsonl the moment it ends. After a kill the same command goes on with what is missing.
Verdicts are made anew by grade.py for every report. From n traces of each problem:

    majority@n   equivalent answers (10 and 10.0) vote together, the answer with most votes counts
                 (self-consistency, Wang et al. 2022, arXiv 2203.11171). Traces without an answer
                 do not vote. A tie has its expected value: 0.5 if one of two leaders is right.
    avg@n        share of right traces, an estimate of pass@1
    pass@k       chance that one of k traces or more is right, without bias from n >= k of them
                 (Chen et al. 2021, arXiv 2107.03374, eq. 1)
    tokens       of a trace: those that the model wrote; `all tokens` has inserted outputs too
    [low, high]  95 % interval by bootstrap over problems (Efron 1979, percentiles). Two runs are
                 compared problem by problem, so that hard ones do not widen the interval.

Left out: a server, a database of runs, an LLM as judge (verdicts must repeat). Breakdowns by
level or topic, plots and a page to browse in are made by extras/report.py.
"""

import contextlib
import hashlib
import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from agent import Trace, check_flags, open_agent
from cli import AgentFlags, DataFlags, UserError
from cli import check_range, go_offline_without_hub, parse, run_main
from data import Problem, load_problems
from engine import Team, resolve_model, take_rank
from grade import Grader, Verdict, fallback_answer, vote


@dataclass(kw_only=True)
class Flags(DataFlags, AgentFlags):
    """Evaluate a model on benchmarks: majority vote, lengths, calls."""

    n: int = 16
    """Traces per problem."""
    out: Path | None = None
    """The run's folder; without this flag one in runs/, named after set and model."""
    name: str | None = None
    """The run's name in reports; without this flag its folder's."""
    grade: bool = True
    """--no-grade only samples: problems need no gold answer, and no report is made."""
    fallback: bool = False
    """Where no box is found, guess the answer from the end of the text."""
    report: tuple[Path, ...] | None = None
    """Folders of runs: report these instead of a new run."""
    ablation: bool = False
    """Baseline, + GRPO, + Agent and DeepMath, one after another."""
    base_model: str | None = None
    """With --ablation: the model before its training, where --model is a fully tuned one."""


CUT = ("max_tokens", "context", "max_calls")  # the trace was ended, it did not end

# What may change when a run goes on. Every other flag decides how a trace looks.
FREE = """n limit out name grade fallback report ablation base_model lora batch
gpu_memory_utilization tensor_parallel verbose sandbox""".split()

# ---- Numbers


def majority(votes: list[tuple[int, bool]]) -> float:
    """What a vote is worth: (count, right) of each cluster, of which the largest is elected.

    Of several largest ones each would be elected with equal chance.

    >>> majority([(3, True), (2, False)]), majority([(2, True), (2, False), (1, False)])
    (1.0, 0.5)
    """
    if not votes:
        return 0.0
    most = max(count for count, _ in votes)
    return fmean(right for count, right in votes if count == most)


def pass_at(k: int, n: int, c: int) -> float:
    """pass@k from n traces of which c are right: 1 - C(n-c, k) / C(n, k) (Chen et al., eq. 1).

    >>> pass_at(1, n=4, c=1), pass_at(4, n=4, c=1)
    (0.25, 1.0)
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values, one for each problem."""
    import numpy as np

    rng = np.random.default_rng(0)
    drawn = rng.choice(values, (draws, len(values)))
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


# ---- A run's folder


def trace_row(trace: Trace) -> dict:
    """A line of traces.jsonl, complete: nothing else is needed to grade and to read it."""
    problem = trace.problem
    return {
        "dataset": problem.meta["dataset"],
        "id": problem.id,
        "question": problem.question,
        "gold": problem.answer,
        "meta": {key: value for key, value in problem.meta.items() if len(str(value)) <= 120},
        "sample": trace.sample,
        "answer": trace.answer,
        "finish": trace.finish,
        "tokens": trace.sampled,
        "all_tokens": len(trace.ids),
        "calls": [{"status": r.status, "seconds": r.seconds} for _, r in trace.calls],
        "seconds": trace.seconds,
        "text": trace.text,
        "spans": trace.spans,  # they tile the text: (model | code | output, characters)
    }


def read_traces(folder: Path) -> dict:
    """(dataset, problem id, sample) -> row, from the files of all ranks."""
    rows = {}
    for path in sorted(folder.glob("traces*.jsonl")):
        for line in path.open("rb"):
            with contextlib.suppress(ValueError):  # a line that a kill cut in two
                row = json.loads(line)
                rows[row["dataset"], row["id"], row["sample"]] = row
    return rows


def open_traces(folder: Path, rank: int):
    """This rank's file of rows, open for appending, without a last line that was cut in two."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"traces-{rank}.jsonl" if rank else "traces.jsonl")
    file = path.open("a", encoding="utf-8")
    file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return file


def read_config(folder: Path) -> dict | None:
    """A run's config.json, None for a new folder. Raises UserError where it is damaged."""
    path = folder / "config.json"
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, TypeError):
        config = json.loads(path.read_bytes())
        if "settings" in config:
            return config
    raise UserError(f"{folder} is not a run: its config.json is damaged")


def make_config(flags: Flags, folder: Path, traces: int, adapter: str | None) -> dict:
    """What config.json says of a run: what was asked for, when, and under which name."""
    settings = {key: value for key, value in vars(flags).items() if key not in FREE}
    settings["prompt"] = asdict(check_flags(flags))  # its text, not its file's name
    if adapter:  # its content: the same folder may hold another one tomorrow
        weights = Path(adapter, "adapter_model.safetensors").read_bytes()
        settings["adapter"] = hashlib.sha256(weights).hexdigest()[:16]
    return {
        "name": flags.name or folder.resolve().name,
        "asked": traces,
        "settings": json.loads(json.dumps(settings)),  # as they will be read again
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def check_settings(old: dict, new: dict) -> None:
    """Raise UserError where a run that is to go on has other settings."""
    changes = []
    for key in sorted(old | new):
        before, after = old.get(key), new.get(key)
        if before != after:
            changes.append(f"{key} {before!s:.30} -> {after!s:.30}")
    if changes:
        raise UserError(f"other settings: {', '.join(changes)}: give another --out")


# ---- The run


def run(flags: Flags) -> None:
    """Sample what the run's folder lacks, then print its report."""
    tool = "agent" if flags.agent else "baseline"
    usual = f"runs/{Path(flags.dataset).stem}-{Path(flags.model).name}-{tool}"
    out = flags.out or Path(usual)
    old = read_config(out)
    if old and flags.seed < 0:  # the seed that was drawn when the run began
        flags.seed = old["settings"]["seed"]
    check_flags(flags)  # a wrong flag ends here, before anything heavy is loaded
    team = Team(*take_rank())  # before anything imports torch
    flags.seed = team.gather(flags.seed)[0]  # each rank may have drawn one

    problems = load_sets(flags)
    if flags.model != "embedded":
        go_offline_without_hub()
    _, adapter = resolve_model(flags.model, flags.lora)

    # Every problem's first trace comes before the second ones: these find their prompt in the
    # engine's cache. A rank's share goes by place in this list, not by what is missing, because
    # ranks may look into the folder at different moments.
    every = [(problem, sample) for sample in range(flags.n) for problem in problems]
    mine = every[team.rank :: team.size]

    config = make_config(flags, out, len(every), adapter)
    if old:
        check_settings(old["settings"], config["settings"])
    with open_traces(out, team.rank) as file:
        if team.rank == 0:
            draft = out / ".config.json.tmp"  # renamed, so that a kill leaves all of it or nothing
            draft.write_text(json.dumps(config, indent=1, ensure_ascii=False))
            draft.replace(out / "config.json")
        done = read_traces(out)
        jobs = [(p, sample) for p, sample in mine if (p.meta["dataset"], p.id, sample) not in done]
        if jobs:
            print(f"{out}: {len(jobs)} of {len(mine)} traces to sample", file=sys.stderr)
            sample_all(flags, problems, jobs, file, quiet=team.rank > 0)
        team.gather("done")  # wait for the others; UserError where one has failed
    if flags.grade and team.rank == 0:
        print_report([out], flags.fallback)


def load_sets(flags: Flags) -> list[Problem]:
    """The problems of every set in --dataset; their meta says which."""
    problems = []
    for name in dict.fromkeys(flags.dataset.split(",")):
        for problem in load_problems(flags, name, need_answer=flags.grade):
            problem.meta["dataset"] = name
            problems.append(problem)
    return problems


def sample_all(flags, problems, jobs, file, quiet) -> None:
    """Write a row for every (problem, sample) of `jobs`, each the moment its trace ends.

    How many are right, --report says at any time, while this goes on too.
    """
    from tqdm import tqdm

    pause = 0.1 if sys.stderr.isatty() else 30  # seconds; a log needs no more
    tokens = 0
    with open_agent(flags, problems, len(jobs)) as agent:
        started = time.monotonic()
        traces = agent.rollout(jobs)
        bar = tqdm(traces, total=len(jobs), unit="trace", mininterval=pause, disable=quiet)
        for trace in bar:
            file.write(json.dumps(trace_row(trace), ensure_ascii=False) + "\n")
            file.flush()
            tokens += trace.sampled
            speed = tokens / (time.monotonic() - started)
            bar.set_postfix_str(f"{speed:.0f} tok/s", refresh=False)


# ---- Verdicts, votes, measures


class Scored(NamedTuple):
    """One problem of a run."""

    rows: list[dict]  # its traces, by sample number
    verdicts: list[Verdict]
    clusters: list[tuple]  # (answer, votes, places in rows), most votes first
    measures: dict[str, float]


class Run(NamedTuple):
    config: dict
    problems: dict[tuple, Scored]  # by dataset and problem id
    measures: dict[str, dict]  # dataset -> measure -> problem id -> value


def load_run(folder: Path, grader: Grader, fallback: bool = False) -> Run:
    """Read and grade a run's folder. Raises UserError where there is none."""
    config = read_config(folder)
    if config is None:
        raise UserError(f"{folder} is not a run: `evaluate.py --out` makes one")
    groups = defaultdict(list)
    for (dataset, problem, _), row in sorted(read_traces(folder).items()):
        if fallback and row["answer"] is None:
            row["answer"] = fallback_answer(row["text"])
        if row["gold"] is not None:
            grader.submit(row["gold"], row["answer"])
            groups[dataset, problem].append(row)
    if not groups:
        raise UserError(f"{folder} has no traces with a gold answer: nothing to report")

    run = Run(config, {}, defaultdict(lambda: defaultdict(dict)))
    for (dataset, problem), rows in groups.items():
        scored = score(rows, grader)
        run.problems[dataset, problem] = scored
        for measure, value in scored.measures.items():
            run.measures[dataset][measure][problem] = value
    return run


def pieces(row: dict) -> Iterator:
    """A row's text, cut into (model | code | output, text)."""
    at = 0
    for kind, length in row["spans"]:
        yield kind, row["text"][at : at + length]
        at += length


def score(rows: list[dict], grader: Grader) -> Scored:
    """Verdicts, vote and measures for the traces of one problem."""
    answers = [row["answer"] for row in rows]
    verdicts = [grader(row["gold"], row["answer"]) for row in rows]
    clusters = vote(answers, grader).clusters
    # The members of a cluster are equivalent, so the first one decides.
    votes = [(count, verdicts[places[0]].equal) for _, count, places in clusters]

    n = len(rows)
    k = min(4, n)
    right = sum(verdict.equal for verdict in verdicts)
    measures = {
        "majority@n, %": 100 * majority(votes),
        f"pass@{k}, %": 100 * pass_at(k, n, right),
    }
    traces = list(map(trace_measures, rows, verdicts))
    for name in traces[0]:
        measures[name] = fmean(trace[name] for trace in traces)
    return Scored(rows, verdicts, clusters, measures)


def trace_measures(row: dict, verdict: Verdict) -> dict[str, float]:
    """What is averaged over the traces of a problem."""
    calls = [call["status"] for call in row["calls"]]
    failed = [status for status in calls if status != "ok"]
    is_undecided = verdict.status not in ("ok", "none")
    return {
        "avg@n, %": 100 * verdict.equal,
        "model tokens": row["tokens"],
        "all tokens": row["all_tokens"],
        "with a call, %": 100 * bool(calls),
        "calls": len(calls),
        "failed calls": len(failed),
        "truncated, %": 100 * (row["finish"] in CUT),
        "without an answer, %": 100 * (row["answer"] is None),
        "undecided, so wrong, %": 100 * is_undecided,
    }


# ---- The report


def report(runs: list[Run]) -> str:
    """The runs side by side as Markdown; the first one is what the others are compared with."""
    names, overview = [], []
    for config, problems, _ in runs:
        settings = config["settings"]
        there = sum(len(problem.rows) for problem in problems.values())
        traces = f"{there} of {config['asked']}"
        names.append(config["name"])
        overview.append([config["name"], settings["model"], settings["end_at"], traces])
    text = table(["run", "model", "a trace ends at", "traces"], overview)
    text += "\nMean [95 % interval]; tokens are those that the model wrote in one trace.\n"
    datasets = set(chain(*(run.measures for run in runs)))
    for dataset in sorted(datasets):
        columns = [run.measures.get(dataset, {}) for run in runs]
        text += f"\n## {dataset}\n\n"
        text += table(["", *names], compare(columns))
    return text


def compare(columns: list[dict]) -> list[list[str]]:
    """The table of one set; a column is a run's: measure -> problem id -> value."""
    lines = []
    for measure in dict.fromkeys(chain(*columns)):
        first, *others = [column.get(measure, {}) for column in columns]
        lines.append([measure, show(first), *map(show, others)])
        if others and measure in ("majority@n, %", "model tokens"):
            lines.append(["difference from the first run", ""])
            for other in others:  # problem by problem, where both runs have it
                gains = {key: other[key] - first[key] for key in first if key in other}
                lines[-1].append(show(gains, "+"))
    return lines


def show(values: dict[str, float], sign: str = "") -> str:
    """`mean [low, high]` of one value for each problem."""
    if not values:
        return ""
    each = list(values.values())
    mean = fmean(each)
    low, high = interval(each)
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def table(header: list[str], body: list[list]) -> str:
    """A Markdown table; the first column is left-aligned."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    text = ""
    for row in (header, rule, *body):
        cells = " | ".join(map(str, row))
        text += f"| {cells} |\n"
    return text


# ---- The command


def ablation(flags: Flags) -> None:
    """The paper's four rows, each a run in a folder and a process of its own; then their report."""
    check_flags(flags)  # a wrong flag ends here, not in the first row
    model, adapter = resolve_model(flags.model, flags.lora)
    if flags.model == "embedded":  # by this name it has settings of its own
        model = "embedded"
    trained = ["--model", model, "--lora", adapter or "none"]
    base = ["--model", flags.base_model or model, "--lora", "none"]
    if trained == base:
        raise UserError("--ablation needs a trained model: give its --lora, or its --base-model")
    rows = {
        "Baseline": ["--no-agent", *base],
        "+ GRPO": ["--no-agent", *trained],
        "+ Agent": ["--agent", *base],
        "DeepMath": ["--agent", *trained],
    }
    out = flags.out or Path("runs/ablation")
    folders = []
    for name, own in rows.items():
        folder = out / name.lower().removeprefix("+ ")
        own += ["--no-ablation", "--name", name, "--out", str(folder)]
        print(f"\n{name}: {' '.join(own)}", file=sys.stderr)
        command = [sys.executable, __file__, *sys.argv[1:], *own]  # of equal flags the last counts
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"the row {name} has failed, see above; the same command goes on")
        folders.append(folder)
    print_report(folders, flags.fallback)


def print_report(folders, fallback: bool) -> None:
    with Grader() as grader:
        runs = [load_run(folder, grader, fallback) for folder in folders]
    print(report(runs))


def main() -> None:
    flags = parse(Flags)
    check_range(flags, 1, math.inf, "n")
    if flags.report == ():
        raise UserError("--report needs the folder of one run or more")
    if flags.report:
        print_report(flags.report, flags.fallback)
    elif flags.ablation:
        ablation(flags)
    else:
        run(flags)


if __name__ == "__main__":
    run_main(main)
