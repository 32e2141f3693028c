"""Length: TNL trained at 512 to 64K bytes at equal tokens, then read whole books through its state.

10M parameters, one pass in steps of 65,536 bytes; `quality` has the same scores of 45M trained at 2048. Positions up to
a million bytes and more are scored one by one.
"""

import argparse

from benchmarks.language_modelling.runs import Run, add_arguments, execute

__all__ = ["RUNS", "add_arguments", "run"]


def at(context: int, model: str = "tnl", step_tokens: int = 65536, name: str = "") -> Run:
    """One pass in rows of so many bytes."""
    name = name or f"{model}-{context}"
    return Run(
        name, model, "10m", context=context, step_tokens=step_tokens, steps=1200 * 65536 // step_tokens, seconds=60
    )


RUNS = [
    at(512),
    at(65536),
    at(8192),
    at(2048, "llama"),
    at(2048),
    at(512, step_tokens=32768, name="tnl-512-small-steps"),
]


def run(options: argparse.Namespace) -> None:
    if options.plot:
        from benchmarks.language_modelling.plots import plot_length

        plot_length(options.output)
    else:
        execute("length", RUNS, options)
