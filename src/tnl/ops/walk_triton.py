"""The walk of lightning attention in Triton: over a sequence, in both directions, for output and gradients.

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
The sum reads keys and values once more, so a short first segment, which waits for nothing, goes without; and with a
decay constant in a head the sum leaves out what will have faded to nothing.
"""

import triton
import triton.language as tl

from tnl.ops.launch_triton import RAGGED

RANKED: tl.constexpr = tl.constexpr(16)  # so many packed sequences are sorted by length; more even out by themselves
FADED: tl.constexpr = tl.constexpr(120.0)  # exp(-120) is 0 in float32, even times 1e6


@triton.jit
def _loss(log_decay):
    """``exp(log_decay) - 1``, exact next to 0: a decay next to 1 would be rounded, alike in each block, and add up."""
    small = log_decay * (1.0 + log_decay * (0.5 + log_decay * (1.0 / 6.0)))
    return tl.where(log_decay > -0.01, small, tl.exp(log_decay) - 1.0)


@triton.jit
def _weights(LOG_DECAY, rate, at, rows, left, stride, scale, DECAY: tl.constexpr, REVERSE: tl.constexpr):
    """Weights of a block's tokens in reading the state and in being written to it, the state's log decay, running sums.

    With ``total`` the running sum of the log decays up to and with a token, a token reads the state that enters with
    ``exp(total)`` and is written to the state that leaves with ``exp(last - total)``; backwards it is the other way
    round. The scale belongs to the query: to what reads, or backwards to what is written. The block begins at token
    ``at``; ``left`` tokens are left from there on, which may be fewer than the block has.
    """
    if DECAY == 2:
        total = tl.cumsum(tl.load(LOG_DECAY + (at.to(tl.int64) + rows) * stride, rows < left, 0.0), 0)
        last = tl.min(total, 0)
        before, after = tl.exp(total) * scale, tl.exp(last - total)
    else:
        total = rows  # not used
        count = tl.minimum(left, rows.shape[0])
        last = rate * count
        before = tl.exp(rate * (rows + 1)) * scale
        after = tl.exp(rate * tl.maximum(count - 1 - rows, 0))
    if REVERSE:
        return after, before, last, total
    return before, after, last, total


@triton.jit
def _mask(total, scale, rows, REVERSE: tl.constexpr):
    """``scale * exp(total_i - total_j)`` where token i of a block sees token j, else 0 (i and j swapped backwards)."""
    gap = total[None, :] - total[:, None] if REVERSE else total[:, None] - total[None, :]
    seen = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
    return scale * tl.exp(tl.where(seen, gap, float("-inf")))


@triton.jit
def _tile(
    tokens, batch, head, begin, end, at, column, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, PACKED: tl.constexpr
):
    """Tokens of one head from ``begin + at`` on; zero from ``end`` (or the end of the row) and beyond the width.

    See :func:`describe_tokens` for what ``tokens`` is.
    """
    if PACKED:
        return tokens.load([RAGGED, end, head, RAGGED - (end - begin) + at, column]).reshape(BLOCK_T, BLOCK_W)
    else:  # not behind a return: only one branch may be compiled
        return tokens.load([batch, head, begin + at, column]).reshape(BLOCK_T, BLOCK_W)


@triton.jit
def _update(state, y, z, write, log_decay, PRECISION: tl.constexpr):
    """The state behind a block: decayed, plus the weighted sum of ``y_t z_t^T`` over the block's tokens."""
    return tl.dot(
        tl.trans(y), (z * write[:, None]).to(z.dtype), state + state * _loss(log_decay), input_precision=PRECISION
    )


@triton.jit
def _read(x, state, PRECISION: tl.constexpr):
    """``x S`` with S rounded to the dtype of x; float16 has a small range, so there S is brought into it first."""
    if x.dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(state), 1), 0)
        shrink = tl.exp2(-tl.maximum(tl.ceil(tl.log2(tl.maximum(largest, 1.0))) - 12.0, 0.0))
        return tl.dot(x, (state * shrink).to(x.dtype)) * (1.0 / shrink)
    return tl.dot(x, state.to(x.dtype), input_precision=PRECISION)


@triton.jit
def _pass_on(SLOT, mask, state, FLAG, index):
    """Leave the state for the next segment of the chain."""
    tl.store(SLOT, state, mask)
    tl.debug_barrier()
    tl.atomic_xchg(FLAG, index + 1, sem="release")


@triton.jit
def _walk(
    X, Y, Z, OUT, DIFFERENCE, AGAINST, LOG_DECAY, INITIAL, FINAL, FLAG,
    batch, x_head, y_head, out_stride, decay_stride,
    state_row, state_column, rate, scale,
    begin, end, index, is_last, segment, lead, K, C, column_block,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, NEED_DIFFERENCE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One walk over the tokens ``begin..end`` of one head, for ``BLOCK_C`` columns of the state.

    ``X``, ``Y``, ``Z`` and ``AGAINST`` are descriptors, of which ``batch``, ``x_head`` (for ``X``, ``AGAINST``) and
    ``y_head`` (for ``Y``, ``Z``) say the place. Pointers are at the first token of the row and at this head. ``index``
    counts segments along the walk.
    """
    rows = tl.arange(0, BLOCK_T)
    inner = tl.arange(0, BLOCK_K)
    column = column_block * BLOCK_C
    columns = column + tl.arange(0, BLOCK_C)
    state_at = inner.to(tl.int64)[:, None] * state_row + columns[None, :] * state_column
    state_mask = (inner < K)[:, None] & (columns < C)[None, :]

    state = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    if HAS_INITIAL:
        if index == 0:
            state = tl.load(INITIAL + state_at, state_mask, 0.0)

    length = end - begin
    blocks = tl.cdiv(length, BLOCK_T)
    first = (blocks - 1) * BLOCK_T if REVERSE else 0
    step = -BLOCK_T if REVERSE else BLOCK_T
    LOG_DECAY += begin.to(tl.int64) * decay_stride
    OUT += begin.to(tl.int64) * out_stride + rows[:, None] * out_stride + columns[None, :]

    if SPLIT:
        # The state of this segment alone, then the hand-over in the slot: wait, read, pass on.
        own = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
        decayed = 0.0
        leads = (index == 0) & (length <= lead) & (lead < segment)
        sums = (not is_last) & (not leads)
        faded = blocks * 0
        if DECAY == 1:  # what is written further from the end would be weighted by less than exp(-FADED)
            decayed = rate * length
            faded = tl.maximum((decayed + FADED) / tl.minimum(rate, -1e-9), 0.0).to(tl.int32) // BLOCK_T
        if sums:
            for block in range(faded, blocks):
                at = first + block * step
                y = _tile(Y, batch, y_head, begin, end, at, 0, BLOCK_T, BLOCK_K, PACKED)
                z = _tile(Z, batch, y_head, begin, end, at, column, BLOCK_T, BLOCK_C, PACKED)
                _, write, last, _ = _weights(
                    LOG_DECAY, rate, at, rows, length - at, decay_stride, scale, DECAY, REVERSE
                )
                own = _update(own, y, z, write, last, PRECISION)
                if DECAY == 2:
                    decayed += last
        if index > 0:
            while tl.atomic_add(FLAG, 0, sem="acquire") < index:
                pass
            state = tl.load(FINAL + state_at, state_mask, 0.0, cache_modifier=".cg")
            tl.debug_barrier()
        if sums:
            _pass_on(FINAL + state_at, state_mask, state + (state * _loss(decayed) + own), FLAG, index)

    mask = _mask(rate * rows, scale, rows, REVERSE)
    for block in range(blocks):
        at = first + block * step
        x = _tile(X, batch, x_head, begin, end, at, 0, BLOCK_T, BLOCK_K, PACKED)
        y = _tile(Y, batch, y_head, begin, end, at, 0, BLOCK_T, BLOCK_K, PACKED)
        z = _tile(Z, batch, y_head, begin, end, at, column, BLOCK_T, BLOCK_C, PACKED)
        read, write, last, total = _weights(LOG_DECAY, rate, at, rows, length - at, decay_stride, scale, DECAY, REVERSE)
        if DECAY == 2:
            mask = _mask(total, scale, rows, REVERSE)
        # In this order, and with the store last, the backward pass was a tenth faster than in others (H100).
        out = _read(x, state, PRECISION) * read[:, None]
        state = _update(state, y, z, write, last, PRECISION)
        scores = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        out = tl.dot((scores * mask).to(z.dtype), z, out, input_precision=PRECISION)
        inside = (rows < length - at)[:, None] & (columns < C)[None, :]
        tl.store(OUT + at.to(tl.int64) * out_stride, out.to(OUT.dtype.element_ty), inside)
        if NEED_DIFFERENCE:
            against = _tile(AGAINST, batch, x_head, begin, end, at, column, BLOCK_T, BLOCK_C, PACKED)
            token = (begin + at).to(tl.int64) + rows
            difference = tl.sum(out * against.to(tl.float32), 1)
            tl.store(DIFFERENCE + token, difference, at + rows < length)

    if SPLIT:
        if leads & (not is_last):
            _pass_on(FINAL + state_at, state_mask, state, FLAG, index)
    if STORE_FINAL:
        if is_last:
            tl.store(FINAL + state_at, state, state_mask)


@triton.jit
def _longest(CU_SEQLENS, place, sequences):
    """Number of the sequence that is the ``place``-th longest: if those start first, none is left alone at the end."""
    n = tl.arange(0, RANKED)
    begin = tl.load(CU_SEQLENS + n, n < sequences, 0)
    length = tl.where(n < sequences, tl.load(CU_SEQLENS + n + 1, n < sequences, 0) - begin, -1).to(tl.int32)
    longer = (length[None, :] > length[:, None]) | ((length[None, :] == length[:, None]) & (n[None, :] < n[:, None]))
    return tl.sum(tl.where(tl.sum(longer.to(tl.int32), 1) == place, n, 0), 0)


@triton.jit
def _locate(
    item, CU_SEQLENS, T, segment, lead, sequences, per_sequence, items,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sequence, token range, place along the walk and whether it is the last of the ``item``-th segment.

    Items come in the order of the walk; the first segment of a row has ``lead`` tokens. A packed row is cut at all
    ``t`` for which ``t + shift`` is a multiple of the segment length and at every sequence's begin ``b``, which is cut
    number ``n + ceil((b + shift) / segment)``; that rises with n, so a binary search finds the sequence. Behind the
    last cut there may be items without tokens: their range is empty, sequence -1.
    """
    if not PACKED:
        sequence = item % sequences
        index = item // sequences
        is_last = index == per_sequence - 1
        # From where the walk begins: the end of the sequence when it runs backwards, of its last block, that is.
        whole = tl.cdiv(T, BLOCK_T) * BLOCK_T
        near = tl.maximum(index * segment - (segment - lead), 0)
        far = tl.where(is_last, whole, index * segment + lead)
        if REVERSE:
            return sequence, whole - far, tl.minimum(whole - near, T), index, is_last
        return sequence, near, tl.minimum(far, T), index, is_last
    if not SPLIT:
        if sequences <= RANKED:
            item = _longest(CU_SEQLENS, item, sequences)
        row_begin = tl.load(CU_SEQLENS + item).to(tl.int32)
        return item, row_begin, tl.load(CU_SEQLENS + item + 1).to(tl.int32), item * 0, item >= 0
    shift = (segment - (T - lead) % segment) % segment if REVERSE else segment - lead
    cut = (items - 1 - item if REVERSE else item) + tl.cdiv(shift, segment)
    low = 0
    high = sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if middle + tl.cdiv(tl.load(CU_SEQLENS + middle).to(tl.int32) + shift, segment) <= cut:
            low = middle
        else:
            high = middle - 1
    row_begin = tl.load(CU_SEQLENS + low).to(tl.int32)
    row_end = tl.load(CU_SEQLENS + low + 1).to(tl.int32)
    number = cut - low - tl.cdiv(row_begin + shift, segment)
    place = (row_begin + shift) // segment + number
    count = tl.maximum(tl.cdiv(row_end + shift, segment) - (row_begin + shift) // segment, 1)
    begin = tl.maximum(place * segment - shift, row_begin)
    end = tl.minimum((place + 1) * segment - shift, row_end)
    index = count - 1 - number if REVERSE else number
    return tl.where(number < count, low, -1), begin, end, index, index == count - 1


RUN_TIME = ["T", "Hq", "group", "sequences", "segment", "lead", "per_sequence", "items", "difference_block"]


@triton.jit(do_not_specialize=RUN_TIME)
def _forward_kernel(
    Q, K, V, OUT, LOG_DECAY, INITIAL, FINAL, CU_SEQLENS, FLAGS,
    scale, T, Hq, group, sequences, segment, lead, per_sequence, items,
    D: tl.constexpr, E: tl.constexpr,
    TRANSPOSED: tl.constexpr, DECAY: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
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
        item, CU_SEQLENS, T, segment, lead, sequences, per_sequence, items, False, PACKED, SPLIT, BLOCK_T
    )
    if sequence < 0:
        return
    batch = sequence.to(tl.int64) * (0 if PACKED else 1)
    key_head = head // group
    chain = sequence.to(tl.int64) * Hq + head
    rate = 0.0
    if DECAY == 1:
        rate = tl.load(LOG_DECAY + head)
    _walk(
        Q, K, V, OUT + (batch * T * Hq + head) * E, OUT, OUT,
        LOG_DECAY + batch * T * Hq + head, INITIAL + chain * D * E, FINAL + chain * D * E,
        FLAGS + 1 + chain * blocks + column_block,
        sequence, head, key_head, Hq * E, Hq,
        1 if TRANSPOSED else E, D if TRANSPOSED else 1, rate, scale,
        begin, end, index, is_last, segment, lead, D, E, column_block,
        False, DECAY, HAS_INITIAL, STORE_FINAL, PACKED, SPLIT, False, BLOCK_T, BLOCK_D, BLOCK_C, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def _backward_kernel(
    Q, K, V, DO, Q_PART, K_PART, DO_PART, DQ, DK, DV, DIFFERENCE, LOG_DECAY, INITIAL, DFINAL,
    DQ_STATE, DK_STATE, DINITIAL, CU_SEQLENS, FLAGS,
    scale, T, Hq, group, sequences, segment, lead, per_sequence, items, difference_block,
    D: tl.constexpr, E: tl.constexpr,
    TRANSPOSED: tl.constexpr, DECAY: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr,
    NEED_DIFFERENCE: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, NEED_DQ: tl.constexpr,
    NEED_DINITIAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dk``, ``dv`` and ``dq`` of one head side by side: the first two read the same tokens at the same time.

    ``Q_PART``, ``K_PART`` and ``DO_PART`` are the same tensors, described in tiles of ``BLOCK_C`` columns.
    """
    ticket = tl.program_id(0)
    d_blocks = tl.cdiv(D, BLOCK_C)
    e_blocks = tl.cdiv(E, BLOCK_C)
    blocks = (2 if NEED_DQ else 1) * d_blocks + e_blocks
    if SPLIT:
        ticket = tl.atomic_add(FLAGS, 1, sem="relaxed")
    column_block = ticket % blocks
    head = (ticket // blocks) % Hq
    item = ticket // (blocks * Hq)
    backwards = column_block < d_blocks + e_blocks
    if backwards:
        sequence, begin, end, index, is_last = _locate(
            item, CU_SEQLENS, T, segment, lead, sequences, per_sequence, items, True, PACKED, SPLIT, BLOCK_T
        )
    else:
        sequence, begin, end, index, is_last = _locate(
            item, CU_SEQLENS, T, segment, lead, sequences, per_sequence, items, False, PACKED, SPLIT, BLOCK_T
        )
    if sequence < 0:
        return
    key_head = head // group
    chain = sequence.to(tl.int64) * Hq + head
    token = sequence.to(tl.int64) * (0 if PACKED else 1) * T * Hq + head
    rate = 0.0
    if DECAY == 1:
        rate = tl.load(LOG_DECAY + head)
    LOG_DECAY += token
    DIFFERENCE += (sequence.to(tl.int64) * (0 if PACKED else 1) * Hq + head) * T
    FLAGS += 1 + chain * blocks + column_block
    row = 1 if TRANSPOSED else E
    column = D if TRANSPOSED else 1
    if column_block < d_blocks:
        _walk(
            V, DO, Q_PART, DK + token * D, DIFFERENCE + (column_block + d_blocks) * difference_block, K_PART,
            LOG_DECAY, DFINAL + chain * D * E, DK_STATE + chain * D * E, FLAGS,
            sequence, key_head, head, Hq * D, Hq,
            column, row, rate, scale, begin, end, index, is_last, segment, lead, E, D, column_block,
            True, DECAY, HAS_DFINAL, False, PACKED, SPLIT, NEED_DIFFERENCE, BLOCK_T, BLOCK_E, BLOCK_C, PRECISION,
        )  # fmt: skip
    if backwards & (column_block >= d_blocks):
        _walk(
            K, Q, DO_PART, DV + token * E, DIFFERENCE, K_PART,
            LOG_DECAY, DFINAL + chain * D * E, DINITIAL + chain * D * E, FLAGS,
            sequence, key_head, head, Hq * E, Hq,
            row, column, rate, scale, begin, end, index, is_last, segment, lead, D, E, column_block - d_blocks,
            True, DECAY, HAS_DFINAL, NEED_DINITIAL, PACKED, SPLIT, False, BLOCK_T, BLOCK_D, BLOCK_C, PRECISION,
        )  # fmt: skip
    if NEED_DQ and column_block >= d_blocks + e_blocks:
        column_block -= d_blocks + e_blocks
        _walk(
            DO, V, K_PART, DQ + token * D, DIFFERENCE + column_block * difference_block, Q_PART,
            LOG_DECAY, INITIAL + chain * D * E, DQ_STATE + chain * D * E, FLAGS,
            sequence, head, key_head, Hq * D, Hq,
            column, row, rate, scale, begin, end, index, is_last, segment, lead, E, D, column_block,
            False, DECAY, HAS_INITIAL, False, PACKED, SPLIT, NEED_DIFFERENCE, BLOCK_T, BLOCK_E, BLOCK_C, PRECISION,
        )  # fmt: skip
