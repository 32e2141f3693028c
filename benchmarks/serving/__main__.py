"""`python -m benchmarks.serving layer`: the layer alone, on a GPU or a CPU, without vLLM."""

import argparse
import sys
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.serving import layer
from benchmarks.serving.results import Results, Row

FOLDER = RESULTS / "serving"


def show(row: Row) -> None:
    shown = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )
    print(shown, flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    alone = commands.add_parser("layer", help="packed prefill, pooled decode, agreement with training; no vLLM")
    alone.add_argument("--output", type=Path, default=FOLDER / "layer.csv", help="CSV to write, and to go on from")
    options = parser.parse_args(arguments)
    results = Results(options.output, layer.KEYS)
    for row in layer.measure(lambda row: not results.has(row)):
        results.add(row)
        show(row)


if __name__ == "__main__":
    main(sys.argv[1:])
