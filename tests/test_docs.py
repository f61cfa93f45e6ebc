"""What is written about the code: the examples in the docstrings run, and the commands of the README, the docstrings and the
Makefile have flags that exist."""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_faults import outcome

import agent
import data
import evaluate
import grpo

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("data.py", "sandbox.py", "agent.py", "evaluate.py", "grpo.py")


@pytest.mark.parametrize("module", [data, agent, evaluate, grpo], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def refuse(*_):
    raise data.UserError("no hub in this test")


def commands() -> list[str]:
    texts = [
        (ROOT / "README.md").read_text(),
        (ROOT / "Makefile").read_text().replace("$(PY)", "python").replace("\\\n", " "),
    ]
    while "$(" in texts[1]:  # a variable or a function of make: any word
        texts[1] = re.sub(r"\$\((\w+ )?[^()]*\)", lambda m: "" if m[1] else "x", texts[1])
    texts += [
        path.read_text().split('"""')[1]
        for path in [*(ROOT / s for s in SCRIPTS), *sorted((ROOT / "extras").glob("*.py"))]
    ]
    found = [
        m[0]
        for text in texts
        for m in re.finditer(r"(?:python|torchrun)\b[^\n#`|&]*\.py\b[^\n#`|>&]*", text)
    ]
    return sorted({c.strip() for c in found})


@pytest.mark.parametrize("command", commands())
def test_flags_of_written_commands_exist(command, tmp_path, monkeypatch):
    words = (
        shlex.split(re.sub(r'(?<= )-c "', '"', command))
        if command.count('"') % 2 == 0
        else command.split()
    )
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[at], words[at + 1 :]
    if words[0] == "torchrun":
        assert not any(
            word.startswith("--n") and word not in ("--nproc-per-node", "--nnodes")
            for word in words[:at]
        )
    assert (ROOT / script).is_file(), command
    if script in SCRIPTS and script != "sandbox.py":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(data, "_hub_rows", refuse)
        monkeypatch.setattr(grpo, "resolve_model", refuse)
        monkeypatch.setattr(evaluate, "ablation", refuse)
        said = outcome(script, flags)[1]
    else:  # the help text names every flag of the tool
        text = subprocess.run(
            [sys.executable, str(ROOT / script), "--help"],
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        said = "".join(
            f"unrecognized {flag}" for flag in flags if flag.startswith("--") and flag not in text
        )
    assert not re.search("unrecognized|invalid|expected|ambiguous", said), (command, said)


def test_commands_are_found():
    assert len(commands()) > 30 and any(c.startswith("torchrun") for c in commands())
