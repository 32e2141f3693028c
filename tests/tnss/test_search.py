"""The search as a whole: certificates, determinism, resuming, bad input. Tier T0."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import tnss
from tests.tnss.planted import A6A, A6B, A8A, planted_ring
from tnss.executor import Problem, Task
from tnss.network import Network

SMALL = tnss.Budget(8)
QUICK = tnss.ALS(restarts=1, sweeps=30, polish=0)


def rows(result: tnss.Result) -> list[tuple[object, ...]]:
    return [(r.evaluation, r.structure, r.parameters, r.rse, r.fits, r.sweeps) for r in result.history]


@pytest.mark.parametrize("case", [A6A, A6B], ids=["A6a", "A6b"])
def test_planted_ring_is_found_and_proved(case: tuple) -> None:
    tensor = planted_ring(*case)
    parameters = {11: 126, 12: 138}[case[3]]
    result = tnss.search(tensor, tnss.Ring(7))
    assert result.best.parameters <= parameters
    assert result.best.rse <= 1e-8
    assert result.optimal
    assert result.gap == 0
    assert len(result.history) <= 5


def test_order_eight_needs_no_enumeration() -> None:
    result = tnss.search(planted_ring(*A8A), tnss.Ring(7))
    assert (result.best.parameters, result.optimal) == (156, True)


def test_noise_is_never_called_optimal() -> None:
    """With noise the bound is below what any fit reaches: a gap stays, even where nothing is left to fit."""
    for noise in (1e-2, 3e-2, 1e-1):
        result = tnss.search(planted_ring(*A6A, noise=noise), tnss.Ring(5), budget=tnss.Budget(8))
        assert result.gap > 0
        assert not result.optimal
        assert 0 <= result.unfitted_gap <= result.gap


@pytest.mark.parametrize(
    ("objective", "space"),
    [
        (tnss.Lagrangian(1.0), tnss.Ring(2)),
        (tnss.ErrorBudget(0.4), tnss.Ring(2)),
        (tnss.ParameterBudget(30), tnss.Train(3)),
    ],
    ids=str,
)
def test_gap_is_true(objective: object, space: tnss.Ring) -> None:
    """Every structure of a small space, fitted hard, has an objective of at least best - gap."""
    tensor = torch.tensor(np.random.default_rng(0).standard_normal((3, 2, 3, 2)))
    domain = space.bind(tensor.shape)
    result = tnss.search(tensor, space, objective, budget=tnss.Budget(3), fit=QUICK)  # type: ignore[arg-type]
    generator = np.random.default_rng(1)
    structures = {domain.decode(domain.random(generator)) for _ in range(120)}
    requests = [tnss.FitRequest(structure, 1) for structure in structures]
    fitted = tnss.Fitter(tensor, tnss.ALS()).fit(requests)
    least = min(float(objective.value(n.parameters, n.rse, tensor.numel())) for n in fitted)  # type: ignore[attr-defined]
    assert least >= result.best.objective - result.gap - 1e-9
    known = {network.structure for network in result.networks}
    others = [n for n in fitted if n.structure not in known]
    least = min(float(objective.value(n.parameters, n.rse, tensor.numel())) for n in others)  # type: ignore[attr-defined]
    assert least >= result.best.objective - result.unfitted_gap - 1e-9


@pytest.mark.parametrize("method", ["auto", "tnale", "tnls", "tnga", "greedy"])
def test_same_seed_same_result(method: str) -> None:
    tensor = planted_ring(*A6A, noise=0.2)
    first, second, third = (
        tnss.search(tensor, tnss.Ring(4), tnss.Lagrangian(5.0), method, QUICK, SMALL, seed=seed) for seed in (1, 1, 2)
    )
    assert rows(first) == rows(second)
    assert rows(first) != rows(third)
    assert all(torch.equal(a, b) for a, b in zip(first.best.cores, second.best.cores, strict=True))


class KilledError(Exception):
    """Stands for the end of a process."""


class DyingExecutor(tnss.Local):
    """Local, but dies on its n-th batch after some fits of it are done and before they are handed over."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def run(self, problem: Problem, tasks: Sequence[Task]) -> Iterator[tuple[int, list[Network]]]:
        self.left -= 1
        if self.left < 0:
            raise KilledError
        yield from super().run(problem, tasks)


@pytest.mark.parametrize("method", ["auto", "tnale"])
def test_a_killed_run_goes_on_with_the_same_history(method: str, tmp_path: Path) -> None:
    tensor = planted_ring(*A6A, noise=0.2)

    def run(cache: Path | None, executor: tnss.Local) -> tnss.Result:
        return tnss.search(tensor, tnss.Ring(4), tnss.Lagrangian(5.0), method, QUICK, SMALL, executor, cache, seed=3)

    whole = run(None, tnss.Local())
    for batches in (1, 1):
        with pytest.raises(KilledError):
            run(tmp_path / "fits.sqlite", DyingExecutor(batches))
    resumed = run(tmp_path / "fits.sqlite", tnss.Local())
    assert rows(resumed) == rows(whole)
    again = run(tmp_path / "fits.sqlite", DyingExecutor(0))  # everything is in the cache: nothing is fitted
    assert rows(again) == rows(whole)
    assert [r.seconds for r in again.history] == [r.seconds for r in resumed.history]


def test_a_dropped_fit_of_the_cache_answers_only_who_would_drop_it(tmp_path: Path) -> None:
    """A fit that ``auto`` gave up because it could not win must not stand for the structure in another method."""
    tensor = torch.tensor(np.random.default_rng(0).standard_normal((3, 3, 3, 3)))

    def run(method: str, evaluations: int, start: tnss.Point | None = None) -> list[tnss.Record]:
        return tnss.search(
            tensor,
            tnss.Complete(3),
            tnss.Lagrangian(5.0),
            method,
            tnss.ALS(progress=1e-5, polish=0),
            tnss.Budget(evaluations),
            cache=tmp_path / "fits.sqlite",
            control=tnss.Control(start=start),
        ).history

    dropped = next(record for record in run("auto", 24) if not record.converged)
    ranks = {(u, v): rank for u, v, rank in tnss.Structure.from_dict(json.loads(dropped.structure)).edges}
    values = tuple(ranks.get(pair, 1) for pair in itertools.combinations(range(4), 2))
    whole = run("greedy", 1, tnss.Point(values, (0, 1, 2, 3)))[0]
    assert whole.structure == dropped.structure
    assert whole.converged
    assert whole.sweeps > dropped.sweeps


def test_permuting_the_modes_permutes_the_answer() -> None:
    tensor = planted_ring(*A6B)
    permutation = (4, 0, 5, 1, 3, 2)
    plain = tnss.search(tensor, tnss.Ring(5))
    permuted = tnss.search(tensor.permute(permutation), tnss.Ring(5))
    assert permuted.optimal
    assert permuted.best.parameters == plain.best.parameters
    again = tnss.Fitter(tensor.permute(permutation), tnss.ALS()).fit(
        [tnss.FitRequest(plain.best.structure.permuted(permutation))]
    )[0]
    assert again.rse < 1e-10


def test_scale_does_not_matter() -> None:
    tensor = planted_ring(*A6A)
    for factor in (1e-200, 1e200):
        result = tnss.search(tensor * factor, tnss.Ring(5))
        assert result.best.parameters == 126
        torch.testing.assert_close(result.best.reconstruct() / factor, tensor, rtol=1e-4, atol=1e-5)


def test_error_budget_and_parameter_budget() -> None:
    tensor = planted_ring(*A6A, noise=0.1)
    budget = tnss.search(tensor, tnss.Ring(4), tnss.ErrorBudget(0.02), budget=tnss.Budget(30), fit=QUICK)
    assert budget.feasible
    assert budget.best.rse <= 0.02 * (1 + 1e-8)
    assert budget.best.objective == budget.best.parameters
    assert budget.gap == int(budget.gap)
    size = tnss.search(tensor, tnss.Ring(4), tnss.ParameterBudget(100), budget=tnss.Budget(30), fit=QUICK)
    assert size.best.parameters <= 100
    assert size.best.objective == size.best.rse


@pytest.mark.parametrize("space", [tnss.Train(3), tnss.Tree(3), tnss.Complete(2, max_degree=2)], ids=repr)
def test_other_spaces(space: tnss.Train) -> None:
    tensor = torch.tensor(np.random.default_rng(0).standard_normal((3, 2, 4, 3)))
    result = tnss.search(tensor, space, tnss.Lagrangian(3.0), budget=tnss.Budget(6), fit=QUICK)
    assert tnss.relative_squared_error(tensor, result.best) == pytest.approx(result.best.rse, abs=1e-10)
    if isinstance(space, tnss.Complete):
        assert result.best.structure.max_degree <= 2


def test_three_modes_and_compression_above_ten() -> None:
    """A ring of three small modes with ranks up to 20 has up to 30 times the parameters of the tensor."""
    tensor = torch.randn(2, 2, 2, dtype=torch.float64)
    start = ((20, 20, 20), (0, 1, 2))
    control = tnss.Control(start=start)
    result = tnss.search(tensor, tnss.Ring(20), method="tnale", budget=SMALL, fit=QUICK, control=control)
    assert max(record.compression for record in result.history) > 10
    assert result.best.rse < 1e-8


def test_constant_tensor_is_solved_with_rank_one() -> None:
    result = tnss.search(torch.full((3, 4, 5), 2.5), tnss.Ring(4))
    assert result.best.structure.edges == ()
    assert result.optimal
    torch.testing.assert_close(result.best.reconstruct(), torch.full((3, 4, 5), 2.5, dtype=torch.float64))


def test_missing_entries_need_not_be_numbers() -> None:
    tensor = planted_ring(*A6A)
    weights = torch.tensor((np.random.default_rng(0).random(tensor.shape) > 0.1).astype(float))
    spoiled = torch.where(weights > 0, tensor, torch.full_like(tensor, math.nan))
    control = tnss.Control(start=((3, 4, 2, 2, 3, 2), (0, 3, 2, 1, 4, 5)))
    result = tnss.search(
        spoiled, tnss.Ring(4), budget=tnss.Budget(1), fit=tnss.ALS(polish=0), weights=weights, control=control
    )
    assert result.best.rse < 1e-8
    assert not result.optimal


def test_pareto_front_and_files(tmp_path: Path) -> None:
    tensor = planted_ring(*A6A, noise=0.3)
    result = tnss.search(tensor, tnss.Ring(4), tnss.Lagrangian(1.0), budget=tnss.Budget(20), fit=QUICK)
    front = result.pareto()
    for before, after in itertools.pairwise(front):
        assert before.parameters < after.parameters
        assert before.rse > after.rse
    for network in result.networks:
        assert any(f.parameters <= network.parameters and f.rse <= network.rse for f in front)
    result.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cores.safetensors",
        "history.csv",
        "network.png",
        "pareto.png",
        "result.json",
    ]
    summary = json.loads((tmp_path / "out" / "result.json").read_text())
    assert tnss.Structure.from_dict(summary["structure"]) == result.best.structure
    loaded = tnss.Network.load(tmp_path / "out" / "cores.safetensors")
    assert tnss.relative_squared_error(tensor, loaded) == pytest.approx(result.best.rse, abs=1e-10)


def test_progress_and_target() -> None:
    seen: list[tnss.Progress] = []
    control = tnss.Control(progress=seen.append, target=0.5)
    result = tnss.search(planted_ring(*A6A), tnss.Ring(5), control=control)
    assert seen[-1].evaluations == len(result.history)
    assert seen[-1].best.objective == result.best.objective


GOOD = torch.randn(3, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor": torch.full((3, 3, 3), math.nan)}, "tensor: expected finite entries"),
        ({"tensor": torch.full((3, 3, 3), math.inf)}, "tensor: expected finite entries"),
        ({"tensor": torch.zeros(3, 3, 3)}, "tensor: expected an entry that is not 0"),
        ({"tensor": torch.ones(3, 3)}, "tensor: expected a real, non-empty tensor of order 3"),
        ({"tensor": torch.ones(3, 0, 3)}, "tensor: expected a real, non-empty tensor of order 3"),
        ({"tensor": torch.ones(3, 3, 3, dtype=torch.complex64)}, "tensor: expected a real"),
        ({"tensor": np.array([["a"]])}, "tensor: expected a tensor or array of real numbers"),
        ({"method": "annealing"}, "method: expected one of"),
        ({"method": object()}, "method: expected a name or the options"),
        ({"weights": torch.ones(3, 3)}, "weights: expected shape"),
        ({"weights": -torch.ones(3, 3, 3)}, "weights: expected finite weights"),
        ({"objective": tnss.ParameterBudget(8)}, "objective: expected a budget of at least 9"),
        ({"objective": tnss.ErrorBudget(1e-3), "space": tnss.Train(1)}, "objective: expected a budget that some"),
        ({"control": tnss.Control(start=((9, 9, 9), (0, 1, 2)))}, "start: expected"),
    ],
)
def test_bad_input_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tnss.search(**({"tensor": GOOD, "space": tnss.Ring(3)} | arguments))


def test_bad_settings_are_refused() -> None:
    for make, message in (
        (lambda: tnss.Lagrangian(0), "weight: expected"),
        (lambda: tnss.ErrorBudget(-1), "rse: expected"),
        (lambda: tnss.ParameterBudget(0), "parameters: expected"),
        (lambda: tnss.Budget(0), "evaluations: expected"),
        (lambda: tnss.Budget(5, 0.0), "seconds: expected"),
        (lambda: tnss.TnALEOptions(radius=0), "radius: expected"),
        (lambda: tnss.TNLSOptions(samples=0), "options: expected"),
        (lambda: tnss.TNGAOptions(population=1), "options: expected"),
        (lambda: tnss.GreedyOptions(patience=0), "patience: expected"),
        (lambda: tnss.AutoOptions(batch=0), "batch: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fits.sqlite").write_bytes(b"no database at all, and long enough to be looked at" * 10)
    with pytest.raises(ValueError, match="cache: expected"):
        tnss.search(GOOD, tnss.Ring(2), cache=tmp_path / "fits.sqlite")


def test_result_fields_are_documented_figures() -> None:
    result = tnss.search(GOOD, tnss.Ring(2), tnss.Lagrangian(2.0), budget=tnss.Budget(4), fit=QUICK)
    record = dataclasses.asdict(result.history[0])
    assert {"structure", "parameters", "rse", "fits", "sweeps", "seconds"} <= record.keys()
    assert result.summary()["unique_structures"] == result.unique_structures
