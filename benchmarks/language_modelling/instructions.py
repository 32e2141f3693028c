"""Instructions: a trained model learns to name the book that a passage is from, by `tnl finetune`.

All weights, and LoRA; a passage of 300 bytes in, the book's title out. The passages of the test are from the last
tenth of each book, those that were tuned on from before it. The scores, before and after: the share of titles written
exactly, greedily, and the bits that the model needs for the right title (log2 of the number of books, if it knew them
and guessed).
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
TITLE_TOKENS = 48
BATCH = 60
WAYS = {"all weights": 0, "LoRA of rank 16": 16}  # rank of the adapters; 0: none
RATES = (3e-4, 2e-3)  # for 45M parameters

Example = dict[str, str]


def make_examples(
    books: dict[str, bytes], passages: int, tests: int, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Passages to tune on and to test with, so many of each book, with its title; in ASCII a byte is a character."""
    generator = np.random.default_rng(seed)
    tune: list[Example] = []
    test: list[Example] = []
    for title, content in books.items():
        text = " ".join(content.decode("ascii", errors="ignore").split())
        border = int(len(text) * (1 - TEST_SHARE))
        for examples, count, low, high in ((tune, passages, 0, border), (test, tests, border, len(text))):
            for start in generator.integers(low, high - PASSAGE, count):
                passage = text[start : start + PASSAGE]
                examples.append({"instruction": INSTRUCTION, "input": passage, "output": title})
    return tune, test


def batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Pieces of at most `BATCH` examples."""
    rest = iter(examples)
    while batch := list(itertools.islice(rest, BATCH)):
        yield batch


def prompts_of(examples: list[Example], tokenizer: Any) -> torch.Tensor:
    """Prompts, [B, T]: all of one length."""
    prompts = [instruction_prompt(each["instruction"], each["input"]) for each in examples]
    return tokenizer(prompts, return_tensors="pt")["input_ids"]


@torch.no_grad()
def named(model: PreTrainedModel, tokenizer: Any, examples: list[Example]) -> float:
    """Share of the examples whose title the model writes."""
    right = 0
    for batch in batches(examples):
        prompts = prompts_of(batch, tokenizer).to(model.device)
        written = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=TITLE_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(written[:, prompts.shape[1] :], skip_special_tokens=True)
        right += sum(answer.strip() == each["output"] for answer, each in zip(answers, batch, strict=True))
    return right / len(examples)


@torch.no_grad()
def title_bits(model: PreTrainedModel, tokenizer: Any, examples: list[Example]) -> float:
    """Bits of the right title and the token that ends it, given the prompt; the mean over the examples."""
    nats = 0.0
    for _, group in itertools.groupby(examples, key=lambda each: each["output"]):
        for batch in batches(group):
            title = tokenizer(batch[0]["output"], add_special_tokens=False)["input_ids"]
            answer = torch.tensor([[*title, tokenizer.eos_token_id]]).expand(len(batch), -1)
            rows = torch.cat([prompts_of(batch, tokenizer), answer], dim=1).to(model.device)
            logits = model(input_ids=rows, use_cache=False).logits[:, -answer.shape[1] - 1 : -1]
            targets = rows[:, -answer.shape[1] :]
            nats += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
    return nats / math.log(2) / len(examples)


def scores(model: PreTrainedModel, tokenizer: Any, examples: list[Example]) -> Row:
    """Both scores."""
    return {"named": named(model, tokenizer, examples), "title_bits": title_bits(model, tokenizer, examples)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, nargs="?", help="folder of a model (or of a run) that has read novels, bytes as tokens"
    )
    parser.add_argument("--books", type=int, default=0, help="the first so many of the books to train on; 0: all")
    parser.add_argument("--passages", type=int, default=100, help="passages of each book to tune on")
    parser.add_argument("--tests", type=int, default=8, help="passages of each book to test with")
    parser.add_argument("--epochs", type=float, default=4, help="passes over those to tune on")
    parser.add_argument("--batch_size", type=int, default=16, help="passages in a step")
    parser.add_argument(
        "--rates", type=float, nargs=2, default=RATES, metavar=("ALL", "LORA"), help="learning rates of the two ways"
    )
    parser.add_argument("--output", type=Path, default=RESULT_FOLDER, help="folder for the table")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "instructions", help="folder for the models")
    parser.add_argument("--plot", action="store_true", help="only write what the table holds into docs/quality.md")


def run(options: argparse.Namespace) -> None:
    """Tune in each way that has no row yet with these settings."""
    if options.plot:
        from benchmarks.language_modelling.plots import show_instructions

        show_instructions(options.output)
        return
    if options.model is None:
        raise SystemExit("error: model: expected the folder of a model")
    path = options.output / "instructions.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    books = [(name, text) for split, name, text in novels(None) if split == "train"][: options.books or None]
    titled = {name.removesuffix(".txt").replace("-", " ").title(): text for name, text in books}
    tune, test = make_examples(titled, options.passages, options.tests)
    data = options.work / "passages.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in tune))
    device = choose_device("auto")
    model, tokenizer = load_model(str(options.model), device, "float32")
    about: Row = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "books": len(books),
        "examples": len(tune), "tests": len(test), "epochs": options.epochs, "batch_size": options.batch_size,
    }  # fmt: skip
    before: Row = {}
    for (way, rank), rate in zip(WAYS.items(), options.rates, strict=True):
        case = about | {"way": way, "learning_rate": rate}
        if any(all(row[name] == str(value) for name, value in case.items()) for row in read_rows(path)):
            continue
        before = before or {f"{name}_before": value for name, value in scores(model, tokenizer, test).items()}
        folder = options.work / ("lora" if rank else "all")
        began, began_cpu = time.perf_counter(), time.process_time()
        settings = FinetuneSettings(
            str(options.model), str(data), str(folder), rank, rate, options.epochs, options.batch_size
        )
        tuned = finetune(settings)
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - began_cpu}
        after = scores(*load_model(str(tuned), device, "float32"), test)
        write_rows(path, [*read_rows(path), case | before | after | took | machine()])
        CONSOLE.print(f"{way}: {before} before, {after} after, {took['seconds']:.0f} s", highlight=False)
