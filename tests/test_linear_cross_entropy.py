"""Cross-entropy of a head in chunks: against its definition, in PyTorch (tier T0) and in Triton (T1; T3 on a GPU)."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tnl.ops import linear_cross_entropy as module
from tnl.ops.linear_cross_entropy import linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = 13, 8, 37


def example(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[[2, 5]] = -100
    return hidden_states.to(device, dtype), weight.to(device, dtype), labels.to(device)


def definition(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden_states @ weight.T, labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_loss_and_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.LOGITS_PER_CHUNK, "cpu", rows * VOCABULARY)
    hidden_states, weight, labels = example()
    results = []
    functions: list[Callable[..., Tensor]] = [linear_cross_entropy, definition]
    for function in functions:
        leaves = [x.clone().requires_grad_() for x in (hidden_states, weight)]
        loss = function(*leaves, labels)
        results.append([loss.detach(), *torch.autograd.grad(3 * loss, leaves)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_gradcheck_and_operator_checks() -> None:
    hidden_states, weight, labels = example()
    leaves = (hidden_states.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels), leaves)
    torch.library.opcheck(torch.ops.tnl.linear_cross_entropy, (*leaves, labels, -100, True, True))


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted(trained: tuple[bool, bool]) -> None:
    hidden_states, weight, labels = example()
    loss = linear_cross_entropy(hidden_states.requires_grad_(trained[0]), weight.requires_grad_(trained[1]), labels)
    assert loss.requires_grad == any(trained)
    if any(trained):
        loss.backward()
    for x, wanted in zip((hidden_states, weight), trained, strict=True):
        assert (x.grad is not None) == wanted


def test_a_float32_head_keeps_its_gradient_under_autocast() -> None:
    hidden_states, weight, labels = example(torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden_states, weight, labels)
        logits = F.linear(hidden_states, weight)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    wanted = F.cross_entropy(logits.float(), labels, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss, weight)[0], torch.autograd.grad(wanted, weight)[0], rtol=2e-2, atol=2e-2
    )


def test_all_labels_ignored() -> None:
    hidden_states, weight, labels = example()
    loss = linear_cross_entropy(hidden_states.requires_grad_(), weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden_states.grad is not None
    assert not hidden_states.grad.any()


def test_compiles_without_a_graph_break() -> None:
    hidden_states, weight, labels = example()
    compiled: Callable[..., Tensor] = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    leaves = (hidden_states.requires_grad_(), weight.requires_grad_())
    torch.testing.assert_close(compiled(*leaves, labels), linear_cross_entropy(*leaves, labels))


def test_bad_arguments_are_named() -> None:
    hidden_states, weight, labels = example()
    with pytest.raises(ValueError, match=r"hidden_states: expected \[M, d\].*\[13\]"):
        linear_cross_entropy(hidden_states[:, 0], weight, labels)
    with pytest.raises(ValueError, match=r"weight: expected \[V, 8\].*\[37, 7\]"):
        linear_cross_entropy(hidden_states, weight[:, 1:], labels)
    with pytest.raises(ValueError, match=r"labels: expected \[13\] of int64.*\[12\]"):
        linear_cross_entropy(hidden_states, weight, labels[1:])
    with pytest.raises(ValueError, match=r"labels: .*int32"):
        linear_cross_entropy(hidden_states, weight, labels.int())


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocabulary", [37, 4096, 5001])
def test_kernel_against_float64(dtype: torch.dtype, vocabulary: int) -> None:
    """At most twice the error of the same maths in PyTorch in the same dtype."""
    pytest.importorskip("triton")
    from tnl.ops import linear_cross_entropy_triton as kernel

    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(5, vocabulary, generator=generator)).to(DEVICE, dtype)
    labels = torch.tensor([0, vocabulary - 1, -100, 3, 20], device=DEVICE)
    results = {}
    for name, function, x in (
        ("kernel", kernel.chunk_cross_entropy, logits.clone()),
        ("eager", module._chunk_cross_entropy, logits.clone()),
        ("exact", module._chunk_cross_entropy, logits.double()),
    ):
        results[name] = (function(x, labels, -100, True), x)
    for ours, eager, exact in zip(*results.values(), strict=True):
        error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, eager))
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps * exact.abs().max().item()
    unchanged = logits.clone()
    torch.testing.assert_close(kernel.chunk_cross_entropy(unchanged, labels, -100, False), results["kernel"][0])
    assert torch.equal(unchanged, logits)


def test_kernel_marks_a_label_outside_and_reads_masked_logits() -> None:
    pytest.importorskip("triton")
    from tnl.ops import linear_cross_entropy_triton as kernel

    logits = torch.randn(3, 40, device=DEVICE)
    logits[1, 7:] = -float("inf")
    losses = kernel.chunk_cross_entropy(logits.clone(), torch.tensor([40, 3, -1], device=DEVICE), -100, True)
    assert losses.isnan().tolist() == [True, False, True]
    torch.testing.assert_close(losses[1], F.cross_entropy(logits[1], torch.tensor(3, device=DEVICE)))


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 with a float32 head over several chunks, at a real vocabulary: against float64."""
    monkeypatch.setitem(module.LOGITS_PER_CHUNK, "cuda", 300 * 64000)
    hidden_states = torch.randn(1000, 256, device="cuda", dtype=torch.bfloat16)
    weight = (0.1 * torch.randn(64000, 256, device="cuda")).bfloat16().float()
    labels = torch.randint(0, 64000, (1000,), device="cuda")
    labels[::7] = -100

    def eager(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = (hidden_states @ weight.to(hidden_states.dtype).T).to(weight.dtype)
        return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    results = []
    cases: list[tuple[Callable[..., Tensor], torch.dtype, torch.dtype]] = [
        (linear_cross_entropy, torch.bfloat16, torch.float32),
        (eager, torch.bfloat16, torch.float32),
        (eager, torch.float64, torch.float64),
    ]
    for function, hidden_dtype, weight_dtype in cases:
        leaves = [hidden_states.to(hidden_dtype).requires_grad_(), weight.to(weight_dtype).requires_grad_()]
        loss = function(*leaves, labels)
        results.append([loss.detach().double()] + [g.double() for g in torch.autograd.grad(loss, leaves)])
    for ours, eager, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 3 * (eager - exact).norm() + 1e-7 * exact.norm()
