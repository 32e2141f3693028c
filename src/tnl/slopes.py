"""The decay of each head and layer of the models that use lightning attention: `lambda = exp(-slope)`.

Nearly all start from ALiBi's slopes, and no two agree on the layer factor. With `s_h` the slope of head h of H, and
layers l of L counted from 0:

- released, `s_h (1 - l / (L - 1) + 1e-5)`: TransNormerLLM as released, MiniMax-Text-01 as published, and
  Ring/Ling-linear in code that counts its layers from 1 and subtracts that.
- ling, `s_h (1 - (l - 1) / (L - 1) + 1e-5)`: Ring/Ling-linear as published, which subtracts 1 from an index that
  begins at 0.
- minimax, `2^(-8 h / H) (1 - l / (L - 1 + 1e-5) + 1e-5)` with h from 1: MiniMax in transformers.
- uniform, `s_h`: MiniCPM-SALA.
- paper, `(8 h / H) (1 - l / L)` with h from 0: arXiv 2405.17381 eq. 10, `chunk_lightning_attn` of
  flash-linear-attention.
- none, 0.

Weights trained with one are useless with another. The scale differs as well: 1 in TransNormerLLM and MiniMax,
`D^-0.5` in Ring/Ling and MiniCPM-SALA.
"""

import torch
from torch import Tensor

DECAY_SCHEDULES = ("released", "paper", "ling", "minimax", "uniform", "none")


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """Slopes of ALiBi (arXiv 2108.12409): `2^(-8 i / H)` for i = 1..H.

    Where H is not a power of two they are those of the next lower power of two c, followed by every
    second slope of 2c until there are H.

    Returns:
        `[num_heads]`, float64.
    """
    lower = 1 << (num_heads.bit_length() - 1)
    own = torch.arange(1, lower + 1, dtype=torch.float64, device=device) / lower
    between = torch.arange(num_heads - lower, dtype=torch.float64, device=device) / lower + 0.5 / lower
    return torch.exp2(-8 * torch.cat([own, between]))


def log_decay(schedule: str, num_layers: int, num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """Natural logarithm of the decay of every layer and head: what `lightning_attention` takes.

    Args:
        schedule: One of `DECAY_SCHEDULES`, see :mod:`tnl.slopes`.
        num_layers: Number of layers L, those with other kinds of attention counted too. Where L = 1 leaves 0 / 0,
            the layer factor is `1 + 1e-5`, the value of every first layer.
        num_heads: Number of heads H.
        device: Where to build it. It is computed anew there rather than stored, so that no cast of
            the model to 16 bits reaches it and no checkpoint holds it.

    Returns:
        `[num_layers, num_heads]`, float32, all <= 0: row l is what layer l hands to the operator.

    Raises:
        ValueError: An unknown schedule.
    """
    if schedule not in DECAY_SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(DECAY_SCHEDULES)}, got {schedule!r}")
    layer = torch.arange(num_layers, dtype=torch.float64, device=device)[:, None]
    # The released code rounds slopes and factors to float32 before it multiplies them.
    slopes = alibi_slopes(num_heads, device).float()
    if schedule == "released":
        return -slopes * (1 - layer / max(num_layers - 1, 1) + 1e-5).float()
    if schedule == "ling":
        before = layer - 1 if num_layers > 1 else layer
        return -slopes * (1 - before / max(num_layers - 1, 1) + 1e-5).float()
    if schedule == "minimax":
        head = torch.arange(1, num_heads + 1, dtype=torch.float64, device=device)
        return -(torch.exp2(-8 * head / num_heads) * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)).float()
    if schedule == "paper":
        head = torch.arange(num_heads, dtype=torch.float64, device=device)
        return -(8 * head / num_heads * (1 - layer / num_layers)).float()
    if schedule == "uniform":
        return -slopes.expand(num_layers, -1)
    return torch.zeros(num_layers, num_heads, device=device)
