"""The contract between a search method and the driver: ask and tell.

A method never sees the tensor. It sees the domain, the objective and the spectrum (singular values only),
proposes points, and is told what their fits gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tnss.objective import Objective
from tnss.space import Domain, Point
from tnss.spectrum import Spectrum
from tnss.structure import Structure


@dataclass(frozen=True)
class View:
    """What a method may know of the problem."""

    domain: Domain
    objective: Objective
    spectrum: Spectrum | None
    generator: np.random.Generator
    start: Point | None = None

    @property
    def entries(self) -> int:
        """Entries of the dense tensor."""
        return int(np.prod(self.domain.sizes))

    def merit(self, structure: Structure, rse: float) -> float:
        """What a search descends (finite also where a budget is broken)."""
        return self.objective.merit(structure.parameters, rse, self.entries)

    def first_point(self) -> Point:
        """The start that was asked for, or a random one."""
        return self.start or self.domain.random(self.generator)


@dataclass(frozen=True)
class Proposal:
    """A point to evaluate.

    Attributes:
        point: of the domain.
        parent: a structure already fitted whose cores are a good start, if any.
        target: the RSE above which the fit is of no use and may be dropped, if any.
    """

    point: Point
    parent: Structure | None = None
    target: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What a method is told of a proposal."""

    point: Point
    structure: Structure
    rse: float
    merit: float


class Method(Protocol):
    """A search method."""

    def ask(self) -> list[Proposal]:
        """The next points to evaluate, together; empty when the method has nothing left to try."""

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """The outcome of the points asked for, in their order."""
