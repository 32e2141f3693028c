"""Instructions: a trained model learns to name the book that a passage is from, by `tnl finetune`.

All weights, and LoRA; a passage of 300 bytes in, the book's title out. The passages of the test are from the last
tenth of each book, those that were tuned on from before it. The score is the share of titles written exactly, greedily.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks import REPOSITORY
from benchmarks.language_modelling.corpus import novels
from benchmarks.language_modelling.runs import CONSOLE, RESULT_FOLDER, Row, read_rows, write_rows
from benchmarks.language_modelling.worker import machine
from tnl.training.config import FinetuneSettings
from tnl.training.finetune import finetune, instruction_prompt
from tnl.training.model import choose_device, load_model

INSTRUCTION = "Which book is this from?"
PASSAGE = 300  # bytes
TEST_SHARE = 0.1  # of each book, at its end
TESTS = 8  # passages of a book
TITLE_TOKENS = 48
BATCH = 60
# By name: rank of LoRA (0: all weights), learning rate.
WAYS: dict[str, tuple[int, float]] = {"all weights": (0, 3e-4), "LoRA of rank 16": (16, 2e-3)}

Example = dict[str, str]


def make_examples(books: dict[str, bytes], passages: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Passages of all books to tune on and to test with, each with its title; ASCII, so that a byte is a character."""
    generator = np.random.default_rng(seed)
    tune: list[Example] = []
    test: list[Example] = []
    for title, content in books.items():
        text = " ".join(content.decode("ascii", errors="ignore").split())
        border = int(len(text) * (1 - TEST_SHARE))
        for examples, count, low, high in ((tune, passages, 0, border), (test, TESTS, border, len(text))):
            for start in generator.integers(low, high - PASSAGE, count):
                passage = text[start : start + PASSAGE]
                examples.append({"instruction": INSTRUCTION, "input": passage, "output": title})
    return tune, test


@torch.no_grad()
def named(model: PreTrainedModel, tokenizer: Any, examples: list[Example]) -> float:
    """Share of the examples whose title the model writes."""
    right = 0
    for first in range(0, len(examples), BATCH):
        batch = examples[first : first + BATCH]
        prompts = [instruction_prompt(each["instruction"], each["input"]) for each in batch]
        inputs = tokenizer(prompts, return_tensors="pt").to(model.device)  # all of one length
        written = model.generate(
            **inputs, max_new_tokens=TITLE_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answers = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer.strip() == each["output"] for answer, each in zip(answers, batch, strict=True))
    return right / len(examples)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, help="folder of a model (or of a run) that has read novels, bytes as tokens"
    )
    parser.add_argument("--passages", type=int, default=100, help="passages of each book to tune on")
    parser.add_argument("--epochs", type=float, default=4, help="passes over them")
    parser.add_argument("--output", type=Path, default=RESULT_FOLDER, help="folder for the table")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "instructions", help="folder for the models")


def run(options: argparse.Namespace) -> None:
    """Tune in each way that has no row yet."""
    path = options.output / "instructions.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    books = {name.removesuffix(".txt"): text for split, name, text in novels(None) if split == "train"}
    titles = {name: name.replace("-", " ").title() for name in books}
    tune, test = make_examples({titles[name]: text for name, text in books.items()}, options.passages)
    data = options.work / "passages.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in tune))
    device = choose_device("auto")
    before = None
    for way, (rank, rate) in WAYS.items():
        if way in {row["way"] for row in read_rows(path)}:
            continue
        if before is None:
            before = named(*load_model(str(options.model), device, "float32"), test)
        folder = options.work / ("lora" if rank else "all")
        began = time.perf_counter()
        tuned = finetune(
            FinetuneSettings(
                str(options.model), str(data), str(folder), lora_rank=rank, learning_rate=rate, epochs=options.epochs
            )
        )
        seconds = time.perf_counter() - began
        model, tokenizer = load_model(str(tuned), device, "float32")
        row: Row = {
            "way": way, "parameters": sum(parameter.numel() for parameter in model.parameters()), "learning_rate": rate,
            "epochs": options.epochs, "examples": len(tune), "tests": len(test), "books": len(books),
            "named_before": before, "named": named(model, tokenizer, test), "seconds": seconds,
        }  # fmt: skip
        write_rows(path, [*read_rows(path), row | machine()])
        CONSOLE.print(f"{way}: {before:.3f} before, {row['named']:.3f} after, {seconds:.0f} s", highlight=False)
