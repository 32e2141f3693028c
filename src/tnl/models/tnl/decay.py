"""The decay of each head and layer: `lambda = exp(-slope)`, in log space throughout.

Two formulas are in use under the same name, and they do not agree:

- released: ALiBi slopes times a layer factor, `slope = s_h (1 - l / (L - 1) + 1e-5)`. The released
  TransNormerLLM weights, MiniMax-Text-01 and Ring/Ling-linear use it.
- paper: `slope = (8 h / H) (1 - l / L)` (arXiv 2405.17381 eq. 10), with h and l from 0.
"""

import torch
from torch import Tensor

DECAY_SCHEDULES = ("released", "paper", "uniform", "none")


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
        schedule: `"released"`; `"paper"`; `"uniform"`, which is `"released"` without the layer factor;
            `"none"`, no decay at all.
        num_layers: Number of layers L. With L = 1 the released layer factor is `1 + 1e-5`, the value
            of every first layer.
        num_heads: Number of heads H.
        device: Where to build it. It is computed anew there rather than stored, so that no cast of
            the model to 16 bits reaches it and no checkpoint holds it.

    Returns:
        `[num_layers, num_heads]`, float32, all <= 0.

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
    if schedule == "paper":
        head = torch.arange(num_heads, dtype=torch.float64, device=device)
        return -(8 * head / num_heads * (1 - layer / num_layers)).float()
    if schedule == "uniform":
        return -slopes.expand(num_layers, -1)
    return torch.zeros(num_layers, num_heads, device=device)
