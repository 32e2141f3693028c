"""The contract of lightning attention: validation, registration, gradients, compilation, decode. Tier T0."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics import Case
from tnl.ops import lightning_attention, lightning_attention_step, lightning_torch


def arguments(case: Case | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    x = (case or Case()).inputs(dtype)
    return {name: x[name] for name in ("q", "k", "v", "log_decay", "initial_state", "cu_seqlens")}


PACKED = Case(B=1, bounds=(0, 1, 30, 30, 65))
BAD_CALLS = [
    ({"q": torch.zeros(2, 65, 32)}, "q: expected 4 dimensions"),
    ({"k": torch.zeros(2, 64, 2, 16)}, "k: expected leading dimensions"),
    ({"k": torch.zeros(2, 65, 2, 8)}, "k: expected width 16"),
    ({"v": torch.zeros(2, 65, 1, 16)}, "v: expected 2 heads"),
    ({"q": torch.zeros(2, 65, 3, 16)}, "q: expected a multiple of the 2 heads"),
    ({"k": torch.zeros(2, 65, 2, 16, dtype=torch.float16)}, "k: expected the dtype of q"),
    ({"q": torch.zeros(2, 65, 2, 16, dtype=torch.int64)}, "q: expected float32, float64"),
    ({"v": torch.zeros(2, 65, 2, 16, device="meta")}, "v: expected the device of q"),
    ({"v": torch.zeros(2, 65, 16, 2).mT}, "v: expected a contiguous last dimension"),
    ({"q": torch.zeros(2, 0, 2, 16)}, "q: expected no empty dimension"),
    ({"log_decay": torch.zeros(3)}, "log_decay: expected [2]"),
    ({"log_decay": torch.zeros(2, dtype=torch.float16)}, "log_decay: expected float32 or float64"),
    ({"log_decay": torch.tensor([-0.1, 0.1])}, "log_decay: expected values of at most 0, got 0.1"),
    ({"initial_state": torch.zeros(2, 2, 16, 8)}, "initial_state: expected [2, 2, 16, 16] of float32"),
    ({"initial_state": torch.zeros(2, 2, 16, 16, dtype=torch.float64)}, "initial_state: expected"),
    ({"cu_seqlens": torch.tensor([0, 65])}, "cu_seqlens: packed sequences need a batch of 1"),
    ({"backend": "cuda"}, "backend: expected one of"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_call(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        lightning_attention(**(arguments() | change))


@pytest.mark.parametrize("bounds", [[0, 30, 20, 65], [0, 64], [1, 65], [0, 66], [65]])
def test_bad_cu_seqlens(bounds: list[int]) -> None:
    x = arguments(PACKED) | {"cu_seqlens": torch.tensor(bounds), "initial_state": None}
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        lightning_attention(**x)


def test_changed_cu_seqlens_is_checked_again() -> None:
    x = arguments(PACKED) | {"initial_state": None}
    lightning_attention(**x)
    x["cu_seqlens"][-1] = 64
    with pytest.raises(ValueError, match="cu_seqlens"):
        lightning_attention(**x)


def test_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend: 'triton' serves"):
        lightning_attention(**arguments(dtype=torch.float64), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: 'triton' needs CUDA tensors"):
        lightning_attention(**arguments(), backend="triton")


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("bounds", [None, (0, 1, 1, 5)])
def test_gradcheck(decay: str, bounds: tuple[int, ...] | None) -> None:
    case = Case(B=1 if bounds else 2, T=5, Hq=2, H=1, D=3, E=2, decay=decay, bounds=bounds)
    x = arguments(case, torch.float64)
    names = [name for name, value in x.items() if value is not None and value.is_floating_point()]
    if x["log_decay"] is not None:
        x["log_decay"] -= 0.1  # finite differences must stay below 0

    def call(*values: Tensor) -> Any:
        return lightning_attention(**(x | dict(zip(names, values, strict=True))), scale=0.7, return_final_state=True)

    assert torch.autograd.gradcheck(call, [x[name].requires_grad_() for name in names])


@pytest.mark.parametrize(
    "case", [Case(T=20), Case(T=20, decay="token", Hq=4), Case(B=1, T=20, bounds=(0, 7, 20))], ids=str
)
def test_opcheck(case: Case) -> None:
    x = arguments(case)
    for name in ("q", "k", "v", "log_decay", "initial_state"):
        x[name].requires_grad_()
    torch.library.opcheck(torch.ops.tnl.lightning_attention, (*x.values(), 0.7, True, "torch"))
    torch.library.opcheck(torch.ops.tnl.lightning_attention, (*x.values(), 0.7, False, "torch"))
    state = torch.randn(5, 2, 4, 3)
    step = (torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.randn(3, 2, 3), -torch.rand(2), state, 0.7)
    torch.library.opcheck(torch.ops.tnl.lightning_attention_step, (*step, torch.tensor([4, -1, 0]), "torch"))


def test_compile_without_graph_break() -> None:
    x = {name: value for name, value in arguments(Case(T=40)).items() if name != "cu_seqlens"}
    for value in x.values():
        value.requires_grad_()

    def function(x: dict[str, Any]) -> Tensor:
        o, state = lightning_attention(**x, scale=0.5, return_final_state=True)
        assert state is not None
        return (o * 2).square().sum() + state.sin().sum()

    expected = function(x)
    expected_gradients = torch.autograd.grad(expected, list(x.values()))
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, list(x.values())), expected_gradients)


def test_unused_outputs_and_gradients() -> None:
    x = arguments()
    x["q"].requires_grad_()
    x["initial_state"].requires_grad_()
    o, none = lightning_attention(**x)
    assert none is None
    o.sum().backward()
    assert x["q"].grad is not None
    _, state = lightning_attention(**x, return_final_state=True)
    assert state is not None
    gradient = torch.autograd.grad(state.sum(), x["initial_state"])[0]
    expected = (x["log_decay"].double() * 65).exp()[None, :, None, None].expand_as(gradient)
    torch.testing.assert_close(gradient, expected.float())


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_step_is_recurrence(per_row: bool, pool: bool) -> None:
    N, Hq, H, D, E = 3, 4, 2, 5, 6
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(N, 7, h, w, generator=g, dtype=torch.float64) for h, w in ((Hq, D), (H, D), (H, E)))
    decay = -torch.rand(*((N, 7, Hq) if per_row else (Hq,)), generator=g, dtype=torch.float64)
    state = torch.randn(5 if pool else N, Hq, D, E, generator=g, dtype=torch.float64)
    indices = torch.tensor([4, 0, 2]) if pool else None
    rows = indices if indices is not None else torch.arange(N)
    before = state.clone()
    expected, final = lightning_torch.recurrence(q, k, v, decay, scale=0.7, initial_state=state[rows])
    for t in range(7):
        g_t = decay[:, t] if per_row else decay
        o = lightning_attention_step(q[:, t], k[:, t], v[:, t], g_t, state, scale=0.7, state_indices=indices)
        torch.testing.assert_close(o, expected[:, t])
    torch.testing.assert_close(state[rows], final)
    untouched = [row for row in range(state.shape[0]) if row not in rows.tolist()]
    assert torch.equal(state[untouched], before[untouched])


def test_step_padding_index() -> None:
    state = torch.randn(2, 1, 3, 3)
    before = state.clone()
    q = torch.randn(2, 1, 3)
    o = lightning_attention_step(q, q, q, None, state, state_indices=torch.tensor([-1, 1]))
    assert torch.equal(state[0], before[0])
    assert not torch.equal(state[1], before[1])
    assert torch.equal(o[0], torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.zeros(2, 2, 4, 3)}, "state: expected"),
        ({"state": torch.zeros(3, 2, 3, 4).mT}, "state: expected a contiguous tensor"),
        ({"state_indices": torch.zeros(2, dtype=torch.int64)}, "state_indices: expected"),
        ({"state_indices": torch.zeros(3)}, "state_indices: expected"),
        ({"q": torch.zeros(3, 4)}, "q: expected 3 dimensions"),
        ({"q": torch.zeros(3, 1, 2, 4)}, "k: expected 4 dimensions"),
        ({"state_layout": "ED"}, r"state: expected \[3, 2, 3, 4\]"),
        ({"state_layout": "de"}, "state_layout: expected one of"),
    ],
)
def test_bad_step(change: dict[str, Any], message: str) -> None:
    x = {
        "q": torch.zeros(3, 2, 4), "k": torch.zeros(3, 2, 4), "v": torch.zeros(3, 2, 3), "log_decay": None,
        "state": torch.zeros(3, 2, 4, 3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lightning_attention_step(**(x | change))
