"""The lower bound. Tier T0."""

import numpy as np
import pytest
import torch

from tests.tnss.planted import random_cores, random_structure, ring_structure
from tnss import ALS, FitRequest, Fitter, Spectrum, Structure
from tnss import spectrum as spectrum_module
from tnss.network import contract_cores


def test_bound_never_exceeds_a_fitted_rse() -> None:
    """500 random graphs, with internal vertices and unequal modes, fitted to tensors of five kinds."""
    generator = np.random.default_rng(0)
    settings = ALS(restarts=1, sweeps=20, polish=0)
    attained = 0
    for trial in range(500):
        order = int(generator.integers(3, 5))
        structure = random_structure(generator, order, internal=int(generator.integers(0, 3)), max_rank=3)
        tensor = _tensor(trial % 5, structure, generator)
        bound = float(Spectrum(tensor).bound([structure])[0])
        rse = Fitter(tensor, settings).fit([FitRequest(structure, trial)])[0].rse
        assert bound <= rse + 1e-12, f"{structure} bound {bound} rse {rse}"
        attained += bound > 0 and rse < bound * 1.01 + 1e-9
    assert attained > 20  # the bound is no triviality: it is met within 1 % again and again


def _tensor(kind: int, structure: Structure, generator: np.random.Generator) -> torch.Tensor:
    if kind == 0:
        return torch.tensor(generator.standard_normal(structure.sizes))
    if kind == 1:
        return contract_cores(structure, random_cores(structure, int(generator.integers(1000))))
    if kind == 2:
        return torch.tensor(generator.random(structure.sizes))
    if kind == 3:
        other = random_structure(generator, structure.order, max_rank=2)
        other = Structure(structure.sizes, other.edges)
        dense = contract_cores(other, random_cores(other, 1))
        return (
            dense
            + 0.05 * dense.norm() * torch.tensor(generator.standard_normal(structure.sizes)) / dense.numel() ** 0.5
        )
    return torch.tensor(generator.standard_cauchy(structure.sizes))


def test_tails_are_those_of_the_singular_values() -> None:
    tensor = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    spectrum = Spectrum(tensor)
    for row, mask in enumerate(spectrum.cuts.tolist()):
        inside = [mode for mode in range(4) if mask >> mode & 1]
        outside = [mode for mode in range(4) if not mask >> mode & 1]
        matrix = tensor.permute(*inside, *outside).reshape(int(np.prod([tensor.shape[i] for i in inside])), -1)
        squared = torch.linalg.svdvals(matrix).square()
        for k in range(min(matrix.shape)):
            assert spectrum.tails[row, k] == pytest.approx(float(squared[k:].sum() / squared.sum()), abs=1e-12)


def test_a_sketch_only_lowers_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(8, 8, 8, 8, dtype=torch.float64)
    exact = Spectrum(tensor)
    monkeypatch.setattr(spectrum_module, "LARGEST_GRAM", 16)
    monkeypatch.setattr(spectrum_module, "SKETCH", 24)
    sketched = Spectrum(tensor)
    assert sketched.sketched
    assert not exact.sketched
    width = sketched.tails.shape[1]
    assert (sketched.tails <= exact.tails[:, :width] + 1e-12).all()
    assert sketched.tails[:, 1].min() > 0.5  # and by little where the sketch is wide enough


def test_one_graph_with_many_ranks_agrees_with_structures() -> None:
    generator = np.random.default_rng(3)
    spectrum = Spectrum(torch.tensor(generator.standard_normal((3, 3, 3, 3, 3))))
    order = (0, 2, 4, 1, 3)
    ranks = generator.integers(1, 6, (50, 5))
    edges = np.array([(order[i], order[(i + 1) % 5]) for i in range(5)])
    structures = [ring_structure((3,) * 5, order, tuple(row)) for row in ranks.tolist()]
    np.testing.assert_allclose(spectrum.bound_ranks(edges, ranks), spectrum.bound(structures))


def test_many_structures_are_bounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables too large to hold at once are looked up piece by piece: the same bounds."""
    spectrum = Spectrum(torch.tensor(np.random.default_rng(1).standard_normal((3,) * 6)))
    ranks = np.random.default_rng(0).integers(1, 8, (1000, 6))
    edges = np.array([(i, (i + 1) % 6) for i in range(6)])
    structures = [Structure((3,) * 6, [(*edge, rank) for edge, rank in zip(edges, row, strict=True)]) for row in ranks]
    at_once = spectrum.bound_ranks(edges, ranks), spectrum.bound(structures)
    monkeypatch.setattr(spectrum_module, "CHUNK", 7 * len(spectrum.cuts))
    in_pieces = spectrum.bound_ranks(edges, ranks), spectrum.bound(structures)
    for whole, pieces in zip(at_once, in_pieces, strict=True):
        np.testing.assert_array_equal(whole, pieces)


def test_weights_scale_the_bound() -> None:
    generator = np.random.default_rng(4)
    tensor = torch.tensor(generator.standard_normal((3, 4, 3)))
    weights = torch.tensor(generator.random((3, 4, 3))) + 0.5
    structure = Structure((3, 4, 3), [(0, 1, 2)])
    bound = float(Spectrum(tensor, weights).bound([structure])[0])
    rse = Fitter(tensor, ALS(restarts=2), weights).fit([FitRequest(structure)])[0].rse
    assert 0 < bound <= rse
    weights[0, 0, 0] = 0
    assert float(Spectrum(tensor, weights).bound([structure])[0]) == 0
