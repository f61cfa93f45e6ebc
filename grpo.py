r"""GRPO from scratch: a language model learns from its own attempts when to reach for Python.

    python grpo.py                                  # the embedded model on arithmetic (preset mini)
    python grpo.py --out runs/grpo --resume         # go on after Ctrl-C, kill -9 or a power cut
    python grpo.py --no-agent --out runs/plain      # the same training for plain reasoning, no tool
    python grpo.py --preset paper --out runs/paper  # the published recipe, on a GPU
    torchrun --nproc-per-node 8 grpo.py --problems 64     # 8 GPUs, each with its own engine
    python grpo.py --merge runs/grpo                # runs/grpo/merged: a plain Hugging Face model

One step, B problems x G traces each, N = B * G:

  1. roll out   agent.py samples the N traces at temperature T(step), with the tool
  2. score      r = sum over --reward-weights of weight * reward function
  3. update     A = how much better than its own group a trace was, for each of its tokens
                ratio_t = pi(token t) / pi_old(token t)
                w_t = min(pi_old / pi_vLLM, --tis-cap), a constant
                L = - sum of c_t w_t min(ratio_t A, clip(ratio_t, 1 - low, 1 + high) A)
                    + kl_beta * sum of c_t (q - log q - 1),  q = pi_base / pi
                over all sampled tokens; the base model is the same one, adapter off
  4. sync       the new adapter goes back into vLLM under a new name

    --loss-type   c_t, weight of a token of trace i    --scale-rewards   divides r - mean by
    grpo          1 / (N * length_i)                   group             std of its group + 1e-4
    dapo          1 / (sum of all lengths)             batch             std over the step + 1e-4
    dr_grpo       1 / (N * max_tokens)                 none              1

Lengths count sampled tokens. Formulas: DeepSeekMath (arXiv 2402.03300) eq. 3 and 4, DAPO
(2503.14476) eq. 8, 10 and 13, Dr. GRPO (2503.20783) sec. 3, LitePPO (2508.08221) for `batch`, GDPO
(2601.05242) for normalize_then_sum; the KL term is k3 of http://joschu.net/blog/kl-approx.html.

A trap of small rewards: where nobody in a group is right, dividing by the group's std makes a 0.1
for a snippet that ran as large as a 1.0 for a right answer elsewhere. `batch` and `none` do not.

Differences from the published recipe (preset paper has its numbers), each with its reason:

  1. top_p 1, top_k off (0.8 and 50 published): the ratio is not that of a cut distribution.
  2. Tool outputs get no gradient (the published code trains on them): the model did not write them.
  3. "Used code" means that a snippet ran without error (published: any pair of tags, even empty).
  4. w_t corrects for the small gap between vLLM's and the trainer's probabilities, which is logged.
  5. Groups with equal rewards are not computed where there is no KL term: their gradient is 0.
  6. Adapter dropout 0 (0.1 published): the policy that is trained must be the one that sampled.
  7. The loss is `dapo`, the mean over a step's tokens; published is `bnpo`, the same mean over each
     micro-batch of 4 traces, so that there a token counts more in a batch of short traces.
  8. The warm-up begins at lr / warm-up steps, not at 0: that step would be wasted.
  9. Preset mini rewards accuracy : code = 10 : 1, the published recipe 1 : 10.

Like the published recipe: logits divided by the sampling temperature, KL with beta 0.04 (TRL's
default then), one optimiser step per rollout, where the ratio is 1 and clipping never acts.
--minibatches and --epochs make several; then pi_old is the trainer's before the first of them.

Left out: a value model, a model spread over GPUs (it must fit one), full fine-tuning.

OUT/  config.json  metrics.jsonl  eval.jsonl  groups.jsonl (a group of each step, token by token)
      checkpoint.pt  last/ (PEFT adapter of the last step)  adapter/ (the best in evaluation)
      python extras/report.py OUT makes curves and a page of them
"""

import contextlib
import fcntl
import json
import math
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal

from agent import Agent, Trace, check_flags, open_agent, trace_seed
from cli import AgentFlags, DataFlags, UserError
from cli import check_range, has_cuda, parse, run_main, stop_on_ctrl_c, write_log
from data import Problem, load_problems
from engine import Team, compute_dtype, load_checkpoint, load_trainer, merge, micro_batches
from engine import per_token, prepare_environment, resolve_model, save_adapter, save_checkpoint
from engine import shared_prefix, take_rank
from evaluate import CUT, interval
from grade import Grader


# ---- The flags


@dataclass(kw_only=True)
class Start:
    """What has to be known before the other flags have their defaults."""

    preset: Literal["mini", "paper", "zero"] = "paper" if has_cuda() else "mini"
    """Values of all flags that are not given; the defaults below are mini's."""
    out: str = "runs/grpo"
    """The run's folder."""
    resume: bool = False
    """Go on with the run in --out, with the flags that it was started with."""


@dataclass(kw_only=True)
class Config(Start, DataFlags, AgentFlags):
    """Train a LoRA adapter with GRPO; the docstring of grpo.py explains the method."""

    merge: str | None = None
    """No training: fold the adapter of this run (or adapter folder) into its base, as MERGE/merged.
    """
    wandb: bool = False
    """Log to Weights & Biases too."""
    steps: int = 40
    """Rollouts in all."""
    save_every: int = 5
    """Steps between checkpoints."""
    eval_every: int = 10
    """Steps between evaluations on held-out problems; 0 is never."""
    eval_problems: int = 32
    """Problems held out of the training set, which are never trained on."""
    eval_n: int = 4
    """Traces of each of them."""
    eval_dataset: str | None = None
    """Hold out nothing, evaluate on this set's first problems instead."""
    # the method
    problems: int = 8
    """Problems of a step (B)."""
    group: int = 8
    """Traces of a problem (G)."""
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """What one token weighs, see the docstring's table."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What divides r - mean, see the docstring's table."""
    reward_weights: str = "accuracy=1.0,code=0.1"
    """Reward functions and their weights: accuracy, code, overlong."""
    reward_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Scale the weighted sum of the rewards, or each reward by itself before the sum (GDPO)."""
    overlong_buffer: int = 2048
    """The reward `overlong` falls from 0 to -1 over this many tokens before --max-tokens."""
    skip_flat: Literal["reward", "accuracy"] = "reward"
    """Leave out groups whose rewards are all equal, or whose answers are all right or all wrong."""
    epsilon_low: float = 0.2
    """Clip the ratio below 1 - this."""
    epsilon_high: float = 0.4
    """Clip the ratio above 1 + this."""
    kl_beta: float = 0.0
    """Weight of the KL term to the base model."""
    tis_cap: float = 2.0
    """Cap of the correction pi_old / pi_vLLM; 0 is no correction."""
    minibatches: int = 1
    """Optimiser steps that a rollout is cut into."""
    epochs: int = 1
    """Times that a rollout is used."""
    temperature: float = 1.0
    """Sampling temperature of the first step."""
    temperature_end: float | None = 0.8
    """And of step --temperature-steps, linear in between; None is no schedule."""
    temperature_steps: int = 40
    """Steps from one to the other."""
    # optimiser and adapter
    lr: float = 3e-4
    """Learning rate; LoRA wants about ten times that of full fine-tuning."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up."""
    warmup: float = 0.0
    """Share of the steps."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    lora_rank: int = 16
    """Rank r of a new adapter."""
    lora_alpha: float = 32
    """Its scale is alpha / r."""
    rslora: bool = False
    """Its scale is alpha / sqrt(r)."""
    micro_tokens: int = 2048
    """Tokens of one forward and backward pass, prompts included: only memory depends on it."""
    gradient_checkpointing: bool = False
    """Less memory, more time; excludes the shared prefix."""
    sleep: bool = False
    """The engine's weights leave the GPU during an update: for cards that cannot hold both."""
    # where the other scripts have other defaults
    model: str = "embedded"
    lora: str | None = "none"
    max_tokens: int | None = 256
    top_p: float = 1.0
    top_k: int = 0
    gpu_memory_utilization: float = 0.4


# fmt: off
PRESETS = {
    "mini": Config(),
    "paper": Config(  # Intel's DeepMath; 1e-6 is published, ten times that is usual for LoRA
        model="Qwen/Qwen3-4B-Thinking-2507", dataset="openmathreasoning",
        steps=1000, save_every=20, eval_every=0, problems=4, group=4, max_tokens=5000,
        reward_weights="code=1.0,accuracy=0.1", kl_beta=0.04,
        temperature=1.2, temperature_end=0.7, temperature_steps=1000,
        lr=1e-6, lr_schedule="cosine", warmup=0.1, weight_decay=0.001,
        lora_rank=32, lora_alpha=16, rslora=True,
        micro_tokens=16384, gradient_checkpointing=True, gpu_memory_utilization=0.5),
    "zero": Config(  # DeepMath-Zero-7B; they trained all weights at 1e-6, here it is an adapter
        model="Qwen/Qwen2.5-7B", agent=False, prompt="r1-zero", dataset="deepmath-103k",
        steps=500, save_every=10, eval_every=0, problems=512, group=16, minibatches=16,
        max_tokens=10240, reward_weights="accuracy=1.0,overlong=1.0", skip_flat="accuracy",
        epsilon_high=0.28, temperature_end=None,
        lr=1e-5, warmup=0.02, weight_decay=0.1, lora_rank=32,
        micro_tokens=16384, gradient_checkpointing=True, gpu_memory_utilization=0.5),
}
# fmt: on


# ---- Rewards: functions of a trace, whether its answer is right, and the flags


def accuracy_reward(trace: Trace, right: bool, config: Config) -> float:
    return float(right)


def code_reward(trace: Trace, right: bool, config: Config) -> float:
    """1 if a snippet ran without error."""
    return float(any(result.status == "ok" for _, result in trace.calls))


def overlong_reward(trace: Trace, right: bool, config: Config) -> float:
    """DAPO's soft penalty (eq. 13): 0, then down to -1 over the buffer before max_tokens."""
    over = trace.sampled - (config.max_tokens - config.overlong_buffer)
    return -min(1.0, max(0.0, over / config.overlong_buffer))


REWARDS = {"accuracy": accuracy_reward, "code": code_reward, "overlong": overlong_reward}


def reward_weights(config: Config) -> dict[str, float]:
    """`code=1.0,accuracy=0.1` as a dict. Raises UserError."""
    try:
        pairs = [part.split("=") for part in config.reward_weights.split(",")]
        return {name: float(weight) for name, weight in pairs if REWARDS[name]}
    except (ValueError, KeyError):
        known = ", ".join(REWARDS)
        raise UserError(f"--reward-weights: accuracy=1.0,code=0.1, of {known}") from None


# ---- One step: advantages, logprobs, loss, update, sync


def advantages(rewards, scale: str):
    """Rewards (B, G) to advantages (B, G); a row of equal rewards gives exactly 0.

    >>> import torch
    >>> advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]), "none").tolist()
    [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    flat = rewards.amax(1) == rewards.amin(1)  # (B,)
    centred = rewards - rewards.mean(1, keepdim=True)
    centred[flat] = 0  # whatever the rounding of the mean
    if scale == "group":
        return centred / (rewards.std(1, keepdim=True) + 1e-4)
    if scale == "batch":
        return centred / (centred.std() + 1e-4)
    return centred


def set_advantages(groups: list[list[Trace]], config: Config) -> None:
    """How much better than its own group was each trace?"""
    import torch

    traces = [trace for group in groups for trace in group]

    def table(values) -> torch.Tensor:  # of all traces, as (B, G)
        return torch.tensor(values, dtype=torch.float64).view(len(groups), -1)

    if config.reward_aggregation == "sum_then_normalize":
        result = advantages(table([t.reward for t in traces]), config.scale_rewards)
    else:
        result = torch.zeros(len(groups), len(groups[0])).double()
        for name, weight in reward_weights(config).items():
            rewards = table([t.rewards[name] for t in traces])
            result += weight * advantages(rewards, config.scale_rewards)
    if config.skip_flat == "accuracy":
        right = table([t.rewards["accuracy"] for t in traces])
        result[right.amax(1) == right.amin(1)] = 0
    for trace, advantage in zip(traces, result.flatten().tolist(), strict=True):
        trace.advantage = advantage


def set_weights(traces: list[Trace], config: Config) -> None:
    """Weight of one token of each trace (c_t), so that the loss is a plain sum over tokens.

    traces: all of one optimiser step, of all ranks and micro-batches: one global token count, and
    how the step is cut cannot matter.
    """
    N, tokens = len(traces), sum(trace.sampled for trace in traces)
    for trace in traces:
        trace.weight = 1 / max(1, tokens)  # dapo: every token counts the same
        if config.loss_type == "grpo":  # every trace counts the same
            trace.weight = 1 / (N * max(1, trace.sampled))
        if config.loss_type == "dr_grpo":  # no length anywhere
            trace.weight = 1 / (N * config.max_tokens)


def token_logprobs(model, traces: list[Trace], temperature: float, prefix=None):
    """log pi(token) of the tokens that the model sampled, all traces one after another: (n,).

    prefix: a Prefix that all N prompts begin with, already computed; the result is the same.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.checkpoint import checkpoint

    P = prefix.length if prefix else 0
    ids = [torch.tensor((t.prompt_ids + t.ids)[P:]) for t in traces]
    ids = pad_sequence(ids, batch_first=True).to(model.device)  # (N, T), padded on the right
    own = [torch.tensor(([0] * len(t.prompt_ids) + t.mask)[P:]) for t in traces]
    own = pad_sequence(own, batch_first=True)[:, 1:].bool().to(model.device)  # (N, T-1): sampled?

    # The decoder is the model without its head. No attention mask: attention is causal, so that a
    # token never sees the padding on its right.
    decoder, head = model.get_base_model().get_decoder(), model.get_output_embeddings()
    cache = prefix.expand(len(traces)) if prefix else None
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        output = decoder(input_ids=ids[:, :-1], past_key_values=cache, use_cache=bool(cache))
    hidden = output.last_hidden_state[own]  # (n, D): place t predicts token t + 1
    targets = ids[:, 1:][own]  # (n,)

    def score(hidden, targets):  # (256, D), (256,): their logits (256, V) are never kept
        logits = head(hidden).float() / temperature  # as the engine sampled
        return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    chunks = zip(hidden.split(256), targets.split(256), strict=True)
    return torch.cat([checkpoint(score, h, t, use_reentrant=False) for h, t in chunks])


def policy_loss(new, old, vllm, A, c, config: Config):
    """Per-token loss (n,), to be summed, and where the clip acts (n,). All inputs are (n,).

    new: logprobs with a gradient; old: the trainer's before the first optimiser step; vllm: the
    engine's while it sampled; A: advantages; c: weights.
    """
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
    objective = (ratio * A).minimum(clipped * A)
    if config.tis_cap:
        objective = objective * (old - vllm).exp().clamp(max=config.tis_cap)
    return -c * objective, clipped * A < ratio * A


def update(model, optimizer, groups: list[list[Trace]], temperature: float, config: Config, team):
    """The optimiser steps of one rollout: B groups of G traces, with their advantages set.

    Every rank knows all traces, computes its share of them, and the gradients are added up. Returns
    what to log, {} where there was no gradient.
    """
    import torch

    # One optimiser step for each of the minibatches, whose traces are cut into micro-batches.
    plan: list[list[list[Trace]]] = []
    size = math.ceil(len(groups) / config.minibatches)
    for start in range(0, len(groups), size):
        traces = [trace for group in groups[start : start + size] for trace in group]
        set_weights(traces, config)
        useful = [trace for trace in traces if trace.advantage or config.kl_beta]
        if useful:
            useful.sort(key=lambda trace: len(trace.prompt_ids) + len(trace.ids))
            mine = useful[team.rank :: team.size]
            plan.append(micro_batches(mine, config.micro_tokens))

    # Logprobs that stay as they are during the update: pi_old, and the base model's.
    olds, bases = {}, {}
    with torch.no_grad():
        for batch in [batch for batches in plan for batch in batches]:
            if config.minibatches * config.epochs > 1:
                olds[id(batch)] = token_logprobs(model, batch, temperature)
            if config.kl_beta:
                with model.disable_adapter():
                    bases[id(batch)] = token_logprobs(model, batch, temperature)

    parameters = [p for p in model.parameters() if p.requires_grad]
    sums, norms = torch.zeros(6).double(), []
    for batches in plan * config.epochs:
        for p in parameters:
            p.grad = torch.zeros_like(p)
        prompts = [trace.prompt_ids for batch in batches for trace in batch]
        with shared_prefix(model, prompts) as prefix:  # `prefix = None` is the same, slower
            for batch in batches:
                new = token_logprobs(model, batch, temperature, prefix)  # (n,), with a gradient
                old = olds.get(id(batch), new.detach())  # on the first update pi_old is pi itself
                vllm, A, c = per_token(batch).to(new).unbind(1)  # (n,) each
                loss, acts = policy_loss(new, old, vllm, A, c, config)
                kl = torch.zeros_like(new)
                if config.kl_beta:
                    q = bases[id(batch)] - new  # log (pi_base / pi)
                    kl = q.exp() - q - 1
                    loss = loss + config.kl_beta * c * kl
                loss.sum().backward()

                parts = [torch.ones_like(new), loss, -old, (old - vllm).abs(), acts, kl]
                sums += torch.stack(parts).detach().double().sum(1).cpu()
                for trace, part in zip(batch, old.split([t.sampled for t in batch]), strict=True):
                    trace.old_logprobs = trace.old_logprobs or part.tolist()

        for p in parameters:
            team.add(p.grad)  # now every rank has the sum, and takes the same step
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if norm.isfinite():
            optimizer.step()
        norms.append(norm.item())

    team.add(sums)
    tokens, loss, *rest = sums.tolist()
    if not tokens:
        return {}
    names = ("entropy", "logprob_gap", "clip_fraction", "kl")
    means = {name: total / tokens for name, total in zip(names, rest, strict=True)}
    return {"loss": loss / len(norms), "grad_norm": sum(norms) / len(norms), **means}


def sync(agent: Agent, model, folder: Path, step: int) -> None:
    """The trainer's adapter into the engine, under a new name and id: the old ones are cached."""
    import torch
    from vllm.lora.request import LoRARequest

    save_adapter(model, folder, getattr(torch, compute_dtype()))
    if agent.lora:
        agent.engine.remove_lora(agent.lora.lora_int_id)
    agent.lora = LoRARequest(f"step-{step}", step + 2, str(folder))
    agent.engine.add_lora(agent.lora)
    agent.engine.reset_prefix_cache()  # its keys and values are the old adapter's


# ---- The schedule


def temperature_at(step: int, config: Config) -> float:
    """Temperature of step 0, 1, ...: linear from start to end, then constant."""
    if config.temperature_end is None:
        return config.temperature
    done = min(1.0, step / max(1, config.temperature_steps - 1))
    return config.temperature + (config.temperature_end - config.temperature) * done


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then constant or half a cosine to 0."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - warm) / max(1, config.steps - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def batches(problems: list[Problem], B: int, seed: int, skip: int) -> Iterator[list[Problem]]:
    """B problems for each step from step `skip` on: one shuffled pass after another, for ever."""
    laps = (random.Random(f"{seed}/{lap}").sample(problems, len(problems)) for lap in count())
    stream = islice(chain.from_iterable(laps), skip * B, None)
    while True:
        yield list(islice(stream, B))


# ---- Rolling out


def roll_out(agent, grader, problems, n, config: Config, team) -> list[list[Trace]]:
    """n traces of each problem, with their rewards: groups in the order of the problems.

    Each rank samples its share; then all of them know all traces.
    """
    weights = reward_weights(config)
    mine = list(enumerate(problems))[team.rank :: team.size]
    # Sample numbers go on over the problems, so that one that was drawn twice has other traces.
    jobs = [(problem, b * n + i) for i in range(n) for b, problem in mine]
    pending = []
    for trace in agent.rollout(jobs):  # answers are compared while other traces still decode
        pending.append((trace, grader.submit(trace.problem.answer, trace.answer)))
    for trace, verdict in pending:
        right = verdict.result().equal
        trace.rewards = {name: f(trace, right, config) for name, f in REWARDS.items()}
        trace.reward = sum(weight * trace.rewards[name] for name, weight in weights.items())
    traces = [trace for part in team.gather([trace for trace, _ in pending]) for trace in part]
    traces.sort(key=lambda trace: trace.sample)
    return [traces[i : i + n] for i in range(0, len(traces), n)]


def evaluate_policy(agent, grader, problems, config: Config, team) -> dict:
    """Accuracy on held-out problems, sampled as evaluate.py samples, with its 95 % interval."""
    training = agent.flags
    usual = AgentFlags(max_tokens=training.max_tokens)
    agent.flags = replace(usual, agent=training.agent, end_at=training.end_at)
    groups = roll_out(agent, grader, problems, config.eval_n, config, team)
    agent.flags = training
    shares = [sum(t.rewards["accuracy"] for t in group) / len(group) for group in groups]
    low, high = interval(shares)
    return {"eval": sum(shares) / len(shares), "eval_low": low, "eval_high": high}


def group_row(step: int, group: list[Trace], tokenizer) -> dict:
    """One group of a step, token by token, for extras/report.py."""
    keep = "mask logprobs old_logprobs rewards reward advantage weight answer finish".split()
    traces = [{name: getattr(trace, name) for name in keep} for trace in group]
    for row, trace in zip(traces, group, strict=True):
        row["tokens"] = [tokenizer.decode([token]) for token in trace.ids]
    problem = group[0].problem
    return {"step": step, "question": problem.question, "gold": problem.answer, "traces": traces}


# ---- The training loop


def train(config: Config, problems: list[Problem], held_out: list[Problem], team, stack) -> int:
    """Roll out, update, sync, log, save, again and again. Returns the exit code."""
    out, first = Path(config.out), team.rank == 0
    G, B = config.group, config.problems
    print_ = print if first else (lambda *_, **__: None)

    # ---- the trainer's model, as the checkpoint has it if there is one
    import torch
    from peft import set_peft_model_state_dict

    state = load_checkpoint(out)
    step, best, best_step = (state.get(name, 0) for name in ("step", "best", "best_step"))
    model_folder, adapter = resolve_model(config.model, config.lora)
    print_(f"loading {model_folder}", flush=True)
    model = load_trainer(config, model_folder, adapter)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if state:
        set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])

    # ---- the engine, which gets the trainer's adapter through a folder of its own
    live = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter"
    save_adapter(model, live)
    serving = replace(config, lora=str(live))
    longest = sorted([*problems, *held_out], key=lambda p: -len(p.question))[:64]
    traces = max(B * G, len(held_out) * config.eval_n) // team.size + 1
    agent = stack.enter_context(open_agent(serving, longest, traces, config.sleep and has_cuda()))
    grader = stack.enter_context(Grader())
    sync(agent, model, live, step)
    if config.wandb and first:
        import wandb

        wandb.init(project="deepmath", name=out.name, config=asdict(config))
    stop = stop_on_ctrl_c()
    stream = batches(problems, B, config.seed, skip=step)

    while True:
        # ---- evaluate: before the first step, after every --eval-every and after the last
        due = config.eval_every and (step % config.eval_every == 0 or step == config.steps)
        if held_out and due:
            score = evaluate_policy(agent, grader, held_out, config, team)
            print_(f"step {step:3d}  held out: {score['eval']:.3f}  ({len(held_out)} problems)")
            if score["eval"] > best or step == 0:
                best, best_step = score["eval"], step
                if first:
                    save_adapter(model, out / "adapter", torch.bfloat16)
            if first:
                write_log(out / "eval.jsonl", {"step": step, **score})
        if step == config.steps or any(team.gather(bool(stop))):  # all ranks stop, or none
            break

        # ---- roll out and score
        started = time.monotonic()
        temperature = temperature_at(step, config)
        seed = trace_seed(config.seed, "step", step)
        agent.flags = replace(agent.flags, temperature=temperature, seed=seed)
        groups = roll_out(agent, grader, next(stream), G, config, team)
        rolled_out = time.monotonic()

        # ---- update
        set_advantages(groups, config)
        lr = learning_rate(step, config)
        for setting in optimizer.param_groups:
            setting["lr"] = lr
        learns = config.kl_beta or any(trace.advantage for group in groups for trace in group)
        sleeps = config.sleep and has_cuda() and learns
        if sleeps:
            agent.engine.sleep(1)
        try:
            stats = update(model, optimizer, groups, temperature, config, team)
        except torch.OutOfMemoryError:
            less = f"a smaller --micro-tokens than {config.micro_tokens}, or --sleep"
            raise UserError(f"out of GPU memory in the update: --resume with {less}") from None
        if sleeps:
            torch.cuda.empty_cache()
            agent.engine.wake_up()

        # ---- sync
        step += 1
        if stats:
            sync(agent, model, live, step)

        # ---- log and save
        if not first:
            continue
        row = {"step": step, **averages(groups), **stats, "temperature": temperature, "lr": lr}
        row["seconds_rollout"] = rolled_out - started
        row["seconds_update"] = time.monotonic() - rolled_out
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row["memory_gib"] = (torch.cuda.max_memory_reserved() if has_cuda() else peak) / 2**30
        write_log(out / "metrics.jsonl", row)
        shown = max(groups, key=lambda group: any(trace.advantage for trace in group))
        write_log(out / "groups.jsonl", group_row(step, shown, agent.tokenizer))
        report_step(row, config.steps)
        if config.wandb:
            wandb.log(row, step=step)
        if step % config.save_every == 0 or step == config.steps or stop:
            state = {"step": step, "best": best, "best_step": best_step}
            save_checkpoint(out, model, optimizer, state)

    # ---- the end
    if step < config.steps:
        print_(f"stopped after step {step}: go on with: python grpo.py --out {out} --resume")
        return 130
    if first and not (held_out and config.eval_every):
        save_adapter(model, out / "adapter", torch.bfloat16)
    elif first:
        print(f"the best of {len(held_out)} held-out problems: {best:.3f} after step {best_step}")
    print_(f"try it: python agent.py --model {config.model} --lora {out / 'adapter'}")
    return 0


def averages(groups: list[list[Trace]]) -> dict:
    """Means over all traces of a step, those that the update leaves out too."""
    traces = [trace for group in groups for trace in group]

    def mean(values) -> float:
        return sum(values) / len(traces)

    return {
        "reward": mean(t.reward for t in traces),
        "accuracy": mean(t.rewards["accuracy"] for t in traces),
        "code": mean(t.rewards["code"] for t in traces),
        "length": mean(t.sampled for t in traces),
        "length_total": mean(len(t.ids) for t in traces),
        "truncated": mean(t.finish in CUT for t in traces),
        "flat_groups": sum(not any(t.advantage for t in group) for group in groups),
    }


def report_step(row: dict, steps: int) -> None:
    """Print a step in a line, and what is wrong with it in a second one."""
    shown = ("reward", "accuracy", "code", "length", "truncated", "temperature", "logprob_gap")
    values = [f"{name} {row[name]:.3g}" for name in shown if name in row]
    seconds = f"{row['seconds_rollout']:.0f} + {row['seconds_update']:.0f} s"
    print(f"step {row['step']:3d}/{steps}", *values, seconds, sep="  ", flush=True)
    limit = 0.1 if has_cuda() else 0.001  # what rounding explains, in bfloat16 and in float32
    if "loss" not in row:
        print("  no gradient in this step: in every group all rewards are equal")
    elif not math.isfinite(row["grad_norm"]):
        print("  the gradient is not a finite number: the adapter was left as it was")
    elif row["logprob_gap"] > limit:
        print(f"  warning: engine and trainer disagree by more than {limit} per token")


# ---- The command line

FREE = """steps save_every eval_every wandb verbose batch gpu_memory_utilization micro_tokens
gradient_checkpointing sleep sandbox out resume merge""".split()  # may change with --resume


def read_config() -> Config:
    """The flags over the preset's values, or over those that the run was started with."""
    start, _ = parse(Start, return_unknown_args=True, add_help=False)
    if not start.resume:
        return parse(Config, default=PRESETS[start.preset])
    try:
        saved = json.loads((Path(start.out) / "config.json").read_text())["flags"]
        before = Config(**{**saved, "where": tuple(saved["where"])})
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--resume: no run in {start.out}: leave it away to start one") from None
    config = parse(Config, default=before)
    for field in fields(Config):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if old != new and field.name not in FREE:
            flag = field.name.replace("_", "-")
            raise UserError(f"--resume goes on with the run's own flags; --{flag} was {old}")
    return config


def check_config(config: Config) -> None:
    """Refuse in one line what cannot work."""
    if (config.top_p, config.top_k) != (1, 0):
        raise UserError("training needs --top-p 1 --top-k 0: a cut distribution biases the loss")
    if config.tensor_parallel > 1:
        raise UserError("the model must fit one GPU beside its engine: use torchrun for more")
    one = "steps save_every problems minibatches epochs temperature_steps lora_rank micro_tokens"
    check_range(config, 1, math.inf, *one.split(), "eval_problems", "eval_n", "overlong_buffer")
    check_range(config, 2, math.inf, "group")
    check_range(config, 0, math.inf, "eval_every", "kl_beta", "tis_cap", "weight_decay")
    check_range(config, 0, 1, "warmup", "epsilon_low")
    check_range(config, 0, math.inf, "epsilon_high")
    check_range(config, 1e-12, math.inf, "lr", "lora_alpha", "max_grad_norm")
    check_range(config, 0.01, 2, "temperature", "temperature_end")
    reward_weights(config)
    check_flags(config)  # draws a seed for -1


def load_sets(config: Config, ranks: int) -> tuple[list[Problem], list[Problem]]:
    """(training problems, held-out problems). Raises UserError where there are too few."""
    if config.dataset == "arithmetic" and config.split is None:
        config.split = "train"
    held_out = config.eval_problems if config.eval_every else 0
    problems = load_problems(config)
    if config.eval_dataset and held_out:
        flags = replace(config, dataset=config.eval_dataset, split=None, limit=held_out)
        evaluation = load_problems(flags)
    else:
        random.Random(f"{config.seed}/held out").shuffle(problems)
        evaluation, problems = problems[:held_out], problems[held_out:]
    if len(problems) < config.problems or config.problems < ranks:
        there = f"{len(problems)} problems to train on, {ranks} ranks"
        raise UserError(f"--problems {config.problems}: {there}; each rank needs one at least")
    return problems, evaluation


def open_folder(config: Config, stack) -> None:
    """Make or reopen OUT, and lock it until the process ends."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((out / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another grpo.py is writing into {out}: wait, or another --out") from None
    if config.resume:
        return
    if len(list(out.iterdir())) > 1:
        raise UserError(f"{out} is not empty: add --resume to go on with its run, or another --out")
    flags = asdict(config) | {"resume": False, "merge": None}
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    text = json.dumps({"flags": flags, "started": started}, indent=1)
    (out / "config.json").write_text(text + "\n")


def main() -> int:
    config = read_config()
    if config.merge:
        prepare_environment(config.verbose)
        merge(Path(config.merge))
        return 0
    rank, ranks = take_rank()  # before anything can import torch
    check_config(config)
    problems, held_out = load_sets(config, ranks)
    with contextlib.ExitStack() as stack:
        team = Team(rank, ranks)
        if rank == 0:
            open_folder(config, stack)
        config = team.gather(config)[0]  # with rank 0's seed; what it refuses, nobody begins
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB: the trainer needs room, too
        prepare_environment(config.verbose)
        return train(config, problems, held_out, team, stack)


if __name__ == "__main__":
    run_main(main)
