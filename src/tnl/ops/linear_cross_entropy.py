"""Cross-entropy of a language-model head, with the logits of one chunk of tokens in memory at a time.

The gradients are computed in the forward pass, while the logits of a chunk are there: nothing is computed twice and
nothing of size tokens x vocabulary is kept.

Dimensions: M tokens, d width of the hidden states, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnl.ops.backends import DTYPES, autocast_enabled, call_on_device, triton_installed

LOGITS_PER_CHUNK = {"cuda": 1 << 29, "cpu": 1 << 26}  # 1 GiB in 16 bits: few passes over the gradient of the head


def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """``sum_i -log softmax(hidden_states_i weight^T)[labels_i]``, summed over the labels that count.

    Logits have the dtype of the hidden states (that of autocast where it is on), as those of a linear layer have;
    the cross-entropy is computed in float32 (float64 for float64 inputs), as is the sum of the weight's gradient
    over the chunks.

    Args:
        hidden_states: ``[M, d]`` in float32, float64, float16 or bfloat16.
        weight: ``[V, d]``, the language-model head, in any of these dtypes: a head in float32 keeps a gradient in
            float32 under hidden states of 16 bits.
        labels: ``[M]`` int64, each in ``[0, V)`` or ``ignore_index``. On a GPU a label outside makes the loss NaN.
        ignore_index: Label of tokens that do not count.

    Returns:
        The sum as a scalar of float32 (float64 for float64 inputs), differentiable once in the first two.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    if hidden_states.dim() != 2 or hidden_states.dtype not in DTYPES:
        raise ValueError(f"hidden_states: expected [M, d] of floating-point numbers, got {_describe(hidden_states)}")
    width, device = hidden_states.shape[1], hidden_states.device
    if weight.dim() != 2 or weight.shape[1] != width or weight.dtype not in DTYPES or weight.device != device:
        raise ValueError(
            f"weight: expected [V, {width}] of floating-point numbers on {device}, got {_describe(weight)}"
        )
    if labels.shape != hidden_states.shape[:1] or labels.dtype != torch.int64 or labels.device != device:
        raise ValueError(f"labels: expected [{hidden_states.shape[0]}] of int64 on {device}, got {_describe(labels)}")
    if autocast_enabled(hidden_states) and hidden_states.dtype != torch.float64:
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device.type))
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_states, weight)]
    return torch.ops.tnl.linear_cross_entropy(hidden_states, weight, labels, ignore_index, *needed)[0]


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} of {str(x.dtype).removeprefix('torch.')} on {x.device}"


def _chunk_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, gradient: bool) -> Tensor:
    """Losses ``[m]`` of logits ``[m, V]``, in whose place the gradient of their sum is left where it is wanted."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="none")
    if gradient:
        counted = labels != ignore_index
        probabilities = wide.softmax(-1)
        places = torch.where(counted, labels, 0)[:, None]
        probabilities.scatter_add_(1, places, torch.full_like(places, -1, dtype=wide.dtype))
        logits.copy_(torch.where(counted[:, None], probabilities, 0.0))
    return losses


torch.library.define(
    "tnl::linear_cross_entropy",
    "(Tensor hidden_states, Tensor weight, Tensor labels, int ignore_index, bool need_dhidden, bool need_dweight) "
    "-> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("tnl::linear_cross_entropy", "default")
def _forward(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, need_dhidden: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = _chunk_cross_entropy
    if hidden_states.is_cuda and hidden_states.dtype != torch.float64 and triton_installed():
        from tnl.ops import linear_cross_entropy_triton

        chunks = linear_cross_entropy_triton.chunk_cross_entropy
    return call_on_device(_compute, hidden_states, weight, labels, ignore_index, need_dhidden, need_dweight, chunks)


def _compute(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    need_dhidden: bool,
    need_dweight: bool,
    chunk_cross_entropy: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    head = weight.to(hidden_states.dtype)
    loss = torch.zeros((), dtype=dtype, device=weight.device)
    dhidden = torch.empty_like(hidden_states) if need_dhidden else hidden_states.new_empty(0)
    dweight = weight.new_zeros(weight.shape if need_dweight else 0, dtype=dtype)
    rows = max(1, LOGITS_PER_CHUNK.get(weight.device.type, 1 << 28) // weight.shape[0])
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        logits = hidden_states[part] @ head.T
        loss += chunk_cross_entropy(logits, labels[part], ignore_index, need_dhidden or need_dweight).sum()
        if need_dhidden:
            torch.mm(logits, head, out=dhidden[part])
        if need_dweight:
            _add_product(dweight, logits.T, hidden_states[part])
    return loss, dhidden, dweight.to(weight.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the dtype of ``total``; on a GPU the product is not rounded to 16 bits before."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@torch.library.register_fake("tnl::linear_cross_entropy")
def _fake(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, need_dhidden: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return (
        hidden_states.new_empty((), dtype=dtype),
        hidden_states.new_empty(hidden_states.shape if need_dhidden else 0),
        weight.new_empty(weight.shape if need_dweight else 0),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dhidden, dweight = output
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.save_for_backward(dhidden, dweight)
    ctx.needed = inputs[4:]


def _backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = (
        saved * dloss.to(saved.dtype) if needed else None
        for saved, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
    )
    return (*gradients, None, None, None, None)


torch.library.register_autograd("tnl::linear_cross_entropy", _backward, setup_context=_save_for_backward)
