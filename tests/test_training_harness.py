"""`tnl eval --harness` on task files of its own: what lm-evaluation-harness counts is what the model gives. Tier T0."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tnl.cli import main
from tnl.models import TnlConfig, TnlForCausalLM
from tnl.training.model import save_model
from tnl.training.tokenizer import byte_tokenizer

QUESTIONS = [
    {"question": "two and two", "choices": ["four", "a goat", "blue"], "answer": 0},
    {"question": "the sky is", "choices": ["wood", "blue"], "answer": 1},
    {"question": "a cow says", "choices": ["moo", "four", "quack"], "answer": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = TnlConfig.from_preset("tiny", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2)
    save_model(TnlForCausalLM(config), tokenizer, path / "model")
    (path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path / "questions.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    tasks: dict[str, dict[str, Any]] = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "written": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    for name, task in tasks.items():
        (path / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"local_{name}", **common, **task}))
    return path


def by_hand(folder: Path) -> float:
    """Share of questions whose likeliest continuation is the answer."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    right = 0
    for item in QUESTIONS:
        scores = []
        for choice in item["choices"]:  # type: ignore[attr-defined]
            start = len(tokenizer(item["question"])["input_ids"])
            tokens = torch.tensor([tokenizer(f"{item['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logs = F.log_softmax(model(tokens).logits[0, :-1].float(), dim=-1)
            scores.append(logs.gather(1, tokens[0, 1:, None])[start - 1 :].sum().item())
        right += scores.index(max(scores)) == item["answer"]
    return right / len(QUESTIONS)


def test_tasks_from_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    tasks = f"{folder / 'choices.yaml'},{folder / 'written.yaml'}"
    files = ["--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")]
    assert main(["eval", str(folder / "model"), "--harness", tasks, "--batch_size", "2", *files]) == 0
    assert "local_choices" in capsys.readouterr().out
    rows = {row["task"]: row for row in json.loads((tmp_path / "a.json").read_text())["results"]}
    assert rows["local_choices"]["metric"] == "acc"
    assert rows["local_choices"]["value"] == pytest.approx(by_hand(folder))
    assert rows["local_choices"]["examples"] == 3
    assert 0 <= rows["local_written"]["value"] <= 1
    with (tmp_path / "a.csv").open() as file:
        assert {row["task"] for row in csv.DictReader(file)} == {"local_choices", "local_written"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--harness", "nowhere.yaml"], "harness: expected a file"),
        (["--harness", ","], "harness: expected tasks"),
        (["text.txt", "--harness", "choices.yaml"], "data: expected no source of text with harness"),
        ([], "data: expected at least one source of text"),
    ],
)
def test_bad_input_is_one_clear_line(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    assert main(["eval", str(folder / "model"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
