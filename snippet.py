"""One snippet as a model wrote it: what it meant, what it gives, and what to tell the model.

This runs in a session of sandbox.py, whose walls hold whatever happens here. Three steps: `parse`
takes off what models put around code; `run` shows what was printed and the last value, as a REPL
does; `explain` makes one line of an error, short enough for a model's context.
"""

import ast
import builtins
import contextlib
import importlib
import os
import pkgutil
import re
import sys
import textwrap
import traceback
from unittest.mock import MagicMock

# ---- What a snippet may import
ALLOWED = """
    math cmath random statistics fractions decimal numbers itertools functools collections operator
    numpy scipy sympy mpmath networkx
    string re datetime time calendar dataclasses typing types enum abc copy heapq bisect array queue
    contextlib sys io json csv pprint textwrap warnings logging traceback timeit __future__ inspect
    hashlib base64 binascii zlib struct unicodedata difflib graphlib locale weakref gc ast keyword
    _strptime _pydecimal stringprep linecache
""".split()
PLOTTING = "matplotlib mpl_toolkits seaborn pylab".split()


class Refused(ModuleNotFoundError):
    """An import that is not on the list. A snippet that does not catch it ends as `blocked`."""


# Stands for matplotlib and all that is in it: takes nearly any use, draws nothing.
NO_DISPLAY = MagicMock()
NO_DISPLAY.pyplot = NO_DISPLAY
NO_DISPLAY.subplots.return_value = (NO_DISPLAY, NO_DISPLAY)  # figure, axes
NO_DISPLAY.show = NO_DISPLAY.savefig = lambda *_, **__: print("(no display: print numbers)")


def guarded_import(name, globals=None, locals=None, fromlist=(), level=0):
    top = name.split(".")[0]
    if top in PLOTTING:
        return NO_DISPLAY
    if level or top not in ALLOWED:
        most = "numpy, scipy, sympy, math and most of the standard library are"
        raise Refused(f"no module {'.' * level}{name} here; {most}")
    return __import__(name, globals, locals, fromlist, level)


WARM_UP = """
import gc, os, random, sys, warnings
import numpy, sympy
from scipy import *  # its parts, which it imports when they are asked for

sys.set_int_max_str_digits(200_000)
sys.setrecursionlimit(10_000)  # with 64 MB of stack
numpy.set_printoptions(legacy="1.25")  # [1.0], not [np.float64(1.0)]
numpy.random.bit_generator.randbits = random.getrandbits  # default_rng() repeats itself too
x = sympy.symbols("x")
sympy.solve(x**2 - 3 * x + 2, x)
sympy.integrate(x * sympy.sin(x), x)
sympy.factorint(1001)
sympy.simplify(sympy.sin(x) ** 2)
warnings.resetwarnings()
for kind in "Deprecation PendingDeprecation Syntax Import Resource".split():
    warnings.simplefilter("ignore", eval(kind + "Warning"))
warnings.formatwarning = lambda message, kind, *rest: f"{kind.__name__}: {message}\\n"
os.environ.clear()
gc.collect()
gc.freeze()  # the collector leaves these pages shared
"""
ABSENT = "torch tensorflow jax cupy numba llvmlite matplotlib pandas aesara IPython".split()
SKIPPED = "test|bench|pyglet|llvm|f2py|distutils|__main__|sympy.this|_docs?$|parsing.latex|mbcs|oem"


def preload() -> None:
    """Import all that a snippet may import, now or lazily: afterwards no file can be opened."""
    sys.modules.update(dict.fromkeys(ABSENT))  # None: sympy's printers import these if they can
    for package in ("sympy", "mpmath", "numpy", "encodings"):
        path = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(path, package + ".", onerror=lambda _: None):
            load(module.name)
    for name in ABSENT:
        del sys.modules[name]
    for name in ALLOWED:
        load(name)
    exec(WARM_UP, {})


def load(name: str) -> None:
    if not re.search(SKIPPED, name):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


# ---- From a model's text to what it gives
KEEP_BYTES = 4 << 10  # head and tail of an output that are kept
SOURCES: dict[str, list[str]] = {}  # the lines of this session's snippets
LOOKALIKES = str.maketrans("−–×·“”‘’", "--**\"\"''")
LOOKALIKES |= str.maketrans({"÷": "/", "≤": "<=", "≥": ">=", "≠": "!=", "²": "**2", "³": "**3"})


def parse(code: str, filename: str) -> ast.Module:
    """The tree of a snippet: as written but for `In [1]:`, else without what surrounds it."""
    code = re.sub(r"\A\s*(?:python3?|py)[ \t]*\n", "", code)  # left over from a fence
    code = re.sub(r"(?m)^[ \t]*(?:In ?\[\d*\]|\.\.\.): ?|^Out ?\[\d*\]:.*$", "", code)
    plain = unwrap(code)
    for text in code, plain, unwrap(plain.translate(LOOKALIKES)):
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
    code = re.sub(r"(?m)^[ \t]*[%!]%?[A-Za-z].*$", "", code)  # %matplotlib inline, !pip install
    blocks = re.findall(r"(?s)(?:```|~~~)([\w+-]*)[ \t]*\n(.*?)(?:```|~~~|\Z)", code)
    blocks = [block for name, block in blocks if name not in ("output", "text")]  # made up
    code = "".join(blocks).strip("\n") or re.sub(r"(?:```|~~~)[\w+-]*", "", code)
    code = textwrap.dedent(code)
    prompts = re.findall(r"(?m)^(?:>>>|\.\.\.) ?(.*)$", code)
    return "\n".join(prompts) or code


def serve(guarded: bool) -> None:
    """Snippets from descriptor 3, all in one namespace, a status as reply, until it closes."""
    inside = dict(vars(builtins))
    if guarded:
        inside["__import__"] = guarded_import
    namespace = {"__name__": "__main__", "__builtins__": inside}
    libraries = ("random", "numpy.random", "sympy.core.random")
    seeds = [importlib.import_module(name).seed for name in libraries]
    number = 0
    while code := os.read(3, 1 << 20).decode("utf-8", "surrogatepass"):
        for seed in seeds:  # so that a replay draws the same
            seed(number)
        os.write(3, run(code, f"<snippet {number}>", namespace).encode())
        number += 1


def run(code: str, filename: str, namespace: dict) -> str:
    """Run a snippet; what it says goes to descriptor 1. Returns ok, error, blocked or memory."""
    # Line by line, so that a stopped snippet's output is not lost.
    out = open(1, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stdout = sys.stderr = out
    status, problem = "ok", None
    try:
        tree, last = parse(code, filename), None
        if tree.body and isinstance(tree.body[-1], ast.Expr):  # its value is shown
            last = compile(ast.Expression(tree.body.pop().value), filename, "eval")
        body = compile(tree, filename, "exec")
        exec(body, namespace)
        value = eval(last, namespace) if last else None
        # As a REPL, but numbers of these libraries without their constructors.
        if not isinstance(value, MagicMock | None):
            library = type(value).__module__.startswith(("numpy", "sympy", "mpmath"))
            show = str if library else repr
            out.write(show(value) + "\n")
    except SystemExit as end:  # exit(): what was printed stands
        out.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    except (PermissionError, Refused) as error:
        status, problem = "blocked", error
    except MemoryError as error:
        status, problem = "memory", error
    except BaseException as error:
        status, problem = "error", error
    sys.settrace(None)
    for file in (sys.stdout, out):
        with contextlib.suppress(Exception):  # whatever the snippet has left of them
            file.flush()
    if problem:
        os.write(1, (explain(problem) + "\n").encode("utf-8", "backslashreplace"))
    return status


def explain(error: BaseException) -> str:
    """One line for the model: `NameError: name 'y' is not defined (line 3: z = y + 1)`."""
    try:
        text = str(error.msg if isinstance(error, SyntaxError) else error)
    except BaseException:
        text = "(the message could not be made)"
    text = f"{type(error).__name__}: {text}".removesuffix(": ")
    text = re.sub(r"(?<![\w.)])(?:/[\w.@+~-]+)+/(?=\w)", "", text)  # no folder of this machine
    if isinstance(error, PermissionError):
        text += "; snippets have no files, network or processes"
    if len(text) > 1000:
        text = text[:500] + " ... " + text[-500:]
    filename = getattr(error, "filename", "")  # a SyntaxError's place, where no frame is ours
    number = getattr(error, "lineno", 0) or 1
    for frame, at in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename in SOURCES:
            filename, number = frame.f_code.co_filename, at
    if filename not in SOURCES:
        return text
    line = "".join(SOURCES[filename][number - 1 : number]).strip()[:120]
    whose = "line" if filename == next(reversed(SOURCES)) else "an earlier snippet's line"
    return f"{text} ({whose} {number}: {line})"


def printable(said: bytes) -> str:
    """Head and tail of an output, safe on a terminal."""
    cut = len(said) - 2 * KEEP_BYTES
    if cut > 0:
        said = said[:KEEP_BYTES] + b"\n... (%d bytes left out) ...\n" % cut + said[-KEEP_BYTES:]
    return escape(said.decode("utf-8", "replace").strip("\n"))


def escape(text: str) -> str:
    """A text with its control characters, but for newline and tab, written out."""
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)
