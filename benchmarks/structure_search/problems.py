"""The tensors: shared files, planted rings, planted topologies."""

import itertools
from dataclasses import dataclass

import numpy as np
import opt_einsum
import torch

from benchmarks import SHARED_DATA
from tnss import Structure


@dataclass(frozen=True)
class Planted:
    """A ring of known size inside a tensor, and the RSE that counts as found."""

    size: int
    order: tuple[int, ...]
    bonds: tuple[int, ...]
    seed: int
    noise: float
    bar: float

    @property
    def parameters(self) -> int:
        return sum(self.bonds[i - 1] * self.size * self.bonds[i] for i in range(len(self.bonds)))

    def tensor(self) -> torch.Tensor:
        generator = np.random.default_rng(self.seed)
        count = len(self.order)
        cores = [generator.standard_normal((self.bonds[i - 1], self.size, self.bonds[i])) for i in range(count)]
        chain: np.ndarray = cores[0]
        for core in cores[1:]:
            chain = np.tensordot(chain, core, axes=([-1], [0]))
        tensor = np.trace(chain, axis1=0, axis2=-1).transpose(np.argsort(self.order))
        tensor = tensor / np.linalg.norm(tensor) * np.sqrt(tensor.size)
        if self.noise:
            error = generator.standard_normal(tensor.shape)
            tensor = tensor + error * (self.noise * np.linalg.norm(tensor) / np.linalg.norm(error))
        return torch.tensor(tensor)


_A6B = (3, (2, 5, 0, 4, 1, 3), (2, 4, 3, 2, 4, 2), 12)
PLANTED = {
    "A6a": Planted(3, (0, 3, 2, 1, 4, 5), (3, 4, 2, 2, 3, 2), 11, 0.0, 1e-8),
    "A6b": Planted(*_A6B, 0.0, 1e-8),
    "A6c": Planted(4, (1, 4, 0, 5, 2, 3), (3, 5, 2, 4, 3, 2), 13, 0.0, 1e-8),
    "A6n": Planted(*_A6B, 1e-2, 1.0e-4),
    "A8a": Planted(3, (0, 4, 2, 6, 1, 5, 3, 7), (2, 3, 2, 4, 2, 3, 2, 3), 14, 0.0, 1e-8),
    "A8n": Planted(3, (3, 0, 6, 2, 7, 4, 1, 5), (3, 2, 4, 2, 3, 2, 3, 2), 15, 1e-2, 1.1e-4),
}


def random_ring(seed: int) -> Planted:
    """One of the random rings: order 6 or 8, fewer parameters than a third of the entries, noise 0 to 1e-2."""
    generator = np.random.default_rng(9000 + seed)
    order = (6, 8)[seed % 2]
    noise = (0.0, 1e-3, 3e-3, 1e-2)[seed // 2 % 4]
    while True:
        permutation = tuple(int(mode) for mode in generator.permutation(order))
        bonds = tuple(int(rank) for rank in generator.integers(2, 5, order))
        problem = Planted(3, permutation, bonds, int(generator.integers(2**31)), noise, 1e-8 + 1.05 * noise**2)
        if problem.parameters < 3**order / 3:
            return problem


def shared(name: str) -> torch.Tensor:
    """``data``, ``image_a`` or ``image_b`` of the shared data."""
    with np.load(SHARED_DATA / "tnale" / f"{name}.npz") as archive:
        return torch.tensor(archive["goal"].astype(np.float64))


def planted_topology(seed: int, order: int = 5, size: int = 4, limit: int = 614) -> tuple[Structure, torch.Tensor]:
    """A random graph inside a tensor of order 5 (or more) with modes of 4."""
    generator = np.random.default_rng(300 + seed)
    pairs = list(itertools.combinations(range(order), 2))
    while True:
        edges = [(*pair, int(generator.integers(2, 4)) if generator.random() < 0.45 else 1) for pair in pairs]
        structure = Structure((size,) * order, edges)
        if all(structure.incident[v] for v in range(order)) and structure.parameters < limit:
            break
    generator = np.random.default_rng(seed)
    cores = [np.moveaxis(generator.standard_normal((shape[-1], *shape[:-1])), 0, -1) for shape in structure.core_shapes]
    tensor = opt_einsum.contract(structure.einsum(), *cores)
    return structure, torch.tensor(tensor / np.linalg.norm(tensor) * np.sqrt(tensor.size))
