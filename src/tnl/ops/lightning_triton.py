"""Lightning attention in Triton: which kernels a call takes, how it is laid out, and its launch.

The kernels are in :mod:`tnl.ops.walk_triton`, those for Hopper GPUs in :mod:`tnl.ops.lightning_gluon`. All that a
launch needs but addresses is the same for calls that look alike and is kept as a plan.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tnl.ops.backends import interpreted
from tnl.ops.launch_triton import (
    KNOWN,
    Launcher,
    aligned,
    describe_tokens,
    find_launcher,
    is_aligned,
)
from tnl.ops.tiling_triton import (
    Cut,
    Tiles,
    ceil_div,
    choose_tiles,
    count_processors,
    cut_tokens,
    padded_width,
    product_precision,
)
from tnl.ops.walk_triton import _backward_kernel, _forward_kernel


class Kernels(NamedTuple):
    """A walk with the kernels around it, what describes their tokens to them, and its tiles if it has but one size.

    They are for launches that keep at least the share ``busy`` of the multiprocessors busy on average.
    """

    forward: Any
    backward: Any
    describe: Callable[[Tensor, int, int, bool], TensorDescriptor]
    tiles: Tiles | None = None
    busy: float = 0.0


IN_TRITON = Kernels(_forward_kernel, _backward_kernel, describe_tokens)


@functools.lru_cache
def choose_kernels(
    D: int, E: int, dtype: torch.dtype, device: torch.device, backward: bool, per_token: bool, several: bool
) -> tuple[Kernels, ...]:
    """The first choice first; the last one serves launches that the others do not suit (see :func:`_lay_out`).

    On Hopper those of :mod:`tnl.ops.lightning_gluon` come first where they were quicker (H100, H200).
    ``several``: whether a packed row holds several sequences.
    """
    if (
        dtype not in (torch.float16, torch.bfloat16)
        or device.type != "cuda"
        or torch.cuda.get_device_capability(device) != (9, 0)
        or interpreted()
        or not triton.__version__.startswith(KNOWN)
    ):
        return (IN_TRITON,)
    from tnl.ops.lightning_gluon import IN_GLUON, IN_GLUON_WIDE

    narrow, wide = sorted((padded_width(D), padded_width(E)))
    if narrow < 64 or wide > 256:
        return (IN_TRITON,)
    if wide == 256:
        return IN_GLUON_WIDE, IN_TRITON
    if not backward:
        others: tuple[Kernels, ...] = (IN_GLUON, IN_TRITON)
    else:
        others = (IN_TRITON,) if per_token or narrow < 128 else (IN_GLUON,)
    # Several sequences of a row end at different times, which more and quicker programs even out.
    return others if narrow < 128 or several else (IN_GLUON_WIDE, *others)


def _lay_out(
    q: Tensor, E: int, cu_seqlens: Tensor | None, decay: int, exact: bool, walks: tuple[int, int] | None
) -> tuple[Kernels, Tiles, Cut]:
    """Kernels, tiles and cut of a launch: forward, or backwards with so many walks over columns of D and of E.

    The first kernels that walk whole sequences and keep the chip busy, or the last.
    """
    D = q.shape[-1]
    backward = walks is not None
    d_walks, e_walks = walks or (0, 1)
    processors = count_processors(q.device)
    several = cu_seqlens is not None and len(cu_seqlens) > 2
    for kernels in choose_kernels(D, E, q.dtype, q.device, backward, decay == 2, several):
        rows, columns = (max(D, E), max(D, E)) if backward else (D, E)
        tiles = kernels.tiles or choose_tiles(rows, columns, q.dtype, backward, decay == 2, exact)
        blocks = d_walks * ceil_div(D, tiles.columns) + e_walks * ceil_div(E, tiles.columns)
        cut = cut_tokens(q, cu_seqlens, blocks, decay == 1)
        programs = cut.sequences * q.shape[2] * blocks
        if not cut.split and programs >= kernels.busy * processors * ceil_div(programs, processors):
            break
    return kernels, tiles, cut


def _decay_form(log_decay: Tensor | None) -> tuple[Tensor | None, int]:
    """Log decay as contiguous float32 and its form for the kernels: 0 none, 1 one a head, 2 one a token."""
    if log_decay is None:
        return None, 0
    return log_decay.float().contiguous(), 1 if log_decay.dim() == 1 else 2


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class _Plan:
    """All of a launch but addresses: the same for all calls whose arguments look alike. It holds no tensor."""

    kernel: Any
    tiled: tuple[tuple[int, int], ...]  # the kernel's descriptors: which of the tokens, in tiles of which width
    constants: tuple[Any, ...]

    def __init__(
        self, tokens: tuple[Tensor, ...], cu_seqlens: Tensor | None, walks: tuple[int, int] | None,
        decay: int, scale: float, precision: str, transposed: bool,
    ) -> None:  # fmt: skip
        """``tokens``: q, k, v, and backwards do; ``walks`` as for :func:`_lay_out`."""
        q, k, v = tokens[:3]
        length, heads, D = q.shape[1:]
        E = v.shape[-1]
        self.aligned = all(is_aligned(x) for x in tokens)
        self.kernels, self.tiles, self.cut = _lay_out(q, E, cu_seqlens, decay, precision == "ieee", walks)
        cut, columns = self.cut, self.tiles.columns
        d_walks, e_walks = walks or (0, 1)
        blocks = d_walks * ceil_div(D, columns) + e_walks * ceil_div(E, columns)
        self.programs = cut.items * heads * blocks
        self.flags = 1 + cut.sequences * heads * blocks if cut.split else 0
        self.states = (cut.sequences, heads, E, D) if transposed else (cut.sequences, heads, D, E)
        self.numbers: tuple[Any, ...] = (
            scale, length, heads, heads // k.shape[2],
            cut.sequences, cut.segment, cut.lead, cut.per_sequence, cut.items,
        )  # fmt: skip
        self.sizes = (D, E)
        self.launcher: Launcher | None = None
        self.expanded: dict[tuple[int, int], list[Any]] = {}

    def launch(self, tokens: Sequence[Tensor], pointers: tuple[Tensor | None, ...]) -> None:
        """``pointers``: the kernel's but for the flags; in place of None, which it does not follow, goes the first.

        Of ``tokens`` it keeps no more than what describes them to the kernel, by address.
        """
        first = pointers[0]
        assert first is not None
        flags = torch.zeros(self.flags, dtype=torch.int32, device=first.device) if self.flags else None
        followed = [first if x is None else x for x in (*pointers, flags)]
        if not self.aligned:
            tokens = [aligned(x) for x in tokens]
        launcher = self.launcher
        if launcher is None or not launcher.ready():
            launcher = self.launcher = find_launcher(self.kernel, followed, self.sizes, self.constants, self.tiles)
            described = [self._describe(tokens[i], width) for i, width in self.tiled]
            launcher(self.programs, described, followed, self.numbers)
            return
        addresses = [x.data_ptr() for x in tokens]
        expanded: list[Any] = []
        for place, (i, width) in enumerate(self.tiled):
            key = (place, addresses[i])
            arguments = self.expanded.get(key)
            if arguments is None:
                if len(self.expanded) == KEPT_DESCRIPTORS:
                    self.expanded.clear()
                arguments = self.expanded[key] = launcher.expand(place, self._describe(tokens[i], width))
            expanded += arguments
        launcher.launch(self.programs, expanded, followed, self.numbers)

    def _describe(self, x: Tensor, width: int) -> TensorDescriptor:
        return self.kernels.describe(x, self.tiles.tokens, width, self.cut.packed)


class _ForwardPlan(_Plan):
    def __init__(
        self, tokens: tuple[Tensor, ...], pointers: tuple[Tensor | None, ...],
        decay: int, scale: float, precision: str, transposed: bool, return_final_state: bool,
    ) -> None:  # fmt: skip
        """``pointers``: log decay, initial state, cu_seqlens, and memory for the output if it is given."""
        _, initial_state, cu_seqlens, _ = pointers
        super().__init__(tokens, cu_seqlens, None, decay, scale, precision, transposed)
        D, E = self.sizes
        tiles, cut = self.tiles, self.cut
        block_d = padded_width(D)
        self.out = (*tokens[0].shape[:3], E)
        self.stores_state = return_final_state or cut.split
        self.kernel = self.kernels.forward
        self.tiled = ((0, block_d), (1, block_d), (2, tiles.columns))
        self.constants = (
            transposed, decay, initial_state is not None, return_final_state, cut.packed, cut.split, precision,
            tiles.tokens, block_d, tiles.columns,
        )  # fmt: skip


class _BackwardPlan(_Plan):
    def __init__(
        self, tokens: tuple[Tensor, ...], pointers: tuple[Tensor | None, ...],
        decay: int, scale: float, precision: str, transposed: bool, need_decay: bool, need_dq: bool,
        need_dinitial: bool,
    ) -> None:  # fmt: skip
        """``pointers``: log decay, initial state, gradient of the final state, cu_seqlens."""
        _, initial_state, dfinal_state, cu_seqlens = pointers
        super().__init__(tokens, cu_seqlens, (2 if need_dq else 1, 1), decay, scale, precision, transposed)
        D, E = self.sizes
        tiles, cut = self.tiles, self.cut
        batch, length, heads, _ = tokens[0].shape
        block_d, block_e, block_c = padded_width(D), padded_width(E), tiles.columns
        self.gradients = [(batch, length, heads, width) for width in (D * need_dq, D, E)]
        self.difference = (2, ceil_div(D, tiles.columns), batch, heads, length)
        self.stores_states = (cut.split, cut.split, cut.split or need_dinitial)
        self.numbers += (batch * length * heads,)
        self.kernel = self.kernels.backward
        self.tiled = (
            (0, block_d), (1, block_d), (2, block_e), (3, block_e), (0, block_c), (1, block_c), (3, block_c)
        )  # fmt: skip
        self.constants = (
            transposed, decay, initial_state is not None, dfinal_state is not None, need_decay,
            cut.packed, cut.split, need_dq, need_dinitial, precision, tiles.tokens, block_d, block_e, block_c,
        )  # fmt: skip


KEPT_DESCRIPTORS, KEPT_PLANS = 512, 1024
_plans: dict[Any, Any] = {}
AnyPlan = TypeVar("AnyPlan", bound=_Plan)


def _find_plan(
    kind: Callable[..., AnyPlan], tokens: tuple[Tensor, ...], pointers: tuple[Tensor | None, ...], *options: Any
) -> AnyPlan:
    """``kind(tokens, pointers, *options)``, or the one of a call that looked alike."""
    key = [kind, options, tokens[0].dtype, tokens[0].device]
    for x in tokens:
        key += (x.shape, x.stride(), x.data_ptr() % 16 == 0)
    for pointer in pointers:
        key.append(None if pointer is None else (pointer.shape, pointer.dtype, pointer.data_ptr() % 16 == 0))
    found = tuple(key)
    plan = _plans.get(found)
    if plan is None:
        if len(_plans) == KEPT_PLANS:
            _plans.clear()
        plan = _plans[found] = kind(tokens, pointers, *options)
    return plan


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_final_state: bool,
    transposed: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(o, final_state)``; shapes as in :func:`tnl.ops.lightning_attention`, states ``[.., E, D]`` if transposed.

    ``out``: contiguous memory for o, else it is allocated.
    """
    log_decay, decay = _decay_form(log_decay)
    initial_state = _contiguous(initial_state)
    tokens = (q, k, v)
    plan = _find_plan(
        _ForwardPlan, tokens, (log_decay, initial_state, cu_seqlens, out),
        decay, scale, product_precision(q.dtype), transposed, return_final_state,
    )  # fmt: skip
    o = torch.empty(plan.out, dtype=q.dtype, device=q.device) if out is None else out
    final_state = None
    if plan.stores_state:
        final_state = torch.empty(plan.states, dtype=torch.float32, device=q.device)
    plan.launch(tokens, (o, log_decay, initial_state, final_state, cu_seqlens))
    return o, final_state


def backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    need_decay: bool,
    transposed: bool = False,
    need_dq: bool = True,
    need_dinitial: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``(dq, dk, dv, dinitial_state, difference)``, as :func:`tnl.ops.lightning_torch.backward`.

    Without ``need_dq``, which ``need_decay`` needs, dq is empty memory of no size; without ``need_dinitial``, or where
    there is no initial state, dinitial_state is None.
    """
    device = q.device
    log_decay, decay = _decay_form(log_decay)
    initial_state, dfinal_state = _contiguous(initial_state), _contiguous(dfinal_state)
    need_dinitial = need_dinitial and initial_state is not None
    tokens = (q, k, v, do)
    plan = _find_plan(
        _BackwardPlan, tokens, (log_decay, initial_state, dfinal_state, cu_seqlens),
        decay, scale, product_precision(q.dtype), transposed, need_decay, need_dq, need_dinitial,
    )  # fmt: skip
    dq, dk, dv = [torch.empty(shape, dtype=q.dtype, device=device) for shape in plan.gradients]
    difference = torch.empty(plan.difference, dtype=torch.float32, device=device) if need_decay else None
    states = [
        torch.empty(plan.states, dtype=torch.float32, device=device) if stored else None
        for stored in plan.stores_states
    ]
    plan.launch(
        tokens,
        (
            dq if need_dq else dk, dk, dv, difference, log_decay, initial_state, dfinal_state, *states, cu_seqlens,
        ),
    )  # fmt: skip
    if (kv_heads := k.shape[2]) != q.shape[2]:
        dk, dv = (x.unflatten(2, (kv_heads, -1)).sum(3) for x in (dk, dv))
    if difference is not None:
        difference = (difference[0].sum(0) - difference[1].sum(0)).mT
    return dq, dk, dv, states[2] if need_dinitial else None, difference
