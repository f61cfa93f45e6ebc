"""What is written about the code: examples run, commands have flags that exist, counts are real."""

import doctest
import re
import shlex
from pathlib import Path

import pytest
from test_faults import SCRIPTS, outcome

import agent
import data
import evaluate
import grade
import grpo

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("module", [data, agent, grade, evaluate, grpo], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    failed, _ = doctest.testmod(module)
    assert not failed


def commands() -> list[str]:
    texts = [(ROOT / "README.md").read_text()]
    texts += [(ROOT / name).read_text().split('"""')[1] for name in SCRIPTS]
    pattern = r"(?:python|torchrun)\b[^\n#`|&]*\.py\b[^\n#`|>&]*"
    return sorted({m[0].strip() for text in texts for m in re.finditer(pattern, text)})


@pytest.mark.parametrize("command", commands())
def test_flags_of_written_commands_exist(command, tmp_path, monkeypatch):
    words = shlex.split(command) if command.count('"') % 2 == 0 else command.split()
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[at]).is_file(), command
    if words[at] in SCRIPTS and words[at] != "sandbox.py":
        monkeypatch.chdir(tmp_path)
        said = outcome(words[at], words[at + 1 :])[1]
        assert not re.search("Unrecognized|invalid choice|Missing", said), (command, said)


def test_line_counts_in_the_reading_order_are_real():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert {name for name, _ in rows} == {path.name for path in ROOT.glob("*.py")}
    for name, count in rows:
        real = len((ROOT / name).read_text().splitlines())
        assert abs(real - int(count)) <= 10, (name, real)


def test_files_that_are_named_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"\]\(([\w/.-]+)\)", text):
        assert (ROOT / name).exists(), name
