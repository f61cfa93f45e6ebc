"""Run snippets of untrusted Python: milliseconds each, variables kept, no way out.

A *zygote* process, started once with an empty environment, imports sympy, numpy, scipy and the like
and then only forks. Each trace gets a *session*: a fork that locks itself in before it reads its
first snippet, then runs snippet after snippet in one namespace (snippet.py). In the caller's
process a few threads each take a snippet from a queue and wait for it. A session that hangs, dies
or holds too much is killed, and made again by replaying the snippets that ended by themselves.

Whoever writes the snippets may run any code in the session, machine code included. It must not read
or write a file, reach the network, start or signal a process, see the caller's secrets, disturb
another trace, or hold up the caller.

    namespace  imports from an allow-list: messages for the model, NOT a boundary
    rlimits    memory, no new files, no forks (not enforced for uid 0)
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
import queue
import re
import resource
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import snippet

LAYERS = ("namespace", "rlimits", "uid", "landlock", "seccomp")
CODE_BYTES = 64 << 10  # before any parse: ast.parse of 20 MB takes a minute and 8 GB
OUTPUT_BYTES = 1 << 20  # a snippet that prints more is stopped
MEMORY_BYTES = 2 << 30  # a snippet that needs more is stopped
TICK = 20  # milliseconds between two looks at a running snippet
ENDED_BY_ITSELF = ("ok", "error", "blocked")
STOPPED = {
    "timeout": "TimeoutError: the snippet ran longer than {:g} s and was stopped",
    "memory": f"MemoryError: the snippet needed more than {MEMORY_BYTES >> 20} MB and was stopped",
    "killed": "MemoryError: the system killed the snippet, most likely it ran out of memory",
    "output": f"OutputError: the snippet printed more than {OUTPUT_BYTES >> 10} KB and was stopped",
    "crashed": "CrashError: the snippet's process died or broke its protocol",
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
    """The variables of one trace: a process, and the snippets that can make it again.

    One thread at a time owns the process: a worker, or who takes the session out of `box.idle`.
    """

    def __init__(self, box: "Sandbox"):
        self.box = box
        self.busy = self.closed = False  # busy: until the snippet's result has been polled
        self.process: Process | None = None
        self.history: list[tuple[int, str, Result]] = []  # snippets that ended by themselves
        self.number = 0  # of the next snippet in this trace

    def submit(self, code: str, timeout: float = 20, sink: queue.SimpleQueue | None = None) -> None:
        """Queue a snippet; its result comes from `box.poll`. Raises SandboxError, ValueError."""
        if self.closed or self.busy:
            raise ValueError("the session is closed, or its last snippet was not polled yet")
        sink = sink or self.box.done
        self.box.put(lambda: sink.put((self, self.execute(str(code), float(timeout)))))
        self.busy = True
        self.box.pending += sink is self.box.done

    def run(self, code: str, timeout: float = 20) -> Result:
        """Run a snippet and wait for its Result. Ctrl-C meanwhile closes the session."""
        sink = queue.SimpleQueue()
        self.submit(code, timeout, sink)
        try:
            return sink.get()[1]
        except BaseException:
            self.close()
            raise
        finally:
            self.busy = False

    def close(self) -> None:
        """Forget the variables. A snippet that runs is stopped by its worker at the next tick."""
        self.closed = True
        if self.box.idle.pop(self, None) is not None:
            self.process.signal(signal.SIGKILL)
            self.box.jobs.put(self.process.kill)  # in a worker, where no Ctrl-C interrupts it

    def cancelled(self) -> bool:
        return self.closed or self.box.closing.is_set()

    def execute(self, code: str, timeout: float) -> Result:
        """In a worker: run a snippet to its end."""
        number = self.number
        self.number += 1
        self.box.idle.pop(self, None)
        if len(code.encode("utf-8", "surrogatepass")) > CODE_BYTES:
            return Result("error", f"SyntaxError: the snippet is over {CODE_BYTES >> 10} KB", 0.0)
        try:
            note = self.prepare()
            result = self.process.run(number, code, timeout, self.cancelled)
        except Exception as error:  # whatever happens, the caller waits for a result
            if self.process:
                self.process.kill()
            return Result("crashed", f"CrashError: no process could be started: {error}", 0.0)
        if result.status in ENDED_BY_ITSELF:
            self.history.append((number, code, result))
            self.box.shelve(self)
        return replace(result, output=note + result.output)

    def prepare(self) -> str:
        """See to a process that holds this trace's variables. Returns what to say if some are lost.

        In a replay a snippet gets twice the time that it took. Where one ends otherwise than it
        did, those before it are replayed once more.
        """
        self.box.wait_ready()
        note = ""
        while self.process is None or not self.process.alive():
            if self.process:
                self.process.kill()
            self.process = self.box.new_process(self.cancelled)
            for position, (number, code, past) in enumerate(self.history):
                result = self.process.run(number, code, 2 * past.seconds + 1, self.cancelled)
                if result.status != past.status:
                    note = f"(only the variables made before snippet {number + 1} are there)\n"
                    self.history = self.history[:position]
                    self.process.kill()
                    break
        return note


class Sandbox(contextlib.AbstractContextManager):
    """A pool of sessions, of which `workers` run at a time. The zygote loads in the background."""

    def __init__(self, workers: int | None = None, mode: str = "auto", layers=LAYERS):
        if mode not in ("auto", "limits-only"):
            raise ValueError("mode is 'auto' or 'limits-only'")
        self.layers = [name for name in layers if mode == "auto" or name != "seccomp"]
        self.pid = os.getpid()
        self.broken = ""  # why no snippet can run any more
        self.report: dict[str, str] = {}  # of the layers
        self.ready, self.closing = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.done: queue.SimpleQueue = queue.SimpleQueue()
        self.pending = 0  # results that `poll` has still to give
        self.idle: OrderedDict[Session, int] = OrderedDict()  # bytes of each, longest idle first
        self.room, self.memory = idle_limits()
        self.zygote = Zygote(self.layers, self.closing)
        self.put(self.start)  # in a worker: a zygote dies with the thread that started it
        self.workers = workers = workers or len(os.sched_getaffinity(0))
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def __exit__(self, *_):
        self.close()

    def session(self) -> Session:
        return Session(self)

    def wait_ready(self) -> dict[str, str]:
        """Wait for the zygote and a first session. Returns {layer: "on: ..." | "off: why"}."""
        self.ready.wait()
        if self.broken:
            raise SandboxError(self.broken)
        return self.report

    def put(self, job) -> None:
        """Queue a job for the workers; raises SandboxError where none will take it."""
        if os.getpid() != self.pid:
            raise SandboxError("this process is a fork of the sandbox's: make a Sandbox of its own")
        with self.lock:  # so that `close` comes before or after
            if self.broken:
                raise SandboxError(self.broken)
            self.jobs.put(job)

    def work(self) -> None:
        while job := self.jobs.get():
            job()

    def poll(self, timeout: float = 0.0) -> list[tuple[Session, Result]]:
        """[(session, result)] of finished snippets; waits up to `timeout` seconds for the first."""
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self.done.get(timeout > 0, timeout))
            while True:
                found.append(self.done.get_nowait())
        self.pending -= len(found)
        for session, _ in found:
            session.busy = False
        return [(session, result) for session, result in found if not session.closed]

    def close(self) -> None:
        """Kill every session and the zygote, and wait. Whoever waits for a result gets one."""
        if os.getpid() != self.pid or self.closing.is_set():  # a forked child owns nothing of this
            return
        with self.lock:
            self.broken = self.broken or "the sandbox is closed"
            self.closing.set()
            for _ in self.threads:
                self.jobs.put(None)
        self.zygote.kill()
        for thread in self.threads:
            thread.join()
        while not self.jobs.empty():
            self.jobs.get()()
        while self.drop_longest_idle():
            pass
        self.zygote.reap()

    def start(self) -> None:
        """Start the zygote, and judge by a first session what this host gives."""
        try:
            first = self.new_process(self.closing.is_set)
            first.kill()
            self.report = first.report
            off = [f"{name} ({said[5:]})" for name, said in self.report.items() if said < "on"]
            if "seccomp" in self.layers and self.report["seccomp"] < "on":
                remedy = "to go on at your own risk: --sandbox limits-only"
                raise SandboxError(f"no safe sandbox on this host: without {off[-1]}; {remedy}")
            if off:
                print("sandbox: without " + ", ".join(off), file=sys.stderr)
        except Exception as error:
            self.broken = self.broken or str(error)
        self.ready.set()

    def new_process(self, cancelled) -> "Process":
        """A fork of the zygote. Where the system has no room for it, idle sessions make room."""
        patience = time.monotonic() + 2
        while not cancelled():
            try:
                process = Process(self.zygote)
            except OSError:
                if not self.drop_longest_idle() and time.monotonic() > patience:
                    raise
                time.sleep(0.01)  # for its process to end
                continue
            if any(process.report[name] < "on" < said for name, said in self.report.items()):
                process.kill()
                raise SandboxError("a session could not lock itself in as the first one did")
            return process
        raise SandboxError("the session is closed")

    def shelve(self, session: Session) -> None:
        """Make an idle session's process the box's; too many, or too big, and the oldest go."""
        self.zygote.delay = 0.0  # a snippet has run: whatever killed zygotes is over
        self.idle[session] = max(0, private_bytes(session.process.pid) - self.zygote.memory)
        while len(self.idle) > self.room or sum(list(self.idle.values())) > self.memory:
            self.drop_longest_idle()
        if session.closed:
            session.close()

    def drop_longest_idle(self) -> bool:
        with contextlib.suppress(KeyError):
            session, _ = self.idle.popitem(last=False)
            session.process.kill()
            return True
        return False


def idle_limits() -> tuple[int, int]:
    """(how many idle sessions, of 3 descriptors and 10 MB at least; bytes of all together)."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max": no limit there
        group = Path("/proc/self/cgroup").read_text().split(":")[-1].strip()
        memory = min(memory, int(Path(f"/sys/fs/cgroup{group}/memory.max").read_text()))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/proc/self/fd"))
    return max(1, min(2000, (files - 50) // 3, memory // (10 << 20))), memory // 4


def private_bytes(pid: int) -> int:
    """Resident memory of a process that is no file's."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as file:
        resident, shared = file.read().split()[1:3]
        return (int(resident) - int(shared)) * resource.getpagesize()
    return 0


# ---- A session's process and the zygote, as the caller sees them


class Process:
    """A fork of the zygote: a socket, a pipe of output, a pidfd. What comes out is not trusted."""

    def __init__(self, zygote: "Zygote"):
        self.zygote = zygote
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(5)
        read, write = os.pipe()
        os.set_blocking(read, False)
        self.output = open(read, "rb", buffering=0)
        with theirs, open(write, "wb", buffering=0) as pipe:
            self.pid = int(zygote.ask("fork", [theirs.fileno(), pipe.fileno()]))
        try:
            self.pidfd = os.pidfd_open(self.pid)
            self.report = json.loads(self.control.recv(1000))  # before any snippet: trusted
        except (OSError, ValueError):
            zygote.ask(f"bury {self.pid}")
            raise
        self.events = select.poll()  # a message, or its death
        self.events.register(self.control, select.POLLIN)
        self.events.register(self.pidfd, select.POLLIN)

    def run(self, number, code: str, timeout: float, cancelled) -> Result:
        """Send a snippet; empty the pipe by the clock (a flood then costs nothing) until it ends.

        Unless it ended by itself, the process is dead afterwards.
        """
        name = secrets.token_hex(8)  # only the owner of the request can reply to it
        request = f"{name} {number}\n".encode() + code.encode("utf-8", "surrogatepass")
        started, said, end = time.monotonic(), b"", ""
        self.signal(signal.SIGCONT)
        try:
            self.control.send(request)
        except OSError:
            end = "crashed"
        while not end:
            event = self.events.poll(TICK)
            while len(said) <= OUTPUT_BYTES and (chunk := self.output.read(1 << 16)):
                said += chunk
            if len(said) > OUTPUT_BYTES:
                end = "output"
            elif event:
                end = self.reply(name)
            elif cancelled():
                end = "crashed"
            elif time.monotonic() - started > timeout:
                end = "timeout"
        seconds = time.monotonic() - started
        output = snippet.printable(said)
        if end in ENDED_BY_ITSELF:
            self.signal(signal.SIGSTOP)  # a snippet that has forged its reply cannot run on
            return Result(end, output or "(nothing was printed: use print())", seconds)
        if self.kill() == "killed":
            end = "killed"
        why = STOPPED[end].format(timeout)
        output += f"\n{why}; variables of earlier snippets are kept, its own are not"
        return Result("memory" if end == "killed" else end, output.strip("\n"), seconds)

    def reply(self, name: str) -> str:
        """How the snippet ended, in its process's words; crashed if they are not what is due."""
        words = []
        with contextlib.suppress(OSError):
            words = self.control.recv(100).decode("latin-1").split()
        match words:
            case [said, "ok" | "error" | "blocked" | "memory" as status] if said == name:
                return status
            case []:  # its socket is closed a moment before it is dead
                self.events.unregister(self.control)
                self.events.poll(1000)
        return "crashed"

    def alive(self) -> bool:
        """Whether an idle process is still there and has kept quiet."""
        return not self.output.closed and not self.events.poll(0)

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> str:
        """End the process. Returns "killed" if somebody's SIGKILL had come before."""
        if self.output.closed:
            return ""
        os.close(self.pidfd)
        self.control.close()
        self.output.close()
        with contextlib.suppress(OSError):  # the zygote is dead, and its sessions with it
            return self.zygote.ask(f"bury {self.pid}")
        return ""


class Zygote:
    """The process that all sessions are forks of. They die with it; then another is started."""

    def __init__(self, layers: list[str], closing: threading.Event):
        self.layers, self.closing = layers, closing
        self.turn = threading.Lock()  # who holds it talks with the zygote
        self.process = self.control = None  # control is None where no zygote is up
        self.delay = 0.0  # seconds to wait before the next start
        self.memory = 0  # that the forks share with it

    def start(self) -> None:
        """Start the zygote and wait until it has loaded; raises SandboxError."""
        self.closing.wait(self.delay)
        self.delay = min(10.0, 2 * self.delay + 0.1)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config = {"fd": theirs.fileno(), "parent": os.getpid(), "layers": self.layers}
        environment = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
        for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "BLIS"):
            environment[f"{library}_NUM_THREADS"] = "1"  # a session cannot start a thread
        environment |= {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        python = [os.path.abspath(sys.executable), "-s", "-B"]  # -I would ignore PYTHONHASHSEED
        with theirs:
            self.process = subprocess.Popen(
                [*python, os.path.abspath(__file__), "--zygote", json.dumps(config)],
                cwd="/",
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is not for it
                **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL),
            )
        if self.closing.is_set():
            self.kill()
        self.control.settimeout(300)
        said = ""
        with contextlib.suppress(OSError):
            said = self.control.recv(1000).decode()
        if said != "ready":
            self.reap()
            why = said or "its zygote ended; see `python sandbox.py --check`"
            raise SandboxError(f"the sandbox could not start: {why} (try `make setup`)")
        self.memory = private_bytes(self.process.pid)

    def ask(self, request: str, descriptors=()) -> str:
        """Its answer to `fork`, which starts it if need be, or `bury PID`; raises OSError."""
        with self.turn:
            if request == "fork" and self.control is None:
                self.start()
            said = ""
            with contextlib.suppress(OSError, AttributeError):
                socket.send_fds(self.control, [request.encode()], descriptors)
                said = self.control.recv(200).decode()
            if not said:
                self.reap()
                raise OSError("the sandbox's zygote has died")
        if request == "fork" and not said.isdigit():
            raise OSError(said)
        return said

    def kill(self) -> None:
        """From any thread; its sessions die with it."""
        if self.process:
            self.process.kill()

    def reap(self) -> None:
        self.kill()
        if self.process:
            self.process.wait()
        if self.control:
            self.control.close()
            self.control = None


# ---- The zygote


def zygote_main(config: dict) -> None:
    """Load and say `ready`; then fork and bury as asked, until the caller is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a caller may ignore it, and exec keeps that
    die_with(config["parent"])
    oom_score(500)  # short of memory, the kernel takes sessions (1000), then this, then the caller
    control = socket.socket(fileno=config["fd"])
    try:
        snippet.preload()
        if len(os.listdir("/proc/self/task")) != 1:
            raise RuntimeError("the zygote has more than one thread")
        config["filter"] = seccomp_filter(os.uname().machine)
    except Exception as error:
        control.send(f"{type(error).__name__}: {error}".encode()[:1000])
        return
    control.send(b"ready")
    children, dying = set(), set()
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 200, 2)
        if not request:
            return
        dying = {pid for pid in dying if os.waitpid(pid, os.WNOHANG) == (0, 0)}
        try:
            if request == b"fork":
                answer = fork_session(config, *descriptors)
                children.add(answer)
            else:
                answer = bury(children, dying, int(request.split()[1]))
        except Exception as error:  # no room for a process, or for its descriptors here
            answer = f"{type(error).__name__}: {error}"
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(str(answer).encode())


def bury(children: set[int], dying: set[int], pid: int) -> str:
    """Kill a session's group while its number is still taken; it is reaped at a later request."""
    if pid not in children:  # of a zygote before this one
        return "gone"
    past = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)
    children.remove(pid)
    dying.add(pid)
    killed = past and (past.si_code, past.si_status) == (os.CLD_KILLED, signal.SIGKILL)
    return "killed" if killed else "stopped"


def fork_session(config: dict, control: int, output: int) -> int:
    """The pid of a child that locks itself in, says how, and serves requests on descriptor 3."""
    zygote, pid = os.getpid(), os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        oom_score(1000)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(control, 3)
        os.closerange(4, 65536)
        os.write(3, json.dumps(lock_in(config, zygote)).encode())
        snippet.serve(guarded="namespace" in config["layers"])
    finally:
        os._exit(0)


def oom_score(value: int) -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(value))


# ---- The kernel's walls, put up in the session before it reads anything


def lock_in(config: dict, parent: int) -> dict[str, str]:
    """Put up the walls in the one order that works. Returns {layer: "on: ..." | "off: why"}."""
    walls = {"rlimits": set_rlimits, "uid": drop_privileges, "landlock": landlock}
    walls["seccomp"] = lambda: seccomp(config["filter"])
    report = {}
    for name, wall in walls.items():
        if name == "landlock":  # after setuid, which clears the first two
            die_with(parent)
            libc_call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no ptrace, no /proc/PID/mem
            libc_call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        try:
            report[name] = f"on: {wall()}" if name in config["layers"] else "off: not asked for"
        except OSError as error:
            report[name] = f"off: {error.strerror}"
    return report


def libc_call(name: str, *args) -> int:
    """A function of libc, with integers of 64 bits. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    wide = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = getattr(libc, name)(*wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def die_with(parent: int) -> None:
    """SIGKILL to this process when its parent dies, or at once if that has happened already."""
    libc_call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def set_rlimits() -> str:
    """Hard = soft, so that nothing can be raised again. Above the zygote's own mappings: memory."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {"AS": mapped + MEMORY_BYTES, "STACK": 64 << 20, "NOFILE": 16}
    limits |= dict.fromkeys(("FSIZE", "CORE", "MEMLOCK", "NPROC"), 0)
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    return f"{MEMORY_BYTES >> 20} MB"


def drop_privileges() -> str:
    """Root becomes an unused uid, so that siblings differ; everybody loses all capabilities."""
    status = Path("/proc/self/status").read_text()
    effective = int(re.search(r"CapEff:\s*(\w+)", status)[1], 16)
    if os.geteuid() == 0 and effective >> 5 & 7 == 7:  # CAP_KILL (to kill them), SETGID, SETUID
        for uid in (2_000_000_000 + os.getpid(), 65534):  # the latter where few ids are mapped
            with contextlib.suppress(OSError):
                os.setresgid(uid, uid, uid)
                os.setgroups([])
                os.setresuid(uid, uid, uid)
                break
    header = struct.pack("Ii", 0x20080522, 0)
    libc_call("capset", ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))
    warning = "" if os.getuid() else " (kept: only seccomp stops forks)"
    return f"uid {os.getuid()}{warning}, no capabilities"


def landlock() -> str:
    """Deny every right that this kernel's Landlock knows, on every path."""
    create, restrict = 444, 446
    abi = libc_call("syscall", create, 0, 0, 1)
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)  # refer from 2, truncate 3, ioctl 5
    rules = struct.pack("QQQ", (1 << rights) - 1, 3, 3)  # TCP from 4, scopes from 6
    size = 8 * (1 + (abi >= 4) + (abi >= 6))
    ruleset = libc_call("syscall", create, ctypes.c_char_p(rules), size, 0)
    libc_call("syscall", restrict, ruleset, 0)
    os.close(ruleset)
    return f"ABI {abi}"


def seccomp(program: bytes) -> str:
    """Install the filter: from here on, a system call that it does not allow fails. Try it."""
    if not program:
        raise OSError(0, f"no system call table for {os.uname().machine}")
    buffer = ctypes.create_string_buffer(program, len(program))
    length = len(program) // 8
    header = ctypes.create_string_buffer(struct.pack("HP", length, ctypes.addressof(buffer)))
    libc_call("prctl", 22, 2, ctypes.addressof(header), 0, 0)
    attempts = {
        "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "socket": socket.socket,
        "fork": lambda: os.fork() or os._exit(0),
        "exec": lambda: os.execv("/no/such/file", ["-"]),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            if error.errno == 1:  # EPERM is the filter's, EACCES Landlock's
                continue
        raise OSError(0, f"{name} got through")
    return f"{length} instructions"


ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, AUDIT_ARCH
SYSCALLS = """
    read 0 63                write 1 64              readv 19 65             writev 20 66
    close 3 57               brk 12 214              munmap 11 215           mremap 25 216
    mmap 9 222               mprotect 10 226         madvise 28 233          futex 202 98
    rt_sigaction 13 134      rt_sigprocmask 14 135   rt_sigreturn 15 139     sigaltstack 131 132
    restart_syscall 219 128  nanosleep 35 101        clock_nanosleep 230 115 clock_gettime 228 113
    clock_getres 229 114     gettimeofday 96 169     time 201 -              times 100 153
    getrusage 98 165         sched_yield 24 124      getrandom 318 278       prlimit64 302 261
    getpid 39 172            getppid 110 173         gettid 186 178          getuid 102 174
    geteuid 107 175          getgid 104 176          getegid 108 177         exit 60 93
    exit_group 231 94
"""
ALL, PROT_EXEC, MAP_PRIVATE, MAP_TYPE, MAP_HUGETLB = 0xFFFFFFFF, 4, 2, 15, 0x40000
CLOCK_REALTIME = 256  # a bit of futex operations
CHECKS = {  # (half of an argument as a word of 32 bits, bits to look at, values that may be there)
    "mmap": [(4, PROT_EXEC, [0]), (6, MAP_TYPE | MAP_HUGETLB, [MAP_PRIVATE])],
    "mprotect": [(4, PROT_EXEC, [0])],
    "madvise": [(4, ALL, [4, 8, 14])],  # DONTNEED, FREE, HUGEPAGE
    "futex": [(2, ALL ^ CLOCK_REALTIME, [128, 129, 137, 138])],  # private waits and wakes, no locks
    "prlimit64": [(0, ALL, [0]), (4, ALL, [0]), (5, ALL, [0])],  # to read one's own
}
for name in ("clock_gettime", "clock_getres", "clock_nanosleep"):
    CHECKS[name] = [(0, 0x80000000, [0])]  # this bit is set where a clock id names a process


def seccomp_filter(machine: str) -> bytes:
    """The allow-list as a BPF program; empty for a machine without a table.

    An instruction is (code, jump if true, jump if false, constant); jumps count from the next one.
    """
    if machine not in ARCHITECTURES or sys.maxsize < 1 << 32:
        return b""
    column, architecture = ARCHITECTURES[machine]
    LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
    KILL, ALLOW, EPERM, ENOSYS = 0x80000000, 0x7FFF0000, 0x50001, 0x50026
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for name, *numbers in re.findall(r"(\w+) (\d+) (\d+|-)", SYSCALLS):
        body = []
        for half, bits, values in CHECKS.get(name, []):
            body += [(LOAD, 0, 0, 16 + 4 * half), (AND, 0, 0, bits)]
            for position, value in enumerate(values):
                body.append((EQUAL, len(values) - position, 0, value))
            body.append((RETURN, 0, 0, EPERM))
        body.append((RETURN, 0, 0, ALLOW))
        if numbers[column] != "-":
            program += [(EQUAL, 0, len(body), int(numbers[column])), *body]
    program += [(EQUAL, 0, 1, 435), (RETURN, 0, 0, ENOSYS)]  # clone3: libc falls back to clone
    program.append((RETURN, 0, 0, EPERM))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


# ---- The command


def main() -> int:
    """Run a snippet of untrusted Python."""
    import tyro

    from cli import UserError, parse  # here: the zygote and its forks do without

    @dataclass(kw_only=True)
    class Flags:
        code: tyro.conf.Positional[str] = ""
        """The snippet, or - for standard input."""
        check: tyro.conf.FlagCreatePairsOff[bool] = False
        """Print which layers this host gives."""
        sandbox: Literal["auto", "limits-only"] = "auto"
        """limits-only: go on where the kernel has no seccomp, at your own risk."""

    flags = parse(Flags, description=main.__doc__)
    if not flags.check and not flags.code.strip():
        raise UserError("give a snippet, or - to read it from standard input")
    code = sys.stdin.read() if flags.code == "-" else flags.code
    try:
        with Sandbox(workers=1, mode=flags.sandbox) as box:
            if flags.check:
                print("\n".join(f"{name:12} {said}" for name, said in box.wait_ready().items()))
                return 0
            box.wait_ready()
            result = box.session().run(code)
    except SandboxError as error:
        raise UserError(str(error)) from None
    print(result.output)
    return 0 if result.status == "ok" else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--zygote"]:
        zygote_main(json.loads(sys.argv[2]))
    else:
        from cli import run_main

        run_main(main)
