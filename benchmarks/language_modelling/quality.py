"""Quality: bits per byte of TNL, LLaMA and a third model at equal tokens, and their learning curves.

Runs are named after what differs from the base: 45M parameters, bytes, 78 MB of novels, context 2048, two passes.
"""

import argparse
from typing import Any

from benchmarks.language_modelling.models import hybrid
from benchmarks.language_modelling.runs import Run, add_arguments, execute

__all__ = ["RUNS", "add_arguments", "run"]

TWO_PASSES = 2400  # steps of 65,536 bytes over 78 MB
SIX_PASSES = 4500  # over 49 MB
BPE: dict[str, Any] = {"tokenizer": "bpe", "step_tokens": 32768, "steps": 1150}  # about four bytes a token: two passes
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
SECOND = [
    Run("tnl-seed-1", "tnl", seed=1, seconds=200),
    Run("llama-seed-1", "llama", seed=1, seconds=250),
    Run("tnl-6-passes-dropout-0.2", "tnl", "25m", {"dropout": 0.2}, "novels-49", steps=SIX_PASSES, seconds=210),
    Run("tnl-6-passes", "tnl", "25m", corpus="novels-49", steps=SIX_PASSES, seconds=210),
    Run("llama-6-passes-dropout-0.1", "llama", "25m", {"attention_dropout": 0.1}, "novels-49", steps=SIX_PASSES,
        seconds=300),
    Run("llama-6-passes-decay-0.3", "llama", "25m", corpus="novels-49", steps=SIX_PASSES,
        optimizer={"weight_decay": 0.3}, seconds=260),
    Run("tnl-bpe", "tnl", **BPE, seconds=150),
    Run("llama-bpe", "llama", **BPE, seconds=170),
    Run("tnl-python", "tnl", corpus="python", seconds=200),
    Run("llama-python", "llama", corpus="python", seconds=250),
    Run("hybrid", "tnl", changes={"layer_types": hybrid(10, 5)}, seconds=220),
    Run("mamba2", "mamba2", seconds=350),
]  # fmt: skip
RUNS = FIRST + SECOND


def run(options: argparse.Namespace) -> None:
    if options.plot:
        from benchmarks.language_modelling.plots import plot_quality

        plot_quality(options.output)
    else:
        execute("quality", RUNS, options)
