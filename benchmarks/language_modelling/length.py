"""Length: TNL trained at 512, 8K and 64K at equal tokens, then read whole books through its state.

The rows at context 2048 are those of `quality`. Positions up to a million bytes and more are scored one by one.
"""

import argparse

from benchmarks.language_modelling.runs import Run, add_arguments, execute

__all__ = ["RUNS", "add_arguments", "run"]

RUNS = [
    Run("tnl-512", "tnl", context=512, seconds=200),
    Run("tnl-8k", "tnl", context=8192, seconds=200),
    Run("tnl-64k", "tnl", context=65536, seconds=200),
    Run("llama-512", "llama", context=512, seconds=240),
    Run("llama-8k", "llama", context=8192, seconds=330),
]


def run(options: argparse.Namespace) -> None:
    if options.plot:
        from benchmarks.language_modelling.plots import plot_length

        plot_length(options.output)
    else:
        execute("length", RUNS, options)
