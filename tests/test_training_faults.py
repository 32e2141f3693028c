"""kill -9 at random moments and SIGTERM, on real processes, forked from one that has imported the package. Tier T0."""

import dataclasses
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_alone
from tnl.training import loop
from tnl.training.config import DataSettings, ModelSettings, OptimizerSettings, TrainSettings

KILLS = 20
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "dropout": 0.1}


def settings_for(folder: Path, output: str) -> TrainSettings:
    return TrainSettings(
        output=str(folder / output),
        model=ModelSettings("tiny", SIZES),
        data=DataSettings(train=str(folder / "text"), held_out_fraction=0.2),
        # Constant, so that losses do not depend on the number of steps.
        optimizer=OptimizerSettings(learning_rate=3e-3, warmup_steps=2, schedule="constant"),
        sequence_length=32,
        batch_size=4,
        steps=12,
        log_every=1,
        checkpoint_every=2,
        device="cpu",
        resume=True,
    )


def watch_calls(deadly: dict[str, int]) -> dict[str, int]:
    """Count the calls of functions in the main thread and in those that write checkpoints, in what is returned.

    At the call of a `deadly` number the process is killed, a moment that does not depend on how busy the machine is.
    """
    counted = {"main": 0, "writing": 0}

    def counter(thread: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counted[thread] += 1
            if counted[thread] == deadly.get(thread):
                os.kill(os.getpid(), signal.SIGKILL)

        return count

    def begin_thread(*_: Any) -> None:
        writes = not type(threading.current_thread()).__module__.startswith("tensorboard")
        sys.settrace(counter("writing") if writes else None)

    threading.settrace(begin_thread)
    sys.settrace(counter("main"))
    return counted


def start(settings: TrainSettings, **deadly: int) -> int:
    """Train in a process of its own, killed at a `deadly` call of a thread; returns its number."""
    if child := os.fork():
        return child
    try:
        torch.set_num_threads(1)
        counted = watch_calls(deadly)
        loop.train(settings)
        sys.settrace(None)
        Path(settings.output, "calls.json").write_text(json.dumps(counted))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_again_and_again(folder: Path) -> None:
    """Half of the kills at a call of the main thread, half of them at one of those that write checkpoints."""
    draw = random.Random(0)
    assert end(start(settings_for(folder, "undisturbed"))) == 0
    calls = json.loads((folder / "undisturbed" / "calls.json").read_text())
    again = settings_for(folder, "killed")
    killed, while_writing, whole = 0, 0, 0
    while killed < KILLS:
        thread = ("main", "writing")[killed % 2]
        status = end(start(again, **{thread: draw.randrange(1, calls[thread] // 2)}))
        assert status in (0, -signal.SIGKILL)
        checkpoints = folder / "killed" / "checkpoints"
        killed += status != 0
        while_writing += status != 0 and any(checkpoints.glob(".unfinished-*"))
        if status == 0:  # back to the beginning, so that all kills count
            whole += 1
            for path in checkpoints.glob("step-*"):
                path.rename(folder / f"{path.name}-{whole}")
    assert end(start(again)) == 0
    print(f"{calls} calls, {whole} runs whole, {while_writing} of {KILLS} kills while writing", file=sys.stderr)
    assert while_writing >= KILLS // 4


def terminate(folder: Path) -> None:
    endless = dataclasses.replace(settings_for(folder, "terminated"), steps=10**9)
    child = start(endless)
    while not any((folder / "terminated" / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    sent = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert end(child) == 0
    assert time.monotonic() - sent < 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults")
    (path / "text").mkdir()
    for i in range(24):
        (path / "text" / f"{i:02d}.txt").write_text(f"Document {i}: " + f"{i} is {i * i} squared. " * (1 + i % 5))
    return path


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_killed_and_terminated_runs_lose_nothing(folder: Path) -> None:
    run_alone(kill_again_and_again, folder)
    expected = losses(folder / "undisturbed")
    assert len(expected) == 12
    assert losses(folder / "killed") == expected
    weights = "model/model.safetensors"
    assert (folder / "killed" / weights).read_bytes() == (folder / "undisturbed" / weights).read_bytes()

    run_alone(terminate, folder)
    assert not (folder / "terminated" / "model").exists()
    logged = losses(folder / "terminated")
    assert max(path.name for path in (folder / "terminated" / "checkpoints").iterdir()) == f"step-{len(logged):08d}"
    shared = min(len(logged), len(expected))
    assert logged[:shared] == expected[:shared]
