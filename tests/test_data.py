"""Where problems come from, and how a question becomes tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
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


def test_where_limit_and_shuffle(rows):
    assert questions(dataset=rows, where=("level=5",)) == ["3 + 3?", "1 + 1?"]
    assert questions(dataset=rows, where=("level=2-5",)) == ["2 + 2?", "3 + 3?", "1 + 1?"]
    assert questions(dataset=rows, where=("topic=algebra",)) == ["1 + 1?", "3 + 3?"]
    assert questions(dataset=rows, where=("topic=Algebra", "level=5")) == ["3 + 3?"]
    assert questions(dataset=rows, limit=2) == ["1 + 1?", "2 + 2?"]
    shuffled = questions(dataset=rows, shuffle=1)
    assert sorted(shuffled) == questions(dataset=rows) and shuffled == questions(
        dataset=rows, shuffle=1
    )
    assert questions(dataset=rows, shuffle=1, limit=2) == shuffled[:2]


def test_a_file_that_changed_is_read_anew_and_needs_no_cache(rows, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", "/nosuch/place")
    assert len(load(dataset=rows)) == 3
    with open(rows, "a") as file:
        file.write('{"problem": "4 + 4?", "answer": "8"}\n')
    assert len(load(dataset=rows)) == 4


def test_columns_by_name_and_chats(tmp_path):
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "hm"}, {"role": "user", "content": "5 + 5?"}]
    path.write_text(json.dumps({"x": chat, "y": 10}) + "\n")
    (problem,) = load(dataset=str(path), question_key="x", answer_key="y")
    assert (problem.question, problem.answer) == ("5 + 5?", "10")


ANSWERS = [
    ("She pays 7 * 176. #### 1,232", "1232"),
    (["$2$", "3"], "2, 3"),
    (27.0, "27"),
    (" ", None),
    (None, None),
    ("\\frac{1}{2}", "\\frac{1}{2}"),
]


@pytest.mark.parametrize(("value", "answer"), ANSWERS)
def test_gold_answers(value, answer):
    assert clean_answer(value) == answer


FILES = [
    ("rows.jsonl", "", "no rows"),
    ("rows.jsonl", "{", "cannot be read"),
    ("rows.jsonl", "null\n", "cannot be read"),
    ("rows.jsonl", '{"x": 1}\n', "--question-key"),
    ("rows.jsonl", '{"problem": "1 + 1?"}\n', "--answer-key"),
    ("rows.jsonl", '{"problem": "", "answer": "1"}\n', "empty question"),
    ("rows.jsonl", '{"problem": "x", "answer": " "}\n', "empty answer"),
    ("rows.json", "{}", "rows.json"),
    ("rows.csv", "", "cannot be read"),
    ("rows.parquet", "not parquet", "cannot be read"),
    ("rows.txt", "x", "unknown dataset"),
]


@pytest.mark.parametrize(("name", "text", "match"), FILES)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, name, text, match, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(UserError, match=match) as caught:
        load(dataset=name if name.endswith("txt") else f"./{name}")
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_one_line(rows, tmp_path):
    for flags, match in (
        ({"dataset": str(tmp_path / "missing.jsonl")}, "No such file"),
        ({"dataset": "nosuch"}, "unknown dataset"),
        ({"dataset": rows, "limit": 0}, "--limit"),
        ({"dataset": rows, "where": ("level",)}, "--where"),
        ({"dataset": rows, "where": ("nosuch=1",)}, "no column"),
        ({"dataset": rows, "where": ("level=9",)}, "no rows"),
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


def test_the_built_in_set():
    test, train = load(dataset="arithmetic"), load(dataset="arithmetic", split="train")
    assert (len(test), len(train)) == (200, 2000)
    assert not {p.id for p in test} & {p.id for p in train}
    assert test[0].question == "Calculate 11 * 85." and test[0].answer == "935"
    for problem in train[:30]:  # the solutions print their answers
        code = problem.meta["solution"].split("<tool_call>\n")[1].split("\n</tool_call>")[0]
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == problem.answer


def test_the_generator_makes_the_file(tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("make", ROOT / "extras" / "make_arithmetic.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    lines = (ROOT / "problems" / "arithmetic.jsonl").read_text().splitlines()
    assert [json.dumps(row) for row in make.rows()] == lines


# ---- Prompts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tok():
    from fakes import bpe

    return bpe(tags=True)


def test_our_prompts(tok):
    turns = read_prompt(AgentFlags(model="embedded"))
    assert turns.agent and [m["role"] for m in turns.messages] == ["user", "assistant"] * 4 + [
        "user"
    ]
    assert "<tool_call>" in turns.messages[1]["content"]
    system = read_prompt(AgentFlags(model="x/y"))
    assert [m["role"] for m in system.messages] == ["system", "user"]
    assert "Solved examples" in system.messages[0]["content"]
    bare = read_prompt(AgentFlags(model="x/y", few_shot="none"))
    assert "Solved examples" not in bare.messages[0]["content"]
    plain = read_prompt(AgentFlags(agent=False))
    assert not plain.agent and "\\boxed{}" in plain.messages[-1]["content"]
    text = tok.decode(render_prompt(tok, plain, "What is 1 {x}?"))
    assert "What is 1 {x}?" in text and text.endswith("<|im_start|>assistant\n")


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
    chat.write_text(json.dumps([{"role": "user", "content": "{question} <tool_call> helps"}]))
    assert read_prompt(AgentFlags(prompt=str(chat))).messages[0]["role"] == "user"
    for wrong in ("{", "[]", '[{"role": "user", "content": "x"}]', '{"messages": 3}'):
        chat.write_text(wrong)
        with pytest.raises(UserError, match="--prompt"):
            read_prompt(AgentFlags(prompt=str(chat)))


FRAGMENT = st.one_of(
    st.sampled_from(
        ["<|im_end|>", "<tool_call>", "</tool_call>", "<", "<|", SPLIT, "|>", "é", "\n"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)


@settings(deadline=None, max_examples=200)
@given(parts=st.lists(FRAGMENT, max_size=12))
def test_disarmed_text_keeps_its_words_and_controls_nothing(tok, parts):
    import unicodedata

    text = "".join(parts)
    ids = encode(tok, disarm(tok, text))
    assert not set(ids) & set(tok.added_tokens_decoder)
    kept = unicodedata.normalize("NFC", text.replace(SPLIT, ""))
    assert unicodedata.normalize("NFC", tok.decode(ids)) == kept


def test_the_command(rows):
    command = [sys.executable, "data.py", "--dataset", rows, "--show", "1", "--stats"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "answer: 2" in done.stdout and "3 problems" in done.stdout
    listed = subprocess.run([sys.executable, "data.py", "--list"], cwd=ROOT, capture_output=True)
    assert b"deepmath-103k" in listed.stdout and data.SETS["aime"]
