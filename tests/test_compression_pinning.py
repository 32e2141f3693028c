"""Cores that store nothing twice. Tier T0."""

import pytest
import torch

from tests.test_matrix_network import make_network
from tnl.compression.pinning import LARGEST_ENTRY, choose_rows, pin, pinned_parameters
from tnl.models.tnl.matrix_network import MatrixNetwork, TensorNetworkLinear

NETWORKS = {
    "two vertices": make_network((12, 10), (12,), (10,), ((0,), (1,)), [(0, 1, 4)]),
    "rank 1": make_network((12, 10), (12,), (10,), ((0,), (1,)), []),
    "chain": make_network((12, 10), (3, 4), (2, 5), ((0, 2), (1,), (3,)), [(0, 1, 3), (1, 2, 2)]),
    "cycle": make_network((16, 9), (4, 4), (9,), ((0,), (1,), (2,)), [(0, 1, 2), (1, 2, 3), (0, 2, 4)]),
    "full bond": make_network((3, 10), (3,), (10,), ((0,), (1,)), [(0, 1, 3)]),
}


def random_cores(network: MatrixNetwork) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in network.structure.core_shapes]


def dense(network: MatrixNetwork, state: dict[str, torch.Tensor]) -> torch.Tensor:
    layer = TensorNetworkLinear(network, dtype=torch.float64)
    layer.load_state_dict(state)
    return layer.dense()


@pytest.mark.parametrize("name", NETWORKS)
def test_pinning_leaves_the_matrix_and_stores_less(name: str) -> None:
    network = NETWORKS[name]
    cores = random_cores(network)
    before = dense(network, {f"core_{vertex}": core for vertex, core in enumerate(cores)})
    pinned, state = pin(network, cores)
    torch.testing.assert_close(dense(pinned, state), before)
    assert pinned.parameters == pinned_parameters(network)
    assert pinned.parameters == sum(core.numel() for name, core in state.items() if name.startswith("core"))


def test_a_tree_loses_all_that_its_bonds_leave_free() -> None:
    assert pinned_parameters(NETWORKS["two vertices"]) == 4 * (12 + 10) - 4**2
    assert pinned_parameters(NETWORKS["chain"]) == NETWORKS["chain"].structure.parameters - 3**2 - 2**2
    assert pinned_parameters(NETWORKS["rank 1"]) == 12 + 10
    # of a cycle the two bonds of the largest ranks
    assert pinned_parameters(NETWORKS["cycle"]) == NETWORKS["cycle"].structure.parameters - 3**2 - 4**2


def test_chosen_rows_combine_to_the_others_with_small_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 7, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 7)
    rows = choose_rows(matrix)
    assert len(set(rows.tolist())) == 7
    weights = torch.linalg.solve(matrix[rows], matrix, left=False)
    assert float(weights.abs().max()) <= LARGEST_ENTRY * 1.001
