"""Bits per byte of a model on whole documents: in windows of a given context, and streamed through its state."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tnl.models import TnlForCausalLM

TOKENS_AT_ONCE = 1 << 16
STREAM_WINDOW = 1 << 14
Nats = npt.NDArray[np.float64]


@torch.inference_mode()
def nats_in_windows(model: PreTrainedModel, tokens: Tensor, context: int, fresh: int | None = None) -> Nats:
    """Loss of each token but the first in nats, with at most `context` tokens before it, [n - 1] float64.

    Args:
        model: A causal model in evaluation mode.
        tokens: A document, [n] int64 on the model's device.
        context: Tokens of a window.
        fresh: Tokens that each window after the first adds; all of them by default, so that windows do not overlap.
    """
    fresh = fresh or context
    length = len(tokens) - 1
    context = min(context, length)
    starts = torch.arange(0, max(1, length - (context - fresh)), fresh, device=tokens.device)
    nats = torch.zeros(length, dtype=torch.float64, device=tokens.device)
    places = torch.arange(context, device=tokens.device)
    for some in starts.split(max(1, TOKENS_AT_ONCE // context)):
        where = some[:, None] + places  # [B, C]
        valid = where < length
        where = where.clamp(max=length - 1)
        loss = _nats(model, tokens[where], tokens[where + 1])[0]
        # The first window's tokens are all new; of another one only the last `fresh` are.
        new = valid & ((some[:, None] == 0) | (places >= context - fresh))
        nats[where[new]] = loss[new]
    return nats.cpu().numpy()


@torch.inference_mode()
def nats_streamed(model: TnlForCausalLM, tokens: Tensor, window: int = STREAM_WINDOW) -> Nats:
    """Loss of each token but the first in nats with the whole document before it, [n - 1] float64.

    The cache is carried from window to window: a state of constant size in layers of linear attention.
    """
    cache, losses = None, []
    for inputs, targets in zip(tokens[:-1].split(window), tokens[1:].split(window), strict=True):
        loss, cache = _nats(model, inputs[None], targets[None], cache, use_cache=True)
        losses.append(loss[0])
    return torch.cat(losses).cpu().numpy()


def _nats(
    model: PreTrainedModel, inputs: Tensor, targets: Tensor, cache: object = None, use_cache: bool = False
) -> tuple[Tensor, object]:
    """Loss of each target [B, T] in float64, and the cache."""
    with half_precision(inputs.device):
        output = model(input_ids=inputs, past_key_values=cache, use_cache=use_cache)
    logits = output.logits
    # One row of logits in float32 at a time.
    rows = [F.cross_entropy(row.float(), wanted, reduction="none") for row, wanted in zip(logits, targets, strict=True)]
    return torch.stack(rows).double(), output.past_key_values if use_cache else None


def half_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Matrix products in bfloat16 on a GPU, as in training."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def bits_per_byte(nats: list[Nats], text_bytes: int) -> float:
    """Bits of all tokens over the bytes of the text."""
    return sum(float(each.sum()) for each in nats) / math.log(2) / text_bytes


def by_position(nats: list[Nats], bytes_of: list[npt.NDArray[np.int64]]) -> Iterator[tuple[int, int, float]]:
    """First position, end and bits per byte of positions [2^k, 2^(k+1)) over all documents; 0 belongs to k = 0.

    Args:
        nats: Loss of each token, a document each.
        bytes_of: Bytes that each token stands for.
    """
    longest = max(map(len, nats))
    start, stop = 0, 2
    while start < longest:
        total = sum(float(each[start:stop].sum()) for each in nats)
        text = sum(int(each[start:stop].sum()) for each in bytes_of)
        yield start, min(stop, longest), total / math.log(2) / max(1, text)
        start, stop = stop, 2 * stop
