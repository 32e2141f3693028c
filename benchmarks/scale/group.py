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

    def first(self, count: int, shared_rows: bool = False) -> Ranks | None:
        """The first processes as those of a training run; None in the others. All processes call it."""
        if count == 1:
            return Ranks(0, 1, self.device, None) if self.rank == 0 else None
        mesh = DeviceMesh(self.device.type, list(range(count)), mesh_dim_names=("all",))
        grid = None
        if shared_rows:
            grid = DeviceMesh(self.device.type, [list(range(count))], mesh_dim_names=("data", "context"))
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


def time_together(machine: Machine, ranks: Ranks, call: Callable[[], Any], runs: int, warmup: int) -> list[float]:
    """Seconds of each run of a call, that of the slowest process; all begin together."""
    seconds = []
    for run in range(warmup + runs):
        ranks.wait()
        machine.synchronize()
        begin = time.perf_counter()
        call()
        machine.synchronize()
        if run >= warmup:
            seconds.append(time.perf_counter() - begin)
    slowest = torch.tensor(seconds, dtype=torch.float64)
    if ranks.mesh is not None:
        slowest = slowest.to(machine.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=ranks.mesh.get_group())
    return slowest.tolist()


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and 20 % and 80 % quantile in ms."""
    cuts = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
    return {"ms": 1e3 * statistics.median(seconds), "ms_20": 1e3 * cuts[0], "ms_80": 1e3 * cuts[-1]}
