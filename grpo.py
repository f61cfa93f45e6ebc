r"""GRPO from scratch: a language model learns from its own attempts when to reach for Python.

    python grpo.py                                  # the embedded model on arithmetic (preset mini)
    python grpo.py --out runs/grpo --resume         # go on after Ctrl-C, kill -9 or a power cut
    python grpo.py --no-agent --out runs/plain      # the same training for plain reasoning, no tool
    python grpo.py --preset paper --out runs/paper  # the published recipe, on a GPU
    torchrun --nproc-per-node 8 grpo.py --problems 64     # 8 GPUs, each with its own engine
    python grpo.py --merge runs/grpo                # runs/grpo/merged: a plain Hugging Face model

One step, B problems x G traces each, N = B * G traces (`train` below is the loop over steps):

  1. roll out   agent.py samples the N traces at temperature T(step), with the tool
  2. score      r = sum over --reward-weights of weight * reward
  3. update     A = how much better than its own group a trace was, for each of its tokens
                ratio_t = pi(token t) / pi_old(token t)
                w_t = min(pi_old / pi_vLLM, --tis-cap), a constant (truncated importance sampling)
                kl_t = q - log q - 1,  q = pi_base / pi
                L = sum over all sampled tokens of
                    c_t (kl_beta kl_t - w_t min(ratio_t A, clip(ratio_t, 1 - low, 1 + high) A))
  4. sync       the new adapter goes back into vLLM under a new name

pi is the model in training, pi_old the same before this update, pi_vLLM the same as vLLM computed
it while it sampled, pi_base the same with its adapter switched off. The code has their logarithms:
new, old, vllm, base.

    --loss-type   c_t, weight of a token of trace i    --scale-rewards   divides r - mean by
    grpo          1 / (N * length_i)                   group             std of its group + 1e-4
    dapo          1 / (sum of all lengths)             batch             std over the step + 1e-4
    dr_grpo       1 / (N * max_tokens)                 none              1

Lengths count sampled tokens. Formulas: DeepSeekMath (arXiv 2402.03300) eq. 3 and 4, DAPO
(2503.14476) eq. 8, 10 and 13, Dr. GRPO (2503.20783) sec. 3, LitePPO (2508.08221) for `batch`, GDPO
(2601.05242) for normalize_then_sum; the KL term is k3 of http://joschu.net/blog/kl-approx.html.

A trap of small rewards: where nobody in a group is right, dividing by the group's std makes a 0.1
for a snippet that ran as large as a 1.0 for a right answer elsewhere. `batch` and `none` do not.

Differences from the published recipe (its numbers: presets/paper.toml), each with its reason:

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
import json
import math
import os
import random
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from agent import Trace, check_flags, open_agent, trace_seed
from cli import AgentFlags, DataFlags, UserError
from cli import check_range, has_cuda, parse, run_main, stop_on_ctrl_c, write_log
from data import Problem, load_problems
from engine import Team, compute_dtype, load_checkpoint, load_trainer, merge, micro_batches
from engine import per_token, prepare_environment, resolve_model, save_adapter, save_checkpoint
from engine import autocast, shared_prefix, take_rank
from evaluate import CUT, interval
from grade import Grader


# ---- The flags


@dataclass(kw_only=True)
class Config(DataFlags, AgentFlags):
    """Train a LoRA adapter with GRPO; the docstring of grpo.py explains the method."""

    # the run
    preset: Literal["mini", "paper", "zero"] = "paper" if has_cuda() else "mini"
    """Values of all flags that are not given, see presets/; the defaults below are mini's."""
    out: str = "runs/grpo"
    """The run's folder."""
    resume: bool = False
    """Go on with the run in --out, with the flags that it was started with."""
    merge: str | None = None
    """No training: fold the adapter of this run or folder into its base, as MERGE/merged."""
    wandb: bool = False
    """Log to Weights & Biases too."""
    steps: int = 40
    """Rollouts in all."""
    save_every: int = 5
    """Steps between checkpoints."""
    # evaluation during training
    eval_every: int = 10
    """Steps between evaluations on held-out problems; 0 is never."""
    eval_problems: int = 32
    """Problems held out of the training set, which are never trained on."""
    eval_n: int = 4
    """Traces of each held-out problem."""
    eval_dataset: str | None = None
    """Hold out nothing; evaluate on this set's first problems instead."""
    # the rollout
    problems: int = 8
    """Problems of a step (B)."""
    group: int = 8
    """Traces of a problem (G)."""
    temperature: float = 1.0
    """Sampling temperature of the first step."""
    temperature_end: float | None = 0.8
    """Temperature from step --temperature-steps on, linear in between; None: it stays."""
    temperature_steps: int = 40
    """Steps from --temperature to --temperature-end."""
    # rewards and advantages
    reward_weights: str = "accuracy=1.0,code=0.1"
    """Rewards that count, and their weights: accuracy, code (a snippet ran), overlong."""
    overlong_buffer: int = 2048
    """The reward `overlong` falls from 0 to -1 over the last this many of --max-tokens."""
    reward_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Scale the weighted sum of the rewards, or each reward by itself before the sum (GDPO)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What divides r - mean, see the table in grpo.py's docstring."""
    skip_flat: Literal["reward", "accuracy"] = "reward"
    """Leave out groups with equal rewards, or those with all answers right or all wrong."""
    # the loss
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """What one token weighs, see the table in grpo.py's docstring."""
    epsilon_low: float = 0.2
    """The ratio is clipped below 1 - this."""
    epsilon_high: float = 0.4
    """The ratio is clipped above 1 + this."""
    kl_beta: float = 0.0
    """Weight of the KL term, which keeps the policy near the base model."""
    tis_cap: float = 2.0
    """Largest correction pi_old / pi_vLLM of a token; 0 is no correction."""
    # the optimiser
    minibatches: int = 1
    """Optimiser steps that a rollout is cut into."""
    epochs: int = 1
    """Times that a rollout is used."""
    lr: float = 3e-4
    """Learning rate; LoRA wants about ten times that of full fine-tuning."""
    warmup: float = 0.0
    """Share of --steps in which the learning rate rises to --lr."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: as it is, or half a cosine down to 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """A longer gradient is scaled down to this norm."""
    # the adapter
    lora_rank: int = 16
    """Rank r of a new adapter."""
    lora_alpha: float = 32
    """A new adapter's output is scaled by alpha / r."""
    rslora: bool = False
    """Scale it by alpha / sqrt(r) instead."""
    # memory
    micro_tokens: int = 2048
    """Tokens of one forward and backward pass: lower it if the update runs out of GPU memory."""
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


PRESETS = {"mini": Config()}
for file in Path(__file__).with_name("presets").glob("*.toml"):
    PRESETS[file.stem] = Config(**tomllib.loads(file.read_text()))


# ---- Rewards and advantages

Groups = list[list[Trace]]  # B problems with G traces each
REWARDS = ("accuracy", "code", "overlong")


def set_rewards(trace: Trace, right, config) -> None:
    """Each reward by its name, and the weighted sum of those that count."""
    ran = any(result.status == "ok" for _, result in trace.calls)
    # DAPO's soft penalty (eq. 13): 0, then down to -1 over the buffer that ends at max_tokens.
    buffer_start = config.max_tokens - config.overlong_buffer
    penalty = -min(1.0, max(0.0, (trace.sampled - buffer_start) / config.overlong_buffer))
    trace.rewards = {"accuracy": float(right), "code": float(ran), "overlong": penalty}
    weights = reward_weights(config)
    trace.reward = sum(weight * trace.rewards[name] for name, weight in weights.items())


def reward_weights(config) -> dict[str, float]:
    """`code=1.0,accuracy=0.1` as a dict. Raises UserError."""
    try:
        pairs = [part.split("=") for part in config.reward_weights.split(",")]
        weights = {name: float(weight) for name, weight in pairs}
    except ValueError:
        weights = {"": 0.0}
    if not weights.keys() <= set(REWARDS):
        known = ", ".join(REWARDS)
        raise UserError(f"--reward-weights: accuracy=1.0,code=0.1, of {known}")
    return weights


def advantages(rewards, scale):
    """Rewards (B, G) to advantages (B, G); a row of equal rewards gives exactly 0.

    >>> import torch
    >>> advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]), "none").tolist()
    [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    flat = rewards.amax(1) == rewards.amin(1)  # (B,)
    centred = rewards - rewards.mean(1, keepdim=True)
    centred[flat] = 0  # exactly: the mean of equal numbers may be rounded
    if scale == "group":
        return centred / (rewards.std(1, keepdim=True) + 1e-4)
    if scale == "batch":
        return centred / (centred.std() + 1e-4)
    return centred


def set_advantages(groups: Groups, config) -> None:
    """How much better than its own group was each trace?"""
    import torch

    def table(name):  # (B, G)
        rows = [[trace.rewards[name] for trace in group] for group in groups]
        return torch.tensor(rows, dtype=torch.float64)

    scale = config.scale_rewards
    weighted = [(weight, table(name)) for name, weight in reward_weights(config).items()]
    if config.reward_aggregation == "sum_then_normalize":
        result = advantages(sum(weight * rewards for weight, rewards in weighted), scale)
    else:
        result = sum(weight * advantages(rewards, scale) for weight, rewards in weighted)
    if config.skip_flat == "accuracy":
        right = table("accuracy")
        result[right.amax(1) == right.amin(1)] = 0

    for group, row in zip(groups, result.tolist()):
        for trace, advantage in zip(group, row):
            trace.advantage = advantage


# ---- One step: logprobs, loss, update, sync


def token_logprobs(model, traces: list[Trace], temperature, prefix=None):
    """log pi(token) of the tokens that the model sampled, all traces one after another: (n,).

    prefix: a Prefix that all N prompts begin with, already computed; the result is the same.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.checkpoint import checkpoint

    def table(rows):  # lists of ids as (N, P + T), padded on the right with 0
        rows = [torch.tensor(row) for row in rows]
        return pad_sequence(rows, batch_first=True).to(model.device)

    # Place t predicts token t + 1. The first P places are in the prefix's cache already.
    ids = table([trace.prompt_ids + trace.ids for trace in traces])
    mask = table([[0] * len(trace.prompt_ids) + trace.mask for trace in traces])
    P = prefix.length if prefix else 0
    inputs = ids[:, P:-1]  # (N, T-1)
    targets = ids[:, P + 1 :]
    sampled = mask[:, P + 1 :] == 1

    # The decoder is the model without its head. It needs no attention mask: attention is causal,
    # so that no token sees the padding on its right.
    decoder = model.get_base_model().get_decoder()
    cache = prefix.expand(len(traces)) if prefix else None
    with autocast(model):
        output = decoder(input_ids=inputs, past_key_values=cache, use_cache=bool(prefix))
    hidden = output.last_hidden_state[sampled]  # (n, D)
    targets = targets[sampled]  # (n,)

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

    traces: all of one optimiser step, of all ranks and micro-batches: one global token count, and
    how the step is cut cannot matter.
    """
    N = len(traces)
    tokens = sum(trace.sampled for trace in traces)
    for trace in traces:
        divisor = tokens  # dapo: every token counts the same
        if config.loss_type == "grpo":  # every trace counts the same
            divisor = N * trace.sampled
        if config.loss_type == "dr_grpo":  # no length anywhere
            divisor = N * config.max_tokens
        trace.weight = 1 / max(1, divisor)


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
    steps = []  # of micro-batches of traces
    size = math.ceil(len(groups) / config.minibatches)
    for start in range(0, len(groups), size):
        traces = sum(groups[start : start + size], [])
        set_weights(traces, config)
        useful = [trace for trace in traces if trace.advantage or config.kl_beta]
        useful.sort(key=lambda trace: len(trace.prompt_ids) + len(trace.ids))
        if useful:
            steps.append(micro_batches(useful[team.rank :: team.size], config.micro_tokens))

    # pi_old is the policy before the first of these steps. If there is only one, it is pi itself.
    olds = {}
    if config.minibatches * config.epochs > 1:
        for batch in sum(steps, []):
            with torch.no_grad():
                olds[id(batch)] = token_logprobs(model, batch, temperature)

    parameters = [p for p in model.parameters() if p.requires_grad]
    sums = Counter()  # over sampled tokens
    norms = []  # of each step's gradient
    for batches in steps * config.epochs:
        for p in parameters:
            p.grad = torch.zeros_like(p)
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

                measures = {
                    "tokens": torch.ones_like(new),
                    "loss": loss,
                    "entropy": -old,
                    "logprob_gap": (old - vllm).abs(),
                    "clip_fraction": clip_acts,
                    "kl": kl,
                }
                for name, values in measures.items():
                    sums[name] += values.double().sum().item()
                lengths = [trace.sampled for trace in batch]
                for trace, part in zip(batch, old.split(lengths)):
                    trace.old_logprobs = part.tolist()  # for groups.jsonl

        # Then add up the ranks' gradients, so that all of them take the same step.
        for p in parameters:
            team.add(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if norm.isfinite():
            optimizer.step()
        norms.append(norm.item())

    totals = Counter()
    for sums_of_rank in team.gather(sums):
        totals.update(sums_of_rank)
    if not totals["tokens"]:
        return {}
    tokens, loss = totals.pop("tokens"), totals.pop("loss")
    means = {name: total / tokens for name, total in totals.items()}
    return {"loss": loss / len(norms), "grad_norm": fmean(norms), **means}


def sync(agent, model, folder, step) -> None:
    """The trainer's adapter into the engine, under a new name and id: the old ones are cached."""
    import torch
    from vllm.lora.request import LoRARequest

    save_adapter(model, folder, getattr(torch, compute_dtype()))
    if agent.lora:
        agent.engine.remove_lora(agent.lora.lora_int_id)
    agent.lora = LoRARequest(f"step-{step}", step + 2, str(folder))  # it has begun with number 1
    agent.engine.add_lora(agent.lora)
    agent.engine.reset_prefix_cache()  # its keys and values are the old adapter's


# ---- Schedules and rollouts


def temperature_at(step, config) -> float:
    """Sampling temperature: linear from start to end, then constant."""
    if config.temperature_end is None:
        return config.temperature
    done = min(1.0, step / max(1, config.temperature_steps - 1))
    return config.temperature + (config.temperature_end - config.temperature) * done


def learning_rate(step, config) -> float:
    """Linear warm-up, then constant or half a cosine down to 0."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - warm) / max(1, config.steps - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def problems_at(step, problems: list[Problem], config) -> list[Problem]:
    """The next B problems of an endless stream: one shuffled pass over all after another."""
    lap, start = divmod(step * config.problems, len(problems))
    stream = []
    for number in (lap, lap + 1):  # B problems reach into the next pass at most
        order = random.Random(f"{config.seed}/{number}")
        stream += order.sample(problems, len(problems))
    return stream[start : start + config.problems]


def roll_out(agent, grader, problems, n, config, team) -> Groups:
    """n traces of each problem, with their rewards: groups in the order of the problems.

    Each rank samples its share; then all of them know all traces.
    """
    # Sample numbers go on over the problems, so that one that was drawn twice has other traces.
    mine = list(enumerate(problems))[team.rank :: team.size]
    jobs = [(problem, b * n + i) for i in range(n) for b, problem in mine]
    traces, verdicts = [], []
    for trace in agent.rollout(jobs):
        traces.append(trace)
        # Other processes compare the answers while other traces still decode.
        verdicts.append(grader.submit(trace.problem.answer, trace.answer))
    for trace, verdict in zip(traces, verdicts):
        set_rewards(trace, verdict.result().equal, config)
    traces = sum(team.gather(traces), [])
    traces.sort(key=lambda trace: trace.sample)
    return [traces[i : i + n] for i in range(0, len(traces), n)]


def evaluate_policy(agent, grader, problems, config, team) -> dict:
    """Accuracy on held-out problems with its 95 % interval, sampled as evaluate.py samples."""
    flags = agent.flags
    agent.flags = AgentFlags(agent=flags.agent, end_at=flags.end_at, max_tokens=flags.max_tokens)
    groups = roll_out(agent, grader, problems, config.eval_n, config, team)
    agent.flags = flags
    shares = [fmean(trace.rewards["accuracy"] for trace in group) for group in groups]
    low, high = interval(shares)
    return {"eval": fmean(shares), "eval_low": low, "eval_high": high}


# ---- The training loop


def train(config, problems: list[Problem], held_out: list[Problem], team, stack) -> int:
    """Roll out, update, sync, log, save, again and again. Returns the exit code."""
    # ---- the trainer's model, as the checkpoint has it if there is one
    import torch
    from peft import set_peft_model_state_dict

    out = Path(config.out)
    first = team.rank == 0  # the rank that writes files
    model_folder, adapter = resolve_model(config.model, config.lora)
    print(f"loading {model_folder}", flush=True)
    model = load_trainer(config, model_folder, adapter)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    state = {"step": 0, "best": 0.0, "best_step": 0}
    if saved := load_checkpoint(out):
        set_peft_model_state_dict(model, saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
        state = {name: saved[name] for name in state}
    step = state["step"]

    # ---- the engine, which gets the trainer's adapter through a folder of its own
    live = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter"
    save_adapter(model, live)
    flags = replace(config, lora=str(live))
    traces = max(config.problems * config.group, len(held_out) * config.eval_n)
    # It plans its context for the longest prompt, which is one of the 64 longest questions.
    questions = sorted(problems + held_out, key=lambda problem: len(problem.question))[-64:]
    sleeps = config.sleep and has_cuda()
    agent = stack.enter_context(open_agent(flags, questions, traces // team.size + 1, sleeps))
    grader = stack.enter_context(Grader())
    sync(agent, model, live, step)
    if config.wandb and first:
        import wandb

        wandb.init(project="deepmath", name=out.name, config=asdict(config))
    stop = stop_on_ctrl_c()  # a list, empty until then

    while True:
        # ---- evaluate: before the first step, after every --eval-every and after the last
        if held_out and (step % config.eval_every == 0 or step == config.steps):
            score = evaluate_policy(agent, grader, held_out, config, team)
            print(f"step {step:3d}  held out: {score['eval']:.3f}  ({len(held_out)} problems)")
            if first:
                write_log(out / "eval.jsonl", {"step": step, **score})
            if first and (score["eval"] > state["best"] or step == 0):
                state.update(best=score["eval"], best_step=step)
                save_adapter(model, out / "adapter", torch.bfloat16)
        if step == config.steps or any(team.gather(bool(stop))):  # all ranks stop, or none
            break

        # ---- roll out and score
        started = time.monotonic()
        temperature = temperature_at(step, config)
        seed = trace_seed(config.seed, "step", step)
        agent.flags = replace(agent.flags, temperature=temperature, seed=seed)
        batch = problems_at(step, problems, config)
        groups = roll_out(agent, grader, batch, config.group, config, team)
        rolled_out = time.monotonic()

        # ---- update
        set_advantages(groups, config)
        lr = learning_rate(step, config)
        for setting in optimizer.param_groups:
            setting["lr"] = lr
        learns = config.kl_beta or any(teaches(group) for group in groups)
        if sleeps and learns:
            agent.engine.sleep(1)
        stats = update(model, optimizer, groups, temperature, config, team)
        if sleeps and learns:
            torch.cuda.empty_cache()
            agent.engine.wake_up()

        # ---- sync
        step += 1
        if stats:  # else the adapter is what it was
            sync(agent, model, live, step)

        # ---- log and save
        if not first:
            continue
        row = {"step": step, **averages(groups), **stats, "temperature": temperature, "lr": lr}
        row["seconds_rollout"] = rolled_out - started
        row["seconds_update"] = time.monotonic() - rolled_out
        write_log(out / "metrics.jsonl", row)
        write_log(out / "groups.jsonl", group_row(step, groups, agent.tokenizer))
        report_step(row, config.steps)
        if config.wandb:
            wandb.log(row, step=step)
        if step % config.save_every == 0 or step == config.steps or stop:
            save_checkpoint(out, model, optimizer, state | {"step": step})

    # ---- the end
    if step < config.steps:
        print(f"stopped after step {step}: go on with: python grpo.py --out {out} --resume")
        return 130
    if held_out:
        print(f"the best on held-out problems: {state['best']:.3f} after step {state['best_step']}")
    elif first:
        save_adapter(model, out / "adapter", torch.bfloat16)
    print(f"try it: python agent.py --model {config.model} --lora {out / 'adapter'}")
    return 0


def averages(groups: Groups) -> dict:
    """Means over all traces of a step, those that the update leaves out too."""
    traces = sum(groups, [])
    return {
        "reward": fmean(trace.reward for trace in traces),
        "accuracy": fmean(trace.rewards["accuracy"] for trace in traces),
        "code": fmean(trace.rewards["code"] for trace in traces),
        "length": fmean(trace.sampled for trace in traces),
        "length_total": fmean(len(trace.ids) for trace in traces),
        "truncated": fmean(trace.finish in CUT for trace in traces),
        "flat_groups": sum(not teaches(group) for group in groups),
    }


def teaches(group: list[Trace]) -> bool:
    """Whether some of its traces were better than others."""
    return any(trace.advantage for trace in group)


def group_row(step, groups: Groups, tokenizer) -> dict:
    """One group of a step that teaches something, token by token, for extras/report.py."""
    logged = "mask logprobs old_logprobs rewards reward advantage weight answer finish".split()
    group = max(groups, key=teaches)
    rows = []
    for trace in group:
        row = {name: getattr(trace, name) for name in logged}
        row["tokens"] = [tokenizer.decode([token]) for token in trace.ids]
        rows.append(row)
    problem = group[0].problem
    return {"step": step, "question": problem.question, "gold": problem.answer, "traces": rows}


def report_step(row, steps) -> None:
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

RANGES = {  # of the flags that only training has
    "steps save_every eval_problems eval_n problems temperature_steps": (1, math.inf),
    "overlong_buffer minibatches epochs lora_rank micro_tokens": (1, math.inf),
    "group": (2, math.inf),
    "eval_every kl_beta tis_cap weight_decay epsilon_high": (0, math.inf),
    "warmup epsilon_low": (0, 1),
    "lr lora_alpha max_grad_norm": (1e-12, math.inf),
    "temperature temperature_end": (0.01, 2),
}


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
    config = parse(Config, default=before)
    for name, value in saved.items():
        if name not in FREE and getattr(config, name) != value:
            raise UserError(f"--resume goes on with the run's own flags; --{name} was {value}")
    return config


def check_config(config) -> None:
    """Refuse in one line what cannot work."""
    if (config.top_p, config.top_k) != (1, 0):
        raise UserError("training needs --top-p 1 --top-k 0: a cut distribution biases the loss")
    if config.tensor_parallel > 1:
        raise UserError("the model must fit one GPU beside its engine: use torchrun for more")
    for names, bounds in RANGES.items():
        check_range(config, *bounds, *names.split())
    reward_weights(config)
    check_flags(config)  # draws a seed for -1


def load_sets(config, ranks) -> tuple[list[Problem], list[Problem]]:
    """(training problems, held-out problems). Raises UserError where there are too few."""
    if config.dataset == "arithmetic" and config.split is None:
        config.split = "train"
    problems = load_problems(config)
    size = config.eval_problems if config.eval_every else 0
    if config.eval_dataset and size:
        flags = replace(config, dataset=config.eval_dataset, split=None, limit=size)
        held_out = load_problems(flags)
    else:
        random.Random(f"{config.seed}/held out").shuffle(problems)
        held_out, problems = problems[:size], problems[size:]
    if len(problems) < config.problems or config.problems < ranks:
        raise UserError(f"--problems {config.problems} of {len(problems)}, for {ranks} ranks")
    return problems, held_out


def open_folder(config) -> None:
    """Make OUT and write down the flags, or see that it is there to go on with."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if config.resume:
        return
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty: add --resume to go on with its run, or another --out")
    flags = asdict(config) | {"resume": False, "merge": None}
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    (out / "config.json").write_text(json.dumps({"flags": flags, "started": started}, indent=1))


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
            open_folder(config)
        else:
            sys.stdout = open(os.devnull, "w")  # one voice is enough
        config = team.gather(config)[0]  # with rank 0's seed; what it refuses, nobody begins
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB: the trainer needs room, too
        prepare_environment(config.verbose)
        return train(config, problems, held_out, team, stack)


if __name__ == "__main__":
    run_main(main)
