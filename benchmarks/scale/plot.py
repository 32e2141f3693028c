"""The picture of docs/training.md: what several GPUs give, from the CSV files of this benchmark."""

import csv
from pathlib import Path

from matplotlib.figure import Figure


def plot(folder: Path, path: Path) -> None:
    """Draw speed-ups over one GPU, of training with FSDP2 and of one sequence over several GPUs, into a picture."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    training, sequence = figure.subplots(1, 2)
    rows = _read(folder / "training.csv") + _read(folder / "models.csv")
    for model, tokens in sorted({(row["model"], int(row["T"])) for row in rows}):
        _line(training, [r for r in rows if (r["model"], int(r["T"])) == (model, tokens)], f"{model}, T = {tokens:,}")
    training.set_title("FSDP2, rows of its own on each GPU")
    rows = [r for r in _read(folder / "operator.csv") if r["pass"] == "forward and backward"]
    for tokens, decay in sorted({(int(row["T"]), row["decay"]) for row in rows}):
        some = [r for r in rows if (int(r["T"]), r["decay"]) == (tokens, decay)]
        _line(sequence, some, f"T = {tokens:,}, a decay a {decay}")
    sequence.set_title("One sequence, operator forward and backward")
    for axes in (training, sequence):
        most = int(axes.get_xlim()[1])
        axes.plot([1, most], [1, most], color="grey", linewidth=0.8, linestyle="--", label="as many times as fast")
        axes.set(xlabel="GPUs", ylabel="speed over one GPU", xticks=[1, *range(2, most + 1, 2)])
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("speedup")]


def _line(axes, rows: list[dict[str, str]], label: str) -> None:  # type: ignore[no-untyped-def]
    rows = sorted(rows, key=lambda row: int(row["gpus"]))
    axes.plot([int(r["gpus"]) for r in rows], [float(r["speedup"]) for r in rows], marker="o", label=label)
