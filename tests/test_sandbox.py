"""The sandbox: attacks judged by their effects, faults, the filter, recoveries, ordinary snippets.

Every attack runs in a session with no layer at all, where it must do its damage (else it proves
nothing; those that would hurt the machine are spared), with all layers, with the kernel's alone,
with seccomp alone, and, where marked, with Landlock alone. Damage is what `World.damage` sees from
outside, or `ESCAPED` printed by an attack whose gain is only visible inside.
"""

import contextlib
import itertools
import os
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

import sandbox
from sandbox import Sandbox

ROOT = os.geteuid() == 0
X86 = os.uname().machine == "x86_64"
KERNEL = ("rlimits", "uid", "landlock", "seccomp")
CONFIGS = {"none": (), "all": sandbox.LAYERS, "kernel": KERNEL} | {name: (name,) for name in KERNEL}
TRIED = ("none", "all", "kernel", "seccomp", "landlock")  # on every attack
NOTHING = "(nothing was printed: use print())"


def read(name):
    return (Path(__file__).parent / f"{name}.txt").read_text()


class World:
    """What an attack may not touch: files, listeners, another process and its environment."""

    def __init__(self):
        self.token = "TOKEN" + secrets.token_hex(12)
        self.dir = tempfile.mkdtemp(prefix="world", dir="/tmp")
        self.sibling, self.listeners = None, {}
        self.reset()

    def path(self, name):
        return os.path.join(self.dir, name)

    def reset(self):
        self.clear()
        os.makedirs(self.path("empty"))
        Path(self.path("secret")).write_text((self.token + "\n").ljust(54321, "x"))
        Path(self.path("victim")).write_text("victim")
        Path(self.path("evil.py")).write_text(f"print({self.token!r})\n")
        os.symlink(self.token, self.path("link"))
        os.utime(self.path("victim"), (10**9, 10**9))
        os.chmod(self.dir, 0o777)
        os.chmod(self.path("victim"), 0o666)
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("unix", socket.AF_UNIX, socket.SOCK_STREAM, self.dir + ".unix"),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, "\0" + self.dir),
        ):
            self.listeners[name] = server = socket.socket(family, kind)
            server.bind(address)
            server.setblocking(False)
            if kind == socket.SOCK_STREAM:
                server.listen()
        os.chmod(self.dir + ".unix", 0o777)
        command = [sys.executable, "-c", "print(flush=True); import time; time.sleep(1000)"]
        env = {**os.environ, "KEY": self.token}
        self.sibling = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, process_group=0)
        self.sibling.stdout.readline()
        self.tree, self.state = self.look(), self.sibling_state()

    def clear(self):
        shutil.rmtree(self.dir, ignore_errors=True)
        Path(self.dir + ".unix").unlink(missing_ok=True)
        for server in self.listeners.values():
            server.close()
        if self.sibling:
            self.sibling.kill()
            self.sibling.communicate()

    def look(self):
        found = {}
        for entry in os.scandir(self.dir):
            stat = entry.stat(follow_symlinks=False)
            plain = entry.is_file(follow_symlinks=False) and os.access(entry.path, os.R_OK)
            text = Path(entry.path).read_bytes() if plain else None
            extra = () if entry.is_symlink() else tuple(os.listxattr(entry.path))
            mode = (stat.st_mode, stat.st_uid, stat.st_mtime, stat.st_nlink)
            found[entry.name] = (*mode, text, extra)
        return found

    def sibling_state(self):
        pid = self.sibling.pid
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        nice = os.getpriority(os.PRIO_PROCESS, pid)
        return stat in "tTZX", nice, os.sched_getaffinity(pid), limit

    def damage(self, output):
        """The set of effects an attack had; mends them."""
        found = {"files"} if self.look() != self.tree else set()
        for name, server in self.listeners.items():
            with contextlib.suppress(BlockingIOError):
                stream = server.type == socket.SOCK_STREAM
                server.accept()[0].close() if stream else server.recv(100)
                found.add(name)
        time.sleep(0.005)  # a signal on its way, a tracer on its way out
        if self.sibling.poll() is not None or self.sibling_state() != self.state:
            found.add("sibling")
        if found:
            self.reset()
        if self.token in output or "54321" in output:
            found.add("secret")
        if "ESCAPED" in output:
            found.add("inside")
        return found

    def names(self):
        """Assignments that tell an attack its targets."""
        names = ("canary", "secret", "victim", "empty")
        targets = {name.upper(): self.path(name) for name in names}
        targets |= {n.upper(): self.listeners[n].getsockname()[1] for n in ("tcp", "udp")}
        targets |= {"DIR": self.dir, "UNIX": self.dir + ".unix", "ABSTRACT": "\0" + self.dir}
        targets |= {"SIBLING": self.sibling.pid, "CALLER": os.getpid()}
        return "".join(f"{name} = {value!r}\n" for name, value in targets.items())


# The way round the namespace, three hops from an allowed import: every attack starts like this.
PRELUDE = textwrap.dedent("""
    import random, numpy as np, sympy as sp
    modules = random._os.sys.modules
    os, sys, bi, socket, ctypes, subprocess, signal, io, pathlib, shutil, threading, tempfile = [
        modules[n] for n in 'os sys builtins socket ctypes subprocess signal io pathlib shutil '
        'threading tempfile'.split()]
    linecache, importlib, imp = modules['linecache'], modules['importlib'], bi.__import__
    libc = ctypes.CDLL(None, use_errno=True)
    def call(number, *args):
        wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
        return libc.syscall(ctypes.c_long(number), *wide)
    def gain(result, least=0):
        print(WON if result is None or result >= least else 'errno %d' % ctypes.get_errno())
    text = ctypes.c_char_p
    WON = 'ESC' + 'APED'    # an error message quotes the line, so the word must not stand in it
    """)
# name: (where it is shown to work, code)
WRITTEN = re.findall(r"(?m)^==== (\S+): (.*)\n((?:(?!====).*\n)+)", read("attacks"))
ATTACKS = {name: (where.split(), code) for name, where, code in WRITTEN}
if not X86:
    ATTACKS = {name: attack for name, attack in ATTACKS.items() if "call(" not in attack[1]}


@pytest.fixture(scope="module")
def boxes():
    """A pool for each set of layers, made when first asked for."""
    made = {}

    def get(config):
        if config not in made:
            made[config] = Sandbox(workers=2, layers=CONFIGS[config])
            made[config].wait_ready()
        return made[config]

    os.environ["SANDBOX_TEST_KEY"] = "ENVTOKEN"
    yield get
    for box in made.values():
        box.close()


@pytest.fixture(scope="module")
def world():
    world = World()
    yield world
    world.clear()


@pytest.fixture
def box(boxes):
    return boxes("all")


@pytest.fixture
def session(box):
    with contextlib.closing(box.session()) as session:
        yield session


def cases(config):
    mark = {"none": "live", "landlock": "landlock"}.get(config)
    hidden = "root" if config == "none" and not ROOT else None
    wanted = {name for name, (where, _) in ATTACKS.items() if not mark or mark in where}
    return [(config, name) for name in ATTACKS if name in wanted and hidden not in ATTACKS[name][0]]


@pytest.mark.parametrize("config,name", [case for c in TRIED for case in cases(c)])
def test_attack(boxes, world, config, name):
    box = boxes(config)
    if config == "landlock" and not box.wait_ready()["landlock"].startswith("on"):
        pytest.skip("no Landlock here")
    session = box.session()
    result = session.run(world.names() + PRELUDE + ATTACKS[name][1], seconds=10)
    session.close()  # a tracer must be gone before its victim can be buried
    damage = world.damage(result.output)
    if config == "none":
        end = time.monotonic() + 1
        while not damage and time.monotonic() < end:  # a signal takes its time
            damage = world.damage("")
        assert damage, f"not a live attack: {result}"
    else:
        assert not damage, (damage, result)
        assert "NameError" not in result.output and "SyntaxError" not in result.output, result


@pytest.mark.parametrize("config", TRIED[:4])
def test_the_attacks_get_as_far_as_the_kernel(boxes, config):
    """What stops an attack is not a missing name. Nor is the caller's environment there to see."""
    environment = "dict(os.environ), libc.getenv(b'SANDBOX_TEST_KEY'), sys.argv"
    code = f"print(libc.getppid() == os.getppid() > 1, {environment})"
    output = boxes(config).session().run(PRELUDE + code).output
    assert output.startswith("True {} 0 [") and "ENVTOKEN" not in output, output


# ---- The filter
def run_bpf(program, data):
    """What the kernel would return for a `struct seccomp_data`."""
    at, value = 0, 0
    while True:
        code, if_true, if_false, constant = struct.unpack_from("HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            value = struct.unpack_from("I", data, constant)[0]
        elif code == 0x54:
            value &= constant
        elif code == 0x15:
            at += if_true if value == constant else if_false
        else:
            assert code == 0x06
            return constant


MAPS = {"x86_64": (9, 10, 28, 202, 228, 229, 230), "aarch64": (222, 226, 233, 98, 113, 114, 115)}
FREE = {  # allowed with any arguments; written down a second time, from the kernel's tables
    "x86_64": "0 1 3 11 12 13 14 15 19 20 24 25 35 39 60 96 98 100 102 104 107 108 110 131 186 219 "
    "231 318",
    "aarch64": "57 63 64 65 66 93 94 101 124 128 132 134 135 139 153 165 169 172 173 174 175 176 "
    "177 178 214 215 216 278",
}  # fmt: skip


def allowed(machine, number, args):
    """The policy in other words than the filter's tables."""
    mmap, mprotect, madvise, futex, gettime, getres, sleep = MAPS[machine]
    low = [arg & 0xFFFFFFFF for arg in args]
    if number in (mmap, mprotect) and low[2] & 4:
        return False
    if number == mmap:
        return low[3] & 0xF == 2 and not low[3] & 0x48000
    if number == madvise:
        return low[2] in (4, 8, 14)
    if number == futex:
        return low[1] & 128 > 0 and (low[1] & ~384) in (0, 1, 9, 10)
    if number in (gettime, getres, sleep):
        return low[0] < 1 << 31
    return number == mprotect or number in map(int, FREE[machine].split())


@pytest.mark.parametrize("machine", MAPS)
def test_the_filter_is_the_policy(machine):
    """Over all numbers, and where arguments matter over their edges and at random."""
    program, rng = sandbox.seccomp_filter(machine), random.Random(0)
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    words = [0, 1, 2, 3, 4, 0x8002, 8, 14, 0x22, 0x40022, 1 << 31, 1 << 32, 2**64 - 1, 2**63 + 2]
    words += [operation + flag for operation in range(16) for flag in (0, 128, 256, 384)]
    for number in [*range(1024), *(0x40000000 + n for n in range(600)), 0xFFFFFFFF]:
        plain = [[0] * 6, *([rng.getrandbits(64) for _ in range(6)] for _ in range(3))]
        edges = itertools.product(words[:15], words, words[:14], words[:13])
        edges = itertools.islice(edges, 0, None, 11)  # coprime to all four: every triple comes
        for args in edges if number in MAPS[machine] else plain:
            args = [*args, 0, 0][:6]
            data = struct.pack("iIQ6Q", number if number < 1 << 31 else -1, arch, 0, *args)
            verdict = run_bpf(program, data)
            expected = 0x7FFF0000 if allowed(machine, number, args) else 0x50001
            assert verdict == expected, (number, args)
    for other in (0x40000003, 0xC00000B7 ^ 0xC000003E ^ arch, 0):
        assert run_bpf(program, struct.pack("iIQ6Q", 0, other, 0, *[0] * 6)) == 0x80000000
    assert sandbox.seccomp_filter("riscv64") == b""


@pytest.mark.skipif(not X86, reason="numbers of x86_64")
def test_every_other_system_call_is_refused(boxes):
    """In truth, also x32's. 335 and 336 (uretprobe, uprobe) pass every filter by design."""
    free = {*map(int, FREE["x86_64"].split()), *MAPS["x86_64"], 335, 336}
    code = PRELUDE + textwrap.dedent(f"""
        for number in set(range(600)) - {free} | {{0x40000000 + n for n in range(600)}}:
            ctypes.set_errno(0)
            result = call(number, 0, 0, 0, 0, 0, 0)
            if result != -1 or ctypes.get_errno() != 1:
                print(number, result, ctypes.get_errno())
        """)
    assert boxes("seccomp").session().run(code).output == NOTHING


def test_rlimits_alone(boxes, world):
    """Files can be made but hold nothing; memory and descriptors are bounded; no user can fork."""
    session, code = boxes("rlimits").session(), world.names() + PRELUDE
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    session.run(code + "bi.open(CANARY, 'w').write('x')")
    assert not os.path.exists(world.path("canary")) or os.path.getsize(world.path("canary")) == 0
    world.reset()
    assert session.run("x = bytearray(3 << 30)").status == "memory"
    assert "Too many open files" in session.run(code + "[os.dup(1) for i in range(99)]").output
    if not ROOT:
        assert "Resource temporarily unavailable" in session.run(code + "os.fork()").output


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_uid_alone(boxes, world):
    """Root's session is nobody: no root file, no signal to another session, no way back."""
    other, session = boxes("uid").session(), boxes("uid").session()
    assert other.run("x = 5\nx").output == "5"
    os.chmod(world.path("secret"), 0o600)
    code = world.names() + PRELUDE
    for attempt in (
        "bi.open(SECRET).read()",
        "os.kill(SIBLING, 9)",
        f"os.kill({other.process.pid}, 9)",
        "os.setuid(0)",
        "os.kill(os.getppid(), 9)",
    ):
        assert session.run(code + attempt).status == "blocked", attempt
    assert not world.damage("") - {"files"} and other.run("x").output == "5"
    status = "[l.split()[1] for l in bi.open('/proc/self/status') if l[:6] in ('CapEff', 'CapPrm')]"
    assert session.run(code + status).output == str(["0" * 16] * 2)
    world.reset()


def test_nothing_is_shared_between_sessions(boxes):
    """No writable shared mapping, no executable writable one, no other descriptor."""
    session = boxes("all").session()
    session.run("1")
    pid = session.process.pid
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
    if ROOT:  # the session is not dumpable: others may not look
        maps = [line.split()[1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        assert maps and not [m for m in maps if m[1] == "w" and (m[2] == "x" or m[3] == "s")]
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2", "3"]
        assert "Threads:\t1" in Path(f"/proc/{pid}/status").read_text()


# ---- Faults
def traces(name):
    """[[(code, status, output, whether it is a part only), ...], ...] of a file."""
    found = []
    for trace in read(name).split("\n====\n")[1:]:
        steps = []
        for step in trace.strip("\n").split("\n++++\n"):
            code, status, part, output = re.fullmatch(
                r"(.*?)\n---- (\w+)( ~)?\n?(.*)", step, re.DOTALL
            ).groups()
            steps.append((code, status, output, bool(part)))
        found.append(steps)
    return found


FAULTS = [trace[0] for trace in traces("faults")]
FAULTS += [  # that a text file cannot hold
    (code, "error", output, True)
    for code, output in {
        "print('a'\n": "SyntaxError: '(' was never closed (line 1: print('a')",
        "(" * 300 + ")" * 300: "too many nested parentheses",
        "-" * 40000 + "1": "nested too deeply",
        "x\x00": "null bytes",
        "'\ud800'": "UnicodeEncodeError",
    }.items()
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: repr(fault[0][:40]))
def test_fault(box, fault):
    """The right status and text; and the trace goes on with the variables of earlier snippets."""
    session, (code, status, output, _) = box.session(), fault
    session.run("kept = 42")
    result = session.run(code, seconds=0.5 if status == "timeout" else 60)
    assert result.status == status and output in result.output, result
    assert len(result.output) < 10_000
    if "random._os" not in code and status != "ok":
        assert session.run("kept").output == "42"


def test_output_keeps_head_and_tail_and_no_escape_sequences(session):
    code = "print('HEAD')\nfor i in range(5000): print(i, 'x' * 20)\nprint('TAIL')"
    output = session.run(code).output
    assert output.startswith("HEAD\n0 x") and output.endswith("\nTAIL") and len(output) < 10_000
    assert "bytes left out" in output
    output = session.run(r"print('\x1b]52;c;cm0=\x07\x1b[2J\r\x9b1m\x7f\ttab é')").output
    assert output == r"\x1b]52;c;cm0=\x07\x1b[2J\r\x9b1m\x7f" + "\ttab é"


def test_a_flood_costs_the_caller_nothing(session):
    before = time.process_time()
    assert session.run("while True: print(1, flush=True)", seconds=60).status == "output"
    assert time.process_time() - before < 2


def test_the_environment_is_not_inherited(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    with Sandbox(1) as box:
        code = "import sys\nsys.modules['os'].environ, 'SECRET' in str(sys.modules['os'].environb)"
        assert box.session().run(code).output == "(environ({}), False)"
        zygote = Path(f"/proc/{box.zygote.pid}/environ").read_bytes()
        assert b"SECRET" not in zygote and b"PYTHONHASHSEED" in zygote


# ---- The protocol
def test_a_session_cannot_forge_replies_of_another(box):
    """Whatever it writes on its own socket ends it alone."""
    one, two = box.session(), box.session()
    two.run("x = 2")
    one.run("x = 1")
    pid = two.process.pid
    for forged in ("b'ready'", "b'{}'", "b'1234'", "b'\\xff' * 99", "b'ok '"):
        neighbour = two.submit("x")
        write = f"try: random._os.write(fd, {forged})\n    except OSError: pass"
        result = one.run(f"import random\nfor fd in range(3, 50):\n    {write}")
        assert result.status in ("crashed", "memory")
        assert neighbour.result().output == "2"
    assert one.run("x").output == "1" and two.process.pid == pid


def test_a_forged_reply_hurts_only_its_own_trace(box):
    """The snippet replies by itself and would run on: it is stopped dead."""
    session, other = box.session(), box.session()
    code = "import random\nrandom._os.write(3, b'ok')\nwhile True: pass"
    assert session.run(code).status == "ok"

    def used():
        stat = Path(f"/proc/{session.process.pid}/stat").read_text().rsplit(")", 1)[1]
        return sum(map(int, stat.split()[11:13]))

    time.sleep(0.1)
    before = used()
    time.sleep(0.5)
    assert used() == before
    assert other.run("1 + 1").output == "2" and session.run("2", seconds=1).status == "timeout"


ANSWERS_TO_CONT = """
import sys
os, signal = sys.modules["os"], sys.modules["signal"]
signal.signal(signal.SIGCONT, lambda *_: [os.write(3, b"ok") for _ in range(50)])
"""
NEVER_READS = """
import sys, time
while True:
    sys.modules["os"].write(3, b"ok")
    time.sleep(0.05)
"""


@pytest.mark.parametrize("code", [ANSWERS_TO_CONT, NEVER_READS])
def test_replies_that_nobody_asked_for_hold_up_nobody(box, code):
    session = box.session()
    session.run(code, seconds=2)
    for _ in range(6):
        session.submit("#" * 49_000, 2).result(timeout=60)
    assert box.session().run("1 + 1").output == "2"


# ---- The pool, and how it recovers
@pytest.mark.parametrize("limit", ["room", "memory"])
def test_idle_sessions_are_dropped_and_rebuilt(boxes, monkeypatch, limit):
    """Too many of them, or too much memory in all of them together: the longest idle go."""
    box = boxes("kernel")
    monkeypatch.setattr(box, limit, 4 if limit == "room" else 200 << 20)
    sessions = [box.session() for _ in range(10)]
    for turn in range(3):
        futures = []
        for i, session in enumerate(sessions):
            start = f"x = {i}; y = bytearray(b'1') * (60 << 20)"
            futures.append(session.submit("x += 1\nx" if turn else start))
        outputs = [future.result().output for future in futures]
        assert len(box.idle) <= 4
        assert not turn or outputs == [str(i + turn) for i in range(10)]


def test_a_dead_zygote_is_replaced_again_and_again(boxes):
    """Three deaths in a row; what ran meanwhile ends as crashed, and variables come back."""
    box = boxes("uid")
    session, other = box.session(), box.session()
    assert session.run("x = 5\nx").output == "5"
    running = other.submit("while True: pass", 60)
    time.sleep(0.5)
    for _ in range(3):
        box.zygote.kill()
        result = running.result()
        assert result.status == "crashed" and "ran out of memory" in result.output
        assert box.session().run("1").output == "1"
    assert session.run("x + 1").output == "6" and other.run("1").output == "1"


def test_a_dropped_process_takes_no_other_with_it(session):
    session.run("x = 1")
    process, _ = session.box.idle.popitem()  # as a thread does that makes room
    running = session.submit("import time\ntime.sleep(1)\nx", 9)
    time.sleep(0.5)
    process.kill()
    assert running.result().output == "1"


def test_a_replay_that_fails_keeps_what_was_before_it(session):
    session.run("x = 1")
    session.run("y = 2")
    _, result = session.history[1]  # a snippet that was quick then and hangs now
    session.history[1] = ("while True: pass", result)
    session.run("while True: pass", seconds=0.3)
    result = session.run("x")
    assert result.output == "(of the earlier snippets only the first 1 could be repeated)\n1"


def test_a_replay_gets_the_time_that_it_took(session):
    """Its snippets are slower than the one after them may be."""
    for _ in range(3):
        session.run("import time\ntime.sleep(0.4)\nx = 1")
    session.run("while True: pass", seconds=0.3)
    assert session.run("x", seconds=0.5).output == "1"


def script(code, **options):
    """Run Python that starts with a box of one worker; it must end by itself."""
    head = f"import sys; sys.path.insert(0, {os.path.dirname(sandbox.__file__)!r})\n"
    head += "import os, resource, signal, threading, time, sandbox\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


RECOVERIES = {  # first, what the script must print
    "the caller's descriptors run out": """
        # True True
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with sandbox.Sandbox(2) as box:
            sessions = [box.session() for _ in range(40)]
            first = [s.run(f"x = {i}; x").output == str(i) for i, s in enumerate(sessions)]
            spare = [os.dup(1) for _ in range(len(os.listdir("/proc/self/fd")), 60)]
            print(all(first), all(s.run("x").output == str(i) for i, s in enumerate(sessions)))
        """,
    "processes run out": """
        # Resource temporarily unavailable: 1 2
        with sandbox.Sandbox(1) as box:
            one, two = box.session(), box.session()
            one.run("x = 1")
            before = resource.prlimit(box.zygote.pid, resource.RLIMIT_NPROC)
            resource.prlimit(box.zygote.pid, resource.RLIMIT_NPROC, (1, before[1]))
            print(two.run("1").output.split("] ")[-1], end=": ")
            resource.prlimit(box.zygote.pid, resource.RLIMIT_NPROC, before)
            print(one.run("x").output, two.run("2").output)
        """,
    "a session is closed while it runs": """
        # crashed the session is closed
        with sandbox.Sandbox(1) as box:
            session = box.session()
            threading.Timer(5, session.close).start()
            print(session.run("while True: pass", 1000).status, session.run("1").output[-21:])
        """,
    "the box is closed while snippets run": """
        # crashed, the sandbox is closed, the sandbox is closed
        box = sandbox.Sandbox(1)
        sessions = [box.session() for _ in range(3)]
        futures = [session.submit("while True: pass", 1000) for session in sessions]
        while not sessions[0].process: time.sleep(0.01)
        box.close()
        ends = [future.exception() or future.result().status for future in futures]
        print(*ends, sep=", ")
        """,
    "the box is closed at once": """
        #
        for _ in range(5): sandbox.Sandbox(3).close()
        """,
    "a forked child uses the box": """
        # refused 1
        with sandbox.Sandbox(1) as box:
            session = box.session()
            session.run("x = 1")
            if os.fork() == 0:
                try: session.run("x")
                except sandbox.SandboxError as error: os.write(1, b"refused ")
                os._exit(0)
            os.wait()
            print(session.run("x").output)
        """,
    "Ctrl-C while a snippet runs": """
        # interrupted 1
        with sandbox.Sandbox(1) as box:
            box.wait_ready()
            threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()
            try: box.session().run("while True: pass", 1000)
            except KeyboardInterrupt: print("interrupted", box.session().run("1").output)
        """,
    "one core, and a caller that ignores SIGCHLD": """
        # 1 timeout 1
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        with sandbox.Sandbox() as box:
            session = box.session()
            session.run("x = 1")
            status = session.run("while True: pass", 0.3).status
            print(box.workers, status, session.run("x").output)
        """,
}


@pytest.mark.parametrize("name", RECOVERIES)
def test_recovery(name):
    if name == "processes run out" and ROOT:
        pytest.skip("root's processes are not counted")
    said = RECOVERIES[name].split("\n")[1].strip(" #")
    assert script(RECOVERIES[name]).strip() == said


def family(pid):
    """The zygotes of a process and their sessions."""
    children = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, parent = entry.read_text().rsplit(")", 1)[1].split()[:2]
            children.setdefault(int(parent), set()).add(int(entry.parent.name))
    zygotes = children.get(pid, set())
    return zygotes.union(*(children.get(zygote, set()) for zygote in zygotes))


def gone(pids):
    def alive(pid):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty: a zombie
        return False

    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


CALLER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from sandbox import Sandbox
box = Sandbox(workers=3)
sessions = [box.session() for i in range(3)]
for session in sessions: session.run("x = 1")
for session in sessions[1:]: session.submit("while True: pass", 5)
if not os.fork(): os.fork() or (os.setsid(), os.close(1), os.close(2), time.sleep(30)); os._exit(0)
os.wait(); time.sleep(0.2)  # that fork of the caller's lives on, and holds its sockets
print("up", flush=True); time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "end without close"])
def test_a_dead_caller_leaves_nothing(how):
    seconds = "1" if how[0] == "e" else "100"
    command = [sys.executable, "-c", CALLER, os.path.dirname(sandbox.__file__), seconds]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    caller = subprocess.Popen(command, process_group=0, **pipes)
    assert caller.stdout.readline() == "up\n"
    processes = family(caller.pid)
    assert len(processes) == 4
    if how[0] == "S":
        os.killpg(caller.pid, getattr(signal, how))  # Ctrl-C goes to the whole group
    errors = caller.communicate(timeout=20)[1]
    assert gone(processes) and errors.count("Traceback") == (how == "SIGINT")


def test_close_leaves_nothing(boxes):
    before, others = sorted(os.listdir("/proc/self/fd")), family(os.getpid())
    box = Sandbox(workers=2)
    sessions = [box.session() for _ in range(5)]
    for session in sessions:
        session.run("x = 1")
    sessions[0].submit("while True: pass")
    processes = family(os.getpid()) - others
    box.close()
    assert processes and gone(processes)
    assert sorted(os.listdir("/proc/self/fd")) == before


# ---- The command
def test_import_is_light():
    code = "print({'numpy', 'sympy', 'scipy', 'tyro'} & {*sys.modules})"
    assert script(code) == "set()\n"


@pytest.mark.skipif(not X86, reason="a 32-bit personality")
def test_no_seccomp_refuses_unless_told():
    """In truth, on a host that calls itself i686: no table for it."""
    import ctypes

    remedy = "no system call table for i686); to go on at your own risk: --sandbox limits-only"
    for args, status, text in (
        (["6 * 7"], 2, remedy),
        (["--sandbox", "limits-only", "6 * 7"], 0, "without seccomp"),
    ):
        done = command(*args, preexec_fn=lambda: ctypes.CDLL(None).personality(8))
        assert done.returncode == status and text in done.stderr, done
        assert done.stderr.count("\n") == 1 and (status or done.stdout == "42\n")
    early = """
        with sandbox.Sandbox(2) as box:  # a snippet that comes before the judgement
            print(repr(box.session().submit('6 * 7').exception()))
        """
    said = script(early, preexec_fn=lambda: ctypes.CDLL(None).personality(8))
    assert "SandboxError('no safe sandbox on this host" in said


def command(*args, python=sys.executable, **options):
    words = [python, sandbox.__file__, *args]
    return subprocess.run(words, capture_output=True, text=True, **options)


def test_command():
    # With PATH=.venv/bin sys.executable is relative, and the zygote starts in /.
    path = os.path.relpath(sys.prefix) + "/bin:/usr/bin:/bin"
    done = command("print(2**100)", python="python", env=os.environ | {"PATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{2**100}\n", "")
    done = command("-", input="x = 1\nx / 0")
    assert done.returncode == 1 and "division by zero (line 2: x / 0)\n" in done.stdout
    done = command("--check")
    assert done.returncode == 0 and all(name in done.stdout for name in KERNEL)
    for args in ("", "--nope", "1 --sandbox none", "1 2"):
        done = command(*args.split())
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == "", args


# ---- Determinism and ordinary snippets
REPEATED = [
    "import random, numpy as np, sympy\nrandom.random(), np.random.default_rng().integers(10**9)",
    "[random.randint(1, 6) for i in range(10)], hash('a'), list({'a', 'b', 'c', 'd'})",
    "sympy.randprime(10**6, 10**9), random.sample(range(99), 5)",
    "random.random()",
    "np.random.default_rng(5).random(), np.random.normal(size=3)",
    "import scipy.stats as st\nst.norm.rvs(size=2)",
]


def test_same_trace_same_outputs(box):
    runs = []
    for kill in (False, True):
        session, outputs = box.session(), []
        for code in REPEATED:
            if kill and session.process:
                os.kill(session.process.pid, signal.SIGKILL)
                while session.process.is_idle():
                    time.sleep(0.01)
            outputs.append(session.run(code).output)
        runs.append(outputs)
        session.close()
    assert runs[0] == runs[1] and len(set(runs[0])) == len(REPEATED)
    assert not any("Error" in output for output in runs[0])


ORDINARY = traces("snippets")
for code, output in {  # that a text file cannot hold
    "": NOTHING,
    "```\n2 + 2\n```\n": "4",
    "for i in range(3): print(i, end=' ')": "0 1 2 ",
    "    x = 6\n    print(x)\n": "6",
    "\ufeffprint(7)": "7",
    "x\xa0=\xa07\nx": "7",
    "x = 7\u200b\nx": "7",
}.items():
    ORDINARY.append([(code, "ok", output, False)])


@pytest.mark.parametrize("trace", ORDINARY, ids=lambda trace: repr(trace[0][0][:40]))
def test_ordinary(session, trace):
    for code, status, output, part in trace:
        result = session.run(code)
        assert result.status == status and output in result.output, result
        assert part or result.output == output


def test_an_error_shows_no_path_of_this_machine(session):
    for code in ("from math import nope", "import sympy\nsympy.nope()", "import scipy.nope"):
        assert "/" not in session.run(code).output
