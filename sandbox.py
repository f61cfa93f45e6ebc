"""Run snippets of untrusted Python: milliseconds each, variables kept, no way out.

A *zygote* process (started once by exec, with an empty environment) imports sympy, numpy, scipy and mpmath
and then only forks. Each trace gets a *session*: one fork of the zygote that locks itself in before it reads
its first snippet, then runs snippet after snippet in one namespace. One supervisor thread in the caller's
process starts, feeds, times and kills sessions. A session that hangs, dies or is dropped to save memory is
rebuilt at the trace's next snippet by replaying the snippets that ended by themselves: a snippet that had to
be stopped leaves no trace, and loses nothing that came before it.

Threat model: the model, or somebody who writes its prompts, runs any code at all in the session's process,
machine code included. It must not read or write a file, reach the network, start or signal a process, see
the caller's secrets, disturb another trace, or hold up the caller. Kernel and CPU bugs are out of scope.

    1 ast        imports from an allow-list, no dunder attributes, no open/eval/...: clear messages for the
                 model, a fence against accidents. NOT a boundary: `random._os` walks round it
    2 namespace  reduced builtins and a guarded __import__; as weak as 1
    3 kernel     rlimits   memory, no new files, no forks (not enforced for uid 0), CPU time
                 uid       root drops to an unused uid of its own, or else every capability
                 landlock  no path may be opened, changed or run; no TCP; no signals out
                 seccomp   THE WALL: an allow-list of about 35 system calls; no open, socket, clone, exec, kill

Covered: files, network, processes, signals, other traces, the caller's environment, memory, wall time,
output floods, fork and thread bombs, forged or broken replies (they end the session, as `crashed`).
Not covered: a snippet can lie about its own trace's outputs; it can use one core for its whole timeout and
the memory it is given; it can read what the zygote's process holds (the libraries, no secret of the
caller); side channels such as timing; kernel bugs. With `--sandbox limits-only` there is no seccomp: a
snippet that means harm then has Landlock and the uid against it, and, as uid 0 or on old kernels, little.
Same trace, same outputs, except for clocks (`datetime.now`), addresses (`id`, default reprs) and timeouts.

    python sandbox.py 'print(2**100)'     run a snippet            python sandbox.py -    the same, from stdin
    python sandbox.py --check             which layers this host gives
"""

import argparse
import ast
import collections
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
CODE_BYTES = 64 << 10           # before any parse: ast.parse of 20 MB takes a minute and 8 GB
OUTPUT_BYTES = 1 << 20          # a snippet that prints more is stopped
KEEP_BYTES = 4 << 10            # head and tail of an output that are kept
IDLE_BYTES = 512 << 20          # an idle session that holds more memory is dropped and rebuilt by replay

ALLOWED = ("math cmath random statistics fractions decimal itertools functools collections operator string re datetime "
           "dataclasses typing heapq bisect copy enum numbers abc numpy scipy sympy mpmath").split()
BANNED_NAMES = {                # name: what to do instead
    "open": "snippets have no files", "input": "snippets have no input", "breakpoint": "there is no debugger",
    "exec": "write the code itself", "eval": "write the expression itself, or use sympy.sympify",
    "compile": "write the code itself", "__import__": "use an import statement",
    "exit": "let the snippet end", "quit": "let the snippet end", "help": "there is no pager"}
HARMLESS_DUNDERS = {f"__{name}__" for name in (
    "name doc class init new str repr len iter next getitem setitem delitem contains call hash eq ne lt le gt ge add sub mul "
    "truediv floordiv mod pow neg abs radd rsub rmul rtruediv and or xor invert bool int float index enter exit "
    "post_init annotations").split()}

NO_NEW_PRIVS, PDEATHSIG, DUMPABLE, SECCOMP, CAPBSET_DROP = 38, 1, 4, 22, 24    # prctl(2)
SYSCALLS = {                    # allowed whatever their arguments: (x86_64, aarch64)
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "close": (3, 57), "munmap": (11, 215),
    "brk": (12, 214), "mremap": (25, 216), "madvise": (28, 233), "futex": (202, 98), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "sched_yield": (24, 124),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94)}
ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}               # column of the table, AUDIT_ARCH


class SandboxError(Exception):
    """The pool cannot be started; the text is one line with the remedy."""


@dataclass(frozen=True)
class Result:
    status: str                 # ok | error | blocked | timeout | memory | output | crashed
    output: str                 # what the snippet printed, then its last value or its error; never empty
    seconds: float              # wall time seen by the caller, without the wait for a free core


# ---------------------------------------------------------------- the snippet's text: pure functions

def unfence(code):
    """The code without a markdown fence around it."""
    match = re.fullmatch(r"\s*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", code, re.DOTALL)
    return match.group(1) if match else code


def check(tree):
    """Layer 1: raises PermissionError with a message that the model can act on."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            if name.split(".")[0] not in ALLOWED:
                raise PermissionError(f"import of '{name}' is not allowed; allowed: {', '.join(ALLOWED)}")
        if isinstance(node, ast.Name) and node.id in BANNED_NAMES and isinstance(node.ctx, ast.Load):
            raise PermissionError(f"'{node.id}' is not available; {BANNED_NAMES[node.id]}")
        # every attribute trick on the interpreter starts at one of __base__, __globals__, __subclasses__, ...
        if isinstance(node, ast.Attribute) and re.fullmatch("__.*__", node.attr) and node.attr not in HARMLESS_DUNDERS:
            raise PermissionError(f"attribute '{node.attr}' is not available (line {node.lineno})")


def explain(error, sources):
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
    text = text if len(text) <= 1000 else text[:500] + " ... " + text[-500:]
    if where is None:
        return text
    lines, name = sources[where[0]], "line" if where[0] == next(reversed(sources)) else "an earlier snippet's line"
    line = lines[where[1] - 1].strip()[:120] if 0 < where[1] <= len(lines) else ""
    return f"{text} ({name} {where[1]}{': ' if line else ''}{line})"


# ---------------------------------------------------------------- the kernel's side: runs in the session, once

def libc_call(name, *args):
    """A libc function by ctypes, with 64-bit arguments; raises OSError."""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = getattr(libc, name)(*wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def seccomp_filter():
    """The filter's BPF program as bytes, or None on an architecture without a table."""
    if platform.machine() not in ARCHES or sys.maxsize < 1 << 32:
        return None
    column, arch = ARCHES[platform.machine()]
    LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
    KILL, ALLOW, EPERM, ENOSYS = 0x80000000, 0x7FFF0000, 0x50001, 0x50026
    number, argument = 0, lambda i, high=0: 16 + 8 * i + 4 * high        # offsets in struct seccomp_data
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, number)]
    if arch == 0xC000003E:
        code += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]     # the x32 table: a second set of numbers
    for pair in SYSCALLS.values():
        if pair[column] is not None:
            code += [(EQUAL, 0, 1, pair[column]), (RETURN, 0, 0, ALLOW)]
    for call in ((9, 222)[column], (10, 226)[column]):                   # mmap, mprotect: never executable
        code += [(EQUAL, 0, 4, call), (LOAD, 0, 0, argument(2)), (ANY_BIT, 0, 1, 4),
                 (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]
    code += [(EQUAL, 0, 10, (302, 261)[column])]                         # prlimit64: only to read one's own
    for offset in (argument(0), argument(2), argument(2, 1)):
        code += [(LOAD, 0, 0, offset), (EQUAL, 1, 0, 0), (RETURN, 0, 0, EPERM)]
    code += [(RETURN, 0, 0, ALLOW), (EQUAL, 0, 1, 435), (RETURN, 0, 0, ENOSYS),   # clone3: libc then tries clone
             (RETURN, 0, 0, EPERM)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def landlock():
    """Denies every right that this kernel's Landlock knows, on every path; raises OSError if there is none."""
    import ctypes
    create, restrict = 444, 446
    abi = libc_call("syscall", create, 0, 0, 1)
    bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)                     # refer from 2, truncate from 3, ioctl from 5
    attribute = struct.pack("QQQ", (1 << bits) - 1, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    attribute = attribute[:8 if abi < 4 else 16 if abi < 6 else 24]      # files, TCP from 4, scopes from 6
    ruleset = libc_call("syscall", create, ctypes.c_char_p(attribute), len(attribute), 0)
    libc_call("syscall", restrict, ruleset, 0)
    os.close(ruleset)
    return f"ABI {abi}"


def set_rlimits(memory):
    """Hard = soft, so that nothing can be raised again."""
    import resource
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    wanted = {"AS": mapped + memory, "STACK": 64 << 20, "FSIZE": 0, "NOFILE": 16, "CORE": 0, "CPU": 3600, "MEMLOCK": 0,
              "MSGQUEUE": 0, "SIGPENDING": 64, "NPROC": 0}
    for name, value in wanted.items():
        which = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def drop_privileges():
    """Root becomes an unused uid of its own (siblings differ, so none may signal another), or loses all capabilities."""
    import ctypes
    said = f"uid {os.getuid()}, no capabilities"
    with open("/proc/self/status") as file:
        effective = int(re.search(r"CapEff:\s*(\w+)", file.read()).group(1), 16)
    if os.geteuid() == 0 and effective >> 5 & 7 == 7:                    # CAP_KILL (or it could not be killed), SETGID, SETUID
        try:
            os.setgroups([])
        except OSError:
            pass
        for uid in (2_000_000_000 + os.getpid(), 65534):
            try:
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                said = "root dropped to an unused uid" if uid != 65534 else "root dropped to uid 65534"
                break
            except OSError:
                continue
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    libc_call("capset", ctypes.c_char_p(header), ctypes.c_char_p(nothing))
    return said if os.getuid() else "uid 0 kept without capabilities: only seccomp stops forks"


def die_with(parent):
    """SIGKILL to this process when its parent dies, or at once if that has happened already."""
    libc_call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def lock_in(config, parent):
    """Puts up the kernel's walls, in the one order that works; returns {layer: "on: ..." | "off: why"}."""
    import ctypes
    report = {}

    def layer(name, function, *args):
        if name not in config["layers"]:
            report[name] = "off: not asked for"
            return
        try:
            report[name] = f"on: {function(*args) or 'yes'}"
        except OSError as error:
            report[name] = f"off: {error.strerror}"

    layer("rlimits", set_rlimits, config["memory"])
    layer("uid", drop_privileges)
    die_with(parent)                                                     # after setuid, which clears it
    libc_call("prctl", DUMPABLE, 0, 0, 0, 0)                             # no ptrace, no /proc/PID/mem by the same uid
    libc_call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    layer("landlock", landlock)
    if "seccomp" in config["layers"] and not config["filter"]:
        report["seccomp"] = f"off: no system call table for {platform.machine()}"
    else:
        text = config["filter"] or b""
        buffer = ctypes.create_string_buffer(text, len(text) or 1)
        program = ctypes.create_string_buffer(struct.pack("HP", len(text) // 8, ctypes.addressof(buffer)))
        layer("seccomp", lambda: libc_call("prctl", SECCOMP, 2, ctypes.addressof(program), 0, 0) and "" or f"{len(text) // 8} instructions")
    return report


def self_test():
    """Tries to open, connect, fork and run; returns the attempts that did not end in EPERM."""
    attempts = {"open": lambda: os.open("/etc/passwd", os.O_RDONLY), "socket": socket.socket,
                "fork": lambda: os.fork() or os._exit(0), "exec": lambda: os.execv("/proc/self/exe", ["python", "-V"])}
    failed = []
    for name, attempt in attempts.items():
        try:
            attempt()
            failed.append(name)
        except OSError as error:
            if error.errno != 1:
                failed.append(f"{name} ({error.strerror})")
    return failed


# ---------------------------------------------------------------- the session: a fork of the zygote

def guarded_import(name, globals=None, locals=None, fromlist=(), level=0):
    if name.split(".")[0] not in ALLOWED or level:
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


def run_snippet(code, number, namespace, sources, layers):
    """Runs one snippet, writes all it has to say to descriptor 1; returns its status."""
    filename, status = f"<snippet {number}>", "ok"
    code = unfence(code)
    sources[filename] = code.split("\n")
    sys.stdout = sys.stderr = out = open(1, "w", buffering=1 << 13, encoding="utf-8", errors="backslashreplace", closefd=False)
    out.reconfigure(line_buffering=True)                                 # so that a stopped snippet's output is not lost
    try:
        try:
            tree = ast.parse(code, filename)
        except (MemoryError, RecursionError):
            raise SyntaxError("the code is nested too deeply") from None
        if "ast" in layers:
            check(tree)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        body = compile(tree, filename, "exec", dont_inherit=True)
        last = last and compile(ast.Expression(last.value), filename, "eval", dont_inherit=True)
        seed(number)
        exec(body, namespace)
        value = eval(last, namespace) if last else None
        if value is not None:
            out.write(show(value) + "\n")
    except PermissionError as error:                                     # ours, or the kernel's EPERM
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


def serve(config):
    """The session's main loop: request `ID NUMBER\\nCODE` on descriptor 3, reply `ID STATUS`, until the socket closes."""
    namespace, sources = new_namespace(config["layers"]), {}
    while request := os.read(3, CODE_BYTES + 100):
        head, _, code = request.partition(b"\n")
        name, number = head.split()
        status = run_snippet(code.decode("utf-8", "surrogatepass"), int(number), namespace, sources, config["layers"])
        os.write(3, name + b" " + status.encode())


def session_main(config, control, output, parent):
    """In the child: descriptors 0 (null), 1 and 2 (output), 3 (requests), nothing else; then the walls; then serve."""
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.dup2(output, 1), os.dup2(output, 2), os.dup2(control, 3)
    os.closerange(4, 65536)
    report = lock_in(config, parent)
    if config["required"] - {name for name, said in report.items() if said.startswith("on")}:
        return
    if config["testing"]:
        os.write(1, json.dumps([report, self_test()]).encode())
        return
    serve(config)


# ---------------------------------------------------------------- the zygote

def preload():
    """Imports all that a snippet may import lazily (afterwards no file can be opened) and warms the common paths."""
    import importlib
    import pkgutil
    import warnings
    warnings.simplefilter("ignore")
    heavy = "torch tensorflow jax cupy numba llvmlite matplotlib pandas aesara pyglet IPython".split()
    for name in heavy:                                                   # sympy's printers import these if they can
        sys.modules[name] = None
    for name in "sympy mpmath numpy encodings".split():
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, name + ".", onerror=lambda name: None):
            if not re.search(r"test|bench|conftest|pyglet|llvm|f2py|distutils|__main__|sympy.this|function_docs|mbcs|oem", module.name):
                try:
                    importlib.import_module(module.name)
                except Exception:
                    pass
    for name in heavy:
        del sys.modules[name]
    parts = ("cluster constants differentiate fft integrate interpolate linalg ndimage optimize signal sparse.linalg "
             "sparse.csgraph spatial.distance special stats.qmc stats.mstats").split()
    for name in ALLOWED + ["scipy." + part for part in parts] + "_strptime unicodedata stringprep _pydecimal linecache".split():
        try:
            importlib.import_module(name)
        except ImportError:
            if name in ("numpy", "sympy", "scipy", "mpmath"):
                raise


def warm():
    import gc
    import random
    import warnings
    import numpy
    import scipy.integrate
    import sympy
    sys.set_int_max_str_digits(1_000_000)
    sys.setrecursionlimit(10_000)                                        # with 64 MB of stack
    numpy.set_printoptions(legacy="1.25")                                # [1.0], not [np.float64(1.0)]
    numpy.random.bit_generator.randbits = random.getrandbits             # default_rng() without a seed: repeatable too
    x = sympy.symbols("x")
    sympy.solve(x**2 - 3*x + 2, x), sympy.integrate(x * sympy.sin(x), x), sympy.factorint(1001), sympy.simplify(sympy.sin(x)**2)
    numpy.linalg.eigvals(numpy.eye(3)), scipy.integrate.quad(lambda t: t, 0, 1), seed(0)
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, SyntaxWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.formatwarning = lambda message, category, *rest: f"{category.__name__}: {message}\n"
    os.environ.clear()
    gc.collect()
    gc.freeze()                                                          # the collector leaves these pages shared


def fork_session(config, control, output, children):
    """Returns (pid, pidfd or None)."""
    zygote = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])           # not reaped before its pidfd is open
    try:
        pid = os.fork()
        if pid == 0:
            try:
                session_main(config, control, output, zygote)
            finally:
                os._exit(0)
        children.add(pid)
        try:
            os.setpgid(pid, pid)                                         # in both: whoever comes first
        except OSError:
            pass
        try:
            return pid, os.pidfd_open(pid)
        except OSError:
            return pid, None
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def reap(children):
    """Kills what is left of a dead session's process group while its id is still held by the zombie, then buries it."""
    try:
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
            kill_group(dead.si_pid)
            os.waitpid(dead.si_pid, 0)
            children.discard(dead.si_pid)
    except ChildProcessError:
        pass


def kill_group(pid):
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except OSError:
            pass


def try_out(config, children):
    """A session that locks itself in, tests the walls and ends; returns ({layer: said}, attempts that got through)."""
    theirs, ours = socket.socketpair()
    fork_session(dict(config, testing=True, required=set()), ours.fileno(), theirs.fileno(), children)
    theirs.close()
    ours.settimeout(20)
    text = ours.recv(1 << 16)
    return json.loads(text)


def zygote_main(config):
    """Ready when it says `ready REPORT`; then forks a session for every `fork` with two descriptors; ends at EOF."""
    die_with(config["parent"])
    control, children = socket.socket(fileno=config["fd"]), set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: reap(children))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")                                           # short of memory, the kernel takes sessions first
    except OSError:
        pass
    try:
        preload()
        warm()
        if len(os.listdir("/proc/self/task")) != 1:
            raise RuntimeError("the zygote has more than one thread")
        config.update(filter=seccomp_filter(), testing=False, required=set())
        report, leaks = try_out(config, children)
        config["required"] = {name for name, said in report.items() if said.startswith("on")}
        control.send(b"ready " + json.dumps([report, leaks]).encode())
    except Exception as error:
        control.send(f"error {type(error).__name__}: {error}".encode()[:1000])
        return
    while True:
        message, fds, _, _ = socket.recv_fds(control, 100, 2)
        if not message:
            break
        if message.startswith(b"kill "):
            kill_group(int(message[5:])) if int(message[5:]) in children else None
            continue
        try:
            pid, pidfd = fork_session(config, *fds, children)
            socket.send_fds(control, [b"pid %d" % pid], [pidfd] if pidfd is not None else [])
            os.close(pidfd) if pidfd is not None else None
        except OSError as error:
            control.send(f"nofork {error.strerror}".encode())
        for fd in fds:
            os.close(fd)
    for pid in list(children):
        kill_group(pid)


# ---------------------------------------------------------------- the supervisor: in the caller's process

class Session:
    """The variables of one trace. At most one snippet at a time."""

    def __init__(self, box):
        self.box, self.number, self.history, self.note = box, 0, [], ""
        self.process = self.job = None                  # the supervisor thread's, but for submit's first assignment
        self.busy = self.closed = False

    def submit(self, code, timeout=20, sink=None):
        """Queues a snippet; its result comes from `box.poll`. Raises SandboxError if the pool could not be started."""
        if self.busy or self.closed:
            raise ValueError("the session is closed" if self.closed else "the session's last snippet has not been polled")
        if self.box.broken:
            raise SandboxError(self.box.broken)
        self.busy = True
        with self.box.lock:
            self.box.pending += sink is None
        self.box._post("submit", self, types.SimpleNamespace(code=str(code), timeout=float(timeout), sink=sink or self.box.done))

    def run(self, code, timeout=20):
        """Runs a snippet and waits for its Result."""
        sink = queue.SimpleQueue()
        self.submit(code, timeout, sink)
        _, result = sink.get()
        self.busy = False
        return result

    def close(self):
        if not self.closed:
            self.closed = True
            self.box._post("close", self, None)


class Sandbox:
    """A pool of sessions. Returns at once; the zygote loads meanwhile (about 2 s). `layers` is a hook for tests."""

    def __init__(self, workers=None, mode="auto", memory=2 << 30, live=None, layers=LAYERS):
        if mode not in ("auto", "limits-only"):
            raise ValueError("mode is 'auto' or 'limits-only'")
        self.workers, self.mode, self.memory = workers or os.cpu_count() or 1, mode, memory
        self.layers = [name for name in layers if mode == "auto" or name != "seccomp"]
        self.live = live or session_room()
        self.pending, self.broken, self.report = 0, "", {}
        self.lock, self.done, self.inbox = threading.Lock(), queue.SimpleQueue(), collections.deque()
        self.ready, self.closing = threading.Event(), False
        self.waiting, self.running, self.forks, self.idle = collections.deque(), set(), collections.deque(), {}
        self.selector, self.zygote, self.control, self.deaths = selectors.DefaultSelector(), None, None, 0
        self.wake_read, self.wake_write = socket.socketpair()
        for end in (self.wake_read, self.wake_write):
            end.setblocking(False)
        self.selector.register(self.wake_read, selectors.EVENT_READ, self._on_wake)
        self.thread = threading.Thread(target=self._loop, name="sandbox", daemon=True)
        self.thread.start()

    # the caller's side

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def session(self):
        return Session(self)

    def wait_ready(self, timeout=None):
        """Waits for the zygote and its self-test; raises SandboxError. Returns {layer: "on: ..." | "off: why"}."""
        if not self.ready.wait(timeout):
            raise SandboxError(f"the sandbox was not ready after {timeout} s")
        if self.broken:
            raise SandboxError(self.broken)
        return self.report

    def poll(self, timeout=0.0):
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
        return [(session, result) for session, result in found if not session.closed]

    def close(self):
        """Kills every session and the zygote, and waits for them."""
        if not self.closing:
            self.closing = True
            self._post("stop", None, None)
        self.thread.join()

    def _post(self, *message):
        self.inbox.append(message)
        try:
            self.wake_write.send(b"x")
        except OSError:                                 # full: it is awake already; closed: nobody is there
            pass

    # the thread's side: everything below runs in the supervisor thread only

    def _loop(self):
        try:
            self._start_zygote()
            while not self.closing:
                due = [session.job.deadline for session in self.running if session.job.deadline]
                wait = max(0.0, min(due) - time.monotonic()) if due else None
                for key, _ in self.selector.select(wait):
                    key.data() if key.fileobj in self.selector.get_map() else None
                self._stop_late()
                self._dispatch()
        finally:
            self._shut_down()

    def _on_wake(self):
        self.wake_read.recv(4096)
        while self.inbox:
            what, session, job = self.inbox.popleft()
            if what == "submit":
                session.job, job.deadline, job.steps = job, None, None
                self.waiting.append(session)
            elif what == "close":
                if session.job:
                    with self.lock:
                        self.pending -= session.job.sink is self.done
                    if session in self.waiting:
                        self.waiting.remove(session)
                session.job = None
                self.running.discard(session)
                self._drop(session)

    def _dispatch(self):
        while self.waiting and (self.broken or len(self.running) < self.workers and self.ready.is_set()):
            session = self.waiting.popleft()
            session.job.number, session.number = session.number, session.number + 1
            self.running.add(session)
            self.idle.pop(session, None)
            if self.broken:
                self._finish(session, "crashed", f"SandboxError: {self.broken}")
            elif len(session.job.code) > CODE_BYTES or len(session.job.code.encode("utf-8", "surrogatepass")) > CODE_BYTES:
                self._finish(session, "error", f"SyntaxError: the snippet is longer than {CODE_BYTES >> 10} KB")
            elif session.process:
                session.job.steps = collections.deque([(session.job.number, session.job.code, None)])
                self._next(session)
            else:
                self._fork(session)

    # one session: fork, send, receive, stop

    def _fork(self, session):
        while self.idle and len(self.idle) + len(self.running) > self.live:
            self._drop(next(iter(self.idle)))           # the one that has been idle longest
        job = session.job
        job.steps = collections.deque([*session.history, (job.number, job.code, None)])
        job.replay_deadline = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        read, write = os.pipe()
        ours.setblocking(False), os.set_blocking(read, False)
        session.process = types.SimpleNamespace(control=ours, output=read, pid=None, pidfd=None)
        self.forks.append(session)
        try:
            socket.send_fds(self.control, [b"fork"], [theirs.fileno(), write])
        except OSError:
            pass                                        # the zygote is dead: _on_zygote sees it and forks again
        theirs.close(), os.close(write)

    def _next(self, session):
        """Sends the next step of the session's job: a replayed snippet, or the new one."""
        job, process = session.job, session.process
        number, code, expected = job.steps[0]
        job.id, job.started, job.size, job.head, job.tail = secrets.token_hex(8).encode(), time.monotonic(), 0, b"", b""
        job.deadline = job.started + job.timeout
        if expected:                                    # the whole replay may take as long as one snippet
            job.replay_deadline = job.deadline = job.replay_deadline or job.deadline
        try:
            process.control.send(job.id + b" %d\n" % number + code.encode("utf-8", "surrogatepass"))
        except OSError:
            self._stop(session, "crashed")

    def _on_control(self, session):
        job = session.job
        try:
            data = session.process.control.recv(1 << 12)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        match = re.fullmatch(rb"([0-9a-f]{16}) (ok|error|blocked|memory)", data)
        if not job or session not in self.running or not match or match.group(1) != job.id:
            return self._stop(session, "crashed")       # dead, or something that is no reply to what was asked
        self._on_output(session)
        if session.job is not job or session not in self.running or not session.process:
            return                                      # stopped for too much output
        status, (number, code, expected) = match.group(2).decode(), job.steps.popleft()
        if status == "memory" or expected and status != expected:
            self._stop(session, "memory" if status == "memory" else "crashed", replaying=bool(expected))
        elif expected:
            self._next(session)
        else:
            session.history.append((number, code, status))
            self._finish(session, status, "")

    def _on_output(self, session):
        """Takes what is in the session's pipe: keeps head and tail, counts the rest."""
        job, process = session.job, session.process
        while process.output is not None and session.process is process:
            try:
                chunk = os.read(process.output, 1 << 16)
            except BlockingIOError:
                return
            if not chunk:                               # the snippet closed its own output
                self.selector.unregister(process.output)
                os.close(process.output)
                process.output = None
            elif not job or session not in self.running:
                return self._stop(session, "crashed")
            else:
                room = KEEP_BYTES - len(job.head)
                job.size += len(chunk)
                job.head, job.tail = job.head + chunk[:room], (job.tail + chunk[room:])[-KEEP_BYTES:]
                if job.size > OUTPUT_BYTES:
                    return self._stop(session, "output")

    def _stop_late(self):
        now = time.monotonic()
        for session in [s for s in self.running if s.job.deadline and s.job.deadline <= now]:
            self._stop(session, "timeout")

    def _stop(self, session, status, replaying=None):
        """Kills the session's process and ends its job; a failure in the replay costs the variables, not the new snippet."""
        job = session.job
        self._drop(session)
        if not job or session not in self.running:
            return
        if replaying if replaying is not None else bool(job.steps and job.steps[0][2]):
            session.note = "(the variables of earlier snippets are lost: running them again failed)\n"
            session.history, job.deadline = [], None
            return self._fork(session)
        kept = "variables of earlier snippets are kept"
        self._finish(session, status, {
            "timeout": f"TimeoutError: the snippet ran longer than {job.timeout:g} s and was stopped; {kept}",
            "memory": f"MemoryError: the snippet needed more than {self.memory >> 20} MB and was stopped; {kept}",
            "output": f"OutputError: the snippet printed more than {OUTPUT_BYTES >> 10} KB and was stopped; {kept}",
            "crashed": f"CrashError: the snippet's process died or broke its protocol; {kept}"}[status])

    def _finish(self, session, status, text):
        job, session.job = session.job, None
        self.running.discard(session)
        seconds = time.monotonic() - job.started if hasattr(job, "started") else 0.0
        head, tail, size = getattr(job, "head", b""), getattr(job, "tail", b""), getattr(job, "size", 0)
        cut = size - len(head) - len(tail)
        said = (head + (b"\n... (%d bytes left out) ...\n" % cut if cut > 0 else b"") + tail).decode("utf-8", "replace")
        said = (said.rstrip("\n") + "\n" if said.strip("\n") else "") + text
        output, session.note = session.note + (said.rstrip("\n") or "(no output)"), ""
        self.deaths = 0
        if session.process:
            self.idle[session] = True
            if resident(session.process.pid) > IDLE_BYTES:
                self._drop(session)
        job.sink.put((session, Result(status, output, seconds)))

    def _drop(self, session):
        """Ends the session's process, if it has one; its history stays."""
        process, session.process = session.process, None
        self.idle.pop(session, None)
        if not process:
            return
        try:
            if process.pidfd is not None:
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
            elif process.pid:
                self.control.send(b"kill %d" % process.pid)
        except OSError:
            pass
        if process.pid:
            self.selector.unregister(process.control)
            self.selector.unregister(process.output) if process.output is not None else None
        process.control.close()
        for fd in (process.output, process.pidfd):
            os.close(fd) if fd is not None else None

    # the zygote

    def _start_zygote(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threads = {name + "_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB")}
        libraries = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        config = {"fd": theirs.fileno(), "parent": os.getpid(), "layers": self.layers, "memory": self.memory}
        command = [sys.executable, "-P", "-s", "-B", os.path.abspath(__file__), "--zygote", json.dumps(config)]
        self.zygote = subprocess.Popen(         # not -I: it ignores PYTHONHASHSEED. A session of its own: Ctrl-C is ours
            command, cwd="/", env={**libraries, **threads, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        ours.setblocking(False)
        self.control = ours
        self.selector.register(ours, selectors.EVENT_READ, self._on_zygote)

    def _on_zygote(self):
        try:
            message, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 1)
        except BlockingIOError:
            return
        except OSError:
            message, fds = b"", []
        word, _, rest = message.decode("utf-8", "replace").partition(" ")
        if word == "ready":
            self._on_ready(*json.loads(rest))
        elif word == "error":
            self._break(f"the sandbox could not load its libraries ({rest}); run `make setup`")
        elif word == "pid":
            self._on_forked(int(rest), fds[0] if fds else None)
        elif word == "nofork":
            session = self.forks.popleft()
            self._drop(session)
            self._finish(session, "crashed", f"CrashError: no process could be started ({rest})") if session in self.running else None
        else:
            self._on_zygote_death()

    def _on_ready(self, report, leaks):
        missing = [f"{name} ({said[5:]})" for name, said in report.items() if said.startswith("off") and name in self.layers]
        self.report = report
        if "seccomp" in self.layers and (leaks or not report["seccomp"].startswith("on")):
            why = f"got through: {', '.join(leaks)}" if report["seccomp"].startswith("on") else report["seccomp"][5:]
            return self._break(f"no safe sandbox on this host: seccomp: {why}; to go on at your own risk: --sandbox limits-only")
        if (missing or self.mode != "auto") and not self.ready.is_set():
            print("sandbox: without " + ", ".join(missing or ["seccomp (limits-only): a hostile snippet may get out"]), file=sys.stderr)
        self.ready.set()

    def _on_forked(self, pid, pidfd):
        session = self.forks.popleft()
        process = session.process
        if process is None or session.job is None:      # closed in the meantime
            session.process = types.SimpleNamespace(control=socket.socket(), output=None, pid=None, pidfd=pidfd)
            return self._drop(session)
        process.pid, process.pidfd = pid, pidfd
        self.selector.register(process.control, selectors.EVENT_READ, lambda: self._on_control(session))
        self.selector.register(process.output, selectors.EVENT_READ, lambda: self._on_output(session))
        self._next(session)

    def _on_zygote_death(self):
        """Sessions die with their zygote; the next one rebuilds them by replay."""
        self.selector.unregister(self.control)
        self.control.close()
        code = self.zygote.wait()
        self.deaths += 1
        if self.deaths > 3 or not self.ready.is_set():
            self._break(f"the sandbox's process ended with status {code} before it was of use; try `python sandbox.py --check`")
            return
        forks, self.forks = self.forks, collections.deque()
        self._start_zygote()
        for session in forks:
            self._drop(session)
            if session in self.running:
                self.running.discard(session)
                session.number -= 1
                self.waiting.appendleft(session)

    def _break(self, why):
        self.broken = why
        self.ready.set()
        for session in list(self.running):
            self._drop(session)
            self._finish(session, "crashed", f"SandboxError: {why}")

    def _shut_down(self):
        for session in [*self.idle, *self.running]:
            self._drop(session)
        self.control.close() if self.control else None
        if self.zygote:
            try:
                self.zygote.wait(5)
            except subprocess.TimeoutExpired:
                self.zygote.kill()
                self.zygote.wait()
        self.selector.close()
        self.wake_read.close(), self.wake_write.close()


def session_room():
    """How many processes may be kept alive: two or three descriptors and some 10 MB each."""
    import resource
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(4, min(2000, (files - 256) // 3 if files > 1024 else 200, memory // 2 // (10 << 20)))


def resident(pid):
    """Resident bytes of a process, 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


# ---------------------------------------------------------------- the command

def main():
    parser = argparse.ArgumentParser(description="Run a snippet of untrusted Python.")
    parser.add_argument("code", nargs="?", help="the snippet, or - for standard input")
    parser.add_argument("--check", action="store_true", help="print which layers this host gives")
    parser.add_argument("--sandbox", choices=("auto", "limits-only"), default="auto", help="limits-only: go on without seccomp")
    parser.add_argument("--timeout", type=float, default=20, metavar="SECONDS")
    options = parser.parse_args()
    if not options.check and not (options.code or "").strip():
        parser.error("give a snippet, or - to read it from standard input")
    code = sys.stdin.read() if options.code == "-" else options.code
    try:
        with Sandbox(workers=1, mode=options.sandbox) as box:
            report = box.wait_ready()
            if options.check:
                print("\n".join(f"{name:10} {report.get(name, 'on: in Python, for clear messages')}" for name in LAYERS))
                return 0
            result = box.session().run(code, options.timeout)
    except SandboxError as error:
        sys.exit(f"sandbox.py: {error}")
    print(result.output)
    return 0 if result.status == "ok" else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--zygote"]:
        zygote_main(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
