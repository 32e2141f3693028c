"""Contraction of small batched networks: one path per shape, each step one batched matrix product.

Every operand has a leading batch axis that is carried along (of length 1 where all networks of the batch share it);
the other axes are named by integers. An index that two operands share is summed. That is all a tensor network
without hyper-edges needs, and it costs far less per call than a general einsum, which matters for networks of a few
hundred entries. Operands are NumPy arrays or PyTorch tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import opt_einsum

from tnss.arrays import Array, Tape, permuted

Indices = tuple[int, ...]


@dataclass(frozen=True)
class _Matrix:
    """How an operand is read as a matrix: axes to permute first (None: none), its shape, whether transposed."""

    axes: tuple[int, ...] | None
    shape: tuple[int, int]
    transposed: bool

    def __call__(self, operand: Array, tape: Tape | None) -> Array:
        if self.axes is not None:
            operand = permuted(operand, self.axes)
        matrix = reshaped(operand, (-1, *self.shape), tape)
        return matrix.swapaxes(1, 2) if self.transposed else matrix


@dataclass(frozen=True)
class _Step:
    """One pair: positions in the operand list, both as matrices, sizes of the result."""

    first: int
    second: int
    left: _Matrix
    right: _Matrix
    result: tuple[int, ...]


@dataclass(frozen=True)
class Contraction:
    """A compiled contraction of operands with fixed indices and sizes."""

    steps: tuple[_Step, ...]
    final_axes: tuple[int, ...] | None
    flops: float
    peak: float

    def __call__(self, operands: Sequence[Array], tape: Tape | None = None) -> Array:
        """Contract ``operands`` (each ``[batch, ...]``); the result is ``[batch, ...]`` in the output's order.

        With a tape, for NumPy arrays only, the calls are recorded: a replay computes the same array anew.
        """
        stack = list(operands)
        for step in self.steps:
            second, first = stack.pop(step.second), stack.pop(step.first)
            product = multiplied(step.left(first, tape), step.right(second, tape), tape)
            stack.append(product.reshape(-1, *step.result))
        return stack[0] if self.final_axes is None else permuted(stack[0], self.final_axes)


def multiplied(left: Array, right: Array, tape: Tape | None) -> Array:
    """Batched matrix product, recorded on the tape where there is one."""
    product = left @ right
    if tape is not None:
        tape.record(np.matmul, left, right, product)
    return product


def reshaped(array: Array, shape: tuple[int, ...], tape: Tape | None) -> Array:
    """``array.reshape(shape)``; where that copies, the copy is recorded on the tape."""
    result = array.reshape(shape)
    if tape is not None and not np.may_share_memory(result, array):
        tape.record(np.copyto, result.reshape(array.shape), array)
    return result


@lru_cache(maxsize=100_000)
def compile_contraction(
    inputs: tuple[Indices, ...], output: Indices, sizes: tuple[tuple[int, int], ...]
) -> Contraction:
    """Find a path for ``inputs`` (indices of each operand, batch axis left out) and compile it.

    Args:
        inputs: the indices of each operand; an index occurs in at most two operands, or in one and in the output.
        output: the indices of the result, in order.
        sizes: ``(index, size)`` pairs.
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
        kept = tuple(index for index in first if index not in second)
        open_ = tuple(index for index in second if index not in first)
        left, right = min(
            (
                (_matrix(first, kept, shared, size), _matrix(second, shared, open_, size))
                for shared in (_common(first, second), _common(second, first))
            ),
            key=lambda matrices: sum(m.shape[0] * m.shape[1] for m in matrices if m.axes is not None),
        )
        result = kept + open_
        steps.append(_Step(i, j, left, right, tuple(size[index] for index in result)))
        flops += 2.0 * math.prod(size[index] for index in {*first, *second})
        peak = max(peak, float(math.prod(size[index] for index in result)))
        stack.append(result)
    axes = None if stack[0] == output else (0, *(stack[0].index(index) + 1 for index in output))
    return Contraction(tuple(steps), axes, flops, peak)


def _common(first: Indices, second: Indices) -> Indices:
    return tuple(index for index in first if index in second)


def _matrix(indices: Indices, rows: Indices, columns: Indices, size: dict[int, int]) -> _Matrix:
    """``indices`` as a matrix; entries are moved only where neither it nor its transpose is there already."""
    shape = math.prod(size[index] for index in rows), math.prod(size[index] for index in columns)
    if indices == rows + columns:
        return _Matrix(None, shape, False)
    if indices == columns + rows:
        return _Matrix(None, shape[::-1], True)
    return _Matrix((0, *(indices.index(index) + 1 for index in rows + columns)), shape, False)
