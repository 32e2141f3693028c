"""Which implementation of an operator runs, and how it is called."""

import importlib.util
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Result = TypeVar("Result")


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_installed() -> bool:
    """Whether the package triton can be imported."""
    return _HAS_TRITON


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve_backend(backend: str, q: Tensor) -> str:
    """``"torch"`` or ``"triton"`` for inputs like ``q``.

    Raises:
        ValueError: An unknown backend, or one that cannot serve these inputs.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "torch":
        return backend
    if backend == "auto":
        return "triton" if q.is_cuda and q.dtype != torch.float64 and triton_installed() else "torch"
    if q.dtype == torch.float64:
        raise ValueError("backend: 'triton' serves float32, float16 and bfloat16, got float64 inputs; use 'torch'")
    if not triton_installed():
        raise ValueError("backend: 'triton' needs the package triton, which is not installed; use 'torch'")
    if not q.is_cuda and not interpreted():
        raise ValueError(f"backend: 'triton' needs CUDA tensors, got device {q.device}; use 'torch'")
    return backend


def autocast_enabled(x: Tensor) -> bool:
    """Whether ``torch.autocast`` is on for the device of ``x`` (the meta device has none)."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def call_on_device(function: Callable[..., Result], first: Tensor, *others: object) -> Result:
    """``function(first, *others)`` with the device of ``first`` current, since Triton launches on the current one.

    Autocast is off meanwhile: an implementation chooses its dtypes itself.
    """
    device = first.device
    if autocast_enabled(first):
        with torch.autocast(device.type, enabled=False):
            return call_on_device(function, first, *others)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return function(first, *others)
    return function(first, *others)
