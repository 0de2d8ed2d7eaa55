"""An output folder that appears whole or not at all, written so that a killed run continues where it stopped.

Until it is published, the output `name` is the folder `.name.partial` beside it:

    lock             locked by the process at work; holds its id
    journal.jsonl    whose run this is, and the units of work whose bytes are on disk
    files/           the output so far
    scratch/         what a run needs to go on with, and nobody else

A unit is journalled only after its bytes are synced, and resuming trusts the journal alone: what it does not name is
written again. To publish is to rename `files`, which is atomic. An old output is renamed to `.name.replaced` just
before and deleted after; a run killed between the two renames leaves no output, and the next `open` puts the old one
back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.header import TensorEntry, lay_out, quote, quote_names
from lowbit.journal import Journal, Spans, add_rows, sync_path, writing
from lowbit.shards import byte_view

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_JOURNAL = "journal.jsonl"
_LOCK = "lock"
_FILES = "files"
_SCRATCH = "scratch"


class Staging:
    """One output folder in the making; a context manager that, left before `publish`, keeps all for the next run.

    `published` is true once the output is in place: after `publish`, or from the start where a killed run had come so
    far, and then nothing is left to do. Not safe to use from several threads at once.
    """

    def __init__(self, out: Path, journal: Journal, opened: ExitStack, *, overwrite: bool, settle: bool) -> None:
        self.out = out
        self.partial = _partial(out)
        self.overwrite = overwrite
        self._settle = settle
        self.published = False
        self._files = self.partial / _FILES
        self._replaced = out.with_name(f".{out.name}.replaced")
        self._journal = journal
        self._opened = opened
        self._names: set[str] = set()

    @classmethod
    def open(
        cls,
        out: str | os.PathLike[str],
        *,
        fingerprint: str,
        overwrite: bool = False,
        command: str = "",
        settle: bool = True,
    ) -> Self:
        """Begin the output folder `out`, or continue it if the partial folder's journal has this `fingerprint`.

        `command` is recorded, so that an error in another run can name the one to finish. Without `settle`, the journal
        of a published output stays, by which later calls find it published too, until one with `settle` removes it.

        Raises:
            CheckpointError: `out` exists (without `overwrite`) or is not a folder, its parent is missing or not
                writable, another process is writing it, or the partial folder is another run's (without `overwrite`).
        """
        out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link that stands at `out`
        partial = _partial(out)
        if not out.parent.is_dir():
            raise CheckpointError(f"cannot make {out}: the folder {out.parent} does not exist; create it first")
        if not os.path.lexists(partial):
            _check_free(out, overwrite=overwrite)
        elif partial.is_symlink() or not partial.is_dir():
            raise CheckpointError(f"{partial} is in the way and no folder; remove it")
        with ExitStack() as opened, writing(partial, partial):
            partial.mkdir(exist_ok=True)
            _acquire(partial, opened)
            journal = Journal(partial / _JOURNAL)
            opened.callback(journal.close)
            staging = cls(out, journal, opened, overwrite=overwrite, settle=settle)
            staging._recover(fingerprint)
            if not staging.published:
                staging._begin({"fingerprint": fingerprint, "command": command})
            staging._opened = opened.pop_all()
        return staging

    @property
    def files(self) -> Path:
        """Folder of the output so far."""
        return self._files

    @property
    def scratch(self) -> Path:
        """Folder for files that a run which continues this one needs; deleted when the output is published."""
        return scratch_of(self.out)

    def wrote(self, *paths: Path) -> None:
        """Note that files of `scratch` were written, so that they are on disk before the next unit counts as done."""
        for path in paths:
            self._journal.wrote(path, path.stat().st_size)

    def is_done(self, unit: str) -> bool:
        """Whether `unit` need not be done (again)."""
        return self._journal.is_done(unit)

    def done(self, *units: str) -> None:
        """Record that everything of `units` has been written; it is on disk, and survives a kill, from the next sync.

        Raises:
            CheckpointError: the disk failed.
        """
        with self._writing(self.partial):
            for unit in units:
                self._journal.done(unit)

    def sync(self) -> None:
        """Put everything written so far on disk, then the units done so far into the journal.

        Raises:
            CheckpointError: the disk failed.
        """
        with self._writing(self.partial):
            self._journal.sync()

    def require_space(self, nbytes: int) -> None:
        """Check that an output of `nbytes` in all fits, counting what the partial folder already holds.

        Raises:
            CheckpointError: it does not.
        """
        with self._writing(self.partial):
            system = os.statvfs(self.partial)
            # POSIX counts st_blocks in 512 bytes, whatever the file system's own block is.
            held = sum(path.lstat().st_blocks * 512 for path in self._files.rglob("*"))
        free = system.f_bavail * system.f_frsize
        if nbytes - held > free:
            raise CheckpointError(
                f"{self.out} needs {nbytes} bytes and holds {held} of them, but its disk has only {free} free; "
                f"free {nbytes - held - free} more, or write to another disk"
            )

    def plan_file(
        self, name: str, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> ShardWriter:
        """Lay out a safetensors file and reserve its bytes, or open it again with what the journal vouches for.

        Raises:
            CheckpointError: the name is not free, the tensors cannot be stored (see `lay_out`), the disk is full, or
                the file on disk is not the one that the journal speaks of.
        """
        header, entries = lay_out(tensors, metadata, self._files / name)
        return self.plan_bytes(name, header, entries, len(header) + sum(entry.nbytes for entry in entries.values()))

    def plan_bytes(self, name: str, header: bytes, entries: Mapping[str, TensorEntry], size: int) -> ShardWriter:
        """Lay out a file of any format, `size` bytes of which all but header and tensors are 0, as `plan_file` does.

        Raises:
            CheckpointError: as `plan_file`.
        """
        path = self._claim(name)
        rows = self._journal.rows.get(name, {})
        with self._writing(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666) if rows else _create(path, header, size)
            writer = ShardWriter(name, fd, dict(entries), rows, self._journal)
            self._opened.callback(writer.close)
            if os.fstat(fd).st_size != size or os.pread(fd, len(header), 0) != header:
                raise CheckpointError(f"{path} is not as this run left it; delete {self.partial} and start again")
            if not rows:
                self._journal.append({"planned": name})
                self._wrote(path, len(header))
        return writer

    def copy_file(self, source: str | os.PathLike[str], name: str) -> None:
        """Copy the bytes of a regular file, links followed, to `name` in the output.

        Raises:
            CheckpointError: the source is not a regular file, the name is not free, or reading or writing failed.
        """
        path = self._claim(name)
        if not Path(source).is_file():
            raise CheckpointError(f"cannot copy {source}: it is not a regular file")
        with self._writing(path):
            shutil.copyfile(source, path)
            self._wrote(path, path.stat().st_size)

    def link_file(self, source: str | os.PathLike[str], name: str) -> None:
        """Give a file of `scratch` the name `name` in the output; its bytes are not copied where disks have links.

        Raises:
            CheckpointError: the name is not free, or writing failed.
        """
        path = self._claim(name)
        with self._writing(path):
            path.unlink(missing_ok=True)
            try:
                os.link(source, path)
            except OSError:
                shutil.copyfile(source, path)
            self._wrote(path, path.stat().st_size)

    def write_text(self, name: str, text: str) -> None:
        """Write `text` in UTF-8, line ends as they are, to `name` in the output.

        Raises:
            CheckpointError: the name is not free, or writing failed.
        """
        path = self._claim(name)
        with self._writing(path):
            path.write_bytes(text.encode())
            self._wrote(path, path.stat().st_size)

    def publish(self) -> None:
        """Rename the whole to `out`, replacing an old one with `overwrite`, and close.

        Raises:
            CheckpointError: a planned file is unfinished, `out` appeared meanwhile, or the disk failed.
        """
        if self.published:
            return
        if unfinished := self._journal.planned - self._journal.finished:
            raise CheckpointError(f"{self.out} is not complete: {quote_names(sorted(unfinished))} not finished")
        self.sync()
        _check_free(self.out, overwrite=self.overwrite)
        with self._writing(self.out):
            # How a later run knows that the folder at `out` is this one: a rename keeps the inode.
            self._journal.append({"publishing": self._files.stat().st_ino})
            self._journal.sync()
            if os.path.lexists(self.out):
                _remove(self._replaced)
                self.out.rename(self._replaced)
            self._files.rename(self.out)
            sync_path(self.out.parent)
            self.published = True
            self._clean(settle=self._settle)
        self.close()

    def discard(self) -> None:
        """Delete the partial folder, and close.

        Raises:
            CheckpointError: the disk failed.
        """
        with self._writing(self.partial):
            self._journal.clear()
            self._clean()
        self.close()

    def close(self) -> None:
        """Let go of files and lock; what was not synced is done again by the next run."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recover(self, fingerprint: str) -> None:
        """Bring what a killed run left behind into one of: published, to be continued, empty."""
        journal, staged = self._journal, self._files.is_dir()
        if os.path.lexists(self._replaced) and not os.path.lexists(self.out):
            self._replaced.rename(self.out)
        strange = {path.name for path in self.partial.iterdir()} - {_LOCK, _JOURNAL, _FILES, _SCRATCH}
        if strange and not journal.owner:
            raise CheckpointError(f"{self.partial} holds {quote_names(sorted(strange))}, not of lowbit; move it away")
        same = journal.owner.get("fingerprint") == fingerprint
        moved = not staged and os.path.lexists(self.out) and self.out.lstat().st_ino == journal.publishing
        if moved and same:
            self._clean(settle=self._settle)
            self.published = True
        elif journal.owner and not same and not moved and not self.overwrite:
            command = journal.owner.get("command") or "another command"
            raise CheckpointError(
                f"{self.partial} is the unfinished output of another run: {command}; run that again to finish it "
                "(with the lowbit and the input that it began with), "
                f"delete the folder, or pass --overwrite to discard it (journal: {self.partial / _JOURNAL})"
            )
        elif not same or not staged:
            # In this order: a journal never speaks of files that are gone.
            journal.clear()
            _remove(self._files)
            _remove(self.scratch)

    def _begin(self, owner: dict[str, str]) -> None:
        try:
            _check_free(self.out, overwrite=self.overwrite)
        except CheckpointError:
            if not self._journal.owner:
                self._clean()
            raise
        if not self._journal.owner:
            self._journal.append({"owner": owner})
            self._journal.sync()
        self._files.mkdir(exist_ok=True)
        self.scratch.mkdir(exist_ok=True)

    def _clean(self, *, settle: bool = True) -> None:
        """Remove the old output and the partial folder; until that is empty, its journal can say that all is done."""
        _remove(self._replaced)
        _remove(self._files)
        _remove(self.scratch)
        if not settle:
            return
        (self.partial / _JOURNAL).unlink(missing_ok=True)
        (self.partial / _LOCK).unlink(missing_ok=True)
        self.partial.rmdir()

    def _claim(self, name: str) -> Path:
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or any(part in {"", ".", ".."} for part in parts):
            raise CheckpointError(f"output file {quote(name)} must be a plain path inside the output folder")
        if name in self._names:
            raise CheckpointError(f"output file {quote(name)} is already written; give every file its own name")
        self._names.add(name)
        path = self._files / name
        with self._writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _wrote(self, path: Path, nbytes: int) -> None:
        self._journal.wrote(path, nbytes)
        for folder in path.parents:
            if folder.is_relative_to(self._files):
                self._journal.wrote(folder, 0)

    def _writing(self, path: Path) -> AbstractContextManager[None]:
        return writing(path, self.partial)


class ShardWriter:
    """One safetensors file laid out in full, whose tensors are written in any order; made by `Staging.plan_file`."""

    def __init__(self, name: str, fd: int, entries: dict[str, TensorEntry], rows: Spans, journal: Journal) -> None:
        self.entries = entries
        self._name = name
        self._fd = fd
        self._rows = {tensor: list(spans) for tensor, spans in rows.items()}
        self._journal = journal

    def write(self, name: str, tensor: Tensor, row_offset: int = 0) -> None:
        """Write a contiguous CPU tensor as rows `[row_offset, row_offset + rows)` of tensor `name`.

        Raises:
            CheckpointError: the file has no such tensor, dtype or shape do not fit it, or writing failed.
        """
        entry = self.entries.get(name)
        if entry is None or self._fd < 0:
            state = "is finished or closed" if self._fd < 0 else "was planned without it"
            raise CheckpointError(f"{self._name} cannot take tensor {quote(name)}: the file {state}")
        stop = row_offset + (tensor.shape[0] if tensor.dim() else 1)
        fits = tensor.dtype == entry.dtype and (tensor.dim(), tensor.shape[1:]) == (len(entry.shape), entry.shape[1:])
        if not fits or not 0 <= row_offset <= stop <= entry.rows:
            raise CheckpointError(
                f"rows {row_offset}:{stop} of {tensor.dtype} {tuple(tensor.shape)} do not fit into {quote(name)}, "
                f"planned as {entry.dtype} {entry.shape}"
            )
        view = byte_view(tensor)
        with writing(entry.file, self._journal.folder):
            _write(self._fd, view, entry.offset + row_offset * entry.row_nbytes)
            self._journal.wrote(entry.file, len(view))
        self._journal.wrote_rows(self._name, name, row_offset, stop)
        add_rows(self._rows, name, row_offset, stop)

    def finish(self) -> None:
        """Put the file on disk, record that it is complete, and close it.

        Raises:
            CheckpointError: a row was never written, or the disk failed.
        """
        whole = {
            name
            for name, entry in self.entries.items()
            if not entry.nbytes or self._rows.get(name) == [(0, entry.rows)]
        }
        if missing := [name for name in self.entries if name not in whole]:
            raise CheckpointError(f"{self._name} is not complete: rows of {quote_names(missing)} were not written")
        with writing(self._journal.folder / _FILES / self._name, self._journal.folder):
            self._journal.sync()
            self._journal.append({"finished": self._name})
            self.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def scratch_of(out: str | os.PathLike[str]) -> Path:
    """The scratch folder of an output, which is there while a process stages it."""
    return _partial(Path(os.path.abspath(out))) / _SCRATCH  # noqa: PTH100 - as in `open`


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _check_free(out: Path, *, overwrite: bool) -> None:
    """Check that `out` may be put in place."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise CheckpointError(f"output {out} exists; pass --overwrite to replace it, or choose another folder")
    if out.is_symlink() or not out.is_dir():
        raise CheckpointError(f"output {out} exists and is not a folder; remove it, or choose another folder")


def _acquire(partial: Path, opened: ExitStack) -> None:
    """Lock the partial folder until `opened` closes."""
    path = partial / _LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    opened.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 32, 0).decode(errors="replace") or "another"
        raise CheckpointError(f"{partial} is being written by process {holder}; wait for it, or stop it") from error
    if not path.exists() or path.stat().st_ino != os.fstat(fd).st_ino:
        raise CheckpointError(f"another process has just finished with {partial}; run this again")
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)


def _create(path: Path, header: bytes, size: int) -> int:
    """A new file of `size` bytes, all reserved, with its header written."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _reserve(fd, size)
        _write(fd, memoryview(header), 0)
    except BaseException:
        # A disk that is full is not kept full by bytes that nobody can use.
        os.close(fd)
        path.unlink()
        raise
    return fd


def _reserve(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as error:
        # macOS lacks the call, and some file systems refuse it; there a full disk shows only when it is written to.
        if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
            raise
        os.ftruncate(fd, size)


def _write(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def _remove(folder: Path) -> None:
    if os.path.lexists(folder):
        shutil.rmtree(folder)
