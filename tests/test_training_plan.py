"""Plans: hand-counted cases, measured rates, and the tables of docs/planning.md. Tier T0."""

import contextlib
import csv
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import RESULTS
from tnl.cli import main
from tnl.training.plan import read_flops_use

PAGE = Path(__file__).parent.parent / "docs" / "planning.md"
GIB = 2**30


def planned(*arguments: str) -> list[dict[str, Any]]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["plan", *arguments, "--format", "json"]) == 0
    return json.loads(output.getvalue())


def test_parameters_memory_and_communication_by_hand() -> None:
    arguments = ("1b", "1", "4", "--sequence_length", "4096", "--flops_use", "0.5")
    alone, four = planned(*arguments)
    width, inner, layers, vocabulary = 2048, 5632, 16, 64000
    block = 5 * width**2 + 3 * width * inner
    parameters = layers * block + 2 * vocabulary * width + width  # angles of LRPE in the first layer
    assert alone["parameters"] == parameters
    for name, size in (("parameters", 4), ("optimiser", 8)):
        assert alone["memory"][name] == size * parameters
        assert four["memory"][name] == size * parameters / 4
    assert alone["most memory in"] == "the loss"
    assert alone["memory"]["gradients"] == 0
    again = planned(*arguments, "--activation_checkpointing", "true")[0]
    assert again["most memory in"] == "the first block's backward pass"
    assert again["memory"]["gradients"] == 4 * parameters
    assert again["memory"]["activations"] == pytest.approx(1.3 * 2 * 4096 * (12 * width + 3 * inner))
    assert alone["communication"] == {"FSDP": 0, "context": 0, "tensor": 0}
    assert four["communication"]["FSDP"] == pytest.approx(3 / 4 * parameters * 8)
    flops = 6 * (parameters - vocabulary * width) + 12 * 128 * 128 * 16 * (layers + 1)
    assert alone["seconds"]["compute"] == pytest.approx(4096 * flops / (0.5 * 989.4e12), rel=1e-4)
    assert alone["model_flops_use"] == pytest.approx(0.5, rel=1e-4)
    assert alone["tokens_per_second"] == pytest.approx(4096 / alone["seconds"]["step"])
    assert alone["token_budget"] == 20 * parameters
    assert alone["fits"]
    assert alone["memory"]["total"] == pytest.approx(sum(v for k, v in alone["memory"].items() if k != "total"))


def test_sharing_rows_and_layers() -> None:
    (pair,) = planned("1b", "2", "--sequence_length", "8192", "--context", "2")
    (single,) = planned("1b", "1", "--sequence_length", "4096")
    assert pair["memory"]["activations"] == single["memory"]["activations"]
    states = 4 * 16 * 128 * 128 * 17  # the first layer's is twice as large
    assert pair["communication"]["context"] == 2 * states
    longer = planned("1b", "2", "--sequence_length", "81920", "--context", "2")[0]
    assert longer["communication"]["context"] == 2 * states
    (divided,) = planned("1b", "2", "--sequence_length", "4096", "--tensor", "2", "--activation_checkpointing", "true")
    assert divided["memory"]["parameters"] == single["memory"]["parameters"] / 2
    assert divided["communication"]["tensor"] == 2 * 0.5 * (2 * 4096 * 2048) * 2 * 16 * 3
    assert divided["communication"]["FSDP"] == 0


def test_batches_and_what_does_not_fit() -> None:
    (many,) = planned("1b", "2", "--sequence_length", "1024", "--batch_tokens", "16384")
    assert many["step_tokens"] == 16384
    assert many["communication"]["FSDP"] == pytest.approx(0.5 * many["parameters"] * (4 * 8 + 4))
    assert not planned("15b", "1")[0]["fits"]
    assert planned("15b", "1")[0]["memory"]["total"] > 200 * GIB


def test_measured_rates(tmp_path: Path) -> None:
    path = tmp_path / "training.csv"
    rows = [
        {"device": "NVIDIA H100 80GB HBM3", "gpus": 1, "parameters": 4e8, "hardware_flops_use": 0.3},
        {"device": "NVIDIA H100 80GB HBM3", "gpus": 1, "parameters": 1.2e9, "hardware_flops_use": 0.4},
        {"device": "NVIDIA H100 80GB HBM3", "gpus": 2, "parameters": 1.2e9, "hardware_flops_use": 0.6},
        {"device": "NVIDIA A100", "gpus": 1, "parameters": 1.2e9, "hardware_flops_use": 0.5},
        {"device": "NVIDIA H100 80GB HBM3", "gpus": 1, "parameters": 1.2e9, "hardware_flops_use": ""},
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert read_flops_use(path, "H100", 1_100_000_000) == 0.4
    assert planned("1b", "1", "--measured", str(path))[0]["model_flops_use"] == pytest.approx(0.4, rel=1e-4)
    with pytest.raises(ValueError, match="measured: expected rows of training on one H200"):
        read_flops_use(path, "H200", 1_100_000_000)


def test_within_a_tenth_of_what_was_measured() -> None:
    """Memory on one, two and four GPUs, in the results of the scale benchmark."""
    rows = []
    for name in ("training", "models", "context", "mesh"):
        with (RESULTS / "scale" / f"{name}.csv").open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["memory_gib"]]
    assert {row["gpus"] for row in rows} == {"1", "2", "4"}
    for row in rows:
        (plan,) = planned(
            row["model"], row["gpus"], "--sequence_length", row["T"], "--micro_batch_size", row["rows"],
            "--activation_checkpointing", row["recompute"].lower(),
            "--context", row["context"] if row["case"] in ("context", "mesh") else "1",
        )  # fmt: skip
        assert plan["memory"]["total"] / GIB == pytest.approx(float(row["memory_gib"]), rel=0.1), row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["99b", "8"], "model: expected one of tiny, .*got '99b'"),
        (
            ["1b", "7", "--context", "2"],
            r"gpus: expected at least 1, and a multiple of 2 \(context times tensor\), got 7",
        ),
        (
            ["1b", "8", "--tensor", "8", "--overrides", "{num_attention_heads: 4}"],
            "tensor: expected a divisor of the 4",
        ),
        (["1b", "8", "--overrides", "{widht: 4}"], "overrides: .*widht"),
        (["1b", "many"], "gpus element 1: expected int, got many"),
        (
            ["1b", "8", "--sequence_length", "100", "--context", "8"],
            "sequence_length: expected a multiple of context, 8",
        ),
        (["1b", "1", "--measured", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_plans_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_terminal_shows_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "1"]) == 0
    output = capsys.readouterr().out
    assert "total [GiB a GPU]" in output
    assert "compute [s a step]" in output


def test_tables_of_the_page_are_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"```console\n(tnl plan .*?)```\n\n(\|.*?)\n\n", PAGE.read_text(), re.DOTALL)
    assert len(commands) == 3
    for command, table in commands:
        assert main(shlex.split(command.replace("\\\n", ""))[1:]) == 0
        assert capsys.readouterr().out.strip() == table.strip()
