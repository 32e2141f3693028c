"""`python -m benchmarks.serving COMMAND`: the layer alone, models on vLLM, a server under load, the demo, plots."""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.serving.results import Results, Row

FOLDER = RESULTS / "serving"


def keep(results: Results, rows: Iterable[Row]) -> None:
    """Write rows as they come, and show them."""
    for row in rows:
        results.add(row)
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    output = "CSV to write, and to go on from"
    layer_options = commands.add_parser("layer", help="packed prefill, pooled decode, agreement with training; no vLLM")
    layer_options.add_argument("--output", type=Path, default=FOLDER / "layer.csv", help=output)
    engine_options = commands.add_parser("engine", help="TNL and LLaMA on vLLM, on one core of a CPU")
    engine_options.add_argument("--output", type=Path, default=FOLDER / "engine.csv", help=output)
    engine_options.add_argument("--quick", action="store_true", help="short contexts only")
    soak_options = commands.add_parser("soak", help="memory of a server under load")
    soak_options.add_argument("--output", type=Path, default=FOLDER / "soak.csv", help="CSV to write anew")
    soak_options.add_argument("--minutes", type=float, default=10.0)
    commands.add_parser("demo", help="serve the demo's model and ask it something")
    commands.add_parser("plot", help="draw what engine.csv and soak.csv hold, into docs/")
    options = parser.parse_args(arguments)
    if options.command == "layer":
        from benchmarks.serving import layer

        results = Results(options.output, layer.KEYS)
        keep(results, layer.measure(lambda row: not results.has(row)))
    elif options.command == "engine":
        from benchmarks.serving import engine

        results = Results(options.output, engine.KEYS)
        plan = engine.QUICK if options.quick else engine.Plan()
        with tempfile.TemporaryDirectory() as folder:
            keep(results, engine.measure(Path(folder), plan, lambda row: not results.has(row)))
    elif options.command == "soak":
        from benchmarks.serving import soak

        options.output.unlink(missing_ok=True)
        keep(Results(options.output, soak.KEYS), soak.measure(options.minutes))
    elif options.command == "demo":
        from benchmarks.serving import demo

        demo.main()
    else:
        from benchmarks.serving import plot

        plot.draw(FOLDER)


if __name__ == "__main__":
    main(sys.argv[1:])
