"""The streams of a projection and their gradient: against autograd (tier T0) and in Triton (T1; T3 on a GPU)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tnl.ops.streams import split_streams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain(qkvu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, u = qkvu.unbind(2)
    return F.silu(q), F.silu(k), v, u


def gradients_of(function: Any, qkvu: Tensor, weights: list[Tensor]) -> Tensor:
    leaf = qkvu.clone().requires_grad_()
    outputs = function(leaf)
    return torch.autograd.grad(outputs, leaf, [w.to(qkvu) for w in weights])[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(dtype: torch.dtype) -> None:
    qkvu = torch.randn(2, 3, 4, 2, 5, dtype=dtype)
    weights = [torch.randn(2, 3, 2, 5) for _ in range(4)]
    torch.testing.assert_close(split_streams(qkvu.requires_grad_()), plain(qkvu))
    torch.testing.assert_close(gradients_of(split_streams, qkvu, weights), gradients_of(plain, qkvu, weights))
    torch.library.opcheck(torch.ops.tnl.join_gradients, (*(w.to(dtype) for w in weights), qkvu.detach()))


def test_gradcheck() -> None:
    qkvu = torch.randn(1, 2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(split_streams, qkvu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel(dtype: torch.dtype) -> None:
    """At most twice the error of autograd's own gradient in the same dtype, on gradients that lie apart too."""
    kernels = pytest.importorskip("tnl.ops.streams_triton")
    qkvu = torch.randn(2, 30, 4, 3, 20, device=DEVICE).to(dtype)
    weights = [torch.randn(2, 30, 3, 40, device=DEVICE).to(dtype)[..., ::2] for _ in range(4)]
    given = kernels.join_gradients(*weights, qkvu)
    exact = gradients_of(plain, qkvu.double(), weights)
    eager = gradients_of(plain, qkvu, weights)
    assert given.dtype == dtype
    assert torch.equal(given[:, :, 2:], eager[:, :, 2:])
    floor = torch.finfo(torch.float32).eps * exact.norm()
    assert (given.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + floor


def test_compiles_without_a_graph_break() -> None:
    qkvu = torch.randn(2, 3, 4, 2, 5)
    weights = [torch.randn(2, 3, 2, 5) for _ in range(4)]
    compiled = torch.compile(split_streams, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients_of(compiled, qkvu, weights), gradients_of(plain, qkvu, weights))


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"qkvu: expected \[B, T, 4, H, E\], got \[2, 3\]"):
        split_streams(torch.zeros(2, 3))
