"""What a run says about itself: progress on the terminal, metrics as CSV, JSON lines and TensorBoard, and a plot."""

import contextlib
import csv
import dataclasses
import importlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tnl.training.config import TrainSettings

FIELDS = (
    "step",
    "tokens",
    "loss",
    "held_out_loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "model_tflops",
    "model_flops_use",
    "data_wait",
    "memory_gib",
    "skipped_steps",
    "seconds",
)


class Report:
    """Metrics and progress of a run; only the first process has one that writes.

    Attributes:
        console: Where messages go (standard error).
        rows: Metrics logged so far, those of the run that is resumed included.
    """

    def __init__(self, settings: TrainSettings, active: bool) -> None:
        self.settings, self.active = settings, active
        self.folder, self.steps = Path(settings.output), settings.steps
        self._tracker = load_tracker(settings.tracker) if active else None
        self.console = Console(stderr=True, quiet=not active)
        self.rows: list[dict[str, Any]] = []
        self._progress: Progress | None = None
        self._drawn = time.monotonic()

    @contextlib.contextmanager
    def started(self, step: int) -> Iterator[None]:
        """Open the files and show progress; metrics logged after `step`, the last one finished, are dropped."""
        if not self.active:
            yield
            return
        from torch.utils.tensorboard import SummaryWriter

        self.rows = [row for row in read_metrics(self.folder / "metrics.jsonl") if row["step"] <= step]
        write_metrics(self.rows, self.folder)
        with contextlib.ExitStack() as stack:
            self._json = stack.enter_context((self.folder / "metrics.jsonl").open("a"))
            file = stack.enter_context((self.folder / "metrics.csv").open("a", newline=""))
            self._table = csv.DictWriter(file, FIELDS, extrasaction="ignore")
            self._flush = (self._json.flush, file.flush)
            self._tensorboard = stack.enter_context(
                SummaryWriter(self.folder / "tensorboard", purge_step=step + 1 if step else None)
            )
            if self._tracker is not None:
                options = {"project": "tnl", "name": self.folder.name, "config": dataclasses.asdict(self.settings)}
                self._tracker.init(**options)
                stack.callback(self._tracker.finish)
            if self.console.is_terminal:
                columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
                self._progress = stack.enter_context(Progress(*columns, console=self.console))
                self._task = self._progress.add_task("", total=self.steps, completed=step)
            yield
        self._progress = None

    def log(self, row: dict[str, Any]) -> None:
        """Record the metrics of a step (`step` and any of FIELDS)."""
        if not self.active:
            return
        row = {
            n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()
        }  # as JSON has it
        self.rows.append(row)
        self._json.write(json.dumps(row) + "\n")
        self._table.writerow(row)
        for flush in self._flush:
            flush()
        for name, value in row.items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(name, value, row["step"])
        if self._tracker is not None:
            self._tracker.log({n: v for n, v in row.items() if n != "step" and v is not None}, step=row["step"])
        line = " ".join(f"{label} {row[name]:{form}}" for name, label, form in LINE if row.get(name) is not None)
        if self._progress is None:
            self.console.print(f"step {row['step']} {line}", highlight=False)
        else:
            self._progress.update(self._task, description=line)

    def advance(self, step: int) -> None:
        """Move the progress bar to a finished step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def say(self, message: str) -> None:
        """Print one line."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def draw(self, seconds_apart: float = 0.0) -> None:
        """Write the plot of the training so far, unless the last one was written less than so many seconds ago."""
        now = time.monotonic()
        if self.active and self.rows and now - self._drawn >= seconds_apart:
            draw_training(self.rows, self.folder / "training.png")
            self._drawn = now


# name, label, format: what a line on the terminal shows
LINE = (
    ("loss", "loss", ".4f"),
    ("held_out_loss", "held out", ".4f"),
    ("learning_rate", "rate", ".2e"),
    ("gradient_norm", "gradient", ".3f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("model_flops_use", "of the FLOPs", ".1%"),
)


def load_tracker(name: str) -> Any:
    """The module of Weights & Biases or trackio, which have the same functions; None for `none`.

    Raises:
        ValueError: The package is not installed.
    """
    if name == "none":
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"tracker: expected a package that is installed, got {name!r}; pip install {name}") from None


def read_metrics(path: Path) -> Iterable[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that was cut off is left out."""
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def write_metrics(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write metrics.jsonl and metrics.csv anew; the old ones are there until the new ones are complete."""
    names = ("metrics.jsonl", "metrics.csv")
    unfinished = [folder / f".unfinished-{name}" for name in names]
    unfinished[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    with unfinished[1].open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    for path, name in zip(unfinished, names, strict=True):
        path.replace(folder / name)


def draw_training(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, learning rate and gradient norm over the tokens seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))

    def curve(name: str) -> tuple[list[float], list[float]]:
        chosen = [row for row in rows if row.get(name) is not None]
        return [row["tokens"] for row in chosen], [row[name] for row in chosen]

    upper.plot(*curve("loss"), label="training", linewidth=1)
    if curve("held_out_loss")[0]:
        upper.plot(*curve("held_out_loss"), label="held out", marker="o", markersize=4)
    upper.set_ylabel("loss [nats per token]")
    upper.legend()
    upper.grid(alpha=0.3)
    lower.plot(*curve("learning_rate"), color="tab:green", linewidth=1)
    lower.set_ylabel("learning rate", color="tab:green")
    norm = lower.twinx()
    norm.plot(*curve("gradient_norm"), color="tab:grey", linewidth=0.7)
    norm.set_ylabel("gradient norm", color="tab:grey")
    lower.set_xlabel("tokens")
    lower.grid(alpha=0.3)
    unfinished = path.with_name(f".unfinished-{path.name}")
    FigureCanvasAgg(figure).print_png(str(unfinished))
    unfinished.replace(path)


def memory_gib(device_type: str) -> float:
    """Most memory this process has used so far, in GiB: of the GPU, or of the process."""
    import resource

    import torch

    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
