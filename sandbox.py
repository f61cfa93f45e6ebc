"""Run snippets of untrusted Python: milliseconds each, variables kept, no way out.

A *zygote* process (started once by exec, with an empty environment) imports sympy, numpy, scipy and mpmath
and then only forks. Each trace gets a *session*: one fork of the zygote that locks itself in before it reads
its first snippet, then runs snippet after snippet in one namespace. One supervisor thread in the caller's
process starts, feeds, times and kills sessions. A session that hangs, dies or is dropped to save memory is
rebuilt at the trace's next snippet by replaying the snippets that ended by themselves: a snippet that had to
be stopped leaves no trace, and loses nothing that came before it. Between snippets a session is SIGSTOPped.

Threat model: the model, or somebody who writes its prompts, runs any code at all in the session's process,
machine code included. It must not read or write a file, reach the network, start or signal a process, see
the caller's secrets, disturb another trace, or hold up the caller. Kernel and CPU bugs are out of scope.

    1 ast        imports from an allow-list, no dunder attributes, no open/eval/...: clear messages for the
                 model, a fence against accidents. NOT a boundary: `random._os` walks round it
    2 namespace  reduced builtins and a guarded __import__; as weak as 1
    3 kernel     rlimits   memory, no new files, no forks (not enforced for uid 0), CPU time
                 uid       root drops to an unused uid of its own, or else every capability
                 landlock  no path may be opened, changed or run; no TCP; no signals out
                 seccomp   THE WALL: an allow-list of 34 system calls and three with checked arguments; no open, socket, clone, exec, kill

Covered: files, network, processes, signals, other traces, the caller's environment, memory, wall time,
output floods, fork and thread bombs, forged or broken replies (they end the session, as `crashed`).
Not covered: a snippet can lie about its own trace's outputs; it can use one core for its whole timeout and
the memory it is given; it can read what the zygote's process holds (the libraries, no secret of the
caller); side channels such as timing; kernel bugs. With `--sandbox limits-only` there is no seccomp: a
snippet that means harm then has Landlock and the uid against it, and, as uid 0 or on old kernels, little.
Same trace, same outputs, except for clocks (`datetime.now`), addresses (`id`, default reprs), timeouts and
generators made without a seed (`random.Random()`). Linux only. The aarch64 table is written but was never run.

    python sandbox.py 'print(2**100)'     run a snippet            python sandbox.py -    the same, from stdin
    python sandbox.py --check             which layers this host gives
"""

import argparse
import ast
import collections
import itertools
import json
import os
import platform
import queue
import re
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass

LAYERS = ("ast", "namespace", "rlimits", "uid", "landlock", "seccomp")
CODE_BYTES = 64 << 10  # before any parse: ast.parse of 20 MB takes a minute and 8 GB
OUTPUT_BYTES = 1 << 20  # a snippet that prints more is stopped
KEEP_BYTES = 4 << 10  # head and tail of an output that are kept
MEMORY_BYTES = 2 << 30  # a snippet that needs more is stopped
IDLE_BYTES = 512 << 20  # an idle session that holds more memory is dropped and rebuilt by replay

ALLOWED = (
    "math cmath random statistics fractions decimal itertools functools collections operator string re datetime "
    "dataclasses typing heapq bisect copy enum numbers abc numpy scipy sympy mpmath"
).split()
BANNED_NAMES = {  # name: what to do instead
    "open": "snippets have no files",
    "input": "snippets have no input",
    "breakpoint": "there is no debugger",
    "exec": "write the code itself",
    "eval": "write the expression itself, or use sympy.sympify",
    "compile": "write the code itself",
    "__import__": "use an import statement",
    "exit": "let the snippet end",
    "quit": "let the snippet end",
    "help": "there is no pager",
}
HARMLESS_DUNDERS = {
    f"__{name}__"
    for name in (
        "name doc class init new str repr len iter next getitem setitem delitem contains call hash eq ne lt le gt ge add sub mul "
        "truediv floordiv mod pow neg abs radd rsub rmul rtruediv and or xor invert bool int float index enter exit "
        "post_init annotations version debug main"
    ).split()
}

NO_NEW_PRIVS, PDEATHSIG, DUMPABLE, SECCOMP, CAPBSET_DROP = 38, 1, 4, 22, 24  # prctl(2)
SYSCALLS = {  # allowed whatever their arguments: (x86_64, aarch64)
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "close": (3, 57),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "futex": (202, 98),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "sched_yield": (24, 124),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, AUDIT_ARCH


class SandboxError(Exception):
    """The pool cannot be started; the text is one line with the remedy."""


@dataclass(frozen=True)
class Result:
    status: str  # ok | error | blocked | timeout | memory | output | crashed
    output: str  # what the snippet printed, then its last value or its error; never empty
    seconds: float  # wall time seen by the caller, without the wait for a free core


# ---------------------------------------------------------------- the snippet's text: pure functions


def unfence(code: str) -> str:
    """The code without a markdown fence around it."""
    match = re.fullmatch(r"\s*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", code, re.DOTALL)
    return match.group(1) if match else code


def check(tree: ast.AST, known) -> None:
    """Layer 1: raises PermissionError with a message that the model can act on. `known`: names of earlier snippets."""
    nodes = list(ast.walk(tree))
    known = {
        *known,
        *(
            node.id
            for node in nodes
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        ),
        *(node.arg for node in nodes if isinstance(node, ast.arg)),
        *(node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))),
    }
    for node in nodes:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            if name.split(".")[0] not in ALLOWED:
                raise PermissionError(
                    f"import of '{name}' is not allowed; allowed: {', '.join(ALLOWED)}"
                )
        name = getattr(node, "id", None) or getattr(node, "attr", None) or ""
        if isinstance(node, ast.Name) and name in BANNED_NAMES and name not in known:
            raise PermissionError(
                f"'{name}' is not available; {BANNED_NAMES[name]} (line {node.lineno})"
            )
        # the usual tricks on the interpreter start at __base__, __globals__, __builtins__, ...
        if re.fullmatch("__.*__", name) and name not in HARMLESS_DUNDERS:
            raise PermissionError(f"'{name}' is not available (line {node.lineno})")


def explain(error: BaseException, sources: dict[str, list[str]]) -> str:
    """One line for the model: `NameError: name 'y' is not defined (line 3: z = y + 1)`."""
    try:
        text = str(error)
    except BaseException:
        text = "(the message could not be made)"
    where = None
    if isinstance(error, SyntaxError) and error.filename in sources:
        text, where = str(error.msg), (error.filename, error.lineno or 1)
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename in sources:
            where = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, PermissionError) and error.errno:
        text += "; snippets have no files, network or processes"
    text = text if len(text) <= 1000 else text[:500] + " ... " + text[-500:]
    if where is None:
        return text
    lines, name = (
        sources[where[0]],
        "line" if where[0] == next(reversed(sources)) else "an earlier snippet's line",
    )
    line = lines[where[1] - 1].strip()[:120] if 0 < where[1] <= len(lines) else ""
    return f"{text} ({name} {where[1]}{': ' if line else ''}{line})"


# ---------------------------------------------------------------- the kernel's side: runs in the session, once


def libc_call(name, *args):
    """A libc function by ctypes, with 64-bit integers; raises OSError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    result = getattr(libc, name)(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def seccomp_filter() -> bytes | None:
    """The filter's BPF program as bytes, or None on an architecture without a table."""
    if platform.machine() not in ARCHES or sys.maxsize < 1 << 32:
        return None
    column, arch = ARCHES[platform.machine()]
    LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = (
        0x20,
        0x15,
        0x35,
        0x45,
        0x06,
    )  # (code, jump if true, if false, constant)
    KILL, ALLOW, EPERM, ENOSYS = 0x80000000, 0x7FFF0000, 0x50001, 0x50026
    number, machine, argument = (
        0,
        4,
        lambda i, high=0: 16 + 8 * i + 4 * high,
    )  # offsets in struct seccomp_data
    code = [(LOAD, 0, 0, machine), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, number)]
    if platform.machine() == "x86_64":
        code += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]  # x32: a second set of numbers
    for pair in SYSCALLS.values():
        if pair[column] is not None:
            code += [(EQUAL, 0, 1, pair[column]), (RETURN, 0, 0, ALLOW)]
    for call in ((9, 222)[column], (10, 226)[column]):  # mmap, mprotect: never PROT_EXEC
        code += [
            (EQUAL, 0, 4, call),
            (LOAD, 0, 0, argument(2)),
            (ANY_BIT, 0, 1, 4),
            (RETURN, 0, 0, EPERM),
            (RETURN, 0, 0, ALLOW),
        ]
    code += [(EQUAL, 0, 10, (302, 261)[column])]  # prlimit64: only to read one's own
    for offset in (argument(0), argument(2), argument(2, high=1)):
        code += [(LOAD, 0, 0, offset), (EQUAL, 1, 0, 0), (RETURN, 0, 0, EPERM)]
    code += [
        (RETURN, 0, 0, ALLOW),
        (EQUAL, 0, 1, 435),
        (RETURN, 0, 0, ENOSYS),  # clone3: libc falls back to clone
        (RETURN, 0, 0, EPERM),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def seccomp(code: bytes) -> str:
    import ctypes

    if not code:
        raise OSError(0, f"no system call table for {platform.machine()}")
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(
        struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    )
    libc_call("prctl", SECCOMP, 2, ctypes.addressof(program), 0, 0)
    return f"{len(code) // 8} instructions"


def landlock() -> str:
    """Denies every right that this kernel's Landlock knows, on every path."""
    import ctypes

    create, restrict = 444, 446
    abi = libc_call("syscall", create, 0, 0, 1)
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(
        abi, 16
    )  # refer from 2, truncate from 3, ioctl from 5
    rules = struct.pack("QQQ", (1 << rights) - 1, 3, 3)[
        : 8 if abi < 4 else 16 if abi < 6 else 24
    ]  # TCP from 4, scopes from 6
    ruleset = libc_call("syscall", create, ctypes.c_char_p(rules), len(rules), 0)
    libc_call("syscall", restrict, ruleset, 0)
    os.close(ruleset)
    return f"ABI {abi}"


def set_rlimits(memory: int) -> str:
    """Hard = soft, so that nothing can be raised again."""
    import resource

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    wanted = {
        "AS": mapped + memory,
        "STACK": 64 << 20,
        "FSIZE": 0,
        "NOFILE": 16,
        "CORE": 0,
        "CPU": 3600,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "SIGPENDING": 64,
        "NPROC": 0,
    }
    for which, value in (
        (getattr(resource, "RLIMIT_" + name), value) for name, value in wanted.items()
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    return f"{memory >> 20} MB"


def drop_privileges() -> str:
    """Root becomes an unused uid (siblings differ: none may signal another); everybody loses all capabilities."""
    import ctypes

    with open("/proc/self/status") as file:
        effective = int(re.search(r"CapEff:\s*(\w+)", file.read()).group(1), 16)
    if (
        os.geteuid() == 0 and effective >> 5 & 7 == 7
    ):  # CAP_KILL (or none could be killed), SETGID, SETUID
        for uid in (
            2_000_000_000 + os.getpid(),
            65534,
        ):  # the second in a container that maps few ids
            try:
                os.setresgid(uid, uid, uid)
                os.setgroups([])
                os.setresuid(uid, uid, uid)
                break
            except OSError:
                continue
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    libc_call("capset", ctypes.c_char_p(header), ctypes.c_char_p(nothing))
    return (
        f"uid {os.getuid()}, no capabilities"
        if os.getuid()
        else "uid 0 kept, no capabilities: only seccomp stops forks"
    )


def empty_bounding_set() -> None:
    """In the zygote, once, for all its forks: no program that might be run could give a capability back."""
    try:
        for capability in range(64):
            libc_call("prctl", CAPBSET_DROP, capability, 0, 0, 0)
    except OSError:  # not root, or past the last capability
        pass


def die_with(parent: int) -> None:
    """SIGKILL to this process when its parent dies, or at once if that has happened already."""
    libc_call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def lock_in(config: dict, parent: int) -> dict[str, str]:
    """Puts up the kernel's walls in the one order that works; returns {layer: "on: ..." | "off: why"}."""
    report = {}

    def layer(name, function, *args):
        try:
            report[name] = (
                f"on: {function(*args)}" if name in config["layers"] else "off: not asked for"
            )
        except OSError as error:
            report[name] = f"off: {error.strerror}"

    layer("rlimits", set_rlimits, config["memory"])
    layer("uid", drop_privileges)
    die_with(parent)  # after setuid, which clears it
    libc_call("prctl", DUMPABLE, 0, 0, 0, 0)  # no ptrace and no /proc/PID/mem by the same uid
    libc_call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    layer("landlock", landlock)
    layer("seccomp", seccomp, config["filter"])
    return report


def self_test():
    """Tries to open, connect, fork and run; returns those that did not end in EPERM."""
    attempts = {
        "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "socket": socket.socket,
        "fork": lambda: os.fork() or os._exit(0),
        "exec": lambda: os.execv("/no/such/file", ["-"]),
    }
    passed = []
    for name, attempt in attempts.items():
        try:
            attempt()
            passed.append(name)
        except OSError as error:
            passed += [f"{name} ({error.strerror})"] if error.errno != 1 else []
    return passed


# ---------------------------------------------------------------- the session: a fork of the zygote


def guarded_import(name, globals=None, locals=None, fromlist=(), level=0):
    if (
        name.split(".")[0] not in ALLOWED + ["_strptime", "time", "warnings"] or level
    ):  # the last three: datetime's C code asks for them
        raise PermissionError(f"import of '{name}' is not allowed; allowed: {', '.join(ALLOWED)}")
    return __import__(name, globals, locals, fromlist, level)


def new_namespace(layers):
    """Layer 2: the globals in which all snippets of one trace run."""
    import builtins

    inside = dict(vars(builtins))
    if "namespace" in layers:
        for name in BANNED_NAMES:
            inside.pop(name, None)
        inside["__import__"] = guarded_import
    return {"__name__": "__main__", "__builtins__": inside}


def seed(number):
    """Seeds from the snippet's number in its trace: two Monte-Carlo snippets differ, a replay repeats them."""
    import random
    import numpy
    import sympy.core.random

    random.seed(number)
    numpy.random.seed(number)
    sympy.core.random.seed(number)


def show(value):
    """As a REPL shows it, except that numbers of numpy, sympy and mpmath come without their constructors."""
    library = type(value).__module__.split(".")[0] in ("numpy", "sympy", "mpmath")
    return str(value) if library else repr(value)


def run_snippet(
    code: str, number: int, namespace: dict, sources: dict[str, list[str]], layers
) -> str:
    """Runs one snippet, writes all it has to say to descriptor 1; returns its status."""
    filename, status = f"<snippet {number}>", "ok"
    code = unfence(code)
    sources[filename] = code.split("\n")
    sys.stdout = sys.stderr = out = open(
        1, "w", buffering=1 << 13, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    out.reconfigure(line_buffering=True)  # so that a stopped snippet's output is not lost
    try:
        try:
            tree = ast.parse(code, filename)
        except (MemoryError, RecursionError):
            raise SyntaxError("the code is nested too deeply") from None
        if "ast" in layers:
            check(tree, namespace)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        body = compile(tree, filename, "exec", dont_inherit=True)
        last = last and compile(ast.Expression(last.value), filename, "eval", dont_inherit=True)
        seed(number)
        exec(body, namespace)
        value = eval(last, namespace) if last else None
        if value is not None:
            out.write(show(value) + "\n")
    except PermissionError as error:  # ours, or the kernel's EPERM
        status, problem = "blocked", error
    except MemoryError as error:
        status, problem = "memory", error
    except BaseException as error:
        status, problem = "error", error
    sys.settrace(None)
    try:
        sys.stdout.flush()
        out.flush()
        if status != "ok":
            os.write(1, (explain(problem, sources) + "\n").encode("utf-8", "backslashreplace"))
    except (Exception, RecursionError):
        pass
    return status


def serve(config: dict) -> None:
    """The session's main loop: request `ID NUMBER\\nCODE` on descriptor 3, reply `ID STATUS`, until the socket closes."""
    namespace, sources = new_namespace(config["layers"]), {}
    while request := os.read(3, CODE_BYTES + 100):
        head, _, code = request.partition(b"\n")
        name, number = head.split()
        status = run_snippet(
            code.decode("utf-8", "surrogatepass"), int(number), namespace, sources, config["layers"]
        )
        os.write(3, name + b" " + status.encode())


def session_main(config: dict, control: int, output: int, parent: int) -> None:
    """In the child: descriptors 0 (null), 1 and 2 (output), 3 (requests), nothing else; then the walls; then serve."""
    os.setpgid(0, 0)
    os.dup2(output, 1), os.dup2(output, 2), os.dup2(control, 3)
    os.closerange(4, 65536)
    report = lock_in(config, parent)
    if config["testing"]:
        os.write(3, json.dumps([report, self_test()]).encode())
    elif all(report[name].startswith("on") for name in config["required"]):
        serve(config)


# ---------------------------------------------------------------- the zygote


def preload() -> None:
    """Imports all that a snippet may import lazily (afterwards no file can be opened) and warms the common paths."""
    import importlib
    import pkgutil
    import warnings

    warnings.simplefilter("ignore")
    heavy = (
        "torch tensorflow jax cupy numba llvmlite matplotlib pandas aesara pyglet IPython".split()
    )
    for name in heavy:  # sympy's printers import these if they can
        sys.modules[name] = None
    for name in "sympy mpmath numpy encodings".split():
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(
            package.__path__, name + ".", onerror=lambda name: None
        ):
            if not re.search(
                r"test|bench|conftest|pyglet|llvm|f2py|distutils|__main__|sympy.this|_docs?$|parsing.latex|mbcs|oem",
                module.name,
            ):
                try:
                    importlib.import_module(module.name)
                except Exception:
                    pass
    for name in heavy:
        del sys.modules[name]
    parts = (
        "cluster constants differentiate fft integrate interpolate linalg ndimage optimize signal sparse.linalg "
        "sparse.csgraph spatial.distance special stats.qmc stats.mstats"
    ).split()
    for name in (
        ALLOWED
        + ["scipy." + part for part in parts]
        + "_strptime unicodedata stringprep _pydecimal linecache".split()
    ):
        try:
            importlib.import_module(name)
        except ImportError:
            if name in ("numpy", "sympy", "scipy", "mpmath"):
                raise


def warm() -> None:
    import gc
    import random
    import warnings
    import numpy
    import scipy.integrate
    import sympy

    sys.set_int_max_str_digits(200_000)
    sys.setrecursionlimit(10_000)  # with 64 MB of stack
    numpy.set_printoptions(legacy="1.25")  # [1.0], not [np.float64(1.0)]
    numpy.random.bit_generator.randbits = (
        random.getrandbits
    )  # default_rng() without a seed: repeatable too
    x = sympy.symbols("x")
    (
        sympy.solve(x**2 - 3 * x + 2, x),
        sympy.integrate(x * sympy.sin(x), x),
        sympy.factorint(1001),
        sympy.simplify(sympy.sin(x) ** 2),
    )
    numpy.linalg.eigvals(numpy.eye(3)), scipy.integrate.quad(lambda t: t, 0, 1), seed(0)
    warnings.resetwarnings()
    for category in (
        DeprecationWarning,
        PendingDeprecationWarning,
        SyntaxWarning,
        ImportWarning,
        ResourceWarning,
    ):
        warnings.simplefilter("ignore", category)
    warnings.formatwarning = lambda message, category, *rest: f"{category.__name__}: {message}\n"
    os.environ.clear()
    gc.collect()
    gc.freeze()  # the collector leaves these pages shared


def fork_session(
    config: dict, control: int, output: int, children: dict[int, int]
) -> tuple[int, int]:
    """Returns (pid, pidfd) of a new session."""
    zygote, pid = os.getpid(), os.fork()
    if pid == 0:
        try:
            session_main(config, control, output, zygote)
        finally:
            os._exit(0)
    pidfd = os.pidfd_open(pid)
    children[pidfd] = pid
    return pid, pidfd


def bury(pidfd: int, children: dict[int, int]) -> None:
    """Kills what is left of a session's process group while the dead leader still holds its number, then reaps it."""
    pid = children.pop(pidfd)
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except OSError:
            pass
    os.waitpid(pid, 0)
    os.close(pidfd)


def try_out(config: dict) -> list:
    """A session that locks itself in, tests the walls and ends: ({layer: said}, attempts that got through)."""
    ours, theirs = socket.socketpair()
    children = {}
    _, pidfd = fork_session(dict(config, testing=True), theirs.fileno(), theirs.fileno(), children)
    theirs.close()
    ours.settimeout(60)
    said = ours.recv(1 << 16)
    bury(pidfd, children)
    if not said:
        raise RuntimeError("a session could not lock itself in")
    return json.loads(said)


def zygote_main(config: dict) -> None:
    """Says `ready REPORT`; then forks a session for every `NUMBER` that comes with two descriptors; ends at EOF."""
    die_with(config["parent"])
    control, children = socket.socket(fileno=config["fd"]), {}
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # short of memory, the kernel takes sessions first
    except OSError:
        pass
    try:
        preload()
        warm()
        empty_bounding_set()
        if len(os.listdir("/proc/self/task")) != 1:
            raise RuntimeError("the zygote has more than one thread")
        config.update(filter=seccomp_filter(), testing=False)
        report, passed = try_out(config)
        config["required"] = [name for name, said in report.items() if said.startswith("on")]
        control.send(b"ready " + json.dumps([report, passed]).encode())
    except Exception as error:
        control.send(f"error {type(error).__name__}: {error}".encode()[:1000])
        return
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd in children:
                selector.unregister(key.fd)
                bury(key.fd, children)
                continue
            number, fds, _, _ = socket.recv_fds(control, 100, 2)
            if not number:
                for pidfd in list(children):
                    bury(pidfd, children)
                return
            try:
                pid, pidfd = fork_session(config, *fds, children)
                selector.register(pidfd, selectors.EVENT_READ)
                socket.send_fds(control, [b"%s %d" % (number, pid)], [pidfd])
            except OSError:
                pass  # the caller sees the session's socket close
            for fd in fds:
                os.close(fd)


# ---------------------------------------------------------------- the supervisor: in the caller's process

STOPPED = {
    "timeout": "TimeoutError: the snippet ran longer than {timeout:g} s and was stopped",
    "memory": "MemoryError: the snippet needed more than {memory} MB and was stopped",
    "output": "OutputError: the snippet printed more than {output} KB and was stopped",
    "crashed": "CrashError: the snippet's process died or broke its protocol",
}


class Session:
    """The variables of one trace; at most one snippet at a time."""

    def __init__(self, box):
        self.box, self.busy, self.closed = box, False, False  # the caller's
        self.history, self.number, self.note, self.process, self.job = (
            [],
            0,
            "",
            None,
            None,
        )  # the supervisor thread's

    def submit(self, code: str, timeout: float = 20, sink: queue.SimpleQueue | None = None) -> None:
        """Queues a snippet; its result comes from `box.poll`. Raises SandboxError if the pool could not be started."""
        if self.busy or self.closed:
            raise ValueError(
                "the session is closed"
                if self.closed
                else "the session's last snippet has not been polled"
            )
        if self.box.broken:
            raise SandboxError(self.box.broken)
        self.busy = True
        with self.box.lock:
            self.box.pending += sink is None
        self.box._post(
            self,
            types.SimpleNamespace(
                code=str(code),
                timeout=float(timeout),
                sink=sink or self.box.done,
                started=None,
                pause=0.02,
                size=0,
                head=b"",
                tail=b"",
            ),
        )

    def run(self, code: str, timeout: float = 20) -> Result:
        """Runs a snippet and waits for its Result."""
        sink = queue.SimpleQueue()
        self.submit(code, timeout, sink)
        result = sink.get()[1]
        self.busy = False
        return result

    def close(self):
        if not self.closed:
            self.closed = True
            self.box._post(self, None)


class Sandbox:
    """A pool of sessions. Returns at once: the zygote loads meanwhile. `layers` is a hook for the tests."""

    def __init__(self, workers: int | None = None, mode: str = "auto", layers=LAYERS):
        if mode not in ("auto", "limits-only"):
            raise ValueError("mode is 'auto' or 'limits-only'")
        self.workers, self.mode, self.live = workers or os.cpu_count() or 1, mode, session_room()
        self.layers = [name for name in layers if mode == "auto" or name != "seccomp"]
        self.pending, self.broken, self.report, self.closing, self.up = 0, "", {}, False, False
        self.lock, self.done, self.inbox, self.ready = (
            threading.Lock(),
            queue.SimpleQueue(),
            collections.deque(),
            threading.Event(),
        )
        self.waiting, self.running, self.idle = (
            collections.deque(),
            set(),
            {},
        )  # sessions: queued, with a snippet, longest idle first
        self.births, self.numbers, self.deaths = {}, itertools.count(), 0
        self.selector, self.zygote, self.control = selectors.DefaultSelector(), None, None
        self.wake, self.waker = socket.socketpair()
        self.wake.setblocking(False), self.waker.setblocking(False)
        self.selector.register(self.wake, selectors.EVENT_READ, self._on_wake)
        self.thread = threading.Thread(target=self._loop, name="sandbox", daemon=True)
        self.thread.start()

    # the caller's side

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def session(self) -> Session:
        return Session(self)

    def wait_ready(self, timeout: float | None = None) -> dict[str, str]:
        """Waits for the zygote and its self-test; raises SandboxError. Returns {layer: "on: ..." | "off: why"}."""
        if not self.ready.wait(timeout) or self.broken:
            raise SandboxError(self.broken or f"the sandbox was not ready after {timeout} s")
        return self.report

    def poll(self, timeout: float = 0.0) -> list[tuple[Session, Result]]:
        """[(session, result)] of finished snippets; waits at most `timeout` seconds for the first."""
        found = []
        try:
            found.append(self.done.get(timeout=timeout) if timeout > 0 else self.done.get_nowait())
            while True:
                found.append(self.done.get_nowait())
        except queue.Empty:
            pass
        with self.lock:
            self.pending -= len(found)
        for session, _ in found:
            session.busy = False
        return [pair for pair in found if not pair[0].closed]

    def close(self):
        """Kills every session and the zygote, and waits for them."""
        self.closing = True
        self._post(None, None)
        self.thread.join()

    def _post(self, session, job):
        self.inbox.append((session, job))
        try:
            self.waker.send(b"x")
        except OSError:  # full: it is awake already; closed: nobody is there
            pass

    # the thread's side: everything below runs in the supervisor thread alone

    def _loop(self):
        try:
            self._start_zygote()
            while not self.closing:
                self._step()
        except Exception as error:
            self._break(f"the supervisor failed: {error!r}")
        finally:
            self._shut_down()

    def _step(self):
        now = time.monotonic()
        wait = min(
            [s.job.pause for s in self.running] + [s.job.deadline - now for s in self.running],
            default=None if self.up else 1,
        )
        for key, _ in self.selector.select(wait if wait is None else max(wait, 0)):
            if (
                self.selector.get_map().get(key.fd) is key
            ):  # not closed by an earlier event of this batch
                key.data()
        now = time.monotonic()
        for session in list(self.running):  # pipes are emptied by the clock, not whenever something
            if (
                self._drain(session) and session.job.deadline <= now
            ):  # comes: a flood of small pieces costs us nothing
                self._stop(session, "timeout")
        if not (self.up or self.broken) and now > self.patience:
            self._break("the sandbox's libraries took more than 300 s to load")
        self._dispatch()

    def _on_wake(self):
        self.wake.recv(4096)
        while self.inbox:
            session, job = self.inbox.popleft()
            if job:
                session.job = job
                self.waiting.append(session)
            elif session:  # closed
                if session.job:
                    with self.lock:
                        self.pending -= session.job.sink is self.done
                    if session in self.waiting:
                        self.waiting.remove(session)
                session.job = None
                self.running.discard(session)
                self._drop(session)

    def _dispatch(self):
        while self.waiting and (self.broken or self.up and len(self.running) < self.workers):
            session = self.waiting.popleft()
            job, number = session.job, session.number
            session.number += 1
            self.running.add(session)
            self.idle.pop(session, None)
            job.steps, job.deadline = (
                collections.deque([(number, job.code, None)]),
                time.monotonic() + job.timeout,
            )
            if self.broken:
                self._finish(session, "crashed", f"SandboxError: {self.broken}")
            elif len(job.code.encode("utf-8", "surrogatepass")) > CODE_BYTES:
                self._finish(
                    session,
                    "error",
                    f"SyntaxError: the snippet is longer than {CODE_BYTES >> 10} KB",
                )
            elif session.process or self._fork(session):
                self._next(session)

    def _fork(self, session):
        """Asks for a process and puts the session's history before its job; the whole replay may take one timeout."""
        while self.idle and len(self.idle) + len(self.running) > self.live:
            self._drop(next(iter(self.idle)))
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            read, write = os.pipe()
        except OSError as error:
            return self._finish(
                session, "crashed", f"CrashError: no process could be started ({error.strerror})"
            )
        ours.setblocking(False), os.set_blocking(read, False)
        process = types.SimpleNamespace(
            control=ours, output=read, pid=0, pidfd=None, doomed=False, session=session
        )
        number = next(self.numbers)
        self.births[number], session.process = process, process
        self.selector.register(ours, selectors.EVENT_READ, lambda: self._on_control(session))
        session.job.steps.extendleft(reversed(session.history))
        session.job.replay_until = time.monotonic() + session.job.timeout
        try:
            socket.send_fds(self.control, [b"%d" % number], [theirs.fileno(), write])
        except OSError:
            pass  # as below: our end reads EOF
        theirs.close(), os.close(write)
        return True

    def _next(self, session):
        """Sends the next step of the session's job: a snippet to replay, or the new one."""
        job, (number, code, expected) = session.job, session.job.steps[0]
        job.name, job.started, job.size, job.head, job.tail = (
            secrets.token_hex(8),
            time.monotonic(),
            0,
            b"",
            b"",
        )
        job.deadline = job.replay_until if expected else job.started + job.timeout
        self._signal(session.process, signal.SIGCONT)
        try:
            session.process.control.send(
                f"{job.name} {number}\n".encode() + code.encode("utf-8", "surrogatepass")
            )
        except OSError:
            self._stop(session, "crashed")

    def _on_control(self, session):
        job = session.job if session in self.running else None
        try:
            reply = session.process.control.recv(100).decode("latin-1")
        except OSError:
            reply = ""
        name, _, status = reply.partition(" ")
        if not job or name != job.name or status not in ("ok", "error", "blocked", "memory"):
            return self._stop(session, "crashed")  # it died, or sent what was not asked for
        if not self._drain(session):
            return
        number, code, expected = job.steps[0]
        if status == "memory" or expected and status != expected:
            return self._stop(session, "memory")
        job.steps.popleft()
        if expected:
            return self._next(session)
        session.history.append((number, code, status))
        self._finish(session, status)

    def _drain(self, session):
        """Takes what is in the session's pipe: keeps head and tail, counts all. False if it was too much."""
        job = session.job
        while True:
            try:
                chunk = os.read(session.process.output, 1 << 16)
            except BlockingIOError:
                return True
            if not chunk:  # the snippet has closed its output
                return True
            room = KEEP_BYTES - len(job.head)
            job.size, job.pause = job.size + len(chunk), 0.002 if len(chunk) > 1 << 15 else 0.02
            job.head, job.tail = job.head + chunk[:room], (job.tail + chunk[room:])[-KEEP_BYTES:]
            if job.size > OUTPUT_BYTES:
                return self._stop(session, "output")

    def _stop(self, session, status):
        """Kills the session's process and ends its job; if that was a replay, the job starts again without a history."""
        job = session.job
        self._drop(session)
        if session not in self.running:
            return
        if job.steps[0][2]:
            session.note = (
                "(the variables of earlier snippets are lost: running them again failed)\n"
            )
            session.history, job.steps = [], collections.deque([job.steps[-1]])
            if self._fork(session):
                self._next(session)
            return
        self._finish(
            session,
            status,
            STOPPED[status].format(
                timeout=job.timeout, memory=MEMORY_BYTES >> 20, output=OUTPUT_BYTES >> 10
            )
            + "; variables of earlier snippets are kept, its own are not",
        )

    def _finish(self, session, status, text=""):
        job, session.job = session.job, None
        self.running.discard(session)
        cut = job.size - len(job.head) - len(job.tail)
        said = job.head + (b"\n... (%d bytes left out) ...\n" % cut if cut > 0 else b"") + job.tail
        said = (said.decode("utf-8", "replace").rstrip("\n") + "\n" + text).strip("\n")
        output, session.note = session.note + (said or "(no output)"), ""
        self.deaths = 0 if status != "crashed" else self.deaths
        if session.process:
            self.idle[session] = True
            self._signal(
                session.process, signal.SIGSTOP
            )  # a snippet that replied by itself cannot run on
            if resident(session.process.pid) > IDLE_BYTES:
                self._drop(session)
        seconds = time.monotonic() - job.started if job.started else 0.0
        job.sink.put((session, Result(status, output, seconds)))

    def _signal(self, process, number):
        try:
            if process.pidfd is not None:
                signal.pidfd_send_signal(process.pidfd, number)
        except OSError:
            pass

    def _drop(self, session):
        """Ends the session's process, if it has one; its history stays."""
        process, session.process = session.process, None
        self.idle.pop(session, None)
        if process:
            process.doomed = True  # if its pidfd is still to come: see _on_zygote
            self._signal(process, signal.SIGKILL)
            self.selector.unregister(process.control)
            process.control.close(), os.close(process.output)
            if process.pidfd is not None:
                os.close(process.pidfd)

    def _start_zygote(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        environment = {
            name + "_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "BLIS")
        }
        environment |= {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
        environment |= {
            name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"
        }
        config = {
            "fd": theirs.fileno(),
            "parent": os.getpid(),
            "layers": self.layers,
            "memory": MEMORY_BYTES,
        }
        self.zygote = subprocess.Popen(  # not -I: it ignores PYTHONHASHSEED; a session of its own: Ctrl-C is not for it
            [
                os.path.abspath(sys.executable),
                "-P",
                "-s",
                "-B",
                os.path.abspath(__file__),
                "--zygote",
                json.dumps(config),
            ],
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.control, self.patience = ours, time.monotonic() + 300
        self.selector.register(ours, selectors.EVENT_READ, self._on_zygote)

    def _on_zygote(self):
        try:
            message, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 1)
        except OSError:
            message, fds = b"", []
        word, _, rest = message.decode("utf-8", "replace").partition(" ")
        if word == "ready":
            self._on_ready(*json.loads(rest))
        elif word == "error":
            self._break(f"the sandbox could not start: {rest} (try `make setup`)")
        elif not word:
            self._on_zygote_death()
        else:
            process = self.births.pop(int(word))
            process.pid, process.pidfd = int(rest), fds[0]
            if process.session in self.idle:
                self._signal(process, signal.SIGSTOP)
            if process.doomed:
                self._signal(process, signal.SIGKILL)
                os.close(process.pidfd)

    def _on_ready(self, report, passed):
        missing = [
            f"{name} ({said[5:]})"
            for name, said in report.items()
            if said.startswith("off") and name in self.layers
        ]
        if "seccomp" in self.layers and (passed or not report["seccomp"].startswith("on")):
            why = (
                f"{', '.join(passed)} got through"
                if report["seccomp"].startswith("on")
                else report["seccomp"][5:]
            )
            return self._break(
                f"no safe sandbox on this host: seccomp: {why}; to go on at your own risk: --sandbox limits-only"
            )
        if self.mode != "auto":
            missing.append("seccomp (limits-only: a snippet that means harm may get out)")
        if missing and not self.ready.is_set():
            print("sandbox: without " + ", ".join(missing), file=sys.stderr)
        self.report, self.up = report, True
        self.ready.set()

    def _on_zygote_death(self):
        """Its sessions died with it; each is rebuilt at its next snippet."""
        self.selector.unregister(self.control)
        self.control.close()
        status, self.up, self.deaths = self.zygote.wait(), False, self.deaths + 1
        self.births.clear()
        if self.deaths > 3 or not self.ready.is_set():
            self._break(
                f"the sandbox's zygote ended with status {status}; see `python sandbox.py --check`"
            )
        elif not self.broken:
            self._start_zygote()

    def _break(self, why):
        self.broken = self.broken or why
        self.ready.set()
        for session in list(self.running):
            self._drop(session)
            self._finish(session, "crashed", f"SandboxError: {why}")

    def _shut_down(self):
        self._break("the sandbox is closed")
        if self.inbox:
            self._on_wake()
        self._dispatch()
        for session in list(self.idle):
            self._drop(session)
        if self.control:
            self.control.close()
        if self.zygote:
            if not self.up:
                self.zygote.kill()
            try:
                self.zygote.wait(5)
            except subprocess.TimeoutExpired:
                self.zygote.kill(), self.zygote.wait()
        self.selector.close(), self.wake.close(), self.waker.close()


def session_room() -> int:
    """How many processes may be kept alive: two or three descriptors and some 10 MB each."""
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(4, min(2000, (files - 256) // 3 if files > 1023 else 200, memory // 2 // (10 << 20)))


def resident(pid: int) -> int:
    """Resident bytes of a process, 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


# ---------------------------------------------------------------- the command


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a snippet of untrusted Python.")
    parser.error = lambda message: parser.exit(
        2, f"sandbox.py: {message} (--help lists the flags)\n"
    )
    parser.add_argument("code", nargs="?", help="the snippet, or - for standard input")
    parser.add_argument("--check", action="store_true", help="print which layers this host gives")
    parser.add_argument(
        "--sandbox",
        choices=("auto", "limits-only"),
        default="auto",
        help="limits-only: go on without seccomp",
    )
    parser.add_argument("--timeout", type=float, default=20, metavar="SECONDS")
    options = parser.parse_args()
    if not 0 < options.timeout < 1e6:
        parser.error("--timeout is a positive number of seconds")
    if not options.check and not (options.code or "").strip():
        parser.error("give a snippet, or - to read it from standard input")
    code = sys.stdin.read() if options.code == "-" else options.code
    try:
        with Sandbox(workers=1, mode=options.sandbox) as box:
            report = box.wait_ready()
            if options.check:
                print(
                    "\n".join(
                        f"{name:10} {report.get(name, 'on: in Python, for clear messages')}"
                        for name in LAYERS
                    )
                )
                return 0
            result = box.session().run(code, options.timeout)
    except SandboxError as error:
        parser.exit(2, f"sandbox.py: {error}\n")
    except KeyboardInterrupt:
        return 130
    print(result.output)
    return 0 if result.status == "ok" else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--zygote"]:
        zygote_main(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
