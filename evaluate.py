r"""Evaluation: run a benchmark, extract, compare, vote, measure, report.

    python evaluate.py --dataset arithmetic --limit 64 --n 16 --out runs/agent     # 16 traces a problem, majority vote
    python evaluate.py --dataset arithmetic --limit 64 --n 16 --out runs/baseline --no-agent
    python evaluate.py --report runs/baseline runs/agent         # Markdown: accuracy, length, differences, breakdowns
    python evaluate.py --dataset math500,amc23 --out runs/two    # several sets, one engine, one table
    python evaluate.py --ablation --lora runs/grpo/adapter --dataset arithmetic --out runs/ablation    # the four rows
    torchrun --nproc-per-node 8 -- evaluate.py --dataset math500 --n 16    # each rank an engine and a share of the traces
    python evaluate.py --grade outputs.jsonl                     # rows made elsewhere: `gold` or `answer`, and `text`

What happens, in reading order:

  1. *Grading.* The answer is the last \boxed{} that the model wrote; `same` decides whether it is equivalent to the
     gold answer. That needs a computer algebra system, which can hang or eat all memory, so it runs in worker
     processes (`Grader`) that the kernel ends; a pair that could not be decided counts as wrong and is counted.
  2. *Votes and metrics.* majority@k clusters the k answers by equivalence (10 and 10.0 are one candidate); traces without an answer
     do not vote; a tie counts its expected value. From n samples every majority@k with k <= n is the mean over *all*
     subsets of size k, computed exactly (`majority_at`), and so is pass@k: no order of samples, no drawing.
     Intervals: 95 %, percentile bootstrap over problems (2,000 resamples, fixed seed); two runs are compared on the
     same problems, resampled together.
  3. *The run.* Each trace is one line in OUT/traces.jsonl the moment it ends. The same command goes on after any kill
     with the missing samples; other settings in the same folder are refused. Verdicts are kept apart, in
     grades.jsonl: they can be made again, traces cannot.

Left out: a server, a database of runs, an LLM as judge (verdicts must repeat), conversion between units.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import queue
import random
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from agent import (
    Trace,
    add_model_flags,
    chosen_lora,
    extract_answer,
    open_agent,
    settings_from,
    take_rank,
)
from data import Parser, Problem, UserError, add_data_flags, load_from_flags, run_main, topic_levels


class Verdict(NamedTuple):
    equal: bool
    status: (
        str  # ok | none (no answer) | timeout | memory | error | crashed; all but ok count as wrong
    )


class Vote(NamedTuple):
    winner: str | None  # of a tie, the candidate that was sampled first
    clusters: list[tuple[str, int, list[int]]]  # (first answer, votes, indices), most votes first


@dataclass
class Graded:
    """One problem of one run, graded."""

    problem: dict  # dataset, id, question, answer, meta
    rows: list[dict]  # its traces, by sample number
    answers: list[str | None]
    verdicts: list[Verdict]
    clusters: list[
        tuple[str, int, list[int], bool]
    ]  # (answer, votes, positions in rows, right), most votes first
    majority: list[float]  # at k = 1..n

    @property
    def right(self) -> int:
        return sum(v.equal for v in self.verdicts)


@dataclass
class Run:
    folder: Path
    name: str
    config: dict
    datasets: dict[str, list[Graded]]  # problems that have at least one trace
    missing: int  # traces still to be sampled


# ---------------------------------------------------------------------------------------------------------------
# Are two answers the same? Strings in, True or False out. `quick` needs nothing but this file; `same` may need sympy
# and is therefore only ever called in a grading worker (see Grader), which can be killed.
#
# The order of business: numbers are compared by number (exactly, or as a correct rounding), lists, sets, tuples,
# intervals and matrices are taken apart and compared piece by piece, equations up to a factor, expressions at random
# points to 20 digits, and what is left goes to math-verify.

FONTS = r"\\(?:math(?:rm|bf|it|sf|tt|normal)|text(?:bf|it|rm|sf|tt|normal)|operatorname|boldsymbol|bm|mbox|hbox|emph|mathop)\b\*?\s*(?=\{)"
TIDY = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"\\\\(?:\[[\d.]*(?:pt|em|ex|mm|cm)\])?", " ¶ "),  # the end of a row
        (
            r"(?<=\d)\s*(?:\{\s*,\s*\}|,?\\[,!]|,\\!)\s*(?=\d{3}(?!\d))",
            ",",
        ),  # 14{,}916  32,\!349  10\,000
        (
            r"\\!\s*|\\(?:displaystyle|textstyle|limits|nolimits|hfill|left(?![a-z])|right(?![a-z])|[bB]igg?[lrm]?(?![a-z]))\.?",
            "",
        ),
        (r"(?<!\\)\$|\\[()](?!\w)", ""),
        (r"\\\$\s*", "¤"),  # an amount keeps its dollar: it is a unit
        (r"\\[,;:> ]|\\q?quad\b|~|\\thinspace|[\s\u00a0\u2009\u202f]+", " "),
        (FONTS, r"\\text"),
        (r"\\text\s*\{\s*([A-Za-z])\s*\}(?!\^)", r" \1"),  # one letter is a symbol: \mathrm{e}
        (r"\\text\s*\{\s*\}", ""),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\(?:leq|leqslant)(?![a-z])|<=|≤", r"\\le "),
        (r"\\(?:geq|geqslant)(?![a-z])|>=|≥", r"\\ge "),
        (r"\\neq(?![a-z])|!=|≠|\\not\s*=", r"\\ne "),
        (r"\\lt(?![a-z])", "<"),
        (r"\\gt(?![a-z])", ">"),
        (
            r"\+\s*(\\infty|∞|infinity|inf)(?![a-z])|(?<![a-z\\])(?:infinity|inf|oo)(?![a-z])|∞",
            r"\\infty ",
        ),
        (
            r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree(?![a-z])|\\text\{\s*(?:degrees?|deg)\s*\}|(?<=\d)\s*degrees?\b",
            "°",
        ),
        (
            r"\\?%|\\text\{\s*(?:percent|percentage|pct)\s*\}|(?<![a-z])(?:percentage|percent|pct)(?![a-z])",
            "%",
        ),
        (r"\\(?:approx|simeq)(?![a-z])|≈", "≈"),
        (r"\\(?:cup)(?![a-z])|∪", "∪"),
        (r"\\in(?![a-z])|∈", "∈"),
        (r"−|–", "-"),
        (r"×", r"\\times "),
        (r"·|⋅", r"\\cdot "),
        (r"÷", "/"),
        (r"π", r"\\pi "),
        (r"²", "^2"),
        (r"³", "^3"),
        (r"√", r"\\sqrt "),
        (r"\\lbrace|\\\{", r"\\{"),
        (r"\\rbrace|\\\}", r"\\}"),
        (
            r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+|(?<=[\d)}]),?\s*(?:and|or)(?=[\d(\\A-Za-z])",
            " , ",
        ),
        (r"\^(\w|\{[^{}]*\})\s*_\s*(\w|\{[^{}]*\})", r"_\2^\1"),
        (r"_\s*\{\s*(\w)\s*\}", r"_\1"),
        (r"\s+_", "_"),
        (r"\\varnothing(?![a-z])|∅|\\\{\s*\\\}", r"\\emptyset "),
        (r"\s+", " "),
    ]
]
UNIT_NAMES = """m meter meters metre metres|cm centimeter centimeters centimetre centimetres|mm millimeter millimeters|km kilometer kilometers
    kilometre kilometres|in inch inches|ft foot feet|yd yard yards|mi mile miles|s sec second seconds|min minute minutes|h hr hrs hour hours
    |day days|week weeks|month months|year years yr yrs|g gram grams|kg kilogram kilograms|lb lbs pound pounds|oz ounce ounces|l liter liters
    litre litres|ml milliliter milliliters|gallon gallons|dollar dollars usd|cent cents|euro euros|mph|kmh kph|radian radians rad"""
UNITS = {alias: names.split()[0] for names in UNIT_NAMES.split("|") for alias in names.split()}
SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
NOT_UNITS = {
    "not",
    "no",
    "and",
    "or",
    "if",
    "mod",
    "than",
    "least",
    "most",
    "when",
    "where",
    "for",
    "base",
    "pi",
    "i",
    "undefined",
    "infinity",
}
TEXT_UNIT = re.compile(
    r"(.*?[\d})|°%\w])\s*(?:\\text\{([^{}]*)\}|(?<=[\d})|% ])([A-Za-z][A-Za-z. /]+))\s*(?:\^\s*\{?\s*[23]\s*\}?)?\.?"
)
NUMBER = r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|[1-9]\d{0,2}(?: \d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+"


def tidy(text: str) -> str:
    """An answer without LaTeX's noise: spacing, fonts, sizes, dollars, synonyms. Idempotent; the meaning stays."""
    text = text.strip().replace("\x0crac", "\\frac")
    if "\\\\begin" in text or not re.search(r"\\begin|\\\\\s|\\\\$", text):
        text = text.replace(
            "\\\\", "\\"
        )  # escaped twice: only a matrix has use for a double backslash
    for pattern, new in TIDY:
        text = pattern.sub(new, text)
    text = brace_arguments(text).strip(" ").rstrip(".;,: ").lstrip(",:; ")
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def brace_arguments(text: str) -> str:
    r"""\frac12, \frac 1 {2}, \sqrt3 -> \frac{1}{2}, \sqrt{3}."""
    text = re.sub(r"\\sqrt\s+(?=[\[{])", r"\\sqrt", text)
    text = re.sub(r"\\sqrt\s*(\d|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac\s*(\d|[A-Za-z]|\\pi)\s*(?=\d|[A-Za-z]|\{|\\)", r"\\frac{\1}", text)
    done, at = "", 0
    for m in re.finditer(r"\\frac\s*(?=\{)", text):
        end = closing(text, m.end())
        if (
            end
            and (rest := re.compile(r"\s*(\d|[A-Za-z]|\\pi)").match(text, end + 1))
            and m.start() >= at
        ):
            done += text[at : end + 1] + "{" + rest[1] + "}"
            at = rest.end()
    return done + text[at:]


def closing(text: str, at: int) -> int | None:
    """Index of the bracket that closes the one at `at`; \\{ counts as a bracket, half-open intervals may mix."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if not depth:
            return i
    return None


def split_top(text: str, separators: str) -> list[str]:
    """text cut at the separators (single characters) that stand outside all brackets and environments."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{" or text.startswith("\\begin", i)) - (
            c in ")]}" or text.startswith("\\end", i)
        )
        if c in separators and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in [*parts, text[start:]]]


def number(text: str) -> tuple[Fraction, int | None] | None:
    """(value, None) of an exact number, (value, significant digits) of a decimal fraction, None for anything else."""
    text = text.strip().replace("{ ", "{").replace(" }", "}")
    while text.startswith("(") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    sign, body = re.fullmatch(r"([+-]?\s*)(.*)", text, re.S).groups()
    sign = -1 if "-" in sign else 1
    if len(body) > 400:
        return None
    if m := re.fullmatch(
        rf"({NUMBER})(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(\{{[+-]?\d+\}}|\([+-]?\d+\)|[+-]?\d+)|[eE]([+-]?\d+))?",
        body,
    ):
        digits, power = (
            m[1].replace(",", "").replace(" ", ""),
            int((m[2] or m[3] or "0").strip("{}()")),
        )
        if abs(power) > 1000:
            return None
        value = sign * Fraction(digits if digits != "." else "0") * Fraction(10) ** power
        exact = "." not in digits or (
            value.denominator == 1 and not digits.partition(".")[2].strip("0")
        )
        return value, None if exact else max(1, len(digits.replace(".", "").lstrip("0")))
    if m := re.fullmatch(r"(\d*)\.(\d*)\\overline\{(\d+)\}", body):
        whole, head, loop = m[1] or "0", m[2], m[3]
        return sign * (
            Fraction(f"{whole}.{head or 0}")
            + Fraction(int(loop), 10 ** len(head) * (10 ** len(loop) - 1))
        ), None
    if m := re.fullmatch(
        rf"(\d+ ?)?\\frac\{{\s*([+-]?)\s*({NUMBER})\s*\}}\{{\s*([+-]?)\s*({NUMBER})\s*\}}|(\d+ )?({NUMBER})\s*/\s*([+-]?)({NUMBER})",
        body,
    ):
        whole, top, bottom = m[1] or m[6], m[3] or m[7], m[5] or m[9]
        top, bottom = (Fraction(x.replace(",", "").replace(" ", "")) for x in (top, bottom))
        if not bottom or (whole and not top < bottom):
            return None
        sign *= -1 if (m[2] == "-") != ((m[4] or m[8]) == "-") else 1
        return sign * (Fraction(whole or 0) + top / bottom), None
    return None


def same_number(x: tuple, y: tuple) -> bool:
    """Equal; or equal up to a float's noise; or one is the other, which no finite decimal can write, cut or rounded
    at a sixth or later significant digit. An integer is never equal to anything but itself."""
    (a, m), (b, n) = x, y
    if a == b:
        return True
    gap = abs(a - b)
    if max(m or 0, n or 0) >= 15 and gap <= min(Fraction(1, 10**6), max(abs(a), abs(b)) / 10**12):
        return True
    if m and n or not (m or n):
        return False
    exact, rounded, digits = (b, a, m) if m else (a, b, n)
    endless = (
        exact.denominator // math.gcd(exact.denominator, 10 ** (exact.denominator.bit_length())) > 1
    )
    return endless and same_rounding(exact, rounded, digits)


def same_rounding(exact, rounded: Fraction, digits: int) -> bool:
    """Whether a decimal is `exact` rounded to, or cut at, its `digits` significant digits, which are six or more."""
    if not rounded or digits < 6:
        return False
    size = abs(rounded)
    power = len(str(size.numerator)) - len(str(size.denominator))  # floor(log10(size)) or one more
    unit = Fraction(10) ** (power + (Fraction(10) ** power <= size) - digits)
    return abs(exact - rounded) <= unit / 2 or (
        abs(exact) > abs(rounded) and abs(exact - rounded) < unit
    )


def quick(gold: str, answer: str) -> bool | None:
    """The verdict where two strings or two numbers settle it, None where `same` has to look. Never differs from it.

    >>> quick("1/2", "0.50"), quick("1,232", "1232"), quick("1/3", "0.33"), quick("x + 1", "1 + x")
    (True, True, False, None)
    """
    if len(gold) > 300 or len(answer) > 300:
        return True if gold.strip() == answer.strip() else None
    g, a = tidy(gold), tidy(answer)
    if not a or not g:
        return g == a
    if squeeze(g) == squeeze(a):
        return True
    x, y = number(g), number(a)
    if x and y and not ("," in g and "," in a):
        return same_number(x, y)
    return None


def squeeze(text: str) -> str:
    """Text without spaces, except where a space keeps two words, two numbers or a command and a letter apart."""
    return re.sub(r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])", "", text)


NAME_JUNK = re.compile(
    r"\\(?:text|overline|widehat|hat|vec|bar|angle|triangle|Delta|mathbb|mathcal)(?![a-z])|_\{[^{}]*\}|_\w|\\[a-zA-Z]+|['|{}\s°]"
)


def is_name(text: str) -> bool:
    """Whether the left side of `=` names a quantity (x, f(x), (p,q), |AB|, a_n, A:B, \\frac{NO}{BO}): no sums, powers."""
    text = re.sub(
        r"(?<=[A-Za-z}'])\s*\([^()]*\)", "", text.strip()
    )  # arguments of a function may be numbers
    text = re.sub(r"\\text\{[^{}]*\}", "T", text)
    if re.search(r"\\(?:infty|sum|int|prod|sqrt|cdot|times|pm|mp)(?![a-z])", text):
        return False
    return bool(re.fullmatch(r"[A-Za-zα-ω(),:/\s]+", re.sub(NAME_JUNK, "x", text)))


def unname(text: str) -> tuple[str | None, str]:
    """`x = 5` -> (x, 5); `x \\in [0,1)` -> (x, [0,1)); `x = 2 + 3 = 5 ≈ 5.0` -> (x, 5); a bare value -> (None, value)."""
    head, *tail = split_top(text, "≈")
    if tail:
        text = head if head and not is_name(head) else f"{head} = {tail[0]}" if head else tail[0]
    if "∈" in text:
        head, _, tail = text.partition("∈")
        return (head.strip(), tail.strip()) if is_name(head) else (None, text)
    parts = split_top(text, "=")
    if len(split_top(text, ",;")) > 1 and (len(parts) != 2 or not is_name(parts[0])):
        return None, text  # a list of equations
    if len(parts) > 1 and is_name(parts[0]):
        return parts[0], parts[-1]
    if len(parts) > 1 and not re.search(r"(?<!\\)[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)):
        return None, parts[-1]  # 2 + 3 = 5
    return None, text


def same(gold: str, answer: str, depth: int = 0) -> bool:
    """Whether an answer is equivalent to the gold answer. May run for ever and raise anything: see Grader."""
    g, a = tidy(gold), tidy(answer)
    if squeeze(g) == squeeze(a):
        return True
    if "\\text" in g + a and same_text(g, a):
        return True
    if not g or not a or depth > 6:
        return False
    x, y = number(g), number(a)
    if x and y and (same_number(x, y) or not ("," in g and "," in a)):
        return same_number(x, y)
    if (
        x and re.fullmatch(r"-?\d+,\d+", a) or y and re.fullmatch(r"-?\d+,\d+", g)
    ):  # a decimal comma
        p, q = number(g.replace(",", ".")), number(a.replace(",", "."))
        if p and q and "." in g + a:
            return same_number(p, q)
    for special in (same_percent, same_clock_base_or_choice, same_with_units):
        verdict = special(g, a, depth)
        if verdict is not None:
            return verdict
    return same_pieces(g, a, depth)


def same_percent(g: str, a: str, depth: int) -> bool | None:
    """`28%` is 28 or 0.28: golds are written both ways. A gold ratio (0 to 1, no sign) only matches as a ratio."""
    if not (g.endswith("%") or a.endswith("%")):
        return None
    p, q = g.rstrip("% "), a.rstrip("% ")
    if g.endswith("%") and a.endswith("%"):
        return same(p, q, depth + 1)
    value, plain = (p, a) if g.endswith("%") else (q, g)
    if split_unit(plain)[1] or split_unit(plain)[0] != plain:
        return False
    ratio = number(plain) if plain is g else None
    as_is = not (ratio and 0 < ratio[0] < 1) and same(p, q, depth + 1)
    exact = number(value)
    return as_is or same(
        plain, str(exact[0] / 100) if exact else rf"\frac{{{value}}}{{100}}", depth + 1
    )


def same_clock_base_or_choice(g: str, a: str, depth: int) -> bool | None:
    """Times of day, numerals with a base, the letter of a multiple choice."""
    clock = re.compile(
        r"(?:\\text\{\s*)?(\d{1,2}):(\d\d)(?::(\d\d))?\s*(?:\\text\{)?\s*(?:([AaPp])\.?\s?[Mm]\.?)?\s*\}?"
    )
    if (m := clock.fullmatch(g)) and (n := clock.fullmatch(a)):

        def read(t):
            half = (t[4] or "").lower()
            return (
                (int(t[1]) % 12 + 12 * (half == "p") if half else int(t[1])),
                int(t[2]),
                int(t[3] or 0),
            )

        (h, *rest), (k, *others) = read(m), read(n)
        one_sided = bool(m[4]) != bool(n[4]) and int(m[1]) == int(n[1])
        return (h == k or one_sided) and rest == others
    base = re.compile(
        r"\(?([0-9A-Fa-f]+)\)?_\{?\s*(?:\\text\{)?(\d+|two|three|four|five|six|seven|eight|nine|twelve)\}*|()([0-9A-F]+)()"
    )
    if "_" in g and (m := base.fullmatch(g)) and (n := base.fullmatch(a)):
        words = dict(
            two="2",
            three="3",
            four="4",
            five="5",
            six="6",
            seven="7",
            eight="8",
            nine="9",
            twelve="12",
        )
        return (m[1] or m[4]).upper() == (n[1] or n[4]).upper() and (
            not n[2] or words.get(m[2], m[2]) == words.get(n[2], n[2])
        )
    choice = re.compile(
        r"(?:\\text\{\s*)?\(([A-Z])\)(?:\s*\})?\s*(.*)|(?:\\text\{\s*)?([A-Z])[.):](?:\s*\}|\s)\s*(.+)|(?:\\text\{)?([A-Z])\}?()",
        re.S,
    )
    m, n = choice.fullmatch(g), choice.fullmatch(a)
    if n and (m or n[2] or n[4]):
        letter, rest = n[1] or n[3] or n[5], n[2] or n[4]
        if m:
            return (m[1] or m[3] or m[5]) == letter
        return same(
            g, rest.removeprefix("\\text{").rstrip("}") if "{" not in rest[6:] else rest, depth + 1
        )
    return None


def same_with_units(g: str, a: str, depth: int) -> bool | None:
    """A unit behind a value may be missing on one side; two different known units never agree; degrees are a number."""
    (p, u), (q, v) = split_unit(g), split_unit(a)
    if p == g and q == a:
        return None
    if u and v and u != v:
        return False
    turn = r"(%s) \cdot \frac{\pi}{180}"  # 90° is also \pi/2
    return (
        same(p, q, depth + 1)
        or (u == "°" and not v and same(turn % p, q, depth + 1))
        or (v == "°" and not u and same(p, turn % q, depth + 1))
    )


def split_unit(text: str) -> tuple[str, str | None]:
    """(value, known unit or None). `3 million` becomes a number, because there the word is part of the value."""
    if m := re.fullmatch(r"(-?)¤(.*\d.*)|(.*\d)¤", text):
        return (m[1] or "") + (m[2] or m[3]).strip(), "dollar"
    if re.fullmatch(r"[^°]*[\d})]\s*°", text) and not re.search(
        r"\\(?!frac|sqrt|pi)[a-z]{2}", text
    ):
        return text.rstrip("° "), "°"
    m = TEXT_UNIT.fullmatch(text)
    if not m:
        return text, None
    value, words = m[1].strip(), re.findall(r"[a-z]+", (m[2] or m[3] or "").lower())
    is_value = re.search(r"\d|\\pi|\\sqrt", value) and len(split_top(value, ",;<>")) == 1
    if not is_value or not 0 < len(words) <= 5 or NOT_UNITS & set(words):
        return text, None
    if m[
        3
    ]:  # bare letters behind a number are variables, unless they spell a unit or are long words
        spelled = (words[0] in UNITS and len(words[0]) > 1) or len(words[0]) > (
            2 if text[len(m[1])] == " " else 3
        )
        if not spelled or re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", value)):
            return text, None
    if words[0] in SCALES:
        exact = number(value)
        return str(
            exact[0] * SCALES[words[0]]
        ) if exact else rf"{SCALES[words[0]]} \cdot ({value})", None
    return value, next((UNITS[w] for w in words if w in UNITS), None)


def same_text(g: str, a: str) -> bool:
    """Words are compared as words, without case and punctuation."""
    g, a = (re.sub(r"\\text|[\s{}'\"!?]|(?<!\d)[.,]|[.,](?!\d)", "", s).casefold() for s in (g, a))
    return bool(g) and g == a


def same_pieces(g: str, a: str, depth: int) -> bool:
    """Lists, sets, tuples, intervals, unions, matrices, `name = value`, relations; a scalar goes to same_scalar."""
    (g_name, g_value), (a_name, a_value) = unname(g), unname(a)
    gs, as_ = items(g), items(a)
    if len(gs) > 1 or len(as_) > 1 or g.startswith("\\{") or a.startswith("\\{"):
        return same_lists(g, a, gs, as_, depth)
    left, right = relation(g), relation(a)
    if left and right and not (g_name and a_name) and same_relation(left, right):
        return True
    if (g_name or a_name) and not (
        g_name and a_name and squeeze(g_name) != squeeze(a_name) and not renamed(g_name, a_name)
    ):
        return same(g_value, a_value, depth + 1)
    if (m := matrix(g)) and (n := matrix(a)):
        return [len(r) for r in m] == [len(r) for r in n] and all(
            same(p, q, depth + 1) for r, s in zip(m, n) for p, q in zip(r, s)
        )
    if "∪" in g or "∪" in a:
        g, a = (
            f"(-\\infty, {v}) ∪ ({v}, \\infty)"
            if (v := re.fullmatch(r"[a-zA-Z] ?\\ne ?(.*)", s)) and (v := v[1])
            else s
            for s in (g, a)
        )
        verdict = unordered(split_top(g, "∪"), split_top(a, "∪"), depth)
        return verdict or same_scalar(g, a)
    p, q = bracketed(g) or interval(g) or vector(g), bracketed(a) or interval(a) or vector(a)
    if p and q:
        if len(p[1]) == 2 and len(q[1]) == 2 and p[0] + p[2] != q[0] + q[2]:
            return False
        return len(p[1]) == len(q[1]) and all(same(s, t, depth + 1) for s, t in zip(p[1], q[1]))
    r, s = split_top(g, ":"), split_top(a, ":")
    if len(r) == len(s) > 1:  # a ratio
        return all(
            same(f"({x})({s[0]})", f"({y})({r[0]})", depth + 1) for x, y in zip(r[1:], s[1:])
        )
    return bool(left and right and g_name and a_name and same_relation(left, right)) or same_scalar(
        g, a
    )


def renamed(g: str, a: str) -> bool:
    """f(x) = ... and y = ... say the same."""
    return any(re.fullmatch(r"[A-Za-z]\s*\([a-z]\)", s) and t == "y" for s, t in ((g, a), (a, g)))


def items(text: str) -> list[str]:
    r"""Members of a set or of a bare list, `\pm` written out; a single value is a list of one."""
    name, value = unname(text)
    if value.startswith("\\{") and value.endswith("\\}") and closing(value, 1) == len(value) - 1:
        text = value[2:-2]
    parts = split_top(text, ";")
    if len(parts) == 1:
        parts = split_top(text, ",")
    parts = [p for p in parts if p]
    written = []
    for p in parts:
        if re.search(r"\\pm(?![a-z])|±|\\mp", p):
            for plus, minus in (("+", "-"), ("-", "+")):
                written.append(
                    re.sub(r"\\pm(?![a-z])|±", f" {plus} ", p)
                    .replace("\\mp", f" {minus} ")
                    .replace("= +", "= ")
                )
        else:
            written.append(p)
    return [re.sub(r"^\s*\+\s*", "", p) for p in written]


def same_lists(g: str, a: str, gs: list[str], as_: list[str], depth: int) -> bool:
    """Lists and sets have no order; two lists of one length must repeat the same things as often. A list of differently
    named values has one for an answer without names."""
    g_names, a_names = [unname(p)[0] for p in gs], [unname(p)[0] for p in as_]
    gv, av = [unname(p)[1] for p in gs], [unname(p)[1] for p in as_]
    if all(g_names) and len(set(g_names)) == len(gs) > 1:
        if all(a_names) and len(as_) == len(gs):
            pairs = dict(zip(map(squeeze, a_names), av))
            return all(
                squeeze(k) in pairs and same(v, pairs[squeeze(k)], depth + 1)
                for k, v in zip(g_names, gv)
            )
        if set(filter(None, a_names)) - set(g_names) - {unname(a)[0]}:
            return False
        if (b := bracketed(unname(a)[1])) and len(as_) == 1:
            av = b[1]
        return len(gv) == len(av) and all(same(p, q, depth + 1) for p, q in zip(gv, av))
    if all(a_names) and len(set(a_names)) == len(as_) > 1:  # the other way round
        return same_lists(a, g, as_, gs, depth)
    braces = any(unname(text)[1].startswith("\\{") for text in (g, a))
    if unordered(gv, av, depth, count=len(gv) == len(av) and not braces):
        return True
    if len(set(filter(None, g_names + a_names))) > 1:
        return False
    for bare, other in ((gs, a), (as_, g)):  # `1, 2` for the pair (1, 2), in this order
        b = bracketed(unname(other)[1])
        if (
            b
            and len(bare) == len(b[1]) > 1
            and (b[0] == "(" or len(bare) > 2)
            and not (g.startswith("\\{") or a.startswith("\\{"))
        ):
            return all(same(p, q, depth + 1) for p, q in zip(bare, b[1]))
    if not re.search(r"∪|[<>]|\\[lg]e", g + a):
        return False

    def parts(text, members):  # x < 2, x > 3 as the intervals of a union
        pieces = members if len(members) > 1 else split_top(unname(text)[1], "∪")
        return [i[3] if (i := interval(p)) else p for p in pieces]

    return unordered(parts(g, gs), parts(a, as_), depth)


def unordered(gs: list[str], as_: list[str], depth: int, count: bool = False) -> bool:
    """Whether two lists are equal whatever their order: as sets, or (count) with every repetition."""

    def place(p, others, flip):
        tests = (
            lambda q: squeeze(p) == squeeze(q),
            lambda q: same(*((q, p) if flip else (p, q)), depth + 1),
        )  # the cheap one first
        return next((i for test in tests for i, q in enumerate(others) if test(q)), None)

    if not count:
        return all(place(p, as_, False) is not None for p in gs) and all(
            place(q, gs, True) is not None for q in as_
        )
    rest = list(as_)
    for p in gs:
        if (i := place(p, rest, False)) is None:
            return False
        del rest[i]
    return not rest


def bracketed(text: str) -> tuple[str, list[str], str] | None:
    """(opening, items, closing) of a tuple or interval; the text of one pair of brackets with a comma inside."""
    text = text.strip()
    if text[:1] not in "([" or closing(text, 0) != len(text) - 1:
        return None
    inner = text[1:-1]
    parts = split_top(inner, ";") if ";" in inner else split_top(inner, ",")
    return (text[0], parts, text[-1]) if len(parts) > 1 else None


def interval(text: str) -> tuple[str, list[str], str, str] | None:
    r"""`1 < x \le 4`, `x > 2` -> the brackets and ends of (1, 4], (2, \infty), and the interval as text."""
    parts = re.split(r"(<|>|\\le(?![a-z])|\\ge(?![a-z]))", text)
    ends, ops = [p.strip() for p in parts[::2]], parts[1::2]
    if len(ops) not in (1, 2) or "=" in text or len(split_top(text, ",;")) > 1:
        return None
    if ops[0] in (">", "\\ge"):
        ends, ops = ends[::-1], [{">": "<", "\\ge": "\\le"}.get(op) for op in ops[::-1]]
    if None in ops or any(op not in ("<", "\\le") for op in ops):
        return None
    if len(ops) == 1:
        ends, ops = (
            (["-\\infty", *ends], ["<", *ops])
            if is_name(ends[0])
            else ([*ends, "\\infty"], [*ops, "<"])
        )
    if not is_name(ends[1]) or is_name(ends[0]) or is_name(ends[2]) or "|" in ends[1]:
        return None
    left, right = "(" if ops[0] == "<" else "[", ")" if ops[1] == "<" else "]"
    return left, [ends[0], ends[2]], right, f"{left}{ends[0]}, {ends[2]}{right}"


def matrix(text: str) -> list[list[str]] | None:
    """Rows of cells of a LaTeX matrix or system."""
    m = re.fullmatch(
        r"[(\[]?\s*\\begin\{([pbB]?matrix|array|cases|smallmatrix)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}\s*[)\]]?",
        text.strip(),
        re.S,
    )
    if not m or "\\begin" in m[2]:
        return None
    return [[c.strip() for c in row.split("&")] for row in m[2].split("¶") if row.strip()]


def vector(text: str) -> tuple[str, list[str], str] | None:
    """A matrix of one row or one column as a tuple."""
    rows = matrix(text)
    if rows and (len(rows) == 1 or all(len(r) == 1 for r in rows)):
        cells = [c for r in rows for c in r]
        return ("(", cells, ")") if len(cells) > 1 else None
    return None


def relation(text: str) -> tuple[str, str] | None:
    """(operator, left - right) of one relation, turned so that the operator is =, \\ne, < or \\le."""
    parts = re.split(r"(=|<|>|\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z]))", text)
    if len(parts) != 3 or not parts[0].strip() or not parts[2].strip():
        return None
    left, op, right = (p.strip() for p in parts)
    if op in (">", "\\ge"):
        left, right, op = right, left, {">": "<", "\\ge": "\\le"}[op]
    return op, f"({left}) - ({right})"


PYTHON_CALL = re.compile(
    r"(?<![\\a-zA-Z])(?:(?:np|numpy|math|cmath|sympy|sp|mpmath)\.)?(a(?:rc)?(?:sin|cos|tan)h?|sinh?|cosh?|tanh?|sec|csc|cot|sqrt|exp|log|ln|pi)(?![a-zA-Z])"
)


def to_latex(text: str) -> str:
    """What the parser reads: Python's spelling (np.arcsin(2/3), x**2, sqrt(2)) as LaTeX, degrees as radians."""
    text = text.replace("**", "^").replace("\\text", "").replace("±", "\\pm")
    text = re.sub(r"(\d+(?:\.\d+)?|\w)\s*°", r"(\1 \\cdot \\frac{\\pi}{180})", text).replace(
        "°", r" \cdot \frac{\pi}{180} "
    )
    text = re.sub(
        r"\\(dot|ddot|hat|tilde|vec)\s*\{?\s*(\\?[A-Za-z]+)\s*\}?(?:_(\w|\{\w*\}))?",
        lambda m: f"{m[2]}_{{{m[1]}{(m[3] or '').strip('{}')}}}",
        text,
    )
    text = PYTHON_CALL.sub(lambda m: "\\" + re.sub(r"^a(?!rc)", "arc", m[1]) + " ", text)
    for command in (r"\\sqrt", r"\^", "_"):  # a power's or root's parentheses are its argument
        at = 0
        while m := re.compile(command + r"\s*\(").search(text, at):
            end = closing(text, m.end() - 1)
            at = m.end()
            if end:
                text = f"{text[: m.end() - 1]}{{{text[m.end() : end]}}}{text[end + 1 :]}"
    text = re.sub(
        r"_\s*(?:\{\s*\\([a-zA-Z]+)\s*\}|\\([a-zA-Z]+)|(\d))",
        lambda m: f"_{{{m[1] or m[2] or m[3]}}}",
        text,
    )
    text = re.sub(r"\^\s*(-?\d+(?:\.\d+)?)", r"^{\1}", text)
    text = re.sub(
        r"(?<![A-Za-z\\])((?:\\[a-zA-Z]+|[A-Za-z])(?:_(?:\w|\{[^{}]*\}))?)('+|\^\{?(?:\\prime)+\}?)",
        prime,
        text,
    )
    text = re.sub(
        r"(?<![\w.])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}",
        lambda m: f"({m[1]}+\\frac{{{m[2]}}}{{{m[3]}}})" if int(m[2]) < int(m[3]) else m[0],
        text,
    )
    text = re.sub(
        r"(?<=[\d)])\s*(?=\(|\\frac)|(?<=\))\s*(?=\d)", r" \\cdot ", text
    )  # else the parser adds: (3)(8) = 11
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)


def prime(m) -> str:
    """A primed symbol is another symbol: f', \\omega_L^{\\prime} -> f_{p}, \\omega_{Lp}."""
    base, _, sub = m[1].partition("_")
    return f"{base}_{{{sub.strip('{}')}{'p' * max(1, m[2].count(chr(39)) + m[2].count('prime'))}}}"


def parse(text: str):
    """A sympy object; raises whatever the parser raises. Decimals become exact."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    text = to_latex(text)
    if re.search(r"[\d.]\s+[\d.]", text):
        raise ValueError("two numbers side by side")  # the parser would add them
    if re.search(r"\d\^\d+\^\d+\^", re.sub(r"[{}\s]", "", text)):
        raise ValueError("a tower of powers has no value to compare")
    has_i = re.search(
        r"(?<![A-Za-z\\])(?:i|\\imath)(?![A-Za-z])",
        re.sub(r"_(?:\w|\{[^{}]*\})|\\(?:sum|prod).*", "", text),
    )
    found = latex2sympy(
        text,
        is_real=not has_i,
        convert_degrees=False,
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )
    if isinstance(found, sympy.Expr):
        found = found.xreplace({f: sympy.Rational(str(f)) for f in found.atoms(sympy.Float)})
        if has_i:
            found = found.subs({s: sympy.I for s in found.free_symbols if s.name == "i"})
    return found


def same_scalar(g: str, a: str) -> bool:
    """Two expressions without top-level structure: numbers and formulas by sampling, the rest by math-verify."""
    import sympy

    words = [
        re.fullmatch(r"(?:\\text\{)?[A-Za-z]+(?:[ '.,]{1,2}[A-Za-z]+)*\.?\}?", s)
        and re.search(r"[A-Za-z]{2}", s)
        for s in (g, a)
    ]
    if any(words) and ("\\text" in g + a or max(len(g), len(a)) > 3 or g.isupper()):
        return same_text(g, a)
    try:
        x, y = parse(g), parse(a)
    except (RecursionError, MemoryError):
        raise
    except Exception:  # the parser raises bare Exceptions: not a formula
        return False
    if (
        isinstance(x, sympy.Expr)
        and isinstance(y, sympy.Expr)
        and not isinstance(x, sympy.MatrixBase)
    ):
        if not (x.has(sympy.nan, sympy.zoo) or y.has(sympy.nan, sympy.zoo)):
            return agree(x, y, number(g), number(a))
        return False
    if isinstance(x, sympy.Expr) or isinstance(y, sympy.Expr):
        return False  # a relation or a set is not a value
    from math_verify import verify

    return verify(x, y, timeout_seconds=None)


def agree(x, y, p: tuple | None = None, q: tuple | None = None) -> bool:
    """Whether two sympy expressions have the same value at random points (30 digits, where both are real or free of
    symbols). p, q: `number` of the two texts; a decimal of six or more digits may be a rounding of an exact value."""
    import sympy

    if x == y:
        return True
    if x.is_infinite or y.is_infinite:
        return False
    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    if x.atoms(sympy.core.function.AppliedUndef) | y.atoms(sympy.core.function.AppliedUndef):
        return sympy.simplify(x - y) == 0
    whole = x.has(sympy.Sum, sympy.Product) or y.has(sympy.Sum, sympy.Product)
    rng, seen = random.Random(0), 0
    for i in range(24 if symbols else 1):
        at = {
            s: sympy.Integer(rng.randint(2, 9))
            if whole
            else sympy.Rational(rng.randint(-400 if i % 2 else 20, 400) or 1, 101)
            for s in symbols
        }
        u, v = x.xreplace(at).evalf(30), y.xreplace(at).evalf(30)
        if not (u.is_number and v.is_number and u.is_finite and v.is_finite):
            continue
        if symbols and not (u.is_real and v.is_real) and not (x.has(sympy.I) or y.has(sympy.I)):
            continue
        seen += 1
        gap, size = abs(u - v), max(abs(u), abs(v))
        if gap > size * sympy.Float("1e-20", 30) + sympy.Float("1e-60", 30):
            decimal, exact = (p, v) if p and p[1] else (q, u)
            other = q if decimal is p else p
            return bool(
                decimal
                and decimal[1]
                and not other
                and not symbols
                and exact.is_real
                and same_rounding(Fraction(str(exact)), *decimal)
            )
    return seen >= (4 if symbols else 1)


def same_relation(g: tuple[str, str], a: tuple[str, str]) -> bool:
    """Two relations to zero: the same operator, and sides that differ by a constant factor (positive if ordered)."""
    import sympy

    if g[0] != a[0]:
        return False
    try:
        x, y = parse(g[1]), parse(a[1])
        symbols = sorted(x.free_symbols, key=str)
        if not symbols or x.free_symbols != y.free_symbols:
            return False
        rng, ratios = random.Random(0), []
        for _ in range(12):
            at = {s: sympy.Rational(rng.randint(20, 400), 101) for s in symbols}
            u, v = x.xreplace(at).evalf(30), y.xreplace(at).evalf(30)
            if u.is_real and v.is_real and u.is_finite and v.is_finite and v != 0 and u != 0:
                ratios.append(u / v)
        close = len(ratios) >= 4 and all(
            abs(r - ratios[0]) < abs(ratios[0]) * sympy.Float("1e-18", 30) for r in ratios
        )
        return bool(close and (g[0] in ("=", "\\ne") or ratios[0] > 0))
    except (RecursionError, MemoryError):
        raise
    except Exception:
        return False


# ---------------------------------------------------------------------------------------------------------------
# Grading workers


class Grader:
    """Verdicts on (gold, answer) pairs, each pair decided once.

    Workers are fresh processes of this file (exec, not fork: nothing of vLLM or CUDA is in them). Before each pair a
    worker arms a timer on its own CPU time whose signal it does not handle: when the time is up the kernel ends it,
    whatever it is doing, and a slow machine does not change verdicts. A wall clock in the parent backs that up.
    cache: a file that keeps verdicts between runs; it is dropped when this file has changed since.
    """

    def __init__(
        self,
        cache: Path | None = None,
        workers: int = 2,
        seconds: float = 2.0,
        memory: int = 2 << 30,
    ):
        self.seconds, self.memory, self.lock = seconds, memory, threading.Lock()
        self.known: dict[tuple[str, str], Future] = {}
        self.pool = ThreadPoolExecutor(workers)  # its threads only wait for workers
        self.workers: queue.Queue = queue.Queue()
        for _ in range(workers):
            self.workers.put(None)  # started when the first pair needs one
        self.processes: set[subprocess.Popen] = set()
        self.closed = False
        self.cache = open_cache(cache, self.known) if cache else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        with self.lock:
            for process in self.processes:
                process.kill()
            for process in self.processes:
                process.wait()
            self.processes.clear()

    def submit(self, gold: str, answer: str | None) -> Future:
        """A Future[Verdict]; already done where no worker is needed."""
        key = (gold, answer)
        if key not in self.known:
            if answer is None:
                verdict = Verdict(False, "none")
            else:
                equal = None
                with contextlib.suppress(
                    ValueError, ArithmeticError
                ):  # nothing that a model writes may end a run
                    equal = quick(gold, answer)
                verdict = Verdict(equal, "ok") if equal is not None else None
            self.known[key] = Future() if verdict else self.pool.submit(self._ask, gold, answer)
            if verdict:
                self.known[key].set_result(verdict)
        return self.known[key]

    def __call__(self, gold: str, answer: str | None) -> Verdict:
        return self.submit(gold, answer).result()

    def _start(self) -> subprocess.Popen:
        command = [
            sys.executable,
            __file__,
            "--grading-worker",
            str(self.seconds),
            str(self.memory),
        ]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with self.lock:
            self.processes.add(process)
        return process

    def _end(self, worker: subprocess.Popen) -> int:
        worker.kill()
        with self.lock:
            self.processes.discard(worker)
        return worker.wait()

    def _ask(self, gold: str, answer: str, again: bool = True) -> Verdict:
        """Send one pair to an idle worker and wait; a worker that dies or is late is replaced, and one that died of another
        cause than the pair's own time is asked a second time, of a new worker: somebody else may have killed it, and others."""
        worker, status, lasting = self.workers.get(), "crashed", True
        try:
            if worker and (
                not again or worker.poll() is not None
            ):  # poll alone misses one that is being killed just now
                self._end(worker)
                worker = None
            worker = worker or self._start()
            reply = b""
            with contextlib.suppress(OSError):  # the worker may be gone
                worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                worker.stdin.flush()
                if select.select([worker.stdout], [], [], 30 * self.seconds)[0]:
                    reply = worker.stdout.readline()
                else:
                    status = "timeout"
            if reply:
                verdict = Verdict(*json.loads(reply))
            else:
                lasting = (
                    self._end(worker) == -signal.SIGPROF
                )  # a crash or a stalled machine may pass: ask again next time
                status = "timeout" if lasting else status
                verdict, worker = Verdict(False, status), None
        finally:
            self.workers.put(worker)
        if status == "crashed" and worker is None and again and not self.closed:
            return self._ask(gold, answer, again=False)
        if self.cache and lasting and not self.closed:
            with self.lock:
                self.cache.write(json.dumps([gold, answer, *verdict]) + "\n")
                self.cache.flush()
        return verdict


def grading_worker(seconds: float, memory: int) -> None:
    """Answer pairs from standard input until it closes."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries may print
    logging.disable()
    os.nice(5)
    import math_verify  # noqa: F401  not in the time of the first pair
    import sympy  # noqa: F401

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF, default action: the process ends
        try:
            verdict = bool(same(*json.loads(line))), "ok"
        except MemoryError:
            verdict = False, "memory"
        except Exception:  # noqa: BLE001  whatever a parser for untrusted text raises
            verdict = False, "error"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=out, flush=True)


def open_cache(path: Path, known: dict):
    """The verdict file, open for appending, its verdicts already in `known`; begun anew when the rules have changed."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    if lines[:1] == [json.dumps({"grader": version})]:
        for line in lines[1:]:
            with contextlib.suppress(ValueError, TypeError):  # a torn last line
                gold, answer, equal, status = json.loads(line)
                future = known.setdefault((gold, answer), Future())
                if not future.done():
                    future.set_result(Verdict(equal, status))
        file = path.open("a")
        file.write("" if path.read_bytes().endswith(b"\n") else "\n")
    else:
        file = path.open("w")
        file.write(json.dumps({"grader": version}) + "\n")
    return file


def fallback_answer(text: str) -> str | None:
    """For texts without a box (--fallback): the last formula or number of what follows the last `answer is`, `answer:`
    or `####`, else of the last line that has one. A guess, and therefore off by default."""
    said = re.findall(
        r"(?:answer(?:\s+is|\s*:)|####|^\s*A:)[\s:*]*(.+?)(?=\.?\s*(?:I hope|<\||\n|$))",
        text,
        re.M | re.I,
    )
    formula = r"\$\$?([^$]*[\d\\][^$]*)\$\$?|\\[(\[]\s*(.*?[\d\\].*?)\s*\\[)\]]|(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s*\\?%)?)"
    for part in [*said[-1:], *reversed(text.strip().splitlines())]:
        if found := re.findall(formula, part):
            return "".join(found[-1]).strip().rstrip(",")
        if part in said[-1:] and len(part.split(",")[0]) < 40:
            return part.split(",")[0].strip(" .*$()") or None
    return None


# ---------------------------------------------------------------------------------------------------------------
# Votes and metrics: pure functions


def vote(answers: list[str | None], grader: Grader | None = None) -> Vote:
    """Cluster answers by equivalence with a cluster's first member; None does not vote."""
    with contextlib.nullcontext(grader) if grader else Grader(workers=1) as grader:
        clusters: list[tuple[str, list[int]]] = []
        for i, answer in enumerate(answers):
            if answer is None:
                continue
            home = next((c for c in clusters if c[0] == answer), None) or next(
                (c for c in clusters if grader(c[0], answer).equal), None
            )
            if home is None:
                clusters.append(home := (answer, []))
            home[1].append(i)
    ranked = sorted(clusters, key=lambda c: -len(c[1]))
    return Vote(ranked[0][0] if ranked else None, [(a, len(at), at) for a, at in ranked])


def majority_at(clusters: list[tuple[int, bool]], n: int) -> list[float]:
    """Expected majority@k for k = 1..n over all subsets of k of n samples; a tie of m clusters counts 1/m per right one.

    clusters: (votes, right) of each; their votes sum to n or less, the rest are samples without an answer. For a right
    cluster that gets t votes, ways[m][s] counts the choices from all others that add s samples and m further clusters
    with exactly t votes, none with more. Exact; for a subset of all (k = n) it is the plain vote.

    >>> majority_at([(2, True), (1, False)], 3)  # of one sample 2/3, of two: 1/3 both right, 2/3 a tie; of three: the vote
    [0.6666666666666666, 0.6666666666666666, 1.0]
    """
    silent, credit = n - sum(c for c, _ in clusters), [Fraction(0)] * (n + 1)
    for j, (votes, right) in enumerate(clusters):
        for t in range(1, votes + 1) if right else ():
            ways = [[math.comb(silent, s) for s in range(n - t + 1)]]
            for other, _ in clusters[:j] + clusters[j + 1 :]:
                rows = len(ways) + (other >= t)
                new = [[0] * (n - t + 1) for _ in range(rows)]
                for m, row in enumerate(ways):
                    for s, count in enumerate(row):
                        for i in range(min(other, t, n - t - s) + 1) if count else ():
                            new[m + (i == t)][s + i] += count * math.comb(other, i)
                ways = new
            for m, row in enumerate(ways):
                for s, count in enumerate(row):
                    credit[t + s] += Fraction(math.comb(votes, t) * count, m + 1)
    return [float(credit[k] / math.comb(n, k)) for k in range(1, n + 1)]


def pass_at(n: int, c: int, k: int) -> float:
    """Unbiased pass@k from n samples of which c are right: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    >>> pass_at(4, 1, 1), pass_at(4, 1, 4)
    (0.25, 1.0)
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval_of(
    *series: list[float], statistic=lambda *means: means[0], resamples: int = 2000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of statistic(mean of each series); the series are resampled together."""
    import numpy as np

    data = np.array(series, float)  # (series, problems)
    if data.shape[1] < 2:
        return (math.nan, math.nan)
    draws = np.random.default_rng(0).integers(0, data.shape[1], (resamples, data.shape[1]))
    low, high = np.percentile(statistic(*(row[draws].mean(1) for row in data)), [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------------------------
# A run's folder

CUT = ("max_tokens", "context", "max_calls")  # the trace was ended, it did not end


def trace_row(trace: Trace) -> dict:
    """One line of traces.jsonl. Lengths in tokens; spans tile the text as [kind, characters]."""
    return {
        "id": trace.problem.id,
        "sample": trace.sample,
        "answer": trace.answer,
        "finish": trace.finish,
        "tokens": trace.sampled,
        "all_tokens": len(trace.ids),
        "box_tokens": trace.box_tokens,
        "calls": [{"status": r.status, "seconds": round(r.seconds, 4)} for _, r in trace.calls],
        "seconds": round(trace.seconds, 3),
        "text": trace.text,
        "spans": trace.spans,
    }


def read_traces(out: Path, tell: bool = False) -> dict[tuple[str, int], dict]:
    """(problem id, sample) -> row, of all ranks: each appends to a file of its own. A line that a kill cut in two is left
    out, so is a damaged one (said where `tell`)."""
    rows: dict[tuple[str, int], dict] = {}
    for path in sorted(out.glob("traces*.jsonl")):
        good = damaged = 0
        for line in path.open("rb"):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
                rows.setdefault((row["id"], row["sample"]), row)
                good += 1
            except (ValueError, TypeError, KeyError):
                damaged += line.endswith(b"\n")
        if damaged and not good:
            raise UserError(f"{path}: no line is a trace; this file was not written by evaluate.py")
        if damaged and tell:
            print(
                f"{path}: {damaged} damaged lines are left out, their traces are sampled again",
                file=sys.stderr,
            )
    return rows


def write_json(path: Path, value, lines: bool = False) -> None:
    """Write a whole file or none of it."""
    text = (
        "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in value)
        if lines
        else json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    )
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`key: old -> new` for everything that differs between two nested dicts."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {str(a)[:60]} -> {str(b)[:60]}")
    return found


def open_traces(out: Path, rank: int, stack: contextlib.ExitStack):
    """This rank's file of traces, open for appending and locked until the stack closes."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / (f"traces-{rank}.jsonl" if rank else "traces.jsonl")
    file = stack.enter_context(path.open("a", encoding="utf-8"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"another run is writing into {out}: wait for it, or give another --out"
        ) from None
    return file


def open_run(
    out: Path, config: dict, problems: list[dict], rank: int = 0
) -> dict[tuple[str, int], dict]:
    """Create or continue a run's folder; returns the traces it already holds. A run may grow, by --n and --limit, and never
    shrinks. Raises UserError for other settings and for other problems under the same name."""
    file = out / "config.json"
    while (
        rank and not file.exists()
    ):  # the first rank writes it, and torchrun ends us if that one fails
        time.sleep(0.1)
    if file.exists():
        try:
            old = json.loads(file.read_text())
            changed = differences(old["settings"], json.loads(json.dumps(config["settings"])))
            there = {
                (row["dataset"], row["id"]): row
                for row in map(json.loads, (out / "problems.jsonl").read_bytes().splitlines())
            }
            config = {**config, "n": max(old["n"], config["n"]), "started": old["started"]}
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{file} is not a run's configuration: give another folder with --out"
            ) from None
        if changed:
            raise UserError(
                f"{out} holds a run with other settings ({'; '.join(changed)}): give another --out, or the old settings"
            )
        for name in {row["dataset"] for row in problems}:
            ours, theirs = (
                {row["id"] for row in rows if row["dataset"] == name}
                for rows in (problems, there.values())
            )
            if not (ours <= theirs or theirs <= ours):
                raise UserError(
                    f"{out} holds a run on other problems of the name {name}: give another --out"
                )
        for row in problems:
            key = row["dataset"], row["id"]
            there[key] = (
                row if row["answer"] is not None else there.get(key, row)
            )  # --no-grade forgets no gold answer
        problems = list(there.values())
    elif any(path.stat().st_size for path in out.glob("traces*.jsonl")):
        raise UserError(f"{out} has traces but no config.json: give another folder with --out")
    if rank == 0:
        write_json(out / "problems.jsonl", problems, lines=True)
        write_json(file, config)
    return read_traces(out, tell=True)


def load_run(folder: Path, fallback: bool = False) -> Run:
    """Read and grade a run's folder. Raises UserError when it is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
        problems = [
            json.loads(line) for line in (folder / "problems.jsonl").read_bytes().splitlines()
        ]
        n, name = config["n"], config["name"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{folder} is not a run: it needs the config.json and problems.jsonl that evaluate.py --out writes"
        ) from None
    traces: dict[str, list[dict]] = {}
    for (pid, _), row in sorted(read_traces(folder).items(), key=lambda item: item[0][1]):
        traces.setdefault(pid, []).append(row)
    writable = os.access(folder, os.W_OK)
    with Grader(folder / "grades.jsonl" if writable else None) as grader:

        def answer(row):
            prose = "".join(s for kind, s in pieces(row) if kind == "model") if fallback else ""
            return row["answer"] or fallback_answer(prose)

        for p in problems:  # all at once, so that every worker is busy
            for row in traces.get(p["id"], ()):
                if p["answer"] is not None:
                    grader.submit(p["answer"], answer(row))
        datasets: dict[str, list[Graded]] = {}
        for p in problems:
            if rows := traces.get(p["id"]):
                datasets.setdefault(p["dataset"], []).append(
                    score(p, rows, [answer(r) for r in rows], grader)
                )
    missing = sum(max(0, n - len(traces.get(pid, ()))) for pid in {p["id"] for p in problems})
    return Run(folder, name, config, datasets, missing)


def pieces(row: dict) -> list[tuple[str, str]]:
    """A trace's text as (kind, text): model, code or output."""
    at, found = 0, []
    for kind, length in row["spans"]:
        found.append((kind, row["text"][at : at + length]))
        at += length
    return found


def score(problem: dict, rows: list[dict], answers: list[str | None], grader: Grader) -> Graded:
    """Grade and vote one problem's traces. A cluster is right if its first member is."""
    gold = problem["answer"]
    verdicts = [grader(gold, a) if gold is not None else Verdict(False, "none") for a in answers]
    clusters = [
        (a, count, at, verdicts[at[0]].equal) for a, count, at in vote(answers, grader).clusters
    ]
    return Graded(
        problem,
        rows,
        answers,
        verdicts,
        clusters,
        majority_at([(c, right) for _, c, _, right in clusters], len(rows)),
    )


# ---------------------------------------------------------------------------------------------------------------
# The report


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def at_k(scored: list[Graded], k: int | None = None) -> list[float]:
    """majority@k of each problem; of all its samples where it has fewer, or without a k."""
    return [s.majority[min(k or len(s.rows), len(s.rows)) - 1] for s in scored]


def lengths(scored: list[Graded], key: str = "tokens") -> list[float]:
    """Mean length of each problem's traces, in tokens."""
    return [mean(r[key] for r in s.rows) for s in scored]


def percent(values: list[float]) -> str:
    low, high = interval_of(values)
    return f"{100 * mean(values):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def tokens(values: list[float]) -> str:
    low, high = interval_of(values)
    return f"{mean(values):.0f} [{low:.0f}, {high:.0f}]"


def share(counts: Counter, total: int) -> str:
    return (
        ", ".join(
            f"{name} {count} ({100 * count / total:.1f} %)" for name, count in counts.most_common()
        )
        or "none"
    )


def details(scored: list[Graded]) -> dict[str, str]:
    """Everything that is measured on one dataset of one run, by name."""
    rows = [r for s in scored for r in s.rows]
    k = max(len(s.rows) for s in scored)
    whole = [r["tokens"] for r in rows if r["finish"] not in CUT]
    first_box = [r["box_tokens"] for r in rows if r["box_tokens"] is not None]
    calls = Counter(c["status"] for r in rows for c in r["calls"])
    failed = Counter({name: count for name, count in calls.items() if name != "ok"})
    undecided = Counter(
        v.status for s in scored for v in s.verdicts if v.status not in ("ok", "none")
    )
    graded = any(s.problem["answer"] is not None for s in scored)
    result = {"problems, traces": f"{len(scored)}, {len(rows)}"}
    if graded:
        result |= {
            f"majority@{k}, %": percent(at_k(scored, k)),
            f"avg@{k}, %": percent([s.right / len(s.rows) for s in scored]),
            f"pass@{k}, %": percent(
                [pass_at(len(s.rows), s.right, min(k, len(s.rows))) for s in scored]
            ),
        }
    return result | {
        "model tokens": tokens(lengths(scored)),
        "all tokens (with outputs)": tokens(lengths(scored, "all_tokens")),
        "model tokens of traces that were not cut": f"{mean(whole):.0f}",
        "traces cut, %": f"{100 * (1 - len(whole) / len(rows)):.1f}",
        "model tokens up to the first box": f"{mean(first_box):.0f}",
        "traces without an answer, %": f"{100 * mean(a is None for s in scored for a in s.answers):.1f}",
        "calls per trace": f"{mean(len(r['calls']) for r in rows):.2f}",
        "traces with a call, %": f"{100 * mean(bool(r['calls']) for r in rows):.1f}",
        "failed calls": share(failed, max(1, sum(calls.values()))),
        "finish": share(Counter(r["finish"] for r in rows), len(rows)),
        "seconds per trace": f"{mean(r['seconds'] for r in rows):.1f}",
        "answers that could not be compared (count as wrong)": share(undecided, len(rows)),
    }


def table(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table; the first column is left-aligned."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *body]
    return (
        "\n".join(
            "| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines
        )
        + "\n"
    )


GROUPS = ("level", "subject", "difficulty", "topic", "family")


def breakdown(runs: list[Run], dataset: str, key: str) -> list[list[str]] | None:
    """Rows (value, problems, majority@n and mean length of each run); None where a column is missing or has too many values."""

    def value(s):
        v = s.problem["meta"].get(key)
        return topic_levels(v)[:2][-1] if key == "topic" and topic_levels(v) else v

    groups: dict = {}
    for i, run in enumerate(runs):
        for s in run.datasets.get(dataset, ()):
            if value(s) is not None:
                groups.setdefault(value(s), [[] for _ in runs])[i].append(s)
    if not 1 < len(groups) <= 40:
        return None
    return [
        [
            str(v),
            str(max(map(len, parts))),
            *(f"{100 * mean(at_k(p)):.1f} / {mean(lengths(p)):.0f}" if p else "" for p in parts),
        ]
        for v, parts in sorted(groups.items(), key=lambda item: (str(type(item[0])), item[0]))
    ]


def compare(base: list[Graded], other: list[Graded]) -> tuple[str, str, int]:
    """(difference of majority@n in points, change of length in %, problems), paired over the problems of both."""
    first, second = ({s.problem["id"]: s for s in scored} for scored in (base, other))
    ids = [i for i in first if i in second]
    if not ids:
        return "", "", 0
    a, b = [first[i] for i in ids], [second[i] for i in ids]
    gains = [y - x for x, y in zip(at_k(a), at_k(b), strict=True)]
    low, high = interval_of(gains)
    change = lambda x, y: 100 * (y / x - 1)  # noqa: E731
    x, y = lengths(a), lengths(b)
    shorter, longer = interval_of(x, y, statistic=change)
    return (
        f"{100 * mean(gains):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
        f"{change(mean(x), mean(y)):+.1f} [{shorter:+.1f}, {longer:+.1f}]",
        len(ids),
    )


def report(runs: list[Run]) -> str:
    """The runs side by side as Markdown."""
    names = list(dict.fromkeys(name for run in runs for name in run.datasets))
    if not names:
        raise UserError("no traces yet: nothing to report")
    ks = {
        name: max(len(s.rows) for run in runs for s in run.datasets.get(name, ())) for name in names
    }
    head = [c for name in names for c in (f"{name}: majority@{ks[name]}, %", "model tokens")]
    body = [
        [
            run.name,
            *(
                c
                for name in names
                for c in (
                    (
                        percent(at_k(run.datasets[name], ks[name])),
                        tokens(lengths(run.datasets[name])),
                    )
                    if name in run.datasets
                    else ("", "")
                )
            ),
        ]
        for run in runs
    ]
    text = (
        "Mean with 95 % interval (bootstrap over problems). Length: tokens the model wrote, per trace.\n\n"
        + table(["", *head], body)
    )
    rules = {run.config["settings"]["sampling"].get("end_at") for run in runs}
    notes = [f"{run.name}: {run.missing} traces are still missing" for run in runs if run.missing]
    notes += (
        ["the runs end their traces by different rules (--end-at): lengths are not comparable"]
        if len(rules) > 1
        else []
    )
    text += "".join(f"\nNote: {note}.\n" for note in notes)
    if len(runs) > 1:
        head = [c for name in names for c in (f"{name}: points", "length, %", "problems")]
        body = [
            [
                run.name,
                *(
                    c
                    for name in names
                    for c in compare(runs[0].datasets.get(name, []), run.datasets.get(name, []))
                ),
            ]
            for run in runs[1:]
        ]
        text += f"\n## Difference from {runs[0].name}, on the same problems\n\n" + table(
            ["", *head], body
        )
    for name in names:
        here = [run for run in runs if name in run.datasets]
        columns = [details(run.datasets[name]) for run in here]
        keys = list(dict.fromkeys(key for column in columns for key in column))
        text += f"\n## {name}\n\n" + table(
            ["", *(run.name for run in here)],
            [[key, *(c.get(key, "") for c in columns)] for key in keys],
        )
        powers = sorted({2**i for i in range(20) if 2**i < ks[name]} | {ks[name]})
        body = [
            [
                str(k),
                *(
                    f"{100 * mean(at_k(s, k)):.1f} / {100 * mean(pass_at(len(p.rows), p.right, min(k, len(p.rows))) for p in s):.1f}"
                    for s in (run.datasets[name] for run in here)
                ),
            ]
            for k in powers
        ]
        text += "\n" + table(["k", *(f"{run.name}: majority@k / pass@k" for run in here)], body)
        for key in GROUPS:
            if rows := breakdown(here, name, key):
                text += "\n" + table(
                    [
                        key,
                        "problems",
                        *(f"{run.name}: majority@{ks[name]} / tokens" for run in here),
                    ],
                    rows,
                )
    return text


# ---------------------------------------------------------------------------------------------------------------
# The command line


class Meter:
    """Progress: a bar on a terminal, a line every half minute elsewhere. Counts traces, accuracy so far, tokens/s."""

    def __init__(self, total: int, done: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.start, self.line_at, self.tokens, self.total, self.done = (
            time.monotonic(),
            time.monotonic(),
            0,
            total,
            done,
        )
        self.first = done
        self.waiting: list[Future] = []
        self.right: list[bool] = []
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} traces"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=total, completed=done)

    def add(self, sampled: int, verdict: Future | None) -> None:
        self.done, self.tokens = self.done + 1, self.tokens + sampled
        if verdict:  # only one rank grades
            asked, self.waiting = [*self.waiting, verdict], []
            for future in asked:  # equal answers share one
                if future.done():
                    self.right.append(future.result().equal)
                else:
                    self.waiting.append(future)
        seconds = time.monotonic() - self.start
        text = f"avg@1 {100 * mean(self.right):.1f} %  " if self.right else ""
        text += f"{self.tokens / max(0.1, seconds):.0f} tok/s"
        self.bar.update(self.task, completed=self.done, description=text)
        if not self.console.is_terminal and (
            time.monotonic() - self.line_at > 30 or self.done == self.total
        ):
            self.line_at = time.monotonic()
            left = seconds / max(1, self.done - self.first) * (self.total - self.done)
            print(
                f"{text}  {self.done}/{self.total} traces, about {left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )


def small_meta(meta: dict) -> dict:
    """The columns worth keeping beside a problem: short ones."""
    return {
        k: v for k, v in meta.items() if isinstance(v, (str, int, float)) and len(str(v)) <= 120
    }


def adapter_digest(folder: str | None) -> str | None:
    """A hash of an adapter's weights: the same folder may hold another adapter tomorrow."""
    files = sorted(Path(folder).glob("adapter_model.*")) if folder and Path(folder).is_dir() else []
    return (
        hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16] if files else None
    )


def run(args) -> int:
    """Sample what is missing in the run's folder, then print its report."""
    rank, ranks = take_rank()  # before anything can import torch
    sampling = asdict(settings_from(args))  # a wrong flag ends here, before anything is loaded
    names = {
        name: Path(name).stem if name.endswith((".jsonl", ".json", ".csv", ".parquet")) else name
        for name in args.dataset.split(",")
        if name
    }
    if len(set(names.values())) < len(names):
        raise UserError(
            f"--dataset {args.dataset}: two files have the same name; rename one, it is the set's name in the report"
        )
    loaded = {
        short: load_from_flags(args, name, need_answer=not args.no_grade)
        for name, short in names.items()
    }
    rows = [
        {
            "dataset": name,
            "id": p.id,
            "question": p.question,
            "answer": None if args.no_grade else p.answer,
            "meta": small_meta(p.meta),
        }
        for name, problems in loaded.items()
        for p in problems
    ]
    problems: dict[str, Problem] = {p.id: p for ps in loaded.values() for p in ps}
    out = Path(
        args.out
        or "-".join(
            ["runs/" + "-".join(loaded), Path(args.model).name, *["baseline"] * args.no_agent]
        )
    ).absolute()
    lora = chosen_lora(args.model, args.lora)
    chosen = {
        key: getattr(args, key)
        for key in ("config", "split", "question_key", "answer_key", "where", "shuffle")
    }
    settings = {
        "model": args.model,
        "lora_sha256": adapter_digest(lora),
        "sampling": sampling,
        "datasets": list(loaded),
        **chosen,
    }
    config = {
        "name": args.name or out.name,
        "n": args.n,
        "lora": lora,
        "settings": settings,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": f"{os.uname().nodename}, {os.cpu_count()} cores",
    }
    with contextlib.ExitStack() as stack:
        file = open_traces(out, rank, stack)
        done = open_run(out, config, rows, rank)
        # A rank's share goes by place, not by what is missing: ranks may look into the folder at different moments.
        # All problems' first traces come before the second ones: those find their prompt in the engine's cache.
        every = [(p, i) for i in range(args.n) for p in problems.values()]
        jobs = [
            (p, i)
            for place, (p, i) in enumerate(every)
            if place % ranks == rank and (p.id, i) not in done
        ]
        if jobs:
            sample(
                args,
                out,
                file,
                None if rank or args.no_grade else out / "grades.jsonl",
                problems,
                jobs,
                done,
                stack,
            )
    if rank:
        return 0
    while ranks > 1:  # torchrun ends us if a rank fails
        started = time.monotonic()
        if read_traces(out).keys() >= {(p.id, i) for p, i in every}:
            break
        time.sleep(1 + 10 * (time.monotonic() - started))
    finished = load_run(out, args.fallback)
    write_json(
        out / "results.json",
        [
            {
                "id": s.problem["id"],
                "dataset": name,
                "gold": s.problem["answer"],
                "majority": s.majority,
                "answers": s.answers,
                "correct": [v.equal for v in s.verdicts],
                "status": [v.status for v in s.verdicts],
            }
            for name, scored in finished.datasets.items()
            for s in scored
        ],
    )
    print(report([finished]))
    return 0


def sample(
    args,
    out: Path,
    file,
    grades: Path | None,
    problems: dict[str, Problem],
    jobs: list[tuple[Problem, int]],
    done: dict,
    stack,
) -> None:
    """Sample the missing traces, one line each in `file` the moment it ends; where `grades` is given, grading goes on beside it."""
    path = Path(file.name)
    whole = path.read_bytes().rfind(b"\n") + 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)  # a line that a kill cut in two
    print(
        f"{out}: {len(jobs)} traces to sample" + (f", {len(done)} are there" if done else ""),
        file=sys.stderr,
        flush=True,
    )
    there = sum(pid in problems for pid, _ in done)
    agent = stack.enter_context(open_agent(args, list(problems.values())))
    grader = stack.enter_context(Grader(grades)) if grades else None
    meter = Meter(len(jobs) + there, there)
    stack.enter_context(meter.bar)
    try:
        for trace in agent.rollout(iter(jobs)):
            file.write(json.dumps(trace_row(trace), ensure_ascii=False) + "\n")
            file.flush()
            gold = trace.problem.answer
            meter.add(
                trace.sampled,
                grader.submit(gold, trace.answer) if grader and gold is not None else None,
            )
    except KeyboardInterrupt:
        meter.bar.stop()
        print(
            f"\nstopped: {meter.done} of {meter.total} traces are in {out}; the same command goes on from there",
            file=sys.stderr,
        )
        raise


def grade_file(path: Path, out: Path | None, fallback: bool) -> None:
    """Grade rows made elsewhere: `correct` and `extracted` are written beside each row's columns."""
    if not path.is_file():
        raise UserError(f"--grade {path}: no such file")
    rows = []
    for i, line in enumerate(
        path.read_bytes().split(b"\n"), 1
    ):  # not splitlines of a text: U+2028 is no end of a line
        if line.strip():
            try:
                row = json.loads(line)
                rows.append(
                    (
                        row,
                        str(row["gold"] if row.get("gold") is not None else row["answer"]),
                        str(row["text"]),
                    )
                )
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                reason = (
                    f"has no column {error}"
                    if isinstance(error, KeyError)
                    else "is not a JSON object"
                )
                raise UserError(
                    f"{path}: line {i} {reason}; a row needs `text`, and `gold` or `answer`"
                ) from None
    if not rows:
        raise UserError(f"{path}: no rows")
    written = re.compile(
        r"```(?:output|python|py).*?(?:```|\Z)|<tool_call>.*?(?:</tool_call>|\Z)", re.S
    )  # tools' text is not the model's answer
    out = out or path.with_suffix(".graded.jsonl")
    with Grader() as grader:
        found = [
            extract_answer(prose := written.sub("", text))
            or (fallback_answer(prose) if fallback else None)
            for _, _, text in rows
        ]
        futures = [
            grader.submit(gold, answer) for (_, gold, _), answer in zip(rows, found, strict=True)
        ]
        verdicts = [f.result() for f in futures]
    write_json(
        out,
        [
            {**row, "extracted": a, "correct": v.equal, "grading": v.status}
            for (row, _, _), a, v in zip(rows, found, verdicts, strict=True)
        ],
        lines=True,
    )
    counts = Counter(v.status for v in verdicts if v.status not in ("ok", "none"))
    print(
        f"{sum(v.equal for v in verdicts)} of {len(rows)} right, {percent([float(v.equal) for v in verdicts])} %; "
        f"{found.count(None)} without an answer; could not be compared: {share(counts, len(rows))}\nwritten: {out}"
    )


def ablation(args, argv: list[str]) -> None:
    """The paper's rows, one after another, each in a process and a folder of its own; then their report."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--model", "--lora", "--base-model", "--out", "--name"):
        own.add_argument(flag)
    for flag in ("--ablation", "--no-agent"):
        own.add_argument(flag, action="store_true")
    _, rest = own.parse_known_args(argv)
    lora = chosen_lora(args.model, args.lora)
    base, tuned = (
        args.base_model or args.model,
        (args.model, lora) if lora or args.base_model else None,
    )
    out = Path(args.out or "runs/ablation")
    plan = [
        ("Baseline", (base, None), True),
        ("+ GRPO", tuned, True),
        ("+ Agent", (base, None), False),
        ("DeepMath", tuned, False),
    ]
    folders = []
    for name, weights, plain in plan:
        if weights:
            folders.append(out / name.lower().replace("+ ", "").replace(" ", "-"))
            command = [
                sys.executable,
                __file__,
                *rest,
                "--name",
                name,
                "--out",
                str(folders[-1]),
                *["--no-agent"] * plain,
            ]
            command += ["--model", weights[0], "--lora", weights[1] or "none"]
            print(f"\n{name}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
            if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                sys.exit(code)
    print(report([load_run(folder, args.fallback) for folder in folders]))


def main() -> int:
    if sys.argv[1:2] == ["--grading-worker"]:
        return grading_worker(float(sys.argv[2]), int(sys.argv[3])) or 0
    parser = Parser(
        description="Evaluate a model on benchmarks: accuracy by majority vote, lengths, calls.",
        allow_abbrev=False,
    )
    # What to do
    group = parser.add_argument_group("what to do instead of a run")
    group.add_argument(
        "--report",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="print a Markdown report of finished or unfinished runs; no model needed",
    )
    group.add_argument(
        "--grade",
        type=Path,
        metavar="FILE.jsonl",
        help="grade rows made elsewhere (`gold` or `answer`, and `text`)",
    )
    group.add_argument(
        "--ablation",
        action="store_true",
        help="Baseline, + GRPO, + Agent, DeepMath one after another; without an adapter or --base-model the second and fourth are left out",
    )
    # The run
    group = parser.add_argument_group("run")
    group.add_argument(
        "--n", type=int, default=16, metavar="N", help="traces per problem (default: %(default)s)"
    )
    group.add_argument(
        "--out",
        metavar="DIR",
        help="the run's folder, or --grade's output file (default: runs/ and the settings' names)",
    )
    group.add_argument("--name", help="the run's name in reports (default: its folder's)")
    group.add_argument(
        "--fallback",
        action="store_true",
        help="where no box is found, guess the answer from the text's end",
    )
    group.add_argument(
        "--no-grade", action="store_true", help="generate only: the rows need no gold answer"
    )
    group.add_argument(
        "--base-model",
        metavar="ID|DIR",
        help="--ablation: the model before training, where --model is a fully tuned one",
    )
    add_data_flags(parser)
    add_model_flags(parser)
    args = parser.parse_args()
    if args.n < 1:
        raise UserError(f"--n must be at least 1, not {args.n}")
    if args.report:
        print(report([load_run(folder, args.fallback) for folder in args.report]))
    elif args.grade:
        grade_file(args.grade, Path(args.out) if args.out else None, args.fallback)
    elif args.ablation:
        settings_from(args)  # a wrong flag ends here, not after the first rows
        ablation(args, sys.argv[1:])
    else:
        return run(args)
    return 0


if __name__ == "__main__":
    run_main(main)
