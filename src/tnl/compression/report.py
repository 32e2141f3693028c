"""What a compression did and what it cost: tables, totals, a plot."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tnl.compression.foldings import Folding
from tnl.compression.matrices import Matrix, Option
from tnl.compression.settings import CompressSettings
from tnl.compression.structures import Finding, describe_bonds


def describe(option: Option) -> str:
    """How a matrix is stored, in a few words."""
    if option.kind == "network":
        assert option.network is not None
        return f"{Folding.of(option.network)} | {describe_bonds(option.network)}"
    return f"svd {option.rank}" if option.kind == "svd" else "dense"


def write_report(
    settings: CompressSettings,
    matrices: Sequence[Matrix],
    chosen: Sequence[Option],
    findings: Sequence[Finding],
    before: float | None,
    after: float | None,
    output: Path,
) -> None:
    """Write `report.csv`, `structures.csv`, `report.json` and `report.png`, and print the totals."""
    rows = [
        {
            "matrix": matrix.name,
            "kind": matrix.kind,
            "shape": "x".join(map(str, matrix.shape)),
            "dense_parameters": matrix.weight.numel(),
            "parameters": option.parameters,
            "stored_as": describe(option),
            "error": option.error,
            "relative_error": option.error / (matrix.total or 1.0),
        }
        for matrix, option in zip(matrices, chosen, strict=True)
    ]
    write_csv(output / "report.csv", rows)
    if findings:
        write_csv(output / "structures.csv", [asdict(finding) for finding in findings])
    dense, kept = (sum(int(row[name]) for row in rows) for name in ("dense_parameters", "parameters"))  # type: ignore[call-overload]
    totals = {
        "settings": asdict(settings),
        "dense_parameters": dense,
        "parameters": kept,
        "share": kept / dense,
        "predicted_loss": sum(option.error for option in chosen),
        "bits_per_byte_before": before,
        "bits_per_byte_after": after,
    }
    (output / "report.json").write_text(json.dumps(totals, indent=1) + "\n")
    draw(matrices, chosen, output / "report.png")
    show(rows, totals)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same keys, atomically."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def show(rows: Sequence[dict[str, Any]], totals: dict[str, Any]) -> None:
    """Print one line for each kind of matrix, and the totals."""
    table = Table(title=f"{totals['parameters']:,} of {totals['dense_parameters']:,} parameters")
    for column in ("kind", "matrices", "share kept", "dense", "svd", "networks"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        share = sum(row["parameters"] for row in own) / sum(row["dense_parameters"] for row in own)
        dense = sum(row["stored_as"] == "dense" for row in own)
        svd = sum(row["stored_as"].startswith("svd") for row in own)
        table.add_row(kind, str(len(own)), f"{share:.3f}", str(dense), str(svd), str(len(own) - dense - svd))
    console = Console()
    console.print(table)
    if totals["bits_per_byte_after"] is not None:
        before, after = totals["bits_per_byte_before"], totals["bits_per_byte_after"]
        console.print(f"bits per byte {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%}), not healed")


def draw(matrices: Sequence[Matrix], chosen: Sequence[Option], path: Path) -> None:
    """Plot the share of parameters that each matrix kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.16 * len(chosen)), layout="constrained")
    axes = figure.add_subplot()
    colours = {"dense": "0.6", "svd": "tab:blue", "network": "tab:orange"}
    shares = [option.parameters / matrix.weight.numel() for matrix, option in zip(matrices, chosen, strict=True)]
    for kind, colour in colours.items():
        places = [place for place, option in enumerate(chosen) if option.kind == kind]
        axes.barh(places, [shares[place] for place in places], color=colour, label=kind)
    axes.set_yticks(range(len(chosen)), [matrix.name.removeprefix("model.") for matrix in matrices], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("share of parameters kept")
    axes.legend(fontsize=7)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)
