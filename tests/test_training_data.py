"""Sources and token stores. Tier T0."""

import gzip
import lzma
import resource
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.ranks import run_ranks
from tnl.training.config import DataSettings, TokenizerSettings
from tnl.training.data import list_files, prepare_corpus, prepare_tokenizer, read_documents
from tnl.training.rows import IGNORED, PackedRows
from tnl.training.store import TokenStore
from tnl.training.tokenizer import TextEncoder, byte_tokenizer

END = 256


@pytest.fixture
def encoder() -> TextEncoder:
    return TextEncoder(byte_tokenizer())


def read_all(source: str | list[str], separator: str | None = None, column: str = "text") -> tuple[list, Counter[str]]:
    skipped: Counter[str] = Counter()
    sources = [source] if isinstance(source, str) else source
    documents = list(read_documents(sources, separator, column, skipped))
    contents = [d.content if isinstance(d.content, bytes) else d.content.encode() for d in documents]
    return contents, skipped


def write_corpus(folder: Path, count: int = 20) -> Path:
    """Documents of 0 to 3 lines, one of them empty, whose every byte says which document it is from."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:02d}.txt").write_bytes(bytes([65 + i]) * (i * 7 % 23))
    return folder


def store_of(folder: Path, encoder: TextEncoder, corpus: Path) -> TokenStore:
    store = prepare_corpus(DataSettings(train=str(corpus), held_out_fraction=0.0), encoder, folder, seed=0).train
    assert isinstance(store, TokenStore)
    return store


def test_files_plain_and_compressed_in_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "inner" / "b.txt.gz").write_bytes(gzip.compress(b"gzip"))
    (tmp_path / "inner" / "c.txt.xz").write_bytes(lzma.compress(b"xz"))
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "d.bin").write_bytes(b"\x7fELF\0\0")
    assert read_all(str(tmp_path)) == ([b"plain", b"gzip", b"xz"], Counter(binary=1))
    assert read_all(str(tmp_path / "**" / "*.txt*"))[0] == [b"plain", b"gzip", b"xz"]
    assert read_all([str(tmp_path / "inner" / "c.txt.xz"), str(tmp_path / "a.txt")])[0] == [b"xz", b"plain"]


@pytest.mark.parametrize("name", ["nothing.txt", "*.nothing", "empty_folder"])
def test_missing_sources_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(FileNotFoundError, match=name.replace("*", r"\*")):
        list_files(str(tmp_path / name))


def test_damaged_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    whole = gzip.compress(b"text" * 1000)
    (tmp_path / "a.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.xz").write_bytes(b"not xz")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe latin \xe9")
    lines = ['{"text": "one"}', "{broken", '{"other": 1}', '{"text": null}', '{"text": "two"}', '{"text": ""}']
    (tmp_path / "e.jsonl").write_text("\n".join(lines))
    contents, skipped = read_all(str(tmp_path))
    assert contents == [b"\xff\xfe latin \xe9", b"one", b"two"]
    assert skipped == Counter(unreadable=5, empty=2)


@pytest.mark.parametrize("separator", ["|", "<doc>", "\n\n"])
def test_separator_across_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    pieces = [b"a", b"", b"bcd" * 5, b"e", b"f"]
    (tmp_path / "x").write_bytes(separator.encode().join(pieces))
    for size in (1, 2, 3, 7, 1000):
        monkeypatch.setattr("tnl.training.data.READ_SIZE", size)
        contents, skipped = read_all(str(tmp_path / "x"), separator=separator)
        assert contents == [piece for piece in pieces if piece]
        assert skipped == Counter(empty=1)


def test_datasets_sources(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"body": ["first", "second", None]})
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "hub").mkdir()
    rows.to_json(str(tmp_path / "hub" / "train.jsonl"))
    names = ("saved", "rows.parquet")
    sources = [str(tmp_path / name) for name in names] + [f"datasets:{tmp_path / name}" for name in ("saved", "hub")]
    for source in sources:
        assert read_all(source, column="body") == ([b"first", b"second"], Counter(empty=1))
    with pytest.raises(ValueError, match=r"data.column: expected one of \['body'\].*got 'text'"):
        read_all(sources[0])
    with pytest.raises(ValueError, match="datasets:NAME"):
        read_all("datasets:a:b:c:d")


def test_store_keeps_every_byte_of_every_document(tmp_path: Path, encoder: TextEncoder) -> None:
    corpus = write_corpus(tmp_path / "text")
    (corpus / "zz.txt").write_bytes(bytes(range(1, 256)))
    store = store_of(tmp_path / "data", encoder, corpus)
    contents = read_all(str(corpus))[0]
    assert len(store) == len(contents)
    for document, content in enumerate(contents):
        assert store.tokens(document).tolist() == [END, *content, END]
    assert store.text_bytes.tolist() == [len(content) for content in contents]
    assert [Path(name).name for name in store.names()][-1] == "zz.txt"
    assert store.index["tokens"] == sum(len(content) + 2 for content in contents)


def test_held_out_documents_are_whole_and_not_trained_on(tmp_path: Path, encoder: TextEncoder) -> None:
    corpus_folder = write_corpus(tmp_path / "text")
    settings = DataSettings(train=str(corpus_folder), held_out_fraction=0.3)
    corpus = prepare_corpus(settings, encoder, tmp_path / "data", seed=3)
    assert corpus.held_out is not None
    train, held_out = set(corpus.train.names()), set(corpus.held_out.names())
    assert not train & held_out
    assert train | held_out == {str(p) for p in corpus_folder.iterdir() if p.stat().st_size}
    assert prepare_corpus(settings, encoder, tmp_path / "again", seed=3).held_out.names() == corpus.held_out.names()  # type: ignore[union-attr]
    tiny_share = DataSettings(train=str(corpus_folder), held_out_fraction=1e-6)
    smallest = prepare_corpus(tiny_share, encoder, tmp_path / "one", seed=3)
    assert smallest.held_out is not None
    assert (len(smallest.held_out), len(smallest.train)) == (1, len(train | held_out) - 1)


def test_corpus_is_written_once_and_again_when_a_file_changes(tmp_path: Path, encoder: TextEncoder) -> None:
    corpus = write_corpus(tmp_path / "text")
    first = store_of(tmp_path / "data", encoder, corpus)
    written = (first.folder / "tokens.bin").stat().st_mtime_ns
    again = store_of(tmp_path / "data", encoder, corpus)
    assert (again.folder, (again.folder / "tokens.bin").stat().st_mtime_ns) == (first.folder, written)
    (corpus / "00.txt").write_text("changed")
    changed = store_of(tmp_path / "data", encoder, corpus)
    assert changed.folder != first.folder
    assert changed.index["digest"] != first.index["digest"]


def test_interrupted_preparation_leaves_nothing(tmp_path: Path, encoder: TextEncoder) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"data.train: expected text, found none"):
        store_of(tmp_path / "data", encoder, tmp_path / "empty.txt")
    assert list((tmp_path / "data").iterdir()) == []


def test_bpe_is_trained_once(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    settings = TokenizerSettings(name="bpe", vocabulary_size=300)
    data = DataSettings(train=str(corpus))
    tokenizer = prepare_tokenizer(settings, data, tmp_path / "data")
    assert 258 < len(tokenizer) <= 300
    (folder,) = (tmp_path / "data").iterdir()
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    assert prepare_tokenizer(settings, data, tmp_path / "data").get_vocab() == tokenizer.get_vocab()
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written


def long_and_many_documents(folder: Path) -> None:
    """One document of ten million tokens, and a million of one byte."""
    (folder / "long.txt").write_bytes(b"abcdefgh" * 1_250_000)
    (folder / "many.txt").write_bytes(b"x\n" * 1_000_000)
    data = DataSettings(train=[str(folder / "many.txt"), str(folder / "long.txt")], separator="\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    corpus = prepare_corpus(data, TextEncoder(byte_tokenizer()), folder / "data", seed=0)
    store = corpus.train
    assert corpus.held_out is not None
    assert store.index["text_bytes"] + corpus.held_out.index["text_bytes"] == 11_000_000
    rows = PackedRows(store, 2048, seed=0)
    assert len(rows) == -(-store.index["tokens"] // 2048)
    predicted = sum(int((rows[i]["targets"] != IGNORED).sum()) for i in np.linspace(0, len(rows) - 1, 20, dtype=int))
    assert predicted > 20 * 2048 * 0.6
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 250, f"{grown:.0f} MiB more"


@pytest.mark.slow
def test_long_and_many_documents_in_bounded_memory(tmp_path: Path) -> None:
    run_ranks(1, long_and_many_documents, tmp_path)  # in a process of its own, whose memory is its own
