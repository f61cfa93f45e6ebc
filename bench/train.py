"""One GRPO update on the same traces, ours and TRL's GRPOTrainer, each in a process of its own.

    A   64 traces of grpo.py's first step: solved examples in every prompt, at most 256 tokens
    B   16 traces of 1,000 tokens with short prompts: nothing to share

    python bench/train.py [--cases A B]

Same model, same new adapter, same advantages, loss dapo, float32 on a CPU. TRL takes one step in
micro-batches of 8 traces (B: 4, as 8 do not fit into 24 GB) without gradient checkpointing. At
ratio 1 the loss says little, it is a weighted sum of advantages, so the gradient of the whole
adapter is compared too, before any clip. On a CPU TRL makes logits at every position, prompts
included; with Triton on a GPU it does not, so that the ratio will be smaller there. Seconds are the
update's, the optimiser included; memory is the process's peak (on a GPU: the most allocated).
"""

import contextlib
import math
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, replace

from common import alone, machine, print_head, print_row  # first

from agent import Trace, open_agent
from cli import UserError, has_cuda, parse, run_main
from data import encode, load_problems, read_prompt, render_prompt
from engine import Team, load_tokenizer, load_trainer, prepare_environment, resolve_model
from grade import Grader
from grpo import Config, batches, roll_out, set_advantages, update

# TRL corrects for the engine's probabilities with an engine of its own only: no correction here.
A = Config(lora="none", split="train", max_grad_norm=math.inf, tis_cap=0)
B = replace(A, agent=False, problems=4, group=4, max_tokens=1000)
CASES = {"A": A, "B": B}
MICRO = {"A": 8, "B": 4}  # traces in a micro-batch of TRL's


@dataclass(kw_only=True)
class Flags:
    """One update on the same traces, ours and TRL's."""

    cases: tuple[str, ...] = ("A", "B")
    """Which ones."""


def record(case: str) -> list[list[Trace]]:
    """The traces of a case, with rewards and advantages."""
    config = CASES[case]
    problems = load_problems(config)
    if case == "A":
        drawn = next(batches(problems, config.problems, config.seed, skip=0))
        traces = config.problems * config.group
        with open_agent(config, drawn, traces) as agent, Grader() as grader:
            groups = roll_out(agent, grader, drawn, config.group, config, Team())
    else:
        groups = solutions(config, problems)
    set_advantages(groups, config)
    return groups


def solutions(config: Config, problems: list) -> list[list[Trace]]:
    """Worked solutions, one after another: what tokens say does not matter for the cost."""
    tokenizer, prompt = load_tokenizer(resolve_model("embedded", "none")[0]), read_prompt(config)
    traces = []
    for i in range(config.problems * config.group):
        first = problems[30 * (i // config.group)]
        some = problems[30 * i : 30 * i + 30]
        text = "\n".join(f"{problem.question}\n{problem.meta['solution']}" for problem in some)
        ids = encode(tokenizer, text)[: config.max_tokens]
        trace = Trace(first, i, render_prompt(tokenizer, prompt, first.question), ids)
        trace.mask, trace.logprobs = [1] * len(ids), [0.0] * len(ids)
        trace.reward = float(i % config.group == 0)
        traces.append(trace)
    return [traces[i : i + config.group] for i in range(0, len(traces), config.group)]


def new_model(config: Config):
    """(model, the adapter's parameters), the same in every process."""
    prepare_environment(verbose=False)
    import torch

    model = load_trainer(config, resolve_model("embedded", "none")[0], None)
    with torch.no_grad():  # a new adapter's second factors are 0, and half of the gradient is, too
        for name, p in model.named_parameters():
            if "lora_B" in name:
                generator = torch.Generator(p.device).manual_seed(len(name))
                p.normal_(0, 0.002, generator=generator)
    return model, [p for p in model.parameters() if p.requires_grad]


def flat(parameters):
    """Their gradients in one row."""
    import numpy

    return numpy.concatenate([p.grad.flatten().float().cpu().numpy() for p in parameters])


def peak() -> float:
    """GiB."""
    import torch

    if has_cuda():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(case: str, groups: list[list[Trace]]) -> tuple:
    """(seconds, loss, gradient, peak memory)"""
    import torch

    config = CASES[case]
    model, parameters = new_model(config)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr)
    started = time.perf_counter()
    stats = update(model, optimizer, groups, config.temperature, config, Team())
    return time.perf_counter() - started, stats["loss"], flat(parameters), peak()


def theirs(case: str, groups: list[list[Trace]]) -> tuple:
    """The same of TRL's trainer, which is handed the traces where it would sample."""
    config, traces = CASES[case], [trace for group in groups for trace in group]
    model, parameters = new_model(config)
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = load_tokenizer(resolve_model("embedded", "none")[0])
    pad, device = tokenizer.eos_token_id, parameters[0].device

    def padded(rows: list[list[int]], value: int, side: str):  # (N, T)
        rows = [torch.tensor(row) for row in rows]
        pad_sequence = torch.nn.utils.rnn.pad_sequence
        return pad_sequence(rows, True, value, padding_side=side).to(device)

    tokens = sum(trace.sampled for trace in traces)
    prompts, ids = [trace.prompt_ids for trace in traces], [trace.ids for trace in traces]
    batch = {
        "prompt_ids": padded(prompts, pad, "left"),
        "prompt_mask": padded([[1] * len(row) for row in prompts], 0, "left"),
        "completion_ids": padded(ids, pad, "right"),
        "completion_mask": padded([[1] * len(row) for row in ids], 0, "right"),
        "tool_mask": padded([trace.mask for trace in traces], 0, "right"),
        "advantages": torch.tensor([trace.advantage for trace in traces], device=device),
        "num_items_in_batch": torch.tensor(float(tokens), device=device),
    }
    started, gradient, losses = 0.0, None, []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            nonlocal gradient
            gradient = flat(parameters)

    class Recorded(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            nonlocal started
            started = time.perf_counter()
            return batch

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            losses.append(loss.item())
            return loss

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=MICRO[case],
            gradient_accumulation_steps=len(traces) // MICRO[case],
            num_generations=config.group,
            max_completion_length=config.max_tokens,
            max_steps=1,
            loss_type="dapo",
            beta=0.0,
            temperature=config.temperature,
            learning_rate=config.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            use_cpu=not has_cuda(),
            bf16=has_cuda(),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Recorded(
            model=model,
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            args=options,
            train_dataset=Dataset.from_list([{"prompt": "x"}] * len(groups)),
            processing_class=tokenizer,
            callbacks=[Keep()],
        )
        trainer.train()
    return time.perf_counter() - started, sum(losses), gradient, peak()


def main() -> None:
    import numpy

    flags = parse(Flags)
    print(machine())
    titles = "seconds", "tokens/s", "peak GiB", "loss", "gradient differs by"
    for case in flags.cases:
        groups = alone(record, case)
        traces = [trace for group in groups for trace in group]
        tokens = sum(trace.sampled for trace in traces)
        left_out = sum(not trace.advantage for trace in traces)
        print(f"{case}: {len(traces)} traces, {tokens} sampled tokens; {left_out} traces have no")
        print("advantage and are left out by ours\n")
        print_head("", *titles, "ours is faster", "ours needs")
        base = alone(ours, case, groups)
        for name, run in (("ours", base), ("TRL", alone(theirs, case, groups))):
            seconds, loss, gradient, memory = run
            off = numpy.linalg.norm(gradient - base[2]) / numpy.linalg.norm(base[2])
            numbers = f"{seconds:.1f}", f"{tokens / seconds:.0f}", f"{memory:.2f}", f"{loss:.5f}"
            ratios = f"{seconds / base[0]:.1f} x", f"{base[3] / memory:.2f} x the memory"
            print_row(name, *numbers, f"{off:.0e}", *(("", "") if name == "ours" else ratios))
            if off > (0.05 if has_cuda() else 1e-3) or abs(loss - base[1]) > 1e-3:
                raise UserError(f"case {case}: loss or gradient differ: not the same update")
        print()


if __name__ == "__main__":
    run_main(main)
