"""Speed of generation in bfloat16: prefill and decode apart, against length and batch, TNL and LLaMA.

A decode step is set beside the time in which the device reads the weights of all matrices once. TNL decodes as
`tnl generate` does, few rows with five `fused` kernels a layer and many with the model's modules `captured` in a CUDA
graph; `fused in turn` starts each kernel after the one before it, `modules` captures nothing.
LLaMA decodes over keys and values of exactly the prompt's length, with the quickest of PyTorch's attention
implementations, captured in a CUDA graph as well.
"""

import argparse
import csv
import os
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks import RESULTS
from benchmarks.language_modelling import measurements
from benchmarks.language_modelling.measurements import Clock, Measurements, Row, free_memory, peak_gib
from benchmarks.language_modelling.speed import K, configuration
from tnl.models import TnlCache
from tnl.models.tnl.decoding_tnl import TnlDecoder, decode, prefill
from tnl.ops import decode_triton
from tnl.training.flops import matrix_parameters

OUTPUT = RESULTS / "language_modelling" / "generation.csv"
KEYS = ("part", "model", "size", "implementation", "batch", "T")


@dataclass(frozen=True)
class Case:
    """One measurement: `decode`, `prefill` or `generate` of a batch at a length of the prompt."""

    part: str
    model: str
    size: str
    implementation: str
    batch: int = 1
    tokens: int = 512


def full_cases() -> Iterator[Case]:
    """The most telling first; sizes change seldom, since each change makes new models."""
    for tokens in (512, 32 * K, 512 * K):
        yield Case("decode", "llama", "385m", "captured", tokens=tokens)
    for tokens in (512, 32 * K):
        yield Case("prefill", "llama", "385m", "modules", tokens=tokens)
    for batch in (16, 256):
        yield Case("decode", "llama", "385m", "captured", batch)
    for size in ("385m", "1b"):
        for implementation in ("captured", "fused in turn", "fused", "modules"):
            yield Case("decode", "tnl", size, implementation)
        for tokens in (32 * K, 512 * K):
            yield Case("decode", "tnl", size, "fused", tokens=tokens)
        for batch in (4, 16, 64, 256):
            yield Case("decode", "tnl", size, "captured", batch)
        yield Case("decode", "tnl", size, "fused", 4)
        for implementation in ("decode", "plain"):
            yield Case("generate", "tnl", size, implementation)
        for batch, tokens in ((1, 512), (1, 4 * K), (1, 32 * K), (1, 128 * K), (1, 512 * K), (16, 2 * K), (256, 2 * K)):
            yield Case("prefill", "tnl", size, "modules", batch, tokens)
    for size in ("385m", "1b"):
        for tokens in (512, 4 * K, 32 * K, 128 * K, 512 * K):
            yield Case("decode", "llama", size, "captured", tokens=tokens)
        for batch in (4, 16, 64, 256):
            yield Case("decode", "llama", size, "captured", batch)
        for batch in (16, 256):
            yield Case("decode", "llama", size, "captured", batch, 2 * K)
        for batch, tokens in ((1, 512), (1, 4 * K), (1, 32 * K), (1, 128 * K), (16, 2 * K), (256, 2 * K)):
            yield Case("prefill", "llama", size, "modules", batch, tokens)
    yield Case("prefill", "llama", "385m", "modules", tokens=512 * K)


def tiny_cases() -> Iterator[Case]:
    yield Case("decode", "tnl", "tiny", "modules", tokens=16)
    yield Case("generate", "tnl", "tiny", "decode", tokens=16)
    yield Case("generate", "tnl", "tiny", "plain", tokens=16)
    for model in ("tnl", "llama"):
        yield Case("prefill", model, "tiny", "modules", 2, 32)
    yield Case("decode", "llama", "tiny", "modules", 2, 32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measurements.add_arguments(parser, OUTPUT)
    parser.add_argument("--skip", nargs="*", default=[], metavar="WORD", help="leave out what has one of these words")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="of part, model, size, implementation")


def run(options: argparse.Namespace) -> None:
    if options.plot:
        plot(options.output, options.plot)
        return
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("error: there is no GPU; --tiny tries the cases out on a CPU")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    table = Measurements(options, KEYS)
    made: tuple[str, str] = ("", "")
    model: Any = None
    for case in tiny_cases() if options.tiny else full_cases():
        label: Row = {"part": case.part, "model": case.model, "size": case.size, "implementation": case.implementation}
        label |= {"batch": case.batch, "T": case.tokens}
        words = set(map(str, label.values()))
        if not set(options.only) <= words or set(options.skip) & words or not table.wanted(label):
            continue
        if made != (case.model, case.size):
            model = None
            free_memory()
            model, made = build(case), (case.model, case.size)
            floor = reading_time(model)
        free_memory()
        begin = time.perf_counter()
        try:
            row = MEASURES[case.part, case.model](model, case)
            if case.part == "decode":
                row |= {"floor_ms": floor, "ratio": row["ms"] / floor}
        except torch.OutOfMemoryError:
            row = {"error": "out of memory"}
        except Exception as error:  # the cases after it are measured all the same
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"[:200]}
        table.add(label | row | {"measured_s": time.perf_counter() - begin})


def device_of(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device


def build(case: Case) -> PreTrainedModel:
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(configuration(case.model, case.size), dtype=torch.bfloat16)
    return model.eval() if cuda else model.float().eval()


def reading_time(model: PreTrainedModel) -> float:
    """Milliseconds in which the device reads the weights of all matrices: the best of a sum and half a copy."""
    size = 2 * matrix_parameters(model)
    if not torch.cuda.is_available():
        size = min(size, 1 << 22)
    memory = torch.zeros(size // 4, dtype=torch.float32, device=device_of(model))
    other = torch.empty_like(memory)
    summed = [Clock().milliseconds(memory.sum) for _ in range(8)]
    copied = [Clock().milliseconds(partial(other.copy_, memory)) / 2 for _ in range(8)]
    return min(statistics.median(summed[2:]), statistics.median(copied[2:]))


def time_steps(step: Callable[[], Any], count: int) -> tuple[float, float, float]:
    """Median, lowest and highest time of a step in ms, each of five times so many steps in a row."""

    def several() -> None:
        for _ in range(count):
            step()

    several()
    times = [Clock().milliseconds(several) / count for _ in range(5)]
    return statistics.median(times), min(times), max(times)


def result(case: Case, times: tuple[float, float, float], tokens: int) -> Row:
    median, low, high = times
    rate = 1e3 * tokens / median
    return {"ms": median, "ms_low": low, "ms_high": high, "tokens_per_second": rate, "memory_gib": peak_gib()}


# ------------------------------------------------------------------------------------------------------------- TNL


@torch.inference_mode()
def decode_tnl(model: Any, case: Case) -> Row:
    device = device_of(model)
    tokens = torch.randint(0, model.config.vocab_size, (case.batch, case.tokens), device=device)
    cache = TnlCache(model.config)
    _, position = prefill(model, tokens, torch.ones_like(tokens), cache)
    if case.implementation == "modules":
        decoder = TnlDecoder(model, case.batch, fused=False, capture=False)
    else:
        in_turn = mock.patch.object(decode_triton, "_dependent_launch", return_value=False)
        with in_turn if case.implementation == "fused in turn" else nullcontext():
            decoder = TnlDecoder(model, case.batch, fused=case.implementation.startswith("fused"))
    decoder.load(cache, position)
    following = tokens[:, -1]
    logits = decoder.step(following).float()
    wanted = model(following[:, None], position_ids=position[:1, None], past_key_values=cache).logits[:, 0].float()
    difference = ((logits - wanted).norm() / wanted.norm()).item()
    del cache
    times = time_steps(lambda: decoder.step(following), 32 if device.type == "cuda" else 2)
    return result(case, times, case.batch) | {"difference": difference}


@torch.inference_mode()
def prefill_tnl(model: Any, case: Case) -> Row:
    tokens = torch.randint(0, model.config.vocab_size, (case.batch, case.tokens), device=device_of(model))
    mask = torch.ones_like(tokens)
    return result(case, time_prefill(lambda: prefill(model, tokens, mask, TnlCache(model.config))), tokens.numel())


def time_prefill(call: Callable[[], Any]) -> tuple[float, float, float]:
    first = Clock().milliseconds(call)
    times = [Clock().milliseconds(call) for _ in range(3)] if first < 3e3 else [first]
    return statistics.median(times), min(times), max(times)


def generate_tnl(model: Any, case: Case) -> Row:
    """256 greedy tokens through `generate`, what it does on the host included."""
    tokens = torch.randint(0, model.config.vocab_size, (case.batch, case.tokens), device=device_of(model))
    new = 256 if device_of(model).type == "cuda" else 8
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    custom = {"custom_generate": decode} if case.implementation == "decode" else {}

    def call(count: int) -> Tensor:
        return model.generate(tokens, max_new_tokens=count, min_new_tokens=count, **options, **custom)

    call(4)
    times = [Clock().milliseconds(partial(call, new)) for _ in range(3)]
    return result(case, (statistics.median(times), min(times), max(times)), case.batch * new)


# ----------------------------------------------------------------------------------------------------------- LLaMA


class LlamaStep:
    """A step of transformers' LLaMA at the end of keys and values of a fixed length, through its own modules.

    Args:
        model: The model.
        batch: Rows.
        tokens: Keys and values that a step sees, its own among them.
        attend: `q, k, v -> o`, each `[N, H, *, E]`.
    """

    def __init__(self, model: Any, batch: int, tokens: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        config, weight = model.config, model.lm_head.weight
        self.model, self.attend = model, attend
        self.heads, self.width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, batch, self.heads, tokens, self.width)
        self.kept = torch.randn(shape[2:], dtype=weight.dtype, device=weight.device).expand(shape[:2] + shape[2:])
        self.kept = self.kept.clone()
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=weight.device)
        self.position = torch.full((1, 1), tokens - 1, device=weight.device)

    def __call__(self) -> Tensor:
        x = self.model.model.embed_tokens(self.tokens)
        rotation = self.model.model.rotary_emb(x, self.position)
        for layer, (keys, values) in zip(self.model.model.layers, self.kept, strict=True):
            normed, attention = layer.input_layernorm(x), layer.self_attn
            q, k, v = (
                projection(normed).view(len(x), 1, self.heads, self.width).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, *rotation)
            keys[:, :, -1:], values[:, :, -1:] = k, v
            o = self.attend(q, keys, values).transpose(1, 2).flatten(2)
            x = x + attention.o_proj(o)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(self.model.model.norm(x))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.mT).float().softmax(-1).to(v.dtype) @ v


def fused_attention(kind: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(q, k, v)


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matrix products": plain_attention,
    "flash": partial(fused_attention, SDPBackend.FLASH_ATTENTION),
    "cuDNN": partial(fused_attention, SDPBackend.CUDNN_ATTENTION),
    "memory-efficient": partial(fused_attention, SDPBackend.EFFICIENT_ATTENTION),
}


@torch.inference_mode()
def decode_llama(model: Any, case: Case) -> Row:
    step = LlamaStep(model, case.batch, case.tokens, plain_attention)
    keys, values = step.kept[0]
    cuda = keys.is_cuda
    timings = {}
    for name, attend in ATTENTIONS.items():
        try:
            call = partial(attend, keys[:, :, -1:], keys, values)
            timings[name] = min(Clock().milliseconds(call) for _ in range(4))
        except RuntimeError:  # not for this device
            continue
    best = min(timings, key=lambda name: timings[name])
    step.attend = ATTENTIONS[best]
    times = time_steps(capture(step) if cuda else step, 32 if cuda else 2)
    return result(case, times, case.batch) | {"attention": best}


def capture(step: Callable[[], Any]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.inference_mode()
def prefill_llama(model: Any, case: Case) -> Row:
    tokens = torch.randint(0, model.config.vocab_size, (case.batch, case.tokens), device=device_of(model))
    kinds = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kinds, set_priority=True):
        times = time_prefill(lambda: model(tokens, use_cache=True, logits_to_keep=1))
    return result(case, times, tokens.numel())


MEASURES: dict[tuple[str, str], Callable[[Any, Case], Row]] = {
    ("decode", "tnl"): decode_tnl,
    ("prefill", "tnl"): prefill_tnl,
    ("generate", "tnl"): generate_tnl,
    ("decode", "llama"): decode_llama,
    ("prefill", "llama"): prefill_llama,
}


# --------------------------------------------------------------------------------------------------------- drawing


def plot(path: Path, output: Path) -> None:
    """Time of a decode step and of a prefill against the prompt, and tokens a second against the batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with path.open(newline="") as file:
        rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row["ms"]]
    device = Counter(row["device"] for row in rows).most_common(1)[0][0]
    rows = [row for row in rows if row["device"] == device]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    panels = (
        ("decode", "T", "ms", "ms a decode step, batch 1", {"batch": "1"}),
        ("prefill", "T", "ms", "ms a prefill, batch 1", {"batch": "1"}),
        ("decode", "batch", "tokens_per_second", "tokens a second, prompt of 512", {"T": "512"}),
    )
    styles = {("tnl", "fused"): "D:", ("tnl", "captured"): "o-", ("llama", "captured"): "s--"}
    for axis, (part, x, y, title, fixed) in zip(axes, panels, strict=True):
        chosen = [row for row in rows if row["part"] == part and fixed.items() <= row.items()]
        for number, size in enumerate(dict.fromkeys(row["size"] for row in rows)):
            for (model, decoding), style in styles.items():
                implementation = decoding if part == "decode" else "modules"
                keys = {"model": model, "size": size, "implementation": implementation}
                points = sorted((int(row[x]), float(row[y])) for row in chosen if keys.items() <= row.items())
                if points and (part == "decode" or decoding == "captured"):
                    label = f"{model} {size}" + (f", {decoding}" if part == "decode" else "")
                    axis.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(xlabel="tokens in the prompt" if x == "T" else "batch", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, handlelength=3.5)
    figure.suptitle(f"generation, {device}, bfloat16")
    figure.tight_layout()
    figure.savefig(output, dpi=110)
