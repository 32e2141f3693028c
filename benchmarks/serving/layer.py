"""One layer on pooled states as a server calls it: packed prefill, pooled decode, and agreement with training.

Runs without vLLM. The floor of a call is the time in which the device copies as many bytes as it must move: queries,
keys, values and outputs once, each state read once and written once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.operator.__main__ import copy_bandwidth, machine, time_cpu, time_gpu, time_graph
from benchmarks.serving.results import Row
from tnl.ops import lightning_attention
from tnl.serving.pooled import PooledStep, attend

KEYS = ("case", "decodes", "prefills", "heads", "width", "parts", "dtype", "what", "device")


@dataclass(frozen=True)
class Sizes:
    """A step: number of decodes, lengths of its prefills; heads, their width, pools a layer (2 with LRPE)."""

    decodes: int
    prefills: tuple[int, ...]
    heads: int = 32
    width: int = 128
    parts: int = 1

    @property
    def tokens(self) -> int:
        return self.decodes + sum(self.prefills)


GPU_CASES = {
    "prefill": [
        Sizes(0, (8192,)),
        Sizes(0, (8192,) * 4),
        Sizes(0, (1024,) * 8),
        Sizes(0, (256,) * 32),
        Sizes(0, (128,) * 64),
        Sizes(0, (1, 7, 300, 2000, 17, 900, 64, 4903)),
        Sizes(0, (8192,), parts=2),
    ],
    "decode": [Sizes(n, ()) for n in (1, 16, 64, 256)] + [Sizes(64, (), parts=2), Sizes(64, (), heads=8)],
    "mixed": [Sizes(64, (2048,)), Sizes(255, (256,)), Sizes(32, (512, 512, 1000))],
}
CPU_CASES = {
    "prefill": [Sizes(0, (256,), heads=4, width=64), Sizes(0, (30,) * 8, heads=4, width=64)],
    "decode": [Sizes(8, (), heads=4, width=64)],
    "mixed": [Sizes(8, (200, 56), heads=4, width=64)],
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AGREEMENT_LENGTHS = (1, 7, 300, 1025, 3000)
CHUNK = 256  # tokens of a prefill in one step
ROWS = 512  # of a pool


def decay(heads: int, device: str) -> Tensor:
    return -torch.exp2(-8 * torch.arange(1, heads + 1, device=device) / heads)


def describe(sizes: Sizes, rows: Tensor, device: str) -> PooledStep:
    return PooledStep.of(
        rows[: sizes.decodes].int().to(device),
        rows[sizes.decodes : sizes.decodes + len(sizes.prefills)].to(device),
        torch.tensor(sizes.prefills, dtype=torch.int64),
    )


def step_call(sizes: Sizes, dtype: torch.dtype, device: str) -> tuple[Callable[[], Tensor], int]:
    """The step as a call, and the bytes that it must move."""
    keys, H, E = sizes.width * sizes.parts, sizes.heads, sizes.width
    query, key = (torch.randn(sizes.tokens, H, keys, device=device, dtype=dtype) for _ in range(2))
    value = torch.randn(sizes.tokens, H, E, device=device, dtype=dtype)
    pools = [torch.randn(ROWS, H, E, E, device=device) for _ in range(sizes.parts)]
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    step, log_decay, output = describe(sizes, rows, device), decay(H, device), torch.empty_like(value)

    def call() -> Tensor:
        attend([step] * len(pools), query, key, value, log_decay, pools, output)
        return output

    states = 2 * sum(pool[0].nbytes for pool in pools) * (sizes.decodes + len(sizes.prefills))
    return call, query.nbytes + key.nbytes + value.nbytes + output.nbytes + states


def name_row(case: str, sizes: Sizes, dtype: torch.dtype, what: str) -> Row:
    prefills = " ".join(str(length) for length in sizes.prefills)
    if len(set(sizes.prefills)) == 1 and len(sizes.prefills) > 1:
        prefills = f"{len(sizes.prefills)} x {sizes.prefills[0]}"
    return {
        "case": case, "decodes": sizes.decodes, "prefills": prefills, "heads": sizes.heads, "width": sizes.width,
        "parts": sizes.parts, "dtype": str(dtype).removeprefix("torch."), "what": what,
    }  # fmt: skip


def measure_steps(device: str, wanted: Callable[[Row], bool]) -> Iterator[Row]:
    """Times of steps as plain calls, and as CUDA graphs, which is how vLLM runs decodes: the device's time alone."""
    cuda = device == "cuda"
    bandwidth = copy_bandwidth() if cuda else None
    dtype = torch.bfloat16 if cuda else torch.float32
    for case, several in (GPU_CASES if cuda else CPU_CASES).items():
        for sizes in several:
            timers: dict[str, Any] = {"step": time_gpu if cuda else time_cpu}
            if cuda:
                timers["step, graph"] = time_graph
            for what, timer in timers.items():
                row = name_row(case, sizes, dtype, what)
                if not wanted(row):
                    continue
                call, moved = step_call(sizes, dtype, device)
                with torch.inference_mode():
                    median, low, high = timer(call)
                row |= {"ms": median, "ms_20": low, "ms_80": high, "tokens": sizes.tokens}
                if bandwidth is not None:
                    floor = 1e3 * moved / bandwidth
                    row |= {"floor_ms": floor, "ratio": median / floor, "bandwidth_gb_s": bandwidth / 1e9}
                yield row


def serve(tensors: tuple[Tensor, Tensor, Tensor], lengths: tuple[int, ...], parts: int, log_decay: Tensor) -> Tensor:
    """The output of texts laid end to end, read as a server would: in chunks, then token by token, all mixed.

    The last quarter of each text is decoded. In every step each text has its turn, one that still prefills with a
    chunk, one that decodes with a token, so nearly all steps are mixed.
    """
    query, key, value = tensors
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    prompt = [max(1, 3 * length // 4) for length in lengths]
    read = [0] * len(lengths)
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[: len(lengths)]
    E = value.shape[-1]
    pools = [torch.zeros(ROWS, value.shape[1], E, E, device=value.device) for _ in range(parts)]
    output = torch.full_like(value, torch.nan)
    while any(done < length for done, length in zip(read, lengths, strict=True)):
        going = [i for i, length in enumerate(lengths) if read[i] < length]
        decodes = [i for i in going if read[i] >= prompt[i]]
        prefills = [i for i in going if read[i] < prompt[i]]
        counts = dict.fromkeys(decodes, 1) | {i: min(CHUNK, prompt[i] - read[i]) for i in prefills}
        sizes = Sizes(len(decodes), tuple(counts[i] for i in prefills))
        step = describe(sizes, rows[[*decodes, *prefills]], str(value.device))
        index = torch.cat([torch.arange(starts[i] + read[i], starts[i] + read[i] + n) for i, n in counts.items()])
        index = index.to(value.device)
        part = torch.empty(len(index), *value.shape[1:], dtype=value.dtype, device=value.device)
        attend([step] * len(pools), query[index], key[index], value[index], log_decay, pools, part)
        output[index] = part
        for i, n in counts.items():
            read[i] += n
    return output


def measure_agreement(device: str, wanted: Callable[[Row], bool]) -> Iterator[Row]:
    """How far serving and training are from float64, and from each other, relative to the size of the output."""
    lengths = AGREEMENT_LENGTHS if device == "cuda" else (1, 7, 300, 40)
    heads, E = (8, 128) if device == "cuda" else (2, 32)
    for parts in (1, 2):
        for dtype in DTYPES if device == "cuda" else (torch.float32,):
            row = name_row("agreement", Sizes(0, lengths, heads, E, parts), dtype, "relative error")
            if not wanted(row):
                continue
            torch.manual_seed(0)
            widths = (E * parts, E * parts, E)
            q, k, v = (torch.randn(sum(lengths), heads, width, device=device).to(dtype) for width in widths)
            log_decay = decay(heads, device)
            bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)

            def whole(
                x: tuple[Tensor, ...], log_decay: Tensor = log_decay, bounds: Tensor = bounds, backend: str = "auto"
            ) -> Tensor:
                query, key, value = (each[None] for each in x)
                return lightning_attention(query, key, value, log_decay, cu_seqlens=bounds, backend=backend)[0][0]

            exact = whole((q.double(), k.double(), v.double()), log_decay.double(), backend="torch")
            training = whole((q, k, v))
            with torch.inference_mode():
                serving = serve((q, k, v), lengths, parts, log_decay)

            def distance(x: Tensor, y: Tensor, scale: Tensor = exact) -> float:
                return ((x.double() - y.double()).norm() / scale.norm()).item()

            yield row | {
                "training_error": distance(training, exact), "serving_error": distance(serving, exact),
                "difference": distance(serving, training), "tokens": sum(lengths),
            }  # fmt: skip


def measure(wanted: Callable[[Row], bool]) -> Iterator[Row]:
    """All rows that `wanted` asks for, with the machine in each."""
    device, about = ("cuda" if torch.cuda.is_available() else "cpu"), machine()
    about = {name: about[name] for name in ("device", "torch", "triton")}
    for measurement in (measure_agreement, measure_steps):
        for row in measurement(device, lambda row: wanted(row | about)):
            yield row | about
