"""Lightning attention: causal linear attention with decay; its contract and the checks that keep it.

Dimensions: B batch, T tokens, H key/value heads, Hq query heads (a multiple of H), D key width, E value width,
N sequences (N = B, or the number of packed sequences when B = 1), S tokens in a step, P rows of a pool of states.

Sources: Lightning Attention-2 (arXiv 2401.04658), Various Lengths, Constant Speed (arXiv 2405.17381).
"""

import itertools
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tnl.ops import lightning_registration as registered
from tnl.ops.backends import DTYPES, autocast_enabled
from tnl.ops.backends import resolve_backend as _resolve_backend

STATE_LAYOUTS = ("DE", "ED")


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    state_layout: str = "DE",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with decay, at a cost per token that does not depend on the number of tokens.

    With ``S_0`` the initial state, for each head ``S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T`` and
    ``o_t = scale * q_t S_t``: the current token has weight 1 (arXiv 2405.17381, eq. 6 and 7).

    Args:
        q: Queries ``[B, T, Hq, D]`` in float32, float64, float16 or bfloat16. Any strides; the last dimension
            must be contiguous. The same holds for ``k`` and ``v``.
        k: Keys ``[B, T, H, D]``, ``Hq`` a multiple of ``H``: query head ``h`` reads key head ``h // (Hq // H)``.
        v: Values ``[B, T, H, E]``.
        log_decay: None for no decay, ``[Hq]`` for one decay a head, ``[B, T, Hq]`` for one a token; at most 0,
            finite, float32 or float64. The values of a CUDA tensor are not read to check this.
        scale: Factor on the output.
        initial_state: ``[N, Hq, D, E]``, float32 (float64 with float64 inputs); None for zeros.
        return_final_state: Return the state after the last token too.
        cu_seqlens: ``[N + 1]`` int32 or int64: sequence ``n`` of a packed row (B = 1) is
            ``cu_seqlens[n]:cu_seqlens[n + 1]``. Starts at 0, does not decrease (a sequence may be empty), ends
            at T. A CUDA tensor is read once to check this, at its first use.
        state_layout: ``"DE"``, or ``"ED"`` where initial and final states are ``[N, Hq, E, D]``, as some engines
            keep them. Neither costs a copy.
        backend: ``"torch"``, ``"triton"``, or ``"auto"``: Triton on a GPU that can run it, PyTorch elsewhere.

    Returns:
        ``o [B, T, Hq, E]`` in the dtype of ``q``, and the final state ``[N, Hq, D, E]`` (float32, or float64 with
        float64 inputs) or None. Differentiable once in q, k, v, log_decay and initial_state.

    float32 products on a GPU are exact to float32, or use TF32 where ``torch.set_float32_matmul_precision`` allows
    it for PyTorch's own. The state is always accumulated in float32 or wider, decay in log space. Under
    ``torch.autocast`` q, k and v take its dtype, as the operands of a matrix product do; states and decay do not.

    The gradient of log_decay is a sum of differences of larger terms: its relative error grows with T, and with
    float16 or bfloat16 inputs it is far larger than that of the other gradients (docs/operator.md).

    Raises:
        ValueError: An argument's shape, dtype, device, strides or value does not fit; the message names it.
    """
    if autocast_enabled(q):
        q, k, v = _autocast(q, k, v)
    _check_tokens(q, k, v, rank=4)
    if log_decay is not None:
        _check_decay(log_decay, q)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)
    transposed = _is_transposed(state_layout)
    if initial_state is not None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        matrix = (v.shape[3], q.shape[3]) if transposed else (q.shape[3], v.shape[3])
        _check_state("initial_state", initial_state, (sequences, q.shape[2], *matrix), q)
    o, final_state = registered.attention(
        q, k, v, log_decay, initial_state, cu_seqlens, scale, return_final_state, _resolve_backend(backend, q),
        transposed,
    )  # fmt: skip
    return o, final_state if return_final_state else None


@overload
def lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
    state_layout: str = "DE",
    return_states: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
    state_layout: str = "DE",
    return_states: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
    state_layout: str = "DE",
    return_states: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The next token, or the next few, of each of N sequences: :func:`lightning_attention` for decoding.

    Several tokens at once serve speculative decoding. The state moves on by all of them; with ``return_states`` a
    draft of which only the first ``a[n] >= 1`` tokens were accepted is undone by
    ``state[state_indices] = states[arange(N), a - 1]``. Nothing needs to be copied where ``states.flatten(0, 1)`` is
    the pool of the next call, with ``state_indices = arange(N) * S + a - 1``.

    Args:
        q: ``[N, Hq, D]``, or ``[N, S, Hq, D]`` for S tokens; ``k`` and ``v`` alike.
        k: ``[N, H, D]`` or ``[N, S, H, D]``.
        v: ``[N, H, E]`` or ``[N, S, H, E]``.
        log_decay: None, ``[Hq]``, or one a token, ``[N, Hq]`` or ``[N, S, Hq]``.
        state: ``[P, Hq, D, E]`` float32 (float64 with float64 inputs), updated in place. Rows and heads may lie
            apart; each state is contiguous.
        scale: Factor on the output.
        state_indices: ``[N]`` int32 or int64, the row of ``state`` of each sequence, each row at most once;
            a negative index is padding: no state changes, its output and ``states`` are zero. None: row n, and
            P = N.
        state_layout: ``"DE"``, or ``"ED"`` where ``state`` and ``states`` have ``[E, D]`` for ``[D, E]``.
        return_states: Return the state after each token too.
        backend: As in :func:`lightning_attention`.

    Returns:
        ``o`` in the shape of ``q`` with E for D and in its dtype, or ``(o, states)`` with ``return_states``:
        ``states [N, S, Hq, D, E]``, S = 1 for inputs without S. Not differentiable.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    if autocast_enabled(q):
        q, k, v = _autocast(q, k, v)
    _check_tokens(q, k, v, rank=4 if q.dim() == 4 else 3)
    if log_decay is not None:
        _check_decay(log_decay, q)
    rows = q.shape[0]
    if state_indices is not None:
        if state_indices.shape != (rows,) or state_indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"state_indices: expected [{rows}] of int32 or int64, got {_describe(state_indices)}")
        if state_indices.device != q.device:
            raise ValueError(f"state_indices: expected device {q.device}, got {state_indices.device}")
        rows = state.shape[0] if state.dim() else 0
    matrix = (v.shape[-1], q.shape[-1]) if (transposed := _is_transposed(state_layout)) else (q.shape[-1], v.shape[-1])
    _check_state("state", state, (rows, q.shape[-2], *matrix), q)
    if state.stride(3) != 1 or state.stride(2) != matrix[1]:
        raise ValueError(f"state: expected a contiguous tensor {list(matrix)} a head, got strides {state.stride()}")
    states = None
    if return_states:
        states = state.new_empty(q.shape[0], q.shape[1] if q.dim() == 4 else 1, *state.shape[1:])
    o = registered.step(
        q, k, v, log_decay, state, scale, state_indices, _resolve_backend(backend, q), transposed, states
    )
    return o if states is None else (o, states)


# --- Validation ------------------------------------------------------------------------------------------------


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast makes of the operands of a matrix product: its dtype, unless they are float64."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} of {str(x.dtype).removeprefix('torch.')} on {x.device}"


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, rank: int) -> None:
    """One condition, which is enough, on the way of every call; the checks that name what is wrong only behind it."""
    of_q, of_k, of_v, dtype, device = q.shape, k.shape, v.shape, q.dtype, q.device
    if (
        len(of_q) == len(of_k) == len(of_v) == rank
        and of_k[:-2] == of_q[:-2] == of_v[:-2]
        and of_k[-1] == of_q[-1]
        and of_k[-2] == of_v[-2]
        and not (0 in of_q or 0 in of_v)
        and of_q[-2] % of_k[-2] == 0
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and dtype in DTYPES
        and k.dtype == v.dtype == dtype
        and k.device == v.device == device
    ):
        return
    _explain_tokens(q, k, v, rank)


def _explain_tokens(q: Tensor, k: Tensor, v: Tensor, rank: int) -> None:
    dims = "[B, T, heads, width]" if rank == 4 else "[N, heads, width]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != rank:
            raise ValueError(f"{name}: expected {rank} dimensions {dims}, got {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
        if 0 in x.shape:
            raise ValueError(f"{name}: expected no empty dimension, got {list(x.shape)}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension (stride 1), got strides {tuple(x.stride())}"
            )
        if x.shape[:-2] != q.shape[:-2]:
            raise ValueError(f"{name}: expected leading dimensions {list(q.shape[:-2])} as in q, got {list(x.shape)}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"v: expected {k.shape[-2]} heads as in k, got {v.shape[-2]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected width {q.shape[-1]} as in q, got {k.shape[-1]}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q: expected a multiple of the {k.shape[-2]} heads of k and v, got {q.shape[-2]}")


def _check_decay(log_decay: Tensor | None, q: Tensor) -> None:
    """All but the values, which the operator itself checks where it can (:mod:`tnl.ops.lightning_registration`)."""
    if log_decay is None:
        return
    heads = q.shape[-2]
    if log_decay.shape != (heads,) and log_decay.shape != q.shape[:-1]:
        raise ValueError(
            f"log_decay: expected [{heads}] (one a head) or {list(q.shape[:-1])} (one a token), "
            f"got {list(log_decay.shape)}"
        )
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_decay: expected float32 or float64, got {log_decay.dtype}")
    if log_decay.device != q.device:
        raise ValueError(f"log_decay: expected the device of q, {q.device}, got {log_decay.device}")


def _is_transposed(state_layout: str) -> bool:
    if state_layout not in STATE_LAYOUTS:
        raise ValueError(f"state_layout: expected one of {STATE_LAYOUTS}, got {state_layout!r}")
    return state_layout == "ED"


def _check_state(name: str, state: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state.shape != shape or state.dtype != dtype or state.device != q.device:
        wanted = f"{list(shape)} of {str(dtype).removeprefix('torch.')} on {q.device}"
        raise ValueError(f"{name}: expected {wanted}, got {_describe(state)}")


# Reading a CUDA tensor waits for the device, so each cu_seqlens is read at its first use only.
_checked_cu_seqlens: Any = WeakTensorKeyDictionary()


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected [N + 1] of int32 or int64, N >= 1, got {_describe(cu_seqlens)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: expected the device of q, {q.device}, got {cu_seqlens.device}")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens: packed sequences need a batch of 1, got q of {list(q.shape)}")
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    tokens = q.shape[1]
    # A tensor of inference mode has no version that would tell a change, so it is read each time.
    seen = None if cu_seqlens.is_inference() else (cu_seqlens._version, tokens)
    if seen is not None and _checked_cu_seqlens.get(cu_seqlens) == seen:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in itertools.pairwise(bounds)):
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        raise ValueError(f"cu_seqlens: expected values that rise from 0 to T = {tokens}, got {shown}")
    if seen is not None:
        _checked_cu_seqlens[cu_seqlens] = seen
