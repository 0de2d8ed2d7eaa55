"""What a killed run leaves its successor: a file of JSON lines, each true of what is on disk.

A unit's line is written only after the bytes that it stands for are synced. A line torn by the kill is dropped with all
that follows it, and the work it would have vouched for is done again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from lowbit.errors import CheckpointError

# A sync waits for the disk, so one serves this many bytes or seconds of work: what a kill may cost.
SYNC_BYTES: Final = 256 << 20
SYNC_SECONDS: Final = 5.0

# Rows of each tensor: ranges [start, stop) in order that neither overlap nor touch.
Spans = dict[str, list[tuple[int, int]]]


class Journal:
    """The journal of one folder: its attributes hold what it vouches for, and units done wait in it for a sync.

    `owner` says whose run it is (empty: nobody's yet), `planned` and `finished` name files, `rows` is what finished
    units wrote by file, `publishing` the inode of the folder that was about to be renamed to the output, or -1.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self._forget()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        with open(self._fd, "rb", closefd=False) as lines:
            good = sum(len(line) for line in takewhile(self._load, lines))
        os.ftruncate(self._fd, good)

    def is_done(self, unit: str) -> bool:
        """Whether `done` was called for the unit, in this run or, and then synced, in an earlier one."""
        return unit in self._pending or unit in self._units

    def wrote(self, path: Path, nbytes: int) -> None:
        """Note bytes written to a file (or a folder made: its entries must be synced too)."""
        self._unsynced.add(path)
        self._unsynced_bytes += nbytes

    def wrote_rows(self, file: str, tensor: str, start: int, stop: int) -> None:
        """Note rows written, to be vouched for by the next unit done."""
        add_rows(self._fresh.setdefault(file, {}), tensor, start, stop)

    def done(self, unit: str) -> None:
        """Take everything written since the last call as the unit's; sync where enough has gathered."""
        self._pending[unit] = self._fresh
        self._fresh = {}
        if self._unsynced_bytes >= SYNC_BYTES or time.monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Put what was written on disk, then journal the pending units."""
        for path in self._unsynced:
            sync_path(path)
        self._unsynced.clear()
        self._unsynced_bytes = 0
        while self._pending:
            unit = next(iter(self._pending))
            self.append({"unit": unit, "rows": self._pending[unit]})
            del self._pending[unit]
        os.fsync(self._fd)
        self._synced_at = time.monotonic()

    def append(self, record: dict[str, Any]) -> None:
        """Add one line, not yet synced, and let it hold."""
        rest = json.dumps(record).encode() + b"\n"
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        self._apply(record)

    def clear(self) -> None:
        """Forget everything, on disk too."""
        os.ftruncate(self._fd, 0)
        os.fsync(self._fd)
        self._forget()

    def close(self) -> None:
        """Close the file; pending units are lost, to be done again by the next run."""
        os.close(self._fd)

    def _forget(self) -> None:
        self.owner: dict[str, str] = {}
        self.planned: set[str] = set()
        self.finished: set[str] = set()
        self.rows: dict[str, Spans] = {}
        self.publishing = -1
        self._units: set[str] = set()
        self._fresh: dict[str, Spans] = {}
        self._pending: dict[str, dict[str, Spans]] = {}
        self._unsynced: set[Path] = set()
        self._unsynced_bytes = 0
        self._synced_at = time.monotonic()

    def _load(self, line: bytes) -> bool:
        """Take in a line; False where it is torn, or no record."""
        try:
            self._apply(json.loads(line[: line.index(b"\n")]))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return False
        return True

    def _apply(self, record: dict[str, Any]) -> None:
        match record:
            case {"owner": dict(owner)}:  # pyright: ignore[reportUnknownVariableType] - of strings, if it is a record
                self.owner = owner
            case {"planned": str(name)}:
                # Planned anew is laid out anew: what the file held is gone.
                self.planned.add(name)
                self.finished.discard(name)
            case {"finished": str(name)}:
                self.finished.add(name)
            case {"publishing": int(inode)}:
                self.publishing = inode
            case {"unit": str(unit), "rows": rows}:
                # All of it is read before any of it counts.
                found = [
                    (file, tensor, int(start), int(stop))
                    for file, spans in rows.items()
                    for tensor, ranges in spans.items()
                    for start, stop in ranges
                ]
                self._units.add(unit)
                for file, tensor, start, stop in found:
                    add_rows(self.rows.setdefault(file, {}), tensor, start, stop)
            case _:
                raise ValueError(f"not a journal record: {record}")


def add_rows(spans: Spans, tensor: str, start: int, stop: int) -> None:
    """Add rows [start, stop) of a tensor."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted([*spans.get(tensor, []), (start, stop)]):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    spans[tensor] = merged


def sync_path(path: Path) -> None:
    """Put a file's bytes, or a folder's entries, on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def writing(path: Path, partial: Path) -> Generator[None]:
    """Turn an OSError, a full disk above all, into words that say how to go on."""
    try:
        yield
    except OSError as error:
        kept = (
            f"; {partial} is kept, and the same command continues there once this is mended" if partial.is_dir() else ""
        )
        raise CheckpointError(f"cannot write {path}: {error}{kept}") from error
