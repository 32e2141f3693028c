"""Search spaces: which structures may be searched, and how one is written as a point with a few variables.

A space (:class:`Ring`, :class:`Train`, :class:`Tree`, :class:`Complete`, :class:`Graph`) is bound to mode sizes
and gives a :class:`Domain`. A point of a domain is ``(values, permutation)``: one value for each variable (ranks
first, then the parents that shape a tree) and, for each slot of the graph, the mode it holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import networkx
import numpy as np

from tnss.structure import Structure

MOST_SKELETONS = 25_000


class Point(NamedTuple):
    """One candidate: a value a variable, and the mode in each slot of the graph."""

    values: tuple[int, ...]
    permutation: tuple[int, ...]


@dataclass(frozen=True)
class Skeletons:
    """Every graph of a domain without ranks.

    Attributes:
        edges: [K, E, 2] vertices of edge ``e`` in graph ``k``.
        points: for each graph the values after the ranks, and the permutation.
        exact: False where the graphs are a superset of the domain (a bound over them holds all the same).
    """

    edges: np.ndarray
    points: list[tuple[tuple[int, ...], tuple[int, ...]]]
    exact: bool = True


@dataclass(frozen=True)
class Domain:
    """A space bound to mode sizes.

    Attributes:
        sizes: mode sizes of the tensor.
        edges: slots joined by each rank variable; None for trees, whose parents are variables too.
        lower, upper: smallest and largest value of each variable (both included).
        permute: whether the modes may be permuted over the slots.
        max_degree: most edges of rank > 1 at a vertex.
        slots: number of slots, internal ones included.
    """

    sizes: tuple[int, ...]
    edges: tuple[tuple[int, int], ...] | None
    lower: tuple[int, ...]
    upper: tuple[int, ...]
    permute: bool
    slots: int
    max_degree: int | None = None

    @property
    def order(self) -> int:
        """Number of modes."""
        return len(self.sizes)

    @property
    def ranks(self) -> int:
        """Number of variables that are ranks; they come first."""
        return self.slots - 1 if self.edges is None else len(self.edges)

    def graph_edges(self, values: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The slots that each rank joins."""
        if self.edges is not None:
            return self.edges
        parents = (0, *values[self.ranks :])
        return tuple((parent, child + 1) for child, parent in enumerate(parents))

    def decode(self, point: Point) -> Structure:
        """The structure of a point."""
        place = (*point.permutation, *range(self.order, self.slots))
        edges = self.graph_edges(point.values)
        return Structure(
            self.sizes, [(place[a], place[b], rank) for (a, b), rank in zip(edges, point.values, strict=False)]
        )

    def allows(self, point: Point) -> bool:
        """Whether a point keeps to the largest degree."""
        return self.max_degree is None or self.decode(point).max_degree <= self.max_degree

    def check(self, point: Point) -> Point:
        """The point itself; ``ValueError`` where it is not one of this domain."""
        point = Point(tuple(point[0]), tuple(point[1]))
        inside = len(point.values) == len(self.lower) and all(
            low <= value <= high for low, value, high in zip(self.lower, point.values, self.upper, strict=True)
        )
        fixed = self.permute or point.permutation == tuple(range(self.order))
        if not inside or not fixed or sorted(point.permutation) != list(range(self.order)) or not self.allows(point):
            raise ValueError(f"start: expected values in {self.lower}..{self.upper} and a permutation, got {point}")
        return point

    def random(self, generator: np.random.Generator) -> Point:
        """A point drawn uniformly; edges above the largest degree are taken out one by one."""
        values = [int(generator.integers(low, high + 1)) for low, high in zip(self.lower, self.upper, strict=True)]
        order = generator.permutation(self.order) if self.permute else range(self.order)
        point = Point(tuple(values), tuple(int(mode) for mode in order))
        while not self.allows(point):
            structure = self.decode(point)
            place = (*point.permutation, *range(self.order, self.slots))
            assert self.max_degree is not None
            crowded = {v for v, incident in enumerate(structure.incident) if len(incident) > self.max_degree}
            removable = [
                i
                for i, (a, b) in enumerate(self.graph_edges(values))
                if values[i] > 1 and self.lower[i] == 1 and {place[a], place[b]} & crowded
            ]
            values[int(generator.choice(removable))] = 1
            point = Point(tuple(values), point.permutation)
        return point

    def grid(self, point: Point, variable: int, radius: int, around: int | None = None) -> list[Point]:
        """Points that differ from ``point`` in one variable, ``point`` itself included, in ascending order.

        A rank's grid is ``[r - radius, r + radius]`` shifted into the allowed range; a parent's is its range.
        ``r`` is the point's own rank, or ``around``.
        """
        low, high = self.lower[variable], self.upper[variable]
        if variable < self.ranks:
            around = point.values[variable] if around is None else around
            first = max(low, min(around - radius, high - 2 * radius))
            low, high = first, min(high, first + 2 * radius)
        points = [
            Point((*point.values[:variable], value, *point.values[variable + 1 :]), point.permutation)
            for value in range(low, high + 1)
        ]
        return [candidate for candidate in points if candidate == point or self.allows(candidate)]

    def transpositions(self, point: Point) -> list[Point]:
        """``point`` and every point that swaps the modes of two slots."""
        points = [point]
        if self.permute:
            for i, j in itertools.combinations(range(self.order), 2):
                swapped = list(point.permutation)
                swapped[i], swapped[j] = swapped[j], swapped[i]
                points.append(Point(point.values, tuple(swapped)))
        return points

    def neighbours(self, point: Point, radius: int = 1) -> Iterator[Point]:
        """Every point one move away: one variable within its grid, or one transposition."""
        for variable in range(len(self.lower)):
            yield from (other for other in self.grid(point, variable, radius) if other != point)
        yield from self.transpositions(point)[1:]

    @cached_property
    def skeletons(self) -> Skeletons:
        """All graphs of the domain; a superset (the complete graph) where there are too many to list."""
        if self.edges is None:
            listed = _tree_skeletons(self.order)
        elif not self.permute:
            listed = [(self.edges, (), tuple(range(self.order)))]
        else:
            listed = self._permuted_skeletons()
        if listed is None:
            pairs = tuple(itertools.combinations(range(self.slots), 2))
            return Skeletons(np.array([pairs]), [((), tuple(range(self.order)))], exact=False)
        edges = np.array([entry[0] for entry in listed]).reshape(len(listed), -1, 2)
        return Skeletons(edges, [(entry[1], entry[2]) for entry in listed])

    def _permuted_skeletons(self) -> list[Any] | None:
        assert self.edges is not None
        symmetric = len(set(zip(self.lower, self.upper, strict=True))) == 1
        ring = {tuple(sorted((i, (i + 1) % self.order))) for i in range(self.order)}
        is_ring = symmetric and set(self.edges) == ring
        total = math.factorial(self.order - 1) // 2 if is_ring else math.factorial(self.order)
        if total > MOST_SKELETONS:
            return None
        internal = tuple(range(self.order, self.slots))
        if is_ring:
            orders: Iterable[tuple[int, ...]] = (
                (0, *rest) for rest in itertools.permutations(range(1, self.order)) if rest[0] < rest[-1]
            )
        else:
            orders = itertools.permutations(range(self.order))
        listed, seen = [], set()
        for order in orders:
            place = (*order, *internal)
            edges = tuple((place[a], place[b]) for a, b in self.edges)
            if not is_ring:
                bounds = zip(edges, self.lower, self.upper, strict=True)
                key = frozenset((*sorted(edge), low, high) for edge, low, high in bounds)
                if key in seen:
                    continue
                seen.add(key)
            listed.append((edges, (), order))
        return listed


def _tree_skeletons(order: int) -> list[Any] | None:
    """Labelled trees from their Pruefer sequences, rooted at vertex 0 and numbered breadth first."""
    if order ** (order - 2) > MOST_SKELETONS:
        return None
    listed = []
    for sequence in itertools.product(range(order), repeat=order - 2):
        tree = networkx.from_prufer_sequence(list(sequence))
        visited = [0, *(child for _, child in networkx.bfs_edges(tree, 0))]
        slot = {vertex: i for i, vertex in enumerate(visited)}
        parent = dict(networkx.bfs_predecessors(tree, 0))
        edges = tuple((parent[vertex], vertex) for vertex in visited[1:])
        listed.append((edges, tuple(slot[parent[vertex]] for vertex in visited[2:]), tuple(visited)))
    return listed


class Space(Protocol):
    """Anything that turns mode sizes into a domain."""

    def bind(self, sizes: Sequence[int]) -> Domain:
        """The domain for a tensor with these mode sizes; ``ValueError`` where there is none."""


def _check_rank(max_rank: int) -> None:
    if max_rank < 1:
        raise ValueError(f"max_rank: expected at least 1, got {max_rank}")


def _uniform(sizes: Sequence[int], edges: Sequence[tuple[int, int]], max_rank: int, permute: bool) -> Domain:
    pairs = tuple((min(a, b), max(a, b)) for a, b in edges)
    order = len(sizes)
    return Domain(tuple(sizes), pairs, (1,) * len(pairs), (max_rank,) * len(pairs), permute, order)


@dataclass(frozen=True)
class Ring:
    """A tensor ring: vertex ``i`` joined to ``i + 1`` and the last to the first.

    Args:
        max_rank: largest rank of a bond.
        permute: search the order of the modes on the ring as well.
    """

    max_rank: int = 8
    permute: bool = True

    def __post_init__(self) -> None:
        _check_rank(self.max_rank)

    def bind(self, sizes: Sequence[int]) -> Domain:
        """The domain for these mode sizes."""
        count = len(sizes)
        return _uniform(sizes, [(i, (i + 1) % count) for i in range(count)], self.max_rank, self.permute)


@dataclass(frozen=True)
class Train:
    """A tensor train (matrix product state); arguments as for :class:`Ring`."""

    max_rank: int = 8
    permute: bool = True

    def __post_init__(self) -> None:
        _check_rank(self.max_rank)

    def bind(self, sizes: Sequence[int]) -> Domain:
        """The domain for these mode sizes."""
        return _uniform(sizes, [(i, i + 1) for i in range(len(sizes) - 1)], self.max_rank, self.permute)


@dataclass(frozen=True)
class Tree:
    """Any tree with one mode on each vertex: shape, ranks and placement are searched.

    Args:
        max_rank: largest rank of a bond.
    """

    max_rank: int = 8

    def __post_init__(self) -> None:
        _check_rank(self.max_rank)

    def bind(self, sizes: Sequence[int]) -> Domain:
        """The domain for these mode sizes: slot ``i`` hangs on one of the slots before it."""
        count = len(sizes)
        lower = (1,) * (count - 1) + (0,) * (count - 2)
        upper = (self.max_rank,) * (count - 1) + tuple(range(1, count - 1))
        return Domain(tuple(sizes), None, lower, upper, permute=True, slots=count)


@dataclass(frozen=True)
class Complete:
    """Topology search: a rank for every pair of modes, rank 1 meaning no edge.

    Args:
        max_rank: largest rank of an edge.
        max_degree: most edges at a vertex; None for no limit.
        fixed: ranks of some edges, ``{(u, v): rank}``.
        forbidden: pairs that must not be joined.
    """

    max_rank: int = 4
    max_degree: int | None = None
    fixed: Mapping[tuple[int, int], int] = field(default_factory=dict)
    forbidden: Iterable[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        _check_rank(self.max_rank)
        if self.max_degree is not None and self.max_degree < 1:
            raise ValueError(f"max_degree: expected at least 1, got {self.max_degree}")

    def bind(self, sizes: Sequence[int]) -> Domain:
        """The domain for these mode sizes; ``ValueError`` where the constraints contradict each other."""
        pairs = tuple(itertools.combinations(range(len(sizes)), 2))
        fixed = {(min(pair), max(pair)): rank for pair, rank in self.fixed.items()}
        forbidden = {(min(pair), max(pair)) for pair in self.forbidden}
        for name, given in (("fixed", fixed.keys()), ("forbidden", forbidden)):
            unknown = sorted(given - set(pairs))
            if unknown:
                raise ValueError(f"{name}: expected pairs of modes 0..{len(sizes) - 1}, got {unknown}")
        both = sorted(pair for pair in forbidden if fixed.get(pair, 1) > 1)
        if both:
            raise ValueError(f"forbidden: expected pairs that are not fixed as well, got {both}")
        wrong = {pair: rank for pair, rank in fixed.items() if not 1 <= rank <= self.max_rank}
        if wrong:
            raise ValueError(f"fixed: expected ranks in 1..{self.max_rank} (max_rank), got {wrong}")
        if self.max_degree is not None:
            degrees = [sum(v in pair and rank > 1 for pair, rank in fixed.items()) for v in range(len(sizes))]
            if max(degrees) > self.max_degree:
                raise ValueError(f"fixed: expected at most max_degree={self.max_degree} edges a mode, got {degrees}")
        bounds = [
            (fixed[pair],) * 2 if pair in fixed else (1, 1 if pair in forbidden else self.max_rank) for pair in pairs
        ]
        lower, upper = (tuple(column) for column in zip(*bounds, strict=True))
        return Domain(tuple(sizes), pairs, lower, upper, False, len(sizes), self.max_degree)


class Graph:
    """Any fixed graph, with ranks (and the placement of the modes) searched.

    Args:
        graph: a ``networkx`` graph. Vertices with a ``mode`` attribute hold that mode, the others are internal;
            without any such attribute the first vertices hold modes 0, 1, ... in turn. An edge's ``rank``
            attribute fixes its rank.
        max_rank: largest rank of the other edges.
        permute: search which mode sits where.
    """

    def __init__(self, graph: networkx.Graph, max_rank: int = 8, permute: bool = False) -> None:
        _check_rank(max_rank)
        self.graph, self.max_rank, self.permute = graph, max_rank, permute

    def bind(self, sizes: Sequence[int]) -> Domain:
        """The domain for these mode sizes; ``ValueError`` where the graph does not hold exactly these modes."""
        count, nodes = len(sizes), list(self.graph.nodes)
        holders = {data["mode"]: node for node, data in self.graph.nodes(data=True) if "mode" in data}
        if not holders:
            holders = dict(enumerate(nodes[:count]))
        if sorted(holders) != list(range(count)):
            raise ValueError(f"graph: expected vertices for modes 0..{count - 1}, got modes {sorted(holders)}")
        slot = {node: mode for mode, node in holders.items()}
        for node in nodes:
            slot.setdefault(node, len(slot))
        edges = sorted((*sorted((slot[u], slot[v])), data.get("rank")) for u, v, data in self.graph.edges(data=True))
        if not edges or any(a == b for a, b, _ in edges):
            raise ValueError(f"graph: expected at least one edge and no loops, got edges {list(self.graph.edges)}")
        lower = tuple(1 if rank is None else rank for _, _, rank in edges)
        upper = tuple(self.max_rank if rank is None else rank for _, _, rank in edges)
        if min(lower) < 1:
            raise ValueError(f"graph: expected edge ranks of at least 1, got {min(lower)}")
        pairs = tuple((a, b) for a, b, _ in edges)
        return Domain(tuple(sizes), pairs, lower, upper, self.permute, len(slot))
