"""Rows cut from documents, and the loader that feeds them. Tier T0."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.test_training_data import END, store_of, write_corpus
from tnl.training.rows import IGNORED, PackedRows, RowSampler, collate, make_loader
from tnl.training.tokenizer import TextEncoder, byte_tokenizer


@pytest.fixture
def encoder() -> TextEncoder:
    return TextEncoder(byte_tokenizer())


@pytest.mark.parametrize("length", [2, 16, 64, 1000])
def test_rows_predict_every_token_once_within_its_document(tmp_path: Path, encoder: TextEncoder, length: int) -> None:
    """Documents differ in their bytes, so a target from another document, or a skipped one, would show."""
    store = store_of(tmp_path / "data", encoder, write_corpus(tmp_path / "text"))
    rows = PackedRows(store, length, seed=1)
    for epoch in range(2):
        counted: Counter[int] = Counter()
        for item in range(epoch * len(rows), (epoch + 1) * len(rows)):
            row = {name: value.tolist() for name, value in rows[item].items()}
            for t, (token, target, position) in enumerate(
                zip(row["input_ids"], row["targets"], row["position_ids"], strict=True)
            ):
                if target == IGNORED:
                    continue
                counted[target] += 1
                assert target in (token, END) or token == END  # a document repeats one letter
                same_document = t + 1 < length and row["position_ids"][t + 1] == position + 1
                assert same_document or t + 1 == length
                if same_document:
                    assert row["input_ids"][t + 1] == target
        expected: Counter[int] = Counter()
        for document in range(len(store)):
            expected.update(store.tokens(document)[1:].tolist())
        assert counted == expected


def test_epochs_are_shuffled_by_the_seed_alone(tmp_path: Path, encoder: TextEncoder) -> None:
    store = store_of(tmp_path / "data", encoder, write_corpus(tmp_path / "text"))

    def epoch(seed: int, number: int) -> list[int]:
        rows = PackedRows(store, 32, seed)
        items = range(number * len(rows), (number + 1) * len(rows))
        return list(itertools.chain.from_iterable(rows[item]["input_ids"].tolist() for item in items))

    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(1, 1)
    assert epoch(1, 0) != epoch(2, 0)


def test_collate_marks_documents(tmp_path: Path) -> None:
    def row(positions: list[int]) -> dict[str, torch.Tensor]:
        values = torch.tensor(positions)
        return {"input_ids": values + 7, "targets": values, "position_ids": values}

    batch = collate([row([0, 1, 2, 3]), row([0, 1, 0, 1])])
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 6, 8]
    assert batch["position_ids"].shape == (2, 4)
    assert collate([row([0, 1, 2]), row([0, 1, 2])]).keys() == {"input_ids", "targets"}


def test_processes_share_rows_without_overlap() -> None:
    def taken(micro_batch_size: int, ranks: int, batches: int) -> list[int]:
        samplers = [iter(RowSampler(micro_batch_size, rank, ranks)) for rank in range(ranks)]
        return sorted(i for _ in range(batches) for sampler in samplers for i in next(sampler))

    assert taken(4, 1, 3) == taken(2, 2, 3) == taken(1, 2, 6) == list(range(12))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_goes_on_after_any_batch(tmp_path: Path, encoder: TextEncoder, workers: int) -> None:
    rows = PackedRows(store_of(tmp_path / "data", encoder, write_corpus(tmp_path / "text")), 16, seed=0)

    def inputs(batches: "itertools.islice[dict[str, torch.Tensor]]") -> list[list[list[int]]]:
        return [batch["input_ids"].tolist() for batch in batches]

    loader = make_loader(rows, RowSampler(2, 1, 2), workers)
    batches = iter(loader)
    inputs(itertools.islice(batches, 5))
    state = json.loads(json.dumps(loader.state_dict()))
    expected = inputs(itertools.islice(batches, 4))

    resumed = make_loader(rows, RowSampler(2, 1, 2), workers)
    resumed.load_state_dict(state)
    assert inputs(itertools.islice(resumed, 4)) == expected
    by_position = RowSampler(2, 1, 2)
    by_position.rows_taken = 5 * 2 * 2
    assert inputs(itertools.islice(make_loader(rows, by_position, 0), 4)) == expected
