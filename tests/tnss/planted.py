"""Tensors with a planted structure, shared by the tests of tnss."""

import numpy as np
import torch

from tnss import Structure


def ring_structure(sizes: tuple[int, ...], order: tuple[int, ...], bonds: tuple[int, ...]) -> Structure:
    """The ring that visits modes in ``order``; ``bonds[i]`` joins positions ``i`` and ``i + 1``."""
    count = len(order)
    return Structure(sizes, [(order[i], order[(i + 1) % count], bonds[i]) for i in range(count)])


def random_cores(structure: Structure, seed: int) -> tuple[torch.Tensor, ...]:
    generator = np.random.default_rng(seed)
    return tuple(torch.tensor(generator.standard_normal(shape)) for shape in structure.core_shapes)


def planted_ring(
    size: int, order: tuple[int, ...], bonds: tuple[int, ...], seed: int, noise: float = 0.0
) -> torch.Tensor:
    """A tensor with a ring inside, scaled to norm sqrt(entries), with relative noise on top."""
    generator = np.random.default_rng(seed)
    count = len(order)
    cores = [generator.standard_normal((bonds[i - 1], size, bonds[i])) for i in range(count)]
    chain: np.ndarray = cores[0]
    for core in cores[1:]:
        chain = np.tensordot(chain, core, axes=([-1], [0]))
    tensor = np.trace(chain, axis1=0, axis2=-1).transpose(np.argsort(order))
    tensor = tensor / np.linalg.norm(tensor) * np.sqrt(tensor.size)
    if noise:
        error = generator.standard_normal(tensor.shape)
        tensor = tensor + error * (noise * np.linalg.norm(tensor) / np.linalg.norm(error))
    return torch.tensor(tensor)


A6A = (3, (0, 3, 2, 1, 4, 5), (3, 4, 2, 2, 3, 2), 11)
A6B = (3, (2, 5, 0, 4, 1, 3), (2, 4, 3, 2, 4, 2), 12)
A8A = (3, (0, 4, 2, 6, 1, 5, 3, 7), (2, 3, 2, 4, 2, 3, 2, 3), 14)


def random_structure(generator: np.random.Generator, order: int, internal: int = 0, max_rank: int = 4) -> Structure:
    """Any graph: each pair joined with probability one half, mode sizes 2 to 4."""
    vertices = order + internal
    sizes = tuple(int(size) for size in generator.integers(2, 5, order))
    edges = [
        (u, v, int(generator.integers(2, max_rank + 1)))
        for u in range(vertices)
        for v in range(u + 1, vertices)
        if generator.random() < 0.5
    ]
    return Structure(sizes, edges)
