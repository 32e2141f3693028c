"""GLA of flash-linear-attention (arXiv 2312.06635), as `tnl train` calls a model; importing this makes it known.

The package's own model takes labels that it shifts itself; this one takes targets that are shifted already, as the
models of transformers do.
"""

from typing import Any

from fla.models import GLAConfig, GLAForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast


class ShiftedGLA(GLAForCausalLM):
    """GLA whose loss is that of `shift_labels`."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        use_cache: bool = False,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] and the loss of the targets [B, T]."""
        output = super().forward(input_ids, use_cache=use_cache)
        if labels is not None or shift_labels is not None:
            output.loss = self.loss_function(
                output.logits, labels, self.vocab_size, num_items_in_batch, shift_labels=shift_labels
            )
        return output


AutoModelForCausalLM.register(GLAConfig, ShiftedGLA, exist_ok=True)
