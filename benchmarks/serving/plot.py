"""Plots of what `engine.csv` and `soak.csv` hold, into docs/."""

from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks import REPOSITORY
from benchmarks.serving import engine, soak
from benchmarks.serving.results import Results, Row

DOCS = REPOSITORY / "docs"
COLOURS = {"TNL": "#0b6e4f", "LLaMA": "#8a6d00"}


def draw(folder: Path) -> None:
    """Draw each plot whose results there are."""
    contexts = Results(folder / "engine.csv", engine.KEYS).rows
    if contexts:
        draw_contexts(contexts)
    seconds = Results(folder / "soak.csv", soak.KEYS).rows
    if seconds:
        draw_memory(seconds)


def draw_contexts(rows: list[Row]) -> None:
    """Time to first token, time per token and memory of a request against context."""
    panels = (
        ("first_token_cpu_s", "time to first token, s", "log"),
        ("token_cpu_ms", "time per token after that, ms", "linear"),
        ("request_mb", "memory of a request, MB", "log"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.4), layout="constrained")
    for axis, (column, label, scale) in zip(axes, panels, strict=True):
        for name, colour in COLOURS.items():
            points = sorted((int(row["context"]), float(row[column])) for row in rows if row["model"] == name)
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_yscale(scale)
        if scale == "linear":
            axis.set_ylim(bottom=0)
        axis.set_xlabel("context, tokens")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(DOCS / "serving-context.png", dpi=110)
    plt.close(figure)


def draw_memory(rows: list[Row]) -> None:
    """Memory of the server's processes over time."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    points = sorted((float(row["second"]) / 60, float(row["memory_mb"])) for row in rows)
    axis.plot(*zip(*points, strict=True), color=COLOURS["TNL"])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("minutes")
    axis.set_title("memory of the server's processes, MB", fontsize=10)
    axis.grid(alpha=0.3)
    figure.savefig(DOCS / "serving-memory.png", dpi=110)
    plt.close(figure)
