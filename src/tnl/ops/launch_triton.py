"""Launches of compiled Triton kernels with little work on the host.

Triton's own launch looks at each argument in Python and describes each tensor descriptor anew, which takes longer than
all else that the host does for a small call. What it finds is the same for all calls whose arguments look alike: it is
kept here, and a launch goes straight to the kernel's launcher in C.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from tnl.ops.tiling_triton import Tiles

KNOWN = "3.6."  # the version of Triton whose launches this knows
RAGGED: tl.constexpr = tl.constexpr(2**30)  # see describe_tokens


class Launcher:
    """A kernel for arguments of one kind: dtypes and alignment of its pointers, its sizes and its constants.

    Arguments of the kernel are, in this order, tensor descriptors, pointers, numbers that it does not specialise on,
    and ``fixed``: sizes and constants.
    """

    def __init__(self, kernel: Any, fixed: tuple[Any, ...], tiles: Tiles, device: torch.device) -> None:
        self.kernel, self.fixed, self.tiles, self.device = kernel, fixed, tiles, device.index
        self.compiled: Any = None
        self.in_c: Callable[..., None] | None = None

    def __call__(
        self, programs: int, tokens: Sequence[TensorDescriptor], pointers: Sequence[Tensor], numbers: tuple[Any, ...]
    ) -> None:
        """Launch as many programs on the current stream."""
        _bind_context(self.device)
        if self.ready():
            self.launch(programs, [y for i, x in enumerate(tokens) for y in self.expand(i, x)], pointers, numbers)
        elif self.compiled is None:
            options = {"num_warps": self.tiles.warps, "num_stages": self.tiles.stages}
            self.compiled = self.kernel[(programs,)](*tokens, *pointers, *numbers, *self.fixed, **options)
            if self.compiled is not None:  # it is, under the interpreter
                self._find_launcher()
        else:
            self.compiled[(programs, 1, 1)](*tokens, *pointers, *numbers, *self.fixed)

    def _find_launcher(self) -> None:
        """What Triton's wrappers hold. They serve where this version of Triton or this kernel's launch is another."""
        run = self.compiled.run
        if not triton.__version__.startswith(KNOWN) or run.global_scratch_size or run.profile_scratch_size:
            return
        launcher = run.launch
        if hasattr(launcher, "__closure__"):  # a wrapper that makes the hardware's descriptors of Triton's
            names = launcher.__code__.co_freevars
            held = {name: cell.cell_contents for name, cell in zip(names, launcher.__closure__, strict=True)}
            self.forms, self.describe = held["tensordesc_meta"], launcher.__globals__["make_tensordesc_arg"]
            if None in self.forms:  # a GPU without such descriptors
                return
            launcher = held["launcher"]
        self.head = (
            self.compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
            self.compiled.packed_metadata, None, None, None,
        )  # fmt: skip
        self.in_c = launcher

    def ready(self) -> bool:
        """Whether :meth:`launch` may be called: once compiled, and while no profiler of Triton's listens."""
        return self.in_c is not None and not knobs.runtime.launch_enter_hook.calls

    def expand(self, index: int, descriptor: TensorDescriptor) -> list[Any]:
        """What the launcher in C takes for the descriptor: good for as long as its tensor has the same address."""
        _bind_context(self.device)
        return self.describe(descriptor, self.forms[index])

    def launch(self, programs: int, tokens: list[Any], pointers: Sequence[Tensor], numbers: tuple[Any, ...]) -> None:
        """As a call, with the descriptors one behind the other as :meth:`expand` made them."""
        assert self.in_c is not None
        self.in_c(
            programs, 1, 1, torch._C._cuda_getCurrentRawStream(self.device), *self.head,
            *tokens, *[x.data_ptr() for x in pointers], *numbers, *self.fixed,
        )  # fmt: skip


class _Contexts(threading.local):
    """Devices whose context a thread has."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_contexts = _Contexts()


def _bind_context(device: int | None) -> None:
    """Give the calling thread the device's context, without which the driver describes no tensor.

    CUDA's runtime does so at a thread's first call. The thread of a backward pass whose memory comes from PyTorch's
    cache may not have made one.
    """
    if device is not None and device not in _contexts.devices:
        torch.cuda.mem_get_info(device)
        _contexts.devices.add(device)


_launchers: dict[Any, Launcher] = {}


def find_launcher(
    kernel: Any, pointers: Sequence[Tensor], sizes: tuple[int, ...], constants: tuple[Any, ...], tiles: Tiles
) -> Launcher:
    """The one for pointers like these; there are as many as there are variants of the kernel."""
    key = (kernel, sizes, constants, tiles, *[(x.dtype, x.device, x.data_ptr() % 16 == 0) for x in pointers])
    launcher = _launchers.get(key)
    if launcher is None:
        launcher = _launchers[key] = Launcher(kernel, (*sizes, *constants), tiles, pointers[0].device)
    return launcher


def launch_kernel(
    kernel: Any, programs: int, tokens: tuple[Any, ...], pointers: tuple[Tensor, ...], numbers: tuple[Any, ...],
    sizes: tuple[int, ...], constants: tuple[Any, ...], tiles: Tiles,
) -> None:  # fmt: skip
    """``kernel[(programs,)](*tokens, *pointers, *numbers, *sizes, *constants)``, in a fraction of its host time."""
    find_launcher(kernel, pointers, sizes, constants, tiles)(programs, tokens, pointers, numbers)


# --- Arguments --------------------------------------------------------------------------------------------------


def is_aligned(x: Tensor) -> bool:
    """Whether addresses are the multiples of 16 bytes that descriptors need."""
    batch, token, head, _ = x.stride()
    return not (x.data_ptr() % 16 or (batch | token | head) * x.element_size() % 16) and 0 not in (batch, token, head)


def aligned(x: Tensor) -> Tensor:
    """``x``, or a copy with wider rows where addresses are not aligned."""
    if is_aligned(x):
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % (16 // x.element_size())))[..., : x.shape[-1]]


def describe_tokens(x: Tensor, tokens: int, width: int, packed: bool) -> TensorDescriptor:
    """Of ``x [B, T, heads, width]``, to be read in tiles of so many tokens of one head.

    One of ``[B, heads, T, width]`` serves whole rows: what a tile reads beyond T is zero. In a packed row another
    sequence follows. There, a token's coordinate counts from so far before the sequence's end that the end is where the
    descriptor's tokens end, and two more dimensions take the address back to where it belongs, as in Triton's own
    ``ragged_tma``: ``RAGGED (R - s) + end s + (RAGGED - length + t) s = (begin + t) s`` modulo 2^64, with s the stride
    of a token and ``RAGGED R`` a multiple of 2^64.

    Made without the class's own checks, which take longer than all else and which :func:`aligned` has answered.
    """
    B, T, heads, last = x.shape
    batch_stride, token_stride, head_stride, _ = x.stride()
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.base, descriptor.padding = x, "zero"
    if packed:
        descriptor.shape = [2**31 - 65536, 2**31 - 65536, heads, RAGGED.value, last]
        descriptor.strides = [2**34 - token_stride, token_stride, head_stride, token_stride, 1]
        descriptor.block_shape = [1, 1, 1, tokens, width]
    else:
        descriptor.shape = [B, heads, T, last]
        descriptor.strides = [batch_stride, head_stride, token_stride, 1]
        descriptor.block_shape = [1, 1, tokens, width]
    return descriptor


def pointer_or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer that the kernel does not follow needs a type all the same."""
    return stand_in if x is None else x
