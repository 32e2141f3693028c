"""TNL (TransNormerLLM, arXiv 2405.17381 and 2307.14995) as Hugging Face classes.

    x = sqrt(d) embed(ids)
    per layer:  x += GLA(SRMSNorm(x));  x += SGLU(SRMSNorm(x))
    logits = lm_head(SRMSNorm(x))

Dimensions: B batch, T tokens, V vocabulary, d width of the residual stream, H heads, E width of a head,
D width of its keys (E, or 2 E in a layer with LRPE), N documents packed into one call.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from tnl.models.tnl.cache_tnl import TnlCache, TnlCacheLayer
from tnl.models.tnl.configuration_tnl import TnlConfig
from tnl.models.tnl.matrix_network import TensorNetworkEmbedding, TensorNetworkLinear, replace_matrices
from tnl.ops import lightning_attention, lightning_attention_step
from tnl.ops.gated_linear_unit import gated_linear_unit
from tnl.ops.linear_cross_entropy import linear_cross_entropy
from tnl.ops.norm import gated_srms_norm, srms_norm
from tnl.ops.streams import split_streams
from tnl.slopes import log_decay

LRPE_BASE = 10000.0
LOGITS_PER_CHUNK = 1 << 26  # 256 MiB of float32 logits at once where the head is called as a module
IGNORED_LABEL = -100


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
        """Whether nothing is wrapped around the projections: no adapter, sharding or hook, as in `_chunked_loss`."""
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


class TnlPreTrainedModel(PreTrainedModel):
    """What all TNL models share: initial weights, loading and saving."""

    config: TnlConfig
    config_class = TnlConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TnlDecoderLayer"]  # noqa: RUF012 (class attributes of transformers)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True  # in layers of softmax attention
    # In 16 bits theta would turn the angle at a distance of 500 tokens by up to a radian.
    _keep_in_fp32_modules_strict = ["lrpe.theta"]  # noqa: RUF012
    _is_stateful = True  # a state cannot be rolled back, which assisted generation would need
    _can_record_outputs = {"hidden_states": TnlDecoderLayer}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Matrices from N(0, initializer_range), the padding row zero, theta by its formula."""
        super()._init_weights(module)
        if isinstance(module, TnlRelativePositions):
            module.reset_parameters()
        if isinstance(module, TnlNorm) and module.weight is not None:
            initialization.ones_(module.weight)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        if isinstance(module, TensorNetworkLinear | TensorNetworkEmbedding):
            module.reset_parameters(self.config.initializer_range)


class TnlModel(TnlPreTrainedModel):
    """The decoder without the language-model head."""

    def __init__(self, config: TnlConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TnlDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = TnlNorm(config, config.hidden_size)
        self.embedding_scale = math.sqrt(config.hidden_size) if config.scale_embeddings else 1.0
        self.gradient_checkpointing = False
        replace_matrices(self, config.tensor_networks or {}, "model.")
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TnlCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]` or `[B, past + T]`, 0 at padding, left or right.
            position_ids: `[B or 1, T]`. Without an attention mask and a cache, each position that is not
                one more than its neighbour on the left begins a document of its own (packed rows, as
                `DataCollatorWithFlattening` makes them): nothing passes from one document to the next.
            past_key_values: States to go on from; advanced in place.
            inputs_embeds: `[B, T, d]` in place of `input_ids`; taken as they are, without the scale.
            use_cache: Whether to return states; by default outside of training as the config says.
            cu_seq_lens_q: `[N + 1]` boundaries of packed documents, first 0, last B T, over the rows laid
                end to end; instead of finding them in `position_ids` (which takes a wait for the GPU).
            **kwargs: Keywords of other models, which the trainers of Hugging Face pass to all.

        Returns:
            Hidden states after the last norm, `[B, T, d]`, and the cache.

        Raises:
            ValueError: Both or none of `input_ids` and `inputs_embeds`; a cache of another kind; packed
                documents together with a cache, or in a hybrid stack with a mask.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if past_key_values is not None and not isinstance(past_key_values, TnlCache):
            raise ValueError(f"past_key_values must be a TnlCache, got {type(past_key_values).__name__}")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) * self.embedding_scale
        batch, length, _ = inputs_embeds.shape
        cu_seqlens = cu_seq_lens_q
        if cu_seqlens is None and attention_mask is None and past_key_values is None:
            cu_seqlens = find_documents(position_ids, batch)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if cu_seqlens is not None and (use_cache or past_key_values is not None):
            raise ValueError("packed documents cannot be combined with use_cache or past_key_values")
        if use_cache and past_key_values is None:
            past_key_values = TnlCache(self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]

        causal_mask = None
        if self.config.layer_types is not None and "full_attention" in self.config.layer_types:
            if cu_seqlens is not None and attention_mask is not None:
                raise ValueError("cu_seq_lens_q cannot be combined with attention_mask in a hybrid stack")
            if cu_seqlens is not None:
                position_ids = count_within_documents(cu_seqlens, batch, length)
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        hidden_states = self.dropout(inputs_embeds)
        decays = self.log_decay(inputs_embeds.device)
        padding_mask = find_padding(attention_mask, length)
        for layer, decay in zip(self.layers, decays, strict=True):
            hidden_states = layer(
                hidden_states,
                decay,
                position_ids,
                padding_mask=padding_mask,
                cu_seqlens=cu_seqlens,
                past_key_values=past_key_values,
                causal_mask=causal_mask,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def log_decay(self, device: torch.device) -> list[Tensor] | list[None]:
        """The log decay of each layer, `[H]` float32, or `None` for no decay."""
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if self.config.decay_schedule == "none":
            return [None] * layers
        return list(log_decay(self.config.decay_schedule, layers, heads, device))


def find_documents(position_ids: Tensor | None, batch: int) -> Tensor | None:
    """Boundaries of the documents that positions which do not count on by one tell apart.

    Args:
        position_ids: `[B or 1, T]`, or `None`.
        batch: Number of rows B.

    Returns:
        `[N + 1]` int32 over the rows laid end to end, or `None` where each row is one document.
    """
    if position_ids is None:
        return None
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts = starts.expand(batch, -1).flatten()
    first_tokens = starts.nonzero().flatten().to(torch.int32)
    if first_tokens.numel() == batch:
        return None
    return F.pad(first_tokens, (0, 1), value=starts.numel())


def count_within_documents(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """Positions `[B, T]` that begin at 0 in each of the documents between the boundaries `[N + 1]`."""
    tokens = torch.arange(batch * length, device=cu_seqlens.device)
    document = torch.bucketize(tokens, cu_seqlens[1:].long(), right=True)
    return (tokens - cu_seqlens.long()[document]).view(batch, length)


def find_padding(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """The mask of this call's tokens, `[B, T]`; `None` where nothing is padded.

    Args:
        attention_mask: `[B, past + T]`, or `None`.
        length: Number of tokens T of this call.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask must be [B, T] with T >= {length}, got {tuple(attention_mask.shape)}")
    mask = attention_mask[:, -length:]
    # One token is not worth the wait for the GPU, and a graph cannot branch on a value.
    if length > 1 and not torch.compiler.is_compiling() and bool((mask != 0).all()):
        return None
    return mask


class TnlForCausalLM(TnlPreTrainedModel, GenerationMixin):
    """TNL with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch

    def __init__(self, config: TnlConfig) -> None:
        super().__init__(config)
        self.model = TnlModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        replace_matrices(self, {name: n for name, n in (config.tensor_networks or {}).items() if name == "lm_head"}, "")
        embedding: nn.Module = self.model.embed_tokens
        if config.tie_word_embeddings and isinstance(embedding, TensorNetworkEmbedding):
            head: Any = TensorNetworkLinear(embedding.network)  # in place of a linear layer
            self.lm_head = head
            cores = (name for name, _ in head.named_parameters())  # patterns, which transformers expands
            self._tied_weights_keys = {f"lm_head.{name}$": f"model.embed_tokens.{name}$" for name in cores}
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TnlCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: `[B, T]`.
            attention_mask: As in `TnlModel.forward`, and so the next four.
            position_ids: Its restarts are the documents of packed rows.
            past_key_values: States to go on from.
            inputs_embeds: In place of `input_ids`.
            use_cache: Whether to return states.
            labels: `[B, T]`; token t is predicted from the tokens before it, -100 is not counted. In packed
                rows the first label of each document should be -100, as
                `DataCollatorWithFlattening` sets it.
            logits_to_keep: Keep logits of the last so many tokens only (0: all), or of these indices.
            return_logits: Whether to return logits. `None`: yes, except in training with labels, where
                the loss is computed in chunks and the logits `[B, T, V]` never exist as a whole.
            num_items_in_batch: What the summed loss is divided by, such as the number of labels in the
                whole batch over all ranks and accumulation steps; the labels of this call without it.
            **kwargs: `shift_labels` `[B, T]`, what each token should predict, instead of `labels`; the rest
                goes to `TnlModel.forward`, such as `cu_seq_lens_q`.
        """
        # Not a parameter: the Trainer would take its name for that of a column of labels.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        if return_logits is None:
            return_logits = shift_labels is None or not self.training
        logits = loss = None
        if return_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        if shift_labels is not None:
            shift_labels = shift_labels.to(hidden_states.device)
            if logits is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0:
                loss = self._summed_loss(logits.flatten(0, 1), shift_labels.flatten())
            else:
                loss = self._chunked_loss(hidden_states.flatten(0, 1), shift_labels.flatten())
            count = (shift_labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    @staticmethod
    def _summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in float32, summed over the labels `[M]` that count; logits `[M, V]`."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(dtype), labels, ignore_index=IGNORED_LABEL, reduction="sum")

    def _chunked_loss(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """`_summed_loss` of hidden states `[M, d]`, with the logits of one chunk in memory at a time.

        A head that something is wrapped around (an adapter, sharding, a hook) is called as a module, and its
        logits are computed again in the backward pass.
        """
        head = self.lm_head
        if is_plain(head):
            return linear_cross_entropy(hidden_states, head.weight, labels, ignore_index=IGNORED_LABEL)

        def chunk_loss(hidden_states: Tensor, labels: Tensor) -> Tensor:
            return self._summed_loss(self.lm_head(hidden_states), labels)

        tokens = max(1, LOGITS_PER_CHUNK // self.config.vocab_size)
        if len(labels) <= tokens:
            return chunk_loss(hidden_states, labels)
        chunks = zip(hidden_states.split(tokens), labels.split(tokens), strict=True)
        losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate` a cache of states in place of keys and values."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                "cache_implementation must be None, a TNL has its own constant-size cache; "
                f"got {generation_config.cache_implementation!r}"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = TnlCache(self.config)
