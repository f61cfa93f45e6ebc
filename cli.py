"""What all command lines share: groups of flags, and errors of one line.

A script's main begins with `flags = parse(Flags)`, a dataclass whose fields are the flags and whose
comments are the help, and the script ends with `run_main(main)`.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import signal
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import tyro
from safetensors import SafetensorError


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for one line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def run_main(main) -> None:
    """Run main() and exit with what it returns; what a user can mend is one line, and code 2."""
    code = 2
    try:
        result = main() or 0
        sys.stdout.flush()
        sys.exit(result)
    except BrokenPipeError:  # the reader of a pipe has left: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains as it ends
        sys.exit(0)
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    except ModuleNotFoundError as error:
        said = f"no package {error.name!r} in {sys.executable}: `make setup`"
    except (UserError, OSError, SafetensorError) as error:  # the last one is a full disk's, too
        said = " ".join(str(error).split())
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        said = "out of GPU memory: lower --micro-tokens (in training), --batch or --max-tokens"
    print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)
    sys.exit(code)


def parse(flags: type, **options):
    """The command line as a dataclass `flags`; a mistake is one line, not tyro's box."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(flags, **options)
    except SystemExit as end:
        if not end.code:  # --help
            raise
    _, *box = [line.strip("│╭╮╰╯─ ") for line in said.getvalue().splitlines()]
    mistake = " ".join(box).split("  ")[0]
    raise UserError(f"{mistake} (--help lists the flags)")


def check_range(flags, low: float, high: float, *fields: str) -> None:
    """Raise UserError for a field of `flags` outside [low, high]; None is not looked at."""
    for field in fields:
        value = getattr(flags, field)
        if value is not None and not low <= value <= high:
            name = field.replace("_", "-")
            raise UserError(f"--{name} must be between {low} and {high}, not {value}")


def write_log(path: Path, row: dict) -> None:
    """Append a row. The newline comes first: a row that a kill cut in two spoils no other."""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row, ensure_ascii=False))


def stop_on_ctrl_c() -> list:
    """A list that is empty until the first Ctrl-C, which ends the run after its step."""
    stop = []

    def handler(*_):
        stop.append(True)
        print("finishing this step, then saving (again: abort now)", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    return stop


def has_cuda() -> bool:
    """Whether this machine and this installation can use an NVIDIA GPU. Cheap: without torch."""
    driver = Path("/proc/driver/nvidia/version")
    return driver.exists() and "+cpu" not in importlib.metadata.version("torch")


@cache
def go_offline_without_hub() -> None:
    """Set HF_HUB_OFFLINE before any import where no hub answers: retries take over a minute."""
    import requests

    try:
        requests.head(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", timeout=5)
    except requests.RequestException:
        os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(kw_only=True)
class DataFlags:
    """Which problems."""

    dataset: str = "arithmetic"  # a set by name (`data.py --list`), a file, a hub id or id:config
    split: str | None = None  # without this flag `test`, or that of a set known by name
    question_key: str | None = None  # column of the question; without this flag the usual names
    answer_key: str | None = None  # column of the gold answer; without this flag the usual names
    where: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # rows with topic=Algebra, level=4-5
    limit: int | None = None  # the first N problems


@dataclass(kw_only=True)
class ModelFlags:
    """Which model, and how it is served."""

    model: str = "Intel/deepmath-v1" if has_cuda() else "embedded"  # hub id, folder, `embedded`
    lora: str | None = None  # PEFT adapter folder, or `none`; `embedded` has one in adapters/
    batch: int = 256 if has_cuda() else 64  # traces decoded at once
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory for the engine
    tensor_parallel: int = 1  # GPUs that share one model
    verbose: bool = False  # show the engine's log


@dataclass(kw_only=True)
class AgentFlags(ModelFlags):
    """How problems are put to the model, and how it samples."""

    agent: bool = True  # with the tool; --no-agent is plain reasoning, the baseline
    prompt: str = "chat"  # `chat`, a name in prompts/, or a file with {question} in it
    few_shot: str | None = None  # turns (for small models), system, none; a file, or turns:file
    sandbox: Literal["auto", "limits-only"] = "auto"  # limits-only: all but seccomp, a risk
    temperature: float = 0.6  # 0 is greedy
    top_p: float = 0.95  # sample from the most likely tokens that have this probability together
    top_k: int = 20  # sample from the K most likely tokens; 0 is off
    seed: int = 0  # same seed, same traces, up to rounding that depends on the batch; -1 draws one
    max_tokens: int | None = None  # that a trace may sample; `embedded` has 1024, others 20000
    max_calls: int = 50  # snippets per trace
    snippet_seconds: float = 20.0  # wall time of a snippet; ends the snippet, not the trace
    end_at: Literal["eos", "box"] = "eos"  # end a trace by itself, or at its first \boxed{}
