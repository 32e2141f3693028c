"""`python -m benchmarks.language_modelling EXPERIMENT [OPTIONS]`; `EXPERIMENT --help` lists the options.

An experiment is a module here with `add_arguments(parser)` and `run(options)`; its docstring is its help.
"""

import argparse
import importlib
import sys

EXPERIMENTS = ("quality", "ablations", "length", "everything", "recall", "instructions", "speed", "generation")


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_modelling", description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS, help="what to measure")
    if name not in EXPERIMENTS:
        parser.parse_args()
    experiment = importlib.import_module(f"benchmarks.language_modelling.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.language_modelling {name}",
        description=experiment.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    experiment.add_arguments(parser)
    experiment.run(parser.parse_args(sys.argv[2:]))


if __name__ == "__main__":
    main()
