"""Speed of training against the length of a sequence: tokens a second, peak memory, model FLOPs use; TNL and LLaMA.

The table of Lightning Attention-2 (arXiv 2401.04658, table 1). A step has the same number of tokens at every length
(a sequence longer than that is a step of its own); it is AdamW on random tokens, laid out as `tnl train` lays it out in
one process: parameters in float32, arithmetic in bfloat16, blocks compiled, the loss in chunks. What is computed again
in the backward pass is the least that fits the device's memory, the same rule for both models. `where` rows say where
the time of a step goes.
"""

import argparse
import csv
import os
import re
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as symbols
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from benchmarks import RESULTS
from benchmarks.language_modelling import measurements
from benchmarks.language_modelling.measurements import Clock, Measurements, Row, free_memory, peak_gib
from tnl.models import TnlConfig
from tnl.training import parallel
from tnl.training.config import OptimizerSettings, ParallelSettings
from tnl.training.flops import flops_per_token, matrix_parameters, peak_flops
from tnl.training.loop import make_optimizer
from tnl.training.parallel import Ranks

OUTPUT = RESULTS / "language_modelling" / "speed.csv"
KEYS = ("case", "model", "size", "T", "recompute", "part")
K = 1024


@dataclass(frozen=True)
class Case:
    """One measurement: a model at a length; `recompute` fixes what is computed again (None: the least that fits)."""

    model: str
    size: str
    tokens: int
    recompute: str | None = None
    profile: bool = False


def full_cases() -> Iterator[Case]:
    """The most telling first."""
    for tokens in (1, 32):
        yield Case("tnl", "385m", tokens * K)
    yield Case("llama", "385m", K)
    yield Case("tnl", "385m", 8 * K, profile=True)
    yield Case("tnl", "385m", 128 * K)
    for tokens in (32, 128):
        yield Case("llama", "385m", tokens * K)
    for tokens in (8, 1, 32, 128):
        yield Case("tnl", "1b", tokens * K, profile=tokens == 8)
    yield Case("tnl", "385m", 1024 * K)
    for tokens in (128, 32, 1):
        yield Case("llama", "1b", tokens * K)
    for model in ("tnl", "llama"):
        for tokens in (1, 32):
            yield Case(model, "3b", tokens * K)
    for model in ("tnl", "llama"):
        for tokens in (2, 4, 16, 64):
            yield Case(model, "385m", tokens * K)
    yield Case("llama", "385m", 8 * K, profile=True)
    for size in ("385m", "1b"):
        for tokens in (256, 512):
            yield Case("tnl", size, tokens * K)
    for model in ("tnl", "llama"):
        for tokens in (2, 4, 8, 16, 64):
            yield Case(model, "1b", tokens * K)
    yield Case("tnl", "385m", 8 * K, "nothing")


def tiny_cases() -> Iterator[Case]:
    yield Case("tnl", "tiny", 32, profile=True)
    yield Case("tnl", "tiny", 64, "cheap")
    yield Case("llama", "tiny", 32, profile=True)
    yield Case("tnl", "tiny", 512)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measurements.add_arguments(parser, OUTPUT)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="of model, size, length in tokens")
    parser.add_argument("--tokens", type=int, default=128 * K, help="tokens of a step")


def run(options: argparse.Namespace) -> None:
    if options.plot:
        plot(options.output, options.plot)
        return
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("error: there is no GPU; --tiny tries the cases out on a CPU")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch._dynamo.config.recompile_limit = 64  # lengths and sizes share a process, and what is compiled
    symbols.use_duck_shape = False  # a batch of 8 is not the number of heads
    table = Measurements(options, KEYS)
    with ExitStack() as stack:
        if torch.cuda.is_available():
            kinds, timings = attention_order()
            stack.enter_context(sdpa_kernel(kinds, set_priority=True))
            print(f"softmax attention: {timings}", flush=True)
        for case in tiny_cases() if options.tiny else full_cases():
            words = {case.model, case.size, str(case.tokens)}
            label = {"case": "training", "model": case.model, "size": case.size, "T": case.tokens, "part": "step"}
            label["recompute"] = case.recompute or "least"
            if set(options.only) <= words and table.wanted(label):
                for row in measure(case, 256 if options.tiny else options.tokens):
                    table.add(label | row)


def attention_order() -> tuple[list[SDPBackend], dict[str, float]]:
    """The implementations of softmax attention, that with the quickest forward and backward pass first."""
    q, k, v = (torch.randn(4, 8, 8192, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    timings = {}
    for kind in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def call() -> None:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(out.sum(), (q, k, v))

        try:
            with sdpa_kernel(kind):
                timings[kind] = min(Clock().milliseconds(call) for _ in range(4))
        except RuntimeError:  # not built in, or not for this device
            continue
    order = sorted(timings, key=lambda kind: timings[kind])
    return [*order, SDPBackend.EFFICIENT_ATTENTION], {kind.name: timings[kind] for kind in order}


# ---------------------------------------------------------------------------------------------------------- models


def configuration(model: str, size: str) -> PreTrainedConfig:
    """TNL by its preset, or a LLaMA of its width, depth, heads and vocabulary, of the same size within 1 %."""
    tnl = TnlConfig.from_preset(size)
    if model == "tnl":
        return tnl
    # TNL's attention has one matrix more, which LLaMA has in the feed-forward network.
    inner = tnl.intermediate_size + tnl.hidden_size / 3
    return LlamaConfig(
        vocab_size=tnl.vocab_size, hidden_size=tnl.hidden_size, num_hidden_layers=tnl.num_hidden_layers,
        num_attention_heads=tnl.num_attention_heads, intermediate_size=64 * round(inner / 64),
        max_position_embeddings=1 << 20, tie_word_embeddings=tnl.tie_word_embeddings,
    )  # fmt: skip


@dataclass(frozen=True)
class Level:
    """What is computed again in the backward pass.

    Attributes:
        name: `nothing`; `cheap`, norms, activations and products; `operator`, linear attention too.
        blocks: Blocks that are computed again as a whole.
        units: What a block keeps for the backward pass otherwise, in bytes over 2 x tokens x width.
    """

    name: str
    blocks: int
    units: float

    def __str__(self) -> str:
        return self.name if not self.blocks else f"{self.name}, {self.blocks} blocks"

    def configure(self, model: PreTrainedModel) -> None:
        """Apply it to a model and to what will be compiled from here on."""
        import torch._functorch.config as functorch

        flags = {
            "ban_recompute_materialized_backward": self.name == "nothing",
            "aggressive_recomputation": self.name == "operator",
        }
        if any(getattr(functorch, name) != value for name, value in flags.items()):
            torch._dynamo.reset()
            for name, value in flags.items():
                setattr(functorch, name, value)
        if self.blocks:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for block in parallel.blocks_of(model)[self.blocks :]:
                setattr(block, "gradient_checkpointing", False)  # noqa: B010


def levels(case: Case, config: PreTrainedConfig, most: int) -> Iterator[tuple[Level, int]]:
    """Levels and tokens of a micro-batch, at most so many, from the quickest to the leanest.

    First, nothing is computed again in micro-batches of 64K tokens or more; smaller ones leave the device waiting more
    often than it takes to compute cheap things again.
    """
    layers = config.num_hidden_layers
    nothing, cheap, operator = Level("nothing", 0, 18.0), Level("cheap", 0, 12.5), Level("operator", 0, 12.0)
    whole = [nothing, cheap, operator] if case.model == "tnl" else [nothing, cheap]
    tokens = max(case.tokens, most)
    for large in (tokens, tokens // 2):
        if large >= max(case.tokens, 64 * K):
            yield nothing, large
    while tokens >= max(case.tokens, 8 * K):
        yield from ((level, tokens) for level in whole)
        tokens //= 2
    for count in (layers // 4, layers // 2, layers):
        yield Level("cheap", count, cheap.units), max(case.tokens, min(most, 8 * K))


def fits(level: Level, config: PreTrainedConfig, parameters: int, tokens: int) -> bool:
    """Whether a micro-batch of so many tokens should fit the device, by an estimate that errs by a few percent."""
    if not torch.cuda.is_available():
        return True
    layers, unit = config.num_hidden_layers, 2 * tokens * config.hidden_size
    kept = (layers - level.blocks) * level.units * unit + level.blocks * unit
    once = (level.units + 8) * unit if level.blocks else 6 * unit
    head = 3e9 + 6 * config.vocab_size * config.hidden_size
    return 16 * parameters + kept + once + head < 0.95 * torch.cuda.get_device_properties(0).total_memory


# ------------------------------------------------------------------------------------------------------ measurement


@dataclass
class Step:
    """A training step on random tokens; `micro` rows of T tokens in one forward pass, `count` times."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    count: int
    ranks: Ranks
    settings: ParallelSettings

    def __call__(self) -> Tensor:
        tokens = self.inputs[:, 1:].numel() * self.count
        total = torch.zeros((), device=self.inputs.device)
        predicted = torch.full_like(total, tokens)
        for _ in range(self.count):
            with parallel.autocast(self.settings, self.ranks):
                loss = self.model(
                    self.inputs[:, :-1],
                    labels=self.inputs[:, 1:],
                    shift_labels=self.inputs[:, 1:],
                    num_items_in_batch=predicted,
                    use_cache=False,
                ).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def measure(case: Case, step_tokens: int) -> Iterator[Row]:
    """The row of a case, and where its time goes; tries leaner levels where memory does not suffice."""
    config = configuration(case.model, case.size)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    begin = time.perf_counter()
    for level, tokens in levels(case, config, step_tokens):
        if case.recompute not in (None, level.name) or not fits(level, config, parameters, tokens):
            continue
        try:
            rows = list(_measure(case, config, level, tokens // case.tokens, max(1, step_tokens // tokens)))
        except torch.OutOfMemoryError:
            free_memory()
            continue
        except Exception as error:  # the cases after it are measured all the same
            traceback.print_exc()
            rows = [{"error": f"{type(error).__name__}: {error}"[:200]}]
        rows[0]["measured_s"] = time.perf_counter() - begin
        yield from rows
        return
    yield {"parameters": parameters, "error": "out of memory"}


def _measure(case: Case, config: PreTrainedConfig, level: Level, rows: int, count: int) -> Iterator[Row]:
    free_memory()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    settings = ParallelSettings("bfloat16", compile=False)
    ranks = Ranks(0, 1, device, None)
    parallel.lay_out(model, settings, ranks)
    level.configure(model)
    if cuda:
        for module in (*parallel.blocks_of(model), model.base_model.norm):
            module.compile(dynamic=True)  # lengths share what is compiled
    tokens = torch.randint(0, config.vocab_size, (rows, case.tokens + 1), device=device)
    step = Step(model, make_optimizer(model, OptimizerSettings()), tokens, count, ranks, settings)
    clock = Clock()
    for _ in range(2):
        slow = clock.milliseconds(step) > 4e3
    times = [clock.milliseconds(step) for _ in range(2 if slow else 4)]
    median = statistics.median(times)
    rate = 1e3 * rows * case.tokens * count / median
    flops = flops_per_token(matrix_parameters(model), config, case.tokens)
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    row: Row = {
        "parameters": sum(p.numel() for p in model.parameters()), "step_tokens": rows * case.tokens * count,
        "micro_batch": f"{rows} x {case.tokens}", "computed_again": str(level), "ms": median, "ms_low": min(times),
        "ms_high": max(times), "tokens_per_second": rate, "memory_gib": peak_gib(), "model_tflops": flops * rate / 1e12,
    }  # fmt: skip
    yield row | ({"model_flops_use": flops * rate / peak} if peak else {})
    if case.profile:
        yield from where_time_goes(step)


# ------------------------------------------------------------------------------------------- where the time goes

PARTS = (  # the first that a kernel's name matches
    ("cross-entropy", r"cross_entropy|nll_loss|log_softmax"),
    ("softmax attention", r"flash|fmha|cudnn|sdpa|scaled_dot_product"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|addmm|aten::mm|splitKreduce"),
    ("norms and sums of the residual stream", r"rsqrt|_norm|triton_.*(add_div|_add_)"),
    (
        "activations, products and gates",
        r"triton_.*(sigmoid|silu|mul|cat|stack|cos|sin)|_join_kernel|_gated_product_kernel",
    ),
    ("linear attention", r"^_forward_kernel|^_backward_kernel"),
    ("optimiser and gradient norm", r"multi_tensor|FusedAdam|fused_adam|foreach|lpnorm"),
    ("embedding", r"embedding"),
)


def where_time_goes(step: Step) -> Iterator[Row]:
    """Device time of one step by kind of kernel, and the rest in which the device waits."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        whole = Clock().milliseconds(step)
    parts: dict[str, float] = defaultdict(float)
    kernels: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in profile.key_averages():
        spent = (event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total) / 1e3
        part = next((name for name, pattern in PARTS if re.search(pattern, event.key)), "other")
        parts[part] += spent
        kernels[part][event.key] += spent
    parts["waiting for the host"] = max(0.0, whole - sum(parts.values()))
    for name, spent in sorted(parts.items(), key=lambda item: -item[1]):
        largest = sorted(kernels[name].items(), key=lambda item: -item[1])[:6]
        names = "; ".join(f"{key[:60]} {ms:.1f}" for key, ms in largest)
        yield {"part": name, "ms": spent, "share": spent / whole, "kernels": names}


# -------------------------------------------------------------------------------------------------------- drawing


def plot(path: Path, output: Path) -> None:
    """Tokens a second and peak memory against the length, a line for each model and size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with path.open(newline="") as file:
        rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row["part"] == "step"]
    rows = [row for row in rows if row["tokens_per_second"] and row["recompute"] == "least"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    styles = {"tnl": "o-", "llama": "s--"}
    for number, size in enumerate(dict.fromkeys(row["size"] for row in rows)):
        for model, style in styles.items():
            chosen = sorted((int(row["T"]), row) for row in rows if (row["model"], row["size"]) == (model, size))
            if not chosen:
                continue
            for axis, column in zip(axes, ("tokens_per_second", "memory_gib"), strict=True):
                values = [float(row[column]) for _, row in chosen]
                label = f"{model} {size}"
                axis.plot([T for T, _ in chosen], values, style, color=f"C{number}", label=label)
    for axis, title in zip(axes, ("tokens a second", "peak memory, GiB"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="tokens in a sequence", title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, handlelength=3.5, loc="lower center", ncols=len(labels))
    figure.suptitle(f"training, {rows[0]['device']}, bfloat16")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(output, dpi=110)
