"""The agent: a language model that runs Python while it thinks.

The model writes a snippet between <tool_call> and </tool_call>; generation stops there, the sandbox
runs the snippet, its output is appended to the *same* assistant turn, and generation goes on:

    prompt | Let me see. <tool_call> code </tool_call> | ```output 42 ``` | So \\boxed{42}.
    mask   | 1   1  1    1           1    1            | 0         0  0   | 1  1

Two rules make this more than string pasting:

  * Tokens in, tokens out. A trace's ids are only ever appended to, never decoded and encoded again:
    BPE is not a bijection, and grpo.py must train on exactly the context that was sampled.
  * No rounds. Any number of traces share one vLLM engine; a trace whose snippet runs is simply not
    in the batch, and is added again, prompt + ids so far, the moment the output is there. vLLM's
    prefix cache makes that nearly free.

Left out: servers, other engines, several tools, JSON schemas. The one tool is Python between two
tags.

    python agent.py "What is 7^222 mod 1000?"   # streams the reasoning, the snippets, their outputs
    python agent.py --n 16 "..."                # 16 traces and a vote
    python agent.py --no-agent "..."            # the plain baseline, no tool
    python agent.py                             # problem after problem, the model kept loaded
    echo "..." | python agent.py --json -       # one JSON object on stdout
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import tyro

from cli import AgentFlags, UserError, check_range, go_offline_without_hub, parse, run_main
from data import BASE_STOPS, CALL_CLOSE, CALL_OPEN, SPLIT, Problem, Prompt
from data import disarm, encode, problem_id, read_prompt, render_prompt
from engine import adapter_config, context_length, load_engine, load_tokenizer
from engine import prepare_environment, resolve_model
from grade import extract_answer, vote
from sandbox import Result, Sandbox, SandboxError, Session

OUTPUT_TOKENS = 512  # one inserted output is cut, its middle goes, to this many tokens


@dataclass
class Trace:
    """One attempt at one problem. ids, mask and logprobs have length T: the tokens that follow the
    prompt.
    """

    problem: Problem
    sample: int  # which attempt: 0, 1, ...
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)  # exactly as sampled or inserted
    mask: list[int] = field(default_factory=list)  # 1 = sampled by the model, 0 = inserted output
    logprobs: list[float] = field(default_factory=list)  # of what was sampled from; 0.0 at mask 0
    calls: list[tuple[str, Result]] = field(default_factory=list)  # (code, its result)
    finish: str = ""  # answer | eos | max_tokens | context | max_calls | error
    text: str = ""  # all that follows the prompt
    spans: list[tuple[str, int]] = field(default_factory=list)  # its parts: (kind, characters)
    answer: str | None = None  # the last \boxed{} in the model's own prose
    seconds: float = 0.0
    # what grpo.py learns from it
    rewards: dict[str, float] = field(default_factory=dict)  # by name
    reward: float = 0.0  # their weighted sum
    advantage: float = 0.0
    weight: float = 0.0  # of each of its tokens in the loss
    old_logprobs: list[float] = field(default_factory=list)  # the trainer's, sampled tokens only

    @property
    def sampled(self) -> int:
        """Tokens that the model wrote."""
        return sum(self.mask)

    def append(self, ids: list[int], mask: int, logprobs: list[float]) -> None:
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logprobs += logprobs

    def append_text(self, kind: str, text: str) -> None:
        """kind: model (prose) | code (a call with its tags) | output."""
        self.text += text
        if text:
            self.spans.append((kind, len(text)))


@dataclass
class Live:
    """A trace on its way, and what only the loop needs to know about it."""

    trace: Trace
    segment: str = ""  # the model's text since the last output: prose, then perhaps a call
    requests: int = 0  # to the engine, so far
    session: Session | None = None  # the sandbox's process that keeps the trace's variables
    started: float = field(default_factory=time.monotonic)


def trace_seed(seed: int, *what) -> int:
    """A seed of its own for each engine request, from the run's seed and what is sampled.

    A request that is added again with the same seed would replay the same noise.
    """
    parts = [str(part) for part in (seed, *what)]
    name = "/".join(parts).encode()
    digest = hashlib.sha256(name).digest()
    return int.from_bytes(digest[:7])  # vLLM takes 63 bits


@dataclass
class Agent:
    """All that a rollout needs; `rollout` is the whole method. grpo.py replaces `flags` and `lora`
    as it goes on.
    """

    engine: Any  # vLLM's LLMEngine: add_request, step, abort_request
    tokenizer: Any
    box: Sandbox | None  # None without the tool
    prompt: Prompt
    flags: AgentFlags
    max_len: int  # the context, in tokens
    slots: int = 64  # traces that decode at once
    lora: Any = None  # vLLM's LoRARequest
    serial: Iterator[int] = field(default_factory=itertools.count)

    def rollout(
        self, jobs: Iterable[tuple[Problem, int]], on_event: Callable | None = None
    ) -> Iterator[Trace]:
        """Solve every (problem, sample) of `jobs`, which may be lazy; yield each Trace as it ends.

        There are no rounds. Traces are independent, and each is in exactly one of three places:

            ready      wants tokens: it goes into the engine, or ends
            decoding   in the engine's batch, which samples one token for each trace in every step
            running    its snippet is in the sandbox; it takes no place in the batch

        on_event(trace, kind, value) sees "text" (a str), "call" (code) and "output" (a Result).
        """
        jobs = iter(jobs)
        notify = on_event or ignore
        ready: list[Live] = []
        decoding: dict[str, Live] = {}  # by the name of its request
        running: dict[Future, Live] = {}  # by the Result to come
        slots = 1  # then 8, 64, ...: the first prompt fills the prefix cache for the others

        try:
            while True:
                # Start new traces where there is room. While a snippet runs, another trace decodes
                # in its place; but each has a process in the sandbox, so there is a limit.
                room = slots - len(ready) - len(decoding)
                if len(running) >= 4 * self.slots:
                    room = 0
                for problem, sample in itertools.islice(jobs, max(0, room)):
                    prompt_ids = render_prompt(self.tokenizer, self.prompt, problem.question)
                    ready.append(Live(Trace(problem, sample, prompt_ids)))
                if not (ready or decoding or running):
                    return

                # Into the engine, with prompt + ids so far; or out.
                for live in ready:
                    if self.is_over(live.trace):
                        yield self.end(live)
                    else:
                        decoding[self.request(live)] = live
                ready = []

                # One engine step: one more token for every trace in the batch.
                outputs = self.engine.step() if decoding else []
                for output in outputs:
                    live = decoding[output.request_id]
                    new = output.outputs[0]  # what this step has added
                    text = self.take(live, new)
                    if text:
                        notify(live.trace, "text", text)
                    place = self.next_place(live, new)
                    if place == "decoding":
                        continue

                    del decoding[output.request_id]
                    if not output.finished:
                        self.engine.abort_request([output.request_id])
                    if place == "ready":
                        ready.append(live)
                        continue

                    live.session = live.session or self.box.session()
                    code = snippet_in(live.segment)
                    notify(live.trace, "call", code)
                    future = live.session.submit(code, self.flags.snippet_seconds)
                    running[future] = live

                # Snippets that have ended: their outputs become tokens with mask 0.
                patience = 0 if decoding or ready else 0.2  # seconds
                ended, _ = wait(running, patience, FIRST_COMPLETED)
                for future in ended:
                    live = running.pop(future)
                    ready.append(live)
                    result = future.result()
                    notify(live.trace, "output", result)
                    self.insert(live, result)

                slots = min(self.slots, 8 * slots)
        finally:  # also after Ctrl-C, or when the caller stops listening
            self.engine.abort_request(list(decoding))
            ready += decoding.values()
            ready += running.values()
            for live in ready:
                if live.session:
                    live.session.close()

    def room(self, trace: Trace) -> int:
        """Tokens until the engine's context is full."""
        return self.max_len - len(trace.prompt_ids) - len(trace.ids)

    def is_over(self, trace: Trace) -> bool:
        """Whether nothing more will be sampled; trace.finish then says why."""
        if not trace.finish and trace.sampled >= self.flags.max_tokens:
            trace.finish = "max_tokens"
        if not trace.finish and self.room(trace) < 1:
            trace.finish = "context"
        return trace.finish != ""

    def request(self, live: Live) -> str:
        """Hand prompt + ids so far to the engine; returns the request's name."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        flags, trace = self.flags, live.trace
        stops = list(self.prompt.stops)
        if self.prompt.agent:
            stops.append(CALL_CLOSE)
        request = (trace.problem.id, trace.sample, live.requests)
        params = SamplingParams(
            temperature=flags.temperature,
            top_p=flags.top_p,
            top_k=flags.top_k,
            seed=trace_seed(flags.seed, *request),
            max_tokens=min(flags.max_tokens - trace.sampled, self.room(trace)),
            stop=stops,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logprobs=0,  # the sampled token's, and of no other
            output_kind=RequestOutputKind.DELTA,
        )
        live.requests += 1
        name = f"{trace.problem.id}-{trace.sample}-{next(self.serial)}"
        prompt = {"prompt_token_ids": trace.prompt_ids + trace.ids}
        self.engine.add_request(name, prompt, params, lora_request=self.lora)
        return name

    def take(self, live: Live, new) -> str:
        """Append what one engine step has sampled, a CompletionOutput; returns its text."""
        tok = self.tokenizer
        logprobs = []
        for token, row in zip(new.token_ids, new.logprobs or [], strict=True):
            logprobs.append(row[token].logprob)
        live.trace.append(new.token_ids, 1, logprobs)

        text = new.text
        last = live.trace.ids[-1:]
        if last == [tok.eos_token_id]:
            text = text.removesuffix(tok.eos_token)  # it ends the turn and is no text
        if new.stop_reason == CALL_CLOSE:
            # The text ends with the tag, but its last token may hold more: `>` and a newline.
            _, _, more = tok.decode(last).partition(">")
            text += more
        live.segment += text
        return text

    def next_place(self, live: Live, new) -> str:
        """decoding (the request goes on), running (a call to run), or ready: a new request is due,
        or the trace ends and trace.finish says why.
        """
        flags, trace = self.flags, live.trace
        closed = new.stop_reason == CALL_CLOSE
        if closed and CALL_OPEN in live.segment:
            if trace.sampled >= flags.max_tokens:
                trace.finish = "max_tokens"  # nobody could read the output
            elif len(trace.calls) >= flags.max_calls:
                trace.finish = "max_calls"
            return "ready" if trace.finish else "running"

        if flags.end_at == "box" and "}" in new.text:
            prose, _ = self.split(live.segment)
            if extract_answer(prose):
                trace.finish = "answer"
                return "ready"
        if new.finish_reason is None:
            return "decoding"
        if new.finish_reason == "stop" and not closed:  # a tag that closes nothing is plain text
            trace.finish = "eos"
        if new.finish_reason not in ("stop", "length"):
            trace.finish = "error"
        return "ready"

    def insert(self, live: Live, result: Result) -> None:
        """Append a snippet's output as tokens with mask 0; ends the trace where it does not fit."""
        trace = live.trace
        code = snippet_in(live.segment)
        trace.calls.append((code, result))
        inserted = len(trace.ids) - trace.sampled
        allowed = inserted_allowance(self.flags) - inserted
        room = min(allowed, self.room(trace) - 1)
        newline = "" if live.segment.endswith("\n") else "\n"
        ids = self.output_block(newline, result.output, room)
        if not ids:
            trace.finish = "context"
            return
        self.close_segment(live)
        trace.append(ids, 0, [0.0] * len(ids))
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        trace.append_text("output", text)

    def output_block(self, newline: str, output: str, room: int) -> list[int]:
        """An output between its fences as tokens, at most `room` of them; [] where that is too
        little.

        It is untrusted text: encoded apart, so that nothing in it becomes a control token. A fence
        inside it would end the block; SPLIT goes first, for it could hide one.
        """
        tok = self.tokenizer
        output = output.replace(SPLIT, "")
        output = output.replace("```", "'''")
        shown = encode(tok, disarm(tok, output))
        before = encode(tok, newline + "```output\n")
        after = encode(tok, "\n```\n")
        room = min(OUTPUT_TOKENS, room - len(before) - len(after))
        if len(shown) > room:
            note = encode(tok, "\n[... cut ...]\n")
            half = (room - len(note)) // 2
            if half < 1:
                return []
            shown = shown[:half] + note + shown[-half:]
        return before + shown + after

    def split(self, segment: str) -> tuple[str, str]:
        """(prose, call) of a segment; prose, and only that, may hold the answer."""
        if not self.prompt.agent:
            return segment, ""
        prose, tag, code = segment.partition(CALL_OPEN)
        return prose, tag + code

    def close_segment(self, live: Live) -> None:
        """Move the segment into its trace."""
        trace = live.trace
        prose, call = self.split(live.segment)
        trace.append_text("model", prose)
        trace.append_text("code", call)
        trace.answer = extract_answer(prose) or trace.answer
        live.segment = ""

    def end(self, live: Live) -> Trace:
        self.close_segment(live)
        live.trace.seconds = time.monotonic() - live.started
        if live.session:
            live.session.close()
        return live.trace


def ignore(trace: Trace, kind: str, value) -> None:
    """The on_event of a rollout that nobody watches."""


def snippet_in(segment: str) -> str:
    """The code of a closed call; of several opening tags the last counts: the model began anew.

    >>> snippet_in("Well. <tool_call> no: <tool_call>\\nprint(6 * 7)\\n</tool_call>")
    'print(6 * 7)'
    """
    call, _, _ = segment.rpartition(CALL_CLOSE)
    _, _, code = call.rpartition(CALL_OPEN)
    return code.strip("\n")


# ---- From flags to an agent


def check_flags(flags: AgentFlags) -> Prompt:
    """Fill in what depends on other flags, and read the prompt. Raises UserError."""
    if flags.max_tokens is None:
        flags.max_tokens = 1024 if flags.model == "embedded" else 20_000
    if flags.seed < 0:  # drawn once, and from here on as good as given
        flags.seed = random.SystemRandom().randrange(2**31)
    check_range(flags, 0, 2, "temperature")
    check_range(flags, 1e-6, 1, "top_p", "gpu_memory_utilization")
    check_range(flags, 0, math.inf, "top_k", "max_calls")
    check_range(flags, 1, math.inf, "max_tokens", "batch", "tensor_parallel")
    check_range(flags, 1e-3, 3600, "snippet_seconds")
    if flags.lora not in (None, "none"):
        adapter_config(flags.lora)
    return read_prompt(flags)


def inserted_allowance(flags: AgentFlags) -> int:
    """Tokens that a trace's inserted outputs may have together, so that the context is known."""
    if not flags.agent:
        return 0
    return max(2 * OUTPUT_TOKENS, flags.max_tokens // 2)


@contextlib.contextmanager
def open_agent(flags: AgentFlags, problems: list[Problem], traces: int, sleep: bool = False):
    """An Agent for the flags, ready for `traces` traces of `problems`. Raises UserError.

    sleep: see load_engine. The sandbox starts first: its imports run while the engine loads.
    """
    prompt = check_flags(flags)
    prepare_environment(flags.verbose)
    if flags.model != "embedded":
        go_offline_without_hub()
    sandbox = contextlib.nullcontext()
    if prompt.agent:
        sandbox = Sandbox(mode=flags.sandbox)
    with sandbox as box:
        model, lora = resolve_model(flags.model, flags.lora)
        tokenizer = load_tokenizer(model)
        if not tokenizer.chat_template and not prompt.stops:
            prompt = replace(prompt, stops=BASE_STOPS)

        # The context to plan for: an engine that keeps less can hold more traces.
        context = context_length(model)
        longest = 0 if problems else 2048  # at the interactive prompt nobody knows
        for problem in problems:
            ids = render_prompt(tokenizer, prompt, problem.question)
            longest = max(longest, len(ids))
        if longest >= context:
            too_long = f"the prompt has {longest} tokens and the model's context is {context}"
            raise UserError(f"{too_long}: shorten the problem, or use --few-shot none")
        max_len = min(context, longest + flags.max_tokens + inserted_allowance(flags))

        slots = min(flags.batch, traces)
        engine, request = load_engine(model, lora, max_len, slots, flags, sleep)
        fits = engine.model_config.max_model_len
        if fits < max_len:
            print(f"the cache holds {fits} tokens, {max_len} were asked for", file=sys.stderr)
            max_len = fits
        try:
            if box:
                box.wait_ready()
            yield Agent(engine, tokenizer, box, prompt, flags, max_len, slots, request)
        except SandboxError as error:  # now, or at a later snippet
            raise UserError(str(error)) from None


# ---- The command


@dataclass(kw_only=True)
class Flags(AgentFlags):
    """Solve a math problem with a model that runs Python while it thinks."""

    problem: tyro.conf.Positional[str | None] = None
    """The problem; - reads it from standard input; without one, problem after problem."""
    n: int = 1
    """Traces to sample; their answers are put to the vote."""
    json: bool = False
    """One JSON object on standard output and nothing else."""


def printable(text: str) -> str:
    r"""Text whose control characters, but for newline and tab, are written out: \x1b."""
    controls = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    return re.sub(controls, lambda match: ascii(match[0])[1:-1], text)


def solve(agent: Agent, problem: Problem, n: int, console) -> dict:
    """n traces of one problem and their vote, shown on the console; returns the JSON object."""

    def on_event(trace: Trace, kind: str, value) -> None:  # one trace as it grows, tags and all
        if kind == "text":
            console.print(printable(value), end="")
        if kind == "output":
            block = f"\n```output\n{value.output}\n```\n"
            console.print(printable(block), end="", style="dim")

    started = time.monotonic()
    traces = []
    jobs = ((problem, sample) for sample in range(n))
    for trace in agent.rollout(jobs, on_event if n == 1 else None):
        traces.append(trace)
        if n > 1:
            counts = f"{trace.sampled:5d} tokens, {len(trace.calls)} calls, {trace.finish}"
            answer = trace.answer or "no answer"
            console.print(printable(f"trace {trace.sample:2d}: {counts}: {answer}"))
    traces.sort(key=lambda trace: trace.sample)
    result = vote([trace.answer for trace in traces])

    tokens = sum(trace.sampled for trace in traces)
    calls = sum(len(trace.calls) for trace in traces)
    seconds = time.monotonic() - started
    cost = f"{tokens} tokens, {calls} calls, {seconds:.1f} s"
    if n == 1:
        console.print()  # ends the trace's last line
        if traces[0].finish not in ("eos", "answer"):
            cost += f", cut by {traces[0].finish}"
    elif result.clusters:
        _, votes, _ = result.clusters[0]
        cost += f", {votes} of {n} votes"
    console.print(printable(f"answer: {result.winner or 'none'}"), style="bold")
    console.print(f"({cost})", style="dim")
    return {
        "problem": problem.question,
        "answer": result.winner,
        "votes": [{"answer": answer, "count": count} for answer, count, _ in result.clusters],
        "traces": [trace_json(trace) for trace in traces],
    }


def trace_json(trace: Trace) -> dict:
    return {
        "text": trace.text,
        "answer": trace.answer,
        "finish": trace.finish,
        "tokens": trace.sampled,
        "calls": [{"code": code, **asdict(result)} for code, result in trace.calls],
    }


def read_problem(flags: Flags) -> str | None:
    """The problem on the command line or standard input, None for the interactive prompt."""
    if flags.problem is None and not flags.json:
        return None
    text = flags.problem or ""
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    if not text.strip():
        raise UserError("no problem: give one in quotes, or - for standard input")
    return text.strip()


def as_problem(question: str) -> Problem:
    return Problem(problem_id(question), question, answer=None)


def ask(console) -> Iterator[str]:
    """Problem after problem from the terminal, until end of file."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history
    console.print("One problem a line; Ctrl-D ends.", style="dim")
    with contextlib.suppress(EOFError):
        while True:
            line = input("> ").strip()
            if line:
                yield line


def main() -> None:
    flags = parse(Flags)
    check_range(flags, 1, math.inf, "n")
    text = read_problem(flags)
    check_flags(flags)  # a wrong flag ends here, before anything heavy is loaded
    from rich.console import Console

    console = Console(soft_wrap=True, markup=False, highlight=False, quiet=flags.json)
    stdout = os.dup(1)
    if flags.json:  # whatever a library prints goes to stderr: stdout holds the object alone
        os.dup2(2, 1)
    given = [as_problem(text)] if text else []
    with open_agent(flags, given, flags.n) as agent:
        for problem in given or map(as_problem, ask(console)):
            result = solve(agent, problem, flags.n, console)
            if flags.json:
                text = json.dumps(result, ensure_ascii=False) + "\n"
                os.write(stdout, text.encode())


if __name__ == "__main__":
    run_main(main)
