"""Training runs: what one is, and the runner that gives each of a list to a GPU and collects what they found.

A run is a process of its own (:mod:`benchmarks.language_modelling.worker`) with a folder of its own. The tables are
made from the folders, again and again while runs go on, so that nothing is lost when time is up. Rows of runs whose
folder is not there (they ran elsewhere) stay in the tables, and those runs are not repeated.
"""

import argparse
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import REPOSITORY, RESULTS
from benchmarks.language_modelling.corpus import write_corpus

Row = dict[str, Any]
CONSOLE = Console(stderr=True)
RESULT_FOLDER = RESULTS / "language_modelling"
TINY: dict[str, Any] = {"size": "tiny", "context": 64, "step_tokens": 256, "steps": 6, "contexts": (32, 64)}
TINY_BYTES = 6000
POLL_SECONDS = 1.0
SLOWER = 0.3  # by this share, for each slot more that a GPU has
SLOTS = {"45m": 2}  # that a run of this size takes on a GPU; one for all others
GRACE_SECONDS = 10  # before the end, in which a stopped run may write its checkpoint


@dataclass(frozen=True)
class Run:
    """One model, trained and evaluated.

    Attributes:
        name: Unique; names the row.
        model: See `models.overrides_of`.
        size: One of `models.SIZES`.
        changes: Fields of the model's configuration that differ.
        corpus: See `corpus.write_corpus`.
        tokenizer: `bytes` or `bpe`.
        context: Tokens of a row.
        step_tokens: Tokens of an optimiser step.
        steps: Optimiser steps.
        optimizer: Fields of `OptimizerSettings` that differ.
        seed: Seed of weights and order.
        contexts: Contexts to evaluate at.
        curve_points: Looks at the validation text during training.
        seconds: About how long it takes on one H100, evaluation included.
    """

    name: str
    model: str
    size: str = "45m"
    changes: dict[str, Any] = field(default_factory=dict)
    corpus: str = "novels"
    tokenizer: str = "bytes"
    context: int = 2048
    step_tokens: int = 65536
    steps: int = 2400
    optimizer: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    contexts: tuple[int, ...] = (512, 2048, 8192)
    curve_points: int = 12
    seconds: int = 240

    @property
    def slots(self) -> int:
        """Slots of a GPU that it takes where several runs share one."""
        return SLOTS.get(self.size, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that all experiments with training runs have."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs to make; all where none is named")
    parser.add_argument("--gpus", default="", help="GPUs to use, such as 0,1,2; all by default")
    parser.add_argument("--slots", type=int, default=1,
                        help="runs at a time on each GPU, a large one counted as 2; they slow each other")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0, help="stop after this time; 0: when all is done")
    parser.add_argument("--output", type=Path, default=RESULT_FOLDER, help="folder for the tables")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "language_modelling",
                        help="folder for data and runs, which can be made again")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="tiny models and texts; the numbers mean nothing")
    parser.add_argument("--list", action="store_true", help="only list the runs")
    parser.add_argument("--plot", action="store_true", help="only draw what the tables hold")


def execute(experiment: str, runs: list[Run], options: argparse.Namespace) -> None:
    """Make the runs of an experiment that have no row yet, the first ones first."""
    chosen = choose({run.name: run for run in runs}, options)
    if options.list:
        show(chosen)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    tables = Tables(experiment, options.output, options.work)
    make([(tables, run) for run in chosen.values()], options)


def make(plan: list[tuple["Tables", Run]], options: argparse.Namespace) -> None:
    """Make the runs that have no row yet, of one experiment or several, and say which are missing at the end."""
    finished = {tables: tables.finished() for tables, _ in plan}
    waiting = [(tables, run) for tables, run in plan if run.name not in finished[tables]]
    if waiting:
        Queue(waiting, options).work()
    finished = {tables: tables.finished() for tables, _ in plan}
    missing = [run.name for tables, run in plan if run.name not in finished[tables]]
    CONSOLE.print(f"{len(plan) - len(missing)} of {len(plan)} runs are in {options.output}", highlight=False)
    if missing:
        CONSOLE.print(f"not made: {' '.join(missing)}", highlight=False, soft_wrap=True)


def choose(known: dict[str, Run], options: argparse.Namespace) -> dict[str, Run]:
    """The runs that were named, in that order, of a size to try out with `--tiny`.

    Raises:
        SystemExit: An unknown name.
    """
    unknown = [name for name in options.runs if name not in known]
    if unknown:
        CONSOLE.print(f"unknown run {', '.join(unknown)}; expected some of {', '.join(known)}", highlight=False)
        sys.exit(2)
    chosen = {name: known[name] for name in options.runs or known}
    if options.tiny:
        return {name: dataclasses.replace(run, **_tiny(run)) for name, run in chosen.items()}
    return chosen


def _tiny(run: Run) -> dict[str, Any]:
    return TINY | {"changes": _shrink(run.changes), "curve_points": 2}


def _shrink(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes that fit a model of two layers and two heads."""
    kept = {name: value for name, value in changes.items() if name not in ("num_attention_heads", "intermediate_size")}
    if "layer_types" in kept:
        kept["layer_types"] = ["linear_attention", "full_attention"]
    return kept


def show(runs: dict[str, Run]) -> None:
    """Print what would be run."""
    table = Table("run", "model", "size", "corpus", "tokenizer", "context", "steps", "changes", "seconds")
    table.columns[0].no_wrap = True
    for name, run in runs.items():
        changes = " ".join(f"{field}={value}" for field, value in (run.changes | run.optimizer).items())
        values = (run.model, run.size, run.corpus, run.tokenizer, run.context, run.steps, changes, run.seconds)
        table.add_row(name, *map(str, values))
    Console().print(table)


class Tables:
    """The tables of an experiment: a row a run, learning curves, bits per byte by position."""

    def __init__(self, experiment: str, output: Path, work: Path) -> None:
        self.work = work / experiment
        self.paths = {
            "runs": output / f"{experiment}.csv",
            "curves": output / f"{experiment}-curves.csv",
            "positions": output / f"{experiment}-positions.csv",
        }
        self._written = ""

    def finished(self) -> set[str]:
        """Names of the runs that have a row."""
        return {row["run"] for row in read_rows(self.paths["runs"])}

    def collect(self) -> None:
        """Take over what the runs' folders hold by now."""
        found: dict[str, dict[str, list[Row]]] = {name: {} for name in self.paths}
        for folder in sorted(self.work.glob("*/run.json")):
            name = folder.parent.name
            result = read_json(folder.parent / "result.json")
            found["curves"][name] = read_curve(name, folder.parent)
            if result is not None:
                found["runs"][name] = [result["row"]]
                found["positions"][name] = result["positions"]
        state = json.dumps(found)
        if state == self._written:
            return
        self._written = state
        for table, path in self.paths.items():
            new = {name: rows for name, rows in found[table].items() if rows}
            kept = [row for row in read_rows(path) if row["run"] not in new]
            rows = kept + [row for rows in new.values() for row in rows]
            if rows:
                write_rows(path, rows)


class Queue:
    """Runs that wait for a place on a GPU, and those that have one."""

    def __init__(self, waiting: list[tuple[Tables, Run]], options: argparse.Namespace) -> None:
        self.waiting, self.options = list(waiting), options
        self.tables = list(dict.fromkeys(tables for tables, _ in waiting))
        gpus = [gpu for gpu in options.gpus.split(",") if gpu]
        if not gpus and torch.cuda.is_available():
            gpus = [str(i) for i in range(torch.cuda.device_count())]
        self.free = dict.fromkeys(gpus or [""], options.slots)
        self.running: list[Running] = []
        self.deadline = time.monotonic() + options.seconds if options.seconds else float("inf")

    def work(self) -> None:
        """Until all runs are through or the time is up."""
        try:
            while (self.waiting or self.running) and time.monotonic() < self.deadline - GRACE_SECONDS:
                self._start_what_fits()
                if not self.running:
                    break  # nothing fits into the time left
                time.sleep(POLL_SECONDS)
                self._see_what_ended()
                self._collect()
        finally:
            self._stop()
            self._collect()

    def _collect(self) -> None:
        for tables in self.tables:
            tables.collect()

    def _start_what_fits(self) -> None:
        for gpu in self.free:
            while self.free[gpu] and (
                fitting := next(filter(lambda each: self._fits(each[1], gpu), self.waiting), None)
            ):
                self.waiting.remove(fitting)
                self._start(*fitting, gpu)

    def _fits(self, run: Run, gpu: str) -> bool:
        slots = min(run.slots, self.options.slots)
        left = self.deadline - time.monotonic() - GRACE_SECONDS
        expected = run.seconds * (1 + SLOWER * (self.options.slots - slots))
        return slots <= self.free[gpu] and (self.options.tiny or expected <= left)

    def _start(self, tables: Tables, run: Run, gpu: str) -> None:
        folder = tables.work / run.name
        folder.mkdir(parents=True, exist_ok=True)
        most = TINY_BYTES if self.options.tiny else None
        write_corpus(run.corpus, self.options.work, run.tokenizer == "bpe", most)
        slots = min(run.slots, self.options.slots)
        about = {"work": str(self.options.work.resolve()), "most": most, "side_by_side": 1 + self.options.slots - slots}
        request = dataclasses.asdict(run) | about
        (folder / "run.json").write_text(json.dumps(request, indent=1) + "\n")
        CONSOLE.print(f"{time.strftime('%H:%M:%S')} {run.name} starts on {gpu or 'the CPU'}", highlight=False)
        environment = dict(os.environ)
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", "benchmarks.language_modelling.worker", str(folder)]
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        self.free[gpu] -= slots
        self.running.append(Running(run.name, folder, gpu, slots, process))

    def _see_what_ended(self) -> None:
        for each in [each for each in self.running if each.process.poll() is not None]:
            self.running.remove(each)
            self.free[each.gpu] += each.slots
            result = read_json(each.folder / "result.json")
            if result is None:
                log = (each.folder / "log.txt").read_text(errors="replace").splitlines()
                last = " | ".join(log[-3:])[-600:]
                CONSOLE.print(
                    f"{each.name} ended with code {each.process.returncode}: {last}", highlight=False, markup=False
                )
                continue
            row = result["row"]
            scores = " ".join(f"{key} {value:.4f}" for key, value in row.items() if key.startswith("validation_"))
            CONSOLE.print(f"{time.strftime('%H:%M:%S')} {each.name} {scores}", highlight=False)

    def _stop(self) -> None:
        for each in self.running:
            each.process.send_signal(signal.SIGTERM)  # the step ends, a checkpoint is written
        end = time.monotonic() + GRACE_SECONDS
        for each in self.running:
            try:
                each.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.process.kill()


@dataclass
class Running:
    """A run's process, and the slots of a GPU that it has."""

    name: str
    folder: Path
    gpu: str
    slots: int
    process: subprocess.Popen[bytes]


def read_json(path: Path) -> Any:
    """Content of a JSON file, None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def read_curve(name: str, folder: Path) -> list[Row]:
    """The learning curve of a run from its metrics, in nats per token."""
    path = folder / "train" / "metrics.csv"
    rows = read_rows(path)
    names = ("step", "tokens", "seconds", "tokens_per_second", "loss", "held_out_loss", "skipped_steps")
    return [{"run": name} | {key: row[key] for key in names} for row in rows if row.get("step")]


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[Row]) -> None:
    """Replace a CSV by these rows."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)
