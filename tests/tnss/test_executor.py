"""Executors: the same fits in this process, in workers and on Ray; a worker that dies. Tier T0."""

import functools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import tnss
from tests.tnss.planted import A6A, planted_ring
from tnss import executor as executor_module
from tnss.executor import Problem

SETTINGS = tnss.ALS(restarts=2, sweeps=40, polish=0)


def problem() -> Problem:
    return Problem(planted_ring(*A6A, noise=0.1), SETTINGS)


def requests() -> list[tnss.FitRequest]:
    generator = np.random.default_rng(0)
    domain = tnss.Ring(3).bind((3,) * 6)
    return [tnss.FitRequest(domain.decode(domain.random(generator)), seed) for seed in range(5)]


def fitted(executor: tnss.Local | tnss.Joblib | tnss.Ray) -> dict[str, float]:
    tasks = executor.split(requests())
    done = dict(executor.run(problem(), tasks))
    assert sorted(done) == list(range(len(tasks)))
    return {network.structure.key: network.rse for networks in done.values() for network in networks}


def test_joblib_gives_what_this_process_gives() -> None:
    assert fitted(tnss.Joblib(2)) == pytest.approx(fitted(tnss.Local()), rel=1e-6)


@pytest.mark.slow
def test_ray_gives_what_this_process_gives() -> None:
    ray = pytest.importorskip("ray")
    try:
        assert fitted(tnss.Ray(tasks=2)) == pytest.approx(fitted(tnss.Local()), rel=1e-6)
    finally:
        ray.shutdown()


def _dies_once(flag: Path, problem: Problem, index: int, task: list[tnss.FitRequest]) -> tuple[int, list[tnss.Network]]:
    """The work of a task, in a process that is killed the first time it meets task 1."""
    if index == 1 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return index, tnss.Fitter(problem.tensor, problem.settings).fit(task)


def test_a_worker_that_dies_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(executor_module, "_work", functools.partial(_dies_once, tmp_path / "died"))
    assert fitted(tnss.Joblib(2)) == pytest.approx(fitted(tnss.Local()), rel=1e-6)
    assert (tmp_path / "died").exists()


def test_search_in_workers_finds_the_same() -> None:
    tensor = planted_ring(*A6A)
    result = tnss.search(tensor, tnss.Ring(4), executor=tnss.Joblib(2))
    assert result.best.parameters == 126
    assert result.optimal


def test_bad_number_of_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="workers: expected"):
        tnss.Joblib(0)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    list(tnss.Local().run(problem(), [requests()]))
    assert torch.get_num_threads() == before
