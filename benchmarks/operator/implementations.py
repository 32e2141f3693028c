"""The operator and its peers behind one signature: q, k, v ``[B, T, H, D]`` and log decays in, output out."""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tnl.ops import lightning_attention

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def tnl(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return lightning_attention(q, k, v, log_decay)[0]


def fla_simple_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    gate = {"g_gamma": log_decay} if log_decay.dim() == 1 else {"g": log_decay}
    return chunk_simple_gla(q, k, v, scale=1.0, **gate)[0]


def official(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from lightning_attn.ops import lightning_attn_func

    return lightning_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), -log_decay).transpose(1, 2)


def softmax(kind: SDPBackend | None) -> Attention:
    """PyTorch's softmax attention, by one of its implementations or by the one it picks."""

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with nullcontext() if kind is None else sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call


def block_loop(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The loop over blocks of 256 that transformers' MiniMax lightning attention runs, its decays made once."""
    block = 256
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    place = torch.arange(1, block + 1, device=q.device)
    rate = log_decay[:, None, None]
    reading, writing = torch.exp(rate * place[:, None]), torch.exp(rate * (block - place[:, None]))
    gap = (place[:, None] - place[None, :]) * rate
    diagonal = torch.where(place[:, None] >= place[None, :], gap.exp(), 0.0)
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outputs = []
    for begin in range(0, q.shape[2], block):
        qb, kb, vb = (x[:, :, begin : begin + block] for x in (q, k, v))
        n = qb.shape[2]
        inside = ((qb @ kb.mT) * diagonal[:, :n, :n]) @ vb
        outputs.append(inside + (qb * reading[:, :n]) @ state)
        state = torch.exp(rate * n) * state + (kb * writing[:, -n:]).mT @ vb
    return torch.cat(outputs, dim=2).transpose(1, 2)


GPU: dict[str, Attention] = {
    "tnl": tnl,
    "fla simple_gla": fla_simple_gla,
    "lightning-attn": official,
    "softmax, flash": softmax(SDPBackend.FLASH_ATTENTION),
    "softmax, cuDNN": softmax(SDPBackend.CUDNN_ATTENTION),
}
CPU: dict[str, Attention] = {"tnl": tnl, "block loop of MiniMax": block_loop, "softmax": softmax(None)}
PACKAGES = {"fla simple_gla": "fla", "lightning-attn": "lightning_attn"}


def absent(name: str) -> bool:
    """Whether the package of a peer is not installed."""
    return name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None
