"""Structures for the matrices of a kind. Tier T0."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import tnss
from tests.test_matrix_network import make_network
from tnl.compression import structures
from tnl.compression.matrices import Matrix, stored
from tnl.compression.metric import Metric
from tnl.compression.settings import CompressSettings
from tnl.models.tnl.matrix_network import MatrixNetwork, contract_to_matrix

SETTINGS = CompressSettings(model="-", weighting="none", orders=[3], evaluations=6, iterations=80, device="cpu")
GRAPH = make_network((24, 16), (4, 6), (16,), ((0,), (1,), (2,)), [(0, 1, 2), (1, 2, 3), (0, 2, 2)])


def matrix_of(network: MatrixNetwork, noise: float = 0.0) -> Matrix:
    generator = torch.Generator().manual_seed(0)
    cores = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in network.structure.core_shapes]
    weight = contract_to_matrix(network, cores)
    weight = weight + noise * weight.std() * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return Matrix("layer", "gate", weight, Metric.of(None, network.shape, "none", 0.01))


def test_search_finds_what_a_decomposition_cannot_store(tmp_path: Path) -> None:
    """A planted network of 128 + numbers: rank 6 between rows and columns, 180 numbers as a decomposition."""
    matrix = matrix_of(GRAPH)
    budget = GRAPH.structure.parameters
    settings = dataclasses.replace(SETTINGS, budget=budget / matrix.weight.numel())
    fits = structures.Fits(tmp_path, "identity", settings)
    found = [
        structures.search_structures(matrix, folding, fits, tnss.Local())
        for folding in structures.foldings_of(matrix, settings)
    ]
    best = min((finding for finding, option in found if option is not None), key=lambda finding: finding.error)
    assert best.error < 0.2 * best.svd_error
    assert best.parameters <= 1.12 * budget
    best_of_all = structures.worth_fitting(found)
    assert best_of_all is not None
    kept, ratio = best_of_all
    assert ratio < 0.2
    again = fits.fit(matrix, kept)
    assert again.parameters == stored(kept, pinned=True)
    for finding, option in found:
        assert (option is None) == (finding.bound >= finding.svd_in_search_metric)


def test_a_folding_that_cannot_win_is_not_searched(tmp_path: Path) -> None:
    """A matrix of rank 2 without other structure: its decomposition is exact, and nothing else can be better."""
    low_rank = make_network((24, 16), (24,), (16,), ((0,), (1,)), [(0, 1, 2)])
    matrix = matrix_of(low_rank)
    settings = CompressSettings(model="-", weighting="none", orders=[3], budget=76 / 384, device="cpu")
    fits = structures.Fits(tmp_path, "identity", settings)
    for folding in structures.foldings_of(matrix, settings):
        finding, option = structures.search_structures(matrix, folding, fits, tnss.Local())
        assert finding.svd_in_search_metric < 1e-12
        assert option is None
        assert math.isnan(finding.error)
        assert finding.evaluations == 0


def test_scaling_ranks() -> None:
    doubled = structures.scaled_by(GRAPH, 2.0)
    assert doubled.structure.edges == ((0, 1, 4), (0, 2, 4), (1, 2, 6))
    for budget in (200, 1000):
        grown = structures.grown(GRAPH, budget, pinned=True)
        assert stored(GRAPH, True) <= stored(grown, True) <= budget
    sizes = [stored(network, True) for network in structures.family(GRAPH, SETTINGS)]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] <= 0.9 * 24 * 16
    (same,) = structures.family(GRAPH, dataclasses.replace(SETTINGS, allocation="uniform", budget=0.4))
    assert same == structures.grown(GRAPH, int(0.4 * 24 * 16), True)
    assert structures.unknowns(GRAPH) == 6


def test_random_cores_are_smaller_than_the_matrix_and_always_the_same() -> None:
    matrix = matrix_of(GRAPH)
    cores = structures.random_cores(matrix, GRAPH)
    norm = contract_to_matrix(GRAPH, cores).norm() / matrix.weight.norm()
    assert float(norm) == pytest.approx(structures.START_SHARE)
    again = structures.random_cores(matrix, GRAPH)
    torch.testing.assert_close(again, cores)


def test_many_bonds_at_a_vertex_start_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("alternating least squares")

    monkeypatch.setattr(structures, "MOST_UNKNOWNS", {"cpu": 5})
    monkeypatch.setattr(structures, "fitted_cores", refuse)
    matrix = matrix_of(GRAPH)
    fits = structures.Fits(tmp_path, "identity", SETTINGS)
    assert fits.fit(matrix, GRAPH).error < 0.2 * matrix.total
