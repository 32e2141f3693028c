"""Plots and table of the rows: bits per byte against parameters of the matrices and against bytes of the model."""

import csv
from collections.abc import Sequence
from pathlib import Path

from benchmarks import REPOSITORY
from benchmarks.compression.cases import METHODS, ORIGINAL, SCALES

Row = dict[str, str]
DOCS = REPOSITORY / "docs"
HEADER = (
    "method", "parameters of the matrices", "before healing", "healed", "rate", "healed, int8", "MB, int8", "GiB",
    "tokens/s", "compiled", "decoded/s", "seconds",
)  # fmt: skip
SPEEDS = ("tokens_per_second", "compiled_tokens_per_second", "decoded_tokens_per_second")
COLOURS = dict(zip(METHODS, ("tab:red", "tab:green", "tab:olive", "tab:purple", "tab:cyan", "tab:blue"), strict=True))


def draw(folder: Path) -> None:
    """The page's tables, and its plots of the larger model that was measured.

    Raises:
        SystemExit: Nothing was measured.
    """
    page = DOCS / "compression.md"
    measured = {scale: folder / f"{scale}.csv" for scale in ("gpu", "cpu") if (folder / f"{scale}.csv").exists()}
    if not measured:
        raise SystemExit(f"no gpu.csv or cpu.csv in {folder}: run the benchmark first")
    tables = {scale: read_rows(path) for scale, path in measured.items()}
    for scale, rows in tables.items():
        write_between(page, f"results-{scale}", results_table(rows, SCALES[scale].healing_rates))
        found = folder / f"structures-{scale}.csv"
        if found.exists():
            write_between(page, f"structures-{scale}", structures_table(read_rows(found)))
    largest = next(iter(tables.values()))
    draw_parameters(largest, DOCS / "compression-parameters.png")
    draw_bytes(largest, DOCS / "compression-bytes.png")


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def write_between(page: Path, name: str, body: str) -> None:
    """Put a text into a page, between the two marks of a name; a page without them is left alone."""
    first, last = f"<!-- {name} of python -m benchmarks.compression plot -->", f"<!-- end of {name} -->"
    before, found, rest = page.read_text().partition(first)
    if found:
        page.write_text(f"{before}{first}\n{body}\n{last}{rest.partition(last)[2]}")


def structures_table(rows: Sequence[Row]) -> str:
    """The best structure of each kind against decompositions of its size."""
    found = [row for row in rows if row["structure"]]
    lines = ["| kind | best folding | bonds | error over that of a decomposition |", "| --- | --- | --- | --- |"]
    for kind in dict.fromkeys(row["kind"] for row in found):
        ratios = {float(row["error"]) / float(row["svd_error"]): row for row in found if row["kind"] == kind}
        ratio, row = min(ratios.items())
        lines.append(f"| {kind} | {row['folding'].replace('*', ' x ')} | {row['structure']} | {ratio:.2f} |")
    return "\n".join(lines)


def results_table(rows: Sequence[Row], healing_rates: Sequence[float]) -> str:
    """All rows, and the machine; columns in which nothing was measured are left out.

    Of a model before and after healing the better one is bold.
    """
    original = next(float(row["bits_per_byte"]) for row in rows if row["method"] == ORIGINAL)
    table = []
    for first in (row for row in rows if row["healing_steps"] == "0"):
        same = (row for row in rows if (row["method"], row["budget"]) == (first["method"], first["budget"]))
        healed = next((row for row in same if row["healing_steps"] != "0"), None)
        cells = [first["method"], f"{int(first['matrix_parameters']):,}", _bits(first, "bits_per_byte", original)]
        columns = ("bits_per_byte", "bits_per_byte_int8")
        cells += ["" if healed is None else _bits(healed, name, original) for name in columns]
        if healed is not None:
            better = 2 if float(first["bits_per_byte"]) < float(healed["bits_per_byte"]) else 3
            cells[better] = f"**{cells[better]}**"
        cells.insert(4, "" if healed is None or len(healing_rates) == 1 else healed["healing_rate"])
        cells.append(f"{int(first['bytes_int8']) / 1e6:#.3g}")
        cells.append(f"{float(first['memory_gib']):.2f}" if first.get("memory_gib") else "")
        cells += [f"{int(first[name]):,}" if first.get(name) else "" for name in SPEEDS]
        cells.append(f"{float(first['compress_seconds']):.0f}" if first["compress_seconds"] else "")
        table.append(cells)
    kept = [place for place in range(len(HEADER)) if any(cells[place] for cells in table)]
    lines = [[cells[place] for place in kept] for cells in (list(HEADER), ["---"] * len(HEADER), *table)]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    devices = " and ".join(dict.fromkeys(row["device"] for row in rows))
    about = f"{devices}, PyTorch {rows[0]['torch']}, transformers {rows[0]['transformers']}."
    if any(float(row["healing_rate"]) for row in rows):
        about += f" Healed at {' and '.join(map(str, healing_rates))} of the training's learning rate"
        about += "; the better one (rate) counts." if len(healing_rates) > 1 else "."
    return f"{body}\n\n{about}"


def _bits(row: Row, name: str, original: float) -> str:
    bits = float(row[name])
    return f"{bits:.4f} ({bits / original - 1:+.1%})"


def _curve(rows: Sequence[Row], method: str, healed: bool, x: str, y: str) -> tuple[list[float], list[float]]:
    own = [row for row in rows if row["method"] == method and (row["healing_steps"] != "0") == healed]
    points = sorted((float(row[x]), float(row[y])) for row in own)
    return [point[0] for point in points], [point[1] for point in points]


def _size_of_original(rows: Sequence[Row]) -> str:
    original = next(row for row in rows if row["method"] == ORIGINAL)
    return f"a model of {int(original['parameters']) / 1e6:.1f}M parameters"


def draw_parameters(rows: Sequence[Row], path: Path) -> None:
    """Two panels, before and after healing; the dashed line is the original, trained on as long."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(_size_of_original(rows), fontsize=10)
    for place, healed in enumerate((False, True)):
        axes = figure.add_subplot(1, 2, place + 1)
        dense, reference = _curve(rows, ORIGINAL, healed, "matrix_parameters", "bits_per_byte")
        for method, colour in COLOURS.items():
            parameters, bits = _curve(rows, method, healed, "matrix_parameters", "bits_per_byte")
            if parameters:
                axes.plot([p / dense[0] for p in parameters], bits, "o-", color=colour, label=method, markersize=4)
        axes.axhline(reference[0], color="0.4", linestyle="--", linewidth=1)
        axes.set_title("healed on 5 % of the training tokens" if healed else "before healing", fontsize=10)
        axes.set_xlabel("parameters kept")
        axes.set_ylabel("bits per byte")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.2f}")
        axes.yaxis.set_minor_formatter("{x:.1f}")
        if not healed:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def draw_bytes(rows: Sequence[Row], path: Path) -> None:
    """After healing: filled with 16 bits a number, hollow with the matrices rounded to int8."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot(title=_size_of_original(rows))
    axes.title.set_fontsize(10)
    for method, colour in {ORIGINAL: "0.3", **COLOURS}.items():
        for size, bits, fill in (("bytes", "bits_per_byte", colour), ("bytes_int8", "bits_per_byte_int8", "none")):
            x, y = _curve(rows, method, True, size, bits)
            label = method if fill == colour and x else None
            axes.plot([v / 1e6 for v in x], y, "o-", color=colour, markerfacecolor=fill, label=label, markersize=5)
    axes.set_xlabel("size of the model in MB")
    axes.set_ylabel("bits per byte, healed")
    axes.legend(fontsize=7, title="filled: 16 bits, hollow: int8", title_fontsize=7)
    figure.savefig(path, dpi=120)
