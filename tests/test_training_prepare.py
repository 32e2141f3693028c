"""Token shards: complete, resumable, in parallel, checked against the tokenizer; mixtures of them. Tier T0."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from tnl.cli import main
from tnl.training import loop, prepare
from tnl.training.config import DataSettings, ModelSettings, PrepareSettings, TokenizerSettings, TrainSettings
from tnl.training.data import open_prepared, prepare_corpus
from tnl.training.rows import MixedRows, PackedRows, make_rows
from tnl.training.tokenizer import TextEncoder, byte_tokenizer


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Twelve files of one document each, a file of many, a saved dataset and one to stream."""
    folder = tmp_path / "texts"
    (folder / "files").mkdir(parents=True)
    for i in range(12):
        (folder / "files" / f"{i:02d}.txt").write_text(f"file {i} " * (i + 1))
    lines = [json.dumps({"text": f"line {i} " * (i % 7 + 1)}) for i in range(40)]
    (folder / "many.jsonl").write_text("\n".join([*lines, "{broken", json.dumps({"text": ""})]))
    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(30)]})
    rows.save_to_disk(str(folder / "saved"))
    (folder / "hub").mkdir()
    for part in range(2):
        rows.shard(2, part).to_parquet(str(folder / "hub" / f"train-{part}.parquet"))
    return folder


def sources(texts: Path) -> list[str]:
    return [str(texts / "files"), str(texts / "many.jsonl"), str(texts / "saved"), f"datasets:{texts / 'hub'}"]


def contents(folder: Path) -> Counter[str]:
    """Texts of all documents, training and held out."""
    corpus = open_prepared(folder, TextEncoder(byte_tokenizer()))
    stores = [corpus.train] + ([corpus.held_out] if corpus.held_out is not None else [])
    return Counter(bytes(s.tokens(i)[1:-1].tolist()).decode() for s in stores for i in range(len(s)))


EXPECTED = Counter(
    [f"file {i} " * (i + 1) for i in range(12)]
    + [f"line {i} " * (i % 7 + 1) for i in range(40)]
    + [f"row {i}" for i in range(30)] * 2
)


@pytest.mark.parametrize("shard_bytes", [37, 100, 450, 1 << 20])
def test_every_document_once_whatever_the_shards(texts: Path, tmp_path: Path, shard_bytes: int) -> None:
    settings = PrepareSettings(str(tmp_path / "out"), sources(texts), shard_bytes=shard_bytes, processes=1)
    settings = dataclasses.replace(settings, held_out_fraction=0.2)
    folder = prepare.prepare(settings)
    assert contents(folder) == EXPECTED
    record = json.loads((folder / "prepared.json").read_text())
    assert record["skipped"] == {"empty": 1, "unreadable": 1}
    assert 0 < record["held_out"] < 40
    assert record["shards"] == len(list(folder.glob("shard-*")))
    assert (record["shards"] > 50) == (shard_bytes == 37)


def test_two_processes_write_what_one_does(texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [*sources(texts), "--shard_bytes", "300", "--held_out_fraction", "0.1"]
    assert main(["prepare", str(tmp_path / "one"), *arguments, "--processes", "1"]) == 0
    assert main(["prepare", str(tmp_path / "two"), *arguments, "--processes", "2"]) == 0
    assert "skipped 1 empty, 1 unreadable" in capfd.readouterr().err
    one, two = (json.loads((tmp_path / name / "prepared.json").read_text()) for name in ("one", "two"))
    assert one == two


def test_interrupted_preparation_goes_on(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = PrepareSettings(str(tmp_path / "out"), sources(texts), shard_bytes=300, processes=1)
    whole = prepare.prepare(dataclasses.replace(settings, output=str(tmp_path / "whole")))
    read_piece = prepare.read_piece

    def disk_full(piece: prepare.Piece, *rest: Any) -> Any:
        yield from read_piece(piece, *rest)
        if "many" in piece.source:
            raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "read_piece", disk_full)
        with pytest.raises(OSError, match="No space left"):
            prepare.prepare(settings)
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    assert there
    assert not list((tmp_path / "out").glob(".unfinished*"))
    with pytest.raises(ValueError, match=r"data.train: expected a folder that `tnl prepare` finished"):
        prepare_corpus(DataSettings(str(tmp_path / "out")), TextEncoder(byte_tokenizer()), tmp_path, 0)
    prepare.prepare(settings)
    assert f"{len(there)} of " in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert (tmp_path / "out" / "prepared.json").read_text() == (whole / "prepared.json").read_text()


def test_another_request_is_refused(texts: Path, tmp_path: Path) -> None:
    settings = PrepareSettings(str(tmp_path / "out"), [str(texts / "files")], processes=1)
    prepare.prepare(settings)
    for change, message in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"tokenizer": TokenizerSettings("bpe", 300)}, "tokenizer was"),
        ({"data": [str(texts / "many.jsonl")]}, "sources was"),
    ):
        with pytest.raises(ValueError, match=f"output: expected a new folder, .*{message}"):
            prepare.prepare(dataclasses.replace(settings, **change))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="data: expected text, found none"):
        prepare.prepare(PrepareSettings(str(tmp_path / "none"), [str(tmp_path / "empty.txt")], processes=1))


def test_rows_of_shards_are_those_of_one_store(texts: Path, tmp_path: Path) -> None:
    encoder = TextEncoder(byte_tokenizer())
    data = DataSettings([str(texts / "files"), str(texts / "many.jsonl")], held_out_fraction=0.0)
    single = prepare_corpus(data, encoder, tmp_path / "single", seed=0)
    settings = PrepareSettings(str(tmp_path / "out"), list(data.train), shard_bytes=100, processes=1)
    prepare.prepare(dataclasses.replace(settings, held_out_fraction=0.0))
    sharded = prepare_corpus(DataSettings(str(tmp_path / "out")), encoder, tmp_path / "data", seed=0)
    assert not (tmp_path / "data").exists()
    ours, theirs = (PackedRows(corpus.train, 32, seed=3) for corpus in (sharded, single))
    assert len(ours) == len(theirs)
    for item in range(2 * len(ours)):
        for name, value in theirs[item].items():
            assert torch.equal(ours[item][name], value)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_row_make_the_row(texts: Path, tmp_path: Path, parts: int) -> None:
    """Tokens, targets and positions; boundaries are those of the whole row in each part."""
    data = DataSettings([str(texts / "files"), str(texts / "many.jsonl")], held_out_fraction=0.0)
    store = prepare_corpus(data, TextEncoder(byte_tokenizer()), tmp_path / "single", seed=0).train
    whole = PackedRows(store, 32, seed=3)
    divided = [PackedRows(store, 32, seed=3, part=(i, parts)) for i in range(parts)]
    for item in range(len(whole)):
        pieces = [rows[item] for rows in divided]
        for name, value in whole[item].items():
            assert torch.equal(torch.cat([piece[name] for piece in pieces]), value)
        starts = (whole[item]["position_ids"] == 0).nonzero().flatten().tolist()
        assert all(piece["cu_seq_lens_q"].tolist() == [*starts, 32] for piece in pieces)


def test_training_on_shards(texts: Path, tmp_path: Path) -> None:
    prepare.prepare(PrepareSettings(str(tmp_path / "out"), sources(texts), held_out_fraction=0.1, processes=1))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    settings = TrainSettings(
        str(tmp_path / "run"), ModelSettings("tiny", sizes), data=DataSettings(str(tmp_path / "out")), steps=2,
        sequence_length=32, batch_size=2, device="cpu",
    )  # fmt: skip
    assert loop.train(settings) is not None
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens"] > 0
    bpe = dataclasses.replace(settings, tokenizer=TokenizerSettings("bpe", 300), output=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=f"tokenizer.name: expected {tmp_path / 'out'}/tokenizer .*, got 'bpe'"):
        loop.train(bpe)
    prepare.prepare(
        PrepareSettings(str(tmp_path / "bpe"), sources(texts)[:2], TokenizerSettings("bpe", 300), processes=1)
    )
    wrong = dataclasses.replace(settings, data=DataSettings(str(tmp_path / "bpe")), output=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"tokenizer.name: expected the tokenizer that .*bpe was prepared with"):
        loop.train(wrong)
    right = dataclasses.replace(wrong, tokenizer=TokenizerSettings(str(tmp_path / "bpe" / "tokenizer")))
    assert loop.train(right) is not None


def test_mixture_has_its_shares(texts: Path, tmp_path: Path) -> None:
    encoder = TextEncoder(byte_tokenizer())
    prepare.prepare(PrepareSettings(str(tmp_path / "out"), [str(texts / "files")], held_out_fraction=0.0, processes=1))
    mixture = {str(tmp_path / "out"): 3.0, str(texts / "many.jsonl"): 1.0, str(texts / "saved"): 0.004}
    data = DataSettings(mixture=mixture, held_out_fraction=0.1)
    corpus = prepare_corpus(data, encoder, tmp_path / "data", seed=0)
    assert corpus.held_out is not None
    assert len(corpus.mixture) == 3
    rows = make_rows(corpus, 16, 5, (0, 1))
    assert isinstance(rows, MixedRows)
    assert rows.quotas.tolist() == [749, 250, 1]
    places = [rows.locate(i) for i in range(3000)]
    for source, count in enumerate(rows.quotas):
        assert [place for which, place in places if which == source] == list(range(3 * count))
        for period in range(3):
            assert sum(which == source for which, _ in places[1000 * period : 1000 * (period + 1)]) == count
    backwards = [make_rows(corpus, 16, 5, (0, 1)).locate(i) for i in (2999, 17, 1500)]  # type: ignore[union-attr]
    assert backwards == [places[2999], places[17], places[1500]]
    assert [make_rows(corpus, 16, 6, (0, 1)).locate(i) for i in range(50)] != places[:50]  # type: ignore[union-attr]
    text = bytes(rows[0]["input_ids"].clamp(max=255).tolist())
    assert (b"file" in text, b"line" in text) == (places[0][0] == 0, places[0][0] == 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_mixture_resumes_at_the_next_row_whatever_the_workers(texts: Path, tmp_path: Path, workers: int) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    mixture = {str(texts / "files"): 1.0, str(texts / "many.jsonl"): 2.0}
    settings = TrainSettings(
        str(tmp_path / "whole"), ModelSettings("tiny", sizes), data=DataSettings(mixture=mixture), steps=6,
        sequence_length=32, batch_size=2, device="cpu", log_every=1, checkpoint_every=3,
    )  # fmt: skip
    loop.train(settings)
    again = dataclasses.replace(settings, output=str(tmp_path / "again"))
    loop.train(dataclasses.replace(again, steps=3, optimizer=settings.optimizer))
    more = dataclasses.replace(again, resume=True, data=dataclasses.replace(again.data, workers=workers))
    loop.train(more)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "again")
    ]
    assert losses[1] == losses[0]
    other = dataclasses.replace(more, data=dataclasses.replace(more.data, mixture=dict.fromkeys(mixture, 1.0)))
    with pytest.raises(ValueError, match=r"mixture.* was 0.33"):
        loop.train(other)


def test_bad_mixtures_are_named(tmp_path: Path) -> None:
    for data, message in (
        (DataSettings(train="a", mixture={"b": 1.0}), "data.train: .*not in both"),
        (DataSettings(mixture={"a": 0.0}), "data.mixture: expected shares above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainSettings(str(tmp_path), data=data)


def test_rows_waste_less_than_a_hundredth(texts: Path, tmp_path: Path) -> None:
    """Of the positions of an epoch only those behind the last document predict nothing, and first tokens."""
    rng = np.random.default_rng(0)
    (tmp_path / "long.jsonl").write_text(
        "\n".join(json.dumps({"text": "x" * int(n)}) for n in rng.exponential(300, 1000) + 1)
    )
    data = DataSettings(str(tmp_path / "long.jsonl"), held_out_fraction=0.0)
    store = prepare_corpus(data, TextEncoder(byte_tokenizer()), tmp_path / "data", 0).train
    rows = PackedRows(store, 2048, seed=0)
    positions = len(rows) * 2048
    assert positions - store.index["tokens"] < 0.01 * positions
    targets = sum(int((rows[i]["targets"] != -100).sum()) for i in range(len(rows)))
    assert targets == store.index["tokens"] - len(store)
