r"""Evaluation: run a benchmark, put the answers to the vote, measure, compare.

    python evaluate.py --dataset arithmetic --limit 64 --out runs/agent    # 16 traces a problem
    python evaluate.py --dataset arithmetic --limit 64 --out runs/baseline --no-agent
    python evaluate.py --report runs/baseline runs/agent    # side by side (plots: extras/report.py)
    python evaluate.py --ablation --out runs/ablation    # the paper's four rows
    torchrun --nproc-per-node 8 -- evaluate.py --dataset math500    # every GPU takes its share

A run is a folder: config.json says what was asked for, and each trace becomes a line of
traces.jsonl the moment it ends. After a kill the same command goes on with what is missing.
Verdicts are made anew by grade.py for every report. From n traces of each problem:

    majority@n   equivalent answers (10 and 10.0) vote together, the answer with most votes counts
                 (self-consistency, Wang et al. 2022, arXiv 2203.11171). Traces without an answer
                 do not vote. A tie has its expected value: 0.5 if one of two leaders is right.
    avg@n        share of right traces, an estimate of pass@1
    pass@k       chance that at least one of k traces is right, without bias from n >= k of them
                 (Chen et al. 2021, arXiv 2107.03374, eq. 1)
    tokens       of a trace: those that the model wrote; `all tokens` has inserted outputs too
    [low, high]  95 % interval by bootstrap over problems (Efron 1979, percentiles). Two runs are
                 compared problem by problem, so that hard ones do not widen the interval.
"""

import contextlib
import hashlib
import json
import math
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

from agent import Trace, check_flags, open_agent
from cli import AgentFlags, DataFlags, UserError
from cli import check_range, parse, run_main, write_log
from data import load_problems
from engine import Team, resolve_model, take_rank
from grade import Grader, vote


@dataclass(kw_only=True)
class Flags(DataFlags, AgentFlags):
    """Evaluate a model on benchmarks: majority vote, lengths, calls."""

    n: int = 16  # traces per problem
    out: Path | None = None  # the run's folder; without it runs/SET-MODEL-agent or -baseline
    name: str | None = None  # the run's name in reports; without this flag its folder's
    report: tuple[Path, ...] | None = None  # folders of runs: report these instead of a new run
    ablation: bool = False  # baseline, + GRPO, + Agent and DeepMath, one after another
    base_model: str | None = None  # with --ablation: --model before its training, if not by LoRA


CUT = ("max_tokens", "context", "max_calls")  # the trace was ended, it did not end

# What may change when a run goes on. Every other flag decides how a trace looks.
FREE = """n limit out name report ablation base_model lora batch gpu_memory_utilization
tensor_parallel verbose sandbox""".split()


# ---- Numbers
def majority(votes: list[tuple[int, bool]]) -> float:
    """What a vote is worth: (count, right) of each cluster; each of the largest may win.

    >>> majority([(3, True), (2, False)]), majority([(2, True), (2, False), (1, False)])
    (1.0, 0.5)
    """
    if not votes:
        return 0.0
    most, _ = max(votes)
    return fmean(right for count, right in votes if count == most)


def pass_at(k: int, n: int, c: int) -> float:
    """pass@k from n traces of which c are right: 1 - C(n-c, k) / C(n, k) (Chen et al., eq. 1).

    >>> pass_at(1, n=4, c=1), pass_at(4, n=4, c=1)
    (0.25, 1.0)
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values, one for each problem."""
    import numpy as np

    rng = np.random.default_rng(0)
    drawn = rng.choice(values, (2000, len(values)))
    return tuple(np.percentile(drawn.mean(axis=1), [2.5, 97.5]))


# ---- A run's folder
def trace_row(trace: Trace) -> dict:
    """A line of traces.jsonl, complete: nothing else is needed to grade and to read it."""
    problem = trace.problem
    return {
        "dataset": problem.dataset,
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
    for path in folder.glob("traces*.jsonl"):
        for line in path.open("rb"):
            with contextlib.suppress(ValueError, TypeError, KeyError):  # cut in two, or not ours
                row = json.loads(line)
                rows[row["dataset"], row["id"], row["sample"]] = row
    return rows


def read_config(folder: Path) -> dict:
    """A run's config.json, {} for a new folder. Raises UserError where it is damaged."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError, TypeError):
        config = json.loads(path.read_bytes())
        if "settings" in config:
            return config
    raise UserError(f"{folder} is not a run: its config.json is damaged")


def write_config(flags: Flags, out: Path, asked: int) -> None:
    """What config.json says of a run. Raises UserError where one with other settings is there."""
    settings = {key: value for key, value in vars(flags).items() if key not in FREE}
    settings["prompt"] = asdict(check_flags(flags))  # its text, not its file's name
    _, adapter = resolve_model(flags.model, flags.lora)
    if adapter:  # its content: the same folder may hold another one tomorrow
        weights = Path(adapter, "adapter_model.safetensors").read_bytes()
        settings["adapter"] = hashlib.sha256(weights).hexdigest()[:16]
    settings = json.loads(json.dumps(settings))  # as they will be read again
    before = read_config(out).get("settings", settings)
    changed = [key for key in settings | before if settings.get(key) != before.get(key)]
    if changed:
        raise UserError(f"{out} has other settings, {', '.join(changed)}: give another --out")
    config = {"name": flags.name or out.resolve().name, "asked": asked, "settings": settings}
    out.mkdir(parents=True, exist_ok=True)
    draft = out / ".config.json.tmp"  # renamed, so that a kill leaves all of it or nothing
    draft.write_text(json.dumps(config, indent=1, ensure_ascii=False))
    draft.replace(out / "config.json")


# ---- The run
def run(flags: Flags) -> None:
    """Sample what the run's folder lacks, then print its report."""
    tool = "agent" if flags.agent else "baseline"
    out = flags.out or Path(f"runs/{Path(flags.dataset).stem}-{Path(flags.model).name}-{tool}")
    if flags.seed < 0:  # a drawn one stays when the run goes on
        flags.seed = read_config(out).get("settings", vars(flags))["seed"]
    check_flags(flags)  # a wrong flag ends here, before anything heavy is loaded
    team = Team(*take_rank())  # before anything imports torch
    flags.seed = team.gather(flags.seed)[0]  # each rank may have drawn one

    problems = []
    for name in dict.fromkeys(flags.dataset.split(",")):
        problems += load_problems(replace(flags, dataset=name))
    # Every problem's first trace comes before the second ones: these find their prompt in the
    # engine's cache. A rank's share goes by place in this list, not by what is missing, because
    # ranks may look into the folder at different moments.
    every = [(problem, sample) for sample in range(flags.n) for problem in problems]
    mine = every[team.rank :: team.size]

    if team.rank == 0:
        write_config(flags, out, len(every))
    team.gather("ready")  # the folder is there, and right
    done = read_traces(out)
    jobs = [(p, sample) for p, sample in mine if (p.dataset, p.id, sample) not in done]
    if jobs:
        path = out / (f"traces-{team.rank}.jsonl" if team.rank else "traces.jsonl")
        with open_agent(flags, problems, len(jobs)) as agent:
            traces = agent.rollout(jobs)
            for trace in tqdm(traces, total=len(jobs), mininterval=5, disable=team.rank > 0):
                write_log(path, trace_row(trace))  # the moment it ends
    team.gather("done")  # wait for the others
    if team.rank == 0:
        print_report([out])


# ---- Verdicts, votes, measures
class Scored(NamedTuple):
    """One problem of a run."""

    dataset: str
    id: str
    rows: list[dict]  # its traces, by sample number, each with `right` and `grading`
    clusters: list[tuple]  # (answer, places in rows), most votes first
    measures: dict[str, float]


class Run(NamedTuple):
    config: dict
    problems: list[Scored]


def load_run(folder: Path, grader: Grader) -> Run:
    """Read and grade a run's folder. Raises UserError where there is none."""
    config = read_config(folder)
    traces = read_traces(folder)
    if not (config and traces):
        raise UserError(f"{folder} is not a run with traces: `evaluate.py --out` makes one")
    problems = defaultdict(list)
    for (dataset, problem, _), row in sorted(traces.items()):
        grader.submit(row["gold"], row["answer"])  # its workers begin while we go on
        problems[dataset, problem].append(row)
    return Run(config, [score(rows, grader) for rows in problems.values()])


def score(rows: list[dict], grader: Grader) -> Scored:
    """Verdicts, vote and measures for the traces of one problem."""
    for row in rows:
        row["right"], row["grading"] = grader(row["gold"], row["answer"])
    clusters = vote([row["answer"] for row in rows], grader)
    # The answer of a cluster is its first member's, and so is its verdict.
    votes = [(len(places), rows[places[0]]["right"]) for _, places in clusters]
    n = len(rows)
    k = min(4, n)
    right = sum(row["right"] for row in rows)
    measures = {"majority@n, %": 100 * majority(votes)}
    measures[f"pass@{k}, %"] = 100 * pass_at(k, n, right)
    traces = [trace_measures(row) for row in rows]
    for name in traces[0]:
        measures[name] = fmean(trace[name] for trace in traces)
    return Scored(rows[0]["dataset"], rows[0]["id"], rows, clusters, measures)


def trace_measures(row: dict) -> dict[str, float]:
    """What is averaged over the traces of a problem."""
    calls = row["calls"]
    return {
        "avg@n, %": 100 * row["right"],
        "model tokens": row["tokens"],
        "all tokens": row["all_tokens"],
        "with a call, %": 100 * bool(calls),
        "calls": len(calls),
        "failed calls": sum(call["status"] != "ok" for call in calls),
        "truncated, %": 100 * (row["finish"] in CUT),
        "without an answer, %": 100 * (row["answer"] is None),
        "undecided, so wrong, %": 100 * (row["grading"] not in ("ok", "none")),
    }


# ---- The report
def report(runs: list[Run]) -> str:
    """The runs side by side as Markdown; the first one is what the others are compared with."""
    names = [run.config["name"] for run in runs]
    overview = []
    for config, problems in runs:
        traces = f"{sum(len(p.rows) for p in problems)} of {config['asked']}"
        settings = config["settings"]
        overview.append([config["name"], settings["model"], settings["end_at"], traces])
    text = table(["run", "model", "a trace ends at", "traces"], overview)
    text += "\nMean [95 % interval]; tokens are those that the model wrote in one trace.\n"
    for dataset in sorted({problem.dataset for run in runs for problem in run.problems}):
        columns = [[p for p in run.problems if p.dataset == dataset] for run in runs]
        text += f"\n## {dataset}\n\n"
        text += table(["", *names], compare(columns))
    return text


def compare(columns: list[list[Scored]]) -> list[list[str]]:
    """The table of one set: a row for each measure, a column for each run."""
    lines = []
    measures = {}
    for problem in sum(columns, []):
        measures |= problem.measures
    for measure in measures:
        found = []  # of each run: problem id -> value
        for problems in columns:
            found.append({p.id: p.measures[measure] for p in problems if measure in p.measures})
        lines.append([measure, *map(show, found)])
        first, *others = found
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
    low, high = interval(each)
    return f"{fmean(each):{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def table(header: list[str], body: list[list]) -> str:
    """A Markdown table; the first column is left-aligned."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    lines = [" | ".join(map(str, row)) for row in (header, rule, *body)]
    return "".join(f"| {line} |\n" for line in lines)


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
        "Baseline": ["--no-agent", "--prompt", "chat", *base],
        "+ GRPO": ["--no-agent", "--prompt", "chat", *trained],
        "+ Agent": ["--agent", *base],
        "DeepMath": ["--agent", *trained],
    }
    out = flags.out or Path("runs/ablation")
    folders = []
    for name, own in rows.items():
        folder = out / name.lower().removeprefix("+ ")
        folders.append(folder)
        own += ["--no-ablation", "--name", name, "--out", str(folder)]
        command = [sys.executable, __file__, *sys.argv[1:], *own]  # of equal flags the last counts
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"the row {name} has failed, see above; the same command goes on")
    print_report(folders)


def print_report(folders) -> None:
    with Grader() as grader:
        print(report([load_run(folder, grader) for folder in folders]))


def main() -> None:
    flags = parse(Flags)
    check_range(flags, 1, math.inf, "n")
    if flags.report == ():
        raise UserError("--report needs the folder of one run or more")
    if flags.report:
        print_report(flags.report)
    elif flags.ablation:
        ablation(flags)
    else:
        run(flags)


if __name__ == "__main__":
    run_main(main)
