"""The contract of lightning attention: validation, registration, gradients, compilation, decode. Tier T0."""

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
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


def test_cu_seqlens_made_in_inference_mode() -> None:
    with torch.inference_mode():  # such a tensor has no version
        x = arguments(PACKED)
        x["cu_seqlens"] = x["cu_seqlens"].clone()
        lightning_attention(**x)
        x["cu_seqlens"][-1] -= 1
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
    x["initial_state"] = x["initial_state"].detach().mT.contiguous()
    torch.library.opcheck(torch.ops.tnl.lightning_attention, (*x.values(), 0.7, True, "torch", True))


def test_opcheck_several_tokens() -> None:
    q, k, v = (torch.randn(3, 4, 2, width) for width in (5, 5, 6))
    state, states = torch.randn(3, 2, 6, 5), torch.empty(3, 4, 2, 6, 5)
    arguments = (q, k, v, -torch.rand(3, 4, 2), state, 0.7, None, "torch", True, states)
    torch.library.opcheck(torch.ops.tnl.lightning_attention_step, arguments)


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


def test_states_may_lie_apart() -> None:
    """Rows of a pool as a server keeps them: pages wider than the state."""
    pool = torch.randn(4, 2 * 3 * 5 + 7)
    before, state = pool.clone(), pool[:, 3:33].unflatten(1, (2, 3, 5))
    q, k, v = torch.randn(2, 2, 3), torch.randn(2, 2, 3), torch.randn(2, 2, 5)
    indices, alone = torch.tensor([3, 0]), state.clone()
    o = lightning_attention_step(q, k, v, None, state, state_indices=indices)
    torch.testing.assert_close(o, lightning_attention_step(q, k, v, None, alone, state_indices=indices))
    torch.testing.assert_close(state, alone)
    assert torch.equal(pool[:, :3], before[:, :3])
    assert torch.equal(pool[1:3], before[1:3])


@pytest.mark.parametrize("layout", ["DE", "ED"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_several_tokens_a_step(per_row: bool, pool: bool, layout: str) -> None:
    """They are the recurrence, with the state after each token."""
    N, S, Hq, H, D, E = 3, 4, 4, 2, 5, 6
    q, k, v = (torch.randn(N, S, h, w, dtype=torch.float64) for h, w in ((Hq, D), (H, D), (H, E)))
    decay = -torch.rand(*((N, S, Hq) if per_row else (Hq,)), dtype=torch.float64)
    state = torch.randn(5 if pool else N, Hq, D, E, dtype=torch.float64)
    indices = torch.tensor([4, 0, 2]) if pool else None
    rows = indices if indices is not None else torch.arange(N)
    starts = state[rows]
    if layout == "ED":
        state = state.mT.contiguous()
    o, states = lightning_attention_step(
        q, k, v, decay, state, scale=0.7, state_indices=indices, state_layout=layout, return_states=True
    )
    if layout == "ED":
        state, states = state.mT, states.mT
    for tokens in range(1, S + 1):
        part = decay[:, :tokens] if per_row else decay
        expected, final = lightning_torch.recurrence(
            q[:, :tokens], k[:, :tokens], v[:, :tokens], part, scale=0.7, initial_state=starts
        )
        torch.testing.assert_close(o[:, :tokens], expected)
        torch.testing.assert_close(states[:, tokens - 1], final)
    torch.testing.assert_close(state[rows], states[:, -1])


def test_rejected_draft_is_rolled_back() -> None:
    """Both ways of the docstring: copying the accepted state back, and going on from the returned states."""
    N, S, H, D = 3, 4, 2, 5
    g = torch.Generator().manual_seed(0)
    q, draft, following = (torch.randn(N, S, H, D, generator=g, dtype=torch.float64) for _ in range(3))
    decay, pool = -torch.rand(H, generator=g).double(), torch.randn(7, H, D, D, generator=g, dtype=torch.float64)
    rows, accepted = torch.tensor([5, 0, 3]), torch.tensor([1, 4, 2])
    expected = pool.clone()
    for n, count in enumerate(accepted.tolist()):
        lightning_attention_step(
            q[n : n + 1, :count], draft[n : n + 1, :count], draft[n : n + 1, :count], decay, expected,
            state_indices=rows[n : n + 1],
        )  # fmt: skip
    _, states = lightning_attention_step(q, draft, draft, decay, pool, state_indices=rows, return_states=True)
    pool[rows] = states[torch.arange(N), accepted - 1]
    torch.testing.assert_close(pool, expected)

    o = lightning_attention_step(q, following, following, decay, expected, state_indices=rows)
    going_on = torch.arange(N) * S + accepted - 1
    actual = lightning_attention_step(
        q, following, following, decay, states.flatten(0, 1), state_indices=going_on, return_states=True
    )
    torch.testing.assert_close(actual[0], o)
    torch.testing.assert_close(actual[1][:, -1], expected[rows])


def test_padding_of_several_tokens() -> None:
    """A padded row is zero whatever the row of the pool that it does not touch holds."""
    state = torch.full((2, 1, 3, 3), torch.nan)
    state[1] = 1.0
    q = torch.randn(2, 4, 1, 3)
    indices = torch.tensor([-1, 1])
    o, states = lightning_attention_step(q, q, q, None, state, state_indices=indices, return_states=True)
    assert torch.equal(o[0], torch.zeros(4, 1, 3))
    assert torch.equal(states[0], torch.zeros(4, 1, 3, 3))
    assert state[0].isnan().all()
    assert o[1].isfinite().all()


@pytest.mark.parametrize("case", [Case(T=40, Hq=4, E=12), PACKED], ids=str)
def test_state_layout(case: Case) -> None:
    """Transposed states in, transposed states and gradients out, the same numbers."""
    x = arguments(case, torch.float64)
    other = x | {"initial_state": x["initial_state"].mT.contiguous()}
    pulled = []
    for values, layout in ((x, "DE"), (other, "ED")):
        values["initial_state"].requires_grad_()
        o, state = lightning_attention(**values, return_final_state=True, state_layout=layout)
        assert state is not None
        assert state.is_contiguous()
        loss = o.sin().sum() + (state if layout == "DE" else state.mT).cos().sum()
        pulled.append((o, state, torch.autograd.grad(loss, values["initial_state"])[0]))
    (o, state, gradient), (o_other, state_other, gradient_other) = pulled
    torch.testing.assert_close(o_other, o)
    torch.testing.assert_close(state_other, state.mT)
    torch.testing.assert_close(gradient_other, gradient.mT)


def test_bad_state_layout() -> None:
    with pytest.raises(ValueError, match="state_layout: expected one of"):
        lightning_attention(**arguments(), state_layout="de")
    with pytest.raises(ValueError, match=r"initial_state: expected \[2, 2, 8, 16\]"):
        lightning_attention(**arguments(Case(E=8)), state_layout="ED")


# --- Transformations of PyTorch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["none", "head", "shared head", "token"])
def test_vmap(decay: str) -> None:
    """A vmapped dimension, wherever it is and whoever has it, gives what a loop over it gives."""
    case = Case(T=20, Hq=4, H=2, D=5, E=6, decay=decay.split()[-1])
    many = [case.inputs(torch.float64, seed=seed) for seed in range(3)]
    q, state = (torch.stack([x[name] for x in many]) for name in ("q", "initial_state"))
    k = torch.stack([x["k"] for x in many], dim=2)
    v, log_decay = many[0]["v"], many[0]["log_decay"]
    decay_dim = None
    if decay in ("head", "token"):
        log_decay, decay_dim = torch.stack([x["log_decay"] for x in many], dim=-1), -1

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> Any:
        return lightning_attention(q, k, v, log_decay, initial_state=state, return_final_state=True)

    actual = torch.func.vmap(call, in_dims=(0, 2, None, decay_dim, 0))(q, k, v, log_decay, state)
    for n in range(3):
        own = log_decay if decay_dim is None else log_decay[..., n]
        expected = call(q[n], k[:, :, n], v, own, state[n])
        torch.testing.assert_close(actual[0][n], expected[0])
        torch.testing.assert_close(actual[1][n], expected[1])
    without_state = torch.func.vmap(lambda q: lightning_attention(q, v[..., :5], v)[0])(q)
    torch.testing.assert_close(without_state[1], lightning_attention(q[1], v[..., :5], v)[0])


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_batched_gradients(decay: str) -> None:
    """Many gradients pulled back at once (``is_grads_batched``) are those pulled back one by one."""
    x = arguments(Case(T=20, Hq=4, H=2, D=5, E=6, decay=decay), torch.float64)
    leaves = [value.requires_grad_() for value in x.values() if value is not None]
    o, state = lightning_attention(**x, return_final_state=True)
    assert state is not None
    do, dstate = torch.randn(3, *o.shape, dtype=o.dtype), torch.randn(3, *state.shape, dtype=o.dtype)
    many = torch.autograd.grad((o, state), leaves, (do, dstate), is_grads_batched=True, retain_graph=True)
    for n in range(3):
        one = torch.autograd.grad((o, state), leaves, (do[n], dstate[n]), retain_graph=True)
        torch.testing.assert_close([gradient[n] for gradient in many], list(one))


def test_vmap_refuses_what_it_cannot_serve() -> None:
    x = arguments(PACKED)
    with pytest.raises(ValueError, match=r"cu_seqlens: torch\.func\.vmap"):
        torch.func.vmap(lambda q: lightning_attention(q, x["k"], x["v"], cu_seqlens=x["cu_seqlens"])[0])(x["q"][None])
    q, state = torch.randn(3, 2, 4, 5), torch.zeros(3, 2, 4, 5, 5)
    with pytest.raises(NotImplementedError, match=r"lightning_attention_step: torch\.func\.vmap"):
        torch.func.vmap(lambda q, state: lightning_attention_step(q, q, q, None, state))(q, state)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    """q, k and v take autocast's dtype, whatever mixture they come in; states, decay and sums stay wide."""
    x = arguments(Case(T=40))
    x["k"] = x["k"].bfloat16()
    x["q"].requires_grad_()
    cast = x | {name: x[name].bfloat16() for name in ("q", "k", "v")}
    expected, expected_state = lightning_attention(**cast, return_final_state=True)
    expected_gradient = torch.autograd.grad(expected.float().square().sum(), x["q"])[0]
    with torch.autocast("cpu", torch.bfloat16):
        o, state = lightning_attention(**x, return_final_state=True)
        step = lightning_attention_step(x["q"][:, 0], x["k"][:, 0], x["v"][:, 0], None, x["initial_state"].clone())
        if inside:
            gradient = torch.autograd.grad(o.float().square().sum(), x["q"])[0]
    if not inside:
        gradient = torch.autograd.grad(o.float().square().sum(), x["q"])[0]
    assert o.dtype == step.dtype == torch.bfloat16
    assert state is not None
    assert expected_state is not None
    assert state.dtype == gradient.dtype == torch.float32
    assert torch.equal(o, expected)
    assert torch.equal(state, expected_state)
    assert torch.equal(gradient, expected_gradient)
    with torch.autocast("cpu", torch.bfloat16):  # float64 is left alone, as in a matrix product
        assert lightning_attention(**arguments(dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, compiled: bool) -> None:
    x = {name: value for name, value in arguments(Case(T=40)).items() if name != "cu_seqlens"}
    for value in x.values():
        value.requires_grad_()
    names, values = list(x), list(x.values())

    def block(*values: Tensor) -> Tensor:
        by_name: dict[str, Any] = dict(zip(names, values, strict=True))
        o, state = lightning_attention(**by_name, return_final_state=True)
        assert state is not None
        return o.sin().sum() + state.cos().sum()

    def function(*values: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(block, *values, use_reentrant=use_reentrant)

    expected = torch.autograd.grad(block(*values), values)
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    function(*values).backward()
    torch.testing.assert_close(tuple(value.grad for value in values), expected)


def test_compile_with_autocast_and_steps() -> None:
    """One graph over a prefill under autocast and steps that change a pool in place."""
    x = arguments(Case(T=20, D=8, E=8))
    pool, indices = torch.zeros(4, 2, 8, 8), torch.tensor([2, 0])

    def function(pool: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            o, state = lightning_attention(x["q"], x["k"], x["v"], x["log_decay"], return_final_state=True)
            assert state is not None
            pool[indices] = state
            step, states = lightning_attention_step(
                x["q"][:, :3], x["k"][:, :3], x["v"][:, :3], x["log_decay"], pool, state_indices=indices,
                return_states=True,
            )  # fmt: skip
        return o.float().sum() + step.float().sum(), states

    other = pool.clone()
    expected = function(pool)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(other), expected)
    torch.testing.assert_close(other, pool)


def test_second_gradient_is_refused() -> None:
    """With an error, where a part of the second gradient could be taken silently for the whole."""
    q = torch.randn(1, 5, 2, 3, requires_grad=True)
    o, _ = lightning_attention(q, q, q)
    gradient = torch.autograd.grad(o.square().sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="lightning_attention: can be differentiated once"):
        torch.autograd.grad((gradient.square() + q**3).sum(), q)


def test_values_of_decay_are_checked_in_a_graph() -> None:
    x = arguments() | {"log_decay": torch.tensor([-0.1, 0.1])}
    with pytest.raises(ValueError, match=r"log_decay: expected values of at most 0, got 0\.1"):
        torch.compile(lambda: lightning_attention(**x)[0], fullgraph=True, backend="aot_eager")()


def test_forward_mode_is_refused() -> None:
    """With an error, where the tangent would silently be zero."""
    q = torch.randn(1, 5, 2, 3)
    with pytest.raises(NotImplementedError, match="lightning_attention: forward-mode"):
        torch.func.jvp(lambda q: lightning_attention(q, q, q)[0], (q,), (q,))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda q: lightning_attention(q, q, q)[0].sum())(q)
