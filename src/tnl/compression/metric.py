"""The error of a compressed matrix that counts, `tr(R D C D^T) / 2` for a difference D, and what follows from it.

With `R = A A^T` and `C = B B^T` the error is `|A^T D B|^2 / 2`: the plain error of the *whitened* matrix `A^T W B`.
Hence the best matrix of rank r is the truncated singular value decomposition `U S V^T` of the whitened matrix
(Eckart, Young and Mirsky), turned back: `(A^-T U S) (V^T B^-1)`. Each whitening is absorbed by one of the two factors,
since each holds a whole side.

A network that cuts a side into several factors cannot absorb a whitening of the whole side. There C is replaced by a
product `C_1 x C_2 x ..` (Kronecker), one for each factor, which each core absorbs; the search is done in that metric,
and what it finds is fitted again in the true one.

Dimensions: m rows, n columns, r rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnl.compression.moments import Moments
from tnl.compression.settings import Weighting


@dataclass(frozen=True)
class Side:
    """A factor A of a positive definite `A A^T`: lower triangular `[d, d]`, or a diagonal `[d]`."""

    factor: Tensor

    def apply(self, matrix: Tensor) -> Tensor:
        """`A^T M`."""
        return self.factor[:, None] * matrix if self.factor.ndim == 1 else self.factor.T @ matrix

    def undo(self, matrix: Tensor) -> Tensor:
        """`A^-T M`."""
        if self.factor.ndim == 1:
            return matrix / self.factor[:, None]
        return torch.linalg.solve_triangular(self.factor.T, matrix, upper=True)

    @classmethod
    def of(cls, moment: Tensor, damping: float) -> "Side":
        """The factor of a moment `[d, d]` or `[d]` with a share of its mean diagonal added to the diagonal."""
        diagonal = moment if moment.ndim == 1 else moment.diagonal()
        floor = max(damping * float(diagonal.mean()), torch.finfo(torch.float64).tiny)
        if moment.ndim == 1:
            return cls((moment + floor).sqrt())
        return cls(torch.linalg.cholesky(moment + floor * torch.eye(len(moment), dtype=moment.dtype).to(moment)))


@dataclass(frozen=True)
class Metric:
    """`|A^T D B|^2 / 2` with the factors of rows and columns."""

    rows: Side
    columns: Side

    @classmethod
    def of(cls, moments: Moments | None, shape: tuple[int, int], weighting: Weighting, damping: float) -> "Metric":
        """The metric for a matrix `[m, n]`.

        What a weighting leaves out is replaced by its mean, so that errors of different matrices stay comparable:
        all are estimates of the change of the loss in nats a token, as long as there are moments.
        """
        m, n = shape
        if moments is None:
            return cls(Side(torch.ones(m, dtype=torch.float64)), Side(torch.ones(n, dtype=torch.float64)))
        rows, columns = moments.rows, moments.columns
        if weighting != "loss":
            rows = _levelled(rows)
        if weighting == "none":
            columns = _levelled(columns)
        return cls(Side.of(rows, damping), Side.of(columns, damping))

    def to(self, device: torch.device) -> "Metric":
        """The same on a device."""
        return Metric(Side(self.rows.factor.to(device)), Side(self.columns.factor.to(device)))

    def whiten(self, matrix: Tensor) -> Tensor:
        """`A^T W B`."""
        return self.columns.apply(self.rows.apply(matrix).T).T

    def error(self, difference: Tensor) -> float:
        """`|A^T D B|^2 / 2`."""
        return 0.5 * float(self.whiten(difference).square().sum())


def _levelled(moment: Tensor) -> Tensor:
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    return torch.full_like(diagonal, float(diagonal.mean()))


def factor_sides(side: Side, factors: Sequence[int], damping: float) -> list[Side]:
    """The moment of a side as a product of one for each factor of its index (padded with zeros).

    Each is the partial trace over the others, which is the nearest product in the sense of the first step of the
    flip-flop algorithm for matrix-normal data; scaled so that the trace of the product is that of the whole.
    """
    moment = side.factor.square() if side.factor.ndim == 1 else side.factor @ side.factor.T
    if len(factors) == 1:
        return [side] if len(moment) == factors[0] else [Side.of(_padded(moment, factors[0]), damping)]
    total = math.prod(factors)
    padded = _padded(moment, total)
    trace = float((padded if padded.ndim == 1 else padded.diagonal()).sum())
    sides = []
    for place, factor in enumerate(factors):
        before = math.prod(factors[:place])
        after = total // (before * factor)
        if padded.ndim == 1:
            part = padded.reshape(before, factor, after).sum((0, 2))
        else:
            part = torch.einsum("aibajb->ij", padded.reshape(before, factor, after, before, factor, after))
        share = 1.0 if place == 0 else trace  # the product of the parts has the trace of the whole
        sides.append(Side.of(part / share, damping))
    return sides


def _padded(moment: Tensor, size: int) -> Tensor:
    missing = size - len(moment)
    return torch.nn.functional.pad(moment, (0, missing) if moment.ndim == 1 else (0, missing, 0, missing))


@dataclass(frozen=True)
class Spectrum:
    """Singular value decomposition of a whitened matrix.

    Attributes:
        left: `[m, k]`, k the smaller side.
        values: `[k]`, falling.
        right: `[k, n]`.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrix: Tensor, metric: Metric) -> "Spectrum":
        """Decompose `A^T W B`, by the eigenvectors of its smaller Gram matrix: quick on a GPU, where SVDs are slow.

        Singular values below about 1e-8 of the largest are lost in rounding: shares of 1e-16 of the error.
        """
        whitened = metric.whiten(matrix)
        tall = whitened.shape[0] >= whitened.shape[1]
        long = whitened if tall else whitened.T
        _, vectors = torch.linalg.eigh(long.T @ long)
        short = vectors.flip(1)
        scaled = long @ short
        values = scaled.norm(dim=0)
        unit = scaled / values.clamp_min(torch.finfo(values.dtype).tiny)
        return cls(unit, values, short.T) if tall else cls(short, values, unit.T)

    def errors(self) -> Tensor:
        """Error of the best matrix of rank r, for r = 0..k: `[k + 1]`."""
        tail = self.values.square().flip(0).cumsum(0).flip(0)
        return 0.5 * torch.cat([tail, tail.new_zeros(1)])

    def factors(self, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
        """The best matrix of this rank as a product of `[m, r]` and `[r, n]`, of equal norm, in the plain metric."""
        root = self.values[:rank].sqrt()
        left = metric.rows.undo(self.left[:, :rank] * root)
        right = metric.columns.undo((root[:, None] * self.right[:rank]).T).T
        return left, right
