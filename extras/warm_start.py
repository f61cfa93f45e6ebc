"""A short supervised stage before GRPO: the model reads worked solutions until it can imitate them.

    python extras/warm_start.py --out runs/warm                                          # arithmetic's own solutions, 1,200
    python extras/warm_start.py --from-traces runs/agent --out runs/warm                 # the model's own correct traces
    python extras/warm_start.py --dataset deepmath-103k --solution-key r1_solution_1 --no-agent --limit 2000 --out runs/warm
    python grpo.py --lora runs/warm/adapter

Why: GRPO raises the chance of what a model already does now and then. What it never does has no reward to follow: a
135M model does not come upon `primerange` or `solve` in eight attempts. A few hundred solutions make such programs
possible; which of them are right, and when to use them, is then learned from reward.

There is no second training loop here. Cross-entropy is what the policy gradient becomes when every trace is a given
solution with advantage 1, so grpo.py's `update` is used as it stands: same prompts, same masks (what the tool inserted
gets no gradient), same micro-batches. The number it logs as entropy is then the cross-entropy, in nats per token.

Solutions are cut at the ends of calls and outputs and each piece is encoded alone, as the agent does while it runs.
Left out: packing, several GPUs, a validation set (evaluate.py is one).

OUT/  adapter/ (PEFT, float32)   metrics.jsonl
"""

import argparse
import random
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent import (
    Trace,
    add_model_flags,
    context_length,
    has_cuda,
    load_tokenizer,
    prepare_environment,
    resolve_model,
)  # noqa: E402
from agent import settings_from  # noqa: E402
from data import (
    CALL_CLOSE,
    Parser,
    Problem,
    UserError,
    add_data_flags,
    disarm,
    encode,
    load_from_flags,
    render_prompt,
    run_main,
)  # noqa: E402
from evaluate import Verdict, load_run  # noqa: E402
from grpo import PRESETS, Scored, Team, append, load_trainer, save_adapter, update  # noqa: E402

SOLUTION_KEYS = ("solution", "r1_solution_1", "generated_solution")
OUTPUT = re.compile(rf"(?<={re.escape(CALL_CLOSE)})(\n```output\n.*?\n```\n)", re.S)


def pieces_of(text: str) -> list[tuple[str, bool]]:
    """A solution as (text, written by the model) pieces, in order; outputs are the blocks that follow a closed call."""
    return [(part, i % 2 == 0) for i, part in enumerate(OUTPUT.split(text)) if part]


def demonstration(
    tokenizer, prompt, problem: Problem, pieces: list[tuple[str, bool]], max_tokens: int
) -> Scored | None:
    """A solution as a finished trace with advantage 1; None when it is longer than max_tokens."""
    trace = Trace(problem, 0, render_prompt(tokenizer, prompt, problem.question))
    for text, own in pieces:
        ids = encode(
            tokenizer, text if own else disarm(tokenizer, text)
        )  # an output must not become a control token
        trace.ids += ids
        trace.mask += [int(own)] * len(ids)
    trace.ids.append(tokenizer.eos_token_id)
    trace.mask.append(1)
    trace.logprobs = [0.0] * len(trace.ids)
    trace.inserted = trace.mask.count(0)
    return (
        Scored(trace, Verdict(True, "ok"), 1.0, advantage=1.0)
        if trace.sampled <= max_tokens
        else None
    )


def solutions(args) -> list[tuple[Problem, list[tuple[str, bool]]]]:
    """(problem, solution in pieces) from a column of a dataset, or from the correct traces of runs of evaluate.py."""
    if args.from_traces:
        found = []
        for scored in (
            s
            for folder in args.from_traces
            for problems in load_run(folder, False).datasets.values()
            for s in problems
        ):
            problem = Problem(
                scored.problem["id"], scored.problem["question"], scored.problem["answer"]
            )
            for row, verdict in zip(scored.rows, scored.verdicts, strict=True):
                if verdict.equal and row["finish"] == "eos":
                    ends = [
                        sum(length for _, length in row["spans"][: i + 1])
                        for i in range(len(row["spans"]))
                    ]
                    found.append(
                        (
                            problem,
                            [
                                (row["text"][end - n : end], kind != "output")
                                for end, (kind, n) in zip(ends, row["spans"], strict=True)
                            ],
                        )
                    )
        random.Random(args.seed).shuffle(found)
        return found[: args.limit]
    if args.dataset == "arithmetic":
        args.split, args.limit = (
            args.split or "train",
            args.limit or 1200,
        )  # it has no end of its own
    problems = load_from_flags(args)
    key = args.solution_key or next((k for k in SOLUTION_KEYS if k in problems[0].meta), None)
    if key not in problems[0].meta:
        raise UserError(
            f"{args.dataset}: no column with solutions {key or ''}; the columns are: {', '.join(problems[0].meta)}; name it with --solution-key"
        )
    return [(p, pieces_of(str(p.meta[key]))) for p in problems if p.meta.get(key)]


def main() -> int:
    preset = PRESETS["paper" if has_cuda() else "mini"]
    parser = Parser(
        description="Supervised stage before GRPO, on a dataset's solutions or on the model's own correct traces."
    )
    # What to read
    parser.add_argument(
        "--from-traces",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="correct traces of these runs of evaluate.py, instead of a dataset's solutions",
    )
    parser.add_argument(
        "--solution-key",
        metavar="COLUMN",
        help=f"column of the solutions (default: the first of {', '.join(SOLUTION_KEYS)})",
    )
    # How to train
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/warm"),
        metavar="DIR",
        help="OUT/adapter is the result (default: runs/warm)",
    )
    parser.add_argument(
        "--epochs", type=int, default=1, metavar="N", help="passes over the solutions (default: 1)"
    )
    parser.add_argument(
        "--problems",
        type=int,
        default=32,
        metavar="N",
        help="solutions per optimiser step (default: 32)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=1e-4 if has_cuda() else 1e-3,
        metavar="X",
        help="learning rate, falling to 0 (default: %(default)s)",
    )
    parser.add_argument(
        "--lora-rank",
        type=int,
        default=preset["lora_rank"],
        metavar="R",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--lora-alpha",
        type=float,
        default=preset["lora_alpha"],
        metavar="A",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--micro-tokens",
        type=int,
        default=preset["micro_tokens"],
        metavar="N",
        help="tokens of one pass (default: %(default)s)",
    )
    add_data_flags(parser)
    add_model_flags(parser)
    parser.set_defaults(model=preset["model"], max_tokens=preset["max_tokens"], lora="none")
    args = parser.parse_args()
    for name in ("epochs", "problems", "lora_rank", "micro_tokens", "lr"):
        if getattr(args, name) <= 0:
            raise UserError(
                f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}"
            )
    if (args.out / "adapter").exists():
        raise UserError(f"{args.out / 'adapter'} exists: give another --out, or remove it")
    prompt = settings_from(args).prompt
    pairs = solutions(args)
    prepare_environment(args.verbose)
    import torch

    folder, start = resolve_model(args.model, args.lora)
    tokenizer, room = load_tokenizer(folder), context_length(folder)
    made = [
        demonstration(tokenizer, prompt, problem, pieces, args.max_tokens)
        for problem, pieces in pairs
    ]
    shown = [s for s in made if s and len(s.trace.prompt_ids) + len(s.trace.ids) <= room]
    if not shown:
        raise UserError(
            f"none of {len(made)} solutions fits --max-tokens {args.max_tokens}: raise it"
        )
    print(
        f"{len(shown)} of {len(made)} solutions fit, {sum(s.trace.sampled for s in shown)} tokens to learn",
        flush=True,
    )

    rule = {
        "kl_beta": 0.0,
        "tis_cap": 0.0,
        "updates_per_rollout": 1,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "max_grad_norm": 1.0,
    }
    args = argparse.Namespace(
        **{
            "rslora": preset["rslora"],
            "gradient_checkpointing": preset["gradient_checkpointing"],
            **vars(args),
            **rule,
        }
    )
    model = load_trainer(args, folder, Path(start) if start else None)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0
    )
    per_epoch = -(-len(shown) // args.problems)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was killed
    for step in range(args.epochs * per_epoch):
        started, at = time.monotonic(), step % per_epoch * args.problems
        order = random.Random(f"{args.seed}/{step // per_epoch}").sample(shown, len(shown))
        batch = order[at : at + args.problems]
        for s in batch:
            s.weight = 1 / sum(other.trace.sampled for other in batch)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / (args.epochs * per_epoch))
        stats = update(model, optimizer, batch, 1.0, args, Team())
        row = {
            "step": step + 1,
            "cross_entropy": stats["entropy"],
            "grad_norm": stats["grad_norm"],
            "seconds": time.monotonic() - started,
        }
        append(args.out / "metrics.jsonl", [row])
        print(
            f"step {step + 1:3d}/{args.epochs * per_epoch}  cross-entropy {row['cross_entropy']:.3f}  {row['seconds']:.0f} s",
            flush=True,
        )
    save_adapter(model, args.out / "adapter")
    print(f"{args.out / 'adapter'}: go on with: python grpo.py --lora {args.out / 'adapter'}")
    return 0


if __name__ == "__main__":
    run_main(main)
