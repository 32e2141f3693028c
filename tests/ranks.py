"""Processes that form a gloo group, for tests of tier T2: forked from a server that has imported what they need."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["pytest", "torch.distributed.tensor", "tnl.ops.context_parallel"]  # takes seconds, so it is done once


def run_ranks(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(*arguments)`` in so many processes; what one of them raises is raised here.

    The function must be one that another process can import, its arguments must be picklable.
    """
    mp.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _join, (ranks, Path(folder) / "store", function, arguments), nprocs=ranks, start_method="forkserver"
        )


def _join(rank: int, ranks: int, store: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
