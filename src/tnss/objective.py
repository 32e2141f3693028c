"""What a search minimises: a function of parameters and squared relative error, rising in both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

SLACK = 1e-9  # relative slack within which an error budget counts as met


class Objective(Protocol):
    """A trade-off of parameters (of ``entries`` stored densely) and RSE, never falling in either.

    Because it never falls in the RSE, its value at a lower bound of the RSE is a lower bound of the objective.
    All methods take numbers or arrays.
    """

    def value(self, parameters: np.ndarray | float, rse: np.ndarray | float, entries: int) -> np.ndarray:
        """The objective; infinite where a budget is broken."""

    def merit(self, parameters: float, rse: float, entries: int) -> float:
        """What a search descends: the objective where that is finite, else larger than any finite value."""

    def rse_limit(self, parameters: np.ndarray | float, value: float, entries: int) -> np.ndarray:
        """The largest RSE with which ``parameters`` can have an objective of at most ``value`` (-1: none)."""

    def parameter_limit(self, rse: np.ndarray | float, value: float, entries: int) -> np.ndarray:
        """The most parameters with which an RSE can have an objective of at most ``value``."""


@dataclass(frozen=True)
class Lagrangian:
    """``parameters / entries + weight * rse``, the objective of arXiv 2304.12875 (eq. 2)."""

    weight: float

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight: expected a positive number, got {self.weight}")

    def value(self, parameters: np.ndarray | float, rse: np.ndarray | float, entries: int) -> np.ndarray:
        """``parameters / entries + weight * rse``."""
        return np.asarray(parameters, float) / entries + self.weight * np.asarray(rse, float)

    def merit(self, parameters: float, rse: float, entries: int) -> float:
        """The value itself."""
        return float(self.value(parameters, rse, entries))

    def rse_limit(self, parameters: np.ndarray | float, value: float, entries: int) -> np.ndarray:
        """``(value - parameters / entries) / weight``."""
        return (value - np.asarray(parameters, float) / entries) / self.weight

    def parameter_limit(self, rse: np.ndarray | float, value: float, entries: int) -> np.ndarray:
        """``(value - weight * rse) * entries``."""
        return (value - self.weight * np.asarray(rse, float)) * entries


@dataclass(frozen=True)
class ErrorBudget:
    """Fewest parameters with an RSE of at most ``rse``; the value is the number of parameters."""

    rse: float

    def __post_init__(self) -> None:
        if not (self.rse >= 0 and math.isfinite(self.rse)):
            raise ValueError(f"rse: expected a number of at least 0, got {self.rse}")

    @property
    def allowed(self) -> float:
        """The budget with its slack; an exact fit is one to rounding (1e-12)."""
        return max(self.rse * (1 + SLACK), 1e-12)

    def value(self, parameters: np.ndarray | float, rse: np.ndarray | float, entries: int) -> np.ndarray:
        """The parameters, or infinity where the RSE is above the budget."""
        return np.where(np.asarray(rse) <= self.allowed, np.asarray(parameters, float), np.inf)

    def merit(self, parameters: float, rse: float, entries: int) -> float:
        """Broken budgets rank by how far they are off (in powers of ten), then by parameters."""
        if rse <= self.allowed:
            return float(parameters)
        return 1e3 * entries * (1 + math.log10(rse / self.allowed)) + float(parameters)

    def rse_limit(self, parameters: np.ndarray | float, value: float, entries: int) -> np.ndarray:
        """The budget, or -1 where the parameters alone are above ``value``."""
        return np.where(np.asarray(parameters) <= value, self.allowed, -1.0)

    def parameter_limit(self, rse: np.ndarray | float, value: float, entries: int) -> np.ndarray:
        """``value``, or 0 where the RSE is above the budget."""
        return np.where(np.asarray(rse) <= self.allowed, value, 0.0)


@dataclass(frozen=True)
class ParameterBudget:
    """Least RSE with at most ``parameters`` parameters; the value is the RSE."""

    parameters: int

    def __post_init__(self) -> None:
        if self.parameters < 1:
            raise ValueError(f"parameters: expected at least 1, got {self.parameters}")

    def value(self, parameters: np.ndarray | float, rse: np.ndarray | float, entries: int) -> np.ndarray:
        """The RSE, or infinity where there are too many parameters."""
        return np.where(np.asarray(parameters) <= self.parameters, np.asarray(rse, float), np.inf)

    def merit(self, parameters: float, rse: float, entries: int) -> float:
        """Broken budgets rank by their parameters."""
        return float(rse) if parameters <= self.parameters else 1e3 + float(parameters) / self.parameters

    def rse_limit(self, parameters: np.ndarray | float, value: float, entries: int) -> np.ndarray:
        """``value``, or -1 where there are too many parameters."""
        return np.where(np.asarray(parameters) <= self.parameters, value, -1.0)

    def parameter_limit(self, rse: np.ndarray | float, value: float, entries: int) -> np.ndarray:
        """The budget, or 0 where the RSE alone is above ``value``."""
        return np.where(np.asarray(rse) <= value, float(self.parameters), 0.0)
