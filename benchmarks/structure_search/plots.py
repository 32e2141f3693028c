"""Plots of the results into the documentation: from the CSV files alone, but for the picture of the example."""

import csv
import statistics
from collections import defaultdict

import torch

from benchmarks import REPOSITORY
from benchmarks.structure_search import FOLDER
from tnss import Network

DOCS = REPOSITORY / "docs"
METHODS = ("auto", "tnale", "tnls", "tnga", "greedy", "svdinstn")
PANELS = {"data": "the authors' tensor, exact", "A6n": "planted ring A6n, noise 1e-2"}


def read(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def plot_all() -> None:
    plot_methods()
    plot_evaluation()


def plot_methods() -> None:
    """Parameters at the planted error against time: one marker a seed, by method."""
    from matplotlib.figure import Figure

    rows = read("methods")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (tensor, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        groups = defaultdict(list)
        for row in rows:
            if row["tensor"] == tensor:
                groups[row["method"]].append((float(row["cpu_seconds"]), int(row["parameters_at_error"])))
        for method in METHODS:
            reached = [(seconds, parameters) for seconds, parameters in groups[method] if parameters]
            seconds, parameters = zip(*reached, strict=True) if reached else ((), ())
            label = f"{method}, error reached in {len(reached)} of {len(groups[method])}"
            axes.scatter(seconds, parameters, s=22, alpha=0.7, label=label)
        axes.set(xscale="log", xlabel="CPU seconds", ylabel="parameters at the planted error", title=title)
        axes.legend(fontsize=7)
    figure.savefig(DOCS / "structure-search-methods.png", dpi=110)


def plot_evaluation() -> None:
    """Time and error of one evaluation: ours and Adam's."""
    from matplotlib.figure import Figure

    rows = read("evaluation")
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    times, errors = figure.subplots(1, 2)
    for axes, ours, theirs, quantity in (
        (times, "cpu_seconds", "adam_cpu_seconds", "CPU seconds"),
        (errors, "rse", "adam_rse", "RSE"),
    ):
        x, y = ([float(row[key]) for row in rows] for key in (theirs, ours))
        axes.scatter(x, y)
        axes.set(xscale="log", yscale="log", xlabel=f"Adam, {quantity}", ylabel=f"tnss, {quantity}")
        axes.set_title(f"{quantity}: medians {statistics.median(x):.2g} and {statistics.median(y):.2g}", fontsize=10)
    errors.axline((1e-3, 1e-3), (1.0, 1.0), color="black", lw=0.8)
    figure.savefig(DOCS / "structure-search-solver.png", dpi=110)


def plot_example(image: torch.Tensor, network: Network) -> None:
    """An image of 256 x 256 grey values as a tensor of order 8, and what a network keeps of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.9), layout="constrained")
    panels = {
        f"original, {image.numel()} numbers": image,
        f"ring, {network.parameters} numbers, RSE {network.rse:.3f}": network.reconstruct(),
    }
    for axes, (title, panel) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axes.imshow(panel.permute(*range(7, -1, -1)).reshape(256, 256).clamp(0, 1), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    figure.savefig(DOCS / "structure-search-image.png", dpi=100)
