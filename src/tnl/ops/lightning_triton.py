"""Lightning attention in Triton: one walk over a sequence, used in both directions for output and gradients.

Dimensions: B batch, T tokens, H key/value heads, Hq query heads, D key width, E value width, N sequences,
K rows and C columns of the state of a walk, L tokens in a segment.

A program owns all K rows and some columns of one head's state and walks along the tokens in blocks, as in Lightning
Attention-2 (arXiv 2401.04658, algorithm 1): inside a block ``(x y^T * M) z``, between blocks ``x S``. The state never
leaves the chip on the way. The forward pass is one such walk; the backward pass is three in one launch, whose programs
for one head run side by side, so that what they read in common comes from the cache:

    o = A>(q, k, v)    dq = A>(do, v, k)    dk = A<(v, do, q)    dv = A<(k, q, do)

Where heads are too few to fill the chip, a sequence is cut into segments, a program each. A program first sums up its
own segment's state, waits for the state that enters it, passes on the state that leaves it, and walks. The state is
handed over in the buffer of the final state: one slot a chain, so memory does not grow with the number of segments.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- Launch policy ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """Sizes of one launch: tokens in a block, columns of the state a program owns, warps, pipeline stages."""

    tokens: int
    columns: int
    warps: int
    stages: int


def choose_tiles(rows: int, columns: int, dtype: torch.dtype) -> Tiles:
    """Tiles for a state of ``rows x columns`` (each the larger one of the passes of a launch)."""
    padded = max(16, triton.next_power_of_2(rows))
    width = min(64, max(16, triton.next_power_of_2(columns)))
    if dtype == torch.float32:
        return Tiles(32, min(width, 32), 4, 2)
    return Tiles(64, width, 8 if padded > 128 else 4, 2 if padded > 128 else 4)


BLOCK = 64  # segments are multiples of this, whatever the tile


def segment_length(tokens: int, chains: int, sequences: int, processors: int) -> int:
    """Tokens L in a segment, or ``tokens`` where the walks of whole sequences fill the chip.

    ``chains`` is the number of walks without a cut (programs of one launch), ``processors`` the number of
    multiprocessors, on which two programs run at a time.
    """
    if chains >= 2 * processors or tokens <= 4 * BLOCK:
        return tokens
    wanted = triton.cdiv(4 * processors, max(1, chains // sequences))
    length = triton.cdiv(triton.cdiv(tokens, wanted), BLOCK) * BLOCK
    return min(tokens, max(4 * BLOCK, min(length, 8 * BLOCK)))


@functools.lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# --- Kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def _decays(LOG_DECAY, rate, rows, count, stride, DECAY: tl.constexpr):
    """Running sum of the log decays of a block's tokens, held constant behind its last token."""
    if DECAY == 1:
        return rate * tl.minimum(rows + 1, count).to(tl.float32)
    return tl.cumsum(tl.load(LOG_DECAY + rows * stride, rows < count, 0.0), 0)


@triton.jit
def _tile(BASE, rows, columns, count, stride, width, PADDED: tl.constexpr):
    """Rows of a token tensor, zero behind the last token (and behind the last column where the width is padded)."""
    at = BASE + rows[:, None] * stride + columns[None, :]
    if PADDED:
        return tl.load(at, (rows < count)[:, None] & (columns < width)[None, :], 0.0)
    return tl.load(at, (rows < count)[:, None], 0.0)


@triton.jit
def _update(state, y, z, total, count, scale, DECAY: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """The state behind a block: decayed, plus the weighted sum of ``y_t z_t^T`` over the block's tokens."""
    if DECAY == 0:
        if REVERSE:
            z = (z.to(tl.float32) * scale).to(z.dtype)
        return tl.dot(tl.trans(y), z, state, input_precision=PRECISION)
    whole = tl.min(total, 0)
    weight = scale * tl.exp(total) if REVERSE else tl.exp(whole - total)
    weighted = (z * weight[:, None]).to(z.dtype)
    return tl.dot(tl.trans(y), weighted, state * tl.exp(whole), input_precision=PRECISION)


@triton.jit
def _read(x, state, PRECISION: tl.constexpr):
    """``x S`` with S rounded to the dtype of x; float16 has a small range, so there S is brought into it first."""
    if x.dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(state), 1), 0)
        shrink = tl.exp2(-tl.maximum(tl.ceil(tl.log2(tl.maximum(largest, 1.0))) - 12.0, 0.0))
        return tl.dot(x, (state * shrink).to(x.dtype)) * (1.0 / shrink)
    return tl.dot(x, state.to(x.dtype), input_precision=PRECISION)


@triton.jit
def _walk(
    X, Y, Z, OUT, DIFFERENCE, AGAINST, LOG_DECAY, INITIAL, FINAL, FLAG,
    x_stride, y_stride, z_stride, out_stride, against_stride, decay_stride, difference_stride,
    state_row, state_column, rate, scale,
    begin, end, index, is_last, K, C, column_block,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr,
    SPLIT: tl.constexpr, NEED_DIFFERENCE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, PADDED_K: tl.constexpr, PADDED_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One walk over the tokens ``begin..end`` of one head, for ``BLOCK_C`` columns of the state.

    All pointers are at the first token of the row and at this head. ``index`` counts segments along the walk.
    """
    rows = tl.arange(0, BLOCK_T)
    inner = tl.arange(0, BLOCK_K)
    columns = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    state_at = inner.to(tl.int64)[:, None] * state_row + columns[None, :] * state_column
    state_mask = (inner < K)[:, None] & (columns < C)[None, :]

    state = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    if HAS_INITIAL:
        if index == 0:
            state = tl.load(INITIAL + state_at, state_mask, 0.0)

    blocks = tl.cdiv(end - begin, BLOCK_T)
    first = begin + (blocks - 1) * BLOCK_T if REVERSE else begin
    step = -BLOCK_T if REVERSE else BLOCK_T

    if SPLIT:
        if index > 0:
            # The state of this segment alone, then the hand-over in the slot: wait, read, pass on.
            own = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
            decayed = 0.0
            if STORE_FINAL or not is_last:
                for block in range(blocks):
                    at = first + block * step
                    offset = at.to(tl.int64)
                    count = tl.minimum(end - at, BLOCK_T)
                    y = _tile(Y + offset * y_stride, rows, inner, count, y_stride, K, PADDED_K)
                    z = _tile(Z + offset * z_stride, rows, columns, count, z_stride, C, PADDED_C)
                    total = tl.zeros([BLOCK_T], tl.float32)
                    if DECAY != 0:
                        total = _decays(LOG_DECAY + offset * decay_stride, rate, rows, count, decay_stride, DECAY)
                        decayed += tl.min(total, 0)
                    own = _update(own, y, z, total, count, scale, DECAY, REVERSE, PRECISION)
            while tl.atomic_add(FLAG, 0, sem="acquire") < index:
                pass
            state = tl.load(FINAL + state_at, state_mask, 0.0, cache_modifier=".cg")
            if STORE_FINAL or not is_last:
                tl.debug_barrier()
                tl.store(FINAL + state_at, state * tl.exp(decayed) + own, state_mask)
                tl.debug_barrier()
                tl.atomic_xchg(FLAG, index + 1, sem="release")

    if DECAY == 1:
        distance = rows[None, :] - rows[:, None] if REVERSE else rows[:, None] - rows[None, :]
        fixed_mask = tl.exp(tl.where(distance >= 0, distance * rate, float("-inf")))
    for block in range(blocks):
        at = first + block * step
        offset = at.to(tl.int64)
        count = tl.minimum(end - at, BLOCK_T)
        x = _tile(X + offset * x_stride, rows, inner, count, x_stride, K, PADDED_K)
        y = _tile(Y + offset * y_stride, rows, inner, count, y_stride, K, PADDED_K)
        z = _tile(Z + offset * z_stride, rows, columns, count, z_stride, C, PADDED_C)
        scores = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        total = tl.zeros([BLOCK_T], tl.float32)
        if DECAY == 0:
            seen = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
            scores = tl.where(seen, scores, 0.0)
            read = tl.full([BLOCK_T], 1.0, tl.float32)
        else:
            total = _decays(LOG_DECAY + offset * decay_stride, rate, rows, count, decay_stride, DECAY)
            if DECAY == 1:
                scores *= fixed_mask
            else:
                gap = total[None, :] - total[:, None] if REVERSE else total[:, None] - total[None, :]
                seen = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
                scores *= tl.exp(tl.where(seen, gap, float("-inf")))
            read = tl.exp(tl.min(total, 0) - total) if REVERSE else tl.exp(total)
        # The scale belongs to the query: here the one that reads, in a walk backwards the one that is written.
        scores *= scale
        if not REVERSE:
            read *= scale
        out = _read(x, state, PRECISION) * read[:, None]
        out = tl.dot(scores.to(z.dtype), z, out, input_precision=PRECISION)
        state = _update(state, y, z, total, count, scale, DECAY, REVERSE, PRECISION)
        out_at = OUT + offset * out_stride + rows[:, None] * out_stride + columns[None, :]
        tl.store(out_at, out.to(OUT.dtype.element_ty), (rows < count)[:, None] & (columns < C)[None, :])
        if NEED_DIFFERENCE:
            against = _tile(AGAINST + offset * against_stride, rows, columns, count, against_stride, C, True)
            tl.store(
                DIFFERENCE + (offset + rows) * difference_stride, tl.sum(out * against.to(tl.float32), 1), rows < count
            )

    if SPLIT:
        if index == 0:
            tl.store(FINAL + state_at, state, state_mask)
            tl.debug_barrier()
            tl.atomic_xchg(FLAG, 1, sem="release")
    elif STORE_FINAL:
        tl.store(FINAL + state_at, state, state_mask)


@triton.jit
def _locate(
    item, CU_SEQLENS, T, segment, sequences, per_sequence, items,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Sequence, token range, place along the walk and whether it is the last of the ``item``-th segment.

    Items come in the order of the walk. A packed row is cut at every multiple of the segment length and at every
    sequence's begin ``b``, which is cut number ``n + ceil(b / segment)``; that rises with n, so a binary search finds
    the sequence. Behind the last cut there may be items without tokens: their range is empty, sequence -1.
    """
    if not PACKED:
        sequence = item % sequences
        index = item // sequences
        place = per_sequence - 1 - index if REVERSE else index
        begin = place * segment
        return sequence, begin, tl.minimum(begin + segment, T), index, index == per_sequence - 1
    if not SPLIT:
        row_begin = tl.load(CU_SEQLENS + item).to(tl.int32)
        return item, row_begin, tl.load(CU_SEQLENS + item + 1).to(tl.int32), item * 0, item >= 0
    cut = items - 1 - item if REVERSE else item
    low = 0
    high = sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if middle + tl.cdiv(tl.load(CU_SEQLENS + middle).to(tl.int32), segment) <= cut:
            low = middle
        else:
            high = middle - 1
    row_begin = tl.load(CU_SEQLENS + low).to(tl.int32)
    row_end = tl.load(CU_SEQLENS + low + 1).to(tl.int32)
    number = cut - low - tl.cdiv(row_begin, segment)
    place = row_begin // segment + number
    count = tl.maximum(tl.cdiv(row_end, segment) - row_begin // segment, 1)
    begin = tl.maximum(place * segment, row_begin)
    end = tl.minimum((place + 1) * segment, row_end)
    index = count - 1 - number if REVERSE else number
    return tl.where(number < count, low, -1), begin, end, index, index == count - 1


@triton.jit(do_not_specialize=["T", "Hq", "group", "sequences", "segment", "per_sequence", "items"])
def _forward_kernel(
    Q, K, V, O, LOG_DECAY, INITIAL, FINAL, CU_SEQLENS, FLAGS,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    scale, T, Hq, group, sequences, segment, per_sequence, items, D, E,
    DECAY: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr, PACKED: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    PADDED_D: tl.constexpr, PADDED_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``o = A>(q, k, v)``; programs ordered by segment, then head, then column block."""
    ticket = tl.program_id(0)
    blocks = tl.cdiv(E, BLOCK_C)
    if SPLIT:  # the order in which programs start, so that none waits for one that has not
        ticket = tl.atomic_add(FLAGS, 1, sem="relaxed")
    column_block = ticket % blocks
    head = (ticket // blocks) % Hq
    item = ticket // (blocks * Hq)
    sequence, begin, end, index, is_last = _locate(
        item, CU_SEQLENS, T, segment, sequences, per_sequence, items, False, PACKED, SPLIT
    )
    if sequence < 0:
        return
    batch = sequence.to(tl.int64) * (0 if PACKED else 1)
    key_head = (head // group).to(tl.int64)
    chain = sequence.to(tl.int64) * Hq + head
    rate = 0.0
    if DECAY == 1:
        rate = tl.load(LOG_DECAY + head)
    _walk(
        Q + batch * q_batch + head.to(tl.int64) * q_head,
        K + batch * k_batch + key_head * k_head,
        V + batch * v_batch + key_head * v_head,
        O + (batch * T * Hq + head) * E,
        O, O,
        LOG_DECAY + batch * T * Hq + head,
        INITIAL + chain * D * E,
        FINAL + chain * D * E,
        FLAGS + 1 + chain * blocks + column_block,
        q_token, k_token, v_token, Hq * E, 0, Hq, 0,
        E, 1, rate, scale, begin, end, index, is_last, D, E, column_block,
        False, DECAY, HAS_INITIAL, STORE_FINAL, SPLIT, False,
        BLOCK_T, BLOCK_D, BLOCK_C, PADDED_D, PADDED_E, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "Hq", "group", "sequences", "segment", "per_sequence", "items"])
def _backward_kernel(
    Q, K, V, DO, DQ, DK, DV, DIFFERENCE, LOG_DECAY, INITIAL, DFINAL, DQ_STATE, DK_STATE, DINITIAL, CU_SEQLENS, FLAGS,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, do_batch, do_token, do_head,
    scale, T, Hq, group, sequences, segment, per_sequence, items, D, E, difference_block,
    DECAY: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr, STORE_DINITIAL: tl.constexpr,
    NEED_DIFFERENCE: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, PADDED_D: tl.constexpr,
    PADDED_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dk``, ``dv`` and ``dq`` of one head side by side: the first two read the same tokens at the same time."""
    ticket = tl.program_id(0)
    d_blocks = tl.cdiv(D, BLOCK_C)
    e_blocks = tl.cdiv(E, BLOCK_C)
    blocks = 2 * d_blocks + e_blocks
    if SPLIT:
        ticket = tl.atomic_add(FLAGS, 1, sem="relaxed")
    column_block = ticket % blocks
    head = (ticket // blocks) % Hq
    item = ticket // (blocks * Hq)
    backwards = column_block < d_blocks + e_blocks
    if backwards:
        sequence, begin, end, index, is_last = _locate(
            item, CU_SEQLENS, T, segment, sequences, per_sequence, items, True, PACKED, SPLIT
        )
    else:
        sequence, begin, end, index, is_last = _locate(
            item, CU_SEQLENS, T, segment, sequences, per_sequence, items, False, PACKED, SPLIT
        )
    if sequence < 0:
        return
    batch = sequence.to(tl.int64) * (0 if PACKED else 1)
    key_head = (head // group).to(tl.int64)
    chain = sequence.to(tl.int64) * Hq + head
    token = batch * T * Hq + head
    rate = 0.0
    if DECAY == 1:
        rate = tl.load(LOG_DECAY + head)
    Q += batch * q_batch + head.to(tl.int64) * q_head
    K += batch * k_batch + key_head * k_head
    V += batch * v_batch + key_head * v_head
    DO += batch * do_batch + head.to(tl.int64) * do_head
    LOG_DECAY += token
    FLAGS += 1 + chain * blocks + column_block
    if column_block < d_blocks:
        _walk(
            V, DO, Q, DK + token * D, DIFFERENCE + token + (column_block + d_blocks) * difference_block, K,
            LOG_DECAY, DFINAL + chain * D * E, DK_STATE + chain * D * E, FLAGS,
            v_token, do_token, q_token, Hq * D, k_token, Hq, Hq,
            1, E, rate, scale, begin, end, index, is_last, E, D, column_block,
            True, DECAY, HAS_DFINAL, False, SPLIT, NEED_DIFFERENCE,
            BLOCK_T, BLOCK_E, BLOCK_C, PADDED_E, PADDED_D, PRECISION,
        )  # fmt: skip
    elif backwards:
        _walk(
            K, Q, DO, DV + token * E, DIFFERENCE, K,
            LOG_DECAY, DFINAL + chain * D * E, DINITIAL + chain * D * E, FLAGS,
            k_token, q_token, do_token, Hq * E, k_token, Hq, Hq,
            E, 1, rate, scale, begin, end, index, is_last, D, E, column_block - d_blocks,
            True, DECAY, HAS_DFINAL, STORE_DINITIAL, SPLIT, False,
            BLOCK_T, BLOCK_D, BLOCK_C, PADDED_D, PADDED_E, PRECISION,
        )  # fmt: skip
    else:
        _walk(
            DO, V, K, DQ + token * D,
            DIFFERENCE + token + (column_block - d_blocks - e_blocks) * difference_block, Q,
            LOG_DECAY, INITIAL + chain * D * E, DQ_STATE + chain * D * E, FLAGS,
            do_token, v_token, k_token, Hq * D, q_token, Hq, Hq,
            1, E, rate, scale, begin, end, index, is_last, E, D, column_block - d_blocks - e_blocks,
            False, DECAY, HAS_INITIAL, False, SPLIT, NEED_DIFFERENCE,
            BLOCK_T, BLOCK_E, BLOCK_C, PADDED_E, PADDED_D, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["Hq", "group"])
def _step_kernel(
    Q, K, V, O, LOG_DECAY, STATE, INDICES, q_row, q_head, k_row, k_head, v_row, v_head, decay_row,
    scale, Hq, group, D, E,
    DECAY: tl.constexpr, INDEXED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One token: ``S <- exp(g) S + k v^T`` in place and ``o = scale * q S``, for some columns of one head's state."""
    blocks = tl.cdiv(E, BLOCK_E)
    column_block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % Hq
    row = (tl.program_id(0) // (blocks * Hq)).to(tl.int64)
    inner = tl.arange(0, BLOCK_D)
    columns = column_block * BLOCK_E + tl.arange(0, BLOCK_E)
    O += (row * Hq + head) * E + columns
    slot = row
    if INDEXED:
        slot = tl.load(INDICES + row).to(tl.int64)
        if slot < 0:
            tl.store(O, tl.zeros([BLOCK_E], O.dtype.element_ty), columns < E)
            return
    at = STATE + (slot * Hq + head) * D * E + inner[:, None] * E + columns[None, :]
    mask = (inner < D)[:, None] & (columns < E)[None, :]
    state = tl.load(at, mask, 0.0)
    q = tl.load(Q + row * q_row + head.to(tl.int64) * q_head + inner, inner < D, 0.0).to(tl.float32)
    k = tl.load(K + row * k_row + (head // group).to(tl.int64) * k_head + inner, inner < D, 0.0).to(tl.float32)
    v = tl.load(V + row * v_row + (head // group).to(tl.int64) * v_head + columns, columns < E, 0.0).to(tl.float32)
    if DECAY:
        state *= tl.exp(tl.load(LOG_DECAY + row * decay_row + head))
    state += k[:, None] * v[None, :]
    tl.store(at, state, mask)
    o = scale * tl.sum(state * q[:, None], 0)
    tl.store(O, o.to(O.dtype.element_ty), columns < E)


# --- Launches ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """How the tokens of a launch are cut: sequences, segments a sequence, items in all, and what the kernels test."""

    sequences: int
    segment: int
    per_sequence: int
    items: int
    split: bool
    packed: bool


def _cut(q: Tensor, cu_seqlens: Tensor | None, walks: int) -> _Cut:
    """``walks``: programs for one head of one sequence that is not cut."""
    batch, tokens, heads, _ = q.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segment = segment_length(tokens, batch * heads * walks, batch, _processors(q.device))
    if segment >= tokens:
        return _Cut(sequences, tokens, 1, sequences, False, cu_seqlens is not None)
    per_sequence = triton.cdiv(tokens, segment)
    items = sequences * per_sequence if cu_seqlens is None else sequences + per_sequence
    return _Cut(sequences, segment, per_sequence, items, True, cu_seqlens is not None)


def _decay_form(log_decay: Tensor | None) -> tuple[Tensor | None, int]:
    """Log decay as contiguous float32 and its form for the kernels: 0 none, 1 one a head, 2 one a token."""
    if log_decay is None:
        return None, 0
    return log_decay.float().contiguous(), 1 if log_decay.dim() == 1 else 2


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """``(o, final_state)``; shapes as in :func:`tnl.ops.lightning_attention`."""
    batch, tokens, heads, D = q.shape
    E = v.shape[-1]
    tiles = choose_tiles(D, E, q.dtype)
    blocks = triton.cdiv(E, tiles.columns)
    cut = _cut(q, cu_seqlens, blocks)
    o = torch.empty(batch, tokens, heads, E, dtype=q.dtype, device=q.device)
    final_state = flags = None
    if return_final_state or cut.split:
        final_state = torch.empty(cut.sequences, heads, D, E, dtype=torch.float32, device=q.device)
    if cut.split:
        flags = torch.zeros(1 + cut.sequences * heads * blocks, dtype=torch.int32, device=q.device)
    log_decay, decay = _decay_form(log_decay)
    initial_state = None if initial_state is None else initial_state.contiguous()
    _forward_kernel[(cut.items * heads * blocks,)](
        q, k, v, o, _or(log_decay, o), _or(initial_state, o), _or(final_state, o), _or(cu_seqlens, o), _or(flags, o),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        scale, tokens, heads, heads // k.shape[2], cut.sequences, cut.segment, cut.per_sequence, cut.items, D, E,
        DECAY=decay, HAS_INITIAL=initial_state is not None, STORE_FINAL=return_final_state,
        PACKED=cut.packed, SPLIT=cut.split, BLOCK_T=tiles.tokens, BLOCK_D=_padded(D), BLOCK_C=tiles.columns,
        PADDED_D=_padded(D) != D, PADDED_E=E % tiles.columns != 0, PRECISION=_precision(q.dtype),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return o, final_state


def _or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer that the kernel does not follow needs a type all the same."""
    return stand_in if x is None else x


def backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    need_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``(dq, dk, dv, dinitial_state, difference)``, as :func:`tnl.ops.lightning_torch.backward`."""
    batch, tokens, heads, D = q.shape
    E, kv_heads = v.shape[-1], k.shape[2]
    tiles = choose_tiles(max(D, E), max(D, E), q.dtype)
    d_blocks, e_blocks = triton.cdiv(D, tiles.columns), triton.cdiv(E, tiles.columns)
    blocks = 2 * d_blocks + e_blocks
    cut = _cut(q, cu_seqlens, blocks)
    dq, dk = (torch.empty(batch, tokens, heads, D, dtype=q.dtype, device=q.device) for _ in range(2))
    dv = torch.empty(batch, tokens, heads, E, dtype=q.dtype, device=q.device)
    states: list[Tensor | None] = [None, None, None]
    flags = difference = None
    for i in range(3):
        if cut.split or (i == 2 and initial_state is not None):
            states[i] = torch.empty(cut.sequences, heads, D, E, dtype=torch.float32, device=q.device)
    if cut.split:
        flags = torch.zeros(1 + cut.sequences * heads * blocks, dtype=torch.int32, device=q.device)
    if need_decay:
        difference = torch.empty(2, d_blocks, batch, tokens, heads, dtype=torch.float32, device=q.device)
    log_decay, decay = _decay_form(log_decay)
    initial_state, dfinal_state = (x if x is None else x.contiguous() for x in (initial_state, dfinal_state))
    _backward_kernel[(cut.items * heads * blocks,)](
        q, k, v, do, dq, dk, dv, _or(difference, dq), _or(log_decay, dq), _or(initial_state, dq),
        _or(dfinal_state, dq), *(_or(state, dq) for state in states), _or(cu_seqlens, dq), _or(flags, dq),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
        scale, tokens, heads, heads // kv_heads, cut.sequences, cut.segment, cut.per_sequence, cut.items, D, E,
        batch * tokens * heads,
        DECAY=decay, HAS_INITIAL=initial_state is not None, HAS_DFINAL=dfinal_state is not None,
        STORE_DINITIAL=initial_state is not None, NEED_DIFFERENCE=need_decay,
        PACKED=cut.packed, SPLIT=cut.split, BLOCK_T=tiles.tokens,
        BLOCK_D=_padded(D), BLOCK_E=_padded(E), BLOCK_C=tiles.columns,
        PADDED_D=_padded(D) != D or D % tiles.columns != 0, PADDED_E=_padded(E) != E or E % tiles.columns != 0,
        PRECISION=_precision(q.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if kv_heads != heads:
        dk, dv = (x.unflatten(2, (kv_heads, -1)).sum(3) for x in (dk, dv))
    if difference is not None:
        difference = difference[0].sum(0) - difference[1].sum(0)
    return dq, dk, dv, states[2] if initial_state is not None else None, difference


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, indices: Tensor | None
) -> Tensor:
    """One token for each of N rows; ``state`` is updated in place. Shapes as in ``lightning_attention_step``."""
    rows, heads, D = q.shape
    E = v.shape[-1]
    o = torch.empty(rows, heads, E, dtype=q.dtype, device=q.device)
    if log_decay is not None:
        log_decay = log_decay.float().contiguous()
    decay_row = heads if log_decay is not None and log_decay.dim() == 2 else 0
    block = min(32, _padded(E))
    _step_kernel[(rows * heads * triton.cdiv(E, block),)](
        q, k, v, o, _or(log_decay, o), state, _or(indices, o),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], decay_row, scale, heads, heads // k.shape[1], D, E,
        DECAY=log_decay is not None, INDEXED=indices is not None, BLOCK_D=_padded(D), BLOCK_E=block, num_warps=4,
    )  # fmt: skip
    return o
