"""Plots and tables of docs/quality.md, from the CSV files alone."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import REPOSITORY
from benchmarks.language_modelling.ablations import PAPER
from benchmarks.language_modelling.runs import Row, read_rows

DOCS = REPOSITORY / "docs"
PAGE = DOCS / "quality.md"
DEFAULTS = {"learning_rate": 2e-3}
# Runs that the plots of learning curves show, as far as they are there.
CURVES = (
    "tnl",
    "tnl-rate-1e-3",
    "tnl-10-heads",
    "hybrid",
    "llama",
    "llama-rate-1e-3",
    "llama-10-heads-rate-1e-3",
    "gla",
)
BASE = "base"
POSITIONS = {"quality": "45m", "length": "10m", "ablations": "10m"}  # tables of scores by position, and their sizes
LONG_READERS = {"45m": ("tnl", "tnl-seed-1", "tnl-10-heads"), "10m": ("tnl-512", "tnl-2048", "tnl-8192", "tnl-65536")}
REFERENCE = "llama"  # of either size, reading windows of 2,048
FIRST_POSITION = 16384  # before it there is too little text to tell models apart
SCORES = {f"{split}_{way}": f"{split} {way}" for split in ("validation", "test") for way in (512, 2048, 8192, "stream")}


def figure_of(columns: int, width: float = 9.0, height: float = 3.8) -> tuple[Any, list[Any]]:
    """A figure with panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, list(panels)


def publish(name: str, rows: list[Row], columns: dict[str, str]) -> None:
    """Put a table into the page, between `<!-- NAME -->` and `<!-- end -->`; `columns` maps fields to heads."""
    lines = [f"| {' | '.join(columns.values())} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(_show(field, row.get(field, '')) for field in columns)} |" for row in rows]
    before, _, rest = PAGE.read_text().partition(f"<!-- {name} -->\n")
    if not rest:
        raise ValueError(f"{PAGE.name}: expected a line <!-- {name} -->, found none")
    after = rest[rest.index("<!-- end -->") :]
    PAGE.write_text(f"{before}<!-- {name} -->\n" + "\n".join(["", *lines, "", ""]) + after)


def _show(field: str, value: Any) -> str:
    if value in ("", None):
        return ""
    if field in ("parameters", "tokens_per_second", "cpu_seconds"):
        return f"{float(value):,.0f}"
    if field.endswith("difference"):
        return f"{float(value):+.3f}"
    if field.startswith("title_bits"):
        return f"{float(value):.1f}"
    is_score = field.startswith(("validation", "test", "train", "paper", "named"))
    return f"{float(value):.3f}" if is_score else str(value)


def differences(row: Row) -> str:
    """What a run changes, in words."""
    changed = json.loads(row["changes"]) | json.loads(row["optimizer"])
    if row["context"] != "2048":
        changed["context"] = row["context"]
    return ", ".join(f"{name} {_short(value)}" for name, value in changed.items() if value != DEFAULTS.get(name))


def _short(value: Any) -> str:
    """A value of a configuration; of kinds of layers, which are softmax attention."""
    if not isinstance(value, list):
        return str(value)
    return "full_attention in " + ", ".join(str(i) for i, kind in enumerate(value) if kind == "full_attention")


def plot_quality(output: Path) -> None:
    """Learning curves on validation text against bytes and against time, and the tables of all runs."""
    rows = [row | {"differs": differences(row)} for row in read_rows(output / "quality.csv")]
    rows.sort(key=lambda row: (row["corpus"], row["tokenizer"], row["model"] != "tnl", row["model"], row["run"]))
    for row in rows:
        row["train"] = row[f"train_{row['context']}"]
        if row["side_by_side"] != "1":
            row["tokens_per_second"] = ""  # not that of the model alone
    others = [row for row in rows if row["tokenizer"] == "bpe" or row["corpus"] == "python"]
    large = [row for row in rows if row["size"] == "45m" and row not in others]
    about = {"run": "run", "differs": "differs"}
    publish("two passes", large, about | {"tokens_per_second": "tokens/s"} | SCORES | {"train": "training text"})
    both = {"validation_2048": "validation", "test_2048": "test", "train": "training text"}
    six = [row for row in rows if "6-passes" in row["run"]]
    publish("six passes", six, about | both)
    if others:
        publish("other texts", others, about | {"corpus": "text", "tokenizer": "tokens"} | both)
    curves = defaultdict(list)
    for point in read_rows(output / "quality-curves.csv"):
        if point["held_out_loss"]:
            curves[point["run"]].append((float(point["tokens"]), float(point["held_out_loss"])))
    shown = sorted((row for row in large if row["run"] in CURVES), key=lambda row: CURVES.index(row["run"]))
    figure, (tokens_axes, time_axes) = figure_of(2)
    for row in shown:
        tokens, bits = bits_of(row, curves[row["run"]])
        (line,) = tokens_axes.plot(tokens, bits, marker=".", label=row["run"])
        if row["tokens_per_second"]:
            seconds = [1e6 * seen / float(row["tokens_per_second"]) for seen in tokens]
            time_axes.plot(seconds, bits, marker=".", color=line.get_color())
    time_axes.set(xlabel=f"seconds on one {rows[0]['device']}" if rows else "seconds")
    finish_curves(tokens_axes, time_axes)
    figure.savefig(DOCS / "quality-curves.png", dpi=110)
    figure, panels = figure_of(2)
    for axes, model in zip(panels, ("tnl", "llama"), strict=True):
        for row in six:
            if row["model"] != model:  # in grey, behind the panel's own
                axes.plot(*bits_of(row, curves[row["run"]]), color="0.8", zorder=1)
        for number, row in enumerate(row for row in six if row["model"] == model):
            style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            axes.plot(*bits_of(row, curves[row["run"]]), label=row["run"], zorder=2, **style)
    finish_curves(*panels, over=0.15)
    figure.savefig(DOCS / "quality-six-passes.png", dpi=110)


def bits_of(row: Row, points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """A learning curve in megatokens and in bits per byte."""
    bits = [loss / math.log(2) * float(row["tokens_per_byte"]) for _, loss in points]
    return [seen / 1e6 for seen, _ in points], bits


def finish_curves(*panels: Any, over: float = 0.5) -> None:
    """Labels, and a range that shows how the curves end."""
    for axes in panels:
        low = min((min(line.get_ydata()) for line in axes.lines if len(line.get_ydata())), default=1.0)
        axes.set_ylim(low - 0.03, low + over)
        if not axes.get_xlabel():
            axes.set_xlabel("megabytes read")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=6)
    panels[0].set_ylabel("bits per byte, validation")


def plot_ablations(output: Path) -> None:
    """Each switch as a distance to the base, with the paper's."""
    rows = read_rows(output / "ablations.csv")
    (base,) = (float(row["validation_2048"]) for row in rows if row["run"] == BASE)
    for row in rows:
        row["difference"] = float(row["validation_2048"]) - base
        row["differs"] = differences(row)
        if row["run"] in PAPER:
            row["paper"] = PAPER[row["run"]]
            row["paper_difference"] = PAPER[row["run"]] - PAPER[BASE]
    rows.sort(key=lambda row: row["difference"])
    columns = {"run": "run", "differs": "differs", "validation_2048": "bits per byte", "difference": "to the base"}
    publish("ablations", rows, columns | {"paper": "paper, loss", "paper_difference": "paper, to the base"})
    figure, (axes,) = figure_of(1, height=0.24 * len(rows) + 1)
    axes.barh([row["run"] for row in rows], [row["difference"] for row in rows], color="tab:blue", alpha=0.7)
    named = [row for row in rows if "paper" in row]
    axes.plot([row["paper_difference"] for row in named], [row["run"] for row in named], "k|", markersize=9)
    axes.set(
        xlabel="bits per byte above the base (bars, ours); nats per token above the base (marks, the paper at 385M)"
    )
    axes.invert_yaxis()
    figure.savefig(DOCS / "quality-ablations.png", dpi=110)


def plot_length(output: Path) -> None:
    """Bits per byte by position in the held-out books, as a distance to LLaMA of the same size."""
    rows = sorted(read_rows(output / "length.csv"), key=lambda row: (row["model"] != "tnl", int(row["context"])))
    publish(
        "length",
        rows,
        {"run": "run", "context": "trained at", "steps": "steps", "step_tokens": "bytes a step"} | SCORES,
    )
    bits: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for name, size in POSITIONS.items():
        for row in read_rows(output / f"{name}-positions.csv"):
            bits[size, row["run"], row["split"]][int(row["to"])] = float(row["bits_per_byte"])
    figure, panels = figure_of(2)
    for axes, split in zip(panels, ("validation", "test"), strict=True):
        for size, names in LONG_READERS.items():
            at = bits[size, REFERENCE, split]
            for name in names:
                points = [
                    (to, it - at[to]) for to, it in bits[size, name, split].items() if to > FIRST_POSITION and to in at
                ]
                if points:
                    style = "-" if size == "45m" else "--"
                    axes.plot(*zip(*points, strict=True), marker=".", label=f"{name}, {size}", linestyle=style)
        axes.set(xscale="log", xlabel="position in the book (bytes)", title=split)
    panels[0].set_ylabel("bits per byte above LLaMA of the same size")
    panels[0].legend(fontsize=7)
    figure.savefig(DOCS / "quality-length.png", dpi=110)


def plot_recall(output: Path) -> None:
    """Accuracy against pairs, a panel a width, each model at its better learning rate."""
    rows = read_rows(output / "recall.csv")
    by_model: dict[tuple[int, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_model[int(row["width"]), row["model"]][row["trial"]].append(row)
    chosen = {
        key: max(trials.values(), key=lambda trial: sum(float(row["accuracy"]) for row in trial))
        for key, trials in sorted(by_model.items())
    }
    lines = [
        {"model": model, "width": width, "state": trial[0]["state"], "rate": trial[0]["rate"]}
        | {row["pairs"]: f"{float(row['accuracy']):.3f}" for row in trial}
        for (width, model), trial in chosen.items()
    ]
    pairs = list(dict.fromkeys(row["pairs"] for row in rows))
    heads = {"width": "width", "model": "model", "state": "numbers in the state", "rate": "learning rate"}
    publish("recall", lines, heads | {count: f"{count} pairs" for count in pairs})
    widths = sorted({width for width, _ in chosen})
    figure, panels = figure_of(len(widths), height=3.4)
    for axes, width in zip(panels, widths, strict=True):
        for (its_width, model), trial in chosen.items():
            if its_width == width:
                axes.plot(
                    [int(row["pairs"]) for row in trial],
                    [float(row["accuracy"]) for row in trial],
                    marker=".",
                    label=model,
                )
        axes.set_xscale("log", base=2)
        axes.set(xlabel="pairs", title=f"width {width}", ylim=(-0.03, 1.03))
    panels[0].set_ylabel("values named")
    panels[0].legend(fontsize=7)
    figure.savefig(DOCS / "quality-recall.png", dpi=110)


def show_instructions(output: Path) -> None:
    """The table of fine-tuning, before and after."""
    heads = {
        "way": "trained", "batch_size": "batch", "learning_rate": "learning rate", "named_before": "named before",
        "named": "named after", "title_bits_before": "bits of a title before", "title_bits": "bits after",
        "cpu_seconds": "seconds of CPU",
    }  # fmt: skip
    publish("instructions", read_rows(output / "instructions.csv"), heads)
