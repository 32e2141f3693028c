"""Small models that the tests of layers and models share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tnl.models import TnlConfig, TnlForCausalLM

VOCABULARY = 61
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
STACKS = pytest.mark.parametrize("layer_types", [None, HYBRID], ids=["linear", "hybrid"])


def small_config(**overrides: Any) -> TnlConfig:
    """Three layers of width 24 with weights so large that the state matters."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    return TnlConfig.from_preset("tiny", **{**fields, **overrides})


def small_model(**overrides: Any) -> TnlForCausalLM:
    torch.manual_seed(1)
    return TnlForCausalLM(small_config(**overrides)).eval()


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))


def logits_of(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits
