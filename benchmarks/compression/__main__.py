"""Compress a TNL trained on the novels, by structure search and by its rivals: `python -m benchmarks.compression`.

Trains the model where the work folder has none, then gives each GPU cases until all are done or the seconds are over.
Rows are written to the output folder as they are known; cases whose rows are in the work folder are not repeated.
`python -m benchmarks.compression plot` draws what the output folder holds.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import REPOSITORY, RESULTS, SHARED_DATA
from benchmarks.compression.cases import CASES, SCALES, Case, Scale

if TYPE_CHECKING:
    from benchmarks.compression.worker import Place

POLL_SECONDS = 1.0
SPEED_SECONDS = 75.0  # kept for measuring speed at the end
SPEED_COLUMNS = ("tokens_per_second", "decoded_tokens_per_second", "memory_gib")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("action", nargs="?", choices=["run", "plot", "case", "speed"], default="run")
    parser.add_argument("--scale", choices=list(SCALES), default="gpu")
    parser.add_argument("--work", type=Path, required=False, default=REPOSITORY / "runs" / "compression")
    parser.add_argument("--output", type=Path, default=RESULTS / "compression")
    parser.add_argument("--gpus", default="0", help="numbers of GPUs, with commas")
    parser.add_argument("--slots", type=int, default=1, help="cases at the same time on each GPU")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--methods", help="names of methods, with semicolons; all by default")
    parser.add_argument("--budgets", help="shares, with commas; all by default")
    parser.add_argument("--case", type=int, help="for `case`: its number")
    options = parser.parse_args()
    scale = SCALES[options.scale]
    if options.action == "plot":
        from benchmarks.compression.plots import draw

        draw(options.output)
    elif options.action == "case":
        from benchmarks.compression.worker import run_case

        run_case(CASES[options.case], scale, place_of(options.work))
    elif options.action == "speed":
        from benchmarks.compression.worker import measure_speed

        measure_speed(CASES, scale, place_of(options.work))
    else:
        run(options, scale)


def run(options: argparse.Namespace, scale: Scale) -> None:
    """Train, then hand out the cases."""
    deadline = time.monotonic() + options.seconds
    options.work.mkdir(parents=True, exist_ok=True)
    gpus = options.gpus.split(",")
    train(options.work, scale, gpus[0])
    waiting = [case for case in CASES if is_wanted(case, options) and not is_done(case, options.work)]
    slots = [f"{gpu}.{slot}" for slot in range(options.slots) for gpu in gpus]
    running: dict[str, tuple[subprocess.Popen[bytes], Case]] = {}
    while (waiting or running) and time.monotonic() < deadline - SPEED_SECONDS:
        for slot in slots:
            if slot in running and running[slot][0].poll() is not None:
                process, case = running.pop(slot)
                print(f"{case.name}: exit code {process.returncode}", flush=True)
            if slot not in running and waiting:
                case = waiting.pop(0)
                running[slot] = start(case, options, slot.partition(".")[0]), case
        write_table(options)
        time.sleep(POLL_SECONDS)
    for process, case in running.values():
        process.kill()
        process.wait()
        print(f"{case.name}: out of time", flush=True)
    write_table(options)
    # Alone on the GPU, when all else is over.
    place = ["--scale", options.scale, "--work", str(options.work)]
    try:
        left = max(1.0, deadline - time.monotonic())
        command("benchmarks.compression", "speed", *place, gpu=gpus[0], timeout=left)
    except subprocess.TimeoutExpired:
        print("speed: out of time", flush=True)
    write_table(options)


def train(work: Path, scale: Scale, gpu: str) -> None:
    """Prepare the text and train the original by the ordinary commands."""
    if not (work / "text" / "prepared.json").exists():
        command("tnl", "prepare", str(work / "text"), f"{SHARED_DATA}/novels/train/*.xz", "--held_out_fraction", "0",
                gpu=gpu)  # fmt: skip
    if (work / "original" / "model").is_dir():
        return
    command(
        "tnl", "train", "--output", str(work / "original"), "--data.train", str(work / "text"),
        "--model.overrides", json.dumps(scale.model), "--sequence_length", str(scale.sequence_length),
        "--batch_size", str(scale.batch_size), "--steps", str(scale.steps), "--log_every", "50",
        "--optimizer.learning_rate", str(scale.learning_rate), "--parallel.precision", scale.precision,
        "--parallel.compile", str(scale.precision == "bfloat16").lower(), "--checkpoint_every", "0",
        "--optimizer.warmup_steps", str(max(1, scale.steps // 25)), gpu=gpu,
    )  # fmt: skip


def environment(gpu: str) -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": gpu}


def command(*arguments: str, gpu: str, timeout: float | None = None) -> None:
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", *arguments], check=True, env=environment(gpu), timeout=timeout)
    print(f"{arguments[1]}: {time.monotonic() - started:.0f} s", flush=True)


def start(case: Case, options: argparse.Namespace, gpu: str) -> "subprocess.Popen[bytes]":
    """A process for one case, with its log beside its folder."""
    (options.work / "logs").mkdir(exist_ok=True)
    log = (options.work / "logs" / f"{case.name}.txt").open("wb")
    arguments = ["case", "--scale", options.scale, "--work", str(options.work), "--case", str(CASES.index(case))]
    call = [sys.executable, "-m", "benchmarks.compression", *arguments]
    return subprocess.Popen(call, stdout=log, stderr=subprocess.STDOUT, env=environment(gpu))


def place_of(work: Path) -> "Place":
    """Folders of a case."""
    from benchmarks.compression.worker import Place

    novels = SHARED_DATA / "novels"
    return Place(work / "original", work / "text", [f"{novels}/train/*.xz"], [f"{novels}/validation/*.xz"], work)


def is_wanted(case: Case, options: argparse.Namespace) -> bool:
    methods = options.methods.split(";") if options.methods else None
    budgets = [float(budget) for budget in options.budgets.split(",")] if options.budgets else None
    return (methods is None or case.method in methods) and (budgets is None or case.budget in budgets)


def is_done(case: Case, work: Path) -> bool:
    return (work / "rows" / f"{case.name}.1.json").exists()


def write_table(options: argparse.Namespace) -> None:
    """All rows that are known, as `SCALE.csv` in the output folder."""
    folder, rows = options.work / "rows", []
    for case in CASES:
        speed = read(folder / f"{case.name}.speed.json") or dict.fromkeys(SPEED_COLUMNS)
        rows += [row | speed for healed in (0, 1) if (row := read(folder / f"{case.name}.{healed}.json"))]
    if not rows:
        return
    path = options.output / f"{options.scale}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def read(path: Path) -> dict[str, object]:
    """A row, empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
