"""The gated linear unit and its gradient against autograd (T0), its kernel (T1; T3 on a GPU)."""

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_as_good_as_eager
from tnl.ops.gated_linear_unit import gated_linear_unit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(tokens: int = 7, width: int = 5, inner: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, tokens, width), (inner, width), (inner, width), (width, inner))
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return ((x @ gate.T) * (x @ up.T)) @ down.T


def test_value_and_gradient() -> None:
    tensors = inputs()
    torch.testing.assert_close(gated_linear_unit(*tensors), plain(*tensors))
    assert torch.autograd.gradcheck(gated_linear_unit, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (13, 37), (64, 352)])
def test_kernel_against_float64(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    kernel = pytest.importorskip("tnl.ops.gated_linear_unit_triton")
    generator = torch.Generator().manual_seed(1)
    dproduct, factors = (torch.randn(shape[0], n * shape[1], generator=generator).to(DEVICE, dtype) for n in (1, 2))

    def eager(dproduct: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        first, second = factors.chunk(2, dim=-1)
        return torch.cat([dproduct * second, dproduct * first], dim=-1), first * second

    ours, reference, exact = (
        dict(zip(("dfactors", "product"), result, strict=True))
        for result in (
            kernel.gated_product_gradients(dproduct, factors),
            eager(dproduct, factors),
            eager(dproduct.double(), factors.double()),
        )
    )
    assert_as_good_as_eager(ours, reference, exact, dtype)


def test_weights_in_float32_under_autocast() -> None:
    """Gradients have their tensors' dtype and are as good as autograd's."""
    names = ("dx", "dgate", "dup", "ddown")
    exact = [x.detach().to(DEVICE).requires_grad_() for x in inputs(64, 32, 48)]
    plain(*exact).sin().sum().backward()
    results = {}
    for name, function in (("ours", gated_linear_unit), ("autograd", plain)):
        tensors = [x.detach().float().requires_grad_() for x in exact]
        with torch.autocast(DEVICE, torch.bfloat16):
            out = function(*tensors)
        assert out.dtype == torch.bfloat16
        out.float().sin().sum().backward()
        results[name] = {n: x.grad for n, x in zip(names, tensors, strict=True) if x.grad is not None}
        assert [x.dtype for x in results[name].values()] == [torch.float32] * 4
    wanted = {n: x.grad for n, x in zip(names, exact, strict=True) if x.grad is not None}
    assert_as_good_as_eager(results["ours"], results["autograd"], wanted, torch.bfloat16)


def test_weights_that_do_not_fit_are_refused() -> None:
    x, gate, up, down = inputs()
    with pytest.raises(ValueError, match=r"up: expected \[9, 5\], got \[5, 9\]"):
        gated_linear_unit(x, gate, down, down)
    with pytest.raises(ValueError, match=r"x: expected \[.., 5\]"):
        gated_linear_unit(x[..., :4], gate, up, down)
