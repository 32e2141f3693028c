"""Several processes train what one does, and go on from each other's checkpoints. Tier T2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM

from tests.ranks import run_alone, run_torchrun
from tnl.cli import main, parse
from tnl.models import TnlConfig, TnlForCausalLM
from tnl.training.config import ParallelSettings
from tnl.training.loop import train
from tnl.training.parallel import Ranks, autocast, lay_out

CONFIG: dict[str, Any] = {
    "model": {
        "name": "tiny",
        "overrides": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
        },
    },
    "data": {"held_out_fraction": 0.2},
    # Sums in another order change gradients here by 1e-10 to 1e-7; with a small epsilon AdamW turns that rounding of a
    # gradient next to zero into a step.
    "optimizer": {"learning_rate": 3e-4, "warmup_steps": 2, "epsilon": 1e-3},
    "sequence_length": 32,
    "batch_size": 8,
    "micro_batch_size": 2,
    "steps": 8,
    "log_every": 1,
    "checkpoint_every": 3,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(24):
        (folder / f"{i:02d}.txt").write_text(f"Document {i} says: " + f"{i} is {i * i} squared. " * (1 + i % 5))
    path = tmp_path_factory.mktemp("config") / "train.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "data": {"train": str(folder), "held_out_fraction": 0.2}}))
    return path


def train_here(config: Path, output: Path, *options: str) -> None:
    assert main(["train", str(config), "--output", str(output), *options]) == 0


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def forget(output: Path, step: int) -> None:
    """Delete what a run wrote after a checkpoint."""
    shutil.rmtree(output / "model")
    for path in (output / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)


def values(output: Path, name: str) -> list[float]:
    return [row[name] for row in rows_of(output)]


def assert_close(output: Path, expected: Path) -> None:
    assert values(output, "loss") == pytest.approx(values(expected, "loss"), rel=1e-6)
    # AdamW and clipping hide a factor of all gradients.
    assert values(output, "gradient_norm") == pytest.approx(values(expected, "gradient_norm"), rel=1e-5)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (output, expected))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def assert_same_data(output: Path, expected: Path) -> None:
    ours, theirs = rows_of(output), rows_of(expected)
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
    assert ours[-1]["held_out_loss"] == pytest.approx(theirs[-1]["held_out_loss"], rel=1e-6)


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    run_alone(train_here, config, output)
    return output


@pytest.fixture(scope="module")
def two(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two")
    run_torchrun(2, train_here, config, output)
    return output


def test_two_processes_equal_one_and_exchange_checkpoints(config: Path, alone: Path, two: Path, tmp_path: Path) -> None:
    """Sharded over two processes with two micro-batches each, against one process with four."""
    assert_close(two, alone)
    assert_same_data(two, alone)

    # One process goes on from the checkpoint of two.
    resumed = tmp_path / "resumed"
    shutil.copytree(two, resumed)
    forget(resumed, 6)
    assert len(list((resumed / "checkpoints" / "step-00000006").glob("*.distcp"))) == 2
    run_alone(train_here, config, resumed, "--resume")
    assert rows_of(resumed)[:6] == rows_of(two)[:6]  # with their times: these steps were not taken again
    assert_close(resumed, alone)


KILLED_ONCE = """
import os, runpy, signal, time
from pathlib import Path
from tnl.training import loop

take_step = loop.take_step


def killed_once(run, step, *rest):
    if step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        while not Path(run.settings.output, "checkpoints", "step-00000003").is_dir():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(run, step, *rest)


loop.take_step = killed_once
runpy.run_module("tnl", run_name="__main__")
"""


@pytest.mark.slow
def test_killed_process_restarts_and_resumes_by_itself(config: Path, two: Path, tmp_path: Path) -> None:
    """One of two processes is killed after the first checkpoint; torchrun starts both again."""
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--monitor-interval=0.1", str(tmp_path / "killed_once.py"), "train", str(config), "--resume"]
    process = subprocess.run(
        [*command, "--output", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "on 2 cpu" in process.stderr
    assert "step-00000003" in process.stderr.partition("resumed from")[2]
    assert values(tmp_path / "run", "loss") == values(two, "loss")  # bitwise


def test_shared_rows_equal_one_process_and_exchange_checkpoints(config: Path, alone: Path, tmp_path: Path) -> None:
    """Four processes, two to a row: context parallel times FSDP2. Then two, sharing no rows, from its checkpoint."""
    options = ["--parallel.context", "2", "--micro_batch_size", "1", "--evaluate_every", "4"]
    run_torchrun(4, train_here, config, tmp_path, *options)
    assert_close(tmp_path, alone)
    assert_same_data(tmp_path, alone)
    before = rows_of(tmp_path)
    forget(tmp_path, 6)
    run_torchrun(2, train_here, config, tmp_path, "--resume")
    assert rows_of(tmp_path)[:6] == before[:6]
    assert_close(tmp_path, alone)


def keep_gradients(config: Path, output: Path, *options: str) -> None:
    """Train one step and leave its gradients, whole, in `gradients.pt`."""

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(whole, output / "gradients.pt")

    hook = register_optimizer_step_pre_hook(keep)
    train_here(config, output, "--steps", "1", "--optimizer.warmup_steps", "0", *options)
    hook.remove()


def test_gradients_of_shared_rows_are_those_of_one_process(config: Path, tmp_path: Path) -> None:
    keep_gradients(config, tmp_path / "alone")
    run_torchrun(4, keep_gradients, config, tmp_path / "four", "--parallel.context", "2", "--micro_batch_size", "1")
    expected, actual = (torch.load(tmp_path / name / "gradients.pt") for name in ("alone", "four"))
    largest = max(gradient.abs().max() for gradient in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * largest.item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parallel.context", "3"], "parallel.context: expected a divisor of the number of processes, 2, got 3"),
        (["--parallel.context", "2", "--micro_batch_size", "2"], "micro_batch_size: expected 1 .* got 2"),
        (
            [
                "--parallel.context",
                "2",
                "--model.overrides",
                "{num_hidden_layers: 2, layer_types: [linear_attention, full_attention]}",
            ],
            "parallel.context: expected 1 for a model that is not TNL with linear attention in all layers",
        ),
    ],
    ids=["divisor", "micro-batch", "softmax"],
)
def test_rows_that_cannot_be_shared_are_refused(options: list[str], message: str, config: Path, tmp_path: Path) -> None:
    run_torchrun(2, refused, config, tmp_path, message, *options)


def refused(config: Path, output: Path, message: str, *options: str) -> None:
    options = ("--sequence_length", "36", "--micro_batch_size", "1", *options)
    _, (settings,) = parse(["train", str(config), "--output", str(output), *options])
    with pytest.raises(ValueError, match=message):
        train(settings)


def test_sharded_bfloat16_leaves_decays_and_angles_in_float32(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ranks = Ranks(rank=0, size=1, device=torch.device("cpu"), mesh=init_device_mesh("cpu", (1,)))
        model = TnlForCausalLM(TnlConfig.from_preset("tiny", **CONFIG["model"]["overrides"]))
        lay_out(model, ParallelSettings(precision="bfloat16"), ranks)
        seen = {}
        for name, module in model.named_modules():
            if name.endswith((".lrpe", ".qkvu_proj")):
                module.register_forward_pre_hook(
                    lambda module, _, name=name: seen.update({name: next(module.parameters()).dtype})
                )
        model(torch.randint(0, 256, (1, 16)), labels=torch.randint(0, 256, (1, 16))).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert {dtype for name, dtype in seen.items() if name.endswith(".lrpe")} == {torch.float32}
    assert {dtype for name, dtype in seen.items() if name.endswith("_proj")} == {torch.bfloat16}


def test_models_of_transformers_compute_their_loss_without_all_logits() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    tokens = torch.randint(0, 96, (2, 12))
    inputs = {"input_ids": tokens, "labels": tokens, "shift_labels": tokens, "use_cache": False}
    inputs["num_items_in_batch"] = torch.tensor(30)
    plain = model(**inputs)
    gradients = torch.autograd.grad(plain.loss, list(model.parameters()))
    lay_out(model, ParallelSettings(), Ranks(0, 1, torch.device("cpu"), None))
    lean = model(**inputs)
    assert plain.logits is not None
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, plain.loss)
    torch.testing.assert_close(torch.autograd.grad(lean.loss, list(model.parameters())), gradients)
    assert model.eval()(**inputs).logits is not None


def test_activations_of_a_process_alone_are_in_16_bits() -> None:
    model = TnlForCausalLM(TnlConfig.from_preset("tiny", num_hidden_layers=2, hidden_size=32)).train()
    ranks, settings = Ranks(0, 1, torch.device("cpu"), None), ParallelSettings(precision="bfloat16")
    lay_out(model, settings, ranks)
    seen: list[torch.dtype] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    tokens = torch.randint(0, 256, (2, 12))
    with autocast(settings, ranks):
        model(tokens, labels=tokens).loss.backward()
    assert seen == [torch.bfloat16] * 2
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
