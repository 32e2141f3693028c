"""The linear algebra of alternating least squares on a batch of networks that share one graph.

A *template* is a graph with one mode (of size 1 at internal vertices) on each position; a *plan* is a template
with ranks. All networks of a batch have the plan's shapes: smaller bonds are padded with zeros, which the updates
leave exactly zero. Shapes: ``B`` networks, ``P`` product of the ranks at one position, ``n`` its mode size.

One update solves ``min_G ||X_(v) - M^T G||`` for the core ``G`` [P, n] at a position, ``M`` [P, rest] being all
other cores contracted. Either ``M`` is formed (*explicit*), or ``M M^T`` and ``M X_(v)^T`` come from a binary
tree of partial contractions that each sweep walks once (*tree*); the cheaper by estimate is taken.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from tnss.arrays import Array, Tape, permuted, solve
from tnss.contraction import Contraction, compile_contraction, multiplied, reshaped

CALL_SECONDS = 0.7e-6  # one small NumPy operation of a recorded sweep, shared by the networks of a batch
FLOPS_PER_SECOND = 0.3e10  # one CPU core, float64; only the ratio of the two matters
LARGE = 100_000  # entries of a tensor from which on the time of single operations does not matter
MOST_PARTIAL = 2**28  # entries of a partial contraction of the tree: 2 GiB in float64
RIDGE = 1e-10  # relative to the mean diagonal of the normal equations
RIDGE_SINGLE = 1.2e-6  # the same in float32
TINY = 1e-37  # keeps the equations of a network that is zero regular


@dataclass(frozen=True)
class Template:
    """Mode sizes by position, and edges between positions."""

    sizes: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]

    @cached_property
    def incident(self) -> tuple[tuple[int, ...], ...]:
        """Edges at each position."""
        return tuple(tuple(e for e, edge in enumerate(self.edges) if v in edge) for v in range(len(self.sizes)))


@dataclass(frozen=True)
class _Node:
    """A set of positions in the tree; the contractions that reach each half from its parent."""

    positions: tuple[int, ...]
    children: tuple[_Node, ...] = ()
    data: tuple[Contraction, ...] = ()  # [T of this node, cores of the other half] -> T of the child
    gram: tuple[Contraction, ...] = ()  # [E of this node, cores of the other half twice] -> E of the child


@dataclass(frozen=True)
class _Updates:
    """What the updates of all cores in a sweep share."""

    cores: list[Array]
    norm: float
    ridge: Array | None
    tape: Tape | None

    def update(self, position: int, gram: Array, right: Array) -> Array | None:
        """Solve for one core; at the last position, the squared error [B] that is then left."""
        ridge = None if self.ridge is None else self.ridge[:, position]
        squared = gram[:, 0, 0] * 0.0 if position == len(self.cores) - 1 else None
        arguments = gram, right, self.cores[position], ridge, self.norm, squared
        _update(*arguments)
        if self.tape is not None:
            self.tape.record(_update, *arguments)
        return squared


class Plan:
    """Compiled updates for one template and one set of ranks."""

    def __init__(self, template: Template, ranks: tuple[int, ...]) -> None:
        self.template, self.ranks = template, ranks
        edges, count = len(template.edges), len(template.sizes)
        self.positions = tuple(range(count))
        self._sizes = tuple(
            [(e, rank) for e, rank in enumerate(ranks)]
            + [(edges + v, size) for v, size in enumerate(template.sizes)]
            + [(edges + count + e, rank) for e, rank in enumerate(ranks)]
        )
        self._mode = [edges + v for v in self.positions]
        self._core = [(*template.incident[v], self._mode[v]) for v in self.positions]
        self._primed = [(*(edges + count + e for e in template.incident[v]), self._mode[v]) for v in self.positions]
        self.shapes = [(*(ranks[e] for e in template.incident[v]), template.sizes[v]) for v in self.positions]
        self.rows = [math.prod(shape[:-1]) for shape in self.shapes]
        lengths = [math.prod(shape) for shape in self.shapes]
        self.parameters = sum(lengths)
        self._ends = list(itertools.accumulate(lengths, initial=0))

    def split(self, flat: Array) -> list[Array]:
        """The cores of networks ``[B, parameters]`` as views, one ``[B, ranks..., n]`` a position."""
        return [
            flat[:, first:last].reshape(len(flat), *shape)
            for first, last, shape in zip(self._ends, self._ends[1:], self.shapes, strict=False)
        ]

    @cached_property
    def owner(self) -> np.ndarray:
        """1 where an entry belongs to the core at a position: [parameters, positions]."""
        return np.repeat(np.eye(len(self.positions)), np.diff(self._ends), axis=0)

    @cached_property
    def explicit(self) -> tuple[Contraction, ...]:
        """For each position: all other cores -> ``M`` [P, rest]."""
        return tuple(
            compile_contraction(
                tuple(self._core[u] for u in self.positions if u != v),
                (*self._core[v][:-1], *(self._mode[u] for u in self.positions if u != v)),
                self._sizes,
            )
            for v in self.positions
        )

    @cached_property
    def tree(self) -> _Node:
        """The binary tree over positions."""
        return self._node(self.positions, tuple(self._mode), None)

    @cached_property
    def dense(self) -> Contraction:
        """All cores -> the dense tensor."""
        return compile_contraction(tuple(self._core), tuple(self._mode), self._sizes)

    def _open(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        inside = set(positions)
        return tuple(e for e, (u, v) in enumerate(self.template.edges) if (u in inside) != (v in inside))

    def _node(self, positions: tuple[int, ...], data: tuple[int, ...], gram: tuple[int, ...] | None) -> _Node:
        if len(positions) == 1:
            return _Node(positions)
        half = len(positions) // 2
        prime = len(self.template.edges) + len(self.template.sizes)
        children, data_steps, gram_steps = [], [], []
        for kept, removed in ((positions[:half], positions[half:]), (positions[half:], positions[:half])):
            open_ = self._open(kept) if len(kept) > 1 else self.template.incident[kept[0]]
            child_data = (*open_, *(self._mode[v] for v in kept))
            child_gram = (*open_, *(prime + e for e in open_))
            inputs = tuple(self._core[v] for v in removed)
            doubled = tuple(term for v in removed for term in (self._core[v], self._primed[v]))
            data_steps.append(compile_contraction((data, *inputs), child_data, self._sizes))
            above = () if gram is None else (gram,)
            gram_steps.append(compile_contraction((*above, *doubled), child_gram, self._sizes))
            children.append(self._node(kept, child_data, child_gram))
        return _Node(positions, tuple(children), tuple(data_steps), tuple(gram_steps))

    @cached_property
    def uses_tree(self) -> bool:
        """Whether the tree is the cheaper way, by an estimate of its time on one network.

        Of large tensors it is, while its partial contractions fit: several bonds between the halves of a graph with
        chords, once for ``M`` and once for its transpose, can be far more than ``M`` itself.
        """
        entries = math.prod(self.template.sizes)
        if entries > LARGE:
            held = _tree_peak(self.tree)
            return held <= MOST_PARTIAL or held <= self._explicit_peak
        steps = sum(len(contraction.steps) + 2 for contraction in self.explicit)
        flops = sum(contraction.flops for contraction in self.explicit)
        for rows, size in zip(self.rows, self.template.sizes, strict=True):
            flops += 2.0 * rows * (entries / size) * (rows + size)
        explicit_seconds = 3 * steps * CALL_SECONDS + flops / FLOPS_PER_SECOND
        tree_seconds = 3 * _tree_steps(len(self.positions)) * CALL_SECONDS
        if tree_seconds >= explicit_seconds:  # without its arithmetic: its paths, which take longest, are not needed
            return False
        return tree_seconds + _tree_flops(self.tree) / FLOPS_PER_SECOND < explicit_seconds

    @cached_property
    def peak(self) -> float:
        """Entries of the largest partial contraction of a sweep of one network."""
        return _tree_peak(self.tree) if self.uses_tree else self._explicit_peak

    @property
    def _explicit_peak(self) -> float:
        return max(contraction.peak for contraction in self.explicit)

    def sweep(
        self,
        data: Array,
        cores: list[Array],
        norm: float,
        weights: Array | None = None,
        ridge: Array | None = None,
        tape: Tape | None = None,
    ) -> Array:
        """Update every core once, in place; returns the squared error [B] after the last update.

        Args:
            data: ``X`` [B, n_0, n_1, ...], zero where the weight is zero; B is 1 where all networks share it.
            cores: one array [B, ranks..., n] a position.
            norm: squared norm of ``X`` (not used with weights).
            weights: as ``data``, or None; the error is then ``sum of weights * (X - network)^2``.
            ridge: [B, positions], added to the normal equations times their trace; None for the smallest that
                rounding needs.
            tape: records the sweep where all of these are NumPy arrays and there are no weights: a replay is one
                more sweep of the same cores, and puts its squared error into the array returned here.
        """
        if weights is not None:
            return self._sweep_weighted(data, cores, weights, ridge)
        updates = _Updates(cores, norm, ridge, tape)
        return self._sweep_tree(self.tree, data, None, updates) if self.uses_tree else self._sweep_each(data, updates)

    def _sweep_each(self, data: Array, updates: _Updates) -> Array:
        squared, tape = None, updates.tape
        for v in self.positions:
            environment = self.explicit[v]([updates.cores[u] for u in self.positions if u != v], tape)
            matrix = reshaped(environment, (len(environment), self.rows[v], -1), tape)
            right = multiplied(matrix, self._unfolded(data, v).swapaxes(1, 2), tape)
            squared = updates.update(v, multiplied(matrix, matrix.swapaxes(1, 2), tape), right)
        return squared

    def _unfolded(self, data: Array, position: int) -> Array:
        """[B, n, rest]."""
        axes = [0, position + 1, *(u + 1 for u in self.positions if u != position)]
        return permuted(data, axes).reshape(len(data), self.template.sizes[position], -1)

    def _sweep_tree(self, node: _Node, data: Array, gram: Array | None, updates: _Updates) -> Array:
        tape = updates.tape
        if not node.children:
            rows = self.rows[node.positions[0]]
            assert gram is not None
            right = reshaped(data, (len(data), rows, -1), tape)
            return updates.update(node.positions[0], reshaped(gram, (-1, rows, rows), tape), right)
        squared = None
        for child, other, to_data, to_gram in zip(
            node.children, reversed(node.children), node.data, node.gram, strict=True
        ):
            removed = [updates.cores[v] for v in other.positions]
            doubled = [core for core in removed for _ in range(2)]
            above = [] if gram is None else [gram]
            squared = self._sweep_tree(
                child, to_data([data, *removed], tape), to_gram([*above, *doubled], tape), updates
            )
        return squared

    def _sweep_weighted(self, data: Array, cores: list[Array], weights: Array, ridge: Array | None) -> Array:
        for v in self.positions:
            environment = self.explicit[v]([cores[u] for u in self.positions if u != v])
            matrix = environment.reshape(len(environment), 1, self.rows[v], -1)
            weighted = self._unfolded(weights, v)[:, :, None] * matrix  # [B, n, P, rest]
            gram = weighted @ matrix.swapaxes(2, 3)
            right = weighted @ self._unfolded(data, v)[..., None]
            batch, size, rows, _ = gram.shape
            repeated = None if ridge is None else ridge[[b for b in range(batch) for _ in range(size)], v]
            core = _regularised_solve(gram.reshape(-1, rows, rows), right.reshape(-1, rows, 1), repeated)
            cores[v][...] = core.reshape(batch, size, rows).swapaxes(1, 2).reshape(cores[v].shape)
        return self.squared_error(data, cores, weights)

    def squared_error(self, data: Array, cores: list[Array], weights: Array | None = None) -> Array:
        """Squared error [B] from the dense reconstruction: exact where :meth:`sweep` cancels."""
        residual = (data - self.dense(cores)) ** 2
        residual = residual if weights is None else weights * residual
        return residual.reshape(len(residual), -1).sum(1)


def _tree_steps(positions: int, above: int = 0) -> int:
    """Calls of one walk of the tree: pairs contracted, and one more for each contraction; ``above``: 0 at the root."""
    if positions == 1:
        return 0
    half = positions // 2
    return sum(
        (removed + 1) + (2 * removed + above) + _tree_steps(positions - removed, 1)
        for removed in (positions - half, half)
    )


def _tree_flops(node: _Node) -> float:
    return sum(c.flops for c in (*node.data, *node.gram)) + sum(map(_tree_flops, node.children))


def _tree_peak(node: _Node) -> float:
    """Entries of the largest partial contraction of a node and of those below it."""
    own = [contraction.peak for contraction in (*node.data, *node.gram)]
    return max([*own, *map(_tree_peak, node.children)], default=0.0)


def smallest_ridge(array: Array) -> float:
    """The ridge that rounding needs, relative to the mean diagonal of the normal equations."""
    return RIDGE if array.itemsize == 8 else RIDGE_SINGLE


def _update(gram: Array, right: Array, core: Array, ridge: Array | None, norm: float, squared: Array | None) -> None:
    """Solve the normal equations for one core; put the squared error that is left into ``squared`` if it is given."""
    solution = _regularised_solve(gram, right, ridge)
    core[...] = solution.reshape(core.shape)
    if squared is not None:
        # ||X||^2 - ||X - M^T G||^2 is true for any G, so that the ridge is accounted for
        squared[...] = norm - ((2.0 * right - gram @ solution) * solution).sum((1, 2))


def _regularised_solve(gram: Array, right: Array, ridge: Array | None) -> Array:
    """Solve ``(gram + ridge * trace) core = right``; rows that are zero (padding) give exactly zero."""
    batch, rows, _ = gram.shape
    shifted = gram.reshape(batch, -1) + 0.0
    diagonal = shifted[:, :: rows + 1]
    added = diagonal.sum(1) * (smallest_ridge(gram) / rows if ridge is None else ridge)
    diagonal += added[:, None] + TINY
    return solve(shifted.reshape(gram.shape), right)


@lru_cache(maxsize=4096)
def plan_for(template: Template, ranks: tuple[int, ...]) -> Plan:
    """The plan of a template with ranks, compiled once."""
    return Plan(template, ranks)
