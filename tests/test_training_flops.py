"""Operations a token, against PyTorch's own count. Tier T0."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from tnl.models import TnlConfig
from tnl.training.flops import flops_per_token, matrix_parameters, peak_flops

LLAMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 48, "attn_implementation": "sdpa",
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_of_a_transformer(tied: bool) -> None:
    config = AutoConfig.for_model("llama", **LLAMA, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(0, 64, (1, 16))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    products = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    # The first layer's input needs no gradient only where it is no parameter: the embedding's is counted as well.
    assert 6 * matrix_parameters(model) * 16 == products
    attention = 6 * 2 * 2 * 16 * 16  # layers, heads, width, tokens
    assert flops_per_token(matrix_parameters(model), config, 16) == 6 * matrix_parameters(model) + attention


def test_linear_attention_costs_the_same_at_any_length() -> None:
    config = TnlConfig.from_preset("tiny", hidden_size=32, num_attention_heads=2, num_hidden_layers=2)
    assert flops_per_token(10, config, 100) == flops_per_token(10, config, 10000) == 60 + 12 * 2 * (32 * 16 + 16 * 16)
    hybrid = TnlConfig.from_preset(
        "tiny", hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    assert flops_per_token(10, hybrid, 100) == 60 + 12 * 2 * 32 * 16 + 6 * 2 * 16 * 100


def test_known_devices() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("a device of tomorrow") is None
