"""One run: `python -m benchmarks.language_modelling.worker FOLDER` trains and evaluates what FOLDER/run.json says.

The training is that of `tnl train`, from the settings that it leaves in FOLDER/train/config.yaml. A run that was
stopped goes on from its checkpoint.
"""

import importlib.metadata
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.language_modelling import evaluation
from benchmarks.language_modelling.corpus import Corpus, write_corpus
from benchmarks.language_modelling.models import overrides_of
from benchmarks.language_modelling.runs import Run, read_rows
from tnl.models import TnlForCausalLM
from tnl.training.config import (
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    TokenizerSettings,
    TrainSettings,
)
from tnl.training.loop import train
from tnl.training.model import load_model
from tnl.training.tokenizer import TextEncoder

TRAINING_SAMPLE = 2_000_000  # bytes of training text that are read again, to see how much was learnt by heart
NOT_COMPILED = {"gla"}  # it has kernels of its own
LOOK_TOKENS = 1 << 19  # of the validation text for a point of the learning curve


def settings_of(run: Run, corpus: Corpus, folder: Path) -> TrainSettings:
    """What `tnl train` is given."""
    gpu = torch.cuda.is_available()
    name, overrides = overrides_of(run.model, run.size, run.changes)
    optimizer = {"learning_rate": 2e-3, "warmup_steps": min(100, run.steps // 10)} | run.optimizer
    rows = run.step_tokens // run.context
    return TrainSettings(
        output=str(folder / "train"),
        model=ModelSettings(name, overrides),
        tokenizer=TokenizerSettings("bytes" if run.tokenizer == "bytes" else str(corpus.tokenizer)),
        data=DataSettings(
            train=str(corpus.train), held_out=str(corpus.validation), workers=2 if gpu and rows > 4 else 0
        ),
        optimizer=OptimizerSettings(**optimizer),
        parallel=ParallelSettings("bfloat16" if gpu else "float32", compile=gpu and run.model not in NOT_COMPILED),
        sequence_length=run.context,
        batch_size=rows,
        steps=run.steps,
        seed=run.seed,
        log_every=max(1, run.steps // 60),
        evaluate_every=max(1, run.steps // run.curve_points),
        evaluate_rows=max(1, min(LOOK_TOKENS, 16 * run.step_tokens) // run.context),
        checkpoint_every=1000,
        keep_checkpoints=1,
        asynchronous_checkpoints=False,
        resume=True,
    )


def encode(tokenizer: PreTrainedTokenizerBase, content: bytes) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """Tokens of a document with the one that opens it, [n + 1], and the bytes that each of the n others stands for."""
    ids = TextEncoder(tokenizer).encode([content])[0][:-1].astype(np.int64)
    if len(ids) == len(content) + 1:
        lengths = np.ones(len(content), dtype=np.int64)
    else:  # in a byte-level BPE each character of a token stands for a byte
        lengths = np.array([len(text) for text in tokenizer.convert_ids_to_tokens(ids[1:].tolist())], dtype=np.int64)
    return torch.from_numpy(ids), lengths


def evaluate(
    run: Run, corpus: Corpus, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Bits per byte on validation, test and training text, and those by position."""
    scores, positions = {}, []
    sample = corpus.train.open("rb").read(TRAINING_SAMPLE if run.size != "tiny" else 2000)
    texts = {split: [path.read_bytes() for path in corpus.documents(split)] for split in ("validation", "test")}
    texts["train"] = [sample]
    for split, contents in texts.items():
        documents = [encode(tokenizer, content) for content in contents]
        lengths = [length for _, length in documents]
        ways: dict[str, list[evaluation.Nats]] = {}
        for context in run.contexts if split != "train" else (run.context,):
            nats = [evaluation.nats_in_windows(model, ids.to(model.device), context) for ids, _ in documents]
            ways[str(context)] = nats
        if split != "train" and isinstance(model, TnlForCausalLM) and model.config.layer_types is None:
            ways["stream"] = [evaluation.nats_streamed(model, ids.to(model.device)) for ids, _ in documents]
        elif split != "train":  # the most that a model can do without reading beyond the length that it learnt at
            halves = (run.context, run.context // 2)
            ways["stream"] = [evaluation.nats_in_windows(model, ids.to(model.device), *halves) for ids, _ in documents]
        if split == "validation":
            scores["tokens_per_byte"] = sum(map(len, lengths)) / sum(map(len, contents))
        for way, nats in ways.items():
            scores[f"{split}_{way}"] = evaluation.bits_per_byte(nats, sum(map(len, contents)))
        if split != "train":
            about = {"run": run.name, "split": split, "evaluation": "stream"}
            for start, stop, bits in evaluation.by_position(ways["stream"], lengths):
                positions.append(about | {"from": start, "to": stop, "bits_per_byte": bits})
    return scores, positions


def machine() -> dict[str, str]:
    """Device and versions, which every row names."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {}
    for name in ("torch", "triton", "transformers", "fla-core"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {"device": device} | versions


def describe(run: Run, settings: TrainSettings, folder: Path, model: PreTrainedModel, tokens: int) -> dict[str, Any]:
    """The part of a run's row that says what was run, and how fast."""
    logged = read_rows(folder / "train" / "metrics.csv")
    speeds = [float(row["tokens_per_second"]) for row in logged if row["tokens_per_second"]]
    about = {
        "run": run.name, "model": run.model, "size": run.size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "changes": json.dumps(run.changes), "corpus": run.corpus, "tokenizer": run.tokenizer, "context": run.context,
        "step_tokens": run.step_tokens, "steps": run.steps, "passes": run.steps * run.step_tokens / tokens,
        "learning_rate": settings.optimizer.learning_rate, "weight_decay": settings.optimizer.weight_decay,
        "optimizer": json.dumps(run.optimizer), "seed": run.seed,
    }  # fmt: skip
    about["tokens_per_second"] = statistics.median(speeds)
    about["memory_gib"] = max(float(row["memory_gib"]) for row in logged if row["memory_gib"])
    about["skipped_steps"] = logged[-1]["skipped_steps"]
    return about


def main(folder: Path) -> None:
    request = json.loads((folder / "run.json").read_text())
    work, most, side_by_side = Path(request.pop("work")), request.pop("most"), request.pop("side_by_side")
    run = Run(**request | {"contexts": tuple(request["contexts"])})
    corpus = write_corpus(run.corpus, work, run.tokenizer == "bpe", most)
    settings = settings_of(run, corpus, folder)
    if not (folder / "train" / "model" / "config.json").is_file() and train(settings) is None:
        sys.exit("stopped")
    torch._dynamo.reset()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(str(folder / "train"), device, "float32")
    (index,) = (folder / "train" / "data").glob("tokens-*/train/index.json")
    tokens = json.loads(index.read_text())["tokens"]
    scores, positions = evaluate(run, corpus, model, tokenizer)
    row = describe(run, settings, folder, model, tokens) | {"side_by_side": side_by_side} | scores | machine()
    unfinished = folder / ".unfinished-result.json"
    unfinished.write_text(json.dumps({"row": row, "positions": positions}, indent=1) + "\n")
    unfinished.replace(folder / "result.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
