"""A budget of parameters spent over matrices where it hurts least.

Each matrix has a front: ways of storing it, each with parameters and an error, errors of all matrices in one unit.
The least sum of errors under a bound on the sum of parameters is approached with one multiplier (Everett 1963): for
`lambda` each matrix by itself takes the option with the least `error + lambda * parameters`; the smallest `lambda`
that keeps to the budget is found by bisection. What is left of the budget (fronts are not convex) goes to the option
that lowers the error most, until none fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Front:
    """Ways of storing one matrix.

    Attributes:
        parameters: `[K]` int64.
        errors: `[K]` float64.
    """

    parameters: npt.NDArray[np.int64]
    errors: npt.NDArray[np.float64]


def allocate(fronts: Sequence[Front], budget: int) -> list[int]:
    """The option of each front.

    Raises:
        ValueError: Even the smallest options together are above the budget.
    """
    smallest = sum(int(front.parameters.min()) for front in fronts)
    if smallest > budget:
        raise ValueError(
            f"budget: expected at least {smallest:,} parameters, the least that is possible, got {budget:,}"
        )
    scale = sum(float(front.errors.max()) for front in fronts) or 1.0
    low, high = 1e-15 * scale, 10.0 * scale  # lambda, in error a parameter
    chosen = _choose(fronts, high)
    if _parameters(fronts, chosen) > budget:  # errors so large that only the smallest will do
        chosen = [int(np.lexsort((front.errors, front.parameters))[0]) for front in fronts]
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        candidate = _choose(fronts, middle)
        if _parameters(fronts, candidate) <= budget:
            chosen, high = candidate, middle
        else:
            low = middle
    return _spend_the_rest(fronts, chosen, budget)


def _choose(fronts: Sequence[Front], multiplier: float) -> list[int]:
    return [int(np.argmin(front.errors + multiplier * front.parameters)) for front in fronts]


def _parameters(fronts: Sequence[Front], chosen: Sequence[int]) -> int:
    return sum(int(front.parameters[option]) for front, option in zip(fronts, chosen, strict=True))


def _spend_the_rest(fronts: Sequence[Front], chosen: list[int], budget: int) -> list[int]:
    left = budget - _parameters(fronts, chosen)
    while True:
        best_gain, best = 0.0, None
        for number, (front, option) in enumerate(zip(fronts, chosen, strict=True)):
            extra = front.parameters - front.parameters[option]
            gain = np.where(extra <= left, front.errors[option] - front.errors, 0.0)
            better = int(np.argmax(gain))
            if gain[better] > best_gain:
                best_gain, best = float(gain[better]), (number, better)
        if best is None:
            return chosen
        number, option = best
        left -= int(fronts[number].parameters[option] - fronts[number].parameters[chosen[number]])
        chosen[number] = option
