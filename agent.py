"""The agent: a language model that runs Python while it thinks.

The model writes a snippet between <tool_call> and </tool_call>; generation stops there, the sandbox
runs the snippet, its output is appended to the *same* assistant turn, and generation goes on:

    prompt | Let me see. <tool_call> code </tool_call> | ```output 42 ``` | So \\boxed{42}.
    mask   | 1   1  1    1           1    1            | 0         0  0   | 1  1

Two rules make this more than string pasting:

  * Tokens in, tokens out. A trace's ids are only ever appended to, never decoded and encoded again:
    BPE is not a bijection, and grpo.py must train on exactly the context that was sampled.
  * No rounds that wait for the slowest. All traces share one vLLM engine; one whose snippet runs
    leaves the batch and comes back, its output appended: cheap, by vLLM's prefix cache.

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

from cli import AgentFlags, UserError, check_range, parse, run_main
from data import BASE_STOPS, CALL_CLOSE, CALL_OPEN, SPLIT, Problem, Prompt
from data import disarm, encode, problem_id, read_prompt, render_prompt
from engine import adapter_config, from_pretrained, load_engine
from engine import prepare_environment, resolve_model
from grade import Grader, extract_answer, vote
from sandbox import Result, Sandbox, SandboxError, Session
from snippet import escape

OUTPUT_TOKENS = 512  # a longer output loses its middle and keeps this many


@dataclass
class Trace:
    """One attempt at one problem; ids, mask and logprobs are of the T tokens after the prompt."""

    problem: Problem
    sample: int  # which attempt; in training numbered through the whole step
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)  # exactly as sampled or inserted
    mask: list[int] = field(default_factory=list)  # 1 = sampled by the model, 0 = inserted output
    logprobs: list[float] = field(default_factory=list)  # as vLLM sampled them; 0.0 at mask 0
    calls: list[tuple[str, Result]] = field(default_factory=list)  # (code, its result)
    finish: str = ""  # answer | eos | max_tokens | context | max_calls | error
    # the text in parts: at even places what the model wrote, at odd ones outputs
    texts: list[str] = field(default_factory=lambda: [""])
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

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def answer(self) -> str | None:
        """The last box in the model's own prose: not in a call, not in an output."""
        calls = rf"(?s){CALL_OPEN}.*?(?:{CALL_CLOSE}|\Z)"
        prose = re.sub(calls, "", "".join(self.texts[::2]))
        return extract_answer(prose)

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The text's parts as (model | code | output, characters)."""
        parts = []
        for number, text in enumerate(self.texts):
            prose, tag, code = text.partition(CALL_OPEN)
            own = [("model", prose), ("code", tag + code)]
            parts += [("output", text)] if number % 2 else own
        return [(kind, len(part)) for kind, part in parts if part]


@dataclass
class Live:
    """A trace on its way, and what only the loop needs to know about it."""

    trace: Trace
    code: str = ""  # its last snippet
    session: Session | None = None  # the sandbox's process that keeps the trace's variables
    started: float = field(default_factory=time.monotonic)


def trace_seed(*what) -> int:
    """A seed of its own for each engine request: two of one seed would draw the same noise."""
    name = "/".join(map(str, what))
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:7])  # 56 bits: vLLM takes 63


@dataclass
class Agent:
    """All that a rollout needs. grpo.py replaces `flags` and `lora` as it goes on."""

    engine: Any  # vLLM's LLMEngine: add_request, step, abort_request
    tokenizer: Any
    box: Sandbox | None  # None without the tool
    prompt: Prompt
    flags: AgentFlags
    max_len: int  # the context, in tokens
    slots: int  # traces that decode at once
    lora: Any = None  # vLLM's LoRARequest

    def rollout(self, jobs: Iterable, on_event: Callable = lambda *_: None) -> Iterator[Trace]:
        """Solve every (problem, sample) of `jobs`, which may be lazy; yield each Trace as it ends.

        No trace waits for another's snippet. Each is in exactly one of three places:

            ready      wants tokens: it goes into the engine, or ends
            decoding   in the engine's batch, which samples one token for each trace in every step
            running    its snippet is in the sandbox; it takes no place in the batch

        on_event(trace, text) sees the trace's text as it grows, outputs too.
        """
        jobs = iter(jobs)
        ready: list[Live] = []
        decoding: dict[str, Live] = {}  # by the name of its request
        running: dict[Future, Live] = {}  # by its snippet's result, when that is there
        open_slots = 1  # then 8, 64, ...: the first prompt fills the prefix cache for the others

        try:
            while True:
                # Start new traces where there is room. While a snippet runs, another trace decodes
                # in its place; but all of them come back, perhaps at once, so there is a limit.
                room = open_slots - len(ready) - len(decoding)
                if len(running) >= 4 * self.slots:
                    room = 0
                for problem, sample in itertools.islice(jobs, max(0, room)):
                    prompt_ids = render_prompt(self.tokenizer, self.prompt, problem.question)
                    ready.append(Live(Trace(problem, sample, prompt_ids)))
                if not (ready or decoding or running):
                    return

                # Into the engine, with prompt + ids so far; or out.
                for live in ready:
                    name = self.request(live)
                    if name:
                        decoding[name] = live
                        continue
                    live.trace.seconds = time.monotonic() - live.started
                    if live.session:
                        live.session.close()
                    yield live.trace
                ready = []

                # One engine step: one more token for every trace in the batch.
                outputs = self.engine.step() if decoding else []
                for output in outputs:
                    live = decoding[output.request_id]
                    new = output.outputs[0]  # what this step has added
                    on_event(live.trace, self.take(live.trace, new))
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
                    future = live.session.submit(live.code, self.flags.snippet_seconds)
                    running[future] = live

                # Snippets that have ended: their outputs become tokens with mask 0.
                patience = 0 if decoding or ready else 1  # second
                ended, _ = wait(running, patience, FIRST_COMPLETED)
                for future in ended:
                    live = running.pop(future)
                    on_event(live.trace, self.insert(live, future.result()))
                    ready.append(live)

                open_slots = min(self.slots, 8 * open_slots)
        finally:  # also after Ctrl-C, or when the caller stops listening
            self.engine.abort_request(list(decoding))
            for live in (*ready, *decoding.values(), *running.values()):
                if live.session:
                    live.session.close()

    def request(self, live: Live) -> str | None:
        """Hand prompt + ids to the engine. Returns the request's name; None: the trace is over."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        flags, trace = self.flags, live.trace
        if trace.finish:
            return None
        context = trace.prompt_ids + trace.ids
        budget = flags.max_tokens - trace.sampled
        limit = min(budget, self.max_len - len(context))
        if limit < 1:
            trace.finish = "max_tokens" if budget < 1 else "context"
            return None

        seed = trace_seed(flags.seed, trace.problem.id, trace.sample, len(trace.ids))
        name = f"{id(live)}-{len(trace.ids)}"
        tags = [CALL_CLOSE] if flags.agent else []
        params = SamplingParams(
            temperature=flags.temperature,
            top_p=flags.top_p,
            top_k=flags.top_k,
            seed=seed,
            max_tokens=limit,
            stop=[*self.prompt.stops, *tags],
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logprobs=0,  # the sampled token's, and of no other
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": context}
        self.engine.add_request(name, prompt, params, lora_request=self.lora)
        return name

    def take(self, trace: Trace, new) -> str:
        """Append what one engine step has sampled (vLLM's CompletionOutput); returns its text."""
        tok = self.tokenizer
        rows = zip(new.token_ids, new.logprobs, strict=True)
        trace.ids += new.token_ids
        trace.mask += [1] * len(new.token_ids)
        trace.logprobs += [row[token].logprob for token, row in rows]
        text = new.text
        last = trace.ids[-1:]
        if last == [tok.eos_token_id]:
            text = text.removesuffix(tok.eos_token)  # it ends the turn and is no text
        if new.stop_reason == CALL_CLOSE:
            # vLLM cuts the text behind the tag, but the last token may be `>` and a newline.
            _, _, more = tok.decode(last).partition(">")
            text += more
        trace.texts[-1] += text
        return text

    def next_place(self, live: Live, new) -> str:
        """decoding (it goes on), running (a call), or ready (for a new request or the end)."""
        flags, trace = self.flags, live.trace
        closed = new.stop_reason == CALL_CLOSE
        if closed and CALL_OPEN in trace.texts[-1]:
            # Of several opening tags the last one counts: the model began anew.
            _, _, code = trace.texts[-1].rpartition(CALL_OPEN)
            live.code = code.partition(CALL_CLOSE)[0].strip("\n")
            if len(trace.calls) >= flags.max_calls:
                trace.finish = "max_calls"
            elif trace.sampled < flags.max_tokens:  # else nobody could read its output
                return "running"
        elif flags.end_at == "box" and "}" in new.text and trace.answer:
            trace.finish = "answer"
        elif new.finish_reason is None:
            return "decoding"
        elif not closed and new.finish_reason != "length":  # a tag that closes nothing is text
            trace.finish = "eos" if new.finish_reason == "stop" else "error"
        return "ready"

    def insert(self, live: Live, result: Result) -> str:
        """Append a snippet's output as tokens with mask 0; ends the trace where it does not fit.

        Returns their text. The output is untrusted: encoded apart, so that nothing in it becomes a
        control token, and without fences, which would end the block. SPLIT (see data.py) goes
        first: it could hide a fence.
        """
        tok, trace = self.tokenizer, live.trace
        trace.calls.append((live.code, result))
        newline = "" if trace.texts[-1].endswith("\n") else "\n"
        output = result.output.replace(SPLIT, "").replace("```", "'''")
        before = encode(tok, newline + "```output\n")
        shown = encode(tok, disarm(tok, output))
        after = encode(tok, "\n```\n")

        used = len(trace.prompt_ids + trace.ids + before + after)
        room = min(OUTPUT_TOKENS, self.max_len - used - 1)  # 1: a place for the model to go on
        if len(shown) > room:
            cut = encode(tok, "\n[... cut ...]\n")
            half = (room - len(cut)) // 2
            if half < 1:
                trace.finish = "context"
                return ""
            shown = shown[:half] + cut + shown[-half:]

        ids = before + shown + after
        trace.ids += ids
        trace.mask += [0] * len(ids)
        trace.logprobs += [0.0] * len(ids)
        text = tok.decode(ids)
        trace.texts += [text, ""]
        return text


# ---- From flags to an agent
def check_flags(flags: AgentFlags) -> Prompt:
    """Fill in what depends on other flags, and read the prompt. Raises UserError."""
    if flags.max_tokens is None:
        flags.max_tokens = 1024 if flags.model == "embedded" else 20_000
    if flags.seed < 0:  # drawn once, and from here on as good as given
        flags.seed = random.SystemRandom().randrange(2**31)
    check_range(flags, 0, 2, "temperature")
    check_range(flags, 1e-6, 1, "top_p", "gpu_memory_utilization")
    check_range(flags, 0, 10**6, "top_k", "max_calls", "snippet_seconds")
    check_range(flags, 1, 10**9, "max_tokens", "batch", "tensor_parallel")
    if flags.lora not in (None, "none"):
        adapter_config(flags.lora)
    return read_prompt(flags)


@contextlib.contextmanager
def open_agent(flags: AgentFlags, problems: list[Problem], traces: int):
    """An Agent for `traces` traces of `problems`. Raises UserError."""
    prompt = check_flags(flags)
    prepare_environment(flags.verbose)
    # The sandbox starts first: its imports run while the engine loads.
    sandbox = Sandbox(mode=flags.sandbox) if flags.agent else contextlib.nullcontext()
    with sandbox as box:
        model, lora = resolve_model(flags.model, flags.lora)
        tokenizer = from_pretrained("AutoTokenizer", model)
        if not tokenizer.chat_template and not prompt.stops:
            prompt = replace(prompt, stops=BASE_STOPS)

        # The context to plan for: the shorter it is, the more traces fit into the engine's cache.
        prompts = [render_prompt(tokenizer, prompt, problem.question) for problem in problems]
        longest = max(map(len, prompts), default=2048)  # nobody knows what will be typed
        context = from_pretrained("AutoConfig", model).get_text_config().max_position_embeddings
        if longest >= context:
            raise UserError(f"the prompt has {longest} tokens, the model reads {context}: cut it")
        for_outputs = max(2 * OUTPUT_TOKENS, flags.max_tokens // 2) if flags.agent else 0
        max_len = min(context, longest + flags.max_tokens + for_outputs)

        slots = min(flags.batch, traces)
        engine, request = load_engine(model, lora, max_len, slots, flags)
        fits = min(max_len, engine.model_config.max_model_len)
        if fits < longest + flags.max_tokens:  # the model reads no more, or the cache holds no more
            print(f"traces are cut at {fits} tokens, prompt and outputs included", file=sys.stderr)
        try:
            if box:
                box.wait_ready()
            yield Agent(engine, tokenizer, box, prompt, flags, fits, slots, lora=request)
        except SandboxError as error:  # now, or at a later snippet
            raise UserError(str(error)) from None


# ---- The command
@dataclass(kw_only=True)
class Flags(AgentFlags):
    """Solve a math problem with a model that runs Python while it thinks."""

    problem: tyro.conf.Positional[str | None] = None  # or -: standard input; none: a dialogue
    n: int = 1  # traces to sample; their answers are put to the vote
    json: bool = False  # one JSON object on standard output and nothing else


def as_problem(text: str) -> Problem:
    question = text.strip()
    return Problem(problem_id(question), question, answer=None)


def solve(agent: Agent, problem: Problem, n: int) -> dict:
    """n traces of one problem and their vote, printed as they come; returns the JSON object."""

    def show(_, text: str) -> None:  # one trace as it grows, tags and all
        if n == 1:
            print(escape(text), end="", flush=True)

    jobs = [(problem, sample) for sample in range(n)]
    traces = [None] * n  # by sample number
    for trace in agent.rollout(jobs, show):
        cost = f"{trace.sampled} tokens, {len(trace.calls)} calls, {trace.seconds:.1f} s"
        if trace.finish not in ("eos", "answer"):
            cost += f", cut by {trace.finish}"
        print(escape(f"\nanswer: {trace.answer or 'none'}\n({cost})"), flush=True)
        traces[trace.sample] = {
            "text": trace.text,
            "answer": trace.answer,
            "finish": trace.finish,
            "tokens": trace.sampled,
            "calls": [{"code": code, **asdict(result)} for code, result in trace.calls],
        }
    with Grader() as grader:
        clusters = vote([trace["answer"] for trace in traces], grader)
    votes = [{"answer": answer, "count": len(places)} for answer, places in clusters]
    winner = votes[0]["answer"] if votes else None
    if n > 1 and votes:
        print(escape(f"\nvote: {winner} ({votes[0]['count']} of {n})"))
    return {"problem": problem.question, "answer": winner, "votes": votes, "traces": traces}


def ask() -> Iterator[str]:
    """Problem after problem from the terminal, until end of file."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history
    print("One problem a line; Ctrl-D ends.")
    with contextlib.suppress(EOFError):
        while True:
            line = input("> ")
            if line.strip():
                yield line


def main() -> None:
    flags = parse(Flags)
    check_range(flags, 1, 10**6, "n")
    text = flags.problem or ""
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    is_dialogue = flags.problem is None and not flags.json
    if not text.strip() and not is_dialogue:
        raise UserError("no problem: give one in quotes, or - for standard input")
    check_flags(flags)  # a wrong flag ends here, before anything heavy is loaded

    given = [] if is_dialogue else [as_problem(text)]
    stdout = os.dup(1)
    if flags.json:  # whatever is printed goes to stderr: stdout holds the object alone
        os.dup2(2, 1)
        sys.stdout = sys.stderr
    with open_agent(flags, given, flags.n) as agent:
        for problem in given or map(as_problem, ask()):
            result = solve(agent, problem, flags.n)
            if flags.json:
                os.write(stdout, json.dumps(result).encode() + b"\n")


if __name__ == "__main__":
    run_main(main)
