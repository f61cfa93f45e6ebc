"""The method by hand-worked numbers on a tiny random model; the loop with a scripted rollout.

The tiny model is a two-layer Llama with a LoRA adapter whose B matrices are random, not zero (at
zero, half of the gradients vanish and half of the mistakes with them). Its "engine" draws traces
from a seed and reads the adapter that was synced, so that a run depends on what it trained.
"""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL
from unittest.mock import Mock

import pytest

import cli
import data
import engine
import grpo
from agent import Trace
from cli import UserError
from data import Problem
from engine import Team, adapter_config, save_adapter
from grpo import Config
from sandbox import Result

ROOT = Path(__file__).resolve().parent.parent
APART = {**os.environ, "PYTHONPATH": str(ROOT), "SLOWLY": "0.01"}  # for other processes


def close(a, b):
    return a == pytest.approx(b, abs=1e-6)


SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, max_position_embeddings=512, tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tiny_folder):
    return tiny_model(tiny_folder)


def tiny_model(folder, **flags):
    import torch

    model = grpo.load_trainer(Config(lora_rank=4, **flags), str(folder), None)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model


def gradient(model):
    import torch

    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def near(a, b) -> bool:
    """Two gradients, equal up to rounding."""
    return (a - b).norm().item() < 1e-5 * b.norm().item()


def make_trace(rng, prompt, length, inserted=(), sample=0):
    """A trace of `length` random tokens; those at positions `inserted` were not sampled."""
    trace = Trace(Problem("p", "q", "1"), sample, list(prompt), finish="eos")
    trace.ids = [rng.randrange(97) for _ in range(length)]
    trace.mask = [int(i not in inserted) for i in range(length)]
    trace.logprobs = [-4 - rng.random() if sampled else 0.0 for sampled in trace.mask]
    return trace


def give(trace, accuracy, code):
    trace.rewards = {"accuracy": accuracy, "code": code}
    trace.reward = accuracy + 0.1 * code


def make_groups(seed=0, shared=20):
    """B groups of G traces whose prompts share a beginning, with rewards and inserted stretches."""
    rng = random.Random(seed)
    beginning = [rng.randrange(97) for _ in range(shared)]
    groups = []
    for b in range(2):
        prompt = beginning + [rng.randrange(97) for _ in range(1 + b)]
        group = [make_trace(rng, prompt, rng.randint(5, 25), range(2, 4 + b)) for _ in range(3)]
        for i, trace in enumerate(group):
            give(trace, float(i == b), float(i > 0))
        groups.append(group)
    return groups


def one_update(model, groups, **flags):
    """(what is logged, the gradients that an optimiser which moves nothing has seen)."""
    gradients = []
    optimizer = Mock(step=lambda: gradients.append(gradient(model)))
    config = Config(**{"max_grad_norm": 1e9, "micro_tokens": 64, **flags})
    grpo.set_advantages(groups, config)
    return grpo.update(model, optimizer, groups, 0.8, config, Team()), gradients


def advantages(groups, **flags):
    grpo.set_advantages(groups, Config(**flags))
    return [[trace.advantage for trace in group] for group in groups]


def test_advantages_by_hand():
    rng = random.Random(0)
    groups = [[make_trace(rng, [1], 3) for _ in range(4)] for _ in range(2)]
    for trace, right in zip(groups[0], (1.0, 0.0, 0.0, 1.0)):
        give(trace, right, 0.0)
    for trace in groups[1]:
        give(trace, 0.0, 3.0)  # whose mean is rounded
    of_group, of_batch = math.sqrt(1 / 3), math.sqrt(4 * 0.25 / 7)  # of all eight r - mean
    for scale, std in (("none", 1 - 1e-4), ("group", of_group), ("batch", of_batch)):
        found, flat = advantages(groups, scale_rewards=scale)
        assert close(found, [0.5 / (std + 1e-4) * sign for sign in (1, -1, -1, 1)])
        assert flat == [0, 0, 0, 0]  # exactly

    groups = make_groups()
    # GDPO: each reward is scaled by itself, then weighted: a 0.1 stays a tenth of a 1.0.
    accuracy, code = [2 / 3, -1 / 3, -1 / 3], [-2 / 3, 1 / 3, 1 / 3]
    expected = [(a + 0.1 * c) / (math.sqrt(1 / 3) + 1e-4) for a, c in zip(accuracy, code)]
    assert close(advantages(groups, reward_aggregation="normalize_then_sum")[0], expected)
    for trace in groups[1]:
        trace.rewards["accuracy"] = 1.0
    first, second = advantages(groups, skip_flat="accuracy")
    assert second == [0, 0, 0] and first[0] > 0


CASES = [(1.0, 2.0, 2.0, False), (1.5, 2.0, 2.8, True), (1.5, -2.0, -3.0, False)]
CASES += [(0.5, 2.0, 1.0, False), (0.5, -2.0, -1.6, True)]


@pytest.mark.parametrize(("ratio", "A", "objective", "clip_acts"), CASES)
def test_policy_loss_by_hand(ratio, A, objective, clip_acts):
    import torch

    one = torch.ones(1)
    new, old, vllm = math.log(ratio) - 2 * one, -2 * one, -(2 + math.log(3)) * one
    for cap, factor in ((0, 1.0), (2.0, 2.0), (5.0, 3.0)):  # pi_old / pi_vLLM is 3
        config = Config(epsilon_low=0.2, epsilon_high=0.4, tis_cap=cap)
        loss, clipped = grpo.policy_loss(new, old, vllm, A * one, 0.25 * one, config)
        assert close(loss.item(), -0.25 * factor * objective) and clipped.item() == clip_acts


def test_rewards():
    trace = make_trace(random.Random(0), [1], 95)
    config = Config(max_tokens=100, reward_weights="code=1.0,overlong=0.1")
    assert grpo.reward_weights(config) == {"code": 1.0, "overlong": 0.1}

    def rewards(right, *statuses):
        trace.calls = [("code", Result(status, "", 0.1)) for status in statuses]
        grpo.set_rewards(trace, right, config)
        return trace.rewards

    assert rewards(True) == {"accuracy": 1, "code": 0, "overlong": pytest.approx(-15 / 20)}
    assert rewards(False, "error")["code"] == 0 and close(trace.reward, -0.1 * 15 / 20)
    assert rewards(False, "error", "ok")["code"] == 1 and close(trace.reward, 1 - 0.1 * 15 / 20)
    config.max_tokens = 200
    assert rewards(True)["overlong"] == 0
    for wrong in ("x=1", "code", "code=a", ""):
        with pytest.raises(UserError, match="--reward-weights"):
            grpo.reward_weights(Config(reward_weights=wrong))


def test_schedules():
    config = Config(temperature=1.2, temperature_end=0.7, temperature_steps=11)
    assert close([grpo.schedules(i, config)[0] for i in (0, 5, 10, 39)], [1.2, 0.95, 0.7, 0.7])
    config = Config(lr=1.0, steps=20, warmup=0.2, lr_schedule="cosine")
    rates = [grpo.schedules(step, config)[1] for step in range(20)]
    assert close(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    assert close(rates[12], 0.5) and rates[19] < 0.02
    assert grpo.schedules(19, Config(lr=1.0, steps=20, warmup=0.2))[1] == 1.0


@pytest.mark.parametrize("in_turn", [None, "kind"])
def test_problems_are_one_shuffled_pass_after_another(in_turn):
    problems = [Problem(str(i), "q", "1", {"kind": kind}) for i, kind in enumerate("aaaabbc")]
    config = Config(problems=3, in_turn=in_turn)
    steps = [grpo.problems_at(step, problems, config) for step in range(40)]
    laps = [[p.id for p in steps[i] + steps[i + 1]] for i in range(0, 40, 2)]
    assert all(len(set(lap)) == 6 for lap in laps)  # none twice in a pass
    assert len(set(map(tuple, laps))) > 10 and {min(lap) for lap in laps} >= {"0", "1"}
    kinds = {"".join(sorted(p.meta["kind"] for p in step)) for step in steps[::2]}
    assert (kinds == {"abc"}) == bool(in_turn)  # one of each


def naive_logprobs(model, trace, temperature):
    import torch

    ids = torch.tensor([trace.prompt_ids + trace.ids])
    logp = (model(ids).logits[0] / temperature).log_softmax(-1)
    at = [len(trace.prompt_ids) + i for i, sampled in enumerate(trace.mask) if sampled]
    return torch.stack([logp[t - 1, ids[0, t]] for t in at])


def test_logprobs_agree_with_log_softmax_of_the_plain_model(model, monkeypatch):
    import torch

    traces = [trace for group in make_groups() for trace in group]
    expected = torch.cat([naive_logprobs(model, trace, 0.7) for trace in traces])
    seen = []
    layer = model.get_base_model().model.layers[0].self_attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **k: seen.append(k) or forward(*a, **k))
    assert len(expected) == sum(trace.sampled for trace in traces)  # none of inserted tokens
    assert torch.allclose(grpo.token_logprobs(model, traces, 0.7), expected, atol=1e-5)
    assert seen[0]["attention_mask"] is None  # a mask would switch flash attention off
    with grpo.shared_prefix(model, [trace.prompt_ids for trace in traces]) as prefix:
        assert prefix(1)[0] >= 19
        assert torch.allclose(grpo.token_logprobs(model, traces, 0.7, prefix), expected, atol=1e-5)
        grpo.token_logprobs(model, traces, 0.7, prefix).sum().backward()


def test_a_float32_adapter_does_not_promote_a_bfloat16_base(tiny_folder, monkeypatch):
    """Else activations double; as on a GPU: the base in bfloat16, prefix and traces alike."""
    import torch

    monkeypatch.setattr(engine, "compute_dtype", lambda: "bfloat16")
    model = tiny_model(tiny_folder)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    traces = [trace for group in make_groups() for trace in group]
    kinds = []
    layer = model.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"]
    layer.register_forward_hook(lambda module, given, out: kinds.append(out.dtype))
    with grpo.shared_prefix(model, [trace.prompt_ids for trace in traces]) as prefix:
        grpo.token_logprobs(model, traces, 1.0, prefix).sum().backward()
    grpo.token_logprobs(model, traces, 1.0)
    assert set(kinds) == {torch.bfloat16} == {layer.keys.dtype for layer in prefix(1)[1].layers}
    assert gradient(model).isfinite().all()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_each_loss_against_its_formula(model, loss_type):
    """The gradient of the update is that of the formula, written naively over whole traces."""
    groups = make_groups()
    flags = {"loss_type": loss_type, "scale_rewards": "none", "max_tokens": 30, "tis_cap": 2}
    stats, (ours,) = one_update(model, groups, **flags, kl_beta=0.3)
    traces = [trace for group in groups for trace in group]
    lengths = [trace.sampled for trace in traces]
    model.zero_grad()
    loss = 0
    for trace, length in zip(traces, lengths):
        new = naive_logprobs(model, trace, 0.8)
        with model.disable_adapter():
            base = naive_logprobs(model, trace, 0.8).detach()
        kl = (base - new).exp() - (base - new) - 1
        vllm = new.new_tensor([p for p, m in zip(trace.logprobs, trace.mask) if m])
        w = (new.detach() - vllm).exp().clamp(max=2)
        token_loss = -w * (new - new.detach()).exp() * trace.advantage + 0.3 * kl
        weight = {"grpo": 1 / (6 * length), "dapo": 1 / sum(lengths), "dr_grpo": 1 / (6 * 30)}
        loss = loss + weight[loss_type] * token_loss.sum()
    loss.backward()
    assert near(ours, gradient(model)) and stats["loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_gradient_depends_neither_on_the_cut_nor_on_the_prefix(model, tiny_folder, monkeypatch):
    stats, (reference,) = one_update(model, make_groups(), micro_tokens=10_000)
    for micro_tokens in (1, 80, 150):
        cut, (found,) = one_update(model, make_groups(), micro_tokens=micro_tokens)
        assert near(found, reference) and close(cut["loss"], stats["loss"])
    # Gradient checkpointing would drop the cache without a word: no prefix there.
    thrifty, passes = tiny_model(tiny_folder, gradient_checkpointing=True), []
    thrifty.get_base_model().model.layers[1].register_forward_pre_hook(lambda *_: passes.append(1))
    with grpo.shared_prefix(thrifty, [[1, 2, 3], [1, 2, 4]]) as prefix:
        assert prefix is None
    assert near(one_update(thrifty, make_groups(), micro_tokens=10_000)[1][0], reference)
    assert len(passes) == 2  # the second one is in the backward pass
    monkeypatch.setattr(grpo, "shared_prefix", lambda *_: contextlib.nullcontext())
    assert near(one_update(model, make_groups())[1][0], reference)


@pytest.mark.parametrize("part", ["q_proj.lora", "layers.1.mlp.down_proj.lora"])
def test_the_prefix_may_have_nothing_to_train(model, monkeypatch, part):
    """Queries alone: the first layer's keys have no graph. The last layer's end: none has one."""
    for name, p in model.named_parameters():
        p.requires_grad_(part in name)
    _, (shared,) = one_update(model, make_groups())
    monkeypatch.setattr(grpo, "shared_prefix", lambda *_: contextlib.nullcontext())
    assert near(shared, one_update(model, make_groups())[1][0])


def test_minibatches_and_epochs_are_optimiser_steps_of_which_only_later_ones_clip(model):
    import torch

    stats, steps = one_update(model, make_groups(), minibatches=2, epochs=3)
    assert len(steps) == 6 and stats["clip_fraction"] == 0  # where the optimiser moves nothing
    _, (first,) = one_update(model, make_groups()[:1])
    assert near(steps[0], first)  # its own token count, as a step of its own
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    config = Config(minibatches=2, epochs=2)
    assert grpo.update(model, optimizer, make_groups(), 0.8, config, Team()) == {}  # no advantages
    groups = make_groups()
    grpo.set_advantages(groups, config)
    assert grpo.update(model, optimizer, groups, 0.8, config, Team())["clip_fraction"] > 0.05


def test_flat_groups_are_left_out_and_still_counted(model):
    import torch

    groups = make_groups()
    for trace in groups[1]:
        give(trace, 0.0, 3.0)
    _, (found,) = one_update(model, groups, scale_rewards="none")
    _, (alone,) = one_update(model, groups[:1], scale_rewards="none")
    tokens = [sum(trace.sampled for trace in group) for group in groups]
    assert torch.allclose(found, alone * tokens[0] / sum(tokens), atol=1e-6)
    for trace in groups[0]:
        give(trace, 0.0, 3.0)
    assert one_update(model, groups) == ({}, [])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_dropout(tiny_folder, tmp_path, checkpointing):
    """The base model's own too: the policy that is trained must be the one that sampled."""
    import torch
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(tiny_folder, attention_dropout=0.5)
    base.save_pretrained(tmp_path)
    model = tiny_model(tmp_path, gradient_checkpointing=checkpointing)
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_models_that_would_be_computed_wrongly_are_refused(tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM

    GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)).save_pretrained(tmp_path / "g")
    with pytest.raises(UserError, match="logits_scaling changes logits"):
        tiny_model(tmp_path / "g")


def test_merge_writes_a_plain_model(tiny_folder, tmp_path):
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.save_pretrained(tiny_folder)
    model = tiny_model(tiny_folder, model=str(tiny_folder))
    save_adapter(model, tmp_path / "last")
    grpo.merge(tmp_path)
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), torch.arange(30)[None]
    assert (merged(ids).logits - model(ids).logits).abs().max() < 1e-4


# ---- The loop, with a scripted rollout
class ScriptedAgent:
    """Traces drawn from the seed of the step, problem, sample and the adapter that was synced."""

    tokenizer = Mock(decode=str)

    def __init__(self, flags):
        self.flags, self.asked = flags, []
        self.lora = Mock(lora_int_id=1, lora_path=flags.lora)
        self.engine = Mock()

    def rollout(self, jobs):
        from safetensors.torch import load_file

        weights = load_file(Path(self.lora.lora_path) / "adapter_model.safetensors")
        total = sum(w.double().abs().sum().item() for w in weights.values())
        mark = 0 if "NO_MARK" in os.environ else round(total, 3)
        for problem, sample in jobs:
            self.asked.append(problem.id)
            seed = f"{self.flags.seed}/{self.flags.temperature:.6f}/{problem.id}/{sample}/{mark}"
            rng = random.Random(seed)
            prompt = [1, 2, 3, 4, 5 + len(problem.question) % 50]
            trace = make_trace(rng, prompt, rng.randint(4, 12), inserted=(2,), sample=sample)
            trace.problem = problem
            answer = problem.answer if rng.random() < 0.5 else "-1"
            trace.texts = [f"\\boxed{{{answer}}}"]
            trace.calls = [("print(1)", Result("ok", "1", 0.0))] if rng.random() < 0.5 else []
            time.sleep(float(os.environ.get("SLOWLY", 0)))
            yield trace


@contextlib.contextmanager
def scripted(agents=None):
    """grpo.py with ScriptedAgent in the engine's place."""

    @contextlib.contextmanager
    def open_agent(flags, *_):
        agent = ScriptedAgent(flags)
        if agents is not None:
            agents.append(agent)
        yield agent

    modules = {name: Mock() for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    modules["vllm.lora.request"].LoRARequest = lambda name, number, path: Mock(
        lora_int_id=number, lora_path=path
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "open_agent", open_agent)
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def run(out, *flags, agents=None):
    """grpo.py's main() on the scripted engine; its return value."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        with scripted(agents), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["grpo.py", "--out", str(out), *flags])
            return grpo.main()
    finally:
        signal.signal(signal.SIGINT, handler)


def usual(tiny_folder, *more):
    flags = "--preset mini --steps 7 --problems 3 --group 4 --max-tokens 20 --limit 20 --lr 0.01"
    flags += " --lora-rank 4 --lr-schedule cosine --eval-every 3 --eval-problems 5"
    return ["--model", str(tiny_folder), *flags.split(), *more]


def rows(path):
    """The last row of each step, without what differs from run to run."""
    found = {}
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found[row["step"]] = {k: v for k, v in row.items() if not k.startswith("seconds")}
    return [found[step] for step in sorted(found)]


def assert_same_run(a, b):
    for name in ("metrics.jsonl", "eval.jsonl"):
        first, second = rows(a / name), rows(b / name)
        assert len(first) == len(second)
        for x, y in zip(first, second):
            assert x.keys() == y.keys()
            assert all(x[k] == pytest.approx(y[k], rel=1e-4, abs=1e-7) for k in x), (x, y)


@pytest.fixture(scope="session")
def unbroken(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(out, *usual(tiny_folder)) == 0
    return out


def test_a_run_leaves_what_it_promises(unbroken):
    assert [row["step"] for row in rows(unbroken / "metrics.jsonl")] == [*range(1, 8)]
    named = "reward accuracy code length truncated loss grad_norm logprob_gap entropy lr kl"
    assert set(named.split()) <= set(rows(unbroken / "metrics.jsonl")[0])
    held = rows(unbroken / "eval.jsonl")
    assert [row["step"] for row in held] == [0, 3, 6, 7]
    assert all(row["eval_low"] <= row["eval"] <= row["eval_high"] for row in held)
    groups = rows(unbroken / "groups.jsonl")
    assert len(groups) == 7
    for trace in groups[0]["traces"]:
        assert len(trace["tokens"]) == len(trace["mask"]) == len(trace["logprobs"])
        assert not trace["advantage"] or len(trace["old_logprobs"]) == sum(trace["mask"])
    assert json.loads((unbroken / "config.json").read_text())["flags"]["problems"] == 3
    for folder in ("adapter", "last"):
        assert adapter_config(str(unbroken / folder))["r"] == 4


def test_the_best_adapter_is_kept_and_held_out_problems_are_never_trained_on(
    tiny_folder, tmp_path, monkeypatch
):
    agents, update = [], grpo.update

    def checked(model, optimizer, groups, temperature, *rest):
        f = agents[0].flags  # logits are divided by what sampled, from the whole distribution
        assert (temperature, 1, 0) == (f.temperature, f.top_p, f.top_k)
        assert all(len({trace.problem.id for trace in group}) == 1 for group in groups)
        return update(model, optimizer, groups, temperature, *rest)

    monkeypatch.setattr(grpo, "update", checked)
    saved, save = [], grpo.save_adapter

    def noted(model, folder):
        save(model, folder)
        if folder.name == "adapter" and folder.parent == out:
            saved.append(len(rows(log)) if log.exists() else 0)  # before its row is written

    out, log = tmp_path / "run", tmp_path / "run" / "eval.jsonl"
    monkeypatch.setattr(grpo, "save_adapter", noted)
    assert run(out, *usual(tiny_folder, "--steps", "6"), agents=agents) == 0
    held = [row["eval"] for row in rows(log)]
    best = [i for i in range(3) if i == 0 or held[i] > max(held[:i])]
    assert len(held) == 3 and saved == best
    asked = agents[0].asked
    evaluated = set(asked[: 5 * 4])  # before the first step
    assert [asked.count(problem) for problem in evaluated] == [3 * 4] * 5  # 0, 3, 6 steps, no more


@pytest.mark.parametrize("during", ["metrics.jsonl", "eval.jsonl"])
def test_ctrl_c_loses_nothing(during, unbroken, tiny_folder, tmp_path, monkeypatch):
    out, write = tmp_path / "run", grpo.write_log

    def interrupted(path, row):
        write(path, row)
        if path.name == during and row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(grpo, "write_log", interrupted)
    assert run(out, *usual(tiny_folder)) == 130
    monkeypatch.undo()
    done = 3 + (during == "eval.jsonl")  # in an evaluation: after one more step
    assert len(rows(out / "metrics.jsonl")) == done
    assert engine.load_checkpoint(out / "checkpoint.pt")["step"] == done
    assert run(out, "--resume") == 0
    assert_same_run(out, unbroken)
    assert run(out, "--resume", "--steps", "3") == 0  # it has more already


def launch(out, *flags):
    command = [sys.executable, __file__, "--out", str(out), *flags]
    return subprocess.Popen(command, env=APART, stdout=DEVNULL, stderr=DEVNULL)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_then_resume_gives_the_unbroken_run(kills, unbroken, tiny_folder, tmp_path):
    out, rng = tmp_path / "run", random.Random(kills)
    flags = usual(tiny_folder)
    for _ in range(kills):
        process = launch(out, *flags)
        while kills == 1 and not (out / "checkpoint.pt").exists():
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0 if kills == 1 else rng.uniform(3.5, 9))
        process.kill()
        process.wait()
        flags = ["--resume"] if (out / "config.json").exists() else usual(tiny_folder)
    assert launch(out, *flags).wait() == 0
    assert_same_run(out, unbroken)


def test_what_cannot_work_is_refused(tiny_folder, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="no run"):
        run(out, "--resume")
    with pytest.raises(UserError, match="tensor-parallel"):
        run(out, "--tensor-parallel", "2")
    assert run(out, *usual(tiny_folder, "--steps", "2", "--seed", "-1")) == 0
    assert json.loads((out / "config.json").read_text())["flags"]["seed"] >= 0  # drawn, and kept
    with pytest.raises(UserError, match="not empty"):
        run(out, *usual(tiny_folder))
    before = sorted(path.name for path in out.rglob("*"))
    os.truncate(out / "checkpoint.pt", 500)
    with pytest.raises(UserError, match="damaged"):
        run(out, "--resume", "--steps", "4")
    assert sorted(path.name for path in out.rglob("*")) == before  # nothing begins anew


@pytest.mark.parametrize("name, split", [("gsm8k", "train"), ("svamp", "train"), ("amc23", "test")])
def test_a_set_is_trained_on_by_its_training_split(name, split, monkeypatch):
    read = Mock(return_value=[{"question": "1 + 1?", "answer": "2"}])
    monkeypatch.setattr(data, "read_rows", read)
    grpo.load_sets(Config(dataset=name, problems=1, eval_every=0))
    assert read.call_args.args[1] == split


def test_steps_without_a_gradient_and_gaps_are_reported(tiny_folder, tmp_path, capsys, monkeypatch):
    flags = usual(tiny_folder, "--steps", "1", "--eval-every", "0")
    assert run(tmp_path / "flat", *flags, "--reward-weights", "accuracy=0") == 0
    assert "no gradient in" in capsys.readouterr().out
    for cuda, gap, warned in ((True, 0.05, 0), (True, 0.2, 1), (False, 0.05, 1)):
        monkeypatch.setattr(grpo, "has_cuda", lambda cuda=cuda: cuda)  # bfloat16 explains more
        grpo.report_step({"step": 1, "loss": 0.1, "logprob_gap": gap}, 2)
        assert capsys.readouterr().out.count("engine and trainer disagree") == warned


@pytest.mark.slow
def test_two_ranks_give_the_run_of_one_and_one_goes_on(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_MARK", "1")  # sums round differently: traces must not depend on it
    flags = usual(tiny_folder, "--kl-beta", "0.1", "--epochs", "2", "--steps", "4")
    flags += ["--lr-schedule", "constant"]
    assert run(tmp_path / "one", *flags) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [__file__, "--out", str(tmp_path / "two"), *flags, "--steps", "2"]
    there = APART | {"NO_MARK": "1"}
    done = subprocess.run(command, env=there, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert run(tmp_path / "two", "--resume", "--steps", "4") == 0
    for name in ("metrics.jsonl", "eval.jsonl"):
        pairs = {row["step"]: row for row in rows(tmp_path / "one" / name)}
        for row in rows(tmp_path / "two" / name):
            other = pairs.get(row["step"], row)  # evaluated at the end, which was step 2 first
            for key in {"reward", "accuracy", "length", "eval", "loss", "kl"} & row.keys():
                assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), (name, key)


def test_presets_are_what_was_published():
    paper, zero = grpo.PRESETS["paper"], grpo.PRESETS["zero"]
    assert (paper.problems, paper.group, paper.max_tokens, paper.kl_beta) == (4, 4, 5000, 0.04)
    assert (zero.problems, zero.group, zero.minibatches, zero.epsilon_high) == (512, 16, 16, 0.28)
    assert not zero.agent and paper.agent and grpo.PRESETS.keys() == {"mini", "paper", "zero"}


if __name__ == "__main__":  # a rank of a scripted training, see `launch`
    with scripted():
        cli.run_main(grpo.main)
