"""The sandbox: attacks judged by their effects, faults, the filter, the pool, ordinary snippets.

Every attack runs in a session with no layer at all, where it must do its damage (else it proves
nothing; those that would hurt the machine are spared), with all layers, with the kernel's alone,
with seccomp alone, and, where marked, with Landlock alone. Damage is what `World.damage` sees from
outside, or `ESCAPED` printed by an attack whose gain is only visible inside.
"""

import itertools
import os
import random
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
from sandbox import Sandbox, SandboxError

ROOT = os.geteuid() == 0
X86 = os.uname().machine == "x86_64"
KERNEL = ("rlimits", "uid", "landlock", "seccomp")
CONFIGS = {"none": (), "all": sandbox.LAYERS, "kernel": KERNEL} | {name: (name,) for name in KERNEL}
NOTHING = "(nothing was printed: use print())"


class World:
    """What an attack may not touch: files, environment, listeners, another process."""

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
        self.tree = self.look()
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("unix", socket.AF_UNIX, socket.SOCK_STREAM, self.dir + ".unix"),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, "\0" + self.dir),
        ):
            self.listeners[name] = server = socket.socket(family, kind)
            server.bind(address)
            if kind == socket.SOCK_STREAM:
                server.listen()
            server.setblocking(False)
        os.chmod(self.dir + ".unix", 0o777)
        self.sibling = subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); import time; time.sleep(1000)"],
            stdout=subprocess.PIPE,
            env={**os.environ, "KEY": self.token},
            process_group=0,
        )
        self.sibling.stdout.readline()
        self.state = self.sibling_state()

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
        if self.sibling.poll() is not None or stat == "Z":
            return "dead"
        limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        nice = os.getpriority(os.PRIO_PROCESS, pid)
        return stat in "tT", nice, os.sched_getaffinity(pid), limit

    def damage(self, output):
        """The set of effects an attack had; mends them."""
        found = set()
        if self.look() != self.tree:
            found.add("files")
        for name, server in self.listeners.items():
            try:
                stream = server.type == socket.SOCK_STREAM
                server.accept()[0].close() if stream else server.recv(100)
                found.add(name)
            except BlockingIOError:
                pass
        time.sleep(0.005)  # a signal on its way, a tracer on its way out
        try:
            same = self.sibling_state() == self.state
        except OSError:
            same = False
        if not same:
            found.add("sibling")
        if self.token in output or "54321" in output:
            found.add("secret")
        if "ESCAPED" in output:
            found.add("inside")
        if found - {"secret", "inside"}:
            self.reset()
        return found

    def names(self):
        """Assignments that tell an attack its targets."""
        targets = {
            name.upper(): self.path(name) for name in ("canary", "secret", "victim", "empty")
        }
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
LIVE, SPARE, LAND = "live", "spare", "landlock"  # spare: not shown live, it would hurt the machine
BOTH = LIVE + LAND
ATTACKS = {  # name: (where it is shown to work, code)
    # files: write
    "open": (BOTH, "bi.open(CANARY, 'w').write('x')"),
    "os.open": (BOTH, "os.open(CANARY, os.O_CREAT | os.O_WRONLY)"),
    "creat": (BOTH, "call(85, text(CANARY.encode()), 0o644)"),
    "openat2": (SPARE, "import struct\ncall(437, -100, text(CANARY.encode()), "
        "text(struct.pack('QQQ', 0o101, 0o644, 0)), 24)"),
    "FileIO": (BOTH, "io.FileIO(CANARY, 'w')"),
    "append": (BOTH, "bi.open(VICTIM, 'a').write('x')"),
    "pathlib": (BOTH, "pathlib.Path(CANARY).write_text('x')"),
    "touch": (BOTH, "pathlib.Path(CANARY).touch()"),
    "np.save": (BOTH, "np.save(CANARY, np.ones(3))"),
    "np.savez": (BOTH, "np.savez(CANARY, np.ones(3))"),
    "np.savetxt": (BOTH, "np.savetxt(CANARY, np.ones(3))"),
    "tofile": (BOTH, "np.ones(3).tofile(CANARY)"),
    "dump": (BOTH, "np.ones(3).dump(CANARY)"),
    "memmap-w": (BOTH, "np.memmap(CANARY, mode='w+', shape=10)"),
    "memmap-victim": (BOTH, "m = np.memmap(VICTIM, mode='r+', shape=3); m[:] = 65; m.flush()"),
    "copy": (BOTH, "shutil.copy(SECRET, CANARY)"),
    "mkdir": (BOTH, "os.mkdir(CANARY)"),
    "mkfifo": (BOTH, "os.mkfifo(CANARY)"),
    "mknod": (BOTH, "os.mknod(CANARY)"),
    "symlink": (BOTH, "os.symlink(SECRET, CANARY)"),
    "link": (BOTH, "os.link(VICTIM, CANARY)"),
    "rename": (BOTH, "os.rename(VICTIM, CANARY)"),
    "renameat2": (BOTH, "call(316, -100, text(VICTIM.encode()), -100, text(CANARY.encode()), 0)"),
    "unlink": (BOTH, "os.unlink(VICTIM)"),
    "rmdir": (BOTH, "os.rmdir(EMPTY)"),
    "rmtree": (BOTH, "shutil.rmtree(EMPTY)"),
    "truncate": (BOTH, "os.truncate(VICTIM, 0)"),
    "chmod": (LIVE, "os.chmod(VICTIM, 0o600)"),
    "utime": (LIVE, "os.utime(VICTIM, (1, 1))"),
    "chown": (LIVE, "os.chown(VICTIM, 12345, 12345)"),
    "setxattr": (SPARE, "os.setxattr(VICTIM, 'user.x', b'x')"),
    "mkstemp": (BOTH, "tempfile.mkstemp(dir=DIR)"),
    "tmpfile": (BOTH, "gain(os.open(DIR, os.O_TMPFILE | os.O_RDWR))"),
    "unix-bind": (BOTH, "socket.socket(socket.AF_UNIX).bind(CANARY)"),
    "log-file": (BOTH, "imp('logging').FileHandler(CANARY)"),
    "lambdify": (BOTH, "sp.lambdify([], \"__import__('os').mkdir(%r)\" % CANARY)()"),
    "sympify": (BOTH, "sp.sympify(\"__import__('os').mkdir(%r)\" % CANARY)"),
    "parse_expr": (BOTH, "from sympy.parsing.sympy_parser import parse_expr\n"
        "parse_expr(\"__import__('os').mkdir(%r)\" % CANARY)"),
    "preview": (SPARE, "sp.preview(sp.Symbol('x'), viewer='file', filename=CANARY)"),
    "plot": (SPARE, "sp.plot(sp.Symbol('x'), show=False).save(CANARY)"),
    "autowrap": (SPARE, "from sympy.utilities.autowrap import autowrap\n"
        "autowrap(sp.Symbol('x'), tempdir=DIR)"),
    "f2py": (SPARE, "imp('numpy.f2py')"),
    "chdir": (LIVE, "gain(os.chdir(DIR))"),
    "chroot": (LIVE, "gain(os.chroot(DIR))"),
    "umask": (LIVE, "gain(os.umask(0))"),
    "bytecode": (BOTH, "sys.dont_write_bytecode = False; sys.path.insert(0, DIR); imp('evil')"),
    # files: read, and their metadata
    "read": (BOTH, "print(bi.open(SECRET).read(99))"),
    "os.read": (BOTH, "print(os.read(os.open(SECRET, 0), 99))"),
    "open_code": (BOTH, "print(io.open_code(SECRET).read(99))"),
    "fromfile": (BOTH, "print(bytes(np.fromfile(SECRET, dtype='u1', count=99)))"),
    "loadtxt": (BOTH, "print(np.loadtxt(SECRET, dtype=str, max_rows=1))"),
    "genfromtxt": (BOTH, "print(np.genfromtxt(SECRET, dtype=str, max_rows=1))"),
    "memmap-r": (BOTH, "print(bytes(np.memmap(SECRET, mode='r')[:99]))"),
    "linecache": (BOTH, "print(linecache.getline(SECRET, 1))"),
    "get_data": (BOTH, "print(importlib.machinery.SourceFileLoader('x', "
        "SECRET).get_data(SECRET)[:99])"),
    "import": (BOTH, "sys.path.insert(0, DIR); imp('evil')"),
    "run_path": (BOTH, "imp('runpy').run_path(DIR + '/evil.py')"),
    "tokenize": (BOTH, "print(imp('tokenize').open(SECRET).read(99))"),
    "listdir": (BOTH, "print(WON if os.listdir(DIR) else '')"),
    "scandir": (BOTH, "print([e.name for e in os.scandir('/proc/self/fd')] and WON)"),
    "stat": (LIVE, "print(os.stat(SECRET).st_size)"),
    "statx": (LIVE, "b = ctypes.create_string_buffer(256); gain(call(332, -100, "
        "text(SECRET.encode()), 0, 4095, b))"),
    "access": (LIVE, "print(WON if os.access(SECRET, 0) else '')"),
    "readlink": (LIVE, "print(os.readlink(DIR + '/link'))"),
    "statvfs": (LIVE, "gain(os.statvfs('/').f_bsize)"),
    "getxattr": (LIVE, "print(WON, os.listxattr(SECRET))"),
    "proc-cmdline": (BOTH, "print(WON, bi.open('/proc/%d/cmdline' % CALLER).read())"),
    "proc-mem": (SPARE + LAND, "print(WON, bi.open('/proc/self/mem', 'rb'))"),
    "proc-maps": (BOTH, "print(WON, bi.open('/proc/self/status').read())"),
    "sibling-environ": (BOTH, "print(bi.open('/proc/%d/environ' % SIBLING).read())"),
    "dlopen": (SPARE, "ctypes.CDLL('libcrypt.so.1'); print(WON)"),
    "pwd": (BOTH, "print(WON, imp('pwd').getpwuid(0).pw_dir)"),
    "inotify": (LIVE, "gain(call(253))"),
    "fanotify": (LIVE, "gain(call(300, 0, 0))"),
    "name_to_handle": (SPARE, "gain(call(304, -100, text(DIR.encode()), 0, 0, 0))"),
    # network
    "tcp": (BOTH, "socket.create_connection(('127.0.0.1', TCP), 2)"),
    "urlopen": (BOTH, "imp('urllib.request').request.urlopen('http://127.0.0.1:%d' % TCP, "
        "timeout=0.2)"),
    "http": (BOTH, "imp('http.client').client.HTTPConnection('127.0.0.1', TCP, "
        "timeout=1).connect()"),
    "udp": (LIVE, "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', "
        "UDP))"),
    "unix": (LIVE, "socket.socket(socket.AF_UNIX).connect(UNIX)"),
    "abstract": (BOTH, "socket.socket(socket.AF_UNIX).connect(ABSTRACT)"),
    "fastopen": (SPARE, "socket.socket().sendto(b'x', 0x20000000, ('127.0.0.1', TCP))"),
    "listen": (BOTH, "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(WON)"),
    "getaddrinfo": (LIVE, "socket.getaddrinfo('localhost', 80); print(WON)"),
    "raw": (LIVE, "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); print(WON)"),
    "netlink": (LIVE, "socket.socket(16, socket.SOCK_RAW, 0); print(WON)"),
    "ipv6": (SPARE, "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); print(WON)"),
    "alg": (SPARE, "socket.socket(38, 5, 0); print(WON)"),
    "vsock": (SPARE, "socket.socket(40, 1, 0); print(WON)"),
    "socketpair": (LIVE, "socket.socketpair(); print(WON)"),
    # processes and threads
    "system": (BOTH, "os.system('touch ' + CANARY)"),
    "popen": (BOTH, "os.popen('touch ' + CANARY).read()"),
    "subprocess": (BOTH, "subprocess.run(['touch', CANARY])"),
    "posix_spawn": (BOTH, "os.waitpid(os.posix_spawn('/bin/sh', ['sh', '-c', 'touch ' + CANARY], "
        "{}), 0)"),
    "exec": (BOTH, "os.execv('/bin/sh', ['sh', '-c', 'touch ' + CANARY])"),
    "execveat": (BOTH, "a = (ctypes.c_char_p * 4)(b'sh', b'-c', b'touch ' + CANARY.encode(), "
        "None)\ncall(322, -100, text(b'/bin/sh'), a, 0, 0)"),
    "fork": (BOTH, "pid = os.fork()\nif not pid: os.open(CANARY, os.O_CREAT); os._exit(0)\n"
        "os.waitpid(pid, 0)"),
    "forkpty": (BOTH, "pid, fd = os.forkpty()\nif not pid: os.open(CANARY, os.O_CREAT); "
        "os._exit(0)\nos.waitpid(pid, 0)"),
    "clone": (LIVE, "r = call(56, 17, 0, 0, 0, 0)\nif r == 0: os._exit(0)\ngain(r)"),
    "clone3": (LIVE, "a = (ctypes.c_uint64 * 11)(); a[4] = 17\nr = call(435, a, 88)\n"
        "if r == 0: os._exit(0)\ngain(r)"),
    "thread": (LIVE, "t = threading.Thread(target=print, args=(WON,)); t.start(); t.join()"),
    "memfd": (LIVE, "gain(os.memfd_create('x'))"),
    # signals, and other processes by other means
    "kill": (BOTH, "os.kill(SIBLING, 9)"),
    "killpg": (BOTH, "os.killpg(SIBLING, 9)"),
    "stop": (BOTH, "os.kill(SIBLING, 19)"),
    "kill-0": (BOTH, "gain(os.kill(CALLER, 0))"),
    "kill-parent": (SPARE + LAND, "os.kill(os.getppid(), 9); print(WON)"),
    "tgkill": (BOTH, "call(234, SIBLING, SIBLING, 9)"),
    "tkill": (BOTH, "call(200, SIBLING, 9)"),
    "sigqueue": (BOTH, "b = (ctypes.c_int * 32)(9, 0, -1); call(129, SIBLING, 9, b)"),
    "pidfd": (BOTH, "signal.pidfd_send_signal(os.pidfd_open(SIBLING), 9)"),
    "setpriority": (LIVE, "os.setpriority(0, SIBLING, 19)"),
    "affinity": (LIVE, "os.sched_setaffinity(SIBLING, [0])"),
    "prlimit": (LIVE, "b = (ctypes.c_uint64 * 2)(7, 7); call(302, SIBLING, 7, b, 0)"),
    "prlimit-read": (LIVE, "b = (ctypes.c_uint64 * 2)(); gain(call(302, SIBLING, 7, 0, b))"),
    "ptrace": (BOTH, "gain(call(101, 16, SIBLING, 0, 0))"),
    "vm_readv": (BOTH, "b = ctypes.create_string_buffer(8); v = (ctypes.c_uint64 * "
        "2)(ctypes.addressof(b), 8); w = (ctypes.c_uint64 * 2)(id(None) & ~4095, 8)\n"
        "r = call(310, SIBLING, v, 1, w, 1, 0); gain(0 if r >= 0 or ctypes.get_errno() == 14 "
        "else -1)"),
    "vm_writev": (BOTH, "b = ctypes.create_string_buffer(8); v = (ctypes.c_uint64 * "
        "2)(ctypes.addressof(b), 8); w = (ctypes.c_uint64 * 2)(4096, 8)\n"
        "r = call(311, SIBLING, v, 1, w, 1, 0); gain(0 if r >= 0 or ctypes.get_errno() == 14 "
        "else -1)"),
    "pidfd_getfd": (BOTH, "gain(call(438, os.pidfd_open(SIBLING), 0, 0))"),
    "setown": (LIVE, "gain(imp('fcntl').fcntl(0, 8, SIBLING))"),
    "kcmp": (SPARE, "gain(call(312, os.getpid(), os.getppid(), 0, 0, 0))"),
    "setsid": (LIVE, "gain(os.setpgid(0, 0))"),
    # the kernel
    "unshare": (SPARE, "gain(call(272, 0x10000000))"),
    "mount": (SPARE, "gain(call(165, text(b'none'), text(EMPTY.encode()), text(b'tmpfs'), 0, 0))"),
    "bpf": (SPARE, "gain(call(321, 0, text(bytes(64)), 64))"),
    "perf": (SPARE, "gain(call(298, text(bytes(128)), 0, -1, -1, 0))"),
    "io_uring": (SPARE, "b = ctypes.create_string_buffer(248); gain(call(425, 1, b))"),
    "keyring": (SPARE, "gain(call(248, text(b'user'), text(b'k'), text(b'v'), 1, -2))"),
    "userfaultfd": (SPARE, "gain(call(323, 0))"),
    "shm": (SPARE, "gain(call(29, 0, 4096, 0o1600))"),
    "mq": (SPARE, "gain(call(240, text(b'q'), 0o102, 0o600, 0))"),
    "setuid": (LIVE, "os.setuid(0); print(WON)"),
    "dumpable": (LIVE, "gain(call(157, 4, 1, 0, 0, 0))"),
    "pdeathsig": (LIVE, "gain(call(157, 1, 0, 0, 0, 0))"),
    "raise-limit": (LIVE, "b = (ctypes.c_uint64 * 2)(99, 99); gain(libc.setrlimit(7, b))"),
    "mmap-exec": (LIVE, "libc.mmap.restype = ctypes.c_void_p\n"
        "r = libc.mmap(0, 4096, 7, 0x22, -1, 0); gain(0 if r != 2**64 - 1 else -1)"),
    "mprotect-exec": (LIVE, "b = ctypes.create_string_buffer(16384); "
        "gain(libc.mprotect(ctypes.c_void_p((ctypes.addressof(b) + 4095) & ~4095), 4096, 7))"),
    "mlock": (LIVE, "b = ctypes.create_string_buffer(4096); gain(libc.mlock(b, 4096))"),
    "clock": (LIVE, "b = ctypes.create_string_buffer(16); gain(call(228, (~SIBLING << 3) | 2, b))"),
    "clock-res": (LIVE, "b = ctypes.create_string_buffer(16); gain(call(229, (~SIBLING << 3) | "
        "2, b))"),
    "mmap-shared": (LIVE, "libc.mmap.restype = ctypes.c_void_p\n"
        "r = libc.mmap(0, 4096, 3, 0x21, -1, 0); gain(0 if r != 2**64 - 1 else -1)"),
    "mmap-validate": (SPARE, "libc.mmap.restype = ctypes.c_void_p\n"
        "r = libc.mmap(0, 4096, 3, 0x23, -1, 0); gain(0 if r != 2**64 - 1 else -1)"),
    "mmap-huge": (SPARE, "libc.mmap.restype = ctypes.c_void_p\n"
        "r = libc.mmap(0, 1 << 21, 3, 0x40022, -1, 0); gain(0 if r != 2**64 - 1 else -1)"),
    "futex-shared": (LIVE, "b = ctypes.create_string_buffer(64); gain(call(202, b, 1, 1, 0, 0, "
        "0))"),
    "futex-pi": (LIVE, "b = (ctypes.c_int * 16)(); gain(call(202, b, 128 + 6, 0, 0, 0, 0))"),
    "timer": (LIVE, "signal.setitimer(0, 100); print(WON)"),
    "reboot": (SPARE, "gain(call(169, 0, 0, 0, 0))"),
    "sethostname": (SPARE, "gain(call(170, text(b'x'), 1))"),
    "settimeofday": (SPARE, "gain(call(164, 0, 0))"),
    "kexec": (SPARE, "gain(call(246, 0, 0, 0, 0))"),
    "seccomp": (SPARE, "gain(call(317, 2, 0, text(bytes(4))))"),
    "x32": (SPARE, "r = call(0x40000000 + 39); print(WON if r > 0 else '')"),
    "pass-fd": (SPARE, "s = socket.socket(fileno=3); socket.send_fds(s, [b'x'], [0]); print(WON)"),
    "dup": (LIVE, "gain(os.dup(1))"),
    "descriptors": (SPARE, "found = []\nfor fd in range(4, 256):\n"
        "  try: os.read(fd, 1); found.append(fd)\n  except BlockingIOError: found.append(fd)\n"
        "  except OSError as e:\n    if e.errno != 9: found.append(fd)\n"
        "if found: print(WON, found)"),
}  # fmt: skip
if not X86:
    ATTACKS = {name: attack for name, attack in ATTACKS.items() if "call(" not in attack[1]}


@pytest.fixture(scope="module")
def boxes():
    """A pool for each set of layers, made when first asked for."""
    made = {}

    def get(config):
        if config not in made:
            made[config] = Sandbox(workers=2, layers=CONFIGS[config])
            made[config].wait_ready(120)
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
    session = box.session()
    yield session
    session.close()


def cases(config):
    mark = {"none": LIVE, "landlock": LAND}.get(config, "")
    return [(config, name) for name in ATTACKS if mark in ATTACKS[name][0]]


@pytest.mark.parametrize(
    "config,name",
    [case for c in ("none", "all", "kernel", "seccomp", "landlock") for case in cases(c)],
)
def test_attack(boxes, world, config, name):
    box = boxes(config)
    if config == "landlock" and not box.report["landlock"].startswith("on"):
        pytest.skip("no Landlock here")
    session = box.session()
    result = session.run(world.names() + PRELUDE + ATTACKS[name][1], timeout=10)
    session.close()  # a tracer must be gone before its victim can be buried
    damage = world.damage(result.output)
    if config == "none":
        for _ in range(20 if not damage else 0):  # on a busy machine a signal takes its time
            time.sleep(0.05)
            damage = damage or world.damage("")
        assert damage, f"not a live attack: {result}"
    else:
        assert not damage, (damage, result)
        assert "NameError" not in result.output and "SyntaxError" not in result.output, result


def test_the_attacks_get_as_far_as_the_kernel(boxes):
    """The prelude works with every layer on, so what stops an attack is not a missing name."""
    for config in ("all", "kernel", "seccomp"):
        session = boxes(config).session()
        code = PRELUDE + "print(os.getppid() > 1, libc.getppid() == os.getppid())"
        assert session.run(code).output == "True True"
        session.close()


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


MAPS = {
    "x86_64": (9, 10, 28, 202, 228, 229, 230, 302),
    "aarch64": (222, 226, 233, 98, 113, 114, 115, 261),
}
FREE = {  # allowed with any arguments; written down a second time, from the kernel's tables
    "x86_64": "0 1 3 11 12 13 14 15 19 20 24 25 35 39 60 96 98 100 102 104 107 108 110 131 186 201 "
    "219 231 318",
    "aarch64": "57 63 64 65 66 93 94 101 124 128 132 134 135 139 153 165 169 172 173 174 175 176 177 "
    "178 214 215 216 278",
}  # fmt: skip


def allowed(machine, number, args):
    """The policy in other words than the filter's tables."""
    mmap, mprotect, madvise, futex, gettime, getres, sleep, prlimit = MAPS[machine]
    low = [arg & 0xFFFFFFFF for arg in args]
    if number in (mmap, mprotect) and low[2] & 4:
        return False
    if number == mmap:
        return low[3] & 0xF == 2 and not low[3] & 0x40000
    if number == madvise:
        return low[2] in (4, 8, 14)
    if number == futex:
        return low[1] & 128 > 0 and (low[1] & ~384) in (0, 1, 9, 10)
    if number in (gettime, getres, sleep):
        return low[0] < 1 << 31
    if number == prlimit:
        return low[0] == 0 and args[2] == 0
    return number == mprotect or number in map(int, FREE[machine].split())


@pytest.mark.parametrize("machine", MAPS)
def test_the_filter_is_the_policy(machine):
    """Over all numbers, and where arguments matter over their edges and at random."""
    program, rng = sandbox.seccomp_filter(machine), random.Random(0)
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    words = [0, 1, 2, 3, 4, 7, 8, 14, 0x22, 0x40022, 1 << 31, 1 << 32, (1 << 64) - 1, (1 << 63) + 2]
    words += [operation + flag for operation in range(16) for flag in (0, 128, 256, 384)]
    for number in [*range(1024), *(0x40000000 + n for n in range(600)), 0xFFFFFFFF]:
        plain = [[0] * 6, *([rng.getrandbits(64) for _ in range(6)] for _ in range(3))]
        edges = itertools.product(words[:15], words, words[:14], words[:13])
        for args in edges if number in MAPS[machine] else plain:
            args = [*args, 0, 0][:6]
            data = struct.pack("iIQ6Q", number if number < 1 << 31 else -1, arch, 0, *args)
            verdict = run_bpf(program, data)
            expected = 0x7FFF0000 if allowed(machine, number, args) else 0x50001
            assert verdict == (0x50026 if number == 435 else expected), (number, args)
    for other in (0x40000003, 0xC00000B7 ^ 0xC000003E ^ arch, 0):
        assert run_bpf(program, struct.pack("iIQ6Q", 0, other, 0, *[0] * 6)) == 0x80000000
    assert sandbox.seccomp_filter("riscv64") == b""


@pytest.mark.skipif(not X86, reason="numbers of x86_64")
def test_every_other_system_call_is_refused(boxes):
    """In truth, also x32's. 335 and 336 (uretprobe, uprobe) pass every filter by design."""
    free = {*map(int, FREE["x86_64"].split()), *MAPS["x86_64"], 335, 336, 435}
    code = PRELUDE + textwrap.dedent(f"""
        for number in set(range(600)) - {free} | {{0x40000000 + n for n in range(600)}}:
            ctypes.set_errno(0)
            result = call(number, 0, 0, 0, 0, 0, 0)
            if result != -1 or ctypes.get_errno() != 1:
                print(number, result, ctypes.get_errno())
        """)
    session = boxes("seccomp").session()
    assert session.run(code).output == NOTHING
    session.close()


def test_rlimits_alone(boxes, world):
    """Files can be made but hold nothing; memory and descriptors are bounded; no user can fork."""
    session, code = boxes("rlimits").session(), world.names() + PRELUDE
    session.run(
        code + "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nbi.open(CANARY, 'w').write('x')"
    )
    assert not os.path.exists(world.path("canary")) or os.path.getsize(world.path("canary")) == 0
    world.reset()
    assert session.run("x = bytearray(3 << 30)").status == "memory"
    assert "Too many open files" in session.run(code + "[os.dup(1) for i in range(99)]").output
    if not ROOT:
        assert "Resource temporarily unavailable" in session.run(code + "os.fork()").output
    session.close()


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
        "os.setgid(0)",
        "os.kill(os.getppid(), 9)",
        "os.chown(SECRET, 1, 1)",
    ):
        assert session.run(code + attempt).status == "blocked", attempt
    assert not world.damage("") - {"files"} and other.run("x").output == "5"
    status = "[l.split()[1] for l in bi.open('/proc/self/status') if l[:6] in ('CapEff', 'CapPrm')]"
    assert session.run(code + status).output == str(["0" * 16] * 2)
    world.reset()
    session.close()
    other.close()


def test_nothing_is_shared_between_sessions(boxes):
    """No writable shared mapping, no executable writable one, no other descriptor."""
    session = boxes("all").session()
    session.run("1")
    pid = session.process.pid
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
    assert Path(f"/proc/{session.box.zygote.process.pid}/oom_score_adj").read_text() == "500\n"
    if ROOT:  # the session is not dumpable: others may not look
        maps = [line.split()[1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        assert maps and not [m for m in maps if m[1] == "w" and (m[2] == "x" or m[3] == "s")]
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2", "3"]
        assert os.getpgid(pid) == pid and "Threads:\t1" in Path(f"/proc/{pid}/status").read_text()
    session.close()


def test_environment_is_not_inherited(boxes):
    """The caller's environment does not reach a session, not even one without any layer."""
    for config in ("none", "all"):
        session = boxes(config).session()
        code = "print(dict(os.environ), sys.argv, libc.getenv(b'SANDBOX_TEST_KEY'))"
        output = session.run(PRELUDE + code).output
        assert "ENVTOKEN" not in output and output.endswith(" 0"), output
        session.close()


# ---- Faults and bombs

FAULTS = {  # code: (status, part of the output)
    "1/0": ("error", "ZeroDivisionError: division by zero (line 1: 1/0)"),
    "x = 1\n\nz = y + 1": ("error", "NameError: name 'y' is not defined (line 3: z = y + 1)"),
    "def f(x):\n    return x.nope\nf(1)":
        ("error", "AttributeError: 'int' object has no attribute 'nope' (line 2: return x.nope)"),
    "x = = 3": ("error", "SyntaxError: invalid syntax (line 1: x = = 3)"),
    "if 1:\nprint(2)": ("error", "IndentationError: expected an indented block"),
    "print('a'\n": ("error", "SyntaxError: '(' was never closed (line 1: print('a')"),
    "return 5": ("error", "SyntaxError: 'return' outside function (line 1: return 5)"),
    "print('before')\nraise ValueError('boom')":
        ("error", "before\nValueError: boom (line 2: raise ValueError('boom'))"),
    "raise KeyboardInterrupt": ("error", "KeyboardInterrupt"),
    "assert 1 == 2": ("error", "AssertionError (line 1"),
    "raise Exception('x' * 10**6)": ("error", " ... "),
    "class E(Exception):\n    def __str__(self): raise ValueError\nraise E":
        ("error", "E: (the message could not be made)"),
    "class A:\n    def __repr__(self): raise KeyError(3)\nA()": ("error", "KeyError: 3"),
    "class A:\n    def __repr__(self): return 5\nA()":
        ("error", "TypeError: __repr__ returned non-string"),
    "def f(n): return f(n + 1)\nf(0)": ("error", "RecursionError"),
    "x = []\nfor i in range(10**5): x = [x]\nx": ("error", "RecursionError"),
    "(" * 300 + ")" * 300: ("error", "too many nested parentheses"),
    "-" * 60000 + "1": ("error", "nested too deeply"),
    "+".join(["1"] * 30000): ("error", ""),
    "x" + ".a" * 30000: ("error", ""),
    "[" * 90 + "]" * 90: ("ok", "[[["),
    "#" * 70000: ("error", "SyntaxError: the snippet is over 64 KB"),
    "x\x00": ("error", "null bytes"),
    "'\ud800'": ("error", "UnicodeEncodeError"),
    "print(chr(0xd800))": ("ok", "\\ud800"),
    "10**10**6 > 1": ("ok", "True"),
    "print(10**200002)": ("error", "ValueError: Exceeds the limit"),
    "b'\\xff'": ("ok", "b'\\xff'"),
    "import numpy as np\nnp.linalg.inv(np.zeros((2, 2)))":
        ("error", "LinAlgError: Singular matrix"),
    "import scipy.nope": ("error", "ModuleNotFoundError: No module named 'scipy.nope'"),
    "from math import nope": ("error", "ImportError: cannot import name 'nope'"),
    "x = [0] * 10**12": ("memory", "MemoryError"),
    "import numpy as np\nx = np.ones(10**10)": ("memory", "more than 2048 MB"),
    "x = []\nwhile True: x.append(bytearray(1 << 20))":
        ("memory", "was stopped; variables of earlier snippets are kept"),
    "x = 'a' * (4 << 30)": ("memory", "MemoryError"),
    "while True: print('x' * 1000)": ("output", "printed more than 1024 KB"),
    "print('x' * 10**9)": ("output", "bytes left out"),
    "'ab' * 10**8": ("output", "OutputError"),
    "while True: print(1)": ("output", "OutputError"),
    "while True: pass":
        ("timeout", "TimeoutError: the snippet ran longer than 0.5 s and was stopped; "
        "variables of earlier snippets are kept"),
    "print('partial')\nwhile True:\n    try:\n        while True: pass\n"
    "    except BaseException: pass": ("timeout", "partial\nTimeoutError"),
    "10**10**10": ("timeout", ""),
    "sum(range(10**12))": ("timeout", ""),
    "import re\nre.match('(a+)+$', 'a' * 50 + 'b')": ("timeout", ""),
    "from sympy import factorint, nextprime\nfactorint(nextprime(10**40) * nextprime(2 * 10**40))":
        ("timeout", ""),
    "import itertools\nlist(itertools.islice(itertools.cycle([1]), 10**12, None))": ("timeout", ""),
    "import numpy as np\na = np.ones((3000, 3000))\nwhile True: a @ a": ("timeout", ""),
    "class A:\n    def __del__(self):\n        while True: pass\na = A()\ndel a": ("timeout", ""),
    "def g():\n    try:\n        yield\n    finally:\n        while True: pass\n"
    "x = g(); next(x); del x": ("timeout", ""),
    "import random\nrandom._os.abort()": ("crashed", "CrashError"),
    "import random\nrandom._os._exit(0)": ("crashed", ""),
    "import numpy as np\nnp.ctypeslib.ctypes.string_at(8)": ("crashed", ""),
    "import random\nrandom._os.close(3)": ("crashed", ""),
    "import random\nrandom._os.write(3, b'0' * 16 + b' ok')": ("crashed", ""),
    "import random\nrandom._os.write(3, b'x' * 50000)": ("crashed", ""),
    "import random\nrandom._os.write(3, b'')": ("crashed", ""),
    "import random\nrandom._os.close(1)": ("ok", "nothing was printed"),
    "import random\nfor i in range(256):\n    if i != 3:\n        try: random._os.close(i)\n"
    "        except OSError: pass": ("ok", ""),
    "import random\nrandom._os.sys.stdout.close()": ("ok", ""),
    "import random\nrandom._os.sys.stdout = None": ("ok", ""),
    "print = None": ("ok", ""),
    "import random\nrandom._os.sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)":
        ("timeout", ""),
    "import random\nrandom._os.sys.settrace(lambda *a: 1/0)": ("ok", ""),
    "import random\nrandom._os.sys.modules.clear()": ("ok", ""),
    "import random\nfor i in range(1, 65):\n"
    "    try: random._os.sys.modules['signal'].signal(i, lambda *a: None)\n"
    "    except (OSError, ValueError): pass\nwhile True: pass": ("timeout", ""),
}  # fmt: skip


@pytest.mark.parametrize("code", FAULTS, ids=lambda code: repr(code[:40]))
def test_fault(box, code):
    """The right status and text; and the trace goes on with the variables of earlier snippets."""
    session, (status, text) = box.session(), FAULTS[code]
    session.run("kept = 42")
    result = session.run(code, timeout=0.5 if status == "timeout" else 60)
    assert result.status == status and text in result.output, result
    assert len(result.output) < 10_000
    if "random._os" not in code and status != "ok":
        assert session.run("kept").output == "42"
    session.close()


TRY = "\n    try: {}; n += 1\n    except (OSError, RuntimeError): pass"
BOMBS = {
    "fork": "for i in range(1000):" + TRY.format("os.fork()"),
    "thread": "for i in range(1000):" + TRY.format("threading.Thread(target=print).start()"),
    "dup": "for i in range(1000):" + TRY.format("os.dup(1)"),
    "open": "for i in range(1000):" + TRY.format("os.open('/', 0)"),
    "kill all": "for p in (-1, 0, 1, os.getppid(), *range(300, 3000)):"
    + TRY.format("os.kill(p, 9)"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb(boxes, name):
    """With the namespace off as well; the neighbour lives."""
    for config in ("all", "kernel"):
        neighbour, session = boxes(config).session(), boxes(config).session()
        neighbour.run("x = 1")
        pid = neighbour.process.pid
        assert session.run(PRELUDE + "n = 0\n" + BOMBS[name] + "\nn").output == "0"
        assert neighbour.run("x").output == "1" and neighbour.process.pid == pid
        session.close()
        neighbour.close()


def test_output_keeps_head_and_tail_and_no_escape_sequences(session):
    code = "print('HEAD')\nfor i in range(5000): print(i, 'x' * 20)\nprint('TAIL')"
    output = session.run(code).output
    assert output.startswith("HEAD\n0 x") and output.endswith("\nTAIL") and len(output) < 10_000
    assert "bytes left out" in output
    output = session.run(r"print('\x1b]52;c;cm0=\x07\x1b[2J\r\x9b1m\x7f\ttab é')").output
    assert output == r"\x1b]52;c;cm0=\x07\x1b[2J\r\x9b1m\x7f" + "\ttab é"


def test_a_flood_costs_the_caller_nothing(session):
    before = time.process_time()
    assert session.run("while True: print(1, flush=True)", timeout=60).status == "output"
    assert time.process_time() - before < 2


# ---- The protocol


def test_a_session_cannot_forge_replies_of_another(box):
    """Whatever it writes on its own socket ends it alone."""
    one, two = box.session(), box.session()
    two.run("x = 2")
    one.run("x = 1")
    pid = two.process.pid
    for forged in ("b'ready'", "b'died -9'", "b'1234'", "b'\\xff' * 99", "b'0' * 16 + b' ok'"):
        two.submit("x")
        write = f"try: random._os.write(fd, {forged})\n    except OSError: pass"
        result = one.run(f"import random\nfor fd in range(3, 50):\n    {write}")
        assert result.status in ("crashed", "memory")
        assert box.poll(10)[0][1].output == "2"
    assert one.run("x").output == "1" and two.process.pid == pid
    one.close()
    two.close()


def test_a_forged_reply_hurts_only_its_own_trace(box):
    """The snippet finds its request's id, replies by itself and would run on: it is stopped dead."""
    session, other = box.session(), box.session()
    result = session.run(
        "import random\nf = random._os.sys._getframe()\nwhile 'name' not in f.f_locals or "
        "type(f.f_locals['name']) is not bytes: f = f.f_back\n"
        "random._os.write(3, f.f_locals['name'] + b' ok')\nwhile True: pass"
    )
    assert result.status == "ok"

    def used():
        stat = Path(f"/proc/{session.process.pid}/stat").read_text().rsplit(")", 1)[1]
        return sum(map(int, stat.split()[11:13]))

    time.sleep(0.1)
    before = used()
    time.sleep(0.5)
    assert used() == before
    assert other.run("1 + 1").output == "2" and session.run("2", timeout=1).status == "timeout"
    session.close()
    other.close()


# ---- The pool, and how it recovers


def test_submit_and_poll(box):
    sessions = [box.session() for _ in range(50)]
    for i, session in enumerate(sessions):
        session.submit(f"x = {i}\nx * x")
    assert box.pending == 50
    got = {}
    while box.pending:
        got.update(box.poll(10))
    assert [got[session].output for session in sessions] == [str(i * i) for i in range(50)]
    assert box.poll() == [] and box.poll(0.01) == []
    sessions[0].submit("x")
    with pytest.raises(ValueError):
        sessions[0].submit("x")
    assert len(box.poll(10)) == 1
    sessions[0].submit("while True: pass", timeout=100)
    sessions[0].close()
    deadline = time.monotonic() + 10
    while box.pending and time.monotonic() < deadline:
        assert box.poll(0.05) == []
    assert box.pending == 0
    with pytest.raises(ValueError):
        sessions[0].submit("x")
    for session in sessions:
        session.close()


def test_snippets_run_while_the_caller_is_busy(box):
    """No poll is needed for queued snippets, and none for time-outs."""
    sessions = [box.session() for _ in range(6)]
    for session in sessions:
        session.submit("while True: pass" if session in sessions[:2] else "1", timeout=0.5)
    deadline = time.monotonic() + 20
    while box.done.qsize() < 6 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(box.poll()) == 6
    for session in sessions:
        session.close()


@pytest.mark.parametrize("limit", ["room", "memory"])
def test_idle_sessions_are_dropped_and_rebuilt(boxes, monkeypatch, limit):
    """Too many of them, or too much memory in all of them together: the longest idle go."""
    box = boxes("kernel")
    monkeypatch.setattr(box, limit, 4 if limit == "room" else 200 << 20)
    sessions = [box.session() for _ in range(10)]
    for turn in range(3):
        for i, session in enumerate(sessions):
            start = f"x = {i}; y = bytearray(b'1') * (60 << 20)"
            session.submit("x += 1\nx" if turn else start)
        got = {}
        while box.pending:
            got.update(box.poll(10))
        assert len(box.idle) <= 4
        if turn:
            expected = [str(i + turn) for i in range(10)]
            assert [got[session].output for session in sessions] == expected
    for session in sessions:
        session.close()


def test_a_dead_zygote_is_replaced_again_and_again(boxes):
    """Six deaths in a row; what ran meanwhile ends as crashed, and variables come back."""
    box = boxes("uid")
    session, other = box.session(), box.session()
    assert session.run("x = 5\nx").output == "5"
    other.submit("while True: pass", timeout=60)
    time.sleep(0.5)
    for _ in range(6):
        box.zygote.kill()
        time.sleep(0.05)
        if other.busy:
            assert box.poll(30)[0][1].status in ("crashed", "memory")
        box.session().submit("1")
        time.sleep(0.5)
    while box.pending:
        box.poll(60)
    assert session.run("x + 1").output == "6" and other.run("1").output == "1"
    session.close()
    other.close()


def test_a_replay_that_fails_keeps_what_was_before_it(session):
    session.run("x = 1")
    session.run("y = 2")
    number, _, result = session.history[1]  # a snippet that was quick then and hangs now
    session.history[1] = (number, "while True: pass", result)
    session.run("while True: pass", timeout=0.3)
    result = session.run("x")
    assert result.output == "(only the variables made before snippet 2 are there)\n1"
    assert session.run("y").status == "error" and session.run("x").output == "1"


def test_a_replay_gets_the_time_that_it_took(session):
    """Its snippets are slower than the one after them may be."""
    for _ in range(3):
        session.run("import time\ntime.sleep(0.4)\nx = 1")
    session.run("while True: pass", timeout=0.3)
    assert session.run("x", timeout=0.5).output == "1"


def test_a_kill_by_the_system_says_so(session):
    session.submit("while True: pass", timeout=60)
    while session.process is None:
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(session.process.pid, signal.SIGKILL)  # as the kernel does when memory runs out
    result = session.box.poll(20)[0][1]
    assert result.status == "memory" and "ran out of memory" in result.output


def script(code, **options):
    """Run Python that starts with a box of one worker; it must end by itself."""
    head = f"import sys; sys.path.insert(0, {os.path.dirname(sandbox.__file__)!r})\n"
    head += "import os, resource, signal, threading, time, sandbox\n"
    code = head + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


RECOVERIES = {
    "the caller's descriptors run out": """
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with sandbox.Sandbox(2) as box:
            sessions = [box.session() for _ in range(40)]
            print(sum(s.run(f"x = {i}; x").output == str(i) for i, s in enumerate(sessions)))
            spare = [os.dup(1) for _ in range(len(os.listdir("/proc/self/fd")), 60)]
            print(sum(s.run("x").output == str(i) for i, s in enumerate(sessions)) == 40)
        """,
    "processes run out": """
        with sandbox.Sandbox(1) as box:
            box.wait_ready()
            one, two = box.session(), box.session()
            one.run("x = 1")
            if os.getuid():
                pid, which = box.zygote.process.pid, resource.RLIMIT_NPROC
                resource.prlimit(pid, which, (1, -1))
                said = two.run("1").output
                assert "Resource temporarily unavailable" in said, said
                resource.prlimit(pid, which, (-1, -1))
            print(one.run("x").output, two.run("2").output)
        """,
    "a session is closed while it runs": """
        with sandbox.Sandbox(1) as box:
            session = box.session()
            threading.Timer(5, session.close).start()
            print(session.run("while True: pass", 1000).status)
        """,
    "the box is closed while snippets run": """
        box = sandbox.Sandbox(1)
        threading.Timer(5, box.close).start()
        def run(): print(box.session().run("while True: pass", 1000).status)
        waiting = [threading.Thread(target=run) for _ in range(3)]
        for thread in waiting: thread.start()
        for thread in waiting: thread.join()
        """,
    "the box is closed at once": """
        for _ in range(5): sandbox.Sandbox(3).close()
        """,
    "a forked child uses the box": """
        with sandbox.Sandbox(1) as box:
            session = box.session()
            print(session.run("x = 1; x").output)
            if os.fork() == 0:
                try: session.run("x")
                except sandbox.SandboxError as error: print("refused")
                box.close()
                sys.stdout.flush(); os._exit(0)
            os.wait()
            print(session.run("x").output)
        """,
    "Ctrl-C while a snippet runs": """
        with sandbox.Sandbox(1) as box:
            session = box.session()
            box.wait_ready()
            threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()
            try: session.run("while True: pass", 1000)
            except KeyboardInterrupt: print("interrupted")
            print(box.session().run("1").output)
        """,
    "the caller ignores SIGCHLD": """
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with sandbox.Sandbox(1) as box:
            session = box.session()
            session.run("x = 1")
            print(session.run("while True: pass", 0.3).status, session.run("x").output)
        """,
    "one core": """
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        with sandbox.Sandbox() as box: print(box.workers, box.session().run("1").output)
        """,
    "the box was made by a thread that has ended": """
        boxes = []
        thread = threading.Thread(target=lambda: boxes.append(sandbox.Sandbox(1)))
        thread.start(); thread.join(); time.sleep(1)
        print(boxes[0].session().run("1").output); boxes[0].close()
        """,
}
SAID = ["40\nTrue", "1 2", "crashed", "crashed\n" * 3, "", "1\nrefused\n1", "interrupted\n1"]
SAID += ["timeout 1", "1 1", "1"]


@pytest.mark.parametrize("name,said", list(zip(RECOVERIES, SAID)))
def test_recovery(name, said):
    assert script(RECOVERIES[name]).strip() == said.strip()


def family(pid):
    """Zygotes and sessions started by a process."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f'"parent": {pid},' in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


CALLER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from sandbox import Sandbox
box = Sandbox(workers=3)
sessions = [box.session() for i in range(3)]
for session in sessions: session.run("x = 1")
for session in sessions[1:]: session.submit("while True: pass", timeout=100)
time.sleep(0.2)
print("up", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "end without close"])
def test_a_dead_caller_leaves_nothing(how):
    seconds = "0" if how[0] == "e" else "100"
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, os.path.dirname(sandbox.__file__), seconds],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert caller.stdout.readline() == "up\n"
    if how[0] == "S":
        assert len(family(caller.pid)) == 4
        os.killpg(caller.pid, getattr(signal, how))  # Ctrl-C goes to the whole group
    errors = caller.communicate(timeout=20)[1]
    end = time.monotonic() + 10
    while family(caller.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not family(caller.pid) and errors.count("Traceback") == (how == "SIGINT")


def test_close_leaves_nothing(boxes):
    before, others = sorted(os.listdir("/proc/self/fd")), set(family(os.getpid()))
    box = Sandbox(workers=2)
    sessions = [box.session() for _ in range(5)]
    for session in sessions:
        session.submit("x = 1")
    while box.pending:
        box.poll(1)
    sessions[0].submit("while True: pass")
    sessions[1].close()
    box.close()
    box.close()
    with pytest.raises(SandboxError):
        box.session().run("1")
    end = time.monotonic() + 10
    while set(family(os.getpid())) - others and time.monotonic() < end:
        time.sleep(0.05)
    assert not set(family(os.getpid())) - others
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


def test_python_found_by_a_relative_path():
    """`PATH=.venv/bin:$PATH python ...`: sys.executable is relative, and the zygote starts in /."""
    path = os.path.relpath(sys.prefix) + "/bin:/usr/bin:/bin"
    done = subprocess.run(
        ["python", sandbox.__file__, "6 * 7"],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")


def command(*args, **options):
    return subprocess.run(
        [sys.executable, sandbox.__file__, *args], capture_output=True, text=True, **options
    )


def test_command():
    done = command("print(2**100)")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{2**100}\n", "")
    done = command("-", input="x = 1\nx / 0")
    assert done.returncode == 1 and "division by zero (line 2: x / 0)\n" in done.stdout
    done = command("--check")
    assert done.returncode == 0 and all(name in done.stdout for name in KERNEL)
    for args in ("", "--nope", "1 --timeout x", "1 --timeout -1", "1 --sandbox none", "1 2"):
        done = command(*args.split())
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == "", args
    with pytest.raises(ValueError):
        Sandbox(mode="nonsense")


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
                time.sleep(0.05)
            outputs.append(session.run(code).output)
        runs.append(outputs)
        session.close()
    with Sandbox(workers=1) as another:
        session = another.session()
        runs.append([session.run(code).output for code in REPEATED])
    assert runs[0] == runs[1] == runs[2] and len(set(runs[0])) == len(REPEATED)
    assert not any("Error" in output for output in runs[0])


TRACES = [  # [snippet, exact output, snippet, exact output, ...]
    ["x = 5\nx", "5", "x + 1", "6", "x = x * 2", NOTHING, "print(x)\nx", "10\n10"],
    ["def f(n):\n    return 1 if n < 2 else n * f(n - 1)", NOTHING, "f(20)", "2432902008176640000"],
    ["import math\nmath.factorial(10)", "3628800", "math.lcm(4, 6)", "12"],
    ["import numpy as np\nnp.arange(6).reshape(2, 3)", "[[0 1 2]\n [3 4 5]]", "np.float64(1.5)",
     "1.5", "[np.float64(1.5), np.int64(2)]", "[1.5, 2]"],
    ["import numpy as np\nA = np.array([[2, 1], [1, 3]])\nnp.linalg.solve(A, [3, 5])", "[0.8 1.4]",
     "round(float(np.linalg.det(A)), 9)", "5.0"],
    ["from sympy import *\nx = symbols('x')\nsolve(x**2 - 2, x)", "[-sqrt(2), sqrt(2)]",
     "integrate(x * exp(x), x)", "(x - 1)*exp(x)", "diff(sin(x)**2, x)", "2*sin(x)*cos(x)",
     "limit(sin(x)/x, x, 0)", "1"],
    ["import sympy as sp\nsp.factorint(2024)", "{2: 3, 11: 1, 23: 1}", "sp.isprime(2**61 - 1)",
     "True", "sp.totient(100), sp.divisor_count(360)", "(40, 24)"],
    ["import sympy as sp\nsp.Rational(1, 3) + sp.Rational(1, 6)", "1/2", "sp.sqrt(50)", "5*sqrt(2)",
     "sp.N(sp.pi, 20)", "3.1415926535897932385"],
    ["from sympy.abc import x\nfrom sympy import factor, expand, simplify, apart\nfactor(x**4 - 1)",
     "(x - 1)*(x + 1)*(x**2 + 1)", "apart(1/(x**2 - 1))", "-1/(2*(x + 1)) + 1/(2*(x - 1))"],
    ["from mpmath import mp, mpf\nmp.dps = 30\nmp.pi", "3.14159265358979323846264338328",
     "mpf(1) / 3", "0.333333333333333333333333333333"],
    ["x = 1\ny", "NameError: name 'y' is not defined (line 2: y)", "x", "1"],
    ["def f(): return q", NOTHING, "f()",
     "NameError: name 'q' is not defined (an earlier snippet's line 1: def f(): return q)"],
]  # fmt: skip


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: repr(trace[0][:40]))
def test_trace(session, trace):
    for code, output in zip(trace[::2], trace[1::2]):
        assert session.run(code).output == output


ORDINARY = {  # snippet: exact output
    "6 * 7": "42",
    "'text'": "'text'",
    "print('text')": "text",
    "None": NOTHING,
    "": NOTHING,
    "# nothing": NOTHING,
    "```python\nprint(5)\n```": "5",
    "```\n2 + 2\n```\n": "4",
    "```py\nx = 1\nx\n```": "1",
    "1; 2; 3": "3",
    "f = lambda x: x**2\n[f(i) for i in range(5)]": "[0, 1, 4, 9, 16]",
    "for i in range(3): print(i, end=' ')": "0 1 2 ",
    "sum(int(d) for d in str(2**1000))": "1366",
    "pow(7, 222, 1000)": "49",
    "divmod(17, 5)": "(3, 2)",
    "0.1 + 0.2": "0.30000000000000004",
    "len(str(3**100000))": "47713",
    "{'a': 1, **{'b': 2}}": "{'a': 1, 'b': 2}",
    "print(f'{3.14159:.2f}')": "3.14",
    "a, *b = range(4)\nb": "[1, 2, 3]",
    "import math\nmath.comb(10, 3), math.gcd(48, 36), math.isqrt(99)": "(120, 12, 9)",
    "from math import *\nround(sin(pi / 6), 6)": "0.5",
    "import cmath\ncmath.sqrt(-1)": "1j",
    "from fractions import Fraction\nFraction(1, 3) + Fraction(1, 6)": "Fraction(1, 2)",
    "from decimal import Decimal, getcontext\ngetcontext().prec = 30\nprint(Decimal(2).sqrt())":
        "1.41421356237309504880168872421",
    "import statistics\nstatistics.mean([1, 2, 3, 4])": "2.5",
    "from itertools import permutations\nlen(list(permutations(range(6))))": "720",
    "from itertools import combinations\nsum(1 for c in combinations(range(20), 3) if sum(c) % 5 "
    "== 0)": "228",
    "from functools import lru_cache\n@lru_cache(None)\n"
    "def f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nf(90)": "2880067194370816120",
    "from functools import lru_cache, reduce\n@lru_cache(None)\n"
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nf(3000)": "3000",
    "from collections import Counter, defaultdict, deque\nCounter('banana').most_common(1)":
        "[('a', 3)]",
    "import operator\noperator.mul(6, 7)": "42",
    "import string\nstring.ascii_lowercase[:3]": "'abc'",
    "import re\nre.findall(r'\\d+', 'a1b22')": "['1', '22']",
    "import datetime\ndatetime.date(2024, 2, 28) + datetime.timedelta(2)":
        "datetime.date(2024, 3, 1)",
    "from datetime import datetime\nprint(datetime.strptime('2024-01-05', "
    "'%Y-%m-%d').strftime('%A'))": "Friday",
    "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 2\nP(1)":
        "P(x=1, y=2)",
    "from typing import List\ndef f(x: List[int]) -> int: return sum(x)\nf([1, 2])": "3",
    "import heapq\nh = [3, 1, 2]\nheapq.heapify(h)\nheapq.heappop(h)": "1",
    "from bisect import bisect_left\nbisect_left([1, 3, 5], 4)": "2",
    "from enum import Enum\nclass C(Enum):\n    A = 1\nC.A.name": "'A'",
    "class A:\n    def __init__(self, v): self._v = v\n"
    "    def __add__(self, o): return A(self._v + o._v)\n"
    "    def __repr__(self): return f'A({self._v})'\nA(1) + A(2)": "A(3)",
    "class B(Exception): pass\ntry:\n    raise B('x')\nexcept B as e:\n"
    "    print(type(e).__name__, e)": "B x",
    "if __name__ == '__main__':\n    print('main')": "main",
    "import numpy as np\nsorted(np.round(np.linalg.eigvals([[2, 0], [0, 3]]), 6))": "[2.0, 3.0]",
    "import numpy as np\nnp.roots([1, -3, 2])": "[2. 1.]",
    "import numpy as np\nnp.array([1, 2]) / 0":
        "RuntimeWarning: divide by zero encountered in divide\n[inf inf]",
    "from sympy import symbols, Eq, solve\nx, y = symbols('x y')\n"
    "solve([Eq(x + y, 10), Eq(x - y, 2)], [x, y])": "{x: 6, y: 4}",
    "from sympy import Matrix\nMatrix([[1, 2], [3, 4]]).inv()": "Matrix([[-2, 1], [3/2, -1/2]])",
    "from sympy import summation, symbols, oo\nk = symbols('k')\nsummation(1/k**2, (k, 1, oo))":
        "pi**2/6",
    "from sympy.ntheory.modular import crt\ncrt([3, 5, 7], [2, 3, 2])[0]": "23",
    "from sympy import diophantine, symbols\nx, y = symbols('x y', integer=True)\n"
    "len(diophantine(x**2 - 2*y**2 - 1))": "2",
    "from sympy import lambdify, symbols\nx = symbols('x')\nlambdify(x, x**2 + 1)(3)": "10",
    "from sympy import sympify\nsympify('2*x + x')": "3*x",
    "from sympy import latex, Rational\nlatex(Rational(1, 2))": "'\\\\frac{1}{2}'",
    "from sympy import nsimplify, series, cos, Symbol\nx = Symbol('x')\nseries(cos(x), x, 0, 5)":
        "1 - x**2/2 + x**4/24 + O(x**5)",
    "from sympy import symbols, nsolve, cos\nx = symbols('x')\nnsolve(cos(x) - x, 1)":
        "0.739085133215161",
    "from sympy import geometry as g\ng.Triangle(g.Point(0, 0), g.Point(3, 0), g.Point(0, 4)).area":
        "6",
    "from sympy.combinatorics import Permutation\nPermutation([1, 2, 0]).order()": "3",
    "from sympy import dsolve, Function, symbols, Eq\nt = symbols('t')\nf = Function('f')\n"
    "dsolve(Eq(f(t).diff(t), f(t)))": "Eq(f(t), C1*exp(t))",
    "from scipy.optimize import brentq\nround(brentq(lambda x: x**2 - 2, 0, 2), 6)": "1.414214",
    "from scipy.integrate import quad\nround(quad(lambda x: x**2, 0, 3)[0], 6)": "9.0",
    "import scipy.stats as st\nround(st.norm.cdf(1.96), 4)": "0.975",
    "from scipy.special import comb\ncomb(10, 3, exact=True)": "120",
    "import scipy\nscipy.linalg.norm([3, 4])": "5.0",
    "import scipy.optimize as o\nr = o.linprog([-1, -2], A_ub=[[1, 1]], b_ub=[4])\nround(r.fun, 6)":
        "-8.0",
    "from scipy.optimize import minimize\nround(float(minimize(lambda v: (v[0] - 3)**2, "
    "[0]).x[0]), 3)": "3.0",
    "x = 10\nwhile x > 1: x = x // 2 if x % 2 == 0 else 3 * x + 1\nx": "1",
    "n = 1\nfor p in [2, 3, 5, 7]:\n    n *= p\nprint('n =', n)\nn % 11": "n = 210\n1",
    "print(1, 2, sep='-')\nprint()\nprint(3)": "1-2\n\n3",
    "primes = [p for p in range(2, 100) if all(p % d for d in range(2, int(p**0.5) + 1))]\n"
    "len(primes), sum(primes)": "(25, 1060)",
    "print('héllo ∑ 漢字')": "héllo ∑ 漢字",
    "x = 3 if True else 4\nmatch x:\n    case 3: print('three')": "three",
}  # fmt: skip
NO_MODULE = "...here; numpy, scipy, sympy, math and most of the standard library are"
WILD = {  # as models write them; `...` is a part of the output
    "```python\n```python\nprint(2)\n```\n```": "2",
    "```python\nprint(2)": "2",
    "print(2)\n```": "2",
    "print(2)```": "2",
    "Let me compute it.\n```python\nx = 2\nprint(x)\n```\nThat prints 2.": "2",
    "~~~python\nprint(2)\n~~~": "2",
    "python\nx = 3\nprint(x)": "3",
    "py\n3": "3",
    ">>> x = 4\n>>> x + 1\n5": "5",
    ">>> for i in range(2):\n...     print(i)\n...\n0\n1": "0\n1",
    "In [1]: x = 4\n\nIn [2]: x * 2\nOut[2]: 8": "8",
    "In [1]: for i in range(2):\n   ...:     print(i)": "0\n1",
    "%matplotlib inline\nx = 1\nprint(x)": "1",
    "!pip install sympy\nimport sympy\nsympy.pi": "pi",
    "%%time\nsum(range(10))": "45",
    "    x = 6\n    print(x)\n": "6",
    "\n    if True:\n        print(6)\n": "6",
    "\ufeffprint(7)": "7",
    "x\xa0=\xa07\nx": "7",
    "x = 7\u200b\nx": "7",
    "print(9 − 2)": "7",
    "print(3 × 4 ÷ 2)": "6.0",
    "print(3 ≤ 4, 3 ≥ 4, 3 ≠ 4)": "True False True",
    "print(“a”, ‘b’)": "a b",
    "print(3² + 4²)": "25",
    "print('3 × 4 = “12”')": "3 × 4 = “12”",
    "def f(x):\n    \"\"\"Twice.\n\n    >>> f(2)\n    4\n    \"\"\"\n    return 2 * x\nf(3)": "6",
    "s = '''\n```\ncode\n```\n'''\nlen(s)": "14",
    "x = 5": NOTHING,
    "import math\narea = math.pi * 4": NOTHING,
    "def main():\n    print('ran')\n\nif __name__ == '__main__':\n    main()": "ran",
    "try:\n    import os\nexcept ImportError:\n    print('no os')": "no os",
    "try:\n    import gmpy2 as g\nexcept ImportError:\n    g = None\nprint(g is None)": "True",
    "import os": NO_MODULE,
    "import os.path as p": NO_MODULE,
    "from subprocess import run": NO_MODULE,
    "from . import x": NO_MODULE,
    "__import__('socket')": NO_MODULE,
    "import math, builtins": NO_MODULE,
    "import pandas as pd": "...no module pandas here",
    "print('shown')\nimport requests": "...shown\nRefused: no module requests here",
    "open('data.txt').read()": "...snippets have no files",
    "n = int(input('n? '))": "...no input",
    "f = open\nprint(1)": "1",
    "eval('2 + 3')": "5",
    "exec('y = 4')\ny": "4",
    "import time\nstart = time.time()\ntime.sleep(0.01)\ntime.time() - start > 0.009": "True",
    "import time\nprint(time.process_time() > 0, time.perf_counter() > 0)": "True True",
    "import json\njson.dumps({'a': [1, 2]})": "'{\"a\": [1, 2]}'",
    "import sys\nsys.setrecursionlimit(10**6)\nsys.maxsize > 2**31": "True",
    "import sys\nprint('a')\nsys.exit()\nprint('b')": "a",
    "print('a')\nexit()": "a",
    "print('a')\nquit(0)": "a",
    "import sys\nsys.exit('no solution')": "no solution",
    "raise SystemExit": NOTHING,
    "import sys\nsys.stdout.write('hi\\n')": "hi\n3",
    "import warnings\nwarnings.filterwarnings('ignore')\nprint(1)": "1",
    "from contextlib import suppress\nwith suppress(ZeroDivisionError): 1 / 0\nprint(1)": "1",
    "from pprint import pprint\npprint({'b': 1, 'a': 2})": "{'a': 2, 'b': 1}",
    "from __future__ import annotations\ndef f(x: X): return 1\nf(0)": "1",
    "import calendar\ncalendar.isleap(2024)": "True",
    "import hashlib\nhashlib.md5(b'a').hexdigest()[:6]": "'0cc175'",
    "import textwrap\ntextwrap.dedent('  a')": "'a'",
    "from array import array\narray('i', [1, 2])": "array('i', [1, 2])",
    "import timeit\ntimeit.timeit('1 + 1', number=10) < 1": "True",
    "import traceback\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc()":
        "...ZeroDivisionError: division by zero",
    "import logging\nlogging.basicConfig(level=20)\nlogging.info('seen')": "...seen",
    "import io\nb = io.StringIO()\nprint(1, file=b)\nb.getvalue()": "'1\\n'",
    "import networkx as nx\nnx.shortest_path_length(nx.cycle_graph(6), 0, 3)": "3",
    "import networkx as nx\nsorted(nx.maximal_matching(nx.path_graph(4)))": "[(0, 1), (2, 3)]",
    "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nprint(1)": "...no display",
    "from matplotlib import pyplot as plt\nfig, ax = plt.subplots()\nax.grid()\nprint(2)": "2",
    "import matplotlib.pyplot as plt\nplt.rcParams['x'] = 1\nplt.savefig('a.png')": "...no display",
    "import numpy as np\nimport matplotlib.pyplot as plt\nprint(np.ones(2).sum())": "2.0",
    "import sympy as sp\nx = sp.symbols('x')\nsp.plot(x**2, show=False)": "...cartesian line: x**2",
    "from sympy import *\ninit_printing()\nx = symbols('x')\nx**2": "x**2",
    "import datetime as dt\n(dt.date(2024, 12, 25) - dt.date(2024, 1, 1)).days": "359",
    "from collections import namedtuple\nP = namedtuple('P', 'x y')\nP(1, 2)": "P(x=1, y=2)",
    "from itertools import product\nsum(a + b == 7 for a, b in product(range(7), repeat=2))": "6",
    "from math import gcd\nfrom functools import reduce\nreduce(gcd, [12, 18, 30])": "6",
    "from fractions import Fraction as F\nprint(F(1, 3) + F(1, 6))": "1/2",
    "import inspect, types, queue, copy, graphlib, struct\nstruct.pack('B', 7)": "b'\\x07'",
    "import math\nn = str(math.factorial(100))\nlen(n) - len(n.rstrip('0'))  # zeros": "24",
    "import numpy as np\nx = np.ones((2000, 2000))\nfloat((x @ x)[0, 0])": "2000.0",
    "import random\nrandom.shuffle(x := list(range(5)))\nsorted(x)": "[0, 1, 2, 3, 4]",
    "import decimal\ndecimal.Decimal('0.1') * 3": "Decimal('0.3')",
    "import statistics as st\nst.median([3, 1, 2]), st.pstdev([1, 1])": "(2, 0.0)",
}  # fmt: skip


@pytest.mark.parametrize("code", {**ORDINARY, **WILD}, ids=lambda code: repr(code[:40]))
def test_ordinary(session, code):
    output, expected = session.run(code).output, {**ORDINARY, **WILD}[code]
    if expected.startswith("..."):
        assert expected[3:] in output
    else:
        assert output == expected


def test_an_error_shows_no_path_of_this_machine(session):
    for code in ("from math import nope", "import sympy\nsympy.nope()", "import scipy.nope"):
        assert "/" not in session.run(code).output
