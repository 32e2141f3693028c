"""The gradient of :func:`tnl.ops.streams.split_streams` in Triton: read once, written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _join_kernel(DQ, DK, DV, DU, QKVU, OUT, total, width, BLOCK: tl.constexpr):
    """Some elements of one stream: ``[tokens, width]`` into ``[tokens, 4, width]``."""
    stream = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    to = (at // width) * 4 * width + stream * width + at % width
    if stream == 0:
        gradient = tl.load(DQ + at, inside, 0.0)
    elif stream == 1:
        gradient = tl.load(DK + at, inside, 0.0)
    elif stream == 2:
        gradient = tl.load(DV + at, inside, 0.0)
    else:
        gradient = tl.load(DU + at, inside, 0.0)
    if stream < 2:
        x = tl.load(QKVU + to, inside, 0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        gradient = (gradient.to(tl.float32) * sigmoid * (1.0 + x * (1.0 - sigmoid))).to(OUT.dtype.element_ty)
    tl.store(OUT + to, gradient, inside)


def join_gradients(dq: Tensor, dk: Tensor, dv: Tensor, du: Tensor, qkvu: Tensor) -> Tensor:
    """``[B, T, 4, H, E]`` from gradients ``[B, T, H, E]`` and the projection."""
    gradients = [x.contiguous() for x in (dq, dk, dv, du)]
    qkvu = qkvu.contiguous()
    out = torch.empty_like(qkvu)
    total = gradients[0].numel()
    _join_kernel[(triton.cdiv(total, BLOCK), 4)](
        *gradients, qkvu, out, total, qkvu.shape[3] * qkvu.shape[4], BLOCK=BLOCK, num_warps=4
    )
    return out
