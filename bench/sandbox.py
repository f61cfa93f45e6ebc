"""What a snippet costs: our sandbox beside the usual ways, in one run, on one machine.

    (a)   `python -c` in a new process for every snippet (isolation of files, memory and time: none)
    (b)   smolagents' interpreter in a `multiprocessing.Process` for every snippet, the published way
    (c)   plain `exec` in this process: the floor, no protection at all
    ours  a session that is warm, and the first snippet of a new session

smolagents is wanted by this file only, so it is not in the requirements: without it rows (b) are left out.
Install it elsewhere and name that Python:

    python bench/sandbox.py [--quick] [--smolagents-python /tmp/smol/bin/python]
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

sys.path[:] = [
    path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent
]  # this file's own name
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sandbox import Sandbox  # noqa: E402

SNIPPETS = {
    "1+1": "1 + 1",
    "loop": "s = 0\nfor i in range(200_000):\n    s += i * i % 7\nprint(s)",
    "solve": "import sympy\nx = sympy.symbols('x')\nprint(sympy.solve(x**3 - 6*x**2 + 11*x - 6, x))",
    "eig": "import numpy as np\nprint(np.linalg.eigvals(np.arange(400.0).reshape(20, 20) % 7).real.max())",
}

PUBLISHED = """
import multiprocessing, statistics, sys, time
from smolagents.local_python_executor import LocalPythonExecutor

def work(code, connection):
    executor = LocalPythonExecutor(["sympy", "sympy.*", "numpy", "numpy.*", "math"])
    executor.send_tools({})
    connection.send(str(executor(code)))

def once(code):
    started = time.perf_counter()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=work, args=(code, theirs))
    process.start()
    theirs.close()                                            # so that a process that fails ends in EOFError, not in a hang
    ours.recv()
    process.join()
    return time.perf_counter() - started

for code in eval(sys.argv[1]):
    print(sorted(once(code) for i in range(int(sys.argv[2]))), flush=True)
"""


def times(function, n):
    """Sorted seconds of n calls."""
    taken = []
    for _ in range(n):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return sorted(taken)


def in_process(code):
    out, namespace = sys.stdout, {"__name__": "snippet"}
    with open(os.devnull, "w") as sys.stdout:
        exec(compile(code, "snippet", "exec"), namespace)
    sys.stdout = out


def first(box, code):
    session = box.session()
    result = session.run(code)
    session.close()
    assert result.status == "ok", result


def row(name, columns):
    cells = []
    for taken in columns:
        if not taken:
            cells.append(f"{'-':>19}")
        else:
            p99 = taken[min(len(taken) - 1, int(len(taken) * 0.99))]
            cells.append(f"{statistics.median(taken) * 1e3:9.2f} {p99 * 1e3:9.2f}")
    print(f"{name:34}" + " ".join(cells), flush=True)
    return [statistics.median(taken) if taken else float("nan") for taken in columns]


def throughput(workers, sessions, snippets, code="1 + 1"):
    """Snippets per second with that many open sessions, all asking at once, each with its own turn."""
    with Sandbox(workers=workers) as box:
        box.wait_ready()
        group, done, rates = [box.session() for _ in range(sessions)], 0, []
        for opened in (True, False):  # once to open them all, then timed
            started, rounds, done = (
                time.perf_counter(),
                1 if opened else max(1, snippets // sessions),
                0,
            )
            left = {session: rounds for session in group}
            for session in group:
                session.submit(code)
            while box.pending:
                for session, result in box.poll(10):
                    assert result.status == "ok", result
                    done, left[session] = done + 1, left[session] - 1
                    if left[session]:
                        session.submit(code)
            seconds = time.perf_counter() - started
            rates.append(done / seconds)
        return rates[0], rates[1]


def main():
    parser = argparse.ArgumentParser(
        description="What a snippet costs: the sandbox beside the usual ways."
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    parser.add_argument(
        "--smolagents-python",
        default=sys.executable,
        metavar="PYTHON",
        help="a Python that has smolagents",
    )
    options = parser.parse_args()
    many, few = (50, 2) if options.quick else (500, 8)
    codes = list(SNIPPETS.values())
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    print(
        f"{date.today()}, {os.cpu_count()} cores ({cpu}), Linux {platform.release()}, Python {platform.python_version()}, "
        f"load before {os.getloadavg()[0]:.1f}"
    )
    print(
        "milliseconds: median and 99th percentile\n"
        + " " * 34
        + " ".join(f"{name:>19}" for name in SNIPPETS)
    )
    for code in codes:
        in_process(code)
    floor = row(
        "(c) exec in this process",
        [times(lambda code=code: in_process(code), many // 5) for code in codes],
    )
    with Sandbox() as box:
        box.wait_ready()
        session = box.session()
        session.run("1")
        warm = row(
            "ours, warm session",
            [times(lambda code=code: session.run(code), many) for code in codes],
        )
        new = row(
            "ours, first snippet of a session",
            [times(lambda code=code: first(box, code), many // 4) for code in codes],
        )
    plain = row(
        "(a) python -c",
        [
            times(
                lambda code=code: subprocess.run(
                    [sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True
                ),
                few,
            )
            for code in codes
        ],
    )
    done = subprocess.run(
        [options.smolagents_python, "-c", PUBLISHED, repr(codes), str(few)],
        capture_output=True,
        text=True,
    )  # (b)
    if done.returncode:
        print(
            "(b) left out:", done.stderr.strip().splitlines()[-1], f"({options.smolagents_python})"
        )
        published = None
    else:
        published = row(
            "(b) smolagents, process each", [eval(line) for line in done.stdout.splitlines()]
        )
    print(
        f"\nloop in a warm session: {warm[1] / floor[1]:.2f} x the floor;  a session is ready in {(new[0] - warm[0]) * 1e3:.1f} ms"
    )
    # the loop is CPython's own time, which no sandbox of CPython code can shorten: the ratio is also given without it
    for name, picked in (("mix of the four", (0, 1, 2, 3)), ("mix without the loop", (0, 2, 3))):
        total = [sum(column[i] for i in picked) for column in (warm, plain, published or plain)]
        print(
            f"{name}, warm: {total[1] / total[0]:.0f} x faster than (a)"
            + (f", {total[2] / total[0]:.0f} x than (b)" if published else "")
        )
    print(
        "\nsnippets per second, `1 + 1`          open sessions:"
        + "".join(f"{n:>18}" for n in (1, 100, 1000))
    )
    for workers in (1, 2):
        rates = [throughput(workers, n, many * 10) for n in (1, 100, 1000)]
        print(
            f"ours, workers {workers}   (while opening / once open)       "
            + "".join(f"{a:9.0f} /{b:7.0f}" for a, b in rates),
            flush=True,
        )


if __name__ == "__main__":
    main()
