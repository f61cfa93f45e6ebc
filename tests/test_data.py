"""Where problems come from, and how a question becomes tokens."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unicodedata import normalize

import pytest
from fakes import bpe
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from cli import AgentFlags, DataFlags, UserError
from data import SPLIT, clean_answer, disarm, encode, load_problems, read_prompt, render_prompt

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    {"problem": "1 + 1?", "answer": "2", "level": "Level 1", "topic": "Math -> Algebra -> Sums"},
    {"problem": "2 + 2?", "answer": "4", "level": "Level 2", "topic": "Math -> Geometry"},
    {"problem": "3 + 3?", "answer": "6", "level": "Level 5", "topic": "Math -> Algebra"},
    {"problem": " 1 + 1? ", "answer": "2", "level": "Level 5", "topic": "Math"},
]


def load(**flags):
    return load_problems(DataFlags(**flags))


def python(*argv, **options):
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def questions(**flags):
    return [problem.question for problem in load(**flags)]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


# ---- Files and the built-in set
def test_every_kind_of_file_gives_the_same_problems(tmp_path, rows):
    import pandas

    table = pandas.DataFrame(ROWS)
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    expected = [(p.id, p.question, p.answer) for p in load(dataset=rows)]
    assert [question for _, question, _ in expected] == ["1 + 1?", "2 + 2?", "3 + 3?"]  # once each
    for kind in ("csv", "parquet", "json"):
        found = load(dataset=str(tmp_path / f"rows.{kind}"))
        assert [(p.id, p.question, p.answer) for p in found] == expected, kind


def test_where_and_limit(rows):
    assert questions(dataset=rows, where=("level=5",)) == ["3 + 3?", "1 + 1?"]
    assert questions(dataset=rows, where=("level=2-5",)) == ["2 + 2?", "3 + 3?", "1 + 1?"]
    assert questions(dataset=rows, where=("topic=algebra",)) == ["1 + 1?", "3 + 3?"]
    assert questions(dataset=rows, where=("topic=Algebra", "level=5")) == ["3 + 3?"]
    assert questions(dataset=rows, limit=2) == ["1 + 1?", "2 + 2?"]
    assert data.matches({"id": "aime-2024"}, "id=2024")


def test_a_file_needs_no_cache_no_network_and_no_heavy_library(rows):
    code = (
        "import sys; from cli import DataFlags; from data import load_problems\n"
        f"print(len(load_problems(DataFlags(dataset={rows!r}))), len(load_problems(DataFlags())),"
        " {'datasets', 'torch'} & set(sys.modules))"
    )
    nowhere = {"HOME": "/dev/null/x", "HF_HOME": "/dev/null/y", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = python("-c", code, env={**os.environ, **nowhere})
    assert (done.stdout, done.stderr) == ("3 200 set()\n", "")


def test_answers_and_questions_as_they_are_written(tmp_path):
    path = tmp_path / "a[1] *.jsonl"
    path.write_text(
        '\ufeff{"problem": "a\u2028", "answer": 1180591620717411303424}\n'
        '{"problem": "\\ud800", "answer": "1/2", "level": 3}'
    )
    found = [(p.question, p.answer) for p in load(dataset=str(path))]
    assert found == [("a", "1180591620717411303424"), ("?", "1/2")]
    assert questions(dataset=str(path), where=("level=3",)) == ["?"]  # a row may lack a column


def test_columns_by_name_and_dates(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"x": "5 + 5?", "y": 10, "day": "2025-02-03"}) + "\n")
    (problem,) = load(dataset=str(path), question_key="x", answer_key="y")
    assert (problem.question, problem.answer) == ("5 + 5?", "10")
    assert problem.meta == {"day": "2025-02-03"}
    with pytest.raises(UserError, match="among x, y, day"):
        load(dataset=str(path), answer_key="y")


ANSWERS = [("pays 7 * 176. #### 1,232", "1232"), (["$2$", "3"], "2, 3"), (27.0, "27"), (" ", None)]


@pytest.mark.parametrize(("value", "answer"), ANSWERS)
def test_gold_answers(value, answer):
    assert clean_answer(value) == answer


FILES = [  # more of them: test_faults.py
    ("rows.jsonl", "", "no rows"),
    ("rows.jsonl", '{"problem": "1?", "answer": "1"}\n{"probl', "cannot be read"),
    ("rows.jsonl", '{"x": 1}\n', "--question-key"),
    ("rows.jsonl", '{"problem": "x", "answer": " "}\n', "no answer"),
    ("rows.csv", "problem,answer\n1?,1\n2?,1,2\n", "not one value for each name"),
    ("rows.txt", "x", "unknown dataset"),
]


@pytest.mark.parametrize(("name", "text", "match"), FILES)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, name, text, match, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(UserError, match=match) as caught:
        load(dataset=name if name.endswith("txt") else f"./{name}")
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_one_line(rows):
    for flags, match in (
        ({"dataset": "arithmetic.jsonl"}, "No such file"),  # a file, not the built-in set
        ({"dataset": rows, "limit": 0}, "--limit"),
        ({"dataset": rows, "where": ("level",)}, "--where level: write it as"),
        ({"dataset": rows, "where": ("nosuch=1",)}, "columns: problem, answer, level, topic"),
        ({"dataset": "arithmetic", "split": "nosuch"}, "no rows"),
    ):
        with pytest.raises(UserError, match=match) as caught:
            load(**flags)
        assert "\n" not in str(caught.value)


def test_no_network_is_one_line(monkeypatch, tmp_path):
    code = "from cli import *; from data import *; load_problems(DataFlags(dataset='math500'))"
    there = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=there, capture_output=True)
    assert b"UserError: HuggingFaceH4/MATH-500 cannot be read" in done.stderr


# ---- The built-in set
def test_the_built_in_set_is_what_its_generator_makes(tmp_path):
    done = python("extras/make_arithmetic.py", tmp_path / "made.jsonl")
    assert done.returncode == 0, done.stderr
    file = ROOT / "problems" / "arithmetic.jsonl"
    assert (tmp_path / "made.jsonl").read_bytes() == file.read_bytes()
    test, train = load(dataset="arithmetic"), load(dataset="arithmetic", split="train")
    assert (len(test), len(train)) == (200, 2000) and test[0].answer == "935"
    assert not {p.id for p in test} & {p.id for p in train}
    assert [p.id for p in load(dataset=str(file), split="test")] == [p.id for p in test]


# ---- Prompts
@pytest.fixture(scope="module")
def tok():
    return bpe(tags=True)


def test_our_prompts(tok):
    turns = read_prompt(AgentFlags(model="embedded"))
    roles = [message["role"] for message in turns.messages]
    assert roles == ["user", "assistant"] * 5 + ["user"]
    assert "<tool_call>" in turns.messages[1]["content"]
    system = read_prompt(AgentFlags(model="x/y"))
    assert [m["role"] for m in system.messages] == ["system", "user"]
    assert "Solved examples" in system.messages[0]["content"]
    bare = read_prompt(AgentFlags(model="x/y", few_shot="none"))
    assert "Solved examples" not in bare.messages[0]["content"]
    plain = read_prompt(AgentFlags(agent=False))
    assert "\\boxed{}" in plain.messages[-1]["content"]
    text = tok.decode(render_prompt(tok, plain, "What is 1 {x}?"))
    assert "What is 1 {x}?" in text and text.endswith("<|im_start|>assistant\n")


def test_a_base_model_gets_questions_and_solutions_as_text():
    base = bpe(tags=False)
    base.chat_template = None
    turns = read_prompt(AgentFlags(model="embedded"))
    text = base.decode(render_prompt(base, turns, "1 + 1?"))
    assert text.startswith("Question: A theatre has") and text.count("\n\nQuestion: ") == 5
    assert text.endswith("Question: 1 + 1?\nUse Python to compute the answer.\n\n")


def test_few_shot_choices(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("Question: q1\n\ns1\n\n---\n\nQuestion: q2\n\ns2a\n\ns2b\n")
    turns = read_prompt(AgentFlags(model="x/y", few_shot=f"turns:{mine}"))
    assert [m["content"] for m in turns.messages[1::2]] == ["s1", "s2a\n\ns2b"]
    cue = turns.messages[-1]["content"].replace("{question}", "")
    assert turns.messages[0]["content"] == "q1" + cue and "Python" in cue
    system = read_prompt(AgentFlags(model="x/y", few_shot=str(mine)))
    assert "Question: q1\n\ns1\n\n---" in system.messages[0]["content"]
    for text in ("no question\n\nx", "Question: alone", ""):
        mine.write_text(text)
        with pytest.raises(UserError, match="mine.txt: an example"):
            read_prompt(AgentFlags(model="embedded", few_shot=str(mine)))


def test_the_examples_are_right_and_not_in_the_built_in_set(capsys):
    *messages, _ = read_prompt(AgentFlags(model="embedded")).messages
    known = {p.id for split in ("train", "test") for p in load(split=split)}
    asked = {data.problem_id(m["content"].split("\nUse Python")[0]) for m in messages[::2]}
    assert len(asked) == 5 and not known & asked
    form = r".*<tool_call>\n(.*)\n</tool_call>\n```output\n(.*)\n```\nThe answer is \\boxed{\2}."
    for message in messages[1::2]:
        code, shown = re.fullmatch(form, message["content"], re.S).groups()
        exec(code, {})
        assert code.startswith("from sympy import *\n") and capsys.readouterr().out == shown + "\n"


@pytest.mark.parametrize("name", ["r1-zero", "orz", "simplerl", "qwen-boxed", "r1-distill"])
def test_the_literatures_prompts(tok, name):
    prompt = read_prompt(AgentFlags(agent=False, prompt=name))
    assert "1 + 1?" in tok.decode(render_prompt(tok, prompt, "1 + 1?"))
    assert json.loads((ROOT / "prompts" / f"{name}.json").read_text())["source"]
    with pytest.raises(UserError, match="--no-agent"):
        read_prompt(AgentFlags(prompt=name))


def test_prompts_from_files(tok, tmp_path):
    text = tmp_path / "p.txt"
    text.write_text("Q: {question}\nA:")
    prompt = read_prompt(AgentFlags(agent=False, prompt=str(text)))
    assert tok.decode(render_prompt(tok, prompt, "1?")) == "Q: 1?\nA:" and prompt.stops
    chat = tmp_path / "p.json"
    messages = [{"role": "user", "content": "{question} <tool_call> helps"}]
    chat.write_text(json.dumps({"messages": messages}))
    assert read_prompt(AgentFlags(prompt=str(chat))).messages[0]["role"] == "user"
    unasked = '{"messages": [{"role": "user", "content": "x"}]}'
    for wrong in ("{", "[]", unasked, '{"messages": 3}', '{"text": "{question}", "stop": []}'):
        chat.write_text(wrong)
        with pytest.raises(UserError, match="--prompt"):
            read_prompt(AgentFlags(prompt=str(chat)))
    with pytest.raises(UserError, match="see those in prompts/"):
        read_prompt(AgentFlags(prompt="nowhere"))


NAMES = ["<|im_end|>", "<tool_call>", "</tool_call>", "<", "<|", SPLIT, "|>", "é", "\n"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(deadline=None, max_examples=200)
@given(parts=st.lists(st.sampled_from(NAMES) | TEXT, max_size=12))
def test_disarmed_text_keeps_its_words_and_controls_nothing(tok, parts):
    text = "".join(parts)
    ids = encode(tok, disarm(tok, text))
    assert not set(ids) & set(tok.added_tokens_decoder)
    kept = text.replace(SPLIT, "")
    assert normalize("NFC", tok.decode(ids)) == normalize("NFC", kept)


def test_the_command(rows):
    done = python("data.py", "--dataset", rows, "--show", "1")
    assert "answer: 2" in done.stdout and "3 problems" in done.stdout
    assert "deepmath-103k" in python("data.py", "--list").stdout
    done = python("data.py", "--dataset", "nosuch")
    assert done.returncode == 2 and done.stderr.startswith("data.py: unknown dataset 'nosuch'")
