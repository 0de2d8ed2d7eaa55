"""A GGUF file as a checkpoint: its tensors by transformers' names, a stack of experts as one tensor for each.

Quantized weights are tensors of blocks, `MODULE.q4_0` or `MODULE.q8_0`, which the layout of `quant_method` gguf reads;
`config.json` and the tokenizer's files are made from the metadata.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.header import TensorEntry, quote
from lowbit.shards import Checkpoint, Shard, contained_file
from lowbit_hf.gguf.architecture import architecture_in, config_of, turn
from lowbit_hf.gguf.header import Header, Stored, parse
from lowbit_hf.gguf.rope import FREQUENCIES

_SUFFIX = ".gguf"
# The file that its tensors go to in a folder of safetensors.
_SHARD = "model.safetensors"
# Of half a head.
_MOST_FACTORS = 4096


class GgufCheckpoint(Checkpoint):
    """An open GGUF file; see `Checkpoint`."""

    def __init__(self, shard: Shard, header: Header, orders: Mapping[str, Tensor], files: ExitStack) -> None:
        """Wrap a shard whose tensors' rows stand in these orders."""
        super().__init__([shard], b"", files)
        self.header, self._orders = header, orders
        self.shards = {_SHARD: list(shard.entries.values())}

    @classmethod
    def open_file(cls, path: Path) -> Self:
        """Open a file; its header is checked, its tensors are not read.

        Raises:
            CheckpointError: it cannot be read, is damaged, or of an architecture or a type that lowbit does not read.
        """
        with ExitStack() as files:
            fd, status, header = _open(path, files)
            config = _config(path, header, fd)
            entries, orders = _entries(path, header, config)
            shard = Shard(path, fd, status.st_size, status.st_mtime_ns, header.digest, entries, {})
            return cls(shard, header, orders, files.pop_all())

    def read(self, entry: TensorEntry, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """See `Checkpoint`; a tensor whose rows stand in llama.cpp's order is read whole."""
        order = self._orders.get(entry.name)
        if order is None:
            return super().read(entry, rows, out)
        found = super().read(entry)[order][rows or slice(None)]
        return found if out is None else out.copy_(found)


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file."""
    return path.suffix == _SUFFIX and not path.is_dir()


def locate(path: Path) -> Path:
    """The GGUF file that a folder is there for; the path itself if it is a file, or a folder of something else.

    Raises:
        CheckpointError: it holds several, and nothing says which.
    """
    if not path.is_dir():
        return path
    names = sorted(each.name for each in path.iterdir())
    found = [name for name in names if name.endswith(_SUFFIX)]
    if not found or any(name.endswith(".safetensors") for name in names):
        return path
    if len(found) > 1:
        raise CheckpointError(f"{path} holds {len(found)} GGUF files; name one, such as {path / found[0]}")
    contained_file(path, found[0])
    return path / found[0]


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint: a GGUF file, or whatever `Checkpoint.open` takes.

    Raises:
        CheckpointError: see there.
    """
    return GgufCheckpoint.open_file(path) if is_gguf(path) else Checkpoint.open(path)


def read_metadata(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    with ExitStack() as files:
        return _open(path, files)[2]


def config_in(path: Path) -> dict[str, Any]:
    """The `config.json` that a GGUF file's metadata stand for.

    Raises:
        CheckpointError: it is damaged, or of an architecture that lowbit does not read.
    """
    with ExitStack() as files:
        fd, _, header = _open(path, files)
        return _config(path, header, fd)


def _open(path: Path, files: ExitStack) -> tuple[int, os.stat_result, Header]:
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        files.callback(os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        with open(fd, "rb", closefd=False) as stream:
            return fd, status, parse(stream, path, status.st_size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _config(path: Path, header: Header, fd: int) -> dict[str, Any]:
    try:
        return config_of(header, _factors(header, fd))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _factors(header: Header, fd: int) -> Tensor | None:
    """The rotary factors of a file."""
    stored = header.tensors.get(FREQUENCIES)
    if stored is None:
        return None
    if stored.kind.dtype != torch.float32 or len(stored.shape) != 1 or not 0 < stored.shape[0] <= _MOST_FACTORS:
        raise CheckpointError(f"{FREQUENCIES} is {stored.kind.name} {stored.shape}; needed are a head's factors")
    return torch.frombuffer(bytearray(os.pread(fd, stored.nbytes, stored.offset)), dtype=torch.float32)


def _entries(path: Path, header: Header, config: Mapping[str, Any]) -> tuple[dict[str, TensorEntry], dict[str, Tensor]]:
    """The tensors by transformers' names, and the orders of rows to undo."""
    architecture = architecture_in(header)
    entries: dict[str, TensorEntry] = {}
    orders: dict[str, Tensor] = {}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for stored in header.tensors.values():
        if stored.name == FREQUENCIES:
            continue
        ours, where = architecture.original(stored.name), f"{path}: tensor {quote(stored.name)}"
        stacked = ours is not None and "{}" in ours
        if ours is None or len(stored.shape) != (3 if stacked else 1 if _is_row(ours) else 2):
            raise CheckpointError(f"{where} of shape {stored.shape} has no place in {config['architectures'][0]}")
        made = _stack(stored, ours, path, config) if stacked else [_entry(stored, ours, path, stored.shape, 0)]
        entries |= {entry.name: entry for entry in made}
        part = stored.name.split(".")[2] if stored.name.startswith("blk.") else ""
        if architecture.turned and part in heads:
            count = heads[part]
            if stored.shape[0] % (2 * count):
                raise CheckpointError(f"{where} has {stored.shape[0]} rows, no multiple of 2 x {count} heads")
            orders[made[0].name] = turn(stored.shape[0], count).argsort()
    return entries, orders


def _is_row(name: str) -> bool:
    return name.endswith((".bias", "norm.weight"))


def _stack(stored: Stored, ours: str, path: Path, config: Mapping[str, Any]) -> list[TensorEntry]:
    """Each expert of a stack."""
    count = stored.shape[0]
    if count != config["num_local_experts"]:
        raise CheckpointError(
            f"{path}: tensor {quote(stored.name)} holds {count} experts; the metadata say {config['num_local_experts']}"
        )
    size = stored.nbytes // count
    return [_entry(stored, ours.format(e), path, stored.shape[1:], e * size) for e in range(count)]


def _entry(stored: Stored, name: str, path: Path, shape: tuple[int, ...], start: int) -> TensorEntry:
    kind = stored.kind
    nbytes = stored.nbytes // (stored.shape[0] if len(shape) < len(stored.shape) else 1)
    if kind.block > 1:
        if len(shape) != 2:
            raise CheckpointError(
                f"{path}: tensor {quote(stored.name)} is {kind.name}, and lowbit reads matrices of it"
            )
        name = f"{name.removesuffix('.weight')}.{kind.name.lower()}"
        shape = (shape[0], shape[1] // kind.block, kind.size)
    return TensorEntry(name, kind.dtype, shape, path, stored.offset + start, nbytes)
