"""Quality: bits per byte of TNL, LLaMA and a third model at equal tokens, and their learning curves."""

import argparse

from benchmarks.language_modelling.runs import Run, add_arguments, execute

__all__ = ["RUNS", "add_arguments", "run"]

RUNS = [
    Run("tnl", "tnl"),
    Run("llama", "llama"),
    Run("gated-delta-net", "gated_delta_net"),
    Run("mamba2", "mamba2"),
    Run("tnl-bpe", "tnl", tokenizer="bpe", steps=600),
    Run("hybrid", "tnl", changes={"layer_types": ["linear_attention"] * 4 + ["full_attention"]}),
]


def run(options: argparse.Namespace) -> None:
    execute("quality", RUNS, options)
