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
        num_tokens: Tokens of the step; what comes after them is padding and is left alone.
    """

    decode_rows: Tensor
    prefill_rows: Tensor
    prefill_bounds: Tensor
    num_tokens: int


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
    :func:`tnl.ops.lightning_attention`. Neither reads nor writes another row of the pools than those of the step.

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
    backend = resolve_backend(backend, query)
    decodes, end = len(steps[0].decode_rows), steps[0].num_tokens
    if decodes:
        output[:decodes] = _decode(steps, query[:decodes], key[:decodes], value[:decodes], log_decay, pools, backend)
    if end > decodes:
        tokens = slice(decodes, end)
        prefill = _prefill_copied
        if backend == "triton":
            from tnl.serving.pooled_triton import prefill
        rows = [step.prefill_rows for step in steps]
        call_on_device(
            prefill, query[tokens], key[tokens], value[tokens], log_decay, pools, rows, steps[0].prefill_bounds,
            output[tokens],
        )  # fmt: skip


def _decode(
    steps: Sequence[PooledStep],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    pools: Sequence[Tensor],
    backend: str,
) -> Tensor:
    rows = [step.decode_rows for step in steps]
    if len(pools) == 1:
        return lightning_attention_step(query, key, value, log_decay, pools[0], state_indices=rows[0], backend=backend)
    # In float32, so that the sum of the halves is rounded once, as in training.
    query, key, value = query.float(), key.float(), value.float()
    parts = zip(query.chunk(len(pools), -1), key.chunk(len(pools), -1), pools, rows, strict=True)
    outputs = [
        lightning_attention_step(part_query, part_key, value, log_decay, pool, state_indices=at, backend=backend)
        for part_query, part_key, pool, at in parts
    ]
    return torch.stack(outputs).sum(0)


def _prefill_copied(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    pools: Sequence[Tensor],
    rows: Sequence[Tensor],
    cu_seqlens: Tensor,
    output: Tensor,
) -> None:
    """What :func:`tnl.serving.pooled_triton.prefill` does in place, with copies of the states."""
    result, final = lightning_attention(
        query[None],
        key[None],
        value[None],
        log_decay,
        initial_state=torch.cat([pool[at] for pool, at in zip(pools, rows, strict=True)], dim=2),
        return_final_state=True,
        cu_seqlens=cu_seqlens,
        backend="torch",
    )
    assert final is not None
    output.copy_(result[0])
    for pool, at, part in zip(pools, rows, final.chunk(len(pools), dim=2), strict=True):
        pool[at] = part
