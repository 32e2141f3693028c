"""TNGA: a genetic algorithm on the ranks (ICML 2020), with the permutation as one more gene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tnss.methods.base import Evaluation, Proposal, View
from tnss.space import Point


@dataclass(frozen=True)
class TNGAOptions:
    """Settings of TNGA.

    Args:
        population: structures a generation.
        elite: share of the population that lives on.
        mutation: chance a gene is drawn anew.
        pressure: chance of a parent falls with ``exp(-pressure * place)``.
    """

    population: int = 30
    elite: float = 0.2
    mutation: float = 0.1
    pressure: float = 0.15

    def __post_init__(self) -> None:
        if self.population < 2 or not 0 < self.elite < 1 or not 0 <= self.mutation <= 1 or self.pressure < 0:
            raise ValueError(
                f"options: expected population >= 2, 0 < elite < 1, 0 <= mutation <= 1, pressure >= 0, got {self}"
            )


class TNGA:
    """Keep the best, breed the rest by uniform crossover of the ranks, mutate."""

    def __init__(self, view: View, options: TNGAOptions | None = None) -> None:
        self.view, self.options = view, options or TNGAOptions()
        self.population: list[Evaluation] = []

    def ask(self) -> list[Proposal]:
        """The next generation without its elite, whose fits are known."""
        if not self.population:
            points = [self.view.first_point()]
            points += [self.view.domain.random(self.view.generator) for _ in range(self.options.population - 1)]
            return [Proposal(point) for point in points]
        return [Proposal(self._child()) for _ in range(self.options.population - self._elite)]

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Rank the new generation together with the elite of the last."""
        alive = [*self.population[: self._elite], *evaluations]
        self.population = sorted(alive, key=lambda evaluation: evaluation.merit)

    @property
    def _elite(self) -> int:
        return max(1, int(self.options.elite * self.options.population))

    def _child(self) -> Point:
        generator, domain = self.view.generator, self.view.domain
        odds = np.exp(-self.options.pressure * np.arange(len(self.population)))
        while True:
            first, second = generator.choice(len(self.population), 2, p=odds / odds.sum())
            mother, father = self.population[first].point, self.population[second].point
            values = [a if generator.random() < 0.5 else b for a, b in zip(mother.values, father.values, strict=True)]
            for i in range(len(values)):
                if generator.random() < self.options.mutation:
                    values[i] = int(generator.integers(domain.lower[i], domain.upper[i] + 1))
            child = Point(tuple(values), mother.permutation)
            if domain.permute and generator.random() < self.options.mutation * domain.order:
                swaps = domain.transpositions(child)
                child = swaps[int(generator.integers(1, len(swaps)))]
            if domain.allows(child):
                return child
