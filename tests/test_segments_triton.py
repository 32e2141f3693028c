"""Segments of a row whose states are summed up beforehand: under the interpreter (tier T1) and on a GPU (T3)."""

from typing import Any

import pytest
import torch

from tests.marks import interpreted, needs_gpu
from tests.numerics import Case, assert_as_good_as_eager, check, relative_error
from tnl.ops import lightning_attention, lightning_torch, segments_triton, tiling_triton


@pytest.fixture
def cut_in_three(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Cuts rows of 96 tokens; the list counts how often."""
    cuts: list[int] = []

    def choose(tokens: int, *_: object) -> int:
        cuts.append(tokens)
        return 3

    monkeypatch.setattr(segments_triton, "LONG_ROW", 96)
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
    ],
)
def test_segments_fill_the_chip(tokens: int, walks: int, segments: int) -> None:
    """132 multiprocessors: 128 programs, or as many as segments of 8192 tokens make."""
    assert tiling_triton.choose_segments(tokens, walks, 132) == segments


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [Case(T=96), Case(B=1, T=96, Hq=4, H=2, D=20, E=36), Case(B=1, T=99, D=16, E=48)], ids=str
)
def test_against_the_definition(
    case: Case, dtype: torch.dtype, cut_in_three: list[int], nan_filled_memory: None
) -> None:
    inputs, wide = case.inputs(dtype), case.inputs(dtype)
    wide = {name: x if x is None or not x.is_floating_point() else x.double() for name, x in wide.items()}
    reference, actual = without_decay(wide, "torch"), without_decay(inputs, "triton")
    assert cut_in_three, "no row was cut"
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
    assert len(cut_in_three) == 2


@interpreted
def test_what_is_left_as_it_is(cut_in_three: list[int]) -> None:
    """A decay a token, none, packed rows and the gradient of the decay take the other way, with the same results."""
    for case in (Case(T=96, decay="token"), Case(T=96, decay="none"), Case(B=1, T=96, bounds=(0, 40, 96))):
        check(case, "triton", torch.float32)
    inputs = Case(T=96).inputs(torch.float32)
    # rows that do not follow each other, which could not be cut without a copy
    q, k, v = (torch.nn.functional.pad(inputs[name], (0, 0, 0, 0, 0, 4))[:, :96] for name in ("q", "k", "v"))
    o, _ = lightning_attention(q, k, v, inputs["log_decay"], backend="triton")
    expected, _ = lightning_torch.recurrence(q.double(), k.double(), v.double(), inputs["log_decay"].double())
    assert relative_error(o, expected) < 1e-6
    assert not cut_in_three


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_few_heads(dtype: torch.dtype) -> None:
    """Long enough to be cut on any GPU; the float64 form in chunks is the reference."""
    B, T, H, D = 1, 65536, 4, 64
    q, k, v, do = (torch.randn(B, T, H, D, device="cuda", dtype=dtype) for _ in range(4))
    log_decay = -torch.tensor([1.0, 1e-2, 1e-4, 1e-7], device="cuda")
    assert segments_triton._segments(q, k, v, log_decay, None) > 1
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    o, _ = lightning_attention(q, k, v, log_decay)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, _ = lightning_attention(wide[0], wide[1], wide[2], log_decay.double(), backend="torch")
    bound = 5e-3 if dtype == torch.bfloat16 else 1e-5
    assert relative_error(o, expected) < bound
    for one, true in zip(gradients, torch.autograd.grad(expected, wide, do.double()), strict=True):
        assert relative_error(one, true) < bound
