"""The models that are compared: each of the same number of parameters at a size, within 1 %."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tnl.models import PRESETS, TnlConfig

# Width, layers, heads and inner width of TNL; its number of parameters is what the others must have. Heads are as
# wide as in the pilot and in the released sizes, 128, but for the smallest size.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (64, 2, 2, 96),
    "10m": (384, 6, 6, 768),
    "25m": (512, 8, 4, 1216),
    "45m": (640, 10, 5, 1280),
}
LONGEST = 1 << 17  # positions that models with a limit are made for; it sizes nothing
MULTIPLE = 8  # of the inner width

Overrides = dict[str, Any]


def hybrid(layers: int, every: int) -> list[str]:
    """Softmax attention in every so manieth layer, linear attention in the others."""
    return ["full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in range(layers)]


def overrides_of(model: str, size: str, changes: Overrides) -> tuple[str, Overrides]:
    """Name and overrides for `ModelSettings`, with an inner width that gives the size's number of parameters.

    Args:
        model: `tnl`, `llama`, `mamba2` (of transformers) or `gated_delta_net` (Qwen3-Next of transformers with linear
            attention in all layers and one dense feed-forward network).
        size: One of `SIZES`.
        changes: Fields of the configuration that differ.
    """
    width, layers, heads, inner = SIZES[size]
    common: Overrides = {"hidden_size": width, "num_hidden_layers": layers, "tie_word_embeddings": True}
    if model == "mamba2":
        # Without a feed-forward network; a layer has about 6 width^2 parameters. Chunks of 64: those of the plain
        # PyTorch form take memory in proportion.
        layers = {"tiny": 3, "10m": 10, "25m": 15, "45m": 17}[size]
        state = {"tiny": 8, "10m": 104, "25m": 104, "45m": 128}[size]
        head_dim = min(64, width)
        return "mamba2", common | {
            "num_hidden_layers": layers, "head_dim": head_dim, "num_heads": 2 * width // head_dim, "expand": 2,
            "n_groups": 1, "state_size": state, "chunk_size": 64,
        } | changes  # fmt: skip
    target = count_parameters("385m", _tnl(common, heads, inner))
    if model == "tnl":
        name, overrides = "385m", _tnl(common, heads, inner) | changes
    elif model == "llama":
        name, overrides = "llama", common | {
            "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": LONGEST,
        } | changes  # fmt: skip
    elif model == "gated_delta_net":
        head_dim = width // heads
        name, overrides = "qwen3_next", common | {
            "layer_types": ["linear_attention"] * layers, "mlp_only_layers": list(range(layers)),
            "linear_num_key_heads": heads, "linear_num_value_heads": heads, "linear_key_head_dim": head_dim,
            "linear_value_head_dim": head_dim, "num_attention_heads": heads, "num_key_value_heads": heads,
            "head_dim": head_dim, "max_position_embeddings": LONGEST,
        } | changes  # fmt: skip
    else:
        raise ValueError(f"model must be tnl, llama, gated_delta_net or mamba2, got {model!r}")
    if "intermediate_size" not in changes:
        few, many = (count_parameters(name, overrides | {"intermediate_size": n}) for n in (MULTIPLE, 2 * MULTIPLE))
        steps = round((target - few) / (many - few)) + 1
        overrides["intermediate_size"] = MULTIPLE * max(1, steps)
    return name, overrides


def _tnl(common: Overrides, heads: int, inner: int) -> Overrides:
    return common | {"num_attention_heads": heads, "intermediate_size": inner}


def configuration(name: str, overrides: Overrides) -> PreTrainedConfig:
    """The configuration for a byte vocabulary."""
    tokens = {"vocab_size": 320, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    if name in PRESETS:
        return TnlConfig.from_preset(name, **(tokens | overrides))
    return AutoConfig.for_model(name, **(tokens | overrides))


def count_parameters(name: str, overrides: Overrides) -> int:
    """Parameters of the model for bytes; none are allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(name, overrides))
    return sum(parameter.numel() for parameter in model.parameters())
