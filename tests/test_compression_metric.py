"""The error that counts and the best truncation under it. Tier T0."""

import pytest
import torch

from tnl.compression.metric import Metric, Side, Spectrum, factor_sides
from tnl.compression.moments import Moments
from tnl.compression.settings import Weighting

M, N = 14, 9


def random_moment(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return factor @ factor.T


def make(weighting: Weighting = "loss") -> tuple[torch.Tensor, Moments, Metric]:
    moments = Moments(random_moment(M, 1), random_moment(N, 2))
    matrix = torch.randn(M, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return matrix, moments, Metric.of(moments, (M, N), weighting, 1e-12)


def test_error_is_the_expected_squared_change() -> None:
    difference, moments, metric = make()
    expected = 0.5 * torch.trace(moments.rows @ difference @ moments.columns @ difference.T)
    assert metric.error(difference) == pytest.approx(float(expected))


def test_weightings_leave_out_what_they_say() -> None:
    difference, moments, activations = make("activations")
    mean = moments.rows.trace() / M
    expected = 0.5 * mean * torch.trace(difference @ moments.columns @ difference.T)
    assert activations.error(difference) == pytest.approx(float(expected))
    _, _, plain = make("none")
    expected = 0.5 * mean * moments.columns.trace() / N * difference.square().sum()
    assert plain.error(difference) == pytest.approx(float(expected))
    without = Metric.of(None, (M, N), "none", 0.01)
    assert without.error(difference) == pytest.approx(0.5 * float(difference.square().sum()))


def test_truncation_is_the_best_and_its_error_is_known() -> None:
    matrix, _, metric = make()
    spectrum = Spectrum.of(matrix, metric)
    errors = spectrum.errors()
    assert errors[0] == pytest.approx(metric.error(matrix))
    generator = torch.Generator().manual_seed(0)
    for rank in (1, 4, N):
        left, right = spectrum.factors(rank, metric)
        assert left.shape == (M, rank)
        error = metric.error(matrix - left @ right)
        assert error == pytest.approx(float(errors[rank]), abs=1e-9 * float(errors[0]))
        for _ in range(20):  # no neighbour is better
            other = (left + 1e-3 * torch.randn(left.shape, generator=generator, dtype=torch.float64)) @ right
            assert metric.error(matrix - other) >= error


def test_sides_of_one_factor_and_diagonals() -> None:
    side = Side.of(random_moment(6, 0), 0.1)
    assert factor_sides(side, (6,), 0.1) == [side]
    diagonal = Side.of(torch.rand(6, dtype=torch.float64), 0.1)
    matrix = torch.randn(6, 3, dtype=torch.float64)
    for one in (side, diagonal):
        torch.testing.assert_close(one.undo(one.apply(matrix)), matrix)


def test_a_product_of_moments_is_found_again() -> None:
    parts = [random_moment(2, 0), random_moment(3, 1)]
    sides = factor_sides(Side.of(torch.kron(*parts), 1e-12), (2, 3), 1e-12)
    product = torch.kron(*(side.factor @ side.factor.T for side in sides))
    torch.testing.assert_close(product, torch.kron(*parts), rtol=1e-6, atol=1e-6)
    weights = torch.rand(2, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    sides = factor_sides(Side.of(torch.kron(*weights), 1e-12), (2, 3), 1e-12)
    product = torch.kron(*(side.factor.square() for side in sides))
    torch.testing.assert_close(product, torch.kron(*weights))
