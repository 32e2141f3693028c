"""The recurrent states in vLLM's memory, and which of them belong to the requests of a step.

Dimensions: R requests of a step, decodes first, N tokens of the step, H heads of this rank, D = E width of a head,
P rows of a pool.
"""

from typing import Any, ClassVar

import torch

# Imported for the operator `vllm::linear_attention`, at which vLLM cuts its compiled graphs.
import vllm.model_executor.layers.mamba.linear.minimax_linear_attn  # noqa: F401
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import (
    NULL_BLOCK_ID,
    mamba_get_block_table_tensor,
    split_decodes_and_prefills,
)

from tnl.serving.pooled import PooledStep, attend


class StatePool(MambaBase):
    """One state a request, `[H, D, E]` float32, as vLLM pages it; a layer with LRPE has two.

    With all states of a model in one shape vLLM keeps them in one group, without padding; in a hybrid stack in several
    groups, in each of which a request has a row of its own.

    Attributes:
        kv_cache: `(pool,)`, the pool `[P, H, D, E]`, set by vLLM. Rows lie apart, each state is contiguous.
    """

    def __init__(self, vllm_config: VllmConfig, name: str, shape: tuple[int, int, int]) -> None:
        self.name = name
        self.shape = shape
        vllm_config.compilation_config.static_forward_context[name] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The kind of state, as vLLM sorts them."""
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, int, int]]:
        """`((H, D, E),)`."""
        return (self.shape,)

    def get_state_dtype(self) -> tuple[torch.dtype]:
        """float32 whatever the model's dtype: a 16-bit sum over a long text stops taking in what is added."""
        return (torch.float32,)

    def get_attn_backend(self) -> type[AttentionBackend]:
        """What builds the metadata of a step."""
        return LightningBackend


class LightningMetadataBuilder(AttentionMetadataBuilder[PooledStep]):
    """Builds the metadata of a step, and empties the states of the requests that begin in it."""

    reorder_batch_threshold: int = 1  # decodes first
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # A CUDA graph reads the rows from where they were when it was captured.
        self.decode_rows = torch.empty(
            vllm_config.scheduler_config.max_num_batched_tokens, dtype=torch.int32, device=device
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PooledStep:
        """The metadata of a step."""
        rows = self._rows(common_attn_metadata)
        self._empty_new_states(common_attn_metadata, rows)
        return self._describe(common_attn_metadata, rows)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> PooledStep:
        """The metadata of a step that is recorded; its requests do not exist."""
        return self._describe(common_attn_metadata, self._rows(common_attn_metadata))

    def _rows(self, step: CommonAttentionMetadata) -> Tensor:
        """Row of each request in the pool, `[R]`: with prefix caching that of the block it is in now."""
        mode = self.vllm_config.cache_config.mamba_cache_mode
        return mamba_get_block_table_tensor(step.block_table_tensor, step.seq_lens, self.kv_cache_spec, mode)[:, 0]

    def _empty_new_states(self, step: CommonAttentionMetadata, rows: Tensor) -> None:
        """Zero the states of requests of which no token was read before, prompts of one token among them.

        Here and not in the layers: to vLLM a prompt of one token looks like a decode, whose CUDA graph would need a
        pass over all states to find those to empty. The lengths on the host are exact for prompts.
        """
        assert step.seq_lens_cpu_upper_bound is not None
        lengths = step.query_start_loc_cpu.diff()
        new = (lengths > 0) & (step.seq_lens_cpu_upper_bound[: len(lengths)] == lengths)
        if not new.any():
            return
        which = new.nonzero()[:, 0].to(rows.device, non_blocking=True)
        new_rows = rows[which].long()
        for name in self.layer_names:
            (pool,) = self.vllm_config.compilation_config.static_forward_context[name].kv_cache
            pool.index_fill_(0, new_rows, 0.0)

    def _describe(self, step: CommonAttentionMetadata, rows: Tensor) -> PooledStep:
        decodes, prefills, *_ = split_decodes_and_prefills(step, decode_threshold=self.reorder_batch_threshold)
        decode_rows = self.decode_rows[:decodes]
        # What pads a CUDA graph has no tokens, or vLLM's null block; it shall read and write no row.
        padding = (step.seq_lens[:decodes] == 0) | (rows[:decodes] == NULL_BLOCK_ID)
        decode_rows.copy_(rows[:decodes].masked_fill(padding, -1))
        lengths = step.query_start_loc_cpu[decodes : decodes + prefills + 1].diff()
        return PooledStep.of(decode_rows, rows[decodes : decodes + prefills].long(), lengths)


class LightningBackend(AttentionBackend):
    """How vLLM finds the metadata builder."""

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's log."""
        return "TNL_LIGHTNING"

    @staticmethod
    def get_builder_cls() -> type[LightningMetadataBuilder]:
        """The metadata builder."""
        return LightningMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """It keeps states, no keys and values."""
        return True


class PooledLightningAttention:
    """The operator over the requests of a step, on states from the pool.

    To vLLM's compiler it is one opaque call, by the name under which it is registered.

    Args:
        vllm_config: vLLM's configuration, where it and its pools are registered.
        name: Name of the layer.
        state_shape: `(H, D, E)` of one pool.
        parts: Pools of the layer: 2 with LRPE, otherwise 1. Keys are `parts * D` wide.
        log_decay: `[H]` float32 or `None`.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        name: str,
        state_shape: tuple[int, int, int],
        parts: int,
        log_decay: Tensor | None,
    ) -> None:
        self.name = name
        self.state_shape = state_shape
        self.log_decay = log_decay
        self.pools = [StatePool(vllm_config, f"{name}.state{part}", state_shape) for part in range(parts)]
        vllm_config.compilation_config.static_forward_context[name] = self

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Attend to what each request has read so far.

        Args:
            query: `[N, H, parts D]`; key alike.
            key: `[N, H, parts D]`.
            value: `[N, H, E]`.
            positions: `[N]`, handed through.

        Returns:
            `[N, H, E]`.
        """
        qkv = torch.cat([query, key, value], dim=-1)
        output = torch.empty_like(value)
        torch.ops.vllm.linear_attention(qkv, output, positions, self.name)
        return output

    def _forward(self, hidden_states: Tensor, output: Tensor, positions: Tensor) -> None:
        """What `vllm::linear_attention` calls; its arguments are named by vLLM."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory before there is a pool
            output.zero_()
            return
        width = self.state_shape[1] * len(self.pools)
        query, key, value = hidden_states.split([width, width, self.state_shape[2]], dim=-1)
        pools = [pool for state in self.pools for pool in state.kv_cache]
        steps = [metadata[state.name] for state in self.pools]
        attend(steps, query, key, value, self.log_decay, pools, output)
