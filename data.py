"""Problems in, prompts out.

Where problems come from (sets of the field by name, any set of the Hugging Face hub, files, and
`arithmetic`, which is built in), and how a question becomes the tokens that the model reads, under
one rule: *text that we did not write never becomes a control token*.

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
from collections import Counter
from collections.abc import Iterator
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

TABLE = """
arithmetic         arithmetic.jsonl          test   Apache-2.0
math500            HuggingFaceH4/MATH-500    test   MIT
aime24             HuggingFaceH4/aime_2024   train  (c) MAA
aime25             math-ai/aime25            test   (c) MAA
aime               HuggingFaceH4/aime_2024   train  (c) MAA
aime               math-ai/aime25            test   (c) MAA
hmmt               MathArena/hmmt_feb_2025   train  CC-BY-NC-SA-4.0
hmmt24             MathArena/hmmt_feb_2024   train  CC-BY-NC-SA-4.0
hle                cais/hle                  test   MIT; gated, do not republish its rows
amc23              math-ai/amc23             test   (c) MAA
minerva            math-ai/minervamath       test   not stated
olympiadbench      math-ai/olympiadbench     test   Apache-2.0
gsm8k              openai/gsm8k:main         test   MIT
svamp              ChilleD/SVAMP             test   MIT
openmathreasoning  nvidia/OpenMathReasoning  tir    CC-BY-4.0
deepmath-103k      zwhe99/DeepMath-103K      train  MIT
"""
SETS: dict[str, list] = {}  # name -> [place (`id:config`), split, licence] of each part
for entry in TABLE.strip().splitlines():
    set_name, *columns = entry.split(maxsplit=3)
    SETS.setdefault(set_name, []).append(columns)

KEEP = {  # of these sets, only rows with these values
    "cais/hle": {"category": "Math", "image": ""},
    "nvidia/OpenMathReasoning": {"problem_type": "has_answer_extracted"},
}
STREAMED = ("nvidia/OpenMathReasoning",)  # too large to be downloaded whole
QUESTION_KEYS = ("problem", "question", "question_concat", "prompt", "input", "Problem", "Question")
ANSWER_KEYS = ("answer", "final_answer", "expected_answer", "gold", "target", "Answer")
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
READERS = {  # the types of columns are guessed from the first chunk: let it be the only one
    "json": {"chunksize": 1 << 30},
    "csv": {"chunksize": 1 << 30, "keep_default_na": False},  # "None" is an answer, "" is none
    "parquet": {},
}


def load_problems(flags: DataFlags, dataset: str | None = None, need_answer=True) -> list[Problem]:
    """The problems that the flags ask for (of `dataset` if given), in order, each question once.

    Raises UserError for what a user can mend: an unknown name, a missing column, an empty answer.
    """
    name = flags.dataset if dataset is None else dataset
    if name not in SETS and "/" not in name and Path(name).suffix not in FILES:
        names = ", ".join(sorted(SETS))
        raise UserError(
            f"unknown dataset {name!r}: give {names}, a hub id, or a .jsonl/.json/.csv/.parquet file"
        )
    check_range(flags, 1, math.inf, "limit")
    conditions = [read_condition(text) for text in flags.where]
    enough = flags.limit if flags.shuffle is None else None  # a shuffle wants the whole set
    found: dict[str, Problem] = {}
    for place, split, _ in SETS.get(name, [(name, "test", "")]):
        rows = read_rows(place, flags.split or split, flags.config, stream=enough is not None)
        for number, row in enumerate(rows, 1):
            problem = to_problem(row, f"{place}: row {number}", flags, need_answer)
            if all(matches(problem, key, want) for key, want in conditions):
                found.setdefault(problem.id, problem)
            if len(found) == enough:
                break
    if not found:
        raise UserError(f"{name}: no rows {' '.join(flags.where)}")
    problems = list(found.values())
    if flags.shuffle is not None:
        random.Random(flags.shuffle).shuffle(problems)
    return problems[: flags.limit]


def read_rows(place: str, split: str, config: str | None, stream: bool) -> Iterator[dict]:
    """Rows as dicts; whatever is wrong with a set ends in a UserError of one line."""
    if place == "arithmetic.jsonl":  # needs no library
        rows = map(json.loads, (HERE / "problems" / place).read_text().splitlines())
        yield from (row for row in rows if row["split"] == split)
        return
    remedy = "is the file whole?"
    if Path(place).suffix not in FILES:
        go_offline_without_hub()
        remedy = "gated: accept its terms there, `hf auth login`; no network: --dataset rows.jsonl"
    keep = KEEP.get(place, {})
    try:
        for row in open_set(place, split, config, stream):
            if "__index_level_0__" in row:
                raise ValueError("its rows have more cells than its header")
            if all((row.get(key) or "") == value for key, value in keep.items()):
                yield row
    except Exception as error:  # those of `datasets` and of what it calls share no base class
        raise UserError(f"{place} cannot be read: {first_line(error)} ({remedy})") from None


def open_set(place: str, split: str, config: str | None, stream: bool):
    """A set or a file through `datasets`. A file is streamed: no cache keeps what it once was."""
    import datasets  # only here: it takes a second

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.TORCH_AVAILABLE = False  # or a stream would import it, for nothing
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a file is nobody else's business
    kind = FILES.get(Path(place).suffix)
    if kind is None:
        name, _, usual = place.partition(":")
        return datasets.load_dataset(
            name, config or usual or None, split=split, streaming=stream or name in STREAMED
        )
    with open(place, "rb") as file:
        if kind == "json" and re.match(rb"[\xef\xbb\xbf\s\[]*null", file.read(100)):
            raise ValueError("null is no row")  # the reader would crash, and Python with it
    path = glob.escape(str(Path(place).absolute()))
    return datasets.load_dataset(
        kind, data_files=path, split="train", streaming=True, **READERS[kind]
    )


def to_problem(row: dict, where: str, flags: DataFlags, need_answer: bool) -> Problem:
    q = flags.question_key or next((key for key in QUESTION_KEYS if key in row), "")
    a = flags.answer_key or next((key for key in ANSWER_KEYS if key in row), "")
    for what, key, needed in ("question", q, True), ("answer", a, need_answer):
        if needed and key not in row:
            names = ", ".join(row)
            raise UserError(
                f"{where} has no {what} column {key}: name it with --{what}-key ({names})"
            )
    question = row[q]
    if isinstance(question, list) and question and isinstance(question[-1], dict):
        question = question[-1].get("content")  # a chat: its last turn
    question = str(question or "").strip()
    answer = clean_answer(row.get(a))
    if not question or (need_answer and answer is None):
        raise UserError(f"{where} has an empty {'answer' if question else 'question'}")
    if isinstance(row.get(a), float) and abs(row[a]) > 2**53:
        raise UserError(f"{where}: the answer {answer} was rounded: write it in quotes")
    meta = {key: value for key, value in row.items() if key not in (q, a)}
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


# ---- --where


def read_condition(text: str) -> tuple[str, str]:
    key, _, want = text.partition("=")
    if not key or not want:
        raise UserError(f"--where {text!r}: write it as difficulty=5-9 or topic=Algebra")
    return key, want


def matches(problem: Problem, key: str, want: str) -> bool:
    """Whether a column has the value, or one in the range, or the topic among its levels.

    The first number of a text counts: `Level 5` matches level=5 and level=4-5.
    """
    if key not in problem.meta:
        names = ", ".join(problem.meta) or "none"
        raise UserError(f"--where {key}={want}: no column {key!r}; this set has: {names}")
    value, number = problem.meta[key], r"(-?\d+(?:\.\d+)?)"
    bounds = re.fullmatch(f"{number}(?:-{number})?", want)
    if not bounds:
        return want.lower() in [level.lower() for level in topic_levels(value)]
    low, high = float(bounds[1]), float(bounds[2] or bounds[1])
    first = re.search(number, str(value))
    return first is not None and low <= float(first[0]) <= high


def topic_levels(value) -> list[str]:
    """`Mathematics -> Algebra -> Groups` as its levels, the most general first."""
    parts = [] if value is None else str(value).split("->")
    return [part.strip() for part in parts if part.strip()]


# ---- Prompts


@dataclass(frozen=True)
class Prompt:
    """How a question is put to a model: as chat messages or, to a base model, as text."""

    agent: bool  # with the tool, or plain reasoning
    messages: tuple[dict, ...] = ()  # {role, content}; the last content has {question} in it
    text: str = ""  # in place of messages
    stops: tuple[str, ...] = ()  # a trace ends where the model writes one of them


BASE_STOPS = ("\nQuestion:", "\nProblem:", "\nUser:")  # base models go on with a question of theirs


def read_prompt(flags: AgentFlags) -> Prompt:
    """The prompt that --prompt, --few-shot and --no-agent ask for; ours are files in prompts/, too.

    The solved examples are earlier turns of the chat, which small models can imitate, or stand
    inside the instructions (`system`), as published for Qwen3-Thinking.
    """
    usual = "turns" if flags.model == "embedded" else "system"
    style, _, file = (flags.few_shot or usual).partition(":")
    if style not in ("turns", "system", "none"):
        style, file = usual, flags.few_shot
    if flags.prompt != "chat":
        prompt = read_prompt_file(flags.prompt, flags.agent)
        if flags.agent and CALL_OPEN not in str(prompt):
            raise UserError(f"--prompt {flags.prompt} knows no tool: add --no-agent")
        return prompt
    if not flags.agent:
        return read_prompt_file("plain", agent=False)
    prompt = read_prompt_file("turns" if style == "turns" else "agent", agent=True)
    if style == "none":
        return prompt
    *earlier, last = prompt.messages
    examples = read_examples(Path(file or HERE / "fewshot.txt"))
    if style == "turns":
        for question, solution in examples:
            earlier += [fill(last, question), {"role": "assistant", "content": solution}]
    else:
        solved = "\n\n---\n\n".join(f"Question: {q}\n\n{s}" for q, s in examples)
        content = f"{earlier[0]['content']}\n\nSolved examples:\n\n{solved}"
        earlier = [{"role": "system", "content": content}]
    return Prompt(True, (*earlier, last))


def fill(message: dict, question: str) -> dict:
    return {**message, "content": message["content"].replace("{question}", question)}


def read_examples(file: Path) -> list[tuple[str, str]]:
    """(question, solution) pairs of a file like fewshot.txt."""
    examples = []
    text = file.read_text(encoding="utf-8", errors="replace")
    for number, block in enumerate(re.split(r"\n---+\n", text), 1):
        question, _, solution = block.strip().partition("\n\n")
        if not question.startswith("Question:") or not solution.strip():
            raise UserError(
                f"{file}: example {number} is not `Question: ...`, a blank line, a solution"
            )
        examples.append((question.removeprefix("Question:").strip(), solution.strip()))
    return examples


def read_prompt_file(name: str, agent: bool) -> Prompt:
    """A prompt of prompts/ by its name, or a file: {messages or text, stops} or a bare list of
    messages in .json; anything else is plain text."""
    file = HERE / "prompts" / f"{name}.json"
    file = file if file.is_file() else Path(name)
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text) if file.suffix == ".json" else {"text": text, "stops": BASE_STOPS}
        found = {"messages": found} if isinstance(found, list) else found
        messages, text = tuple(found.get("messages", ())), found.get("text", "")
        prompt = Prompt(agent, messages, text, tuple(found.get("stops", ())))
        place = text or messages[-1]["content"]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"--prompt {name}: {first_line(error)}; see prompts/ for the form"
        ) from None
    if place.count("{question}") != 1:
        raise UserError(f"--prompt {name}: it must hold {{question}} exactly once")
    return prompt


# ---- Tokens

SPLIT = "\ue000"  # a private-use character: where a look-alike of a control token is cut in two


@lru_cache(maxsize=4)
def control_tokens(tokenizer) -> re.Pattern | None:
    names = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    names |= set(tokenizer.all_special_tokens)
    longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    # A lookahead, so that names that overlap are all found.
    choices = "|".join(map(re.escape, longest_first))
    return re.compile(f"(?=({choices}))", re.S) if choices else None


def disarm(tokenizer, text: str) -> str:
    """Untrusted text with SPLIT after the first character of every added token's name in it.

    A literal `<|im_end|>` in a problem or in a snippet's output would otherwise be encoded as the
    token that ends the turn. Cut in two and encoded apart, it reads the same and controls nothing.
    """
    text, pattern = text.replace(SPLIT, ""), control_tokens(tokenizer)
    if pattern is None:
        return text
    cuts = [match.start() + 1 for match in pattern.finditer(text)]
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, None], strict=True)]
    return SPLIT.join(pieces)


def encode(tokenizer, text: str) -> list[int]:
    """Token ids, without begin- or end-of-text; pieces between SPLITs are encoded apart."""
    ids = []
    for piece in text.split(SPLIT):
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def render_prompt(tokenizer, prompt: Prompt, question: str) -> list[int]:
    """Ids up to where the assistant's turn begins. The question is untrusted, the rest is ours."""
    question = disarm(tokenizer, question)
    *earlier, last = prompt.messages or [{"content": prompt.text}]
    messages = [*earlier, fill(last, question)]
    if prompt.messages and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return encode(tokenizer, text)
    bos = []
    if tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False):
        bos = [tokenizer.bos_token_id]
    if prompt.text:
        return bos + encode(tokenizer, messages[-1]["content"])
    form = {"user": "Question: {}\n"}
    parts = [form.get(m["role"], "{}").format(m["content"]) for m in messages]
    return bos + encode(tokenizer, "\n\n".join(parts))


# ---- The command


@dataclass(kw_only=True)
class Flags(DataFlags):
    list: bool = False
    """Print the names of the sets, with ids and licences, and end."""
    show: int = 3
    """Print the first N problems."""
    stats: bool = False
    """Print lengths, and counts by every column with few values."""


def main() -> None:
    flags = parse(Flags, description="Show the problems of a set.")
    if flags.list:
        print(TABLE.strip())
        return
    problems = load_problems(flags, need_answer=False)
    for p in problems[: flags.show]:
        print(f"[{p.id}] {p.question}\n    answer: {p.answer}")
        notes = [f"{key}={value}" for key, value in p.meta.items() if len(str(value)) < 40]
        print(f"    {', '.join(notes)}\n")
    print(f"{flags.dataset}: {len(problems)} problems")
    if not flags.stats:
        return
    lengths = sorted(len(p.question) for p in problems)
    print(f"characters of a question: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")
    print(f"without an answer: {sum(p.answer is None for p in problems)}")
    for key in problems[0].meta:
        counts = Counter(str(p.meta.get(key)) for p in problems)
        if len(counts) <= 20:
            print(f"by {key}: {', '.join(f'{value} {n}' for value, n in counts.most_common())}")


if __name__ == "__main__":
    run_main(main)
