"""Lightning attention's walk in Gluon, for 16-bit inputs on Hopper: products run while the rest is computed.

It is the walk of :mod:`tnl.ops.walk_triton`, with its arguments, its hand-over between segments and its order of
programs; the kernels around it are the same functions. Triton waits for each product before it goes on, so on a Hopper
GPU a block takes twice as long as its products and tiles. Here they are in flight together:

- The state is held transposed, ``S^T [C, K]``. It is the left operand of ``S^T x^T`` straight from registers, so it
  never goes through shared memory; neither do the values that are added to it.
- ``S^T x^T`` and ``y x^T`` run while those values are weighted; the state is updated while the output leaves.
- A tile's memory is asked to be filled again as soon as it was read, which is a whole block before it is needed.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tnl.ops import walk_triton
from tnl.ops.launch_triton import RAGGED, describe_tokens
from tnl.ops.lightning_triton import Kernels
from tnl.ops.tiling_triton import Tiles
from tnl.ops.walk_triton import FADED, RANKED, RUN_TIME

BUFFERS = gl.constexpr(2)  # tiles of a tensor in shared memory


@gluon.jit
def _loss(log_decay):
    """``exp(log_decay) - 1``, exact next to 0."""
    small = log_decay * (1.0 + log_decay * (0.5 + log_decay * (1.0 / 6.0)))
    return gl.where(log_decay > -0.01, small, gl.exp(log_decay) - 1.0)


@gluon.jit
def _ask(tokens, batch, head, begin, end, at, column, bar, slot, go, PACKED: gl.constexpr):
    """Have a tile brought to the slot; its place as in :func:`tnl.ops.walk_triton._tile`."""
    if PACKED:
        tma.async_copy_global_to_shared(
            tokens, [RAGGED, end, head, RAGGED - (end - begin) + at, column], bar, slot, pred=go
        )
    else:
        tma.async_copy_global_to_shared(tokens, [batch, head, begin + at, column], bar, slot, pred=go)


@gluon.jit
def _fetch(
    X, Y, Z, AGAINST, x_smem, y_smem, z_smem, a_smem, ready, slot, at, go,
    batch, x_head, y_head, begin, end, column,
    WITH_X: gl.constexpr, WITH_AGAINST: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Have the tiles of the block at ``at`` brought to a slot, if ``go``."""
    x_bytes: gl.constexpr = X.block_type.nbytes if WITH_X else 0
    z_bytes: gl.constexpr = Z.block_type.nbytes * (2 if WITH_AGAINST else 1)
    bar = ready.index(slot)
    mbarrier.expect(bar, x_bytes + Y.block_type.nbytes + z_bytes, pred=go)
    if WITH_X:
        _ask(X, batch, x_head, begin, end, at, 0, bar, x_smem.index(slot), go, PACKED)
    _ask(Y, batch, y_head, begin, end, at, 0, bar, y_smem.index(slot), go, PACKED)
    _ask(Z, batch, y_head, begin, end, at, column, bar, z_smem.index(slot), go, PACKED)
    if WITH_AGAINST:
        _ask(AGAINST, batch, x_head, begin, end, at, column, bar, a_smem.index(slot), go, PACKED)


@gluon.jit
def _decays(LOG_DECAY, at, left, stride, BLOCK_T: gl.constexpr, whole: gl.constexpr):
    """Log decays of the block at ``at``, 0 beyond its tokens."""
    rows = gl.arange(0, BLOCK_T, whole)
    return gl.load(LOG_DECAY + (at + rows).to(gl.int64) * stride, (rows < left) & (at + rows >= 0), 0.0)


@gluon.jit
def _weigh(decays, weights, scale, REVERSE: gl.constexpr):
    """Put a block's running sums, and its weights in reading and being written, where all threads can read them.

    As in :func:`tnl.ops.walk_triton._weights`. Returns the block's log decay.
    """
    total = gl.associative_scan(decays, 0, _plus)
    last = gl.min(total, 0)
    rising = gl.exp(total) * scale
    falling = gl.exp(last - total)
    weights.index(0).store(total)
    weights.index(1).store(falling if REVERSE else rising)
    weights.index(2).store(rising if REVERSE else falling)
    return last


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _walk(
    X,
    Y,
    Z,
    OUT,
    DIFFERENCE,
    AGAINST,
    LOG_DECAY,
    INITIAL,
    FINAL,
    FLAG,
    batch,
    x_head,
    y_head,
    out_stride,
    decay_stride,
    state_row,
    state_column,
    rate,
    scale,
    begin,
    end,
    index,
    is_last,
    segment,
    lead,
    K,
    C,
    column_block,
    REVERSE: gl.constexpr,
    DECAY: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
    STORE_FINAL: gl.constexpr,
    PACKED: gl.constexpr,
    SPLIT: gl.constexpr,
    NEED_DIFFERENCE: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_C: gl.constexpr,
    PRECISION: gl.constexpr,
):
    """As :func:`tnl.ops.walk_triton._walk`, with the state, and the output of a block, transposed."""
    dtype: gl.constexpr = X.dtype
    num_warps: gl.constexpr = gl.num_warps()
    acc_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_K, 16])
    acc_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_T, 16])
    groups: gl.constexpr = num_warps // 4  # of warps: each has queries of its own in the scores
    acc_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, groups], [16, BLOCK_T // groups, 16])
    from_state: gl.constexpr = gl.DotOperandLayout(0, acc_out, 2)
    from_z: gl.constexpr = gl.DotOperandLayout(0, acc_state, 2)
    of_out: gl.constexpr = gl.SliceLayout(0, acc_out)
    of_query: gl.constexpr = gl.SliceLayout(0, acc_scores)
    of_key: gl.constexpr = gl.SliceLayout(1, acc_scores)
    written: gl.constexpr = gl.SliceLayout(0, from_z)
    whole: gl.constexpr = gl.BlockedLayout([BLOCK_T // 32], [32], [num_warps], [0])
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (BLOCK_C // 8), BLOCK_C // 8], [num_warps, 1], [1, 0])
    wide_tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    column = column_block * BLOCK_C
    columns = column + gl.arange(0, BLOCK_C, gl.SliceLayout(1, acc_state))
    inner = gl.arange(0, BLOCK_K, gl.SliceLayout(0, acc_state))
    state_at = inner.to(gl.int64)[None, :] * state_row + columns[:, None] * state_column
    state_mask = (inner < K)[None, :] & (columns < C)[:, None]
    length = end - begin
    blocks = gl.cdiv(length, BLOCK_T)
    first = (blocks - 1) * BLOCK_T if REVERSE else 0
    step = -BLOCK_T if REVERSE else BLOCK_T
    LOG_DECAY += begin.to(gl.int64) * decay_stride
    OUT += begin.to(gl.int64) * out_stride

    x_smem = gl.allocate_shared_memory(dtype, [BUFFERS] + X.block_type.shape, X.layout)  # noqa: RUF005
    y_smem = gl.allocate_shared_memory(dtype, [BUFFERS] + Y.block_type.shape, Y.layout)  # noqa: RUF005
    z_smem = gl.allocate_shared_memory(dtype, [BUFFERS] + Z.block_type.shape, Z.layout)  # noqa: RUF005
    if NEED_DIFFERENCE:
        a_smem = gl.allocate_shared_memory(dtype, [BUFFERS] + AGAINST.block_type.shape, AGAINST.layout)  # noqa: RUF005
    else:
        a_smem = z_smem
    pad = gl.allocate_shared_memory(dtype, [BLOCK_T, BLOCK_C], wide_tile)
    scores_smem = pad if BLOCK_C == BLOCK_T else gl.allocate_shared_memory(dtype, [BLOCK_T, BLOCK_T], wide_tile)
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    turn = 0
    if DECAY == 2:
        in_a_row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        weights = gl.allocate_shared_memory(gl.float32, [3, BLOCK_T], in_a_row)

    if SPLIT:
        own = gl.zeros([BLOCK_C, BLOCK_K], gl.float32, acc_state)
        decayed = 0.0
        leads = (index == 0) & (length <= lead) & (lead < segment)
        sums = (not is_last) & (not leads)
        faded = blocks * 0
        if DECAY == 1:
            decayed = rate * length
            faded = gl.maximum((decayed + FADED) / gl.minimum(rate, -1e-9), 0.0).to(gl.int32) // BLOCK_T
        if sums:
            for i in gl.static_range(BUFFERS):
                _fetch(
                    X, Y, Z, AGAINST, x_smem, y_smem, z_smem, a_smem, ready,
                    i, first + (faded + i) * step, faded + i < blocks,
                    batch, x_head, y_head, begin, end, column, False, False, PACKED,
                )  # fmt: skip
            for block in range(faded, blocks):
                at = first + block * step
                slot = turn % BUFFERS
                bar = ready.index(slot)
                y = y_smem.index(slot).reshape([BLOCK_T, BLOCK_K])
                z = z_smem.index(slot).reshape([BLOCK_T, BLOCK_C])
                token = gl.arange(0, BLOCK_T, written)
                left = length - at
                if DECAY == 2:
                    last = _weigh(_decays(LOG_DECAY, at, left, decay_stride, BLOCK_T, whole), weights, scale, REVERSE)
                    decayed += last
                    write = weights.index(2).load(written)
                else:
                    count = gl.minimum(left, BLOCK_T)
                    last = rate * count
                    if REVERSE:
                        write = gl.exp(rate * (token + 1)) * scale
                    else:
                        write = gl.exp(rate * gl.maximum(count - 1 - token, 0))
                mbarrier.wait(bar, (turn // BUFFERS) & 1)
                zw = (z.permute((1, 0)).load(from_z).to(gl.float32) * write[None, :]).to(dtype)
                own = warpgroup_mma(zw, y, own + own * _loss(last), is_async=True)
                own = warpgroup_mma_wait(0, deps=[own])
                turn += 1
                _fetch(
                    X, Y, Z, AGAINST, x_smem, y_smem, z_smem, a_smem, ready,
                    slot, at + BUFFERS * step, block + BUFFERS < blocks,
                    batch, x_head, y_head, begin, end, column, False, False, PACKED,
                )  # fmt: skip

    for i in gl.static_range(BUFFERS):
        _fetch(
            X, Y, Z, AGAINST, x_smem, y_smem, z_smem, a_smem, ready,
            (turn + i) % BUFFERS, first + i * step, i < blocks,
            batch, x_head, y_head, begin, end, column, True, NEED_DIFFERENCE, PACKED,
        )  # fmt: skip

    # Behind the first tiles: the fence before them would wait for what is on its way.
    state = gl.zeros([BLOCK_C, BLOCK_K], gl.float32, acc_state)
    if HAS_INITIAL:
        if index == 0:
            state = gl.load(INITIAL + state_at, state_mask, 0.0)
    if SPLIT:
        if index > 0:
            while gl.atomic_add(FLAG, 0, sem="acquire") < index:
                pass
            state = gl.load(FINAL + state_at, state_mask, 0.0, cache_modifier=".cg")
            gl.thread_barrier()
        if sums:
            gl.store(FINAL + state_at, state + (state * _loss(decayed) + own), state_mask)
            gl.thread_barrier()
            gl.atomic_xchg(FLAG, index + 1, sem="release")

    query = gl.arange(0, BLOCK_T, of_query)
    key = gl.arange(0, BLOCK_T, of_key)
    reader = gl.arange(0, BLOCK_T, of_out)
    token = gl.arange(0, BLOCK_T, written)
    zero = gl.zeros([BLOCK_C, BLOCK_T], gl.float32, acc_out)
    no_scores = gl.zeros([BLOCK_T, BLOCK_T], gl.float32, acc_scores)
    seen = key[:, None] >= query[None, :] if REVERSE else key[:, None] <= query[None, :]
    if DECAY == 2:  # a block's decays are asked for a block before they are weighed, so that nothing waits for them
        decays = _decays(LOG_DECAY, first, length - first, decay_stride, BLOCK_T, whole)
        last = _weigh(decays, weights, scale, REVERSE)
        decays = _decays(LOG_DECAY, first + step, length - first - step, decay_stride, BLOCK_T, whole)
    else:
        gap = (key[:, None] - query[None, :] if REVERSE else query[None, :] - key[:, None]).to(gl.float32)
        mask = scale * gl.exp(gl.where(seen, rate * gap, float("-inf")))
    for block in range(blocks):
        at = first + block * step
        left = length - at
        slot = turn % BUFFERS
        bar = ready.index(slot)
        x = x_smem.index(slot).reshape([BLOCK_T, BLOCK_K]).permute((1, 0))
        y = y_smem.index(slot).reshape([BLOCK_T, BLOCK_K])
        z = z_smem.index(slot).reshape([BLOCK_T, BLOCK_C])
        count = gl.minimum(left, BLOCK_T)
        loss = _loss(last if DECAY == 2 else rate * count)
        small = state
        shrink = 1.0
        if dtype == gl.float16:  # a small range
            largest = gl.max(gl.max(gl.abs(state), 1), 0)
            shrink = gl.exp2(-gl.maximum(gl.ceil(gl.log2(gl.maximum(largest, 1.0))) - 12.0, 0.0))
            small = state * shrink
        mbarrier.wait(bar, (turn // BUFFERS) & 1)
        inter = warpgroup_mma(gl.convert_layout(small.to(dtype), from_state), x, zero, use_acc=False, is_async=True)
        scores = warpgroup_mma(y, x, no_scores, use_acc=False, is_async=True)
        if DECAY == 2:
            write = weights.index(2).load(written)
        elif REVERSE:
            write = gl.exp(rate * (token + 1)) * scale
        else:
            write = gl.exp(rate * gl.maximum(count - 1 - token, 0))
        zw = (z.permute((1, 0)).load(from_z).to(gl.float32) * write[None, :]).to(dtype)
        if DECAY == 2:
            of_q, of_k = weights.index(0).load(of_query), weights.index(0).load(of_key)
            gap = of_k[:, None] - of_q[None, :] if REVERSE else of_q[None, :] - of_k[:, None]
            mask = scale * gl.exp(gl.where(seen, gap, float("-inf")))
        inter = warpgroup_mma_wait(1, deps=[inter])
        if DECAY == 2:
            read = weights.index(1).load(of_out)
        elif REVERSE:
            read = gl.exp(rate * gl.maximum(count - 1 - reader, 0))
        else:
            read = gl.exp(rate * (reader + 1)) * scale
        out = inter * (read * (1.0 / shrink))[None, :]
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores_smem.store((scores * mask).to(dtype))
        fence_async_shared()
        out = warpgroup_mma(z.permute((1, 0)), scores_smem, out, is_async=True)
        state = warpgroup_mma(zw, y, state + state * loss, is_async=True)
        out = warpgroup_mma_wait(1, deps=[out])
        pad.permute((1, 0)).store(out.to(dtype))
        tile = pad.load(stored)
        rows = gl.arange(0, BLOCK_T, gl.SliceLayout(1, stored))
        across = column + gl.arange(0, BLOCK_C, gl.SliceLayout(0, stored))
        gl.store(
            OUT + (at + rows).to(gl.int64)[:, None] * out_stride + across[None, :],
            tile,
            (rows < left)[:, None] & (across < C)[None, :],
        )
        if NEED_DIFFERENCE:
            # What rounding left of the output goes the same way, so that the sum is as good as that of the output.
            pad.permute((1, 0)).store((out - out.to(dtype).to(gl.float32)).to(dtype))
            against = a_smem.index(slot).reshape([BLOCK_T, BLOCK_C]).load(stored).to(gl.float32)
            difference = gl.sum((tile.to(gl.float32) + pad.load(stored).to(gl.float32)) * against, 1)
            gl.store(DIFFERENCE + (begin + at).to(gl.int64) + rows, difference, rows < left)
        if DECAY == 2:
            last = _weigh(decays, weights, scale, REVERSE)
            decays = _decays(LOG_DECAY, at + 2 * step, left - 2 * step, decay_stride, BLOCK_T, whole)
        state = warpgroup_mma_wait(0, deps=[state])
        turn += 1
        _fetch(
            X, Y, Z, AGAINST, x_smem, y_smem, z_smem, a_smem, ready,
            slot, at + BUFFERS * step, block + BUFFERS < blocks,
            batch, x_head, y_head, begin, end, column, True, NEED_DIFFERENCE, PACKED,
        )  # fmt: skip

    if SPLIT:
        if leads & (not is_last):
            gl.store(FINAL + state_at, state, state_mask)
            gl.thread_barrier()
            gl.atomic_xchg(FLAG, index + 1, sem="release")
    if STORE_FINAL:
        if is_last:
            gl.store(FINAL + state_at, state, state_mask)


@gluon.jit
def _longest(CU_SEQLENS, place, sequences):
    """Number of the sequence that is the ``place``-th longest: if those start first, none is left alone at the end."""
    pairs: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    n = gl.arange(0, RANKED, gl.SliceLayout(1, pairs))
    begin = gl.load(CU_SEQLENS + n, n < sequences, 0)
    length = gl.where(n < sequences, gl.load(CU_SEQLENS + n + 1, n < sequences, 0) - begin, -1).to(gl.int32)
    other = gl.arange(0, RANKED, gl.SliceLayout(0, pairs))
    others = gl.convert_layout(length, gl.SliceLayout(0, pairs))
    longer = (others[None, :] > length[:, None]) | (
        (others[None, :] == length[:, None]) & (other[None, :] < n[:, None])
    )
    return gl.sum(gl.where(gl.sum(longer.to(gl.int32), 1) == place, n, 0), 0)


def _around(function: Any, **names: Any) -> Any:
    """The same function with others under these names."""
    copy = types.FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__)
    return functools.update_wrapper(copy, function)  # with its annotations, which say what is constant


_locate = gluon.jit(_around(walk_triton._locate.fn, _longest=_longest))
_kernel = gluon.jit(do_not_specialize=RUN_TIME)
_forward_kernel = _kernel(_around(walk_triton._forward_kernel.fn, _walk=_walk, _locate=_locate))
_backward_kernel = _kernel(_around(walk_triton._backward_kernel.fn, _walk=_walk, _locate=_locate))
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def _describe_tokens(x: Tensor, tokens: int, width: int, packed: bool) -> TensorDescriptor:
    """As :func:`tnl.ops.launch_triton.describe_tokens`, with a layout of the tile in shared memory."""
    plain = describe_tokens(x, tokens, width, packed)
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.__dict__.update(plain.__dict__)
    descriptor.layout = gl.NVMMASharedLayout.get_default_for(plain.block_shape, _DTYPES[x.dtype])
    return descriptor


# Two programs of the first have room on a multiprocessor. The second's has one for itself, and does for all columns
# up to 128 what programs of fewer columns would each do again: reads, scores and their weights.
IN_GLUON = Kernels(_forward_kernel, _backward_kernel, _describe_tokens, Tiles(64, 64, 4, BUFFERS.value))
IN_GLUON_WIDE = IN_GLUON._replace(tiles=Tiles(64, 128, 8, BUFFERS.value), busy=0.7)
