"""The state that many tokens leave, in Triton: a weighted sum of outer products, without the outputs of a full pass.

Dimensions: B batch, T tokens, Hq heads, K rows and M columns of the state, S segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl.ops.lightning_triton import _padded, _precision, ceil_div, choose_tiles

SHORTEST_SEGMENT = 1024
MOST_SEGMENTS = 64
ZERO = -104.0  # exp of this is 0 in float32


@triton.jit(do_not_specialize=["T", "Hq", "y_group", "z_group", "segment"])
def _sum_kernel(
    Y, Z, LOG_WEIGHT, OUT, y_batch, y_token, y_head, z_batch, z_token, z_head,
    T, Hq, y_group, z_group, segment, K, M, none,
    PER_TOKEN: tl.constexpr, BEFORE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of one head's state from the tokens of one segment."""
    chain = tl.program_id(0).to(tl.int64)
    batch, head = chain // Hq, chain % Hq
    begin = tl.program_id(1) * segment
    end = tl.minimum(begin + segment, T)
    inner = tl.arange(0, BLOCK_K)
    columns = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    Y += batch * y_batch + (head // y_group) * y_head + inner[None, :]
    Z += batch * z_batch + (head // z_group) * z_head + columns[None, :]
    rate = 0.0
    if PER_TOKEN:
        LOG_WEIGHT += batch * T * Hq + head
        largest = tl.load(LOG_WEIGHT + (begin if BEFORE else end - 1).to(tl.int64) * Hq)
    else:
        rate = tl.load(LOG_WEIGHT + head)
        largest = rate * (begin + 1 if BEFORE else T - end)
    first = tl.where(largest < none, end, begin)  # where no token of this segment has a weight above 0
    state = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for at in range(first, end, BLOCK_T):
        token = at + tl.arange(0, BLOCK_T)
        inside = token < end
        if PER_TOKEN:
            weight = tl.exp(tl.load(LOG_WEIGHT + token.to(tl.int64) * Hq, inside, 0.0))
        else:
            distance = token + 1 if BEFORE else tl.maximum(T - 1 - token, 0)
            weight = tl.exp(rate * distance)
        y = tl.load(Y + token.to(tl.int64)[:, None] * y_token, inside[:, None] & (inner < K)[None, :], 0.0)
        z = tl.load(Z + token.to(tl.int64)[:, None] * z_token, inside[:, None] & (columns < M)[None, :], 0.0)
        state = tl.dot(tl.trans(y), (z * weight[:, None]).to(z.dtype), state, input_precision=PRECISION)
    OUT += ((tl.program_id(1).to(tl.int64) * tl.num_programs(0) + chain) * K + inner[:, None]) * M + columns[None, :]
    tl.store(OUT, state, (inner < K)[:, None] & (columns < M)[None, :])


def sum_up(y: Tensor, z: Tensor, log_weight: Tensor, before: bool, heads: int) -> Tensor:
    """``sum over tokens of exp(log weight) y_t z_t^T``, as in :mod:`tnl.ops.context_parallel`.

    Args:
        y: ``[B, T, *, K]`` with Hq heads or a divisor of it, the last dimension contiguous.
        z: ``[B, T, *, M]``, likewise.
        log_weight: ``[Hq]`` log decay a token, or ``[B, T, Hq]`` log weight of each token; float32.
        before: With ``[Hq]``: whether weights count from before the first token, or from behind the last.
        heads: Hq.

    Returns:
        ``[B, Hq, K, M]`` float32. Segments are summed in one order: the same result each time.
    """
    batch, tokens, _, K = y.shape
    M = z.shape[-1]
    precision = _precision(y.dtype)
    tiles = choose_tiles(K, M, y.dtype, False, False, precision == "ieee")
    segment = max(SHORTEST_SEGMENT, ceil_div(ceil_div(tokens, MOST_SEGMENTS), tiles.tokens) * tiles.tokens)
    grid = (batch * heads, ceil_div(tokens, segment), ceil_div(M, tiles.columns))
    out = torch.empty(grid[1], batch, heads, K, M, dtype=torch.float32, device=y.device)
    _sum_kernel[grid](
        y, z, log_weight.contiguous(), out, *y.stride()[:3], *z.stride()[:3],
        tokens, heads, heads // y.shape[2], heads // z.shape[2], segment, K, M, ZERO,
        PER_TOKEN=log_weight.dim() == 3, BEFORE=before, BLOCK_T=tiles.tokens, BLOCK_K=_padded(K), BLOCK_M=tiles.columns,
        PRECISION=precision, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out.sum(0)
