"""Measure over 1, 2, 4, ... GPUs: `torchrun --nproc-per-node N -m benchmarks.scale [CASE ...]`.

Writes CASE.csv into the output folder, the device and versions in each row. `--tiny` tries everything out on a CPU.
`python -m benchmarks.scale plot` draws what lies there.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch

from benchmarks import RESULTS
from benchmarks.operator.__main__ import machine as about_machine
from benchmarks.scale.cases import CASES, FULL, TINY, Row
from benchmarks.scale.group import join
from benchmarks.scale.plot import plot

PICTURE = Path(__file__).parents[2] / "docs" / "scale.png"


def show(row: Row) -> str:
    """One line on a row."""
    names = [name for name in row if name not in ("ms_20", "ms_80", "device", "torch", "triton", "nccl")]
    values = (f"{name} {row[name]:.4g}" if isinstance(row[name], float) else f"{name} {row[name]}" for name in names)
    return "  ".join(values)


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all where none is named")
    parser.add_argument("--output", type=Path, default=RESULTS / "scale", help="folder for the CSV files")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU; the numbers mean nothing")
    options = parser.parse_args()
    if options.cases == ["plot"]:
        plot(options.output, PICTURE)
        return
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; expected some of {', '.join(CASES)}")
    if not torch.cuda.is_available() and not options.tiny and options.cases != ["feeding"]:
        parser.error("there is no GPU: --tiny tries the cases out on a CPU")
    about = {name: value for name, value in about_machine().items() if name in ("device", "torch", "triton")}
    if torch.cuda.is_available():
        about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    with join() as machine:
        for name in options.cases or CASES:
            rows: list[Row] = []
            for row in CASES[name](machine, TINY if options.tiny else FULL):
                rows.append(row | about)
                print(show(row), flush=True)
                write(options.output / f"{name}.csv", rows)
            if not rows and machine.rank == 0:
                print(f"{name}: nothing to measure, it needs several GPUs", file=sys.stderr)
            machine.wait()
        if machine.rank == 0:
            print(f"wrote {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
