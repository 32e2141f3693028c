"""Benchmarks of tnss: ``python -m benchmarks.structure_search CASE ...`` writes CSV, ``plot`` draws them."""

from benchmarks import RESULTS

FOLDER = RESULTS / "structure_search"
