"""Steps of a server on pooled states against the operator on whole texts. Tiers T0, T1 (on a GPU the kernels), T3."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hopper import compile_for_hopper
from tests.numerics import assert_as_good_as_eager, eager
from tnl.ops import lightning_attention, lightning_triton
from tnl.serving.pooled import PooledStep, attend

HEADS, WIDTH, ROWS = 2, 16, 12
LENGTHS = (1, 5, 20, 36)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECAY = -torch.tensor([0.5, 0.01], device=DEVICE)


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """The kernels as they are on a GPU, interpreted elsewhere."""
    with torch.device(DEVICE):
        yield


def texts(parts: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    widths = (WIDTH * parts, WIDTH * parts, WIDTH)
    q, k, v = ([torch.randn(n, HEADS, width, generator=generator) for n in LENGTHS] for width in widths)
    return list(zip(q, k, v, strict=True))


def whole(text: tuple[Tensor, Tensor, Tensor], log_decay: Tensor | None) -> Tensor:
    q, k, v = (x[None] for x in text)
    return lightning_attention(q, k, v, log_decay)[0][0]


def one_step(
    decodes: list[int],
    prefills: dict[int, int],
    read: list[int],
    inputs: list[tuple[Tensor, Tensor, Tensor]],
    pools: list[Tensor],
    rows: list[list[int]],
    log_decay: Tensor | None,
    padding: int = 0,
    backend: str = "auto",
) -> dict[int, Tensor]:
    """Outputs by text; `read` moves on. `padding` rows and tokens come after the decodes, as in a CUDA graph."""
    counts = dict.fromkeys(decodes, 1) | prefills
    pieces = [[x[read[i] : read[i] + n] for x in inputs[i]] for i, n in counts.items()]
    filler = [x.new_full((padding, *x.shape[1:]), torch.nan) for x in inputs[0]]
    q, k, v = (torch.cat([*(piece[j] for piece in pieces), filler[j]]) for j in range(3))
    output = torch.full_like(v, torch.nan)
    steps = [
        PooledStep.of(
            torch.tensor([at[i] for i in decodes] + [-1] * padding, dtype=torch.int32),
            torch.tensor([at[i] for i in prefills], dtype=torch.int64),
            torch.tensor(list(prefills.values()), dtype=torch.int64, device="cpu"),
        )
        for at in rows
    ]
    attend(steps, q, k, v, log_decay, pools, output, backend)
    found = {}
    begin = 0
    for i, n in counts.items():
        found[i] = output[begin : begin + n]
        begin, read[i] = begin + n, read[i] + n
    return found


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("log_decay", [None, DECAY], ids=["no decay", "decay"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_chunks_and_decodes_mixed_equal_the_whole(parts: int, log_decay: Tensor | None, backend: str) -> None:
    inputs, rows, read = texts(parts), [[7, 2, 11, 5], [0, 9, 7, 3]][:parts], [0] * len(LENGTHS)
    pools = [torch.full((ROWS, HEADS, WIDTH, WIDTH), torch.nan) for _ in range(parts)]  # a stranger's row is seen
    for pool, at in zip(pools, rows, strict=True):
        pool[at] = 0
    outputs: dict[int, list[Tensor]] = {i: [] for i in range(len(LENGTHS))}
    while any(done < length for done, length in zip(read, LENGTHS, strict=True)):
        going = [i for i, length in enumerate(LENGTHS) if read[i] < length]
        decodes = [i for i in going if read[i] == 0 and LENGTHS[i] == 1] + [i for i in going if read[i] >= 20]
        prefills = {i: min(12, LENGTHS[i] - read[i]) for i in going if i not in decodes}
        if read[3] > 28:  # the rest is decoded alone, padded
            decodes, prefills = [3], {}
        padding = 0 if prefills else 2
        for i, found in one_step(decodes, prefills, read, inputs, pools, rows, log_decay, padding, backend).items():
            outputs[i].append(found)
    for i, text in enumerate(inputs):
        torch.testing.assert_close(torch.cat(outputs[i]), whole(text, log_decay), rtol=1e-4, atol=1e-4)
    for pool, at in zip(pools, rows, strict=True):
        assert pool[[row for row in range(ROWS) if row not in at]].isnan().all()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("lengths", [(150,), (70, 1, 100)], ids=["alone", "packed"])
def test_prefills_cut_in_segments(parts: int, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does with few heads; a state is handed over in the row of the pool that it came from."""
    from tnl.ops import tiling_triton

    monkeypatch.setattr(tiling_triton, "cut_sequence", lambda *_: (48, 16))
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), HEADS, WIDTH * n, generator=generator) for n in (parts, parts, 1))
    given = [torch.randn(ROWS, HEADS, WIDTH, WIDTH, generator=generator) for _ in range(parts)]
    nothing = torch.tensor([], dtype=torch.int32)
    rows = [torch.tensor(at[: len(lengths)]) for at in ([4, 9, 0], [9, 1, 8])][:parts]
    steps = [PooledStep.of(nothing, at, torch.tensor(lengths, device="cpu")) for at in rows]
    results = []
    for backend in ("torch", "triton"):
        pools, output = [pool.clone() for pool in given], torch.full_like(v, torch.nan)
        attend(steps, q, k, v, DECAY, pools, output, backend)
        results.append((output, *pools))
    for triton, right in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(triton, right, rtol=1e-4, atol=1e-4)


def test_tokens_after_the_step_are_left_alone() -> None:
    q, k, v = texts(1)[1]
    output = torch.full_like(v, 7.0)
    step = PooledStep.of(torch.tensor([], dtype=torch.int32), torch.tensor([0]), torch.tensor([3], device="cpu"))
    attend([step], q, k, v, DECAY, [torch.zeros(1, HEADS, WIDTH, WIDTH)], output)
    assert (output[3:] == 7).all()
    assert (output[:3] != 7).all()


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.bfloat16, "torch"), (torch.float16, "torch"), (torch.float16, "triton")]
)
def test_half_precision_with_two_pools_is_rounded_once(dtype: torch.dtype, backend: str) -> None:
    q, k, v = (x.to(dtype) for x in texts(2)[1])
    exact = whole((q.double(), k.double(), v.double()), DECAY.double())
    pools = [torch.zeros(1, HEADS, WIDTH, WIDTH) for _ in range(2)]
    rows, output = torch.zeros(1, dtype=torch.int32), torch.empty_like(v)
    nothing = torch.tensor([], dtype=torch.int64)
    empty = PooledStep.of(rows, nothing, nothing.cpu())
    for t in range(len(q)):
        attend([empty] * 2, q[t : t + 1], k[t : t + 1], v[t : t + 1], DECAY, pools, output[t : t + 1], backend)
    half_a_unit = torch.finfo(dtype).eps / 2
    assert ((output.double() - exact).abs() <= 1.01 * half_a_unit * exact.abs() + 1e-5).all()


def check_prefill(
    heads: int, width: int, lengths: tuple[int, ...], log_decay: Tensor | None, dtype: torch.dtype
) -> None:
    """Output and states of one prefill by the rule of the operator's tests; no other row of the pool is touched."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    tokens, requests = sum(lengths), len(lengths)
    q, k, v = (torch.randn(tokens, heads, width, generator=generator).to(dtype) for _ in range(3))
    pool = torch.full((2 * requests + 1, heads, width, width), torch.nan)
    rows = torch.randperm(len(pool), generator=generator)[:requests]
    states = torch.randn(requests, heads, width, width, generator=generator)
    pool[rows] = states
    output = torch.full_like(v, torch.nan)
    nothing = torch.tensor([], dtype=torch.int32)
    attend([PooledStep.of(nothing, rows, torch.tensor(lengths, device="cpu"))], q, k, v, log_decay, [pool], output,
           "triton")  # fmt: skip
    bounds = torch.tensor([0, *accumulate(lengths)])
    o, final = eager(q[None], k[None], v[None], log_decay, 1.0, states, bounds)
    exact, exact_final = lightning_attention(
        q[None].double(), k[None].double(), v[None].double(), None if log_decay is None else log_decay.double(),
        initial_state=states.double(), return_final_state=True, cu_seqlens=bounds, backend="torch",
    )  # fmt: skip
    assert exact_final is not None
    assert_as_good_as_eager(
        {"o": output, "final_state": pool[rows]}, {"o": o[0], "final_state": final},
        {"o": exact[0], "final_state": exact_final}, dtype,
    )  # fmt: skip
    assert pool[[i for i in range(len(pool)) if i not in rows.tolist()]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(100,), (70, 1, 64, 20)], ids=["alone", "packed"])
def test_prefill_is_as_good_as_eager(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    check_prefill(HEADS, WIDTH, lengths, DECAY, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["none", "head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(
    ("heads", "lengths", "cut"),
    [
        (17, (1, 700, 64, 1, 130, 2000, 65, 300), False),
        (5, tuple(range(1, 30)), False),
        (72, (2000,), False),
        (4, (3000,), True),
    ],
    ids=["mixed", "short", "alone", "alone, cut"],
)
def test_gpu_prefill(
    heads: int,
    lengths: tuple[int, ...],
    cut: bool,
    width: int,
    dtype: torch.dtype,
    decay: str,
    monkeypatch: pytest.MonkeyPatch,
    nan_filled_memory: None,
) -> None:
    """On a Hopper GPU around the walk in Gluon, but where a sequence is cut."""
    from tnl.serving import pooled_triton

    launch, launched = pooled_triton.launch_kernel, []

    def spy(kernel: Any, *arguments: Any) -> None:
        launched.append(kernel)
        launch(kernel, *arguments)

    monkeypatch.setattr(pooled_triton, "launch_kernel", spy)
    generator = torch.Generator(DEVICE).manual_seed(1)
    log_decay = -torch.rand(heads, generator=generator).square() if decay == "head" else None
    check_prefill(heads, width, lengths, log_decay, dtype)
    in_triton = cut or torch.cuda.get_device_capability() != (9, 0)
    assert [kernel is pooled_triton._prefill_kernel for kernel in launched] == [in_triton]


def test_walk_in_gluon_where_the_operator_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from tnl.serving import pooled_triton

    gluon = lightning_triton.IN_TRITON._replace(tiles=lightning_triton.Tiles(64, 64, 4, 2))
    monkeypatch.setattr(pooled_triton, "choose_kernels", lambda *_: (gluon, lightning_triton.IN_TRITON))

    def chosen(parts: int, split: bool) -> lightning_triton.Kernels:
        kernel, kernels = pooled_triton.choose_prefill_kernel(parts, 128, torch.bfloat16, torch.device(DEVICE), split)
        assert (kernel is pooled_triton._prefill_kernel) == (kernels is lightning_triton.IN_TRITON)
        return kernels

    assert chosen(1, False) is gluon
    assert chosen(1, True) is chosen(2, False) is lightning_triton.IN_TRITON


def test_walk_in_gluon_compiles_without_a_gpu() -> None:
    values = {
        "D": 128, "E": 128, "PARTS": 1, "DECAY": 1, "PACKED": True, "SPLIT": False, "PRECISION": "tf32",
        "BLOCK_T": 64, "BLOCK_D": 128, "BLOCK_C": 64,
    }  # fmt: skip
    compiled = compile_for_hopper("tnl.serving.pooled_triton:_kernel_in_gluon", 4, values)
    assert 2 * (compiled.shared + 1024) <= 228 * 1024, "two programs have room on a multiprocessor"
    assert compiled.products == 24
    assert compiled.spilled <= 256, "or a block's work waits for memory"
