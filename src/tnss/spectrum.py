"""Singular spectra of a tensor's unfoldings, and the lower bound they put under every tensor network.

Cut the modes of a network into ``S`` and the rest. Whatever the cores, the unfolding along that cut has a rank of
at most the product of the ranks of the edges cut, so by Eckart, Young and Mirsky

    RSE >= tail_S(product of the ranks cut),   tail_S(k) = sum of s_j^2 over j > k / sum of s_j^2,

for every ``S``; the largest is the bound. With internal vertices the inequality holds for every way of assigning
them to the two sides. A sketch of the unfolding, ``Q^T X`` with orthonormal columns in ``Q``, keeps the bound
true: a projection brings a matrix no farther from the matrices of rank ``k`` than it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from tnss.structure import Structure

LARGEST_GRAM = 1024  # unfoldings with a smaller side above this are sketched
SKETCH = 256
MOST_CUTS = 4096
CHUNK = 4_000_000  # table look-ups held at once


class Spectrum:
    """Tails of the unfoldings of one tensor.

    Args:
        tensor: any order; used in float64.
        weights: of the entries, or None. With weights ``w`` the error is at least ``min(w)`` times the plain
            one, so the bound is scaled by ``min(w) ||X||^2 / ||X||_w^2``; it is 0 where an entry is missing.
        seed: of the sketches.

    Attributes:
        cuts: [C] bit masks of the modes on the first side; the last mode is always on the other.
        tails: [C, width] lower bounds of ``tail_S(k)`` for ``k = 0 .. width - 1``, less an allowance for rounding.
            Beyond the width they are 0.
        sketched: whether any unfolding was sketched.
    """

    def __init__(self, tensor: torch.Tensor, weights: torch.Tensor | None = None, seed: int = 0) -> None:
        data = tensor.detach().to("cpu", torch.float64)
        self.order = data.ndim
        self.sizes = tuple(data.shape)
        scale = 1.0
        if weights is not None:
            weights = weights.to("cpu", torch.float64)
            data = torch.where(weights > 0, data, torch.zeros_like(data))
            plain, weighted = data.square().sum(), (weights * data.square()).sum()
            scale = float(weights.min() * plain / weighted)
        masks = sorted(range(1, 2 ** (self.order - 1)), key=lambda mask: (_balance(mask, self.order), mask))
        self.cuts = np.array(masks[:MOST_CUTS], dtype=np.int64)
        generator = torch.Generator().manual_seed(seed)
        norm = float(data.square().sum())
        rows, self.sketched = [], False
        for mask in self.cuts.tolist():
            energies, exact = _energies(data, mask, generator)
            self.sketched |= not exact
            tail = np.append(np.cumsum(energies)[::-1], 0.0) / norm  # ascending energies: small ones first
            allowance = 8 * np.finfo(float).eps * len(energies)
            rows.append(scale * np.maximum(tail - allowance, 0.0))
        width = max(len(row) for row in rows)
        self.tails = np.zeros((len(rows), width))
        for row, tail in zip(self.tails, rows, strict=True):
            row[: len(tail)] = tail

    def bound(self, structures: Sequence[Structure]) -> np.ndarray:
        """Lower bounds of the RSE of structures, [B]."""
        return self.cut_tails(structures).max(1, initial=0.0)

    def cut_tails(self, structures: Sequence[Structure]) -> np.ndarray:
        """The bound from each cut, [B, C] (the largest over the assignments of internal vertices)."""
        if not structures:
            return np.zeros((0, len(self.cuts)))
        width = max(1, *(len(structure.edges) for structure in structures))
        padded = np.array([[*s.edges, *[(0, 0, 1)] * (width - len(s.edges))] for s in structures])
        return self._tails_of(padded[:, :, :2], padded[:, :, 2], max(s.vertices for s in structures))

    def bound_ranks(self, edges: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Lower bounds for many rank vectors on one graph.

        Args:
            edges: [E, 2] vertices.
            ranks: [B, E].

        Returns:
            [B] lower bounds of the RSE.
        """
        vertices = max(self.order, int(edges.max()) + 1)
        masks, cut = self.vertex_cuts(vertices)
        incidence = crossing(masks, edges).astype(float).T
        logs = np.log(np.arange(1, ranks.max() + 1))
        flat = self.tails.ravel()
        offset = cut * self.tails.shape[1]
        result = np.empty(len(ranks))
        step = max(1, CHUNK // len(masks))
        for first in range(0, len(ranks), step):
            products = logs[ranks[first : first + step] - 1] @ incidence
            result[first : first + step] = flat[self.column(products) + offset].max(1)
        return result

    def _tails_of(self, edges: np.ndarray, ranks: np.ndarray, vertices: int) -> np.ndarray:
        masks, cut = self.vertex_cuts(vertices)
        result = np.zeros((len(edges), len(self.cuts)))
        step = max(1, CHUNK // (len(masks) * edges.shape[1]))
        for first in range(0, len(edges), step):
            part = slice(first, first + step)
            products = (crossing(masks, edges[part]) * np.log(ranks[part])[:, None]).sum(2)
            found = self.tails[cut, self.column(products)]
            result[part] = found.reshape(len(found), len(self.cuts), -1).max(2)  # over internal vertices
        return result

    def column(self, log_products: np.ndarray) -> np.ndarray:
        """Column of ``tails`` for the logarithm of a product of ranks."""
        limit = np.log(self.tails.shape[1])
        return np.minimum(np.rint(np.exp(np.minimum(log_products, limit))), self.tails.shape[1] - 1).astype(np.int64)

    def vertex_cuts(self, vertices: int) -> tuple[np.ndarray, np.ndarray]:
        """Bit masks over all vertices, and for each the row of ``tails`` that holds for it."""
        internal = vertices - self.order
        if internal <= 0:
            return self.cuts, np.arange(len(self.cuts))
        sides = np.arange(min(2**internal, max(1, MOST_CUTS * 16 // len(self.cuts))), dtype=np.int64) << self.order
        return (self.cuts[:, None] | sides).ravel(), np.repeat(np.arange(len(self.cuts)), len(sides))


def crossing(masks: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Whether an edge is cut: masks [C], edges [..., E, 2] -> bool [..., C, E]."""
    sides = (masks[:, None, None] >> edges[..., None, :, :]) & 1
    return sides[..., 0] != sides[..., 1]


@cache
def _balance(mask: int, order: int) -> int:
    return min(mask.bit_count(), order - mask.bit_count())


def _energies(data: torch.Tensor, mask: int, generator: torch.Generator) -> tuple[np.ndarray, bool]:
    """Squared singular values of an unfolding, ascending, and whether they are exact or those of a sketch."""
    inside = [mode for mode in range(data.ndim) if mask >> mode & 1]
    outside = [mode for mode in range(data.ndim) if not mask >> mode & 1]
    sides = [int(np.prod([data.shape[mode] for mode in side])) for side in (inside, outside)]
    if sides[0] > sides[1]:
        inside, outside, sides = outside, inside, sides[::-1]
    matrix = data.permute(*itertools.chain(inside, outside)).reshape(sides)
    exact = sides[0] <= LARGEST_GRAM
    if not exact:
        basis = matrix @ torch.randn(sides[1], SKETCH, generator=generator, dtype=torch.float64)
        basis, _ = torch.linalg.qr(basis)
        basis, _ = torch.linalg.qr(matrix @ (matrix.T @ basis))
        matrix = basis.T @ matrix
    return torch.linalg.eigvalsh(matrix @ matrix.T).clamp_min(0.0).numpy(), exact
