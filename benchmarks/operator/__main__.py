"""Run cases and write their rows to a CSV: `python -m benchmarks.operator [CASE ...] --output FILE.csv`.

Rows that the file has stay in it until they are measured again; each says when that was. A ratio compares times of one
run: the floor is measured in each.
"""

import argparse
import csv
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.operator import cases, implementations
from benchmarks.operator.cases import Sizes
from benchmarks.operator.minimax import measure_minimax
from tnl.ops import lightning_attention, lightning_attention_step

Row = dict[str, Any]
GIGA = 1e9


def machine() -> Row:
    """Device and versions, which every row names."""
    cuda = torch.cuda.is_available()
    versions = {}
    for name in ("triton", "fla-core", "lightning-attn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__, **versions, "measured": time.strftime("%Y-%m-%d %H:%M")}


def time_gpu(call: Callable[[], Any]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile in ms, by events, the cache cleared before each run."""
    import triton.testing

    median, low, high = triton.testing.do_bench(call, warmup=10, rep=60, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def time_graph(call: Callable[[], Any]) -> tuple[float, float, float]:
    """As :func:`time_gpu` for the replay of a captured graph: the device's time without the host's."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return time_gpu(graph.replay)


def time_cpu(call: Callable[[], Any], runs: int = 9) -> tuple[float, float, float]:
    call()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    quantiles = statistics.quantiles(times, n=5)
    return statistics.median(times), quantiles[0], quantiles[-1]


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written counted."""
    x = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 4 * x.numel() / (time_gpu(lambda: y.copy_(x))[0] * 1e-3)


def inputs(sizes: Sizes, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, D, E = sizes.B, sizes.T, sizes.H, sizes.D, sizes.E
    if sizes.documents:
        B, T = 1, B * T
    q, k, v = (torch.randn(B, T, H, width, device=device, dtype=dtype) for width in (D, D, E))
    decay = -torch.exp2(-8 * torch.arange(1, H + 1, device=device) / H)
    return q, k, v, decay * torch.rand(B, T, H, device=device) if sizes.per_token else decay


def document_bounds(sizes: Sizes) -> Tensor:
    """Documents of mixed lengths that fill the row."""
    generator = torch.Generator().manual_seed(0)
    tokens = sizes.B * sizes.T
    cuts = torch.randperm(tokens - 1, generator=generator)[: sizes.documents - 1].sort().values + 1
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]).cuda()


def measure_gpu(case: str, sizes: Sizes, bandwidth: float, with_peers: bool) -> Iterator[Row]:
    q, k, v, decay = inputs(sizes, "cuda", torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)] + ([decay.requires_grad_()] if sizes.per_token else [])
    forward_bytes = 2 * (2 * q.numel() + 2 * v.numel()) + (4 * decay.numel() if sizes.per_token else 0)
    backward_bytes = 2 * (5 * q.numel() + 5 * v.numel()) + (8 * decay.numel() if sizes.per_token else 0)
    floors = {"forward": 1e3 * forward_bytes / bandwidth, "backward": 1e3 * backward_bytes / bandwidth}
    peers = implementations.GPU if sizes.peers and with_peers else {"tnl": implementations.tnl}
    if sizes.documents:
        bounds = document_bounds(sizes)
        peers = {"tnl": lambda q, k, v, g: lightning_attention(q, k, v, g, cu_seqlens=bounds)[0]}
    for name, attention in peers.items():
        if sizes.per_token and name not in ("tnl", "fla simple_gla"):
            continue  # they have no decay a token
        if name.startswith("softmax") and sizes.T > 32768:
            continue  # a second and more a call
        if name == "lightning-attn" and not sizes.official:
            continue
        row = {"case": case, "implementation": name, **vars(sizes), "dtype": "bfloat16"}
        if implementations.absent(name):
            yield row | {"pass": "forward", "error": "package absent"}
            continue
        try:
            with torch.no_grad():
                timings = {"forward": time_gpu(lambda f=attention: f(q, k, v, decay))}  # type: ignore[misc]
                if name == "tnl" and sizes.B * sizes.T <= 1 << 14:
                    timings["forward, graph"] = time_graph(lambda f=attention: f(q, k, v, decay))  # type: ignore[misc]
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            o = attention(q, k, v, decay)
            do = torch.randn_like(o)
            gradients = torch.autograd.grad(o, leaves, do, retain_graph=True)
            kept = o.nbytes + do.nbytes + sum(x.nbytes for x in gradients)
            extra = torch.cuda.max_memory_allocated() - before - kept
            del gradients
            timings["backward"] = time_gpu(partial(torch.autograd.grad, o, leaves, do, retain_graph=True))
            del o, do
        except Exception as error:  # a peer that cannot do it is named, not left out
            yield row | {"pass": "forward", "error": f"{type(error).__name__}: {error}"[:120]}
            continue
        for what, (median, low, high) in timings.items():
            floor = floors[what.split(",")[0]]
            yield row | {
                "pass": what, "ms": median, "ms_20": low, "ms_80": high, "floor_ms": floor, "ratio": median / floor,
                "extra_gb": extra / GIGA, "bandwidth_gb_s": bandwidth / GIGA,
            }  # fmt: skip


def measure_cpu(case: str, sizes: Sizes) -> Iterator[Row]:
    arguments = inputs(sizes, "cpu", torch.float32)
    with torch.no_grad():
        for name, attention in implementations.CPU.items():
            median, low, high = time_cpu(lambda f=attention: f(*arguments))  # type: ignore[misc]
            row = {"case": case, "implementation": name, **vars(sizes), "dtype": "float32", "pass": "forward"}
            yield row | {"ms": median, "ms_20": low, "ms_80": high}


def measure_decode(bandwidth: float) -> Iterator[Row]:
    """One token for each row of a pool of states, as a captured graph and as a plain call."""
    for rows in cases.DECODE_ROWS:
        q, k, v = (torch.randn(rows, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        state, decay = torch.randn(rows, 32, 128, 128, device="cuda"), torch.full((32,), -0.01, device="cuda")
        floor = 1e3 * 2 * state.nbytes / bandwidth

        def call(arguments: tuple[Tensor, ...] = (q, k, v, decay, state)) -> Tensor:
            return lightning_attention_step(*arguments)

        for what, timer in (("step", time_gpu), ("step, graph", time_graph)):
            median, low, high = timer(call)
            row = {"case": "decode", "implementation": "tnl", "B": rows, "H": 32, "T": 1, "D": 128, "E": 128}
            row |= {"dtype": "bfloat16", "pass": what, "floor_ms": floor, "ratio": median / floor}
            yield row | {"ms": median, "ms_20": low, "ms_80": high, "bandwidth_gb_s": bandwidth / GIGA}


def measure_host() -> Iterator[Row]:
    """Host time of a small forward call, and of one small PyTorch operation for scale."""
    q, k, v, decay = inputs(Sizes(1, 16, 256), "cuda", torch.bfloat16)

    def host(call: Callable[[], Any]) -> tuple[float, float, float]:
        times = []
        for i in range(400):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
            if i % 20 == 0:
                torch.cuda.synchronize()
        quantiles = statistics.quantiles(times[100:], n=5)
        return statistics.median(times[100:]), quantiles[0], quantiles[-1]

    for name, call in (("tnl", lambda: lightning_attention(q, k, v, decay)), ("torch.mul", lambda: torch.mul(q, 2))):
        median, low, high = host(call)
        row = {"case": "host", "implementation": name, **vars(Sizes(1, 16, 256)), "dtype": "bfloat16"}
        yield row | {"pass": "host", "ms": median, "ms_20": low, "ms_80": high}


def measure_compile() -> Iterator[Row]:
    """First call of a new width, forward and backward, with an empty cache of compiled kernels; then other sizes."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    for what, sizes in (("first", Sizes(2, 4, 300, 112, 112)), ("other B, T, H", Sizes(3, 5, 777, 112, 112))):
        q, k, v, decay = inputs(sizes, "cuda", torch.bfloat16)
        q.requires_grad_()
        begin = time.perf_counter()
        o = lightning_attention(q, k, v, decay)[0]
        torch.cuda.synchronize()
        middle = time.perf_counter()
        torch.autograd.grad(o.sum(), q)
        torch.cuda.synchronize()
        row = {"case": "compile", "implementation": "tnl", **vars(sizes), "dtype": "bfloat16"}
        yield row | {"pass": f"forward, {what}", "ms": 1e3 * (middle - begin)}
        yield row | {"pass": f"backward, {what}", "ms": 1e3 * (time.perf_counter() - middle)}


def run(names: list[str], with_peers: bool) -> Iterator[Row]:
    if not torch.cuda.is_available():
        for name in names or [*cases.CPU, "minimax"]:
            for sizes in cases.CPU.get(name, []):
                yield from measure_cpu(name, sizes)
            if name == "minimax":
                yield from measure_minimax(time_cpu)
        return
    bandwidth = copy_bandwidth()
    everything = ["compile", *cases.GPU, "decode", "host", "minimax"]
    for name in [each for each in everything if not names or each in names]:  # what others compile is not new any more
        if name in cases.GPU:
            for sizes in cases.GPU[name]:
                yield from measure_gpu(name, sizes, bandwidth, with_peers)
        else:
            yield from {
                "decode": lambda: measure_decode(bandwidth),
                "host": measure_host,
                "compile": measure_compile,
                "minimax": lambda: measure_minimax(time_gpu),
            }[name]()


def what_is_measured(row: Row) -> tuple[str, ...]:
    """The same for a row as it was measured and as it was read."""
    names = ("case", "implementation", "B", "H", "T", "D", "E", "per_token", "documents", "dtype", "pass")
    return tuple(str(row.get(name, "")) for name in names)


def main() -> None:
    known = [*(cases.GPU if torch.cuda.is_available() else cases.CPU), "minimax"]
    known += ["decode", "host", "compile"] if torch.cuda.is_available() else []
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(known)}; none: all")
    parser.add_argument("--output", type=Path, default=RESULTS / "operator" / "operator.csv", help="CSV to write")
    parser.add_argument(
        "--no-peers", action="store_true", help="on a GPU: our operator alone, in a fraction of the time"
    )
    options = parser.parse_args()
    unknown = set(options.cases) - set(known)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; this machine has {', '.join(known)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    about = machine()
    rows: dict[tuple[str, ...], Row] = {}
    if options.output.exists():
        with options.output.open(newline="") as file:
            rows = {what_is_measured(row): row for row in csv.DictReader(file)}
    for row in run(options.cases, not options.no_peers):
        rows[what_is_measured(row)] = row | about
        shown = row.get("error") or f"{row['ms']:9.3f} ms" + (f" {row['ratio']:5.2f} x floor" if "ratio" in row else "")
        shown += f" {row['speedup']:5.2f} x faster" if "speedup" in row else ""
        size = f"{row['B']} x {row['H']} x {row['T']} D {row['D']} E {row['E']}"
        print(f"{row['case']:12} {row['implementation']:22} {size:28} {row['pass']:24} {shown}", flush=True)
        columns = list(dict.fromkeys(name for each in rows.values() for name in each))
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows.values())
    print(f"wrote {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
