"""Plots of the rows: bits per byte against parameters of the matrices and against bytes of the model."""

import csv
from collections.abc import Sequence
from pathlib import Path

from benchmarks import REPOSITORY
from benchmarks.compression.cases import METHODS, ORIGINAL

Row = dict[str, str]
DOCS = REPOSITORY / "docs"
COLOURS = dict(zip(METHODS, ("tab:red", "tab:purple", "tab:blue", "tab:cyan", "tab:green", "tab:olive"), strict=True))


def draw(folder: Path) -> None:
    """`docs/compression-parameters.png` and `docs/compression-bytes.png` from the largest scale that was measured."""
    table = next((path for path in (folder / "gpu.csv", folder / "cpu.csv") if path.exists()), None)
    if table is None:
        raise SystemExit(f"no gpu.csv or cpu.csv in {folder}: run the benchmark first")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    draw_parameters(rows, DOCS / "compression-parameters.png")
    draw_bytes(rows, DOCS / "compression-bytes.png")


def _curve(rows: Sequence[Row], method: str, healed: bool, x: str, y: str) -> tuple[list[float], list[float]]:
    own = [row for row in rows if row["method"] == method and (row["healing_steps"] != "0") == healed]
    points = sorted((float(row[x]), float(row[y])) for row in own)
    return [point[0] for point in points], [point[1] for point in points]


def draw_parameters(rows: Sequence[Row], path: Path) -> None:
    """Two panels, before and after healing; the dashed line is the original, trained on as long."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for place, healed in enumerate((False, True)):
        axes = figure.add_subplot(1, 2, place + 1)
        dense, reference = _curve(rows, ORIGINAL, healed, "matrix_parameters", "bits_per_byte")
        for method, colour in COLOURS.items():
            parameters, bits = _curve(rows, method, healed, "matrix_parameters", "bits_per_byte")
            axes.plot([p / dense[0] for p in parameters], bits, "o-", color=colour, label=method, markersize=4)
        axes.axhline(reference[0], color="0.4", linestyle="--", linewidth=1)
        axes.set_title("healed on 5 % of the training tokens" if healed else "before healing", fontsize=10)
        axes.set_xlabel("parameters kept")
        axes.set_ylabel("bits per byte")
        if not healed:
            axes.set_yscale("log")
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def draw_bytes(rows: Sequence[Row], path: Path) -> None:
    """After healing: filled with 16 bits a number, hollow with the matrices rounded to int8."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for method, colour in {ORIGINAL: "0.3", **COLOURS}.items():
        for size, bits, fill in (("bytes", "bits_per_byte", colour), ("bytes_int8", "bits_per_byte_int8", "none")):
            x, y = _curve(rows, method, True, size, bits)
            label = method if fill == colour else None
            axes.plot([v / 1e6 for v in x], y, "o-", color=colour, markerfacecolor=fill, label=label, markersize=5)
    axes.set_xlabel("size of the model in MB")
    axes.set_ylabel("bits per byte, healed")
    axes.legend(fontsize=7, title="filled: 16 bits, hollow: int8", title_fontsize=7)
    figure.savefig(path, dpi=120)
