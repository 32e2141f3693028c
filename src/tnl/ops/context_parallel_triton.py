"""The state that many tokens leave, in Triton: a weighted sum of outer products, without the outputs of a full pass.

Dimensions: B batch, T tokens, Hq heads, K rows and M columns of the state, S segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl.ops.lightning_triton import _launch, _padded, _precision, _processors, ceil_div, choose_tiles

SHORTEST_SEGMENT = 1024
PROGRAMS = 8  # a multiprocessor: few enough that their parts stay in the cache, enough to keep it busy
ZERO = -104.0  # exp of this is 0 in float32


@triton.jit(do_not_specialize=["T", "Hq", "y_group", "z_group", "segments"])
def _sum_kernel(
    Y, Z, LOG_WEIGHT, OUT, T, Hq, y_group, z_group, segments, zero,
    y_batch, y_token, y_head, z_batch, z_token, z_head, K, M,
    PER_TOKEN: tl.constexpr, BEFORE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of one head's state from the tokens of one segment."""
    blocks = tl.cdiv(M, BLOCK_M)
    chain = (tl.program_id(0) // (segments * blocks)).to(tl.int64)
    index = tl.program_id(0) // blocks % segments
    batch, head = chain // Hq, chain % Hq
    inner = tl.arange(0, BLOCK_K)
    columns = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    Y += batch * y_batch + (head // y_group) * y_head + inner[None, :]
    Z += batch * z_batch + (head // z_group) * z_head + columns[None, :]
    rate = 0.0
    low, high = 0, T  # tokens with a weight above 0
    if PER_TOKEN:
        LOG_WEIGHT += batch * T * Hq + head
    else:
        rate = tl.load(LOG_WEIGHT + head)
        reach = tl.minimum(zero / tl.minimum(rate, zero / T), T).to(tl.int32)
        if BEFORE:
            high = tl.minimum(reach + 1, T)
        else:
            low = tl.maximum(T - 1 - reach, 0)
    length = tl.cdiv(tl.cdiv(high - low, segments), BLOCK_T) * BLOCK_T
    begin = low + index * length
    end = tl.minimum(begin + length, high)
    if PER_TOKEN:
        largest = tl.load(LOG_WEIGHT + (begin if BEFORE else end - 1).to(tl.int64) * Hq, begin < end, 0.0)
        begin = tl.where(largest < zero, end, begin)
    state = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for at in range(begin, end, BLOCK_T):
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
    OUT += ((index * (tl.num_programs(0) // (segments * blocks)) + chain) * K + inner[:, None]) * M + columns[None, :]
    tl.store(OUT, state, (inner < K)[:, None] & (columns < M)[None, :])


def sum_up(y: Tensor, z: Tensor, log_weight: Tensor, before: bool, out: Tensor) -> Tensor:
    """``sum over tokens of exp(log weight) y_t z_t^T``, as in :mod:`tnl.ops.context_parallel`.

    Args:
        y: ``[B, T, *, K]`` with Hq heads or a divisor of it, the last dimension contiguous.
        z: ``[B, T, *, M]``, likewise.
        log_weight: ``[Hq]`` log decay a token, or ``[B, T, Hq]`` log weight of each token; float32.
        before: With ``[Hq]``: whether weights count from before the first token, or from behind the last.
        out: ``[B, Hq, K, M]`` float32, contiguous, to be filled.

    Returns:
        ``out``. What decay leaves of a head is shared evenly among its segments; these are summed in one order: the
        same result each time.
    """
    batch, tokens, _, K = y.shape
    heads, M = out.shape[1], z.shape[-1]
    precision = _precision(y.dtype)
    tiles = choose_tiles(K, M, y.dtype, False, False, precision == "ieee")
    programs = batch * heads * ceil_div(M, tiles.columns)
    segments = max(1, min(PROGRAMS * _processors(y.device) // programs, tokens // SHORTEST_SEGMENT))
    parts = out[None] if segments == 1 else out.new_empty(segments, *out.shape)
    _launch(
        _sum_kernel, programs * segments, (), (y, z, log_weight.contiguous(), parts),
        (tokens, heads, heads // y.shape[2], heads // z.shape[2], segments, ZERO),
        (*y.stride()[:3], *z.stride()[:3], K, M),
        (log_weight.dim() == 3, before, tiles.tokens, _padded(K), tiles.columns, precision),
        tiles,
    )  # fmt: skip
    return out if segments == 1 else torch.sum(parts, 0, out=out)
