"""SRMSNorm with and without a gate: eager (T0), kernels under the interpreter (T1) or on a GPU (T3, marked gpu)."""

import pytest
import torch
from torch import Tensor

from tests.marks import interpreted, needs_gpu
from tests.numerics import relative_error
from tnl.ops import gated_srms_norm, srms_norm


def definition(x: Tensor, gate: Tensor | None) -> Tensor:
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    return y if gate is None else gate * y


def results(x: Tensor, gate: Tensor | None, dy: Tensor, backend: str) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, gate) if t is not None]
    if backend == "definition":
        y = definition(*leaves) if gate is not None else definition(leaves[0], None)
    else:
        y = gated_srms_norm(*leaves, backend=backend) if gate is not None else srms_norm(leaves[0], backend=backend)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def check(backend: str, dtype: torch.dtype, shape: tuple[int, ...], gated: bool, device: str = "cpu") -> None:
    """At most twice (gradients: three times) the error of the definition computed in the same dtype."""
    x, gate, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    maybe = gate if gated else None
    reference = results(x.double(), gate.double() if gated else None, dy.double(), "definition")
    same_dtype = results(x, maybe, dy, "definition")
    for i, (actual, eager, exact) in enumerate(zip(results(x, maybe, dy, backend), same_dtype, reference, strict=True)):
        allowed = max(relative_error(eager, exact), torch.finfo(dtype).eps / 2)
        assert relative_error(actual, exact) <= (3 if i else 2) * allowed


SHAPES = [(3, 96), (2, 5, 128), (4, 3), (7, 33), (1, 2100)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_eager(shape: tuple[int, ...], gated: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check("torch", dtype, shape, gated)


def test_gradcheck() -> None:
    x, gate = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(srms_norm, x)
    assert torch.autograd.gradcheck(gated_srms_norm, (x, gate))


@interpreted
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels(shape: tuple[int, ...], gated: bool, nan_filled_memory: None) -> None:
    for dtype in (torch.float32, torch.float16):
        check("triton", dtype, shape, gated)


@interpreted
def test_opcheck() -> None:
    x, gate = torch.randn(3, 24, requires_grad=True), torch.randn(3, 24, requires_grad=True)
    torch.library.opcheck(torch.ops.tnl.srms_norm, (x, gate, 1e-6))
    torch.library.opcheck(torch.ops.tnl.srms_norm, (x, None, 1e-6))


def test_large_values_do_not_overflow() -> None:
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    torch.testing.assert_close(srms_norm(x), torch.ones_like(x))


def test_bad_arguments() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="gate: expected"):
        gated_srms_norm(x, torch.randn(2, 7))
    with pytest.raises(ValueError, match="eps: expected"):
        srms_norm(x, eps=0.0)
    with pytest.raises(ValueError, match="x: expected float32"):
        srms_norm(x.long())
    with pytest.raises(ValueError, match="backend: expected"):
        srms_norm(x, backend="cuda")
    with pytest.raises(ValueError, match="backend: 'triton' needs"):
        srms_norm(x.double(), backend="triton")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1000, 1024), (64, 4096), (3, 11008), *SHAPES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_kernels(shape: tuple[int, ...], gated: bool, dtype: torch.dtype, nan_filled_memory: None) -> None:
    check("triton", dtype, shape, gated, "cuda")
