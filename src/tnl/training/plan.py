"""What a training run will take: parameters, memory by part, communication, tokens a second, time for a token budget.

Arithmetic over the layout that `tnl train` uses (FSDP2 over all GPUs but those that divide a layer, bfloat16 products,
float32 parameters and AdamW), with one measured or given rate, the share of the peak that one GPU reaches. The page
docs/planning.md says what is assumed.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM

from tnl.models import PRESETS, TnlConfig
from tnl.ops.linear_cross_entropy import LOGITS_PER_CHUNK
from tnl.training.config import PlanSettings, require
from tnl.training.flops import PEAK_FLOPS, flops_per_token, matrix_parameters
from tnl.training.parallel import blocks_of

GIB = 2**30
ASSUMED_FLOPS_USE = 0.45
TOKENS_PER_PARAMETER = 20
OTHER_BYTES = 0.7 * GIB  # workspaces, communication buffers
BACKWARD = 1.3  # memory of a block that is computed again, with the gradients within it, over what it keeps (H200)


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes; bytes a second that one GPU receives from its node, and from other nodes, in collectives."""

    memory: float
    fast: float
    slow: float


# Data sheets: NVLink in one direction, and one network card of 400 (A100: 200) Gbit/s a GPU; 80 % of either.
GPUS = {
    "H100": Gpu(80e9, 0.8 * 450e9, 0.8 * 50e9),
    "H200": Gpu(141e9, 0.8 * 450e9, 0.8 * 50e9),
    "A100": Gpu(80e9, 0.8 * 300e9, 0.8 * 25e9),
}


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: all, those of the largest block, those outside of blocks, those of matrices."""

    parameters: int
    block: int
    root: int
    matrices: int


def measure(config: TnlConfig) -> Sizes:
    """Count parameters without allocating any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    parameters = sum(p.numel() for p in model.parameters())
    return Sizes(parameters, max(blocks), parameters - sum(blocks), matrix_parameters(model))


def memory(settings: PlanSettings, config: TnlConfig, sizes: Sizes, gpus: int) -> tuple[str, dict[str, float]]:
    """The moment of a step that takes the most memory, and the bytes on one GPU then, by part."""
    shards = gpus // settings.tensor
    own = sizes.parameters / settings.tensor / shards
    block, root = sizes.block / settings.tensor, sizes.root / settings.tensor
    # While a block is computed, its bfloat16 weights and those of the next are whole, and those outside of blocks. A
    # process alone has what autocast made of a block's weights, or of all that the backward pass will read again.
    gathered = 2 * (2 * block + root)
    if shards == 1:
        gathered = 2 * (2 * block if settings.activation_checkpointing else sizes.matrices / settings.tensor)
    kept, one_block = _activations(settings, config)
    backward = BACKWARD * one_block if settings.activation_checkpointing else 0.0
    tokens = settings.micro_batch_size * settings.sequence_length / settings.context
    # The gradient of the head, half of what is outside of blocks, in bfloat16 before it is summed up (alone: float32);
    # those of a block before they are summed up, and in float32 while they are.
    head = root if shards > 1 else 2 * root
    block_gradients = 6 * block if shards > 1 else 0.0
    always = {"parameters": 4 * own, "optimiser": 8 * own, "gathered weights": gathered}
    moments = {
        "the loss": {
            "gradients": 0.0,
            "gathered gradients": head,
            "activations": kept,
            "logits": 2 * min(LOGITS_PER_CHUNK["cuda"], tokens * config.vocab_size),
        },
        "the last block's backward pass": {
            "gradients": 0.0,
            "gathered gradients": head + block_gradients,
            "activations": kept + backward,
            "logits": 0.0,
        },
        "the first block's backward pass": {
            "gradients": 4 * own,
            "gathered gradients": block_gradients + (head if shards > 1 else 0.0),
            "activations": BACKWARD * one_block,
            "logits": 0.0,
        },
    }
    sums = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(sums, key=lambda name: sums[name])
    return moment, always | moments[moment] | {"other": OTHER_BYTES}


def _activations(settings: PlanSettings, config: TnlConfig) -> tuple[float, float]:
    """Bytes that a forward pass keeps for the backward pass, and those of one block in full."""
    tokens = settings.micro_batch_size * settings.sequence_length / settings.context
    width, inner = config.hidden_size, config.intermediate_size / settings.tensor
    heads = config.num_attention_heads * (config.head_dim or 0) / settings.tensor
    # In 2 bytes: inputs of norms and projections, q k v u before and behind the activation, output of the attention and
    # of its norm; both factors of the GLU and their product.
    block = 2 * tokens * (4 * width + 8 * heads + 3 * inner)
    layers = config.num_hidden_layers
    if settings.activation_checkpointing:
        return layers * 2 * tokens * width, block
    # With LRPE: encoded queries and keys; of each position the angle, its cosine and sine in float32.
    places = settings.sequence_length / settings.context
    encoded = sum(config.uses_lrpe(layer) for layer in range(layers))
    return layers * block + encoded * (8 * tokens + 12 * places) * heads, block


def communication(settings: PlanSettings, config: TnlConfig, sizes: Sizes, gpus: int) -> dict[str, float]:
    """Bytes that one GPU receives in an optimiser step, by kind of parallelism."""
    shards = gpus // settings.tensor
    own = sizes.parameters / settings.tensor
    micro_batches = _micro_batches(settings, gpus)
    passes = 3 if settings.activation_checkpointing else 2  # that exchange something
    rows, layers = settings.micro_batch_size, config.num_hidden_layers
    states = sum(4 * math.prod(config.state_shape(layer)) / settings.tensor for layer in range(layers))
    stream = 2 * rows * settings.sequence_length / settings.context * config.hidden_size
    return {
        # weights for the forward and for the backward pass of each micro-batch, gradients once
        "FSDP": (shards - 1) / shards * (2 * 2 * own * micro_batches + 4 * own),
        "context": (settings.context - 1) * rows * states * passes * micro_batches,
        # an all-reduce is a reduction and a gather; two a layer and pass
        "tensor": 2 * (settings.tensor - 1) / settings.tensor * stream * 2 * layers * passes * micro_batches,
    }


def _micro_batches(settings: PlanSettings, gpus: int) -> int:
    groups = gpus // (settings.context * settings.tensor)
    at_once = groups * settings.micro_batch_size * settings.sequence_length
    return max(1, round(settings.batch_tokens / at_once)) if settings.batch_tokens else 1


def estimate(settings: PlanSettings, config: TnlConfig, sizes: Sizes, gpus: int, use: float) -> dict[str, Any]:
    """All that is known about a run on so many GPUs."""
    gpu = GPUS[settings.gpu]
    groups = gpus // (settings.context * settings.tensor)
    micro_batches = _micro_batches(settings, gpus)
    step_tokens = groups * settings.micro_batch_size * settings.sequence_length * micro_batches
    flops = flops_per_token(sizes.matrices, config, settings.sequence_length)
    peak = PEAK_FLOPS[settings.gpu]
    recomputed = 4 / 3 if settings.activation_checkpointing else 1.0
    compute = step_tokens * flops * recomputed / (gpus * peak * use)
    moment, parts = memory(settings, config, sizes, gpus)
    sent = communication(settings, config, sizes, gpus)
    within = {
        "FSDP": gpus <= settings.gpus_per_node,
        "context": settings.context * settings.tensor <= settings.gpus_per_node,
        "tensor": settings.tensor <= settings.gpus_per_node,
    }
    seconds = {name: size / (gpu.fast if within[name] else gpu.slow) for name, size in sent.items()}
    # FSDP2 gathers the next block while one is computed; the other two wait.
    step = max(compute, seconds["FSDP"]) + seconds["context"] + seconds["tensor"]
    rate = step_tokens / step
    budget = settings.tokens or TOKENS_PER_PARAMETER * sizes.parameters
    return {
        "gpus": gpus,
        "parameters": sizes.parameters,
        "memory": parts | {"total": sum(parts.values())},
        "most memory in": moment,
        "fits": sum(parts.values()) <= gpu.memory,
        "communication": sent,
        "seconds": seconds | {"compute": compute, "step": step},
        "step_tokens": step_tokens,
        "tokens_per_second": rate,
        "model_flops_use": rate * flops / (gpus * peak),
        "token_budget": budget,
        "days": budget / rate / 86400,
    }


def read_flops_use(path: Path, gpu: str, parameters: int) -> float:
    """Share of the peak that the model nearest in size reached on one such GPU, from a CSV of `benchmarks.scale`.

    Raises:
        ValueError: There is no such row.
    """
    with path.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r.get("hardware_flops_use") and r["gpus"] == "1"]
    rows = [row for row in rows if gpu in row["device"]]
    if not rows:
        raise ValueError(f"measured: expected rows of training on one {gpu} in {path}, found none")
    nearest = min(rows, key=lambda row: abs(math.log(float(row["parameters"]) / parameters)))
    return float(nearest["hardware_flops_use"])


def plan(settings: PlanSettings) -> None:
    """Print the plan.

    Raises:
        ValueError: An unknown model, or one that does not divide.
    """
    require("model", settings.model, settings.model in PRESETS, f"one of {', '.join(PRESETS)}")
    try:
        config = TnlConfig.from_preset(settings.model, **settings.overrides)
    except (TypeError, ValueError) as error:
        raise ValueError(f"overrides: {error}") from error
    heads = config.num_attention_heads
    require("tensor", settings.tensor, heads % settings.tensor == 0, f"a divisor of the {heads} heads")
    sizes = measure(config)
    use = settings.flops_use
    if not use and settings.measured is not None:
        use = read_flops_use(Path(settings.measured), settings.gpu, sizes.parameters)
    estimates = [estimate(settings, config, sizes, gpus, use or ASSUMED_FLOPS_USE) for gpus in settings.gpus]
    if settings.format == "json":
        print(json.dumps(estimates, indent=1))
        return
    rows = describe(estimates)
    if settings.format == "markdown":
        print("\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]))
        return
    table = Table(title=f"{settings.model}: {sizes.parameters / 1e9:,.2f}B parameters on {settings.gpu}")
    for place, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if place else "left")
    for row in rows[1:]:
        table.add_row(*(escape(text) for text in row))
    Console().print(table)


def describe(estimates: list[dict[str, Any]]) -> list[list[str]]:
    """The plan as a table of text, its head first, a column for each number of GPUs."""
    rows = [["GPUs", *(f"{e['gpus']:,}" for e in estimates)]]

    def add(name: str, values: list[str]) -> None:
        rows.append([name, *values])

    for part in estimates[0]["memory"]:
        add(f"{part} [GiB a GPU]", [f"{e['memory'][part] / GIB:,.1f}" for e in estimates])
    add("most memory in", [e["most memory in"] for e in estimates])
    add("fits", ["yes" if e["fits"] else "no" for e in estimates])
    for kind, size in estimates[0]["communication"].items():
        if any(e["communication"][kind] for e in estimates) or size:
            add(f"{kind} [GB received a step]", [f"{e['communication'][kind] / 1e9:,.2f}" for e in estimates])
            add(f"{kind} [s a step]", [f"{e['seconds'][kind]:.3f}" for e in estimates])
    add("compute [s a step]", [f"{e['seconds']['compute']:.3f}" for e in estimates])
    add("step [s]", [f"{e['seconds']['step']:.3f}" for e in estimates])
    add("tokens a step", [f"{e['step_tokens']:,}" for e in estimates])
    add("tokens/s", [f"{e['tokens_per_second']:,.0f}" for e in estimates])
    add("model FLOPs use", [f"{e['model_flops_use']:.1%}" for e in estimates])
    add(f"days for {estimates[0]['token_budget'] / 1e9:,.0f}B tokens", [f"{e['days']:,.1f}" for e in estimates])
    return rows
