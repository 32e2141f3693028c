"""What is measured; every function yields rows in the first process and nothing in the others."""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.scale.group import Machine, communication_shares, exchanges, kernels, quantiles, time_together
from tnl.models import TnlConfig
from tnl.ops import lightning_attention
from tnl.ops.context_parallel import lightning_attention_context_parallel
from tnl.slopes import log_decay
from tnl.training import parallel
from tnl.training.config import DataSettings, OptimizerSettings, ParallelSettings, PlanSettings
from tnl.training.data import prepare_corpus
from tnl.training.flops import flops_per_token, matrix_parameters, peak_flops
from tnl.training.loop import make_optimizer
from tnl.training.parallel import Ranks
from tnl.training.plan import estimate, measure
from tnl.training.rows import PackedRows, RowSampler, make_loader
from tnl.training.tokenizer import TextEncoder, byte_tokenizer

Row = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """One measurement of training steps; ``context`` GPUs share each of ``rows`` rows, 0: all of them do."""

    model: str
    tokens: int
    rows: int = 1
    context: int = 1
    recompute: bool = False
    compile: bool = True
    steps: int = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of all cases."""

    lengths: tuple[int, ...]
    heads: int
    width: int
    training: tuple[Training, ...]
    models: tuple[Training, ...]
    context: tuple[Training, ...]
    mesh: tuple[Training, ...]
    overrides: dict[str, Any]
    runs: int


FULL = Sizes(
    lengths=(1 << 18, 1 << 20, 1 << 22),
    heads=16,
    width=128,
    training=(Training("385m", 8192, 4), Training("1b", 8192, 2)),
    models=(
        Training("7b", 32768, recompute=True, steps=3),
        Training("7b", 2048, 16, recompute=True, steps=3),
        Training("3b", 32768, recompute=True, steps=3),
        Training("3b", 2048, 16, recompute=True, steps=3),
        Training("1b", 32768),
        Training("1b", 2048, 16),
    ),
    context=(
        Training("1b", 1 << 20, context=0, recompute=True, steps=2),
        Training("1b", 1 << 18, context=0, recompute=True, steps=3),
    ),
    mesh=(Training("1b", 1 << 18, context=2, recompute=True, steps=3),),
    overrides={},
    runs=10,
)
TINY = Sizes(
    lengths=(64, 128),
    heads=2,
    width=16,
    training=(Training("tiny", 64, 2, compile=False),),
    models=(Training("tiny", 64, 2, recompute=True, compile=False),),
    context=(Training("tiny", 128, context=0, recompute=True, compile=False),),
    mesh=(Training("tiny", 128, context=2, recompute=True, compile=False),),
    overrides={"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2},
    runs=2,
)


def operator(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """Forward and backward of one sequence over 1, 2, 4, ... GPUs.

    The decays a head are those of a TNL's middle layer, which leave nothing of a token 60,000 tokens on, and those of
    its last layer, which forget nothing; those a token are random ones of at most the middle layer's.
    """
    dtype = torch.bfloat16 if machine.device.type == "cuda" else torch.float32
    layers = log_decay("released", 16, sizes.heads, machine.device)
    decays = {"head": layers[8], "head, last layer": layers[15], "token": layers[8]}
    for tokens in sizes.lengths:
        alone: dict[str, float] = {}
        for count in machine.counts():
            ranks = machine.first(count)
            for kind in decays if tokens == sizes.lengths[0] else list(decays)[:2]:
                results: list[Row] = []
                if ranks is not None and tokens % count == 0:
                    try:
                        results = _time_operator(machine, ranks, tokens, decays[kind], kind, sizes, dtype)
                    except torch.OutOfMemoryError:
                        results = [{"pass": "forward and backward", "error": "out of memory"}]
                    _free(machine)
                for row in results:
                    if count == 1 and "ms" in row:
                        alone[f"{kind} {row['pass']}"] = row["ms"]
                    if f"{kind} {row['pass']}" in alone:
                        row["speedup"] = alone[f"{kind} {row['pass']}"] / row["ms"]
                    if machine.rank == 0:
                        yield {"case": "operator", "gpus": count, "T": tokens, "decay": kind} | row
                machine.wait()


def _time_operator(
    machine: Machine, ranks: Ranks, tokens: int, decay: Tensor, kind: str, sizes: Sizes, dtype: torch.dtype
) -> list[Row]:
    """Both passes, and the same number of tokens without any exchange.

    Short ones several times in a row, as layers follow one another, so that what the host does shows only if it is
    slower than the GPU.
    """
    calls = max(1, min(8, (1 << 23) // tokens))
    shape = (1, tokens // ranks.size, sizes.heads, sizes.width)
    q, k, v, do = (torch.randn(shape, device=machine.device, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    rate = decay if kind != "token" else (decay * torch.rand(shape[:-1], device=machine.device)).requires_grad_()
    if kind == "token":
        leaves.append(rate)
    group = None if ranks.mesh is None else ranks.mesh.get_group()
    shared = partial(lightning_attention_context_parallel, group=group) if group is not None else lightning_attention
    rows = []
    for name, call in (("", shared), (", own tokens alone", lightning_attention)):
        if name and ranks.mesh is None:
            continue
        with torch.no_grad():
            forward = time_together(machine, ranks, partial(call, q, k, v, rate), sizes.runs, 3, calls)

        def both(call: Callable[..., Any] = call) -> None:
            torch.autograd.grad(call(q, k, v, rate)[0], leaves, do)

        both_ways = time_together(machine, ranks, both, sizes.runs, 3, calls)
        about = {"heads": sizes.heads, "D": sizes.width, "dtype": str(dtype).removeprefix("torch."), "calls": calls}
        rows += [{"pass": f"forward{name}"} | about | quantiles(forward)]
        rows += [{"pass": f"forward and backward{name}"} | about | quantiles(both_ways)]
        if not name and group is not None and machine.device.type == "cuda":
            shares = communication_shares(both)
            rows[-1] |= dict(zip(("communication_share", "waiting_share"), shares, strict=True))
    return rows


def exchange(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """How long the exchanges of the operator over all GPUs take, and in which share of that something else runs.

    Medians over calls in a row, on each GPU. One that waits for a slower GPU takes longer.
    """
    for tokens in sizes.lengths[:2]:
        for kind, ranks, seen in _profile_operator(machine, sizes, tokens):
            found = exchanges(seen)
            assert len(found) == 2 * PROFILED, f"{len(found)} exchanges in {PROFILED} calls"
            for i, name in enumerate(("forward", "backward")):
                durations, shares = zip(*found[i + 2 :: 2], strict=True)  # but for those of the first call
                row = {"us": statistics.median(durations), "hidden_share": statistics.median(shares)}
                for gpu, values in enumerate(machine.gather(row)):
                    if machine.rank == 0:
                        about = {"case": "exchange", "gpus": ranks.size, "T": tokens, "decay": kind, "pass": name}
                        yield about | {"gpu": gpu} | values


def timeline(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """What the first GPU does from one backward pass of the operator over all GPUs to the next, kernel by kernel."""
    tokens = sizes.lengths[min(1, len(sizes.lengths) - 1)]
    for kind, ranks, seen in _profile_operator(machine, sizes, tokens):
        ends = [i for i, event in enumerate(seen) if "_backward_kernel" in event[0]][2:4]
        for name, stream, begin, duration in seen[ends[0] + 1 : ends[1] + 1] if machine.rank == 0 else []:
            about = {"case": "timeline", "gpus": ranks.size, "T": tokens, "decay": kind}
            yield about | {"begin_us": begin - seen[ends[0]][2], "us": duration, "stream": stream, "kernel": name[:60]}


PROFILED = 6  # calls


def _profile_operator(machine: Machine, sizes: Sizes, tokens: int) -> Iterator[tuple[str, Ranks, list[Any]]]:
    """Decay, processes and kernels of calls of the operator in a row, both passes, over all GPUs."""
    ranks = machine.first(machine.size)
    if machine.device.type != "cuda" or ranks is None or ranks.mesh is None:
        return
    shape = (1, tokens // ranks.size, sizes.heads, sizes.width)
    q, k, v, do = (torch.randn(shape, device=machine.device, dtype=torch.bfloat16) for _ in range(4))
    leaves, group = [x.requires_grad_() for x in (q, k, v)], ranks.mesh.get_group()
    for kind, layer in (("head", 8), ("head, last layer", 15)):
        rate = log_decay("released", 16, sizes.heads, machine.device)[layer]

        def calls(rate: Tensor = rate) -> None:
            for _ in range(PROFILED):
                o, _ = lightning_attention_context_parallel(q, k, v, rate, group=group)
                torch.autograd.grad(o, leaves, do)

        calls()
        ranks.wait()
        machine.synchronize()
        yield kind, ranks, kernels(calls)
    _free(machine)


def _free(machine: Machine) -> None:
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()


def _train_all(name: str, machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """Each case over 1, 2, 4, ... GPUs; rows that some of them share over all."""
    for case in getattr(sizes, name):
        alone: Row = {}
        for count in machine.counts() if case.context < 2 else [machine.size]:
            row = _try(machine, machine.first(count, case.context or count), case, sizes)
            machine.wait()
            if row is not None and machine.rank == 0:
                alone = row if count == 1 and "ms" in row else alone
                yield _describe(name, row, alone, case, sizes, count)


def models(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """Models of 1B to 7B with FSDP2: on one GPU, each GPU measuring some of the cases, then each on all together."""
    results: dict[int, Row] = {}
    for i in range(machine.rank, len(sizes.models), machine.size):
        results[i] = _try(machine, Ranks(0, 1, machine.device, None), sizes.models[i], sizes) or {}
    gathered = machine.gather(results)
    alone = {i: row for part in gathered for i, row in part.items()}
    if machine.rank == 0:
        for i, case in enumerate(sizes.models):
            yield _describe("models", alone[i], alone[i], case, sizes, 1)
    for i, case in enumerate(sizes.models if machine.size > 1 else ()):
        row = _try(machine, machine.first(machine.size), case, sizes)
        machine.wait()
        if row is not None and machine.rank == 0:
            yield _describe("models", row, alone[i], case, sizes, machine.size)


def _try(machine: Machine, ranks: Ranks | None, case: Training, sizes: Sizes) -> Row | None:
    """A row, None in processes that take no part."""
    if ranks is None:
        return None
    if machine.device.type == "cuda":
        planned = _plan(case, sizes, ranks.size, 0.0)["memory"]["total"]
        if planned > 1.1 * torch.cuda.get_device_properties(machine.device).total_memory:
            return {"error": f"not tried, {planned / 2**30:.0f} GiB planned"}
    try:
        return _train(machine, ranks, case, sizes)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        torch._dynamo.reset()
        _free(machine)


def _describe(name: str, row: Row, alone: Row, case: Training, sizes: Sizes, count: int) -> Row:
    """A row beside one GPU, where that was measured, and what `tnl plan` says when it knows the rate of one."""
    parts = case.context or count
    about = {"case": name, "gpus": count, "model": case.model, "T": case.tokens, "rows": case.rows, "context": parts}
    about |= {"recompute": case.recompute, "compile": case.compile}
    if "ms" not in row:
        return about | row
    if "ms" in alone:
        row = row | {"speedup": row["tokens_per_second"] / alone["tokens_per_second"]}
    if "hardware_flops_use" in row:
        planned = _plan(case, sizes, count, (alone if "ms" in alone else row)["hardware_flops_use"])
        row = row | {
            "planned_gib": planned["memory"]["total"] / 2**30,
            "planned_tokens_per_second": planned["tokens_per_second"],
        }
    return about | row


def _plan(case: Training, sizes: Sizes, count: int, use: float) -> Row:
    """What `tnl plan` says of a case."""
    config = TnlConfig.from_preset(case.model, **sizes.overrides)
    settings = PlanSettings(
        case.model, [count], sequence_length=case.tokens, micro_batch_size=case.rows,
        gpu="H200" if "H200" in torch.cuda.get_device_name() else "H100",
        context=case.context or count, activation_checkpointing=case.recompute,
    )  # fmt: skip
    return estimate(settings, config, measure(config), count, use or 1.0)


def _train(machine: Machine, ranks: Ranks, case: Training, sizes: Sizes) -> Row:
    """Steps of AdamW on random tokens, laid out as `tnl train` does."""
    config = TnlConfig.from_preset(case.model, **sizes.overrides)
    torch.manual_seed(0)
    with torch.device(machine.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    parameters, matrices = sum(p.numel() for p in model.parameters()), matrix_parameters(model)
    precision = "bfloat16" if machine.device.type == "cuda" else "float32"
    settings = ParallelSettings(precision, case.compile, case.recompute)  # type: ignore[arg-type]
    parallel.lay_out(model, settings, ranks)
    optimizer = make_optimizer(model, OptimizerSettings())
    index, parts = ranks.context
    here = case.tokens // parts
    tokens = torch.randint(0, config.vocab_size, (case.rows, here + 1), device=machine.device)
    inputs = {"input_ids": tokens[:, :-1], "shift_labels": tokens[:, 1:]}
    inputs["position_ids"] = torch.arange(index * here, (index + 1) * here, device=machine.device)[None]
    step_tokens = case.rows * here * ranks.size

    def step() -> None:
        with parallel.autocast(settings, ranks):
            loss = model(**inputs, num_items_in_batch=torch.tensor(step_tokens, device=machine.device), use_cache=False)
        (loss.loss * ranks.size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = time_together(machine, ranks, step, case.steps, 1 if case.steps < 4 else 2)
    rate = 1e3 * step_tokens / quantiles(seconds)["ms"]
    row: Row = {"parameters": parameters, "tokens_per_second": rate} | quantiles(seconds)
    flops = flops_per_token(matrices, config, case.tokens) * rate / ranks.size
    row["model_tflops"] = flops / 1e12
    if machine.device.type == "cuda":
        row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["communication_share"], row["waiting_share"] = communication_shares(step)
        peak = peak_flops(torch.cuda.get_device_name())
        if peak is not None:
            row["model_flops_use"] = flops / peak
            row["hardware_flops_use"] = flops / peak * (4 / 3 if case.recompute else 1.0)
    return row


def feeding(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """Time to feed a process, rows of short documents; as a share of a step at 200,000 tokens a second."""
    if machine.rank:
        return
    with tempfile.TemporaryDirectory() as folder:
        generator = torch.Generator().manual_seed(0)
        lengths = (torch.empty(20000).exponential_(1 / 700, generator=generator) + 1).int().tolist()
        source = Path(folder) / "documents.jsonl"
        source.write_text("\n".join(json.dumps({"text": "x" * n}) for n in lengths))
        encoder = TextEncoder(byte_tokenizer())
        store = prepare_corpus(DataSettings(str(source)), encoder, Path(folder) / "data", 0).train
        for tokens in (2048, 8192, 1 << 17):
            for workers in (0, 2):
                rows = max(1, 32768 // tokens)
                loader = make_loader(PackedRows(store, tokens, seed=0), RowSampler(rows, 0, 1), workers)
                batches = iter(loader)
                next(batches)
                seconds = []
                for _ in range(4 * sizes.runs):
                    if workers:
                        time.sleep(rows * tokens / 200_000)  # the step, during which the workers read on
                    begin = time.perf_counter()
                    next(batches)
                    seconds.append(time.perf_counter() - begin)
                share = quantiles(seconds)["ms"] / 1e3 / (rows * tokens / 200_000)
                yield {"case": "feeding", "T": tokens, "rows": rows, "workers": workers} | quantiles(seconds) | {
                    "share_of_step": share
                }  # fmt: skip


CASES: dict[str, Callable[[Machine, Sizes], Iterator[Row]]] = {
    "operator": operator,
    "exchange": exchange,
    "timeline": timeline,
    "training": partial(_train_all, "training"),  # FSDP2, each GPU has rows of its own
    "models": models,
    "context": partial(_train_all, "context"),  # one row over all GPUs, FSDP2 and context parallel together
    "mesh": partial(_train_all, "mesh"),  # rows over pairs of GPUs
    "feeding": feeding,
}
