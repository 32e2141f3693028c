"""Branch and bound over a domain: structures in ascending order of their lower bound, and a proof of what is left.

A box is a graph with an interval for each rank. No structure in it has an objective below that of the fewest
parameters (all ranks at their lowest) with the least RSE bound (all ranks at their highest), because objectives
never fall in either. Boxes are split best first, so the structures come out in ascending order of their bound, and
at any moment the smallest key left is a bound for everything that has not come out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from tnss.objective import Objective
from tnss.space import Domain, Point
from tnss.spectrum import Spectrum, crossing

BATCH = 256
ROOT_CHUNK = 1024


class BoundSearch:
    """Best-first search for the structures with the lowest bounds.

    Attributes:
        cutoff: boxes whose bound is not below this are dropped; the caller lowers it to the best objective that
            a fit has reached. Whatever is dropped cannot beat that fit.
        nodes: boxes evaluated so far, a box of a ring of order 8 being 1 and others as their work is to that.
    """

    def __init__(self, domain: Domain, spectrum: Spectrum, objective: Objective) -> None:
        self.domain, self.spectrum, self.objective = domain, spectrum, objective
        self.entries = int(np.prod(domain.sizes))
        self.cutoff = float("inf")
        self.nodes = 0.0
        self._skeletons = domain.skeletons
        self._masks, self._cut = spectrum.vertex_cuts(domain.slots)
        edges = self._skeletons.edges
        self._weight = max(1.0, len(self._masks) * edges.shape[1] / (127 * 8))
        if self._skeletons.exact:
            self._low, self._high = np.array(domain.lower[: domain.ranks]), np.array(domain.upper[: domain.ranks])
        else:
            self._low = np.ones(edges.shape[1], dtype=np.int64)
            self._high = np.full(edges.shape[1], max(domain.upper[: domain.ranks]))
        self._heap: list[tuple[float, int, int, np.ndarray, np.ndarray]] = []
        self._count = 0
        self._started = False
        self._emitted: list[tuple[float, Point]] = []

    @property
    def proposes(self) -> bool:
        """Whether the structures that come out are points of the domain (there were few enough graphs)."""
        return self._skeletons.exact

    def lower(self) -> float:
        """No structure of the domain has an objective below the smaller of this and the cutoff."""
        return min([self.remaining(), *(bound for bound, _ in self._emitted)])

    def unfitted(self, is_fitted: Callable[[Point], bool]) -> float:
        """As :meth:`lower`, for the structures of which ``is_fitted`` does not hold."""
        return min([self.remaining(), *(bound for bound, point in self._emitted if not is_fitted(point))])

    def impossible(self) -> bool:
        """Whether the bound shows that no structure of the domain has a finite objective."""
        self._open_roots()
        return not self._heap

    def remaining(self) -> float:
        """As :meth:`lower`, for the structures that have not come out of :meth:`next`."""
        self._open_roots()
        return self._heap[0][0] if self._heap else float("inf")

    def next(self, nodes: float) -> Point | None:
        """The structure with the next lowest bound below the cutoff.

        Args:
            nodes: most boxes to evaluate in this call.

        Returns:
            A point; None where nothing below the cutoff is left, or the nodes are spent.
        """
        limit = self.nodes + nodes
        self._open_roots()
        while self._heap and self._heap[0][0] < self.cutoff:
            key, _, graph, low, high = self._heap[0]
            if (low == high).all():
                if not self.proposes:
                    return None
                heapq.heappop(self._heap)
                extra, permutation = self._skeletons.points[graph]
                point = Point((*(int(rank) for rank in low), *extra), permutation)
                if self.domain.allows(point):
                    self._emitted.append((key, point))
                    return point
                continue
            if self.nodes >= limit:
                return None
            self._expand()
        self._heap = []
        return None

    def _open_roots(self) -> None:
        if self._started:
            return
        self._started = True
        count = len(self._skeletons.edges)
        for first in range(0, count, ROOT_CHUNK):
            graphs = np.arange(first, min(count, first + ROOT_CHUNK))
            shape = (len(graphs), len(self._low))
            low, high = np.broadcast_to(self._low, shape).copy(), np.broadcast_to(self._high, shape).copy()
            self._push(graphs, low, high, np.zeros(len(graphs)))

    def _expand(self) -> None:
        """Split the best boxes, each along the edge whose two halves have the highest lower key."""
        boxes: list[tuple[float, int, int, np.ndarray, np.ndarray]] = []
        while self._heap and len(boxes) < BATCH and self._heap[0][0] < self.cutoff:
            if (self._heap[0][3] == self._heap[0][4]).all():
                break
            boxes.append(heapq.heappop(self._heap))
        parent, graph, low, high = (np.array([box[column] for box in boxes]) for column in (0, 2, 3, 4))
        edges = self._skeletons.edges[graph]
        crossed = crossing(self._masks, edges)
        middle = (low + high) // 2
        log_high = np.log(high)
        products = (crossed * log_high[:, None]).sum(2)
        rse = self.spectrum.tails[self._cut, self.spectrum.column(products)].max(1)
        drop = (log_high - np.log(np.maximum(middle, 1)))[:, :, None] * crossed.transpose(0, 2, 1)
        rse_small = self.spectrum.tails[self._cut, self.spectrum.column(products[:, None] - drop)].max(2)
        parameters, at_ends = self._parameters(edges, low)
        parameters_large = parameters[:, None] + ((middle + 1) / low - 1) * at_ends
        small = self.objective.value(parameters[:, None], rse_small, self.entries)
        large = self.objective.value(parameters_large, rse[:, None], self.entries)
        open_ = high > low
        worse, better = np.minimum(small, large), np.maximum(small, large)
        cap = 1e300
        score = np.minimum(worse, cap) + 1e-3 * np.minimum(better, cap) + 1e-9 * (high - low)
        edge = np.where(open_, score, -1.0).argmax(1)
        rows = np.arange(len(graph))
        low_large, high_small = low.copy(), high.copy()
        high_small[rows, edge] = middle[rows, edge]
        low_large[rows, edge] = middle[rows, edge] + 1
        self._push(graph, low, high_small, parent)
        self._push(graph, low_large, high, parent)

    def _parameters(self, edges: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Parameters [B] of graphs with ranks [B, E], and the part [B, E] in the two cores at each edge.

        Internal vertices that would vanish (all their ranks 1) count nothing.
        """
        vertices = np.arange(self.domain.slots)
        at = (edges[:, :, 0, None] == vertices) | (edges[:, :, 1, None] == vertices)  # [B, E, V]
        cores = np.where(at, ranks[:, :, None], 1).prod(1, dtype=float)
        sizes = np.ones(self.domain.slots)
        sizes[: self.domain.order] = self.domain.sizes
        cores = cores * sizes
        at_ends = (at * cores[:, None]).sum(2)
        if self.domain.slots > self.domain.order:
            internal = cores[:, self.domain.order :]
            return cores.sum(1) - np.where(internal == 1, 1.0, 0.0).sum(1), at_ends
        return cores.sum(1), at_ends

    def _push(self, graph: np.ndarray, low: np.ndarray, high: np.ndarray, parent: np.ndarray) -> None:
        """Tighten boxes as far as the cutoff allows, evaluate them, and queue those below it."""
        self.nodes += len(graph) * self._weight
        edges = self._skeletons.edges[graph]
        crossed = crossing(self._masks, edges)
        if np.isfinite(self.cutoff):
            low, high = self._tighten(edges, crossed, low, high)
        valid = (low <= high).all(1)
        high = np.maximum(high, low)
        products = (crossed * np.log(high)[:, None]).sum(2)
        rse = self.spectrum.tails[self._cut, self.spectrum.column(products)].max(1)
        parameters, _ = self._parameters(edges, low)
        keys = np.maximum(self.objective.value(parameters, rse, self.entries), parent)
        for i in np.flatnonzero(valid & (keys < self.cutoff)):
            self._count += 1
            heapq.heappush(self._heap, (float(keys[i]), self._count, int(graph[i]), low[i], high[i]))

    def _tighten(
        self, edges: np.ndarray, crossed: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raise lower and cut upper ends that no structure below the cutoff can have."""
        for _ in range(2):
            parameters, at_ends = self._parameters(edges, low)
            limit = self.objective.rse_limit(parameters, self.cutoff, self.entries)
            needed = self._needed_ranks(limit)
            log_high = np.log(np.maximum(high, 1))
            missing = np.log(needed) - (crossed * log_high[:, None]).sum(2)
            lift = np.where(crossed, missing[:, :, None] + log_high[:, None], 0.0).max(1, initial=0.0)
            low = np.maximum(low, np.ceil(np.exp(np.minimum(lift, 40.0)) - 1e-9).astype(np.int64))
            high = np.maximum(high, 1)
            products = (crossed * np.log(high)[:, None]).sum(2)
            rse = self.spectrum.tails[self._cut, self.spectrum.column(products)].max(1)
            parameters, at_ends = self._parameters(edges, low)
            room = self.objective.parameter_limit(rse, self.cutoff, self.entries) - parameters
            highest = np.floor(low * (1 + room[:, None] / at_ends) + 1e-9)
            high = np.minimum(high, np.clip(highest, 0, 2**31).astype(np.int64))
            # a box that contradicts itself (low > high) stays so: the caller drops it
            contradictory = np.asarray(np.any(low > high, axis=1))
            high = np.where(contradictory[:, None], 0, high)
            if bool(contradictory.all()):
                break
        return low, high

    def _needed_ranks(self, limit: np.ndarray) -> np.ndarray:
        """Smallest product of ranks with a tail of at most ``limit`` [B], for each cut: [B, vertex cuts]."""
        tails = self.spectrum.tails
        needed = np.empty((len(limit), len(tails)))
        for row, tail in enumerate(tails):
            needed[:, row] = np.searchsorted(-tail, -limit, side="left")
        return np.maximum(needed, 1.0)[:, self._cut]
