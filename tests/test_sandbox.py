"""The sandbox: attacks judged by their effects, faults, bombs, the protocol, determinism, ordinary snippets.

Every attack of ATTACKS is run in four places: in a session with no layer at all, where it must do its damage
(else it proves nothing; attacks that would hurt the machine are spared this), with all layers on, with the
kernel's layers alone, and with seccomp alone; those marked for Landlock with Landlock alone too. What counts as
damage is what `World.damage` can see from outside, or `ESCAPED` printed by an attack whose gain is only visible inside.
"""

import gc
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sandbox
from sandbox import Result, Sandbox, SandboxError

ROOT = os.geteuid() == 0
X86 = os.uname().machine == "x86_64"
KERNEL = ("rlimits", "uid", "landlock", "seccomp")
CONFIGS = {"none": (), "all": sandbox.LAYERS, "kernel": KERNEL, "seccomp": ("seccomp",), "landlock": ("landlock",),
           "rlimits": ("rlimits",), "uid": ("uid",)}


class World:
    """What an attack may not touch: a secret file and environment, a victim file, listeners, a sibling process."""

    def __init__(self):
        self.token = "TOKEN" + secrets.token_hex(12)
        self.dir = tempfile.mkdtemp(prefix="world", dir="/tmp")
        self.sibling = self.listeners = None
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
        os.chmod(self.dir, 0o777), os.chmod(self.path("victim"), 0o666)
        self.tree = self.look()
        self.listeners = {}
        for name, family, kind, address in (
                ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)), ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
                ("unix", socket.AF_UNIX, socket.SOCK_STREAM, self.dir + ".unix"), ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, "\0" + self.dir)):
            self.listeners[name] = server = socket.socket(family, kind)
            server.bind(address)
            server.listen() if kind == socket.SOCK_STREAM else None
            server.setblocking(False)
        os.chmod(self.dir + ".unix", 0o777)
        self.sibling = subprocess.Popen([sys.executable, "-c", "print(flush=True); import time; time.sleep(1000)"], stdout=subprocess.PIPE,
                                        env={**os.environ, "KEY": self.token}, process_group=0)
        self.sibling.stdout.readline()
        self.state = self.sibling_state()

    def clear(self):
        shutil.rmtree(self.dir, ignore_errors=True)
        Path(self.dir + ".unix").unlink(missing_ok=True)
        for server in (self.listeners or {}).values():
            server.close()
        if self.sibling:
            self.sibling.kill(), self.sibling.wait(), self.sibling.stdout.close()

    def look(self):
        found = {}
        for entry in sorted(os.scandir(self.dir), key=lambda entry: entry.name):
            stat = entry.stat(follow_symlinks=False)
            text = Path(entry.path).read_bytes() if entry.is_file(follow_symlinks=False) and os.access(entry.path, os.R_OK) else None
            extra = os.listxattr(entry.path, follow_symlinks=False) if not entry.is_symlink() else []
            found[entry.name] = (stat.st_mode, stat.st_uid, stat.st_mtime, stat.st_nlink, text, tuple(extra))
        return found

    def sibling_state(self):
        pid = self.sibling.pid
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return (self.sibling.poll() is None and stat != "Z", stat in "tT", os.getpriority(os.PRIO_PROCESS, pid), os.sched_getaffinity(pid),
                resource.prlimit(pid, resource.RLIMIT_NOFILE) if self.sibling.poll() is None and stat != "Z" else None)

    def damage(self, output):
        """The set of effects an attack had; mends them."""
        found = set()
        if self.look() != self.tree:
            found.add("files")
        for name, server in self.listeners.items():
            try:
                server.accept()[0].close() if server.type == socket.SOCK_STREAM else server.recv(100)
                found.add(name)
            except BlockingIOError:
                pass
        time.sleep(0.005)                                   # a signal on its way, a tracer on its way out
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
        ports = {name: self.listeners[name].getsockname()[1] for name in ("tcp", "udp")}
        return textwrap.dedent(f"""
            DIR, CANARY, SECRET, VICTIM, EMPTY = {self.dir!r}, {self.path('canary')!r}, {self.path('secret')!r}, {self.path('victim')!r}, {self.path('empty')!r}
            TCP, UDP, UNIX, ABSTRACT, SIBLING, CALLER = {ports['tcp']}, {ports['udp']}, {self.dir + '.unix'!r}, {chr(0) + self.dir!r}, {self.sibling.pid}, {os.getpid()}
            """)


# The way round layers 1 and 2, three hops from an allowed import: with all layers on, every attack starts like this.
PRELUDE = textwrap.dedent("""
    import random, numpy as np, sympy as sp
    modules = random._os.sys.modules
    os, sys, bi, socket, ctypes, subprocess, signal, io, pathlib, shutil, threading, tempfile, linecache, importlib = [
        modules[n] for n in 'os sys builtins socket ctypes subprocess signal io pathlib shutil threading tempfile linecache importlib'.split()]
    imp = getattr(bi, '__imp' + 'ort__')
    libc = ctypes.CDLL(None, use_errno=True)
    def call(number, *args):
        wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
        result = libc.syscall(ctypes.c_long(number), *wide)
        return result
    def gain(result, least=0):
        print(WON if result is None or result >= least else 'errno %d' % ctypes.get_errno())
    text = ctypes.c_char_p
    WON = 'ESC' + 'APED'                    # an error message quotes the line, so the word must not stand in it
    """)

LIVE, SPARE, LAND = "live", "spare", "landlock"             # spare: not shown live (hurts the machine, or needs what is not here)
ATTACKS = {                                                 # name: (code, marks)
    # files: write
    "open": ("bi.open(CANARY, 'w').write('x')", LIVE + LAND),
    "os.open": ("os.open(CANARY, os.O_CREAT | os.O_WRONLY)", LIVE + LAND),
    "creat": ("call(85, text(CANARY.encode()), 0o644)", LIVE + LAND),
    "openat2": ("import struct\ncall(437, -100, text(CANARY.encode()), text(struct.pack('QQQ', 0o101, 0o644, 0)), 24)", SPARE),
    "FileIO": ("io.FileIO(CANARY, 'w')", LIVE + LAND),
    "append": ("bi.open(VICTIM, 'a').write('x')", LIVE + LAND),
    "pathlib": ("pathlib.Path(CANARY).write_text('x')", LIVE + LAND),
    "touch": ("pathlib.Path(CANARY).touch()", LIVE + LAND),
    "np.save": ("np.save(CANARY, np.ones(3))", LIVE + LAND),
    "np.savez": ("np.savez(CANARY, np.ones(3))", LIVE + LAND),
    "np.savetxt": ("np.savetxt(CANARY, np.ones(3))", LIVE + LAND),
    "tofile": ("np.ones(3).tofile(CANARY)", LIVE + LAND),
    "dump": ("np.ones(3).dump(CANARY)", LIVE + LAND),
    "memmap-w": ("np.memmap(CANARY, mode='w+', shape=10)", LIVE + LAND),
    "memmap-victim": ("m = np.memmap(VICTIM, mode='r+', shape=3); m[:] = 65; m.flush()", LIVE + LAND),
    "copy": ("shutil.copy(SECRET, CANARY)", LIVE + LAND),
    "mkdir": ("os.mkdir(CANARY)", LIVE + LAND),
    "mkfifo": ("os.mkfifo(CANARY)", LIVE + LAND),
    "mknod": ("os.mknod(CANARY)", LIVE + LAND),
    "symlink": ("os.symlink(SECRET, CANARY)", LIVE + LAND),
    "link": ("os.link(VICTIM, CANARY)", LIVE + LAND),
    "rename": ("os.rename(VICTIM, CANARY)", LIVE + LAND),
    "renameat2": ("call(316, -100, text(VICTIM.encode()), -100, text(CANARY.encode()), 0)", LIVE + LAND),
    "unlink": ("os.unlink(VICTIM)", LIVE + LAND),
    "rmdir": ("os.rmdir(EMPTY)", LIVE + LAND),
    "rmtree": ("shutil.rmtree(EMPTY)", LIVE + LAND),
    "truncate": ("os.truncate(VICTIM, 0)", LIVE + LAND),
    "chmod": ("os.chmod(VICTIM, 0o600)", LIVE),
    "utime": ("os.utime(VICTIM, (1, 1))", LIVE),
    "chown": ("os.chown(VICTIM, 12345, 12345)", LIVE if ROOT else SPARE),
    "setxattr": ("os.setxattr(VICTIM, 'user.x', b'x')", SPARE),
    "mkstemp": ("tempfile.mkstemp(dir=DIR)", LIVE + LAND),
    "tmpfile": ("gain(os.open(DIR, os.O_TMPFILE | os.O_RDWR))", LIVE + LAND),
    "unix-bind": ("socket.socket(socket.AF_UNIX).bind(CANARY)", LIVE + LAND),
    "log-file": ("imp('logging').FileHandler(CANARY)", LIVE + LAND),
    "lambdify": ("sp.lambdify([], \"__import__('os').mkdir(%r)\" % CANARY)()", LIVE + LAND),
    "sympify": ("sp.sympify(\"__import__('os').mkdir(%r)\" % CANARY)", LIVE + LAND),
    "parse_expr": ("from sympy.parsing.sympy_parser import parse_expr\nparse_expr(\"__import__('os').mkdir(%r)\" % CANARY)", LIVE + LAND),
    "preview": ("sp.preview(sp.Symbol('x'), viewer='file', filename=CANARY)", SPARE),
    "plot": ("sp.plot(sp.Symbol('x'), show=False).save(CANARY)", SPARE),
    "autowrap": ("from sympy.utilities.autowrap import autowrap\nautowrap(sp.Symbol('x'), tempdir=DIR)", SPARE),
    "f2py": ("imp('numpy.f2py')", SPARE),
    "chdir": ("gain(os.chdir(DIR))", LIVE),
    "chroot": ("gain(os.chroot(DIR))", LIVE if ROOT else SPARE),
    "umask": ("gain(os.umask(0))", LIVE),
    "bytecode": ("sys.dont_write_bytecode = False; sys.path.insert(0, DIR); imp('evil')", LIVE + LAND),
    # files: read, and their metadata
    "read": ("print(bi.open(SECRET).read(99))", LIVE + LAND),
    "os.read": ("print(os.read(os.open(SECRET, 0), 99))", LIVE + LAND),
    "open_code": ("print(io.open_code(SECRET).read(99))", LIVE + LAND),
    "fromfile": ("print(bytes(np.fromfile(SECRET, dtype='u1', count=99)))", LIVE + LAND),
    "loadtxt": ("print(np.loadtxt(SECRET, dtype=str, max_rows=1))", LIVE + LAND),
    "genfromtxt": ("print(np.genfromtxt(SECRET, dtype=str, max_rows=1))", LIVE + LAND),
    "memmap-r": ("print(bytes(np.memmap(SECRET, mode='r')[:99]))", LIVE + LAND),
    "linecache": ("print(linecache.getline(SECRET, 1))", LIVE + LAND),
    "get_data": ("print(importlib.machinery.SourceFileLoader('x', SECRET).get_data(SECRET)[:99])", LIVE + LAND),
    "import": ("sys.path.insert(0, DIR); imp('evil')", LIVE + LAND),
    "run_path": ("imp('runpy').run_path(DIR + '/evil.py')", LIVE + LAND),
    "tokenize": ("print(imp('tokenize').open(SECRET).read(99))", LIVE + LAND),
    "listdir": ("print(WON if os.listdir(DIR) else '')", LIVE + LAND),
    "scandir": ("print([e.name for e in os.scandir('/proc/self/fd')] and WON)", LIVE + LAND),
    "stat": ("print(os.stat(SECRET).st_size)", LIVE),
    "statx": ("b = ctypes.create_string_buffer(256); gain(call(332, -100, text(SECRET.encode()), 0, 4095, b))", LIVE),
    "access": ("print(WON if os.access(SECRET, 0) else '')", LIVE),
    "readlink": ("print(os.readlink(DIR + '/link'))", LIVE),
    "statvfs": ("gain(os.statvfs('/').f_bsize)", LIVE),
    "getxattr": ("print(WON, os.listxattr(SECRET))", LIVE),
    "proc-cmdline": ("print(WON, bi.open('/proc/%d/cmdline' % CALLER).read())", LIVE + LAND),
    "proc-mem": ("print(WON, bi.open('/proc/self/mem', 'rb'))", SPARE + LAND),
    "proc-maps": ("print(WON, bi.open('/proc/self/status').read())", LIVE + LAND),
    "sibling-environ": ("print(bi.open('/proc/%d/environ' % SIBLING).read())", LIVE + LAND),
    "dlopen": ("ctypes.CDLL('libcrypt.so.1'); print(WON)", SPARE),
    "pwd": ("print(WON, imp('pwd').getpwuid(0).pw_dir)", LIVE + LAND),
    "inotify": ("gain(call(253))", LIVE),
    "fanotify": ("gain(call(300, 0, 0))", LIVE if ROOT else SPARE),
    "name_to_handle": ("gain(call(304, -100, text(DIR.encode()), 0, 0, 0))", SPARE),
    # network
    "tcp": ("socket.create_connection(('127.0.0.1', TCP), 2)", LIVE + LAND),
    "urlopen": ("imp('urllib.request').request.urlopen('http://127.0.0.1:%d' % TCP, timeout=0.2)", LIVE + LAND),
    "http": ("imp('http.client').client.HTTPConnection('127.0.0.1', TCP, timeout=1).connect()", LIVE + LAND),
    "udp": ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))", LIVE),
    "unix": ("socket.socket(socket.AF_UNIX).connect(UNIX)", LIVE),
    "abstract": ("socket.socket(socket.AF_UNIX).connect(ABSTRACT)", LIVE + LAND),
    "fastopen": ("socket.socket().sendto(b'x', 0x20000000, ('127.0.0.1', TCP))", SPARE),
    "listen": ("s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(WON)", LIVE + LAND),
    "getaddrinfo": ("socket.getaddrinfo('localhost', 80); print(WON)", LIVE),
    "raw": ("socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); print(WON)", LIVE if ROOT else SPARE),
    "netlink": ("socket.socket(16, socket.SOCK_RAW, 0); print(WON)", LIVE),
    "ipv6": ("socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); print(WON)", SPARE),
    "alg": ("socket.socket(38, 5, 0); print(WON)", SPARE),
    "vsock": ("socket.socket(40, 1, 0); print(WON)", SPARE),
    "socketpair": ("socket.socketpair(); print(WON)", LIVE),
    # processes and threads
    "system": ("os.system('touch ' + CANARY)", LIVE + LAND),
    "popen": ("os.popen('touch ' + CANARY).read()", LIVE + LAND),
    "subprocess": ("subprocess.run(['touch', CANARY])", LIVE + LAND),
    "posix_spawn": ("os.waitpid(os.posix_spawn('/bin/sh', ['sh', '-c', 'touch ' + CANARY], {}), 0)", LIVE + LAND),
    "exec": ("os.execv('/bin/sh', ['sh', '-c', 'touch ' + CANARY])", LIVE + LAND),
    "execveat": ("a = (ctypes.c_char_p * 4)(b'sh', b'-c', b'touch ' + CANARY.encode(), None)\ncall(322, -100, text(b'/bin/sh'), a, 0, 0)", LIVE + LAND),
    "fork": ("pid = os.fork()\nif not pid: os.open(CANARY, os.O_CREAT); os._exit(0)\nos.waitpid(pid, 0)", LIVE + LAND),
    "forkpty": ("pid, fd = os.forkpty()\nif not pid: os.open(CANARY, os.O_CREAT); os._exit(0)\nos.waitpid(pid, 0)", LIVE + LAND),
    "clone": ("r = call(56, 17, 0, 0, 0, 0)\nif r == 0: os._exit(0)\ngain(r)", LIVE),
    "clone3": ("a = (ctypes.c_uint64 * 11)(); a[4] = 17\nr = call(435, a, 88)\nif r == 0: os._exit(0)\ngain(r)", LIVE),
    "thread": ("t = threading.Thread(target=print, args=(WON,)); t.start(); t.join()", LIVE),
    "memfd": ("gain(os.memfd_create('x'))", LIVE),
    # signals, and other processes by other means
    "kill": ("os.kill(SIBLING, 9)", LIVE + LAND),
    "killpg": ("os.killpg(SIBLING, 9)", LIVE + LAND),
    "stop": ("os.kill(SIBLING, 19)", LIVE + LAND),
    "kill-0": ("gain(os.kill(CALLER, 0))", LIVE + LAND),
    "kill-parent": ("os.kill(os.getppid(), 9); print(WON)", SPARE + LAND),
    "tgkill": ("call(234, SIBLING, SIBLING, 9)", LIVE + LAND),
    "tkill": ("call(200, SIBLING, 9)", LIVE + LAND),
    "sigqueue": ("b = (ctypes.c_int * 32)(9, 0, -1); call(129, SIBLING, 9, b)", LIVE + LAND),
    "pidfd": ("signal.pidfd_send_signal(os.pidfd_open(SIBLING), 9)", LIVE + LAND),
    "setpriority": ("os.setpriority(0, SIBLING, 19)", LIVE),
    "affinity": ("os.sched_setaffinity(SIBLING, [0])", LIVE if (os.cpu_count() or 1) > 1 else SPARE),
    "prlimit": ("b = (ctypes.c_uint64 * 2)(7, 7); call(302, SIBLING, 7, b, 0)", LIVE),
    "prlimit-read": ("b = (ctypes.c_uint64 * 2)(); gain(call(302, SIBLING, 7, 0, b))", LIVE),
    "ptrace": ("gain(call(101, 16, SIBLING, 0, 0))", LIVE + LAND),
    "vm_readv": ("b = ctypes.create_string_buffer(8); v = (ctypes.c_uint64 * 2)(ctypes.addressof(b), 8); w = (ctypes.c_uint64 * 2)(id(None) & ~4095, 8)\n"
                 "r = call(310, SIBLING, v, 1, w, 1, 0); gain(0 if r >= 0 or ctypes.get_errno() == 14 else -1)", LIVE + LAND),
    "vm_writev": ("b = ctypes.create_string_buffer(8); v = (ctypes.c_uint64 * 2)(ctypes.addressof(b), 8); w = (ctypes.c_uint64 * 2)(4096, 8)\n"
                  "r = call(311, SIBLING, v, 1, w, 1, 0); gain(0 if r >= 0 or ctypes.get_errno() == 14 else -1)", LIVE + LAND),
    "pidfd_getfd": ("gain(call(438, os.pidfd_open(SIBLING), 0, 0))", LIVE + LAND),
    "setown": ("gain(imp('fcntl').fcntl(0, 8, SIBLING))", LIVE),
    "kcmp": ("gain(call(312, os.getpid(), os.getppid(), 0, 0, 0))", SPARE),
    "setsid": ("gain(os.setpgid(0, 0))", LIVE),
    # the kernel
    "unshare": ("gain(call(272, 0x10000000))", SPARE),
    "mount": ("gain(call(165, text(b'none'), text(EMPTY.encode()), text(b'tmpfs'), 0, 0))", SPARE),
    "bpf": ("gain(call(321, 0, text(bytes(64)), 64))", SPARE),
    "perf": ("gain(call(298, text(bytes(128)), 0, -1, -1, 0))", SPARE),
    "io_uring": ("b = ctypes.create_string_buffer(248); gain(call(425, 1, b))", SPARE),
    "keyring": ("gain(call(248, text(b'user'), text(b'k'), text(b'v'), 1, -2))", SPARE),
    "userfaultfd": ("gain(call(323, 0))", SPARE),
    "shm": ("gain(call(29, 0, 4096, 0o1600))", SPARE),
    "mq": ("gain(call(240, text(b'q'), 0o102, 0o600, 0))", SPARE),
    "setuid": ("os.setuid(0); print(WON)", LIVE if ROOT else SPARE),
    "dumpable": ("gain(call(157, 4, 1, 0, 0, 0))", LIVE),
    "pdeathsig": ("gain(call(157, 1, 0, 0, 0, 0))", LIVE),
    "raise-limit": ("imp('resource').setrlimit(imp('resource').RLIMIT_NOFILE, (8, 8)); print(WON)", LIVE),
    "mmap-exec": ("libc.mmap.restype = ctypes.c_void_p\nr = libc.mmap(0, 4096, 7, 0x22, -1, 0); gain(0 if r != 2**64 - 1 else -1)", LIVE),
    "mprotect-exec": ("b = ctypes.create_string_buffer(16384); gain(libc.mprotect(ctypes.c_void_p((ctypes.addressof(b) + 4095) & ~4095), 4096, 7))", LIVE),
    "mlock": ("b = ctypes.create_string_buffer(4096); gain(libc.mlock(b, 4096))", LIVE),
    "timer": ("signal.setitimer(0, 100); print(WON)", LIVE),
    "reboot": ("gain(call(169, 0, 0, 0, 0))", SPARE),
    "sethostname": ("gain(call(170, text(b'x'), 1))", SPARE),
    "settimeofday": ("gain(call(164, 0, 0))", SPARE),
    "kexec": ("gain(call(246, 0, 0, 0, 0))", SPARE),
    "seccomp": ("gain(call(317, 2, 0, text(bytes(4))))", SPARE),
    "x32": ("r = call(0x40000000 + 39); print(WON if r > 0 else '')", SPARE),
    "pass-fd": ("s = socket.socket(fileno=3); socket.send_fds(s, [b'x'], [0]); print(WON)", SPARE),
    "dup": ("gain(os.dup(1))", LIVE),
    "descriptors": ("found = []\nfor fd in range(4, 256):\n  try: os.read(fd, 1); found.append(fd)\n  except BlockingIOError: found.append(fd)\n  except OSError as e:\n"
                    "    if e.errno != 9: found.append(fd)\nif found: print(WON, found)", SPARE),
}
if not X86:
    ATTACKS = {name: attack for name, attack in ATTACKS.items() if "call(" not in attack[0]}


@pytest.fixture(scope="module")
def boxes():
    """A pool for each set of layers, made when first asked for."""
    made = {}

    def get(config):
        if config not in made:
            made[config] = Sandbox(workers=2, layers=CONFIGS[config])
            made[config].wait_ready(60)
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


def attack(box, world, name):
    session = box.session()
    code = world.names() + PRELUDE + ATTACKS[name][0]
    result = session.run(code, timeout=10)
    session.close()                                         # a tracer must be gone before its victim can be buried
    return world.damage(result.output), result


def cases(config):
    mark = {"none": LIVE, "landlock": LAND}.get(config, "")
    return [(config, name) for name in ATTACKS if mark in ATTACKS[name][1]]


@pytest.mark.parametrize("config,name", cases("none") + cases("all") + cases("kernel") + cases("seccomp") + cases("landlock"))
def test_attack(boxes, world, config, name):
    box = boxes(config)
    if config == "landlock" and not box.report["landlock"].startswith("on"):
        pytest.skip("no Landlock here")
    damage, result = attack(box, world, name)
    if config == "none":
        assert damage, f"not a live attack: {result}"
    else:
        assert not damage, (damage, result)
        assert "NameError" not in result.output and "SyntaxError" not in result.output, result
