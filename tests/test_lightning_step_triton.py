"""The decoding step in Triton: under the interpreter (tier T1) and on a GPU (tier T3, marked gpu)."""

import pytest
import torch

from tests.marks import interpreted, needs_gpu
from tnl.ops import lightning_attention_step

DECAYS = ["none", "head", "token"]


@interpreted
@pytest.mark.parametrize("decay", DECAYS)
def test_step(decay: str) -> None:
    N, Hq, H, D, E = 3, 4, 2, 20, 36
    q, k, v = (torch.randn(N, h, w) for h, w in ((Hq, D), (H, D), (H, E)))
    log_decay = {"none": None, "head": -torch.rand(Hq), "token": -torch.rand(N, Hq)}[decay]
    state = torch.randn(5, Hq, D, E)
    indices = torch.tensor([4, -1, 2])
    state_torch = state.clone()
    o = lightning_attention_step(q, k, v, log_decay, state, scale=0.7, state_indices=indices, backend="triton")
    expected = lightning_attention_step(
        q, k, v, log_decay, state_torch, scale=0.7, state_indices=indices, backend="torch"
    )
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, state_torch, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("layout", ["DE", "ED"])
@pytest.mark.parametrize("decay", DECAYS)
def test_step_of_several_tokens(decay: str, layout: str, nan_filled_memory: None) -> None:
    """Grouped heads, a padded row, a pool whose rows lie apart, and the state after each token."""
    N, S, Hq, H, D, E = 3, 3, 4, 2, 20, 36
    q, k, v = (torch.randn(N, S, h, w) for h, w in ((Hq, D), (H, D), (H, E)))
    log_decay = {"none": None, "head": -torch.rand(Hq), "token": -torch.rand(N, S, Hq)}[decay]
    pool = torch.randn(5, Hq * D * E + 8)
    state = pool[:, 8:].unflatten(1, (Hq, D, E) if layout == "DE" else (Hq, E, D))
    indices = torch.tensor([4, -1, 2])
    state_torch = state.clone()
    results = [
        lightning_attention_step(
            q, k, v, log_decay, values, scale=0.7, state_indices=indices, state_layout=layout, return_states=True,
            backend=backend,
        )
        for values, backend in ((state, "triton"), (state_torch, "torch"))
    ]  # fmt: skip
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, state_torch, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("layout", ["DE", "ED"])
@pytest.mark.parametrize("width", [80, 128])
def test_gpu_step_of_several_tokens(width: int, layout: str) -> None:
    """As many steps of one token, with the state after each."""
    q, k, v = (torch.randn(5, 4, 4, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    state, decay = torch.randn(5, 4, width, width, device="cuda"), -torch.rand(4, device="cuda")
    other = state.clone()
    o, states = lightning_attention_step(q, k, v, decay, state, state_layout=layout, return_states=True)
    for t in range(4):
        expected = lightning_attention_step(q[:, t], k[:, t], v[:, t], decay, other, state_layout=layout)
        assert torch.equal(o[:, t], expected)
        assert torch.equal(states[:, t], other)
    assert torch.equal(state, other)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_gpu_step(width: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(5, 4, width, device="cuda", dtype=dtype) for _ in range(3))
    state = torch.randn(7, 4, width, width, device="cuda")
    other, decay = state.clone(), -torch.rand(4, device="cuda")
    indices = torch.tensor([6, -1, 0, 3, 2], device="cuda")
    o = lightning_attention_step(q, k, v, decay, state, state_indices=indices, backend="triton")
    expected = lightning_attention_step(q, k, v, decay, other, state_indices=indices, backend="torch")
    torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        o, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4 if dtype == torch.float32 else 1e-1
    )
