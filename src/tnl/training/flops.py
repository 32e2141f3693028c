"""Arithmetic of training: operations a token, and what a device could do at most."""

from typing import Any

from torch import nn

# Dense bfloat16 products a second, from the data sheets of the makers, by a part of the device's name.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
}


def peak_flops(device: str) -> float | None:
    """Most bfloat16 operations a second of a device, by its name; None for one that is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device), None)


def matrix_parameters(model: nn.Module) -> int:
    """Parameters that every token is multiplied with: matrices, the head too, but no embedding that is only read."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    linear = {id(p): p for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    others = {id(p): p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings}
    return sum(p.numel() for p in (linear | others).values())


def flops_per_token(matrices: int, config: Any, tokens: int) -> float:
    """Floating-point operations of forward and backward pass for one token, recomputation not counted.

    Six for each parameter of a matrix. Linear attention adds, a head and layer, ``12 D E``: state written and read,
    three times. Softmax attention adds ``6 E T``: scores and values over half of T on average, three times.

    Args:
        matrices: Parameters of matrices (:func:`matrix_parameters`).
        config: Configuration of the model, TNL or another of transformers.
        tokens: Length T of a sequence.
    """
    total = 6.0 * matrices
    config = config.get_text_config()
    layers, heads = config.num_hidden_layers, getattr(config, "num_attention_heads", 0)
    if config.model_type == "tnl":
        for layer in range(layers):
            heads, D, E = config.state_shape(layer)
            total += 12 * heads * D * E if config.is_linear(layer) else 6 * heads * E * tokens
    elif heads:
        total += 6.0 * layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) * tokens
    return total
