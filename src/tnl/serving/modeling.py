"""TNL as vLLM models: in our format, hybrid stacks among them, and in the released one.

The same maths as :mod:`tnl.models.tnl.layers_tnl`, on a step's tokens laid end to end, with heads, inner channels
and vocabulary cut over the ranks of tensor parallelism and layers over those of pipeline parallelism.

Dimensions: N tokens of a step, H heads of this rank, E width of a head, d width of the residual stream.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsAttentionFree,
    IsHybrid,
    SupportsMambaPrefixCaching,
    SupportsPP,
)
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from tnl.models.tnl.configuration_tnl import TnlConfig
from tnl.models.tnl.layers_tnl import ACTIVATION_FUNCTIONS, TnlNorm, TnlRelativePositions
from tnl.models.tnl.matrix_network import TensorNetworkEmbedding, TensorNetworkLinear
from tnl.models.tnl.released import KEY_MAP
from tnl.serving.compressed import kept_network, linear, make_dense, stays_compressed, tied_head
from tnl.serving.cpu import keep_seeds_of_unfinished_prompts
from tnl.serving.states import PooledLightningAttention
from tnl.slopes import log_decay


class ShardedNorm(TnlNorm):
    """The norm over the attention output, whose width is cut over the ranks."""

    def __init__(self, config: TnlConfig, width: int) -> None:
        self.ranks = get_tensor_model_parallel_world_size()
        self.width = width
        super().__init__(config, width // self.ranks)
        for parameter in self.parameters():
            parameter.weight_loader = sharded_weight_loader(0)  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise `[N, width / ranks]` by sums over all ranks and multiply by the gate."""
        if self.ranks == 1:
            return super().forward(hidden_states, gate)
        normed = hidden_states.float()
        if self.centred:
            normed = normed - tensor_model_parallel_all_reduce(normed.sum(-1, keepdim=True)) / self.width
        squares = tensor_model_parallel_all_reduce(normed.square().sum(-1, keepdim=True))
        normed = normed * torch.rsqrt(squares / self.width + self.eps)
        if self.weight is not None:
            normed = normed * self.weight
        if self.bias is not None:
            normed = normed + self.bias
        if gate is None:
            return normed.to(hidden_states.dtype)
        if self.weight is None:  # rounded once, as the fused norm and gate of one rank
            return (normed * gate).to(hidden_states.dtype)
        return gate * normed.to(hidden_states.dtype)


class ServedRelativePositions(nn.Module):
    """LRPE-d with the theta of this rank's heads, in float32 whatever the model's dtype."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim, dtype=torch.float32), requires_grad=False)
        self.theta.weight_loader = sharded_weight_loader(0)  # type: ignore[attr-defined]

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Encode `[N, H, E]` at positions `[N]` into `[N, H, 2 E]`."""
        cosine, sine = TnlRelativePositions.rotation_by(self.theta, positions, torch.float32)
        return torch.cat([x * cosine, x * sine], dim=-1).to(x.dtype)


class TnlAttention(nn.Module):
    """Gated linear attention; see :class:`tnl.models.tnl.layers_tnl.TnlAttention`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: TnlConfig = vllm_config.model_config.hf_config
        layer, ranks = extract_layer_index(prefix), get_tensor_model_parallel_world_size()
        all_heads, _, self.head_dim = config.state_shape(layer)
        self.num_heads = all_heads // ranks
        self.gate = config.gate
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]
        self.value_activation = ACTIVATION_FUNCTIONS[config.value_act]
        width = all_heads * self.head_dim
        streams = 4 if config.gate in ("linear", "sigmoid") else 3
        self.qkvu_proj = linear(
            MergedColumnParallelLinear, vllm_config, f"{prefix}.qkvu_proj", config.hidden_size, [width] * streams
        )
        if config.gate == "low_rank_sigmoid":
            inner = config.hidden_size, self.head_dim
            self.gate_down_proj = linear(ReplicatedLinear, vllm_config, f"{prefix}.gate_down_proj", *inner)
            self.gate_up_proj = linear(
                ColumnParallelLinear, vllm_config, f"{prefix}.gate_up_proj", self.head_dim, width
            )
        self.norm = ShardedNorm(config, width)
        self.o_proj = linear(RowParallelLinear, vllm_config, f"{prefix}.o_proj", width, config.hidden_size)
        self.lrpe = ServedRelativePositions(self.num_heads, self.head_dim) if config.uses_lrpe(layer) else None
        decay = None
        if config.decay_schedule != "none":
            decays = log_decay(config.decay_schedule, config.num_hidden_layers, all_heads)[layer]
            decay = decays.chunk(ranks)[get_tensor_model_parallel_rank()].to(vllm_config.device_config.device)
        self.attend = PooledLightningAttention(
            vllm_config,
            prefix,
            (self.num_heads, self.head_dim, self.head_dim),
            1 if self.lrpe is None else 2,
            decay,
        )

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """Attend: `[N, d]` at positions `[N]` to `[N, d]`."""
        tokens = hidden_states.shape[0]
        projected, _ = self.qkvu_proj(hidden_states)
        qkvu = projected.view(tokens, -1, self.num_heads, self.head_dim).unbind(1)
        query, key = self.activation(qkvu[0]), self.activation(qkvu[1])
        if self.lrpe is not None:
            query, key = self.lrpe(query, positions), self.lrpe(key, positions)
        output = self.attend(query, key, self.value_activation(qkvu[2]), positions)
        gate = None
        if self.gate == "low_rank_sigmoid":
            gate = self.gate_up_proj(self.gate_down_proj(hidden_states)[0])[0].sigmoid()
        elif self.gate != "none":
            gate = qkvu[3].reshape(tokens, -1)
            gate = gate.sigmoid() if self.gate == "sigmoid" else gate
        return self.o_proj(self.norm(output.reshape(tokens, -1), gate))[0]


class TnlSoftmaxAttention(nn.Module):
    """Softmax attention with rotary positions, whose keys and values vLLM keeps in pages."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: TnlConfig = vllm_config.model_config.hf_config
        assert config.head_dim is not None
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.num_heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        width = config.num_attention_heads * config.head_dim
        self.qkv_proj = linear(
            MergedColumnParallelLinear, vllm_config, f"{prefix}.qkv_proj", config.hidden_size, [width] * 3
        )
        self.o_proj = linear(RowParallelLinear, vllm_config, f"{prefix}.o_proj", width, config.hidden_size)
        self.attend = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attend",
        )

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary positions on `[N, H, E]`, as :meth:`tnl.models.tnl.layers_tnl.TnlSoftmaxAttention.rotate`."""
        half = self.head_dim // 2
        exponent = torch.arange(half, dtype=torch.float64, device=x.device) / half
        angle = torch.remainder(positions[:, None, None].double() * self.rope_theta**-exponent, 2 * math.pi).float()
        cosine, sine = angle.cos(), angle.sin()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """Attend: `[N, d]` at positions `[N]` to `[N, d]`."""
        tokens = hidden_states.shape[0]
        query, key, value = self.qkv_proj(hidden_states)[0].view(tokens, 3, self.num_heads, self.head_dim).unbind(1)
        query, key = self.rotate(query, positions), self.rotate(key, positions)
        output = self.attend(*(x.reshape(tokens, -1) for x in (query, key, value)))
        return self.o_proj(output)[0]


class TnlGatedLinearUnit(nn.Module):
    """SGLU: `W_3 ((W_1 x) * (W_2 x))`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: TnlConfig = vllm_config.model_config.hf_config
        width, inner = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATION_FUNCTIONS[config.glu_act]
        self.merged = not stays_compressed(vllm_config)
        if self.merged:
            self.gate_and_up_proj = linear(
                MergedColumnParallelLinear, vllm_config, f"{prefix}.gate_and_up_proj", width, [inner] * 2
            )
        else:
            self.gate_proj = linear(ColumnParallelLinear, vllm_config, f"{prefix}.gate_proj", width, inner)
            self.up_proj = linear(ColumnParallelLinear, vllm_config, f"{prefix}.up_proj", width, inner)
        self.down_proj = linear(RowParallelLinear, vllm_config, f"{prefix}.down_proj", inner, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mix channels of `[N, d]`."""
        if self.merged:
            gate, up = self.gate_and_up_proj(hidden_states)[0].chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(hidden_states)[0], self.up_proj(hidden_states)[0]
        return self.down_proj(self.activation(gate) * up)[0]


class TnlDecoderLayer(nn.Module):
    """One block: `x += GLA(SRMSNorm(x))`, then `x += SGLU(SRMSNorm(x))`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: TnlConfig = vllm_config.model_config.hf_config
        self.attention_norm = TnlNorm(config, config.hidden_size)
        kind = TnlAttention if config.is_linear(extract_layer_index(prefix)) else TnlSoftmaxAttention
        self.attention = kind(vllm_config, f"{prefix}.attention")
        self.mlp_norm = TnlNorm(config, config.hidden_size)
        self.mlp = TnlGatedLinearUnit(vllm_config, f"{prefix}.mlp")

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """Transform the residual stream `[N, d]`."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), positions)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


@support_torch_compile
class TnlModel(nn.Module):
    """The decoder without the language-model head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: TnlConfig = vllm_config.model_config.hf_config
        self.embedding_scale = math.sqrt(config.hidden_size) if config.scale_embeddings else 1.0
        is_head_too = config.tie_word_embeddings and get_pp_group().is_last_rank
        self.embed_tokens: Any = PPMissingLayer()
        if get_pp_group().is_first_rank or is_head_too:
            name = f"{prefix}.embed_tokens"
            network = kept_network(vllm_config, name)
            if network is not None:
                self.embed_tokens = TensorNetworkEmbedding(network)
            else:
                self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=name)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: TnlDecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = TnlNorm(config, config.hidden_size) if get_pp_group().is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors: Any = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings `[N, d]` of ids `[N]`, scaled."""
        return self.embed_tokens(input_ids) * self.embedding_scale

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Run the layers of this rank; see `TnlForCausalLM.forward`."""
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
        elif inputs_embeds is not None:
            hidden_states = inputs_embeds
        else:
            assert input_ids is not None
            hidden_states = self.embed_input_ids(input_ids)
        for layer in self.layers[self.start_layer : self.end_layer]:
            hidden_states = layer(hidden_states, positions)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.norm(hidden_states)


class TnlForCausalLM(nn.Module, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching, SupportsPP):
    """TNL with a language-model head, in the format that `tnl.models.TnlForCausalLM` saves."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".mlp.gate_proj.": (".mlp.gate_and_up_proj.", 0),
            ".mlp.up_proj.": (".mlp.gate_and_up_proj.", 1),
        }
    )
    # The files that transformers would load; no other safetensors of a folder, and no pickle.
    allow_patterns_overrides: ClassVar[list[str]] = ["model*.safetensors"]
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"gate_and_up_proj": ["gate_proj", "up_proj"]}

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype]:
        """float32, always."""
        return (torch.float32,)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, int, int]]:
        """`((H, E, E),)`: the shape of each pool's states."""
        config: TnlConfig = vllm_config.model_config.hf_config
        assert config.head_dim is not None
        heads = config.num_attention_heads // vllm_config.parallel_config.tensor_parallel_size
        return ((heads, config.head_dim, config.head_dim),)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc]:
        """How vLLM copies a state for its prefix cache."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if current_platform.is_cpu():
            keep_seeds_of_unfinished_prompts()
        config: TnlConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model: Any = TnlModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.compressed = stays_compressed(vllm_config)
        self.lm_head = self._head(vllm_config, maybe_prefix(prefix, "lm_head"))
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def _head(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        config, embedding = self.config, self.model.embed_tokens
        if not get_pp_group().is_last_rank:
            return PPMissingLayer()
        network = kept_network(vllm_config, prefix)
        if network is not None:
            return TensorNetworkLinear(network)
        if config.tie_word_embeddings and isinstance(embedding, TensorNetworkEmbedding):
            return tied_head(embedding)
        head = ParallelLMHead(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config, prefix=prefix
        )
        return head.tie_weights(embedding) if config.tie_word_embeddings else head

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings `[N, d]` of ids `[N]`, scaled."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """Hidden states of a step's tokens.

        Args:
            input_ids: `[N]`.
            positions: `[N]`, of each token in its request.
            intermediate_tensors: What the previous rank of pipeline parallelism returned.
            inputs_embeds: `[N, d]` in place of `input_ids`.
            **kwargs: What vLLM hands to other models.

        Returns:
            `[N, d]` after the last norm; before it on ranks that are not the last.
        """
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits `[N, vocabulary]`."""
        if isinstance(self.lm_head, TensorNetworkLinear):
            return self.lm_head(hidden_states)
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by their names in the checkpoint; returns the names of the parameters set."""
        if self.compressed:  # whose gates and ups are not merged
            return AutoWeightsLoader(self).load_weights(weights)
        weights = make_dense(weights, self.config.tensor_networks or {})
        # A tied head's file repeats how the embedding's cores are ordered.
        loader = AutoWeightsLoader(self, ignore_unexpected_prefixes=["lm_head.order_"])
        return loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)


class TnlHybridForCausalLM(TnlForCausalLM, IsHybrid):
    """A stack in which some layers are softmax attention; vLLM asks the class whether a model has states alone."""

    is_attention_free: ClassVar[bool] = False


class TransnormerForCausalLM(TnlForCausalLM):
    """A released TransNormerLLM folder, by the key map that the model's own reader uses."""

    hf_to_vllm_mapper = (
        WeightsMapper(
            orig_to_new_substr={
                row.name.partition("{i}")[2]: row.own_name.partition("{i}")[2] for row in KEY_MAP if "{i}" in row.name
            }
        )
        | TnlForCausalLM.hf_to_vllm_mapper
    )
