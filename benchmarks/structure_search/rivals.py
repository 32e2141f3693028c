"""Solvers and methods of others, written anew from their papers, to compare with."""

import time
from dataclasses import dataclass

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
    for each ``G`` (eq. 8), a soft-thresholded gradient step for each ``S`` (eq. 11). Edges whose factors vanish go;
    the rank of the others is the number of factors left. The structure is then fitted like any other.

    Args:
        gamma: weight of the diagonal factors relative to ``||X||``.
        mu: weight of the cores.
        iterations: rounds over all factors.
        max_rank: rank of each edge at the start.
    """

    gamma: float
    mu: float = 1e-3
    iterations: int = 150
    max_rank: int = 3

    def structure(self, tensor: torch.Tensor, seed: int) -> tuple[Structure, float]:
        """The structure that is left, and the seconds it took."""
        began = time.perf_counter()
        order = tensor.ndim
        data = (tensor / tensor.norm())[None]
        edges = tuple((u, v) for u in range(order) for v in range(u + 1, order))
        sizes = tuple(tensor.shape)
        ranks = tuple(min(self.max_rank, sizes[u], sizes[v]) for u, v in edges)
        plan = Plan(Template(sizes, edges), ranks)
        generator = torch.Generator().manual_seed(seed)
        cores = [torch.rand(1, *shape, generator=generator, dtype=torch.float64) for shape in plan.shapes]
        for v, core in enumerate(cores):
            cores[v] = core / core.norm()
        factors = [torch.rand(rank, generator=generator, dtype=torch.float64) for rank in ranks]
        for _ in range(self.iterations):
            for v in plan.positions:
                self._update_core(plan, v, data, cores, factors)
            for e in range(len(edges)):
                factors[e] = self._updated_factor(plan, e, data, cores, factors)
        kept = [int((factor.abs() > 1e-3 * max(float(f.abs().max()) for f in factors)).sum()) for factor in factors]
        found = Structure(sizes, [(u, v, max(1, rank)) for (u, v), rank in zip(edges, kept, strict=True)])
        return found, time.perf_counter() - began

    def _scaled(
        self, plan: Plan, cores: list[torch.Tensor], factors: list[torch.Tensor], skip: int | None = None
    ) -> list[torch.Tensor]:
        """Cores with the factor of each edge multiplied into its first end (``skip``: but not this edge)."""
        scaled = list(cores)
        for e, (u, _) in enumerate(plan.template.edges):
            if e != skip:
                axis = 1 + plan.template.incident[u].index(e)
                shape = [1] * scaled[u].ndim
                shape[axis] = -1
                scaled[u] = scaled[u] * factors[e].reshape(shape)
        return scaled

    def _update_core(
        self, plan: Plan, v: int, data: torch.Tensor, cores: list[torch.Tensor], factors: list[torch.Tensor]
    ) -> None:
        scaled = self._scaled(plan, cores, factors)
        matrix = plan.explicit[v]([scaled[u] for u in plan.positions if u != v]).reshape(plan.rows[v], -1)
        own = torch.ones(cores[v].shape[1:-1], dtype=torch.float64)
        for axis, e in enumerate(plan.template.incident[v]):
            if plan.template.edges[e][0] == v:
                shape = [1] * own.ndim
                shape[axis] = -1
                own = own * factors[e].reshape(shape)
        matrix = own.reshape(-1, 1) * matrix
        unfolded = data[0].movedim(v, -1).reshape(matrix.shape[1], -1)
        proximal = 1e-3
        gram = matrix @ matrix.T + (self.mu + proximal) * torch.eye(plan.rows[v], dtype=torch.float64)
        right = matrix @ unfolded + proximal * cores[v].reshape(plan.rows[v], -1)
        cores[v] = torch.linalg.solve(gram, right).reshape(cores[v].shape)

    def _updated_factor(
        self, plan: Plan, e: int, data: torch.Tensor, cores: list[torch.Tensor], factors: list[torch.Tensor]
    ) -> torch.Tensor:
        u, v = plan.template.edges[e]
        scaled = self._scaled(plan, cores, factors, skip=e)
        atoms = []
        for index in range(len(factors[e])):
            sliced = list(scaled)
            for end in (u, v):
                axis = 1 + plan.template.incident[end].index(e)
                keep = torch.zeros_like(sliced[end])
                keep.narrow(axis, index, 1).copy_(sliced[end].narrow(axis, index, 1))
                sliced[end] = keep
            atoms.append(plan.dense(sliced).flatten())
        basis = torch.stack(atoms)
        gram, right = basis @ basis.T, basis @ data.flatten()
        step = 1.0 / float(torch.linalg.matrix_norm(gram, 2) + 1e-9)
        factor = factors[e]
        for _ in range(10):
            moved = factor - step * (gram @ factor - right)
            factor = moved.sign() * (moved.abs() - step * self.gamma).clamp_min(0.0)
        return factor
