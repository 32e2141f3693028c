"""The four streams of a projection, queries, keys, values and gate, with SiLU on the first two.

The gradient of the projection is written in one pass: what autograd would do takes a stack of four gradients and the
derivative of SiLU, and compiled that was twice as slow (an H200).

Dimensions: B batch, T tokens, H heads, E width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnl.ops.backends import call_on_device, triton_installed


def split_streams(qkvu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``silu(q), silu(k), v, u`` of ``[B, T, 4, H, E]``, each ``[B, T, H, E]``; the last two are views.

    Differentiable once.

    Raises:
        ValueError: Not of this shape.
    """
    if qkvu.dim() != 5 or qkvu.shape[2] != 4:
        raise ValueError(f"qkvu: expected [B, T, 4, H, E], got {list(qkvu.shape)}")
    return _Split.apply(qkvu) if torch.is_grad_enabled() and qkvu.requires_grad else _split(qkvu)


def _split(qkvu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Not unbind, which the partitioner of torch.compile does not compute again in the backward pass.
    return F.silu(qkvu[:, :, 0]), F.silu(qkvu[:, :, 1]), qkvu[:, :, 2], qkvu[:, :, 3]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkvu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkvu)
        return _split(qkvu)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.ops.tnl.join_gradients(*gradients, *ctx.saved_tensors)


torch.library.define("tnl::join_gradients", "(Tensor dq, Tensor dk, Tensor dv, Tensor du, Tensor qkvu) -> Tensor")


@torch.library.impl("tnl::join_gradients", "default")
def _join(dq: Tensor, dk: Tensor, dv: Tensor, du: Tensor, qkvu: Tensor) -> Tensor:
    if qkvu.is_cuda and qkvu.dtype != torch.float64 and triton_installed():
        from tnl.ops import streams_triton

        return call_on_device(streams_triton.join_gradients, dq, dk, dv, du, qkvu)
    wide = qkvu[:, :, :2].to(torch.promote_types(qkvu.dtype, torch.float32))
    sigmoid = wide.sigmoid()
    slopes = sigmoid * (1 + wide * (1 - sigmoid))
    through = torch.stack([dq, dk], dim=2) * slopes
    return torch.cat([through.to(qkvu.dtype), torch.stack([dv, du], dim=2)], dim=2)


@torch.library.register_fake("tnl::join_gradients")
def _join_fake(dq: Tensor, dk: Tensor, dv: Tensor, du: Tensor, qkvu: Tensor) -> Tensor:
    return torch.empty_like(qkvu, memory_format=torch.contiguous_format)
