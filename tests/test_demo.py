"""Pieces of `make demo`: the split of the library, the byte models it compares with. Tier T0."""

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.demo import byte_model_scores, copy_library, count_trigrams, interpolate


def test_library_is_split_by_whole_files(tmp_path: Path) -> None:
    library = tmp_path / "library"
    for i in range(100):
        (library / f"package{i % 3}").mkdir(parents=True, exist_ok=True)
        (library / f"package{i % 3}" / f"{i}.py").write_text(f"x = {i}\n")
    for left_out in ("site-packages/a.py", "test/b.py", "package0/c.txt"):
        (library / left_out).parent.mkdir(exist_ok=True)
        (library / left_out).write_text("no")
    (library / "empty.py").touch()
    train, held_out = copy_library(library, tmp_path / "demo")
    assert len(train) + len(held_out) == 100
    assert 0 < len(held_out) < 20
    assert not {p.name for p in train} & {p.name for p in held_out}
    assert copy_library(library, tmp_path / "demo") == (train, held_out)


def test_byte_models_are_distributions() -> None:
    trigrams = count_trigrams([b"abracadabra", b"abc"])
    assert trigrams.sum() == 14
    assert trigrams[ord("a"), ord("b"), ord("r")] == 2
    order_1 = interpolate(trigrams.sum(0), np.full(256, 1 / 256, dtype=np.float32))
    for probabilities in (order_1, interpolate(trigrams, order_1)):
        np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
        assert (probabilities > 0).all()
    # c(ab -> r) = 2, c(ab) = 3, two kinds of bytes follow ab
    expected = (2 + 2 * order_1[ord("b"), ord("r")]) / 5
    assert interpolate(trigrams, order_1)[ord("a"), ord("b"), ord("r")] == pytest.approx(expected)


def test_byte_models_of_known_entropy() -> None:
    """On a cycle of three bytes the next byte is sure given two; each byte alone has a third of the probability."""
    scores = byte_model_scores([b"abc" * 100_000], [b"abc" * 1000])
    assert scores["uniform"] == 8
    assert scores["order 0"] == pytest.approx(math.log2(3), abs=1e-3)
    assert scores["order 2 (Witten-Bell)"] < 0.01
