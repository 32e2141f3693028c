"""Contraction of small batched networks with torch: one path per shape, each step one ``bmm``.

Every operand has a leading batch axis that is carried along; the other axes are named by integers. An index that
two operands share is summed. That is all a tensor network without hyper-edges needs, and it costs far less per
call than a general einsum, which matters for networks of a few hundred entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import opt_einsum
import torch

Indices = tuple[int, ...]


@dataclass(frozen=True)
class _Step:
    """One pair: positions in the operand list, axis orders that bring both to matrices, axes kept of each."""

    first: int
    second: int
    first_axes: tuple[int, ...]
    second_axes: tuple[int, ...]
    first_kept: int
    second_shared: int


@dataclass(frozen=True)
class Contraction:
    """A compiled contraction of operands with fixed indices; sizes may differ from call to call."""

    steps: tuple[_Step, ...]
    final_axes: tuple[int, ...]
    flops: float
    peak: float

    def __call__(self, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        """Contract ``operands`` (each ``[batch, ...]``); the result is ``[batch, ...]`` in the output's order."""
        stack = list(operands)
        for step in self.steps:
            second, first = stack.pop(step.second), stack.pop(step.first)
            first, second = first.permute(step.first_axes), second.permute(step.second_axes)
            kept, open_ = first.shape[: step.first_kept], second.shape[step.second_shared :]
            left = first.reshape(kept[0], math.prod(kept[1:]), -1)
            right = second.reshape(kept[0], left.shape[2], -1)
            stack.append(torch.bmm(left, right).reshape(kept + open_))
        return stack[0].permute(self.final_axes)


@lru_cache(maxsize=100_000)
def compile_contraction(
    inputs: tuple[Indices, ...], output: Indices, sizes: tuple[tuple[int, int], ...]
) -> Contraction:
    """Find a path for ``inputs`` (indices of each operand, batch axis left out) and compile it.

    Args:
        inputs: the indices of each operand; an index occurs in at most two operands, or in one and in the output.
        output: the indices of the result, in order.
        sizes: ``(index, size)`` pairs that the path is optimised for.
    """
    size = dict(sizes)
    terms = [frozenset(indices) for indices in inputs]
    if len(inputs) > 2:
        path = opt_einsum.paths.auto(terms, frozenset(output), size, 2**62)
    else:
        path = [(0, 1)] if len(inputs) == 2 else []
    stack = list(inputs)
    steps, flops, peak = [], 0.0, 0.0
    for pair in path:
        i, j = sorted(pair)
        second, first = stack.pop(j), stack.pop(i)
        shared = [index for index in first if index in second]
        kept = [index for index in first if index not in shared]
        open_ = [index for index in second if index not in shared]
        steps.append(
            _Step(
                i,
                j,
                (0, *(first.index(index) + 1 for index in kept + shared)),
                (0, *(second.index(index) + 1 for index in shared + open_)),
                len(kept) + 1,
                len(shared) + 1,
            )
        )
        result = tuple(kept + open_)
        flops += 2.0 * math.prod(size[index] for index in (*result, *shared))
        peak = max(peak, float(math.prod(size[index] for index in result)))
        stack.append(result)
    axes = (0, *(stack[0].index(index) + 1 for index in output))
    return Contraction(tuple(steps), axes, flops, peak)
