"""Problems, loaders, prompts and the embedded model.

The built-in set's answers are computed a second time here, from the wording of the question alone.
"""

import csv
import json
import os
import re
import socket
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import sympy

import data
from data import (
    FAMILIES,
    Problem,
    Prompt,
    UserError,
    arithmetic,
    clean_answer,
    load,
    problem_id,
    read_few_shot,
)
from sandbox import Sandbox

ROOT = Path(__file__).resolve().parent.parent


def python(*argv, timeout=60, **options):
    return subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


# ---------------------------------------------------------------------------------------------------------------
# The built-in set


def test_splits_are_disjoint_and_prefixes_agree():
    train, test = arithmetic("train", 3000), arithmetic("test", 600)
    assert not {p.id for p in train} & {p.id for p in test}
    assert not {p.question for p in train} & {p.question for p in test}
    assert len({p.id for p in train}) == 3000 and len({p.id for p in test}) == 600
    for split, problems in (("train", train), ("test", test)):
        for n in (0, 1, 17, 200):
            assert arithmetic(split, n) == problems[:n]


def test_the_set_is_the_same_in_another_process():
    code = "import data; print([p.id for p in data.arithmetic('test', 100)])"
    shown = python("-c", code, env={**os.environ, "PYTHONHASHSEED": "7"}).stdout.strip()
    assert shown == str([p.id for p in arithmetic("test", 100)])


def test_families_difficulties_and_wordings():
    problems = arithmetic("test", 450)
    assert len(FAMILIES) >= 10
    for family in FAMILIES:
        mine = [p for p in problems if p.meta["family"] == family]
        assert len(mine) == 30 and {p.meta["difficulty"] for p in mine} == {1, 2, 3}
    names = {name for p in problems for name in data._NAMES if name in p.question.split()}
    assert len(names) >= 10
    assert all("\n" not in p.question and p.answer == p.answer.strip() != "" for p in problems)


def test_too_many_problems_end_in_one_line(monkeypatch):
    monkeypatch.setattr(
        data,
        "FAMILIES",
        {"tiny": lambda rng, d: (f"What is {rng.randint(1, 9)} + 1?", 0, "print(0)")},
    )
    with pytest.raises(UserError, match="lower --limit"):
        arithmetic("train", 50)


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def again_sum(q):
    return eval(re.search(r"\d+(?: [-+] \d+)+", q)[0])  # noqa: S307  our own digits and signs


def again_power(q):
    a, e, n = numbers(q)
    value = 1
    for _ in range(e):
        value = value * a % n
    return value


def again_gcd_lcm(q):
    a, b = numbers(q)
    return sympy.igcd(a, b) if "divisor" in q else sympy.ilcm(a, b)


def again_range_sum(q):
    if "multiples" in q:
        k, low, high = numbers(q)
        return sum(range(-(-low // k) * k, high + 1, k))
    low, high = numbers(q)
    power = 2 if "squares" in q else 3 if "cubes" in q else 1
    return sum(n**power for n in range(low, high + 1))


def again_fraction(q):
    parts = [Fraction(int(a), int(b)) for a, b in re.findall(r"\\frac\{(\d+)\}\{(\d+)\}", q)]
    ops = re.findall(r"\} ([-+]|\\times) \\", q)
    value = parts[0]
    for op, p in zip(ops, parts[1:], strict=True):
        value = {"+": value + p, "-": value - p, "\\times": value * p}[op]
    return value


def again_equation(q):
    text = re.search(r"-?\d+(?:x|\().*=[^=]*?-?\d+x? ?[-+]? ?\d*", q)[0].strip(" $?.")
    left, right = (
        sympy.sympify(
            re.sub(r"(\d)([x(])", r"\1*\2", side.replace("$", "").split(" for ")[0].strip(" ?"))
        )
        for side in text.split("=")
    )
    (value,) = sympy.solve(left - right, sympy.Symbol("x"))
    return value


def again_system(q):
    lines, target = re.fullmatch(r"If (.*), what is (.*)\?", q).groups()
    x, y = sympy.symbols("x y")
    parts = [re.sub(r"(\d)([xy])", r"\1*\2", line).split("=") for line in lines.split(" and ")]
    (solution,) = sympy.solve(
        [sympy.sympify(a) - sympy.sympify(b) for a, b in parts], [x, y], dict=True
    )
    return sympy.sympify(target).subs(solution)


def again_shopping(q):
    n = numbers(q)
    if "has $" in q:
        return n[0] - n[1] * n[2] - n[3] * n[4]
    if "How much more" in q:
        p, other, a, b = n
        return a * p - b * other
    return n[0] * n[1] + n[2] * n[3]


def again_sharing(q):
    n = numbers(q)
    total = n[0] * n[1]
    return total - n[2] if "gives away" in q else total % n[2] if "shares" in q else total + n[2]


def again_travel(q):
    n = numbers(q)
    if "drives" in q:
        return n[0] * n[1] + n[2] * n[3]
    total = n[0] * n[1] + n[2] * n[3]
    return Fraction(total, n[1] + n[3]) if "average" in q else total


AGAIN = {
    "product": lambda q: numbers(q)[0] * numbers(q)[1],
    "sum": again_sum,
    "remainder": lambda q: numbers(q)[0] - numbers(q)[0] // numbers(q)[1] * numbers(q)[1],
    "power": again_power,
    "gcd_lcm": again_gcd_lcm,
    "range_sum": again_range_sum,
    "divisors": lambda q: sympy.divisor_count(numbers(q)[0]),
    "primes": lambda q: len(list(sympy.primerange(numbers(q)[0], numbers(q)[1] + 1))),
    "fraction": again_fraction,
    "equation": again_equation,
    "system": again_system,
    "digits": lambda q: sum(int(c) for c in str(numbers(q)[0] ** numbers(q)[1])),
    "shopping": again_shopping,
    "sharing": again_sharing,
    "travel": again_travel,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_computed_again_from_the_wording(family):
    problems = [
        p for p in arithmetic("train", 1500) + arithmetic("test", 300) if p.meta["family"] == family
    ]
    assert len(problems) == 120
    for p in problems:
        assert str(AGAIN[family](p.question)) == p.answer, p


def test_problem_id():
    assert (
        problem_id("What is  2 + 2?\n")
        == problem_id("What is 2 + 2?")
        != problem_id("What is 2 + 3?")
    )
    assert re.fullmatch("[0-9a-f]{12}", problem_id("é"))


# ---------------------------------------------------------------------------------------------------------------
# Loaders

ROWS = [
    {
        "problem": "What is 1 + 1?",
        "answer": "2",
        "level": "Level 1",
        "topic": "Mathematics -> Algebra -> Sums",
    },
    {
        "problem": "What is 2 + 2?",
        "answer": 4,
        "level": "Level 4",
        "topic": "Mathematics -> Number Theory",
    },
    {
        "problem": "What is 3 + 3?",
        "answer": 6.0,
        "level": "Level 5",
        "topic": "Mathematics -> Algebra",
    },
    {"problem": "Half of 1?", "answer": 0.5, "level": "n/a", "topic": "Physics"},
]


def write(path: Path, rows=ROWS) -> str:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        rows = [{**r, "answer": str(r["answer"])} if "answer" in r else r for r in rows]
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as f:
            out = csv.DictWriter(f, list(rows[0]))
            out.writeheader()
            out.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".rows"])
def test_load_every_kind_of_file(tmp_path, suffix):
    problems = load(write(tmp_path / f"rows{suffix}"))
    assert [p.question for p in problems] == [r["problem"] for r in ROWS]
    assert [p.answer for p in problems][:2] == ["2", "4"] and problems[3].answer == "0.5"
    assert problems[2].answer in ("6", "6.0")  # text in .csv and .parquet, a number elsewhere
    assert problems[0].meta == {"level": "Level 1", "topic": "Mathematics -> Algebra -> Sums"}
    assert problems[0].id == problem_id("What is 1 + 1?")


def test_json_with_the_list_under_one_key(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 3, "data": ROWS}))
    assert len(load(str(path))) == 4


def test_byte_order_mark_blank_lines_and_quotes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\ufeff" + json.dumps(ROWS[0]) + "\n\n  \n" + json.dumps(ROWS[1]) + "\n", encoding="utf-8"
    )
    assert len(load(str(path))) == 2
    path = tmp_path / "a.csv"
    path.write_text('\ufeffquestion,answer\n"a, ""b""\nand c?","1,234"\n', encoding="utf-8")
    (p,) = load(str(path))
    assert p.question == 'a, "b"\nand c?' and p.answer == "1,234"


def test_columns_by_name_and_by_flag(tmp_path):
    path = write(
        tmp_path / "a.jsonl", [{"Question": "q?", "Answer": "1", "other": "2", "text": "t?"}]
    )
    assert (load(path)[0].question, load(path)[0].answer) == ("q?", "1")
    p = load(path, question_key="text", answer_key="other")[0]
    assert (p.question, p.answer, p.meta) == ("t?", "2", {"Question": "q?", "Answer": "1"})


def fails(match: str, name, **options):
    with pytest.raises(UserError, match=match) as caught:
        load(str(name), **options)
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_there(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "q?", "answer": "1"}])
    fails("no question column.*columns are: text, answer.*--question-key", path)
    fails("no question column qq", path, question_key="qq")
    fails("no answer column gold.*--answer-key", path, question_key="text", answer_key="gold")
    path = write(tmp_path / "b.csv", [{"problem": "q?", "level": "1"}])
    fails("no answer column", path)
    assert load(path, need_answer=False)[0].answer is None


def test_a_row_without_an_answer_or_a_question(tmp_path):
    for answer in (None, "", "  "):
        path = write(tmp_path / "a.jsonl", [ROWS[0], {"problem": "q?", "answer": answer}])
        fails("row 2 has an empty answer", path)
        assert load(path, need_answer=False)[1].answer is None
    fails(
        "row 1 has an empty question",
        write(tmp_path / "b.jsonl", [{"problem": " ", "answer": "1"}]),
    )
    path = write(tmp_path / "c.jsonl", [ROWS[0], {"answer": "1"}])
    fails("row 2 has no question column", path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json", ".parquet"])
def test_empty_files(tmp_path, suffix):
    path = tmp_path / f"empty{suffix}"
    path.write_text("")
    fails("no rows|cannot be read", path)
    if suffix == ".csv":
        path.write_text("problem,answer\n")
        fails("no rows", path)
    if suffix == ".json":
        path.write_text("[]")
        fails("no rows", path)


def test_broken_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    fails("line 2 is not JSON", path)
    path.write_text("[1, 2]\n")
    fails("row 1 is not an object", path)
    path.write_bytes(b'{"problem": "\xff", "answer": "1"}\n')
    fails("cannot be read", path)
    path = tmp_path / "a.json"
    path.write_text("{")
    fails("cannot be read", path)
    path.write_text('{"a": [], "b": []}')
    fails("one list under one key", path)
    path.write_text("[1]")
    fails("not an object", path)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no such thing")
    fails("cannot be read", path)
    path = tmp_path / "b.csv"
    path.write_text("problem,answer\n" + "x" * 200_000 + ",1\n")
    fails("cannot be read", path)


@pytest.mark.parametrize("text", ["5", '"x"', "null"])
def test_json_that_is_neither_list_nor_object(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    fails("expected a list of rows", path)


def test_a_question_with_half_a_surrogate_pair(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "what is \\ud800?", "answer": "1"}\n')
    try:
        load(str(path))
    except UserError:
        pass


def test_csv_rows_of_the_wrong_length(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("problem,answer\nq1?,1,extra\nq2?,2\n")
    assert [p.answer for p in load(str(path))] == ["1", "2"]
    path.write_text("problem,answer\nq1?\n")
    fails("empty answer", path)


def test_where_on_a_csv_row_with_too_many_cells(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("problem,answer\nq1?,1,extra\n")
    fails("no column", path, where=("level=3",))


def test_where(tmp_path):
    path = write(tmp_path / "a.jsonl")

    def found(*where):
        return [p.question[-7:] for p in load(path, where=where)]

    assert found("level=4-5") == [" 2 + 2?", " 3 + 3?"]
    assert (
        len(found("level=5")) == 1
        and len(found("level=1-5")) == 3
        and len(found("level=Level 1")) == 1
    )
    assert (
        len(found("topic=algebra")) == 2
        and len(found("topic=Mathematics")) == 3
        and len(found("topic=Number Theory")) == 1
    )
    assert len(found("topic=algebra", "level=5")) == 1
    fails("none of 4 rows matches topic=Bio", path, where=("topic=Bio",))
    fails("no column 'colour'; this set has: level, topic", path, where=("colour=red",))
    for bad in ("level", "=4", "level="):
        fails("write it as key=value", path, where=(bad,))


def test_where_with_decimals_and_negative_numbers(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [{"problem": f"q{d}?", "answer": 1, "difficulty": d} for d in (-3, -1, 4.5, 5.0, 9)],
    )
    assert [p.meta["difficulty"] for p in load(path, where=("difficulty=4.5-5",))] == [4.5, 5.0]
    assert [p.meta["difficulty"] for p in load(path, where=("difficulty=-3--1",))] == [-3, -1]
    assert [p.meta["difficulty"] for p in load(path, where=("difficulty=9",))] == [9]


def test_where_an_integer_matches_a_float(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [{"problem": f"q{d}?", "answer": 1, "difficulty": d} for d in (4.5, 5.0)],
    )
    assert [p.meta["difficulty"] for p in load(path, where=("difficulty=5",))] == [5.0]


def test_limit_shuffle_and_duplicates(tmp_path, capsys):
    path = write(
        tmp_path / "a.jsonl", [{"problem": f"q{i % 40}?", "answer": i % 40} for i in range(50)]
    )
    problems = load(path)
    assert len(problems) == 40 and "10 rows repeat" in capsys.readouterr().err
    assert load(path, limit=7) == problems[:7]
    assert load(path, limit=99) == problems
    mixed = load(path, shuffle=3)
    assert mixed != problems and sorted(p.id for p in mixed) == sorted(p.id for p in problems)
    assert load(path, shuffle=3) == mixed and load(path, shuffle=4) != mixed
    assert load(path, shuffle=3, limit=5) == mixed[:5]
    for bad in (0, -1):
        fails("--limit must be at least 1", path, limit=bad)


def test_shuffle_with_seed_zero_and_a_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": f"q{i}?", "answer": i} for i in range(100)])
    assert load(path, shuffle=0, limit=5) == load(path, shuffle=0)[:5]


def test_limit_counts_matching_rows(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert len(load(path, where=("topic=algebra",), limit=2)) == 2


def test_the_built_in_set_by_name():
    assert len(load("arithmetic")) == 200 and load(
        "arithmetic", split="train", limit=5
    ) == arithmetic("train", 5)
    assert len(load("arithmetic", limit=300)) == 300
    hard = load("arithmetic", where=("difficulty=3", "family=power"))
    assert hard and {(p.meta["difficulty"], p.meta["family"]) for p in hard} == {(3, "power")}
    fails("splits train and test", "arithmetic", split="dev")


def test_unknown_names(tmp_path):
    fails("unknown dataset 'nosuch'.*arithmetic.*math500", "nosuch")
    fails("no such file", tmp_path / "missing.jsonl")
    fails("no such file", tmp_path)


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ("42", "42"),
        (" 42 ", "42"),
        (42, "42"),
        (27.0, "27"),
        (0.5, "0.5"),
        (0, "0"),
        (None, None),
        ("", None),
        ("a #### 1,234", "1234"),
        (["$2$", "$3$"], "2, 3"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("1,234", "1,234"),
        ("x ####", None),
    ],
)
def test_clean_answer(value, want):
    assert clean_answer(value) == want


def test_the_last_turn_of_a_chat_is_the_question(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 6 * 7?"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": turns, "answer": "42"}) + "\n")
    assert [p.question for p in load(tmp_path / "a.jsonl")] == ["What is 6 * 7?"]


@pytest.mark.parametrize("listening", [True, False])
def test_a_mirror_of_the_hub_on_another_port(listening):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        code = "import data, os; data.go_offline_without_hub(); print(os.environ.get('HF_HUB_OFFLINE'))"
        environment = {
            k: v
            for k, v in os.environ.items()
            if "proxy" not in k.lower() and k != "HF_HUB_OFFLINE"
        }
        shown = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment | {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}/hub"},
        )
    assert shown.stdout.strip() == ("None" if listening else "1")


def test_forked_workers_that_are_ended_say_nothing():
    code = """if True:
        import multiprocessing, data
        def main():
            with multiprocessing.get_context("fork").Pool(2) as pool:  # leaving it, the workers get SIGTERM
                print(sum(pool.map(abs, [1, -2])))
        data.run_main(main)"""
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "3\n", "")


def test_the_table_of_sources():
    for name, sources in data.SOURCES.items():
        assert name == name.lower() and all(
            "/" in s.hub and s.rows > 0 and s.licence for s in sources
        )
    assert len(data.SOURCES["aime"]) == 2


def test_real_benchmark_files(data_dir):
    """Files of the data folder that look like rows of problems load, or say in one line why not."""
    files = [
        f
        for f in sorted(data_dir.rglob("*"))
        if f.suffix in (".jsonl", ".json", ".csv", ".parquet")
    ]
    if not files:
        pytest.skip("no data files in the folder")
    loaded = 0
    for file in files[:30]:
        try:
            loaded += bool(load(str(file), need_answer=False, limit=20))
        except UserError as error:
            assert "\n" not in str(error)
    assert loaded


# ---------------------------------------------------------------------------------------------------------------
# The command line


def test_command_line():
    shown = python("data.py", "--dataset", "arithmetic", "--show", "2", "--stats")
    assert shown.returncode == 0 and shown.stderr == ""
    assert (
        shown.stdout.count("answer: ") == 2
        and "arithmetic: 200 problems" in shown.stdout
        and "by family:" in shown.stdout
    )


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--dataset", "nosuch"], "unknown dataset"),
        (["--dataset", "no.jsonl"], "no such file"),
        (["--limit", "0"], "--limit"),
        (["--where", "x"], "--where"),
        (["--where", "colour=red"], "no column"),
        (["--limit", "many"], "--limit"),
        (["--nosuch"], "--nosuch"),
        (["--split", "dev"], "splits"),
        (["--dataset", ""], "no such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, match):
    started = time.monotonic()
    shown = python("data.py", *argv)
    assert shown.returncode == 2 and shown.stdout == ""
    assert re.fullmatch(r"data\.py: [^\n]*\n", shown.stderr) and match in shown.stderr, shown.stderr
    assert time.monotonic() - started < 5  # nothing heavy is imported


def test_a_reader_that_leaves_is_no_fault():
    shown = python(
        "-c",
        "import subprocess, sys; p = subprocess.Popen([sys.executable, 'data.py', '--show', '200'], stdout=subprocess.PIPE, "
        "stderr=subprocess.PIPE); p.stdout.read(10); p.stdout.close(); print(p.wait(), p.stderr.read())",
    )
    assert shown.stdout.split(" ", 1) == ["0", "b''\n"], shown


# ---------------------------------------------------------------------------------------------------------------
# Prompts


def solved_examples() -> list[tuple[str, str]]:
    return list(read_few_shot("turns", "turns").examples)


def test_every_output_of_the_examples_is_what_the_sandbox_prints():
    checked = 0
    with Sandbox() as box:
        for _, solution in solved_examples():
            session = box.session()
            for code, shown in re.findall(
                r"<tool_call>\n(.*?)\n</tool_call>\n```output\n(.*?)\n```\n", solution, re.S
            ):
                result = session.run(code)
                assert (result.status, result.output) == ("ok", shown), code
                checked += 1
            session.close()
    assert checked == sum(s.count("</tool_call>") for _, s in solved_examples()) >= 4
    assert all(
        re.search(r"```output\n(.*)\n```\nThe answer is \\boxed\{\1\}\.", s)
        for _, s in solved_examples()
    )


def test_examples_are_not_in_the_built_in_set():
    ids = {problem_id(q) for q, _ in solved_examples()}
    assert len(ids) == 4 and not ids & {
        p.id for p in arithmetic("test", 600) + arithmetic("train", 3000)
    }


def test_few_shot_choices(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("Question: q1\n\ns1\n\n---\n\nQuestion: q2\n\ns2a\n\ns2b\n")
    want = (("q1", "s1"), ("q2", "s2a\n\ns2b"))
    assert read_few_shot(str(mine), "turns") == Prompt("turns", want)
    assert read_few_shot(f"system:{mine}", "turns") == Prompt("system", want)
    assert (
        read_few_shot("none", "turns") == Prompt("none", ())
        and read_few_shot("system", "turns").style == "system"
    )
    assert read_few_shot("turns", "system", agent=False) == Prompt("none", (), False)
    for bad, text in (
        ("missing.txt", None),
        ("bad.txt", "no question\n\nx"),
        ("bad.txt", "Question: alone"),
        ("bad.txt", ""),
    ):
        if text is not None:
            (tmp_path / bad).write_text(text)
        with pytest.raises(UserError):
            read_few_shot(str(tmp_path / bad), "turns")


def test_prompt_templates_for_base_models(tmp_path):
    plain = Prompt("none", (), False)
    assert data.with_template(plain, "chat") == plain
    zero = data.with_template(plain, "r1-zero")
    assert (
        zero.template.count("{question}") == 1
        and zero.template.endswith("Assistant: <think>")
        and "</answer>" in zero.stops
    )
    assert "\\boxed{}" in data.with_template(plain, "qwen-boxed").template
    with pytest.raises(UserError, match="add --no-agent"):
        data.with_template(Prompt("turns", ()), "r1-zero")
    (tmp_path / "mine.txt").write_text("Q: {question}\nA:")
    mine = data.with_template(Prompt("turns", ()), str(tmp_path / "mine.txt"))
    assert mine.template == "Q: {question}\nA:" and mine.stops == data.BASE_STOPS and mine.agent
    for text in ("no place for it", "{question} {question}"):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(UserError, match="exactly once"):
            data.with_template(plain, str(tmp_path / "bad.txt"))
    with pytest.raises(UserError, match="give chat, r1-zero, qwen-boxed"):
        data.with_template(plain, "nowhere")


def test_few_shot_file_that_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"Question: \xff\n\nx")
    with pytest.raises(UserError):
        read_few_shot(str(tmp_path / "a.txt"), "turns")


def test_messages():
    examples = (("q1", "s1"), ("q2", "s2"))
    turns = Prompt("turns", examples).messages("Q")
    assert [m["role"] for m in turns] == ["user", "assistant"] * 2 + ["user"]
    assert (
        turns[1]["content"] == "s1"
        and turns[-1]["content"].startswith("Q")
        and turns[0]["content"][2:] == turns[-1]["content"][1:]
    )
    system, user = Prompt("system", examples).messages("Q")
    assert (
        system["role"] == "system"
        and "Question: q1\n\ns1" in system["content"]
        and user["content"] == "Q"
    )
    system, user = Prompt("none", ()).messages("Q")
    assert "<tool_call>" in system["content"] and "Solved examples" not in system["content"]
    (user,) = Prompt("none", (), agent=False).messages("Q")
    assert (
        "tool_call" not in user["content"]
        and "\\boxed" in user["content"]
        and user["content"].startswith("Q")
    )


class Letters:
    """The smallest tokenizer: one token per character, one added token, no chat template."""

    chat_template, bos_token_id, add_bos_token = None, 1, True
    added_tokens_decoder, all_special_tokens = {2: "<eot>"}, ["<eot>"]

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [
            c
            for part in re.split("(<eot>)", text)
            for c in ([2] if part == "<eot>" else map(ord, part))
        ]


def test_prompt_without_a_chat_template():
    ids = data.render_prompt(Letters(), Prompt("turns", (("q", "s"),)), "Q<eot>")
    assert ids[0] == 1 and 2 not in ids and 1 not in ids[1:]
    text = "".join(map(chr, ids[1:]))
    assert (
        text.startswith("Question: q")
        and "\n\ns\n\nQuestion: Q<eot>" in text
        and text.endswith("\n")
    )


# ---------------------------------------------------------------------------------------------------------------
# The embedded model


def test_embedded_model_is_found_again_without_a_word(capfd):
    folder = data.embedded_model()
    assert (folder / "config.json").is_file() and (
        folder / "model.safetensors"
    ).stat().st_size > 500e6
    capfd.readouterr()
    assert data.embedded_model() == folder and capfd.readouterr() == ("", "")
    assert json.loads((folder / "config.json").read_text()).get("quantization_config") is None


def test_embedded_model_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="make setup"):
        data.embedded_model()


def test_embedded_model_with_nowhere_to_save(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(
        "XDG_CACHE_HOME", str(tmp_path / "file")
    )  # a file: no folder can be made below it
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        data.embedded_model()


@pytest.mark.slow
def test_embedded_model_made_by_two_processes_at_once(tmp_path):
    code = "import data; print(data.embedded_model())"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    shown = {p.communicate(timeout=300)[0].strip() for p in both}
    assert [p.returncode for p in both] == [0, 0] and len(shown) == 1
    (folder,) = (tmp_path / "deepmath").iterdir()  # one checkpoint and nothing half-made beside it
    assert str(folder) in shown
    from safetensors import safe_open

    with (
        safe_open(folder / "model.safetensors", "pt") as new,
        safe_open(data.embedded_model() / "model.safetensors", "pt") as old,
    ):
        assert set(new.keys()) == set(old.keys())
        for name in list(new.keys())[:20]:
            assert (new.get_tensor(name) == old.get_tensor(name)).all()


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_checkpoint(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    first = subprocess.Popen(
        [sys.executable, "-c", "import data; data.embedded_model()"], cwd=ROOT, env=env
    )
    deadline = time.monotonic() + 120
    while (
        not list(tmp_path.glob("deepmath/model-*/*"))
        and first.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    first.kill()
    first.wait()
    shown = python("-c", "import data; print(data.embedded_model())", env=env, timeout=300)
    assert shown.returncode == 0 and (Path(shown.stdout.strip()) / "config.json").is_file()


def test_problem_record():
    p = Problem("id", "q", None)
    assert p.meta == {} and Problem("id", "q", None).meta is not p.meta
