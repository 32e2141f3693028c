"""Shared settings of the tests: the Triton interpreter, the shared data folder, NaN in fresh memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of test data that is not part of the repository (TNL_SHARED moves it)."""
    folder = Path(os.environ.get("TNL_SHARED", REPOSITORY.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"test data is not at {folder} (set TNL_SHARED)")
    return folder


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that a kernel that leaves a value unwritten is seen."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(previous)
