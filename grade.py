r"""Grading: find the answer in a model's text, decide whether it equals the gold one, and vote.

    python grade.py outputs.jsonl        # rows of `text` and `gold` (or `answer`)

The answer is the last \boxed{} that the model wrote. Whether it is the gold answer is for `same`
to say, a few rules from cheap to dear: words are compared as words and numbers exactly, lists and
tuples are taken apart and compared piece by piece. What is left are formulas: math-verify reads
the LaTeX and compares them.

A wrong answer taken for right is a reward for a mistake; a right one taken for wrong is only noise.
So a rule in doubt says no. And computer algebra on what a model wrote can run for ever or eat all
memory: `Grader` does it in processes that the kernel ends.

Left out: times of day, number bases, letters of multiple choice, conversion between units, and a
language model as judge, whose verdicts would not repeat.
"""

import contextlib
import json
import logging
import math
import os
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from queue import LifoQueue
from typing import NamedTuple

import tyro

from cli import UserError, parse, run_main

# ---- The answer in a text


def extract_answer(text: str) -> str | None:
    r"""The last complete, non-empty \boxed{} of a text, or None.

    >>> extract_answer(r"First \boxed{1}, no: \boxed{\frac{1}{2}}, and now \boxed{")
    '\\frac{1}{2}'
    """
    answer = None
    opened = []  # a stack of (is it a box's brace, where its content starts)
    for brace in re.finditer(r"(\\(?:boxed|fbox)\s*)?\{|\}|\\.", text, re.DOTALL):
        if brace[0].startswith("\\") and not brace[1]:  # \{ and \} are a set's, not LaTeX's
            continue
        if brace[0] != "}":
            opened.append((brace[1], brace.end()))
        elif opened:
            is_box, start = opened.pop()
            content = text[start : brace.start()].strip() if is_box else ""
            answer = content or answer
    return answer


# What tools were told and answered is not the model's answer.
TOOLS = re.compile(r"```(?:output|python|py).*?(?:```|\Z)|<tool_call>.*?(?:</tool_call>|\Z)", re.S)
ANNOUNCED = re.compile(r"(?:answer(?: is|:)|####)[ :*]*(.+?)\.?(?: I hope.*|<\|.*)?$", re.I | re.M)
FORMULA = re.compile(r"\$+([^$]*[\d\\][^$]*)\$|\\[(\[](.*?)\\[)\]]|(-?\d[\d,]*(?:[./]\d+)?%?)")


def fallback_answer(text: str) -> str | None:
    """A guess for a text without a box: the last formula or number after the last «answer is»,
    «answer:» or «####», else of the last line that has one.
    """
    prose = TOOLS.sub("", text)
    announced = ANNOUNCED.findall(prose)[-1:]
    for part in announced + prose.splitlines()[::-1]:
        found = FORMULA.findall(part)
        if found:
            return "".join(found[-1]).strip(" ,")
    return None


# ---- Tidy: one spelling for what LaTeX can write in many ways

# What stands for which commands and characters.
SPELLINGS = {
    "": "left right big bigl bigr Big Bigl Bigr bigg Bigg displaystyle textstyle limits",
    r"\text": "mathrm mathbf mathit textbf textit textrm textnormal operatorname mbox boxed",
    r"\frac": "dfrac tfrac cfrac",
    " ": "quad qquad \u2009",
    r"\le ": "leq leqslant ≤",
    r"\ge ": "geq geqslant ≥",
    r"\ne ": "neq ≠",
    "=": "in ∈",  # x \in [0, 1) names a value, as x = 5 does
    "∪": "cup",
    "≈": "approx simeq",
    "°": "circ degree",
    r"\infty ": "∞",
    r"\emptyset ": "varnothing ∅",
    "(": "langle",
    ")": "rangle",
    "-": "− –",
    r"\times ": "×",
    r"\cdot ": "· ⋅",
    r"\pi ": "π",
    r"\sqrt ": "√",
    "^2": "²",
}
SPELLING = {name: new for new, names in SPELLINGS.items() for name in names.split()}

# (pattern, replacement), in this order.
TIDY = [
    (r"(?<=\d)\s*(?:\{\s*,\s*\}|,?\s*\\!|\\,)\s*(?=\d{3}(?!\d))", ""),  # 14{,}916  32,\!349
    (r"\\\$\s*([\d.,]*\d)", r"\1\\text{dollars}"),
    (r"\\?\$|\\[()](?!\w)|\\!", ""),
    (r"(?<!\\)\\[,;:> ]|~", " "),
    (r"\\([A-Za-z]+)\.?|[^\x00-\x7f]", lambda m: SPELLING.get(m[1] or m[0], m[0])),
    (r"\*\*", "^"),
    (r"\\text\s*\{\s*\(?([A-Za-z]?)\)?\s*\}(?!\^)", r" \1"),  # one letter is a symbol
    (r"\\?%|\\text\s*\{\s*percent\s*\}|\b(?:percent|pct)\b", "%"),
    (r"\^\s*\{?\s*°\s*\}?|\\text\s*\{\s*degrees?\s*\}|\bdegrees?\b", "°"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"\\frac\s*(\w)\s*(?=[\w{\\])", r"\\frac{\1}"),  # \frac12, \frac1{2}
    (r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"),
    (r"(\d\.\d*)\\overline\s*\{(\d+)\}", lambda m: m[1] + 20 * m[2]),  # 0.1666... as a float's
    (r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+|(?<=[\d)])or(?=[\w(])", " , "),
    (r"\s*_\s*(?:\{\s*(\w+)\s*\}|(\w))", r"_{\1\2}"),
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"^([^=\d]*)≈", r"\1="),  # x ≈ 5 is a value of x, 1/3 ≈ 0.33 is 1/3
    (r"≈.*", ""),
    (r"\s+", " "),
]


@lru_cache(maxsize=10_000)
def tidy(text: str) -> str:
    """An answer without LaTeX's noise; its meaning stays."""
    if "\\begin" not in text:  # only a matrix needs a double backslash: this was escaped twice
        text = text.replace("\\\\", "\\")
    for pattern, new in TIDY:
        text = re.sub(pattern, new, text)
    text = text.strip(" ,;:").rstrip(" .")
    has_braces = text.startswith("{") and inside(text)
    return inside(text) if has_braces else text


def squeeze(text: str) -> str:
    """Text without the spaces that separate nothing: those beside a symbol."""
    return re.sub(r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])", "", text)


def depths(text: str) -> list[int]:
    """How many brackets are open behind each character; (0, 1] is a pair."""
    return list(accumulate((c in "([{") - (c in ")]}") for c in text))


def inside(text: str) -> str | None:
    r"""The text within the brackets around all of it, `1, 2` of (1, 2] and of \{1, 2\}; or None."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    ends = [i for i, depth in enumerate(depths(text)) if depth == 0]
    is_inside = text.startswith(("(", "[", "{")) and ends == [len(text) - 1]
    return text[1:-1].strip() if is_inside else None


def split(text: str, separators: str) -> list[str]:
    """text cut at the separators that stand outside all brackets."""
    parts = [""]
    for character, depth in zip(text, depths(text)):
        if depth == 0 and character in separators:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


# ---- Numbers: exact, and compared exactly

POWER = re.compile(r" ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?\{?([+-]?\d+)\}?$")  # \times 10^{3}
NUMBER = re.compile(r"[+-]? ?([1-9]\d{0,2}([, ]\d{3})+|\d+)(\.\d*)?(e[+-]?\d{1,4})?", re.IGNORECASE)


def number(text: str) -> Decimal | None:
    r"""The exact value of a number in digits, None for any other text.

    >>> number("1,234"), number("-2.50"), number(r"3 \times 10^{4}"), number("1/2")
    (Decimal('1234'), Decimal('-2.50'), Decimal('3E+4'), None)
    """
    text = POWER.sub(r"e\1", text)
    if len(text) > 1000 or not NUMBER.fullmatch(text):
        return None
    return Decimal(re.sub("[, ]", "", text))


def rounds(decimal: Decimal, exact: Fraction) -> bool:
    """Whether a decimal is an exact value, cut or rounded at its sixth digit or later.

    The last digits of a float are noise: 0.30000000000000004 is 0.3.
    """
    _, digits, exponent = decimal.as_tuple()
    if exponent >= 0 or len(digits) < 6:
        return False
    written = Fraction(decimal)
    noise = min(abs(exact), 10**6) / 10**12
    unit = Fraction(10) ** exponent  # of the last digit
    units = exact / unit
    is_cut = written / unit in (round(units), math.trunc(units))
    return is_cut or abs(written - exact) <= noise


# ---- The rules. Each takes two tidy answers: True or False is a verdict, None is «not my business»


def same(gold: str, answer: str) -> bool:
    """Whether an answer is equivalent to the gold one. May hang or raise anything: see Grader."""
    gold, answer = tidy(gold), tidy(answer)
    for rule in at_sight, same_words, same_named, same_measure, same_members:
        verdict = rule(gold, answer)
        if verdict is not None:
            return verdict
    return same_formula(gold, answer)


def at_sight(gold: str, answer: str) -> bool | None:
    """Equal strings, and numbers. Cheap, so Grader tries it before it asks a worker."""
    if not gold or not answer:
        return False
    if squeeze(gold) == squeeze(answer):
        return True
    x, y = number(gold), number(answer)
    if x is None or y is None:
        return None
    return x == y or rounds(x, Fraction(y)) or rounds(y, Fraction(x))


WORDS = re.compile(
    r"\\text ?\{[A-Za-z '.,-]+\}|[A-Z]{2,}|[A-Za-z]{4,}|[A-Za-z]{2,} [A-Za-z '.,-]+"
)  # `xy` is a product


def same_words(gold: str, answer: str) -> bool | None:
    """Words are compared as words, without case and punctuation: `east` is not `seat`."""
    equal = plain(gold) == plain(answer)
    is_word = WORDS.fullmatch(gold) or WORDS.fullmatch(answer)
    has_text = "\\text" in gold + answer
    return equal if is_word or (equal and has_text) else None


def plain(text: str) -> str:
    """Text in small letters, without \\text{} and punctuation; a point in 1.5 is none."""
    text = re.sub(r"\\text|[{}'\"!?]|[.,](?!\d)", " ", text.casefold())
    return squeeze(" ".join(text.split()))


def same_named(gold: str, answer: str) -> bool | None:
    """`x = 5` is 5 and not `y = 5`. Other equations are formulas."""
    (name, x), (other, y) = unname(gold), unname(answer)
    has_names = (x, y) != (gold, answer) and "=" not in x + y
    if not has_names or (name and other and squeeze(name) != squeeze(other)):
        return None
    return same(x, y)


OPERATIONS = "sin|cos|tan|log|ln|sqrt|sum|int|prod|cdot|times|pm|mp|infty|le|ge|ne|pi"


def unname(text: str) -> tuple[str, str]:
    r"""(name, value) of `x = 2 + 3 = 5`: ("x", "5"); ("", text) of anything else.

    Names are x, a_{37}, (p, q), |AB|, \overline{AB}, S:V, \Delta p: no digits and no operation.
    """
    name, *values = split(text, "=")
    is_list = len(values) > 1 and "," in text  # x = 1, y = 2
    bare = re.sub(rf"_\{{[^{{}}]*\}}|\\text\{{[^{{}}]*\}}|\\(?!{OPERATIONS})[A-Za-z]+", "x", name)
    if values and not is_list and re.fullmatch(r"[A-Za-z(),:/|{}'° ]+", bare):
        return name, values[-1]
    return "", text


# All names of a unit; the first stands for it.
UNITS = """m meter meters metre metres|cm centimeter centimeters centimetre centimetres
|mm millimeter millimeters|km kilometer kilometers kilometre kilometres|in inch inches
|ft foot feet|yd yard yards|mi mile miles|mph|s sec second seconds|min minute minutes
|h hr hrs hour hours|day days|week weeks|month months|year years|g gram grams
|kg kilogram kilograms|lb lbs pound pounds|oz ounce ounces|l liter liters litre litres
|ml milliliter milliliters|gallon gallons|dollar dollars|cent cents|euro euros"""
UNIT = {name: names.split()[0] for names in UNITS.split("|") for name in names.split()}
NOT_UNITS = """not no if mod than least most more or when for base sin cos tan
dozen hundred thousand million billion""".split()
MEASURE = re.compile(
    r"([^%°]*(?:[\d})|]|\\pi)) ?(?:([%°])|\\text ?\{([^{}]*)\}|([A-Za-z][A-Za-z. /]+))"
    r"(?: ?\^ ?\{? ?[23] ?\}?)?"
)
FACTORS = {"%": r" \cdot \frac{1}{100}", "°": r" \cdot \frac{\pi}{180}"}


def same_measure(gold: str, answer: str) -> bool | None:
    r"""`5 cm` is 5 and 5 centimeters, not 5 m; `25%` is 25 and 1/4; `90°` is 90 and \pi/2."""
    (x, unit), (y, other) = split_unit(gold), split_unit(answer)
    if (x, y) == (gold, answer):
        return None
    if unit and other and unit != other:
        return False
    share = number(x)
    is_share = other == "%" and share is not None and 0 < share < 1  # 0.5 is 50%, not 0.5%
    if same(x, y) and not is_share:
        return True
    x += FACTORS.get(unit, "")
    y += FACTORS.get(other, "")
    return unit != other and same(x, y)


def split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit); the unit is "" where there is none or an unknown one: `5 \text{ apples}`."""
    match = MEASURE.fullmatch(text)
    if match is None or set(NOT_UNITS) & set(re.findall("[a-z]+", text)):
        return text, ""
    value, symbol, marked, bare = match.groups("")
    words = re.findall("[a-z]+", (marked + bare).lower())
    known = " ".join(UNIT[word] for word in words if word in UNIT)
    if bare and not known:
        return text, ""
    return value.strip(), symbol or known


SET = "\\}"


def same_members(gold: str, answer: str) -> bool | None:
    """Tuples in order, sets and lists in any: `x = 1, y = 2` is `y = 2, x = 1` and (1, 2)."""
    (kind, golds), (other, answers) = members(gold), members(answer)
    if kind and other and kind != other:
        return False  # [0, 1) is not (0, 1)
    if 1 in (len(golds), len(answers)) and SET not in (kind, other):
        return None
    if len(golds) != len(answers):
        return False
    names = {squeeze(unname(part)[0]) for part in golds + answers}
    is_tuple = {kind, other} - {"", SET}
    if is_tuple or ("" in names and len(names) > 1):
        return all(map(same, golds, answers))
    for part in golds:
        match = next((other for other in answers if same(part, other)), None)
        if match is None:
            return False
        answers.remove(match)
    return True


def members(text: str) -> tuple[str, list[str]]:
    r"""(kind, members) of a tuple "()", an interval "[)", a set, a list or union ""."""
    inner = inside(text)
    parts = split(inner or text, ";")
    if len(parts) == 1:
        parts = split(inner or text, ",∪")
    kind = text[0] + text[-1] if inner else ""
    if len(parts) == 1 and kind != SET:
        return "", [text]
    written = []
    for part in filter(None, parts):
        signs = "+-" if "\\pm" in part else "+"
        written += [part.replace("\\pm", sign) for sign in signs]
    return kind, written


# ---- Formulas

# What math-verify's parser does not read, or reads in another way than people mean it.
FOR_THE_PARSER = [
    (r"(?<![\\A-Za-z])(?:np\.|math\.)?(arc)?(sin|cos|tan|sqrt|log|ln|exp)(?![A-Za-z])", r"\\\1\2 "),
    (r"(\\sqrt|\^) ?\(([^()]*)\)", r"\1{\2}"),
    (r"\^ ?(-?\d+)", r"^{\1}"),
    (r"([A-Za-z])('+|\^ ?\{?(?:\\prime ?)+\}?)", r"\1_{prime}"),
    (r"°", r" \\cdot \\frac{\\pi}{180} "),
    (r"(\d+) ?(\\frac ?\{\d+\} ?\{\d+\})", r"(\1+\2)"),  # a mixed number
]


def same_formula(gold: str, answer: str) -> bool:
    """Two texts that have a value, or are an equation, an inequality, a set, a matrix."""
    import sympy
    from math_verify import verify

    both = re.sub(r"_\{[^{}]*\}", "", f"{gold} {answer}")
    has_i = re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", both) is not None
    # Unknowns are real, except in equations: x^2 + 1 = 0 and x^2 + 2 = 0 have the same real
    # solutions.
    is_real = None if has_i or "=" in both else True
    x = formula(gold, has_i, is_real)
    y = formula(answer, has_i, is_real)
    if isinstance(x, sympy.Expr) != isinstance(y, sympy.Expr):
        return False  # an equation or a set is no value
    if is_rounded(gold, y) or is_rounded(answer, x):
        return True
    # There are no floats left that it would round, and other numbers it compares to 60 digits.
    return verify(x, y, numeric_precision=60, allow_set_relation_comp=True, timeout_seconds=None)


def formula(text: str, has_i: bool, is_real: bool | None):
    """The sympy object that math-verify's parser makes of LaTeX, with exact numbers in it."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    for pattern, new in FOR_THE_PARSER:
        text = re.sub(pattern, new, text)
    if re.search(r"[\d.] +[\d.]|\d_", text):
        raise ValueError("two numbers side by side, or a number base")  # it would take them as one
    config = ConversionConfig(lowercase_symbols=False)
    found = latex2sympy(text, is_real=is_real, normalization_config=None, conversion_config=config)
    exact = {value: sympy.Rational(str(value)) for value in found.atoms(sympy.Float)}
    if has_i:
        exact |= {symbol: sympy.I for symbol in found.free_symbols if symbol.name == "i"}
    return found.xreplace(exact)


def is_rounded(text: str, exact) -> bool:
    r"""Whether a text is a decimal that rounds a real number: 1.41421356 for \sqrt{2}."""
    decimal = number(text)
    if decimal is None or not (exact.is_number and exact.is_real):
        return False
    return rounds(decimal, Fraction(str(exact.evalf(40))))


# ---- Grading in processes that can be killed


class Verdict(NamedTuple):
    equal: bool
    status: str  # ok | none (no answer) | timeout | memory | error | crashed; all but ok are wrong


class Grader:
    """Verdicts on (gold, answer) pairs; equal pairs are decided once.

    Its workers are fresh processes of this file (by exec: nothing of vLLM or CUDA is in them). For
    each pair a worker sets a timer on its own CPU time, whose signal it does not handle: when time
    is up the kernel ends it, whatever it is doing, and a slow machine changes no verdict.
    """

    def __init__(self, workers: int = 2, seconds: float = 2.0, memory: int = 2 << 30):
        self.command = [sys.executable, __file__, "--worker", str(seconds), str(memory)]
        self.known: dict[tuple, Future] = {}
        self.threads = ThreadPoolExecutor(workers)
        self.waiting = LifoQueue()  # workers without a pair; None where one has to start
        for _ in range(workers):
            self.waiting.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.threads.shutdown(cancel_futures=True)  # waits for the pairs at work: seconds
        for worker in filter(None, self.waiting.queue):
            worker.kill()
            worker.wait()

    def __call__(self, gold: str, answer: str | None) -> Verdict:
        return self.submit(gold, answer).result()

    def submit(self, gold: str, answer: str | None) -> Future:
        """A Future[Verdict]."""
        pair = gold, answer
        if pair not in self.known:
            self.known[pair] = self.threads.submit(self.decide, gold, answer)
        return self.known[pair]

    def decide(self, gold: str, answer: str | None) -> Verdict:
        if answer is None:
            return Verdict(False, "none")
        if len(gold) + len(answer) < 1000:
            equal = at_sight(tidy(gold), tidy(answer))
            if equal is not None:
                return Verdict(equal, "ok")
        verdict = None
        for _ in range(5):
            verdict = verdict or self.ask(gold, answer)
        return verdict or Verdict(False, "crashed")

    def ask(self, gold: str, answer: str) -> Verdict | None:
        """A worker's verdict; None where somebody has killed it, now or while it waited."""
        worker = self.waiting.get() or self.start()
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(json.dumps([gold, answer]) + "\n")
        reply = worker.stdout.readline()
        self.waiting.put(worker if reply else None)
        if reply:
            return Verdict(*json.loads(reply))
        death = -worker.wait()
        if death in (signal.SIGKILL, signal.SIGTERM):
            return None
        return Verdict(False, "timeout" if death == signal.SIGPROF else "crashed")

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,  # a line leaves when it is written
            start_new_session=True,  # Ctrl-C is for the parent
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's orders, hence verdicts, repeat
        )


def work(seconds: float, memory: int) -> None:
    """A worker: a verdict for each pair on standard input, until that closes."""
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    logging.disable()
    os.nice(5)
    same("\\sin x", "\\cos x")  # the imports are not in the time of the first pair
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF's default action ends the process
        try:
            verdict = Verdict(same(*json.loads(line)), "ok")
        except MemoryError:
            verdict = Verdict(False, "memory")
        except Exception:  # whatever computer algebra raises on what a model wrote
            verdict = Verdict(False, "error")
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


# ---- Votes


class Vote(NamedTuple):
    winner: str | None  # of a tie, the answer that was sampled first
    clusters: list[tuple[str, int, list[int]]]  # (first answer, votes, indices), most votes first


def vote(answers: list[str | None], grader: Grader | None = None) -> Vote:
    """Cluster answers by equivalence with a cluster's first member; None does not vote."""
    if grader is None:
        with Grader(workers=1) as grader:
            return vote(answers, grader)
    clusters: dict[str, list[int]] = {}  # first answer -> indices
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        home = next((first for first in clusters if grader(first, answer).equal), answer)
        clusters.setdefault(home, []).append(i)
    ranked = [(first, len(indices), indices) for first, indices in clusters.items()]
    ranked.sort(key=lambda cluster: -cluster[1])
    winner = ranked[0][0] if ranked else None
    return Vote(winner, ranked)


# ---- The command line


@dataclass(kw_only=True)
class Flags:
    """Grade answers made elsewhere."""

    file: tyro.conf.Positional[Path]
    """Rows (.jsonl) of `text`, and `gold` or `answer`."""
    out: Path | None = None
    """The rows with their verdicts; without this flag FILE.graded.jsonl."""
    fallback: bool = False
    """Where no box is found, guess the answer from the text's end."""


def read_rows(path: Path) -> list[dict]:
    """The rows of a file, each with `text` and `gold`."""
    rows = []
    try:
        for line in filter(bytes.strip, path.open("rb")):  # our own files begin with an empty one
            row = json.loads(line)
            gold = row["gold"] if "gold" in row else row["answer"]
            rows.append({**row, "gold": str(gold), "text": str(row["text"])})
    except (ValueError, TypeError, KeyError):
        where = f"{path}: row {len(rows) + 1}"
        raise UserError(f"{where} must be an object with `text`, and `gold` or `answer`") from None
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def main() -> None:
    flags = parse(Flags)
    rows = read_rows(flags.file)
    with Grader() as grader:
        for row in rows:
            guess = fallback_answer(row["text"]) if flags.fallback else None
            row["extracted"] = extract_answer(TOOLS.sub("", row["text"])) or guess
            grader.submit(row["gold"], row["extracted"])
        for row in rows:
            row["correct"], row["grading"] = grader(row["gold"], row["extracted"])
    out = flags.out or flags.file.with_suffix(".graded.jsonl")
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    right = sum(row["correct"] for row in rows)
    print(f"{right} of {len(rows)} right, {100 * right / len(rows):.1f} %")
    counts = Counter(row["grading"] for row in rows)
    print(", ".join(f"{status}: {count}" for status, count in counts.items()))
    print(f"written: {out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(float(sys.argv[2]), int(sys.argv[3]))
    else:
        run_main(main)
