r"""Grading: find the answer in a model's text, decide whether it equals the gold one, and vote.

    python grade.py outputs.jsonl        # rows of `gold` (or `answer`) and `text`; --fallback,
    --out

A model's answer is the last \boxed{} that it wrote. Whether that is the gold answer is decided by
`same`, a short list of rules, from cheap to dear: words are compared as words and numbers exactly,
lists, tuples and intervals are taken apart and compared piece by piece, formulas by their values
at random points. math-verify reads the LaTeX and decides what is left: sets, matrices, systems.

An answer wrongly taken for right is a reward for a mistake, one wrongly taken for wrong costs a
little accuracy: where a rule is in doubt, the answer is wrong. Computer algebra on what a model
wrote may run for ever or eat all memory, so `Grader` runs it in processes that the kernel ends.

Left out: times of day, number bases, the letters of multiple choice, conversion between units, an
LLM as judge (verdicts must repeat).
"""

import contextlib
import json
import logging
import math
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

# ---- The answer in a text


def boxes(text: str) -> list[tuple[str, int]]:
    r"""(content, end) of every complete, brace-matched \boxed{} or \fbox{}, outermost ones, in
    order.
    """
    closes, open_braces = {}, []  # one pass: a model that loops may open thousands of boxes
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ and \} are a set's, not LaTeX's
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif brace[0] == "}" and open_braces:
            closes[open_braces.pop()] = brace.start()
    found, at = [], 0
    for box in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        close = closes.get(box.end() - 1)
        if close and box.start() >= at:
            at = close + 1
            found.append((text[box.end() : close].strip(), at))
    return found


def extract_answer(text: str) -> str | None:
    r"""The last complete, non-empty \boxed{} of a text, or None.

    >>> extract_answer(r"First \boxed{1}, no: \boxed{\frac{1}{2}}, and now \boxed{")
    '\\frac{1}{2}'
    """
    contents = [content for content, _ in boxes(text) if content]
    return contents[-1] if contents else None


def fallback_answer(text: str) -> str | None:
    """A guess for texts without a box: the last formula or number after the last `answer is`,
    `answer:` or `####`, else of the last line that has one.
    """
    announced = re.findall(
        r"(?:answer(?:\s+is|\s*:)|####|^\s*A:)[\s:*]*(.+?)(?=\.?\s*(?:I hope|<\||\n|$))",
        text,
        re.M | re.I,
    )
    formula = r"\$\$?([^$]*[\d\\][^$]*)\$\$?|\\[(\[]\s*(.*?[\d\\].*?)\s*\\[)\]]"
    number = r"(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s*\\?%)?)"
    for part in [*announced[-1:], *reversed(text.strip().splitlines())]:
        if found := re.findall(f"{formula}|{number}", part):
            return "".join(found[-1]).strip().rstrip(",")
        if part in announced[-1:] and len(part.split(",")[0]) < 40:
            return part.split(",")[0].strip(" .*$()") or None  # a word: «the answer is Tuesday»
    return None


# ---- One spelling for what LaTeX can write in many ways

# Commands and characters that mean the same, and what we write for them.
SPELLINGS = {
    "left right big bigl bigr Big Bigl Bigr bigg Bigg displaystyle textstyle limits hfill": "",
    "mathrm mathbf mathit textbf textit textrm textnormal operatorname mbox boxed": r"\text",
    "dfrac tfrac cfrac": r"\frac",
    "quad qquad thinspace \u00a0 \u2009 \u202f": " ",
    "leq leqslant ≤": r"\le ",
    "geq geqslant ≥": r"\ge ",
    "neq ≠": r"\ne ",
    "lt": "<",
    "gt": ">",
    "in ∈": "=",  # x \in [0, 1) names a value, as x = 5 does
    "cup": "∪",
    "approx simeq": "≈",
    "circ degree": "°",
    "infty ∞": r"\infty ",
    "varnothing ∅": r"\emptyset ",
    "langle": "(",
    "rangle": ")",
    "lbrace": r"\{",
    "rbrace": r"\}",
    "− –": "-",
    "×": r"\times ",
    "· ⋅": r"\cdot ",
    "÷": "/",
    "π": r"\pi ",
    "√": r"\sqrt ",
    "²": "^2",
    "³": "^3",
}
SPELLINGS = {name: new for names, new in SPELLINGS.items() for name in names.split(" ")}

# (pattern, replacement), in this order.
TIDY = [
    (r"\\\\(?:\[[\d.]*(?:pt|em|ex|mm|cm)\])?", " ¶ "),  # the end of a row
    (
        r"(?<=\d)\s*(?:\{\s*,\s*\}|,?\s*\\!|\\,)\s*(?=\d{3}(?!\d))",
        "",
    ),  # 14{,}916  32,\!349  10\,000
    (r"\\\$\s*", "¤"),  # an amount keeps its dollar: it is a unit
    (r"\$|\\[()](?!\w)|\\!", ""),
    (r"\\[,;:> ]|~", " "),
    (r"\\([A-Za-z]+)\.?|[^\x00-\x7f]", lambda m: SPELLINGS.get(m[1] or m[0], m[0])),
    (r"\\text\s*\{\s*(?:\(([A-Za-z])\)|([A-Za-z])|)\s*\}(?!\^)", r" \1\2"),  # a letter is a symbol
    (r"\\(?:text\s*\{\s*)?(?:percent|percentage|pct)\s*\}", "%"),
    (r"\\?%|\\text\s*\{\s*(?:percent|percentage)\s*\}|\b(?:percent|percentage|pct)\b", "%"),
    (r"\^\s*\{?\s*°\s*\}?|\\text\{\s*deg(?:rees?)?\s*\}|(?<=\d)\s*degrees?\b", "°"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"\\frac\s*(\w)\s*(?=[\w{\\])", r"\\frac{\1}"),  # \frac12, \frac 1{2}
    (r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\*\*", "^"),
    (r"\+\s*\\infty", r"\\infty"),
    (r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+|(?<=\))(?:and|or)(?=\()", " , "),
    (r"\\begin\{[bp]?matrix\}([^&]*?)(?:¶\s*)?\\end\{[bp]?matrix\}", lambda m: as_tuple(m[1])),
    (r"\s*_\s*(?:\{\s*(\w+)\s*\}|(\w))", r"_{\1\2}"),
    (r"\s+", " "),
]
TIDY = [(re.compile(pattern), new) for pattern, new in TIDY]


def as_tuple(column: str) -> str:
    """The body of a column vector as a tuple."""
    return "(" + column.replace("¶", ",") + ")"


@lru_cache(maxsize=10_000)
def tidy(text: str) -> str:
    """An answer without LaTeX's noise."""
    if "\\\\begin" in text or not re.search(r"\\begin|\\\\\s|\\\\$", text):
        text = text.replace("\\\\", "\\")  # escaped twice: only a matrix needs a double backslash
    for pattern, new in TIDY:
        text = pattern.sub(new, text)
    text = text.strip(" .,;:")
    while text[:1] == "{" and inside(text) is not None:
        text = inside(text).strip()
    return text


def squeeze(text: str) -> str:
    """Text without the spaces that separate nothing: those beside a symbol."""
    return re.sub(r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])", "", text)


def split(text: str, separators: str) -> list[str]:
    """text cut at the separators that stand outside all brackets and environments."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += character in "([{" or text.startswith("\\begin", i)
        depth -= character in ")]}" or text.startswith("\\end", i)
        if character in separators and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def inside(text: str) -> str | None:
    r"""The text within the brackets around all of it, `1, 2` of `(1, 2]` and of `\{1, 2\}`, else
    None.
    """
    text = text.replace("\\{", "{").replace("\\}", "}")
    if text[:1] not in "([{" or text[-1:] not in ")]}":
        return None
    depths = list(accumulate((c in "([{") - (c in ")]}") for c in text))
    return text[1:-1] if 0 not in depths[:-1] else None


# ---- Numbers: exact, and compared exactly

DIGITS = r"(?:[1-9]\d{0,2}(?:[, ]\d{3})+|\d+)(?:\.\d*)?|\.\d+"  # 1,234.5  1 234  12.  .5
POWER = r"(?:\\times|\\cdot|\*|x) ?10 ?\^ ?\{?([+-]?\d+)\}?|e([+-]?\d+)"
PLAIN = re.compile(rf"([+-]?) ?({DIGITS}) ?(?:{POWER})?", re.IGNORECASE)
FRACTION = re.compile(rf"([+-]?) ?(?:(\d+) )?(-?)({DIGITS}) ?/ ?(-?)({DIGITS})")
REPEATING = re.compile(r"([+-]?) ?(\d*)\.(\d*)\\overline ?\{(\d+)\}")


def number(text: str) -> Fraction | Decimal | None:
    r"""The exact value of a number, None for any other text.

    A Decimal where there are digits behind a point: then it may be a rounded number.

    >>> number("1,234"), number(r"2\frac{1}{2}"), number("2.50"), number("x")
    (Fraction(1234, 1), Fraction(5, 2), Decimal('2.50'), None)
    """
    if len(text) > 1000:
        return None
    if match := PLAIN.fullmatch(text):
        sign, digits, *powers = match.groups("")
        power = "".join(powers) or "0"
        if len(power) > 4:
            return None
        value = Decimal(sign + re.sub("[, ]", "", digits) + "e" + power)
        return value if "." in digits else Fraction(value)
    if match := REPEATING.fullmatch(text):
        sign, whole, start, period = match.groups()
        value = Fraction(int(whole + start + period) - int(whole + start or "0"))
        value /= 10 ** len(start) * (10 ** len(period) - 1)
        return -value if sign == "-" else value
    text = re.sub(r" ?\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r" \1/\2", text).strip()
    if match := FRACTION.fullmatch(text):
        sign, whole, top_sign, top, bottom_sign, bottom = match.groups("")
        top, bottom = (Fraction(re.sub("[, ]", "", digits)) for digits in (top, bottom))
        if bottom == 0 or (whole and top >= bottom):
            return None
        minus = (sign + top_sign + bottom_sign).count("-")
        return (int(whole or "0") + top / bottom) * (-1) ** minus
    return None


def same_number(x: Fraction | Decimal, y: Fraction | Decimal) -> bool:
    return Fraction(x) == Fraction(y) or rounds(x, y) or rounds(y, x)


def rounds(decimal: Fraction | Decimal, exact: Fraction | Decimal) -> bool:
    """Whether a decimal is an exact value cut or rounded at a sixth or later digit: 0.333333 is
    1/3.

    15 digits are a float's, whose last ones are noise: 0.30000000000000004 is 0.3.
    """
    if not isinstance(decimal, Decimal):
        return False
    _, digits, exponent = decimal.as_tuple()
    if len(digits) >= 15:
        gap = abs(Fraction(decimal) - Fraction(exact))
        return gap <= min(Fraction(1, 10**6), abs(Fraction(exact)) / 10**12)
    if len(digits) < 6 or isinstance(exact, Decimal):
        return False
    unit = Fraction(10) ** exponent  # of the last digit
    return Fraction(decimal) / unit in (round(exact / unit), math.trunc(exact / unit))


# ---- The rules. Each takes two tidy answers: True or False is a verdict, None is «not my business»


def same(gold: str, answer: str) -> bool:
    """Whether an answer is equivalent to the gold one. May hang or raise anything: see Grader."""
    gold, answer = tidy(gold), tidy(answer)
    for rule in RULES:
        verdict = rule(gold, answer)
        if verdict is not None:
            return verdict
    return same_formula(gold, answer)


def at_sight(gold: str, answer: str) -> bool | None:
    """Equal strings, and numbers. Needs no computer algebra, so Grader tries it in the parent."""
    if not gold or not answer:
        return False
    if squeeze(gold) == squeeze(answer):
        return True
    x, y = number(gold), number(answer)
    if x is None or y is None:
        return None
    is_list = "," in gold and "," in answer  # perhaps: 100,200 and 200,100
    return same_number(x, y) or (None if is_list else False)


def same_words(gold: str, answer: str) -> bool | None:
    """Words are compared as words, without case and punctuation: `east` is not `seat`."""
    if "\\text" in gold + answer and plain_words(gold) == plain_words(answer):
        return True
    if is_words(gold) or is_words(answer):
        return plain_words(gold) == plain_words(answer)
    return None


def is_words(text: str) -> bool:
    r"""`even`, `ABC` and `\text{no}` are words, `ab` is a product."""
    letters = r"(?:\\text ?\{)? ?[A-Za-z]{2,}(?:[ '.,-]+[A-Za-z]+)*[. ]*\}?"
    return bool(re.fullmatch(letters, text)) and (len(text) > 3 or text.isupper())


def plain_words(text: str) -> str:
    text = re.sub(r"\\text|[{}'\"!?]|[.,](?!\d)", " ", text)
    return squeeze(" ".join(text.casefold().split()))


# Units: all names of one, the first stands for it.
UNITS = """m meter meters metre metres|cm centimeter centimeters centimetre centimetres
|mm millimeter millimeters|km kilometer kilometers kilometre kilometres|in inch inches
|ft foot feet|yd yard yards|mi mile miles|s sec second seconds|min minute minutes
|h hr hrs hour hours|day days|week weeks|month months|year years|g gram grams
|kg kilogram kilograms|lb lbs pound pounds|oz ounce ounces|l liter liters litre litres
|ml milliliter milliliters|gallon gallons|dollar dollars|cent cents|euro euros
|rad radian radians"""
UNITS = {name: names.split()[0] for names in UNITS.split("|") for name in names.split()}
UNITS |= {"mph": "mi h", "kmh": "km h"}
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
NOT_UNITS = set("not no if mod than least most when where for base undefined".split())
MEASURE = re.compile(
    r"(.*[\d})|]) ?(?:\\text ?\{([^{}]*)\}|([A-Za-z][A-Za-z. /]+))(?: ?\^ ?\{? ?[23] ?\}?)?"
)


def same_measure(gold: str, answer: str) -> bool | None:
    r"""`5 cm` is 5 and 5 centimeters, not 5 m; `25%` is 25 and 1/4; `90°` is 90 and \pi/2."""
    (x, unit), (y, other) = split_unit(gold), split_unit(answer)
    if (x, y) == (gold, answer):
        return None
    if unit and other and unit != other:
        return False
    share = number(x)
    must_scale = other == "%" and share is not None and 0 < share < 1  # 0.5 is 50%, never 0.5%
    if unit == other or not must_scale and same(x, y):
        return same(x, y)
    scale = {"%": r"({}) \cdot \frac{{1}}{{100}}", "°": r"({}) \cdot \frac{{\pi}}{{180}}"}
    if unit in scale:
        return same(scale[unit].format(x), y)
    return other in scale and same(x, scale[other].format(y))


def split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit); the unit is "" where there is none or an unknown one: `5 \text{ apples}`."""
    if re.fullmatch(r"[^%°]*[\d})] ?[%°]", text) and not re.search(r"\\(?:sin|cos|tan)", text):
        return text[:-1].strip(), text[-1]
    if "¤" in text and number(text.replace("¤", "")) is not None:
        return text.replace("¤", "").strip(), "dollar"
    match = MEASURE.fullmatch(text)
    if match is None:
        return text, ""
    value, marked, bare = match.groups("")
    words = re.findall("[a-z]+", (marked + bare).lower())
    known = " ".join(UNITS[word] for word in words if word in UNITS)
    exact = number(value)
    is_one = exact is not None or len(split(value, ",;∪<>")) == 1
    if not words or not is_one or NOT_UNITS & set(words):
        return text, ""
    if words[0] in SCALES and exact is not None:  # the word is part of the value
        return str(exact * SCALES[words[0]]), known
    if bare and not known:
        return text, ""
    return value.strip(), known


def same_list(gold: str, answer: str) -> bool | None:
    r"""Lists and sets have no order, systems go by name: `x = 1, y = 2` is `y = 2, x = 1`, and (1,
    2).
    """
    golds, answers = members(gold), members(answer)
    if golds == [gold] and answers == [answer]:
        return None
    system, other = as_system(golds), as_system(answers)
    if system and other:
        return system.keys() == other.keys() and all(same(system[k], other[k]) for k in system)
    golds, answers = ([unname(part)[1] for part in parts] for parts in (golds, answers))
    if 1 in (len(golds), len(answers)) and "\\{" not in gold + answer:
        golds, answers = opened(golds), opened(answers)
        return in_order(golds, answers)
    if system or other:
        return in_order(golds, answers)
    if len(golds) != len(answers):  # said twice is said once
        golds, answers = (list(dict.fromkeys(map(squeeze, parts))) for parts in (golds, answers))
    for part in golds:
        match = next((other for other in answers if same(part, other)), None)
        if match is None:
            return None if "∪" in gold + answer else False
        answers.remove(match)
    return not answers


def members(text: str) -> list[str]:
    r"""The members of a set or a list, `\pm` written out; [text] of anything else."""
    name, _, value = (part.strip() for part in text.rpartition("="))
    if name == "" or is_name(name):
        if value.startswith("\\{") and inside(value) is not None:
            text = inside(value)
        elif inside(name) and inside(value):  # (x, y) = (1, 2)
            pairs = zip(split(inside(name), ","), split(inside(value), ","))
            return [f"{variable} = {number}" for variable, number in pairs]
    parts = split(text, ";")
    if len(parts) == 1:
        parts = split(text, ",∪")
    found = []
    for part in filter(None, parts):
        both = [part.replace("\\pm", sign) for sign in "+-"]
        found += both if "\\pm" in part else [part]
    return found


def as_system(parts: list[str]) -> dict[str, str]:
    """{name: value} of equations with different names, {} of anything else."""
    system = {squeeze(name): value for name, value in map(unname, parts)}
    return system if len(system) == len(parts) > 1 and "" not in system else {}


def opened(parts: list[str]) -> list[str]:
    """The members of a tuple, if that is all there is."""
    is_tuple = len(parts) == 1 and parts[0][:1] == "(" and inside(parts[0])
    return split(inside(parts[0]), ",") if is_tuple else parts


def in_order(golds: list[str], answers: list[str]) -> bool:
    return len(golds) == len(answers) and all(map(same, golds, answers))


def same_tuple(gold: str, answer: str) -> bool | None:
    """Tuples and intervals, piece by piece. Of two pieces the brackets matter: [0, 1) is not (0,
    1).
    """
    if not (inside(gold) and inside(answer)):
        return None
    golds, answers = (split(inside(text).replace(";", ","), ",") for text in (gold, answer))
    if len(golds) == len(answers) == 1:
        return None
    if len(golds) == 2 and (gold[0], gold[-1]) != (answer[0], answer[-1]):
        return False
    return in_order(golds, answers)


def same_named(gold: str, answer: str) -> bool | None:
    """`x = 5` is 5 and not `y = 5`. Equations are formulas, except for values of the same name."""
    (name, x), (other, y) = unname(gold), unname(answer)
    if (x, y) == (gold, answer) or "=" in x + y:
        return None
    if name and other and squeeze(name) != squeeze(other):
        return None
    return same(x, y)


def unname(text: str) -> tuple[str, str]:
    r"""(name, value) of `x = 2 + 3 = 5 \approx 5.0`: ("x", "5"); ("", text) of anything else."""
    exact, _, rounded = text.partition("≈")
    if rounded:
        text = f"{exact} = {rounded}" if is_name(exact) else exact
    name, *values = split(text, "=")
    if values and is_name(name):
        return name, values[-1]
    if values and not re.search(r"(?<!\\)\b[A-Za-z]", text):  # 2 + 3 = 5
        return "", values[-1]
    return "", text.strip()


OPERATIONS = "sin|cos|tan|log|ln|sqrt|sum|int|prod|cdot|times|pm|mp|infty|le|ge|ne|pi"


def is_name(text: str) -> bool:
    r"""x, a_{37}, f(2), (p, q), |AB|, \overline{AB}, S:V, \Delta p: a quantity, no operation."""
    text = re.sub(r"(?<=[A-Za-z}'])\([^()]*\)", "", text.replace(" ", ""))  # arguments
    text = re.sub(rf"_\{{[^{{}}]*\}}|\\text\{{[^{{}}]*\}}|\\(?!{OPERATIONS})[A-Za-z]+", "x", text)
    return re.fullmatch(r"[A-Za-z(),:/|{}'°]+", text) is not None


def same_ratio(gold: str, answer: str) -> bool | None:
    """3:4 is 6:8 and 3/4; 2:30 is not 1:15, that is a time of day."""
    golds, answers = split(gold, ":"), split(answer, ":")
    clock = r"\d{1,2}:\d\d(:\d\d)?"
    if len(golds) == len(answers) == 1:
        return None
    if re.fullmatch(clock, gold) and re.fullmatch(clock, answer):
        return False
    if max(len(golds), len(answers)) == 2:
        return same_formula(gold.replace(":", "/"), answer.replace(":", "/"))
    first, other = golds[0], answers[0]
    crossed = [(f"({x}) * ({other})", f"({y}) * ({first})") for x, y in zip(golds, answers)]
    return len(golds) == len(answers) and all(same(x, y) for x, y in crossed)


RULES = (at_sight, same_words, same_measure, same_list, same_tuple, same_named, same_ratio)

# ---- Formulas: what is left has a value, or goes to math-verify as it is

# What its parser does not read, or reads in another way than people mean it.
FOR_THE_PARSER = [
    (r"(?<![\\A-Za-z])(?:np\.|math\.)?(arc)?(sin|cos|tan|sqrt|log|ln|exp)(?![A-Za-z])", r"\\\1\2 "),
    (r"(\\sqrt|\^) ?\(([^()]*)\)", r"\1{\2}"),
    (r"\^ ?(-?\d+)", r"^{\1}"),
    (r"\\(dot|hat|vec|tilde|bar) ?\{? ?(\\?[A-Za-z]+) ?\}?", r"\2_{\1}"),
    (r"_\{(\w+)\}_\{(\w+)\}", r"_{\1\2}"),
    (r"([A-Za-z])('+|\^ ?\{?(?:\\prime ?)+\}?)", r"\1_{prime}"),
    (r"°", r" \\cdot \\frac{\\pi}{180} "),
    (r"(?<=[\d)]) ?(?=\(|\\frac|\\binom)|(?<=\)) ?(?=\d)|\*", r" \\cdot "),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"¶", r"\\\\"),
    (r"∪", r"\\cup "),
]


def formula(text: str):
    """The sympy object that math-verify's parser makes of LaTeX, with exact numbers."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    for pattern, new in FOR_THE_PARSER:
        text = re.sub(pattern, new, text)
    if re.search(r"[\d.] +[\d.]", text):
        raise ValueError("two numbers side by side")  # the parser would add them
    is_complex = re.search(r"(?<![A-Za-z\\{])i(?![A-Za-z}])", text) is not None
    config = ConversionConfig(lowercase_symbols=False)
    found = latex2sympy(
        text, is_real=not is_complex, normalization_config=None, conversion_config=config
    )
    if isinstance(found, sympy.MatrixBase):
        return found.applyfunc(exactly)
    return exactly(found)


def exactly(found):
    import sympy

    decimals = {float_: sympy.Rational(str(float_)) for float_ in found.atoms(sympy.Float)}
    return found.xreplace(decimals).doit()


def same_formula(gold: str, answer: str) -> bool:
    """Two texts without structure: formulas, equations, inequalities, matrices, sets."""
    import sympy
    from math_verify import verify

    try:
        x, y = formula(gold), formula(answer)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the parser raises all kinds: not a formula
        return False
    if isinstance(x, sympy.MatrixBase) and isinstance(y, sympy.MatrixBase):
        return x.shape == y.shape and all(map(same_value, x.flat(), y.flat()))
    if isinstance(x, sympy.Eq) and isinstance(y, sympy.Eq):
        return same_equation(x, y)
    if isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr):
        return same_value(x, y) or rounds_value(number(gold), y) or rounds_value(number(answer), x)
    if isinstance(x, sympy.Expr) or isinstance(y, sympy.Expr):
        return False  # a set or a relation is no value
    return verify(x, y, allow_set_relation_comp=True, timeout_seconds=None)


def same_value(x, y) -> bool:
    """Two expressions: constants exactly, others at random points."""
    import sympy

    if x == y:
        return True
    if x.free_symbols | y.free_symbols:
        pairs = list(at_random_points(x, y))
        return len(pairs) >= 4 and all(close(u, v) for u, v in pairs)
    gap = x - y
    if gap.is_finite is False or gap is sympy.nan:
        return False
    try:
        return gap.evalf(5, maxn=1000, strict=True) == 0
    except sympy.core.evalf.PrecisionExhausted:
        return True  # a thousand digits, and none of them told the two apart


def same_equation(x, y) -> bool:
    """Whether left - right of two equations differ by a constant factor."""
    pairs = at_random_points(x.lhs - x.rhs, y.lhs - y.rhs)
    ratios = [u / v for u, v in pairs if v != 0]
    return len(ratios) >= 4 and all(close(ratio, ratios[0]) for ratio in ratios)


def at_random_points(x, y):
    """The values of two expressions (30 digits) at the same points, where both have one."""
    import sympy

    rng = random.Random(0)
    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    for i in range(24):
        low = -400 if i % 2 else 20  # every other point in the positive, where roots are real
        at = {symbol: sympy.Rational(rng.randint(low, 400), 101) for symbol in symbols}
        u, v = x.xreplace(at).evalf(30), y.xreplace(at).evalf(30)
        if u.is_finite and v.is_finite and (u.is_real and v.is_real or x.has(sympy.I)):
            yield u, v


def close(u, v) -> bool:
    return bool(abs(u - v) <= 1e-20 * max(abs(u), abs(v)))


def rounds_value(decimal: Fraction | Decimal | None, exact) -> bool:
    if decimal is None or not exact.is_real or exact.free_symbols:
        return False
    return rounds(decimal, Fraction(str(exact.evalf(40))))


# ---- Grading in processes that can be killed


class Verdict(NamedTuple):
    equal: bool
    status: str  # ok | none (no answer) | timeout | memory | error | crashed; all but ok are wrong


# Deaths that a pair brings about itself; any other is somebody else's doing, and the pair is asked
# again.
OWN_DEATHS = {
    signal.SIGPROF: "timeout",
    signal.SIGSEGV: "crashed",
    signal.SIGABRT: "crashed",
    signal.SIGBUS: "crashed",
}
TRIES = 5


class Grader:
    """Verdicts on (gold, answer) pairs; equal pairs are decided once.

    The workers are fresh processes of this file (by exec: nothing of vLLM or CUDA is in them). For
    each pair a worker sets a timer on its own CPU time whose signal it does not handle: when the
    time is up the kernel ends it, whatever it is doing, and a slow machine changes no verdict. A
    clock in the parent backs that up. A worker that dies is replaced by the next pair's.
    """

    def __init__(self, workers: int = 2, seconds: float = 2.0, memory: int = 2 << 30):
        self.command = [sys.executable, __file__, "--worker", str(seconds), str(memory)]
        self.patience = 30 * seconds
        self.known: dict[tuple[str, str | None], Future] = {}
        self.threads = ThreadPoolExecutor(workers)  # each waits for one worker
        self.lock = threading.Lock()
        self.processes: set[subprocess.Popen] = set()
        self.idle: list[subprocess.Popen] = []
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.threads.shutdown(wait=False, cancel_futures=True)
        with self.lock:
            self.closed = True
            for process in self.processes:
                process.kill()
                process.wait()

    def __call__(self, gold: str, answer: str | None) -> Verdict:
        return self.submit(gold, answer).result()

    def submit(self, gold: str, answer: str | None) -> Future:
        """A Future[Verdict]; done at once where no worker is needed."""
        pair = gold, answer
        if pair not in self.known:
            verdict = verdict_at_sight(gold, answer)
            if verdict is None:
                self.known[pair] = self.threads.submit(self._ask, gold, answer)
            else:
                self.known[pair] = Future()
                self.known[pair].set_result(verdict)
        return self.known[pair]

    def _ask(self, gold: str, answer: str) -> Verdict:
        """Give the pair to a worker, and again to a fresh one as long as others' deaths are in the
        way.
        """
        for attempt in range(TRIES):
            worker = self._worker(fresh=attempt > 0)
            reply = self._send(worker, json.dumps([gold, answer]))
            if reply:
                self.idle.append(worker)
                return Verdict(*json.loads(reply))
            if reply is None:
                worker.kill()
            cause = -worker.wait()
            with self.lock:
                self.processes.discard(worker)
            if reply is None:
                return Verdict(False, "timeout")
            if cause in OWN_DEATHS:
                return Verdict(False, OWN_DEATHS[cause])
        return Verdict(False, "crashed")

    def _worker(self, fresh: bool) -> subprocess.Popen:
        with self.lock:
            if self.closed:
                raise CancelledError
            if self.idle and not fresh:
                return self.idle.pop()
            pipe = subprocess.PIPE
            worker = subprocess.Popen(
                self.command,
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )
            self.processes.add(worker)
            return worker

    def _send(self, worker: subprocess.Popen, pair: str) -> bytes | None:
        """The worker's reply; b"" when it has died, None when it is late."""
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(pair.encode() + b"\n")
            worker.stdin.flush()
        waiter = select.poll()  # select() takes no descriptors above 1023
        waiter.register(worker.stdout)
        if not waiter.poll(1000 * self.patience):
            return None
        return worker.stdout.readline()


def verdict_at_sight(gold: str, answer: str | None) -> Verdict | None:
    if answer is None:
        return Verdict(False, "none")
    if len(gold) + len(answer) > 1000:
        return None
    equal = at_sight(tidy(gold), tidy(answer))
    return None if equal is None else Verdict(equal, "ok")


def work(seconds: float, memory: int) -> None:
    """A grading worker: a verdict for each pair on standard input, until it closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    logging.disable()
    os.nice(5)
    import math_verify  # noqa: F401  here, not in the time of the first pair

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF's default action ends the process
        try:
            verdict = same(*json.loads(line)), "ok"
        except MemoryError:
            verdict = False, "memory"
        except Exception:  # whatever computer algebra raises on what a model wrote
            verdict = False, "error"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


# ---- Votes


class Vote(NamedTuple):
    winner: str | None  # of a tie, the answer that was sampled first
    clusters: list[tuple[str, int, list[int]]]  # (first answer, votes, indices), most votes first


def vote(answers: list[str | None], grader: Grader | None = None) -> Vote:
    """Cluster answers by equivalence with a cluster's first member; None does not vote."""
    clusters: dict[str, list[int]] = {}
    with contextlib.nullcontext(grader) if grader else Grader(workers=1) as grader:
        for i, answer in enumerate(answers):
            if answer is None:
                continue
            homes = (first for first in clusters if grader(first, answer).equal)
            home = answer if answer in clusters else next(homes, answer)
            clusters.setdefault(home, []).append(i)
    ranked = sorted(clusters.items(), key=lambda cluster: -len(cluster[1]))
    winner = ranked[0][0] if ranked else None
    return Vote(winner, [(first, len(indices), indices) for first, indices in ranked])


# ---- The command line. A worker has none: what is imported here is not imported there


def read_rows(path: Path) -> list[dict]:
    """Rows with `text`, and `gold` (from `gold` or `answer`)."""
    from cli import UserError

    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append(
                {**row, "gold": str(row.get("gold") or row["answer"]), "text": str(row["text"])}
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f"{path}: line {number} is no JSON object with `text`, and `gold` or `answer`"
            ) from None
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


# What tools were told and answered is not the model's answer.
TOOLS = re.compile(r"```(?:output|python|py).*?(?:```|\Z)|<tool_call>.*?(?:</tool_call>|\Z)", re.S)


def main() -> None:
    import tyro

    from cli import parse

    @dataclass(kw_only=True)
    class Flags:
        """Grade answers made elsewhere: rows of `gold` (or `answer`) and `text`."""

        file: tyro.conf.Positional[Path]
        """A .jsonl file."""
        out: Path | None = None
        """Rows with `extracted`, `correct` and `grading`; without this flag FILE.graded.jsonl."""
        fallback: bool = False
        """Where no box is found, guess the answer from the text's end."""

    flags = parse(Flags)
    rows = read_rows(flags.file)
    with Grader() as grader:
        futures = []
        for row in rows:
            prose = TOOLS.sub("", row["text"])
            answer = extract_answer(prose)
            if answer is None and flags.fallback:
                answer = fallback_answer(prose)
            row["extracted"] = answer
            futures.append(grader.submit(row["gold"], answer))
        for row, future in zip(rows, futures):
            row["correct"], row["grading"] = future.result()
    out = flags.out or flags.file.with_suffix(".graded.jsonl")
    whole = out.with_suffix(".tmp")
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole.replace(out)
    counts = Counter(row["grading"] for row in rows)
    right = sum(row["correct"] for row in rows)
    undecided = {status: counts[status] for status in counts if status not in ("ok", "none")}
    print(
        f"{right} of {len(rows)} right, {100 * right / len(rows):.1f} %; "
        f"{counts['none']} without an answer"
    )
    print(f"could not be compared: {undecided or 0}\nwritten: {out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(float(sys.argv[2]), int(sys.argv[3]))
    else:
        from cli import run_main

        run_main(main)
