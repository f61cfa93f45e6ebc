"""One GRPO update on the same recorded traces, through ours and through TRL's GRPOTrainer, each in a process of its own.

    (A)  64 traces of grpo.py's first step with preset mini: the examples in every prompt, at most 256 tokens
    (B)  16 traces of 1,000 tokens with short prompts: nothing to share
    ours       grpo.py's `update`
    TRL        its trainer, one step, 8 traces a micro-batch (its default; 4 in case B: 8 do not fit 24 GB), without gradient
               checkpointing; with it (its default) in case B, and in case A with --all

    python bench/train.py [--case A,B] [--all] [--keep FOLDER]

Same model, same new adapter, same advantages, loss dapo, float32 on a CPU. Loss and gradient are compared before any clip:
at ratio 1 the loss says little (it is a weighted sum of advantages), so the whole adapter's gradient is compared too.
On a CPU TRL's fused output layer falls back to logits at every position, prompts included; with Triton on a GPU it skips
those, so that the ratio there will be smaller. Seconds are those of the update, optimiser included; memory is the process's peak (a GPU: the most allocated). Needs TRL:
bench/requirements.txt.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import types
from datetime import date
from pathlib import Path

ROOT, HERE = Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent
sys.path[:] = [
    str(ROOT),
    *(path for path in sys.path if Path(path or ".").resolve() != HERE),
    str(HERE / ".packages"),
]

import grpo  # noqa: E402
from agent import Trace, has_cuda, load_tokenizer, open_agent, prepare_environment, resolve_model  # noqa: E402
from data import UserError, arithmetic, encode, load_from_flags, render_prompt, run_main  # noqa: E402
from evaluate import Grader, Verdict  # noqa: E402

MICRO = {"A": 8, "B": 4}  # TRL's traces per micro-batch


def flags(case: str):
    """grpo.py's own flags for a case."""
    shape = (
        []
        if case == "A"
        else ["--no-agent", "--problems", "4", "--group", "4", "--max-tokens", "1000"]
    )
    args = grpo.parse_flags(
        ["--preset", "mini", "--model", "embedded", "--loss", "dapo", "--lora", "none", *shape]
    )
    grpo.check_flags(args)
    args.max_grad_norm = float("inf")
    return args


def record(case: str, path: Path) -> None:
    """The traces of a case with their rewards, as JSON: [[group: [prompt_ids, ids, mask, logprobs, reward], ...], ...]"""
    args = flags(case)
    if case == "A":
        problems = load_from_flags(args)
        with open_agent(args, problems[:64]) as agent, Grader() as grader:
            agent.settings = grpo.replace(agent.settings, temperature=args.temperature_start)
            batch = grpo.draw(problems, args.seed, 0, args.problems)
            clock = {"rollout": 0.0, "score": 0.0}
            groups = grpo.roll_out(
                agent,
                grader,
                batch,
                args.group,
                grpo.parse_weights(args.reward_weights),
                clock,
                grpo.Team(),
            )
        rows = [
            [
                [s.trace.prompt_ids, s.trace.ids, s.trace.mask, s.trace.logprobs, s.reward]
                for s in group
            ]
            for group in groups
        ]
    else:  # the cost does not depend on what the tokens say: worked solutions, one after another
        prepare_environment(False)
        prompt = grpo.settings_from(args).prompt
        tokenizer = load_tokenizer(resolve_model("embedded", "none")[0])
        made = arithmetic("train", 16 * 30)
        rows = [[] for _ in range(4)]
        for i in range(16):
            ids = encode(
                tokenizer,
                "\n".join(
                    p.question + "\n" + p.meta["solution"] for p in made[30 * i : 30 * i + 30]
                ),
            )[:1000]
            prompt_ids = render_prompt(tokenizer, prompt, made[30 * (i // 4)].question)
            rows[i // 4].append(
                [prompt_ids, ids, [1] * len(ids), [0.0] * len(ids), float(i % 4 == 0)]
            )
    path.write_text(json.dumps(rows))


def scored(case: str, path: Path, args) -> list:
    """All traces of the step, advantages and weights set."""
    groups = [
        [
            grpo.Scored(
                Trace(None, 0, p, ids, mask, logprobs, inserted=mask.count(0)),
                Verdict(False, "ok"),
                reward,
            )
            for p, ids, mask, logprobs, reward in group
        ]
        for group in json.loads(path.read_text())
    ]
    args.tis_cap = 0.0  # TRL corrects with vLLM only; and nothing sampled the tokens of B
    grpo.weigh(groups, args)
    return [s for group in groups for s in group]


def peak() -> float:
    import torch

    return (
        torch.cuda.max_memory_allocated() / 2**30
        if has_cuda()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )


class Watch:
    """An optimiser that keeps the gradient it was given."""

    def __init__(self, inner, parameters):
        self.inner, self.parameters, self.gradient = inner, parameters, None

    def step(self):
        import torch

        self.gradient = torch.cat([p.grad.flatten().float().cpu() for p in self.parameters])
        self.inner.step()

    def zero_grad(self):
        self.inner.zero_grad()


def run(who: str, case: str, path: Path, out: Path) -> None:
    """One update by `who`; writes figures and the gradient to `out`."""
    args = flags(case)
    prepare_environment(False)
    import torch

    folder, _ = resolve_model("embedded", "none")
    model = grpo.load_trainer(args, folder, None)
    traces = scored(case, path, args)
    with (
        torch.no_grad()
    ):  # a new adapter's second factors are zeros, and so would be half of the gradient
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.002, generator=torch.Generator(p.device).manual_seed(len(name)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    loaded = peak()
    if who == "ours":
        watch = Watch(torch.optim.AdamW(parameters, lr=args.lr), parameters)
        used = [s for s in traces if s.weight and s.advantage]
        started = time.perf_counter()
        loss = grpo.update(model, watch, used, args.temperature_start, args, grpo.Team())["loss"]
        seconds, gradient = time.perf_counter() - started, watch.gradient
    else:
        loss, gradient, seconds = through_trl(
            model, parameters, traces, args, MICRO[case], who == "TRL, checkpointing"
        )
    sampled = sum(s.trace.sampled for s in traces)
    torch.save({"gradient": gradient}, out)
    print(
        "RESULT"
        + json.dumps(
            {
                "loss": loss,
                "seconds": seconds,
                "peak": peak(),
                "loaded": loaded,
                "sampled": sampled,
                "traces": len(traces),
                "flat": sum(not s.advantage for s in traces),
                "work": operations(model, traces, args) if who == "ours" else 0,
                "rate": matmul_rate() if who == "ours" else 0,
            }
        )
    )


def through_trl(model, parameters, traces, args, micro: int, checkpointing: bool):
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = load_tokenizer(resolve_model("embedded", "none")[0])
    pad, device = tokenizer.eos_token_id, parameters[0].device

    def matrix(rows, value, left):
        width = max(map(len, rows))
        return torch.tensor(
            [
                [value] * (width - len(r)) + list(r)
                if left
                else list(r) + [value] * (width - len(r))
                for r in rows
            ],
            device=device,
        )

    prompts, ids = [s.trace.prompt_ids for s in traces], [s.trace.ids for s in traces]
    batch = {
        "prompt_ids": matrix(prompts, pad, True),
        "prompt_mask": matrix([[1] * len(p) for p in prompts], 0, True),
        "completion_ids": matrix(ids, pad, False),
        "completion_mask": matrix([[1] * len(i) for i in ids], 0, False),
        "tool_mask": matrix([s.trace.mask for s in traces], 0, False),
        "advantages": torch.tensor([s.advantage for s in traces], device=device),
        "num_items_in_batch": torch.tensor(
            float(sum(s.trace.sampled for s in traces)), device=device
        ),
    }
    kept = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            kept["gradient"] = torch.cat([p.grad.flatten().float().cpu() for p in parameters])

    class Recorded(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            kept["started"] = time.perf_counter()
            return batch

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            kept["loss"] = kept.get("loss", 0.0) + loss.item()
            return loss

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=len(traces) // micro,
            num_generations=args.group,
            max_steps=1,
            loss_type="dapo",
            beta=0.0,
            temperature=args.temperature_start,
            learning_rate=args.lr,
            max_completion_length=args.max_tokens,
            use_cpu=not has_cuda(),
            bf16=has_cuda(),
            report_to=[],
            gradient_checkpointing=checkpointing,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            max_grad_norm=0.0,
            weight_decay=0.0,
            lr_scheduler_type="constant",
        )
        data = Dataset.from_list([{"prompt": "x"}] * (len(traces) // args.group))
        trainer = Recorded(
            model=model,
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Keep()],
        )
        trainer.train()
    return kept["loss"], kept["gradient"], time.perf_counter() - kept["started"]


def operations(model, traces, args) -> float:
    """Floating-point operations of our update, from the model's shapes: 2 per weight and token forward, 2 more backward (the
    base is frozen: no gradient of its weights; the adapter's are left out, below 5 %), attention by the pairs it looks at; the
    output layer for sampled positions only, where the gradient is made beside the logits: one product each."""
    used = [s for s in traces if s.weight and s.advantage]
    c = model.get_base_model().config
    head = c.hidden_size // c.num_attention_heads
    layer = (
        c.hidden_size * head * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
        + 3 * c.hidden_size * c.intermediate_size
    )
    P = len(grpo.shared_prefix(model, [s.trace.prompt_ids for s in used]))
    total = 0.0

    def forward(tokens, before):  # `before`: keys there already
        return c.num_hidden_layers * (
            2 * layer * tokens + 4 * c.hidden_size * tokens * (before + tokens / 2)
        )

    for s in used:
        n = len(s.trace.prompt_ids) + len(s.trace.ids) - 1 - P
        total += 2 * forward(n, P) + 2 * 2 * c.hidden_size * c.vocab_size * s.trace.sampled
    return total + 3 * forward(P, 0)


def matmul_rate() -> float:
    """Operations per second of the best of five products of 2048 x 2048 matrices, in the update's number format."""
    import torch

    device = "cuda" if has_cuda() else "cpu"
    a = torch.randn(
        2048, 2048, device=device, dtype=torch.bfloat16 if has_cuda() else torch.float32
    )
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description="One update on the same traces, ours and TRL's.")
    parser.add_argument("--case", default="A,B", help="which cases (default: A,B)")
    parser.add_argument(
        "--all",
        action="store_true",
        help="TRL with gradient checkpointing in case A too: minutes more",
    )
    parser.add_argument(
        "--keep", type=Path, help="folder of the recorded traces, made where there are none"
    )
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        who, case, path, out = args.part
        record(case, Path(path)) if who == "record" else run(who, case, Path(path), Path(out))
        return 0
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    print(f"{date.today()}, {os.cpu_count()} cores ({cpu})\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        for case in args.case.split(","):
            path = folder / f"traces-{case}.json"

            def part(who: str, out: str = "-", case=case, path=path):
                command = [sys.executable, __file__, "--part", who, case, str(path), out]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(
                        f"{who}, case {case}: "
                        + (
                            "killed, out of memory?"
                            if done.returncode == -9
                            else done.stderr[-3000:]
                        )
                    )
                return next(
                    (
                        json.loads(line[6:])
                        for line in done.stdout.splitlines()
                        if line.startswith("RESULT")
                    ),
                    None,
                )

            if not path.exists():
                part("record")
            rows, gradients = {}, {}
            for who in (
                "ours",
                "TRL",
                *(("TRL, checkpointing",) if case == "B" or args.all else ()),
            ):
                rows[who] = types.SimpleNamespace(**part(who, str(Path(temporary) / "gradient.pt")))
                import torch

                gradients[who] = torch.load(Path(temporary) / "gradient.pt")["gradient"]
                print(f"# {case} {who}: {vars(rows[who])}", file=sys.stderr, flush=True)
            base = rows["ours"]
            print(
                f"({case}) {base.traces} traces, {base.sampled} sampled tokens; {base.flat} traces without advantage, which ours leaves out\n"
            )
            print(
                "| | seconds | sampled tokens/s | peak GiB | before the update | loss | gradient differs by | ours is faster | ours needs |\n|---|"
                + "--:|" * 8
            )
            for who, r in rows.items():
                off = (gradients[who] - gradients["ours"]).norm() / gradients["ours"].norm()
                more = (
                    "| |"
                    if who == "ours"
                    else f"| {r.seconds / base.seconds:.1f} x | {base.peak / r.peak:.2f} x the memory |"
                )
                print(
                    f"| {who} | {r.seconds:.1f} | {base.sampled / r.seconds:.0f} | {r.peak:.2f} | {r.loaded:.2f} | {r.loss:.5f} | {off:.1e} {more}"
                )
            print(
                f"\nOur update is {base.work / 1e12:.2f} TFLOP by the model's shapes: {base.work / base.seconds / 1e9:.0f} GFLOP/s, "
                f"{100 * base.work / base.seconds / base.rate:.0f} % of the {base.rate / 1e9:.0f} that a 2048 x 2048 matrix product reaches.\n",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    run_main(main)
