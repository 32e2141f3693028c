"""The layers of TNL (TransNormerLLM, arXiv 2405.17381 and 2307.14995): norm, attention, gated linear unit, block.

Dimensions: B batch, T tokens, d width of the residual stream, H heads, E width of a head, D width of its keys (E, or
2 E in a layer with LRPE), N documents packed into one call.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tnl.models.tnl.cache_tnl import TnlCache, TnlCacheLayer
from tnl.models.tnl.configuration_tnl import TnlConfig
from tnl.ops import lightning_attention, lightning_attention_step
from tnl.ops.gated_linear_unit import gated_linear_unit
from tnl.ops.norm import gated_srms_norm, srms_norm
from tnl.ops.streams import split_streams

LRPE_BASE = 10000.0


def one_plus_elu(x: Tensor) -> Tensor:
    """`1 + elu(x)`, which is positive."""
    return 1 + F.elu(x)


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "1+elu": one_plus_elu,
    "none": nn.Identity(),
}


class TnlNorm(nn.Module):
    """SRMSNorm over the last dim: `x / sqrt(mean(x^2) + eps)`, no weight (arXiv 2307.14995 section 3.1.3).

    Computed in float32 whatever the model's dtype, float64 included, as in the released code and in the
    norms of transformers. Variants by `norm_type`: with a weight, or LayerNorm.
    """

    def __init__(self, config: TnlConfig, width: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.centred = config.norm_type == "layer"
        self.weight = nn.Parameter(torch.ones(width)) if config.norm_type != "srms" else None
        self.bias = nn.Parameter(torch.zeros(width)) if self.centred else None

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise `[..., width]` and multiply by the gate; the result has the input's dtype."""
        if self.weight is None and gate is not None and hidden_states.dtype != torch.float64:
            return gated_srms_norm(hidden_states, gate, eps=self.eps)
        normed = hidden_states.float() if hidden_states.dtype == torch.float64 else hidden_states
        if self.centred:
            normed = F.layer_norm(normed.float(), normed.shape[-1:], eps=self.eps)
        else:
            normed = srms_norm(normed, eps=self.eps)
        if self.weight is not None:
            normed = normed * self.weight
        if self.bias is not None:
            normed = normed + self.bias
        normed = normed.to(hidden_states.dtype)
        return normed if gate is None else gate * normed


class TnlRelativePositions(nn.Module):
    """LRPE-d: `x -> concat[x cos(theta t), x sin(theta t)]` with learnt theta (arXiv 2307.14995 section 3.1.1).

    The product of an encoded query and an encoded key depends on the difference of their positions
    alone, so a shift of all positions changes nothing.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set theta to `10000^(-2 i / E)`, i = 0..E-1, in every head."""
        exponent = torch.arange(self.theta.shape[-1], dtype=torch.float64, device=self.theta.device)
        theta = LRPE_BASE ** (-2 / self.theta.shape[-1] * exponent)
        initialization.copy_(self.theta, theta.expand_as(self.theta))

    def rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of `theta t`, as `rotation_by` gives them."""
        return self.rotation_by(self.theta, position_ids, dtype)

    @staticmethod
    def rotation_by(theta: Tensor, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of `theta t`.

        The angle is reduced to one turn in float64: at a position of a million, float32 would be off
        by several hundredths of a radian.

        Args:
            theta: `[H, 1, E]`.
            position_ids: `[B or 1, T]` integers.
            dtype: dtype of the result.

        Returns:
            Two tensors `[B or 1, T, H, E]`.
        """
        angle = position_ids[..., None, None].double() * theta[:, 0].double()
        angle = torch.remainder(angle, 2 * math.pi).to(dtype)
        return angle.cos(), angle.sin()

    def forward(self, query: Tensor, key: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode queries and keys `[B, T, H, E]` into `[B, T, H, 2 E]`."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        cosine, sine = self.rotation(position_ids, dtype)
        return (
            torch.cat([query * cosine, query * sine], dim=-1).to(query.dtype),
            torch.cat([key * cosine, key * sine], dim=-1).to(key.dtype),
        )


class TnlAttention(nn.Module):
    """Gated linear attention: `W_o (u * SRMSNorm(o))` (arXiv 2307.14995 section 3.1.2).

    `q, k, v, u` come from one projection; q and k pass through SiLU; the norm runs over all heads
    together. Variants: `gate`, `hidden_act` and `value_act` of the configuration.
    """

    def __init__(self, config: TnlConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, _, self.head_dim = config.state_shape(layer_idx)
        self.gate = config.gate
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]
        self.value_activation = ACTIVATION_FUNCTIONS[config.value_act]
        width = self.num_heads * self.head_dim
        streams = 4 if config.gate in ("linear", "sigmoid") else 3
        self.splits_as_tnl = streams == 4 and (config.hidden_act, config.value_act) == ("silu", "none")
        self.qkvu_proj = nn.Linear(config.hidden_size, streams * width, bias=False)
        if config.gate == "low_rank_sigmoid":
            self.gate_down_proj = nn.Linear(config.hidden_size, self.head_dim, bias=False)
            self.gate_up_proj = nn.Linear(self.head_dim, width, bias=False)
        self.norm = TnlNorm(config, width)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        uses_lrpe = config.uses_lrpe(layer_idx)
        self.lrpe = TnlRelativePositions(self.num_heads, self.head_dim) if uses_lrpe else None
        # Called without a cache; what shares rows between processes puts its own in place.
        self.operator: Callable[..., tuple[Tensor, Tensor | None]] = lightning_attention

    def forward(
        self,
        hidden_states: Tensor,
        log_decay: Tensor | None,
        position_ids: Tensor,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: TnlCache | None = None,
    ) -> Tensor:
        """Attend within each row, or within each packed document; see `TnlDecoderLayer.forward`."""
        batch, length, _ = hidden_states.shape
        qkvu = self.qkvu_proj(hidden_states).view(batch, length, -1, self.num_heads, self.head_dim)
        if self.splits_as_tnl:
            query, key, value, gate = split_streams(qkvu)
        else:
            streams = qkvu.unbind(2)
            query, key = self.activation(streams[0]), self.activation(streams[1])
            value, gate = self.value_activation(streams[2]), streams[-1]
        if self.lrpe is not None:
            query, key = self.lrpe(query, key, position_ids)
        if padding_mask is not None:
            # With v = 0 a padded token adds nothing to the state: k v^T = 0.
            value = value * padding_mask[..., None, None].to(value.dtype)
        if past_key_values is not None:
            output = self._attend_with_state(query, key, value, log_decay, past_key_values.layers[self.layer_idx])
        else:
            if cu_seqlens is not None:
                query, key, value = (x.flatten(0, 1)[None] for x in (query, key, value))
            output, _ = self.operator(query, key, value, log_decay, cu_seqlens=cu_seqlens)
        output = output.reshape(batch, length, -1)
        return self.o_proj(self.norm(output, self._gate(hidden_states, gate.flatten(2))))

    def _gate(self, hidden_states: Tensor, projected: Tensor) -> Tensor | None:
        if self.gate == "none":
            return None
        if self.gate == "low_rank_sigmoid":
            projected = self.gate_up_proj(self.gate_down_proj(hidden_states))
        return projected if self.gate == "linear" else projected.sigmoid()

    @staticmethod
    def _attend_with_state(
        query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, cache: TnlCacheLayer
    ) -> Tensor:
        # The step works in place and has no gradient.
        if query.shape[1] == 1 and cache.state is not None and not torch.is_grad_enabled():
            step = (query[:, 0], key[:, 0], value[:, 0])
            output = lightning_attention_step(*step, log_decay, cache.state)[:, None]
            cache.store(cache.state, 1)
            return output
        output, state = lightning_attention(
            query, key, value, log_decay, initial_state=cache.state, return_final_state=True
        )
        assert state is not None
        cache.store(state, query.shape[1])
        return output


class TnlSoftmaxAttention(nn.Module):
    """Causal softmax attention with rotary positions, for the hybrid stacks of `layer_types`."""

    is_causal = True  # read by the attention functions of transformers, as is the next
    num_key_value_groups = 1

    def __init__(self, config: TnlConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, _, self.head_dim = config.state_shape(layer_idx)
        width = self.num_heads * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def rotate(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Rotary positions (arXiv 2104.09864) on `[B, H, T, E]`: channel i turns with channel i + E / 2."""
        half = self.head_dim // 2
        exponent = torch.arange(half, dtype=torch.float64, device=x.device) / half
        angle = position_ids[:, None, :, None].double() * self.config.rope_theta**-exponent
        angle = torch.remainder(angle, 2 * math.pi).to(torch.promote_types(x.dtype, torch.float32))
        cosine, sine = angle.cos(), angle.sin()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        causal_mask: Tensor | None = None,
        past_key_values: TnlCache | None = None,
    ) -> Tensor:
        """Attend over `[B, T, d]`; the mask is what `create_causal_mask` of transformers made."""
        batch, length, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = self.rotate(query, position_ids), self.rotate(key, position_ids)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS["sdpa" if implementation in (None, "eager") else implementation]
        output, _ = attend(
            self,
            query,
            key,
            value,
            causal_mask,
            scaling=self.head_dim**-0.5,
            dropout=0.0,
            position_ids=position_ids,
        )
        return self.o_proj(output.reshape(batch, length, -1))


class TnlGatedLinearUnit(nn.Module):
    """SGLU: `W_3 ((W_1 x) * (W_2 x))`, without activation by default (arXiv 2307.14995 section 3.1.2)."""

    def __init__(self, config: TnlConfig) -> None:
        super().__init__()
        self.activation = ACTIVATION_FUNCTIONS[config.glu_act]
        self.plain = config.glu_act == "none"
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mix channels of `[B, T, d]`."""
        if self.plain and self.training and torch.is_grad_enabled() and self._has_plain_weights():
            return gated_linear_unit(hidden_states, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))

    def _has_plain_weights(self) -> bool:
        """Whether the projections are learnt and can be had by their weights."""
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        return all(is_plain(projection) and projection.weight.requires_grad for projection in projections)


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is a linear layer that can be had by its weight: no adapter, sharding or hook around it."""
    if type(linear) is not nn.Linear or isinstance(linear.weight, DTensor) or "forward" in vars(linear):
        return False
    return not (linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks)


class TnlDecoderLayer(GradientCheckpointingLayer):
    """One block: `x += GLA(SRMSNorm(x))`, then `x += SGLU(SRMSNorm(x))`."""

    def __init__(self, config: TnlConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = TnlNorm(config, config.hidden_size)
        self.attention: TnlAttention | TnlSoftmaxAttention
        if config.is_linear(layer_idx):
            self.attention = TnlAttention(config, layer_idx)
        else:
            self.attention = TnlSoftmaxAttention(config, layer_idx)
        self.mlp_norm = TnlNorm(config, config.hidden_size)
        self.mlp = TnlGatedLinearUnit(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        log_decay: Tensor | None,
        position_ids: Tensor,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: TnlCache | None = None,
        causal_mask: Tensor | None = None,
    ) -> Tensor:
        """Transform the residual stream.

        Args:
            hidden_states: `[B, T, d]`.
            log_decay: `[H]` float32, or `None` for no decay.
            position_ids: `[B or 1, T]`, read by LRPE.
            padding_mask: `[B, T]`, 0 at padding.
            cu_seqlens: `[N + 1]` boundaries of documents in the rows laid end to end.
            past_key_values: Cache whose state is read and advanced.
            causal_mask: What softmax attention may see, `[B, 1, T, past + T]`; `None` for all before.

        Returns:
            `[B, T, d]`.
        """
        normed = self.attention_norm(hidden_states)
        if isinstance(self.attention, TnlSoftmaxAttention):
            attended = self.attention(normed, position_ids, causal_mask, past_key_values)
        else:
            attended = self.attention(normed, log_decay, position_ids, padding_mask, cu_seqlens, past_key_values)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
