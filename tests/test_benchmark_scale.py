"""The benchmark over several GPUs runs, in small sizes over gloo, and `tnl plan` reads what it writes. T2; gpu T3."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.scale.__main__ import main
from benchmarks.scale.group import exchanges
from tests.ranks import run_torchrun


def run_cases(output: str, *cases: str) -> None:
    sys.argv = ["benchmarks.scale", *cases, "--tiny", "--output", output]
    main()


def read(folder: Path) -> dict[str, list[dict[str, str]]]:
    rows = {}
    for path in folder.glob("*.csv"):
        with path.open() as file:
            rows[path.stem] = list(csv.DictReader(file))
    return rows


def test_small_sizes(tmp_path: Path) -> None:
    run_torchrun(2, run_cases, str(tmp_path), "operator", "models", "mesh", "context")
    rows = read(tmp_path)
    assert rows.keys() == {"operator", "models", "mesh", "context"}
    for name, measured in rows.items():
        assert {row["gpus"] for row in measured} == ({"2"} if name == "mesh" else {"1", "2"}), name
        assert all(float(row["ms"]) > 0 and row["device"] and row["torch"] for row in measured)
    alone = [row for row in rows["operator"] if row["pass"].endswith("own tokens alone")]
    assert {row["gpus"] for row in alone} == {"2"}
    assert all(float(row["tokens_per_second"]) > 0 for name in ("models", "mesh", "context") for row in rows[name])


def test_share_of_an_exchange_in_which_others_run() -> None:
    """Of kernels before, inside, across its end and behind, two of which run at once; one only lets time pass."""
    seen = [
        ("before", 7, 0.0, 10.0),
        ("ncclDevKernel_AllGather", 7, 10.0, 20.0),
        ("void at::cuda::spin_kernel(long)", 13, 11.0, 8.0),
        ("inside", 13, 20.0, 4.0),
        ("inside, beside it", 14, 21.0, 2.0),
        ("across its end", 13, 29.0, 100.0),
        ("ncclDevKernel_AllGather", 7, 140.0, 5.0),
        ("behind", 7, 145.0, 5.0),
    ]
    assert exchanges(seen) == [(20.0, 0.25), (5.0, 0.0)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_profiles(tmp_path: Path) -> None:
    run_torchrun(2, run_cases, str(tmp_path), "exchange", "timeline")
    rows = read(tmp_path)
    measured = {(row["T"], row["decay"], row["pass"], row["gpu"]) for row in rows["exchange"]}
    assert len(measured) == len(rows["exchange"]) == 2 * 2 * 2 * 2
    assert all(float(row["us"]) > 0 and 0 <= float(row["hidden_share"]) <= 1 for row in rows["exchange"])
    assert any("nccl" in row["kernel"] for row in rows["timeline"])
