"""Compress a TNL trained on the novels, by structure search and by its rivals: `python -m benchmarks.compression`.

Trains the model where the work folder has none, then gives each GPU cases until all are done or the seconds are over.
Rows are written to the output folder as they are known; cases whose rows are in the work folder are not repeated.
`python -m benchmarks.compression plot` draws what the output folder holds.
"""

import argparse
import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import REPOSITORY, RESULTS, SHARED_DATA
from benchmarks.compression.cases import CASES, ORIGINAL, SCALES, SEARCH, Case, Scale

if TYPE_CHECKING:
    from benchmarks.compression.worker import Place

POLL_SECONDS = 1.0
ACTIONS = ("compress", "heal")
SPEED_COLUMNS = ("tokens_per_second", "decoded_tokens_per_second", "memory_gib", "compiled_tokens_per_second")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("action", nargs="?", choices=["run", "plot", *ACTIONS, "speed"], default="run")
    parser.add_argument("--scale", choices=list(SCALES), default="gpu")
    parser.add_argument("--work", type=Path, required=False, default=REPOSITORY / "runs" / "compression")
    parser.add_argument("--output", type=Path, default=RESULTS / "compression")
    parser.add_argument("--gpus", default="0", help="numbers of GPUs, with commas")
    parser.add_argument("--slots", type=int, default=1, help="processes at the same time on each GPU")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--speed_seconds", type=float, default=75.0, help="of them kept for measuring speed at the end")
    parser.add_argument("--methods", help="names of methods, with semicolons; all by default")
    parser.add_argument("--budgets", help="shares, with commas; all by default")
    parser.add_argument("--case", type=int, help="for `compress` and `heal`: number of the case")
    parser.add_argument("--part", default="0/1", help="for `speed`: which part of the cases, of how many")
    options = parser.parse_args()
    scale = SCALES[options.scale]
    if options.action == "plot":
        from benchmarks.compression.plots import draw

        draw(options.output)
    elif options.action in ACTIONS:
        from benchmarks.compression import worker

        run_action = worker.compress_case if options.action == "compress" else worker.heal_case
        run_action(CASES[options.case], scale, place_of(options.work))
    elif options.action == "speed":
        from benchmarks.compression.worker import measure_speed

        part, parts = options.part.split("/")
        measure_speed(CASES[int(part) :: int(parts)], scale, place_of(options.work))
    else:
        run(options, scale)


def run(options: argparse.Namespace, scale: Scale) -> None:
    """Train, then hand out the cases."""
    deadline = time.monotonic() + options.seconds
    options.work.mkdir(parents=True, exist_ok=True)
    gpus = options.gpus.split(",")
    train(options.work, scale, gpus[0])
    work_through(options, gpus, deadline - options.speed_seconds)
    # Alone on each GPU, when all else is over.
    place = ["--scale", options.scale, "--work", str(options.work)]
    processes = [
        launch(["speed", *place, "--part", f"{part}/{len(gpus)}"], options.work / "logs" / f"speed-{part}.txt", gpu)
        for part, gpu in enumerate(gpus)
    ]
    for process in processes:
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            print("speed: out of time", flush=True)
        finally:
            stop(process)
    write_table(options)


def work_through(options: argparse.Namespace, gpus: list[str], until: float) -> None:
    """Run the tasks of all cases in their order, each as soon as a slot is free for it.

    Fits wait for many small results, which takes long beside training on the same GPU. Of several GPUs the first half
    compresses, and heals when there is nothing more to compress; on the others one slot is kept for healing, and the
    rest compress while no case is ready to be healed.
    """
    waiting = [task for case in CASES if is_wanted(case, options) for task in tasks_of(case)]
    slots = [(gpu, slot) for slot in range(options.slots) for gpu in gpus]
    healing = set(gpus[(len(gpus) + 1) // 2 :])
    running: dict[tuple[str, int], tuple[subprocess.Popen[bytes], Task]] = {}
    try:
        while (waiting or running) and time.monotonic() < until:
            waiting = [task for task in waiting if not task.row(options.work).exists()]
            for slot in slots:
                if slot in running and running[slot][0].poll() is not None:
                    process, task = running.pop(slot)
                    print(f"{task.action} {task.case.name}: exit code {process.returncode}", flush=True)
                if slot not in running:
                    ready = [task for task in waiting if task.is_ready(options.work)]
                    following = next_task(ready, slot, healing)
                    if following is not None:
                        waiting.remove(following)
                        running[slot] = start(following, options, slot[0]), following
            write_table(options)
            if not running:  # what is left waits for cases that failed
                break
            time.sleep(POLL_SECONDS)
    finally:
        for process, task in running.values():
            stop(process)
            print(f"{task.action} {task.case.name}: out of time", flush=True)
    write_table(options)


def next_task(ready: list["Task"], slot: tuple[str, int], healing: set[str]) -> "Task | None":
    """The task for a slot `(gpu, number)`; see :func:`work_through`."""
    gpu, number = slot
    order = list(ready)
    if gpu in healing:
        order.sort(key=lambda task: task.action == "compress")
        if number == 0:
            order = [task for task in order if task.action == "heal"]
    elif healing:
        order.sort(key=lambda task: task.action == "heal")
    return next(iter(order), None)


@dataclass(frozen=True)
class Task:
    """What one process does: `compress` a case, or `heal` it when that is done."""

    action: str
    case: Case

    def row(self, work: Path) -> Path:
        """The file that it writes."""
        return work / "rows" / f"{self.case.name}.{ACTIONS.index(self.action)}.json"

    def is_ready(self, work: Path) -> bool:
        """Whether what it needs is there."""
        return self.action == "compress" or Task("compress", self.case).row(work).exists()


def tasks_of(case: Case) -> list[Task]:
    """What is to be done for a case."""
    return [Task(action, case) for action in ACTIONS if case.healed or action == "compress"]


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


def start(task: Task, options: argparse.Namespace, gpu: str) -> "subprocess.Popen[bytes]":
    """A process for one task."""
    arguments = [task.action, "--scale", options.scale, "--work", str(options.work)]
    log = options.work / "logs" / f"{task.case.name}-{task.action}.txt"
    return launch([*arguments, "--case", str(CASES.index(task.case))], log, gpu)


def launch(arguments: list[str], log: Path, gpu: str) -> "subprocess.Popen[bytes]":
    """This benchmark with other arguments, its output in a file, in a process group of its own."""
    log.parent.mkdir(exist_ok=True)
    call = [sys.executable, "-m", "benchmarks.compression", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(
            call, stdout=file, stderr=subprocess.STDOUT, env=environment(gpu), start_new_session=True
        )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def place_of(work: Path) -> "Place":
    """Folders of a case."""
    from benchmarks.compression.worker import Place

    novels = SHARED_DATA / "novels"
    return Place(work / "original", work / "text", [f"{novels}/train/*.xz"], [f"{novels}/validation/*.xz"], work)


def is_wanted(case: Case, options: argparse.Namespace) -> bool:
    """Whether a case was asked for; the original always is, since all is compared with it."""
    if case.method == ORIGINAL:
        return True
    methods = options.methods.split(";") if options.methods else None
    budgets = [float(budget) for budget in options.budgets.split(",")] if options.budgets else None
    return (methods is None or case.method in methods) and (budgets is None or case.budget in budgets)


def write_table(options: argparse.Namespace) -> None:
    """All rows that are known, as `SCALE.csv` in the output folder, and what the first search found."""
    folder, rows = options.work / "rows", []
    for case in CASES:
        speed = dict.fromkeys(SPEED_COLUMNS) | read(folder / f"{case.name}.speed.json")
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
    searched = next(case for case in CASES if case.method == SEARCH)
    found = options.work / "cases" / searched.name / "structures.csv"
    if found.exists():
        shutil.copy(found, options.output / f"structures-{options.scale}.csv")


def read(path: Path) -> dict[str, object]:
    """A row, empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
