"""Simple RMS norm (SRMSNorm), alone and fused with a gate: contract, eager form, registration and gradient.

``srms_norm(x) = x / sqrt(mean(x^2) + eps)`` over the last dimension, without a weight (arXiv 2307.14995, eq. 8).
"""

from typing import Any

import torch
from torch import Tensor

from tnl.ops.backends import BACKENDS, DTYPES, call_on_device, interpreted, triton_installed


def srms_norm(x: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in float32 (float64 for float64 inputs).

    Args:
        x: ``[.., d]`` in float32, float64, float16 or bfloat16.
        eps: Added to the mean square; above 0.
        backend: ``"torch"``, ``"triton"`` (one fused kernel), or ``"auto"``: Triton on a GPU unless
            ``torch.compile`` is tracing, which fuses the PyTorch form with its neighbours; PyTorch elsewhere.

    Returns:
        ``[.., d]`` in the dtype of ``x``.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    return _norm(x, None, eps, backend)


def gated_srms_norm(x: Tensor, gate: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """``gate * srms_norm(x)`` in one pass: the output of a TNL attention layer (arXiv 2405.17381, section 3.3).

    Args:
        x: ``[.., d]``, all heads of a token side by side.
        gate: As ``x`` in shape, dtype and device.
        eps: Added to the mean square; above 0.
        backend: As in :func:`srms_norm`.

    Returns:
        ``[.., d]`` in the dtype of ``x``.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    if gate.shape != x.shape or gate.dtype != x.dtype or gate.device != x.device:
        raise ValueError(
            f"gate: expected {list(x.shape)} of {x.dtype} on {x.device} as x, "
            f"got {list(gate.shape)} of {gate.dtype} on {gate.device}"
        )
    return _norm(x, gate, eps, backend)


def _norm(x: Tensor, gate: Tensor | None, eps: float, backend: str) -> Tensor:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected a last dimension of at least 1, got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if eps <= 0:
        raise ValueError(f"eps: expected a value above 0, got {eps}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        fused = x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling() and triton_installed()
        backend = "triton" if fused else "torch"
    if backend == "torch":
        return _eager(x, gate, eps)
    if x.dtype == torch.float64 or not triton_installed() or not (x.is_cuda or interpreted()):
        raise ValueError(
            "backend: 'triton' needs the package triton and CUDA tensors of float32, float16 or bfloat16, "
            f"got {x.dtype} on {x.device}; use 'torch'"
        )
    return torch.ops.tnl.srms_norm(x, gate, eps)[0]


def _eager(x: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if gate is None else y * gate).to(x.dtype)


torch.library.define("tnl::srms_norm", "(Tensor x, Tensor? gate, float eps) -> (Tensor, Tensor)")
torch.library.define("tnl::srms_norm_backward", "(Tensor dy, Tensor x, Tensor? gate, Tensor rstd) -> (Tensor, Tensor)")


@torch.library.impl("tnl::srms_norm", "default")
def _forward(x: Tensor, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    from tnl.ops import norm_triton

    return call_on_device(norm_triton.forward, x, gate, eps)


@torch.library.register_fake("tnl::srms_norm")
def _forward_fake(x: Tensor, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.impl("tnl::srms_norm_backward", "default")
def _backward(dy: Tensor, x: Tensor, gate: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    from tnl.ops import norm_triton

    return call_on_device(norm_triton.backward, dy, x, gate, rstd)


@torch.library.register_fake("tnl::srms_norm_backward")
def _backward_fake(dy: Tensor, x: Tensor, gate: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((0,) if gate is None else x.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate, _ = inputs
    ctx.save_for_backward(x, gate, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, rstd = ctx.saved_tensors
    dx, dgate = torch.ops.tnl.srms_norm_backward(dy, x, gate, rstd)
    return dx, None if gate is None else dgate, None


torch.library.register_autograd("tnl::srms_norm", _differentiate, setup_context=_save_for_backward)
