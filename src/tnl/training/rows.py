"""Rows of tokens for training: cut from the documents of a store, mixed in shares, fed to each process.

`PackedRows` cuts documents into rows of equal length, in an order that depends on the seed alone; `make_loader` feeds
each process its own rows.

A row is handed to the model as `input_ids` and `position_ids`. Positions begin again at 0 with every document (and
with every row), which is how transformers marks packed sequences: neither state nor attention crosses them.
"""

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tnl.training.data import Corpus
from tnl.training.store import Store

IGNORED = -100  # target of a position that predicts nothing

Batch = dict[str, torch.Tensor]


class PackedRows(torch.utils.data.Dataset[Batch]):
    """Rows of `sequence_length` tokens cut from the documents of a store, one after another.

    Row i of epoch e is a function of the store, the seed, i and e: documents are shuffled anew each epoch, laid end
    to end and cut, and the rows are shuffled, so that those of a step come from different documents. Only one row of
    an epoch is filled up. Every token but the first of a document is predicted once an epoch. Item
    `e * rows_per_epoch + i` holds `input_ids`, `targets` (the token that follows within the
    document, or IGNORED) and `position_ids`, each [T] int64. With a `part` of each row they are [T / n], and
    `cu_seq_lens_q` int32 has the boundaries of the documents in the whole row.
    """

    def __init__(self, store: Store, sequence_length: int, seed: int | None, part: tuple[int, int] = (0, 1)) -> None:
        """`seed` None keeps documents and rows in their order; `part` is (i, n) for the i-th n-th of each row."""
        self.store, self.sequence_length, self.seed, self.part = store, sequence_length, seed, part
        self.rows_per_epoch = -(-int(store.lengths.sum()) // sequence_length)
        self._positions = np.arange(sequence_length)
        self._epoch = functools.lru_cache(maxsize=2)(self._lay_out_epoch)

    def __len__(self) -> int:
        return self.rows_per_epoch

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("store", "sequence_length", "seed", "part")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _lay_out_epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], ...]:
        """Order of the documents [N], where each begins in the stream of tokens [N + 1], order of the rows."""
        order, rows = np.arange(len(self.store)), np.arange(self.rows_per_epoch)
        if self.seed is not None:
            generator = np.random.default_rng([self.seed, epoch])
            order, rows = generator.permutation(order), generator.permutation(rows)
        return order, np.concatenate([[0], np.cumsum(self.store.lengths[order])]), rows

    def __getitem__(self, item: int) -> Batch:
        epoch, place_in_epoch = divmod(item, self.rows_per_epoch)
        order, starts, rows = self._epoch(epoch)
        index, parts = self.part
        size = self.sequence_length // parts
        begin = index * size
        input_ids = np.zeros(size, dtype=np.int64)
        targets = np.full(size, IGNORED, dtype=np.int64)
        position_ids = self._positions[begin : begin + size].copy()
        first = int(rows[place_in_epoch]) * self.sequence_length
        place = int(np.searchsorted(starts, first, side="right")) - 1
        bounds = []  # where documents begin in the row
        filled = 0
        while filled < self.sequence_length and place < len(order):
            skipped = first + filled - int(starts[place])  # tokens of the document that are in rows before
            count = min(int(starts[place + 1]) - int(starts[place]) - skipped, self.sequence_length - filled)
            if count:
                bounds.append(filled)
            here = slice(max(filled, begin) - begin, min(filled + count, begin + size) - begin)
            if here.start < here.stop:
                begun = begin + here.start - filled  # position within the document, or the row
                wanted = skipped + begun, skipped + begun + here.stop - here.start
                # one token more than fits: the target of the last position
                tokens = self.store.tokens(int(order[place]), wanted[0], wanted[1] + 1)
                input_ids[here] = tokens[: here.stop - here.start]
                targets[here.start : here.start + len(tokens) - 1] = tokens[1:]
                position_ids[here] = self._positions[begun : begun + here.stop - here.start]
            filled += count
            place += 1
        arrays = {"input_ids": input_ids, "targets": targets, "position_ids": position_ids}
        if parts > 1:
            arrays["cu_seq_lens_q"] = np.array([*bounds, self.sequence_length], dtype=np.int32)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class MixedRows(torch.utils.data.Dataset[Batch]):
    """Rows of several sources in given shares.

    Every 1000 rows have the share of each source exactly (rounded to a row), in an order that depends on the seed and
    the number of the thousand alone; each source goes through its own epochs.
    """

    PERIOD = 1000

    def __init__(self, parts: list[PackedRows], shares: list[float], seed: int) -> None:
        self.parts, self.seed = parts, seed
        exact = np.array(shares) * self.PERIOD
        self.quotas = np.floor(exact).astype(int)
        self.quotas[np.argsort(np.floor(exact) - exact)[: self.PERIOD - self.quotas.sum()]] += 1
        self.quotas = np.maximum(self.quotas, 1)
        self.period = int(self.quotas.sum())
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def locate(self, item: int) -> tuple[int, int]:
        """Which source the item is from, and which item of that source it is."""
        period, place = divmod(item, self.period)
        if period not in self._orders:
            labels = np.repeat(np.arange(len(self.parts)), self.quotas)
            self._orders = {period: np.random.default_rng([self.seed, period]).permutation(labels)}
        order = self._orders[period]
        source = int(order[place])
        return source, period * int(self.quotas[source]) + int((order[:place] == source).sum())

    def __getitem__(self, item: int) -> Batch:
        source, place = self.locate(item)
        return self.parts[source][place]


Rows = PackedRows | MixedRows


def make_rows(corpus: Corpus, sequence_length: int, seed: int, part: tuple[int, int]) -> Rows:
    """The rows that a corpus is trained on, in their shares where it has any."""
    if not corpus.mixture:
        return PackedRows(corpus.train, sequence_length, seed, part)
    rows = [PackedRows(store, sequence_length, seed, part) for store, _ in corpus.mixture]
    return MixedRows(rows, [share for _, share in corpus.mixture], seed)


def collate(rows: list[Batch]) -> Batch:
    """A micro-batch [B, T] of rows [T], or of one part of a row.

    Where a row holds several documents, `cu_seq_lens_q` [N + 1] int32 has the boundaries of all documents in the rows
    laid end to end, for models that read it; where none does, positions are left out as well. With a part of a row
    come the boundaries of the whole row, and always the positions.
    """
    if "cu_seq_lens_q" in rows[0]:
        (row,) = rows
        bounds = row["cu_seq_lens_q"]
        batch = {name: value[None] for name, value in row.items() if name != "cu_seq_lens_q"}
        return batch | ({"cu_seq_lens_q": bounds} if len(bounds) > 2 else {})
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
    if len(starts) == len(rows):
        del batch["position_ids"]
    else:
        end = torch.tensor([batch["input_ids"].numel()])
        batch["cu_seq_lens_q"] = torch.cat([starts, end]).int()
    return batch


class RowSampler(torch.utils.data.Sampler[list[int]]):
    """Items of the micro-batches of one process, without end; its state is the number of rows all have taken.

    Together the processes take rows in order, whatever their number and that of micro-batches, so that a run can go
    on with another number of either.
    """

    def __init__(self, micro_batch_size: int, rank: int, ranks: int) -> None:
        self.micro_batch_size, self.rank, self.ranks = micro_batch_size, rank, ranks
        self.rows_taken = 0

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            first = self.rows_taken + self.rank * self.micro_batch_size
            self.rows_taken += self.ranks * self.micro_batch_size
            yield list(range(first, first + self.micro_batch_size))

    def state_dict(self) -> dict[str, int]:
        """Rows taken so far, over all processes."""
        return {"rows_taken": self.rows_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the rows of `state_dict`."""
        self.rows_taken = state["rows_taken"]


def make_loader(rows: Rows, sampler: RowSampler, workers: int) -> "StatefulDataLoader":  # type: ignore[name-defined]  # noqa: F821
    """A stateful loader of micro-batches {name: [B, T] int64}."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
        return StatefulDataLoader(
            rows, batch_sampler=sampler, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
        )
