"""One lightning attention layer of transformers' MiniMax, as it is and on the operator: prefill, training, decode."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

from benchmarks.operator.cases import MINIMAX, MiniMaxLayer
from tnl.integrations.transformers import accelerate_minimax

Timer = Callable[[Callable[[], Any]], tuple[float, float, float]]


def layers(sizes: MiniMaxLayer, device: str, dtype: torch.dtype) -> dict[str, MiniMaxLightningAttention]:
    config = MiniMaxConfig(
        hidden_size=sizes.width, num_attention_heads=sizes.heads, head_dim=sizes.head_dim, num_hidden_layers=80
    )
    theirs = MiniMaxLightningAttention(config, 3).to(device, dtype)
    return {"transformers": theirs, "tnl": accelerate_minimax(copy.deepcopy(theirs))}


def passes(layer: MiniMaxLightningAttention, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def prefill() -> Any:
        with torch.no_grad():
            return layer(x, None, None)

    def train() -> None:
        layer(x, None, None)[0].sum().backward()

    cache = MiniMaxCache()
    cache.set_linear_cache(layer.layer_idx, prefill()[1])

    def decode() -> Any:
        with torch.no_grad():
            return layer(x[:, :1], None, None, past_key_values=cache)

    return {"prefill": prefill, "forward and backward": train, "decode": decode}


def measure_minimax(timer: Timer) -> Iterator[dict[str, Any]]:
    """Times of the whole layer, projections and norm with it; ``speedup`` is theirs over ours."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    sizes = MINIMAX[device]
    both = layers(sizes, device, dtype)
    for tokens in sizes.tokens:
        x = torch.randn(1, tokens, sizes.width, device=device, dtype=dtype)
        theirs: dict[str, float] = {}
        for name, layer in both.items():
            for what, call in passes(layer, x).items():
                median, low, high = timer(call)
                row = {"case": "minimax", "implementation": name, "B": 1, "H": sizes.heads, "T": tokens, "pass": what}
                row |= {"D": sizes.head_dim, "E": sizes.head_dim, "dtype": str(dtype).removeprefix("torch.")}
                row |= {"ms": median, "ms_20": low, "ms_80": high}
                yield row | ({"speedup": theirs[what] / median} if name == "tnl" else {})
                theirs.setdefault(what, median)
