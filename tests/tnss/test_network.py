"""Fitted networks: rebuilt by quimb, tensorly, einsum and a module; files. Tier T0."""

from pathlib import Path

import numpy as np
import opt_einsum
import pytest
import torch

from tests.tnss.planted import random_cores, random_structure, ring_structure
from tnss import ALS, FitRequest, Fitter, Network, Structure, relative_squared_error
from tnss.network import ring_order


def fitted(structure: Structure, seed: int = 0) -> tuple[torch.Tensor, Network]:
    tensor = torch.tensor(np.random.default_rng(seed).standard_normal(structure.sizes))
    return tensor, Fitter(tensor, ALS(restarts=2, sweeps=30)).fit([FitRequest(structure, seed)])[0]


def rse_of(tensor: torch.Tensor, dense: object) -> float:
    difference = tensor - torch.as_tensor(np.asarray(dense))
    return float(difference.square().sum() / tensor.square().sum())


@pytest.mark.parametrize("seed", range(8))
def test_quimb_einsum_and_module_give_the_reported_error(seed: int) -> None:
    structure = random_structure(np.random.default_rng(seed), 4, internal=seed % 3)
    tensor, network = fitted(structure, seed)
    modes = [f"k{i}" for i in range(4)]
    dense = network.to_quimb().contract(output_inds=modes).transpose(*modes).data
    assert rse_of(tensor, dense) == pytest.approx(network.rse, abs=1e-10)
    dense = opt_einsum.contract(network.einsum(), *[core.numpy() for core in network.cores])
    assert rse_of(tensor, dense) == pytest.approx(network.rse, abs=1e-10)
    module = network.to_module()
    assert rse_of(tensor, module().detach()) == pytest.approx(network.rse, abs=1e-10)
    assert sum(parameter.numel() for parameter in module.parameters()) == network.parameters


@pytest.mark.parametrize(
    "structure",
    [
        ring_structure((3, 4, 2, 3, 2), (0, 3, 1, 4, 2), (2, 3, 2, 4, 2)),
        ring_structure((3, 4, 2), (0, 2, 1), (2, 3, 2)),
        Structure((3, 4, 2, 3), [(0, 2, 3), (2, 1, 2)]),
        Structure((2, 2, 2, 2), [(0, 3, 2)]),
    ],
    ids=["ring", "triangle", "chain", "pieces"],
)
def test_tensorly_gives_the_reported_error(structure: Structure) -> None:
    tensor, network = fitted(structure)
    ring, permutation = network.to_tensorly()
    dense = ring.to_tensor().transpose(np.argsort(permutation))
    assert rse_of(tensor, dense) == pytest.approx(network.rse, abs=1e-10)


def test_tensorly_has_no_general_graphs() -> None:
    _, network = fitted(Structure((2, 2, 2, 2), [(0, 1, 2), (0, 2, 2), (0, 3, 2)]))
    with pytest.raises(ValueError, match="expected a ring or chains"):
        network.to_tensorly()


def test_a_ring_that_leaves_a_mode_out_is_no_ring() -> None:
    assert ring_order(Structure((2,) * 4, [(0, 1, 2), (1, 2, 2), (0, 2, 2)])) is None


def test_file_round_trip(tmp_path: Path) -> None:
    tensor, network = fitted(Structure((3, 4, 2), [(0, 1, 2), (1, 2, 2)]))
    network.save(tmp_path / "cores.safetensors")
    loaded = Network.load(tmp_path / "cores.safetensors")
    assert loaded.structure == network.structure
    assert relative_squared_error(tensor, loaded) == pytest.approx(network.rse, abs=1e-12)
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="path: expected a network saved by tnss"):
        Network.load(tmp_path / "other.safetensors")


def test_cores_of_another_shape_are_refused() -> None:
    structure = Structure((2, 2, 2), [(0, 1, 2)])
    with pytest.raises(ValueError, match="cores: expected shapes"):
        Network(structure, random_cores(Structure((2, 2, 2), []), 0), 0.0)
