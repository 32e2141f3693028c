"""Lightning attention as a PyTorch operator: schema, call of the implementation, fake, gradient, vmap.

Dimensions as in :mod:`tnl.ops.lightning`, which checks what comes here. ``transposed``: states are ``[.., E, D]``.
"""

import functools
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tnl.ops import lightning_torch
from tnl.ops.backends import call_on_device

torch.library.define(
    "tnl::lightning_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, float scale, "
    "bool return_final_state, str backend, bool transposed=False) -> (Tensor, Tensor)",
)
torch.library.define(
    "tnl::lightning_attention_backward",
    "(Tensor do, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, "
    "Tensor? final_state, Tensor? cu_seqlens, float scale, bool need_decay, str backend, bool transposed=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "tnl::lightning_attention_step",
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) state, float scale, Tensor? state_indices, "
    "str backend, bool transposed=False, Tensor(b!)? states=None) -> Tensor",
)
attention_operator = torch.ops.tnl.lightning_attention.default
attention_backward_operator = torch.ops.tnl.lightning_attention_backward.default
step_operator = torch.ops.tnl.lightning_attention_step.default
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # of q, k, v, log_decay, initial_state
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


@functools.cache
def _implementation(backend: str, decode: bool = False) -> ModuleType:
    """Imported by the first call that uses it, since Triton takes its time."""
    if backend == "torch":
        return lightning_torch
    return import_module("tnl.ops.lightning_step_triton" if decode else "tnl.ops.segments_triton")


def _is_watched(tensors: tuple[Any, ...]) -> bool:
    """Whether something looks at a program's operators: a compiler, tracer, mode, transform or subclass of Tensor.

    Where nothing does, a call goes straight to its implementation, since the dispatcher takes as long as all else that
    the host does.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, tensors))
    )


def _state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, transposed: bool) -> tuple[Any, ...]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    matrix = (v.shape[3], q.shape[3]) if transposed else (q.shape[3], v.shape[3])
    return sequences, q.shape[2], *matrix


def _new_state(q: Tensor, shape: tuple[Any, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


# --- Forward ---------------------------------------------------------------------------------------------------


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_final_state: bool,
    backend: str,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    _check_values(log_decay)
    o, final_state = call_on_device(
        _implementation(backend).forward,
        q, k, v, log_decay, initial_state, cu_seqlens, scale, return_final_state, transposed,
    )  # fmt: skip
    return o, final_state if return_final_state else None


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    o, final_state = _run(*arguments)
    return o, arguments[0].new_empty(0) if final_state is None else final_state  # an operator always returns tensors


def _check_values(log_decay: Tensor | None) -> None:
    """Here rather than with the other checks, since here are values under torch.compile and torch.func.vmap too."""
    if log_decay is not None and log_decay.device.type == "cpu" and bool((log_decay > 0).any()):
        raise ValueError(f"log_decay: expected values of at most 0, got {log_decay.max().item():.6g}")


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
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    return o, _new_state(q, _state_shape(q, v, cu_seqlens, transposed)) if return_final_state else q.new_empty(0)


torch.library.impl("tnl::lightning_attention", "default")(_forward)
torch.library.register_fake("tnl::lightning_attention")(_forward_fake)

# --- Backward --------------------------------------------------------------------------------------------------


def _run_backward(
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
    transposed: bool = False,
) -> Gradients:
    dq, dk, dv, dinitial_state, difference = call_on_device(
        _implementation(backend).backward,
        do, dfinal_state, q, k, v, log_decay, initial_state, cu_seqlens, scale, need_decay, transposed,
    )  # fmt: skip
    dlog_decay = None
    if need_decay:
        assert log_decay is not None
        final_term = None
        if dfinal_state is not None and final_state is not None:
            final_term = (final_state * dfinal_state).sum((-1, -2))
        dlog_decay = _decay_gradient(difference, final_term, log_decay, cu_seqlens)
    return dq, dk, dv, dlog_decay, None if initial_state is None else dinitial_state


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    q = arguments[2]
    return tuple(_new_state(q, (0,)) if x is None else x for x in _run_backward(*arguments))


def _decay_gradient(
    difference: Tensor, final_term: Tensor | None, log_decay: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Gradient of the log decay from ``q . dq - k . dk`` ``[B, T, Hq]`` and ``<S_T, dS_T>`` ``[N, Hq]``.

    Every weight is ``exp(L_t - L_s)`` with L the running sum of the log decay, so ``dL_t = q_t . dq_t - k_t . dk_t``,
    to which the final state adds its own term at the last token; a log decay's gradient is the sum of the dL from its
    token to the end of the sequence. Summed in float64, since packed sequences are cut out of one running sum.
    """
    sums = difference.mT.double().flip(-1).cumsum(-1).flip(-1).mT  # fast where the tokens lie side by side
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
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dlog_decay = log_decay.new_empty(log_decay.shape) if need_decay and log_decay is not None else _new_state(q, (0,))
    shape = (0,) if initial_state is None else _state_shape(q, v, cu_seqlens, transposed)
    return dq, dk, dv, dlog_decay, _new_state(q, shape)


torch.library.impl("tnl::lightning_attention_backward", "default")(_backward)
torch.library.register_fake("tnl::lightning_attention_backward")(_backward_fake)


def _below_autograd(operator: Any, arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


class _Attention(torch.autograd.Function):
    """The gradient, in place of ``torch.library.register_autograd``, whose wrapper takes several times as long."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        o, final_state = _call_below_autograd(arguments)
        q, k, v, log_decay, initial_state, cu_seqlens, *ctx.options = arguments
        ctx.need_decay = ctx.needs_input_grad[3]
        kept = final_state if ctx.need_decay and ctx.options[1] else None
        ctx.save_for_backward(q, k, v, log_decay, initial_state, kept, cu_seqlens)
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, initial_state, final_state, cu_seqlens = ctx.saved_tensors
        scale, return_final_state, backend, transposed = ctx.options
        if not return_final_state:
            dfinal_state = None
        if do is None:  # only the final state was used
            do = q.new_zeros(*q.shape[:-1], v.shape[-1])
        elif do.stride(-1) != 1:
            do = do.contiguous()
        dq, dk, dv, dlog_decay, dinitial_state = attention_backward(
            do, dfinal_state, q, k, v, log_decay, initial_state, final_state, cu_seqlens, scale, ctx.need_decay,
            backend, transposed,
        )  # fmt: skip
        if not ctx.need_decay:
            dlog_decay = None
        if initial_state is None:
            dinitial_state = None
        return dq, dk, dv, dlog_decay, dinitial_state, None, None, None, None, None


def _wants_gradient(tensors: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise NotImplementedError("lightning_attention: forward-mode gradients (jvp) are not served")
    return False


def _call_below_autograd(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    if _is_watched(arguments[:6]):
        return _below_autograd(attention_operator, arguments)
    return _run(*arguments)


def attention(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The operator, by the shortest way."""
    if torch.compiler.is_compiling():
        return attention_operator(*arguments)
    if not _wants_gradient(arguments[:5]):
        return _call_below_autograd(arguments)
    return attention_operator(*arguments) if _is_watched(arguments[:6]) else _Attention.apply(*arguments)


def attention_backward(*arguments: Any) -> Gradients:
    """Its gradient, by the shortest way; what is not asked for may be None or any tensor."""
    # torch.autograd.grad(is_grads_batched=True) calls with batched gradients that are none of those
    batched = any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in arguments[:2])
    if batched or torch.is_grad_enabled() or _is_watched(arguments[:9]):
        return attention_backward_operator(*arguments)
    return _run_backward(*arguments)


def step(*arguments: Any) -> Tensor:
    """The decoding step, by the shortest way."""
    tensors = (*arguments[:5], arguments[6], arguments[9])
    return step_operator(*arguments) if _is_watched(tensors) else _step(*arguments)


def _autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_final_state: bool,
    backend: str,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    arguments = (
        q, k, v, log_decay, initial_state, cu_seqlens, scale, return_final_state, backend, transposed
    )  # fmt: skip
    if _wants_gradient(arguments[:5]):
        o, final_state = _Attention.apply(*arguments)
        return o, q.new_empty(0) if final_state is None else final_state
    return _below_autograd(attention_operator, arguments)


class _AttentionBackward(torch.autograd.Function):
    """A gradient that is part of a graph, but not differentiable itself."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return _below_autograd(attention_backward_operator, arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "lightning_attention: can be differentiated once, not twice; use float64 and "
            "tnl.ops.lightning_torch.recurrence for higher derivatives of small inputs"
        )


def _autograd_backward(*arguments: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return _AttentionBackward.apply(*arguments)
    return _below_autograd(attention_backward_operator, arguments)


torch.library.impl("tnl::lightning_attention", "Autograd")(_autograd)
torch.library.impl("tnl::lightning_attention_backward", "Autograd")(_autograd_backward)

# --- vmap: its dimension becomes part of B ----------------------------------------------------------------------


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The vmapped dimension folded into the first one; a tensor without it is repeated."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_decay(log_decay: Tensor | None, dim: int | None, q: Any, size: int, per_token: bool) -> Tensor | None:
    """As :func:`_fold`; one a head that differs along the dimension (or is asked to be) becomes one a token.

    ``q`` is folded already.
    """
    if log_decay is None:
        return None
    if log_decay.dim() - (dim is not None) == 3:
        return _fold(log_decay, dim, size)
    if dim is None:
        return log_decay.expand(q.shape[:-1]) if per_token else log_decay
    one_a_token = log_decay.movedim(dim, 0)[:, None, None].expand(size, q.shape[0] // size, *q.shape[1:3])
    return one_a_token.flatten(0, 1)


def _no_packed_sequences(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: torch.func.vmap is served without packed sequences only; pack its rows instead")


def _forward_vmap(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    q, k, v, log_decay, initial_state, cu_seqlens, scale, return_final_state, *rest = arguments
    _no_packed_sequences(cu_seqlens)
    size = info.batch_size
    q, k, v, initial_state = (
        _fold(x, dim, size) for x, dim in zip((q, k, v, initial_state), (*dims[:3], dims[4]), strict=True)
    )
    log_decay = _fold_decay(log_decay, dims[3], q, size, per_token=False)
    o, final_state = attention_operator(q, k, v, log_decay, initial_state, None, scale, return_final_state, *rest)
    o = o.unflatten(0, (size, -1))
    if return_final_state:
        return (o, final_state.unflatten(0, (size, -1))), (0, 0)
    return (o, final_state), (0, None)


def _backward_vmap(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    *tensors, cu_seqlens, scale, need_decay, backend, transposed = arguments
    _no_packed_sequences(cu_seqlens)
    size, per_head = info.batch_size, tensors[5] is not None and tensors[5].dim() - (dims[5] is not None) == 1
    folded = [None if i == 5 else _fold(x, dims[i], size) for i, x in enumerate(tensors)]
    folded[5] = _fold_decay(tensors[5], dims[5], folded[2], size, per_token=need_decay)
    gradients = attention_backward_operator(*folded, None, scale, need_decay, backend, transposed)
    *gradients, dlog_decay, dinitial_state = (x.unflatten(0, (size, -1)) if x.numel() else x for x in gradients)
    if need_decay and per_head:
        dlog_decay = dlog_decay.sum((1, 2))
    out_dims = (0, 0, 0, 0 if need_decay else None, None if tensors[6] is None else 0)
    return (*gradients, dlog_decay, dinitial_state), out_dims


def _step_vmap(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    raise NotImplementedError("lightning_attention_step: torch.func.vmap is not served; N rows are its batch")


torch.library.register_vmap("tnl::lightning_attention", _forward_vmap)
torch.library.register_vmap("tnl::lightning_attention_backward", _backward_vmap)
torch.library.register_vmap("tnl::lightning_attention_step", _step_vmap)

# --- Step ------------------------------------------------------------------------------------------------------


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
    backend: str,
    transposed: bool = False,
    states: Tensor | None = None,
) -> Tensor:
    _check_values(log_decay)
    return call_on_device(
        _implementation(backend, decode=True).step, q, k, v, log_decay, state, scale, state_indices, transposed, states
    )


def _step_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
    backend: str,
    transposed: bool = False,
    states: Tensor | None = None,
) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


torch.library.impl("tnl::lightning_attention_step", "default")(_step)
torch.library.register_fake("tnl::lightning_attention_step")(_step_fake)
