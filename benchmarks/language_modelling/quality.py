"""Quality: bits per byte of TNL, LLaMA and a third model at equal tokens, and their learning curves.

Runs are named after what differs from the base: 45M parameters, bytes, 78 MB of novels, context 2048, two passes.
"""

import argparse
from typing import Any

from benchmarks.language_modelling.models import hybrid
from benchmarks.language_modelling.runs import Run, add_arguments, execute

__all__ = ["RUNS", "add_arguments", "run"]

ONE_PASS = 1200  # steps of 65,536 bytes over 77 MB
SIX_PASSES = 4500  # over 49 MB
BPE: dict[str, Any] = {"tokenizer": "bpe", "step_tokens": 32768, "steps": 1150}  # about four bytes a token: two passes
MORE_HEADS = {"num_attention_heads": 10}

LOW_RATE = {"learning_rate": 1e-3}


def overfit(name: str, model: str, seconds: int, **others: Any) -> Run:
    """A run of six passes over 49 MB, at the pilot's size."""
    return Run(name, model, "25m", corpus="novels-49", steps=SIX_PASSES, seconds=seconds, **others)


RUNS = [
    Run("tnl", "tnl", seconds=195),
    Run("llama", "llama", seconds=215),
    Run("tnl-10-heads", "tnl", changes=MORE_HEADS, seconds=195),
    Run("tnl-rate-1e-3", "tnl", optimizer=LOW_RATE, seconds=195),
    overfit("tnl-6-passes-dropout-0.1", "tnl", 200, changes={"dropout": 0.1}),
    overfit("llama-6-passes", "llama", 220),
    Run("llama-rate-1e-3", "llama", optimizer=LOW_RATE, seconds=215),
    overfit("tnl-6-passes", "tnl", 200),
    overfit("llama-6-passes-dropout-0.1", "llama", 240, changes={"attention_dropout": 0.1}),
    Run("llama-10-heads", "llama", changes=MORE_HEADS | {"num_key_value_heads": 10}, seconds=215),
    Run("tnl-bpe", "tnl", **BPE, seconds=120),
    Run("llama-bpe", "llama", **BPE, seconds=130),
    overfit("tnl-6-passes-dropout-0.2", "tnl", 200, changes={"dropout": 0.2}),
    Run("tnl-seed-1", "tnl", seed=1, seconds=195),
    Run("llama-seed-1", "llama", seed=1, seconds=215),
    overfit("llama-6-passes-decay-0.3", "llama", 220, optimizer={"weight_decay": 0.3}),
    Run("tnl-10-heads-rate-1e-3", "tnl", changes=MORE_HEADS, optimizer=LOW_RATE, seconds=195),
    Run("gated-delta-net", "gated_delta_net", seconds=350),
    Run("tnl-python", "tnl", corpus="python", steps=ONE_PASS, seconds=125),
    Run("llama-python", "llama", corpus="python", steps=ONE_PASS, seconds=135),
    Run("hybrid", "tnl", changes={"layer_types": hybrid(10, 5)}, seconds=210),
    Run("mamba2", "mamba2", seconds=350),
]


def run(options: argparse.Namespace) -> None:
    if options.plot:
        from benchmarks.language_modelling.plots import plot_quality

        plot_quality(options.output)
    else:
        execute("quality", RUNS, options)
