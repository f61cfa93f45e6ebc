r"""GRPO from scratch: a language model learns from its own attempts when to reach for Python.

    python grpo.py                                        # CPU: the embedded model on made-up arithmetic (preset mini)
    python grpo.py --out runs/grpo --resume               # go on after Ctrl-C, kill -9 or a power cut
    python grpo.py --no-agent --out runs/plain            # the same training for plain reasoning, no tool
    python grpo.py --preset paper --out runs/paper        # GPU: the published recipe
    torchrun --nproc-per-node 8 grpo.py --problems 64     # 8 GPUs, each with its own engine; --nnodes 4 for more machines
    python grpo.py --merge runs/grpo                      # runs/grpo/merged: a plain Hugging Face model, adapter folded in
    python agent.py --lora runs/grpo/adapter "What is 48721 times 9637?"

One step, B problems x G traces each, N = B * G:

  1. roll out   agent.py samples the N traces at temperature T(step), snippets run in the sandbox as they come
  2. score      r = sum over --reward-weights of weight * reward function; evaluate.py's comparer says what is correct
  3. update     A = (r - mean of its group) / (std of its group + 1e-4), the same for every token of a trace, and
                  ratio_t = pi(token t) / pi_old(token t)      w_t = min(pi_old / pi_vLLM, --tis-cap), a constant
                  L = - sum over sampled tokens of  c_t w_t min(ratio_t A, clip(ratio_t, 1 - low, 1 + high) A)
                      + kl_beta * sum of c_t (q - log q - 1),  q = pi_base / pi: the base model is the adapter switched off
  4. sync       the new adapter goes back into vLLM under a new name

    --loss     c_t, weight of one token of trace i     advantage                   what it does
    grpo       1 / (N * length_i)                      (r - mean) / (std + 1e-4)   every trace counts the same: in a long one a token counts less
    dapo       1 / (length_1 + ... + length_N)         (r - mean) / (std + 1e-4)   every token counts the same (default)
    dr_grpo    1 / (N * max_tokens)                    r - mean                    neither a trace's length nor a group's spread matters

Lengths count sampled tokens; std is the sample standard deviation (ddof 1). Formulas: DeepSeekMath (arXiv 2402.03300)
eq. 3 and 4, DAPO (2503.14476) eq. 8 and 10, Dr. GRPO (2503.20783) sec. 3; k3 of http://joschu.net/blog/kl-approx.html.
A group whose rewards are all equal has A = 0. Without a KL term it is left out of the update for speed, but its tokens
still count in c_t: leaving it out changes the time a step takes and nothing else.

Differences from the published recipe (preset paper has its numbers), with the reason:

  1. top_p 1, top_k off (0.8 and 50 published): a truncated distribution is not the one that the ratio is computed with.
  2. Tool outputs get no gradient (the published code trains on them): the model did not write them.
  3. "Used code" means that a snippet ran without error (published: any pair of tags, even an empty one).
  4. Logits are divided by the sampling temperature before the log-softmax, in the loss as in the engine.
  5. w_t corrects for the small gap between vLLM's and the trainer's probabilities; the gap is logged at every step.
  6. Groups with equal rewards are left out (see above), or replaced with --resample-flat-groups.
  7. Adapter dropout 0 (0.1 published): the policy that is trained must be the one that sampled.
  8. One optimiser step per rollout, where the ratio is 1 and clipping never acts. With --updates-per-rollout above 1
     pi_old is computed by the trainer before the first update.
  9. The warm-up's first learning rate is lr / warm-up steps, not 0: that step would be wasted.
 10. Preset mini rewards accuracy : code = 10 : 1, the published recipe 1 : 10.

Memory and speed: the prompts' common prefix (examples, mostly) runs twice forward and once backward per update, whatever
the number of traces; logits exist for sampled positions only, a chunk at a time; the base model is the same one, adapter off.

A trap of small rewards: where nobody in a group is right, dividing by the group's std makes a 0.1 for a snippet that ran as
large as a 1.0 for a right answer elsewhere, and the easiest snippet wins. dr_grpo does not divide.

Several GPUs: every rank of torchrun has its own engine and samples its share of the problems; then the ranks exchange
their traces, so that all of them know the whole step and its one token count; each takes a share of the traces through
the model, and one all-reduce adds the adapter's gradients up. Rank 0 writes. OUT must lie where all machines see it.

Left out: a value model, a model spread over GPUs (it must fit one, beside its engine), full fine-tuning, other trainers.

OUT/  config.json   metrics.jsonl   samples.jsonl   curves.png   checkpoints/step-N   adapter/ (at the end, PEFT, bf16)
      live/ (while it runs: the adapter as the engine has it)   tensorboard/ (where that package is installed)
"""

import argparse
import contextlib
import copy
import fcntl
import importlib.util
import json
import math
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from agent import (
    Trace,
    add_model_flags,
    adapter_config,
    context_length,
    has_cuda,
    one_line,
    open_agent,
    prepare_environment,
)
from agent import resolve_model, settings_from, take_rank, trace_seed
from data import (
    SOURCES,
    Parser,
    Problem,
    UserError,
    add_data_flags,
    first_line,
    go_offline_without_hub,
    load_from_flags,
    run_main,
)
from evaluate import CUT, Grader, Verdict

PRESETS = {
    "mini": {
        "model": "embedded",
        "dataset": "arithmetic",
        "steps": 40,
        "problems": 8,
        "group": 8,
        "max_tokens": 256,
        "temperature_start": 1.0,
        "temperature_end": 0.8,
        "temperature_steps": 40,
        "reward_weights": "accuracy=1.0,code=0.1",
        "lr": 3e-4,
        "lr_schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "lora_rank": 16,
        "lora_alpha": 32,
        "rslora": False,
        "gradient_checkpointing": False,
        "micro_tokens": 256,
        "save_every": 5,
        "gpu_memory_utilization": 0.4,
    },
    "paper": {
        "model": "Qwen/Qwen3-4B-Thinking-2507",
        "dataset": "openmathreasoning",
        "steps": 1000,
        "problems": 4,
        "group": 4,
        "max_tokens": 5000,
        "temperature_start": 1.2,
        "temperature_end": 0.7,
        "temperature_steps": 1000,
        "reward_weights": "code=1.0,accuracy=0.1",
        "lr": 1e-6,
        "lr_schedule": "cosine",
        "warmup": 0.1,
        "weight_decay": 0.001,
        "lora_rank": 32,
        "lora_alpha": 16,
        "rslora": True,
        "gradient_checkpointing": True,
        "micro_tokens": 16384,
        "save_every": 20,
        "gpu_memory_utilization": 0.5,
    },
}

EMBEDDED_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the embedded model is a 4-bit copy of

# A reward is a function (trace, verdict on its answer) -> float; a new one is a new line here.
REWARDS = {
    "accuracy": lambda trace, verdict: float(verdict.equal),
    "code": lambda trace, verdict: float(any(result.status == "ok" for _, result in trace.calls)),
}


@dataclass
class Scored:
    trace: Trace
    verdict: Verdict
    reward: float
    advantage: float = 0.0
    weight: float = 0.0  # c_t of the docstring's table: one number for all tokens of a trace

    @property
    def tokens(self) -> tuple[list[int], list[int], list[int]]:
        return self.trace.prompt_ids, self.trace.ids, self.trace.mask

    @property
    def behaviour(self) -> list[float]:
        """vLLM's logprobs of the sampled tokens."""
        return [p for p, m in zip(self.trace.logprobs, self.trace.mask, strict=True) if m]


# ---------------------------------------------------------------------------------------------------------------
# The method, as pure functions. n = sampled tokens of a micro-batch, all traces one after another.


def advantages(rewards, scale_std: bool = True):
    """rewards (B, G) -> advantages (B, G); a row of equal rewards gives exactly 0, whatever the rounding of its mean.

    >>> import torch
    >>> advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]), scale_std=False).tolist()
    [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    flat = (rewards == rewards[:, :1]).all(1, keepdim=True)
    scaled = centred / (rewards.std(1, keepdim=True, correction=1) + 1e-4) if scale_std else centred
    return scaled.masked_fill(flat, 0.0)


def loss_weights(kind: str, lengths: list[int], max_tokens: int) -> list[float]:
    """Weight of each sampled token of each trace, so that the loss is a plain sum over tokens.

    lengths: sampled tokens of *all* N traces of the step: the weights are global, and how the step is cut into
    micro-batches cannot matter. A trace of length 0 (--mask-truncated) counts nowhere.

    >>> loss_weights("grpo", [1, 4], 8), loss_weights("dapo", [1, 4], 8), loss_weights("dr_grpo", [1, 4], 8)
    ([0.5, 0.125], [0.2, 0.2], [0.0625, 0.0625])
    """
    traces = max(1, sum(n > 0 for n in lengths))
    if kind == "grpo":
        return [1 / (traces * n) if n else 0.0 for n in lengths]
    one = 1 / max(1, sum(lengths)) if kind == "dapo" else 1 / (traces * max_tokens)
    return [one if n else 0.0 for n in lengths]


def policy_loss(new, old, behaviour, adv, weights, eps_low: float, eps_high: float, tis_cap: float):
    """All inputs (n,) -> per-token loss (n,), to be summed, and where the clip acts (n,).

    new: logprobs with a gradient; old: the trainer's before the first update; behaviour: vLLM's while sampling.
    """
    ratio = (new - old).exp()
    objective = (ratio * adv).minimum(ratio.clamp(1 - eps_low, 1 + eps_high) * adv)
    if tis_cap > 0:
        objective = objective * (old - behaviour).exp().clamp(max=tis_cap).detach()
    clipped = ((ratio < 1 - eps_low) & (adv < 0)) | ((ratio > 1 + eps_high) & (adv > 0))
    return -weights * objective, clipped


def common_prefix(sequences: list[list[int]]) -> int:
    """Length of the longest prefix that all sequences share: that of the smallest and the largest one.

    >>> common_prefix([[5, 6, 7], [5, 6, 8, 9], [5, 6]])
    2
    """
    low, high = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))


def micro_batches(sizes: list[int], budget: int) -> list[list[int]]:
    """Indices of traces, sorted by length and cut so that rows x longest row <= budget (or one row alone).

    >>> micro_batches([3, 1, 9, 2], 6)
    [[1, 3], [0], [2]]
    """
    batches: list[list[int]] = []
    for i in sorted(
        range(len(sizes)), key=lambda i: sizes[i]
    ):  # ascending: the new one is the longest of its batch
        if not batches or (len(batches[-1]) + 1) * sizes[i] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def decoder_of(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return (
        base,
        base.get_decoder(),
    )  # the decoder is the model without its last layer, the one that makes logits


def shared_prefix(model, prompts: list[list[int]]) -> list[int]:
    """What all prompts begin with, less a token that predicts the first one of a trace. Empty where a cache would be wrong:
    gradient checkpointing silently drops it in train mode, and a sliding window would forget its beginning."""
    base, _ = decoder_of(model)
    layers = getattr(base.config, "layer_types", None) or ()
    if (model.training and base.is_gradient_checkpointing) or any(
        kind != "full_attention" for kind in layers
    ):
        return []
    return prompts[0][: min(common_prefix(prompts), min(map(len, prompts)) - 1)]


def run_prefix(model, ids: list[int]) -> list:
    """Keys and values of ids (P) with their graph, layer by layer: [(1, heads, P, D), (1, heads, P, D), ...] or []."""
    import torch
    from transformers import DynamicCache

    if not ids:
        return []
    base, decoder = decoder_of(model)
    cache = DynamicCache()
    decoder(
        input_ids=torch.tensor([ids], device=base.device), past_key_values=cache, use_cache=True
    )
    assert cache.get_seq_length() == len(ids), (
        f"the model kept {cache.get_seq_length()} of {len(ids)} prefix tokens in its cache"
    )
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def logprobs_of(model, batch, temperature: float, prefix: list = (), chunk: int = 256) -> list:
    """batch: N x (prompt_ids, ids, mask) -> N tensors: log pi(token) of the tokens with mask 1, in order, float32.

    prefix: run_prefix of tokens with which all N prompts begin, and which each of them outlasts. Exact: the N suffixes,
    padded on the right, run on top of N views of it.
    """
    import torch
    from transformers import DynamicCache

    base, decoder = decoder_of(model)
    head, device, N = base.get_output_embeddings(), base.device, len(batch)
    P, cache = prefix[0].shape[2] if prefix else 0, None
    if P:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(prefix[::2], prefix[1::2], strict=True)):
            cache.update(
                keys.expand(N, -1, -1, -1), values.expand(N, -1, -1, -1), layer
            )  # their gradients are summed over N
    rows = [(prompt + ids)[P:-1] for prompt, ids, _ in batch]  # the last token predicts nothing
    width = max(map(len, rows))
    inputs = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=device)  # (N, width)
    seen = torch.tensor(
        [[1] * (P + len(r)) + [0] * (width - len(r)) for r in rows], device=device
    )  # (N, P + width)
    places = torch.arange(P, P + width, device=device).expand(N, -1)  # (N, width)
    hidden = decoder(
        input_ids=inputs,
        attention_mask=seen,
        position_ids=places,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state  # (N, width, D)

    # Token t of a trace stands at len(prompt) + t and was predicted one place before it.
    at = [
        (n, len(prompt) + t - 1 - P, ids[t])
        for n, (prompt, ids, mask) in enumerate(batch)
        for t in range(len(ids))
        if mask[t]
    ]
    row, column, token = torch.tensor(at, device=device).view(-1, 3).unbind(1)
    picked = hidden[row, column]  # (n, D): sampled positions only

    def score(states, tokens):  # (chunk, D), (chunk,) -> (chunk,)
        with torch.no_grad():
            logp = (
                head(states).float().div_(temperature).log_softmax(-1)
            )  # (chunk, V): too large to be kept for a backward pass
            values = logp.gather(1, tokens[:, None]).squeeze(1)
            if not states.requires_grad:
                return values
            # d log p(token) / d state = (the token's row of the head - the mean of all rows under p) / T, known already here.
            # 1 - p(token) is taken in float32: of a sure token nothing else would be left in bfloat16.
            p = logp.exp_()
            p[torch.arange(len(tokens), device=device), tokens] -= 1
            slope = p.to(head.weight.dtype) @ head.weight / -temperature  # (chunk, D)
        return (
            values + ((states - states.detach()) * slope).sum(-1).float()
        )  # the sum is 0, its gradient is the slope

    parts = [score(s, t) for s, t in zip(picked.split(chunk), token.split(chunk), strict=True)]
    return list(torch.cat(parts).split([sum(mask) for _, _, mask in batch]))


def temperature_at(step: int, args) -> float:
    """Temperature of step 0, 1, ...: linear from start to end over --temperature-steps, then constant."""
    done = min(1.0, step / max(1, args.temperature_steps - 1))
    return args.temperature_start + (args.temperature_end - args.temperature_start) * done


def learning_rate(step: int, args) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up over a share of the steps, then constant or half a cosine to 0."""
    warm = round(args.warmup * args.steps)
    if step < warm:
        return args.lr * (step + 1) / warm
    done = (step - warm) / max(1, args.steps - warm)
    return args.lr * (0.5 * (1 + math.cos(math.pi * done)) if args.lr_schedule == "cosine" else 1.0)


def draw(problems: list[Problem], seed: int, cursor: int, n: int) -> list[Problem]:
    """Problems number cursor ... cursor + n - 1 of an endless stream: one shuffled pass after another."""
    size, orders = len(problems), {}
    for i in range(cursor, cursor + n):
        if i // size not in orders:
            orders[i // size] = random.Random(f"{seed}/{i // size}").sample(problems, size)
    return [orders[i // size][i % size] for i in range(cursor, cursor + n)]


# ---------------------------------------------------------------------------------------------------------------
# Rollout, update, sync


class Team:
    """The ranks of a torchrun job, or this process alone. What they exchange is small beside a rollout (traces, adapter
    gradients), so it goes through main memory (gloo), between GPUs too. Raises UserError when another rank has ended."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        if size > 1:
            import torch.distributed as dist

            store, _, _ = next(dist.rendezvous("env://"))
            self.group = dist.ProcessGroupGloo(
                dist.PrefixStore("grpo", store), rank, size, timedelta(hours=6)
            )

    def wait(self, work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise UserError(
                f"rank {self.rank}: another rank has ended, see its message ({first_line(error)})"
            ) from None

    def add(self, tensor) -> None:
        """Sum over the ranks, in place."""
        if self.size > 1:
            self.wait(self.group.allreduce([tensor]))

    def gather(self, value) -> list:
        """The values of all ranks, in order, on every rank."""
        if self.size == 1:
            return [value]
        import torch

        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(mine)
        self.add(lengths)
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        self.wait(self.group.allgather([everyone], [padded]))
        return [
            pickle.loads(part[:n].numpy().tobytes())
            for part, n in zip(everyone, lengths.tolist(), strict=True)
        ]


def roll_out(
    agent,
    grader,
    problems: list[Problem],
    G: int,
    weights: dict[str, float],
    clock: dict,
    team: Team,
) -> list[list[Scored]]:
    """G traces of each problem, scored: a list of len(problems) groups. Answers are compared while others decode."""
    clock["rollout"] -= time.monotonic()
    mine = [(b, p) for b, p in enumerate(problems) if b % team.size == team.rank]
    jobs = [
        (p, b * G + g) for g in range(G) for b, p in mine
    ]  # a group's later traces find their prompt in the engine's cache
    pending = [
        (trace, grader.submit(trace.problem.answer, trace.answer)) for trace in agent.rollout(jobs)
    ]
    pending.sort(key=lambda item: item[0].sample)
    clock["rollout"] += (now := time.monotonic())
    scored = []
    for trace, future in pending:
        verdict = future.result()
        scored.append(
            Scored(
                trace,
                verdict,
                sum(w * REWARDS[name](trace, verdict) for name, w in weights.items()),
            )
        )
    clock["score"] += time.monotonic() - now
    scored = sorted((s for part in team.gather(scored) for s in part), key=lambda s: s.trace.sample)
    return [scored[i : i + G] for i in range(0, len(scored), G)]


def weigh(groups: list[list[Scored]], args) -> list[Scored]:
    """Set every trace's advantage and token weight; returns the traces that the update needs."""
    import torch

    rewards = torch.tensor(
        [[s.reward for s in group] for group in groups], dtype=torch.float64
    )  # (B, G)
    everyone = [s for group in groups for s in group]
    for s, a in zip(
        everyone, advantages(rewards, args.loss != "dr_grpo").flatten().tolist(), strict=True
    ):
        s.advantage = a
    cut = CUT if args.mask_truncated else ()
    lengths = [0 if s.trace.finish in cut else s.trace.sampled for s in everyone]
    for s, weight in zip(everyone, loss_weights(args.loss, lengths, args.max_tokens), strict=True):
        s.weight = weight
    return [s for s in everyone if s.weight and (s.advantage or args.kl_beta)]


def update(model, optimizer, traces: list[Scored], temperature: float, args, team: Team) -> dict:
    """One optimiser step (or --updates-per-rollout of them) on traces; returns what to log. traces are the whole step's
    on every rank; each takes its share of them through the model."""
    import torch

    traces = sorted(traces, key=lambda s: len(s.trace.ids))[team.rank :: team.size]
    # What all prompts begin with (the examples, mostly) runs once, without a graph: micro-batches stand on its keys and
    # values, whose gradients add up (in bfloat16 on a GPU, where preset paper's checkpointing switches all of this off). At
    # the end it runs again, with a graph through which they go back.
    shared = shared_prefix(model, [s.trace.prompt_ids for s in traces]) if traces else []
    batches = micro_batches(
        [len(s.trace.prompt_ids) + len(s.trace.ids) - len(shared) for s in traces],
        args.micro_tokens,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    device, old_logprobs, norms = parameters[0].device, {}, []
    sums, largest = torch.zeros(7, dtype=torch.float64), 0.0  # over tokens, see the end
    with torch.no_grad():
        if args.updates_per_rollout > 1:
            prefix = run_prefix(model, shared)
            for batch in batches:
                old_logprobs |= zip(
                    batch,
                    logprobs_of(model, [traces[i].tokens for i in batch], temperature, prefix),
                    strict=True,
                )
        if args.kl_beta:
            with model.disable_adapter():
                base_prefix = run_prefix(model, shared)
    for _ in range(args.updates_per_rollout):
        total = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad():
            prefix = [tensor.requires_grad_() for tensor in run_prefix(model, shared)]
        for batch in batches:
            part = [traces[i] for i in batch]
            per_trace = logprobs_of(model, [s.tokens for s in part], temperature, prefix)
            new = torch.cat(per_trace)  # (n,)
            old = torch.cat([old_logprobs[i] for i in batch]) if old_logprobs else new.detach()
            counts = torch.tensor([len(p) for p in per_trace], device=device)
            adv, weight = (
                torch.tensor([[s.advantage, s.weight] for s in part], device=device)
                .repeat_interleave(counts, 0)
                .unbind(1)
            )
            behaviour = torch.tensor([p for s in part for p in s.behaviour], device=device)
            loss, clipped = policy_loss(
                new, old, behaviour, adv, weight, args.epsilon_low, args.epsilon_high, args.tis_cap
            )
            kl = torch.zeros_like(new)
            if args.kl_beta:
                with torch.no_grad(), model.disable_adapter():
                    base = torch.cat(
                        logprobs_of(model, [s.tokens for s in part], temperature, base_prefix)
                    )
                kl = (base - new).exp() - (base - new) - 1
                loss = loss + args.kl_beta * weight * kl
            loss.sum().backward()
            total += loss.sum().item()
            gap = old - behaviour
            sums += (
                torch.stack(
                    [torch.ones_like(new), clipped, kl, gap.abs(), gap.exp() - gap - 1, -old, loss]
                )
                .sum(1)
                .detach()
                .double()
                .cpu()
            )
            largest = max(largest, gap.abs().max().item())
        if prefix:
            torch.autograd.backward(run_prefix(model, shared), [tensor.grad for tensor in prefix])
        if team.size > 1:
            flat = torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
            ).cpu()
            team.add(flat)
            team.add(total)
            for p, grad in zip(
                parameters, flat.split([p.numel() for p in parameters]), strict=True
            ):
                p.grad = grad.view_as(p).to(device)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
        if math.isfinite(norm) and math.isfinite(total.item()):
            optimizer.step()
        optimizer.zero_grad()
        norms.append(norm)
    team.add(sums)
    tokens, clips, kls, gaps, gap_kl, nll, loss = sums.tolist()
    return {
        "loss": loss / args.updates_per_rollout,
        "grad_norm": sum(norms) / len(norms),
        "clip_fraction": clips / tokens,
        "kl": kls / tokens if args.kl_beta else None,
        "entropy": nll / tokens,
        "logprob_gap": gaps / tokens,
        "logprob_gap_max": max(team.gather(largest)),
        "gap_kl": gap_kl / tokens,
    }


def load_trainer(args, folder: str, adapter: Path | None):
    """The base model with a new adapter or the one in a folder, in train mode: base frozen, adapter in float32."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(args.seed)
    with one_line(folder):
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16 if has_cuda() else torch.float32
        )
    base.to("cuda" if has_cuda() else "cpu")
    if args.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if adapter:
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    else:
        model = get_peft_model(
            base,
            LoraConfig(
                r=args.lora_rank,
                lora_alpha=args.lora_alpha,
                use_rslora=args.rslora,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    for module in (
        model.modules()
    ):  # the base model's dropout too: the policy that is trained is the one that sampled
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if any(p.requires_grad for p in decoder_of(model)[0].get_output_embeddings().parameters()):
        raise UserError(
            "the adapter trains the output layer, which logprobs_of takes as fixed: give one without lm_head"
        )
    # What --merge will need; the embedded model's cache folder means nothing elsewhere.
    model.peft_config["default"].base_model_name_or_path = (
        EMBEDDED_HUB if args.model == "embedded" else folder
    )
    return model.train()


def save_adapter(model, folder: Path, dtype=None) -> None:
    """An ordinary PEFT adapter folder, written to a folder beside it and renamed: it is there whole or not at all."""
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    try:
        save_file(
            {
                name: t.detach().to("cpu", dtype or t.dtype).contiguous()
                for name, t in tensors.items()
            },
            work / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
    except SafetensorError as error:
        raise UserError(
            f"{folder} could not be written ({first_line(error)}): make room; what was saved before is kept"
        ) from None
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # or a regular expression
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(work)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)


def sync(agent, model, live: Path, step: int) -> None:
    """The trainer's adapter into the engine. A new name and id each time: under the old ones stale weights are served."""
    from vllm.lora.request import LoRARequest

    folder = live / f"step-{step}"
    save_adapter(model, folder)
    if agent.lora:
        agent.engine.remove_lora(agent.lora.lora_int_id)
    agent.lora = LoRARequest(f"step-{step}", step + 2, str(folder.resolve()))
    agent.engine.add_lora(agent.lora)
    agent.engine.reset_prefix_cache()
    for old in set(live.iterdir()) - {folder}:
        shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------
# The run's folder


def save_checkpoint(out: Path, model, optimizer, step: int, cursor: int) -> None:
    """Everything that step + 1 depends on; the last two are kept. Raises UserError where the disk does not take it."""
    import torch

    folder = out / "checkpoints" / f"step-{step:06d}"
    work = folder.with_name(".tmp")
    shutil.rmtree(work, ignore_errors=True)
    devices = torch.cuda.get_rng_state_all() if has_cuda() else []  # drawn from with --seed -1 only
    state = {
        "step": step,
        "cursor": cursor,
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": devices,
    }
    try:
        save_adapter(model, work / "adapter")
        torch.save(state, work / "state.pt")
    except (OSError, RuntimeError, UserError) as error:  # torch has a RuntimeError for a full disk
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} could not be written ({first_line(error)}): make room, "
            f"then go on from the last one with --out {out} --resume"
        ) from None
    for later in [
        other for other in checkpoints(out) if other.name >= folder.name
    ]:  # damaged ones, passed over by --resume
        shutil.rmtree(later, ignore_errors=True)
    work.rename(folder)
    for old in checkpoints(out)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def last_checkpoint(out: Path, say) -> tuple[Path | None, dict]:
    """The newest checkpoint that can be read and its state; a damaged one is passed over with a word."""
    import torch

    for folder in reversed(checkpoints(out)):
        try:
            adapter_config(str(folder / "adapter"))
            return folder, torch.load(folder / "state.pt", weights_only=True)
        except (
            OSError,
            RuntimeError,
            ValueError,
            EOFError,
            pickle.UnpicklingError,
            UserError,
        ) as error:
            say(f"{folder} is damaged and passed over ({first_line(error)})", flush=True)
    return None, {}


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a last line that a kill cut in two."""
    rows = []
    for line in (
        path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ()
    ):  # not splitlines: U+2028
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                rows.append(line + "\n")
    work = path.with_suffix(".tmp")
    work.write_text("".join(rows), encoding="utf-8")
    work.replace(path)


def append(path: Path, rows: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def draw_curves(out: Path) -> None:
    """OUT/curves.png from OUT/metrics.jsonl."""
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    rows = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    panels = [
        ("reward",),
        ("accuracy", "code_rate", "truncated"),
        ("length", "length_total"),
        ("grad_norm",),
        ("logprob_gap",),
        ("seconds_rollout", "seconds_score", "seconds_train"),
    ]
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, names in zip(figure.subplots(2, 3).flat, panels, strict=True):
        for name in names:
            points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            axes.plot(
                *zip(*points) if points else ([], []),
                marker="." if len(points) < 60 else None,
                label=name,
            )
        axes.legend(fontsize=8, framealpha=0.4), axes.grid(alpha=0.3), axes.set_xlabel("step")
    figure.savefig(out / ".curves.png", dpi=100)
    (out / ".curves.png").replace(out / "curves.png")


def memory_gib() -> float:
    """Peak so far: the GPU's where there is one, else the process's (engine included)."""
    if has_cuda():
        import torch

        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def merge(run: Path, model: str | None) -> None:
    """Fold a run's adapter (of its last checkpoint, if it is not at its end), or a bare folder's, into its base and write
    RUN/merged, a plain Hugging Face model."""
    adapter = next(
        (
            folder
            for folder in (run / "adapter", *(c / "adapter" for c in reversed(checkpoints(run))))
            if folder.is_dir()
        ),
        run,
    )
    config = adapter_config(str(adapter))
    if config["base_model_name_or_path"] == EMBEDDED_HUB:
        model = model or "embedded"
    base, _ = resolve_model(model or config["base_model_name_or_path"], str(adapter))
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter
    ).merge_and_unload()
    try:
        merged.save_pretrained(run / "merged")
    except SafetensorError as error:
        raise UserError(
            f"{run / 'merged'} could not be written ({first_line(error)}): make room and give the same command again"
        ) from None
    AutoTokenizer.from_pretrained(base).save_pretrained(run / "merged")
    print(f"{run / 'merged'}: {base} with {adapter}")


# ---------------------------------------------------------------------------------------------------------------
# The command line


def parse_flags(argv: list[str]):
    """Flags over the preset's values (or, with --resume, over those that the run was started with)."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="paper" if has_cuda() else "mini")
    first.add_argument("--out", type=Path, default=Path("runs/grpo"))
    first.add_argument("--resume", action="store_true")
    early, _ = first.parse_known_args(argv)
    if early.preset not in PRESETS:
        raise UserError(f"--preset {early.preset}: give mini or paper")

    parser = Parser(
        description="Train a LoRA adapter with GRPO; the docstring of grpo.py explains the method.",
        allow_abbrev=False,
    )

    def flag(group, name: str, text: str, default=None, **options):
        dest = name[2:].replace("-", "_")
        values = (
            " (" + ", ".join(f"{p} {v[dest]}" for p, v in PRESETS.items()) + ")"
            if dest in PRESETS["mini"]
            else ""
        )
        if isinstance(PRESETS["mini"].get(dest, default), bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.setdefault("type", type(PRESETS["mini"].get(dest, default)))
            values = values or f" (default: {default})"
        group.add_argument(name, default=default, help=text + values, **options)

    run = parser.add_argument_group("run")
    run.add_argument(
        "--preset",
        choices=list(PRESETS),
        default=early.preset,
        help="values of all flags not given (default: paper with a GPU, else mini)",
    )
    run.add_argument(
        "--out",
        type=Path,
        default=early.out,
        metavar="DIR",
        help="the run's folder (default: runs/grpo)",
    )
    run.add_argument(
        "--resume", action="store_true", help="go on with the run in --out from its last checkpoint"
    )
    run.add_argument(
        "--merge",
        type=Path,
        metavar="OUT",
        help="no training: write OUT/merged, a plain model with OUT's adapter folded in",
    )
    run.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    flag(run, "--steps", "updates in all", metavar="N")
    flag(run, "--save-every", "steps between checkpoints", metavar="N")
    method = parser.add_argument_group("method")
    flag(method, "--problems", "problems of a step (B)", metavar="B")
    flag(method, "--group", "traces of a problem (G)", metavar="G")
    flag(method, "--loss", "see the docstring's table", "dapo", choices=["grpo", "dapo", "dr_grpo"])
    flag(method, "--reward-weights", f"rewards: {', '.join(REWARDS)}", metavar="NAME=W,...")
    flag(method, "--epsilon-low", "clip the ratio below 1 - E", 0.2, metavar="E")
    flag(method, "--epsilon-high", "clip the ratio above 1 + E", 0.4, metavar="E")
    flag(method, "--kl-beta", "weight of the KL term to the base model", 0.0, metavar="X")
    flag(
        method,
        "--tis-cap",
        "cap of the correction pi_old / pi_vLLM; 0: no correction",
        2.0,
        metavar="X",
    )
    flag(method, "--mask-truncated", "traces that were cut give no gradient", False)
    flag(
        method,
        "--resample-flat-groups",
        "up to N more rounds to replace groups whose rewards are all equal",
        0,
        metavar="N",
    )
    flag(method, "--updates-per-rollout", "optimiser steps on one batch of traces", 1, metavar="N")
    flag(method, "--temperature-start", "sampling temperature of the first step", metavar="T")
    flag(method, "--temperature-end", "and of the last", metavar="T")
    flag(method, "--temperature-steps", "steps from one to the other", metavar="N")
    optimiser = parser.add_argument_group("optimiser and adapter")
    flag(optimiser, "--lr", "learning rate", metavar="X")
    flag(optimiser, "--lr-schedule", "after the warm-up", choices=["constant", "cosine"])
    flag(optimiser, "--warmup", "share of the steps", metavar="X")
    flag(optimiser, "--weight-decay", "AdamW's", metavar="X")
    flag(optimiser, "--max-grad-norm", "gradients are scaled down to this norm", 1.0, metavar="X")
    flag(optimiser, "--lora-rank", "rank r", metavar="R")
    flag(optimiser, "--lora-alpha", "scale: alpha / r", metavar="A")
    flag(optimiser, "--rslora", "scale: alpha / sqrt(r)")
    flag(optimiser, "--micro-tokens", "tokens of one forward and backward pass", metavar="N")
    flag(
        optimiser, "--gradient-checkpointing", "less memory, more time; excludes the shared prefix"
    )
    add_data_flags(parser)
    add_model_flags(parser)
    parser.set_defaults(top_p=1.0, top_k=0, temperature=None, **PRESETS[early.preset])

    def parse(argv: list[str]):
        args = parser.parse_args(argv)
        if args.temperature is not None:  # the flag of the other scripts: no schedule
            args.temperature_start = args.temperature_end = args.temperature
        args.temperature = args.temperature_start
        return args

    if not early.resume:
        return parse(argv)
    try:
        flags = json.loads((early.out / "config.json").read_text())["flags"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"--resume: no run in {early.out} (config.json is missing or damaged); leave --resume away to start one"
        ) from None
    parser.set_defaults(**flags)
    args = parse(argv)
    free = {
        "steps",
        "save_every",
        "wandb",
        "verbose",
        "batch",
        "gpu_memory_utilization",
        "micro_tokens",
        "gradient_checkpointing",
        "sandbox",
    }
    changed = [k for k in flags if k not in free and getattr(args, k) != flags[k]]
    if changed:
        raise UserError(
            f"--resume goes on with the run's own flags; --{changed[0].replace('_', '-')} differs: was {flags[changed[0]]}"
        )
    return args


def parse_weights(text: str) -> dict[str, float]:
    """`code=1.0,accuracy=0.1` -> {"code": 1.0, "accuracy": 0.1}"""
    weights = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in REWARDS:
            raise UserError(
                f"--reward-weights {text}: unknown reward {name.strip()!r}; there are {', '.join(REWARDS)}"
            )
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise UserError(
                f"--reward-weights {text}: {part.strip()!r} needs a number, as in code=1.0,accuracy=0.1"
            ) from None
    if not any(weights.values()) or not all(map(math.isfinite, weights.values())):
        raise UserError(
            f"--reward-weights {text}: at least one weight must differ from 0, all must be finite"
        )
    return weights


def check_flags(args) -> None:
    """Refuse in one line what cannot work; fills in what depends on other flags."""
    if args.top_p != 1 or args.top_k != 0:
        raise UserError(
            "training samples with --top-p 1 --top-k 0: a truncated distribution is not the one in the loss, which biases the ratio"
        )
    least = {
        "steps": 1,
        "problems": 1,
        "group": 2,
        "updates_per_rollout": 1,
        "temperature_steps": 1,
        "lora_rank": 1,
        "micro_tokens": 1,
        "save_every": 1,
        "resample_flat_groups": 0,
        "epsilon_low": 0,
        "epsilon_high": 0,
        "kl_beta": 0,
        "tis_cap": 0,
        "weight_decay": 0,
        "warmup": 0,
    }
    for name, low in least.items():
        if not math.isfinite(getattr(args, name)) or getattr(args, name) < low:
            why = ": one trace has nothing to be compared with" if name == "group" else ""
            raise UserError(
                f"--{name.replace('_', '-')} must be at least {low}, not {getattr(args, name)}{why}"
            )
    for name in ("lr", "lora_alpha", "max_grad_norm", "temperature_start", "temperature_end"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(
                f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}"
            )
    if args.warmup > 1 or args.epsilon_low > 1 or args.lora_rank > 512:
        raise UserError("--warmup and --epsilon-low are at most 1, --lora-rank at most 512")
    args.lora = (
        "none" if args.lora is None else args.lora
    )  # a new adapter, where the other scripts take the one that we trained
    if args.tensor_parallel > 1:
        raise UserError(
            "grpo.py trains on one GPU per rank: the model must fit one beside its engine (4B: 16 GB in bfloat16 for both, and the cache); "
            "for more GPUs: torchrun --nproc-per-node N grpo.py ..."
        )
    if args.wandb and not importlib.util.find_spec("wandb"):
        raise UserError("--wandb: the package is not installed: pip install wandb")
    if args.dataset == "arithmetic" and args.split is None:
        args.split = "train"
    if args.limit is None and any(s.stream for s in SOURCES.get(args.dataset, ())):
        args.limit = (
            args.steps * args.problems * (1 + args.resample_flat_groups)
        )  # a set too large to be read whole
    settings_from(argparse.Namespace(**vars(args)))


def open_folder(args, stack: contextlib.ExitStack) -> None:
    """Make or reopen OUT and lock it until the process ends."""
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((out / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"another grpo.py is writing into {out}: wait for it, or give another --out"
        ) from None
    if not args.resume and [p for p in out.iterdir() if p.name != ".lock"]:
        raise UserError(
            f"{out} is not empty: add --resume to go on with its run, or give another --out"
        )


def main() -> int:
    args = parse_flags(sys.argv[1:])
    if args.merge:
        prepare_environment(args.verbose)
        return (
            merge(args.merge, None if args.model == PRESETS[args.preset]["model"] else args.model)
            or 0
        )
    rank, ranks = take_rank()  # before anything can import torch
    check_flags(args)
    weights = parse_weights(args.reward_weights)
    flags = {
        k: v
        for k, v in vars(args).items()
        if k not in ("out", "resume", "merge", "temperature", "verbose")
    }
    problems = load_from_flags(args)
    if len(problems) < args.problems:
        raise UserError(f"--problems {args.problems}: {args.dataset} has only {len(problems)}")
    if args.model != "embedded":
        go_offline_without_hub()
    folder, adapter = resolve_model(args.model, args.lora)
    config = Path(folder) / "config.json"
    with one_line(
        folder
    ):  # a local folder without a library's help: this should end before anything heavy is loaded
        context = (
            json.loads(config.read_text()).get("max_position_embeddings")
            if config.is_file()
            else context_length(folder)
        )
    if context and args.max_tokens >= context:
        raise UserError(
            f"--max-tokens {args.max_tokens}: the model's context is {context} tokens, prompt included"
        )
    if ranks > args.problems:
        raise UserError(
            f"--problems {args.problems} is less than the {ranks} ranks: each needs one at least"
        )
    with contextlib.ExitStack() as stack:
        team = Team(rank, ranks)
        if rank == 0:
            open_folder(args, stack)
        team.gather(None)  # the others come after: what rank 0 refuses, nobody begins
        return train(
            args, flags, problems, weights, folder, Path(adapter) if adapter else None, team, stack
        )


def train(
    args,
    flags: dict,
    problems: list[Problem],
    weights: dict[str, float],
    folder: str,
    adapter: Path | None,
    team: Team,
    stack,
) -> int:
    out, B, G, cuda, first = args.out, args.problems, args.group, has_cuda(), team.rank == 0
    say = print if first else lambda *_, **__: None
    say(
        f"{out}: preset {args.preset}, {len(problems)} problems{f', {team.size} ranks' if team.size > 1 else ''}\n"
        + " ".join(f"{k}={v}" for k, v in flags.items() if v not in (None, [])),
        flush=True,
    )
    if first and not args.resume:
        config = {
            "flags": flags,
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": f"{os.cpu_count()} cores" + ", GPU" * cuda,
        }
        (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    # ---- model, optimiser, engine
    os.environ.setdefault(
        "VLLM_CPU_KVCACHE_SPACE", "1"
    )  # GiB, less than agent.py takes: the trainer needs room too
    prepare_environment(args.verbose)
    import torch

    last, state = last_checkpoint(out, say)
    say(f"loading {folder}", flush=True)  # from the hub the first time: minutes
    model = load_trainer(args, folder, last / "adapter" if last else adapter)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.lr,
        weight_decay=args.weight_decay,
    )
    step = cursor = 0
    if last:
        step, cursor = state["step"], state["cursor"]
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if cuda:
            torch.cuda.set_rng_state_all(state["random_cuda"])
    for name in ("metrics.jsonl", "samples.jsonl") if first else ():
        cut_log(out / name, step)
    if first and step < args.steps:
        shutil.rmtree(
            out / "adapter", ignore_errors=True
        )  # of a run that was at its end and goes on
    live = out / "live" / f"rank-{team.rank}"
    save_adapter(model, live / "start")  # the engine learns the adapter's rank and modules from it
    engine_args = argparse.Namespace(
        **vars(args)
        | {
            "model": args.model if args.model == "embedded" else folder,
            "lora": str(live / "start"),
            "sleep": cuda,
        }
    )
    longest = sorted(problems, key=lambda p: -len(p.question))[
        :64
    ]  # they set the context that the engine plans for
    agent = stack.enter_context(open_agent(engine_args, longest))
    grader = stack.enter_context(Grader())
    loggers = open_loggers(args, flags, out) if first else []
    sync(agent, model, live, step)
    stop = stop_on_signals(stack, say)
    gap_limit = 0.02 if cuda else 0.001  # what rounding explains

    while step < args.steps and not any(
        team.gather(bool(stop))
    ):  # all ranks stop at the same step, or none
        # ---- roll out and score
        clock, temperature = {"rollout": 0.0, "score": 0.0}, temperature_at(step, args)
        groups, flat_groups, rolled = [], [], []
        for attempt in range(1 + args.resample_flat_groups):
            agent.settings = replace(
                agent.settings,
                temperature=temperature,
                seed=trace_seed(None if args.seed < 0 else args.seed, "step", step, attempt),
            )
            batch = draw(problems, args.seed, cursor, B - len(groups))
            cursor += len(batch)
            for group in roll_out(agent, grader, batch, G, weights, clock, team):
                (flat_groups if len({s.reward for s in group}) == 1 else groups).append(group)
                rolled += group
            if len(groups) == B:
                break

        # ---- update: one GPU is the engine's or the trainer's, never both at once
        started = time.monotonic()
        if cuda:
            agent.engine.sleep(1)
        for setting in optimizer.param_groups:
            setting["lr"] = learning_rate(step, args)
        traces = weigh((groups + flat_groups)[:B], args)
        stats = update(model, optimizer, traces, temperature, args, team) if traces else {}
        if cuda:
            torch.cuda.empty_cache()
            agent.engine.wake_up()

        # ---- sync
        step += 1
        sync(agent, model, live, step)
        clock["train"] = time.monotonic() - started

        # ---- log
        if not first:
            continue
        row = {
            "step": step,
            **averages(rolled),
            "flat_groups": len(flat_groups),
            "temperature": temperature,
            "lr": learning_rate(step - 1, args),
            **{
                name: value if value is not None and math.isfinite(value) else None
                for name, value in stats.items()
            },
            **{f"seconds_{what}": seconds for what, seconds in clock.items()},
            "memory_gib": memory_gib(),
        }
        append(out / "metrics.jsonl", [row])
        append(
            out / "samples.jsonl",
            [sample_row(step, s) for s in rolled[:: max(1, len(rolled) // 3)][:3]],
        )
        for log in loggers:
            log(step, row)
        print(progress_line(row, args.steps) + complaint(row, bool(traces), gap_limit), flush=True)

        # ---- save
        if step % args.save_every == 0 or step == args.steps or stop:
            save_checkpoint(out, model, optimizer, step, cursor)
            draw_curves(out)

    if not first:
        return 0 if step == args.steps else 130
    if step < args.steps:
        if not checkpoints(out) or checkpoints(out)[-1].name != f"step-{step:06d}":
            save_checkpoint(out, model, optimizer, step, cursor)  # another rank was asked to stop
        print(
            f"stopped after step {step} of {args.steps}, saved in {checkpoints(out)[-1]}; go on with: python grpo.py --out {shlex.quote(str(out))} --resume"
        )
        return 130
    save_adapter(model, out / "adapter", torch.bfloat16)
    shutil.rmtree(out / "live", ignore_errors=True)
    print(
        f"{out / 'adapter'}: try it with: python agent.py --model {shlex.quote(str(args.model))} --lora {shlex.quote(str(out / 'adapter'))}"
    )
    return 0


def stop_on_signals(stack, say) -> list:
    """A list that is empty until the first Ctrl-C (or SIGTERM); the second one aborts at once."""
    stop: list[int] = []

    def handler(number, _):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
        say("finishing this step, then saving (again: abort now)", file=sys.stderr, flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, handler))
    return stop


def open_loggers(args, flags: dict, out: Path) -> list:
    """Functions (step, row) for TensorBoard, where it is installed, and for Weights & Biases, where it was asked for."""
    loggers, numbers = [], lambda row: {k: v for k, v in row.items() if v is not None}
    with contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"))
        loggers.append(
            lambda step, row: (
                [writer.add_scalar(k, v, step) for k, v in numbers(row).items()] and writer.flush()
            )
        )
    if args.wandb:
        import wandb

        run = wandb.init(project="deepmath", name=out.name, config=flags, dir=str(out))
        loggers.append(lambda step, row: run.log(numbers(row), step=step))
    return loggers


def sample_row(step: int, s: Scored) -> dict:
    return {
        "step": step,
        "question": s.trace.problem.question,
        "gold": s.trace.problem.answer,
        "answer": s.trace.answer,
        "correct": s.verdict.equal,
        "reward": s.reward,
        "advantage": s.advantage,
        "finish": s.trace.finish,
        "tokens": s.trace.sampled,
        "text": s.trace.text,
    }


def averages(rolled: list[Scored]) -> dict:
    """Means over all traces of a step, those of groups that the update leaves out too."""
    mean = lambda values: sum(values) / len(rolled)  # noqa: E731
    return {
        "reward": mean(s.reward for s in rolled),
        "accuracy": mean(s.verdict.equal for s in rolled),
        "code_rate": mean(REWARDS["code"](s.trace, s.verdict) for s in rolled),
        "length": mean(s.trace.sampled for s in rolled),
        "length_total": mean(len(s.trace.ids) for s in rolled),
        "truncated": mean(s.trace.finish in CUT for s in rolled),
        "tokens": sum(s.trace.sampled for s in rolled),
    }


def complaint(row: dict, updated: bool, limit: float) -> str:
    """What is wrong with a step, as a second line under its progress; limit: of the gap between engine and trainer."""
    if not updated:
        return "\n  no gradient in this step: in every group all rewards are equal (or every trace is masked)"
    if row["loss"] is None or row["grad_norm"] is None:
        return "\n  loss or gradient is not a finite number: the adapter was left as it was"
    if row["logprob_gap"] is None or row["logprob_gap"] > limit:
        return f"\n  warning: engine and trainer disagree by {row['logprob_gap'] or math.nan:.2g} per token on average, more than {limit} explains"
    return ""


def progress_line(row: dict, steps: int) -> str:
    gap = row.get("logprob_gap")
    return (
        f"step {row['step']:3d}/{steps}  reward {row['reward']:.3f}  right {row['accuracy']:.2f}  code {row['code_rate']:.2f}  "
        f"length {row['length']:.0f}  cut {row['truncated']:.2f}  T {row['temperature']:.2f}  gap {'-' if gap is None else f'{gap:.1e}'}  "
        f"{row['seconds_rollout']:.0f} + {row['seconds_train']:.0f} s  {row['memory_gib']:.1f} GiB"
    )


if __name__ == "__main__":
    run_main(main)
