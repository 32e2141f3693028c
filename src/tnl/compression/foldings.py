"""Matrices as tensors: how rows and columns are cut into factors, which factors share a mode, and what that can gain.

A matrix of 1408 x 512 may become a tensor of 32 x 44 x 16 x 32 (each factor a mode), of 704 x 1024 (pairs of a row and
a column factor), and many more. A folding is worth a search only if some structure on it could beat the truncated
singular value decomposition, whose error is known exactly. The bound of `tnss` (no network has a smaller error than
the tails of the singular values of the unfoldings that its cut edges can carry) says so without a fit.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import tnss
from tnl.compression.metric import Metric, Side, factor_sides
from tnl.models.tnl.matrix_network import MatrixNetwork
from tnss.bound import BoundSearch

MOST_PADDING = 1.04  # of a side that does not divide
PADDING_WEIGHT = 100.0
BOUND_NODES = 4000


@dataclass(frozen=True)
class Folding:
    """How a matrix becomes a tensor; the fields are those of `MatrixNetwork`."""

    shape: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    modes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, network: MatrixNetwork) -> "Folding":
        """That of a network."""
        return cls(network.shape, network.rows, network.columns, network.modes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the modes."""
        factors = self.rows + self.columns
        return tuple(math.prod(factors[factor] for factor in mode) for mode in self.modes)

    def network(self, structure: tnss.Structure) -> MatrixNetwork:
        """The layout of a matrix with this structure."""
        return MatrixNetwork(self.shape, self.rows, self.columns, self.modes, structure)

    def fold(self, matrix: Tensor) -> Tensor:
        """The tensor of a matrix."""
        return self.network(tnss.Structure(self.sizes, [])).fold(matrix)

    def __str__(self) -> str:
        names = [f"i{size}" for size in self.rows] + [f"j{size}" for size in self.columns]
        return " ".join("*".join(names[factor] for factor in mode) for mode in self.modes)


def propose_foldings(
    shape: tuple[int, int],
    orders: Sequence[int],
    row_cuts: Sequence[tuple[int, ...]] = (),
    column_cuts: Sequence[tuple[int, ...]] = (),
) -> list[Folding]:
    """Foldings of a matrix `[m, n]` into tensors of the given orders.

    Each mode holds one factor of a side, the sides being cut into as many factors each (one side stays whole in order
    3, and rows are cut once more in other odd orders); from order 3 on modes may also be pairs of a row and a column
    factor. `row_cuts` and `column_cuts` are further cuts that mean something, such as streams and heads.
    """
    m, n = shape
    foldings = []
    for order in orders:
        for k in {order // 2, (order + 1) // 2}:
            rows = [cut_size(m, k), *(cut for cut in row_cuts if len(cut) == k)]
            columns = [cut_size(n, order - k), *(cut for cut in column_cuts if len(cut) == order - k)]
            for cut in itertools.product(rows, columns):
                if len(cut[0]) + len(cut[1]) == order:
                    modes = tuple((factor,) for factor in range(order))
                    foldings.append(Folding(shape, cut[0], cut[1], modes))
        foldings += _paired(shape, order)
    return list(dict.fromkeys(foldings))


def cut_size(size: int, count: int) -> tuple[int, ...]:
    """Factors, as equal as can be, whose product is the size or a little above it; fewer where it is too small.

    Among the cuts with at most 4 % padding the one with the least sum of factors is taken, 1 % of padding counting as
    much as factors twice as large: padded sides are copied in every forward pass.
    """
    count = max(1, min(count, int(math.log2(max(2, size)))))
    ideal = size ** (1 / count)
    choices = range(max(2, int(ideal / 2.5)), math.ceil(ideal * 2.5) + 1)
    best: tuple[float, tuple[int, ...]] | None = None
    for first in itertools.combinations_with_replacement(choices, count - 1):
        last = -(-size // math.prod(first))
        if last < 2:
            continue
        padding = math.prod(first) * last / size
        if padding <= MOST_PADDING:
            factors = tuple(sorted((*first, last)))
            score = (padding - 1) * PADDING_WEIGHT + sum(factors) / (count * ideal)
            if best is None or (score, factors) < best:
                best = score, factors
    return best[1] if best is not None else (size,)


def _paired(shape: tuple[int, int], count: int) -> list[Folding]:
    rows, columns = cut_size(shape[0], count), cut_size(shape[1], count)
    if len(rows) != count or len(columns) != count:
        return []
    return [Folding(shape, rows, columns, tuple((factor, count + factor) for factor in range(count)))]


def paired_folding(shape: tuple[int, int], count: int) -> Folding:
    """The layout of a train or ring of matrices: each mode a pair of a row and a column factor.

    Raises:
        ValueError: A side is too small to be cut into so many factors.
    """
    foldings = _paired(shape, count)
    if not foldings:
        raise ValueError(f"shape: expected sides that can be cut into {count} factors, got {shape}")
    return foldings[0]


class WhitenedTensor:
    """A folded matrix in the metric that the cores of a network can absorb, one factor of a side each.

    Attributes:
        folding: The folding.
        tensor: The whitened tensor, shape `folding.sizes`.
    """

    def __init__(self, matrix: Tensor, metric: Metric, folding: Folding, damping: float) -> None:
        self.folding = folding
        rows = factor_sides(metric.rows, folding.rows, damping)
        self.sides: list[Side] = rows + factor_sides(metric.columns, folding.columns, damping)
        factors = folding.rows + folding.columns
        order = [factor for mode in folding.modes for factor in mode]
        whole = folding.fold(matrix).reshape([factors[factor] for factor in order])
        for place, factor in enumerate(order):
            whole = _along(whole, place, self.sides[factor], undo=False)
        self.tensor = whole.reshape(folding.sizes)

    def undo(self, cores: Sequence[Tensor], network: MatrixNetwork) -> list[Tensor]:
        """Cores of the whitened tensor -> cores of the matrix."""
        return through_sides(cores, network, self.sides, undo=True)

    def bound(self, space: tnss.Ring | tnss.Complete, parameters: int) -> float:
        """No network of the space with so many parameters has a squared relative error below this."""
        domain = space.bind(self.folding.sizes)
        search = BoundSearch(domain, tnss.Spectrum(self.tensor), tnss.ParameterBudget(parameters))
        search.next(BOUND_NODES)
        return search.lower()

    def truncated_error(self, rank: int) -> float:
        """Squared relative error of the best matrix of this rank in the metric of this tensor."""
        matrix = self.folding.network(tnss.Structure(self.folding.sizes, [])).unfold(self.tensor)
        gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
        energies = torch.linalg.eigvalsh(gram).clamp_min(0.0).flip(0)
        return float(energies[rank:].sum() / energies.sum())


def through_sides(cores: Sequence[Tensor], network: MatrixNetwork, sides: Sequence[Side], undo: bool) -> list[Tensor]:
    """Cores of a matrix -> cores of the whitened matrix, each factor of a side with its own whitening; or back."""
    result = []
    for vertex, (core, shape) in enumerate(zip(cores, network.factor_shapes(), strict=True)):
        whole = core.reshape(shape)
        held = network.modes[vertex] if vertex < len(network.modes) else ()
        for place, factor in enumerate(held):
            whole = _along(whole, whole.ndim - len(held) + place, sides[factor], undo)
        result.append(whole.reshape(core.shape).contiguous())
    return result


def _along(tensor: Tensor, axis: int, side: Side, undo: bool) -> Tensor:
    moved = tensor.movedim(axis, 0)
    flat = moved.reshape(moved.shape[0], -1)
    flat = side.undo(flat) if undo else side.apply(flat)
    return flat.reshape(moved.shape).movedim(0, axis)
