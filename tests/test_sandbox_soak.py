"""10,000 snippets over 500 sessions, one in twenty hostile: every benign one right, nothing left over.

Less than a minute on two idle cores; part of `make test-all`, or:  python -m pytest -s tests/test_sandbox_soak.py
"""

import os
import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sandbox import Sandbox

SESSIONS, SNIPPETS = 500, 10_000
HOSTILE = [  # each ends its session's process, or is refused
    ("while True: pass", {"timeout"}),
    ("import random\nrandom._os._exit(1)", {"crashed"}),
    ("import random\nrandom._os.write(3, b'0 ok')", {"crashed"}),
    ("while True: print('x' * 500)", {"output"}),
    ("x = [0] * 10**12", {"memory"}),
    ("import random\nrandom._os.abort()", {"crashed"}),
    ("import random\nrandom._os.fork()", {"blocked"}),
    ("import random\nrandom._os.kill(-1, 9)", {"blocked"}),
    ("open('/etc/passwd')", {"blocked"}),
    ("import random\nrandom._os.open('/tmp/soak', 66)", {"blocked"}),
    ("def f(n): return f(n + 1)\nf(0)", {"error"}),
    ("while", {"error"}),
    (
        "import random\nfor i in range(256):\n  try: random._os.close(i)\n  except OSError: pass",
        {"crashed"},
    ),
    ("10**10**10", {"timeout"}),
]


def usage():
    """Descriptors, processes and resident MB of this process, and of what it started."""
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
    mine, zombies = 0, 0
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and f'"parent": {os.getpid()},' in (entry / "cmdline").read_text()
            ):
                mine += 1
            zombies += (
                entry.name.isdigit()
                and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            )
        except OSError:
            pass
    return len(os.listdir("/proc/self/fd")), mine, rss, zombies


@pytest.mark.slow
def test_soak():
    rng, wrong, hostile, done, _refused = random.Random(1), [], 0, 0, 0
    with Sandbox() as box:
        box.wait_ready()
        warm = box.session()
        warm.run("1")
        warm.close()
        time.sleep(0.2)
        before, started = usage(), time.monotonic()
        for _generation in range(10):  # of 50 sessions with 20 snippets each
            sessions = {box.session(): 0 for _ in range(SESSIONS // 10)}
            for _step in range(SNIPPETS // SESSIONS):
                expected = {}
                for session in sessions:
                    if rng.random() < 0.05:
                        code, statuses = rng.choice(HOSTILE)
                        hostile += 1
                    else:
                        n = rng.randrange(1000)
                        sessions[session] += n
                        code, statuses = (
                            (f"x = {n}\nx" if sessions[session] == n else f"x += {n}\nx"),
                            str(sessions[session]),
                        )
                    expected[session] = statuses
                    session.submit(code, timeout=0.3 if statuses == {"timeout"} else 20)
                while box.pending:
                    for session, result in box.poll(10):
                        right = (
                            result.status in expected[session]
                            if isinstance(expected[session], set)
                            else result.output == expected[session]
                        )
                        wrong += [] if right else [(expected[session], result)]
                        done += 1
            for session in sessions:
                session.close()
        seconds = time.monotonic() - started
        time.sleep(1)
        after = usage()
    print(
        f"\n{done} snippets, {hostile} hostile, {seconds:.0f} s, {done / seconds:.0f}/s; descriptors, processes, MB, zombies: {before} -> {after}"
    )
    assert not wrong, wrong[:5]
    assert (
        done == SNIPPETS
        and after[0] <= before[0]
        and after[1] <= before[1]
        and after[2] <= before[2] + 32
        and after[3] <= before[3]
    )
    time.sleep(0.5)
    assert usage()[1] == 0
