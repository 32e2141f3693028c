"""TNLS: local random sampling (ICML 2022, arXiv 2206.06597)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tnss.methods.base import Evaluation, Proposal, View
from tnss.space import Point


@dataclass(frozen=True)
class TNLSOptions:
    """Settings of TNLS.

    Args:
        samples: structures drawn around the centre in an iteration.
        spread: standard deviation of the step of a rank at first.
        decay: factor on the spread after an iteration.
        swap: chance that one more transposition follows.
    """

    samples: int = 30
    spread: float = 1.5
    decay: float = 0.97
    swap: float = 0.5

    def __post_init__(self) -> None:
        if self.samples < 1 or self.spread <= 0 or not 0 < self.decay <= 1 or not 0 <= self.swap < 1:
            raise ValueError(f"options: expected samples >= 1, spread > 0, 0 < decay <= 1, 0 <= swap < 1, got {self}")


class TNLS:
    """Sample around the best structure so far, rank steps normal and rounded, modes swapped at random."""

    def __init__(self, view: View, options: TNLSOptions | None = None) -> None:
        self.view, self.options = view, options or TNLSOptions()
        self.spread = self.options.spread
        self.centre: Evaluation | None = None

    def ask(self) -> list[Proposal]:
        """The start, then samples around the centre."""
        if self.centre is None:
            return [Proposal(self.view.first_point())]
        return [Proposal(self._sample(self.centre.point)) for _ in range(self.options.samples)]

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Move to the best of the samples where it is better."""
        if self.centre is not None:
            self.spread = max(0.5, self.spread * self.options.decay)
        for evaluation in evaluations:
            if self.centre is None or evaluation.merit < self.centre.merit:
                self.centre = evaluation

    def _sample(self, point: Point) -> Point:
        domain, generator = self.view.domain, self.view.generator
        low, high = np.array(domain.lower), np.array(domain.upper)
        while True:
            step = np.rint(generator.normal(0.0, self.spread, len(low))).astype(int)
            values = np.clip(np.array(point.values) + step, low, high)
            sample = Point(tuple(int(value) for value in values), point.permutation)
            while domain.permute and generator.random() < self.options.swap:
                swaps = domain.transpositions(sample)
                sample = swaps[int(generator.integers(1, len(swaps)))]
            if domain.allows(sample):
                return sample
