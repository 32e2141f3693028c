"""Where fits are computed: in this process, on its cores (joblib), or on many machines (Ray).

An executor gets tasks (a few requests each) and yields ``(index, fits)`` as they are done, in any order, so that
the caller can store each at once: what is done before a worker or the run dies is not lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tnss.fit import ALS, FitRequest, Fitter
from tnss.network import Network

Task = list[FitRequest]
ATTEMPTS = 3  # of a task whose worker died


@dataclass(frozen=True)
class Problem:
    """What every task shares: the tensor, how it is fitted, and the weights."""

    tensor: torch.Tensor
    settings: ALS
    weights: torch.Tensor | None = None


class Executor(Protocol):
    """Runs tasks on some machines."""

    def split(self, requests: Sequence[FitRequest]) -> list[Task]:
        """Cut a batch of requests into tasks; the same cut for the same requests."""

    def run(self, problem: Problem, tasks: Sequence[Task]) -> Iterator[tuple[int, list[Network]]]:
        """Fit all tasks; yields the index of each with its fits once it is done."""


class Local:
    """The calling process, all structures of a batch together."""

    def __init__(self) -> None:
        self._fitter: tuple[Problem, Fitter] | None = None

    def split(self, requests: Sequence[FitRequest]) -> list[Task]:
        """One task: batching is what makes this quick."""
        return [list(requests)]

    def run(self, problem: Problem, tasks: Sequence[Task]) -> Iterator[tuple[int, list[Network]]]:
        """Fit the tasks one after another."""
        if self._fitter is None or self._fitter[0] is not problem:
            self._fitter = problem, Fitter(problem.tensor, problem.settings, problem.weights)
        for index, task in enumerate(tasks):
            yield index, self._fitter[1].fit(task)


def _work(problem: Problem, index: int, task: Task) -> tuple[int, list[Network]]:
    """One task in a worker process, on one core."""
    torch.set_num_threads(1)
    return index, Fitter(problem.tensor, problem.settings, problem.weights).fit(task)


class Joblib:
    """Worker processes on this machine.

    Args:
        workers: how many; None for one a core.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        self.workers = workers or os.cpu_count() or 1

    def split(self, requests: Sequence[FitRequest]) -> list[Task]:
        """As many tasks as workers, the requests dealt out in turn."""
        return [task for task in (list(requests[i :: self.workers]) for i in range(self.workers)) if task]

    def run(self, problem: Problem, tasks: Sequence[Task]) -> Iterator[tuple[int, list[Network]]]:
        """Fit the tasks; those of a worker that died are given out again, twice at most."""
        import joblib
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        waiting = dict(enumerate(tasks))
        for attempt in range(ATTEMPTS):
            calls = [joblib.delayed(_work)(problem, index, task) for index, task in waiting.items()]
            try:
                parallel = joblib.Parallel(n_jobs=self.workers, return_as="generator_unordered")
                for index, networks in parallel(calls):
                    del waiting[index]
                    yield index, networks
                return
            except TerminatedWorkerError:
                if attempt == ATTEMPTS - 1:
                    raise


class Ray:
    """Tasks on a Ray cluster (the extra ``ray``).

    Args:
        address: of the cluster; None starts one on this machine where none is running.
        tasks: how many tasks a batch is cut into; None for the CPUs of the cluster.
        options: options of the remote function, for example ``{"num_gpus": 1}``.
    """

    def __init__(
        self, address: str | None = None, tasks: int | None = None, options: dict[str, Any] | None = None
    ) -> None:
        self.address, self.tasks, self.options = address, tasks, options or {}
        self._shared: tuple[Problem, Any] | None = None

    def _connected(self) -> Any:
        try:
            import ray
        except ImportError as error:
            raise ImportError(
                "executor Ray: expected the extra 'ray' to be installed (pip install tnl[ray])"
            ) from error
        if not ray.is_initialized():
            ray.init(address=self.address, include_dashboard=False, log_to_driver=False)
        return ray

    def split(self, requests: Sequence[FitRequest]) -> list[Task]:
        """As many tasks as asked for, the requests dealt out in turn."""
        count = self.tasks or int(self._connected().cluster_resources().get("CPU", 1))
        return [task for task in (list(requests[i::count]) for i in range(count)) if task]

    def run(self, problem: Problem, tasks: Sequence[Task]) -> Iterator[tuple[int, list[Network]]]:
        """Fit the tasks; Ray runs those of a dead worker again."""
        ray = self._connected()
        if self._shared is None or self._shared[0] is not problem:
            self._shared = problem, ray.put(problem)
        remote = ray.remote(_work).options(max_retries=ATTEMPTS - 1, **self.options)
        waiting = [remote.remote(self._shared[1], index, task) for index, task in enumerate(tasks)]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield ray.get(done[0])
