"""Cores that store nothing twice: along a bond of rank r a unit matrix takes the place of r^2 numbers.

Between two joined cores `M [N, r]` and `K [r, ..]` stands `M K = (M G^-1)(G K)` for every invertible G. With G made of
r rows of M, the first factor has those rows equal to the unit matrix. The rows are chosen so that no entry of the rest
is much above 1 (a submatrix of locally largest volume: LU with pivoting, then exchanges), which keeps the numbers well
scaled for training and for rounding. For two vertices this is the pivoted factorisation of arXiv 2501.19090.

In a network each vertex gives up the bond to its parent in a spanning tree, from the leaves to the root. Bonds that
close a cycle keep their numbers.
"""

import math

import networkx
import torch
from torch import Tensor

from tnl.models.tnl.matrix_network import MatrixNetwork

LARGEST_ENTRY = 1.2
MOST_EXCHANGES = 200


def pin(network: MatrixNetwork, cores: list[Tensor]) -> tuple[MatrixNetwork, dict[str, Tensor]]:
    """Pin as many cores as can be.

    Args:
        network: Without pinned cores.
        cores: Of shapes `network.structure.core_shapes`.

    Returns:
        The network with its pinned cores named, and the state of a module of it: `core_0`, .. and `order_0`, ..
    """
    cores = list(cores)
    edges = network.structure.edges
    pinned, orders = [], {}
    for vertex, parent, edge in _towards_root(network):
        axis = network.structure.incident[vertex].index(edge)
        rank = edges[edge][2]
        matrix = cores[vertex].movedim(axis, -1).reshape(-1, rank)
        if len(matrix) <= rank:
            continue
        chosen = choose_rows(matrix)
        basis = matrix[chosen]
        others = torch.ones(len(matrix), dtype=torch.bool)
        others[chosen] = False
        order = torch.empty(len(matrix), dtype=torch.int32)
        order[chosen] = torch.arange(rank, dtype=torch.int32)
        order[others] = torch.arange(rank, len(matrix), dtype=torch.int32)
        cores[vertex] = torch.linalg.solve(basis, matrix[others.to(matrix.device)], left=False)
        place = network.structure.incident[parent].index(edge)
        cores[parent] = torch.tensordot(basis, cores[parent], dims=([1], [place])).movedim(0, place)
        pinned.append((vertex, edge))
        orders[f"order_{vertex}"] = order
    pinned_network = MatrixNetwork(
        network.shape, network.rows, network.columns, network.modes, network.structure, tuple(sorted(pinned))
    )
    state = {f"core_{vertex}": core.contiguous() for vertex, core in enumerate(cores)}
    return pinned_network, state | orders


def pinned_parameters(network: MatrixNetwork) -> int:
    """Numbers that the network stores once it is pinned."""
    count = network.structure.parameters
    for vertex, _, edge in _towards_root(network):
        rank = network.structure.edges[edge][2]
        if math.prod(network.structure.core_shapes[vertex]) > rank * rank:
            count -= rank * rank
    return count


def choose_rows(matrix: Tensor) -> Tensor:
    """Numbers of r rows of a matrix `[N, r]` such that the others are combinations of them with small weights.

    Returns:
        `[r]` int64 on the CPU, ascending.
    """
    rank = matrix.shape[1]
    permutation, _, _ = torch.linalg.lu(matrix)
    order = permutation.T.argmax(1)
    chosen = order[:rank].clone()
    weights = torch.linalg.solve(matrix[chosen], matrix, left=False)
    for _ in range(MOST_EXCHANGES):
        place = int(weights.abs().argmax())
        row, column = divmod(place, rank)
        pivot = weights[row, column].clone()
        if not abs(float(pivot)) > LARGEST_ENTRY:
            break
        change = weights[row].clone()
        change[column] -= 1.0
        weights -= weights[:, column, None] * (change / pivot)
        chosen[column] = row
    return chosen.sort().values.cpu()


def _towards_root(network: MatrixNetwork) -> list[tuple[int, int, int]]:
    """`(vertex, parent, edge)` of a spanning forest with the largest ranks, children before parents."""
    graph = networkx.Graph()
    graph.add_nodes_from(range(network.structure.vertices))
    for edge, (u, v, rank) in enumerate(network.structure.edges):
        graph.add_edge(u, v, weight=rank, edge=edge)
    forest = networkx.maximum_spanning_tree(graph)
    steps: list[tuple[int, int, int]] = []
    for component in networkx.connected_components(forest):
        root = max(component)
        downwards = [(child, parent) for parent, child in networkx.bfs_edges(forest, root)]
        steps += [(child, parent, forest.edges[child, parent]["edge"]) for child, parent in reversed(downwards)]
    return steps
