"""Two steps of decoding, fused for few rows: a linear layer with what stands before and after it, and the attention.

With few rows a layer takes the time of reading its weights, if nothing else stands in the way: norm, gate, activation
and residual sum are done in the same kernel, and on GPUs that can (compute capability 9.0) the next kernel reads its
weights while the one before it ends.

Dimensions: N rows, K inputs, O outputs, H heads, E width of a head, D width of its keys (E, or 2 E with LRPE).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tnl.ops.backends import resolve_backend

MOST_INPUTS = 16384  # a program holds whole rows of the weight


def decode_linear(
    x: Tensor,
    weight: Tensor,
    *,
    factor_weight: Tensor | None = None,
    gate: Tensor | None = None,
    norm_eps: float | None = None,
    activated: int = 0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``activate(W (gate * norm(x)) * (F norm(x))) + residual``, each part where it is asked for; not differentiable.

    Args:
        x: ``[N, K]`` in float32, float16 or bfloat16 (float64 with ``"torch"``); sums are in float32.
        weight: W, ``[O, K]``, contiguous, in the dtype of ``x``.
        factor_weight: F, like ``weight``: the other factor of a gated linear unit.
        gate: ``[N, K]``, multiplies ``x``.
        norm_eps: ``x / sqrt(mean(x^2) + norm_eps)`` in place of ``x``, that is SRMSNorm; None for ``x`` as it is.
        activated: SiLU on the first so many outputs.
        residual: ``[N, O]``, added in place and returned.
        out: ``[N, O]``, contiguous, to write to; not with ``residual``.
        backend: ``"torch"``, ``"triton"``, or ``"auto"``: Triton on a GPU.

    Returns:
        ``[N, O]`` in the dtype of ``x``.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    outputs = weight.shape[0]
    _check("x", x, (x.shape[0], weight.shape[-1]), weight)
    for name, given, shape in (
        ("weight", weight, (outputs, x.shape[1])),
        ("factor_weight", factor_weight, (outputs, x.shape[1])),
        ("gate", gate, tuple(x.shape)),
        ("residual", residual, (x.shape[0], outputs)),
        ("out", out, (x.shape[0], outputs)),
    ):
        if given is not None:
            _check(name, given, shape, x)
    if out is not None and residual is not None:
        raise ValueError("out: expected None with residual, which is written to")
    if not weight.is_contiguous() or not (factor_weight is None or factor_weight.is_contiguous()):
        raise ValueError("weight: expected contiguous weights")
    if resolve_backend(backend, x) == "triton":
        if x.shape[1] > MOST_INPUTS:
            raise ValueError(f"x: backend 'triton' takes at most {MOST_INPUTS} inputs, got {x.shape[1]}")
        from tnl.ops import decode_triton

        return decode_triton.linear(x, weight, factor_weight, gate, norm_eps, activated, residual, out)
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    if norm_eps is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)
    if gate is not None:
        wide = wide * gate
    y = wide @ weight.to(dtype).T
    if factor_weight is not None:
        y = y * (wide @ factor_weight.to(dtype).T)
    if activated:
        y = torch.cat([F.silu(y[:, :activated]), y[:, activated:]], dim=1)
    if residual is not None:
        return residual.copy_(residual + y)
    return y.to(x.dtype) if out is None else out.copy_(y)


def decode_attention(
    qkvu: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    theta: Tensor | None = None,
    position: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of lightning attention on what a projection gave: ``S = exp(g) S + k v^T`` in place, ``o = q S``.

    Args:
        qkvu: ``[N, 4, H, E]``: queries, keys and values; the fourth is not read.
        log_decay: ``[H]`` float32, or None for no decay.
        state: ``[N, H, D, E]`` float32 (float64 with float64 inputs), contiguous, updated in place.
        theta: ``[H, 1, E]`` float32 angles of LRPE, which make q and k twice as wide: ``[q cos, q sin]``.
        position: ``[N]`` int64, the token's position in each row; needed with ``theta``.
        backend: As in :func:`decode_linear`.

    Returns:
        ``[N, H E]`` in the dtype of ``qkvu``.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    if qkvu.dim() != 4 or qkvu.shape[1] != 4 or not qkvu.is_contiguous():
        raise ValueError(f"qkvu: expected a contiguous [N, 4, H, E], got {list(qkvu.shape)}")
    rows, _, heads, width = qkvu.shape
    wide = torch.promote_types(qkvu.dtype, torch.float32)
    shape = (rows, heads, width if theta is None else 2 * width, width)
    if state.shape != shape or state.dtype != wide or not state.is_contiguous():
        raise ValueError(f"state: expected a contiguous {list(shape)} of {wide}, got {list(state.shape)} {state.dtype}")
    if log_decay is not None and log_decay.shape != (heads,):
        raise ValueError(f"log_decay: expected [{heads}], got {list(log_decay.shape)}")
    if theta is not None and theta.shape != (heads, 1, width):
        raise ValueError(f"theta: expected [{heads}, 1, {width}], got {list(theta.shape)}")
    if theta is not None and (position is None or position.shape != (rows,)):
        raise ValueError(f"position: expected [{rows}] with theta, got {None if position is None else position.shape}")
    if resolve_backend(backend, qkvu) == "triton":
        from tnl.ops import decode_triton

        return decode_triton.attention(qkvu, log_decay, state, theta, position)
    query, key, value = (x.to(wide) for x in qkvu[:, :3].unbind(1))
    if theta is not None:
        assert position is not None
        # Reduced to one turn in float64: at a position of a million, float32 would be far off.
        angle = torch.remainder(position[:, None, None] * theta[:, 0].double(), 2 * math.pi).to(wide)
        query, key = (torch.cat([x * angle.cos(), x * angle.sin()], dim=-1).to(qkvu.dtype) for x in (query, key))
    if log_decay is not None:
        state *= log_decay.exp()[:, None, None]
    state += key.to(wide)[..., None] * value[..., None, :]
    return torch.einsum("nhd,nhde->nhe", query.to(wide), state).to(qkvu.dtype).flatten(1)


def _check(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if x.shape != shape or x.dtype != like.dtype or x.device != like.device:
        wanted = f"{list(shape)} of {like.dtype} on {like.device}"
        raise ValueError(f"{name}: expected {wanted}, got {list(x.shape)} of {x.dtype} on {x.device}")
