"""Structures: canonical form, cost, JSON. Tier T0."""

import itertools
import json

import numpy as np
import pytest

from tests.tnss.planted import random_cores, random_structure, ring_structure
from tnss import Structure
from tnss.network import contract_cores


def test_rotations_and_reflections_of_a_ring_are_one_structure() -> None:
    order, bonds = [0, 3, 2, 1, 4, 5], [3, 4, 2, 2, 3, 2]
    turned = set()
    for shift in range(6):
        rotated = (order[shift:] + order[:shift], bonds[shift:] + bonds[:shift])
        reflected = (rotated[0][::-1], rotated[1][:-1][::-1] + rotated[1][-1:])
        for candidate in (rotated, reflected):
            turned.add(ring_structure((3,) * 6, tuple(candidate[0]), tuple(candidate[1])))
    assert len(turned) == 1
    assert len({ring_structure((3,) * 6, (0, *rest), (2,) * 6) for rest in itertools.permutations(range(1, 6))}) == 60


def test_rank_one_is_no_edge_and_parallel_edges_merge() -> None:
    assert Structure((2, 3, 4), [(0, 1, 1), (2, 1, 3)]) == Structure((2, 3, 4), [(1, 2, 3)])
    assert Structure((2, 3, 4), [(0, 1, 2), (1, 0, 3)]).edges == ((0, 1, 6),)
    assert Structure((2, 3, 4), []).parameters == 9


@pytest.mark.parametrize("seed", range(20))
def test_internal_vertices_have_no_names(seed: int) -> None:
    """Isomorphic relabellings of internal vertices are equal and hash equal."""
    generator = np.random.default_rng(seed)
    structure = random_structure(generator, order=3, internal=4)
    names = {3 + i: 3 + int(new) for i, new in enumerate(generator.permutation(4))}
    relabelled = Structure(structure.sizes, [(names.get(u, u), names.get(v, v), r) for u, v, r in structure.edges])
    assert relabelled == structure
    assert hash(relabelled) == hash(structure)


def test_symmetric_internal_vertices_that_differ_in_a_rank() -> None:
    star = [(0, 3, 2), (1, 4, 2), (2, 5, 2)]
    first = Structure((2, 2, 2), [*star, (3, 4, 2), (4, 5, 3)])
    second = Structure((2, 2, 2), [*star, (3, 4, 3), (4, 5, 2)])
    assert first != second


def test_parameters_and_cost() -> None:
    structure = ring_structure((3,) * 6, (0, 3, 2, 1, 4, 5), (3, 4, 2, 2, 3, 2))
    assert structure.parameters == 126
    assert structure.compression == pytest.approx(126 / 729)
    assert structure.cost() == 126
    assert structure.cost("memory") >= 729
    assert structure.cost("flops") > structure.cost("memory")
    with pytest.raises(ValueError, match="kind: expected"):
        structure.cost("joules")  # type: ignore[arg-type]


def test_json_round_trip() -> None:
    structure = random_structure(np.random.default_rng(0), 5)
    assert Structure.from_dict(json.loads(structure.key)) == structure
    with pytest.raises(ValueError, match="data: expected"):
        Structure.from_dict({"sizes": [2, 2]})


def test_permuted_follows_the_tensor() -> None:
    structure = random_structure(np.random.default_rng(1), 4)
    cores = random_cores(structure, 0)
    permutation = (2, 0, 3, 1)
    dense = contract_cores(structure, cores).permute(permutation)
    assert structure.permuted(permutation).sizes == tuple(dense.shape)
    assert structure.permuted(permutation).permuted(np.argsort(permutation).tolist()) == structure


@pytest.mark.parametrize("edges", [[(0, 0, 2)], [(0, 1, 0)], [(-1, 0, 2)]])
def test_bad_edges_are_refused(edges: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="edges: expected"):
        Structure((2, 2, 2), edges)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="sizes: expected"):
        Structure((2, 0, 2), [])
