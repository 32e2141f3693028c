"""A CSV that grows by a row as each case is measured; a run that was stopped goes on where it was."""

import argparse
import csv
import gc
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.operator.__main__ import machine

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, output: Path) -> None:
    """The options that all measurements have."""
    parser.add_argument("--output", type=Path, default=output, help="CSV to write; cases that it has are left out")
    parser.add_argument("--seconds", type=float, default=480, help="begin no case after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU; the numbers mean nothing")
    parser.add_argument("--plot", type=Path, help="only draw the CSV, into this file")


class Measurements:
    """The rows of a CSV; `keys` tell cases apart. Each row names device and versions."""

    def __init__(self, options: argparse.Namespace, keys: tuple[str, ...]) -> None:
        self.path, self.keys, self.seconds = options.output, keys, options.seconds
        self.started = time.perf_counter()
        self.about = {name: value for name, value in machine().items() if name in ("device", "torch", "triton")}
        self.rows: list[Row] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def wanted(self, case: Row) -> bool:
        """Whether a case has no row from this device and there is time to measure it."""
        key = {name: str(case[name]) for name in self.keys} | {"device": self.about["device"]}
        return self.elapsed < self.seconds and not any(
            all(str(row.get(name)) == value for name, value in key.items()) for row in self.rows
        )

    def add(self, row: Row) -> None:
        """Write a row, and print it."""
        self.rows.append(row | self.about)
        columns = list(dict.fromkeys(name for each in self.rows for name in each))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        unfinished.replace(self.path)
        shown = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        print(f"{self.elapsed:6.0f} s  " + "  ".join(shown), flush=True)


def free_memory() -> None:
    """Return what no tensor holds to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Most device memory that tensors took since `free_memory`, in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


class Clock:
    """Times calls: by events on a GPU, by the processor's clock elsewhere."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()

    def milliseconds(self, call: Any) -> float:
        """Time of one call, device work included."""
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event)
