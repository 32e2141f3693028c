"""Matrices as tensors. Tier T0."""

import math

import pytest
import torch

import tnss
from tnl.compression.foldings import MOST_PADDING, WhitenedTensor, cut_size, paired_folding, propose_foldings
from tnl.compression.metric import Metric
from tnl.compression.moments import Moments


@pytest.mark.parametrize("size", [96, 127, 1000, 1408, 2816, 64000])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_cuts_cover_the_size_with_little_padding(size: int, count: int) -> None:
    factors = cut_size(size, count)
    assert size <= math.prod(factors) <= MOST_PADDING * size
    assert len(factors) == count or factors == (size,)


def test_exact_cuts_are_balanced() -> None:
    assert cut_size(1024, 2) == (32, 32)
    assert cut_size(2816, 2) == (44, 64)
    assert cut_size(512, 2) == (16, 32)
    assert cut_size(7, 5) == (7,)


def test_proposals_have_the_orders_and_cuts_asked_for() -> None:
    foldings = propose_foldings((512, 128), [3, 4, 6, 8], row_cuts=((4, 128),))
    assert {len(folding.sizes) for folding in foldings} == {3, 4, 6, 8}
    assert any(folding.rows == (4, 128) and folding.columns == (128,) for folding in foldings)
    assert any(any(len(mode) == 2 for mode in folding.modes) for folding in foldings)
    assert len(set(foldings)) == len(foldings)
    with pytest.raises(ValueError, match="expected sides that can be cut into 4 factors"):
        paired_folding((3, 100), 4)


@pytest.mark.parametrize("number", range(4))
def test_whitening_is_absorbed_by_the_cores(number: int) -> None:
    generator = torch.Generator().manual_seed(0)
    m, n = 12, 8

    def moment(size: int) -> torch.Tensor:
        factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return factor @ factor.T

    matrix = torch.randn(m, n, generator=generator, dtype=torch.float64)
    metric = Metric.of(Moments(moment(m), moment(n)), (m, n), "loss", 0.01)
    folding = propose_foldings((m, n), [3, 4])[number]
    whitened = WhitenedTensor(matrix, metric, folding, 0.01)
    assert whitened.tensor.shape == folding.sizes
    ranks = [(u, v, 2) for u in range(len(folding.sizes)) for v in range(u)]
    network = folding.network(tnss.Structure(folding.sizes, ranks))
    cores = [torch.randn(s, generator=generator, dtype=torch.float64) for s in network.structure.core_shapes]
    plain = torch.einsum(network.structure.einsum(), *whitened.undo(cores, network))
    again = WhitenedTensor(network.unfold(plain), metric, folding, 0.01).tensor
    torch.testing.assert_close(again, torch.einsum(network.structure.einsum(), *cores))


def test_bound_is_below_any_fit_and_truncation_is_exact_where_sides_are_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    metric = Metric.of(None, (12, 8), "none", 0.01)
    folding = propose_foldings((12, 8), [3])[0]
    whitened = WhitenedTensor(matrix, metric, folding, 1e-9)
    fit = tnss.search(whitened.tensor, tnss.Complete(8), tnss.ParameterBudget(60), budget=tnss.Budget(3))
    assert whitened.bound(tnss.Complete(8), 60) <= fit.best.rse
    energies = torch.linalg.svdvals(matrix).square()
    assert whitened.truncated_error(3) == pytest.approx(float(energies[3:].sum() / energies.sum()))
