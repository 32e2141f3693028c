"""Branch and bound against enumeration. Tier T0."""

import itertools

import networkx
import numpy as np
import pytest
import torch

from tests.tnss.planted import A6B, planted_ring
from tnss import Complete, ErrorBudget, Graph, Lagrangian, ParameterBudget, Ring, Spectrum, Train, Tree
from tnss.bound import BoundSearch
from tnss.objective import Objective
from tnss.space import Domain, Point, Space

STAR = networkx.Graph([(0, 4), (1, 4), (2, 5), (3, 5), (4, 5)])


def every_point(domain: Domain) -> list[Point]:
    values = itertools.product(*(range(low, high + 1) for low, high in zip(domain.lower, domain.upper, strict=True)))
    orders = list(itertools.permutations(range(domain.order))) if domain.permute else [tuple(range(domain.order))]
    points = [Point(value, order) for value in values for order in orders]
    return [point for point in points if domain.allows(point)]


@pytest.mark.parametrize("objective", [Lagrangian(3.0), ErrorBudget(0.3), ParameterBudget(40)], ids=str)
@pytest.mark.parametrize(
    "space",
    [
        Ring(3),
        Train(3),
        Tree(2),
        Complete(2),
        Complete(3, max_degree=2, fixed={(0, 1): 2}, forbidden=[(2, 3)]),
        Graph(STAR, 2, permute=True),
    ],
    ids=["ring", "train", "tree", "complete", "constrained", "graph"],
)
def test_agrees_with_enumeration(space: Space, objective: Objective) -> None:
    """Structures come out in ascending order of bound, none below the cutoff is missed, and lower() is the minimum."""
    generator = np.random.default_rng(5)
    tensor = torch.tensor(generator.standard_normal((2, 3, 2, 4)))
    tensor[0] *= 0.1
    domain = space.bind(tensor.shape)
    spectrum = Spectrum(tensor)
    structures = {domain.decode(point) for point in every_point(domain)}
    listed = list(structures)
    entries = tensor.numel()
    parameters = np.array([structure.parameters for structure in listed])
    values = objective.value(parameters, spectrum.bound(listed), entries)
    search = BoundSearch(domain, spectrum, objective)
    first = search.next(10**6)
    assert first is not None
    assert search.lower() == pytest.approx(values.min())
    cutoff = float(np.quantile(values[np.isfinite(values)], 0.3)) + 1e-9
    search = BoundSearch(domain, spectrum, objective)
    search.cutoff = cutoff
    found = []
    while (point := search.next(10**6)) is not None:
        assert domain.check(point) == point
        found.append(domain.decode(point))
    assert set(found) == {structure for structure, value in zip(listed, values, strict=True) if value < cutoff}
    order = objective.value(np.array([s.parameters for s in found]), spectrum.bound(found), entries)
    assert (np.diff(order) >= -1e-12).all()


def test_lower_holds_at_any_moment() -> None:
    tensor = planted_ring(*A6B, noise=0.3)
    domain, spectrum, objective = Ring(4).bind(tensor.shape), Spectrum(tensor), Lagrangian(2.0)
    complete = BoundSearch(domain, spectrum, objective)
    assert complete.next(10**7) is not None
    least = complete.lower()
    partial = BoundSearch(domain, spectrum, objective)
    before = 0.0
    for _ in range(8):
        partial.next(500)
        assert before - 1e-12 <= partial.lower() <= least + 1e-12
        before = partial.lower()


def test_too_many_graphs_fall_back_to_a_superset() -> None:
    tensor = torch.randn((2,) * 10, dtype=torch.float64)
    search = BoundSearch(Ring(4).bind(tensor.shape), Spectrum(tensor), Lagrangian(5.0))
    assert not search.proposes
    assert search.next(2000) is None
    assert search.lower() >= 20 / 1024  # rank 1 everywhere: below it there is nothing
