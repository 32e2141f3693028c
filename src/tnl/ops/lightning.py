"""Lightning attention: causal linear attention with decay, its contract, its registration and its gradient.

Dimensions: B batch, T tokens, H key/value heads, Hq query heads (a multiple of H), D key width, E value width,
N sequences (N = B, or the number of packed sequences when B = 1), P rows of a pool of states.

Sources: Lightning Attention-2 (arXiv 2401.04658), Various Lengths, Constant Speed (arXiv 2405.17381).
"""

import importlib.util
import itertools
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tnl.ops import lightning_torch

BACKENDS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
        backend: ``"torch"``, ``"triton"``, or ``"auto"``: Triton on a GPU that can run it, PyTorch elsewhere.

    Returns:
        ``o [B, T, Hq, E]`` in the dtype of ``q``, and the final state ``[N, Hq, D, E]`` (float32, or float64 with
        float64 inputs) or None. Differentiable once in q, k, v, log_decay and initial_state.

    float32 products on a GPU are exact to float32, or use TF32 where ``torch.set_float32_matmul_precision`` allows
    it for PyTorch's own. The state is always accumulated in float32 or wider, decay in log space.

    The gradient of log_decay is a sum of differences of larger terms: its relative error grows with T, and with
    float16 or bfloat16 inputs it is far larger than that of the other gradients (docs/operator.md).

    Raises:
        ValueError: An argument's shape, dtype, device, strides or value does not fit; the message names it.
    """
    _check_tokens(q, k, v, rank=4)
    _check_decay(log_decay, q)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, (sequences, q.shape[2], q.shape[3], v.shape[3]), q)
    name = _resolve_backend(backend, q)
    o, final_state = torch.ops.tnl.lightning_attention(
        q, k, v, log_decay, initial_state, cu_seqlens, scale, return_final_state, name
    )
    return o, final_state if return_final_state else None


def lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token for each of N sequences; the decoding form of :func:`lightning_attention`. Not differentiable.

    Args:
        q: ``[N, Hq, D]``.
        k: ``[N, H, D]``.
        v: ``[N, H, E]``.
        log_decay: None, ``[Hq]``, or ``[N, Hq]``.
        state: ``[P, Hq, D, E]`` float32 (float64 with float64 inputs), contiguous; updated in place.
        scale: Factor on the output.
        state_indices: ``[N]`` int32 or int64, the row of ``state`` of each sequence, each row at most once;
            a negative index is padding: no state changes and its output is zero. None: row n, and P = N.
        backend: As in :func:`lightning_attention`.

    Returns:
        ``o [N, Hq, E]`` in the dtype of ``q``.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    _check_tokens(q, k, v, rank=3)
    _check_decay(log_decay, q)
    rows = q.shape[0]
    if state_indices is not None:
        if state_indices.shape != (rows,) or state_indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"state_indices: expected [{rows}] of int32 or int64, got {_describe(state_indices)}")
        if state_indices.device != q.device:
            raise ValueError(f"state_indices: expected device {q.device}, got {state_indices.device}")
        rows = state.shape[0] if state.dim() else 0
    _check_state("state", state, (rows, q.shape[1], q.shape[2], v.shape[2]), q)
    if not state.is_contiguous():
        raise ValueError(f"state: expected a contiguous tensor, got strides {state.stride()}")
    return torch.ops.tnl.lightning_attention_step(
        q, k, v, log_decay, state, scale, state_indices, _resolve_backend(backend, q)
    )


# --- Validation ------------------------------------------------------------------------------------------------


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} of {str(x.dtype).removeprefix('torch.')} on {x.device}"


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, rank: int) -> None:
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
    if not torch.compiler.is_compiling() and log_decay.device.type == "cpu" and bool((log_decay > 0).any()):
        raise ValueError(f"log_decay: expected values of at most 0, got {log_decay.max().item():.6g}")


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
    tokens, seen = q.shape[1], (cu_seqlens._version, q.shape[1])
    if _checked_cu_seqlens.get(cu_seqlens) == seen:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in itertools.pairwise(bounds)):
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        raise ValueError(f"cu_seqlens: expected values that rise from 0 to T = {tokens}, got {shown}")
    _checked_cu_seqlens[cu_seqlens] = seen


# --- Backends --------------------------------------------------------------------------------------------------


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _resolve_backend(backend: str, q: Tensor) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "torch":
        return backend
    if backend == "auto":
        return "triton" if q.is_cuda and q.dtype != torch.float64 and _triton_installed() else "torch"
    if q.dtype == torch.float64:
        raise ValueError("backend: 'triton' serves float32, float16 and bfloat16, got float64 inputs; use 'torch'")
    if not _triton_installed():
        raise ValueError("backend: 'triton' needs the package triton, which is not installed; use 'torch'")
    if not q.is_cuda and not _interpreted():
        raise ValueError(f"backend: 'triton' needs CUDA tensors, got device {q.device}; use 'torch'")
    return backend


def _triton_installed() -> bool:
    global _has_triton
    if _has_triton is None:
        _has_triton = importlib.util.find_spec("triton") is not None
    return _has_triton


_has_triton: bool | None = None


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return lightning_torch
    from tnl.ops import lightning_triton

    return lightning_triton


# --- Registration: schema, implementation, fake, gradient ------------------------------------------------------

torch.library.define(
    "tnl::lightning_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, float scale, "
    "bool return_final_state, str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "tnl::lightning_attention_backward",
    "(Tensor do, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, "
    "Tensor? final_state, Tensor? cu_seqlens, float scale, bool need_decay, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "tnl::lightning_attention_step",
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) state, float scale, Tensor? state_indices, "
    "str backend) -> Tensor",
)


def _state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Any, ...]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, q.shape[2], q.shape[3], v.shape[3]


def _new_state(q: Tensor, shape: tuple[Any, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


@torch.library.impl("tnl::lightning_attention", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    o, final_state = _implementation(backend).forward(
        q, k, v, log_decay, initial_state, cu_seqlens, scale, return_final_state
    )
    return o, final_state if return_final_state else _new_state(q, (0,))


@torch.library.register_fake("tnl::lightning_attention")
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    return o, _new_state(q, _state_shape(q, v, cu_seqlens) if return_final_state else (0,))


@torch.library.impl("tnl::lightning_attention_backward", "default")
def _backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    final_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    need_decay: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dinitial_state, difference = _implementation(backend).backward(
        do, dfinal_state, q, k, v, log_decay, initial_state, cu_seqlens, scale, need_decay
    )
    none = _new_state(q, (0,))
    dlog_decay = none
    if need_decay:
        assert log_decay is not None
        final_term = None
        if dfinal_state is not None and final_state is not None:
            final_term = (final_state * dfinal_state).sum((-1, -2))
        dlog_decay = _decay_gradient(difference, final_term, log_decay, cu_seqlens)
    return dq, dk, dv, dlog_decay, none if initial_state is None else dinitial_state


def _decay_gradient(
    difference: Tensor, final_term: Tensor | None, log_decay: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Gradient of the log decay from ``q . dq - k . dk`` ``[B, T, Hq]`` and ``<S_T, dS_T>`` ``[N, Hq]``.

    Every weight is ``exp(L_t - L_s)`` with L the running sum of the log decay, so ``dL_t = q_t . dq_t - k_t . dk_t``,
    to which the final state adds its own term at the last token; a log decay's gradient is the sum of the dL from its
    token to the end of the sequence. Summed in float64, since packed sequences are cut out of one running sum.
    """
    sums = difference.double().flip(1).cumsum(1).flip(1)
    if cu_seqlens is None:
        if final_term is not None:
            sums = sums + final_term.double()[:, None]
    else:
        tokens = difference.shape[1]
        sequence = torch.bucketize(torch.arange(tokens, device=sums.device), cu_seqlens[1:].long(), right=True)
        after = torch.cat([sums, torch.zeros_like(sums[:, :1])], dim=1)[0, cu_seqlens[1:].long()]
        correction = -after if final_term is None else final_term.double() - after
        sums = sums + correction[sequence]
    if log_decay.dim() == 1:
        sums = sums.sum((0, 1))
    return sums.to(log_decay.dtype)


@torch.library.register_fake("tnl::lightning_attention_backward")
def _backward_fake(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    final_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    need_decay: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dlog_decay = log_decay.new_empty(log_decay.shape) if need_decay and log_decay is not None else _new_state(q, (0,))
    return (
        dq,
        dk,
        dv,
        dlog_decay,
        _new_state(q, (0,) if initial_state is None else _state_shape(q, v, cu_seqlens)),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, log_decay, initial_state, cu_seqlens, scale, return_final_state, backend = inputs
    ctx.need_decay = log_decay is not None and log_decay.requires_grad
    final_state = output[1] if ctx.need_decay and return_final_state else None
    ctx.save_for_backward(q, k, v, log_decay, initial_state, final_state, cu_seqlens)
    ctx.scale, ctx.return_final_state, ctx.backend = scale, return_final_state, backend
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial_state, final_state, cu_seqlens = ctx.saved_tensors
    if not ctx.return_final_state:
        dfinal_state = None
    if do is None:  # only the final state was used
        do = q.new_zeros(*q.shape[:-1], v.shape[-1])
    elif do.stride(-1) != 1:
        do = do.contiguous()
    dq, dk, dv, dlog_decay, dinitial_state = torch.ops.tnl.lightning_attention_backward(
        do, dfinal_state, q, k, v, log_decay, initial_state, final_state, cu_seqlens, ctx.scale, ctx.need_decay,
        ctx.backend,
    )  # fmt: skip
    return (
        dq,
        dk,
        dv,
        dlog_decay if ctx.need_decay else None,
        None if initial_state is None else dinitial_state,
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd("tnl::lightning_attention", _differentiate, setup_context=_save_for_backward)


@torch.library.impl("tnl::lightning_attention_step", "default")
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
    backend: str,
) -> Tensor:
    return _implementation(backend).step(q, k, v, log_decay, state, scale, state_indices)


@torch.library.register_fake("tnl::lightning_attention_step")
def _step_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
    backend: str,
) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])
