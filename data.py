"""Problems in, prompts out.

Where problems come from, and how a question becomes the tokens that a model reads, under one rule:
*text that we did not write never becomes a control token*.

    python data.py --list                          # the sets by name
    python data.py --dataset arithmetic --show 3   # three problems
    python data.py --dataset rows.jsonl --where level=4-5
"""

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cli import AgentFlags, DataFlags, UserError
from cli import check_range, first_line, go_offline_without_hub, parse, run_main

HERE = Path(__file__).resolve().parent
CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"


@dataclass
class Problem:
    id: str  # 12 hex digits of the question's SHA-256: the same question, the same id
    question: str
    answer: str | None  # the gold answer as text; None where a set has none
    meta: dict = field(default_factory=dict)  # the other columns: level, subject, topic, family ...
    dataset: str = ""  # its set, as --dataset names it


def problem_id(question: str) -> str:
    words = " ".join(question.split())  # spaces do not count
    digest = hashlib.sha256(words.encode("utf-8", "replace"))
    return digest.hexdigest()[:12]


# ---- The sets
SETS_FILE = HERE / "problems" / "sets.json"
SETS = json.loads(SETS_FILE.read_text())  # name -> its parts: most sets have one
HAVE_TRAIN = ("arithmetic", "gsm8k", "svamp")  # sets with a split to train on beside the test split
FILES = (".jsonl", ".json", ".csv", ".parquet")
QUESTION_KEYS = "problem question question_concat prompt input Problem Question".split()
ANSWER_KEYS = "answer final_answer expected_answer gold target Answer".split()


def load_problems(flags: DataFlags, need_answer=True) -> list[Problem]:
    """The problems that the flags ask for, in order, each question once."""
    check_range(flags, 1, math.inf, "limit")
    found = {}  # by id
    row = {}
    for row in read_set(flags):
        if all(matches(row, condition) for condition in flags.where):
            problem = to_problem(row, flags, need_answer)
            found.setdefault(problem.id, problem)
        if len(found) == flags.limit:
            break
    if not found:
        what = f"no rows {' '.join(flags.where)} (columns: {', '.join(row)})"
        raise UserError(f"{flags.dataset}: {what}")
    return list(found.values())


def read_set(flags: DataFlags) -> Iterator[dict]:
    """The rows of a set by its name, of a file, or of a set on the hub."""
    name = flags.dataset
    parts = SETS.get(name)
    if name.endswith(FILES) or "/" in name:
        parts = [{"place": name, "where": []}]
    if parts is None:
        raise UserError(f"unknown dataset {name!r}: give a hub id, a file or {', '.join(SETS)}")
    for part in parts:
        split = flags.split or part.get("split")
        for row in read_rows(part["place"], split, flags):
            if all(matches(row, condition) for condition in part["where"]):
                yield row


def read_rows(place: str, split: str | None, flags: DataFlags) -> Iterator[dict]:
    """Rows as dicts; whatever is wrong with a set ends in a UserError of one line."""
    try:
        if place == "built-in":
            place = str(HERE / "problems" / "arithmetic.jsonl")
        if place.endswith(FILES):
            for row in read_file(Path(place)):
                if split in (None, row.get("split", split)):
                    yield row
        else:
            go_offline_without_hub()
            import datasets  # only here: it takes seconds

            name, _, config = place.partition(":")
            options = {"split": split or "test", "streaming": flags.limit is not None}
            yield from datasets.load_dataset(name, config or None, **options)
    except Exception as error:  # those of `datasets` and of what it calls share no base class
        remedy = "is a file whole? gated: `hf auth login`; no network: give a file"
        raise UserError(f"{place} cannot be read: {first_line(error)} ({remedy})") from None


def read_file(path: Path) -> list[dict]:
    """Rows as they are written: `datasets` makes a float of 2^70 + 1 and a date of 2025-01-02."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(text)))
    elif path.suffix == ".json":
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    for row in rows:
        if not isinstance(row, dict) or None in row:  # csv puts cells without a name under None
            raise ValueError(f"a row is not one value for each name: {row}")
    return rows


def to_problem(row: dict, flags: DataFlags, need_answer: bool) -> Problem:
    # Dates and pictures become text; half a character of UTF-16 becomes a question mark.
    plain = json.dumps(row, default=str, ensure_ascii=False)
    meta = json.loads(plain.encode("utf-8", "replace"))
    question = take(meta, flags.question_key, QUESTION_KEYS)
    answer = clean_answer(take(meta, flags.answer_key, ANSWER_KEYS))
    names = ", ".join(row)
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{flags.dataset}: no question among {names}: name it with --question-key")
    if need_answer and answer is None:
        raise UserError(f"{flags.dataset}: no answer among {names}: name it with --answer-key")
    question = question.strip()
    return Problem(problem_id(question), question, answer, meta, flags.dataset)


def take(row: dict, key: str | None, usual: list[str]):
    """Remove a column from a row and return its value: `key`, or the first of the usual names."""
    for name in [key] if key else usual:
        if name in row:
            return row.pop(name)
    return None


def clean_answer(value) -> str | None:
    """A gold answer as text: lists joined, GSM8K's `... #### 1,234` cut to 1234, 27.0 as 27."""
    if isinstance(value, list):  # OlympiadBench: its items often stand in dollar signs
        value = ", ".join(str(item).strip("$ ") for item in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value)
    _, mark, last = text.rpartition("####")
    if mark:
        text = last.replace(",", "")
    return text.strip() or None


def matches(row: dict, condition: str) -> bool:
    """`topic=Algebra`: the column has this value, or has it among its levels, `Math -> Algebra`.
    `level=4-5`: the first number in it, as in `Level 5`, is in the range.
    """
    key, equals, want = condition.partition("=")
    if not equals:
        raise UserError(f"--where {condition}: write it as level=4-5")
    value = "" if row.get(key) is None else str(row[key])
    low, _, high = want.partition("-")
    try:
        low, high = float(low), float(high or low)
    except ValueError:  # not a number
        return want.lower() in value.lower().split(" -> ")
    first = re.search(r"((?<!\w)-)?\d+(\.\d+)?", value)  # of aime-2024 it is 2024
    return first is not None and low <= float(first[0]) <= high


# ---- Prompts
# For base models, which have no chat template and go on with a question of theirs.
BASE_TEMPLATE = """{% for message in messages -%}
{% if message.role == "user" %}Question: {% endif %}{{ message.content }}

{% endfor %}"""
BASE_STOPS = ("\nQuestion:", "\nProblem:", "\nUser:")


@dataclass(frozen=True)
class Prompt:
    """How a question is put to a model: as chat messages or, to a base model, as text."""

    messages: tuple[dict, ...] = ()  # {role, content}; the last content has {question} in it
    text: str = ""  # in place of messages
    stops: tuple[str, ...] = ()  # a trace ends where the model writes one of them
    source: str = ""  # where it comes from


def read_prompt(flags: AgentFlags) -> Prompt:
    """The prompt that --prompt, --few-shot and --no-agent ask for. All are files in prompts/."""
    if flags.prompt != "chat":
        prompt = read_prompt_file(flags.prompt)
        if flags.agent and CALL_OPEN not in str(prompt):
            raise UserError(f"--prompt {flags.prompt} knows no tool: add --no-agent")
        return prompt
    if not flags.agent:
        return read_prompt_file("plain")

    # Solved examples are earlier turns of the chat, which small models can imitate, or stand inside
    # the instructions (`system`), as published for Qwen3-Thinking.
    usual = "turns" if flags.model == "embedded" else "system"
    style, _, file = (flags.few_shot or usual).partition(":")
    if style not in ("turns", "system", "none"):
        style, file = usual, flags.few_shot
    file = Path(file or HERE / "fewshot.txt")
    examples = file.read_text(encoding="utf-8", errors="replace").strip()
    name = "turns" if style == "turns" else "agent"
    *messages, last = read_prompt_file(name).messages
    if style == "system":
        messages[0]["content"] += f"\n\nSolved examples:\n\n{examples}"
    if style == "turns":
        for example in examples.split("\n---\n"):
            question, _, solution = example.strip().partition("\n\n")
            if not (question.startswith("Question: ") and solution):
                raise UserError(f"{file}: an example is not like fewshot.txt's")
            question = question.removeprefix("Question: ")
            asked = last["content"].replace("{question}", question)
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": solution})
    return Prompt((*messages, last))


def read_prompt_file(name: str) -> Prompt:
    """A prompt in prompts/ by its name, or a file: the fields of a Prompt in .json, else text."""
    file = HERE / "prompts" / f"{name}.json"
    if not file.is_file():
        file = Path(name)
    try:
        text = file.read_text(encoding="utf-8")
        fields = {"text": text, "stops": BASE_STOPS}
        if file.suffix == ".json":
            fields = json.loads(text)
        prompt = Prompt(**fields)
        question = prompt.text or prompt.messages[-1]["content"]
        if question.count("{question}") != 1:
            raise ValueError("{question} must be in it once, in the last message")
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"--prompt {name}: {first_line(error)}; see those in prompts/") from None
    return prompt


# ---- Tokens
SPLIT = "\ue000"  # a private-use character: where a look-alike of a control token is cut in two


def disarm(tokenizer, text: str) -> str:
    """Untrusted text with SPLIT after the first character of every added token's name in it.

    A literal `<|im_end|>` in a problem or in a snippet's output would otherwise be encoded as the
    token that ends the turn. Cut in two and encoded apart, it reads the same and controls nothing.
    """
    names = "|".join(map(re.escape, tokenizer.get_added_vocab()))
    first_character = f"(?s)(?={names})."  # a look-ahead: overlapping names are all cut
    return re.sub(first_character, rf"\g<0>{SPLIT}", text.replace(SPLIT, ""))


def encode(tokenizer, text: str) -> list[int]:
    """Token ids, without begin- or end-of-text; pieces between SPLITs are encoded apart."""
    ids = []
    for piece in text.split(SPLIT):
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def render_prompt(tokenizer, prompt: Prompt, question: str) -> list[int]:
    """Ids up to where the assistant's turn begins. The question is untrusted, the rest is ours."""
    text = prompt.text or tokenizer.apply_chat_template(
        list(prompt.messages),
        chat_template=tokenizer.chat_template or BASE_TEMPLATE,
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = encode(tokenizer, text.replace("{question}", disarm(tokenizer, question)))
    has_template = tokenizer.chat_template and not prompt.text  # it writes all special tokens
    if not has_template and getattr(tokenizer, "add_bos_token", False):
        ids.insert(0, tokenizer.bos_token_id)
    return ids


# ---- The command
@dataclass(kw_only=True)
class Flags(DataFlags):
    """Show the problems of a set."""

    list: bool = False  # print the sets known by name, with their splits and licences, and end
    show: int = 3  # print the first N problems


def main() -> None:
    flags = parse(Flags)
    if flags.list:
        print(SETS_FILE.read_text(), end="")
        return
    problems = load_problems(flags, need_answer=False)
    for problem in problems[: flags.show]:
        print(f"[{problem.id}] {problem.question}\n    answer: {problem.answer}\n")
    print(f"{flags.dataset}: {len(problems)} problems")


if __name__ == "__main__":
    run_main(main)
