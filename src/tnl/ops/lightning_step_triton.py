"""The decoding step of lightning attention in Triton: states are read once and written once, where they lie.

Dimensions: N rows, P rows of a pool of states, H key/value heads, Hq query heads, D key width, E value width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl.ops.launch_triton import launch_kernel, pointer_or
from tnl.ops.tiling_triton import Tiles, ceil_div, padded_width
from tnl.ops.walk_triton import _loss


def choose_step_tiles(heads: int, columns: int) -> Tiles:
    """Tiles of a step for ``heads`` states in all, of so many columns each (measured on an H100)."""
    return Tiles(1, min(64 if heads >= 1024 else 32, padded_width(columns)), 4, 1)


@triton.jit(do_not_specialize=["Hq", "group"])
def _step_kernel(
    Q, K, V, OUT, LOG_DECAY, STATE, STATES, INDICES, scale, Hq, group,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, decay_row, decay_token,
    pool_row, pool_head, tokens, D, E, state_row, state_column,
    DECAY: tl.constexpr, INDEXED: tl.constexpr, STORE_STATES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``S <- exp(g) S + k v^T`` in place and ``o = scale * q S``, token by token, for some columns of a head's state.

    One token is compiled without the loop, since Triton makes constants of arguments that are 1.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    column_block = tl.program_id(0) % blocks
    head = ((tl.program_id(0) // blocks) % Hq).to(tl.int64)
    row = (tl.program_id(0) // (blocks * Hq)).to(tl.int64)
    key_head = head // group
    inner = tl.arange(0, BLOCK_D)
    columns = column_block * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = (inner < D)[:, None] & (columns < E)[None, :]
    at = inner[:, None] * state_row + columns[None, :] * state_column
    OUT += (row * tokens * Hq + head) * E + columns
    STATES += (row * tokens * Hq + head) * D * E + at
    slot = row
    if INDEXED:
        slot = tl.load(INDICES + row).to(tl.int64)
        if slot < 0:
            for _ in range(tokens):
                tl.store(OUT, tl.zeros([BLOCK_E], OUT.dtype.element_ty), columns < E)
                OUT += Hq * E
                if STORE_STATES:
                    tl.store(STATES, tl.zeros([BLOCK_D, BLOCK_E], tl.float32), mask)
                    STATES += Hq.to(tl.int64) * D * E
            return
    STATE += slot * pool_row + head * pool_head + at
    Q += row * q_row + head * q_head + inner
    K += row * k_row + key_head * k_head + inner
    V += row * v_row + key_head * v_head + columns
    LOG_DECAY += row * decay_row + head
    state = tl.load(STATE, mask, 0.0)
    for _ in range(tokens):
        q = tl.load(Q, inner < D, 0.0).to(tl.float32)
        k = tl.load(K, inner < D, 0.0).to(tl.float32)
        v = tl.load(V, columns < E, 0.0).to(tl.float32)
        update = k[:, None] * v[None, :]
        if DECAY:
            update += state * _loss(tl.load(LOG_DECAY))
        state += update
        o = scale * tl.sum(state * q[:, None], 0)
        tl.store(OUT, o.to(OUT.dtype.element_ty), columns < E)
        if STORE_STATES:
            tl.store(STATES, state, mask)
            STATES += Hq.to(tl.int64) * D * E
        OUT += Hq * E
        Q += q_token
        K += k_token
        V += v_token
        LOG_DECAY += decay_token
    tl.store(STATE, state, mask)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    indices: Tensor | None,
    transposed: bool = False,
    states: Tensor | None = None,
) -> Tensor:
    """One token, or several, for each of N rows; ``state`` and ``states`` are written in place.

    Shapes as in :func:`tnl.ops.lightning_attention_step`.
    """
    several = q.dim() == 4
    rows, heads, D = q.shape[0], q.shape[-2], q.shape[-1]
    tokens, E = q.shape[1] if several else 1, v.shape[-1]
    o = torch.empty(*q.shape[:-1], E, dtype=q.dtype, device=q.device)
    decay_strides = (0, 0)
    if log_decay is not None:
        log_decay = log_decay.float().contiguous()
        if log_decay.dim() > 1:
            decay_strides = (tokens * heads, heads)
    strides = [s for x in (q, k, v) for s in (x.stride()[:3] if several else (x.stride(0), 0, x.stride(1)))]
    tiles = choose_step_tiles(rows * heads, E)
    launch_kernel(
        _step_kernel, rows * heads * ceil_div(E, tiles.columns), (),
        (q, k, v, o, pointer_or(log_decay, o), state, pointer_or(states, state), pointer_or(indices, o)),
        (scale, heads, heads // k.shape[-2]),
        (
            *strides, *decay_strides, state.stride(0), state.stride(1), tokens, D, E,
            *((1, D) if transposed else (E, 1)),
        ),
        (log_decay is not None, indices is not None, states is not None, padded_width(D), tiles.columns),
        tiles,
    )  # fmt: skip
    return o
