"""Take out of a training set what stands in benchmarks, word for word or nearly so.

    python extras/decontaminate.py --dataset deepmath-103k --against math500,aime,amc23,minerva,olympiadbench --out clean.jsonl
    python extras/decontaminate.py --dataset rows.jsonl --against benchmark.jsonl --out clean.jsonl

Every question becomes a list of tokens (words, numbers, operators; LaTeX's spacing, fonts and synonyms are gone). A training
question is removed when it meets a benchmark question by one of four tests, in this order:

  exact     the same tokens
  ngram     at least --containment of the benchmark question's 8-grams occur in it: quoted inside a longer text
  minhash   Jaccard similarity of their sets of 3-grams at least --jaccard: edited here and there. MinHash finds the
            candidates (datasketch), the similarity that decides is the exact one
  numbers   the same numbers in the same order, at least three of them or ten digits, and at least --overlap of the words:
            the sentence was reworded. Words of three letters or fewer do not count

One pass over the training set, against an index of the benchmarks, on all cores. OUT.removed.jsonl names every removed
question with its match, the test and its value: read it, a threshold is a judgement. Left out: translation, other
numbers in the same wording (a new problem by our reading), embeddings and LLM judges.
"""

import json
import multiprocessing
import os
import re
import sys
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Parser, Problem, UserError, add_data_flags, load, load_from_flags, run_main  # noqa: E402

NGRAM, SHINGLE, PERMUTATIONS = 8, 3, 64
SYNONYMS = {
    "dfrac": "frac",
    "tfrac": "frac",
    "leq": "le",
    "geq": "ge",
    "neq": "ne",
    "times": "*",
    "cdot": "*",
    "×": "*",
    "·": "*",
    "−": "-",
    "÷": "/",
    "div": "/",
    "lbrack": "[",
    "rbrack": "]",
}
SILENT = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|text(?:bf|it|rm)?|math(?:rm|bf|it|cal|bb)|quad|qquad|operatorname)(?![a-z])|\\[,;:! ]|[${}~]"
)
TOKEN = re.compile(r"\\?[a-z]+|\d+(?:\.\d+)?|[-+*/=<>^_×·−÷|%]")


def tokens_of(question: str) -> list[str]:
    """Words, numbers and operators of a question, without case, punctuation, LaTeX spacing, fonts and synonyms."""
    text = SILENT.sub(" ", unicodedata.normalize("NFKC", question).lower())
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)  # 1,234
    return [
        SYNONYMS.get(token, token) for token in (t.removeprefix("\\") for t in TOKEN.findall(text))
    ]


def grams(tokens: list[str], n: int) -> set[str]:
    """The set of n-grams; a shorter text is one gram."""
    return {" ".join(tokens[i : i + n]) for i in range(max(1, len(tokens) - n + 1))}


def numbers_of(tokens: list[str]) -> tuple[str, ...]:
    return tuple(t for t in tokens if t[0].isdigit())


def words_of(tokens: list[str]) -> set[str]:
    return {t for t in tokens if len(t) > 3 and t[0].isalpha()}


def minhash(shingles: set[str]):
    from datasketch import MinHash

    result = MinHash(num_perm=PERMUTATIONS, scheme="affine32", hashfunc=zlib.crc32)
    result.update_batch([s.encode() for s in shingles])
    return result


@dataclass
class Index:
    """Benchmark questions, findable in four ways. All lists hold positions in `items`."""

    jaccard: float
    containment: float
    overlap: float
    items: list[tuple[str, str]] = field(default_factory=list)  # (benchmark, question)
    tokens: list[list[str]] = field(default_factory=list)
    shingles: list[set[str]] = field(default_factory=list)
    exact: dict[str, int] = field(default_factory=dict)
    by_gram: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    gram_count: list[int] = field(default_factory=list)
    by_numbers: dict[tuple[str, ...], list[int]] = field(default_factory=lambda: defaultdict(list))
    lsh: object = None

    def add(self, benchmark: str, question: str) -> None:
        from datasketch import MinHashLSH

        # A little below the threshold: what the sketch overlooks, nothing later finds.
        self.lsh = self.lsh or MinHashLSH(
            threshold=max(0.1, self.jaccard - 0.1), num_perm=PERMUTATIONS
        )
        at, tokens = len(self.items), tokens_of(question)
        self.items.append((benchmark, question))
        self.tokens.append(tokens)
        self.shingles.append(grams(tokens, SHINGLE))
        self.exact.setdefault(" ".join(tokens), at)
        long_grams = grams(tokens, NGRAM) if len(tokens) >= NGRAM else set()
        self.gram_count.append(len(long_grams))
        for gram in long_grams:
            self.by_gram[gram].append(at)
        numbers = numbers_of(tokens)
        if len(numbers) >= 3 or sum(map(len, numbers)) >= 10:
            self.by_numbers[numbers].append(at)
        self.lsh.insert(at, minhash(self.shingles[-1]))

    def match(self, question: str) -> tuple[str, float, int] | None:
        """(test, value, position) of the first test that a question fails; None for a clean one."""
        tokens = tokens_of(question)
        if (at := self.exact.get(" ".join(tokens))) is not None:
            return "exact", 1.0, at
        shared = Counter(at for gram in grams(tokens, NGRAM) for at in self.by_gram.get(gram, ()))
        if shared:
            value, at = max((count / self.gram_count[at], at) for at, count in shared.items())
            if value >= self.containment:
                return "ngram", value, at
        shingles = grams(tokens, SHINGLE)
        close = [
            (len(shingles & self.shingles[at]) / len(shingles | self.shingles[at]), at)
            for at in self.lsh.query(minhash(shingles))
        ]
        if close and max(close)[0] >= self.jaccard:
            return "minhash", *max(close)
        words = words_of(tokens)
        for at in self.by_numbers.get(numbers_of(tokens), ()):
            other = words_of(self.tokens[at])
            value = len(words & other) / max(1, min(len(words), len(other)))
            if value >= self.overlap:
                return "numbers", value, at
        return None


INDEX: Index | None = None  # the worker processes inherit it


def match_one(question: str):
    return INDEX.match(question)


def main() -> int:
    global INDEX
    parser = Parser(
        description="Remove benchmark problems and their near-duplicates from a training set."
    )
    add_data_flags(parser, default=None)
    parser.add_argument(
        "--against", required=True, metavar="NAME,FILE,...", help="benchmarks, as for --dataset"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="the clean rows; beside it FILE.removed.jsonl",
    )
    parser.add_argument(
        "--jaccard",
        type=float,
        default=0.5,
        metavar="X",
        help="near-duplicate from this similarity of 3-grams on (default: 0.5)",
    )
    parser.add_argument(
        "--containment",
        type=float,
        default=0.5,
        metavar="X",
        help="quoted from this share of the benchmark's 8-grams on (default: 0.5)",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.3,
        metavar="X",
        help="reworded from this share of common words on, numbers being equal (default: 0.3)",
    )
    args = parser.parse_args()
    if args.dataset is None:
        raise UserError("--dataset is missing: the training set to clean")
    for name in ("jaccard", "containment", "overlap"):
        if not 0 < getattr(args, name) <= 1:
            raise UserError(f"--{name} must be above 0 and at most 1, not {getattr(args, name)}")
    try:
        import datasketch  # noqa: F401
    except ImportError:
        raise UserError(
            "the package `datasketch` is missing: run `make setup`, or pip install datasketch"
        ) from None
    started, INDEX = time.monotonic(), Index(args.jaccard, args.containment, args.overlap)
    for name in filter(None, args.against.split(",")):
        for p in load(name, need_answer=False):
            INDEX.add(Path(name).stem if Path(name).exists() else name, p.question)
    problems = load_from_flags(args, need_answer=False)
    print(
        f"{len(problems)} problems against {len(INDEX.items)}; index built in {time.monotonic() - started:.0f} s",
        file=sys.stderr,
        flush=True,
    )

    counts, removed, total = (
        Counter(),
        args.out.with_suffix(".removed.jsonl"),
        Counter(benchmark for benchmark, _ in INDEX.items),
    )
    clean_part, removed_part = (path.with_name(path.name + ".part") for path in (args.out, removed))
    hit: dict[str, set[int]] = defaultdict(set)
    with (
        multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool,
        clean_part.open("w") as clean,
        removed_part.open("w") as report,
    ):
        for done, (p, found) in enumerate(
            zip(
                problems,
                pool.imap(match_one, (p.question for p in problems), chunksize=200),
                strict=True,
            ),
            1,
        ):
            if found is None:
                clean.write(json.dumps(row_of(p), ensure_ascii=False, default=str) + "\n")
            else:
                reason, value, at = found
                benchmark, question = INDEX.items[at]
                counts[reason] += 1
                hit[benchmark].add(at)
                report.write(
                    json.dumps(
                        {
                            "id": p.id,
                            "question": p.question,
                            "benchmark": benchmark,
                            "match": question,
                            "test": reason,
                            "value": round(value, 3),
                        },
                        ensure_ascii=False,
                    )
                    + "\n"
                )
            if done % 20_000 == 0:
                print(
                    f"{done} of {len(problems)}, {sum(counts.values())} removed, {time.monotonic() - started:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    clean_part.replace(args.out), removed_part.replace(removed)
    print(
        f"{sum(counts.values())} of {len(problems)} removed ({', '.join(f'{n} {reason}' for reason, n in counts.most_common()) or 'none'}); "
        f"{time.monotonic() - started:.0f} s; {args.out}, {removed}"
    )
    for benchmark, size in total.items():
        print(f"  {benchmark}: {len(hit[benchmark])} of {size} questions met")
    return 0


def row_of(p: Problem) -> dict:
    return {
        "question": p.question,
        "answer": p.answer,
        **{k: v for k, v in p.meta.items() if k not in ("question", "answer")},
    }


if __name__ == "__main__":
    run_main(main)
