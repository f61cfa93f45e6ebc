"""What takes long, part of `make test-all`: 10,000 snippets over 500 sessions, one in twenty
hostile (every benign one right, nothing left), and a memory cgroup of 1.5 GB.
"""

import os
import random
import time
from pathlib import Path

import pytest
from test_sandbox import PRELUDE, family, script

from sandbox import Sandbox

SESSIONS, SNIPPETS = 500, 10_000
HOSTILE = [  # each ends its session's process, or is refused
    ("while True: pass", "timeout"),
    ("import random\nrandom._os._exit(1)", "crashed"),
    ("import random\nrandom._os.write(3, b'0 ok')", "crashed"),
    ("while True: print('x' * 500)", "output"),
    ("x = [0] * 10**12", "memory"),
    ("import random\nrandom._os.abort()", "crashed"),
    ("import random\nrandom._os.fork()", "blocked"),
    ("import random\nrandom._os.kill(-1, 9)", "blocked"),
    ("open('/etc/passwd')", "blocked"),
    ("import random\nrandom._os.open('/tmp/soak', 66)", "blocked"),
    ("def f(n): return f(n + 1)\nf(0)", "error"),
    ("while", "error"),
    ("import random\nrandom._os.closerange(0, 256)", "crashed"),
    ("10**10**10", "timeout"),
]


def usage() -> tuple[int, int, int]:
    """Descriptors and resident MB of this process; its zygotes and sessions, dead ones too."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
    return len(os.listdir("/proc/self/fd")), resident, len(family(os.getpid()))


def generation(box, rng) -> list:
    """Fifty sessions with twenty snippets each; what came out wrong."""
    sums = {box.session(): 0 for _ in range(SESSIONS // 10)}
    wrong = []
    for _ in range(SNIPPETS // SESSIONS):
        expected, futures = {}, {}
        for session in sums:
            n = rng.randrange(1, 1000)
            code = f"x = {n}\nx" if sums[session] == 0 else f"x += {n}\nx"
            status = "ok"
            if rng.random() < 0.05:
                code, status = rng.choice(HOSTILE)
            else:
                sums[session] += n
            expected[session] = (status, str(sums[session]))
            futures[session] = session.submit(code, 0.3 if status == "timeout" else 20)
        for session, future in futures.items():
            result = future.result()
            status, output = expected[session]
            if result.status != status or (status == "ok" and result.output != output):
                wrong.append((expected[session], result))
    for session in sums:
        session.close()
    return wrong


@pytest.mark.slow
def test_soak():
    rng, wrong = random.Random(1), []
    with Sandbox() as box:
        box.wait_ready()
        warm = box.session()
        warm.run("1")
        warm.close()
        time.sleep(0.2)
        before, started = usage(), time.monotonic()
        for _ in range(10):
            wrong += generation(box, rng)
        seconds = time.monotonic() - started
        time.sleep(1)
        after = usage()
    print(f"\n{seconds:.0f} s; descriptors, MB, processes: {before} -> {after}")
    assert not wrong, wrong[:5]
    slack = (0, 32, 0)
    assert all(a <= b + more for a, b, more in zip(after, before, slack))
    time.sleep(0.5)
    assert usage()[2] == 0


OUT_OF_MEMORY = f"""
import pathlib
pathlib.Path(GROUP, "cgroup.procs").write_text(str(os.getpid()))
with sandbox.Sandbox(2) as box:
    one, two = box.session(), box.session()
    one.run("x = 1")
    before = box.zygote.pid, one.process.pid
    shared = "r = libc.mmap(0, 1900 << 20, 3, 0x21, -1, 0); print(r, ctypes.get_errno())"
    print(two.run({PRELUDE!r} + shared).output)
    for _ in range(3):
        result = two.run("x = bytearray(b'1') * (1900 << 20)", 60)
        print(result.status, "ran out of memory" in result.output)
    print(one.run("x + 1").output, before == (box.zygote.pid, one.process.pid))
"""


@pytest.mark.slow
def test_out_of_memory_in_a_cgroup():
    """1.5 GB for caller, zygote and sessions: only the session that takes too much dies."""
    v1 = Path("/sys/fs/cgroup/memory")
    group = (v1 if v1.exists() else v1.parent) / f"sandbox-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if v1.exists() else "memory.max")
        limit.write_text(str(1536 << 20))
        said = script(f"GROUP = {str(group)!r}" + OUT_OF_MEMORY)
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    finally:
        time.sleep(0.5)  # for the last process to end
        if group.exists():
            group.rmdir()
    assert said == "-1 1\n" + "crashed True\n" * 3 + "2 True\n"
