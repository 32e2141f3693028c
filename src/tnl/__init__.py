"""TNL: language models on Lightning Attention. The operators are here; models are in :mod:`tnl.models`."""

from tnl.ops import lightning_attention, lightning_attention_step

__version__ = "0.1.0"
__all__ = ["lightning_attention", "lightning_attention_step"]
