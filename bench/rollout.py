"""The same 64 problems through four loops, with one model, one prompt, one budget and the same snippets, in one run.

    ours   agent.py's rollout: a trace whose snippet runs leaves the batch, the others go on
    (b)    one trace at a time, the published way: the engine waits for every snippet, and smolagents' interpreter runs
           each of them in a process of its own
    (c)    rounds: all traces decode to their next call, all snippets run, and again (our engine, our sandbox)
    (d)    rounds on transformers' `generate`, the adapter folded into the weights (our sandbox)

One snippet in eight takes two seconds more: `--slow wait` (default) only waits, as a snippet on a core that the engine does
not need; `--slow compute` adds up numbers, and so takes a core away from an engine on the CPU (the default shows ours and
(c) with these too); `--slow none`. Which ones is decided by the snippet's text, so that it is the same for all.

    python bench/rollout.py [--slow wait|compute|none] [--problems 64] [--scale 1,2,4,...,512] [--skip b,d]

Tokens are those the model wrote. idle: share of the wall time in which the engine was not stepping though work was left.
batch: traces in flight, mean over the engine's steps. Needs smolagents for (b): bench/requirements.txt.
"""

import argparse
import functools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import types
import zlib
from datetime import date
from pathlib import Path

ROOT, HERE = Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent
sys.path[:] = [
    str(ROOT),
    *(path for path in sys.path if Path(path or ".").resolve() != HERE),
    str(HERE / ".packages"),
]

from agent import add_model_flags, has_cuda, open_agent, prepare_environment, resolve_model  # noqa: E402
from data import arithmetic, run_main  # noqa: E402
from sandbox import ALLOWED, Result, Session  # noqa: E402

EXTRA = {
    "none": "",
    "compute": "sum(range(150_000_000))\n",
    "wait": "import statistics\nstatistics.sys.modules['time'].sleep(2)\n",
}
PUBLISHED_EXTRA = {**EXTRA, "wait": "import time\ntime.sleep(2)\n"}


def slowed(code: str, extra: str) -> str:
    return extra + code if zlib.crc32(code.encode()) % 8 == 0 else code


# ---------------------------------------------------------------------------------------------------------------
# The loops. Each takes (agent, jobs) and gives the finished traces; what a trace is, when it ends and what is inserted
# is agent.py's in all of them.


def ours(agent, jobs):
    return list(agent.rollout(jobs))


def decode(agent, decoding: dict) -> list:
    """Decode all requests to their next call or end: [(trace, move)]"""
    moves = []
    while decoding:
        for output in agent.engine.step():
            trace = decoding.get(output.request_id)
            if trace is None:
                continue
            new = output.outputs[0]
            move = agent.next_move(trace, new, agent.take(trace, new))
            if move == "decode":
                continue
            del decoding[output.request_id]
            if not output.finished:
                agent.engine.abort_request([output.request_id])
            if move != "again" or not agent.request(trace, decoding):
                moves.append((trace, move))
    return moves


def rounds(agent, jobs, decode=decode):
    traces, decoding, done = [agent.begin(*job) for job in jobs], {}, []
    for trace in traces:
        agent.request(trace, decoding)
    while decoding:
        calls = {}
        for trace, move in decode(agent, decoding):
            if move == "call":
                trace.session = trace.session or agent.box.session()
                calls[trace.session] = trace
            else:
                trace.finish = trace.finish or move
                done.append(agent.end(trace))
        for session, trace in calls.items():
            session.submit(agent_code(trace), timeout=agent.settings.snippet_seconds)
        while agent.box.pending:
            for session, result in agent.box.poll(0.2):
                trace = calls[session]
                if not agent.insert(trace, result) or not agent.request(trace, decoding):
                    done.append(agent.end(trace))
    return done


def agent_code(trace) -> str:
    from agent import snippet_in

    return snippet_in(trace.segment[trace.code_at :])


def interpret(code: str, connection) -> None:
    """In a process of its own: smolagents' interpreter of Python."""
    from smolagents.local_python_executor import LocalPythonExecutor

    try:
        executor = LocalPythonExecutor([*ALLOWED, *(name + ".*" for name in ALLOWED), "time"])
        executor.send_tools({})
        done = executor(code)
        value = "" if done.output is None else str(done.output)
        connection.send(("ok", (done.logs or "") or value))
    except Exception as error:  # noqa: BLE001  whatever the snippet raised
        connection.send(("error", str(error).splitlines()[-1]))


def one_at_a_time(agent, jobs, extra: str):
    import smolagents.local_python_executor  # noqa: F401  before the forks, as a long-running program has it

    done, decoding = [], {}
    for job in jobs:
        trace = agent.begin(*job)
        agent.request(trace, decoding)
        while decoding:
            ((trace, move),) = decode(agent, decoding)
            if move != "call":
                trace.finish = trace.finish or move
                break
            mine, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(
                target=interpret, args=(slowed(agent_code(trace), extra), theirs)
            )
            started = time.monotonic()
            process.start()
            theirs.close()
            try:
                status, output = (
                    mine.recv()
                    if mine.poll(agent.settings.snippet_seconds)
                    else ("timeout", "TimeoutError")
                )
            except EOFError:
                status, output = "crashed", "the interpreter died"
            process.kill(), process.join()
            result = Result(status, output.strip(), time.monotonic() - started)
            if not agent.insert(trace, result) or not agent.request(trace, decoding):
                break
        done.append(agent.end(trace))
    return done


class Transformers:
    """Stands in for `decode`: the traces that were requested, through `generate`, in batches of `batch`."""

    def __init__(self, folder: str, lora: str | None, batch: int):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16 if has_cuda() else torch.float32
        )
        model = PeftModel.from_pretrained(model, lora).merge_and_unload() if lora else model
        self.model, self.batch = model.to("cuda" if has_cuda() else "cpu").eval(), batch
        self.seconds, self.sizes = 0.0, []

    def __call__(self, agent, decoding: dict) -> list:
        traces, moves = list(decoding.values()), []
        decoding.clear()
        for at in range(0, len(traces), self.batch):
            moves += self.generate(agent, traces[at : at + self.batch])
        return moves

    def generate(self, agent, traces: list) -> list:
        import torch
        from transformers import StoppingCriteriaList

        s, tokenizer, started = agent.settings, agent.tokenizer, time.monotonic()
        contexts = [trace.prompt_ids + trace.ids for trace in traces]
        width, pad = max(map(len, contexts)), tokenizer.eos_token_id
        ids = torch.tensor(
            [[pad] * (width - len(c)) + c for c in contexts], device=self.model.device
        )
        seen = torch.tensor(
            [[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=self.model.device
        )
        moves: list = [None] * len(traces)

        def stop(sequences, scores, **_):  # every step: which rows are at a call or at their end
            for row, trace in enumerate(traces):
                if moves[row] is None:
                    token = int(sequences[row, -1])
                    ended = token == tokenizer.eos_token_id or token in agent.close_ids
                    new = types.SimpleNamespace(
                        token_ids=[token],
                        logprobs=[{token: types.SimpleNamespace(logprob=0.0)}],
                        finish_reason="stop" if ended else None,
                    )
                    move = agent.next_move(trace, new, agent.take(trace, new))
                    moves[row] = None if move == "decode" else move
                    if moves[row] is None and trace.sampled >= s.max_tokens:
                        moves[row] = "max_tokens"
            self.sizes.append(sum(m is None for m in moves))
            return torch.tensor([m is not None for m in moves], device=sequences.device)

        with torch.no_grad():
            self.model.generate(
                input_ids=ids,
                attention_mask=seen,
                do_sample=True,
                temperature=s.temperature,
                top_p=s.top_p,
                top_k=s.top_k,
                max_new_tokens=s.max_tokens,
                stopping_criteria=StoppingCriteriaList([stop]),
                pad_token_id=pad,
            )
        self.seconds += time.monotonic() - started
        return [(trace, move or "max_tokens") for trace, move in zip(traces, moves, strict=True)]


# ---------------------------------------------------------------------------------------------------------------
# Measuring


class Meter:
    """Wraps the engine's step: seconds of each, and how many traces it advanced."""

    def __init__(self, engine):
        self.inner = engine.step
        self.reset()
        engine.step = self

    def reset(self):
        self.steps, self.sizes = [], []

    def __call__(self):
        started = time.perf_counter()
        outputs = self.inner()
        self.steps.append(time.perf_counter() - started)
        self.sizes.append(len(outputs))
        return outputs


def measure(name: str, loop, agent, jobs, meter, slow: str, inner: bool = True) -> dict:
    """One row; `inner`: the loop runs its snippets in our sandbox, and there they are slowed."""
    submit = Session.submit
    Session.submit = lambda self, code, timeout: submit(
        self, slowed(code, EXTRA[slow] if inner else ""), timeout
    )
    agent.engine.reset_prefix_cache()
    list(agent.rollout(jobs[-1:]))  # not timed: the examples are in the cache for everybody
    meter.reset()
    try:
        started = time.perf_counter()
        traces = loop(agent, jobs)
        wall = time.perf_counter() - started
    finally:
        Session.submit = submit
    tokens = sum(t.sampled for t in traces)
    right = sum(t.answer == t.problem.answer for t in traces)
    late = sum(slowed(code, "x") != code for t in traces for code, _ in t.calls)
    row = {
        "name": name,
        "snippets": slow,
        "traces": len(traces),
        "tokens": tokens,
        "wall": wall,
        "rate": tokens / wall,
        "idle": max(0.0, 1 - sum(meter.steps) / wall),
        "batch": sum(meter.sizes) / max(1, len(meter.sizes)),
        "calls": sum(len(t.calls) for t in traces),
        "slow": late,
        "right": right,
        "step": statistics.median(meter.steps or [0.0]),
    }
    print(
        f"# {name}: {json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})}",
        file=sys.stderr,
        flush=True,
    )
    return row


def table(rows: list[dict]) -> str:
    """The rows, each beside the first one with the same snippets."""
    lines = [
        "| | tokens/s | wall, s | engine idle, % | mean batch | tokens | calls (slow) | right | ours is faster |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        base = next(other for other in rows if other["snippets"] == r["snippets"])
        ratio = "" if r is base else f"{base['rate'] / r['rate']:.1f} x"
        lines.append(
            f"| {r['name']}, slow ones {r['snippets']} | {r['rate']:.0f} | {r['wall']:.1f} | {100 * r['idle']:.1f} | {r['batch']:.1f} | {r['tokens']} | "
            f"{r['calls']} ({r['slow']}) | {r['right']} of {r['traces']} | {ratio} |"
        )
    return "\n".join(lines)


def read_bandwidth() -> float:
    """Bytes per second that a sum over 1 GiB reads, best of five."""
    import torch

    x = torch.ones(2**28, device="cuda" if has_cuda() else "cpu")
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        x.sum().item()
        best = max(best, 2**30 / (time.perf_counter() - started))
    return best


def weights_read(folder: str) -> int:
    """Bytes that one decoding step must read: every parameter once (tied embeddings are the output layer)."""
    from safetensors import safe_open

    total, size = 0, 2 if has_cuda() else 4
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():
                count = 1
                for n in tensors.get_slice(name).get_shape():
                    count *= n
                total += count * size
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description="The same problems through four loops.")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument(
        "--slow",
        choices=EXTRA,
        default="wait",
        help="what the slow snippets do (default: %(default)s)",
    )
    parser.add_argument(
        "--scale",
        default="1,2,4,8,16,32,64,128,256,512",
        help="numbers of traces for the scaling table; '' leaves it out",
    )
    parser.add_argument("--skip", default="", help="loops to leave out, as b,d")
    add_model_flags(parser)
    parser.set_defaults(max_tokens=256, batch=512)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "6")
    prepare_environment(args.verbose)
    problems, skip = arithmetic("test", args.problems), set(args.skip.split(","))
    jobs = [(p, 0) for p in problems]
    scale = [int(n) for n in args.scale.split(",") if n]
    rows = []
    with open_agent(args, problems) as agent:
        meter = Meter(agent.engine)
        agent.slots = 64
        measure("warm-up", ours, agent, jobs[:8], meter, "none")
        for slow in dict.fromkeys([args.slow, *(["compute"] if args.slow == "wait" else [])]):
            rows.append(measure("ours", ours, agent, jobs, meter, slow))
            if "c" not in skip:
                rows.append(measure("(c) rounds", rounds, agent, jobs, meter, slow))
        if "b" not in skip:
            loop = functools.partial(one_at_a_time, extra=PUBLISHED_EXTRA[args.slow])
            rows.append(
                measure("(b) one at a time", loop, agent, jobs, meter, args.slow, inner=False)
            )
        scaling = []
        agent.slots = args.batch
        for n in scale:
            many = [(problems[i % len(problems)], i // len(problems)) for i in range(n)]
            scaling.append(measure(f"{n}", ours, agent, many, meter, "none"))
        if "d" not in skip:
            folder, lora = resolve_model(args.model, args.lora)
            there = Transformers(folder, lora, 64)
            row = measure(
                "(d) transformers",
                functools.partial(rounds, decode=there),
                agent,
                jobs,
                meter,
                args.slow,
            )
            rows.append(
                row
                | {
                    "idle": 1 - there.seconds / row["wall"],
                    "batch": sum(there.sizes) / max(1, len(there.sizes)),
                }
            )
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    print(f"{date.today()}, {os.cpu_count()} cores ({cpu}); {len(jobs)} problems\n")
    print(table(rows))
    if scaling:
        print(
            "\n| traces at once | "
            + " | ".join(r["name"] for r in scaling)
            + " |\n|---|"
            + "--:|" * len(scaling)
        )
        for title, key, form in (
            ("tokens/s", "rate", "{:.0f}"),
            ("wall, s", "wall", "{:.1f}"),
            ("engine idle, %", "idle", "{:.1%}"),
            ("mean batch", "batch", "{:.1f}"),
            ("median step, ms", "step", "{:.0f}"),
        ):
            print(
                f"| {title} | "
                + " | ".join(
                    form.format(1000 * r[key] if key == "step" else r[key]).rstrip("%")
                    for r in scaling
                )
                + " |"
            )
        folder, _ = resolve_model(args.model, args.lora)
        read, rate = weights_read(folder), read_bandwidth()
        single = next((r for r in scaling if r["name"] == "1"), None)
        if single and read:
            print(
                f"\nA step reads {read / 1e9:.2f} GB of weights; memory gives {rate / 1e9:.1f} GB/s: at least {1000 * read / rate:.0f} ms. "
                f"With one trace it takes {1000 * single['step']:.0f} ms: {100 * read / rate / single['step']:.0f} % of the bandwidth."
            )
    return 0


if __name__ == "__main__":
    run_main(main)
