"""Reading safetensors checkpoints: every byte of a header is checked, and only the rows asked for are in memory.

The safetensors library maps the file, and mapped pages count as resident memory: streaming an 8 GiB checkpoint through
it would break lowbit's bound of 1.5 GiB. Here plain `preadv` fills a tensor instead, so memory is what the caller asks
for, and the header's claims are checked against the file before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import weakref
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.header import (
    DTYPE_NAMES,
    DTYPES,
    HEADER_LIMIT,
    TensorEntry,
    as_object,
    is_strings,
    parse_header,
    parse_json,
    quote,
    quote_names,
)

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "INDEX_NAME",
    "Checkpoint",
    "Shard",
    "TensorEntry",
    "byte_view",
    "contained_file",
    "read_contained",
    "read_header",
    "row_slices",
]

INDEX_NAME: Final = "model.safetensors.index.json"

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_INDEX_LIMIT = 64 << 20
_INDEX_CONTAINERS = 100


@dataclass(frozen=True, slots=True)
class Shard:
    """One open file of a checkpoint: what it holds, and by what to know that it did not change."""

    file: Path
    fd: int
    size: int
    mtime_ns: int
    # sha256 of its header.
    digest: str
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


class Checkpoint:
    """An open checkpoint of one or more safetensors shards; a context manager that closes their files.

    `entries` holds every tensor in order of shard name and offset, `shards` the same by file name, `metadata` the
    header pairs that all shards agree on, `nbytes` the bytes of all tensors. Reading from several threads is safe.
    """

    def __init__(self, shards: list[Shard], index: bytes, files: ExitStack) -> None:
        self._files = files
        # Where an error comes between opening and closing, whoever held it lets go of its files all the same.
        weakref.finalize(self, files.close)
        self._opened = {shard.file: shard for shard in shards}
        self.shards = {shard.file.name: list(shard.entries.values()) for shard in shards}
        self.entries = {entry.name: entry for entries in self.shards.values() for entry in entries}
        self.metadata = dict(
            pair for pair in shards[0].metadata.items() if all(pair in shard.metadata.items() for shard in shards)
        )
        self.nbytes = sum(entry.nbytes for entry in self.entries.values())
        digest = hashlib.sha256(f"{len(index)}:".encode() + index)
        for shard in shards:
            digest.update(json.dumps([shard.file.name, shard.size, shard.mtime_ns, shard.digest]).encode())
        self._fingerprint = digest.hexdigest()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open one safetensors file, or a folder's: those its index names, else `model.safetensors`, else the only one.

        Every header is read and checked. Several files without an index are refused, for nothing says which belong
        together; so is `model.safetensors` beside an index that does not name it, because readers differ in their pick.
        A folder's files must lie inside it, or be links of a Hugging Face hub cache into its `blobs`.

        Raises:
            CheckpointError: the folder holds no safetensors or is ambiguous, a file is missing, unreadable, outside the
                folder, damaged or hostile, or the index and the shards disagree.
        """
        path = Path(path)
        with ExitStack() as files:
            if not os.path.isdir(path):  # noqa: PTH112 - Path's raises where a parent may not be searched
                return cls([_open_shard(path, files)], b"", files.pop_all())
            index = b""
            weight_map: dict[str, str] | None = None
            if os.path.lexists(path / INDEX_NAME):
                index, weight_map = _read_index(path)
            names = sorted(set(weight_map.values())) if weight_map else [_find_single(path)]
            shards = [_open_shard(path / name, files, contained_file(path, name)) for name in names]
            _check_unique(shards)
            if weight_map:
                _check_index(path / INDEX_NAME, weight_map, shards)
            return cls(shards, index, files.pop_all())

    def read(self, entry: TensorEntry, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """The tensor, or its `rows` of dim 0 (shape `(rows, *shape[1:])`), in fresh CPU memory or in `out`.

        Raises:
            CheckpointError: the entry is of another or a closed checkpoint, rows are not consecutive, `out` does not
                fit, or the file changed since it was opened.
        """
        shard = self._opened.get(entry.file)
        if shard is None:
            raise CheckpointError(f"tensor {quote(entry.name)} is not of an open checkpoint; open {entry.file} first")
        start, stop, step = (rows or slice(None)).indices(entry.rows)
        if step != 1 or (not entry.shape and (start, stop) != (0, 1)):
            raise CheckpointError(f"tensor {quote(entry.name)} of shape {entry.shape} has no consecutive rows {rows}")
        count = max(stop - start, 0)
        shape = (count, *entry.shape[1:]) if entry.shape else ()
        if out is None:
            out = torch.empty(shape, dtype=entry.dtype, device="cpu")
        elif (out.dtype, tuple(out.shape)) != (entry.dtype, shape):
            raise CheckpointError(
                f"out is {out.dtype} {tuple(out.shape)}; these rows of {quote(entry.name)} are {entry.dtype} {shape}"
            )
        with _reading(entry.file):
            whole = _fill(shard.fd, byte_view(out), entry.offset + start * entry.row_nbytes)
            now = os.fstat(shard.fd)
        if not whole or (now.st_size, now.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise CheckpointError(f"{entry.file} changed while it was read; start again once it is complete")
        return out

    def fingerprint(self) -> str:
        """sha256 over the index and every shard's name, size, modification time and header; not over tensor data."""
        return self._fingerprint

    def close(self) -> None:
        """Close every file; `read` is refused from then on."""
        self._opened.clear()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of one safetensors file in order of offset, and its metadata.

    Raises:
        CheckpointError: the file is unreadable, truncated, or breaks the format anywhere; the message says where.
    """
    with ExitStack() as files:
        shard = _open_shard(Path(path), files)
    return shard.entries, shard.metadata


def row_slices(entry: TensorEntry, max_bytes: int, align: int = 1) -> Iterator[slice]:
    """Consecutive row slices that cover the tensor, each of at most `max_bytes` and a multiple of `align` rows.

    The last slice may be shorter, and `align` rows are never split, however many bytes they have.
    """
    assert align >= 1
    fit = max_bytes // max(entry.row_nbytes, 1)
    step = max(fit // align, 1) * align
    for start in range(0, entry.rows, step):
        yield slice(start, min(start + step, entry.rows))


def lies_inside(root: Path, real: Path) -> bool:
    """Whether the real path `real` belongs to the real folder `root`.

    One kind of link may leave a folder: that of a hub cache, `models--*/snapshots/*/name` to `models--*/blobs/*`.
    """
    cache = root.parent.parent
    hub = root.parent.name == "snapshots" and cache.name.startswith("models--")
    return real.is_relative_to(root) or (hub and real.parent == cache / "blobs")


def contained_file(folder: Path, name: str) -> Path:
    """Real path of the file `name` of `folder`, links followed, once it is known to lie inside (see `lies_inside`).

    Raises:
        CheckpointError: `name` is not a plain file name, does not exist, or leads outside.
    """
    shown = f"{folder}: file {quote(name)}"
    if name != PurePosixPath(name).name or name == ".." or "\\" in name or not name.isprintable():
        raise CheckpointError(f"{shown} is not a plain file name; every file must lie directly in the folder")
    try:
        root = Path(os.path.realpath(folder, strict=True))
        real = Path(os.path.realpath(root / name, strict=True))
    except FileNotFoundError as error:
        raise CheckpointError(f"{shown} is missing; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{shown} cannot be reached: {error.strerror}") from error
    if not lies_inside(root, real):
        raise CheckpointError(f"{shown} is a link to {real}, outside the folder; replace it by a copy if you trust it")
    return real


def read_contained(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of the file `name` of `folder` (see `contained_file`), at most `limit` of them.

    Raises:
        CheckpointError: as `contained_file`; or it is unreadable, no regular file, or larger.
    """
    file, real = folder / name, contained_file(folder, name)
    with _reading(file), ExitStack() as files:
        fd, status = _open(file, files, real)
        if status.st_size > limit:
            raise CheckpointError(f"{file} holds {status.st_size} bytes, more than {limit}; the folder is damaged")
        return _read(fd, file, 0, status.st_size)


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it.

    Raises:
        CheckpointError: the tensor is elsewhere or not contiguous.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(f"needs a contiguous CPU tensor, got {tensor.device} with stride {tensor.stride()}")
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _open_shard(file: Path, files: ExitStack, real: Path | None = None) -> Shard:
    with _reading(file):
        fd, status = _open(file, files, real or file)
        header = _read_header_bytes(fd, file, status.st_size)
    entries, metadata = parse_header(header, file, status.st_size)
    digest = hashlib.sha256(header).hexdigest()
    return Shard(file, fd, status.st_size, status.st_mtime_ns, digest, entries, metadata)


def _open(file: Path, files: ExitStack, real: Path) -> tuple[int, os.stat_result]:
    # Without O_NONBLOCK, opening a pipe would wait for its writer for ever.
    fd = os.open(real, os.O_RDONLY | os.O_NONBLOCK)
    files.callback(os.close, fd)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file} is not a regular file")
    return fd, status


def _read(fd: int, file: Path, offset: int, count: int) -> bytes:
    read = bytearray(count)
    if not _fill(fd, memoryview(read), offset):
        raise CheckpointError(f"{file} changed while it was read; start again once it is complete")
    return bytes(read)


def _read_header_bytes(fd: int, file: Path, size: int) -> bytes:
    if size < 8:
        raise CheckpointError(f"{file} holds {size} bytes, too few for a safetensors file; download it again")
    first = os.pread(fd, 8, 0)
    if first == b"version ":
        raise CheckpointError(f"{file} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")
    length = int.from_bytes(first, "little")
    if not 0 < length <= HEADER_LIMIT:
        raise CheckpointError(f"{file} is not a safetensors file: header of {length} bytes, not 1 to {HEADER_LIMIT}")
    if 8 + length > size:
        raise CheckpointError(f"{file} is truncated: it holds {size} bytes, but its header alone needs {8 + length}")
    return _read(fd, file, 8, length)


def _read_index(folder: Path) -> tuple[bytes, dict[str, str]]:
    file, raw = folder / INDEX_NAME, read_contained(folder, INDEX_NAME, _INDEX_LIMIT)
    index = as_object(parse_json(raw, str(file), _INDEX_CONTAINERS)) or {}
    weight_map = index.get("weight_map")
    if not weight_map or not is_strings(weight_map):
        raise CheckpointError(f"{file} has no weight_map object of tensor names to file names; download it again")
    return raw, weight_map


def _find_single(folder: Path) -> str:
    with _reading(folder):
        names = sorted(entry.name for entry in os.scandir(folder))
    shards = [name for name in names if name.endswith(".safetensors")]
    if "model.safetensors" in shards:
        return "model.safetensors"
    if len(shards) == 1:
        return shards[0]
    if shards:
        raise CheckpointError(
            f"{folder} holds {quote_names(shards)} and no {INDEX_NAME}; add the index or name one file"
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        how = (
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            if any(name.endswith(".bin") for name in pickles)
            else "safetensors.torch.save_file(torch.load(file, weights_only=True), new_file)"
        )
        raise CheckpointError(
            f"{folder} holds {quote_names(pickles)}, pickles, which can run code and are never loaded; convert what "
            f"you trust: {how}"
        )
    raise CheckpointError(f"{folder} holds no .safetensors file; give the folder of a Hugging Face model")


def _check_unique(shards: list[Shard]) -> None:
    holder: dict[str, Path] = {}
    for shard in shards:
        for name in shard.entries:
            if name in holder:
                raise CheckpointError(f"tensor {quote(name)} is both in {holder[name]} and in {shard.file}; delete one")
            holder[name] = shard.file


def _check_index(index: Path, weight_map: dict[str, str], shards: list[Shard]) -> None:
    single = index.with_name("model.safetensors")
    if os.path.lexists(single) and single.name not in weight_map.values():
        raise CheckpointError(f"{single} is not in {index}, and readers differ in which they take; delete one of them")
    holder = {name: shard.file.name for shard in shards for name in shard.entries}
    absent = [name for name, file in weight_map.items() if holder.get(name) != file]
    if absent:
        raise CheckpointError(
            f"{index} names tensors that its shards lack: {quote_names(absent)}; download the shards again"
        )
    unnamed = [name for name in holder if name not in weight_map]
    if unnamed:
        raise CheckpointError(f"{index} does not name {quote_names(unnamed)} of its shards; download the index again")


def _fill(fd: int, view: memoryview, offset: int) -> bool:
    """Read the whole view from `offset`; False where the file ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


@contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
