"""The kernel of :mod:`tnl.ops.decode_step`: compiled for a model's dimensions when it is first used, and launched."""

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tnl.ops.decode_step import DecodeStep

WARPS, PIECE_BYTES, FIELDS = 8, 2048, 7  # as in decode_step.cu
DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def launch(step: "DecodeStep", token: Tensor, position: Tensor, logits: Tensor) -> None:
    """:meth:`tnl.ops.decode_step.DecodeStep.__call__`."""
    for name, tensor, expected in (
        ("token", token, (1,)),
        ("position", position, (1,)),
        ("logits", logits, (1, step.head.shape[0])),
    ):
        dtype = step.head.dtype if name == "logits" else torch.int64
        if tensor.shape != expected or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected {list(expected)} of {dtype}, got {list(tensor.shape)} of {tensor.dtype}"
            )
    with torch.cuda.device(step.device):
        kernel, shared_bytes = _kernel(_dimensions(step), torch.cuda.current_device())
        pointers = (
            token, position, step.embedding, logits, step.table, step.log_decay, step.stream, step.attended,
            step.squares, step.queries_keys, step.counters,
        )  # fmt: skip
        arguments: list[Any] = [ctypes.c_void_p(0 if x is None else x.data_ptr()) for x in pointers]
        arguments += [ctypes.c_float(step.embedding_scale), ctypes.c_float(step.norm_eps)]
        arguments.append(ctypes.c_int(step.head.shape[0]))
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        # Blocks wait for each other: a cooperative launch holds all of them at once, or is an error.
        _check(
            _driver().cuLaunchCooperativeKernel(
                kernel.func, step.blocks, 1, 1, 32 * WARPS, 1, 1, shared_bytes, stream, addresses
            )
        )


def _dimensions(step: "DecodeStep") -> tuple[tuple[str, int], ...]:
    properties: Any = torch.cuda.get_device_properties(step.device)
    limit = properties.shared_memory_per_block_optin
    slots = (limit - _beside_ring(step.width, len(step.layers))) // (WARPS * (PIECE_BYTES + 8))
    return (
        ("WIDTH", step.width),
        ("HEADS", step.heads),
        ("E", step.head_dim),
        ("INNER", step.inner),
        ("LAYERS", len(step.layers)),
        ("PROGRAMS", step.blocks),
        ("SLOTS", slots),
        ("HALF", int(step.head.dtype == torch.float16)),
        ("DECAY", int(step.log_decay is not None)),
    )


def _beside_ring(width: int, layers: int) -> int:
    """Bytes of shared memory beside the ring of weights, which has what is left."""
    return 4 * (WARPS + 1) * width + 8 * FIELDS * (layers + 1) + 256


@functools.cache
def _kernel(dimensions: tuple[tuple[str, int], ...], device: int) -> tuple[Any, int]:
    """The kernel, loaded on the current device, whose number this is, and bytes of shared memory."""
    source = Path(__file__).with_name("decode_step.cu").read_text()
    sizes = dict(dimensions)
    options = [f"-D{name}={size}" for name, size in dimensions]
    compiled = torch.cuda._compile_kernel(source, "decode_step", nvcc_options=options)
    shared_bytes = sizes["SLOTS"] * WARPS * (PIECE_BYTES + 8) + _beside_ring(sizes["WIDTH"], sizes["LAYERS"])
    _check(_driver().cuFuncSetAttribute(compiled.func, DYNAMIC_SHARED_MEMORY, shared_bytes))
    return compiled, shared_bytes


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status != 0:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(message))
        raise RuntimeError(f"CUDA: {(message.value or b'unknown error').decode()}")
