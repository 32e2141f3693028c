"""The linear algebra of alternating least squares on a batch of networks that share one graph.

A *template* is a graph with one mode (of size 1 at internal vertices) on each position; a *plan* is a template
with ranks. All networks of a batch have the plan's shapes: smaller bonds are padded with zeros, which the updates
leave exactly zero. Shapes: ``B`` networks, ``P`` product of the ranks at one position, ``n`` its mode size.

One update solves ``min_G ||X_(v) - M^T G||`` for the core ``G`` [P, n] at a position, ``M`` [P, rest] being all
other cores contracted. Either ``M`` is formed (*explicit*), or ``M M^T`` and ``M X_(v)^T`` come from a binary
tree of partial contractions that each sweep walks once (*tree*); the cheaper by estimate is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from tnss.contraction import Contraction, compile_contraction

CALL_SECONDS = 8e-6  # one small torch operation on a CPU
FLOPS_PER_SECOND = 1.5e10  # one CPU core, float64; only the ratio of the two matters
RIDGE = 1e-10  # relative to the mean diagonal of the normal equations


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
        self.parameters = sum(math.prod(shape) for shape in self.shapes)

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
        """Whether the tree is the cheaper way, by an estimate of its time on one network."""
        entries = math.prod(self.template.sizes)
        steps = sum(len(contraction.steps) + 2 for contraction in self.explicit)
        flops = sum(contraction.flops for contraction in self.explicit)
        for rows, size in zip(self.rows, self.template.sizes, strict=True):
            flops += 2.0 * rows * (entries / size) * (rows + size)
        explicit_seconds = 3 * steps * CALL_SECONDS + flops / FLOPS_PER_SECOND
        if entries > 100_000:
            return True
        tree_steps, tree_flops = _tree_cost(self.tree)
        return 3 * tree_steps * CALL_SECONDS + tree_flops / FLOPS_PER_SECOND < explicit_seconds

    def sweep(
        self,
        data: torch.Tensor,
        cores: list[torch.Tensor],
        weights: torch.Tensor | None = None,
        ridge: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Update every core once, in place in the list; returns the squared error [B] after the last update.

        Args:
            data: ``X`` [B, n_0, n_1, ...], zero where the weight is zero.
            cores: one tensor [B, ranks..., n] a position.
            weights: [B, n_0, n_1, ...] or None; the error is then ``sum of weights * (X - network)^2``.
            ridge: [B], added to the normal equations times their mean diagonal; None for the smallest that
                rounding needs.
        """
        if weights is not None:
            return self._sweep_weighted(data, cores, weights, ridge)
        if self.uses_tree:
            explained = self._sweep_tree(self.tree, data, None, cores, ridge)
        else:
            for v in self.positions:
                environment = self.explicit[v]([cores[u] for u in self.positions if u != v])
                matrix = environment.reshape(len(data), self.rows[v], -1)
                unfolded = data.movedim(v + 1, -1).reshape(len(data), matrix.shape[2], -1)
                explained = self._solve(v, torch.bmm(matrix, matrix.mT), torch.bmm(matrix, unfolded), cores, ridge)
        return data.flatten(1).square().sum(1) - explained

    def _sweep_tree(
        self,
        node: _Node,
        data: torch.Tensor,
        gram: torch.Tensor | None,
        cores: list[torch.Tensor],
        ridge: torch.Tensor | None,
    ) -> torch.Tensor:
        if not node.children:
            v = node.positions[0]
            rows = self.rows[v]
            assert gram is not None
            return self._solve(v, gram.reshape(-1, rows, rows), data.reshape(len(data), rows, -1), cores, ridge)
        for child, other, to_data, to_gram in zip(
            node.children, reversed(node.children), node.data, node.gram, strict=True
        ):
            removed = [cores[v] for v in other.positions]
            doubled = [core for core in removed for _ in range(2)]
            above = [] if gram is None else [gram]
            explained = self._sweep_tree(child, to_data([data, *removed]), to_gram([*above, *doubled]), cores, ridge)
        return explained

    def _sweep_weighted(
        self, data: torch.Tensor, cores: list[torch.Tensor], weights: torch.Tensor, ridge: torch.Tensor | None
    ) -> torch.Tensor:
        batch = len(data)
        for v in self.positions:
            environment = self.explicit[v]([cores[u] for u in self.positions if u != v])
            matrix = environment.reshape(batch, self.rows[v], -1)
            weight = weights.movedim(v + 1, 1).reshape(batch, -1, matrix.shape[2])
            unfolded = data.movedim(v + 1, 1).reshape(batch, -1, matrix.shape[2])
            weighted = weight[:, :, None, :] * matrix[:, None]  # [B, n, P, rest]
            gram = torch.matmul(weighted, matrix.mT[:, None])
            right = torch.matmul(weighted, unfolded[..., None])
            repeated = None if ridge is None else ridge.repeat_interleave(gram.shape[1])
            core = _regularised_solve(gram.flatten(0, 1), right.flatten(0, 1), repeated)
            cores[v] = core.reshape(batch, -1, self.rows[v]).mT.reshape(cores[v].shape)
        return (weights * (data - self.dense(cores)).square()).flatten(1).sum(1)

    def _solve(
        self,
        position: int,
        gram: torch.Tensor,
        right: torch.Tensor,
        cores: list[torch.Tensor],
        ridge: torch.Tensor | None,
    ) -> torch.Tensor:
        core = _regularised_solve(gram, right, ridge)
        cores[position] = core.reshape(cores[position].shape)
        # ||X||^2 - ||X - M^T G||^2, true for any G, so that the ridge is accounted for
        return ((2.0 * right - torch.bmm(gram, core)) * core).flatten(1).sum(1)

    def squared_error(
        self, data: torch.Tensor, cores: list[torch.Tensor], weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Squared error [B] from the dense reconstruction: exact where :meth:`sweep` cancels."""
        residual = (data - self.dense(cores)).square()
        return (residual if weights is None else weights * residual).flatten(1).sum(1)


def _tree_cost(node: _Node) -> tuple[int, float]:
    steps = sum(len(c.steps) + 1 for c in (*node.data, *node.gram))
    flops = sum(c.flops for c in (*node.data, *node.gram))
    for child in node.children:
        child_steps, child_flops = _tree_cost(child)
        steps, flops = steps + child_steps, flops + child_flops
    return steps, flops


def _regularised_solve(gram: torch.Tensor, right: torch.Tensor, ridge: torch.Tensor | None) -> torch.Tensor:
    """Solve ``(gram + ridge) core = right``; rows that are zero (padding) give exactly zero."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    filled = (diagonal != 0).sum(1, keepdim=True).clamp_min(1)  # padding must not thin the mean out
    mean = (diagonal.sum(1, keepdim=True) / filled).clamp_min(torch.finfo(gram.dtype).tiny)
    smallest = max(RIDGE, 10 * torch.finfo(gram.dtype).eps)
    added = smallest if ridge is None else ridge.clamp_min(smallest)[:, None]
    shifted = gram.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(mean * ((diagonal == 0) + added))
    factor, info = torch.linalg.cholesky_ex(shifted)
    if info.any():  # rounding made it indefinite: a thousand times the ridge always suffices
        shifted.diagonal(dim1=1, dim2=2).add_((info != 0)[:, None] * 1e3 * smallest * mean)
        factor = torch.linalg.cholesky(shifted)
    return torch.cholesky_solve(right, factor)


def balance(cores: list[torch.Tensor]) -> None:
    """Give all cores of a network the same norm, leaving the network unchanged."""
    norms = torch.stack([core.flatten(1).norm(dim=1) for core in cores])  # [positions, B]
    logs = norms.clamp_min(torch.finfo(norms.dtype).tiny).log()
    scale = (logs.mean(0, keepdim=True) - logs).exp()
    scale = torch.where((norms == 0).any(0, keepdim=True), torch.ones_like(scale), scale)
    for v, core in enumerate(cores):
        cores[v] = core * scale[v].reshape(-1, *[1] * (core.ndim - 1))


@lru_cache(maxsize=4096)
def plan_for(template: Template, ranks: tuple[int, ...]) -> Plan:
    """The plan of a template with ranks, compiled once."""
    return Plan(template, ranks)
