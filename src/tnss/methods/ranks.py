"""Structures whose unfoldings would have the very ranks of the tensor's.

An unfolding of a network has at most the rank of its narrowest cut: for a set ``S`` of modes the smallest product,
over all sets ``T`` of vertices, of the ranks of the edges that leave ``T`` and of the sizes of the modes that lie in
one of ``S`` and ``T`` alone. Cores drawn at random reach it as a rule (not always: arXiv 1508.04644), so where a tensor
is a network exactly, that network is most likely among the structures whose narrowest cuts are the tensor's own ranks;
the lower bound asks only that they are not below them. This is a guess, not a bound: it chooses what to fit early.
"""

from __future__ import annotations

import itertools
from functools import cached_property

import numpy as np

from tnss.methods.base import View
from tnss.space import Point
from tnss.spectrum import crossing

LARGEST_ORDER = 8  # above, the table of all pairs of cuts is too large
MATCH = 1e-6  # of the sum of the differences of log ranks: ranks are integers
PARAMETER = 1e-6  # weight of a parameter in a descent: decides between structures with the same ranks


class RankMatch:
    """Descents over the ranks of a fixed graph to structures that match the ranks of the tensor."""

    def __init__(self, view: View) -> None:
        self.view = view

    @cached_property
    def informs(self) -> bool:
        """Whether there is something to match: an unfolding of less than full rank, and a graph that is fixed."""
        domain, spectrum = self.view.domain, self.view.spectrum
        if spectrum is None or domain.edges is None or domain.slots > LARGEST_ORDER or domain.slots > domain.order:
            return False
        modes = (spectrum.cuts[:, None] >> np.arange(domain.order)) & 1
        logs = np.log(domain.sizes)
        full = np.minimum(modes @ logs, (1 - modes) @ logs)
        ranks = np.log(np.maximum((spectrum.tails > 0).sum(1), 1))
        self._wanted = ranks
        vertices = np.arange(2**domain.order)
        apart = ((spectrum.cuts[:, None] ^ vertices)[..., None] >> np.arange(domain.order)) & 1
        self._modes_cut = apart @ logs
        self._vertices = vertices
        return bool((ranks < full - MATCH).any())

    def points(self, count: int, descents: int) -> list[Point]:
        """Up to ``count`` points that match, those of fewest parameters first, from that many random descents."""
        found: dict[Point, float] = {}
        for _ in range(descents):
            point, mismatch = self._descend()
            if mismatch <= MATCH and self.view.domain.allows(point):
                found[point] = self.view.domain.decode(point).parameters
        return sorted(found, key=lambda point: (found[point], point))[:count]

    def _descend(self) -> tuple[Point, float]:
        domain, generator = self.view.domain, self.view.generator
        start = domain.random(generator)
        assert domain.edges is not None
        edges = np.array(start.permutation)[np.array(domain.edges)]
        crossed = crossing(self._vertices, edges).astype(float).T
        at = (edges[:, :, None] == np.arange(domain.order)).any(1)
        low, high = np.array(domain.lower), np.array(domain.upper)
        # sparse starts: from dense ones the descent ends at ranks that are full everywhere
        ranks = np.minimum(generator.integers(1, 3, len(edges)), high).clip(low)

        def values(candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            narrowest = ((np.log(candidates) @ crossed)[:, None] + self._modes_cut).min(2)
            mismatch = np.abs(narrowest - self._wanted).sum(1)
            cores = np.where(at.T, candidates[:, None], 1).prod(2) * np.array(domain.sizes)
            return mismatch + PARAMETER * cores.sum(1), mismatch

        value, mismatch = (float(v[0]) for v in values(ranks[None]))
        while True:
            around = _around(ranks, low, high)
            found, mismatches = values(around)
            best = int(found.argmin())
            if found[best] >= value - 1e-12:
                return Point(tuple(int(rank) for rank in ranks), start.permutation), mismatch
            ranks, value, mismatch = around[best], float(found[best]), float(mismatches[best])


def _around(ranks: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Every other value of one rank; and of two ranks, one up and the other down, or exchanged."""
    found = [_with(ranks, {i: value}) for i in range(len(ranks)) for value in range(low[i], high[i] + 1)]
    for i, j in itertools.combinations(range(len(ranks)), 2):
        found.append(_with(ranks, {i: ranks[i] + 1, j: ranks[j] - 1}))
        found.append(_with(ranks, {i: ranks[i] - 1, j: ranks[j] + 1}))
        found.append(_with(ranks, {i: ranks[j], j: ranks[i]}))
    around = np.array(found)
    return around[((around >= low) & (around <= high)).all(1)]


def _with(ranks: np.ndarray, changed: dict[int, int]) -> np.ndarray:
    other = ranks.copy()
    for index, value in changed.items():
        other[index] = value
    return other
