"""Length: TNL trained at 512 to 64K bytes at equal tokens, then read whole books through its state.

10M parameters, one pass; `quality` has the same scores of 45M trained at 2048. Positions up to a million bytes and more
are scored one by one.
"""

import argparse

from benchmarks.language_modelling.runs import Run, add_arguments, execute

__all__ = ["RUNS", "add_arguments", "run"]


def at(context: int, model: str = "tnl", step_tokens: int = 32768) -> Run:
    """One pass in rows of so many bytes."""
    steps = 2400 * 32768 // step_tokens
    return Run(f"{model}-{context}", model, "10m", context=context, step_tokens=step_tokens, steps=steps, seconds=85)


RUNS = [
    at(512),
    at(65536, step_tokens=65536),
    at(2048),
    at(8192),
    at(2048, "llama"),
    at(512, "llama"),
]


def run(options: argparse.Namespace) -> None:
    if options.plot:
        from benchmarks.language_modelling.plots import plot_length

        plot_length(options.output)
    else:
        execute("length", RUNS, options)
