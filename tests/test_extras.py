"""The scripts beside the method: decontamination, pictures of a set, the supervised stage."""

import json
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
    (
        "minhash",
        BENCH[1].replace("and a second", "while a second").replace("per hour. A", "an hour. A"),
    ),
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
    removed = (tmp_path / "clean.jsonl.removed.jsonl", tmp_path / "clean.removed.jsonl")
    path = next(path for path in removed if path.exists())
    tests = [json.loads(line)["test"] for line in path.read_text().splitlines()]
    assert tests == [name for name, _ in COPIES]
    done = tool("decontaminate", "--dataset", mine, "--against", "nosuch", "--out", out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_the_picture_of_a_set(tmp_path):
    topics = ["Math -> Algebra -> Sums", "Math -> Algebra", "Math -> Geometry"]
    rows = [
        {"problem": f"{i}?", "answer": "1", "difficulty": 5 + i % 3, "topic": topics[i % 3]}
        for i in range(12)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    done = tool("dataset_stats", "--dataset", path, "--out", tmp_path / "s.png")
    assert done.returncode == 0 and (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG", done.stderr
    assert "Math -> Algebra" in done.stdout
    bare = write(tmp_path / "bare.jsonl", [{"problem": "1?", "answer": "1"}])
    done = tool("dataset_stats", "--dataset", bare, "--out", tmp_path / "s.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_demonstration_masks_what_the_tool_wrote():
    import warm_start
    from fakes import AGENT_PROMPT, bpe

    from data import Problem

    tok = bpe(tags=True)
    solution = "Let me see.\n<tool_call>\nprint(1)\n</tool_call>\n```output\n<|im_end|>\n```\nSo."
    trace = warm_start.demonstration(tok, AGENT_PROMPT, Problem("p", "q", "1"), solution)
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
