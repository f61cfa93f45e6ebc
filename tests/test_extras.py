"""The optional tools: decontamination against planted copies, the picture of a dataset, the supervised stage."""

import json
import random
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "extras"))

import agent  # noqa: E402
import compare_training  # noqa: E402
import data  # noqa: E402
import dataset_stats  # noqa: E402
import decontaminate  # noqa: E402
import warm_start  # noqa: E402
from data import arithmetic  # noqa: E402


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def tool(name, *args, cwd=None):
    return subprocess.run(
        [sys.executable, str(ROOT / "extras" / f"{name}.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=cwd,
    )


# ---------------------------------------------------------------------------------------------------------------
# decontaminate.py

BENCH = [
    r"Compute $\dfrac{3}{7} + \frac{2}{5}$, and write the result as a common fraction in lowest terms.",
    "A train leaves the station at 60 miles per hour, and a second train leaves 45 minutes later at 80 miles per hour. After how many hours does the second train catch up?",
    r"Let $f(x) = x^3 - 6x^2 + 11x - 6$. Find the sum of the squares of the roots of $f$.",
    "In how many ways can 12 different books be arranged on 3 shelves so that each shelf holds exactly 4 books?",
    r"Determine all $x$ for which $\left| 2x - 5 \right| \leq 17$.",
]
COPIES = {
    "exact": [
        BENCH[2],
        r"Compute \(\frac{3}{7}+\tfrac{2}{5}\) and write the result as a common fraction, in lowest terms!",
        r"DETERMINE all x for which $|2x-5| \le 17$",
    ],
    "ngram": [
        "Here is an old favourite of mine. "
        + BENCH[3]
        + " Explain your reasoning in detail, and generalise to n books on k shelves if you are able to do so."
    ],
    "minhash": [
        "A train leaves the station at 60 miles per hour, while a second train leaves 45 minutes later at 80 miles an hour. After how many hours will the "
        "second train catch up?"
    ],
    "numbers": [
        "One train departs the station moving 60 miles per hour. Some 45 minutes afterwards another train sets out behind it, doing 80 miles per hour. "
        "When, in hours, will it overtake?"
    ],
}
CLEAN = [
    r"Let $f(x) = x^3 - 7x^2 + 14x - 8$. Find the product of the roots of $f$.",
    "In how many ways can 10 different books be put into 2 boxes?",
    "A bus leaves at 50 km per hour. How far does it get in 3 hours?",
    r"Compute $\frac{1}{2} + \frac{1}{3}$.",
    "Find the greatest common divisor of 84 and 36.",
]


@pytest.fixture(scope="module")
def index():
    made = decontaminate.Index(0.5, 0.5, 0.3)
    for question in BENCH:
        made.add("bench", question)
    return made


@pytest.mark.parametrize(
    "test, question", [(test, q) for test, questions in COPIES.items() for q in questions]
)
def test_planted_copies_are_found_by_the_test_that_names_them(index, test, question):
    found = index.match(question)
    assert found and found[0] == test and 0.3 <= found[1] <= 1


@pytest.mark.parametrize("question", CLEAN)
def test_other_problems_are_kept(index, question):
    assert index.match(question) is None


def test_rows_report_and_columns(tmp_path):
    planted = [q for questions in COPIES.values() for q in questions]
    rows = [
        {"problem": q, "final_answer": str(i), "difficulty": i}
        for i, q in enumerate([*CLEAN, *planted])
    ]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "bench.jsonl", [{"problem": q, "answer": "1"} for q in BENCH])
    done = tool(
        "decontaminate",
        "--dataset",
        tmp_path / "train.jsonl",
        "--against",
        tmp_path / "bench.jsonl",
        "--out",
        tmp_path / "clean.jsonl",
    )
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert [r["question"] for r in kept] == CLEAN and kept[1] == {
        "question": CLEAN[1],
        "answer": "1",
        "difficulty": 1,
    }
    removed = [
        json.loads(line) for line in (tmp_path / "clean.removed.jsonl").read_text().splitlines()
    ]
    assert Counter(r["test"] for r in removed) == {
        test: len(questions) for test, questions in COPIES.items()
    }
    assert all(
        r["match"] in BENCH and r["benchmark"] == "bench" and r["question"] in planted
        for r in removed
    )
    assert "6 of 11 removed" in done.stdout and "bench: 5 of 5 questions met" in done.stdout
    assert data.load(str(tmp_path / "clean.jsonl"))[0].answer == "0"  # grpo.py can read it


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--against", "nowhere.jsonl"], "no such file"),
        (["--jaccard", "0"], "--jaccard must be"),
        (["--dataset", "nothing"], "unknown dataset"),
    ],
)
def test_decontaminate_bad_flags(tmp_path, flags, message):
    write(tmp_path / "a.jsonl", [{"problem": "q", "answer": "1"}])
    given = {
        "--dataset": "a.jsonl",
        "--against": "a.jsonl",
        "--out": "c.jsonl",
        **dict(zip(flags[::2], flags[1::2], strict=True)),
    }
    done = tool("decontaminate", *[x for pair in given.items() for x in pair], cwd=tmp_path)
    assert (
        done.returncode == 2
        and message in done.stderr
        and done.stderr.count("\n") == 1
        and not (tmp_path / "c.jsonl").exists()
    )


# ---------------------------------------------------------------------------------------------------------------
# dataset_stats.py


def test_rings_place_children_inside_their_parents():
    paths = [("M", "A", "x")] * 2 + [("M", "A", "y")] * 1 + [("M", "B")] * 3 + [("M", "C", "x")] * 2
    first, second, third = dataset_stats.rings(paths, 3)
    assert first == [("M", 8, 0.0, "M")]
    assert second == [("A", 3, 0.0, "M"), ("B", 3, 3 / 8, "M"), ("C", 2, 6 / 8, "M")]
    assert third == [("x", 2, 0.0, "M"), ("y", 1, 2 / 8, "M"), ("x", 2, 6 / 8, "M")]


def test_the_picture_and_the_counts(tmp_path):
    rows = [
        {
            "question": f"q{i}",
            "final_answer": "1",
            "difficulty": 3 + i % 4 * 0.5,
            "topic": f"Mathematics -> {'Algebra' if i % 3 else 'Geometry'} -> T{i % 5}",
        }
        for i in range(60)
    ]
    write(tmp_path / "d.jsonl", rows)
    done = tool("dataset_stats", "--dataset", tmp_path / "d.jsonl", "--out", tmp_path / "s.png")
    assert done.returncode == 0, done.stderr
    assert (
        (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
        and re.search(r"40  Mathematics -> Algebra\n", done.stdout)
        and re.search(r"15  difficulty 3.5\n", done.stdout)
    )
    done = tool(
        "dataset_stats",
        "--dataset",
        tmp_path / "d.jsonl",
        "--difficulty-key",
        "x",
        "--topic-key",
        "y",
        "--out",
        tmp_path / "n.png",
    )
    assert (
        done.returncode == 2
        and "name them with" in done.stderr
        and not (tmp_path / "n.png").exists()
    )


# ---------------------------------------------------------------------------------------------------------------
# compare_training.py


def test_training_runs_side_by_side(tmp_path):
    assert compare_training.smooth([0.0, 0.0, 1.0, 1.0, 1.0, 0.0], 3) == [
        0.0,
        1 / 3,
        2 / 3,
        1.0,
        2 / 3,
        0.5,
    ]
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        write(
            tmp_path / run / "metrics.jsonl",
            [{"step": i, "accuracy": i / 9, "code_rate": 1.0, "length": 60.0} for i in range(1, 9)],
        )
    done = tool("compare_training", "a", "b", "--out", "c.png", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG", done.stderr
    (tmp_path / "b" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 0.1}\n'
    )  # a run of warm_start.py
    for run in ("b", "none"):
        done = tool("compare_training", "a", run, "--out", "d.png", cwd=tmp_path)
        assert (
            done.returncode == 2
            and f"{run}: no metrics.jsonl" in done.stderr
            and done.stderr.count("\n") == 1
            and not (tmp_path / "d.png").exists()
        )


# ---------------------------------------------------------------------------------------------------------------
# warm_start.py


class Words:
    """A tokenizer of single characters, whose last id ends a turn."""

    eos_token_id, chat_template, all_special_tokens, added_tokens_decoder = 1, None, [], {}
    bos_token_id = None

    def encode(self, text, add_special_tokens):
        return [ord(c) for c in text]


def test_a_demonstration_masks_what_the_tool_wrote():
    problem = arithmetic("train", 1)[0]
    shown = warm_start.demonstration(
        Words(),
        data.Prompt("none", (), False),
        problem,
        warm_start.pieces_of(problem.meta["solution"]),
        500,
    )
    t = shown.trace
    assert (
        "".join(map(chr, t.ids[:-1])) == problem.meta["solution"]
        and t.ids[-1] == 1
        and t.mask[-1] == 1
    )
    masked = "".join(chr(i) for i, m in zip(t.ids, t.mask, strict=True) if not m)
    assert (
        masked == f"\n```output\n{problem.answer}\n```\n"
        and t.sampled == sum(t.mask)
        and shown.advantage == 1.0
    )
    assert (
        warm_start.demonstration(
            Words(), data.Prompt("none", (), False), problem, [("long" * 200, True)], 500
        )
        is None
    )


def test_pieces_of_solutions_with_several_calls_and_with_none():
    call, output = "<tool_call>\nprint(1)\n</tool_call>", "\n```output\n1\n```\n"
    assert warm_start.pieces_of(f"a {call}{output}b {call}{output}c") == [
        (f"a {call}", True),
        (output, False),
        (f"b {call}", True),
        (output, False),
        ("c", True),
    ]
    assert warm_start.pieces_of("plain ```output\nnot after a call\n```\n") == [
        ("plain ```output\nnot after a call\n```\n", True)
    ]


def test_solutions_come_from_correct_traces_only(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps({"name": "r", "n": 3, "settings": {"sampling": {"end_at": "eos"}}})
    )
    write(
        run / "problems.jsonl",
        [{"dataset": "d", "id": "p", "question": "6 * 7?", "answer": "42", "meta": {}}],
    )
    rows = []
    for sample, (answer, finish) in enumerate([("42", "eos"), ("41", "eos"), ("42", "max_tokens")]):
        parts = [
            ("model", "see "),
            ("code", "<tool_call>\n6*7\n</tool_call>"),
            ("output", "\n```output\n42\n```\n"),
            ("model", f"\\boxed{{{answer}}}"),
        ]
        rows.append(
            {
                "id": "p",
                "sample": sample,
                "answer": answer,
                "finish": finish,
                "tokens": 9,
                "all_tokens": 12,
                "box_tokens": 9,
                "calls": [],
                "seconds": 1.0,
                "text": "".join(t for _, t in parts),
                "spans": [[k, len(t)] for k, t in parts],
            }
        )
    write(run / "traces.jsonl", rows)
    found = warm_start.solutions(types.SimpleNamespace(from_traces=[run], seed=0, limit=None))
    assert [(p.question, pieces) for p, pieces in found] == [
        (
            "6 * 7?",
            [
                ("see ", True),
                ("<tool_call>\n6*7\n</tool_call>", True),
                ("\n```output\n42\n```\n", False),
                ("\\boxed{42}", True),
            ],
        )
    ]


def test_arithmetic_solutions_print_their_answers():
    from sandbox import Sandbox

    problems = arithmetic("train", 135) + random.Random(0).sample(arithmetic("train", 3000), 45)
    with Sandbox() as box:
        session = box.session()
        for p in problems:
            ((code, shown),) = re.findall(
                r"<tool_call>\n(.*?)\n</tool_call>\n```output\n(.*?)\n```\n",
                p.meta["solution"],
                re.S,
            )
            result = session.run(code)
            assert (result.status, result.output, shown) == ("ok", p.answer, p.answer), p
            assert p.meta["solution"].endswith(f"\\boxed{{{p.answer}}}.")


def test_warm_start_bad_flags(tmp_path):
    write(tmp_path / "a.jsonl", [{"problem": "q", "answer": "1"}])
    for flags, message in (
        (["--dataset", tmp_path / "a.jsonl"], "no column with solutions"),
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--from-traces", tmp_path], "is not a run"),
    ):
        done = tool("warm_start", "--out", tmp_path / "w", *flags)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )


@pytest.mark.engine
def test_warm_start_teaches_and_its_adapter_is_loaded(tmp_path):
    """Three steps on the embedded model: the cross-entropy of its solutions falls, and grpo.py's own loader takes the result."""
    done = tool(
        "warm_start",
        "--model",
        "embedded",
        "--where",
        "family=product",
        "--limit",
        "24",
        "--problems",
        "8",
        "--out",
        tmp_path / "w",
    )
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in rows] == [1, 2, 3] and rows[2]["cross_entropy"] < rows[0][
        "cross_entropy"
    ] / 2
    import torch

    import grpo

    args = grpo.parse_flags(["--preset", "mini", "--model", "embedded"])
    folder, _ = agent.resolve_model("embedded", "none")
    tokenizer, prompt = agent.load_tokenizer(folder), data.read_few_shot("turns", "turns")
    model = grpo.load_trainer(args, folder, tmp_path / "w" / "adapter")
    unseen = [p for p in arithmetic("test", 90) if p.meta["family"] == "product"][:4]
    batch = [
        warm_start.demonstration(
            tokenizer, prompt, p, warm_start.pieces_of(p.meta["solution"]), 256
        ).tokens
        for p in unseen
    ]
    with torch.no_grad():
        trained = torch.cat(grpo.logprobs_of(model, batch, 1.0)).mean().item()
        with model.disable_adapter():
            untrained = torch.cat(grpo.logprobs_of(model, batch, 1.0)).mean().item()
    assert (
        0 < -trained < -untrained / 5
    )  # nats per token, on problems that it was not shown (seen: 0.0005 and 0.035)
    assert (
        "exists"
        in tool("warm_start", "--model", "embedded", "--limit", "8", "--out", tmp_path / "w").stderr
    )
