"""Lightning attention of one sequence that lies over several processes, a part of its tokens on each.

Dimensions: B batch, T tokens on this rank, H key/value heads, Hq query heads, D key width, E value width, R ranks,
N sequences (N = B, or the number of packed sequences when B = 1).

What a rank's tokens need of all tokens before them is one state. Each rank sums up the state ``P_r`` that its own
tokens leave and their total log decay ``G_r``, one all-gather passes both round, and the state that enters rank r is

    S_r = sum over j < r of exp(sum of G_i over j < i < r) P_j

From there on the rank computes its part as if it were alone. Gradients go the other way round: the same exchange of
the gradients of the states. A rank sends ``B Hq (D E + 1)`` numbers, and ``B Hq D E`` back, whatever T. Without decay
this is LASP-2 (arXiv 2502.07563).

Two orders are possible. Computing the part from an empty state while the states travel, then adding what the entering
state contributes, reads q and rewrites o, which rounds it twice. Summing up the state first reads only k and v and
leaves one pass from the right state; that is done here. Where decay makes a token's weight zero at the end of the part,
the kernel does not read it.
"""

import bisect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tnl.ops import lightning_registration as registered
from tnl.ops.backends import autocast_enabled, call_on_device, resolve_backend
from tnl.ops.lightning import (
    _autocast,
    _check_decay,
    _check_state,
    _check_tokens,
    _describe,
    lightning_attention,
)

CHUNK = 1024  # tokens that the PyTorch form sums up at once
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from PyTorch 2.13 on


@torch.compiler.disable  # collectives and host-side plans: a graph ends before and goes on behind
def lightning_attention_context_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """:func:`tnl.ops.lightning_attention` of a sequence that is cut into parts, one for each rank of a group.

    Every rank of the group calls it, with its part of the tokens; parts follow one another in the order of the ranks.
    What all ranks hold alike (a decay per head, initial states) gets this rank's share of the gradient: the sum
    over the ranks is the whole, as for a parameter in data-parallel training. So do the final states: every
    rank may use them in its loss, and the gradients of all add up.

    Args:
        q: This rank's queries ``[B, T, Hq, D]``; dtypes and strides as in ``lightning_attention``.
        k: Its keys ``[B, T, H, D]``.
        v: Its values ``[B, T, H, E]``.
        log_decay: None, ``[Hq]`` (the same on all ranks) or, a token, ``[B, T, Hq]`` (this rank's).
        scale: Factor on the output.
        initial_state: ``[N, Hq, D, E]``, the same on all ranks; None for zeros.
        return_final_state: Return the states after the last tokens of the sequences too, to every rank. This adds a
            sum of ``[N, Hq, D, E]`` over the ranks each way.
        cu_seqlens: ``[N + 1]`` int32 or int64, the same on all ranks: boundaries of the sequences packed into the
            whole row of ``R T`` tokens. A sequence may lie on any number of ranks. All ranks must have T alike, which
            is not needed without it. A CUDA tensor is read once, at its first use.
        group: The processes; None for all. A group of one is ``lightning_attention`` itself.
        backend: As in ``lightning_attention``.

    Returns:
        ``o [B, T, Hq, E]`` of this rank's tokens, and the final states ``[N, Hq, D, E]`` or None. Differentiable once.

    Raises:
        ValueError: An argument does not fit, or there is no process group; the message names it.
    """
    if group is None:
        if not dist.is_initialized():
            raise ValueError("group: expected a process group, or torch.distributed to be initialised, got neither")
        group = dist.group.WORLD
        assert group is not None
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group: expected a group that this process is a member of, got another")
    if ranks == 1:
        return lightning_attention(
            q, k, v, log_decay, scale=scale, initial_state=initial_state, return_final_state=return_final_state,
            cu_seqlens=cu_seqlens, backend=backend,
        )  # fmt: skip
    if autocast_enabled(q):
        q, k, v = _autocast(q, k, v)
    _check_tokens(q, k, v, rank=4)
    _check_decay(log_decay, q)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        _check_bounds(cu_seqlens, q)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, (sequences, q.shape[2], q.shape[3], v.shape[3]), q)
    name = resolve_backend(backend, q)
    part = _locate(cu_seqlens, q, rank, ranks)
    options = _Options(scale, return_final_state, name, group, sequences)
    o, final_state = _ContextParallel.apply(q, k, v, log_decay, initial_state, part, options)
    return o, final_state if return_final_state else None


# --- Which tokens of which sequence lie here -------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """How a rank's tokens divide into sequences.

    Attributes:
        bounds: Boundaries of the packed sequences on this rank; None where each batch row is one.
        rows: Rows of the initial and final states of these sequences.
        head: First tokens, which read the state that enters from the rank before; 0 where none does.
        tail: First of the last tokens, which leave their state to the rank behind; T where there is none.
        passes: Whether the state that enters leaves again: one sequence reaches through.
        tokens: T.
    """

    bounds: Tensor | None
    rows: slice
    head: int
    tail: int
    passes: bool
    tokens: int

    @property
    def sequences(self) -> int:
        """Sequences with tokens on this rank."""
        return self.rows.stop - self.rows.start

    @property
    def enters(self) -> slice:
        """Of this rank's sequences those that a state enters."""
        return slice(0, (1 if self.bounds is not None else None) if self.head else 0)

    @property
    def leaves(self) -> slice:
        """Of this rank's sequences those whose state leaves."""
        if self.tail == self.tokens:
            return slice(0, 0)
        return slice(-1, None) if self.bounds is not None else slice(None)

    @property
    def begins(self) -> slice:
        """Of this rank's sequences those that begin here."""
        return slice(0, 0) if self.bounds is None and self.head else slice(1 if self.head else 0, None)

    @property
    def ends(self) -> slice:
        """Of this rank's sequences those that end here."""
        leaving = self.tail < self.tokens
        return slice(0, 0) if self.bounds is None and leaving else slice(0, -1 if leaving else None)


def _check_bounds(cu_seqlens: Tensor, q: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected [N + 1] of int32 or int64, N >= 1, got {_describe(cu_seqlens)}")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens: packed sequences need a batch of 1, got q of {list(q.shape)}")


_parts: Any = WeakTensorKeyDictionary()  # cu_seqlens -> (version, T, rank, ranks), part


def _locate(cu_seqlens: Tensor | None, q: Tensor, rank: int, ranks: int) -> _Part:
    tokens = q.shape[1]
    if cu_seqlens is None:
        first, last = rank == 0, rank == ranks - 1
        rows = slice(0, q.shape[0])
        return _Part(None, rows, 0 if first else tokens, tokens if last else 0, not (first or last), tokens)
    key = (cu_seqlens._version, tokens, rank, ranks)
    seen = _parts.get(cu_seqlens)
    if seen is not None and seen[0] == key:
        return seen[1]
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != ranks * tokens or any(a > b for a, b in itertools.pairwise(bounds)):
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        raise ValueError(
            f"cu_seqlens: expected values that rise from 0 to {ranks * tokens} ({ranks} ranks with T = {tokens}), "
            f"got {shown}"
        )
    part = _divide(bounds, tokens, rank, ranks, q.device)
    _parts[cu_seqlens] = (key, part)
    return part


def _divide(bounds: list[int], tokens: int, rank: int, ranks: int, device: torch.device) -> _Part:
    begin, end = rank * tokens, (rank + 1) * tokens
    # An empty sequence belongs to the rank of the token behind it, or to the last.
    first = bisect.bisect_left(bounds, begin)
    first -= bounds[first] != begin
    last = len(bounds) - 2 if rank == ranks - 1 else bisect.bisect_left(bounds, end) - 1
    cut = [min(max(bound - begin, 0), tokens) for bound in bounds[first : last + 2]]
    head = cut[1] if bounds[first] < begin else 0
    tail = cut[-2] if bounds[last + 1] > end else tokens
    local = torch.tensor(cut, dtype=torch.int32, device=device)
    passes = first == last and bounds[first] < begin and bounds[last + 1] > end
    return _Part(local, slice(first, last + 1), head, tail, passes, tokens)


# --- States of some tokens -------------------------------------------------------------------------------------


def _log_weights(log_decay: Tensor | None, tokens: slice, before: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Log weight of each of some tokens in the state, and their total log decay ``[B, Hq]``.

    With decays per head the weights are given by the decay alone, ``[Hq]``; per token they are ``[B, T, Hq]``. A token
    is written to the state that leaves behind the tokens after its decay, and reads the one that enters ``before``
    them with its own decay. Summed from the border, so that the weights next to it are exact.
    """
    batch, heads = like.shape[0], like.shape[2]
    dtype = torch.promote_types(like.dtype, torch.float32)
    if log_decay is None or log_decay.dim() == 1:
        rate = torch.zeros(heads, dtype=dtype, device=like.device) if log_decay is None else log_decay.to(dtype)
        return rate, (rate * (tokens.stop - tokens.start)).expand(batch, heads)
    decay = log_decay[:, tokens].mT.to(dtype).contiguous()  # running sums are slow where tokens lie apart
    if before:
        total = decay.cumsum(-1)
        return total.mT, total[..., -1]
    total = decay.flip(-1).cumsum(-1).flip(-1)
    return (total - decay).mT, total[..., 0]


def _sum_up(
    y: Tensor, z: Tensor, log_weight: Tensor, before: bool, heads: int, backend: str, out: Tensor | None = None
) -> Tensor:
    """``sum over tokens of exp(log weight) y_t z_t^T`` ``[B, Hq, K, M]``, in float32 or wider.

    ``y [B, T, *, K]`` and ``z [B, T, *, M]`` with Hq heads or a divisor of it; ``log_weight`` as `_log_weights` gave
    it, ``before`` as well.
    """
    batch, tokens = y.shape[:2]
    if out is None:
        out = torch.empty(batch, heads, y.shape[-1], z.shape[-1], dtype=log_weight.dtype, device=y.device)
    if backend == "triton":
        from tnl.ops import context_parallel_triton

        return call_on_device(context_parallel_triton.sum_up, y, z, log_weight, before, out)
    out.zero_()
    for begin in range(0, tokens, CHUNK):
        some = slice(begin, min(begin + CHUNK, tokens))
        if log_weight.dim() == 1:
            place = torch.arange(some.start, some.stop, device=y.device, dtype=log_weight.dtype)
            distance = place + 1 if before else tokens - 1 - place
            weight = (distance[:, None] * log_weight).exp()[None]
        else:
            weight = log_weight[:, some].exp()
        yc, zc = (x[:, some].to(out.dtype) for x in (y, z))
        yc, zc = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (yc, zc))
        out += torch.einsum("bthk,bthm->bhkm", yc * weight[..., None], zc)
    return out


# --- Exchange --------------------------------------------------------------------------------------------------


class _Exchange:
    """An all-gather of one state ``[B, Hq, D, E]`` and, forward, total log decay ``[B, Hq]`` a rank.

    Few calls on the host: at a quarter of a million tokens they, not the bytes, decide what an exchange costs.
    """

    def __init__(self, q: Tensor, E: int, group: dist.ProcessGroup, with_decay: bool) -> None:
        batch, _, heads, D = q.shape
        self._size, self._group = batch * heads * D * E, group
        numbers = self._size + batch * heads * with_decay
        self._sent = torch.empty(numbers, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        self.state = self._sent[: self._size].view(batch, heads, D, E)
        self.decay = self._sent[self._size :].view(batch, heads if with_decay else 0)

    def start(self) -> "_Exchange":
        """Send ``state`` and ``decay``, once they are filled, round."""
        self._received = self._sent.new_empty(dist.get_world_size(self._group), len(self._sent))
        self._work = _all_gather(self._received.view(-1), self._sent, group=self._group, async_op=True)
        return self

    def wait(self) -> tuple[Tensor, Tensor]:
        """States ``[R, B, Hq, D, E]`` and total log decays ``[R, B, Hq]`` of all ranks."""
        self._work.wait()
        states, decays = self._received[:, : self._size], self._received[:, self._size :]
        return states.unflatten(1, self.state.shape), decays.unflatten(1, self.decay.shape)


def _combine(states: Tensor, decays: Tensor, rank: int, before: bool) -> Tensor:
    """The state that enters rank ``rank`` from all before it; with ``before`` False what comes back from all behind.

    A total of -inf marks a rank through which nothing passes.
    """
    ranks = list(range(rank)) if before else list(range(len(states) - 1, rank, -1))
    state = states[ranks[0]]
    if len(ranks) > 1:
        passed = decays.exp()[..., None, None]
    for i in ranks[1:]:
        state = torch.addcmul(states[i], passed[i], state)
    return state


# --- Forward and backward --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    scale: float
    return_final_state: bool
    backend: str
    group: dist.ProcessGroup
    sequences: int


class _ContextParallel(torch.autograd.Function):
    """The local operator between the exchange of states and that of their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        part: _Part,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        shape = (q.shape[2], q.shape[3], v.shape[3])
        exchange = _send_states(q, k, v, log_decay, initial_state, part, options)
        local = None
        if part.bounds is not None and (part.head or initial_state is not None):  # in the time of the exchange
            local = _zeros(q, part.sequences, *shape)
            if initial_state is not None:
                local[part.begins] = initial_state[part.rows][part.begins]
        states, decays = exchange.wait()
        if part.head:
            entering = _combine(states, decays, dist.get_rank(options.group), before=True)
            if local is None:
                local = entering
            else:
                local[part.enters] = entering
        elif local is None and initial_state is not None:
            local = initial_state
        need_decay = ctx.needs_input_grad[3]
        o, final = registered.attention(
            q, k, v, log_decay, local, part.bounds, options.scale, options.return_final_state or need_decay,
            options.backend,
        )  # fmt: skip
        whole = _zeros(q, options.sequences if options.return_final_state else 0, *shape)
        if options.return_final_state:
            whole[part.rows][part.ends] = final[part.ends]
            dist.all_reduce(whole, group=options.group)
        ctx.save_for_backward(q, k, v, log_decay, local, final if need_decay else None, decays)
        ctx.part, ctx.options, ctx.need_decay = part, options, need_decay
        ctx.has_initial_state = initial_state is not None
        ctx.set_materialize_grads(False)
        return o, whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor | None, dwhole: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, local, final, decays = ctx.saved_tensors
        part, options = ctx.part, ctx.options
        shape = (q.shape[2], q.shape[3], v.shape[3])
        if do is None:
            do = q.new_zeros(*q.shape[:-1], v.shape[-1])
        elif do.stride(-1) != 1:
            do = do.contiguous()
        dfinal = None
        if options.return_final_state:  # all ranks sum up, those that did not use the states too
            dwhole = _zeros(q, options.sequences, *shape) if dwhole is None else dwhole.contiguous().clone()
            dist.all_reduce(dwhole, group=options.group)
            dfinal = dwhole[part.rows]
        exchange = _send_gradients(do, q, log_decay, dfinal, part, options)
        dlocal = None
        if part.bounds is not None and (part.tail < part.tokens or dfinal is not None):  # in the time of the exchange
            dlocal = _zeros(q, part.sequences, *shape)
            if dfinal is not None:
                dlocal[part.ends] = dfinal[part.ends]
        dstates, _ = exchange.wait()
        if part.tail < part.tokens:
            returning = _combine(dstates, decays, dist.get_rank(options.group), before=False)
            if dlocal is None:
                dlocal = returning
            else:
                dlocal[part.leaves] = returning
        elif dlocal is None:
            dlocal = dfinal
        dq, dk, dv, dlog_decay, dinitial = registered.attention_backward(
            do, dlocal, q, k, v, log_decay, local, final, part.bounds, options.scale, ctx.need_decay, options.backend
        )
        dinitial_state = None
        if ctx.has_initial_state:
            dinitial_state = _zeros(q, options.sequences, *shape)
            dinitial_state[part.rows][part.begins] = dinitial[part.begins]
        return dq, dk, dv, dlog_decay if ctx.need_decay else None, dinitial_state, None, None


def _zeros(q: Tensor, *shape: int) -> Tensor:
    """Zeros in the dtype of the states."""
    return torch.zeros(*shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def _send_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    part: _Part,
    options: _Options,
) -> _Exchange:
    """Sum up the state that leaves this rank, without what enters it, and send it round with its total log decay."""
    tokens, heads = q.shape[1:3]
    exchange = _Exchange(q, v.shape[-1], options.group, with_decay=True)
    if part.tail == tokens:
        exchange.state.zero_()
        exchange.decay.fill_(-torch.inf)
        return exchange.start()
    some = slice(part.tail, tokens)
    weight, decay = _log_weights(log_decay, some, False, q)
    _sum_up(k[:, some], v[:, some], weight, False, heads, options.backend, exchange.state)
    if initial_state is not None and not part.passes:  # what leaves began here
        begun = initial_state[part.rows][part.leaves]
        exchange.state.addcmul_(decay[..., None, None].exp(), begun)
    if part.passes:
        exchange.decay.copy_(decay)
    else:
        exchange.decay.fill_(-torch.inf)
    return exchange.start()


def _send_gradients(
    do: Tensor, q: Tensor, log_decay: Tensor | None, dfinal: Tensor | None, part: _Part, options: _Options
) -> _Exchange:
    """Sum up the gradient of the state that enters this rank, without what comes from behind, and send it round."""
    exchange = _Exchange(q, do.shape[-1], options.group, with_decay=False)
    if part.head == 0:
        exchange.state.zero_()
        return exchange.start()
    some = slice(0, part.head)
    weight, decay = _log_weights(log_decay, some, True, q)
    _sum_up(q[:, some], do[:, some], weight, True, q.shape[2], options.backend, exchange.state)
    if options.scale != 1:
        exchange.state.mul_(options.scale)
    if dfinal is not None and not part.passes:  # what entered ends here
        exchange.state.addcmul_(decay[..., None, None].exp(), dfinal[part.enters])
    return exchange.start()
