"""Take out of a training set what stands in benchmarks, word for word or nearly so.

    python extras/decontaminate.py --dataset deepmath-103k --against math500,aime --out clean.jsonl

A question becomes a list of tokens (words, numbers, operators; LaTeX's spacing, fonts and synonyms
are gone). It is removed when it meets a benchmark question by one of four tests, in this order:

  exact    the same tokens
  ngram    at least --containment of the benchmark question's 8-grams are in it: it is quoted
  jaccard  Jaccard similarity of their 3-grams at least --jaccard: edited here and there
  numbers  the same numbers in the same order (three, or ten digits), and at least --overlap of the
           words longer than three letters: reworded

OUT.removed.jsonl has the removed rows with match, test and value: read it, a threshold is a
judgement. Left out: translations, the same wording with other numbers, LLM judges.
"""

import json
import multiprocessing
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import DataFlags, check_range, parse, run_main  # noqa: E402
from data import load_problems  # noqa: E402


@dataclass(kw_only=True)
class Flags(DataFlags):
    against: str
    """Benchmarks, as for --dataset, with commas between them."""
    out: str
    """The clean rows (.jsonl); beside it OUT.removed.jsonl."""
    jaccard: float = 0.5
    """Near-duplicate from this similarity of 3-grams on."""
    containment: float = 0.5
    """Quoted from this share of the benchmark question's 8-grams on."""
    overlap: float = 0.3
    """Reworded from this share of common words on, the numbers being equal."""


SILENT = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|text(?:bf|it|rm)?|math(?:rm|bf|it|cal|bb)|quad"
    r"|qquad|operatorname)(?![a-z])|\\[,;:! ]|[${}~]"
)
TOKEN = re.compile(r"\\?[^\W\d_]+|\d+(?:\.\d+)?|[-+*/=<>^_×·−÷|%]")
SAME = "dfrac frac tfrac frac leq le geq ge neq ne times * cdot * × * · * − - ÷ / div /".split()
SYNONYMS = dict(zip(SAME[::2], SAME[1::2]))


def tokens_of(question: str) -> list[str]:
    text = SILENT.sub(" ", unicodedata.normalize("NFKC", question).lower())
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)  # 1,234
    names = [token.removeprefix("\\") for token in TOKEN.findall(text)]
    return [SYNONYMS.get(name, name) for name in names]


def grams(tokens: list[str], n: int) -> set[str]:
    """The set of n-grams; a shorter text is one gram."""
    return {" ".join(tokens[i : i + n]) for i in range(max(1, len(tokens) - n + 1))}


class Question:
    def __init__(self, text: str, benchmark: str = ""):
        self.text, self.benchmark, tokens = text, benchmark, tokens_of(text)
        self.exact = " ".join(tokens)
        self.quotes = grams(tokens, 8) if len(tokens) >= 8 else set()
        self.shingles = grams(tokens, 3)
        self.numbers = tuple(token for token in tokens if token[0].isdigit())
        self.words = {token for token in tokens if len(token) > 3 and token[0].isalpha()}


class Index:
    """Benchmark questions, found in four ways: each a dict from what is looked up to questions."""

    def __init__(self, flags: Flags):
        self.flags, self.questions = flags, []
        self.exact, self.quotes, self.shingles, self.numbers = (defaultdict(list) for _ in range(4))

    def add(self, question: Question) -> None:
        self.questions.append(question)
        self.exact[question.exact].append(question)
        for gram in question.quotes:
            self.quotes[gram].append(question)
        for gram in question.shingles:
            self.shingles[gram].append(question)
        if len(question.numbers) >= 3 or sum(map(len, question.numbers)) >= 10:
            self.numbers[question.numbers].append(question)

    def match(self, text: str) -> tuple[str, float, Question] | None:
        """(test, value, benchmark question) of the first test that is met; None for a clean one."""
        q = Question(text)
        for other in self.exact.get(q.exact, ()):
            return "exact", 1.0, other
        for other, n in Counter(o for g in q.quotes for o in self.quotes.get(g, ())).items():
            value = n / len(other.quotes)
            if value >= self.flags.containment:
                return "ngram", value, other
        for other, n in Counter(o for g in q.shingles for o in self.shingles.get(g, ())).items():
            value = n / (len(q.shingles) + len(other.shingles) - n)  # both / one of them
            if value >= self.flags.jaccard:
                return "jaccard", value, other
        for other in self.numbers.get(q.numbers, ()):
            value = len(q.words & other.words) / max(1, min(len(q.words), len(other.words)))
            if value >= self.flags.overlap:
                return "numbers", value, other
        return None


def match_one(text: str):
    return INDEX.match(text)  # a global: the worker processes inherit it


def main() -> None:
    global INDEX
    flags = parse(Flags, description="Remove benchmark problems from a training set.")
    check_range(flags, 1e-9, 1, "jaccard", "containment", "overlap")
    INDEX = Index(flags)
    for name in flags.against.split(","):
        for problem in load_problems(DataFlags(dataset=name), need_answer=False):
            INDEX.add(Question(problem.question, Path(name).stem))
    problems = load_problems(flags, need_answer=False)
    print(f"{len(problems)} problems against {len(INDEX.questions)}", file=sys.stderr, flush=True)

    out, removed = Path(flags.out), Path(flags.out).with_suffix(".removed.jsonl")
    tests, met = Counter(), set()
    fork = multiprocessing.get_context("fork")
    with fork.Pool() as pool, open(out, "w") as clean, open(removed, "w") as report:
        matches = pool.imap(match_one, (p.question for p in problems), chunksize=200)
        for problem, found in zip(problems, matches):
            row = problem.meta | {"question": problem.question, "answer": problem.answer}
            if found is None:
                clean.write(json.dumps(row) + "\n")
                continue
            test, value, other = found
            row |= {"test": test, "value": value, "benchmark": other.benchmark, "match": other.text}
            report.write(json.dumps(row) + "\n")
            tests[test] += 1
            met.add((other.benchmark, other.text))
    print(f"{tests.total()} of {len(problems)} removed {dict(tests)}: {out}, {removed}")
    hits = Counter(benchmark for benchmark, _ in met)
    for benchmark, size in Counter(other.benchmark for other in INDEX.questions).items():
        print(f"  {benchmark}: {hits[benchmark]} of {size} questions met")


if __name__ == "__main__":
    run_main(main)
