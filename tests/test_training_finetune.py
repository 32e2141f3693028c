"""`tnl finetune` on a CPU: all weights and LoRA learn to answer; the prompt and what is learnt of it. Tier T0."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tnl.cli import main
from tnl.models import TnlConfig, TnlForCausalLM
from tnl.training.finetune import instruction_prompt, read_examples
from tnl.training.model import save_model
from tnl.training.tokenizer import byte_tokenizer

ANSWERS = {"hot": "cold", "up": "down", "day": "night", "wet": "dry"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = TnlConfig.from_preset("tiny", vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    save_model(TnlForCausalLM(config), tokenizer, path / "model")
    rows = [{"instruction": "Opposite.", "input": word, "output": answer} for word, answer in ANSWERS.items()]
    (path / "opposites.jsonl").write_text("\n".join(map(json.dumps, rows * 24)))
    return path


def answer(folder: Path, word: str) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(instruction_prompt("Opposite.", word), return_tensors="pt")
    written = model.generate(prompt["input_ids"], max_new_tokens=12, do_sample=False, pad_token_id=257)
    return str(tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def run(folder: Path, output: Path, *options: str) -> None:
    arguments = ["finetune", str(folder / "model"), str(folder / "opposites.jsonl"), "--output", str(output)]
    assert main([*arguments, "--device", "cpu", "--batch_size", "8", *options]) == 0


def test_all_weights_learn_to_answer(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, "--learning_rate", "5e-3", "--epochs", "8")
    assert {word: answer(tmp_path / "model", word) for word in ANSWERS} == ANSWERS
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("rank", ["0", "4"])
def test_the_loss_is_that_of_the_answers(
    folder: Path, tmp_path: Path, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTTrainer

    plain, seen = SFTTrainer.compute_loss, set()

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        for row in inputs["labels"].tolist():
            seen.add(byte_tokenizer().decode([token for token in row if token != -100]))
        return plain(self, model, inputs, *args, **options)

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    run(folder, tmp_path, "--epochs", "0.1", "--lora_rank", rank)
    assert seen == {f"{answer}<|endoftext|>" for answer in ANSWERS.values()}


def test_lora_trains_adapters_and_merges_them(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, "--lora_rank", "4", "--learning_rate", "1e-2", "--epochs", "2")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert adapter
    assert all("lora_" in name for name in adapter)
    before, after = (load_file(path / "model" / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("layers" in name and "theta" not in name for name in changed)


def test_only_the_answer_is_learnt(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    example: dict[str, Any] = read_examples(str(folder / "opposites.jsonl"), tokenizer, 1000)[0]
    learnt = [token for token, wanted in zip(*example.values(), strict=True) if wanted]
    given = [token for token, wanted in zip(*example.values(), strict=True) if not wanted]
    assert tokenizer.decode(learnt) == "cold<|endoftext|>"
    assert tokenizer.decode(given) == "<|endoftext|>Opposite.\nHuman:\nhot\nAssistant:\n"
    assert len(read_examples(str(folder / "opposites.jsonl"), tokenizer, 5)[0]["input_ids"]) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "data: expected a file of .jsonl"),
        ("nowhere.jsonl", None, "data: expected a file of instructions"),
        ("b.jsonl", '{"question": "a", "output": "b"}', "data: expected rows with instruction and output"),
    ],
)
def test_bad_data_is_one_clear_line(
    folder: Path, tmp_path: Path, name: str, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    capsys.readouterr()
    assert main(["finetune", str(folder / "model"), str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
