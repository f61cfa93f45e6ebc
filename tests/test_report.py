"""The plots and the page: what the page carries, that models' text stays text, and, in a headless Chromium where there is
one, that it opens, filters and unpacks, at 500 problems x 16 traces too."""

import base64
import json
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
EVIL = "</script><img src=x onerror=document.title='owned'><b>"


def trace(pid, sample, answer, finish="eos", calls=("ok",), words="thinking", code="print(6 * 7)"):
    parts = [
        ("model", f"{words}\n"),
        ("code", f"<tool_call>\n{code}\n</tool_call>"),
        ("output", "\n```output\n42\n```\n"),
        ("model", f"so \\boxed{{{answer}}}"),
    ]
    parts = parts if calls else [parts[0], parts[3]]
    return {
        "id": pid,
        "sample": sample,
        "answer": answer,
        "finish": finish,
        "tokens": 30 + sample,
        "all_tokens": 40 + sample,
        "box_tokens": 30,
        "calls": [{"status": c, "seconds": 0.1} for c in calls],
        "seconds": 1.5,
        "text": "".join(t for _, t in parts),
        "spans": [[k, len(t)] for k, t in parts],
    }


def write_run(folder, name, problems, traces, n):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"name": name, "n": n, "settings": {"sampling": {"end_at": "eos"}}})
    )
    (folder / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (folder / "traces.jsonl").write_text("".join(json.dumps(t) + "\n" for t in traces))
    return folder


PROBLEMS = [
    {"dataset": "set", "id": f"p{i}", "question": q, "answer": "42", "meta": {"level": i}}
    for i, q in enumerate(["What is 6 * 7?", "And 40 + 2?", EVIL])
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder of the report, what the command printed) for two small runs."""
    folder = tmp_path_factory.mktemp("report")
    plain = [
        trace(f"p{i}", s, a, calls=())
        for i, answers in enumerate([["42", "41"], ["1", "2"], ["42", EVIL]])
        for s, a in enumerate(answers)
    ]
    agent = [
        trace("p0", 0, "42"),
        trace("p0", 1, "42.0"),
        trace("p1", 0, None, finish="max_tokens"),
        trace("p1", 1, "42", calls=("error", "ok")),
        trace("p2", 0, "7", words=EVIL, code=f"print('{EVIL}')"),
        trace("p2", 1, "7"),
    ]
    a, b = (
        write_run(folder / "a", "plain", PROBLEMS, plain, 2),
        write_run(folder / "b", "tool", PROBLEMS, agent, 2),
    )
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "extras" / "report.py"),
            str(a),
            str(b),
            "--out",
            str(folder / "out"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "out"


def chunk(page, i):
    packed = re.search(rf'<script type="text/plain" id="d{i}">([^<]*)</script>', page)[1]
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_files(built):
    assert (built / "report.png").read_bytes().startswith(b"\x89PNG") and (
        built / "report.png"
    ).stat().st_size > 20_000
    page = (built / "report.html").read_text()
    assert (
        not re.search(r'(?:src|href)\s*=\s*"(?!#)', page) and "@import" not in page
    )  # nothing is loaded from elsewhere
    assert "majority@2" in page and "<svg" in page


def test_runs_on_different_sets_keep_their_columns():
    sys.path.insert(0, str(ROOT / "extras"))
    from report import tables

    made = tables("| | a: points | b: points |\n| :-- | --: | --: |\n| run |  | 50.0 \\| 2 |\n")
    assert re.findall("<t[hd]>(.*?)</t[hd]>", made) == [
        "",
        "a: points",
        "b: points",
        "run",
        "",
        "50.0 | 2",
    ]


def test_data(built):
    page = (built / "report.html").read_text()
    index = json.loads(re.search(r'id="index">(.*?)</script>', page, re.S)[1])
    assert [p["id"] for p in index] == ["p0", "p1", "p2"] and index[2]["question"] == EVIL
    assert [r["flags"] for r in index[0]["runs"]] == ["r w", "r r"]
    assert (
        index[1]["runs"][1]["flags"] == "N r!"
    )  # truncated without an answer; right with a failed call
    assert (
        index[0]["runs"][1]["votes"] == [["42", 2, True]] and index[0]["runs"][0]["credit"] == 0.5
    )
    (_, plain), (_, tool) = chunk(page, 0)
    assert [kind for kind, _ in tool[0]["parts"]] == ["model", "code", "output", "model"]
    assert (
        re.sub("<[^>]*>", "", tool[0]["parts"][1][1]) == "print(6 * 7)"
        and "<span" in tool[0]["parts"][1][1]
    )
    assert tool[0]["parts"][2][1] == "42" and len(plain[0]["parts"]) == 2


def test_code_is_escaped(built):
    code = chunk((built / "report.html").read_text(), 2)[1][1][0]["parts"][1][1]
    assert "<img" not in code and "&lt;img" in code


def test_mistakes_end_in_one_line(tmp_path):
    for flags in (["nowhere"], ["nowhere", "--max-chars", "3"]):
        done = subprocess.run(
            [sys.executable, str(ROOT / "extras" / "report.py"), *flags],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def browse(page: Path, script: str) -> dict:
    """Open a page in Chromium, run an async script body in it, return what it returns."""
    if not CHROMIUM:
        pytest.skip("needs Chromium: none is installed")
    probe = page.with_name(f"probe-{abs(hash(script))}.html")
    extra = f"""<pre id="probe"></pre><script>const pause = () => new Promise(r => setTimeout(r, 50));
        const set = async (id, v) => {{ document.getElementById(id).value = v; document.getElementById(id).dispatchEvent(new Event("input")); await pause(); }};
        const list = () => [...document.querySelectorAll(".problem")];
        (async () => {{ {script} }})().catch(e => ({{error: String(e)}})).then(x => document.getElementById("probe").textContent = btoa(unescape(encodeURIComponent(JSON.stringify(x)))));</script>"""
    probe.write_text(page.read_text().replace("</body>", extra + "</body>"))
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--virtual-time-budget=30000",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="probe">([\w+/=]+)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(base64.b64decode(found[1]))


def test_filters_in_a_browser(built):
    seen = browse(
        built / "report.html",
        """
        const ids = () => list().map(d => problems.find(p => cards.get(p) == d).id).join(" "), out = {all: ids()};
        for (const [id, v] of [["vote", "right"], ["vote", "wrong"], ["vote", "tie"], ["vote", "differ"], ["trace", "cut"], ["trace", "failed"], ["trace", "none"], ["search", "40 + 2"], ["search", "41"]]) {
          await set(id, v); out[id + " " + v] = ids(); await set(id, ""); }
        await set("run", "0"); await set("trace", "failed"); out["run 0 failed"] = ids(); await set("trace", ""); await set("vote", "right"); out["run 0 right"] = ids();
        return out;""",
    )
    assert seen == {
        "all": "p0 p1 p2",
        "vote right": "p0 p1",
        "vote wrong": "p1 p2",
        "vote tie": "p0 p2",
        "vote differ": "p0 p1 p2",
        "trace cut": "p1",
        "trace failed": "p1",
        "trace none": "p1",
        "search 40 + 2": "p1",
        "search 41": "p0",
        "run 0 failed": "",
        "run 0 right": "",
    }


def test_traces_in_a_browser(built):
    seen = browse(
        built / "report.html",
        """
        const d = list()[1]; d.open = true; await pause(); await pause(); const traces = [...d.querySelectorAll(".trace")]; const before = d.querySelectorAll("pre").length;
        for (const t of traces) t.open = true; await pause();
        const last = traces.at(-1), out = {traces: traces.length, before, kinds: [...last.querySelectorAll("pre")].map(e => e.className), code: last.querySelector("pre.code").textContent,
          coloured: last.querySelectorAll("pre.code span").length > 2, summary: last.querySelector("summary").textContent};
        d.open = false; await pause(); out.closed = d.querySelectorAll(".trace").length;
        await set("trace", "failed"); const e = list()[0]; e.open = true; await pause(); await pause(); out.filtered = e.querySelectorAll(".trace").length; out.hidden = e.textContent.includes("other traces are hidden");
        return out;""",
    )
    assert (
        seen["traces"] == 4 and seen["before"] == 0 and seen["closed"] == 0
    )  # drawn when opened, dropped when closed
    assert (
        seen["kinds"] == ["model", "code hl", "output", "model"]
        and seen["code"] == "print(6 * 7)"
        and seen["coloured"]
    )
    assert "#1 42" in seen["summary"] and "failed: error" in seen["summary"]
    assert seen["filtered"] == 1 and seen["hidden"]


def test_models_cannot_write_into_the_page(built):
    seen = browse(
        built / "report.html",
        """
        const d = list()[2]; d.open = true; await pause(); await pause(); for (const t of d.querySelectorAll(".trace")) t.open = true; await pause(); await pause();
        return {title: document.title, images: document.querySelectorAll("img").length, question: d.querySelector(".question").textContent};""",
    )
    assert seen == {"title": "Evaluation: plain, tool", "images": 0, "question": EVIL}


def test_pleasant_at_500_problems(tmp_path):
    import random

    rng = random.Random(0)
    words = [f"word{i}" for i in range(3000)]
    problems = [
        {
            "dataset": "big",
            "id": f"p{i}",
            "question": " ".join(rng.choices(words, k=40)),
            "answer": "42",
            "meta": {"level": i % 5},
        }
        for i in range(500)
    ]
    traces = [
        trace(
            p["id"],
            s,
            rng.choice(["42", "41", "40", None]),
            words=" ".join(rng.choices(words, k=300)),
            code=f"print({rng.randint(0, 10**6)})",
        )
        for p in problems
        for s in range(16)
    ]
    run = write_run(tmp_path / "run", "big", problems, traces, 16)
    started = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "extras" / "report.py"),
            str(run),
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        time.monotonic() - started < 60 and (tmp_path / "out" / "report.html").stat().st_size < 30e6
    )
    seen = browse(
        tmp_path / "out" / "report.html",
        """
        const t0 = performance.now(); await set("vote", "wrong"); const filter = performance.now() - t0, few = list().length; await set("vote", "");
        const t1 = performance.now(), d = list()[499]; d.open = true; while (!d.querySelector(".trace")) await pause();
        return {filter, few, opened: performance.now() - t1, nodes: document.querySelectorAll("*").length, traces: d.querySelectorAll(".trace").length};""",
    )
    assert 0 < seen["few"] < 500 and seen["traces"] == 16
    assert seen["nodes"] < 40_000 and seen["filter"] < 3000 and seen["opened"] < 3000
