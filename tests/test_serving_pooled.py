"""Steps of a server on pooled states against the operator on whole texts. Tiers T0, T1 (or the kernels on a GPU)."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tnl.ops import lightning_attention
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
