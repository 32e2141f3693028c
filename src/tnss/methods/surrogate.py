"""A cheap guess of a structure's RSE before it is fitted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnss.methods.base import Evaluation, View
from tnss.structure import Structure

FLOOR = 1e-9  # an RSE below this is as good as exact
RIDGE = 0.3
SPREAD = 0.4  # of log RSE far from all fitted structures


class Surrogate:
    """Ridge regression of log RSE on spectral tails, corrected by the residuals of fitted neighbours.

    The neighbours count with ``exp(-distance)``, distance being the sum over edges of the differences of log
    rank (base 2); that is also what the spread falls with.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        order = view.domain.order
        sizes = np.array([mask.bit_count() for mask in (view.spectrum.cuts.tolist() if view.spectrum else [])])
        self._groups = [np.flatnonzero(np.minimum(sizes, order - sizes) == size) for size in range(1, order // 2 + 1)]
        self._groups = [group for group in self._groups if len(group)]
        self._features: dict[str, np.ndarray] = {}

    def fit(self, evaluations: Sequence[Evaluation]) -> None:
        """Learn from every structure fitted so far."""
        structures = [evaluation.structure for evaluation in evaluations]
        features = self._features_of(structures)
        target = np.log(np.maximum([evaluation.rse for evaluation in evaluations], FLOOR))
        self._mean, self._scale = features.mean(0), features.std(0) + 1e-9
        design = np.column_stack([np.ones(len(features)), (features - self._mean) / self._scale])
        penalty = RIDGE * np.eye(design.shape[1])
        penalty[0, 0] = 1e-9
        self._weights = np.linalg.solve(design.T @ design + penalty, design.T @ target)
        self._residuals = target - design @ self._weights
        self._ranks = self._rank_vectors(structures)

    def predict(self, structures: Sequence[Structure]) -> tuple[np.ndarray, np.ndarray]:
        """Expected log RSE and its spread, [B] each."""
        features = (self._features_of(structures) - self._mean) / self._scale
        mean = np.column_stack([np.ones(len(features)), features]) @ self._weights
        ranks = self._rank_vectors(structures)
        distance = np.abs(ranks[:, None] - self._ranks[None]).sum(2)
        kernel = np.exp(-distance)
        mean = mean + (kernel @ self._residuals) / (kernel.sum(1) + 0.2)
        return mean, SPREAD / np.sqrt(1 + 3 * kernel.sum(1))

    def _rank_vectors(self, structures: Sequence[Structure]) -> np.ndarray:
        slots = self.view.domain.slots
        ranks = np.zeros((len(structures), slots, slots))
        for i, structure in enumerate(structures):
            for u, v, rank in structure.edges:
                ranks[i, u, v] = np.log2(rank)
        return ranks.reshape(len(structures), -1)

    def _features_of(self, structures: Sequence[Structure]) -> np.ndarray:
        missing = [structure for structure in structures if structure.key not in self._features]
        if missing:
            columns = [np.log([structure.parameters for structure in missing])]
            if self.view.spectrum is not None:
                tails = self.view.spectrum.cut_tails(missing)
                columns.append(np.log(tails.max(1) + 1e-4))
                columns += [np.log(tails[:, group].mean(1) + 1e-4) for group in self._groups]
            for structure, row in zip(missing, np.column_stack(columns), strict=True):
                self._features[structure.key] = row
        return np.array([self._features[structure.key] for structure in structures])
