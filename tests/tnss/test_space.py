"""Spaces: decoding, grids, constraints. Tier T0."""

import networkx
import numpy as np
import pytest

from tnss import Complete, Graph, Point, Ring, Structure, Train, Tree
from tnss.space import Space


def test_grid_of_a_rank_is_shifted_into_its_range() -> None:
    domain = Ring(7).bind((3,) * 6)

    def ranks(rank: int, radius: int) -> list[int]:
        point = Point((rank, 2, 2, 2, 2, 2), tuple(range(6)))
        return [other.values[0] for other in domain.grid(point, 0, radius)]

    assert ranks(4, 2) == [2, 3, 4, 5, 6]
    assert ranks(1, 1) == [1, 2, 3]
    assert ranks(7, 2) == [3, 4, 5, 6, 7]
    assert ranks(3, 9) == [1, 2, 3, 4, 5, 6, 7]


def test_a_round_trip_costs_what_the_paper_counts() -> None:
    for order, expected in ((6, 52), (8, 77)):
        domain = Ring(7).bind((3,) * order)
        point = Point((4,) * order, tuple(range(order)))
        ranks = sum(len(domain.grid(point, variable, 1)) for variable in range(order))
        assert 2 * ranks + len(domain.transpositions(point)) == expected


@pytest.mark.parametrize("space", [Ring(4), Train(4), Tree(3), Complete(3), Complete(3, max_degree=2)], ids=repr)
def test_random_points_and_neighbours_belong_to_the_space(space: Space) -> None:
    domain = space.bind((2, 3, 4, 2, 3))
    generator = np.random.default_rng(0)
    for _ in range(20):
        point = domain.random(generator)
        assert domain.check(point) == point
        for other in domain.neighbours(point):
            assert domain.check(other) == other
            assert other != point


def test_number_of_graphs() -> None:
    assert len(Ring(3).bind((2,) * 6).skeletons.edges) == 60
    assert len(Train(3).bind((2,) * 4).skeletons.edges) == 12
    assert len(Tree(3).bind((2,) * 5).skeletons.edges) == 5**3
    assert len(Ring(3, permute=False).bind((2,) * 6).skeletons.edges) == 1


def test_trees_are_trees() -> None:
    domain = Tree(3).bind((2,) * 6)
    generator = np.random.default_rng(1)
    for _ in range(50):
        point = domain.random(generator)
        full = Point((2,) * 5 + point.values[5:], point.permutation)
        assert networkx.is_tree(domain.decode(full).to_networkx())


def test_graph_with_internal_vertices_modes_and_fixed_ranks() -> None:
    graph = networkx.Graph()
    graph.add_node("hub")
    for mode in range(3):
        graph.add_node(f"m{mode}", mode=mode)
        graph.add_edge("hub", f"m{mode}")
    graph.edges["hub", "m0"]["rank"] = 2
    domain = Graph(graph, max_rank=3).bind((4, 4, 4))
    assert domain.decode(Point((2, 3, 3), (0, 1, 2))) == Structure((4, 4, 4), [(0, 3, 2), (1, 3, 3), (2, 3, 3)])
    assert domain.lower == (2, 1, 1)
    assert domain.upper == (2, 3, 3)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (lambda: Ring(0), "max_rank: expected at least 1"),
        (lambda: Complete(4, max_degree=0), "max_degree: expected at least 1"),
        (lambda: Complete(4, fixed={(0, 1): 2}, forbidden=[(1, 0)]).bind((2, 2, 2)), "forbidden: expected"),
        (lambda: Complete(4, fixed={(0, 1): 5}).bind((2, 2, 2)), "fixed: expected ranks"),
        (lambda: Complete(4, fixed={(0, 7): 2}).bind((2, 2, 2)), "fixed: expected pairs"),
        (lambda: Complete(4, 1, fixed={(0, 1): 2, (0, 2): 2}).bind((2, 2, 2)), "fixed: expected at most"),
        (lambda: Graph(networkx.path_graph(2)).bind((2, 2, 2)), "graph: expected vertices"),
        (lambda: Graph(networkx.empty_graph(3)).bind((2, 2, 2)), "graph: expected at least one edge"),
        (lambda: Ring(3).bind((2, 2, 2)).check(Point((4, 1, 1), (0, 1, 2))), "start: expected"),
        (lambda: Ring(3, permute=False).bind((2, 2, 2)).check(Point((1, 1, 1), (1, 0, 2))), "start: expected"),
    ],
)
def test_contradictions_are_refused(space, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        space()
