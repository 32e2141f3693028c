"""The gradients within :func:`tnl.ops.gated_linear_unit.gated_linear_unit` in Triton: read once, written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _gated_product_kernel(DPRODUCT, FACTORS, DFACTORS, PRODUCT, total, inner, BLOCK: tl.constexpr):
    """Some elements of ``[M, I]`` beside ``[M, 2 I]``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    first = at + at // inner * inner  # row r begins at 2 r I
    dproduct = tl.load(DPRODUCT + at, inside, 0.0).to(tl.float32)
    a = tl.load(FACTORS + first, inside, 0.0).to(tl.float32)
    b = tl.load(FACTORS + first + inner, inside, 0.0).to(tl.float32)
    dtype = DFACTORS.dtype.element_ty
    tl.store(DFACTORS + first, (dproduct * b).to(dtype), inside)
    tl.store(DFACTORS + first + inner, (dproduct * a).to(dtype), inside)
    tl.store(PRODUCT + at, (a * b).to(dtype), inside)


def gated_product_gradients(dproduct: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """``[M, 2 I]`` and ``[M, I]``."""
    dproduct, factors = dproduct.contiguous(), factors.contiguous()
    dfactors, product = torch.empty_like(factors), torch.empty_like(dproduct)
    total = dproduct.numel()
    _gated_product_kernel[(triton.cdiv(total, BLOCK),)](
        dproduct, factors, dfactors, product, total, dproduct.shape[-1], BLOCK=BLOCK, num_warps=8
    )
    return dfactors, product
