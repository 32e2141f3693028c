"""A budget spent over fronts. Tier T0."""

import itertools

import numpy as np
import pytest

from tnl.compression.allocation import Front, allocate


def random_fronts(seed: int, count: int, options: int) -> list[Front]:
    generator = np.random.default_rng(seed)
    fronts = []
    for _ in range(count):
        parameters = np.sort(generator.integers(1, 1000, options))
        errors = np.sort(generator.random(options) ** 3)[::-1] * generator.random() * 10
        fronts.append(Front(parameters, errors.copy()))
    return fronts


def total(fronts: list[Front], chosen: list[int], what: str) -> float:
    return sum(float(getattr(front, what)[option]) for front, option in zip(fronts, chosen, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_keeps_to_the_budget_and_comes_near_the_best(seed: int) -> None:
    fronts = random_fronts(seed, 4, 9)
    least, most = (sum(int(pick(front.parameters)) for front in fronts) for pick in (np.min, np.max))
    for budget in (least, (least + most) // 3, most):
        chosen = allocate(fronts, budget)
        assert total(fronts, chosen, "parameters") <= budget
        everything = itertools.product(range(9), repeat=4)
        allowed = [c for c in everything if total(fronts, list(c), "parameters") <= budget]
        best = min(total(fronts, list(c), "errors") for c in allowed)
        worst = total(fronts, [0] * 4, "errors")
        assert total(fronts, chosen, "errors") <= best + 0.1 * (worst - best)
    assert total(fronts, allocate(fronts, most), "errors") == pytest.approx(total(fronts, [8] * 4, "errors"))


def test_spends_where_it_helps() -> None:
    steep = Front(np.array([10, 100]), np.array([50.0, 0.0]))
    flat = Front(np.array([10, 100]), np.array([1.0, 0.0]))
    assert allocate([steep, flat], 110) == [1, 0]
    assert allocate([flat, steep], 110) == [0, 1]


def test_refuses_a_budget_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="budget: expected at least 20 parameters"):
        allocate([Front(np.array([10, 20]), np.array([1.0, 0.0]))] * 2, 19)
