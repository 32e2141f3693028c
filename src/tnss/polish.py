"""Levenberg-Marquardt on all cores at once, for structures of a few hundred parameters.

Alternating least squares slows down in long valleys that a second-order step crosses; near an exact fit it
converges quadratically. The Jacobian is dense (entries x parameters), which is what bounds the size.
"""

from __future__ import annotations

import math

import torch

from tnss.network import contract_cores
from tnss.structure import Structure
from tnss.sweeps import Template, balance, plan_for

STEPS = 30
SMALLEST_GAIN = 1e-3  # of the squared error in one accepted step: two in a row below it end the polish


def polish(
    tensor: torch.Tensor,
    structure: Structure,
    cores: tuple[torch.Tensor, ...],
    weights: torch.Tensor | None,
    tolerance: float,
) -> tuple[tuple[torch.Tensor, ...], float]:
    """Lower the squared error of a network; never returns a worse one.

    Args:
        tensor: ``structure.sizes``.
        structure: the network's structure.
        cores: where to start.
        weights: positive weight of each entry, or None.
        tolerance: the RSE at which to stop.

    Returns:
        The cores, in float64 on the CPU, and their RSE.
    """
    data = tensor.to("cpu", torch.float64)
    root = torch.ones(()) if weights is None else weights.to("cpu", torch.float64).sqrt()
    norm = float((root * data).square().sum())
    current = [core.clone() for core in cores]
    batched = [core[None] for core in current]
    balance(batched)
    current = [core[0] for core in batched]
    residual = (root * (data - contract_cores(structure, current))).flatten()
    error, damping, idle = float(residual.square().sum()), 1e-3, 0
    for _ in range(STEPS):
        if error <= tolerance * norm or idle >= 2:
            break
        jacobian = _jacobian(structure, current, root)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ residual
        scale = normal.diagonal().mean()
        for _ in range(8):
            shifted = normal + damping * scale * torch.eye(len(normal), dtype=normal.dtype)
            factor, info = torch.linalg.cholesky_ex(shifted)
            step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
            trial = _moved(current, step)
            trial_residual = (root * (data - contract_cores(structure, trial))).flatten()
            trial_error = float(trial_residual.square().sum())
            if int(info) == 0 and trial_error < error:
                break
            damping *= 6.0
        else:
            break
        idle = idle + 1 if error - trial_error <= SMALLEST_GAIN * error else 0
        current, residual, error, damping = trial, trial_residual, trial_error, max(damping / 8.0, 1e-14)
    return tuple(current), error / norm


def _jacobian(structure: Structure, cores: list[torch.Tensor], root: torch.Tensor) -> torch.Tensor:
    """Derivative of the weighted dense tensor by all core entries: [entries, parameters]."""
    sizes = tuple(structure.sizes[v] if v < structure.order else 1 for v in range(structure.vertices))
    template = Template(sizes, tuple(edge[:2] for edge in structure.edges))
    plan = plan_for(template, tuple(edge[2] for edge in structure.edges))
    batched = [core.reshape(1, *shape) for core, shape in zip(cores, plan.shapes, strict=True)]
    blocks = []
    for v, size in enumerate(sizes):
        environment = plan.explicit[v]([batched[u] for u in plan.positions if u != v])
        rest = [other for u, other in enumerate(sizes) if u != v]
        environment = environment.reshape(plan.rows[v], *rest).movedim(0, -1)
        block = torch.zeros(*sizes, plan.rows[v], size, dtype=torch.float64)
        block.diagonal(dim1=v, dim2=block.ndim - 1).copy_(environment[..., None].expand(*rest, plan.rows[v], size))
        blocks.append(block.reshape(math.prod(sizes), -1))
    jacobian = torch.cat(blocks, dim=1)
    return jacobian if root.ndim == 0 else jacobian * root.flatten()[:, None]


def _moved(cores: list[torch.Tensor], step: torch.Tensor) -> list[torch.Tensor]:
    sizes = [core.numel() for core in cores]
    return [core + part.reshape(core.shape) for core, part in zip(cores, step.split(sizes), strict=True)]
