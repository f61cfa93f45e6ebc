"""Grading, votes, metrics, the resumable run and its report.

Numbers are worked by hand or by counting every subset; verdicts come from two corpora, our own (grader_cases.jsonl) and,
where DEEPMATH_DATA names a folder, the public one; the run is killed with SIGKILL at random points and must end like
the unbroken one.
"""

import contextlib
import itertools
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from agent import extract_answer
from data import UserError
from evaluate import Grader, Vote, majority_at, number, pass_at, quick, same, tidy, vote

ROOT = Path(__file__).resolve().parent.parent
OWN = [
    json.loads(line)
    for line in (Path(__file__).parent / "grader_cases.jsonl").read_text().splitlines()
]


@pytest.fixture(scope="module")
def grader():
    with Grader() as g:
        yield g


def cli(*args, **options):
    return subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


# ---------------------------------------------------------------------------------------------------------------
# Grading


def wrong(cases, grader):
    answers = [extract_answer(c["text"]) for c in cases]
    futures = [grader.submit(c["gold"], a) for c, a in zip(cases, answers)]
    return [
        (c["equal"], c["gold"], a, f.result())
        for c, a, f in zip(cases, answers, futures)
        if f.result().equal != c["equal"]
    ]


def test_own_cases(grader):
    assert len(OWN) >= 100 and {c["equal"] for c in OWN} == {True, False}
    assert wrong(OWN, grader) == []


def test_short_cuts_never_change_a_verdict():
    settled = 0
    for c in OWN:
        answer = extract_answer(c["text"])
        if answer is not None and "10^{10^{10" not in c["gold"]:
            verdict = quick(c["gold"], answer)
            settled += verdict is not None
            assert verdict in (None, bool(same(c["gold"], answer))), c
    assert settled > 30  # else the short cut is none


def test_tidying_twice_changes_nothing():
    for c in OWN:
        once = tidy(c["gold"])
        assert tidy(once) == once
        assert quick(c["gold"], c["gold"]) is True


SPELLINGS = [  # one for each rule of TIDY, in its order; 21 of the verdicts change when the rule is taken out
    (r"\begin{pmatrix} 1 \\[4pt] 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("14{,}916", "14916"),
    (r"\left( 1, \displaystyle 2 \right)", "(1,2)"),
    ("$x+1$", "x + 1"),
    (r"\$18", r"18 \text{ dollars}"),
    (r"x\;=\;3\ \quad", "3"),
    (r"\mathrm{Evelyn}", r"\text{Evelyn}"),
    (r"\mathrm{e}+1", "1+e"),
    (r"\text{}5, 3", "3, 5"),
    (r"\dfrac12", "0.5"),
    (r"x \leq 3", r"(-\infty, 3]"),
    ("x ≥ 3", r"[3, \infty)"),
    (r"x \neq 3", r"(-\infty,3) \cup (3,\infty)"),
    (r"x \lt 3", r"(-\infty,3)"),
    (r"x \gt 3", r"(3,\infty)"),
    (r"(1, +\infty)", "(1, ∞)"),
    (r"90^\circ", r"\frac{\pi}{2}"),
    (r"28\%", "28"),
    (r"\sqrt{2} \approx 1.41", "2^{1/2}"),
    (r"(1,2) \cup (3,4)", "(3,4) ∪ (1,2)"),
    (r"x \in [1,2)", r"1 \le x < 2"),
    ("−3", "-3.0"),
    ("2 × 3", "6"),
    ("2·x", "2x"),
    ("6 ÷ 4", "1.5"),
    (r"\frac{π}{2}", r"0.5\pi"),
    ("x²", "x^2"),
    ("x³", "x^3"),
    ("√2", r"\sqrt{2}"),
    (r"\lbrace 1, 2 \}", r"\{2,1\}"),
    (r"\{ 1, 2 \rbrace", r"\{2,1\}"),
    (r"1 \text{ and } 2", "2, 1"),
    ("x^2_1+1", "1+x_1^2"),
    ("x_{1} = 3, x_{2} = 4", "x_2=4, x_1=3"),
    ("x _1 = 3, x _2 = 4", "x_2=4, x_1=3"),
    (r"\varnothing", r"\emptyset"),
    ("x  +   1 ", "1 + x"),
]


@pytest.mark.parametrize(("gold", "answer"), SPELLINGS)
def test_spellings(grader, gold, answer):
    assert grader(gold, answer) == (True, "ok") and grader(gold, answer + " + 1/7").equal is False


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("2, 3, 3", "3, 2, 3", True),
        ("2, 3, 3", "2, 2, 3", False),
        ("2, 3, 3", "2, 3", True),
        ("1, 2", "1, 2, 2", True),
        (r"\{2, 3, 3\}", "2, 3", True),
        (r"\{2, 3\}", "3, 3, 2", True),
        ("x = 1, x = 2", "2, 1", True),
        ("1/2, 0.5", "0.5, 0.5", True),
        (r"S = \{2, 3, 3\}", r"S=\{2, 2, 3\}", True),
    ],
)
def test_lists_of_one_length_are_counted_and_sets_are_not(grader, gold, answer, equal):
    assert grader(gold, answer).equal is equal


SHAPES = [
    "{p}/{q}",
    r"\frac{{{p}}}{{{q}}}",
    r"\dfrac{{{p}}}{{{q}}}",
    r"$\frac{{{p}}}{{{q}}}$",
    r"x = \frac{{{p}}}{{{q}}}",
    r"\left(\frac{{{p}}}{{{q}}}\right)",
]


@given(
    st.integers(-999, 999),
    st.integers(1, 999),
    st.integers(1, 40),
    st.sampled_from(SHAPES),
    st.sampled_from(SHAPES),
)
@settings(max_examples=60, deadline=None)
def test_fractions_in_any_shape(p, q, k, one, other):
    gold = one.format(p=p, q=q)
    assert same(gold, other.format(p=p * k, q=q * k))
    assert not same(gold, other.format(p=p * k + 1, q=q * k))


@given(st.integers(-(10**9), 10**9), st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_decimals_are_exact(n, places):
    shown = f"{n / 10**places:.{places}f}"
    value = Fraction(shown)
    assert number(shown)[0] == value
    assert quick(shown, shown + ("0" if places else ".0")) is True
    assert quick(f"{Fraction(shown).numerator}/{Fraction(shown).denominator}", shown) is True
    assert quick(shown, f"{float(value) + 10.0**-places:.{places}f}") is False


def test_rounding_needs_six_digits_and_an_endless_gold():
    assert quick("1/3", "0.333333") and quick("2/3", "0.666667") and quick("2/3", "0.666666")
    assert (
        not quick("1/3", "0.33333")
        and not quick("2/3", "0.666665")
        and not quick("2/3", "0.666668")
    )
    assert (
        not quick("1/8", "0.1250001")
        and not quick("1000000", "1000000.4")
        and not quick("3", "2.9999999")
    )


def pair(seed: int) -> tuple[str, str]:
    """A pair that no short cut settles."""
    return rf"\sqrt{{{seed}}} + 1", rf"1 + \sqrt{{{seed}}}"


def test_each_pair_is_decided_once(monkeypatch):
    asked = []
    original = Grader._ask
    monkeypatch.setattr(
        Grader, "_ask", lambda self, g, a: asked.append((g, a)) or original(self, g, a)
    )
    with Grader(workers=2) as g:
        futures = [g.submit(*pair(7)) for _ in range(50)]
        assert all(f.result() == (True, "ok") for f in futures)
    assert len(asked) == 1


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


HANGS = (
    "(x+1)^{10^6} - x",
    "(1+x)^{1000000} - x",
)  # exact powers of fractions: minutes within one call into C


def test_a_hang_is_killed_and_costs_its_time_once():
    with Grader(workers=1, seconds=1.0) as g:
        assert g(*pair(2)) == (True, "ok")
        (first,) = [p.pid for p in g.processes]
        started = time.monotonic()
        assert g(*HANGS) == (False, "timeout")
        assert g(*pair(3)) == (True, "ok")  # a new worker
        assert not alive(first)
        spent = time.monotonic() - started
        assert spent < 25  # the kernel's timer, not the parent's clock at 30
        assert g(*HANGS) == (False, "timeout")
        assert time.monotonic() - started - spent < 0.1
        (second,) = [p.pid for p in g.processes]
    assert not alive(second)


def test_memory_is_capped():
    with Grader(workers=1, seconds=20.0, memory=400 << 20) as g:
        started = time.monotonic()
        verdict = g("10^{10^{10}}!", "3")
        assert (
            not verdict.equal
            and verdict.status in ("memory", "error", "crashed")
            and time.monotonic() - started < 15
        )
        assert g(*pair(5)) == (True, "ok")


def test_workers_end_with_a_killed_parent(tmp_path):
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom evaluate import Grader\ng = Grader(workers=1)\ng({pair(6)[0]!r}, {pair(6)[1]!r})\n"
    code += "print([p.pid for p in g.processes][0], flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    assert alive(worker)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def test_a_worker_holds_nothing_heavy():
    code = "import sys, evaluate; evaluate.same('\\\\sqrt{8}', '2\\\\sqrt{2}'); print([m for m in ('torch', 'vllm', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_verdicts_are_kept_and_dropped_with_other_rules(tmp_path, monkeypatch):
    file = tmp_path / "grades.jsonl"
    with Grader(file) as g:
        assert g(*pair(11)).equal
    with file.open("a") as f:
        f.write('["torn", "li')
    monkeypatch.setattr(Grader, "_ask", lambda *_: pytest.fail("asked again"))
    with Grader(file) as g:
        assert g(*pair(11)) == (True, "ok")
    monkeypatch.undo()
    lines = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({"grader": "older"}), *lines[1:]]) + "\n")
    with Grader(file) as g:
        assert pair(11) not in g.known


def test_fallback_is_a_guess_only_where_asked(tmp_path):
    file = tmp_path / "rows.jsonl"
    texts = [
        "The answer is 42.",
        "Final answer: $\\frac{1}{2}$. I hope",
        "so 3 + 4 = 7\n#### 7",
        "no numbers here",
        "It is \\boxed{9}; the answer is 8.",
    ]
    file.write_text(
        "".join(
            json.dumps({"gold": g, "text": t}) + "\n"
            for g, t in zip(["42", "0.5", "7", "1", "9"], texts)
        )
    )
    assert cli("--grade", file).stdout.startswith("1 of 5 right")
    assert cli("--grade", file, "--fallback").stdout.startswith("4 of 5 right")
    rows = [json.loads(line) for line in (tmp_path / "rows.graded.jsonl").read_text().splitlines()]
    assert [r["extracted"] for r in rows] == ["42", "\\frac{1}{2}", "7", None, "9"]
    assert [r["correct"] for r in rows] == [True, True, True, False, True] and rows[0][
        "text"
    ] == texts[0]


def test_answers_in_tool_output_do_not_count(tmp_path):
    file = tmp_path / "rows.jsonl"
    texts = [
        "```output\n\\boxed{5}\n```\n",
        "\\boxed{5}\n<tool_call>\nprint('\\\\boxed{6}')\n</tool_call>\n```output\n\\boxed{6}\n```\n",
    ]
    file.write_text("".join(json.dumps({"answer": "5", "text": t}) + "\n" for t in texts))
    cli("--grade", file, "--out", tmp_path / "out.jsonl")
    assert [
        json.loads(line)["extracted"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ] == [None, "5"]


# ---------------------------------------------------------------------------------------------------------------
# Votes and metrics


def test_vote_clusters_by_equivalence(grader):
    v = vote(["10", "7", "10.0", None, r"\frac{20}{2}", "7", None], grader)
    assert v == Vote("10", [("10", 3, [0, 2, 4]), ("7", 2, [1, 5])])
    assert vote([None, None, "3"], grader) == Vote("3", [("3", 1, [2])])  # no answer has no vote
    assert vote([None, None], grader) == Vote(None, [])
    assert vote(["1", "2", "2", "1"], grader).winner == "1"  # a tie: the one sampled first is shown


def test_majority_by_hand():
    assert majority_at([(2, True), (1, False)], 3) == pytest.approx([2 / 3, (1 + 0.5 + 0.5) / 3, 1])
    assert (
        majority_at([(1, True), (1, False)], 4)[-1] == 0.5
    )  # a tie of two, two samples without an answer
    assert majority_at([(1, False), (1, True), (1, True)], 3)[-1] == pytest.approx(
        2 / 3
    )  # two right ones of three tied
    assert majority_at([], 3) == [0, 0, 0]
    assert majority_at([(3, False)], 3) == [0, 0, 0]
    assert majority_at([(1, True)], 4) == [0.25, 0.5, 0.75, 1.0]  # silent samples never outvote


def by_counting(clusters, n, k):
    labels = [i for i, (c, _) in enumerate(clusters) for _ in range(c)] + [None] * (
        n - sum(c for c, _ in clusters)
    )
    total = Fraction(0)
    for subset in itertools.combinations(labels, k):
        votes = {i: subset.count(i) for i in set(subset) - {None}}
        top = [i for i, c in votes.items() if c == max(votes.values())]
        total += Fraction(sum(clusters[i][1] for i in top), len(top)) if top else 0
    return total / math.comb(n, k)


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_majority_counts_every_subset(clusters, silent):
    n = sum(c for c, _ in clusters) + silent
    if n:
        assert majority_at(clusters, n) == pytest.approx(
            [float(by_counting(clusters, n, k)) for k in range(1, n + 1)]
        )


def test_majority_is_quick_at_64_samples():
    started = time.monotonic()
    majority_at([(20, True), (14, False), (9, False), *[(1, False)] * 15], 64)
    assert time.monotonic() - started < 5


def test_pass_at_by_hand():
    assert (
        pass_at(4, 1, 2) == 0.5
        and pass_at(4, 1, 4) == 1
        and pass_at(4, 0, 4) == 0
        and pass_at(5, 5, 1) == 1
    )
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            hits = [any(i < c for i in subset) for subset in itertools.combinations(range(n), k)]
            assert pass_at(n, c, k) == pytest.approx(sum(hits) / len(hits))


def test_intervals():
    rng = random.Random(1)
    values = [rng.random() for _ in range(200)]
    low, high = evaluate.interval_of(values)
    assert (low, high) == evaluate.interval_of(values)  # seeded
    mean, spread = (
        sum(values) / 200,
        1.96 * (sum((v - sum(values) / 200) ** 2 for v in values) / 200 / 200) ** 0.5,
    )
    assert (
        abs(low - (mean - spread)) < 0.006 and abs(high - (mean + spread)) < 0.006
    )  # the normal approximation
    assert evaluate.interval_of([0.5] * 9) == (0.5, 0.5)
    low, high = evaluate.interval_of(values, [2 * v for v in values], statistic=lambda a, b: b / a)
    assert low == pytest.approx(2) and high == pytest.approx(2)  # resampled together


# ---------------------------------------------------------------------------------------------------------------
# Runs: a scripted agent in place of the model. Its traces depend on (problem, sample) alone, as a seeded engine's do.

DRIVER = textwrap.dedent("""
    import contextlib, random, sys, time
    sys.path.insert(0, {root!r})
    import evaluate
    from agent import Trace
    from sandbox import Result

    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return ["x" * 4 for _ in ids]

    class Scripted:
        tokenizer = Tokenizer()

        def rollout(self, jobs, on_event=None):
            batch = []
            for problem, sample in jobs:
                rng = random.Random(f"{{problem.id}}/{{sample}}")
                right = rng.random() < 0.6
                answer = problem.answer if right else str(rng.randint(0, 3)) if rng.random() < 0.8 else None
                prose, code, output = "Let me see.\\n", "<tool_call>\\nprint(1)\\n</tool_call>", "\\n```output\\n1\\n```\\n"
                last = f"So \\\\boxed{{{{{{answer}}}}}}." if answer else "I stop"
                text = prose + code + output + last
                n = rng.randint(5, 50)
                batch.append(Trace(problem, sample, [1], ids=[2] * (n + 5), mask=[1] * n + [0] * 5, logprobs=[0.0] * (n + 5),
                    calls=[("print(1)", Result("ok" if rng.random() < 0.7 else "timeout", "1", 0.1))],
                    finish="eos" if answer else "max_tokens", text=text,
                    spans=[("model", len(prose)), ("code", len(code)), ("output", len(output)), ("model", len(last))], answer=answer, seconds=0.5))
                if len(batch) == 5:  # traces end in another order than they began
                    rng.shuffle(batch)
                    for trace in batch:
                        time.sleep({pause})
                        yield trace
                    batch = []
            yield from batch

    @contextlib.contextmanager
    def scripted(args, problems):
        yield Scripted()

    evaluate.open_agent = scripted
    evaluate.run_main(evaluate.main)
""")


def scripted(tmp_path, pause=0.0):
    driver = tmp_path / f"driver{pause}.py"
    driver.write_text(DRIVER.format(root=str(ROOT), pause=pause))
    return [sys.executable, str(driver), "--dataset", "arithmetic", "--limit", "20", "--n", "6"]


def run_scripted(tmp_path, *args, pause=0.0):
    return subprocess.run(
        [*scripted(tmp_path, pause), *map(str, args)], capture_output=True, text=True, timeout=100
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_scripted(folder, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def rows_of(folder):
    return {
        (r["id"], r["sample"]): r
        for r in map(json.loads, (folder / "traces.jsonl").read_text().splitlines())
    }


def test_killed_anywhere_it_ends_like_the_unbroken_run(tmp_path, finished):
    whole, printed = finished
    out, rng, kills = tmp_path / "run", random.Random(4), 0
    while True:
        process = subprocess.Popen(
            [*scripted(tmp_path, 0.03), "--out", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            text, _ = process.communicate(timeout=rng.uniform(0.45, 0.9) if kills < 4 else 60)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            if (
                kills == 2 and (out / "traces.jsonl").exists()
            ):  # and one torn in the middle of a line
                os.truncate(out / "traces.jsonl", max(0, (out / "traces.jsonl").stat().st_size - 7))
    assert kills == 4 and process.returncode == 0
    lines = (out / "traces.jsonl").read_text().splitlines()
    assert len(lines) == 120 and rows_of(out) == rows_of(
        whole
    )  # every (problem, sample) exactly once, and the same
    assert text == printed


def test_two_ranks_print_the_table_of_one_and_a_killed_rank_ends_the_job(tmp_path, finished):
    out = tmp_path / "run"

    def ranks(pause):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--",
            *scripted(tmp_path, pause)[1:],
            "--out",
            str(out),
        ]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    process, end = ranks(0.05), time.monotonic() + 60
    while not ((out / "traces-1.jsonl").exists() and (out / "traces-1.jsonl").stat().st_size):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(
        int(
            [pid for pid in children if b"driver" in Path(f"/proc/{pid}/cmdline").read_bytes()][-1]
        ),
        signal.SIGKILL,
    )
    process.communicate(timeout=100)
    assert process.returncode != 0
    again = ranks(0.0)
    text, _ = again.communicate(timeout=100)
    assert again.returncode == 0 and text == finished[1]
    shares = [
        len((out / name).read_text().splitlines()) for name in ("traces.jsonl", "traces-1.jsonl")
    ]
    assert shares == [60, 60] and evaluate.read_traces(out) == rows_of(finished[0])


@pytest.mark.parametrize("cut", [1, 40])  # 1: the line is whole JSON, and only its end is missing
def test_a_torn_line_is_cut_off_and_sampled_again(tmp_path, finished, cut):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "problems.jsonl", "traces.jsonl"):
        (out / name).write_bytes((finished[0] / name).read_bytes())
    os.truncate(out / "traces.jsonl", (out / "traces.jsonl").stat().st_size - cut)
    assert len(evaluate.read_traces(out)) == 119  # a report reads around it and leaves it alone
    done = run_scripted(tmp_path, "--out", out)
    assert "1 traces to sample, 119 are there" in done.stderr
    assert rows_of(out) == rows_of(finished[0])


def test_more_samples_are_added_and_other_settings_refused(tmp_path, finished):
    out = tmp_path / "run"
    run_scripted(tmp_path, "--out", out, "--limit", 5, "--n", 2)
    done = run_scripted(tmp_path, "--out", out, "--limit", 5, "--n", 3)
    assert "5 traces to sample, 10 are there" in done.stderr
    before = (out / "traces.jsonl").read_bytes()
    for flags, named in (
        (["--temperature", "0.7"], "sampling.temperature: 0.6 -> 0.7"),
        (["--no-agent"], "agent: True -> False"),
        (["--where", "difficulty=1"], "where"),
    ):
        done = run_scripted(tmp_path, "--out", out, "--limit", 5, *flags)
        assert (
            done.returncode == 2
            and named in done.stderr
            and len(done.stderr.strip().splitlines()) == 1
        )
    assert (out / "traces.jsonl").read_bytes() == before


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    first = subprocess.Popen(
        [*scripted(tmp_path, 0.2), "--out", str(tmp_path / "run")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (
            (tmp_path / "run" / "traces.jsonl").exists()
            and (tmp_path / "run" / "traces.jsonl").stat().st_size
        ):
            time.sleep(0.02)
        assert (
            tmp_path / "run" / "traces.jsonl"
        ).stat().st_size < 3000  # lines arrive one by one, not when a buffer is full
        done = run_scripted(tmp_path, "--out", tmp_path / "run")
        assert done.returncode == 2 and "another run is writing" in done.stderr
    finally:
        first.kill()
        first.wait()


def test_a_run_never_shrinks(tmp_path, finished):
    """Fewer problems or samples than the folder holds change nothing in it, also not from a second run that is refused."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    done = run_scripted(tmp_path, "--out", out, "--limit", 2, "--n", 1)
    assert done.returncode == 0 and done.stdout == finished[1] and "to sample" not in done.stderr
    assert json.loads((out / "config.json").read_text())["n"] == 6
    files = {name: (out / name).read_bytes() for name in ("problems.jsonl", "traces.jsonl")}
    assert files == {name: (finished[0] / name).read_bytes() for name in files}
    with (out / "traces.jsonl").open("a") as file:  # somebody writes there
        fcntl.flock(file, fcntl.LOCK_EX)
        config = (out / "config.json").read_bytes()
        refused = run_scripted(tmp_path, "--out", out, "--limit", 100)
    assert refused.returncode == 2 and "another run is writing" in refused.stderr
    assert (out / "config.json").read_bytes() == config and files == {
        name: (out / name).read_bytes() for name in files
    }


def test_sets_that_share_a_question_both_stay(tmp_path):
    rows = [
        {"dataset": name, "id": pid, "question": pid, "answer": "1", "meta": {}}
        for name, pid in (("a", "p"), ("b", "p"), ("b", "q"))
    ]
    config = {"name": "x", "n": 1, "started": "", "settings": {}}
    for answers in (
        rows,
        [{**row, "answer": None} for row in rows],
    ):  # the second time with --no-grade
        evaluate.open_run(tmp_path, config, answers)
        assert [
            json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()
        ] == rows


def test_other_ranks_wait_for_the_first_ones_folder(tmp_path):
    rows = [{"dataset": "a", "id": "p", "question": "p", "answer": "1", "meta": {}}]
    config, done = {"name": "x", "n": 1, "started": "", "settings": {}}, []
    late = threading.Thread(
        target=lambda: done.append(evaluate.open_run(tmp_path, config, rows, rank=1)), daemon=True
    )
    late.start()
    late.join(0.4)
    assert late.is_alive() and not (tmp_path / "config.json").exists()
    evaluate.open_run(tmp_path, config, rows)
    late.join(20)
    assert done == [{}]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    for text in ('{"mine": 1}', '{"mine": 1}\n{"mine": 2}'):
        (tmp_path / "traces.jsonl").write_text(text)
        done = run_scripted(tmp_path, "--out", tmp_path)
        assert (
            done.returncode == 2
            and "no config.json" in done.stderr
            and (tmp_path / "traces.jsonl").read_text() == text
        )


def test_other_problems_under_the_same_name_are_refused(tmp_path):
    for folder, numbers in (("a", (1, 2)), ("b", (3, 4)), ("c", (1, 2, 3))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(
            "".join(
                json.dumps({"question": f"What is {n} + 1?", "answer": n + 1}) + "\n"
                for n in numbers
            )
        )
    out = tmp_path / "run"
    assert (
        run_scripted(tmp_path, "--out", out, "--dataset", tmp_path / "a/rows.jsonl").returncode == 0
    )
    other = run_scripted(tmp_path, "--out", out, "--dataset", tmp_path / "b/rows.jsonl")
    assert other.returncode == 2 and "other problems of the name rows" in other.stderr
    assert (
        run_scripted(tmp_path, "--out", out, "--dataset", tmp_path / "c/rows.jsonl").returncode == 0
    )  # the file has grown
    both = run_scripted(tmp_path, "--dataset", f"{tmp_path}/a/rows.jsonl,{tmp_path}/b/rows.jsonl")
    assert both.returncode == 2 and "same name" in both.stderr


def test_progress_counts_verdicts_when_they_are_there():
    meter, first, second = evaluate.Meter(5, 0), Future(), Future()
    for future in (first, second, second, None):  # equal answers share a future and count each
        meter.add(10, future)
    assert meter.right == [] and meter.done == 4
    second.set_result(evaluate.Verdict(True, "ok"))
    first.set_result(evaluate.Verdict(False, "ok"))
    meter.add(10, second)
    assert sorted(meter.right) == [False, True, True, True] and not meter.waiting


def test_interrupted_it_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        [*scripted(tmp_path, 0.05), "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (
        (tmp_path / "run" / "traces.jsonl").exists()
        and (tmp_path / "run" / "traces.jsonl").stat().st_size
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (
        process.returncode == 130
        and "the same command goes on from there" in err
        and "Traceback" not in err
    )


def test_all_problems_first_traces_come_before_the_second_ones(finished):
    rows = [json.loads(line) for line in (finished[0] / "traces.jsonl").read_text().splitlines()]
    assert [row["sample"] for row in rows] == [
        i for i in range(6) for _ in range(20)
    ]  # the scripted agent mixes five by five


def test_report_needs_no_model_and_repeats(finished):
    done = cli("--report", finished[0])
    assert done.returncode == 0 and done.stdout == finished[1]


def test_no_grade(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "What?"}\n{"problem": "Why?"}\n')
    done = run_scripted(
        tmp_path,
        "--out",
        tmp_path / "run",
        "--dataset",
        tmp_path / "p.jsonl",
        "--no-grade",
        "--n",
        2,
    )
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "run")) == 4 and "pass@" not in done.stdout.split("| k |")[0]


def test_several_datasets_share_one_run(tmp_path):
    (tmp_path / "other.jsonl").write_text(
        '{"problem": "1+1?", "answer": "2", "level": 1}\n{"problem": "1+2?", "answer": "3", "level": 2}\n'
    )
    done = run_scripted(
        tmp_path,
        "--out",
        tmp_path / "run",
        "--dataset",
        f"arithmetic,{tmp_path / 'other.jsonl'}",
        "--limit",
        3,
        "--n",
        2,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "arithmetic: majority@2" in done.stdout
        and "other: majority@2" in done.stdout
        and "| level | problems |" in done.stdout
    )
    assert len(rows_of(tmp_path / "run")) == 10


# A run written by hand: two problems, four samples each.


def write_run(folder, name, answers, sampled, golds=("10", "3"), levels=(1, 2), finishes=None):
    folder.mkdir()
    problems = [
        {
            "dataset": "set",
            "id": f"p{i}",
            "question": f"q{i}",
            "answer": g,
            "meta": {"level": level},
        }
        for i, (g, level) in enumerate(zip(golds, levels))
    ]
    rows = []
    for i, (per_problem, lengths) in enumerate(zip(answers, sampled)):
        for j, (a, n) in enumerate(zip(per_problem, lengths)):
            calls = (
                [{"status": "ok", "seconds": 0.1}, {"status": "error", "seconds": 0.1}]
                if j == 0
                else []
            )
            finish = finishes[i][j] if finishes else "eos"
            rows.append(
                {
                    "id": f"p{i}",
                    "sample": j,
                    "answer": a,
                    "finish": finish,
                    "tokens": n,
                    "all_tokens": n + 10 * len(calls),
                    "box_tokens": n if a else None,
                    "calls": calls,
                    "seconds": 1.0,
                    "text": "t",
                    "spans": [["model", 1]],
                }
            )
    config = {"name": name, "n": 4, "settings": {"sampling": {"end_at": "eos"}}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (folder / "traces.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def cells(text, label, column=1):
    return next(
        line.split("|")[column + 1].strip()
        for line in text.splitlines()
        if line.startswith(f"| {label} |")
    )


def test_report_by_hand(tmp_path):
    a = write_run(
        tmp_path / "a",
        "A",
        [["10", "10.0", "7", None], ["3", "4", "4", "5"]],
        [[100, 100, 100, 500], [50, 50, 50, 50]],
        finishes=[["eos", "eos", "eos", "max_tokens"], ["eos"] * 4],
    )
    b = write_run(tmp_path / "b", "B", [["10"] * 4, ["3", "3", "4", "4"]], [[50] * 4, [25] * 4])
    text = evaluate.report([evaluate.load_run(a), evaluate.load_run(b)])
    # A: p0 elects 10 (two votes, one for 7), p1 elects 4: 50 %. B: p0 right, p1 a tie of 3 and 4: 75 %.
    assert cells(text, "majority@4, %").startswith("50.0 ") and cells(
        text, "majority@4, %", 2
    ).startswith("75.0 ")
    assert cells(text, "avg@4, %").startswith("37.5 ") and cells(text, "avg@4, %", 2).startswith(
        "75.0 "
    )
    assert cells(text, "pass@4, %").startswith("100.0 ")
    assert cells(text, "model tokens").startswith("125 ") and cells(
        text, "model tokens", 2
    ).startswith("38 ")
    assert cells(text, "all tokens (with outputs)").startswith(
        "130 "
    )  # two of eight traces have two calls
    assert cells(text, "model tokens of traces that were not cut") == f"{500 / 7:.0f}"
    assert (
        cells(text, "traces cut, %") == "12.5"
        and cells(text, "traces without an answer, %") == "12.5"
    )
    assert (
        cells(text, "calls per trace") == "0.50" and cells(text, "traces with a call, %") == "25.0"
    )
    assert cells(text, "failed calls") == "error 2 (50.0 %)"
    assert cells(text, "finish") == "eos 7 (87.5 %), max_tokens 1 (12.5 %)"
    # Paired: accuracy +0 on p0 and +50 on p1; mean length 125 -> 37.5 is -70 %.
    assert cells(text, "B", 1) == "75.0 [50.0, 100.0]"
    second = text[text.index("## Difference") :]
    assert (
        cells(second, "B", 1).startswith("+25.0 [+0.0, +50.0]")
        and cells(second, "B", 2).startswith("-70.0 ")
        and cells(second, "B", 3) == "2"
    )
    by_level = text[text.index("| level |") :]
    assert (
        cells(by_level, "1", 2) == "100.0 / 200"
        and cells(by_level, "2", 2) == "0.0 / 50"
        and cells(by_level, "2", 3).startswith("50.0 / ")
    )


# ---------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "flags",
    [
        ["--report", "nowhere"],
        ["--grade", "nowhere.jsonl"],
        ["--n", "0"],
        ["--dataset", "no-such-set"],
        ["--temperature", "-1"],
        ["--dataset", "arithmetic", "--where", "family"],
        ["--dataset", "arithmetic", "--lora", "nowhere", "--limit", "1"],
    ],
)
def test_mistakes_end_in_one_line(flags, tmp_path):
    done = cli(*flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "traces to sample" not in line]
    assert len(lines) == 1 and lines[0].startswith("evaluate.py: ")


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "x"}', '{"gold": "1"}'])
def test_bad_rows_are_named(tmp_path, line):
    (tmp_path / "f.jsonl").write_text('{"gold": "1", "text": "\\\\boxed{1}"}\n' + line + "\n")
    done = cli("--grade", tmp_path / "f.jsonl")
    assert done.returncode == 2 and "line 2" in done.stderr and len(done.stderr.splitlines()) == 1


def test_help_is_quick():
    code = "import sys, evaluate; print([m for m in ('vllm', 'torch', 'sympy', 'numpy', 'math_verify', 'matplotlib', 'rich', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
        == "[]"
    )
    times = []
    for _ in range(3):
        started = time.monotonic()
        assert cli("--help").returncode == 0
        times.append(time.monotonic() - started)
    assert min(times) < 1.0  # 0.15 s on a quiet machine


def test_ablation_runs_the_four_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("agent.adapter_config", lambda folder: {"r": 8})
    commands = []

    def record(command, **_):
        commands.append(command)
        folder = Path(command[command.index("--out") + 1])
        folder.parent.mkdir(exist_ok=True)
        write_run(
            folder,
            command[command.index("--name") + 1],
            [["10"] * 4, ["3"] * 4],
            [[5] * 4, [6] * 4],
        )
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(evaluate.subprocess, "run", record)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            "--ablation",
            "--dataset",
            "arithmetic",
            "--n",
            "4",
            "--lora",
            "ad",
            "--out",
            str(tmp_path / "x"),
        ],
    )
    evaluate.main()
    monkeypatch.undo()
    seen = [
        (c[c.index("--name") + 1], "--no-agent" in c, c[c.index("--lora") + 1]) for c in commands
    ]
    assert seen == [
        ("Baseline", True, "none"),
        ("+ GRPO", True, "ad"),
        ("+ Agent", False, "none"),
        ("DeepMath", False, "ad"),
    ]
    assert all("--ablation" not in c and c[c.index("--n") + 1] == "4" for c in commands)
    assert re.findall(
        r"^\| (Baseline|\+ GRPO|\+ Agent|DeepMath) \| 100", capsys.readouterr().out, re.M
    ) == ["Baseline", "+ GRPO", "+ Agent", "DeepMath"]


def test_unknown_run_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError):
        evaluate.load_run(tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# The public corpora


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_public_grader_cases(data_dir, grader):
    cases = read(data_dir / "grader_cases.jsonl")
    boxed = [c for c in cases if not c.get("needs_fallback")]
    for tier, least in (("core", 0.99), ("hard", 0.90)):
        tried = [c for c in boxed if c["tier"] == tier]
        missed = wrong(tried, grader)
        assert len(missed) <= (1 - least) * len(tried), missed
    assert all(extract_answer(c["text"]) is None for c in cases if c.get("needs_fallback"))
    for c in cases:
        if c.get("must_not_hang"):
            with Grader(workers=1) as fresh:
                started = time.monotonic()
                fresh(c["gold"], extract_answer(c["text"]))
                assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "name", ["model_outputs_qwen25math_cot.jsonl", "model_outputs_nemo_skills.jsonl"]
)
def test_public_model_outputs(data_dir, grader, name):
    rows = read(data_dir / name)
    missed = wrong(
        [{"gold": r["answer"], "text": r["text"], "equal": r["equal"]} for r in rows], grader
    )
    assert len(missed) <= 0.01 * len(rows), missed


def test_every_public_gold_equals_itself_and_not_its_neighbour(data_dir, grader):
    golds = [r["answer"] for r in read(data_dir / "math500.jsonl")]
    assert [g for g in golds if not grader(g, g).equal] == []
    distinct = list(dict.fromkeys(golds))
    mixed = [(a, b) for a, b in zip(distinct, distinct[1:] + distinct[:1]) if grader(a, b).equal]
    assert mixed == []


@pytest.mark.slow
@pytest.mark.engine
def test_the_embedded_model(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "evaluate.py"),
            "--dataset",
            "arithmetic",
            "--limit",
            "2",
            "--n",
            "2",
            "--max-tokens",
            "60",
            "--out",
            str(tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run").values()
    assert len(rows) == 4 and all(
        0 < r["tokens"] <= 60 and sum(n for _, n in r["spans"]) == len(r["text"]) for r in rows
    )
