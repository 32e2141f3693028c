"""A CSV of rows that grows while a benchmark runs, and from which it goes on after a stop."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """Rows in a file, each found again by its values under `keys`; a row is on disk when `add` returns."""

    def __init__(self, path: Path, keys: Iterable[str]) -> None:
        self.path = path
        self.keys = tuple(keys)
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def key(self, row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in self.keys)

    def has(self, row: Row) -> bool:
        return any(self.key(known) == self.key(row) for known in self.rows)

    def add(self, row: Row) -> None:
        self.rows = [known for known in self.rows if self.key(known) != self.key(row)] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(name for known in self.rows for name in known))
        draft = self.path.with_suffix(".part")
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        draft.replace(self.path)
