"""Run snippets of untrusted Python: milliseconds each, variables kept, no way out.

A *zygote* process, started once with an empty environment, imports sympy, numpy, scipy and the like
and then only forks. Each trace gets a *session*: a fork that locks itself in before it reads its
first snippet, then runs snippet after snippet in one namespace (snippet.py). In the caller's
process a pool of threads waits for the snippets. A session that hangs, dies or holds too much is
killed, and made again by replaying the snippets that ended by themselves.

Whoever writes the snippets may run any code in the session, machine code included. It must not read
or write a file, reach the network, start or signal a process, see the caller's secrets, disturb
another trace, or hold up the caller.

    namespace  imports from an allow-list: messages for the model, NOT a boundary
    rlimits    memory, nothing written to files, no forks (not enforced for uid 0)
    uid        root drops to an unused uid of its own; everybody drops every capability
    landlock   no path may be opened, changed or run; no TCP; no signals out
    seccomp    THE WALL: a list of system calls, some with checked arguments; the rest fails

Not covered: a snippet can lie about its own trace's outputs, use a core for its whole timeout and
the memory it is given, and read what the zygote holds (libraries, no secrets); side channels such
as timing; bugs of kernel or CPU. Same trace, same outputs, but for clocks, addresses, timeouts and
unseeded generators. Linux only; --sandbox limits-only goes on without seccomp, at your own risk.

    python sandbox.py 'print(2**100)'     or - to read the snippet from standard input
    python sandbox.py --check             which layers this host gives
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import snippet

LAYERS = ("namespace", "rlimits", "uid", "landlock", "seccomp")
OUTPUT_BYTES = 1 << 20  # a snippet that prints more is stopped
MEMORY_BYTES = 2 << 30  # a snippet that needs more is stopped
TICK = 20  # milliseconds between two looks at a running snippet
PAGE = resource.getpagesize()  # bytes
ENDED_BY_ITSELF = ("ok", "error", "blocked")  # any other status: its process is gone
STOPPED = {
    "timeout": "TimeoutError: the snippet ran longer than {:g} s and was stopped",
    "memory": f"MemoryError: the snippet needed more than {MEMORY_BYTES >> 20} MB and was stopped",
    "output": f"OutputError: the snippet printed more than {OUTPUT_BYTES >> 10} KB and was stopped",
    "crashed": "CrashError: the snippet's process died, most likely it ran out of memory",
}


class SandboxError(Exception):
    """There is no sandbox to run in; the text is one line with the remedy."""


@dataclass(frozen=True)
class Result:
    status: str  # ok | error | blocked | timeout | memory | output | crashed
    output: str  # what was printed, then the last value or the error; safe to show on a terminal
    seconds: float  # wall time, without the wait for a free worker


# ---- The pool: sessions, and threads that wait for their snippets
class Session:
    """The variables of one trace: a process, and the snippets that can make it again."""

    def __init__(self, box: "Sandbox"):
        self.box = box
        self.process: Process | None = None  # of a worker, or of who takes it out of box.idle
        self.history: list[tuple[str, Result]] = []  # snippets that ended by themselves
        self.closed = threading.Event()

    def submit(self, code: str, seconds: float = 20) -> "Future[Result]":
        """Queue a snippet. Wait for its result before you submit the next."""
        if os.getpid() != self.box.pid:  # a fork has none of the threads
            raise SandboxError("this process is a fork of the sandbox's: make a Sandbox of its own")
        return self.box.threads.submit(self.execute, code, seconds)

    def run(self, code: str, seconds: float = 20) -> Result:
        """Run a snippet and wait for its Result. Ctrl-C meanwhile closes the session."""
        future = self.submit(code, seconds)
        try:
            return future.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Forget the variables. A snippet that runs is stopped by its worker at the next tick."""
        self.closed.set()
        if self.box.idle.pop(process := self.process, None) is not None:
            process.kill()

    def execute(self, code: str, seconds: float) -> Result:
        """In a worker: run a snippet to its end."""
        if len(code) > 50_000:  # what the socket takes, at four bytes a character
            return Result("error", "SyntaxError: the snippet has over 50,000 characters", 0.0)
        if self.box.idle.pop(self.process, None) is None:
            self.process = None  # none yet, or stopped, or killed to make room
        try:
            note = self.prepare()
            result = self.process.run(code, seconds, self.closed)
        except OSError as error:
            return Result("crashed", f"CrashError: no process could be started: {error}", 0.0)
        if result.status in ENDED_BY_ITSELF:
            self.history.append((code, result))
            # Idle now: its process becomes the box's, which may kill it.
            self.box.idle[self.process] = self.process.memory() - self.process.inherited
            self.box.shrink(self.box.room, self.box.memory)
            if self.closed.is_set():  # while it ran
                self.close()
        return replace(result, output=note + result.output)

    def prepare(self) -> str:
        """Make sure that a process holds this trace's variables. Returns a note if some are lost.

        A replayed snippet gets twice its first time. If one ends differently now, a new process
        replays only those before it; if that fails too, none is kept.
        """
        note = ""
        while self.process is None or not self.process.is_idle():
            if self.process:
                self.process.kill()
            if self.closed.is_set():
                raise OSError("the session is closed")
            self.process = self.box.new_process()
            for number, (code, past) in enumerate(self.history):
                again = self.process.run(code, 2 * past.seconds + 1, self.closed)
                if again.status != past.status or not self.process.is_idle():
                    number = 0 if note else number  # this ends after two attempts
                    note = f"(of the earlier snippets only the first {number} could be repeated)\n"
                    self.history = self.history[:number]
                    self.process.kill()
                    break
        return note


class Sandbox(contextlib.AbstractContextManager):
    """A pool of sessions, of which `workers` run at a time. The zygote loads in the background."""

    def __init__(self, workers: int | None = None, mode: str = "auto", layers=LAYERS):
        self.layers = [name for name in layers if mode == "auto" or name != "seccomp"]
        self.pid = os.getpid()
        self.workers = workers or len(os.sched_getaffinity(0))
        self.lock = threading.Lock()  # for `zygote`, `control` and `closed`
        self.closed = False

        # Idle sessions are kept, up to a number (they take three descriptors each) and a quarter of
        # the memory.
        self.idle: OrderedDict[Process, int] = OrderedDict()  # bytes of each, longest idle first
        self.room = os.sysconf("SC_OPEN_MAX") // 6
        self.memory = os.sysconf("SC_PHYS_PAGES") * PAGE // 4

        self.threads = ThreadPoolExecutor(self.workers)  # the zygote dies with the one it is from
        self.zygote, self.control = self.threads.submit(start_zygote, self.layers).result()
        self.ready = self.threads.submit(self.start)

    def __exit__(self, *_):
        self.close()

    def session(self) -> Session:
        return Session(self)

    def wait_ready(self) -> dict[str, str]:
        """Wait for the zygote and a first session. Returns {layer: "on: ..." | "off: why"}."""
        return self.ready.result()

    def close(self) -> None:
        """Kill the zygote, and every session with it. Whoever waits for a result is told so."""
        if os.getpid() != self.pid:  # a fork owns nothing of this
            return
        with self.lock:
            self.closed = True
            self.zygote.kill()
        self.threads.shutdown()
        self.shrink(0, 0)
        self.zygote.wait()
        self.control.close()

    def start(self) -> dict[str, str]:
        """Wait for the zygote, and judge by a first session what this host gives."""
        try:
            first = self.new_process()
        except OSError as error:
            text = f"the sandbox could not start: {error} (try `make setup`)"
            raise SandboxError(text) from None
        first.kill()
        off = [f"{name} ({said[5:]})" for name, said in first.report.items() if said[:2] != "on"]
        if off:
            print("sandbox: without " + ", ".join(off), file=sys.stderr)
        return first.report

    def new_process(self) -> "Process":
        """A fork of the zygote. Where the system has no room for it, idle sessions make room."""
        try:
            process = Process(self.zygote_socket())
        except OSError:
            self.shrink(0, 0)
            time.sleep(0.5)  # for processes to end
            process = Process(self.zygote_socket())
        said = process.report["seccomp"]
        if "seccomp" in self.layers and not said.startswith("on"):
            process.kill()
            remedy = "to go on at your own risk: --sandbox limits-only"
            raise SandboxError(f"no safe sandbox on this host: without seccomp ({said}); {remedy}")
        return process

    def zygote_socket(self) -> socket.socket:
        """Of a zygote that is alive."""
        with self.lock:
            if self.closed:
                raise SandboxError("the sandbox is closed")
            if self.zygote.poll() is not None:
                self.zygote, self.control = start_zygote(self.layers)
            return self.control

    def shrink(self, room: int, memory: int) -> None:
        """Kill the longest idle sessions until so many are left, of so many bytes together."""
        while len(self.idle) > room or sum(list(self.idle.values())) > memory:
            with contextlib.suppress(KeyError):  # another thread was quicker
                process, _ = self.idle.popitem(last=False)
                process.kill()


# ---- A session's process and the zygote, as the caller sees them
class Process:
    """A fork of the zygote: a socket, a pipe of output, a pidfd. What comes out is not trusted."""

    def __init__(self, zygote: socket.socket):
        self.control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        read, write = os.pipe()
        os.set_blocking(read, False)
        self.output = open(read, "rb", 0)
        with control, open(write, "wb", 0) as output:
            socket.send_fds(zygote, [b"fork"], [control.fileno(), output.fileno()])
        self.control.settimeout(300)  # the zygote may still be loading
        said = self.control.recv(1000).decode()  # before any snippet: trusted
        if not said.startswith("{"):
            raise OSError(said or "the sandbox's zygote has died")
        self.control.setblocking(False)  # a snippet may leave it full
        self.report = json.loads(said)
        self.pid = self.report.pop("pid")
        self.pidfd = os.pidfd_open(self.pid)
        self.inherited = self.memory()
        self.events = select.poll()
        self.events.register(self.control, select.POLLIN)

    def run(self, code: str, seconds: float, closed: threading.Event) -> Result:
        """Send a snippet; read its output at each tick (so a flood costs nothing) until it ends."""
        started = time.monotonic()
        said = b""
        status = ""
        self.signal(signal.SIGCONT)
        try:
            self.control.send(code.encode("utf-8", "surrogatepass") + b"\n")  # never empty
        except OSError:
            status = "crashed"
        while not status:
            event = self.events.poll(TICK)
            said += self.output.read(OUTPUT_BYTES) or b""  # all that is in the pipe, 64 KB at most
            if len(said) > OUTPUT_BYTES:
                status = "output"
            elif event:
                status = self.reply()
            elif closed.is_set():
                status = "crashed"
            elif time.monotonic() - started > seconds:
                status = "timeout"

        output = snippet.printable(said)
        if status in ENDED_BY_ITSELF:
            self.signal(signal.SIGSTOP)  # a snippet that has forged its reply cannot run on
            output = output or "(nothing was printed: use print())"
        else:
            self.kill()
            why = STOPPED[status].format(seconds)
            output += f"\n{why}; variables of earlier snippets are kept, its own are not"
        return Result(status, output.strip("\n"), time.monotonic() - started)

    def reply(self) -> str:
        """How the snippet ended, in its process's words; crashed where it says anything else."""
        with contextlib.suppress(OSError):
            said = self.control.recv(100).decode("latin-1")
            if said in (*ENDED_BY_ITSELF, "memory"):
                return said
        return "crashed"

    def is_idle(self) -> bool:
        """Whether the process is still there and has kept quiet since its last reply."""
        return not self.output.closed and not self.events.poll(0)

    def memory(self) -> int:
        """Its resident bytes that are no file's; a new fork has those of the zygote."""
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self.pid}/statm").read_text()
            _, resident, shared, *_ = map(int, text.split())
            return (resident - shared) * PAGE
        return 0

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError):  # it is dead already
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        if not self.output.closed:
            self.signal(signal.SIGKILL)
            os.close(self.pidfd)
            self.control.close()
            self.output.close()


def start_zygote(layers: list[str]) -> tuple[subprocess.Popen, socket.socket]:
    """The process that all sessions are forks of, and how to ask it for one."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    python = [os.path.abspath(sys.executable), "-s", "-B"]  # -I would ignore PYTHONHASHSEED
    environment = {
        "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        "OMP_NUM_THREADS": "1",  # all libraries obey it: a session cannot start a thread
        "PYTHONHASHSEED": "0",
        "LC_ALL": "C.UTF-8",
    }
    with theirs:
        zygote = subprocess.Popen(
            [*python, __file__, "--zygote", str(theirs.fileno()), *layers],
            cwd="/",
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is not for it
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return zygote, control


# ---- The zygote
def zygote_main(control: socket.socket, layers: list[str]) -> None:
    """Load; then fork as often as asked, until the caller is gone and the socket closed."""
    libc_call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: with the caller's thread
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no session becomes a zombie
    snippet.preload()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has no threads"
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 100, 2)
        if not descriptors:  # the caller is gone
            return
        session, output = descriptors
        try:
            if os.fork() == 0:
                session_main(session, output, layers)
        except OSError as error:  # no room for a process
            os.write(session, str(error).encode())
        os.close(session)
        os.close(output)


def session_main(control: int, output: int, layers: list[str]) -> None:
    """In a fork: lock itself in, say how, and run what comes on descriptor 3."""
    try:
        with contextlib.suppress(OSError):  # short of memory, the kernel takes sessions first
            Path("/proc/self/oom_score_adj").write_text("1000")
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(control, 3)
        os.closerange(4, 65536)
        report = lock_in(layers)
        os.write(3, json.dumps({"pid": os.getpid(), **report}).encode())
        snippet.serve(guarded="namespace" in layers)
    finally:
        os._exit(0)


# ---- The kernel's walls, put up in the session before it reads anything
def lock_in(layers: list[str]) -> dict[str, str]:
    """Put up the walls in the one order that works. Returns {layer: "on: ..." | "off: why"}."""
    report = {}
    for wall in (rlimits, uid, landlock, seccomp):
        name = wall.__name__
        if name == "landlock":  # after setuid, which clears the first two
            libc_call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: with the zygote
            libc_call("prctl", 4, 0)  # PR_SET_DUMPABLE: no ptrace, no /proc/PID/mem
            libc_call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        try:
            report[name] = f"on: {wall()}" if name in layers else "off: not asked for"
        except OSError as error:
            report[name] = f"off: {error.strerror}"
    return report


def libc_call(name: str, *args) -> int:
    """A function of libc, with integers of 64 bits. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    wide = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = getattr(libc, name)(*wide)
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return result


def rlimits() -> str:
    """Hard = soft: nothing can be raised again. Memory counts above what the zygote has mapped."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    limits = {"AS": mapped + MEMORY_BYTES, "STACK": 64 << 20, "NOFILE": 16}
    for name in "FSIZE CORE MEMLOCK NPROC".split():
        limits[name] = 0
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    return f"{MEMORY_BYTES >> 20} MB"


def uid() -> str:
    """Root becomes an unused uid, so that siblings differ; everybody loses all capabilities."""
    capabilities = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1]
    is_able = int(capabilities, 16) >> 5 & 7 == 7  # CAP_KILL (it must be killed), SETGID, SETUID
    if is_able:
        for unused in 2_000_000_000 + os.getpid(), 65534:
            with contextlib.suppress(OSError):  # few ids are mapped: try the next
                os.setresgid(unused, unused, unused)
                os.setgroups([])
                os.setresuid(unused, unused, unused)
                break
    header = struct.pack("Ii", 0x20080522, 0)
    libc_call("capset", header, bytes(24))
    warning = "" if os.getuid() else " (kept: only seccomp stops forks)"
    return f"uid {os.getuid()}{warning}, no capabilities"


def landlock() -> str:
    """Deny every right that this kernel's Landlock knows, on every path."""
    create, restrict = 444, 446
    abi = libc_call("syscall", create, 0, 0, 1)
    rights = 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)  # refer, truncate, ioctl
    rules = struct.pack("QQQ", (1 << rights) - 1, 3, 3)  # TCP from 4, scopes from 6
    size = 8 * (1 + (abi >= 4) + (abi >= 6))
    ruleset = libc_call("syscall", create, rules, size, 0)
    libc_call("syscall", restrict, ruleset, 0)
    os.close(ruleset)
    return f"ABI {abi}"


def seccomp() -> str:
    """Install the filter: from here on, a system call that it does not allow fails. Try it."""
    if not FILTER:
        raise OSError(0, f"no system call table for {os.uname().machine}")
    buffer = ctypes.create_string_buffer(FILTER)
    length = len(FILTER) // 8
    header = struct.pack("HP", length, ctypes.addressof(buffer))
    libc_call("prctl", 22, 2, header)  # PR_SET_SECCOMP
    for attempt in (lambda: os.open("/", 0), socket.socket, lambda: os.fork() or os._exit(0)):
        try:
            attempt()
        except PermissionError:
            continue
        raise OSError(0, "the filter does not hold")
    return f"{length} instructions"


ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, AUDIT_ARCH
SYSCALLS = """
    read 0 63                write 1 64              readv 19 65             writev 20 66
    close 3 57               brk 12 214              munmap 11 215           mremap 25 216
    mmap 9 222               mprotect 10 226         madvise 28 233          futex 202 98
    rt_sigaction 13 134      rt_sigprocmask 14 135   rt_sigreturn 15 139     sigaltstack 131 132
    restart_syscall 219 128  nanosleep 35 101        clock_nanosleep 230 115 clock_gettime 228 113
    clock_getres 229 114     gettimeofday 96 169     times 100 153           getrusage 98 165
    sched_yield 24 124       getrandom 318 278       getpid 39 172           getppid 110 173
    gettid 186 178           getuid 102 174          geteuid 107 175         getgid 104 176
    getegid 108 177          exit 60 93              exit_group 231 94
"""
MAP_PRIVATE, MAP_TYPE, MAP_HUGETLB, MAP_POPULATE = 2, 15, 0x40000, 0x8000
ALL, CLOCK_REALTIME = 0xFFFFFFFF, 256
# A check: argument, counted from 0; bits to look at; values that may be there.
NO_EXEC = (2, 4, [0])  # the bit is PROT_EXEC
OWN_CLOCK = (0, 0x80000000, [0])  # the bit means another process's
CHECKS = {
    "mmap": [NO_EXEC, (3, MAP_TYPE | MAP_HUGETLB | MAP_POPULATE, [MAP_PRIVATE])],
    "mprotect": [NO_EXEC],
    "madvise": [(2, ALL, [4, 8, 14])],  # DONTNEED, FREE, HUGEPAGE
    "futex": [(1, ALL ^ CLOCK_REALTIME, [128, 129, 137, 138])],  # private waits and wakes, no locks
    "clock_gettime": [OWN_CLOCK],
    "clock_getres": [OWN_CLOCK],
    "clock_nanosleep": [OWN_CLOCK],
}


def seccomp_filter(machine: str) -> bytes:
    """The allow-list as a BPF program; empty for a machine without a table."""

    def step(code, constant, if_true=0, if_false=0):  # jumps count from the next step
        return struct.pack("HBBI", code, if_true, if_false, constant)

    if machine not in ARCHITECTURES:
        return b""
    column, architecture = ARCHITECTURES[machine]
    LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
    KILL, ALLOW, EPERM = 0x80000000, 0x7FFF0000, 0x50001
    program = step(LOAD, 4) + step(EQUAL, architecture, if_true=1) + step(RETURN, KILL)
    program += step(LOAD, 0)  # at 0 is the call's number, at 16 + 8 i its argument i
    for name, *numbers in re.findall(r"(\w+) (\d+) (\d+)", SYSCALLS):
        body = b""
        for argument, bits, values in CHECKS.get(name, []):
            body += step(LOAD, 16 + 8 * argument)  # its lower 32 bits
            body += step(AND, bits)
            for position, value in enumerate(values):
                body += step(EQUAL, value, if_true=len(values) - position)
            body += step(RETURN, EPERM)
        body += step(RETURN, ALLOW)
        program += step(EQUAL, int(numbers[column]), if_false=len(body) // 8)  # 8 bytes a step
        program += body
    return program + step(RETURN, EPERM)


FILTER = seccomp_filter(os.uname().machine)


# ---- The command
def main() -> int:
    import tyro

    from cli import UserError, parse  # here: the zygote and its forks do without

    @dataclass(kw_only=True)
    class Flags:
        """Run a snippet of untrusted Python."""

        code: tyro.conf.Positional[str] = ""  # the snippet, or - for standard input
        check: bool = False  # print which layers this host gives
        sandbox: Literal["auto", "limits-only"] = "auto"  # limits-only: no seccomp

    flags = parse(Flags)
    if not flags.check and not flags.code.strip():
        raise UserError("give a snippet, or - to read it from standard input")
    code = sys.stdin.read() if flags.code == "-" else flags.code
    try:
        with Sandbox(workers=1, mode=flags.sandbox) as box:
            report = box.wait_ready()
            if flags.check:
                for name, said in report.items():
                    print(f"{name:12} {said}")
                return 0
            result = box.session().run(code)
    except SandboxError as error:
        raise UserError(str(error)) from None
    print(result.output)
    return 0 if result.status == "ok" else 1


if __name__ == "__main__":
    if "--zygote" in sys.argv:
        zygote_main(socket.socket(fileno=int(sys.argv[2])), sys.argv[3:])
    else:
        from cli import run_main

        run_main(main)
