"""Independent work on matrices, one piece after another or in processes of this machine."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tnl.compression.matrices import Matrix

Call = tuple[Callable[..., Any], Matrix, tuple[Any, ...]]  # a function, its matrix, its other arguments


def spread(calls: Sequence[Call], workers: int) -> Iterator[tuple[int, Any]]:
    """Make calls; yields the number of each with its result, as they are done.

    Args:
        calls: The calls, of functions that can be pickled.
        workers: Processes, each with one thread; 1 makes the calls in this one.
    """
    if workers == 1 or len(calls) <= 1:
        for number, (function, matrix, others) in enumerate(calls):
            yield number, function(matrix, *others)
        return
    import joblib

    tasks = (
        joblib.delayed(_work)(number, function, matrix.to(torch.device("cpu")), str(matrix.weight.device), others)
        for number, (function, matrix, others) in enumerate(calls)
    )
    yield from joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(tasks)


def _work(
    number: int, function: Callable[..., Any], matrix: Matrix, device: str, others: tuple[Any, ...]
) -> tuple[int, Any]:
    torch.set_num_threads(1)
    return number, function(matrix.to(torch.device(device)), *others)
