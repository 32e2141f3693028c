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

LARGEST_ORDER = 8  # above, a step of a descent looks at too much
MOST_APART = 2  # modes by which the sets S and T may differ: narrower cuts of other kinds are rare
WORK = 2e9  # look-ups of all descents together: seconds
STEPS = 20  # of a descent, about
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
        if spectrum.sketched or not spectrum.tails.any():  # ranks that are those of a sketch, or not known at all
            return False
        logs = np.log(domain.sizes)
        modes = _bits(spectrum.cuts, domain.order)
        self._full = np.minimum(modes @ logs, (1 - modes) @ logs)
        self._ranks = np.log(np.maximum((spectrum.tails > 0).sum(1), 1))
        apart = [sum(1 << mode for mode in some) for some in _subsets(domain.order, MOST_APART)]
        self._vertex_sets = spectrum.cuts[:, None] ^ np.array(apart)
        self._modes_cut = _bits(np.array(apart), domain.order) @ logs
        return bool((self._ranks < self._full - MATCH).any())

    def points(self, count: int, descents: int) -> list[Point]:
        """Points that match, those of fewest parameters first.

        Args:
            count: most points.
            descents: from random ranks; fewer where they are long.
        """
        variables = len(self.view.domain.lower)
        lookups = self._vertex_sets.size * STEPS * 2 * variables**2
        descents = max(1, min(descents, int(WORK / lookups)))
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
        crossed = crossing(np.arange(2**domain.order), edges).astype(float).T
        at = (edges[:, :, None] == np.arange(domain.order)).any(1)
        low, high = np.array(domain.lower), np.array(domain.upper)
        # sparse starts: from dense ones the descent ends at ranks that are full everywhere
        ranks = np.minimum(generator.integers(1, 3, len(edges)), high).clip(low)

        def values(candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            cuts = (np.log(candidates) @ crossed)[:, self._vertex_sets] + self._modes_cut
            mismatch = np.abs(np.minimum(cuts.min(2), self._full) - self._ranks).sum(1)
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


def _subsets(count: int, most: int) -> list[tuple[int, ...]]:
    """Subsets of ``range(count)`` with up to ``most`` members."""
    return [subset for size in range(most + 1) for subset in itertools.combinations(range(count), size)]


def _bits(masks: np.ndarray, count: int) -> np.ndarray:
    return (masks[:, None] >> np.arange(count)) & 1
