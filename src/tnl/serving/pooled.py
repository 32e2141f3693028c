"""The operator over the requests of one step of a server, on states that stay in a pool. Knows no server.

Dimensions: N tokens of the step laid end to end, first those of the decodes (one a request), then those of the
prefills (any number a request); H heads, E width of a head, P rows of a pool.

A layer with LRPE has keys of 2 E and two pools, the halves of its states `[H, 2 E, E]` that belong to cosine and
sine: `q S = (q cos) S_cos + (q sin) S_sin`. So all states of a model have one shape, `[H, E, E]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnl.ops import lightning_attention, lightning_attention_step
from tnl.ops.backends import call_on_device, resolve_backend


@dataclass(frozen=True)
class PooledStep:
    """Which rows of a pool the requests of a step have.

    Attributes:
        decode_rows: Row of each decode, `[decodes]` int32, each at most once; negative for padding.
        prefill_rows: Row of each prefill, `[prefills]` int64, each at most once.
        prefill_bounds: Boundaries of the prefills in the tokens after the decodes, `[prefills + 1]` int32, from 0.
        prefill_order: The prefills from the longest to the shortest, `[prefills]` int32: on a GPU the longest begin
            first, so that none of them is what all wait for.
        longest_prefill: Tokens of the longest one, 0 without any.
        num_tokens: Tokens of the step; what comes after them is padding and is left alone.
    """

    decode_rows: Tensor
    prefill_rows: Tensor
    prefill_bounds: Tensor
    prefill_order: Tensor
    longest_prefill: int
    num_tokens: int

    @classmethod
    def of(cls, decode_rows: Tensor, prefill_rows: Tensor, lengths: Tensor) -> "PooledStep":
        """A step by the lengths of its prefills, `[prefills]` on the host."""
        device = prefill_rows.device
        return cls(
            decode_rows=decode_rows,
            prefill_rows=prefill_rows,
            prefill_bounds=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device, non_blocking=True),
            prefill_order=lengths.argsort(descending=True).int().to(device, non_blocking=True),
            longest_prefill=int(lengths.max()) if len(lengths) else 0,
            num_tokens=len(decode_rows) + int(lengths.sum()),
        )


def attend(
    steps: Sequence[PooledStep],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    pools: Sequence[Tensor],
    output: Tensor,
    backend: str = "auto",
) -> None:
    """Let each token attend to all that its request has read; move the states on.

    The decodes are one call of :func:`tnl.ops.lightning_attention_step` a pool, the prefills one packed call of
    :func:`tnl.ops.lightning_attention`; in Triton their kernels on the pool itself. Neither reads nor writes another
    row of the pools than those of the step.

    Args:
        steps: Rows in each of the pools, and boundaries, which are the same in all.
        query: `[N, H, len(pools) E]`; `key` alike.
        key: `[N, H, len(pools) E]`.
        value: `[N, H, E]`.
        log_decay: `[H]` float32, or `None` for no decay.
        pools: One, or two with LRPE: `[P, H, E, E]` float32, each state contiguous, updated in place.
        output: `[N, H, E]`, written in place.
        backend: As in :func:`tnl.ops.lightning_attention`.
    """
    decodes, end = len(steps[0].decode_rows), steps[0].num_tokens
    decode, prefill = _decode_copied, _prefill_copied
    if resolve_backend(backend, query) == "triton":
        from tnl.serving.pooled_triton import decode, prefill
    if decodes:
        q, k, v, into = (x[:decodes] for x in (query, key, value, output))
        call_on_device(decode, q, k, v, log_decay, pools, [step.decode_rows for step in steps], into)
    if end > decodes:
        q, k, v, into = (x[decodes:end] for x in (query, key, value, output))
        call_on_device(prefill, q, k, v, log_decay, pools, steps, into)


def _decode_copied(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    pools: Sequence[Tensor],
    rows: Sequence[Tensor],
    output: Tensor,
) -> None:
    """What :func:`tnl.serving.pooled_triton.decode` does."""
    if len(pools) > 1:  # in float32, so that the sum of the halves is rounded once, as in training
        query, key, value = query.float(), key.float(), value.float()
    width = value.shape[-1]
    parts = zip(query.split(width, -1), key.split(width, -1), pools, rows, strict=True)
    outputs = [
        lightning_attention_step(q, k, value, log_decay, pool, state_indices=at, backend="torch")
        for q, k, pool, at in parts
    ]
    output.copy_(torch.stack(outputs).sum(0) if len(outputs) > 1 else outputs[0])


def _prefill_copied(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    pools: Sequence[Tensor],
    steps: Sequence[PooledStep],
    output: Tensor,
) -> None:
    """What :func:`tnl.serving.pooled_triton.prefill` does in place, with copies of the states."""
    states = [pool[step.prefill_rows] for pool, step in zip(pools, steps, strict=True)]
    result, final = lightning_attention(
        query[None],
        key[None],
        value[None],
        log_decay,
        initial_state=torch.cat(states, dim=2),
        return_final_state=True,
        cu_seqlens=steps[0].prefill_bounds,
        backend="torch",
    )
    assert final is not None
    output.copy_(result[0])
    for pool, step, part in zip(pools, steps, final.chunk(len(pools), dim=2), strict=True):
        pool[step.prefill_rows] = part
