"""The benchmark of compression: its cases, sizes and rounding. Tier T0."""

from pathlib import Path

import pytest
import torch

from benchmarks.compression.__main__ import Task, next_task, tasks_of
from benchmarks.compression.cases import ABLATIONS, CASES, ORIGINAL, SCALES
from benchmarks.compression.plots import results_table
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


def test_what_is_wanted_most_comes_first() -> None:
    tasks = [task for case in CASES for task in tasks_of(case)]
    first = [task.case.name for task in tasks if task.action == "heal"][:4]
    assert first == ["original-1", "TnALE-search-0.5", "tensor-ring-0.5", "tensor-train-0.5"]
    budgets = list(dict.fromkeys(task.case.budget for task in tasks if task.case.method != ORIGINAL))
    assert budgets == [0.5, 0.25, 0.75]
    assert {task.case.method for task in tasks[-len(ABLATIONS) :]} == set(ABLATIONS)

    def names(slot: tuple[str, int], healing: set[str]) -> list[str]:
        left, taken = tasks[:6], []
        while (task := next_task(left, slot, healing)) is not None:
            left = [other for other in left if other != task]
            taken.append(f"{task.action} {task.case.name}")
        return taken

    compress, heal = ([f"{action} {case.name}" for case in CASES[:3]] for action in ("compress", "heal"))
    assert names(("0", 0), set()) == [name for pair in zip(compress, heal, strict=True) for name in pair]
    assert names(("0", 0), {"1"}) == compress + heal
    assert names(("1", 0), {"1"}) == heal
    assert names(("1", 1), {"1"}) == heal + compress


def test_a_case_is_healed_when_it_is_compressed(tmp_path: Path) -> None:
    compress, heal = tasks_of(CASES[1])
    assert compress.is_ready(tmp_path)
    assert not heal.is_ready(tmp_path)
    compress.row(tmp_path).parent.mkdir()
    compress.row(tmp_path).write_text("{}")
    assert heal.is_ready(tmp_path)
    assert heal == Task("heal", CASES[1])


def test_a_table_leaves_out_what_was_not_measured() -> None:
    about = {"device": "a CPU", "torch": "2", "transformers": "5", "bytes_int8": "1500000", "compress_seconds": "7.0"}
    about |= {"memory_gib": "", "matrix_parameters": "1000", "compiled_tokens_per_second": ""}
    rows = [
        about | {"method": method, "budget": budget, "healing_steps": steps, "healing_rate": rate,
                 "bits_per_byte": bits, "bits_per_byte_int8": bits, "tokens_per_second": speed}
        for method, budget, steps, rate, bits, speed in (
            (ORIGINAL, "1.0", "0", "0.0", "2.0", "9000"), ("SVD", "0.5", "0", "0.0", "3.0", ""),
            ("SVD", "0.5", "75", "0.1", "2.5", ""),
        )
    ]  # fmt: skip
    header, _, original, svd, _, machine = results_table(rows, (0.1,)).split("\n")
    assert "GiB" not in header
    assert "tokens/s" in header
    assert original.startswith("| original | 1,000 | 2.0000 (+0.0%) |  |")
    assert "| 3.0000 (+50.0%) | **2.5000 (+25.0%)** | 2.5000 (+25.0%) |" in svd
    assert "rate" not in header
    assert machine == "a CPU, PyTorch 2, transformers 5. Healed at 0.1 of the training's learning rate."
    header, *_, svd, _, machine = results_table(rows, (0.03, 0.1)).split("\n")
    assert "| healed | rate | healed, int8 |" in header
    assert "| **2.5000 (+25.0%)** | 0.1 | 2.5000 (+25.0%) |" in svd
    assert machine.endswith("Healed at 0.03 and 0.1 of the training's learning rate; the better one (rate) counts.")
