"""Benchmarks: cases, one runner, one plotter; results are CSV rows that name machine and versions."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = Path(os.environ.get("TNL_SHARED", REPOSITORY.parent / "shared")) / "data"
RESULTS = Path(__file__).parent / "results"
