"""The definition and the chunked form of lightning attention in PyTorch. Tier T0."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.numerics import (
    SLOPES,
    Case,
    cases,
    check,
    errors_along,
    lying_apart,
    prefill_and_decode,
    relative_error,
    results,
)
from tnl.ops import lightning_attention, lightning_torch

DECAYS = ["none", "head", "token"]


def test_definition_by_hand() -> None:
    """Two tokens, one head, width 1: o_2 = scale (q_2 k_1 v_1 lambda + q_2 k_2 v_2); the current token has weight 1."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in ([2.0, 3.0], [5.0, 7.0], [11.0, 13.0]))
    o, state = lightning_torch.recurrence(q, k, v, torch.tensor([np.log(0.5)]), scale=10.0)
    assert o.flatten().tolist() == pytest.approx([10 * 2 * 55, 10 * 3 * (0.5 * 55 + 91)])
    assert state.item() == pytest.approx(0.5 * 55 + 91)


@pytest.mark.parametrize("decay", DECAYS)
def test_recurrence_is_quadratic_form(decay: str) -> None:
    x = Case(T=40, Hq=4, decay=decay).inputs(torch.float64)
    arguments = (x["q"], x["k"], x["v"], x["log_decay"])
    o, _ = lightning_torch.recurrence(*arguments, scale=0.3)
    torch.testing.assert_close(o, lightning_torch.quadratic(*arguments, scale=0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    "case",
    [
        Case(T=1, D=1, E=1),
        Case(T=127, D=7, E=5),
        Case(T=128, Hq=4, H=1),
        Case(T=129, Hq=4, D=24, E=12),
        Case(B=1, T=300, bounds=(0, 1, 1, 129, 130, 300), Hq=2, H=1),
    ],
    ids=str,
)
def test_chunked_is_recurrence(case: Case, decay: str, nan_filled_memory: None) -> None:
    case = Case(**{**vars(case), "decay": decay})
    inputs = case.inputs(torch.float64)
    actual, reference = results(case, "torch", inputs), results(case, "reference", inputs)
    assert set(actual) == set(reference)
    for name, value in reference.items():
        assert relative_error(actual[name], value) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_error_in_dtype(dtype: torch.dtype, decay: str) -> None:
    check(Case(T=200, Hq=4, D=32, E=24, decay=decay), "torch", dtype)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_properties_of_state(data: st.DataObject) -> None:
    """Split = whole, packed = alone, a row of a batch = alone, for random shapes, cuts and strides."""
    draw: Callable[..., int] = data.draw
    T, H, D, E = draw(st.integers(2, 150)), draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    group, decay = draw(st.integers(1, 3)), data.draw(st.sampled_from(DECAYS))
    x = Case(B=2, T=T, Hq=H * group, H=H, D=D, E=E, decay=decay).inputs(torch.float64, seed=draw(st.integers(0, 999)))
    q, k, v, s0 = x["q"], x["k"], x["v"], x["initial_state"]

    def decay_of(rows: slice, tokens: slice) -> Tensor | None:
        g = x["log_decay"]
        return g if g is None or g.dim() == 1 else g[rows, tokens]

    everything = slice(None)
    whole, final = lightning_attention(
        q, k, v, decay_of(everything, everything), initial_state=s0, return_final_state=True
    )
    cut = draw(st.integers(1, T - 1))
    state, parts = s0, []
    for piece in (slice(0, cut), slice(cut, T)):
        o, new = lightning_attention(
            q[:, piece], k[:, piece], v[:, piece], decay_of(everything, piece),
            initial_state=state, return_final_state=True,
        )  # fmt: skip
        assert new is not None
        state = new
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)

    row, row_state = lightning_attention(
        q[1:], k[1:], v[1:], decay_of(slice(1, 2), everything), initial_state=s0[1:], return_final_state=True
    )
    assert row_state is not None
    assert final is not None
    torch.testing.assert_close(row[0], whole[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(row_state[0], final[1], rtol=1e-10, atol=1e-10)

    g = x["log_decay"]
    packed, packed_state = lightning_attention(
        q.flatten(0, 1)[None],
        k.flatten(0, 1)[None],
        v.flatten(0, 1)[None],
        g if g is None or g.dim() == 1 else g.flatten(0, 1)[None],
        initial_state=s0, return_final_state=True, cu_seqlens=torch.tensor([0, T, 2 * T]),
    )  # fmt: skip
    torch.testing.assert_close(packed[0], whole.flatten(0, 1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(packed_state, final, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases(longest=300, widest=9), heads_first=st.booleans(), gap=st.integers(0, 5))
def test_any_case(case: Case, heads_first: bool, gap: int) -> None:
    """Outputs and gradients are the recurrence's, for any sizes, packing and strides."""
    inputs = case.inputs(torch.float64)
    apart = inputs | {name: lying_apart(inputs[name], gap, heads_first) for name in ("q", "k", "v", "do")}
    actual, reference = results(case, "torch", apart), results(case, "reference", inputs)
    for name, value in reference.items():
        assert relative_error(actual[name], value) < 1e-11, name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases(longest=150, widest=9, packing=False), data=st.data(), layout=st.sampled_from(["DE", "ED"]))
def test_any_decode(case: Case, data: st.DataObject, layout: str) -> None:
    """Prefill + a step of several tokens = the whole."""
    inputs = case.inputs(torch.float64)
    o, state = prefill_and_decode(case, inputs, data.draw(st.integers(1, case.T - 1)), layout, "torch")
    arguments = [inputs[name] for name in ("q", "k", "v", "log_decay")]
    expected, final = lightning_torch.recurrence(*arguments, scale=case.scale, initial_state=inputs["initial_state"])
    assert relative_error(o, expected) < 1e-11
    assert relative_error(state, final) < 1e-11


def test_any_strides() -> None:
    x = Case(T=50).inputs(torch.float64)
    q, k, v = (t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (x["q"], x["k"], x["v"]))
    o, _ = lightning_attention(q, k, v, x["log_decay"])
    expected, _ = lightning_attention(q.contiguous(), k.contiguous(), v.contiguous(), x["log_decay"])
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("rate", [0.9, 0.5, 1e-3, 1e-8])
def test_long_range(rate: float) -> None:
    """The error does not grow with the number of tokens, with fast decay nor with next to none."""
    T = 20_000
    case = Case(B=1, T=T, Hq=1, H=1, D=4, E=4, scale=1.0)
    x = case.inputs(torch.float32)
    q, k, v, decay = x["q"], x["k"], x["v"], torch.tensor([-rate])
    o, _ = lightning_attention(q, k, v, decay)
    reference, _ = lightning_torch.forward(q.double(), k.double(), v.double(), decay.double(), None, None, 1.0)
    assert relative_error(o[:, -1000:], reference[:, -1000:]) < 3 * relative_error(o[:, :1000], reference[:, :1000])


def test_chunked_is_recurrence_over_many_chunks() -> None:
    """What long sequences are held against (:func:`tests.numerics.errors_along`) is the recurrence."""
    q, k, v = (torch.randn(1, 3000, len(SLOPES), 4, dtype=torch.float64) for _ in range(3))
    decay = -torch.tensor(SLOPES, dtype=torch.float64)
    expected, final = lightning_torch.recurrence(q, k, v, decay)
    o, state = lightning_torch.forward(q, k, v, decay, None, None, 1.0)
    for h in range(len(SLOPES)):
        assert relative_error(o[:, :, h], expected[:, :, h]) < 1e-13
        assert relative_error(state[:, h], final[:, h]) < 1e-13


def test_a_million_tokens() -> None:
    """The error is flat where a head decays. Where it hardly does, the rounding of its state's sums adds up as a
    random walk does, by half a unit of float32 times the root of the number of chunks.
    """
    tokens, slopes = 1 << 20, (0.9, 1e-3, 1e-8)
    errors = errors_along(tokens, 4, torch.float32, "torch", slopes=slopes)
    assert (errors[:2] < 1.5 * errors[:2, :1]).all()
    walk = torch.finfo(torch.float32).eps / 2 * (tokens / lightning_torch.CHUNK) ** 0.5
    assert (errors[2] < errors[2, 0] + walk).all()
    assert walk < 6e-6
