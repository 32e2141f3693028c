"""TnALE: alternating local enumeration (arXiv 2304.12875, algorithm 1), by the book.

One round trip over the variables (first to last, then the permutation, then last to first) enumerates each one's
neighbourhood with the others held, and moves to the best. In the optional initial phase only three points of a
rank's grid are fitted and the RSE of the others is interpolated by two straight lines.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from tnss.methods.base import Evaluation, Proposal, View
from tnss.space import Point


@dataclass(frozen=True)
class TnALEOptions:
    """Settings of TnALE, named as in the paper.

    Args:
        initial_radius: radius of the initial phase (r_1).
        radius: radius of the main phase (r_2).
        initial_rounds: iterations of the initial phase (L_0); 0 leaves it out.
        round_trips: round trips an iteration (D).
    """

    initial_radius: int = 2
    radius: int = 1
    initial_rounds: int = 2
    round_trips: int = 1

    def __post_init__(self) -> None:
        for name in ("initial_radius", "radius", "round_trips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.initial_rounds < 0:
            raise ValueError(f"initial_rounds: expected at least 0, got {self.initial_rounds}")


class TnALE:
    """Alternating local enumeration; asks for one variable's grid at a time."""

    def __init__(self, view: View, options: TnALEOptions | None = None) -> None:
        self.view, self.options = view, options or TnALEOptions()
        self._known: dict[str, float] = {}  # best RSE by structure: refits act as restarts
        self._told: list[Evaluation] = []
        self._steps = self._search()
        self._asked: list[Proposal] | None = None

    def ask(self) -> list[Proposal]:
        """The grid of the next variable."""
        self._asked = next(self._steps)
        return self._asked

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """The outcome of that grid."""
        self._told = list(evaluations)
        for evaluation in evaluations:
            key = evaluation.structure.key
            self._known[key] = min(evaluation.rse, self._known.get(key, float("inf")))

    def _search(self) -> Generator[list[Proposal], None, None]:
        domain, options = self.view.domain, self.options
        point = self.view.first_point()
        centre, centre_merit, stuck, iteration = point, float("inf"), 0, 0
        while True:
            initial = iteration < options.initial_rounds
            radius = options.initial_radius if initial else options.radius
            if iteration == options.initial_rounds:
                centre_merit = float("inf")  # values that rest on interpolation are forgotten
            point, merit = yield from self._iteration(point, radius, initial)
            stuck = 0 if merit < centre_merit else stuck + 1
            if merit <= centre_merit:
                centre, centre_merit = point, merit
            if merit > centre_merit or stuck > domain.order:
                point, stuck = self._random_neighbour(centre, radius), 0
            iteration += 1

    def _iteration(
        self, point: Point, radius: int, interpolate: bool
    ) -> Generator[list[Proposal], None, tuple[Point, float]]:
        variables = list(range(len(self.view.domain.lower)))
        merit = float("inf")
        for _ in range(self.options.round_trips):
            for variable in [*variables, None, *reversed(variables)]:
                if variable is None:
                    if not self.view.domain.permute:
                        continue
                    grid = self.view.domain.transpositions(point)
                else:
                    grid = self.view.domain.grid(point, variable, radius)
                ranks_only = variable is not None and variable < self.view.domain.ranks
                point, merit = yield from self._enumerate(grid, interpolate and ranks_only)
        return point, merit

    def _enumerate(self, grid: list[Point], interpolate: bool) -> Generator[list[Proposal], None, tuple[Point, float]]:
        """Fit a grid (three points of it when interpolating) and give its best point."""
        fitted = sorted({0, len(grid) // 2, len(grid) - 1}) if interpolate else list(range(len(grid)))
        yield [Proposal(grid[i]) for i in fitted]
        structures = [self.view.domain.decode(point) for point in grid]
        rse = {i: self._known[structures[i].key] for i in fitted}
        for left, right in itertools.pairwise(fitted):
            for i in range(left + 1, right):
                share = (i - left) / (right - left)
                rse[i] = (1 - share) * rse[left] + share * rse[right]
        merits = {i: self.view.merit(structures[i], rse[i]) for i in rse}
        best = min(merits, key=lambda i: (merits[i], i))
        return grid[best], merits[best]

    def _random_neighbour(self, centre: Point, radius: int) -> Point:
        """A random point of the neighbourhood: every variable moved within its radius, two modes swapped."""
        generator, domain = self.view.generator, self.view.domain
        point = centre
        for variable in range(len(domain.lower)):
            grid = domain.grid(point, variable, radius)
            point = grid[int(generator.integers(len(grid)))]
        swaps = domain.transpositions(point)
        return swaps[int(generator.integers(len(swaps)))]
