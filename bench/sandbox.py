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
import platform
import statistics
import subprocess
import sys
import time

from common import alone, machine, print_head, print_row  # first

from cli import run_main
from sandbox import Sandbox

SNIPPETS = {
    "1 + 1": "print(1 + 1)",
    "loop": "s = 0\nfor i in range(200_000):\n    s += i * i % 7\nprint(s)",
    "solve": "import sympy\nx = sympy.symbols('x')\nprint(sympy.solve(x**3 - 6*x**2 + 11*x - 6, x))",
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
    command = [sys.executable, "-c", code]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def interpret(code: str, connection) -> None:
    from smolagents.local_python_executor import LocalPythonExecutor

    executor = LocalPythonExecutor(["sympy", "sympy.*", "numpy", "numpy.*", "math"])
    executor.send_tools({})
    executor.state["print"] = print
    connection.send(str(executor(code).logs))


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


def times_of_ours(warm: int, new: int) -> tuple[list, list]:
    with Sandbox() as box:
        box.wait_ready()
        session = box.session()

        def run(code: str, session=session) -> None:
            result = session.run(code)
            assert result.status == "ok", result

        def first(code: str) -> None:
            session = box.session()
            run(code, session)
            session.close()

        run("1")
        return times(run, warm), times(first, new)


def throughput(sessions: int, snippets: int) -> tuple[float, float]:
    """Snippets per second with that many sessions, all asking at once: their first ones, later ones"""
    rates = []
    with Sandbox() as box:
        box.wait_ready()
        group = [box.session() for _ in range(sessions)]
        for rounds in (1, max(1, snippets // sessions)):
            left, done = dict.fromkeys(group, rounds), 0
            started = time.perf_counter()
            for session in group:
                session.submit("1 + 1")
            while done < rounds * sessions:
                for session, result in box.poll(10):
                    assert result.status == "ok", result
                    done += 1
                    left[session] -= 1
                    if left[session]:
                        session.submit("1 + 1")
            rates.append(done / (time.perf_counter() - started))
    return rates[0], rates[1]


def main() -> None:
    theirs = alone(times_of_published, 5)
    warm, first = times_of_ours(200, 50)
    in_process(SNIPPETS["solve"] + "\n" + SNIPPETS["eig"])  # imports
    rows = {
        "exec in this process": times(in_process, 50),
        "ours, warm session": warm,
        "ours, first snippet of a session": first,
        "`python -c`": times(new_python, 5),
        "smolagents, a process each": theirs,
    }
    print(machine())
    print(f"Linux {platform.release()}, Python {platform.python_version()}\n")
    print_head("milliseconds: median / 99th percentile", *SNIPPETS, "the four", "ours is faster")
    total = sum(map(statistics.median, warm))
    for name, columns in rows.items():
        medians = [1e3 * statistics.median(column) for column in columns]
        tails = [1e3 * column[int(0.99 * len(column))] for column in columns]
        cells = [f"{median:.2f} / {tail:.2f}" for median, tail in zip(medians, tails)]
        print_row(name, *cells, f"{sum(medians):.1f}", f"{sum(medians) / 1e3 / total:.2f} x")
    print()
    print_head("snippets per second, `1 + 1`", "first ones, each opens its session", "later ones")
    for sessions in (1, 100, 1000):
        opening, later = throughput(sessions, 2000)
        print_row(f"{sessions} sessions", f"{opening:.0f}", f"{later:.0f}")


if __name__ == "__main__":
    run_main(main)
