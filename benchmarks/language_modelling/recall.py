"""Recall: multi-query associative recall (arXiv 2312.04927) against the number of pairs and the size of the state.

A row holds P pairs of a key and a value, then each key once more, among random tokens; there the value is to be
named. Two layers, as there; nothing is downloaded. Training begins with few pairs and takes more up to its middle: from
all of them at once LLaMA does not learn the task in as many steps.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.language_modelling.runs import CONSOLE, RESULT_FOLDER, Row, read_rows, write_rows

VOCABULARY = 8192
POWER = 0.01  # of the law that distances between a pair and its query follow, as in the source
TRAINING = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))  # tokens and pairs, one more each eighth, in turn
TESTS = (*TRAINING, (512, 128), (1024, 256))
WIDTHS = (128, 64, 256)
RATES = (1e-3, 3e-3)
BATCH_TOKENS = 16384
TEST_ROWS = 1024
# By name: width of a head, what differs. Narrow heads come with fast decays, which the task needs: a value has to be
# told apart from what came before its key.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "tnl": (16, {}),
    "hybrid": (16, {"layer_types": ["linear_attention", "full_attention"]}),
    "llama": (32, {}),
    "tnl-heads-of-32": (32, {}),
}


@dataclass(frozen=True)
class Trial:
    """One model at one learning rate."""

    model: str
    width: int
    rate: float
    steps: int = 3000
    seed: int = 0
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.model}-{self.width}-rate-{self.rate:g}"


def make_batch(rows: int, tokens: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, T], where the queries are [B, P], and the values to name there [B, P]; int64."""
    device = generator.device
    half = VOCABULARY // 2

    def draw(count: int) -> Tensor:  # without repetition in a row
        return torch.rand(rows, half, device=device, generator=generator).topk(count, dim=1).indices

    keys, values = draw(pairs), half + torch.randint(half, (rows, pairs), device=device, generator=generator)
    inputs = torch.randint(VOCABULARY, (rows, tokens), device=device, generator=generator)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    # Places behind the pairs with a chance that falls with the distance, without repetition (Gumbel's trick).
    distance = torch.arange(1, tokens - 2 * pairs + 1, device=device, dtype=torch.float64)
    chance = (POWER - 1) * distance.log()
    noise = torch.rand(rows, len(distance), device=device, generator=generator, dtype=torch.float64)
    places = 2 * pairs + (chance - (-noise.log()).log()).topk(pairs, dim=1).indices
    return inputs.scatter(1, places, keys), places, values


def build(trial: Trial) -> PreTrainedModel:
    """A model of two layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tnl.models import TnlConfig

    head_width, changes = MODELS[trial.model]
    heads = trial.width // head_width
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": trial.width, "num_hidden_layers": 2, "num_attention_heads": heads,
        "intermediate_size": 2 * trial.width, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if trial.model == "llama":
        config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=heads)
    else:
        config = TnlConfig(**sizes, **changes)
    torch.manual_seed(trial.seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def state_numbers(model: PreTrainedModel) -> int | str:
    """Numbers in the state of one sequence; softmax attention keeps keys and values that grow."""
    config = model.config
    if config.model_type != "tnl" or not all(config.is_linear(i) for i in range(config.num_hidden_layers)):
        return "grows"
    shapes = (config.state_shape(i) for i in range(config.num_hidden_layers))
    return sum(heads * keys * values for heads, keys, values in shapes)


def answer(model: PreTrainedModel, inputs: Tensor, places: Tensor) -> Tensor:
    """Logits at the queries, [B, P, V]."""
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=inputs.is_cuda):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        return model.lm_head(hidden).float()


def learn(trial: Trial) -> list[Row]:
    """Train one model and test it at each number of pairs."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    began = time.perf_counter()
    device = torch.device(trial.device)
    model = build(trial).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.rate, weight_decay=0.1, betas=(0.9, 0.95))
    generator = torch.Generator(device).manual_seed(trial.seed)
    for step in range(trial.steps):
        share = step / trial.steps
        taken = min(len(TRAINING), 1 + int(2 * share * (len(TRAINING) - 1)))
        tokens, pairs = TRAINING[step % taken]
        inputs, places, values = make_batch(BATCH_TOKENS // tokens, tokens, pairs, generator)
        loss = F.cross_entropy(answer(model, inputs, places).flatten(0, 1), values.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:  # warm-up, then linear to 0 behind the middle
            group["lr"] = trial.rate * min(1.0, (step + 1) / (0.05 * trial.steps), 2 * (1 - share))
        optimizer.step()
        optimizer.zero_grad()
    about = {name: value for name, value in dataclasses.asdict(trial).items() if name != "device"}
    about["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    about["state"] = state_numbers(model)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = [
        {"trial": trial.name} | about | {"tokens": tokens, "pairs": pairs, "accuracy": test(model, tokens, pairs)}
        for tokens, pairs in TESTS
    ]
    seconds = time.perf_counter() - began
    return [row | {"seconds": seconds, "device": device_name, "torch": torch.__version__} for row in rows]


@torch.no_grad()
def test(model: PreTrainedModel, tokens: int, pairs: int) -> float:
    """Share of the values that are named, on rows that were not trained on."""
    model.eval()
    generator = torch.Generator(model.device).manual_seed(1 << 20)
    right = total = 0
    for _ in range(max(1, TEST_ROWS * tokens // BATCH_TOKENS)):
        inputs, places, values = make_batch(max(1, BATCH_TOKENS // tokens), tokens, pairs, generator)
        right += int((answer(model, inputs, places).argmax(-1) == values).sum())
        total += values.numel()
    return right / total


def trials(options: argparse.Namespace) -> list[Trial]:
    """All models, spread over the GPUs."""
    gpus = [gpu for gpu in options.gpus.split(",") if gpu]
    if not gpus and torch.cuda.is_available():
        gpus = [str(i) for i in range(torch.cuda.device_count())]
    devices = [f"cuda:{gpu}" for gpu in gpus] or ["cpu"]
    chosen = [(model, width, rate) for rate in RATES for width in WIDTHS for model in MODELS]
    return [Trial(*each, options.steps, device=devices[i % len(devices)]) for i, each in enumerate(chosen)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps of a trial")
    parser.add_argument("--gpus", default="", help="GPUs to use, such as 0,1,2; all by default")
    parser.add_argument("--slots", type=int, default=6, help="trials at a time on each GPU")
    parser.add_argument("--seconds", type=float, default=0, help="stop after this time; 0: when all is done")
    parser.add_argument("--output", type=Path, default=RESULT_FOLDER, help="folder for the table")
    parser.add_argument("--trials", nargs="*", metavar="TRIAL", help="only these, such as tnl-64-rate-0.001")
    parser.add_argument("--plot", action="store_true", help="only draw what the table holds")


def run(options: argparse.Namespace) -> None:
    """Make the trials that have no rows yet."""
    if options.plot:
        from benchmarks.language_modelling.plots import plot_recall

        plot_recall(options.output)
        return
    path = options.output / "recall.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    finished = {row["trial"] for row in read_rows(path)}
    waiting = [t for t in trials(options) if t.name not in finished and t.name in (options.trials or [t.name])]
    places = options.slots * len({trial.device for trial in waiting})
    end = time.monotonic() + options.seconds if options.seconds else None
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pool = concurrent.futures.ProcessPoolExecutor(max(1, places), context)
    try:
        futures = {pool.submit(learn, trial): trial for trial in waiting}
        timeout = None if end is None else max(1.0, end - time.monotonic())
        for future in concurrent.futures.as_completed(futures, timeout):
            name = futures[future].name
            if future.exception() is not None:  # the others go on
                CONSOLE.print(f"{name} failed: {future.exception()!r}", highlight=False, markup=False)
                continue
            write_rows(path, read_rows(path) + future.result())
            scores = " ".join(f"{row['pairs']}: {row['accuracy']:.3f}" for row in future.result())
            CONSOLE.print(f"{name} {scores}", highlight=False)
    except TimeoutError:
        CONSOLE.print("the time is up: the trials that were not finished are left out", highlight=False)
    finally:
        for process in (pool._processes or {}).values():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
