r"""GRPO, group relative policy optimisation, from scratch: a model learns from its own attempts.

    python grpo.py                                  # without a GPU: preset mini, the embedded model
    python grpo.py --out runs/grpo --resume         # go on after Ctrl-C, kill -9 or a power cut
    python grpo.py --no-agent --out runs/plain      # the same training for plain reasoning, no tool
    python grpo.py --preset paper --out runs/paper  # the published recipe, on a GPU
    python grpo.py --merge runs/grpo                # runs/grpo/merged: a plain Hugging Face model

One step, B problems x G traces each (`train` below is the loop over steps):

  1. roll out   agent.py samples the traces at temperature T(step), with the tool
  2. score      r = sum over --reward-weights of weight * reward
  3. update     A = (r - mean r of its group) / scale, the same for all tokens of a trace
                ratio_t = pi(token t) / pi_old(token t)
                w_t = min(pi_old / pi_vLLM, --tis-cap), no gradient: vLLM drew the token, not pi_old
                kl_t = q - log q - 1,  q = pi_base / pi
                L = sum over all sampled tokens of
                    c_t (kl_beta kl_t - w_t min(ratio_t A, clip(ratio_t, 1 - low, 1 + high) A))
  4. sync       the new adapter goes back into vLLM under a new name

pi is the model in training; pi_old the same as `update` began; pi_vLLM as vLLM computed it while
it sampled; pi_base without the adapter. The code has their logarithms: new, old, vllm, base.

    --loss-type   c_t, weight of a token of trace i  |  --scale-rewards   scale
    grpo          1 / (N * length_i)                 |  group             std(r of its group) + 1e-4
    dapo          1 / (sum of all lengths)           |  batch             std(all r - mean) + 1e-4
    dr_grpo       1 / (N * max_tokens)               |  none              1

N traces and their lengths (sampled tokens) are those of one optimiser step. Formulas: DeepSeekMath
(arXiv 2402.03300) eq. 3 and 4, DAPO (2503.14476) eq. 8, 10 and 13, Dr. GRPO (2503.20783) sec. 3,
LitePPO (2508.08221), GDPO (2601.05242); the KL term is k3 of http://joschu.net/blog/kl-approx.html.

The default's trap: where nobody in a group is right, dividing by its std makes a 0.1 for a snippet
that ran as large as a 1.0 elsewhere. `batch`, `none` or --skip-flat accuracy helps (see Makefile).

Differences from the published recipe (presets/paper.toml):

  1. top_p 1, top_k off (0.8 and 50 published): pi is over all tokens, so sampling must be, too.
  2. Tool outputs get no gradient (the published code trains on them): the model did not write them.
  3. "Used code" means that a snippet ran without error (published: any pair of tags, even empty).
  4. w_t corrects for rounding, which differs between vLLM and the trainer; the gap is logged.
  5. Groups with equal rewards count in c_t, but their gradient, 0 without KL, is not computed.
  6. Adapter dropout 0 (0.1 published): the policy that is trained must be the one that sampled.
  7. The loss is `dapo`, one mean over a step's tokens; published `bnpo`, a mean for every 4 traces.
  8. The warm-up begins at lr / warm-up steps, not at 0: that step would be wasted.
  9. Preset mini rewards accuracy : code = 10 : 1, the published recipe 1 : 10.
 10. The prompt is prompts/agent.json; extras/published_prompt.py fetches theirs, for --prompt.

As published: logits divided by the temperature; one optimiser step per rollout, where ratio is 1
and clipping never acts; in preset paper KL beta 0.04, then the default of TRL, the library they
used. --minibatches and --epochs give several steps; then pi_old is the trainer's before the first.
Left out: a value model, a model spread over GPUs (it must fit one), full fine-tuning.

OUT/  config.json  metrics.jsonl  eval.jsonl  groups.jsonl (a group of a step, token by token)
      checkpoint.pt  last/ (PEFT adapter of the last step)  adapter/ (the best in evaluation)
"""

import contextlib
import json
import math
import os
import random
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Literal

from agent import Trace, check_flags, open_agent, trace_seed
from cli import AgentFlags, DataFlags, UserError
from cli import check_range, has_cuda, parse, run_main, stop_on_ctrl_c, write_log
from data import HAVE_TRAIN, Problem, load_problems
from engine import Team, load_checkpoint, load_trainer, merge, micro_batches, per_token
from engine import prepare_environment, resolve_model, save_adapter, save_checkpoint
from engine import shared_prefix, take_rank
from evaluate import CUT, interval
from grade import Grader


@dataclass(kw_only=True)
class Config(DataFlags, AgentFlags):
    """Train a LoRA adapter with GRPO, see grpo.py's docstring. The defaults are preset mini's."""

    # the run
    preset: Literal["mini", "paper", "zero"] = "paper" if has_cuda() else "mini"  # see presets/
    out: str = "runs/grpo"  # the run's folder
    resume: bool = False  # go on with the run in --out, with its flags; those given now are for now
    merge: Path | None = None  # no training: fold this run's adapter into its base, MERGE/merged
    wandb: bool = False  # log to Weights & Biases too
    steps: int = 40  # rollouts in all
    save_every: int = 5  # steps between checkpoints
    # evaluation during training
    eval_every: int = 10  # steps between evaluations on held-out problems; 0 is never
    eval_problems: int = 32  # problems that are held out, which are never trained on
    eval_n: int = 4  # traces of each of them
    eval_dataset: str | None = None  # hold nothing out: take this set's first problems
    # the rollout
    problems: int = 8  # problems of a step (B)
    in_turn: str | None = None  # a column whose values take turns, so that a step has all kinds
    group: int = 8  # traces of a problem (G)
    temperature: float = 1.0  # sampling temperature of the first step
    temperature_end: float = 0.8  # that from step --temperature-steps on, linear in between
    temperature_steps: int = 40
    # rewards and advantages
    reward_weights: str = "accuracy=1.0,code=0.1"  # of accuracy, code (a snippet ran), overlong
    reward_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Scale the weighted sum of the rewards, or each reward by itself before the sum (GDPO)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"  # what divides r - mean
    skip_flat: Literal["reward", "accuracy"] = "reward"  # leave out groups where all have the same
    # the loss
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"  # what one token weighs
    epsilon_low: float = 0.2  # the ratio is clipped below 1 - this
    epsilon_high: float = 0.4  # the ratio is clipped above 1 + this
    kl_beta: float = 0.0  # weight of the KL term, which keeps the policy near the base model
    tis_cap: float = 2.0  # truncated importance sampling: largest pi_old / pi_vLLM; 0 is off
    # the optimiser
    minibatches: int = 1  # optimiser steps that a rollout is cut into
    epochs: int = 1  # times that a rollout is used
    lr: float = 3e-4  # learning rate; LoRA wants about ten times that of full fine-tuning
    warmup: float = 0.0  # share of --steps in which the learning rate rises to --lr
    lr_schedule: Literal["constant", "cosine"] = "constant"  # after that
    weight_decay: float = 0.0  # AdamW's
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to this norm
    # a new adapter
    lora_rank: int = 16  # r
    lora_alpha: float = 32  # its output is scaled by alpha / r
    rslora: bool = False  # scale it by alpha / sqrt(r) instead
    # memory
    micro_tokens: int = 2048  # tokens of one forward and backward pass
    gradient_checkpointing: bool = False  # less memory, more time; excludes the shared prefix
    # where the other scripts have other defaults
    model: str = "embedded"  # what to train: a hub id, a folder, or `embedded`
    lora: str | None = "none"  # the adapter to begin with; none: a new one
    max_tokens: int | None = 256  # that a trace may sample
    top_p: float = 1.0  # as it is: another value would bias the loss
    top_k: int = 0  # the same
    gpu_memory_utilization: float = 0.4  # the engine's share; the rest is the trainer's


PRESETS = {"mini": Config()}
for file in Path(__file__).with_name("presets").glob("*.toml"):
    PRESETS[file.stem] = Config(**tomllib.loads(file.read_text()))


# ---- Rewards and advantages
Groups = list[list[Trace]]  # B problems with G traces each


def reward_weights(config) -> dict[str, float]:
    """`accuracy=1.0,code=0.1` as a dict. Raises UserError."""
    known = ["accuracy", "code", "overlong"]
    try:
        pairs = [part.split("=") for part in config.reward_weights.split(",")]
        return {known[known.index(name)]: float(weight) for name, weight in pairs}
    except ValueError:  # of unpacking, index or float
        raise UserError(f"--reward-weights: accuracy=1.0,code=0.1, of {known}") from None


def set_rewards(trace: Trace, right: bool, config) -> None:
    """Each reward by its name, and the weighted sum of those that count."""
    ran = any(result.status == "ok" for _, result in trace.calls)
    # DAPO's soft penalty (eq. 13): 0, then down to -1 over the last fifth of max_tokens.
    penalty = -max(0.0, trace.sampled / config.max_tokens - 0.8) / 0.2
    trace.rewards = {"accuracy": float(right), "code": float(ran), "overlong": penalty}
    trace.reward = sum(w * trace.rewards[name] for name, w in reward_weights(config).items())


def set_advantages(groups: Groups, config) -> None:
    """How much better than its own group was each trace?"""
    import torch

    traces = sum(groups, [])

    def scaled(rewards: list[float]):  # (N,) to (B, G)
        rewards = torch.tensor(rewards, dtype=torch.float64).view(len(groups), -1)
        rewards = rewards - rewards[:, :1]  # equal ones are 0 now, and so is their mean: exactly
        centred = rewards - rewards.mean(1, keepdim=True)
        if config.scale_rewards == "none":
            return centred
        std = centred.std(1, keepdim=True)
        if config.scale_rewards == "batch":
            std = centred.std()
        return centred / (std + 1e-4)

    if config.reward_aggregation == "sum_then_normalize":
        result = scaled([trace.reward for trace in traces])
    else:  # normalize_then_sum
        result = 0
        for name, weight in reward_weights(config).items():
            result += weight * scaled([trace.rewards[name] for trace in traces])
    if config.skip_flat == "accuracy":
        accuracy = scaled([trace.rewards["accuracy"] for trace in traces])
        result[accuracy == 0] = 0  # where all of a group are right, or none is
    for trace, advantage in zip(traces, result.flatten().tolist()):
        trace.advantage = advantage


# ---- One step: logprobs, loss, update, sync
def token_logprobs(model, traces: list[Trace], temperature, prefix=None):
    """log pi(token) of the tokens that the model sampled, all traces one after another: (n,).

    prefix: of shared_prefix; the result is the same without it.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.checkpoint import checkpoint

    def table(rows):  # lists of ids as (R, L), padded on the right with 0
        rows = [torch.tensor(row) for row in rows]
        return pad_sequence(rows, batch_first=True).to(model.device)

    ids = table([trace.prompt_ids + trace.ids for trace in traces])
    mask = table([[0] * len(trace.prompt_ids) + trace.mask for trace in traces])
    P, cache = prefix(len(traces)) if prefix else (0, None)  # the first P places are in the cache

    # Place t predicts token t + 1. No token sees the padding on its right, because attention is
    # causal, so no attention mask is needed. The decoder is the model without its head.
    decoder = model.get_decoder()
    output = decoder(input_ids=ids[:, P:-1], past_key_values=cache, use_cache=bool(prefix))
    sampled = mask[:, P + 1 :] == 1  # (R, L-P-1)
    hidden = output.last_hidden_state[sampled]  # (n, D)
    targets = ids[:, P + 1 :][sampled]  # (n,)

    # Logits are large, V numbers for a token. So they are made for 256 tokens at a time, and
    # `checkpoint` makes them again in the backward pass instead of keeping them.
    head = model.get_output_embeddings()

    def score(hidden, targets):  # (256, D), (256,) to (256,)
        logits = head(hidden).float() / temperature  # (256, V), as the engine sampled
        return -cross_entropy(logits, targets, reduction="none")

    chunks = zip(hidden.split(256), targets.split(256))
    return torch.cat([checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks])


def set_weights(traces: list[Trace], config) -> None:
    """Weight of one token of each trace (c_t), so that the loss is a plain sum over tokens.

    traces: all of one optimiser step, of all ranks and micro-batches: how it is cut cannot matter.
    """
    N = len(traces)
    tokens = sum(trace.sampled for trace in traces)
    for trace in traces:
        divisors = {"grpo": N * trace.sampled, "dapo": tokens, "dr_grpo": N * config.max_tokens}
        trace.weight = 1 / max(1, divisors[config.loss_type])


def policy_loss(new, old, vllm, A, c, config):
    """Per-token loss (n,), to be summed, and where the clip acts (n,). All inputs are (n,).

    new, old, vllm: logprobs, of which only new has a gradient; A: advantages; c: weights.
    """
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high) * A
    free = ratio * A
    w = (old - vllm).exp().clamp(max=config.tis_cap) if config.tis_cap else 1.0
    return -c * w * free.minimum(clipped), clipped < free


def update(model, optimizer, groups: Groups, temperature, config, team) -> dict:
    """The optimiser steps of one rollout, whose advantages are set.

    Every rank knows all traces, computes its share of them, and the gradients are added up. Returns
    what to log, {} where there was no gradient.
    """
    import torch

    # First cut the rollout: into minibatches, an optimiser step for each, and the rank's share of a
    # minibatch into micro-batches, which fit into memory.
    steps = []  # of each optimiser step its micro-batches, which are lists of traces
    size = math.ceil(len(groups) / config.minibatches)
    for start in range(0, len(groups), size):
        traces = sum(groups[start : start + size], [])
        set_weights(traces, config)
        useful = [trace for trace in traces if trace.advantage or config.kl_beta]
        if useful:
            steps.append(micro_batches(useful[team.rank :: team.size], config.micro_tokens))
    if not steps:
        return {}

    # pi_old is the policy before the first of these steps. If there is only one, it is pi itself.
    olds = {}  # by id(batch)
    if config.minibatches * config.epochs > 1:
        for batch in sum(steps, []):
            with torch.no_grad():
                olds[id(batch)] = token_logprobs(model, batch, temperature)

    parameters = [p for p in model.parameters() if p.requires_grad]
    sums = Counter()  # over sampled tokens
    norms = []  # of each step's gradient
    for batches in steps * config.epochs:
        for p in parameters:
            p.grad = torch.zeros_like(p)  # not None: a rank may have no trace to add
        prompts = [trace.prompt_ids for batch in batches for trace in batch]
        with shared_prefix(model, prompts) as prefix:  # `prefix = None` is the same, slower
            for batch in batches:
                vllm, A, c = per_token(batch).to(model.device).unbind(1)  # (n,) each
                new = token_logprobs(model, batch, temperature, prefix)  # (n,), with a gradient
                old = olds.get(id(batch), new.detach())
                loss, clip_acts = policy_loss(new, old, vllm, A, c, config)
                kl = torch.zeros_like(new)
                if config.kl_beta:
                    with torch.no_grad(), model.disable_adapter():
                        base = token_logprobs(model, batch, temperature)
                    log_q = base - new
                    kl = log_q.exp() - log_q - 1
                    loss = loss + config.kl_beta * c * kl
                loss.sum().backward()

                logged = {
                    "loss": loss,  # of `grpo` about 0: A cancels
                    "entropy": -old,  # the mean of -log pi estimates it
                    "logprob_gap": (old - vllm).abs(),
                    "clip_fraction": clip_acts,
                    "kl": kl,
                }
                sums["tokens"] += len(new)
                for name, values in logged.items():
                    sums[name] += values.double().sum().item()
                for trace, part in zip(batch, old.split([trace.sampled for trace in batch])):
                    trace.old_logprobs = part.tolist()  # for groups.jsonl

        # Then add up the ranks' gradients, so that all of them take the same step.
        for p in parameters:
            team.add(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if norm.isfinite():  # else the step is left out; the log's grad_norm shows it
            optimizer.step()
        norms.append(norm.item())

    totals = Counter()
    for sums_of_rank in team.gather(sums):
        totals.update(sums_of_rank)
    tokens = totals.pop("tokens")
    means = {name: total / tokens for name, total in totals.items()}
    return means | {"loss": totals["loss"] / len(norms), "grad_norm": fmean(norms)}


def sync(agent, model, folder) -> None:
    """The trainer's adapter into the engine, under a new name and number: vLLM caches by them."""
    from vllm.lora.request import LoRARequest

    save_adapter(model, folder)
    number = agent.lora.lora_int_id + 1
    agent.lora = LoRARequest(f"adapter-{number}", number, str(folder))
    agent.engine.add_lora(agent.lora)  # in the old one's place: there is room for one


# ---- Schedules and rollouts
def schedules(step, config) -> tuple[float, float]:
    """(sampling temperature, learning rate) of a step."""
    done = min(1.0, step / max(1, config.temperature_steps - 1))
    temperature = config.temperature + (config.temperature_end - config.temperature) * done
    lr = config.lr
    warm = round(config.warmup * config.steps)
    if step < warm:
        lr *= (step + 1) / warm
    elif config.lr_schedule == "cosine":
        done = (step - warm) / (config.steps - warm)
        lr *= 0.5 * (1 + math.cos(math.pi * done))
    return temperature, lr


def shuffled(problems: list[Problem], seed, config) -> list[Problem]:
    """In random order; with --in-turn the first of each kind, then the second of each, ..."""
    order = random.Random(seed).sample(problems, len(problems))
    nth = defaultdict(count)  # numbers each kind's problems; without --in-turn there is one kind
    return sorted(order, key=lambda problem: next(nth[problem.meta.get(config.in_turn)]))


def problems_at(step, problems: list[Problem], config) -> list[Problem]:
    """The B problems of a step: one shuffled pass over all of them, then another, ..."""
    B = config.problems
    lap, place = divmod(step, len(problems) // B)  # the last problems of a pass may be left out
    return shuffled(problems, f"{config.seed}/{lap}", config)[place * B : (place + 1) * B]


def roll_out(agent, grader, problems, n, config, team) -> Groups:
    """n traces of each problem, with their rewards: groups in the order of the problems.

    Each rank samples its share; then all of them know all traces.
    """
    # Sample numbers run over all problems: sorting by them restores the groups.
    mine = list(enumerate(problems))[team.rank :: team.size]
    jobs = [(problem, b * n + i) for i in range(n) for b, problem in mine]
    traces = []
    for trace in agent.rollout(jobs):
        traces.append(trace)
        # Other processes begin to compare the answers while other traces still decode.
        grader.submit(trace.problem.answer, trace.answer)
    for trace in traces:
        set_rewards(trace, grader(trace.problem.answer, trace.answer).equal, config)
    traces = sum(team.gather(traces), [])
    traces.sort(key=lambda trace: trace.sample)
    return [traces[i : i + n] for i in range(0, len(traces), n)]


def evaluate_policy(agent, grader, problems, config, team) -> dict:
    """Accuracy on held-out problems with its 95 % interval, at evaluate.py's temperature."""
    agent.flags = AgentFlags(agent=config.agent, end_at=config.end_at, max_tokens=config.max_tokens)
    groups = roll_out(agent, grader, problems, config.eval_n, config, team)
    shares = [fmean(trace.rewards["accuracy"] for trace in group) for group in groups]
    low, high = interval(shares)
    return {"eval": fmean(shares), "eval_low": low, "eval_high": high}


# ---- The training loop
def train(config, problems: list[Problem], held_out: list[Problem], team, stack) -> int:
    """Roll out, update, sync, log, save, again and again. Returns the exit code."""
    # ---- the trainer's model, as the checkpoint has it if there is one
    import torch

    out = Path(config.out)
    first = team.rank == 0  # the rank that writes files
    model_folder, adapter = resolve_model(config.model, config.lora)
    print(f"loading {model_folder}", flush=True)
    model = load_trainer(config, model_folder, adapter)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    step, evals = 0, {}  # evals: step -> accuracy on the held-out problems
    if saved := load_checkpoint(out / "checkpoint.pt"):
        step, evals = saved["step"], saved["evals"]
        for p, weights in zip(parameters, saved["adapter"], strict=True):
            p.data.copy_(weights)
        optimizer.load_state_dict(saved["optimizer"])

    # ---- the engine, which gets the trainer's adapter through a folder of its own
    served = Path(stack.enter_context(tempfile.TemporaryDirectory()), "adapter")
    save_adapter(model, served)
    traces = max(config.problems * config.group, len(held_out) * config.eval_n)
    # It plans its context for the longest prompt, which is one of the 64 longest questions.
    questions = sorted(problems + held_out, key=lambda problem: len(problem.question))[-64:]
    flags = replace(config, lora=str(served))
    agent = stack.enter_context(open_agent(flags, questions, traces // team.size + 1))
    grader = stack.enter_context(Grader())
    if config.wandb and first:
        import wandb

        wandb.init(project="deepmath", name=out.name, config=asdict(config))
    stop = stop_on_ctrl_c()  # a list, empty until then

    while True:
        # ---- evaluate: before the first step, after every --eval-every and after the last
        stopping = any(team.gather(bool(stop)))  # all ranks stop, or none
        if held_out and (step % config.eval_every == 0 or step >= config.steps):
            score = evaluate_policy(agent, grader, held_out, config, team)
            print(f"step {step:3d}  held out: {score['eval']:.3f}  ({len(held_out)} problems)")
            evals[step] = score["eval"]
            best = max(evals, key=evals.get)  # of equal ones the first
            if first:
                if step == best:
                    save_adapter(model, out / "adapter")
                # Written last: once this row is there, so is the best adapter.
                write_log(out / "eval.jsonl", {"step": step, **score})
        if step >= config.steps or stopping:  # Ctrl-C since then: one more step, which saves
            break

        # ---- roll out and score
        started = time.monotonic()
        temperature, lr = schedules(step, config)
        seed = trace_seed(config.seed, "step", step)
        agent.flags = replace(flags, temperature=temperature, seed=seed)
        batch = problems_at(step, problems, config)
        groups = roll_out(agent, grader, batch, config.group, config, team)
        rolled_out = time.monotonic()

        # ---- update and sync
        set_advantages(groups, config)
        for setting in optimizer.param_groups:
            setting["lr"] = lr
        stats = update(model, optimizer, groups, temperature, config, team)
        step += 1
        sync(agent, model, served)

        # ---- log and save
        if not first:
            continue
        row = {
            "step": step,
            **averages(groups),
            **stats,
            "temperature": temperature,
            "lr": lr,
            "seconds_rollout": rolled_out - started,
            "seconds_update": time.monotonic() - rolled_out,
        }
        write_log(out / "metrics.jsonl", row)
        if step % max(1, config.steps // 100) == 0:  # about 100 of a long run
            write_log(out / "groups.jsonl", group_row(step, groups, agent.tokenizer))
        report_step(row, config.steps)
        if config.wandb:
            wandb.log(row, step=step)
        if step % config.save_every == 0 or step >= config.steps or stop:
            save_adapter(model, out / "last")
            state = {"step": step, "evals": evals, "optimizer": optimizer.state_dict()}
            state["adapter"] = [p.data for p in parameters]
            save_checkpoint(out / "checkpoint.pt", state)

    # ---- the end
    if step < config.steps:
        again = f"python grpo.py --out {out} --resume --steps {config.steps}"
        print(f"stopped after step {step}: go on with: {again}")
        return 130
    if held_out:
        print(f"held out: {evals[min(evals)]:.3f} before, {evals[best]:.3f} after step {best}")
    elif first:
        save_adapter(model, out / "adapter")
    print(f"try it: python agent.py --model {config.model} --lora {out / 'adapter'}")
    return 0


def averages(groups: Groups) -> dict:
    """Means over all traces of a step, also those that the update leaves out."""
    traces = sum(groups, [])
    return {
        "reward": fmean(trace.reward for trace in traces),
        "accuracy": fmean(trace.rewards["accuracy"] for trace in traces),
        "code": fmean(trace.rewards["code"] for trace in traces),
        "length": fmean(trace.sampled for trace in traces),
        "truncated": fmean(trace.finish in CUT for trace in traces),
        "flat_groups": sum(not any(trace.advantage for trace in group) for group in groups),
    }


def group_row(step, groups: Groups, tokenizer) -> dict:
    """One group of a step that teaches something, token by token, for extras/report.py."""
    logged = "mask logprobs old_logprobs rewards reward advantage weight answer finish".split()
    group = max(groups, key=lambda group: any(trace.advantage for trace in group))
    rows = []
    for trace in group:
        tokens = [tokenizer.decode([token]) for token in trace.ids]
        rows.append({"tokens": tokens, **{name: getattr(trace, name) for name in logged}})
    problem = group[0].problem
    return {"step": step, "question": problem.question, "gold": problem.answer, "traces": rows}


def report_step(row, steps) -> None:
    """Print a step in a line, and what is wrong with it in a second one."""
    names = "reward accuracy code length logprob_gap seconds_rollout seconds_update".split()
    values = [f"{name} {row[name]:.3g}" for name in names if name in row]
    print(f"step {row['step']:3d}/{steps}", *values, sep="  ", flush=True)
    limit = 0.1 if has_cuda() else 0.001  # what rounding explains, in bfloat16 and in float32
    if "loss" not in row:
        print("  no gradient in this step: every group is flat (see --skip-flat)")
    elif row["logprob_gap"] > limit:
        print(f"  warning: engine and trainer disagree by more than {limit} per token")


# ---- The command line
def read_config() -> Config:
    """The flags over the preset's values, or over those that the run was started with."""
    given, _ = parse(Config, return_unknown_args=True, add_help=False)
    if not given.resume:
        return parse(Config, default=PRESETS[given.preset])
    try:
        saved = json.loads(Path(given.out, "config.json").read_text())["flags"]
        saved["where"] = tuple(saved["where"])
        before = Config(**saved)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--resume: no run in {given.out}: leave it away to start one") from None
    return parse(Config, default=before)


def check_config(config) -> None:
    """Refuse in one line what cannot work."""
    if (config.top_p, config.top_k) != (1, 0):
        raise UserError("training needs --top-p 1 --top-k 0: a cut distribution biases the loss")
    check_range(config, 1, 1, "tensor_parallel")  # the model must fit one GPU beside its engine
    counts = "steps save_every problems minibatches epochs eval_problems eval_n lora_rank".split()
    check_range(config, 1, math.inf, *counts, "micro_tokens")
    check_range(config, 2, math.inf, "group")
    check_range(config, 0, math.inf, "eval_every", "kl_beta", "tis_cap", "weight_decay")
    check_range(config, 0, 1, "warmup", "epsilon_low")
    check_range(config, 1e-12, math.inf, "lr", "lora_alpha", "max_grad_norm")
    check_range(config, 0.01, 2, "temperature", "temperature_end")
    reward_weights(config)
    check_flags(config)  # draws a seed for -1


def load_sets(config) -> tuple[list[Problem], list[Problem]]:
    """(training problems, held-out problems). Raises UserError where there are too few."""
    if config.dataset in HAVE_TRAIN:
        config.split = config.split or "train"
    problems = load_problems(config)
    if config.in_turn and not all(config.in_turn in problem.meta for problem in problems):
        raise UserError(f"--in-turn {config.in_turn}: give one of {', '.join(problems[0].meta)}")
    size = config.eval_problems if config.eval_every else 0
    if config.eval_dataset and size:
        flags = replace(config, dataset=config.eval_dataset, split=None, limit=size)
        held_out = load_problems(flags)
    else:
        problems = shuffled(problems, f"{config.seed}/held out", config)
        held_out, problems = problems[:size], problems[size:]
    if len(problems) < config.problems:
        raise UserError(f"{len(problems)} are too few: lower --problems or --eval-problems")
    return problems, held_out


def main() -> int:
    config = read_config()
    if config.merge:
        prepare_environment(config.verbose)
        merge(config.merge)
        return 0
    team = Team(*take_rank())  # before anything imports torch
    check_config(config)
    config = team.gather(config)[0]  # with rank 0's seed
    problems, held_out = load_sets(config)
    out = Path(config.out)
    if team.rank > 0:
        sys.stdout = open(os.devnull, "w")  # one voice is enough
    elif not config.resume:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"{out} is not empty: --resume goes on with its run, or another --out")
        row = {"flags": asdict(config), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        (out / "config.json").write_text(json.dumps(row, indent=1))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB: the trainer needs room, too
    prepare_environment(config.verbose)
    with contextlib.ExitStack() as stack:
        return train(config, problems, held_out, team, stack)


if __name__ == "__main__":
    run_main(main)
