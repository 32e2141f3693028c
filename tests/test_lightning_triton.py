"""The Triton kernels of lightning attention: under the interpreter (tier T1) and on a GPU (tier T3, marked gpu)."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.marks import interpreted, needs_gpu
from tests.numerics import (
    Case,
    assert_as_good_as_eager,
    cases,
    check,
    eager,
    errors_along,
    lying_apart,
    prefill_and_decode,
    relative_error,
    results,
)
from tnl.ops import lightning_attention, lightning_attention_step, lightning_torch, lightning_triton, tiling_triton

DECAYS = ["none", "head", "token"]

CASES = [
    Case(T=1, D=8, E=8),
    Case(T=63, Hq=4, H=2, D=20, E=36),
    Case(T=65, D=32, E=16),
    Case(B=1, T=150, Hq=2, H=1, D=24, E=40, bounds=(0, 1, 1, 64, 128, 150)),
]


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts every sequence of more than 64 tokens, as a launch of few heads would: 48 tokens a segment, 16 to lead."""
    monkeypatch.setattr(lightning_triton, "_plans", {})  # those of calls that were not cut would serve too
    monkeypatch.setattr(tiling_triton, "cut_sequence", lambda tokens, *_: (48, 16) if tokens > 64 else (tokens, tokens))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case: Case, decay: str, dtype: torch.dtype, nan_filled_memory: None) -> None:
    check(Case(**{**vars(case), "decay": decay}), "triton", dtype)


@interpreted
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_segments(case: Case, decay: str, short_segments: None, nan_filled_memory: None) -> None:
    check(Case(**{**vars(case), "decay": decay}), "triton", torch.float32)


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
def test_segments_that_fade(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment's sum leaves out what fades to nothing before the segment ends, and nothing else."""
    monkeypatch.setattr(lightning_triton, "_plans", {})
    monkeypatch.setattr(tiling_triton, "cut_sequence", lambda *_: (96, 96))
    case = Case(B=1, T=300, Hq=4, H=4, D=16, E=16)
    q, k, v = (case.inputs(torch.float32)[name].requires_grad_() for name in ("q", "k", "v"))
    log_decay = torch.tensor([-50.0, -2.0, -1.3, -1e-12])
    o, _ = lightning_attention(q, k, v, log_decay, backend="triton")
    expected, _ = lightning_torch.recurrence(q.double(), k.double(), v.double(), log_decay.double())
    assert relative_error(o, expected) < 1e-6
    if reverse:
        do = torch.randn_like(o)
        for gradient, true in zip(
            torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(expected, (q, k, v), do.double()), strict=True
        ):
            assert relative_error(gradient, true) < 1e-6


@interpreted
def test_strides_and_addresses() -> None:
    """Rows that lie apart, and rows that do not begin at a multiple of 16 bytes."""
    case = Case(T=20, D=16, E=16)
    x = case.inputs(torch.float32)
    wide = {name: torch.randn(2, 20, 2, 37) for name in ("q", "k", "v")}
    for name, base in wide.items():
        value = x[name]
        base[..., 5:21] = value
    q, k, v = (base[..., 5:21] for base in wide.values())
    o, _ = lightning_attention(q, k, v, x["log_decay"], backend="triton")
    expected, _ = lightning_attention(x["q"], x["k"], x["v"], x["log_decay"], backend="triton")
    torch.testing.assert_close(o, expected)


def moved(x: torch.Tensor) -> torch.Tensor:
    """``x`` at an address that is no multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def both_passes(x: dict[str, Any], need_decay: bool = False, need_dq: bool = True) -> list[torch.Tensor | None]:
    """All that the two passes compute of arguments and gradients as :meth:`Case.inputs` makes them."""
    shared = (x["q"], x["k"], x["v"], x["log_decay"], x["initial_state"], x["cu_seqlens"], 0.7)
    gradients = lightning_triton.backward(x["do"], x["dfinal_state"], *shared, need_decay, need_dq=need_dq)
    return [*lightning_triton.forward(*shared, return_final_state=True), *gradients]


def checker_of_plans(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Checks that calls compute with the plans of those before them what they do with none, bit by bit."""
    kept: dict[Any, Any] = {}

    def check_plans(new: int, x: dict[str, Any], **options: bool) -> None:
        """``new``: plans that these two calls add to those of the calls before them."""
        before = len(kept)
        monkeypatch.setattr(lightning_triton, "_plans", {})
        expected = both_passes(x, **options)
        monkeypatch.setattr(lightning_triton, "_plans", kept)
        for _ in range(2 if x["q"].is_cuda else 1):  # on a GPU, what a plan keeps of addresses serves the second time
            for actual, other in zip(both_passes(x, **options), expected, strict=True):
                assert torch.equal(actual, other) if actual is not None and other is not None else actual is other
        assert len(kept) == before + new

    return check_plans


def check_calls_that_look_alike(
    D: int, E: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_plans = checker_of_plans(monkeypatch)
    case = Case(B=1, T=9, Hq=2, H=1, D=D, E=E)
    x = case.inputs(dtype, device)
    do, dfinal_state = x["do"], x["dfinal_state"]
    check_plans(2, x)
    check_plans(0, case.inputs(dtype, device, seed=1))  # other values at other addresses
    check_plans(0, x | {"dfinal_state": dfinal_state.mT.contiguous().mT})  # is copied
    check_plans(1, x | {"dfinal_state": None})
    check_plans(2, x | {"initial_state": None})
    check_plans(2, x | {"initial_state": moved(x["initial_state"])})
    for name in ("q", "k"):  # each has a copy where the other one has none
        check_plans(2, x | {name: moved(x[name])})
    check_plans(2, x | {"q": heads_first(x["q"])})
    for gradient in (moved(do), heads_first(do), do[:, :1].expand(do.shape)):
        check_plans(1, x | {"do": gradient})
    check_plans(1, x, need_dq=False)
    check_plans(1, x, need_decay=True)
    check_plans(2, x | {"log_decay": None})
    check_plans(2, x | {"log_decay": -torch.rand(case.B, case.T, case.Hq, device=device)})
    for new, bounds in ((2, (0, 5, 9)), (0, (0, 1, 9))):
        check_plans(new, Case(**{**vars(case), "bounds": bounds}).inputs(dtype, device))


@interpreted
def test_calls_that_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    check_calls_that_look_alike(16, 24, torch.float16, "cpu", monkeypatch)


def tensors() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is torch.Tensor]


@interpreted
def test_plans_hold_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither arguments, nor their copies, nor what was computed."""
    monkeypatch.setattr(lightning_triton, "_plans", {})
    before = tensors()
    x = Case(B=1, T=21, bounds=(0, 5, 21)).inputs(torch.float16)
    both_passes(x | {"q": moved(x["q"])}, need_decay=True)
    del x
    assert len(lightning_triton._plans) == 2
    known = {id(x) for x in before}
    assert not [x for x in tensors() if id(x) not in known]


@interpreted
def test_state_layout(short_segments: None, nan_filled_memory: None) -> None:
    """Transposed states in, transposed states and gradients out, bitwise the same numbers."""
    x = Case(B=1, T=70, Hq=1, H=1, D=8, E=20, bounds=(0, 0, 70)).inputs(torch.float32)
    results = []
    for layout in ("DE", "ED"):
        q, k, v = (x[name].clone().requires_grad_() for name in ("q", "k", "v"))
        state = x["initial_state"] if layout == "DE" else x["initial_state"].mT.contiguous()
        state.requires_grad_()
        o, final = lightning_attention(
            q, k, v, x["log_decay"], initial_state=state, return_final_state=True, cu_seqlens=x["cu_seqlens"],
            state_layout=layout, backend="triton",
        )  # fmt: skip
        assert final is not None
        dfinal = x["dfinal_state"] if layout == "DE" else x["dfinal_state"].mT.contiguous()
        *gradients, dstate = torch.autograd.grad((o, final), [q, k, v, state], (x["do"], dfinal))
        states = [final, dstate] if layout == "DE" else [final.mT, dstate.mT]
        results.append([o, *gradients, *states])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


few = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@interpreted
@few
@given(case=cases(), heads_first=st.booleans(), gap=st.integers(0, 5))
def test_any_case(case: Case, heads_first: bool, gap: int, nan_filled_memory: None) -> None:
    """The rule of tests/numerics.py for any sizes and packing, and for any strides the same numbers."""
    inputs = case.inputs(torch.float32)
    actual = results(case, "triton", inputs)
    reference = results(case, "reference", inputs)
    assert_as_good_as_eager(actual, results(case, "eager", inputs), reference, torch.float32, case)
    q, k, v = (lying_apart(inputs[name], gap, heads_first) for name in ("q", "k", "v"))
    options = {name: inputs[name] for name in ("log_decay", "initial_state", "cu_seqlens")}
    o, _ = lightning_attention(q, k, v, **options, scale=case.scale, backend="triton")
    assert torch.equal(o, actual["o"])


@interpreted
@few
@given(case=cases(packing=False), data=st.data(), layout=st.sampled_from(["DE", "ED"]))
def test_any_decode(case: Case, data: st.DataObject, layout: str, nan_filled_memory: None) -> None:
    """Prefill + a step of several tokens = the whole."""
    inputs = case.inputs(torch.float32)
    q, k, v, decay, initial = (inputs[name] for name in ("q", "k", "v", "log_decay", "initial_state"))
    actual, other, reference = (
        dict(zip(("o", "final_state"), pair, strict=True))
        for pair in (
            prefill_and_decode(case, inputs, data.draw(st.integers(1, case.T - 1)), layout, "triton"),
            eager(q, k, v, decay, case.scale, initial, None),
            lightning_torch.recurrence(q, k, v, decay, scale=case.scale, initial_state=initial),
        )
    )
    assert_as_good_as_eager(actual, other, reference, torch.float32)


@interpreted
def test_float16_state_beyond_its_range() -> None:
    """A state larger than float16 can hold is read without overflow."""
    q, k, v = (torch.ones(1, 80, 1, 16, dtype=torch.float16) for _ in range(3))
    q = q / 1024
    initial = torch.full((1, 1, 16, 16), 1e6)
    o, _ = lightning_attention(q, k, v, None, initial_state=initial, backend="triton")
    reference, _ = lightning_torch.recurrence(q, k, v, None, initial_state=initial)
    assert relative_error(o, reference) < 2e-3


@interpreted
def test_long_range() -> None:
    """The error does not grow with the number of tokens, with fast decay nor with next to none."""
    errors = errors_along(1536, 16, torch.float16, "triton", slopes=(0.9, 1e-3, 1e-8))
    assert (errors < torch.finfo(torch.float16).eps).all()
    assert (errors < 1.5 * errors[:, :1]).all()


@interpreted
def test_offsets_beyond_32_bits() -> None:
    """Tokens whose addresses lie beyond 2^31 elements, in rows of which only the pages at the end are ever touched."""
    heads, width, used = 2, 64, 40
    tokens = 2**31 // (heads * width) + 1000
    row = torch.empty(1, tokens, heads, width, dtype=torch.float16)
    decay = torch.empty(1, tokens, heads)
    row[:, -used:] = torch.randn(1, used, heads, width)
    decay[:, -used:] = -torch.rand(used, heads)
    end = (row[:, -used:].clone(), decay[:, -used:].clone())
    outputs = []
    for x, g, bounds in ((row, decay, [tokens - used, tokens]), (*end, [0, used])):
        cu_seqlens = torch.tensor(bounds)
        o, state = lightning_triton.forward(x, x, x, g, None, cu_seqlens, 1.0, True)
        dq, dk, dv, *_ = lightning_triton.backward(x, None, x, x, x, g, None, cu_seqlens, 1.0, False)
        outputs.append([*(y[:, -used:] for y in (o, dq, dk, dv)), state])
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)


@interpreted
def test_pool_beyond_32_bits() -> None:
    """A step in a pool of states that lie far apart."""
    apart, width = 2**30, 16
    pool = torch.empty(2 * apart + width * width).as_strided((3, 1, width, width), (apart, width * width, width, 1))
    state = torch.randn(1, 1, width, width)
    pool[2:] = state
    q = torch.randn(1, 1, width)
    o = lightning_attention_step(q, q, q, None, pool, state_indices=torch.tensor([2]), backend="triton")
    assert torch.equal(o, lightning_attention_step(q, q, q, None, state, backend="triton"))
    assert torch.equal(pool[2:], state)


def test_cut_sequence() -> None:
    """As many as make one program a multiprocessor, behind a short first one; or equal ones where they are long."""
    for tokens, walks in ((8192, 256), (8192, 100), (200, 1)):
        assert tiling_triton.cut_sequence(tokens, walks, 132, fades=True) == (tokens, tokens)
    assert tiling_triton.cut_sequence(1 << 20, 16, 132, fades=True) == (65536, 65536)
    for tokens in (512, 1000, 8192, 131072, 1 << 20):
        for walks in (1, 7, 16, 32, 66):
            segment, lead = tiling_triton.cut_sequence(tokens, walks, 132, fades=False)
            assert segment % 64 == 0
            assert lead in range(64, segment // 2 + 1, 64)
            assert -(-(tokens - lead) // segment) * walks <= 132


def test_tiles_fit_the_chip() -> None:
    """The state of a program fits its registers (at most half of 255 a thread), tiles are powers of two."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for width in (16, 64, 80, 96, 128, 192, 256):
            for columns in (16, 64, 128, 256):
                tiles = tiling_triton.choose_tiles(width, columns, dtype, True, per_token=True, exact=False)
                padded = max(16, 1 << (width - 1).bit_length())
                assert padded * tiles.columns <= 128 * 32 * tiles.warps
                assert tiles.tokens & (tiles.tokens - 1) == 0
                assert tiles.columns & (tiles.columns - 1) == 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 913])
def test_gpu_kernels(T: int, decay: str, dtype: torch.dtype, nan_filled_memory: None) -> None:
    check(Case(T=T, Hq=4, H=4, D=128, E=128, decay=decay), "triton", dtype, "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(T=8192, Hq=4, H=4, D=128, E=128),
        Case(B=16, T=300, Hq=8, H=8, D=64, E=64),
        Case(T=500, Hq=4, H=2, D=96, E=96),
        Case(T=500, Hq=4, H=1, D=80, E=192),
        Case(T=500, D=192, E=192, decay="token"),
        Case(T=500, D=256, E=128),
        Case(T=500, D=256, E=256),
        Case(T=300, D=5, E=7),
        Case(B=1, T=3000, Hq=2, H=1, D=128, E=128, bounds=(0, 1, 1, 64, 700, 2990, 3000)),
        Case(B=1, T=3000, Hq=2, H=2, D=128, E=64, bounds=(0, 1, 1, 64, 700, 2990, 3000), decay="token"),
    ],
    ids=str,
)
def test_gpu_shapes(case: Case, dtype: torch.dtype, nan_filled_memory: None) -> None:
    check_by_chunks(case, dtype) if case.T > 2000 else check(case, "triton", dtype, "cuda")


def check_by_chunks(case: Case, dtype: torch.dtype) -> None:
    """As :func:`check`, with the chunked float64 form as the reference of long sequences (tested against the
    recurrence in float64 in test_lightning_torch.py).
    """
    inputs = case.inputs(dtype, "cuda")
    wide = {name: x if x is None or not x.is_floating_point() else x.double() for name, x in inputs.items()}
    assert_as_good_as_eager(
        results(case, "triton", inputs), results(case, "eager", inputs), results(case, "torch", wide), dtype
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("D", "E"), [(16, 24), (128, 128)])
def test_gpu_calls_that_look_alike(D: int, E: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_calls_that_look_alike(D, E, torch.bfloat16, "cuda", monkeypatch)


@pytest.mark.gpu
@needs_gpu
def test_gpu_thread_without_a_context() -> None:
    """A thread whose memory all comes from PyTorch's cache has made no call that gives it a context."""
    q, k, v = (torch.randn(1, 128, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    decay = -torch.rand(4, device="cuda")
    expected = lightning_attention(q, k, v, decay)[0]
    torch.empty_like(expected)  # is left in the cache
    x, y, z = q.clone(), k.clone(), v.clone()  # at other addresses, which have to be described
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(lightning_attention(x, y, z, decay)[0]))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.gpu
@needs_gpu
def test_gpu_addresses_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a plan keeps, one behind the other in the same memory; and no memory is held."""
    check_plans = checker_of_plans(monkeypatch)
    monkeypatch.setattr(lightning_triton, "KEPT_DESCRIPTORS", 16)
    case = Case(T=100, D=64, E=64)
    check_plans(2, case.inputs(torch.bfloat16, "cuda"))
    before = torch.cuda.memory_allocated()
    held = []
    for seed in range(1, 8):
        held.append(torch.empty(seed * 1024, device="cuda"))
        check_plans(0, case.inputs(torch.bfloat16, "cuda", seed))
    held.clear()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@needs_gpu
def test_gpu_determinism() -> None:
    """Bitwise equal over two runs, with segments handed over between programs."""
    case = Case(B=1, T=5000, Hq=3, H=3, D=128, E=128, decay="token")
    inputs = case.inputs(torch.bfloat16, "cuda")
    first, second = (results(case, "triton", inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
@needs_gpu
def test_gpu_offsets_beyond_32_bits() -> None:
    """B*T*H*D beyond 2^31 elements: the last head of the last row is that of the same row alone."""
    B, T, H, D = 2, 131072, 72, 128
    assert B * T * H * D > 2**31
    q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    decay = torch.full((H,), -0.05, device="cuda")
    o, _ = lightning_attention(q, k, v, decay)
    tail = slice(T - 2048, T)
    q, k, v = (x[-1:, tail, -1:].double() for x in (q, k, v))
    expected, _ = lightning_torch.forward(q, k, v, decay[-1:].double(), None, None, 1.0)
    assert relative_error(o[-1:, -64:, -1:], expected[:, -64:]) < 5e-3


@pytest.mark.gpu
@needs_gpu
def test_gpu_transformations() -> None:
    """Autocast, compilation by Inductor, checkpointing and vmap over the kernels."""
    x = Case(T=100, D=32, E=32).inputs(torch.float32, "cuda")
    q, k, v, decay = (x[name] for name in ("q", "k", "v", "log_decay"))

    def attention(q: torch.Tensor) -> torch.Tensor:
        return lightning_attention(q, k, v, decay)[0].sin()

    expected = attention(q)
    torch.testing.assert_close(torch.compile(attention, fullgraph=True)(q), expected)
    many = torch.func.vmap(attention)(torch.stack([q, 2 * q]))
    torch.testing.assert_close(many[1], attention(2 * q), rtol=1e-4, atol=1e-4)
    q.requires_grad_()
    gradient = torch.autograd.grad(torch.utils.checkpoint.checkpoint(attention, q, use_reentrant=False).sum(), q)
    torch.testing.assert_close(gradient, torch.autograd.grad(attention(q).sum(), q))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        actual, _ = lightning_attention(q, k, v, decay)
    assert torch.equal(actual, lightning_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), decay)[0])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_a_million_tokens(dtype: torch.dtype) -> None:
    """The error is flat in T, for every slope."""
    errors = errors_along(1 << 20, 32, dtype, "triton", "cuda")
    assert (errors < torch.finfo(dtype).eps).all()
    assert (errors < 1.5 * errors[:, :1]).all()


@pytest.mark.gpu
@needs_gpu
def test_gpu_cuda_graph() -> None:
    q, k, v = (torch.randn(1, 300, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    decay = torch.full((4,), -0.1, device="cuda")
    expected, _ = lightning_attention(q, k, v, decay)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = lightning_attention(q, k, v, decay)
    o.zero_()
    graph.replay()
    assert torch.equal(o, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_gpu_of_another_device() -> None:
    """Tensors decide where a kernel runs, not the current device."""
    x = Case(T=100).inputs(torch.float32, "cuda:1")
    arguments = (x["q"], x["k"], x["v"], x["log_decay"])
    o, _ = lightning_attention(*arguments)
    expected, _ = lightning_attention(*arguments, backend="torch")
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)
