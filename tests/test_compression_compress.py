"""`tnl compress` from end to end on a small model. Tier T0."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tnl import cli
from tnl.compression import compress as module
from tnl.compression import structures
from tnl.compression.compress import compress, expand
from tnl.compression.settings import CompressSettings, ExpandSettings
from tnl.models import TnlConfig, TnlForCausalLM
from tnl.training.model import save_model
from tnl.training.tokenizer import byte_tokenizer

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 60
SETTINGS: dict[str, Any] = {
    "calibration_tokens": 512, "sequence_length": 64, "orders": [3], "evaluations": 1, "iterations": 8,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, with low-rank structure in its weights, and a text."""
    folder = tmp_path_factory.mktemp("compression")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = TnlConfig.from_preset(
        "tiny", vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_model(TnlForCausalLM(config), tokenizer, folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def settings_for(source: Path, output: Path, **changes: Any) -> CompressSettings:
    given = SETTINGS | {"data": str(source / "text.txt")} | changes
    return CompressSettings(model=str(source / "model"), output=str(output), **given)


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def assert_same(output: Path, other: Path) -> None:
    """Two runs chose the same; files and processes may place numbers in memory otherwise, which changes last digits."""
    chosen, again = read(output / "report.csv"), read(other / "report.csv")
    names = ("matrix", "parameters", "stored_as")
    assert [[row[name] for name in names] for row in chosen] == [[row[name] for name in names] for row in again]
    errors, others = ([float(row["error"]) for row in rows] for rows in (chosen, again))
    assert errors == pytest.approx(others, rel=1e-6)
    torch.testing.assert_close(logits_of(output / "model"), logits_of(other / "model"), rtol=1e-4, atol=1e-4)


def logits_of(folder: Path) -> torch.Tensor:
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


def test_search_keeps_to_the_budget_writes_and_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"kinds": ["embedding", "qkvu", "down"], "work": str(tmp_path / "work")}
    folder = compress(settings_for(source, tmp_path / "out", **given))
    model = AutoModelForCausalLM.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(source / "model")
    rows = read(tmp_path / "out" / "report.csv")
    assert len(rows) == 1 + 2 * 2
    kept, dense = (sum(int(row[name]) for row in rows) for name in ("parameters", "dense_parameters"))
    assert kept <= 0.5 * dense
    saved = sum(p.numel() for p in original.parameters()) - sum(p.numel() for p in model.parameters())
    assert saved == dense - kept
    totals = json.loads((tmp_path / "out" / "report.json").read_text())
    assert totals["bits_per_byte_after"] > 0
    assert (tmp_path / "out" / "report.png").stat().st_size > 1000
    found = read(tmp_path / "out" / "structures.csv")
    assert {row["kind"] for row in found} == {"embedding", "qkvu", "down"}

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(structures, "refine", refuse)
    monkeypatch.setattr(module, "gather_moments", refuse)
    compress(settings_for(source, tmp_path / "again", **given))
    assert_same(tmp_path / "out", tmp_path / "again")


def test_processes_give_the_same(source: Path, tmp_path: Path) -> None:
    given = {"kinds": ["gate", "down"], "method": "ring", "pinned": False}
    compress(settings_for(source, tmp_path / "alone", **given))
    compress(settings_for(source, tmp_path / "several", executor="joblib", workers=2, **given))
    assert_same(tmp_path / "alone", tmp_path / "several")


def test_compressions_of_a_model_share_what_they_can(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"method": "svd", "work": str(tmp_path / "work")}
    compress(settings_for(source, tmp_path / "loss", **shared))
    compress(settings_for(source, tmp_path / "alone", method="svd", weighting="activations", budget=0.4))
    moments: list[object] = []
    monkeypatch.setattr(module, "gather_moments", lambda *given: moments.append(given))
    compress(settings_for(source, tmp_path / "second", weighting="activations", budget=0.4, **shared))
    assert_same(tmp_path / "alone", tmp_path / "second")
    assert not moments
    with pytest.raises(AttributeError):  # of other text: gathered again
        compress(settings_for(source, tmp_path / "third", calibration_tokens=256, **shared))
    assert len(moments) == 1


@pytest.mark.parametrize("method", ["svd", "ring", "train"])
def test_fixed_methods(source: Path, tmp_path: Path, method: str) -> None:
    folder = compress(settings_for(source, tmp_path / "out", method=method, allocation="uniform", pinned=False))
    for row in read(tmp_path / "out" / "report.csv"):
        assert int(row["parameters"]) <= 0.5 * int(row["dense_parameters"])
        assert row["stored_as"].startswith("svd") == (method == "svd")
    assert logits_of(folder).isfinite().all()


def test_back_to_dense(source: Path, tmp_path: Path) -> None:
    folder = compress(settings_for(source, tmp_path / "out", method="svd"))
    dense = expand(ExpandSettings(str(folder), str(tmp_path / "dense")))
    config = json.loads((dense / "config.json").read_text())
    assert not config.get("tensor_networks")
    torch.testing.assert_close(logits_of(dense), logits_of(folder), rtol=1e-4, atol=1e-4)


def test_a_large_budget_changes_little_and_a_small_one_much(source: Path, tmp_path: Path) -> None:
    before = logits_of(source / "model")
    changes = []
    for budget in (0.95, 0.2):
        folder = compress(settings_for(source, tmp_path / str(budget), method="svd", budget=budget))
        changes.append(float((logits_of(folder) - before).norm() / before.norm()))
    assert changes[0] < 0.5 * changes[1]


def test_tied_embedding_is_one_matrix(source: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TnlConfig.from_pretrained(source / "model", tie_word_embeddings=True)
    save_model(TnlForCausalLM(config), byte_tokenizer(), tmp_path / "tied")
    settings = dataclasses.replace(settings_for(source, tmp_path / "out", method="svd"), model=str(tmp_path / "tied"))
    model = AutoModelForCausalLM.from_pretrained(compress(settings))
    assert model.lm_head.core_1 is model.model.embed_tokens.core_1
    assert [row["kind"] for row in read(tmp_path / "out" / "report.csv")].count("head") == 0


def test_without_text_only_plain_weights(source: Path, tmp_path: Path) -> None:
    settings = settings_for(source, tmp_path / "out", method="svd", data=[], weighting="none")
    compress(settings)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["bits_per_byte_after"] is None
    with pytest.raises(ValueError, match="data: expected calibration text"):
        settings_for(source, tmp_path, data=[])


def test_refusals(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"budget: expected at least 0\.\d+ \(rank 1"):
        compress(settings_for(source, tmp_path / "out", budget=0.01))
    compressed = compress(settings_for(source, tmp_path / "first", method="svd"))
    again = dataclasses.replace(settings_for(source, tmp_path / "second"), model=str(compressed))
    with pytest.raises(ValueError, match="expected a TNL with dense matrices"):
        compress(again)
    with pytest.raises(ValueError, match="output: expected another folder than the model's"):
        compress(settings_for(source, source / "model"))
    foreign = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 320, "n_positions": 8}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**foreign))
    save_model(other, byte_tokenizer(), tmp_path / "gpt2")
    arguments = ["compress", str(tmp_path / "gpt2"), "--data", str(source / "text.txt")]
    assert cli.main([*arguments, "--output", str(tmp_path / "third")]) == 2
    assert "expected a TNL, got GPT2LMHeadModel" in capsys.readouterr().err
    assert cli.main([*arguments, "--budget", "1.5"]) == 2
    assert "budget: expected above 0 and below 1, got 1.5" in capsys.readouterr().err


def test_trains_on(source: Path, tmp_path: Path) -> None:
    folder = compress(settings_for(source, tmp_path / "out", method="svd"))
    arguments = ["train", "--from", str(folder), "--data.train", str(source / "text.txt"), "--output"]
    arguments += [str(tmp_path / "healed"), "--steps", "2", "--batch_size", "1", "--sequence_length", "32"]
    assert cli.main([*arguments, "--device", "cpu", "--data.held_out_fraction", "0"]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, tmp_path / "healed" / "model"))
    assert after.config.tensor_networks == before.config.tensor_networks
    assert not torch.equal(after.model.layers[0].mlp.up_proj.core_0, before.model.layers[0].mlp.up_proj.core_0)
