"""The fused steps of decoding in Triton; :mod:`tnl.ops.decode` checks what comes here.

Programmatic dependent launch (PDL): a kernel starts while the one before it ends, reads its weights or states, which
that one does not write, and then waits for it. Every program of every kernel waits, so that whatever came earlier is
done as well. To fetch the weights after next into the second-level cache as well made a step slower (7 %, an H200).
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tnl.ops.backends import interpreted

TILE = 8192  # weights that a program holds: with 128 threads 64 each
TURN = tl.constexpr(2 * math.pi)
FEW_PROGRAMS = 256  # fewer leave processors of an H100 without work


@triton.jit
def _linear_kernel(
    X, W, F, GATE, RESIDUAL, OUT, rows, outputs, K, x_row, gate_row, eps, activated,
    PRODUCT: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, ACTIVATE: tl.constexpr, ADD: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows; the weights are read first and once."""
    output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    inner = tl.arange(0, BLOCK_K)
    at = output.to(tl.int64)[:, None] * K + inner[None, :]
    inside = (output < outputs)[:, None] & (inner < K)[None, :]
    if PDL:
        gdc_launch_dependents()
    w = tl.load(W + at, inside, 0.0)
    if PRODUCT:
        f = tl.load(F + at, inside, 0.0)
    if PDL:
        gdc_wait()
    for row in range(rows):
        x = tl.load(X + row * x_row + inner, inner < K, 0.0).to(tl.float32)
        rstd = 1.0
        if NORM:
            rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / K + eps)
        if GATED:
            x *= tl.load(GATE + row * gate_row + inner, inner < K, 0.0).to(tl.float32)
        y = rstd * tl.sum(w.to(tl.float32) * x[None, :], 1)
        if PRODUCT:
            y *= rstd * tl.sum(f.to(tl.float32) * x[None, :], 1)
        if ACTIVATE:
            y = tl.where(output < activated, y / (1.0 + tl.exp(-y)), y)
        if ADD:
            y += tl.load(RESIDUAL + row * outputs + output, output < outputs, 0.0).to(tl.float32)
        tl.store(OUT + row * outputs + output, y.to(OUT.dtype.element_ty), output < outputs)


@triton.jit
def _attention_kernel(
    QKVU, LOG_DECAY, STATE, THETA, POSITION, OUT, H, E,
    DECAY: tl.constexpr, LRPE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of the state of one head and row. With LRPE the state is one for the cosines above one for sines."""
    row, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    inner, column = tl.arange(0, BLOCK_D), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = (inner < E)[:, None] & (column < E)[None, :]
    STATE += (row * H + head) * E * E * (2 if LRPE else 1) + inner[:, None] * E + column[None, :]
    if PDL:
        gdc_launch_dependents()
    state = tl.load(STATE, inside, 0.0)
    kept = 1.0
    if DECAY:
        kept = tl.exp(tl.load(LOG_DECAY + head))
    if LRPE:
        sines = tl.load(STATE + E * E, inside, 0.0)
        theta = tl.load(THETA + head * E + inner, inner < E, 0.0).to(tl.float64)
        angle = theta * tl.load(POSITION + row).to(tl.float64)
        angle -= tl.floor(angle / TURN) * TURN
        cosine, sine = tl.cos(angle.to(tl.float32)), tl.sin(angle.to(tl.float32))
    if PDL:
        gdc_wait()
    QKVU += row * 4 * H * E + head * E
    q = tl.load(QKVU + inner, inner < E, 0.0)
    k = tl.load(QKVU + H * E + inner, inner < E, 0.0)
    v = tl.load(QKVU + 2 * H * E + column, column < E, 0.0).to(tl.float32)
    if LRPE:  # rounded as the layer rounds them
        q_sine, k_sine = (q * sine).to(q.dtype).to(tl.float32), (k * sine).to(k.dtype).to(tl.float32)
        q, k = (q * cosine).to(q.dtype), (k * cosine).to(k.dtype)
    state = state * kept + k.to(tl.float32)[:, None] * v[None, :]
    o = tl.sum(state * q.to(tl.float32)[:, None], 0)
    tl.store(STATE, state, inside)
    if LRPE:
        sines = sines * kept + k_sine[:, None] * v[None, :]
        o += tl.sum(sines * q_sine[:, None], 0)
        tl.store(STATE + E * E, sines, inside)
    tl.store(OUT + (row * H + head) * E + column, o.to(OUT.dtype.element_ty), column < E)


@functools.cache
def _dependent_launch(device: torch.device) -> bool:
    """Whether kernels on this device may start before the one before them has ended."""
    return not interpreted() and torch.cuda.get_device_capability(device)[0] >= 9


def _options(x: Tensor) -> dict[str, bool]:
    pdl = _dependent_launch(x.device)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def linear(
    x: Tensor,
    weight: Tensor,
    factor_weight: Tensor | None,
    gate: Tensor | None,
    norm_eps: float | None,
    activated: int,
    residual: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """:func:`tnl.ops.decode.decode_linear`."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    x, other = _rows(x), x if gate is None else _rows(gate)
    block_k = triton.next_power_of_2(inputs)
    block_o = max(1, TILE // block_k // (1 if factor_weight is None else 2))
    while block_o > 1 and triton.cdiv(outputs, block_o) < FEW_PROGRAMS:
        block_o //= 2
    if out is None:
        out = x.new_empty(rows, outputs) if residual is None else residual
    _linear_kernel[(triton.cdiv(outputs, block_o),)](
        x, weight, weight if factor_weight is None else factor_weight, other, out, out,
        rows=rows, outputs=outputs, K=inputs, x_row=x.stride(0), gate_row=other.stride(0), eps=norm_eps or 0.0,
        activated=activated,
        PRODUCT=factor_weight is not None, GATED=gate is not None, NORM=norm_eps is not None, ACTIVATE=activated > 0,
        ADD=residual is not None, BLOCK_O=block_o, BLOCK_K=block_k, num_warps=4 if block_k < 8192 else 8,
        **_options(x),
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def attention(
    qkvu: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    theta: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    """:func:`tnl.ops.decode.decode_attention`."""
    rows, _, heads, width = qkvu.shape
    out = qkvu.new_empty(rows, heads * width)
    block_e = min(16 if rows * heads < 64 else 64, triton.next_power_of_2(width))
    _attention_kernel[(rows * heads, triton.cdiv(width, block_e))](
        qkvu, qkvu if log_decay is None else log_decay, state, qkvu if theta is None else theta,
        qkvu if position is None else position, out, H=heads, E=width,
        DECAY=log_decay is not None, LRPE=theta is not None,
        BLOCK_D=triton.next_power_of_2(width), BLOCK_E=block_e, num_warps=4,
        **_options(qkvu),
    )  # fmt: skip
    return out
