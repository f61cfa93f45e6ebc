"""One snippet as a model wrote it: what it meant, what it gives, and what to tell the model.

This runs in a session of sandbox.py, whose walls hold whatever happens here. Three steps: `parse`
takes off what models put around code; `run` shows what was printed and the last value, as a REPL
does; `explain` makes one line of an error, short enough for a model's context.
"""

import ast
import contextlib
import importlib
import os
import re
import sys
import textwrap
import traceback

SOURCES: dict[str, list[str]] = {}  # the lines of this session's snippets
LOOKALIKES = {"÷": "/", "≤": "<=", "≥": ">=", "≠": "!=", "²": "**2", "³": "**3"}
LOOKALIKES |= dict(zip("−–×·“”‘’", "--**\"\"''"))


def parse(code: str, filename: str) -> ast.Module:
    """The tree of a snippet: as written, else without what models put around code."""
    code = re.sub(r"\A\s*(?:python3?|py)[ \t]*\n", "", code)  # left over from a fence
    code = re.sub(r"(?m)^[ \t]*(?:In ?\[\d*\]|\.\.\.): ?|^Out ?\[\d*\]:.*$", "", code)
    looks = str.maketrans(LOOKALIKES)
    for text in (code, unwrap(code), unwrap(unwrap(code).translate(looks))):
        SOURCES[filename] = text.split("\n")
        try:
            return ast.parse(text, filename)
        except (MemoryError, RecursionError):
            raise SyntaxError("the code is nested too deeply") from None
        except (SyntaxError, ValueError) as error:
            problem = error
    raise problem


def unwrap(code: str) -> str:
    """The code without fences, prompts, magic commands, odd spaces and common indentation."""
    code = re.sub("[\ufeff\u200b-\u200d\u2060]", "", code)
    code = re.sub("[\xa0\u2000-\u200a\u202f\u3000]", " ", code)
    code = re.sub(r"(?m)(\S)[ \t]*(```|~~~)[ \t]*$", r"\1\n\2", code)  # a fence behind code
    inside, outside, is_open = [], [], False
    for line in code.split("\n"):
        if fence := re.match(r"\s*(?:```|~~~)[ \t]*([\w+-]*)\s*$", line):
            is_open = bool(fence[1]) or not is_open
        elif not line.lstrip().startswith(("%", "!")):
            (inside if is_open else outside).append(line)
    code = textwrap.dedent("\n".join(inside or outside))
    prompts = re.findall(r"(?m)^(?:>>>|\.\.\.) ?(.*)$", code)
    return "\n".join(prompts) if ">>>" in code and prompts else code


class Refused(ImportError):
    """An import that is not on the list. A snippet that does not catch it ends as `blocked`."""


class NoDisplay:
    """Stands for matplotlib and all that is in it: takes any use; show() says what is missing."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name):
        return NoDisplay(name)

    def __call__(self, *_, **__):
        if self._name in ("show", "savefig"):
            print("(there is no display: nothing is drawn; print numbers instead)")
        return self

    def __iter__(self):  # figure, axes = plt.subplots()
        return iter((self, self))

    __getitem__ = __setitem__ = __call__


def run(code: str, number: int, namespace: dict) -> str:
    """Run a snippet and write all it has to say to descriptor 1; its number seeds what is random.

    So two Monte-Carlo snippets differ and a replay repeats them. Returns ok, error, blocked
    (refused here or by the kernel) or memory.
    """
    filename = f"<snippet {number}>"
    out = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    out.reconfigure(line_buffering=True)  # so that a stopped snippet's output is not lost
    sys.stdout = sys.stderr = out
    status, problem = "ok", None
    try:
        tree, last = parse(code, filename), None
        if tree.body and isinstance(tree.body[-1], ast.Expr):  # its value is shown
            last = compile(ast.Expression(tree.body.pop().value), filename, "eval", 0, True)
        body = compile(tree, filename, "exec", 0, True)
        for name in ("random", "numpy.random", "sympy.core.random"):
            importlib.import_module(name).seed(number)
        exec(body, namespace)
        value = eval(last, namespace) if last else None
        if value is not None:  # as a REPL, but numbers of these without their constructors
            library = type(value).__module__.split(".")[0] in ("numpy", "sympy", "mpmath")
            out.write((str(value) if library else repr(value)) + "\n")
    except SystemExit as end:  # exit(): what was printed stands
        out.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    except (PermissionError, Refused) as error:
        status, problem = "blocked", error
    except MemoryError as error:
        status, problem = "memory", error
    except BaseException as error:
        status, problem = "error", error
    sys.settrace(None)
    with contextlib.suppress(Exception):  # whatever the snippet has left of them
        sys.stdout.flush()
        out.flush()
        if problem:
            os.write(1, (explain(problem) + "\n").encode("utf-8", "backslashreplace"))
    return status


def explain(error: BaseException) -> str:
    """One line for the model: `NameError: name 'y' is not defined (line 3: z = y + 1)`."""
    try:
        text = str(error.msg if isinstance(error, SyntaxError) else error)
    except BaseException:
        text = "(the message could not be made)"
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = re.sub(r"(?<![\w.)])(?:/[\w.@+~-]+)+/(?=\w)", "", text)  # no folder of this machine
    if isinstance(error, PermissionError) and error.errno:
        text += "; snippets have no files, network or processes"
    if len(text) > 1000:
        text = text[:500] + " ... " + text[-500:]
    places = [(getattr(error, "filename", ""), getattr(error, "lineno", 0) or 1)]
    for frame, number in traceback.walk_tb(error.__traceback__):
        places.append((frame.f_code.co_filename, number))
    places = [place for place in places if place[0] in SOURCES]
    if not places:
        return text
    filename, number = places[-1]
    line = "".join(SOURCES[filename][number - 1 : number]).strip()[:120]
    whose = "line" if filename == next(reversed(SOURCES)) else "an earlier snippet's line"
    return f"{text} ({whose} {number}: {line})"
