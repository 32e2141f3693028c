"""Segments of a row whose states are summed up beforehand: under the interpreter (tier T1) and on a GPU (T3)."""

from typing import Any

import pytest
import torch

from tests.marks import interpreted, needs_gpu
from tests.numerics import Case, assert_as_good_as_eager, check, relative_error
from tnl.ops import lightning_attention, lightning_torch, lightning_triton, segments_triton, tiling_triton


@pytest.fixture
def cut_in_three(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Cuts rows of 96 tokens; the list counts how often, backward passes too."""
    cuts: list[int] = []

    def choose(tokens: int, *_: object) -> int:
        cuts.append(tokens)
        return 3

    monkeypatch.setattr(segments_triton, "LONG_ROW", 96)
    monkeypatch.setattr(segments_triton, "LONG_ROW_BACKWARD", 96)
    monkeypatch.setattr(segments_triton, "choose_segments", choose)
    return cuts


@pytest.mark.parametrize(
    ("tokens", "walks", "segments"),
    [
        (131072, 16, 8),
        (131072, 8, 16),
        (262144, 4, 32),
        (1048576, 8, 16),
        (16384, 16, 2),
        (131072, 128, 1),
        (16384, 4, 2),
        (131072, 48, 8),
        (131072, 24, 16),
        (262144, 12, 32),
        (1048576, 24, 16),
        (131072, 96, 4),
        (131072, 384, 1),
    ],
)
def test_segments_fill_the_chip(tokens: int, walks: int, segments: int) -> None:
    """132 multiprocessors: 128 programs, or as many as segments of 8192 tokens make; 384 of the backward pass."""
    assert tiling_triton.choose_segments(tokens, walks, 132) == segments


@pytest.mark.parametrize(
    ("heads", "dtype", "columns", "walks"),
    [(16, torch.bfloat16, 128, 48), (16, torch.bfloat16, None, 96), (4, torch.float32, None, 48)],
    ids=str,
)
def test_walks_of_the_backward_pass(
    heads: int, dtype: torch.dtype, columns: int | None, walks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three for each 128 columns of a head, six of the 64 and twelve of the 32 that Triton's tiles have."""
    kernels = lightning_triton.IN_TRITON._replace(tiles=tiling_triton.Tiles(64, columns, 8, 2) if columns else None)
    monkeypatch.setattr(lightning_triton, "choose_kernels", lambda *_: (kernels,))
    monkeypatch.setattr(segments_triton, "choose_segments", lambda tokens, walks, processors: walks)
    monkeypatch.setattr(segments_triton, "product_precision", lambda dtype: "tf32")
    assert (
        segments_triton.segments_of(torch.empty(1, 65536, heads, 128, dtype=dtype, device="meta"), 128, True) == walks
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case(T=96), Case(T=96, Hq=2, H=1, D=20, E=36), Case(B=1, T=99, D=16, E=48)], ids=str)
def test_against_the_definition(
    case: Case, dtype: torch.dtype, cut_in_three: list[int], nan_filled_memory: None
) -> None:
    inputs, wide = case.inputs(dtype), case.inputs(dtype)
    wide = {name: x if x is None or not x.is_floating_point() else x.double() for name, x in wide.items()}
    reference, actual = without_decay(wide, "torch"), without_decay(inputs, "triton")
    assert len(cut_in_three) == 2, "a pass was not cut"
    assert_as_good_as_eager(actual, without_decay(inputs, "torch"), reference, dtype)


def without_decay(inputs: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """Outputs and all gradients but the decay's."""
    names = ("q", "k", "v", "initial_state")
    leaves = [inputs[name].clone().requires_grad_() for name in names]
    q, k, v, state = leaves
    o, final = lightning_attention(
        q, k, v, inputs["log_decay"], scale=0.7, initial_state=state, return_final_state=True, backend=backend
    )
    assert final is not None
    gradients = torch.autograd.grad((o, final), leaves, (inputs["do"], inputs["dfinal_state"]))
    return {"o": o, "final_state": final, **{"d" + name: x for name, x in zip(names, gradients, strict=True)}}


@interpreted
def test_state_layout(cut_in_three: list[int]) -> None:
    inputs = Case(B=1, T=96, D=16, E=48).inputs(torch.float32)
    q, k, v, log_decay, state = (inputs[name] for name in ("q", "k", "v", "log_decay", "initial_state"))
    state.requires_grad_()
    results = []
    for layout in ("DE", "ED"):
        begun = state if layout == "DE" else state.mT.contiguous()
        o, final = lightning_attention(
            q, k, v, log_decay, initial_state=begun, return_final_state=True, state_layout=layout, backend="triton"
        )
        assert final is not None
        (gradient,) = torch.autograd.grad(final.square().sum() + o.sum(), state)
        results.append((o, final if layout == "DE" else final.mT, gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert len(cut_in_three) == 4


@interpreted
@pytest.mark.parametrize("rates", [(8.0, 1e-6), (0.05, 40.0)])
def test_some_heads_forget(rates: tuple[float, float], cut_in_three: list[int], nan_filled_memory: None) -> None:
    """Of a segment's 32 tokens a decay of 8 leaves 13 to be summed up, one of 40 leaves 3. No states are given."""
    inputs = Case(B=1, T=96, E=32).inputs(torch.float32)
    log_decay, gradients = -torch.tensor(rates), []
    for backend in ("triton", "torch"):
        wide = backend == "torch"
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in (inputs[n] for n in ("q", "k", "v"))]
        decay = log_decay.double() if wide else log_decay
        o, _ = lightning_attention(leaves[0], leaves[1], leaves[2], decay, scale=0.7, backend=backend)
        gradients.append(torch.autograd.grad(o, leaves, inputs["do"].to(o.dtype)))
    for one, true in zip(*gradients, strict=True):
        assert relative_error(one, true) < 1e-6
    assert len(cut_in_three) == 2


@interpreted
def test_what_is_left_as_it_is(cut_in_three: list[int]) -> None:
    """A decay a token, none, packed rows and the gradient of the decay take the other way, with the same results."""
    others = (Case(T=96), Case(T=96, decay="token"), Case(T=96, decay="none"), Case(B=1, T=96, bounds=(0, 40, 96)))
    for case in others:  # all of them with the gradient of what decay they have
        check(case, "triton", torch.float32)
    inputs = Case(T=96).inputs(torch.float32)
    # rows that do not follow each other, which could not be cut without a copy
    q, k, v = (torch.nn.functional.pad(inputs[name], (0, 0, 0, 0, 0, 4))[:, :96] for name in ("q", "k", "v"))
    o, _ = lightning_attention(q, k, v, inputs["log_decay"], backend="triton")
    expected, _ = lightning_torch.recurrence(q.double(), k.double(), v.double(), inputs["log_decay"].double())
    assert relative_error(o, expected) < 1e-6
    assert not cut_in_three
    do = torch.nn.functional.pad(inputs["do"], (0, 0, 0, 0, 0, 4))[:, :96]
    found = segments_triton.backward(
        do, None, inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"], None, None, 1.0, False
    )
    assert not cut_in_three
    wide = [x.double() for x in (inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"])]
    expected_gradients = lightning_torch.backward(
        do.double(), None, wide[0], wide[1], wide[2], wide[3], None, None, 1.0, False
    )
    for one, true in zip(found[:3], expected_gradients[:3], strict=True):
        assert one is not None
        assert true is not None
        assert relative_error(one, true) < 1e-6


@interpreted
def test_neither_given_nor_asked(cut_in_three: list[int]) -> None:
    """Without an initial state there is no gradient of one; two runs agree to the last bit."""
    inputs = Case(T=96).inputs(torch.float32)
    arguments = (*(inputs[name] for name in ("do", "dfinal_state", "q", "k", "v", "log_decay")), None, None, 0.7, False)
    one, other = (segments_triton.backward(*arguments) for _ in range(2))
    assert one[3] is None
    assert one[4] is None
    assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    assert len(cut_in_three) == 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_few_heads(dtype: torch.dtype) -> None:
    """Long enough to be cut on any GPU, with states both ways; the float64 form in chunks is the reference."""
    case = Case(B=1, T=65536, Hq=4, H=4, D=64, E=64)
    inputs = case.inputs(dtype, "cuda")
    inputs["log_decay"] = -torch.tensor([1.0, 1e-2, 1e-4, 1e-7], device="cuda")
    tokens = tuple(inputs[name] for name in ("q", "k", "v", "do"))
    for backward in (False, True):
        assert segments_triton._segments(tokens, inputs["log_decay"], None, backward) > 1
    wide = {name: x if x is None else x.double() for name, x in inputs.items()}
    expected, found, again = (without_decay(*x) for x in ((wide, "torch"), (inputs, "triton"), (inputs, "triton")))
    bound = 5e-3 if dtype == torch.bfloat16 else 1e-5
    for name, x in found.items():
        assert relative_error(x, expected[name]) < bound, name
        assert torch.equal(x, again[name]), f"{name}: two runs differ"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(131072, 16, 16), (131072, 8, 2), (262144, 4, 4)])
def test_gpu_backward_is_as_good_as_the_walk_that_hands_over(tokens: int, heads: int, kv_heads: int) -> None:
    """At the sizes that it is for; the gradients of two runs are equal, and little memory is taken beside them."""
    D = 128
    q, do = (torch.randn(1, tokens, heads, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, tokens, kv_heads, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    log_decay = -torch.exp2(-8 * torch.arange(1, heads + 1, device="cuda") / heads)
    arguments = (do, None, q, k, v, log_decay, None, None, 1.0, False)
    assert segments_triton._segments((q, k, v, do), log_decay, None, True) > 1
    walked = lightning_triton.backward(*arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = segments_triton.backward(*arguments)
    taken = torch.cuda.max_memory_allocated() - before
    again = segments_triton.backward(*arguments)
    wide = [x.double() for x in (q, k, v, log_decay)]
    expected = lightning_torch.backward(do.double(), None, wide[0], wide[1], wide[2], wide[3], None, None, 1.0, False)
    for one, other, cut, true in zip(found[:3], again[:3], walked[:3], expected[:3], strict=True):
        assert one is not None
        assert cut is not None
        assert true is not None
        assert torch.equal(one, other)
        error, error_cut = ((x.double() - true).norm() for x in (one, cut))  # on the GPU: these are large
        assert error < 1.1 * error_cut
    if kv_heads == heads:  # else gradients of every query head are there meanwhile
        gradients = sum(x.nbytes for x in found[:3] if x is not None)
        assert taken - gradients < 0.02 * (gradients + do.nbytes)
