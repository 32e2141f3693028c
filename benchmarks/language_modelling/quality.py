"""Quality: bits per byte of TNL, LLaMA and a third model at equal tokens, and their learning curves.

Runs are named after what differs from the base: 45M parameters, bytes, 78 MB of novels, context 2048, two passes.
"""

import argparse

from benchmarks.language_modelling.runs import Run, add_arguments, execute

__all__ = ["RUNS", "add_arguments", "run"]

TWO_PASSES = 2400  # steps of 65,536 bytes over 78 MB
SIX_PASSES = 4500  # over 49 MB
BPE_STEPS = 600  # steps of 65,536 tokens of about four bytes: two passes
MORE_HEADS = {"num_attention_heads": 10}

FIRST = [
    Run("tnl", "tnl", seconds=200),
    Run("llama", "llama", seconds=250),
    Run("tnl-rate-1e-3", "tnl", optimizer={"learning_rate": 1e-3}, seconds=200),
    Run("llama-rate-1e-3", "llama", optimizer={"learning_rate": 1e-3}, seconds=250),
    Run("tnl-6-passes-dropout-0.1", "tnl", "25m", {"dropout": 0.1}, "novels-49", steps=SIX_PASSES, seconds=210),
    Run("llama-6-passes", "llama", "25m", corpus="novels-49", steps=SIX_PASSES, seconds=260),
    Run("tnl-10-heads", "tnl", changes=MORE_HEADS, seconds=200),
    Run("gated-delta-net", "gated_delta_net", seconds=300),
]
RUNS = FIRST


def run(options: argparse.Namespace) -> None:
    if options.plot:
        from benchmarks.language_modelling.plots import plot_quality

        plot_quality(options.output)
    else:
        execute("quality", RUNS, options)
