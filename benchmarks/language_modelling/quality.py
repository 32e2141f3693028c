"""Quality: bits per byte of TNL, LLaMA and a third model at equal tokens, and their learning curves.

Runs are named after what differs from the base: 45M parameters, bytes, 78 MB of novels, context 2048, two passes.
"""

import argparse
from typing import Any

from benchmarks.language_modelling.models import hybrid
from benchmarks.language_modelling.runs import Run, add_arguments, execute

__all__ = ["RUNS", "add_arguments", "run"]

SIX_PASSES = 3600  # steps of 32,768 bytes over 20 MB
BPE_STEP = 16384  # tokens of a step that are about 65,536 bytes
SMALL: dict[str, Any] = {"size": "10m", "step_tokens": 32768}
MORE_HEADS = {"num_attention_heads": 10}
LOW_RATE = {"learning_rate": 1e-3}


def decay(strength: float) -> dict[str, float]:
    """A weight decay; the others have 0.1."""
    return {"weight_decay": strength}


def heads(count: int) -> dict[str, int]:
    """So many heads of LLaMA."""
    return {"num_attention_heads": count, "num_key_value_heads": count}


def overfit(change: str, model: str, **others: Any) -> Run:
    """Six passes over 20 MB with 10M parameters: as many bytes a parameter as 49 MB are for 25M."""
    name = f"{model}-6-passes-{change}".removesuffix("-")
    return Run(name, model, corpus="novels-20", steps=SIX_PASSES, contexts=(2048,), seconds=85, **SMALL, **others)


def half_a_pass(name: str, model: str, **others: Any) -> Run:
    """As in the ablations."""
    return Run(name, model, steps=1200, contexts=(2048,), **{"seconds": 40} | SMALL | others)


RUNS = [
    Run("tnl", "tnl", seconds=195),
    Run("llama", "llama", seconds=215),
    Run("tnl-10-heads", "tnl", changes=MORE_HEADS, seconds=195),
    Run("tnl-rate-1e-3", "tnl", optimizer=LOW_RATE, seconds=195),
    Run("llama-rate-1e-3", "llama", optimizer=LOW_RATE, seconds=215),
    Run("tnl-seed-1", "tnl", seed=1, seconds=195),
    Run("llama-seed-1", "llama", seed=1, seconds=215),
    overfit("", "llama"),
    overfit("", "tnl"),
    overfit("decay-1", "llama", optimizer=decay(1.0)),
    overfit("decay-1", "tnl", optimizer=decay(1.0)),
    overfit("decay-2", "llama", optimizer=decay(2.0)),
    overfit("decay-2", "tnl", optimizer=decay(2.0)),
    overfit("decay-1-rate-1e-3", "llama", optimizer=decay(1.0) | LOW_RATE),
    overfit("decay-1-rate-1e-3", "tnl", optimizer=decay(1.0) | LOW_RATE),
    overfit("decay-1.5", "llama", optimizer=decay(1.5)),
    overfit("decay-1.5", "tnl", optimizer=decay(1.5)),
    overfit("decay-1-dropout-0.1", "llama", changes={"attention_dropout": 0.1}, optimizer=decay(1.0)),
    overfit("decay-1-dropout-0.1", "tnl", changes={"dropout": 0.1}, optimizer=decay(1.0)),
    overfit("dropout-0.1", "tnl", changes={"dropout": 0.1}),
    overfit("dropout-0.2", "tnl", changes={"dropout": 0.2}),
    overfit("decay-1-hybrid", "tnl", changes={"layer_types": hybrid(6, 3)}, optimizer=decay(1.0)),
    overfit("decay-1-heads-12", "tnl", changes={"num_attention_heads": 12}, optimizer=decay(1.0)),
    overfit("decay-1-heads-12", "llama", changes=heads(12), optimizer=decay(1.0)),
    overfit("decay-1-gate-sigmoid", "tnl", changes={"gate": "sigmoid"}, optimizer=decay(1.0)),
    overfit("decay-1-lrpe-all", "tnl", changes={"lrpe_layers": "all"}, optimizer=decay(1.0)),
    overfit("decay-1-seed-1", "llama", optimizer=decay(1.0), seed=1),
    overfit("decay-1-seed-1", "tnl", optimizer=decay(1.0), seed=1),
    overfit("decay-0.5", "llama", optimizer=decay(0.5)),
    overfit("decay-0.5", "tnl", optimizer=decay(0.5)),
    Run("tnl-bpe", "tnl", tokenizer="bpe", step_tokens=BPE_STEP, seconds=110),
    Run("llama-bpe", "llama", tokenizer="bpe", step_tokens=BPE_STEP, seconds=110),
    Run("tnl-bpe-rate-1e-3", "tnl", tokenizer="bpe", step_tokens=BPE_STEP, optimizer=LOW_RATE, seconds=110),
    Run("llama-bpe-rate-1e-3", "llama", tokenizer="bpe", step_tokens=BPE_STEP, optimizer=LOW_RATE, seconds=110),
    half_a_pass("tnl-python", "tnl", corpus="python"),
    half_a_pass("llama-python", "llama", corpus="python"),
    half_a_pass("hybrid-python", "tnl", corpus="python", changes={"layer_types": hybrid(6, 3)}),
    half_a_pass("tnl-python-heads-3", "tnl", corpus="python", changes={"num_attention_heads": 3}),
    Run("gla", "gla", seconds=300),
    Run("tnl-context-512", "tnl", context=512, seconds=195),
    Run("llama-context-512", "llama", context=512, seconds=200),
    Run("llama-10-heads", "llama", changes=heads(10), seconds=215),
    Run("tnl-10-heads-rate-1e-3", "tnl", changes=MORE_HEADS, optimizer=LOW_RATE, seconds=195),
    Run("llama-10-heads-rate-1e-3", "llama", changes=heads(10), optimizer=LOW_RATE, seconds=215),
    Run("hybrid", "tnl", changes={"layer_types": hybrid(10, 5)}, seconds=210),
]


def run(options: argparse.Namespace) -> None:
    if options.plot:
        from benchmarks.language_modelling.plots import plot_quality

        plot_quality(options.output)
    else:
        execute("quality", RUNS, options)
