"""A whole step of decoding one row in one kernel, in Triton; :mod:`tnl.ops.decode_step` checks what comes here.

Programs stay on their processors for the whole step and wait for each other three times a layer, by counters in memory:
after queries, keys, values and gates (only the programs of a head for each other), after the output projection, after
the gated linear unit. Between telling that it is there and waiting for the others a program asks for the weights that
it needs next, so that memory is read meanwhile. Not before: telling waits for what was asked for. Two of the three are
sums over all programs, to which each adds its part.

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
FIELDS = tl.constexpr(7)  # of a layer in the table: qkvu, out, gate, up, down, state, theta; the head comes last
LINE = tl.constexpr(32)  # counters, 4 bytes each, that lie in lines of their own
TILE_BYTES = 1 << 16  # weights that a program asks for at once: 132 of these cover the way to memory several times
WARPS = 8


@triton.jit
def _arrive(counter):
    """Tell that what this program has written is there."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _wait(counter, target, INTERPRETED: tl.constexpr):
    """Until a counter has reached a target; counters run over, their differences do not."""
    if INTERPRETED:
        while tl.atomic_add(counter, 0) - target < 0:
            pass
    else:  # one thread asks, the others wait for it
        spin: tl.constexpr = """{
            .reg .pred again;
            .reg .u32 thread;
            .reg .s32 seen;
            mov.u32 thread, %tid.x;
            setp.ne.u32 again, thread, 0;
            @again bra done;
            ask:
            ld.acquire.gpu.global.s32 seen, [$1];
            sub.s32 seen, seen, $2;
            setp.lt.s32 again, seen, 0;
            @again bra ask;
            done:
            mov.u32 $0, 0;
        }"""
        tl.inline_asm_elementwise(spin, "=r,l,r", [counter, target], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()


@triton.jit
def _pointer(TABLE, index, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(TABLE + index).to(tl.pointer_type(dtype), bitcast=False), 16)


@triton.jit
def _row(r, first, COLUMNS: tl.constexpr, STREAM: tl.constexpr):
    """Row of the projection of queries, keys, values and gates: so many columns of each of the four."""
    return (r // COLUMNS) * STREAM + first + r % COLUMNS


@triton.jit
def _project(QKVU, weight, x, rstd, rows, STREAM: tl.constexpr):
    y = rstd * tl.sum(weight.to(tl.float32) * x[None, :], 1)
    tl.store(QKVU + rows, tl.where(rows < 2 * STREAM, y / (1.0 + tl.exp(-y)), y))


@triton.jit
def _pair(a, b, c, d):
    return a + c, b + d


@triton.jit
def _load_units(GATE, UP, DOWN, start, one, end, inner, WIDTH: tl.constexpr):
    at = (start + one)[:, None] * WIDTH + inner[None, :]
    inside = (start + one < end)[:, None]
    return tl.load(GATE + at, inside, 0.0), tl.load(UP + at, inside, 0.0), tl.load(DOWN + at, inside, 0.0)


@triton.jit
def _units(gate, up, down, x, square):
    """What units of the gated linear unit add to the residual stream, one a row; ``square`` of the norm's factor."""
    g, u = tl.reduce((gate.to(tl.float32) * x[None, :], up.to(tl.float32) * x[None, :]), 1, _pair)
    return down.to(tl.float32) * (square * g * u)[:, None]


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
    TOKEN, POSITION, EMBEDDING, LOGITS, TABLE, LOG_DECAY, STREAM, ATTENDED, SQUARES, QKVU, COUNTERS,
    scale, eps, layers, vocabulary,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, E: tl.constexpr, INNER: tl.constexpr, PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DECAY: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``ROWS`` of a projection and ``UNITS`` of the gated linear unit at a time; all else is explained above.

    STREAM, ATTENDED ``[2, d]`` and SQUARES ``[2]`` are sums, of one layer and of the next in turn: the residual stream
    after a layer, the output projection before its norm's factor, squares of its input. Each is cleared a layer before
    it is added to, when all programs have read it.
    """
    dtype: tl.constexpr = EMBEDDING.dtype.element_ty
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
    begin = program * SHARE
    end = tl.minimum(begin + SHARE, INNER)
    words = program * tl.cdiv(vocabulary, PROGRAMS)
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
        AFTER = _pointer(fields, FIELDS, dtype)
        STATE += head * E * E * tl.where(theta != 0, 2, 1) + tl.arange(0, E)[:, None] * E + columns[None, :]
        kept = 1.0
        if DECAY:
            kept = tl.exp(tl.load(LOG_DECAY + layer * HEADS + head))
        if program == PROGRAMS - 1:
            tl.store(ATTENDED + other * WIDTH + inner, tl.zeros([WIDTH], tl.float32))
            tl.store(STREAM + other * WIDTH + inner, tl.zeros([WIDTH], tl.float32))
            tl.store(SQUARES + other, 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
        for done in range(0, 4 * COLUMNS - ROWS, ROWS):
            after = tl.load(W + _row(done + ROWS + row, first, COLUMNS, HE)[:, None] * WIDTH + inner[None, :])
            _project(QKVU, weight, x, rstd, _row(done + row, first, COLUMNS, HE), HE)
            weight = after
        _project(QKVU, weight, x, rstd, _row(4 * COLUMNS - ROWS + row, first, COLUMNS, HE), HE)
        _arrive(HEAD_COUNTER)
        out = tl.load(OUT + (first + tl.arange(0, COLUMNS))[:, None] * WIDTH + inner[None, :])
        state = tl.load(STATE)
        gate, up, down = _load_units(GATE, UP, DOWN, begin, one, end, inner, WIDTH)
        of_head += PER_HEAD
        _wait(HEAD_COUNTER, of_head, INTERPRETED)

        o, u = _attend(QKVU, STATE, state, theta, position, kept, head, columns, E, HE)
        tl.atomic_add(ATTENDED + now * WIDTH + inner, tl.sum(out.to(tl.float32) * (o * u)[:, None], 0), sem="relaxed")
        tl.atomic_add(SQUARES + now, tl.sum(o * o, 0), sem="relaxed")
        _arrive(COUNTERS)
        gate_1, up_1, down_1 = _load_units(GATE, UP, DOWN, begin + UNITS, one, end, inner, WIDTH)
        everyone += PROGRAMS
        _wait(COUNTERS, everyone, INTERPRETED)

        squares = tl.load(SQUARES + now, cache_modifier=".cg")
        x += tl.rsqrt(squares / HE + eps) * tl.load(ATTENDED + now * WIDTH + inner, cache_modifier=".cg")
        square = 1.0 / (tl.sum(x * x, 0) / WIDTH + eps)
        added = tl.zeros([UNITS, WIDTH], tl.float32)
        for start in range(begin, end, UNITS):
            gate_2, up_2, down_2 = _load_units(GATE, UP, DOWN, start + 2 * UNITS, one, end, inner, WIDTH)
            added += _units(gate, up, down, x, square)
            gate, up, down = gate_1, up_1, down_1
            gate_1, up_1, down_1 = gate_2, up_2, down_2
        total = tl.sum(added, 0) + tl.where(program == 0, x, 0.0)
        tl.atomic_add(STREAM + other * WIDTH + inner, total, sem="relaxed")
        _arrive(COUNTERS)
        W = AFTER
        rows = tl.where(layer + 1 < layers, _row(row, first, COLUMNS, HE), tl.minimum(words + row, vocabulary - 1))
        weight = tl.load(W + rows.to(tl.int64)[:, None] * WIDTH + inner[None, :])
        everyone += PROGRAMS
        _wait(COUNTERS, everyone, INTERPRETED)
        x = tl.load(STREAM + other * WIDTH + inner, cache_modifier=".cg")

    if program == PROGRAMS - 1:
        tl.store(ATTENDED + inner, tl.zeros([WIDTH], tl.float32))
        tl.store(SQUARES, 0.0)
        tl.store(POSITION, position + 1)
    x *= tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    last = tl.minimum(words + tl.cdiv(vocabulary, PROGRAMS), vocabulary)
    for start in range(words, last, ROWS):
        at = (start + ROWS + row).to(tl.int64)[:, None] * WIDTH + inner[None, :]
        after = tl.load(W + at, (start + ROWS + row < last)[:, None], 0.0)
        y = tl.sum(weight.to(tl.float32) * x[None, :], 1)
        tl.store(LOGITS + start + row, y.to(LOGITS.dtype.element_ty), start + row < last)
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
        token, position, step.embedding, logits, step.table,
        step.squares if step.log_decay is None else step.log_decay,
        step.stream, step.attended, step.squares, step.qkvu, step.counters,
        step.embedding_scale, step.norm_eps, len(step.layers), step.head.shape[0],
        WIDTH=step.width, HEADS=step.heads, E=step.head_dim, INNER=step.inner, PROGRAMS=step.programs,
        ROWS=rows, UNITS=units, DECAY=step.log_decay is not None, INTERPRETED=interpreted(),
        num_warps=WARPS, num_stages=1, **options,
    )  # fmt: skip
