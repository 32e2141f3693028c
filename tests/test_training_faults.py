"""kill -9 at random moments and SIGTERM, on real processes. Tier T0.

The script below imports the package once and forks each attempt, so that twenty of them take seconds.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 20

ATTEMPTS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch, torch.utils.tensorboard, matplotlib.figure, matplotlib.backends.backend_agg, torchdata.stateful_dataloader
from tnl.training.config import DataSettings, ModelSettings, OptimizerSettings, TrainSettings
from tnl.training.loop import train

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "dropout": 0.1}


def settings(output, **changes):
    return TrainSettings(
        output=str(folder / output), model=ModelSettings("tiny", sizes),
        data=DataSettings(train=str(folder / "text"), held_out_fraction=0.2),
        optimizer=OptimizerSettings(learning_rate=3e-3, warmup_steps=5), sequence_length=32, batch_size=4,
        steps=24, log_every=1, checkpoint_every=3, device="cpu", resume=True,
    )


def start(output):
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    try:
        train(settings(output))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


started = time.monotonic()
assert end(start("undisturbed")) == 0
whole_run = time.monotonic() - started
checkpoints = folder / "killed" / "checkpoints"
killed, while_writing, finished = 0, 0, 0
while killed < kills:
    child = start("killed")
    time.sleep(random.uniform(0.1, 0.6) * whole_run)
    os.kill(child, signal.SIGKILL)
    status = end(child)
    assert status in (0, -signal.SIGKILL), status
    if status == 0:
        finished += 1
        for path in sorted(checkpoints.glob("step-*")):  # back to the beginning, so that all kills count
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        continue
    killed += 1
    while_writing += any(checkpoints.glob(".unfinished-*"))
assert end(start("killed")) == 0

child = start("terminated")
while not any((folder / "terminated" / "checkpoints").glob("step-*")):
    time.sleep(0.01)
sent = time.monotonic()
os.kill(child, signal.SIGTERM)
status = end(child)
print(json.dumps({"while_writing": while_writing, "finished": finished, "status": status,
                  "seconds": time.monotonic() - sent}))
"""


@pytest.mark.slow
def test_killed_and_terminated_runs_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(24):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(f"Document {i}: " + f"{i} is {i * i} squared. " * (1 + i % 5))
    command = [sys.executable, "-c", ATTEMPTS, str(tmp_path), str(KILLS)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["status"] == 0
    assert result["seconds"] < 60
    assert not (tmp_path / "terminated" / "model").exists()
    newest = max((tmp_path / "terminated" / "checkpoints").iterdir())
    logged = (tmp_path / "terminated" / "metrics.jsonl").read_text().splitlines()
    assert newest.name == f"step-{len(logged):08d}"

    def losses(run: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    expected = losses("undisturbed")
    assert len(expected) == 24
    assert losses("killed") == expected
    assert losses("terminated") == expected[: len(logged)]
    weights = "model/model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "undisturbed" / weights).read_bytes()
    print(result)
