"""TnALE: alternating local enumeration (arXiv 2304.12875, algorithm 1), by the book.

An iteration is a round trip over the variables (first to last, then the permutation, then last to first) that
enumerates each one's grid around the iteration's centre with the others held, and moves to the best. The next centre
is the best point found. Where the steps keep leading back to the centre, or the iteration ends worse than it, the next
one starts from a random point of the centre's neighbourhood. In the optional initial phase only three points of a
rank's grid are fitted and the RSE of the others is interpolated by two straight lines.

The paper leaves some rules open (when a search is stuck, what a restart draws); they are those of its authors' code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from tnss.methods.base import Evaluation, Proposal, View
from tnss.space import Domain, Point

RANDOM_TRIES = 100


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
        self._carried = math.inf  # least RSE, fitted or interpolated, of the point the search stands on
        self._told: list[Evaluation] = []
        self._steps = self._search()

    def ask(self) -> list[Proposal]:
        """The grid of the next variable."""
        return next(self._steps)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """The outcome of that grid."""
        self._told = list(evaluations)

    def _search(self) -> Generator[list[Proposal], None, None]:
        options = self.options
        point = self.view.first_point()
        centre, centre_merit, restarted = point, math.inf, False
        for iteration in itertools.count():
            initial = iteration < options.initial_rounds
            radius = options.initial_radius if initial else options.radius
            reach = _Reach(centre, radius, initial, watched=iteration > 0, restarted=restarted)
            point, merit, ending = yield from self._iteration(point, reach)
            better = merit <= centre_merit
            if iteration + 1 == options.initial_rounds:  # what rests on interpolation is forgotten
                centre = point if better else centre
                point, centre_merit, restarted, self._carried = centre, math.inf, False, math.inf
            elif ending == "complete" and better:
                centre, centre_merit, restarted = point, merit, False
            else:
                if ending == "stuck":
                    centre, centre_merit = point, merit
                point, restarted, self._carried = self._random_neighbour(centre, radius), True, math.inf

    def _iteration(self, point: Point, reach: _Reach) -> Generator[list[Proposal], None, tuple[Point, float, str]]:
        """One iteration from a point; gives its best point and objective, and how it ended.

        It is over at the end of its round trips (``"complete"``), or once as many steps as there are variables have
        led to the centre (``"stuck"``), or one has, if it began at a random point (``"returned"``).
        """
        variables: list[int | None] = list(range(len(self.view.domain.lower)))
        if self.view.domain.permute:
            variables.append(None)
        trip = [*variables, *variables[-2:0:-1]] * self.options.round_trips + variables[:1]
        best, best_merit, at_centre = point, math.inf, 0
        for variable in trip:
            point, merit = yield from self._enumerate(point, variable, reach)
            if merit <= best_merit:
                best, best_merit = point, merit
            if reach.watched and point == reach.centre:
                at_centre += 1
                if reach.restarted:
                    return best, best_merit, "returned"
                if at_centre == len(variables):
                    return best, best_merit, "stuck"
        return best, best_merit, "complete"

    def _enumerate(
        self, point: Point, variable: int | None, reach: _Reach
    ) -> Generator[list[Proposal], None, tuple[Point, float]]:
        """Fit the grid of a variable around the centre (three points of it when interpolating); give its best point.

        The point the search stands on is fitted again and keeps the least RSE it had: repeats act as restarts.
        """
        domain = self.view.domain
        grid = _grid(domain, point, variable, reach)
        here = grid.index(point)
        interpolate = reach.interpolate and variable is not None and variable < domain.ranks
        fitted = sorted({0, len(grid) // 2, len(grid) - 1}) if interpolate else list(range(len(grid)))
        yield [Proposal(grid[i]) for i in fitted]
        rse = {i: evaluation.rse for i, evaluation in zip(fitted, self._told, strict=True)}
        if here in rse:
            rse[here] = min(rse[here], self._carried)
        for left, right in itertools.pairwise(fitted):
            for i in range(left + 1, right):
                share = (i - left) / (right - left)
                rse[i] = (1 - share) * rse[left] + share * rse[right]
        rse[here] = min(rse[here], self._carried)
        merits = {i: self.view.merit(domain.decode(grid[i]), rse[i]) for i in rse}
        best = min(merits, key=lambda i: (merits[i], i))
        self._carried = rse[best]
        return grid[best], merits[best]

    def _random_neighbour(self, centre: Point, radius: int) -> Point:
        """A random point of the neighbourhood, differing in more than the variable that is enumerated first."""
        generator, domain = self.view.generator, self.view.domain
        reach = _Reach(centre, radius)
        for _ in range(RANDOM_TRIES):
            point = centre
            for variable in [*range(len(domain.lower)), *([None] if domain.permute else [])]:
                grid = _grid(domain, point, variable, reach)
                point = grid[int(generator.integers(len(grid)))]
            if point.values[1:] != centre.values[1:] or point.permutation != centre.permutation:
                break
        return point


@dataclass(frozen=True)
class _Reach:
    """The neighbourhood of an iteration: all its grids lie around one centre."""

    centre: Point
    radius: int
    interpolate: bool = False
    watched: bool = False
    restarted: bool = False


def _grid(domain: Domain, point: Point, variable: int | None, reach: _Reach) -> list[Point]:
    """Points with another value of one variable, from the grid around the centre."""
    if variable is None:
        return [Point(point.values, other.permutation) for other in domain.transpositions(reach.centre)]
    return domain.grid(point, variable, reach.radius, reach.centre.values[variable])
