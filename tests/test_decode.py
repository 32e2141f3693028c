"""The fused steps of decoding against their definition, in PyTorch (tier T0) and in Triton (T1; T3 on a GPU)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_as_good_as_eager
from tnl.ops import lightning_attention_step
from tnl.ops.decode import decode_attention, decode_linear
from tnl.ops.norm import gated_srms_norm, srms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
EPS = 1e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LINEAR = {
    "plain": {},
    "norm and activation": {"norm_eps": EPS, "activated": 7},
    "gate, norm and residual": {"gate": True, "norm_eps": EPS, "residual": True},
    "product": {"factor_weight": True, "norm_eps": EPS},
    "residual": {"residual": True},
}


def linear_inputs(options: dict[str, object], inputs: int, outputs: int, rows: int) -> dict[str, Tensor]:
    tensors = {"x": random(rows, inputs), "weight": random(outputs, inputs, seed=1) / inputs**0.5}
    shapes = {"factor_weight": (outputs, inputs), "gate": (rows, inputs), "residual": (rows, outputs)}
    for seed, (name, shape) in enumerate(shapes.items(), start=2):
        if options.get(name):
            tensors[name] = random(*shape, seed=seed) / (inputs**0.5 if name == "factor_weight" else 1)
    return tensors


def linear_in_steps(x: Tensor, weight: Tensor, **options: object) -> Tensor:
    """What the layers of a model do, each rounding its result."""
    gate, eps, factor, residual = (options.get(n) for n in ("gate", "norm_eps", "factor_weight", "residual"))
    normed = x
    if isinstance(eps, float):
        normed = gated_srms_norm(x, gate, eps=eps) if isinstance(gate, Tensor) else srms_norm(x, eps=eps)
    y = normed @ weight.T
    if isinstance(factor, Tensor):
        y = y * (normed @ factor.T)
    activated = options.get("activated", 0)
    assert isinstance(activated, int)
    y = torch.cat([torch.nn.functional.silu(y[:, :activated]), y[:, activated:]], dim=1)
    return residual + y if isinstance(residual, Tensor) else y


def run_linear(function: object, options: dict[str, object], tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    cast = {name: x.to(DEVICE, dtype) for name, x in tensors.items()}
    rest = {name: value for name, value in options.items() if name not in cast}
    assert callable(function)
    return function(**(rest | cast))


@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR.keys())
@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(24, 40, 1), (33, 19, 3)])
def test_linear_in_float64(options: dict[str, object], inputs: int, outputs: int, rows: int) -> None:
    tensors = linear_inputs(options, inputs, outputs, rows)
    wanted = run_linear(linear_in_steps, options, tensors, torch.float64)
    given = run_linear(lambda **kw: decode_linear(**kw, backend="torch"), options, tensors, torch.float64)
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR.keys())
@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(24, 40, 1), (33, 19, 3), (1100, 2, 2)])
def test_linear_kernel(dtype: torch.dtype, options: dict[str, object], inputs: int, outputs: int, rows: int) -> None:
    """The error against float64 is at most twice that of the layers one after another in the same dtype."""
    pytest.importorskip("triton")
    options = {**options, "activated": min(outputs, 7)} if "activated" in options else options
    tensors = {n: x.to(dtype).double() for n, x in linear_inputs(options, inputs, outputs, rows).items()}
    exact = run_linear(linear_in_steps, options, tensors, torch.float64)
    eager = run_linear(linear_in_steps, options, tensors, dtype)
    given = run_linear(lambda **kw: decode_linear(**kw, backend="triton"), options, tensors, dtype)
    assert given.dtype == dtype
    assert_as_good_as_eager({"y": given}, {"y": eager}, {"y": exact}, dtype)


def test_residual_is_added_in_place() -> None:
    residual = random(2, 5)
    before = residual.clone()
    x, weight = random(2, 3), random(5, 3)
    assert decode_linear(x, weight, residual=residual, backend="torch") is residual
    torch.testing.assert_close(residual, before + x @ weight.T)


def attention_inputs(rows: int, lrpe: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    heads, width = 3, 20
    inputs = {
        "qkvu": random(rows, 4, heads, width).to(DEVICE, dtype),
        "log_decay": -random(heads, seed=1).abs().float().to(DEVICE),
        "state": random(rows, heads, width * (1 + lrpe), width, seed=2).float().to(DEVICE),
    }
    if lrpe:
        inputs["theta"] = random(heads, 1, width, seed=3).float().to(DEVICE)
        inputs["position"] = torch.arange(1_000_003, 1_000_003 + rows, device=DEVICE)
    return inputs


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("decay", [True, False])
def test_attention_is_the_step_of_the_operator(rows: int, decay: bool) -> None:
    inputs = attention_inputs(rows, lrpe=False, dtype=torch.float32)
    log_decay = inputs["log_decay"] if decay else None
    q, k, v, _ = inputs["qkvu"].unbind(1)
    state = inputs["state"].clone()
    wanted = lightning_attention_step(q, k, v, log_decay, state, backend="torch")
    for backend in ("torch", "triton"):
        own = inputs["state"].clone()
        given = decode_attention(inputs["qkvu"], log_decay, own, backend=backend)
        torch.testing.assert_close(given, wanted.flatten(1))
        torch.testing.assert_close(own, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_positions(dtype: torch.dtype) -> None:
    """At a position of a million: the angle is reduced in float64 by both."""
    pytest.importorskip("triton")
    inputs = attention_inputs(2, lrpe=True, dtype=dtype)
    results = []
    for backend in ("torch", "triton"):
        state = inputs["state"].clone()
        output = decode_attention(**(inputs | {"state": state}), backend=backend)
        results.append((output, state))
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    largest = inputs["state"].abs().max().item()
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance * largest)


def test_bad_arguments_are_named() -> None:
    x, weight = torch.zeros(1, 4), torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"x: expected \[1, 5\]"):
        decode_linear(x, torch.zeros(6, 5))
    with pytest.raises(ValueError, match=r"gate: expected \[1, 4\].*\[1, 3\]"):
        decode_linear(x, weight, gate=torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"residual: expected \[1, 6\].*float64"):
        decode_linear(x, weight, residual=torch.zeros(1, 6).double())
    with pytest.raises(ValueError, match="weight: expected contiguous"):
        decode_linear(x, torch.zeros(4, 6).T)
    inputs: dict[str, Any] = dict(attention_inputs(2, lrpe=True, dtype=torch.float32))
    for name, wrong in (
        ("qkvu", inputs["qkvu"][:, :3]),
        ("state", inputs["state"][:, :, 1:]),
        ("log_decay", inputs["log_decay"][1:]),
        ("theta", inputs["theta"][1:]),
        ("position", None),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            decode_attention(**(inputs | {name: wrong}))
