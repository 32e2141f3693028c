"""The loop: what it writes, accumulation, resuming, damaged checkpoints, faults, schedules. Tier T0."""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tnl.training import loop
from tnl.training.checkpoint import Checkpoints, find_fault
from tnl.training.config import (
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    TokenizerSettings,
    TrainSettings,
)
from tnl.training.model import keeps_documents_apart

MODELS = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    },
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(24):
        (folder / f"{i:02d}.txt").write_text(f"Document {i} says: " + f"{i} is {i * i} squared. " * (1 + i % 5))
    return str(folder)


def settings_for(output: Path, corpus: str, preset: str = "tiny", **changes: Any) -> TrainSettings:
    settings = TrainSettings(
        output=str(output),
        model=ModelSettings(preset, MODELS[preset]),
        data=DataSettings(train=corpus, held_out_fraction=0.2),
        optimizer=OptimizerSettings(learning_rate=3e-3, warmup_steps=2),
        sequence_length=32,
        batch_size=4,
        steps=8,
        log_every=1,
        evaluate_every=4,
        checkpoint_every=3,
        device="cpu",
    )
    return dataclasses.replace(settings, **changes)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def gradient_norms(output: Path) -> list[float]:
    return [json.loads(line)["gradient_norm"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def assert_same_run(output: Path, expected: Path) -> None:
    """Bitwise the same losses and weights."""
    assert losses(output) == losses(expected)
    ours, theirs = weights(output), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something once, when step number `step` has been taken."""
    take_step = loop.take_step

    def and_act(run: loop.Run, number: int, *rest: Any) -> loop.StepResult:
        result = take_step(run, number, *rest)
        if number == step:
            action()
        return result

    monkeypatch.setattr(loop, "take_step", and_act)


class Killed(BaseException):
    """Stands for the end of a process."""


def kill() -> None:
    raise Killed


def train_until_killed(settings: TrainSettings) -> None:
    """What stands for a kill here leaves the thread alive that writes a checkpoint: it is waited for."""
    with pytest.raises(Killed):
        loop.train(settings)
    for thread in threading.enumerate():
        if thread.name.startswith("write step-"):
            thread.join()


@pytest.fixture(scope="module")
def finished(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dropout that nothing disturbed."""
    output = tmp_path_factory.mktemp("finished")
    assert loop.train(with_dropout(settings_for(output, corpus))) == output / "model"
    return output


def with_dropout(settings: TrainSettings) -> TrainSettings:
    overrides = {**settings.model.overrides, "dropout": 0.1}
    return dataclasses.replace(settings, model=ModelSettings(settings.model.name, overrides))


def test_a_run_leaves_model_metrics_plot_and_checkpoints(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert model.config.vocab_size == 320  # 258 rounded up
    output = model(**tokenizer("Document 3", return_tensors="pt"))
    assert torch.isfinite(output.logits).all()

    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["step"] for row in rows if "held_out_loss" in row] == [4, 8]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["tokens_per_second"] > 0 and 0 <= row["data_wait"] < 1 for row in rows)
    # 6 operations for each parameter of a matrix, 12 D E for each head of each layer
    flops = 6 * (320 * 32 + 2 * (4 * 32 * 32 + 32 * 32 + 3 * 32 * 48)) + 12 * 2 * (32 * 16 + 16 * 16)
    for row in rows:
        assert row["model_tflops"] * 1e12 == pytest.approx(flops * row["tokens_per_second"], rel=0.01)
    with (finished / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in rows]
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").iterdir())
    assert (finished / "config.yaml").is_file()
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_micro_batches_do_not_change_what_is_computed(
    tmp_path: Path, corpus: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, all but the norms, so that sums in another order show nowhere."""
    # With a small epsilon AdamW would turn the rounding of a gradient next to zero into a step.
    optimizer = OptimizerSettings(learning_rate=3e-3, warmup_steps=2, epsilon=1e-3)
    build_model = loop.build_model

    def build_in_float64(*arguments: Any) -> tuple[Any, str | None]:
        built, folder = build_model(*arguments)
        return built.double(), folder

    monkeypatch.setattr(loop, "build_model", build_in_float64)
    for name, size in (("whole", 0), ("parts", 1)):
        settings = settings_for(tmp_path / name, corpus, model, micro_batch_size=size, steps=4, optimizer=optimizer)
        loop.train(settings)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-8)
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=0, atol=1e-8)
    norms = (gradient_norms(tmp_path / name) for name in ("parts", "whole"))
    torch.testing.assert_close(*norms, rtol=1e-7, atol=0)  # AdamW and clipping hide a factor


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_resumed_run_is_bitwise_the_run_that_was_not_killed(
    tmp_path: Path, corpus: str, finished: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = with_dropout(settings_for(tmp_path, corpus))
    with monkeypatch.context() as patch:
        after_step(patch, step, kill)
        train_until_killed(settings)
    loop.train(dataclasses.replace(settings, resume=True))
    assert_same_run(tmp_path, finished)


def test_sigterm_finishes_the_step_and_writes_a_checkpoint(
    tmp_path: Path, corpus: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_dropout(settings_for(tmp_path, corpus))
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        after_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert loop.train(settings) is None
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not (tmp_path / "model").exists()
    assert losses(tmp_path) == losses(finished)[:5]  # the signal came after step 4, step 5 saw it
    assert find_fault(tmp_path / "checkpoints" / "step-00000005") is None
    loop.train(dataclasses.replace(settings, resume=True))
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("damage", ["truncate", "delete", "record"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, corpus: str, finished: Path, damage: str, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = with_dropout(settings_for(tmp_path, corpus))
    with monkeypatch.context() as patch:
        after_step(patch, 7, kill)
        train_until_killed(settings)
    newest = tmp_path / "checkpoints" / "step-00000006"
    shard = next(newest.glob("*.distcp"))
    if damage == "truncate":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "delete":
        shard.unlink()
    else:
        (newest / "run.json").write_text('{"progress": ')
    loop.train(dataclasses.replace(settings, resume=True))
    messages = " ".join(capfd.readouterr().err.split())
    assert f"skipped checkpoint {newest}" in messages
    assert f"resumed from {newest.with_name('step-00000003')}" in messages
    assert_same_run(tmp_path, finished)


def test_kill_while_a_checkpoint_is_written(
    tmp_path: Path, corpus: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that was never renamed is not taken for one, and its remains go with the next one."""
    settings = with_dropout(settings_for(tmp_path, corpus))
    with monkeypatch.context() as patch:
        after_step(patch, 5, lambda: patch.setattr("tnl.training.checkpoint.flush_to_disk", lambda path: kill()))
        train_until_killed(settings)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [".unfinished-step-00000006", "step-00000003"]
    loop.train(dataclasses.replace(settings, resume=True))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    assert_same_run(tmp_path, finished)


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, corpus: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state of its step, whatever the steps do meanwhile."""
    settings = with_dropout(settings_for(tmp_path, corpus))
    written = threading.Event()
    finish = Checkpoints._finish

    def when_allowed(*arguments: Any) -> None:
        written.wait()
        finish(*arguments)

    def allow() -> None:
        assert not list((tmp_path / "checkpoints").glob("step-*"))
        written.set()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_finish", when_allowed)
        after_step(patch, 5, allow)
        loop.train(settings)
    assert_same_run(tmp_path, finished)

    shutil.rmtree(tmp_path / "checkpoints")
    with monkeypatch.context() as patch:
        written.clear()
        patch.setattr(Checkpoints, "_finish", when_allowed)
        after_step(patch, 5, written.set)
        after_step(patch, 5, kill)
        train_until_killed(settings)
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()
    loop.train(dataclasses.replace(settings, resume=True))
    assert_same_run(tmp_path, finished)


def test_another_run_is_not_resumed_and_not_overwritten(tmp_path: Path, corpus: str, finished: Path) -> None:
    same = with_dropout(settings_for(finished, corpus))
    before = losses(finished)
    with pytest.raises(ValueError, match="output: expected a folder without checkpoints, or --resume"):
        loop.train(same)
    other_text = tmp_path / "other.txt"
    other_text.write_text("something else " * 50)
    changes: dict[str, dict[str, Any]] = {
        r"model.hidden_size was 32 and is 64": {"model": ModelSettings("tiny", {**MODELS["tiny"], "hidden_size": 64})},
        r"data.digest was '\w+' and is '\w+'": {"data": DataSettings(train=str(other_text))},
        r"tokenizer was '\w+' and is '\w+'": {"tokenizer": TokenizerSettings("bpe", 300)},
        r"sequence_length was 32 and is 16": {"sequence_length": 16},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=rf"cannot resume from .*step-00000008.*{message}"):
            loop.train(dataclasses.replace(same, resume=True, **change))
    assert losses(finished) == before
    assert (finished / "model" / "model.safetensors").is_file()


def test_steps_that_are_not_finite_are_skipped_then_end_the_run(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean_loss = loop.mean_loss
    bad_steps: list[int] = []

    def sometimes_nan(run: loop.Run, *rest: Any) -> torch.Tensor:
        bad = run.model.training and run.progress.step + 1 in bad_steps
        return mean_loss(run, *rest) * (math.nan if bad else 1.0)

    monkeypatch.setattr(loop, "mean_loss", sometimes_nan)
    bad_steps[:] = [2, 3, 5]
    loop.train(settings_for(tmp_path / "skipping", corpus, max_skipped_steps=3))
    rows = [json.loads(line) for line in (tmp_path / "skipping" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 2, 3, 3, 3, 3]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "skipping").values())
    assert rows[-1]["loss"] < rows[0]["loss"]

    bad_steps[:] = [5, 6, 7, 8]
    seen = r"in 3 steps in a row, at step \d+: loss nan, .*model.embed_tokens.weight.* and \d+ more; the last good "
    with pytest.raises(FloatingPointError, match=seen + "checkpoint: .*step-00000006"):
        loop.train(settings_for(tmp_path / "ending", corpus, max_skipped_steps=3))


def test_metrics_go_to_a_tracker_too(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases and trackio have the same three functions; a module with them stands for either."""
    calls: list[tuple[str, Any]] = []
    tracker: Any = types.ModuleType("trackio")
    tracker.init = lambda **options: calls.append(("init", options))
    tracker.log = lambda row, step: calls.append(("log", (row, step)))
    tracker.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    loop.train(settings_for(tmp_path / "run", corpus, steps=2, tracker="trackio"))
    assert [name for name, _ in calls] == ["init", "log", "log", "finish"]
    assert calls[0][1]["name"] == "run"
    assert calls[0][1]["config"]["steps"] == 2
    assert [step for _, (row, step) in calls[1:3]] == [1, 2]
    assert calls[1][1][0]["loss"] == losses(tmp_path / "run")[0]

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="tracker: expected a package that is installed, got 'wandb'; pip install"):
        loop.train(settings_for(tmp_path / "other", corpus, steps=2, tracker="wandb"))


def test_training_goes_on_from_a_folder_of_weights(tmp_path: Path, corpus: str, finished: Path) -> None:
    tuned = settings_for(tmp_path, corpus, steps=1, optimizer=OptimizerSettings(learning_rate=1e-12))
    loop.train(dataclasses.replace(tuned, model=ModelSettings(str(finished))))
    for name, value in weights(finished).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, rtol=0, atol=1e-6)


def test_bpe_autocast_and_activation_checkpointing(tmp_path: Path, corpus: str) -> None:
    changes: dict[str, Any] = {"tokenizer": TokenizerSettings("bpe", 300), "steps": 3}
    loop.train(settings_for(tmp_path / "plain", corpus, **changes))
    again = ParallelSettings(activation_checkpointing=True)
    loop.train(settings_for(tmp_path / "again", corpus, parallel=again, **changes))
    assert losses(tmp_path / "again") == losses(tmp_path / "plain")
    low = ParallelSettings(precision="bfloat16")
    loop.train(settings_for(tmp_path / "low", corpus, parallel=low, **changes))
    assert losses(tmp_path / "low") != losses(tmp_path / "plain")
    torch.testing.assert_close(losses(tmp_path / "low"), losses(tmp_path / "plain"), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 1}, "sequence_length: expected at least 2, got 1"),
        ({"batch_size": 4, "micro_batch_size": 3}, "batch_size: expected a multiple of 3"),
        ({"model": ModelSettings("huge")}, r"model.name: expected a preset \(tiny.*got 'huge'"),
        ({"model": ModelSettings("t5")}, "model.name: expected a causal language model, got 't5'"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"model": ModelSettings("tiny", {"widht": 3})}, "model.overrides: .*widht"),
        ({"model": ModelSettings("llama", {"widht": 3})}, "model.overrides: .*widht"),
        ({"model": ModelSettings("tiny", {"vocab_size": 256})}, "model.*vocab"),
        ({"model": ModelSettings("llama", MODELS["llama"]), "sequence_length": 65}, "at most the model's 64 positions"),
        ({"device": "cuda"}, "device: expected cpu or auto"),
        ({"data": DataSettings(train=[])}, "data.train: expected at least one source"),
        ({"tokenizer": TokenizerSettings("nowhere/at-all/there")}, "tokenizer.name: expected bytes, bpe"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, corpus: str, change: dict[str, Any], message: str) -> None:
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU, so asking for one is no mistake")
    with pytest.raises(ValueError, match=message):
        loop.train(settings_for(tmp_path / "run", corpus, **change))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_schedules() -> None:
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=10, final_ratio=0.1, decay_fraction=0.2)

    def rates(schedule: Any) -> list[float]:
        changed = dataclasses.replace(settings, schedule=schedule)
        return [loop.learning_rate(changed, step, 100) for step in range(1, 101)]

    for schedule in ("cosine", "inverse_sqrt", "constant", "wsd"):
        curve = rates(schedule)
        assert curve[:10] == pytest.approx([step / 10 for step in range(1, 11)])
        assert max(curve) == pytest.approx(1.0)
    assert rates("cosine")[-1] == pytest.approx(0.1)
    assert rates("cosine")[54] == pytest.approx(0.55)
    assert rates("inverse_sqrt")[39] == pytest.approx(0.5)
    assert rates("constant")[-1] == 1.0
    assert rates("wsd")[79] == pytest.approx(1.0)
    assert rates("wsd")[89] == pytest.approx(0.55)
    assert rates("wsd")[99] == pytest.approx(0.1)
    assert loop.learning_rate(dataclasses.replace(settings, warmup_steps=0), 1, 1) == pytest.approx(0.1)


def test_matrices_decay_and_nothing_else(tmp_path: Path, corpus: str) -> None:
    settings = settings_for(tmp_path, corpus)
    with loop.join_ranks("cpu") as ranks:
        run = loop.assemble(settings, ranks)
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    for name, value in decay.items():
        assert value == (0.1 if name.endswith("_proj.weight") else 0.0), name


OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "gpt_neox": {"intermediate_size": 48},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
    "rwkv": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "qwen3_next": {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "mlp_only_layers": [0, 1]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_loss_of_any_causal_model(name: str, corpus: str, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, corpus)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {} if name == "rwkv" else {"initializer_range": 0.5}
    sizes |= {} if name in ("mamba2", "rwkv") else {"num_attention_heads": 2}
    settings = dataclasses.replace(settings, model=ModelSettings(name, sizes | OTHERS[name]))
    with loop.join_ranks("cpu") as ranks:
        run = loop.assemble(settings, ranks)
    batch = next(batch for batch in run.loader if "position_ids" not in batch or name not in ("rwkv", "mamba2"))
    loss = loop.mean_loss(run, batch, int((batch["targets"] != -100).sum()))
    loss.backward()
    inputs = {key: batch[key] for key in ("input_ids", "position_ids") if key in batch}
    logits = run.model(**inputs, use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.isfinite(p.grad).all() for p in run.model.parameters() if p.grad is not None)


def test_models_that_mix_documents_are_found() -> None:
    def small(model_type: str, **changes: Any) -> bool:
        from transformers import AutoConfig

        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, vocab_size=64, **changes)
        return keeps_documents_apart(AutoModelForCausalLM.from_config(config))

    assert small("tnl", **MODELS["tiny"], bos_token_id=0, eos_token_id=0, pad_token_id=0)
    assert small("llama", **MODELS["llama"])
    assert not small("mamba", hidden_size=32, num_hidden_layers=1, state_size=4)
    assert not small("bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
