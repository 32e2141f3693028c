"""The walk in Gluon: what it shares with the one in Triton (tier T0), and its results on a Hopper GPU (T3)."""

from importlib import import_module

import pytest
import torch

from tests.hopper import compile_for_hopper
from tests.marks import needs_hopper
from tests.numerics import Case, check
from tnl.ops import lightning_triton, tiling_triton

CONSTANTS = {
    "TRANSPOSED": False, "HAS_INITIAL": False, "STORE_FINAL": False, "HAS_DFINAL": False, "PACKED": False,
    "SPLIT": False, "NEED_DQ": True, "NEED_DINITIAL": False, "PRECISION": "tf32", "BLOCK_T": 64,
}  # fmt: skip


@pytest.mark.parametrize(("width", "products"), [(128, 24), (256, 40)], ids=str)
@pytest.mark.parametrize(("kernel", "decay", "walks"), [("_forward_kernel", 1, 1), ("_backward_kernel", 2, 3)], ids=str)
def test_compiles_without_a_gpu(kernel: str, decay: int, walks: int, width: int, products: int) -> None:
    warps = width // 32
    values = CONSTANTS | {"DECAY": decay, "NEED_DIFFERENCE": decay == 2, "BLOCK_C": width // 2, "D": width, "E": width}
    values |= {"BLOCK_D": width} | ({"BLOCK_E": width} if walks > 1 else {})
    compiled = compile_for_hopper(f"tnl.ops.lightning_gluon:{kernel}", warps, values)
    assert 8 // warps * (compiled.shared + 1024) <= 228 * 1024, "so many programs have room on a multiprocessor"
    assert compiled.products == walks * products
    assert compiled.spilled <= 512, "or a block's work waits for memory"


def test_is_chosen_on_hopper_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(lightning_triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    module = import_module("tnl.ops.lightning_gluon")
    names = {lightning_triton.IN_TRITON: "triton", module.IN_GLUON: "gluon", module.IN_GLUON_WIDE: "wide"}

    def options(
        D: int = 128,
        E: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device = gpu,
        backward: bool = False,
        per_token: bool = False,
        several: bool = False,
    ) -> str:
        choose = lightning_triton.choose_kernels.__wrapped__
        return " ".join(names[kernels] for kernels in choose(D, E, dtype, device, backward, per_token, several))

    assert options() == options(96, 80, torch.float16) == options(per_token=True) == "wide gluon triton"
    assert options(64, 64) == options(128, 64, torch.float16) == options(several=True) == "gluon triton"
    assert options(backward=True) == "wide gluon"
    assert options(backward=True, per_token=True) == "wide triton"
    assert options(backward=True, several=True) == "gluon"
    assert options(256, 256) == options(256, 128, backward=True) == options(64, 192, several=True) == "wide triton"
    assert options(device=cpu) == options(dtype=torch.float32) == options(E=512) == options(D=32) == "triton"
    assert options(64, 64, backward=True) == options(backward=True, per_token=True, several=True) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert options() == "triton"


@pytest.mark.parametrize(
    ("batch", "tokens", "columns", "split"),
    [(128, 512, 128, False), (160, 512, 64, False), (66, 512, 64, False), (15, 512, 32, True), (264, 64, 128, False)],
)
def test_kernels_that_fill_the_chip_come_first(
    batch: int, tokens: int, columns: int, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """132 multiprocessors: 160 programs of 128 columns leave 104 of 264 idle, 320 of 64 columns 76 of 396."""
    of_columns = [
        lightning_triton.IN_TRITON._replace(tiles=tiling_triton.Tiles(64, size, 4, 2), busy=0.7)
        for size in (128, 64, 32)
    ]
    monkeypatch.setattr(lightning_triton, "choose_kernels", lambda *_: tuple(of_columns))
    for module in (lightning_triton, tiling_triton):
        monkeypatch.setattr(module, "count_processors", lambda device: 132)
    q = torch.empty(batch, tokens, 1, 128)
    _, tiles, cut = lightning_triton._lay_out(q, 128, None, 1, False, None)
    assert (tiles.columns, cut.split) == (columns, split)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("segments", [None, (192, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize(
    "case",
    [
        Case(T=700, Hq=4, H=2, D=128, E=128),
        Case(T=700, Hq=4, H=2, D=64, E=64),
        Case(B=1, T=777, Hq=4, H=2, D=112, E=80, bounds=(0, 137, 137, 420, 777)),
        Case(T=700, Hq=4, H=2, D=256, E=256),
        Case(B=1, T=777, Hq=4, H=2, D=256, E=128, bounds=(0, 137, 137, 420, 777)),
        Case(B=1, T=777, Hq=4, H=2, D=96, E=200, bounds=(0, 137, 137, 420, 777)),
    ],
    ids=str,
)
def test_gpu_walk(
    case: Case,
    decay: str,
    dtype: torch.dtype,
    segments: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
    nan_filled_memory: None,
) -> None:
    """Whole, cut with a short first segment, and cut into equal ones."""
    several = case.bounds is not None
    options = lightning_triton.choose_kernels(case.D, case.E, dtype, torch.device("cuda", 0), False, False, several)
    assert len(options) > 1
    monkeypatch.setattr(lightning_triton, "choose_kernels", lambda *_: options[:1])  # where it is not quicker too
    monkeypatch.setattr(tiling_triton, "cut_sequence", lambda tokens, *_: segments or (tokens, tokens))
    monkeypatch.setattr(lightning_triton, "_plans", {})
    check(Case(**{**vars(case), "decay": decay}), "triton", dtype, "cuda")
