"""The benchmarks of speed and generation run in small sizes, go on where they stopped, and draw. Tier T0."""

import csv
import sys
from pathlib import Path

import pytest

from benchmarks.language_modelling.__main__ import main


def run(name: str, output: Path, *options: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    monkeypatch.setattr(sys, "argv", ["benchmarks.language_modelling", name, "--output", str(output), *options])
    main()
    with output.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("name", "only", "cases"), [("speed", "llama", 1), ("generation", "tnl", 4)])
def test_small_sizes(name: str, only: str, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / f"{name}.csv"
    rows = run(name, output, "--tiny", "--only", only, monkeypatch=monkeypatch)
    steps = [row for row in rows if row["part"] in ("step", "decode", "prefill", "generate")]
    assert len(steps) == cases
    assert all(not row.get("error") and float(row["ms"]) > 0 and row["device"] and row["torch"] for row in steps)
    if name == "speed":
        where = [row for row in rows if row["part"] != "step"]
        assert len(where) > 3
        assert sum(float(row["share"]) for row in where) > 0.99  # nothing of the step's time is left out
    assert run(name, output, "--tiny", "--only", only, monkeypatch=monkeypatch) == rows
    monkeypatch.setattr(sys, "argv", ["", name, "--output", str(output), "--plot", str(tmp_path / "plot.png")])
    main()
    assert (tmp_path / "plot.png").stat().st_size > 1000
