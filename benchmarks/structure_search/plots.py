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


def image_example() -> None:
    """The worked example of the documentation: an image, and what its best ring of 12 evaluations keeps."""
    from matplotlib.figure import Figure

    import tnss
    from benchmarks import REPOSITORY
    from benchmarks.structure_search.problems import shared

    tensor = shared("image_a")
    result = tnss.search(tensor, tnss.Ring(7), tnss.Lagrangian(5.0), budget=tnss.Budget(12))
    figure = Figure(figsize=(7, 3.9), layout="constrained")
    best = result.best
    panels = {
        f"original, {tensor.numel()} numbers": tensor,
        f"ring, {best.parameters} numbers, RSE {best.rse:.3f}": best.reconstruct(),
    }
    for axes, (title, panel) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axes.imshow(panel.permute(*range(7, -1, -1)).reshape(256, 256).clamp(0, 1), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    figure.savefig(REPOSITORY / "docs" / "structure-search-image.png", dpi=100)
    print(result.summary())
