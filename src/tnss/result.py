"""What a search gives back."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnss.network import Network
from tnss.objective import Objective

RESOLUTION = 1e-9  # a gap below this is rounding: less than one parameter of a tensor of 1e9 entries


@dataclass(frozen=True)
class Record:
    """One row of the history: one evaluation.

    ``fits``, ``sweeps`` and ``seconds`` are 0 where a structure met again was answered from memory. ``converged``
    is False where its fit was dropped because it could not win.
    """

    evaluation: int
    structure: str
    parameters: int
    compression: float
    rse: float
    objective: float
    fits: int
    sweeps: int
    seconds: float
    converged: bool


@dataclass(frozen=True)
class Result:
    """The outcome of a search.

    Attributes:
        best: the best network found, with its cores, ``rse``, ``parameters`` and ``objective``.
        gap: no structure of the space, fitted or not, can have an objective lower than the best's by more than
            this. 0 means optimal. Infinite where no budget was met.
        unfitted_gap: the same for the structures that were not fitted only. 0 means that an exhaustive search
            with this solver could not have done better; a fitted structure may still have a better fit than the
            local solver found.
        history: one row an evaluation, in order.
        networks: the best fit of every structure evaluated, in the order of their first evaluation.
        seconds: time of the whole search.
        objective: what was minimised.
    """

    best: Network
    gap: float
    unfitted_gap: float
    history: list[Record]
    networks: list[Network]
    seconds: float
    objective: Objective

    def __post_init__(self) -> None:
        for name in ("gap", "unfitted_gap"):
            if getattr(self, name) <= RESOLUTION:
                object.__setattr__(self, name, 0.0)

    @property
    def optimal(self) -> bool:
        """Whether the best is proved to be a minimum over the whole space."""
        return self.gap == 0.0

    @property
    def feasible(self) -> bool:
        """Whether the best keeps the budget."""
        return math.isfinite(self.best.objective)

    @property
    def unique_structures(self) -> int:
        """Different structures evaluated."""
        return len(self.networks)

    def pareto(self) -> list[Network]:
        """The fits that no other beats in both parameters and RSE, by ascending parameters."""
        front: list[Network] = []
        for network in sorted(self.networks, key=lambda n: (n.parameters, n.rse)):
            if not front or network.rse < front[-1].rse:
                front.append(network)
        return front

    def summary(self) -> dict[str, object]:
        """The figures of the result, for JSON."""
        return {
            "structure": self.best.structure.to_dict(),
            "parameters": self.best.parameters,
            "compression": self.best.structure.compression,
            "rse": self.best.rse,
            "objective": self.best.objective,
            "gap": self.gap,
            "unfitted_gap": self.unfitted_gap,
            "optimal": self.optimal,
            "feasible": self.feasible,
            "evaluations": len(self.history),
            "unique_structures": self.unique_structures,
            "fits": sum(record.fits for record in self.history),
            "sweeps": sum(record.sweeps for record in self.history),
            "seconds": self.seconds,
            "searched_for": repr(self.objective),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write structure and figures (JSON), cores (safetensors), history (CSV) and drawings (PNG)."""
        from tnss.plotting import draw_network, plot_pareto

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.best.save(folder / "cores.safetensors")
        _replace_text(folder / "result.json", json.dumps(self.summary(), indent=2) + "\n")
        write_csv(folder / "history.csv", [dataclasses.asdict(record) for record in self.history])
        draw_network(self.best.structure, folder / "network.png")
        plot_pareto(self, folder / "pareto.png")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the same keys, atomically."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _replace_text(path, text.getvalue())


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text)
    os.replace(temporary, path)
