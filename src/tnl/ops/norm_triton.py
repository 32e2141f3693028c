"""SRMSNorm with an optional gate in Triton: one kernel forward, one backward; a program takes some whole rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 65536


@triton.jit
def _forward_kernel(
    X, GATE, Y, RSTD, rows, width, eps, HAS_GATE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(X + at, inside, 0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / width + eps)
    y = x * rstd[:, None]
    if HAS_GATE:
        y *= tl.load(GATE + at, inside, 0.0).to(tl.float32)
    tl.store(Y + at, y.to(Y.dtype.element_ty), inside)
    tl.store(RSTD + row, rstd, row < rows)


@triton.jit
def _backward_kernel(
    DY, X, GATE, RSTD, DX, DGATE, rows, width, HAS_GATE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    dy = tl.load(DY + at, inside, 0.0).to(tl.float32)
    x = tl.load(X + at, inside, 0.0).to(tl.float32)
    rstd = tl.load(RSTD + row, row < rows, 0.0)[:, None]
    y = x * rstd
    if HAS_GATE:
        gate = tl.load(GATE + at, inside, 0.0).to(tl.float32)
        tl.store(DGATE + at, (dy * y).to(DGATE.dtype.element_ty), inside)
        dy *= gate
    projection = tl.sum(dy * y, 1)[:, None] / width
    tl.store(DX + at, (rstd * (dy - y * projection)).to(DX.dtype.element_ty), inside)


def _launch(rows: int, width: int) -> tuple[tuple[int], int, int, int]:
    """Grid, rows a program, padded width, warps: about 4096 values a program, 8 to 16 values a thread."""
    if width > MAX_WIDTH:
        raise ValueError(f"x: backend 'triton' takes a last dimension of at most {MAX_WIDTH}, got {width}")
    padded = 1 << (width - 1).bit_length()
    per_program = max(1, 2048 // padded)
    warps = min(16, max(4, padded * per_program // 512))
    return (-(-rows // per_program),), per_program, padded, warps


def forward(x: Tensor, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``(y, rstd)``: ``y [.., d]`` like ``x``, ``rstd [..]`` float32 (kept for the backward pass)."""
    x, gate = x.contiguous(), None if gate is None else gate.contiguous()
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        rows, width = rstd.numel(), x.shape[-1]
        grid, per_program, padded, warps = _launch(rows, width)
        _forward_kernel[grid](
            x, gate, y, rstd, rows, width, eps,
            HAS_GATE=gate is not None, ROWS=per_program, WIDTH=padded, num_warps=warps,
        )  # fmt: skip
    return y, rstd


def backward(dy: Tensor, x: Tensor, gate: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """``(dx, dgate)``; ``dgate`` is empty without a gate."""
    dy, x, gate = dy.contiguous(), x.contiguous(), None if gate is None else gate.contiguous()
    dx, dgate = torch.empty_like(x), x.new_empty(0) if gate is None else torch.empty_like(gate)
    if x.numel():
        rows, width = rstd.numel(), x.shape[-1]
        grid, per_program, padded, warps = _launch(rows, width)
        _backward_kernel[grid](
            dy, x, gate, rstd, dx, dgate, rows, width,
            HAS_GATE=gate is not None, ROWS=per_program, WIDTH=padded, num_warps=warps,
        )  # fmt: skip
    return dx, dgate
