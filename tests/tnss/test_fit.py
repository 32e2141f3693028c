"""Alternating least squares: oracles, batching, weights, warm starts. Tier T0; the GPU comparison is tier T3."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.tnss.planted import A6A, planted_ring, random_cores, random_structure, ring_structure
from tnss import ALS, FitRequest, Fitter, Structure, fit, relative_squared_error
from tnss.arrays import Tape
from tnss.network import contract_cores
from tnss.polish import _jacobian
from tnss.sweeps import Plan, Template, plan_for
from tnss.warm import warm_cores

PLANTED_A6A = ring_structure((3,) * 6, (0, 3, 2, 1, 4, 5), (3, 4, 2, 2, 3, 2))


def test_planted_tensor_is_the_one_described() -> None:
    assert planted_ring(*A6A).flatten()[:2].tolist() == pytest.approx([0.554636, -1.36833], abs=1e-5)


def test_planted_ring_is_found_exactly() -> None:
    network = Fitter(planted_ring(*A6A), ALS()).fit([FitRequest(PLANTED_A6A)])[0]
    assert network.rse < 1e-12
    assert network.parameters == 126


def test_planted_loops_are_found_exactly() -> None:
    """A dense graph, where most plain random starts end in bad minima."""
    edges = [(0, 2, 2), (0, 3, 2), (0, 4, 2), (1, 2, 2), (1, 3, 3), (1, 4, 2), (2, 4, 3)]
    structure = Structure((4,) * 5, edges)
    tensor = contract_cores(structure, random_cores(structure, 0))
    exact = [Fitter(tensor, ALS()).fit([FitRequest(structure, seed)])[0].rse < 1e-12 for seed in range(3)]
    assert all(exact)


def test_not_worse_than_tensorly() -> None:
    from tensorly.decomposition import tensor_ring_als

    tensor = planted_ring(*A6A, noise=0.1)
    structure = ring_structure((3,) * 6, tuple(range(6)), (3,) * 6)
    ours = Fitter(tensor, ALS()).fit([FitRequest(structure)])[0].rse
    theirs = min(
        float(np.sum((tensor_ring_als(tensor.numpy(), [3] * 7, random_state=s).to_tensor() - tensor.numpy()) ** 2))
        for s in range(3)
    )
    assert ours <= 1.02 * theirs / float(tensor.square().sum())


@pytest.mark.parametrize("seed", range(12))
def test_reported_error_is_that_of_the_cores(seed: int) -> None:
    generator = np.random.default_rng(seed)
    structure = random_structure(generator, 4, internal=seed % 3)
    tensor = torch.tensor(generator.standard_normal(structure.sizes))
    network = Fitter(tensor, ALS(restarts=2, sweeps=30)).fit([FitRequest(structure, seed)])[0]
    assert relative_squared_error(tensor, network) == pytest.approx(network.rse, abs=1e-12)


def test_batched_is_serial() -> None:
    """Different ranks, orders and graphs in one call give what each gives alone."""
    generator = np.random.default_rng(7)
    tensor = planted_ring(*A6A, noise=0.05)
    settings = ALS(restarts=2, polish=0)
    structures = [
        ring_structure((3,) * 6, tuple(generator.permutation(6).tolist()), tuple(generator.integers(1, 5, 6).tolist()))
        for _ in range(8)
    ]
    structures += [Structure((3,) * 6, [(0, 1, 2), (0, 2, 2), (0, 3, 2), (1, 4, 3)]), Structure((3,) * 6, [])]
    requests = [FitRequest(structure, seed) for seed, structure in enumerate(structures)]
    together = Fitter(tensor, settings).fit(requests)
    for request, network in zip(requests, together, strict=True):
        alone = Fitter(tensor, settings).fit([request])[0]
        assert network.structure == request.structure
        assert network.rse == pytest.approx(alone.rse, rel=1e-6, abs=1e-12)
        assert network.sweeps == alone.sweeps


def test_numpy_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that large tensors and GPUs take, on tensors that are fitted in NumPy otherwise; weighted as well."""
    tensor = planted_ring(*A6A, noise=0.05)
    weights = torch.tensor(np.random.default_rng(0).random(tensor.shape) + 0.5)
    structures = [PLANTED_A6A, ring_structure((3,) * 6, (2, 0, 1, 5, 4, 3), (2, 1, 3, 2, 2, 3))]
    structures += [Structure((3,) * 6, [(0, 1, 2), (0, 2, 2), (0, 3, 2), (1, 4, 3), (3, 5, 2)])]
    requests = [FitRequest(structure, seed) for seed, structure in enumerate(structures)]
    for settings in (ALS(restarts=2), ALS(restarts=2, dtype="float32", sweeps=30)):
        for weight in (None, weights):
            monkeypatch.setattr(fit, "NUMPY_ENTRIES", 10**9)
            in_numpy = Fitter(tensor, settings, weight).fit(requests)
            monkeypatch.setattr(fit, "NUMPY_ENTRIES", 0)
            in_torch = Fitter(tensor, settings, weight).fit(requests)
            for a, b in zip(in_numpy, in_torch, strict=True):
                assert b.rse == pytest.approx(a.rse, rel=1e-6 if settings.dtype == "float64" else 1e-2)


def test_same_seed_same_result() -> None:
    tensor = planted_ring(*A6A, noise=0.1)
    first, second = (Fitter(tensor, ALS()).fit([FitRequest(PLANTED_A6A, 3)])[0] for _ in range(2))
    assert first.rse == second.rse
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))


def test_polish_follows_the_gradient() -> None:
    """The Jacobian against automatic differentiation, weighted."""
    generator = np.random.default_rng(0)
    template = Template((3, 2, 4), ((0, 1), (1, 2), (0, 2)))
    plan = Plan(template, (2, 3, 2))
    flat, root = generator.standard_normal((1, plan.parameters)), generator.random((3, 2, 4))
    expected = torch.autograd.functional.jacobian(
        lambda x: torch.tensor(root) * plan.dense(plan.split(x[None]))[0], torch.tensor(flat[0])
    )
    found = _jacobian(plan, flat, root)
    torch.testing.assert_close(torch.tensor(found), expected.reshape(24, -1))


@pytest.mark.parametrize("seed", range(4))
def test_tree_and_explicit_updates_agree(seed: int) -> None:
    generator = np.random.default_rng(seed)
    structure = random_structure(generator, 5, max_rank=2)
    template = Template(structure.sizes, tuple((u, v) for u, v, _ in structure.edges))
    plans = [Plan(template, tuple(rank for _, _, rank in structure.edges)) for _ in range(2)]
    data = torch.tensor(generator.standard_normal((3, *structure.sizes)))
    start = [torch.tensor(generator.standard_normal((3, *shape))) for shape in plans[0].shapes]
    outcomes = []
    for plan, uses_tree in zip(plans, (True, False), strict=True):
        plan.__dict__["uses_tree"] = uses_tree
        cores = [core.clone() for core in start]
        for _ in range(3):
            error = plan.sweep(data, cores, 0.0)
        outcomes.append((error, plan.dense(cores)))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1], rtol=1e-4, atol=1e-6)


def test_large_partial_contractions_are_not_formed() -> None:
    """A matrix of 1408 x 512 in four modes: with a chord the tree would hold 15 GiB at once, in a ring it does not."""
    sizes = (16, 16, 32, 88)
    with_chord = Plan(Template(sizes, ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))), (109, 82, 3, 40, 3))
    assert not with_chord.uses_tree
    assert 8 * with_chord.peak < 5 * 2**30
    ring = Plan(Template(sizes, ((0, 1), (1, 2), (2, 3), (0, 3))), (99, 65, 97, 8))
    assert ring.uses_tree
    assert 8 * ring.peak < 2**30


def test_a_batch_is_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large tensors no more networks are swept together than partial contractions of theirs may be held."""
    monkeypatch.setattr(fit, "LARGE", 0)
    layouts = [fit._layout(PLANTED_A6A)] * 7
    peak = plan_for(layouts[0].template, layouts[0].ranks).peak
    monkeypatch.setattr(fit, "BATCH_ENTRIES", {"cpu": 3 * 2 * peak})  # three networks, two starts each
    fitter = Fitter(planted_ring(*A6A), ALS(restarts=1))
    monkeypatch.setattr(fitter, "dense", torch.empty(1))
    assert [len(batch) for batch in fitter._batches(layouts)] == [3, 3, 1]


@pytest.mark.parametrize("uses_tree", [True, False])
def test_a_sweep_replayed_is_the_sweep(uses_tree: bool) -> None:
    """With a ridge that changes in between, and one network padded to the rank of the other."""
    template = Template((3, 2, 4, 3, 2), ((0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (1, 3)))
    plan = Plan(template, (2, 3, 2, 2, 3, 2))
    plan.__dict__["uses_tree"] = uses_tree
    generator = np.random.default_rng(0)
    data = generator.standard_normal((1, *template.sizes))
    flat = generator.standard_normal((2, plan.parameters))
    plan.split(flat)[0][0, 1:] = plan.split(flat)[1][0, 1:] = 0
    ridge, tape, norm = np.full((2, 5), 1e-3), Tape(), float((data**2).sum())
    again = flat.copy()
    recorded = plan.sweep(data, plan.split(flat), norm, ridge=ridge, tape=tape)
    expected = plan.sweep(data, plan.split(again), norm, ridge=ridge)
    for level in (1e-3, 1e-6, 1e-10):
        np.testing.assert_allclose(flat, again, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(recorded, expected, rtol=1e-9)
        again[...] = flat
        ridge[...] = level
        tape.replay()
        expected = plan.sweep(data, plan.split(again), norm, ridge=ridge)
    assert len(tape.calls) > 20


def test_padding_stays_zero() -> None:
    template = Template((3, 3, 3), ((0, 1), (1, 2), (0, 2)))
    plan = Plan(template, (3, 3, 3))
    cores = [torch.randn(2, *shape, dtype=torch.float64) for shape in plan.shapes]
    cores[0][0, 2:], cores[1][0, 2:] = 0, 0  # network 0 has rank 2 on edge (0, 1)
    data = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    for _ in range(5):
        plan.sweep(data, cores, 0.0)
    assert cores[0][0, 2:].abs().max() == 0
    assert cores[1][0, 2:].abs().max() == 0
    assert cores[0][1, 2:].abs().max() > 0


def test_weights_of_one_change_nothing_and_missing_entries_are_filled() -> None:
    structure = Structure((4, 4, 4), [(0, 1, 2), (1, 2, 2)])
    tensor = contract_cores(structure, random_cores(structure, 1))
    plain = Fitter(tensor, ALS()).fit([FitRequest(structure)])[0]
    weighted = Fitter(tensor, ALS(), torch.ones_like(tensor)).fit([FitRequest(structure)])[0]
    assert max(plain.rse, weighted.rse) < 1e-12
    generator = np.random.default_rng(0)
    weights = torch.tensor((generator.random((4, 4, 4)) > 0.25).astype(float))
    spoiled = torch.where(weights > 0, tensor, torch.full_like(tensor, math.nan))
    network = Fitter(spoiled, ALS(restarts=6), weights).fit([FitRequest(structure)])[0]
    assert network.rse < 1e-10
    assert relative_squared_error(tensor, network) < 1e-6  # the entries never seen as well


def test_weighted_error_is_the_weighted_minimum() -> None:
    """Rank 1 of a weighted matrix-like tensor against scipy's optimiser."""
    from scipy.optimize import minimize

    generator = np.random.default_rng(2)
    tensor, weights = generator.standard_normal((2, 3, 2)), generator.random((2, 3, 2)) + 0.1

    def error(x: np.ndarray) -> float:
        dense = np.einsum("i,j,k->ijk", x[:2], x[2:5], x[5:])
        return float((weights * (tensor - dense) ** 2).sum() / (weights * tensor**2).sum())

    expected = min(minimize(error, generator.standard_normal(7)).fun for _ in range(8))
    network = Fitter(torch.tensor(tensor), ALS(), torch.tensor(weights)).fit([FitRequest(Structure((2, 3, 2), []))])[0]
    assert network.rse == pytest.approx(expected, rel=1e-3)


def test_warm_start_of_a_wider_bond_begins_where_the_parent_ended() -> None:
    tensor = planted_ring(*A6A, noise=0.1)
    parent = Fitter(tensor, ALS()).fit([FitRequest(PLANTED_A6A)])[0]
    edges = [(u, v, rank + (u == 0)) for u, v, rank in PLANTED_A6A.edges]
    wider = Structure(PLANTED_A6A.sizes, edges)
    cores = warm_cores(parent, wider, torch.Generator().manual_seed(0))
    assert cores is not None
    assert relative_squared_error(tensor, dataclasses.replace(parent, structure=wider, cores=cores)) < 0.3
    warm = Fitter(tensor, ALS(restarts=1)).fit([FitRequest(wider, parent=parent)])[0]
    assert warm.rse <= parent.rse
    narrower = Structure(PLANTED_A6A.sizes, [(u, v, rank - (rank == 4)) for u, v, rank in PLANTED_A6A.edges])
    truncated = warm_cores(parent, narrower, torch.Generator().manual_seed(0))
    assert truncated is not None
    assert tuple(tuple(core.shape) for core in truncated) == narrower.core_shapes


def test_a_fit_that_cannot_reach_its_target_is_dropped() -> None:
    tensor = torch.tensor(np.random.default_rng(0).standard_normal((3,) * 6))
    structure = ring_structure((3,) * 6, tuple(range(6)), (4,) * 6)
    free = Fitter(tensor, ALS(progress=1e-5)).fit([FitRequest(structure)])[0]
    raced = Fitter(tensor, ALS(progress=1e-5)).fit([FitRequest(structure, target=1e-6)])[0]
    assert free.converged
    assert not raced.converged
    assert raced.sweeps < free.sweeps


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_rank_one_and_three_modes(dtype: str) -> None:
    tensor = torch.einsum("i,j,k->ijk", torch.arange(1.0, 3), torch.arange(1.0, 4), torch.arange(1.0, 5)).double()
    network = Fitter(tensor, ALS(dtype=dtype)).fit([FitRequest(Structure((2, 3, 4), []))])[0]
    assert network.rse < (1e-12 if dtype == "float64" else 1e-6)


def test_bad_settings_are_refused() -> None:
    for settings in (
        {"restarts": 0},
        {"progress": -1.0},
        {"dtype": "int8"},
        {"progress": math.nan},
        {"device": "abacus"},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ALS(**settings)
    with pytest.raises(ValueError, match="device: expected one that this machine has"):
        Fitter(torch.ones(2, 2, 2), ALS(device="cuda:99"))


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    tensor = planted_ring(*A6A, noise=0.05)
    structures = [ring_structure((3,) * 6, tuple(range(6)), (rank,) * 6) for rank in (2, 3, 4)]
    requests = [FitRequest(structure, seed) for seed, structure in enumerate(structures)]
    on_cpu = Fitter(tensor, ALS(polish=0)).fit(requests)
    on_gpu = Fitter(tensor, ALS(polish=0, device="cuda")).fit(requests)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert b.rse == pytest.approx(a.rse, rel=1e-3)
