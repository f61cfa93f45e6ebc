"""What the first use waits for: `--help`, and the first token of `python agent.py "..."`.

    python bench/startup.py [--runs 5]

Seconds since the command, median of some runs in turn. Beside them is what no program of this kind
can do without: Python itself, and the import of vLLM. Files are in the page cache (a run before the
measured ones is thrown away) and the embedded model has been unpacked.
"""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from common import ROOT, machine, print_head, print_row  # first

from cli import UserError, parse, run_main

SCRIPTS = "data.py", "sandbox.py", "grade.py", "agent.py", "evaluate.py", "grpo.py"
FIRST_TOKEN = ["agent.py", "--seed", "0", "What is 48721 times 9637?"]
IMPORT = ["-c", "from vllm import LLMEngine; print(1)"]


@dataclass(kw_only=True)
class Flags:
    """Seconds from a command to what it shows first."""

    runs: int = 5
    """Of each command."""


def once(command: list[str]) -> tuple[float, float]:
    """Seconds until a command's first character on standard output, and until its end."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, **options) as process:
        process.stdout.read(1)
        first = time.perf_counter() - started
        _, errors = process.communicate()
        ended = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed: {errors[-300:]}")
    return first, ended


def main() -> None:
    flags = parse(Flags)
    print(machine())
    python = ["-c", "print(1)"]
    helps = {f"{script} --help": [script, "--help"] for script in SCRIPTS}
    tables = [
        {"python -c": python, **helps},
        {"import of vLLM": IMPORT, 'agent.py "..."': FIRST_TOKEN},
    ]
    for commands in tables:
        for command in commands.values():
            once(command)
        runs = [
            {name: once(command) for name, command in commands.items()} for _ in range(flags.runs)
        ]
        print_head("", "first output, s", "end, s", "first output beside the first row")
        base = None
        for name in commands:
            first, ended = (statistics.median(run[name][i] for run in runs) for i in (0, 1))
            base = base or first
            print_row(f"`{name}`", f"{first:.2f}", f"{ended:.2f}", f"{first / base:.1f} x")
        print()


if __name__ == "__main__":
    run_main(main)
