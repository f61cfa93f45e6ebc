"""A scripted engine and sandbox for the tool loop, and tokenizers of three kinds.

The engine plays a list of tokens for each trace and keeps its own record of every context, sampled
or inserted, so that a trace can be compared with what an engine has really seen. Stop strings,
limits and deltas are vLLM's (0.32): test_engine.py holds the imitation against the real one.
"""

import dataclasses
import io
import itertools
import threading
import types
from concurrent.futures import Future
from pathlib import Path

from agent import Agent
from cli import AgentFlags
from data import Problem, Prompt, problem_id, render_prompt
from sandbox import Result

ROOT = Path(__file__).resolve().parent.parent
PROMPT = Prompt(({"role": "user", "content": "{question}"},))
CALL = "Let me see.\n<tool_call>\nprint(6*7)\n</tool_call>"
WORDS = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bpe(tags: bool):
    """A small tokenizer that splits as Qwen's does. tags: single tokens, *not* called special, as
    in Qwen3; without them `>` and a newline are one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=letters, show_progress=False)
    text = [(ROOT / "fewshot.txt").read_text()] * 3 + ["</tool_call>\n"] * 50
    core.train_from_iterator(text, trainer)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if tags:
        names = ("<tool_call>", "</tool_call>", "<tool_response>", "<think>", "</think>")
        core.add_tokens([AddedToken(t, special=False, normalized=False) for t in names])
    options = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


@dataclasses.dataclass
class Record:
    """What the engine has seen of one trace: its own account, kept apart from the Agent's."""

    script: list[int]
    prompt: list[int]
    context: list[int]
    origin: list[int] = dataclasses.field(default_factory=list)  # 1 sampled, 0 inserted
    logprobs: list[float] = dataclasses.field(default_factory=list)
    seeds: list[int] = dataclasses.field(default_factory=list)
    played: int = 0
    busy: bool = False


class FakeEngine:
    """Plays scripts[question] token by token, then the end; one token per request and step."""

    def __init__(self, tok, prompt: Prompt, scripts: dict[str, list[int]], max_len: int):
        self.tok, self.max_len = tok, max_len
        self.steps, self.names = 0, set()
        self.active: dict[str, types.SimpleNamespace] = {}
        self.records = {question: [] for question in scripts}
        self.scripts = [(render_prompt(tok, prompt, q), q, s) for q, s in scripts.items()]

    def add_request(self, name, prompt, params, lora_request=None):
        from tokenizers.decoders import DecodeStream
        from vllm.sampling_params import RequestOutputKind

        ids = prompt["prompt_token_ids"]
        assert name not in self.active, "two requests have one name"
        assert params.output_kind is RequestOutputKind.DELTA and params.logprobs == 0
        assert params.include_stop_str_in_output and not params.skip_special_tokens
        assert params.max_tokens >= 1 and len(ids) + params.max_tokens <= self.max_len
        known = [r for records in self.records.values() for r in records if not r.busy and r.played]
        record = next((r for r in known if ids[: len(r.context)] == r.context), None)
        if record is None:
            found = [(q, script) for p, q, script in self.scripts if p == ids]
            assert found, "neither a fresh prompt nor prompt + ids: not kept to the token"
            record = Record(found[0][1], list(ids), list(ids))
            self.records[found[0][0]].append(record)
        inserted = ids[len(record.context) :]
        record.context += inserted
        record.origin += [0] * len(inserted)
        record.seeds.append(params.seed)
        record.busy = True
        self.names, self.params = self.names | {name}, params
        stream = DecodeStream(ids=ids, skip_special_tokens=False)
        request = types.SimpleNamespace(record=record, params=params, n=0, text="", stream=stream)
        self.active[name] = request

    def step(self):
        assert self.active, "step without a request"
        self.steps += 1
        outputs = [self.sample(name, request) for name, request in list(self.active.items())]
        return outputs[::-1] if self.steps % 2 else outputs  # no order is promised

    def sample(self, name, request):
        from vllm.logprobs import Logprob
        from vllm.outputs import CompletionOutput

        record, params = request.record, request.params
        end = self.tok.eos_token_id
        token = record.script[record.played] if record.played < len(record.script) else end
        logprob = -((record.played * 7 + len(record.prompt)) % 13) / 10
        record.played += 1
        request.n += 1
        record.context.append(token)
        record.origin.append(1)
        record.logprobs.append(logprob)
        delta = request.stream.step(self.tok.backend_tokenizer, token) or ""
        before = len(request.text)
        request.text += delta
        reason = stop = None
        ends = [(request.text.find(s, max(0, before - len(s))), s) for s in params.stop or ()]
        ends = [(at + len(s), s) for at, s in ends if at >= 0]
        if token == end:
            reason = "stop"
        elif ends:
            reason, (cut, stop) = "stop", min(ends)
            delta = request.text[before:cut]
        elif request.n >= params.max_tokens or len(record.context) >= self.max_len:
            reason = "length"
        row = {token: Logprob(logprob, 1, None)}
        why = {"finish_reason": reason, "stop_reason": stop}
        new = CompletionOutput(0, delta, [token], None, [row], **why)
        if reason:
            record.busy = False
            del self.active[name]
        return types.SimpleNamespace(request_id=name, outputs=[new], finished=bool(reason))

    def abort_request(self, names):
        for name in names:
            if name in self.active:
                self.active.pop(name).record.busy = False


class FakeSession:
    def __init__(self, box):
        self.box, self.closed, self.future = box, False, None

    def submit(self, code, seconds):
        assert not self.closed, "submitted to a closed session"
        assert self.future is None or self.future.done(), "submitted to a busy session"
        self.box.submitted.append(code)
        self.box.timeouts.append(seconds)
        self.future = Future()
        give = self.future.set_result
        threading.Timer(self.box.delay, give, [self.box.answer(code)]).start()
        return self.future

    def close(self):
        self.closed = True


class FakeBox:
    """reply: an output, or a function of the code; delay: seconds until it is there."""

    def __init__(self, reply="42", delay=0):
        self.reply, self.delay = reply, delay
        self.sessions, self.submitted, self.timeouts = [], [], []

    def answer(self, code):
        reply = self.reply(code) if callable(self.reply) else self.reply
        return reply if isinstance(reply, Result) else Result("ok", reply, 0.01)

    def session(self):
        self.sessions.append(FakeSession(self))
        return self.sessions[-1]

    @property
    def open(self):
        return sum(not session.closed for session in self.sessions)


def sampled_ids(tok, *parts) -> list[int]:
    """What a model would sample for these texts, tags as tokens if there are any; ints are ids."""
    ids = []
    for part in parts:
        ids += [part] if isinstance(part, int) else tok.encode(part, add_special_tokens=False)
    return ids


def play(tok, scripts, box=None, slots=64, max_len=4096, samples=1, prompt=PROMPT, **flags):
    """A trace per question (a script is a text, or ids), checked; (traces by question, engine)."""
    watch = {"on_event": flags.pop("on_event")} if "on_event" in flags else {}
    scripts = {"q": scripts} if isinstance(scripts, (str, list)) else scripts
    scripts = {q: s if isinstance(s, list) else sampled_ids(tok, s) for q, s in scripts.items()}
    engine, box = FakeEngine(tok, prompt, scripts, max_len), box or FakeBox()
    flags = AgentFlags(**{"max_tokens": 1024, **flags})
    loop = Agent(engine, tok, box, prompt, flags, max_len, slots)
    jobs = [(Problem(problem_id(q), q, None), i) for q in scripts for i in range(samples)]
    traces = {}
    for trace in loop.rollout(jobs, **watch):
        check(tok, trace, engine)
        traces[trace.problem.question, trace.sample] = trace
    assert len(traces) == len(jobs) and not engine.active
    if isinstance(box, FakeBox):
        assert not box.open
    return {q: traces[q, 0] for q in scripts} if samples == 1 else traces, engine


def one(tok, script, **options):
    return play(tok, script, **options)[0]["q"]


def check(tok, trace, engine=None):
    """What holds for every trace, however it ended."""
    assert trace.finish in ("answer", "eos", "max_tokens", "context", "max_calls", "error")
    assert len(trace.ids) == len(trace.mask) == len(trace.logprobs)
    if engine and (records := engine.records[trace.problem.question]):
        record = next(r for r in records if r.context[len(r.prompt) :] == trace.ids)
        assert trace.prompt_ids == record.prompt
        assert trace.mask == record.origin  # 0 on what was inserted and nowhere else
        assert [p for p, m in zip(trace.logprobs, trace.mask) if m] == record.logprobs
        assert len(set(record.seeds)) == len(record.seeds)  # no noise is played twice
    assert all(p == 0.0 for p, m in zip(trace.logprobs, trace.mask) if not m)
    inserted = {i for i, m in zip(trace.ids, trace.mask) if not m}
    assert not inserted & set(tok.added_tokens_decoder)
    assert sum(n for _, n in trace.spans) == len(trace.text) and all(n > 0 for _, n in trace.spans)
    ended = trace.finish == "eos" and trace.ids[-1] == tok.eos_token_id
    ids = list(zip(trace.ids, trace.mask))[: -1 if ended else None]
    runs = [[i for i, _ in run] for _, run in itertools.groupby(ids, key=lambda pair: pair[1])]
    text = "".join(tok.decode(run, skip_special_tokens=False) for run in runs)
    # Half a character at a cut, and what a stop string's last token holds behind it in a trace
    # that ends there, are in the ids and not in the text.
    assert trace.text == text or "\ufffd" in text or text.startswith(trace.text), (trace.text, text)
    assert trace.seconds >= 0


def pieces(trace) -> list[tuple[str, str]]:
    """(kind, text) of a trace's spans."""
    text = io.StringIO(trace.text)
    return [(kind, text.read(length)) for kind, length in trace.spans]
