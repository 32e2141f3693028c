"""Text for the experiments: one file to train on, whole books (or files) held out for validation and test.

The training books are laid end to end in one file, so that rows do not end with books: all models read the same rows
without any boundary in them.
"""

import lzma
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import SHARED_DATA
from tnl.training.data import unfinished_folder
from tnl.training.tokenizer import train_bpe

BETWEEN_BOOKS = b"\n\n\n"
MEGABYTE = 1_000_000
PYTHON_MEGABYTES = 80
HELD_OUT_SHARE = 0.015  # of the Python files, for validation and for test each
BPE_TOKENS = 16384


@dataclass(frozen=True)
class Corpus:
    """Where a corpus lies: `train.txt`, `validation.txt`, and a document a file under `validation/` and `test/`."""

    folder: Path

    @property
    def train(self) -> Path:
        return self.folder / "train.txt"

    @property
    def validation(self) -> Path:
        return self.folder / "validation.txt"

    def documents(self, split: str) -> list[Path]:
        """The documents of `validation` or `test`."""
        return sorted((self.folder / split).iterdir())

    @property
    def tokenizer(self) -> Path:
        """The BPE trained on the training text; `write_corpus` with `bpe` makes it."""
        return self.folder / "bpe"


def write_corpus(name: str, work: Path, bpe: bool = False, most: int | None = None) -> Corpus:
    """Lay a corpus out below `work`, once; several processes must not do so at the same time.

    Args:
        name: `novels` (all of them), `novels-20` (the first books that make up 20 MB, and so on) or `python`.
        work: Folder for what can be made again.
        bpe: Also train a BPE of 16,384 tokens on the training text.
        most: Most bytes of each part, to try things out.

    Raises:
        FileNotFoundError: The novels are not there.
    """
    folder = work / (name if most is None else f"{name}-{most}-bytes")
    if not folder.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        megabytes = int(name.removeprefix("novels-")) if name.startswith("novels-") else None
        parts = python_source() if name == "python" else novels(megabytes)
        with unfinished_folder(folder) as unfinished:
            _write(parts, unfinished, most)
    corpus = Corpus(folder)
    if bpe and not corpus.tokenizer.is_dir():
        with unfinished_folder(corpus.tokenizer) as unfinished:
            train_bpe(_pieces(corpus.train), BPE_TOKENS if most is None else 300).save_pretrained(unfinished)
    return corpus


def _write(parts: Iterator[tuple[str, str, bytes]], folder: Path, most: int | None) -> None:
    folder.mkdir()
    written = {"train": 0, "validation": 0, "test": 0}
    for split, name, content in parts:
        content = content[: None if most is None else max(0, most - written[split])]
        if not content:
            continue
        if split != "test":
            with (folder / f"{split}.txt").open("ab") as file:
                file.write((BETWEEN_BOOKS if written[split] else b"") + content)
        if split != "train":
            (folder / split).mkdir(exist_ok=True)
            (folder / split / name).write_bytes(content)
        written[split] += len(content)


def _pieces(path: Path) -> Iterator[str]:
    """A text in pieces of about a megabyte, which a tokenizer learns from side by side."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        while lines := file.readlines(MEGABYTE):
            yield "".join(lines)


def novels(megabytes: int | None) -> Iterator[tuple[str, str, bytes]]:
    """Split, name and text of each novel; those to train on, in the order of their names, as far as they fit."""
    source = SHARED_DATA / "novels"
    if not source.is_dir():
        raise FileNotFoundError(
            f"TNL_SHARED: expected the novels in {source}; docs/quality.md says where they are from"
        )
    taken = 0
    for split in ("train", "validation", "test"):
        for path in sorted((source / split).glob("*.txt.xz")):
            content = lzma.decompress(path.read_bytes())
            if split == "train":
                if megabytes is not None and taken + len(content) > megabytes * MEGABYTE:
                    continue
                taken += len(content)
            yield split, path.name.removesuffix(".xz"), content


def python_source() -> Iterator[tuple[str, str, bytes]]:
    """Split, name and text of the Python files of the standard library and of the installed packages.

    Files are held out by a hash of their names; those of a split that is evaluated are joined into documents of about
    a megabyte, so that there is long context to read.
    """
    paths = sysconfig.get_paths()
    folders = list(dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib")))
    held_out: dict[str, list[bytes]] = {"validation": [], "test": []}
    taken = 0
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).parts
            if folder == folders[0] and {"site-packages", "dist-packages"} & set(inside):
                continue
            content = path.read_bytes()
            draw = zlib.crc32("/".join(inside).encode()) / 2**32
            if not content or taken > PYTHON_MEGABYTES * MEGABYTE:
                continue
            taken += len(content)
            if draw < 2 * HELD_OUT_SHARE:
                held_out["validation" if draw < HELD_OUT_SHARE else "test"].append(content)
            else:
                yield "train", path.name, content
    for split, contents in held_out.items():
        joined = b"\n\n".join(contents)
        for number, start in enumerate(range(0, len(joined), MEGABYTE)):
            yield split, f"{number:02}.txt", joined[start : start + MEGABYTE]
