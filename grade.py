r"""Grading: find the answer in a model's text, decide whether it equals the gold one, and vote.

    python grade.py outputs.jsonl        # rows of `text` and `gold` (or `answer`)

The answer is the last \boxed{} that the model wrote. Whether it is the gold answer is for `same`
to say, a few rules from cheap to dear: words are compared as words and numbers exactly, lists and
tuples are taken apart and compared piece by piece. What is left are formulas: math-verify reads
the LaTeX and compares them.

A wrong answer taken for right is a reward for a mistake; a right one taken for wrong is only noise.
So a rule in doubt says no. And computer algebra on what a model wrote can run for ever or eat all
memory: `Grader` does it in processes that the kernel ends.

Left out: answers without a box, times of day, number bases, letters of multiple choice, conversion
between units, and a language model as judge, whose verdicts would not repeat.
"""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import tyro

from cli import UserError, parse, run_main
from data import read_file


# ---- The answer in a text
def extract_answer(text: str) -> str | None:
    r"""The last complete, non-empty \boxed{} of a text, or None.

    >>> extract_answer(r"First \boxed{1}, no: \boxed{\frac{1}{2}}, and now \boxed{")
    '\\frac{1}{2}'
    """
    answer = None
    opened = []  # a stack of (is it a box's brace, where its content starts)
    for brace in re.finditer(r"(\\+(?:boxed|fbox)\s*)?\{|\}|\\.", text):
        if brace[0] == "{" or brace[1]:
            opened.append((brace[1], brace.end()))
        elif brace[0] == "}" and opened:
            is_box, start = opened.pop()
            content = is_box and text[start : brace.start()].strip()
            answer = content or answer
    return answer


# ---- Tidy: one spelling for what LaTeX can write in many ways
# First these, then math-verify's own (\left, \dfrac, \mathrm, \frac12, `x and y`, percent ...).
SPELLINGS = {
    "−": "-",
    "∞": r"\infty ",
    "≈": r"\approx ",
    "√": r"\sqrt ",
    "**": "^",
    "'": "_{prime}",  # math-verify would drop it
    r"\in ": "=",  # x \in [0, 1) names a value, as x = 5 does
    r"\mbox": r"\text",
    r"\langle": "(",
    r"\rangle": ")",
    r"\varnothing": r"\emptyset",
}

# Then pattern -> replacement, in this order. A letter in \text is a symbol, if it is no unit.
TIDY = {
    r"(?<=\d)\s*\\,\s*(?=\d{3}(?!\d))": "",  # 32\,349
    r"(?:(?<!\\)\\(?:[,;:]|q?quad|[bB]igg?[lrm]?(?![a-zA-Z]))|\s)+": " ",
    r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\\text\s*\{\s*degrees?\s*\}|\bdegrees?\b": "°",
    r"([_^])\s*(-?\d+|\w)": r"\1{\2}",
    r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan)|log|ln|exp)(?![A-Za-z])": r"\\\1 ",
    r"(\d\.\d*)\\(?:overline|bar)\s*\{(\d+)\}": lambda m: m[1] + 20 * m[2],  # 0.1666..., a float
    r"^([^=\d]*)\\approx": r"\1=",  # x ≈ 5 is a value of x, 1/3 ≈ 0.33 is 1/3
    r"\\approx(?:(?!, |;).)*": "",
    r"(?!(?<=[\d} ])\\text\s*\{ ?[mshgL] ?\})\\text\s*\{\s*\(?([A-Za-z]?)\)?\s*\}(?!\^)": r" \1",
    r"^[ ,;:=]+|[ .,;:\\]+$": "",
    r"(?<![A-Za-z0-9,]) +| +(?![A-Za-z0-9])": "",  # spaces that separate nothing
}


def tidy(text: str) -> str:
    """An answer without LaTeX's noise; its meaning stays."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex

    text = re.sub(r"(√|\\sqrt) *(\d+|\([^()]*\))", r"\\sqrt{\2}", text)  # √12 is not √1 times 2
    text = re.sub(r"frac\\pi *(\d(?!\d)|\{)", r"frac{\\pi}\1", text)  # \frac\pi12 is in doubt
    for spelling, usual in SPELLINGS.items():
        text = text.replace(spelling, usual)
    text = re.sub(r"\\\$\s*([\d.,]*\d)", r"\1\\text{dollars}", text)
    config = NormalizationConfig(malformed_operators=True, boxed="none")
    text = normalize_latex(text, config)
    for pattern, new in TIDY.items():
        text = re.sub(pattern, new, text)
    return text


def split(text: str, separators: str) -> list[str]:
    """text cut at the separators that stand outside all brackets; (0, 1] is a pair of them."""
    depth = 0
    parts = [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in separators:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


# ---- Numbers: exact, and compared exactly
POWER = r"(?:\\times|\\cdot|\*|x) ?10\^\{?([+-]?\d+)\}?$"
NUMBER = r"(?i)[+-]?([1-9]\d{0,2}([, ]\d{3})+|\d+)(\.\d*)?(e[+-]?\d{1,4})?"


def number(text: str) -> Decimal | None:
    r"""The exact value of a number in digits, None for any other text.

    >>> number("1,234"), number("-2.50"), number(r"3\times10^{4}"), number("1/2")
    (Decimal('1234'), Decimal('-2.50'), Decimal('3E+4'), None)
    """
    text = re.sub(POWER, r"e\1", text)
    if not re.fullmatch(NUMBER, text):
        return None
    return Decimal(re.sub("[, ]", "", text))


def rounds(decimal: Decimal, exact: Fraction) -> bool:
    """Whether a decimal of six digits or more is an exact value, rounded or cut."""
    _, digits, exponent = decimal.as_tuple()
    if exponent >= 0 or len(digits) < 6:
        return False
    written = Fraction(decimal)
    unit = Fraction(10) ** exponent  # of the last digit
    is_cut = written / unit in (round(exact / unit), int(exact / unit))
    # The last digits of a float are noise: 0.30000000000000004 is 0.3.
    return is_cut or abs(written - exact) < min(abs(exact), 10**8) / 10**14


# ---- The rules. Each takes two tidy answers: True or False is a verdict, None is «not my business»
def same(gold: str, answer: str) -> bool:
    """Whether an answer is equivalent to the gold one. May hang or raise anything: see Grader."""
    gold, answer = tidy(gold), tidy(answer)
    for rule in same_number, same_words, same_named, same_measure, same_members:
        verdict = rule(gold, answer)
        if verdict is not None:
            return verdict
    return same_formula(gold, answer)


def same_number(gold: str, answer: str) -> bool | None:
    """Equal strings, and numbers. Cheap, so Grader tries it before it asks a worker."""
    if gold == answer:
        return gold != ""
    x = number(gold)
    y = number(answer)
    if x is None or y is None:
        return None
    return x == y or rounds(x, Fraction(y)) or rounds(y, Fraction(x))


WORDS = r"\\text\{[A-Za-z .,-]+\}|[A-Z]{2,}|[A-Za-z]{4,}|[A-Za-z]{2,} [A-Za-z .,-]+"
NOISE = r"\\text|[\s{}\"?]|(?<=[a-z]{2})!|[.,](?!\d)"  # a point in 1.5 is none


def same_words(gold: str, answer: str) -> bool | None:
    """Words are compared as words, without case and punctuation: `east` is not `seat`."""
    x = re.sub(NOISE, " ", gold.casefold()).split()
    y = re.sub(NOISE, " ", answer.casefold()).split()
    is_word = re.fullmatch(WORDS, gold) or re.fullmatch(WORDS, answer)
    has_text = "\\text" in gold + answer
    return x == y if is_word or (x == y and has_text) else None


# x, a_{37}, f(2), f^{-1}, (p, q), |AB|, \overline{AB}, \Delta p: no other digits, no operation.
OPERATION = r"\\(?:sin|cos|tan|log|ln|sqrt|frac|le|ge|ne|not|pm|sum|int|cdot|times)"
NAME = rf"(?!.*{OPERATION})(?:_\{{[^{{}}]*\}}|\(-?\d+\)|\^\{{-1\}}|[A-Za-z\\(),:/|{{}}° ])+"


def same_named(gold: str, answer: str) -> bool | None:
    """`x = 5` is 5 and not `y = 5`. Other equations are formulas."""
    name, x = unname(gold)
    other, y = unname(answer)
    if not (name or other) or "=" in x + y or (name and other and name != other):
        return None
    return same(x, y)


def unname(text: str) -> tuple[str, str]:
    """(name, value) of `x = 2 + 3 = 5`: ("x", "5"); ("", text) of anything else."""
    name, *values = split(text, "=")
    is_list = len(values) > 1 and re.search(r"[,;]|\d [A-Za-z]", text)  # x = 1, y = 2
    if values and not is_list and re.fullmatch(NAME, name):
        return name, values[-1]
    return "", text


# All names of a unit but the plural; the first stands for it.
UNITS = """%|°|m meter metre|cm centimeter centimetre|mm millimeter|km kilometer|in inch inche
|ft foot feet|yd yard|mi mile|mph|s sec second|min minute|h hr hour|day|week|month|year|g gram|kg
kilogram|lb pound|oz ounce|l liter litre|ml milliliter|gallon|dollar|cent|euro|square sq|cubic"""
UNIT = {}
for names in UNITS.split("|"):
    for name in names.split():
        UNIT[name] = UNIT[name + "s"] = names.split()[0]
POWERS = {None: [], "^{2}": ["square"], "^{3}": ["cubic"]}
MEASURE = r"(.*[\d})|]|.*\\pi) ?(°|\\?%|\\text ?\{[^{}\d]*\}|[A-Za-z][A-Za-z. /]+)(\^\{[23]\})?"
NO_UNIT = r"""(?x)\b(not?|if|mod|than|least|most|more|fewer|half|when|for|sin|cos|tan
|north|south|east|west|[aApP]\.?[mM])\b|illion|hundred|thousand"""


def same_measure(gold: str, answer: str) -> bool | None:
    r"""`5 cm` is 5 and 5 centimeters, not 5 m; `90°` is 90, and perhaps \pi/2."""
    x, unit = split_unit(gold)
    y, other = split_unit(answer)
    if (x, y) == (gold, answer):
        return None
    if unit and other and unit != other:
        return False
    return same(x, y) or None  # not False: the rules below may still say yes


def split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit); the unit is "" where there is none or an unknown one: `5 \text{ apples}`."""
    match = re.fullmatch(MEASURE, text)
    if match is None or re.search(NO_UNIT, text):
        return text, ""
    value, written, power = match.groups()
    words = re.findall("[a-z]+|°|%", written.lower())
    units = [UNIT[word] for word in words if word in UNIT]
    if units or "text" in words:
        return value, " ".join(POWERS[power] + units)
    return text, ""


def same_members(gold: str, answer: str) -> bool | None:
    """Tuples in order, sets and lists in any: `x = 1, y = 2` is `y = 2, x = 1` and (1, 2)."""
    kind, golds = members(gold)
    other, answers = members(answer)
    if golds == [gold] or answers == [answer]:
        return None
    is_interval = {kind, other} & {"[)", "(]"}
    if len(golds) != len(answers) or (kind != other and (is_interval or (kind and other))):
        return False  # [0, 1) is neither (0, 1) nor the list 0, 1
    names = {unname(part)[0] for part in golds + answers}  # without one, what tells x from y?
    if {kind, other} - {"", "{}"} or ("" in names and len(names) > 2):
        return all(map(same, golds, answers))
    for part in golds:
        match = next((other for other in answers if same(part, other)), None)
        if match is None:
            return False
        answers.remove(match)
    return True


def members(text: str) -> tuple[str, list[str]]:
    r"""(brackets, members) of a tuple, an interval or a set; a list has the brackets ""."""
    inner = text.replace("\\{", "{").replace("\\}", "}")
    brackets = ""
    if inner[:1] in "([{" and split(inner, ")]}")[1:] == [""]:  # around all of it
        brackets = inner[0] + inner[-1]
        inner = inner[1:-1]
    parts = split(inner, ",;")
    if brackets in ("", "{}"):  # 1 \pm 2 is two members
        parts = [p.replace("\\pm", s) for p in parts for s in ("+-" if "\\pm" in p else "+")]
    if len(parts) == 1 and brackets != "{}":
        return "", [text]
    return brackets, parts


# ---- Formulas
def same_formula(gold: str, answer: str) -> bool:
    """Two texts that have a value, or are an equation, an inequality, a set, a matrix."""
    import sympy
    from math_verify import verify

    x, y = formula(gold), formula(answer)
    values = sympy.Expr | sympy.MatrixBase
    if isinstance(x, values) != isinstance(y, values):
        return False  # an equation or a set is no value
    for text, value in (gold, y), (answer, x):
        decimal = number(text)
        if decimal is not None and value.is_real:  # 1.41421356 is \sqrt{2}
            exact = Fraction(str(value.evalf(40)))
            if rounds(decimal, exact):
                return True
    if isinstance(x, sympy.Expr) and x.is_rational and y.is_rational:
        x, y = x.doit(), y.doit()  # fractions, which it compares exactly: else 1/52! counts as 0
    # There are no floats left that it would round, and other numbers it compares to 60 digits.
    return verify(x, y, numeric_precision=60, allow_set_relation_comp=True, timeout_seconds=None)


def formula(text: str):
    """The sympy object that math-verify's parser makes of LaTeX, with exact numbers in it."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    if re.search(r"[\d.] +[\d.]|\d_|:.*:", text):  # it would misread all of them
        raise ValueError("two numbers side by side, a number base or a ratio of three")
    text = text.replace("°", r"\cdot \frac{\pi}{180}")
    text = re.sub(r"([\d)]|\\binom\{\d+\}\{\d+\})(?=\((?:\d|\\frac)|\\binom)", r"\1\\cdot ", text)
    config = ConversionConfig(lowercase_symbols=False)
    found = latex2sympy(text, normalization_config=None, conversion_config=config)
    exact = {value: sympy.Rational(str(value)) for value in found.atoms(sympy.Float)}
    i = sympy.Symbol("i")
    if i in found.free_symbols:  # not a sum's index
        exact[i] = sympy.I
    return found.xreplace(exact)


# ---- Grading in processes that can be killed
class Verdict(NamedTuple):
    equal: bool
    status: str  # ok | none (no answer) | timeout | error | crashed; all but ok are wrong


class Grader(contextlib.AbstractContextManager):
    """Verdicts on (gold, answer) pairs; equal pairs are decided once.

    Its workers are fresh processes of this file (by exec: nothing of vLLM or CUDA is in them). For
    each pair a worker sets a timer on its own CPU time, whose signal it does not handle: when time
    is up the kernel ends it, whatever it is doing, and a slow machine changes no verdict.
    """

    def __init__(self, workers: int = 2):
        self.known: dict[tuple, Future] = {}
        self.threads = ThreadPoolExecutor(workers)
        self.idle: list[subprocess.Popen] = []  # workers without a pair

    def __exit__(self, *_):
        self.threads.shutdown(cancel_futures=True)  # waits for the pairs at work: seconds
        for worker in self.idle:
            worker.communicate()  # closes its input, which ends it

    def __call__(self, gold: str, answer: str | None) -> Verdict:
        return self.submit(gold, answer).result()

    def submit(self, gold: str, answer: str | None) -> Future[Verdict]:
        pair = gold, answer
        if pair not in self.known:
            self.known[pair] = self.threads.submit(self.decide, gold, answer)
        return self.known[pair]

    def decide(self, gold: str, answer: str | None) -> Verdict:
        if answer is None:
            return Verdict(False, "none")
        equal = same_number(gold, answer)
        if equal is not None:
            return Verdict(equal, "ok")
        for _ in range(5):  # a worker that somebody has killed decides nothing
            try:
                worker = self.idle.pop()
            except IndexError:
                worker = self.start()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write(json.dumps([gold, answer]) + "\n")
            reply = worker.stdout.readline()
            if reply:
                self.idle.append(worker)
                return Verdict(*json.loads(reply))
            if worker.wait() == -signal.SIGPROF:
                return Verdict(False, "timeout")
        return Verdict(False, "crashed")

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,  # a line leaves when it is written
            start_new_session=True,  # Ctrl-C is for the parent
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's orders, hence verdicts, repeat
        )


def work() -> None:
    """A worker: a verdict for each pair on standard input, until that closes."""
    same("\\sin x", "\\cos x")  # the imports are not in the time of the first pair
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))  # bytes
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, 2.0)  # whose signal, by default, ends the process
        try:
            verdict = Verdict(same(*json.loads(line)), "ok")
        except Exception:  # MemoryError, and whatever else computer algebra raises
            verdict = Verdict(False, "error")
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


# ---- Votes
def vote(answers: list[str | None], grader: Grader) -> list[tuple[str, list[int]]]:
    """Clusters of equivalent answers, each as (first answer, indices), the largest one first.

    An answer is compared with each cluster's first one; None does not vote. Of equally large ones
    the first sampled comes first; evaluate.py takes the expected value of such a tie.
    """
    clusters = {}  # first answer -> indices
    for i, answer in enumerate(answers):
        if answer is not None:
            home = next((first for first in clusters if grader(first, answer).equal), answer)
            clusters.setdefault(home, []).append(i)
    return sorted(clusters.items(), key=lambda cluster: -len(cluster[1]))


# ---- The command line
@dataclass(kw_only=True)
class Flags:
    """Grade answers made elsewhere."""

    file: tyro.conf.Positional[Path]  # rows (.jsonl) of `text`, and `gold` or `answer`


def main() -> None:
    path = parse(Flags).file
    try:
        rows = read_file(path)
        for row in rows:
            row["gold"] = str(row["gold"] if "gold" in row else row["answer"])
            row["extracted"] = extract_answer(row["text"])
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: a row without `text` or `gold`, or damaged") from None
    if not rows:
        raise UserError(f"{path}: no rows")
    out = path.with_suffix(".graded.jsonl")
    with Grader() as grader, out.open("w") as file:
        for row in rows:
            grader.submit(row["gold"], row["extracted"])
        for row in rows:
            row["correct"], row["grading"] = grader(row["gold"], row["extracted"])
            print(json.dumps(row), file=file)
    right = sum(row["correct"] for row in rows)
    print(f"{right} of {len(rows)} right, {100 * right / len(rows):.1f} %; written: {out}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        run_main(main)
