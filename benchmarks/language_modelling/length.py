"""Length: TNL trained at 512 to 64K bytes at equal tokens, then read whole books through its state.

10M parameters, two passes in steps of 65,536 bytes; `quality` has the same scores of 45M trained at 2048. Positions up
to a million bytes and more are scored one by one.
"""

import argparse

from benchmarks.language_modelling.runs import Run, add_arguments, execute

__all__ = ["RUNS", "add_arguments", "run"]


def at(context: int, model: str = "tnl") -> Run:
    """Two passes in rows of so many bytes."""
    return Run(f"{model}-{context}", model, "10m", context=context, seconds=130)


RUNS = [at(512), at(65536), at(8192), at(2048, "llama"), at(2048)]


def run(options: argparse.Namespace) -> None:
    if options.plot:
        from benchmarks.language_modelling.plots import plot_length

        plot_length(options.output)
    else:
        execute("length", RUNS, options)
