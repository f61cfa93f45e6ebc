"""The same problems through three loops: one engine, one prompt, one budget, one sandbox, one run.

    ours             agent.py's rollout: a trace whose snippet runs leaves the batch, others go on
    in rounds        all traces decode to their next call, then all snippets run, and again
    one at a time    the engine waits for every snippet, as in the published code

    python bench/rollout.py [--problems 64]

All three are agent.py's loop: in rounds its sandbox starts nothing while a trace decodes, and one
at a time it is given one job after another. One snippet in eight is slow. It `waits` for 2 s, as
one on a core that the engine does not need, or it `computes` for about as long, and then it takes a
core away from an engine on the CPU. Its text decides, so that the same ones are slow for all. The
answers must be the same but for rounding, which depends on the batch.
"""

import time
import zlib
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

from common import machine, print_head, print_row  # first

import agent as loop
from agent import open_agent
from cli import AgentFlags, DataFlags, UserError, parse, run_main
from data import load_problems

SLOW = {
    "none": "",
    "wait": "import statistics\nstatistics.sys.modules['time'].sleep(2)\n",
    "compute": "sum(range(150_000_000))\n",
}


@dataclass(kw_only=True)
class Flags(AgentFlags):
    """The same problems through three loops."""

    problems: int = 64
    """Problems of the built-in test set, one trace each."""
    max_tokens: int | None = 256


class Box:
    """The sandbox with some snippets slowed; `rounds`: none starts while the engine has work."""

    def __init__(self, inner, slow: str, rounds: bool):
        self.inner = inner
        self.slow = SLOW[slow]
        self.rounds = rounds
        self.held = []  # snippets of this round: (the future that the loop has, how to start it)

    def session(self):
        session = self.inner.session()
        submit = session.submit

        def submit_slowed(code: str, seconds: float) -> Future:
            if zlib.crc32(code.encode()) % 8 == 0:
                code = self.slow + code
            if not self.rounds:
                return submit(code, seconds)
            future = Future()
            self.held.append((future, partial(submit, code, seconds)))
            return future

        session.submit = submit_slowed
        return session

    def wait(self, running, patience: float, when: str) -> tuple:
        """Stands for concurrent.futures.wait in agent.py."""
        if not self.rounds:
            return wait(running, patience, when)
        if not patience:  # other traces still decode
            return [], running
        started = [(future, start()) for future, start in self.held]
        self.held = []
        for future, begun in started:
            future.set_result(begun.result())
        return wait(running)


def measure(agent, jobs: list, way: str, slow: str) -> tuple[list, float]:
    """(traces in the order of the jobs, seconds) of one loop."""
    agent.engine.reset_prefix_cache()
    list(agent.rollout(jobs[-1:]))  # not timed: now the examples are in the cache for everybody
    inner = agent.box
    agent.box = Box(inner, slow, rounds=way == "in rounds")
    loop.wait = agent.box.wait
    parts = [[job] for job in jobs] if way == "one at a time" else [jobs]
    started = time.perf_counter()
    traces = [trace for part in parts for trace in agent.rollout(part)]
    seconds = time.perf_counter() - started
    agent.box = inner
    loop.wait = wait
    return sorted(traces, key=lambda trace: trace.sample), seconds


def report(way: str, slow: str, run: tuple, base: tuple) -> None:
    """The row of one run of `measure`; `base` is ours with the same slow snippets."""
    traces, seconds = run
    tokens = sum(trace.sampled for trace in traces)
    right = sum(trace.answer == trace.problem.answer for trace in traces)
    same = sum(mine.answer == other.answer for mine, other in zip(traces, base[0]))
    name = f"{way}, slow ones: {slow}"
    print_row(name, tokens / seconds, seconds, right, same, seconds / base[1])
    if same < 0.9 * len(traces):
        raise UserError(f"{way} gives {len(traces) - same} other answers: not the same work")


def main() -> None:
    flags = parse(Flags)
    problems = load_problems(DataFlags(limit=flags.problems))
    jobs = [(problem, i) for i, problem in enumerate(problems)]
    with open_agent(flags, problems, len(jobs)) as agent:
        measure(agent, jobs[:8], "ours", "none")  # warms up what is used for the first time
        print(machine())
        titles = "tokens/s", "seconds", "right", "answers as ours"
        print_head(f"{len(jobs)} problems", *titles, "its time / ours")
        for slow in SLOW:
            base = measure(agent, jobs, "ours", slow)
            report("ours", slow, base, base)
            ways = ["in rounds", "one at a time"] if slow == "none" else ["in rounds"]
            for way in ways:
                report(way, slow, measure(agent, jobs, way, slow), base)


if __name__ == "__main__":
    run_main(main)
