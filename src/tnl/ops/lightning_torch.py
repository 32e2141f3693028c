"""Lightning attention in plain PyTorch: the definition, and the chunked form for any device and dtype.

Dimensions: B batch, T tokens, H key/value heads, Hq query heads (a multiple of H), D key width, E value width,
N sequences (N = B, or the number of packed sequences when B = 1), C tokens in a chunk.

The definition is written twice, token by token (:func:`recurrence`) and as masked attention (:func:`quadratic`);
both are for reading and for tests. :func:`forward`, :func:`backward` and :func:`step` are what
:mod:`tnl.ops.lightning` calls.

The backward pass needs no algorithm of its own. With ``A>`` the causal operator and ``A<`` the same running from
the last token to the first (docs/operator.md):

    o = A>(q, k, v)    dq = A>(do, v, k)    dk = A<(v, do, q)    dv = A<(k, q, do)
"""

import itertools

import torch
from torch import Tensor

CHUNK = 128


def _expand_decay(log_decay: Tensor | None, batch: int, tokens: int, heads: int) -> Tensor:
    """Log decay as ``[B, T, Hq]``, float64, whatever form it was given in."""
    if log_decay is None:
        return torch.zeros(batch, tokens, heads, dtype=torch.float64)
    return log_decay.double().expand(batch, tokens, heads)


def _sequences(tokens: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """Begin and end of each sequence of a row."""
    if cu_seqlens is None:
        return [(0, tokens)]
    bounds = cu_seqlens.tolist()
    return list(itertools.pairwise(bounds))


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other, in float64 (arXiv 2405.17381, eq. 6 and 7).

    ``S_t = exp(g_t) S_{t-1} + k_t v_t^T`` and ``o_t = scale * q_t S_t``. Arguments and results are those of
    :func:`tnl.ops.lightning_attention`; the results are float64. Differentiable by autograd.
    """
    batch, tokens, heads, _ = q.shape
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    decay = _expand_decay(log_decay, batch, tokens, heads).exp()
    outputs, finals = [], []
    for n, (begin, end) in enumerate(_sequences(tokens, cu_seqlens)):
        if initial_state is None:
            state = q.new_zeros(batch, heads, q.shape[-1], v.shape[-1])
        else:
            state = initial_state.double() if cu_seqlens is None else initial_state[n : n + 1].double()
        for t in range(begin, end):
            state = decay[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append(scale * torch.einsum("bhd,bhde->bhe", q[:, t], state))
        finals.append(state)
    return torch.stack(outputs, dim=1), torch.cat(finals)


def quadratic(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """The definition as masked attention in float64, ``o = scale * ((q k^T) * M) v`` (arXiv 2405.17381, eq. 4).

    ``M[t, s] = exp(sum of log_decay over s+1..t)`` for ``s <= t``, else 0. No state; time and memory grow as T^2.
    """
    batch, tokens, heads, _ = q.shape
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    total = _expand_decay(log_decay, batch, tokens, heads).cumsum(1)
    exponent = total[:, :, None] - total[:, None, :]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = exponent.masked_fill(~causal[None, :, :, None], -torch.inf).exp()
    return scale * torch.einsum("bthd,bshd,btsh,bshe->bthe", q, k, mask, v)


def _chunk_weights(log_decay: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decay factors inside a chunk, from its log decays ``[.., C]``.

    Returns the mask ``[.., C, C]``, the weight with which a token reads the state that enters the chunk and with
    which it is written to the state that leaves it (both ``[.., C, 1]``), and the loss of the state over the chunk,
    ``decay - 1``, ``[.., 1, 1]``: a decay next to 1 would be rounded, the same way in each chunk, and over many chunks
    that adds up. Running backwards in time transposes the mask and exchanges reading and writing.
    """
    total = log_decay.cumsum(-1)
    exponent = total[..., :, None] - total[..., None, :]
    upper = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=exponent.device).triu(1)
    mask = exponent.masked_fill_(upper, -torch.inf).exp_()
    from_start, to_end = total.exp(), (total[..., -1:] - total).exp()
    loss = total[..., -1:, None].expm1()
    if reverse:
        return mask.mT, to_end[..., None], from_start[..., None], loss
    return mask, from_start[..., None], to_end[..., None], loss


def _scan_sequence(
    tensors: tuple[Tensor, Tensor, Tensor],
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
    reverse: bool,
    output: Tensor,
) -> Tensor:
    """One sequence (or a batch of equally long ones) of ``A>(x, y, z)``, or of ``A<`` when ``reverse``.

    ``x, y [B, T, *, K]``, ``z [B, T, *, M]`` with Hq heads or a divisor of it; ``state [B, Hq, K, M]`` in the dtype of
    accumulation. Writes ``output [B, T, Ho, M]``; where it has fewer than Hq heads, a group's outputs are summed.
    Returns the state that leaves. ``scale`` belongs to the query: to what reads in ``A>``, is written in ``A<``.
    """
    x, _y, z = tensors
    batch, tokens = x.shape[:2]
    heads = max(t.shape[2] for t in tensors)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    if state is None:
        state = torch.zeros(batch, heads, x.shape[-1], z.shape[-1], dtype=work, device=x.device)
    per_token = log_decay is not None and log_decay.dim() == 3
    constant: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}  # by the length of the chunk

    begins = range(0, tokens, CHUNK)
    for begin in reversed(begins) if reverse else begins:
        end = min(begin + CHUNK, tokens)
        xc, yc, zc = (t[:, begin:end].transpose(1, 2).to(work) for t in tensors)
        xc, yc, zc = (
            t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1) for t in (xc, yc, zc)
        )
        if per_token:
            assert log_decay is not None
            weights = _chunk_weights(log_decay[:, begin:end].transpose(1, 2).to(work), reverse)
        else:
            if end - begin not in constant:
                rate = xc.new_zeros(heads) if log_decay is None else log_decay.to(work)
                constant[end - begin] = _chunk_weights(rate[:, None].expand(-1, end - begin), reverse)
            weights = constant[end - begin]
        mask, read, write, loss = weights

        scores = (xc @ yc.mT).mul_(mask)
        result = scores @ zc
        if reverse:
            result.mul_(scale).add_((xc @ state).mul_(read))
            update = (yc * (write * scale)).mT @ zc
        else:
            result.add_((xc @ state).mul_(read)).mul_(scale)
            update = (yc * write).mT @ zc
        state = state + update.addcmul_(state, loss)
        if output.shape[2] != heads:
            result = result.unflatten(1, (output.shape[2], -1)).sum(2)
        output[:, begin:end] = result.transpose(1, 2)
    return state


def scan(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool = False,
    output_heads: int | None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``A>(x, y, z)`` or ``A<`` over a batch or over packed sequences, in chunks; the state in float32 or float64.

    Returns the output ``[B, T, output_heads, M]`` and the states that leave ``[N, Hq, K, M]``.
    """
    shape = (*x.shape[:2], output_heads or max(t.shape[2] for t in (x, y, z)), z.shape[-1])
    output = torch.empty(shape, dtype=output_dtype or x.dtype, device=x.device)
    if cu_seqlens is None:
        return output, _scan_sequence((x, y, z), log_decay, state, scale, reverse, output)
    states = []
    for n, (begin, end) in enumerate(_sequences(x.shape[1], cu_seqlens)):
        rows = slice(begin, end)
        decay = log_decay[:, rows] if log_decay is not None and log_decay.dim() == 3 else log_decay
        initial = None if state is None else state[n : n + 1]
        states.append(
            _scan_sequence((x[:, rows], y[:, rows], z[:, rows]), decay, initial, scale, reverse, output[:, rows])
        )
    return output, torch.cat(states)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_final_state: bool = True,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(o, final_state)``, the state always there; shapes as in :func:`tnl.ops.lightning_attention`.

    States are ``[N, Hq, E, D]`` where ``transposed``, here and in :func:`backward` and :func:`step`.
    """
    if initial_state is not None and transposed:
        initial_state = initial_state.mT
    o, final_state = scan(q, k, v, log_decay, initial_state, cu_seqlens, scale)
    return o, final_state.mT.contiguous() if transposed else final_state


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """``(dq, dk, dv, dinitial_state, difference)`` from the gradients of ``o`` and of the final state.

    ``difference [B, T, Hq] = q . dq - k . dk``, from which the decay's gradient follows, is there on request only.
    """
    state_ed = None if initial_state is None else initial_state if transposed else initial_state.mT
    dstate_ed = None if dfinal_state is None else dfinal_state if transposed else dfinal_state.mT
    dstate_de = None if dstate_ed is None else dstate_ed.mT
    heads, kv_heads = q.shape[2], k.shape[2]
    dv, dinitial_state = scan(k, q, do, log_decay, dstate_de, cu_seqlens, scale, True, kv_heads)
    if transposed:
        dinitial_state = dinitial_state.mT.contiguous()
    if not need_decay:
        dq, _ = scan(do, v, k, log_decay, state_ed, cu_seqlens, scale)
        dk, _ = scan(v, do, q, log_decay, dstate_ed, cu_seqlens, scale, True, kv_heads)
        return dq, dk, dv, dinitial_state, None
    work = torch.promote_types(q.dtype, torch.float32)
    dq, _ = scan(do, v, k, log_decay, state_ed, cu_seqlens, scale, output_dtype=work)
    dk, _ = scan(v, do, q, log_decay, dstate_ed, cu_seqlens, scale, True, heads, work)
    difference = (q * dq).sum(-1) - (k.repeat_interleave(heads // kv_heads, dim=2) * dk).sum(-1)
    dk = dk.unflatten(2, (kv_heads, -1)).sum(3)
    return dq.to(q.dtype), dk.to(k.dtype), dv, dinitial_state, difference


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
    if q.dim() == 3:
        decay = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, None]
        return step(q[:, None], k[:, None], v[:, None], decay, state, scale, indices, transposed, states)[:, 0]
    if transposed:
        state, states = state.mT, None if states is None else states.mT
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    o = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    loss = None
    if log_decay is not None:
        loss = log_decay.to(state.dtype).expm1().expand(*o.shape[:2], heads)[..., None, None]
    new = state if indices is None else state[indices.clamp(min=0).long()]
    for t in range(q.shape[1]):
        update = k[:, t, :, :, None] * v[:, t, :, None, :]
        if loss is not None:
            update.addcmul_(new, loss[:, t])
        new.add_(update)
        o[:, t] = (q[:, t, :, None] @ new)[:, :, 0].mul_(scale)
        if states is not None:
            states[:, t] = new
    if indices is None:
        return o
    padding = indices < 0  # its output is zero and no state changes
    state.index_copy_(0, indices[~padding].long(), new[~padding])
    if states is not None:
        states.masked_fill_(padding[:, None, None, None, None], 0.0)
    return o.masked_fill_(padding[:, None, None, None], 0.0)
