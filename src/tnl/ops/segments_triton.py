"""Few heads of a long row in Triton: its segments as rows of their own, with states that are summed up beforehand.

The walk of :mod:`tnl.ops.walk_triton` can hand a state from segment to segment as it goes. Where a head's decay is
constant it is quicker to know all states before: most heads forget within a segment, so there is little to sum up.

Backwards the same holds for the gradients of the states, which come from behind. The states are summed up once more:
to keep those of the forward pass would take memory from one pass to the other, in every layer of a model.

Dimensions as in :mod:`tnl.ops.lightning`; S segments of a row.
"""

import torch
from torch import Tensor

from tnl.ops import lightning_triton
from tnl.ops.states_triton import enter, leave, sum_up
from tnl.ops.tiling_triton import ceil_div, choose_segments, choose_tiles, count_processors, product_precision

LONG_ROW = 16384  # tokens; for a shorter one the launches that sum up take too long
LONG_ROW_BACKWARD = 65536  # likewise; twice the sums, and the walk that hands over has more programs to fill the chip


def _segments(tokens: tuple[Tensor, ...], log_decay: Tensor | None, cu_seqlens: Tensor | None, backward: bool) -> int:
    """S, 1 where a row is better walked as it is; ``tokens``: q, k, v, and backwards do."""
    q, _, v = tokens[:3]
    if q.shape[1] < (LONG_ROW_BACKWARD if backward else LONG_ROW):
        return 1
    if log_decay is None or log_decay.dim() != 1 or cu_seqlens is not None:
        return 1
    if log_decay.requires_grad:  # its gradient is a small difference, of one walk's sums
        return 1
    if not all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in tokens):
        return 1
    return segments_of(q, v.shape[-1], backward)


def segments_of(q: Tensor, E: int, backward: bool = False) -> int:
    """S for rows ``[B, T, Hq, D]`` with a decay a head and values of width ``E``, for the kernels chosen first."""
    batch, tokens, heads, D = q.shape
    kernels = lightning_triton.choose_kernels(D, E, q.dtype, q.device, backward, False, False)[0]
    if backward:
        exact = product_precision(q.dtype) == "ieee"
        columns = (kernels.tiles or choose_tiles(max(D, E), max(D, E), q.dtype, True, False, exact)).columns
        blocks = 2 * ceil_div(D, columns) + ceil_div(E, columns)  # for dq, dk and dv
    else:
        blocks = ceil_div(E, (kernels.tiles or choose_tiles(D, E, q.dtype, False, False, False)).columns)
    return choose_segments(tokens, batch * heads * blocks, count_processors(q.device))


def _rows(x: Tensor, segments: int) -> Tensor:
    """``[B, T, ...]`` as ``[B S, T / S, ...]``."""
    return x.unflatten(1, (segments, -1)).flatten(0, 1)


def _swap(states: Tensor | None, transposed: bool) -> Tensor | None:
    """Between ``[.., D, E]``, which is used here, and what is asked for."""
    return states.mT.contiguous() if transposed and states is not None else states


def states_between(
    y: Tensor, z: Tensor, rate: Tensor, begun: Tensor | None, segments: int, scale: float = 1.0, before: bool = False
) -> Tensor:
    """The states ``[B S, Hq, K, M]`` that enter segments of one length, or ``before`` them their gradients from behind.

    Args:
        y: ``[B S, T / S, *, K]`` with Hq heads or a divisor of it, the last dimension contiguous: keys, or queries.
        z: ``[B S, T / S, *, M]``, likewise: values, or gradients of the output.
        rate: ``[Hq]`` log decay a token, float32.
        begun: ``[B, Hq, K, M]`` float32, what enters the first segment, or the last; None for zeros.
        segments: S.
        scale: Factor on what the tokens add.
        before: Segments are passed through from the last to the first.
    """
    heads, batch = len(rate), len(y) // segments
    parts = sum_up(y, z, rate, before, heads)
    passed = (rate * y.shape[1]).expand(len(y), heads)
    leaving = torch.empty(batch, heads, *parts.shape[3:], dtype=torch.float32, device=y.device)
    own = leave(parts, passed, begun, scale, before, leaving, None)
    return enter(leaving[None], passed, range(0), begun, own, passed, segments, before)


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
    segments = _segments((q, k, v), log_decay, cu_seqlens, backward=False)
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
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As :func:`tnl.ops.lightning_triton.backward`."""
    segments = 1 if need_decay else _segments((q, k, v, do), log_decay, cu_seqlens, backward=True)
    if segments == 1 or log_decay is None:
        return lightning_triton.backward(
            do, dfinal_state, q, k, v, log_decay, initial_state, cu_seqlens, scale, need_decay, transposed
        )
    rate = log_decay.float().contiguous()
    queries, keys, values, gradients = (_rows(x, segments) for x in (q, k, v, do))
    entering = states_between(keys, values, rate, _swap(initial_state, transposed), segments)
    dleaving = states_between(queries, gradients, rate, _swap(dfinal_state, transposed), segments, scale, before=True)
    *rows, dentering, _ = lightning_triton.backward(
        gradients, dleaving, queries, keys, values, rate, entering, None, scale, False,
        need_dinitial=initial_state is not None,
    )  # fmt: skip
    dq, dk, dv = (x.view(*q.shape[:2], *x.shape[2:]) for x in rows)
    dinitial_state = None if dentering is None else dentering[::segments].contiguous()
    return dq, dk, dv, _swap(dinitial_state, transposed), None
