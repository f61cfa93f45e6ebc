"""What the benchmarks share. They import it first: from then on `grade` and `sandbox` are the
project's, not the benchmarks of those names, and the packages in bench/.packages can be imported.
"""

import os
import platform
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[0] = str(ROOT)
sys.path += [str(HERE), str(HERE / ".packages")]


def machine() -> str:
    """Date and processor, the first line of every result."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = found[1] if found else platform.machine()
    return f"{date.today()}, {os.cpu_count()} cores ({cpu})\n"


def alone(function, *args):
    """function(*args) in a new process, which has imported nothing and used no memory before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def number(cell) -> str:
    """A float with three digits or as an integer, anything else as it is."""
    if type(cell) is not float:
        return str(cell)
    return f"{cell:.3g}" if cell < 100 else f"{cell:.0f}"


def print_row(*cells) -> None:
    """A row of a table in Markdown."""
    print("|", " | ".join(map(number, cells)), "|", flush=True)


def print_head(*titles: str) -> None:
    print_row(*titles)
    print_row("---", *["--:"] * (len(titles) - 1))
