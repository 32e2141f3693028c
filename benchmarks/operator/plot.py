"""Draw time and memory against length from a CSV: `python -m benchmarks.operator.plot FILE.csv PLOT.png [CASE]`."""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(path: Path, output: Path, case: str = "many-heads") -> None:
    """Time a token forward and backward, and extra memory, of every implementation of a case."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["case"] == case and row["ms"]]
    panels = [("forward", "ns a token forward"), ("backward", "ns a token backward"), ("memory", "extra memory, GB")]
    panels = [panel for panel in panels if panel[0] == "forward" or any(row["pass"] == "backward" for row in rows)]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False)
    for axis, (what, label) in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(row["implementation"] for row in rows):
            chosen = [
                row for row in rows
                if row["implementation"] == name and row["pass"] == ("backward" if what == "memory" else what)
            ]  # fmt: skip
            tokens = [int(row["T"]) for row in chosen]
            if what == "memory":
                values = [max(float(row["extra_gb"]), 1e-4) for row in chosen]
            else:
                values = [1e6 * float(row["ms"]) / (int(row["B"]) * int(row["T"])) for row in chosen]
            axis.plot(tokens, values, marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens in a sequence", title=label)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, D = {rows[0]['D']}")
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
