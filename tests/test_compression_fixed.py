"""Rings and trains to compare a search with. Tier T0."""

import pytest
import torch

from tnl.compression.fixed import fixed_network
from tnl.compression.matrices import Matrix
from tnl.compression.metric import Metric


def matrix_of(m: int, n: int) -> Matrix:
    return Matrix("layer", "gate", torch.zeros(m, n, dtype=torch.float64), Metric.of(None, (m, n), "none", 0.01))


def test_a_ring_has_equal_ranks_and_the_next_one_is_too_large() -> None:
    network = fixed_network(matrix_of(384, 128), "ring", 0.5, pinned=False)
    assert network is not None
    assert [(u, v) for u, v, _ in network.structure.edges] == [(0, 1), (0, 3), (1, 2), (2, 3)]
    (rank,) = {rank for _, _, rank in network.structure.edges}
    sizes = sum(network.structure.sizes)
    assert network.parameters == rank**2 * sizes <= 0.5 * 384 * 128 < (rank + 1) ** 2 * sizes


def test_a_train_wastes_nothing_at_its_ends() -> None:
    network = fixed_network(matrix_of(384, 128), "train", 0.5, pinned=False)
    assert network is not None
    a, _, _, d = network.structure.sizes
    (_, _, first), (_, _, middle), (_, _, last) = network.structure.edges
    assert first == a < middle
    assert last == min(middle, d)
    assert network.parameters <= 0.5 * 384 * 128


@pytest.mark.parametrize("method", ["ring", "train"])
def test_shares_at_the_ends(method: str) -> None:
    matrix = matrix_of(12, 8)
    whole = fixed_network(matrix, method, 1000.0, pinned=False)  # type: ignore[arg-type]
    assert whole is not None
    assert fixed_network(matrix, method, 0.01, pinned=False) is None  # type: ignore[arg-type]
