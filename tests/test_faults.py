"""What people mistype, and what machines do to a run: one line each, and nothing that was finished
is lost.
"""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import agent
import cli
import data
import evaluate
import grade
import grpo
import sandbox

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"data.py": data, "agent.py": agent, "evaluate.py": evaluate, "grpo.py": grpo}
SCRIPTS |= {"grade.py": grade, "sandbox.py": sandbox}


# ---- Wrong input: one line, exit 2, before anything heavy is loaded
class Accepted(Exception):
    """The input got as far as the engine."""


def outcome(script: str, flags: list[str]) -> tuple[int | str, str]:
    """(exit code or "accepted", what was said on stderr) of a script's main, without an engine."""
    said = io.StringIO()
    handler = signal.getsignal(signal.SIGINT)

    def opened(*_, **__):
        raise Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *flags])
        patch.setattr(sys, "stdin", io.StringIO(""))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(data, "go_offline_without_hub", lambda: None)
        for module in (agent, evaluate):
            patch.setattr(module, "open_agent", opened)
        patch.setattr(evaluate.subprocess, "run", opened)
        patch.setattr(grpo, "train", opened)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                cli.run_main(SCRIPTS[script].main)
        except SystemExit as end:
            return end.code, said.getvalue()
        except Accepted:
            return "accepted", said.getvalue()
        except BaseException as error:  # a traceback, for the person at the keyboard
            return repr(error)[:300], said.getvalue()
        finally:
            signal.signal(signal.SIGINT, handler)


JUNK = ["abc", "-1", "nan", "inf", "-0.5", "1e400"]
NUMBERS = "temperature top-p top-k max-tokens max-calls snippet-seconds batch tensor-parallel "
NUMBERS += "gpu-memory-utilization"
FILES = {  # files that are wrong as a dataset
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n",
    "torn.jsonl": b'{"problem": "1+1", "ans',
    "list.jsonl": b"[1, 2]\n",
    "number.jsonl": b"5\n",
    "binary.jsonl": b"\xff\xfe\x00\x01",
    "noquestion.jsonl": b'{"x": 1, "answer": "2"}\n',
    "nullquestion.jsonl": b'{"problem": null, "answer": "2"}\n',
    "object.json": b'{"a": 1}',
    "broken.json": b"[{",
    "text.parquet": b"not parquet",
    "empty.parquet": b"",
    "empty.csv": b"",
    "header.csv": b"problem,answer\n",
}
OWN = {
    "agent.py": [[""], ["  "], ["--n", "0"], ["--n", "x"], ["--json"], ["a", "b"]],
    "evaluate.py": [
        *(["--n", value] for value in ("0", "1.5", "-2")),
        *(["--dataset", value] for value in ("", ",", "nothing")),
        *(["--where", value] for value in ("x", "=1", "difficulty=99", "nosuch=1")),
        *(["--limit", value] for value in ("0", "-3", "x")),
        *(["--report", *folders] for folders in ([], ["nowhere"])),
        *(["--ablation", *flags] for flags in [("--lora", "nowhere"), ("--lora", "none")]),
        ["--ablation", "--top-p", "0"],
        ["--split", "nothing"],
    ],
    "grpo.py": [
        *(["--" + name, "0"] for name in "problems group steps lora-rank lr max-grad-norm".split()),
        *(["--" + name, "-1"] for name in "kl-beta tis-cap warmup epsilon-low".split()),
        *(["--" + name, "x"] for name in "loss-type preset scale-rewards skip-flat".split()),
        *(["--reward-weights", value] for value in ("x=1", "code=", "")),
        *map(str.split, ["--top-p 0.9", "--merge nowhere", "--limit 3", "--resume", "--in-turn x"]),
    ],
    "data.py": [["--dataset", "nothing"], ["--limit", "x"], ["--where", "a"]],
    "grade.py": [[], ["nowhere.jsonl"], ["torn.jsonl"], ["empty.jsonl"], ["."], ["a", "b"]],
    "sandbox.py": [["--no-such-flag"], ["--sandbox", "x"], []],
}


def cases(folder: Path) -> list[tuple[str, list[str]]]:
    found = [(script, flags) for script, list_ in OWN.items() for flags in list_]
    for script in ("agent.py", "evaluate.py", "grpo.py"):
        for name in NUMBERS.split():
            found += [(script, [f"--{name}={junk}"]) for junk in JUNK]
        for flags in (
            ["--lora", "adapter"],
            ["--lora", "file"],
            ["--few-shot", "shots.txt"],
            ["--few-shot", "nowhere.txt"],
            ["--prompt", "prompt.txt"],
            ["--prompt", "nowhere"],
            ["--prompt", "r1-zero"],
            ["--end-at", "never"],
            ["--sandbox", "none"],
            ["--no-such-flag"],
        ):
            found.append((script, flags))
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
        scripts = ("data.py", "evaluate.py", "grpo.py")
        found += [(script, ["--dataset", f"./{name}"]) for script in scripts]
    for name, content in {"notrun": "{", "norun2": '{"n": "x"}'}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
        found += [("evaluate.py", ["--report", name]), ("evaluate.py", ["--out", name])]
        found += [("grpo.py", ["--out", name, "--resume"]), ("grpo.py", ["--out", name])]
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "shots.txt").write_text("no question here")
    (folder / "prompt.txt").write_text("no placeholder")
    (folder / "file").write_text("")
    return found


def test_over_200_wrong_inputs_are_one_line_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = cases(tmp_path)
    assert len(tried) > 200
    wrong = []
    for script, flags in tried:
        problem = ["What?"] if script == "agent.py" and flags and flags[0].startswith("--") else []
        if "--json" in flags:
            problem = []
        code, said = outcome(script, [*flags, *problem])
        if code != 2 or said.count("\n") != 1 or len(said) > 600 or "Traceback" in said:
            wrong.append((script, flags, code, said[-300:]))
    assert not wrong, "\n".join(map(str, wrong))


def test_without_the_packages_it_is_one_line():
    code = (
        "import sys; sys.modules['vllm'] = None; import cli, runpy; sys.argv = ['agent.py', 'x'];"
    )
    code += "sys.modules['transformers'] = None; runpy.run_path('agent.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "make setup" in done.stderr


# ---- A disk that is full (a tmpfs of 1 MB, where we may mount one)
def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path]).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        (tmp_path / "ballast").write_bytes(b"x" * (900 << 10))
        flags = ["--n", "40", "--out", str(tmp_path / "run")]
        done = scripted_evaluation(flags, text="9000")
        assert done.wait() == 2
        assert done.stderr.read().count(b"No space left") == 1
        (tmp_path / "ballast").unlink()
        before = len(evaluate.read_traces(tmp_path / "run"))
        assert 0 < before < 120 and scripted_evaluation(flags).wait() == 0
        assert len(evaluate.read_traces(tmp_path / "run")) == 120
    finally:
        subprocess.run(["umount", tmp_path])


# ---- Kills
def scripted_evaluation(flags, slowly="0", text="10"):
    there = {**os.environ, "PYTHONPATH": str(ROOT), "SLOWLY": slowly, "TEXT": text}
    command = [sys.executable, __file__, "--model", "m/x", "--limit", "3", *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=there, **quiet)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_an_evaluation_killed_anywhere_ends_like_the_unbroken_one(tmp_path, kills):
    rng = random.Random(kills)
    assert scripted_evaluation(["--n", "40", "--out", str(tmp_path / "a")]).wait() == 0
    flags = ["--n", "40", "--out", str(tmp_path / "b")]
    for _ in range(kills):
        process = scripted_evaluation(flags, slowly="0.05")
        while kills == 3 and not (tmp_path / "b" / "traces.jsonl").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.8, 3))
        process.kill()
        process.wait()
        process.stderr.close()
    assert scripted_evaluation(flags).wait() == 0
    whole, killed = (evaluate.read_traces(tmp_path / name) for name in "ab")
    assert whole == killed and len(whole) == 120
    rows = (tmp_path / "b" / "traces.jsonl").read_text().split()
    assert sum(row == '{"dataset":' for row in rows) == 120  # none twice


if __name__ == "__main__":  # an evaluation with a scripted agent, see `scripted_evaluation`
    from test_evaluate import ScriptedAgent

    class SlowAgent(ScriptedAgent):
        def rollout(self, jobs):
            for trace in super().rollout(jobs):
                time.sleep(float(os.environ["SLOWLY"]))
                trace.texts[0] += "x" * int(os.environ["TEXT"])
                yield trace

    @contextlib.contextmanager
    def open_agent(flags, problems, traces):
        yield SlowAgent()

    evaluate.open_agent = open_agent
    evaluate.resolve_model = lambda model, lora: (model, None)
    sys.argv[0] = "evaluate.py"
    cli.run_main(evaluate.main)
