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
from dataclasses import asdict, dataclass, field, replace

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
    sample: int
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)  # exactly as sampled or inserted
    mask: list[int] = field(default_factory=list)  # 1 = sampled by the model, 0 = inserted output
    logprobs: list[float] = field(default_factory=list)  # of what was sampled from; 0.0 at mask 0
    calls: list[tuple[str, Result]] = field(default_factory=list)  # (code, its result)
    finish: str = ""  # answer | eos | max_tokens | context | max_calls | error
    text: str = ""  # all that follows the prompt
    spans: list[tuple[str, int]] = field(
        default_factory=list
    )  # (model | code | output, characters)
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


@dataclass
class Live:
    """A trace on its way, and what only the loop needs to know about it."""

    trace: Trace
    started: float
    segment: str = ""  # what the model has written since the last inserted output
    requests: int = 0  # to the engine, so far
    session: Session | None = None  # the sandbox's process with the trace's variables


def trace_seed(seed: int, *what) -> int:
    """A seed of its own for each engine request, from the run's seed and what is sampled.

    A request that is added again with the same seed would replay the same noise.
    """
    name = "/".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])


class Agent:
    """A vLLM engine, a sandbox, a prompt and the flags; `rollout` is the whole method.

    engine: an LLMEngine (add_request, step, abort_request); max_len: its context; slots: traces
    that decode at once; lora: a LoRARequest or None. grpo.py replaces `flags` and `lora` as it
    goes on.
    """

    def __init__(self, engine, tokenizer, box, prompt, flags, max_len, slots=64, lora=None):
        self.engine, self.tokenizer, self.box = engine, tokenizer, box
        self.prompt, self.flags = prompt, flags
        self.max_len, self.slots, self.lora = max_len, slots, lora
        self.serial = itertools.count()

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
        notify = on_event or (lambda trace, kind, value: None)
        ready: list[Live] = []
        decoding: dict[str, Live] = {}  # by the name of its request
        running: dict[Session, Live] = {}
        slots = 1  # then 8, 64, ...: the first prompt fills the prefix cache for the others

        try:
            while True:
                # Start new traces where there is room.
                room = min(slots - len(decoding) - len(ready), 4 * self.slots - len(running))
                ready += [self.begin(*job) for job in itertools.islice(jobs, max(0, room))]
                if not (ready or decoding or running):
                    return

                # Into the engine, with prompt + ids so far, or out.
                for live in ready:
                    if live.trace.finish or not self.request(live, decoding):
                        yield self.end(live)
                ready = []

                # One engine step: one more token for every trace in the batch.
                for output in self.engine.step() if decoding else []:
                    live = decoding.get(output.request_id)
                    if live is None:  # aborted, and this output was on its way
                        continue
                    new = output.outputs[0]  # what this step has added
                    text = self.take(live, new)
                    if text:
                        notify(live.trace, "text", text)
                    move = self.next_move(live, new)
                    if move == "decode":
                        continue

                    del decoding[output.request_id]
                    if not output.finished:
                        self.engine.abort_request([output.request_id])
                    if move == "call":
                        code = snippet_in(live.segment)
                        notify(live.trace, "call", code)
                        live.session = live.session or self.box.session()
                        live.session.submit(code, self.flags.snippet_seconds)
                        running[live.session] = live
                    else:
                        live.trace.finish = "" if move == "again" else move
                        ready.append(live)

                # Snippets that have ended: their outputs become tokens with mask 0.
                patience = 0 if decoding or ready else 0.2  # seconds
                for session, result in self.box.poll(patience) if running else []:
                    live = running.pop(session)
                    notify(live.trace, "output", result)
                    self.insert(live, result)
                    ready.append(live)

                slots = min(self.slots, 8 * slots)
        finally:  # also after Ctrl-C, or when the caller stops listening
            self.engine.abort_request(list(decoding))
            for live in [*ready, *decoding.values(), *running.values()]:
                if live.session:
                    live.session.close()

    def begin(self, problem: Problem, sample: int) -> Live:
        prompt_ids = render_prompt(self.tokenizer, self.prompt, problem.question)
        return Live(Trace(problem, sample, prompt_ids), time.monotonic())

    def request(self, live: Live, decoding: dict[str, Live]) -> bool:
        """Hand prompt + ids to the engine; False, with trace.finish set, where no token fits."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        flags, trace = self.flags, live.trace
        ids = trace.prompt_ids + trace.ids
        budget = flags.max_tokens - trace.sampled
        room = min(budget, self.max_len - len(ids))
        if room < 1:
            trace.finish = "context" if budget > 0 else "max_tokens"
            return False
        stops = list(self.prompt.stops)
        if self.prompt.agent:
            stops.append(CALL_CLOSE)
        params = SamplingParams(
            temperature=flags.temperature,
            top_p=flags.top_p,
            top_k=flags.top_k,
            seed=trace_seed(flags.seed, trace.problem.id, trace.sample, live.requests),
            max_tokens=room,
            stop=stops,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logprobs=0,  # the sampled token's, and of no other
            output_kind=RequestOutputKind.DELTA,
        )
        name = f"{trace.problem.id}-{trace.sample}-{live.requests}-{next(self.serial)}"
        prompt = {"prompt_token_ids": ids}
        self.engine.add_request(name, prompt, params, lora_request=self.lora)
        live.requests += 1
        decoding[name] = live
        return True

    def take(self, live: Live, new) -> str:
        """Append what one engine step sampled, a CompletionOutput; returns its text."""
        trace, text = live.trace, new.text
        for token, row in zip(new.token_ids, new.logprobs or [], strict=True):
            trace.ids.append(token)
            trace.mask.append(1)
            trace.logprobs.append(row[token].logprob)
        if trace.ids[-1:] == [self.tokenizer.eos_token_id]:
            text = text.removesuffix(self.tokenizer.eos_token)  # it ends the turn and is no text
        if (
            new.stop_reason == CALL_CLOSE
        ):  # the last token may hold more than the tag: `>` and newline
            text += self.tokenizer.decode(new.token_ids[-1:]).partition(">")[2]
        live.segment += text
        return text

    def next_move(self, live: Live, new) -> str:
        """decode (the request goes on) | call | again (a new request is due) | a finish value."""
        flags, trace = self.flags, live.trace
        closes = new.stop_reason == CALL_CLOSE
        if closes and CALL_OPEN in live.segment:
            if trace.sampled >= flags.max_tokens:
                return "max_tokens"  # nobody could read the output
            return "call" if len(trace.calls) < flags.max_calls else "max_calls"
        if (
            flags.end_at == "box"
            and "}" in new.text
            and extract_answer(self.split(live.segment)[0])
        ):
            return "answer"
        if new.finish_reason is None:
            return "decode"
        if closes or new.finish_reason == "length":
            return "again"  # a tag that closes nothing is plain text; see `request` for the length
        return "eos" if new.finish_reason == "stop" else "error"

    def insert(self, live: Live, result: Result) -> None:
        """Append a snippet's output, untrusted text, as tokens with mask 0; ends a full trace."""
        trace = live.trace
        trace.calls.append((snippet_in(live.segment), result))

        # Encoded apart, so that nothing in the output becomes a control token; a fence inside it
        # would end the block. SPLIT goes first, for it could hide a fence.
        output = result.output.replace(SPLIT, "").replace("```", "'''")
        shown = encode(self.tokenizer, disarm(self.tokenizer, output))
        line = "" if live.segment.endswith("\n") else "\n"
        before = encode(self.tokenizer, line + "```output\n")
        after = encode(self.tokenizer, "\n```\n")

        inserted = len(trace.mask) - trace.sampled
        left = self.max_len - len(trace.prompt_ids) - len(trace.ids) - 1
        left = min(left, inserted_allowance(self.flags) - inserted)
        room = min(OUTPUT_TOKENS, left - len(before) - len(after))
        if len(shown) > room:
            note = encode(self.tokenizer, "\n[... cut ...]\n")
            half = (room - len(note)) // 2
            if half < 1:
                trace.finish = "context"
                return
            shown = shown[:half] + note + shown[-half:]

        ids = before + shown + after
        trace.ids += ids
        trace.mask += [0] * len(ids)
        trace.logprobs += [0.0] * len(ids)
        self.close_segment(live)
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        trace.text += text
        trace.spans.append(("output", len(text)))

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
        trace.text += live.segment
        trace.spans += [
            (kind, len(part)) for kind, part in (("model", prose), ("code", call)) if part
        ]
        trace.answer = extract_answer(prose) or trace.answer
        live.segment = ""

    def end(self, live: Live) -> Trace:
        self.close_segment(live)
        live.trace.seconds = time.monotonic() - live.started
        if live.session:
            live.session.close()
        return live.trace


def snippet_in(segment: str) -> str:
    """The code of a closed call; of several opening tags the last counts: the model began anew.

    >>> snippet_in("Well. <tool_call> no: <tool_call>\\nprint(6 * 7)\\n</tool_call>")
    'print(6 * 7)'
    """
    return segment.rpartition(CALL_CLOSE)[0].rpartition(CALL_OPEN)[2].strip("\n")


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
    return max(2 * OUTPUT_TOKENS, flags.max_tokens // 2) if flags.agent else 0


@contextlib.contextmanager
def open_agent(flags: AgentFlags, problems: list[Problem], traces: int, sleep: bool = False):
    """An Agent for the flags, ready for `traces` traces of `problems` (their longest prompt
    counts).

    The sandbox starts first: its imports run while the engine loads. Raises UserError.
    """
    prompt = check_flags(flags)
    prepare_environment(flags.verbose)
    if flags.model != "embedded":
        go_offline_without_hub()
    with contextlib.ExitStack() as stack:
        box = stack.enter_context(Sandbox(mode=flags.sandbox)) if prompt.agent else None
        model, lora = resolve_model(flags.model, flags.lora)
        tokenizer = load_tokenizer(model)
        if not tokenizer.chat_template and not prompt.stops:
            prompt = replace(prompt, stops=BASE_STOPS)

        # The context to plan for: an engine that keeps less can hold more traces.
        prompts = [render_prompt(tokenizer, prompt, problem.question) for problem in problems]
        longest = max(map(len, prompts), default=2048)  # at the interactive prompt nobody knows
        context = context_length(model)
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
    return re.sub(controls, lambda match: f"\\x{ord(match[0]):02x}", text)


def stream_to(console) -> Callable:
    """An on_event for `rollout` that shows one trace as it grows, tags and all."""

    def on_event(trace: Trace, kind: str, value) -> None:
        text, style = "", "dim"
        if kind == "text":
            text, style = value, None
        if kind == "output":
            text = f"\n```output\n{value.output}\n```\n"
            style = "dim" if value.status == "ok" else "red"
        console.print(printable(text), style=style, end="", markup=False, highlight=False)

    return on_event


def solve(agent: Agent, problem: Problem, n: int, console=None) -> dict:
    """n traces of one problem and their vote as a JSON object; `console` shows them to people."""
    started, traces = time.monotonic(), []
    on_event = stream_to(console) if console and n == 1 else None
    for trace in agent.rollout([(problem, i) for i in range(n)], on_event):
        traces.append(trace)
        if console and n > 1:
            counts = f"{trace.sampled:5d} tokens, {len(trace.calls)} calls, {trace.finish}"
            print(printable(f"trace {trace.sample:2d}: {counts}: {trace.answer or 'no answer'}"))
    traces.sort(key=lambda trace: trace.sample)
    result = vote([trace.answer for trace in traces])
    if console:
        tokens = sum(trace.sampled for trace in traces)
        calls = sum(len(trace.calls) for trace in traces)
        cost = f"{tokens} tokens, {calls} calls, {time.monotonic() - started:.1f} s"
        if n == 1:
            cost += "" if traces[0].finish in ("eos", "answer") else f", cut by {traces[0].finish}"
        elif result.clusters:
            cost += f", {result.clusters[0][1]} of {n} votes"
        answer = printable(f"answer: {result.winner or 'none'}")
        console.print("\n" * (n == 1) + answer, style="bold", markup=False, highlight=False)
        console.print(f"({cost})", style="dim", highlight=False)
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


def questions(console) -> Iterator[str]:
    """Problem after problem from the terminal, until end of file."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history
    console.print("One problem a line; Ctrl-D ends.", style="dim")
    with contextlib.suppress(EOFError):
        while True:
            line = input("> ").strip()
            if line:
                yield line


def read_problem(flags: Flags) -> str | None:
    """The problem on the command line or standard input, None for the interactive prompt."""
    if flags.problem is None:
        if flags.json:
            raise UserError("--json needs a problem (or - for standard input)")
        return None
    try:
        text = sys.stdin.read() if flags.problem == "-" else flags.problem
        text.encode()
    except UnicodeError:
        raise UserError("the problem is not valid UTF-8 text") from None
    if not text.strip():
        raise UserError("the problem is empty: give one in quotes, or - for standard input")
    return text.strip()


def main() -> None:
    flags = parse(Flags)
    check_range(flags, 1, math.inf, "n")
    text = read_problem(flags)
    check_flags(flags)  # a wrong flag ends here, before anything heavy is loaded
    from rich.console import Console

    console = Console(soft_wrap=True)
    stdout = os.dup(1)
    if flags.json:  # whatever a library prints goes to stderr: stdout holds the object alone
        os.dup2(2, 1)
        console = None
    given = [Problem(problem_id(text), text, None)] if text else []
    with open_agent(flags, given, flags.n) as agent:
        asked = (Problem(problem_id(q), q, None) for q in questions(console))
        for problem in given or asked:
            result = solve(agent, problem, flags.n, console)
            if flags.json:
                os.write(stdout, json.dumps(result, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    run_main(main)
