"""Fits on disk: one sqlite file that any number of runs may share, and that a killed run goes on from."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Sequence

import safetensors.torch
import torch

from tnss.fit import ALS
from tnss.network import Network
from tnss.structure import Structure

_TABLE = """CREATE TABLE IF NOT EXISTS fits (
    problem TEXT, structure TEXT, repeat INTEGER, rse REAL, fits INTEGER, sweeps INTEGER, seconds REAL,
    converged INTEGER, cores BLOB, PRIMARY KEY (problem, structure, repeat))"""


def problem_name(tensor: torch.Tensor, weights: torch.Tensor | None, settings: ALS, seed: int) -> str:
    """A hash of all that a fit depends on but the structure: tensor, weights, solver settings, seed."""
    digest = hashlib.sha256(repr((tuple(tensor.shape), settings, seed)).encode())
    for array in (tensor, weights):
        digest.update(b"none" if array is None else array.to("cpu", torch.float64).contiguous().numpy().tobytes())
    return digest.hexdigest()


class Cache:
    """Fits by problem, structure and number of the repeat.

    Each :meth:`store` is one transaction, so a run killed at any moment leaves whole rows only. Several
    processes may write at once.

    Args:
        path: the file; made where it is not there.

    Raises:
        ValueError: the file is not one of these caches.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self._connection = sqlite3.connect(os.fspath(path), timeout=60.0)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(_TABLE)
        except sqlite3.Error as error:
            raise ValueError(f"cache: expected a file that tnss wrote or a new one, got {path!r}: {error}") from error

    def lookup(self, problem: str, structure: Structure, repeat: int = 0) -> Network | None:
        """The stored fit, or None."""
        row = self._connection.execute(
            "SELECT rse, fits, sweeps, seconds, converged, cores FROM fits "
            "WHERE problem = ? AND structure = ? AND repeat = ?",
            (problem, structure.key, repeat),
        ).fetchone()
        if row is None:
            return None
        tensors = safetensors.torch.load(row[5])
        cores = tuple(tensors[str(vertex)] for vertex in range(structure.vertices))
        rse, fits, sweeps, seconds, converged, _ = row
        return Network(structure, cores, rse, fits, sweeps, seconds, bool(converged))

    def store(self, problem: str, networks: Sequence[tuple[Network, int]]) -> None:
        """Add fits with the number of their repeat, all or none."""
        rows = [
            (
                problem,
                network.structure.key,
                repeat,
                network.rse,
                network.fits,
                network.sweeps,
                network.seconds,
                int(network.converged),
                safetensors.torch.save({str(v): core.contiguous() for v, core in enumerate(network.cores)}),
            )
            for network, repeat in networks
        ]
        with self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO fits VALUES (?,?,?,?,?,?,?,?,?)", rows)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
