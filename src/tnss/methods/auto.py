"""The default method: the lower bound first, then TnALE's moves in the order a surrogate gives them.

First, structures are fitted in ascending order of their lower bound. Where the tensor is of low rank this ends
within a few fits, with a proof. Otherwise structures that match the exact ranks of the tensor, if it has such, and two
smaller ones are fitted (and some of the tensor's own size, where all of these cost more than its entries), and the
search descends by TnALE's moves (one rank, or two modes swapped), and by pairs of them, which is what leaves a
plateau. The surrogate, a ridge regression of log RSE on the tails of the spectrum plus the residuals of fitted
neighbours, only orders the moves; the bound takes out those that cannot win. Under strong noise neither tells the
candidates apart, and the fits of one structure differ by more than those of its neighbours: where the moves have
failed for a while, every other round therefore enumerates TnALE's grids around the best structure, from fresh starts.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tnss.bound import BoundSearch
from tnss.methods.base import Evaluation, Proposal, View
from tnss.methods.ranks import RankMatch
from tnss.methods.surrogate import Surrogate
from tnss.objective import ErrorBudget, Lagrangian, Objective
from tnss.space import Point
from tnss.structure import Structure

Candidate = tuple[Structure, Point, Evaluation]  # with the fitted structure it is a move from

FAR = 50.0  # times the cost of the entries themselves: from there on, larger structures are tried soon
PRICES = (8.0, 64.0)  # of parameters, in the descents of the bound that moves begin with
MATCHES, MATCH_DESCENTS = 8, 60  # structures fitted that match the tensor's ranks, and descents to find them


@dataclass(frozen=True)
class AutoOptions:
    """Settings of the default method.

    Args:
        radius: of a rank's grid in a move.
        batch: structures fitted together while moving.
        nodes: boxes the branch and bound may look at before each of its proposals.
        bound_patience: proposals of the bound in a row that may fail before moves take over.
        patience: evaluations without improvement after which the search ends.
        candidates: pairs of moves drawn in each round.
        stall: evaluations without improvement after which every other round enumerates the grids around the best.
    """

    radius: int = 1
    batch: int = 4
    nodes: int = 150_000
    bound_patience: int = 4
    patience: int = 120
    candidates: int = 200
    stall: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")


class Auto:
    """Bound-led proposals, then surrogate-ordered moves.

    Attributes:
        bounds: the branch and bound, from which the driver reads what is proved; None without a spectrum.
        rounds: batches of moves made so far.
    """

    def __init__(self, view: View, options: AutoOptions | None = None) -> None:
        self.view, self.options = view, options or AutoOptions()
        self.bounds: BoundSearch | None = None
        if view.spectrum is not None:
            self.bounds = BoundSearch(view.domain, view.spectrum, view.objective)
        self.surrogate = Surrogate(view)
        self.guides: list[Objective] = [view.objective]
        if isinstance(view.objective, ErrorBudget):
            # a budget alone is a wall: trade-offs lead along it, through structures that just miss it
            self.guides += [Lagrangian(200.0), Lagrangian(20.0)]
        self.rounds = 0
        self.fitted: dict[str, Evaluation] = {}
        self.best: Evaluation | None = None
        self.since_best = 0
        self._steps = self._search()

    def ask(self) -> list[Proposal]:
        """The next structures; empty when nothing is left that could win, or patience is spent."""
        return next(self._steps, [])

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Remember, and lower the cutoff of the bound."""
        for evaluation in evaluations:
            self.fitted[evaluation.structure.key] = evaluation
            self.since_best += 1
            if self.best is None or evaluation.merit < self.best.merit:
                self.best, self.since_best = evaluation, 0
        if self.bounds is not None:
            self.bounds.cutoff = min(self.bounds.cutoff, self._cutoff())

    def _cutoff(self) -> float:
        """The best objective reached; infinite while every fit breaks its budget."""
        if self.best is None:
            return float("inf")
        structure, rse = self.best.structure, self.best.rse
        return float(self.view.objective.value(structure.parameters, rse, self.view.entries))

    def _search(self) -> Generator[list[Proposal], None, None]:
        if self.view.start is not None:
            yield [Proposal(self.view.start)]
        if self.bounds is None:
            yield [Proposal(self.view.first_point())]
        else:
            yield from self._by_bound(self.bounds)
            if self.bounds.remaining() >= self._cutoff():
                return
            yield from self._further_starts()
        while self.since_best < self.options.patience:
            self.rounds += 1
            proposals: list[Proposal] = []
            if self.since_best >= self.options.stall and self.rounds % 2:
                proposals = self._enumeration()
            proposals = proposals or self._moves()
            if not proposals:
                return
            yield proposals

    def _by_bound(self, bounds: BoundSearch) -> Generator[list[Proposal], None, None]:
        """Fit a structure of low bound, found by descent, then those the branch and bound brings out."""
        if proposals := self._new([self._descend(1.0)]):
            yield proposals
        failed = 0
        while failed < self.options.bound_patience:
            point = bounds.next(self.options.nodes)
            if point is None:
                return
            before = self.best
            if proposals := self._new([point]):
                yield proposals
                hopeless = self._cutoff() > FAR * self._cost_of_entries()
                failed = failed + 1 if hopeless or self.best is before else 0

    def _further_starts(self) -> Generator[list[Proposal], None, None]:
        """Structures to move from, where the bound alone has not led to the end."""
        ranks = RankMatch(self.view)
        if ranks.informs and (proposals := self._new(ranks.points(MATCHES, MATCH_DESCENTS))):
            yield proposals
        small = [self._descend(price) for price in PRICES]
        if proposals := self._new(small):
            yield proposals
        if self.best is not None and self._cutoff() > self._cost_of_entries():
            # what is small fits no noise, so its order of the modes is as good a guess as that of the best so far
            if proposals := self._new(self._fill(point) for point in [self.best.point, *small]):
                yield proposals

    def _new(self, points: Iterable[Point], parent: Evaluation | None = None) -> list[Proposal]:
        """Proposals for the points whose structures are not fitted yet, each once."""
        proposals, seen = [], set()
        cutoff = self._cutoff()
        for point in points:
            structure = self.view.domain.decode(point)
            if structure.key in self.fitted or structure.key in seen:
                continue
            seen.add(structure.key)
            limit = float(self.view.objective.rse_limit(structure.parameters, cutoff, self.view.entries))
            target = limit if np.isfinite(limit) and limit >= 0 else None
            proposals.append(Proposal(point, parent.structure if parent else None, target))
        return proposals

    def _descend(self, price: float) -> Point:
        """A point whose bound no single move lowers: the best of some descents from random points.

        Parameters count ``price`` times: with noise the bound promises that more of them go on to help.
        """
        view = self.view
        assert view.spectrum is not None

        def values(points: Sequence[Point]) -> np.ndarray:
            structures = [view.domain.decode(point) for point in points]
            bounds = view.spectrum.bound(structures)  # type: ignore[union-attr]
            pairs = zip(structures, bounds, strict=True)
            return np.array(
                [
                    view.merit(structure, float(rse)) + (price - 1.0) * structure.parameters / view.entries
                    for structure, rse in pairs
                ]
            )

        best, best_value = view.first_point(), float("inf")
        for start in [best, *(view.domain.random(view.generator) for _ in range(5))]:
            point, value = start, float(values([start])[0])
            while True:
                around = list(view.domain.neighbours(point, self.options.radius))
                found = values(around)
                if found.min() >= value:
                    break
                point, value = around[int(found.argmin())], float(found.min())
            if value < best_value:
                best, best_value = point, value
        return best

    def _cost_of_entries(self) -> float:
        """The objective of the tensor itself, stored entry by entry."""
        entries = self.view.entries
        return float(self.view.objective.value(entries, 0.0, entries))

    def _fill(self, point: Point) -> Point:
        """``point`` with all ranks alike, as large as the number of entries allows.

        Where what was fitted costs more than the entries, the noise is worth its parameters, and no move of one rank
        from a small structure shows it.
        """
        domain, best = self.view.domain, point
        for rank in range(1, max(domain.upper[: domain.ranks]) + 1):
            bounds = zip(domain.lower[: domain.ranks], domain.upper, strict=False)
            values = tuple(min(max(rank, low), high) for low, high in bounds) + point.values[domain.ranks :]
            larger = Point(values, point.permutation)
            if domain.decode(larger).parameters > self.view.entries:
                break
            best = larger
        return best

    def _moves(self) -> list[Proposal]:
        """The most promising unfitted structures around the best ones."""
        view, options = self.view, self.options
        guide = self.guides[self.rounds % len(self.guides)]
        leaders = sorted(self.fitted.values(), key=lambda e: guide.merit(e.structure.parameters, e.rse, view.entries))[
            :3
        ]
        origin: dict[str, tuple[Point, Evaluation]] = {}
        for leader in leaders:
            near = list(view.domain.neighbours(leader.point, options.radius))
            for point in [*near, *self._pairs(leader.point, options.candidates // len(leaders))]:
                origin.setdefault(view.domain.decode(point).key, (point, leader))
        candidates = self._that_can_win(origin.values())
        if not candidates:
            return []
        mean, spread = self._expected(candidates)
        chosen: list[int] = []
        for slot in range(min(options.batch, len(candidates))):
            optimism = 1.0 if slot % 2 else 0.25
            expected = np.exp(mean - optimism * spread)
            pairs = zip(candidates, expected, strict=True)
            merits = np.array([guide.merit(s.parameters, float(rse), view.entries) for (s, _, _), rse in pairs])
            merits[chosen] = np.inf
            chosen.append(int(merits.argmin()))
        return [proposal for i in chosen for proposal in self._new([candidates[i][1]], candidates[i][2])]

    def _enumeration(self) -> list[Proposal]:
        """The most promising unfitted structures one move from the best one, to be fitted from fresh starts only."""
        best = self.best
        assert best is not None
        near = self.view.domain.neighbours(best.point, self.options.radius)
        candidates = self._that_can_win((point, best) for point in near)
        if not candidates:
            return []
        mean, _ = self._expected(candidates)
        pairs = zip(candidates, np.exp(mean), strict=True)
        order = np.argsort([self.view.merit(s, float(rse)) for (s, _, _), rse in pairs], kind="stable")
        return self._new([candidates[i][1] for i in order])[: self.options.batch]

    def _expected(self, candidates: Sequence[Candidate]) -> tuple[np.ndarray, np.ndarray]:
        """Log RSE that the surrogate expects, and its spread."""
        self.surrogate.fit(list(self.fitted.values()))
        return self.surrogate.predict([structure for structure, _, _ in candidates])

    def _pairs(self, point: Point, count: int) -> list[Point]:
        """Random points two or three moves away."""
        domain, generator = self.view.domain, self.view.generator
        found = []
        for _ in range(count):
            other = point
            for _ in range(2 + int(generator.random() < 0.3)):
                if domain.permute and generator.random() < 0.4:
                    around = domain.transpositions(other)[1:]
                else:
                    variable = int(generator.integers(len(domain.lower)))
                    around = domain.grid(other, variable, self.options.radius)
                other = around[int(generator.integers(len(around)))]
            found.append(other)
        return found

    def _that_can_win(self, moves: Iterable[tuple[Point, Evaluation]]) -> list[Candidate]:
        """Points and where they come from, with their structures: those not fitted with a bound below the best."""
        decoded = [(self.view.domain.decode(point), point, origin) for point, origin in moves]
        candidates = [candidate for candidate in decoded if candidate[0].key not in self.fitted]
        if self.view.spectrum is None or not candidates:
            return candidates
        structures = [structure for structure, _, _ in candidates]
        parameters = np.array([structure.parameters for structure in structures])
        bound = self.view.spectrum.bound(structures)
        values = self.view.objective.value(parameters, bound, self.view.entries)
        return [candidate for candidate, value in zip(candidates, values, strict=True) if value < self._cutoff()]
