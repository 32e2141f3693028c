"""What the operator's benchmark does with a file that it has written before (tier T0)."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.operator import __main__ as benchmark
from benchmarks.operator.cases import Sizes


def test_rows_stay_until_they_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"

    def measure(rows: list[dict[str, Any]], *, peers: bool) -> list[dict[str, str]]:
        def run(names: list[str], with_peers: bool) -> Iterator[dict[str, Any]]:
            assert with_peers == peers
            yield from rows

        monkeypatch.setattr(benchmark, "run", run)
        monkeypatch.setattr("sys.argv", ["operator", "--output", str(path), *([] if peers else ["--no-peers"])])
        benchmark.main()
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    common = {"case": "many-heads", **vars(Sizes(4, 32, 2048)), "dtype": "bfloat16"}
    ours, theirs = common | {"implementation": "tnl"}, common | {"implementation": "fla simple_gla"}
    decode = {"case": "decode", "implementation": "tnl", "B": 1, "H": 32, "T": 1, "D": 128, "E": 128, "pass": "step"}
    first = [ours | {"pass": "forward", "ms": 2.0}, theirs | {"pass": "forward", "ms": 3.0}, decode | {"ms": 4.0}]
    measure(first, peers=True)
    again = [ours | {"pass": "forward", "ms": 1.0}, ours | {"pass": "backward", "ms": 5.0}, decode | {"ms": 6.0}]
    rows = measure(again, peers=False)
    assert [(row["implementation"], row["pass"], row["ms"]) for row in rows] == [
        ("tnl", "forward", "1.0"),
        ("fla simple_gla", "forward", "3.0"),
        ("tnl", "step", "6.0"),
        ("tnl", "backward", "5.0"),
    ]
    assert all(row["measured"] for row in rows)
