"""TNL (TransNormerLLM, arXiv 2405.17381 and 2307.14995) as Hugging Face classes.

    x = sqrt(d) embed(ids)
    per layer:  x += GLA(SRMSNorm(x));  x += SGLU(SRMSNorm(x))
    logits = lm_head(SRMSNorm(x))

Dimensions: B batch, T tokens, V vocabulary, d width of the residual stream, H heads, N documents packed into one call.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from tnl.models.tnl.cache_tnl import TnlCache
from tnl.models.tnl.configuration_tnl import TnlConfig
from tnl.models.tnl.layers_tnl import TnlDecoderLayer, TnlNorm, TnlRelativePositions, is_plain
from tnl.models.tnl.matrix_network import TensorNetworkEmbedding, TensorNetworkLinear, replace_matrices
from tnl.ops.linear_cross_entropy import linear_cross_entropy
from tnl.slopes import log_decay

LOGITS_PER_CHUNK = 1 << 26  # 256 MiB of float32 logits at once where the head is called as a module
IGNORED_LABEL = -100


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
