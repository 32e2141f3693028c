"""Processes that form a gloo group, for tests of tier T2: forked from a server that has imported what they need."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What takes seconds to import, once for all tests of a session.
PRELOADED = [
    "pytest",
    "tnl.ops.context_parallel",
    "tnl.training.loop",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
    "matplotlib.figure",
]


def run_ranks(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(*arguments)`` in so many processes; what one of them raises is raised here.

    The function must be one that another process can import, its arguments must be picklable.
    """
    mp.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _join, (ranks, Path(folder) / "store", function, arguments), nprocs=ranks, start_method="forkserver"
        )


def run_alone(function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(*arguments)`` in a process of its own, without a group."""
    mp.set_forkserver_preload(PRELOADED)
    mp.start_processes(_call, (function, arguments), nprocs=1, start_method="forkserver")


def run_torchrun(processes: int, function: Callable[..., None], *arguments: Any) -> None:
    """As :func:`run_ranks`, with the environment that torchrun makes in place of a process group."""
    mp.set_forkserver_preload(PRELOADED)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a port that is free, and stays ours
    mp.start_processes(
        _start, (processes, store.port, function, arguments), nprocs=processes, start_method="forkserver"
    )


def _call(_: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def _start(rank: int, ranks: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    function(*arguments)


def _join(rank: int, ranks: int, store: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
