"""Lightning attention of one sequence that lies over several processes, a part of its tokens on each.

Dimensions: B batch, T tokens on this rank, H key/value heads, Hq query heads, D key width, E value width, R ranks,
N sequences (N = B, or the number of packed sequences when B = 1), S segments of a rank's part; K rows and M columns of
a state, which are D and E.

What a rank's tokens need of all tokens before them is one state. Each rank sums up the state ``P_r`` that its own
tokens leave and their total log decay ``G_r``, one all-gather passes both round, and the state that enters rank r is

    S_r = sum over j < r of exp(sum of G_i over j < i < r) P_j

From there on the rank computes its part as if it were alone. Gradients go the other way round: the same exchange of
the gradients of the states. A rank sends ``B Hq (D E + 1)`` numbers, and ``B Hq D E`` back, whatever T. Without decay
this is LASP-2 (arXiv 2502.07563).

Summing up reads keys and values once more (where decay makes a token's weight zero at the end, not even those), but it
is not lost: where heads are too few to fill a GPU, the part is cut into segments, each is summed up for itself, and all
are computed at once, each from the state that enters it.

Backwards, the gradient of the queries, a third of the work, needs only states of the forward pass: a second stream
computes it beside the exchange, and beside the other gradients, which wait for the exchange. Forwards there is nothing
of the kind. The part could be computed from an empty state meanwhile, but adding what the entering state contributes
reads q and rewrites o, which rounds it twice and takes longer than the exchange.
"""

import bisect
import contextlib
import functools
import itertools
from collections.abc import Iterator
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
    segments = _choose_segments(q, v, cu_seqlens, name)
    options = _Options(scale, return_final_state, name, group, sequences, segments)
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
        return total.mT, total[..., -1].contiguous()
    total = decay.flip(-1).cumsum(-1).flip(-1)
    return (total - decay).mT, total[..., 0].contiguous()


def _sum_up(y: Tensor, z: Tensor, log_weight: Tensor, before: bool, heads: int, backend: str) -> Tensor:
    """``sum over tokens of exp(log weight) y_t z_t^T`` in float32 or wider, in parts to be added: ``[., B, Hq, K, M]``.

    ``y [B, T, *, K]`` and ``z [B, T, *, M]`` with Hq heads or a divisor of it; ``log_weight`` as `_log_weights` gave
    it, ``before`` as well.
    """
    if backend == "triton":
        from tnl.ops import states_triton

        return call_on_device(states_triton.sum_up, y, z, log_weight, before, heads)
    batch, tokens = y.shape[:2]
    out = torch.zeros(1, batch, heads, y.shape[-1], z.shape[-1], dtype=log_weight.dtype, device=y.device)
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
        out[0] += torch.einsum("bthk,bthm->bhkm", yc * weight[..., None], zc)
    return out


def _choose_segments(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, backend: str) -> int:
    """Into how many segments, all of one length, a rank's part is cut."""
    if backend != "triton" or cu_seqlens is not None:
        return 1
    from tnl.ops.segments_triton import segments_of

    return segments_of(q, v.shape[-1])


def _cut(x: Tensor, segments: int) -> Tensor:
    """``[B, T, ...]`` as ``[B S, T / S, ...]``: segments side by side, as sequences of their own."""
    return x if segments == 1 else x.reshape(x.shape[0] * segments, -1, *x.shape[2:])


def _join(x: Tensor, segments: int) -> Tensor:
    """``[B S, T / S, ...]`` as ``[B, T, ...]``."""
    return x if segments == 1 else x.reshape(x.shape[0] // segments, -1, *x.shape[2:])


# --- Exchange --------------------------------------------------------------------------------------------------


class _Exchange:
    """An all-gather of one state ``[B, Hq, K, M]`` and, forward, total log decay ``[B, Hq]`` a rank.

    Few calls on the host: at a quarter of a million tokens they, not the bytes, decide what an exchange costs.

    Attributes:
        state: To be sent by this rank.
        decay: To be sent as well; None backwards. A total of -inf says that nothing passes through this rank.
        own: The state of each segment of this rank ``[B S, Hq, K, M]``, without what enters it.
        passed: The total log decay of each segment ``[B S, Hq]``.
    """

    own: Tensor
    passed: Tensor

    def __init__(self, batch: int, heads: int, y: Tensor, z: Tensor, before: bool, options: "_Options") -> None:
        K, M = y.shape[-1], z.shape[-1]
        self._size, self._options, self._before = batch * heads * K * M, options, before
        numbers = self._size + (0 if before else batch * heads)
        self._sent = torch.empty(numbers, dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
        self.state = self._sent[: self._size].view(batch, heads, K, M)
        self.decay = None if before else self._sent[self._size :].view(batch, heads)

    def fill(self, parts: Tensor, passed: Tensor, begun: Tensor | None) -> None:
        """From the sums of the segments, what leaves the last one; ``begun`` is the state that enters the first."""
        options = self._options
        self.passed = passed
        arguments = (parts, passed, begun, options.scale if self._before else 1.0, self._before, self.state, self.decay)
        if options.backend == "triton":
            from tnl.ops import states_triton

            self.own = call_on_device(states_triton.leave, *arguments)
        else:
            self.own = _leave(*arguments)

    def run(self) -> None:
        """Send ``state`` and ``decay``, once they are filled, round.

        On the current stream, whose next kernel has to wait for it in any case: NCCL's own stream would be two events
        away, there and back.
        """
        group = self._options.group
        self._received = self._sent.new_empty(dist.get_world_size(group), len(self._sent))
        _all_gather(self._received.view(-1), self._sent, group=group)

    def decays(self) -> Tensor:
        """Forward, after :meth:`run`: the total log decays of all ranks ``[R, B, Hq]``."""
        assert self.decay is not None
        return self._received[:, self._size :].clone().view(-1, *self.decay.shape)

    def enter(self, decays: Tensor, begun: Tensor | None, segments: int) -> Tensor:
        """The states ``[B S, Hq, K, M]`` that enter this rank's segments.

        The first one's is ``begun`` where given; else it is combined from all ranks before this one, backwards from all
        behind it.
        """
        group = self._options.group
        count, rank = dist.get_world_size(group), dist.get_rank(group)
        ranks = range(count - 1, rank, -1) if self._before else range(rank)
        states = self._received[:, : self._size].unflatten(1, self.state.shape)
        own, passed = (None, None) if segments == 1 else (self.own, self.passed)
        arguments = (states, decays, ranks, begun, own, passed, segments, self._before)
        if self._options.backend == "triton":
            from tnl.ops import states_triton

            return call_on_device(states_triton.enter, *arguments)
        return _enter(*arguments)


def _leave(
    parts: Tensor,
    passed: Tensor,
    begun: Tensor | None,
    scale: float,
    before: bool,
    state: Tensor,
    decay: Tensor | None,
) -> Tensor:
    """Fill ``state [B, Hq, K, M]`` and ``decay [B, Hq]`` with what leaves the last segment.

    Args:
        parts: ``[., B S, Hq, K, M]``: their sum, times ``scale``, is each segment's own state, which is returned.
        passed: ``[B S, Hq]``, its log decay.
        begun: ``[B, Hq, K, M]``, what enters the first segment; None for nothing.
        scale: Factor.
        before: Segments are passed through from the last to the first.
        state: Filled.
        decay: Filled if not None.
    """
    own = parts.sum(0) * scale
    batch = len(state)
    states, losses = own.unflatten(0, (batch, -1)), passed.unflatten(0, (batch, -1))
    if decay is not None:
        torch.sum(losses, 1, out=decay)
    leaving = torch.zeros_like(state) if begun is None else begun
    order = range(states.shape[1])
    for j in reversed(order) if before else order:
        leaving = torch.addcmul(states[:, j], losses[:, j, :, None, None].exp(), leaving)
    state.copy_(leaving)
    return own


def _enter(
    states: Tensor,
    decays: Tensor,
    ranks: range,
    begun: Tensor | None,
    own: Tensor | None,
    passed: Tensor | None,
    segments: int,
    before: bool,
) -> Tensor:
    """The states that enter the segments ``[B S, Hq, K, M]``, the first one's being that of some ranks, or ``begun``.

    Args:
        states: ``[R, B, Hq, K, M]``, what left each rank.
        decays: ``[R, B, Hq]``, its total log decay.
        ranks: Those that come before the first segment, the furthest first.
        begun: ``[B, Hq, K, M]``, what was there before them; None for nothing.
        own: ``[B S, Hq, K, M]``; needed, as ``passed``, where there are several segments.
        passed: ``[B S, Hq]``.
        segments: S.
        before: Segments are passed through from the last to the first.
    """
    state = torch.zeros_like(states[0]) if begun is None else begun
    for i in ranks:
        state = torch.addcmul(states[i], decays[i, :, :, None, None].exp(), state)
    if own is None or passed is None:
        return state
    entering = torch.empty_like(own)
    each, inner, losses = (x.unflatten(0, (-1, segments)) for x in (entering, own, passed))
    order = range(segments)
    for j in reversed(order) if before else order:
        each[:, j] = state
        state = torch.addcmul(inner[:, j], losses[:, j, :, None, None].exp(), state)
    return entering


@functools.lru_cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Enter what it gives to launch on a second stream, behind all that is on the current one as the block begins.

    At the end of the block, after an error too, the current stream waits for the second. So memory that the current
    stream allocated before the block may be used on the second, if it is held until the end. What is allocated on the
    second must not be used elsewhere: the next block would be given it while a stream that it is not behind reads it.

    An exchange that is launched first in the block also gets its multiprocessors first. A walk often has one program
    for each of them, all of which start at once and end together, and NCCL's kernel would wait for that; behind an
    exchange, they take the places that are left, and those of the exchange when it ends.
    """
    if device.type != "cuda":
        yield contextlib.nullcontext()
        return
    current, second = torch.cuda.current_stream(device), _second_stream(device)
    second.wait_stream(current)
    try:
        with torch.cuda.stream(second):
            torch.zeros(1, device=device)  # a moment, in which the exchange starts
        yield torch.cuda.stream(second)
    finally:
        current.wait_stream(second)


# --- Forward and backward --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    scale: float
    return_final_state: bool
    backend: str
    group: dist.ProcessGroup
    sequences: int
    segments: int


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
        segments, need_decay = options.segments, ctx.needs_input_grad[3]
        shape = (q.shape[2], q.shape[3], v.shape[3])
        q, k, v = (_cut(x, segments) for x in (q, k, v))
        if log_decay is not None and log_decay.dim() == 3:
            log_decay = _cut(log_decay, segments)
        begun = None if initial_state is None else initial_state[part.rows]
        exchange = _leaving(k, v, log_decay, begun, q, part, options, before=False)
        exchange.run()
        decays = exchange.decays()
        local = _entering(exchange, decays, begun, part, options, before=False)
        o, final = registered.attention(
            q, k, v, log_decay, local, part.bounds, options.scale, options.return_final_state or need_decay,
            options.backend,
        )  # fmt: skip
        whole = _zeros(q, options.sequences if options.return_final_state else 0, *shape)
        if options.return_final_state:
            assert final is not None
            whole[part.rows][part.ends] = final[segments - 1 :: segments][part.ends]
            dist.all_reduce(whole, group=options.group)
        ctx.save_for_backward(q, k, v, log_decay, local, final if need_decay else None, decays)
        ctx.part, ctx.options, ctx.need_decay = part, options, need_decay
        ctx.has_initial_state = initial_state is not None
        ctx.set_materialize_grads(False)
        return _join(o, segments), whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor | None, dwhole: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, local, final, decays = ctx.saved_tensors
        part, options, segments = ctx.part, ctx.options, ctx.options.segments
        shape = (q.shape[2], q.shape[3], v.shape[3])
        if do is None:
            do = q.new_zeros(*q.shape[:-1], v.shape[-1])
        else:
            do = _cut(do if do.stride(-1) == 1 else do.contiguous(), segments)
        ended = None
        if options.return_final_state:  # all ranks sum up, those that did not use the states too
            dwhole = _zeros(q, options.sequences, *shape) if dwhole is None else dwhole.contiguous().clone()
            dist.all_reduce(dwhole, group=options.group)
            ended = dwhole[part.rows]
        exchange = _leaving(q, do, log_decay, ended, q, part, options, before=True)
        if options.backend == "triton" and not ctx.need_decay:
            from tnl.ops import lightning_triton

            dq = q.new_empty(q.shape)
            with _beside(q.device) as second:
                exchange.run()
                with second:  # dq = A>(do, v, k), from the states of the forward pass
                    call_on_device(
                        lightning_triton.forward,
                        do, v, k, log_decay, local, part.bounds, options.scale, False, True, dq,
                    )  # fmt: skip
                dlocal = _entering(exchange, decays, ended, part, options, before=True)
                _, dk, dv, dinitial, _ = call_on_device(
                    lightning_triton.backward,
                    do, dlocal, q, k, v, log_decay, local, part.bounds, options.scale, False, False, False,
                    ctx.has_initial_state,
                )  # fmt: skip
        else:
            exchange.run()
            dlocal = _entering(exchange, decays, ended, part, options, before=True)
            dq, dk, dv, dlog_decay, dinitial = registered.attention_backward(
                do, dlocal, q, k, v, log_decay, local, final, part.bounds, options.scale, ctx.need_decay,
                options.backend,
            )  # fmt: skip
        dinitial_state = None
        if ctx.has_initial_state:
            assert dinitial is not None
            dinitial_state = _zeros(q, options.sequences, *shape)
            dinitial_state[part.rows][part.begins] = dinitial[::segments][part.begins]
        rate = None  # the gradient of the decay
        if ctx.need_decay:
            assert dlog_decay is not None
            rate = _join(dlog_decay, segments if log_decay.dim() == 3 else 1)
        dq, dk, dv = (_join(x, segments) for x in (dq, dk, dv))
        return dq, dk, dv, rate, dinitial_state, None, None


def _zeros(q: Tensor, *shape: int) -> Tensor:
    """Zeros in the dtype of the states."""
    return torch.zeros(*shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def _leaving(
    y: Tensor,
    z: Tensor,
    log_decay: Tensor | None,
    begun: Tensor | None,
    q: Tensor,
    part: _Part,
    options: _Options,
    before: bool,
) -> _Exchange:
    """An exchange of the state that leaves this rank's tokens, without what enters them from other ranks, to be run.

    ``begun``: states of this rank's sequences that begin here; backwards their gradients, of those that end here.
    """
    heads = q.shape[2]
    exchange = _Exchange(y.shape[0] // options.segments, heads, y, z, before, options)
    some = slice(0, y.shape[1])
    leaves = part.head > 0 if before else part.tail < part.tokens
    if part.bounds is not None:
        some = slice(0, part.head) if before else slice(part.tail, part.tokens)
        y, z = y[:, some], z[:, some]
    if leaves or options.segments > 1:
        weight, passed = _log_weights(log_decay, some, before, q)
        starts = None
        if begun is not None and leaves and not part.passes:  # what leaves began here
            starts = begun[part.enters if before else part.leaves]
        exchange.fill(_sum_up(y, z, weight, before, heads, options.backend), passed, starts)
    else:
        exchange.state.zero_()
    if exchange.decay is not None and not part.passes:
        exchange.decay.fill_(-torch.inf)
    return exchange


def _entering(
    exchange: _Exchange, decays: Tensor, begun: Tensor | None, part: _Part, options: _Options, before: bool
) -> Tensor | None:
    """The states that enter this rank's sequences or segments, None for zeros; ``begun`` as for :func:`_leaving`."""
    enters = part.tail < part.tokens if before else part.head > 0
    if part.bounds is None:
        if not enters and begun is None and options.segments == 1:
            return None
        return exchange.enter(decays, None if enters else begun, options.segments)
    if not enters and begun is None:
        return None
    heads, K, M = exchange.state.shape[1:]
    local = exchange.state.new_zeros(part.sequences, heads, K, M)
    if begun is not None:
        here = part.ends if before else part.begins
        local[here] = begun[here]
    if enters:
        local[part.leaves if before else part.enters] = exchange.enter(decays, None, 1)
    return local
