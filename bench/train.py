"""One GRPO update on the same traces, ours and TRL's GRPOTrainer, each in a process of its own.

    A   64 traces of grpo.py's first step: solved examples in every prompt, at most 256 tokens
    B   16 traces of 1,000 tokens with short prompts: nothing to share

    python bench/train.py

Same model, new adapter and advantages, loss dapo, float32 on a CPU. At ratio 1 the loss says little
(a weighted sum of advantages), so the adapter's gradient is compared too, before any clip. On a CPU
TRL makes logits at every position, prompts included; with Triton on a GPU it does not, and the
ratio will be smaller. Memory is the process's peak (on a GPU: the most allocated).
"""

import contextlib
import math
import random
import resource
import sys
import tempfile
import time
from dataclasses import replace

from common import alone, machine, print_head, print_row  # first

from agent import Trace, open_agent
from cli import UserError, has_cuda, run_main
from data import load_problems
from engine import Team, from_pretrained, load_trainer, prepare_environment, resolve_model
from grade import Grader
from grpo import Config, problems_at, roll_out, set_advantages, update

# TRL corrects for the engine's probabilities with an engine of its own only: no correction here.
A = Config(lora="none", split="train", max_grad_norm=math.inf, tis_cap=0)
B = replace(A, problems=4, group=4, max_tokens=1000)
Groups = list[list[Trace]]
CASES = {"A": A, "B": B}
MICRO = {"A": 8, "B": 4}  # traces in a micro-batch of TRL's; in B 8 do not fit into 24 GB


def record(case: str) -> Groups:
    """The traces of a case, with rewards and advantages."""
    config = CASES[case]
    problems = load_problems(config)
    drawn = problems_at(0, problems, config)
    if case == "A":
        traces = config.problems * config.group
        with open_agent(config, drawn, traces) as agent, Grader() as grader:
            groups = roll_out(agent, grader, drawn, config.group, config, Team())
    else:  # any tokens: what they say does not matter for the cost
        rng = random.Random(0)
        T = config.max_tokens
        groups = []
        for problem in drawn:
            prompt_ids = rng.choices(range(1000, 40_000), k=50)
            groups.append([Trace(problem, i, prompt_ids) for i in range(config.group)])
            for trace in groups[-1]:
                trace.ids = rng.choices(range(1000, 40_000), k=T)
                trace.mask = [1] * T
                trace.logprobs = [0.0] * T
                trace.reward = float(trace.sample == 0)
    set_advantages(groups, config)
    return groups


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
    import torch

    return torch.cat([p.grad.flatten() for p in parameters]).float().cpu().numpy()


def peak() -> float:
    import torch

    if has_cuda():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(case: str, groups: Groups) -> tuple:
    """(seconds, GiB at the peak, loss, gradient of the whole adapter)"""
    config = CASES[case]
    model, parameters = new_model(config)
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=config.lr)
    started = time.perf_counter()
    stats = update(model, optimizer, groups, config.temperature, config, Team())
    seconds = time.perf_counter() - started
    return seconds, peak(), stats["loss"], flat(parameters)


def theirs(case: str, groups: Groups) -> tuple:
    """TRL's trainer, which is handed the traces where it would sample."""
    config = CASES[case]
    traces = [trace for group in groups for trace in group]
    model, parameters = new_model(config)
    import torch
    from datasets import Dataset
    from torch.nn.utils.rnn import pad_sequence
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = from_pretrained("AutoTokenizer", resolve_model("embedded", "none")[0])
    pad = tokenizer.eos_token_id
    device = parameters[0].device

    def padded(rows, value, side):  # (N, T)
        rows = [torch.tensor(row) for row in rows]
        return pad_sequence(rows, True, value, padding_side=side).to(device)

    tokens = sum(trace.sampled for trace in traces)
    prompts = [trace.prompt_ids for trace in traces]
    ids = [trace.ids for trace in traces]
    before = [[1] * len(row) for row in prompts]
    after = [[1] * len(row) for row in ids]
    advantages = [trace.advantage for trace in traces]
    batch = {
        "prompt_ids": padded(prompts, pad, "left"),
        "prompt_mask": padded(before, 0, "left"),
        "completion_ids": padded(ids, pad, "right"),
        "completion_mask": padded(after, 0, "right"),
        "tool_mask": padded([trace.mask for trace in traces], 0, "right"),
        "advantages": torch.tensor(advantages, device=device),
        "num_items_in_batch": torch.tensor(float(tokens), device=device),
    }
    kept = {}
    losses = []

    def never_called(completions, **_):
        raise AssertionError

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            kept["gradient"] = flat(parameters)

    class Recorded(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            kept["started"] = time.perf_counter()
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
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            bf16=has_cuda(),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
        )
        trainer = Recorded(
            model=model,
            reward_funcs=never_called,
            args=options,
            train_dataset=Dataset.from_list([{"prompt": "x"}] * len(groups)),
            processing_class=tokenizer,
            callbacks=[Keep()],
        )
        trainer.train()
    seconds = time.perf_counter() - kept["started"]
    return seconds, peak(), sum(losses), kept["gradient"]


def main() -> None:
    from numpy.linalg import norm

    print(machine())
    for case in CASES:
        groups = alone(record, case)
        traces = [trace for group in groups for trace in group]
        tokens = sum(trace.sampled for trace in traces)
        flat_ones = sum(not trace.advantage for trace in traces)
        print(f"{case}: {len(traces)} traces (ours leaves out {flat_ones} without an advantage)\n")
        print_head("", "seconds", "tokens/s", "peak GiB", "loss")
        seconds, memory, loss, gradient = alone(ours, case, groups)
        print_row("ours", seconds, tokens / seconds, memory, loss)
        slow, much, other_loss, other = alone(theirs, case, groups)
        print_row("TRL", slow, tokens / slow, much, other_loss)
        print_row("TRL / ours", slow / seconds, seconds / slow, much / memory, "")
        off = norm(other - gradient) / norm(gradient)
        print(f"\nThe gradients differ by {off:.0e} of their norm.\n", flush=True)
        limit = 0.05 if has_cuda() else 1e-3
        if off > limit or abs(other_loss - loss) > limit:
            raise UserError(f"case {case}: other losses or gradients: not the same update")


if __name__ == "__main__":
    run_main(main)
