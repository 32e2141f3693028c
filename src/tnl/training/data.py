"""From text to tokens on the disk.

Sources (files, folders, globs, `datasets`) give documents; a `TextEncoder` turns each into tokens; a `TokenStore`
keeps the tokens of all documents in a memory-mapped file.
"""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import lzma
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from transformers import PreTrainedTokenizerBase

from tnl.training.config import BPE, DataSettings, TokenizerSettings, as_list
from tnl.training.store import Document, JoinedStore, Store, TokenStore, TokenWriter
from tnl.training.tokenizer import TextEncoder, load_tokenizer, train_bpe

DATASETS_PREFIX = "datasets:"
STRUCTURED = {".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
COMPRESSED: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".xz": lzma.open}
READ_SIZE = 1 << 20
PREPARED = "prepared.json"  # says that a folder is what `tnl prepare` wrote, in full


# ---------------------------------------------------------------------------------------------------- sources


def list_files(source: str) -> list[Path]:
    """Files of a source: itself, all below a folder but hidden ones, or what a glob finds, in sorted order.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (p for p in sorted(path.rglob("*")) if not any(s.startswith(".") for s in p.relative_to(path).parts))
        files = [p for p in inside if p.is_file()]
    else:
        files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    if not files:
        raise FileNotFoundError(f"data: no such file, or an empty folder: {source}")
    return files


def describe_source(source: str) -> list[Any]:
    """What identifies a source without reading it: names, sizes and times of its files, or its `datasets` name."""
    if source.startswith(DATASETS_PREFIX):
        return [source]
    stats = [(str(path), path.stat()) for path in list_files(source)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def read_documents(
    sources: Iterable[str], separator: str | None, column: str, skipped: Counter[str]
) -> Iterator[Document]:
    """Documents of all sources in order; what cannot be read is counted in `skipped` by reason."""
    for source in sources:
        if source.startswith(DATASETS_PREFIX):
            documents = _read_dataset(source, column)
        elif is_saved_dataset(Path(source)):
            documents = read_rows(open_saved_dataset(source), source, column)
        else:
            files = list_files(source)
            documents = read_files(files, separator, column, skipped, sort_out=len(files) > 1)
        for document in documents:
            if document.content:
                yield document
            else:
                skipped["empty"] += 1


def read_files(
    files: list[Path], separator: str | None, column: str, skipped: Counter[str], sort_out: bool
) -> Iterator[Document]:
    """Documents of files; with `sort_out`, binary files are skipped and counted."""
    for path in files:
        suffix = (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix
        if suffix in STRUCTURED:
            yield from _read_structured(path, STRUCTURED[suffix], column)
            continue
        try:
            with COMPRESSED.get(path.suffix, open)(path, "rb") as file:
                if suffix == ".jsonl":
                    yield from read_json_lines(str(path), file, column, skipped)
                elif separator is not None:
                    pieces = _split(file, separator.encode())
                    yield from (Document(f"{path}#{i}", piece) for i, piece in enumerate(pieces))
                else:
                    content = file.read()
                    if sort_out and b"\0" in content[:8192]:
                        skipped["binary"] += 1
                    else:
                        yield Document(str(path), content)
        except (gzip.BadGzipFile, lzma.LZMAError, EOFError):
            skipped["unreadable"] += 1


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """`, skipped 3 empty, 1 unreadable`, or nothing where nothing was."""
    return ", skipped " + ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) if skipped else ""


def _split(file: BinaryIO, separator: bytes) -> Iterator[bytes]:
    """Pieces of a file between separators, holding one piece in memory."""
    if not separator:
        raise ValueError("data.separator: expected a text of at least one character, got ''")
    rest = bytearray()
    while chunk := file.read(READ_SIZE):
        seen = max(0, len(rest) - len(separator) + 1)  # a separator may lie across two reads
        rest += chunk
        if rest.find(separator, seen) >= 0:
            *pieces, rest = rest.split(separator)
            yield from map(bytes, pieces)
    if rest:
        yield bytes(rest)


def read_json_lines(source: str, lines: Iterable[bytes], column: str, skipped: Counter[str]) -> Iterator[Document]:
    """The text column of each line; a line without it is skipped and counted."""
    for number, line in enumerate(lines):
        try:
            text = json.loads(line)[column]
        except (ValueError, KeyError, TypeError):
            text = None
        if isinstance(text, str):
            yield Document(f"{source}#{number}", text.encode("utf-8", errors="replace"))
        else:
            skipped["unreadable"] += 1


def _read_structured(path: Path, kind: str, column: str) -> Iterator[Document]:
    import datasets

    rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    yield from read_rows(rows, str(path), column)


def _read_dataset(source: str, column: str) -> Iterator[Document]:
    yield from read_rows(open_dataset(source), source, column)


def open_dataset(source: str) -> Any:
    """The rows of `datasets:NAME[:CONFIGURATION[:SPLIT]]`, streamed."""
    import datasets

    name, *rest = source.removeprefix(DATASETS_PREFIX).split(":")
    configuration, split = (*rest, *([""] * (2 - len(rest))))[:2]
    if not name or len(rest) > 2:
        raise ValueError(f"data: expected datasets:NAME[:CONFIGURATION[:SPLIT]], got {source!r}")
    if is_saved_dataset(Path(name)):
        return open_saved_dataset(name, split).to_iterable_dataset()
    try:
        return datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"data: expected a dataset that can be read, got {source!r} ({reason})") from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def open_saved_dataset(folder: str, split: str = "") -> Any:
    """The rows of a folder that `datasets.save_to_disk` wrote."""
    import datasets

    rows = datasets.load_from_disk(folder)
    if isinstance(rows, datasets.DatasetDict):
        if (split or "train") not in rows:
            raise ValueError(f"data: expected one of the splits {sorted(rows)} of {folder}, got {split or 'train'!r}")
        rows = rows[split or "train"]
    return rows


def read_rows(rows: Iterable[dict[str, Any]], source: str, column: str) -> Iterator[Document]:
    """The text column of each row of a dataset."""
    for number, row in enumerate(rows):
        if column not in row:
            raise ValueError(f"data.column: expected one of {sorted(row)} in {source}, got {column!r}")
        yield Document(f"{source}#{number}", row[column] or "")


# ---------------------------------------------------------------------------------------------------- tokens


def batched(documents: Iterable[Document], most_bytes: int = 4 << 20, most: int = 10_000) -> Iterator[list[Document]]:
    """Groups of documents of about `most_bytes`, so that a tokenizer can work on several at once."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if size >= most_bytes or len(batch) >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def held_out_draw(seed: int, number: int, name: str) -> float:
    """A number in [0, 1) that depends on the seed and the document alone; held out is who draws a low one."""
    draw = hashlib.blake2b(f"{seed}/{number}/{name}".encode(), digest_size=6).digest()
    return int.from_bytes(draw, "big") / 2.0**48


def prepare_tokenizer(settings: TokenizerSettings, data: DataSettings, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the settings name; a BPE is trained on the training documents and kept in `folder`."""
    if settings.name != BPE:
        return load_tokenizer(settings.name)
    sources = as_list(data.train) or list(data.mixture)
    for source in filter(is_prepared, sources):
        raise ValueError(f"tokenizer.name: expected {source}/tokenizer for data that is prepared, got {BPE!r}")
    request = [settings.vocabulary_size, data.separator, data.column, [describe_source(s) for s in sources]]
    complete = folder / f"bpe-{digest_of(request)}"
    if not complete.is_dir():
        documents = read_documents(sources, data.separator, data.column, Counter())
        texts = (d.content if isinstance(d.content, str) else d.content.decode(errors="replace") for d in documents)
        with unfinished_folder(complete) as unfinished:
            train_bpe(texts, settings.vocabulary_size).save_pretrained(unfinished)
    return load_tokenizer(str(complete))


def digest_of(request: Any) -> str:
    """Short digest of something that JSON can write."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def unfinished_folder(complete: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when the block ends well, and is deleted when it does not."""
    unfinished = complete.with_name(f".unfinished-{complete.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        unfinished.rename(complete)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Corpus:
    """Training tokens, held-out tokens (None: nothing is held out), and what was skipped, by reason.

    Attributes:
        train: All training tokens.
        held_out: All held-out tokens.
        skipped: Number of documents, by reason.
        mixture: The training tokens of each source with its share of the rows; empty where there are no shares.
    """

    train: Store
    held_out: Store | None
    skipped: dict[str, int]
    mixture: tuple[tuple[Store, float], ...] = ()


def prepare_corpus(settings: DataSettings, encoder: TextEncoder, folder: Path, seed: int) -> Corpus:
    """Tokens of the training and the held-out documents.

    What `tnl prepare` wrote is opened where it is. Other sources are tokenized into `folder`, once: everything that
    decides the tokens names the sub-folder, which appears under that name when it is complete.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: The sources hold no text, or were prepared with another tokenizer.
    """
    if settings.mixture:
        return _mix(settings, encoder, folder, seed)
    sources = as_list(settings.train)
    for source in sources:
        if (Path(source) / "request.json").is_file() and not is_prepared(source):
            raise ValueError(f"data.train: expected a folder that `tnl prepare` finished, got {source}")
    prepared = [open_prepared(Path(source), encoder) for source in sources if is_prepared(source)]
    texts = [source for source in sources if not is_prepared(source)]
    if not prepared:
        return _tokenize(settings, encoder, folder, seed)
    if settings.held_out:
        held_out = DataSettings(train=settings.held_out, separator=settings.separator, column=settings.column)
        held_out = dataclasses.replace(held_out, held_out_fraction=0.0)
        prepared = [Corpus(part.train, None, part.skipped) for part in prepared]
        tested = prepare_corpus(held_out, encoder, folder, seed)
        prepared[0] = Corpus(prepared[0].train, tested.train, prepared[0].skipped)
    if texts:
        fraction = 0.0 if settings.held_out else settings.held_out_fraction
        rest = dataclasses.replace(settings, train=texts, held_out=[], held_out_fraction=fraction)
        prepared.append(_tokenize(rest, encoder, folder, seed))
    return prepared[0] if len(prepared) == 1 else _join(prepared)


def _mix(settings: DataSettings, encoder: TextEncoder, folder: Path, seed: int) -> Corpus:
    """One corpus a source, and their shares; given held-out text comes with the first one."""
    corpora: list[Corpus] = []
    for source in settings.mixture:
        alone = dataclasses.replace(settings, train=[source], mixture={})
        if settings.held_out and corpora:
            alone = dataclasses.replace(alone, held_out=[], held_out_fraction=0.0)
        corpus = prepare_corpus(alone, encoder, folder, seed)
        corpora.append(Corpus(corpus.train, None, corpus.skipped) if settings.held_out and corpora else corpus)
    joined = _join(corpora)
    total = sum(settings.mixture.values())
    shares = zip(corpora, settings.mixture.values(), strict=True)
    mixture = tuple((corpus.train, weight / total) for corpus, weight in shares)
    return dataclasses.replace(joined, mixture=mixture)


def _join(corpora: list[Corpus]) -> Corpus:
    held_out = [store for corpus in corpora if corpus.held_out is not None for store in _parts_of(corpus.held_out)]
    skipped: Counter[str] = sum((Counter(corpus.skipped) for corpus in corpora), Counter())
    train = JoinedStore([store for corpus in corpora for store in _parts_of(corpus.train)])
    return Corpus(train, JoinedStore(held_out) if held_out else None, dict(skipped))


def _parts_of(store: Store) -> list[TokenStore]:
    return store.stores if isinstance(store, JoinedStore) else [store]


def is_prepared(source: str) -> bool:
    """Whether a source is a folder that `tnl prepare` finished."""
    return (Path(source) / PREPARED).is_file()


def open_prepared(folder: Path, encoder: TextEncoder) -> Corpus:
    """The corpus that `tnl prepare` wrote.

    Raises:
        ValueError: It was written with another tokenizer.
    """
    record = json.loads((folder / PREPARED).read_text())
    if record["tokenizer"] != encoder.fingerprint:
        raise ValueError(
            f"tokenizer.name: expected the tokenizer that {folder} was prepared with (fingerprint "
            f"{record['tokenizer']}), which is in {folder / 'tokenizer'}, got one with {encoder.fingerprint}"
        )
    shards = sorted(folder.glob("shard-*"))
    if len(shards) != record["shards"]:
        raise ValueError(f"data: expected {record['shards']} shards in {folder}, found {len(shards)}")
    train, held_out = ([TokenStore(shard / name) for shard in shards] for name in ("train", "held_out"))
    held = JoinedStore(held_out)
    return Corpus(JoinedStore(train, record["digest"]), held if len(held) else None, record["skipped"])


def _tokenize(settings: DataSettings, encoder: TextEncoder, folder: Path, seed: int) -> Corpus:
    request = {
        "train": [describe_source(source) for source in as_list(settings.train)],
        "held_out": [describe_source(source) for source in as_list(settings.held_out)],
        "split": None if settings.held_out else [settings.held_out_fraction, seed],
        "separator": settings.separator,
        "column": settings.column,
        "tokenizer": encoder.fingerprint,
    }
    complete = folder / f"tokens-{digest_of(request)}"
    if not complete.is_dir():
        with unfinished_folder(complete) as unfinished:
            skipped = _write_corpus(settings, encoder, unfinished, seed)
            (unfinished / "request.json").write_text(json.dumps(request | {"skipped": skipped}, indent=1) + "\n")
    return open_corpus(complete)


def open_corpus(folder: Path) -> Corpus:
    """The corpus in a folder that `prepare_corpus` wrote."""
    held_out = TokenStore(folder / "held_out")
    skipped = json.loads((folder / "request.json").read_text())["skipped"]
    return Corpus(TokenStore(folder / "train"), held_out if len(held_out) else None, skipped)


def _write_corpus(settings: DataSettings, encoder: TextEncoder, folder: Path, seed: int) -> dict[str, int]:
    separate = bool(settings.held_out)
    skipped, lowest = _write_split(settings, encoder, folder, seed, 0.0 if separate else settings.held_out_fraction)
    if not separate and settings.held_out_fraction > 0 and lowest >= settings.held_out_fraction:
        # A small corpus, none of whose documents drew low enough: hold out the one that drew lowest.
        shutil.rmtree(folder)
        skipped, _ = _write_split(settings, encoder, folder, seed, math.nextafter(lowest, 1))
    if separate:
        sources = as_list(settings.held_out)
        writer = TokenWriter(folder / "held_out", encoder)
        for batch in batched(read_documents(sources, settings.separator, settings.column, skipped)):
            writer.write(batch)
        if not len(writer):
            raise ValueError(f"data.held_out: expected text, found none in {', '.join(sources)}")
        writer.close()
    return dict(skipped)


def _write_split(
    settings: DataSettings, encoder: TextEncoder, folder: Path, seed: int, fraction: float
) -> tuple[Counter[str], float]:
    """Write the training documents and, for a fraction above 0, the held-out ones; the lowest draw of several."""
    skipped: Counter[str] = Counter()
    train = TokenWriter(folder / "train", encoder)
    held_out = TokenWriter(folder / "held_out", encoder) if not settings.held_out else None
    seen, lowest = 0, 1.0
    for batch in batched(read_documents(as_list(settings.train), settings.separator, settings.column, skipped)):
        draws = [held_out_draw(seed, number, document.name) for number, document in enumerate(batch, start=seen)]
        seen, lowest = seen + len(batch), min(lowest, *draws)
        chosen = [draw < fraction for draw in draws]
        train.write([d for d, held in zip(batch, chosen, strict=True) if not held])
        if held_out is not None:
            held_out.write([d for d, held in zip(batch, chosen, strict=True) if held])
    if not len(train):
        sources = ", ".join(as_list(settings.train))
        raise ValueError(f"data.train: expected text, found none in {sources}{describe_skipped(skipped)}")
    train.close()
    if held_out is not None:
        held_out.close()
    return skipped, lowest if seen > 1 else 0.0
