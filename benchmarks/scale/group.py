"""The processes of a benchmark: the first 1, 2, 4, ... of them measure, the others wait; what is measured is timed."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tnl.training.parallel import Ranks


@dataclass(frozen=True)
class Machine:
    """All processes, and a way for them to wait for one another that needs no GPU."""

    rank: int
    size: int
    device: torch.device
    control: Any

    def counts(self) -> list[int]:
        """Numbers of processes to measure with: 1, 2, 4, ... and all."""
        powers = [1 << i for i in range(self.size.bit_length()) if 1 << i <= self.size]
        return sorted({*powers, self.size})

    def wait(self) -> None:
        dist.barrier(group=self.control)

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, on all of them."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def first(self, count: int, parts: int = 1) -> Ranks | None:
        """The first processes as those of a training run, ``parts`` of them to a row; None in the others.

        All processes call it.
        """
        if count == 1:
            return Ranks(0, 1, self.device, None) if self.rank == 0 else None
        mesh = DeviceMesh(self.device.type, list(range(count)), mesh_dim_names=("all",))
        grid = None
        if parts > 1:
            rows = torch.arange(count).view(-1, parts).tolist()
            grid = DeviceMesh(self.device.type, rows, mesh_dim_names=("data", "context"))
        return Ranks(self.rank, count, self.device, mesh, grid) if self.rank < count else None

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@contextlib.contextmanager
def join() -> Iterator[Machine]:
    """Join the other processes where torchrun started this one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Machine(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def time_together(
    machine: Machine, ranks: Ranks, call: Callable[[], Any], runs: int, warmup: int, calls: int = 1
) -> list[float]:
    """Seconds of a call in each run of ``calls`` in a row, that of the slowest process; all begin together."""
    seconds = []
    for run in range(warmup + runs):
        ranks.wait()
        machine.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        machine.synchronize()
        if run >= warmup:
            seconds.append((time.perf_counter() - begin) / calls)
    slowest = torch.tensor(seconds, dtype=torch.float64)
    if ranks.mesh is not None:
        slowest = slowest.to(machine.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=ranks.mesh.get_group())
    return slowest.tolist()


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and 20 % and 80 % quantile in ms."""
    cuts = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
    return {"ms": 1e3 * statistics.median(seconds), "ms_20": 1e3 * cuts[0], "ms_80": 1e3 * cuts[-1]}


def communication_shares(step: Callable[[], Any]) -> tuple[float, float]:
    """Share of a step's time on this GPU in which NCCL's kernels run, and in which nothing else runs beside them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans[event.name.startswith("nccl")].append((event.time_range.start, event.time_range.end))
    exchange, everything = _covered(spans[True]), _covered(spans[True] + spans[False])
    ends = [end for _, end in spans[True] + spans[False]]
    whole = max(ends) - min(begin for begin, _ in spans[True] + spans[False])
    return exchange / whole, (everything - _covered(spans[False])) / whole


def kernels(call: Callable[[], Any]) -> list[tuple[str, int, float, float]]:
    """Name, stream, begin and duration in us of what runs on this GPU in a call, in the order of time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
    found = [(e.name(), e.device_resource_id(), e.start_ns() / 1e3, e.duration_ns() / 1e3) for e in events]
    return sorted((e for e in found if not e[0].startswith(("nccl:", "Event", "Stream"))), key=lambda e: e[2])


def exchanges(seen: list[tuple[str, int, float, float]]) -> list[tuple[float, float]]:
    """Of what :func:`kernels` gave: how long each of NCCL's kernels takes in us, and in which share of that others run.

    One that only lets time pass (``torch.cuda._sleep``) hides nothing.
    """
    others = [(e[2], e[2] + e[3]) for e in seen if not e[0].startswith("nccl") and "spin_kernel" not in e[0]]
    found = []
    for begin, duration in ((e[2], e[3]) for e in seen if e[0].startswith("nccl")):
        end = begin + duration
        beside = [(max(b, begin), min(e, end)) for b, e in others if b < end and e > begin]
        found.append((duration, _covered(beside) / duration))
    return found


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
