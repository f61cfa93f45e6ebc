"""What is written about the code is true; and the rule of tests/conftest.py."""

import doctest
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

pytest_plugins = "pytester"
ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(file.stem for file in ROOT.glob("*.py"))
WRITTEN = ("*.md", "bench/*.md", "Makefile", "*.py", "extras/*.py", "bench/*.py")


def prose(file: Path) -> str:  # of a script its docstring
    text = file.read_text().replace("$(PY)", "python").replace("\\\n", " ")
    return text.split('"""')[1] if file.suffix == ".py" else text


PAGES = {file: prose(file) for pattern in WRITTEN for file in sorted(ROOT.glob(pattern))}
COMMAND = re.compile(r"(?:python|torchrun)\b[^\n#`|&]*?((?:\w+/)?\w+\.py)\b([^\n#`|>&]*)")
COMMANDS = sorted({found.groups() for text in PAGES.values() for found in COMMAND.finditer(text)})


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    assert not doctest.testmod(__import__(name)).failed


@lru_cache
def help_of(script: str) -> str:
    env = os.environ | {"COLUMNS": "100"}  # a narrow terminal breaks the names of flags
    command = [sys.executable, script, "--help"]
    return subprocess.check_output(command, cwd=ROOT, env=env, text=True)


@pytest.mark.parametrize("script, rest", COMMANDS, ids=str)
def test_flags_of_written_commands_exist(script, rest):
    flags = re.findall(r"(?<!\S)--[a-z][\w-]*", rest)
    assert set(flags) <= set(re.findall(r"--[a-z][\w-]*", help_of(script) if flags else ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_exist(page):
    for name in re.findall(r"(?<![\w/.)-])[\w./-]+\.(?:py|md)\b", PAGES[page]):
        places = [ROOT, page.parent, ROOT / "bench", ROOT / "extras", ROOT / "tests"]
        assert any((place / name).exists() for place in places), name


def test_line_counts_of_the_reading_order():
    written = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", PAGES[ROOT / "README.md"], re.M))
    assert written.keys() == {f"{name}.py" for name in MODULES}
    for name, count in written.items():
        assert abs(int(count) / len((ROOT / name).read_text().splitlines()) - 1) < 0.05, name


def test_a_skipped_engine_test_fails_ci(pytester, monkeypatch):
    monkeypatch.setenv("DEEPMATH_CI", "1")
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    one = "import pytest\n@pytest.mark.engine\ndef test(): pytest.skip('why')"
    pytester.makepyfile(test_one=one, test_all="import pytest\npytest.importorskip('nowhere')")
    done = pytester.runpytest_subprocess("--continue-on-collection-errors")
    done.assert_outcomes(failed=1, errors=1)
