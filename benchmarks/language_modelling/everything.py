"""Everything: the runs of quality, length and ablations that have no row yet, in one queue, so that no GPU waits.

A run is named after its experiment as well: quality/tnl.
"""

import argparse

from benchmarks.language_modelling import ablations, length, quality
from benchmarks.language_modelling.runs import Tables, add_arguments, choose, make, show

__all__ = ["add_arguments", "run"]

RUNS = {"quality": quality.RUNS, "length": length.RUNS, "ablations": ablations.RUNS}


def run(options: argparse.Namespace) -> None:
    if options.plot:
        for experiment in (quality, length, ablations):
            experiment.run(options)
        return
    chosen = choose({f"{name}/{run.name}": run for name, runs in RUNS.items() for run in runs}, options)
    if options.list:
        show(chosen)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    tables = {name: Tables(name, options.output, options.work) for name in RUNS}
    make([(tables[name.partition("/")[0]], run) for name, run in chosen.items()], options)
