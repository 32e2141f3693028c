"""A whole step of decoding one row in one kernel, in Triton; :mod:`tnl.ops.decode_step` checks what comes here.

Programs stay on their processors for the whole step and wait for each other three times a layer, by counters in memory:
after queries, keys, values and gates (only the programs of a head for each other), after the output projection, after
the gated linear unit. Before it waits a program asks for the weights that it needs next, so that memory is read
meanwhile. Two of the three are sums over all programs: each adds its part, in fixed point, so that the order does not
matter and the same step gives the same bits.

Dimensions: d width, H heads, E width of a head, I inner width of the gated linear unit, P programs.
"""

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from tnl.ops.backends import interpreted

if TYPE_CHECKING:
    from tnl.ops.decode_step import DecodeStep

TURN = tl.constexpr(2 * math.pi)
FIELDS = tl.constexpr(7)  # of a layer in the table: qkvu, out, gate, up, down, state, theta
LINE = tl.constexpr(32)  # counters, 4 bytes each, that lie in lines of their own
UNIT = tl.constexpr(2.0**-32)  # of the sums in fixed point, which reach to 2^31
TILE_BYTES = 1 << 16  # weights that a program asks for at once: 132 of these cover the way to memory several times
WARPS = 16


@triton.jit
def _arrive(counter):
    """Tell that what this program has written is there."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _reached(counter, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return tl.atomic_add(counter, 0)
    else:
        load: tl.constexpr = "ld.acquire.gpu.global.s32 $0, [$1];"
        return tl.inline_asm_elementwise(load, "=r,l", [counter], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _wait(counter, target, INTERPRETED: tl.constexpr):
    """Until a counter has reached a target; counters run over, their differences do not."""
    while _reached(counter, INTERPRETED) - target < 0:
        pass


@triton.jit
def _pointer(TABLE, index, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(TABLE + index).to(tl.pointer_type(dtype), bitcast=False), 16)


@triton.jit
def _add(SUM, value):
    tl.atomic_add(SUM, (value / UNIT).to(tl.int64), sem="relaxed")


@triton.jit
def _sum(SUM):
    return tl.load(SUM, cache_modifier=".cg").to(tl.float32) * UNIT


@triton.jit
def _row(r, first, COLUMNS: tl.constexpr, STREAM: tl.constexpr):
    """Row of the projection of queries, keys, values and gates: so many columns of each of the four."""
    return (r // COLUMNS) * STREAM + first + r % COLUMNS


@triton.jit
def _project(QKVU, weight, x, rstd, rows, STREAM: tl.constexpr):
    y = rstd * tl.sum(weight.to(tl.float32) * x[None, :], 1)
    tl.store(QKVU + rows, tl.where(rows < 2 * STREAM, y / (1.0 + tl.exp(-y)), y))


@triton.jit
def _unit(gate, up, down, x, rstd):
    """What some units of the gated linear unit add to the residual stream."""
    g = tl.sum(gate.to(tl.float32) * x[None, :], 1)
    h = rstd * rstd * g * tl.sum(up.to(tl.float32) * x[None, :], 1)
    return tl.sum(down.to(tl.float32) * h[:, None], 0)


@triton.jit
def _attend(QKVU, STATE, state, theta, position, kept, head, columns, E: tl.constexpr, STREAM: tl.constexpr):
    """Some columns of a head's output and its gate; the state is written. With LRPE the sines' half lies behind."""
    inner = tl.arange(0, E)
    q = tl.load(QKVU + head * E + inner, cache_modifier=".cg")
    k = tl.load(QKVU + STREAM + head * E + inner, cache_modifier=".cg")
    v = tl.load(QKVU + 2 * STREAM + head * E + columns, cache_modifier=".cg")
    u = tl.load(QKVU + 3 * STREAM + head * E + columns, cache_modifier=".cg")
    o = tl.zeros_like(v)
    if theta != 0:
        angle = tl.load(theta.to(tl.pointer_type(tl.float32), bitcast=False) + head * E + inner).to(tl.float64)
        angle *= position.to(tl.float64)  # in float32 it would be far off at a position of a million
        angle -= tl.floor(angle / TURN) * TURN
        cosine, sine = tl.cos(angle.to(tl.float32)), tl.sin(angle.to(tl.float32))
        sines = tl.load(STATE + E * E) * kept + (k * sine)[:, None] * v[None, :]
        tl.store(STATE + E * E, sines)
        o += tl.sum(sines * (q * sine)[:, None], 0)
        q *= cosine
        k *= cosine
    state = state * kept + k[:, None] * v[None, :]
    tl.store(STATE, state)
    return o + tl.sum(state * q[:, None], 0), u


@triton.jit
def _step_kernel(
    TOKEN, POSITION, EMBEDDING, HEAD, LOGITS, TABLE, LOG_DECAY, STREAM, ATTENDED, SQUARES, QKVU, COUNTERS,
    scale, eps, layers, vocabulary,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, E: tl.constexpr, INNER: tl.constexpr, PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DECAY: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``ROWS`` of a projection and ``UNITS`` of the gated linear unit at a time; all else is explained above.

    STREAM, ATTENDED ``[2, d]`` and SQUARES ``[2]`` are sums in fixed point, of one layer and of the next in turn: the
    residual stream after a layer, the output projection before its norm's factor, squares of its input. Each is
    cleared a layer before it is added to, when all programs have read it.
    """
    dtype: tl.constexpr = HEAD.dtype.element_ty
    HE: tl.constexpr = HEADS * E
    COLUMNS: tl.constexpr = HE // PROGRAMS
    PER_HEAD: tl.constexpr = E // COLUMNS
    SHARE: tl.constexpr = (INNER + PROGRAMS - 1) // PROGRAMS
    program = tl.program_id(0)
    head = program // PER_HEAD
    columns = (program % PER_HEAD) * COLUMNS + tl.arange(0, COLUMNS)
    first = program * COLUMNS  # of the columns of all heads
    inner, row, one = tl.arange(0, WIDTH), tl.arange(0, ROWS), tl.arange(0, UNITS)
    # Counters go on from launch to launch; how many there were, each program notes for itself.
    LAUNCHES = COUNTERS + LINE + program
    launches = tl.load(LAUNCHES)
    tl.debug_barrier()
    tl.store(LAUNCHES, launches + 1)
    everyone, of_head = launches * (2 * layers) * PROGRAMS, launches * layers * PER_HEAD
    HEAD_COUNTER = COUNTERS + LINE + PROGRAMS + head * LINE

    W = _pointer(TABLE, 0, dtype)
    weight = tl.load(W + _row(row, first, COLUMNS, HE)[:, None] * WIDTH + inner[None, :])
    position = tl.load(POSITION)
    x = tl.load(EMBEDDING + tl.load(TOKEN) * WIDTH + inner).to(tl.float32) * scale
    for layer in range(layers):
        now, other = layer % 2, (layer + 1) % 2
        fields = TABLE + layer * FIELDS
        OUT = _pointer(fields, 1, dtype)
        GATE = _pointer(fields, 2, dtype)
        UP = _pointer(fields, 3, dtype)
        DOWN = _pointer(fields, 4, dtype)
        STATE = _pointer(fields, 5, tl.float32)
        theta = tl.load(fields + 6)
        STATE += head * E * E * tl.where(theta != 0, 2, 1) + tl.arange(0, E)[:, None] * E + columns[None, :]
        kept = 1.0
        if DECAY:
            kept = tl.exp(tl.load(LOG_DECAY + layer * HEADS + head))
        if program == PROGRAMS - 1:
            tl.store(ATTENDED + other * WIDTH + inner, tl.zeros([WIDTH], tl.int64))
            tl.store(STREAM + other * WIDTH + inner, tl.zeros([WIDTH], tl.int64))
            tl.store(SQUARES + other, 0)
        rstd = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
        for done in range(0, 4 * COLUMNS - ROWS, ROWS):
            after = tl.load(W + _row(done + ROWS + row, first, COLUMNS, HE)[:, None] * WIDTH + inner[None, :])
            _project(QKVU, weight, x, rstd, _row(done + row, first, COLUMNS, HE), HE)
            weight = after
        out = tl.load(OUT + (first + tl.arange(0, COLUMNS))[:, None] * WIDTH + inner[None, :])
        state = tl.load(STATE)
        at = (program * SHARE + one)[:, None] * WIDTH + inner[None, :]
        inside = ((one < SHARE) & (program * SHARE + one < INNER))[:, None]
        gate, up, down = tl.load(GATE + at, inside, 0.0), tl.load(UP + at, inside, 0.0), tl.load(DOWN + at, inside, 0.0)
        _project(QKVU, weight, x, rstd, _row(4 * COLUMNS - ROWS + row, first, COLUMNS, HE), HE)
        _arrive(HEAD_COUNTER)
        of_head += PER_HEAD
        _wait(HEAD_COUNTER, of_head, INTERPRETED)

        o, u = _attend(QKVU, STATE, state, theta, position, kept, head, columns, E, HE)
        _add(ATTENDED + now * WIDTH + inner, tl.sum(out.to(tl.float32) * (o * u)[:, None], 0))
        _add(SQUARES + now, tl.sum(o * o, 0))
        _arrive(COUNTERS)
        everyone += PROGRAMS
        _wait(COUNTERS, everyone, INTERPRETED)

        x += tl.rsqrt(_sum(SQUARES + now) / HE + eps) * _sum(ATTENDED + now * WIDTH + inner)
        rstd = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
        added = tl.where(program == 0, x, 0.0)
        for done in range(UNITS, SHARE, UNITS):
            at = (program * SHARE + done + one)[:, None] * WIDTH + inner[None, :]
            inside = ((done + one < SHARE) & (program * SHARE + done + one < INNER))[:, None]
            next_gate, next_up = tl.load(GATE + at, inside, 0.0), tl.load(UP + at, inside, 0.0)
            next_down = tl.load(DOWN + at, inside, 0.0)
            added += _unit(gate, up, down, x, rstd)
            gate, up, down = next_gate, next_up, next_down
        W = _pointer(TABLE, tl.minimum(layer + 1, layers - 1) * FIELDS, dtype)
        weight = tl.load(W + _row(row, first, COLUMNS, HE)[:, None] * WIDTH + inner[None, :])
        added += _unit(gate, up, down, x, rstd)
        _add(STREAM + other * WIDTH + inner, added)
        _arrive(COUNTERS)
        everyone += PROGRAMS
        _wait(COUNTERS, everyone, INTERPRETED)
        x = _sum(STREAM + other * WIDTH + inner)

    if program == PROGRAMS - 1:
        tl.store(ATTENDED + inner, tl.zeros([WIDTH], tl.int64))
        tl.store(SQUARES, 0)
        tl.store(POSITION, position + 1)
    x *= tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    begin = program * tl.cdiv(vocabulary, PROGRAMS)
    end = tl.minimum(begin + tl.cdiv(vocabulary, PROGRAMS), vocabulary)
    at = (begin + row).to(tl.int64)[:, None] * WIDTH + inner[None, :]
    weight = tl.load(HEAD + at, (begin + row < end)[:, None], 0.0)
    for start in range(begin, end, ROWS):
        at = (start + ROWS + row).to(tl.int64)[:, None] * WIDTH + inner[None, :]
        after = tl.load(HEAD + at, (start + ROWS + row < end)[:, None], 0.0)
        y = tl.sum(weight.to(tl.float32) * x[None, :], 1)
        tl.store(LOGITS + start + row, y.to(LOGITS.dtype.element_ty), start + row < end)
        weight = after


def launch(step: "DecodeStep", token: Tensor, position: Tensor, logits: Tensor) -> None:
    """:meth:`tnl.ops.decode_step.DecodeStep.__call__`."""
    row_bytes = step.width * step.head.element_size()
    columns = step.heads * step.head_dim // step.programs
    rows = min(4 * columns, max(4, TILE_BYTES // row_bytes))
    units = max(1, TILE_BYTES // 4 // row_bytes)
    # A launch of programs that wait for each other: all at once, or an error.
    options = {} if interpreted() else {"launch_cooperative_grid": True}
    _step_kernel[(step.programs,)](
        token, position, step.embedding, step.head, logits, step.table,
        step.squares if step.log_decay is None else step.log_decay,
        step.stream, step.attended, step.squares, step.qkvu, step.counters,
        step.embedding_scale, step.norm_eps, len(step.layers), step.head.shape[0],
        WIDTH=step.width, HEADS=step.heads, E=step.head_dim, INNER=step.inner, PROGRAMS=step.programs,
        ROWS=rows, UNITS=units, DECAY=step.log_decay is not None, INTERPRETED=interpreted(),
        num_warps=WARPS, num_stages=1, **options,
    )  # fmt: skip
