"""Runs, votes and reports: numbers by hand, folders that survive, the page that carries them."""

import base64
import contextlib
import json
import random
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from test_extras import CHROMIUM, EVIL, opened

import cli
import evaluate
from agent import Trace, check_flags
from evaluate import majority, pass_at
from extras.report import majority_at
from grade import Grader
from sandbox import Result

ROOT = Path(__file__).resolve().parent.parent


# ---- Numbers
def test_majority_by_hand():
    assert majority([]) == 0
    assert majority([(2, True)]) == 1
    assert majority([(1, True), (3, False)]) == 0
    assert majority([(2, True), (2, False)]) == 0.5  # a tie has its expected value
    assert majority([(2, True), (2, False), (2, False), (1, True)]) == pytest.approx(1 / 3)


def test_pass_at_is_the_mean_over_all_subsets():
    from itertools import combinations

    for n, c in ((5, 2), (6, 1), (4, 4), (4, 0)):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at(k, n, c) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_interval_covers_its_mean():
    rng, covered = random.Random(0), 0
    for _ in range(100):
        low, high = evaluate.interval([float(rng.random() < 0.3) for _ in range(60)])
        covered += low <= 0.3 <= high
    assert 85 <= covered < 99 and evaluate.interval([2.0, 2.0]) == (2.0, 2.0)


def row(problem, sample, answer, gold="42", **other):
    parts = [("model", "thinking\n"), ("code", "<tool_call>\nprint(6 * 7)\n</tool_call>")]
    parts += [("output", "\n```output\n42\n```\n"), ("model", f"so \\boxed{{{answer}}}")]
    calls = [{"status": status, "seconds": 0.1} for status in other.pop("calls", ["ok"])]
    usual = {"question": "6 * 7?", "finish": "eos", "tokens": 30, "all_tokens": 40, "seconds": 1.5}
    usual |= {"meta": {"level": len(problem)}, "text": "".join(text for _, text in parts)}
    usual |= {"spans": [[kind, len(text)] for kind, text in parts], "calls": calls, "gold": gold}
    return {"dataset": "set", "id": problem, "sample": sample, "answer": answer, **usual, **other}


def write_run(folder, name, rows):
    folder.mkdir(parents=True)
    settings = {"model": "m", "end_at": "eos"}
    config = {"name": name, "asked": len(rows), "settings": settings}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "traces.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    first = [row("a", i, answer) for i, answer in enumerate(["42", "42.0", "41", None])]
    answers = ["0.5", "3", "\\frac12", "3"]
    first += [row("bb", i, answer, gold="1/2") for i, answer in enumerate(answers)]
    first += [row("ccc", i, "7", question=EVIL, finish="max_tokens") for i in range(4)]
    second = [row("a", i, "42", tokens=10, calls=("ok", "error")) for i in range(4)]
    second += [row("bb", i, "0.5", gold="1/2", tokens=10, calls=()) for i in range(4)]
    return write_run(folder / "one", "One", first), write_run(folder / "two", "Two", second)


def test_a_report_by_hand(runs):
    with Grader() as grader:
        one, two = (evaluate.load_run(folder, grader) for folder in runs)
        a, b, c = one.problems
        assert [row["right"] for row in a.rows] == [True, True, False, False]  # 42 and 42.0: both
        assert a.measures["majority@n, %"] == 100 and b.measures["majority@n, %"] == 50  # a tie
        assert a.measures["avg@n, %"] == 50 and a.measures["without an answer, %"] == 25
        assert a.measures["pass@4, %"] == 100
        assert majority_at(a, 1) == 0.5  # which is avg@n: who has no answer does not vote
        assert c.measures["truncated, %"] == 100
        text = evaluate.report([one, two])
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert re.search(r"\| 50\.0 \[.*\| 100\.0 \[100", lines["majority@n, %"])
    paired = [line for line in text.splitlines() if line.startswith("| difference")]
    assert re.search(r"\+25\.0 \[\+0\.0, \+50\.0\]", paired[0])  # on the two problems of both
    assert re.search(r"-20\.0 \[-20\.0, -20\.0\]", paired[1])


def test_report_of_the_command_needs_no_model(runs):
    code = "import atexit, runpy, sys; sys.argv = sys.argv[1:]; atexit.register("
    code += "lambda: print({'torch', 'vllm'} & set(sys.modules), file=sys.stderr));"
    code += "runpy.run_path('evaluate.py', run_name='__main__')"
    command = [sys.executable, "-c", code, "evaluate.py", "--report", *map(str, runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "set()\n" and "| One |" in done.stdout


# ---- A run, with a scripted agent
class ScriptedAgent:
    """Answers every problem rightly or not by its id and sample; may be told to stop."""

    def __init__(self, stop_after=None):
        self.stop_after, self.asked = stop_after, []

    def rollout(self, jobs):
        for count, (problem, sample) in enumerate(jobs):
            if count == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append((problem.id, sample))
            right = random.Random(f"{problem.id}/{sample}").random() < 0.6
            trace = Trace(problem, sample, [1, 2], [3, 4], [1, 1], [-1.0, -1.0], finish="eos")
            answer = problem.answer if right else "-1"
            trace.texts = [f"so \u2028 \\boxed{{{answer}}}"]
            trace.calls = [("1", Result("ok", "1", 0.1))]
            yield trace


def run(monkeypatch, *flags, agent=None):
    agent = agent or ScriptedAgent()

    @contextlib.contextmanager
    def open_agent(flags, problems, traces):
        check_flags(flags)
        yield agent

    monkeypatch.setattr(evaluate, "open_agent", open_agent)
    monkeypatch.setattr(evaluate, "resolve_model", lambda model, lora: (model, None))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", "m/x", "--limit", "5", *flags])
    evaluate.main()
    return agent


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    asked = run(monkeypatch, "--n", "3", "--out", str(whole)).asked
    problems = list(dict.fromkeys(problem for problem, _ in asked))
    assert asked == [(p, i) for i in range(3) for p in problems]  # first traces before second ones
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "--n", "3", "--out", str(cut), agent=ScriptedAgent(stop_after=4))
    with (cut / "traces.jsonl").open("ab") as file:
        file.write(b'\n{"torn": ')
    capsys.readouterr()
    again = run(monkeypatch, "--n", "3", "--out", str(cut)).asked
    assert again == asked[4:]
    report = capsys.readouterr().out
    assert evaluate.read_traces(cut) == evaluate.read_traces(whole) and "15 of 15" in report
    assert run(monkeypatch, "--n", "3", "--out", str(cut)).asked == []
    assert len(run(monkeypatch, "--n", "4", "--out", str(cut)).asked) == 5  # a run may grow


def test_other_settings_want_another_folder_and_a_drawn_seed_stays(tmp_path, monkeypatch):
    flags = ["--n", "1", "--out", str(tmp_path / "run"), "--seed", "-1"]
    run(monkeypatch, *flags)
    assert run(monkeypatch, *flags).asked == []
    with pytest.raises(cli.UserError, match="other settings, temperature:"):
        run(monkeypatch, *flags, "--temperature", "0.9")
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(cli.UserError, match="not a run"):
        run(monkeypatch, *flags)


# ---- extras/report.py
@pytest.fixture(scope="module")
def built(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    command = [sys.executable, "extras/report.py", *map(str, runs), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_page_carries_every_trace_and_no_models_html(built):
    page = (built / "report.html").read_text()
    assert (built / "report.png").read_bytes()[:4] == b"\x89PNG" and EVIL not in page
    packed = re.findall(r'id="d\d+">([^<]*)<', page)
    traces = json.loads(zlib.decompress(base64.b64decode(packed[0])))
    assert [run for run, _ in traces] == [0, 1] and len(traces[0][1]) == 4
    assert [kind for kind, _ in traces[0][1][0]["parts"]] == ["model", "code", "output", "model"]
    assert "level" in page and "Two: majority@n / tokens" in page


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_the_page_opens_in_a_browser(built, tmp_path):
    dom = opened(built / "report.html", tmp_path)
    assert dom.count('class="problem"') == 3 and "<title>Evaluation: One, Two" in dom
