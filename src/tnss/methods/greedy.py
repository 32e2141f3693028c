"""Greedy rank growth (arXiv 2008.05437): from the smallest ranks, raise the one that helps most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tnss.methods.base import Evaluation, Proposal, View
from tnss.space import Point


@dataclass(frozen=True)
class GreedyOptions:
    """Settings of the greedy search.

    Args:
        patience: steps that may fail to improve the best before the search ends.
    """

    patience: int = 6

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience: expected at least 1, got {self.patience}")


class Greedy:
    """Raise each rank by one in turn, keep the least error per parameter added, go on from its cores."""

    def __init__(self, view: View, options: GreedyOptions | None = None) -> None:
        self.view, self.options = view, options or GreedyOptions()
        self.current: Evaluation | None = None
        self.best = float("inf")
        self.waited = 0

    def ask(self) -> list[Proposal]:
        """The smallest structure, then one step up along each rank."""
        domain = self.view.domain
        if self.current is None:
            drawn = self.view.first_point()
            smallest = Point((*domain.lower[: domain.ranks], *drawn.values[domain.ranks :]), drawn.permutation)
            return [Proposal(self.view.start or smallest)]
        if self.waited >= self.options.patience:
            return []
        point, structure = self.current.point, self.current.structure
        raised = [
            Point((*point.values[:i], point.values[i] + 1, *point.values[i + 1 :]), point.permutation)
            for i in range(domain.ranks)
            if point.values[i] < domain.upper[i]
        ]
        return [Proposal(other, parent=structure) for other in raised if domain.allows(other)]

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Step to the child with the largest fall of the error for its parameters."""
        if self.current is None:
            self.current = evaluations[0]
        else:
            before = self.current

            def gain(child: Evaluation) -> float:
                added = child.structure.parameters - before.structure.parameters
                return (before.rse - child.rse) / max(added, 1)

            self.current = max(evaluations, key=gain)
        self.waited = 0 if self.current.merit < self.best else self.waited + 1
        self.best = min(self.best, self.current.merit)
