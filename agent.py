"""The agent: a language model that runs Python while it thinks.

The model writes a snippet between <tool_call> and </tool_call>; generation stops there, the sandbox runs the snippet,
its output is appended to the *same* assistant turn, and generation goes on:

    prompt -> [model tokens ... <tool_call> code </tool_call>] [output] [model tokens ... \\boxed{answer}] end of text
    mask       1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1  0 0 0 0   1 1 1 1 1 1 1 ...

Two rules make this more than string pasting:

  * Tokens in, tokens out. A trace's ids are only ever appended to, never decoded and encoded again: BPE is not a
    bijection, and grpo.py must train on exactly the context that was sampled.
  * No rounds. Any number of traces share one vLLM engine; a trace whose snippet runs is simply not in the batch, and
    is added again, prompt + ids so far, the moment the output is there. Prefix caching makes that nearly free.

Left out: servers, other engines, several tools, JSON tool schemas. The one tool is Python and its syntax is two tags.

    python agent.py "What is 7^222 mod 1000?"           # streams the reasoning, the snippets and their outputs
    python agent.py --n 16 "..."                        # 16 traces and a vote
    python agent.py --no-agent "..."                    # the plain baseline, no tool
    python agent.py                                     # problem after problem, the model kept loaded
    echo "..." | python agent.py --json -               # one JSON object on stdout
"""

import argparse
import bisect
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from data import (
    BASE_STOPS,
    CALL_CLOSE,
    CALL_OPEN,
    SPLIT,
    Parser,
    Problem,
    Prompt,
    UserError,
    disarm,
    embedded_model,
    encode,
)
from data import (
    first_line,
    go_offline_without_hub,
    problem_id,
    read_few_shot,
    render_prompt,
    run_main,
    whole_safetensors,
    with_template,
)
from sandbox import Result, Sandbox, SandboxError, Session

OUTPUT_TOKENS = 512  # one inserted output is cut (its middle goes) to this many tokens


@dataclass
class Trace:
    """One attempt at one problem. T = tokens after the prompt; ids, mask and logprobs all have length T."""

    problem: Problem
    sample: int
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)  # exactly as sampled or inserted
    mask: list[int] = field(
        default_factory=list
    )  # 1 = sampled by the model, 0 = inserted tool output
    logprobs: list[float] = field(
        default_factory=list
    )  # under the sampling distribution; 0.0 where mask is 0
    calls: list[tuple[str, Result]] = field(default_factory=list)
    finish: str = ""  # answer | eos | max_tokens | context | max_calls | error
    text: str = ""  # all that follows the prompt, decoded once at the end
    spans: list[tuple[str, int]] = field(
        default_factory=list
    )  # (model | code | output, characters): they tile `text`
    answer: str | None = None
    box_tokens: int | None = (
        None  # sampled tokens up to the end of the first complete box in the model's prose
    )
    seconds: float = 0.0
    # while the trace runs; a segment is what the model writes between two inserted outputs:
    segment: str = ""
    ends: list[int] = field(default_factory=list)  # the segment's length after each of its tokens
    code_at: int | None = None  # where the segment's call begins; what stands before it is prose
    decoder: object = None  # turns the segment's ids into text one by one
    inserted: int = 0  # tokens inserted so far
    requests: int = 0  # engine requests so far; part of the seed
    session: Session | None = None

    @property
    def sampled(self) -> int:
        return len(self.ids) - self.inserted


@dataclass(frozen=True)
class Settings:
    """Everything besides the weights that determines what a trace looks like."""

    prompt: Prompt
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    seed: int | None = 0  # None: not repeatable
    max_tokens: int = 1024  # sampled tokens per trace
    max_step_tokens: int = 3000  # of one engine request; generation simply goes on after it
    max_calls: int = 50
    snippet_seconds: float = 20.0  # ends the snippet, not the trace
    end_at: str = "eos"  # or "box": stop at the first complete \boxed{} the model writes

    @property
    def inserted_tokens(self) -> int:
        """Allowance of a trace for inserted outputs, so that the context length can be planned."""
        return max(2 * OUTPUT_TOKENS, self.max_tokens // 2) if self.prompt.agent else 0


# ---------------------------------------------------------------------------------------------------------------
# Pure functions on text


def boxes(text: str) -> list[tuple[str, int]]:
    """(content, end) of every complete, brace-matched \\boxed{...} or \\fbox{...} in text, outermost ones, in order."""
    closes, open_braces = {}, []  # one pass: a model that loops may open thousands of boxes
    for m in re.finditer(r"\\.|[{}]", text, re.S):  # \{ and \} are characters of a set, not braces
        if m[0] == "{":
            open_braces.append(m.start())
        elif m[0] == "}" and open_braces:
            closes[open_braces.pop()] = m.start()
    found, at = [], 0
    for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        end = closes.get(m.end() - 1)
        if m.start() >= at and end:
            at = end + 1
            found.append((text[m.end() : end].strip(), at))
    return found


def extract_answer(text: str) -> str | None:
    r"""The last complete, non-empty \boxed{} of a text, or None.

    >>> extract_answer(r"First \boxed{1}, no: \boxed{\frac{1}{2}}, and now \boxed{"), extract_answer("42")
    ('\\frac{1}{2}', None)
    """
    return next((content for content, _ in reversed(boxes(text)) if content), None)


def snippet_in(call: str) -> str:
    """The code of a closed call; of several opening tags the last counts: the model began anew.

    >>> snippet_in("<tool_call> no: <tool_call>\\nprint(6 * 7)\\n</tool_call>")
    'print(6 * 7)'
    """
    return call.rpartition(CALL_CLOSE)[0].rpartition(CALL_OPEN)[2].strip("\n")


def trace_seed(seed: int | None, problem: str, sample: int, request: int) -> int | None:
    """A seed of its own for each engine request: one that is added again with the same seed replays the same noise."""
    if seed is None:
        return None
    return int.from_bytes(
        hashlib.sha256(f"{seed}/{problem}/{sample}/{request}".encode()).digest()[:7]
    )


# ---------------------------------------------------------------------------------------------------------------
# The loop


class Agent:
    """A vLLM engine, a sandbox and the settings; `rollout` is the whole method.

    engine: LLMEngine (add_request / step / abort_request); max_len: its context length; slots: traces it decodes at
    once; lora: a LoRARequest or None. grpo.py replaces `lora` and `settings` between rollouts.
    """

    def __init__(
        self,
        engine,
        tokenizer,
        box: Sandbox | None,
        settings: Settings,
        max_len: int,
        slots: int = 64,
        lora=None,
    ):
        self.engine, self.tokenizer, self.box, self.settings = engine, tokenizer, box, settings
        self.max_len, self.slots, self.lora = max_len, slots, lora
        vocabulary = (
            tokenizer.get_vocab()
        )  # the tags are one token each in Qwen3's vocabulary, ordinary text in others
        self.open_id, close_id = vocabulary.get(CALL_OPEN), vocabulary.get(CALL_CLOSE)
        self.close_ids = (
            [close_id] if None not in (self.open_id, close_id) and settings.prompt.agent else []
        )
        self.serial = itertools.count()

    def rollout(
        self, jobs: Iterable[tuple[Problem, int]], on_event: Callable | None = None
    ) -> Iterator[Trace]:
        """Traces for (problem, sample) pairs, each yielded the moment it ends. jobs may be lazy.

        on_event(trace, kind, value) sees "text" (a str as it is sampled), "call" (code) and "output" (a Result).
        """
        jobs, notify = iter(jobs), on_event or (lambda *_: None)
        decoding: dict[str, Trace] = {}  # engine request -> trace
        running: dict[Session, Trace] = {}  # its snippet is in the sandbox
        slots = 1  # then 8, 64, ...: prompts that arrive together cannot share a beginning that none of them has computed yet
        try:
            while True:
                while (
                    len(decoding) < slots
                    and len(running) < 4 * self.slots
                    and (job := next(jobs, None))
                ):
                    trace = self.begin(*job)
                    if trace.finish or not self.request(trace, decoding):
                        yield self.end(trace)
                if not decoding and not running:
                    return

                slots = min(self.slots, 8 * slots) if decoding else slots
                for output in self.engine.step() if decoding else ():
                    trace = decoding.get(output.request_id)
                    if trace is None:  # aborted in this very step
                        continue
                    new_text = self.take(trace, output.outputs[0])
                    if new_text:
                        notify(trace, "text", new_text)
                    move = self.next_move(trace, output.outputs[0], new_text)
                    if move == "decode":
                        continue
                    del decoding[output.request_id]
                    if not output.finished:
                        self.engine.abort_request([output.request_id])
                    if move == "call":
                        code = snippet_in(trace.segment[trace.code_at :])
                        notify(trace, "call", code)
                        trace.session = trace.session or self.box.session()
                        trace.session.submit(code, timeout=self.settings.snippet_seconds)
                        running[trace.session] = trace
                    elif move != "again" or not self.request(trace, decoding):
                        trace.finish = trace.finish or move
                        yield self.end(trace)

                for session, result in (
                    self.box.poll(timeout=0 if decoding else 0.2) if running else ()
                ):
                    trace = running.pop(session)
                    notify(trace, "output", result)
                    if not self.insert(trace, result) or not self.request(trace, decoding):
                        yield self.end(trace)
        finally:  # also when the caller leaves early or Ctrl-C arrives: nothing is left in the engine or the sandbox
            self.engine.abort_request(list(decoding))
            for trace in [*decoding.values(), *running.values()]:
                if trace.session:
                    trace.session.close()

    def begin(self, problem: Problem, sample: int) -> Trace:
        prompt_ids = render_prompt(self.tokenizer, self.settings.prompt, problem.question)
        return Trace(problem, sample, prompt_ids, seconds=-time.monotonic())

    def request(self, trace: Trace, decoding: dict[str, Trace]) -> bool:
        """Hand prompt + ids to the engine; False, with trace.finish set, when there is no room for a token."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        s, length = self.settings, len(trace.prompt_ids) + len(trace.ids)
        room = min(s.max_tokens - trace.sampled, self.max_len - length)
        if room < 1:
            trace.finish = "max_tokens" if trace.sampled >= s.max_tokens else "context"
            return False
        params = SamplingParams(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            seed=trace_seed(s.seed, trace.problem.id, trace.sample, trace.requests),
            max_tokens=min(room, s.max_step_tokens) if s.prompt.agent else room,
            stop_token_ids=self.close_ids,
            logprobs=0,  # 0: the sampled token's only
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        name = f"{trace.problem.id}-{trace.sample}-{trace.requests}-{next(self.serial)}"
        self.engine.add_request(
            name, {"prompt_token_ids": trace.prompt_ids + trace.ids}, params, lora_request=self.lora
        )
        trace.requests += 1
        decoding[name] = trace
        return True

    def take(self, trace: Trace, new) -> str:
        """Append what one engine step sampled (a CompletionOutput with deltas); returns the new text."""
        before = len(trace.segment)
        for number, (i, row) in enumerate(zip(new.token_ids, new.logprobs or (), strict=True), 1):
            trace.ids.append(i)
            trace.mask.append(1)
            trace.logprobs.append(row[i].logprob)
            ended = (
                new.finish_reason == "stop"
                and number == len(new.token_ids)
                and i not in self.close_ids
            )
            if self.close_ids and i == self.open_id and trace.code_at is None:
                trace.code_at = len(trace.segment)
            if not ended:  # the token that ends the turn is no text
                trace.segment += self.text_of(trace, i)
            trace.ends.append(len(trace.segment))
        if not self.close_ids and self.settings.prompt.agent and trace.code_at is None:
            at = trace.segment.find(CALL_OPEN, max(0, before - len(CALL_OPEN)))
            trace.code_at = at if at >= 0 else None
        return trace.segment[before:]

    def text_of(self, trace: Trace, token: int) -> str:
        """The text that one more token adds, "" inside a character. The decoder lives as long as the segment does: an
        engine request may begin inside a character, so the engine's own text would not do."""
        from tokenizers.decoders import DecodeStream

        trace.decoder = trace.decoder or DecodeStream(skip_special_tokens=False)
        try:
            return trace.decoder.step(self.tokenizer.backend_tokenizer, token) or ""
        except Exception:  # noqa: BLE001  bytes that are no UTF-8 at all: the library raises a bare Exception
            trace.decoder = None
            return "\ufffd"

    def next_move(self, trace: Trace, new, new_text: str) -> str:
        """decode (the request goes on) | call | again (a new request is due) | a finish value."""
        s, in_call = self.settings, trace.code_at is not None
        at_close = new.finish_reason == "stop" and trace.ids[-1] in self.close_ids
        # Where the tag is ordinary text, its last token may carry more than the tag (">\n"): it was sampled, it stays.
        # Looking at the segment's text also finds a tag that a step limit has cut in two.
        if in_call and (
            at_close if self.close_ids else CALL_CLOSE in trace.segment[trace.code_at :]
        ):
            if trace.sampled >= s.max_tokens:
                return "max_tokens"  # nobody could read the output
            return "call" if len(trace.calls) < s.max_calls else "max_calls"
        if s.end_at == "box" and "}" in new_text and extract_answer(trace.segment[: trace.code_at]):
            return "answer"
        if (
            s.prompt.stops
            and not in_call
            and any(stop in trace.segment[-len(new_text) - 20 :] for stop in s.prompt.stops)
        ):
            return "eos"
        if new.finish_reason is None:
            return "decode"
        if new.finish_reason == "stop":
            return (
                "again" if at_close else "eos"
            )  # again: a closing tag that closes nothing is plain text
        return "again" if new.finish_reason == "length" else "error"

    def insert(self, trace: Trace, result: Result) -> bool:
        """Append a snippet's output, untrusted text, as masked tokens; False, with finish set, when nothing more fits."""
        trace.calls.append((snippet_in(trace.segment[trace.code_at :]), result))
        room = min(
            self.settings.inserted_tokens - trace.inserted,
            self.max_len - len(trace.prompt_ids) - len(trace.ids) - 1,
        )
        # A fence inside the output would end the block early; SPLIT goes first, for it could hide one from `replace` and is
        # dropped later. Encoded alone, and no added token can come out of it.
        shown = encode(
            self.tokenizer,
            disarm(self.tokenizer, result.output.replace(SPLIT, "").replace("```", "'''")),
        )
        before = encode(
            self.tokenizer, ("" if trace.segment.endswith("\n") else "\n") + "```output\n"
        )
        after = encode(self.tokenizer, "\n```\n")
        room = min(OUTPUT_TOKENS, room - len(before) - len(after))
        if len(shown) > room:
            note = encode(self.tokenizer, "\n[... cut ...]\n")
            keep = (room - len(note)) // 2
            shown = shown[:keep] + note + shown[len(shown) - keep :] if keep > 0 else None
        if shown is None:
            trace.finish = "context"
            return False
        ids = before + shown + after
        trace.ids += ids
        trace.mask += [0] * len(ids)
        trace.logprobs += [0.0] * len(ids)
        trace.inserted += len(ids)
        self.close_segment(trace)
        inserted = self.tokenizer.decode(ids, skip_special_tokens=False)
        trace.text += inserted
        trace.spans.append(("output", len(inserted)))
        return True

    def close_segment(self, trace: Trace) -> None:
        """Move the segment into the trace's text; its prose, and only that, may hold the answer."""
        prose, code = (
            trace.segment[: trace.code_at],
            trace.segment[len(trace.segment[: trace.code_at]) :],
        )
        trace.text += trace.segment
        trace.spans += [
            (kind, len(part)) for kind, part in (("model", prose), ("code", code)) if part
        ]
        trace.answer = extract_answer(prose) or trace.answer
        first = next((end for content, end in boxes(prose) if content), None)
        if first and trace.box_tokens is None:
            trace.box_tokens = (
                trace.sampled - len(trace.ends) + bisect.bisect_left(trace.ends, first) + 1
            )
        trace.segment, trace.ends, trace.code_at, trace.decoder = "", [], None, None

    def end(self, trace: Trace) -> Trace:
        self.close_segment(trace)
        trace.seconds += time.monotonic()
        if trace.session:
            trace.session.close()
            trace.session = None
        return trace


# ---------------------------------------------------------------------------------------------------------------
# The engine


def has_cuda() -> bool:
    """Whether this machine and this installation can use an NVIDIA GPU; cheap, torch is not imported."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return Path(
            "/proc/driver/nvidia/version"
        ).exists() and "+cpu" not in importlib.metadata.version("torch")
    return False


ADAPTER = (
    Path(__file__).resolve().parent / "adapters" / "arithmetic"
)  # trained by `make reproduce` for the embedded model


def chosen_lora(model: str, lora: str | None) -> str | None:
    """--lora as an adapter folder or None. Without the flag the embedded model gets the adapter that we trained for it."""
    if lora is None and model == "embedded" and ADAPTER.is_dir():
        return str(ADAPTER)
    return None if lora == "none" else lora


def resolve_model(model: str, lora: str | None) -> tuple[str, str | None]:
    """(folder or hub id of the weights, adapter folder or None) for what --model and --lora say.

    A repository or folder that holds an adapter only is loaded as its base model with the adapter on top.
    """
    lora = chosen_lora(model, lora)
    if model == "embedded":
        model = str(embedded_model())
    elif (
        lora is None
        and (Path(model) / "adapter_config.json").is_file()
        and not (Path(model) / "config.json").is_file()
    ):
        model, lora = adapter_config(model)["base_model_name_or_path"], model
    elif lora is None and not Path(model).exists() and "/" in model:
        # One request settles it; the weights themselves are fetched by whoever loads them.
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
            folder = snapshot_download(model, allow_patterns=["*.json", "adapter_model*"])
            if (Path(folder) / "adapter_config.json").is_file():
                model, lora = adapter_config(folder)["base_model_name_or_path"], folder
    return model, lora


def adapter_config(folder: str) -> dict:
    """A PEFT adapter folder's configuration; UserError when the folder is not one."""
    path = Path(folder)
    if not (path / "adapter_config.json").is_file() or not any(path.glob("adapter_model.*")):
        raise UserError(
            f"--lora {folder}: not a PEFT adapter folder (it needs adapter_config.json and adapter_model.safetensors)"
        )
    damaged = [
        file.name for file in path.glob("adapter_model.safetensors") if not whole_safetensors(file)
    ]
    if damaged:
        raise UserError(
            f"--lora {folder}: {damaged[0]} is damaged or cut off: copy it again, or train again"
        )
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        return {"base_model_name_or_path": None, **config, "r": int(config["r"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--lora {folder}: adapter_config.json cannot be read as a LoRA configuration"
        ) from None


def load_tokenizer(model: str):
    from transformers import AutoTokenizer

    with one_line(model):
        return AutoTokenizer.from_pretrained(model)


def context_length(model: str) -> int:
    """Longest sequence, in tokens, that the model's configuration allows."""
    from transformers import AutoConfig

    with one_line(model):
        config = AutoConfig.from_pretrained(model)
    return int(
        getattr(config, "max_position_embeddings", None)
        or config.get_text_config().max_position_embeddings
    )


@contextlib.contextmanager
def one_line(model: str):
    """What transformers raises for a model that is not there, or damaged, as a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {model!r} cannot be had ({first_line(error)}); without a network use the embedded one: --model embedded"
        ) from None


def take_rank() -> tuple[int, int]:
    """(rank, ranks) of a torchrun job, (0, 1) without one. This process then keeps to its GPU, or to its share of the cores.

    To be called before torch is imported: torchrun leaves every rank one thread, and CUDA sees the devices it saw first.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks > 1 and has_cuda():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    elif here > 1:
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[local::here] or cores
        os.sched_setaffinity(0, mine)
        os.environ["OMP_NUM_THREADS"] = str(len(mine))
    return rank, ranks


def prepare_environment(verbose: bool) -> None:
    """What vLLM reads from the environment, set before its first import. Figures: 2 cores, 135M model, 64 traces."""
    quiet = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
        "GLOG_minloglevel": "2",
    }
    cores = sorted(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    fast = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine in this process: no pickling, no second process
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(
            map(str, cores)
        ),  # all cores; one would be kept free (135 -> 233 tok/s)
        "VLLM_CPU_KVCACHE_SPACE": str(
            max(1, min(4, memory // 4))
        ),  # GiB; 46 KB a token: 4 hold 64 traces of 1,400 tokens
        "VLLM_NO_USAGE_STATS": "1",
        # One small function of vLLM's sampler is compiled at the first token: seconds, and a C++ compiler is not everywhere.
        **({} if has_cuda() else {"TORCH_COMPILE_DISABLE": "1"}),
    }
    for key, value in {**(quiet if not verbose else {}), **fast}.items():
        os.environ.setdefault(key, value)
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        os.environ.pop(
            name, None
        )  # torchrun's, see take_rank: vLLM reads them too, and is alone in this process


@contextlib.contextmanager
def silence(active: bool):
    """Send file descriptors 1 and 2 to nowhere: libraries in C print while they load. Errors still come as exceptions."""
    if not active:
        yield
        return
    sys.stdout.flush(), sys.stderr.flush()
    saved, null = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    try:
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for target, fd in enumerate(saved, 1):
            os.dup2(fd, target), os.close(fd)
        os.close(null)


def plain_lora_products() -> None:
    """On a CPU, vLLM copies the adapter's matrices once for every token of a batch: minutes for 64 prompts. Here all tokens
    use one adapter (max_loras=1), so that two matrix products do the same."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    def add_products(
        self, y, x, lora_a, lora_b, scale, sizes, **_
    ):  # x (tokens, in), y (tokens, sum of sizes): q, k and v are one layer
        if self.is_prefill and self.no_lora:
            return
        at = 0
        for a, b, size in zip(
            lora_a, lora_b, sizes, strict=True
        ):  # a (1, 1, r, in), b (1, 1, size, r)
            y[:, at : at + size].addmm_(x @ a[0, 0].T, b[0, 0].T, alpha=scale)
            at += size

    PunicaWrapperCPU.add_lora_linear = add_products


def quick_top_k_top_p() -> None:
    """On a CPU, vLLM sorts the whole vocabulary for top-p: a third of a decoding step. After top-k only k tokens are left.
    The same result but for ties at the k-th place, where this keeps k and vLLM all of them."""
    from vllm.v1.sample.ops import topk_topp_sampler as sampler

    original = sampler.apply_top_k_top_p

    def apply(
        logits, k, p
    ):  # logits (B, V), k (B,), p (B,) or None -> logits with -inf where nothing may be sampled
        most = 0 if k is None or p is None else int(k.max())
        if not 0 < most <= 1024:
            return original(logits, k, p)
        values, index = logits.topk(most, dim=-1)  # (B, most), largest first
        place = index.new_tensor(range(most))
        values.masked_fill_(place >= k.unsqueeze(1), -math.inf)
        tail = (
            values.softmax(-1).flip(-1).cumsum(-1).flip(-1)
        )  # probability of this token and all less likely ones
        values.masked_fill_((tail <= 1 - p.unsqueeze(1)) & (place > 0), -math.inf)
        return logits.fill_(-math.inf).scatter_(-1, index, values)

    apply.original = getattr(original, "original", original)
    sampler.apply_top_k_top_p = apply


def load_engine(model: str, lora: str | None, max_len: int, slots: int, args):
    """A vLLM LLMEngine in this process, and the LoRARequest for it (or None)."""
    from vllm import EngineArgs, LLMEngine
    from vllm.lora.request import LoRARequest

    cuda, options = has_cuda(), {}
    if lora:
        config = adapter_config(lora)
        options = {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": next(
                r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= config["r"]
            ),
        }
        if isinstance(
            config.get("target_modules"), list
        ):  # else vLLM adapts the output layer too, by zeros: a third of a step
            options["lora_target_modules"] = config["target_modules"]
    if cuda:
        options |= {
            "dtype": "bfloat16",
            "gpu_memory_utilization": args.gpu_memory_utilization,
            "enable_sleep_mode": getattr(args, "sleep", False),
        }  # grpo.py's: the trainer shares the card
    else:
        # A per-request seed crashes the CPU build when a prompt's prefill is cut into chunks, so none is cut.
        # float32: as fast as bfloat16 for a small model, 5 times faster on a CPU without bfloat16 instructions, and exact:
        # vLLM's logprobs agree with Hugging Face's to 3e-5 instead of 0.5.
        options |= {
            "dtype": "float32",
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(max_len, 8192),
            "block_size": 32,
        }
        quick_top_k_top_p()
        if lora:
            plain_lora_products()
    preload = os.environ.get("LD_PRELOAD", "")
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=model,
            max_model_len=max_len,
            max_num_seqs=slots,
            enable_prefix_caching=True,
            disable_log_stats=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            seed=0,
            tensor_parallel_size=args.tensor_parallel,
            **options,
        )
    )
    os.environ["LD_PRELOAD"] = (
        preload  # vLLM's, for workers of its own: not for our sandbox and graders
    )
    request = LoRARequest("adapter-0", 1, str(Path(lora).resolve())) if lora else None
    if request:
        engine.add_lora(
            request
        )  # now, so that a wrong one ends here and not in the middle of a run
    return engine, request


@contextlib.contextmanager
def open_agent(args, problems: list[Problem] = ()):
    """An Agent for the command line's flags, ready for `problems` (their longest prompt sets the context to plan for).

    The sandbox's zygote starts first: its imports run while the engine loads. Raises UserError.
    """
    prepare_environment(args.verbose)
    settings = settings_from(args)
    if args.model != "embedded":
        go_offline_without_hub()
    with contextlib.ExitStack() as stack:
        box = stack.enter_context(Sandbox(mode=args.sandbox)) if settings.prompt.agent else None
        model, lora = resolve_model(args.model, args.lora)
        tokenizer = load_tokenizer(model)
        if not tokenizer.chat_template and not settings.prompt.stops:
            settings = replace(settings, prompt=replace(settings.prompt, stops=BASE_STOPS))
        context = context_length(model)
        lengths = [len(render_prompt(tokenizer, settings.prompt, p.question)) for p in problems]
        bare = len(render_prompt(tokenizer, settings.prompt, ""))
        longest = max(
            lengths, default=bare + 1024
        )  # at the interactive prompt the problems are not known yet
        if longest >= context:
            raise UserError(
                f"the prompt has {longest} tokens and the model's context is {context}: shorten the problem, or use --few-shot none"
            )
        max_len = min(context, longest + settings.max_tokens + settings.inserted_tokens)
        if not Path(model).exists() and not args.verbose:
            print(
                f"{model}: from the Hugging Face hub; the first time its weights are downloaded (--verbose shows how far)",
                file=sys.stderr,
                flush=True,
            )
        try:
            with silence(not args.verbose):
                engine, request = load_engine(model, lora, max_len, args.batch, args)
        except (OSError, ValueError, RuntimeError, StopIteration) as error:
            reason = " ".join((str(error).strip() or type(error).__name__).split("\n")[:3])[
                :300
            ]  # pydantic's first line says nothing
            raise UserError(
                f"the engine could not load {model}{' with ' + lora if lora else ''}: {reason} (--verbose shows the engine's log)"
            ) from None
        try:
            if box:
                box.wait_ready()
            yield Agent(engine, tokenizer, box, settings, max_len, args.batch, request)
        except SandboxError as error:  # now, or at a later snippet
            raise UserError(str(error)) from None


# ---------------------------------------------------------------------------------------------------------------
# The command line


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    cuda = has_cuda()
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="Intel/deepmath-v1" if cuda else "embedded",
        metavar="ID|DIR",
        help="hub id, folder, or `embedded` (default: %(default)s)",
    )
    group.add_argument(
        "--lora",
        metavar="DIR",
        help="PEFT adapter folder; `none` for no adapter (default: the embedded model's in adapters/, else none; grpo.py: a new one)",
    )
    group.add_argument(
        "--batch",
        type=int,
        default=256 if cuda else 64,
        metavar="N",
        help="traces decoded at once (default: %(default)s)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="X",
        help="share of the GPU's memory for the engine (default: %(default)s)",
    )
    group.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="GPUs that share one model (default: 1)",
    )
    group.add_argument("--verbose", action="store_true", help="show the engine's log")
    group = parser.add_argument_group("prompt and tool")
    group.add_argument(
        "--no-agent", action="store_true", help="plain reasoning, no tool: the baseline"
    )
    group.add_argument(
        "--prompt",
        default="chat",
        metavar="STYLE|FILE",
        help="chat (the model's template), for base models r1-zero or qwen-boxed, or a file with {question} in it (default: chat)",
    )
    group.add_argument(
        "--few-shot",
        metavar="STYLE|FILE",
        help="turns, system, none, a file like fewshot.txt, or style:file (default: turns for the embedded model, else system)",
    )
    group.add_argument(
        "--sandbox",
        choices=["auto", "limits-only"],
        default="auto",
        help="limits-only: go on where the kernel has no seccomp, at your own risk",
    )
    group = parser.add_argument_group("sampling and budgets")
    group.add_argument(
        "--temperature",
        type=float,
        default=0.6,
        metavar="T",
        help="0 is greedy (default: 0.6; grpo.py: a schedule)",
    )
    group.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="(default: %(default)s)"
    )
    group.add_argument(
        "--top-k", type=int, default=20, metavar="K", help="0 is off (default: %(default)s)"
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="same seed, same traces, up to rounding that depends on the batch; -1: not repeatable (default: 0)",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="sampled tokens per trace (default: 1024 for the embedded model, else 20000; grpo.py: the preset's)",
    )
    group.add_argument(
        "--max-step-tokens",
        type=int,
        default=3000,
        metavar="N",
        help="tokens of one engine request, after which generation goes on (default: %(default)s)",
    )
    group.add_argument(
        "--max-calls",
        type=int,
        default=50,
        metavar="N",
        help="snippets per trace (default: %(default)s)",
    )
    group.add_argument(
        "--snippet-seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="wall time of a snippet (default: %(default)s)",
    )
    group.add_argument(
        "--end-at",
        choices=["eos", "box"],
        default="eos",
        help="end a trace by itself, or at its first complete \\boxed{} (default: eos)",
    )


def settings_from(args) -> Settings:
    """Settings from parsed flags, with the defaults that depend on the model. Raises UserError for values out of range."""
    small = args.model == "embedded"
    if args.max_tokens is None:
        args.max_tokens = 1024 if small else 20_000
    low = {
        "temperature": 0,
        "top_k": 0,
        "max_tokens": 1,
        "max_step_tokens": 1,
        "max_calls": 0,
        "batch": 1,
        "tensor_parallel": 1,
    }
    for name, least in low.items():
        if not math.isfinite(getattr(args, name)) or getattr(args, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}"
            )
    if args.temperature > 2:
        raise UserError(f"--temperature must be at most 2, not {args.temperature}")
    for name, most in {"top_p": 1, "gpu_memory_utilization": 1, "snippet_seconds": 3600}.items():
        if not 0 < getattr(args, name) <= most:
            raise UserError(
                f"--{name.replace('_', '-')} must be above 0 and at most {most}, not {getattr(args, name)}"
            )
    if args.lora not in (None, "none"):
        adapter_config(args.lora)
    style = "turns" if small else "system"
    prompt = with_template(
        read_few_shot(args.few_shot or style, style, agent=not args.no_agent), args.prompt
    )
    return Settings(
        prompt,
        args.temperature,
        args.top_p,
        args.top_k,
        None if args.seed < 0 else args.seed,
        args.max_tokens,
        args.max_step_tokens,
        args.max_calls,
        args.snippet_seconds,
        args.end_at,
    )


def trace_json(trace: Trace) -> dict:
    return {
        "text": trace.text,
        "answer": trace.answer,
        "finish": trace.finish,
        "tokens": trace.sampled,
        "calls": [{"code": code, **asdict(result)} for code, result in trace.calls],
    }


class View:
    """Prints one trace as it grows: prose as it comes, a call as highlighted code, its output dimmed, errors in red."""

    def __init__(self, console):
        self.console, self.held, self.in_call = console, "", False

    def __call__(self, trace: Trace, kind: str, value) -> None:
        from rich.padding import Padding
        from rich.syntax import Syntax
        from rich.text import Text

        if kind == "text":
            self.held += value
            if not self.in_call:  # hold back what may be the beginning of a tag
                prose, tag, rest = self.held.partition(CALL_OPEN)
                keep = (
                    0
                    if tag
                    else next(
                        (
                            n
                            for n in range(len(CALL_OPEN) - 1, 0, -1)
                            if prose.endswith(CALL_OPEN[:n])
                        ),
                        0,
                    )
                )
                self.print(prose[: len(prose) - keep])
                self.held, self.in_call = (
                    (tag + rest if tag else prose[len(prose) - keep :]),
                    bool(tag),
                )
        elif kind == "call":
            self.held, self.in_call = "", False
            self.console.print(
                Padding(
                    Syntax(value, "python", background_color="default", word_wrap=True),
                    (0, 0, 0, 4),
                    expand=False,
                )
            )
        elif kind == "output":
            style = "dim" if value.status == "ok" else "red"
            self.console.print(Padding(Text(value.output, style=style), (0, 0, 0, 4), expand=False))
            self.console.print()

    def print(self, text: str) -> None:
        self.console.print(text, end="", markup=False, highlight=False, soft_wrap=True, emoji=False)

    def close(self) -> None:
        self.print(self.held + "\n")
        self.held, self.in_call = "", False


def solve(agent: Agent, problem: Problem, n: int, console, as_json: bool) -> dict:
    """n traces of one problem and their vote; prints them for people unless as_json. Returns the JSON object."""
    started, view, traces = time.monotonic(), View(console), []
    for trace in agent.rollout(
        ((problem, i) for i in range(n)), view if n == 1 and not as_json else None
    ):
        traces.append(trace)
        if n > 1 and not as_json:
            console.print(
                f"trace {trace.sample:2d}: {trace.sampled:5d} tokens, {len(trace.calls)} calls, {trace.finish}: "
                f"{trace.answer or 'no answer'}",
                markup=False,
                highlight=False,
            )
    traces.sort(key=lambda t: t.sample)
    if n == 1:
        winner, votes = traces[0].answer, [(traces[0].answer, 1)] if traces[0].answer else []
    else:
        from evaluate import (
            vote,
        )  # the one import against the reading order: evaluate.py builds on this file

        result = vote([t.answer for t in traces])
        winner, votes = result.winner, [(answer, count) for answer, count, *_ in result.clusters]
    seconds, tokens = time.monotonic() - started, sum(t.sampled for t in traces)
    if not as_json:
        if n == 1:
            view.close()
        calls = sum(len(t.calls) for t in traces)
        share = f" ({votes[0][1]} of {n} votes)" if n > 1 and votes else ""
        console.print(
            f"answer: {winner or 'none'}", style="bold", markup=False, highlight=False, end=""
        )
        console.print(
            f"{share}   {tokens} tokens, {calls} calls, {seconds:.1f} s",
            style="dim",
            markup=False,
            highlight=False,
        )
        if n == 1 and traces[0].finish not in ("eos", "answer"):
            console.print(f"(the trace was ended: {traces[0].finish})", style="dim")
    return {
        "problem": problem.question,
        "answer": winner,
        "votes": [{"answer": a, "count": c} for a, c in votes],
        "traces": [trace_json(t) for t in traces],
    }


def questions(console) -> Iterator[str]:
    """Problem after problem from the terminal, until end of file."""
    with contextlib.suppress(EOFError, KeyboardInterrupt), contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history
    console.print("One problem a line; Ctrl-D ends.", style="dim")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line:
            yield line


def main() -> None:
    parser = Parser(
        description="Solve a math problem with a model that runs Python while it thinks."
    )
    parser.add_argument(
        "problem",
        nargs="?",
        help="the problem; - reads it from standard input; none: a prompt for problem after problem",
    )
    parser.add_argument(
        "--n",
        type=int,
        default=1,
        metavar="N",
        help="traces to sample; their answers are put to the vote (default: 1)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output and nothing else"
    )
    add_model_flags(parser)
    args = parser.parse_args()
    try:
        problem = sys.stdin.read() if args.problem == "-" else args.problem
        (problem or "").encode()
    except UnicodeError:
        raise UserError("the problem is not valid UTF-8 text") from None
    if problem is not None and not problem.strip():
        raise UserError("the problem is empty: give one in quotes, or - for standard input")
    if problem is None and args.json:
        raise UserError("--json needs a problem (or - for standard input)")
    if args.n < 1:
        raise UserError(f"--n must be at least 1, not {args.n}")
    settings_from(args)  # a wrong flag ends here, before anything heavy is loaded

    from rich.console import Console

    console = Console(soft_wrap=True)
    out = os.dup(1) if args.json else None
    if (
        args.json
    ):  # whatever a library prints goes to stderr: stdout holds the object and nothing else
        os.dup2(2, 1)
    if sys.stderr.isatty():
        print("loading the model ...", file=sys.stderr, end="\r", flush=True)
    fixed = [Problem(problem_id(problem), problem.strip(), None)] if problem is not None else []
    with open_agent(args, fixed) as agent:
        if sys.stderr.isatty():
            print("\033[K", file=sys.stderr, end="", flush=True)
        for problem in fixed or (Problem(problem_id(q), q, None) for q in questions(console)):
            result = solve(agent, problem, args.n, console, args.json)
            if args.json:
                os.write(out, (json.dumps(result, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    run_main(main)
