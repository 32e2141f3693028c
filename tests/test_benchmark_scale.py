"""The benchmark over several GPUs runs, in small sizes over gloo, and `tnl plan` reads what it writes. Tier T2."""

import csv
import sys
from pathlib import Path

from benchmarks.scale.__main__ import main
from tests.ranks import run_torchrun


def run_cases(output: str) -> None:
    sys.argv = ["benchmarks.scale", "operator", "models", "mesh", "context", "--tiny", "--output", output]
    main()


def test_small_sizes(tmp_path: Path) -> None:
    run_torchrun(2, run_cases, str(tmp_path))
    rows = {}
    for path in tmp_path.glob("*.csv"):
        with path.open() as file:
            rows[path.stem] = list(csv.DictReader(file))
    assert rows.keys() == {"operator", "models", "mesh", "context"}
    for name, measured in rows.items():
        assert {row["gpus"] for row in measured} == ({"2"} if name == "mesh" else {"1", "2"}), name
        assert all(float(row["ms"]) > 0 and row["device"] and row["torch"] for row in measured)
    alone = [row for row in rows["operator"] if row["pass"].endswith("own tokens alone")]
    assert {row["gpus"] for row in alone} == {"2"}
    assert all(float(row["tokens_per_second"]) > 0 for name in ("models", "mesh", "context") for row in rows[name])
