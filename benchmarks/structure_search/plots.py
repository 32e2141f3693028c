"""Plots of the results, from the CSV files alone."""

import csv
import statistics
from collections import defaultdict

from benchmarks.structure_search.cases import FOLDER


def read(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def plot_all() -> None:
    for name, plot in (("methods", plot_methods), ("images", plot_images), ("evaluation", plot_evaluation)):
        if (FOLDER / f"{name}.csv").exists():
            plot()


def plot_methods() -> None:
    """Parameters at the planted error against time: one marker a seed, by method."""
    from matplotlib.figure import Figure

    rows = read("methods")
    tensors = sorted({row["tensor"] for row in rows})
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, tensor in zip(figure.subplots(1, len(tensors)), tensors, strict=True):
        groups = defaultdict(list)
        for row in rows:
            if row["tensor"] == tensor and int(row["parameters_at_error"]):
                groups[row["method"]].append((float(row["cpu_seconds"]), int(row["parameters_at_error"])))
        for method, points in groups.items():
            seconds, parameters = zip(*points, strict=True)
            axes.scatter(seconds, parameters, s=18, alpha=0.7, label=f"{method} ({len(points)} seeds)")
        axes.set(xscale="log", yscale="log", xlabel="CPU seconds", ylabel="parameters at the planted error")
        axes.set_title(tensor)
        axes.legend(fontsize=7)
    figure.savefig(FOLDER / "methods.png", dpi=110)


def plot_images() -> None:
    """Objective reached on the images against the bar."""
    from matplotlib.figure import Figure

    rows = read("images")
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for place, tensor in enumerate(sorted({row["tensor"] for row in rows})):
        own = [row for row in rows if row["tensor"] == tensor]
        axes.scatter([place] * len(own), [float(row["objective"]) for row in own], label=tensor)
        axes.hlines(float(own[0]["bar"]), place - 0.3, place + 0.3, color="black", lw=1)
    axes.set(xticks=[], ylabel="objective (line: the bar)")
    axes.legend()
    figure.savefig(FOLDER / "images.png", dpi=110)


def plot_evaluation() -> None:
    """Time of one evaluation: ours and Adam's."""
    from matplotlib.figure import Figure

    rows = read("evaluation")
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    ours, theirs = ([float(row[key]) for row in rows] for key in ("cpu_seconds", "adam_cpu_seconds"))
    axes.scatter(theirs, ours)
    axes.set(xscale="log", yscale="log", xlabel="Adam, CPU seconds", ylabel="tnss, CPU seconds")
    axes.set_title(f"median {statistics.median(theirs):.1f} s against {statistics.median(ours):.2f} s")
    figure.savefig(FOLDER / "evaluation.png", dpi=110)
