"""The scripts beside the method: decontamination, pictures, a training's page, warm start."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "extras"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tool(name, *flags):
    command = [sys.executable, str(ROOT / "extras" / f"{name}.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


BENCH = [
    r"Compute $\dfrac{3}{7} + \frac{2}{5}$, and write the result as a common fraction.",
    "A train leaves the station at 60 miles per hour, and a second train leaves 45 minutes later "
    "at 80 miles per hour. After how many hours does the second train catch up?",
    "In how many ways can 12 different books be arranged on 3 shelves so that each shelf holds "
    "exactly 4 books?",
]
COPIES = [  # the test that must name it, the copy
    ("exact", r"Compute \(\frac{3}{7}+\tfrac{2}{5}\) and write the result as a common fraction!"),
    ("ngram", f"An old favourite. {BENCH[2]} Explain in detail, and generalise if you can do so."),
    ("jaccard", BENCH[1].replace("and a", "while a").replace("per hour. A", "an hour. A")),
    (
        "numbers",
        "One train departs the station moving 60 miles per hour. Some 45 minutes afterwards, one "
        "more train sets out behind it, doing 80 miles per hour. When, in hours, will it overtake?",
    ),
]
CLEAN = ["Compute $1/2 + 1/3$.", "In how many ways can 10 books be put into 2 boxes?"]


def test_planted_copies_are_removed_by_the_test_that_names_them(tmp_path):
    rows = [{"problem": text, "answer": "1", "kept": i} for i, (_, text) in enumerate(COPIES)]
    rows += [{"problem": text, "answer": "1", "kept": 9} for text in CLEAN]
    mine = write(tmp_path / "rows.jsonl", rows)
    bench = write(tmp_path / "bench.jsonl", [{"problem": text, "answer": "1"} for text in BENCH])
    out = tmp_path / "clean.jsonl"
    done = tool("decontaminate", "--dataset", mine, "--against", bench, "--out", out)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kept"] for row in kept] == [9, 9]
    removed = (tmp_path / "clean.removed.jsonl").read_text().splitlines()
    assert [json.loads(line)["test"] for line in removed] == [name for name, _ in COPIES]
    done = tool("decontaminate", "--dataset", mine, "--against", "nosuch", "--out", out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_the_picture_of_a_set(tmp_path):
    topics = ["Math -> Algebra -> Sums", "Math -> Algebra", "Math -> Geometry"]
    row = {"problem": "1?", "answer": "1"}
    rows = [{**row, "difficulty": i, "topic": topics[i % 3]} for i in range(9)]
    path = write(tmp_path / "rows.jsonl", rows)
    done = tool("dataset_stats", "--dataset", path, "--out", tmp_path / "s.png")
    assert done.returncode == 0 and (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG", done.stderr
    assert "Math -> Algebra" in done.stdout
    bare = write(tmp_path / "bare.jsonl", [row])
    done = tool("dataset_stats", "--dataset", bare, "--out", tmp_path / "s.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


# ---- The page of a training run
EVIL = "</script><img src=x onerror=document.title='owned'><b>"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def training_trace(tokens, mask, advantage, reward=0.0):
    own = [-0.5 if m else 0.0 for m in mask]
    trained = [-0.25] * sum(mask) if advantage else []  # what has no gradient is not computed
    trace = {"tokens": tokens, "mask": mask, "logprobs": own, "old_logprobs": trained}
    trace |= {"reward": reward, "rewards": {"accuracy": reward, "code": 1.0}, "weight": 0.125}
    return trace | {"advantage": advantage, "answer": EVIL, "finish": "eos"}


@pytest.fixture
def trained(tmp_path):
    """A run of three steps; the second was done twice, a kill has cut the third's group in two."""
    from dataclasses import asdict

    from grpo import Config

    run = tmp_path / "run"
    run.mkdir()
    config = {"flags": asdict(Config(steps=3)), "started": "today"}
    (run / "config.json").write_text(json.dumps(config))
    right = training_trace([EVIL, "\n", "42", "."], [1, 1, 0, 1], 0.75, 1.0)
    wrong, same = training_trace(["no"], [1], -0.75), training_trace(["a", "b"], [1, 0], 0.0)
    groups = [{"step": 1, "traces": [right, wrong]}, {"step": 2, "traces": [wrong]}]
    groups.append({"step": 2, "traces": [right, wrong, same]})
    lines = [json.dumps(group | {"question": EVIL, "gold": "42"}) for group in groups]
    (run / "groups.jsonl").write_text("\n" + "\n".join([*lines, lines[0][:40]]))
    rows = [{"step": i, "reward": i / 4, "accuracy": i / 4, "grad_norm": None} for i in (1, 2, 3)]
    write(run / "metrics.jsonl", rows)
    point = {"eval": 0.5, "eval_low": 0.25, "eval_high": 0.75}
    write(run / "eval.jsonl", [{"step": 0, **point}, {"step": 3, **point}])
    return run


def opened(page, folder, address="", script=""):
    """The page as a browser has it, after `script`."""
    text = page.read_text().replace("start();\n</script>", f"start();\n{script}</script>")
    (folder / "opened.html").write_text(text)
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom"
    options += f" --disable-background-networking --user-data-dir={folder}/browser"
    command = [CHROMIUM, *options.split(), f"file://{folder}/opened.html{address}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return dom.replace(dom[dom.index("<script>") : dom.rindex("</script>")], "")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_the_page_of_a_training_run(trained, tmp_path):
    done = tool("report", trained, "--out", tmp_path / "page")
    assert done.returncode == 0, done.stderr
    page = tmp_path / "page" / "training.html"
    text = page.read_text()
    assert EVIL not in text and text.count("http") == 1 and "http://www.w3.org/2000/svg" in text

    dom = opened(page, tmp_path, "#step=2&trace=1")
    assert "<title>Training: run</title>" in dom and "<img" not in dom
    assert dom.count("<svg viewBox") == 2  # reward and accuracy; the others have no values
    assert dom.count("<circle") == 2  # the evaluations
    assert dom.count('role="button"') == 3  # the later of the two second steps
    trace = dom[dom.index('<div class="trace">') :]
    assert trace.count('class="own"') == 3 and trace.count('class="tool"') == 1
    assert trace.count("rgba(var(--up)") == 3 and "--down" not in trace
    assert "multiplied by +0.0938" in dom and "a gradient on 4 of 7 tokens" in dom

    dom = opened(page, tmp_path, "#step=1&trace=2")
    trace = dom[dom.index('<div class="trace">') :]
    assert trace.count("rgba(var(--down)") == 1 and "becomes less likely" in dom
    dom = opened(page, tmp_path, "#step=2&trace=3")  # advantage 0: nothing is coloured
    trace = dom[dom.index('<div class="trace">') :]
    assert trace.count('class="still"') == 1 and "rgba" not in trace
    dom = opened(page, tmp_path, "#step=1&trace=1", "document.getElementById('fade').click();")
    shades = set(re.findall(r"--up\), ([\d.]+)", dom[dom.index('<div class="trace">') :]))
    assert shades == {"0.374"}  # 0.06 + 0.5 sqrt(1 - e^-0.5), and not the full 0.56

    clicks = "document.querySelectorAll('.card')[0].click();"
    clicks += "const event = new Event('pointerover', {bubbles: true});"
    clicks += "document.querySelectorAll('.trace span')[1].dispatchEvent(event);"
    dom = opened(page, tmp_path, "#step=2", clicks)
    tip = dom[dom.index('<div id="tip"') :]
    assert "log π -0.5000" in tip and "trainer's log π -0.2500" in tip and "+0.0938" in tip


def test_what_is_not_a_training_run_is_one_line(trained, tmp_path):
    (trained / "config.json").write_text('{"settings": {}}')
    empty = tmp_path / "empty"
    empty.mkdir()
    write(empty / "metrics.jsonl", [])
    for runs in ([trained], [trained, trained], [empty], [tmp_path / "nosuch"]):
        done = tool("report", *runs, "--out", tmp_path / "page")
        assert done.returncode == 2 and done.stderr.count("\n") == 1


# ---- The supervised stage
def test_a_demonstration_masks_what_the_tool_wrote():
    import warm_start
    from fakes import PROMPT, bpe

    from data import Problem

    tok = bpe(tags=True)
    solution = "Let me see.\n<tool_call>\nprint(1)\n</tool_call>\n```output\n<|im_end|>\n```\nSo."
    trace = warm_start.demonstration(tok, PROMPT, Problem("p", "q", "1"), solution)
    inserted = [i for i, m in zip(trace.ids, trace.mask) if not m]
    own = [i for i, m in zip(trace.ids, trace.mask) if m]
    assert tok.decode(inserted) == "\n```output\n<|im_end|>\n```\n"
    assert tok.eos_token_id not in inserted and own[-1] == tok.eos_token_id
    assert tok.decode(own[:-1]).endswith("</tool_call>So.") and trace.advantage == 1


@pytest.mark.slow
@pytest.mark.engine
def test_the_supervised_stage_teaches(tmp_path):
    out = tmp_path / "warm"
    done = tool("warm_start", "--limit", "64", "--problems", "16", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line]
    assert rows[-1]["cross_entropy"] < 0.8 * rows[0]["cross_entropy"]
    done = tool("warm_start", "--out", out)
    assert done.returncode == 2 and "exists" in done.stderr
