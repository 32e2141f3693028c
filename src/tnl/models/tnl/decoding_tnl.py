"""Fast decoding of TNL: a step of fixed shape over states that stay in place, captured in a CUDA graph.

Dimensions: N rows, V vocabulary, H heads, D key width, E value width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tnl.models.tnl.cache_tnl import TnlCache
from tnl.models.tnl.layers_tnl import TnlAttention
from tnl.models.tnl.modeling_tnl import TnlForCausalLM
from tnl.ops.decode import decode_attention, decode_linear

MOST_FUSED_ROWS = 4  # beyond these, matrix products are quicker than rows one after another (385m and 1b, an H200)
MOST_FUSED_PARAMETERS = 4e9  # rows times parameters
PREFILL_TOKENS = 1 << 15  # tokens of a prompt in one forward pass, over all rows


class TnlDecoder:
    """Decodes N rows token by token, in the same time and memory whatever was read before.

    On a GPU a step is one launch of a captured graph. For few rows of a plain TNL it consists of five fused kernels a
    layer (:mod:`tnl.ops.decode`); otherwise the modules of the model are what is captured.

    Args:
        model: A TNL with linear attention in all layers, in evaluation mode.
        rows: Rows N decoded side by side.
        fused: Whether to use the fused kernels; None for yes where they serve the model and there are few rows.
        capture: Whether to capture a CUDA graph; None for yes on a GPU.

    Raises:
        ValueError: A model or an option that cannot be served.
    """

    def __init__(
        self, model: TnlForCausalLM, rows: int, *, fused: bool | None = None, capture: bool | None = None
    ) -> None:
        config, device = model.config, model.device
        if not all(config.is_linear(layer) for layer in range(config.num_hidden_layers)):
            raise ValueError("model: expected linear attention in all layers, keys and values of others grow")
        if capture and device.type != "cuda":
            raise ValueError(f"capture: expected False on {device.type}, a CUDA graph needs a GPU")
        servable = serves_fused(model)
        if fused and not servable:
            raise ValueError("fused: expected False for this model, the fused kernels serve TNL without variants")
        on_gpu = device.type == "cuda"
        self.model = model
        self.fused = (servable and on_gpu and few_rows(model, rows)) if fused is None else fused
        wide = torch.promote_types(model.dtype, torch.float32)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position = torch.zeros(rows, dtype=torch.int64, device=device)
        self.states = [
            torch.zeros(rows, *config.state_shape(layer), dtype=wide, device=device)
            for layer in range(config.num_hidden_layers)
        ]
        self._decays = model.model.log_decay(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor = torch.zeros(rows, config.vocab_size, dtype=model.dtype, device=device)
        if on_gpu if capture is None else capture:
            self._capture()

    @torch.inference_mode()
    def load(self, cache: TnlCache, position: Tensor) -> None:
        """Go on from states of a prefill.

        Args:
            cache: States of N rows.
            position: `[N]`, the next token's position in each row.
        """
        for state, layer in zip(self.states, cache.layers, strict=True):
            state.copy_(layer.state)
        self.position.copy_(position)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read the next token of each row.

        Args:
            tokens: `[N]` int64.

        Returns:
            Logits of the token after it, `[N, V]` in the model's dtype; the next step overwrites them.
        """
        self.tokens.copy_(tokens)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()
        return self.logits

    def _step(self) -> None:
        hidden_states = self.model.model.embed_tokens(self.tokens) * self.model.model.embedding_scale
        if self.fused:
            self._fused_layers(hidden_states)
        else:
            self.logits.copy_(self._layers(hidden_states))
        self.position += 1

    def _layers(self, hidden_states: Tensor) -> Tensor:
        cache = TnlCache(self.model.config)
        hidden_states, position = hidden_states[:, None], self.position[:, None]
        for layer, decay, state, slot in zip(
            self.model.model.layers, self._decays, self.states, cache.layers, strict=True
        ):
            slot.state = state  # read and written where it is
            hidden_states = layer(hidden_states, decay, position, past_key_values=cache)
        return self.model.lm_head(self.model.model.norm(hidden_states[:, 0]))

    def _fused_layers(self, x: Tensor) -> None:
        config, backend = self.model.config, "triton"
        eps, heads = config.norm_eps, config.num_attention_heads
        layers: Any = self.model.model.layers
        for layer, decay, state in zip(layers, self._decays, self.states, strict=True):
            attention, mlp = layer.attention, layer.mlp
            activated = 2 * heads * attention.head_dim
            qkvu = decode_linear(
                x, attention.qkvu_proj.weight, norm_eps=eps, activated=activated, backend=backend
            ).view(len(x), 4, heads, -1)
            theta = None if attention.lrpe is None else attention.lrpe.theta
            output = decode_attention(qkvu, decay, state, theta=theta, position=self.position, backend=backend)
            gate = qkvu[:, 3].flatten(1)
            decode_linear(output, attention.o_proj.weight, gate=gate, norm_eps=eps, residual=x, backend=backend)
            inner = decode_linear(
                x, mlp.gate_proj.weight, factor_weight=mlp.up_proj.weight, norm_eps=eps, backend=backend
            )
            decode_linear(inner, mlp.down_proj.weight, residual=x, backend=backend)
        decode_linear(x, self.model.lm_head.weight, norm_eps=eps, out=self.logits, backend=backend)

    @torch.inference_mode()
    def _capture(self) -> None:
        stream = torch.cuda.Stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream(self.tokens.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and makes workspaces, which a capture may not
                self._step()
        torch.cuda.current_stream(self.tokens.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()


def few_rows(model: TnlForCausalLM, rows: int) -> bool:
    """Whether rows are so few, for a model of this size, that the fused kernels are the quicker way."""
    return rows == 1 or (rows <= MOST_FUSED_ROWS and rows * model.num_parameters() <= MOST_FUSED_PARAMETERS)


def serves_fused(model: TnlForCausalLM) -> bool:
    """Whether the fused kernels compute what the model computes: TNL as it is, none of its variants or wrappers."""
    config = model.config
    variant = (config.gate, config.hidden_act, config.value_act, config.glu_act, config.norm_type)
    if variant != ("linear", "silu", "none", "none", "srms"):
        return False
    layer: Any
    for layer in model.model.layers:
        if not isinstance(layer.attention, TnlAttention):
            return False
        attention, mlp = layer.attention, layer.mlp
        for linear in (attention.qkvu_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            if type(linear) is not nn.Linear or linear.weight.dtype == torch.float64:
                return False
    return type(model.lm_head) is nn.Linear


@torch.inference_mode()
def prefill(model: TnlForCausalLM, input_ids: Tensor, mask: Tensor, cache: TnlCache) -> tuple[Tensor, Tensor]:
    """Read prompts in pieces of bounded size.

    Args:
        model: The model.
        input_ids: `[N, T]`.
        mask: `[N, T]`, 0 at padding on the left.
        cache: Advanced in place; what it has read already is not read again.

    Returns:
        Logits of the next token `[N, V]`, and its position `[N]`.
    """
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    piece = max(1, PREFILL_TOKENS // len(input_ids))
    padded = bool((mask == 0).any())
    logits = None
    for start in range(cache.get_seq_length(), input_ids.shape[1], piece):
        part = slice(start, start + piece)
        logits = model(
            input_ids[:, part],
            attention_mask=mask[:, part] if padded else None,
            position_ids=positions[:, part] if padded else positions[:1, part],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, 0]
    if logits is None:
        raise ValueError("input_ids: expected tokens that the cache has not read")
    return logits, positions[:, -1] + 1


def decode(
    model: TnlForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    token_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Greedy or sampled generation through a `TnlDecoder`: `model.generate(..., custom_generate=decode)`.

    Prompts, padding, sampling and stopping are as in `generate` without it; beams, scores and a dictionary as the
    result are not served. `generate` hands no `streamer` to functions like this one: give it as `token_streamer`.

    Returns:
        `[N, T + new]` tokens.

    Raises:
        ValueError: A setting that is not served.
    """
    for name, refused in (
        ("num_beams", generation_config.num_beams not in (None, 1)),
        ("return_dict_in_generate", bool(generation_config.return_dict_in_generate)),
        ("synced_gpus", synced_gpus),
    ):
        if refused:
            raise ValueError(f"{name}: expected one that decode serves; call generate without custom_generate")
    mask = model_kwargs.get("attention_mask")
    cache = model_kwargs.get("past_key_values") or TnlCache(model.config)
    if token_streamer is not None:
        token_streamer.put(input_ids.cpu())
    logits, position = prefill(model, input_ids, torch.ones_like(input_ids) if mask is None else mask, cache)
    decoder: TnlDecoder | None = None
    padding, stops = generation_config._pad_token_tensor, generation_config._eos_token_tensor is not None
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    choose = _draw if generation_config.do_sample else _likeliest
    while True:
        scores = logits_processor(input_ids, logits.to(copy=True, dtype=torch.float32))
        tokens = choose(scores)
        if stops:
            tokens = torch.where(running, tokens, padding)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if token_streamer is not None:
            token_streamer.put(tokens.cpu())
        running = running & ~stopping_criteria(input_ids, None)
        if not bool(running.any()):
            break
        if decoder is None:
            decoder = TnlDecoder(model, len(input_ids))
            decoder.load(cache, position)
        logits = decoder.step(tokens)
    if token_streamer is not None:
        token_streamer.end()
    return input_ids


def _likeliest(scores: Tensor) -> Tensor:
    return scores.argmax(dim=-1)


def _draw(scores: Tensor) -> Tensor:
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
