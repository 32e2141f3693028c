"""Tokens of documents on the disk: written by a `TokenWriter`, memory-mapped by a `TokenStore`."""

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tnl.training.tokenizer import TextEncoder


class Document(NamedTuple):
    """One text: `name` says where it is from, `content` is UTF-8 bytes or a string."""

    name: str
    content: bytes | str


class TokenStore:
    """Tokens of many documents in one memory-mapped file, opened from the folder that `TokenWriter` wrote.

    Attributes:
        folder: Where it lies.
        lengths: Tokens of each document, [N] int64.
        text_bytes: UTF-8 bytes of each document, [N] int64.
        index: What `index.json` says: counts, the tokenizer's fingerprint, a digest of the tokens.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, Any] = json.loads((folder / "index.json").read_text())
        # Views as plain arrays: slices of the class memmap take several times as long.
        documents = np.asarray(np.load(folder / "documents.npy", mmap_mode="r", allow_pickle=False))
        self.lengths, self.text_bytes = documents[:, 0], documents[:, 1]
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        dtype = np.dtype(self.index["dtype"])
        # An empty file cannot be mapped.
        empty = not self.index["tokens"]
        self._tokens = np.empty(0, dtype) if empty else np.asarray(np.memmap(folder / "tokens.bin", dtype, mode="r"))
        if len(self._tokens) != self._starts[-1]:
            raise ValueError(f"data: expected {self._starts[-1]} tokens in {folder}, found {len(self._tokens)}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> Path:
        return self.folder  # another process maps the file itself

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> npt.NDArray[np.unsignedinteger]:
        """Tokens [start, stop) of a document, as many as there are."""
        length = int(self.lengths[document])
        stop = length if stop is None else min(stop, length)
        first = int(self._starts[document])
        return self._tokens[first + start : first + stop]

    def names(self) -> list[str]:
        """Name of each document."""
        return [json.loads(line) for line in (self.folder / "names.jsonl").read_text().splitlines()]


class TokenWriter:
    """Writes documents into the folder of a `TokenStore`, a batch at a time."""

    def __init__(self, folder: Path, encoder: TextEncoder) -> None:
        folder.mkdir(parents=True)
        self._folder, self._encoder = folder, encoder
        self._tokens = (folder / "tokens.bin").open("wb")
        self._names = (folder / "names.jsonl").open("w")
        self._documents = array("q")  # tokens and bytes of each, in turn
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._documents) // 2

    def write(self, batch: list[Document]) -> None:
        """Encode documents and append them."""
        encoded = self._encoder.encode([document.content for document in batch])
        for (_, content), tokens in zip(batch, encoded, strict=True):
            self._documents.append(len(tokens))
            self._documents.append(len(content.encode() if isinstance(content, str) else content))
        self._names.writelines(json.dumps(document.name) + "\n" for document in batch)
        raw = b"".join(tokens.tobytes() for tokens in encoded)
        self._digest.update(raw)
        self._tokens.write(raw)

    def close(self) -> None:
        """Finish the folder."""
        documents = np.frombuffer(self._documents, dtype=np.int64).reshape(-1, 2)
        self._digest.update(documents.tobytes())
        np.save(self._folder / "documents.npy", documents, allow_pickle=False)
        for file in (self._tokens, self._names):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        index = {
            "documents": len(documents),
            "tokens": int(documents[:, 0].sum()),
            "text_bytes": int(documents[:, 1].sum()),
            "dtype": self._encoder.dtype.name,
            "tokenizer": self._encoder.fingerprint,
            "digest": self._digest.hexdigest()[:16],
        }
        (self._folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


class JoinedStore:
    """Several stores as one, their documents one after another; what a `TokenStore` gives, from all of them.

    Attributes:
        stores: The stores.
        lengths: Tokens of each document, [N] int64.
        text_bytes: UTF-8 bytes of each document, [N] int64.
        index: Counts and digest of all, and the tokenizer's fingerprint.
    """

    def __init__(self, stores: Sequence[TokenStore], digest: str | None = None) -> None:
        """All stores must be of one tokenizer; `digest` is given where that of all stores is known."""
        self.stores = list(stores)
        self.lengths = np.concatenate([store.lengths for store in stores])
        self.text_bytes = np.concatenate([store.text_bytes for store in stores])
        self._firsts = np.concatenate([[0], np.cumsum([len(store) for store in stores])])
        digests = ",".join(store.index["digest"] for store in stores)
        self.index: dict[str, Any] = {
            "documents": len(self.lengths),
            "tokens": int(self.lengths.sum()),
            "text_bytes": int(self.text_bytes.sum()),
            "tokenizer": stores[0].index["tokenizer"],
            "digest": digest or hashlib.sha256(digests.encode()).hexdigest()[:16],
        }

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> npt.NDArray[np.unsignedinteger]:
        """Tokens [start, stop) of a document, as many as there are."""
        place = int(np.searchsorted(self._firsts, document, side="right")) - 1
        return self.stores[place].tokens(document - int(self._firsts[place]), start, stop)

    def names(self) -> list[str]:
        """Name of each document."""
        return [name for store in self.stores for name in store.names()]


Store = TokenStore | JoinedStore
