"""Problems in, prompts out.

Where problems come from, and how a question becomes the tokens that a model reads, under one rule:
*text that we did not write never becomes a control token*.

    python data.py --list                                  # the sets by name
    python data.py --dataset arithmetic --show 3 --stats   # three problems, then counts
    python data.py --dataset rows.jsonl --where level=4-5

Left out: tokenised caches and pipelines of `map`. A benchmark is a few hundred rows.
"""

import csv
import hashlib
import io
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from cli import AgentFlags, DataFlags, UserError
from cli import check_range, first_line, go_offline_without_hub, parse, run_main

HERE = Path(__file__).resolve().parent
SETS_FILE = HERE / "problems" / "sets.txt"
CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"


@dataclass
class Problem:
    id: str  # 12 hex digits of the question's SHA-256: the same question, the same id
    question: str
    answer: str | None  # the gold answer as text; None where a set has none
    meta: dict = field(default_factory=dict)  # the other columns: level, subject, topic, family ...


def problem_id(question: str) -> str:
    words = " ".join(question.split())  # spaces do not count
    digest = hashlib.sha256(words.encode("utf-8", "replace"))
    return digest.hexdigest()[:12]


# ---- The sets


class Part(NamedTuple):
    """A line of problems/sets.txt; a set has one or more of them."""

    place: str  # an id on the hub, perhaps with `:config`; a file; or `built-in`
    split: str = "test"
    keep: str = "-"  # conditions, separated by commas: other rows do not belong to the set
    licence: str = ""


def read_sets() -> dict[str, list[Part]]:
    sets = defaultdict(list)
    _, *lines = SETS_FILE.read_text().splitlines()
    for line in lines:
        name, *columns = line.split(maxsplit=4)
        part = Part(*columns)
        sets[name].append(part)
    return dict(sets)


SETS = read_sets()
TOO_LARGE = "nvidia/OpenMathReasoning"  # to be downloaded whole
FILES = (".jsonl", ".json", ".csv", ".parquet")
QUESTION_KEYS = "problem question question_concat prompt input Problem Question".split()
ANSWER_KEYS = "answer final_answer expected_answer gold target Answer".split()


def load_problems(flags: DataFlags, dataset: str | None = None, need_answer=True) -> list[Problem]:
    """The problems that the flags ask for (of `dataset` if given), in order, each question once."""
    name = dataset or flags.dataset
    check_range(flags, 1, math.inf, "limit")
    found = {}  # by id
    for problem in find_problems(name, flags, need_answer):
        found.setdefault(problem.id, problem)
        enough = len(found) == flags.limit
        if enough and flags.shuffle is None:  # a shuffle wants the whole set
            break
    if not found:
        where = " ".join(flags.where)
        raise UserError(f"{name}: no rows {where}")
    problems = list(found.values())
    if flags.shuffle is not None:
        order = random.Random(flags.shuffle)
        order.shuffle(problems)
    return problems[: flags.limit]


def find_problems(name: str, flags: DataFlags, need_answer: bool) -> Iterator[Problem]:
    parts = SETS.get(name)
    if parts is None:
        is_file = name.endswith(FILES)
        if not is_file and "/" not in name:
            known = ", ".join(SETS)
            raise UserError(f"unknown dataset {name!r}: give a hub id, a .jsonl file or {known}")
        parts = [Part(name)]
    for part in parts:
        conditions = list(flags.where)
        if part.keep != "-":
            conditions += part.keep.split(",")
        split = flags.split or part.split
        rows = read_rows(part.place, split, flags)
        for number, row in enumerate(rows, start=1):
            where = f"{part.place}: row {number}"
            if all(matches(row, condition) for condition in conditions):
                yield to_problem(row, where, flags, need_answer)


def read_rows(place: str, split: str, flags: DataFlags) -> Iterator[dict]:
    """Rows as dicts; whatever is wrong with a set ends in a UserError of one line."""
    remedy = "is the file there, and whole?"
    try:
        if place == "built-in":
            rows = read_file(HERE / "problems" / "arithmetic.jsonl")
            for row in rows:
                if row["split"] == split:
                    yield row
        elif place.endswith(FILES):
            yield from read_file(Path(place))
        else:
            remedy = "gated: accept its terms there, `hf auth login`; no network: give a file"
            yield from read_hub(place, split, flags)
    except Exception as error:  # those of `datasets` and of what it calls share no base class
        raise UserError(f"{place} cannot be read: {first_line(error)} ({remedy})") from None


def read_file(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        return table.to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        lines = io.StringIO(text)
        rows = list(csv.DictReader(lines))
    elif path.suffix == ".json":
        rows = json.loads(text)
    else:
        lines = text.split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    for number, row in enumerate(rows, start=1):
        # csv puts cells without a name under None
        if not isinstance(row, dict) or None in row:
            raise ValueError(f"row {number} is not one value for each name")
    columns = {name: None for row in rows for name in row}
    return [{**columns, **row} for row in rows]


def read_hub(place: str, split: str, flags: DataFlags) -> Iterator[dict]:
    go_offline_without_hub()
    import datasets  # only here: it takes seconds

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.TORCH_AVAILABLE = False  # or a stream would import it, for nothing
    name, _, config = place.partition(":")
    only_a_few = flags.limit is not None and flags.shuffle is None
    stream = only_a_few or name == TOO_LARGE
    config = flags.config or config or None
    return datasets.load_dataset(name, config, split=split, streaming=stream)


def to_problem(row: dict, where: str, flags: DataFlags, need_answer: bool) -> Problem:
    # Dates and pictures become text, half a character of UTF-16 a question mark.
    plain = json.dumps(row, default=str, ensure_ascii=False)
    row = json.loads(plain.encode("utf-8", "replace"))

    names = ", ".join(row)
    question_key = flags.question_key or usual(QUESTION_KEYS, row)
    answer_key = flags.answer_key or usual(ANSWER_KEYS, row)
    question = row.pop(question_key, None)
    answer = row.pop(answer_key, None)
    answer = clean_answer(answer)
    if isinstance(question, list) and question:  # a chat: its last turn
        question = question[-1]["content"]
    question = str(question or "").strip()
    if not question:
        raise UserError(f"{where} has no question among {names}: name it with --question-key")
    if need_answer and answer is None:
        raise UserError(f"{where} has no answer among {names}: name it with --answer-key")
    return Problem(problem_id(question), question, answer, meta=row)


def usual(names: list[str], row: dict) -> str | None:
    return next((name for name in names if name in row), None)


def clean_answer(value) -> str | None:
    """A gold answer as text: lists joined, GSM8K's `... #### 1,234` cut to 1234, 27.0 as 27."""
    if isinstance(value, list):  # OlympiadBench: its items often stand in dollar signs
        items = [str(item).strip("$ ") for item in value]
        value = ", ".join(items)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        return None
    text = str(value)
    _, mark, last = text.rpartition("####")
    if mark:
        text = last.replace(",", "")
    return text.strip() or None


def matches(row: dict, condition: str) -> bool:
    """`topic=Algebra`: a column has the value, or a topic has it among its levels; `level=4-5`: the
    first number in it (`Level 5`) is in the range.
    """
    key, equals, want = condition.partition("=")
    if not equals or key not in row:
        names = ", ".join(row)
        raise UserError(f"--where {condition}: write it as level=4-5, of: {names}")
    number = r"(-?\d+(?:\.\d+)?)"
    bounds = re.fullmatch(f"{number}(?:-{number})?", want)
    if bounds is None:
        levels = [level.lower() for level in topic_levels(row[key])]
        return want.lower() in levels
    low = float(bounds[1])
    high = float(bounds[2] or low)
    first = re.search(number, str(row[key]))
    if first is None:
        return False
    return low <= float(first[0]) <= high


def topic_levels(value) -> list[str]:
    """`Mathematics -> Algebra -> Groups` as its levels, the most general first."""
    text = "" if value is None else str(value)
    parts = text.split("->")
    return [part.strip() for part in parts]


# ---- Prompts

BASE_STOPS = ("\nQuestion:", "\nProblem:", "\nUser:")  # base models go on with a question of theirs


@dataclass(frozen=True)
class Prompt:
    """How a question is put to a model: as chat messages or, to a base model, as text."""

    agent: bool  # with the tool, or plain reasoning
    messages: tuple[dict, ...] = ()  # {role, content}; the last content has {question} in it
    text: str = ""  # in place of messages
    stops: tuple[str, ...] = ()  # a trace ends where the model writes one of them
    source: str = ""  # where it comes from


def read_prompt(flags: AgentFlags) -> Prompt:
    """The prompt that --prompt, --few-shot and --no-agent ask for. All are files in prompts/.

    The solved examples are earlier turns of the chat, which small models can imitate, or stand
    inside the instructions (`system`), as published for Qwen3-Thinking.
    """
    if flags.prompt != "chat":
        prompt = read_prompt_file(flags.prompt, flags.agent)
        if flags.agent and CALL_OPEN not in str(prompt):
            raise UserError(f"--prompt {flags.prompt} knows no tool: add --no-agent")
        return prompt
    if not flags.agent:
        return read_prompt_file("plain", agent=False)

    style, examples = few_shot(flags)
    name = "turns" if style == "turns" else "agent"
    *earlier, last = read_prompt_file(name, agent=True).messages
    if style == "turns":
        for question, solution in examples:
            earlier.append(fill(last, question))
            reply = {"role": "assistant", "content": solution}
            earlier.append(reply)
    if style == "system":
        solved = [f"Question: {question}\n\n{solution}" for question, solution in examples]
        together = "\n\n---\n\n".join(solved)
        earlier[0]["content"] += f"\n\nSolved examples:\n\n{together}"
    return Prompt(True, (*earlier, last))


def few_shot(flags: AgentFlags) -> tuple[str, list]:
    """--few-shot (a style, a file, or style:file) as (style, examples)."""
    usual_style = "turns" if flags.model == "embedded" else "system"
    choice = flags.few_shot or usual_style
    style, _, file = choice.partition(":")
    if style == "none":
        return style, []
    if style not in ("turns", "system"):
        style = usual_style
        file = choice
    file = file or HERE / "fewshot.txt"
    examples = read_examples(Path(file))
    return style, examples


def read_examples(file: Path) -> list[tuple[str, str]]:
    """(question, solution) pairs of a file like fewshot.txt."""
    text = file.read_text(encoding="utf-8", errors="replace")
    blocks = re.split(r"\n---+\n", text)
    examples = []
    for number, block in enumerate(blocks, start=1):
        match = re.fullmatch(r"\s*Question:\s*(.+?)\s*\n\n\s*(.+?)\s*", block, re.DOTALL)
        if match is None:
            raise UserError(f"{file}: example {number} is not like fewshot.txt's")
        examples.append(match.groups())
    return examples


def read_prompt_file(name: str, agent: bool) -> Prompt:
    """A prompt in prompts/ by its name, or a file: the fields of a Prompt in .json, else text."""
    file = HERE / "prompts" / f"{name}.json"
    if not file.is_file():
        file = Path(name)
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        if file.suffix == ".json":
            fields = json.loads(text)
            if isinstance(fields, list):  # messages, as a chat template takes them
                fields = {"messages": fields}
            prompt = Prompt(agent, **fields)
        else:
            prompt = Prompt(agent, text=text, stops=BASE_STOPS)
        question = prompt.text or prompt.messages[-1]["content"]
        if question.count("{question}") != 1:
            raise ValueError("{question} must be in it once, in the last message")
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"--prompt {name}: {first_line(error)}; see those in prompts/") from None
    return prompt


def fill(message: dict, question: str) -> dict:
    content = message["content"].replace("{question}", question)
    return {**message, "content": content}


# ---- Tokens

SPLIT = "\ue000"  # a private-use character: where a look-alike of a control token is cut in two


@lru_cache
def control_tokens(tokenizer) -> re.Pattern:
    """Matches the first character of an added token's name; of names that overlap, each one's."""
    tokens = tokenizer.added_tokens_decoder.values()
    names = [re.escape(str(token)) for token in tokens]
    choices = "|".join(names)
    return re.compile(f"(?={choices}).", re.DOTALL)


def disarm(tokenizer, text: str) -> str:
    """Untrusted text with SPLIT after the first character of every added token's name in it.

    A literal `<|im_end|>` in a problem or in a snippet's output would otherwise be encoded as the
    token that ends the turn. Cut in two and encoded apart, it reads the same and controls nothing.
    """
    text = text.replace(SPLIT, "")
    return control_tokens(tokenizer).sub(rf"\g<0>{SPLIT}", text)


def encode(tokenizer, text: str) -> list[int]:
    """Token ids, without begin- or end-of-text; pieces between SPLITs are encoded apart."""
    ids = []
    for piece in text.split(SPLIT):
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def render_prompt(tokenizer, prompt: Prompt, question: str) -> list[int]:
    """Ids up to where the assistant's turn begins. The question is untrusted, the rest is ours."""
    question = disarm(tokenizer, question)
    messages = list(prompt.messages)
    if prompt.text:
        messages = [{"role": "text", "content": prompt.text}]
    messages[-1] = fill(messages[-1], question)
    if prompt.messages and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return encode(tokenizer, text)

    # Base models have no template.
    parts = []
    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            content = f"Question: {content}\n"
        parts.append(content)
    text = "\n\n".join(parts)
    ids = encode(tokenizer, text)
    if getattr(tokenizer, "add_bos_token", False):
        ids.insert(0, tokenizer.bos_token_id)
    return ids


# ---- The command


@dataclass(kw_only=True)
class Flags(DataFlags):
    list: bool = False
    """Print the sets known by name, with their splits and licences, and end."""
    show: int = 3
    """Print the first N problems."""
    stats: bool = False
    """Count by every column that has few values."""


def main() -> None:
    flags = parse(Flags, description="Show the problems of a set.")
    if flags.list:
        print(SETS_FILE.read_text(), end="")
        return
    problems = load_problems(flags, need_answer=False)
    for problem in problems[: flags.show]:
        print(f"[{problem.id}] {problem.question}\n    answer: {problem.answer}\n")
    print(f"{flags.dataset}: {len(problems)} problems")
    if not flags.stats:
        return
    for key in problems[0].meta:
        values = [str(problem.meta.get(key)) for problem in problems]
        counts = Counter(values).most_common()
        if len(counts) <= 20:
            print(f"by {key}: {dict(counts)}")


if __name__ == "__main__":
    run_main(main)
