"""One process that takes cases one after another: compresses, heals, measures; its rows are JSON files."""

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from benchmarks.compression.cases import HEALING_SHARE, ORIGINAL, SEARCH, Case, Scale
from tnl.compression.compress import compress
from tnl.compression.matrices import find_matrices
from tnl.compression.settings import CompressSettings
from tnl.compression.text import Rows, bits_per_byte, read_rows
from tnl.models import TnlForCausalLM
from tnl.models.tnl.decoding_tnl import TnlDecoder
from tnl.models.tnl.matrix_network import TensorNetworkEmbedding, TensorNetworkLinear
from tnl.training.config import DataSettings, ModelSettings, OptimizerSettings, ParallelSettings, TrainSettings
from tnl.training.loop import train
from tnl.training.model import choose_device, find_model_folder, load_model

Row = dict[str, Any]
DECODED_TOKENS = {"cuda": 64, "cpu": 16}
DECODED_ROWS = 16
REPEATS = 5
COMPILED = ((ORIGINAL, 1.0), (SEARCH, 0.5), ("SVD, same tools", 0.5))  # on a GPU also timed compiled


@dataclass(frozen=True)
class Place:
    """Where things are.

    Attributes:
        model: Folder of the run of the original.
        text: Prepared training text, from which calibration is not taken twice.
        calibration: Sources of calibration text.
        held_out: Sources of the text that is measured on.
        work: Folder of this benchmark.
    """

    model: Path
    text: Path
    calibration: list[str]
    held_out: list[str]
    work: Path


def machine() -> Row:
    """Device and versions, which every row names."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__, "transformers": version("transformers")}


def compress_case(case: Case, scale: Scale, place: Place) -> None:
    """Compress and measure; the row goes to `rows/` of the work folder."""
    model_folder, started = find_model_folder(str(place.model)), time.perf_counter()
    if case.method != ORIGINAL:
        settings = dict(scale.compression) | case.settings
        folder = place.work / "cases" / case.name
        compress(
            CompressSettings(
                model=str(model_folder),
                output=str(folder),
                work=str(place.work / "fits"),
                data=place.calibration,
                held_out=place.held_out,
                **settings,
            )
        )
        model_folder = folder / "model"
    seconds = round(time.perf_counter() - started, 1)
    write(place, f"{case.name}.0", measure(model_folder, scale, place, about(case, seconds, 0, 0.0)))


def heal_case(case: Case, scale: Scale, place: Place) -> None:
    """Heal at each of the rates and measure; the best row goes to `rows/` of the work folder."""
    first = json.loads((place.work / "rows" / f"{case.name}.0.json").read_text())
    folder = place.work / "cases" / case.name
    source = find_model_folder(str(place.model)) if case.method == ORIGINAL else folder / "model"
    steps = max(1, round(HEALING_SHARE * scale.steps))
    best: Row | None = None
    for rate in scale.healing_rates:
        healed = heal(source, folder / f"healed-{rate}", steps, rate, scale, place)
        row = measure(healed, scale, place, about(case, first["compress_seconds"], steps, rate))
        if best is None or row["bits_per_byte"] < best["bits_per_byte"]:
            best = row
            write(place, f"{case.name}.1", row)


def about(case: Case, seconds: float, steps: int, rate: float) -> Row:
    """The first columns of a row."""
    return {
        "method": case.method,
        "budget": case.budget,
        "compress_seconds": seconds,
        "healing_steps": steps,
        "healing_rate": rate,
    }


def heal(model: Path, output: Path, steps: int, rate: float, scale: Scale, place: Place) -> Path:
    """Train a model on as `tnl train --from` does."""
    settings = TrainSettings(
        output=str(output),
        model=ModelSettings(name=str(model)),
        data=DataSettings(train=str(place.text)),
        optimizer=OptimizerSettings(
            learning_rate=rate * scale.learning_rate,
            warmup_steps=max(1, steps // 10),
            weight_decay=0.0,
            final_ratio=0.02,
        ),
        parallel=ParallelSettings(precision=scale.precision),  # type: ignore[arg-type]
        sequence_length=scale.sequence_length,
        batch_size=scale.batch_size,
        micro_batch_size=scale.batch_size,
        steps=steps,
        seed=1,
        checkpoint_every=0,
        evaluate_rows=1,
        resume=True,
    )
    trained = train(settings)
    if trained is None:
        raise SystemExit("stopped by a signal")
    return trained


def measure(folder: Path, scale: Scale, place: Place, first: Row) -> Row:
    """Quality in float32 and after rounding to int8, and size."""
    device = choose_device("auto")
    model, tokenizer = load_model(str(folder), device, "float32")
    rows = held_out_rows(tokenizer, scale, place)
    batch = max(1, 8192 // scale.sequence_length)
    row = first | sizes(model)
    row["bits_per_byte"] = bits_per_byte(model, rows, batch, lambda _: None)
    with rounded_to_int8(model):
        row["bits_per_byte_int8"] = bits_per_byte(model, rows, batch, lambda _: None)
    return row | machine()


def measure_speed(cases: list[Case], scale: Scale, place: Place) -> None:
    """Speed and memory of the models that were written, one after another, in 16 bits (float32 on a CPU).

    What was measured before, by the same model, is not repeated.
    """
    device = choose_device("auto")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    folders = {case: place.model if case.method == ORIGINAL else place.work / "cases" / case.name for case in cases}
    rows = place.work / "rows"
    measured = [case for case in cases if (rows / f"{case.name}.0.json").exists()]
    for case in measured:
        if (rows / f"{case.name}.speed.json").exists():
            continue
        gc.collect()  # a model and its captured graph, which refer to each other
        left = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        model, tokenizer = load_model(str(folders[case] / "model"), device, dtype)
        write(place, f"{case.name}.speed", speed(model, held_out_rows(tokenizer, scale, place), left))
        del model
    for case in measured if device.type == "cuda" else []:  # last, since compiling takes a minute
        if (case.method, case.budget) in COMPILED:
            model, tokenizer = load_model(str(folders[case] / "model"), device, dtype)
            row = json.loads((rows / f"{case.name}.speed.json").read_text())
            tokens = held_out_rows(tokenizer, scale, place).tokens[:DECODED_ROWS].to(device)
            row["compiled_tokens_per_second"] = round(tokens.numel() / forward_seconds(torch.compile(model), tokens))
            write(place, f"{case.name}.speed", row)


def held_out_rows(tokenizer: PreTrainedTokenizerBase, scale: Scale, place: Place) -> Rows:
    """The same rows for every case."""
    return read_rows(place.held_out, tokenizer, scale.measured_rows, scale.sequence_length, seed=0)


def compressed_tensors(model: TnlForCausalLM) -> Iterator[tuple[nn.Parameter, int]]:
    """Parameters of the matrices that are, or could be, compressed, and the length of a row of each."""
    for name, module in model.named_modules():
        tied = name == "lm_head" and model.config.tie_word_embeddings
        if isinstance(module, TensorNetworkLinear | TensorNetworkEmbedding) and not tied:
            for core in module.parameters(recurse=False):
                yield core, core.shape[-1]
    for name in find_matrices(model):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        yield weight, weight.shape[-1]


def sizes(model: TnlForCausalLM) -> Row:
    """Parameters, and bytes of the whole model with 16 bits a number, and with 8 in the matrices."""
    tensors = list(compressed_tensors(model))
    matrices = sum(tensor.numel() for tensor, _ in tensors)
    scales = sum(tensor.numel() // length for tensor, length in tensors)  # one of 16 bits a row
    total = sum(parameter.numel() for parameter in model.parameters())
    places = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return {
        "matrix_parameters": matrices,
        "parameters": total,
        "bytes": 2 * total + places,
        "bytes_int8": 2 * (total - matrices) + matrices + 2 * scales + places,
    }


@contextmanager
@torch.no_grad()
def rounded_to_int8(model: TnlForCausalLM) -> Iterator[None]:
    """The matrices (or their cores) with entries rounded to 255 levels, the largest of each row being the last."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    for tensor, length in compressed_tensors(model):
        before.append((tensor, tensor.detach().clone()))
        flat = tensor.detach().reshape(-1, length)
        scale = (flat.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        tensor.copy_(((flat / scale).round() * scale).view_as(tensor))
    yield
    for tensor, value in before:
        tensor.copy_(value)


@torch.inference_mode()
def speed(model: TnlForCausalLM, rows: Rows, left: int) -> Row:
    """Tokens a second of a forward pass over rows and of decoding; peak memory of the forward pass.

    The forward pass is not compiled; decoding is that of `tnl generate`, on a GPU a captured graph. Of the memory the
    bytes that were in use before the model was loaded do not count.
    """
    tokens = rows.tokens[:DECODED_ROWS].to(model.device)
    cuda = model.device.type == "cuda"
    decoder, steps = TnlDecoder(model, len(tokens)), DECODED_TOKENS[model.device.type]

    def decode() -> None:
        for _ in range(steps):
            decoder.step(tokens[:, 0])

    decoding = median_seconds(decode)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    forward = forward_seconds(model, tokens)
    return {
        "tokens_per_second": round(tokens.numel() / forward),
        "decoded_tokens_per_second": round(len(tokens) * steps / decoding),
        "memory_gib": round((torch.cuda.max_memory_allocated() - left) / 2**30, 4) if cuda else None,
    }


@torch.inference_mode()
def forward_seconds(model: Callable[..., object], tokens: Tensor) -> float:
    """Of a forward pass."""
    return median_seconds(lambda: model(input_ids=tokens, use_cache=False, logits_to_keep=1))


def median_seconds(call: Callable[[], object]) -> float:
    """Median of some calls after a first one; on a CPU of the processor time, for which other programs matter less."""
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time
    seconds = []
    for _ in range(REPEATS + 1):
        started = clock()
        call()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return statistics.median(seconds[1:])


def write(place: Place, name: str, row: Row) -> None:
    """Keep a row, atomically."""
    path = place.work / "rows" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(row))
    partial.replace(path)
