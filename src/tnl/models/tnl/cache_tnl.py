"""The cache of a TNL: one recurrent state a layer, of the same size whatever was read or generated.

Layers of softmax attention in hybrid stacks keep keys and values, which do grow.
"""

from typing import NoReturn

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from tnl.models.tnl.configuration_tnl import TnlConfig


class TnlCacheLayer(CacheLayerMixin):
    """State of the lightning attention of one layer.

    Attributes:
        state: `[B, H, D, E]` float32 (float64 in a float64 model), or `None` before the first token.
        length: Number of tokens that the state has read, padding among them.
    """

    # The token count is a Python number, so a compiled forward of the whole model would be compiled
    # anew for each token; `generate` asks this before it compiles by itself.
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.length = 0

    def store(self, state: Tensor, new_tokens: int) -> None:
        """Replace the state by the one after `new_tokens` more tokens; it is cut from the graph."""
        self.state = state.detach()
        self.length += new_tokens

    def get_seq_length(self) -> int:
        """Number of tokens read so far."""
        return self.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask over all tokens would have."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.state = None
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b of the batch continue from row `beam_idx[b]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self.state is not None:
            self.state = self.state.index_select(0, indices.to(self.state.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)

    def offload(self) -> None:
        """Not needed: the state does not grow."""

    def prefetch(self) -> None:
        """Nothing is offloaded."""

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """A recurrent state cannot take a token back."""
        raise ValueError(f"crop({tokens_to_remove}): a recurrent state cannot forget single tokens")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        """Keys and values are not kept."""
        raise NotImplementedError("TnlCacheLayer keeps a state, no keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> NoReturn:
        """Keys and values are not kept."""
        raise NotImplementedError("TnlCacheLayer keeps a state, no keys and values")


class SoftmaxCacheLayer(DynamicLayer):
    """Keys and values of a layer of softmax attention in a hybrid stack."""

    is_compileable = False


class TnlCache(Cache):
    """The recurrent states of all layers, as a Hugging Face `Cache`.

    Its states are cut from the graph of gradients: a sequence that is fed in pieces is read as a whole,
    and learns from each piece alone.

    Args:
        config: Configuration of the model that will fill the cache.
    """

    def __init__(self, config: TnlConfig) -> None:
        linear = [config.is_linear(i) for i in range(config.num_hidden_layers)]
        super().__init__(layers=[TnlCacheLayer() if it_is else SoftmaxCacheLayer() for it_is in linear])

    @property
    def memory_bytes(self) -> int:
        """Bytes held by all layers."""
        tensors = [getattr(layer, name, None) for layer in self.layers for name in ("state", "keys", "values")]
        return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
