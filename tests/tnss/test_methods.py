"""The methods as ask and tell, on a made-up landscape: none of them sees a tensor. Tier T0."""

import numpy as np
import pytest
import torch

import tnss
from tests.tnss.planted import random_cores
from tnss.methods import METHODS, Auto, Evaluation, TnALE, View
from tnss.methods.auto import AutoOptions
from tnss.methods.ranks import RankMatch
from tnss.methods.tnale import TnALEOptions
from tnss.network import contract_cores
from tnss.space import Point
from tnss.spectrum import Spectrum

TARGET = np.array([2, 3, 2, 4, 2])


def view(seed: int = 0, start: Point | None = None, max_rank: int = 5) -> View:
    domain = tnss.Ring(max_rank).bind((3,) * 5)
    return View(domain, tnss.Lagrangian(1.0), None, np.random.default_rng(seed), start)


def rse(point: Point) -> float:
    """Falls to 0 at the target ranks, and with the modes in order up to a turn."""
    order = list(point.permutation)
    steps = [abs(order[i] - order[i - 1]) in (1, 4) for i in range(5)]
    return float(np.abs(np.array(point.values) - TARGET).sum()) / 10 + 0.2 * (5 - sum(steps))


def evaluate(current: View, points: list[Point]) -> list[Evaluation]:
    structures = [current.domain.decode(point) for point in points]
    return [Evaluation(p, s, rse(p), current.merit(s, rse(p))) for p, s in zip(points, structures, strict=True)]


@pytest.mark.parametrize("name", METHODS)
def test_methods_go_down(name: str) -> None:
    current = view()
    method = METHODS[name](current)
    merits: list[float] = []
    for _ in range(60):
        proposals = method.ask()
        if not proposals:
            break
        evaluations = evaluate(current, [proposal.point for proposal in proposals])
        method.tell(evaluations)
        merits += [evaluation.merit for evaluation in evaluations]
    assert min(merits) < 0.75 * merits[0]


def test_tnale_makes_one_round_trip() -> None:
    """Variables forwards, the permutation, variables backwards: 2 * 5 * 3 + 11 evaluations at radius 1."""
    current = view(start=Point((3,) * 5, (0, 1, 2, 3, 4)))
    method = TnALE(current, TnALEOptions(initial_rounds=0))
    sizes, changed = [], []
    for _ in range(11):
        points = [proposal.point for proposal in method.ask()]
        sizes.append(len(points))
        varying = [i for i in range(5) if len({point.values[i] for point in points}) > 1]
        changed.append(varying[0] if varying else "permutation")
        method.tell(evaluate(current, points))
    assert sizes == [3] * 5 + [11] + [3] * 5
    assert changed == [0, 1, 2, 3, 4, "permutation", 4, 3, 2, 1, 0]


def test_tnale_interpolates_in_the_initial_phase() -> None:
    """Radius 2: of five ranks the first, middle and last are fitted; a rank in between can win unfitted."""
    current = view(start=Point((3,) * 5, (0, 1, 2, 3, 4)))
    method = TnALE(current, TnALEOptions(initial_radius=2, initial_rounds=1))
    points = [proposal.point for proposal in method.ask()]
    assert [point.values[0] for point in points] == [1, 3, 5]
    made_up = {1: 0.5, 3: 0.01, 5: 0.01}
    structures = [current.domain.decode(point) for point in points]
    method.tell([Evaluation(p, s, made_up[p.values[0]], 0.0) for p, s in zip(points, structures, strict=True)])
    assert {proposal.point.values[0] for proposal in method.ask()} == {3}


@pytest.mark.parametrize("max_rank", [1, 2, 3])
def test_tnale_on_grids_narrower_than_the_radius(max_rank: int) -> None:
    current = view(max_rank=max_rank)
    method = TnALE(current, TnALEOptions(initial_radius=3, initial_rounds=2))
    for _ in range(30):
        points = [proposal.point for proposal in method.ask()]
        assert len(points) >= 1
        method.tell(evaluate(current, points))


def test_tnale_leaves_a_point_where_it_is_stuck() -> None:
    """From the optimum: one iteration, then as many steps as variables lead back to it, then random points around."""
    start = Point(tuple(TARGET.tolist()), (0, 1, 2, 3, 4))
    current = view(start=start)
    method = TnALE(current, TnALEOptions(initial_rounds=0))
    grids = []
    for _ in range(60):
        grids.append([proposal.point for proposal in method.ask()])
        method.tell(evaluate(current, grids[-1]))
    assert all(start in grid for grid in grids[: 11 + 6])
    assert start not in grids[11 + 6]
    for grid in grids:
        for point in grid:
            assert max(abs(np.array(point.values) - TARGET)) <= 2  # a grid at the edge of the range is shifted
            assert point.permutation in {other.permutation for other in current.domain.transpositions(start)}


def test_tnale_keeps_its_grids_around_the_centre() -> None:
    """However far a landscape pulls, a rank moves by the radius in an iteration, there and back included."""
    current = view(start=Point((3,) * 5, (0, 1, 2, 3, 4)), max_rank=9)
    method = TnALE(current, TnALEOptions(initial_rounds=0))
    for _ in range(11):
        points = [proposal.point for proposal in method.ask()]
        assert {rank for point in points for rank in point.values} <= {2, 3, 4}
        method.tell([Evaluation(p, current.domain.decode(p), -float(sum(p.values)), 0.0) for p in points])
    assert {rank for proposal in method.ask() for rank in proposal.point.values} <= {3, 4, 5}


def test_auto_tries_the_tensors_own_size_where_noise_is_worth_its_parameters() -> None:
    """Of pure noise every entry counts; moves of one rank from a small structure would take far longer."""
    noise = np.random.default_rng(0).standard_normal((3,) * 5)
    result = tnss.search(noise, tnss.Ring(6), tnss.Lagrangian(200.0), seed=0, budget=tnss.Budget(16))
    assert result.best.parameters >= 240
    assert result.best.objective < 2.0


def test_auto_that_is_stalled_enumerates_the_grids_around_the_best() -> None:
    """Where nothing gets better: every other batch is one move from the best, until no such structure is left."""
    best = Point((3,) * 5, (0, 1, 2, 3, 4))
    current = view(start=best)
    method = Auto(current, AutoOptions(stall=1))
    domain = current.domain
    near = {domain.decode(point).key for point in domain.neighbours(best)}
    seen: set[str] = set()
    for _ in range(20):
        proposals = method.ask()
        points = [proposal.point for proposal in proposals]
        keys = {domain.decode(point).key for point in points}
        if near - seen and method.since_best >= 1 and method.rounds % 2:
            assert keys <= near
            assert all(proposal.parent is None for proposal in proposals)
        seen |= keys
        merits = [0.0 if point == best else 1.0 for point in points]
        method.tell([Evaluation(p, domain.decode(p), 0.5, m) for p, m in zip(points, merits, strict=True)])
    assert near <= seen


def planted_graph(noise: float = 0.0) -> tuple[tnss.Structure, Spectrum]:
    structure = tnss.Structure((4,) * 5, [(0, 1, 2), (0, 2, 2), (1, 3, 3), (1, 4, 2), (2, 4, 2)])
    tensor = contract_cores(structure, random_cores(structure, 1))
    return structure, Spectrum(tensor + noise * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))


def test_a_planted_graph_is_among_those_that_match_the_ranks() -> None:
    structure, spectrum = planted_graph()
    domain = tnss.Complete(4).bind((4,) * 5)
    match = RankMatch(View(domain, tnss.Lagrangian(200.0), spectrum, np.random.default_rng(0)))
    assert match.informs
    points = match.points(8, 60)
    assert structure in [domain.decode(point) for point in points]
    parameters = [domain.decode(point).parameters for point in points]
    assert parameters == sorted(parameters)


def test_where_there_are_no_ranks_to_match() -> None:
    """Noise, missing entries, no spectrum, and a space whose graph is not fixed."""
    missing = Spectrum(torch.ones(4, 4, 4, 4, 4), torch.eye(4).repeat(4, 4, 4, 1, 1))
    exact = planted_graph()[1]
    for spectrum, space in (
        (planted_graph(1e-3)[1], tnss.Complete(4)),
        (missing, tnss.Complete(4)),
        (None, tnss.Complete(4)),
        (exact, tnss.Tree(4)),
    ):
        domain = space.bind((4,) * 5)
        assert not RankMatch(View(domain, tnss.Lagrangian(200.0), spectrum, np.random.default_rng(0))).informs


def test_no_train_has_the_ranks_of_a_ring() -> None:
    structure = tnss.Structure((2,) * 8, [(i, (i + 1) % 8, 2) for i in range(8)])
    spectrum = Spectrum(contract_cores(structure, random_cores(structure, 3)))
    domain = tnss.Train(2, permute=False).bind((2,) * 8)
    match = RankMatch(View(domain, tnss.Lagrangian(200.0), spectrum, np.random.default_rng(0)))
    assert match.informs
    assert match.points(4, 5) == []
