"""The published path on a CPU: a small Qwen3 under its real tokenizer, through the command line.

And what a GPU changes, as far as a CPU can show it: what the engine is asked for. Nothing here has
run on a GPU; tests/gpu/check.py is for one.
"""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import test_grpo
from test_grpo import ScriptedAgent, rows, run, usual

import agent
import cli
import engine
import grpo
from cli import AgentFlags, UserError
from data import Problem, read_prompt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "extras"))
tiny_folder = test_grpo.tiny_folder  # a fixture
SHORT = "--few-shot none --max-tokens 48".split()


def command(script, *flags) -> str:
    """A script's standard output."""
    words = [sys.executable, script, *map(str, flags)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- The published path
@pytest.fixture(scope="module")
def trained(small_qwen, tmp_path_factory):
    """Three steps of preset paper; at three times the rate a model this small forgets the rest."""
    out = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--preset", "paper", "--model", small_qwen, "--dataset", small_qwen / "rows.jsonl"]
    flags += ["--steps", 3, "--lr", 3e-4, "--warmup", 0, *SHORT, "--out", out]
    command("grpo.py", *flags)
    return out


@pytest.mark.slow
def test_preset_paper_on_a_small_qwen(trained):
    config = json.loads((trained / "last" / "adapter_config.json").read_text())
    assert config["use_rslora"] and len(config["target_modules"]) == 14  # by their full names
    metrics = rows(trained / "metrics.jsonl")
    assert len(metrics) == 3 and all(row["grad_norm"] > 0 for row in metrics)
    assert metrics[-1]["kl"] > 1e-6  # the adapter has moved, and the engine with it:
    assert max(row["logprob_gap"] for row in metrics) < 1e-5
    traces = [trace for group in rows(trained / "groups.jsonl") for trace in group["traces"]]
    called = [trace for trace in traces if 0 in trace["mask"]]
    assert called
    for trace in called:  # one token of the vocabulary, which the model has sampled
        assert trace["tokens"][trace["mask"].index(0) - 1] == "</tool_call>"


@pytest.mark.slow
def test_an_adapter_alone_brings_its_base(trained):
    said = command("agent.py", "--model", trained / "last", *SHORT, "--json", "What is 6 * 7?")
    (trace,) = json.loads(said)["traces"]
    assert trace["answer"] == "42" and trace["finish"] == "eos"
    assert [(call["code"], call["output"]) for call in trace["calls"]] == [("print(6 * 7)", "42")]
    assert trace["text"].index("<think>") < trace["text"].index("```output")
    assert trace["text"].index("```output") < trace["text"].index("</think>")


@pytest.mark.slow
def test_merge_and_the_four_rows_with_a_base_model(trained, small_qwen, tmp_path):
    command("grpo.py", "--merge", trained)
    flags = ["--model", trained / "merged", "--base-model", small_qwen, "--n", 2, *SHORT]
    flags += ["--dataset", small_qwen / "rows.jsonl", "--out", tmp_path / "rows"]
    said = command("evaluate.py", "--ablation", "--prompt", "agent", *flags)  # for two of them
    (majority,) = [line for line in said.splitlines() if line.startswith("| majority@n")]
    assert majority.count("100.0 [100.0, 100.0]") == 4
    for row, calls in (("baseline", 0), ("grpo", 0), ("agent", 1), ("deepmath", 1)):
        lines = (tmp_path / "rows" / row / "traces.jsonl").read_text().splitlines()
        assert [len(json.loads(line)["calls"]) for line in lines if line] == [calls] * 8


# ---- What a GPU changes
class Asked(RuntimeError):
    """Raised in the engine's place."""


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), "bfloat16"), ((7, 5), "float16")])
def test_what_the_engine_is_asked_for_on_a_gpu(monkeypatch, capability, dtype):
    import torch

    asked = {}

    def arguments(**options):
        asked.update(options)
        raise Asked("seen")

    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    request = types.SimpleNamespace(LoRARequest=None)
    built = types.SimpleNamespace(from_engine_args=None)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    monkeypatch.setattr(sys.modules["vllm"], "EngineArgs", arguments, raising=False)
    monkeypatch.setattr(sys.modules["vllm"], "LLMEngine", built, raising=False)
    monkeypatch.setattr(engine, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(UserError, match="seen"):
        engine.load_engine("any", None, 6000, 16, AgentFlags(seed=7))
    assert (asked["dtype"], asked["max_num_seqs"]) == (dtype, 16)
    assert asked["max_num_batched_tokens"] == 8192 and asked["max_model_len"] == -1
    assert "enforce_eager" not in asked


def test_slots_are_what_the_run_needs_and_a_short_context_is_one_line(
    qwen_tokenizer, monkeypatch, capsys
):
    asked = []

    def load_engine(model, lora, max_len, slots, flags):
        asked.append((max_len, slots))
        config = types.SimpleNamespace(max_model_len=300)
        return types.SimpleNamespace(model_config=config), None

    monkeypatch.setattr(agent, "load_engine", load_engine)
    text = types.SimpleNamespace(max_position_embeddings=4096)
    config = types.SimpleNamespace(get_text_config=lambda: text)
    tokenizer = agent.from_pretrained("AutoTokenizer", qwen_tokenizer)
    loaded = {"AutoConfig": config, "AutoTokenizer": tokenizer}
    monkeypatch.setattr(agent, "from_pretrained", lambda kind, _: loaded[kind])
    flags = AgentFlags(model=str(qwen_tokenizer), agent=False, max_tokens=1000, batch=256)
    with agent.open_agent(flags, [Problem("p", "1 + 1?", None)], 16) as loop:
        assert loop.slots == asked[0][1] == 16 and asked[0][0] > 1000 and loop.max_len == 300
    assert capsys.readouterr().err.strip().startswith("traces are cut at 300 tokens")
    text.max_position_embeddings = 250  # not the cache is short, but the model
    with agent.open_agent(flags, [Problem("p", "1 + 1?", None)], 16) as loop:
        assert loop.max_len == 250
    assert capsys.readouterr().err.strip().startswith("traces are cut at 250 tokens")


def test_the_adapter_travels_outside_the_run(tiny_folder, tmp_path, monkeypatch):
    seen = []
    before = ScriptedAgent.__init__

    def begin(self, flags):
        before(self, flags)
        self.engine.add_lora = lambda request: seen.append(Path(request.lora_path))

    monkeypatch.setattr(ScriptedAgent, "__init__", begin)
    assert run(tmp_path / "run", *usual(tiny_folder, "--steps", "2", "--eval-every", "0")) == 0
    assert len(seen) == 2
    assert not any(path.is_relative_to(tmp_path) or path.exists() for path in seen)


def test_out_of_gpu_memory_names_the_remedy(tiny_folder, tmp_path, monkeypatch, capsys):
    import torch

    def update(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(grpo, "update", update)
    flags = usual(tiny_folder, "--eval-every", "0")
    with pytest.raises(SystemExit) as end:
        cli.run_main(lambda: run(tmp_path / "run", *flags))
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "out of GPU memory" in said and "--micro-tokens" in said


# ---- The published prompt
def test_the_published_prompt_is_read_out_of_a_clone(tmp_path):
    package = tmp_path / "clone" / "deep_math"
    package.mkdir(parents=True)
    form = "Use <tool_call>.\n\n{examples}\n\nBox it: \\\\boxed{{}}."
    code = 'import nothing_here\nsimple_template = "Q: {question}"\n'
    (package / "prompts.py").write_text(f'{code}agent_math_instruction = """{form}"""\n')
    (package / "fewshot.txt").write_text("Question: {1}?\n\n\\boxed{1}\n")
    out = tmp_path / "published.json"
    command("extras/published_prompt.py", tmp_path / "clone", "--out", out)
    system, user = read_prompt(AgentFlags(prompt=str(out))).messages
    assert system["content"].startswith("Use <tool_call>.\n\nQuestion: {1}?\n\n\\boxed{1}\n")
    assert system["content"].endswith("Box it: \\boxed{}.") and user["content"] == "Q: {question}"
    from published_prompt import read_clone

    with pytest.raises(UserError, match="no clone"):
        read_clone(tmp_path)
