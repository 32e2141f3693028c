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
        model: `tnl`, `llama` (of transformers) or `gla` (of flash-linear-attention).
        size: One of `SIZES`.
        changes: Fields of the configuration that differ.
    """
    width, layers, heads, inner = SIZES[size]
    common: Overrides = {"hidden_size": width, "num_hidden_layers": layers, "tie_word_embeddings": True}
    target = count_parameters("385m", _tnl(common, heads, inner))
    if model == "tnl":
        name, overrides = "385m", _tnl(common, heads, inner) | changes
    elif model == "llama":
        name, overrides = "llama", common | {
            "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": LONGEST,
        } | changes  # fmt: skip
    elif model == "gla":
        import benchmarks.language_modelling.gated_linear_attention  # noqa: F401 (makes it known)

        name, overrides = "gla", common | {
            "num_heads": max(1, width // 128), "max_position_embeddings": LONGEST, "fuse_cross_entropy": False,
        } | changes  # fmt: skip
    else:
        raise ValueError(f"model must be tnl, llama or gla, got {model!r}")
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
