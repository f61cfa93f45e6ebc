"""A short supervised stage before GRPO: the model reads worked solutions until it imitates them.

    python extras/warm_start.py --out runs/warm        # 160 of arithmetic's own solutions
    python extras/warm_start.py --dataset deepmath-103k --no-agent --max-tokens 7000
    python grpo.py --lora runs/warm/adapter

Why: GRPO raises the chance of what a model already does now and then. What it never does has no
reward to follow: a 135M model does not come upon `primerange` or `solve` in eight attempts.

There is no second training loop here. Cross-entropy is what the policy gradient becomes when every
trace is a given solution with advantage 1, so grpo.py's `update` is used as it stands: same
prompts, same masks (what the tool printed gets no gradient), same micro-batches. The number that it
calls entropy is then the cross-entropy, in nats per token.

Solutions are cut at the ends of calls and outputs, and each piece is encoded alone, as the agent
does while it runs. Left out: packing, several GPUs, a validation set (evaluate.py is one).
"""

import math
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent import Trace, check_flags  # noqa: E402
from cli import UserError, check_range, has_cuda, parse, run_main, write_log  # noqa: E402
from data import CALL_CLOSE, HAVE_TRAIN, disarm, encode, load_problems, render_prompt  # noqa: E402
from engine import Team, from_pretrained, load_trainer  # noqa: E402
from engine import prepare_environment, resolve_model, save_adapter  # noqa: E402
from grpo import Config, update  # noqa: E402

SOLUTION_KEYS = ("solution", "r1_solution_1", "generated_solution")
OUTPUT = re.compile(rf"(?<={re.escape(CALL_CLOSE)})(\n```output\n)(.*?)(\n```\n)", re.S)


@dataclass(kw_only=True)
class Flags(Config):
    """Supervised stage before GRPO, on a dataset's solutions."""

    solution_key: str | None = None
    """Column of the solutions; without this flag the first of the usual names."""
    out: str = "runs/warm"
    problems: int = 16
    lr: float = 1e-4 if has_cuda() else 4e-4


def demonstration(tokenizer, prompt, problem, solution: str) -> Trace:
    """A solution as a finished trace with advantage 1; outputs are masked, as if inserted."""
    trace = Trace(problem, 0, render_prompt(tokenizer, prompt, problem.question), advantage=1.0)
    for i, part in enumerate(OUTPUT.split(solution)):
        own = i % 4 == 0  # the others are the three parts of a block that follows a closed call
        ids = encode(tokenizer, part if own else disarm(tokenizer, part))
        trace.ids += ids
        trace.mask += [int(own)] * len(ids)
    trace.ids.append(tokenizer.eos_token_id)
    trace.mask.append(1)
    trace.logprobs = [0.0] * len(trace.ids)
    return trace


def read_traces(flags: Flags, tokenizer, prompt, context: int) -> list[Trace]:
    """Demonstrations that fit. Raises UserError where there are none."""
    if flags.dataset in HAVE_TRAIN:
        flags.split = flags.split or "train"
    if flags.dataset == "arithmetic":
        flags.limit = flags.limit or 160
    problems = load_problems(flags)
    names = [flags.solution_key] if flags.solution_key else SOLUTION_KEYS
    key = next((name for name in names if name in problems[0].meta), None)
    if key is None:
        columns = ", ".join(problems[0].meta)
        raise UserError(f"{flags.dataset} has no solutions: give --solution-key, of {columns}")
    traces = []
    for problem in problems:
        if solution := problem.meta.get(key):
            trace = demonstration(tokenizer, prompt, problem, str(solution))
            whole = len(trace.prompt_ids) + len(trace.ids) <= context
            if whole and trace.sampled <= flags.max_tokens:
                traces.append(trace)
    if not traces:
        raise UserError(f"no solution fits --max-tokens {flags.max_tokens}: raise it")
    print(f"{len(traces)} of {len(problems)} solutions fit", flush=True)
    return traces


def main() -> None:
    flags = parse(Flags)
    check_range(flags, 1, math.inf, "epochs", "problems")
    flags.tis_cap, flags.loss_type, passes, flags.epochs = 0, "dapo", flags.epochs, 1
    out = Path(flags.out)
    if (out / "adapter").exists():
        raise UserError(f"{out / 'adapter'} exists: give another --out, or remove it")
    prompt = check_flags(flags)
    prepare_environment(flags.verbose)
    import torch

    folder, adapter = resolve_model(flags.model, flags.lora)
    tokenizer = from_pretrained("AutoTokenizer", folder)
    context = from_pretrained("AutoConfig", folder).get_text_config().max_position_embeddings
    traces = read_traces(flags, tokenizer, prompt, context)
    model = load_trainer(flags, folder, adapter)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=flags.lr, weight_decay=0.0)
    out.mkdir(parents=True, exist_ok=True)

    batches = []
    for lap in range(passes):
        order = random.Random(f"{flags.seed}/{lap}").sample(traces, len(traces))
        batches += [order[i : i + flags.problems] for i in range(0, len(order), flags.problems)]
    for step, batch in enumerate(batches):
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = flags.lr * (1 - step / len(batches))
        stats = update(model, optimizer, [batch], 1.0, flags, Team())
        row = {"step": step + 1, "cross_entropy": stats["entropy"]}
        row["seconds"] = time.monotonic() - started
        write_log(out / "metrics.jsonl", row)
        line = f"step {step + 1:3d}/{len(batches)}  cross-entropy {row['cross_entropy']:.3f}"
        print(f"{line}  {row['seconds']:.0f} s", flush=True)
    save_adapter(model, out / "adapter")
    print(f"{out / 'adapter'}: go on with: python grpo.py --lora {out / 'adapter'}")


if __name__ == "__main__":
    run_main(main)
