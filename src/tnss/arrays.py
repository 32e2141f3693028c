"""The few array operations that NumPy and PyTorch spell differently.

Fits of small tensors are bound by the cost of a call, which is some three times lower in NumPy; large ones and those
on a GPU run in PyTorch. The linear algebra is written once, for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Array = Any  # numpy.ndarray or torch.Tensor


class Arrays:
    """Where arrays live: NumPy, or PyTorch on a device.

    Args:
        device: None for NumPy.
        dtype: ``"float64"`` or ``"float32"``.

    Attributes:
        np: the namespace (``numpy`` or ``torch``) of the functions that both have.
    """

    def __init__(self, device: torch.device | None, dtype: str) -> None:
        self.device = device
        self.np: Any = np if device is None else torch
        self.name = dtype

    def array(self, values: Any) -> Array:
        """Numbers as an array; floating ones in this dtype."""
        values = np.asarray(values)
        if values.dtype.kind == "f":
            values = values.astype(self.name)
        return values if self.device is None else torch.as_tensor(values, device=self.device)

    def to_torch(self, array: Array) -> torch.Tensor:
        """The array in PyTorch, on the CPU."""
        return torch.from_numpy(array) if self.device is None else array.cpu()


class Tape:
    """NumPy calls as they were made, to be made again on the same arrays.

    Half the time of a sweep over a small network is Python that finds out, each time anew, which array to multiply
    with which. A tape keeps the arrays of every step, results included, so that a repetition is the calls alone.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def record(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Note a call that has been made and that writes its result into one of its arguments."""
        self.calls.append((function, arguments))

    def replay(self) -> None:
        """Make every call again."""
        for function, arguments in self.calls:
            function(*arguments)


def permuted(array: Array, axes: Sequence[int]) -> Array:
    """Axes in another order."""
    return array.permute(*axes) if isinstance(array, torch.Tensor) else array.transpose(axes)


def solve(matrix: Array, right: Array) -> Array:
    """Solve symmetric positive definite systems ``[B, n, n]`` with right-hand sides ``[B, n, k]``."""
    if not isinstance(matrix, torch.Tensor):
        return np.linalg.solve(matrix, right)
    factor, info = torch.linalg.cholesky_ex(matrix)
    # rounding can make a matrix indefinite: elimination with pivots does not mind
    return torch.linalg.solve(matrix, right) if info.any() else torch.cholesky_solve(right, factor)
