"""What a snippet costs: our sandbox beside the usual ways, in one run, on one machine.

exec            in this process: the floor, no protection at all
ours            a session that is warm, and the first snippet of a new session
python -c       a new process for every snippet (isolation of files, memory and time: none)
smolagents      its interpreter in a `multiprocessing.Process` for every snippet, as published

python bench/sandbox.py
"""

import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import wait
from functools import partial

from common import alone, machine, number, print_head, print_row  # first

from cli import run_main
from sandbox import Sandbox

SNIPPETS = {
    "1 + 1": "print(1 + 1)",
    "loop": "s = 0\nfor i in range(200_000):\n    s += i * i % 7\nprint(s)",
    "solve": "import sympy as s\nx = s.symbols('x')\nprint(s.solve(x**3 - 6*x**2 + 11*x - 6, x))",
    "eig": "import numpy as np\n"
    "print(np.linalg.eigvals(np.arange(400.0).reshape(20, 20) % 7).real.max())",
}


def times(function, n: int) -> list[list[float]]:
    """Of each snippet the sorted seconds of n calls function(code)."""
    columns = []
    for code in SNIPPETS.values():
        column = []
        for _ in range(n):
            started = time.perf_counter()
            function(code)
            column.append(time.perf_counter() - started)
        columns.append(sorted(column))
    return columns


def in_process(code: str) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def new_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


def interpret(code: str, connection) -> None:
    from smolagents.local_python_executor import LocalPythonExecutor

    executor = LocalPythonExecutor(["sympy", "sympy.*", "numpy", "numpy.*", "math"])
    executor.send_tools({})
    connection.send(executor(code).logs)


def published(code: str) -> None:
    receiver, sender = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=interpret, args=(code, sender))
    process.start()
    sender.close()  # so that a process that fails ends in EOFError, not in a wait for ever
    receiver.recv()
    process.join()


def times_of_published(n: int) -> list[list[float]]:
    import smolagents.local_python_executor  # noqa: F401  once, as in a long-running program

    return times(published, n)


def run(session, code: str) -> None:
    result = session.run(code)
    assert result.status == "ok", result


def first(box, code: str) -> None:
    session = box.session()
    run(session, code)
    session.close()


def throughput(sessions: int) -> float:
    """Snippets per second in that many open sessions, all of which ask at once."""
    with Sandbox() as box:
        group = [box.session() for _ in range(sessions)]
        for session in group:
            session.run("1")
        started = time.perf_counter()
        rounds = max(1, 3000 // sessions)
        for _ in range(rounds):
            wait([session.submit("1 + 1") for session in group])
        return rounds * sessions / (time.perf_counter() - started)


def main() -> None:
    theirs = alone(times_of_published, 5)
    with Sandbox() as box:
        box.wait_ready()
        new = times(partial(first, box), 50)
        warm = times(partial(run, box.session()), 200)
    in_process(SNIPPETS["solve"] + "\n" + SNIPPETS["eig"])  # imports
    rows = {
        "exec in this process": times(in_process, 50),
        "ours, warm session": warm,
        "ours, first snippet of a session": new,
        "`python -c`": times(new_python, 5),
        "smolagents, a process each": theirs,
    }
    print(machine())
    print_head("milliseconds: median / 99th percentile", *SNIPPETS, "the four", "their time / ours")
    total = sum(map(statistics.median, warm))
    for name, columns in rows.items():
        medians = [1e3 * statistics.median(column) for column in columns]
        tails = [1e3 * column[len(column) * 99 // 100] for column in columns]
        cells = [f"{number(a)} / {number(b)}" for a, b in zip(medians, tails)]
        print_row(name, *cells, sum(medians), sum(medians) / 1e3 / total)
    print()
    print_head("open sessions", "snippets per second, `1 + 1`")
    for sessions in (1, 100, 1000):
        print_row(sessions, throughput(sessions))


if __name__ == "__main__":
    run_main(main)
