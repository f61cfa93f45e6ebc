"""What the first use waits for: `--help`, and the first token of `python agent.py "..."`.

    python bench/startup.py

Seconds since the command, median of five runs in turn. Beside them is what no program of this kind
can do without: Python itself, and the import of vLLM. Files are in the page cache (a run before the
measured ones is thrown away) and the embedded model has been unpacked.
"""

import statistics
import subprocess
import sys
import time

from common import ROOT, machine, print_head, print_row  # first

from cli import UserError, run_main

SCRIPTS = "data.py sandbox.py grade.py agent.py evaluate.py grpo.py".split()
RUNS = 5


def once(command: list) -> float:
    """Seconds until a command's first character on standard output."""
    command = [sys.executable, "-u", *command]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        first = time.perf_counter() - started
        process.communicate()
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed")
    return first


def main() -> None:
    print(machine())
    helps = {f"{script} --help": [script, "--help"] for script in SCRIPTS}
    answer = ["agent.py", "--seed", "0", "What is 48721 times 9637?"]
    imports = ["-c", "from vllm import LLMEngine; print(1)"]
    without_model = {"python -c": ["-c", "print(1)"], **helps}
    with_model = {"import of vLLM": imports, 'agent.py "..."': answer}
    for commands in (without_model, with_model):
        for command in commands.values():
            once(command)
        runs = [{name: once(command) for name, command in commands.items()} for _ in range(RUNS)]
        print_head("", "first output, s", "times the first row")
        medians = [statistics.median(run[name] for run in runs) for name in commands]
        for name, seconds in zip(commands, medians):
            print_row(f"`{name}`", seconds, seconds / medians[0])
        print()


if __name__ == "__main__":
    run_main(main)
