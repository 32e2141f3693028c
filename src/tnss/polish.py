"""Levenberg-Marquardt on all cores at once, for structures of a few hundred parameters.

Alternating least squares slows down in long valleys that a second-order step crosses; near an exact fit it
converges quadratically. The Jacobian is dense (entries x parameters), which is what bounds the size.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from tnss.arrays import solve
from tnss.sweeps import Plan

STEPS = 30
SMALLEST_GAIN = 2e-3  # of the squared error in one step, expected or, twice in a row, found: the polish ends below it


def polish(
    data: np.ndarray, plan: Plan, flat: np.ndarray, root: np.ndarray | None, tolerance: float
) -> tuple[np.ndarray, float]:
    """Lower the squared error of a network; never returns a worse one.

    Args:
        data: the tensor, modes in the order of the plan's positions, float64.
        plan: the network's graph and ranks.
        flat: where to start: its cores, [1, parameters], all of about the same norm.
        root: square root of the weight of each entry, or None.
        tolerance: the squared error at which to stop.

    Returns:
        The cores, as they came, and their squared error.
    """
    residual = _residual(data, plan, flat, root)
    error, damping, idle = float(residual @ residual), 1e-3, 0
    for _ in range(STEPS):
        if error <= tolerance or idle >= 2:
            break
        jacobian = _jacobian(plan, flat, root)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ residual
        diagonal = np.arange(len(normal))
        scale = float(normal.trace()) / len(normal)
        for _ in range(8):
            shifted = normal.copy()
            shifted[diagonal, diagonal] += damping * scale
            # of PyTorch's tensors, since it solves those by Cholesky
            step = solve(torch.from_numpy(shifted[None]), torch.from_numpy(gradient[None, :, None]))[0, :, 0].numpy()
            # what the step gains if the network were linear in its cores
            if float(step @ (gradient + damping * scale * step)) <= SMALLEST_GAIN * error:
                return flat, error
            trial = flat + step
            trial_residual = _residual(data, plan, trial, root)
            trial_error = float(trial_residual @ trial_residual)
            if trial_error < error:
                break
            damping *= 6.0
        else:
            break
        idle = idle + 1 if error - trial_error <= SMALLEST_GAIN * error else 0
        flat, residual, error, damping = trial, trial_residual, trial_error, max(damping / 8.0, 1e-14)
    return flat, error


def _residual(data: np.ndarray, plan: Plan, flat: np.ndarray, root: np.ndarray | None) -> np.ndarray:
    difference = (data - plan.dense(plan.split(flat))[0]).ravel()
    return difference if root is None else difference * root.ravel()


def _jacobian(plan: Plan, flat: np.ndarray, root: np.ndarray | None) -> np.ndarray:
    """Derivative of the (weighted) dense tensor by all core entries: [entries, parameters]."""
    sizes, cores = plan.template.sizes, plan.split(flat)
    jacobian = np.zeros((math.prod(sizes), plan.parameters))
    for v, (block, size) in enumerate(zip(plan.split(jacobian), sizes, strict=True)):
        environment = plan.explicit[v]([cores[u] for u in plan.positions if u != v])
        environment = environment.reshape(plan.rows[v], math.prod(sizes[:v]), -1)  # modes before v, modes after
        block = block.reshape(environment.shape[1], size, environment.shape[2], plan.rows[v], size)
        for i in range(size):
            block[:, i, :, :, i] = environment.transpose(1, 2, 0)
    return jacobian if root is None else jacobian * root.reshape(-1, 1)
