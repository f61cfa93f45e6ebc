"""Problems in, prompts out.

Where problems come from, and how a question becomes the tokens that a model reads, under one rule:
*text that we did not write never becomes a control token*.

    python data.py --list                                  # the sets by name
    python data.py --dataset arithmetic --show 3 --stats   # three problems, then counts
    python data.py --dataset rows.jsonl --where level=4-5

Left out: tokenised caches and pipelines of `map`. A benchmark is a few hundred rows.
"""

import glob
import hashlib
import json
import math
import random
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cli import AgentFlags, DataFlags, UserError, check_range, first_line, parse, run_main
from cli import go_offline_without_hub

HERE = Path(__file__).resolve().parent
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"


@dataclass
class Problem:
    id: str  # 12 hex digits of the question's SHA-256: the same question, the same id
    question: str
    answer: str | None  # the gold answer as text; None where a set has none
    meta: dict = field(default_factory=dict)  # the other columns: level, subject, topic, family ...


def problem_id(question: str) -> str:
    words = " ".join(question.split())
    return hashlib.sha256(words.encode("utf-8", "replace")).hexdigest()[:12]


# ---- The sets

SETS: dict[str, list] = {}  # name -> [place (`id:config`), split, licence] of each of its parts
for entry in (HERE / "problems" / "sets.txt").read_text().splitlines()[1:]:
    set_name, *columns = entry.split(maxsplit=3)
    SETS.setdefault(set_name, []).append(columns)
KEEP = {  # of these sets, only rows that match
    "cais/hle": ("category=Math", "image="),
    "nvidia/OpenMathReasoning": ("problem_type=has_answer_extracted",),
}
STREAMED = ("nvidia/OpenMathReasoning",)  # too large to be downloaded whole
QUESTION_KEYS = ("problem", "question", "question_concat", "prompt", "input", "Problem", "Question")
ANSWER_KEYS = ("answer", "final_answer", "expected_answer", "gold", "target", "Answer")
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_problems(flags: DataFlags, dataset: str | None = None, need_answer=True) -> list[Problem]:
    """The problems that the flags ask for (of `dataset` if given), in order, each question once."""
    name = flags.dataset if dataset is None else dataset
    check_range(flags, 1, math.inf, "limit")
    found: dict[str, Problem] = {}
    for problem in find_problems(name, flags, need_answer):
        found.setdefault(problem.id, problem)
        if len(found) == flags.limit and flags.shuffle is None:  # a shuffle wants the whole set
            break
    if not found:
        raise UserError(f"{name}: no rows {' '.join(flags.where)}")
    problems = list(found.values())
    if flags.shuffle is not None:
        random.Random(flags.shuffle).shuffle(problems)
    return problems[: flags.limit]


def find_problems(name: str, flags: DataFlags, need_answer: bool):
    if name not in SETS and "/" not in name and Path(name).suffix not in FILES:
        names = f"{', '.join(sorted(SETS))}, a hub id or a file ({', '.join(FILES)})"
        raise UserError(f"unknown dataset {name!r}: give one of {names}")
    for place, split, _ in SETS.get(name, [(name, "test", "")]):
        conditions = [*KEEP.get(place, ()), *flags.where]
        for number, row in enumerate(read_rows(place, flags.split or split, flags), 1):
            if all(matches(row, condition) for condition in conditions):
                yield to_problem(row, f"{place}: row {number}", flags, need_answer)


def read_rows(place: str, split: str, flags: DataFlags):
    """Rows as dicts; whatever is wrong with a set ends in a UserError of one line."""
    if place == "built-in":  # needs no library
        lines = (HERE / "problems" / "arithmetic.jsonl").read_text().splitlines()
        yield from (row for row in map(json.loads, lines) if row["split"] == split)
        return
    kind, remedy = FILES.get(Path(place).suffix), "is the file there, and whole?"
    if kind is None:
        go_offline_without_hub()
        remedy = "gated: accept its terms there, `hf auth login`; no network: --dataset rows.jsonl"
    import datasets  # only here: it takes a second

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.TORCH_AVAILABLE = False  # or a stream would import it, for nothing
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a file is nobody else's business
    try:
        if kind is None:
            name, _, config = place.partition(":")
            stream = name in STREAMED or (flags.limit is not None and flags.shuffle is None)
            options = {"name": flags.config or config or None, "streaming": stream}
            yield from datasets.load_dataset(name, split=split, **options)
            return
        with open(place, "rb") as file:
            if kind == "json" and re.match(rb"[\xef\xbb\xbf\s\[]*null", file.read(100)):
                raise ValueError("null is no row")  # the reader would crash, and Python with it
        # Streamed: nothing is cached. In one chunk: the first gives the columns their types.
        options = {} if kind == "parquet" else {"chunksize": 1 << 30}
        options |= {"data_files": glob.escape(place), "split": "train", "streaming": True}
        with tempfile.TemporaryDirectory() as folder:  # a home may be read-only
            yield from datasets.load_dataset(kind, cache_dir=folder, **options)
    except Exception as error:  # those of `datasets` and of what it calls share no base class
        raise UserError(f"{place} cannot be read: {first_line(error)} ({remedy})") from None


def to_problem(row: dict, where: str, flags: DataFlags, need_answer: bool) -> Problem:
    q = flags.question_key or next((key for key in QUESTION_KEYS if key in row), "")
    a = flags.answer_key or next((key for key in ANSWER_KEYS if key in row), "")
    if q not in row or (need_answer and a not in row):
        what, names = "answer" if q in row else "question", ", ".join(row)
        raise UserError(f"{where}: no {what} column among {names}: name it with --{what}-key")
    if "__index_level_0__" in row:  # of a .csv, whose columns are then shifted
        raise UserError(f"{where} has more cells than the header has names")
    question = row[q]
    if isinstance(question, list) and question and isinstance(question[-1], dict):
        question = question[-1].get("content")  # a chat: its last turn
    question = str(question or "").strip()
    answer = clean_answer(row.get(a))
    if not question or (need_answer and answer is None):
        raise UserError(f"{where} has an empty {'answer' if question else 'question'}")
    if isinstance(row.get(a), float) and abs(row[a]) > 2**53:
        raise UserError(f"{where}: the answer {answer} was rounded: write it in quotes")
    plain = json.loads(json.dumps(row, default=str))  # dates and pictures become text
    meta = {key: value for key, value in plain.items() if key not in (q, a)}
    return Problem(problem_id(question), question, answer, meta)


def clean_answer(value) -> str | None:
    """A gold answer as text: lists joined, GSM8K's `... #### 1,234` cut to 1234, 27.0 as 27."""
    if isinstance(value, list):  # OlympiadBench: its items often stand in dollar signs
        value = ", ".join(str(item).strip().strip("$") for item in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip().replace(",", "")
    return text or None


def matches(row: dict, condition: str) -> bool:
    """`topic=Algebra`: a column has the value, or a topic has it among its levels; `level=4-5`: the
    first number in it (`Level 5`) is in the range.
    """
    key, equals, want = condition.partition("=")
    if not equals or key not in row:
        raise UserError(f"--where {condition}: write it as level=4-5, of: {', '.join(row)}")
    number = r"(-?\d+(?:\.\d+)?)"
    bounds = re.fullmatch(f"{number}(?:-{number})?", want)
    if bounds is None:
        return want.lower() in [level.lower() for level in topic_levels(row[key])]
    low, high = float(bounds[1]), float(bounds[2] or bounds[1])
    first = re.search(number, str(row[key]))
    return first is not None and low <= float(first[0]) <= high


def topic_levels(value) -> list[str]:
    """`Mathematics -> Algebra -> Groups` as its levels, the most general first."""
    text = "" if value is None else str(value)
    return [part.strip() for part in text.split("->")]


# ---- Prompts

BASE_STOPS = ("\nQuestion:", "\nProblem:", "\nUser:")  # base models go on with a question of theirs


@dataclass(frozen=True)
class Prompt:
    """How a question is put to a model: as chat messages or, to a base model, as text."""

    agent: bool  # with the tool, or plain reasoning
    messages: tuple[dict, ...] = ()  # {role, content}; the last content has {question} in it
    text: str = ""  # in place of messages
    stops: tuple[str, ...] = ()  # a trace ends where the model writes one of them


def read_prompt(flags: AgentFlags) -> Prompt:
    """The prompt that --prompt, --few-shot and --no-agent ask for. All are files in prompts/.

    The solved examples are earlier turns of the chat, which small models can imitate, or stand
    inside the instructions (`system`), as published for Qwen3-Thinking.
    """
    if flags.prompt != "chat" or not flags.agent:
        prompt = read_prompt_file("plain" if flags.prompt == "chat" else flags.prompt, flags.agent)
        if flags.agent and CALL_OPEN not in str(prompt):
            raise UserError(f"--prompt {flags.prompt} knows no tool: add --no-agent")
        return prompt
    usual = "turns" if flags.model == "embedded" else "system"
    style, _, file = (flags.few_shot or usual).partition(":")
    if style not in ("turns", "system", "none"):
        style, file = usual, flags.few_shot
    examples = [] if style == "none" else read_examples(Path(file or HERE / "fewshot.txt"))
    *earlier, last = read_prompt_file("turns" if style == "turns" else "agent", True).messages
    if style == "system":
        solved = "\n\n---\n\n".join(f"Question: {q}\n\n{s}" for q, s in examples)
        earlier[0]["content"] += f"\n\nSolved examples:\n\n{solved}"
    if style == "turns":
        for question, solution in examples:
            earlier += [fill(last, question), {"role": "assistant", "content": solution}]
    return Prompt(True, (*earlier, last))


def fill(message: dict, question: str) -> dict:
    return {**message, "content": message["content"].replace("{question}", question)}


def read_examples(file: Path) -> list[tuple[str, str]]:
    """(question, solution) pairs of a file like fewshot.txt."""
    blocks = re.split(r"\n---+\n", file.read_text(encoding="utf-8", errors="replace"))
    form = r"\s*Question:\s*(.+?)\s*\n\n\s*(.+?)\s*"
    examples = [re.fullmatch(form, block, re.S) for block in blocks]
    if None in examples:
        raise UserError(f"{file}: example {examples.index(None) + 1} is not like fewshot.txt's")
    return [match.groups() for match in examples]


def read_prompt_file(name: str, agent: bool) -> Prompt:
    """A prompt in prompts/ by its name, or a file: {messages or text, stops} or a bare list of
    messages in .json, or plain text.
    """
    ours = HERE / "prompts" / f"{name}.json"
    file = ours if ours.is_file() else Path(name)
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        found = json.loads(text) if file.suffix == ".json" else {"text": text, "stops": BASE_STOPS}
        found = {"messages": found} if isinstance(found, list) else found
        messages, text = tuple(found.get("messages", ())), found.get("text", "")
        question = text or messages[-1]["content"]
        if question.count("{question}") != 1:
            raise ValueError("{question} must be in it once, in the last message")
        return Prompt(agent, messages, text, tuple(found.get("stops", ())))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"--prompt {name}: {first_line(error)}; see those in prompts/") from None


# ---- Tokens

SPLIT = "\ue000"  # a private-use character: where a look-alike of a control token is cut in two


@lru_cache(maxsize=4)
def control_tokens(tokenizer) -> re.Pattern:
    """Matches where the name of an added token begins; names that overlap are all found."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    names.update(tokenizer.all_special_tokens)
    choices = [re.escape(name) for name in names if len(name) > 1]
    return re.compile(f"(?={'|'.join(choices)})" if choices else "(?!)")


def disarm(tokenizer, text: str) -> str:
    """Untrusted text with SPLIT after the first character of every added token's name in it.

    A literal `<|im_end|>` in a problem or in a snippet's output would otherwise be encoded as the
    token that ends the turn. Cut in two and encoded apart, it reads the same and controls nothing.
    """
    text = text.replace(SPLIT, "")
    starts = {match.start() for match in control_tokens(tokenizer).finditer(text)}
    return "".join(c + SPLIT if i in starts else c for i, c in enumerate(text))


def encode(tokenizer, text: str) -> list[int]:
    """Token ids, without begin- or end-of-text; pieces between SPLITs are encoded apart."""
    ids = []
    for piece in text.split(SPLIT):
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def render_prompt(tokenizer, prompt: Prompt, question: str) -> list[int]:
    """Ids up to where the assistant's turn begins. The question is untrusted, the rest is ours."""
    *earlier, last = prompt.messages or [{"role": "text", "content": prompt.text}]
    messages = [*earlier, fill(last, disarm(tokenizer, question))]
    if prompt.messages and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return encode(tokenizer, text)
    form = {"user": "Question: {}\n"}  # for base models, which have no template of their own
    parts = [form.get(message["role"], "{}").format(message["content"]) for message in messages]
    ids = encode(tokenizer, "\n\n".join(parts))
    if tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False):
        ids = [tokenizer.bos_token_id, *ids]
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
        return print((HERE / "problems" / "sets.txt").read_text(), end="")
    problems = load_problems(flags, need_answer=False)
    for problem in problems[: flags.show]:
        print(f"[{problem.id}] {problem.question}\n    answer: {problem.answer}\n")
    longest = max(len(problem.question) for problem in problems)
    print(f"{flags.dataset}: {len(problems)} problems, the longest of {longest} characters")
    for key in problems[0].meta if flags.stats else ():
        counts = Counter(str(problem.meta.get(key)) for problem in problems)
        if len(counts) <= 20:
            print(f"by {key}: {', '.join(f'{value} {n}' for value, n in counts.most_common())}")


if __name__ == "__main__":
    run_main(main)
