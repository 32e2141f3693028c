"""From text to token shards, by several processes, going on where an earlier attempt stopped.

The sources are divided into pieces of about the same size; each piece becomes a shard, a folder with a `TokenStore` of
its training and of its held-out documents. A shard is written under another name and renamed when it is complete, so
that whatever ends a run, the next one writes the missing shards only. `prepared.json` comes last.
"""

import hashlib
import json
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tnl.training.checkpoint import differences
from tnl.training.config import DataSettings, PrepareSettings, make_folder
from tnl.training.data import (
    DATASETS_PREFIX,
    PREPARED,
    batched,
    describe_skipped,
    describe_source,
    held_out_draw,
    is_saved_dataset,
    list_files,
    open_dataset,
    open_saved_dataset,
    prepare_tokenizer,
    read_files,
    read_json_lines,
    read_rows,
    unfinished_folder,
)
from tnl.training.store import Document, TokenStore, TokenWriter
from tnl.training.tokenizer import TextEncoder, load_tokenizer


@dataclass(frozen=True)
class Piece:
    """What becomes one shard: some files, a span of bytes of one file, or one of several parts of a dataset.

    Attributes:
        source: The source as it was given.
        files: Files, in order; none for a dataset.
        span: First byte and the one behind the last; None for whole files.
        part: Which part of how many.
        sort_out: Whether binary files are skipped.
    """

    source: str
    files: tuple[str, ...] = ()
    span: tuple[int, int] | None = None
    part: tuple[int, int] = (0, 1)
    sort_out: bool = False


def prepare(settings: PrepareSettings) -> Path:
    """Write the shards that are not there yet; returns the folder.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: No text, or the folder holds shards of other sources or another tokenizer.
        OSError: A shard could not be written.
    """
    output, console = Path(settings.output), Console(stderr=True)
    make_folder("output", output)
    tokenizer = prepare_tokenizer(
        settings.tokenizer, DataSettings(settings.data, separator=settings.separator, column=settings.column), output
    )
    encoder = TextEncoder(tokenizer)
    request = {name: getattr(settings, name) for name in ("separator", "column", "held_out_fraction", "seed")}
    request |= {"shard_bytes": settings.shard_bytes, "tokenizer": encoder.fingerprint}
    request["sources"] = [describe_source(source) for source in settings.data]
    _check_request(output, request)
    if not (output / "tokenizer").is_dir():
        with unfinished_folder(output / "tokenizer") as unfinished:
            tokenizer.save_pretrained(unfinished)
    pieces = [piece for source in settings.data for piece in divide(source, settings)]
    missing = [(i, piece) for i, piece in enumerate(pieces) if not (output / f"shard-{i:05d}").is_dir()]
    if len(missing) < len(pieces):
        console.print(f"{len(pieces) - len(missing)} of {len(pieces)} shards are there already", highlight=False)
    _write_all(missing, len(pieces), settings, console)
    record = _finish(output, len(pieces), encoder)
    console.print(
        f"{output}: {record['tokens']:,} tokens in {record['documents']:,} documents, {record['held_out']:,} held out, "
        f"{record['shards']} shards{describe_skipped(record['skipped'])}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return output


def divide(source: str, settings: PrepareSettings) -> Iterator[Piece]:
    """The pieces of a source, the same each time."""
    if source.startswith(DATASETS_PREFIX):
        rows = open_dataset(source)
        yield from (Piece(source, part=(i, rows.num_shards)) for i in range(rows.num_shards))
    elif is_saved_dataset(Path(source)):
        rows = open_saved_dataset(source)
        parts = min(len(rows), max(1, math.ceil((rows.dataset_size or 0) / settings.shard_bytes)))
        yield from (Piece(source, part=(i, parts)) for i in range(parts))
    else:
        files = list_files(source)
        together: list[str] = []
        size = 0
        for path in files:
            more = path.stat().st_size
            if together and size + more > settings.shard_bytes:
                yield Piece(source, tuple(together), sort_out=len(files) > 1)
                together, size = [], 0
            if path.suffix == ".jsonl" and more > settings.shard_bytes:
                for begin in range(0, more, settings.shard_bytes):
                    yield Piece(source, (str(path),), (begin, min(begin + settings.shard_bytes, more)))
                continue
            together.append(str(path))
            size += more
        if together:
            yield Piece(source, tuple(together), sort_out=len(files) > 1)


def read_piece(piece: Piece, settings: PrepareSettings, skipped: Counter[str]) -> Iterator[Document]:
    """Documents of a piece, empty ones left out and counted."""
    for document in _read(piece, settings, skipped):
        if document.content:
            yield document
        else:
            skipped["empty"] += 1


def _read(piece: Piece, settings: PrepareSettings, skipped: Counter[str]) -> Iterator[Document]:
    index, parts = piece.part
    if piece.span is not None:
        yield from _read_span(Path(piece.files[0]), piece.span, settings.column, skipped)
    elif piece.files:
        files = [Path(name) for name in piece.files]
        yield from read_files(files, settings.separator, settings.column, skipped, piece.sort_out)
    elif piece.source.startswith(DATASETS_PREFIX):
        rows = open_dataset(piece.source).shard(num_shards=parts, index=index)
        yield from read_rows(rows, f"{piece.source}[{index}/{parts}]", settings.column)
    else:
        rows = open_saved_dataset(piece.source).shard(num_shards=parts, index=index, contiguous=True)
        yield from read_rows(rows, f"{piece.source}[{index}/{parts}]", settings.column)


def _read_span(path: Path, span: tuple[int, int], column: str, skipped: Counter[str]) -> Iterator[Document]:
    """Documents of the lines that begin within a span of a file."""
    with path.open("rb") as file:
        if span[0]:
            file.seek(span[0] - 1)
            file.readline()  # the rest of a line that began before, or the end of one

        def lines() -> Iterator[bytes]:
            while file.tell() < span[1] and (line := file.readline()):
                yield line

        yield from read_json_lines(f"{path}[{span[0]}]", lines(), column, skipped)


def write_shard(number: int, piece: Piece, settings: PrepareSettings) -> int:
    """Write one shard; returns its tokens."""
    output = Path(settings.output)
    encoder = TextEncoder(load_tokenizer(str(output / "tokenizer")))
    skipped: Counter[str] = Counter()
    with unfinished_folder(output / f"shard-{number:05d}") as unfinished:
        writers = {name: TokenWriter(unfinished / name, encoder) for name in ("train", "held_out")}
        for batch in batched(read_piece(piece, settings, skipped)):
            held = [held_out_draw(settings.seed, 0, d.name) < settings.held_out_fraction for d in batch]
            for name, writer in writers.items():
                writer.write([d for d, out in zip(batch, held, strict=True) if out == (name == "held_out")])
        for writer in writers.values():
            writer.close()
        (unfinished / "skipped.json").write_text(json.dumps(skipped))
    return TokenStore(output / f"shard-{number:05d}" / "train").index["tokens"]


def _check_request(output: Path, request: dict[str, Any]) -> None:
    path = output / "request.json"
    if path.is_file():
        changes = differences(json.loads(path.read_text()), json.loads(json.dumps(request)))
        if changes:
            raise ValueError(f"output: expected a new folder, {output} is prepared from something else: {changes[0]}")
    unfinished = path.with_name(".unfinished-request.json")
    unfinished.write_text(json.dumps(request))
    unfinished.replace(path)


def _write_all(missing: list[tuple[int, Piece]], pieces: int, settings: PrepareSettings, console: Console) -> None:
    processes = min(settings.processes or os.cpu_count() or 1, len(missing))
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=pieces, completed=pieces - len(missing))
        tokens = 0

        def done(more: int) -> None:
            nonlocal tokens
            tokens += more
            progress.update(task, advance=1, description=f"{tokens / 1e6:,.1f}M tokens")

        if processes <= 1:
            for number, piece in missing:
                done(write_shard(number, piece, settings))
            return
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are parallel themselves
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tnl.training.prepare"])
        with ProcessPoolExecutor(processes, context) as pool:
            futures: list[Future[int]] = [pool.submit(write_shard, *each, settings) for each in missing]
            try:
                for future in as_completed(futures):
                    done(future.result())
            except BrokenProcessPool as error:
                raise OSError(f"a process that wrote into {settings.output} died; the same command goes on") from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _finish(output: Path, shards: int, encoder: TextEncoder) -> dict[str, Any]:
    folders = [output / f"shard-{i:05d}" for i in range(shards)]
    train, held_out = ([TokenStore(folder / name).index for folder in folders] for name in ("train", "held_out"))
    skipped: Counter[str] = Counter()
    for folder in folders:
        skipped.update(json.loads((folder / "skipped.json").read_text()))
    record = {
        "shards": shards,
        "documents": sum(index["documents"] for index in train),
        "tokens": sum(index["tokens"] for index in train),
        "text_bytes": sum(index["text_bytes"] for index in train),
        "held_out": sum(index["documents"] for index in held_out),
        "skipped": dict(sorted(skipped.items())),
        "tokenizer": encoder.fingerprint,
        "digest": hashlib.sha256(",".join(index["digest"] for index in train).encode()).hexdigest()[:16],
    }
    if not record["documents"]:
        raise ValueError(f"data: expected text, found none for {output}{describe_skipped(skipped)}")
    unfinished = output / f".unfinished-{PREPARED}"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(output / PREPARED)
    return record
