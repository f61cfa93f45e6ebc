"""A hub on the loopback: what `datasets` and `huggingface_hub` ask for, answered with tiny files.

Other processes, with HF_ENDPOINT set to it, load every set by its name, a model and an adapter. The
names of the columns are those of the real sets, the rows are ours.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import SETS, problem_id

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_loopback"
Q = "How many are {i} and 1?"
TIR = {"problem": Q, "expected_answer": "7", "problem_type": "has_answer_extracted"}

# hub id -> (split, a row): {i} is the row's number, "7" the gold answer unless it is in WRITTEN
TABLES = {
    "HuggingFaceH4/MATH-500": ("test", {"problem": Q, "solution": "x", "answer": "7", "level": 3}),
    "HuggingFaceH4/aime_2024": ("train", {"id": 1, "problem": Q, "answer": "073", "year": "2024"}),
    "math-ai/aime25": ("test", {"problem": "Say: " + Q, "answer": "7", "id": "0"}),
    "MathArena/hmmt_feb_2025": ("train", {"problem_idx": 1, "problem": Q, "answer": "7"}),
    "MathArena/hmmt_feb_2024": ("train", {"problem_idx": 1, "problem": Q, "answer": "7"}),
    "cais/hle": ("test", {"question": Q, "image": "", "answer": "7", "category": "Math"}),
    "math-ai/amc23": ("test", {"id": 0, "question": Q, "answer": 27.0, "url": "x"}),
    "math-ai/minervamath": ("test", {"question": Q, "answer": "7"}),
    "math-ai/olympiadbench": ("test", {"question": Q, "final_answer": ["$2$", "3"]}),
    "openai/gsm8k": ("test", {"question": Q, "answer": "so #### 1,234"}),
    "ChilleD/SVAMP": ("test", {"Question": "Many?", "question_concat": Q, "Answer": "7"}),
    "nvidia/OpenMathReasoning": ("tir", TIR),
    "zwhe99/DeepMath-103K": ("train", {"question": Q, "final_answer": "7", "difficulty": 5.0}),
    "made/renamed": ("test", {"task": Q, "answer": "7"}),
}
ONLY = {"openmathreasoning": {"limit": 3}}  # more than one would download
WRITTEN = {"aime24": "073", "amc23": "27", "olympiadbench": "2, 3", "gsm8k": "1234"}
OTHERS = {  # rows that do not belong to the set by its name
    "cais/hle": [{"category": "Law"}, {"image": "data:image/png"}],
    "nvidia/OpenMathReasoning": [{"problem_type": "no_answer_extracted", "expected_answer": ""}],
}


def parquet(rows) -> bytes:
    import pandas

    return pandas.DataFrame(rows).to_parquet()


def dataset_files(name: str) -> dict[str, bytes]:
    split, row = TABLES[name]
    rows = []
    for i, other in enumerate([{}, {}, {}, *OTHERS.get(name, [])]):
        filled = {k: v.replace("{i}", str(i)) if type(v) is str else v for k, v in row.items()}
        rows.append(filled | other)
    files = {f"data/{split}-00000-of-00001.parquet": parquet(rows)}
    if name == "openai/gsm8k":  # two configurations, so that one must be named
        files = {"main/1.parquet": parquet(rows), "other/1.parquet": parquet(rows[:1])}
        form = "- {{config_name: {0}, data_files: [{{split: test, path: {0}/*}}]}}\n"
        configs = form.format("main") + form.format("other")
        files["README.md"] = f"---\nconfigs:\n{configs}---\n".encode()
    return files


def about(content: bytes) -> dict:
    return {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@pytest.fixture(scope="module")
def hub():
    from safetensors.numpy import save

    repositories = {f"datasets/{name}": dataset_files(name) for name in TABLES}
    adapter = b'{"base_model_name_or_path": "made/model", "r": 4, "peft_type": "LORA"}'
    weights = {"adapter_config.json": adapter, "adapter_model.safetensors": save({})}
    repositories["models/made/adapter"] = weights
    repositories["models/made/model"] = {"config.json": b"{}", "model.safetensors": save({})}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_): ...

        def answer(self, code, body=b"", **headers):
            self.send_response(code)
            for key, value in {**headers, "Content-Length": len(body)}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, value, code=200, **headers):
            self.answer(code, json.dumps(value).encode(), **headers)

        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/")
            kind = "datasets" if "datasets/" in path else "models"
            parts = path.removeprefix("api/").removeprefix(f"{kind}/").split("/")
            name, verb, rest = "/".join(parts[:2]), *(parts[2:3] or [""]), "/".join(parts[4:])
            files = repositories.get(f"{kind}/{name}")
            if files is None:
                return self.json({}, 404, X_Error_Code="RepoNotFound")
            if verb == "resolve":
                if name == "cais/hle" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.json({}, 401, X_Error_Code="GatedRepo")
                return self.file(files.get(rest))
            if verb == "tree":
                found = [{"type": "file", "path": f, **about(files[f])} for f in files]
                folders = {os.path.dirname(f) for f in files} - {""}
                found += [{"type": "directory", "path": f, "oid": "", "size": 0} for f in folders]
                return self.json(found)
            siblings = [{"rfilename": file} for file in files]
            self.json({"id": name, "sha": COMMIT, "siblings": siblings, "gated": False, "tags": []})

        do_HEAD = do_GET

        def file(self, content):
            if content is None:
                return self.json({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            headers = {"ETag": f'"{about(content)["oid"]}"', "X_Repo_Commit": COMMIT}
            if asks := self.headers.get("Range"):
                first, _, last = asks.removeprefix("bytes=").partition("-")
                part = content[int(first) : int(last or len(content)) + 1]
                where = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
                return self.answer(206, part, Content_Range=where, **headers)
            self.answer(200, content, Accept_Ranges="bytes", **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def elsewhere(code: str, url: str, home: Path, **environment):
    """What a process that knows this hub only prints, as JSON."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    there = kept | {"HF_ENDPOINT": url, "HF_HOME": str(home)} | environment
    command = [sys.executable, "-c", f"import json, sys\nfrom cli import *\n{code}"]
    done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LOAD = """
from data import load_problems
found = []
for flags in json.loads({cases!r}):
    try:
        found.append([[p.id, p.answer] for p in load_problems(DataFlags(**flags))])
    except UserError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_every_set_by_name(hub, tmp_path):
    names = [name for name in SETS if name != "arithmetic"]
    parts = [part for name in names for part in SETS[name]]
    assert {part["place"].split(":")[0] for part in parts} < set(TABLES)
    cases = json.dumps([{"dataset": name} | ONLY.get(name, {}) for name in names])
    found = elsewhere(LOAD.format(cases=cases), hub, tmp_path, HF_TOKEN=TOKEN)
    for name, problems in zip(names, found, strict=True):
        form = "Say: " + Q if name == "aime25" else Q
        expected = [[problem_id(form.format(i=i)), WRITTEN.get(name, "7")] for i in range(3)]
        if name != "aime":
            assert problems == expected, (name, problems)
    both = [found[names.index(name)] for name in ("aime24", "aime25")]
    assert found[names.index("aime")] == both[0] + both[1]
    # With --limit a set is not downloaded whole, but read through ranges.
    kept = [path.name for path in tmp_path.rglob("*.parquet")]
    assert "test-00000-of-00001.parquet" in kept and "tir-00000-of-00001.parquet" not in kept


FAILURES = [
    ({"dataset": "hle"}, "gated"),
    ({"dataset": "math500", "split": "nosuch"}, "nosuch"),
    ({"dataset": "openai/gsm8k"}, "Config name is missing"),
    ({"dataset": "made/renamed"}, "among task, answer: name it with --question-key"),
    ({"dataset": "made/nosuch"}, "doesn't exist"),
]


def test_what_goes_wrong_is_one_line(hub, tmp_path):
    cases = json.dumps([flags for flags, _ in FAILURES])
    for (flags, word), said in zip(FAILURES, elsewhere(LOAD.format(cases=cases), hub, tmp_path)):
        assert isinstance(said, str) and word in said and "\n" not in said, (flags, said)


def test_an_adapter_repository_alone_loads_its_base(hub, tmp_path):
    code = "from engine import resolve_model as get\n"
    code += "print(json.dumps([get('made/adapter', None), get('made/model', None)]))"
    (base, adapter), other = elsewhere(code, hub, tmp_path)
    assert base == "made/model" and (Path(adapter) / "adapter_config.json").is_file()
    assert other == ["made/model", None]
