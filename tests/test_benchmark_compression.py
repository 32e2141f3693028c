"""The benchmark of compression: its cases, sizes and rounding. Tier T0."""

import pytest
import torch

from benchmarks.compression.cases import CASES, ORIGINAL, SCALES
from benchmarks.compression.worker import compressed_tensors, rounded_to_int8, sizes
from tests.test_matrix_network import tiny_config
from tnl.compression.settings import CompressSettings
from tnl.models import TnlForCausalLM


@pytest.mark.parametrize("scale", SCALES)
def test_cases_are_settings_of_the_command(scale: str) -> None:
    for case in CASES:
        if case.method != ORIGINAL:
            CompressSettings(model="m", data="d", **(SCALES[scale].compression | case.settings))
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_and_rounding(tied: bool) -> None:
    torch.manual_seed(0)
    model = TnlForCausalLM(tiny_config(tied))
    row = sizes(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    lrpe = 32  # angles of the first layer, the only numbers outside of matrices
    assert row["parameters"] == total
    assert row["matrix_parameters"] == total - lrpe
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with rounded_to_int8(model):
        for tensor, length in compressed_tensors(model):
            for line in tensor.detach().reshape(-1, length):
                assert len(line.unique()) <= 255
        changed = model.state_dict()
        assert any(not torch.equal(changed[name], tensor) for name, tensor in before.items())
        for name, tensor in before.items():
            assert float((changed[name] - tensor).abs().max()) <= float(tensor.abs().max()) / 253
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
