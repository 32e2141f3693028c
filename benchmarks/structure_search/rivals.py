"""Solvers and methods of others, written anew from their papers, to compare with."""

import itertools
from dataclasses import dataclass

import numpy as np
import opt_einsum
import torch

from tnss import Structure
from tnss.sweeps import Plan, Template


def adam(
    tensor: torch.Tensor, structure: Structure, seed: int, steps: int = 10_000, restarts: int = 2
) -> tuple[float, int]:
    """The inner solver of the TnALE authors: Adam, learning rate 1e-3, cores N(0, 0.1^2), stop at RSE 1e-8.

    Returns:
        The least RSE over the restarts, and the steps made.
    """
    data = tensor.to(torch.float32)
    data = data / data.square().mean().sqrt()
    norm = data.square().sum()
    contract = opt_einsum.contract_expression(structure.einsum(), *structure.core_shapes)
    best, made = float("inf"), 0
    for restart in range(restarts):
        generator = torch.Generator().manual_seed(1000 * seed + restart)
        cores = [(0.1 * torch.randn(shape, generator=generator)).requires_grad_() for shape in structure.core_shapes]
        optimiser = torch.optim.Adam(cores, lr=1e-3)
        for _ in range(steps):
            optimiser.zero_grad()
            loss = (contract(*cores) - data).square().sum() / norm
            loss.backward()
            optimiser.step()
            made += 1
            best = min(best, loss.item())
            if best < 1e-8:
                return best, made
    return best, made


@dataclass(frozen=True)
class SVDinsTN:
    """SVDinsTN (arXiv 2305.14912): one regularised fit on the complete graph with a diagonal factor on each edge.

    ``min ||X - TN(G; S)||^2 + mu sum ||G||^2 + gamma sum |S|_1`` by proximal alternating minimisation: closed form
    for each ``G`` (eq. 8), soft-thresholded gradient steps for each ``S`` (eq. 11). Edges whose factors vanish go;
    the rank of the others is the number of factors left. The structure is then fitted like any other.

    Args:
        gamma: weight of the diagonal factors relative to ``||X||``.
        mu: weight of the cores.
        iterations: most rounds over all factors; fewer where a round moves the cores by less than 1e-5.
        max_rank: rank of each edge at the start.
    """

    gamma: float
    mu: float = 1e-3
    iterations: int = 150
    max_rank: int = 3

    def structure(self, tensor: torch.Tensor, seed: int) -> Structure:
        """The structure that is left."""
        data = (tensor / tensor.norm()).numpy()
        edges = tuple(itertools.combinations(range(data.ndim), 2))
        template = Template(data.shape, edges)
        plan = Plan(template, tuple(min(self.max_rank, data.shape[u], data.shape[v]) for u, v in edges))
        generator = np.random.default_rng(seed)
        factors = [generator.random(rank) for rank in plan.ranks]
        cores = [generator.standard_normal((1, *shape)) for shape in plan.shapes]
        scale = np.linalg.norm(plan.dense(cores)) ** (-1.0 / len(cores))  # the network begins as large as the tensor
        cores = [scale * core for core in cores]
        for iteration in range(self.iterations):
            before = [core.copy() for core in cores]
            for v in plan.positions:
                self._update(plan, v, data, cores, factors)
            moved = sum(float(np.square(a - b).sum()) for a, b in zip(cores, before, strict=True))
            if moved < 1e-10 * sum(float(np.square(core).sum()) for core in cores):
                break
            if iteration % 5 == 4:
                plan = _pruned(template, cores, factors)
        kept = [int((np.abs(factor) > 1e-3 * np.abs(factor).max()).sum()) for factor in factors]
        return Structure(data.shape, [(u, v, rank) for (u, v), rank in zip(edges, kept, strict=True)])

    def _update(self, plan: Plan, v: int, data: np.ndarray, cores: list[np.ndarray], factors: list[np.ndarray]) -> None:
        """Update the core at a vertex, then the factors of the edges to later vertices, in place.

        The factor of an edge counts to its first end, so that one contraction of the others serves them all.
        """
        first = [[e for e in plan.template.incident[u] if plan.template.edges[e][0] == u] for u in plan.positions]
        others = [cores[u] * _diagonal(plan, u, {e: factors[e] for e in first[u]}) for u in plan.positions if u != v]
        matrix = plan.explicit[v](others).reshape(plan.rows[v], -1)
        unfolded = np.moveaxis(data, v, -1).reshape(matrix.shape[1], -1)
        scaled = _diagonal(plan, v, {e: factors[e] for e in first[v]}).reshape(-1, 1) * matrix
        proximal = 1e-3
        gram = scaled @ scaled.T + (self.mu + proximal) * np.eye(plan.rows[v])
        flat = np.linalg.solve(gram, scaled @ unfolded + proximal * cores[v].reshape(plan.rows[v], -1))
        cores[v] = flat.reshape(cores[v].shape)
        for e in first[v]:
            rest = cores[v] * _diagonal(plan, v, {other: factors[other] for other in first[v] if other != e})
            axis = 1 + plan.template.incident[v].index(e)
            parts = np.moveaxis(rest, axis, 0).reshape(len(factors[e]), -1, data.shape[v])
            rows = np.moveaxis(matrix.reshape(*rest.shape[1:-1], -1), axis - 1, 0).reshape(*parts.shape[:2], -1)
            basis = (rows.swapaxes(1, 2) @ parts).reshape(len(parts), -1)
            factors[e] = self._factor(basis @ basis.T, basis @ unfolded.ravel(), factors[e])

    def _factor(self, gram: np.ndarray, right: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Proximal gradient steps; the largest entry is not thresholded, as an edge without one is a zero tensor."""
        step = 1.0 / float(np.linalg.norm(gram, 2) + 1e-9)
        for _ in range(10):
            moved = factor - step * (gram @ factor - right)
            factor = np.sign(moved) * (np.abs(moved) - step * self.gamma).clip(0.0)
            largest = int(np.abs(moved).argmax())
            factor[largest] = moved[largest]
        return factor


def _pruned(template: Template, cores: list[np.ndarray], factors: list[np.ndarray]) -> Plan:
    """Take out what vanished, in place; the plan of what is left."""
    for e, factor in enumerate(factors):
        keep = np.flatnonzero(factor)
        factors[e] = factor[keep]
        for v in template.edges[e]:
            cores[v] = cores[v].take(keep, axis=1 + template.incident[v].index(e))
    return Plan(template, tuple(len(factor) for factor in factors))


def _diagonal(plan: Plan, v: int, factors: dict[int, np.ndarray]) -> np.ndarray:
    """Product of factors on the axes of a core, to multiply it with: [1, ranks..., 1]."""
    product = np.ones((1, *plan.shapes[v][:-1], 1))
    for e, factor in factors.items():
        shape = [1] * product.ndim
        shape[1 + plan.template.incident[v].index(e)] = -1
        product = product * factor.reshape(shape)
    return product
