"""The operator inside models of transformers."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from tnl.ops import lightning_attention, lightning_attention_step

Model = TypeVar("Model", bound=nn.Module)


class AcceleratedMiniMaxLightningAttention(MiniMaxLightningAttention):
    """MiniMax's layer with the operator in place of its loop over blocks (prefill) and tokens (decode)."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """As of the layer it replaces, whose arguments it takes.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            position_embeddings: Not used by lightning attention.
            attention_mask: ``[B, T]``, 0 where a token is padding; None for no padding.
            past_key_values: transformers' `MiniMaxCache`, or None.
            **kwargs: Arguments for the model's other layers.

        Returns:
            Output ``[B, T, hidden_size]``, and the state ``[B, H, D, D]`` that is in the cache too.
        """
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
        q, k, v = qkv.unflatten(-1, (self.num_attention_heads, -1)).split(self.head_dim, dim=-1)
        state = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
        if state is not None:
            state = state.to(torch.promote_types(state.dtype, torch.float32))
        log_decay = -self.slope_rate.flatten().to(torch.promote_types(self.slope_rate.dtype, torch.float32))
        if state is not None and q.shape[1] == 1 and not torch.is_grad_enabled():
            state = state.clone()  # the state before may be in the caller's hands
            o = lightning_attention_step(q, k, v, log_decay, state)
        else:
            o, state = lightning_attention(q, k, v, log_decay, initial_state=state, return_final_state=True)
            assert state is not None
        if past_key_values is not None:
            past_key_values.set_linear_cache(self.layer_idx, state)
        o = torch.sigmoid(self.output_gate(hidden_states)) * self.norm(o.flatten(2))
        return self.out_proj(o), state


def accelerate_minimax(model: Model) -> Model:
    """Let every lightning attention layer of a MiniMax model run on :func:`tnl.lightning_attention`.

    Outputs, gradients, generation and the cache stay what they were, up to rounding: the layers take the same
    arguments, treat padding in the same way and keep the same `MiniMaxCache`. Its states are float32 in a model of
    16 bits too, where transformers keeps 16 bits, in which a long sum stops taking in what is added. Parameters and
    buffers are not touched: checkpoints are saved and loaded as before. :func:`restore_minimax` undoes it.

    Args:
        model: `MiniMaxForCausalLM`, `MiniMaxModel`, or any module that has their layers; changed in place.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` has no such layer.
    """
    return _exchange(model, MiniMaxLightningAttention, AcceleratedMiniMaxLightningAttention)


def restore_minimax(model: Model) -> Model:
    """Undo :func:`accelerate_minimax`.

    Args:
        model: What was given to it; changed in place.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` has no layer of MiniMax's lightning attention.
    """
    return _exchange(model, AcceleratedMiniMaxLightningAttention, MiniMaxLightningAttention)


def _exchange(model: Model, old: type[nn.Module], new: type[nn.Module]) -> Model:
    """Both classes have the same attributes, so a layer becomes another by its class alone."""
    layers = [module for module in model.modules() if isinstance(module, MiniMaxLightningAttention)]
    if not layers:
        raise ValueError(
            f"model: expected a transformers model with layers of MiniMax's lightning attention, "
            f"got {type(model).__name__} without any"
        )
    for layer in layers:
        if type(layer) is old:
            layer.__class__ = new
    return model
