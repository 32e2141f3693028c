"""The gated linear unit of TNL with its gradient: two projections as one product, their factors' gradients in one pass.

Autograd would multiply twice with the input, sum two gradients of it, and either keep the factors' product or compute
it in a pass of its own.

Dimensions: M tokens, d width, I inner width.
"""

from typing import Any

import torch
from torch import Tensor

from tnl.ops.backends import autocast_enabled, call_on_device, triton_installed


def gated_linear_unit(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SGLU, ``((x gate^T) * (x up^T)) down^T`` (arXiv 2307.14995, section 3.1.2); differentiable once.

    Args:
        x: ``[.., d]``; under autocast it is cast to autocast's dtype first.
        gate: ``[I, d]``, in any dtype: weights are cast to that of ``x``, their gradients back.
        up: ``[I, d]``.
        down: ``[d, I]``.

    Returns:
        ``[.., d]`` in the dtype of ``x`` after the cast.

    Raises:
        ValueError: Weights that do not fit each other or ``x``.
    """
    inner, width = gate.shape
    for name, weight, shape in (("up", up, (inner, width)), ("down", down, (width, inner))):
        if weight.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(weight.shape)}")
    if x.shape[-1] != width:
        raise ValueError(f"x: expected [.., {width}], got {list(x.shape)}")
    if autocast_enabled(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _GatedLinearUnit.apply(x.reshape(-1, width), gate, up, down).view(x.shape)


class _GatedLinearUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        both, last = torch.cat([gate, up]).to(x.dtype), down.to(x.dtype)
        factors = x @ both.T
        first, second = factors.chunk(2, dim=-1)
        ctx.save_for_backward(x, factors, both, last)
        ctx.dtypes = gate.dtype, up.dtype, down.dtype
        return (first * second) @ last.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, factors, both, last = ctx.saved_tensors
        dout = gradients[0].to(x.dtype)
        dfactors, product = torch.ops.tnl.gated_product_gradients(dout @ last, factors)
        dgate, dup = (dfactors.T @ x).chunk(2)
        weights = (
            gradient.to(dtype) for gradient, dtype in zip((dgate, dup, dout.T @ product), ctx.dtypes, strict=True)
        )
        return dfactors @ both, *weights


torch.library.define("tnl::gated_product_gradients", "(Tensor dproduct, Tensor factors) -> (Tensor, Tensor)")


@torch.library.impl("tnl::gated_product_gradients", "default")
def _gradients(dproduct: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the factors ``[M, 2 I]`` and their product ``[M, I]``."""
    if factors.is_cuda and factors.dtype != torch.float64 and triton_installed():
        from tnl.ops import gated_linear_unit_triton

        return call_on_device(gated_linear_unit_triton.gated_product_gradients, dproduct, factors)
    first, second = factors.chunk(2, dim=-1)
    return torch.cat([dproduct * second, dproduct * first], dim=-1), first * second


@torch.library.register_fake("tnl::gated_product_gradients")
def _gradients_fake(dproduct: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(factors, memory_format=torch.contiguous_format), torch.empty_like(
        dproduct, memory_format=torch.contiguous_format
    )
