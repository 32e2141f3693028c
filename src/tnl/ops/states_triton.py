"""The state that many tokens leave, in Triton: a weighted sum of outer products, without the outputs of a full pass.

Dimensions: B batch, T tokens, Hq heads, K rows and M columns of the state, P parts of a sum, S segments of a sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl.ops.launch_triton import launch_kernel
from tnl.ops.tiling_triton import Tiles, ceil_div, choose_tiles, count_processors, padded_width, product_precision

SHORTEST_PART = 1024
BLOCK = 1024
PROGRAMS = 8  # a multiprocessor: few enough that their parts stay in the cache, enough to keep it busy
ZERO = -104.0  # exp of this is 0 in float32


@triton.jit(do_not_specialize=["T", "Hq", "y_group", "z_group", "parts"])
def _sum_kernel(
    Y, Z, LOG_WEIGHT, OUT, T, Hq, y_group, z_group, parts, zero,
    y_batch, y_token, y_head, z_batch, z_token, z_head, K, M,
    PER_TOKEN: tl.constexpr, BEFORE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of one head's state from the tokens of one part."""
    blocks = tl.cdiv(M, BLOCK_M)
    chain = (tl.program_id(0) // (parts * blocks)).to(tl.int64)
    index = tl.program_id(0) // blocks % parts
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
    length = tl.cdiv(tl.cdiv(high - low, parts), BLOCK_T) * BLOCK_T
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
    OUT += ((index * (tl.num_programs(0) // (parts * blocks)) + chain) * K + inner[:, None]) * M + columns[None, :]
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
        ``[P, B, Hq, K, M]`` float32, to be added up. What decay leaves of a head is shared evenly among the P parts.
    """
    batch, tokens, _, K = y.shape
    M = z.shape[-1]
    precision = product_precision(y.dtype)
    tiles = choose_tiles(K, M, y.dtype, False, False, precision == "ieee")
    programs = batch * heads * ceil_div(M, tiles.columns)
    parts = max(1, min(PROGRAMS * count_processors(y.device) // programs, tokens // SHORTEST_PART))
    out = torch.empty(parts, batch, heads, K, M, dtype=torch.float32, device=y.device)
    launch_kernel(
        _sum_kernel, programs * parts, (), (y, z, log_weight.contiguous(), out),
        (tokens, heads, heads // y.shape[2], heads // z.shape[2], parts, ZERO),
        (*y.stride()[:3], *z.stride()[:3], K, M),
        (log_weight.dim() == 3, before, tiles.tokens, padded_width(K), tiles.columns, precision),
        tiles,
    )  # fmt: skip
    return out


# --- Segments ---------------------------------------------------------------------------------------------------


@triton.jit
def _place(chain, j, Hq, segments, before):
    """Row of ``[B S, Hq]`` for the j-th segment that a chain (a head of a batch row) passes through."""
    return ((chain // Hq) * segments + tl.where(before != 0, segments - 1 - j, j)) * Hq + chain % Hq


@triton.jit(do_not_specialize=["Hq", "segments", "parts", "begun", "scale", "before"])
def _leave_kernel(
    PARTS, PASSED, BEGUN, STATE, DECAY, OWN, Hq, segments, parts, begun, scale, before, passed_row, size,
    HAS_DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one head's state: add up the parts of each segment, and pass along the segments."""
    blocks = tl.cdiv(size, BLOCK)
    chain = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    rows = (tl.num_programs(0) // blocks).to(tl.int64) * segments
    state = tl.load(BEGUN + chain * size + at, inside & (begun != 0), 0.0)
    total = 0.0
    for j in range(segments):
        row = _place(chain, j, Hq, segments, before)
        own = tl.zeros([BLOCK], tl.float32)
        for i in range(parts):
            own += tl.load(PARTS + (i * rows + row) * size + at, inside, 0.0)
        own *= scale
        tl.store(OWN + row * size + at, own, inside)
        passed = tl.load(PASSED + row // Hq * passed_row + chain % Hq)
        state = state * tl.exp(passed) + own
        total += passed
    tl.store(STATE + chain * size + at, state, inside)
    if HAS_DECAY:
        tl.store(DECAY + chain, total)


def leave(
    parts: Tensor,
    passed: Tensor,
    begun: Tensor | None,
    scale: float,
    before: bool,
    state: Tensor,
    decay: Tensor | None,
) -> Tensor:
    """As ``tnl.ops.context_parallel._leave``, in one launch."""
    count, rows, heads, K, M = parts.shape
    batch = len(state)
    own = parts[0] if count == 1 else torch.empty_like(parts[0])
    begun_here = state if begun is None else begun.contiguous()
    launch_kernel(
        _leave_kernel, batch * heads * ceil_div(K * M, BLOCK), (),
        (parts, passed, begun_here, state, state if decay is None else decay, own),
        (heads, rows // batch, count, int(begun is not None), scale, int(before)),
        (passed.stride(0), K * M),
        (decay is not None, BLOCK),
        Tiles(0, 0, 4, 1),
    )  # fmt: skip
    return own


@triton.jit(do_not_specialize=["Hq", "segments", "first", "count", "step", "begun", "before", "rank_stride"])
def _enter_kernel(
    STATES, DECAYS, BEGUN, OWN, PASSED, OUT, Hq, segments, first, count, step, begun, before, rank_stride,
    passed_row, size, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one head's state: combine what left the ranks, and pass along the segments."""
    blocks = tl.cdiv(size, BLOCK)
    chain = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    state = tl.load(BEGUN + chain * size + at, inside & (begun != 0), 0.0)
    for i in range(count):
        rank = first + i * step
        passed = tl.load(DECAYS + rank * (tl.num_programs(0) // blocks) + chain)
        state = state * tl.exp(passed) + tl.load(
            STATES + rank.to(tl.int64) * rank_stride + chain * size + at, inside, 0.0
        )
    for j in range(segments):
        row = _place(chain, j, Hq, segments, before)
        tl.store(OUT + row * size + at, state, inside)
        if j + 1 < segments:
            passed = tl.load(PASSED + row // Hq * passed_row + chain % Hq)
            state = state * tl.exp(passed) + tl.load(OWN + row * size + at, inside, 0.0)


def enter(
    states: Tensor,
    decays: Tensor,
    ranks: range,
    begun: Tensor | None,
    own: Tensor | None,
    passed: Tensor | None,
    segments: int,
    before: bool,
) -> Tensor:
    """As ``tnl.ops.context_parallel._enter``, in one launch."""
    batch, heads, K, M = states.shape[1:]
    out = torch.empty(batch * segments, heads, K, M, dtype=torch.float32, device=states.device)
    begun_here = out if begun is None else begun.contiguous()
    launch_kernel(
        _enter_kernel, batch * heads * ceil_div(K * M, BLOCK), (),
        (states, decays, begun_here, out if own is None else own, out if passed is None else passed, out),
        (
            heads, segments, ranks.start, len(ranks), ranks.step, int(begun is not None), int(before),
            states.stride(0),
        ),
        (0 if passed is None else passed.stride(0), K * M),
        (BLOCK,),
        Tiles(0, 0, 4, 1),
    )  # fmt: skip
    return out
