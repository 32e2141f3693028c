"""Checkpoints: everything a run needs to go on as if it had not stopped.

A checkpoint is the folder `step-00001000` with the shards of `torch.distributed.checkpoint` (model, optimiser, random
number generators) and `run.json` (step, scheduler, position in the data, what the run trains on, sizes of all files).
It is written under another name, flushed to the disk and then renamed: a folder of that name is complete, or was
damaged later, which the sizes show. Training waits only until everything is copied to the main memory; a thread writes.

`torch.distributed.checkpoint` keeps its index as a pickle: resume only from folders that you trust.
"""

import contextlib
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tnl.training.model import flush_to_disk
from tnl.training.parallel import Ranks

PREFIX = "step-"
UNFINISHED = ".unfinished-"


class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        folder: Where they lie.
        keep: How many of the newest are kept.
        ranks: The processes that write them together.
        warn: Called with one line for each checkpoint that is passed over.
        asynchronous: Whether `save` returns while a thread still writes.
    """

    def __init__(
        self, folder: Path, keep: int, ranks: Ranks, warn: Callable[[str], None], asynchronous: bool = True
    ) -> None:
        self.folder, self.keep, self.ranks, self.warn = folder, keep, ranks, warn
        self.asynchronous = asynchronous
        self._writing: _Writing | None = None
        self._group: torch.distributed.ProcessGroup | None = None

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first; a damaged one is named with what is wrong."""
        found = []
        for path in sorted(self.folder.glob(f"{PREFIX}*")):
            fault = find_fault(path)
            if fault is None:
                found.append(path)
            else:
                self.warn(f"skipped checkpoint {path}: {fault}")
        return found

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(iter(reversed(self.complete())), None)

    def save(self, step: int, record: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint and delete the oldest ones; waits for the one before to be written.

        Args:
            step: Names the checkpoint.
            record: What `run.json` holds, apart from the sizes of the files.
            model: Its (sharded) parameters are saved.
            optimizer: Its state is saved.

        Raises:
            OSError: As :meth:`finish`.
        """
        self.finish()
        path = self.folder / f"{PREFIX}{step:08d}"
        unfinished = self.folder / f"{UNFINISHED}{path.name}"
        if self.ranks.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover)
        self.ranks.wait()
        if self.ranks.mesh is not None and self._group is None:
            # The thread talks to the others at its own times, so not in the group of the steps.
            self._group = torch.distributed.new_group(backend="gloo")
        state = self._state(model, optimizer)
        self._writing = _Writing(path, unfinished, lambda: self._write(state, unfinished, path, record))
        if not self.asynchronous:
            self.finish()

    def _write(self, state: dict[str, Any], unfinished: Path, path: Path, record: dict[str, Any]) -> Callable[[], None]:
        """Copy the state to the main memory; what is left to do."""
        _expect_to_be_alone()
        future: Any = dcp.async_save(state, checkpoint_id=unfinished, process_group=self._group)

        def rest() -> None:
            getattr(future, "upload_completion", future).result()
            if self.ranks.is_first:  # all have written what is theirs: the first one got word of it
                self._finish(unfinished, path, record)

        return rest

    @property
    def failed(self) -> bool:
        """Whether this process knows that the checkpoint under way cannot be written; `finish` says why."""
        return self._writing is not None and self._writing.error is not None

    def finish(self) -> None:
        """Wait until the checkpoint under way is written; all processes call it together.

        Raises:
            OSError: It could not be written; nothing of it is left, older ones are whole.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.thread.join()
        error = writing.error
        if error is not None and not isinstance(error, Exception | CheckpointException):
            raise error
        reasons = [reason for reason in self.ranks.gather(error and _reason(error)) if reason]
        if reasons:
            if self.ranks.is_first:
                shutil.rmtree(writing.unfinished, ignore_errors=True)
            before = self.newest() or "none"
            raise OSError(
                f"cannot write checkpoint {writing.path} ({reasons[0]}); the newest complete one: {before}"
            ) from error

    def _finish(self, unfinished: Path, path: Path, record: dict[str, Any]) -> None:
        sizes = {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())}
        (unfinished / "run.json").write_text(json.dumps(record | {"files": sizes}, indent=1) + "\n")
        for file in unfinished.iterdir():
            flush_to_disk(file)
        flush_to_disk(unfinished)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one of the same step
        unfinished.rename(path)
        flush_to_disk(self.folder)
        for old in self.complete()[: -self.keep]:
            doomed = old.with_name(f"{UNFINISHED}{old.name}")
            old.rename(doomed)  # so that a kill in the middle leaves no half checkpoint under a good name
            shutil.rmtree(doomed)

    def load(self, path: Path, record: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Read a checkpoint into model, optimiser and (with as many processes) the random number generators."""
        same_ranks = record["ranks"] == self.ranks.size
        state = self._state(model, optimizer, with_generators=same_ranks)
        _expect_to_be_alone()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if same_ranks:
            set_generator_states(state["generators"][str(self.ranks.rank)])

    def _state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, with_generators: bool = True
    ) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        if with_generators:
            state["generators"] = {str(self.ranks.rank): generator_states()}
        return state


class _Writing:
    """A checkpoint that a thread writes.

    Attributes:
        path: Its name when it is complete.
        unfinished: Its name until then.
        thread: Ends when it is written, or cannot be.
        error: What went wrong.
    """

    def __init__(self, path: Path, unfinished: Path, begin: Callable[[], Callable[[], None]]) -> None:
        self.path, self.unfinished = path, unfinished
        self.error: BaseException | None = None
        self._rest: Callable[[], None] = lambda: None
        with self._noted():
            self._rest = begin()
        self.thread = threading.Thread(target=self._run, name=f"write {path.name}")
        self.thread.start()

    def _run(self) -> None:
        with self._noted():
            self._rest()

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # CheckpointException is one too
            self.error = error


def _reason(error: BaseException) -> str:
    """What went wrong in one line: the operating system's word where there is one behind the error."""
    failures = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    for first in (*failures, error):
        link: BaseException | None = first
        while link is not None:
            if isinstance(link, OSError):
                return str(link)
            link = link.__cause__ or link.__context__
    return (str(error) or repr(error)).strip().splitlines()[-1]


def _expect_to_be_alone() -> None:
    """No warning for a process without a process group; for good, since it may come from the thread that writes."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is whole: `run.json` is readable, files are there in full."""
    try:
        sizes = read_record(path)["files"]
    except (OSError, ValueError, KeyError):
        return "run.json is missing or damaged"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def read_record(path: Path) -> dict[str, Any]:
    """What `run.json` of a checkpoint holds."""
    return json.loads((path / "run.json").read_text())


def generator_states() -> dict[str, torch.Tensor]:
    """States of torch's random number generators in this process."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: dict[str, torch.Tensor]) -> None:
    """Put the random number generators into the states that `generator_states` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def differences(before: dict[str, Any], now: dict[str, Any], name: str = "") -> list[str]:
    """One line for each field in which two nested records differ."""
    lines = []
    for key in sorted(before.keys() | now.keys()):
        label, old, new = f"{name}{key}", before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{label}.")
        elif old != new:
            lines.append(f"{label} was {old!r} and is {new!r}")
    return lines
