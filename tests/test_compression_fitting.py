"""Networks fitted in the metric that counts. Tier T0."""

import math

import pytest
import torch

from tests.test_matrix_network import make_network
from tnl.compression.fitting import balance, network_error, refine, truncated
from tnl.compression.metric import Metric, Spectrum
from tnl.compression.moments import Moments
from tnl.models.tnl.matrix_network import MatrixNetwork, contract_to_matrix

M, N = 12, 8
GRAPH = make_network((M, N), (3, 4), (N,), ((0,), (1,), (2,)), [(0, 1, 2), (1, 2, 2), (0, 2, 3)])


def problem() -> tuple[torch.Tensor, Metric]:
    generator = torch.Generator().manual_seed(0)
    rows, columns, matrix = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((M, M), (N, N), (M, N)))
    return matrix, Metric.of(Moments(rows @ rows.T, columns @ columns.T), (M, N), "loss", 0.01)


def test_truncation_as_a_network() -> None:
    matrix, metric = problem()
    spectrum = Spectrum.of(matrix, metric)
    for rank in (1, 3):
        network, cores = truncated(spectrum, rank, metric)
        assert network.structure.parameters == rank * (M + N)
        assert float(network_error(matrix, metric, network, cores)) == pytest.approx(float(spectrum.errors()[rank]))


def random_cores(network: MatrixNetwork, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in network.structure.core_shapes]


def test_the_core_of_a_whole_side_is_the_best_one() -> None:
    matrix, metric = problem()
    turned = make_network((M, N), (M,), (2, 4), ((0,), (1,), (2,)), [(0, 1, 2), (1, 2, 2), (0, 2, 3)])
    for network, vertex in ((GRAPH, 2), (turned, 0)):
        cores, error = refine(matrix, metric, network, random_cores(network, 3), 3, 0.01, 0.0)
        assert error == pytest.approx(float(network_error(matrix, metric, network, cores)))
        for step in random_cores(network, 4)[vertex].flatten(end_dim=-2):
            other = [core.clone() for core in cores]
            other[vertex] += 1e-4 * step
            assert float(network_error(matrix, metric, network, other)) >= error


def test_pairs_of_factors_are_found_again() -> None:
    _, metric = problem()
    pairs = make_network((M, N), (3, 4), (2, 4), ((0, 2), (1, 3)), [(0, 1, 2)])
    planted = random_cores(pairs, 5)
    matrix = contract_to_matrix(pairs, planted)
    near = [core + 0.1 * noise for core, noise in zip(planted, random_cores(pairs, 6), strict=True)]
    assert refine(matrix, metric, pairs, near, 200, 0.01, 0.0)[1] < 1e-6 * metric.error(matrix)


def test_refining_reaches_the_best_truncation() -> None:
    matrix, metric = problem()
    spectrum = Spectrum.of(matrix, metric)
    network, _ = truncated(spectrum, 3, metric)
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in network.structure.core_shapes]
    cores, error = refine(matrix, metric, network, start, 300, 0.01, 0.0)
    assert error == pytest.approx(float(spectrum.errors()[3]), rel=1e-3)
    assert float(network_error(matrix, metric, network, cores)) == pytest.approx(error)


def test_refining_finds_a_network_again_and_is_never_worse() -> None:
    _, metric = problem()
    generator = torch.Generator().manual_seed(2)
    planted = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in GRAPH.structure.core_shapes]
    matrix = contract_to_matrix(GRAPH, planted)
    near = [core + 0.1 * torch.randn(core.shape, generator=generator, dtype=torch.float64) for core in planted]
    before = float(network_error(matrix, metric, GRAPH, near))
    errors = [refine(matrix, metric, GRAPH, near, iterations, 0.01, 0.0)[1] for iterations in (1, 10, 300)]
    assert before >= errors[0] >= errors[1] >= errors[2]
    assert errors[2] < 1e-4 * metric.error(matrix)
    assert refine(matrix, metric, GRAPH, planted, 5, 0.01, 0.0)[1] < 1e-20 * metric.error(matrix)


def test_shrinkage_keeps_cores_from_cancelling() -> None:
    matrix, metric = problem()
    sizes = []
    for shrinkage in (0.0, 0.3):
        cores, error = refine(matrix, metric, GRAPH, random_cores(GRAPH, 7), 100, 0.01, shrinkage)
        assert error < metric.error(matrix)
        sizes.append(math.prod(float(core.norm()) for core in cores))
    assert sizes[1] < sizes[0]


def test_balancing_leaves_the_network() -> None:
    cores = [torch.randn(shape, dtype=torch.float64) * 10.0**i for i, shape in enumerate(GRAPH.structure.core_shapes)]
    even = balance(cores)
    torch.testing.assert_close(contract_to_matrix(GRAPH, even), contract_to_matrix(GRAPH, cores))
    assert max(core.norm() for core in even) == pytest.approx(float(min(core.norm() for core in even)))
