"""One sequence over several processes equals the same sequence on one. Tier T2; the kernel T1; marked gpu T3."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.marks import interpreted, needs_gpu
from tests.numerics import Case, relative_error
from tests.ranks import run_ranks, run_torchrun
from tnl.ops import context_parallel, lightning_attention
from tnl.ops.context_parallel import _log_weights, _sum_up, lightning_attention_context_parallel

DECAYS = ["none", "head", "token"]
PLAIN = Case(B=2, T=24, Hq=4, H=2, D=5, E=3)
PACKINGS = {
    "one": (0, 48),
    "at the borders": (0, 12, 24, 36, 48),
    "across all": (0, 1, 47, 48),
    "across some": (0, 5, 30, 40, 48),
    "empty ones": (0, 0, 5, 12, 12, 24, 24, 24, 36, 48, 48, 48),
    "short ones": tuple(range(49)),
}


def whole(case: Case, inputs: dict[str, Any], with_states: bool) -> dict[str, Tensor]:
    """Outputs and gradients of one process, by name."""
    return _call(case, inputs, with_states, lightning_attention)


def _call(
    case: Case, inputs: dict[str, Any], with_states: bool, operator: Any, backend: str = "torch", fixed: bool = False
) -> dict[str, Tensor]:
    """``fixed``: without the gradient of the decay."""
    leaves = {n: inputs[n].detach().clone().requires_grad_() for n in ("q", "k", "v")}
    others = {"log_decay": inputs["log_decay"]} if fixed or inputs["log_decay"] is None else {}
    if not others:
        leaves["log_decay"] = inputs["log_decay"].detach().clone().requires_grad_()
    if with_states:
        leaves["initial_state"] = inputs["initial_state"].detach().clone().requires_grad_()
    o, final = operator(
        **leaves,
        **others,
        scale=case.scale,
        return_final_state=with_states,
        cu_seqlens=inputs["cu_seqlens"],
        backend=backend,
    )
    outputs, pulled = [o], [inputs["do"]]
    if with_states:
        outputs, pulled = [o, final], [inputs["do"], inputs["dfinal_state"]]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), pulled)
    result = {"o": o.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
    return result | ({"final_state": final.detach()} if with_states else {})


def compare(
    case: Case,
    with_states: bool,
    cuts: list[int],
    dtype: torch.dtype,
    backend: str,
    bound: float,
    fixed: bool = False,
) -> None:
    """This rank's part of ``case``, cut at ``cuts``, against the whole."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = case.inputs(dtype)
    reference = whole(case, {n: _widen(x) for n, x in inputs.items()}, with_states)
    some = slice(cuts[rank], cuts[rank + 1])
    per_token = [n for n in inputs if n in ("q", "k", "v", "do") or (n == "log_decay" and case.decay == "token")]
    part = inputs | {n: inputs[n][:, some] for n in per_token}
    part["dfinal_state"] = inputs["dfinal_state"] * (rank + 1) / sum(range(1, ranks + 1))  # all ranks' add up
    actual = _call(case, part, with_states, lightning_attention_context_parallel, backend, fixed)
    if fixed:
        reference.pop("dlog_decay", None)
    for name, expected in reference.items():
        value = actual[name]
        if name.removeprefix("d") in per_token or name == "o":
            expected = expected[:, some]
        elif name != "final_state":  # what all hold alike: every rank has a share of the gradient
            dist.all_reduce(value)
        assert value.isfinite().all(), name
        if dtype == torch.float64:
            assert_near(name, value, expected, bound)
        else:
            assert relative_error(value, expected) < bound, name


def assert_near(name: str, value: Tensor, expected: Tensor, bound: float) -> None:
    torch.testing.assert_close(value, expected, rtol=bound, atol=bound, msg=lambda message: f"{name}: {message}")


def _widen(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def even(tokens: int) -> list[int]:
    ranks = dist.get_world_size()
    return [tokens * r // ranks for r in range(ranks + 1)]


@contextlib.contextmanager
def segments(count: int) -> Iterator[None]:
    """Cuts each rank's part into so many segments."""
    choose = context_parallel._choose_segments
    context_parallel._choose_segments = lambda *_: count
    try:
        yield
    finally:
        context_parallel._choose_segments = choose


def compare_all(with_states: bool) -> None:
    for decay in DECAYS:
        for cuts in (even(24), [*[0, 1, 2, 3, 24][: dist.get_world_size()], 24]):
            compare(replace(PLAIN, decay=decay), with_states, cuts, torch.float64, "torch", 1e-12)
        with segments(3):
            compare(replace(PLAIN, decay=decay), with_states, even(24), torch.float64, "torch", 1e-12)
        for bounds in PACKINGS.values():
            case = replace(PLAIN, B=1, T=48, decay=decay, bounds=bounds)
            compare(case, with_states, even(48), torch.float64, "torch", 1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("with_states", [False, True])
def test_ranks_equal_one_process(ranks: int, with_states: bool) -> None:
    run_ranks(ranks, compare_all, with_states)


def compare_kernels() -> None:
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    for decay in DECAYS:
        case = Case(B=1, T=40, Hq=2, H=1, D=20, E=12, decay=decay, bounds=(0, 10, 30, 40))
        for fixed in (False, True):  # with a gradient of the decay one launch computes all gradients
            compare(case, True, even(40), torch.float32, "triton", 1e-5, fixed)
        with segments(2):
            compare(replace(case, B=2, bounds=None), True, even(40), torch.float32, "triton", 1e-5, fixed=True)


@interpreted
def test_kernels_between_ranks() -> None:
    run_ranks(2, compare_kernels)


def order_of_launches() -> None:
    """Backwards the second stream is forked before the exchange is launched, and dq on it behind the exchange."""
    from tnl.ops import lightning_triton

    seen: list[str] = []

    @contextlib.contextmanager
    def step(name: str) -> Iterator[Any]:
        seen.append(name)
        yield step("second stream")
        seen.append(f"end of {name}")

    def spy(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            return function(*arguments, **options)

        return call

    inputs = Case(B=1, T=20, Hq=2, H=2, D=16, E=16).inputs(torch.float32)
    leaves = [inputs[n].requires_grad_() for n in ("q", "k", "v")]
    o, _ = lightning_attention_context_parallel(*leaves, inputs["log_decay"], backend="triton")
    context_parallel._beside = lambda _: step("block")  # type: ignore[assignment]
    context_parallel._all_gather = spy("exchange", context_parallel._all_gather)
    lightning_triton.forward = spy("dq", lightning_triton.forward)
    lightning_triton.backward = spy("dk and dv", lightning_triton.backward)
    o.sum().backward()
    inside = ["exchange", "second stream", "dq", "end of second stream", "dk and dv"]
    assert seen == ["block", *inside, "end of block"]


@interpreted
def test_order_of_launches() -> None:
    run_ranks(2, order_of_launches)


@interpreted
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_kernel_that_sums_up_a_state(
    decay: str, before: bool, monkeypatch: pytest.MonkeyPatch, nan_filled_memory: None
) -> None:
    """Several parts, the last one shorter, some beyond the reach of a strong decay; grouped heads; odd widths."""
    from tnl.ops import states_triton

    monkeypatch.setattr(states_triton, "SHORTEST_PART", 32)
    monkeypatch.setattr(states_triton, "PROGRAMS", 8)  # four parts on the one processor
    inputs = Case(B=1, T=150, Hq=2, H=1, D=20, E=36, decay=decay).inputs(torch.float32)
    log_decay = inputs["log_decay"]
    if decay != "none":
        log_decay[..., 0] = -3.0
    weight, total = _log_weights(log_decay, slice(0, 150), before, inputs["q"])
    assert total.shape == (1, 2)
    for y, z in (("k", "v"), ("q", "do")):
        expected = _sum_up(inputs[y].double(), inputs[z].double(), weight.double(), before, 2, "torch").sum(0)
        for backend in ("triton", "torch"):
            assert relative_error(_sum_up(inputs[y], inputs[z], weight, before, 2, backend).sum(0), expected) < 1e-6


def strong_decay() -> None:
    """Nothing of the state that enters is left, and nothing overflows."""
    case = replace(PLAIN, decay="head")
    inputs = case.inputs(torch.float64)
    inputs["log_decay"] = torch.tensor([-800.0, -100.0, -1e-8, 0.0], dtype=torch.float64)
    expected, _ = lightning_attention(inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"])
    cuts = even(24)
    some = slice(cuts[dist.get_rank()], cuts[dist.get_rank() + 1])
    part = [inputs[n][:, some] for n in ("q", "k", "v")]
    o, final_state = lightning_attention_context_parallel(*part, inputs["log_decay"])
    torch.testing.assert_close(o, expected[:, some], rtol=1e-12, atol=1e-12)
    assert final_state is None


def sent_bytes() -> None:
    """What one rank hands to collectives, forward and backward, at two lengths; one exchange each way."""
    sent: list[int] = []
    all_gather = context_parallel._all_gather

    def counted(received: Tensor, part: Tensor, **options: Any) -> Any:
        sent.append(part.nbytes)
        return all_gather(received, part, **options)

    context_parallel._all_gather = counted
    for tokens in (3, 300):
        inputs = Case(B=2, T=tokens, Hq=4, H=2, D=5, E=3).inputs(torch.float32)
        leaves = [inputs[n].requires_grad_() for n in ("q", "k", "v")]
        lightning_attention_context_parallel(*leaves, inputs["log_decay"])[0].sum().backward()
    assert sent == [2 * 4 * (5 * 3 + 1) * 4, 2 * 4 * 5 * 3 * 4] * 2


def documents_apart() -> None:
    """The gradient of one document's outputs is zero, exactly, at every token of the others, on all ranks."""
    bounds, planted = [0, 20, 30, 48], 1
    inputs = replace(PLAIN, B=1, T=48, bounds=tuple(bounds)).inputs(torch.float64)
    first = dist.get_rank() * 48 // dist.get_world_size()
    tokens = torch.arange(first, first + 48 // dist.get_world_size())
    chosen = (tokens >= bounds[planted]) & (tokens < bounds[planted + 1])
    leaves = [inputs[n][:, tokens].requires_grad_() for n in ("q", "k", "v")]
    o, _ = lightning_attention_context_parallel(*leaves, inputs["log_decay"], cu_seqlens=inputs["cu_seqlens"])
    for leaf, gradient in zip(leaves, torch.autograd.grad(o[:, chosen].sum(), leaves), strict=True):
        assert (gradient[:, ~chosen] == 0).all()
        assert (gradient[:, chosen] != 0).any() or not chosen.any()
        assert leaf.shape == gradient.shape


def groups_of_two() -> None:
    """Ranks 0, 1 and ranks 2, 3 hold two different sequences."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = dist.get_rank() // 2
    inputs = PLAIN.inputs(torch.float64, seed=mine)
    expected, _ = lightning_attention(inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"])
    some = slice(0, 12) if dist.get_rank() % 2 == 0 else slice(12, 24)
    part = [inputs[n][:, some] for n in ("q", "k", "v")]
    o, _ = lightning_attention_context_parallel(*part, inputs["log_decay"], group=groups[mine])
    torch.testing.assert_close(o, expected[:, some], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="group: expected a group that this process is a member of"):
        lightning_attention_context_parallel(*part, group=groups[1 - mine])


def bad_arguments() -> None:
    x = PLAIN.inputs(torch.float32)
    q, k, v = x["q"][:1], x["k"][:1], x["v"][:1]
    for cu_seqlens, message in (
        (torch.tensor([0, 24]), r"expected values that rise from 0 to 48 \(2 ranks with T = 24\), got \[0, 24\]"),
        (torch.tensor([0, 30, 20, 48]), "rise from 0 to 48"),
        (torch.tensor([0.0, 48.0]), "cu_seqlens: expected .* of int32 or int64"),
    ):
        with pytest.raises(ValueError, match=message):
            lightning_attention_context_parallel(q, k, v, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"initial_state: expected \[1, 4, 5, 3\]"):
        lightning_attention_context_parallel(q, k, v, initial_state=torch.zeros(2, 4, 5, 3))
    with pytest.raises(ValueError, match=r"packed sequences need a batch of 1"):
        lightning_attention_context_parallel(x["q"], x["k"], x["v"], cu_seqlens=torch.tensor([0, 48]))
    with pytest.raises(ValueError, match="v: expected 2 heads"):
        lightning_attention_context_parallel(q, k, v[:, :, :1])


@pytest.mark.parametrize(
    ("ranks", "function"),
    [(2, strong_decay), (2, sent_bytes), (4, documents_apart), (4, groups_of_two), (2, bad_arguments)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_between_ranks(ranks: int, function: Any) -> None:
    run_ranks(ranks, function)


def test_without_a_process_group() -> None:
    x = PLAIN.inputs(torch.float32)
    with pytest.raises(ValueError, match="group: expected a process group"):
        lightning_attention_context_parallel(x["q"], x["k"], x["v"])


@needs_gpu
@pytest.mark.gpu
def test_second_stream_is_joined_after_an_error() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(1 << 20, device=device)

    def step() -> None:
        with context_parallel._beside(device) as second:
            with second:
                torch.cuda._sleep(100_000_000)  # 50 ms
                x.fill_(1.0)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        step()
    assert bool((x == 1.0).all())


@needs_gpu
@pytest.mark.gpu
def test_second_stream_in_a_graph() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x, y = torch.zeros(2, 1 << 20, device=device)

    def step() -> None:
        x.add_(1.0)
        with context_parallel._beside(device) as second, second:
            torch.add(x, 1.0, out=y)
        x.add_(y)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for expected in (3.0, 9.0, 21.0):  # x -> (x + 1) + (x + 2)
        assert bool((x == expected).all())
        graph.replay()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_kernel_that_sums_up_a_state_on_a_gpu(decay: str, dtype: torch.dtype) -> None:
    """Against float64, as close as the product of the same rounded operands by PyTorch."""
    case = Case(B=2, T=9001, Hq=4, H=2, D=256, E=128, decay=decay)
    inputs = case.inputs(dtype, "cuda")
    for before in (False, True):
        weight, _ = _log_weights(inputs["log_decay"], slice(0, case.T), before, inputs["q"])
        arguments = (weight.double(), before, case.Hq, "torch")
        expected = _sum_up(inputs["k"].double(), inputs["v"].double(), *arguments).sum(0)
        actual = _sum_up(inputs["k"], inputs["v"], weight, before, case.Hq, "triton").sum(0)
        assert relative_error(actual, expected) < 2 * torch.finfo(dtype).eps + 1e-6
        again = _sum_up(inputs["k"], inputs["v"], weight, before, case.Hq, "triton").sum(0)
        assert torch.equal(actual, again)


def compare_on_gpus() -> None:
    """bfloat16 over the GPUs against the same on one: as close as eager maths, three times for gradients."""
    for decay in DECAYS:
        for bounds, count in ((None, 1), (None, 4), ((0, 700, 3000, 4096), 1)):
            case = Case(B=1, T=4096, Hq=4, H=4, D=128, E=128, decay=decay, bounds=bounds, scale=1.0)
            inputs = case.inputs(torch.bfloat16, "cuda")
            reference = whole(case, {n: _widen(x) for n, x in inputs.items()}, False)
            single = _call(case, inputs, False, lightning_attention, "triton")
            cuts = even(4096)
            some = slice(cuts[dist.get_rank()], cuts[dist.get_rank() + 1])
            sliced = {"q", "k", "v", "do"} | ({"log_decay"} if decay == "token" else set())
            part = {n: x[:, some] if n in sliced else x for n, x in inputs.items()}
            for fixed in (False, True):
                with segments(count):
                    actual = _call(case, part, False, lightning_attention_context_parallel, "triton", fixed)
                for name in ("o", "dq", "dk", "dv"):
                    error = relative_error(actual[name], reference[name][:, some])
                    allowed = max(relative_error(single[name][:, some], reference[name][:, some]), 2**-9)
                    assert error <= (3 if name.startswith("d") else 2) * allowed, f"{name}: {error:.2e}, {allowed:.2e}"


@contextlib.contextmanager
def one_stream(device: torch.device) -> Iterator[Any]:
    """In place of ``_beside``."""
    yield contextlib.nullcontext()


def compare_streams() -> None:
    """Gradients have the same bits whether dq is computed on a second stream or not, several calls in a row."""
    beside, pieces = context_parallel._beside, 8192 * dist.get_world_size()
    for decay, bounds, count in (("head", None, 4), ("none", None, 1), ("token", (0, 700, 9000, pieces), 1)):
        case = Case(B=1, T=pieces, Hq=16, H=16, D=128, E=128, decay=decay, bounds=bounds, scale=1.0)
        inputs = case.inputs(torch.bfloat16, "cuda")
        some = slice(dist.get_rank() * 8192, (dist.get_rank() + 1) * 8192)
        sliced = {"q", "k", "v", "do"} | ({"log_decay"} if decay == "token" else set())
        part = {n: x[:, some] if n in sliced else x for n, x in inputs.items()}
        with segments(count):
            context_parallel._beside = one_stream
            expected = _call(case, part, True, lightning_attention_context_parallel, "triton", fixed=True)
            context_parallel._beside = beside
            calls = [
                _call(case, part, True, lightning_attention_context_parallel, "triton", fixed=True) for _ in range(8)
            ]
        for actual in calls:
            for name, value in expected.items():
                assert torch.equal(actual[name], value), name


def on_gpus(check: Any) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=rank, world_size=ranks)
    try:
        check()
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("check", [compare_on_gpus, compare_streams], ids=["equal one", "second stream"])
def test_two_gpus(check: Any) -> None:
    run_torchrun(2, on_gpus, check)
