"""The operator's kernels on states that stay in a pool, without copies: outputs too are written where they belong.

Dimensions: N tokens laid end to end, R requests, H heads, D key width, E value width, P rows of a pool.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl.ops.launch_triton import aligned, launch_kernel, pointer_or
from tnl.ops.lightning_step_triton import _step_kernel, choose_step_tiles
from tnl.ops.lightning_triton import IN_TRITON, Kernels, _decay_form, choose_kernels
from tnl.ops.tiling_triton import Cut, Tiles, ceil_div, choose_tiles, cut_tokens, padded_width, product_precision
from tnl.ops.walk_triton import _locate, _walk
from tnl.serving.pooled import PooledStep

SHORT = 512  # tokens of a prefill up to which the time is that of reading and writing states


def choose_prefill_tiles(parts: int, width: int, dtype: torch.dtype, exact: bool, longest: int) -> Tiles:
    """Tiles for keys of ``parts width`` and values of ``width``.

    Where all prefills are short, fewer stages leave room for two programs on a multiprocessor, of which one walks while
    the other waits for its state (measured on an H200).
    """
    tiles = choose_tiles(parts * width, width, dtype, False, False, exact)
    return replace(tiles, stages=2) if longest <= SHORT else tiles


RUN_TIME = ["T", "H", "sequences", "segment", "lead", "per_sequence", "items"]


@triton.jit(do_not_specialize=RUN_TIME)
def _prefill_kernel(
    Q, K, V, OUT, LOG_DECAY, POOL, SECOND_POOL, ROWS, SECOND_ROWS, CU_SEQLENS, ORDER, FLAGS,
    T, H, sequences, segment, lead, per_sequence, items, pool_row, out_token,
    D: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As the forward kernel of :mod:`tnl.ops.walk_triton`, whose order of programs it has.

    A state is read by the programs that write it, each its own columns, before they do: one row serves as both.
    """
    ticket = tl.program_id(0)
    blocks = tl.cdiv(E, BLOCK_C)
    if SPLIT:
        ticket = tl.atomic_add(FLAGS, 1, sem="relaxed")
    column_block = ticket % blocks
    head = (ticket // blocks) % H
    item = ticket // (blocks * H)
    if PACKED and not SPLIT:
        sequence = tl.load(ORDER + item)
        begin = tl.load(CU_SEQLENS + sequence)
        end = tl.load(CU_SEQLENS + sequence + 1)
        index = item * 0
        is_last = item >= 0
    else:
        sequence, begin, end, index, is_last = _locate(
            item, CU_SEQLENS, T, segment, lead, sequences, per_sequence, items, False, PACKED, SPLIT, BLOCK_T
        )
    if sequence < 0:
        return
    state = POOL + tl.load(ROWS + sequence).to(tl.int64) * pool_row + head.to(tl.int64) * E * E
    if PARTS == 2:  # rows of the state from E on lie in the other pool
        second = SECOND_POOL + tl.load(SECOND_ROWS + sequence).to(tl.int64) * pool_row + head.to(tl.int64) * E * E
        state = tl.where((tl.arange(0, BLOCK_D) < E)[:, None], state, second - E * E)
    rate = 0.0
    if DECAY == 1:
        rate = tl.load(LOG_DECAY + head)
    _walk(
        Q, K, V, OUT + head * E, OUT, OUT, LOG_DECAY, state, state,
        FLAGS + 1 + (sequence * H + head) * blocks + column_block,
        sequence, head, head, out_token, 0, E, 1, rate, 1.0,
        begin, end, index, is_last, segment, lead, D, E, column_block,
        False, DECAY, True, True, PACKED, SPLIT, False, BLOCK_T, BLOCK_D, BLOCK_C, PRECISION,
    )  # fmt: skip


@functools.lru_cache
def _kernel_in_gluon() -> Any:
    """The prefill's kernel around the operator's walk in Gluon."""
    from triton.experimental import gluon

    from tnl.ops.lightning_gluon import _around, _locate, _walk

    return gluon.jit(_around(_prefill_kernel.fn, _walk=_walk, _locate=_locate), do_not_specialize=RUN_TIME)


def choose_prefill_kernel(
    parts: int, width: int, dtype: torch.dtype, device: torch.device, split: bool
) -> tuple[Any, Kernels]:
    """The kernel, and the operator's whose walk it is around: those of a packed forward call, ``split`` if it is cut.

    Two pools, whose rows are one state to the walk, are for the walk in Triton: in Gluon its addresses have a layout.
    """
    options = choose_kernels(width, width, dtype, device, False, False, True) if parts == 1 else (IN_TRITON,)
    kernels = options[-1 if split else 0]
    return _prefill_kernel if kernels is IN_TRITON else _kernel_in_gluon(), kernels


def _lay_out(
    q: Tensor, E: int, step: PooledStep, parts: int, decay: int, exact: bool
) -> tuple[Any, Kernels, Tiles, Cut]:
    """Kernel, whose walk it is around, tiles and cut of a prefill of ``q [1, N, H, D]``."""
    # One request alone is cut over the whole GPU, and read as a row of its own.
    bounds = step.prefill_bounds if len(step.prefill_order) > 1 else None
    for split in (False, True):
        kernel, kernels = choose_prefill_kernel(parts, E, q.dtype, q.device, split)
        tiles = kernels.tiles or choose_prefill_tiles(parts, E, q.dtype, exact, step.longest_prefill)
        cut = cut_tokens(q, bounds, ceil_div(E, tiles.columns), decay == 1)
        if not cut.split:
            break
    return kernel, kernels, tiles, cut


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    pools: Sequence[Tensor],
    steps: Sequence[PooledStep],
    output: Tensor,
) -> None:
    """Let the tokens of R requests attend to all that their requests have read; move the states on.

    Args:
        query: ``[N, H, D]``, float32, float16 or bfloat16; ``key`` alike. ``D = E len(pools)``.
        key: ``[N, H, D]``.
        value: ``[N, H, E]``.
        log_decay: ``[H]`` float32, or None for no decay.
        pools: One or two ``[P, H, E, E]`` float32 of the same strides, heads without gaps; updated in place.
        steps: The prefills, with their rows in each of the pools.
        output: ``[N, H, E]``, heads without gaps; written in place.
    """
    q, k, v = aligned(query[None]), aligned(key[None]), aligned(value[None])
    tokens, heads, D = q.shape[1:]
    E = v.shape[-1]
    log_decay, decay = _decay_form(log_decay)
    precision = product_precision(q.dtype)
    kernel, kernels, tiles, cut = _lay_out(q, E, steps[0], len(pools), decay, precision == "ieee")
    blocks = ceil_div(E, tiles.columns)
    bounds, order, rows = steps[0].prefill_bounds, steps[0].prefill_order, [step.prefill_rows for step in steps]
    flags = None
    if cut.split:
        flags = torch.zeros(1 + cut.sequences * heads * blocks, dtype=torch.int32, device=q.device)
    block_d, block_c = padded_width(D), tiles.columns
    launch_kernel(
        kernel, cut.items * heads * blocks,
        tuple(
            kernels.describe(x, tiles.tokens, width, cut.packed)
            for x, width in ((q, block_d), (k, block_d), (v, block_c))
        ),
        (
            output, pointer_or(log_decay, output), pools[0], pools[-1], rows[0], rows[-1], bounds, order,
            pointer_or(flags, output),
        ),
        (tokens, heads, cut.sequences, cut.segment, cut.lead, cut.per_sequence, cut.items),
        (pools[0].stride(0), output.stride(0)),
        (D, E, len(pools), decay, cut.packed, cut.split, precision, tiles.tokens, block_d, block_c),
        tiles,
    )  # fmt: skip


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    pools: Sequence[Tensor],
    rows: Sequence[Tensor],
    output: Tensor,
) -> None:
    """The next token of each of R requests, by the kernel of :func:`tnl.ops.lightning_attention_step`.

    Args:
        query: ``[R, H, D]``; ``key`` alike.
        key: ``[R, H, D]``.
        value: ``[R, H, E]``.
        log_decay: As in :func:`prefill`, and so ``pools``.
        pools: One or two.
        rows: In each of the pools, ``[R]`` int32; negative for padding, whose output is zero.
        output: ``[R, H, E]`` contiguous, written in place.
    """
    requests, heads, E = value.shape
    log_decay, decay = _decay_form(log_decay)
    tiles = choose_step_tiles(requests * heads, E)
    # The sum of two parts is rounded once.
    parts = output[None] if len(pools) == 1 else output.new_empty(len(pools), *output.shape, dtype=torch.float32)
    for part, pool, at, q, k in zip(parts, pools, rows, query.split(E, -1), key.split(E, -1), strict=True):
        strides = [stride for x in (q, k, value) for stride in (x.stride(0), 0, x.stride(1))]
        launch_kernel(
            _step_kernel, requests * heads * ceil_div(E, tiles.columns), (),
            (q, k, value, part, pointer_or(log_decay, part), pool, pool, at),
            (1.0, heads, 1),
            (*strides, 0, 0, pool.stride(0), pool.stride(1), 1, E, E, E, 1),
            (decay == 1, True, False, padded_width(E), tiles.columns),
            tiles,
        )  # fmt: skip
    if len(pools) > 1:
        torch.add(*parts, out=output)
