"""Tensor-network structures: a graph with a rank on each edge and at most one mode on each vertex.

Vertex ``i < order`` holds mode ``i`` of the tensor; vertices from ``order`` on are internal and hold none.
Edges of rank 1 are no edges and are dropped, so the mode permutation of a ring, its rotations and its
reflections all disappear in one labelled edge list: equal structures are equal objects.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import networkx
import opt_einsum

Edge = tuple[int, int, int]
CostKind = Literal["parameters", "flops", "memory"]


@dataclass(frozen=True)
class Structure:
    """A tensor network without its numbers: mode sizes and ``(vertex, vertex, rank)`` edges.

    The constructor brings the edges to canonical form: end points ascending, parallel edges merged into one
    (their ranks multiply), rank 1 dropped, edges sorted, internal vertices relabelled so that isomorphic
    structures (modes fixed) compare and hash equal.

    Args:
        sizes: the sizes of the tensor's modes, all at least 1.
        edges: ``(u, v, rank)`` with distinct vertices ``u``, ``v`` and ``rank >= 1``.

    Raises:
        ValueError: a size or rank below 1, a loop, a negative vertex.
    """

    sizes: tuple[int, ...]
    edges: tuple[Edge, ...]

    def __init__(self, sizes: Iterable[int], edges: Iterable[Sequence[int]]) -> None:
        sizes = tuple(int(size) for size in sizes)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes: expected at least one mode size, each at least 1, got {sizes}")
        merged: dict[tuple[int, int], int] = {}
        for first, second, rank in edges:
            u, v = sorted((int(first), int(second)))
            if u == v or u < 0 or rank < 1:
                raise ValueError(f"edges: expected (u, v, rank), u != v, rank >= 1, got {(first, second, rank)}")
            if rank > 1:
                merged[u, v] = merged.get((u, v), 1) * int(rank)
        kept = tuple(sorted((u, v, rank) for (u, v), rank in merged.items()))
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "edges", _canonical_internal_vertices(len(sizes), kept))

    @property
    def order(self) -> int:
        """Number of modes."""
        return len(self.sizes)

    @cached_property
    def vertices(self) -> int:
        """Number of vertices, internal ones included."""
        return max([self.order, *(edge[1] + 1 for edge in self.edges)])

    @property
    def entries(self) -> int:
        """Number of entries of the dense tensor."""
        return math.prod(self.sizes)

    @cached_property
    def incident(self) -> tuple[tuple[int, ...], ...]:
        """For each vertex the positions in ``edges`` of its edges, ascending: the axes of its core."""
        return tuple(
            tuple(position for position, edge in enumerate(self.edges) if vertex in edge[:2])
            for vertex in range(self.vertices)
        )

    @cached_property
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each core: the ranks of its edges in the order of ``edges``, then its mode, if any."""
        return tuple(
            tuple(self.edges[position][2] for position in incident) + self.sizes[vertex : vertex + 1]
            for vertex, incident in enumerate(self.incident)
        )

    @cached_property
    def parameters(self) -> int:
        """Number of entries of all cores."""
        return sum(math.prod(shape) for shape in self.core_shapes)

    @property
    def compression(self) -> float:
        """Parameters over entries of the dense tensor (the literature's CR; small is good)."""
        return self.parameters / self.entries

    @property
    def max_degree(self) -> int:
        """Largest number of edges at one vertex."""
        return max(len(incident) for incident in self.incident)

    def einsum(self) -> str:
        """Einsum equation from the cores to the dense tensor (``opt_einsum`` symbols)."""
        edges = len(self.edges)
        terms = [
            "".join(map(opt_einsum.get_symbol, incident))
            + (opt_einsum.get_symbol(edges + vertex) if vertex < self.order else "")
            for vertex, incident in enumerate(self.incident)
        ]
        return ",".join(terms) + "->" + "".join(opt_einsum.get_symbol(edges + i) for i in range(self.order))

    def cost(self, kind: CostKind = "parameters") -> float:
        """Cost of storing or of contracting the network to the dense tensor.

        Args:
            kind: ``"parameters"``; ``"flops"`` of the contraction path opt_einsum finds; ``"memory"``, the
                entries of the largest intermediate of that path.

        Raises:
            ValueError: an unknown kind.
        """
        if kind == "parameters":
            return float(self.parameters)
        if kind not in ("flops", "memory"):
            raise ValueError(f"kind: expected 'parameters', 'flops' or 'memory', got {kind!r}")
        _, report = opt_einsum.contract_path(self.einsum(), *self.core_shapes, shapes=True)
        return float(report.opt_cost if kind == "flops" else report.largest_intermediate)

    def permuted(self, permutation: Sequence[int]) -> Structure:
        """The structure of ``tensor.transpose(permutation)``: new mode ``i`` is old mode ``permutation[i]``."""
        if sorted(permutation) != list(range(self.order)):
            raise ValueError(f"permutation: expected an order of 0..{self.order - 1}, got {tuple(permutation)}")
        position = {old: new for new, old in enumerate(permutation)}
        return Structure(
            [self.sizes[old] for old in permutation],
            [(position.get(u, u), position.get(v, v), rank) for u, v, rank in self.edges],
        )

    def to_networkx(self) -> networkx.Graph:
        """The graph, with ``mode`` and ``size`` on its vertices and ``rank`` on its edges."""
        graph = networkx.Graph()
        for vertex in range(self.vertices):
            attributes = {"mode": vertex, "size": self.sizes[vertex]} if vertex < self.order else {}
            graph.add_node(vertex, **attributes)
        graph.add_edges_from((u, v, {"rank": rank}) for u, v, rank in self.edges)
        return graph

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON: ``{"sizes": [...], "edges": [[u, v, rank], ...]}``."""
        return {"sizes": list(self.sizes), "edges": [list(edge) for edge in self.edges]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Structure:
        """The inverse of :meth:`to_dict`; raises ``ValueError`` on anything else."""
        try:
            return cls(data["sizes"], [tuple(edge) for edge in data["edges"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"data: expected {{'sizes': [...], 'edges': [[u, v, rank], ...]}}: {error}") from error

    @cached_property
    def key(self) -> str:
        """Compact JSON, the same for equal structures: the name in caches and histories."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    def __str__(self) -> str:
        bonds = " ".join(f"{u}-{v}:{rank}" for u, v, rank in self.edges) or "no edges"
        return f"{bonds} ({self.parameters} parameters)"


def _canonical_internal_vertices(order: int, edges: tuple[Edge, ...]) -> tuple[Edge, ...]:
    """Relabel internal vertices ``order, order + 1, ...`` in an order that does not depend on their names.

    Colours are refined until stable; only vertices that refinement cannot tell apart are tried in every order.
    """
    internal = sorted({vertex for edge in edges for vertex in edge[:2] if vertex >= order})
    if not internal:
        return edges
    colours: dict[int, Any] = {v: v if v < order else order for edge in edges for v in edge[:2]}
    for _ in internal:
        seen = {w: sorted((rank, colours[v if u == w else u]) for u, v, rank in edges if w in (u, v)) for w in internal}
        signatures = {w: (colours[w], tuple(seen[w])) for w in internal}
        ranking = {signature: order + i for i, signature in enumerate(sorted(set(signatures.values())))}
        colours.update({w: ranking[signatures[w]] for w in internal})
    ordered = sorted(internal, key=lambda w: colours[w])
    groups = [list(group) for _, group in itertools.groupby(ordered, key=lambda w: colours[w])]
    candidates = []
    for arrangement in itertools.product(*(itertools.permutations(group) for group in groups)):
        names = {w: order + i for i, w in enumerate(itertools.chain(*arrangement))}
        renamed = [(names.get(u, u), names.get(v, v), rank) for u, v, rank in edges]
        candidates.append(tuple(sorted((min(u, v), max(u, v), rank) for u, v, rank in renamed)))
    return min(candidates)
