"""What `python agent.py "..."` waits for: imports, engine, first token, answer; and what a wrong flag or --help costs.

    python bench/startup.py [--runs 3] [--cold]

Each run is a new process; its milestones are taken by wrapping agent.py's own functions, the clock starts before Python
does. Warm: files in the page cache, as in a second run. --cold (root only): also with the page cache dropped before each run, as
after a restart; the embedded model's checkpoint is there in both.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROBLEM = "What is 48721 times 9637?"
MILESTONES = (
    "python and agent.py",
    "torch, vLLM",
    "engine ready",
    "first token",
    "answer",
    "process ended",
)

DRIVER = """
import contextlib, json, os, sys, time
start, marks = float(os.environ["STARTED"]), {}
mark = lambda name: marks.setdefault(name, time.time() - start)
sys.path.insert(0, os.environ["ROOT"])
import agent
mark("python and agent.py")
load = agent.load_engine
def loading(*a):
    import torch, vllm
    from vllm import LLMEngine
    mark("torch, vLLM")
    return load(*a)
agent.load_engine = loading
opened = agent.open_agent
@contextlib.contextmanager
def opening(*a):
    with opened(*a) as ready:
        mark("engine ready")
        yield ready
agent.open_agent = opening
call = agent.View.__call__
def seen(self, trace, kind, value):
    mark("first token")
    call(self, trace, kind, value)
agent.View.__call__ = seen
solve = agent.solve
def solving(*a, **k):
    done = solve(*a, **k)
    mark("answer")
    return done
agent.solve = solving
sys.argv = ["agent.py", "--seed", "0", os.environ["PROBLEM"]]
try:
    agent.main()
finally:
    print("MARKS" + json.dumps(marks), file=sys.stderr, flush=True)
"""


def once() -> dict[str, float]:
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "STARTED": str(started), "ROOT": str(ROOT), "PROBLEM": PROBLEM},
    )
    ended = time.time() - started
    if done.returncode or "469524277" not in done.stdout:
        raise SystemExit(f"agent.py failed: {done.stdout[-300:]} {done.stderr[-800:]}")
    return json.loads(done.stderr.split("MARKS")[1]) | {"process ended": ended}


def seconds_of(*command: str) -> float:
    """Median of five."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description="Seconds from the command to the answer.")
    parser.add_argument("--runs", type=int, default=3, help="(default: 3)")
    parser.add_argument(
        "--cold", action="store_true", help="drop the page cache before each run (root)"
    )
    args = parser.parse_args()
    rows = {}
    if args.cold:
        cold = []
        for _ in range(args.runs):
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
            cold.append(once())
        rows["files not in the page cache"] = cold
    with contextlib.suppress(OSError):
        once()
    rows["files in the page cache"] = [once() for _ in range(args.runs)]
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    print(
        f"{date.today()}, {os.cpu_count()} cores ({cpu}); seconds since the command, median of {args.runs}\n"
    )
    print("| | " + " | ".join(MILESTONES) + " |\n|---|" + "--:|" * len(MILESTONES))
    for name, runs in rows.items():
        print(
            f"| {name} | "
            + " | ".join(f"{statistics.median(r[m] for r in runs):.1f}" for m in MILESTONES)
            + " |"
        )
    print("\n| | `--help` | an unknown flag |\n|---|--:|--:|")
    for script in ("data.py", "sandbox.py", "agent.py", "evaluate.py", "grpo.py"):
        print(
            f"| `{script}` | {seconds_of(script, '--help'):.2f} | {seconds_of(script, '--no-such-flag'):.2f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
