"""Write problems/arithmetic.jsonl, the built-in set: 2,000 training and 200 test problems.

    python extras/make_arithmetic.py problems/arithmetic.jsonl

Fifteen families in three difficulties, in turn. extras/arithmetic.txt holds their wordings
(several: a model trained on one learns the wording, not the tool), each with the snippet that
solves it; `draw` has the numbers. The answer is what the snippet prints. The seeds are fixed, so
every run writes the same bytes.
"""

import contextlib
import io
import json
import random
import sys
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli import UserError, run_main  # noqa: E402
from data import CALL_CLOSE, CALL_OPEN, problem_id  # noqa: E402

SIZES = {"train": 2000, "test": 200}
NAMES = "Ana Ben Chen Dora Emeka Fatima Goran Hana Ivan Jun Kofi Lena Mateo Nadia".split()
FIRST_LINE = "from sympy import *\n"  # of every snippet: the choice of a tool comes after it
GOODS = "pencils apples tickets notebooks stamps marbles cookies books bottles plants".split()


def read_templates(text: str) -> dict[str, list[tuple[str, str]]]:
    """Family -> (wording, snippet) pairs. A paragraph of the file is `[family]` or `[family
    difficulty]`, wordings, and the snippet that solves them in lines that begin with `> `."""
    templates = defaultdict(list)
    for paragraph in text.strip().split("\n\n"):
        head, *lines = paragraph.split("\n")
        snippet = "\n".join(line[2:] for line in lines if line.startswith("> "))
        wordings = [line for line in lines if not line.startswith("> ")]
        templates[head.strip("[]")] += [(wording, snippet) for wording in wordings]
    return templates


# ---- The families
FAMILIES = """product sum remainder power gcd_lcm range_sum divisors primes fraction equation system
digits shopping sharing travel""".split()


def number(rng, size: int) -> int:
    return rng.randint(10 ** (size - 1), 10**size - 1)


def signed(n: int) -> str:
    return f"- {-n}" if n < 0 else f"+ {n}"


def draw(family: str, rng, d: int) -> dict:
    """The values of a problem of difficulty d, by their names in the templates."""
    match family:
        case "product":
            return {"a": number(rng, d + 1), "b": number(rng, max(2, d))}
        case "sum":
            text = str(number(rng, rng.randint(2, 4)))
            for i in range(d):
                n = number(rng, rng.randint(2, 4))
                text += " " + signed(n if i == 0 else n * rng.choice([1, -1]))
            return {"s": text}
        case "remainder":
            return {"a": number(rng, 3 + 2 * d), "n": number(rng, min(d + 1, 3))}
        case "power":
            a, e = rng.randint(2, 9 + 10 * d), rng.randint(10, 100 * d)
            return {"a": a, "e": e, "n": rng.randint(11, 10 ** (d + 1))}
        case "gcd_lcm":
            k = rng.randint(2, 12 * d)
            a, b = k * rng.randint(3, 20 * d), k * rng.randint(3, 20 * d)
            name, call = rng.choice(
                [("greatest common divisor", "gcd"), ("least common multiple", "lcm")]
            )
            return {"a": a, "b": b, "name": name, "call": call}
        case "range_sum":
            low = rng.randint(1, 50)
            values = {"low": low, "high": low + rng.randint(10, 100 * d)}
            if d == 2:
                values["k"] = rng.randint(3, 12)
            if d == 3:
                values["name"], values["e"] = rng.choice([("squares", 2), ("cubes", 3)])
            return values
        case "divisors":
            return {"n": rng.randint(2, 12) * rng.randint(5, 10 ** (d + 1) // 2)}
        case "primes":
            low = rng.randint(2, 60 * d * d)
            return {"low": low, "high": low + rng.randint(20, 60 * d)}
        case "fraction":
            bottoms = [rng.randint(3, 8 + 4 * d) for _ in range(max(2, d))]
            parts = [Fraction(rng.randint(1, q - 1) + (d - 1) * q, q) for q in bottoms]
            op = rng.choice("+-*") if d > 1 else "+"
            sign = " \\times " if op == "*" else f" {op} "
            return {
                "shown": sign.join(f"\\frac{{{p.numerator}}}{{{p.denominator}}}" for p in parts),
                "code": f" {op} ".join(f"Rational({p.numerator}, {p.denominator})" for p in parts),
            }
        case "equation":
            a, b, c = rng.randint(2, 20), rng.randint(-99, 99) or 7, rng.randint(-20, 20)
            if d == 1:
                return {"a": a, "b": signed(b), "right": a * rng.randint(-50, 50) + b}
            c = a + 1 if c in (a, 0, 1, -1) else c
            return {"a": a, "b": signed(b), "c": c, "e": signed(rng.randint(-99, 99))}
        case "system":
            x, y = rng.randint(-9 * d, 9 * d), rng.randint(-9 * d, 9 * d)
            b, c, e = rng.randint(2, 5), rng.randint(2, 9), rng.randint(2, 9)
            target = rng.choice(["x", "y", "x + y", "x * y"])
            first, second = x + b * y, c * x - e * y
            return dict(b=b, c=c, e=e, target=target, first=first, second=second)
        case "digits":
            return {"a": rng.randint(2, 99), "e": rng.randint(5, 20 * d)}
        case "shopping":
            name, (thing, other) = rng.choice(NAMES), rng.sample(GOODS, 2)
            n, p, m, q = number(rng, d), rng.randint(2, 30), number(rng, d), rng.randint(2, 30)
            paid = n * p + m * q + rng.randint(1, 99)
            return dict(name=name, thing=thing, other=other, paid=paid, n=n, p=p, m=m, q=q)
        case "sharing":
            name, thing = rng.choice(NAMES), rng.choice(GOODS)
            boxes, each, people = number(rng, d) + 2, rng.randint(6, 40 * d), rng.randint(3, 9 * d)
            given = rng.randint(1, boxes * each // 2)
            return dict(name=name, thing=thing, boxes=boxes, each=each, people=people, given=given)
        case "travel":
            name, v, w = rng.choice(NAMES), number(rng, 2), number(rng, 2)
            return {
                "name": name,
                "v": v,
                "w": w,
                "h": rng.randint(2, 5 * d),
                "k": rng.randint(2, 5 * d),
            }


# ---- The set
def arithmetic(split: str, n: int) -> list[dict]:
    """The first n rows of a split; a shorter list is a prefix of a longer one.

    The splits share no question, whatever is drawn: `test` has those whose id divides by five.
    """
    templates = read_templates((ROOT / "extras" / "arithmetic.txt").read_text())
    rng, rows = random.Random(f"arithmetic-{split}"), {}
    while len(rows) < n:
        turn, place = divmod(len(rows), len(FAMILIES))
        name, difficulty = FAMILIES[place], 1 + turn % 3
        values = draw(name, rng, difficulty)
        choices = templates.get(f"{name} {difficulty}") or templates[name]
        wording, snippet = rng.choice(choices) if len(choices) > 1 else choices[0]
        question, snippet = wording.format(**values), FIRST_LINE + snippet.format(**values)
        key = problem_id(question)
        if key in rows or (int(key, 16) % 5 == 0) != (split == "test"):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(snippet, {})
        answer = printed.getvalue().strip()
        call = (
            f"{CALL_OPEN}\n{snippet}\n{CALL_CLOSE}\n```output\n{answer}\n```"  # as the agent does
        )
        solution = f"Let me compute this with Python.\n{call}\nThe answer is \\boxed{{{answer}}}."
        row = {"split": split, "id": key, "question": question, "answer": answer}
        rows[key] = row | {"family": name, "difficulty": difficulty, "solution": solution}
    return list(rows.values())


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("give the file to write: problems/arithmetic.jsonl")
    rows = [row for split, n in SIZES.items() for row in arithmetic(split, n)]
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    run_main(main)
