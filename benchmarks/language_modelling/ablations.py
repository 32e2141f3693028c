"""Ablations: each switch of the configuration, at 10M parameters and 39M bytes, beside the order of the paper."""

import argparse

from benchmarks.language_modelling.models import hybrid
from benchmarks.language_modelling.runs import Run, add_arguments, execute

__all__ = ["PAPER", "RUNS", "add_arguments", "run"]

# Loss at 385M parameters, arXiv 2405.17381, by the name of our run.
PAPER = {
    "base": 2.248,
    "lrpe-none": 2.267,
    "decay-none": 2.287,
    "lrpe-all": 2.236,
    "decay-uniform": 2.258,
    "gate-none": 2.263,
    "activation-none": 2.283,
    "llama": 2.362,
}
LAYERS = 6


def ablation(name: str, model: str = "tnl", seed: int = 0, rate: float = 2e-3, **changes: object) -> Run:
    """A run of the size of all of them."""
    return Run(
        name, model, "10m", changes, step_tokens=32768, steps=1200, optimizer={"learning_rate": rate}, seed=seed,
        contexts=(2048,), curve_points=4, seconds=40 if model != "gla" else 70,
    )  # fmt: skip


RUNS = [
    ablation("base"),
    ablation("llama", "llama"),
    ablation("lrpe-none", lrpe_layers="none"),
    ablation("lrpe-all", lrpe_layers="all"),
    ablation("decay-none", decay_schedule="none", lrpe_layers="all"),
    ablation("decay-uniform", decay_schedule="uniform"),
    ablation("decay-paper", decay_schedule="paper"),
    ablation("gate-none", gate="none"),
    ablation("gate-sigmoid", gate="sigmoid"),
    ablation("gate-low-rank", gate="low_rank_sigmoid"),
    ablation("activation-none", hidden_act="none"),
    ablation("glu-silu", glu_act="silu"),
    ablation("value-silu", value_act="silu"),
    ablation("heads-3", num_attention_heads=3),
    ablation("heads-12", num_attention_heads=12),
    ablation("hybrid-3", layer_types=hybrid(LAYERS, 3)),
    ablation("gla", "gla"),
    ablation("base-seed-1", seed=1),
    ablation("llama-seed-1", "llama", seed=1),
    ablation("llama-rate-1e-3", "llama", rate=1e-3),
    ablation("llama-rate-4e-3", "llama", rate=4e-3),
    ablation("base-rate-1e-3", rate=1e-3),
    ablation("base-rate-4e-3", rate=4e-3),
    ablation("norm-rms", norm_type="rms"),
    ablation("norm-layer", norm_type="layer"),
    ablation("activation-relu", hidden_act="relu"),
    ablation("activation-1-elu", hidden_act="1+elu"),
    ablation("dropout-0.1", dropout=0.1),
]


def run(options: argparse.Namespace) -> None:
    if options.plot:
        from benchmarks.language_modelling.plots import plot_ablations

        plot_ablations(options.output)
    else:
        execute("ablations", RUNS, options)
