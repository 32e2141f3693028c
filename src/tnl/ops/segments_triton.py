"""Few heads of a long row in Triton: its segments as rows of their own, with states that are summed up beforehand.

The walk of :mod:`tnl.ops.lightning_triton` can hand a state from segment to segment as it goes. Where a head's decay is
constant it is quicker to know all states before: most heads forget within a segment, so there is little to sum up.

Dimensions as in :mod:`tnl.ops.lightning`; S segments of a row.
"""

import torch
from torch import Tensor

from tnl.ops import lightning_triton
from tnl.ops.states_triton import enter, leave, sum_up
from tnl.ops.tiling_triton import ceil_div, choose_segments, choose_tiles, count_processors

LONG_ROW = 16384  # tokens; for a shorter one the launches that sum up take too long


def _segments(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """S, 1 where a row is better walked as it is."""
    if q.shape[1] < LONG_ROW or log_decay is None or log_decay.dim() != 1 or cu_seqlens is not None:
        return 1
    if log_decay.requires_grad:  # its gradient is a small difference, of one walk's sums
        return 1
    if not all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in (q, k, v)):
        return 1
    return segments_of(q, v.shape[-1])


def segments_of(q: Tensor, E: int) -> int:
    """S for rows ``[B, T, Hq, D]`` with a decay a head and values of width ``E``, for the kernels chosen first."""
    batch, tokens, heads, D = q.shape
    kernels = lightning_triton.choose_kernels(D, E, q.dtype, q.device, False, False, False)[0]
    tiles = kernels.tiles or choose_tiles(D, E, q.dtype, False, False, False)
    return choose_segments(tokens, batch * heads * ceil_div(E, tiles.columns), count_processors(q.device))


def _rows(x: Tensor, segments: int) -> Tensor:
    """``[B, T, ...]`` as ``[B S, T / S, ...]``."""
    return x.unflatten(1, (segments, -1)).flatten(0, 1)


def _swap(states: Tensor | None, transposed: bool) -> Tensor | None:
    """Between ``[.., D, E]``, which is used here, and what is asked for."""
    return states.mT.contiguous() if transposed and states is not None else states


def states_between(k: Tensor, v: Tensor, rate: Tensor, initial_state: Tensor | None, segments: int) -> Tensor:
    """The states ``[B S, Hq, D, E]`` that enter segments of one length.

    Args:
        k: ``[B S, T / S, H, D]``, the last dimension contiguous.
        v: ``[B S, T / S, H, E]``, likewise.
        rate: ``[Hq]`` log decay a token, float32.
        initial_state: ``[B, Hq, D, E]`` float32, what enters the first segment; None for zeros.
        segments: S.
    """
    heads, batch = len(rate), len(k) // segments
    parts = sum_up(k, v, rate, False, heads)
    passed = (rate * k.shape[1]).expand(len(k), heads)
    leaving = torch.empty(batch, heads, *parts.shape[3:], dtype=torch.float32, device=k.device)
    own = leave(parts, passed, initial_state, 1.0, False, leaving, None)
    return enter(leaving[None], passed, range(0), initial_state, own, passed, segments, False)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_final_state: bool,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`tnl.ops.lightning_triton.forward`."""
    segments = _segments(q, k, v, log_decay, cu_seqlens)
    if segments == 1 or log_decay is None:
        return lightning_triton.forward(
            q, k, v, log_decay, initial_state, cu_seqlens, scale, return_final_state, transposed
        )
    rate = log_decay.float().contiguous()
    queries, keys, values = (_rows(x, segments) for x in (q, k, v))
    entering = states_between(keys, values, rate, _swap(initial_state, transposed), segments)
    o, ends = lightning_triton.forward(queries, keys, values, rate, entering, None, scale, return_final_state)
    return o.view(*q.shape[:3], -1), _swap(
        None if ends is None else ends[segments - 1 :: segments].contiguous(), transposed
    )


backward = lightning_triton.backward  # stays as it is
