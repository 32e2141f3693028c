"""How the work of a launch in Triton is laid out on a chip: tiles, and where a sequence is cut into segments.

Pure functions of sizes and of the number of multiprocessors; figures were measured on an H100 unless said.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Sizes of one launch: tokens in a block, columns of the state a program owns, warps, pipeline stages."""

    tokens: int
    columns: int
    warps: int
    stages: int


def ceil_div(total: int, size: int) -> int:
    """``triton.cdiv`` takes microseconds when called on the host."""
    return -(-total // size)


def padded_width(width: int) -> int:
    """The power of two, at least 16, that tiles of this width have."""
    return max(16, 1 << (width - 1).bit_length())


def product_precision(dtype: torch.dtype) -> str:
    """Of float32 products: TF32 where PyTorch may use it for its own."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.lru_cache
def count_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# --- Tiles ------------------------------------------------------------------------------------------------------


@functools.lru_cache
def choose_tiles(rows: int, columns: int, dtype: torch.dtype, backward: bool, per_token: bool, exact: bool) -> Tiles:
    """Tiles for a state of ``rows x columns`` (each the larger one of the passes of a launch).

    ``exact`` float32 products run outside the matrix units; their tiles are small, since the loops are unrolled.

    Four stages of 64 tokens and 64 columns leave room for one program on a multiprocessor, which saturates its memory.
    Smaller tiles leave room for two, which hide each other's arithmetic where there is more of it: with a decay per
    token, and where a width is padded.
    """
    padded = padded_width(rows)
    width = padded_width(columns)
    if dtype == torch.float32:
        return Tiles(16, 16, 8, 2) if exact else Tiles(64 if padded <= 128 else 32, min(width, 32), 4, 2)
    if padded > 128 or (backward and 64 < rows < padded):
        return Tiles(64, min(width, 32), 4, 3)
    if per_token:
        return Tiles(64, min(width, 64), 4, 2) if backward else Tiles(32, min(width, 64), 4, 3)
    return Tiles(64, min(width, 64), 4, 4)


# --- Segments that hand over the state as they walk -------------------------------------------------------------

MIN_SEGMENT = 256
LONG_SEGMENT = 65536
LEAD = 0.45  # time to sum up a segment's state, of the time to walk it


def cut_sequence(tokens: int, walks: int, processors: int, fades: bool) -> tuple[int, int]:
    """Tokens in a segment, and in the first one along the walk.

    ``walks`` is the number of programs of a launch without a cut. One program a multiprocessor saturates the memory,
    so a sequence is one segment where there is one multiprocessor for a walk, or where segments would be short.
    Otherwise the segments behind the first are as many as make one program for each multiprocessor, and the first is
    so short that its walk ends when the others have their sums; the last runs where the first one ran.

    Where heads have decays of their own (``fades``), most need to sum up little of a long segment; then segments are
    equal, and more than fill the chip if the sequence is that long, so that heads that take longer even out.
    """
    segments = min(processors // walks, tokens // MIN_SEGMENT)
    if segments < 2:
        return tokens, tokens
    if fades and tokens >= segments * LONG_SEGMENT:
        return LONG_SEGMENT, LONG_SEGMENT
    length = ceil_div(int(tokens / (segments + LEAD)) + 1, 64) * 64
    return length, max(64, int(LEAD * length) // 64 * 64)


@dataclass(frozen=True)
class Cut:
    """How the tokens of a launch are cut: sequences, segments a sequence, items in all, and what the kernels test."""

    sequences: int
    segment: int
    lead: int
    per_sequence: int
    items: int
    split: bool
    packed: bool


def cut_tokens(q: Tensor, cu_seqlens: Tensor | None, walks: int, fades: bool) -> Cut:
    """``walks``: programs for one head of one sequence that is not cut; ``fades`` as for :func:`cut_sequence`."""
    batch, tokens, heads = q.shape[:3]
    packed = cu_seqlens is not None
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segment, lead = cut_sequence(tokens, sequences * heads * walks, count_processors(q.device), fades)
    if segment == tokens:
        return Cut(sequences, tokens, tokens, 1, sequences, False, packed)
    segments = 1 + ceil_div(tokens - lead, segment)
    items = sequences + segments if packed else sequences * segments
    return Cut(sequences, segment, lead, segments, items, True, packed)


# --- Segments whose states are known before ----------------------------------------------------------------------

SHORTEST_SEGMENT = 8192
WAVES = 4  # at most so many times as many programs as multiprocessors


@functools.lru_cache
def choose_segments(tokens: int, walks: int, processors: int) -> int:
    """Into how many segments of one length to cut the tokens: those that leave the fewest multiprocessors idle.

    A program walks along a segment, one at a time on a multiprocessor, so the programs of a launch, ``walks`` a
    segment, should be a little fewer than a multiple of these. The backward pass has several times as many.
    """
    best, segments = 0.0, 1
    for count in range(1, min(WAVES * processors // walks, tokens // SHORTEST_SEGMENT) + 1):
        used = walks * count / (ceil_div(walks * count, processors) * processors)
        if tokens % count == 0 and used > 1.05 * best:
            best, segments = used, count
    return segments
